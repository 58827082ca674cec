"""How far interpolated convolutions are from measured ones: a fifth of a published table is held out.

Run: python -m benchmarks.interpolation --data DIR [--seed 0] [--json]

DIR holds lists of isolated convolutions as `nas table import conv-csv` reads them, one per precision, which is in the
name (*_fp32.csv.gz, ...). Batch 1, stride 1, without a fused addition, more than 3 input channels.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, report
from nas.latency.interpolate import FloatArray, deviations, interpolate_log, left_out_errors

PRECISIONS = ("fp32", "fp16", "int8")
KINDS = (("Depthwise", 3), ("Depthwise", 5), ("Regular", 1), ("Regular", 3))
GOALS = {("Depthwise", 3): 0.05, ("Depthwise", 5): 0.05, ("Regular", 1): 0.075}  # median error
CHANNELS_AND_SIZE = np.array([1.0, 1.0, 2.0])


def load(path: Path) -> list[dict[str, str]]:
    """Lines of a list of convolutions, plain or gzip."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(io.StringIO(data.decode())))


def points(lines: list[dict[str, str]], kind: str, kernel: int) -> tuple[FloatArray, FloatArray]:
    """Logarithms of shapes (in, out, size) and latencies of one family."""
    shapes, values = [], []
    for line in lines:
        if (line["conv_type"], line["kernel"], line["batch"], line["stride"]) != (kind, str(kernel), "1", "1"):
            continue
        if line["elmt_fused"] == "0" and int(line["in_c"]) > 3 and float(line["latency"]) > 0:
            shapes.append([float(line[name]) for name in ("in_c", "out_c", "in_h")])
            values.append(float(line["latency"]))
    return np.log(np.array(shapes)), np.log(np.array(values))


def judge(shapes: FloatArray, log_ms: FloatArray, kind: str, seed: int) -> dict[str, Any]:
    """Errors on the held-out fifth, and how often the error bar covers them."""
    # Depthwise convolutions have equal input and output channels: counted once in the growth.
    weights = CHANNELS_AND_SIZE * (np.array([0.5, 0.5, 1.0]) if kind == "Depthwise" else 1.0)
    order = np.random.default_rng(seed).permutation(len(shapes))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    start = time.process_time()
    guess = interpolate_log(shapes[rest], log_ms[rest], shapes[held], weights)
    seconds = time.process_time() - start
    within, beyond = deviations(*left_out_errors(shapes[rest], log_ms[rest], weights))
    error = np.abs(np.exp(guess.log_ms - log_ms[held]) - 1)
    bar = np.where(guess.is_inside, within, beyond * (1 + guess.distance))
    return {
        "known": len(rest),
        "held_out": len(held),
        "outside": int((~guess.is_inside).sum()),
        "median_error": float(np.median(error)),
        "within_10": float((error <= 0.1).mean()),
        "median_outside": float(np.median(error[~guess.is_inside])) if (~guess.is_inside).any() else None,
        "bar_inside": within,
        "bar_outside": beyond,
        "covered": float((np.abs(guess.log_ms - log_ms[held]) <= bar).mean()),
        "covered_twice": float((np.abs(guess.log_ms - log_ms[held]) <= 2 * bar).mean()),
        "seconds": seconds,
    }


def main() -> None:
    """Prints a table, or with --json one object; exit code 1 when a goal is missed."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with *_fp32.csv.gz, *_fp16..., *_int8...")
    options.add_argument("--seed", type=int, default=0, help="of the points that are held out (default 0)")
    args = options.parse_args()
    cases = []
    for precision in PRECISIONS:
        files = sorted(args.data.glob(f"*_{precision}.csv*"))
        if not files:
            print(f"error: {args.data}: no file *_{precision}.csv or .csv.gz", file=sys.stderr)
            sys.exit(2)
        lines = load(files[0])
        for kind, kernel in KINDS:
            found = judge(*points(lines, kind, kernel), kind, args.seed)
            goal = GOALS.get((kind, kernel))
            met = None if goal is None else found["median_error"] <= goal
            cases.append({"precision": precision, "kind": kind, "kernel": kernel, "goal": goal, "met": met, **found})
    columns = ("precision", "kind", "k", "known", "held out", "outside", "median error %", "within 10 %", "goal %", "met", "1 / 2 bars cover %")  # fmt: skip  # noqa: E501
    rows = [
        [
            c["precision"],
            c["kind"],
            c["kernel"],
            c["known"],
            c["held_out"],
            c["outside"],
            f"{100 * c['median_error']:.1f}",
            f"{100 * c['within_10']:.0f}",
            "-" if c["goal"] is None else f"{100 * c['goal']:g}",
            {None: "-", True: "yes", False: "NO"}[c["met"]],
            f"{100 * c['covered']:.0f} / {100 * c['covered_twice']:.0f}",
        ]
        for c in cases
    ]
    title = f"a fifth of the convolutions of batch 1 and stride 1 held out, seed {args.seed}"
    report(title, columns, rows, {"seed": args.seed, "cases": cases}, args.json)
    sys.exit(1 if any(c["met"] is False for c in cases) else 0)


if __name__ == "__main__":
    main()
