"""Teachers that teach together, networks and files of soft labels: their answers become ordinary targets.

Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2: the soft targets of an ensemble are the arithmetic or the
geometric mean of its members' distributions; the latter is the mean of their logits.

A contributor that is left out leaves no trace: its file is not read, its network not trained, and the key of the
targets holds only those that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from nas.core.jsonio import content_hash, read_record, write_record
from nas.data import Dataset
from nas.train.evaluate import top1
from nas.train.features import wanted_features
from nas.train.settings import Accelerator, DistillSettings, TeacherSettings
from nas.train.soft_labels import LEAST_PROBABILITY, SoftLabels, read_soft_labels
from nas.train.targets import Targets, make_targets, with_logits
from nas.train.teacher import Teacher, prepare_teacher

COMBINE_IMAGES = 4096  # so many at a time: the logits of all contributors are held in float64


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """The teacher, what students learn from (its answers and those of `files` together), and those files."""

    teacher: Teacher
    targets: Targets
    files: tuple[SoftLabels, ...] = ()


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Shares of right answers of several networks together."""

    val: float
    test: float


def read_files(settings: TeacherSettings, dataset: Dataset) -> tuple[SoftLabels, ...]:
    """Soft labels of every file that is not left out.

    Raises:
        DataError: a file does not fit the training images.
    """
    return tuple(read_soft_labels(file, dataset) for file in settings.used_files)


def prepare_targets(
    dataset: Dataset,
    settings: TeacherSettings,
    variants: int,
    cache_dir: Path,
    *,
    seed: int = 0,
    distill: DistillSettings | None = None,
    training: Callable[[int, int], None] | None = None,
    answering: Callable[[int, int], None] | None = None,
    accelerator: Accelerator = "cpu",
) -> Taught:
    """The teacher and its cached answers, of one network or of all contributors together.

    Args:
        dataset: images.
        settings: who teaches.
        variants: augmented copies of the training images.
        cache_dir: each network and its answers are kept apart, so a run with one contributor less finds the others.
        seed: of the augmentation.
        distill: its losses may need features of the teacher, which one network alone can give.
        training: called with (epochs done, epochs) of all networks.
        answering: called with (copies done, copies) of all networks.
        accelerator: where networks are trained and asked.

    Raises:
        ConfigError, DataError, RecordError, StorageError, TrainingError: as `prepare_teacher` and `read_soft_labels`.
    """
    files = read_files(settings, dataset)
    networks = settings.networks
    epochs = [n.settings.epochs for n in networks]
    teachers = []
    for i, network in enumerate(networks):
        told = _part(training, sum(epochs[:i]), sum(epochs))
        teachers.append(prepare_teacher(dataset, network.settings, cache_dir, told, accelerator))
    features = () if distill is None or len(teachers) > 1 else wanted_features(teachers[0], distill)
    each = [
        make_targets(
            t,
            dataset,
            variants,
            cache_dir,
            _part(answering, i * variants, len(teachers) * variants),
            seed=seed,
            features=features,
        )
        for i, t in enumerate(teachers)
    ]
    weights = [n.settings.weight for n in networks]
    teacher = _together(teachers, weights, settings.average, dataset, cache_dir)
    if settings.members or settings.files:
        lines = [f"{n.name}: {t.name}, weight {w:g}" for n, t, w in zip(networks, teachers, weights, strict=True)]
        lines += [f"{f.name}: {f.about}, weight {g.weight:g}" for f, g in zip(files, settings.used_files, strict=True)]
        teacher = replace(teacher, contributors=(*lines, *(f"{name}: left out" for name in settings.without)))
    taught: list[Contribution] = [(t.logits, w, None) for t, w in zip(each, weights, strict=True) if w]
    if len(taught) == 1 and not files:
        return Taught(teacher, next(t for t, w in zip(each, weights, strict=True) if w), files)
    of_files = [(f, g.weight) for f, g in zip(files, settings.used_files, strict=True) if g.weight]
    taught += [(f.logits, w, f.has) for f, w in of_files]
    who = [[t.sha256, w] for t, w in zip(teachers, weights, strict=True) if w] + [[f.sha256, w] for f, w in of_files]
    targets = with_logits(
        each[0],
        lambda: _combined(taught, settings.average, each[0].logits.shape),
        content_hash([settings.average, who], 64),
    )
    return Taught(teacher, targets, files)


