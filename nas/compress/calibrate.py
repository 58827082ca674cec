"""Calibration: the range of every tensor of a float network over real images, for int8 by post-training quantization.

Ranges are the smallest and largest value seen (min-max). On networks with hard-swish and squeeze-and-excitation it is
better than entropy calibration (relative error of the logits 4 % against 11 %), and a search can afford it for each
candidate: one pass over some dozens of images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError, UsageError
from nas.core.records import QuantSpec

Run = Callable[[bytes, NDArray[np.float32]], Sequence[NDArray[Any]]]

MIN_IMAGES = 64  # what the evidence for min-max rests on; ModelOpt asks for 500 of its own, entropy, calibrator
_log = logging.getLogger(__name__)


def calibrate(
    run: Run,
    model: bytes,
    names: Sequence[str],
    images: NDArray[np.uint8] | NDArray[np.float32],
    *,
    batch_size: int = 32,
    min_images: int = MIN_IMAGES,
    warn: Callable[[str], object] = _log.warning,
) -> QuantSpec:
    """Ranges of all tensors over all the images given.

    Only one number per image and tensor comes back from the device, so memory does not grow with their number.

    Args:
        run: executes an ONNX model on float32 images [B, C, H, W]; a device's `run`.
        model: written by `nas.export.graph.tensors_model`: outputs `lo` and `hi` [B, T].
        names: of its T tensors.
        images: of the training split without augmentation, all classes among them; uint8 [N, H, W, C] at rest, or
            float32 [N, C, H, W] raw pixels 0-255.
        batch_size: images in one run of the network.
        min_images: fewer images than this are worth a warning.
        warn: takes the warning.

    Raises:
        UsageError: no images, or images in another form.
        RecordError: the network gives NaN or infinity.
    """
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise UsageError(
            "calibration images must be uint8 [N, H, W, C] or raw float32 [N, C, H, W], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if len(images) == 0:
        raise UsageError("calibration needs at least one image, got none; give images of the training split")
    if len(images) < min_images:
        warn(
            f"int8 calibration on {len(images)} images; at least {min_images} are recommended: "
            "rare large values may be missed and clipped later"
        )
    lo = np.full(len(names), np.inf)
    hi = np.full(len(names), -np.inf)
    for start in range(0, len(images), batch_size):
        low, high = run(model, network_input(images[start : start + batch_size]))
        # minimum and maximum pass NaN on, so that a broken network is noticed below
        lo = np.minimum(lo, np.asarray(low, dtype=np.float64).min(axis=0))
        hi = np.maximum(hi, np.asarray(high, dtype=np.float64).max(axis=0))
    for name, low_value, high_value in zip(names, lo, hi, strict=True):
        if not (math.isfinite(low_value) and math.isfinite(high_value)):
            raise RecordError(
                f"calibration: tensor {name!r} reaches {low_value} .. {high_value}; "
                "the training of this student diverged"
            )
    return QuantSpec(
        lo=dict(zip(names, lo.tolist(), strict=True)), hi=dict(zip(names, hi.tolist(), strict=True)), images=len(images)
    )


def network_input(images: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Raw float32 pixels [B, C, H, W] of uint8 images at rest [B, H, W, C]; float images are taken as they are."""
    if images.dtype == np.uint8:
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images, dtype=np.float32)
