"""A study in optuna-dashboard: a copy of a run's study with notes and a figure, served on loopback, read only.

The dashboard can rename, change and delete. A run's own study is never given to it: `study_copy` makes a copy, and
requests that would change anything are refused, because a change of a copy would be lost without a word, and one of a
study that others share would not be.

What the dashboard (0.21) reads as notes are attributes of the study, in pieces of 2,045 characters, which
`optuna_dashboard.save_note` writes one by one: seconds for hundreds of trials. Here they are inserted together.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna

from nas.core.errors import StorageError, UsageError
from nas.core.run import RunView
from nas.search.folder import SPACE_FILE, RunFolder, TrialRecord
from nas.search.notes import MirroredTrial
from nas.search.shared_storage import connect
from nas.search.study import CONSTRAINT, RDB_SCHEMA, Scored, mirror
from nas.space.space import load_space

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STUDY_FILE = "study.db"
HOST = "127.0.0.1"
NOTE_PIECE = 2045  # characters of one attribute, as optuna-dashboard splits them
FIGURE_ID = "scores-and-budget"
READING = ("GET", "HEAD")


class JsonFigure(Protocol):
    """A Plotly figure."""

    def to_json(self) -> str:
        """The figure as JSON."""
        ...


def require_dashboard() -> None:
    """Raises ModuleNotFoundError where optuna-dashboard is not installed; the command line names the extra."""
    import optuna_dashboard  # noqa: F401


def study_copy(run_dir: Path, view: RunView, file: Path) -> tuple[MirroredTrial, ...]:
    """Copies the study of a run; of one that has not written it yet, its scores so far with their first predictions.

    Args:
        run_dir: the run; nothing in it is changed.
        view: of the same run, on its first device.
        file: the copy.

    Returns:
        The scored candidates, in the order of the study's trials.

    Raises:
        UsageError: nothing was scored yet.
        StorageError: the study cannot be read or written.
    """
    records = {r.number: r for r in RunFolder(run_dir).trials() if r.state == "complete"}
    if not records:
        raise UsageError(f"{run_dir}: nothing was scored yet. Go on with it: {view.commands[0]}")
    if (run_dir / STUDY_FILE).exists():
        shutil.copyfile(run_dir / STUDY_FILE, file)  # replaced as a whole by the search, so never half of one
    else:
        _write_study(run_dir, view, records.values(), file)
    try:
        with opened(f"sqlite:///{file}") as storage:
            (summary,) = optuna.study.get_all_study_summaries(storage)
            trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials(deepcopy=False)
            return tuple(
                MirroredTrial(
                    records[t.user_attrs["trial"]],
                    tuple(t.values[1:]),
                    t.user_attrs.get("std_ms"),
                    t.constraints.get(CONSTRAINT, 0.0),
                )
                for t in trials
            )
    except (KeyError, ValueError) as e:
        raise StorageError(
            f"{run_dir / STUDY_FILE}: not the study of this run's trials ({e}). Delete it; nas dashboard then shows "
            "the scores without it"
        ) from e


def _write_study(run_dir: Path, view: RunView, records: Iterable[TrialRecord], file: Path) -> None:
    space = load_space(run_dir / SPACE_FILE, next(iter(records)).candidate.num_classes)
    budget_ms = view.budget_ms or float("inf")
    rows = []
    for r in records:
        # A candidate is proposed where its prediction keeps the budget; that of one with exits holds for them only.
        excess = min(0.0, r.latency_ms / budget_ms - 1)
        scored = Scored(r.genotype, r.score, (r.latency_ms, *r.elsewhere_ms), excess, r.candidate.id)
        rows.append((scored, {"trial": r.number, "round": r.round, "epochs": r.epochs, "proposer": r.proposer}))
    mirror(file, view.name, space, rows, ["", *(own.device_name for own in view.others)])


@contextmanager
def opened(url: str) -> Iterator[optuna.storages.RDBStorage]:
    """A database of studies that exists already; closed afterwards. Nothing is created in it.

    Args:
        url: as SQLAlchemy takes it.

    Raises:
        StorageError: there is none, or it cannot be read; the message does not contain the address.
        ModuleNotFoundError: the driver of the database is not installed.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parsed = make_url(url)
        path = parsed.database
        if parsed.get_backend_name() == "sqlite" and (not path or not Path(path).is_file()):  # it would be created
            raise StorageError(f"no such file: {path or 'an address without one'}")
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
    except ImportError as e:  # of a driver; the command line names the extra
        raise (e.__cause__ if isinstance(e.__cause__, ModuleNotFoundError) else e) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as e:  # server, file, or tables of another Optuna
        raise StorageError(f"cannot be opened: {str(e.__cause__ or e).splitlines()[0]}") from e
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def shared(url: str) -> Iterator[optuna.storages.BaseStorage]:
    """The storage of a search on several machines, or any other database of studies; closed afterwards.

    Args:
        url: as `nas.search.shared_storage.connect` or SQLAlchemy takes it.

    Raises:
        StorageError: as `opened`.
        ModuleNotFoundError: the package that speaks to it is not installed.
    """
    if urlsplit(url).scheme.partition("+")[0] in ("postgresql", "postgres", "grpc"):
        with closing(connect(url)) as connection:
            yield connection.storage
    else:
        with opened(url) as storage:
            yield storage


