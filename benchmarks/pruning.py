"""What does a finalist lose with fewer expansion channels, and is cutting it better than training the narrow network?

For each seed one network is distilled in full (the parent), then at equal widths: cut by Taylor, L1 or at random and
distilled further, cut on the way, trained from new weights for as many epochs as a finalist, and at the cost of the
parent and its pruning together. `uniform` cuts the same share of every block. `longer` is the parent distilled
further without a cut. All of them are jobs of `nas search`; with --folder a run that was stopped goes on.

Run: python -m benchmarks.pruning [--set KEY=VALUE] [--share 0.3] [--seeds 3] [--folder DIR] [--table] [--json]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from nas.cli.output import Console, Reporter
from nas.compress.prune import BlockImportance, choose_widths, prunable, removed_share, with_widths
from nas.core.jsonio import read_record
from nas.core.records import Candidate
from nas.core.walk import expand, total_macs
from nas.recipe.context import open_context
from nas.recipe.finish import PARENT, FinishJob, adopt_parent, finish_student, load_finished
from nas.recipe.pruning import (
    IMPORTANCE_FILE,
    importance_file,
    importance_of,
    narrowed_student,
    read_importance,
    unfolded_student,
    write_importance,
)
from nas.recipe.records import FinishedStudent, read_scored
from nas.recipe.settings import PruneMode, PruneSettings
from nas.search.experiment import Experiment, load_experiment
from nas.search.folder import RunFolder
from nas.search.predictor import Predictor
from nas.search.prepare import Inputs, load_inputs, open_table, prepare_training
from nas.search.pruning import width_costs
from nas.train.evaluate import predict_logits, recalibrate_bn

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
INT8 = "int8"


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all arms share; `costs` are by block and width, in ms from a table or in MACs."""

    experiment: Experiment
    reporter: Reporter
    folder: Path
    context: str
    parent: Candidate
    share: float
    costs: dict[str, dict[int, float]]

    def job(self, arm: str, candidate: Candidate, seed: int, **changes: Any) -> FinishJob:
        """A finalist of the experiment's recipe, in a folder of its own."""
        home = self.folder / f"seed-{seed}" / arm
        e = self.experiment
        quantised = candidate.with_precision(INT8).precisions
        plain = FinishJob(
            candidate,
            self.context,
            str(home),
            str(self.folder / "stop"),
            e.distill,
            seed,
            e.finish.calibration_images,
            (quantised,),
        )
        return replace(plain, **changes)

    def finished(self, arm: str, seed: int) -> FinishedStudent:
        """The record of an arm that came to its end."""
        return read_record(FinishedStudent, self.folder / f"seed-{seed}" / arm / "finished.json")

    def run(self, arm: str, seed: int, job: FinishJob) -> None:
        """An arm to its end, unless it is there."""
        finish_student(job)
        top1 = accuracy(Path(job.folder), "test-fp32")
        self.reporter.say(f"seed {seed} {arm}: {100 * top1:.2f} % on test, {self.finished(arm, seed).cost_s:.0f} CPU s")


def accuracy(folder: Path, name: str) -> float:
    """Share of right answers of the head of a finished student, such as on `test-fp32`."""
    scored = read_scored(folder, f"final-{name}")
    assert scored is not None
    return scored.top1[-1]


