"""A stream of images: by the protocol on a clock that tests set, and through real graphs on the processor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_protocol import FakeClock, taking

from nas.core.errors import RecordError
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, Precision, StageConfig, StemConfig
from nas.data import evenly
from nas.devices.base import StreamJob
from nas.devices.board.onnx_facts import onnx_facts
from nas.devices.board.ort_runner import OnnxRuntimeRunner
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu, run_model
from nas.devices.protocol import Gate, ProtocolSettings
from nas.devices.stream import Opened, stream_times
from nas.export.dialect import TRT_10_13
from nas.export.forms import answers
from nas.export.graph import network_model, random_weights, segment_models
from nas.measure.stream import measured_stream

SETTINGS = ProtocolSettings(calibration_checks=2, warmup_runs=1, network_round_ms=1.0, network_sessions=2)


class Stream:
    """Images that take 100 us, every third one 400 us; putting one into place takes 1000 us that must not count."""

    def __init__(self, clock: FakeClock, stolen_us: float = 0.0) -> None:
        self.clock, self.stolen_us, self.now, self.seen = clock, stolen_us, 0, []

    def us(self, number: int) -> float:
        return 400.0 if number % 3 == 2 else 100.0

    def exit(self, number: int) -> int:
        return int(number % 3 == 2)

    def open(self) -> Opened:
        def place(number: int) -> None:
            self.now = number
            self.seen.append(number)
            self.clock.spend(1000.0)

        return Opened(place, lambda: self.clock.spend(self.us(self.now), self.stolen_us), lambda: self.exit(self.now))


def test_every_image_has_its_own_time_without_what_puts_it_into_place() -> None:
    clock = FakeClock()
    stream = Stream(clock)
    gate = Gate(taking(clock, [300]), SETTINGS, clock)
    times = stream_times("s", 20, stream.open, gate, SETTINGS, clock)
    assert times.latency_ms == pytest.approx([stream.us(i) / 1e3 for i in range(20)])
    assert times.typical_ms == pytest.approx(times.latency_ms)
    assert times.is_calm
    assert list(times.exits) == [stream.exit(i) for i in range(20)]
    # in each of two sessions the warm-up, then four times all images in their order; once more to ask where they left
    passes = len(range(20)) * SETTINGS.network_rounds
    assert len(stream.seen) == SETTINGS.network_sessions * (passes + SETTINGS.min_network_runs) + 20


def test_a_session_is_closed_before_the_next_is_opened() -> None:
    clock = FakeClock()
    stream = Stream(clock)
    opened: list[weakref.ref[object]] = []

    def open_session() -> Opened:
        assert not any(session() is not None for session in opened)
        session = stream.open()
        run = partial(session.run)
        opened.append(weakref.ref(run))
        return replace(session, run=run)

    stream_times("s", 20, open_session, Gate(taking(clock, [300]), SETTINGS, clock), SETTINGS, clock)
    assert len(opened) == SETTINGS.network_sessions


def test_a_disturbed_round_begins_with_its_first_image_again_and_is_marked() -> None:
    clock = FakeClock()
    stream = Stream(clock, stolen_us=5000.0)
    settings = ProtocolSettings(
        calibration_checks=2, warmup_runs=1, network_rounds=1, network_sessions=1, retries=1, wait_ms=0
    )
    gate = Gate(taking(clock, [300]), settings, clock)
    times = stream_times("s", 6, stream.open, gate, settings, clock)
    assert stream.seen[settings.min_network_runs :] == [0, 1, 2, 3, 4, 5] * 3
    assert times.latency_ms == pytest.approx([0.1, 0.1, 0.4] * 2)
    assert not times.is_calm


def network(threshold: float) -> Candidate:
    stages = (
        StageConfig((BlockConfig(8, 16, 8),)),
        StageConfig((BlockConfig(8, 64, 32, stride=2), BlockConfig(32, 256, 32), BlockConfig(32, 256, 32))),
    )
    return Candidate(32, 4, StemConfig(8), stages, HeadConfig(), (ExitConfig(0, threshold=threshold),))


@pytest.mark.parametrize("form", ["if", "chain"])
def test_images_that_leave_early_take_less_time_in_both_deployed_forms(form: str) -> None:
    quick = ProtocolSettings(network_rounds=2, network_sessions=2, network_round_ms=0.5, retries=0, wait_ms=0)
    device = OnnxRuntimeCpu(quick)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    plain = network(0.5)
    weights = random_weights(plain, 0)
    stay = network_model(plain.with_thresholds([0.999]), weights, (0.5,) * 3, (0.25,) * 3, form="logits", batch=None)
    first = device.run(stay, np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))[0]
    confidence = np.exp(first).max(axis=1) / np.exp(first).sum(axis=1)
    candidate = plain.with_thresholds([float(np.median(confidence))])
    make: Callable[..., object] = network_model if form == "if" else segment_models
    artefact = make(candidate, weights, (0.5,) * 3, (0.25,) * 3, **({"form": "if"} if form == "if" else {}))
    stream = measured_stream(device, "s", artefact, images, (0.1, 0.3))
    assert stream is not None
    assert stream.shares == pytest.approx((0.5, 0.5), abs=0.05)
    assert stream.sum_ms == pytest.approx(0.2, abs=0.01)
    models = (artefact,) if isinstance(artefact, bytes) else tuple(s.model for s in artefact)
    thresholds = () if form == "if" else (candidate.exits[0].threshold,)
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    measured = device.stream_times(StreamJob("s", models, thresholds, pixels))
    times = np.array(measured.latency_ms)
    left = confidence >= np.median(confidence)
    assert np.mean((np.array(measured.exits) == 0) == left) >= 23 / 24, "one lies at the threshold itself"
    assert 1.3 * np.median(times[left]) < np.median(times[~left])


@pytest.mark.parametrize("binds", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_runner_of_a_board_decides_as_the_models_do_one_by_one(
    precision: Precision, binds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feature maps of a half precision network are half floats between its segments."""
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32)).astype(np.float32)
    plain = network(0.5).with_precision(precision)
    weights, gray = random_weights(plain, 0), ((0.5,) * 3, (0.25,) * 3)
    sure = run_model(segment_models(plain, weights, *gray, dialect=TRT_10_13)[0].model, images)[1]
    chain = segment_models(plain.with_thresholds([float(np.sort(sure)[12])]), weights, *gray, dialect=TRT_10_13)
    kinds = {entry["name"]: entry["dtype"] for entry in onnx_facts(chain[0].model).outputs}
    assert kinds[chain[0].features_out] == {"fp32": "float32", "fp16": "float16"}[precision]
    if not binds:
        monkeypatch.setattr("nas.devices.board.ort_runner._can_bind", lambda _: False)
    runner = OnnxRuntimeRunner()
    sessions = []
    for number, segment in enumerate(chain):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(segment.model)
        sessions.append(runner.load(str(path), {}))
    opened = runner.chain(sessions, [s.threshold for s in chain if s.threshold is not None])
    assert opened.input() == {"name": "image", "dtype": "float32", "shape": [1, 3, 32, 32]}
    told = opened.time(image.tobytes() for image in images)
    opened.close()
    _, expected = answers(run_model, chain, images, 1)
    assert told["exits"] == expected.tolist() and sum(expected) == 12, "the one at the threshold leaves"
    assert (told["clock"], len(told["samples_ms"])) == ("thread_cpu", 24) and 0 < told["cpu_share"] <= 1


def test_at_most_so_many_images_are_taken_evenly() -> None:
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    assert evenly(images, 4).ravel().tolist() == [0, 3, 6, 9]
    assert evenly(images, 99).ravel().tolist() == list(range(10))


def test_a_chain_needs_a_threshold_between_two_models() -> None:
    with pytest.raises(RecordError, match="stream s: 2 models need 1 thresholds"):
        StreamJob("s", (b"a", b"b"), (), np.zeros((1, 3, 4, 4), np.float32))
