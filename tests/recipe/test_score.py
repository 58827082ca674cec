"""The score of one candidate: of the network in its precision, and read where it is there already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nas.core.errors import InterruptedRunError, RecordError, RunMismatchError, StorageError, TrainingError
from nas.core.jsonio import write_record
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, Precision, StageConfig, StemConfig
from nas.data import Dataset, DataSettings, evenly, load_dataset
from nas.devices.onnxruntime_cpu import run_model
from nas.export.graph import network_model
from nas.models.student import Student, folded_weights
from nas.recipe.context import Context, open_context, write_context
from nas.recipe.deployed import calibrated, raw_pixels
from nas.recipe.records import read_logits, read_scored, top1_per_exit
from nas.recipe.score import ScoreJob, Source, score, student_folder
from nas.recipe.settings import SupernetSettings
from nas.recipe.supernet import inherited_student, open_supernet, train_supernet
from nas.space.space import SearchSpace, space_from_plain
from nas.train.evaluate import predict_logits
from nas.train.settings import DistillSettings
from nas.train.targets import make_targets
from nas.train.teacher import Teacher
from nas.train.trainer import new_student, train_student

SEED = 5
IMAGES = 48  # of the 64 that are kept
DISTILL = DistillSettings(epochs=4, variants=2, batch_size=32, recalibration_images=64)
PLAIN = {
    "name": "small",
    "source": "made for this test",
    "resolution": 16,
    "stem": {"channels": 4, "activation": "relu"},
    "stages": [
        {"name": "a", "width": 8, "depth": 1, "stride": 2, "kernel_size": [3, 5], "expansion": 2, "activation": "relu"},
        {"name": "b", "width": 8, "depth": [1, 2], "stride": 1, "kernel_size": 3, "expansion": 2, "activation": "relu"},
    ],
    "head": {},
    "exits": {"after": ["a"], "max_count": 1, "hidden_channels": 4},
    "precision": {"choices": ["fp32", "int8"]},
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)


@pytest.fixture(scope="module")
def context_file(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arrays of a run, under a teacher that tells the mean colour."""
    folder = tmp_path_factory.mktemp("context")
    weights = np.random.default_rng(0).normal(0, 1, (3, 10)).astype(np.float32)

    def predict(images: np.ndarray) -> np.ndarray:
        return (images / 255.0).mean((1, 2)).astype(np.float32) @ weights

    teacher = Teacher("colours", "a" * 64, "fp32", 0.5, 0.5, 0.0, None, None, 16, predict, lambda: b"")
    targets = make_targets(teacher, dataset, 2, folder)
    write_context(folder / "context.json", (dataset,), targets, folder, 0)
    return folder / "context.json"


@pytest.fixture(scope="module")
def context(context_file: Path) -> Context:
    return open_context(str(context_file), 16)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(PLAIN, "small", 10)


