"""The names of CUDA that are used, in NVIDIA's real Python packages and runtime libraries; no GPU is needed.

They are fetched by their ordinary names into a scratch folder and are no part of this project. Shown: the names are
there, and a machine without a driver is an error of ours. Not shown: that anything runs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nas.devices.board import cuda
from nas.testing import skip

SOURCE = Path(cuda.__file__)


def fetched(folder: Path, package: str) -> Path:
    """Folder with a package; the calling test is skipped where no index gives it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--timeout", "5", "--retries", "0", "--target", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        skip(f"no package index gives {package} for this Python: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def names_of(class_name: str, holder: str) -> list[str]:
    """Attributes of `self.<holder>` in a class, with what is taken from enumerations: `cudaMemcpyKind.x`."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    chains = {ast.unparse(node) for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    return sorted(chain.removeprefix(f"self.{holder}.") for chain in chains if chain.startswith(f"self.{holder}."))


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("cuda-python==11.8.3", "cuda.cudart"),
        ("cuda-bindings==12.9.*", "cuda.bindings.runtime"),
        ("cuda-bindings==13.*", "cuda.bindings.runtime"),
    ],
)
def test_every_name_of_cuda_python_is_there(package: str, module: str, tmp_path: Path) -> None:
    folder = fetched(tmp_path / "site", package)
    names = names_of("CudaPython", "_rt")
    assert len(names) > 25
    code = (
        "import importlib, sys\n"
        "from functools import reduce\n"
        f"rt = importlib.import_module({module!r})\n"
        "missing = []\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        reduce(getattr, name.split('.'), rt)\n"
        "    except AttributeError:\n        missing.append(name)\n"
        "print('missing', missing)\n"
        "answer = rt.cudaRuntimeGetVersion()\n"
        "print('answer', type(answer).__name__, int(answer[0]) >= 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names, "cudaSetDevice"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'numpy'" in done.stderr:
        skip(f"{package} needs NumPy, which is not here")
    assert done.returncode == 0, done.stderr[-1500:]
    assert "missing []" in done.stdout
    assert "answer tuple True" in done.stdout


@pytest.mark.parametrize(
    ("package", "library", "number"),
    [
        ("nvidia-cuda-runtime-cu11==11.8.*", "libcudart.so.11.0", 11080),
        ("nvidia-cuda-runtime-cu12==12.6.*", "libcudart.so.12", 12060),
        ("nvidia-cuda-runtime==13.*", "libcudart.so.13", 13000),
    ],
)
def test_every_function_of_the_real_library_is_there_and_no_driver_is_an_error_of_ours(
    package: str, library: str, number: int, tmp_path: Path
) -> None:
    folder = fetched(tmp_path / "site", package)
    path = next(folder.rglob(library))
    code = (
        "import ctypes, sys\n"
        f"sys.path.insert(0, {str(SOURCE.parents[1])!r})\n"
        "from board.cuda import CtypesCuda\n"
        "from board.errors import BoardError\n"
        "lib = ctypes.CDLL(sys.argv[1])\n"
        "missing = [name for name in sys.argv[2:] if not hasattr(lib, name)]\n"
        "runtime = CtypesCuda(lib)\n"
        "print('missing', missing)\n"
        "for call in (runtime.version, lambda: runtime.alloc(8)):\n"
        "    try:\n        print('answer', call())\n"
        "    except BoardError as e:\n        print('error', e.kind, e.message)\n"
    )
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    called = {name for name in strings if name.startswith("cuda") and name.isidentifier()} - {"cudart"}
    called |= {name.split(".")[0] for name in names_of("CtypesCuda", "_lib")}
    called.discard("cuda")
    assert len(called) > 20
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *sorted(called)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert "missing []" in done.stdout
    if number >= 12000:  # before, even this needs a driver
        assert f"answer {number // 1000}" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(("error build_failed cudaMalloc failed with error ", "answer ")), last  # with a GPU it works
