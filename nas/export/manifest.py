"""What a package says about itself: the records of manifest.json, and the verdict on the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.core.records import Candidate, ClockKind, DeviceProfile, LatencyFigures, Measurement
from nas.core.run import LatencyKind, StreamLatency, latency_of

SCHEMA_VERSION = 2  # 2: segments, dialects, packages without a latency (2026-11-28)

PackageForm = Literal["plain", "if", "segments"]
Verdict = Literal["good", "over_budget", "accuracy_loss", "unmeasured"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of the model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class ArtefactAccuracy:
    """Accuracy of the exported file itself.

    `exit_shares` says for form "if" which share of the images left at each exit, the head last; empty for "plain".
    """

    top1: float
    images: int
    split: str = "test"
    exit_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.images < 1:
            raise RecordError(f"accuracy needs at least one image, got {self.images}")
        for value in (self.top1, *self.exit_shares):
            if not 0.0 <= value <= 1.0:
                raise RecordError(f"accuracy and exit shares are ratios from 0 to 1, got {value}")
        if self.exit_shares and abs(sum(self.exit_shares) - 1.0) > 1e-6:
            raise RecordError(f"exit shares must add up to 1, got {self.exit_shares}")


@dataclass(frozen=True, slots=True)
class PathLatency:
    """Latency of an image that leaves at one exit; `exit_index` is the number of exits for the head.

    `latency_ms` is the value of the measuring protocol; median and 95 % quantile are those of the single runs of calm
    rounds, of all rounds where none was calm.
    """

    exit_index: int
    share: float
    latency_ms: float
    p50_ms: float
    p95_ms: float
    samples: int
    is_stable: bool


@dataclass(frozen=True, slots=True)
class PackageLatency:
    """Latency of the exported file on one device in one state, batch 1."""

    figures: LatencyFigures
    paths: tuple[PathLatency, ...]
    device: DeviceProfile
    clock: ClockKind
    measured_at: str


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far another machine may be from the stored parity outputs: lowest agreements, largest relative difference."""

    exit_agreement: float
    top1_agreement: float
    relative_l2: float


@dataclass(frozen=True, slots=True)
class ParityInfo:
    """The fixed images of the package, and how the file differs from the float network on them."""

    images: int
    tolerance: Tolerance
    float_top1_agreement: float
    float_relative_l2: float


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A model file of a package in segments; the fields are those of `nas.export.graph.Segment`."""

    file: str
    exit_index: int
    threshold: float | None
    features_in: str
    features_out: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a package; `files` maps each other file to its SHA-256.

    `dialect` says for which runtime the graphs were written. `latency` is None where the device that they are for was
    not there; `nas deploy` measures it. `segments` are the model files in form "segments", in order. `stream` is a
    measured stream of test images, where the device could time one.

    `integer_convolutions` of the model's `convolutions` are executed in int8 by the runtime; None: not counted.
    `margin_ms` is what the median must stay below the budget by, because the file may measure as much more next time.
    `reference_top1` is the accuracy that a loss is counted from (ratio, same split), `max_loss` what may be lost.
    """

    name: str
    created_at: str
    form: PackageForm
    candidate: Candidate
    candidate_id: str
    precision: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    model_bytes: int
    macs: int
    params: int
    convolutions: int
    accuracy: ArtefactAccuracy
    latency: PackageLatency | None
    parity: ParityInfo
    verdict: Verdict
    reasons: tuple[str, ...]
    files: dict[str, str]
    budget_ms: float | None = None
    budget_of: LatencyKind = "expected"
    margin_ms: float = 0.0
    reference_top1: float | None = None
    max_loss: float = 0.0
    calibration_images: int | None = None
    integer_convolutions: int | None = None
    tools: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    dialect: str = "ort"
    segments: tuple[SegmentInfo, ...] = ()
    stream: StreamLatency | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.schema_version <= SCHEMA_VERSION:
            raise RecordError(
                f"package of schema version {self.schema_version}; this program reads versions 1 to {SCHEMA_VERSION}. "
                "Use the version of nas named under 'tools', or export again"
            )

    @property
    def model_files(self) -> tuple[str, ...]:
        """Names of the ONNX files, in the order in which they run."""
        return tuple(segment.file for segment in self.segments) or ("model.onnx",)

    @property
    def is_good(self) -> bool:
        return self.verdict == "good"


