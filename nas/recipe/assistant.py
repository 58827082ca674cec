"""A finished network as the teacher of smaller ones.

Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv 1902.03393: a network of middle
size learns from the teacher and then teaches the student, section 3. Differs: its answers are cached like those of
the teacher, for the same augmented images, so a student costs what it costs without an assistant. One with attention
teaches its own attention maps, too, where these are compared; hints and attention transfer stay with the teacher.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nas.core.jsonio import content_hash, file_sha256, read_record, write_record
from nas.core.records import Candidate
from nas.core.walk import expand
from nas.recipe.context import ContextFile, open_context
from nas.recipe.deployed import deployed_logits
from nas.recipe.finish import load_finished
from nas.recipe.pruning import unfolded_student
from nas.recipe.records import WEIGHTS_FILE
from nas.train.features import ATTENTION_MAPS, kept_attention
from nas.train.targets import Targets, with_logits


def assistant_context(folder: Path, assistant: Candidate, context: str) -> str:
    """Path of a context like `context` in which the assistant teaches, made where it is not there.

    Args:
        folder: of the assistant, which `finish_student` finished.
        assistant: its architecture in fp32, at the largest resolution of the context.
        context: path of the context that it learnt from.

    Raises:
        StorageError: files that cannot be read or written.
    """
    record = read_record(ContextFile, Path(context))
    base = Targets.open(Path(record.targets))

    def answers() -> np.ndarray:
        weights, _ = load_finished(folder)
        images = open_context(context, assistant.resolution).targets.images
        each = (deployed_logits(assistant, weights, None, record.mean, record.std, v) for v in images)
        return np.stack([logits[-1] for logits in each])

    maps: list[str] = []
    if any(layer.kind == "attention" for layer in expand(assistant)):
        maps = [name for name in base.features if name.startswith(ATTENTION_MAPS)]
    attention = partial(_attention, folder, assistant, context)
    key = content_hash([file_sha256(folder / WEIGHTS_FILE)], 64)
    targets = with_logits(base, answers, key, dict.fromkeys(maps, attention))
    own = targets.folder.resolve()
    sides = tuple(
        replace(r, variants=str(own / "images.npy")) if Path(r.variants) == base.folder / "images.npy" else r
        for r in record.resolutions
    )
    path = folder / "context.json"
    write_record(path, replace(record, targets=str(own), resolutions=sides))
    return str(path.resolve())


def _attention(folder: Path, assistant: Candidate, context: str, variant: int) -> np.ndarray:
    """Attention maps of an assistant for one variant of the images, as they are cached."""
    targets = open_context(context, assistant.resolution).targets
    student = unfolded_student(assistant, load_finished(folder)[0], targets)
    return kept_attention(student, targets.images[variant], targets.mean, targets.std)
