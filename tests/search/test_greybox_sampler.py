"""The grey-box sampler in Optuna studies: what it proposes, what it learns from, what workers share."""

from __future__ import annotations

import math
import pickle
import threading
import time
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from nas.core.errors import BudgetError, ConfigError
from nas.latency.pareto import hypervolume
from nas.search.greybox import Effort, propose
from nas.search.greybox_sampler import ASKING, PROPOSAL, GreyBoxSampler, choices_of, for_each

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


def test_a_table_that_is_corrected_under_a_sampler_counts_from_the_next_proposal_on() -> None:
    slower = [1.0]
    measured = for_each(latency_ms, SPACE)

    def latency(genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ms, deviation = measured(genotypes)
        return np.where(genotypes[:, 1:2] > 1, slower[0], 1.0) * ms, deviation

    study = study_of(latency=latency)
    run(study, 21)  # hyper-parameters are those of 20 until there are 30
    slower[0] = 1.5
    expected, as_before = study_of(latency=latency), study_of()
    for other in (expected, as_before):
        other.add_trials(study.trials)
    assert run(study, 1) == run(expected, 1) != run(as_before, 1)


def test_what_was_proposed_in_advance_is_proposed_anew_when_the_table_is_corrected() -> None:
    slower = [1.0]
    measured = for_each(latency_ms, SPACE)

    def latency(genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ms, deviation = measured(genotypes)
        return slower[0] * ms, deviation

    study = study_of(latency=latency, batch=8)
    run(study, 24)
    as_before = study_of(latency=latency, batch=8)
    as_before.add_trials(study.trials)
    too_slow_now = [latency_ms(as_before.ask(SPACE).params) > BUDGET_MS / 1.5 for _ in range(8)]
    assert any(too_slow_now[1:])  # else this test shows nothing
    study.ask(SPACE)
    slower[0] = 1.5
    assert all(1.5 * latency_ms(study.ask(SPACE).params) <= BUDGET_MS for _ in range(7))


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


def test_a_sampler_of_two_studies_does_not_mistake_the_networks_of_one_for_those_of_the_other() -> None:
    one, other, again = study_of(1), study_of(2), study_of(1)
    run(one, 10)
    run(other, 10)
    again.add_trials(other.trials)
    other.sampler = one.sampler
    assert run(other, 2) == run(again, 2)


# 27 networks, so that workers that do not see each other meet soon.
TINY: dict[str, BaseDistribution] = {f"kernel{i}": CategoricalDistribution((3, 5, 7)) for i in range(3)}


def tiny_ms(params: dict[str, Any]) -> float:
    return float(sum(params.values()))


def tiny_objective(trial: optuna.Trial) -> tuple[float, float]:
    params = {name: trial.suggest_categorical(name, (3, 5, 7)) for name in TINY}
    time.sleep(0.01)  # the others ask meanwhile
    return 1 - 1 / tiny_ms(params), tiny_ms(params)


def tiny_sampler(**changes: Any) -> GreyBoxSampler:
    return sampler(space=TINY, latency=for_each(tiny_ms, TINY), budgets_ms=(99.0,), **changes)


def test_threads_of_one_study_train_distinct_networks() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=tiny_sampler())
    study.optimize(tiny_objective, n_trials=27, n_jobs=6)
    assert distinct([t.params for t in study.trials]) == 27


@pytest.mark.parametrize("patience_s", [0.0, 5.0], ids=["nobody waits", "in turns"])
def test_workers_with_a_sampler_each_train_distinct_networks(patience_s: float) -> None:
    first = optuna.create_study(directions=["maximize", "minimize"], sampler=tiny_sampler())
    together = threading.Barrier(3)
    failures: list[BaseException] = []

    def work() -> None:
        own = optuna.load_study(
            study_name=first.study_name, storage=first._storage, sampler=tiny_sampler(patience_s=patience_s)
        )
        try:
            for _ in range(8):
                trial = own.ask()
                together.wait(30)
                own.tell(trial, tiny_objective(trial))
        except BaseException as e:
            together.abort()
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert distinct([t.params for t in first.trials]) == 24


def test_an_ask_waits_for_an_earlier_one_and_takes_its_network_as_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, study = study_of(), study_of()
    for one in (alone, study):
        run(one, 8)
    expected = [alone.ask(SPACE).params for _ in range(2)]
    earlier = study.ask()
    later = study.ask()
    study._storage.set_trial_system_attr(earlier._trial_id, PROPOSAL, ASKING)
    pauses: list[float] = []

    def until_the_other_is_ready(seconds: float) -> None:
        pauses.append(seconds)
        network = [choices_of(n, d).index(expected[0][n]) for n, d in SPACE.items()]
        study._storage.set_trial_system_attr(earlier._trial_id, PROPOSAL, network)

    monkeypatch.setattr("nas.search.greybox_sampler.time.sleep", until_the_other_is_ready)
    assert {n: later._suggest(n, d) for n, d in SPACE.items()} == expected[1]
    assert len(pauses) == 1


def test_a_worker_that_died_while_it_asked_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(patience_s=0.2)
    study._storage.set_trial_system_attr(study.ask()._trial_id, PROPOSAL, ASKING)
    pauses: list[float] = []
    monkeypatch.setattr("nas.search.greybox_sampler.time.sleep", pauses.append)
    study.ask(SPACE)
    assert sum(pauses) == pytest.approx(0.2)
    study.ask(SPACE)
    assert sum(pauses) == pytest.approx(0.2)


def test_nobody_waits_for_an_ask_that_ended_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(budgets_ms=(0.1,))
    with pytest.raises(BudgetError):
        study.ask(SPACE)
    study.sampler = sampler()
    monkeypatch.setattr("nas.search.greybox_sampler.time.sleep", lambda _: pytest.fail("it waited"))
    study.ask(SPACE)


def test_a_copy_of_a_sampler_in_another_process_proposes_the_same() -> None:
    space = {"depth": IntDistribution(1, 9)}
    copied = pickle.loads(pickle.dumps(GreyBoxSampler(space, depth_ms, (99.0,))))
    given = []
    for one in (GreyBoxSampler(space, depth_ms, (99.0,)), copied):
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=one)
        given.append(study.ask(space).params)
    assert given[0] == given[1]


