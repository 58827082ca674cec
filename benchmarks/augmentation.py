"""Which changes of training images help a student on photographs, and can search validation tell?

    python -m benchmarks.augmentation --data DIR [--folder DIR] [--seeds 2] [--epochs 100] [--arms NAME ...] [--json]

The middle student of `small-64` is distilled with each kind of augmentation, once with search-validation images that
are taken at random from the training images and once with the last of each class by name (`data.division`). Teachers
are trained with the same augmentation. A validation that is worth choosing by puts the arms in the order of the test
images; `rank` is the Spearman correlation of both over the arms. Calls with the same DIR go on where the last stopped.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks.common import parser, report
from benchmarks.distillation import HARD, student_of
from nas.core.jsonio import content_hash, read_record, write_record
from nas.data import AugmentSettings, Dataset, DataSettings, load_dataset
from nas.data.records import Division
from nas.latency.ranks import rank_correlation
from nas.train.evaluate import predict_logits, top1
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.targets import make_targets
from nas.train.teacher import prepare_teacher
from nas.train.trainer import new_student, train_student

FLIPS = {"vertical_flip": True}
LIGHT = {"brightness": 0.2, "contrast": 0.2}
ARMS: Mapping[str, AugmentSettings] = {
    "flips": AugmentSettings(**FLIPS),
    "flips + turns": AugmentSettings(**FLIPS, quarter_turns=True),
    "flips + shift": AugmentSettings(**FLIPS, shift=0.12),
    "flips + light": AugmentSettings(**FLIPS, **LIGHT),
    "flips + shift + light": AugmentSettings(**FLIPS, shift=0.12, **LIGHT),
    "flips + cutout": AugmentSettings(**FLIPS, cutout=0.3),
    "all": HARD,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training: accuracies (ratios) of the student's head and of its teacher, and CPU seconds of the student."""

    val: float
    test: float
    teacher_test: float
    cpu_s: float


def trained(dataset: Dataset, seed: int, epochs: int, folder: Path) -> Run:
    """The figures of one training, from the folder where they are."""
    distill = DistillSettings(epochs=epochs, batch_size=32, lr=0.015, variants=12)
    teacher = TeacherSettings(epochs=60, batch_size=32, threads=1)
    kept = folder / "runs" / f"{content_hash([dataset.sha256, dataset.augment, teacher, distill, seed], 16)}.json"
    if kept.exists():
        return read_record(Run, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = prepare_teacher(dataset, teacher, folder)
    targets = make_targets(found, dataset, distill.variants, folder)
    student = new_student(student_of("small-64", "middle", dataset.num_classes), seed)
    history = train_student(student, targets, distill, seed=seed)

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        return top1(predict_logits(student, images, dataset.mean, dataset.std)[-1], labels)

    run = Run(
        accuracy(dataset.val.images, dataset.val.labels),
        accuracy(dataset.test.images, dataset.test.labels),
        found.test_accuracy,
        history.cpu_s,
    )
    write_record(kept, run)
    return run


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--data", required=True, help="folder of photographs, one sub-folder per class, with a test split"
    )
    options.add_argument("--folder", type=Path, help="keeps everything, so that the next call goes on")
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--divisions", nargs="+", choices=get_args(Division), default=get_args(Division))
    options.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    args = options.parse_args()
    rows, document = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for division in args.divisions:
            dataset = load_dataset(DataSettings(name="folder", path=args.data, division=division), 64)
            own: dict[str, list[Run]] = {arm: [] for arm in args.arms}
            for seed in range(args.seeds):
                for arm in args.arms:
                    changed = replace(dataset, augment=ARMS[arm])
                    run = trained(changed, seed, args.epochs, args.folder or Path(temporary))
                    own[arm].append(run)
                    text = f"{division}, seed {seed}, {arm}: {100 * run.val:.1f} % on validation, {run.cpu_s:.0f} CPU s"
                    print(text, file=sys.stderr, flush=True)
            means = {
                arm: {
                    name: statistics.fmean(getattr(r, name) for r in runs) for name in ("val", "test", "teacher_test")
                }
                for arm, runs in own.items()
            }
            rank = rank_correlation([m["val"] for m in means.values()], [m["test"] for m in means.values()])
            document[division] = {
                "rank": rank,
                "arms": {
                    arm: {"val": [r.val for r in runs], "test": [r.test for r in runs]} for arm, runs in own.items()
                },
                "teacher_test": {arm: m["teacher_test"] for arm, m in means.items()},
            }
            rows += [
                (division, arm, *(f"{100 * m[name]:.1f}" for name in ("val", "test", "teacher_test")), f"{rank:.2f}")
                for arm, m in means.items()
            ]
    report(
        f"augmentation, {args.epochs} epochs, n = {args.seeds}",
        ("division", "arm", "val %", "test %", "teacher, test %", "rank"),
        rows,
        document,
        args.json,
    )


if __name__ == "__main__":
    main()
