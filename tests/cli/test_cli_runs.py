"""`nas search`, `pareto`, `report` and `export` on a real, tiny run."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nas.cli.main import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the finished run."""
    monkeypatch.chdir(finished_run)
    return finished_run


def test_a_finished_search_shows_its_result_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = Path("runs/tiny/trials.jsonl").read_bytes()
    assert run(["search", "tiny.yaml", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "finished"
    assert document["pick"] in [point["id"] for point in document["points"]] or document["pick"]
    assert document["package"]["is_good"]
    assert Path(document["report"]).is_file()
    assert Path(document["package"]["path"], "manifest.json").is_file()
    assert Path("runs/tiny/trials.jsonl").read_bytes() == trials
    assert here.name == "ñ 目录"


def test_the_newest_run_a_folder_and_an_experiment_file_name_the_same_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for args in ([], ["runs/tiny"], ["tiny.yaml"], [str(here / "runs" / "tiny")]):
        assert run(["pareto", *args, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["points"])
    assert texts[0] and all([p["id"] for p in text] == [p["id"] for p in texts[0]] for text in texts)


@pytest.mark.usefixtures("here")
def test_the_front_as_table_csv_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pareto"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("run tiny: finished, 3 trials scored, budget 5 ms (worst)\n")
    assert re.search(r"^first +\d+ +0 +\d+ +\d+ +\d+\.\d % of hypervolume$", table, re.MULTILINE)
    assert "\npick: " in table
    assert run(["pareto", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert run(["pareto", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    points = document["points"]
    assert sum(s["scored"] for s in document["proposers"]) == 3
    assert [row["proposer"] for row in rows] == [point["proposer"] for point in points]
    assert {point["proposer"] for point in points} <= {s["name"] for s in document["proposers"]}
    assert [row["id"] for row in rows] == [point["id"] for point in points]
    assert float(rows[0]["worst_ms"]) == points[0]["worst_ms"] > 0


@pytest.mark.usefixtures("here")
def test_the_best_below_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pareto", "--best-under", "5ms", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["chosen"] == document["points"][0]["id"]
    assert run(["pareto", "--best-under", "5ms"]) == 0
    out = capsys.readouterr().out
    assert f"take {document['chosen']}: best on validation below 5.00 ms (worst)" in out
    assert f"--student {document['chosen']}" in out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", [["pareto"], ["export"]])
def test_nothing_below_a_time_is_exit_code_3_with_the_closest(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--best-under", "1us"]) == 3
    err = capsys.readouterr().err
    assert "closest" in err or "fastest" in err
    assert "0.001" in err.replace("0.00100", "0.001")


@pytest.mark.usefixtures("here")
def test_a_report_can_be_written_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "runs/tiny", "--output", str(tmp_path / "page"), "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert page.parent == tmp_path / "page"
    assert "tiny" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("here")
def test_a_named_student_is_exported_and_an_existing_package_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pareto", "--json"]) == 0
    pick = json.loads(capsys.readouterr().out)["pick"]
    args = ["export", "runs/tiny", "--student", pick, "--output", str(tmp_path / "package")]
    assert run([*args, "--json"]) in (0, 3)  # the accuracy of a network that saw 120 images is what it is
    capsys.readouterr()
    assert (tmp_path / "package" / "model.onnx").is_file()
    assert run(args) == 2
    assert "exists already; choose another folder (--output DIR), or replace it: --force" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pareto", "runs/nothing"], "runs/nothing: not a run folder; runs: runs/tiny. Run: nas search"),
        (["export", "--student", "r1"], "no student 'r1'"),
        (["export", "--trial", "99"], "trial 99"),
        (["export", "--exits", "loss=0.1"], "--exits solves the thresholds of one student; name it: --student ID"),
        (["export", "--student", "r1", "--exits", "top1=0.9"], "--exits: 'top1=0.9' is no target; give loss=RATIO"),
        (["export", "--trial", "1", "--student", "x"], "give one of --student, --trial and --best-under"),
        (["report", "nowhere.yaml"], "nowhere.yaml: not a run folder"),
        (["search", "tiny.yaml", "--budget", "2ms"], "  budget: 5 ms"),
        (["search", "tiny.yaml", "--dry-run", "--set", "search.seed=1"], "seed: 0 -> 1"),
        (["search", "tiny.yaml", "--set", "search.trails=1"], "did you mean 'search.trials'?"),
        (["search", "tny.yaml"], "tny.yaml: no such file; did you mean 'tiny.yaml'?"),
    ],
)
def test_wrong_choices_are_one_message_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_without_any_run_the_next_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["pareto"]) == 2
    assert "no run in runs. Run: nas search EXPERIMENT.yaml" in capsys.readouterr().err


def test_a_dry_run_names_rows_phases_and_settings_and_makes_nothing(
    tiny_experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", "tiny.yaml", "--dry-run", "--json", "--set", "search.trials=7"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = document["plan"]
    assert document["experiment"]["search"]["trials"] == 7
    assert (plan["status"], len(plan["missing"])) == ("new", plan["rows"])
    assert {"teacher", "latency table", "supernet", "scores", "finalists"} <= {p["name"] for p in plan["phases"]}
    assert plan["sampler"] == "greybox" and "of 7 trials each is worth " in plan["sampler_reason"]
    assert document["about_s"] > 0
    assert sorted(p.name for p in tiny_experiment.parent.iterdir()) == ["space.yaml", "tiny.yaml"]


@pytest.mark.usefixtures("here")
def test_a_dry_run_of_a_finished_run_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", "tiny.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "run folder: runs/tiny (finished, 3 trials scored)" in out
    assert "nothing to do: this run is finished" in out
    assert "\nsampler:    greybox (chosen when the run began: latency is known before training, " in out
    assert " of scoring, and of proposing " in out
    assert "fastest:    " in out


@pytest.mark.usefixtures("here")
def test_a_dry_run_of_a_fork_shows_what_the_new_run_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["search", "tiny.yaml", "--dry-run", "--budget", "6ms"]
    assert run(changed) == 2
    assert "or keep what is still valid: --fork" in capsys.readouterr().err
    assert run([*changed, "--fork"]) == 0
    out = capsys.readouterr().out
    assert "--fork: in a new run folder beside runs/tiny; what stays valid of that run is kept:\n  budget: 5 ms" in out
    assert "3 of 3 candidates" in out and "nothing to do" not in out
    assert not Path("runs/tiny-2").exists()


@pytest.mark.usefixtures("here")
def test_a_budget_below_the_smallest_network_is_known_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["search", "tiny.yaml", "--dry-run", "--budget", "1us", "--set", "run.dir=runs/other"]
    assert run(args) == 3
    assert "the fastest network of this space is predicted to need" in capsys.readouterr().err
    assert not Path("runs/other").exists()


def test_a_run_made_elsewhere_can_be_read(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "runs" / "tiny", tmp_path / "moved")
    assert run(["pareto", str(tmp_path / "moved")]) == 0
    assert "run moved: finished" in capsys.readouterr().out


def test_ctrl_c_keeps_the_work_and_names_the_command_that_goes_on(tiny_experiment: Path) -> None:
    args = ["search", "tiny.yaml", "--set", "supernet.steps=1000000", "--budget", "4ms"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nas", *args],
        cwd=tiny_experiment.parent,
        # No `nas` on the PATH: the command that goes on is named as this one was started.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": os.defpath},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr:
        assert any(line.startswith("supernet:") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.wait(60) == 130
    # The file in the run folder holds what was given on the command line, and is right for a fork too.
    command = f"{sys.executable} -m nas search runs/tiny/experiment.yaml"
    assert rest.endswith(f"interrupted: stopped; finished work is kept. Go on with: {command}\n")
    resolved = (tiny_experiment.parent / "runs" / "tiny" / "experiment.yaml").read_text(encoding="utf-8")
    assert "ms: 4.0" in resolved and "steps: 1000000" in resolved
    assert "Traceback" not in rest


@pytest.mark.usefixtures("here")
def test_a_student_is_written_for_a_runtime_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pareto", "--json"]) == 0
    pick = json.loads(capsys.readouterr().out)["pick"]
    target = tmp_path / "for-a-board"
    args = ["export", "runs/tiny", "--student", pick, "--output", str(target)]
    assert run([*args, "--for", "tensorrt:8.2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["dialect"], document["verdict"], document["latency"]) == ("tensorrt-8.0", "unmeasured", None)
    assert {"build_engine.py", "board.pyz", "bench.py"} <= {p.name for p in target.iterdir()}
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["opset"] == 13 and manifest["latency"] is None
    assert manifest["accuracy"]["images"] == 60
    assert run(["bench", str(target)]) == 0
    assert "its graphs are written for tensorrt-8.0; a time on " in capsys.readouterr().err
    assert run([*args, "--for", "tensorrt", "--force"]) == 2
    assert "give ort, or tensorrt: and its version, such as tensorrt:8.2" in capsys.readouterr().err
