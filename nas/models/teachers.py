"""Teachers in torch: a plain ResNet that is trained on the spot, and torchvision models with local weights.

He, Zhang, Ren, Sun 2015, arXiv 1512.03385: basic blocks of two 3x3 convolutions with a skip connection (figure 5 left,
projection shortcut B). Differs: 3x3 stem convolutions of stride 2 until the map is small, as the images are.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nas.core.errors import ConfigError, RecordError, StorageError, did_you_mean
from nas.models.hooks import hooked

AUXILIARY = ("googlenet", "inception_v3")  # have auxiliary classifiers, which only training uses
STEM_MAP_PX = 28  # the stem halves the map until its side is at most this: once for 32 px, three times for 224 px


def stem_strides(resolution: int) -> int:
    """Number of stem convolutions, each of stride 2, for images with a side of `resolution` pixels."""
    count, side = 1, -(-resolution // 2)
    while side > STEM_MAP_PX:
        count, side = count + 1, -(-side // 2)
    return count


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection (1x1 convolution where the shape changes)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Stem, stages of basic blocks (the first of every later stage has stride 2), global mean, linear classifier.

    Input: normalised images [B, 3, H, W]; output: logits [B, K].
    """

    def __init__(self, widths: Sequence[int], blocks: int, num_classes: int, resolution: int) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        channels = 3
        for _ in range(stem_strides(resolution)):
            stem += [nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
            channels = widths[0]
        self.stem = nn.Sequential(*stem)
        stages = []
        for s, width in enumerate(widths):
            for b in range(blocks):
                stages.append(BasicBlock(channels, width, 2 if s and not b else 1))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def count_macs(module: nn.Module, resolution: int) -> int:
    """Multiply-adds of the convolutions and linear layers of one image with a side of `resolution` pixels.

    Products inside attention are not counted.
    """
    total = 0

    def add(part: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        each = part.weight[0].numel() if isinstance(part, nn.Conv2d) else part.in_features
        total += each * output.numel()

    counted = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    was_training = module.training
    try:
        with torch.no_grad(), hooked((m, add) for m in counted):
            module.eval()(torch.zeros(1, 3, resolution, resolution, device=next(module.parameters()).device))
    finally:
        module.train(was_training)
    return total


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from a .pt/.pth state dict that holds tensors only.

    Nothing in the file is executed: pickled objects other than tensors and plain containers are refused.

    Raises:
        StorageError: the file is missing or damaged.
        RecordError: the file is refused; the message says how to make one that is not.
    """
    if not path.is_file():
        raise StorageError(f"teacher.weights: {path} is not a file")
    how = (
        "Save the weights alone, where the model was trained: "
        "safetensors.torch.save_file(model.state_dict(), 'teacher.safetensors')"
    )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise StorageError(f"teacher.weights: {path} is not a whole safetensors file: {e}") from e
    if path.suffix not in (".pt", ".pth"):
        raise RecordError(
            f"teacher.weights: {path}: files of type {path.suffix or 'none'!r} are not read; "
            f"allowed: .safetensors, .pt, .pth (state dict). {how}"
        )
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as e:
        raise RecordError(
            f"teacher.weights: {path} holds more than tensors, and such a file can run any code when it is opened, "
            f"so it is refused. {how}"
        ) from e
    except (OSError, EOFError, RuntimeError, KeyError, ValueError) as e:
        raise StorageError(f"teacher.weights: {path} cannot be read as a state dict: {type(e).__name__}: {e}") from e
    if isinstance(content, Mapping):
        for wrapper in ("state_dict", "model", "model_state_dict"):  # names that training scripts commonly use
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise RecordError(f"teacher.weights: {path} is not a state dict (names to tensors). {how}")
    return {str(name).removeprefix("module."): value for name, value in content.items()}  # DataParallel's prefix


def attention_layers(module: nn.Module) -> tuple[str, ...]:
    """Names of the multi-head attentions of a model, first to last."""
    return tuple(name for name, part in module.named_modules() if isinstance(part, nn.MultiheadAttention))


def torchvision_attention(name: str) -> tuple[str, ...]:
    """Names of the multi-head attentions of a torchvision model, first to last; no weights are made or read.

    Raises:
        ConfigError: no classification model of that name.
    """
    _check_name(name)
    with torch.device("meta"):
        return attention_layers(_built(name, 2))


def _check_name(name: str) -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"teacher.name: torchvision has no classification model {name!r}{did_you_mean(name, known)}; "
            f"for example resnet18, resnet50, efficientnet_b0, convnext_tiny"
        )


def _built(name: str, num_classes: int) -> nn.Module:
    import torchvision

    extra = {"aux_logits": False, "init_weights": False} if name in AUXILIARY else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    return model


def torchvision_model(name: str, weights: Path, num_classes: int) -> nn.Module:
    """A torchvision classification model for `num_classes` classes with weights from a local file.

    Input: images [B, 3, H, W], normalised as in its own training; output: logits [B, K].

    Raises:
        ConfigError: no classification model of that name.
        RecordError: the weights belong to another model or other classes.
        StorageError: the weights cannot be read.
    """
    _check_name(name)
    tensors = read_weights(weights)
    model = _built(name, num_classes)
    wanted = model.state_dict()
    if name in AUXILIARY:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    unknown = [key for key in tensors if key not in wanted]
    if missing or unknown:
        shown = (missing or unknown)[0]
        raise RecordError(
            f"teacher.weights: {weights} does not fit torchvision's {name}: {len(missing)} tensors are missing and "
            f"{len(unknown)} unknown (first: {shown}). Set teacher.name to the model that was saved"
        )
    for key, value in tensors.items():
        if value.shape != wanted[key].shape:
            raise RecordError(
                f"teacher.weights: {weights}: {key} is {list(value.shape)}, {name} with {num_classes} classes has "
                f"{list(wanted[key].shape)}. The teacher must have been trained on the classes of this data set"
            )
    model.load_state_dict(tensors, strict=False)  # strict up to num_batches_tracked, checked above
    return model.eval()