def add_notes(file: Path, study_note: str, trial_notes: Mapping[int, str]) -> None:
    """Adds notes to the only study of a database that nobody else has open.

    Args:
        file: the copy of a study.
        study_note: Markdown.
        trial_notes: Markdown by number of the trial.

    Raises:
        StorageError: the database cannot be written.
    """
    try:
        with closing(sqlite3.connect(file)) as database:
            ids = dict(database.execute("SELECT number, trial_id FROM trials").fetchall())
            attributes = _note_attributes("dashboard:", study_note)
            for number, text in trial_notes.items():
                attributes |= _note_attributes(f"dashboard:{ids[number]}:", text)
            if database.execute("SELECT schema_version FROM version_info").fetchall() == [(RDB_SCHEMA,)]:
                [(study,)] = database.execute("SELECT study_id FROM studies").fetchall()
                with database:
                    database.executemany(
                        "INSERT INTO study_system_attributes (study_id, key, value_json) VALUES (?, ?, ?)",
                        [(study, key, json.dumps(value)) for key, value in attributes.items()],
                    )
                return
        with opened(f"sqlite:///{file}") as storage:  # a newer layout: its own way, one by one
            (summary,) = optuna.study.get_all_study_summaries(storage)
            for key, value in attributes.items():
                storage.set_study_system_attr(summary._study_id, key, value)
    except sqlite3.Error as e:
        raise StorageError(f"{file}: notes cannot be written: {e}. Free space, then run the same command") from e


def _note_attributes(prefix: str, text: str) -> dict[str, Any]:
    pieces = [text[i : i + NOTE_PIECE] for i in range(0, len(text), NOTE_PIECE)]
    return {f"{prefix}note_ver": 1} | {f"{prefix}note_str:{i}": piece for i, piece in enumerate(pieces)}


def add_figure(file: Path, figure: JsonFigure) -> None:
    """Adds a Plotly figure to the only study of a database; it is sent whole with each request, so keep it small."""
    from optuna_dashboard import save_plotly_graph_object

    with opened(f"sqlite:///{file}") as storage:
        (summary,) = optuna.study.get_all_study_summaries(storage)
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        save_plotly_graph_object(study, figure, graph_object_id=FIGURE_ID)


def study_names(storage: optuna.storages.BaseStorage) -> list[str]:
    """Names of the studies in a storage."""
    return list(optuna.study.get_all_study_names(storage))


def serve(storage: optuna.storages.BaseStorage, port: int, tell: Callable[[str], None]) -> None:
    """Serves the dashboard on 127.0.0.1 until KeyboardInterrupt, which it lets through.

    Args:
        storage: whose studies are shown.
        port: 0: a free one.
        tell: gets the address once requests are answered.

    Raises:
        UsageError: the port is taken.
    """
    import optuna_dashboard

    app = optuna_dashboard.wsgi(storage)
    try:
        server = make_server(HOST, port, app, server_class=_Server, handler_class=_Quiet)
    except OSError as e:
        raise UsageError(f"--port {port}: cannot be used on {HOST}: {e.strerror}. Take a free one: --port 0") from e
    with server:
        server.set_app(_reading_only(app, server.server_port))
        tell(f"http://{HOST}:{server.server_port}/")
        server.serve_forever()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request: browsers open connections that they do not use, on which one thread would wait."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Without a line on stderr for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _reading_only(app: WSGIApplication, port: int) -> WSGIApplication:
    """The same without requests that change something, and without those that came by another name.

    The name is looked at because a page of the web may give its own name this machine's address (DNS rebinding).
    """
    names = {f"{host}:{port}" for host in (HOST, "localhost")}

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("HTTP_HOST") not in names:
            return _refused(start_response, "403 Forbidden", "this dashboard answers on its own address only")
        if environ["REQUEST_METHOD"] not in READING:
            return _refused(start_response, "405 Method Not Allowed", "read only: this is a view of a study")
        return app(environ, start_response)

    return guarded


def _refused(start_response: StartResponse, status: str, reason: str) -> Iterable[bytes]:
    body = json.dumps({"reason": reason}).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
