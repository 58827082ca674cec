"""The one walk over a network: MACs, parameters, rows, latency sums, ONNX graphs and reports fold over it."""

from __future__ import annotations

from nas.core.errors import RecordError
from nas.core.records import MAX_TOKENS, Candidate, ExitConfig, LayerSpec


def expand(candidate: Candidate) -> tuple[LayerSpec, ...]:
    """Layers of a candidate in execution order, each with its segment: stem, blocks, exit heads where they stand, head.

    A convolution of kernel k and stride s turns a side of n pixels into ceil(n / s) (padding k // 2).

    Raises:
        RecordError: the maps shrink below one pixel before the network ends, or attention stands on too large a map.
    """
    layers: list[LayerSpec] = []
    stem = candidate.stem
    exits = {e.after_stage: e for e in candidate.exits}
    size = _shrunk(candidate.resolution, stem.stride, "stem")
    segment = 0
    layers.append(
        LayerSpec(
            kind="stem",
            in_channels=candidate.in_channels,
            in_size=candidate.resolution,
            out_channels=stem.out_channels,
            out_size=size,
            kernel_size=stem.kernel_size,
            stride=stem.stride,
            expanded_channels=0,
            hidden_channels=0,
            use_se=False,
            activation=stem.activation,
            precision=stem.precision,
            name="stem",
            segment=segment,
        )
    )
    for s, stage in enumerate(candidate.stages):
        for b, block in enumerate(stage.blocks):
            name = f"stages.{s}.{b}"
            out_size = _shrunk(size, block.stride, name)
            layers.append(
                LayerSpec(
                    kind=block.kind,
                    in_channels=block.in_channels,
                    in_size=size,
                    out_channels=block.out_channels,
                    out_size=out_size,
                    kernel_size=block.kernel_size,
                    stride=block.stride,
                    expanded_channels=block.expanded_channels,
                    hidden_channels=0,
                    use_se=block.use_se,
                    activation=block.activation,
                    precision=stage.precision,
                    name=name,
                    segment=segment,
                )
            )
            _check_tokens(layers[-1])
            size = out_size
        place = exits.get(s)
        if place is not None:
            layers.append(_exit_head(candidate, place, size, segment))
            segment += 1
    layers.append(
        LayerSpec(
            kind="head",
            in_channels=candidate.stages[-1].blocks[-1].out_channels,
            in_size=size,
            out_channels=candidate.num_classes,
            out_size=1,
            kernel_size=1,
            stride=1,
            expanded_channels=candidate.head.conv_channels,
            hidden_channels=candidate.head.hidden_channels,
            use_se=False,
            activation=candidate.head.activation,
            precision=candidate.head.precision,
            name="head",
            segment=segment,
        )
    )
    return tuple(layers)


def _exit_head(candidate: Candidate, place: ExitConfig, size: int, segment: int) -> LayerSpec:
    stage = candidate.stages[place.after_stage]
    return LayerSpec(
        kind="exit_head",
        in_channels=stage.blocks[-1].out_channels,
        in_size=size,
        out_channels=candidate.num_classes,
        out_size=1,
        kernel_size=1,
        stride=1,
        expanded_channels=place.conv_channels,
        hidden_channels=place.hidden_channels,
        use_se=False,
        activation=candidate.head.activation,
        precision=stage.precision,
        name=f"exits.{segment}",
        segment=segment,
    )


def _check_tokens(layer: LayerSpec) -> None:
    if layer.tokens > MAX_TOKENS:
        raise RecordError(
            f"{layer.name}: attention on a map of {layer.out_size} px would have {layer.tokens} tokens; at most "
            f"{MAX_TOKENS} are allowed: use a later stage, a smaller resolution or another kind"
        )


def _shrunk(size: int, stride: int, name: str) -> int:
    if stride > 1 and size < stride:
        raise RecordError(f"{name}: stride {stride} on a map of {size} px; use a larger resolution or fewer strides")
    return -(-size // stride)


def total_macs(candidate: Candidate) -> int:
    """Multiply-adds of one image that passes the whole network, exit heads included."""
    return sum(layer.macs for layer in expand(candidate))


def total_params(candidate: Candidate) -> int:
    """Learnable parameters, exit heads included."""
    return sum(layer.params for layer in expand(candidate))


def exit_macs(candidate: Candidate) -> tuple[int, ...]:
    """Multiply-adds of an image that leaves at exit k, for every exit and the head (cumulative)."""
    sums = [0] * (len(candidate.exits) + 1)
    for layer in expand(candidate):
        sums[layer.segment] += layer.macs
    return tuple(sum(sums[: k + 1]) for k in range(len(sums)))
