"""What a run looks like from outside: frozen records that the report, the tables and the command line read.

A search fills one `RunView` (also while it is running); views only read it, so they need no study and no run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nas.core.errors import RecordError, did_you_mean
from nas.core.records import Candidate, DeviceProfile, EnergyFigures, LatencyFigures, Precision
from nas.core.walk import expand, total_macs, total_params

Split = Literal["val", "test"]
LatencyKind = Literal["expected", "worst", "p99"]
INTERPOLATED_MARK = "interpolated rows"  # in the provenance of a run whose table was measured in part
DIALECT_MARK = "accuracies in int8"  # in the provenance of a device that has them of a device of another dialect
FOREIGN_MARK = "foreign table"  # in the provenance of a run that borrows rows from a table of another device state
RunStatus = Literal["running", "interrupted", "finished", "failed"]


def _ratio(where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0.0 <= value <= 1.0:
            raise RecordError(f"{where}: {name} is a ratio from 0 to 1, got {value}")


def latency_of(figures: LatencyFigures, kind: LatencyKind) -> float:
    """The one latency in milliseconds that a budget of this kind is compared with."""
    return {"expected": figures.expected_ms, "worst": figures.worst_ms, "p99": figures.p99_ms}[kind]


@dataclass(frozen=True, slots=True)
class SplitAccuracy:
    """Accuracy of one student on one split, under its thresholds.

    `exit_top1` is the accuracy of each exit alone on all images, the head last; `images` is the size of the split.
    """

    top1: float
    images: int
    exit_top1: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _ratio("accuracy", top1=self.top1)
        if self.images < 1:
            raise RecordError(f"accuracy needs at least one image, got {self.images}")
        for value in self.exit_top1:
            _ratio("accuracy", exit_top1=value)


@dataclass(frozen=True, slots=True)
class ExitConfidence:
    """Calibration of one exit: its temperature, and the expected calibration error (0-1, test images) without and
    with it.
    """

    temperature: float
    error_before: float
    error_after: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RecordError(f"a temperature must be above 0, got {self.temperature}")
        _ratio("calibration error", before=self.error_before, after=self.error_after)


STREAM_TOLERANCE = 0.03  # by how much a measured stream may be off the expected latency before it is told


@dataclass(frozen=True, slots=True)
class StreamLatency:
    """Test images that passed the deployed network one by one on the device, each leaving where it was sure enough.

    `mean_ms` and `p99_ms` are of undisturbed runs, as `LatencyFigures`; `typical_ms` is the mean of the median runs.
    `shares` are those of these images, the head last, and `sum_ms` is their sum over the latencies of the exits.
    """

    images: int
    mean_ms: float
    p99_ms: float
    typical_ms: float
    shares: tuple[float, ...]
    sum_ms: float
    is_calm: bool = True

    @property
    def error(self) -> float:
        """How far the sum over exits is from the stream, as a ratio: positive where the stream is slower."""
        return self.mean_ms / self.sum_ms - 1

    def off(self, expected_ms: float) -> float:
        """How far the stream is from an expected latency, as a ratio."""
        return self.mean_ms / expected_ms - 1


@dataclass(frozen=True, slots=True)
class FinishStep:
    """One step on the way of a finalist, such as `distil` or `QAT`.

    `top1` is the accuracy of the head behind it on search validation, `epochs` those of training in it (0: none),
    `cpu_s` its CPU seconds, `note` what came of it, `precision` the one that it is for (empty: for all).
    """

    name: str
    epochs: int
    top1: float
    cpu_s: float
    note: str = ""
    precision: str = ""

    def __post_init__(self) -> None:
        _ratio(f"step {self.name}", top1=self.top1)


@dataclass(frozen=True, slots=True)
class Point:
    """One student of the run: an architecture in one precision with one set of thresholds.

    `candidate` carries precision and thresholds (0: every image leaves, above 1: none does). `exit_ms` and
    `exit_shares` have one entry per exit and the head last: cumulative latency of an image that leaves there, and the
    share of images that do. `prediction` is what the estimate said before the network was measured. `threshold_curve`
    holds the pairs (expected_ms, top1) of its best threshold settings on the validation split, in order of latency.
    `is_finished` says that it was distilled in full; `model_bytes` is the size of its file; `cost_s` the CPU seconds
    spent on it; `export_command` what to run to get its package; `energy` is None where the device measures none;
    `steps` are what its weights went through. `confidence` has one entry per exit, the head last, where confidences
    were calibrated; `stream` is None where no stream of images was measured.
    """

    id: str
    candidate: Candidate
    latency: LatencyFigures
    val: SplitAccuracy | None = None
    test: SplitAccuracy | None = None
    prediction: LatencyFigures | None = None
    exit_ms: tuple[float, ...] = ()
    exit_shares: tuple[float, ...] = ()
    threshold_curve: tuple[tuple[float, float], ...] = ()
    label: str = ""
    trial: int | None = None
    round: int | None = None
    is_finished: bool = False
    on_front: bool = False
    model_bytes: int | None = None
    cost_s: float = 0.0
    export_command: str = ""
    energy: EnergyFigures | None = None
    steps: tuple[FinishStep, ...] = ()
    confidence: tuple[ExitConfidence, ...] = ()
    stream: StreamLatency | None = None

    def __post_init__(self) -> None:
        where = f"point {self.id}"
        if self.val is None and self.test is None:
            raise RecordError(f"{where}: needs an accuracy on the validation or the test split")
        exits = len(self.candidate.exits) + 1
        for name, values in (("exit_ms", self.exit_ms), ("exit_shares", self.exit_shares)):
            if values and len(values) != exits:
                raise RecordError(
                    f"{where}: {name} has {len(values)} entries; {exits} are needed (exits, then the head)"
                )
        for share in self.exit_shares:
            _ratio(where, exit_shares=share)

    @property
    def split(self) -> Split:
        """Split of the accuracy that is shown: test where there is one."""
        return "val" if self.test is None else "test"

    @property
    def accuracy(self) -> SplitAccuracy:
        """The accuracy that is shown: on the test split where there is one."""
        shown = self.val if self.test is None else self.test
        if shown is None:  # excluded in __post_init__
            raise RecordError(f"point {self.id}: no accuracy")
        return shown

    @property
    def top1(self) -> float:
        return self.accuracy.top1

    @property
    def arch_id(self) -> str:
        return self.candidate.arch_id

    @property
    def precision(self) -> str:
        return self.candidate.precision_label

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        return tuple(e.threshold for e in self.candidate.exits)

    @property
    def macs(self) -> int:
        return total_macs(self.candidate)

    @property
    def params(self) -> int:
        return total_params(self.candidate)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights in their precision; the file (`model_bytes`) is a little larger."""
        return sum(layer.weight_bytes for layer in expand(self.candidate))


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """A candidate that was scored, not finished.

    `score` is what it is ranked by, on the validation split after `epochs`: the mean probability of the right label.
    `proposer` is the sampler that proposed it, or what else did, such as `first`; empty where that is not known.
    """

    number: int
    arch_id: str
    score: float
    latency_ms: float
    precision: str = ""
    epochs: int = 0
    round: int = 0
    proposer: str = ""

    def __post_init__(self) -> None:
        _ratio(f"trial {self.number}", score=self.score)


