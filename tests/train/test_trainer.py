from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from train_examples import tiny_candidate, tiny_dataset, tiny_targets

from nas.core.errors import DataError, RunMismatchError, StorageError, TrainingError
from nas.data import Dataset
from nas.train.evaluate import predict_logits
from nas.train.loop import EpochRecord, LossGuard, batches, lr_share, steps_per_epoch
from nas.train.settings import DistillSettings
from nas.train.targets import Targets
from nas.train.trainer import new_student, train_student

SETTINGS = DistillSettings(epochs=4, batch_size=32, recalibration_images=64)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def targets(dataset: Dataset) -> Targets:
    return tiny_targets(dataset)


def trained_logits(
    dataset: Dataset,
    targets: Targets,
    settings: DistillSettings = SETTINGS,
    stops: tuple[int, ...] = (4,),
    checkpoint: Path | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Logits after training that stops, with a new student and nothing but the checkpoint, at each of `stops`."""
    for stop in stops:
        student = new_student(tiny_candidate(), seed)
        train_student(student, targets, settings, seed=seed, stop_epoch=stop, checkpoint=checkpoint)
    return predict_logits(student, dataset.val.images, dataset.mean, dataset.std)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_that_was_stopped_twice_ends_as_one_that_was_not(
    dataset: Dataset, targets: Targets, tmp_path: Path, ema: float
) -> None:
    settings = DistillSettings(epochs=4, batch_size=32, recalibration_images=64, ema=ema)
    whole = trained_logits(dataset, targets, settings)
    parts = trained_logits(dataset, targets, settings, (1, 3, 4), tmp_path / "student.ckpt")
    assert np.array_equal(whole, parts)


def test_stopping_early_keeps_the_schedule(dataset: Dataset, targets: Targets) -> None:
    long = DistillSettings(epochs=8, batch_size=32, recalibration_images=64)
    assert not np.array_equal(
        trained_logits(dataset, targets, SETTINGS, (2,)), trained_logits(dataset, targets, long, (2,))
    )


def test_the_seed_decides_and_nothing_else(dataset: Dataset, targets: Targets) -> None:
    torch.manual_seed(1)
    first = trained_logits(dataset, targets)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert np.array_equal(first, trained_logits(dataset, targets))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not np.array_equal(first, trained_logits(dataset, targets, seed=1))


def test_a_student_learns_its_training_images(dataset: Dataset, targets: Targets) -> None:
    student = new_student(tiny_candidate(), 0)
    settings = DistillSettings(epochs=40, batch_size=16)
    history = train_student(student, targets, settings, seed=0)
    logits = predict_logits(student, dataset.train.images, dataset.mean, dataset.std)
    assert (logits[-1].argmax(1) == dataset.train.labels).mean() > 0.9
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss
    assert [e.epoch for e in history.epochs] == list(range(40))
    assert history.cpu_s > 0


def test_a_killed_process_goes_on_from_its_last_epoch(dataset: Dataset, targets: Targets, tmp_path: Path) -> None:
    checkpoint = tmp_path / "student.ckpt"
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from train_examples import tiny_candidate, tiny_dataset, tiny_targets
        from nas.train.settings import DistillSettings
        from nas.train.trainer import new_student, train_student
        def die(record):
            if record.epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        settings = DistillSettings(epochs=4, batch_size=32, recalibration_images=64)
        train_student(new_student(tiny_candidate(), 0), tiny_targets(tiny_dataset()), settings, seed=0,
                      checkpoint=Path({str(checkpoint)!r}), progress=die)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    seen: list[EpochRecord] = []
    student = new_student(tiny_candidate(), 0)
    history = train_student(student, targets, SETTINGS, seed=0, checkpoint=checkpoint, progress=seen.append)
    assert [e.epoch for e in seen] == [2, 3]
    assert len(history.epochs) == 4
    resumed = predict_logits(student, dataset.val.images, dataset.mean, dataset.std)
    assert np.array_equal(resumed, trained_logits(dataset, targets))


def test_an_error_in_progress_leaves_the_checkpoint_of_that_epoch(targets: Targets, tmp_path: Path) -> None:
    checkpoint = tmp_path / "student.ckpt"

    def stop(_: EpochRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(new_student(tiny_candidate(), 0), targets, SETTINGS, seed=0, checkpoint=checkpoint, progress=stop)
    history = train_student(
        new_student(tiny_candidate(), 0), targets, SETTINGS, seed=0, stop_epoch=1, checkpoint=checkpoint
    )
    assert len(history.epochs) == 1


def test_a_checkpoint_of_another_training_is_refused(targets: Targets, tmp_path: Path) -> None:
    checkpoint = tmp_path / "student.ckpt"
    train_student(new_student(tiny_candidate(), 0), targets, SETTINGS, seed=0, stop_epoch=1, checkpoint=checkpoint)
    with pytest.raises(RunMismatchError, match="belongs to another network, seed, teacher"):
        train_student(new_student(tiny_candidate(), 1), targets, SETTINGS, seed=1, checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_a_damaged_checkpoint_says_what_to_delete(targets: Targets, tmp_path: Path, content: bytes) -> None:
    checkpoint = tmp_path / "student.ckpt"
    checkpoint.write_bytes(content)
    with pytest.raises(StorageError, match="Delete it to train from the start"):
        train_student(new_student(tiny_candidate(), 0), targets, SETTINGS, seed=0, checkpoint=checkpoint)


def test_a_checkpoint_with_code_in_it_is_not_run(targets: Targets, tmp_path: Path) -> None:
    class Marker:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"version": 1, "identity": Marker()}, tmp_path / "student.ckpt")
    with pytest.raises(StorageError, match="not a checkpoint"):
        train_student(new_student(tiny_candidate(), 0), targets, SETTINGS, seed=0, checkpoint=tmp_path / "student.ckpt")
    assert not (tmp_path / "was-run").exists()


def test_a_huge_learning_rate_ends_with_a_hint(targets: Targets) -> None:
    settings = DistillSettings(epochs=4, batch_size=16, lr=1e6, warmup=0.0, clip_norm=1e9)
    with pytest.raises(TrainingError, match=r"training (diverged|.*learnt).*lr 1e\+06; try --set distill.lr=2e\+05"):
        train_student(new_student(tiny_candidate(), 0), targets, settings, seed=0)


def test_targets_that_are_not_finite_end_the_training_at_once(targets: Targets) -> None:
    broken = Targets(
        "broken",
        targets.images,
        np.full_like(targets.logits, np.nan),
        targets.labels,
        targets.mean,
        targets.std,
        targets.folder,
    )
    with pytest.raises(TrainingError, match="diverged in epoch 1"):
        train_student(new_student(tiny_candidate(), 0), broken, SETTINGS, seed=0)


def test_a_training_that_learns_nothing_is_ended_half_way() -> None:
    guard = LossGuard("student x", 1e-9, "distill.lr")
    for epoch in range(4):
        for _ in range(40):
            guard.step(2.0, epoch)
        if epoch < 3:
            guard.epoch(2.1, epoch, 8)
    with pytest.raises(TrainingError, match="nothing was learnt in 4 of 8 epochs"):
        guard.epoch(2.1, 3, 8)


def test_a_last_batch_of_one_image_is_left_out() -> None:
    rng = np.random.default_rng(0)
    parts = list(batches(33, 16, rng))
    assert [len(p) for p in parts] == [16, 16]
    assert steps_per_epoch(33, 16) == 2
    assert [len(p) for p in batches(34, 16, rng)] == [16, 16, 2]
    assert steps_per_epoch(34, 16) == 3
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        list(batches(1, 16, rng))


def test_training_with_a_batch_of_one_left_over_works() -> None:
    targets = tiny_targets(tiny_dataset(train=33))
    settings = DistillSettings(epochs=1, batch_size=16)
    history = train_student(new_student(tiny_candidate(), 0), targets, settings, seed=0)
    assert np.isfinite(history.epochs[0].loss)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    shares = [lr_share(step, 100, 0.1) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[10] == 1.0
    assert all(a < b for a, b in itertools.pairwise(shares[:11]))
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))
    assert shares[-1] < 1e-3
    assert lr_share(0, 1, 0.1) == 0.5


def test_a_student_without_exits_and_with_odd_size_trains() -> None:
    dataset = tiny_dataset(train=24, resolution=17)
    student = new_student(tiny_candidate(17, exits=0), 0)
    train_student(student, tiny_targets(dataset), DistillSettings(epochs=1, batch_size=8), seed=0)
    assert predict_logits(student, dataset.val.images, dataset.mean, dataset.std).shape == (1, 40, 10)