def judge(
    accuracy: ArtefactAccuracy,
    figures: LatencyFigures | None,
    *,
    budget_ms: float | None,
    budget_of: LatencyKind,
    margin_ms: float = 0.0,
    reference_top1: float | None,
    max_loss: float,
) -> tuple[Verdict, tuple[str, ...]]:
    """Verdict on a package, and every reason why it is not good. A missed deadline weighs more than lost accuracy.

    Args:
        accuracy: of the file.
        figures: medians of the runs, as in `PathLatency`; None: not measured, which is no verdict on a deadline.
        budget_ms: deadline; None: there is none.
        budget_of: which latency it limits.
        margin_ms: by how much a later measurement may be above this one; the deadline must be kept even then.
        reference_top1: accuracy (ratio) that a loss is counted from; None: no gate.
        max_loss: what may be lost (ratio).
    """
    reasons: list[str] = []
    verdict: Verdict = "good"
    if reference_top1 is not None and reference_top1 - accuracy.top1 > max_loss + 1e-9:
        verdict = "accuracy_loss"
        reasons.append(
            f"top-1 {100 * accuracy.top1:.2f} % on {accuracy.images} {accuracy.split} images is "
            f"{100 * (reference_top1 - accuracy.top1):.2f} points below {100 * reference_top1:.2f} %; "
            f"allowed: {100 * max_loss:.2f}"
        )
    if figures is None:
        reasons.append("its latency was not measured: the device that it is for was not there. Run: nas deploy")
        return (verdict if verdict != "good" else "unmeasured"), tuple(reasons)
    latency_ms = latency_of(figures, budget_of)
    if budget_ms is not None and latency_ms > budget_ms:
        verdict = "over_budget"
        reasons.insert(0, f"median {budget_of} latency {latency_ms:.4g} ms is above the budget of {budget_ms:.4g} ms")
    elif budget_ms is not None and latency_ms + margin_ms > budget_ms:
        verdict = "over_budget"
        reasons.insert(
            0,
            f"median {budget_of} latency {latency_ms:.4g} ms is within the budget of {budget_ms:.4g} ms, but may be "
            f"{margin_ms:.2g} ms more when it is measured again",
        )
    return verdict, tuple(reasons)


def path_latency(measurement: Measurement, exit_index: int, share: float) -> PathLatency:
    """Summary of one measurement. The accepted rounds count; all of them where none was calm.

    Raises:
        RecordError: the measurement holds an error instead of a latency.
    """
    if measurement.latency_ms is None:
        raise RecordError(f"measurement of {measurement.key} failed: {measurement.error}")
    runs = calm_runs(measurement)
    p50, p95 = np.quantile(runs, (0.5, 0.95)) if len(runs) else (measurement.latency_ms, measurement.latency_ms)
    return PathLatency(
        exit_index, share, measurement.latency_ms, float(p50), float(p95), len(runs), measurement.is_stable
    )


def exit_latencies(paths: Sequence[PathLatency], exits: int) -> tuple[float, ...]:
    """Latency of leaving at each exit, the head last, ms; 0 where no image can leave."""
    by_index = {path.exit_index: path.latency_ms for path in paths}
    return tuple(by_index.get(k, 0.0) for k in range(exits + 1))


def calm_runs(measurement: Measurement) -> NDArray[np.float64]:
    """Single runs of the accepted rounds, ms; of all rounds where none was calm."""
    rounds = [r for r, ok in zip(measurement.rounds_ms, measurement.accepted, strict=True) if ok]
    return np.concatenate([np.asarray(r, dtype=np.float64) for r in rounds or measurement.rounds_ms] or [np.empty(0)])
