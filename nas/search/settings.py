"""Settings of the search itself; `experiment.py` composes them with those of data, teacher and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nas.core.errors import ConfigError
from nas.core.run import LatencyKind
from nas.latency.exits import read_target
from nas.recipe.settings import ImportanceKind, PruneMode, PruneSettings, QatSettings
from nas.train.settings import Accelerator

SamplerName = Literal["auto", "greybox", "tpe", "nsga2", "random"]
ScorerName = Literal["supernet", "standalone"]
GeneValue = bool | int | float | str
EnqueueEntry = str | dict[str, GeneValue]
MOST_PRUNED = 0.7  # of the expansion channels; each block keeps a quarter of its own


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """The deadline.

    `ms`: milliseconds of one inference at batch 1. `of`: which latency it limits: `worst` (no early exit is taken;
    what a hard deadline means), `expected` (mean under the exit shares of the validation images) or `p99`.
    `margin_std`: a candidate is only trained when its prediction plus this many standard deviations keeps the budget.
    Before training it counts for `worst`; the others depend on the exits that images take, so only those candidates are
    refused that miss the budget even when every image leaves as early as it can. Afterwards thresholds are solved for
    `expected` and `p99` with this margin, which then covers other images too. `package_margin_std`: a package is only
    handed out when its median plus this many deviations of its measurement keeps the budget, so that it keeps it when
    you measure it too. `also_ms`: shorter deadlines of the same
    kind; each gets a pick and a package of its own out of the same search.

    `total_ms`: in place of `ms`, the deadline of the whole pipeline; the network gets what the next three leave of it.
    `capture_ms`: the camera's part. `preprocess`: milliseconds from a picture to the network's input, or `measured` for
    what `infer.py` of a package needs on this machine, with pictures of the data set. `postprocess`: milliseconds from
    the network's output to a class, or `measured`.
    """

    ms: float = 1.0
    of: LatencyKind = "worst"
    margin_std: float = 1.0
    package_margin_std: float = 1.5
    also_ms: tuple[float, ...] = ()
    total_ms: float | None = None
    capture_ms: float = 0.0
    preprocess: float | Literal["measured"] = "measured"
    postprocess: float | Literal["measured"] = "measured"

    def __post_init__(self) -> None:
        if not self.ms > 0:
            raise ConfigError(f"budget.ms must be positive, got {self.ms}")
        for name in ("margin_std", "package_margin_std"):
            if getattr(self, name) < 0:
                raise ConfigError(f"budget.{name} must not be negative, got {getattr(self, name)}")
        if self.total_ms is not None:
            self._check_total(self.total_ms)
        for ms in self.also_ms:
            if not 0 < ms < self.ms:
                raise ConfigError(
                    f"budget.also_ms: {ms:g} must lie between 0 and budget.ms ({self.ms:g}): the search is for the "
                    "longest deadline"
                )
        if len(set(self.also_ms)) < len(self.also_ms):
            raise ConfigError(f"budget.also_ms: a deadline appears twice in {list(self.also_ms)}")

    def _check_total(self, total_ms: float) -> None:
        if not total_ms > 0:
            raise ConfigError(f"budget.total_ms must be positive, got {total_ms}")
        if self.also_ms:
            raise ConfigError(
                "budget.also_ms goes with budget.ms; of a total, what is left is known when it is measured"
            )
        parts = {"capture_ms": self.capture_ms, "preprocess": self.preprocess, "postprocess": self.postprocess}
        for name, value in parts.items():
            if value != "measured" and value < 0:
                raise ConfigError(f"budget.{name} must not be negative, got {value}")
        known_ms = sum(value for value in parts.values() if value != "measured")
        if known_ms >= total_ms:
            raise ConfigError(
                f"budget.total_ms: {known_ms:g} of {total_ms:g} ms are gone before the network begins (capture_ms, "
                "preprocess, postprocess)"
            )

    @property
    def all_ms(self) -> tuple[float, ...]:
        """Every deadline, the longest first."""
        return (self.ms, *sorted(self.also_ms, reverse=True))


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """A further device that students are searched for, with its own deadline.

    `device`: where latencies are measured, named like the experiment's first device. `ms`: milliseconds of one
    inference at batch 1; which latency that limits, and with which margins, is said in the section `budget`.
    """

    device: str
    ms: float

    def __post_init__(self) -> None:
        if not self.ms > 0:
            raise ConfigError(f"ms must be positive, got {self.ms}")


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How candidates are proposed and scored.

    `trials`: candidates scored in all rounds together. `rounds`: the table is corrected from measured networks between
    rounds. `batch`: candidates proposed before the sampler sees their scores. `sampler`: `auto` takes what
    is worth the most in the time that scoring and proposing take (docs/search.md): nearly always the grey-box sampler,
    which models accuracy alone, where all rows of the space have a latency; else multivariate TPE up to 300 trials at
    most and NSGA-II with a small population above. `scorer`: how accuracy is
    estimated before finalists are distilled in full. `workers`: training processes,
    one thread each; 0 means one per core, and at most four per GPU. `accelerator`: cpu, or cuda to train teacher,
    shared weights and students on the GPUs that CUDA_VISIBLE_DEVICES shows; latencies do not depend on it. `seed`: of
    everything. `enqueue`: candidates that are scored before any other one, if they keep the budget; each is the name of
    a published network of the space (mobilenet_v3_small, mobilenet_v3_large), a .json file of a candidate, a candidate
    of an earlier run as {run: DIR, id: ID}, or genes as
    {NAME: VALUE, ...}, of which those that are not given are of the network in `like` or the smallest one.
    `ladder`: candidates that are solved for exactly, after the first batch, from the latency table and a score of each
    choice, for as many latencies up to the budget; 0: none. `predictor_candidates`: random candidates that the grey-box
    sampler looks at for each batch beside its own local search, once two batches are scored; 0: none.
    `precision_seeds`: candidates of the second batch that are architectures of the front of the first one in other
    mixes of precisions, solved for exactly from the table and from what each part loses in each precision; only in a
    space with a precision for each stage; 0: none. `energy`: the
    energy of an inference is a further objective, on a first device that has power sensors.
    """

    trials: int = 96
    rounds: int = 2
    batch: int = 12
    sampler: SamplerName = "auto"
    scorer: ScorerName = "supernet"
    workers: int = 0
    accelerator: Accelerator = "cpu"
    seed: int = 0
    enqueue: tuple[EnqueueEntry, ...] = ()
    ladder: int = 0
    predictor_candidates: int = 0
    precision_seeds: int = 0
    energy: bool = False

    def __post_init__(self) -> None:
        for name in ("trials", "rounds", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"search.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "ladder", "predictor_candidates", "precision_seeds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"search.{name} must not be negative, got {getattr(self, name)}")
        if len(self.enqueue) > self.trials:
            raise ConfigError(
                f"search.enqueue: {len(self.enqueue)} candidates, and search.trials are {self.trials}: give more trials"
            )
        if self.rounds > self.trials:
            raise ConfigError(f"search.rounds ({self.rounds}) must not exceed search.trials ({self.trials})")


