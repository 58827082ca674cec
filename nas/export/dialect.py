"""What runtimes want of a graph: one small record each, read by the writer of layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DeviceError, UsageError
from nas.core.records import ConvSpec, DeviceProfile, LayerSpec, Precision
from nas.devices.capability import BF16_OPSET, newest_opset, reads_hard_swish, version_of

FloatType = Literal["float32", "float16", "bfloat16"]

_BF16_IR_VERSION = 10  # that came with BF16_OPSET


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a runtime wants of a graph.

    Attributes:
        name: shown in messages and manifests.
        precisions: of layers that it can express.
        activation_type: of quantized tensors.
        symmetric: zero points are 0.
        pair_before: activations whose input is quantized too.
        pairs_at: where the QuantizeLinear/DequantizeLinear pairs stand: "outputs": behind every tensor between the
            layers of an int8 block; "inputs": before the convolutions that are computed in int8, and on the skip input
            of a residual sum.
        weights: of int8 convolutions: "integers": int8 initializer, DequantizeLinear; "floats": float32 initializer,
            QuantizeLinear, DequantizeLinear.
        integer_bias: the bias of an int8 convolution is int32 (else float).
        weight_limit: largest integer of a weight, and negated the smallest.
        half_floats: fp16 layers, and what int8 layers leave in float, have float16 tensors, weights and scales in the
            graph, and bf16 layers bfloat16 ones. Else the graph is float32 there and the runtime is told to use half
            precision when it builds.
        rounds_bf16: bf16 layers are float32 with every weight and tensor rounded to bfloat16, for their accuracy on a
            runtime that has no such convolutions (ONNX Runtime on CPUs).
        opset: of the ONNX file.
        ir_version: of the ONNX file.
    """

    name: str
    precisions: tuple[Precision, ...]
    activation_type: Literal["uint8", "int8"]
    symmetric: bool
    pair_before: frozenset[str]
    pairs_at: Literal["outputs", "inputs"] = "outputs"
    weights: Literal["integers", "floats"] = "integers"
    integer_bias: bool = True
    weight_limit: int = 127
    half_floats: bool = False
    rounds_bf16: bool = False
    opset: int = 17
    ir_version: int = 9

    def float_type(self, precision: Precision) -> FloatType:
        """Type of the tensors that a layer in this precision has between its convolutions."""
        if not self.half_floats or precision == "fp32" or (precision == "bf16" and self.rounds_bf16):
            return "float32"
        return "bfloat16" if precision == "bf16" else "float16"

    @property
    def mixable(self) -> tuple[Precision, ...]:
        """Precisions that the parts of one network can have side by side.

        Where the runtime is told by a flag to use half precision, it uses it for everything that is not int8.
        """
        if self.name == "ort" or self.half_floats:
            return self.precisions
        return tuple(p for p in self.precisions if p != "fp32")

    def fitting(self, precisions: Iterable[Precision]) -> Dialect:
        """The same in the operator set that layers in these precisions need."""
        if self.rounds_bf16 or not self.half_floats or "bf16" not in precisions:
            return self
        return replace(self, opset=max(self.opset, BF16_OPSET), ir_version=max(self.ir_version, _BF16_IR_VERSION))

    def scale_and_zero_point(self, lo: float, hi: float) -> tuple[np.floating, int]:
        """Scale (in the type that the graph holds) and zero point of a tensor with values in lo..hi."""
        if self.symmetric:
            largest = np.array([max(hi, -lo, 1e-6) / 127.0])
            return self.scales(largest)[0], 0
        lo, hi = min(lo, 0.0), max(hi, 1e-6)
        scale = np.float32((hi - lo) / 255.0)
        return scale, int(np.clip(np.rint(-lo / float(scale)), 0, 255))

    def scales(self, values: np.ndarray) -> np.ndarray:
        """Positive scales [N] in the type of the graph: never smaller than given where they are rounded to float16."""
        if not self.half_floats:
            return values.astype(np.float32)
        half = np.maximum(values, _SMALLEST_HALF_SCALE).astype(np.float16)
        too_small = half.astype(np.float64) < values
        half[too_small] = np.nextafter(half[too_small], np.float16(np.inf))
        return half

    def weight_scales(
        self, weight: NDArray[np.float32], bias: NDArray[np.float32], input_scale: np.floating
    ) -> NDArray[np.floating]:
        """Scale of each output channel [out] of an int8 convolution: symmetric, -limit..limit.

        For an int32 bias it differs from max|w| / limit where a channel has nearly no weights but a bias (batch norm
        folded into a dead channel): the scale grows until the bias fits.

        Args:
            weight: [out, in / groups, k, k].
            bias: [out].
            input_scale: scale of the convolution's input.
        """
        largest: NDArray[np.float32] = np.maximum(np.abs(weight).max(axis=(1, 2, 3)), np.float32(1e-8))
        if not self.integer_bias:
            return self.scales(largest / float(self.weight_limit))
        fitting = np.abs(bias) / (np.float32(input_scale) * np.float32(_INT32_LIMIT))
        scales: NDArray[np.float32] = np.maximum(largest / np.float32(self.weight_limit), fitting)
        return scales

    def is_integer(self, layer: LayerSpec, spec: ConvSpec) -> bool:
        """True for the convolutions of an int8 layer that are computed in int8.

        For TensorRT by the rules of NVIDIA's Model Optimizer for GPUs (onnx/quantization/graph_utils.py,
        find_nodes_from_convs_to_exclude, commit a2fbac7): both channel counts of a group at least 16, or a dense
        convolution with one of them a multiple of 8 and one at least 16 (the first layer needs only the multiple), or
        a grouped one with a multiple of 8 channels and a kernel of at least 3. Squeeze-and-excitation and the last
        linear layer stay float: at one pixel they are bound by their launch, and an exit is decided by logits. The
        matrix products and the softmax of attention are no convolutions: they are float in every dialect.
        """
        if self.pairs_at == "outputs":
            return True
        if spec.name in ("se_reduce", "se_expand", "classifier"):
            return False
        out_channels, in_channels = spec.out_channels, spec.in_channels // spec.groups
        if out_channels >= 16 and in_channels >= 16:
            return True
        if spec.groups > 1:
            return out_channels % 8 == 0 and spec.kernel_size >= 3
        is_multiple = out_channels % 8 == 0 or in_channels % 8 == 0
        return is_multiple and (layer.kind == "stem" or out_channels >= 16 or in_channels >= 16)


