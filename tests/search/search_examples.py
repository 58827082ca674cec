"""Tiny real objects that the tests of the search share: a space of 16 px, an experiment of seconds, a zygote."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nas.core.errors import InterruptedRunError, NasError, StorageError
from nas.core.records import DeviceProfile
from nas.devices.base import Device
from nas.latency.table import LatencyTable
from nas.recipe.context import open_context
from nas.recipe.pool import J, JobFailure, JobResult, R, WorkerPool
from nas.recipe.supernet import train_supernet
from nas.search.experiment import load_experiment
from nas.search.folder import RunFolder
from nas.search.predictor import Predictor
from nas.search.prepare import Inputs, load_inputs, prepare_training, scoring_plan
from nas.search.progress import StopFlag, StoppableReporter
from nas.search.rounds import SearchParts
from nas.space.space import SearchSpace
from nas.testing import SimulatedDevice

SPACE = """
name: mini-16
source: made for tests
resolution: 16
stem: {channels: 4, activation: relu}
stages:
  - {name: a, width: [4, 8], depth: 1, stride: 1, kernel_size: [3, 5], expansion: [1, 2], activation: relu}
  - name: b
    width: [8, 12]
    depth: [1, 2]
    stride: 2
    kernel_size: 3
    expansion: [2, 3]
    activation: [relu, hard_swish]
head: {}
exits: {after: [a], max_count: 1, hidden_channels: 4, thresholds: [0.2, 0.5, 0.9]}
precision: {choices: [fp32, int8]}
"""

EXPERIMENT = """
space: mini.yaml
name: mini
budget: {ms: 0.0068}
data: {train_images: 40, val_images: 40, test_images: 30}
teacher: {epochs: 2, widths: [8], blocks: 1, threads: 1, batch_size: 20}
distill: {epochs: 2, variants: 2, batch_size: 20, recalibration_images: 20}
supernet: {steps: 4, batch_size: 10, random_subnets: 1, checkpoint_steps: 1}
standalone: {rungs: [1, 2]}
search: {trials: 10, rounds: 2, batch: 3, workers: 2, sampler: tpe, seed: 4}
feedback: {first_networks: 3, networks_per_round: 2}
finish: {students: 3, calibration_images: 16, int8_loss: 0.5, qat_epochs: 1, qat_least_loss: -1, robustness: [1, 5]}
"""


def write_experiment(folder: Path, cache: Path | None = None, tables: Path | None = None) -> Path:
    """Space and experiment file in a folder; results go below it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mini.yaml").write_text(SPACE)
    run = {
        "dir": str(folder / "run"),
        "tables": str(tables or folder / "tables"),
        "cache": str(cache or folder / "cache"),
    }
    (folder / "experiment.yaml").write_text(f"{EXPERIMENT}run: {json.dumps(run)}\n")
    return folder / "experiment.yaml"


def simulated(name: str) -> SimulatedDevice:
    """A further device by its name, `simulated:SEED`; rows differ by a tenth from those of the first one."""
    return SimulatedDevice(int(name.partition(":")[2]), noise=0.1)


class SimulatedTensorRT(SimulatedDevice):
    """A simulated device whose graphs are those of TensorRT 8.5."""

    @property
    def profile(self) -> DeviceProfile:
        own = super().profile
        return replace(own, name=f"{own.name}-trt", runtime="TensorRT", runtime_version="8.5.2")


@dataclass
class Notes:
    """A reporter that remembers; `on_progress` may raise."""

    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    on_progress: Callable[[str], None] = lambda _: None

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:  # noqa: ARG002
        self.stages.append(stage)
        self.on_progress(stage)


