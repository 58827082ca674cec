"""The report's charts as Plotly figures in plain JSON types.

Colours are names such as `@accent`: the page puts in the colours of its light or dark style. Names that users chose go
through `html.escape`, because Plotly reads a small HTML in hover texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from nas.core.run import Importance, Point, PredictedMeasured, RoundSummary, RunView, TrialPoint
from nas.core.units import format_bytes, format_ms
from nas.latency.pareto import hypervolume_growth
from nas.report.tables import LATENCY_NAMES, budget_latency_ms, format_number, format_spread, name_of

Figure = dict[str, Any]

LOG_FROM_RATIO = 6.0  # a latency axis whose ends are further apart than this is logarithmic
MAX_GENES = 16
MAX_CURVE_POINTS = 120


def figures(view: RunView) -> dict[str, Figure]:
    """All charts that the run has data for, by the name of their place on the page."""
    made = {
        "front": front_figure(view),
        "estimate": estimate_figure(view.predictions),
        "curves": curves_figure(view),
        "hypervolume": hypervolume_figure(view.trials, view.rounds, view.budget_ms),
        "importance": importance_figure(view.importances),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def front_figure(view: RunView) -> Figure | None:
    """Accuracy over latency: trials faint, students solid where measured, hollow where predicted, budget as a line."""
    if not view.points and not view.trials:
        return None
    traces: list[dict[str, Any]] = []
    if view.trials:
        traces.append(_trials_trace(view.trials))
    front = view.front
    if front:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Front",
                "x": [budget_latency_ms(view, p) for p in front],
                "y": [100 * p.top1 for p in front],
                "line": {"color": "@accent", "width": 1.5, "shape": "hv"},
                "opacity": 0.55,
                "hoverinfo": "skip",
            }
        )
    for on_front, provenance in ((False, "predicted"), (False, "measured"), (True, "predicted"), (True, "measured")):
        points = [p for p in view.points if p.on_front == on_front and p.latency.provenance == provenance]
        if points:
            traces.append(_points_trace(view, points, on_front, provenance == "measured"))
    picks = {view.pick_id, *(pick.student for pick in view.also)}
    traces.append(_ring("Pick", view, [p for p in view.points if p.id in picks], "@pick", 22))
    traces.append({**_ring("Selected", view, [], "@ink", 30), "meta": "selected"})
    xs = [budget_latency_ms(view, p) for p in view.points] + [t.latency_ms for t in view.trials]
    ys = [100 * p.top1 for p in view.points] or [100 * t.score for t in view.trials]
    teacher = view.teacher
    if teacher is not None and teacher.latency_ms is not None:
        xs.append(teacher.latency_ms)
        ys.append(100 * teacher.top1)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "Teacher",
                "x": [teacher.latency_ms],
                "y": [100 * teacher.top1],
                "marker": {"symbol": "diamond", "size": 12, "color": "@teacher"},
                "text": f"<b>{escape(teacher.name)}</b> (teacher)<br>{100 * teacher.top1:.1f} % ({teacher.split})"
                f"<br>{format_ms(teacher.latency_ms)}",
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    if view.budget_ms is not None:
        xs.append(view.budget_ms)
    layout = _layout(_latency_axis(f"{LATENCY_NAMES[view.budget_of].capitalize()} latency, ms", xs), _top1_axis(ys))
    if not view.points:
        layout["yaxis"]["title"] = {"text": "Score, %"}
    if view.trials:
        everything = [*ys, *(100 * t.score for t in view.trials)]
        layout["meta"] = {"range_with_trials": [min(everything) - 2.0, layout["yaxis"]["range"][1]]}
    layout["showlegend"] = False  # the page has a key of its own, which also explains hollow and solid
    if view.budget_ms is not None:
        layout |= _budget_line(view.budget_ms, layout["xaxis"]["type"] == "log")
    return {"data": traces, "layout": layout}


def _trials_trace(trials: Sequence[TrialPoint]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "Scored in the search",
        "meta": "trials",
        "x": [_rounded(t.latency_ms) for t in trials],
        "y": [_rounded(100 * t.score) for t in trials],
        "text": [
            f"trial {t.number}, {t.epochs} epochs"
            f"{', ' + escape(t.precision) if t.precision else ''}{', by ' + escape(t.proposer) if t.proposer else ''}"
            for t in trials
        ],
        "marker": {"size": 5, "color": "@trial", "opacity": 0.6},
        "hovertemplate": "%{text}<br>score %{y:.1f} % (validation)<br>%{x:.3g} ms<extra></extra>",
    }


def _points_trace(view: RunView, points: Sequence[Point], on_front: bool, is_measured: bool) -> dict[str, Any]:
    colour = "@accent" if on_front else "@off-front"
    where = "On the front" if on_front else "Beside the front"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{where}, {'measured' if is_measured else 'predicted'}",
        "x": [budget_latency_ms(view, p) for p in points],
        "y": [100 * p.top1 for p in points],
        "customdata": [p.id for p in points],
        "text": [_hover(p) for p in points],
        "error_x": {
            "type": "data",
            "array": [p.latency.std_ms for p in points],
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        "marker": {
            "size": 12 if on_front else 9,
            "color": colour if is_measured else "@panel",
            "line": {"color": colour, "width": 2},
        },
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(point: Point) -> str:
    latency = point.latency
    size = format_bytes(point.weight_bytes if point.model_bytes is None else point.model_bytes)
    exits = len(point.candidate.exits)
    return (
        f"<b>{escape(name_of(point))}</b><br>{100 * point.top1:.1f} % ({point.split}, {point.accuracy.images} images)"
        f"<br>expected {format_ms(latency.expected_ms)}, worst {format_ms(latency.worst_ms)}"
        f"<br>{latency.provenance}, ± {format_spread(latency.expected_ms, latency.std_ms)} ms"
        f"<br>{point.candidate.precision_text}, {exits} early exit{'' if exits == 1 else 's'}, {size}"
    )


def _ring(name: str, view: RunView, points: Sequence[Point], colour: str, size: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [budget_latency_ms(view, p) for p in points],
        "y": [100 * p.top1 for p in points],
        "marker": {"symbol": "circle-open", "size": size, "color": colour, "line": {"width": 2.5}},
        "hoverinfo": "skip",
    }


def _budget_line(budget_ms: float, is_log: bool) -> Figure:
    return {
        "shapes": [
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "x0": budget_ms,
                "x1": budget_ms,
                "y0": 0,
                "y1": 1,
                "line": {"color": "@budget", "width": 2, "dash": "dash"},
            }
        ],
        "annotations": [
            {
                "xref": "x",
                "yref": "paper",
                "x": math.log10(budget_ms) if is_log else budget_ms,
                "y": 0,
                "xanchor": "left",
                "yanchor": "bottom",
                "xshift": 5,
                "showarrow": False,
                "text": f"budget {format_number(budget_ms)} ms",
                "font": {"color": "@budget"},
            }
        ],
    }


def estimate_figure(predictions: Sequence[PredictedMeasured]) -> Figure | None:
    """Predicted over measured latency of every measured network, a colour per precision, with the line of equality."""
    if not predictions:
        return None
    both = [p.measured_ms for p in predictions] + [p.predicted_ms for p in predictions]
    low, high = min(both) * 0.92, max(both) * 1.08
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [low, high],
            "y": [low, high],
            "line": {"color": "@muted", "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    names = sorted({p.precision for p in predictions})
    for i, name in enumerate(names):
        of_name = [p for p in predictions if p.precision == name]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [p.measured_ms for p in of_name],
                "y": [p.predicted_ms for p in of_name],
                "customdata": [p.candidate_id for p in of_name],
                "text": [
                    f"{escape(p.candidate_id)}<br>round {p.round}: predicted {format_ms(p.predicted_ms)} "
                    f"± {format_ms(p.std_ms)}<br>measured {format_ms(p.measured_ms)} ({100 * p.error:+.1f} %)"
                    for p in of_name
                ],
                "error_y": {
                    "type": "data",
                    "array": [p.std_ms for p in of_name],
                    "color": f"@series{i}",
                    "thickness": 1,
                    "width": 3,
                },
                "marker": {
                    "size": 8,
                    "color": f"@series{i}",
                    "symbol": ("circle", "square", "triangle-up", "x")[i % 4],
                },
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = _layout(
        _latency_axis("Measured latency, ms", [low, high]), _latency_axis("Predicted latency, ms", [low, high])
    )
    return {"data": traces, "layout": layout}


def curves_figure(view: RunView) -> Figure | None:
    """Accuracy over expected latency along the threshold settings of each student, on the validation split."""
    points = [p for p in view.points if len(p.threshold_curve) > 1]
    if not points:
        return None
    traces = []
    for p in sorted(points, key=lambda p: p.on_front):
        curve = _thinned(p.threshold_curve)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name_of(p),
                "meta": p.id,
                "x": [_rounded(x) for x, _ in curve],
                "y": [_rounded(100 * y) for _, y in curve],
                "line": {"color": "@accent" if p.on_front else "@off-front", "width": 1.5, "shape": "hv"},
                "opacity": 0.45,
                "text": f"<b>{escape(name_of(p))}</b>",
                "hovertemplate": "%{text}<br>%{y:.1f} % (validation)<br>%{x:.3g} ms expected<extra></extra>",
                "showlegend": False,
            }
        )
    tops = [100 * max(y for _, y in p.threshold_curve) for p in points]
    xs = [x for p in points for x, _ in p.threshold_curve]
    layout = _layout(_latency_axis("Expected latency, ms", xs), _top1_axis(tops, room=1.5))
    if view.budget_ms is not None and view.budget_of == "expected":
        layout |= _budget_line(view.budget_ms, layout["xaxis"]["type"] == "log")
    return {"data": traces, "layout": layout}


def hypervolume_figure(
    trials: Sequence[TrialPoint], rounds: Sequence[RoundSummary], budget_ms: float | None
) -> Figure | None:
    """Hypervolume of the scores over trials: share of the box score 0-1 by latency 0-budget that they dominate."""
    ordered = sorted(trials, key=lambda t: t.number)
    if len(ordered) > 1:
        limit = budget_ms if budget_ms is not None else max(t.latency_ms for t in ordered)
        growth = hypervolume_growth([(t.score, t.latency_ms) for t in ordered], (0.0, limit), (True, False)) / limit
        x, y = [t.number for t in ordered], [_rounded(v) for v in growth]
    else:
        known = [(r.number, r.hypervolume) for r in rounds if r.hypervolume is not None]
        if len(known) < 2:
            return None
        x, y = [number for number, _ in known], [_rounded(value) for _, value in known]
    starts: dict[int, int] = {}
    for t in ordered:
        starts.setdefault(t.round, t.number)
    layout = _layout(
        {"title": {"text": "Trial" if len(ordered) > 1 else "Round"}, "type": "linear"},
        {"title": {"text": "Hypervolume"}, "type": "linear", "rangemode": "normal"},
    )
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": start - 0.5,
            "x1": start - 0.5,
            "y0": 0,
            "y1": 1,
            "line": {"color": "@muted", "width": 1, "dash": "dot"},
        }
        for number, start in starts.items()
        if start != ordered[0].number
    ]
    layout["annotations"] = [
        {
            "xref": "x",
            "yref": "paper",
            "x": start - 0.5,
            "y": 0,
            "xanchor": "left",
            "yanchor": "bottom",
            "xshift": 4,
            "showarrow": False,
            "text": f"round {number}",
            "font": {"color": "@muted", "size": 11},
        }
        for number, start in starts.items()
        if len(starts) > 1
    ]
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "line": {"color": "@accent", "width": 2, "shape": "hv"},
        "fill": "tozeroy",
        "fillcolor": "@accent-soft",
        "hovertemplate": ("trial" if len(ordered) > 1 else "round") + " %{x}: %{y:.4f}<extra></extra>",
        "showlegend": False,
    }
    low, high = min(y), max(y)
    pad = max(0.05 * (high - low), 1e-4)
    layout["yaxis"]["range"] = [max(0.0, low - 4 * pad), high + 2 * pad]
    return {"data": [trace], "layout": layout}


def importance_figure(importances: Sequence[Importance]) -> Figure | None:
    """Share of each gene in the spread of accuracy and of latency, the strongest on top."""
    if not importances:
        return None
    shown = sorted(importances, key=lambda i: i.accuracy + i.latency)[-MAX_GENES:]
    names = [escape(i.gene) for i in shown]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [_rounded(100 * value) for value in values],
            "marker": {"color": colour},
            "hovertemplate": "%{y}: %{x:.1f} % of the spread of " + name.lower() + "<extra></extra>",
        }
        for name, colour, values in (
            ("Latency", "@series1", [i.latency for i in shown]),
            ("Accuracy", "@series0", [i.accuracy for i in shown]),
        )
    ]
    layout = _layout(
        {"title": {"text": "Share of the spread, %"}, "type": "linear", "rangemode": "tozero"},
        {"type": "category", "automargin": True},
    )
    layout |= {"barmode": "group", "bargap": 0.3, "height": 120 + 34 * len(shown)}
    layout["legend"]["traceorder"] = "reversed"
    return {"data": traces, "layout": layout}


def _layout(xaxis: dict[str, Any], yaxis: dict[str, Any]) -> Figure:
    line = {"gridcolor": "@grid", "zeroline": False, "linecolor": "@grid", "automargin": True, "fixedrange": False}
    return {
        "xaxis": {**line, **xaxis},
        "yaxis": {**line, **yaxis},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 13},
        "margin": {"l": 8, "r": 14, "t": 30, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "hoverlabel": {"bgcolor": "@panel", "bordercolor": "@muted", "align": "left", "font": {"color": "@ink"}},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@accent"},
    }


def _latency_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A latency axis around these values; logarithmic with round ticks where they span much."""
    low, high = min(values), max(values)
    axis: dict[str, Any] = {"title": {"text": title}}
    if high / low < LOG_FROM_RATIO:
        pad = 0.06 * (high - low) or 0.1 * high
        return axis | {"type": "linear", "range": [max(0.0, low - pad), high + pad]}
    low, high = low / 1.15, high * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [tick for d in decades for m in multiples if low <= (tick := float(f"{m}e{d}")) <= high]
        if len(ticks) >= 4:
            break
    return axis | {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{t:g}" for t in ticks],
    }


def _top1_axis(percents: Sequence[float], room: float = 0.4) -> dict[str, Any]:
    """An accuracy axis that shows these values, with room below them for the better of the weaker ones."""
    low, high = min(percents), max(percents)
    span = max(high - low, 2.0)
    return {
        "title": {"text": "Top-1 accuracy, %"},
        "type": "linear",
        "range": [max(-1.0, low - room * span), min(101.0, high + 0.18 * span)],
    }


def _thinned(curve: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most some 120 points of a curve, its ends included."""
    step = max(1, math.ceil(len(curve) / MAX_CURVE_POINTS))
    return [*curve[:-1:step], curve[-1]]


def _rounded(value: float) -> float:
    """Five significant digits: more are not seen and make the page large."""
    return float(f"{value:.5g}")
