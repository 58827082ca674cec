"""Accuracy of a precision inside the search: CPU milliseconds of each further one, and whether sensitivities add up.

Run: python -m benchmarks.precision_score [--networks 3] [--variants 12] [--supernet-s 60] [--seeds 0 1 2] [--json]

Shared weights of small-64 are trained for some CPU seconds. Then random networks are scored in random mixes of fp32 and
int8, through the search's own jobs: each time from nothing, as one that no other precision of its architecture came
before, and with what the architecture's precisions share. CPU seconds, so other work on the machine changes little.
The second table compares the sum of sensitivities with the divergence of whole mixes, and with the accuracy lost.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import parser, report, spread
from benchmarks.estimate import draw, in_precision, say
from nas.core.records import Candidate, Precision
from nas.data import DataSettings, load_dataset
from nas.export.dialect import ORT
from nas.latency.ranks import rank_correlation
from nas.recipe import score as scoring
from nas.recipe.context import open_context, write_context
from nas.recipe.records import read_logits
from nas.recipe.score import ScoreJob, candidate_sensitivity, score, student_folder
from nas.recipe.sensitivity import divergence
from nas.recipe.settings import SupernetSettings
from nas.recipe.supernet import train_supernet
from nas.search.prepare import SCORE_IMAGES
from nas.space.space import load_space
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.targets import make_targets
from nas.train.teacher import prepare_teacher

SPACE = Path(__file__).parents[1] / "search_spaces" / "small-64.yaml"
CHOICES: tuple[Precision, ...] = ("fp32", "int8")
CLASSES = 10


def prepared(folder: Path, seed: int, supernet_s: float, images: int) -> ScoreJob:
    """Context and trained shared weights in a folder; a job for the smallest network of the space."""
    dataset = load_dataset(DataSettings(train_images=images, val_images=500, test_images=100, seed=seed), 64)
    teacher = prepare_teacher(dataset, TeacherSettings(epochs=4, threads=1, seed=seed), folder)
    targets = make_targets(teacher, dataset, 2, folder)
    write_context(folder / "context.json", (dataset,), targets, folder, seed)
    space, distill = load_space(SPACE, CLASSES), DistillSettings(variants=2)
    settings = SupernetSettings(cpu_seconds=supernet_s, seed=seed)
    train_supernet(space, {64: targets}, distill, settings, folder / "supernet")
    network = space.decode(space.smallest())
    paths = (str(folder / "context.json"), str(folder / "students"), str(folder / "supernet"), str(folder / "stop"))
    return ScoreJob(network, "supernet", *paths, distill, 0, seed, SCORE_IMAGES, ORT.name)


def scored_ms(job: ScoreJob, *, from_nothing: bool) -> float:
    """CPU milliseconds of one score; what it left is removed, and with `from_nothing` what others share before."""
    folder = student_folder(job.students, job.candidate.arch_id)
    if from_nothing:
        scoring._float_student.cache_clear()
        for path in folder.glob("ranges-*.json"):
            path.unlink()
    started = time.process_time()
    score(job)
    spent = 1e3 * (time.process_time() - started)
    (folder / f"{job.name}.json").unlink()
    return spent


def costs(job: ScoreJob, mixes: list[Candidate]) -> dict[str, list[float]]:
    """CPU milliseconds of the mixes of one architecture, each from nothing and each after another one."""
    jobs = [replace(job, candidate=mix) for mix in mixes]
    before = [scored_ms(j, from_nothing=True) for j in jobs]
    after = [scored_ms(j, from_nothing=False) for j in jobs]
    return {"from nothing": before, "shared": after}


def additivity(job: ScoreJob, mixes: list[Candidate]) -> dict[str, float]:
    """How the sum of sensitivities of mixes goes with their divergence, and with the accuracy that they lose."""
    started = time.process_time()
    table = candidate_sensitivity(job, CHOICES)
    spent = 1e3 * (time.process_time() - started)
    context = open_context(job.context, job.candidate.resolution)
    labels = np.asarray(context.val_labels)
    folder = student_folder(job.students, job.candidate.arch_id)

    def answers(candidate: Candidate) -> np.ndarray:
        return read_logits(folder, score(replace(job, candidate=candidate)))

    full = answers(job.candidate.with_precision("fp32"))
    found = [answers(mix) for mix in mixes]
    sums = [table.of(mix.precisions) for mix in mixes]
    whole = [divergence(full, logits) for logits in found]
    right = [float((logits[-1].argmax(1) == labels).mean()) for logits in (full, *found)]
    lost = [right[0] - r for r in right[1:]]
    return {
        "table_ms": spent,
        "rank_with_divergence": rank_correlation(sums, whole),
        "sum_over_divergence": float(np.median(np.array(sums) / np.maximum(whole, 1e-12))),
        "rank_with_accuracy_lost": rank_correlation(sums, lost),
        "top1_fp32": right[0],
        "most_lost": max(lost),
    }


def main(arguments: list[str]) -> int:
    """Trains, scores and prints; gives the exit code."""
    options = parser(__doc__)
    options.add_argument("--networks", type=int, default=3, help="random networks of each seed (default 3)")
    options.add_argument("--variants", type=int, default=12, help="random mixes of each (default 12)")
    options.add_argument("--supernet-s", type=float, default=60.0, help="CPU seconds of shared weights (default 60)")
    options.add_argument("--images", type=int, default=4000, help="training images (default 4000)")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of everything (default 0 1 2)")
    chosen = options.parse_args(arguments)
    ms: dict[str, list[float]] = {}
    sums: list[dict[str, float]] = []
    for seed in chosen.seeds:
        rng = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
            job = prepared(Path(folder), seed, chosen.supernet_s, chosen.images)
            for network in draw(load_space(SPACE, CLASSES), chosen.networks, seed):
                drawn = {in_precision(network, "mixed", rng): None for _ in range(2 * chosen.variants)}
                mixes = list(drawn)[: chosen.variants]
                own = replace(job, candidate=network)
                for name, values in costs(own, mixes).items():
                    ms.setdefault(name, []).extend(values)
                sums.append(additivity(own, mixes))
                say(f"seed {seed}: {network.arch_id}: {sums[-1]}")
    figures = {name: spread(values) for name, values in ms.items()}
    figures |= {name: spread([s[name] for s in sums]) for name in sums[0]}
    rows = [[name, f["n"], f["median"], f["min"], f["max"]] for name, f in figures.items()]
    title = "CPU ms of a score in one more precision; sums of sensitivities against whole mixes"
    document = {"seeds": chosen.seeds, "supernet_s": chosen.supernet_s, "figures": figures}
    report(title, ("what", "n", "median", "least", "most"), rows, document, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
