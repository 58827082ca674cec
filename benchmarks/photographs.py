"""The search on a folder of real photographs, from nothing: time, memory, teacher, best student at a tenth of it.

    python -m benchmarks.photographs --data DIR [--runs 1] [--set KEY=VALUE] [--json]

Goals (NEU-DET, 64 px): at most 600 s; teacher at least 97 % on test; a student within 1 point of it at a tenth of its
ONNX Runtime latency or less.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import parser, report, spread
from benchmarks.whole_run import figures, search

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "surface-inspection.yaml"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=1, help="whole searches, each with its own seed")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--data", required=True, help="folder of images, one sub-folder per class")
    args = options.parse_args()
    args.sets.append(f"data.path={args.data}")
    runs = []
    for seed in range(args.runs):
        runs.append(figures(search(EXPERIMENT, args.sets, seed)))
        print(f"seed {seed}: {runs[-1]}", flush=True)
    names = [name for name, value in runs[0].items() if not isinstance(value, bool)]
    rows = [[name, *(spread([run[name] for run in runs])[key] for key in ("median", "min", "max"))] for name in names]
    report(
        f"{EXPERIMENT.stem}, {len(runs)} runs",
        ("figure", "median", "min", "max"),
        rows,
        {"runs": runs, "sets": args.sets},
        args.json,
    )


if __name__ == "__main__":
    main()
