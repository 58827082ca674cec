"""What tests of several packages share: simulated devices, and the contract that every device has to keep.

Simulated numbers say so (`profile.kind == "simulated"`): they are for tests of the programs around a device and never
stand in a result.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nas.core.errors import DeviceError, RecordError
from nas.core.jsonio import canonical_json, from_plain, parse_json
from nas.core.records import Candidate, ConvSpec, DeviceProfile, LayerSpec, Measurement
from nas.core.walk import expand
from nas.devices.base import (
    GATE_KEY,
    OVERHEAD_KEY,
    REFERENCE_KEY,
    CalmReport,
    Device,
    MeasureJob,
    OnProgress,
    OnResult,
    StreamJob,
    StreamTimer,
)
from nas.devices.graphs import IR_VERSION, OPSET, overhead_job, reference_job
from nas.devices.protocol import network_value
from nas.latency.keys import layer_of_key
from nas.latency.lines import STREAMING_MB, NetworkForm, network_key, streaming_key

if TYPE_CHECKING:
    import torch

# Multiply-adds per millisecond; about those of one thread of a server CPU.
_MACS_PER_MS = {"fp32": 2e7, "fp16": 3e7, "bf16": 3e7, "int8": 4e7, "mixed": 2.7e7, "none": 2e7}
_OVERHEAD_MS = 0.003
_GATE_MS = 0.002
_STREAMING_MS = 0.2
_REFERENCE_MS = 0.3

# Of a simulated board. int8 is the faster one where channels are mixed and the slower one where they are not, as on
# x86-64; a row is off from its multiply-adds by `_ROW_SPREAD`, as shapes are.
_BOARD_MACS_PER_MS = {
    "dense": {"fp32": 2e7, "fp16": 3e7, "bf16": 3e7, "int8": 5e7},
    "depthwise": {"fp32": 8e6, "fp16": 8e6, "bf16": 8e6, "int8": 6e6},
}
_KERNEL_MS = 0.002
_ROW_SPREAD = 0.1
_BUILDS = 3  # fresh sessions of a network, each a build of its own
_ROUNDS = (5, 4)  # rounds of a session, runs of a round
_THROTTLED = (1.3, 1.6)  # times slower while the clock is lowered
_COLD_C, _WARM_C, _HOT_C, _CLOCK_MHZ = 45.0, 60.0, 90.0, 1000.0
_DESCRIBED = b"{"  # begins a description; no ONNX file begins so


class SimulatedDevice:
    """A device whose latencies are a function of multiply-adds and key, the same on every machine.

    A row takes overhead + macs / rate, a whole network `network_factor` times that, each with a deviation of about
    `noise` that depends on the key and the seed only. Models must be readable ONNX, otherwise measuring them fails as
    on a real device. `run` really runs the model on the host.
    """

    def __init__(
        self, seed: int = 0, *, network_factor: float = 1.05, noise: float = 0.01, power_mw: float | None = None
    ) -> None:
        """`noise` is the relative standard deviation of a value, `power_mw` the power; None: no sensor."""
        self._seed = seed
        self._network_factor = network_factor
        self._noise = noise
        self._power_mw = power_mw
        self._sequence = 0

    @property
    def profile(self) -> DeviceProfile:
        """A made-up device, labelled as such."""
        return DeviceProfile(
            name=f"simulated-{self._seed}",
            board="simulated",
            runtime="simulated",
            runtime_version="1",
            power_mode="none",
            clocks_locked=True,
            threads=1,
            driver=f"seed={self._seed}",
            precisions=("fp32", "int8"),
            kind="simulated",
        )

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """One measurement per job, at once; see `Device.measure`."""
        return _in_turn(jobs, self._measurement, on_result, progress)

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs of the model, really computed; see `Device.run`."""
        from nas.devices.onnxruntime_cpu import run_model

        return run_model(model, images)

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Ignored: this device is always in the same state."""

    def calm(self, checks: int = 20) -> CalmReport:
        """Always calm."""
        return CalmReport(checks, 0, _REFERENCE_MS, _REFERENCE_MS, _REFERENCE_MS, 1.0)

    def latency_ms(self, job: MeasureJob) -> float:
        """The latency of a job, milliseconds."""
        if job.kind == "overhead":
            fixed = {OVERHEAD_KEY: 0.0, GATE_KEY: _GATE_MS, REFERENCE_KEY: _REFERENCE_MS}
            return _OVERHEAD_MS + fixed.get(job.key, _STREAMING_MS)  # weights cost the same wherever they come from
        deviation = float(np.random.default_rng(_digest(f"{self._seed}/{job.key}")).normal(0, self._noise))
        factor = 1.0 if job.kind == "row" else self._network_factor
        work = (job.macs + 1000) / _MACS_PER_MS[job.precision]
        return round(_OVERHEAD_MS + work * factor * (1 + float(np.clip(deviation, -0.5, 0.5))), 9)

    def _measurement(self, job: MeasureJob) -> Measurement:
        self._sequence += 1
        try:
            onnx.load_model_from_string(job.model)
        except DecodeError as e:
            return _result(job, self._sequence, error=f"not an ONNX model: {e}")
        value = self.latency_ms(job)
        result = _result(job, self._sequence, ((value,) * 4,) * 3, (value,))
        if self._power_mw is None:
            return result
        # Not a multiple of the latency: some layers take more power than others.
        share = float(np.random.default_rng(_digest(f"power/{self._seed}/{job.key}")).uniform(0.7, 1.3))
        energy_mj = self._power_mw * (1.0 if job.kind == "overhead" else share) * value / 1000
        return replace(result, energy_mj=energy_mj, energy_std_mj=0.02 * energy_mj)


@dataclass(frozen=True, slots=True)
class BoardEffects:
    """What makes a whole network differ from the sum of its rows, and one measurement from the next; all off.

    Of whole networks:
        fusion_gain: share of a block's work that goes away beside its neighbours, the mean over operator groups (kind,
            squeeze-and-excitation, precision); each has its own between 0 and twice this, at most 0.45.
        launch_ms: of each kernel, ms; a row that runs alone hides it behind its call.
        reformat_ms: of each change of precision between layers that follow each other, ms.
        cache_mb, streaming_ms: 10^6 bytes of weights that stay in the cache, and ms for each 10^6 bytes beyond.
        irregular: what no sum over layers explains, relative deviation, the same whenever a network is measured.

    Of measurements:
        build_std: relative deviation between builds of the same model.
        noise: relative deviation of a run.
        drift, drift_after: how much slower (ratio) a warm board is than a cold one, and after how many measurements
            63 % of that is reached.
        throttle_share, throttle_length: share of episodes in which the clock is lowered, and measurements in each.
    """

    fusion_gain: float = 0.0
    launch_ms: float = 0.0
    reformat_ms: float = 0.0
    cache_mb: float = 0.0
    streaming_ms: float = 0.0
    irregular: float = 0.0
    build_std: float = 0.0
    noise: float = 0.0
    drift: float = 0.0
    drift_after: float = 100.0
    throttle_share: float = 0.0
    throttle_length: int = 8

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) >= 0:
                raise RecordError(f"board: {f.name} must not be negative, got {getattr(self, f.name)}")
        if self.fusion_gain > 0.45 or self.throttle_share > 1 or min(self.throttle_length, self.drift_after) < 1:
            raise RecordError(
                f"board: fusion_gain is at most 0.45, throttle_share at most 1, throttle_length and drift_after at "
                f"least 1; got {self.fusion_gain}, {self.throttle_share}, {self.throttle_length}, {self.drift_after}"
            )


@dataclass(frozen=True, slots=True)
class BoardState:
    """A simulated board during one measurement: how many times slower than cold and calm, and what its sensors say."""

    slowdown: float
    is_throttled: bool
    temperature_c: float
    clock_mhz: float


def described_network(candidate: Candidate, form: NetworkForm) -> bytes:
    """What stands for the ONNX file of a network on a `SimulatedBoard`; `write` of `measure_networks`."""
    return canonical_json({"candidate": candidate, "form": form}).encode()


def described_layer(layer: LayerSpec) -> bytes:
    """What stands for the ONNX file of a row on a `SimulatedBoard`; `write` of `fill`."""
    return canonical_json({"row": layer.key}).encode()


class SimulatedBoard:
    """A device on which whole networks are not the sum of their rows, and which is never quite the same twice.

    It has to know of which layers a network consists: give `described_network` and `described_layer` as `write` where
    something is measured. Real ONNX is measured too, by its multiply-adds only. Every number follows from the seeds and
    the number of measurements before.
    """

    def __init__(self, seed: int = 0, effects: BoardEffects | None = None, *, rows_seed: int | None = None) -> None:
        """Makes a cold board.

        Args:
            seed: of everything that is drawn.
            effects: what disturbs; nothing where not given, and a network is the exact sum of its rows.
            rows_seed: of what rows alone take, by default `seed`; boards that share it can share a table of rows.
        """
        self.effects = effects or BoardEffects()
        self._seed = seed
        self._rows_seed = seed if rows_seed is None else rows_seed
        self._measured = 0
        self._work_ms: dict[str, float] = {}
        self._gains: dict[str, float] = {}

    @property
    def profile(self) -> DeviceProfile:
        """A made-up device, labelled as such."""
        return DeviceProfile(
            name=f"simulated-board-{self._seed}-{self._rows_seed}",
            board="simulated",
            runtime="simulated",
            runtime_version="1",
            power_mode="none",
            clocks_locked=True,
            threads=1,
            driver=f"board seed={self._seed} rows={self._rows_seed}",
            precisions=("fp32", "int8"),
            kind="simulated",
        )

    @property
    def state(self) -> BoardState:
        """What the board is like during the next measurement."""
        e, episode = self.effects, self._measured // self.effects.throttle_length
        warm = 1 - float(np.exp(-self._measured / e.drift_after)) if e.drift else 0.0
        rng = self._random("episode", str(episode))
        is_throttled = bool(rng.random() < e.throttle_share)
        factor = float(rng.uniform(*_THROTTLED)) if is_throttled else 1.0
        return BoardState(
            (1 + e.drift * warm) * factor,
            is_throttled,
            _HOT_C if is_throttled else _COLD_C + warm * (_WARM_C - _COLD_C),
            round(_CLOCK_MHZ / factor, 1),
        )

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """One measurement per job, at once; see `Device.measure`."""
        return _in_turn(jobs, self._measurement, on_result, progress)

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs of the model, really computed; see `Device.run`."""
        from nas.devices.onnxruntime_cpu import run_model

        return run_model(model, images)

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Ignored: a round is calm exactly when the clock is not lowered."""

    def calm(self, checks: int = 20) -> CalmReport:
        """Calm unless the clock is lowered now."""
        state = self.state
        now_ms = _REFERENCE_MS * state.slowdown
        return CalmReport(checks, checks if state.is_throttled else 0, _REFERENCE_MS, now_ms, now_ms, 1.0)

    def row_ms(self, layer: LayerSpec) -> float:
        """What a row alone takes on a cold and calm board, its call included, milliseconds."""
        return _OVERHEAD_MS + self._work(layer)

    def true_ms(self, candidate: Candidate, form: NetworkForm) -> float:
        """What a whole network takes on a cold and calm board, the median of its builds, milliseconds.

        Args:
            candidate: the network; its thresholds do not matter, no image leaves early.
            form: as in `measure_networks`.
        """
        e = self.effects
        layers = [x for x in expand(candidate) if form != "plain" or x.kind != "exit_head"]
        total = _OVERHEAD_MS + _GATE_MS * (len(candidate.exits) if form == "if" else 0)
        before = layers[0].precision
        for x in layers:
            total += self._work(x) * (1 - self._gain(x)) + e.launch_ms * len(x.convolutions)
            if x.precision != before:
                total += e.reformat_ms
            if x.kind != "exit_head":
                before = x.precision
        megabytes = sum(x.weight_bytes for x in layers) / 1e6
        total += self._streaming(megabytes)
        if e.irregular:
            total *= float(np.exp(e.irregular * self._random("network", network_key(candidate, form)).normal()))
        return total

    def latency_ms(self, job: MeasureJob) -> float:
        """What a job takes on a cold and calm board, milliseconds.

        Raises:
            RecordError: a description that fits no layer and no network.
            google.protobuf.message.DecodeError: neither a description nor an ONNX model.
        """
        if job.kind == "overhead":
            return _OVERHEAD_MS + self._fixed(job.key)
        if not job.model.startswith(_DESCRIBED):
            onnx.load_model_from_string(job.model)
            return _OVERHEAD_MS + (job.macs + 1000) / _MACS_PER_MS[job.precision]
        where = f"description of {job.key}"
        told = parse_json(job.model.decode(errors="replace"), where)
        if set(told) == {"row"}:
            return self.row_ms(layer_of_key(told["row"]))
        described = from_plain(_Described, told, where)
        return self.true_ms(described.candidate, described.form)

    def _fixed(self, key: str) -> float:
        if key in (OVERHEAD_KEY, GATE_KEY, REFERENCE_KEY):
            return {OVERHEAD_KEY: 0.0, GATE_KEY: _GATE_MS, REFERENCE_KEY: _REFERENCE_MS}[key]
        streamed = {streaming_key(mb, cached=False): mb for mb in STREAMING_MB}
        return _STREAMING_MS + (self._streaming(streamed[key]) if key in streamed else 0.0)

    def _streaming(self, megabytes: float) -> float:
        return self.effects.streaming_ms * max(0.0, megabytes - self.effects.cache_mb)

    def _work(self, layer: LayerSpec) -> float:
        key = layer.key
        if key not in self._work_ms:
            rng = np.random.default_rng(_digest(f"{self._rows_seed}/row/{key}"))
            ms = sum(_KERNEL_MS + c.macs / _BOARD_MACS_PER_MS[_kind(c)][layer.precision] for c in layer.convolutions)
            self._work_ms[key] = ms * float(np.exp(_ROW_SPREAD * rng.normal()))
        return self._work_ms[key]

    def _gain(self, layer: LayerSpec) -> float:
        group = f"{layer.group} {layer.precision}"
        if group not in self._gains:
            self._gains[group] = self.effects.fusion_gain * float(self._random("group", group).uniform(0, 2))
        return self._gains[group]

    def _random(self, what: str, name: str) -> np.random.Generator:
        return np.random.default_rng(_digest(f"{self._seed}/{what}/{name}"))

    def _measurement(self, job: MeasureJob) -> Measurement:
        state = self.state
        self._measured += 1
        try:
            calm_ms = self.latency_ms(job)
        except (DecodeError, RecordError) as e:
            return _result(job, self._measured, error=f"not a model of this board: {e}")
        rng = self._random(job.key, str(self._measured))
        builds = 1 if job.kind == "row" else _BUILDS
        build = np.exp(self.effects.build_std * rng.normal(size=(builds, 1, 1))) if job.kind != "overhead" else 1.0
        run = np.exp(self.effects.noise * rng.normal(size=(builds, *_ROUNDS)))
        samples = calm_ms * state.slowdown * build * run
        sessions = np.quantile(samples, 0.2, axis=2).min(axis=1)
        return _result(
            job,
            self._measured,
            samples.reshape(-1, _ROUNDS[1]).tolist(),
            sessions.tolist(),
            is_calm=not state.is_throttled,
            temperature_c=state.temperature_c,
            clock_mhz=state.clock_mhz,
        )


@dataclass(frozen=True, slots=True)
class _Described:
    candidate: Candidate
    form: NetworkForm


def _kind(c: ConvSpec) -> Literal["depthwise", "dense"]:
    return "depthwise" if c.groups > 1 else "dense"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _in_turn(
    jobs: Sequence[MeasureJob],
    measure: Callable[[MeasureJob], Measurement],
    on_result: OnResult | None,
    progress: OnProgress | None,
) -> list[Measurement]:
    """Results of jobs that are measured one after the other, each reported as `Device.measure` promises."""
    results = []
    for i, job in enumerate(jobs):
        results.append(measure(job))
        if progress is not None:
            progress((i + 1) / len(jobs))
        if on_result is not None:
            on_result(results[-1])
    return results


def _result(
    job: MeasureJob,
    sequence: int,
    rounds_ms: Sequence[Sequence[float]] = (),
    session_ms: Sequence[float] = (),
    *,
    is_calm: bool = True,
    temperature_c: float | None = None,
    clock_mhz: float | None = None,
    error: str | None = None,
) -> Measurement:
    """A simulated result: its latency is that of its sessions, all of its rounds are calm or none is."""
    return Measurement(
        key=job.key,
        kind=job.kind,
        precision=job.precision,
        latency_ms=network_value(session_ms) if session_ms else None,
        rounds_ms=tuple(map(tuple, rounds_ms)),
        accepted=(is_calm,) * len(rounds_ms),
        clock="device_event",
        measured_at="2000-01-01T00:00:00+00:00",
        sequence=sequence,
        temperature_c=temperature_c,
        clock_mhz=clock_mhz,
        error=error,
        session_ms=tuple(session_ms),
    )


def skip(reason: str) -> NoReturn:
    """Skips the calling test; every skip goes through here. `reason` names what is missing."""
    import pytest

    pytest.skip(reason)


def requires_path(path: Path, what: str) -> Path:
    """`path` where it exists; otherwise the calling test is skipped."""
    if not path.exists():
        skip(f"{what} is not there: {path}")
    return path


def requires_program(name: str, what: str) -> str:
    """Path of a program; otherwise the calling test is skipped."""
    found = shutil.which(name)
    if found is None:
        skip(f"{what} needs the program {name}, which is not on PATH")
    return found


def requires_package(name: str, what: str) -> None:
    """Skips the calling test where an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        skip(f"{what} needs the package {name}, which is not installed")


