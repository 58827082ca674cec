"""A score is two files, whole or absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nas.core.errors import RecordError, StorageError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import DIALECTS
from nas.export.graph import random_weights
from nas.recipe.deployed import calibrated, deployed_logits
from nas.recipe.records import ScoredStudent, read_logits, read_scored, soft_top1, write_scored

LABELS = np.array([0, 1, 2, 0])


@pytest.fixture
def candidate() -> Candidate:
    stages = (StageConfig((BlockConfig(4, 8, 4),)), StageConfig((BlockConfig(4, 8, 8),)))
    return Candidate(8, 3, StemConfig(4), stages, HeadConfig(), (ExitConfig(0),))


def _logits() -> np.ndarray:
    logits = np.zeros((2, 4, 3), dtype=np.float32)
    logits[0, :, 0] = 1.0  # the exit always says class 0: right twice
    logits[1, np.arange(4), LABELS] = 1.0  # the head is right
    return logits


def test_score_is_read_back_with_its_logits(tmp_path: Path, candidate: Candidate) -> None:
    scored = write_scored(tmp_path, candidate, epochs=3, cost_s=1.5, logits=_logits(), labels=LABELS)
    assert scored == ScoredStudent(candidate.arch_id, 3, 1.5, (0.5, 1.0), "score-e0003.npy", scored.soft_top1)
    assert scored.score == pytest.approx(np.e / (np.e + 2))
    assert read_scored(tmp_path) == scored
    assert np.array_equal(read_logits(tmp_path, scored), _logits())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["score-e0003.npy", "score.json"]


def test_answers_in_fp32_are_the_same_in_every_dialect_and_those_in_int8_are_not(candidate: Candidate) -> None:
    """So that files of fp32 are `FLOAT_FILES`."""
    images = np.random.default_rng(0).integers(0, 255, (64, 8, 8, 3), dtype=np.uint8)
    weights, of_images = random_weights(candidate, 0), ((0.5,) * 3, (0.25,) * 3)
    quant = calibrated(candidate, weights, *of_images, images, run_model)
    for precision, is_same in (("fp32", True), ("int8", False)):
        network = candidate.with_precision(precision)
        each = [deployed_logits(network, weights, quant, *of_images, images, d) for d in DIALECTS]
        assert all(np.array_equal(each[0], other) == is_same for other in each[1:])


def test_missing_score_is_none_and_names_are_kept_apart(tmp_path: Path, candidate: Candidate) -> None:
    write_scored(tmp_path, candidate, epochs=3, cost_s=1.5, logits=_logits(), labels=LABELS, name="final")
    assert read_scored(tmp_path) is None
    assert read_scored(tmp_path, "final") is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:1], r"logits must be \[2, 4, classes\], got \[1, 4, 3\]"),
        (lambda a: a[:, :3], r"logits must be \[2, 4, classes\], got \[2, 3, 3\]"),
        (lambda a: a * np.nan, "logits are not finite; the training diverged"),
    ],
)
def test_logits_that_do_not_fit_are_refused(tmp_path: Path, candidate: Candidate, change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(RecordError, match=message):
        write_scored(tmp_path, candidate, epochs=1, cost_s=0.0, logits=change(_logits()), labels=LABELS)
    assert read_scored(tmp_path) is None


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_damaged_logits_say_what_to_delete(tmp_path: Path, candidate: Candidate, damage: bytes | None) -> None:
    scored = write_scored(tmp_path, candidate, epochs=1, cost_s=0.0, logits=_logits(), labels=LABELS)
    file = tmp_path / scored.logits_file
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    with pytest.raises(StorageError, match=r"score-e0001\.npy: cannot be read: .* Delete the folder"):
        read_logits(tmp_path, scored)


def test_record_cannot_point_out_of_its_folder() -> None:
    with pytest.raises(RecordError, match="logits_file must be a plain file name"):
        ScoredStudent("a0", 1, 0.0, (0.5,), "../x.npy")


def test_soft_accuracy_counts_right_answers_with_their_certainty() -> None:
    labels = np.array([0, 1, 1])
    sure = np.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]], np.float32)
    assert soft_top1(100 * sure, labels) == pytest.approx(2 / 3)
    chances = np.array([[0.9, 0.1], [0.4, 0.6], [0.55, 0.45]])
    assert soft_top1(np.log(chances).astype(np.float32), labels) == pytest.approx((0.9 + 0.6 + 0.45) / 3)
    assert soft_top1(np.full((3, 4), 700.0, np.float32), labels) == pytest.approx(0.25)


def test_a_score_from_before_there_was_a_soft_accuracy_is_the_share_of_right_answers() -> None:
    old = ScoredStudent("a", 1, 0.0, (0.5, 0.75), "a.npy")
    assert old.score == 0.75
    assert replace(old, soft_top1=0.7).score == 0.7
