"""The 224 px spaces contain the published MobileNetV3 exactly, with torchvision's implementation as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small

from nas.core.walk import total_macs, total_params
from nas.models.student import ConvUnit, Student, module_name
from nas.space.published import PUBLISHED, published_network
from nas.space.space import load_space

SPACES = Path(__file__).parents[2] / "search_spaces"


@dataclass(frozen=True)
class Published:
    space: str
    build: Callable[..., nn.Module]
    params: int  # as printed by torchvision's documentation of the weights
    macs_m: int  # Howard et al. 2019, Table 3: MAdds in millions


CASES = [
    Published("mobilenetv3-large-224", mobilenet_v3_large, 5_483_032, 219),
    Published("mobilenetv3-small-224", mobilenet_v3_small, 2_542_856, 56),
]


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


def test_every_published_network_is_compared() -> None:
    assert set(PUBLISHED) == {case.space for case in CASES}


@pytest.mark.parametrize("published", CASES, ids=lambda case: case.space)
def test_the_space_contains_the_published_network(published: Published) -> None:
    space = load_space(SPACES / f"{published.space}.yaml", 1000)
    candidate = published_network(published.space)
    genotype = space.encode(candidate)
    assert space.decode(genotype) == candidate
    assert total_params(candidate) == published.params
    assert abs(total_macs(candidate) / 1e6 - published.macs_m) < 2.5  # the paper's count leaves a little out


@pytest.mark.parametrize("published", CASES, ids=lambda case: case.space)
def test_the_network_of_the_space_is_torchvisions(published: Published) -> None:
    space = load_space(SPACES / f"{published.space}.yaml", 1000)
    candidate = space.decode(space.encode(published_network(published.space)))
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
