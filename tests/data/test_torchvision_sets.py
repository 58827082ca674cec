"""Published sets through torchvision, on tiny files in their formats: nothing is downloaded."""

import inspect
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.core.errors import ConfigError, DataError
from nas.data import DataSettings, augmented, load_dataset, published_names
from nas.data.torchvision_sets import _PUBLISHED


def _idx(path: Path, array: np.ndarray) -> None:
    """A file in the format of MNIST: magic number, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 50)):
        raw = tmp_path / "FashionMNIST" / "raw"
        _idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        _idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def _settings(path: Path, name: str = "FashionMNIST", **more: object) -> DataSettings:
    return DataSettings(name=name, path=str(path), download=False, **more)  # type: ignore[arg-type]


def test_a_set_with_a_train_flag_keeps_its_test_split(mnist: Path) -> None:
    dataset = load_dataset(_settings(mnist), 28)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (170, 30, 50)
    assert dataset.class_names[0] == "T-shirt/top" and dataset.num_classes == 10
    assert np.bincount(dataset.val.labels).tolist() == [3] * 10
    assert "search-validation split is taken from train" in dataset.warnings[0]
    raw = np.random.default_rng(0).integers(0, 256, (200, 28, 28))
    assert any(np.array_equal(dataset.train.images[i, ..., 0], raw[0]) for i in range(170)) or any(
        np.array_equal(dataset.val.images[i, ..., 0], raw[0]) for i in range(30)
    )
    assert load_dataset(_settings(mnist), 28).sha256 == dataset.sha256 != load_dataset(_settings(mnist), 32).sha256
    assert augmented(dataset.train.images, dataset.augment, np.random.default_rng(0)).shape == (170, 28, 28, 3)


def test_copies_and_leaks_of_a_published_set_are_told_and_leaks_left_out(mnist: Path) -> None:
    raw = mnist / "FashionMNIST" / "raw"
    train = np.random.default_rng(1).integers(0, 256, (200, 28, 28))
    test = np.random.default_rng(2).integers(0, 256, (50, 28, 28))
    train[11] = train[1]  # a copy in its class
    train[22] = train[3]  # and one with another label
    train[40] = test[0]
    _idx(raw / "train-images-idx3-ubyte", train)
    _idx(raw / "t10k-images-idx3-ubyte", test)
    dataset = load_dataset(_settings(mnist), 28)
    text = "\n".join(dataset.warnings)
    assert "1 images of test are also in train and are left out of train:\n  train image 40 = test image 0" in text
    assert (
        "identical files carry different labels; one of each pair is wrong:\n  train image 3 = train image 22" in text
    )
    assert "copies of another file of their class and split: 1." in text
    assert len(dataset.train) + len(dataset.val) == 199


def test_a_class_that_a_published_split_lacks_is_told(mnist: Path) -> None:
    raw = mnist / "FashionMNIST" / "raw"
    _idx(raw / "t10k-labels-idx1-ubyte", np.arange(50) % 9)
    (note,) = [w for w in load_dataset(_settings(mnist), 28).warnings if "holds no image" in w]
    assert note.startswith("The test split holds no image of: Ankle boot.")


def test_the_division_does_not_depend_on_the_resolution(mnist: Path) -> None:
    small, large = load_dataset(_settings(mnist), 14), load_dataset(_settings(mnist), 28)
    assert np.array_equal(small.val.labels, large.val.labels)
    means = small.val.images.mean((1, 2, 3)), large.val.images.mean((1, 2, 3))
    assert np.abs(means[0] - means[1]).max() < 4


def test_an_undivided_set_is_divided(tmp_path: Path) -> None:
    for label in ("Forest", "River"):
        folder = tmp_path / "eurosat" / "2750" / label
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng([i, len(label)]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}_{i}.png")
    dataset = load_dataset(_settings(tmp_path, "EuroSAT"), 8)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (28, 6, 6)
    assert dataset.class_names == ("Forest", "River")
    assert "The set is not divided" in dataset.warnings[0]


def test_digits_warn_about_mirroring(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for part in ("train", "t10k"):
        _idx(raw / f"{part}-images-idx3-ubyte", np.random.default_rng(len(part)).integers(0, 256, (40, 28, 28)))
        _idx(raw / f"{part}-labels-idx1-ubyte", np.arange(40) % 10)
    warnings = load_dataset(_settings(tmp_path, "MNIST"), 28).warnings
    assert any("A mirrored image of MNIST" in w and "data.augment.horizontal_flip=false" in w for w in warnings)


def test_missing_files_name_the_folder_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds no complete CIFAR10 \(Dataset not found or corrupted.*--set data\.download=true"
    ):
        load_dataset(_settings(tmp_path, "CIFAR10"), 32)


def test_a_failed_download_gives_the_command_for_a_machine_with_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(
        DataError,
        match=r"fetching it failed \(.*torchvision\.datasets\.CIFAR10\('DIR', download=True\).*data\.name=defects",
    ):
        load_dataset(DataSettings(name="CIFAR10", path=str(tmp_path)), 32)


def test_a_set_that_no_program_may_download_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No program may download it: fetch it by hand from its publisher"):
        load_dataset(DataSettings(name="ImageNet", path=str(tmp_path)), 32)


def test_broken_files_are_data_errors(mnist: Path) -> None:
    (mnist / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(DataError, match="holds no complete FashionMNIST"):
        load_dataset(_settings(mnist), 28)


def test_a_path_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"data\.path: missing for CIFAR100: .*--set data\.path=DIR"):
        load_dataset(DataSettings(name="CIFAR100"), 32)


def test_every_name_fits_the_installed_torchvision() -> None:
    from torchvision import datasets

    assert len(published_names()) >= 30
    for name, published in _PUBLISHED.items():
        parameters = inspect.signature(getattr(datasets, name).__init__).parameters
        passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        assert published.argument is None or published.argument in parameters or passes_on, name
        assert "download" in parameters or passes_on or not published.downloads, name
        assert all(argument in parameters for argument, _ in published.fixed), name
