"""Temperatures of a finished student: fitted on held-out logits, put into the weights of its heads.

A head that is divided by its temperature gives calibrated probabilities at no cost, in every precision and runtime: the
classifier is the last layer, so weights, bias and ranges are divided alike, and integers stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.core.records import QuantSpec
from nas.core.run import ExitConfidence
from nas.latency.confidence import calibration_error, fit_temperature


@dataclass(frozen=True, slots=True)
class StudentConfidence:
    """`confidence-<precision>.json`: calibration of each exit of a finished student, the head last."""

    exits: tuple[ExitConfidence, ...]


Weights = Mapping[str, NDArray[np.float32]]


def fitted_temperatures(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, ...]:
    """A temperature for each exit, the head last; logits [E, N, K] of images that no weight was trained on."""
    return tuple(float(np.float32(fit_temperature(own, labels))) for own in logits)


def confidence_figures(
    temperatures: Sequence[float], logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[ExitConfidence, ...]:
    """What the temperatures do on other images; `logits` [E, N, K] without them."""
    return tuple(
        ExitConfidence(t, calibration_error(own, labels), calibration_error(own / np.float32(t), labels))
        for t, own in zip(temperatures, logits, strict=True)
    )


def divided(logits: NDArray[np.float32], temperatures: Sequence[float]) -> NDArray[np.float32]:
    """Logits [E, N, K] divided by a temperature per exit; unchanged without any."""
    if not temperatures:
        return logits
    return logits / np.array(temperatures, np.float32)[:, None, None]


def with_temperatures(
    weights: Weights, quant: QuantSpec, temperatures: Sequence[float]
) -> tuple[dict[str, NDArray[np.float32]], QuantSpec]:
    """The same student with its logits divided by a temperature per exit, the head last; unchanged without any."""
    if not temperatures:
        return dict(weights), quant
    heads = {name: t for name, t in zip(_head_names(len(temperatures)), temperatures, strict=True)}

    def divisor(name: str) -> float:
        head, found, _ = name.partition(".classifier")
        return heads.get(head, 1.0) if found else 1.0

    scaled = {name: (value / np.float32(divisor(name))).astype(np.float32) for name, value in weights.items()}
    lo = {name: value / divisor(name) for name, value in quant.lo.items()}
    hi = {name: value / divisor(name) for name, value in quant.hi.items()}
    return scaled, QuantSpec(lo, hi, quant.images)


def _head_names(exits: int) -> tuple[str, ...]:
    return (*(f"exits.{k}" for k in range(exits - 1)), "head")
