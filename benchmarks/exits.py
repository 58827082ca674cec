"""Do early exits pay, and does a measured stream of images take what was expected of it?

Per seed: single-exit students of rising size and exit students on the largest of their trunks are distilled with one
recipe, deployed to ONNX Runtime and measured on this machine's processor; thresholds are solved on the validation
split, figures are of the test split. `--ways` are settings of exits that are compared, all with the same seeds.

(a) A stream of test images through the exported graph against what was expected of it: shares of the validation images
times the measured latency of each exit. Both, and the student that (b) compares with, are measured in turns in the same
sessions; each image and each exit counts with its least run over all sessions. Sessions are repeated until the two
fastest agree within 1 % in everything, or to a limit (`--sessions`), so that a disturbed host does not decide.
(b) For each exit student: the fastest single-exit student that is at most 0.3 points less accurate, and how much less
time the exits take. Single-exit students are also the exit students cut behind an exit, or without their exits.

Everything is kept in --folder; the same command goes on where it was stopped. Latency needs a quiet machine.

Run: python -m benchmarks.exits [--seeds 3] [--folder runs/bench-exits] [--ways joint conv detached] [--json]
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, report
from nas.core.jsonio import read_record, write_record
from nas.core.records import (
    BlockConfig,
    Candidate,
    ExitConfig,
    HeadConfig,
    StageConfig,
    StemConfig,
)
from nas.core.walk import exit_macs
from nas.data import DataSettings, evenly, load_dataset
from nas.devices.base import MeasureJob, StreamJob
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.export.graph import forced_exit, network_model
from nas.latency.exits import TAIL, ThresholdSetting, evaluate_thresholds, solve_for_loss, sweep
from nas.recipe.context import open_context, write_context
from nas.recipe.finish import (
    FinishJob,
    deployed_rows,
    deployed_student,
    finish_student,
    finished_confidence,
    finished_logits,
)
from nas.recipe.records import FinishedStudent
from nas.train.settings import DistillSettings, TeacherSettings
from nas.train.targets import make_targets
from nas.train.teacher import prepare_teacher

SIDE = 64
LOSSES = (0.0, 0.0025, 0.005, 0.01)  # accuracy (ratio) that thresholds may give up on validation
NEAR = 0.003  # accuracies this close are called equal
GAIN = 0.25  # the goal of (b)
TOLERANCE = 0.03  # the goal of (a)
AGREEMENT = 0.01  # sessions this close are called undisturbed
FP32 = ("fp32",)


@dataclass(frozen=True, slots=True)
class Trunk:
    """A network without exits: widths, depths, strides and expansions of its stages."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    strides: tuple[int, ...]
    expansion: int = 3


# Of 0.6 to 11 M MACs at 64 px. All begin alike, so that the exit of a large one has the trunk of a small one.
TRUNKS = {
    "xs": Trunk((8, 16, 24, 32), (1, 1, 1, 1), (2, 2, 2, 1)),
    "s": Trunk((16, 24, 32, 48), (1, 1, 1, 1), (2, 2, 2, 1)),
    "m": Trunk((16, 24, 48, 64), (1, 2, 2, 2), (2, 2, 2, 1)),
    "l": Trunk((16, 24, 48, 96), (1, 2, 2, 2), (2, 2, 1, 2)),
    "xl": Trunk((16, 24, 64, 96), (1, 2, 3, 2), (2, 2, 1, 2), expansion=4),
}
EXIT_TRUNK = "xl"
EXITS_AFTER = (1, 2)


@dataclass(frozen=True, slots=True)
class Way:
    """Heads of the exits (convolution, hidden channels) and how they are trained along."""

    conv_channels: int = 0
    hidden_channels: int = 0
    weights: tuple[float, ...] = (0.3, 0.5)
    gradient: float = 1.0


WAYS = {
    "joint": Way(),
    "hidden": Way(hidden_channels=64),
    "conv": Way(conv_channels=64),
    "conv, heavy": Way(conv_channels=64, weights=(1.0, 1.0)),
    "conv, half": Way(conv_channels=64, gradient=0.5),
    "conv, detached": Way(conv_channels=64, gradient=0.0),
}


def network(trunk: Trunk, classes: int, way: Way | None = None) -> Candidate:
    """A candidate of 64 px; with a way, exits behind two of its stages."""
    stages, channels = [], 8
    for width, depth, stride in zip(trunk.widths, trunk.depths, trunk.strides, strict=True):
        blocks = []
        for b in range(depth):
            wide = channels * trunk.expansion
            blocks.append(BlockConfig(channels, wide, width, 3, stride if b == 0 else 1, activation="hard_swish"))
            channels = width
        stages.append(StageConfig(tuple(blocks)))
    exits: tuple[ExitConfig, ...] = ()
    if way is not None:
        exits = tuple(ExitConfig(stage, way.hidden_channels, conv_channels=way.conv_channels) for stage in EXITS_AFTER)
    return Candidate(SIDE, classes, StemConfig(8), tuple(stages), HeadConfig(), exits)


