"""Milliseconds to write ONNX networks and blocks, and what ONNX Runtime makes of them (fp32, int8, exits as `If`).

Run: python -m benchmarks.export [--json] [--latency] [--space NAME]

Write times are thread CPU time after one call that is not counted. `--latency` measures on the host (about a minute):
our int8 graph against the one of onnxruntime.quantization.quantize_static from the same images, and what an `If` costs:
exit taken against the network cut there, not taken against the graph that computes every head.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import parser, report, spread
from nas.compress.calibrate import calibrate
from nas.core.records import Candidate, LayerSpec
from nas.core.walk import expand
from nas.export.graph import (
    forced_exit,
    layer_model,
    network_model,
    nominal_quant,
    random_weights,
    tensors_model,
)
from nas.space.space import SearchSpace, load_space

FOLDER = Path(__file__).parents[1] / "search_spaces"
CLASSES = 10
NETWORKS = 20
COUNTED = 8  # networks per space whose executed operators are counted
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def cpu_ms(work: Callable[[], object]) -> float:
    """Thread CPU milliseconds of one call."""
    start = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - start) / 1e6


def networks(space: SearchSpace) -> list[Candidate]:
    """The largest network and random ones, with an exit after every stage but the last where the space has exits."""
    rng = np.random.default_rng(0)
    genotypes = [space.largest(), *(space.sample(rng) for _ in range(NETWORKS - 1))]
    candidates = [space.decode(genotype) for genotype in genotypes]
    return [c.with_thresholds((0.5,) * len(c.exits)) for c in candidates]


def write_times(candidates: list[Candidate], precision: str, form: str) -> list[float]:
    """One sample per network; the largest comes first."""
    times = []
    for candidate in candidates:
        chosen = candidate.with_precision(precision)  # type: ignore[arg-type]
        weights, quant = random_weights(chosen, 0), nominal_quant(chosen)
        write = lambda c=chosen, w=weights, q=quant: network_model(c, w, MEAN, STD, quant=q, form=form)  # noqa: E731
        write()
        times.append(cpu_ms(write))
    return times


def block_times(candidates: list[Candidate], precision: str) -> list[float]:
    """One sample per distinct layer of the networks, random weights included."""
    layers: dict[str, LayerSpec] = {}
    for candidate in candidates:
        layers.update({x.key: x for x in expand(candidate.with_precision(precision))})  # type: ignore[arg-type]
    times = []
    for layer in layers.values():
        layer_model(layer)
        times.append(cpu_ms(lambda x=layer: layer_model(x)))
    return times


def executed(candidates: list[Candidate], form: str) -> dict[str, Any]:
    """Convolutions written and integer convolutions executed, and all operators of the first network."""
    from nas.devices.onnxruntime_cpu import op_counts  # ONNX Runtime: not needed for the write times

    complete, operators = 0, {}
    for candidate in candidates:
        int8 = candidate.with_precision("int8")
        model = network_model(int8, random_weights(int8, 0), MEAN, STD, quant=nominal_quant(int8), form=form)
        counts = op_counts(model)
        kept = [x for x in expand(int8) if form != "plain" or x.kind != "exit_head"]
        floats = counts.get("Conv", 0) + counts.get("FusedConv", 0)
        complete += counts.get("QLinearConv", 0) == sum(len(x.convolutions) for x in kept) and floats == 0
        operators = operators or counts
    first = candidates[0]
    float_model = network_model(first, random_weights(first, 0), MEAN, STD, form=form)
    return {
        "networks": len(candidates),
        "fully_integer": complete,
        "largest_int8": operators,
        "largest_fp32": op_counts(float_model),
    }


def latencies(candidate: Candidate) -> dict[str, float]:
    """Measured milliseconds of one network in every form, and of the graph of quantize_static."""
    from nas.devices.base import MeasureJob
    from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu

    device = OnnxRuntimeCpu()
    weights = random_weights(candidate, 0)
    images = smooth_images(64, candidate.resolution)
    quant = calibrate(device.run, *tensors_model(candidate, weights, MEAN, STD), images)
    models: dict[str, bytes] = {}
    for precision in ("fp32", "int8"):
        chosen = candidate.with_precision(precision)  # type: ignore[arg-type]

        def write(c: Candidate, form: str) -> bytes:
            return network_model(c, weights, MEAN, STD, quant=quant, form=form)  # type: ignore[arg-type]

        models[f"{precision} plain"] = write(chosen, "plain")
        if candidate.exits:
            models[f"{precision} all heads"] = write(chosen, "logits")
            gated = write(chosen, "if")
            models[f"{precision} if, not taken"] = forced_exit(gated, len(candidate.exits))
            for k in range(len(candidate.exits)):
                models[f"{precision} if, exit {k}"] = forced_exit(gated, k)
                # the network cut behind this exit alone: the earlier heads are part of both
                always = tuple(0.0 if i == k else e.threshold for i, e in enumerate(candidate.exits))
                cut = write(chosen.with_thresholds(always), "if")
                models[f"{precision} cut at {k}"] = forced_exit(cut, k)
    models["int8 quantize_static"] = quantized_elsewhere(models["fp32 plain"], images)
    jobs = [MeasureJob(name, "network", "mixed", model, 0) for name, model in models.items()]
    return {m.key: m.latency_ms for m in device.measure(jobs) if m.latency_ms is not None}


def quantized_elsewhere(model: bytes, images: NDArray[np.uint8]) -> bytes:
    """The same network quantized by ONNX Runtime: u8/s8, per channel, min-max, the same images."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"image": np.float32(image.transpose(2, 0, 1)[None])} for image in images]

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return self.left.pop() if self.left else None

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model)
        q.quantize_static(
            source,
            target,
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            nodes_to_exclude=["image.scaled/Mul", "image.normalised/Add"],
        )
        logging.disable(logging.NOTSET)
        return target.read_bytes()


