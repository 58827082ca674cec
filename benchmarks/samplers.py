"""How many trainings does each sampler need for the same front?

    python -m benchmarks.samplers [--problem plain rugged macro accel ofa] [--seeds 10] [--counts 25 50 100 200 500]
        [--methods NAME ...] [--dear-seeds 3] [--reach 2000] [--data DIR] [--jobs 2] [--results DIR]
        [--plot FILE.svg] [--markdown] [--json]

All samplers get the same number of trainings on a problem whose trainings cost nothing, and are scored by the share of
the best known hypervolume of what they trained, without the noise of the trainings. DIR has the published tables; the
other two problems are simulated. `trainings for our 100` is the first count at which the mean share of a sampler
reaches that of the grey-box sampler at 100 trainings; NSGA-II goes on to `--reach` trainings for it.

A proposal that repeats a network is told what was seen and costs nothing. Samplers named `in budget` tell one over the
budget FAIL and do not train it, those with `pruned` PRUNED; all others of Optuna train it and learn its excess as a
constraint. Syne Tune, where it is installed, knows no constraints: a proposal over the budget is told a bad accuracy
and a bad latency, and costs nothing. LINAS throws such networks away in its inner search.

With `--results` each run is kept in a file of that folder as soon as it ends, and the same command goes on from there.
Runs of our sampler are kept for one version of its source, those of others for one version of their package.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

import nas.search.greybox
import nas.search.greybox_sampler
from benchmarks import linas, syne_tune_search
from benchmarks.chart import Panel, line_chart
from benchmarks.common import parser, report
from benchmarks.problems import KINDS, SIMULATED, Genotypes, Kind, Problem, best_known, load_problem
from nas.search.greybox_sampler import GreyBoxSampler

FloatArray = NDArray[np.float64]

OURS = "grey box"
MAX_ASKS = 50  # without a training; then a sampler counts as stuck, and a random network within the budget is trained
CURVE_POINTS = 60
FIRST_SHOWN = 10  # trainings at which the curves begin
Run = Callable[[Problem, int, int], Genotypes]


@dataclass(frozen=True, slots=True)
class Method:
    """A sampler that takes part.

    Attributes:
        name: in tables.
        run: problem, trainings and seed to the networks that were trained, in their order.
        version: what its runs depend on, beside the problem.
        most: trainings at most.
        is_dear: whether fewer seeds are run, because an ask costs a tenth of a second and more.
        goes_on: whether it goes on until it reaches our 100 trainings.
    """

    name: str
    run: Run
    version: str
    most: int = 2000
    is_dear: bool = False
    goes_on: bool = False

    def trainings(self, kind: Kind, count: int, reach: int) -> int:
        """How many trainings its runs on a problem have."""
        wanted = max(count, reach) if self.goes_on and kind in SIMULATED else count
        return min(wanted, self.most)


def _values(problem: Problem, genotype: Genotypes, rng: np.random.Generator) -> tuple[float, float]:
    return float(problem.train(genotype[None], rng)[0]), float(problem.latency_ms(genotype[None])[0])


def random_in_budget(problem: Problem, count: int, seed: int) -> Genotypes:
    """Distinct random networks that keep the budget, [count, G]; fewer where the problem has not as many."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(1000):
        drawn = problem.sample(rng, 1000)
        found.update(dict.fromkeys(map(tuple, drawn[problem.latency_ms(drawn) <= problem.budget_ms].tolist())))
        if len(found) >= count:
            break
    return np.array(list(found)[:count])


def with_optuna(make: Callable[[Problem, int], optuna.samplers.BaseSampler], over: str) -> Run:
    """A run that asks an Optuna sampler.

    Args:
        make: problem and seed to a new sampler.
        over: what becomes of a proposal over the budget: `train`, `prune` or `fail`.
    """
    return partial(_with_optuna, make, over)


