"""Genotypes, candidates and layers of a space agree with each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nas.core.walk import expand
from nas.space.space import SearchSpace, load_space

SPACES = Path(__file__).parents[2] / "search_spaces"


@pytest.fixture(scope="module")
def tiny() -> SearchSpace:
    return load_space(SPACES / "tiny-32.yaml", 10)


def test_encoding_a_decoded_genotype_gives_its_canonical_form(tiny: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    for row in rng.integers(0, tiny.gene_sizes, size=(100, len(tiny.genes))):
        candidate = tiny.decode(row.tolist())
        assert tiny.encode(candidate) == tiny.canonical(row.tolist())
        assert tiny.decode(tiny.encode(candidate)) == candidate


def test_slots_give_the_layers_of_the_walk(tiny: SearchSpace) -> None:
    for row in tiny.sample_many(np.random.default_rng(1), 100):
        genotype = tuple(row.tolist())
        layers = [layer for slot in tiny.slots() if (layer := slot.layer(genotype)) is not None]
        assert tuple(layers) == expand(tiny.decode(genotype))
