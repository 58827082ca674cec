"""A made-up run of a realistic size and shape for the tests of its views. No figure in it was measured."""

from __future__ import annotations

import numpy as np

from nas.core.records import (
    BlockConfig,
    Candidate,
    DeviceProfile,
    ExitConfig,
    HeadConfig,
    LatencyFigures,
    StageConfig,
    StemConfig,
)
from nas.core.run import (
    DatasetView,
    FailedCandidate,
    Importance,
    PackageView,
    Point,
    PredictedMeasured,
    ProposerSummary,
    RoundSummary,
    RunView,
    SplitAccuracy,
    TeacherView,
    TrialPoint,
)
from nas.core.walk import exit_macs
from nas.latency.pareto import hypervolume_growth, non_dominated

BUDGET_MS = 0.5
CLASSES = ("good", "scratch", "pit", "crack", "stain", "dent", "burr", "pore", "fold", "scale")


def made_candidate(rng: np.random.Generator, precision: str = "fp32") -> Candidate:
    """A random network for 32 px with three stages and up to two exits."""
    channels = stem = int(rng.choice([8, 16]))
    stages = []
    for s, width in enumerate((16, 24, 48)):
        out = int(width * rng.choice([0.5, 1.0, 1.5]))
        blocks = []
        for b in range(int(rng.integers(1, 4))):
            blocks.append(
                BlockConfig(
                    channels,
                    channels * int(rng.choice([2, 3, 6])),
                    out,
                    kernel_size=int(rng.choice([3, 5])),
                    stride=2 if b == 0 and s > 0 else 1,
                    use_se=bool(rng.random() < 0.4),
                    activation="hard_swish" if s else "relu",
                )
            )
            channels = out
        stages.append(StageConfig(tuple(blocks)))
    exits = tuple(ExitConfig(s, 0) for s in range(2) if rng.random() < 0.7)
    candidate = Candidate(32, len(CLASSES), StemConfig(stem), tuple(stages), HeadConfig(0, 64), exits)
    return candidate.with_precision("int8" if precision == "int8" else "fp32")


