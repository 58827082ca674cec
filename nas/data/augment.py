"""Random changes of training images that keep their class, in numpy on 8-bit images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DataError
from nas.data.corruptions import corrupted_each
from nas.data.records import AugmentSettings, Images

_AT_ONCE = 256  # images whose pixel indices are held at once


def augmented(images: Images, settings: AugmentSettings, rng: np.random.Generator) -> Images:
    """A changed copy of images uint8 [N, H, W, 3], equal for equal images, settings and state of `rng`.

    In this order: turn, flips, shift with reflected border, contrast and brightness, cutout, corruption. The same
    numbers are drawn whatever is switched on, so switching one change off leaves the others as they were; those of
    corruptions come last, and only where there are any.

    Raises:
        DataError: images that are not square.
    """
    count, height, side = images.shape[:3]
    if height != side:
        raise DataError(f"augmentation needs square images, got {height} x {side} px")
    draws = rng.random((count, 9))
    most = round(settings.shift * side)
    shift_y, shift_x = (np.floor(draws[:, axis] * (2 * most + 1)).astype(np.int64) - most for axis in (0, 1))
    mirror = (draws[:, 2] < 0.5) & settings.horizontal_flip
    upside_down = (draws[:, 3] < 0.5) & settings.vertical_flip
    turns = np.floor(draws[:, 4] * 4).astype(np.int64) * settings.quarter_turns
    gain = 1 + settings.brightness * (2 * draws[:, 5] - 1)
    spread = 1 + settings.contrast * (2 * draws[:, 6] - 1)

    result = np.empty_like(images)
    for start in range(0, count, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        moved = _moved(images[part], shift_y[part], shift_x[part], mirror[part], upside_down[part], turns[part])
        if settings.brightness or settings.contrast:
            moved = _lit(moved, gain[part], spread[part])
        if settings.cutout:
            _cut(moved, draws[part, 7:9], round(settings.cutout * side))
        result[part] = moved
    if settings.corruptions:
        _corrupt(result, settings, rng)
    return result


def _corrupt(images: Images, settings: AugmentSettings, rng: np.random.Generator) -> None:
    """Changes some of the images by one corruption each."""
    draws = rng.random((len(images), 5))  # all of them before any noise of pixels, whose number depends on the side
    kind = np.floor(draws[:, 1] * len(settings.corruptions)).astype(np.int64)
    severity = 1 + np.floor(draws[:, 2] * settings.max_severity).astype(np.int64)
    for number, name in enumerate(settings.corruptions):
        chosen = np.flatnonzero((draws[:, 0] < settings.corrupted_share) & (kind == number))
        images[chosen] = corrupted_each(images[chosen], name, severity[chosen], draws[chosen, 3:], rng)


def _reflected(index: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Indices beyond the border fall back inside, the border pixel not repeated: -1 is 1, side is side - 2."""
    period = max(2 * side - 2, 1)
    index = np.abs(index) % period
    return np.minimum(index, period - index) if side > 1 else np.zeros_like(index)


def _moved(
    images: Images,
    shift_y: NDArray[np.int64],
    shift_x: NDArray[np.int64],
    mirror: NDArray[np.bool_],
    upside_down: NDArray[np.bool_],
    turns: NDArray[np.int64],
) -> Images:
    """Every geometric change at once: each target pixel is looked up in the source."""
    count, side = images.shape[:2]
    line = np.arange(side)
    y = _reflected(line[None] + shift_y[:, None], side)
    x = _reflected(line[None] + shift_x[:, None], side)
    y = np.where(upside_down[:, None], side - 1 - y, y)[:, :, None]
    x = np.where(mirror[:, None], side - 1 - x, x)[:, None, :]
    quarter = turns[:, None, None]
    row = np.select([quarter == 0, quarter == 1, quarter == 2], [y, x, side - 1 - y], side - 1 - x)
    column = np.select([quarter == 0, quarter == 1, quarter == 2], [x, side - 1 - y, side - 1 - x], y)
    place = (np.arange(count)[:, None, None] * side + row) * side + column
    return images.reshape(-1, 3).take(place.ravel(), axis=0).reshape(images.shape)


def _lit(images: Images, gain: NDArray[Any], spread: NDArray[Any]) -> Images:
    """`gain` times the image after moving every pixel away from (or to) the mean grey level by `spread`."""
    mean = images.mean(axis=(1, 2, 3))
    factor = (gain * spread).astype(np.float32)[:, None, None, None]
    offset = (gain * mean * (1 - spread)).astype(np.float32)[:, None, None, None]
    values = images * factor
    values += offset + np.float32(0.5)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _cut(images: Images, draws: NDArray[Any], size: int) -> None:
    side = images.shape[1]
    top, left = (np.floor(draws[:, axis] * (side - size + 1)).astype(np.int64) for axis in (0, 1))
    colors = images.mean(axis=(1, 2)).astype(np.uint8)
    for index in range(len(images)):
        images[index, top[index] : top[index] + size, left[index] : left[index] + size] = colors[index]