def building_precision(precisions: Iterable[Precision], *, is_quantized: bool) -> Precision | Literal["mixed"]:
    """What a TensorRT builder is asked for, of a file with layers in these precisions.

    Where no convolution of an int8 layer is an integer one, as in heads, the file has no quantized tensor and no
    builder takes it as int8. It is fp16 then, as what is float in an int8 network always is: by the flag that is
    set together with that of int8, or in the graph where that has half floats.

    Args:
        precisions: of the layers.
        is_quantized: whether the file has quantized tensors.
    """
    names: set[Precision] = {"fp16" if p == "int8" and not is_quantized else p for p in precisions}
    return names.pop() if len(names) == 1 else "mixed"


_INT32_LIMIT = 2.0**30  # a bias stays a factor of two below the int32 range: the sum of products is added to it
# The least scale in float16: half of its subnormal numbers above 0 still have four bits below it.
_SMALLEST_HALF_SCALE = 2.0**-20

# ONNX Runtime on x86 fuses a ReLU into the next Q only where that Q itself clips at zero, hence uint8; a convolution
# before hard-swish or hard-sigmoid stays an integer one only with a pair between the two.
# Weights have 7 bits: without VNNI its kernels add two products of uint8 and int8 in 16 bits, which then saturate
# without a word (logits of random networks 20 % off on such a host); 2 * 255 * 64 fits. So a file gives the same logits
# on every host.
ORT = Dialect(
    "ort",
    ("fp32", "int8"),
    "uint8",
    symmetric=False,
    pair_before=frozenset({"hard_swish", "hard_sigmoid"}),
    weight_limit=64,
)

