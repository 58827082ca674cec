"""What each part of a student loses in each precision when only that part is in it: a table of scores that add up.

The score is the divergence (Kullback-Leibler, nats per image) of the answers from those in fp32, mean over the exits:
unlike accuracy it tells parts apart on a few hundred images, and errors of independent parts add up in it. A table is
computed in one pass for each part and precision, by the graphs that are exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from nas.core.errors import RecordError
from nas.core.jsonio import read_record, write_record
from nas.core.records import Candidate, Precision, QuantSpec
from nas.export.dialect import ORT, Dialect
from nas.recipe.deployed import deployed_logits
from nas.recipe.records import SENSITIVITY_FILE

IMAGES = 256  # of the validation split at most


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Losses of the stem, each stage and the head (rows) in each of `choices` (columns), nats per image of `images`."""

    choices: tuple[Precision, ...]
    loss: tuple[tuple[float, ...], ...]
    images: int

    def __post_init__(self) -> None:
        if any(len(row) != len(self.choices) for row in self.loss):
            raise RecordError(f"sensitivity: every part needs {len(self.choices)} losses, got {self.loss}")

    def of(self, precisions: Sequence[Precision]) -> float:
        """The sum for a network whose parts are in these precisions."""
        return sum(row[self.choices.index(p)] for row, p in zip(self.loss, precisions, strict=True))


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of answers from reference answers, nats; both logits [E, N, K]."""
    a, b = (log_softmax(x.astype(np.float64), axis=-1) for x in (reference, logits))
    return float(np.maximum((np.exp(a) * (a - b)).sum(axis=-1), 0.0).mean())


def sensitivity(
    candidate: Candidate,
    weights: Mapping[str, NDArray[np.float32]],
    quant: QuantSpec,
    mean: Sequence[float],
    std: Sequence[float],
    images: np.ndarray,
    choices: Sequence[Precision],
    dialect: Dialect = ORT,
) -> Sensitivity:
    """The table of one student.

    Args:
        candidate: the network; its precisions do not matter.
        weights, quant: batch norm folded in; ranges of every tensor.
        mean, std: of the normalisation.
        images: uint8 [N, H, W, 3], best of the validation split; no labels are needed.
        choices: precisions; fp32 costs nothing.
        dialect: of the runtime that is meant.
    """

    def answers(precisions: Sequence[Precision]) -> NDArray[np.float32]:
        network = candidate.with_precision(precisions)
        return deployed_logits(network, weights, quant, mean, std, images, dialect)

    plain: list[Precision] = ["fp32"] * len(candidate.precisions)
    reference = answers(plain)
    rows = []
    for part in range(len(plain)):
        alone = [[*plain[:part], choice, *plain[part + 1 :]] for choice in choices]
        rows.append(tuple(0.0 if a == plain else divergence(reference, answers(a)) for a in alone))
    return Sensitivity(tuple(choices), tuple(rows), len(images))


def kept_sensitivity(folder: Path) -> Sensitivity | None:
    """The table in a student's folder, None where there is none.

    Raises:
        StorageError, RecordError: it is damaged.
    """
    path = folder / SENSITIVITY_FILE
    return read_record(Sensitivity, path) if path.exists() else None


def keep_sensitivity(folder: Path, table: Sensitivity) -> None:
    """Writes the table into a student's folder."""
    write_record(folder / SENSITIVITY_FILE, table)
