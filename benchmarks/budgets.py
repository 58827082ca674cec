"""Ten budgets, ten packages: does each one keep its budget when it is measured again?

    python -m benchmarks.budgets --run RUN [--budgets 10] [--json]

RUN is a finished search. Budgets are spread over the latencies of its finished students; a package is exported for
each as `nas export RUN --best-under` does, then measured in fresh sessions. Goal: all medians within their budgets.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, report
from nas.core.errors import BudgetError
from nas.core.run import latency_of
from nas.devices import open_device
from nas.devices.base import MeasureJob
from nas.export.forms import path_models
from nas.export.manifest import path_latency
from nas.search.exporting import export_student
from nas.search.view import load_view

HEADROOM = 1.1  # a budget closer to the fastest student than the noise of a host can be kept by chance only


class _Quiet:
    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def warn(self, text: str) -> None:
        print(f"  warning: {text}", flush=True)

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        pass


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--run", type=Path, required=True, help="folder of a finished search")
    options.add_argument("--budgets", type=int, default=10)
    args = options.parse_args()
    view = load_view(args.run)
    device = open_device("cpu")
    times = [latency_of(p.latency, view.budget_of) for p in view.points if p.latency.provenance == "measured"]
    # From a tenth above the fastest student to a tenth above the slowest one.
    budgets = np.geomspace(min(times) * HEADROOM, max(times) * HEADROOM, args.budgets)
    rows: list[list[Any]] = []
    kept = exported = 0
    for budget_ms in budgets:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "package"
            try:
                package = export_student(args.run, _Quiet(), best_under_ms=float(budget_ms), out=out)
            except BudgetError:  # nothing is handed out that would miss: no package, but no success either
                rows.append([float(budget_ms), "-", None, None, None, None, "no package"])
                continue
            exported += 1
            manifest = package.manifest
            models = path_models(manifest.candidate, manifest.form, (package.folder / "model.onnx").read_bytes())
            jobs = [MeasureJob(f"budget#{k}", "network", "none", model, 0) for k, model in models.items()]
            paths = [path_latency(m, k, 0.0) for m, k in zip(device.measure(jobs), models, strict=True)]
        median_ms = _limited(view.budget_of, [p.p50_ms for p in paths], [p.share for p in manifest.latency.paths])
        is_kept = bool(median_ms <= budget_ms)
        kept += is_kept
        rows.append(
            [
                float(budget_ms),
                manifest.name,
                latency_of(manifest.latency.figures, view.budget_of),
                median_ms,
                median_ms / budget_ms,
                100 * manifest.accuracy.top1,
                "kept" if is_kept else "MISSED",
            ]
        )
    report(
        f"{len(budgets)} budgets, {exported} packages, {kept} of them keep theirs ({view.budget_of} latency, median of "
        "fresh sessions)",
        ("budget ms", "student", "card ms", "median ms", "share", "test top-1 %", "budget"),
        rows,
        {"kept": kept, "exported": exported, "budgets": len(budgets), "rows": rows},
        args.json,
    )


def _limited(kind: str, medians_ms: list[float], shares: list[float]) -> float:
    """The latency that the budget limits, from the medians of the paths."""
    if kind == "worst":
        return max(medians_ms)
    if kind == "expected":
        return float(np.dot(medians_ms, shares))
    return medians_ms[int(np.argmax(np.cumsum(shares) >= 0.99 - 1e-12))]


if __name__ == "__main__":
    main()
