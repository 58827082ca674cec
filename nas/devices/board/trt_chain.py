"""Engines one behind the other, as exits are deployed on TensorRT: the host reads one number behind each and decides.

The feature map that an engine writes is the input of the next one where it lies: nothing of it is copied. The time of
an image is what passes on the GPU between an event behind its upload, which is not timed, and one that is queued when
the host has decided to leave or has queued the last engine. So each engine that was run is in it, and what the host
takes to read a confidence, to decide and to queue the next engine; copying the answer is not, as for an engine alone.
"""

import struct
import time
from typing import Any, Dict, Iterable, List

from .errors import BoardError

WARMUP_S = 0.2
WARM_FOR_S = 0.5  # a GPU that was idle for less needs no further warm-up
_FLOAT32 = struct.Struct("<f")


class TensorRtChain(object):
    """Engines of `trt_engine.TensorRtSession`, which nobody else uses from now on."""

    def __init__(self, cuda: Any, sessions: List[Any], thresholds: List[float], owners: List[Any]) -> None:
        """Connects the engines and makes them ready.

        Args:
            cuda: an implementation of `cuda.Runtime`.
            sessions: of the models of a chain, or of one.
            thresholds: between two of them each: an image leaves there from this confidence on.
            owners: what `close` closes: the sessions themselves, or what made them.

        Raises:
            BoardError: `unsupported`: an engine does not take what the one before it gives; TensorRT or CUDA refuses.
        """
        self._cuda = cuda
        self._sessions = sessions
        self._owners = owners
        # decided in float32, in which the exported graphs compare
        self._thresholds = [_FLOAT32.unpack(_FLOAT32.pack(threshold))[0] for threshold in thresholds]
        self._surest = [_confidence_of(session) for session in sessions[:-1]]
        for number in range(1, len(sessions)):
            sessions[number].read_from(_features_of(sessions[number - 1]))
        for session in sessions:
            session.make_ready()
        self._used_s = float("-inf")  # when the last image had passed

    def input(self) -> Dict[str, Any]:
        """Name, dtype and shape of the image."""
        entry: Dict[str, Any] = self._sessions[0].inputs()[0]
        return entry

    def time(self, images: Iterable[bytes]) -> Dict[str, Any]:
        """Puts one image after the other into place and times its way; after a pause a first one warms up for 200 ms.

        Args:
            images: raw values as the input takes them, C order.

        Returns:
            `samples_ms`; `exits`: the number of the engine behind which each image left; `clock`.

        Raises:
            BoardError: TensorRT or CUDA refuses.
        """
        samples, exits = [], []
        start, end = self._cuda.event(), self._cuda.event()
        try:
            for data in images:
                now_s = time.perf_counter()
                until_s = now_s + (0.0 if now_s - self._used_s < WARM_FOR_S else WARMUP_S)
                while time.perf_counter() < until_s:
                    self._passed(data, start, end)
                exits.append(self._passed(data, start, end))
                samples.append(self._cuda.elapsed_ms(start, end))
                self._used_s = time.perf_counter()
        finally:
            self._cuda.free_event(start)
            self._cuda.free_event(end)
        return {"samples_ms": samples, "exits": exits, "clock": "cuda_event"}

    def close(self) -> None:
        """Gives the engines back."""
        for owner in self._owners:
            owner.close()

    def _passed(self, data: bytes, start: Any, end: Any) -> int:
        """The number of the engine behind which an image left; its time is that between the events."""
        sessions, cuda = self._sessions, self._cuda
        sessions[0].place(data)
        cuda.record(start, sessions[0].stream)
        number = 0
        for threshold in self._thresholds:
            sessions[number].launch()
            if _FLOAT32.unpack(sessions[number].fetched(self._surest[number], end))[0] >= threshold:
                break
            number += 1
        else:
            sessions[number].launch()
        cuda.record(end, sessions[number].stream)
        while not cuda.is_done(end):  # spins, as where an engine is timed alone
            pass
        return number


def _confidence_of(session: Any) -> Dict[str, Any]:
    for tensor in session.tensors(is_input=False):
        if tensor["name"] == "confidence" and (tensor["dtype"], tensor["bytes"]) == ("float32", _FLOAT32.size):
            found: Dict[str, Any] = tensor
            return found
    raise BoardError("unsupported", "an engine of a chain gives no confidence of one float32")


def _features_of(session: Any) -> Dict[str, Any]:
    for tensor in session.tensors(is_input=False):
        if len(tensor["shape"]) == 4:
            found: Dict[str, Any] = tensor
            return found
    raise BoardError("unsupported", "an engine of a chain gives no feature map")
