"""A finished student is cut and distilled again: what is kept, that it answers, and that a kill changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finish import DISTILL, SEED, candidate, write

from nas.compress.prune import kept_channels, prunable, with_widths
from nas.core.errors import ConfigError, InterruptedRunError, StorageError
from nas.core.jsonio import read_record
from nas.data import DataSettings, load_dataset
from nas.models.student import Student, folded_weights
from nas.recipe.context import Context, open_context
from nas.recipe.finish import (
    FinishedStudent,
    FinishJob,
    adopt_parent,
    finish_student,
    finished_confidence,
    finished_logits,
    load_finished,
)
from nas.recipe.pruning import (
    SharedImportance,
    importance_of,
    joint_ends,
    narrowed_student,
    read_importance,
    read_shared,
    unfolded_student,
    write_importance,
    write_shared,
)
from nas.recipe.settings import PruneMode, PruneSettings
from nas.train.evaluate import normalised, predict_logits
from nas.train.losses import student_loss

TARGET = with_widths(candidate(), {"stages.0.0": 5, "stages.1.0": 11})


@pytest.fixture(scope="module")
def context_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)
    return write(dataset, tmp_path_factory.mktemp("context"))[0]


@pytest.fixture(scope="module")
def context(context_file: Path) -> Context:
    return open_context(str(context_file), 16)


@pytest.fixture(scope="module")
def parent(context_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished student that is to be cut."""
    folder = tmp_path_factory.mktemp("parent") / candidate().arch_id
    stop = str(folder.parent / "stop")
    finish_student(
        FinishJob(candidate(), str(context_file), str(folder), stop, DISTILL, SEED, 48, (), importance="taylor")
    )
    return folder


@pytest.fixture(scope="module")
def student(parent: Path, context: Context) -> Student:
    return unfolded_student(candidate(), load_finished(parent)[0], context.targets)


def cut(context_file: Path, parent: Path, folder: Path, mode: PruneMode = "after", epochs: int = 3) -> FinishJob:
    """The job of a narrower student, its parent's files in its folder."""
    settings = PruneSettings(mode, epochs=epochs)
    adopt_parent(parent, folder, settings.importance)
    distill = replace(DISTILL, epochs=4)
    stop = str(folder.parent / "stop")
    return FinishJob(
        TARGET, str(context_file), str(folder), stop, distill, SEED, 48, (), parent=parent.name, prune=settings
    )


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_finished(folder)[0])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_unfolded_student_answers_as_the_finished_one(parent: Path, student: Student, context: Context) -> None:
    found = predict_logits(student, context.val, context.mean, context.std)
    names = candidate().precisions
    temperatures = np.array([[[c.temperature]] for c in finished_confidence(parent, names)])  # only where deployed
    expected = finished_logits(parent, "val", names) * temperatures
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_unfolded_student_answers_alike_with_the_statistics_of_a_batch(student: Student, context: Context) -> None:
    images = normalised(context.targets.images[0], context.mean, context.std)
    with torch.no_grad():
        before = student.eval()(images)[-1]
        copy = narrowed_student(student, candidate(), importance_of(student, "l1", context.targets, DISTILL))
        torch.testing.assert_close(copy.train()(images)[-1], before, rtol=1e-3, atol=1e-3)


def test_taylor_importance_is_the_square_of_the_loss_that_a_gate_changes(student: Student, context: Context) -> None:
    found = importance_of(student, "taylor", context.targets, DISTILL)
    targets = context.targets
    images = normalised(targets.images[0], context.mean, context.std)
    answers = torch.from_numpy(targets.logits[0].copy()), torch.from_numpy(targets.labels.copy())

    def loss(unit: str, channel: int, gate: float) -> float:
        changed = narrowed_student(student, candidate(), found).double().eval()
        of = changed.get_submodule(unit)
        with torch.no_grad():
            for p in of.parameters():
                p[channel] *= gate
            return float(student_loss(changed(images.double()), answers[0].double(), answers[1], DISTILL))

    step = 1e-3
    for unit, importance in (
        ("body.stages_0_0.depthwise.bn", found["stages.0.0"].channels),
        ("body.stages_1_0.depthwise.bn", found["stages.1.0"].channels),
        ("body.stages_1_0.se_reduce.conv", found["stages.1.0"].squeeze),
    ):
        channel = int(importance.argmax())
        slope = (loss(unit, channel, 1 + step) - loss(unit, channel, 1 - step)) / (2 * step)
        assert importance[channel] == pytest.approx(slope**2, rel=0.02)


def test_narrowed_student_keeps_the_channels_that_matter(student: Student, context: Context) -> None:
    found = importance_of(student, "taylor", context.targets, DISTILL)
    narrow = narrowed_student(student, TARGET, found)
    assert narrow.candidate == TARGET
    kept = kept_channels(found, TARGET)["stages.1.0"].channels
    wide = student.body["stages_1_0"]
    cut_block = narrow.body["stages_1_0"]
    assert torch.equal(cut_block.expand.conv.weight, wide.expand.conv.weight[kept])
    assert torch.equal(cut_block.depthwise.bn.running_var, wide.depthwise.bn.running_var[kept])
    assert torch.equal(cut_block.project.conv.weight, wide.project.conv.weight[:, kept])
    assert torch.equal(narrow.body["stem"].conv.conv.weight, student.body["stem"].conv.conv.weight)


