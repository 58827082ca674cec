"""A board behind SSH as a Device: models travel there, samples come back, and the host makes latencies of them.

The board times (`nas/devices/board`); what a latency is follows from the samples by the functions of
`nas/devices/protocol.py`, as it does for this machine. A connection that breaks is made again, and what the board had
finished by then comes from its file: nothing is lost, and nothing that was finished is measured twice.

Results count only while power mode and clocks stay those that the device's profile tells: models that were measured
while the board changed them, or booted, are measured again; a board that stays changed ends the work.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DeviceError
from nas.core.jsonio import content_hash
from nas.core.records import ClockKind, DeviceProfile, Measurement
from nas.devices.address import RemoteAddress
from nas.devices.agent import packed_agent
from nas.devices.base import (
    CalmReport,
    JobKind,
    JobPrecision,
    LayerTime,
    MeasureJob,
    OnProgress,
    OnResult,
    StreamJob,
    StreamTimes,
    layer_times_of,
)
from nas.devices.board.state import identity
from nas.devices.board_profile import RemoteRunner, chosen_runner, remote_profile, runner_of
from nas.devices.capability import (
    reads_hard_swish,
    version_of,
)
from nas.devices.graphs import reference_model
from nas.devices.link import AgentLink, Message, RefusedRequestError
from nas.devices.portable import feed_bytes, image_bytes, portable_model, precision_of
from nas.devices.protocol import (
    THROTTLED,
    Attempt,
    GateReading,
    KnownBest,
    ProtocolSettings,
    agrees,
    calm_report,
    is_accepted,
    network_value,
    queueing_note,
    session_value,
)
from nas.devices.ssh import DiskFullError, LinkCutError, Ssh, StateChangedError
from nas.devices.stream import StreamSession, stream_session, stream_values

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between tries to connect again, doubled each time
PATIENCE_S = 180.0  # of such pauses together, without anything that arrives: a board boots in about a minute
RUN_LIMIT_S = 600.0  # of a few images; where an engine is built of the model before, see BUILD_LIMIT_S
RUN_BYTES = 32 << 20  # of images that lie on the board at a time: a Nano has 4 GB of memory for everything
BUILD_LIMIT_S = 1800.0  # of one engine: TensorRT takes minutes on a Nano
SLOW_CHECKS = 3  # looks at the reference network where each may load an engine anew
JOBS_OF_BATCH = 200  # that one request brings to the board; how many live at once there is another matter
_NEARLY_ALL = 0.99  # of the work, while nobody knows how many further sessions it takes until they agree
_NUMBER = re.compile(r"\d+(?:\.\d+)?")

# For runtimes that build an engine for seconds to minutes, and time on the accelerator's own clock, which a busy
# processor does not disturb: few builds, longer rounds, the median of their samples (facts of trtexec's reports).
SLOW_START = ProtocolSettings(
    warmup_runs=20,
    network_round_ms=300.0,
    row_round_ms=200.0,
    network_rounds=3,
    row_rounds=3,
    network_sessions=2,
    row_sessions=1,
    most_network_sessions=2,
    agreeing_sessions=2,
    networks_alive=4,
    rows_alive=8,
    min_runs=50,
    min_network_runs=50,
    max_runs=2000,
    retries=2,
    wait_ms=2000.0,
    quantile=0.5,
    hang_s=180.0,
)


class RemoteDevice:
    """A board behind SSH."""

    def __init__(
        self,
        address: RemoteAddress,
        *,
        say: Callable[[str], None] = lambda _: None,
        settings: ProtocolSettings | None = None,
        patience_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connects, and asks the board what it is.

        Args:
            address: where it is, and what to measure with there.
            say: told in a line when the connection breaks and is made again, or another program has the board.
            settings: numbers of the measuring protocol; by default those that suit the runtime.
            patience_s: how long to try to reach a board again that was lost.
            sleep: waits so many seconds.

        Raises:
            RemoteError: the board cannot be used; each reason has its own type.
            UsageError: there is no such runtime.
            DeviceError: the runtime is not on the board.
        """
        self._address = address
        self._say = say
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._sleep = sleep
        self._client = secrets.token_hex(8)
        self._expected_ms: float | None = None
        self._best_ms: float | None = None
        self._sequence = 0
        self._received = 0
        self._connection = _Connection(Ssh(address.ssh))
        weakref.finalize(self, self._connection.close)
        try:
            hello = self._hello(self._connection.open())
            self._runners = tuple(map(runner_of, hello["runners"]))
            self._runner = chosen_runner(self._runners, address)
            self._settings = settings or (SLOW_START if self._runner.slow_start else _processor(address.threads))
            self._state: Message = hello["state"]
        except BaseException:
            self._connection.close()
            raise

    @property
    def address(self) -> RemoteAddress:
        """Where it is."""
        return self._address

    @property
    def ssh(self) -> Ssh:
        """Runs other programs on the board, over the same connection."""
        return self._connection.ssh

    @property
    def runners(self) -> tuple[RemoteRunner, ...]:
        """All runtimes that could be there, the chosen one among them, with what is missing of the others."""
        return self._runners

    @property
    def state(self) -> Message:
        """The board's state as it was last told."""
        return self._state

    @property
    def profile(self) -> DeviceProfile:
        """State of the board as it was last told: at the beginning, and with each result."""
        return remote_profile(self._address, self._runner, self._state)

    def close(self) -> None:
        """Ends the connection and with it the agent."""
        self._connection.close()

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:  # noqa: ARG002
        """Sets the reference network's time in earlier sessions; the one of the streaming chain is not used here."""
        self._expected_ms = reference_ms

    def calm(self, checks: int = 20) -> CalmReport:
        """Looks `checks` times at the reference network on the board; less often where a look may start a program."""
        plan = {**self._plan("overhead"), "gate_runs": self._settings.gate_runs}
        if self._runner.slow_start:  # trtexec starts for each, for seconds; more runs then cost little
            checks = min(checks, SLOW_CHECKS)
            plan |= {"gate_runs": self._settings.min_runs, "calibration_checks": 0}
        request = {
            **self._request("calm", plan),
            "checks": max(1, checks),
            "reference": _sha256(_reference(self._splits)),
        }
        told = self._with_link(
            lambda link: self._asked(link, request, {request["reference"]: _reference(self._splits)})
        )
        readings = [GateReading(r["median_ms"], r["cpu_share"]) for r in told["readings"]]
        return calm_report(readings, self._known_best(told["best_ms"]))

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """Measures jobs on the board, jobs of one kind interleaved; see `Device.measure`.

        Raises:
            RemoteError: the board is lost; what was told to `on_result` before is sound.
            StateChangedError: the board is in another state than its profile.
        """
        results: dict[int, Measurement] = {}
        highest = 0.0

        def tell(done: int, part: int, share: float) -> None:
            nonlocal highest
            highest = max(highest, min(_NEARLY_ALL, (done + share * part) / len(jobs)))
            if progress is not None:
                progress(highest)

        def take(places: Sequence[int], i: int, result: Measurement) -> None:
            results[places[i]] = result
            if on_result is not None:
                on_result(result)

        for batch in _batches([job.kind for job in jobs]):
            share = partial(tell, len(results), len(batch))
            self._measure_batch([jobs[i] for i in batch], share, partial(take, batch))
            tell(len(results), 0, 0.0)
        if progress is not None and jobs:
            progress(1.0)
        return [results[i] for i in range(len(jobs))]

    def profile_layers(self, job: MeasureJob, runs: int = 100) -> Message:
        """Time of each layer of a model, as the runtime gives it: `layers`, `build_s`, `warnings`, `state`.

        Raises:
            RefusedRequestError: `unsupported` where the runtime tells none, or why the model cannot be built.
        """
        sent, files = self._sent(job)
        request = {**self._request("profile", {}), **sent, "runs": runs, "limit_s": BUILD_LIMIT_S}
        return self._with_link(lambda link: self._asked(link, request, files))

    def change_power(self, set_mode: str | None, lock_clocks: bool) -> Message:
        """Sets the power mode, locks the clocks of the board: only what is asked for, by `sudo -n`.

        Args:
            set_mode: name or id of a mode of this board; None leaves it.
            lock_clocks: whether to pin the clocks to the highest of the mode.

        Returns:
            `ran`, `back`, `notes` and `state` of `board.power.change`.

        Raises:
            RefusedRequestError: there is no such mode, or it did not work; the message has the command to run by hand.
        """
        request = {"op": "power", "set_mode": set_mode, "lock_clocks": lock_clocks}
        told = self._with_link(lambda link: self._asked(link, request, {}))
        self._state = told["state"]
        return told

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else measures on the board or deploys to it within; another program's work is waited for.

        Raises:
            RefusedRequestError: `busy`: it takes too long.
        """
        self._with_link(lambda link: link.ask({"op": "hold", "is_held": True}, on_message=self._waiting))
        try:
            yield
        finally:
            if self._connection.link is not None:  # with the connection the board is let go
                self._with_link(lambda link: link.ask({"op": "hold", "is_held": False}))

    def run_script(self, folder: str, script: str, options: Sequence[str], limit_s: float) -> tuple[int, str, str]:
        """Runs a Python program that lies on the board, while nobody measures there; it ends with this connection.

        Args:
            folder: relative to the home folder there, or absolute.
            script: its file.
            options: its arguments.
            limit_s: how long it may take.

        Returns:
            Exit status, output and error output.

        Raises:
            RemoteError: the board cannot be used.
            RefusedRequestError: it did not end in time, or another program keeps the board.
        """
        request = {"op": "script", "folder": folder, "script": script, "options": list(options), "limit_s": limit_s}
        told = self._with_link(lambda link: link.ask(request, on_message=self._waiting))
        return int(told["code"]), str(told["out"]), str(told["err"])

    def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
        """Typical time of each layer of the engine that the board builds of a model; see `LayerTimer`."""
        return layer_times_of(self.profile_layers(MeasureJob("layers", "network", precision, model, 0))["layers"])

    @property
    def no_stream(self) -> str:
        """Why images cannot be timed one by one there: trtexec alone takes none. Empty where they can."""
        needed, own = self._runner.streams_by, f"{self._runner.name} takes no images one by one"
        if not needed:
            return own
        lacks = next((r.missing for r in self._runners if r.name == needed), f"there is no {needed}")
        return f"{own}, and {needed} is missing: {lacks}" if lacks else ""

    def stream_times(self, job: StreamJob, progress: OnProgress | None = None) -> StreamTimes:
        """Times of the images of a stream, taken and decided on the board; see `StreamTimer`.

        Raises:
            RemoteError: the board is lost.
            DeviceError: it refuses the models or the images, or is in another state than its profile.
        """
        if self.no_stream:
            raise DeviceError(f"{job.key}: the stream cannot be timed: {self.no_stream}")
        models = [self._portable(model) for model in job.models]
        images, kind = image_bytes(job.images, models[0])
        sent = {
            "key": job.key,
            "models": [_sha256(model) for model in models],
            "precisions": [precision_of(model) for model in models],
            "thresholds": [float(threshold) for threshold in job.thresholds],
            "images": _sha256(images),
            "images_kind": kind,
            "shape": list(job.images.shape),
        }
        files = {_sha256(data): data for data in (*models, images)}
        told: list[Message] = []

        def tell(share: float) -> None:
            if progress is not None:
                progress(min(_NEARLY_ALL, share))

        plan = {**self._plan("network"), "alive": 1}
        self._asked_for_jobs("stream", [sent], files, plan, tell, lambda _, result: told.append(result))
        if progress is not None:
            progress(1.0)
        raw = told[0]
        if raw["error"] is not None:
            raise DeviceError(f"{job.key}: the stream cannot be timed: {raw['error']['message']}")
        best = self._known_best(raw["best_ms"])
        return stream_values([self._stream_session(s, best) for s in raw["sessions"]], self._settings.quantile)

    def _stream_session(self, told: Message, best: KnownBest) -> StreamSession:
        blocks = []
        start = 0
        for rounds in told["blocks"]:
            attempts = [_attempt(r) for r in rounds]
            accepted = [self._counts(a, r, best) for a, r in zip(attempts, rounds, strict=True)]
            end = start + len(attempts[0].samples_ms)
            blocks.append(([a.samples_ms for a in attempts], accepted, told["exits"][start:end]))
            start = end
        return stream_session(blocks)

    def _counts(self, attempt: Attempt, told: Message, best: KnownBest) -> bool:
        return is_accepted(attempt, best, self._settings) and not told.get("throttled")

    @property
    def _splits(self) -> bool:
        """Whether the runtime cannot read HardSwish."""
        return self._runner.runtime == "tensorrt" and not reads_hard_swish(version_of(self._runner.version))

    def _portable(self, model: bytes) -> bytes:
        """A model as this runtime takes it: an open batch is 1 where the runtime wants a fixed one, as it is deployed.

        An engine for all images that are to be run at once would not fit into the memory of a board.
        """
        fixed = None if self._runner.dynamic_batch else 1
        return portable_model(model, fixed, splits_hard_swish=self._splits)

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs for raw images, computed on the board; see `Device.run`."""
        if not len(images):
            raise DeviceError("no images were given to run")
        model = self._portable(model)
        size = max(1, RUN_BYTES // images[0].nbytes)
        parts = [self._run_part(model, images[start : start + size]) for start in range(0, len(images), size)]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _run_part(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        kind = "<f2" if images.dtype == np.float16 else "<f4"  # feature maps between segments may be half floats
        data = np.ascontiguousarray(images, dtype=kind).tobytes()
        files = {_sha256(model): model, _sha256(data): data}
        request = {
            **self._request("run", {}),
            "sha256": _sha256(model),
            "images": _sha256(data),
            "shape": list(images.shape),
            "precision": precision_of(model),
            "limit_s": BUILD_LIMIT_S if self._runner.slow_start else RUN_LIMIT_S,
        }

        def outputs(link: AgentLink) -> list[NDArray[np.generic]]:
            told = self._asked(link, request, files)
            arrays = []
            for output in told["outputs"]:
                values = np.frombuffer(link.data(int(output["bytes"])), dtype=np.dtype(output["dtype"]))
                arrays.append(values.reshape(output["shape"]).copy())
            return arrays

        try:
            return self._with_link(outputs)
        except RefusedRequestError as e:
            raise DeviceError(f"{self._runner.name} cannot run the model: {e}") from e

    def _measure_batch(
        self, jobs: Sequence[MeasureJob], tell: Callable[[float], None], give: Callable[[int, Measurement], None]
    ) -> None:
        """Gives each result as soon as no further session of its model is wanted."""
        settings, kind = self._settings, jobs[0].kind
        raws: list[list[Message]] = [[] for _ in jobs]
        left = list(range(len(jobs)))
        most = settings.most_sessions(kind) - settings.sessions(kind)

        def take(asked: Sequence[int], number: int, place: int, raw: Message) -> None:
            i = asked[place]
            raws[i].append(raw)
            if number == most or _error(raws[i]) or agrees(self._session_ms(raws[i]), settings):
                left.remove(i)
                give(i, self._result(jobs[i], raws[i]))

        for number in range(most + 1):
            asked = tuple(left)
            if asked:
                plan = {**self._plan(kind), "sessions": settings.sessions(kind) if number == 0 else 1}
                share = tell if number == 0 else lambda _: tell(1.0)
                self._raw([jobs[i] for i in asked], plan, share, partial(take, asked, number), number)

    def _raw(
        self,
        jobs: Sequence[MeasureJob],
        plan: Message,
        tell: Callable[[float], None],
        give: Callable[[int, Message], None],
        number: int = 0,
    ) -> None:
        """Gives one record of the board for each job."""
        sent: list[Message] = []
        files: dict[str, bytes] = {}
        for job in jobs:
            described, its_files = self._sent(job)
            sent.append(described)
            files |= its_files
        # What shows how fast the board is now may not come from an earlier program.
        fresh = secrets.token_hex(8) if jobs[0].kind == "overhead" else ""
        self._asked_for_jobs("measure", sent, files, plan, tell, give, number, fresh)

    def _asked_for_jobs(
        self,
        operation: str,
        sent: Sequence[Message],
        files: dict[str, bytes],
        plan: Message,
        tell: Callable[[float], None],
        give: Callable[[int, Message], None],
        number: int = 0,
        fresh: str = "",
    ) -> None:
        """Gives one record of the board for each job of a batch, over as many connections as it takes.

        Args:
            operation: `measure` or `stream`.
            sent: the jobs as they travel.
            files: that they need, by content.
            plan: numbers of the protocol.
            tell: told the share of the work done.
            give: told the number of a job and its record.
            number: of the batch among those of the same jobs.
            fresh: makes it another batch than every one before.
        """
        request = {**self._request(operation, plan), "jobs": list(sent)}
        if plan["gate_runs"]:
            request["reference"] = _sha256(_reference(self._splits))
            files = {**files, request["reference"]: _reference(self._splits)}
        # Named by content, so that the next program goes on with what this one did not fetch.
        request["batch"] = content_hash([packed_agent().sha256, request, number, fresh], 32)
        received: set[int] = set()

        def take(message: Message) -> None:
            if "result" in message:
                result = message["result"]
                index = int(result["index"])
                if index not in received:  # over a second connection all of them come again
                    self._check(result)
                    received.add(index)
                    self._received += 1
                    give(index, result)
            elif "progress" in message:
                tell(float(message["progress"]))
            self._waiting(message)

        def ask(link: AgentLink) -> None:
            expected = [ms for ms in (self._expected_ms, self._best_ms) if ms is not None]
            self._asked(link, {**request, "best_ms": min(expected, default=None)}, files, take)

        self._with_link(ask)
        self._with_link(lambda link: link.ask({"op": "acknowledge", "batch": request["batch"]}))

    def _waiting(self, message: Message) -> None:
        if "waiting" in message:
            self._say(f"{self._address.ssh.shown}: waiting, {message['waiting']}")

    def _sent(self, job: MeasureJob) -> tuple[Message, dict[str, bytes]]:
        """A job as it travels, and the files that it needs."""
        model = self._portable(job.model)
        feeds = feed_bytes(job)
        files = {_sha256(model): model, **{_sha256(data): data for data in feeds.values()}}
        described = {
            "key": job.key,
            "kind": job.kind,
            "sha256": _sha256(model),
            "precision": "fp32" if job.precision == "none" else job.precision,
            "feeds": {name: _sha256(data) for name, data in feeds.items()},
        }
        return described, files

    def _request(self, operation: str, plan: Message) -> Message:
        runner = self._runner
        request = {
            "op": operation,
            "runner": runner.name,
            "version": runner.version,
            "threads": self._address.threads,
        }
        return {**request, "plan": plan} if plan else request

    def _plan(self, kind: JobKind) -> Message:
        settings, slow = self._settings, self._runner.slow_start
        return {
            "sessions": settings.sessions(kind),
            "rounds": settings.rounds(kind),
            "round_ms": settings.round_ms(kind),
            "warmup_runs": settings.warmup_runs,
            "min_runs": settings.least_runs(kind),
            "max_runs": settings.max_runs,
            "retries": settings.retries,
            "wait_ms": settings.wait_ms,
            "wait_round_ms": settings.wait_round_ms,
            "wait_share": settings.wait_share,
            "gate_runs": 0 if slow else settings.gate_runs,
            "gate_cpu_share": settings.gate_cpu_share,
            "gate_drift": settings.gate_drift,
            "round_cpu_share": settings.round_cpu_share,
            "calibration_checks": settings.calibration_checks,
            "alive": settings.alive(kind),
            "hang_s": settings.hang_s,
            "build_s": BUILD_LIMIT_S if slow else settings.hang_s,
            "whole": int(kind in ("network", "segment")),
        }

    def _asked(
        self,
        link: AgentLink,
        request: Message,
        files: Mapping[str, bytes],
        take: Callable[[Message], None] = lambda _: None,
    ) -> Message:
        for _ in range(2):
            link.put(files)
            try:
                return link.ask(request, on_message=take)
            except RefusedRequestError as e:
                if e.kind != "not_found" or "not on this board any more" not in str(e):
                    raise
                refused = e  # another program's agent tidied up in between
        raise refused

    def _with_link(self, work: Callable[[AgentLink], T]) -> T:
        """Does work over the connection; where it breaks, over the next one, as long as the patience lasts."""
        tries, waited_s, received = 0, 0.0, self._received
        while True:
            try:
                return work(self._link())
            except RefusedRequestError:  # an answer: the connection is as good as before
                raise
            except LinkCutError as e:
                self._connection.drop()
                if self._received != received:
                    tries, waited_s, received = 0, 0.0, self._received
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries)
                if waited_s + pause_s > self._patience_s:
                    raise type(e)(
                        f"{e}. Given up after {tries + 1} tries in {waited_s:.0f} s. What arrived is kept: when the "
                        "board can be reached again, the same command goes on from there"
                    ) from e
                self._say(f"{e}; trying again in {pause_s:g} s")
                self._sleep(pause_s)
                tries, waited_s = tries + 1, waited_s + pause_s
            except BaseException:  # in the middle of an answer: nothing sensible would be read next
                self._connection.drop()
                raise

    def _link(self) -> AgentLink:
        if self._connection.link is None:
            hello = self._hello(self._connection.open(), runners=False)
            if self._received:
                self._say(f"{self._address.ssh.shown}: connected again")
            self._compare(identity(hello["state"]))
        return self._connection.open()

    def _hello(self, link: AgentLink, *, runners: bool = True) -> Message:
        asked = {"op": "hello", "client": self._client, "runners": runners, "runner": self._address.runner}
        return link.ask(asked)

    def _check(self, result: Message) -> None:
        """Refuses a record that was not measured in the profile's state, or not for a reason of the model."""
        error = result["error"]
        if error is not None and error["kind"] == "state_changed":
            raise StateChangedError(f"{self._address.ssh.shown}: {error['message']}. Let it alone while it is measured")
        if error is not None and error["kind"] == "disk_full":
            raise DiskFullError(f"{self._address.ssh.shown}: {error['message']}")
        self._compare(result["state"])

    def _compare(self, now: Message) -> None:
        before = identity(self._state)
        changed = [name for name in now if name != "boot_id" and now[name] != before.get(name)]
        if now["boot_id"] != before["boot_id"]:
            self._say(f"{self._address.ssh.shown}: the board was started anew")
        mode = self._state.get("power_mode")
        if "power_mode" in changed and now["power_mode"] is not None:
            mode = {**(mode or {}), "name": now["power_mode"], "id": None}
        self._state = {**self._state, **now, "power_mode": mode}
        if changed:
            lines = [f"{name}: it was {before.get(name)!r}, it is {now[name]!r}" for name in changed]
            raise StateChangedError(
                f"{self._address.ssh.shown}: the board is in another state than when the work began:\n  "
                + "\n  ".join(lines)
                + "\nWhat was measured in it is not kept. Bring the board back into that state, or run the command "
                "again: it then takes the table of the new state"
            )

    def _known_best(self, best_ms: float | None) -> KnownBest:
        known = [ms for ms in (best_ms, self._best_ms, self._expected_ms) if ms is not None]
        if best_ms is not None:
            self._best_ms = min(best_ms, self._best_ms or best_ms)
        return KnownBest(min(known, default=float("inf")), float("inf"), self._settings)

    def _session_ms(self, raws: Sequence[Message]) -> tuple[float, ...]:
        return tuple(session_value([_attempt(r) for r in s], self._settings) for raw in raws for s in raw["sessions"])

    def _result(self, job: MeasureJob, raws: Sequence[Message]) -> Measurement:
        self._sequence += 1
        error, rounds = _error(raws), [r for raw in raws for session in raw["sessions"] for r in session]
        values = () if error else self._session_ms(raws)
        if values and min(values) <= 0:
            error = "the clock shows no time for a whole round"
        clock: ClockKind = _CLOCKS.get(rounds[0]["clock"], "wall") if rounds else "wall"
        empty = Measurement(
            job.key, job.kind, job.precision, None, (), (), clock, raws[-1]["measured_at"], self._sequence, error="-"
        )
        if error:
            return replace(empty, error=error)
        best = self._known_best(min((raw["best_ms"] for raw in raws if raw["best_ms"] is not None), default=None))
        energy = next((raw["energy"] for raw in raws if (raw.get("energy") or {}).get("mj")), None)
        notes = dict.fromkeys(str(note) for raw in raws for note in raw["warnings"])
        notes |= dict.fromkeys(_marks(rounds))
        attempts = [_attempt(r) for r in rounds]
        accepted = [self._counts(a, r, best) for a, r in zip(attempts, rounds, strict=True)]
        return replace(
            empty,
            error=None,
            latency_ms=network_value(values),
            rounds_ms=tuple(a.samples_ms for a in attempts),
            accepted=tuple(accepted),
            session_ms=values,
            temperature_c=max((r["temperature_c"] for r in rounds if r.get("temperature_c") is not None), default=None),
            clock_mhz=min((r["clock_mhz"] for r in rounds if r.get("clock_mhz") is not None), default=None),
            source="; ".join(notes),
            energy_mj=None if energy is None else float(energy["mj"]),
            energy_std_mj=None if energy is None else float(energy["std_mj"]),
            transfer_ms=next((float(raw["transfer_ms"]) for raw in raws if raw["transfer_ms"] is not None), None),
        )


class _Connection:
    """The ssh programs of a device; closed by whatever ends first, the device or this process."""

    def __init__(self, ssh: Ssh) -> None:
        self.ssh = ssh
        self._process_id = os.getpid()
        self.link: AgentLink | None = None

    def open(self) -> AgentLink:
        if self.link is None:
            self.link = AgentLink(self.ssh, packed_agent())
        return self.link

    def drop(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.close()

    def close(self) -> None:
        if os.getpid() == self._process_id:  # not in a process that was forked off
            self.drop()
            self.ssh.close()


_CLOCKS: dict[str, ClockKind] = {
    "thread_cpu": "thread_cpu",
    "wall": "wall",
    "cuda_event": "device_event",
    "device_event": "device_event",
}


def _batches(kinds: Sequence[JobKind]) -> list[list[int]]:
    """Indices of jobs that travel together: of one kind, in the order given."""
    batches: list[list[int]] = []
    for i, kind in enumerate(kinds):
        last = batches[-1] if batches else []
        if last and kinds[last[0]] == kind and len(last) < JOBS_OF_BATCH:
            last.append(i)
        else:
            batches.append([i])
    return batches


def _processor(threads: int) -> ProtocolSettings:
    return ProtocolSettings() if threads == 1 else ProtocolSettings(clock="wall", row_rounds=6)


def _error(raws: Sequence[Message]) -> str | None:
    return next((str(raw["error"]["message"]) for raw in raws if raw["error"] is not None), None)


def _marks(rounds: Sequence[Message]) -> list[str]:
    """What has to be known of the rounds of a model beside their times: a note for each thing."""
    notes = []
    throttled = [r for r in rounds if r.get("throttled")]
    if throttled:
        reasons = [why for r in throttled for why in str(r.get("throttled_why", "")).split("; ") if why]
        kinds = {_NUMBER.sub("#", why): why for why in reversed(reasons)}  # of one kind the first
        told = ", ".join(reversed(kinds.values())) or "the board does not say why"
        notes.append(f"{THROTTLED} in {len(throttled)} of {len(rounds)} rounds: {told}")
    bound = [r for r in rounds if r.get("enqueue_bound")]
    if 2 * len(bound) > len(rounds):
        notes.append(queueing_note(all(r.get("cuda_graph") for r in bound)))
    return notes


def _attempt(told: Message) -> Attempt:
    gate = told.get("gate") or {"median_ms": 0.0, "cpu_share": 1.0}  # no look at a reference: nothing to reject
    samples = tuple(float(s) for s in told["samples_ms"])
    return Attempt(samples, float(told.get("cpu_share", 1.0)), GateReading(gate["median_ms"], gate["cpu_share"]))


@cache
def _reference(splits_hard_swish: bool) -> bytes:
    """The reference network as it travels."""
    return portable_model(reference_model(), splits_hard_swish=splits_hard_swish)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
