"""Searches and workers as processes around a real PostgreSQL, with kills, a restart of the server, and the proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from search_examples import Life, Notes, Zygote, write_experiment

from benchmarks.workers import prove, setting
from nas.core.errors import StorageError
from nas.search.folder import RunFolder
from nas.search.shared_storage import Connection, Patience, connect
from nas.search.shared_study import JobQueue
from nas.search.view import load_view
from nas.testing import PostgresServer, requires_package, requires_path, requires_postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    requires_package("psycopg", "PostgreSQL")
    with PostgresServer(requires_postgresql()) as running:
        yield running


Open = Callable[[str], Connection]
Queue = Callable[[str], JobQueue]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens storages, which are closed in the end."""
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(connect(url)))


@pytest.fixture
def queue(server: PostgresServer, opened: Open) -> Queue:
    """Opens a study with one waiting job, over a connection of its own."""

    def made(name: str) -> JobQueue:
        connection = opened(server.url)
        study = optuna.create_study(storage=connection.storage, study_name=name, load_if_exists=True)
        if not study.get_trials(deepcopy=False):
            study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"job": {}}))
        return JobQueue(connection, name, Patience(connection, Notes()))

    return made


def test_of_many_that_want_a_job_one_gets_it(queue: Queue) -> None:
    queues = [queue("race") for _ in range(6)]
    barrier, won = threading.Barrier(len(queues)), []

    def claim(own: JobQueue) -> None:
        barrier.wait()
        won.append(own.claim(0))

    threads = [threading.Thread(target=claim, args=(own,)) for own in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]