def _with_optuna(
    make: Callable[[Problem, int], optuna.samplers.BaseSampler], over: str, problem: Problem, count: int, seed: int
) -> Genotypes:
    rng = np.random.default_rng([seed, 1])
    space = distributions(problem)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(problem, seed))
    trained: dict[tuple[int, ...], tuple[float, float]] = {}
    spare = iter(random_in_budget(problem, 2 * count, seed + 1000).tolist())
    asks = 0
    while len(trained) < count:
        asks += 1
        if asks > MAX_ASKS:
            study.enqueue_trial(dict(zip(space, next(spare), strict=True)))
        trial = study.ask(space)
        genotype = problem.canonical(np.array([[trial.params[name] for name in space]], np.int64))[0]
        key = tuple(genotype.tolist())
        excess = float(problem.latency_ms(genotype[None])[0]) / problem.budget_ms - 1
        trial.set_constraint("over_budget", excess)
        if excess > 0 and over != "train":
            states = {"prune": optuna.trial.TrialState.PRUNED, "fail": optuna.trial.TrialState.FAIL}
            study.tell(trial, state=states[over])
            continue
        if key not in trained:
            trained[key] = _values(problem, genotype, rng)
            asks = 0
        study.tell(trial, trained[key])
    return np.array(list(trained))


def distributions(problem: Problem) -> dict[str, optuna.distributions.BaseDistribution]:
    """One parameter for each gene: its index, a number where the gene is ordered."""
    return {
        f"g{i:02d}": optuna.distributions.IntDistribution(0, size - 1)
        if ordered
        else optuna.distributions.CategoricalDistribution(tuple(range(size)))
        for i, (size, ordered) in enumerate(zip(problem.cardinalities, problem.ordinal, strict=True))
    }


def grey_box(problem: Problem, seed: int) -> optuna.samplers.BaseSampler:
    """Our sampler; the latency table is exact."""

    def latency(genotypes: Genotypes) -> tuple[FloatArray, FloatArray]:
        ms = problem.latency_ms(genotypes)[:, None]
        return ms, np.zeros_like(ms)

    return GreyBoxSampler(distributions(problem), latency, (problem.budget_ms,), canonical=problem.canonical, seed=seed)


