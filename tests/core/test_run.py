"""Run records: validation where they are made, derived values, JSON there and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nas.core.errors import RecordError
from nas.core.jsonio import from_plain, to_plain
from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, LatencyFigures, StageConfig, StemConfig
from nas.core.run import (
    DatasetView,
    FailedCandidate,
    Importance,
    PackageView,
    Point,
    PredictedMeasured,
    RoundSummary,
    RunView,
    SplitAccuracy,
    TeacherView,
    TrialPoint,
    latency_of,
)

CANDIDATE = Candidate(
    resolution=16,
    num_classes=3,
    stem=StemConfig(8),
    stages=(StageConfig((BlockConfig(8, 16, 8),)), StageConfig((BlockConfig(8, 24, 16, stride=2),))),
    head=HeadConfig(),
    exits=(ExitConfig(0, threshold=0.9),),
)
FIGURES = LatencyFigures(expected_ms=1.0, worst_ms=1.5, p99_ms=1.4, std_ms=0.05, provenance="predicted")


def point(name: str = "p1", **changes: object) -> Point:
    values: dict[str, object] = {"id": name, "candidate": CANDIDATE, "latency": FIGURES, "val": SplitAccuracy(0.9, 100)}
    return Point(**{**values, **changes})  # type: ignore[arg-type]


def full_view() -> RunView:
    tested = point(
        "p2", test=SplitAccuracy(0.88, 50, (0.7, 0.89)), exit_shares=(0.6, 0.4), exit_ms=(0.7, 1.5), on_front=True
    )
    return RunView(
        name="r",
        status="finished",
        created_at="2026-01-01T00:00:00Z",
        budget_ms=1.2,
        points=(point(on_front=True, latency=replace(FIGURES, expected_ms=2.0)), tested),
        teacher=TeacherView("resnet", 0.97, "test", 9.0),
        dataset=DatasetView("d", ("a", "b", "c"), 10, 5, 5),
        trials=(TrialPoint(0, CANDIDATE.arch_id, 0.5, 1.0),),
        failed=(FailedCandidate("x", "training", "loss is not finite"),),
        predictions=(PredictedMeasured("p2", "fp32", 1.1, 0.1, 1.0),),
        rounds=(RoundSummary(0, 1, hypervolume=0.3),),
        importances=(Importance("depth", 0.6, 0.4),),
        pick_id="p2",
        package=PackageView("pkg", "p2", True),
        provenance={"seed": "0"},
    )


def test_a_whole_view_survives_json() -> None:
    view = full_view()
    assert from_plain(RunView, to_plain(view), "view") == view


def test_test_accuracy_is_shown_where_there_is_one() -> None:
    assert (point().split, point().top1) == ("val", 0.9)
    tested = full_view().point("p2")
    assert (tested.split, tested.top1) == ("test", 0.88)


def test_front_is_sorted_by_the_latency_of_the_budget() -> None:
    assert [p.id for p in full_view().front] == ["p2", "p1"]


def test_budget_is_compared_with_the_latency_it_names() -> None:
    view = full_view()
    assert view.meets_budget(view.point("p2")) and not view.meets_budget(view.point("p1"))
    assert not replace(view, budget_of="worst").meets_budget(view.point("p2"))
    assert replace(view, budget_ms=None).meets_budget(view.point("p1"))
    assert [latency_of(FIGURES, k) for k in ("expected", "worst", "p99")] == [1.0, 1.5, 1.4]


def test_prediction_error_is_positive_where_the_estimate_was_too_slow() -> None:
    assert full_view().predictions[0].error == pytest.approx(0.1)


def test_point_without_accuracy_is_refused() -> None:
    with pytest.raises(RecordError, match="point p1: needs an accuracy"):
        point(val=None)


def test_exit_shares_must_match_the_exits_of_the_candidate() -> None:
    with pytest.raises(RecordError, match="exit_shares has 1 entries; 2 are needed"):
        point(exit_shares=(1.0,))


def test_accuracy_in_percent_is_refused() -> None:
    with pytest.raises(RecordError, match="top1 is a ratio from 0 to 1, got 90"):
        SplitAccuracy(90.0, 100)


def test_pick_that_is_no_point_is_refused_with_the_closest_name() -> None:
    with pytest.raises(RecordError, match="pick_id 'p12' is not among its points; did you mean 'p"):
        replace(full_view(), pick_id="p12")


def test_points_must_have_different_ids() -> None:
    with pytest.raises(RecordError, match="point p1 appears twice"):
        replace(full_view(), points=(point(), point()), pick_id=None)


def test_unknown_student_names_the_command_that_lists_them() -> None:
    with pytest.raises(RecordError, match="no student 'zzz'; run: nas pareto"):
        full_view().point("zzz")
