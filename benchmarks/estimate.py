"""Estimated against measured latency of random networks: raw sum of rows, and corrected from a few networks.

Run: python -m benchmarks.estimate [--networks 64] [--seed 0] [--table DIR] [--json]

Random networks of the space are measured whole (random weights, every exit computed) in fp32, in int8 and in a random
precision for each stage, and so are the rows they consist of. With --table the measurements are kept, and a second run
goes on where the first one stopped. `after N` fits the correction on N random networks of that precision and judges it
on the others, many times. Label noise is how much two independent measurements of one network differ; no estimate can
be better.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions, parser, spread
from nas.core.errors import NasError
from nas.core.records import Candidate, Precision
from nas.core.walk import expand
from nas.devices import open_device
from nas.devices.base import Device
from nas.latency.correction import PrecisionFit
from nas.latency.estimate import Estimator, describe_errors
from nas.latency.fitting import Fitted, fit_correction
from nas.latency.lines import MeasuredNetwork, network_key
from nas.latency.table import LatencyTable
from nas.measure.fill import FillProgress, FillReport, fill, fp32_mb, measure_streaming
from nas.measure.networks import NetworkProgress, measure_networks, network_bytes, network_job
from nas.search.experiment import space_file
from nas.space.space import SearchSpace, load_space

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
LABELS = (*PRECISIONS, "mixed")
TARGETS = {  # ratios
    "fp32": {"raw": 0.06, "after_10": 0.037, "after_30": 0.03},
    "int8": {"raw": 0.04, "after_10": 0.015, "after_30": 0.012},
    "mixed": {"after_10": 0.03},
}
GOALS = "rank correlation at least 0.995, 85 to 95 % within the 90 % band"
DRAWS = 40
FIT_SIZES = (3, 5, 10, 20, 30)
NOISE_NETWORKS = 12
CLASSES = 10


def draw(space: SearchSpace, count: int, seed: int) -> list[Candidate]:
    """Different random architectures of a space."""
    rng = np.random.default_rng(seed)
    found: dict[str, Candidate] = {}
    while len(found) < count:
        candidate = space.decode(space.sample(rng)).architecture
        found.setdefault(candidate.arch_id, candidate)
    return list(found.values())


def say(text: str, end: str = "\n") -> None:
    """A line for people who wait."""
    print(text, end=end, file=sys.stderr, flush=True)


def told_rows(p: FillProgress) -> None:
    """Shows how far filling is."""
    if p.done % 40 == 0 or p.done == p.total or not p.message:
        rest = "" if p.remaining_s is None else f", about {p.remaining_s:.0f} s left"
        say(f"\r  rows: {p.done} of {p.total}, {p.unstable} disturbed{rest}   ", end="")


def told_networks(p: NetworkProgress) -> None:
    """Shows how far measuring networks is."""
    say(f"\r  networks: {p.done:.0f} of {p.total}   ", end="")


def label_noise(device: Device, table: LatencyTable, candidates: Sequence[Candidate]) -> float:
    """Standard deviation (ratio) of one measurement of a network, from measuring networks a second time."""
    jobs = [network_job(c, "logits", network_bytes(c)) for c in candidates]
    differences = []
    for second in device.measure(jobs):
        first = table.networks[second.key].measurement
        if first.latency_ms is not None and second.latency_ms is not None:
            differences.append(np.log(second.latency_ms / first.latency_ms))
    return float(np.sqrt(np.mean(np.square(differences)) / 2))


def in_precision(candidate: Candidate, label: str, rng: np.random.Generator) -> Candidate:
    """The same network in one precision; for `mixed` in a random one for the stem, each stage and the head."""
    if label != "mixed":
        return candidate.with_precision("fp32" if label == "fp32" else "int8")
    while True:
        mixed = candidate.with_precision([PRECISIONS[i] for i in rng.integers(0, 2, len(candidate.precisions))])
        if mixed.precision_label == "mixed":
            return mixed


def judged(table: LatencyTable, fitted: Fitted | None, networks: Sequence[MeasuredNetwork]) -> dict[str, float]:
    """Errors of an estimate on networks, and the share of them within 1.645 standard deviations (nominal: 0.9)."""
    estimator = Estimator(table, fitted, gated=False)
    estimates = [estimator.estimate(n.candidate) for n in networks]
    mean = np.array([e.worst_ms for e in estimates])
    std = np.array([e.worst_std_ms for e in estimates])
    truth = np.array([n.measurement.latency_ms for n in networks])
    return {**describe_errors(mean, truth), "within_90": float((np.abs(mean - truth) <= 1.645 * std).mean())}


def after(table: LatencyTable, networks: Sequence[MeasuredNetwork], size: int, seed: int) -> dict[str, float] | None:
    """Mean errors over random draws of `size` networks to fit on, judged on all others."""
    if len(networks) < size + 5:
        return None
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(DRAWS):
        order = rng.permutation(len(networks))
        fitted = fit_correction(table, [networks[i] for i in order[:size]])
        results.append(judged(table, fitted, [networks[i] for i in order[size:]]))
    worst = max(r["mape"] for r in results)
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]} | {"worst_mape": worst}


def run(space: SearchSpace, table: LatencyTable, device: Device, count: int, seed: int) -> dict[str, Any]:
    """Measures what is missing, then compares."""
    architectures = draw(space, count, seed)
    result: dict[str, Any] = {"space": space.name, "device": device.profile.name, "precisions": {}}
    calm = device.calm()
    result["calm"] = {"rejected_share": calm.rejected_share, "drift": calm.drift}
    rng = np.random.default_rng(seed)
    networks = {label: [in_precision(a, label, rng) for a in architectures] for label in LABELS}
    measured = {label: measure(table, device, label, candidates) for label, candidates in networks.items()}
    for label, candidates in networks.items():  # by what the table knows in the end
        chosen = [table.networks[network_key(c, "logits")] for c in candidates]
        usable = [n for n in chosen if n.measurement.latency_ms is not None and not unknown(table, n)]
        fit = fit_correction(table, usable).correction.fit_for(label)
        result["precisions"][label] = {
            "networks": len(usable),
            **measured[label],
            "latency_ms": spread([n.measurement.latency_ms or 0.0 for n in usable]),
            "raw": judged(table, None, usable),
            **{f"after_{size}": after(table, usable, size, seed) for size in FIT_SIZES},
            "fit": None if fit is None else fit_numbers(fit),
        }
    result["streaming_us"] = {f"{mb:g} MB": round(1e3 * ms, 1) for mb, ms in table.streaming[1:]}
    return result


def measure(table: LatencyTable, device: Device, label: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Measures networks in one precision and their rows; how that went."""
    layers = dict.fromkeys(x for c in candidates for x in expand(c))
    say(f"{label}: {len(candidates)} networks, {len(layers)} different rows")
    measure_streaming(table, device, max(fp32_mb(c) for c in candidates))
    report = fill(table, device, layers, progress=told_rows)
    started = time.monotonic()
    measurements = measure_networks(table, device, candidates, progress=told_networks)
    networks_s = time.monotonic() - started
    say("")
    noise = label_noise(device, table, candidates[:NOISE_NETWORKS])
    warn(report)
    return {
        "rows": len(layers),
        "rows_disturbed": sum(not table.rows[x.key].is_stable for x in layers),
        "networks_disturbed": sum(not m.is_stable for m in measurements),
        "row_ms_to_measure": 1e3 * report.seconds / report.measured if report.measured else None,
        "network_s_to_measure": networks_s / len(candidates),
        "label_noise": noise,
        "noise_networks": len(candidates[:NOISE_NETWORKS]),
    }


