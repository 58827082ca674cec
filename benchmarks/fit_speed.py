"""CPU time of one fit of the correction, and predictions with their deviation per second, on made-up networks.

Run: python -m benchmarks.fit_speed [--repeats 7] [--json]

For figures of one thread set OMP_NUM_THREADS=1 before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import cpu_seconds, parser, report, spread
from nas.latency.feedback import Feedback, Networks, add_up, fit, look_up, predict_sums

ENTRIES, USED, GROUPS, OVERHEADS, DESCRIPTORS = 2000, 20, 10, 3, 6
CANDIDATES = 50_000


def made_networks(rng: np.random.Generator, count: int, entry_ms: NDArray[np.float64]) -> tuple[Any, ...]:
    """Entry numbers [M, USED], overheads [M, OVERHEADS] and descriptors [M, DESCRIPTORS] of random networks."""
    entries = rng.integers(0, len(entry_ms), (count, USED))
    overheads = np.column_stack([np.ones(count), rng.integers(8, 20, count), rng.uniform(0.5, 4, count)])
    return entries, overheads, rng.normal(size=(count, DESCRIPTORS))


def made_fit(measured: int) -> tuple[Callable[[], Feedback], NDArray[np.float64]]:
    """A call that fits so many networks, and the table they are made of."""
    rng = np.random.default_rng(measured)
    entry_ms = rng.lognormal(-3, 0.7, ENTRIES)
    entries, overheads, descriptors = made_networks(rng, measured, entry_ms)
    contributions = np.zeros((measured, ENTRIES))
    np.add.at(contributions, (np.arange(measured)[:, None], entries), entry_ms[entries])
    group_of = np.arange(ENTRIES) % GROUPS
    truth = rng.normal(1.2, 0.15, GROUPS)[group_of] * rng.normal(1, 0.1, ENTRIES)
    y = (contributions @ truth + 0.01 * overheads[:, 1]) * rng.normal(1, 0.02, measured)
    networks = Networks(contributions, overheads, descriptors)
    return lambda: fit(networks, y, group_of), entry_ms


def run_case(measured: int, repeats: int) -> dict[str, Any]:
    """Figures for one number of measured networks."""
    work, entry_ms = made_fit(measured)
    fits = cpu_seconds(work, repeats)
    fitted = work()
    looks = cpu_seconds(lambda: look_up(fitted, entry_ms), repeats)
    look = look_up(fitted, entry_ms)
    entries, overheads, descriptors = made_networks(np.random.default_rng(0), CANDIDATES, entry_ms)
    both = cpu_seconds(lambda: predict_sums(fitted, add_up(look, entries), overheads, descriptors), repeats)
    sums = add_up(look, entries)
    last = cpu_seconds(lambda: predict_sums(fitted, sums, overheads, descriptors), repeats)
    return {
        "measured": measured,
        "entries": ENTRIES,
        "fit_cpu_ms": spread([1e3 * s for s in fits]),
        "look_up_cpu_ms": spread([1e3 * s for s in looks]),
        "candidates_per_s": spread([CANDIDATES / s for s in both]),
        "of_sums_per_s": spread([CANDIDATES / s for s in last]),
    }


def main() -> None:
    """Prints a table, or with --json one object."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7, help="timed repeats per case (default 7)")
    args = options.parse_args()
    cases = [run_case(measured, args.repeats) for measured in (5, 10, 20, 50, 100)]
    rows = []
    for case in cases:
        spreads = [case[key] for key in ("fit_cpu_ms", "look_up_cpu_ms", "candidates_per_s", "of_sums_per_s")]
        rows.append([case["measured"], *[f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f})" for s in spreads]])
    title = f"{ENTRIES} entries, {USED} per network, {CANDIDATES:,} candidates; CPU time, median (min to max)"
    columns = ["measured", "fit ms", "columns ms", "candidates/s", "of these, from sums/s"]
    report(title, columns, rows, {"repeats": args.repeats, "candidates": CANDIDATES, "cases": cases}, args.json)


if __name__ == "__main__":
    main()
