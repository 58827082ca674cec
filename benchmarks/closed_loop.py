"""Search, measure, correct, export: how close does the loop come to measuring everything, on a simulated board?

    python -m benchmarks.closed_loop [--seeds 100] [--rounds 2] [--margin 1.5] [--disturbed] [--per-stage] [--json]

Each seed makes a board (`nas.testing.SimulatedBoard`: fusion, launches, streamed weights, what no sum explains, builds
that differ, noise) and a pool of 400 random candidates of tiny-32 whose accuracy is made up and known. Five budgets are
quantiles of the pool's true latencies. Nothing of this is a result of a device: it tests the loop.

The loop is made of the product's functions: a few networks spread over the predicted latencies, rounds that measure
those which decide the most (`worth_measuring`) and correct the table (`fit_correction`), then for each budget the most
accurate candidate whose prediction keeps it. That one is measured as a package is; where the median of all its runs
and a margin miss the budget, the next one is taken. Afterwards a user measures the export once more, in fresh builds.
The oracle does the same after measuring the whole pool. The margin is that of `nas export`
(`budget.package_margin_std`); `no margin` goes by the median alone. Regret is accuracy behind the best candidate that
truly keeps the budget (below 0 where an export does not); a margin costs the oracle some, too. The error is that of the
predictions of the networks which the rounds then measured.

Goals: all exports within budget, hypervolume of the measured networks within 2 % of the whole pool's, at most 15 % of
the oracle's builds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import parser, report
from nas.core.records import Candidate, Measurement
from nas.core.walk import total_macs
from nas.export.manifest import path_latency
from nas.latency.estimate import VectorEstimator
from nas.latency.fitting import Fitted, fit_correction
from nas.latency.lines import MeasuredNetwork, NetworkForm
from nas.latency.table import LatencyTable, deviation_ms
from nas.measure.fill import fill
from nas.measure.networks import network_job
from nas.search.experiment import SPACES
from nas.search.predictor import deployed_form
from nas.search.select import hypervolume, stratified, worth_measuring
from nas.search.settings import FeedbackSettings
from nas.space.space import SearchSpace, load_space
from nas.testing import BoardEffects, SimulatedBoard, described_layer, described_network

CLASSES = 10
POOL = 400
QUANTILES = (0.10, 0.25, 0.40, 0.55, 0.70)
TABLES = 5  # boards share tables of rows: filling one takes longer than a loop
REACH = 1.2  # times the largest budget: further networks are of no interest
PER_BUDGET = 2  # networks that a round measures for each budget
MARGIN_STD = 1.0  # deviations that a prediction has to keep a budget by: that of `BudgetSettings`
CALM_TRIES = 40  # measurements of one network at most, while the board is throttled

EFFECTS = BoardEffects(
    fusion_gain=0.12,
    launch_ms=0.001,
    reformat_ms=0.01,
    cache_mb=0.1,
    streaming_ms=0.05,
    irregular=0.02,
    build_std=0.01,
    noise=0.015,
)
DISTURBED = replace(EFFECTS, drift=0.03, throttle_share=0.1)

Correct = Literal["none", "scale", "fit"]
Choose = Literal["worth", "random"]


@dataclass(frozen=True, slots=True)
class Method:
    """How estimates are corrected, how networks to measure are chosen, and whether exports keep a margin."""

    correct: Correct
    choose: Choose = "worth"
    has_margin: bool = True


LOOPS: Mapping[str, Method] = {
    "the loop": Method("fit"),
    "the loop, no margin": Method("fit", has_margin=False),
    "plain table": Method("none"),
    "global scale": Method("scale"),
    "random networks": Method("fit", "random"),
}
METHODS = ("oracle", "oracle, no margin", *LOOPS)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Candidates of one seed; arrays have the shape [N].

    `top1` is made up: it saturates with the logarithm of the multiply-adds, and each architecture adds its own part.
    """

    genotypes: NDArray[np.int64]
    candidates: tuple[Candidate, ...]
    forms: tuple[NetworkForm, ...]
    labels: NDArray[np.str_]
    top1: NDArray[np.float64]
    true_ms: NDArray[np.float64]


