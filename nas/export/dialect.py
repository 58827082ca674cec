"""What runtimes want of an int8 graph: one small record each, read by the writer of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nas.core.records import Precision


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a runtime wants of an int8 graph.

    `activation_type` and `symmetric` give scale and zero point of a tensor from its range; `pair_before` lists the
    activations whose input is quantized too.
    """

    name: str
    precisions: tuple[Precision, ...]
    activation_type: Literal["uint8", "int8"]
    symmetric: bool
    pair_before: frozenset[str]

    def scale_and_zero_point(self, lo: float, hi: float) -> tuple[np.float32, int]:
        """Scale (float32, as the graph holds it) and zero point of a tensor with values in lo..hi."""
        if self.symmetric:
            return np.float32(max(hi, -lo, 1e-6) / 127.0), 0
        lo, hi = min(lo, 0.0), max(hi, 1e-6)
        scale = np.float32((hi - lo) / 255.0)
        return scale, int(np.clip(np.rint(-lo / float(scale)), 0, 255))


# ONNX Runtime on x86 fuses a ReLU into the next Q only where that Q itself clips at zero, hence uint8; a convolution
# before hard-swish or hard-sigmoid stays an integer one only with a pair between the two.
ORT = Dialect("ort", ("fp32", "int8"), "uint8", symmetric=False, pair_before=frozenset({"hard_swish", "hard_sigmoid"}))
DIALECTS = {dialect.name: dialect for dialect in (ORT,)}
