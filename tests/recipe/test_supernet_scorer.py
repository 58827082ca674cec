"""Training of the shared weights: resumable, exact, and worth something at its end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.core.errors import ConfigError, InterruptedRunError, RunMismatchError, StorageError
from nas.core.records import Candidate
from nas.recipe.processes import Processes
from nas.recipe.settings import SupernetSettings
from nas.recipe.supernet import (
    SupernetStep,
    _Training,
    all_exits,
    exit_heads,
    inherited_student,
    open_supernet,
    shared_importance,
    train_supernet,
)
from nas.space.space import SearchSpace, space_from_plain
from nas.train.compute import CPU
from nas.train.evaluate import predict_logits
from nas.train.settings import DistillSettings
from nas.train.targets import Targets

CLASSES = 3
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _space(resolution: list[int], **each: Any) -> SearchSpace:
    stages: list[dict[str, Any]] = [
        {"name": "a", "width": [4, 8], "depth": 1, "stride": 2, "kernel_size": [3, 5], "expansion": 2},
        {"name": "b", "width": [4, 8], "depth": [1, 2], "stride": 1, "kernel_size": 3, "expansion": [1, 2]},
    ]
    plain = {
        "name": "small",
        "source": "made for this test",
        "resolution": resolution,
        "stem": {"channels": 4, "activation": "relu"},
        "stages": [{"activation": "relu", **stage, **each} for stage in stages],
        "head": {},
        "exits": {"after": ["a"], "max_count": 1, "hidden_channels": 4},
        "precision": {"choices": ["fp32"]},
    }
    return space_from_plain(plain, "small", CLASSES)


def _targets(side: int, count: int = 60) -> Targets:
    """Classes by colour: easy to learn, and the teacher knows them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 120, (2, count, side, side, 3), dtype=np.uint8)
    for v in range(2):
        images[v, np.arange(count), :, :, labels] += 100
    logits = np.zeros((2, count, CLASSES), dtype=np.float32)
    logits[:, np.arange(count), labels] = 4.0
    return Targets(f"colours-{side}", images, logits, labels, MEAN, STD, Path("unused"))


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return _space([8])


@pytest.fixture(scope="module")
def targets() -> dict[int, Targets]:
    return {8: _targets(8)}


SHORT = SupernetSettings(steps=7, batch_size=16, networks_per_step=2, checkpoint_steps=2)
LOSS = DistillSettings()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_supernet(str(folder)).state_dict())


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(space: SearchSpace, targets: dict[int, Targets], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose training was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train_supernet(space, targets, LOSS, SHORT, folder)
    return folder


def test_same_seed_gives_same_weights(
    space: SearchSpace, targets: dict[int, Targets], straight: Path, tmp_path: Path
) -> None:
    torch.rand(3)  # the global generator plays no part
    train_supernet(space, targets, LOSS, SHORT, tmp_path)
    assert _equal(_weights(straight), _weights(tmp_path))
    train_supernet(space, targets, LOSS, replace(SHORT, seed=1), tmp_path / "other")
    assert not _equal(_weights(straight), _weights(tmp_path / "other"))


def test_gradients_lie_in_memory_as_their_weights_do(space: SearchSpace, targets: dict[int, Targets]) -> None:
    """A fused optimizer takes the elements of both in the order of the memory, whatever their strides say."""
    training = _Training(space, targets, LOSS, SHORT, map, Processes(), None, CPU)
    training.steps = SHORT.steps or 1
    training._one_step(0)
    turned = [p for p in training.net.parameters() if p.grad is not None and not p.is_contiguous()]
    assert turned
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in turned)


def test_training_that_was_stopped_goes_on_to_the_same_weights(
    space: SearchSpace, targets: dict[int, Targets], straight: Path, tmp_path: Path
) -> None:
    def stop(step: SupernetStep) -> None:
        if step.step == 5:
            raise InterruptedRunError("stop")

    with pytest.raises(InterruptedRunError):
        train_supernet(space, targets, LOSS, SHORT, tmp_path, progress=stop)
    seen: list[int] = []
    train_supernet(space, targets, LOSS, SHORT, tmp_path, progress=lambda s: seen.append(s.step))
    assert seen == [6, 7]
    assert _equal(_weights(straight), _weights(tmp_path))
    assert not (tmp_path / "supernet.ckpt").exists()


