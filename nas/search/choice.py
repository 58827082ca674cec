"""Which sampler a search takes: what a trial of each is worth, and what it costs beside the scoring of a candidate.

A sampler is worth as many trials of NSGA-II as reach what one of its own reaches, and costs the time in which it
proposes. `auto` takes the one that is worth the most in the same time:

    worth(sampler, planned trials) / (milliseconds of scoring + milliseconds of proposing), for each candidate

An expensive score favours the sampler that needs the fewest of them, a score of some milliseconds the one that
proposes fast. What was measured for this, and on what, is in docs/search.md. Optuna's default, univariate TPE, is not
among them: it loses to random search on such spaces and proposes the slowest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nas.core.errors import ConfigError
from nas.core.units import format_ms
from nas.search.folder import ChosenSampler
from nas.search.settings import SamplerName

Curve = tuple[tuple[float, float], ...]  # pairs (trials, value), trials rising

MEAN_STEPS = 16  # places of a search at which its cost is looked at
NOTABLE_SHARE = 0.25  # of the time spent proposing from which on larger batches are worth a word


@dataclass(frozen=True, slots=True)
class Sampler:
    """What is known of one sampler.

    Attributes:
        worth: trials of NSGA-II inside the budget that one trial replaces, by planned trials.
        once_ms: CPU milliseconds of proposing one batch, by trials in the study, without those of its candidates.
        each_ms: CPU milliseconds that each candidate of a batch adds.
    """

    worth: Curve
    once_ms: Curve
    each_ms: Curve

    def worth_at(self, trials: int) -> float:
        """Trials of NSGA-II that one of so many replaces."""
        return _at(self.worth, trials)

    def ask_ms(self, trials: int, batch: int) -> float:
        """Milliseconds of proposing a candidate, mean over a search of so many trials in batches of this size."""
        places = [trials * (i + 0.5) / MEAN_STEPS for i in range(MEAN_STEPS)]
        return sum(_at(self.once_ms, n) / batch + _at(self.each_ms, n) for n in places) / MEAN_STEPS


# Costs of this and of NSGA-II: `python -m benchmarks.proposal_cost`, tiny-32, experiments/2026-11-30_proposal_cost.
# With fewer than 150 trainings the grey box looks at more candidates, so 100 cost more than 300.
# Worth of the grey box: NSGA-II needed 772 and 1,373 trials for what it reached in 100 on two problems
# (experiments/2026-11-21_figures), and more than 10,000 for 1,000; at 10,000 hardly anything is left to gain.
GREYBOX = Sampler(
    ((1_000, 8.0), (10_000, 1.0)),
    ((30, 45.0), (100, 72.0), (300, 44.0), (1_000, 90.0), (3_000, 114.0)),
    ((30, 11.0), (100, 7.8), (300, 8.8), (1_000, 11.0), (3_000, 21.0)),
)
# Multivariate TPE, told what is over the budget: 1.2 to 2.0 at 25 trials, 0.9 to 2.0 at 50, 0.7 to 1.8 at 100 on four
# problems (here their means), as good as NSGA-II at 300 and behind at 1,000 on the one that went so far.
# Cost: mean over 100 trainings in a large space, where it is taken; in a small one most of its proposals were seen.
TPE = Sampler(
    ((25, 1.5), (50, 1.4), (100, 1.1), (300, 1.0), (1_000, 0.65)),
    ((1, 0.0),),
    ((100, 25.0), (1_000, 40.0)),
)
NSGA2 = Sampler(((1, 1.0),), ((1, 0.0),), ((30, 3.5), (100, 2.7), (300, 2.9), (1_000, 3.8), (3_000, 5.8)))


def _at(curve: Curve, trials: float) -> float:
    """Value at a number of trials, linear in its logarithm; level beyond both ends."""
    return float(np.interp(math.log(trials), [math.log(t) for t, _ in curve], [v for _, v in curve]))


def choose_sampler(
    name: SamplerName,
    trials: int,
    *,
    is_latency_known: bool,
    with_energy: bool = False,
    score_s: float | None = None,
    batch: int = 1,
    kept: ChosenSampler | None = None,
) -> tuple[str, str]:
    """The sampler that `auto` stands for, and the reason in words.

    What a score costs depends on the cores of a machine. A run that goes on elsewhere must not take another sampler for
    that, so it goes on with the one that was kept, unless that is the grey-box sampler and can do so no longer.

    Args:
        name: as set.
        trials: planned.
        is_latency_known: whether every candidate's latency is known, and not only those whose rows were measured.
        with_energy: whether energy is an objective, which the grey-box sampler does not know.
        score_s: expected seconds of wall time in which one candidate is scored, all workers busy; None: so many that
            proposing does not count.
        batch: candidates that are proposed together.
        kept: what was chosen at the first call of the run.

    Raises:
        ConfigError: the grey-box sampler was asked for, and latencies are not known, or energy is an objective.
    """
    if name == "greybox" and with_energy:
        raise ConfigError(
            "search.sampler: greybox searches by accuracy and latency only, and search.energy is set. Take another "
            "sampler (--set search.sampler=auto), or leave energy to the report (--set search.energy=false)"
        )
    if name == "greybox" and not is_latency_known:
        raise ConfigError(
            "search.sampler: greybox needs the latency of every candidate, and the rows of this space are measured "
            "only as candidates need them. Measure a part and interpolate the others (--set feedback.max_rows=600), or "
            "take another sampler (--set search.sampler=auto)"
        )
    if name != "auto":
        return name, "asked for"
    samplers = {"nsga2": NSGA2, "tpe": TPE} | ({"greybox": GREYBOX} if is_latency_known and not with_energy else {})
    if kept is not None and kept.sampler in samplers:
        return kept.sampler, f"chosen when the run began: {kept.reason}"
    ask_ms = {key: sampler.ask_ms(trials, batch) for key, sampler in samplers.items()}
    cost_ms = {key: 1.0 if score_s is None else 1000 * score_s + ask_ms[key] for key in samplers}
    value = {key: sampler.worth_at(trials) / cost_ms[key] for key, sampler in samplers.items()}
    worth = {key: v / value["nsga2"] for key, v in value.items()}
    chosen = max(worth, key=lambda key: worth[key])  # of equals NSGA-II, which comes first and proposes fastest
    return chosen, _reason(chosen, worth, ask_ms, trials, score_s, batch, with_energy)


def _reason(
    chosen: str,
    worth: dict[str, float],
    ask_ms: dict[str, float],
    trials: int,
    score_s: float | None,
    batch: int,
    with_energy: bool,
) -> str:
    """Why this one, in figures; `worth` is in trials of NSGA-II in the same time, `ask_ms` of each candidate."""
    parts = []
    if chosen == "greybox":
        parts.append("latency is known before training, so only accuracy is modelled")
    elif "greybox" not in worth:
        parts.append(
            "greybox does not know energy" if with_energy else "greybox would need the latency of every candidate"
        )
    order = sorted(worth, key=lambda key: -worth[key])
    parts.append(
        f"of {trials} trials each is worth "
        + ", ".join(f"{worth[key]:.2g} with {key}" for key in order)
        + (" (trials of NSGA-II)" if score_s is None else " (trials of NSGA-II in the same time)")
    )
    if score_s is not None:
        parts.append(
            f"a candidate takes about {format_ms(1000 * score_s)} of scoring, and of proposing "
            + ", ".join(f"{format_ms(ask_ms[key])} with {key}" for key in order)
        )
        share = ask_ms[chosen] / (ask_ms[chosen] + 1000 * score_s)
        if chosen == "greybox" and share > NOTABLE_SHARE:
            parts.append(f"larger batches share that: --set search.batch={4 * batch}")
    return "; ".join(parts)
