"""Times of executed layers, brought home to the blocks of a network.

A runtime fuses nodes of a graph into layers, names them by its own rules, and puts layers between them that change the
layout of a tensor. Nodes of our graphs are named after their unit (`stages.1.0.depthwise/Conv`), so a layer says to
which blocks it belongs wherever one of these names stands in its own name or in what the runtime tells of it:

    stages.1.0.expand/Conv + PWN(stages.1.0.expand/HardSwish)          TensorRT, fused
    [ONNX Layer: a]<0x1E>[ONNX Layer: b]                               TensorRT 8.6 on, metadata
    {ForeignNode[stages.0.0.expand/Conv...stages.1.0.sum/Add]}         TensorRT 10, everything from one node to another
    Reformatting CopyNode for Input Tensor 0 to stages.1.0.expand/Conv TensorRT, a change of layout
    stages.1.0.depthwise_nchwc, head.conv/Conv_token_45, ReorderOutput ONNX Runtime, some by the tensor they give

A layer of several blocks is shared among them by the multiply-adds of the convolutions that it names, else evenly. A
layer without a name of ours belongs to the block that comes next: it prepares its input. Changes of layout are part of
the block that needs them, and are told apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nas.core.records import LayerSpec
from nas.devices.base import LayerTime

_REFORMAT_NAME = re.compile(r"^Reformatting CopyNode|^Reorder(?:Input|Output)")
_REFORMAT_KINDS = ("Reformat REFORMAT", "ReorderInput", "ReorderOutput")
_UNIT = re.compile(r"(?<![\w.])((?:image|stem|head|stages\.\d+\.\d+|exits\.\d+)\.[\w.]*\w)(?:/([A-Z]\w*))?")
_SUFFIX = re.compile(r"_(?:nchwc|token)\w*$")
_LOGITS = re.compile(r"(?<![\w.])logits(?:_(\d+))?\b")
_RANGE = re.compile(r"\[[^\[\]]+ \.\.\. [^\[\]]+\]")


@dataclass(frozen=True, slots=True)
class BlockTime:
    """What one block takes in a profile, ms: everything of it, and the changes of layout that are part of this."""

    layer: LayerSpec
    total_ms: float
    reformat_ms: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """The blocks of a network with their times, in execution order.

    `unnamed_ms` is what was given to a block only because it is the next one: part of the blocks' times.
    """

    blocks: tuple[BlockTime, ...]
    unnamed_ms: float

    @property
    def total_ms(self) -> float:
        """Sum over all blocks, ms: of the profile, not the latency of the network."""
        return sum(block.total_ms for block in self.blocks)

    @property
    def reformat_ms(self) -> float:
        """All changes of layout, ms."""
        return sum(block.reformat_ms for block in self.blocks)


def attribute(times: Sequence[LayerTime], layers: Sequence[LayerSpec]) -> Attribution:
    """Brings the layers of a profile home to the blocks of the network.

    Args:
        times: executed layers, in order.
        layers: `expand(candidate)`, of the network that was profiled.
    """
    named = [_shares(time, layers) for time in times]
    total = [0.0] * len(layers)
    reformat = [0.0] * len(layers)
    unnamed_ms = 0.0
    for i, (time, shares) in enumerate(zip(times, named, strict=True)):
        if not shares:
            unnamed_ms += time.median_ms
            shares = _neighbour(named, i, len(layers))
        for place, share in shares.items():
            total[place] += share * time.median_ms
            if is_reformat(time):
                reformat[place] += share * time.median_ms
    blocks = tuple(BlockTime(*found) for found in zip(layers, total, reformat, strict=True))
    return Attribution(blocks, unnamed_ms)


def is_reformat(time: LayerTime) -> bool:
    """Whether a layer only changes the layout of a tensor; TensorRT calls quantizing so, too, with another origin."""
    if time.kind.startswith("Reformat") and "QDQ" in time.kind:
        return False
    return time.kind in (*_REFORMAT_KINDS, "Reformat") or bool(_REFORMAT_NAME.match(time.name))


def _neighbour(named: Sequence[dict[int, float]], i: int, count: int) -> dict[int, float]:
    """The block of the next layer that has a name of ours, else of the one before, else the last block."""
    for shares in (*named[i + 1 :], *reversed(named[:i])):
        if shares:
            return {min(shares): 1.0}
    return {count - 1: 1.0}


def _shares(time: LayerTime, layers: Sequence[LayerSpec]) -> dict[int, float]:
    """Places of the blocks that a layer names -> share of its time; empty where it names none."""
    text = time.metadata if _UNIT.search(time.metadata) else time.name
    text = text.replace("...", " ... ")  # a range of nodes: the second name begins behind the dots
    places = {layer.name: place for place, layer in enumerate(layers)}
    weights: dict[int, float] = {}
    for match in _UNIT.finditer(text):
        found = _place(match[1], places)
        if found is not None:
            place, part = found
            is_conv = match[2] is None or match[2].startswith("Conv")
            macs = {spec.name: spec.macs for spec in layers[place].convolutions}.get(part, 0) if is_conv else 0
            weights[place] = weights.get(place, 0.0) + macs
    if not weights:
        for match in _LOGITS.finditer(text):
            place = len(layers) - 1 if match[1] is None else _head(int(match[1]), layers)
            weights[place] = 0.0
    if _RANGE.search(text) and len(weights) > 1:  # everything from the first to the last, which are all that is named
        weights = {place: float(layers[place].macs) for place in range(min(weights), max(weights) + 1)}
    whole = sum(weights.values())
    return {place: weight / whole if whole else 1 / len(weights) for place, weight in weights.items()}


def _place(unit: str, places: dict[str, int]) -> tuple[int, str] | None:
    """Block of a node `<block>.<part>...`, and the part; the normalisation of the image belongs to the stem."""
    parts = _SUFFIX.sub("", unit).split(".")
    if parts[0] == "image":
        return 0, ""
    for end in range(len(parts), 0, -1):
        place = places.get(".".join(parts[:end]))
        if place is not None:
            return place, parts[end] if end < len(parts) else ""
    return None


def _head(segment: int, layers: Sequence[LayerSpec]) -> int:
    """Place of the exit head, or the head, that ends a segment."""
    ends = [place for place, layer in enumerate(layers) if layer.segment == segment]
    return ends[-1] if ends else len(layers) - 1
