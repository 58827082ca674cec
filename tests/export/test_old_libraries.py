"""The infer.py of a package with the Python, NumPy and Pillow of older JetPacks, and over an ssh that says ASCII.

The libraries are fetched into a scratch environment; they are those of Ubuntu 18.04 and 20.04 (JetPack 4 and 5).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from export_networks import smooth_images
from PIL import Image

from nas import export as export_module
from nas.data import decode as training
from nas.testing import skip

SIDE = 32
CLASSES = ["grün", "目录", "c", "d"]
RELEASES = {
    "3.6": ("numpy==1.13.3", "Pillow==5.1.0"),
    "3.8": ("numpy==1.17.4", "Pillow==7.0.0"),
}
# Stands for ONNX Runtime, whose wheels want newer libraries: logits are means of channels in a corner, and a constant.
RUNTIME = """
import numpy as np
__version__ = "0"
class SessionOptions(object):
    pass
class Output(object):
    name = "logits"
class InferenceSession(object):
    def __init__(self, data, options, providers):
        pass
    def get_outputs(self):
        return [Output()]
    def run(self, names, feeds):
        return [np.append(feeds["image"][:, :, :16, :16].mean(axis=(2, 3)) / 255, 0.5)[None].astype(np.float32)]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a package as infer.py reads."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copy(Path(export_module.__file__).with_name("infer.py.txt"), folder / "infer.py")
    (folder / "onnxruntime.py").write_text(RUNTIME, encoding="utf-8")
    (folder / "model.onnx").write_bytes(b"a model")
    manifest = {
        "class_names": CLASSES,
        "candidate": {"resolution": SIDE, "exits": []},
        "latency": None,
        "form": "logits",
        "files": {"model.onnx": sha256(b"a model").hexdigest()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=list(RELEASES))
def old_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Interpreter of an environment with old libraries; the calling test is skipped without."""
    version = request.param
    names = (str(p) for p in Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = next(names, None) or shutil.which(f"python{version}")
    if found is None:
        skip(f"there is no Python {version} here")
    folder = tmp_path_factory.mktemp("old")
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--timeout", "5", "--retries", "0", "--only-binary", ":all:"]
    for command in ([found, "-m", "venv", str(folder)], [*install, *RELEASES[version]]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            skip(f"no package index gives {' and '.join(RELEASES[version])}: {done.stderr[-300:]}")
    yield str(python)
    shutil.rmtree(folder, ignore_errors=True)


def infer(python: str, package: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [python, str(package / "infer.py"), *arguments]
    inherited = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, env={**inherited, **environment}, check=False, timeout=60)


def expected(path: Path) -> list[float]:
    """Probabilities of the stand-in's logits for what training decodes."""
    logits = np.append(training.decode_image(path, SIDE)[:16, :16].mean(axis=(0, 1)) / 255, 0.5)
    shares = np.exp(logits) / np.exp(logits).sum()
    return [float(share) for share in shares]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_images_are_read_with_the_libraries_of_older_systems(
    old_python: str, package: Path, tmp_path: Path, suffix: str, orientation: int
) -> None:
    pixels = smooth_images(1, 80, 3)[0][:56]
    pixels[:28, :40] //= 4
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    if (suffix, orientation) != ("png", 6):  # Pillow before 6.0 does not read it
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    done = infer(old_python, package, str(path), "--json")
    assert done.returncode == 0, done.stderr
    told = {entry["class"]: entry["probability"] for entry in json.loads(done.stdout)["top"]}
    assert [told[name] for name in CLASSES] == pytest.approx(expected(path), abs=2e-3)


def printed(python: str, package: Path, folder: Path, **environment: str) -> None:
    path = folder / "größe.npy"
    np.save(path, smooth_images(1, SIDE, 3)[0])
    done = infer(python, package, str(path), **environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode("utf-8")
    assert said.startswith(f"{path}  ") and all(f"%  {name}\n" in said for name in CLASSES)


def test_class_names_and_paths_are_printed_over_ssh_with_an_old_python(
    old_python: str, package: Path, tmp_path: Path
) -> None:
    printed(old_python, package, tmp_path)


def test_class_names_and_paths_are_printed_where_the_output_is_said_to_be_ascii(package: Path, tmp_path: Path) -> None:
    printed(sys.executable, package, tmp_path, PYTHONIOENCODING="ascii")


def test_names_of_functions_are_those_that_old_numpy_has() -> None:
    for name in ("infer", "parity", "bench", "build_engine"):
        script = Path(export_module.__file__).with_name(f"{name}.py.txt").read_text(encoding="utf-8")
        assert 'kind="stable"' not in script, "NumPy 1.13 calls a stable sort mergesort"