def make_pool(space: SearchSpace, board: SimulatedBoard, seed: int) -> Pool:
    """Different random candidates with their accuracies and true latencies."""
    rng = np.random.default_rng((seed, 1))
    found: dict[Candidate, tuple[int, ...]] = {}
    for row in space.sample_many(rng, 2 * POOL).tolist():
        c = space.decode(tuple(row))
        found.setdefault(c.with_thresholds((None,) * len(c.exits)), tuple(row))
    candidates = tuple(found)[:POOL]
    forms = tuple(deployed_form(c) for c in candidates)
    macs = np.array([total_macs(c) for c in candidates], np.float64)
    # From about 80 % at the least to about 91 % at the most multiply-adds of the space, 93 % for ever larger ones;
    # choices that cost nothing matter by a point, int8 costs a third of a point.
    own: dict[str, float] = {c.arch_id: float(rng.normal(0, 0.008)) for c in candidates}
    top1 = 0.93 - 0.13 * np.exp(-1.1 * np.log(macs / 2.5e5))
    top1 += np.array([own[c.arch_id] - 0.003 * (c.precision_label != "fp32") for c in candidates])
    true_ms = np.array([board.true_ms(c, f) for c, f in zip(candidates, forms, strict=True)])
    labels = np.array([c.precision_label for c in candidates])
    return Pool(np.array(list(found.values())[:POOL]), candidates, forms, labels, top1, true_ms)


