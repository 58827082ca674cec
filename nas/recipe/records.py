"""What a scorer gives for one candidate, and its two files: a JSON record and the logits it was computed from.

The logits are written first and the record last, each atomically, so a record that exists is whole after any kill.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nas.core.errors import RecordError, StorageError
from nas.core.jsonio import read_record, write_bytes, write_record
from nas.core.records import Candidate
from nas.core.run import FinishStep

# Files of a finished student, in its folder.
WEIGHTS_FILE = "weights.safetensors"
QUANT_FILE = "quant.json"
RECORD_FILE = "finished.json"
SENSITIVITY_FILE = "sensitivity.json"
PARENT = "parent-"  # before the names of a parent's files, in the folder of the student that is cut from it
# Patterns of what finishing writes into a student's folder, the record first.
FINISHED_FILES = (
    *(RECORD_FILE, "final-*", QUANT_FILE, "quant-*.json", WEIGHTS_FILE, "weights-*.safetensors", "confidence-*.json"),
    *(SENSITIVITY_FILE, "importance-*", "robustness-*.json", "finish.ckpt", "qat-*.ckpt", "prune-*.ckpt"),
)
# Patterns of what says the same whatever dialect the graphs of a device are written in: float weights and what is
# computed of them alone, ranges of tensors, answers in fp32. `finished.json` does `as_distilled`.
FLOAT_FILES = (
    *("score-*.ckpt", "ranges-*.json", "supernet-*-fp32.json", "supernet-*-fp32-e*.npy"),
    *("standalone-*-fp32.json", "standalone-*-fp32-e*.npy", "final-*-fp32.json", "final-*-fp32-e*.npy"),
    *(RECORD_FILE, WEIGHTS_FILE, QUANT_FILE, "confidence-fp32.json", "importance-*", "finish.ckpt", "prune-*.ckpt"),
    f"{PARENT}*",
)


@dataclass(frozen=True, slots=True)
class FinishedStudent:
    """A student distilled in full. Its files: weights with batch norm folded in, int8 ranges, logits per precision.

    `epochs` are those of the distillation, `cost_s` the CPU seconds of all its training; `steps` what it went through,
    in order. `parent` is the `arch_id` of the finished student that it was cut from, and `pruning` says how; both are
    empty where it was distilled from new weights.
    """

    schema: int
    candidate: Candidate
    epochs: int
    cost_s: float
    steps: tuple[FinishStep, ...] = ()
    parent: str = ""
    pruning: str = ""

    def as_distilled(self) -> FinishedStudent:
        """The record as it was before the student was deployed in any precision but fp32."""
        later = [step for step in self.steps if step.precision]
        steps = tuple(step for step in self.steps if not step.precision)
        return replace(self, steps=steps, cost_s=self.cost_s - sum(step.cpu_s for step in later))


@dataclass(frozen=True, slots=True)
class ScoredStudent:
    """One candidate after some training.

    `epochs` counts own training (0: inherited weights only); `cost_s` is processor seconds spent on this score;
    `top1` is the share of right answers per exit, head last; `soft_top1` that of `soft_top1`, of the head, None in a
    record from before there was one; `logits_file` lies beside the record and holds
    float32 [E, N, K] on the search validation split.
    """

    arch_id: str
    epochs: int
    cost_s: float
    top1: tuple[float, ...]
    logits_file: str
    soft_top1: float | None = None

    @property
    def score(self) -> float:
        """What students are ranked by."""
        return self.top1[-1] if self.soft_top1 is None else self.soft_top1

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise RecordError(f"scored student {self.arch_id}: epochs must not be negative, got {self.epochs}")
        if self.cost_s < 0:
            raise RecordError(f"scored student {self.arch_id}: cost_s must not be negative, got {self.cost_s}")
        if not self.top1 or not all(0 <= value <= 1 for value in self.top1):
            raise RecordError(f"scored student {self.arch_id}: top1 needs a share 0-1 per exit, got {self.top1}")
        if Path(self.logits_file).name != self.logits_file:
            raise RecordError(
                f"scored student {self.arch_id}: logits_file must be a plain file name, got {self.logits_file!r}"
            )


def top1_per_exit(logits: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """Share of right answers of every exit; logits [E, N, K], labels [N]."""
    return tuple(float(share) for share in (logits.argmax(axis=2) == labels[None]).mean(axis=1))


def soft_top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean probability of the right label: right answers counted with their certainty; logits [N, K], labels [N].

    Every image says how near to right a student is, not only on which side of the border it is. Of 24 half-trained
    students it gave the order in which they end with a rank correlation of 0.80, the share of right answers of 0.71.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chance = np.exp(wide)
    return float((chance[np.arange(len(labels)), labels] / chance.sum(axis=1)).mean())


def write_scored(
    folder: Path,
    candidate: Candidate,
    *,
    epochs: int,
    cost_s: float,
    logits: np.ndarray,
    labels: np.ndarray,
    name: str = "score",
) -> ScoredStudent:
    """Writes `<name>.json` and `<name>-e<epochs>.npy` into a student's folder; gives the record.

    Args:
        folder: run_dir/students/<arch_id>, made when missing.
        candidate: what was scored; only its `arch_id` is kept.
        epochs: epochs of own training.
        cost_s: processor seconds spent.
        logits: float32 [E, N, K] on the search validation split.
        labels: [N].
        name: several scores of one student live side by side, such as `score` and `final`.

    Raises:
        RecordError: logits of another shape or not finite.
        StorageError: the files cannot be written.
    """
    exits = len(candidate.exits) + 1
    if logits.ndim != 3 or logits.shape[:2] != (exits, len(labels)):
        raise RecordError(
            f"student {candidate.arch_id}: logits must be [{exits}, {len(labels)}, classes], got {list(logits.shape)}"
        )
    if not np.isfinite(logits).all():
        raise RecordError(f"student {candidate.arch_id}: logits are not finite; the training diverged")
    top1, soft = top1_per_exit(logits, labels), soft_top1(logits[-1], np.asarray(labels))
    scored = ScoredStudent(candidate.arch_id, epochs, cost_s, top1, f"{name}-e{epochs:04d}.npy", soft)
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(logits, dtype=np.float32), allow_pickle=False)
    write_bytes(folder / scored.logits_file, buffer.getvalue())
    write_record(folder / f"{name}.json", scored)
    return scored


def read_scored(folder: Path, name: str = "score") -> ScoredStudent | None:
    """The record of a student's folder, or None when it was not scored yet.

    Raises:
        RecordError: a record that does not fit.
        StorageError: the record cannot be read.
    """
    path = folder / f"{name}.json"
    return read_record(ScoredStudent, path) if path.exists() else None


def read_logits(folder: Path, scored: ScoredStudent) -> np.ndarray:
    """Logits float32 [E, N, K] of a score.

    Raises:
        StorageError: the file is missing or is not what was written; the message says what to delete.
    """
    path = folder / scored.logits_file
    try:
        logits = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise StorageError(
            f"{path}: cannot be read: {e}. Delete the folder {folder} and run again to score it anew"
        ) from e
    if logits.ndim != 3 or logits.dtype != np.float32 or len(logits) != len(scored.top1):
        raise StorageError(
            f"{path}: expected float32 [{len(scored.top1)}, N, K], got {logits.dtype} {list(logits.shape)}. "
            f"Delete the folder {folder} and run again to score it anew"
        )
    return logits
