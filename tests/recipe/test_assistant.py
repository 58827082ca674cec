"""What an assistant teaches: its answers, and its own attention maps where it has attention and they are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nas.core.records import BlockConfig, BlockKind, Candidate, HeadConfig, StageConfig, StemConfig
from nas.data import DataSettings, load_dataset
from nas.models.student import attention_maps
from nas.recipe.assistant import assistant_context
from nas.recipe.context import open_context, write_context
from nas.recipe.finish import FinishJob, finish_student, load_finished
from nas.recipe.pruning import unfolded_student
from nas.train.evaluate import normalised
from nas.train.settings import DistillSettings
from nas.train.targets import make_targets
from nas.train.teacher import Teacher

DISTILL = DistillSettings(epochs=1, batch_size=32, recalibration_images=64, attention_maps=1.0)
MAPS = "attention_maps.last"


def network(kind: BlockKind) -> Candidate:
    blocks = (BlockConfig(4, 8, 32, 3, 2, kind=kind),)
    return Candidate(16, 10, StemConfig(4), (StageConfig(blocks),), HeadConfig())


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a teacher whose 16 tokens attend to all alike."""
    folder = tmp_path_factory.mktemp("context")
    dataset = load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)
    weights = np.random.default_rng(0).normal(0, 1, (3, 10)).astype(np.float32)

    def predict(images: np.ndarray) -> np.ndarray:
        return (images / 255.0).mean((1, 2)).astype(np.float32) @ weights

    def features(images: np.ndarray, _layers: object) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return predict(images), {"last": np.full((len(images), 16, 16), 1 / 16, np.float32)}

    teacher = Teacher("even", "a" * 64, "fp32", 0.5, 0.5, 0.0, None, None, 16, predict, lambda: b"", features)
    targets = make_targets(teacher, dataset, 2, folder / "cache", features=(MAPS,))
    write_context(folder / "context.json", (dataset,), targets, folder / "cache", 0)
    return str(folder / "context.json")


def taught_by(kind: BlockKind, context: str, folder: Path) -> np.ndarray:
    """The attention maps that students of an assistant learn from, float16 [V, N, 1, n, n]."""
    job = FinishJob(network(kind), context, str(folder), str(folder.parent / "stop"), DISTILL, 0, 48, ())
    finish_student(job)
    return open_context(assistant_context(folder, network(kind), context), 16).targets.features[MAPS]


def test_an_assistant_with_attention_teaches_its_own_maps(context: str, tmp_path: Path) -> None:
    kept = taught_by("attention", context, tmp_path / "assistant")
    targets = open_context(context, 16).targets
    assert (kept.shape, kept.dtype) == (targets.features[MAPS].shape, np.float16)
    student = unfolded_student(network("attention"), load_finished(tmp_path / "assistant")[0], targets)
    with torch.no_grad(), attention_maps(student) as maps:
        student(normalised(targets.images[1], targets.mean, targets.std))
    assert np.allclose(kept[1], maps[-1].mean(1, keepdim=True).numpy(), atol=1e-3)
    assert not np.allclose(kept[1], targets.features[MAPS][1], atol=1e-3)


def test_an_assistant_without_attention_hands_on_the_maps_of_the_teacher(context: str, tmp_path: Path) -> None:
    kept = taught_by("inverted_residual", context, tmp_path / "assistant")
    assert np.array_equal(kept, open_context(context, 16).targets.features[MAPS])