def _part(told: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int, int], None] | None:
    """Progress of one of several parts, told as that of the whole."""
    if told is None:
        return None
    tell = told

    def of_part(done: int, _: int) -> None:
        tell(before + done, total)

    return of_part


Contribution = tuple[NDArray[np.float32], float, NDArray[np.bool_] | None]


def _combined(taught: Sequence[Contribution], average: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits float32 [V, N, K] of the mean, from (logits [V, N, K] or [N, K], weight, which images it has [N])."""
    result = np.empty(shape, np.float32)
    for v in range(shape[0]):
        for start in range(0, shape[1], COMBINE_IMAGES):
            part = slice(start, start + COMBINE_IMAGES)
            parts = [(z[v, part] if z.ndim == 3 else z[part], w, None if h is None else h[part]) for z, w, h in taught]
            result[v, part] = mean_logits(parts, average)
    return result


def mean_logits(parts: Sequence[Contribution], average: str) -> NDArray[np.float32]:
    """Logits float32 [N, K] of the weighted mean of contributors.

    Args:
        parts: of each contributor, logits [N, K], weight, and which of the images it has, bool [N] (None: all).
        average: `probabilities` (arithmetic mean) or `logits` (geometric mean of probabilities).
    """
    logs = np.stack([log_softmax(np.asarray(z, np.float64), axis=1) for z, _, _ in parts])  # [C, N, K]
    count = logs.shape[1]
    weights = np.stack([np.full(count, w) if has is None else w * has for _, w, has in parts])  # [C, N]
    weights = weights / weights.sum(axis=0)
    logs = np.maximum(logs, np.log(LEAST_PROBABILITY))
    if average == "logits":
        return np.einsum("cn,cnk->nk", weights, logs).astype(np.float32)
    return np.asarray(logsumexp(logs, axis=0, b=weights[:, :, None]), np.float32)


def _together(
    teachers: Sequence[Teacher], weights: Sequence[float], average: str, dataset: Dataset, cache_dir: Path
) -> Teacher:
    """Networks as one teacher, which costs as much as all of them; its accuracies are kept in the cache."""
    used = [(t, w) for t, w in zip(teachers, weights, strict=True) if w]
    if len(used) < 2:
        return used[0][0] if used else teachers[0]
    members = tuple(t for t, _ in used)

    def predict(images: np.ndarray) -> np.ndarray:
        return mean_logits([(t.predict(images), w, None) for t, w in used], average)

    sha256 = content_hash([average, [[t.sha256, w] for t, w in used]], 64)
    file = cache_dir / "teachers" / f"together-{sha256[:16]}.json"
    if file.exists():
        right = read_record(Accuracies, file)
    else:
        right = Accuracies(*(top1(predict(s.images), s.labels) for s in (dataset.val, dataset.test)))
        write_record(file, right)
    return Teacher(
        name=f"{len(members)} networks: {', '.join(t.name for t in members)}",
        sha256=sha256,
        precision="bf16" if any(t.precision == "bf16" for t in members) else "fp32",
        val_accuracy=right.val,
        test_accuracy=right.test,
        cpu_s=sum(t.cpu_s for t in members),
        params=_sum([t.params for t in members]),
        macs=_sum([t.macs for t in members]),
        resolution=max(t.resolution for t in members),
        predict=predict,
        onnx=members[0].onnx,
        members=members,
    )


def _sum(values: Sequence[int | None]) -> int | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None
