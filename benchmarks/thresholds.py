"""Threshold vectors per second: the exact sweep against one vector after another, on made-up logits.

Run: python -m benchmarks.thresholds [--json]
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import conditions, cpu_seconds, parser
from nas.latency.exits import confidences, exit_taken, solve_for_loss, sweep

IMAGES = 3000
CLASSES = 10
CASES = ((3, 400), (4, 20), (4, 40), (4, 60), (5, 30))  # exits with the head, threshold values per exit


def made_logits(exits: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits [E, N, K] and labels [N] whose later exits are surer and more often right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, IMAGES)
    logits = rng.normal(0, 1.5, (exits, IMAGES, CLASSES)).astype(np.float32)
    logits[:, np.arange(IMAGES), labels] += np.linspace(1.0, 4.0, exits, dtype=np.float32)[:, None]
    return logits, labels


def run_case(exits: int, grid: int, repeats: int, single: int) -> dict[str, Any]:
    """Figures of one case; `single` vectors are evaluated one by one and must agree with the sweep."""
    logits, labels = made_logits(exits, seed=exits)
    cost = np.cumsum(np.linspace(0.4, 1.0, exits))
    swept = sweep(logits, labels, cost, grid)
    seconds = cpu_seconds(lambda: sweep(logits, labels, cost, grid), repeats)
    solve = cpu_seconds(lambda: solve_for_loss(swept, 0.005), repeats)
    front = cpu_seconds(swept.front, repeats)

    chosen = np.random.default_rng(0).choice(swept.vectors, size=min(single, swept.vectors), replace=False)
    vectors = [swept.setting(int(i)) for i in chosen]
    conf, right = confidences(logits), logits.argmax(axis=2) == labels
    images = np.arange(IMAGES)

    start = time.process_time()
    found = [int(right[exit_taken(conf, v.thresholds), images].sum()) for v in vectors]
    one_s = time.process_time() - start
    wrong = sum(a != v.right for a, v in zip(found, vectors, strict=True))

    rates = sorted(swept.vectors / s for s in seconds)
    return {
        "exits": exits,
        "grid": grid,
        "vectors": swept.vectors,
        "sweep_cpu_ms": statistics.median(seconds) * 1e3,
        "vectors_per_s": statistics.median(rates),
        "vectors_per_s_min": rates[0],
        "vectors_per_s_max": rates[-1],
        "solve_cpu_ms": statistics.median(solve) * 1e3,
        "front_cpu_ms": statistics.median(front) * 1e3,
        "one_by_one_per_s": len(vectors) / one_s,
        "one_by_one_vectors": len(vectors),
        "disagreements": wrong,
    }


def main() -> None:
    """Prints a table, or with --json one object."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=15, help="timed repeats per case (default 15)")
    args = options.parse_args()
    rows = [run_case(exits, grid, args.repeats, single=2000) for exits, grid in CASES]
    print(f"{IMAGES} images, {CLASSES} classes, {args.repeats} repeats, CPU time of one thread; median (min to max)")
    print("exits  grid    vectors  sweep ms  million vectors/s     solve ms  front ms  one by one/s  disagree")
    for r in rows:
        rate = (
            f"{r['vectors_per_s'] / 1e6:.1f} ({r['vectors_per_s_min'] / 1e6:.1f} to {r['vectors_per_s_max'] / 1e6:.1f})"
        )
        print(
            f"{r['exits']:5d} {r['grid']:5d} {r['vectors']:10,d} {r['sweep_cpu_ms']:9.1f}  {rate:20s}"
            f" {r['solve_cpu_ms']:9.1f} {r['front_cpu_ms']:9.1f} {r['one_by_one_per_s']:13,.0f} {r['disagreements']:9d}"
        )
    if args.json:
        print(
            json.dumps({**conditions(), "images": IMAGES, "classes": CLASSES, "repeats": args.repeats, "cases": rows})
        )


if __name__ == "__main__":
    main()
