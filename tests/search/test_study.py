"""Samplers: proposals inside the budget, never the same twice, and what they learn; the mirrored study."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from search_examples import SPACE

from nas.core.errors import StorageError
from nas.core.walk import total_macs
from nas.search.study import (
    CONSTRAINT,
    KnownLatency,
    Proposer,
    Scored,
    distributions,
    greybox_scored,
    importances,
    mirror,
    to_genotype,
    to_params,
)
from nas.space.space import SearchSpace, space_from_plain
from nas.space.yamlio import parse_yaml

Genotype = tuple[int, ...]
SAMPLERS = ("tpe", "nsga2", "random")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(parse_yaml(SPACE, "space"), "space", 10)


def macs(space: SearchSpace, genotype: Genotype, known: dict[Genotype, int] = {}) -> int:  # noqa: B006  a memory
    if genotype not in known:
        known[genotype] = total_macs(space.decode(genotype))
    return known[genotype]


def below(space: SearchSpace, limit: float) -> Callable[[Genotype], bool]:
    return lambda genotype: macs(space, genotype) <= limit


def known_below(space: SearchSpace, limit: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: np.array([macs(space, tuple(row)) <= limit for row in rows.tolist()])


def proposer(
    space: SearchSpace,
    sampler: str = "tpe",
    *,
    limit: float = 1e12,
    seed: Sequence[int] = (0,),
    known: Sequence[Scored] = (),
    seen: Sequence[Genotype] = (),
) -> Proposer:
    return Proposer(space, sampler, seed, 100, below(space, limit), known_below(space, limit), known, seen)


def scored(space: SearchSpace, genotype: Genotype, top1: float | None = None) -> Scored:
    """Accuracy grows with the work, unless it is given."""
    work = macs(space, genotype)
    return Scored(genotype, min(1.0, work / 8e4) if top1 is None else top1, (work / 1e6,), -1.0, str(genotype))


def proposals(source: Proposer, count: int, space: SearchSpace) -> list[Genotype]:
    """Asks and tells, one at a time."""
    found = []
    for _ in range(count):
        asked = source.ask()
        assert asked is not None
        found.append(asked[1])
        source.tell(asked[0], scored(space, asked[1]))
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_are_canonical_in_budget_and_never_repeat(space: SearchSpace, sampler: str) -> None:
    limit = 25_000  # about a tenth of the space
    found = proposals(proposer(space, sampler, limit=limit), 40, space)
    assert len(set(found)) == 40
    assert all(space.canonical(g) == g and macs(space, g) <= limit for g in found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_resumed_proposer_repeats_neither_proposals_nor_failures(space: SearchSpace, sampler: str) -> None:
    first = proposals(proposer(space, sampler, seed=(0, 1, 0)), 12, space)
    told, failed = [scored(space, g) for g in first[:8]], first[8:]
    resumed = proposer(space, sampler, seed=(0, 1, 12), known=told, seen=failed)
    assert not set(proposals(resumed, 12, space)) & set(first)
    again = proposer(space, sampler, seed=(0, 1, 0), known=told, seen=failed)
    assert not set(proposals(again, 12, space)) & set(first)  # also with the numbers of the first call


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_gives_the_same_proposals(space: SearchSpace, sampler: str) -> None:
    one, two = (proposals(proposer(space, sampler, seed=(3, 1, 0)), 20, space) for _ in range(2))
    other = proposals(proposer(space, sampler, seed=(4, 1, 0)), 20, space)
    assert one == two != other


def test_foreseen_accuracies_and_networks_over_the_budget_teach_but_stand_on_no_front(space: SearchSpace) -> None:
    complete = scored(space, space.largest())
    foreseen = replace(scored(space, space.smallest(), 0.99), is_estimate=True)
    given = greybox_scored([complete, foreseen, replace(complete, excess=0.1)])
    assert given.eligible.tolist() == [True, False, False]
    assert given.accuracies[1] == 0.99


def _share_of(space: SearchSpace, sampler: str, known: Sequence[Scored], gene: int, value: int) -> float:
    """Share of proposals whose gene has a value, over several seeds."""
    found = []
    for seed in range(4):
        source = proposer(space, sampler, seed=(seed,), known=known)
        found += [g for g, _ in ((source.ask() or (0, ()))[::-1] for _ in range(12))]
    return sum(g[gene] == value for g in found) / len(found)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_earlier_outcomes_and_their_estimated_latencies_reach_the_sampler(space: SearchSpace, sampler: str) -> None:
    """All accurate networks have the wider stage; then the same ones with a latency that makes them useless."""
    gene = next(i for i, g in enumerate(space.genes) if g.name == "b.width")
    rng = np.random.default_rng(0)
    genotypes = list({space.sample(rng) for _ in range(60)})
    good = [Scored(g, 0.9 if g[gene] else 0.1, (1.0,), -1.0, "") for g in genotypes]
    corrected = [Scored(g, 0.5, (9.0 if g[gene] else 1.0,), -1.0, "") for g in genotypes]
    assert _share_of(space, sampler, good, gene, 1) > 0.7
    assert _share_of(space, sampler, corrected, gene, 1) < 0.35


def test_infeasible_outcomes_lose_against_feasible_ones(space: SearchSpace) -> None:
    gene = next(i for i, g in enumerate(space.genes) if g.name == "b.width")
    rng = np.random.default_rng(1)
    known = [Scored(g, 0.5 + 0.4 * g[gene], (1.0,), 1.0 if g[gene] else -1.0, "") for g in space.sample_many(rng, 60)]
    known = [Scored(tuple(int(v) for v in s.genotype), s.score, s.latency_ms, s.excess, "") for s in known]
    assert _share_of(space, "nsga2", known, gene, 1) < 0.4


def test_an_estimated_accuracy_teaches_the_grey_box_but_stands_on_no_front(space: SearchSpace) -> None:
    rows = np.unique(space.sample_many(np.random.default_rng(3), 14), axis=0).tolist()
    known = sorted((scored(space, tuple(row)) for row in rows), key=lambda one: one.score)  # fastest first

    def next_after(top1: float, is_estimate: bool, seed: int) -> Genotype:
        source = Proposer(
            space,
            "greybox",
            (seed,),
            100,
            below(space, 1e12),
            known_below(space, 1e12),
            [*(replace(k, score=top1, is_estimate=is_estimate) for k in known[:3]), *known[3:]],
            latency=KnownLatency(
                lambda g: (np.array([[macs(space, tuple(r)) / 1e6] for r in g.tolist()]), np.zeros((len(g), 1))),
                (1.0,),
                1.0,
                1,
            ),
        )
        asked = source.ask()
        assert asked is not None
        return asked[1]

    def differ(one: tuple[float, bool], two: tuple[float, bool]) -> bool:
        return any(next_after(*one, seed) != next_after(*two, seed) for seed in range(2))

    assert differ((0.7, True), (0.7, False))  # a front without them leaves more to improve
    assert differ((0.7, True), (0.01, True))  # but what resembles them is better or worse


def test_all_of_a_tiny_space_is_proposed_once_and_then_nothing() -> None:
    plain = parse_yaml(SPACE, "space")
    plain["stages"] = [{**plain["stages"][0], "width": [4, 8], "kernel_size": 3, "expansion": [1, 2]}]
    plain |= {"exits": None, "precision": {"choices": ["fp32"]}}
    tiny = space_from_plain(plain, "space", 10)
    source = proposer(tiny)
    found = proposals(source, 4, tiny)
    assert len(set(found)) == 4 == tiny.size
    assert source.ask() is None


def test_few_genotypes_inside_a_tight_budget_are_found(space: SearchSpace) -> None:
    """The sampler's own tries miss them nearly always: 24 of 3,072 are that small."""
    everything = {space.canonical(g) for g in np.ndindex(*space.gene_sizes)}
    limit = sorted(macs(space, g) for g in everything)[23]
    inside = {g for g in everything if macs(space, g) <= limit}
    source = proposer(space, "random", limit=limit)
    found = set(proposals(source, len(inside), space))
    assert found == inside
    assert source.ask() is None


