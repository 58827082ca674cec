"""Teachers: trained on the spot and cached, torchvision models with local weights, ONNX models.

`prepare_teacher` gives one `Teacher` for all three kinds; its accuracies are kept in the cache, so the test split is
looked at once per teacher.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from nas.core.errors import ConfigError, RecordError, StorageError, did_you_mean
from nas.core.jsonio import content_hash, file_sha256, read_record, to_plain, write_record
from nas.data import Dataset, augmented
from nas.data.records import Split
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.models.hooks import Hook, hooked
from nas.models.teachers import ResNet, attention_layers, count_macs, torchvision_model
from nas.train.compute import computes_bf16, device_of, training_device
from nas.train.evaluate import normalised, raw_tensor, threads, top1
from nas.train.loop import (
    EpochRecord,
    LossGuard,
    batches,
    epochs_from_plain,
    epochs_to_plain,
    lr_share,
    one_pass,
    parameter_groups,
    read_checkpoint,
    steps_per_epoch,
    write_checkpoint,
)
from nas.train.settings import Accelerator, TeacherSettings
from nas.train.soft_labels import LEAST_PROBABILITY
from nas.train.teacher_onnx import input_side, resnet_model, torch_model, with_batch_one, with_pixel_input

TEACHER_VERSION = 1  # raise it when a change of the code changes what a teacher learns
PREDICT_BATCH = 250
PROBE_IMAGES = 64  # of a given file, to see whether it gives logits or probabilities
OF_SEVERAL = ("members", "files", "weight", "average", "without")  # settings that do not decide what one network is
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's published statistics

Module = TypeVar("Module", bound=nn.Module)
Progress = Callable[[int, int], None]
FeatureReader = Callable[[np.ndarray, Sequence[str]], tuple[np.ndarray, dict[str, np.ndarray]]]


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """`teacher.json` of a cached teacher. `cpu_s` is what its training took, 0 where it was given."""

    version: int
    key: str
    name: str
    weights_sha256: str
    precision: str
    val_accuracy: float
    test_accuracy: float
    cpu_s: float
    params: int | None
    macs: int | None
    epochs: tuple[EpochRecord, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A teacher that is ready to be asked.

    Fields:
        name: for reports.
        sha256: of everything that decides its answers.
        precision: of the arithmetic behind its logits: `bf16` or `fp32`.
        val_accuracy, test_accuracy: shares of right answers, 0-1.
        cpu_s: CPU seconds of its training, 0 where it was given.
        params, macs: of one image at its own resolution; None where it is an ONNX file.
        resolution: side in pixels at which it sees the images.
        predict: uint8 [B, H, W, 3] at the data set's resolution to logits float32 [B, K].
        onnx: the network as ONNX bytes for measuring: raw pixels float32 [1, 3, R, R] to logits [1, K], R = resolution.
        features: uint8 [B, H, W, 3] and names of layers to logits [B, K] and by name the layers' maps float32
            [B, C, h, w], or of a multi-head attention its probabilities [B, N, N], the mean over the heads; None where
            a teacher gives logits only.
        feature_layers: names of the layers at the end of its stages; empty where they are not known.
        attention_layers: names of its multi-head attentions, first to last.
        members: of several that teach together, each network; empty for one.
        contributors: where there is more than one network, a line for each that taught or was left out.
    """

    name: str
    sha256: str
    precision: str
    val_accuracy: float
    test_accuracy: float
    cpu_s: float
    params: int | None
    macs: int | None
    resolution: int
    predict: Callable[[np.ndarray], np.ndarray]
    onnx: Callable[[], bytes]
    features: FeatureReader | None = None
    feature_layers: tuple[str, ...] = ()
    attention_layers: tuple[str, ...] = ()
    members: tuple[Teacher, ...] = ()
    contributors: tuple[str, ...] = ()

    @property
    def networks(self) -> tuple[Teacher, ...]:
        """Every network that has to be run for an answer."""
        return self.members or (self,)


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """What the three kinds have in common before accuracies are known."""

    name: str
    weights_sha256: str
    precision: str
    resolution: int
    predict: Callable[[np.ndarray], np.ndarray]
    onnx: Callable[[], bytes]
    params: int | None = None
    macs: int | None = None
    epochs: tuple[EpochRecord, ...] = ()
    features: FeatureReader | None = None
    feature_layers: tuple[str, ...] = ()
    attention_layers: tuple[str, ...] = ()


