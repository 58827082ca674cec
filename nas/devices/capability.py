"""What a board can do with TensorRT: precisions, ONNX operators. It bounds the search space beforehand.

Two things decide: the silicon (by its SoC) and the version of TensorRT that JetPack brought. Sources: NVIDIA's support
matrices and hardware tables; onnx-tensorrt docs/operators.md of each branch (opsets); ceccocats/tkDNN#26 and
NVIDIA-AI-IOT/torch2trt#255 (int8 on a Nano is slower than fp16), wang-xinyu/tensorrtx#831 (TX2); NVIDIA/Isaac-GR00T#575
(no fp8 engine on Orin). DLA cores are not used: they would need quantization and a table of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from nas.core.errors import DeviceError
from nas.core.records import Precision
from nas.devices.board.trtexec import BF16_VERSION

BoardPrecision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"]
Version = tuple[int, ...]

WITHOUT = "without_"  # begins the name of a detail of a profile that says why it lacks a precision

# bf16 graphs are written in the first opset whose convolutions may be bfloat16 (onnx, docs/Changelog.md). It is above
# what the documents of TensorRT 10.0 name; what later parsers say of it is not known here, and no board has built one.
BF16_OPSET = 22

_TYPED = BF16_VERSION[:2]
_UNTYPED = f"only strongly typed graphs say it, which are written for TensorRT {_TYPED[0]}.{_TYPED[1]} and newer"


@dataclass(frozen=True, slots=True)
class Silicon:
    """A SoC. `sm` is the compute capability of its GPU."""

    name: str
    sm: tuple[int, int]


# Thor counts as 11.0 under CUDA 13 and as 10.1 before.
SILICON = {
    "tegra210": Silicon("Jetson Nano, TX1", (5, 3)),
    "tegra186": Silicon("Jetson TX2", (6, 2)),
    "tegra194": Silicon("Jetson Xavier", (7, 2)),
    "tegra234": Silicon("Jetson Orin", (8, 7)),
    "tegra264": Silicon("Jetson Thor", (11, 0)),
}


@dataclass(frozen=True, slots=True)
class Rewrite:
    """An operator that this version cannot read, what stands for it, and why."""

    operator: str
    instead: str
    reason: str


@dataclass(frozen=True, slots=True)
class Capability:
    """What one board can do with one version of TensorRT.

    `precisions` can be built and are worth it; `without` says of every other one why not. `max_opset` is the newest
    ONNX opset that the parser is known to read.
    """

    precisions: tuple[BoardPrecision, ...]
    without: Mapping[BoardPrecision, str]
    max_opset: int
    rewrites: tuple[Rewrite, ...]

    def offered(self, precisions: tuple[Precision, ...]) -> tuple[Precision, ...]:
        """Those of `precisions` that the board can do."""
        return tuple(p for p in precisions if p in self.precisions)


def without_details(offered: tuple[Precision, ...], tensorrt: str, can: Capability | None) -> dict[str, str]:
    """Details for a device's profile: why it lacks each precision of a space that it does not offer.

    Args:
        offered: what it offers.
        tensorrt: version of its TensorRT.
        can: what its silicon can do with that, where that is known.
    """
    lacking: list[Precision] = [p for p in get_args(Precision) if p not in offered]
    known: dict[Precision, str] = {} if can is None else {p: can.without[p] for p in lacking if p in can.without}
    if version_of(tensorrt) < _TYPED:
        known.setdefault("bf16", _UNTYPED)
    known.setdefault("bf16", "its GPU is older than Ampere, which brought it")
    return {f"{WITHOUT}{p}": known.get(p, f"TensorRT {tensorrt} does not offer it there") for p in lacking}


def capability_of(soc: str, tensorrt: str) -> Capability:
    """What a board can do.

    Args:
        soc: such as `tegra234`, from `board.state`.
        tensorrt: version of TensorRT, such as `10.3.0`.

    Raises:
        DeviceError: the SoC is unknown, the version cannot be read, or this TensorRT does not run on it.
    """
    silicon = SILICON.get(soc)
    if silicon is None:
        raise DeviceError(f"SoC {soc!r} is not known; known: {', '.join(SILICON)}")
    version = version_of(tensorrt)
    if version >= (10,) and silicon.sm < (7, 0):
        raise DeviceError(
            f"TensorRT {tensorrt} has no kernels for {silicon.name} (sm {silicon.sm[0]}.{silicon.sm[1]}): 10 and later "
            "are built for sm 7.0 and newer. Its last JetPack is 4.6 with TensorRT 8.2"
        )
    without = {p: why for p in _ORDER if (why := _why_not(p, silicon, version))}
    rewrites = []
    if not reads_hard_swish(version):
        rewrites.append(
            Rewrite("HardSwish", "HardSigmoid, Mul", f"the parser of TensorRT {tensorrt} has no importer for it")
        )
    return Capability(
        precisions=tuple(p for p in _ORDER if p not in without),
        without=without,
        max_opset=newest_opset(version),
        rewrites=tuple(rewrites),
    )


def version_of(text: str) -> Version:
    """Leading numbers of a version: (10, 3, 0, 30) of `10.3.0.30`; what follows them, such as `.post1`, is left out.

    Raises:
        DeviceError: it does not begin with two numbers.
    """
    found = re.match(r"\d+(?:\.\d+)+", text)
    if found is None:
        raise DeviceError(f"version of TensorRT: expected numbers such as 10.3.0, got {text!r}")
    return tuple(map(int, found[0].split(".")))


def reads_hard_swish(version: Version) -> bool:
    """Whether the ONNX parser of this TensorRT has an importer for HardSwish."""
    return version >= (8, 4)


def newest_opset(version: Version) -> int:
    """Newest opset that the ONNX parser of this TensorRT is known to read: 13 before 8.4, then 17, from 10.0 on 20."""
    return 13 if version < (8, 4) else 17 if version < (10,) else 20


_ORDER: tuple[BoardPrecision, ...] = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4")


def _why_not(precision: BoardPrecision, silicon: Silicon, version: Version) -> str:
    """Why a precision is not there or not worth it; empty where it is."""
    least_sm = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (10, 0), "fp4": (10, 0)}.get(precision)
    least_version = {"fp8": (8, 6), "fp4": (10, 13)}.get(precision)
    if precision == "int8" and silicon.sm < (7, 0):
        return f"{silicon.name} has no int8 instructions (DP4A): TensorRT builds something slower than fp16"
    if least_sm is not None and silicon.sm < least_sm:
        since = "Ampere (Jetson Orin)" if least_sm == (8, 0) else "Jetson Thor"
        return f"{silicon.name} (sm {silicon.sm[0]}.{silicon.sm[1]}) cannot; it begins with {since}"
    if precision == "bf16" and version < _TYPED:
        return _UNTYPED
    if least_version is not None and version < least_version:
        return f"TensorRT {'.'.join(map(str, version))} cannot; it begins with {'.'.join(map(str, least_version))}"
    return ""
