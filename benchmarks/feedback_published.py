"""Error of corrected tables on 27 published pairs of table and device, by the number of measured networks.

Run: python -m benchmarks.feedback_published --data DIR [--seeds 10] [--networks 5,10,20,50] [--each] [--json]

DIR has a folder `feedback_benchmark` with the arrays, the experiments and the results of a reference implementation,
which are shown beside ours. The first N of a seeded permutation of the pool are measured, the next 1,000 are predicted.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.common import parser, report
from nas.latency.feedback import Networks, Prediction, fit, predict

FloatArray = NDArray[np.float64]
FIRST_SEED = 1000
TESTED = 1000
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the group ridge
REFERENCE = {"scale": "scale", "affine": "affine", "group ridge": "group_ridge", "ours": "robust_bayes"}
COLUMNS = ("mape", "within10", "spearman")


@dataclass(frozen=True, slots=True, eq=False)
class Experiment:
    """One pair of prior table and target: the pool of networks, their measured latencies, the group of each entry."""

    name: str
    networks: Networks
    measured_ms: FloatArray
    group_of: NDArray[np.intp]


def experiments(folder: Path) -> Iterable[Experiment]:
    """The pairs in the order of `experiments.csv`, with their numbers of rows, entries and groups checked."""
    files: dict[str, dict[str, Any]] = {}
    for row in rows_of(folder / "experiments.csv"):
        if row["file"] not in files:
            with np.load(folder / row["file"], allow_pickle=False) as arrays:
                files[row["file"]] = dict(arrays)
        data = files[row["file"]]
        prior, target = list(data["priors"]).index(row["prior"]), list(data["targets"]).index(row["target"])
        if "contributions_ms" in data:
            contributions = data["contributions_ms"][prior].astype(np.float64)
        else:
            contributions = data["features"] * data["prior_ms"][prior].astype(np.float64)
        z = data["z"].astype(np.float64)
        z = (z - z.mean(axis=0)) / np.where(z.std(axis=0) > 0, z.std(axis=0), 1.0)
        measured = data["target_ms"][target].astype(np.float64)
        known = ~np.isnan(measured)
        used = contributions[known].sum(axis=0) != 0
        names, group_of = np.unique(data["groups"][used], return_inverse=True)
        pool = slice(int(row["pool_first"]), int(row["pool_first"]) + int(row["pool_size"]))
        networks = Networks(
            contributions[known][pool][:, used], data["overhead"][known][pool].astype(np.float64), z[known][pool]
        )
        found = (len(networks), int(used.sum()), len(names))
        if found != (int(row["pool_size"]), int(row["entries"]), int(row["groups"])):
            raise SystemExit(f"{row['id']}: networks, entries and groups are {found}, not those of experiments.csv")
        yield Experiment(row["id"], networks, measured[known][pool], group_of)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def part_of(networks: Networks, rows: NDArray[np.intp]) -> Networks:
    """Some of the networks."""
    return Networks(networks.contributions_ms[rows], networks.overheads[rows], networks.descriptors[rows])


def scale(known: Networks, y: FloatArray, _: Experiment, asked: Networks) -> FloatArray:
    """The table's sum times the median ratio."""
    factor = np.exp(np.median(np.log(y / known.contributions_ms.sum(axis=1))))
    return np.asarray(factor * asked.contributions_ms.sum(axis=1))


def affine(known: Networks, y: FloatArray, pair: Experiment, asked: Networks) -> FloatArray:
    """a + b p by least squares of relative errors; the scale where b is not positive."""
    total = known.contributions_ms.sum(axis=1)
    (a, b), *_ = np.linalg.lstsq(np.column_stack([1 / y, total / y]), np.ones(len(y)), rcond=None)
    if b <= 0:
        return scale(known, y, pair, asked)
    return np.maximum(a + b * asked.contributions_ms.sum(axis=1), 0.05 * y.min())


def group_ridge(known: Networks, y: FloatArray, pair: Experiment, asked: Networks) -> FloatArray:
    """One factor per group and a constant, ridge towards the scaled table, strength by cross-validation."""
    groups = np.eye(int(pair.group_of.max()) + 1)[pair.group_of]
    factor = np.exp(np.median(np.log(y / known.contributions_ms.sum(axis=1))))
    known_ms, asked_ms = factor * known.contributions_ms @ groups, factor * asked.contributions_ms @ groups

    def ridge(rows: NDArray[np.intp], strength: float, x: FloatArray) -> FloatArray:
        ms, target = known_ms[rows], y[rows]
        design = np.column_stack([ms, np.full(len(ms), target.mean())]) / target[:, None]
        residual = 1 - ms.sum(axis=1) / target
        change = np.linalg.solve(design.T @ design + strength * np.eye(design.shape[1]), design.T @ residual)
        return x @ (1 + change[:-1]) + change[-1] * y.mean()

    folds, every = min(5, len(y)), np.arange(len(y))
    errors = []
    for strength in STRENGTHS:
        wrong = []
        for fold in range(folds):
            out = every % folds == fold
            guess = ridge(every[~out], strength, known_ms[out])
            wrong.extend(np.abs(guess / y[out] - 1))
        errors.append(np.mean(wrong))
    best = STRENGTHS[int(np.argmin(errors))]
    return np.maximum(ridge(every, best, asked_ms), 0.05 * y.min())


YARDSTICKS: dict[str, Callable[[Networks, FloatArray, Experiment, Networks], FloatArray]] = {
    "scale": scale,
    "affine": affine,
    "group ridge": group_ridge,
}


