"""How much of the accuracy in fp32 does int8 keep, calibrated alone or trained for it, and is what is trained exported?

    python -m benchmarks.qat [--folder DIR] [--seeds 0 1 2] [--epochs 2] [--lr 0.1] [--images 128 8]
        [--experiment FILE] [--set KEY=VALUE] [--json]

Four students of the space are distilled per seed (`--students`): the smallest and the largest network, the smallest
with hard-swish and squeeze-and-excitation in all blocks that may have it, the largest with ReLU and without it. Each is
calibrated (`--images`: on so many images, one row each), and from there trained with simulated quantization. Accuracies
are those of the exported graph in ONNX Runtime, mean of all exits, on test. Parity compares that graph with the
simulation on the test split: the share of images of which all logits are the same to the last bit, and of equal
answers. CPU seconds are of one thread.

Calls with the same DIR go on where the last one stopped, and train nothing twice.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from nas.cli.output import Console
from nas.compress.fakequant import FakeQuantNetwork
from nas.core.jsonio import read_record, to_plain, write_record
from nas.core.records import Candidate, ExitConfig
from nas.core.walk import total_macs
from nas.data import evenly
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import ORT
from nas.recipe.context import Context, open_context
from nas.recipe.deployed import calibrated, deployed_logits
from nas.recipe.finish import FinishJob, finish_student, finished_logits, load_finished
from nas.recipe.qat import simulated_logits, train_quantized
from nas.recipe.settings import QatSettings
from nas.search.experiment import Experiment, load_experiment
from nas.search.folder import RunFolder
from nas.search.prepare import load_inputs, prepare_training
from nas.space.space import SearchSpace

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
STUDENTS = ("smallest", "hard-swish SE", "relu", "largest")


@dataclass(frozen=True, slots=True)
class Quantized:
    """An int8 network: accuracy (ratio, mean of exits) on search validation and on test, and parity on test."""

    val: float
    test: float
    same_images: float
    same_answers: float


@dataclass(frozen=True, slots=True)
class Row:
    """One student of one seed, calibrated on so many images and trained from there."""

    student: str
    seed: int
    images: int
    epochs: int
    lr: float
    macs: int
    fp32_val: float
    fp32_test: float
    ptq: Quantized
    qat: Quantized
    distil_cpu_s: float
    qat_cpu_s: float

    @property
    def kept(self) -> Quantized:
        """What a finished student gets: the better one on validation."""
        return self.qat if self.qat.val > self.ptq.val else self.ptq


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all rows share."""

    folder: Path
    context: str
    experiment: Experiment
    space: SearchSpace


def student(space: SearchSpace, name: str) -> Candidate:
    """One of `STUDENTS`, with exits after the second and the third stage."""
    genotype = list(space.largest() if name in ("relu", "largest") else space.smallest())
    for place, gene in enumerate(space.genes):
        choices = list(gene.choices)
        if gene.name.endswith("activation"):
            genotype[place] = choices.index("hard_swish" if name in ("hard-swish SE", "largest") else "relu")
        elif gene.name.endswith("use_se") and name != "largest":
            genotype[place] = choices.index(name == "hard-swish SE")
    return replace(space.decode(genotype).architecture, exits=(ExitConfig(1), ExitConfig(2)))


def measured(bench: Bench, name: str, seed: int, images: int, settings: QatSettings) -> Row:
    """One row, from its file where it is there: distils, calibrates, trains, compares."""
    file = bench.folder / f"row-{name.replace(' ', '-')}-{seed}-{images}-{settings.epochs}-{settings.lr:g}.json"
    if file.exists():
        return read_record(Row, file)
    e, candidate = bench.experiment, student(bench.space, name)
    home = bench.folder / f"students-{seed}" / candidate.arch_id
    stop = str(bench.folder / "stop")
    finished = finish_student(FinishJob(candidate, bench.context, str(home), stop, e.distill, seed, images, ()))
    context = open_context(bench.context, candidate.resolution)
    weights, _ = load_finished(home)
    quant = calibrated(candidate, weights, context.mean, context.std, evenly(context.sample, images), run_model)
    int8 = candidate.with_precision("int8")
    network = FakeQuantNetwork(int8, weights, quant, context.mean, context.std, ORT)
    before = compared(network, int8, context)
    checkpoint = home / f"{file.stem}.ckpt"
    epochs = train_quantized(network, int8, context.targets, e.distill, settings, seed=seed, checkpoint=checkpoint)
    fp32 = {split: finished_logits(home, split, ("fp32",)) for split in ("val", "test")}
    row = Row(
        name,
        seed,
        images,
        settings.epochs,
        settings.lr,
        total_macs(candidate),
        _top1(fp32["val"], context.val_labels),
        _top1(fp32["test"], context.test_labels),
        before,
        compared(network, int8, context),
        finished.steps[0].cpu_s,
        sum(epoch.cpu_s for epoch in epochs),
    )
    write_record(file, row)
    checkpoint.unlink()
    return row


