"""The default experiment from nothing: wall time, memory, teacher, front, best student at a tenth of its latency.

    python -m benchmarks.quickstart [--runs 3] [--set KEY=VALUE] [--json]

Goals: at most 300 s and 3 GB on 2 idle cores; teacher at least 95 % on test; 5 finished students on the front; one
keeps 98 % of the teacher's accuracy at a tenth of its ONNX Runtime latency or less.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import parser, report, spread
from benchmarks.whole_run import figures, search

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=3, help="whole searches, each with its own seed")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    args = options.parse_args()
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
