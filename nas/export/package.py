"""A package: the folder that is deployed. Model, labels, manifest, inference script, parity vectors, model card.

Accuracy and latency are measured on the very file that is exported. A package is staged in a hidden folder, checked
there, and renamed at the end: a folder with the package's name is whole, whatever happened before.

    model.onnx        static batch 1, normalisation inside, exits as `If` where asked for, QDQ where int8
    segment_0.onnx .. the same as a chain of models, where exits are decided on by the host (form "segments")
    labels.txt        one class per line, in the order of the logits
    preprocess.json   how an image file becomes the input
    manifest.json     nas.export.manifest.Manifest: hashes of all files, figures, verdict, candidate, device
    infer.py          numpy + onnxruntime or TensorRT: images in, classes and milliseconds out
    parity.py         re-runs the images in parity/ and compares
    bench.py          times the model on the machine it lies on
    build_engine.py   for TensorRT: builds the engines there, outside this folder; board.pyz does the work
    README.md         model card
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DeviceError, StorageError, UsageError
from nas.core.jsonio import file_sha256, read_record, to_plain, write_bytes
from nas.core.records import Candidate, DeviceProfile, LatencyFigures, QuantSpec
from nas.core.run import LatencyKind, StreamLatency
from nas.export.card import model_card
from nas.export.check import PackageError, checked_model, checked_names, tensorrt_problems
from nas.export.dialect import ORT, Dialect
from nas.export.forms import (
    Artefact,
    MeasureLatency,
    Run,
    answers,
    deployed_layers,
    limited_deviation_ms,
    measured_figures,
    measured_paths,
    median_figures,
    path_shares,
)
from nas.export.graph import Segment, network_model, segment_models
from nas.export.manifest import (
    ArtefactAccuracy,
    Manifest,
    PackageForm,
    PackageLatency,
    ParityInfo,
    SegmentInfo,
    TensorInfo,
    Tolerance,
    exit_latencies,
    judge,
    path_latency,
)
from nas.export.writer import Weights

PARITY_IMAGES = 16
DECODE_VERSION = 1  # of the decoding in infer.py; a test holds it equal to nas.data's

# Another CPU sums floats in another order; its integer kernels differ by single steps, which may move an image that is
# undecided between two classes or close to a threshold.
# fp16 keeps 11 bits: a sum of products in another order differs by parts in a thousand.
_TOLERANCES = {
    "half": Tolerance(exit_agreement=14 / 16, top1_agreement=15 / 16, relative_l2=0.02),
    "float": Tolerance(exit_agreement=15 / 16, top1_agreement=1.0, relative_l2=1e-3),
    "integer": Tolerance(exit_agreement=14 / 16, top1_agreement=14 / 16, relative_l2=0.05),
}
_BATCH = 512
_SCRIPTS = {"infer.py": "infer.py.txt", "parity.py": "parity.py.txt", "bench.py": "bench.py.txt"}
_BOARD_SCRIPTS = {"build_engine.py": "build_engine.py.txt"}
_DATA_FILES = (
    "labels.txt",
    "preprocess.json",
    "README.md",
    *(f"parity/{x}.npy" for x in ("images", "logits", "exits")),
)
_TOOLS = ("nas", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True, slots=True)
class PackagePlan:
    """What is exported and what it is judged by.

    Attributes:
        name: title of the package.
        candidate: the network, with precision and, for form "if", thresholds.
        form: "plain" (no exits), "if" or "segments".
        dialect: for which runtime the graphs are written.
        class_names: in the order of the logits.
        mean: of the training pixels / 255, one per channel.
        std: same.
        budget_ms: latency that must not be exceeded; None: no budget.
        budget_of: which latency the budget limits.
        margin_std: standard deviations of the measurement by which its median must stay below the budget.
        reference_top1: accuracy (ratio, on the same images) that a loss is counted from; None: no gate.
        max_loss: accuracy that may be lost against it (ratio).
        provenance: readable names (run, trial, data set, hashes, seeds, commit) and their values.
    """

    name: str
    candidate: Candidate
    form: PackageForm
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    budget_ms: float | None = None
    budget_of: LatencyKind = "expected"
    margin_std: float = 0.0
    reference_top1: float | None = None
    max_loss: float = 0.0
    provenance: Mapping[str, str] = field(default_factory=dict)
    dialect: Dialect = ORT

    def __post_init__(self) -> None:
        if len(self.class_names) != self.candidate.num_classes:
            raise UsageError(
                f"package {self.name}: {len(self.class_names)} class names for {self.candidate.num_classes} classes"
            )
        for name in self.class_names:
            if not name or not name.isprintable():
                raise UsageError(f"package {self.name}: class name {name!r} is empty or has a line break; rename it")


@dataclass(frozen=True, slots=True)
class Instruments:
    """What measures the exported file.

    Attributes:
        run: executes a model on raw float32 images [B, C, H, W]; a device's `run`.
        measure_accuracy: accuracy of what is deployed on the split that final figures come from.
        measure_latency: measures models, in order; None where the device that they are for is not there.
        device: state of the device that `measure_latency` uses.
        op_counts: operators that the runtime executes, by type; None where it cannot tell.
        board_code: the program that builds and runs engines on a board, `board.pyz`; needed for TensorRT only.
        measure_stream: times images one by one through what is deployed, given what leaving at each exit takes alone;
            None where the device cannot, or where nothing leaves early.
    """

    run: Run
    measure_accuracy: Callable[[Artefact], ArtefactAccuracy]
    measure_latency: MeasureLatency | None
    device: DeviceProfile
    op_counts: Callable[[bytes], Mapping[str, int]] | None = None
    board_code: bytes | None = None
    measure_stream: Callable[[Artefact, Sequence[float]], StreamLatency | None] | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """An exported package: where it is, what it says, and the SHA-256 of its manifest, which covers all its files."""

    folder: Path
    manifest: Manifest
    sha256: str


@dataclass(frozen=True, slots=True)
class ParityResult:
    """How a package reproduces its stored outputs: shares of images, relative difference of the logits."""

    exit_agreement: float
    top1_agreement: float
    relative_l2: float

    def passes(self, limits: Tolerance) -> bool:
        """True when the result is within the limits."""
        return (
            self.exit_agreement >= limits.exit_agreement
            and self.top1_agreement >= limits.top1_agreement
            and self.relative_l2 <= limits.relative_l2
        )


def export_package(
    folder: Path,
    plan: PackagePlan,
    weights: Weights,
    quant: QuantSpec | None,
    parity_images: NDArray[np.uint8],
    instruments: Instruments,
    *,
    overwrite: bool = False,
    accept: Callable[[Manifest], bool] = lambda _: True,
) -> Package:
    """Writes the model, measures it, judges it, and leaves a whole package in `folder`, or nothing.

    Args:
        folder: the package; its parent is created.
        plan: what to export.
        weights: of the network, batch norm folded in.
        quant: ranges, where a layer is int8.
        parity_images: uint8 [N, H, W, 3] at the network's resolution, not from the training split; 16 are kept.
        instruments: measure the file.
        overwrite: replaces an existing package instead of refusing.
        accept: looks at what was measured; False leaves the folder as it was, and only the manifest is of use.

    Raises:
        UsageError: the folder exists, or plan, images and network do not fit.
        DeviceError: the file could not be run or measured.
        PackageError: the staged package does not reproduce its own outputs.
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists already; export to another folder, or allow overwriting it")
    images = _parity_inputs(parity_images, plan.candidate)
    if plan.dialect is not ORT and instruments.board_code is None:
        raise UsageError(f"package {plan.name}: for {plan.dialect.name} the program for the board is needed")
    artefact = _artefact(plan, weights, quant)
    models = _model_files(artefact)
    for name, data in models.items():
        problems = tensorrt_problems(checked_model(data, f"package {plan.name}"), plan.dialect)
        if plan.dialect is not ORT and problems:
            raise PackageError(f"package {plan.name}: {name} breaks the rules of TensorRT's parser: {problems[0]}")
    logits, exits = _outputs(instruments.run, artefact, images, plan)
    manifest = replace(
        _measured(plan, artefact, instruments),
        parity=_parity_info(plan, weights, images, logits, exits, instruments.run),
        calibration_images=quant.images if quant is not None and "int8" in plan.candidate.precisions else None,
    )
    if not accept(manifest):
        return Package(folder, manifest, "")
    scripts = dict(_SCRIPTS)
    files: dict[str, bytes] = {
        **models,
        "labels.txt": "".join(f"{name}\n" for name in plan.class_names).encode(),
        "preprocess.json": _json(_preprocessing(plan)),
        "parity/images.npy": _npy(images),
        "parity/logits.npy": _npy(logits),
        "parity/exits.npy": _npy(exits),
        "README.md": model_card(manifest).encode(),
    }
    if plan.dialect is not ORT and instruments.board_code is not None:
        scripts |= _BOARD_SCRIPTS
        files["board.pyz"] = instruments.board_code
    scripts_folder = resources.files("nas.export")
    files |= {name: scripts_folder.joinpath(source).read_bytes() for name, source in scripts.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clean_leftovers(folder)
        staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{_staging_prefix(folder)}{os.getpid()}-"))
    except OSError as e:
        raise StorageError(f"{folder}: cannot be written: {e.strerror or e}") from e
    try:
        for name, data in files.items():
            write_bytes(staged / name, data)
        manifest = replace(manifest, files={name: file_sha256(staged / name) for name in sorted(files)})
        write_bytes(staged / "manifest.json", _json(to_plain(manifest)))
        staged.chmod(0o755)
        result = verify_package(staged, instruments.run).parity
        if result is None or not result.passes(manifest.parity.tolerance):
            raise PackageError(f"package {plan.name}: the written file does not reproduce its own outputs: {result}")
        _publish(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return Package(folder, manifest, file_sha256(folder / "manifest.json"))


def complete_package(folder: Path, manifest: Manifest) -> Package:
    """Replaces what a package says about itself (manifest and model card); its models stay as they are.

    Args:
        folder: a package whose files were checked.
        manifest: what it says from now on; the hashes of its files are computed anew.

    Raises:
        StorageError: the folder cannot be written.
    """
    card = model_card(manifest).encode()
    try:
        _clean_leftovers(folder)
        staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{_staging_prefix(folder)}{os.getpid()}-"))
    except OSError as e:
        raise StorageError(f"{folder}: cannot be written: {e.strerror or e}") from e
    try:
        for name in manifest.files:
            write_bytes(staged / name, card if name == "README.md" else (folder / name).read_bytes())
        manifest = replace(manifest, files={name: file_sha256(staged / name) for name in sorted(manifest.files)})
        write_bytes(staged / "manifest.json", _json(to_plain(manifest)))
        staged.chmod(0o755)
        _publish(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return Package(folder, manifest, file_sha256(folder / "manifest.json"))


@dataclass(frozen=True, slots=True)
class Verification:
    """A package whose files are those of its manifest. `parity` is None where nothing could run the model."""

    package: Package
    parity: ParityResult | None

    @property
    def passed(self) -> bool:
        """True when the model was run and reproduced its outputs within the tolerance."""
        return self.parity is not None and self.parity.passes(self.package.manifest.parity.tolerance)


def verify_package(folder: Path, run: Run | None = None) -> Verification:
    """Checks every file of a package against its manifest and re-runs the parity images.

    Args:
        folder: the package.
        run: executes the model on raw float32 images; None checks the files only.

    Raises:
        PackageError: no package, a changed, missing, unlisted or linked file, a path out of the folder, a bad model.
        RecordError: a manifest that does not fit this version.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file() or path.is_symlink():
        raise PackageError(f"{folder}: not a package (no manifest.json). Run: nas export --help")
    manifest = read_record(Manifest, path)
    files = checked_names(folder, manifest.files)
    needed = ("labels.txt", "parity/images.npy", "parity/logits.npy", "parity/exits.npy")
    for name in (*manifest.model_files, *needed):
        if name not in files:
            raise PackageError(f"{path}: does not list {name}; the package is not whole")
    for name, file in files.items():
        if file_sha256(file) != manifest.files[name]:
            raise PackageError(
                f"{folder}: {name} was changed after the export; get the package again or export it anew"
            )
    artefact = read_artefact(folder, manifest)
    for name, data in _model_files(artefact).items():
        checked_model(data, str(folder / name))
    package = Package(folder, manifest, file_sha256(path))
    if run is None:
        return Verification(package, None)
    images, expected, expected_exits = (_load(files[f"parity/{name}.npy"]) for name in ("images", "logits", "exits"))
    if images.dtype != np.uint8 or images.ndim != 4:
        raise PackageError(f"{folder}: parity/images.npy holds {images.dtype} {list(images.shape)}, not uint8 images")
    logits, exits = answers(run, artefact, _network_input(images), len(manifest.candidate.exits))
    if logits.shape != expected.shape or exits.shape != expected_exits.shape:
        raise PackageError(f"{folder}: the model gives {logits.shape} logits, its parity file holds {expected.shape}")
    return Verification(package, compare(expected, expected_exits, logits, exits))


def check_scripts(package: Package, board_code: bytes) -> None:
    """Refuses a package that would run other code than this version writes: its own hashes only say it is whole.

    Args:
        package: whose files were checked.
        board_code: as in `Instruments`.

    Raises:
        PackageError: names the files.
    """
    manifest = package.manifest
    folder = resources.files("nas.export")
    own = {name: folder.joinpath(source).read_bytes() for name, source in (_SCRIPTS | _BOARD_SCRIPTS).items()}
    own["board.pyz"] = board_code
    data = {*_DATA_FILES, *manifest.model_files}
    foreign = [
        name
        for name, sha256 in manifest.files.items()
        if name not in data and (name not in own or hashlib.sha256(own[name]).hexdigest() != sha256)
    ]
    if foreign:
        run = manifest.provenance.get("run", "RUN")
        raise PackageError(
            f"{package.folder}: {', '.join(sorted(foreign))}: not what this version of nas writes, and it would be run "
            "on the board. Export the student again with this version (nas export "
            f"runs/{run} --student {manifest.name} --output DIR), or only measure the network: --no-copy"
        )


def read_artefact(folder: Path, manifest: Manifest) -> Artefact:
    """The model or the chain of models of a package whose files were checked."""
    if not manifest.segments:
        return (folder / "model.onnx").read_bytes()
    return tuple(
        Segment(s.exit_index, s.threshold, s.features_in, s.features_out, (folder / s.file).read_bytes())
        for s in manifest.segments
    )


def compare(
    expected: NDArray[Any], expected_exits: NDArray[Any], logits: NDArray[Any], exits: NDArray[Any]
) -> ParityResult:
    """Compares logits [N, K] and exits [N]; logits only where both left at the same exit."""
    same = expected_exits == exits
    norm = float(np.linalg.norm(expected[same]))
    difference = float(np.linalg.norm(expected[same] - logits[same]))
    return ParityResult(
        exit_agreement=float(same.mean()),
        top1_agreement=float((expected.argmax(1) == logits.argmax(1)).mean()),
        relative_l2=difference / norm if norm > 0 else float("inf"),
    )


def measured_accuracy(
    run: Run, model: Artefact, images: NDArray[np.uint8], labels: NDArray[np.int64], *, exits: int, split: str = "test"
) -> ArtefactAccuracy:
    """Accuracy and exit shares of an exported file on labelled images, for `Instruments.measure_accuracy`.

    Args:
        run: executes the model.
        model: one model of form "plain" or "if", or a chain.
        images: uint8 [N, H, W, 3].
        labels: [N].
        exits: exits of the candidate before the head.
        split: name of the images' split.
    """
    right = 0
    counts = np.zeros(exits + 1, np.int64)
    for start in range(0, len(images), _BATCH):  # as floats, a whole split may not fit into the memory
        logits, taken = answers(run, model, _network_input(images[start : start + _BATCH]), exits)
        right += int((logits.argmax(1) == labels[start : start + _BATCH]).sum())
        counts += np.bincount(taken, minlength=exits + 1)
    shares = tuple((counts / len(images)).tolist()) if exits else ()
    return ArtefactAccuracy(right / len(images), len(images), split, shares)


def _artefact(plan: PackagePlan, weights: Weights, quant: QuantSpec | None) -> Artefact:
    if plan.form == "segments":
        return segment_models(plan.candidate, weights, plan.mean, plan.std, quant=quant, dialect=plan.dialect)
    return network_model(
        plan.candidate, weights, plan.mean, plan.std, quant=quant, form=plan.form, dialect=plan.dialect
    )


def _model_files(artefact: Artefact) -> dict[str, bytes]:
    if isinstance(artefact, bytes):
        return {"model.onnx": artefact}
    return {f"segment_{i}.onnx": segment.model for i, segment in enumerate(artefact)}


def latency_report(
    plan: PackagePlan, artefact: Artefact, shares: Sequence[float], measure: MeasureLatency, device: DeviceProfile
) -> tuple[PackageLatency, LatencyFigures, float]:
    """Latency of what is deployed on a device, the figures a deadline is judged by, and their margin, ms.

    Args:
        plan: of the package.
        artefact: its models.
        shares: of images, one per path.
        measure: measures models, in order.
        device: that it measures on.

    Raises:
        DeviceError: the device could not measure it.
    """
    exits, measurements = measured_paths(plan.candidate, plan.form, artefact, measure)
    figures = measured_figures(measurements, shares)
    paths = tuple(path_latency(m, k, share) for m, k, share in zip(measurements, exits, shares, strict=True))
    margin_ms = plan.margin_std * limited_deviation_ms(measurements, shares, plan.budget_of)
    latency = PackageLatency(figures, paths, device, measurements[-1].clock, measurements[-1].measured_at)
    return latency, median_figures(measurements, paths), margin_ms


def _measured(plan: PackagePlan, artefact: Artefact, instruments: Instruments) -> Manifest:
    """The manifest with everything but hashes and parity."""
    accuracy = instruments.measure_accuracy(artefact)
    if plan.form == "plain":
        accuracy = replace(accuracy, exit_shares=())  # its exits are not in the file
    shares = path_shares(plan.candidate, plan.form, accuracy.exit_shares)
    latency, medians, margin_ms = None, None, 0.0
    if instruments.measure_latency is not None:
        latency, medians, margin_ms = latency_report(
            plan, artefact, tuple(shares.values()), instruments.measure_latency, instruments.device
        )
    stream = None
    if latency is not None and instruments.measure_stream is not None and len(latency.paths) > 1:
        stream = instruments.measure_stream(artefact, exit_latencies(latency.paths, len(plan.candidate.exits)))
    verdict, reasons = judge(
        accuracy,
        medians,
        budget_ms=plan.budget_ms,
        budget_of=plan.budget_of,
        margin_ms=margin_ms,
        reference_top1=plan.reference_top1,
        max_loss=plan.max_loss,
    )
    # A runtime may silently run an int8 graph in float; the count shows it.
    models = _model_files(artefact)
    counts = None
    if instruments.op_counts is not None and isinstance(artefact, bytes):
        counts = instruments.op_counts(artefact)
    candidate = plan.candidate
    layers = deployed_layers(candidate, plan.form)
    precisions = {layer.precision for layer in layers}
    side = candidate.resolution
    outputs = [TensorInfo("logits", "float32", (1, candidate.num_classes))]
    inputs = [TensorInfo("image", "float32", (1, candidate.in_channels, side, side), "RGB, raw pixels 0-255")]
    if plan.form == "if":
        outputs.append(TensorInfo("exit_index", "int64", (), f"exit taken; {len(candidate.exits)} is the head"))
        inputs += [
            TensorInfo(f"threshold_{k}", "float32", (), f"optional; default {candidate.exits[k].threshold!r}")
            for k in shares
            if k < len(candidate.exits) and (candidate.exits[k].threshold or 0.0) > 0.0
        ]
    return Manifest(
        name=plan.name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        form=plan.form,
        candidate=candidate,
        candidate_id=candidate.id,
        precision=precisions.pop() if len(precisions) == 1 else "mixed",
        class_names=plan.class_names,
        mean=plan.mean,
        std=plan.std,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        opset=plan.dialect.opset,
        model_bytes=sum(len(data) for data in models.values()),
        macs=sum(layer.macs for layer in layers),
        params=sum(layer.params for layer in layers),
        convolutions=sum(len(layer.convolutions) for layer in layers),
        accuracy=accuracy,
        latency=latency,
        parity=ParityInfo(0, _TOLERANCES["float"], 0.0, 0.0),
        verdict=verdict,
        reasons=reasons,
        files={},
        budget_ms=plan.budget_ms,
        budget_of=plan.budget_of,
        margin_ms=margin_ms,
        reference_top1=plan.reference_top1,
        max_loss=plan.max_loss,
        integer_convolutions=None if counts is None else counts.get("QLinearConv", 0),
        tools=_tool_versions(),
        provenance=dict(plan.provenance),
        dialect=plan.dialect.name,
        segments=()
        if isinstance(artefact, bytes)
        else tuple(
            SegmentInfo(name, s.exit_index, s.threshold, s.features_in, s.features_out)
            for name, s in zip(models, artefact, strict=True)
        ),
        stream=stream,
    )


def _outputs(
    run: Run, artefact: Artefact, images: NDArray[np.uint8], plan: PackagePlan
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits [N, K] and exits [N] of what is deployed."""
    found, exits = answers(run, artefact, _network_input(images), len(plan.candidate.exits))
    logits = found.astype(np.float32)
    if not np.isfinite(logits).all():
        raise DeviceError(f"package {plan.name}: the model gives NaN or infinity on its parity images")
    return logits, exits


def _parity_inputs(images: NDArray[np.uint8], candidate: Candidate) -> NDArray[np.uint8]:
    shape = (candidate.resolution, candidate.resolution, candidate.in_channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise UsageError(
            f"parity images must be uint8 [N, {shape[0]}, {shape[1]}, {shape[2]}], got {images.dtype} "
            f"{list(images.shape)}"
        )
    return np.ascontiguousarray(images[:PARITY_IMAGES])


def _parity_info(
    plan: PackagePlan,
    weights: Weights,
    images: NDArray[np.uint8],
    logits: NDArray[np.float32],
    exits: NDArray[np.int64],
    run: Run,
) -> ParityInfo:
    """Compares the deployed file with its float network."""
    precisions = set(plan.candidate.precisions)
    kind = "integer" if "int8" in precisions else "half" if "fp16" in precisions else "float"
    tolerance = _TOLERANCES[kind]
    if kind == "float":
        return ParityInfo(len(images), tolerance, 1.0, 0.0)
    float_plan = replace(plan, candidate=plan.candidate.with_precision("fp32"))
    result = compare(*_outputs(run, _artefact(float_plan, weights, None), images, float_plan), logits, exits)
    # no image left at the same exit: nothing to compare, and JSON holds no infinity
    return ParityInfo(len(images), tolerance, result.top1_agreement, min(result.relative_l2, 1e9))


def _preprocessing(plan: PackagePlan) -> dict[str, Any]:
    return {
        "input": "image",
        "resolution": plan.candidate.resolution,
        "layout": "NCHW",
        "channels": "RGB",
        "dtype": "float32",
        "range": [0, 255],
        "decode_version": DECODE_VERSION,
        "steps": [
            "first frame of the file",
            "rotation by the EXIF tag",
            "16-bit values divided by 257, transparency over white, RGB",
            "shorter side resized to the resolution, bilinear with antialiasing",
            "centre crop",
        ],
        "normalisation": {"where": "inside the model", "mean": list(plan.mean), "std": list(plan.std)},
    }


def _network_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, OSError, MemoryError) as e:
        raise PackageError(f"{path}: not a plain array: {e}") from e
    return array


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _staging_prefix(folder: Path) -> str:
    return f".pkg.tmp-{folder.name}-"


def _clean_leftovers(folder: Path) -> None:
    """Removes staging folders of this package that a killed process left behind; those of live processes stay."""
    for path in folder.parent.iterdir():
        pid = path.name.removeprefix(_staging_prefix(folder)).partition("-")[0]
        if not path.name.startswith(_staging_prefix(folder)) or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if path.name.endswith("-old") and not folder.exists():
            path.rename(folder)  # killed between moving the old package away and the new one in
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(staged: Path, folder: Path) -> None:
    """Gives a whole staged package its name; an older one goes away only when the new one is in its place."""
    old = staged.with_name(f"{staged.name}-old")
    try:
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        handle = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise StorageError(f"{folder}: cannot be written: {e.strerror or e}") from e
    shutil.rmtree(old, ignore_errors=True)