def smooth_images(count: int, side: int) -> NDArray[np.uint8]:
    """Random pictures uint8 [N, H, W, 3] of a few waves each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    frequency, phase = rng.uniform(-4, 4, (2, count, 1, 1, 3)), rng.uniform(0, 6.3, (count, 1, 1, 3))
    wave = np.sin(2 * np.pi * (frequency[0] * x[None, :, :, None] + frequency[1] * y[None, :, :, None]) + phase)
    return np.clip(128 + rng.uniform(20, 110, (count, 1, 1, 3)) * wave, 0, 255).astype(np.uint8)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--latency", action="store_true", help="also measure on this host")
    options.add_argument("--space", default="*", help="only the search spaces with this name (may hold *)")
    args = options.parse_args()
    rows: list[list[Any]] = []
    document: dict[str, Any] = {"benchmark": "export", "spaces": {}}
    for path in sorted(FOLDER.glob(f"{args.space}.yaml")):
        space = load_space(path, CLASSES)
        candidates = networks(space)
        figures: dict[str, Any] = {}
        for precision in ("fp32", "int8"):
            for form in ("plain", "if"):
                times = write_times(candidates, precision, form)
                figures[f"{precision} {form}"] = {**spread(times), "largest": times[0]}
                rows.append([space.name, precision, form, *spread(times).values(), times[0]])
            times = block_times(candidates, precision)
            figures[f"{precision} block"] = spread(times)
            rows.append([space.name, precision, "block", *spread(times).values(), ""])
        figures["executed"] = {form: executed(candidates[:COUNTED], form) for form in ("plain", "if")}
        if args.latency:
            with_exits = next((c for c in candidates if c.exits), replace(candidates[0], exits=()))
            figures["latency_ms"] = latencies(with_exits)
        document["spaces"][space.name] = figures
    columns = ("space", "precision", "written", "n", "median ms", "min", "max", "largest network")
    report("CPU milliseconds to write a graph", columns, rows, document, as_json=False)
    for name, figures in document["spaces"].items():
        for form, found in figures["executed"].items():
            print(
                f"\n{name}, {form}: {found['fully_integer']} of {found['networks']} int8 networks run fully in integers"
            )
            for precision in ("int8", "fp32"):
                counts = ", ".join(f"{op} {n}" for op, n in found[f"largest_{precision}"].items())
                print(f"  largest, {precision}: {counts}")
        for label, value in figures.get("latency_ms", {}).items():
            print(f"  {label:24} {value:.4f} ms")
    print()
    report("", (), (), document, args.json)


if __name__ == "__main__":
    main()
