"""Cards of students: the drawing follows the walk, and the words say what the figures mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_run import made_candidate, made_view

from nas.core.run import FinishStep, SplitAccuracy, TeacherView
from nas.core.walk import expand
from nas.report.cards import card, compared_with_teacher, confidence_of, diagram, interval, rule_of


def test_diagram_holds_every_layer_once_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        candidate = made_candidate(rng)
        parts = diagram(candidate)
        boxes = [b for part in parts for b in part.get("blocks", [])]
        exits = [part for part in parts if part["kind"] == "exit"]
        layers = expand(candidate)
        assert len(boxes) == sum(1 for la in layers if la.kind != "exit_head")
        assert [part["exit"] for part in exits] == list(range(len(candidate.exits)))
        assert sum(b["share"] for b in boxes) <= 1.001
        stages = [part for part in parts if part["kind"] == "stage"]
        assert [len(part["blocks"]) for part in stages] == [len(s.blocks) for s in candidate.stages]
        for k, place in enumerate(candidate.exits):
            before = parts[parts.index(exits[k]) - 1]
            assert before["stage"] == place.after_stage


def test_blocks_show_kernel_expansion_and_badges() -> None:
    candidate = made_candidate(np.random.default_rng(1))
    (block, *_), part = candidate.stages[1].blocks, next(p for p in diagram(candidate) if p.get("stage") == 1)
    box = part["blocks"][0]
    assert box["text"] == f"{block.kernel_size}x{block.kernel_size}  e{block.expanded_channels}"
    assert ("/2" in box["badges"], "SE" in box["badges"]) == (block.stride == 2, block.use_se)
    assert f"{block.in_channels} -> {block.expanded_channels} -> {block.out_channels}" in box["title"]


def test_card_names_exits_with_rule_share_and_accuracy() -> None:
    view = made_view()
    point = next(p for p in view.points if len(p.candidate.exits) == 2)
    rows = card(view, point)["exits"]
    assert [r["name"] for r in rows] == ["Exit 1", "Exit 2", "Head"]
    assert [r["share"] for r in rows] == list(point.exit_shares)
    assert rows[0]["rule"] == f"confidence at least {point.thresholds[0]:.3f}"
    assert rows[2]["top1"] == f"{100 * point.accuracy.exit_top1[2]:.1f} %"


def test_card_of_a_student_without_exit_figures_leaves_them_unknown() -> None:
    view = made_view()
    point = next(p for p in view.points if p.candidate.exits)
    bare = replace(point, exit_shares=(), exit_ms=(), test=None, val=SplitAccuracy(0.9, 100))
    rows = card(view, bare)["exits"]
    assert all(r["share"] is None and r["latency"] is None and r["top1"] is None for r in rows)


@pytest.mark.parametrize(
    ("threshold", "rule", "short"),
    [
        (None, "threshold not set", "not set"),
        (0.0, "every image leaves here", "any"),
        (2.0, "no image leaves here", "never"),
        (0.85, "confidence at least 0.850", "\u2265 0.850"),
    ],
)
def test_thresholds_are_told_in_words(threshold: float | None, rule: str, short: str) -> None:
    assert (rule_of(threshold), confidence_of(threshold)) == (rule, short)


def test_interval_of_an_accuracy_is_that_of_wilson() -> None:
    low, high = interval(SplitAccuracy(0.9, 100))  # Wilson 1927, n = 100, 90 right: 0.8256 to 0.9448
    assert [low, high] == pytest.approx([0.8256, 0.9448], abs=1e-4)
    assert interval(SplitAccuracy(1.0, 10))[1] == 1.0


def test_comparison_needs_the_same_split() -> None:
    point = made_view().points[0]
    latency = point.latency.expected_ms
    same = TeacherView("t", point.top1, "test", 4 * latency)
    assert compared_with_teacher(point, same) == "100.0 % of the teacher's accuracy at 1/4.0 of its latency"
    assert compared_with_teacher(point, replace(same, latency_ms=latency / 20)).endswith("at 20 times its latency")
    assert compared_with_teacher(point, replace(same, split="val")) == ""
    assert compared_with_teacher(point, None) == ""
    assert compared_with_teacher(point, replace(same, latency_ms=None)) == "100.0 % of the teacher's accuracy"


def test_card_says_what_proposed_the_candidate_and_when() -> None:
    view = made_view()
    point = replace(view.points[0], trial=view.trials[5].number, round=1)
    (fact,) = (f for f in card(view, point)["facts"] if f["name"] == "Trial")
    assert (fact["value"], fact["detail"]) == ("5", "found in round 1, proposed by greybox")
    (fact,) = (f for f in card(replace(view, trials=()), point)["facts"] if f["name"] == "Trial")
    assert fact["detail"] == "found in round 1"


def test_card_tells_what_a_finalist_went_through() -> None:
    view = made_view()
    steps = (FinishStep("distil", 13, 0.931, 20.0), FinishStep("QAT", 2, 0.93, 8.0, "kept", "int8"))
    (fact,) = (f for f in card(view, replace(view.points[0], steps=steps))["facts"] if f["name"] == "Steps")
    assert fact["value"] == "distil, QAT"
    assert fact["detail"].startswith("distil: 13 epochs, 93.1 %, 20")
    assert "; QAT: 2 epochs, 93.0 %, 8" in fact["detail"] and ", kept (accuracies on" in fact["detail"]
    assert not [f for f in card(view, view.points[0])["facts"] if f["name"] == "Steps"]
