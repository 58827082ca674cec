"""What does each way of distilling gain over labels alone, at equal epochs, on paired seeds?

    python -m benchmarks.distillation [--folder DIR] [--data DIR] [--seeds 3] [--epochs 12] [--student middle]
        [--arms NAME ...] [--json]

Every arm trains the same student from the same weights on the same augmented images in the same order for the same
epochs, once for each seed; arms differ in the settings of `ARMS` only. `labels` has no teacher, `kd` is logit
distillation with the defaults, the others add one thing to it. Figures are accuracies of the head on the test split,
those on search validation beside them, and on test images with a corruption of severity 3 (mean of six). Gains are
paired with `kd`, that of `kd` with `labels`; +- is the standard error of the mean difference.

Images are the embedded set at 32 px, or with `--data` a folder of photographs at 64 px with hard augmentation. Calls
with the same DIR go on where the last one stopped: teachers, targets, every epoch and every figure are kept there.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, report
from nas.core.jsonio import content_hash, read_record, write_record
from nas.core.records import Candidate
from nas.core.walk import total_macs
from nas.data import AugmentSettings, Dataset, DataSettings, load_dataset
from nas.data.corruptions import CORRUPTIONS, corrupted
from nas.recipe.supernet import all_exits, exit_heads
from nas.space.space import load_space
from nas.train.evaluate import predict_logits, top1
from nas.train.features import wanted_features
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.targets import Targets, make_targets
from nas.train.teacher import Teacher, prepare_teacher
from nas.train.trainer import new_student, train_student

SPACES = Path(__file__).parents[1] / "search_spaces"
CORRUPTED_IMAGES, SEVERITY = 1000, 3
HARD = AugmentSettings(shift=0.12, vertical_flip=True, quarter_turns=True, brightness=0.3, contrast=0.3, cutout=0.3)
# `long-` has twice the epochs; `camera-` learns from corrupted images too.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "labels": {"alpha": 0.0},
    "kd": {},
    "kd-T1": {"temperature": 1.0},
    "kd-T6": {"temperature": 6.0},
    "kd-alpha.9": {"alpha": 0.9},
    "kd-alpha1": {"alpha": 1.0},
    "hints": {"hints": 1.0},
    "attention": {"attention": 3.0},
    "attention + curriculum": {"attention": 3.0, "curriculum": 0.4},
    "dist": {"alpha": 0.0, "dist_inter": 2.0, "dist_intra": 2.0},
    "kd+dist": {"dist_inter": 1.0, "dist_intra": 1.0},
    "self": {"self_distillation": 0.5},
    "curriculum": {"curriculum": 0.4},
    "mining": {"mining": 0.3},
    "long-labels": {"alpha": 0.0},
    "long-kd": {},
    "camera-labels": {"alpha": 0.0},
    "camera-kd": {},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training: accuracies (ratios) of the head, those of every exit on test, and CPU seconds."""

    arm: str
    seed: int
    val: float
    test: float
    corrupted: float
    exits: tuple[float, ...]
    cpu_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all runs share; `targets` are those of `kd` and, under `camera`, with corruptions among the changes."""

    dataset: Dataset
    teacher: Teacher
    candidate: Candidate
    targets: Mapping[bool, Targets]
    settings: DistillSettings
    bad: tuple[np.ndarray, ...]
    folder: Path


def prepare(args: Any, folder: Path) -> Bench:
    """Data, teacher and student of a call."""
    if args.data is None:
        data, side, space = DataSettings(train_images=args.train_images), 32, "tiny-32"
        teacher = TeacherSettings(epochs=10, batch_size=64, threads=1)
        settings = DistillSettings(epochs=args.epochs, batch_size=64, lr=0.02, variants=6)
    else:
        data, side, space = DataSettings(name="folder", path=args.data, augment=HARD), 64, "small-64"
        teacher = TeacherSettings(epochs=60, batch_size=32, threads=1)
        settings = DistillSettings(epochs=args.epochs, batch_size=32, lr=0.015, variants=12)
    dataset = load_dataset(data, side)
    print(f"data {dataset.name}, {len(dataset.train)} training images; teacher ...", file=sys.stderr, flush=True)
    found = prepare_teacher(dataset, teacher, folder, lambda a, b: print(f"teacher {a}/{b}", file=sys.stderr))
    with_maps = wanted_features(found, replace(settings, hints=1.0, attention=1.0))
    camera = replace(dataset, augment=replace(data.augment, corruptions=CORRUPTIONS, max_severity=3))
    targets = {False: make_targets(found, dataset, settings.variants, folder, features=with_maps)}
    if any(name.startswith("camera-") for name in args.arms):
        targets[True] = make_targets(found, camera, settings.variants, folder)
    test = dataset.test.images[:CORRUPTED_IMAGES]
    bad = tuple(
        corrupted(test, name, SEVERITY, np.random.default_rng(number)) for number, name in enumerate(CORRUPTIONS)
    )
    return Bench(dataset, found, student_of(space, args.student, dataset.num_classes), targets, settings, bad, folder)


@cache
def student_of(space: str, size: str, classes: int) -> Candidate:
    """Smallest or largest network of a space, or that with the median multiply-adds of 200, with every exit."""
    found = load_space(SPACES / f"{space}.yaml", classes)
    rng = np.random.default_rng(0)
    middle = sorted((found.decode(found.sample(rng)) for _ in range(200)), key=lambda c: total_macs(c.architecture))
    chosen = {
        "smallest": found.decode(found.smallest()),
        "middle": middle[100],
        "largest": found.decode(found.largest()),
    }
    return replace(chosen[size].architecture, exits=all_exits(exit_heads(found), np.random.default_rng(0)))


def trained(bench: Bench, arm: str, seed: int) -> Run:
    """The figures of one training, from the folder where they are."""
    settings = replace(bench.settings, **ARMS[arm])
    if arm.startswith("long-"):
        settings = replace(settings, epochs=2 * settings.epochs)
    targets = bench.targets[arm.startswith("camera-")]
    key = content_hash([settings, targets.key, bench.candidate, arm, seed], 16)
    kept = bench.folder / "runs" / f"{key}.json"
    if kept.exists():
        return read_record(Run, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    student = new_student(bench.candidate, seed)
    checkpoint = kept.with_suffix(".ckpt")
    history = train_student(student, targets, settings, seed=seed, checkpoint=checkpoint)

    def logits(images: np.ndarray) -> np.ndarray:
        return predict_logits(student, images, bench.dataset.mean, bench.dataset.std)

    dataset = bench.dataset
    test = [top1(z, dataset.test.labels) for z in logits(dataset.test.images)]
    labels = dataset.test.labels[:CORRUPTED_IMAGES]
    run = Run(
        arm,
        seed,
        top1(logits(dataset.val.images)[-1], dataset.val.labels),
        test[-1],
        statistics.fmean(top1(logits(images)[-1], labels) for images in bench.bad),
        tuple(test),
        history.cpu_s,
    )
    write_record(kept, run)
    checkpoint.unlink(missing_ok=True)
    return run


def compared_with(arm: str) -> str:
    """The arm that an arm's gain is counted against."""
    beginning = "long-" if arm.startswith("long-") else "camera-" if arm.startswith("camera-") else ""
    return f"{beginning}labels" if arm == f"{beginning}kd" else "kd"


