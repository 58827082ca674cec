"""What each proposer contributed, on trials that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from search_examples import SPACE

from nas.core.records import LatencyFigures
from nas.core.run import Point, ProposerSummary, SplitAccuracy
from nas.search.folder import TrialRecord
from nas.search.proposers import proposer_summaries
from nas.search.view import _trial_point
from nas.space.space import space_from_plain
from nas.space.yamlio import parse_yaml


@pytest.fixture(scope="module")
def record() -> TrialRecord:
    space = space_from_plain(parse_yaml(SPACE, "space"), "space", 10)
    return TrialRecord(0, 1, space.smallest(), space.decode(space.smallest()), "complete", "a", 1.0, soft_top1=0.5)


def test_front_and_lost_hypervolume_of_each_proposer(record: TrialRecord) -> None:
    """Budget 4 ms: a reaches (0.5, 1 ms) alone, a and b both (0.8, 2 ms), c only what others beat."""
    records = [
        record,
        replace(record, number=1, top1=0.1, soft_top1=0.8, latency_ms=2.0),
        replace(record, number=2, soft_top1=0.8, latency_ms=2.0, proposer="b"),
        replace(record, number=3, soft_top1=0.7, latency_ms=3.0, proposer="c"),
        replace(record, number=4, soft_top1=1.0, latency_ms=0.5, proposer="c", state="stopped"),  # a score cut short
        replace(record, number=5, soft_top1=None, latency_ms=1.0, proposer="c", state="failed"),
    ]
    latency = LatencyFigures(1.0, 1.0, 1.0, 0.1, "measured")
    student = Point("p", record.candidate, latency, val=SplitAccuracy(0.9, 10), trial=1, on_front=True)
    beaten = replace(student, id="q", trial=0, on_front=False)
    found = proposer_summaries(records, [r.latency_ms for r in records], [student, beaten], 4.0)
    whole = 0.5 * 3 + 0.3 * 2
    assert found == (
        ProposerSummary("a", 2, 0, 2, 1, 1 - 0.8 * 2 / whole),
        ProposerSummary("c", 2, 1, 0, 0, 0.0),
        ProposerSummary("b", 1, 0, 1, 0, 0.0),
    )


def test_a_run_without_scores_has_no_front_and_loses_nothing(record: TrialRecord) -> None:
    assert proposer_summaries([], [], [], 4.0) == ()
    failed = replace(record, state="failed", soft_top1=None)
    assert proposer_summaries([failed], [1.0], [], 4.0) == (ProposerSummary("a", 0, 1, 0, 0, 0.0),)


def test_a_view_has_the_score_that_candidates_are_ranked_by(record: TrialRecord) -> None:
    assert _trial_point(replace(record, top1=0.9, soft_top1=0.6), None).score == 0.6
    assert _trial_point(replace(record, top1=0.9, soft_top1=None), None).score == 0.9  # of an older run
    assert _trial_point(replace(record, top1=0.1, soft_top1=-0.05), None).score == 0.0