def macs_costs(candidate: Candidate) -> dict[str, dict[int, float]]:
    """Multiply-adds of each block by its width, where there is no table."""
    return {
        name: {
            width: float(replace(layer, expanded_channels=width).macs)
            for width in range(-(-layer.expanded_channels // 4), layer.expanded_channels + 1)
            if width != layer.in_channels
        }
        for name, layer in prunable(candidate).items()
    }


def uniform(candidate: Candidate, share: float) -> Candidate:
    """The same share of every block; as many channels as its input has are one more."""
    widths = {}
    for name, layer in prunable(candidate).items():
        width = round((1 - share) * layer.expanded_channels)
        widths[name] = width + 1 if width == layer.in_channels else width
    return with_widths(candidate, widths)


def run_seed(bench: Bench, seed: int) -> dict[str, Any]:
    """All arms of a seed; their figures."""
    settings = bench.experiment.finish.pruning
    parent = Path(bench.job("parent", bench.parent, seed).folder)
    bench.run("parent", seed, bench.job("parent", bench.parent, seed, importance="taylor"))
    taylor = read_importance(parent / importance_file("taylor"))
    narrow = with_widths(bench.parent, choose_widths(taylor, bench.costs, bench.share))
    rng = np.random.default_rng([seed, 7])
    context = open_context(bench.context, bench.parent.resolution)
    whole = unfolded_student(bench.parent, load_finished(parent)[0], context.targets)
    blind = {n: BlockImportance(rng.random(len(b.channels)), rng.random(len(b.squeeze))) for n, b in taylor.items()}
    by_size = importance_of(whole, "l1", context.targets, bench.experiment.distill)
    alike = uniform(bench.parent, bench.share)
    arms: dict[str, tuple[Candidate, dict[str, BlockImportance], PruneMode]] = {
        "taylor": (narrow, taylor, "after"),
        "l1": (narrow, by_size, "after"),
        "random": (narrow, blind, "after"),
        "joint": (narrow, taylor, "joint"),
        "uniform": (alike, taylor, "after"),
        "longer": (bench.parent, taylor, "after"),
    }
    figures: dict[str, Any] = {"parent": row(bench, "parent", seed)}
    for arm, (target, importance, mode) in arms.items():
        job = bench.job(arm, target, seed, parent=bench.parent.arch_id, prune=replace(settings, mode=mode))
        adopt_parent(parent, Path(job.folder), "taylor")
        write_importance(Path(job.folder) / f"{PARENT}{IMPORTANCE_FILE}", importance)
        bench.run(arm, seed, job)
        cut = narrowed_student(whole, target, importance)
        recalibrate_bn(cut, context.sample, context.mean, context.std)
        raw = predict_logits(cut, context.test, context.mean, context.std)[-1]
        figures[arm] = row(bench, arm, seed) | {"before": float((raw.argmax(1) == context.test_labels).mean())}
    figures |= from_scratch(bench, narrow, seed)
    return {"seed": seed, "arms": figures, "widths": {n: x.expanded_channels for n, x in prunable(narrow).items()}}


def from_scratch(bench: Bench, narrow: Candidate, seed: int) -> dict[str, Any]:
    """The narrow network from new weights: as any finalist, and at the cost of parent and pruning together.

    Cost is multiply-adds times epochs: the CPU seconds of a machine that others use too differ by a third.
    """
    bench.run("scratch", seed, bench.job("scratch", narrow, seed))
    spent = sum(total_macs(d.candidate) * d.epochs for d in (bench.finished(a, seed) for a in ("parent", "taylor")))
    epochs = round(spent / total_macs(narrow))
    arm, distill = f"scratch-{epochs}", replace(bench.experiment.distill, epochs=epochs)
    bench.run(arm, seed, bench.job(arm, narrow, seed, distill=distill))
    return {"scratch": row(bench, "scratch", seed), "scratch_equal": row(bench, arm, seed)}


def row(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """Figures of one arm of one seed."""
    folder, done = bench.folder / f"seed-{seed}" / arm, bench.finished(arm, seed)
    parent_s = bench.finished("parent", seed).cost_s if done.pruning else 0.0
    costs = [bench.costs.get(x.name, {}).get(x.expanded_channels, float(x.macs)) for x in expand(done.candidate)]
    return {
        "test": accuracy(folder, "test-fp32"),
        "val": accuracy(folder, "val-fp32"),
        "test_int8": accuracy(folder, f"test-{INT8}"),
        "epochs": done.epochs,
        "cpu_s": done.cost_s,
        "total_cpu_s": done.cost_s + parent_s,
        "removed": removed_share(bench.parent, done.candidate),
        "macs": total_macs(done.candidate),
        "blocks_cost": sum(c for x, c in zip(expand(done.candidate), costs, strict=True) if x.name in bench.costs),
    }


def middle(inputs: Inputs) -> Candidate:
    """A network of the space without exits, halfway between its smallest and its largest in multiply-adds."""
    space = inputs.space
    drawn = [space.decode(tuple(g)) for g in space.sample_many(np.random.default_rng(0), 512).tolist()]
    plain = [replace(c, exits=()).architecture for c in drawn]
    ends = [total_macs(space.decode(g)) for g in (space.smallest(), space.largest())]
    return min(plain, key=lambda c: abs(total_macs(c) - sum(ends) / 2))


def main() -> None:
    """Runs all seeds, then prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space, data and recipe")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--share", type=float, default=0.3, help="of the expansion channels (default 0.3)")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--folder", type=Path, help="keeps students, so that a stopped run goes on")
    options.add_argument("--table", action="store_true", help="measure rows on the experiment's device; else MACs")
    args = options.parse_args()
    experiment = load_experiment(args.experiment, args.sets)
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nas-pruning-")))
        folder.mkdir(parents=True, exist_ok=True)
        reporter = stack.enter_context(Console(as_json=True).reporter())
        inputs = load_inputs(experiment, reporter)
        _, _, context = prepare_training(inputs, RunFolder(folder), reporter)
        parent = middle(inputs)
        costs = macs_costs(parent)
        if args.table:
            table = open_table(experiment, inputs.device.profile)
            predictor = Predictor(inputs.space, table, inputs.device, reporter)
            predictor.prepare()
            costs = width_costs(predictor, parent, experiment.finish.prune_rows)
        bench = Bench(experiment, reporter, folder, context, parent, args.share, costs)
        seeds = [run_seed(bench, seed) for seed in range(args.seeds)]
        _report(args, bench, experiment.finish.pruning, seeds)


def _report(args: Any, bench: Bench, settings: PruneSettings, seeds: list[dict[str, Any]]) -> None:
    rows, summary = [], {}
    for arm in seeds[0]["arms"]:
        each = [s["arms"][arm] for s in seeds]
        lost = [100 * (s["arms"]["parent"]["test"] - s["arms"][arm]["test"]) for s in seeds]
        mean = {key: statistics.fmean(e[key] for e in each) for key in each[0]}
        spread = statistics.stdev(lost) if len(lost) > 1 else 0.0
        summary[arm] = {**mean, "lost_points": statistics.fmean(lost), "lost_std": spread, "n": len(lost)}
        rows.append(
            (
                arm,
                round(100 * mean["test"], 2),
                f"{statistics.fmean(lost):+.2f} +- {spread:.2f}",
                round(100 * mean.get("before", mean["test"]), 1),
                round(100 * mean["test_int8"], 2),
                round(100 * mean["removed"], 1),
                round(mean["macs"] / 1e6, 3),
                round(mean["epochs"], 1),
                round(mean["total_cpu_s"]),
            )
        )
    cost = "ms from a table" if args.table else "MACs"
    title = (
        f"{bench.experiment.name}, {args.share:g} of the expansion channels by {cost}, {settings.epochs} epochs after "
        f"the cut, lr {settings.lr:g}, parent of {bench.experiment.distill.epochs} epochs, {len(seeds)} seeds, on test"
    )
    shown = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    document = {"options": shown, "costs": cost, "summary": summary, "seeds": seeds}
    columns = ("arm", "test %", "points lost", "% before", "int8 %", "% cut", "M MACs", "epochs", "CPU s in all")
    common.report(title, columns, rows, document, args.json)


if __name__ == "__main__":
    sys.exit(main())
