"""The 224 px spaces contain the published MobileNetV3 exactly, with torchvision's implementation as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small

from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.core.walk import total_macs, total_params
from nas.models.student import ConvUnit, Student, module_name
from nas.space.space import load_space

SPACES = Path(__file__).parents[2] / "search_spaces"
RELU, SWISH = "relu", "hard_swish"

# Howard et al. 2019, Tables 1 and 2: kernel, expanded, out, squeeze-and-excitation, activation, stride
LARGE = (
    ((3, 16, 16, False, RELU, 1),),
    ((3, 64, 24, False, RELU, 2), (3, 72, 24, False, RELU, 1)),
    ((5, 72, 40, True, RELU, 2), (5, 120, 40, True, RELU, 1), (5, 120, 40, True, RELU, 1)),
    (
        (3, 240, 80, False, SWISH, 2),
        (3, 200, 80, False, SWISH, 1),
        (3, 184, 80, False, SWISH, 1),
        (3, 184, 80, False, SWISH, 1),
    ),
    ((3, 480, 112, True, SWISH, 1), (3, 672, 112, True, SWISH, 1)),
    ((5, 672, 160, True, SWISH, 2), (5, 960, 160, True, SWISH, 1), (5, 960, 160, True, SWISH, 1)),
)
SMALL = (
    ((3, 16, 16, True, RELU, 2),),
    ((3, 72, 24, False, RELU, 2), (3, 88, 24, False, RELU, 1)),
    ((5, 96, 40, True, SWISH, 2), (5, 240, 40, True, SWISH, 1), (5, 240, 40, True, SWISH, 1)),
    ((5, 120, 48, True, SWISH, 1), (5, 144, 48, True, SWISH, 1)),
    ((5, 288, 96, True, SWISH, 2), (5, 576, 96, True, SWISH, 1), (5, 576, 96, True, SWISH, 1)),
)


@dataclass(frozen=True)
class Published:
    space: str
    stages: tuple[tuple[tuple[int, int, int, bool, str, int], ...], ...]
    head: tuple[int, int]
    build: Callable[..., nn.Module]
    params: int  # as printed by torchvision's documentation of the weights
    macs_m: int  # Howard et al. 2019, Table 3: MAdds in millions


CASES = [
    Published("mobilenetv3-large-224", LARGE, (960, 1280), mobilenet_v3_large, 5_483_032, 219),
    Published("mobilenetv3-small-224", SMALL, (576, 1024), mobilenet_v3_small, 2_542_856, 56),
]


def candidate_of(published: Published) -> Candidate:
    channels, stages = 16, []
    for rows in published.stages:
        blocks = []
        for kernel, wide, out, se, activation, stride in rows:
            blocks.append(BlockConfig(channels, wide, out, kernel, stride, se, activation))  # type: ignore[arg-type]
            channels = out
        stages.append(StageConfig(tuple(blocks)))
    return Candidate(224, 1000, StemConfig(16), tuple(stages), HeadConfig(*published.head))


def reference(published: Published) -> nn.Module:
    """Torchvision's network with random weights, and batch-norm statistics of its own so that signals stay large."""
    torch.manual_seed(0)
    model = published.build(weights=None)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
            part.momentum = 1.0
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0, 0.05)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def counted_macs(model: nn.Module, resolution: int) -> int:
    """Multiply-adds of all convolutions and linear layers in one forward pass of one image."""
    total = 0

    def count(part: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weights = part.weight  # [out, in / groups, k, k] or [out, in]
        total += weights.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    handles = [p.register_forward_hook(count) for p in model.modules() if isinstance(p, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(torch.zeros(1, 3, resolution, resolution))
    for handle in handles:
        handle.remove()
    return total


def units(student: Student) -> Iterator[ConvUnit]:
    """Convolutions in execution order, which is also the order of torchvision's modules."""
    for layer in student.layers:
        for spec in layer.convolutions:
            yield getattr(student.body[module_name(layer)], spec.name)


def copy_weights(model: nn.Module, student: Student) -> None:
    convolutions = [p for p in model.modules() if isinstance(p, nn.Conv2d | nn.Linear)]
    norms = iter([p for p in model.modules() if isinstance(p, nn.BatchNorm2d)])
    with torch.no_grad():
        for source, unit in zip(convolutions, units(student), strict=True):
            unit.conv.weight.copy_(source.weight.reshape(unit.conv.weight.shape))
            if unit.conv.bias is not None:
                unit.conv.bias.copy_(source.bias)
            if unit.bn is not None:
                unit.bn.load_state_dict(next(norms).state_dict())
    assert next(norms, None) is None


@pytest.mark.parametrize("published", CASES, ids=lambda case: case.space)
def test_the_space_contains_the_published_network(published: Published) -> None:
    space = load_space(SPACES / f"{published.space}.yaml", 1000)
    candidate = candidate_of(published)
    genotype = space.encode(candidate)
    assert space.decode(genotype) == candidate
    assert total_params(candidate) == published.params
    assert abs(total_macs(candidate) / 1e6 - published.macs_m) < 2.5  # the paper's count leaves a little out


@pytest.mark.parametrize("published", CASES, ids=lambda case: case.space)
def test_the_network_of_the_space_is_torchvisions(published: Published) -> None:
    space = load_space(SPACES / f"{published.space}.yaml", 1000)
    candidate = space.decode(space.encode(candidate_of(published)))
    model = reference(published)
    assert total_params(candidate) == sum(p.numel() for p in model.parameters())
    assert total_macs(candidate) == counted_macs(model, 224)
    student = Student(candidate).eval()
    copy_weights(model, student)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, (given,) = model(images), student(images)
    assert (expected[0] - expected[1]).std() > 0.1
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
