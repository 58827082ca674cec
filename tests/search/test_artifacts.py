"""Shared files: the same bytes come out, wrong ones never, in a folder and in a bucket."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import pytest

from nas.core.errors import RecordError, StorageError, UsageError
from nas.core.jsonio import file_sha256
from nas.search.artifacts import Artifacts, FileRef, open_artifacts
from nas.testing import requires_package


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(storage=optuna.storages.InMemoryStorage())


def in_folder(folder: Path, study: optuna.Study) -> Artifacts:
    return open_artifacts(str(folder), study._storage)


def test_a_file_comes_back_as_it_was_and_is_listed_with_its_study(tmp_path: Path, study: optuna.Study) -> None:
    (tmp_path / "a.npy").write_bytes(b"numbers")
    store = in_folder(tmp_path / "store", study)
    ref = store.upload(tmp_path / "a.npy", study)
    assert (ref.name, ref.sha256) == ("a.npy", file_sha256(tmp_path / "a.npy"))
    store.fetch(ref, tmp_path / "there" / "b.npy")
    assert (tmp_path / "there" / "b.npy").read_bytes() == b"numbers"
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["b.npy"]
    [listed] = optuna.artifacts.get_all_artifact_meta(study)
    assert (listed.filename, listed.artifact_id) == ("a.npy", ref.artifact)


def test_a_file_that_was_changed_in_the_store_is_refused_and_leaves_nothing(
    tmp_path: Path, study: optuna.Study
) -> None:
    (tmp_path / "a.npy").write_bytes(b"numbers")
    store = in_folder(tmp_path / "store", study)
    ref = store.upload(tmp_path / "a.npy", study)
    (tmp_path / "store" / ref.artifact).write_bytes(b"number5")
    with pytest.raises(StorageError, match=r"a\.npy .* is not the file that was kept there"):
        store.fetch(ref, tmp_path / "there" / "a.npy")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_missing_file_says_what_to_do(tmp_path: Path, study: optuna.Study) -> None:
    store = in_folder(tmp_path / "store", study)
    with pytest.raises(StorageError, match=r"a\.npy \(x\) is not there\. All machines must see the same store"):
        store.fetch(FileRef("a.npy", "0" * 64, "x"), tmp_path / "a.npy")
    store.forget([FileRef("a.npy", "0" * 64, "x")])  # what is gone already may be removed


def test_a_cached_file_is_fetched_once(tmp_path: Path, study: optuna.Study) -> None:
    (tmp_path / "a.npy").write_bytes(b"numbers")
    store = in_folder(tmp_path / "store", study)
    ref = store.upload(tmp_path / "a.npy", study)
    first = store.cached(ref, tmp_path / "cache")
    store.forget([ref])
    assert store.cached(ref, tmp_path / "cache") == first
    assert first.read_bytes() == b"numbers"


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "", ".hidden"])
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(RecordError, match="a plain file name is needed"):
        FileRef(name, "0" * 64, "x")


@pytest.mark.parametrize("where", ["ftp://host/x", "s3://key:secret@bucket", "s3:///prefix"])
def test_another_kind_of_place_is_refused(where: str, tmp_path: Path, study: optuna.Study) -> None:
    del tmp_path
    with pytest.raises(UsageError, match="Allowed: a folder that all machines see, or s3://BUCKET/PREFIX") as e:
        open_artifacts(where, study._storage)
    assert "secret" not in str(e.value)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, study: optuna.Study) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be used for artifacts"):
        open_artifacts(str(tmp_path / "file"), study._storage)


@dataclass
class Bucket:
    """The part of a client of S3 that Optuna's store uses."""

    objects: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        if (Bucket, Key) not in self.objects:
            from botocore.exceptions import ClientError

            raise ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject")
        return {"Body": io.BytesIO(self.objects[Bucket, Key])}

    def upload_fileobj(self, body: BinaryIO, bucket: str, key: str) -> None:
        self.objects[bucket, key] = body.read()

    def delete_object(self, Bucket: str, Key: str) -> None:
        del self.objects[Bucket, Key]


def test_a_bucket_keeps_files_below_its_prefix(tmp_path: Path, study: optuna.Study) -> None:
    requires_package("boto3", "S3")
    (tmp_path / "a.npy").write_bytes(b"numbers")
    bucket = Bucket()
    store = open_artifacts("s3://nas/some/prefix/", study._storage, bucket)
    ref = store.upload(tmp_path / "a.npy", study)
    assert list(bucket.objects) == [("nas", f"some/prefix/{ref.artifact}")]
    store.fetch(ref, tmp_path / "b.npy")
    assert (tmp_path / "b.npy").read_bytes() == b"numbers"
    store.forget([ref])
    assert bucket.objects == {}
    with pytest.raises(StorageError, match=r"s3://nas/some/prefix/: a\.npy .* is not there"):
        store.fetch(ref, tmp_path / "c.npy")
