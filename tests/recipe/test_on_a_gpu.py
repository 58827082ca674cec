"""Everything that trains, on a GPU. Torch's device `meta` stands in for it where there is none: it knows shapes, types
and places, not values, and refuses to mix places. So these tests show that all a step needs is where the weights are,
that what is written comes from main memory, and nothing about numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_finish import DISTILL, FP32, INT8, SEED, candidate, write
from test_pruning import TARGET
from test_supernet_scorer import _space, _targets
from torch import Tensor, nn

from nas.core.jsonio import read_record, write_record
from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.data import Dataset, DataSettings, load_dataset
from nas.recipe import context as context_module
from nas.recipe import supernet as supernet_module
from nas.recipe.context import ContextFile
from nas.recipe.finish import FinishJob, adopt_parent, finish_student, load_finished
from nas.recipe.score import ScoreJob, score
from nas.recipe.settings import PruneMode, PruneSettings, QatSettings, SupernetSettings
from nas.recipe.supernet import train_supernet
from nas.train import feed
from nas.train import teacher as teacher_module
from nas.train.compute import CPU, device_of
from nas.train.features import ATTENTION_MAPS
from nas.train.settings import Accelerator, DistillSettings, TeacherSettings
from nas.train.teacher import prepare_teacher
from nas.train.trainer import new_student, train_student

META = torch.device("meta")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` where a GPU would be; a number that is read from it is 1."""
    to_cpu: Callable[[Tensor], Tensor] = Tensor.cpu
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def tensor_to_cpu(tensor: Tensor) -> Tensor:
        return torch.full(tensor.shape, 1, dtype=tensor.dtype) if tensor.is_meta else to_cpu(tensor)

    def module_to_cpu(module: nn.Module) -> nn.Module:
        if device_of(module) == META:
            module.to_empty(device=CPU)
            for tensor in module.state_dict().values():
                tensor.fill_(0.01 if tensor.is_floating_point() else 1)
        return module

    def device(accelerator: Accelerator) -> torch.device:
        return META if accelerator == "cuda" else CPU

    rounded: Callable[..., Tensor] = torch.fake_quantize_per_tensor_affine

    def rounded_there(x: Tensor, scale: float, zero: int, least: int, most: int) -> Tensor:
        return x.clamp(least, most) if x.is_meta else rounded(x, scale, zero, least, most)

    # `meta` has no kernels of these two.
    monkeypatch.setattr(torch, "fake_quantize_per_tensor_affine", rounded_there)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: adamw(groups, lr=lr, fused=not fused))
    monkeypatch.setattr(Tensor, "cpu", tensor_to_cpu)
    monkeypatch.setattr(nn.Module, "cpu", module_to_cpu)
    for name, value in (("item", 1.0), ("__float__", 1.0), ("__int__", 1)):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda t, real=real, value=value: value if t.is_meta else real(t))
    monkeypatch.setattr(teacher_module, "has_bf16", lambda _: False)
    monkeypatch.setattr(feed, "_free_bytes", lambda place: 10**9 if place == META else 0)
    for module in (context_module, supernet_module, teacher_module):
        monkeypatch.setattr(module, "training_device", device)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(DataSettings(train_images=64, val_images=40, test_images=20), 16)


@pytest.fixture
def context_file(dataset: Dataset, tmp_path: Path) -> Path:
    path = write(dataset, tmp_path / "context")[0]
    write_record(path, replace(read_record(ContextFile, path), accelerator="cuda"))
    return path


def job(context_file: Path, folder: Path, **changes: Any) -> FinishJob:
    stop = str(folder.parent / "stop")
    plain = FinishJob(candidate(), str(context_file), str(folder), stop, DISTILL, SEED, 48, (INT8,))
    return replace(plain, **changes)


@pytest.mark.parametrize("mode", ["after", "joint"])
def test_a_student_is_distilled_pruned_and_trained_in_int8(mode: PruneMode, context_file: Path, tmp_path: Path) -> None:
    every_loss = replace(DISTILL, ema=0.9, mining=0.3, curriculum=0.5, dist_inter=1.0, self_distillation=0.5)
    parent, narrow = tmp_path / candidate().arch_id, tmp_path / TARGET.arch_id
    qat = QatSettings(epochs=1, least_loss=-1)
    done = finish_student(job(context_file, parent, distill=every_loss, qat=qat, importance="taylor"))
    assert [s.name for s in done.steps] == ["distil", "calibrate", "QAT"]
    adopt_parent(parent, narrow, "taylor")
    settings = PruneSettings(mode, epochs=1)
    pruned = finish_student(
        job(context_file, narrow, candidate=TARGET, parent=candidate().arch_id, prune=settings, distill=every_loss)
    )
    assert pruned.steps[0].name == "prune"
    assert {w.dtype for w in load_finished(narrow)[0].values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("precisions", [FP32, INT8])
def test_a_standalone_score_goes_on_from_a_checkpoint(precisions: Any, context_file: Path, tmp_path: Path) -> None:
    whole = replace(candidate(), exits=candidate().exits).with_precision(precisions)
    for epochs in (1, 2):
        found = score(
            ScoreJob(
                whole, "standalone", str(context_file), str(tmp_path / "students"), "", str(tmp_path / "stop"), DISTILL,
                epochs, SEED, 48,
            )
        )  # fmt: skip
        assert len(found.top1) == 2


def test_attention_maps_are_compared_where_the_student_is(context_file: Path) -> None:
    blocks = (BlockConfig(4, 8, 32, 3, 2, kind="attention"),)
    hybrid = Candidate(16, 10, StemConfig(4), (StageConfig(blocks),), HeadConfig())
    maps = {f"{ATTENTION_MAPS}last": np.full((2, 64, 1, 9, 9), 1 / 9, np.float16)}  # on another grid than the student's
    targets = replace(context_module.open_context(str(context_file), 16).targets, features=maps)
    student = new_student(hybrid, SEED).to(META)
    done = train_student(student, targets, replace(DISTILL, attention_maps=1.0), seed=SEED)
    assert len(done.epochs) == DISTILL.epochs
    assert device_of(student) == META


def test_shared_weights_are_trained_and_copied_to_a_student(tmp_path: Path) -> None:
    space, settings = _space([8, 12]), SupernetSettings(steps=4, batch_size=16, checkpoint_steps=2)
    targets = {side: _targets(side) for side in (8, 12)}
    done = train_supernet(
        space, targets, DistillSettings(variants=2), settings, tmp_path, accelerator="cuda", workers=2
    )
    assert done.steps == 4
    assert supernet_module.open_supernet(str(tmp_path)).units
    images, statistics = targets[8].images[0], ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    net = supernet_module.open_supernet(str(tmp_path))
    small = replace(space, resolution=(8,))
    student = supernet_module.inherited_student(
        net, small.decode(small.smallest()).architecture, images, *statistics, device=META
    )
    assert device_of(student) == META


def test_a_teacher_is_trained_asked_and_written(dataset: Dataset, tmp_path: Path) -> None:
    settings = TeacherSettings(widths=(8, 16), blocks=1, epochs=2, batch_size=32)
    teacher = prepare_teacher(dataset, settings, tmp_path, accelerator="cuda")
    assert teacher.predict(dataset.val.images).shape == (40, 10)
    assert teacher.features is not None
    logits, maps = teacher.features(dataset.val.images[:4], teacher.feature_layers)
    assert logits.shape == (4, 10) and {m.shape[0] for m in maps.values()} == {4}
    assert teacher.onnx()
