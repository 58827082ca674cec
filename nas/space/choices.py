"""The choices of a search space as records, read from plain data with one message per mistake.

Every field that is a choice takes one value or a list of them. Choices are kept in one order (numbers rising, `false`
before `true`, names as listed below), so the order in a file means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

from nas.core.errors import ConfigError, did_you_mean
from nas.core.records import (
    BLOCK_KINDS,
    KINDS_WITH_EXPANSION,
    KINDS_WITH_SE,
    Activation,
    BlockKind,
    Precision,
    make_divisible,
)

T = TypeVar("T")

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RESERVED_NAMES = ("resolution", "stem", "head", "exits", "precision")  # first parts of the other gene names

MAX_RESOLUTION_PX = 4096
MAX_CHANNELS = 16_384
MAX_KERNEL = 31
MAX_DEPTH = 32
MAX_STAGES = 16
MAX_EXPANSION = 32.0
MAX_PRUNE = 0.75  # a quarter of the channels stays
CHANNEL_GROUP = 8


@dataclass(frozen=True, slots=True)
class StemChoices:
    """First convolution. `channels` and `activation` are choices; `stride` is 1 or 2."""

    channels: tuple[int, ...]
    kernel_size: int
    stride: int
    activation: tuple[Activation, ...]


@dataclass(frozen=True, slots=True)
class StageChoices:
    """One stage. `kind`, `width`, `depth`, `use_se` and `activation` are chosen once per stage.

    `kernel_size` and `expansion` are chosen for every block. `stride` is that of the first block. `prune` is the share
    of the expanded channels that all its blocks go without, chosen once per stage. A kind that has no expansion or no
    squeeze-and-excitation ignores that choice.
    """

    name: str
    width: tuple[int, ...]
    depth: tuple[int, ...]
    stride: int
    kernel_size: tuple[int, ...]
    expansion: tuple[float, ...]
    use_se: tuple[bool, ...]
    activation: tuple[Activation, ...]
    prune: tuple[float, ...] = (0.0,)
    kind: tuple[BlockKind, ...] = ("inverted_residual",)

    @property
    def max_depth(self) -> int:
        return self.depth[-1]


@dataclass(frozen=True, slots=True)
class HeadChoices:
    """Classifier. `conv_channels` and `hidden_channels` are choices; 0 leaves the layer out."""

    conv_channels: tuple[int, ...]
    hidden_channels: tuple[int, ...]
    activation: Activation


@dataclass(frozen=True, slots=True)
class ExitChoices:
    """Early exits: a network has at most `max_count` of them, each after one of the stages named in `after`.

    `hidden_channels` and `conv_channels` of its head are chosen for each exit; 0 leaves the layer out. `thresholds` is
    the grid (smallest softmax probability that leaves, 0-1) for thresholds as trial parameters; empty where thresholds
    are only solved afterwards.
    """

    after: tuple[str, ...] = ()
    max_count: int = 0
    hidden_channels: tuple[int, ...] = (0,)
    thresholds: tuple[float, ...] = ()
    conv_channels: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class PrecisionChoices:
    """Precisions to choose from, once for the network or once for the stem, each stage and the head."""

    choices: tuple[Precision, ...] = ("fp32",)
    per: Literal["network", "stage"] = "network"


def expanded_channels(in_channels: int, expansion: float, kind: BlockKind = "inverted_residual") -> int:
    """Channels between the first and the last convolution of a block; expansion 1 means no first convolution.

    A kind that does not expand keeps the channels of the input.

    Rounded to a multiple of 8, so that factors with two or three digits give the published networks exactly
    (24 x 3.667 -> 88, 80 x 2.3 -> 184; Howard et al. 2019, Tables 1 and 2).
    """
    return (
        in_channels if expansion == 1 or kind not in KINDS_WITH_EXPANSION else make_divisible(in_channels * expansion)
    )


def pruned_channels(in_channels: int, expansion: float, share: float, kind: BlockKind = "inverted_residual") -> int:
    """Expanded channels of a block without a share of them: any number, as `expanded_channels` where the share is 0.

    A block that does not expand loses none. Where as many would be left as its input has, which would make it another
    kind of block, eight more are kept.
    """
    whole = expanded_channels(in_channels, expansion, kind)
    if whole == in_channels:
        return whole
    left = max(1, round(whole * (1 - share)))
    return min(whole, left + CHANNEL_GROUP) if left == in_channels else left


class Section:
    """A mapping of a space file while it is read: knows its place, refuses fields that it does not know."""

    def __init__(self, data: Any, where: str, fields: Sequence[str]) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected a mapping with the fields {', '.join(fields)}; got {shown(data)}")
        self.data: dict[str, Any] = data
        self.where = where
        for key in data:
            if key not in fields:
                hint = did_you_mean(str(key), fields)
                raise ConfigError(f"{where}: unknown field '{key}'{hint or '; fields: ' + ', '.join(fields)}")

    def fail(self, field: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {field}: {problem}")

    def value(self, field: str, default: Any) -> Any:
        if field not in self.data and default is None:
            raise ConfigError(f"{self.where}: field '{field}' is missing")
        return self.data.get(field, default)

    def one(self, field: str, check: Callable[[Any], T], default: T | None = None) -> T:
        """One value; `check` returns it or raises ValueError with the reason. No default: the field is required."""
        return self.checked(field, self.value(field, default), check)

    def many(self, field: str, check: Callable[[Any], T], default: T | None = None) -> tuple[T, ...]:
        """A choice: one value or a list of distinct ones."""
        data = self.value(field, default)
        items = data if isinstance(data, list) else [data]
        if not items:
            raise self.fail(field, "no choices; give at least one value")
        values: list[T] = []
        for item in items:
            value = self.checked(field, item, check)
            if value in values:
                raise self.fail(field, f"{item!r} is given twice")
            values.append(value)
        return tuple(values)

    def checked(self, field: str, data: Any, check: Callable[[Any], T]) -> T:
        try:
            return check(data)
        except ValueError as e:
            raise self.fail(field, str(e)) from e


def shown(data: Any) -> str:
    """Type and value of what was given, cut to a readable length."""
    text = repr(data)
    return f"{type(data).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def integer(low: int, high: int, unit: str) -> Callable[[Any], int]:
    """A check for a whole number of `unit` from `low` to `high`."""

    def check(data: Any) -> int:
        if isinstance(data, bool) or not isinstance(data, int):
            raise ValueError(f"expected a whole number of {unit}, got {shown(data)}")
        if not low <= data <= high:
            raise ValueError(f"{data} is out of range; allowed: {low} to {high} {unit}")
        return data

    return check


def kernel(data: Any) -> int:
    """A check for the side of a kernel: odd."""
    value = integer(1, MAX_KERNEL, "pixels")(data)
    if value % 2 == 0:
        raise ValueError(f"{value} is even; a kernel needs a middle pixel: 3, 5, 7, ...")
    return value


def number(low: float, high: float, meaning: str) -> Callable[[Any], float]:
    """A check for a finite number from `low` to `high`."""

    def check(data: Any) -> float:
        if isinstance(data, bool) or not isinstance(data, int | float):
            raise ValueError(f"expected {meaning}, got {shown(data)}")
        if not math.isfinite(data) or not low <= data <= high:
            raise ValueError(f"{data} is out of range; expected {meaning} from {low:g} to {high:g}")
        return float(data)

    return check


def boolean(data: Any) -> bool:
    """A check for true or false."""
    if not isinstance(data, bool):
        raise ValueError(f"expected true or false, got {shown(data)}")
    return data


def name_of(allowed: Sequence[str], meaning: str) -> Callable[[Any], str]:
    """A check for one of some names."""

    def check(data: Any) -> str:
        if not isinstance(data, str) or data not in allowed:
            hint = did_you_mean(data, allowed) if isinstance(data, str) else ""
            raise ValueError(f"{data!r} is no {meaning}{hint}; allowed: {', '.join(allowed)}")
        return data

    return check


def text(data: Any) -> str:
    """A check for text that is not blank."""
    if not isinstance(data, str) or not data.strip():
        raise ValueError(f"expected text, got {shown(data)}")
    return data.strip()


def identifier(data: Any) -> str:
    """A check for the name of a stage, which becomes the first part of gene names."""
    if not isinstance(data, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", data):
        raise ValueError(f"expected a name of letters, digits, - and _, got {shown(data)}")
    if data in RESERVED_NAMES:
        raise ValueError(f"'{data}' is a reserved name; reserved: {', '.join(RESERVED_NAMES)}")
    return data


def in_order(values: tuple[Any, ...], order: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values in the order in which they stand in `order`."""
    return tuple(sorted(values, key=order.index))


