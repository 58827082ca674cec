"""One search on many workers that are killed at random: what is lost, what comes twice, what the front is worth.

    python -m benchmarks.workers [--trials 300] [--workers 8] [--seeds 1] [--kills 40] [--json]

A real PostgreSQL (Debian's package) on loopback, the real rounds, queue and workers, one process per worker. Only two
things are made up: the device (simulated), and the score of a candidate, which is computed from it in about 0.2 s
instead of being trained. Workers that hold a job are killed by SIGKILL and replaced; the database is stopped as by a
crash once, in the middle, for three seconds. The same search with one worker and no accident is what it is compared
with: its sampler sees the same scores in the same order, so the candidates should be the same, and the front with them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState

from benchmarks.common import parser, report, spread
from nas.core.jsonio import content_hash, write_bytes, write_record, write_text
from nas.core.walk import total_macs
from nas.latency.table import LatencyTable
from nas.recipe.context import TARGET_FILES, ContextFile, ResolutionFiles
from nas.recipe.pool import JobPool, JobResult
from nas.recipe.records import ScoredStudent, write_scored
from nas.recipe.score import ScoreJob, student_folder
from nas.recipe.supernet import RECORD_FILE, WEIGHTS_FILE
from nas.search.experiment import SPACES
from nas.search.folder import RunFolder, open_run
from nas.search.predictor import Predictor
from nas.search.progress import StopFlag, StoppableReporter, interrupted_by_signals, stop_on_signals
from nas.search.rounds import SearchParts, run_rounds
from nas.search.scoring import ScoringPlan
from nas.search.select import hypervolume
from nas.search.settings import BudgetSettings, FeedbackSettings, SearchSettings
from nas.search.shared_storage import Patience, connect
from nas.search.shared_study import JobQueue, SharedPool, SharedSettings, SharedStudy, labels, shared_study
from nas.search.worker import WorkerSettings, run_worker
from nas.space.space import SearchSpace, load_space
from nas.testing import PostgresServer, SimulatedDevice, requires_postgresql
from nas.train.settings import DistillSettings

CLASSES = 10
IMAGES = 64
SCORE_S = 0.2
LEASE_S = 6.0
OUTAGE_S = 3.0
BATCH = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search came to, counted in its run folder and in the database.

    `lost`: planned trials without a record. `recorded_twice`: trial numbers with two records. `scored_twice`: jobs with
    two results. `retried`: jobs that were queued anew. `silent`: workers that were taken for dead.
    `killed`: workers in the middle of a job.
    """

    trials: int
    lost: int
    recorded_twice: int
    scored_twice: int
    retried: int
    silent: int
    killed: int
    restarts: int
    wall_s: float
    volume: float
    candidates: tuple[str, ...]


class Quiet:
    """Passes on warnings only."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """A line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Nothing."""


class MadeUpScores:
    """A pool that scores a candidate from its content alone, in `SCORE_S`; no training."""

    def map(
        self,
        function: Callable[[Any], Any],  # noqa: ARG002 - the interface of the pool
        jobs: Sequence[Any],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[Any, Any]]:
        """The score of each job."""
        for job in jobs:
            end = time.monotonic() + SCORE_S
            while time.monotonic() < end:
                should_stop()
                time.sleep(SCORE_S / 5)
            yield JobResult(job, made_up(job))


def made_up(job: ScoreJob) -> ScoredStudent:
    """Accuracy grows with the multiply-adds, plus noise that follows from the candidate."""
    labels = validation_labels()
    exits = len(job.candidate.exits) + 1
    rng = np.random.default_rng(int(content_hash(job.candidate), 16))
    logits = rng.normal(size=(exits, IMAGES, CLASSES)).astype(np.float32)
    logits[:, np.arange(IMAGES), labels] += total_macs(job.candidate) / 4e5
    folder = student_folder(job.students, job.candidate.arch_id)
    return write_scored(
        folder, job.candidate, epochs=job.epochs, cost_s=0.0, logits=logits, labels=labels, name=job.name
    )


def validation_labels() -> np.ndarray:
    """Labels of the made-up validation split."""
    return np.random.default_rng(1).integers(0, CLASSES, IMAGES)


def work(run: str, url: str, cache: Path) -> None:
    """A worker process, until the run is finished."""
    stop = StopFlag()
    with stop_on_signals(stop, Quiet()):
        run_worker(WorkerSettings(run, url, cache), Quiet(), stop, MadeUpScores())


class Crew:
    """Worker processes that can be killed and replaced.

    They are forked from a process that has imported everything: else most would be killed while they import.

    Args:
        count: of workers at any time.
        run, url, cache: of `work`.
        seed: of who is killed.
    """

    def __init__(self, count: int, run: str, url: str, cache: Path, seed: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.workers"])
        self._arguments = (run, url, cache)
        self._random = random.Random(seed)
        self._processes = [self._start() for _ in range(count)]
        self.killed = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            process.join(20 if error is None else 0)  # they see that the run is finished
            process.kill()
            process.join()
            process.close()

    def _start(self) -> ForkServerProcess:
        process = self._context.Process(target=work, args=self._arguments)
        process.start()
        return process

    def kill_one(self, busy: Callable[[], set[int]]) -> bool:
        """Kills a worker in the middle of a job and starts another; False where none was in one.

        Args:
            busy: gives the process numbers of workers that hold a job now.
        """
        held = busy()
        working = [i for i, process in enumerate(self._processes) if process.pid in held]
        if not working:
            return False
        i = self._random.choice(working)
        pid = self._processes[i].pid or 0
        os.kill(pid, signal.SIGSTOP)  # it cannot end the job while this is looked up
        if pid not in busy():
            os.kill(pid, signal.SIGCONT)
            return False
        self._processes[i].kill()
        self._processes[i].join()
        self._processes[i].close()
        self.killed += 1
        self._processes[i] = self._start()
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What the searches of one seed share: space, table, budget."""

    space: SearchSpace
    predictor: Predictor
    budget_ms: float


