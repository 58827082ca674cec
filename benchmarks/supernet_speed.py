"""CPU seconds of a scored sub-network: weights copied, batch norm estimated anew, validation images answered.

Random networks of the space with their exits, one thread, the images and their number as a search has them. The shared
weights are of one step: what they are does not change what a score costs.

Run: python -m benchmarks.supernet_speed [--networks 40] [--repeats 3] [--json]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from nas.core.records import Candidate
from nas.data import evenly, load_dataset
from nas.models.supernet import Supernet
from nas.recipe.context import Context, open_context, write_context
from nas.recipe.score import ScoreJob, _float_student, deployed_answers
from nas.recipe.supernet import open_supernet, train_supernet
from nas.search.experiment import load_experiment
from nas.search.prepare import SCORE_IMAGES
from nas.space.space import load_space
from nas.train.evaluate import recalibrate_bn
from nas.train.targets import make_targets
from nas.train.teacher import prepare_teacher

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
GOAL_CPU_S = 0.2
PARTS = ("weights", "batch norm", "answers", "whole")


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this thread, and what the work gave."""
    started = time.thread_time()
    result = work()
    return time.thread_time() - started, result


def parts(supernet: Supernet, candidate: Candidate, context: Context, job: ScoreJob) -> list[float]:
    """CPU seconds of each part of one score, all of it last; the part `answers` has what is left, int8 ranges too."""
    copied, student = seconds(lambda: supernet.extract(candidate.architecture).to(memory_format=torch.channels_last))
    sample = evenly(context.sample, job.images)
    calibrated, _ = seconds(lambda: recalibrate_bn(student, sample, context.mean, context.std))
    _float_student.cache_clear()
    shutil.rmtree(job.students, ignore_errors=True)
    whole, _ = seconds(lambda: deployed_answers(job, context, context.val))
    return [copied, calibrated, whole - copied - calibrated, whole]


def main(arguments: list[str]) -> int:
    """Measures and prints; gives the exit code."""
    options = common.parser(__doc__)
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space and number of images")
    options.add_argument("--networks", type=int, default=40, help="random networks (default 40)")
    options.add_argument("--repeats", type=int, default=3, help="of each network; the least counts (default 3)")
    chosen = options.parse_args(arguments)
    e = load_experiment(chosen.experiment)
    draft = load_space(Path(e.space), 2)
    side = max(draft.resolution)
    dataset = load_dataset(replace(e.data, train_images=2000), side)
    space = replace(draft, num_classes=dataset.num_classes, resolution=(side,))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as scratch:
        folder = Path(scratch)
        teacher = prepare_teacher(dataset, replace(e.teacher, epochs=1, widths=(8,), blocks=1), folder)
        targets = make_targets(teacher, dataset, 1, folder)
        write_context(folder / "context.json", (dataset,), targets, folder, 0)
        context = open_context(str(folder / "context.json"), side)
        distill = replace(e.distill, attention=0.0)  # weights of one step serve for timing
        train_supernet(space, {side: targets}, distill, replace(e.supernet, steps=1), folder / "supernet")
        supernet = open_supernet(str(folder / "supernet"))
        rng = np.random.default_rng(0)
        measured: dict[str, list[list[float]]] = {}
        for _ in range(chosen.networks):
            architecture = space.decode(space.sample(rng)).architecture
            for precision in space.precisions:
                candidate = architecture.with_precision(precision)
                job = ScoreJob(
                    candidate,
                    "supernet",
                    str(folder / "context.json"),
                    str(folder / "students"),
                    str(folder / "supernet"),
                    "",
                    e.distill,
                    0,
                    0,
                    SCORE_IMAGES,
                )
                runs = [parts(supernet, candidate, context, job) for _ in range(chosen.repeats)]
                measured.setdefault(precision, []).append(min(runs, key=lambda run: run[-1]))
    figures = {
        precision: {name: common.spread([row[i] for row in rows]) for i, name in enumerate(PARTS)}
        for precision, rows in measured.items()
    }
    rows = [
        [precision, name, f["median"], f["min"], f["max"]]
        for precision, of in figures.items()
        for name, f in of.items()
    ]
    title = (
        f"CPU s of a score at {side} px, {len(dataset.val)} validation images, {SCORE_IMAGES} for batch norm; "
        f"{chosen.networks} networks, goal {GOAL_CPU_S:g}"
    )
    document = {"images": len(dataset.val), "batch_norm_images": SCORE_IMAGES, "goal_cpu_s": GOAL_CPU_S}
    columns = ("precision", "part", "median", "least", "most")
    common.report(title, columns, rows, {**document, "figures": figures}, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
