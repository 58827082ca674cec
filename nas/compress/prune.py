"""Structured pruning of expansion channels: how much each matters, which block gives up how many, what is left of it.

An expansion channel of an inverted residual is one output of `expand`, one filter of `depthwise`, one input of
`se_reduce`, one output of `se_expand` and one input of `project`. Without it the block is an ordinary one with fewer
expanded channels: the blocks around it do not change, and nothing is left behind that would have to be masked. The same
holds of every block whose last convolutions run from a producer of the channels to `project`.

Sources:
- Molchanov et al. 2019, arXiv 1906.10771: importance of a channel is the squared first-order change of the loss when a
  gate behind its batch norm closes, (g z)^2 with z = 1, averaged over batches (section 3, "Taylor-FO-BN").
- Li et al. 2017, arXiv 1608.08710: the L1 norm of its kernels.
- Shen et al. 2022, arXiv 2110.10811 (HALP): importance against latency that was measured, in groups as large as the
  device's steps. Differs: a greedy walk along the convex hulls of all blocks instead of their knapsack, which is near
  enough with half a dozen widths a block.

Squeeze-and-excitation: its hidden width is a quarter of the expansion (`squeeze_channels`), so a narrower block may
need fewer hidden units than the network had that it was cut from. Those that matter most stay, by the same importance.
A block without an `expand` convolution is left alone: its channels are those of the block before it.

Arrays only, no training: gradients come from `nas.recipe.pruning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.core.records import Candidate, LayerSpec
from nas.core.walk import expand

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LEAST_KEPT = 0.25  # share of a block's channels that stay whatever their importance
LEAST_GAIN = 0.02  # a width is worth looking at when it makes its block this much cheaper; less is noise of measuring

PRODUCERS = ("expand", "fused")  # convolutions whose outputs are the channels of a block
# Which axis of which kernel a channel, or a hidden unit of squeeze-and-excitation, is.
_OUTPUTS = {**dict.fromkeys((*PRODUCERS, "depthwise", "se_expand"), "channels"), "se_reduce": "squeeze"}
_INPUTS = {"se_reduce": "channels", "se_expand": "squeeze", "project": "channels"}


@dataclass(frozen=True, slots=True, eq=False)
class BlockImportance:
    """How much each channel of a block matters, [expanded], and each hidden unit of its SE, [squeeze] (else empty)."""

    channels: FloatArray
    squeeze: FloatArray

    def first(self, layer: LayerSpec) -> BlockImportance:
        """That of the first channels and units, as many as a layer has."""
        return BlockImportance(self.channels[: layer.expanded_channels], self.squeeze[: layer.squeeze_channels])


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Rising numbers of the channels and of the hidden units of a block that stay; the convolutions that have them."""

    channels: IntArray
    squeeze: IntArray
    units: tuple[str, ...]


def channel_units(layer: LayerSpec) -> tuple[str, ...]:
    """The convolutions that have the expansion channels of a block, from their producer to `project`; empty if none."""
    names = [spec.name for spec in layer.convolutions]
    first = next((i for i in reversed(range(len(names))) if names[i] in PRODUCERS), len(names))
    return tuple(names[first:])


def gated_unit(layer: LayerSpec) -> str:
    """The convolution whose output are the channels as `project`, or squeeze-and-excitation, takes them."""
    units = channel_units(layer)
    return "depthwise" if "depthwise" in units else units[0]


def prunable(candidate: Candidate) -> dict[str, LayerSpec]:
    """The blocks whose expansion can be narrowed, by name."""
    return {layer.name: layer for layer in expand(candidate) if channel_units(layer)}


def gate_importance(gradients: FloatArray) -> FloatArray:
    """Taylor importance [C] from the gradients of the loss by gates of value 1, one row for each batch, [B, C]."""
    return np.square(gradients).mean(axis=0)


def l1_importance(candidate: Candidate, weights: Mapping[str, NDArray[np.float32]]) -> dict[str, BlockImportance]:
    """Importance by the L1 norms of the kernels, batch norm folded in.

    A channel's is the mean of the norms of its parts in `project` and in what comes before squeeze-and-excitation, each
    divided by the mean over the block: norms say nothing across kernels of other sizes, so every block has mean 1.

    Args:
        candidate: the network.
        weights: of `folded_weights`, by `<layer>.<convolution>.weight|bias`.
    """

    def norms(name: str, axis: int) -> FloatArray:
        kernel = np.abs(weights[f"{name}.weight"].astype(np.float64))
        each = kernel.sum(axis=tuple(a for a in range(4) if a != axis))
        return each / max(float(each.mean()), np.finfo(np.float64).tiny)

    result = {}
    for name, layer in prunable(candidate).items():
        before = [unit for unit in channel_units(layer) if unit in (*PRODUCERS, "depthwise")]
        parts = [*(norms(f"{name}.{unit}", 0) for unit in before), norms(f"{name}.project", 1)]
        channels = np.mean(parts, axis=0)
        squeeze = np.empty(0)
        if layer.use_se:
            squeeze = (norms(f"{name}.se_reduce", 0) + norms(f"{name}.se_expand", 1)) / 2
        result[name] = BlockImportance(channels, squeeze)
    return result


def useful_widths(costs: Mapping[int, float], least_gain: float = LEAST_GAIN) -> tuple[int, ...]:
    """Widths at the upper edge of a step of the cost, the full one first.

    Channels that a device computes for nothing are kept: of all widths that cost the same the largest is taken.

    Args:
        costs: cost by width, in any unit.
        least_gain: share of the cost by which the next width must be cheaper.
    """
    found: list[int] = []
    for width in sorted(costs, reverse=True):
        if not found or costs[width] <= (1 - least_gain) * costs[found[-1]]:
            found.append(width)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Step:
    """A block made narrower: how many channels go, what their importance was, what is saved."""

    name: str
    width: int
    channels: int
    lost: float
    saved: float


