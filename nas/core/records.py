"""The nouns of the project: frozen records, validated where they are made.

Letters: C channels, H W pixels (all maps are square), K classes. Latencies are milliseconds, ratios 0-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import quantiles
from typing import Any, Literal, get_args

from nas.core.errors import RecordError
from nas.core.jsonio import content_hash, to_plain

Activation = Literal["relu", "hard_swish"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
BlockKind = Literal["inverted_residual", "fused_inverted_residual", "depthwise_separable", "mlp", "attention"]
LayerKind = Literal["stem", BlockKind, "head", "exit_head"]
SlotKind = Literal["stem", "block", "head", "exit_head"]  # what may stand in a place of a network
ClockKind = Literal["thread_cpu", "wall", "device_event"]

# How networks are measured. 3: the lower quartile of sessions that do not disturb one another (2026-11-29). What 2
# measured is the fastest session; what 1 measured lay up to 24 % above the best that was seen of a network, where the
# host's memory was busy.
MEASURING_PROTOCOL = 3

BLOCK_KINDS: tuple[BlockKind, ...] = get_args(BlockKind)
KINDS_WITH_SE: tuple[BlockKind, ...] = ("inverted_residual", "fused_inverted_residual")
KINDS_WITH_EXPANSION: tuple[BlockKind, ...] = ("inverted_residual", "fused_inverted_residual", "mlp", "attention")
KINDS_WITHOUT_SKIP: tuple[BlockKind, ...] = ("depthwise_separable",)
HEAD_DIM = 16  # channels of a query, a key and a value; Graham et al. 2021, LeViT (arXiv 2104.01136), D = 16
HEAD_WIDTH = 32  # token channels for each head of attention
MAX_TOKENS = 256  # the cost of attention grows with the square of the tokens: 256 are a map of 16 px

PRECISION_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def make_divisible(value: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor` that is not more than 10 % below `value`.

    Source: Howard et al. 2019 (arXiv 1905.02244), the rule of the published MobileNet code.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def squeeze_channels(expanded_channels: int) -> int:
    """Hidden channels of squeeze-and-excitation: a quarter of the expansion (Howard et al. 2019, section 5.3)."""
    return make_divisible(expanded_channels / 4)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise RecordError(f"{name} must be at least 1, got {value}")


def _kernel(value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise RecordError(f"kernel_size must be odd and positive, got {value}")


def _stride(value: int) -> None:
    if value not in (1, 2):
        raise RecordError(f"stride must be 1 or 2, got {value}")


@dataclass(frozen=True, slots=True)
class StemConfig:
    """First convolution: dense, then batch norm and activation."""

    out_channels: int
    kernel_size: int = 3
    stride: int = 2
    activation: Activation = "hard_swish"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        _positive(out_channels=self.out_channels)
        _kernel(self.kernel_size)
        _stride(self.stride)


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """One block; a skip connection where the shape stays, except in the depthwise-separable kind.

    Kinds (k is the kernel, wide `expanded_channels`):
        inverted_residual: expand 1x1 (none where wide is `in_channels`), depthwise k x k, SE, project 1x1. Sandler et
            al. 2018 (arXiv 1801.04381), Howard et al. 2019 (arXiv 1905.02244).
        fused_inverted_residual: dense k x k to wide, SE, project 1x1. Gupta and Tan 2019, EfficientNet-EdgeTPU; Tan and
            Le 2021, EfficientNetV2 (arXiv 2104.00298), Figure 2; differs: also where wide is `in_channels`.
        depthwise_separable: depthwise k x k, 1x1, an activation behind each; wide is `in_channels`. Howard et al. 2017,
            MobileNet (arXiv 1704.04861), Figure 3.
        mlp: depthwise k x k mixes the pixels of each channel, then a pointwise MLP (in, wide, out) the channels of each
            pixel. Liu et al. 2022, ConvNeXt (arXiv 2201.03545), Figure 4; differs: batch norm, which folds.
        attention: depthwise k x k and 1x1 (the local part), the map unfolded into one token for each pixel, multi-head
            self-attention, an MLP with `wide` hidden channels, folded again. Mehta and Rastegari 2022, MobileViT (arXiv
            2110.02178); differs: tokens are pixels, for the maps of late stages are small; the parts are fused by sums
            as in MobileViTv2 (arXiv 2206.02680); batch norm in place of layer norm as in LeViT (arXiv 2104.01136), so
            that all but the attention itself are convolutions that fold and quantise.
    """

    in_channels: int
    expanded_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 1
    use_se: bool = False
    activation: Activation = "relu"
    kind: BlockKind = "inverted_residual"

    def __post_init__(self) -> None:
        _positive(
            in_channels=self.in_channels, expanded_channels=self.expanded_channels, out_channels=self.out_channels
        )
        _kernel(self.kernel_size)
        _stride(self.stride)
        if self.use_se and self.kind not in KINDS_WITH_SE:
            raise RecordError(f"a block of kind {self.kind} has no squeeze-and-excitation: {', '.join(KINDS_WITH_SE)}")
        if self.kind not in KINDS_WITH_EXPANSION and self.expanded_channels != self.in_channels:
            raise RecordError(
                f"a block of kind {self.kind} does not expand: expanded_channels must be {self.in_channels} "
                f"(in_channels), got {self.expanded_channels}"
            )

    @property
    def has_residual(self) -> bool:
        has_skip = self.kind not in KINDS_WITHOUT_SKIP
        return has_skip and self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Blocks of one stage, all in one precision."""

    blocks: tuple[BlockConfig, ...]
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not self.blocks:
            raise RecordError("a stage needs at least one block")
        for before, after in zip(self.blocks, self.blocks[1:], strict=False):
            if before.out_channels != after.in_channels:
                raise RecordError(
                    f"block takes {after.in_channels} channels, the block before it gives {before.out_channels}"
                )


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Classifier: optional 1x1 convolution, global mean, optional hidden linear layer, linear to K classes.

    `conv_channels` and `hidden_channels` are 0 where the layer is absent. MobileNetV3 has both.
    """

    conv_channels: int = 0
    hidden_channels: int = 0
    activation: Activation = "hard_swish"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.conv_channels < 0 or self.hidden_channels < 0:
            raise RecordError("head channels must not be negative")


@dataclass(frozen=True, slots=True)
class ExitConfig:
    """An early exit after stage `after_stage` (from 0), with a head as in `HeadConfig`.

    Optional 1x1 convolution (`conv_channels`), global mean, optional hidden layer, linear to K classes. Channels are 0
    where a layer is absent. An image leaves here when its largest softmax probability is at least `threshold`; None
    until it is known.
    """

    after_stage: int
    hidden_channels: int = 0
    threshold: float | None = None
    conv_channels: int = 0

    def __post_init__(self) -> None:
        if self.after_stage < 0:
            raise RecordError(f"after_stage must not be negative, got {self.after_stage}")
        if self.conv_channels < 0 or self.hidden_channels < 0:
            raise RecordError("channels of an exit's head must not be negative")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One student network with its exits and precision: everything that decides accuracy and latency.

    `arch_id` names what is trained (no thresholds, no precision); `id` names the whole.
    """

    resolution: int
    num_classes: int
    stem: StemConfig
    stages: tuple[StageConfig, ...]
    head: HeadConfig
    exits: tuple[ExitConfig, ...] = ()
    in_channels: int = 3

    def __post_init__(self) -> None:
        _positive(resolution=self.resolution, num_classes=self.num_classes, in_channels=self.in_channels)
        if not self.stages:
            raise RecordError("a candidate needs at least one stage")
        channels = self.stem.out_channels
        for i, stage in enumerate(self.stages):
            if stage.blocks[0].in_channels != channels:
                raise RecordError(f"stage {i} takes {stage.blocks[0].in_channels} channels, {channels} are given to it")
            channels = stage.blocks[-1].out_channels
        places = [e.after_stage for e in self.exits]
        if places != sorted(set(places)):
            raise RecordError(f"exits must follow rising stages without repeats, got {places}")
        if places and places[-1] >= len(self.stages) - 1:
            raise RecordError(
                f"an exit after stage {places[-1]} is the head itself; the last stage is {len(self.stages) - 1}"
            )

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precision of the stem, of each stage, and of the head, in order."""
        return (self.stem.precision, *(s.precision for s in self.stages), self.head.precision)

    @property
    def precision_label(self) -> Precision | Literal["mixed"]:
        """`fp32`, `int8`, ... or `mixed`."""
        names = set(self.precisions)
        return names.pop() if len(names) == 1 else "mixed"

    @property
    def precision_text(self) -> str:
        """The label, and for a mix what is in which precision: `fp32 stem s1, int8 s2-s4 head` (stages from 1)."""
        if self.precision_label != "mixed":
            return self.precision_label
        by_precision: dict[Precision, list[int]] = {}
        for part, precision in enumerate(self.precisions):
            by_precision.setdefault(precision, []).append(part)
        last = len(self.stages) + 1

        def named(part: int) -> str:
            return "stem" if part == 0 else "head" if part == last else f"s{part}"

        texts = []
        for precision, parts in by_precision.items():
            words: list[str] = []
            for part in parts:
                if part - 1 in parts and part not in (1, last):  # goes on from the stage before
                    words[-1] = f"{words[-1].partition('-')[0]}-{named(part)}"
                else:
                    words.append(named(part))
            texts.append(f"{precision} {' '.join(words)}")
        return ", ".join(texts)

    @property
    def architecture(self) -> Candidate:
        """The same network in fp32 with unset thresholds: what is trained."""
        return self.with_precision("fp32").with_thresholds((None,) * len(self.exits))

    @property
    def arch_id(self) -> str:
        return "a" + content_hash(_identity(self.architecture), 12)

    @property
    def id(self) -> str:
        """Readable and unique: size, exits, precision and a content hash, such as `r32-d7-x1-int8-3f2a9c01d4e5`."""
        depth = sum(len(s.blocks) for s in self.stages)
        ending = content_hash(_identity(self), 12)
        return f"r{self.resolution}-d{depth}-x{len(self.exits)}-{self.precision_label}-{ending}"

    def with_precision(self, precision: Precision | Iterable[Precision]) -> Candidate:
        """The same network in one precision, or in one per stem, stage and head (in that order)."""
        if isinstance(precision, str):
            names: tuple[Precision, ...] = (precision,) * (len(self.stages) + 2)
        else:
            names = tuple(precision)
        if len(names) != len(self.stages) + 2:
            raise RecordError(f"expected {len(self.stages) + 2} precisions (stem, stages, head), got {len(names)}")
        return replace(
            self,
            stem=replace(self.stem, precision=names[0]),
            stages=tuple(replace(s, precision=p) for s, p in zip(self.stages, names[1:-1], strict=True)),
            head=replace(self.head, precision=names[-1]),
        )

    def with_thresholds(self, thresholds: Iterable[float | None]) -> Candidate:
        """The same network with other exit thresholds, one per exit."""
        values = tuple(thresholds)
        if len(values) != len(self.exits):
            raise RecordError(f"expected {len(self.exits)} thresholds, got {len(values)}")
        return replace(self, exits=tuple(replace(e, threshold=t) for e, t in zip(self.exits, values, strict=True)))

    def truncated(self, exit_index: int) -> Candidate:
        """The network cut behind an exit, whose head becomes the head: what remains when no image goes further."""
        place = self.exits[exit_index]
        stages = self.stages[: place.after_stage + 1]
        head = HeadConfig(place.conv_channels, place.hidden_channels, self.head.activation, stages[-1].precision)
        return replace(self, stages=stages, head=head, exits=self.exits[:exit_index])


def _identity(candidate: Candidate) -> dict[str, Any]:
    """What ids are made of. A field that came later is left out while it is 0: names of older files stay valid."""
    plain: dict[str, Any] = to_plain(candidate)
    for place in plain["exits"]:
        if not place["conv_channels"]:
            del place["conv_channels"]
    return plain


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One measurable unit of a network. `key` says what it costs; `name` and `segment` say where it stands.

    Sizes are the side of the square maps in pixels. Segment k ends with exit head k (from 0), the last with the head.
    """

    kind: LayerKind
    in_channels: int
    in_size: int
    out_channels: int
    out_size: int
    kernel_size: int
    stride: int
    expanded_channels: int
    hidden_channels: int
    use_se: bool
    activation: Activation
    precision: Precision
    name: str = field(default="", compare=False)
    segment: int = field(default=0, compare=False)

    @property
    def is_block(self) -> bool:
        return self.kind in BLOCK_KINDS

    @property
    def has_residual(self) -> bool:
        has_skip = self.is_block and self.kind not in KINDS_WITHOUT_SKIP
        return has_skip and self.stride == 1 and self.in_channels == self.out_channels

    @property
    def has_expand(self) -> bool:
        return self.kind == "inverted_residual" and self.expanded_channels != self.in_channels

    @property
    def heads(self) -> int:
        """Heads of attention, each of HEAD_DIM channels; 0 where there is none."""
        return max(1, self.out_channels // HEAD_WIDTH) if self.kind == "attention" else 0

    @property
    def tokens(self) -> int:
        """Pixels that attend to each other; 0 where there is no attention."""
        return self.out_size**2 if self.kind == "attention" else 0

    @property
    def squeeze_channels(self) -> int:
        return squeeze_channels(self.expanded_channels) if self.use_se else 0

    @property
    def group(self) -> str:
        """Family of layers whose table errors move together."""
        return f"{self.kind}_se" if self.use_se else self.kind

    @property
    def key(self) -> str:
        """Readable key of the latency row: everything that decides the cost, nothing else."""
        parts = [
            KEY_NAMES[self.kind],
            f"in={self.in_channels}x{self.in_size}x{self.in_size}",
            f"out={self.out_channels}x{self.out_size}x{self.out_size}",
        ]
        if self.is_block or self.kind == "stem":
            parts += [f"k={self.kernel_size}", f"s={self.stride}"]
        # The first exit heads had no convolution, and rows that were measured keep their keys.
        if self.is_block or self.kind == "head" or (self.kind == "exit_head" and self.expanded_channels):
            parts.append(f"e={self.expanded_channels}")
        if self.kind in ("head", "exit_head"):
            parts.append(f"h={self.hidden_channels}")
        if self.is_block:
            parts.append(f"se={int(self.use_se)}")
        return "|".join([*parts, f"act={self.activation}", self.precision])

    @property
    def macs(self) -> int:
        """Multiply-adds of one image: of the convolutions and of the two matrix products of attention."""
        return sum(c.macs for c in self.convolutions) + 2 * self.heads * HEAD_DIM * self.tokens**2

    @property
    def params(self) -> int:
        """Learnable parameters, batch norm's scale and shift included (they fold into the bias when exported)."""
        return sum(c.weights + (2 * c.out_channels if c.batch_norm else c.out_channels) for c in self.convolutions)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the deployed weights: kernels in the layer's precision, biases in 4 bytes."""
        each = PRECISION_BYTES[self.precision]
        return sum(c.weights * each + 4 * c.out_channels for c in self.convolutions)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the feature maps that its convolutions write, in the layer's precision, and of attention's maps.

        Attention itself stays in float where the precision is int8.
        """
        maps = PRECISION_BYTES[self.precision] * sum(c.out_channels * c.size**2 for c in self.convolutions)
        float_bytes = PRECISION_BYTES["fp32" if self.precision == "int8" else self.precision]
        return maps + float_bytes * self.heads * self.tokens**2

    @property
    def convolutions(self) -> tuple[ConvSpec, ...]:
        """The convolutions that the layer executes, in order; linear layers are 1x1 convolutions at one pixel."""
        return tuple(spec for branch in self.branches for spec in branch.convolutions)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What the layer executes: chains of convolutions, one after the other, each around its skip connection.

        In a chain, `se_reduce` takes the global mean, `se_expand` gives the factor of what was there before, and behind
        `qkv` stands the attention.
        """
        size_in, size_out, c_in, c_out = self.in_size, self.out_size, self.in_channels, self.out_channels
        wide, act, k, s = self.expanded_channels, self.activation, self.kernel_size, self.stride
        skip = self.has_residual
        match self.kind:
            case "stem":
                return (Branch((ConvSpec("conv", c_in, c_out, k, s, 1, size_out, act, True),)),)
            case "inverted_residual":
                expand = (ConvSpec("expand", c_in, wide, 1, 1, 1, size_in, act, True),) if self.has_expand else ()
                depthwise = ConvSpec("depthwise", wide, wide, k, s, wide, size_out, act, True)
                project = ConvSpec("project", wide, c_out, 1, 1, 1, size_out, "linear", True)
                return (Branch((*expand, depthwise, *self._squeeze_and_excitation(), project), skip),)
            case "fused_inverted_residual":
                fused = ConvSpec("fused", c_in, wide, k, s, 1, size_out, act, True)
                project = ConvSpec("project", wide, c_out, 1, 1, 1, size_out, "linear", True)
                return (Branch((fused, *self._squeeze_and_excitation(), project), skip),)
            case "depthwise_separable":
                depthwise = ConvSpec("depthwise", c_in, c_in, k, s, c_in, size_out, act, True)
                return (Branch((depthwise, ConvSpec("pointwise", c_in, c_out, 1, 1, 1, size_out, act, True))),)
            case "mlp":
                depthwise = ConvSpec("depthwise", c_in, c_in, k, s, c_in, size_out, "linear", True)
                hidden = ConvSpec("expand", c_in, wide, 1, 1, 1, size_out, act, True)
                project = ConvSpec("project", wide, c_out, 1, 1, 1, size_out, "linear", True)
                return (Branch((depthwise, hidden, project), skip),)
            case "attention":
                inner = self.heads * HEAD_DIM
                local = ConvSpec("local", c_in, c_in, k, s, c_in, size_out, act, True)
                enter = ConvSpec("enter", c_in, c_out, 1, 1, 1, size_out, "linear", True)
                qkv = ConvSpec("qkv", c_out, 3 * inner, 1, 1, 1, size_out, "linear", True)
                merge = ConvSpec("merge", inner, c_out, 1, 1, 1, size_out, "linear", True)
                hidden = ConvSpec("expand", c_out, wide, 1, 1, 1, size_out, act, True)
                project = ConvSpec("project", wide, c_out, 1, 1, 1, size_out, "linear", True)
                return (
                    Branch((local, enter), skip, "local_sum"),
                    Branch((qkv, merge), True, "attention_sum"),
                    Branch((hidden, project), True),
                )
            case "head" | "exit_head":
                result = []
                if wide:
                    result.append(ConvSpec("conv", c_in, wide, 1, 1, 1, size_in, act, True))
                    c_in = wide
                if self.hidden_channels:
                    result.append(ConvSpec("hidden", c_in, self.hidden_channels, 1, 1, 1, 1, act, False))
                    c_in = self.hidden_channels
                result.append(ConvSpec("classifier", c_in, c_out, 1, 1, 1, 1, "linear", False))
                return (Branch(tuple(result)),)

    def _squeeze_and_excitation(self) -> tuple[ConvSpec, ...]:
        if not self.use_se:
            return ()
        squeeze, wide = self.squeeze_channels, self.expanded_channels
        return (
            ConvSpec("se_reduce", wide, squeeze, 1, 1, 1, 1, "relu", False),
            ConvSpec("se_expand", squeeze, wide, 1, 1, 1, 1, "hard_sigmoid", False),
        )


# Words of row keys; those that are there stay as they are, for tables hold them.
KEY_NAMES: dict[LayerKind, str] = {
    "stem": "stem",
    "inverted_residual": "ir",
    "head": "head",
    "exit_head": "exit",
    "fused_inverted_residual": "fused",
    "depthwise_separable": "ds",
    "mlp": "mlp",
    "attention": "att",
}


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain of convolutions inside a layer; with `has_skip` its input is added to what it gives, as tensor `sum`."""

    convolutions: tuple[ConvSpec, ...]
    has_skip: bool = False
    sum: str = "sum"


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """One convolution inside a layer; `size` is the side of its output in pixels."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    groups: int
    size: int
    activation: Literal["relu", "hard_swish", "hard_sigmoid", "linear"]
    batch_norm: bool

    @property
    def weights(self) -> int:
        return self.out_channels * (self.in_channels // self.groups) * self.kernel_size**2

    @property
    def macs(self) -> int:
        return self.weights * self.size**2


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """State of a device: a latency is valid for one such state only.

    `details` holds what is worth knowing but does not change the state (load, kernel, memory); it is not compared.
    `locked_mhz` are the frequencies that clocks are locked to, as text; empty where they are not, or nothing tells.
    """

    name: str
    board: str
    runtime: str
    runtime_version: str
    power_mode: str
    clocks_locked: bool
    threads: int
    driver: str
    precisions: tuple[Precision, ...]
    kind: Literal["measured", "simulated", "imported"]
    details: dict[str, str] = field(default_factory=dict, compare=False)
    locked_mhz: str = ""

    @property
    def state(self) -> dict[str, object]:
        """The compared fields by name; without `locked_mhz` where it is empty."""
        return {name: getattr(self, name) for name in PROFILE_STATE_FIELDS if name != "locked_mhz" or self.locked_mhz}

    @property
    def fingerprint(self) -> str:
        """Content hash of the state."""
        return content_hash(self.state)


PROFILE_STATE_FIELDS = (
    "board",
    "runtime",
    "runtime_version",
    "power_mode",
    "clocks_locked",
    "locked_mhz",
    "threads",
    "driver",
    "kind",
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured thing with all its samples, or a typed error; never a sentinel number.

    `key` is a layer key (row), a candidate id (network), or a candidate id with `#k` (segment k).
    `rounds_ms` holds the samples of each round; `accepted` says which rounds were calm. `source` says what an imported
    row was in the file it came from, of which tables a merged one is the centre, and what a runtime warned of.
    `protocol` is the number of the measuring protocol. `energy_mj` is the energy of one inference from the power
    sensors of the device, its idle power included, `energy_std_mj` how far its rounds spread; None without a sensor.
    `transfer_ms` are the copies of inputs and outputs to and from an accelerator, which are not in the latency.
    """

    key: str
    kind: Literal["row", "network", "segment", "overhead"]
    precision: Precision | Literal["mixed", "none"]
    latency_ms: float | None
    rounds_ms: tuple[tuple[float, ...], ...]
    accepted: tuple[bool, ...]
    clock: ClockKind
    measured_at: str
    sequence: int
    temperature_c: float | None = None
    clock_mhz: float | None = None
    error: str | None = None
    session_ms: tuple[float, ...] = ()
    source: str = ""
    protocol: int = MEASURING_PROTOCOL
    energy_mj: float | None = None
    energy_std_mj: float | None = None
    transfer_ms: float | None = None

    def __post_init__(self) -> None:
        if (self.latency_ms is None) == (self.error is None):
            raise RecordError(f"measurement of {self.key}: exactly one of latency_ms and error must be given")
        if self.latency_ms is not None and not self.latency_ms > 0:
            raise RecordError(f"measurement of {self.key}: latency_ms must be positive, got {self.latency_ms}")
        if len(self.accepted) != len(self.rounds_ms):
            raise RecordError(f"measurement of {self.key}: one accepted flag per round is needed")
        if (self.energy_mj is None) != (self.energy_std_mj is None):
            raise RecordError(f"measurement of {self.key}: energy_mj and energy_std_mj go together")
        if self.energy_mj is not None and not self.energy_mj > 0:
            raise RecordError(f"measurement of {self.key}: energy_mj must be positive, got {self.energy_mj}")
        if self.energy_std_mj is not None and not self.energy_std_mj >= 0:
            raise RecordError(
                f"measurement of {self.key}: energy_std_mj must not be negative, got {self.energy_std_mj}"
            )

    @property
    def is_stable(self) -> bool:
        """True when at least one round was calm."""
        return any(self.accepted)

    @property
    def std_ms(self) -> float:
        """Standard error of the lower quartile of the sessions, a network's latency; 0 where there was one session.

        The error of a quantile of many is sqrt(p (1 - p) / n) over the density there (David and Nagaraja 2003, Order
        Statistics, chapter 10): for the quartile of normal values twice its distance to the median over sqrt(n). Only
        the faster half is looked at: slower ones may be disturbed.
        """
        if len(self.session_ms) < 2:
            return 0.0
        lower, middle, _ = quantiles(self.session_ms, n=4, method="inclusive")
        return 2 * (middle - lower) / math.sqrt(len(self.session_ms))


@dataclass(frozen=True, slots=True)
class LatencyEstimate:
    """Predicted latency of a candidate: cumulative per exit, so `exit_ms[-1]` is the worst case.

    `exit_ms[k]` is the time of an image that leaves at exit k, everything passed on the way included.
    """

    exit_ms: tuple[float, ...]
    exit_std_ms: tuple[float, ...]
    rows_used: int
    correction: str

    @property
    def worst_ms(self) -> float:
        return self.exit_ms[-1]

    @property
    def worst_std_ms(self) -> float:
        return self.exit_std_ms[-1]


@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """Latency of one student under an exit distribution, with its source."""

    expected_ms: float
    worst_ms: float
    p99_ms: float
    std_ms: float
    provenance: Literal["predicted", "measured"]


@dataclass(frozen=True, slots=True)
class EnergyFigures:
    """Energy of one inference under an exit distribution, mJ, the idle power of the board included.

    `is_error_assumed`: no measured network says yet how far the sum of rows is off.
    """

    expected_mj: float
    worst_mj: float
    std_mj: float
    provenance: Literal["predicted", "measured"]
    is_error_assumed: bool = False


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Ranges of every tensor between layers of a network: `lo` and `hi` by tensor name, from calibration images.

    Read by the QDQ writer; both dialects can be written from one set of ranges.
    """

    lo: dict[str, float]
    hi: dict[str, float]
    images: int
