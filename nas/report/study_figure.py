"""The scores of a search beside its budget as a small Plotly figure: for a dashboard that does not know the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nas.core.run import RunView
from nas.latency.pareto import non_dominated
from nas.report.tables import LATENCY_NAMES, format_number

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_BEATEN = 600  # scores beside the front that are drawn: with them the figure stays below 40 kB


@dataclass(frozen=True, slots=True)
class Score:
    """A scored candidate: its score (ratio), latency in ms, whether it keeps the budget, and what a reader sees."""

    score: float
    latency_ms: float
    keeps_budget: bool
    text: str


def study_figure(view: RunView, scores: Sequence[Score], title: str) -> go.Figure:
    """Scores inside and over the budget, the front of those inside, and finished students of the front.

    Args:
        view: the run on its first device.
        scores: all of them; of those that others beat at most `MAX_BEATEN` are drawn.
        title: of the figure.
    """
    import plotly.graph_objects as go

    inside = [s for s in scores if s.keeps_budget]
    on = non_dominated([(s.score, s.latency_ms) for s in inside], (True, False)).tolist()
    front = sorted((s for s, is_on in zip(inside, on, strict=True) if is_on), key=lambda s: s.latency_ms)
    beaten = _thinned([s for s, is_on in zip(inside, on, strict=True) if not is_on])
    over = _thinned([s for s in scores if not s.keeps_budget])
    traces = [
        _markers("keeps the budget", beaten, {"size": 6, "color": "#7f8c9b"}),
        _markers("over the budget", over, {"size": 7, "color": "#c0392b", "symbol": "x-thin", "line": {"width": 2}}),
        {
            **_markers("front inside the budget", front, {"size": 8, "color": "#1f6fb2"}),
            "mode": "lines+markers",
            "line": {"shape": "hv", "width": 1.5},
        },
    ]
    students = [p for p in view.front if p.is_finished]
    if students:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"finished, on the front ({'/'.join(sorted({p.split for p in students}))})",
                "x": [_rounded(p.latency.expected_ms) for p in students],
                "y": [_rounded(100 * p.top1) for p in students],
                "error_x": {"type": "data", "array": [_rounded(p.latency.std_ms) for p in students], "width": 3},
                "text": [escape(f"trial {p.trial}, {p.latency.provenance}") for p in students],
                "marker": {"size": 11, "color": "#1e8449", "symbol": "diamond"},
                "hovertemplate": "%{text}<br>accuracy %{y:.1f} %<br>%{x:.3g} ms<extra></extra>",
            }
        )
    layout: dict[str, Any] = {
        "title": {"text": title},
        "xaxis": {"title": {"text": "latency_ms: expected under the exits taken"}, "gridcolor": "#e5e8eb"},
        "yaxis": {"title": {"text": "score, % (of finished students: accuracy)"}, "gridcolor": "#e5e8eb"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"color": "#24292f"},
        "legend": {"orientation": "h", "y": -0.2},
        "hovermode": "closest",
        "template": {},  # Plotly's own takes 7 kB of every figure
    }
    if view.budget_ms is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "yref": "paper",
                "x0": view.budget_ms,
                "x1": view.budget_ms,
                "y0": 0,
                "y1": 1,
                "line": {"color": "#b9770e", "width": 2, "dash": "dash"},
            }
        ]
        layout["annotations"] = [
            {
                "x": view.budget_ms,
                "y": 1,
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "text": f"budget {format_number(view.budget_ms)} ms ({LATENCY_NAMES[view.budget_of]})",
                "font": {"color": "#b9770e"},
            }
        ]
    return go.Figure({"data": [t for t in traces if t["x"]], "layout": layout})


def _markers(name: str, scores: Sequence[Score], marker: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [_rounded(s.latency_ms) for s in scores],
        "y": [_rounded(100 * s.score) for s in scores],
        "text": [escape(s.text) for s in scores],
        "marker": marker,
        "hovertemplate": "%{text}<br>score %{y:.1f} %<br>%{x:.3g} ms<extra></extra>",
    }


def _thinned(scores: Sequence[Score]) -> Sequence[Score]:
    """At most `MAX_BEATEN`, evenly over the order of the trials."""
    step = -(-len(scores) // MAX_BEATEN) or 1
    return scores[::step]


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
