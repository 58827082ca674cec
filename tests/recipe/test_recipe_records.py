"""A score is two files, whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nas.core.errors import RecordError, StorageError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.recipe.records import ScoredStudent, read_logits, read_scored, write_scored

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
    assert scored == ScoredStudent(candidate.arch_id, 3, 1.5, (0.5, 1.0), "score-e0003.npy")
    assert read_scored(tmp_path) == scored
    assert np.array_equal(read_logits(tmp_path, scored), _logits())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["score-e0003.npy", "score.json"]


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