def setting(home: Path, seed: int) -> Setting:
    """The 32 px space on a simulated device."""
    space = load_space(SPACES / "tiny-32.yaml", CLASSES)
    device = SimulatedDevice(seed)
    predictor = Predictor(space, LatencyTable.open(home / "table", device.profile), device, Quiet())
    predictor.prepare()
    return Setting(space, predictor, 0.6 * float(predictor.worst([space.largest()])[0][0]))


def prove(
    server: PostgresServer,
    home: Path,
    of: Setting,
    *,
    trials: int,
    workers: int,
    kills: int = 0,
    restarts: int = 0,
    seed: int = 0,
) -> Outcome:
    """One search.

    Args:
        server: running.
        home: folder for everything; its name names the run.
        of: space and budget.
        trials: to be scored.
        workers: processes.
        kills: of workers, spread over the trials.
        restarts: of the database, spread over the trials.
        seed: of the search and of the kills.
    """
    run = home / f"proof-{home.name}-{workers}"
    stop = StopFlag()
    reporter = StoppableReporter(Quiet(), stop)
    settings = SharedSettings(server.url, lease_s=LEASE_S)
    restarted = 0
    starts: list[threading.Timer] = []
    with (
        open_run(run, {"benchmark": "1"}, "name: benchmark\n") as folder,
        Crew(workers, run.name, server.url, home / "cache", seed) as crew,
        shared_study(settings, run, (), {}, Quiet(), lambda: False) as study,
    ):
        started = time.monotonic()
        pool = SharedPool(study, labels(of.space, lambda c: (of.predictor.estimate(c).worst_ms,)), Quiet())
        stops, deaths = spread_over(trials, restarts), spread_over(trials, kills)
        results = 0

        over = threading.Event()

        def kill_some() -> None:
            with closing(connect(server.url)) as connection:
                queue = JobQueue(connection, run.name, Patience(connection, Quiet()))

                def busy() -> set[int]:
                    running = [job for job in queue.jobs() if job.state == TrialState.RUNNING]
                    return {int(job.worker.rpartition("-")[2]) for job in running if job.worker}

                for due in sorted(deaths):
                    while not over.wait(0.02) and (results < due or not crew.kill_one(busy)):
                        pass

        def on_result() -> None:
            nonlocal restarted, results
            results += 1
            if results in stops:
                server.stop()
                starts.append(threading.Timer(OUTAGE_S, server.start))
                starts[-1].start()
                restarted += 1

        killer = threading.Thread(target=kill_some)
        killer.start()
        try:
            rounds(of, folder, Noticing(pool, on_result), reporter, stop, trials, seed)
        finally:
            over.set()
            for timer in starts:  # whoever ends the server finds it running
                timer.join()
            killer.join()
        wall_s = time.monotonic() - started
        return counted(study, folder, of, trials, crew, restarted, wall_s)


def spread_over(trials: int, count: int) -> set[int]:
    """`count` numbers of results, evenly."""
    return {round(trials * (i + 1) / (count + 1)) for i in range(count)}