def test_nothing_inside_the_budget_gives_nothing(space: SearchSpace) -> None:
    assert proposer(space, limit=0).ask() is None


def test_params_and_genotypes_are_each_other(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        genotype = space.sample(rng)
        params = to_params(space, genotype)
        assert to_genotype(space, params) == genotype
        assert params.keys() == distributions(space).keys()


def _rows(space: SearchSpace, count: int) -> list[tuple[Scored, dict[str, object]]]:
    rng = np.random.default_rng(5)
    return [
        (scored(space, space.sample(rng)), {"trial": i, "round": 1, "exit_top1": [0.25, 0.5]}) for i in range(count)
    ]


@pytest.mark.parametrize("layout", ["known", "other"])
def test_mirrored_study_is_what_optuna_itself_would_have_written(
    space: SearchSpace, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "other":  # a newer Optuna: its own way is taken
        monkeypatch.setattr("nas.search.study.RDB_SCHEMA", -1)
    rows = _rows(space, 12)
    mirror(tmp_path / "study.db", "mini", space, rows)
    mirror(tmp_path / "study.db", "mini", space, rows)  # replaces, does not add
    study = optuna.load_study(study_name="mini", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.metric_names == ["score", "latency_ms"]
    assert [t.number for t in study.trials] == list(range(12))
    for (one, attributes), trial in zip(rows, study.trials, strict=True):
        assert trial.state == optuna.trial.TrialState.COMPLETE
        assert trial.values == [one.score, *one.latency_ms]
        assert trial.params == to_params(space, one.genotype)
        assert trial.distributions == distributions(space)
        assert trial.user_attrs == {"candidate": one.label, **attributes}
        assert trial.system_attrs[f"constraints:{CONSTRAINT}"] == -1.0
    assert study.best_trials
    assert [p.name for p in tmp_path.iterdir()] == ["study.db"]


def test_mirror_that_cannot_be_written_leaves_the_old_one(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    mirror(path, "mini", space, _rows(space, 2))
    before = path.read_bytes()
    bad = [(Scored(space.smallest(), 0.5, (1.0,), -1.0, "x"), {"note": object()})]
    with pytest.raises(StorageError, match=r"study\.db: the study cannot be written: .*not JSON serializable"):
        mirror(path, "mini", space, bad)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["study.db"]
    with pytest.raises(StorageError, match="the study cannot be written"):
        mirror(tmp_path / "missing" / "study.db", "mini", space, [])


def test_empty_study_can_be_mirrored(space: SearchSpace, tmp_path: Path) -> None:
    mirror(tmp_path / "study.db", "mini", space, [])
    with sqlite3.connect(tmp_path / "study.db") as database:
        assert database.execute("SELECT count(*) FROM trials").fetchone() == (0,)
    database.close()


def test_importances_name_the_genes_that_decide(space: SearchSpace) -> None:
    gene = next(i for i, g in enumerate(space.genes) if g.name == "b.width")
    rng = np.random.default_rng(2)
    trials = [Scored(g, 0.2 + 0.6 * g[gene], (1.0 + g[0],), -1.0, "") for g in (space.sample(rng) for _ in range(60))]
    found = importances(space, trials)
    assert max(found, key=lambda i: i.accuracy).gene == "b.width"
    assert max(found, key=lambda i: i.latency).gene == space.genes[0].name
    assert importances(space, trials[:9]) == ()