class InProcessPool(WorkerPool):
    """Runs jobs one after the other in this process, with the same results as worker processes."""

    def __init__(self) -> None:
        super().__init__(1)

    def feed(
        self,
        function: Callable[[J], R],
        next_job: Callable[[], J | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[J, R]]:
        while (job := next_job()) is not None:
            if should_stop():
                raise InterruptedRunError("stopped")
            try:
                value: R | JobFailure = function(job)
            except (InterruptedRunError, StorageError):
                raise
            except NasError as e:
                value = JobFailure(str(e))
            yield JobResult(job, value)


class Zygote:
    """Client of `search_zygote.py`."""

    def __init__(self) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        script = Path(__file__).with_name("search_zygote.py")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one},
        )
        assert self._answer() == {"ready": True}

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def start(self, log: Path, *arguments: object, what: str = "search") -> Life:
        """A new process that searches, or with `what` "worker" or "cli" one that works for a search, a command line."""
        answer = self._ask({"start": what, "arguments": [str(a) for a in arguments], "log": str(log)})
        return Life(self, answer["pid"], log)

    def run(self, log: Path, *arguments: object) -> Life:
        """A search that has come to its end."""
        life = self.start(log, *arguments)
        assert life.ends_within(150), log.read_text()
        life.wait()
        return life

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@dataclass
class Life:
    """One forked process: leader of a session of its own."""

    zygote: Zygote
    pid: int
    log: Path
    code: int | None = None

    def ends_within(self, seconds: float) -> bool:
        """Waits until it ends, at most so long."""
        handle = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(max(1, int(1000 * seconds))))
        finally:
            os.close(handle)

    def says(self, text: str, limit_s: float = 60.0) -> bool:
        """Waits until a text stands in its log."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if self.log.exists() and text in self.log.read_text():
                return True
            time.sleep(0.01)
        return False

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; negative where a signal ended it."""
        self.code = int(self.zygote._ask({"wait": self.pid})["code"])
        return self.code

    def orphans(self, limit_s: float = 5.0) -> list[int]:
        """Processes of its session that are left when it is gone, after a moment's grace."""
        end = time.monotonic() + limit_s
        while (left := _session(self.pid)) and time.monotonic() < end:
            time.sleep(0.01)
        return left


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if fields[3] == str(leader) and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


@dataclass(frozen=True)
class Prepared:
    """What is made once: inputs, teacher's answers, table with all rows, trained supernet."""

    inputs: Inputs
    context: str
    tables: Path
    supernet: Path

    def parts(self, folder: Path, reporter: Notes | None = None, **settings: Any) -> SearchParts:
        """Parts of a search in a new run folder, with a copy of the table; scores are computed in this process.

        Args:
            folder: for run folder and table.
            reporter: told everything.
            settings: keys of `search`, `feedback` and `budget` by name, and `device`.
        """
        e = self.inputs.experiment
        device = settings.pop("device", self.inputs.device)
        search, feedback, budget = (
            replace(part, **{k: settings.pop(k) for k in list(settings) if hasattr(part, k)})
            for part in (e.search, e.feedback, e.budget)
        )
        assert not settings, f"unknown settings {settings}"
        inputs = replace(self.inputs, experiment=replace(e, search=search, feedback=feedback, budget=budget))
        run = RunFolder(folder / "run")
        (folder / "run").mkdir(parents=True, exist_ok=True)
        if not (folder / "tables").exists():
            shutil.copytree(self.tables, folder / "tables")
        stop = StopFlag()
        told = StoppableReporter(reporter or Notes(), stop)
        predictor = Predictor(self.inputs.space, open_folder(folder / "tables", device), device, told)
        predictor.prepare()
        plan = replace(scoring_plan(inputs, run, self.context), supernet=str(self.supernet))
        return SearchParts(
            run,
            self.inputs.space,
            predictor,
            plan,
            InProcessPool(),
            self.inputs.dataset.val.labels,
            budget,
            search,
            feedback,
            told,
            stop,
        )


def open_folder(tables: Path, device: Device) -> LatencyTable:
    """The table of a device."""
    return LatencyTable.open(tables / device.profile.name, device.profile)


def filled_tables(folder: Path, space: SearchSpace, device: Device) -> Path:
    """The folder, with the table of a device in which every row of the space is measured."""
    Predictor(space, open_folder(folder, device), device, Notes()).prepare()
    return folder


def prepare(folder: Path) -> Prepared:
    """Makes what is made once, in a folder."""
    inputs = load_inputs(load_experiment(write_experiment(folder)), Notes(), SimulatedDevice())
    e = inputs.experiment
    run = RunFolder(folder / "run")
    (folder / "run").mkdir()
    _, _, context = prepare_training(inputs, run, Notes())
    Predictor(inputs.space, open_folder(folder / "tables", inputs.device), inputs.device, Notes()).prepare()
    targets = {side: open_context(context, side).targets for side in inputs.space.resolution}
    train_supernet(inputs.space, targets, e.distill, e.supernet, folder / "supernet")
    return Prepared(inputs, context, folder / "tables", folder / "supernet")
