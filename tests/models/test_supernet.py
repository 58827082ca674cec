"""The supernet gives the same outputs as the ordinary students that are extracted from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nas.core.errors import RecordError
from nas.core.records import BLOCK_KINDS, Candidate, ExitConfig
from nas.models.student import Student
from nas.models.supernet import Supernet
from nas.space.space import SearchSpace, space_from_plain

RICH: dict[str, Any] = {  # every kind of choice, on maps of a few pixels
    "name": "rich",
    "source": "made for this test",
    "resolution": [8, 16],
    "stem": {"channels": [4, 8], "activation": ["relu", "hard_swish"]},
    "stages": [
        {"name": "a", "width": [4, 8], "depth": [1, 2], "stride": 1, "kernel_size": [3, 5, 7], "expansion": [1, 2],
         "activation": "relu"},
        {"name": "b", "width": [8, 16], "depth": [1, 3], "stride": 2, "kernel_size": [3, 5], "expansion": [1, 3, 6],
         "use_se": [False, True], "activation": ["relu", "hard_swish"]},
        {"name": "c", "kind": list(BLOCK_KINDS),
         "width": [16, 72], "depth": [1, 2], "stride": 1, "kernel_size": [3, 5], "expansion": [1, 3],
         "use_se": [False, True], "activation": "relu"},
    ],
    "head": {"conv_channels": [0, 12, 24], "hidden_channels": [0, 8, 16]},
    "exits": {"after": ["a"], "max_count": 1, "hidden_channels": [0, 8], "conv_channels": [0, 6, 12]},
    "precision": {"choices": ["fp32", "int8"], "per": "stage"},
}  # fmt: skip


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(RICH, "rich", 5)


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    torch.manual_seed(0)
    net = Supernet.of(space)
    with torch.no_grad():  # as after training: nothing is at its initial value
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def _candidates(space: SearchSpace, count: int) -> list[Candidate]:
    rng = np.random.default_rng(1)
    extremes = [space.smallest(), space.largest()]
    return [space.decode(g) for g in extremes + [space.sample(rng) for _ in range(count)]]


def test_slices_and_extracted_student_give_equal_outputs(space: SearchSpace, supernet: Supernet) -> None:
    for candidate in _candidates(space, 20):
        x = torch.randn(3, 3, candidate.resolution, candidate.resolution)
        sliced = supernet(x, candidate)
        extracted = supernet.extract(candidate).train()(x)
        assert len(sliced) == len(candidate.exits) + 1
        for a, b in zip(sliced, extracted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_extracted_student_is_a_copy(space: SearchSpace, supernet: Supernet) -> None:
    candidate = space.decode(space.largest())
    before = {name: p.clone() for name, p in supernet.named_parameters()}
    student = supernet.extract(candidate)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert isinstance(student, Student)
    assert all(torch.equal(p, before[name]) for name, p in supernet.named_parameters())


def test_extraction_leaves_the_global_generator_alone(space: SearchSpace, supernet: Supernet) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    supernet.extract(space.decode(space.smallest()))
    assert torch.equal(torch.rand(1), expected)


def test_weights_alone_rebuild_the_supernet(space: SearchSpace, supernet: Supernet) -> None:
    again = Supernet.from_weights(supernet.state_dict())
    candidate = space.decode(space.largest())
    x = torch.randn(3, 3, candidate.resolution, candidate.resolution)
    for a, b in zip(supernet(x, candidate), again(x, candidate), strict=True):
        assert torch.equal(a, b)


def test_foreign_weights_are_refused(space: SearchSpace, supernet: Supernet) -> None:
    student = supernet.extract(space.decode(space.smallest()))
    with pytest.raises(RecordError, match="not the weights of a supernet"):
        Supernet.from_weights(student.state_dict())


def test_smaller_kernel_is_the_centre_and_smaller_width_the_first_channels(
    space: SearchSpace, supernet: Supernet
) -> None:
    large = space.decode(space.largest())
    block = large.stages[0].blocks[0]
    assert (block.kernel_size, block.out_channels) == (7, 8)
    narrow = replace(block, kernel_size=3, out_channels=4)
    rest = tuple(replace(b, in_channels=4, out_channels=4) for b in large.stages[0].blocks[1:])
    second = large.stages[1]
    second = replace(second, blocks=(replace(second.blocks[0], in_channels=4), *second.blocks[1:]))
    small = replace(large, stages=(replace(large.stages[0], blocks=(narrow, *rest)), second))
    parts = [supernet.extract(c).body["stages_0_0"] for c in (large, small)]
    torch.testing.assert_close(parts[1].depthwise.conv.weight, parts[0].depthwise.conv.weight[..., 2:5, 2:5])
    torch.testing.assert_close(parts[1].project.conv.weight, parts[0].project.conv.weight[:4])
    torch.testing.assert_close(parts[1].project.bn.bias, parts[0].project.bn.bias[:4])


def test_precision_and_thresholds_share_all_weights(space: SearchSpace, supernet: Supernet) -> None:
    candidate = space.decode(space.largest())
    other = candidate.with_precision("int8").with_thresholds([0.5] * len(candidate.exits))
    a, b = supernet.extract(candidate).state_dict(), supernet.extract(other).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gradients_reach_only_what_the_candidate_uses(space: SearchSpace, supernet: Supernet) -> None:
    candidate = space.decode(space.smallest())
    x = torch.randn(4, 3, candidate.resolution, candidate.resolution)
    supernet.zero_grad()
    sum(z.square().sum() for z in supernet(x, candidate)).backward()
    used = {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert "units.stem__conv.weight" in used
    assert not any(name.startswith(("units.stages_1_1__", "units.exits_0__")) for name in used)
    supernet.zero_grad()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, exits=()), None),
        (lambda c: replace(c, exits=(ExitConfig(0, conv_channels=13),)), "exits_0__conv: .* is outside the supernet's"),
        (
            lambda c: replace(c, stem=replace(c.stem, kernel_size=5)),
            r"stem__conv: \[8, 3, 5, 5\] is outside the supernet's \[8, 3, 3, 3\]",
        ),
    ],
)
def test_candidate_outside_the_space_is_named(
    space: SearchSpace, supernet: Supernet, change: Any, message: str | None
) -> None:
    candidate = change(space.decode(space.largest()))
    if message is None:
        supernet.extract(candidate)
    else:
        with pytest.raises(RecordError, match=message):
            supernet.extract(candidate)
