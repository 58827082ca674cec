"""The small figure of a study: who keeps the budget, the front of those, and its size."""

from __future__ import annotations

import json
from dataclasses import replace

from made_run import made_view

from nas.report.study_figure import MAX_BEATEN, Score, study_figure

SCORES = (
    Score(0.5, 0.1, True, "trial 0, first"),
    Score(0.8, 0.2, True, "trial 1, <b>evil</b>"),
    Score(0.7, 0.3, True, "trial 2, greybox"),
    Score(0.9, 0.15, False, "trial 3, greybox"),
)


def traces(scores: tuple[Score, ...]) -> dict[str, dict]:
    figure = json.loads(study_figure(made_view(), scores, "T").to_json())
    return {trace["name"]: trace for trace in figure["data"]}


def test_only_what_keeps_the_budget_is_on_the_front() -> None:
    found = traces(SCORES)
    assert found["front inside the budget"]["x"] == [0.1, 0.2]
    assert found["front inside the budget"]["y"] == [50.0, 80.0]
    assert found["keeps the budget"]["x"] == [0.3]
    assert found["over the budget"]["x"] == [0.15]
    assert found["front inside the budget"]["text"][1] == "trial 1, &lt;b&gt;evil&lt;/b&gt;"
    finished = next(trace for name, trace in found.items() if name.startswith("finished"))
    assert "score %{y" in found["keeps the budget"]["hovertemplate"] and "accuracy %{y" in finished["hovertemplate"]
    assert len(finished["x"]) == len(finished["error_x"]["array"]) == len(made_view().front)


def test_the_budget_is_a_line_with_its_kind() -> None:
    view = made_view()
    layout = json.loads(study_figure(view, SCORES, "T").to_json())["layout"]
    assert (layout["title"]["text"], layout["shapes"][0]["x0"]) == ("T", view.budget_ms)
    assert layout["annotations"][0]["text"] == "budget 0.500 ms (expected)"
    free = json.loads(study_figure(replace(view, budget_ms=None), SCORES, "T").to_json())["layout"]
    assert "shapes" not in free


def test_a_long_search_still_gives_a_small_figure() -> None:
    many = tuple(Score(0.5 + 1e-5 * i, 1 + 1e-4 * i**1.1, i % 3 > 0, f"trial {i}, greybox") for i in range(5_000))
    beaten = tuple(replace(s, score=0.4) for s in many)
    text = study_figure(made_view(), (*beaten, *many[1:40]), "T").to_json()
    assert len(text) < 80_000
    drawn = {trace["name"]: len(trace["x"]) for trace in json.loads(text)["data"]}
    assert drawn["keeps the budget"] <= MAX_BEATEN and drawn["over the budget"] <= MAX_BEATEN


def test_a_study_without_scores_has_a_figure() -> None:
    assert all(name.startswith("finished") for name in traces(()))
