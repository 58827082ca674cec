"""Charts: valid for Plotly, hollow where predicted, scaled to what matters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from made_run import BUDGET_MS, made_view

from nas.core.run import PredictedMeasured, RoundSummary, RunView
from nas.latency.pareto import hypervolume
from nas.report.figures import (
    curves_figure,
    estimate_figure,
    figures,
    front_figure,
    hypervolume_figure,
    importance_figure,
)


def coloured(value: Any) -> Any:
    """The figure as the page hands it to Plotly: names of colours replaced by colours."""
    if isinstance(value, str) and value.startswith("@"):
        return "#123456"
    if isinstance(value, dict):
        return {k: coloured(v) for k, v in value.items()}
    return [coloured(v) for v in value] if isinstance(value, list) else value


def trace_of(figure: dict[str, Any] | None, name: str) -> dict[str, Any]:
    assert figure is not None
    found: dict[str, Any] = next(t for t in figure["data"] if t.get("name") == name)
    return found


def test_every_chart_is_a_valid_plotly_figure() -> None:
    import plotly.graph_objects as go

    made = figures(made_view())
    assert set(made) == {"front", "estimate", "curves", "hypervolume", "importance"}
    for figure in made.values():
        go.Figure(coloured(figure))


def test_measured_points_are_solid_and_predicted_ones_hollow() -> None:
    figure = front_figure(made_view())
    solid, hollow = trace_of(figure, "On the front, measured"), trace_of(figure, "On the front, predicted")
    assert (solid["marker"]["color"], hollow["marker"]["color"]) == ("@accent", "@panel")
    assert hollow["marker"]["line"]["color"] == "@accent"


def test_every_student_can_be_clicked() -> None:
    view = made_view()
    figure = front_figure(view)
    assert figure is not None
    clickable = [i for t in figure["data"] for i in t.get("customdata", [])]
    assert sorted(clickable) == sorted(p.id for p in view.points)


def test_budget_is_a_line_where_it_is_on_a_logarithmic_axis() -> None:
    figure = front_figure(made_view())
    assert figure is not None
    assert figure["layout"]["xaxis"]["type"] == "log"  # the teacher is far slower than the students
    assert figure["layout"]["shapes"][0]["x0"] == BUDGET_MS
    assert figure["layout"]["annotations"][0]["x"] == pytest.approx(math.log10(BUDGET_MS))


def test_front_is_drawn_over_the_latency_that_the_budget_limits() -> None:
    view = replace(made_view(), budget_of="worst")
    figure = front_figure(view)
    assert figure is not None
    assert figure["layout"]["xaxis"]["title"]["text"] == "Worst case latency, ms"
    assert trace_of(figure, "Front")["x"] == [p.latency.worst_ms for p in view.front]


def test_axis_is_linear_for_values_close_together() -> None:
    view = replace(made_view(), teacher=None, trials=())
    near = tuple(p for p in view.points if 0.2 < p.latency.expected_ms < 0.6)
    figure = front_figure(replace(view, points=near, pick_id=None, next_id=None))
    assert figure is not None
    low, high = figure["layout"]["xaxis"]["range"]
    assert figure["layout"]["xaxis"]["type"] == "linear" and 0 <= low < 0.25 and high > BUDGET_MS


def test_scores_are_there_but_do_not_stretch_the_accuracy_axis() -> None:
    view = made_view()
    figure = front_figure(view)
    assert figure is not None
    worst_student = 100 * min(p.top1 for p in view.points)
    assert figure["layout"]["yaxis"]["range"][0] > worst_student - 5
    assert figure["layout"]["meta"]["range_with_trials"][0] < 100 * min(t.score for t in view.trials)
    assert len(trace_of(figure, "Scored in the search")["x"]) == len(view.trials)


def test_hypervolume_grows_to_that_of_all_trials() -> None:
    view = made_view()
    figure = hypervolume_figure(view.trials, view.rounds, BUDGET_MS)
    assert figure is not None
    y = figure["data"][0]["y"]
    everything = (
        hypervolume([(t.score, t.latency_ms) for t in view.trials], (0.0, BUDGET_MS), (True, False)) / BUDGET_MS
    )
    assert y == sorted(y) and y[-1] == pytest.approx(everything, rel=1e-4)
    assert [a["text"] for a in figure["layout"]["annotations"]] == ["round 0", "round 1", "round 2"]


def test_hypervolume_of_rounds_is_drawn_where_no_trials_are_known() -> None:
    rounds = (RoundSummary(0, 10, hypervolume=0.3), RoundSummary(1, 10, hypervolume=0.4))
    figure = hypervolume_figure((), rounds, 1.0)
    assert figure is not None and figure["data"][0]["y"] == [0.3, 0.4]
    assert hypervolume_figure((), rounds[:1], 1.0) is None


def test_only_students_with_a_choice_have_a_threshold_curve() -> None:
    view = made_view()
    figure = curves_figure(view)
    assert figure is not None
    assert {t["meta"] for t in figure["data"]} == {p.id for p in view.points if len(p.threshold_curve) > 1}
    assert curves_figure(replace(view, points=view.points[:1], pick_id=None, next_id=None)) is None or len(
        view.points[0].threshold_curve
    )


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    view = made_view()
    point = next(p for p in view.points if p.threshold_curve)
    curve = tuple((0.1 + i * 1e-4, 0.5 + i * 1e-4) for i in range(2001))
    long = replace(view, points=(replace(point, threshold_curve=curve),), pick_id=None, next_id=None)
    figure = curves_figure(long)
    assert figure is not None
    x = figure["data"][0]["x"]
    assert len(x) <= 122 and (x[0], x[-1]) == (0.1, 0.3)


def test_names_in_hover_texts_are_escaped() -> None:
    figure = estimate_figure((PredictedMeasured("<b>x</b>", "fp32", 1.0, 0.1, 1.1),))
    assert figure is not None
    assert figure["data"][1]["text"][0].startswith("&lt;b&gt;x&lt;/b&gt;<br>")


def test_run_without_data_has_no_charts() -> None:
    assert figures(RunView(name="r", status="running", created_at="now")) == {}
    assert importance_figure(()) is None
