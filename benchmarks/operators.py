"""CPU time of each kind of block at equal width, from measured rows; and the kinds on the front of a run.

Run: python -m benchmarks.operators [--table DIR] [--run RUN] [--json]

Every kind is measured with as many input as output channels, stride 1, kernel 3, relu, and expansion 2 where the kind
expands, in fp32 and int8, at four widths and map sizes of a network for 64 px. Rows that the table has are not measured
again. With `--run` the stages of the students on the front of a finished search are counted by kind.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import parser, report
from nas.core.records import BLOCK_KINDS, KINDS_WITH_EXPANSION, BlockKind, LayerSpec, Precision
from nas.core.walk import expand
from nas.devices import open_device
from nas.latency.table import LatencyTable
from nas.measure.fill import fill
from nas.search.view import load_view

PLACES = ((16, 16), (24, 8), (48, 4), (64, 4))  # channels, side of the map in px
EXPANSION = 2


def row(kind: BlockKind, channels: int, size: int, precision: Precision) -> LayerSpec:
    """A block that keeps the shape of its input."""
    wide = EXPANSION * channels if kind in KINDS_WITH_EXPANSION else channels
    return LayerSpec(kind, channels, size, channels, size, 3, 1, wide, 0, False, "relu", precision)


def times(table: LatencyTable, precisions: tuple[Precision, ...]) -> list[dict[str, Any]]:
    """Each row with its time without the call, and how well it repeats, microseconds."""
    return [
        {
            "kind": kind,
            "channels": channels,
            "size_px": size,
            "precision": precision,
            "us": 1e3 * table.net_ms(layer.key),
            "std_us": 1e3 * table.row_std_ms(layer.key),
            "macs": layer.macs,
            "params": layer.params,
        }
        for channels, size in PLACES
        for kind in BLOCK_KINDS
        for precision in precisions
        for layer in [row(kind, channels, size, precision)]
    ]


def kinds_of_front(run: Path) -> dict[str, dict[str, int]]:
    """Students on the front by stage and kind."""
    counts: dict[str, Counter[str]] = {}
    for point in load_view(run).front:
        for layer in expand(point.candidate):
            if layer.is_block and layer.name.endswith(".0"):
                counts.setdefault(f"stage {int(layer.name.split('.')[1]) + 1}", Counter())[layer.kind] += 1
    return {stage: dict(found.most_common()) for stage, found in counts.items()}


def main() -> None:
    """Measures and prints a table, or with --json one object."""
    options = parser(__doc__)
    options.add_argument("--table", type=Path, default=Path("runs/operators-table"), help="folder of the rows' table")
    options.add_argument("--run", type=Path, help="a finished search whose front is counted")
    args = options.parse_args()
    device = open_device("cpu")
    precisions = device.profile.precisions
    table = LatencyTable.open(args.table, device.profile)
    fill(table, device, [row(kind, c, s, p) for c, s in PLACES for kind in BLOCK_KINDS for p in precisions])
    found = times(table, precisions)
    document: dict[str, Any] = {"device": device.profile.name, "rows": found}
    if args.run is not None:
        document["front"] = kinds_of_front(args.run)
    by_row = {(f["kind"], f["channels"], f["precision"]): f for f in found}
    lines = [
        [kind, f"{channels} x {size} px", by_row[kind, channels, "fp32"]["macs"]]
        + [f"{by_row[kind, channels, p]['us']:.1f} ± {by_row[kind, channels, p]['std_us']:.1f}" for p in precisions]
        for channels, size in PLACES
        for kind in BLOCK_KINDS
    ]
    for stage, kinds in document.get("front", {}).items():
        print(f"{stage}: " + ", ".join(f"{kind} {n}" for kind, n in kinds.items()))
    report(f"us on {device.profile.name}", ["kind", "map", "MACs", *precisions], lines, document, args.json)


if __name__ == "__main__":
    main()