def requires_gpu(what: str) -> torch.device:
    """The first GPU that torch sees; otherwise the calling test is skipped."""
    import torch

    if not torch.cuda.is_available():
        skip(f"{what} needs a GPU that torch sees")
    return torch.device("cuda")


def requires_postgresql() -> Path:
    """Folder of PostgreSQL's server programs; otherwise the calling test is skipped."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    usable = [folder for folder in found if (folder / "initdb").exists() and (folder / "pg_ctl").exists()]
    debian = Path("/usr/lib/postgresql/VERSION/bin")
    return requires_path(usable[-1] if usable else debian, "PostgreSQL (Debian: apt-get install postgresql)")


class PostgresServer:
    """A PostgreSQL server on loopback with data, port and password of its own; a context manager.

    PostgreSQL refuses to run as root: there its own user runs it, who is there where Debian's package is.

    Args:
        programs: from `requires_postgresql`.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self.password = secrets.token_urlsafe(12)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="nas-postgresql-"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)

    @property
    def url(self) -> str:
        """Address with the password."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def plain_url(self) -> str:
        """Address without: for those who have it in PGPASSWORD."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> PostgresServer:
        secret = self._folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        options = ["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._call("initdb", f"--pgdata={self._data}", f"--pwfile={secret}", *options)
        secret.unlink()
        try:
            self.start()
        except BaseException:  # a signal perhaps, while it was about to run
            with contextlib.suppress(DeviceError):
                self.stop()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Starts it, again with what it held."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder}"
        self._call("pg_ctl", "start", "-w", "-s", "-D", str(self._data), "-l", f"{self._folder}/log", "-o", options)

    def stop(self) -> None:
        """Ends it at once, as a crash would: connections break, and it recovers from its log at the next start."""
        self._call("pg_ctl", "stop", "-w", "-s", "-m", "immediate", "-D", str(self._data))

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _call(self, program: str, *arguments: str) -> None:
        said = self._folder / "programs.log"
        with said.open("ab") as out:  # not a pipe: the server would keep it open
            done = subprocess.run(
                [str(self._programs / program), *arguments],
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                check=False,
            )
        if done.returncode:
            raise DeviceError(f"{program} ended with {done.returncode}: {said.read_text()[-2000:]}")


def requires_openssh() -> Path:
    """Path of the OpenSSH server; otherwise the calling test is skipped. It needs the client programs too."""
    for name in ("ssh", "ssh-keygen"):
        requires_program(name, "a board behind SSH")
    on_path = shutil.which("sshd")
    return requires_path(
        Path(on_path or "/usr/sbin/sshd"), "the OpenSSH server (Debian: apt-get install openssh-server)"
    )


class SshServer:
    """An OpenSSH server on loopback with host key, user's key, port and home of its own; a context manager.

    Where the tests run as root the login is another user, made for this server and removed with it, as long as there is
    an interpreter with ONNX Runtime that this one may run; otherwise it is the user that runs the tests. `python` is
    that interpreter, `config` an ssh configuration in which the server is called `board`, and whose known
    hosts are those of a file in `folder`.

    Args:
        program: from `requires_openssh`.
    """

    def __init__(self, program: Path) -> None:
        self._program = program
        self.folder = Path(tempfile.mkdtemp(prefix="nas-sshd-"))
        self.folder.chmod(0o755)  # the other user has to come to its home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.user, self.is_other_user = getpass.getuser(), False
        self.python = self.folder / "python"
        self.home = self.folder / "home"
        self.config = self.folder / "config"
        self.known_hosts = self.folder / "known_hosts"
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def cache(self) -> Path:
        """What an agent keeps on this board."""
        return self.home / ".cache" / "nas-board"

    def __enter__(self) -> SshServer:
        self.home.mkdir()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where the server locks its unprivileged part in
            self._be_another_user()
        if not self.is_other_user:
            self._write_python(sys.executable)
        self.new_host_key()
        self._call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "user_key"))
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        (self.folder / "authorized_keys").chmod(0o644)
        (self.folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nAllowUsers {self.user}\nStrictModes no\nUsePAM no\n"
            "AuthenticationMethods publickey\nPasswordAuthentication no\nPrintMotd no\nLogLevel VERBOSE\n"
            f"MaxStartups 100\nSetEnv HOME={self.home}\n"
        )
        self.write_config()
        self.trust()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.is_other_user:
            for pid in self._processes_of_user():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["userdel", self.user], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _be_another_user(self) -> None:
        found = [sys.executable, *(p for p in (shutil.which("python3", path=os.defpath),) if p is not None)]
        for interpreter in found:  # the one of the tests may lie in a home that nobody else may enter
            self._write_python(interpreter)
            check = f"import sys, numpy, onnxruntime; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
            done = subprocess.run(
                [str(self.python), "-c", check],
                user="nobody",
                extra_groups=[],
                cwd="/",
                capture_output=True,
                check=False,
            )
            if done.returncode == 0:
                break
        else:
            return
        self.user, self.is_other_user = f"nas-board-{secrets.token_hex(4)}", True
        add = ["useradd", "--system", "--no-create-home", "--home-dir", str(self.home), "--shell", "/bin/sh"]
        self._call(*add, "--password", "*", self.user)  # `!`, the default, would be a locked account
        shutil.chown(self.home, self.user)

    def _write_python(self, interpreter: str) -> None:
        """An interpreter that finds this program's numpy and ONNX Runtime."""
        packages = Path(np.__file__).parents[1]
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {interpreter} "$@"\n')
        self.python.chmod(0o755)

    def new_host_key(self) -> None:
        """Another host key from the next `start` on, as of a board that was set up anew."""
        for name in ("host_key", "host_key.pub"):
            (self.folder / name).unlink(missing_ok=True)
        self._call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))

    def trust(self) -> None:
        """Makes the host key a known one."""
        key = (self.folder / "host_key.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {' '.join(key)}\n")

    def write_config(self, *, user: str = "", key: str = "user_key") -> None:
        """The client's configuration."""
        self.config.write_text(
            f"Host board other-board\n  HostName 127.0.0.1\n  Port {self.port}\n  User {user or self.user}\n"
            f"  IdentityFile {self.folder}/{key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n"
        )

    def device_name(self, options: str = "", *, host: str = "board", python: Path | str = "") -> str:
        """The name under which a device on this board is opened."""
        return f"ssh:{host}?python={python or self.python}&config={self.config}{options}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        log = (self.folder / "log").open("ab")
        argv = [str(self._program), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with log:
            self._server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._server.poll() is not None:
                break
            time.sleep(0.05)
        raise DeviceError(f"sshd did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Ends it with all of its connections, as a power cut would."""
        if self._server is not None:
            self.cut()
            self._server.kill()
            self._server.wait()
            self.cut()
            self._server = None

    def cut(self) -> int:
        """Ends the server's side of all connections at once.

        Returns:
            How many processes that were.
        """
        if self._server is None:
            return 0
        children = [pid for pid in _descendants(self._server.pid) if _name_of(pid).startswith("sshd")]
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(children)

    def agents(self) -> list[str]:
        """Command lines of the agents and workers that run from this board's folder now."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if f"{self.cache}/agent-" in command:
                    found.append(command)
        return found

    def _processes_of_user(self) -> list[int]:
        found = []
        uid = pwd.getpwnam(self.user).pw_uid
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if path.stat().st_uid == uid:
                    found.append(int(path.name))
        return found

    def _call(self, *argv: str) -> None:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DeviceError(f"{argv[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def _descendants(pid: int) -> list[int]:
    """Processes below one, from /proc."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    for child, parent in parents.items():
        above = parent
        while above in parents and above != pid:
            above = parents[above]
        if above == pid or parent == pid:
            found.append(child)
    return found


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def mean_model(batch: int | None = 1, size: int = 8, factor: float = 2.0) -> bytes:
    """A tiny ONNX model: output `y` [B, 3] is factor times the mean of each channel of `x` [B, 3, size, size]."""
    rows = "N" if batch is None else batch
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat", axis=1),
        helper.make_node("Mul", ["flat", "factor"], ["y"], name="scale"),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])],
        [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    data: bytes = model.SerializeToString()
    return data


def exits_chain(size: int = 8) -> tuple[bytes, bytes]:
    """A tiny chain: the first model is as sure as the image is bright (mean of the pixels / 255), the second the head.

    Logits [1, 3] are the means of the channels, of the head with another sign; the feature map is the image.
    """
    shape = [1, 3, size, size]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])
    means = [
        helper.make_node("GlobalAveragePool", ["x"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat", axis=1),
    ]
    first = helper.make_graph(
        [
            *means,
            helper.make_node("Identity", ["flat"], ["logits"], name="logits"),
            helper.make_node("ReduceMean", ["flat"], ["mean"], name="mean", axes=[1], keepdims=0),
            helper.make_node("Div", ["mean", "white"], ["confidence"], name="confidence"),
            helper.make_node("Relu", ["x"], ["features"], name="features"),
        ],
        "first",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            logits,
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, shape),
        ],
        [numpy_helper.from_array(np.array(255.0, np.float32), "white")],
    )
    head = helper.make_graph(
        [*means, helper.make_node("Neg", ["flat"], ["logits"], name="logits")],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [logits],
    )
    opset = [helper.make_opsetid("", OPSET)]
    data: list[bytes] = [
        helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION).SerializeToString()
        for graph in (first, head)
    ]
    return data[0], data[1]


