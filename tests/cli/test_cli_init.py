"""`nas init`: a file with every key, readable at once, never replaced unasked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nas.cli.main import run
from nas.search.checked import key_paths
from nas.search.experiment import Experiment, load_experiment
from nas.train.settings import DistillSettings


def test_the_written_file_gives_the_defaults_with_attention_transfer_and_names_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init"]) == 0
    text = Path("experiment.yaml").read_text(encoding="utf-8")
    experiment = load_experiment(Path("experiment.yaml"))
    assert experiment == Experiment(space=experiment.space, distill=DistillSettings(attention=3.0))
    assert Path(experiment.space).stem == "tiny-32"
    for key in key_paths(Experiment):
        assert re.search(rf"^ *#?{key.split('.')[-1]}:", text, re.MULTILINE), key
    assert max(map(len, text.splitlines())) <= 120
    assert "nas search experiment.yaml --dry-run" in capsys.readouterr().out


def test_taking_away_the_signs_of_all_defaults_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    assert run(["init", str(path)]) == 0
    every = tmp_path / "every.yaml"
    every.write_text(re.sub(r"(?m)^( *)#(\w+:)", r"\1\2", path.read_text(encoding="utf-8")), encoding="utf-8")
    assert load_experiment(every, ["name=a"]) == load_experiment(path)


def test_options_become_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    assert run(["init", str(path), "--budget", "800us", "--data", str(tmp_path), "--space", "tiny-32"]) == 0
    experiment = load_experiment(path)
    assert experiment.budget.ms == pytest.approx(0.8)
    assert (experiment.data.name, experiment.data.path) == ("folder", str(tmp_path))
    assert run(["init", str(path), "--data", "CIFAR10", "--force"]) == 0
    experiment = load_experiment(path)
    assert experiment.data.name == "CIFAR10"
    assert Path(experiment.space).stem == "small-64"
    assert experiment.data.path == str(tmp_path / "data" / "CIFAR10")


@pytest.mark.parametrize(("images", "epochs"), [(20, 120), (1720, 50)])
def test_a_folder_with_few_images_gets_many_passes(tmp_path: Path, images: int, epochs: int) -> None:
    for name in ("good", "bad"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(images // 2):
            (tmp_path / "photos" / name / f"{i}.png").touch()
    file = tmp_path / "experiment.yaml"
    assert run(["init", str(file), "--data", str(tmp_path / "photos")]) == 0
    loaded = load_experiment(file)
    assert (loaded.teacher.epochs, loaded.distill.epochs) == (epochs, epochs)


@pytest.mark.parametrize("name", ["quickstart", "jetson"])
def test_students_look_where_the_teacher_looks_as_in_the_experiments_that_come_along(tmp_path: Path, name: str) -> None:
    file = tmp_path / "experiment.yaml"
    assert run(["init", str(file)]) == 0
    given = load_experiment(Path(__file__).parents[2] / "experiments" / f"{name}.yaml")
    assert load_experiment(file).distill.attention == given.distill.attention > 0


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("mine", encoding="utf-8")
    assert run(["init", str(path)]) == 2
    assert (
        f"{path} exists already; choose another name, or replace it: nas init {path} --force" in capsys.readouterr().err
    )
    assert path.read_text(encoding="utf-8") == "mine"
    assert run(["init", str(path), "--force"]) == 0
    assert load_experiment(path).name == "a"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--space", "tny-32"], "--space: no space 'tny-32'; did you mean 'tiny-32'? (names: "),
        (["--budget", "5fps"], "--budget: unknown unit 'fps' in '5fps'"),
    ],
)
def test_wrong_options_write_nothing(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    assert run(["init", str(path), *args]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_schema_is_printed_for_editors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", "--schema"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["properties"]["budget"]["description"] == "the deadline"
    assert run(["init", "--schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_names_that_the_terminal_cannot_show_do_not_matter(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nas", "init", "ñ 目录.yaml"],
        cwd=tmp_path,
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"wrote ")
    assert load_experiment(tmp_path / "ñ 目录.yaml").name == "experiment"
