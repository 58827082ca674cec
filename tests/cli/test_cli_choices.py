"""What commands say when a choice cannot be met: options that exclude each other, missing files, missed budgets."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nas.cli.main import run
from nas.core.jsonio import write_record
from nas.search.view import load_outcome


@pytest.fixture
def here(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the finished run."""
    monkeypatch.chdir(finished_run)
    return finished_run


@pytest.fixture
def hopeless(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The finished run as if its budget had been 1 us and no finished student kept it; gives the closest one's id.

    A search ends like this when predictions keep the budget and the measured students do not.
    """
    folder = tmp_path / "here"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns(".nas-cache", "packages", "package.json"))
    monkeypatch.chdir(folder)
    path = folder / "runs" / "tiny"
    marks = json.loads((path / "fingerprint.json").read_text(encoding="utf-8"))
    marks["budget"] = "0.001 ms (worst), margin of 1 deviations, of packages 1.5"
    write_record(path / "fingerprint.json", marks)
    outcome = load_outcome(path)
    measured = [p for p in outcome.points if p.latency.provenance == "measured"]
    closest = min(measured, key=lambda p: p.latency.worst_ms)
    changed = replace(
        outcome,
        pick_id=None,
        pick_reason="",
        next_id=None,
        next_reason="",
        closest_id=closest.id,
        closest_reason="fastest measured student: too slow",
    )
    write_record(path / "outcome.json", changed)
    return closest.id


def test_a_search_whose_budget_nothing_keeps_gives_one_document_with_the_closest_and_exit_code_3(
    hopeless: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", "tiny.yaml", "--budget", "1us", "--json"]) == 3
    out, err = capsys.readouterr()
    document = json.loads(out)  # a second document behind it would be an error here
    assert (document["pick"], document["closest"], document["status"]) == (None, hopeless, "finished")
    assert (document["budget_ms"], document["budget_of"], document["package"]) == (0.001, "worst", None)
    assert [p["id"] for p in document["points"]]
    assert "error" not in document
    assert Path(document["report"]).is_file()
    assert err.endswith(
        f"error: no finished student keeps 0.00100 ms (worst). {hopeless}: fastest measured student: too slow. "
        "Allow more time: --set budget.ms=MS --fork\n"
    )


def test_the_closest_student_was_measured(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "tiny"
    outcome = load_outcome(path)
    measured = min((p for p in outcome.points if p.latency.provenance == "measured"), key=lambda p: p.latency.worst_ms)
    latency = replace(measured.latency, worst_ms=1e-4, expected_ms=1e-4, p99_ms=1e-4, provenance="predicted")
    guess = replace(measured, id="guess", latency=latency, on_front=False)
    write_record(path / "outcome.json", replace(outcome, points=(*outcome.points, guess)))
    assert run(["pareto", "--best-under", "1us"]) == 3
    assert f"the closest is {measured.id} with" in capsys.readouterr().err


def test_a_front_without_a_pick_says_what_came_closest(hopeless: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pareto"]) == 0
    out = capsys.readouterr().out
    assert f"nothing keeps the budget; closest: {hopeless}: fastest measured student: too slow\n" in out
    assert "pick:" not in out
    assert run(["pareto", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["pick"], document["chosen"], document["closest"]) == (None, None, hopeless)


@pytest.mark.usefixtures("here")
def test_a_dry_run_over_budget_names_a_budget_that_would_work(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["search", "tiny.yaml", "--dry-run", "--set", "run.dir=runs/other"]
    assert run([*args, "--budget", "1us"]) == 3
    err = capsys.readouterr().err
    found = re.search(r"the budget is 0\.00100 ms\. Allow more time \(--set (budget\.ms=\S+)\), or use a space", err)
    assert found is not None, err
    assert run([*args, "--set", found[1]]) == 0
    assert "fastest:    " in capsys.readouterr().out
    assert not Path("runs/other").exists()


@pytest.mark.usefixtures("here")
def test_a_dry_run_over_budget_gives_one_error_document(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["search", "tiny.yaml", "--dry-run", "--set", "run.dir=runs/other", "--budget", "1us", "--json"]
    assert run(args) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["exit_code"]) == ("BudgetError", 3)
    assert "the fastest network of this space is predicted to need" in error["message"]


@pytest.mark.usefixtures("here")
def test_a_document_and_a_csv_table_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pareto", "--json", "--format", "csv"]) == 2
    out, err = capsys.readouterr()
    message = "--json and --format csv exclude each other; give one of them"
    assert err == f"error: {message}\n"
    assert json.loads(out) == {"error": {"type": "UsageError", "message": message, "exit_code": 2}}


@pytest.mark.usefixtures("here")
def test_json_as_a_form_and_as_an_option_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    documents = []
    for args in (["--json"], ["--format", "json"], ["--json", "--format", "json"], ["--json", "--format", "table"]):
        assert run(["pareto", *args]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["points"]
    assert all(document == documents[0] for document in documents)


@pytest.mark.usefixtures("here")
def test_a_kind_of_latency_without_a_limit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--of", "p99"]) == 2
    assert capsys.readouterr().err == (
        "error: --of says which latency --best-under limits; give both, such as: --best-under 5ms --of p99\n"
    )
    assert run(["pareto", "--of", "p99"]) == 2
    assert "--best-under 5ms --of p99" in capsys.readouterr().err
    assert run(["export", "--of", "p99", "--student", "any"]) == 2
    assert "--of says which latency --best-under limits" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("of", ["expected", "worst", "p99"])
def test_a_limit_counts_for_the_kind_of_latency_that_is_named(of: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pareto", "--best-under", "5ms", "--of", of, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reason"] == f"best on validation below 5.00 ms ({of}), of equals the fastest"
    assert document["chosen"] == document["points"][0]["id"]
    assert all(point[f"{of}_ms"] <= 5 for point in document["points"])


def test_a_missing_experiment_file_names_the_command_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (["search", "nosuch.yaml"], ["search", "nosuch.yaml", "--dry-run"]):
        assert run(args) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: nosuch.yaml: no such file; ")
        assert err.endswith(". Write one: nas init nosuch.yaml\n")
    assert run(["search", "no such.yaml", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"].endswith("Write one: nas init 'no such.yaml'")
    assert list(tmp_path.iterdir()) == []
