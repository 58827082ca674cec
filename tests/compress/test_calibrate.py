import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime import quantization as ortq

from nas.compress.calibrate import calibrate, network_input
from nas.core.errors import RecordError, UsageError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, QuantSpec, StageConfig, StemConfig
from nas.export.graph import network_model, random_weights, tensors_model

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def candidate(side: int = 32) -> Candidate:
    stages = (
        StageConfig((BlockConfig(8, 24, 16, 3, 2), BlockConfig(16, 48, 16, 5, 1))),
        StageConfig((BlockConfig(16, 64, 24, 5, 2, use_se=True, activation="hard_swish"),)),
    )
    return Candidate(side, 6, StemConfig(8), stages, HeadConfig(64, 32), (ExitConfig(0, 0, 0.5),))


def smooth_images(count: int, side: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = (
        rng.uniform(-4, 4, (count, 1, 1, 3)) * x[None, :, :, None]
        + rng.uniform(-4, 4, (count, 1, 1, 3)) * y[None, :, :, None]
    )
    images = 128 + rng.uniform(20, 110, (count, 1, 1, 3)) * np.sin(
        2 * np.pi * waves + rng.uniform(0, 6, (count, 1, 1, 3))
    )
    return np.clip(images, 0, 255).astype(np.uint8)


def run(model: bytes, images: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    live = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return live.run(None, {live.get_inputs()[0].name: images})


def ranges(net: Candidate, images: np.ndarray, batch_size: int = 32) -> QuantSpec:
    return calibrate(run, *tensors_model(net, random_weights(net, 0), MEAN, STD), images, batch_size=batch_size)


def test_ranges_are_those_of_all_images_whatever_the_batches() -> None:
    net, images = candidate(), smooth_images(70, 32, 0)
    whole, parts = ranges(net, images, 70), ranges(net, images, 9)
    assert whole.images == parts.images == 70 and list(whole.lo) == list(parts.lo)
    np.testing.assert_allclose(list(whole.lo.values()), list(parts.lo.values()), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(list(whole.hi.values()), list(parts.hi.values()), rtol=1e-4, atol=1e-5)
    normalised = (images / 255 - 0.5) / 0.25
    assert whole.lo["image"] == pytest.approx(normalised.min(), rel=1e-5)
    assert whole.hi["image"] == pytest.approx(normalised.max(), rel=1e-5)


def test_raw_pixels_and_images_at_rest_give_the_same() -> None:
    net, images = candidate(), smooth_images(64, 32, 1)
    assert ranges(net, images) == ranges(net, network_input(images))


def test_int8_network_stays_close_to_the_float_one() -> None:
    net, weights = candidate(), random_weights(candidate(), 0)
    quant = ranges(net, smooth_images(128, 32, 2))
    fresh = network_input(smooth_images(100, 32, 3))
    whole = run(network_model(net, weights, MEAN, STD, form="logits", batch=None), fresh)
    int8 = run(
        network_model(net.with_precision("int8"), weights, MEAN, STD, quant=quant, form="logits", batch=None), fresh
    )
    for reference, other in zip(whole, int8, strict=True):
        spread = reference - reference.mean(axis=0)  # random weights: a constant part would flatter the figure
        assert np.linalg.norm(reference - other) / np.linalg.norm(spread) < 0.15
        assert np.linalg.norm(reference - other) / np.linalg.norm(reference) < 0.08


class ImageReader(ortq.CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.left = [{"image": image[None]} for image in images]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def test_agrees_with_the_quantizer_of_onnx_runtime(tmp_path) -> None:
    """Independent cross-check: same ranges rule (min-max), same weights rule (u8/s8 per channel), other code."""
    net, weights = candidate(), random_weights(candidate(), 0)
    images = smooth_images(64, 32, 4)
    path = tmp_path / "float.onnx"
    path.write_bytes(network_model(net, weights, MEAN, STD))
    logging.disable(logging.WARNING)  # it asks for its own pre-processing
    try:
        ortq.quantize_static(
            path,
            tmp_path / "theirs.onnx",
            ImageReader(network_input(images)),
            quant_format=ortq.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ortq.QuantType.QUInt8,
            weight_type=ortq.QuantType.QInt8,
            op_types_to_quantize=["Conv", "Add", "Mul", "GlobalAveragePool", "HardSwish", "HardSigmoid", "Relu"],
            nodes_to_exclude=["image.scaled/Mul", "image.normalised/Add"],
        )
    finally:
        logging.disable(logging.NOTSET)
    quant = ranges(net, images)
    theirs = {
        t.name.removesuffix("_scale"): np.frombuffer(t.raw_data, np.float32)
        if t.raw_data
        else np.array(t.float_data, np.float32)
        for t in onnx.load(tmp_path / "theirs.onnx").graph.initializer
        if t.name.endswith("_scale")
    }
    compared = 0
    for name in quant.lo:
        if name in theirs and len(theirs[name]) == 1:
            ours = (max(quant.hi[name], 1e-6) - min(quant.lo[name], 0.0)) / 255
            assert ours == pytest.approx(float(theirs[name][0]), rel=2e-3), name
            compared += 1
    assert compared >= 10

    fresh = network_input(smooth_images(60, 32, 5))
    whole = np.concatenate([run(path.read_bytes(), image[None])[0] for image in fresh])
    mine = network_model(net.with_precision("int8"), weights, MEAN, STD, quant=quant, batch=None)
    error = np.linalg.norm(run(mine, fresh)[0] - whole)
    their_model = (tmp_path / "theirs.onnx").read_bytes()
    their_logits = np.concatenate([run(their_model, image[None])[0] for image in fresh])
    their_error = np.linalg.norm(their_logits - whole)
    assert error < 1.5 * their_error  # theirs is larger where 16-bit sums of its 8-bit weights saturate


def test_too_few_images_are_worth_a_warning(caplog) -> None:
    heard: list[str] = []
    net = candidate()
    calibrate(run, *tensors_model(net, random_weights(net, 0), MEAN, STD), smooth_images(5, 32, 0), warn=heard.append)
    assert heard == [
        "int8 calibration on 5 images; at least 64 are recommended: rare large values may be missed and clipped later"
    ]
    ranges(net, smooth_images(5, 32, 0))
    assert "5 images" in caplog.text
    caplog.clear()
    ranges(net, smooth_images(64, 32, 0))
    assert not caplog.text


def test_no_images_and_wrong_images_are_refused() -> None:
    net = candidate()
    with pytest.raises(UsageError, match="at least one image"):
        ranges(net, np.zeros((0, 32, 32, 3), np.uint8))
    with pytest.raises(UsageError, match=r"uint8 \[N, H, W, C\].*got float64 \[2, 3, 32, 32\]"):
        ranges(net, np.zeros((2, 3, 32, 32)))


def test_diverged_network_is_named_by_its_tensor() -> None:
    net, weights = candidate(), random_weights(candidate(), 0)
    weights["stages.0.0.project.weight"] *= np.float32(1e38)
    weights["stages.0.1.expand.weight"] *= np.float32(1e38)
    model, names = tensors_model(net, weights, MEAN, STD)
    with pytest.raises(RecordError, match=r"tensor 'stages\.0\..*the training of this student diverged"):
        calibrate(run, model, names, smooth_images(64, 32, 0))
