"""What each part of a student loses in each precision: only that part is changed, and the losses are those measured."""

# ruff: noqa: F811 - fixtures of the scores are taken by name
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_score import (  # noqa: F401
    IMAGES,
    candidate,
    context,
    context_file,
    dataset,
    folder,
    inherited,
    job,
    space,
    supernet,
)

from nas.core.errors import RecordError
from nas.core.jsonio import read_record
from nas.core.records import Precision, QuantSpec
from nas.data import evenly
from nas.devices.onnxruntime_cpu import run_model
from nas.export.graph import random_weights
from nas.recipe import score as scoring
from nas.recipe.context import Context
from nas.recipe.deployed import calibrated, deployed_logits
from nas.recipe.records import read_logits
from nas.recipe.score import ScoreJob, candidate_sensitivity, score
from nas.recipe.sensitivity import Sensitivity, divergence, sensitivity

BOTH: tuple[Precision, ...] = ("fp32", "int8")


def test_divergence_is_that_of_the_textbook() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    logits = [np.log(x).astype(np.float32)[None, None] + 3 for x in (p, q)]
    assert divergence(*logits) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)
    assert divergence(logits[0], logits[0]) == 0.0


def test_each_part_is_tried_alone(context: Context) -> None:
    network = candidate()
    weights = random_weights(network, 0)
    sample = evenly(context.sample, IMAGES)
    quant = calibrated(network, weights, context.mean, context.std, sample, run_model)
    table = sensitivity(network, weights, quant, context.mean, context.std, context.val, BOTH)
    assert (table.choices, table.images, len(table.loss)) == (BOTH, 40, 4)
    assert all(row[0] == 0.0 and row[1] > 0.0 for row in table.loss)

    def answers(names: tuple[Precision, ...]) -> np.ndarray:
        mix = network.with_precision(names)
        return deployed_logits(mix, weights, quant, context.mean, context.std, context.val)

    alone = divergence(answers(("fp32",) * 4), answers(("fp32", "fp32", "int8", "fp32")))
    assert table.loss[2][1] == alone
    assert table.of(("int8", "fp32", "int8", "fp32")) == pytest.approx(table.loss[0][1] + alone)


def test_table_with_rows_of_another_length_is_refused() -> None:
    with pytest.raises(RecordError, match="every part needs 2 losses"):
        Sensitivity(BOTH, ((0.0,),), 1)


def test_ranges_and_student_are_made_once_for_all_precisions_of_an_architecture(
    inherited: ScoreJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for name in ("calibrated", "_inherited"):
        own = getattr(scoring, name)

        def counted(*args: object, own: object = own, name: str = name) -> object:
            made.append(name)
            return own(*args)  # type: ignore[operator]

        monkeypatch.setattr(scoring, name, counted)
    architecture = inherited.candidate
    mixed: tuple[Precision, ...] = ("fp32", *("int8",) * (len(architecture.precisions) - 1))
    for names in (("int8",) * len(mixed), mixed):
        score(replace(inherited, candidate=architecture.with_precision(names)))
    candidate_sensitivity(inherited, BOTH)
    assert sorted(made) == ["_inherited", "calibrated"]


def test_the_score_of_a_precision_does_not_depend_on_which_was_scored_before(
    inherited: ScoreJob, tmp_path: Path
) -> None:
    first = replace(inherited, candidate=inherited.candidate.with_precision("int8"))
    after = replace(first, students=str(tmp_path / "other"))
    score(replace(after, candidate=first.candidate.with_precision("fp32")))
    found = [read_logits(folder(j), score(j)) for j in (first, after)]
    np.testing.assert_array_equal(*found)
    kept = [read_record(QuantSpec, p) for j in (first, after) for p in folder(j).glob("ranges-*.json")]
    assert len(kept) == 2 and kept[0] == kept[1]
