"""CPU milliseconds that the search's own proposer takes, by sampler, number of scored candidates and size of the batch.

    python -m benchmarks.proposal_cost [--space tiny-32] [--trials 100 300 1000] [--batch 12] [--repeats 7] [--json]

The real proposer asks for candidates inside a budget that about a third of the space keeps, with the latency table of a
simulated device, from scored candidates with made-up accuracies. `one` is what a batch of one costs, `a batch` one of
`--batch`, `each` what one candidate more adds, and `once` what does not depend on their number. `nas.search.choice`
weighs samplers by these figures. Set OPENBLAS_NUM_THREADS=1 on a busy machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import Silent, parser, report, spread
from nas.latency.table import LatencyTable
from nas.search.experiment import SPACES
from nas.search.predictor import BudgetFilter, Predictor
from nas.search.study import KnownLatency, Proposer, Scored
from nas.space.space import load_space
from nas.testing import SimulatedDevice

CLASSES = 10
SHARE_INSIDE = 0.33  # of random candidates that keep the budget
SAMPLERS = ["greybox", "tpe", "nsga2", "random"]


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A space with its latencies, a budget, and networks that keep it, int64 [N, G]."""

    predictor: Predictor
    budget_ms: float
    inside: np.ndarray

    def scored(self, genotypes: np.ndarray, rng: np.random.Generator) -> list[Scored]:
        """Made-up scores: accuracy saturates with latency, plus noise."""
        ms, _ = self.predictor.known_worst(genotypes)
        top1 = 0.9 * (1 - np.exp(-2 * ms / self.budget_ms)) + rng.normal(0, 0.02, len(ms))
        return [
            Scored(tuple(row), min(1.0, max(0.0, float(a))), (float(t),), float(t / self.budget_ms - 1), "")
            for row, a, t in zip(genotypes.tolist(), top1, ms, strict=True)
        ]


def prepared(space_name: str, folder: Path, most: int) -> Bench:
    """The bench with `most` different networks inside the budget."""
    space = load_space(SPACES / f"{space_name}.yaml", CLASSES)
    device = SimulatedDevice(0)
    predictor = Predictor(space, LatencyTable.open(folder / "table", device.profile), device, Silent())
    predictor.prepare()
    rng = np.random.default_rng(0)
    drawn = np.unique(space.sample_many(rng, 6 * most + 5_000), axis=0)
    ms, _ = predictor.known_worst(drawn)
    budget_ms = float(np.nanquantile(ms, SHARE_INSIDE))
    inside = rng.permutation(drawn[ms <= 0.99 * budget_ms])[:most]
    return Bench(predictor, budget_ms, inside)


def batch_ms(bench: Bench, sampler: str, trials: int, batch: int, repeats: int) -> list[float]:
    """CPU milliseconds of `repeats` batches; a first one, which reads all trials, is not counted."""
    rng = np.random.default_rng(1)
    limit = BudgetFilter(bench.predictor, bench.budget_ms, "worst", 0.0)
    latency: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda rows: tuple(  # noqa: E731
        column[:, None] for column in bench.predictor.known_worst(rows)
    )
    proposer = Proposer(
        bench.predictor.space,
        sampler,
        (0, trials),
        trials,
        limit.keeps,
        limit.known,
        bench.scored(bench.inside[:trials], rng),
        latency=KnownLatency(latency, (bench.budget_ms,), 0.0, batch) if sampler == "greybox" else None,
    )
    samples = []
    for _ in range(repeats + 1):
        start = time.process_time()
        asked = [proposer.ask() for _ in range(batch)]
        samples.append(1000 * (time.process_time() - start))
        for number, genotype in filter(None, asked):
            proposer.tell(number, bench.scored(np.array([genotype]), rng)[0])
    return samples[1:]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--space", default="tiny-32")
    options.add_argument("--trials", type=int, nargs="+", default=[100, 300, 1000, 3000, 10_000])
    options.add_argument("--batch", type=int, default=12)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    args = options.parse_args()
    rows, found = [], []
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepared(args.space, Path(scratch), max(args.trials))
        for sampler in args.samplers:
            for trials in sorted(args.trials):
                one, many = (batch_ms(bench, sampler, trials, n, args.repeats) for n in (1, args.batch))
                first, whole = statistics.median(one), statistics.median(many)
                each = max(0.0, (whole - first) / (args.batch - 1))
                rows.append(
                    [sampler, trials, first, min(one), max(one), whole, min(many), max(many), first - each, each]
                )
                found.append({"sampler": sampler, "trials": trials, "one_ms": spread(one), "batch_ms": spread(many)})
    columns = ("sampler", "scored", "one ms", "min", "max", f"batch of {args.batch} ms", "min", "max", "once", "each")
    title = f"one proposal and a batch, CPU, n {args.repeats}; {args.space}, a simulated device"
    report(title, columns, rows, {"space": args.space, "batch": args.batch, "costs": found}, args.json)


if __name__ == "__main__":
    main()