def made_view(name: str = "Test data: made-up run", students: int = 14, trials: int = 160, seed: int = 3) -> RunView:
    """A finished run with a teacher, a front, beaten students, failures, three rounds; all random."""
    rng = np.random.default_rng(seed)
    points: list[Point] = []
    while len(points) < students:
        candidate = made_candidate(rng, str(rng.choice(["fp32", "int8"])))
        factor = 2.2e-7 if candidate.precision_label == "fp32" else 1.3e-7
        exit_ms = tuple(0.06 + factor * m for m in exit_macs(candidate))
        thresholds = tuple(float(t) for t in rng.uniform(0.6, 0.95, len(candidate.exits)))
        shares = rng.dirichlet(np.linspace(1, 2, len(exit_ms)))
        shares = np.round(shares, 3)
        shares[-1] = 1 - shares[:-1].sum()
        expected = float(shares @ exit_ms)
        top1 = float(np.clip(0.975 - 0.05 * np.exp(-expected / 0.12) - rng.exponential(0.008), 0.5, 1))
        is_measured = rng.random() < 0.7
        figures = LatencyFigures(
            expected,
            exit_ms[-1],
            exit_ms[-1],
            0.004 if is_measured else 0.02,
            "measured" if is_measured else "predicted",
        )
        curve_ms = np.linspace(exit_ms[0] * 1.02, max(exit_ms[-1], exit_ms[0] * 1.05), 40)
        curve = tuple((float(x), float(top1 - 0.25 * np.exp(-5 * i / 8))) for i, x in enumerate(curve_ms))
        final = candidate.with_thresholds(thresholds)
        points.append(
            Point(
                id=final.id,
                candidate=final,
                latency=figures,
                val=SplitAccuracy(min(1.0, top1 + 0.004), 1500),
                test=SplitAccuracy(
                    round(top1 * 2000) / 2000, 2000, tuple(float(a) for a in np.linspace(0.71, top1, len(exit_ms)))
                ),
                prediction=LatencyFigures(expected * 1.03, exit_ms[-1] * 1.03, exit_ms[-1], 0.02, "predicted")
                if is_measured
                else None,
                exit_ms=exit_ms,
                exit_shares=tuple(float(s) for s in shares),
                threshold_curve=curve if len(exit_ms) > 1 else (),
                label=f"student {len(points) + 1}",
                trial=int(rng.integers(0, trials)),
                round=int(rng.integers(0, 3)),
                is_finished=True,
                model_bytes=int(40_000 + rng.integers(0, 200_000)),
                cost_s=float(rng.uniform(10, 30)),
                export_command=f"nas export runs/made-up --trial {len(points)}",
            )
        )
    on_front = non_dominated([[p.top1, p.latency.expected_ms] for p in points], (True, False))
    points = [_with_front(p, bool(on)) for p, on in zip(points, on_front, strict=True)]
    inside = [p for p in points if p.on_front and p.latency.expected_ms <= BUDGET_MS]
    pick, runner_up = sorted(inside, key=lambda p: -p.top1)[:2]

    scored = []
    for i in range(trials):
        ms = float(np.exp(rng.uniform(np.log(0.08), np.log(0.6))))
        reach = 0.9 - 0.5 * np.exp(-ms / 0.1)
        scored.append(
            TrialPoint(i, f"a{i:012x}", float(np.clip(reach - rng.exponential(0.1 - 0.07 * i / trials), 0.1, 1)), ms,
                       str(rng.choice(["fp32", "int8"])), int(rng.choice([1, 2, 4])), i * 3 // trials,
                       "first" if i < 2 else "greybox")
        )  # fmt: skip
    growth = hypervolume_growth([(t.score, t.latency_ms) for t in scored], (0.0, BUDGET_MS), (True, False)) / BUDGET_MS
    predictions = []
    for i in range(30):
        measured = float(rng.uniform(0.1, 0.7))
        error = rng.normal(0.05 if i < 10 else 0.0, 0.06 if i < 10 else 0.025)
        predictions.append(
            PredictedMeasured(f"r32-d7-x1-{i:012x}", "int8" if i % 2 else "fp32", measured * (1 + error),
                              0.03 * measured, measured, i // 10)
        )  # fmt: skip
    return RunView(
        name=name,
        status="finished",
        created_at="2026-01-02 10:20 UTC",
        budget_ms=BUDGET_MS,
        device=DeviceProfile(
            "cpu",
            "Made-up CPU, 2 cores",
            "onnxruntime",
            "1.0",
            "default",
            False,
            1,
            "none",
            ("fp32", "int8"),
            "simulated",
            {"memory": "8 GiB", "hostname": "should-not-be-seen"},
        ),
        teacher=TeacherView("resnet-test", 0.983, "test", 7.4, 2_780_000, 120_000_000, "7d" * 32),
        dataset=DatasetView("made-up defects", CLASSES, 6000, 1500, 2000, "ab" * 32, ("class 'pore' has 12 images",)),
        space_name="tiny-32px",
        space_size=4_194_304_000,
        scorer="standalone",
        points=tuple(points),
        trials=tuple(scored),
        failed=(
            FailedCandidate("r32-d9-x2-int8-00aa11bb22cc", "training", "loss is not finite after epoch 2", 1),
            FailedCandidate("r32-d4-x0-fp32-33dd44ee55ff", "measuring", "no calm round in 12; the machine was busy", 2),
        ),
        predictions=tuple(predictions),
        rounds=tuple(
            RoundSummary(
                r, trials // 3, r, 10, float(growth[(r + 1) * trials // 3 - 1]), (0.071, 0.026, 0.021)[r], 70.0 + r
            )
            for r in range(3)
        ),
        importances=tuple(
            Importance(gene, float(a), float(b))
            for gene, a, b in zip(
                (
                    "stage 3 width",
                    "stage 2 depth",
                    "stem width",
                    "stage 2 expansion",
                    "precision",
                    "stage 1 kernel",
                    "SE",
                ),
                (0.31, 0.22, 0.15, 0.12, 0.09, 0.07, 0.04),
                (0.18, 0.14, 0.09, 0.2, 0.3, 0.06, 0.03),
                strict=True,
            )
        ),
        proposers=(
            ProposerSummary("greybox", trials - 2, 3, 9, 5, 0.412),
            ProposerSummary("first", 2, 0, 1, 0, 0.008),
        ),
        pick_id=pick.id,
        pick_reason="The most accurate student whose expected latency plus 2 standard deviations is in budget.",
        next_id=runner_up.id,
        next_reason="less accurate, and faster",
        package=PackageView("runs/made-up/packages/best", pick.id, True, "", pick.top1, 0.31, "cd" * 32),
        wall_s=214,
        cpu_s=401,
        provenance={
            "nas": "0.1.0",
            "torch": "0.0 (made up)",
            "seed": "3",
            "configuration": "sha256 1234",
            "commit": "none",
        },
        commands=("nas export runs/made-up --best-under 0.5ms", "nas bench runs/made-up/packages/best --budget-ms 0.5"),
    )


def _with_front(point: Point, on_front: bool) -> Point:
    from dataclasses import replace

    return replace(point, on_front=on_front)
