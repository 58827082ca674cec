"""The backend against the real Python bindings of five TensorRT releases, over libraries that do nothing.

The bindings are fetched into a scratch environment by their ordinary name (they are NVIDIA's and never part of this
project). Shown: names, numbers of enumerations, subclassing, and that the stored names which the offline tests rely on
are those of the bindings. Not shown: that an engine builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from trt_examples import SHARED, tool, tools

from nas.testing import skip

BOARD = Path(__file__).parents[2] / "nas" / "devices"
RELEASES = ("8.6.1", "10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
DRIVE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
from board import trt_engine
from board.errors import BoardError

said = {"version": trt_engine.version_of(trt_engine.import_tensorrt())}
lines = []
logger = trt_engine.make_logger(trt, lines)
assert isinstance(logger, trt.ILogger)
for severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING, trt.ILogger.INFO):
    logger.log(severity, "m")
said["lines"] = lines
profiler = trt_engine.make_profiler(trt)
assert isinstance(profiler, trt.IProfiler)
profiler.report_layer_time("conv", 0.5)
said["rows"] = profiler.rows
said["dtypes"] = [
    trt_engine.dtype_of(trt, getattr(trt.DataType, member), "x")[0]
    for member, *_ in trt_engine.DTYPES if hasattr(trt.DataType, member)
]
said["flags"] = [trt_engine._network_flags(trt, weak) for weak in (True, False)]

class Config:                       # what is set, by the names that the real class has
    def __setattr__(self, name, value):
        assert hasattr(trt.IBuilderConfig, name), name
        self.__dict__[name] = value
    def __getattr__(self, name):
        assert hasattr(trt.IBuilderConfig, name), name
        return lambda *a: self.__dict__.setdefault("called", []).append([name, str(a[0])])

config = Config()
trt_engine._configure(trt, config, 64, "int8" if hasattr(trt.BuilderFlag, "FP16") else "fp32")
said["config"] = sorted(name for name in config.__dict__ if name != "called")
said["called"] = config.called
try:                                # as far as a builder without a library lets it
    trt_engine.build(trt, {"model": sys.argv[2], "precision": "fp32", "typing": "auto", "timing_cache": None,
                           "workspace_mib": 64, "engine": "", "report": ""})
except TypeError as e:
    said["build"] = str(e)
print(json.dumps(said))
"""


@cache
def environment(release: str) -> tuple[str, dict[str, str]]:
    """Interpreter and variables under which a release can be imported; the calling test is skipped without."""
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        skip("the bindings are fetched for CPython 3.11 on Linux, this is another one")
    tools()
    given = os.environ.get("NAS_TRT_SCRATCH")
    folder = Path(given) if given else _scratch()
    limited = {"PIP_TIMEOUT": "5", "PIP_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in limited}
    os.environ.update(limited)
    try:
        python, variables = tool("envs").make_env(folder, release)
    except (subprocess.CalledProcessError, SystemExit) as e:
        skip(f"no package index gives the bindings of TensorRT {release}, or no C compiler is here: {e}")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    variables.pop("PYTHONPATH", None)
    return str(python), variables


@cache
def _scratch() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="nas-trt-wheels-"))


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Any:
    yield
    import shutil

    if _scratch.cache_info().currsize:
        shutil.rmtree(_scratch(), ignore_errors=True)


@pytest.mark.parametrize("release", RELEASES)
def test_the_backend_works_with_the_real_bindings(release: str, tmp_path: Path) -> None:
    from test_trt_conformance import onnx

    python, variables = environment(release)
    model = tmp_path / "model.onnx"
    model.write_bytes(onnx())
    done = subprocess.run(
        [python, "-c", DRIVE, str(BOARD), str(model)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    major, minor = said["version"][:2]
    assert release.startswith(f"{major}.{minor}")
    assert said["lines"] == ["[E] m", "[E] m", "[W] m"]
    assert said["rows"] == [["conv", 0.5]]
    assert {"float32", "float16", "int8", "int32", "bool"} <= set(said["dtypes"])
    assert ("int64" in said["dtypes"]) == (major >= 10)
    assert said["flags"] == {8: [1, 1], 10: [1, 3], 11: [0, 1]}[major]  # the bits moved from 10 to 11
    assert "profiling_verbosity" in said["config"] and "builder_optimization_level" in said["config"]
    called = [name for name, _ in said["called"]]
    assert called == ["set_memory_pool_limit", *(["set_flag"] * 2 if major < 11 else [])]
    assert "factory function returned nullptr" in said["build"]


@pytest.mark.parametrize("release", RELEASES)
def test_the_stored_names_are_those_of_the_real_bindings(release: str) -> None:
    python, variables = environment(release)
    surface = SHARED / "facts" / "tensorrt_api_surface.json"
    script = tools() / "surface.py"
    done = subprocess.run(
        [python, str(script), "check", str(surface), release],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
