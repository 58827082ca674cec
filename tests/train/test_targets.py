from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_examples import CLASSES, tiny_dataset

from nas.core.errors import StorageError
from nas.data import Dataset, augmented
from nas.train.targets import Targets, make_targets
from nas.train.teacher import Teacher


class Counting:
    """A linear teacher that counts the images it was asked about."""

    def __init__(self) -> None:
        self.images = 0
        self.weights = np.random.default_rng(0).normal(0, 1, (16 * 16 * 3, CLASSES)).astype(np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.images += len(images)
        return (images.reshape(len(images), -1) / 255.0).astype(np.float32) @ self.weights


def linear_teacher(predict: Counting, sha256: str = "a" * 64) -> Teacher:
    return Teacher("linear", sha256, "fp32", 0.5, 0.5, 0.0, None, None, 16, predict, lambda: b"")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def test_targets_hold_the_augmented_images_and_what_the_teacher_says(dataset: Dataset, tmp_path: Path) -> None:
    predict, told = Counting(), []
    targets = make_targets(
        linear_teacher(predict), dataset, 3, tmp_path, lambda done, total: told.append((done, total))
    )
    assert targets.images.shape == (3, 96, 16, 16, 3)
    assert targets.logits.dtype == np.float32
    for v in range(3):
        images = augmented(dataset.train.images, dataset.augment, np.random.default_rng([0, v]))
        assert np.array_equal(targets.images[v], images)
        assert np.array_equal(targets.logits[v], predict(images))
    assert np.array_equal(targets.labels, dataset.train.labels)
    assert (targets.mean, targets.std) == (dataset.mean, dataset.std)
    assert told[:3] == [(1, 3), (2, 3), (3, 3)]


def test_a_full_disk_is_told_before_anything_is_computed(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    predict = Counting()
    with pytest.raises(StorageError, match=r"No space left on device\. Free space, or .* --set run.cache=DIR"):
        make_targets(linear_teacher(predict), dataset, 3, tmp_path)
    assert predict.images == 0


def test_the_teacher_is_asked_once(dataset: Dataset, tmp_path: Path) -> None:
    predict = Counting()
    first = make_targets(linear_teacher(predict), dataset, 2, tmp_path)
    asked = predict.images
    again = make_targets(linear_teacher(predict), dataset, 2, tmp_path)
    assert predict.images == asked == 2 * 96
    assert again.key == first.key


def test_another_teacher_data_set_augmentation_or_number_is_another_key(dataset: Dataset, tmp_path: Path) -> None:
    predict = Counting()
    keys = {
        make_targets(linear_teacher(predict), dataset, 2, tmp_path).key,
        make_targets(linear_teacher(predict, "b" * 64), dataset, 2, tmp_path).key,
        make_targets(linear_teacher(predict), dataset, 1, tmp_path).key,
        make_targets(linear_teacher(predict), dataset, 2, tmp_path, seed=1).key,
        make_targets(linear_teacher(predict), replace(dataset, sha256="other"), 2, tmp_path).key,
        make_targets(
            linear_teacher(predict), replace(dataset, augment=replace(dataset.augment, shift=0.2)), 2, tmp_path
        ).key,
    }
    assert len(keys) == 6


def test_another_process_opens_them_read_only(dataset: Dataset, tmp_path: Path) -> None:
    made = make_targets(linear_teacher(Counting()), dataset, 2, tmp_path)
    opened = Targets.open(made.folder)
    assert isinstance(opened.images, np.memmap)
    assert not opened.images.flags.writeable
    assert opened.key == made.key
    assert opened.variants == 2


def test_what_a_killed_process_left_is_made_anew(dataset: Dataset, tmp_path: Path) -> None:
    made = make_targets(linear_teacher(Counting()), dataset, 2, tmp_path)
    (made.folder / "targets.json").unlink()  # written last, so this is what a kill leaves at worst
    left = made.folder.parent / f".{made.key}.tmp-killed"
    left.mkdir()
    predict = Counting()
    again = make_targets(linear_teacher(predict), dataset, 2, tmp_path)
    assert predict.images == 2 * 96
    assert again.key == made.key
    assert not left.exists()


@pytest.mark.parametrize("name", ["images.npy", "logits.npy", "labels.npy", "targets.json"])
def test_damaged_targets_say_what_to_delete(dataset: Dataset, tmp_path: Path, name: str) -> None:
    made = make_targets(linear_teacher(Counting()), dataset, 2, tmp_path)
    path = made.folder / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StorageError, match="Delete the folder to compute them again"):
        Targets.open(made.folder)


def test_targets_with_pickled_objects_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    made = make_targets(linear_teacher(Counting()), dataset, 2, tmp_path)
    np.save(made.folder / "labels.npy", np.array([{}], dtype=object))  # pickled, the default of save
    with pytest.raises(StorageError, match="cannot be read"):
        Targets.open(made.folder)