def _random(problem: Problem, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001 - as the others
    return optuna.samplers.RandomSampler(seed=seed)


def _nsga2(problem: Problem, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


def _tpe(problem: Problem, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001
    return optuna.samplers.TPESampler(seed=seed)


def _tpe_multivariate(problem: Problem, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001
    return optuna.samplers.TPESampler(multivariate=True, seed=seed)


def _gp(problem: Problem, seed: int) -> optuna.samplers.BaseSampler:  # noqa: ARG001
    import torch  # 0.4 GB, that the other samplers do not need

    torch.set_num_threads(1)  # its threads wait for one another where each core has a process: six times as slow
    return optuna.samplers.GPSampler(seed=seed)


def _linas(batch: int, problem: Problem, count: int, seed: int) -> Genotypes:
    return linas.search(problem, count, seed, batch, random_in_budget(problem, count + batch, seed))


def methods() -> tuple[Method, ...]:
    """All samplers that can be run here."""
    sources = (nas.search.greybox, nas.search.greybox_sampler)
    own = hashlib.sha256(b"".join(Path(str(s.__file__)).read_bytes() for s in sources)).hexdigest()[:12]
    of_optuna, of_linas = f"optuna {optuna.__version__}", "1"
    found = [
        Method(OURS, with_optuna(grey_box, "train"), own),
        Method("random in budget", random_in_budget, "1"),
        Method("random", with_optuna(_random, "train"), of_optuna),
        Method("NSGA-II", with_optuna(_nsga2, "train"), of_optuna, goes_on=True),
        Method("NSGA-II in budget", with_optuna(_nsga2, "fail"), of_optuna),
        Method("TPE", with_optuna(_tpe, "train"), of_optuna, most=100, is_dear=True),
        Method("TPE multivariate", with_optuna(_tpe_multivariate, "train"), of_optuna, is_dear=True),
        Method("TPE multivariate, pruned", with_optuna(_tpe_multivariate, "prune"), of_optuna, is_dear=True),
        Method("GP", with_optuna(_gp, "train"), of_optuna, most=100, is_dear=True),
        Method("LINAS, batches of 50", partial(_linas, 50), of_linas),
        Method("LINAS, batches of 10", partial(_linas, 10), of_linas, is_dear=True),
    ]
    for searcher in syne_tune_search.installed():
        version = f"syne-tune {importlib.metadata.version('syne-tune')}"
        run = partial(syne_tune_search.search, searcher)
        most = 100 if searcher.is_dear else 2000
        found.append(Method(f"Syne Tune {searcher.name}", run, version, most, searcher.is_dear))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Ran:
    """One run: hypervolume after each training, and what the sampler cost."""

    volumes: tuple[float, ...]
    cpu_ms: float


def run_once(method: Method, kind: Kind, data: Path | None, trainings: int, seed: int) -> Ran:
    """Runs one method with one seed; CPU milliseconds are those of one training."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")  # other packages' experimental features
    problem = load_problem(kind, data)
    started = time.process_time()
    genotypes = method.run(problem, trainings, seed)
    cpu_ms = 1000 * (time.process_time() - started) / max(1, len(genotypes))
    volumes = [float(f"{v:.6g}") for v in problem.volumes(genotypes)]
    volumes += volumes[-1:] * (trainings - len(volumes))  # of a sampler that found no further network
    return Ran(tuple(volumes), cpu_ms)


def kept(folder: Path | None, method: Method, kind: Kind, seed: int, trainings: int) -> Ran | None:
    """A run that an earlier command kept, if it has enough trainings and is of the same version."""
    if folder is None or not (path := _path(folder, method, kind, seed)).exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["version"] != method.version or len(found["volumes"]) < trainings:
        return None
    return Ran(tuple(found["volumes"][:trainings]), found["cpu_ms"])


def keep(folder: Path, method: Method, kind: Kind, seed: int, ran: Ran) -> None:
    """Writes a run, whole or not at all."""
    path = _path(folder, method, kind, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"version": method.version, "cpu_ms": ran.cpu_ms, "volumes": ran.volumes}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document), encoding="utf-8")
    part.replace(path)


def _path(folder: Path, method: Method, kind: Kind, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in method.name.lower())
    return folder / kind / f"{name}-{seed}.json"


Task = tuple[Method, Kind, int, int]  # method, problem, seed, trainings


def run_all(
    tasks: Iterable[Task], data: Path | None, folder: Path | None, jobs: int
) -> dict[tuple[str, str, int], Ran]:
    """All runs by method, problem and seed: kept ones, and the others in `jobs` processes; with 0 kept ones alone."""
    result: dict[tuple[str, str, int], Ran] = {}
    missing = []
    for method, kind, seed, trainings in tasks:
        ran = kept(folder, method, kind, seed, trainings)
        if ran is None:
            missing.append((method, kind, seed, trainings))
        else:
            result[method.name, kind, seed] = ran
    if not jobs:
        return result
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        running = {
            pool.submit(_named_run, method.name, kind, data, trainings, seed): (method, kind, seed)
            for method, kind, seed, trainings in missing
        }
        for future in as_completed(running):
            method, kind, seed = running[future]
            ran = future.result()
            result[method.name, kind, seed] = ran
            if folder is not None:
                keep(folder, method, kind, seed, ran)
    return result


def _named_run(name: str, kind: Kind, data: Path | None, trainings: int, seed: int) -> Ran:
    """`run_once` by name: another process cannot be sent every function."""
    return run_once(next(m for m in methods() if m.name == name), kind, data, trainings, seed)


def trainings_for(mean_shares: FloatArray, level: float) -> str:
    """The first number of trainings at which a mean share reaches a level, in words."""
    reached = np.flatnonzero(mean_shares >= level)
    return str(int(reached[0]) + 1) if len(reached) else f">{len(mean_shares)}"


def curve(mean_shares: FloatArray) -> tuple[list[int], list[float]]:
    """Trainings, evenly spread over their logarithm, and the mean share there."""
    last = len(mean_shares)
    counts = np.unique(np.geomspace(min(FIRST_SHOWN, last), last, CURVE_POINTS).round().astype(int))
    return counts.tolist(), [round(float(mean_shares[c - 1]), 4) for c in counts]


def best_volume(kind: Kind, problem: Problem, folder: Path | None) -> float:
    """`best_known`, which takes a minute on a simulated problem and is kept beside the runs."""
    path = None if folder is None else folder / kind / "best_known.json"
    if path is not None and path.exists():
        return float(json.loads(path.read_text(encoding="utf-8")))
    found = best_known(problem)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a page."""
    shown = [[_digits(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(columns), ["---"] * len(columns), *shown])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--problem", nargs="+", default=["plain", "rugged"], choices=KINDS)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--dear-seeds", type=int, help="seeds of the samplers that cost 0.1 s a training and more")
    options.add_argument("--counts", type=int, nargs="+", default=[25, 50, 100, 200, 500])
    options.add_argument("--reach", type=int, default=2000, help="trainings of NSGA-II on the simulated problems")
    options.add_argument("--methods", nargs="+", choices=[m.name for m in methods()], help="all unless given")
    options.add_argument("--data", type=Path, help="folder of the published tables, for macro, accel and ofa")
    options.add_argument("--jobs", type=int, default=1, help="processes; 0: a report of what --results has")
    options.add_argument("--results", type=Path, help="folder of finished runs, to go on from")
    options.add_argument("--plot", type=Path, help="an SVG file to write")
    options.add_argument("--markdown", action="store_true", help="print the tables for a page")
    args = options.parse_args()
    chosen = [m for m in methods() if not args.methods or m.name in args.methods]
    dear_seeds = args.seeds if args.dear_seeds is None else args.dear_seeds
    tasks: list[Task] = [
        (m, kind, seed, m.trainings(kind, max(args.counts), args.reach))
        for m in chosen
        for kind in args.problem
        for seed in range(dear_seeds if m.is_dear else args.seeds)
    ]
    runs = run_all(tasks, args.data, args.results, args.jobs)
    document: dict[str, Any] = {"seeds": args.seeds, "counts": args.counts, "problems": {}}
    panels = []
    for kind in args.problem:
        problem = load_problem(kind, args.data)
        best = best_volume(kind, problem, args.results)
        of_method = {
            m: [ran for t in tasks if t[0] == m and t[1] == kind and (ran := runs.get((m.name, kind, t[2])))]
            for m in chosen
        }
        shares = {m: np.array([ran.volumes for ran in found]) / best for m, found in of_method.items() if found}
        ours = next((s.mean(axis=0) for m, s in shares.items() if m.name == OURS), None)
        level = math.inf if ours is None else float(ours[min(100, len(ours)) - 1])
        rows, found, lines = [], {}, {}
        for method, of_seeds in shares.items():
            means, deviations = of_seeds.mean(axis=0), of_seeds.std(axis=0)
            inside = [c for c in args.counts if c <= len(means)]
            cells = [f"{means[c - 1]:.3f} ± {deviations[c - 1]:.3f}" if c in inside else "-" for c in args.counts]
            needed = "-" if ours is None else trainings_for(means, level)
            cost_ms = float(np.median([ran.cpu_ms for ran in of_method[method]]))
            rows.append([method.name, len(of_seeds), *cells, needed, cost_ms])
            lines[method.name] = curve(means)
            found[method.name] = {
                "n": len(of_seeds),
                "version": method.version,
                "mean": {c: float(means[c - 1]) for c in inside},
                "sd": {c: float(deviations[c - 1]) for c in inside},
                "trainings_for_our_100": needed,
                "cpu_ms_per_training": cost_ms,
                "curve": {"trainings": lines[method.name][0], "share": lines[method.name][1]},
            }
        document["problems"][kind] = found
        simulated = "simulated" if kind in SIMULATED else "published table"
        columns = ("sampler", "n", *(f"at {c}" for c in args.counts), "trainings for our 100", "CPU ms per training")
        title = f"{kind} ({simulated}): share of the best known hypervolume, mean ± sd over n seeds"
        if args.markdown:
            print(f"{title}\n\n{markdown(columns, rows)}\n")
        else:
            report(title, columns, rows, {}, False)
            print()
        panels.append(Panel(f"{kind} ({simulated})", lines))
    if args.plot:
        heading = "Share of the best known hypervolume after so many trainings, mean over seeds"
        args.plot.write_text(line_chart(panels, heading, "trainings", "share"), encoding="utf-8")
    report("conditions", ("seeds", "counts"), [[args.seeds, args.counts]], document, args.json)


if __name__ == "__main__":
    main()
