"""A finalist's files, each written once; what is deployed of it; and the mapped arrays that workers train on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nas.core.errors import InterruptedRunError, NasError, RecordError, RunMismatchError, StorageError, TrainingError
from nas.core.jsonio import read_record
from nas.core.records import (
    BlockConfig,
    Candidate,
    ExitConfig,
    HeadConfig,
    Precision,
    QuantSpec,
    StageConfig,
    StemConfig,
)
from nas.core.walk import expand
from nas.data import AugmentSettings, Dataset, DataSettings, Split, augmented, evenly, load_dataset
from nas.devices.onnxruntime_cpu import run_model
from nas.export.graph import network_model, tensors_model
from nas.models.student import Student, folded_weights
from nas.recipe import deployed
from nas.recipe import finish as finish_module
from nas.recipe import pruning as pruning_module
from nas.recipe import score as score_module
from nas.recipe import supernet as supernet_module
from nas.recipe.context import Context, ContextFile, open_context, write_context
from nas.recipe.deployed import calibrated, deployed_logits, raw_pixels
from nas.recipe.finish import (
    FinishedStudent,
    FinishJob,
    deployed_parts,
    finish_student,
    finished_confidence,
    finished_logits,
    kept_exits,
    load_deployed,
    load_finished,
    precision_name,
)
from nas.recipe.records import read_scored, top1_per_exit
from nas.recipe.score import ScoreJob, candidate_sensitivity, score
from nas.recipe.settings import SupernetSettings
from nas.recipe.supernet import train_supernet
from nas.space.space import space_from_plain
from nas.train import trainer as trainer_module
from nas.train.evaluate import predict_logits, recalibrate_bn
from nas.train.settings import DistillSettings
from nas.train.targets import Targets, make_targets
from nas.train.teacher import Teacher
from nas.train.trainer import new_student, train_student

SEED = 3
DISTILL = DistillSettings(epochs=2, variants=2, batch_size=32, recalibration_images=64)
Weights = dict[str, np.ndarray]


def candidate() -> Candidate:
    """16 px, two stages, one exit."""
    stages = (
        StageConfig((BlockConfig(4, 8, 8, stride=2),)),
        StageConfig((BlockConfig(8, 16, 8, use_se=True, activation="hard_swish"),)),
    )
    return Candidate(16, 10, StemConfig(4), stages, HeadConfig(), (ExitConfig(0, 4),))


FP32 = candidate().precisions
INT8 = candidate().with_precision("int8").precisions
MIXED: tuple[Precision, ...] = ("fp32", "int8", "int8", "fp32")


def colours(dataset: Dataset) -> Teacher:
    """A teacher that tells the mean colour."""
    weights = np.random.default_rng(0).normal(0, 1, (3, 10)).astype(np.float32)

    def predict(images: np.ndarray) -> np.ndarray:
        return (images / 255.0).mean((1, 2)).astype(np.float32) @ weights

    return Teacher("colours", "a" * 64, "fp32", 0.5, 0.5, 0.0, None, None, dataset.resolution, predict, lambda: b"")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)


def write(dataset: Dataset, folder: Path, *others: Dataset) -> tuple[Path, Targets, ContextFile]:
    """A context with all its arrays below a folder."""
    targets = make_targets(colours(dataset), dataset, 2, folder / "cache")
    path = folder / "context.json"
    return path, targets, write_context(path, (dataset, *others), targets, folder / "cache", 0)


@pytest.fixture(scope="module")
def context_file(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(dataset, tmp_path_factory.mktemp("context"))[0]


@pytest.fixture(scope="module")
def context(context_file: Path) -> Context:
    return open_context(str(context_file), 16)


def job(context_file: Path, folder: Path, *precisions: tuple[Precision, ...]) -> FinishJob:
    """Precision and threshold of the finalist play no part in its training."""
    finalist = candidate().with_precision("int8").with_thresholds([0.5])
    stop = str(folder.parent / "stop")
    return FinishJob(
        finalist, str(context_file), str(folder), stop, DISTILL, SEED, 48, precisions, calibrate_confidence=False
    )


@pytest.fixture(scope="module")
def finished(context_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a student whose finishing was never disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "student"
    finish_student(job(context_file, folder, FP32, INT8))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(finished, tmp_path / "student"))


@pytest.fixture(scope="module")
def trained(context: Context) -> Student:
    """The same training without any files."""
    student = new_student(candidate(), SEED)
    train_student(student, context.targets, DISTILL, seed=SEED)
    return student


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with what changes when it is written anew."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def difference(reference: np.ndarray, other: np.ndarray) -> float:
    """|a - b| / |a|."""
    assert reference.shape == other.shape
    return float(np.linalg.norm(reference - other) / np.linalg.norm(reference))


def test_finished_student_is_a_record_and_its_files(finished: Path) -> None:
    record = read_record(FinishedStudent, finished / "finished.json")
    assert record.candidate == candidate()
    assert (record.schema, record.epochs) == (1, 2)
    assert record.cost_s > 0
    scores = [f"final-{split}-{p}" for split in ("val", "test") for p in ("fp32", "int8")]
    assert {p.stem.partition("-e")[0] for p in finished.iterdir() if p.stem.startswith("final-")} == set(scores)
    assert set(states(finished)) >= {"weights.safetensors", "quant.json", *(f"{s}.json" for s in scores)}
    assert not (finished / "finish.ckpt").exists()


def test_fp32_logits_are_those_of_the_trained_student(finished: Path, trained: Student, context: Context) -> None:
    for split, images in (("val", context.val), ("test", context.test)):
        logits = finished_logits(finished, split, FP32)
        assert logits.shape == (2, len(images), 10)
        assert np.array_equal(logits, predict_logits(trained, images, context.mean, context.std))


def test_int8_logits_are_those_of_the_exported_network(finished: Path, context: Context) -> None:
    weights, quant = load_finished(finished)
    model = network_model(
        candidate().with_precision("int8"), weights, context.mean, context.std, quant=quant, form="logits", batch=None
    )
    for split, images in (("val", context.val), ("test", context.test)):
        logits = finished_logits(finished, split, INT8)
        assert np.allclose(logits, np.stack(run_model(model, raw_pixels(images))), atol=1e-6)
        assert 1e-4 < difference(finished_logits(finished, split, FP32), logits) < 0.3


def test_weights_and_ranges_are_those_of_the_trained_student(
    finished: Path, trained: Student, context: Context
) -> None:
    weights, quant = load_finished(finished)
    expected = folded_weights(trained)
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    sample = evenly(context.sample, 48)
    assert quant == calibrated(candidate(), expected, context.mean, context.std, sample, run_model)
    assert quant.images == 48


def test_temperatures_are_in_what_is_deployed_and_not_in_what_is_trained_on(
    finished: Path, context_file: Path, context: Context, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    finish_student(replace(job(context_file, folder, FP32, INT8), calibrate_confidence=True))
    for precisions in (FP32, INT8):
        temperatures = [c.temperature for c in finished_confidence(folder, precisions)]
        assert len(temperatures) == 2 and all(abs(np.log(t)) > 0.05 for t in temperatures)
        scaled = finished_logits(folder, "test", precisions)
        raw = finished_logits(finished, "test", precisions)
        assert np.allclose(scaled, raw / np.array(temperatures, np.float32)[:, None, None], rtol=1e-5)
        weights, quant = load_deployed(folder, precisions)  # integers stay what they were, only the last scale changes
        model = network_model(
            candidate().with_precision(precisions), weights, context.mean, context.std, quant=quant, form="logits",
            batch=None,
        )  # fmt: skip
        assert np.allclose(np.stack(run_model(model, raw_pixels(context.test))), scaled, rtol=1e-4, atol=1e-4)
    assert finished_confidence(finished, FP32) == ()
    trained_on, _ = load_finished(folder)
    assert all(np.array_equal(trained_on[name], value) for name, value in load_finished(finished)[0].items())


@pytest.mark.parametrize("precisions", [FP32, INT8])
def test_accuracies_are_of_their_own_split(finished: Path, context: Context, precisions: tuple[Precision, ...]) -> None:
    for split, labels in (("val", context.val_labels), ("test", context.test_labels)):
        scored = read_scored(finished, f"final-{split}-{precision_name(precisions)}")
        assert scored is not None
        assert scored.arch_id == candidate().arch_id
        assert scored.top1 == top1_per_exit(finished_logits(finished, split, precisions), labels)


def test_a_call_on_a_finished_student_repeats_nothing(finished: Path, context_file: Path) -> None:
    before = states(finished)
    again = finish_student(job(context_file, finished, FP32, INT8))
    assert again == read_record(FinishedStudent, finished / "finished.json")
    assert states(finished) == before


def test_logits_that_a_kill_left_out_are_all_that_is_written(finished: Path, copy: Path, context_file: Path) -> None:
    for file in copy.glob("final-test-int8*"):
        file.unlink()
    before = states(copy)
    finish_student(job(context_file, copy, FP32, INT8))
    assert before.items() <= states(copy).items()
    assert set(states(copy)) == set(states(finished))
    assert np.array_equal(finished_logits(copy, "test", INT8), finished_logits(finished, "test", INT8))


def test_another_precision_is_added_without_training(copy: Path, context_file: Path) -> None:
    before = states(copy)
    finish_student(job(context_file, copy, MIXED))
    del before["finished.json"]  # it tells the new step
    assert before.items() <= states(copy).items()
    fp32, mixed, int8 = (finished_logits(copy, "val", p) for p in (FP32, MIXED, INT8))
    assert 0 < difference(fp32, mixed) < 0.3
    assert not np.array_equal(mixed, int8)


@pytest.mark.parametrize(
    ("precisions", "name"),
    [(FP32, "fp32"), (INT8, "int8"), (MIXED, "f32-i8-i8-f32"), (("fp16", "fp16", "int8"), "f16-f16-i8")],
)
def test_name_of_a_precision_tells_its_parts(precisions: tuple[Precision, ...], name: str) -> None:
    assert precision_name(precisions) == name


def test_a_stopped_student_keeps_its_epoch_and_ends_as_one_that_was_not_stopped(
    finished: Path, context_file: Path, tmp_path: Path
) -> None:
    folder, stop = tmp_path / "student", tmp_path / "stop"
    stop.touch()
    for _ in range(2):  # one epoch each: the second call goes on where the first was stopped
        with pytest.raises(InterruptedRunError, match="stopped at the end of an epoch"):
            finish_student(job(context_file, folder, INT8))
        assert list(states(folder)) == ["finish.ckpt"]
    record = finish_student(job(context_file, folder, INT8))  # no epoch is left to be stopped behind
    assert record.epochs == 2
    assert not (folder / "finish.ckpt").exists()
    weights, quant = load_finished(folder)
    expected, expected_quant = load_finished(finished)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert quant == expected_quant
    for split in ("val", "test"):
        for precisions in (FP32, INT8):
            a, b = (finished_logits(f, split, precisions) for f in (folder, finished))
            assert np.array_equal(a, b)


def test_a_student_that_diverges_is_not_finished(context_file: Path, tmp_path: Path) -> None:
    wild = replace(job(context_file, tmp_path / "student", INT8), distill=replace(DISTILL, lr=1e6, clip_norm=1e9))
    with pytest.raises(TrainingError, match=f"student {candidate().arch_id}: training diverged in epoch 1"):
        finish_student(wild)
    assert not list(tmp_path.rglob("*.json"))


def test_a_checkpoint_of_other_settings_is_refused(context_file: Path, tmp_path: Path) -> None:
    given = job(context_file, tmp_path / "student", INT8)
    (tmp_path / "stop").touch()
    with pytest.raises(InterruptedRunError):
        finish_student(given)
    (tmp_path / "stop").unlink()
    with pytest.raises(RunMismatchError, match=r"finish\.ckpt: this checkpoint belongs to another .* Delete it"):
        finish_student(replace(given, seed=SEED + 1))


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None])
def test_damaged_weights_say_what_to_delete(copy: Path, damage: bytes | None) -> None:
    file = copy / "weights.safetensors"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    with pytest.raises(StorageError, match=r"weights\.safetensors: cannot be read: .* Delete the folder and run again"):
        load_finished(copy)


def test_missing_ranges_and_logits_are_named(copy: Path) -> None:
    (copy / "quant.json").unlink()
    with pytest.raises(StorageError, match=r"quant\.json: cannot be read"):
        load_finished(copy)
    with pytest.raises(StorageError, match=r"student: no logits 'final-val-f32-i8-i8-f32'\. Delete the folder and run"):
        finished_logits(copy, "val", MIXED)
    next(copy.glob("final-val-fp32-e*.npy")).unlink()
    with pytest.raises(StorageError, match=r"final-val-fp32-e0002\.npy: cannot be read"):
        finished_logits(copy, "val", FP32)


# What is deployed: with and without exits, cut behind an exit.


@pytest.fixture(scope="module")
def large() -> Student:
    """Three stages, two exits; every weight and bias is random, so that none can stand for another."""
    stages = (
        StageConfig((BlockConfig(4, 8, 8, stride=2),)),
        StageConfig((BlockConfig(8, 24, 8, use_se=True, activation="hard_swish"), BlockConfig(8, 16, 12))),
        StageConfig((BlockConfig(12, 24, 12, 5),)),
    )
    exits = (ExitConfig(0, 6), ExitConfig(1))
    student = new_student(Candidate(16, 10, StemConfig(4), stages, HeadConfig(20, 8), exits), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.fixture(scope="module")
def parts(large: Student, context: Context) -> tuple[Weights, QuantSpec]:
    """Its weights and ranges."""
    recalibrate_bn(large, context.sample, context.mean, context.std)
    large.eval()
    weights = folded_weights(large)
    return weights, calibrated(large.candidate, weights, context.mean, context.std, context.sample, run_model)


def variant(whole: Candidate, cut: int | None, kept: tuple[int, ...]) -> Candidate:
    """The candidate that is deployed."""
    result = whole if cut is None else whole.truncated(cut)
    return replace(result, exits=tuple(result.exits[k] for k in kept))


KINDS = ("weight", "bias")
CUTS = [(None, (0, 1)), (None, (0,)), (None, (1,)), (None, ()), (0, ()), (1, ()), (1, (0,))]


@pytest.mark.parametrize(("cut", "kept"), CUTS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_deployed_network_gives_the_logits_of_the_student(
    large: Student,
    parts: tuple[Weights, QuantSpec],
    context: Context,
    precision: Precision,
    cut: int | None,
    kept: tuple[int, ...],
) -> None:
    whole = large.candidate.with_precision(precision)
    normalisation = (context.mean, context.std)
    if precision == "fp32":
        expected = predict_logits(large, context.test, *normalisation)
    else:
        expected = deployed_logits(whole, *parts, *normalisation, context.test)
    last = 2 if cut is None else cut
    expected = expected[[*kept, last]]

    deployed = variant(whole, cut, kept)
    weights, quant = deployed_parts(large.candidate, *parts, cut, kept_exits(large.candidate, deployed))
    model = network_model(deployed, weights, *normalisation, quant=quant, form="logits", batch=None)
    logits = np.stack(run_model(model, raw_pixels(context.test)))
    assert difference(expected, logits) < 1e-5


@pytest.mark.parametrize(("cut", "kept"), CUTS)
def test_deployed_parts_are_those_of_the_deployed_network_and_no_others(
    large: Student, parts: tuple[Weights, QuantSpec], context: Context, cut: int | None, kept: tuple[int, ...]
) -> None:
    deployed = variant(large.candidate, cut, kept)
    weights, quant = deployed_parts(large.candidate, *parts, cut, kept_exits(large.candidate, deployed))
    names = {f"{la.name}.{conv.name}.{kind}" for la in expand(deployed) for conv in la.convolutions for kind in KINDS}
    assert set(weights) == names
    _, tensors = tensors_model(deployed, weights, context.mean, context.std)
    assert quant.lo.keys() == quant.hi.keys() == set(tensors)
    assert quant.images == parts[1].images


def test_whole_student_is_deployed_as_it_is(large: Student, parts: tuple[Weights, QuantSpec]) -> None:
    weights, quant = deployed_parts(large.candidate, *parts, None, (0, 1))
    assert quant == parts[1]
    assert weights.keys() == parts[0].keys()
    assert all(weights[name] is parts[0][name] for name in weights)


# Logits of exported graphs.


def test_raw_pixels_are_channels_first_and_not_scaled() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    pixels = raw_pixels(images)
    assert (pixels.shape, pixels.dtype, pixels.flags["C_CONTIGUOUS"]) == ((2, 3, 4, 5), np.float32, True)
    assert all(np.array_equal(pixels[:, c], images[..., c]) for c in range(3))


def test_logits_of_many_images_come_in_their_order(
    large: Student, parts: tuple[Weights, QuantSpec], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (103, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(deployed, "PART_BYTES", 10 * images[0].nbytes * 4)
    assert deployed.images_at_once(images) == 10
    logits = deployed_logits(large.candidate, parts[0], None, context.mean, context.std, images)
    assert (logits.shape, logits.dtype) == ((3, 103, 10), np.float32)
    assert difference(predict_logits(large, images, context.mean, context.std), logits) < 1e-5


def test_ranges_are_over_the_given_images(parts: tuple[Weights, QuantSpec], large: Student, context: Context) -> None:
    dark = np.minimum(context.sample, 60)
    quant = calibrated(large.candidate, parts[0], context.mean, context.std, dark, run_model)
    pixels = (dark / 255.0 - np.array(context.mean)) / np.array(context.std)
    assert (quant.lo["image"], quant.hi["image"]) == pytest.approx((pixels.min(), pixels.max()), rel=1e-4)
    assert quant.images == len(dark) == 64
    assert quant.hi["image"] < parts[1].hi["image"]


# The arrays that workers map.


def test_context_gives_the_arrays_of_its_data_set(context: Context, dataset: Dataset) -> None:
    assert context.class_names == dataset.class_names
    assert (context.mean, context.std) == (dataset.mean, dataset.std)
    for found, given in (
        (context.val, dataset.val.images),
        (context.val_labels, dataset.val.labels),
        (context.test, dataset.test.images),
        (context.test_labels, dataset.test.labels),
        (context.sample, dataset.train.images),
        (context.targets.labels, dataset.train.labels),
    ):
        assert found.dtype == given.dtype
        assert np.array_equal(found, given)
    assert context.targets.images.shape == (2, 64, 16, 16, 3)

    assert np.allclose(context.targets.logits[1], colours(dataset).predict(context.targets.images[1]))


def test_lower_resolution_shows_the_same_images_and_keeps_the_teachers_answers(
    dataset: Dataset, tmp_path: Path
) -> None:
    fine = load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 24)
    path, targets, record = write(fine, tmp_path, dataset)
    assert [files.resolution for files in record.resolutions] == [16, 24]
    low, full = (open_context(str(path), side) for side in (16, 24))
    assert np.array_equal(low.targets.logits, full.targets.logits)
    assert np.array_equal(full.targets.images, targets.images)
    for v in range(2):
        expected = augmented(dataset.train.images, dataset.augment, np.random.default_rng([0, v]))
        assert np.array_equal(low.targets.images[v], expected)
    assert (low.targets.key, full.targets.key) == (f"{targets.key}-16", targets.key)
    assert np.array_equal(low.val, dataset.val.images)
    assert np.array_equal(full.test, fine.test.images)
    assert low.mean == full.mean == fine.mean
    assert np.array_equal(low.val_labels, fine.val.labels)


def test_arrays_are_written_once_for_all_runs(dataset: Dataset, tmp_path: Path) -> None:
    path, targets, record = write(dataset, tmp_path)
    arrays = Path(record.val_labels).parent
    before = states(arrays)
    assert write_context(tmp_path / "other.json", (dataset,), targets, tmp_path / "cache", 0) == record
    assert states(arrays) == before
    assert (tmp_path / "other.json").read_bytes() == path.read_bytes()


def test_resolution_that_is_not_there_is_an_error(context_file: Path) -> None:
    with pytest.raises(StorageError, match=r"context\.json: no arrays at 20 px; run the same command again"):
        open_context(str(context_file), 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"context\.json: cannot be read"),
        ("{", r"context\.json: not valid JSON"),
        ('{"dataset": "x"}', r"context\.json: field 'class_names' of ContextFile is missing"),
        ('{"data": "x"}', r"context\.json: unknown field 'data' of ContextFile"),
    ],
)
def test_context_record_that_is_missing_or_damaged_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "context.json").write_text(text)
    with pytest.raises(NasError, match=message):
        open_context(str(tmp_path / "context.json"), 16)


def unlink(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("val", unlink),
        ("val", empty),
        ("val", shorten),
        ("test", shorten),
        ("sample", empty),
        ("val_labels", unlink),
        ("test_labels", shorten),
    ],
)
def test_array_that_is_missing_or_damaged_says_what_to_delete(
    dataset: Dataset, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path, _, record = write(dataset, tmp_path)
    damage(Path(record.val_labels).with_name(f"{name}.npy"))
    with pytest.raises(StorageError, match=rf"/{name}\.npy: cannot be read: .* Delete it and run the same command"):
        open_context(str(path), 16)


def test_damaged_targets_say_what_to_delete(dataset: Dataset, tmp_path: Path) -> None:
    path, _, record = write(dataset, tmp_path)
    empty(Path(record.targets) / "logits.npy")
    with pytest.raises(StorageError, match=r"cached targets cannot be read: .* Delete the folder"):
        open_context(str(path), 16)


def test_ranges_of_another_student_are_refused(
    finished: Path, parts: tuple[Weights, QuantSpec], large: Student, context: Context
) -> None:
    """What keeps a wrong pair of files from being exported."""
    _, other = load_finished(finished)
    with pytest.raises(RecordError, match=r"the quantization ranges have no tensor .*; calibrate this"):
        deployed_logits(large.candidate.with_precision("int8"), parts[0], other, context.mean, context.std, context.val)


def test_everything_that_looks_at_a_few_images_sees_every_class_of_a_sorted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of a folder lie class by class; here every pixel says the class."""

    def by_class(count: int) -> Split:
        labels = np.sort(np.arange(count) % 10)
        images = np.broadcast_to(25 * labels[:, None, None, None], (count, 16, 16, 3))
        return Split(np.ascontiguousarray(images, dtype=np.uint8), labels)

    plain = load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)
    still = AugmentSettings(0.0, False, brightness=0.0, contrast=0.0)
    folder = replace(plain, train=by_class(1300), val=by_class(600), augment=still, sha256="sorted")
    seen: dict[str, set[int]] = {}

    def watched(module: ModuleType, name: str, place: int) -> None:
        real = getattr(module, name)

        def look(*args: Any) -> Any:
            seen.setdefault(f"{module.__name__}.{name}", set()).update(np.unique(args[place] // 25).tolist())
            return real(*args)

        monkeypatch.setattr(module, name, look)

    watched(trainer_module, "recalibrate_bn", 1)
    watched(supernet_module, "recalibrate_bn", 1)
    for module in (finish_module, score_module):
        watched(module, "calibrated", 4)
        watched(module, "sensitivity", 5)
    watched(pruning_module, "normalised", 0)
    context_file = write(folder, tmp_path)[0]
    few = replace(DISTILL, epochs=1, recalibration_images=20)
    whole = replace(job(context_file, tmp_path / "student", INT8), distill=few, calibration_images=20)
    finish_student(replace(whole, importance="taylor", sensitivity=("fp32", "int8")))
    targets = {16: open_context(str(context_file), 16).targets}
    small = space_from_plain(
        {
            "name": "small",
            "source": "made for this test",
            "resolution": 16,
            "stem": {"channels": 4, "activation": "relu"},
            "stages": [{"name": "a", "width": 8, "depth": 1, "stride": 2, "kernel_size": 3, "expansion": [1, 2],
                        "activation": "relu"}],
            "head": {},
            "precision": {"choices": ["fp32", "int8"]},
        },
        "small",
        10,
    )  # fmt: skip
    train_supernet(small, targets, few, SupernetSettings(steps=2, batch_size=16), tmp_path / "supernet")
    smallest = small.decode(small.smallest()).with_precision("int8")
    scored = ScoreJob(
        smallest, "supernet", str(context_file), str(tmp_path / "students"), str(tmp_path / "supernet"),
        str(tmp_path / "stop"), few, 0, 0, 20,
    )  # fmt: skip
    score(scored)
    candidate_sensitivity(scored, ("fp32", "int8"))
    assert len(seen) == 7
    assert {name: len(classes) for name, classes in seen.items()} == dict.fromkeys(seen, 10)
