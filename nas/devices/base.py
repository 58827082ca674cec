"""What a device is: something that measures ONNX models and runs them. Everything above knows only this Protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.core.records import DeviceProfile, Measurement, Precision

JobKind = Literal["row", "network", "segment", "overhead"]
JobPrecision = Precision | Literal["mixed", "none"]
OnResult = Callable[[Measurement], None]
OnProgress = Callable[[float], None]

OVERHEAD_KEY = "overhead"
REFERENCE_KEY = "reference"
GATE_KEY = "gate"
NO_STREAMS = "it times no streams of images"  # of a device that is no `StreamTimer`
HANG_REASON = "did not return within"  # begins the error of a measurement in which the runtime hung


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """One model to measure.

    `model` is an ONNX file's bytes with static shapes. `feeds` replaces inputs by name (a real image, exit thresholds
    that force a path); every other input gets random values that stay the same. `macs` is 0 where it has no meaning.
    """

    key: str
    kind: JobKind
    precision: JobPrecision
    model: bytes = field(repr=False)
    macs: int
    feeds: Mapping[str, NDArray[np.generic]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.key:
            raise RecordError("a measure job needs a key")
        if self.macs < 0:
            raise RecordError(f"measure job {self.key}: macs must not be negative, got {self.macs}")


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What one executed layer of an engine takes, and what the runtime tells of it.

    `metadata` has the names of the ONNX nodes that are in it, where the runtime keeps them apart from `name`; `kind` is
    the runtime's word for it, such as `Conv` or `Reformat REFORMAT`.
    """

    name: str
    median_ms: float
    metadata: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class CalmReport:
    """How quiet a device is, seen through a small reference network and one that reads more than the cache holds.

    `checks` were made and `rejected` of them were too disturbed to measure a network. `best_ms` is the best time that
    is known of the small one, `median_ms` and `worst_ms` those of the checks; `cpu_share` is the lowest share of a core
    that the checks got (0-1).
    """

    checks: int
    rejected: int
    best_ms: float
    median_ms: float
    worst_ms: float
    cpu_share: float

    @property
    def rejected_share(self) -> float:
        """Share of checks in which no measurement would have been accepted, 0-1."""
        return self.rejected / self.checks

    @property
    def drift(self) -> float:
        """Median of the checks against the best time known, minus 1: 0.05 is 5 % slower."""
        return self.median_ms / self.best_ms - 1


@dataclass(frozen=True, slots=True)
class StreamJob:
    """Images that pass a network one by one, batch 1, each until it leaves.

    Attributes:
        key: names it in errors.
        models: one ONNX model that decides by itself, or a chain as `nas.export.graph.Segment` describes it.
        thresholds: of a chain, between two models each: an image leaves there from this confidence on.
        images: raw pixels float32 [N, C, H, W], the stream in its order.
    """

    key: str
    models: tuple[bytes, ...] = field(repr=False)
    thresholds: tuple[float, ...]
    images: NDArray[np.float32] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.models) - 1 or not len(self.images):
            raise RecordError(
                f"stream {self.key}: {len(self.models)} models need {len(self.models) - 1} thresholds (got "
                f"{len(self.thresholds)}) and at least one image (got {len(self.images)})"
            )


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """What each image of a stream took, ms, in the order of the images.

    `latency_ms` is the value of the measuring protocol (undisturbed runs, as for a network that is measured alone),
    `typical_ms` the median of its runs in calm rounds. `is_calm`: every part of the stream had a calm round. `exits`:
    where each image left in the session that was the fastest for it: of a chain the number of the model, of one model
    its `exit_index`.
    """

    latency_ms: tuple[float, ...]
    typical_ms: tuple[float, ...]
    is_calm: bool
    exits: tuple[int, ...]


class StreamTimer(Protocol):
    """What a device has besides, on which a stream of images can be timed image by image."""

    @property
    def no_stream(self) -> str:
        """Why it cannot do so after all, as where a runtime takes no images; empty where it can."""
        ...

    def stream_times(self, job: StreamJob, progress: OnProgress | None = None) -> StreamTimes:
        """Times of the images of a stream, by the measuring protocol: calm rounds of a few images in a row.

        Args:
            job: models and images.
            progress: called with the share of the work done (0-1), outside any timed window.

        Raises:
            DeviceError: the runtime refuses the models or the images.
        """
        ...


class Device(Protocol):
    """Measures and runs models. A model that fails is a Measurement with `error`, never an exception."""

    @property
    def profile(self) -> DeviceProfile:
        """State of the device; a latency table holds for one such state."""
        ...

    def measure(
        self, jobs: Sequence[MeasureJob], on_result: OnResult | None = None, progress: OnProgress | None = None
    ) -> list[Measurement]:
        """One measurement for each job, in order.

        Args:
            jobs: what to measure; they may be measured interleaved.
            on_result: called once with each result as soon as it is final, outside any timed window.
            progress: called with the share of the work done (0-1), outside any timed window.
        """
        ...

    def run(self, model: bytes, images: NDArray[np.float32]) -> list[NDArray[np.generic]]:
        """Outputs of a model for raw images.

        Args:
            model: ONNX bytes with a static or dynamic batch; the first input takes the images.
            images: float32 [B, 3, H, W], pixels 0-255.

        Returns:
            The outputs in the model's order, each with B rows.

        Raises:
            DeviceError: the runtime refuses the model or the images.
        """
        ...

    def expect_reference(self, reference_ms: float | None, streaming_ms: float | None = None) -> None:
        """Tells the device the times of its references in earlier sessions, so that a slower state is noticed.

        `reference_ms` is that of the reference network, `streaming_ms` that of the chain which reads
        `graphs.GATE_STREAMING_MB` of weights; None where it is unknown.

        Devices that do not judge their state by a reference network ignore it.
        """
        ...

    def calm(self, checks: int = 20) -> CalmReport:
        """Looks `checks` times whether the device is quiet enough to measure."""
        ...


class LayerTimer(Protocol):
    """What a device has besides, whose runtime can tell how long each layer of an engine takes."""

    def layer_times(self, model: bytes, precision: JobPrecision) -> list[LayerTime]:
        """Typical time of each executed layer of a model, in the order of execution.

        Their sum is not the latency of the model: profiling itself takes time, and the gaps between layers are not
        among them. Shares of it are what counts.

        Args:
            model: ONNX bytes with static shapes.
            precision: as that of a job.

        Raises:
            DeviceError: the runtime refuses the model or cannot profile it.
        """
        ...


def layer_times_of(rows: Sequence[Mapping[str, Any]]) -> list[LayerTime]:
    """Layers of a profile as the runners of a board give them."""
    return [
        LayerTime(
            str(row["name"]),
            float(row["median_ms"]),
            str(row.get("metadata", "")),
            " ".join(text for text in (str(row.get("type", "")), str(row.get("origin", ""))) if text),
        )
        for row in rows
    ]
