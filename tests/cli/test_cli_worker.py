"""`nas worker`, `nas storage-proxy` and the options of a shared search: what is missing or wrong is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nas.cli.main import run
from nas.testing import requires_package

NOWHERE = "postgresql://nas:geheim@127.0.0.1:9/x"


def test_a_worker_needs_a_storage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["worker", "quickstart"]) == 2
    assert "--storage: is needed, the same as that of the search" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["worker", "quickstart"], ["storage-proxy"]])
def test_a_storage_of_another_kind_is_refused_without_its_password(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "storage-proxy":
        requires_package("grpc", "the storage proxy")
    assert run([*command, "--storage", "mysql://nas:geheim@db/x", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "Allowed: postgresql://USER@HOST:PORT/DATABASE" in json.loads(out)["error"]["message"]
    assert "geheim" not in out + err


def test_a_proxy_in_front_of_a_proxy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    requires_package("grpc", "the storage proxy")
    assert run(["storage-proxy", "--storage", "grpc://127.0.0.1:13000"]) == 2
    assert "is a proxy itself; name the database behind it" in capsys.readouterr().err


def test_a_proxy_without_its_database_ends_without_showing_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    requires_package("grpc", "the storage proxy")
    requires_package("psycopg", "PostgreSQL")
    assert run(["storage-proxy", "--storage", NOWHERE, "--host", "0.0.0.0"]) == 6
    out, err = capsys.readouterr()
    assert "warning: 0.0.0.0: whoever reaches port 13000 can read and change every study" in err
    assert "postgresql://nas:***@127.0.0.1:9/x: cannot be opened" in err
    assert "geheim" not in out + err
    assert "serving" not in out + err  # nothing was


@pytest.mark.parametrize(
    ("package", "url"), [("psycopg", "postgresql://nas@127.0.0.1:9/x"), ("grpc", "grpc://127.0.0.1:9")]
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an import of it finds where it is not installed
    assert run(["worker", "quickstart", "--storage", url]) == 2
    assert f"the package {package!r} is not installed. Run: pip install 'nas[scale]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--artifacts", "/shared"], "--artifacts goes with --storage"),
        (["--lease", "30"], "--lease goes with --storage: it is about the workers of a shared search"),
        (["--storage", "sqlite:///x.db"], "cannot give a waiting trial to one worker only. Allowed: postgresql://"),
        (["--storage", NOWHERE, "--artifacts", "ftp://x/y"], "--artifacts: ftp://... is not known. Allowed: a folder"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_options_of_a_shared_search_that_cannot_be_used_are_refused_before_anything_is_done(
    given: list[str], said: str, dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", str(tmp_path / "e.yaml")]) == 0
    assert run(["search", str(tmp_path / "e.yaml"), "--set", f"run.dir={tmp_path / 'run'}", *given, *dry]) == 2
    out, err = capsys.readouterr()
    assert said in err and "geheim" not in out + err
    assert not (tmp_path / "run").exists()
