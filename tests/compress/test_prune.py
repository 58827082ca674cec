"""Which channels a block keeps, how wide each block becomes, and that what is left answers as if the others were 0."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nas.compress.prune import (
    BlockImportance,
    between,
    choose_widths,
    gate_importance,
    kept_channels,
    l1_importance,
    narrowed,
    prunable,
    removed_share,
    useful_widths,
    with_widths,
)
from nas.core.errors import RecordError
from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.models.student import Student, folded_weights, module_name


def network(wide: int = 64) -> Candidate:
    """A block that does not expand, one that does, one with squeeze-and-excitation."""
    blocks = (BlockConfig(4, 4, 8, stride=2), BlockConfig(8, 24, 8), BlockConfig(8, wide, 8, use_se=True))
    return Candidate(8, 3, StemConfig(4), (StageConfig(blocks),), HeadConfig())


def importance(*values: float) -> BlockImportance:
    return BlockImportance(np.array(values, dtype=np.float64), np.empty(0))


def test_channels_can_be_cut_where_a_block_expands() -> None:
    assert list(prunable(network())) == ["stages.0.1", "stages.0.2"]


def test_widths_worth_having_are_the_upper_edges_of_steps() -> None:
    costs = {8: 1.0, 12: 1.99, 16: 2.0, 17: 3.0, 24: 3.0, 32: 3.01}
    assert useful_widths(costs) == (32, 16, 8)


def test_a_width_that_costs_more_than_a_wider_one_is_left_out() -> None:
    assert useful_widths({8: 2.0, 12: 5.0, 16: 4.0}) == (16, 8)


def test_channels_go_where_they_matter_least_for_the_time_that_they_take() -> None:
    blocks = {"slow": importance(*[2.0] * 8), "fast": importance(*[1.0] * 8)}
    costs = {"slow": {8: 8.0, 4: 4.0}, "fast": {8: 0.8, 4: 0.4}}
    assert choose_widths(blocks, costs, 0.25) == {"slow": 4, "fast": 8}  # 2 a ms against 10 a ms
    assert choose_widths(blocks, costs, 0.5) == {"slow": 4, "fast": 4}


def test_least_important_channels_are_counted_first() -> None:
    blocks = {"a": importance(9, 0, 9, 0), "b": importance(3, 3, 3, 3)}
    costs = {name: {4: 4.0, 3: 3.0, 2: 2.0, 1: 1.0} for name in blocks}
    assert choose_widths(blocks, costs, 0.25) == {"a": 2, "b": 4}


def test_last_step_takes_no_more_channels_than_it_is_worth() -> None:
    blocks = {"large": importance(*[1.0] * 16), "small": importance(*[1.2] * 4)}
    costs = {"large": {16: 16.0, 4: 4.0}, "small": {4: 4.0, 3: 3.0}}
    assert choose_widths(blocks, costs, 0.05) == {"large": 16, "small": 3}


def test_share_that_cannot_be_reached_takes_what_there_is() -> None:
    assert choose_widths({"a": importance(1, 1, 1, 1)}, {"a": {4: 4.0, 2: 2.0}}, 0.7) == {"a": 2}


def test_block_without_the_cost_of_its_full_width_is_an_error() -> None:
    with pytest.raises(RecordError, match=r"a: no cost of its 4 channels; known: \[2\]"):
        choose_widths({"a": importance(1, 1, 1, 1)}, {"a": {2: 1.0}}, 0.3)


def test_a_gate_counts_by_the_square_of_its_gradient_batch_by_batch() -> None:
    assert gate_importance(np.array([[1.0, 3.0], [-1.0, 0.0]])).tolist() == [1.0, 4.5]


def test_small_kernels_matter_least_and_blocks_compare_by_l1() -> None:
    candidate = network()
    weights = folded_weights(Student(candidate))
    for name in ("expand", "depthwise"):
        weights[f"stages.0.2.{name}.weight"][5] *= 0.01
    found = l1_importance(candidate, weights)
    assert found["stages.0.2"].channels.argmin() == 5
    assert found["stages.0.2"].squeeze.shape == (16,)
    assert found["stages.0.1"].channels.mean() == pytest.approx(found["stages.0.2"].channels.mean())


def test_narrower_network_answers_as_the_wide_one_whose_other_channels_are_silent() -> None:
    torch.manual_seed(0)
    wide = Student(network(64)).eval()
    target = with_widths(wide.candidate, {"stages.0.1": 13, "stages.0.2": 30})
    rng = np.random.default_rng(0)
    found = {
        name: BlockImportance(rng.random(layer.expanded_channels), rng.random(layer.squeeze_channels))
        for name, layer in prunable(wide.candidate).items()
    }
    kept = kept_channels(found, target)
    assert {name: (len(k.channels), len(k.squeeze)) for name, k in kept.items()} == {
        "stages.0.1": (13, 0),
        "stages.0.2": (30, 8),  # a quarter of 30, and not of 64
    }
    left = narrowed(folded_weights(wide), kept)
    with torch.no_grad():
        for layer in wide.layers:
            if layer.name in kept:
                block = wide.body[module_name(layer)]
                gone = np.setdiff1d(np.arange(layer.expanded_channels), kept[layer.name].channels)
                block.project.conv.weight[:, gone] = 0
                if layer.use_se:
                    block.se_reduce.conv.weight[:, gone] = 0
                    block.se_expand.conv.weight[:, np.setdiff1d(np.arange(16), kept[layer.name].squeeze)] = 0
    narrow = Student(target).eval()
    with torch.no_grad():
        for layer in narrow.layers:
            for spec in layer.convolutions:
                unit = getattr(narrow.body[module_name(layer)], spec.name)
                unit.conv.weight.copy_(torch.from_numpy(left[f"{layer.name}.{spec.name}.weight"]))
                bias = torch.from_numpy(left[f"{layer.name}.{spec.name}.bias"])
                if unit.bn is None:
                    unit.conv.bias.copy_(bias)
                else:
                    unit.bn.weight.fill_(float(np.sqrt(1 + unit.bn.eps)))
                    unit.bn.bias.copy_(bias)
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(narrow(x)[-1], wide(x)[-1], rtol=1e-4, atol=1e-5)


def test_equally_important_channels_stay_in_their_order() -> None:
    target = with_widths(network(24), {"stages.0.1": 3})
    blocks = {"stages.0.1": importance(*[1.0] * 24), "stages.0.2": BlockImportance(np.ones(24), np.ones(8))}
    assert kept_channels(blocks, target)["stages.0.1"].channels.tolist() == [0, 1, 2]


def test_more_channels_than_there_are_cannot_be_kept() -> None:
    blocks = {"stages.0.1": importance(1, 2), "stages.0.2": importance(1, 2)}
    with pytest.raises(RecordError, match=r"stages\.0\.1: 24 channels cannot be cut from 2"):
        kept_channels(blocks, network())


def test_on_the_way_a_block_never_has_as_many_channels_as_its_input() -> None:
    wide = network()
    target = with_widths(wide, {"stages.0.1": 4})  # from 24 by way of 14, 8 input channels
    halves = [prunable(between(wide, target, share))["stages.0.1"].expanded_channels for share in (0.5, 0.8, 1)]
    assert halves == [14, 9, 4]
    assert between(wide, target, 1) == target


def test_removed_share_counts_the_blocks_that_can_be_narrowed() -> None:
    wide = network(40)
    assert removed_share(wide, with_widths(wide, {"stages.0.2": 24})) == pytest.approx(16 / 64)
    assert removed_share(wide, wide) == 0
    alone = replace(wide, stages=(StageConfig((BlockConfig(4, 4, 8),)),))
    assert removed_share(alone, alone) == 0
