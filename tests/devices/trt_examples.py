"""What tests of the TensorRT backend share: a libcudart of their own, and a stand-in of the `tensorrt` module."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from nas.testing import requires_path, requires_program

# Where the stored surface of TensorRT's Python module and its tools lie; no part of the project.
SHARED = Path(os.environ.get("NAS_SHARED", Path(__file__).parents[3] / "shared"))
RELEASES = (
    "8.2", "8.4", "8.5", "8.6.1", "10.0.1", "10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106",
)  # fmt: skip
LAYER_NAMES = ("stem.conv/Conv", "stages.0.0.project/Conv")
INFORMATION = json.dumps(
    {"Layers": [{"Name": n, "LayerType": "CaskConvolution", "Metadata": f"[ONNX Layer: {n}]"} for n in LAYER_NAMES]}
)


def tools() -> Path:
    """Folder of the stub, the stand-in and the static check; the calling test is skipped where it is not there."""
    return requires_path(SHARED / "tools" / "trt_stub", "the stand-in for TensorRT (NAS_SHARED=FOLDER)")


def surface() -> dict[str, Any]:
    """Names of every release; the calling test is skipped where the file is not there."""
    path = requires_path(SHARED / "facts" / "tensorrt_api_surface.json", "TensorRT's stored names (NAS_SHARED=FOLDER)")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


@cache
def tool(name: str) -> Any:
    """A module of the tools."""
    folder = str(tools())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return __import__(name)


def fake_cudart(folder: Path, version: int = 12060, *, with_flags: bool = True) -> ctypes.CDLL:
    """The test library, compiled for a version of CUDA; skipped where there is no C compiler."""
    compiler = os.environ.get("CC") or requires_program("cc", "the stand-in for libcudart")
    path = folder / f"libcudart-{version}-{with_flags}.so"
    options = [f"-DVERSION={version}", *(["-DWITH_FLAGS"] if with_flags else [])]
    source = Path(__file__).parent / "fake_cuda" / "cudart.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *options, "-o", str(path), str(source)], check=True
    )
    library = ctypes.CDLL(str(path))
    library.fake_work.argtypes = [ctypes.c_void_p]
    return library


def stand_in(release: str, work: Callable[[int], bool], **more: Any) -> ModuleType:
    """The `tensorrt` module of one release; an inference calls `work` with the handle of its stream."""
    names = ("image", "logits")
    shapes = {"image": (1, 3, 8, 8), "logits": (1, 4)}
    made: list[Any] = []

    def run(context: Any, stream: int) -> bool:
        done = work(stream)
        profiler = vars(context).get("IExecutionContext.profiler")
        if profiler is not None:
            for layer in LAYER_NAMES:
                profiler.report_layer_time(layer, 0.25)
        return done

    module = tool("strict_trt").load(
        surface(),
        release,
        {
            "ICudaEngine.num_io_tensors": 2,
            "ICudaEngine.num_bindings": 2,
            "ICudaEngine.get_tensor_name": lambda _, index: names[index],
            "ICudaEngine.get_binding_name": lambda _, index: names[index],
            "ICudaEngine.get_tensor_mode": lambda _, name: (
                made[0].TensorIOMode.INPUT if name == "image" else made[0].TensorIOMode.OUTPUT
            ),
            "ICudaEngine.get_tensor_dtype": lambda *_: made[0].DataType.FLOAT,
            "ICudaEngine.get_binding_dtype": lambda *_: made[0].DataType.FLOAT,
            "ICudaEngine.binding_is_input": lambda _, index: index == 0,
            "IExecutionContext.get_tensor_shape": lambda _, name: shapes[name],
            "IExecutionContext.get_binding_shape": lambda _, binding: shapes[names[binding]],
            "IExecutionContext.execute_async_v3": lambda context, stream_handle: run(context, stream_handle),
            "IExecutionContext.execute_async_v2": lambda context, bindings, stream_handle, input_consumed=None: run(  # noqa: ARG005
                context, stream_handle
            ),
            "EngineInspector.get_engine_information": lambda *_: INFORMATION,
            "OnnxParser.parse": lambda *_: True,
            "IBuilderConfig.set_timing_cache": lambda *_, **__: True,
            **more,
        },
    )
    made.append(module)
    return module
