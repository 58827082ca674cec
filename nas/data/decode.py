"""The one decoding of an image file, in training and, copied in meaning, in deployed packages.

Steps: first frame of the file; rotation by its EXIF tag; 16 bits scaled to 8; transparency laid over white; RGB;
shorter side resized to the resolution (bilinear over the whole footprint of a pixel, so nothing is aliased); centre
crop. Colour profiles are not applied. Pillow resizes 8-bit images in whole numbers, so machines agree.
"""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nas.core.errors import DataError
from nas.data.records import Images, check_resolution

DECODE_VERSION = 1
"""Counts changes of what a file decodes to; part of a folder's identity."""

# Raster formats only: Pillow would hand EPS to Ghostscript, another program. JPEG includes the MPO of stereo cameras.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

MAX_FILE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A decoded image: pixels uint8 [H, H, 3], the shorter side of the file, and the largest 16-bit value it held."""

    pixels: Images
    shorter_side_px: int
    deep_max: int | None


def decode_image(path: Path | str, resolution: int) -> Images:
    """An image file as uint8 [resolution, resolution, 3], RGB.

    Args:
        path: the file; its format is found by content, not by name.
        resolution: side of the result in pixels; smaller images are enlarged.

    Raises:
        DataError: a file that is missing, empty, truncated, corrupt, too large to be true or not an image.
        ConfigError: a resolution out of range.
    """
    check_resolution(resolution)
    with refusing_bombs():
        return decode_bytes(read_image_file(Path(path)), resolution, str(path)).pixels


def refusing_bombs() -> warnings.catch_warnings[None]:
    """A context in which Pillow's warning about a far too large image is an error (it warns at half its limit)."""
    return warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)


def read_image_file(path: Path) -> bytes:
    """The bytes of a regular file of sensible size.

    Raises:
        DataError: missing, empty, too large, unreadable or not a regular file (reading a pipe would wait for ever).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise DataError(f"{path}: empty file")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {status.st_size} bytes, more than the {MAX_FILE_BYTES} allowed for one image")
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e


def decode_bytes(data: bytes, resolution: int, where: str) -> Decoded:
    """Like `decode_image`, from the bytes of a file; `where` begins every message. Called inside `refusing_bombs`.

    Raises:
        DataError: not an image, or a broken one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            deep_max = _deep_max(image)
            rgb = to_rgb(image)
            return Decoded(np.asarray(square(rgb, resolution)), min(image.size), deep_max)
    except UnidentifiedImageError as e:
        raise DataError(f"{where}: not an image (known formats: {', '.join(_known_formats())})") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        limit = Image.MAX_IMAGE_PIXELS
        raise DataError(f"{where}: refused, more than {limit} pixels (a decompression bomb?)") from e
    except MemoryError as e:
        raise DataError(f"{where}: too large for the memory") from e
    except Exception as e:  # every kind of broken file makes Pillow raise another kind of error; each becomes one row
        raise DataError(f"{where}: broken image: {str(e) or type(e).__name__}") from e


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()  # Pillow loads its format modules on demand only, and not all are in every build
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode in 8-bit RGB.

    16-bit grey is divided by 257, so that 65,535 becomes 255 (Pillow's own conversion saturates everything above 255);
    32-bit whole numbers are taken for 16-bit values, floats for 0 to 1.

    Raises:
        ValueError: numbers out of these ranges.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        full = 1.0 if image.mode == "F" else 65535.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= full):
            raise ValueError(f"values of mode {image.mode} must lie between 0 and {full:g}; save it as 8-bit or 16-bit")
        image = Image.fromarray(np.floor(values * (255 / full) + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_max(image: Image.Image) -> int | None:
    if not image.mode.startswith("I"):
        return None
    return int(np.asarray(image).max())


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square of an RGB image, resized to `resolution` px: the shorter side fills it exactly."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) == (resolution, resolution):
        return image
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