def choose_widths(
    importance: Mapping[str, BlockImportance], costs: Mapping[str, Mapping[int, float]], share: float
) -> dict[str, int]:
    """Widths of all blocks with at least `share` fewer expansion channels, cut where it costs the least importance.

    The step with the least importance lost for the cost saved is taken until so many channels are gone. Of those that
    get there the last one is chosen likewise, but what it saves counts only for the channels that were still to go.
    Fewer go where blocks come to an end before.

    Args:
        importance: of each block's channels.
        costs: cost by width for each block, the full one among them: milliseconds from a latency table, or MACs.
        share: of the expansion channels of these blocks.

    Raises:
        RecordError: a block without the cost of its full width.
    """
    widths = {name: len(importance[name].channels) for name in costs}
    for name, width in widths.items():
        if width not in costs[name]:
            raise RecordError(f"{name}: no cost of its {width} channels; known: {sorted(costs[name])}")
    lost = {name: np.concatenate([[0.0], np.sort(importance[name].channels).cumsum()]) for name in costs}
    useful = {name: useful_widths(costs[name]) for name in costs}
    full, missing = dict(widths), share * sum(widths.values())
    while missing > 0:
        steps = [
            _Step(
                name,
                width,
                now - width,
                float(lost[name][full[name] - width] - lost[name][full[name] - now]),
                costs[name][now] - costs[name][width],
            )
            for name, now in widths.items()
            for width in useful[name]
            if width < now
        ]
        if not steps:
            break
        best = min(steps, key=lambda step: step.lost / step.saved)
        if best.channels >= missing:
            enough = (step for step in steps if step.channels >= missing)
            best = min(enough, key=lambda step: step.lost * step.channels / step.saved)
        widths[best.name] = best.width
        missing -= best.channels
    return widths


def with_widths(candidate: Candidate, widths: Mapping[str, int]) -> Candidate:
    """The same network with other expanded channels in the blocks that are named."""
    stages = []
    for s, stage in enumerate(candidate.stages):
        blocks = (
            replace(block, expanded_channels=widths.get(f"stages.{s}.{b}", block.expanded_channels))
            for b, block in enumerate(stage.blocks)
        )
        stages.append(replace(stage, blocks=tuple(blocks)))
    return replace(candidate, stages=tuple(stages))


def between(candidate: Candidate, target: Candidate, share: float) -> Candidate:
    """The network on the way from one to a narrower one of which `share` (0-1) is gone; a block keeps its `expand`."""
    widths = {}
    wide, narrow = prunable(candidate), prunable(target)
    for name, layer in narrow.items():
        start = wide[name].expanded_channels
        width = round(start + share * (layer.expanded_channels - start))
        widths[name] = width + 1 if width == layer.in_channels else width
    return target if share == 1 else with_widths(candidate, widths)


def removed_share(candidate: Candidate, narrower: Candidate) -> float:
    """Share of the expansion channels that a narrower network has no more, of the blocks that can be narrowed."""
    wide, narrow = prunable(candidate), prunable(narrower)
    total = sum(layer.expanded_channels for layer in wide.values())
    return 1 - sum(narrow[name].expanded_channels for name in wide) / total if total else 0.0


def kept_channels(importance: Mapping[str, BlockImportance], target: Candidate) -> dict[str, Kept]:
    """The channels and hidden units that stay in each block: the most important ones, of equal ones the first.

    Args:
        importance: of the network that is cut.
        target: what is left of it.

    Raises:
        RecordError: a block of the target is wider than what it is cut from.
    """
    return {
        name: Kept(
            _most_important(importance[name].channels, layer.expanded_channels, name),
            _most_important(importance[name].squeeze, layer.squeeze_channels, f"{name}: squeeze"),
            channel_units(layer),
        )
        for name, layer in prunable(target).items()
    }


def _most_important(importance: FloatArray, count: int, where: str) -> IntArray:
    if count > len(importance):
        raise RecordError(f"{where}: {count} channels cannot be cut from {len(importance)}")
    return np.sort(np.argsort(-importance, kind="stable")[:count])


def narrowed(arrays: Mapping[str, NDArray[np.generic]], kept: Mapping[str, Kept]) -> dict[str, NDArray[np.generic]]:
    """Parameters of a network without the channels that do not stay.

    Args:
        arrays: by `<layer>.<convolution>.<rest>`: kernels [out, in / groups, k, k] and what belongs to outputs [out]
            (biases, scale, shift and statistics of batch norm); the names of `folded_weights`, or those of a state
            dict with the layers' names. Single numbers and what belongs to other layers stay as they are.
        kept: by layer.
    """
    return {name: _sliced(name, array, kept) for name, array in arrays.items()}


def _sliced(name: str, array: NDArray[np.generic], kept: Mapping[str, Kept]) -> NDArray[np.generic]:
    parts = name.split(".")  # stages.0.1.expand.weight
    here = kept.get(".".join(parts[:3]))
    if here is None or parts[3] not in here.units or array.ndim == 0:
        return array
    numbers = {"channels": here.channels, "squeeze": here.squeeze}
    outputs, inputs = _OUTPUTS.get(parts[3]), _INPUTS.get(parts[3])
    if outputs is not None:
        array = array[numbers[outputs]]
    if inputs is not None and array.ndim == 4:
        array = array[:, numbers[inputs]]
    return np.ascontiguousarray(array)