class Loop:
    """One search on one board with one method; counts every build."""

    def __init__(
        self, space: SearchSpace, table: LatencyTable, board: SimulatedBoard, pool: Pool, correct: Correct
    ) -> None:
        self._space, self._table, self._board, self._pool = space, table, board, pool
        self._correct = correct
        self.builds = 0
        self.measured: dict[int, Measurement] = {}
        self.errors: list[float] = []  # of the predictions of networks that rounds measured, |predicted / measured - 1|
        self._raw_ms, self._raw_std_ms = self._estimated(None)
        self.ms, self.std_ms = self._raw_ms, self._raw_std_ms

    def measure(self, indices: Sequence[int]) -> None:
        """Builds and measures networks, then estimates all others anew."""
        for i in indices:
            m = self.build(i)
            self.errors.append(abs(self.ms[i] / (m.latency_ms or 1.0) - 1))
            self.measured[i] = m
        self._refit()

    def build(self, i: int) -> Measurement:
        """Measures a network in a fresh build, again while the board is throttled."""
        self.builds += 1
        return calm_measurement(self._board, self._pool, i)

    def _refit(self) -> None:
        if self._correct == "fit":
            self.ms, self.std_ms = self._estimated(self._fitted())
        elif self._correct == "scale":
            where = np.array(list(self.measured))
            ratio = np.array([m.latency_ms for m in self.measured.values()]) / self._raw_ms[where]
            factor, spread = _scale(ratio)
            self.ms, self.std_ms = factor * self._raw_ms, spread * factor * self._raw_ms

    def _fitted(self) -> Fitted:
        """One fit for each precision label; a mixed one, which rests on all, only where there are mixed networks."""
        networks = [MeasuredNetwork(self._pool.candidates[i], self._pool.forms[i], m) for i, m in self.measured.items()]
        if (self._pool.labels == "mixed").any():
            return fit_correction(self._table, networks)
        found = [
            fit_correction(self._table, [n for n in networks if n.candidate.precision_label == label])
            for label in dict.fromkeys(n.candidate.precision_label for n in networks)
        ]
        return replace(found[0], fits={label: fit for f in found for label, fit in f.fits.items()})

    def _estimated(self, fitted: Fitted | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        found = VectorEstimator(self._space, self._table, fitted).estimate(self._pool.genotypes)
        return found.worst_ms, found.worst_std_ms


def _scale(ratio: NDArray[np.float64]) -> tuple[float, float]:
    """Median of measured / predicted, and its robust relative spread (1.4826: of a normal distribution)."""
    factor = float(np.exp(np.median(np.log(ratio))))
    return factor, max(0.015, 1.4826 * float(np.median(np.abs(ratio / factor - 1))))


def calm_measurement(board: SimulatedBoard, pool: Pool, i: int) -> Measurement:
    """A measurement of a network; while the board is throttled it is repeated, a few times."""
    c, form = pool.candidates[i], pool.forms[i]
    job = network_job(c, form, described_network(c, form))
    for _ in range(CALM_TRIES):
        m = board.measure([job])[0]
        if m.is_stable:
            break
    return m


def choose(loop: Loop, pool: Pool, budgets_ms: Sequence[float], how: Choose, rng: np.random.Generator) -> list[int]:
    """The networks that a round measures."""
    known = list(loop.measured)
    fresh = [i for i in range(len(pool.top1)) if i not in loop.measured and loop.ms[i] <= REACH * budgets_ms[-1]]
    count = PER_BUDGET * len(budgets_ms)
    if how == "random":
        return [int(i) for i in rng.choice(fresh, min(count, len(fresh)), replace=False)]
    everything = known + fresh
    top1 = pool.top1[everything].tolist()
    ms, std_ms = loop.ms[everything], loop.std_ms[everything]
    ms[: len(known)] = [m.latency_ms or np.inf for m in loop.measured.values()]
    std_ms[: len(known)] = [deviation_ms(m) for m in loop.measured.values()]
    taken = list(range(len(known)))
    for budget_ms in budgets_ms:
        taken += worth_measuring(top1, ms.tolist(), ms.tolist(), std_ms.tolist(), budget_ms, PER_BUDGET, taken)
    return [everything[i] for i in taken[len(known) :]]


def exported(loop: Loop, pool: Pool, budget_ms: float, margin: float) -> int | None:
    """The candidate that is handed out for a budget, measured as a package is; None where none keeps it.

    As in `export_student`: the most accurate first, by what was measured where it was, else by the prediction and its
    margin; one that misses is followed by the next faster one.
    """
    limit_ms = np.inf
    for i in sorted(range(len(pool.top1)), key=lambda i: -pool.top1[i]):
        if i in loop.measured:
            likely = keeps(loop.measured[i], budget_ms, margin)
            now_ms = loop.measured[i].latency_ms or 0.0
        else:
            likely = loop.ms[i] + MARGIN_STD * loop.std_ms[i] <= budget_ms
            now_ms = loop.ms[i]
        if not likely or now_ms >= limit_ms:
            continue
        package = loop.build(i)
        loop.measured.setdefault(i, package)
        if keeps(package, budget_ms, margin):
            return i
        limit_ms = package.latency_ms or 0.0
    return None


def keeps(m: Measurement, budget_ms: float, margin: float) -> bool:
    """Whether the median of all runs keeps a budget by so many deviations of a measurement."""
    return path_latency(m, 0, 1.0).p50_ms + margin * deviation_ms(m) <= budget_ms


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one method reached on one seed; lists have one entry for each budget, None where nothing was exported."""

    builds: float
    volume: float
    mape: float
    kept: tuple[bool | None, ...]
    over: tuple[float | None, ...]
    regret: tuple[float | None, ...]


def judge(
    board: SimulatedBoard, pool: Pool, budgets_ms: Sequence[float], picks: Sequence[int | None]
) -> tuple[tuple[bool | None, ...], tuple[float | None, ...], tuple[float | None, ...]]:
    """Whether each export keeps its budget when a user measures it, by how much it misses, and what it costs.

    Returns:
        Kept or not; measured / budget - 1; accuracy (ratio) behind the best candidate that truly keeps the budget.
    """
    kept: list[bool | None] = []
    over: list[float | None] = []
    regret: list[float | None] = []
    for pick, budget_ms in zip(picks, budgets_ms, strict=True):
        median_ms = None if pick is None else path_latency(calm_measurement(board, pool, pick), 0, 1.0).p50_ms
        best = float(pool.top1[pool.true_ms <= budget_ms].max())
        kept.append(None if median_ms is None else median_ms <= budget_ms)
        over.append(None if median_ms is None else median_ms / budget_ms - 1)
        regret.append(None if pick is None else best - float(pool.top1[pick]))
    return tuple(kept), tuple(over), tuple(regret)


def volume_of(pool: Pool, indices: Sequence[int], budget_ms: float) -> float:
    """Hypervolume of candidates by their true latencies, as a share of that of the whole pool."""

    def volume(top1: NDArray[np.float64], ms: NDArray[np.float64]) -> float:
        return hypervolume(top1.tolist(), ms.tolist(), 1 / CLASSES, budget_ms)

    return volume(pool.top1[indices], pool.true_ms[indices]) / volume(pool.top1, pool.true_ms)


def run_method(
    space: SearchSpace,
    table: LatencyTable,
    board: SimulatedBoard,
    pool: Pool,
    budgets_ms: Sequence[float],
    method: Method,
    settings: Any,
    seed: int,
) -> Outcome:
    """The whole loop of one method on one seed."""
    rng = np.random.default_rng((seed, 2))
    loop = Loop(space, table, board, pool, method.correct)
    reach = np.flatnonzero(loop.ms <= REACH * budgets_ms[-1])
    count = FeedbackSettings().first_networks
    if method.choose == "random":
        first = rng.choice(reach, count, replace=False).tolist()
    else:
        first = [int(reach[i]) for i in stratified(loop.ms[reach].tolist(), count)]
    loop.measure(first)
    for _ in range(settings.rounds):
        loop.measure(choose(loop, pool, budgets_ms, method.choose, rng))
    margin = settings.margin if method.has_margin else 0.0
    picks = [exported(loop, pool, budget_ms, margin) for budget_ms in budgets_ms]
    volume = volume_of(pool, list(loop.measured), budgets_ms[-1])
    kept, over, regret = judge(board, pool, budgets_ms, picks)
    late = loop.errors[count:] or loop.errors
    return Outcome(loop.builds / len(pool.top1), volume, float(np.mean(late)), kept, over, regret)


def run_oracle(board: SimulatedBoard, pool: Pool, budgets_ms: Sequence[float], margin: float) -> Outcome:
    """Measures the whole pool; only the measurements that decide an export are really made."""
    picks: list[int | None] = []
    known: dict[int, Measurement] = {}
    for budget_ms in budgets_ms:
        picks.append(None)
        for i in np.argsort(-pool.top1).tolist():
            if pool.true_ms[i] > 1.1 * budget_ms:
                continue  # cannot keep it by any noise
            m = known.setdefault(i, calm_measurement(board, pool, i))
            if keeps(m, budget_ms, margin) and keeps(calm_measurement(board, pool, i), budget_ms, margin):
                picks[-1] = i
                break
    return Outcome(1.0, 1.0, float("nan"), *judge(board, pool, budgets_ms, picks))


def run_seed(space: SearchSpace, table: LatencyTable, seed: int, settings: Any) -> dict[str, Outcome]:
    """All methods on the same board and pool."""
    made = partial(SimulatedBoard, seed, DISTURBED if settings.disturbed else EFFECTS, rows_seed=seed % TABLES)
    pool = make_pool(space, made(), seed)
    budgets_ms = [float(q) for q in np.quantile(pool.true_ms, QUANTILES)]
    found = {
        "oracle": run_oracle(made(), pool, budgets_ms, settings.margin),
        "oracle, no margin": run_oracle(made(), pool, budgets_ms, 0.0),
    }
    for name, method in LOOPS.items():
        found[name] = run_method(space, table, made(), pool, budgets_ms, method, settings, seed)
    return found


def made_table(folder: Path, space: SearchSpace, rows_seed: int) -> LatencyTable:
    """All rows of a space, measured on a board by the product's own filling."""
    board = SimulatedBoard(rows_seed, EFFECTS, rows_seed=rows_seed)
    table = LatencyTable.open(folder / board.profile.name, board.profile)
    fill(table, board, space.layers(), write=described_layer)
    return table


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of one method over the seeds: mean, standard deviation and worst."""
    kept = [k for o in outcomes for k in o.kept if k is not None]
    over = [v for o in outcomes for v in o.over if v is not None]
    regret = [v for o in outcomes for v in o.regret if v is not None]
    return {
        "exports": len(kept),
        "none_exported": sum(k is None for o in outcomes for k in o.kept),
        "kept": float(np.mean(kept)),
        "worst_over": max(over),
        "volume_lost": _spread([1 - o.volume for o in outcomes]),
        "builds": _spread([o.builds for o in outcomes]),
        "regret_points": _spread([100 * v for v in regret]),
        "mape": _spread([o.mape for o in outcomes]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "worst": float(np.max(values))}


def _shown(found: Mapping[str, float], unit: float = 100.0) -> str:
    if not np.isfinite(found["mean"]):
        return "-"
    return f"{unit * found['mean']:.2f} +- {unit * found['std']:.2f} ({unit * found['worst']:.2f})"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=100)
    options.add_argument("--rounds", type=int, default=2, help="rounds of measuring before the exports")
    options.add_argument("--margin", type=float, default=1.5, help="deviations by which measured medians keep budgets")
    options.add_argument("--disturbed", action="store_true", help="the board drifts and is throttled now and then")
    options.add_argument("--per-stage", action="store_true", help="a precision for each stage instead of one")
    args = options.parse_args()
    space = load_space(SPACES / "tiny-32.yaml", CLASSES, ("fp32", "int8"))
    if args.per_stage:
        space = replace(space, precision=replace(space.precision, per="stage"))
    with tempfile.TemporaryDirectory(prefix="nas-closed-loop-") as scratch:
        tables = [made_table(Path(scratch), space, n) for n in range(min(TABLES, args.seeds))]
        outcomes = [run_seed(space, tables[seed % TABLES], seed, args) for seed in range(args.seeds)]
    found = {name: summary([o[name] for o in outcomes]) for name in METHODS}
    rows = [
        [
            name,
            f"{100 * f['kept']:.1f} of {f['exports']}",
            f"{100 * f['worst_over']:+.1f}",
            _shown(f["volume_lost"]),
            _shown(f["builds"]),
            _shown(f["regret_points"], 1.0),
            _shown(f["mape"]),
        ]
        for name, f in found.items()
    ]
    report(
        f"{args.seeds} simulated boards, {len(QUANTILES)} budgets each, pools of {POOL}; mean +- deviation (worst) of "
        "the seeds; goals: 100 %, 2 %, 15 %",
        (
            "method",
            "% within budget",
            "worst, %",
            "hypervolume lost %",
            "builds % of oracle",
            "regret, points",
            "error %",
        ),
        rows,
        {"simulated": True, "seeds": args.seeds, "methods": found},
        args.json,
    )


if __name__ == "__main__":
    main()