@dataclass(frozen=True, slots=True)
class FailedCandidate:
    """A candidate that failed, as data: where (`training`, `measuring`, `export`, ...) and why."""

    id: str
    stage: str
    reason: str
    round: int | None = None


@dataclass(frozen=True, slots=True)
class PredictedMeasured:
    """One measured network (worst case, all layers run) and what the estimate had said before it was used."""

    candidate_id: str
    precision: Precision | Literal["mixed"]
    predicted_ms: float
    std_ms: float
    measured_ms: float
    round: int = 0

    def __post_init__(self) -> None:
        if not (self.predicted_ms > 0 and self.measured_ms > 0):
            raise RecordError(f"{self.candidate_id}: predicted_ms and measured_ms must be positive")

    @property
    def error(self) -> float:
        """Relative error of the prediction: positive where it was too slow."""
        return self.predicted_ms / self.measured_ms - 1.0


@dataclass(frozen=True, slots=True)
class AccuracyFit:
    """How well the model of accuracy predicts scored candidates that it was not shown (leave-one-out).

    `networks`: candidates. `rank`: rank correlation (Spearman) of predictions and scores. `mae`: mean absolute error,
    as a ratio like accuracy. `within_90`: share of the scores inside their 90 % interval.
    """

    networks: int
    rank: float
    mae: float
    within_90: float

    def __post_init__(self) -> None:
        _ratio("accuracy model", mae=self.mae, within_90=self.within_90)