def read_stem(data: Any, where: str) -> StemChoices:
    """The field `stem` of a space file; ConfigError with its place where it does not fit."""
    section = Section(data, where, ("channels", "kernel_size", "stride", "activation"))
    return StemChoices(
        channels=tuple(sorted(section.many("channels", integer(1, MAX_CHANNELS, "channels")))),
        kernel_size=section.one("kernel_size", kernel, 3),
        stride=section.one("stride", integer(1, 2, "pixels"), 2),
        activation=in_order(section.many("activation", name_of(ACTIVATIONS, "activation")), ACTIVATIONS),
    )


STAGE_FIELDS = ("name", "width", "depth", "stride", "kernel_size", "expansion", "use_se", "activation", "prune", "kind")


def read_stage(data: Any, where: str) -> StageChoices:
    """One item of `stages`; ConfigError with its place where it does not fit."""
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        where = f"{where} ({data['name']})"
    section = Section(data, where, STAGE_FIELDS)
    kinds = in_order(section.many("kind", name_of(BLOCK_KINDS, "kind of block"), "inverted_residual"), BLOCK_KINDS)
    has_expansion = any(kind in KINDS_WITH_EXPANSION for kind in kinds)
    stage = StageChoices(
        name=section.one("name", identifier),
        width=tuple(sorted(section.many("width", integer(1, MAX_CHANNELS, "channels")))),
        depth=tuple(sorted(section.many("depth", integer(1, MAX_DEPTH, "blocks")))),
        stride=section.one("stride", integer(1, 2, "pixels")),
        kernel_size=tuple(sorted(section.many("kernel_size", kernel))),
        expansion=tuple(
            sorted(
                section.many(
                    "expansion",
                    number(0.125, MAX_EXPANSION, "a factor of the block's input channels"),
                    None if has_expansion else 1.0,
                )
            )
        ),
        use_se=tuple(sorted(section.many("use_se", boolean, False))),
        activation=in_order(section.many("activation", name_of(ACTIVATIONS, "activation")), ACTIVATIONS),
        prune=tuple(sorted(section.many("prune", number(0, MAX_PRUNE, "a share of the expanded channels"), 0.0))),
        kind=kinds,
    )
    if not has_expansion and stage.expansion != (1.0,):
        raise section.fail("expansion", f"kind {', '.join(kinds)} does not expand; leave it out")
    if stage.prune != (0.0,) and (len(kinds) > 1 or not has_expansion):
        raise section.fail(
            "prune",
            "needs a stage of one kind that expands (importance is that of its channels); finalists of every space are "
            "pruned by finish.prune",
        )
    if True in stage.use_se and not any(kind in KINDS_WITH_SE for kind in kinds):
        raise section.fail("use_se", f"kind {', '.join(kinds)} has no squeeze-and-excitation; leave it out")
    return stage


