"""`nas dashboard` on a tiny real run: what it serves on loopback, that it changes nothing, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from nas.cli.main import run
from nas.search.notes import GAP
from nas.search.shared_storage import connect
from nas.testing import PostgresServer, requires_package, requires_postgresql

ROOT = Path(__file__).parents[2]


def _digest(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@contextmanager
def served(folder: Path, scratch: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The running command and the document that it printed; killed afterwards where the test did not end it."""
    scratch.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "nas", "dashboard", *args, "--json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        try:
            text = ""
            for line in process.stdout:
                text += line
                if line == "}\n":
                    break
            assert text.endswith("}\n"), process.stderr.read()
            yield process, json.loads(text)
        finally:
            process.kill()
            process.wait(30)


def answer(url: str, method: str = "GET", body: bytes | None = None, host: str | None = None) -> tuple[int, str]:
    """Status and text of one request."""
    headers = {"Content-Type": "application/json"} | ({} if host is None else {"Host": host})
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read().decode()


def test_the_study_of_a_run_is_served_with_notes_and_nothing_is_changed(finished_run: Path, tmp_path: Path) -> None:
    requires_package("optuna_dashboard", "nas dashboard")
    before = _digest(finished_run / "runs")
    scratch = tmp_path / "scratch"
    with served(finished_run, scratch, "runs/tiny") as (process, document):
        url = document["url"]
        assert url.startswith("http://127.0.0.1:")
        assert document["trials"] == 3
        (study,) = json.loads(answer(f"{url}api/studies")[1])["study_summaries"]
        assert study["study_name"] == "tiny"
        detail = json.loads(answer(f"{url}api/studies/{study['study_id']}")[1])
        assert detail["note"]["body"].startswith("**tiny: finished**")
        assert "does not read the constraints of Optuna 5" in detail["note"]["body"]
        assert len(detail["plotly_graph_objects"]) == 1
        names = {a["key"]: a["value"] for a in detail["trials"][0]["user_attrs"]}
        card = detail["trials"][0]["note"]["body"].replace(GAP, "")
        assert card.startswith(f"**{names['candidate']}**")
        assert "| proposed by | first, round 1, trial 0 |" in card
        assert "| stage 1 | 1 | 3 |" in card
        # Reading only, and by its own address only.
        note = json.dumps({"version": 2, "body": "changed"}).encode()
        assert answer(f"{url}api/studies/1/note", "PUT", note)[0] == 405
        status, text = answer(f"{url}api/studies/1", "DELETE")
        assert (status, json.loads(text)["reason"]) == (405, "read only: this is a view of a study")
        assert answer(f"{url}api/studies", host="evil.example:80")[0] == 403
        assert next(p.name for p in scratch.iterdir()).startswith("nas-dashboard-")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr is not None and process.stderr.read().endswith("ended\n")
    assert list(scratch.iterdir()) == []
    assert _digest(finished_run / "runs") == before


def test_a_run_without_its_study_shows_the_scores_so_far(finished_run: Path, tmp_path: Path) -> None:
    requires_package("optuna_dashboard", "nas dashboard")
    shutil.copytree(finished_run / "runs" / "tiny", tmp_path / "young")
    for name in ("study.db", "outcome.json", "importances.json"):
        (tmp_path / "young" / name).unlink()
    with served(finished_run, tmp_path / "scratch", str(tmp_path / "young")) as (process, document):
        assert (document["status"], document["trials"]) == ("interrupted", 3)
        detail = json.loads(answer(f"{document['url']}api/studies/1")[1])
        assert "nas search" in detail["note"]["body"]
        assert all(t["note"]["body"] for t in detail["trials"])
        process.send_signal(signal.SIGTERM)  # as a service manager ends it
        assert process.wait(30) == 0
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_shared_storage_is_served_as_it_is(finished_run: Path, tmp_path: Path) -> None:
    requires_package("optuna_dashboard", "nas dashboard")
    shared = tmp_path / "shared.db"
    shutil.copyfile(finished_run / "runs" / "tiny" / "study.db", shared)
    before = shared.read_bytes()
    args = ("--storage", f"sqlite:///{shared}")
    with served(finished_run, tmp_path / "scratch", *args) as (process, document):
        assert document["studies"] == ["tiny"]
        assert answer(f"{document['url']}api/studies/1", "DELETE")[0] == 405
        assert json.loads(answer(f"{document['url']}api/studies")[1])["study_summaries"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert shared.read_bytes() == before


@pytest.fixture
def here(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished_run)
    return finished_run


@pytest.mark.usefixtures("here")
def test_without_the_extra_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert run(["dashboard", "runs/tiny"]) == 2
    message = "error: the package 'optuna_dashboard' is not installed. Run: pip install 'nas[dashboard]'\n"
    assert capsys.readouterr().err == message


@pytest.mark.usefixtures("here")
def test_a_port_that_is_taken_is_said_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    requires_package("optuna_dashboard", "nas dashboard")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["dashboard", "runs/tiny", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"error: --port {port}: cannot be used on 127.0.0.1: " in err
    assert err.endswith("Take a free one: --port 0\n")


@pytest.mark.usefixtures("here")
def test_what_cannot_be_shown_is_one_message_without_passwords(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requires_package("optuna_dashboard", "nas dashboard")
    missing = tmp_path / "missing.db"
    (tmp_path / "empty.db").touch()
    cases = {
        f"sqlite:///{missing}": (6, "no such file: "),
        f"sqlite:///{tmp_path / 'empty.db'}": (6, "cannot be opened: "),
        "nodriver://ann:geheim@host/db": (6, "nodriver://***@host/db: cannot be opened: "),
        "no address": (6, "cannot be opened: Could not parse"),
    }
    for url, (code, message) in cases.items():
        assert run(["dashboard", "--storage", url]) == code, url
        err = capsys.readouterr().err
        assert message in err
        assert "geheim" not in err and "Traceback" not in err
    assert not missing.exists()
    assert run(["dashboard", "runs/tiny", "--storage", "sqlite:///x"]) == 2
    assert "RUN and --storage exclude each other" in capsys.readouterr().err


def test_a_postgresql_of_several_machines_is_served_without_its_password(tmp_path: Path) -> None:
    requires_package("optuna_dashboard", "nas dashboard")
    requires_package("psycopg", "a shared search")
    with PostgresServer(requires_postgresql()) as server:
        with closing(connect(server.url)) as connection:
            optuna.create_study(study_name="board", storage=connection.storage)
        with served(tmp_path, tmp_path / "scratch", "--storage", server.url) as (process, document):
            assert document["studies"] == ["board"]
            assert server.password not in json.dumps(document)
            (study,) = json.loads(answer(f"{document['url']}api/studies")[1])["study_summaries"]
            assert study["study_name"] == "board"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
