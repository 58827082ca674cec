"""What cameras and their surroundings do to images, in severities 1 to 5, in numpy on 8-bit images.

The idea of one table of accuracies by corruption and severity is that of Hendrycks and Dietterich 2019, arXiv
1903.12261. Differs: the corruptions are those of a machine's camera, sizes are shares of the side so that a severity
means the same at every resolution, and the severities were chosen by eye at 32 to 64 px.
"""

from __future__ import annotations

import io
import math
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.data.records import Corruption, Images

CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3, 4, 5)

# One value for each severity.
READ_NOISE = (0.01, 0.02, 0.03, 0.045, 0.06)  # standard deviation in the dark, of full scale
FULL_WELL = (900.0, 400.0, 200.0, 100.0, 60.0)  # photons of a white pixel: fewer are noisier
MOTION_LENGTH = (0.06, 0.1, 0.15, 0.2, 0.28)  # of the side
DEFOCUS_RADIUS = (0.018, 0.03, 0.045, 0.06, 0.08)  # of the side
EXPOSURE_STOPS = (0.4, 0.8, 1.2, 1.6, 2.0)  # up or down
CORNER_LIGHT = (0.8, 0.65, 0.5, 0.35, 0.2)  # of the centre
JPEG_QUALITY = (60, 40, 25, 15, 8)
GAMMA = 2.2  # of pixels over light

_AT_ONCE = 256  # images that are held as floating point at once
_SUBPIXELS = 8  # points per pixel of a kernel's outline


def corrupted(images: Images, corruption: Corruption, severity: int, rng: np.random.Generator) -> Images:
    """A corrupted copy of images uint8 [N, H, W, 3]; direction and sign are drawn for each image.

    Args:
        images: square ones.
        corruption: `noise` (photons and read-out), `motion_blur`, `defocus_blur`, `exposure` (too much or too little),
            `vignetting` (dark corners) or `jpeg`.
        severity: 1 to 5.
        rng: decides everything that is random.
    """
    levels = np.full(len(images), severity)
    return corrupted_each(images, corruption, levels, rng.random((len(images), 2)), rng)


def corrupted_each(
    images: Images, corruption: Corruption, severities: NDArray[Any], draws: NDArray[Any], rng: np.random.Generator
) -> Images:
    """The same with a severity [N] and two numbers from 0 to 1 [N, 2] for each image: its direction and its sign.

    Only the noise of pixels is drawn from `rng`.
    """
    result = np.empty_like(images)
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        level = np.asarray(severities[part], dtype=np.int64) - 1
        result[part] = _changed(images[part], corruption, level, draws[part], rng)
    return result


def _changed(
    images: Images, corruption: Corruption, level: NDArray[np.int64], draws: NDArray[Any], rng: np.random.Generator
) -> Images:
    match corruption:
        case "noise":
            return _noisy(images, level, rng)
        case "motion_blur":
            lengths = np.take(MOTION_LENGTH, level) * images.shape[1]
            return _blurred(images, _lines(lengths, draws[:, 0] * math.pi))
        case "defocus_blur":
            levels, which = np.unique(level, return_inverse=True)
            return _blurred(images, _discs(np.take(DEFOCUS_RADIUS, levels) * images.shape[1])[which])
        case "exposure":
            stops = np.take(EXPOSURE_STOPS, level) * np.where(draws[:, 1] < 0.5, -1, 1)
            return _rounded(images * _each(2.0 ** (stops / GAMMA)))
        case "vignetting":
            return _vignetted(images, level)
        case "jpeg":
            return np.stack([_jpeg(image, JPEG_QUALITY[k]) for image, k in zip(images, level, strict=True)])


def _each(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32)[:, None, None, None]


def _rounded(values: NDArray[Any]) -> Images:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _noisy(images: Images, level: NDArray[np.int64], rng: np.random.Generator) -> Images:
    """Shot noise grows with the root of the light, read noise does not: Foi et al. 2008, IEEE TIP 17(10), eq. 2."""
    light = images.astype(np.float32) / 255
    variance = light / _each(np.take(FULL_WELL, level)) + _each(np.take(READ_NOISE, level)) ** 2
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    return _rounded(255 * (light + np.sqrt(variance) * noise))


def _vignetted(images: Images, level: NDArray[np.int64]) -> Images:
    """Light falls with the square of the distance from the centre, down to `CORNER_LIGHT` in the corners."""
    line = (np.arange(images.shape[1]) + 0.5) / images.shape[1] * 2 - 1
    distance = ((line[:, None] ** 2 + line[None] ** 2) / 2).astype(np.float32)[None, :, :, None]
    return _rounded(images * (1 - (1 - _each(np.take(CORNER_LIGHT, level))) * distance))


def _jpeg(image: Images, quality: int) -> Images:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return np.asarray(decoded)


def _lines(lengths: NDArray[Any], angles: NDArray[Any]) -> NDArray[np.float32]:
    """Kernels [N, k, k] of a straight motion, lengths in pixels and angles in radians [N]."""
    reach = max(1, math.ceil(float(lengths.max()) / 2))
    steps = np.linspace(-0.5, 0.5, _SUBPIXELS * (2 * reach + 1))
    along = lengths[:, None] * steps
    return _splatted(along * np.sin(angles)[:, None], along * np.cos(angles)[:, None], reach)


def _discs(radii: NDArray[Any]) -> NDArray[np.float32]:
    """Kernels [N, k, k] of a lens out of focus, radii in pixels [N]: even discs."""
    reach = max(1, math.ceil(float(radii.max())))
    # Points of a sunflower (golden angle) cover a disc evenly.
    count = (_SUBPIXELS * (2 * reach + 1)) ** 2 // 4
    index = np.arange(count) + 0.5
    radius, angle = np.sqrt(index / count), index * math.pi * (3 - math.sqrt(5))
    y, x = radii[:, None] * radius * np.sin(angle), radii[:, None] * radius * np.cos(angle)
    return _splatted(y, x, reach)


def _splatted(y: NDArray[Any], x: NDArray[Any], reach: int) -> NDArray[np.float32]:
    """Kernels of points [N, P] around the centre, each point shared among the four pixels next to it."""
    side = 2 * reach + 3  # a border, so that the neighbours of every point are inside
    kernels = np.zeros((len(y), side, side))
    image = np.broadcast_to(np.arange(len(y))[:, None], y.shape)
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - np.abs(y - top - dy)) * (1 - np.abs(x - left - dx))
            np.add.at(kernels, (image, top + dy + reach + 1, left + dx + reach + 1), weight)
    return (kernels / kernels.sum((1, 2), keepdims=True)).astype(np.float32)


def _blurred(images: Images, kernels: NDArray[np.float32]) -> Images:
    """Each image convolved with its kernel [N, k, k]; beyond the border it is mirrored."""
    side, reach = images.shape[1], kernels.shape[1] // 2
    margin = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    padded = np.pad(images, margin, mode="symmetric").astype(np.float32)
    size = (side + 2 * reach,) * 2
    spectrum = np.fft.rfft2(padded, axes=(1, 2)) * np.fft.rfft2(kernels, size, axes=(1, 2))[..., None]
    # The product is a circular convolution whose first 2 * reach rows and columns are wrapped; the rest is the image.
    return _rounded(np.fft.irfft2(spectrum, size, axes=(1, 2))[:, 2 * reach :, 2 * reach :])