def test_training_that_was_killed_goes_on_from_its_last_checkpoint(
    space: SearchSpace, targets: dict[int, Targets], straight: Path, tmp_path: Path
) -> None:
    def copy(step: SupernetStep) -> None:
        if step.step == 5:  # what a kill at this moment would leave: the checkpoint of step 4
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    train_supernet(space, targets, LOSS, SHORT, tmp_path / "run", progress=copy)
    seen: list[int] = []
    train_supernet(space, targets, LOSS, SHORT, tmp_path / "killed", progress=lambda s: seen.append(s.step))
    assert seen == [5, 6, 7]
    assert _equal(_weights(straight), _weights(tmp_path / "killed"))


def test_weights_do_not_depend_on_the_number_of_threads(
    space: SearchSpace, targets: dict[int, Targets], straight: Path, tmp_path: Path
) -> None:
    train_supernet(space, targets, LOSS, SHORT, tmp_path, workers=2)
    assert _equal(_weights(straight), _weights(tmp_path))


def test_last_small_batch_of_an_epoch_goes_to_fewer_networks(space: SearchSpace, tmp_path: Path) -> None:
    targets = {8: _targets(8, count=19)}  # batches of 8, 8 and 3 images for 3 networks
    settings = replace(SHORT, steps=4, batch_size=8, networks_per_step=3)
    assert train_supernet(space, targets, LOSS, settings, tmp_path).steps == 4


def test_finished_training_is_not_repeated(space: SearchSpace, targets: dict[int, Targets], straight: Path) -> None:
    seen: list[SupernetStep] = []
    record = train_supernet(space, targets, LOSS, SHORT, straight, progress=seen.append)
    assert (record.steps, seen) == (7, [])
    assert record.cpu_s > 0


def test_features_of_the_teacher_train_no_other_supernet(
    space: SearchSpace, targets: dict[int, Targets], straight: Path
) -> None:
    plain = targets[8]
    with_features = replace(plain, key="colours-8 and features", plain_key=plain.key)
    assert train_supernet(space, {8: with_features}, LOSS, SHORT, straight).steps == 7
    with pytest.raises(RunMismatchError, match="belongs to another"):
        train_supernet(space, {8: replace(with_features, plain_key="other colours")}, LOSS, SHORT, straight)


@pytest.mark.parametrize("part", ["record", "checkpoint"])
def test_supernet_of_other_settings_is_refused(
    space: SearchSpace, targets: dict[int, Targets], tmp_path: Path, part: str
) -> None:
    def stop(_: SupernetStep) -> None:
        if part == "checkpoint":
            raise InterruptedRunError("stop")

    try:
        train_supernet(space, targets, LOSS, SHORT, tmp_path, progress=stop)
    except InterruptedRunError:
        assert part == "checkpoint"
    with pytest.raises(RunMismatchError, match=r"belongs to another .* Delete"):
        train_supernet(space, targets, replace(LOSS, temperature=2.0), SHORT, tmp_path)


def test_cpu_seconds_become_a_number_of_steps(space: SearchSpace, targets: dict[int, Targets], tmp_path: Path) -> None:
    steps: list[SupernetStep] = []
    settings = replace(SHORT, steps=None, cpu_seconds=0.3)
    record = train_supernet(space, targets, LOSS, settings, tmp_path, progress=steps.append)
    assert record.steps == len(steps) == steps[0].steps
    assert steps[-1].left_s == 0
    assert [s.step for s in steps] == list(range(1, record.steps + 1))