def depth_ms(genotypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 1.0 + genotypes, np.zeros(genotypes.shape)


def test_a_network_that_failed_before_its_parameters_were_stored_is_not_repeated() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=tiny_sampler())
    broken = []
    for _ in range(9):
        trial = study.ask()
        trial.suggest_categorical("kernel0", (3, 5, 7))
        broken.append({**trial.params, **trial.relative_params})
        study.tell(trial, state=TrialState.FAIL)
    study.optimize(tiny_objective, n_trials=18)
    assert distinct([*broken, *(t.params for t in study.get_trials(states=[TrialState.COMPLETE]))]) == 27


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
    after_free, after_bound = ([study.ask(SPACE).params for _ in range(4)] for study in (free, bound))
    assert after_free != after_bound


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


BLOCKS: dict[str, BaseDistribution] = {"depth": IntDistribution(1, 3), **TINY}


def blocks_ms(params: dict[str, Any]) -> float:
    return float(sum(params[f"kernel{i}"] for i in range(params["depth"])))


def blocks_objective(trial: optuna.Trial) -> tuple[float, float]:
    depth = trial.suggest_int("depth", 1, 3)
    kernels = [trial.suggest_categorical(f"kernel{i}", (3, 5, 7)) for i in range(depth)]
    return 1 - 1 / sum(kernels), float(sum(kernels))


def without_absent_kernels(genotypes: np.ndarray) -> np.ndarray:
    result = genotypes.copy()
    for block in range(3):
        result[:, 1 + block] *= genotypes[:, 0] >= block
    return result


def blocks_study(**changes: Any) -> optuna.Study:
    return study_of(space=BLOCKS, latency=for_each(blocks_ms, BLOCKS), budgets_ms=(99.0,), **changes)


def test_objectives_that_leave_absent_blocks_out_train_distinct_networks_with_a_canonical_form() -> None:
    study = blocks_study(canonical=without_absent_kernels)
    study.optimize(blocks_objective, n_trials=39)  # all that there are
    assert distinct([t.params for t in study.trials]) == 39


def test_absent_parameters_without_a_canonical_form_are_warned_about_once() -> None:
    study = blocks_study()
    with pytest.warns(UserWarning, match=r"trial \d has no kernel\d: .*Give GreyBoxSampler a `canonical`") as warned:
        study.optimize(blocks_objective, n_trials=12)
    assert len(warned) == 1


@pytest.mark.filterwarnings("ignore:trial . has no kernel")
def test_no_proposal_is_repeated_where_the_objective_had_no_use_for_all_of_it() -> None:
    study = blocks_study()
    proposals: list[dict[str, Any]] = []

    def objective_of_blocks(trial: optuna.Trial) -> tuple[float, float]:
        values = blocks_objective(trial)
        proposals.append(trial.relative_params)
        return values

    study.optimize(objective_of_blocks, n_trials=20)
    assert distinct(proposals) == 20


def test_trials_that_the_space_does_not_know_are_warned_about_once() -> None:
    study = study_of()
    wider = {**SPACE, "depth0": IntDistribution(1, 6)}
    for i in range(4):
        params = {n: choices_of(n, d)[0] for n, d in SPACE.items()} | {"depth0": 3 + i}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=wider, values=[0.5, 1.0]))
    message = r"2 of 4 complete trials teach the sampler nothing: trial 2 has depth0=5, search_space has 1, 2, 3, 4\. "
    with pytest.warns(UserWarning, match=message + "Widen search_space") as warned:
        run(study, 2)
    assert len(warned) == 1


def test_latency_of_each_network_is_remembered_while_it_is_looked_at_and_then_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nas.search.greybox_sampler.KNOWN_LATENCIES", 16)
    computed: list[int] = []

    def latency(params: dict[str, Any]) -> float:
        computed.append(params["depth"])
        return float(params["depth"])

    many = for_each(latency, {"depth": IntDistribution(0, 199)})

    def look(depths: range) -> list[int]:
        computed.clear()
        ms, _ = many(np.array(depths)[:, None])
        assert ms[:, 0].tolist() == list(depths)
        return list(computed)

    assert look(range(8)) == list(range(8))
    for start in range(100, 200, 5):  # those that are looked at again stay
        assert look(range(start, start + 5)) == list(range(start, start + 5))
        assert look(range(8)) == []
    assert look(range(100, 105)) == list(range(100, 105))


def test_latency_of_each_network_may_have_several_devices() -> None:
    ms, deviation = for_each(lambda p: (p["depth"], 2 * p["depth"]), {"depth": IntDistribution(1, 3)})(
        np.array([[0], [2], [0]])
    )
    assert ms.tolist() == [[1, 2], [3, 6], [1, 2]] and not deviation.any()


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
