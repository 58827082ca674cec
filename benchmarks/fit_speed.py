"""CPU time of one fit of the correction, and corrected estimates with their deviation per second, on a made-up table.

Run: python -m benchmarks.fit_speed [--space FILE] [--repeats 7] [--json]

Rows and networks are made up, so that only computing is timed. For figures of one thread set OMP_NUM_THREADS=1 before.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import cpu_seconds, parser, report, spread
from nas.core.records import Candidate, DeviceProfile, LayerSpec, Measurement
from nas.core.walk import expand
from nas.latency.estimate import VectorEstimator
from nas.latency.fitting import fit_correction
from nas.latency.lines import OVERHEAD_KEY, MeasuredNetwork, network_key
from nas.latency.newtable import write_table
from nas.latency.table import LatencyTable
from nas.space.space import SearchSpace, load_space

CANDIDATES = 50_000
MEASURED = (5, 10, 20, 50, 100)
MACS_PER_MS = 2e7
OVERHEAD_MS = 0.003
PROFILE = DeviceProfile("made-up", "made up", "none", "1", "none", True, 1, "none", ("fp32",), "simulated", {})


def measurement(key: str, kind: Any, precision: Any, latency_ms: float, sequence: int) -> Measurement:
    """A measurement of one calm round."""
    return Measurement(
        key=key,
        kind=kind,
        precision=precision,
        latency_ms=latency_ms,
        rounds_ms=((latency_ms,),),
        accepted=(True,),
        clock="thread_cpu",
        measured_at="2026-01-01T00:00:00+00:00",
        sequence=sequence,
    )


def made_table(folder: Path, space: SearchSpace, networks: int) -> LatencyTable:
    """All rows of a space, and networks that are 10 % slower than their sums, each row by another share."""
    rng = np.random.default_rng(networks)
    row_ms = {x.key: OVERHEAD_MS + 0.002 + x.macs / MACS_PER_MS * rng.lognormal(0, 0.2) for x in space.layers()}
    truth = {key: (ms - OVERHEAD_MS) * rng.normal(1.1, 0.08) for key, ms in row_ms.items()}
    rows = [measurement(OVERHEAD_KEY, "overhead", "none", OVERHEAD_MS, 1)]
    rows += [measurement(x.key, "row", x.precision, row_ms[x.key], 2 + i) for i, x in enumerate(space.layers())]
    found: dict[str, MeasuredNetwork] = {}
    while len(found) < networks:
        c: Candidate = space.decode(space.sample(rng)).architecture
        ms = sum(truth[x.key] for x in expand(c)) * rng.normal(1, 0.02)
        key = network_key(c, "logits")
        m = measurement(key, "network", c.precision_label, ms, len(rows) + len(found) + 1)
        found.setdefault(key, MeasuredNetwork(c, "logits", m))
    write_table(folder, PROFILE, rows, found.values(), readme="Made up, for timing only.\n")
    return LatencyTable.read(folder)


def run_case(space: SearchSpace, networks: int, repeats: int) -> dict[str, Any]:
    """Figures for one number of measured networks."""
    with tempfile.TemporaryDirectory(prefix="nas-fit-speed-") as temporary:
        table = made_table(Path(temporary) / "made-up", space, networks)
    fits = cpu_seconds(lambda: fit_correction(table), repeats)
    fitted = fit_correction(table)
    genotypes = space.sample_many(np.random.default_rng(0), CANDIDATES)
    prepared = cpu_seconds(lambda: VectorEstimator(space, table, fitted).estimate(genotypes[:1]), 1)
    vector = VectorEstimator(space, table, fitted)
    rates = cpu_seconds(lambda: vector.estimate(genotypes), repeats)
    rows: dict[str, LayerSpec] = {x.key: x for n in table.networks.values() for x in expand(n.candidate)}
    return {
        "measured": networks,
        "rows_in_fit": len(rows),
        "fit_cpu_ms": spread([1e3 * s for s in fits]),
        "prepare_cpu_ms": 1e3 * prepared[0],
        "candidates_per_s": spread([CANDIDATES / s for s in rates]),
    }


def main() -> None:
    """Prints a table, or with --json one object."""
    options = parser(__doc__)
    options.add_argument("--space", type=Path, default=Path("search_spaces/mobilenetv3-64.yaml"), help="search space")
    options.add_argument("--repeats", type=int, default=7, help="timed repeats per case (default 7)")
    args = options.parse_args()
    space = load_space(args.space, 10, ("fp32",))
    cases = [run_case(space, networks, args.repeats) for networks in MEASURED]
    rows = []
    for case in cases:
        spreads = [case[key] for key in ("fit_cpu_ms", "candidates_per_s")]
        shown = [f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f})" for s in spreads]
        rows.append([case["measured"], case["rows_in_fit"], shown[0], f"{case['prepare_cpu_ms']:,.0f}", shown[1]])
    title = (
        f"{space.name}, {len(space.layers())} rows, {CANDIDATES:,} candidates; CPU time, median of {args.repeats} "
        "(min to max); goals: 500 ms, 200,000 a second"
    )
    columns = ["measured", "rows in fit", "fit ms", "look-ups ms", "candidates/s, worst case and exits"]
    report(title, columns, rows, {"repeats": args.repeats, "candidates": CANDIDATES, "cases": cases}, args.json)


if __name__ == "__main__":
    main()
