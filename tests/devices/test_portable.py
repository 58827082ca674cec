"""Models are stamped for older runtimes only as far as their operators stay the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.devices.base import MeasureJob
from nas.devices.graphs import gate_model, identity_model, reference_model
from nas.devices.onnxruntime_cpu import bound_run, run_model
from nas.devices.portable import feed_bytes, image_bytes, portable_model
from nas.export.graph import network_model, nominal_quant, random_weights
from nas.testing import mean_model


def int8_network() -> bytes:
    block = BlockConfig(8, 16, 16, stride=2, use_se=True, activation="hard_swish")
    candidate = Candidate(16, 4, StemConfig(8), (StageConfig((block,)),), HeadConfig()).with_precision("int8")
    weights, quant = random_weights(candidate, 0), nominal_quant(candidate)
    return network_model(candidate, weights, (0.5,) * 3, (0.25,) * 3, quant=quant, form="plain", batch=1)


@pytest.mark.parametrize(
    ("make", "opset", "format_version"),
    [
        (mean_model, 14, 7),  # Mul, of a model that is not written by this project
        (reference_model, 14, 7),  # HardSwish
        (identity_model, 13, 7),
        (gate_model, 13, 7),  # Softmax; the branches of If count too
        (int8_network, 14, 7),  # HardSwish again
    ],
)
def test_the_stamp_is_that_of_the_newest_operator(make: Callable[[], bytes], opset: int, format_version: int) -> None:
    proto = onnx.load_model_from_string(portable_model(make()))
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, format_version)
    onnx.checker.check_model(proto, full_check=True)
    bound_run(proto.SerializeToString(), {})()


def test_an_int8_network_computes_the_same() -> None:
    model = int8_network()
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 16, 16)).astype(np.float32)
    other = portable_model(model)
    assert onnx.load_model_from_string(other).opset_import[0].version < 17
    assert np.array_equal(run_model(model, images)[0], run_model(other, images)[0])


def test_models_with_operators_of_others_and_what_is_no_model_stay_as_they_are() -> None:
    proto = onnx.load_model_from_string(mean_model())
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    assert portable_model(proto.SerializeToString()) == proto.SerializeToString()
    assert portable_model(b"\x00not onnx") == b"\x00not onnx"


def test_an_unknown_operator_keeps_the_stamp() -> None:
    proto = onnx.load_model_from_string(mean_model())
    proto.graph.node[0].op_type = "NoSuchOperator"
    assert onnx.load_model_from_string(portable_model(proto.SerializeToString())).opset_import[0].version == 17


def test_an_open_batch_is_fixed_and_a_fixed_one_kept() -> None:
    images = np.random.default_rng(0).uniform(0, 255, (3, 3, 8, 8)).astype(np.float32)
    fixed = portable_model(mean_model(None), 3)
    proto = onnx.load_model_from_string(fixed)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert np.allclose(run_model(fixed, images)[0], 2 * images.mean((2, 3)), rtol=1e-5)
    assert portable_model(mean_model(2), 3) == portable_model(mean_model(2))


def test_feeds_become_the_bytes_that_the_model_takes() -> None:
    job = MeasureJob(
        "k", "row", "fp32", mean_model(), 1, {"x": np.ones((1, 3, 8, 8), np.float64), "factor": np.ones(())}
    )
    assert feed_bytes(job) == {"x": np.ones((1, 3, 8, 8), "<f4").tobytes(), "factor": np.ones((), "<f4").tobytes()}
    broken = MeasureJob("k", "row", "fp32", b"\x00", 1, {"x": np.ones(2, np.float32)})
    assert feed_bytes(broken) == {"x": np.ones(2, np.float32).tobytes()}


def test_hard_swish_is_split_where_a_parser_cannot_read_it_and_gives_the_same() -> None:
    whole = reference_model()
    split = portable_model(whole, splits_hard_swish=True)
    proto = onnx.load_model_from_string(split)
    kinds = [node.op_type for node in proto.graph.node]
    assert "HardSwish" in [node.op_type for node in onnx.load_model_from_string(whole).graph.node]
    assert "HardSwish" not in kinds and "HardSigmoid" in kinds
    assert proto.opset_import[0].version <= 13, "what TensorRT 8.2 reads"
    onnx.checker.check_model(proto, full_check=True)
    entry = proto.graph.input[0]
    shape = [d.dim_value or 1 for d in entry.type.tensor_type.shape.dim]
    image = np.random.default_rng(0).uniform(-4, 4, shape).astype(np.float32)
    first, second = (run_model(m, image)[0] for m in (whole, split))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 7.0, 255.0])
def test_whole_pixels_travel_as_bytes(value: float) -> None:
    images = np.full((2, 3, 8, 8), value, np.float32)
    assert image_bytes(images, mean_model()) == (bytes([int(value)]) * images.size, "uint8")


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, float("nan")])
def test_other_values_travel_as_the_model_takes_them(value: float) -> None:
    images = np.full((2, 3, 8, 8), value, np.float32)
    assert image_bytes(images, mean_model()) == (images.tobytes(), "float32")
    assert image_bytes(images, b"not onnx") == (images.tobytes(), "float32")
