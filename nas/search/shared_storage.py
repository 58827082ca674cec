"""The storage that the machines of one search share: opened by its address, with patience while it is away.

PostgreSQL through Optuna's `RDBStorage`, or Optuna's gRPC proxy in front of it. SQLite is refused: it ignores the row
locks by which a waiting trial is given to one worker only (two of four workers died of that in three of seven runs).
"""

from __future__ import annotations

import random
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import optuna

from nas.core.errors import InterruptedRunError, StorageError, UsageError
from nas.core.units import format_duration
from nas.search.progress import Reporter, interrupted_by_signals

T = TypeVar("T")

GRPC_PORT = 13000  # Optuna's default
CONNECT_S = 10
TABLE_TRIES = 8  # of processes that open an empty database together
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
OUTAGE_LIMIT_S = 900.0  # a database server that is updated or moved is back by then
REMIND_S = 60.0
HIDDEN = "***"


def redacted(url: str) -> str:
    """The same address without passwords, for messages and files."""
    parts = urlsplit(url)
    place = parts.netloc
    user, at, host = place.rpartition("@")
    if at and ":" in user:
        place = f"{user.partition(':')[0]}:{HIDDEN}@{host}"
    pairs = [(k, HIDDEN if "password" in k.lower() else v) for k, v in parse_qsl(parts.query, keep_blank_values=True)]
    return urlunsplit((parts.scheme, place, parts.path, urlencode(pairs, safe="*/"), parts.fragment))


def _secrets(url: str) -> tuple[str, ...]:
    """The passwords of an address, as they are written in it and as they are meant."""
    parts = urlsplit(url)
    written = [parts.password] if parts.password else []
    written += [v for k, v in parse_qsl(parts.query) if "password" in k.lower()]
    return tuple(dict.fromkeys(s for w in written for s in (w, unquote(w), quote(w, safe="")) if s))


@dataclass(frozen=True, slots=True, eq=False)
class Connection:
    """An open storage.

    Fields:
        storage: Optuna's.
        where: its address without passwords.
        errors: what its operations raise when they cannot be done.
        is_away: whether such an error means that the storage cannot be reached now, and may be later.
        secrets: what must not be shown.
        close: closes what is open; `contextlib.closing` calls it.
    """

    storage: optuna.storages.BaseStorage
    where: str
    errors: tuple[type[Exception], ...]
    is_away: Callable[[BaseException], bool]
    secrets: tuple[str, ...] = ()
    close: Callable[[], None] = lambda: None

    def shown(self, error: BaseException) -> str:
        """The first line of what an error says, without passwords."""
        cause = error.__cause__ or error
        return _first_line(cause, self.secrets)


