"""Logits of a student in the precision in which it is deployed: from the graph that is exported, never assumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nas.compress.calibrate import calibrate
from nas.core.records import Candidate, Precision, QuantSpec
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import ORT, TRT_10_13_ANSWERS, Dialect
from nas.export.graph import network_model, tensors_model

Run = Callable[[bytes, NDArray[np.float32]], Sequence[NDArray[np.generic]]]
PART_BYTES = 64 * 2**20  # of images as float32 that are given to a runtime at once: each part makes a session


def raw_pixels(images: np.ndarray) -> NDArray[np.float32]:
    """Network input float32 [B, 3, H, W], 0-255, from uint8 [B, H, W, 3]."""
    return np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)), dtype=np.float32)


def images_at_once(images: np.ndarray) -> int:
    """How many of `images`, uint8 [N, H, W, 3], are answered in one call of a runtime."""
    return max(1, PART_BYTES // (4 * int(np.prod(images.shape[1:]))))


def calibrated(
    candidate: Candidate,
    weights: Mapping[str, NDArray[np.float32]],
    mean: Sequence[float],
    std: Sequence[float],
    images: np.ndarray,
    run: Run,
) -> QuantSpec:
    """Ranges of every tensor of a student over `images`, uint8 [N, H, W, 3] of the training split."""
    model, names = tensors_model(candidate, weights, mean, std)
    return calibrate(run, model, names, raw_pixels(images))


def computed_dialect(dialect: Dialect) -> Dialect:
    """The dialect whose graph says what a device computes.

    For TensorRT it is the one with half floats, whatever the version: a weakly typed builder chooses them too, but does
    not say so in its graph. bf16 layers are rounded to it, because the host has no such convolutions.
    """
    return ORT if dialect is ORT else TRT_10_13_ANSWERS


def host_run(dialect: Dialect, precisions: Collection[Precision]) -> Run:
    """This process's runtime, for graphs of a dialect in these precisions.

    An int8 graph for another runtime is computed as it is written: optimised for this one, its float biases would
    become integers, which the other runtime does not do.
    """
    return partial(run_model, as_written=dialect is not ORT and "int8" in precisions)


def deployed_logits(
    candidate: Candidate,
    weights: Mapping[str, NDArray[np.float32]],
    quant: QuantSpec | None,
    mean: Sequence[float],
    std: Sequence[float],
    images: np.ndarray,
    dialect: Dialect = ORT,
    run: Run | None = None,
) -> NDArray[np.float32]:
    """Logits float32 [E, N, K] of the exported graph in the candidate's precision, for uint8 images [N, H, W, 3].

    `run`: the runtime that answers; None: that of this process, see `host_run`.
    """
    written_for = computed_dialect(dialect)
    run = run or host_run(written_for, candidate.precisions)
    model = network_model(candidate, weights, mean, std, quant=quant, form="logits", batch=None, dialect=written_for)
    parts = []
    step = images_at_once(images)
    for start in range(0, len(images), step):
        outputs = run(model, raw_pixels(images[start : start + step]))
        parts.append(np.stack([np.asarray(o, dtype=np.float32) for o in outputs]))
    return np.concatenate(parts, axis=1)
