"""Notes for the dashboard: a person reads them as Markdown, so the whole text of one is looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nas.core.records import (
    BlockConfig,
    Candidate,
    ExitConfig,
    HeadConfig,
    LatencyFigures,
    StageConfig,
    StemConfig,
)
from nas.core.run import Point, PredictedMeasured, ProposerSummary, RunView, SplitAccuracy, TrialPoint
from nas.search.folder import TrialRecord
from nas.search.notes import GAP, MirroredTrial, candidate_note, study_note

CANDIDATE = Candidate(
    16,
    10,
    StemConfig(8),
    (
        StageConfig((BlockConfig(8, 16, 8, stride=2), BlockConfig(8, 24, 8, kernel_size=5, use_se=True))),
        StageConfig((BlockConfig(8, 16, 16, stride=2),), "int8"),
    ),
    HeadConfig(0, 32),
    (ExitConfig(0, 0, 0.8),),
)
RECORD = TrialRecord(
    7,
    2,
    (0,),
    CANDIDATE,
    "complete",
    "greybox",
    0.05,
    top1=0.9,
    soft_top1=0.871,
    exit_top1=(0.7, 0.88),
    exit_shares=(0.25, 0.75),
    epochs=3,
)
TRIAL = MirroredTrial(RECORD, (0.0312,), 0.0004, -0.2)
VIEW = RunView(
    name="quick",
    status="finished",
    created_at="",
    budget_ms=0.05,
    budget_of="worst",
    space_name="tiny",
    space_size=2_000_000,
    scorer="standalone",
    trials=(TrialPoint(7, CANDIDATE.arch_id, 0.871, 0.05, proposer="greybox"),),
    proposers=(ProposerSummary("greybox", 1, 0, 1, 1, 0.5),),
    commands=("nas pareto runs/quick",),
    device_name="cpu",
)


def plain(text: str) -> str:
    """Without the room that columns get on the page."""
    assert f"{GAP} |" in text
    return text.replace(GAP, "")


def test_card_of_a_candidate() -> None:
    assert plain(candidate_note(TRIAL, VIEW)) == (
        f"""**{CANDIDATE.id}**

|  |  |
| --- | --- |
| proposed by | greybox, round 2, trial 7 |
| score | 87.1 %: mean probability of the right label (standalone after 3 epochs, validation; not final accuracy) |
| latency, predicted | 0.0312 ms ± 0.000400 ms |
| budget | keeps 0.0500 ms (worst): 80 % of it |
| precision | mixed |
| size | 47.1 k MACs, 12.8 KiB of weights |

Input 3 x 16 x 16 px

| part | blocks | kernel | expanded | channels out | SE | precision |
| --- | --- | --- | --- | --- | --- | --- |
| stem |  | 3 |  | 8, 8 px |  | fp32 |
| stage 1 | 2 | 3 / 5 | 16 / 24 | 8, 4 px | no / yes | fp32 |
| exit 1 |  |  |  | 10, 1 px |  | fp32 |
| stage 2 | 1 | 3 | 16 | 16, 2 px | no | int8 |
| head |  |  | 32 | 10, 1 px |  | fp32 |

| exit | confidence | images | right if all left here |
| --- | --- | --- | --- |
| exit 1, after stage 1 | 0.8 | 25 % | 70.0 % |
| head | the rest | 75 % | 88.0 % |"""
    )


def test_card_says_what_was_measured_and_which_students_came_of_it() -> None:
    unset = CANDIDATE.with_thresholds((None,)).id
    pair = PredictedMeasured(unset, "mixed", 0.04, 0.002, 0.042, 1)
    points = tuple(
        Point(
            f"p{i}",
            CANDIDATE,
            LatencyFigures(0.03 + 0.001 * i, 0.04, 0.04, 0.0001, "measured"),
            test=SplitAccuracy(0.9, 100),
            trial=7,
            is_finished=True,
            on_front=i == 3,
        )
        for i in range(6)
    )
    text = plain(candidate_note(TRIAL, replace(VIEW, predictions=(pair,), points=points, pick_id="p2")))
    assert "| latency, measured | 0.0420 ms at worst; predicted before 0.0400 ms ± 0.00200 ms |" in text
    students = text.partition("**Finished students**")[2].splitlines()[4:8]
    assert [line.split("|")[1].strip() for line in students] == ["p2, **pick**", "p3", "p0", "p1"]
    assert students[0] == "| p2, **pick** | 90.0 % (test) | 0.0320 ms ± 0.000100 ms | 0.0400 ms | measured | no |"
    assert text.endswith("and 2 more: nas pareto --all")
    tight = plain(candidate_note(TRIAL, replace(VIEW, points=points, budget_ms=0.039)))
    assert tight.count("| yes, over the budget |") == 1 and tight.count("| no, over the budget |") == 3
    other = replace(VIEW, predictions=(replace(pair, candidate_id="another"),))
    assert "latency, measured" not in candidate_note(TRIAL, other)


@pytest.mark.parametrize(
    ("excess", "line"),
    [
        (0.1, "| budget | **over** 0.0500 ms (worst): 110 % of it |"),
        (0.0, "| budget | keeps 0.0500 ms (worst): 100 % of it |"),
    ],
)
def test_card_says_whether_the_budget_is_kept(excess: float, line: str) -> None:
    assert line in plain(candidate_note(replace(TRIAL, excess=excess), VIEW))


def test_card_has_the_latency_on_each_device() -> None:
    other = replace(VIEW, device_name="cpu:2")
    text = plain(candidate_note(replace(TRIAL, latency_ms=(0.03, 0.02)), replace(VIEW, others=(other,))))
    assert "| latency on cpu:2, predicted | 0.0200 ms |" in text
    assert "keeps 0.0500 ms (worst) of one device" in text


def test_study_note_says_budget_feasibility_proposers_and_what_to_run() -> None:
    text = plain(study_note(VIEW, "2026-01-02 10:20"))
    assert text.startswith("**quick: finished**\n\n|  |  |\n| --- | --- |\n| budget | 0.0500 ms, worst latency |\n")
    assert "| space | tiny, 2.00 M candidates |" in text
    assert "does not read the constraints of Optuna 5" in text and "*Scores and the budget*" in text
    assert "| greybox | 1 | 1 | 1 | 50.0 % |" in text
    assert "\n    nas pareto runs/quick\n" in text
    assert text.endswith("A copy of 2026-01-02 10:20, read only. Start `nas dashboard` again to see later trials.")
