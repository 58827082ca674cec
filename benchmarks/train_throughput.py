"""Images per CPU second of training: students from cached targets, a plain loop with an online teacher, the teacher.

The plain loop is what a first script does: default layout, the teacher asked for every batch, one optimizer kernel per
tensor. All loops use one thread, so a CPU second is what one idle core does in a second.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import parser, report, spread
from nas.core.records import Candidate
from nas.core.walk import total_macs
from nas.data import Dataset, DataSettings, load_dataset
from nas.models.student import Student
from nas.models.teachers import ResNet
from nas.space.space import SearchSpace, load_space
from nas.train.evaluate import threads
from nas.train.losses import student_loss
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.targets import Targets, make_targets
from nas.train.teacher import prepare_teacher
from nas.train.trainer import new_student, train_student

SPACE = Path(__file__).parents[1] / "search_spaces" / "tiny-32.yaml"


def students(space: SearchSpace) -> dict[str, Candidate]:
    """Smallest and largest network, and of 200 random ones that with the median number of multiply-adds."""
    rng = np.random.default_rng(0)
    found = sorted((space.decode(space.sample(rng)).architecture for _ in range(200)), key=total_macs)
    return {
        "smallest": space.decode(space.smallest()).architecture,
        "middle": found[100],
        "largest": space.decode(space.largest()).architecture,
    }


def ours(candidate: Candidate, targets: Targets, settings: DistillSettings) -> float:
    """Images per CPU second of `train_student`."""
    history = train_student(new_student(candidate, 0), targets, settings, seed=0)
    return len(targets.labels) * settings.epochs / history.cpu_s


def plain(candidate: Candidate, dataset: Dataset, settings: DistillSettings) -> float:
    """Images per CPU second of the plain loop on the same images."""
    chosen = TeacherSettings()
    torch.manual_seed(0)
    student = Student(candidate)
    teacher = ResNet(chosen.widths, chosen.blocks, len(dataset.class_names), dataset.resolution).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, foreach=False)
    images = torch.from_numpy(dataset.train.images).permute(0, 3, 1, 2).contiguous().float().div(255).sub(0.5)
    labels = torch.from_numpy(dataset.train.labels)
    started = time.thread_time()
    with threads(1):
        for _ in range(settings.epochs):
            for index in torch.randperm(len(images)).split(settings.batch_size):
                x = images[index]
                with torch.no_grad():
                    told = teacher(x)
                loss = student_loss(student(x), told, labels[index], settings)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), settings.clip_norm)
                optimizer.step()
    return len(images) * settings.epochs / (time.thread_time() - started)


def main(arguments: list[str]) -> int:
    """Measures and prints; gives the exit code."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=2048, help="training images of one epoch")
    options.add_argument("--repeats", type=int, default=3, help="repeats of each figure")
    chosen = options.parse_args(arguments)
    dataset = load_dataset(DataSettings(train_images=chosen.images, val_images=256, test_images=256), 32)
    settings = DistillSettings(epochs=2, variants=1)
    teacher_rates, target_rates = [], []
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        for repeat in range(chosen.repeats):
            asked = TeacherSettings(epochs=1, threads=1, seed=repeat)
            teacher = prepare_teacher(dataset, asked, Path(folder))
            teacher_rates.append(chosen.images / teacher.cpu_s)
            started = time.process_time()
            targets = make_targets(teacher, dataset, 1, Path(folder))
            target_rates.append(chosen.images / (time.process_time() - started))
        measured: dict[str, dict[str, Any]] = {
            "teacher, training": {"macs": teacher.macs, "ours": spread(teacher_rates)},
            "teacher, targets": {"macs": teacher.macs, "ours": spread(target_rates)},
        }
        for name, candidate in students(load_space(SPACE, len(dataset.class_names))).items():
            pairs = [  # interleaved, so that both see the same machine
                (ours(candidate, targets, settings), plain(candidate, dataset, settings)) for _ in range(chosen.repeats)
            ]
            measured[f"student, {name}"] = {
                "macs": total_macs(candidate),
                "ours": spread([pair[0] for pair in pairs]),
                "plain": spread([pair[1] for pair in pairs]),
                "ratio": spread([pair[0] / pair[1] for pair in pairs]),
            }
    rows = [
        [name, f["macs"] / 1e6, *(_shown(f.get(key)) for key in ("ours", "plain", "ratio"))]
        for name, f in measured.items()
    ]
    columns = ("what", "M MACs", "images per CPU s", "plain loop", "ratio")
    document = {"images": chosen.images, "batch_size": settings.batch_size, "figures": measured}
    spoken = f"median [smallest, largest] of {chosen.repeats}"
    title = f"Training at {dataset.resolution} px, batch {settings.batch_size}: {spoken}"
    report(title, columns, rows, document, chosen.json)
    return 0


def _shown(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.4g} [{value['min']:.4g}, {value['max']:.4g}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