def gain(runs: Sequence[Run], others: Sequence[Run], figure: str) -> tuple[float, float, int]:
    """Mean difference of seeds that both have, its standard error and the number of pairs, in points."""
    base = {run.seed: getattr(run, figure) for run in others}
    each = [100 * (getattr(run, figure) - base[run.seed]) for run in runs if run.seed in base]
    if not each:
        return float("nan"), float("nan"), 0
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    return statistics.fmean(each), error, len(each)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="keeps everything, so that the next call goes on")
    options.add_argument("--data", help="folder of images, one sub-folder per class; the embedded set without")
    options.add_argument("--train-images", type=int, default=4000, help="of the embedded set")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--student", choices=("smallest", "middle", "largest"), default="middle")
    options.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = prepare(args, args.folder or Path(temporary))
        runs: dict[str, list[Run]] = {arm: [] for arm in args.arms}
        for seed in range(args.seeds):  # all arms of a seed before the next one: what is there can be compared
            for arm in args.arms:
                runs[arm].append(trained(bench, arm, seed))
                last = runs[arm][-1]
                print(
                    f"seed {seed} {arm}: {100 * last.test:.2f} %, {last.cpu_s:.1f} CPU s", file=sys.stderr, flush=True
                )
    arms = {arm: figures(runs, arm) for arm in args.arms}
    document = {
        "data": bench.dataset.name,
        "train_images": len(bench.dataset.train),
        "teacher_test": bench.teacher.test_accuracy,
        "student": args.student,
        "macs": total_macs(bench.candidate.architecture),
        "epochs": args.epochs,
        "seeds": args.seeds,
        "arms": arms,
    }
    rows = [
        (
            arm,
            f"{a['test_mean']:.2f}",
            f"{a['test_std']:.2f}",
            f"{a['gain']:+.2f} +- {a['gain_error']:.2f} ({a['against']})" if a["pairs"] else "-",
            f"{a['gain_val']:+.2f}" if a["pairs"] else "-",
            f"{a['corrupted_mean']:.2f}",
            f"{a['cpu_s']:.1f}",
        )
        for arm, a in arms.items()
    ]
    report(
        f"{document['data']}, {args.student} student of {document['macs'] / 1e6:.2f} M MACs, {args.epochs} epochs, "
        f"teacher {100 * bench.teacher.test_accuracy:.2f} %, n = {args.seeds}",
        ("arm", "test %", "std", "gain, points", "on val", "corrupted %", "CPU s"),
        rows,
        document,
        args.json,
    )


def figures(runs: Mapping[str, Sequence[Run]], arm: str) -> dict[str, Any]:
    """Means and spreads of an arm, and its paired gain, in percent and points."""
    own, against = runs[arm], compared_with(arm)
    others = runs.get(against, ()) if arm != against else ()
    mean, error, pairs = gain(own, others, "test")
    tests = [100 * run.test for run in own]
    return {
        "test_mean": statistics.fmean(tests),
        "test_std": statistics.stdev(tests) if len(tests) > 1 else float("nan"),
        "test": [round(value, 3) for value in tests],
        "exits_mean": [100 * statistics.fmean(values) for values in zip(*(run.exits for run in own), strict=True)],
        "corrupted_mean": 100 * statistics.fmean(run.corrupted for run in own),
        "against": against,
        "pairs": pairs,
        "gain": mean,
        "gain_error": error,
        "gain_val": gain(own, others, "val")[0],
        "gain_corrupted": gain(own, others, "corrupted")[0],
        "cpu_s": statistics.fmean(run.cpu_s for run in own),
    }


if __name__ == "__main__":
    main()
