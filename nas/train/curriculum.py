"""Which images an epoch shows: easy ones first, and more of those where a sure teacher and the student differ.

Curriculum: Hacohen and Weinshall 2019, arXiv 1904.03626: images are ordered by the confidence of a teacher, class by
class so that the classes stay balanced, and a pacing function admits more and more of them. Differs: linear pacing.
Hard samples: an image is drawn by its loss-like distance to the teacher, as in Loshchilov and Hutter 2015, arXiv
1511.06343; differs: only where the teacher is right, so that wrong labels are not mined.

Every epoch draws as many images as there are, so a setting here changes no cost and no schedule. All follows from the
seed, the epoch and the student's distances, which are part of a checkpoint.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from nas.train.settings import DistillSettings
from nas.train.targets import Targets

Numbers = NDArray[np.int64]


def easy_ranks(targets: Targets) -> NDArray[np.float64]:
    """Rank of each training image within its class, 0 the easiest to 1, by the teacher's probability of the label."""
    logs = log_softmax(np.asarray(targets.logits, dtype=np.float64), axis=2)  # [V, N, K]
    sure = np.take_along_axis(logs, targets.labels[None, :, None], 2)[:, :, 0].mean(0)
    ranks = np.empty(len(sure))
    for label in np.unique(targets.labels):
        members = np.flatnonzero(targets.labels == label)
        ranks[members[np.argsort(-sure[members], kind="stable")]] = np.arange(len(members)) / max(1, len(members) - 1)
    return ranks


def admitted_share(settings: DistillSettings, epoch: int) -> float:
    """Share of each class's images that an epoch (from 0) may show; 1 without a curriculum."""
    rising = settings.curriculum * settings.epochs
    if epoch >= rising:
        return 1.0
    return settings.curriculum_start + (1 - settings.curriculum_start) * epoch / rising


def images_of_epoch(
    settings: DistillSettings,
    epoch: int,
    ranks: NDArray[np.float64],
    distance: NDArray[np.float32],
    rng: np.random.Generator,
) -> Numbers:
    """Image numbers of an epoch in the order in which they are shown, as many as there are images.

    Args:
        settings: curriculum and mining.
        epoch: from 0.
        ranks: of `easy_ranks`, [N].
        distance: of `distances`, as of the last time that each image was shown, [N]; all 0 before the first.
        rng: draws the order.
    """
    count = len(ranks)
    pool = np.flatnonzero(ranks <= admitted_share(settings, epoch))
    weights = distance[pool].astype(np.float64)
    mined = round(settings.mining * count) if weights.any() else 0
    rounds = -(-(count - mined) // len(pool))
    plain = np.concatenate([rng.permutation(pool) for _ in range(rounds)])[: count - mined] if rounds else pool[:0]
    return rng.permutation(np.concatenate([plain, pool[_systematic(weights, mined, rng)]]))


def _systematic(weights: NDArray[np.float64], count: int, rng: np.random.Generator) -> Numbers:
    """Indices drawn in proportion to weights, each as often as expected up to one more or less."""
    if not count:
        return np.empty(0, dtype=np.int64)
    edges = np.cumsum(weights) / weights.sum()
    points = (np.arange(count) + rng.random()) / count
    return np.minimum(np.searchsorted(edges, points), len(weights) - 1)


def distances(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> NDArray[np.float32]:
    """How far a student is from a sure teacher, 0-1 [B]: the teacher's probability of the label, times what the student
    lacks of it; 0 where the teacher is wrong.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        labels: [B].
    """
    with torch.no_grad():
        teacher = torch.softmax(teacher_logits, 1).gather(1, labels[:, None])[:, 0]
        student = torch.softmax(student_logits, 1).gather(1, labels[:, None])[:, 0]
        is_right = teacher_logits.argmax(1) == labels
        return (teacher * (1 - student) * is_right).cpu().numpy()
