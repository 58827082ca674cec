"""Feature maps of the teacher: what is kept of them, who gives none, and what a student makes of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_examples import tiny_candidate, tiny_dataset, tiny_targets

from nas.core.errors import ConfigError
from nas.data import Dataset
from nas.models.student import folded_weights
from nas.recipe.context import context_parts, open_context, place_context, write_context
from nas.train.evaluate import normalised, predict_logits
from nas.train.features import (
    Adapters,
    check_teacher_features,
    compared_stages,
    reduced,
    stage_maps,
    wanted_features,
)
from nas.train.losses import attention_map
from nas.train.settings import DistillSettings, SoftLabelFile, TeacherSettings
from nas.train.targets import Targets, make_targets, with_logits
from nas.train.teacher import Teacher, prepare_teacher
from nas.train.trainer import new_student, train_student

BOTH = DistillSettings(epochs=3, batch_size=32, recalibration_images=64, hints=1.0, attention=1.0)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def teacher(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    settings = TeacherSettings(widths=(8, 16), blocks=1, epochs=1, batch_size=16, threads=1)
    return prepare_teacher(dataset, settings, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def targets(teacher: Teacher, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Targets:
    names = wanted_features(teacher, BOTH)
    assert names == ("hint.blocks.0", "hint.blocks.1", "attention.blocks.0", "attention.blocks.1")
    return make_targets(teacher, dataset, 2, tmp_path_factory.mktemp("cache"), features=names)


def test_cached_features_are_those_of_the_teacher_in_half_precision(teacher: Teacher, targets: Targets) -> None:
    assert teacher.features is not None
    opened = Targets.open(targets.folder)
    logits, maps = teacher.features(np.asarray(targets.images[1, 64:]), ("blocks.1",))
    assert np.allclose(opened.logits[1, 64:], logits, atol=1e-5)
    for name, expected in (
        ("hint.blocks.1", maps["blocks.1"]),
        ("attention.blocks.1", attention_map(torch.from_numpy(maps["blocks.1"])).numpy()),
    ):
        kept = opened.features[name][1, 64:].astype(np.float32)
        assert opened.features[name].dtype == np.float16
        scale = np.linalg.norm(kept.reshape(32, -1), axis=1) / np.linalg.norm(expected.reshape(32, -1), axis=1)
        assert np.allclose(kept, expected * scale[:, None, None, None], atol=2e-3)


def test_large_maps_are_kept_small() -> None:
    maps = np.random.default_rng(0).random((2, 8, 16, 16), dtype=np.float32)
    assert reduced("hint.x", maps).shape == (2, 8, 4, 4)
    assert reduced("attention.x", maps).shape == (2, 1, 16, 16)


def test_targets_without_features_keep_their_key(teacher: Teacher, dataset: Dataset, tmp_path: Path) -> None:
    plain = make_targets(teacher, dataset, 2, tmp_path)
    assert plain.features == {}
    assert plain.key != make_targets(teacher, dataset, 2, tmp_path, features=("hint.blocks.0",)).key


def test_what_never_sees_features_finds_the_same_key_with_and_without_them(
    teacher: Teacher, dataset: Dataset, tmp_path: Path
) -> None:
    """Answers of the network, those that others were mixed into, and those at a smaller side."""
    small = tiny_dataset(resolution=8)
    keys: list[list[str]] = []
    for features in ((), ("hint.blocks.0",)):
        targets = make_targets(teacher, dataset, 1, tmp_path, features=features)
        mixed = with_logits(targets, lambda t=targets: np.asarray(t.logits), "others")  # type: ignore[misc]
        write_context(tmp_path / "context.json", (small, dataset), mixed, tmp_path / "cache", 0)
        open_context.cache_clear()
        sides = [open_context(str(tmp_path / "context.json"), side).targets for side in (8, 16)]
        keys.append([t.answers_key for t in (targets, mixed, *sides)])
        assert all((t.key == t.answers_key) == (not features) for t in (targets, mixed, *sides))
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 3  # the last one is that of the mixed answers


@pytest.mark.parametrize("name", ["hints", "attention"])
def test_teachers_that_give_logits_only_are_refused_with_the_setting(name: str, teacher: Teacher) -> None:
    wanted = replace(DistillSettings(), **{name: 1.0})
    given = TeacherSettings(kind="onnx", weights="teacher.onnx")
    with pytest.raises(ConfigError, match=rf"distill\.{name}: a teacher of kind 'onnx' .* --set distill\.{name}=0"):
        check_teacher_features(given, wanted)
    with pytest.raises(ConfigError, match=rf"distill\.{name}: the teacher .* gives logits only"):
        wanted_features(replace(teacher, features=None), wanted)
    with pytest.raises(ConfigError, match=r"distill\.teacher_layers: .* such as .*layer2"):
        check_teacher_features(TeacherSettings(kind="torchvision", name="resnet18", weights="w.pt"), wanted)
    check_teacher_features(given, DistillSettings())


def test_a_layer_that_the_teacher_does_not_have_is_named(teacher: Teacher, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layer 'blocks\.7'.*its parts are stem, blocks, classifier"):
        make_targets(teacher, dataset, 1, tmp_path, features=("hint.blocks.7",))
    with pytest.raises(ConfigError, match=r"'classifier' gives no maps"):
        make_targets(teacher, dataset, 1, tmp_path, features=("hint.classifier",))


def test_the_last_layers_are_compared_with_the_last_stage_and_the_others_evenly_before() -> None:
    assert compared_stages(1, 4) == [3]
    assert compared_stages(2, 4) == [1, 3]
    assert compared_stages(3, 2) == [0, 0, 1]


def test_adapters_are_learned_and_kept_in_checkpoints_and_never_exported(
    targets: Targets, dataset: Dataset, tmp_path: Path
) -> None:
    def logits(stops: tuple[int, ...], checkpoint: Path | None) -> np.ndarray:
        for stop in stops:
            student = new_student(tiny_candidate(), 0)
            train_student(student, targets, BOTH, seed=0, stop_epoch=stop, checkpoint=checkpoint)
        assert not any("convs" in name for name in (*student.state_dict(), *folded_weights(student)))
        return predict_logits(student, dataset.val.images, dataset.mean, dataset.std)

    whole = logits((3,), None)
    assert np.array_equal(whole, logits((1, 3), tmp_path / "student.ckpt"))
    kept = torch.load(tmp_path / "student.ckpt", weights_only=True)["adapters"]
    start = Adapters(new_student(tiny_candidate(), 0), {n: f for n, f in targets.features.items()}, 0).state_dict()
    assert kept.keys() == start.keys()
    assert not any(torch.equal(kept[name], start[name]) for name in kept)


def test_hints_bring_the_students_maps_nearer_to_the_teachers(targets: Targets) -> None:
    """Measured by the best linear map from student to teacher channels, whatever the adapter is."""

    def rest(settings: DistillSettings) -> float:
        student = new_student(tiny_candidate(), 0)
        train_student(student, targets, settings, seed=0)
        with torch.no_grad(), stage_maps(student) as maps:
            student(normalised(targets.images[0], targets.mean, targets.std))
        own = maps[-1].permute(0, 2, 3, 1).reshape(-1, maps[-1].shape[1])
        teacher = torch.from_numpy(targets.features["hint.blocks.1"][0].astype(np.float32))
        aim = torch.nn.functional.adaptive_avg_pool2d(teacher, maps[-1].shape[-1]).permute(0, 2, 3, 1)
        aim = aim.reshape(len(own), -1)
        own = torch.cat([own, torch.ones(len(own), 1)], 1)
        return float((own @ torch.linalg.lstsq(own, aim).solution - aim).square().mean())

    base = DistillSettings(epochs=12, batch_size=32, recalibration_images=64)
    assert rest(replace(base, hints=10.0)) < 0.9 * rest(base)


def test_a_loss_without_its_features_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"distill\.hints: the cached targets hold no features"):
        train_student(new_student(tiny_candidate(), 0), tiny_targets(dataset), BOTH, seed=0)


def test_features_travel_with_the_context_to_other_machines(targets: Targets, dataset: Dataset, tmp_path: Path) -> None:
    write_context(tmp_path / "context.json", (dataset,), targets, tmp_path / "cache", 0)
    record, files = context_parts(tmp_path / "context.json")
    (tmp_path / "there").mkdir()
    for name, file in files.items():
        shutil.copy(file, tmp_path / "there" / name)
    opened = open_context(str(place_context(record, tmp_path / "there")), dataset.resolution).targets
    assert opened.features.keys() == targets.features.keys()
    assert all(np.array_equal(opened.features[name], kept) for name, kept in targets.features.items())


def test_a_network_that_teaches_nothing_gives_no_features_either() -> None:
    teacher = TeacherSettings(weight=0.0, files=(SoftLabelFile("lab", "lab.npy"),))
    with pytest.raises(ConfigError, match=r"distill\.attention: teacher\.weight is 0, so the network teaches nothing"):
        check_teacher_features(teacher, DistillSettings(attention=3.0))
    check_teacher_features(teacher, DistillSettings())
