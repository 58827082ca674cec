"""What a classification costs beside its network is measured on real pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nas.core.errors import DataError
from nas.measure.pipeline import postprocess_ms, preprocess_ms


def _jpeg(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_large_files_take_longer_than_small_ones_and_pixels_the_least() -> None:
    large, small = preprocess_ms([_jpeg(1200)], 32), preprocess_ms([_jpeg(64)], 32)
    pixels = preprocess_ms([np.zeros((32, 32, 3), np.uint8)], 32)
    assert large > 3 * small > 3 * pixels > 0


def test_most_pictures_are_in_time() -> None:
    """With one large picture in five, the figure is not that of the small ones."""
    mixed = preprocess_ms([_jpeg(64)] * 4 + [_jpeg(1200)], 32)
    assert mixed > 2 * preprocess_ms([_jpeg(64)] * 5, 32)


def test_a_broken_file_is_an_error() -> None:
    with pytest.raises(DataError, match="not an image"):
        preprocess_ms([b"no picture"], 32)


def test_reading_the_answer_takes_microseconds() -> None:
    assert 0 < postprocess_ms(10) < 1