# TensorRT before 10.13, weakly typed: the graph is float32 (scales too: the parsers of 8.x read nothing else), the
# builder is told FP16, or INT8 and FP16. Rules: onnx-tensorrt 8.2-GA, 8.6-GA and 10.0-GA.
TRT_8_4 = Dialect(
    "tensorrt-8.4",
    ("fp32", "fp16", "int8"),
    "int8",
    symmetric=True,
    pair_before=frozenset(),
    pairs_at="inputs",
    weights="floats",
    integer_bias=False,
    opset=newest_opset((8, 4)),
    ir_version=8,
)
# JetPack 4.6: the parser of TensorRT 8.0 and 8.2 ends at opset 13, in which hard-swish is HardSigmoid and Mul.
TRT_8_0 = replace(TRT_8_4, name="tensorrt-8.0", opset=newest_opset((8, 0)), ir_version=7)
# Strongly typed, the only kind that TensorRT 11 knows: types are in the graph, scales of the type of their float side,
# which ONNX allows for float16 from opset 19 on. bf16 has no flag there either: only a graph of this dialect has it.
TRT_10_13 = Dialect(
    "tensorrt-10.13",
    ("fp32", "fp16", "bf16", "int8"),
    "int8",
    symmetric=True,
    pair_before=frozenset(),
    pairs_at="inputs",
    integer_bias=False,
    half_floats=True,
    opset=19,
)
# Its answers on ONNX Runtime, which computes float16 but has no bfloat16 convolution.
TRT_10_13_ANSWERS = replace(TRT_10_13, rounds_bf16=True)
DIALECTS = (ORT, TRT_8_0, TRT_8_4, TRT_10_13)


def dialect_named(name: str) -> Dialect:
    """The dialect with this name.

    Raises:
        UsageError: there is none; the message lists them.
    """
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    raise UsageError(f"no dialect {name!r}; dialects: {', '.join(d.name for d in DIALECTS)}")


def dialect_for(profile: DeviceProfile) -> Dialect:
    """What the runtime of a device reads.

    Raises:
        UsageError: TensorRT before 8.0, or without a version.
    """
    if "tensorrt" not in profile.runtime.lower():
        return ORT
    return tensorrt_dialect(profile.runtime_version)


def tensorrt_dialect(version: str) -> Dialect:
    """The dialect for a version of TensorRT, such as 8.2.1, 10.3.0.30 or 11.4.

    Raises:
        UsageError: before 8.0, or no version.
    """
    try:
        number = version_of(version)
    except DeviceError:
        number = ()
    if number < (8, 0):
        raise UsageError(f"TensorRT {version!r}: graphs can be written for TensorRT 8.0 and newer, such as 8.2 or 10.3")
    if not reads_hard_swish(number):
        return TRT_8_0
    return TRT_8_4 if number < (10, 13) else TRT_10_13


def target_dialect(target: str) -> Dialect:
    """The dialect of a runtime as a user names it: `ort`, or `tensorrt:VERSION`.

    Raises:
        UsageError: another name; the message says what is allowed.
    """
    kind, colon, version = target.partition(":")
    if kind == "tensorrt" and colon:
        return tensorrt_dialect(version)
    if target == ORT.name:
        return ORT
    raise UsageError(
        f"target {target!r}: give ort, or tensorrt: and its version, such as tensorrt:8.2 (JetPack 4.6), tensorrt:8.5 "
        "(JetPack 5.1) or tensorrt:10.3 (JetPack 6.1 to 6.2). On the board: python3 -c 'import tensorrt; "
        "print(tensorrt.__version__)'"
    )
