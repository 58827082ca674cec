"""Settings, records and the embedded set as a whole."""

import dataclasses

import numpy as np
import pytest

from nas.core.errors import ConfigError, DataError
from nas.data import DataSettings, Split, channel_statistics, load_dataset
from nas.data.records import check_memory

SMALL = DataSettings(train_images=60, val_images=30, test_images=20)


def test_the_embedded_set_has_the_stated_sizes_and_statistics() -> None:
    dataset = load_dataset(SMALL, 32)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (60, 30, 20)
    assert dataset.num_classes == 10 and dataset.resolution == 32 and dataset.warnings == ()
    assert dataset.mean == pytest.approx(dataset.train.images.mean((0, 1, 2)) / 255)
    assert dataset.train.boxes is not None and dataset.train.difficulty is not None


def test_identity_follows_everything_that_changes_the_images() -> None:
    first = load_dataset(SMALL, 32).sha256
    assert load_dataset(SMALL, 32).sha256 == first
    for other in ({"seed": 1}, {"train_images": 61}, {"val_images": 31}):
        assert load_dataset(dataclasses.replace(SMALL, **other), 32).sha256 != first
    assert load_dataset(SMALL, 48).sha256 != first


def test_an_unknown_set_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ConfigError, match=r"data\.name: no data set 'defect'; did you mean 'defects'\?"):
        load_dataset(DataSettings(name="defect"), 32)
    with pytest.raises(ConfigError, match=r"did you mean 'CIFAR10'\? \(allowed: defects, folder, CIFAR10, "):
        load_dataset(DataSettings(name="cifar-10"), 32)
    with pytest.raises(ConfigError, match=r"no data set 'CocoDetection'"):
        load_dataset(DataSettings(name="CocoDetection"), 32)


@pytest.mark.parametrize("resolution", [0, 7, 2000, 32.0, True])
def test_resolutions_out_of_range_are_refused(resolution: int) -> None:
    with pytest.raises(ConfigError, match=f"resolution must be a whole number from 8 to 1024, got {resolution}"):
        load_dataset(SMALL, resolution)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("name", " ", "data.name must be"),
        ("path", "", "data.path must be a folder, got ''"),
        ("path", "a\0b", "data.path must be a folder"),
        ("train_images", 0, "data.train_images must be a whole number from 2"),
        ("train_images", 10.5, "data.train_images must be a whole number"),
        ("val_images", True, "data.val_images must be a whole number"),
        ("seed", -1, "data.seed must be a whole number from 0"),
        ("val_share", 0.0, "data.val_share must be above 0"),
        ("val_share", 0.9, "data.val_share must be a number from 0 to 0.45, got 0.9"),
        ("max_corrupt_share", float("inf"), "data.max_corrupt_share must be a number from 0 to 1.0, got inf"),
    ],
)
def test_settings_out_of_range_are_refused_by_key(field: str, value: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DataSettings(**{field: value})  # type: ignore[arg-type]


def test_statistics_equal_those_of_numpy_and_never_divide_by_zero() -> None:
    images = np.random.default_rng(0).integers(0, 256, (700, 8, 8, 3), dtype=np.uint8)
    images[..., 2] = 17
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(images.mean((0, 1, 2)) / 255, rel=1e-12)
    assert std[:2] == pytest.approx(images[..., :2].std((0, 1, 2)) / 255, rel=1e-9)
    assert std[2] == 1 / 255


def test_a_split_keeps_its_arrays_together() -> None:
    split = load_dataset(SMALL, 16).train
    part = split.take(np.array([5, 3]))
    assert len(part) == 2 and np.array_equal(part.images[1], split.images[3]) and part.labels[0] == split.labels[5]
    with pytest.raises(DataError, match="60 images need 60 labels"):
        Split(split.images, split.labels[:-1])
    with pytest.raises(DataError, match=r"images must be uint8 \[N, H, H, 3\]"):
        Split(split.images.astype(np.float32), split.labels)


def test_a_label_without_a_class_is_refused() -> None:
    dataset = load_dataset(SMALL, 16)
    with pytest.raises(DataError, match="train labels 0 to 9 do not fit 4 classes"):
        dataclasses.replace(dataset, class_names=("a", "b", "c", "d"))


def test_a_set_larger_than_the_memory_is_refused_with_a_resolution_that_fits() -> None:
    with pytest.raises(
        DataError, match=r"ImageNet: 100000000 images at 1024 px take .* Use a resolution of \d+ px or less"
    ):
        check_memory(100_000_000, 1024, "ImageNet")
    check_memory(10_000, 64, "small")