def test_importance_is_read_as_it_was_written(student: Student, context: Context, tmp_path: Path) -> None:
    found = importance_of(student, "l1", context.targets, DISTILL)
    assert set(found) == set(prunable(candidate()))
    write_importance(tmp_path / "a", found)
    write_shared(tmp_path / "b", SharedImportance(found, {"stages.0.0": (8, 12)}))
    for again in (read_importance(tmp_path / "a"), read_shared(tmp_path / "b").blocks):
        for name, block in found.items():
            np.testing.assert_array_equal(again[name].channels, block.channels)
            np.testing.assert_array_equal(again[name].squeeze, block.squeeze)
    assert read_shared(tmp_path / "b").trained == {"stages.0.0": (8, 12)}
    (tmp_path / "a").write_bytes(b"torn")
    with pytest.raises(StorageError, match=r"a: cannot be read: .* and run again"):
        read_importance(tmp_path / "a")


def test_block_is_cut_from_the_next_width_that_was_trained() -> None:
    shared = SharedImportance({}, {"stages.0.0": (4, 8, 16), "stages.1.0": (8, 16)})
    wide = shared.widened(with_widths(candidate(), {"stages.0.0": 3, "stages.1.0": 7}))
    # 4 and 8 channels are those of the input: such a block would not expand
    assert [layer.expanded_channels for layer in prunable(wide).values()] == [8, 16]
    assert shared.widened(candidate()) == candidate()


@pytest.mark.parametrize("mode", ["after", "joint"])
def test_pruned_student_is_finished_like_any_other(
    mode: PruneMode, context_file: Path, parent: Path, tmp_path: Path
) -> None:
    job = cut(context_file, parent, tmp_path / "a", mode)
    finished = finish_student(job)
    assert (finished.candidate, finished.parent) == (TARGET, parent.name)
    assert finished.epochs == (3 if mode == "after" else 4)
    assert not list((tmp_path / "a").glob("*.ckpt"))
    assert {n: a.shape for n, a in weights(tmp_path / "a").items()} == {
        n: a.shape for n, a in folded_weights(Student(TARGET)).items()
    }
    assert finish_student(job) == finished


@pytest.mark.parametrize("mode", ["after", "joint"])
def test_pruning_that_was_stopped_ends_as_one_that_was_not(
    mode: PruneMode, context_file: Path, parent: Path, tmp_path: Path
) -> None:
    job = cut(context_file, parent, tmp_path / "straight", mode)
    finish_student(job)
    stopped = cut(context_file, parent, tmp_path / "stopped", mode)
    Path(stopped.stop_file).touch()
    for _ in range(2):  # one epoch each
        with pytest.raises(InterruptedRunError):
            finish_student(stopped)
    Path(stopped.stop_file).unlink()
    finish_student(stopped)
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))


def test_fine_tuning_begins_with_the_weights_of_the_parent(context_file: Path, parent: Path, tmp_path: Path) -> None:
    job = cut(context_file, parent, tmp_path / "a", epochs=1)
    assert job.prune is not None
    still = replace(job, distill=replace(job.distill, lr=1e-9), prune=replace(job.prune, lr=1.0))
    finish_student(still)
    kept = kept_channels(read_importance(parent / "importance-taylor.safetensors"), TARGET)["stages.1.0"].channels
    left = weights(tmp_path / "a")["stages.1.0.se_expand.weight"]
    np.testing.assert_allclose(left, weights(parent)["stages.1.0.se_expand.weight"][kept], atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda job: replace(job, prune=replace(job.prune, epochs=1)),
        lambda job: replace(job, parent="another"),
        lambda job: replace(job, parent="", prune=None),
    ],
)
def test_student_that_came_about_in_another_way_is_made_anew(
    change: Callable[[FinishJob], FinishJob], context_file: Path, parent: Path, tmp_path: Path
) -> None:
    job = cut(context_file, parent, tmp_path / "a", epochs=2)
    finish_student(job)
    before = weights(tmp_path / "a")
    again = change(job)
    finished = finish_student(again)
    assert (finished.pruning, finished.parent) == (again.pruning, again.parent)
    assert read_record(FinishedStudent, tmp_path / "a" / "finished.json") == finished
    assert same(before, weights(tmp_path / "a")) == (again.parent == "another")  # the same files, under another name


def test_parent_without_importance_cannot_be_cut(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"importance-l1\.safetensors: cannot be read"):
        adopt_parent(parent, tmp_path / "child", "l1")


def test_network_is_cut_on_the_way_at_distinct_epochs() -> None:
    assert joint_ends(24) == [5, 7, 10, 12]
    assert joint_ends(3) == [1, 2]
    assert joint_ends(1) == [0]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"finish\.prune_epochs must be at least 1, got 0"):
        PruneSettings(epochs=0)
    with pytest.raises(ConfigError, match=r"finish\.prune_lr must be above 0 and at most 1, got 2"):
        PruneSettings(lr=2)