def _network_job(key: str, model: bytes) -> MeasureJob:
    return MeasureJob(key, "network", "fp32", model, 1000)


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def profile_names_a_folder_and_its_precisions(device: Device) -> None:
    """The profile can name a table's folder, and is the same when asked again."""
    profile = device.profile
    _expect(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", profile.name) is not None, f"name {profile.name!r}")
    _expect(len(profile.precisions) > 0, "no precision")
    _expect(profile.threads >= 1, "no thread")
    _expect(profile.fingerprint == device.profile.fingerprint, "the fingerprint changes from one call to the next")


def every_job_gives_one_measurement_in_order(device: Device) -> None:
    """Results come in the order of the jobs, each reported once, with samples that contain the value."""
    jobs = [_network_job("a", mean_model()), overhead_job(), _network_job("b", mean_model(size=16))]
    told: list[Measurement] = []
    shares: list[float] = []
    results = device.measure(jobs, told.append, shares.append)
    _expect([m.key for m in results] == [j.key for j in jobs], "keys are not those of the jobs, in order")
    _expect([m.kind for m in results] == [j.kind for j in jobs], "kinds are not those of the jobs")
    _expect(sorted(m.key for m in told) == sorted(j.key for j in jobs), "not every result was reported once")
    _expect(all(m in results for m in told), "reported results differ from returned ones")
    _expect(shares == sorted(shares) and abs(shares[-1] - 1) < 1e-9, f"progress does not rise to 1: {shares[-3:]}")
    for m in results:
        _expect(m.latency_ms is not None and m.latency_ms > 0, f"{m.key}: {m.error}")
        samples = [s for r in m.rounds_ms for s in r]
        _expect(bool(samples), f"{m.key}: no samples were kept")
        _expect(min(samples) <= (m.latency_ms or 0) <= max(samples), f"{m.key}: value outside its samples")
        _expect(len(m.accepted) == len(m.rounds_ms), f"{m.key}: flags of rounds")


def no_jobs_give_no_measurements(device: Device) -> None:
    """An empty list is no error."""
    _expect(device.measure([]) == [], "something was measured")


def a_broken_model_is_a_result_with_a_reason(device: Device) -> None:
    """A model that cannot be read fails alone; the others are measured."""
    good, bad = device.measure([_network_job("good", mean_model()), _network_job("bad", b"\x00not onnx")])
    _expect(good.error is None and good.latency_ms is not None, f"the good one failed: {good.error}")
    _expect(bad.latency_ms is None and bool(bad.error), "the broken one has a latency")
    _expect("\n" not in (bad.error or ""), "the reason is more than one line")


def work_takes_longer_than_none(device: Device) -> None:
    """The reference network takes longer than the empty graph."""
    empty, reference = device.measure([overhead_job(), reference_job()])
    _expect((reference.latency_ms or 0) > (empty.latency_ms or 0) > 0, "the empty graph is not the faster one")


def run_gives_one_row_per_image(device: Device) -> None:
    """Static and dynamic batches give the same rows, whatever the number of images."""
    images = np.random.default_rng(0).uniform(0, 255, (5, 3, 8, 8)).astype(np.float32)
    expected = 2 * images.mean((2, 3))
    for batch in (1, 2, None):
        outputs = device.run(mean_model(batch), images)
        _expect(len(outputs) == 1 and outputs[0].shape == (5, 3), f"batch {batch}: shape {outputs[0].shape}")
        _expect(bool(np.allclose(outputs[0], expected, rtol=1e-5)), f"batch {batch}: other values")


def run_refuses_what_it_cannot_run(device: Device) -> None:
    """A broken model or images of another size are a DeviceError with the runtime's reason."""
    images = np.zeros((1, 3, 8, 8), np.float32)
    for model, given in ((b"\x00not onnx", images), (mean_model(), np.zeros((1, 3, 9, 9), np.float32))):
        try:
            device.run(model, given)
        except DeviceError as e:
            _expect(len(str(e)) > 20, f"no reason: {e}")
        else:
            raise AssertionError("nothing was refused")


def a_stream_gives_each_image_a_time_and_the_exit_it_took(device: Device) -> None:
    """Where the device times streams: whole pixels or not, an image leaves where its own confidence says."""
    if not callable(getattr(device, "stream_times", None)):
        return
    timer: StreamTimer = device  # type: ignore[assignment]
    images = np.random.default_rng(0).integers(0, 200, (21, 3, 8, 8)).astype(np.float32)
    images[::3] = 250.0
    expected = [0 if n % 3 == 0 else 1 for n in range(len(images))]
    given = images.copy()
    if timer.no_stream:
        _refuses_stream(timer, StreamJob("stream", exits_chain(), (0.9,), images), timer.no_stream)
        return
    for pixels in (images, images + np.float32(0.25)):
        shares: list[float] = []
        times = timer.stream_times(StreamJob("stream", exits_chain(), (0.9,), pixels), shares.append)
        _expect(list(times.exits) == expected, f"exits {times.exits}")
        _expect(len(times.latency_ms) == len(times.typical_ms) == len(images), "not one time per image")
        _expect(min(times.latency_ms) > 0 and min(times.typical_ms) > 0, "an image took no time")
        _expect(shares == sorted(shares) and abs(shares[-1] - 1) < 1e-9, f"progress does not rise to 1: {shares[-3:]}")
    _expect(bool(np.array_equal(images, given)), "it wrote into the images")
    alone = timer.stream_times(StreamJob("stream", (exits_chain()[1],), (), images))
    _expect(set(alone.exits) == {0}, f"a model alone has one exit, got {alone.exits}")
    _refuses_stream(timer, StreamJob("broken", (b"\x00not onnx",), (), images), "")


def _refuses_stream(timer: StreamTimer, job: StreamJob, reason: str) -> None:
    try:
        timer.stream_times(job)
    except DeviceError as e:
        _expect(f"{job.key}: the stream cannot be timed: {reason}" in str(e), f"no reason: {e}")
    else:
        raise AssertionError(f"{job.key}: it was timed")


def calm_counts_its_checks(device: Device) -> None:
    """A calm report has as many checks as were asked for, and times that fit together."""
    report = device.calm(4)
    _expect(report.checks == 4 and 0 <= report.rejected <= 4, f"{report}")
    _expect(0 < report.best_ms <= report.median_ms <= report.worst_ms, f"{report}")
    _expect(0 <= report.rejected_share <= 1 and 0 < report.cpu_share <= 1, f"{report}")


# Every implementation of Device runs all of these: parametrise a test with them.
DEVICE_CONTRACT: tuple[Callable[[Device], None], ...] = (
    profile_names_a_folder_and_its_precisions,
    every_job_gives_one_measurement_in_order,
    no_jobs_give_no_measurements,
    a_broken_model_is_a_result_with_a_reason,
    work_takes_longer_than_none,
    run_gives_one_row_per_image,
    run_refuses_what_it_cannot_run,
    a_stream_gives_each_image_a_time_and_the_exit_it_took,
    calm_counts_its_checks,
)
