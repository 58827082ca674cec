"""Stages whose blocks may go without a share of their expanded channels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from nas.core.errors import ConfigError, RecordError
from nas.core.walk import expand, total_macs
from nas.space.choices import pruned_channels
from nas.space.space import SearchSpace, space_from_plain


def plain(**first: Any) -> dict[str, Any]:
    a = {"name": "a", "width": [8, 16], "depth": [1, 2], "stride": 1, "kernel_size": 3, "activation": "relu"}
    b = {"name": "b", "width": 16, "depth": [1, 2], "stride": 2, "kernel_size": 3, "activation": "relu"}
    return {
        "name": "pruned",
        "source": "made by a test",
        "resolution": 16,
        "stem": {"channels": 8, "activation": "relu"},
        "stages": [{**a, "expansion": [1, 2, 4], **first}, {**b, "expansion": [2, 3], "use_se": [False, True]}],
        "head": {},
    }


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(plain(prune=[0.5, 0, 0.25]), "pruned.yaml", 5)


@pytest.fixture(scope="module")
def genotypes(space: SearchSpace) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, space.gene_sizes))), np.int64)


@pytest.mark.parametrize(
    ("in_channels", "expansion", "share", "expected"),
    [
        (16, 3, 0, 48),
        (16, 3, 0.25, 36),  # not only multiples of 8
        (24, 2.5, 0.3, 45),  # of 64
        (16, 1, 0.5, 16),  # does not expand
        (16, 2, 0.5, 24),  # 16 would be another kind of block
        (8, 2, 0.5, 16),
    ],
)
def test_pruned_block_has_so_many_channels(in_channels: int, expansion: float, share: float, expected: int) -> None:
    assert pruned_channels(in_channels, expansion, share) == expected


def test_canonical_genotypes_are_equal_exactly_when_their_networks_are(
    space: SearchSpace, genotypes: np.ndarray
) -> None:
    canonical = [tuple(row) for row in space.canonical_many(genotypes).tolist()]
    candidates = [space._build(tuple(row)) for row in genotypes.tolist()]
    assert [space._build(g) for g in canonical] == candidates
    assert len(set(canonical)) == len(set(candidates))
    assert len(set(candidates)) > len({c for c in candidates if space.unpruned.contains(c)})


def test_networks_are_encoded_as_they_were_decoded(space: SearchSpace, genotypes: np.ndarray) -> None:
    for genotype in {tuple(row) for row in space.canonical_many(genotypes[::7]).tolist()}:
        assert space.encode(space.decode(genotype)) == genotype


def test_slots_hold_the_layers_of_pruned_networks(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    for genotype in space.sample_many(rng, 30).tolist():
        found = [layer for slot in space.slots() if (layer := slot.layer(tuple(genotype))) is not None]
        assert found == list(expand(space.decode(tuple(genotype))))
    assert {layer.key for layer in space.layers()} > {layer.key for layer in space.unpruned.layers()}


def test_smallest_and_largest_network_are_those_of_all(space: SearchSpace, genotypes: np.ndarray) -> None:
    macs = [total_macs(space.decode(tuple(row))) for row in genotypes.tolist()]
    assert total_macs(space.decode(space.smallest())) == min(macs)
    assert total_macs(space.decode(space.largest())) == max(macs)


def test_pruning_is_a_gene_of_its_stage(space: SearchSpace) -> None:
    gene = next(gene for gene in space.genes if gene.name == "a.prune")
    assert gene.choices == (0.0, 0.25, 0.5)
    assert not any(gene.name == "b.prune" for gene in space.genes)


def test_a_share_that_is_no_choice_prunes_every_network() -> None:
    space = space_from_plain(plain(prune=0.25, expansion=4), "pruned.yaml", 5)
    first = space.decode(space.smallest()).stages[0].blocks[0]
    assert (first.in_channels, first.expanded_channels) == (8, 24)


def test_space_without_pruning_is_what_it_was() -> None:
    without = space_from_plain(plain(), "pruned.yaml", 5)
    assert without.unpruned is without
    assert "prune" not in without.to_plain()["stages"][0]
    assert without.sha256 == space_from_plain(plain(prune=0), "pruned.yaml", 5).sha256


def test_fields_of_a_pruned_space_are_read_back(space: SearchSpace) -> None:
    assert space_from_plain(space.to_plain(), "again.yaml", 5) == space
    assert space.unpruned == space_from_plain(plain(), "pruned.yaml", 5)
    assert space.sha256 != space.unpruned.sha256


def test_network_that_is_pruned_otherwise_is_not_in_the_space(space: SearchSpace) -> None:
    other = space_from_plain(plain(prune=0.4), "other.yaml", 5)
    with pytest.raises(RecordError, match=r"stages\.0\.0: expanded channels: 19 is not in space pruned; allowed: "):
        space.encode(other.decode(other.largest()))


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (
            0.8,
            r"stages\[0\] \(a\): prune: 0.8 is out of range; expected a share of the expanded channels from 0 to 0.75",
        ),
        ("half", r"stages\[0\] \(a\): prune: expected a share of the expanded channels, got str 'half'"),
    ],
)
def test_share_that_does_not_fit_is_an_error(prune: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_from_plain(plain(prune=prune), "pruned.yaml", 5)


def test_pruning_alone_makes_no_space() -> None:
    data = plain(prune=[0, 0.5], width=8, depth=1, expansion=4)
    data["stages"] = data["stages"][:1]
    with pytest.raises(ConfigError, match=r"pruned.yaml: prune is the only choice; give another field two choices"):
        space_from_plain(data, "pruned.yaml", 5)