@pytest.fixture(scope="module")
def supernet(space: SearchSpace, context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supernet")
    settings = SupernetSettings(steps=4, batch_size=16)
    train_supernet(space, {16: context.targets}, DISTILL, settings, folder)
    return folder


def candidate(precision: Precision | tuple[Precision, ...] = "fp32", width: int = 8) -> Candidate:
    """Two stages, one exit."""
    first = BlockConfig(4, 8, width, stride=2)
    second = BlockConfig(width, 16, 12, use_se=True, activation="hard_swish")
    stages = (StageConfig((first,)), StageConfig((second,)))
    return Candidate(16, 10, StemConfig(4), stages, HeadConfig(), (ExitConfig(0),)).with_precision(precision)


@pytest.fixture
def job(context_file: Path, tmp_path: Path) -> ScoreJob:
    """Two epochs of the student's own training."""
    students, stop = str(tmp_path / "students"), str(tmp_path / "stop")
    return ScoreJob(candidate(), "standalone", str(context_file), students, "", stop, DISTILL, 2, SEED, IMAGES)


@pytest.fixture
def inherited(job: ScoreJob, supernet: Path, space: SearchSpace) -> ScoreJob:
    """A candidate of the supernet's space, without training of its own."""
    largest = space.decode(space.largest()).with_precision("fp32")
    return replace(job, candidate=largest, source="supernet", supernet=str(supernet), epochs=0)


@pytest.fixture(scope="module")
def trained(context: Context) -> Student:
    """The two epochs without any files."""
    student = new_student(candidate(), SEED)
    train_student(student, context.targets, DISTILL, seed=SEED, stop_epoch=2)
    return student


def folder(job: ScoreJob) -> Path:
    return student_folder(job.students, job.candidate.arch_id)


def logits(job: ScoreJob) -> np.ndarray:
    """Logits of a score, computed where they are missing."""
    return read_logits(folder(job), score(job))


def states(job: ScoreJob) -> dict[str, tuple[int, int]]:
    """Every file of the student with what changes when it is written anew."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder(job).iterdir()}


def quantized(student: Student, precisions: tuple[Precision, ...], context: Context, images: int) -> np.ndarray:
    """Logits of a student's exported graph with ranges over so many images, worked out step by step."""
    deployed = student.candidate.with_precision(precisions)
    weights, normalisation = folded_weights(student), (context.mean, context.std)
    quant = calibrated(deployed, weights, *normalisation, evenly(context.sample, images), run_model)
    model = network_model(deployed, weights, *normalisation, quant=quant, form="logits", batch=None)
    return np.stack(run_model(model, raw_pixels(context.val)))


def difference(reference: np.ndarray, other: np.ndarray) -> float:
    """|a - b| / |a|."""
    assert reference.shape == other.shape
    return float(np.linalg.norm(reference - other) / np.linalg.norm(reference))


@pytest.mark.parametrize(
    ("source", "epochs", "precisions", "name"),
    [
        ("standalone", 2, ("fp32",) * 4, "standalone-2-fp32"),
        ("standalone", 8, ("int8",) * 4, "standalone-8-int8"),
        ("supernet", 0, ("fp32",) * 4, "supernet-0-fp32"),
        ("supernet", 0, ("int8", "fp32", "int8", "int8"), "supernet-0-i8-f32-i8-i8"),
    ],
)
def test_name_of_a_score_tells_where_it_comes_from(
    job: ScoreJob, source: Source, epochs: int, precisions: tuple[Precision, ...], name: str
) -> None:
    assert replace(job, candidate=candidate(precisions), source=source, epochs=epochs).name == name


def test_fp32_score_is_of_the_trained_student(job: ScoreJob, trained: Student, context: Context) -> None:
    scored = score(job)
    assert (scored.arch_id, scored.epochs) == (candidate().arch_id, 2)
    assert scored.cost_s > 0
    found = read_logits(folder(job), scored)
    assert found.shape == (2, 40, 10)
    assert difference(found, predict_logits(trained, context.val, context.mean, context.std)) < 1e-5
    assert scored.top1 == top1_per_exit(found, context.val_labels)
    assert sorted(states(job)) == ["score-2.ckpt", "standalone-2-fp32-e0002.npy", "standalone-2-fp32.json"]


@pytest.mark.parametrize("precisions", [("int8",) * 4, ("fp32", "int8", "fp32", "fp32")])
def test_score_in_another_precision_is_of_the_quantized_network(
    job: ScoreJob, trained: Student, context: Context, precisions: tuple[Precision, ...]
) -> None:
    other = replace(job, candidate=candidate(precisions))
    found = logits(other)
    assert np.allclose(found, quantized(trained, precisions, context, IMAGES), atol=1e-6)
    assert 1e-4 < difference(predict_logits(trained, context.val, context.mean, context.std), found) < 0.3
    assert replace(read_scored(folder(other), other.name), cost_s=0.0) == score(other)
    assert read_scored(folder(other), job.name) is None


def test_ranges_are_over_as_many_images_as_the_job_says(job: ScoreJob, trained: Student, context: Context) -> None:
    few = replace(job, candidate=candidate("int8"), images=2)
    found = logits(few)
    assert np.allclose(found, quantized(trained, few.candidate.precisions, context, 2), atol=1e-6)
    assert difference(quantized(trained, few.candidate.precisions, context, IMAGES), found) > 1e-4


def test_precisions_of_a_student_share_its_training(job: ScoreJob) -> None:
    score(job)
    before = states(job)
    other = replace(job, candidate=candidate("int8").with_thresholds([0.4]))
    score(other)
    assert before.items() <= states(other).items()
    assert sorted(set(states(other)) - set(before)) == [
        "ranges-standalone-2-48.json",
        "standalone-2-int8-e0002.npy",
        "standalone-2-int8.json",
    ]


def test_a_score_that_is_there_is_read_and_not_computed_again(job: ScoreJob) -> None:
    first = score(job)
    before = states(job)
    free = replace(first, cost_s=0.0)  # what it took was counted the first time
    assert score(job) == free
    assert score(replace(job, candidate=job.candidate.with_thresholds([0.9]))) == free
    assert states(job) == before
    marked = replace(first, epochs=77)
    write_record(folder(job) / f"{job.name}.json", marked)
    assert score(replace(job, context="no data are needed")) == replace(marked, cost_s=0.0)


def test_inherited_score_that_is_there_is_read_and_not_computed_again(inherited: ScoreJob) -> None:
    first = score(inherited)
    before = states(inherited)
    assert score(replace(inherited, supernet="no weights are needed")) == replace(first, cost_s=0.0)
    assert states(inherited) == before


def test_a_damaged_score_is_named(job: ScoreJob) -> None:
    folder(job).mkdir(parents=True)
    (folder(job) / f"{job.name}.json").write_text("{")
    with pytest.raises(RecordError, match=r"standalone-2-fp32\.json: not valid JSON"):
        score(job)


def test_standalone_goes_on_from_the_epoch_where_it_stopped(job: ScoreJob, tmp_path: Path) -> None:
    score(replace(job, epochs=1))
    stop = Path(job.stop_file)
    stop.touch()
    with pytest.raises(InterruptedRunError, match="stopped at the end of an epoch"):
        score(job)  # the second epoch; where it began anew, a third call would be stopped as well
    assert read_scored(folder(job), job.name) is None
    score(job)
    stop.unlink()
    straight = replace(job, students=str(tmp_path / "straight"))
    assert np.array_equal(logits(job), logits(straight))
    assert read_scored(folder(job), "standalone-1-fp32") is not None


def test_longer_training_gives_another_score_beside_the_first(job: ScoreJob, tmp_path: Path) -> None:
    short = logits(job)
    before = states(job)
    longer = replace(job, epochs=4)
    assert not np.array_equal(logits(longer), short)
    assert score(longer).epochs == 4
    assert np.array_equal(logits(job), short)
    assert before.items() <= states(job).items()
    assert np.array_equal(logits(longer), logits(replace(longer, students=str(tmp_path / "straight"))))


def test_a_rung_is_not_scored_from_a_longer_training(job: ScoreJob, tmp_path: Path) -> None:
    score(replace(job, epochs=1))
    score(replace(job, epochs=4))
    sibling = replace(job, candidate=candidate("int8"), epochs=1)
    assert np.array_equal(logits(sibling), logits(replace(sibling, students=str(tmp_path / "fresh"))))


def test_checkpoint_of_another_training_is_refused(job: ScoreJob) -> None:
    score(replace(job, epochs=1))
    with pytest.raises(RunMismatchError, match=r"score-2\.ckpt: this checkpoint belongs to another .* Delete it"):
        score(replace(job, seed=SEED + 1))


def test_a_training_that_diverges_leaves_no_score(job: ScoreJob) -> None:
    wild = replace(job, distill=replace(DISTILL, lr=1e6, clip_norm=1e9))
    with pytest.raises(TrainingError, match=f"student {candidate().arch_id}: training diverged in epoch 1"):
        score(wild)
    assert read_scored(folder(wild), wild.name) is None


def test_supernet_score_is_of_copied_weights(inherited: ScoreJob, context: Context) -> None:
    normalisation = (context.mean, context.std)
    student = inherited_student(
        open_supernet(inherited.supernet), inherited.candidate, evenly(context.sample, IMAGES), *normalisation
    )
    assert difference(logits(inherited), predict_logits(student, context.val, *normalisation)) < 1e-5
    scored = score(inherited)
    assert (scored.epochs, scored.top1) == (0, top1_per_exit(logits(inherited), context.val_labels))
    assert sorted(states(inherited)) == ["supernet-0-fp32-e0000.npy", "supernet-0-fp32.json"]

    int8 = inherited.candidate.with_precision("int8")
    found = logits(replace(inherited, candidate=int8))
    assert np.allclose(found, quantized(student, int8.precisions, context, IMAGES), atol=1e-6)
    assert not np.array_equal(found, logits(inherited))


def test_missing_supernet_is_named(inherited: ScoreJob, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"supernet\.json: cannot be read"):
        score(replace(inherited, supernet=str(tmp_path / "nowhere")))
    assert not folder(inherited).exists()
