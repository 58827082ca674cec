from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from nas.core.errors import ConfigError, RecordError, StorageError
from nas.models.teachers import ResNet, count_macs, read_weights, stem_strides, torchvision_model


def test_the_stem_halves_until_maps_are_small() -> None:
    assert [stem_strides(side) for side in (16, 32, 48, 56, 64, 96, 128, 224)] == [1, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("side", [8, 17, 32, 64])
def test_a_resnet_takes_any_side(side: int) -> None:
    module = ResNet((8, 16), 1, 5, side).eval()
    with torch.no_grad():
        assert module(torch.zeros(2, 3, side, side)).shape == (2, 5)


def test_the_reference_resnet_has_the_published_size() -> None:
    module = ResNet((32, 64, 128), 2, 10, 32)
    assert count_macs(module, 32) == 26_436_864
    assert sum(p.numel() for p in module.parameters()) == 696_618
    assert module.training


def test_macs_of_resnet18_are_those_of_the_paper() -> None:
    module = torchvision.models.resnet18(weights=None)
    assert count_macs(module, 224) == pytest.approx(1.814e9, rel=1e-3)


def small_model(classes: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(weights=None, num_classes=classes).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_torchvision_model_gets_its_local_weights(tmp_path: Path, suffix: str) -> None:
    model, path = small_model(), tmp_path / f"teacher{suffix}"
    state = dict(model.state_dict())
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".pt":
        torch.save(state, path)
    else:  # as a training script with DataParallel leaves it
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    loaded = torchvision_model("squeezenet1_1", path, 4)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training


def test_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    save_file(dict(small_model(7).state_dict()), tmp_path / "teacher.safetensors")
    with pytest.raises(RecordError, match=r"with 4 classes has .*trained on the classes of this data set"):
        torchvision_model("squeezenet1_1", tmp_path / "teacher.safetensors", 4)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(dict(small_model().state_dict()), tmp_path / "teacher.safetensors")
    with pytest.raises(RecordError, match=r"does not fit torchvision's resnet18: .* Set teacher\.name"):
        torchvision_model("resnet18", tmp_path / "teacher.safetensors", 4)


def test_a_misspelt_model_is_named_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no classification model 'resnet19'; did you mean 'resnet18'"):
        torchvision_model("resnet19", tmp_path / "any.safetensors", 4)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    class Marker:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"weight": Marker()}, tmp_path / "teacher.pt")
    with pytest.raises(RecordError, match="can run any code when it is opened, so it is refused"):
        read_weights(tmp_path / "teacher.pt")
    assert not (tmp_path / "was-run").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(small_model(), tmp_path / "teacher.pt")
    with pytest.raises(RecordError, match=r"model\.state_dict"):
        read_weights(tmp_path / "teacher.pt")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("teacher.safetensors", b"torn", StorageError, "not a whole safetensors file"),
        ("teacher.pt", b"", StorageError, "cannot be read as a state dict"),
        ("teacher.h5", b"x", RecordError, r"files of type '\.h5' are not read; allowed: \.safetensors"),
        ("teacher", b"x", RecordError, "files of type 'none' are not read"),
    ],
)
def test_unreadable_weights_are_named(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_weights(tmp_path / name)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing\.pt is not a file"):
        read_weights(tmp_path / "missing.pt")


def test_a_file_of_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "teacher.pt")
    with pytest.raises(RecordError, match="is not a state dict"):
        read_weights(tmp_path / "teacher.pt")
