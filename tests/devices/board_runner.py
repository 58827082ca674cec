"""A worker whose runtime does what the content of a model says; started by tests as a program of its own."""

import os
import signal
import time
from collections.abc import Iterable
from typing import Any

from nas.devices.board import worker
from nas.devices.board.errors import BoardError


class ScriptedSession:
    build_s = 0.5
    engine_bytes = 1234

    def __init__(self, model: bytes) -> None:
        self.warnings = ["skipped a tactic"] if model == b"warns" else []
        self._model = model

    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": "x", "dtype": "float32", "shape": [1, 3]}]

    def set_inputs(self, feeds: dict[str, bytes]) -> None:
        if self._model == b"refuses inputs" or set(feeds) - {"x"}:
            raise BoardError("bad_request", "no such input")

    def time(self, runs: int, warmup: int) -> dict[str, Any]:
        if self._model == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._model == b"killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._model == b"exits":
            os._exit(3)
        if self._model == b"hang":
            time.sleep(600)
        return {
            "warmup": warmup,
            "samples_ms": [1.0 + i / 100 for i in range(runs)],
            "host_ms": [1.1],
            "clock": "cuda_event",
        }

    def outputs(self) -> list[dict[str, Any]]:
        return [{"name": "y", "dtype": "float32", "shape": [1], "data": b"\0\0\0\0"}]

    def profile(self, runs: int) -> list[dict[str, Any]]:
        return [{"name": "conv", "median_ms": 0.25, "metadata": f"{runs} runs"}]

    def close(self) -> None:
        pass


class ScriptedChain:
    """Images take 1 ms each and leave where their first byte says; models do what their content says."""

    def __init__(self, sessions: list[ScriptedSession]) -> None:
        self._sessions = sessions

    def input(self) -> dict[str, Any]:
        return {"name": "x", "dtype": "uint8", "shape": [1, 3, 1, 1]}

    def time(self, images: Iterable[bytes]) -> dict[str, Any]:
        exits = [data[0] for data in images]
        samples = self._sessions[-1].time(len(exits), 0)["samples_ms"]
        return {"samples_ms": samples, "exits": exits, "clock": "cuda_event"}

    def close(self) -> None:
        pass


class ScriptedRunner:
    name = "scripted"
    streams_by = "missing"

    def available(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        print("a runtime that prints")  # must not come between the messages
        return {"runtime": "trt", "version": "8.2.1", "precisions": ["fp32", "fp16", "bf16"], "details": {}}

    def load(self, model_path: str, options: dict[str, Any]) -> ScriptedSession:
        with open(model_path, "rb") as f:
            model = f.read()
        if model == b"no engine":
            raise BoardError("out_of_memory", "the builder ran\nout of memory")
        if model == b"strange" or options["precision"] != "fp16":
            raise ValueError("what is this?")
        return ScriptedSession(model)

    def chain(self, sessions: list[ScriptedSession], thresholds: list[float]) -> ScriptedChain:
        assert len(sessions) == len(thresholds) + 1
        return ScriptedChain(sessions)


class MissingRunner:
    name = "missing"

    def available(self) -> str | None:
        return "no such program"


class RaisingRunner:
    name = "raising"

    def available(self) -> str | None:
        raise RuntimeError("module compiled against another version")


class CrashingRunner:
    name = "crashing"

    def available(self) -> str | None:
        os.kill(os.getpid(), signal.SIGSEGV)
        return None


if __name__ == "__main__":
    broken = [RaisingRunner(), CrashingRunner()] if os.environ.get("BROKEN_RUNNERS") else []
    worker.main([*broken, MissingRunner(), ScriptedRunner()])