def has_bf16(device: torch.device) -> bool:
    """True where bf16 is multiplied in hardware; elsewhere it is emulated and slower than fp32."""
    if device.type == "cuda":
        return computes_bf16(device)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare_teacher(
    dataset: Dataset,
    settings: TeacherSettings,
    cache_dir: Path,
    progress: Progress | None = None,
    accelerator: Accelerator = "cpu",
) -> Teacher:
    """The teacher of a run, from the cache where it is; trained, resumed or loaded otherwise.

    Args:
        dataset: what it is trained and judged on.
        settings: which teacher.
        cache_dir: it is kept in `teachers/<key>` below.
        progress: called with (epochs done, epochs) while it is trained, the checkpoint written; may raise to stop.
        accelerator: where it is trained and asked; an ONNX teacher is asked on processors.

    Raises:
        ConfigError: settings that fit no teacher.
        RecordError: a weight file that is refused or does not fit.
        StorageError: files that cannot be read or written.
        TrainingError: the training diverged.
    """
    given = _given_file(settings)
    device = training_device(accelerator)
    precision = "bf16" if settings.kind != "onnx" and has_bf16(device) else "fp32"
    own = {name: value for name, value in to_plain(settings).items() if name not in OF_SEVERAL}
    key = content_hash([TEACHER_VERSION, dataset.sha256, dataset.augment, own, given, precision])
    home = cache_dir / "teachers"
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{key}.lock").touch()  # asked for now, not after the training
    except OSError as e:
        raise StorageError(
            f"{home}: cannot be written: {e.strerror or e}. Choose another cache: --set run.cache=DIR"
        ) from e
    folder = home / key
    with FileLock(home / f"{key}.lock"):  # two runs on one cache: the second waits and finds the teacher
        if settings.kind == "resnet":
            model = _resnet(dataset, settings, folder, key, precision, progress, device)
        elif settings.kind == "torchvision":
            model = _torchvision(dataset, settings, given, precision, device)
        else:
            model = _onnx(dataset, settings, given)
        path = folder / "teacher.json"
        record = read_record(TeacherRecord, path) if path.exists() else _judge(model, dataset, key)
        if not path.exists():
            write_record(path, record)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
    if record.weights_sha256 != model.weights_sha256:
        raise StorageError(f"{folder}: the weights are not those of {path.name}. Delete the folder to train again")
    return Teacher(
        model.name,
        content_hash([key, model.weights_sha256], 64),
        model.precision,
        record.val_accuracy,
        record.test_accuracy,
        record.cpu_s,
        model.params,
        model.macs,
        model.resolution,
        model.predict,
        model.onnx,
        model.features,
        model.feature_layers,
        model.attention_layers,
    )


def _given_file(settings: TeacherSettings) -> str:
    """SHA-256 of the weight file of a given teacher, "" for one that is trained here."""
    if settings.kind == "resnet":
        return ""
    path = Path(settings.weights or "")
    if not path.is_file():
        raise StorageError(f"teacher.weights: {path} is not a file; give the path of the teacher's weights")
    return file_sha256(path)


def _judge(model: _Model, dataset: Dataset, key: str) -> TeacherRecord:
    return TeacherRecord(
        TEACHER_VERSION,
        key,
        model.name,
        model.weights_sha256,
        model.precision,
        _accuracy(model, dataset.val),
        _accuracy(model, dataset.test),
        sum(e.cpu_s for e in model.epochs),
        model.params,
        model.macs,
        model.epochs,
    )


def _accuracy(model: _Model, split: Split) -> float:
    return top1(model.predict(split.images), split.labels)


def _forward(
    module: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    resolution: int,
    precision: str,
    count: int,
    device: torch.device,
) -> Callable[[np.ndarray], np.ndarray]:
    """Logits float32 [B, K] of one batch uint8 [B, H, W, 3], computed by `count` threads, or by the GPU."""
    module = module.eval().to(device, memory_format=torch.channels_last)

    def forward(images: np.ndarray) -> np.ndarray:
        with threads(count), torch.inference_mode(), _in_precision(device, precision):
            return module(resized(normalised(images, mean, std, device), resolution)).float().cpu().numpy()

    return forward


def _in_main_memory(module: Module) -> Module:
    """The module, or a copy of one that is on a GPU."""
    return module if device_of(module).type == "cpu" else copy.deepcopy(module).cpu()


def _in_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _predictor(forward: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def predict(images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), PREDICT_BATCH)
        return np.concatenate([forward(images[start : start + PREDICT_BATCH]) for start in starts])

    return predict