def read_head(data: Any, where: str) -> HeadChoices:
    """The field `head`; ConfigError with its place where it does not fit."""
    section = Section(data, where, ("conv_channels", "hidden_channels", "activation"))
    channels = integer(0, MAX_CHANNELS, "channels (0: no such layer)")
    return HeadChoices(
        conv_channels=tuple(sorted(section.many("conv_channels", channels, 0))),
        hidden_channels=tuple(sorted(section.many("hidden_channels", channels, 0))),
        activation=cast(Activation, section.one("activation", name_of(ACTIVATIONS, "activation"), "hard_swish")),
    )


def read_exits(data: Any, where: str, stages: tuple[str, ...]) -> ExitChoices:
    """The field `exits`, checked against the names of the stages; ConfigError with its place where it does not fit."""
    section = Section(data, where, ("after", "max_count", "hidden_channels", "conv_channels", "thresholds"))
    channels = integer(0, MAX_CHANNELS, "channels (0: no such layer)")
    after = section.many("after", name_of(stages, "stage"))
    if stages[-1] in after:
        raise section.fail("after", f"an exit after '{stages[-1]}', the last stage, is the head itself; leave it out")
    thresholds: tuple[float, ...] = ()
    if section.data.get("thresholds") is not None:
        thresholds = section.many("thresholds", number(0, 1, "a probability (a ratio, not percent)"))
    return ExitChoices(
        after=in_order(after, stages),
        max_count=section.one("max_count", integer(1, len(after), "exits"), len(after)),
        hidden_channels=tuple(sorted(section.many("hidden_channels", channels, 0))),
        thresholds=tuple(sorted(thresholds)),
        conv_channels=tuple(sorted(section.many("conv_channels", channels, 0))),
    )


def read_precision(data: Any, where: str) -> PrecisionChoices:
    """The field `precision`; ConfigError with its place where it does not fit."""
    section = Section(data, where, ("choices", "per"))
    return PrecisionChoices(
        choices=in_order(section.many("choices", name_of(PRECISIONS, "precision")), PRECISIONS),
        per=cast(Literal["network", "stage"], section.one("per", name_of(("network", "stage"), "unit"), "network")),
    )
