"""One block as a row of a latency table: written as ONNX, measured on this machine's CPU, in fp32 and int8.

Run from the project's folder: .venv/bin/python examples/measure_block.py
"""

from __future__ import annotations

from dataclasses import replace

from nas.core.records import LayerSpec
from nas.core.units import format_ms
from nas.devices import open_device
from nas.devices.base import MeasureJob
from nas.export.graph import layer_model

block = LayerSpec(
    kind="inverted_residual",
    in_channels=24,
    in_size=16,
    out_channels=24,
    out_size=16,
    kernel_size=3,
    stride=1,
    expanded_channels=72,
    hidden_channels=0,
    use_se=False,
    activation="relu",
    precision="fp32",
)

device = open_device("cpu")
layers = [replace(block, precision=precision) for precision in device.profile.precisions]
jobs = [MeasureJob(layer.key, "row", layer.precision, layer_model(layer), layer.macs) for layer in layers]

print(f"on {device.profile.name}, {block.macs} MACs:")
for result in device.measure(jobs):
    if result.latency_ms is None:
        print(f"{result.key}: failed: {result.error}")
        continue
    calm = sum(result.accepted)
    samples = sum(map(len, result.rounds_ms))
    print(
        f"{result.key}: {format_ms(result.latency_ms)}, {samples} samples, {calm} of {len(result.accepted)} rounds calm"
    )
