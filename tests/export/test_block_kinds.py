"""Each kind of block: torch and ONNX Runtime agree, in int8 too; counted work is the work that is done."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from export_networks import kind_block, kind_candidate

from nas.compress.calibrate import calibrate
from nas.core.errors import RecordError
from nas.core.records import (
    BLOCK_KINDS,
    HEAD_DIM,
    BlockConfig,
    BlockKind,
    Candidate,
    HeadConfig,
    StageConfig,
    StemConfig,
)
from nas.core.walk import expand, total_macs, total_params
from nas.devices.onnxruntime_cpu import run_model
from nas.export.dialect import DIALECTS, ORT, TRT_8_4
from nas.export.graph import layer_model, network_model, nominal_quant, random_weights, tensors_model
from nas.latency.keys import layer_of_key
from nas.models.student import Attention, Student, attention_maps, folded_weights

MEAN, STD = (0.5,) * 3, (0.25,) * 3
NEW = tuple(kind for kind in BLOCK_KINDS if kind != "inverted_residual")


def _student(kind: BlockKind) -> tuple[Student, torch.Tensor]:
    """A student whose batch norm knows some images [16, 3, 24, 24], 0-255, which differ in their colour."""
    torch.manual_seed(0)
    student = Student(kind_candidate(kind))
    images = 255 * (torch.rand(16, 3, 1, 1) + 0.1 * torch.randn(16, 3, 24, 24)).clamp(0, 1)
    for part in student.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.5
    for _ in range(8):
        student.train()(_normal(images))
    return student.eval(), images


def _normal(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - MEAN[0]) / STD[0]


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_torch_and_onnx_runtime_agree_on_a_kind_and_int8_is_near(kind: BlockKind) -> None:
    student, images = _student(kind)
    with torch.no_grad():
        expected = student(_normal(images))[-1].numpy()
    weights, pixels = folded_weights(student), images.numpy()
    found = run_model(network_model(student.candidate, weights, MEAN, STD, batch=None), pixels)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    model, names = tensors_model(student.candidate, weights, MEAN, STD)
    quant = calibrate(run_model, model, names, pixels, min_images=1)
    for dialect in (ORT, TRT_8_4):
        int8 = network_model(
            student.candidate.with_precision("int8"), weights, MEAN, STD, quant=quant, batch=None, dialect=dialect
        )
        error = run_model(int8, pixels)[0] - expected
        assert 0 < np.linalg.norm(error) < 0.25 * np.linalg.norm(expected), dialect.name


@pytest.mark.parametrize("kind", NEW)
def test_every_dialect_writes_a_kind_in_all_its_precisions(kind: BlockKind) -> None:
    for dialect in DIALECTS:
        for precision in dialect.precisions:
            candidate = kind_candidate(kind).with_precision(precision)
            weights, quant = random_weights(candidate, 0), nominal_quant(candidate)
            model = network_model(candidate, weights, MEAN, STD, quant=quant, dialect=dialect)
            onnx.checker.check_model(model, full_check=True)
            onnx.checker.check_model(layer_model(expand(candidate)[-2], dialect=dialect), full_check=True)


@pytest.mark.parametrize("kind", NEW)
def test_counted_work_is_what_torch_does(kind: BlockKind) -> None:
    student, images = _student(kind)
    counted = 0

    def count(module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(module, torch.nn.Conv2d):
            counted += output[0].numel() * module.weight[0].numel()
        else:  # queries times keys, and as many products with the values
            counted += 2 * output[0].numel() * HEAD_DIM

    for module in student.modules():
        if isinstance(module, torch.nn.Conv2d | Attention):
            module.register_forward_hook(count)
    student(_normal(images[:1]))
    assert total_macs(student.candidate) == counted
    assert total_params(student.candidate) == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("kind", NEW)
def test_row_key_of_a_kind_reads_back(kind: BlockKind) -> None:
    layer = expand(kind_candidate(kind))[-2]
    assert layer_of_key(layer.key) == layer


def test_all_convolutions_of_an_attention_block_are_integer_in_int8_and_its_products_float() -> None:
    candidate = kind_candidate("attention").with_precision("int8")
    weights, quant = random_weights(candidate, 0), nominal_quant(candidate)
    graph = onnx.load_from_string(network_model(candidate, weights, MEAN, STD, quant=quant)).graph
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(len(layer.convolutions) for layer in expand(candidate))
    assert all(name in dequantized for node in convolutions for name in node.input)
    softmax = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmax) == 2 and not any(name in dequantized for node in softmax for name in node.input)


def test_attention_maps_are_given_on_request_and_are_probabilities() -> None:
    student, images = _student("attention")
    with attention_maps(student) as maps:
        student(_normal(images))
    assert [tuple(found.shape) for found in maps] == [(16, 2, 9, 9)] * 2
    torch.testing.assert_close(maps[0].sum(dim=3), torch.ones(16, 2, 9))
    student(_normal(images))
    assert len(maps) == 2


def test_each_pixel_is_a_token_that_sees_all_others() -> None:
    student, images = _student("attention")
    with attention_maps(student) as maps:
        student(_normal(images))
    assert maps[1].shape[-1] == expand(student.candidate)[-2].tokens == 9
    assert (maps[1] > 0).all()


def test_attention_on_a_large_map_is_refused() -> None:
    stage = StageConfig((kind_block("attention", 8, 16, 1),))
    with pytest.raises(RecordError, match=r"stages\.0\.0: attention on a map of 20 px would have 400 tokens; at most"):
        expand(Candidate(40, 5, StemConfig(8), (stage,), HeadConfig()))


def test_a_kind_that_does_not_expand_says_so() -> None:
    with pytest.raises(RecordError, match="depthwise_separable does not expand: expanded_channels must be 8"):
        BlockConfig(8, 16, 16, kind="depthwise_separable")
    with pytest.raises(RecordError, match="mlp has no squeeze-and-excitation"):
        BlockConfig(8, 16, 16, use_se=True, kind="mlp")