@dataclass(frozen=True, slots=True)
class RobustnessRow:
    """Accuracy of a finished student, as it is deployed, on corrupted test images.

    `student` is the id of a point of the run, `clean` its accuracy on the images as they are, and `top1` that of each
    corruption at each of the `severities` (1 to 5).
    """

    student: str
    images: int
    severities: tuple[int, ...]
    clean: float
    top1: dict[str, tuple[float, ...]]

    @property
    def mean(self) -> float:
        """Over all corruptions and severities."""
        values = [value for row in self.top1.values() for value in row]
        return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """One round: candidates scored, networks measured, and what was reached at its end.

    `hypervolume` is that of all scores so far as a share of the box accuracy 0-1 x latency 0-budget; `mape` the mean
    absolute relative error of this round's predictions, `model` how far the model of accuracy could be trusted then.
    """

    number: int
    trials: int
    failed: int = 0
    measured: int = 0
    hypervolume: float | None = None
    mape: float | None = None
    wall_s: float = 0.0
    model: AccuracyFit | None = None


@dataclass(frozen=True, slots=True)
class ProposerSummary:
    """What came of the candidates that one sampler (or what else proposed them) proposed.

    `scored` and `failed` count candidates; `on_front` those of the scored ones that no other score beats in accuracy
    and predicted latency; `students` the finished points that are on the front of the run. `hypervolume_lost` is the
    share of the scores' hypervolume (a ratio) that would be missing without them: what others reach too does not count,
    so these shares do not add up to 1.
    """

    name: str
    scored: int
    failed: int = 0
    on_front: int = 0
    students: int = 0
    hypervolume_lost: float = 0.0

    def __post_init__(self) -> None:
        _ratio(f"proposer {self.name}", hypervolume_lost=self.hypervolume_lost)


@dataclass(frozen=True, slots=True)
class TeacherView:
    """The teacher as a row beside its students; latency is that of its ONNX file on the same device."""

    name: str
    top1: float
    split: Split = "test"
    latency_ms: float | None = None
    params: int | None = None
    macs: int | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        _ratio(f"teacher {self.name}", top1=self.top1)


@dataclass(frozen=True, slots=True)
class DatasetView:
    """The data set with the images per split and what was found wrong with it."""

    name: str
    class_names: tuple[str, ...]
    train_images: int
    val_images: int
    test_images: int
    sha256: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Importance:
    """Share of a gene in the spread of each objective over all trials; the shares of one objective add up to 1."""

    gene: str
    accuracy: float
    latency: float


@dataclass(frozen=True, slots=True)
class PackageView:
    """An exported package and the verdict of its own measurement; `reason` says what was missed when it is not good.

    `student` is the id of the run's point that it was made from.
    """

    path: str
    candidate_id: str
    is_good: bool
    reason: str = ""
    top1: float | None = None
    latency_ms: float | None = None
    sha256: str = ""
    student: str = ""


@dataclass(frozen=True, slots=True)
class TableChange:
    """What measured networks changed in the latency table, for one operator group or one cost that no row contains.

    `kind` rows: `value` is corrected / raw time of the group's rows, of which the networks contain `rows`; in single
    ones it goes from `least` to `greatest`. `kind` cost: `value` is ms each. `std` is the standard deviation.
    """

    precision: str
    name: str
    kind: Literal["rows", "cost"]
    value: float
    std: float
    networks: int
    rows: int = 0
    least: float = 0.0
    greatest: float = 0.0


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """A deadline of a whole pipeline and what of it is not the network's, ms; `measured` names what was measured."""

    total_ms: float
    capture_ms: float
    preprocess_ms: float
    postprocess_ms: float
    measured: tuple[str, ...] = ()

    @property
    def network_ms(self) -> float:
        """What is left for the network."""
        return self.total_ms - self.capture_ms - self.preprocess_ms - self.postprocess_ms