def figures(predicted: FloatArray, measured: FloatArray, interval: Prediction | None = None) -> dict[str, float]:
    """Percent of error, of networks within 10 %, of intervals that hold; rank correlation."""
    wrong = np.abs(predicted / measured - 1)
    inside = np.nan if interval is None else ((interval.low_ms <= measured) & (measured <= interval.high_ms)).mean()
    return {
        "mape": 100 * float(wrong.mean()),
        "within10": 100 * float((wrong <= 0.1).mean()),
        "spearman": float(spearmanr(predicted, measured).statistic),
        "covered": 100 * float(inside),
    }


def run_pair(pair: Experiment, networks: int, seeds: int) -> dict[str, dict[str, float]]:
    """Figures of every method, mean over the seeds; of the guarded form where the guard can speak."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        order = np.random.default_rng(seed).permutation(len(pair.networks))
        known, asked = order[:networks], order[networks : networks + TESTED]
        x, y = part_of(pair.networks, known), pair.measured_ms[known]
        x_new, y_new = part_of(pair.networks, asked), pair.measured_ms[asked]
        for name, method in YARDSTICKS.items():
            found.setdefault(name, []).append(figures(method(x, y, pair, x_new), y_new))
        start = time.process_time()
        ours = predict(fit(x, y, pair.group_of), x_new)
        seconds = time.process_time() - start
        found.setdefault("ours", []).append({**figures(ours.mean_ms, y_new, ours), "cpu_ms": 1e3 * seconds})
        guarded = predict(fit(x, y, pair.group_of, prior="same device"), x_new)
        found.setdefault("ours, same device", []).append(figures(guarded.mean_ms, y_new, guarded))
    return {name: {key: float(np.mean([r[key] for r in rows])) for key in rows[0]} for name, rows in found.items()}


def summary(of_pair: dict[str, dict[str, dict[str, float]]], method: str) -> dict[str, Any]:
    """Means over the pairs, and how they compare with the plain scale."""
    rows = [r[method] for r in of_pair.values()]
    loss = {name: r[method]["mape"] - r["scale"]["mape"] for name, r in of_pair.items()}
    worst = max(loss, key=lambda name: loss[name])
    return {
        **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},
        "pairs_below_10": sum(row["mape"] <= 10 for row in rows),
        "worse_than_scale": sum(v > 0 for v in loss.values()),
        "worse_by_a_point": sum(v > 1 for v in loss.values()),
        "worst_loss": loss[worst],
        "worst_pair": worst,
    }


def reference_of(rows: Sequence[dict[str, str]], networks: int, method: str) -> dict[str, float] | None:
    """Means of the reference results, or None where there are none."""
    found = [r for r in rows if int(r["N"]) == networks and r["method"] == REFERENCE.get(method)]
    return {key: float(np.mean([float(r[key]) for r in found])) for key in COLUMNS} if found else None


def main() -> None:
    """Prints a table, or with --json one object."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder that contains feedback_benchmark/")
    options.add_argument("--seeds", type=int, default=10, help="permutations of each pool (default 10)")
    options.add_argument("--networks", default="5,10,20,50", help="numbers of measured networks (default 5,10,20,50)")
    options.add_argument("--each", action="store_true", help="also print the error of every pair")
    args = options.parse_args()
    folder = args.data / "feedback_benchmark"
    if not (folder / "experiments.csv").is_file():
        options.error(f"{folder / 'experiments.csv'} does not exist")
    sizes = [int(n) for n in args.networks.split(",")]
    if min(sizes) < 2:
        options.error("--networks: the yardsticks need at least 2 measured networks")
    reference = rows_of(folder / "reference.csv")
    found: dict[int, dict[str, dict[str, dict[str, float]]]] = {n: {} for n in sizes}
    for pair in experiments(folder):
        for n in sizes:
            found[n][pair.name] = run_pair(pair, n, args.seeds)

    rows, document = [], []
    for n in sizes:
        for method in (*YARDSTICKS, "ours", "ours, same device"):
            ours, theirs = summary(found[n], method), reference_of(reference, n, method)
            document.append({"networks": n, "method": method, "ours": ours, "reference": theirs})
            beside = [f"{ours[key]:.3g} ({theirs[key]:.3g})" if theirs else f"{ours[key]:.3g}" for key in COLUMNS]
            covered = "" if np.isnan(ours["covered"]) else f"{ours['covered']:.1f}"
            lost = f"{ours['worst_loss']:+.1f} {ours['worst_pair']}" if method != "scale" else ""
            rows.append(
                [n, method, *beside, covered, ours["pairs_below_10"], ours["worse_than_scale"],
                 ours["worse_by_a_point"], lost]
            )  # fmt: skip
    if args.each:
        for name in found[sizes[0]]:
            errors = [f"{found[n][name]['scale']['mape']:.1f} {found[n][name]['ours']['mape']:.1f}" for n in sizes]
            print(f"{name:8s} scale and ours, MAPE %: " + " / ".join(errors))
    title = (
        f"{len(found[sizes[0]])} pairs, {args.seeds} seeds, {TESTED} networks predicted; in brackets the reference; "
        "covered: by 90 % intervals"
    )
    columns = ["N", "method", "MAPE %", "within 10 %", "Spearman", "covered %", "pairs <= 10 %", "worse than scale",
               "by > 1 point", "worst loss"]  # fmt: skip
    report(title, columns, rows, {"seeds": args.seeds, "rows": document, "pairs": found}, args.json)


if __name__ == "__main__":
    main()