def test_scores_of_inherited_weights_beat_chance_on_every_exit(tmp_path: Path) -> None:
    space = _space([8, 16])
    targets = {8: _targets(8), 16: _targets(16)}
    train_supernet(space, targets, LOSS, SupernetSettings(steps=40, batch_size=30), tmp_path)
    supernet = open_supernet(str(tmp_path))
    rng = np.random.default_rng(3)
    candidates: list[Candidate] = [space.decode(g) for g in (space.smallest(), space.largest(), space.sample(rng))]
    for candidate in candidates:
        t = targets[candidate.resolution]
        candidate = replace(candidate, exits=all_exits(exit_heads(space), rng)).with_precision("int8")
        student = inherited_student(supernet, candidate, t.images[0], MEAN, STD)
        logits = predict_logits(student, t.images[1], MEAN, STD)
        assert logits.shape == (2, 60, CLASSES)
        assert ((logits.argmax(2) == t.labels).mean(1) > 0.6).all()


def test_damaged_weights_are_named(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "copy")
    file = tmp_path / "copy" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match=r"weights\.safetensors: not the file that supernet\.json describes. Delete"):
        open_supernet(str(tmp_path / "copy"))
    file.unlink()
    with pytest.raises(StorageError, match=r"weights\.safetensors: cannot be read"):
        open_supernet(str(tmp_path / "copy"))
    with pytest.raises(StorageError, match=r"supernet\.json: cannot be read"):
        open_supernet(str(tmp_path / "nowhere"))


def test_record_is_readable(straight: Path) -> None:
    record = json.loads((straight / "supernet.json").read_text())
    assert set(record) == {"schema", "key", "space", "steps", "loss", "cpu_s", "weights_sha256", "expected_ms"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 1, "supernet.batch_size: must be at least 2, got 1"),
        ("networks_per_step", 0, "supernet.networks_per_step: must be at least 1, got 0"),
        ("batch_size", 3, "supernet.batch_size: 2 sub-networks per step need at least 4 images, got 3"),
        ("steps", 0, "supernet.steps: must be at least 1, got 0"),
        ("cpu_seconds", float("nan"), "supernet.cpu_seconds: must be above 0, got nan"),
        ("lr", 0.0, "supernet.lr: must be above 0"),
        ("weight_decay", -1.0, "supernet.weight_decay: must be 0 or more"),
        ("warmup", 1.0, "supernet.warmup: must be 0 or more and below 1"),
    ],
)
def test_wrong_settings_are_named(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SupernetSettings(**{field: value})


def test_pruned_block_keeps_the_important_channels_of_the_shared_weights(
    targets: dict[int, Targets], straight: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(straight, tmp_path / "supernet")
    space = _space([8], prune=[0, 0.25])
    train_supernet(space, targets, LOSS, SHORT, folder)  # the weights are those of the unpruned space
    assert _equal(_weights(folder), _weights(straight))
    assert shared_importance(str(straight)) is None
    importance = shared_importance(str(folder))
    assert importance is not None
    assert importance.trained == {"stages.0.0": (8,), "stages.1.0": (8, 16), "stages.1.1": (8, 16)}
    genotype = list(space.largest())
    for number, gene in enumerate(space.genes):
        if gene.name.endswith(".prune"):
            genotype[number] = 1
    candidate = space.decode(genotype)
    assert [b.expanded_channels for stage in candidate.stages for b in stage.blocks] == [6, 12, 12]
    supernet = open_supernet(str(folder))
    student = inherited_student(supernet, candidate, targets[8].images[0], MEAN, STD, importance)
    kept = np.sort(np.argsort(-importance.blocks["stages.1.1"].channels, kind="stable")[:12])
    shared = _weights(folder)["units.stages_1_1__project.weight"][:, kept]
    assert torch.equal(student.body["stages_1_1"].project.conv.weight, shared)
    assert not np.array_equal(kept, np.arange(12))  # which the first channels would not tell apart
    whole = space.decode(space.largest())
    found = [
        predict_logits(
            inherited_student(supernet, whole, targets[8].images[0], MEAN, STD, i), targets[8].images[1], MEAN, STD
        )
        for i in (importance, None)
    ]
    np.testing.assert_array_equal(*found)
