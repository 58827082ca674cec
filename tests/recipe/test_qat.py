"""Quantization-aware training of a finished student: its steps and files, and the same result after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_finish import DISTILL, FP32, INT8, MIXED, candidate, job, states, write

from nas.core.errors import ConfigError, InterruptedRunError
from nas.core.records import Precision
from nas.data import DataSettings, load_dataset
from nas.recipe.context import open_context
from nas.recipe.deployed import deployed_logits
from nas.recipe.finish import FinishJob, finish_student, finished_logits, load_finished
from nas.recipe.settings import QatSettings

QAT = QatSettings(epochs=2, lr=1.0, least_loss=-1)


@pytest.fixture(scope="module")
def context_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)
    return write(dataset, tmp_path_factory.mktemp("context"))[0]


def qat_job(context_file: Path, folder: Path, *precisions: tuple[Precision, ...], qat: QatSettings = QAT) -> FinishJob:
    return replace(job(context_file, folder, *precisions), qat=qat, seed=4)


@pytest.fixture(scope="module")
def trained(context_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose int8 network was trained, undisturbed."""
    folder = tmp_path_factory.mktemp("trained") / "student"
    finish_student(qat_job(context_file, folder, INT8, MIXED))
    return folder


def test_the_record_tells_every_step_and_what_was_kept_is_deployed(trained: Path, context_file: Path) -> None:
    record = finish_student(qat_job(context_file, trained, INT8, MIXED))
    steps = [(s.name, s.epochs, s.precision) for s in record.steps]
    mixed = "f32-i8-i8-f32"
    assert steps == [
        ("distil", 2, ""),
        *(("calibrate", 0, "int8"), ("QAT", 2, "int8")),
        *(("calibrate", 0, mixed), ("QAT", 2, mixed)),
    ]
    assert record.cost_s == pytest.approx(sum(s.cpu_s for s in record.steps))
    assert record.steps[2].note == "kept" and record.steps[2].top1 > record.steps[1].top1
    context = open_context(str(context_file), 16)
    base, own = load_finished(trained), load_finished(trained, INT8)
    assert any(not np.array_equal(base[0][name], own[0][name]) for name in base[0])
    for split, images in (("val", context.val), ("test", context.test)):
        int8 = deployed_logits(candidate().with_precision("int8"), *own, context.mean, context.std, images)
        assert np.array_equal(finished_logits(trained, split, INT8), int8)


def test_other_precisions_keep_the_float_weights(trained: Path) -> None:
    weights, quant = load_finished(trained)
    for precisions in (FP32, ("int8", "fp32", "fp32", "fp32")):
        own, ranges = load_finished(trained, precisions)
        assert ranges == quant
        assert all(np.array_equal(own[name], weights[name]) for name in weights)


def test_a_call_on_a_trained_student_repeats_nothing(trained: Path, context_file: Path) -> None:
    before = states(trained)
    assert not [name for name in before if name.endswith(".ckpt")]
    finish_student(qat_job(context_file, trained, INT8, MIXED))
    assert states(trained) == before


def test_what_is_no_better_is_not_kept(context_file: Path, tmp_path: Path) -> None:
    record = finish_student(qat_job(context_file, tmp_path / "s", INT8, qat=replace(QAT, lr=1e-12)))
    assert record.steps[-1].note == "not kept: not better than calibration alone"
    assert not list(tmp_path.rglob("weights-*"))


def test_a_training_that_diverges_leaves_what_calibration_gave(context_file: Path, tmp_path: Path) -> None:
    wild = qat_job(context_file, tmp_path / "s", INT8)
    finish_student(replace(wild, qat=QatSettings()))
    record = finish_student(replace(wild, precisions=(MIXED,), distill=replace(DISTILL, lr=1e6, clip_norm=1e9)))
    assert record.steps[-1].note.startswith("not kept: student")
    assert "try --set finish.qat_lr" in record.steps[-1].note
    assert not list(tmp_path.rglob("weights-*"))


def test_it_is_done_only_where_calibration_loses_enough(context_file: Path, tmp_path: Path) -> None:
    record = finish_student(qat_job(context_file, tmp_path / "s", INT8, qat=replace(QAT, least_loss=0.99)))
    assert [s.name for s in record.steps] == ["distil", "calibrate"]


def test_a_stopped_training_ends_as_one_that_was_not_stopped(trained: Path, context_file: Path, tmp_path: Path) -> None:
    folder, stop = tmp_path / "student", tmp_path / "stop"
    stopped = qat_job(context_file, folder, INT8, MIXED)
    for _ in range(6):  # one epoch each: of the distillation, then of each precision
        stop.touch()
        with pytest.raises(InterruptedRunError):
            finish_student(stopped)
    stop.unlink()
    record = finish_student(stopped)
    assert [s.name for s in record.steps] == ["distil", "calibrate", "QAT", "calibrate", "QAT"]
    for precisions in (INT8, MIXED):
        (here, ranges), (there, expected) = load_finished(folder, precisions), load_finished(trained, precisions)
        assert ranges == expected
        assert all(np.array_equal(here[name], there[name]) for name in there)
        for split in ("val", "test"):
            assert np.array_equal(*(finished_logits(f, split, precisions) for f in (folder, trained)))


@pytest.mark.parametrize(("field", "value"), [("epochs", -1), ("lr", 0.0), ("least_loss", 1.5)])
def test_settings_that_make_no_sense_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"finish\.qat_{field} must be .*{value}"):
        QatSettings(**{field: value})  # type: ignore[arg-type]