def _first_line(error: BaseException, secrets: tuple[str, ...]) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def connect(url: str, connections: int = 2) -> Connection:
    """Opens `postgresql://USER@HOST:PORT/DATABASE` or `grpc://HOST:PORT`.

    A password need not stand in the address: libpq takes it from PGPASSWORD or the file PGPASSFILE.

    Args:
        url: the address.
        connections: to the database, kept open at most.

    Raises:
        UsageError: an address of another kind.
        StorageError: nothing answers there, or it refuses.
        ModuleNotFoundError: the package that speaks to it is not installed; the command line names the extra.
    """
    proxy = check_storage(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # an outage is told by us, once
    return _connect_postgresql(url, connections) if proxy is None else _connect_proxy(*proxy, url)


def check_storage(url: str) -> tuple[str, int] | None:
    """Host and port of a proxy, None for a database; nothing is opened.

    Raises:
        UsageError: an address of another kind.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise UsageError(f"--storage: {redacted(url)!r}: {e}. {_allowed()}") from e
    kind = parts.scheme.partition("+")[0]
    if kind == "grpc" and parts.hostname:
        return parts.hostname, port or GRPC_PORT
    if kind in ("postgresql", "postgres"):
        return None
    reason = "cannot give a waiting trial to one worker only" if kind == "sqlite" else "is of another kind"
    raise UsageError(f"--storage: {redacted(url)!r} {reason}. {_allowed()}")


def _allowed() -> str:
    return "Allowed: postgresql://USER@HOST:PORT/DATABASE, or grpc://HOST:PORT of a running: nas storage-proxy"


def _connect_postgresql(url: str, connections: int) -> Connection:
    import psycopg  # noqa: F401  absent: the error that names the extra, before Optuna's that does not
    from sqlalchemy import exc

    parts = urlsplit(url)
    where, secrets = redacted(url), _secrets(url)
    options = {
        "pool_pre_ping": True,  # a connection that a restart of the server has closed is opened anew
        "pool_size": connections,
        "connect_args": {
            "connect_timeout": CONNECT_S,
            "application_name": "nas",
            "keepalives_idle": 30,  # a host that vanished is noticed in a minute, not in two hours
            "keepalives_interval": 10,
            "keepalives_count": 3,
        },
    }
    address = urlunsplit(("postgresql+psycopg", *parts[1:]))
    for tries_left in reversed(range(TABLE_TRIES)):
        try:
            plain = optuna.storages.RDBStorage(address, engine_kwargs=dict(options))
            break
        except (exc.IntegrityError, exc.ProgrammingError) as e:  # of an empty database others make the tables, too
            if not tries_left:
                raise StorageError(f"{where}: cannot be opened: {_first_line(e, secrets)}") from e
            time.sleep(random.uniform(0.1, 1.0))
        except (exc.SQLAlchemyError, RuntimeError) as e:  # the latter: tables of another Optuna
            raise StorageError(f"{where}: cannot be opened: {_first_line(e, secrets)}") from e
    permanent = (exc.DataError, exc.ProgrammingError, exc.IntegrityError, exc.NotSupportedError, exc.ArgumentError)

    def is_away(error: BaseException) -> bool:
        wrapped = isinstance(error, optuna.exceptions.StorageInternalError)
        cause = error.__cause__ if wrapped else error
        return isinstance(cause, exc.SQLAlchemyError) and not isinstance(cause, permanent)

    # What `optuna.create_study(storage=URL)` does with it: finished trials are read once.
    errors = (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError)
    return Connection(optuna.storages.get_storage(plain), where, errors, is_away, secrets, plain.engine.dispose)


def _connect_proxy(host: str, port: int, url: str) -> Connection:
    import grpc

    where = redacted(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        proxy.wait_server_ready(timeout=CONNECT_S)
    except ConnectionError as e:
        proxy.close()
        raise StorageError(
            f"{where}: nothing answers there within {CONNECT_S} s. Start it: nas storage-proxy --storage URL"
        ) from e
    # What goes wrong between the proxy and its database arrives as an error of the call, too.
    return Connection(proxy, where, (grpc.RpcError,), lambda _: True, close=proxy.close)


class Patience:
    """Repeats an operation while the storage is away, with growing pauses, and says so.

    Operations must be such that a second time does no harm: of one whose answer was lost nobody knows whether it was
    done.

    Args:
        connection: tells what "away" means.
        reporter: told when an outage begins, every minute of it, and when it is over.
        should_stop: True ends the waiting.
        limit_s: the longest outage that is waited for.
        clock, sleep: seconds.
    """

    def __init__(
        self,
        connection: Connection,
        reporter: Reporter,
        should_stop: Callable[[], bool] = lambda: False,
        limit_s: float = OUTAGE_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connection, self._reporter, self._should_stop = connection, reporter, should_stop
        self._limit_s, self._clock, self._sleep = limit_s, clock, sleep
        self.outages = 0

    def __call__(self, operation: Callable[[], T]) -> T:
        """What the operation gives.

        Raises:
            StorageError: the storage stayed away too long.
            InterruptedRunError: asked to stop while it was away.
        """
        started = told = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                value = operation()
            except self._connection.errors as e:
                if not self._connection.is_away(e):
                    raise
                now = self._clock()
                if started is None:
                    started, self.outages = now, self.outages + 1
                if now - started >= self._limit_s:
                    self._limit_s = 0.0  # whoever gives a job back on the way out must not wait as long again
                    raise StorageError(
                        f"{self._connection.where}: away for {format_duration(now - started)}: "
                        f"{self._connection.shown(e)}. Start it again, then run the same command"
                    ) from e
                if told is None or now - told >= REMIND_S:
                    told = now
                    self._reporter.warn(
                        f"{self._connection.where} does not answer ({self._connection.shown(e)}); waiting up to "
                        f"{format_duration(self._limit_s)} for it"
                    )
            else:
                if started is not None:
                    self._reporter.say(
                        f"{self._connection.where} answers again after {format_duration(self._clock() - started)}"
                    )
                return value
            self._wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _wait(self, pause_s: float) -> None:
        end = self._clock() + pause_s
        while (left := end - self._clock()) > 0:
            if self._should_stop():
                raise InterruptedRunError("stopped while the storage was away; finished work is kept")
            self._sleep(min(0.2, left))


def _answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


@contextmanager
def meanwhile(work: Callable[[Event], None]) -> Iterator[None]:
    """A thread works while the block runs; its event tells it that the block is over, and it is waited for."""
    over = Event()
    thread = Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _told_when_it_answers(host: str, port: int, tell: Callable[[], None]) -> AbstractContextManager[None]:
    """Meanwhile a thread waits for the port to answer: what serves it does not come back to say so."""

    def wait(over: Event) -> None:
        while not over.wait(0.05):
            if _answers(host, port):
                tell()
                return

    return meanwhile(wait)


def serve_proxy(url: str, host: str, port: int, connections: int, tell: Callable[[], None]) -> None:
    """Serves a database through Optuna's gRPC proxy until SIGINT, SIGTERM or SIGHUP.

    Args:
        url: of a PostgreSQL database.
        host, port: where to listen.
        connections: to the database; as many calls are answered at a time.
        tell: called once, when calls are answered.

    Raises:
        UsageError: not a database.
        StorageError: the database cannot be opened, or the port is taken.
        ModuleNotFoundError: grpcio is not installed; the command line names the extra.
    """
    import grpc  # noqa: F401  absent: the error that names the extra

    if urlsplit(url).scheme.partition("+")[0] == "grpc":
        raise UsageError(f"--storage: {redacted(url)!r} is a proxy itself; name the database behind it")
    try:
        with (
            interrupted_by_signals(),
            closing(connect(url, connections)) as connection,
            ExitStack() as stack,
            warnings.catch_warnings(),
            ThreadPoolExecutor(connections) as threads,
        ):
            if _answers(host, port):  # gRPC would share the port with another server, each call being either's
                raise StorageError(f"{host}:{port}: another program listens there. Choose another --port")
            stack.enter_context(_told_when_it_answers(host, port, tell))
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.run_grpc_proxy_server(connection.storage, host=host, port=port, thread_pool=threads)
    except KeyboardInterrupt:
        return
    except RuntimeError as e:  # what grpc raises where it cannot listen
        raise StorageError(f"{host}:{port}: cannot listen there: {_first_line(e, ())}. Choose another --port") from e
