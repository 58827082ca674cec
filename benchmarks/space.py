"""How fast search spaces are: sampling, decoding with expanding, and building the slots of vectorised estimates.

`python -m benchmarks.space [--json]` prints one line per space; `--json` prints one JSON object last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nas.core.walk import expand, total_macs
from nas.space.space import SearchSpace, load_space

FOLDER = Path(__file__).parents[1] / "search_spaces"
CLASSES = 10
REPEATS = 5
NETWORKS = 200  # decoded one by one in each repeat
SAMPLES = 20_000  # sampled at once in each repeat


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """CPU seconds of each of `repeats` calls: one thread, so that other load on the machine matters little."""
    result = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        result.append(time.process_time() - start)
    return result


def measure(path: Path) -> dict[str, object]:
    """Figures of one space: medians over `REPEATS` runs, with the range of the runs for the rates."""
    rng = np.random.default_rng(0)
    space = load_space(path, CLASSES)
    genotypes = [tuple(row.tolist()) for row in space.sample_many(rng, NETWORKS)]
    candidates = [space.decode(genotype) for genotype in genotypes]
    decoded = seconds(lambda: [expand(space.decode(genotype)) for genotype in genotypes])
    encoded = seconds(lambda: [space.encode(candidate) for candidate in candidates])
    sampled = seconds(lambda: space.sample_many(rng, SAMPLES))
    built = seconds(lambda: fresh(path).slots(), 3)
    space.slots()
    extremes = seconds(lambda: (space.smallest(), space.largest()), 1)
    return {
        "space": space.name,
        "genes": len(space.genes),
        "log10_size": round(space.log10_size, 1),
        "rows_per_precision": len(space.layers(space.precisions[:1])),
        "smallest_macs": total_macs(space.decode(space.smallest())),
        "largest_macs": total_macs(space.decode(space.largest())),
        "decode_expand_per_s": [round(NETWORKS / t) for t in ordered(decoded)],
        "encode_per_s": [round(NETWORKS / t) for t in ordered(encoded)],
        "sample_per_s": [round(SAMPLES / t) for t in ordered(sampled)],
        "slots_s": round(statistics.median(built), 3),
        "extremes_s": round(extremes[0], 3),
    }


def fresh(path: Path) -> SearchSpace:
    """The space with nothing cached."""
    return load_space(path, CLASSES)


def ordered(times: list[float]) -> list[float]:
    """Median, slowest and fastest."""
    return [statistics.median(times), max(times), min(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    figures = [measure(path) for path in sorted(FOLDER.glob("*.yaml"))]
    print(f"n = {REPEATS} runs; rates: median (slowest - fastest) per CPU second; {CLASSES} classes")
    for row in figures:
        print()
        for name, value in row.items():
            text = f"{value[0]:,} ({value[1]:,} - {value[2]:,})" if isinstance(value, list) else value
            print(f"  {name:20} {text:,}" if isinstance(text, int) else f"  {name:20} {text}")
    if args.json:
        print(json.dumps({"benchmark": "space", "runs": REPEATS, "classes": CLASSES, "spaces": figures}))


if __name__ == "__main__":
    main()
