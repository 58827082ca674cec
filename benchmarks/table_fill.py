"""Time to fill the latency table of a space on this machine, and how well a part of it repeats.

Run: python -m benchmarks.table_fill [--space FILE] [--rows N] [--repeat 400] [--json]

All rows of the space are measured into a temporary table (`--rows N`: so many of them, drawn at random; the time of
all is then reckoned from them and named so). `--repeat` rows are measured a second time into another table: the median
difference says what a row of this machine is worth.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions, parser, report
from nas.core.records import LayerSpec
from nas.devices import open_device
from nas.devices.base import Device
from nas.latency.table import LatencyTable
from nas.measure.fill import FillProgress, FillReport, fill
from nas.space.space import load_space

GOAL_S, GOAL_REPEAT = 180.0, 0.02
CLASSES = 10


def told(p: FillProgress) -> None:
    """Shows how far filling is."""
    if p.done % 100 == 0 or p.done == p.total:
        rest = "" if p.remaining_s is None else f", about {p.remaining_s:.0f} s left"
        print(f"\r  rows: {p.done} of {p.total}, {p.unstable} disturbed{rest}   ", end="", file=sys.stderr, flush=True)


def filled(folder: Path, device: Device, rows: list[LayerSpec]) -> tuple[LatencyTable, FillReport]:
    """A new table with these rows."""
    table = LatencyTable.open(folder, device.profile)
    found = fill(table, device, rows, progress=told)
    print(file=sys.stderr)
    return table, found


def differences(a: LatencyTable, b: LatencyTable) -> list[float]:
    """Relative differences of the rows that both tables have."""
    common = [key for key in b.rows if a.has_row(key) and b.has_row(key)]
    return [abs(b.row_ms(key) / a.row_ms(key) - 1) for key in common]


def main() -> None:
    """Measures and prints a table, or with --json one object."""
    options = parser(__doc__)
    options.add_argument("--space", type=Path, default=Path("search_spaces/mobilenetv3-64.yaml"), help="search space")
    options.add_argument("--rows", type=int, help="measure so many random rows only")
    options.add_argument("--repeat", type=int, default=400, help="rows measured a second time (default 400)")
    args = options.parse_args()
    device = open_device("cpu")
    space = load_space(args.space, CLASSES, device.profile.precisions)
    every = list(space.layers())
    rows = every if args.rows is None else random.Random(0).sample(every, min(args.rows, len(every)))
    before = conditions()
    calm = device.calm()
    with tempfile.TemporaryDirectory(prefix="nas-table-fill-") as temporary:
        table, found = filled(Path(temporary) / "first", device, rows)
        again = random.Random(1).sample(rows, min(args.repeat, len(rows)))
        second, _ = filled(Path(temporary) / "second", device, again)
        apart = differences(table, second)
    each_ms = 1e3 * found.seconds / max(1, found.measured)
    whole_s = found.seconds if args.rows is None else each_ms * len(every) / 1e3
    document: dict[str, Any] = {
        "space": space.name,
        "device": device.profile.name,
        "rows_of_space": len(every),
        "rows_measured": found.measured,
        "seconds": found.seconds,
        "ms_per_row": each_ms,
        "whole_table_s": whole_s,
        "is_whole_table_measured": args.rows is None,
        "disturbed": len(found.unstable),
        "failed": len(found.failed),
        "repeated_rows": len(apart),
        "difference_median": float(np.median(apart)),
        "difference_90": float(np.quantile(apart, 0.9)),
        "calm_checks_rejected": calm.rejected_share,
        "conditions": before,
    }
    kind = "measured" if args.rows is None else f"reckoned from {found.measured}"
    lines = [
        ["whole table", f"{len(every)} rows", f"{whole_s:.0f} s ({kind})", f"{GOAL_S:.0f} s"],
        ["a row", f"n {found.measured}", f"{each_ms:.1f} ms", ""],
        ["disturbed rows", f"n {found.measured}", str(len(found.unstable)), ""],
        ["measured twice, median", f"n {len(apart)}", f"{document['difference_median']:.2%}", f"{GOAL_REPEAT:.0%}"],
        ["measured twice, 90 %", f"n {len(apart)}", f"{document['difference_90']:.2%}", ""],
    ]
    title = f"{space.name} on {device.profile.name}; calm checks rejected: {calm.rejected_share:.0%}"
    report(title, ["what", "of", "found", "goal when idle"], lines, document, args.json)


if __name__ == "__main__":
    main()
