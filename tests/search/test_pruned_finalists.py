"""How wide the blocks of a finalist become, from rows measured for it, and the students that come of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_examples import Notes, Prepared

from nas.compress.prune import BlockImportance, prunable, removed_share, useful_widths
from nas.core.errors import ConfigError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.devices.base import MeasureJob
from nas.latency.keys import layer_of_key
from nas.recipe.finish import FinishedStudent, FinishJob
from nas.recipe.pruning import write_importance
from nas.search.finals import build_points, finish
from nas.search.pruning import fastest_precision, pruned_jobs, width_costs
from nas.search.settings import FinishSettings
from nas.testing import SimulatedDevice

STEP = 12  # channels that the device of these tests computes together


class Stepped(SimulatedDevice):
    """A block takes time by every dozen of its channels; in int8 half of it."""

    def latency_ms(self, job: MeasureJob) -> float:
        if job.kind != "row" or not job.key.startswith("ir|"):
            return super().latency_ms(job)
        ms = 0.01 + 0.002 * math.ceil(layer_of_key(job.key).expanded_channels / STEP)
        return ms / 2 if job.precision == "int8" else ms


@pytest.fixture(autouse=True)
def _rows_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device differs from that of the prepared table: only the rows of a test are measured."""
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", 0)


def network(classes: int = 10) -> Candidate:
    """Two blocks that expand, of 64 and of 40 channels."""
    stages = (
        StageConfig((BlockConfig(4, 64, 24, stride=2),)),
        StageConfig((BlockConfig(24, 40, 12, stride=2, use_se=True),)),
    )
    return Candidate(16, classes, StemConfig(4), stages, HeadConfig(), (ExitConfig(0, 4),))


def test_widths_that_are_measured_close_in_on_the_steps(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    predictor = prepared.parts(tmp_path, device=Stepped()).predictor
    costs = width_costs(predictor, network(), 24)
    assert {name: len(own) for name, own in costs.items()} == {"stages.0.0": 24, "stages.1.0": 24}
    assert useful_widths(costs["stages.0.0"]) == (64, 60, 48, 36, 24)  # 64 channels are computed as 72
    assert 24 not in costs["stages.1.0"]  # as many as its input has: it would not expand
    few = width_costs(predictor, network(), 2)
    assert {name: sorted(own) for name, own in few.items()} == {"stages.0.0": [16, 64], "stages.1.0": [10, 40]}


def test_precision_that_is_fastest_decides(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    predictor = prepared.parts(tmp_path, device=Stepped()).predictor
    assert fastest_precision(predictor, network(), ("fp32", "int8")) == "int8"
    assert fastest_precision(predictor, network(), ("fp32",)) == "fp32"


def finished_parent(prepared: Prepared, home: Path, parent: Candidate) -> tuple[FinishJob, FinishedStudent]:
    """A finished student with importances, as far as its jobs of pruning read it."""
    rng = np.random.default_rng(0)
    blocks = {
        name: BlockImportance(rng.random(layer.expanded_channels), rng.random(layer.squeeze_channels))
        for name, layer in prunable(parent).items()
    }
    write_importance(home / "importance-taylor.safetensors", blocks)
    for name in ("weights.safetensors", "finished.json"):
        (home / name).write_text(name)
    job = FinishJob(parent, "c", str(home), "s", prepared.inputs.experiment.distill, 0, 16, (), importance="taylor")
    return job, FinishedStudent(1, parent, 2, 1.0)


def test_a_narrower_student_is_a_job_of_its_own(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    parts = prepared.parts(tmp_path, device=Stepped())
    parent = network()
    job, student = finished_parent(prepared, parts.folder.student(parent.arch_id), parent)
    settings = FinishSettings(prune=(0.3, 0.5, 0.501), prune_epochs=5)
    jobs = pruned_jobs(parts, [(job, student)], settings)
    shares = [removed_share(parent, j.candidate) for j in jobs]
    assert shares[0] >= 0.3
    assert shares[-1] >= 0.5
    assert len({j.candidate.arch_id for j in jobs}) == len(jobs)  # 0.5 and 0.501 may be the same network
    assert {(j.parent, j.importance) for j in jobs} == {(parent.arch_id, None)}
    assert {j.prune for j in jobs} == {settings.pruning}
    for j in jobs:
        assert j.folder == str(parts.folder.student(j.candidate.arch_id))
        assert Path(j.folder, "parent-weights.safetensors").read_text() == "weights.safetensors"


class Flat(SimulatedDevice):
    """The width of a block costs nothing."""

    def latency_ms(self, job: MeasureJob) -> float:  # noqa: ARG002
        return 0.01


def with_plain_blocks() -> Candidate:
    """A network none of whose blocks expands."""
    plain = StageConfig((BlockConfig(4, 4, 24, kind="depthwise_separable"),))
    return replace(network(), stages=(plain,), exits=())


@pytest.mark.parametrize(
    ("device", "parent", "made", "why"),
    [
        (Stepped(1), with_plain_blocks(), 0, "none of its blocks expands"),
        (Flat(1), network(), 0, "no narrower width of its blocks was measured as faster"),
        (Stepped(1), network(), 1, "{made}, which comes out, is there already"),
    ],
)
def test_a_share_that_makes_no_student_is_told_with_the_reason(
    prepared: Prepared, tmp_path: Path, device: SimulatedDevice, parent: Candidate, made: int, why: str
) -> None:
    notes = Notes()
    (tmp_path / "tables").mkdir()
    parts = prepared.parts(tmp_path, notes, device=device)
    job, student = finished_parent(prepared, parts.folder.student(parent.arch_id), parent)
    jobs = pruned_jobs(parts, [(job, student)], FinishSettings(prune=(0.51, 0.511)))
    assert len(jobs) == made
    lines = [
        f"finish.prune {share} makes no student of {parent.arch_id}: "
        + why.format(made=jobs[0].candidate.arch_id if jobs else "")
        for share in (0.51, 0.511)
    ]
    assert [line for line in notes.said if "makes no student" in line] == lines[made:]


def test_finalists_and_what_is_cut_from_them_become_points(prepared: Prepared, tmp_path: Path) -> None:
    parts = prepared.parts(tmp_path, ms=10.0)
    e = prepared.inputs.experiment
    space = parts.space
    finalist = space.decode(space.largest()).architecture
    settings = FinishSettings(prune=(0.4,), prune_epochs=1, prune_rows=4, calibration_images=16, int8_loss=0.9)
    students, failed = finish(parts, [finalist], e.distill, settings)
    assert not failed
    whole, cut = students
    assert (whole.candidate, whole.parent) == (finalist, "")
    assert cut.parent == finalist.arch_id
    assert removed_share(finalist, cut.candidate) >= 0.4
    labels = (parts.labels, prepared.inputs.dataset.test.labels)
    (found,), sources = build_points(parts, students, settings, labels, {})
    assert {sources[p.id].student.candidate for p in found.points} == {finalist, cut.candidate}
    again, _ = finish(parts, [finalist], e.distill, settings)
    assert again == students
    plain, _ = finish(parts, [finalist], e.distill, replace(settings, prune=()))
    assert plain == [whole]


@pytest.mark.parametrize("share", [0.0, 0.8])
def test_share_that_cannot_be_cut_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"finish\.prune: a share must be above 0 and at most 0\.7, got"):
        FinishSettings(prune=(share,))
    with pytest.raises(ConfigError, match=r"finish\.prune_rows must be at least 2"):
        FinishSettings(prune_rows=1)