def _feature_reader(module: nn.Module, forward: Callable[[np.ndarray], np.ndarray]) -> FeatureReader:
    parts = dict(module.named_modules())

    def features(images: np.ndarray, layers: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        found: dict[str, np.ndarray] = {}

        def keeper(name: str) -> Hook:
            def keep(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if isinstance(part, nn.MultiheadAttention):
                    # What it gave came from a fused kernel that keeps no probabilities; `forward` calls no hooks.
                    output = part.forward(*inputs, need_weights=True)[1]
                elif not isinstance(output, Tensor) or output.ndim != 4:
                    raise ConfigError(
                        f"distill.teacher_layers: {name!r} gives no maps [B, C, H, W]; name a layer of convolutions"
                    )
                found[name] = output.float().cpu().numpy()

            return keep

        for name in layers:
            if name not in parts or not name:
                raise ConfigError(
                    f"distill.teacher_layers: the teacher has no layer {name!r}{did_you_mean(name, list(parts))}; its "
                    f"parts are {', '.join(n for n, _ in module.named_children())}, and their parts"
                )
        with hooked((parts[name], keeper(name)) for name in layers):
            return forward(images), found

    return features


def resized(x: Tensor, resolution: int) -> Tensor:
    """Images [B, 3, H, W] at another side in pixels, bilinear, averaged where they get smaller."""
    if x.shape[-1] == resolution:
        return x
    return functional.interpolate(x, (resolution, resolution), mode="bilinear", antialias=True)


def _resnet(
    dataset: Dataset,
    settings: TeacherSettings,
    folder: Path,
    key: str,
    precision: str,
    progress: Progress | None,
    device: torch.device,
) -> _Model:
    classes = len(dataset.class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        module = ResNet(settings.widths, settings.blocks, classes, dataset.resolution)
    weights = folder / "weights.safetensors"
    epochs: tuple[EpochRecord, ...] = ()
    if (folder / "teacher.json").exists():  # written last: with it, the weights are whole
        try:
            module.load_state_dict(load_file(weights))
        except Exception as e:  # safetensors and torch raise types without a common base; all mean a damaged file
            raise StorageError(f"{weights}: cannot be read: {e}. Delete the folder {folder} to train again") from e
    else:
        epochs = _train(module.to(device), dataset, settings, folder, key, precision, progress)
        _save_weights(module, weights)
    forward = _forward(module, dataset.mean, dataset.std, dataset.resolution, precision, settings.threads, device)
    return _Model(
        f"resnet-{'-'.join(map(str, settings.widths))}x{settings.blocks}",
        file_sha256(weights),
        precision,
        dataset.resolution,
        _predictor(forward),
        lambda: resnet_model(_in_main_memory(module), dataset.mean, dataset.std, dataset.resolution),
        sum(p.numel() for p in module.parameters()),
        count_macs(module, dataset.resolution),
        epochs,
        _feature_reader(module, forward),
        tuple(f"blocks.{(stage + 1) * settings.blocks - 1}" for stage in range(len(settings.widths))),
    )


def _save_weights(module: nn.Module, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: value.cpu().contiguous() for name, value in module.state_dict().items()}, temporary)
        temporary.replace(path)
    except OSError as e:
        raise StorageError(f"{path}: cannot be written: {e}") from e


def _train(
    module: ResNet,
    dataset: Dataset,
    settings: TeacherSettings,
    folder: Path,
    key: str,
    precision: str,
    progress: Progress | None,
) -> tuple[EpochRecord, ...]:
    """Trains in place; resumes from the checkpoint of an earlier call with the same key."""
    module.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameter_groups(module, settings.weight_decay), lr=settings.lr, fused=True)
    guard = LossGuard("teacher", settings.lr, "teacher.lr")
    checkpoint = folder / "checkpoint.pt"
    done: list[EpochRecord] = []
    if (content := read_checkpoint(checkpoint, key)) is not None:
        done, guard.first = epochs_from_plain(content["epochs"]), content["first_loss"]
        module.load_state_dict(content["weights"])
        optimizer.load_state_dict(content["optimizer"])
    with threads(settings.threads):
        for epoch in range(len(done), settings.epochs):
            done.append(_one_epoch(module, dataset, settings, precision, epoch, optimizer, guard))
            write_checkpoint(
                checkpoint,
                key,
                {
                    "weights": dict(module.state_dict()),
                    "optimizer": optimizer.state_dict(),
                    "epochs": epochs_to_plain(done),
                    "first_loss": guard.first,
                },
            )
            if progress is not None:
                progress(epoch + 1, settings.epochs)
    return tuple(done)


def _one_epoch(
    module: ResNet,
    dataset: Dataset,
    settings: TeacherSettings,
    precision: str,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    guard: LossGuard,
) -> EpochRecord:
    train = dataset.train
    first = epoch * steps_per_epoch(len(train), settings.batch_size)
    steps = settings.epochs * steps_per_epoch(len(train), settings.batch_size)
    rng = np.random.default_rng([settings.seed, epoch])
    device = device_of(module)

    def forward(_step: int, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        x = normalised(augmented(train.images[index], dataset.augment, rng), dataset.mean, dataset.std, device)
        labels = torch.from_numpy(train.labels[index]).to(device)
        with _in_precision(device, precision):
            logits = module(x)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        return loss, logits, labels

    record = one_pass(
        batches(len(train), settings.batch_size, rng),
        forward,
        optimizer,
        list(module.parameters()),
        guard,
        lambda step: settings.lr * lr_share(first + step, steps, settings.warmup),
        clip_norm=5.0,
        epoch=epoch,
        clock=time.process_time,
    )
    guard.epoch(record.loss, epoch, settings.epochs)
    return record


def _statistics(dataset: Dataset, settings: TeacherSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, on the scale 0-1, with which a given model wants its images normalised."""
    return {
        "dataset": (dataset.mean, dataset.std),
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
        "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "raw": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    }[settings.pixels]


def _torchvision(
    dataset: Dataset, settings: TeacherSettings, sha256: str, precision: str, device: torch.device
) -> _Model:
    classes = len(dataset.class_names)
    module = torchvision_model(settings.name, Path(settings.weights or ""), classes)
    resolution = settings.resolution or dataset.resolution
    mean, std = _statistics(dataset, settings)
    try:
        macs = count_macs(module, resolution)
    except (
        RuntimeError,
        AssertionError,
        ValueError,
    ) as e:  # transformers fix their input side, pooling needs a least one
        raise ConfigError(
            f"teacher.resolution: {settings.name} cannot take images of {resolution} px ({e}); "
            f"set teacher.resolution to the side it was trained with, such as 224"
        ) from e
    forward = _forward(module, mean, std, resolution, precision, settings.threads, device)
    return _Model(
        settings.name,
        sha256,
        precision,
        resolution,
        _predictor(forward),
        lambda: torch_model(_in_main_memory(module), mean, std, resolution, settings.name),
        sum(p.numel() for p in module.parameters()),
        macs,
        features=_feature_reader(module, forward),
        attention_layers=attention_layers(module),
    )


def _onnx(dataset: Dataset, settings: TeacherSettings, sha256: str) -> _Model:
    path = Path(settings.weights or "")
    data = path.read_bytes()
    mean, std = _statistics(dataset, settings)
    resolution = input_side(data, str(path)) or settings.resolution or dataset.resolution
    if settings.resolution not in (None, resolution):
        raise ConfigError(f"teacher.resolution: {path} takes images of {resolution} px only, got {settings.resolution}")
    whole = with_pixel_input(data, mean, std, resolution, str(path))  # the file's own batch size
    device = OnnxRuntimeCpu()
    classes = len(dataset.class_names)

    def outputs(images: np.ndarray) -> np.ndarray:
        pixels = resized(raw_tensor(images), resolution)
        logits = device.run(whole, np.ascontiguousarray(pixels.numpy()))[0]
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise RecordError(
                f"teacher.weights: {path} gives {list(logits.shape[1:])} values per image; "
                f"the data set has {classes} classes"
            )
        return logits.astype(np.float32)

    probe = outputs(dataset.val.images[:PROBE_IMAGES])
    is_probability = bool((probe >= 0).all() and np.allclose(probe.sum(axis=1), 1.0, atol=1e-3))

    def predict(images: np.ndarray) -> np.ndarray:
        # In parts: all images at once, enlarged to the teacher's side as float32, may be gigabytes.
        parts = [outputs(images[i : i + PREDICT_BATCH]) for i in range(0, len(images), PREDICT_BATCH)]
        found = np.concatenate(parts) if parts else np.zeros((0, classes), np.float32)
        # A file that ends in a softmax gives probabilities; a temperature is for logits, and these are theirs.
        return np.log(np.maximum(found, LEAST_PROBABILITY)) if is_probability else found

    return _Model(path.stem, sha256, "fp32", resolution, predict, lambda: with_batch_one(whole))
