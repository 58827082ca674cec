"""Genotypes, candidates, layers and files of a space agree with each other, in the space for 32 px and random ones."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nas.core.errors import ConfigError, RecordError
from nas.core.records import BLOCK_KINDS, KINDS_WITH_SE, Candidate, ExitConfig
from nas.core.walk import expand, total_macs
from nas.space.space import SearchSpace, load_space, space_from_plain
from nas.space.yamlio import dump_yaml, parse_yaml

SPACES = Path(__file__).parents[2] / "search_spaces"
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def some(*values: Any, most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


@st.composite
def space_data(draw: st.DrawFn, most: int = 3, max_stages: int = 3) -> dict[str, Any]:
    names = [f"s{i}" for i in range(1, draw(st.integers(1, max_stages)) + 1)]
    kinds = {name: draw(some(*BLOCK_KINDS, most=most)) for name in names}
    for choices in kinds.values():
        if not any(kind in KINDS_WITH_SE for kind in choices):  # whose choices below would be refused
            choices.append("inverted_residual")
    stages = [
        {
            "name": name,
            "kind": kinds[name],
            "width": draw(some(8, 12, 16, 24, most=most)),
            "depth": draw(some(1, 2, 3, most=most)),
            "stride": draw(st.sampled_from([1, 2])),
            "kernel_size": draw(some(1, 3, 5, most=most)),
            "expansion": draw(some(0.5, 1, 1.5, 2.3, 2.5, 4, most=most)),
            "use_se": draw(some(False, True, most=most)),
            "activation": draw(some("relu", "hard_swish", most=most)),
        }
        for name in names
    ]
    data = {
        "name": "random",
        "source": "made by a test",
        "resolution": draw(some(16, 20, 31, most=most)),
        "stem": {
            "channels": draw(some(4, 8, 12, most=most)),
            "activation": draw(some("relu", "hard_swish", most=most)),
        },
        "stages": stages,
        "head": {
            "conv_channels": draw(some(0, 8, 32, most=most)),
            "hidden_channels": draw(some(0, 8, most=most)),
        },
        "precision": {
            "choices": draw(some("fp32", "fp16", "int8", most=most)),
            "per": draw(st.sampled_from(["network", "stage"])),
        },
    }
    if len(names) > 1 and draw(st.booleans()):
        after = draw(some(*names[:-1], most=most))
        data["exits"] = {
            "after": after,
            "max_count": draw(st.integers(1, len(after))),
            "hidden_channels": draw(some(0, 8, most=most)),
            "conv_channels": draw(some(0, 12, most=most)),
            "thresholds": draw(st.one_of(st.none(), some(0.5, 0.8, 1.0, most=most))),
        }
    return data


def space_of(data: dict[str, Any]) -> SearchSpace:
    try:
        return space_from_plain(data, "random.yaml", 5)
    except ConfigError as e:
        assume("holds one network only" not in str(e))
        raise


def all_genotypes(space: SearchSpace) -> list[tuple[int, ...]]:
    product = itertools.product(*(range(n) for n in space.gene_sizes))
    return list(dict.fromkeys(space.canonical(genotype) for genotype in product))


@pytest.fixture(scope="module")
def tiny() -> SearchSpace:
    return load_space(SPACES / "tiny-32.yaml", 10)


@QUICK
@given(space_data(), st.integers(0, 2**32 - 1))
def test_genotypes_and_candidates_map_to_each_other(data: dict[str, Any], seed: int) -> None:
    space = space_of(data)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, space.gene_sizes, size=(20, len(space.genes)))
    for row, canonical in zip(raw.tolist(), space.canonical_many(raw).tolist(), strict=True):
        candidate = space.decode(row)
        assert space.encode(candidate) == space.canonical(row) == tuple(canonical)
        assert space.canonical(canonical) == tuple(canonical)
        assert space.decode(canonical) == candidate
        assert space.contains(candidate)


@QUICK
@given(space_data(), st.integers(0, 2**32 - 1))
def test_slots_give_the_layers_of_the_walk(data: dict[str, Any], seed: int) -> None:
    space = space_of(data)
    rows = set(space.layers())
    genotypes = space.sample_many(np.random.default_rng(seed), 30)
    by_slot = []
    for slot in space.slots():
        columns = tuple(genotypes[:, gene] for gene in slot.genes)
        by_slot.append([slot.layers[i] for i in np.ravel_multi_index(columns, slot.shape)])
    for n, genotype in enumerate(genotypes.tolist()):
        expected = expand(space.decode(genotype))
        assert tuple(layers[n] for layers in by_slot if layers[n] is not None) == expected
        assert tuple(layer for slot in space.slots() if (layer := slot.layer(genotype)) is not None) == expected
        assert rows.issuperset(expected)


@QUICK
@given(space_data(most=2, max_stages=2))
def test_rows_and_extremes_equal_an_enumeration_of_the_space(data: dict[str, Any]) -> None:
    space = space_of(data)
    assume(space.size <= 1500)
    candidates = [space.decode(genotype) for genotype in all_genotypes(space)]
    assert len({candidate.id for candidate in candidates}) == len(candidates)
    assert set(space.layers()) == {layer for candidate in candidates for layer in expand(candidate)}
    assert len(space.layers()) == len(set(space.layers()))
    macs = [total_macs(candidate) for candidate in candidates]
    assert total_macs(space.decode(space.smallest())) == min(macs)
    assert total_macs(space.decode(space.largest())) == max(macs)


@QUICK
@given(space_data(), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_the_earliest_exits_are_put_into_a_network_that_stays_as_it_is(
    data: dict[str, Any], seed: int, most: int
) -> None:
    space = space_of(data)
    genotype = tuple(space.sample_many(np.random.default_rng(seed), 1)[0].tolist())
    before, after = space.decode(genotype), space.decode(space.with_earliest_exits(genotype, most))
    assert replace(after, exits=()) == replace(before, exits=())
    assert [e.after_stage for e in after.exits] == [place.after_stage for place in space.layout.exits][
        : min(most, space.exits.max_count)
    ]


@QUICK
@given(space_data())
def test_a_stored_space_reads_back_equal(data: dict[str, Any]) -> None:
    space = space_of(data)
    again = space_from_plain(parse_yaml(dump_yaml(space.to_plain()), "stored.yaml"), "stored.yaml", 5)
    assert again == space
    assert again.sha256 == space.sha256


def test_hash_follows_the_choices_and_classes_and_neither_name_nor_order(tiny: SearchSpace) -> None:
    plain = tiny.to_plain()
    renamed = plain | {"name": "other", "source": "elsewhere", "stages": [dict(s) for s in plain["stages"]]}
    renamed["stages"][1]["kernel_size"] = [5, 3]
    assert space_from_plain(renamed, "x", 10).sha256 == tiny.sha256
    renamed["stages"][1]["kernel_size"] = [3, 5, 7]
    assert space_from_plain(renamed, "x", 10).sha256 != tiny.sha256
    assert space_from_plain(plain, "x", 11).sha256 != tiny.sha256


def test_samples_differ_by_seed_and_repeat_with_it(tiny: SearchSpace) -> None:
    first = tiny.sample_many(np.random.default_rng(3), 50)
    assert (first == tiny.sample_many(np.random.default_rng(3), 50)).all()
    assert (first != tiny.sample_many(np.random.default_rng(4), 50)).any()
    assert len({tuple(row) for row in first.tolist()}) == 50
    assert tiny.sample(np.random.default_rng(3)) == tuple(tiny.sample_many(np.random.default_rng(3), 1)[0])


def test_every_gene_choice_is_sampled_and_no_sample_has_too_many_exits(tiny: SearchSpace) -> None:
    genotypes = tiny.sample_many(np.random.default_rng(0), 2000)
    for gene, column in zip(tiny.genes, genotypes.T, strict=True):
        assert set(column.tolist()) == set(range(len(gene.choices))), gene.name
    assert max(len(tiny.decode(g).exits) for g in genotypes[:200].tolist()) == tiny.exits.max_count == 2


def test_exits_beyond_the_allowed_number_are_dropped_from_the_back(tiny: SearchSpace) -> None:
    space = replace(tiny, exits=replace(tiny.exits, max_count=1))
    names = [gene.name for gene in space.genes]
    genotype = [0] * len(names)
    for name in ("exits.s2", "exits.s3", "exits.s3.threshold"):
        genotype[names.index(name)] = 1
    assert [e.after_stage for e in space.decode(genotype).exits] == [1]
    assert space.canonical(genotype)[names.index("exits.s3.threshold")] == 0


def test_expansion_one_has_no_expanding_convolution_whatever_the_width() -> None:
    stage = {"name": "a", "width": 12, "depth": 2, "stride": 1, "kernel_size": [3, 5], "expansion": 1}
    data = {"name": "n", "source": "s", "resolution": 16, "stem": {"channels": 12, "activation": "relu"}}
    space = space_from_plain(data | {"stages": [stage | {"activation": "relu"}]}, "x.yaml", 5)
    assert [layer.has_expand for layer in expand(space.decode(space.largest()))] == [False] * 4


def mixed_stage(**fields: Any) -> dict[str, Any]:
    """A space of one stage; SE and two expansions where the kinds have them."""
    stage = {"name": "a", "width": [16, 24], "depth": 2, "stride": 1, "kernel_size": 3, "activation": "relu", **fields}
    data = {"name": "n", "source": "s", "resolution": 16, "stem": {"channels": 8, "activation": "relu"}}
    return data | {"stages": [stage]}


def test_a_choice_that_a_kind_does_not_have_is_no_second_network() -> None:
    kinds = ["depthwise_separable", "attention", "inverted_residual"]
    space = space_of(mixed_stage(kind=kinds, expansion=[2, 3], use_se=[False, True]))
    sizes = {kind: 0 for kind in kinds}
    for genotype in all_genotypes(space):
        sizes[space.decode(genotype).stages[0].blocks[0].kind] += 1
    assert sizes == {"inverted_residual": 2 * 2 * 2**2, "attention": 2 * 2**2, "depthwise_separable": 2}


def test_a_stage_of_one_kind_needs_no_field_that_the_kind_ignores() -> None:
    space = space_of(mixed_stage(kind="depthwise_separable"))
    assert [block.expanded_channels for block in space.decode(space.smallest()).stages[0].blocks] == [8, 16]
    with pytest.raises(ConfigError, match=r"stages\[0\] \(a\): expansion: kind depthwise_separable does not expand"):
        space_from_plain(mixed_stage(kind="depthwise_separable", expansion=[2, 3]), "x", 5)
    with pytest.raises(ConfigError, match="prune: needs a stage of one kind that expands"):
        space_from_plain(mixed_stage(kind=["attention", "mlp"], expansion=2, prune=[0, 0.5]), "x", 5)
    with pytest.raises(ConfigError, match="use_se: kind mlp, attention has no squeeze-and-excitation; leave it out"):
        space_from_plain(mixed_stage(kind=["attention", "mlp"], expansion=2, use_se=True), "x", 5)


def test_attention_where_maps_are_large_is_refused_with_the_resolution() -> None:
    data = mixed_stage(kind=["inverted_residual", "attention"], expansion=2) | {"resolution": [32, 64]}
    with pytest.raises(
        ConfigError, match=r"x: resolution: 64 px does not fit: stages\.0\.0: attention on a map of 32 px"
    ):
        space_from_plain(data, "x", 5)


def test_a_space_without_kinds_keeps_its_hash(tiny: SearchSpace) -> None:
    assert tiny.sha256.startswith("e3024e4517f8a14c")
    assert "kind" not in tiny.to_plain()["stages"][0]


def test_restricting_precisions_drops_the_rest_and_says_so(tiny: SearchSpace) -> None:
    space = tiny.restricted(("fp32", "fp16"))
    assert space.precisions == ("fp32",)
    assert space.dropped == ("int8",)
    assert not any(gene.name == "precision" for gene in space.genes)
    assert space.sha256 != tiny.sha256
    assert {layer.precision for layer in space.layers()} == {"fp32"}
    assert tiny.restricted(("int8", "fp32")) is tiny
    with pytest.raises(ConfigError, match=r"none of fp32, int8 runs on this device; it offers fp16"):
        tiny.restricted(("fp16",))


def test_layers_can_be_asked_for_one_precision(tiny: SearchSpace) -> None:
    fp32, int8 = tiny.layers(("fp32",)), tiny.layers(("int8",))
    assert {layer.precision for layer in fp32} == {"fp32"}
    assert len(fp32) == len(int8)
    assert set(tiny.layers()) == {*fp32, *int8}
    assert len({layer.key for layer in fp32}) == len(fp32)


def changed(candidate: Candidate, what: str) -> Candidate:
    stages = list(candidate.stages)
    blocks = list(stages[2].blocks)
    if what == "kernel":
        blocks[0] = replace(blocks[0], kernel_size=9)
    if what == "expansion":
        blocks[0] = replace(blocks[0], expanded_channels=17)
    if what == "stride":
        blocks[0] = replace(blocks[0], stride=1)
    if what == "se":
        blocks[1] = replace(blocks[1], use_se=not blocks[1].use_se)
    stages[2] = replace(stages[2], blocks=tuple(blocks))
    return replace(candidate, stages=tuple(stages))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("kernel", r"stages\.2\.0: kernel_size: 9 is not in space tiny-32; allowed: 3, 5"),
        ("expansion", r"stages\.2\.0: expanded channels: 17 is not in space tiny-32; allowed: \d+, \d+, \d+"),
        ("stride", r"stages\.2\.0: not in space tiny-32: BlockConfig\(.*stride=1.*; the closest there: .*stride=2"),
        ("se", r"stages\.2\.1: not in space tiny-32"),
    ],
)
def test_a_block_outside_the_space_is_named(tiny: SearchSpace, what: str, message: str) -> None:
    candidate = changed(tiny.decode(tiny.largest()), what)
    assert not tiny.contains(candidate)
    with pytest.raises(RecordError, match=message):
        tiny.encode(candidate)


def test_other_parts_outside_the_space_are_named(tiny: SearchSpace) -> None:
    candidate = tiny.decode(tiny.smallest())
    for other, message in (
        (replace(candidate, resolution=33), r"resolution: 33 is not in space tiny-32; allowed: 32"),
        (replace(candidate, num_classes=9), r"num_classes: not in space tiny-32: 9; the closest there: 10"),
        (replace(candidate, stages=candidate.stages[:3]), r"3 stages are given; space tiny-32 has 4"),
        (candidate.with_precision("fp16"), r"stem: precision: fp16 is not in space tiny-32; allowed: fp32, int8"),
        (replace(candidate, exits=(ExitConfig(1, 0, 0.55),)), r"exits\.0: threshold: 0\.55 is not in space"),
        (replace(candidate, exits=(ExitConfig(1, 16, 0.5),)), r"exits\.0: hidden_channels: 16 is not in space"),
        (replace(candidate, exits=(ExitConfig(1, 0, 0.5, 8),)), r"exits\.0: conv_channels: 8 is not in space"),
        (
            replace(candidate, exits=(ExitConfig(0, 0, 0.5),)),
            r"exits\.0: an exit after stage 0 is not in space tiny-32; allowed: s2, s3",
        ),
    ):
        with pytest.raises(RecordError, match=message):
            tiny.encode(other)


def test_a_wrong_genotype_is_refused(tiny: SearchSpace) -> None:
    good = list(tiny.smallest())
    with pytest.raises(RecordError, match=r"genotype of 3 genes; space tiny-32 has 26"):
        tiny.decode((0, 0, 0))
    index = [gene.name for gene in tiny.genes].index("s3.depth")
    for value in (2, -1):
        with pytest.raises(RecordError, match=rf"gene s3\.depth: index {value}; allowed: 0 to 1"):
            tiny.decode([*good[:index], value, *good[index + 1 :]])


def test_a_copy_for_another_process_leaves_derived_tables_behind(tiny: SearchSpace) -> None:
    tiny.slots()
    data = pickle.dumps(tiny)
    assert len(data) < 4000
    assert pickle.loads(data).smallest() == tiny.smallest()


def test_more_exits_than_allowed_are_refused(tiny: SearchSpace) -> None:
    space = replace(tiny, exits=replace(tiny.exits, max_count=1))
    candidate = replace(tiny.decode(tiny.smallest()), exits=(ExitConfig(1, 0, 0.5), ExitConfig(2, 0, 0.5)))
    with pytest.raises(RecordError, match=r"2 exits are given; space tiny-32 allows 1"):
        space.encode(candidate)
