"""Precision chosen by the tool: seeds of the study, mixes of the finalists, the charge for changes of precision."""

# ruff: noqa: F811 - fixtures of the rounds are taken by name
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_examples import SPACE, Notes, Prepared
from test_rounds import ScriptedPool, make, tables  # noqa: F401

from nas.core.records import Candidate, Precision
from nas.devices.base import MeasureJob
from nas.latency.precision import assignments
from nas.recipe.finish import finished_logits
from nas.recipe.sensitivity import Sensitivity, keep_sensitivity
from nas.search import precision as chooser
from nas.search.finals import finish
from nas.search.precision import EVENT, MIXED_NETWORKS, all_mixes, chosen_mixes, measure_mixes
from nas.search.rounds import SearchParts, run_rounds
from nas.search.settings import FinishSettings
from nas.space.choices import PrecisionChoices
from nas.space.space import SearchSpace, space_from_plain
from nas.space.yamlio import parse_yaml
from nas.testing import SimulatedDevice
from nas.train.settings import DistillSettings

BOTH: tuple[Precision, ...] = ("fp32", "int8")
Make = Callable[..., SearchParts]


class Choosy(SimulatedDevice):
    """int8 is slow in the stem and fast everywhere else; a change of precision costs nothing."""

    def latency_ms(self, job: MeasureJob) -> float:
        if job.kind == "overhead":
            return super().latency_ms(job)
        macs_per_ms = 1e5 if job.precision != "int8" else 2e4 if job.key.startswith("stem") else 4e5
        return 0.003 + job.macs / macs_per_ms


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The space of the rounds' tests."""
    return space_from_plain(parse_yaml(SPACE, "space"), "space", 4)


@pytest.fixture
def choosy(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchParts:
    """Parts for a device with another table than the prepared one: only the rows of a test are measured."""
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", 0)
    (tmp_path / "tables").mkdir()
    return prepared.parts(tmp_path, device=Choosy(), ms=10.0)


def table_of(candidate: Candidate) -> Sensitivity:
    """The stem loses the most."""
    return Sensitivity(BOTH, tuple((0.0, 9.0 if i == 0 else 1.0) for i in range(len(candidate.precisions))), 8)


def test_second_batch_has_solved_precisions_of_the_best_architectures(
    make: Make, space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser, "candidate_sensitivity", lambda job, _: table_of(job.candidate))
    mixed = replace(space, precision=PrecisionChoices(BOTH, "stage"))
    parts = make(ScriptedPool(), space=mixed, trials=12, rounds=1, batch=6, precision_seeds=2)
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


def test_a_finalist_is_tried_in_the_mixes_that_are_solved_for(choosy: SearchParts) -> None:
    parts = choosy
    candidate = a_network(parts)
    assert chosen_mixes(parts, candidate, 3) == []  # its sensitivity is not known
    keep_sensitivity(parts.folder.student(candidate.arch_id), table_of(candidate))
    found = chosen_mixes(parts, candidate, 3)
    solved = assignments(candidate, BOTH, parts.predictor.table, None, np.array(table_of(candidate).loss))
    assert found == solved.ladder(3, [10.0], parts.budget.margin_std)
    assert found[0] == ("fp32", *("int8",) * (len(candidate.precisions) - 1))
    assert chosen_mixes(parts, candidate, 0) == []


def test_mixed_networks_are_measured_once_before_mixes_are_chosen(choosy: SearchParts) -> None:
    parts = choosy
    rng = np.random.default_rng(0)
    candidates = list({parts.space.decode(parts.space.sample(rng)).architecture: None for _ in range(20)})
    for _ in range(2):
        measure_mixes(parts, candidates)
    mixed = [n for n in parts.predictor.table.networks.values() if n.candidate.precision_label == "mixed"]
    assert len(mixed) == MIXED_NETWORKS
    (event,) = [e for e in parts.folder.events() if e.kind == EVENT]
    assert len(event.pairs) == len(mixed)


def test_finalists_in_solved_mixes_have_their_answers(choosy: SearchParts) -> None:
    distill = DistillSettings(epochs=1, variants=2, batch_size=20, recalibration_images=20)
    settings = FinishSettings(students=1, calibration_images=16, precision_ladder=2)
    (student,), failed = finish(choosy, [a_network(choosy)], distill, settings)
    assert failed == []
    mixes = all_mixes(choosy, [student], settings)[student.candidate.arch_id]
    assert mixes and all(len(set(names)) == 2 for names in mixes)
    folder = choosy.folder.student(student.candidate.arch_id)
    for names in mixes:
        assert finished_logits(folder, "val", names).shape == finished_logits(folder, "val", ("fp32",)).shape