@dataclass(frozen=True, slots=True)
class Deployed:
    """A network that can be deployed: latency per exit, ms, and its logits; `cut` as in `deployed_parts`."""

    name: str
    folder: str
    trained: Candidate
    candidate: Candidate
    cut: int | None


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Bench:
    """Settings of a run and where its files are."""

    folder: Path
    context: str
    distill: DistillSettings
    classes: int

    def student(self, name: str, seed: int, way: Way | None) -> tuple[str, FinishedStudent]:
        """Distils a student, or reads it; folder and record."""
        trunk = TRUNKS[EXIT_TRUNK if way is not None else name]
        candidate = network(trunk, self.classes, way)
        distill = self.distill
        if way is not None:
            distill = replace(distill, exit_weights=way.weights, exit_gradient=way.gradient)
        folder = self.folder / f"seed-{seed}" / name.replace(", ", "-")
        started = time.monotonic()
        job = FinishJob(candidate, self.context, str(folder), str(self.folder / "stop"), distill, seed, 64, ())
        finished = finish_student(job)
        tell(f"seed {seed}: {name} ready ({time.monotonic() - started:.0f} s now, {finished.cost_s:.0f} CPU s in all)")
        return str(folder), finished


def deployable(name: str, folder: str, student: FinishedStudent) -> list[Deployed]:
    """Every form of a student in fp32: with its exits, without, and cut behind each."""
    whole, found = student.candidate, []
    for cut in (None, *range(len(whole.exits))):
        last, network_ = (len(whole.exits), whole) if cut is None else (cut, whole.truncated(cut))
        for size in range(last + 1):
            for places in itertools.combinations(range(last), size):
                own = replace(network_, exits=tuple(network_.exits[k] for k in places))
                ending = f" cut at {cut}" * (cut is not None) + f" exits {places}" * bool(places)
                found.append(Deployed(name + ending, folder, whole, own, cut))
    return found


def logits_of(own: Deployed, split: str) -> np.ndarray:
    """Logits [E, N, K] of its own exits."""
    full = finished_logits(Path(own.folder), split, FP32)
    return full[deployed_rows(own.trained, own.candidate, own.cut)]


def model_of(own: Deployed, context: str, candidate: Candidate) -> bytes:
    """The exported graph; the candidate has thresholds where it has exits."""
    weights, _ = deployed_student(Path(own.folder), own.trained, candidate, FP32, own.cut)
    data = open_context(context, SIDE)
    form = "if" if candidate.exits else "plain"
    return network_model(candidate, weights, data.mean, data.std, form=form)