def unknown(table: LatencyTable, network: MeasuredNetwork) -> list[str]:
    """Rows of a network that could not be measured."""
    return [x.key for x in expand(network.candidate) if not table.has_row(x.key)]


def fit_numbers(fit: PrecisionFit) -> dict[str, float]:
    """The correction from all networks, in readable units."""
    costs = {f"{c.name}, us": 1e3 * c.value for c in fit.costs}
    return {"scale": fit.scale, "error": fit.error, **costs}


def warn(report: FillReport) -> None:
    """Repeats what filling the table warned of."""
    for line in report.warnings:
        say(f"  note: {line}")


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"{result['space']} on {result['device']}; after N: mean over {DRAWS} random draws, judged on the rest")
    print(f"goals: {GOALS}")
    print("precision  fit        n   MAPE  target   bias   rank corr  within 5  within 10  in 90 % band")
    for label, p in result["precisions"].items():
        for name in ("raw", *(f"after_{size}" for size in FIT_SIZES)):
            r = p[name]
            if r is not None:
                target = TARGETS[label].get(name)
                goal = f"{target:6.1%}" if target else "      "
                print(
                    f"{label:<9}  {name:<8} {r['n']:>3.0f}  {r['mape']:5.1%}  {goal}  {r['bias']:+6.1%}"
                    f"     {r['spearman']:.4f}     {r['within_5']:4.0%}"
                    f"       {r['within_10']:4.0%}          {r['within_90']:4.0%}"
                )
    for label, p in result["precisions"].items():
        f, ms = p["fit"], p["latency_ms"]
        print(
            f"{label}: latency {ms['min']:.2f}-{ms['max']:.2f} ms; label noise {p['label_noise']:.1%}"
            f" ({p['noise_networks']} networks twice); disturbed: {p['rows_disturbed']} of {p['rows']} rows,"
            f" {p['networks_disturbed']} of {p['networks']} networks; from all: "
            + ", ".join(f"{name} {value:.3g}" for name, value in f.items())
        )
    print(f"weights that do not stay in the cache, us: {result['streaming_us']}")
    print(f"conditions: {result['conditions']}; calm checks rejected: {result['calm']['rejected_share']:.0%}")


def main() -> None:
    """Measures, prints a table, or with --json one object last."""
    options = parser(__doc__)
    options.add_argument(
        "--networks", type=int, default=64, help="random networks, each in fp32, int8 and mixed (default 64)"
    )
    options.add_argument("--seed", type=int, default=0, help="of the networks and of the draws (default 0)")
    options.add_argument("--space", default="mobilenetv3-64", help="search space, by name or file")
    options.add_argument("--table", type=Path, help="folder that keeps the measurements (default: a temporary one)")
    args = options.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="nas-estimate-") as temporary:
            device = open_device("cpu")
            table = LatencyTable.open(args.table or Path(temporary) / device.profile.name, device.profile)
            space = load_space(space_file(args.space, "--space"), CLASSES, device.profile.precisions)
            before = conditions()
            result = run(space, table, device, args.networks, args.seed) | {"conditions": before, "seed": args.seed}
    except NasError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    show(result)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
