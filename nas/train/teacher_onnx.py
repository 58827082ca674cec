"""Teachers as ONNX files, to measure their latency and to run them: raw pixels go in, normalisation is inside.

The built-in ResNet is written directly, with batch norm folded. torchvision models go through torch's exporter.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nas.core.errors import RecordError
from nas.models.teachers import BasicBlock, ResNet

OPSET = 17
PIXEL_SCALE = "pixel_scale"  # names the normalisation, so that it is not added to a file that has it
IR_VERSION = 8  # what ONNX Runtime 1.13 and newer, and TensorRT 8.6 and newer, read


class _Graph:
    """Nodes and initializers in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def normalise(self, x: str, mean: Sequence[float], std: Sequence[float]) -> str:
        """(x / 255 - mean) / std as one product and one sum."""
        scale = (1.0 / (255.0 * np.asarray(std))).astype(np.float32).reshape(1, 3, 1, 1)
        shift = (-np.asarray(mean) / np.asarray(std)).astype(np.float32).reshape(1, 3, 1, 1)
        scaled = self.node("Mul", [x, self.constant(PIXEL_SCALE, scale)], "pixels_scaled")
        return self.node("Add", [scaled, self.constant("pixel_shift", shift)], "pixels_normalised")

    def convolution(self, x: str, name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
        weight, bias = folded(conv, norm)
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node(
            "Conv",
            inputs,
            name,
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=[int(conv.padding[0])] * 4,
        )


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias, float32, of a convolution with its batch norm folded in (computed in float64)."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("batch norm has no running statistics to fold")
    scale = norm.weight.detach().double() / torch.sqrt(variance.double() + norm.eps)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = norm.bias.detach().double() - mean.double() * scale
    return weight.float().contiguous().numpy(), bias.float().numpy()


def resnet_model(module: ResNet, mean: Sequence[float], std: Sequence[float], resolution: int) -> bytes:
    """ONNX of the built-in ResNet: `images` raw float32 [1, 3, H, W] to `logits` [1, K]."""
    graph = _Graph()
    x = graph.normalise("images", mean, std)
    stem = list(module.stem)
    for i in range(0, len(stem), 3):
        conv, norm = stem[i], stem[i + 1]
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            raise ValueError("a stem is made of convolution, batch norm and ReLU")
        x = graph.node("Relu", [graph.convolution(x, f"stem.{i // 3}", conv, norm)], f"stem.{i // 3}.relu")
    for i, block in enumerate(module.blocks):
        if not isinstance(block, BasicBlock):
            raise ValueError("stages are made of basic blocks")
        x = _block(graph, x, f"blocks.{i}", block)
    mean_map = graph.node("GlobalAveragePool", [x], "mean")
    flat = graph.node("Flatten", [mean_map], "flat", axis=1)
    weight = graph.constant("classifier.weight", module.classifier.weight.detach().numpy())
    bias = graph.constant("classifier.bias", module.classifier.bias.detach().numpy())
    graph.node("Gemm", [flat, weight, bias], "logits", transB=1)
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, resolution, resolution])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, module.classifier.out_features])]
    made = helper.make_graph(graph.nodes, "teacher", inputs, outputs, graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _block(graph: _Graph, x: str, name: str, block: BasicBlock) -> str:
    y = graph.node("Relu", [graph.convolution(x, f"{name}.conv1", block.conv1, block.bn1)], f"{name}.relu1")
    y = graph.convolution(y, f"{name}.conv2", block.conv2, block.bn2)
    if block.shortcut is not None:
        conv, norm = block.shortcut
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            raise ValueError("a shortcut is made of convolution and batch norm")
        x = graph.convolution(x, f"{name}.shortcut", conv, norm)
    return graph.node("Relu", [graph.node("Add", [y, x], f"{name}.add")], f"{name}.relu2")


class _RawPixels(nn.Module):
    """Normalisation in front of a model."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        deviation = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
        self.register_buffer("scale", 1.0 / (255.0 * deviation))
        self.register_buffer("shift", -torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1) / deviation)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * self.scale + self.shift)


def torch_model(module: nn.Module, mean: Sequence[float], std: Sequence[float], resolution: int, name: str) -> bytes:
    """ONNX of any torch model by torch's TorchScript exporter: `images` raw float32 [1, 3, H, W] to `logits` [1, K].

    The newer exporter needs a further package (onnxscript), which nothing else here needs.

    Raises:
        RecordError: torch cannot export this model; the message says what to do.
    """
    wrapped = _RawPixels(module, mean, std).eval().to(memory_format=torch.contiguous_format)
    buffer = io.BytesIO()
    images = torch.zeros(1, 3, resolution, resolution)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation of this exporter; traces of shapes, which are fixed here
            torch.onnx.export(
                wrapped,
                (images,),
                buffer,
                dynamo=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
            )
    except Exception as e:  # the exporter raises many types; all mean that this model has no ONNX form here
        raise RecordError(
            f"teacher.name: torch {torch.__version__} cannot export {name} to ONNX, so its latency cannot be measured: "
            f"{type(e).__name__}: {e}. Export it elsewhere and give the file with teacher.kind 'onnx'"
        ) from e
    return buffer.getvalue()


def input_side(data: bytes, where: str) -> int | None:
    """The fixed input side in pixels of an ONNX image classifier, None where it is free.

    Raises:
        RecordError: not an ONNX model with one float32 image input [B, 3, H, W].
    """
    shape = _image_input(_load(data, where), where).type.tensor_type.shape.dim
    sides = {int(d.dim_value) for d in shape[2:] if d.HasField("dim_value") and d.dim_value > 0}
    if len(sides) > 1:
        raise RecordError(f"teacher.weights: {where}: input of {sorted(sides)} pixels; square images are needed")
    return sides.pop() if sides else None


def with_pixel_input(data: bytes, mean: Sequence[float], std: Sequence[float], resolution: int, where: str) -> bytes:
    """The same ONNX model with normalisation in front: raw pixels float32 [B, 3, H, W] go in; the batch stays as it is.

    Raises:
        RecordError: not an ONNX model with one float32 image input [B, 3, H, W].
    """
    model = _load(data, where)
    entry = _image_input(model, where)
    shape = entry.type.tensor_type.shape.dim
    for dim in shape[2:]:
        dim.dim_value = resolution
    front = _Graph()
    output = front.normalise(entry.name, mean, std)
    if np.allclose(mean, 0) and np.allclose(std, 1 / 255):
        return model.SerializeToString()  # it takes raw pixels as it is
    if any(i.name == PIXEL_SCALE for i in model.graph.initializer):
        raise RecordError(f"teacher.weights: {where} normalises its pixels itself; set teacher.pixels to 'raw'")
    _rename_input(model.graph, entry.name, output)
    for node in reversed(front.nodes):
        model.graph.node.insert(0, node)
    model.graph.initializer.extend(front.initializers)
    del model.graph.value_info[:]
    return model.SerializeToString()


def with_batch_one(data: bytes) -> bytes:
    """The same ONNX model for one image at a time, as a device sees it."""
    model = onnx.load_model_from_string(data)
    initializers = {i.name for i in model.graph.initializer}
    for value in (*(i for i in model.graph.input if i.name not in initializers), *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model.SerializeToString()


def _rename_input(graph: Any, name: str, replacement: str) -> None:
    """Makes every reader of `name` read `replacement`, bodies of If and Loop included."""
    for node in graph.node:
        for i, given in enumerate(node.input):
            if given == name:
                node.input[i] = replacement
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_input(attribute.g, name, replacement)
            for body in attribute.graphs:
                _rename_input(body, name, replacement)
    for value in graph.output:
        if value.name == name:
            raise RecordError(f"teacher.weights: the ONNX model gives its input {name!r} back as output")


def _load(data: bytes, where: str) -> Any:
    try:
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model)
    except Exception as e:  # protobuf and the checker raise types without a common base; all mean a bad file
        raise RecordError(f"teacher.weights: {where} is not a valid ONNX model: {type(e).__name__}: {e}") from e
    return model


def _image_input(model: Any, where: str) -> Any:
    initializers = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in initializers]
    kind = inputs[0].type.tensor_type if inputs else None
    shape = list(kind.shape.dim) if kind is not None else []
    if len(inputs) != 1 or kind is None or kind.elem_type != TensorProto.FLOAT or len(shape) != 4:
        given = ", ".join(i.name for i in inputs) or "none"
        raise RecordError(f"teacher.weights: {where}: one float32 input [B, 3, H, W] is needed, the model has: {given}")
    if shape[1].HasField("dim_value") and shape[1].dim_value != 3:
        raise RecordError(
            f"teacher.weights: {where}: input [B, 3, H, W] is needed, channels first; its second size is "
            f"{shape[1].dim_value}"
        )
    return inputs[0]