@dataclass(frozen=True, slots=True)
class Times:
    """Latencies of networks by name, ms per exit."""

    exit_ms: dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Session:
    """A stream, the exits of its network and one student without exits, measured one after the other, ms.

    `single_ms` is None where no student without exits is as accurate.
    """

    image_ms: tuple[float, ...]
    exit_ms: tuple[float, ...]
    single_ms: float | None
    is_calm: bool

    def sums(self, shares: Sequence[float]) -> tuple[float, ...]:
        """What sessions must agree in: mean of the stream, what is expected of it, the other student."""
        found = (statistics.fmean(self.image_ms), expected(shares, self.exit_ms))
        return found if self.single_ms is None else (*found, self.single_ms)


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions of each stream by its key; written as they are measured."""

    by_key: dict[str, tuple[Session, ...]]


def expected(shares: Sequence[float], exit_ms: Sequence[float]) -> float:
    """Mean latency, ms; an exit behind another never takes less."""
    return float(np.asarray(shares) @ np.maximum.accumulate(exit_ms))


def least(sessions: Sequence[Session]) -> Session:
    """Every image, every exit and the other student with its least run."""
    singles = [s.single_ms for s in sessions if s.single_ms is not None]
    return Session(
        tuple(np.min([s.image_ms for s in sessions], axis=0).tolist()),
        tuple(np.min([s.exit_ms for s in sessions], axis=0).tolist()),
        min(singles, default=None),
        any(s.is_calm for s in sessions),
    )


def agree(sessions: Sequence[Session], shares: Sequence[float]) -> bool:
    """The two fastest sessions are as good as equal in everything: two that were disturbed alike are not enough."""
    if len(sessions) < 2:
        return False
    columns = zip(*(s.sums(shares) for s in sessions), strict=True)
    pairs = [sorted(column)[:2] for column in columns]
    return all(second <= first * (1 + AGREEMENT) for first, second in pairs)


def measured(
    device: OnnxRuntimeCpu, everything: Sequence[Deployed], context: str, file: Path
) -> dict[str, tuple[float, ...]]:
    """Latency per exit of each network, kept in a file."""
    known = read_record(Times, file) if file.exists() else Times({})
    missing = [own for own in everything if own.name not in known.exit_ms]
    jobs: list[MeasureJob] = []
    for own in missing:
        candidate = own.candidate.with_thresholds((0.5,) * len(own.candidate.exits))
        model, macs = model_of(own, context, candidate), exit_macs(own.candidate)
        for k in range(len(candidate.exits) + 1):
            forced = forced_exit(model, k) if candidate.exits else model
            jobs.append(MeasureJob(f"{own.name}#{k}", "network", "fp32", forced, macs[k]))
    by_key: dict[str, float] = {}
    for m in device.measure(jobs):
        if m.latency_ms is None:
            raise SystemExit(f"{m.key}: {m.error}")
        by_key[m.key] = m.latency_ms
    for own in missing:
        known.exit_ms[own.name] = tuple(by_key[f"{own.name}#{k}"] for k in range(len(own.candidate.exits) + 1))
    write_record(file, known)
    return known.exit_ms


@dataclass(frozen=True, slots=True)
class Choice:
    """An exit student under one setting of thresholds, on validation (v) and on test (t), ms and top-1 as ratios."""

    name: str
    way: str
    loss: float
    setting: ThresholdSetting
    val_top1: float
    val_ms: float
    test_top1: float
    test_ms: float


@dataclass(frozen=True, slots=True)
class Single:
    """A student without exits."""

    name: str
    val_top1: float
    test_top1: float
    ms: float


def right(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


def singles_and_choices(
    everything: Sequence[Deployed], ways: dict[str, str], exit_ms: dict[str, tuple[float, ...]], context: str
) -> tuple[list[Single], list[Choice]]:
    """All students without exits, and those with exits under thresholds for each allowed loss."""
    data = open_context(context, SIDE)
    val_labels, test_labels = np.asarray(data.val_labels), np.asarray(data.test_labels)
    singles: list[Single] = []
    choices: list[Choice] = []
    for own in everything:
        val, test, ms = logits_of(own, "val"), logits_of(own, "test"), exit_ms[own.name]
        if not own.candidate.exits:
            singles.append(Single(own.name, right(val[-1], val_labels), right(test[-1], test_labels), ms[-1]))
            continue
        ms = tuple(np.maximum.accumulate(ms).tolist())
        swept = sweep(val, val_labels, ms)
        for loss in LOSSES:
            setting = solve_for_loss(swept, loss)
            if setting.truncation is not None or setting.unused_exits:
                continue  # another form of the student has the same figures for less time
            top1, _, expected = evaluate_thresholds(test, test_labels, setting.thresholds, ms)
            choices.append(
                Choice(own.name, ways[own.name], loss, setting, setting.top1, setting.expected_ms, top1, expected)
            )
    return singles, choices


def fastest_equal(singles: Sequence[Single], top1: float, split: str) -> Single | None:
    """The fastest single-exit student that is at most 0.3 points less accurate; None: all are."""
    able = [s for s in singles if (s.val_top1 if split == "val" else s.test_top1) >= top1 - NEAR - 1e-9]
    return min(able, key=lambda s: s.ms, default=None)


def gain(singles: Sequence[Single], top1: float, ms: float, split: str) -> float | None:
    """Share of time that is saved against that student; None: no student without exits is as accurate."""
    single = fastest_equal(singles, top1, split)
    return None if single is None else 1 - ms / single.ms


def best(singles: Sequence[Single], choices: Sequence[Choice]) -> Choice:
    """The choice that saves the most on validation; where only exits reach an accuracy, that does not count."""
    return max(choices, key=lambda c: _or_least(gain(singles, c.val_top1, c.val_ms, "val")))


def _or_least(gained: float | None) -> float:
    """For comparisons: no gain at all is behind every gain and behind every loss."""
    return -float("inf") if gained is None else gained


def one_seed(
    bench: Bench, seed: int, ways: Sequence[str], images: int, most_sessions: int, device: OnnxRuntimeCpu
) -> dict[str, Any]:
    """Trains, measures and compares the students of one seed."""
    everything: list[Deployed] = []
    way_of: dict[str, str] = {}
    confidence: dict[str, Any] = {}
    for name in (*TRUNKS, *ways):
        folder, student = bench.student(name, seed, WAYS.get(name))
        forms = deployable(name, folder, student)
        everything += forms
        way_of |= {d.name: name for d in forms}
        confidence[name] = [
            {"temperature": c.temperature, "before": c.error_before, "after": c.error_after}
            for c in finished_confidence(Path(folder), FP32)
        ]
    home = bench.folder / f"seed-{seed}"
    exit_ms = measured(device, everything, bench.context, home / "latencies.json")
    singles, choices = singles_and_choices(everything, way_of, exit_ms, bench.context)
    able = {way: [c for c in choices if c.way == way] for way in ways}
    found = {way: best(singles, own_choices) for way, own_choices in able.items() if own_choices}
    for way in ways:
        if way not in found:
            tell(f"seed {seed}: {way}: no setting of thresholds uses every exit; it has no figures")
    by_name = {own.name: own for own in everything}
    test_images = evenly(open_context(bench.context, SIDE).test, images)
    rows = {}
    for way, choice in found.items():
        own = by_name[choice.name]
        single = fastest_equal(singles, choice.test_top1, "test")
        against = None if single is None else by_name[single.name]
        sessions = stream_sessions(
            device, own, choice, against, test_images, bench.context, home / "sessions.json", most_sessions
        )
        best_run, shares = least(sessions), choice.setting.shares
        stream_ms, expected_ms = statistics.fmean(best_run.image_ms), expected(shares, best_run.exit_ms)
        rows[way] = {
            "student": choice.name,
            "loss": choice.loss,
            "test_top1": choice.test_top1,
            "expected_ms": expected_ms,
            "test_shares_ms": choice.test_ms,
            "shares": list(shares),
            "exit_ms": list(best_run.exit_ms),
            "single": None if single is None else single.name,
            "single_top1": None if single is None else single.test_top1,
            "single_ms": best_run.single_ms,
            "gain": gain(singles, choice.test_top1, choice.test_ms, "test"),
            "gain_val": gain(singles, choice.val_top1, choice.val_ms, "val"),
            "stream_ms": stream_ms,
            "stream_p99_ms": float(np.quantile(best_run.image_ms, TAIL)),
            "stream_off": stream_ms / expected_ms - 1,
            "sessions": len(sessions),
            "sessions_agree": agree(sessions, shares),
            "is_calm": best_run.is_calm,
            "gain_stream": None if best_run.single_ms is None else 1 - stream_ms / best_run.single_ms,
        }
    return {
        "seed": seed,
        "best_way": max(found, key=lambda way: _or_least(rows[way]["gain_val"]), default=None),
        "ways": rows,
        "singles": [[s.name, s.val_top1, s.test_top1, s.ms] for s in singles],
        "choices": [[c.name, c.loss, c.val_top1, c.val_ms, c.test_top1, c.test_ms] for c in choices],
        "confidence": confidence,
    }


def stream_sessions(
    device: OnnxRuntimeCpu,
    own: Deployed,
    choice: Choice,
    against: Deployed | None,
    images: np.ndarray,
    context: str,
    file: Path,
    most: int,
) -> tuple[Session, ...]:
    """Sessions of a stream until two agree, at most `most` of them; those in the file are not measured again."""
    known = read_record(Sessions, file) if file.exists() else Sessions({})
    asked = [own.name, choice.setting.thresholds, None if against is None else against.name, len(images)]
    key = json.dumps(asked)
    sessions, shares = known.by_key.get(key, ()), choice.setting.shares
    if len(sessions) >= most or agree(sessions, shares):
        return sessions
    jobs, stream = session_jobs(own, choice, against, images, context)
    while len(sessions) < most and not agree(sessions, shares):
        sessions = (*sessions, one_session(device, jobs, stream))
        known.by_key[key] = sessions
        write_record(file, known)
        now = sessions[-1].sums(shares)
        tell(f"{choice.name}: session {len(sessions)}: stream {now[0]:.4f} ms, expected {now[1]:.4f} ms")
    return sessions


def session_jobs(
    own: Deployed, choice: Choice, against: Deployed | None, images: np.ndarray, context: str
) -> tuple[list[MeasureJob], StreamJob]:
    """What each session measures: every exit and the other student alone, and the stream of images."""
    candidate = own.candidate.with_thresholds(choice.setting.thresholds)
    model, macs = model_of(own, context, candidate), exit_macs(candidate)
    jobs = [MeasureJob(f"exit {k}", "network", "fp32", forced_exit(model, k), macs[k]) for k in range(len(macs))]
    if against is not None:
        single = model_of(against, context, against.candidate)
        jobs.append(MeasureJob("single", "network", "fp32", single, exit_macs(against.candidate)[-1]))
    pixels = np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)), dtype=np.float32)
    return jobs, StreamJob("stream", (model,), (), pixels)


def one_session(device: OnnxRuntimeCpu, jobs: Sequence[MeasureJob], stream: StreamJob) -> Session:
    """Measures each exit and the other student, and the stream right behind."""
    ms = {}
    for m in device.measure(jobs):
        if m.latency_ms is None:
            raise SystemExit(f"{m.key}: {m.error}")
        ms[m.key] = m.latency_ms
    times = device.stream_times(stream)
    exit_ms = tuple(ms[job.key] for job in jobs if job.key != "single")
    return Session(times.latency_ms, exit_ms, ms.get("single"), times.is_calm)


def prepared(folder: Path, options: Any) -> Bench:
    """Data, teacher and its answers, in the folder."""
    data = DataSettings(train_images=options.images, val_images=options.val_images, test_images=options.test_images)
    dataset = load_dataset(data, SIDE)
    asked = TeacherSettings(epochs=options.teacher_epochs, widths=(24, 48, 96), batch_size=64, threads=1)
    teacher = prepare_teacher(dataset, asked, folder / "cache", lambda i, n: tell(f"teacher: epoch {i} of {n}"))
    distill = DistillSettings(epochs=options.epochs, lr=0.02, variants=min(options.epochs, 6))
    targets = make_targets(teacher, dataset, distill.variants, folder / "cache")
    context = folder / "context.json"
    write_context(context, (dataset,), targets, folder / "cache", 0)
    tell(f"teacher: {100 * teacher.test_accuracy:.1f} % on test")
    return Bench(folder, str(context.resolve()), distill, len(dataset.class_names))


def main(arguments: list[str]) -> int:
    """Trains, measures and prints; gives the exit code."""
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path("runs/bench-exits"), help="students and times are kept")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="settings of exits")
    options.add_argument("--epochs", type=int, default=12, help="of every student")
    options.add_argument("--teacher-epochs", type=int, default=10)
    options.add_argument("--images", type=int, default=4000, help="training images")
    options.add_argument("--val-images", type=int, default=3000)
    options.add_argument("--test-images", type=int, default=3000)
    options.add_argument("--stream-images", type=int, default=1000)
    options.add_argument("--sessions", type=int, default=8, help="most sessions of a stream (default 8)")
    chosen = options.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    bench = prepared(chosen.folder, chosen)
    device = OnnxRuntimeCpu()
    asked = (chosen.ways, chosen.stream_images, chosen.sessions, device)
    seeds = [one_seed(bench, seed, *asked) for seed in range(chosen.seeds)]
    rows = []
    for way in chosen.ways:
        own = [s["ways"][way] for s in seeds if way in s["ways"]]
        rows.append([way, *(_shown([w[key] for w in own]) for key in ("test_top1", "gain_val", "gain", "gain_stream"))])
        rows[-1].append(_shown([w["stream_off"] for w in own]))
    print_goals(seeds)
    report(
        f"Exits at {SIDE} px: median [smallest, largest] over {len(seeds)} seeds",
        ("way", "test top-1", "saved, validation", "saved, test", "saved, stream", "stream off"),
        rows,
        {"epochs": chosen.epochs, "images": chosen.images, "seeds": seeds},
        chosen.json,
    )
    return 0


def print_goals(seeds: Sequence[dict[str, Any]]) -> None:
    """The two figures, each as median [smallest, largest], and how far they can be believed."""
    streams = [w for s in seeds for w in s["ways"].values()]
    agreed = [w for w in streams if w["sessions_agree"]]
    off = [abs(w["stream_off"]) for w in streams]
    within = sum(o <= TOLERANCE for o in off)
    print(f"(a) streams off the estimate by {_shown(off)}; {within} of {len(off)} within {TOLERANCE}")
    print(f"    sessions agreed for {len(agreed)} of {len(streams)}: {_shown([abs(w['stream_off']) for w in agreed])}")
    picked = [s["ways"][s["best_way"]] for s in seeds if s["best_way"] is not None]
    gains = [w["gain_stream"] for w in picked]
    none = sum(g is None for g in gains)
    print(f"(b) the way that is best on validation saves {_shown(gains)} of the measured mean (goal {GAIN})")
    if none:
        print(f"    not counted: {none} of {len(picked)} seeds, where no student without exits is as accurate")


def _shown(values: Sequence[float | None]) -> str:
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    return f"{statistics.median(there):.3f} [{min(there):.3f}, {max(there):.3f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
