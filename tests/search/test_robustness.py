"""The table of accuracies on corrupted images of a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.core.errors import ConfigError
from nas.data.corruptions import CORRUPTIONS
from nas.report.html import render_page
from nas.search.robustness import representatives
from nas.search.settings import FinishSettings
from nas.search.view import load_outcome, load_view


def test_each_finished_student_is_judged_as_deployed_with_the_pick_first(finished: Path) -> None:
    outcome, view = load_outcome(finished / "run"), load_view(finished / "run")
    rows = view.robustness
    assert [row.student for row in rows] == [p.id for p in representatives(outcome)]
    assert len(rows) == len({source.student.candidate.arch_id for source in outcome.sources.values()})
    assert outcome.pick_id is None or rows[0].student == outcome.pick_id
    for row in rows:
        assert row.severities == (1, 5)
        assert tuple(row.top1) == CORRUPTIONS
        point = view.point(row.student)
        assert point.test is not None
        assert row.clean == pytest.approx(point.test.top1, abs=0.04)  # one image of 30: the deployed file rounds
    assert list((finished / "run" / "students").glob("*/robustness-*.json"))
    page = render_page(view)
    assert "test images that were changed as a camera may change them, at severities 1 / 5 of 5" in page


def test_severities_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"finish\.robustness: rising severities from 1 to 5"):
        FinishSettings(robustness=(3, 6))
    with pytest.raises(ConfigError, match=r"finish\.robustness"):
        FinishSettings(robustness=(3, 1))
