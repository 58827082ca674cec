"""Layers of a profile come home to the blocks of a network, whatever a runtime makes of their names."""

from __future__ import annotations

import pytest

from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, LayerSpec, StageConfig, StemConfig
from nas.core.walk import expand
from nas.devices.base import LayerTime
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu, profiled
from nas.measure.attribution import Attribution, attribute, is_reformat
from nas.measure.networks import network_bytes

NETWORK = Candidate(
    32,
    4,
    StemConfig(8),
    (
        StageConfig((BlockConfig(8, 16, 16, stride=2), BlockConfig(16, 48, 16, use_se=True, activation="hard_swish"))),
        StageConfig((BlockConfig(16, 32, 24, stride=2),)),
    ),
    HeadConfig(32),
    exits=(ExitConfig(0),),
)
LAYERS = expand(NETWORK)
NAMES = [layer.name for layer in LAYERS]


def times(*named: tuple[str, float] | LayerTime) -> list[LayerTime]:
    return [entry if isinstance(entry, LayerTime) else LayerTime(*entry) for entry in named]


def spent(found: Attribution) -> dict[str, float]:
    return {block.layer.name: round(block.total_ms, 9) for block in found.blocks if block.total_ms}


def test_the_layers_of_this_network_are_these() -> None:
    assert NAMES == ["stem", "stages.0.0", "stages.0.1", "exits.0", "stages.1.0", "head"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("stem.conv/Conv + PWN(stem.conv/HardSwish)", "stem"),
        ("PWN(PWN(image.scaled/Mul), image.normalised/Add)", "stem"),
        ("stages.0.1.project/Conv + stages.0.1.sum/Add", "stages.0.1"),
        ("stages.0.1.se_reduce/Conv_nchwc", "stages.0.1"),
        ("stages.0.0.depthwise.q/QuantizeLinear", "stages.0.0"),
        ("exits.0.classifier/Conv", "exits.0"),
        ("(Unnamed Layer* 12) [Shuffle] logits_0/Flatten", "exits.0"),
        ("logits_1/Flatten", "head"),
        ("head.pool/GlobalAveragePool", "head"),
        ("Reformatting CopyNode for Output Tensor 0 to logits_0", "exits.0"),
        ("Reformatting CopyNode for Input Tensor 1 to stages.1.0.expand/Conv", "stages.1.0"),
    ],
)
def test_a_layer_belongs_to_the_block_that_its_name_says(name: str, block: str) -> None:
    assert spent(attribute(times((name, 0.5)), LAYERS)) == {block: 0.5}


def test_metadata_goes_before_the_name() -> None:
    layer = LayerTime(
        "__myl_Fused_0x77", 1.0, "[ONNX Layer: stages.1.0.expand/Conv]\x1e[ONNX Layer: stages.1.0.expand/Relu]"
    )
    assert spent(attribute([layer], LAYERS)) == {"stages.1.0": 1.0}


def test_a_layer_of_two_blocks_is_shared_by_their_multiply_adds() -> None:
    first = next(c.macs for c in LAYERS[1].convolutions if c.name == "project")
    second = next(c.macs for c in LAYERS[2].convolutions if c.name == "expand")
    found = spent(attribute(times(("stages.0.0.project/Conv + stages.0.1.expand/Conv", 2.0)), LAYERS))
    assert found == {
        "stages.0.0": pytest.approx(2 * first / (first + second)),
        "stages.0.1": pytest.approx(2 * second / (first + second)),
    }


def test_a_range_of_nodes_takes_everything_between_them() -> None:
    found = spent(attribute(times(("{ForeignNode[stages.0.0.expand/Conv...stages.1.0.project/Conv]}", 1.0)), LAYERS))
    assert set(found) == {"stages.0.0", "stages.0.1", "exits.0", "stages.1.0"}
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["stages.0.1"] > found["exits.0"]


def test_a_layer_without_a_name_of_ours_belongs_to_the_next_block_and_is_told() -> None:
    found = attribute(
        times(("stem.conv/Conv", 1.0), ("copy 7", 0.25), ("stages.0.0.expand/Conv", 1.0), ("copy 9", 0.125)), LAYERS
    )
    assert spent(found) == {"stem": 1.0, "stages.0.0": 1.375}
    assert (found.unnamed_ms, found.total_ms) == (0.375, 2.375)
    assert spent(attribute(times(("nothing known", 1.0)), LAYERS)) == {"head": 1.0}


def test_changes_of_layout_are_part_of_their_block_and_told_apart() -> None:
    found = attribute(
        times(
            ("stem.conv/Conv", 1.0),
            LayerTime(
                "Reformatting CopyNode for Input Tensor 0 to stages.0.0.expand/Conv", 0.25, "", "Reformat REFORMAT"
            ),
            ("stages.0.0.expand/Conv", 1.0),
            LayerTime("stages.0.1.expand.q/QuantizeLinear", 0.5, "", "Reformat QDQ"),
        ),
        LAYERS,
    )
    assert found.reformat_ms == 0.25
    assert [block.reformat_ms for block in found.blocks[:3]] == [0.0, 0.25, 0.0]
    assert spent(found)["stages.0.0"] == 1.25


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (LayerTime("ReorderOutput_token_7", 1.0, "", "ReorderOutput"), True),
        (LayerTime("Reformatting CopyNode for Network Input image", 1.0), True),
        (LayerTime("x", 1.0, "", "Reformat"), True),
        (LayerTime("x", 1.0, "", "Reformat QDQ"), False),
        (LayerTime("Reformatting CopyNode for Input Tensor 0 to x", 1.0, "", "Reformat QDQ"), False),  # quantizes
        (LayerTime("stem.conv/Conv", 1.0, "", "Conv"), False),
    ],
)
def test_what_counts_as_a_change_of_layout(time: LayerTime, expected: bool) -> None:
    assert is_reformat(time) is expected


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_operator_that_onnx_runtime_executes_comes_home(precision: str) -> None:
    network = NETWORK.with_precision(precision)  # type: ignore[arg-type]
    layers: tuple[LayerSpec, ...] = expand(network)
    found = profiled(network_bytes(network))
    home = attribute(found, layers)
    assert all(block.total_ms > 0 for block in home.blocks), spent(home)
    assert home.total_ms == pytest.approx(sum(time.median_ms for time in found))
    assert home.unnamed_ms < 0.4 * home.total_ms, [t.name for t in found]
    assert (home.reformat_ms > 0) == (precision == "fp32")  # int8 needs no blocked layout


def test_what_profiling_an_operator_costs_is_taken_off_each() -> None:
    model = network_bytes(NETWORK)
    raw = sum(time.median_ms for time in profiled(model))
    net = OnnxRuntimeCpu().layer_times(model, "fp32")
    assert all(time.median_ms >= 0 for time in net)
    assert 0 < sum(time.median_ms for time in net) < 0.8 * raw  # 29 operators of 1 to 2 us too much each
