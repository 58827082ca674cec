"""Milliseconds per trial that the search itself costs: proposing, estimating, recording, re-estimating, the study.

    python -m benchmarks.search_overhead [--trials 1000] [--samplers greybox nsga2] [--json]

The real rounds run on the 32 px space with a simulated device and with answers that are there at once (64 images), so
that neither training nor measuring is counted. Goal: under 50 ms a trial at 1,000 trials.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Silent, parser, report
from nas.core.walk import total_macs
from nas.latency.table import LatencyTable
from nas.recipe.pool import JobResult, WorkerPool
from nas.recipe.records import ScoredStudent, write_scored
from nas.recipe.score import ScoreJob, student_folder
from nas.search.choice import choose_sampler
from nas.search.experiment import SPACES
from nas.search.folder import open_run
from nas.search.predictor import Predictor
from nas.search.progress import StopFlag, StoppableReporter
from nas.search.rounds import SearchParts, run_rounds, write_study
from nas.search.scoring import ScoringPlan
from nas.search.settings import BudgetSettings, FeedbackSettings, SearchSettings
from nas.space.space import load_space
from nas.testing import SimulatedDevice
from nas.train.settings import DistillSettings

CLASSES = 10
IMAGES = 64
NAMES = ["greybox", "tpe", "nsga2", "random"]


class _Answers(WorkerPool):
    """Gives every job a score at once: accuracy grows with the multiply-adds, plus noise."""

    def __init__(self, labels: np.ndarray) -> None:
        super().__init__(1)
        self._labels = labels
        self._rng = np.random.default_rng(0)
        self.seconds = 0.0

    def feed(
        self,
        function: Callable[[Any], Any],  # noqa: ARG002 - the interface of the pool
        next_job: Callable[[], Any],
        should_stop: Callable[[], bool] = lambda: False,  # noqa: ARG002
    ) -> Iterator[JobResult[Any, Any]]:
        while (job := next_job()) is not None:
            started = time.perf_counter()
            result = JobResult(job, self._scored(job))
            self.seconds += time.perf_counter() - started  # writing the answer is the worker's part
            yield result

    def _scored(self, job: ScoreJob) -> ScoredStudent:
        exits = len(job.candidate.exits) + 1
        logits = self._rng.normal(size=(exits, IMAGES, CLASSES)).astype(np.float32)
        logits[:, np.arange(IMAGES), self._labels] += total_macs(job.candidate) / 4e5
        return write_scored(
            student_folder(job.students, job.candidate.arch_id),
            job.candidate,
            epochs=job.epochs,
            cost_s=0.0,
            logits=logits,
            labels=self._labels,
            name=job.name,
        )


def overhead_ms(sampler: str, trials: int) -> tuple[float, float]:
    """Wall milliseconds per trial of the rounds, and of writing the study afterwards."""
    space = load_space(SPACES / "tiny-32.yaml", CLASSES)
    device = SimulatedDevice(0)
    stop = StopFlag()
    reporter = StoppableReporter(Silent(), stop)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        predictor = Predictor(space, LatencyTable.open(home / "table", device.profile), device, reporter)
        predictor.prepare()
        labels = np.random.default_rng(1).integers(0, CLASSES, IMAGES)
        pool = _Answers(labels)
        plan = ScoringPlan("supernet", "", str(home / "run" / "students"), "", "", DistillSettings(), (0,), 0.5, 0, 256)
        largest = float(predictor.worst([space.largest()])[0][0])
        search = SearchSettings(trials=trials, rounds=4, sampler=sampler)  # type: ignore[arg-type]
        with open_run(home / "run", {"benchmark": "1"}, "name: benchmark\n") as folder:
            parts = SearchParts(
                folder,
                space,
                predictor,
                plan,
                pool,
                labels,
                BudgetSettings(ms=0.8 * largest),
                search,
                FeedbackSettings(first_networks=0, networks_per_round=0),
                reporter,
                stop,
            )
            started = time.perf_counter()
            run_rounds(parts)
            rounds_s = time.perf_counter() - started - pool.seconds
            started = time.perf_counter()
            write_study(parts)
            study_s = time.perf_counter() - started
            count = len(folder.trials())
    return 1000 * rounds_s / count, 1000 * study_s / count


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=1000)
    options.add_argument("--samplers", nargs="+", default=["greybox", "nsga2"], choices=NAMES)
    args = options.parse_args()
    rows = []
    for sampler in args.samplers:
        rounds_ms, study_ms = overhead_ms(sampler, args.trials)
        rows.append([sampler, args.trials, rounds_ms, study_ms, rounds_ms + study_ms])
    chosen, reason = choose_sampler("auto", args.trials, is_latency_known=True)
    report(
        f"overhead per trial; auto takes {chosen} ({reason})",
        ("sampler", "trials", "rounds ms", "study.db ms", "sum ms"),
        rows,
        {"rows": rows, "auto": chosen},
        args.json,
    )


if __name__ == "__main__":
    main()
