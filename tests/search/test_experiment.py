"""Experiment files: every problem at once with its key, `--set`, paths, the resolved file, the schema."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from nas.core.errors import ConfigError, UsageError
from nas.search.checked import field_meanings, key_paths, section_type
from nas.search.experiment import (
    PATH_KEYS,
    TIME_KEYS,
    Experiment,
    experiment_schema,
    load_experiment,
    parse_set,
    resolved_yaml,
    space_names,
)


def _write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _problems(path: Path, *sets: str) -> list[str]:
    with pytest.raises(ConfigError) as e:
        load_experiment(path, sets)
    return str(e.value).splitlines()


def test_a_file_with_a_space_alone_is_an_experiment_with_defaults(tmp_path: Path) -> None:
    experiment = load_experiment(_write(tmp_path, "space: mine-space.yaml\n", "My board.yaml"))
    assert experiment == Experiment(space=str(tmp_path / "mine-space.yaml"), name="My-board")
    assert experiment.run_dir == Path("runs/My-board")


def test_all_problems_are_listed_at_once_with_key_allowed_values_and_suggestion(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        """
budgt: {ms: 2}
budget: {of: worse}
search: {trials: "12", rounds: 1.5, trails: 3}
distill: {exit_weights: [1, x]}
feedback: 3
data: {augment: {shift: 2}, seed: true}
teacher: {epochs: 0}
run: {tables: null}
""",
    )
    first, *rest = _problems(path)
    assert first == f"{path}: 12 problems:"
    text = "\n".join(rest)
    for line in (
        "  space: is missing; it is: file of the search space",
        "  budgt: unknown key; did you mean 'budget'? (keys: space, name,",
        "  budget.of: \"worse\" is not allowed; allowed: expected, worst, p99; did you mean 'worst'?",
        '  search.trials: expected a whole number, got "12"',
        "  search.rounds: expected a whole number, got 1.5",
        "  search.trails: unknown key; did you mean 'trials'? (keys: trials,",
        '  distill.exit_weights[1]: expected a number, got "x"',
        "  feedback: expected a mapping with keys such as first_networks, networks_per_round, max_engines,",
        "  data.augment.shift must be a number from 0 to 0.5, got 2.0",
        "  data.seed: expected a whole number, got true",
        "  teacher.epochs: must be at least 1, got 0",
        "  run.tables: expected text (put it in quotes), got nothing",
    ):
        assert line in text


def test_a_single_problem_is_one_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\nbudget: {ms: fast}\n")
    with pytest.raises(UsageError) as e:
        load_experiment(path)
    assert str(e.value).startswith(
        f"{path}: budget.ms: 'fast' is not a time; allowed: a positive number with ms, us or s"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys such as space, budget, data; an example is written by: nas init"),
        ("- a\n- b\n", "expected keys such as space"),
        ("space: x.yaml\nspace: y.yaml\n", "key 'space' appears twice"),
        ("space: x.yaml\nbudget: {ms: .nan}\n", "not a finite number"),
        ("space: x.yaml\nbudget: {ms: 0}\n", "budget.ms must be positive, got 0.0"),
        ("space: x.yaml\nbudget: {ms: 2, also_ms: [1, 3]}\n", "budget.also_ms: 3 must lie between 0 and budget.ms (2)"),
        ("space: x.yaml\nbudget: {ms: 2, also_ms: [1, 1]}\n", "budget.also_ms: a deadline appears twice in [1.0, 1.0]"),
        ("space: x.yaml\nname: a/b\n", "name: 'a/b' cannot name a folder; allowed: letters, digits"),
        ("space: x.yaml\nname: ../up\n", "cannot name a folder"),
        ("space: no-such-space\n", "space: no space named 'no-such-space'"),
        ("space: !!python/object:os.system x\n", "is not allowed; write plain values"),
    ],
)
def test_bad_files_are_refused_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path, text)
    problem = "\n".join(_problems(path))
    assert message in problem
    assert problem.startswith(str(path))


def test_a_missing_file_names_those_that_are_there(tmp_path: Path) -> None:
    _write(tmp_path, "space: x.yaml\n", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'quickstart.yaml'\?"):
        load_experiment(tmp_path / "quikstart.yaml")


def test_set_changes_nested_keys_and_the_last_one_counts(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\nsearch:\nbudget: {ms: 3}\n")
    sets = ("search.trials=5", "search.trials=7", "budget.ms=800us", "distill.exit_weights=[1, 0.5]", "name=2024")
    experiment = load_experiment(path, sets)
    assert experiment.search.trials == 7
    assert experiment.budget.ms == pytest.approx(0.8)
    assert experiment.distill.exit_weights == (1.0, 0.5)
    assert experiment.name == "2024"  # text stays text, whatever YAML would make of it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search.trials", "--set search.trials: expected KEY=VALUE, such as --set budget.ms=5"),
        ("=5", "expected KEY=VALUE"),
        ("search.trails=3", "unknown key 'search.trails'; did you mean 'search.trials'? (keys of search: trials, "),
        ("trials=3", "unknown key 'trials'"),
        ("search.trials.x=3", "unknown key 'search.trials.x'; did you mean 'search.trials'?"),
        ("search=3", "'search' is a section; set one of its keys: search.trials, "),
        ("search.trials=[", "--set search.trials=[:1: not valid YAML"),
    ],
)
def test_a_wrong_set_is_refused_with_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_set(text)
    assert message in str(e.value)


def test_a_wrong_value_says_that_it_came_from_set(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\n")
    assert _problems(path, "search.trials=many") == [
        f'{path}: search.trials: expected a whole number, got "many" (from --set search.trials=many)'
    ]


def test_set_below_a_key_that_has_a_value_is_refused(tmp_path: Path) -> None:
    assert "the file gives search a value" in _problems(_write(tmp_path, "search: 3\n"), "search.trials=3")[0]


def test_inputs_are_taken_from_the_files_folder_and_results_and_sets_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ñ 目录"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    path = _write(folder, "space: ../spaces/x.yaml\ndata: {path: images}\nrun: {tables: t}\n")
    experiment = load_experiment(path, ["run.dir=out/one", "teacher.weights=w.onnx"])
    assert experiment.space == str(tmp_path / "spaces" / "x.yaml")
    assert experiment.data.path == str(folder / "images")
    assert experiment.run_dir == Path("out/one")
    assert (experiment.teacher.weights, experiment.run.tables) == ("w.onnx", "t")


def test_files_of_contributors_are_taken_from_the_same_folders(tmp_path: Path) -> None:
    teacher = "{members: [{name: a, kind: onnx, weights: a.onnx}, {name: b}], files: [{name: lab, path: lab.csv}]}"
    path = _write(tmp_path, f"space: x.yaml\nteacher: {teacher}\n")
    experiment = load_experiment(path)
    assert [m.weights for m in experiment.teacher.members] == [str(tmp_path / "a.onnx"), None]
    assert experiment.teacher.files[0].path == str(tmp_path / "lab.csv")
    changed = load_experiment(path, ["teacher.files=[{name: lab, path: other.csv}]"])
    assert changed.teacher.files[0].path == "other.csv"
    resolved = load_experiment(_write(tmp_path, resolved_yaml(changed), "again.yaml"))
    assert resolved.teacher.files[0].path == str(Path("other.csv").absolute())
    assert "did you mean 'lab'?" in _problems(path, "teacher.without=[lob]")[0]
    text = "\n".join(_problems(path, "teacher.files=[{name: a, file: b}]"))
    assert "teacher.files[0].file: unknown key" in text
    assert load_experiment(path, ["teacher.without=[lab]"]).teacher.without == ("lab",)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = _write(tmp_path, "space: ~/x.yaml\n")
    experiment = load_experiment(path, ["data.path=~/images"])
    assert (experiment.space, experiment.data.path) == (str(tmp_path / "x.yaml"), str(tmp_path / "images"))


def test_a_home_that_nobody_has_is_refused_with_its_key(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\n")
    with pytest.raises(ConfigError, match=r"^data\.path: there is no home folder for '~no-such-user/images'\. Give"):
        load_experiment(path, ["data.path=~no-such-user/images"])


def test_null_unsets_a_path(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\ndata: {path: images}\n")
    assert load_experiment(path, ["data.path=null"]).data.path is None


def test_the_resolved_file_gives_the_same_experiment_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path, "space: x.yaml\nbudget: {ms: 0.7, of: expected}\n")
    experiment = load_experiment(Path(path.name), ["distill.exit_weights=[1]", "data.path=d"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = resolved_yaml(experiment)
    resolved = _write(elsewhere, text)
    monkeypatch.chdir(elsewhere)
    again = load_experiment(resolved)
    assert again.run_dir == tmp_path / "runs" / "mine"
    assert again.space == str(tmp_path / "x.yaml")
    for name in ("name", "device", "budget", "teacher", "distill", "search", "feedback", "finish"):
        assert getattr(again, name) == getattr(experiment, name)
    assert resolved_yaml(again) == text


def test_names_stand_for_the_spaces_that_come_with_the_tool(tmp_path: Path) -> None:
    assert space_names()
    for name in space_names():
        space = Path(load_experiment(_write(tmp_path, f"space: {name}\n")).space)
        assert space.is_file() and space.stem == name


def test_listed_keys_exist() -> None:
    for key in (*PATH_KEYS, *TIME_KEYS):
        assert section_type(Experiment, key.split(".")) is not None, key
    assert "data.augment.shift" in key_paths(Experiment)


def test_every_key_has_a_meaning_and_the_schema_carries_it() -> None:
    document = experiment_schema()
    json.dumps(document)
    assert document["additionalProperties"] is False
    assert document["required"] == ["space"]
    definitions = [document, *document["$defs"].values()]
    for definition in definitions:
        assert definition["description"]
        for key, entry in definition["properties"].items():
            assert entry.get("description"), f"{key} has no meaning in its record's docstring"


def test_meanings_are_read_from_both_kinds_of_docstrings() -> None:
    @dataclasses.dataclass
    class Listed:
        """First line.

        Fields:
            a: what a means,
                on two lines.
            b: what b means: 1-2.

        More text.
        """

        a: int = 0
        b: int = 0

    @dataclasses.dataclass
    class Told:
        """First line.

        `a`: what a means. `b`: what b means.
        """

        a: int = 0
        b: int = 0

    assert field_meanings(Listed) == {"a": "what a means, on two lines", "b": "what b means: 1-2"}
    assert field_meanings(Told) == {"a": "what a means", "b": "what b means"}


def test_a_further_deadline_that_is_no_time_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\nbudget: {ms: 2, also_ms: [1, quick]}\n")
    with pytest.raises(UsageError, match=r"budget\.also_ms: 'quick' is not a time; allowed: a positive number"):
        load_experiment(path)


def test_several_deadlines_may_have_units_and_are_sorted(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: x.yaml\nbudget: {ms: 3ms, also_ms: [800us, 2]}\n")
    assert load_experiment(path).budget.all_ms == (3.0, 2.0, 0.8)
    assert load_experiment(path, ["budget.also_ms=[1ms]"]).budget.all_ms == (3.0, 1.0)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{ms: 5, total_ms: 30}", "budget.ms is the deadline of the network, budget.total_ms that of the whole"),
        ("{total_ms: 0}", "budget.total_ms must be positive, got 0.0"),
        ("{total_ms: 30, capture_ms: 20, preprocess: 10}", "budget.total_ms: 30 of 30 ms are gone before the network"),
        ("{total_ms: 30, preprocess: -1}", "budget.preprocess must not be negative, got -1.0"),
        ("{total_ms: 30, also_ms: [0.5]}", "budget.also_ms goes with budget.ms"),
        ("{total_ms: 30, preprocess: guessed}", 'budget.preprocess: expected a number or measured, got "guessed"'),
        ("{total_ms: 30, postprocess: mesured}", "got \"mesured\"; did you mean 'measured'?"),
    ],
)
def test_impossible_deadlines_of_a_pipeline_are_refused(tmp_path: Path, budget: str, message: str) -> None:
    path = _write(tmp_path, f"space: x.yaml\nbudget: {budget}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_experiment(path)


def test_a_deadline_of_the_command_line_replaces_the_other_kind_in_the_file(tmp_path: Path) -> None:
    whole = _write(tmp_path, "space: x.yaml\nbudget: {total_ms: 30ms, capture_ms: 2}\n")
    assert load_experiment(whole).budget.total_ms == 30.0
    alone = load_experiment(whole, ["budget.ms=4"]).budget
    assert (alone.ms, alone.total_ms) == (4.0, None)
    network = _write(tmp_path, "space: x.yaml\nbudget: {ms: 4}\n", "network.yaml")
    assert load_experiment(network, ["budget.total_ms=20ms"]).budget.total_ms == 20.0


def test_settings_with_a_pipeline_read_back_as_they_were(tmp_path: Path) -> None:
    path = _write(tmp_path, "space: tiny-32\nbudget: {total_ms: 30, capture_ms: 2, preprocess: 3.5}\n")
    first = load_experiment(path)
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(first))
    assert load_experiment(again).budget == first.budget
