"""The learned distribution over networks, and the supernet that draws from it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_supernet_scorer import LOSS, SHORT, _equal, _space, _targets, _weights

from nas.core.errors import ConfigError, InterruptedRunError
from nas.core.records import LayerSpec
from nas.recipe.architecture import GeneDistribution, SpaceLatency
from nas.recipe.supernet import SupernetStep, train_supernet
from nas.space.space import SearchSpace


def row_ms(layer: LayerSpec) -> float:
    return layer.expanded_channels * layer.kernel_size * 0.01 + layer.out_channels * 0.002


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return _space([8, 16])


def network_ms(space: SearchSpace, genotype: tuple[int, ...]) -> float:
    found = (slot.layer(genotype) for slot in space.slots() if slot.kind != "exit_head")
    return sum(row_ms(layer) for layer in found if layer is not None)


def test_expected_latency_is_the_mean_over_all_networks(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    chances = [torch.from_numpy(rng.dirichlet(np.ones(size))) for size in space.gene_sizes]
    expected = 0.0
    for genotype in itertools.product(*map(range, space.gene_sizes)):
        chance = float(np.prod([p[g] for p, g in zip(chances, genotype, strict=True)]))
        expected += chance * network_ms(space, genotype)
    latency = SpaceLatency.of(space, row_ms, 1.0)
    assert float(latency.expected_ms(chances)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("end", ["fast", "slow"])
def test_networks_near_the_deadline_are_drawn_more_often(space: SearchSpace, end: str) -> None:
    every = [network_ms(space, g) for g in itertools.product(*map(range, space.gene_sizes))]
    budget = float(np.quantile(every, 0.25 if end == "fast" else 0.75))
    genes = GeneDistribution(space, SpaceLatency.of(space, row_ms, budget), 1.0)
    assert genes.expected_ms() == pytest.approx(np.mean(every))
    for _ in range(150):
        genes.learn([], [])
    rng = np.random.default_rng(0)
    drawn = [network_ms(space, genes.sample(rng)) for _ in range(200)]
    assert abs(genes.expected_ms() - budget) < 0.3 * abs(np.mean(every) - budget)
    assert np.mean(drawn) == pytest.approx(genes.expected_ms(), rel=0.15)
    assert min(float(p.detach().min()) for p in genes.probabilities()) > 0.02  # no network is given up


def test_choices_with_a_low_loss_become_likelier(space: SearchSpace) -> None:
    genes = GeneDistribution(space, SpaceLatency.of(space, row_ms, 1.0), 0.0)
    rng = np.random.default_rng(0)
    gene = int(np.argmax(space.gene_sizes))
    for _ in range(200):
        drawn = [genes.sample(rng) for _ in range(2)]
        genes.learn(drawn, [float(g[gene]) for g in drawn])
    chances = genes.probabilities()[gene].detach()
    assert chances[0] == chances.max()
    assert float(chances[0]) > 0.6


def test_a_stopped_training_goes_on_to_the_same_supernet(tmp_path: Path) -> None:
    space, targets = _space([8]), {8: _targets(8)}
    settings = replace(SHORT, latency_weight=0.5)
    latency = SpaceLatency.of(space, row_ms, 0.4)
    whole = train_supernet(space, targets, LOSS, settings, tmp_path / "whole", latency=latency)
    assert whole.expected_ms is not None

    def stop(step: SupernetStep) -> None:
        if step.step == 4:
            raise InterruptedRunError("stop")

    with pytest.raises(InterruptedRunError):
        train_supernet(space, targets, LOSS, settings, tmp_path / "parts", latency=latency, progress=stop)
    anew = SpaceLatency.of(space, lambda layer: 2 * row_ms(layer), 0.4)  # a row that was measured again changes nothing
    parts = train_supernet(space, targets, LOSS, settings, tmp_path / "parts", latency=anew)
    assert (parts.expected_ms, parts.loss) == (whole.expected_ms, whole.loss)
    assert _equal(_weights(tmp_path / "whole"), _weights(tmp_path / "parts"))


def test_latencies_that_are_not_known_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"supernet\.latency_weight: .* \(--set feedback\.max_rows=N\)"):
        train_supernet(_space([8]), {8: _targets(8)}, LOSS, replace(SHORT, latency_weight=1.0), tmp_path)