def compared(network: FakeQuantNetwork, candidate: Candidate, context: Context) -> Quantized:
    """The graph exported from what the simulation holds: its accuracies, and how far both agree."""
    parts = network.weights(), network.ranges(), context.mean, context.std
    val, test = (deployed_logits(candidate, *parts, images) for images in (context.val, context.test))
    here = simulated_logits(network, context.test)
    return Quantized(
        _top1(val, context.val_labels),
        _top1(test, context.test_labels),
        float((here == test).all(axis=(0, 2)).mean()),
        float((here.argmax(2) == test.argmax(2)).mean()),
    )


def _top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(2) == labels[None]).mean())


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracies and losses of rows of one kind over seeds, in points; parity is the worse of calibrated, trained."""
    each = {
        "fp32": [100 * r.fp32_test for r in rows],
        "ptq_loss": [100 * (r.fp32_test - r.ptq.test) for r in rows],
        "qat_loss": [100 * (r.fp32_test - r.qat.test) for r in rows],
        "kept_loss": [100 * (r.fp32_test - r.kept.test) for r in rows],
        "same_images": [min(r.ptq.same_images, r.qat.same_images) for r in rows],
        "same_answers": [min(r.ptq.same_answers, r.qat.same_answers) for r in rows],
        "distil_cpu_s": [r.distil_cpu_s for r in rows],
        "qat_cpu_s": [r.qat_cpu_s for r in rows],
    }
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        | common.spread(values)
        for name, values in each.items()
    }


def groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows that differ in their seed only, with a name; then those of all students together."""
    for images in dict.fromkeys(r.images for r in rows):
        own = [r for r in rows if r.images == images]
        for name in dict.fromkeys(r.student for r in own):
            yield f"{name}, {images} images", [r for r in own if r.student == name]
        yield f"all students, {images} images", own


def main() -> None:
    """Measures all rows, then prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--folder", type=Path, help="keeps the trainings (default: a temporary folder)")
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space, data and recipe")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--students", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    options.add_argument("--images", type=int, nargs="+", default=[128, 8], help="of calibration")
    options.add_argument("--epochs", type=int, default=2, help="of quantization-aware training")
    options.add_argument("--lr", type=float, default=0.1, help="share of the learning rate of the distillation")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="nas-qat-") as scratch, Console(as_json=True).reporter() as reporter:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        inputs = load_inputs(load_experiment(args.experiment, args.sets), reporter)
        _, _, context = prepare_training(inputs, RunFolder(folder), reporter)
        bench = Bench(folder, context, inputs.experiment, inputs.space)
        cases = [(n, seed, images) for seed in args.seeds for n in args.students for images in args.images]
        rows = []
        for done, (name, seed, images) in enumerate(cases):
            reporter.progress("students", done, len(cases), f"{name}, seed {seed}, {images} images")
            rows.append(measured(bench, name, seed, images, QatSettings(args.epochs, args.lr)))
    _report(args, rows)


def _report(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    summary = {name: figures(own) for name, own in groups(rows)}
    shown = ("fp32", "ptq_loss", "qat_loss", "kept_loss", "same_images", "same_answers", "distil_cpu_s", "qat_cpu_s")
    table = [(name, len(args.seeds), *(f"{own[key]['mean']:.4g}" for key in shown)) for name, own in summary.items()]
    title = f"QAT of {args.epochs} epochs, lr {args.lr:g} of that of the distillation; points on test, mean of seeds"
    chosen = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    document = {"options": chosen, "summary": summary, "rows": [to_plain(r) for r in rows]}
    common.report(title, ("student", "seeds", *shown), table, document, args.json)


if __name__ == "__main__":
    main()
