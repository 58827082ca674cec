"""The decoding of a package's infer.py is that of the training."""

import importlib.util
import io
import struct
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import nas.export
from nas.data import decode as training
from nas.export.package import DECODE_VERSION


@pytest.fixture(scope="module")
def infer() -> ModuleType:
    path = Path(nas.export.__file__).with_name("infer.py.txt")
    loader = SourceFileLoader("packaged_infer", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_versions_are_equal(infer: ModuleType) -> None:
    assert infer.DECODE_VERSION == DECODE_VERSION == training.DECODE_VERSION
    assert infer.FORMATS == training.FORMATS
    assert infer.MAX_FILE_BYTES == training.MAX_FILE_BYTES


def saved(folder: Path, kind: str) -> Path:
    pixels, path = photo(90, 70), folder / f"a.{kind.split('-')[0]}"
    image = Image.fromarray(pixels)
    if kind == "png-grey":
        image = image.convert("L")
    elif kind == "png-16":
        image = Image.fromarray((pixels[:, :, 0].astype(np.uint16) * 257 + 11).astype(np.uint16))
    elif kind == "png-palette":
        image = image.convert("P")
    elif kind == "png-alpha":
        image.putalpha(Image.fromarray(pixels[:, :, 1]))
    elif kind == "png-key":
        image.save(path, transparency=tuple(int(v) for v in pixels[0, 0]))
        return path
    elif kind == "tif-float":
        image = Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255)
    elif kind == "tif-cmyk":
        image = image.convert("CMYK")
    elif kind == "jpg-rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
        return path
    elif kind == "gif":
        image = image.convert("P")
        image.save(path, save_all=True, append_images=[image.rotate(90)])
        return path
    image.save(path)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_of_holding_a_camera_is_turned_as_in_training(
    infer: ModuleType, tmp_path: Path, suffix: str, orientation: int
) -> None:
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(90, 70)).save(path, exif=exif)
    assert np.array_equal(infer.load_images(str(path), 32)[0], training.decode_image(path, 32))


KINDS = ["png", "png-grey", "png-16", "png-palette", "png-alpha", "png-key", "jpg", "jpg-rotated", "tif-cmyk"]


@pytest.mark.parametrize("kind", [*KINDS, "tif-float", "gif", "bmp", "webp", "ppm"])
@pytest.mark.parametrize("resolution", [32, 70, 96])
def test_every_kind_of_file_decodes_as_in_training(
    infer: ModuleType, tmp_path: Path, kind: str, resolution: int
) -> None:
    path = saved(tmp_path, kind)
    assert np.array_equal(infer.load_images(str(path), resolution)[0], training.decode_image(path, resolution))


@pytest.mark.parametrize(("magic", "channels"), [("P5", 1), ("P6", 3)])
@pytest.mark.parametrize("largest", [1, 100, 255, 1000, 65535])
def test_netpbm_is_read_without_pillow_as_pillow_reads_it(
    infer: ModuleType, tmp_path: Path, magic: str, channels: int, largest: int
) -> None:
    kind = "u1" if largest < 256 else ">u2"
    values = np.random.default_rng(0).integers(0, largest + 1, (40, 50, channels)).astype(kind)
    path = tmp_path / "a.pnm"
    path.write_bytes(f"{magic}\n# a comment\n50 40\n{largest}\n".encode() + values.tobytes())
    assert np.array_equal(infer.load_images(str(path), 32)[0], training.decode_image(path, 32))


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (64, 64), (100, 37), (37, 60), (300, 200), (9, 8), (1, 1)])
def test_own_resizing_is_that_of_pillow(infer: ModuleType, size: tuple[int, int]) -> None:
    pixels = photo(*size)
    for resolution in (8, 32, 57):
        theirs = np.asarray(training.square(Image.fromarray(pixels), resolution)).astype(int)
        # Pillow may choose the order of the two passes, and each rounds: one grey level at most
        assert np.abs(infer.square(pixels, resolution) - theirs).max() <= 1
        if size[0] >= size[1]:
            assert np.array_equal(infer.square(pixels, resolution), theirs)


def test_npy_holds_one_image_or_several(infer: ModuleType, tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.npy", photo(40, 30)
    expected = np.asarray(training.square(Image.fromarray(pixels), 16))
    np.save(path, pixels)
    assert np.array_equal(infer.load_images(str(path), 16), expected[None])
    np.save(path, np.stack([pixels, pixels]))
    assert np.array_equal(infer.load_images(str(path), 16), np.stack([expected, expected]))
    np.save(path, pixels[:, :, 0])
    assert (np.ptp(infer.load_images(str(path), 16), axis=3) == 0).all()


def test_broken_files_are_explained(infer: ModuleType, tmp_path: Path) -> None:
    def message(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(infer.PackageFault) as e:
            infer.load_images(str(path), 32)
        return str(e.value).replace(str(path), name)

    buffer = io.BytesIO()
    Image.fromarray(photo(40, 40)).save(buffer, "PNG")
    assert message("a.png", buffer.getvalue()[:300]).startswith("a.png: not an image, or a broken one: ")
    assert message("b.jpg", b"") == "b.jpg: empty file"
    assert message("c.ppm", b"P6 10 10 255\nshort") == "c.ppm: broken image: the file is cut off"
    assert message("d.pgm", b"P5 0 4 255\n") == "d.pgm: broken PGM or PPM header"
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert message("e.npy", (tmp_path / "x.npy").read_bytes()).startswith("e.npy: not a plain array: ")
    np.save(tmp_path / "x.npy", np.zeros((4, 4, 3)))
    assert "expected uint8 [H, W, 3]" in message("f.npy", (tmp_path / "x.npy").read_bytes())
    bomb = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    assert "g.bmp: not an image, or a broken one: Image size" in message("g.bmp", bomb)
    half = bomb[:18] + struct.pack("<II", 10000, 10000) + bomb[26:]  # Pillow itself only warns of it
    assert "h.bmp: not an image, or a broken one: Image size" in message("h.bmp", half)
    with pytest.raises(infer.PackageFault, match=r"missing\.png: cannot be read: No such file"):
        infer.load_images(str(tmp_path / "missing.png"), 32)


@pytest.fixture
def before_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's `open` as it was before 8.0: it takes no formats and tries all."""
    now = Image.open
    monkeypatch.setattr(Image, "open", lambda fp, mode="r": now(fp, mode))


@pytest.mark.usefixtures("before_8")
def test_pillow_that_cannot_be_told_the_formats_opens_the_same_files(infer: ModuleType, tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        path = saved(tmp_path, suffix)
        assert infer.load_images(str(path), 32).shape == (1, 32, 32, 3)
    path = tmp_path / "a.eps"  # Pillow would hand it to another program
    Image.fromarray(photo(40, 40)).save(path)
    with pytest.raises(infer.PackageFault, match=r"a\.eps: not an image, or a broken one: its format is EPS"):
        infer.load_images(str(path), 32)
