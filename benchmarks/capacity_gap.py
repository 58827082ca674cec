"""Does a teaching assistant help a student that is much smaller than its teacher, at equal epochs and at equal seconds?

Arms, each with the same seeds: labels alone, the teacher, one or two assistants between (chosen as a run chooses them),
and the teacher for as many CPU seconds as student and assistants took together. Accuracy on the test split.

Run: python -m benchmarks.capacity_gap [--set KEY=VALUE] [--seeds 3] [--folder DIR] [--json]; the same command goes on
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.train_throughput import students
from nas.core.records import Candidate
from nas.core.walk import total_macs
from nas.data import load_dataset
from nas.recipe.assistant import assistant_context
from nas.recipe.context import write_context
from nas.recipe.finish import FinishJob, finish_student, finished_logits
from nas.search.assistants import choose_assistants
from nas.search.experiment import load_experiment
from nas.space.space import load_space
from nas.train.contributors import prepare_targets
from nas.train.evaluate import top1
from nas.train.settings import DistillSettings

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
ARMS = ("labels", "teacher", "1 assistant", "2 assistants", "teacher, equal CPU")
CALIBRATION_IMAGES = 16  # of the finishing step; int8 is not looked at here


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished student of one arm: shares of right answers, CPU seconds of its own and with its assistants'."""

    student: str
    arm: str
    seed: int
    epochs: int
    val_top1: float
    test_top1: float
    own_cpu_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all trainings share."""

    folder: Path
    context: str
    distill: DistillSettings
    val_labels: np.ndarray
    test_labels: np.ndarray

    def finish(self, name: str, candidate: Candidate, context: str, seed: int, distill: DistillSettings) -> Trained:
        """Trains one network, or gives it from an earlier call."""
        folder = self.folder / f"seed-{seed}" / name
        print(f"seed {seed}: {name}, {distill.epochs} epochs", file=sys.stderr)
        stop = str(self.folder / "stop")
        done = finish_student(FinishJob(candidate, context, str(folder), stop, distill, seed, CALIBRATION_IMAGES, ()))
        val, test = (finished_logits(folder, split, ("fp32",))[-1] for split in ("val", "test"))
        right = top1(val, self.val_labels), top1(test, self.test_labels)
        return Trained(name, "", seed, done.epochs, *right, done.cost_s, done.cost_s)


def arms(
    bench: Bench, name: str, student: Candidate, chains: Sequence[Sequence[Candidate]], seed: int
) -> list[Trained]:
    """All arms of one student and seed; `chains` are the assistants of each number of them."""
    found = [
        replace(
            bench.finish(f"{name}-labels", student, bench.context, seed, replace(bench.distill, alpha=0.0)), arm=ARMS[0]
        ),
        replace(bench.finish(f"{name}-teacher", student, bench.context, seed, bench.distill), arm=ARMS[1]),
    ]
    spent = 0.0
    for chain in chains:
        context, before_s = bench.context, 0.0
        for place, assistant in enumerate(chain):
            own = "-".join(a.arch_id for a in chain[: place + 1])  # the same assistant is trained once per seed
            taught = bench.finish(f"assistant-{own}", assistant, context, seed, bench.distill)
            started = time.process_time()
            folder = bench.folder / f"seed-{seed}" / f"assistant-{own}"
            context = assistant_context(folder, assistant, context)
            before_s += taught.cpu_s + time.process_time() - started
        own = bench.finish(f"{name}-{len(chain)}", student, context, seed, bench.distill)
        found.append(
            replace(own, arm=f"{len(chain)} assistant" + "s" * (len(chain) > 1), cpu_s=before_s + own.own_cpu_s)
        )
        spent = spent or found[-1].cpu_s
    epochs = max(bench.distill.epochs, round(bench.distill.epochs * spent / found[1].own_cpu_s))
    longer = replace(bench.distill, epochs=epochs)
    found.append(replace(bench.finish(f"{name}-long-{epochs}", student, bench.context, seed, longer), arm=ARMS[4]))
    return [replace(t, student=name) for t in found]


def main(arguments: list[str]) -> int:
    """Trains all arms and prints the paired differences to the teacher alone; gives the exit code."""
    options = common.parser(__doc__)
    options.add_argument("--experiment", type=Path, default=EXPERIMENT, help="whose space, data, teacher and recipe")
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--seeds", type=int, default=3, help="seeds of each arm (default 3)")
    options.add_argument("--students", nargs="+", default=["smallest", "middle"], help="of the space")
    options.add_argument("--folder", type=Path, default=Path("runs/bench-capacity-gap"), help="kept, and gone on with")
    chosen = options.parse_args(arguments)
    e = load_experiment(chosen.experiment, chosen.sets)
    draft = load_space(Path(e.space), 2)
    dataset = load_dataset(e.data, max(draft.resolution))
    space = replace(draft, num_classes=dataset.num_classes)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    cache = chosen.folder / "cache"
    taught = prepare_targets(dataset, e.teacher, e.distill.variants, cache, seed=e.data.seed, distill=e.distill)
    context = chosen.folder / "context.json"
    write_context(context, (dataset,), taught.targets, cache, e.data.seed)
    bench = Bench(chosen.folder, str(context.resolve()), e.distill, dataset.val.labels, dataset.test.labels)
    found: list[Trained] = []
    sizes: dict[str, Any] = {"teacher": taught.teacher.macs}
    for seed in range(chosen.seeds):
        for name in chosen.students:
            student = replace(students(space)[name], exits=())
            chains = [choose_assistants(space, [total_macs(student)], taught.teacher.macs, n) for n in (1, 2)]
            chains = [c for n, c in enumerate(chains, start=1) if len(c) == n]
            sizes[name] = {"macs": total_macs(student), "assistants": [[total_macs(a) for a in c] for c in chains]}
            found += arms(bench, name, student, chains, seed)
    rows, figures = table(found)
    title = (
        f"Teacher {100 * taught.teacher.test_accuracy:.1f} % on test, {taught.teacher.macs} MACs; "
        f"{len(dataset.train)} images, {e.distill.epochs} epochs, {chosen.seeds} seeds; points against the teacher"
    )
    document = {
        "macs": sizes,
        "teacher_test_top1": taught.teacher.test_accuracy,
        "images": len(dataset.train),
        "epochs": e.distill.epochs,
        "figures": figures,
        "trained": [asdict(t) for t in found],
    }
    columns = ("student", "arm", "n", "test %", "against teacher", "std error", "epochs", "CPU s")
    common.report(title, columns, rows, document, chosen.json)
    return 0


def table(found: Sequence[Trained]) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Rows for people and figures: mean test accuracy of each arm, and its paired difference to the teacher alone."""
    rows, figures = [], []
    for name in dict.fromkeys(t.student for t in found):
        base = {t.seed: t.test_top1 for t in found if t.student == name and t.arm == ARMS[1]}
        for arm in ARMS:
            own = [t for t in found if t.student == name and t.arm == arm]
            if not own:
                continue
            gains = [100 * (t.test_top1 - base[t.seed]) for t in own]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            figure = {
                "student": name,
                "arm": arm,
                "n": len(own),
                "test_top1": statistics.fmean(t.test_top1 for t in own),
                "gain_points": statistics.fmean(gains),
                "gain_std_error": error,
                "gains": gains,
                "epochs": statistics.fmean(t.epochs for t in own),
                "cpu_s": statistics.fmean(t.cpu_s for t in own),
            }
            figures.append(figure)
            shown = (figure[k] for k in ("gain_points", "gain_std_error", "epochs", "cpu_s"))
            rows.append([name, arm, len(own), 100 * figure["test_top1"], *shown])
    return rows, figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
