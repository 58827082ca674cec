from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from safetensors.torch import save_file
from train_examples import tiny_dataset

from nas.core.errors import ConfigError, RecordError, StorageError
from nas.data import Dataset
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.train.settings import TeacherSettings
from nas.train.teacher import Teacher, prepare_teacher
from nas.train.teacher_onnx import input_side

TINY = TeacherSettings(widths=(8, 16), blocks=1, epochs=3, batch_size=16, threads=1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def run_onnx(teacher: Teacher, images: np.ndarray) -> np.ndarray:
    raw = images.transpose(0, 3, 1, 2).astype(np.float32)
    return np.concatenate([OnnxRuntimeCpu().run(teacher.onnx(), raw[i : i + 1])[0] for i in range(len(raw))])


def test_a_teacher_is_trained_once_and_then_comes_from_the_cache(dataset: Dataset, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    first = prepare_teacher(dataset, TINY, tmp_path, lambda *step: told.append(step))
    again = prepare_teacher(dataset, TINY, tmp_path, lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (again.sha256, again.val_accuracy, again.test_accuracy, again.cpu_s) == (
        first.sha256,
        first.val_accuracy,
        first.test_accuracy,
        first.cpu_s,
    )
    assert np.array_equal(first.predict(dataset.val.images), again.predict(dataset.val.images))
    assert first.cpu_s > 0
    assert first.val_accuracy == (first.predict(dataset.val.images).argmax(1) == dataset.val.labels).mean()
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_cache_that_cannot_be_written_is_told_before_the_training(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"teachers: cannot be written: Not a directory\. .* --set run.cache=DIR"):
        prepare_teacher(dataset, TINY, tmp_path / "cache", lambda *_: pytest.fail("it was trained"))


def test_other_settings_or_data_are_another_teacher(dataset: Dataset, tmp_path: Path) -> None:
    one = replace(TINY, epochs=1)
    keys = {
        prepare_teacher(dataset, one, tmp_path).sha256,
        prepare_teacher(dataset, replace(one, seed=1), tmp_path).sha256,
        prepare_teacher(replace(dataset, sha256="other"), one, tmp_path).sha256,
    }
    assert len(keys) == 3


def test_a_killed_training_goes_on_and_ends_the_same(dataset: Dataset, tmp_path: Path) -> None:
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_teacher import TINY
        from train_examples import tiny_dataset
        from nas.train.teacher import prepare_teacher
        def die(done, total):
            if done == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        prepare_teacher(tiny_dataset(), TINY, Path({str(tmp_path / "killed")!r}), die)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    told: list[tuple[int, int]] = []
    resumed = prepare_teacher(dataset, TINY, tmp_path / "killed", lambda *step: told.append(step))
    whole = prepare_teacher(dataset, TINY, tmp_path / "whole")
    assert told == [(3, 3)]
    assert resumed.sha256 == whole.sha256


@pytest.mark.parametrize("resolution", [17, 64])
def test_its_onnx_file_takes_raw_pixels_and_answers_as_it_does(tmp_path: Path, resolution: int) -> None:
    dataset = tiny_dataset(24, 12, 12, resolution)
    teacher = prepare_teacher(dataset, replace(TINY, epochs=1), tmp_path)
    model = onnx.load_model_from_string(teacher.onnx())
    ops = {node.op_type for node in model.graph.node}
    assert ops == {"Mul", "Add", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"}
    assert input_side(teacher.onnx(), "teacher") == resolution
    # bf16 has 8 bits of mantissa; the file is fp32 throughout
    tolerance = 0.05 if teacher.precision == "bf16" else 1e-3
    logits = teacher.predict(dataset.val.images)
    assert np.allclose(run_onnx(teacher, dataset.val.images), logits, atol=tolerance * max(1.0, np.abs(logits).max()))


def test_changed_weights_in_the_cache_are_noticed(dataset: Dataset, tmp_path: Path) -> None:
    prepare_teacher(dataset, replace(TINY, epochs=1), tmp_path)
    prepare_teacher(dataset, replace(TINY, epochs=1, seed=1), tmp_path)
    one, other = sorted(tmp_path.rglob("weights.safetensors"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(StorageError, match="Delete the folder to train again"):
        for seed in (0, 1):
            prepare_teacher(dataset, replace(TINY, epochs=1, seed=seed), tmp_path)
    one.write_bytes(b"torn")
    with pytest.raises(StorageError, match="to train again"):
        for seed in (0, 1):
            prepare_teacher(dataset, replace(TINY, epochs=1, seed=seed), tmp_path)


def squeezenet(tmp_path: Path, classes: int = 10) -> Path:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=classes)
    save_file(dict(model.state_dict()), tmp_path / "squeezenet.safetensors")
    return tmp_path / "squeezenet.safetensors"


def test_a_torchvision_teacher_sees_larger_images_and_exports(dataset: Dataset, tmp_path: Path) -> None:
    settings = TeacherSettings(
        "torchvision", "squeezenet1_1", str(squeezenet(tmp_path)), pixels="imagenet", resolution=48, threads=1
    )
    teacher = prepare_teacher(dataset, settings, tmp_path)
    assert (teacher.resolution, teacher.cpu_s) == (48, 0.0)
    assert teacher.macs is not None and teacher.macs > 1e6
    logits = teacher.predict(dataset.val.images[:4])
    assert logits.shape == (4, 10)
    assert input_side(teacher.onnx(), "teacher") == 48
    larger = torch.nn.functional.interpolate(
        torch.from_numpy(dataset.val.images[:4]).permute(0, 3, 1, 2).float(), (48, 48), mode="bilinear", antialias=True
    )
    raw = larger.permute(0, 2, 3, 1).numpy()
    assert np.allclose(run_onnx(teacher, raw), logits, atol=0.05 * max(1.0, np.abs(logits).max()))


def test_images_too_small_for_a_given_model_are_named(dataset: Dataset, tmp_path: Path) -> None:
    settings = TeacherSettings("torchvision", "squeezenet1_1", str(squeezenet(tmp_path)), resolution=8, threads=1)
    with pytest.raises(ConfigError, match=r"teacher\.resolution: squeezenet1_1 cannot take images of 8 px"):
        prepare_teacher(dataset, settings, tmp_path)


def linear_onnx(
    path: Path,
    classes: int = 10,
    side: int | str = 16,
    channels: int = 3,
    batch: int | str = "batch",
    softmax: bool = False,
) -> Path:
    """Mean of each channel, then a linear layer, and a softmax where asked for."""
    weight = np.random.default_rng(0).normal(0, 1, (channels, classes)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["z" if softmax else "y"]),
        *([helper.make_node("Softmax", ["z"], ["y"], axis=1)] if softmax else []),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("batch", "side"), [("batch", "side"), (1, 16), ("batch", 24)])
def test_an_onnx_teacher_gets_the_pixels_it_expects(
    dataset: Dataset, tmp_path: Path, batch: int | str, side: int | str
) -> None:
    path = linear_onnx(tmp_path / "given.onnx", batch=batch, side=side)
    teacher = prepare_teacher(dataset, TeacherSettings("onnx", weights=str(path)), tmp_path)
    images = dataset.val.images[:5]
    means = ((images / 255.0).mean((1, 2)) - np.array(dataset.mean)) / np.array(dataset.std)
    weight = np.random.default_rng(0).normal(0, 1, (3, 10)).astype(np.float32)
    logits = teacher.predict(images)
    assert teacher.resolution == (side if isinstance(side, int) else 16)
    assert np.allclose(logits, means @ weight, atol=0.1 if side == 24 else 1e-4)
    if teacher.resolution == 16:
        assert np.allclose(run_onnx(teacher, images), logits, atol=1e-4)


def test_probabilities_of_an_onnx_teacher_become_logits(dataset: Dataset, tmp_path: Path) -> None:
    """A temperature is for logits: probabilities taken for them would be nearly uniform targets."""
    images = dataset.val.images
    told = []
    for name, softmax in (("logits", False), ("probabilities", True)):
        path = linear_onnx(tmp_path / f"{name}.onnx", softmax=softmax)
        told.append(prepare_teacher(dataset, TeacherSettings("onnx", weights=str(path)), tmp_path).predict(images))
    logits, found = told
    shifted = logits - logits.max(1, keepdims=True)
    assert np.allclose(found, shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), atol=1e-4)


def test_an_exported_resnet_comes_back_as_onnx_teacher(dataset: Dataset, tmp_path: Path) -> None:
    trained = prepare_teacher(dataset, replace(TINY, epochs=1), tmp_path)
    (tmp_path / "own.onnx").write_bytes(trained.onnx())
    given = prepare_teacher(
        dataset, TeacherSettings("onnx", weights=str(tmp_path / "own.onnx"), pixels="raw"), tmp_path
    )
    logits = trained.predict(dataset.val.images)
    assert np.allclose(given.predict(dataset.val.images), logits, atol=0.05 * max(1.0, np.abs(logits).max()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": 7}, r"gives \[7\] values per image; the data set has 10 classes"),
        ({"channels": 1}, r"input \[B, 3, H, W\] is needed, channels first; its second size is 1"),
    ],
)
def test_an_onnx_file_that_does_not_fit_is_named(
    dataset: Dataset, tmp_path: Path, values: dict[str, int], message: str
) -> None:
    path = linear_onnx(tmp_path / "given.onnx", **values)
    with pytest.raises(RecordError, match=message):
        prepare_teacher(dataset, TeacherSettings("onnx", weights=str(path)), tmp_path)


def test_our_own_onnx_file_is_not_normalised_twice(dataset: Dataset, tmp_path: Path) -> None:
    trained = prepare_teacher(dataset, replace(TINY, epochs=1), tmp_path)
    (tmp_path / "own.onnx").write_bytes(trained.onnx())
    with pytest.raises(RecordError, match=r"normalises its pixels itself; set teacher\.pixels to 'raw'"):
        prepare_teacher(dataset, TeacherSettings("onnx", weights=str(tmp_path / "own.onnx")), tmp_path)


def test_a_file_that_is_not_onnx_is_named(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "given.onnx").write_bytes(b"not a model")
    with pytest.raises(RecordError, match="is not a valid ONNX model"):
        prepare_teacher(dataset, TeacherSettings("onnx", weights=str(tmp_path / "given.onnx")), tmp_path)


def test_a_missing_file_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"teacher.weights: .*nowhere.onnx is not a file"):
        prepare_teacher(dataset, TeacherSettings("onnx", weights=str(tmp_path / "nowhere.onnx")), tmp_path)