def test_the_password_comes_from_the_environment_or_a_file_as_for_every_client(
    server: PostgresServer, opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    with pytest.raises(StorageError, match="no password supplied"):
        opened(server.plain_url)
    monkeypatch.setenv("PGPASSWORD", server.password)
    assert opened(server.plain_url).where == server.plain_url
    monkeypatch.delenv("PGPASSWORD")
    (tmp_path / "pgpass").write_text(f"127.0.0.1:{server.port}:*:postgres:{server.password}\n")
    (tmp_path / "pgpass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    assert opened(server.plain_url).where == server.plain_url
    assert server.password not in opened(server.url).where


def test_a_restart_of_the_server_is_waited_for(server: PostgresServer, opened: Open, queue: Queue) -> None:
    connection, notes = opened(server.url), Notes()
    own = JobQueue(connection, queue("restart").name, Patience(connection, notes))
    assert own.claim(0)
    server.stop()
    again = threading.Timer(1.0, server.start)
    again.start()
    assert own.note(0, "beat", 7)
    again.join()
    assert own.read(0).beat == 7
    assert "does not answer" in notes.warned[0] and server.password not in notes.warned[0]
    assert "answers again after" in notes.said[0]


def test_a_search_with_workers_of_which_one_is_killed_finds_what_one_machine_finds(
    server: PostgresServer, zygote: Zygote, queue: Queue, finished: Path, tmp_path: Path
) -> None:
    experiment = write_experiment(tmp_path, cache=finished / "cache", tables=tmp_path / "tables")
    run, cache = tmp_path / "run", tmp_path / "worker-cache"

    def worker(number: int) -> Life:
        return zygote.start(tmp_path / f"worker-{number}", "run", server.url, cache, what="worker")

    search = zygote.start(tmp_path / "log", experiment, f"--storage={server.url}")
    workers = [worker(0), worker(1)]
    until = time.monotonic() + 90
    while not (busy := [w for w in workers if w.says("job ", 0.01)]):  # on a busy machine one may get all the jobs
        assert time.monotonic() < until, (tmp_path / "log").read_text()
    killed = busy[0]
    killed.send(signal.SIGKILL)
    workers.append(worker(2))
    assert search.ends_within(120), (tmp_path / "log").read_text()
    assert search.wait() == 0, (tmp_path / "log").read_text()
    assert killed.wait() == -signal.SIGKILL
    assert killed.orphans() == []  # what trained for it ended with it
    for alive in (w for w in workers if w is not killed):
        assert alive.ends_within(30)
        assert alive.wait() == 0
        assert "the run is finished" in alive.log.read_text()
    ours, theirs = (RunFolder(folder / "run").trials() for folder in (tmp_path, finished))
    assert [(t.genotype, t.top1, t.state) for t in ours] == [(t.genotype, t.top1, t.state) for t in theirs]
    assert load_view(run).status == "finished"
    for path in (tmp_path / "log", run / "shared.json", run / "experiment.yaml", *(w.log for w in workers)):
        assert server.password not in path.read_text()
    jobs = queue("run").jobs()
    done = [job.key for job in jobs if job.state == TrialState.COMPLETE]
    assert len(done) == len(set(done))


@pytest.mark.timeout(400)  # two whole searches, with processes that come and go
def test_kills_and_a_restart_lose_nothing_and_score_nothing_twice(server: PostgresServer, tmp_path: Path) -> None:
    of = setting(tmp_path, 0)
    many = prove(server, tmp_path, of, trials=32, workers=3, kills=3, restarts=1)
    one = prove(server, tmp_path, of, trials=32, workers=1)
    assert (many.trials, many.lost, many.recorded_twice, many.scored_twice, many.restarts) == (32, 0, 0, 0, 1)
    assert many.retried >= many.killed > 0
    assert many.candidates == one.candidates
    assert many.volume == one.volume


def test_a_proof_that_is_ended_leaves_no_server_behind() -> None:
    requires_package("psycopg", "PostgreSQL")
    requires_postgresql()
    requires_path(Path("/proc/self"), "the process folder of Linux")
    with tempfile.TemporaryDirectory(prefix="nas-") as scratch:
        Path(scratch).chmod(0o755)  # the user that runs PostgreSQL is another one where the tests run as root
        command = [sys.executable, "-m", "benchmarks.workers", "--trials", "2000", "--workers", "1", "--kills", "0"]
        process = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": scratch}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert _within(60, lambda: list(Path(scratch).glob("tmp*/0/proof-0-1/trials.jsonl")))
            assert _naming(scratch)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
            assert _within(10, lambda: not _naming(scratch)), _naming(scratch)
        finally:
            process.kill()
            process.wait()


def _within(seconds: float, is_so: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(found)


def _naming(text: str) -> list[str]:
    """Command lines of processes that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if text in line else []
    return found


def test_the_proxy_hands_out_a_job_once_and_ends_when_asked(
    server: PostgresServer, opened: Open, queue: Queue, tmp_path: Path
) -> None:
    requires_package("grpc", "the storage proxy")
    queue("proxied")
    port = server.port + 1
    command = [sys.executable, "-m", "nas", "storage-proxy", "--storage", server.plain_url, "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as out:
        proxy = subprocess.Popen(
            command, env={**os.environ, "PGPASSWORD": server.password}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 60  # imports take their time on a busy machine
        while "serving" not in log.read_text() and proxy.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        connection = opened(f"grpc://127.0.0.1:{port}")
        first, second = (JobQueue(connection, "proxied", Patience(connection, Notes())) for _ in range(2))
        assert (first.claim(0), second.claim(0)) == (True, False)
        assert first.note(0, "beat", 1)
        assert first.complete(0, (0.5,))
        assert not second.complete(0, (0.6,))
        assert not second.note(0, "beat", 2)
        assert [job.state for job in second.jobs()] == [TrialState.COMPLETE]
        second_of_it = subprocess.run(
            command, env={**os.environ, "PGPASSWORD": server.password}, capture_output=True, text=True, check=False
        )
        assert f"127.0.0.1:{port}: another program listens there" in second_of_it.stderr
        assert "serving" not in second_of_it.stdout + second_of_it.stderr
        proxy.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert proxy.wait(20) == 0, log.read_text()
        assert time.monotonic() - started < 10
    finally:
        proxy.kill()
        proxy.wait()
    assert f"serving {server.plain_url} at grpc://127.0.0.1:{port}" in log.read_text()