class Noticing:
    """A pool that calls back after every result.

    Args:
        pool: does the work.
        on_result: called.
    """

    def __init__(self, pool: JobPool, on_result: Callable[[], None]) -> None:
        self._pool, self._on_result = pool, on_result

    def map(
        self, function: Callable[[Any], Any], jobs: Sequence[Any], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[JobResult[Any, Any]]:
        """The results of the pool."""
        yield from self._noticed(self._pool.map(function, jobs, should_stop))

    def feed(
        self,
        function: Callable[[Any], Any],
        next_job: Callable[[], Any],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[JobResult[Any, Any]]:
        """The same for jobs that are asked for while others run."""
        yield from self._noticed(self._pool.feed(function, next_job, should_stop))

    def _noticed(self, results: Iterator[JobResult[Any, Any]]) -> Iterator[JobResult[Any, Any]]:
        for result in results:
            yield result
            self._on_result()


def rounds(
    of: Setting,
    folder: RunFolder,
    pool: JobPool,
    reporter: StoppableReporter,
    stop: StopFlag,
    trials: int,
    seed: int,
) -> None:
    """The search's own rounds on the made-up scores."""
    home = folder.path
    plan = ScoringPlan(
        "supernet",
        str(placeholder_context(home / "context")),
        str(home / "students"),
        str(placeholder_supernet(home / "supernet")),
        str(home / "stop"),
        DistillSettings(),
        (0,),
        0.5,
        seed,
        256,
    )
    parts = SearchParts(
        folder,
        of.space,
        of.predictor,
        plan,
        pool,
        validation_labels(),
        BudgetSettings(ms=of.budget_ms),
        SearchSettings(trials=trials, rounds=2, batch=BATCH, seed=seed),
        FeedbackSettings(first_networks=0, networks_per_round=0),
        reporter,
        stop,
    )
    run_rounds(parts)


def placeholder_context(folder: Path) -> Path:
    """A context whose arrays nobody reads."""
    names = ("val.npy", "test.npy", "sample.npy", "val_labels.npy", "test_labels.npy", *TARGET_FILES)
    for name in names:
        write_bytes(folder / name, name.encode())
    paths = {name: str(folder / name) for name in names}
    files = ResolutionFiles(32, paths["val.npy"], paths["test.npy"], paths["sample.npy"], paths["images.npy"])
    labels = (paths["val_labels.npy"], paths["test_labels.npy"])
    record = ContextFile("made up", ("a", "b"), (0.5,) * 3, (0.5,) * 3, str(folder), *labels, (files,))
    write_record(folder / "context.json", record)
    return folder / "context.json"


def placeholder_supernet(folder: Path) -> Path:
    """Shared weights that nobody reads."""
    for name in (RECORD_FILE, WEIGHTS_FILE):
        write_text(folder / name, "{}")
    return folder


def counted(
    study: SharedStudy, folder: RunFolder, of: Setting, trials: int, crew: Crew, restarts: int, wall_s: float
) -> Outcome:
    """The outcome of a search that is over."""
    records = folder.trials()
    jobs = study.scores.jobs()
    results = Counter(job.key for job in jobs if job.state == TrialState.COMPLETE)
    numbers = Counter(record.number for record in records)
    scores = [record.score for record in records]
    latency_ms = [record.latency_ms for record in records]
    return Outcome(
        trials=len(records),
        lost=trials - len({r.number for r in records if r.state == "complete"}),
        recorded_twice=sum(count > 1 for count in numbers.values()),
        scored_twice=sum(count > 1 for count in results.values()),
        retried=sum("retry_of" in job.trial.user_attrs for job in jobs),
        silent=sum(job.ended == "expired" for job in jobs),
        killed=crew.killed,
        restarts=restarts,
        wall_s=wall_s,
        volume=hypervolume(scores, latency_ms, 1 / CLASSES, of.budget_ms),
        candidates=tuple(record.candidate.id for record in records),
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=300)
    options.add_argument("--workers", type=int, default=8)
    options.add_argument("--seeds", type=int, default=1, help="each with one worker and with many (default 1)")
    options.add_argument("--kills", type=int, default=40, help="workers killed in the middle of a job (default 40)")
    args = options.parse_args()
    rows: list[list[Any]] = []
    pairs: list[tuple[Outcome, Outcome]] = []
    with (
        interrupted_by_signals(),  # else SIGTERM would leave the server behind
        PostgresServer(requires_postgresql()) as server,
        tempfile.TemporaryDirectory() as scratch,
    ):
        for seed in range(args.seeds):
            home = Path(scratch) / str(seed)
            of = setting(home, seed)
            many = prove(
                server,
                home,
                of,
                trials=args.trials,
                workers=args.workers,
                kills=args.kills,
                restarts=1,
                seed=seed,
            )
            one = prove(server, home, of, trials=args.trials, workers=1, seed=seed)
            pairs.append((many, one))
            for workers, o in ((args.workers, many), (1, one)):
                counts = [
                    o.trials,
                    o.killed,
                    o.restarts,
                    o.lost,
                    o.recorded_twice,
                    o.scored_twice,
                    o.retried,
                ]
                rows.append([seed, workers, *counts, o.volume, o.wall_s])
    same = sum(many.candidates == one.candidates for many, one in pairs)
    report(
        f"{args.trials} trials with {args.workers} workers that are killed, and with one that is not; the same "
        f"candidates in {same} of {len(pairs)} searches",
        (
            "seed",
            "workers",
            "trials",
            "kills",
            "restarts",
            "lost",
            "recorded twice",
            "scored twice",
            "queued anew",
            "hypervolume",
            "wall s",
        ),
        rows,
        {
            "rows": rows,
            "same_candidates": same,
            "volume_many": spread([many.volume for many, _ in pairs]),
            "volume_one": spread([one.volume for _, one in pairs]),
        },
        args.json,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
