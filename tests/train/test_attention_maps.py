"""Attention maps of a vision transformer: what is kept of them, who learns from them, and who gives none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models.vision_transformer import VisionTransformer
from train_examples import CLASSES, tiny_candidate, tiny_dataset, tiny_targets

from nas.core.errors import ConfigError
from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.data import Dataset
from nas.models.student import attention_maps
from nas.train import teacher as teacher_module
from nas.train.evaluate import normalised, predict_logits
from nas.train.features import check_teacher_features, pooled_attention, reduced, wanted_features
from nas.train.losses import attention_map_kd
from nas.train.settings import DistillSettings, TeacherMember, TeacherSettings
from nas.train.targets import Targets, make_targets
from nas.train.teacher import Teacher, prepare_teacher
from nas.train.trainer import new_student, train_student

ON = DistillSettings(epochs=3, batch_size=32, recalibration_images=64, attention_maps=1.0)
LAST = "encoder.layers.encoder_layer_1.self_attention"


def tiny_vit(*, num_classes: int, weights: None = None) -> VisionTransformer:
    """A grid of 4 x 4 tokens at 16 px, and a class token."""
    assert weights is None
    return VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=num_classes)


@pytest.fixture(scope="module", autouse=True)
def named() -> Iterator[None]:
    """Torchvision knows the tiny transformer by name, as it knows its own; teachers compute in fp32."""
    patch = pytest.MonkeyPatch()
    patch.setattr(teacher_module, "has_bf16", lambda _: False)
    patch.setattr(tiny_vit, "__module__", VisionTransformer.__module__)
    patch.setitem(torchvision.models._api.BUILTIN_MODELS, "vit_tiny", tiny_vit)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionTransformer, TeacherSettings]:
    """The network, with attention that differs from place to place, and how an experiment names it."""
    torch.manual_seed(0)
    module = tiny_vit(num_classes=CLASSES)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "in_proj_weight" in name or name == "heads.head.weight":
                p.copy_(torch.randn(p.shape))
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(dict(module.state_dict()), path)
    return module.eval(), TeacherSettings("torchvision", "vit_tiny", str(path), threads=1)


@pytest.fixture(scope="module")
def teacher(
    vit: tuple[VisionTransformer, TeacherSettings], dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Teacher:
    return prepare_teacher(dataset, vit[1], tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def targets(teacher: Teacher, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return make_targets(teacher, dataset, 2, tmp_path_factory.mktemp("cache"), features=wanted_features(teacher, ON))


def hybrid(side: int = 4) -> Candidate:
    """A network whose last block but one attends over a map of 4 or 2 px."""
    strides = (2, 1) if side == 4 else (2, 2)
    blocks = (
        BlockConfig(8, 16, 32, 3, strides[0], kind="attention"),
        BlockConfig(32, 64, 64, 3, strides[1], kind="attention"),
        BlockConfig(64, 64, 64, 3),
    )
    return Candidate(16, CLASSES, StemConfig(8), (StageConfig(blocks),), HeadConfig())


def test_a_cell_attends_as_its_tokens_on_average_and_is_attended_to_as_all_of_them() -> None:
    maps = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).softmax(3)
    expected = torch.zeros(2, 3, 4, 4)
    cell = [2 * (token // 8) + token % 4 // 2 for token in range(16)]
    for query in range(16):
        for key in range(16):
            expected[:, :, cell[query], cell[key]] += maps[:, :, query, key] / 4
    torch.testing.assert_close(pooled_attention(maps, 2), expected)
    torch.testing.assert_close(pooled_attention(5 * maps, 4), maps)


def test_tokens_on_the_edge_of_two_cells_are_shared_by_area() -> None:
    maps = torch.zeros(1, 1, 9, 9)
    maps[..., 1] = 1.0  # all attend to the middle of the first row
    pooled = pooled_attention(maps, 2)
    torch.testing.assert_close(pooled, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 1, 4, 4))
    torch.testing.assert_close(pooled_attention(torch.ones(1, 1, 49, 49), 3), torch.full((1, 1, 9, 9), 1 / 9))


def test_large_maps_are_kept_small_and_without_the_class_token() -> None:
    maps = np.random.default_rng(0).random((2, 197, 197), dtype=np.float32)
    maps[:, :, 0] = 1000.0
    kept = reduced("attention_maps.x", maps)
    assert (kept.shape, kept.dtype) == ((2, 1, 49, 49), np.float16)
    assert np.allclose(kept, reduced("attention_maps.x", maps[:, 1:, 1:]), atol=1e-3)
    assert np.allclose(kept.astype(np.float32).sum(3), 1.0, atol=1e-2)
    with pytest.raises(ConfigError, match=r"'x' attends to 19 tokens, which are no square grid"):
        reduced("attention_maps.x", maps[:, :19, :19])


def test_cached_maps_are_the_probabilities_of_the_last_attention(
    vit: tuple[VisionTransformer, TeacherSettings], teacher: Teacher, targets: Targets
) -> None:
    module = vit[0]
    assert wanted_features(teacher, ON) == (f"attention_maps.{LAST}",)
    (kept,) = targets.features.values()
    assert (kept.shape, kept.dtype) == ((2, 96, 1, 16, 16), np.float16)
    seen: list[torch.Tensor] = []
    attention = module.get_submodule(LAST)
    handle = attention.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        logits = module(normalised(targets.images[1], targets.mean, targets.std))
    handle.remove()
    query, key, _ = (seen[0] @ attention.in_proj_weight.T + attention.in_proj_bias).detach().chunk(3, dim=2)
    heads = [query[:, :, h : h + 8] @ key[:, :, h : h + 8].transpose(1, 2) / 8**0.5 for h in (0, 8)]
    expected = torch.stack([z.softmax(2) for z in heads]).mean(0)[:, 1:, 1:]
    expected = (expected / expected.sum(2, keepdim=True)).numpy()
    assert expected.std(0).max() > 0.02  # images differ
    assert np.allclose(kept[1, :, 0], expected, atol=1e-3)
    assert np.allclose(targets.logits[1], logits.numpy(), atol=1e-4)


def test_answers_are_the_same_whether_maps_are_kept_or_not(
    teacher: Teacher, targets: Targets, dataset: Dataset, tmp_path: Path
) -> None:
    plain = make_targets(teacher, dataset, 2, tmp_path)
    assert np.allclose(plain.logits, targets.logits, rtol=1e-5, atol=1e-5)
    assert plain.key != targets.key


@pytest.mark.parametrize("side", [4, 2])
def test_a_student_learns_to_attend_as_the_teacher_does(targets: Targets, side: int) -> None:
    def distance(settings: DistillSettings) -> float:
        student = new_student(hybrid(side), 0)
        train_student(student, targets, settings, seed=0)
        with torch.no_grad(), attention_maps(student) as maps:
            student(normalised(targets.images[0], targets.mean, targets.std))
        assert maps[-1].shape[-1] == side**2
        (kept,) = targets.features.values()
        wanted = pooled_attention(torch.from_numpy(kept[0].astype(np.float32)), side)
        return attention_map_kd(maps[-1], wanted).item()

    on = replace(ON, epochs=8, attention_maps=10.0)
    assert distance(on) < 0.8 * distance(replace(on, attention_maps=0.0))


def test_a_student_on_a_finer_grid_than_the_teacher_learns_on_the_teachers(targets: Targets) -> None:
    coarse = {
        name: pooled_attention(torch.from_numpy(kept.astype(np.float32)[:, :, 0]), 2).numpy()[:, :, None]
        for name, kept in targets.features.items()
    }
    history = train_student(
        new_student(hybrid(), 0), replace(targets, features=coarse, key="coarse"), replace(ON, epochs=1), seed=0
    )
    assert len(history.epochs) == 1


def test_a_killed_training_ends_as_one_that_was_not(targets: Targets, dataset: Dataset, tmp_path: Path) -> None:
    def logits(stops: tuple[int, ...], settings: DistillSettings, checkpoint: Path | None) -> np.ndarray:
        for stop in stops:
            student = new_student(hybrid(), 0)
            train_student(student, targets, settings, seed=0, stop_epoch=stop, checkpoint=checkpoint)
        return predict_logits(student, dataset.val.images, dataset.mean, dataset.std)

    whole = logits((3,), ON, None)
    assert np.array_equal(whole, logits((1, 3), ON, tmp_path / "student.ckpt"))
    assert not np.array_equal(whole, logits((3,), replace(ON, attention_maps=0.0), None))


def test_a_student_without_attention_learns_as_if_the_loss_were_off(targets: Targets, dataset: Dataset) -> None:
    def logits(settings: DistillSettings) -> np.ndarray:
        student = new_student(tiny_candidate(), 0)
        train_student(student, targets, settings, seed=0)
        return predict_logits(student, dataset.val.images, dataset.mean, dataset.std)

    assert np.array_equal(logits(ON), logits(replace(ON, attention_maps=0.0)))


def test_a_loss_without_its_maps_is_refused(dataset: Dataset) -> None:
    for candidate in (hybrid(), tiny_candidate()):
        with pytest.raises(ConfigError, match=r"distill\.attention_maps: the cached targets hold no features"):
            train_student(new_student(candidate, 0), tiny_targets(dataset), ON, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TeacherSettings(), r"a teacher of kind 'resnet' gives no attention maps"),
        (TeacherSettings("onnx", weights="x.onnx"), r"a teacher of kind 'onnx' gives no attention maps"),
        (TeacherSettings("torchvision", "resnet18", "x.pt"), r"the teacher resnet18 has no multi-head attention"),
        (TeacherSettings("torchvision", "swin_t", "x.pt"), r"the teacher swin_t has no multi-head attention"),
    ],
)
def test_teachers_without_attention_are_refused_with_the_setting(settings: TeacherSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"distill\.attention_maps: {message}, .* --set distill\.attention_maps=0"):
        check_teacher_features(settings, ON)
    check_teacher_features(settings, replace(ON, attention_maps=0.0))


def test_several_networks_that_teach_together_are_refused() -> None:
    several = TeacherSettings(members=(TeacherMember("a", seed=0), TeacherMember("b", seed=1)))
    with pytest.raises(ConfigError, match=r"distill\.attention_maps: 2 networks teach together"):
        check_teacher_features(several, ON)


def test_a_teacher_that_turns_out_to_have_no_attention_is_refused(teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match=r"distill\.attention_maps: the teacher vit_tiny has no multi-head attention"):
        wanted_features(replace(teacher, attention_layers=()), ON)


def test_named_layers_go_to_the_losses_that_compare_them(
    teacher: Teacher, vit: tuple[VisionTransformer, TeacherSettings], dataset: Dataset, tmp_path: Path
) -> None:
    first = LAST.replace("layer_1", "layer_0")
    both = replace(ON, hints=1.0, teacher_layers=("conv_proj", first))
    check_teacher_features(vit[1], both)
    names = wanted_features(teacher, both)
    assert names == ("hint.conv_proj", f"attention_maps.{first}")
    assert wanted_features(teacher, replace(both, teacher_layers=("conv_proj",)))[1] == f"attention_maps.{LAST}"
    features = make_targets(teacher, dataset, 1, tmp_path, features=names).features
    assert [f.shape[2:] for f in features.values()] == [(16, 4, 4), (1, 16, 16)]
    for layers, wanted, message in (
        ((first, LAST), ON, "attention maps of one layer are compared, got"),
        (("encoder.ln",), ON, r"'encoder\.ln' is no multi-head attention of vit_tiny.* compare the last one"),
        ((LAST,), replace(both, attention_maps=0.0), r"distill\.hints compares maps; name layers of vit_tiny"),
        (("conv_proj", LAST), replace(both, attention_maps=0.0), "layer_1.* gives no maps .* distill.attention_maps=1"),
    ):
        with pytest.raises(ConfigError, match=rf"distill\.teacher_layers: .*{message}"):
            wanted_features(teacher, replace(wanted, teacher_layers=layers))
    with pytest.raises(ConfigError, match=r"'encoder\.ln' is no multi-head attention"):
        check_teacher_features(vit[1], replace(ON, teacher_layers=("encoder.ln",)))


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"distill\.attention_maps: must be 0 or more, got -1"):
        DistillSettings(attention_maps=-1.0)
