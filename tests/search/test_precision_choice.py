"""Precision chosen by the tool: seeds of the study, mixes of the finalists, the charge for changes of precision."""

# ruff: noqa: F811 - fixtures of the rounds are taken by name
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from search_examples import Notes, Prepared
from test_rounds import ScriptedPool, make, tables  # noqa: F401

from nas.core.records import Candidate, Precision
from nas.latency.precision import assignments
from nas.recipe.sensitivity import Sensitivity, keep_sensitivity
from nas.search import precision as chooser
from nas.search.precision import EVENT, MIXED_NETWORKS, all_mixes, chosen_mixes, measure_mixes, mixable
from nas.search.rounds import SearchParts, run_rounds
from nas.search.settings import FinishSettings
from nas.space.choices import PrecisionChoices

BOTH: tuple[Precision, ...] = ("fp32", "int8")
Make = Callable[..., SearchParts]


def per_stage(parts: SearchParts) -> SearchParts:
    """The same with a precision for each part; the rows are those of the space with one for all."""
    space = replace(parts.space, precision=PrecisionChoices(BOTH, "stage"))
    predictor = parts.predictor
    made = type(predictor)(space, predictor.table, predictor.device, parts.reporter)
    return replace(parts, space=space, predictor=made)


def table_of(candidate: Candidate) -> Sensitivity:
    """The stem loses the most."""
    return Sensitivity(BOTH, tuple((0.0, 9.0 if i == 0 else 1.0) for i in range(len(candidate.precisions))), 8)


def test_second_batch_has_solved_precisions_of_the_best_architectures(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser, "candidate_sensitivity", lambda job, _: table_of(job.candidate))
    parts = per_stage(make(ScriptedPool(), trials=12, rounds=1, batch=6, precision_seeds=2))
    run_rounds(parts)
    first, second, *_ = parts.folder.batches()
    seeds = [g for g, name in zip(second.genotypes, second.proposers, strict=True) if name == "precision"]
    assert 1 <= len(seeds) <= 2
    scored = {parts.space.decode(g).arch_id for g in first.genotypes}
    for genotype in seeds:
        seed = parts.space.decode(genotype)
        assert seed.arch_id in scored
        assert genotype not in first.genotypes
        solved = assignments(seed, BOTH, parts.predictor.table, None, np.array(table_of(seed).loss))
        wanted = (solved.cheapest_within(parts.budget.ms, 1.0), solved.fastest(1.0))
        assert seed.precisions in [solved.precisions(i) for i in wanted if i is not None]
    worst, std = parts.predictor.worst(seeds)
    assert (worst + std <= parts.budget.ms).all()


def test_space_with_one_precision_for_all_says_that_seeds_are_not_used(make: Make) -> None:
    notes = Notes()
    run_rounds(make(ScriptedPool(), notes=notes, trials=4, rounds=1, batch=4, precision_seeds=2))
    assert any(w.startswith("search.precision_seeds: not used") and "per: stage" in w for w in notes.warned)


def a_network(parts: SearchParts) -> Candidate:
    return parts.space.decode(parts.space.largest()).architecture


def test_a_finalist_is_tried_in_the_mixes_that_are_solved_for_and_in_those_that_were_scored(
    prepared: Prepared, tmp_path: object
) -> None:
    parts = prepared.parts(tmp_path, ms=10.0)  # type: ignore[arg-type]
    candidate = a_network(parts)
    assert chosen_mixes(parts, candidate, 3) == []  # its sensitivity is not known
    keep_sensitivity(parts.folder.student(candidate.arch_id), table_of(candidate))
    found = chosen_mixes(parts, candidate, 3)
    solved = assignments(candidate, BOTH, parts.predictor.table, None, np.array(table_of(candidate).loss))
    assert found == solved.ladder(3, [10.0], parts.budget.margin_std)
    assert found
    assert chosen_mixes(parts, candidate, 0) == []


def test_mixed_networks_are_measured_once_before_mixes_are_chosen(prepared: Prepared, tmp_path: object) -> None:
    parts = prepared.parts(tmp_path, ms=10.0)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    candidates = list({parts.space.decode(parts.space.sample(rng)).architecture: None for _ in range(20)})
    for _ in range(2):
        measure_mixes(parts, candidates)
    mixed = [n for n in parts.predictor.table.networks.values() if n.candidate.precision_label == "mixed"]
    assert 1 <= len(mixed) <= MIXED_NETWORKS
    (event,) = [e for e in parts.folder.events() if e.kind == EVENT]
    assert len(event.pairs) == len(mixed)
    limited = replace(parts, feedback=replace(parts.feedback, max_engines=0))
    assert limited.feedback.within(MIXED_NETWORKS, 0) == 0


def test_precisions_that_one_graph_cannot_mix_are_left_out(prepared: Prepared, tmp_path: object) -> None:
    parts = prepared.parts(tmp_path, ms=10.0)  # type: ignore[arg-type]
    assert mixable(parts) == BOTH
    assert all_mixes(parts, [], FinishSettings()) == {}
