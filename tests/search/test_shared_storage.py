"""Addresses of shared storages: passwords are never shown, what cannot work is refused, outages are waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import optuna
import pytest
from search_examples import Notes

from nas.core.errors import InterruptedRunError, StorageError, UsageError
from nas.search.shared_storage import Connection, Patience, connect, redacted
from nas.testing import requires_package


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://nas:geheim@db:5432/x", "postgresql://nas:***@db:5432/x"),
        ("postgresql://nas@db/x", "postgresql://nas@db/x"),
        ("postgresql://nas:a%40b:c@db/x?sslmode=require", "postgresql://nas:***@db/x?sslmode=require"),
        ("postgresql://db/x?user=nas&password=geheim", "postgresql://db/x?user=nas&password=***"),
        ("postgresql://db/x?sslpassword=geheim", "postgresql://db/x?sslpassword=***"),
        ("grpc://localhost:13000", "grpc://localhost:13000"),
    ],
)
def test_an_address_is_shown_without_passwords(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:///study.db", "cannot give a waiting trial to one worker only"),
        ("mysql://nas:geheim@db/x", "is of another kind"),
        ("study.db", "is of another kind"),
        ("grpc://", "is of another kind"),
        ("grpc://host:port", "Port could not be cast"),
    ],
)
def test_a_storage_that_cannot_be_shared_is_refused_with_those_that_can(url: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as e:
        connect(url)
    assert "postgresql://USER@HOST:PORT/DATABASE, or grpc://HOST:PORT" in str(e.value)
    assert "geheim" not in str(e.value)


def test_a_database_that_is_not_there_is_an_error_without_the_password() -> None:
    requires_package("psycopg", "PostgreSQL")
    with pytest.raises(StorageError, match=r"postgresql://nas:\*\*\*@127\.0\.0\.1:9/x: cannot be opened") as e:
        connect("postgresql://nas:geheim@127.0.0.1:9/x")
    assert "geheim" not in str(e.value)


class AwayError(Exception):
    """The storage cannot be reached."""


@dataclass
class Outage:
    """An operation that fails until a time; its own clock."""

    until_s: float
    error: Callable[[str], Exception] = AwayError
    now_s: float = 0.0
    calls: list[float] = field(default_factory=list)

    def __call__(self) -> str:
        self.calls.append(self.now_s)
        if self.now_s < self.until_s:
            raise self.error("connection refused for geheim\nmore")
        return "here"

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def patience(self, notes: Notes, should_stop: Callable[[], bool] = lambda: False) -> Patience:
        storage = optuna.storages.InMemoryStorage()
        is_away = lambda error: isinstance(error, AwayError)  # noqa: E731
        connection = Connection(storage, "db", (AwayError, ValueError), is_away, ("geheim",))
        return Patience(connection, notes, should_stop, 900.0, lambda: self.now_s, self.sleep)


def test_an_outage_is_waited_for_with_growing_pauses_and_told_once_a_minute() -> None:
    outage, notes = Outage(150.0), Notes()
    patience = outage.patience(notes)
    assert patience(outage) == "here"
    pauses = [b - a for a, b in zip(outage.calls, outage.calls[1:], strict=False)]
    assert pauses[:4] == pytest.approx([0.25, 0.5, 1, 2])
    assert max(pauses) == pytest.approx(10.0)
    assert notes.warned[0] == "db does not answer (connection refused for ***); waiting up to 15 min 00 s for it"
    assert len(notes.warned) == 3
    assert notes.said == [f"db answers again after 2 min {outage.now_s - 120:02.0f} s"]
    assert patience.outages == 1
    assert patience(outage) == "here" and patience.outages == 1


def test_an_outage_without_end_is_an_error_and_what_follows_it_waits_no_more() -> None:
    outage, notes = Outage(1e9), Notes()
    patience = outage.patience(notes)
    with pytest.raises(StorageError, match=r"db: away for 15 min .*connection refused for \*\*\*\. Start it again"):
        patience(outage)
    tries = len(outage.calls)
    with pytest.raises(StorageError):
        patience(outage)
    assert len(outage.calls) == tries + 1


def test_an_error_that_waiting_does_not_mend_is_raised_at_once() -> None:
    outage = Outage(150.0, ValueError)
    with pytest.raises(ValueError, match="connection refused"):
        outage.patience(Notes())(outage)
    assert len(outage.calls) == 1


def test_waiting_ends_when_the_run_is_stopped() -> None:
    outage = Outage(1e9)
    with pytest.raises(InterruptedRunError, match="while the storage was away"):
        outage.patience(Notes(), lambda: outage.now_s > 5)(outage)
    assert outage.now_s == pytest.approx(5, abs=0.5)
