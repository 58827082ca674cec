"""The grey-box sampler in Optuna studies: what it proposes, what it learns from, what workers share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from nas.core.errors import BudgetError, ConfigError
from nas.latency.pareto import hypervolume
from nas.search.greybox import Effort, propose
from nas.search.greybox_sampler import GreyBoxSampler, choices_of, for_each

SPACE: dict[str, BaseDistribution] = {
    "resolution": IntDistribution(128, 224, step=32),
    **{f"depth{i}": IntDistribution(1, 4) for i in range(4)},
    **{f"kernel{i}": CategoricalDistribution((3, 5, 7)) for i in range(4)},
    "activation": CategoricalDistribution(("relu", "hswish")),
}
SMALL = Effort(start=6, random=40, draws=1024, children=80, rounds=2, parents=20)
BUDGET_MS = 6.0


def latency_ms(params: dict[str, Any]) -> float:
    blocks = sum(params[f"depth{i}"] * (0.5 + 0.05 * params[f"kernel{i}"]) for i in range(4))
    return float(blocks * (params["resolution"] / 160) ** 2 * (1.2 if params["activation"] == "hswish" else 1.0))


def top1(params: dict[str, Any]) -> float:
    size = sum(params[f"depth{i}"] * (0.6 + 0.1 * params[f"kernel{i}"] / (i + 1)) for i in range(4))
    size += params["resolution"] / 60 + (0.8 if params["activation"] == "hswish" else 0.0)
    return 0.9 - 0.5 * math.exp(-size / 6)


def sampler(seed: int = 0, **changes: Any) -> GreyBoxSampler:
    return GreyBoxSampler(
        changes.pop("space", SPACE),
        changes.pop("latency", for_each(latency_ms, SPACE)),
        changes.pop("budgets_ms", (BUDGET_MS,)),
        **{"seed": seed, "effort": SMALL, **changes},
    )


def objective(trial: optuna.Trial) -> tuple[float, float]:
    params = {
        "resolution": trial.suggest_int("resolution", 128, 224, step=32),
        **{f"depth{i}": trial.suggest_int(f"depth{i}", 1, 4) for i in range(4)},
        **{f"kernel{i}": trial.suggest_categorical(f"kernel{i}", (3, 5, 7)) for i in range(4)},
        "activation": trial.suggest_categorical("activation", ("relu", "hswish")),
    }
    return top1(params), latency_ms(params)


def study_of(seed: int = 0, directions: tuple[str, ...] = ("maximize", "minimize"), **changes: Any) -> optuna.Study:
    return optuna.create_study(directions=list(directions), sampler=sampler(seed, **changes))


def run(study: optuna.Study, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        trial = study.ask(SPACE)
        found.append(trial.params)
        study.tell(trial, (top1(trial.params), latency_ms(trial.params)))
    return found


def distinct(params: list[dict[str, Any]]) -> int:
    return len({tuple(p.items()) for p in params})


def test_optimize_trains_distinct_networks_within_the_budget() -> None:
    study = study_of()
    study.optimize(objective, n_trials=14)
    assert all(t.values[1] <= BUDGET_MS for t in study.trials)
    assert distinct([t.params for t in study.trials]) == 14


def test_ask_and_tell_and_optimize_propose_the_same() -> None:
    first, second = study_of(), study_of()
    first.optimize(objective, n_trials=9)
    assert [t.params for t in first.trials] == run(second, 9)


def test_the_same_seed_repeats_and_another_one_does_not() -> None:
    assert run(study_of(1), 8) == run(study_of(1), 8) != run(study_of(2), 8)


def test_a_sampler_that_comes_in_later_proposes_what_the_first_would_have() -> None:
    whole, part = study_of(), study_of()
    expected = run(whole, 12)
    run(part, 7)
    part.sampler = sampler()
    assert run(part, 5) == expected[7:]


def test_minimised_errors_lead_to_the_same_networks_as_maximised_accuracy() -> None:
    up = study_of()
    down = study_of(directions=("minimize", "minimize"), accuracy=1)
    for _ in range(9):
        a, b = up.ask(SPACE), down.ask(SPACE)
        assert a.params == b.params
        up.tell(a, (top1(a.params), latency_ms(a.params)))
        down.tell(b, (latency_ms(b.params), -top1(b.params)))


def test_one_objective_is_enough() -> None:
    study = optuna.create_study(direction="maximize", sampler=sampler())
    study.optimize(lambda trial: objective(trial)[0], n_trials=9)
    assert all(latency_ms(t.params) <= BUDGET_MS for t in study.trials)


def test_running_and_queued_trials_are_not_proposed_again() -> None:
    study = study_of()
    run(study, 8)
    asked = [study.ask(SPACE) for _ in range(4)]
    assert distinct([t.params for t in study.trials]) == 12
    study.enqueue_trial(asked[0].params)
    waiting = study.ask(SPACE)
    assert waiting.params == asked[0].params


def test_a_batch_is_proposed_together_until_a_result_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(batch=4)
    run(study, 14)
    counts: list[int] = []

    def counted(*args: Any, **given: Any) -> Any:
        counts.append(given["count"])
        return propose(*args, **given)

    monkeypatch.setattr("nas.search.greybox_sampler.propose", counted)
    asked = [study.ask(SPACE) for _ in range(6)]
    assert counts == [4, 4]
    assert distinct([t.params for t in study.trials]) == 20
    assert all(latency_ms(t.params) <= BUDGET_MS for t in asked)
    study.tell(asked[0], (top1(asked[0].params), latency_ms(asked[0].params)))
    study.ask(SPACE)
    assert counts == [4, 4, 4]


def test_a_worker_sees_a_proposal_before_its_parameters_are_stored() -> None:
    study = study_of()
    run(study, 8)
    first = study.ask()
    shown = first.suggest_int("resolution", 128, 224, step=32)  # the other parameters are not stored yet
    second = study.ask(SPACE)
    rest = {name: first._suggest(name, distribution) for name, distribution in SPACE.items()}
    assert rest["resolution"] == shown
    assert second.params != rest


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL])
def test_pruned_and_failed_networks_teach_nothing_and_are_not_repeated(state: TrialState) -> None:
    study = study_of()
    run(study, 8)
    stopped = []
    for _ in range(4):
        trial = study.ask(SPACE)
        stopped.append(trial.params)
        study.tell(trial, state=state)
    assert distinct([t.params for t in study.trials]) == 12
    run(study, 2)
    assert distinct([t.params for t in study.trials]) == 14


def test_a_trial_that_breaks_a_constraint_does_not_shade_its_neighbours() -> None:
    free, bound = study_of(), study_of()
    for study, excess in ((free, 1.0), (bound, -1.0)):
        for _ in range(10):
            trial = study.ask(SPACE)
            trial.set_constraint("memory", excess if trial.number == 9 else -1.0)
            study.tell(trial, (top1(trial.params) + 0.1 * (trial.number == 9), latency_ms(trial.params)))
    assert free.ask(SPACE).params != bound.ask(SPACE).params


def test_the_open_parameters_of_a_queued_trial_are_filled_within_the_budget() -> None:
    study = study_of()
    run(study, 8)
    study.enqueue_trial({"resolution": 192, "activation": "hswish"})
    trial = study.ask(SPACE)
    assert trial.params["resolution"] == 192 and trial.params["activation"] == "hswish"
    assert latency_ms(trial.params) <= BUDGET_MS


def test_trials_of_other_samplers_and_imported_ones_teach() -> None:
    study = study_of()
    random = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(0))
    random.optimize(objective, n_trials=10)
    study.add_trials(random.trials)
    trial = study.ask(SPACE)
    assert latency_ms(trial.params) <= BUDGET_MS
    assert trial.params not in [t.params for t in random.trials]


def test_a_parameter_beside_the_space_is_drawn_at_random() -> None:
    study = study_of()
    values = []
    for _ in range(3):
        trial = study.ask(SPACE)
        values.append(trial.suggest_float("rate", 0.0, 1.0))
        study.tell(trial, (top1(trial.params), latency_ms(trial.params)))
    assert len(set(values)) == 3


def test_inactive_parameters_come_in_canonical_form() -> None:
    def canonical(genotypes: np.ndarray) -> np.ndarray:
        result = genotypes.copy()
        result[:, 5] *= result[:, 1] > 0  # the first kernel counts from the second block on
        return result

    study = study_of(canonical=canonical)
    assert all(p["kernel0"] == 3 for p in run(study, 20) if p["depth0"] == 1)


def test_two_devices_have_a_budget_each() -> None:
    def latency(genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ms, _ = for_each(latency_ms, SPACE)(genotypes)
        both = np.column_stack([ms[:, 0], 3.0 * ms[:, 0]])
        return both, np.zeros_like(both)

    study = study_of(latency=latency, budgets_ms=(5.0, 12.0), directions=("maximize", "minimize", "minimize"))
    for _ in range(9):
        trial = study.ask(SPACE)
        assert latency_ms(trial.params) <= 5.0
        study.tell(trial, (top1(trial.params), latency_ms(trial.params), 3 * latency_ms(trial.params)))


def test_an_exhausted_budget_is_an_error_that_says_so() -> None:
    study = study_of(budgets_ms=(0.1,))
    with pytest.raises(BudgetError, match=r"no network is left within 0\.1 ms"):
        study.ask(SPACE)


def test_a_continuous_parameter_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"search_space: rate: .*with a step"):
        sampler(space={"rate": FloatDistribution(0.0, 1.0)})


def test_values_of_a_float_with_a_step_end_at_its_high() -> None:
    assert choices_of("t", FloatDistribution(0.5, 0.9, step=0.1)) == pytest.approx((0.5, 0.6, 0.7, 0.8, 0.9))


def test_an_objective_that_the_study_lacks_is_named() -> None:
    study = optuna.create_study(direction="maximize", sampler=sampler(accuracy=1))
    with pytest.raises(ConfigError, match="accuracy=1: the study has 1 objectives"):
        study.ask(SPACE)


def test_the_search_is_better_than_random_networks_within_the_budget() -> None:
    def volume(networks: list[dict[str, Any]]) -> float:
        points = [(top1(params), latency_ms(params)) for params in networks]
        return hypervolume(points, (0.6, BUDGET_MS), (True, False))

    rng = np.random.default_rng(0)
    others: list[dict[str, Any]] = []
    while len(others) < 20:
        params = {n: choices_of(n, d)[rng.integers(len(choices_of(n, d)))] for n, d in SPACE.items()}
        if latency_ms(params) <= BUDGET_MS:
            others.append(params)
    assert volume(run(study_of(), 20)) > 1.05 * volume(others)
