"""Do candidates from an exact additive solve, hand-made ones, or very many screened ones help a search?

    python -m benchmarks.seeds [--problem plain rugged] [--seeds 10] [--counts 25 50 100] [--methods NAME ...] [--json]

All methods get the same number of trainings of a simulated problem, in batches of 12 as a search proposes them, and are
scored by the share of the best known hypervolume of what they trained, without the noise of the trainings. `local
search` is the grey-box sampler as it is. `ladder K` adds K candidates of the exact solve to the second batch;
`hand-made K` begins with K networks that have one setting in all stages, the largest below K latencies; `screened N`
looks at N candidates for each batch beside the local search, `screened N alone` in its place. Differences are paired by
seed.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import conditions, parser, report
from benchmarks.problems import SIMULATED, STAGE_SIZES, STAGES, Genotypes, Problem, best_known, load_problem
from nas.core.jsonio import to_plain
from nas.search.calibration import accuracy_fit
from nas.search.greybox import GreyBoxProblem, Scored, propose
from nas.search.ladder import Part, best_for_each_cost, choice_scores, rungs
from nas.search.screening import screened

BATCH = 12
BASE = "local search"
STAGE_GENES = len(STAGE_SIZES)


@dataclass(frozen=True, slots=True)
class Method:
    """What is added to the grey-box sampler."""

    ladder: int = 0
    hand_made: int = 0
    draws: int = 0
    is_alone: bool = False


METHODS: dict[str, Method] = {
    BASE: Method(),
    "ladder 3": Method(ladder=3),
    "ladder 6": Method(ladder=6),
    "hand-made 4": Method(hand_made=4),
    "screened 1e5": Method(draws=100_000),
    "screened 1e6": Method(draws=1_000_000),
    "screened 1e5 alone": Method(draws=100_000, is_alone=True),
    "screened 1e6 alone": Method(draws=1_000_000, is_alone=True),
}


def known(problem: Problem) -> GreyBoxProblem:
    """What a search knows beforehand; the latency table is exact."""

    def latency(genotypes: Genotypes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ms = problem.latency_ms(genotypes)[:, None]
        return ms, np.zeros_like(ms)

    return GreyBoxProblem(problem.cardinalities, problem.ordinal, problem.canonical, latency, (problem.budget_ms,))


@cache
def latency_parts(problem: Problem) -> tuple[Part, ...]:
    """The latency of networks without exit as a sum over parts: the resolution, and each stage with the one before it.

    The tables are not public in the problem; differences of its latencies give parts with the same sum. Stage s alone,
    beside the smallest of all others, counts what it changes in stage s + 1, and then stage s + 1 counts from there.
    """
    sizes = problem.cardinalities
    least_ms = problem.latency_ms(_all(problem, (0,)))
    stages = []
    for s in range(STAGES):
        own = tuple(range(1 + STAGE_GENES * s, 1 + STAGE_GENES * (s + 1)))
        before = (1 + STAGE_GENES * (s - 1) + 3, 1 + STAGE_GENES * (s - 1) + 5) if s else ()
        genes = (0, *before, *own)
        rows = _all(problem, genes)
        without = rows.copy()
        without[:, list(own)] = 0
        cost = (problem.latency_ms(rows) - problem.latency_ms(without)).reshape([sizes[g] for g in genes])
        # Another setting than the first may be faster: what the fastest saves is taken off the resolution's part.
        saved = cost.min(axis=tuple(range(1, cost.ndim)))
        least_ms = least_ms + saved
        cost = cost - saved.reshape(-1, *[1] * (cost.ndim - 1))
        stages.append(Part(genes, cost, np.zeros(cost.shape)))
    return (Part((0,), least_ms, np.zeros(sizes[0])), *stages)


def _all(problem: Problem, genes: tuple[int, ...]) -> Genotypes:
    """Every combination of some genes, all others 0."""
    values = np.array(list(itertools.product(*(range(problem.cardinalities[g]) for g in genes))), np.int64)
    rows = np.zeros((len(values), len(problem.cardinalities)), np.int64)
    rows[:, list(genes)] = values
    return rows


def ladder(problem: Problem, genotypes: Genotypes, seen: NDArray[np.float64], count: int) -> Genotypes:
    """New candidates with the best sum of scores for each of `count` latencies, [<= count, G]."""
    scores = choice_scores(genotypes, seen, problem.cardinalities, problem.ordinal)
    parts = latency_parts(problem)
    places = {g: next(i for i, p in enumerate(parts) if g in p.genes) for p in parts for g in p.genes}
    terms: list[Part] = []
    for i, part in enumerate(parts):
        for gene in (g for g in part.genes if places[g] == i):
            terms.append(Part((gene,), np.zeros(problem.cardinalities[gene]), scores[gene]))
        terms.append(part)
    best = best_for_each_cost(terms, problem.cardinalities, 1.05 * problem.budget_ms)
    taken = set(map(tuple, genotypes.tolist()))
    best = best[[tuple(row) not in taken for row in best.tolist()]]
    best = best[problem.latency_ms(best) <= problem.budget_ms]
    return best[rungs(problem.latency_ms(best), problem.budget_ms, count)] if len(best) else best


def hand_made(problem: Problem, count: int) -> Genotypes:
    """Networks with one setting in all stages, the largest below each of `count` latencies, [<= count, G]."""
    rows = [
        (resolution, *(stage * STAGES), 0, 0)
        for resolution, stage in itertools.product(
            range(problem.cardinalities[0]), itertools.product(*map(range, STAGE_SIZES))
        )
    ]
    genotypes = np.array(rows, np.int64)
    ms = problem.latency_ms(genotypes)
    genotypes, ms = genotypes[ms <= problem.budget_ms], ms[ms <= problem.budget_ms]
    # What a designer calls large: every setting but the precision counts, as a share of its range.
    share = genotypes / (np.array(problem.cardinalities) - 1)
    share[:, STAGE_GENES::STAGE_GENES] = 0
    order = np.argsort(share.sum(axis=1), kind="stable")
    return genotypes[order][rungs(ms[order], problem.budget_ms, count)]


def run(problem: Problem, method: Method, count: int, seed: int) -> tuple[Genotypes, list[float], Scored]:
    """The networks trained, the CPU seconds of each proposed batch, and what was seen."""
    rng = np.random.default_rng([seed, 1])
    given = known(problem)
    genotypes = hand_made(problem, method.hand_made) if method.hand_made else np.empty((0, len(problem.ordinal)), int)
    seen = problem.train(genotypes, rng)
    spent: list[float] = []
    batches = 0
    while len(genotypes) < count:
        wanted = BATCH - (len(genotypes) if batches == 0 else 0)
        batches += 1
        started = time.process_time()
        scored = Scored(genotypes, seen, np.ones(len(seen), bool))
        new = ladder(problem, genotypes, seen, method.ladder) if method.ladder and batches == 2 else genotypes[:0]
        wanted -= len(new)
        if method.draws and len(genotypes) >= 2 * BATCH:
            more = screened(
                given,
                scored,
                method.draws,
                count=wanted,
                seed=(seed, len(genotypes)),
                is_with_local=not method.is_alone,
            )
        else:
            more = propose(given, scored, pending=new, count=wanted, seed=(seed, len(genotypes)))
        spent.append(time.process_time() - started)
        new = np.concatenate([new, more])
        genotypes, seen = np.concatenate([genotypes, new]), np.concatenate([seen, problem.train(new, rng)])
    return genotypes[:count], spent, Scored(genotypes[:count], seen[:count], np.ones(count, bool))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--problem", nargs="+", default=list(SIMULATED), choices=SIMULATED)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--counts", type=int, nargs="+", default=[25, 50, 100])
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = options.parse_args()
    document: dict[str, Any] = {"seeds": args.seeds, "counts": args.counts, "conditions": conditions(), "problems": {}}
    for kind in args.problem:
        problem = load_problem(kind)
        rows, found, base, best = [], {}, None, best_known(problem)
        for name in args.methods:
            runs = [run(problem, METHODS[name], max(args.counts), seed) for seed in range(args.seeds)]
            shares = (
                np.array([problem.volumes(genotypes) for genotypes, _, _ in runs])[:, np.array(args.counts) - 1] / best
            )
            base = shares if name == BASE else base
            batch_s = [float(np.median(spent[2:])) for _, spent, _ in runs if len(spent) > 2]
            cells = [f"{m:.3f} +- {s:.3f}" for m, s in zip(shares.mean(axis=0), shares.std(axis=0), strict=True)]
            gains = None if base is None else shares - base
            errors = None if gains is None else gains.std(axis=0, ddof=1) / np.sqrt(len(gains))
            shown = (
                ["-"] * len(args.counts)
                if gains is None or errors is None
                else [f"{g:+.3f} +- {e:.3f}" for g, e in zip(gains.mean(axis=0), errors, strict=True)]
            )
            rows.append([name, *cells, *shown, float(np.median(batch_s)) if batch_s else 0.0])
            fits = [accuracy_fit(known(problem), _as_ratio(scored)) for _, _, scored in runs]
            found[name] = {
                "mean": shares.mean(axis=0).tolist(),
                "sd": shares.std(axis=0).tolist(),
                "gain": None if gains is None else gains.mean(axis=0).tolist(),
                "standard_error": None if errors is None else errors.tolist(),
                "cpu_s_per_batch": batch_s,
                "leave_one_out": [f for f in fits if f is not None],
            }
        document["problems"][kind] = found
        columns = (
            "method",
            *(f"at {c}" for c in args.counts),
            *(f"gain at {c}" for c in args.counts),
            "CPU s a batch",
        )
        report(f"{kind} (simulated), n {args.seeds}: mean +- sd; gain +- standard error", columns, rows, {}, False)
        print()
    report("conditions", ("seeds", "counts"), [[args.seeds, args.counts]], to_plain(document), args.json)


def _as_ratio(scored: Scored) -> Scored:
    return Scored(scored.genotypes, scored.accuracies / 100, scored.eligible)


if __name__ == "__main__":
    main()