@dataclass(frozen=True, slots=True)
class FeedbackSettings:
    """Which whole networks are measured to correct the table.

    `first_networks`: before the first round, spread over predicted latency. `networks_per_round`: after each round,
    from the front and near the budget. `max_engines`: whole networks built and measured in the search in all on each
    device, where that is the expensive step; no limit by default. Finished students are measured on top of these.
    `max_rows`: rows of the table that are measured before the first round, where each takes long; the others are
    interpolated from them, and measured when a network that has them is. No limit by default.
    """

    first_networks: int = 8
    networks_per_round: int = 6
    max_engines: int | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if min(self.first_networks, self.networks_per_round, self.max_engines or 0) < 0:
            raise ConfigError("feedback: numbers of networks must not be negative")
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"feedback.max_rows must be at least 1, got {self.max_rows}")

    def engines(self, rounds: int) -> int:
        """Whole networks that a search of so many rounds measures at most."""
        return self.within(self.first_networks + rounds * self.networks_per_round, 0)

    def within(self, wanted: int, measured: int) -> int:
        """How many of `wanted` whole networks may be measured after so many."""
        return wanted if self.max_engines is None else max(0, min(wanted, self.max_engines - measured))


@dataclass(frozen=True, slots=True)
class FinishSettings:
    """Finalists: full distillation with one recipe, then int8, thresholds and measuring.

    `students`: architectures finished. `calibration_images`: training images whose ranges int8 uses.
    `exit_loss`: accuracy (ratio) that early exits may cost on the validation split against the full network; a deadline
    on the mean or the tail may cost more. `int8_loss`: a precision that loses more on validation is refused, and a
    package whose test accuracy is this much (ratio) below fp32 with the same exits is not called good.
    `precision_ladder`: mixes of precisions, one for the stem, each stage and the head, that each finalist is tried in
    beside every precision throughout and the mixes that the search scored: solved for exactly from the table and from
    what each part loses in each precision, also where the space has one precision for the whole network; 0: none.
    `robustness`: severities (1 to 5), such as [1, 3, 5], at which the finished students are judged on test images that
    are corrupted by noise, blur, exposure, dark corners and JPEG, for a table in the report; none by default.
    `exit_targets`: for what the thresholds of each finished student are solved besides, each a point of its own:
    loss=RATIO, expected=TIME or p99=TIME, such as [loss=0.02, p99=2ms]; `nas export --exits` solves them afterwards.
    `calibrate_confidence`: the logits of each exit are divided by a temperature that makes its probabilities honest on
    the validation split (Guo et al. 2017, arXiv 1706.04599); it is inside the weights and costs nothing.
    `stream_images`: test images that pass each student with exits on the front one by one on the device, to check its
    expected latency; 0: none.
    `qat_epochs`: epochs of quantization-aware training of each precision with int8 that needs it; what it gives is kept
    only where it is better on validation; 0: none. `qat_lr`: its highest learning rate as a share of `distill.lr`.
    `qat_least_loss`: loss of calibration alone (ratio, on validation, at one of the exits) from which on it is done;
    -1: always.

    `prune`: shares of the expansion channels that finalists lose, such as [0.3]: each makes a further student of every
    finalist, narrower where that costs the least importance for the latency saved on the first device; none by default.
    `prune_mode`: `after` cuts the finished weights, then distils; `joint` distils a new student as wide as the finalist
    over the whole schedule and cuts it on the way. `prune_importance`: of the channels, by `taylor` (change of the
    distillation loss) or `l1` (size of the kernels). `prune_epochs`: of distillation after the cut. `prune_lr`: highest
    learning rate there as a share of `distill.lr`. `prune_rows`: widths of each block that are measured to find the
    steps of its latency.
    """

    students: int = 8
    calibration_images: int = 128
    exit_loss: float = 0.0
    int8_loss: float = 0.015
    precision_ladder: int = 3
    exit_targets: tuple[str, ...] = ()
    calibrate_confidence: bool = True
    stream_images: int = 1000
    qat_epochs: int = 2
    qat_lr: float = 0.1
    qat_least_loss: float = 0.005
    prune: tuple[float, ...] = ()
    prune_mode: PruneMode = "after"
    prune_importance: ImportanceKind = "taylor"
    prune_epochs: int = 8
    prune_lr: float = 0.5
    prune_rows: int = 8
    robustness: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for text in self.exit_targets:
            read_target(text, "finish.exit_targets")
        if self.stream_images < 0:
            raise ConfigError(f"finish.stream_images must not be negative, got {self.stream_images}")
        if self.students < 1:
            raise ConfigError(f"finish.students must be at least 1, got {self.students}")
        if self.calibration_images < 1:
            raise ConfigError(f"finish.calibration_images must be at least 1, got {self.calibration_images}")
        if self.precision_ladder < 0:
            raise ConfigError(f"finish.precision_ladder must not be negative, got {self.precision_ladder}")
        for name in ("exit_loss", "int8_loss"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"finish.{name} must be a ratio from 0 to 1, got {getattr(self, name)}")
        severities = list(self.robustness)
        if not set(severities) <= set(range(1, 6)) or severities != sorted(set(severities)):
            raise ConfigError(f"finish.robustness: rising severities from 1 to 5 are needed, got {severities}")
        _ = self.qat  # its own checks
        _ = self.pruning
        for share in self.prune:
            if not 0 < share <= MOST_PRUNED:
                raise ConfigError(f"finish.prune: a share must be above 0 and at most {MOST_PRUNED:g}, got {share:g}")
        if self.prune_rows < 2:
            raise ConfigError(
                f"finish.prune_rows must be at least 2, the full width and another, got {self.prune_rows}"
            )

    @property
    def pruning(self) -> PruneSettings:
        """How finalists are cut."""
        return PruneSettings(self.prune_mode, self.prune_importance, self.prune_epochs, self.prune_lr)

    @property
    def qat(self) -> QatSettings:
        """The settings of quantization-aware training."""
        return QatSettings(self.qat_epochs, self.qat_lr, self.qat_least_loss)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Where files go.

    `dir`: run folder, default `runs/<name>`. `tables`: latency tables. `cache`: teachers and data. `foreign_table`: a
    table of another device state whose rows stand in, scaled, where the first device's table has none; its results
    say so.
    """

    dir: str | None = None
    tables: str = "latency_tables"
    cache: str = ".nas-cache"
    foreign_table: str | None = None


def is_candidate_file(entry: str) -> bool:
    """Whether a text of `search.enqueue` names a file rather than a published network."""
    return entry.endswith(".json")


def placed(entries: Any, place: Callable[[str], str]) -> Any:
    """Entries of `search.enqueue` as a file gives them, with every path changed; what is no entry stays as it is."""
    if not isinstance(entries, list):
        return entries

    def one(entry: Any) -> Any:
        if isinstance(entry, str):
            return place(entry) if is_candidate_file(entry) else entry
        if not isinstance(entry, dict):
            return entry
        texts = {key: value for key, value in entry.items() if isinstance(value, str)}
        return entry | {
            key: place(value)
            for key, value in texts.items()
            if key == "run" or (key == "like" and is_candidate_file(value))
        }

    return [one(entry) for entry in entries]
