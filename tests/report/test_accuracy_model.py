"""The report says how far the model of accuracy could be trusted."""

from __future__ import annotations

import re
from dataclasses import replace

from made_run import made_view

from nas.core.run import AccuracyFit
from nas.report.html import render_page


def test_page_shows_the_errors_of_the_accuracy_model_by_round() -> None:
    view = made_view()
    rounds = (view.rounds[0], replace(view.rounds[1], model=AccuracyFit(48, 0.834, 0.0126, 0.875)), *view.rounds[2:])
    page = render_page(replace(view, rounds=rounds))
    table = page.partition("Accuracy model: each scored candidate predicted from the others")[2].partition("</table>")[
        0
    ]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table.partition("<tbody>")[2])
    assert cells == ["1", "48", "0.83", "1.3 points", "88 %"]


def test_page_of_a_run_without_model_has_no_table_of_it() -> None:
    assert "Accuracy model" not in render_page(made_view())
