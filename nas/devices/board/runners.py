"""Every runtime that this package can measure with, in order of preference: import another one here to add it.

A runner is a plain class with `name`, `available()`, `describe()` and `load(model_path, options)`, as
`ort_runner.OnnxRuntimeRunner` has them. Optional attributes: `slow_start` (default true: making a session takes
seconds, so few are made and few live at once), `dynamic_batch` (default false: the host fixes the batch of a model) and
`streams_by`: the name of the runner that has to be there, most often this one, for `chain(sessions, thresholds)`, which
makes of sessions what times images one by one: `input()`, `time(images)`, `close()`, as `ort_runner.OnnxRuntimeChain`.
A session may have `run_only(runs)`, which runs inferences and does nothing else: where the board has power sensors, the
energy of an inference is measured with it; without it, that of whole networks from the difference of a long and a short
call of `time`. It may have `transfer_ms()`, the copies of inputs and outputs.
"""

from typing import Any, List

from .ort_runner import OnnxRuntimeRunner
from .trt_engine import TensorRtRunner
from .trtexec import TrtexecRunner


def all_runners() -> List[Any]:
    """One of each, the preferred ones first."""
    return [TrtexecRunner(), TensorRtRunner(), OnnxRuntimeRunner()]
