"""Files that the machines of one search share: images, teacher's answers, shared weights, checkpoints, logits.

They lie in an artifact store of Optuna, a folder that all machines see or a bucket of an S3-compatible service, and are
known by the SHA-256 of their content, which is checked whenever one is fetched.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

import optuna
from filelock import FileLock
from optuna.artifacts import exceptions

from nas.core.errors import RecordError, StorageError, UsageError
from nas.core.jsonio import file_sha256

MISSING_FIX = "All machines must see the same store; name it: --artifacts DIR, or --artifacts s3://BUCKET/PREFIX"


class ArtifactStore(Protocol):
    """What Optuna's stores offer, and what its upload and download functions ask for."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The content."""
        ...

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keeps the content."""
        ...

    def remove(self, artifact_id: str) -> None:
        """Forgets it."""
        ...


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file in the store: its plain name, the SHA-256 of its content, and Optuna's id of the artifact."""

    name: str
    sha256: str
    artifact: str

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise RecordError(f"shared file: a plain file name is needed, got {self.name!r}")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise RecordError(f"shared file {self.name}: not a SHA-256: {self.sha256!r}")


class _Prefixed:
    """A store inside a part of another one: Optuna's for S3 has no folders."""

    def __init__(self, store: ArtifactStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return self._store.open_reader(self._prefix + artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._store.write(self._prefix + artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        self._store.remove(self._prefix + artifact_id)


class Artifacts:
    """A store together with the storage whose studies and trials list its artifacts; made by `open_artifacts`.

    Args:
        store: Optuna's.
        where: its place, for messages.
        storage: of the studies.
        errors: what the store raises.
    """

    def __init__(
        self,
        store: ArtifactStore,
        where: str,
        storage: optuna.storages.BaseStorage,
        errors: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        self.where = where
        self._store, self._storage, self._errors = store, storage, errors

    def upload(self, path: Path, owner: optuna.trial.FrozenTrial | optuna.Study) -> FileRef:
        """Keeps a file; it is listed with its trial or study.

        Raises:
            StorageError: the store does not take it.
        """
        sha256 = file_sha256(path)
        try:
            artifact = optuna.artifacts.upload_artifact(
                artifact_store=self._store, file_path=str(path), study_or_trial=owner, storage=self._storage
            )
        except self._errors as e:
            raise StorageError(f"{self.where}: {path.name} cannot be kept there: {e}") from e
        return FileRef(path.name, sha256, artifact)

    def fetch(self, ref: FileRef, target: Path) -> None:
        """Brings a file here; it appears whole, or not at all.

        Raises:
            StorageError: it is not in the store, is not what was kept, or cannot be written.
        """
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as folder:
                staged = Path(folder) / "file"
                optuna.artifacts.download_artifact(
                    artifact_store=self._store, file_path=str(staged), artifact_id=ref.artifact
                )
                if file_sha256(staged) != ref.sha256:
                    raise StorageError(f"{self.where}: {ref.name} ({ref.artifact}) is not the file that was kept there")
                with staged.open("rb") as f:
                    os.fsync(f.fileno())
                staged.replace(target)
        except exceptions.ArtifactNotFound as e:
            raise StorageError(f"{self.where}: {ref.name} ({ref.artifact}) is not there. {MISSING_FIX}") from e
        except self._errors as e:
            raise StorageError(f"{self.where}: {ref.name} cannot be brought here: {e}") from e

    def cached(self, ref: FileRef, cache: Path) -> Path:
        """The file in a cache that processes of one machine share; brought there once."""
        target = cache / "files" / ref.sha256
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock")):
                if not target.exists():
                    self.fetch(ref, target)
        return target

    def forget(self, refs: Sequence[FileRef]) -> None:
        """Removes files that nothing names any more; what is gone already, or cannot be removed, is passed over."""
        for ref in refs:
            try:
                self._store.remove(ref.artifact)
            except (exceptions.ArtifactNotFound, *self._errors):
                continue


def check_place(where: str) -> None:
    """Whether artifacts can be kept at such a place; nothing is opened.

    Raises:
        UsageError: another kind of place.
    """
    parts = urlsplit(where)
    if parts.scheme and not (parts.scheme == "s3" and parts.netloc and "@" not in parts.netloc):
        raise UsageError(
            f"--artifacts: {parts.scheme}://... is not known. Allowed: a folder that all machines see, or "
            "s3://BUCKET/PREFIX (credentials as boto3 finds them, never in the address)"
        )


def open_artifacts(where: str, storage: optuna.storages.BaseStorage, client: Any = None) -> Artifacts:
    """A folder, or `s3://BUCKET/PREFIX`.

    Credentials, region and address of an S3-compatible service are what boto3 finds in its files and environment
    (AWS_PROFILE, AWS_ENDPOINT_URL and so on), never part of `where`.

    Args:
        where: as above.
        storage: of the studies that list the artifacts.
        client: speaks to S3; by default one that boto3 makes.

    Raises:
        UsageError: another kind of place.
        StorageError: the folder cannot be used.
        ModuleNotFoundError: boto3 is not installed; the command line names the extra.
    """
    check_place(where)
    parts = urlsplit(where)
    if parts.scheme == "s3":
        import boto3.exceptions
        import botocore.exceptions

        # Without `avoid_buf_copy` a file is read into memory before it is sent. boto3 repeats what fails by itself;
        # Optuna's Backoff would repeat a write with a file that boto3 has closed, and a removal that was done.
        plain = optuna.artifacts.Boto3ArtifactStore(parts.netloc, client, avoid_buf_copy=True)
        prefix = parts.path.strip("/")
        store = _Prefixed(plain, f"{prefix}/" if prefix else "")
        errors = (
            OSError,
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            boto3.exceptions.Boto3Error,
        )
        return Artifacts(store, where, storage, errors)
    folder = Path(where).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"{folder}: cannot be used for artifacts: {e.strerror}. {MISSING_FIX}") from e
    return Artifacts(optuna.artifacts.FileSystemArtifactStore(folder), str(folder), storage)
