"""Which sampler `auto` takes: by the trials that are planned, by what is known, and by what a score costs."""

from __future__ import annotations

import pytest

from nas.core.errors import ConfigError
from nas.core.units import format_ms
from nas.search.choice import GREYBOX, NSGA2, TPE, choose_sampler
from nas.search.folder import ChosenSampler
from nas.search.settings import SamplerName


def auto(trials: int, *, known: bool, score_s: float | None = None, batch: int = 12) -> str:
    return choose_sampler("auto", trials, is_latency_known=known, score_s=score_s, batch=batch)[0]


def test_where_scoring_rules_the_number_of_trials_decides() -> None:
    for score_s in (None, 30.0):
        assert auto(96, known=False, score_s=score_s) == "tpe"
        assert auto(1000, known=False, score_s=score_s) == "nsga2"
        assert auto(96, known=True, score_s=score_s) == "greybox"
        assert auto(9_000, known=True, score_s=score_s) == "greybox"
        assert auto(20_000, known=True, score_s=score_s) == "nsga2"


def test_a_score_that_costs_less_than_proposing_favours_the_sampler_that_proposes_fast() -> None:
    assert auto(64, known=False, score_s=0.2) == "tpe"
    assert auto(64, known=False, score_s=0.005) == "nsga2"
    assert auto(200, known=False, score_s=10.0) == "tpe"
    assert auto(200, known=False, score_s=0.2) == "nsga2"
    assert auto(1000, known=True, score_s=0.2, batch=1) == "greybox"
    assert auto(1000, known=True, score_s=0.001, batch=1) == "nsga2"


def test_batches_share_a_proposal_so_that_the_grey_box_pays_longer() -> None:
    assert auto(1000, known=True, score_s=0.001, batch=1) == "nsga2"
    assert auto(1000, known=True, score_s=0.001, batch=48) == "greybox"
    assert GREYBOX.ask_ms(1000, 48) < GREYBOX.ask_ms(1000, 1) / 4
    assert TPE.ask_ms(1000, 48) == TPE.ask_ms(1000, 1)  # nothing to share


def test_a_sampler_that_was_asked_for_is_taken() -> None:
    assert choose_sampler("random", 96, is_latency_known=True, score_s=1.0) == ("random", "asked for")
    assert choose_sampler("greybox", 96, is_latency_known=True)[0] == "greybox"
    with pytest.raises(ConfigError, match=r"greybox needs the latency of every candidate.*--set search.sampler=auto"):
        choose_sampler("greybox", 96, is_latency_known=False)


def test_the_reason_has_the_figures_that_decided() -> None:
    _, reason = choose_sampler("auto", 100, is_latency_known=True, score_s=0.2, batch=12)
    greybox, nsga2 = (s.worth_at(100) / (200 + s.ask_ms(100, 12)) for s in (GREYBOX, NSGA2))
    assert "latency is known before training, so only accuracy is modelled" in reason
    assert f"of 100 trials each is worth {greybox / nsga2:.2g} with greybox, " in reason
    assert ", 1 with nsga2" in reason and "(trials of NSGA-II in the same time)" in reason
    assert "a candidate takes about 200 ms of scoring, and of proposing " in reason
    assert f"{format_ms(GREYBOX.ask_ms(100, 12))} with greybox" in reason
    assert "larger batches" not in reason
    _, unknown = choose_sampler("auto", 100, is_latency_known=False)
    assert unknown.startswith("greybox would need the latency of every candidate; ")
    assert "with greybox" not in unknown and "proposing" not in unknown


def test_larger_batches_are_named_where_proposing_takes_much_of_the_time() -> None:
    _, reason = choose_sampler("auto", 1000, is_latency_known=True, score_s=0.05, batch=1)
    assert reason.endswith("; larger batches share that: --set search.batch=4")


def test_worth_is_level_beyond_what_was_measured() -> None:
    assert GREYBOX.worth_at(1) == GREYBOX.worth_at(1_000) == GREYBOX.worth[0][1]
    assert GREYBOX.worth_at(10**6) == 1.0
    assert TPE.worth_at(173) == pytest.approx(1.05, abs=0.01)  # halfway between 100 and 300 in the logarithm


def test_a_run_goes_on_with_its_sampler_where_that_can_work() -> None:
    def chosen(kept: str, name: SamplerName = "auto", *, known: bool = True, energy: bool = False) -> str:
        given = ChosenSampler(kept, "because")
        # so few trials that dear scores are worth the grey-box sampler, and cheap ones TPE
        return choose_sampler(name, 100, is_latency_known=known, with_energy=energy, score_s=0.1, kept=given)[0]

    fresh = choose_sampler("auto", 100, is_latency_known=False, score_s=0.1)[0]
    assert fresh != "tpe"
    assert chosen("greybox") == "greybox"
    assert chosen("tpe") == chosen("tpe", known=False) == chosen("tpe", energy=True) == "tpe"
    assert chosen("greybox", known=False) == chosen("greybox", energy=True) == fresh
    assert chosen("tpe", "nsga2") == "nsga2"
    _, reason = choose_sampler("auto", 100, is_latency_known=True, kept=ChosenSampler("tpe", "because"))
    assert reason == "chosen when the run began: because"
