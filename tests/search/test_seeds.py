"""A user's own candidates: what an entry may be, what is said of a wrong one, and that they are scored first."""

# ruff: noqa: F811 - fixtures of the rounds are taken by name
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_examples import SPACE, Notes, Prepared
from test_rounds import ScriptedPool, make, proposed, tables  # noqa: F401

from nas.core.errors import ConfigError, InterruptedRunError
from nas.core.jsonio import write_record
from nas.core.walk import total_params
from nas.search.experiment import load_experiment, resolved_yaml
from nas.search.folder import RunFolder, TrialRecord
from nas.search.prepare import fingerprint
from nas.search.rounds import SearchParts, run_rounds
from nas.search.seeds import Seed, resolve
from nas.search.settings import BudgetSettings, SearchSettings
from nas.space.space import SearchSpace, load_space, space_from_plain
from nas.space.yamlio import parse_yaml

SPACES = Path(__file__).parents[2] / "search_spaces"
Make = Callable[..., SearchParts]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_from_plain(parse_yaml(SPACE, "space"), "space", 4)


def problem_of(entries: tuple[object, ...], space: SearchSpace) -> str:
    with pytest.raises(ConfigError) as e:
        resolve(entries, space)  # type: ignore[arg-type]
    return str(e.value)


def distinct(space: SearchSpace, count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    return list(dict.fromkeys(space.sample(rng) for _ in range(2 * count)))[:count]


@pytest.mark.parametrize(
    ("name", "params", "where"),
    [  # as printed by torchvision's documentation of the weights
        ("mobilenet_v3_small", 2_542_856, "mobilenetv3-small-224"),
        ("mobilenet_v3_large", 5_483_032, "mobilenetv3-large-224"),
    ],
)
def test_published_network_is_the_one_with_the_published_parameters(name: str, params: int, where: str) -> None:
    space = load_space(SPACES / f"{where}.yaml", 1000)
    (seed,) = resolve((name,), space)
    assert seed.name == name
    assert total_params(space.decode(seed.genotype)) == params


def test_published_network_outside_the_space_says_what_differs(space: SearchSpace) -> None:
    text = problem_of(("mobilenet_v3_small",), space)
    assert text.startswith(
        "search.enqueue[0] (mobilenet_v3_small): resolution: 224 is not in space mini-16; allowed: 16"
    )


def test_unknown_name_gets_a_suggestion_and_the_forms_of_an_entry(space: SearchSpace) -> None:
    text = problem_of(("mobilenet_v3_smal",), space)
    assert "did you mean 'mobilenet_v3_small'?" in text
    assert "{run: DIR, id: ID}" in text


def test_genes_name_a_network_and_the_others_are_of_the_smallest(space: SearchSpace) -> None:
    (seed,) = resolve(({"b.width": 12, "b.activation": "hard_swish"},), space)
    changed = [g.name for g, a, b in zip(space.genes, seed.genotype, space.smallest(), strict=True) if a != b]
    assert changed == ["b.width", "b.activation"]
    assert seed.name == space.decode(seed.genotype).id


def test_genes_begin_from_the_network_in_like(space: SearchSpace, tmp_path: Path) -> None:
    write_record(tmp_path / "best.json", space.decode(space.largest()))
    (seed,) = resolve(({"like": str(tmp_path / "best.json"), "b.width": 8},), space)
    places = {g.name: i for i, g in enumerate(space.genes)}
    expected = list(space.largest())
    expected[places["b.width"]] = 0
    assert seed.genotype == space.canonical(expected)


def test_unknown_gene_and_value_say_what_is_allowed(space: SearchSpace) -> None:
    text = problem_of(({"b.widht": 12},), space)
    assert text.startswith("search.enqueue[0]: unknown gene 'b.widht'; did you mean 'b.width'? (genes of mini-16: ")
    assert problem_of(("x.json",), space).startswith("search.enqueue[0]: no candidate can be read: x.json")
    text = problem_of(({"b.activation": "hardswish"},), space)
    assert text == (
        "search.enqueue[0]: b.activation: hardswish is not allowed; allowed: relu, hard_swish; did you mean "
        "'hard_swish'?"
    )
    assert "exits.a: 1 is not allowed; allowed: false, true" in problem_of(({"exits.a": 1},), space)


def test_candidate_file_takes_the_classes_of_this_data_set(space: SearchSpace, tmp_path: Path) -> None:
    candidate = replace(space.decode(space.largest()), num_classes=1000)
    write_record(tmp_path / "best.json", candidate)
    assert resolve((str(tmp_path / "best.json"),), space) == (Seed("best.json", space.largest()),)


def test_equal_candidates_are_taken_once(space: SearchSpace, tmp_path: Path) -> None:
    write_record(tmp_path / "small.json", space.decode(space.smallest()))
    seeds = resolve((str(tmp_path / "small.json"), {"exits.a": False}), space)
    assert [s.name for s in seeds] == ["small.json"]


def test_candidate_of_an_earlier_run_is_found_by_its_id(space: SearchSpace, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    candidates = [space.decode(g) for g in (space.smallest(), space.largest())]
    for i, c in enumerate(candidates):
        run.add_trial(TrialRecord(i, 1, space.encode(c), c, "complete", "first", 0.1, top1=0.5))
    entry = {"run": str(tmp_path), "id": candidates[1].id}
    assert "not a run folder" in problem_of((entry,), space)
    (tmp_path / "fingerprint.json").write_text("{}")
    assert resolve((entry,), space)[0].genotype == space.largest()
    assert resolve(({**entry, "id": candidates[0].arch_id},), space)[0].genotype == space.smallest()
    text = problem_of(({**entry, "id": candidates[1].id[:-1] + "!"},), space)
    assert f"did you mean '{candidates[1].id}'?" in text
    assert "both of them text" in problem_of(({"run": str(tmp_path)},), space)


def test_enqueued_candidates_are_scored_before_all_others(make: Make, space: SearchSpace) -> None:
    notes = Notes()
    drawn = distinct(space, 4)
    seeds = tuple(Seed(f"mine {i}", g) for i, g in enumerate(drawn))
    parts = replace(make(notes=notes, trials=10, rounds=1, batch=2), seeds=seeds)
    run_rounds(parts)
    assert proposed(parts)[: len(drawn)] == drawn
    proposers = [name for b in parts.folder.batches() for name in b.proposers]
    assert proposers == ["enqueued"] * 4 + ["first"] * 2 + ["random"] * 4  # the ends wait for a batch with room
    assert [r.proposer for r in parts.folder.trials()] == proposers
    assert "enqueued, scored before all others: mine 0, mine 1, mine 2, mine 3" in notes.said


def test_enqueued_candidate_over_the_budget_is_named_and_never_trained(make: Make, space: SearchSpace) -> None:
    worst = make().predictor.worst([space.smallest(), space.largest()])[0]
    limit = BudgetSettings(ms=float(worst.mean()), margin_std=0.0)
    notes = Notes()
    seeds = (Seed("too slow", space.largest()), Seed("fast", space.smallest()))
    parts = replace(make(notes=notes, budget=limit, trials=4, rounds=1, batch=4), seeds=seeds)
    run_rounds(parts)
    assert space.largest() not in proposed(parts)
    assert parts.folder.batches()[0].proposers[0] == "enqueued"
    (told,) = [w for w in notes.warned if "too slow" in w]
    assert told.startswith("search.enqueue: too slow is not trained: it takes ")
    assert f"{worst[1]:.4g} +- " in told
    assert f"and {limit.ms:g} ms with a margin of 0 deviations are allowed" in told


def test_stopped_run_goes_on_with_the_enqueued_candidates_that_are_left(make: Make, space: SearchSpace) -> None:
    drawn = distinct(space, 5)
    seeds = tuple(Seed(f"mine {i}", g) for i, g in enumerate(drawn))
    pool = ScriptedPool()
    parts = replace(make(pool, trials=8, rounds=1, batch=2), seeds=seeds)
    pool.after_each = lambda: parts.stop.set() if len(pool.trained) == 3 else None
    with pytest.raises(InterruptedRunError):
        run_rounds(parts)
    resumed = replace(make(trials=8, rounds=1, batch=2), seeds=seeds)
    run_rounds(resumed)
    assert proposed(resumed)[: len(drawn)] == drawn
    assert len(set(proposed(resumed))) == len(proposed(resumed)) == 8


def test_fingerprint_is_of_the_candidates_and_not_of_their_file(prepared: Prepared, tmp_path: Path) -> None:
    inputs, file = prepared.inputs, tmp_path / "mine.json"
    assert "enqueued" not in fingerprint(inputs)  # runs of earlier versions go on
    search = replace(inputs.experiment.search, enqueue=(str(file),))
    seeded = replace(inputs, experiment=replace(inputs.experiment, search=search))
    write_record(file, inputs.space.decode(inputs.space.smallest()))
    small = fingerprint(seeded)["enqueued"]
    write_record(file, inputs.space.decode(inputs.space.largest()))
    large = fingerprint(seeded)["enqueued"]
    assert small.startswith("mine.json ") and small != large
    shutil.copy(file, tmp_path / "copy.json")
    moved = replace(search, enqueue=(str(tmp_path / "copy.json"),))
    again = fingerprint(replace(inputs, experiment=replace(inputs.experiment, search=moved)))["enqueued"]
    assert again.split()[-1] == large.split()[-1]


def test_paths_of_entries_are_those_of_the_experiment_file_and_survive_its_resolved_copy(tmp_path: Path) -> None:
    entries = ["mobilenet_v3_small", "best.json", {"run": "runs/old", "id": "r32"}, {"like": "b.json", "stem": 8}]
    file = tmp_path / "mine.yaml"
    file.write_text(f"space: tiny-32\nsearch: {{enqueue: {json.dumps(entries)}}}\n")
    found = load_experiment(file).search.enqueue
    assert found == (
        "mobilenet_v3_small",
        str(tmp_path / "best.json"),
        {"run": str(tmp_path / "runs/old"), "id": "r32"},
        {"like": str(tmp_path / "b.json"), "stem": 8},
    )
    copy = tmp_path / "run" / "experiment.yaml"
    copy.parent.mkdir()
    copy.write_text(resolved_yaml(load_experiment(file)))
    assert load_experiment(copy).search.enqueue == found


def test_entries_can_be_set_on_the_command_line_and_wrong_ones_are_told_with_their_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("space: tiny-32\n")
    found = load_experiment(file, ['search.enqueue=[mobilenet_v3_small, {b.width: 8, x: true}, {like: "a/../b.json"}]'])
    assert found.search.enqueue == ("mobilenet_v3_small", {"b.width": 8, "x": True}, {"like": "b.json"})
    with pytest.raises(ConfigError, match=r"search\.enqueue\[1\]: expected text"):
        load_experiment(file, ["search.enqueue=[mobilenet_v3_small, 5]"])
    with pytest.raises(ConfigError, match=r"search\.enqueue: expected a list, such as \[1, 2\], got \"mobilenet"):
        load_experiment(file, ["search.enqueue=mobilenet_v3_small"])


def test_more_candidates_than_trials_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"search\.enqueue: 3 candidates, and search\.trials are 2"):
        SearchSettings(trials=2, enqueue=("a", "b", "c"))


def test_deadline_on_the_mean_refuses_only_what_misses_it_when_all_images_leave_early(
    make: Make, space: SearchSpace
) -> None:
    without = space.canonical([*space.largest()[: space.layout.exits[0].present], 0, 0])
    least = float(make().predictor.first_exit([without])[0])
    notes = Notes()
    limit = BudgetSettings(ms=0.8 * least, of="expected")
    parts = replace(make(notes=notes, budget=limit, trials=3, rounds=1), seeds=(Seed("mine", without),))
    run_rounds(parts)
    (told,) = [w for w in notes.warned if "mine" in w]
    assert f"it takes {least:.4g} ms on " in told
    assert told.endswith(f"when every image leaves as early as it can, and {limit.ms:g} ms are allowed")
