from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_examples import tiny_dataset

from nas.core.errors import ConfigError
from nas.data import Dataset
from nas.train.contributors import Taught, mean_logits, prepare_targets
from nas.train.settings import SoftLabelFile, TeacherMember, TeacherSettings

ALONE = TeacherSettings(widths=(8,), blocks=1, epochs=1, batch_size=24, threads=1)
TWO = replace(ALONE, members=(TeacherMember("a"), TeacherMember("b", seed=1, weight=3.0)))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(48, 20, 20)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def soft(dataset: Dataset, path: Path, seed: int) -> SoftLabelFile:
    values = np.random.default_rng(seed).dirichlet(np.ones(dataset.num_classes), len(dataset.train))
    np.save(path / f"{seed}.npy", values)
    return SoftLabelFile(f"lab{seed}", str(path / f"{seed}.npy"))


def taught(dataset: Dataset, cache: Path, settings: TeacherSettings) -> Taught:
    return prepare_targets(dataset, settings, 2, cache)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def test_means_of_probabilities_and_of_logits_are_weighted_by_hand() -> None:
    one, two = np.log([[0.5, 0.3, 0.2]]), np.log([[0.1, 0.1, 0.8]]) + 5
    parts = [(one.astype(np.float32), 1.0, None), (two.astype(np.float32), 3.0, None)]
    np.testing.assert_allclose(softmax(mean_logits(parts, "probabilities")), [[0.2, 0.15, 0.65]], rtol=1e-5)
    geometric = np.array([[0.5, 0.3, 0.2]]) ** 0.25 * np.array([[0.1, 0.1, 0.8]]) ** 0.75
    np.testing.assert_allclose(softmax(mean_logits(parts, "logits")), geometric / geometric.sum(), rtol=1e-5)


def test_an_image_that_a_contributor_misses_gets_the_mean_of_the_others() -> None:
    z = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    found = mean_logits([(z[0], 1.0, None), (z[1], 1.0, np.array([True, False, True]))], "probabilities")
    np.testing.assert_allclose(softmax(found)[1], softmax(z[0])[1], rtol=1e-5)
    np.testing.assert_allclose(softmax(found)[0], softmax(z)[:, 0].mean(axis=0), rtol=1e-5)


def test_networks_and_files_teach_together(dataset: Dataset, cache: Path, tmp_path: Path) -> None:
    file = soft(dataset, tmp_path, 1)
    together = taught(dataset, cache, replace(TWO, files=(file,)))
    a, b = (taught(dataset, cache, replace(ALONE, seed=seed)) for seed in (0, 1))
    expected = softmax(a.targets.logits) + 3 * softmax(b.targets.logits) + np.load(file.path)
    np.testing.assert_allclose(softmax(together.targets.logits), expected / 5, atol=1e-6)
    assert np.array_equal(together.targets.images, a.targets.images)
    assert (together.targets.folder / "images.npy").stat().st_nlink > 1  # no space a second time
    teacher = together.teacher
    assert teacher.contributors[:2] == ("a: resnet-8x1, weight 1", "b: resnet-8x1, weight 3")
    assert teacher.contributors[2].startswith("lab1: 1.npy, 48 of 48 training images")
    val = softmax(a.teacher.predict(dataset.val.images)) + 3 * softmax(b.teacher.predict(dataset.val.images))
    assert teacher.val_accuracy == (val.argmax(1) == dataset.val.labels).mean()
    assert teacher.macs == 2 * (a.teacher.macs or 0)


def test_without_a_contributor_the_targets_are_those_of_a_run_that_never_had_it(
    dataset: Dataset, cache: Path, tmp_path: Path
) -> None:
    one, two = soft(dataset, tmp_path, 1), soft(dataset, tmp_path, 2)
    all_of_them = taught(dataset, cache, replace(ALONE, files=(one, two)))
    never = taught(dataset, cache, replace(ALONE, files=(one,)))
    Path(two.path).unlink()  # whoever takes back a contribution takes the file too
    removed = taught(dataset, cache, replace(ALONE, files=(one, two), without=("lab2",)))
    assert removed.targets.key == never.targets.key != all_of_them.targets.key
    assert np.array_equal(removed.targets.logits, never.targets.logits)
    assert removed.teacher.contributors[-1] == "lab2: left out"
    alone = taught(dataset, cache, replace(TWO, without=("b",)))
    assert alone.targets.key == taught(dataset, cache, ALONE).targets.key


def test_a_changed_file_is_another_contributor(dataset: Dataset, cache: Path, tmp_path: Path) -> None:
    file = soft(dataset, tmp_path, 1)
    before = taught(dataset, cache, replace(ALONE, files=(file,))).targets.key
    np.save(file.path, np.full((48, 10), 0.1))
    assert taught(dataset, cache, replace(ALONE, files=(file,))).targets.key != before


def test_files_alone_teach_where_the_network_has_no_weight(dataset: Dataset, cache: Path, tmp_path: Path) -> None:
    file = soft(dataset, tmp_path, 1)
    found = taught(dataset, cache, replace(ALONE, weight=0.0, files=(file,)))
    np.testing.assert_allclose(softmax(found.targets.logits[1]), np.load(file.path), atol=1e-6)
    assert found.teacher.name == "resnet-8x1"  # what students are compared with


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": (TeacherMember("a"), TeacherMember("a"))}, "a name of its own"),
        ({"members": (TeacherMember("alice"),), "without": ("alise",)}, "'alise'; did you mean 'alice'?"),
        ({"without": ("a",)}, "there are no members and no files"),
        ({"members": (TeacherMember("a"),), "without": ("a",)}, "no network is left"),
        ({"members": (TeacherMember("a", weight=0.0),)}, "one of them above 0"),
        ({"files": (SoftLabelFile("f", "f.npy", partial=True),), "weight": 0.0}, "one file must hold all images"),
        ({"members": (TeacherMember("a", kind="onnx"),)}, r"teacher.members \(a\): teacher.weights: .* 'onnx' needs"),
    ],
)
def test_contributors_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        replace(ALONE, **changes)  # type: ignore[arg-type]