@dataclass(frozen=True, slots=True)
class BudgetPick:
    """The student for a further, shorter deadline; `student` is None where nothing keeps it, and `reason` says why."""

    budget_ms: float
    student: str | None
    reason: str
    package: PackageView | None = None


@dataclass(frozen=True, slots=True)
class CommonPick:
    """The student for all devices of a search: it keeps the deadline of each.

    `student` is None where none does, and `reason` says why. `packages` has one for each device, the first one first:
    the same model file, measured and judged on that device.
    """

    student: str | None
    reason: str
    packages: tuple[PackageView, ...] = ()


@dataclass(frozen=True, slots=True)
class RunView:
    """A whole run. Everything but name, dates and budget has a default, so that a young run can be shown too.

    `budget_ms` limits the latency named by `budget_of`; None: no budget. `pick_id` is the student that is recommended,
    `next_id` the runner-up, `closest_id` the nearest student when nothing meets the budget; each with its reason as
    text; `also` has the picks for shorter deadlines. `provenance` maps readable names (versions, seeds, hashes) to
    values; `commands` are what to run next.

    A search for several devices has a view for each, with the student for all of them in `common`; that of the first
    one has those of the further ones in `others`. `device_name` is what the experiment calls the device.
    """

    name: str
    status: RunStatus
    created_at: str
    budget_ms: float | None = None
    budget_of: LatencyKind = "expected"
    pipeline: PipelineTimes | None = None
    device: DeviceProfile | None = None
    teacher: TeacherView | None = None
    dataset: DatasetView | None = None
    space_name: str = ""
    space_size: int = 0
    scorer: str = ""
    points: tuple[Point, ...] = ()
    trials: tuple[TrialPoint, ...] = ()
    failed: tuple[FailedCandidate, ...] = ()
    predictions: tuple[PredictedMeasured, ...] = ()
    changes: tuple[TableChange, ...] = ()
    robustness: tuple[RobustnessRow, ...] = ()
    rounds: tuple[RoundSummary, ...] = ()
    importances: tuple[Importance, ...] = ()
    proposers: tuple[ProposerSummary, ...] = ()
    pick_id: str | None = None
    pick_reason: str = ""
    next_id: str | None = None
    next_reason: str = ""
    closest_id: str | None = None
    closest_reason: str = ""
    also: tuple[BudgetPick, ...] = ()
    package: PackageView | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    provenance: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    device_name: str = ""
    common: CommonPick | None = None
    others: tuple[RunView, ...] = ()

    def __post_init__(self) -> None:
        if self.budget_ms is not None and not self.budget_ms > 0:
            raise RecordError(f"run {self.name}: budget_ms must be positive, got {self.budget_ms}")
        ids = [p.id for p in self.points]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise RecordError(f"run {self.name}: point {twice} appears twice")
        for name in ("pick_id", "next_id", "closest_id"):
            given = getattr(self, name)
            if given is not None and given not in ids:
                raise RecordError(
                    f"run {self.name}: {name} {given!r} is not among its points{did_you_mean(given, ids)}"
                )

    def point(self, point_id: str) -> Point:
        """The point with this id.

        Raises:
            RecordError: there is none.
        """
        for p in self.points:
            if p.id == point_id:
                return p
        ids = [p.id for p in self.points]
        raise RecordError(f"run {self.name}: no student {point_id!r}{did_you_mean(point_id, ids)}; run: nas pareto")

    def proposer_of(self, point: Point) -> str:
        """What proposed the candidate that a point comes from; empty where that is not known."""
        return next((t.proposer for t in self.trials if t.number == point.trial), "")

    @property
    def front(self) -> tuple[Point, ...]:
        """Points on the front, fastest first by the latency of the budget."""
        on = (p for p in self.points if p.on_front)
        return tuple(sorted(on, key=lambda p: latency_of(p.latency, self.budget_of)))

    def meets_budget(self, point: Point) -> bool:
        """True when the point's latency is within the budget, or when there is no budget."""
        return self.budget_ms is None or latency_of(point.latency, self.budget_of) <= self.budget_ms
