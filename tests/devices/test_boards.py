"""Several boards of one state serve one measurement; a lost one leaves its share to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from nas.core.errors import DeviceError
from nas.core.records import DeviceProfile, Measurement
from nas.devices import open_device
from nas.devices.base import Device, MeasureJob, OnProgress, OnResult
from nas.devices.boards import JOBS_AT_A_TIME, Boards
from nas.devices.link import RefusedRequestError
from nas.devices.ssh import LinkCutError, RemoteError, StateChangedError
from nas.testing import DEVICE_CONTRACT, SimulatedDevice, SshServer, mean_model, requires_openssh


class Board(SimulatedDevice):
    """A simulated board that is lost before it gives result number `lost_after`, and takes its time."""

    def __init__(
        self, lost_after: int | None = None, *, pause_s: float = 0.0, mode: str = "none", locked: str = ""
    ) -> None:
        super().__init__()
        self.measured: list[str] = []
        self._lost_after = lost_after
        self._pause_s = pause_s
        self._mode = mode
        self._locked = locked

    @property
    def profile(self) -> DeviceProfile:
        return replace(super().profile, power_mode=self._mode, locked_mhz=self._locked)

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        results = []
        for job in jobs:
            if progress is not None:
                progress(len(results) / len(jobs))
            if self._lost_after is not None and len(self.measured) >= self._lost_after:
                raise LinkCutError("no connection")
            time.sleep(self._pause_s)
            results += super().measure([job])
            self.measured.append(job.key)
            if on_result is not None:
                on_result(results[-1])
        return results


def jobs(count: int) -> list[MeasureJob]:
    return [MeasureJob(f"r{i}", "row", "fp32", mean_model(), 1000 + i) for i in range(count)]


@pytest.mark.parametrize("check", DEVICE_CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Device], None]) -> None:
    check(Boards([Board(), Board()], ["a", "b"]))


def test_boards_share_the_work_and_each_job_is_measured_once() -> None:
    one, two = Board(pause_s=0.005), Board(pause_s=0.005)
    results = Boards([one, two], ["a", "b"]).measure(jobs(40))
    assert [m.key for m in results] == [f"r{i}" for i in range(40)]
    assert sorted(one.measured + two.measured) == sorted(m.key for m in results)
    assert min(len(one.measured), len(two.measured)) >= JOBS_AT_A_TIME
    assert sorted(m.sequence for m in results) == list(range(1, 41)), "one order over all boards"


def test_the_jobs_of_a_lost_board_go_to_the_others_and_its_results_stay() -> None:
    one, two = Board(lost_after=3, pause_s=0.002), Board(pause_s=0.01)
    said: list[str] = []
    boards = Boards([one, two], ["a", "b"], said.append)
    results = boards.measure(jobs(30))
    assert [m.key for m in results] == [f"r{i}" for i in range(30)] and all(m.latency_ms for m in results)
    assert len(one.measured) == 3 and sorted(one.measured + two.measured) == sorted(m.key for m in results)
    assert said == ["a is lost: no connection; the other one goes on with its share"]
    boards.measure(jobs(5))
    assert len(one.measured) == 3, "it is not asked again"


def test_a_board_that_has_no_work_left_takes_over_that_of_one_lost_at_the_very_end() -> None:
    slow = Board(lost_after=JOBS_AT_A_TIME - 1, pause_s=0.02)
    results = Boards([slow, Board()], ["a", "b"]).measure(jobs(2 * JOBS_AT_A_TIME))
    assert all(m.latency_ms for m in results) and len(results) == 2 * JOBS_AT_A_TIME


def test_when_the_last_board_is_lost_each_reason_is_told_and_results_were_given() -> None:
    told: list[Measurement] = []
    boards = Boards([Board(lost_after=2), Board(lost_after=1)], ["a", "b"])
    with pytest.raises(RemoteError, match=r"every board is lost:\n  [ab]: no connection\n  [ab]: no connection\n") as e:
        boards.measure(jobs(30), told.append)
    assert len(told) == 3 and "the same command goes on from there" in str(e.value)
    with pytest.raises(RemoteError, match="every board is lost"):
        boards.measure(jobs(1))


def test_boards_in_different_states_are_refused_with_the_fields_that_differ() -> None:
    with pytest.raises(DeviceError, match=r"a and b are not in one state.*\n  power_mode: 'MAXN' and '15W'\n"):
        Boards([Board(mode="MAXN"), Board(mode="15W")], ["a", "b"])
    with pytest.raises(DeviceError, match=r"\n  locked_mhz: 'gpu 1020' and 'gpu 816'\n"):
        Boards([Board(locked="gpu 1020"), Board(locked="gpu 816")], ["a", "b"])


def test_work_that_is_stopped_ends_on_all_boards_and_they_can_be_used_again() -> None:
    one, two = Board(pause_s=0.01), Board(pause_s=0.01)
    boards = Boards([one, two], ["a", "b"])

    def stop(_: Measurement) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        boards.measure(jobs(60), stop)
    assert threading.active_count() == before
    assert len(one.measured) + len(two.measured) < 20
    assert len(boards.measure(jobs(4))) == 4


class Failing(Board):
    """Works until it gave so many results; then its profile is another one, and it raises an error for ever."""

    def __init__(self, error: DeviceError, after: int = 2) -> None:
        super().__init__(lost_after=after, pause_s=0.002)
        self._error = error

    @property
    def profile(self) -> DeviceProfile:
        state = super().profile
        return replace(state, clocks_locked=False) if len(self.measured) >= 2 else state

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        try:
            return super().measure(jobs, on_result, progress)
        except LinkCutError:
            raise self._error from None

    def run(self, *_: object) -> list[NDArray[np.generic]]:
        raise DeviceError("trtexec cannot run the model") from self._error


@pytest.mark.parametrize(
    "error",
    [
        StateChangedError("the board is in another state than when the work began"),
        RefusedRequestError("busy", "the board is used by another program"),
    ],
    ids=["booted with unlocked clocks", "busy"],
)
def test_a_board_in_another_state_or_busy_is_lost_while_another_is_left(error: DeviceError) -> None:
    one, two = Failing(error), Board(pause_s=0.005)
    said: list[str] = []
    boards = Boards([one, two], ["a", "b"], said.append)
    before = boards.profile

    def take(_: Measurement) -> None:
        assert boards.profile == before, "the table would be told that its device changed"

    results = boards.measure(jobs(30), take)
    assert [m.key for m in results] == [f"r{i}" for i in range(30)] and all(m.latency_ms for m in results)
    assert said == [f"a is lost: {error}; the other one goes on with its share"]
    with pytest.raises(RemoteError, match=r"every board is lost:\n  a: the board is (in another|used)"):
        Boards([Failing(error)], ["a"]).measure(jobs(30))


def test_a_busy_board_is_not_waited_for_by_a_run_but_a_model_that_is_refused_ends_it() -> None:
    images = np.ones((1, 3, 8, 8), np.float32)
    busy = RefusedRequestError("busy", "the board is used by another program")
    assert np.allclose(Boards([Failing(busy), Board()], ["a", "b"]).run(mean_model(), images)[0], 2)
    said: list[str] = []
    refused = RefusedRequestError("build_failed", "no kernel")
    with pytest.raises(DeviceError, match="trtexec cannot run the model"):
        Boards([Failing(refused), Board()], ["a", "b"], said.append).run(mean_model(), images)
    assert not said


def test_an_error_that_is_no_loss_ends_the_work() -> None:
    class Broken(Board):
        def measure(self, *_: object) -> list[Measurement]:
            raise DeviceError("the runtime is of another version")

    with pytest.raises(DeviceError, match="another version"):
        Boards([Broken(), Board(pause_s=0.01)], ["a", "b"]).measure(jobs(30))


def test_a_board_that_is_lost_is_not_asked_to_run_models() -> None:
    class Away(Board):
        def run(self, *_: object) -> list[NDArray[np.generic]]:
            raise LinkCutError("no connection")

    images = np.ones((1, 3, 8, 8), np.float32)
    said: list[str] = []
    boards = Boards([Away(), Board()], ["a", "b"], said.append)
    for _ in range(2):
        assert np.allclose(boards.run(mean_model(), images)[0], 2)
    assert said == ["a is lost: no connection; the other one goes on with its share"], "it is not asked again"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[SshServer, SshServer]]:
    program = requires_openssh()
    with SshServer(program) as one, SshServer(program) as two:
        yield one, two


def test_two_boards_over_ssh_and_one_that_loses_its_power(
    servers: tuple[SshServer, SshServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.devices.remote.PATIENCE_S", 0.0)
    one, two = servers
    said: list[str] = []
    device = open_device(f"{one.device_name()},{two.device_name()}", said.append)
    assert isinstance(device, Boards)
    told: list[Measurement] = []

    def take(m: Measurement) -> None:
        told.append(m)
        if len(told) == JOBS_AT_A_TIME:
            two.stop()

    results = device.measure(jobs(80), take)
    assert [m.key for m in results] == [f"r{i}" for i in range(80)]
    assert all(m.latency_ms for m in results) and len(told) == 80
    assert said[-1].startswith(f"{two.device_name()} is lost: ") and "goes on with its share" in said[-1]
    device.close()
