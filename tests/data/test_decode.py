"""One decoding for every kind of image file."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.core.errors import DataError
from nas.data import decode_image
from nas.data.decode import square, to_rgb

ORANGE = (250, 120, 30)


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def _ramp(width: int, height: int) -> Image.Image:
    """RGB image whose red grows to the right and whose green grows downwards."""
    red = np.broadcast_to(np.linspace(0, 255, width)[None], (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=2).astype(np.uint8))


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    pixels = decode_image(_save(tmp_path / "a.png", image), 8)
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(64))
    assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])


def test_bilevel_becomes_black_and_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    pixels = decode_image(_save(tmp_path / "a.png", image), 8)
    assert np.array_equal(pixels[..., 1], np.eye(8) * 255)


def test_palette_gives_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    assert np.all(decode_image(_save(tmp_path / "a.png", image), 8) == ORANGE)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
def test_transparent_pixels_are_white_and_opaque_ones_keep_their_colour(tmp_path: Path, kind: str) -> None:
    opaque = np.zeros((8, 8), dtype=bool)
    opaque[:, 4:] = True
    if kind == "palette":
        image = Image.new("P", (8, 8))
        image.putdata(opaque.astype(int).ravel().tolist())
        image.putpalette([9, 9, 9, 80, 80, 80])
        path = _save(tmp_path / "a.png", image, transparency=0)
    elif kind == "colour key":
        pixels = np.where(opaque[..., None], 80, 9).astype(np.uint8).repeat(3, axis=2)
        path = _save(tmp_path / "a.png", Image.fromarray(pixels), transparency=(9, 9, 9))
    else:
        color, alpha = np.where(opaque, 80, 9).astype(np.uint8), (opaque * 255).astype(np.uint8)
        bands = [color, alpha] if kind == "LA" else [color, color, color, alpha]
        path = _save(tmp_path / "a.png", Image.merge(kind, [Image.fromarray(band) for band in bands]))
    decoded = decode_image(path, 8)
    assert np.all(decoded[:, :4] == 255)
    assert np.all(decoded[:, 4:] == 80)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert np.all(decode_image(_save(tmp_path / "a.png", image), 8) == 127)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_cmyk_becomes_rgb(tmp_path: Path, name: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    pixels = decode_image(_save(tmp_path / name, image), 16)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_scaled_not_saturated(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decode_image(_save(tmp_path / name, Image.fromarray(values)), 8)[..., 0]
    assert np.array_equal(pixels, np.round(values / 257).astype(np.uint8))
    assert len(np.unique(pixels)) == 64


def test_16_bit_big_endian_values_are_scaled() -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (2, 2), values.tobytes())
    assert np.asarray(to_rgb(image))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_32_bit_whole_numbers_are_16_bit_values(tmp_path: Path) -> None:
    values = np.full((8, 8), 257 * 77, dtype=np.int32)
    assert np.all(decode_image(_save(tmp_path / "a.tif", Image.fromarray(values)), 8) == 77)
    path = _save(tmp_path / "b.tif", Image.fromarray(values * 1000))
    with pytest.raises(DataError, match=r"b\.tif: broken image: values of mode I must lie between 0 and 65535"):
        decode_image(path, 8)


def test_floats_are_0_to_1_or_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.tif", Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)))
    assert np.all(decode_image(path, 8) == 128)
    for value in (1.5, np.nan):
        path = _save(tmp_path / "b.tif", Image.fromarray(np.full((8, 8), value, dtype=np.float32)))
        with pytest.raises(DataError, match="values of mode F must lie between 0 and 1; save it as 8-bit or 16-bit"):
            decode_image(path, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = _ramp(32, 32)
    undo = {  # what a camera with this tag has stored: the inverse of what a viewer does
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / "a.jpg", stored, exif=exif, quality=95)
    difference = decode_image(path, 32).astype(int) - np.asarray(upright)
    assert np.abs(difference).max() <= 16


def test_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (0, 0, 255)), Image.new("RGB", (8, 8), (0, 255, 0))
    path = _save(tmp_path / "a.gif", first, save_all=True, append_images=[second])
    assert np.all(decode_image(path, 8) == (0, 0, 255))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (21, 20)])
def test_non_square_images_lose_their_longer_ends(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = decode_image(_save(tmp_path / "a.png", _ramp(*size)), 20)
    left, top = (size[0] - 20) // 2, (size[1] - 20) // 2
    assert np.array_equal(pixels, np.asarray(_ramp(*size))[top : top + 20, left : left + 20])


def test_crop_and_resize_equal_resize_and_crop() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8))
    whole = image.resize((20, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(square(image, 10)), np.asarray(whole)[:, 5:15])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (500, 2)])
def test_tiny_and_thin_images_are_enlarged(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = decode_image(_save(tmp_path / "a.png", Image.new("RGB", size, ORANGE)), 16)
    assert pixels.shape == (16, 16, 3) and np.all(pixels == ORANGE)


def test_fine_stripes_are_averaged_not_aliased(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    pixels = decode_image(_save(tmp_path / "a.png", Image.fromarray(stripes)), 8)
    assert np.abs(pixels.astype(int) - 127).max() <= 6


def _broken_files(folder: Path) -> dict[str, Path]:
    buffer = io.BytesIO()
    _ramp(64, 64).save(buffer, "PNG")
    png = buffer.getvalue()
    buffer = io.BytesIO()
    _ramp(64, 64).save(buffer, "JPEG")
    files = {
        "empty": b"",
        "text": b"<html>not found</html>",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": buffer.getvalue()[:400],
        "header only": png[:20],
        "wrong checksum": png[:60] + b"\xff\xff\xff\xff" + png[64:],
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


def test_broken_files_are_data_errors_that_name_the_file(tmp_path: Path) -> None:
    for name, path in _broken_files(tmp_path).items():
        with pytest.raises(DataError, match=f"{name}: (empty file|not an image|broken image: .)"):
            decode_image(path, 16)


def test_missing_files_folders_and_pipes_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: No such file"):
        decode_image(tmp_path / "gone.png", 16)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: not a regular file"):
        decode_image(tmp_path / "pipe.png", 16)
    with pytest.raises(DataError, match="not a regular file"):
        decode_image(tmp_path, 16)


def _png(side_px: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG written by hand: what Pillow would not write itself."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_keeps_its_upper_bits(tmp_path: Path) -> None:
    pixel = struct.pack(">HHH", *(value * 257 for value in ORANGE))
    (tmp_path / "a.png").write_bytes(_png(8, 16, (b"\0" + pixel * 8) * 8))
    assert np.all(decode_image(tmp_path / "a.png", 8) == ORANGE)


@pytest.mark.parametrize("side_px", [10_000, 60_000])
def test_decompression_bombs_are_refused_unread(tmp_path: Path, side_px: int) -> None:
    (tmp_path / "bomb.png").write_bytes(_png(side_px, 8, bytes(1000)))
    with pytest.raises(DataError, match=r"bomb\.png: refused, more than \d+ pixels"):
        decode_image(tmp_path / "bomb.png", 16)
