"""A search for two devices at once: tables, deadlines, fronts and picks of each, and the student for both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from search_examples import Notes, SimulatedTensorRT, Zygote, simulated, write_experiment

from nas.cli.main import run
from nas.core.errors import BudgetError, ConfigError, UsageError
from nas.core.jsonio import write_record
from nas.core.records import DeviceProfile, Measurement
from nas.core.run import FOREIGN_MARK, RunView, latency_of
from nas.core.walk import expand
from nas.devices.base import MeasureJob
from nas.export.package import verify_package
from nas.recipe.standalone import promoted
from nas.report.html import write_report
from nas.report.tables import front_notes
from nas.search.api import run_search
from nas.search.experiment import load_experiment
from nas.search.exporting import export_student
from nas.search.folder import RunFolder
from nas.search.prepare import borrowed_marks, load_inputs
from nas.search.view import load_outcome, load_view
from nas.space.space import load_space
from nas.testing import SimulatedDevice

SECOND = "simulated:1"
FIRST_MS, SECOND_MS = 0.0068, 0.0066
ALSO_ON = f"also_on: [{{device: '{SECOND}', ms: {SECOND_MS}}}]\n"


def write_both(folder: Path, cache: Path | None = None) -> Path:
    file = write_experiment(folder, cache)
    file.write_text(file.read_text() + ALSO_ON)
    return file


@pytest.fixture(scope="module")
def both(zygote: Zygote, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run for two devices."""
    folder = tmp_path_factory.mktemp("both")
    life = zygote.run(folder / "log", write_both(folder, finished / "cache"))
    assert life.code == 0, (folder / "log").read_text()
    return folder


@pytest.fixture(scope="module")
def views(both: Path) -> tuple[RunView, RunView]:
    first = load_view(both / "run")
    (second,) = first.others
    return first, second


def test_each_device_has_a_table_of_its_own(both: Path) -> None:
    rows = {p.name: (p / "rows.jsonl").read_bytes() for p in (both / "tables").iterdir()}
    assert set(rows) == {"simulated-0", "simulated-1"}
    assert rows["simulated-0"] != rows["simulated-1"]


def test_the_sampler_sees_accuracy_and_the_latency_on_each_device(both: Path) -> None:
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{both / 'run' / 'study.db'}")
    assert study.metric_names == ["score", "latency_ms", f"latency_ms on {SECOND}"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert all(t.values[1] != t.values[2] for t in study.trials)


def test_a_candidate_is_trained_when_it_keeps_the_deadline_of_one_device(both: Path) -> None:
    records = RunFolder(both / "run").trials()
    assert all(r.latency_ms <= FIRST_MS or r.elsewhere_ms[0] <= SECOND_MS for r in records)
    assert all(len(r.elsewhere_ms) == 1 for r in records)


def test_networks_are_measured_on_each_device(both: Path, views: tuple[RunView, RunView]) -> None:
    for view, device in zip(views, ("", SECOND), strict=True):
        events = RunFolder(both / "run", device).events()
        assert [e.kind for e in events if e.kind != "teacher"] == [
            *("first networks", "round", "round"),
            "mixed networks",
        ]
        assert len(view.predictions) >= 3
    assert {p.measured_ms for p in views[0].predictions}.isdisjoint(p.measured_ms for p in views[1].predictions)


def test_each_device_has_a_front_and_a_pick_that_keeps_its_deadline(views: tuple[RunView, RunView]) -> None:
    for view, name, budget_ms in zip(views, ("cpu", SECOND), (FIRST_MS, SECOND_MS), strict=True):
        assert (view.device_name, view.budget_ms, view.status) == (name, budget_ms, "finished")
        assert view.pick_id is not None
        pick = view.point(view.pick_id)
        assert pick.on_front
        assert latency_of(pick.latency, "worst") <= budget_ms
        assert view.package is not None
        assert view.package.student == view.pick_id
        assert view.teacher is not None
    assert views[0].teacher.latency_ms != views[1].teacher.latency_ms  # type: ignore[union-attr]
    assert f"--on {SECOND}" in views[1].commands[0]
    assert f"--on {SECOND}" in views[1].points[0].export_command


def test_what_may_be_on_one_front_is_measured_on_both_devices(views: tuple[RunView, RunView]) -> None:
    measured = [{p.id for p in view.points if p.latency.provenance == "measured"} for view in views]
    assert measured[0] == measured[1] != set()
    times = [{p.id: p.latency.worst_ms for p in view.points} for view in views]
    assert all(times[0][i] != times[1][i] for i in measured[0])


def test_the_student_for_all_keeps_every_deadline_with_the_same_file(views: tuple[RunView, RunView]) -> None:
    common = views[0].common
    assert common is not None
    assert common.student is not None
    for view in views:
        assert latency_of(view.point(common.student).latency, "worst") <= (view.budget_ms or 0)
    manifests = [verify_package(Path(p.path)).package.manifest for p in common.packages]
    assert [m.latency.device.name for m in manifests] == ["simulated-0", "simulated-1"]
    assert [m.budget_ms for m in manifests] == [FIRST_MS, SECOND_MS]
    assert len({m.files["model.onnx"] for m in manifests}) == 1
    assert all(m.verdict != "over_budget" for m in manifests)
    assert f"of {FIRST_MS:g} ms on cpu" in common.reason
    assert f"of {SECOND_MS:g} ms on {SECOND}" in common.reason


def test_a_finished_run_shows_its_result_again_and_repeats_nothing(both: Path) -> None:
    before = _files(both / "run")
    notes = Notes()
    again = run_search(
        load_experiment(both / "run" / "experiment.yaml"),
        notes,
        device=SimulatedDevice(),
        others=[simulated(SECOND)],
    )
    assert again.common == load_view(both / "run").common
    assert _files(both / "run") == before
    assert notes.said == [f"{both / 'run'}: this run is finished; showing its result"]


def _files(folder: Path) -> Mapping[str, int]:
    volatile = {"clock.json", "experiment.yaml", "space.yaml", "run.lock"}
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in volatile}


@pytest.mark.parametrize("place", ["after the further device's round", "before the packages"])
def test_a_search_that_was_stopped_between_two_devices_measures_nothing_twice(
    zygote: Zygote, finished: Path, both: Path, tmp_path: Path, place: str
) -> None:
    """What was there at that moment is put together from the finished run."""
    file = write_both(tmp_path, finished / "cache")
    shutil.copytree(both / "tables", tmp_path / "tables")
    shutil.copytree(both / "run", tmp_path / "run")
    main, further = tmp_path / "run", RunFolder(tmp_path / "run", SECOND).device_path
    if place == "before the packages":
        for folder in (main, further):
            shutil.rmtree(folder / "packages")
            (folder / "package.json").unlink()
        outcome = load_outcome(main)
        write_record(main / "outcome.json", replace(outcome, common=replace(outcome.common, packages=())))  # type: ignore[type-var]
    else:
        for folder in (main, further):
            shutil.rmtree(folder / "packages")
            (folder / "package.json").unlink()
            (folder / "outcome.json").unlink()
        (main / "chosen.jsonl").unlink()
        lines = (main / "events.jsonl").read_text().splitlines(keepends=True)
        (main / "events.jsonl").write_text("".join(x for x in lines if '"round":2' not in x.replace(" ", "")))
    rows = (tmp_path / "tables" / "simulated-1" / "rows.jsonl").read_bytes()
    before = (further / "events.jsonl").read_bytes()
    life = zygote.run(tmp_path / "log", file)
    assert life.code == 0, (tmp_path / "log").read_text()
    assert (further / "events.jsonl").read_bytes() == before
    assert (tmp_path / "tables" / "simulated-1" / "rows.jsonl").read_bytes() == rows
    again = load_view(main)
    assert [e.kind for e in RunFolder(main).events() if e.kind == "round"] == ["round", "round"]
    assert again.common is not None
    assert len(again.common.packages) == 2
    assert all((Path(p.path) / "manifest.json").exists() for p in again.common.packages)


def test_when_no_file_keeps_every_deadline_the_student_for_all_is_none_and_the_picks_stay(
    both: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(both / "run", folder, ignore=shutil.ignore_patterns("packages"))
    outcome = load_outcome(folder)
    assert outcome.common is not None
    write_record(folder / "outcome.json", replace(outcome, common=replace(outcome.common, packages=())))
    (folder / "devices" / "simulated-1" / "package.json").unlink()
    (folder / "package.json").unlink()
    slow = SimulatedDevice(1, noise=0.1, network_factor=99.0)
    notes = Notes()
    experiment = load_experiment(folder / "experiment.yaml", [f"run.dir={folder}"])
    view = run_search(experiment, notes, device=SimulatedDevice(), others=[slow])
    assert view.common is not None
    assert (view.common.student, view.common.packages) == (None, ())
    assert view.common.reason.startswith("no exported file keeps the deadline of every device; tried: ")
    assert view.pick_id is not None
    assert view.others[0].pick_id is None
    assert view.others[0].closest_reason == "its exported file, and those of all others, were measured above the budget"


def test_each_device_has_a_page_of_the_report_and_they_link_to_each_other(
    views: tuple[RunView, RunView], tmp_path: Path
) -> None:
    page = write_report(views[0], tmp_path)
    texts = {p.name: p.read_text() for p in tmp_path.glob("*.html")}
    assert page.name == "index.html"
    assert set(texts) == {"index.html", "on-simulated-1.html"}
    for text in texts.values():
        assert 'href="on-simulated-1.html"' in text
        assert 'href="index.html"' in text
        assert "for all devices" in text
    assert texts["index.html"].count("aria-current") == texts["on-simulated-1.html"].count("aria-current")
    assert "simulated-1" in texts["on-simulated-1.html"]


def test_the_front_of_each_device_is_shown_by_its_name(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name in ("cpu", SECOND):
        assert run(["pareto", str(both / "run"), "--on", name, "--json"]) == 0
        shown[name] = json.loads(capsys.readouterr().out)
    assert [shown[n]["budget_ms"] for n in shown] == [FIRST_MS, SECOND_MS]
    assert shown["cpu"]["common"] == shown[SECOND]["common"] is not None
    times = [{p["id"]: p["worst_ms"] for p in shown[n]["points"]} for n in shown]
    assert all(times[0][i] != times[1][i] for i in times[0].keys() & times[1].keys())
    assert run(["pareto", str(both / "run"), "--on", "gpu"]) == 2
    assert f"(its devices: cpu, {SECOND})" in capsys.readouterr().err


def test_a_student_is_exported_for_the_device_that_is_named(both: Path, tmp_path: Path) -> None:
    student = load_outcome(both / "run", SECOND).pick_id
    package = export_student(
        both / "run", Notes(), student=student, on=SECOND, device=simulated(SECOND), out=tmp_path / "p"
    )
    assert package.manifest.latency.device.name == "simulated-1"
    assert package.manifest.budget_ms == SECOND_MS


@pytest.mark.parametrize("largest_rows", [0, 2000])
def test_a_network_that_one_device_cannot_run_is_left_out(
    finished: Path, tmp_path: Path, largest_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest network is an end of the space and comes first wherever it can run; for both ways to fill a table."""
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", largest_rows)
    experiment = load_experiment(
        write_both(tmp_path, finished / "cache"), ["budget.ms=0.05", f"also_on=[{{device: '{SECOND}', ms: 0.05}}]"]
    )
    space = load_space(Path(experiment.space), 10)
    lost = expand(space.decode(space.largest()))[1].key

    class Lacking(SimulatedDevice):
        def _measurement(self, job: MeasureJob) -> Measurement:
            m = super()._measurement(job)
            return m if job.key != lost else replace(m, latency_ms=None, session_ms=(), error="not supported")

    view = run_search(
        experiment,
        Notes(),
        device=SimulatedDevice(),
        others=[Lacking(1, noise=0.1)],
        start_workers="fork",
    )
    assert view.status == "finished"
    records = RunFolder(tmp_path / "run").trials()
    assert records
    assert all(lost not in {x.key for x in expand(r.candidate)} for r in records)


@pytest.mark.parametrize("of", ["expected", "p99"])
def test_deadlines_on_the_mean_and_the_tail_are_kept_on_both_devices(
    zygote: Zygote, finished: Path, tmp_path: Path, of: str
) -> None:
    life = zygote.run(tmp_path / "log", write_both(tmp_path, finished / "cache"), f"budget.of={of}")
    assert life.code == 0, (tmp_path / "log").read_text()
    view = load_view(tmp_path / "run")
    for own in (view, *view.others):
        assert own.pick_id is not None
        assert latency_of(own.point(own.pick_id).latency, own.budget_of) <= (own.budget_ms or 0)
    assert view.common is not None
    if view.common.student is not None:
        ids = [{p.id for p in own.points} for own in (view, *view.others)]
        assert all(view.common.student in known for known in ids)


def test_a_further_device_of_another_dialect_says_whose_int8_its_accuracies_are(finished: Path, tmp_path: Path) -> None:
    """At the start, and beside its front; the first device says nothing."""
    whose = "those of simulated-0, by graphs of dialect ort; simulated-1-trt reads graphs of dialect tensorrt-8.4"
    small = ["search.trials=4", "search.rounds=1", "finish.students=1", "finish.robustness=[]", "budget.ms=0.05"]
    small.append(f"also_on=[{{device: '{SECOND}', ms: 0.05}}]")
    experiment = load_experiment(write_both(tmp_path, finished / "cache"), small)
    notes, others = Notes(), [SimulatedTensorRT(1, noise=0.1)]
    view = run_search(experiment, notes, device=SimulatedDevice(), others=others, start_workers="fork")
    start = "also_on: accuracies, exit thresholds and quantization-aware training in int8 on simulated-1-trt are "
    assert [w for w in notes.warned if w.startswith("also_on")] == [
        f"{start}{whose}. Only a search with it as `device` gives its own"
    ]
    said = f"accuracies and thresholds in int8 are {whose}"
    assert [said in front_notes(own) for own in (view, *view.others)] == [False, True]
    page = write_report(view, tmp_path)
    texts = {p.name: p.read_text() for p in page.parent.glob("*.html")}
    assert {name for name, text in texts.items() if said in text} == {"on-simulated-1.html"}


def test_devices_of_one_dialect_and_spaces_without_int8_share_their_accuracies(finished: Path, tmp_path: Path) -> None:
    class Float(SimulatedTensorRT):
        @property
        def profile(self) -> DeviceProfile:
            return replace(super().profile, precisions=("fp32",))

    experiment = load_experiment(write_both(tmp_path, finished / "cache"))
    for devices in ([SimulatedDevice(), Float(1)], [SimulatedTensorRT(), SimulatedTensorRT(1)]):
        notes = Notes()
        inputs = load_inputs(experiment, notes, devices[0], devices[1:])
        assert notes.warned == []
        assert borrowed_marks(inputs, devices[1].profile) == {}


def test_scores_are_kept_when_a_device_is_added(zygote: Zygote, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(finished / "tables", tmp_path / "tables")
    file = write_both(tmp_path, finished / "cache")
    refused = zygote.run(tmp_path / "refused", file)
    assert refused.code == 2
    assert f"also on: (absent) -> {SECOND_MS:g} ms on simulated-1" in (tmp_path / "refused").read_text()
    life = zygote.run(tmp_path / "log", file, "--fork")
    assert life.code == 0, (tmp_path / "log").read_text()
    view = load_view(tmp_path / "run-2")
    assert [own.status for own in (view, *view.others)] == ["finished", "finished"]
    assert "students: " in (tmp_path / "log").read_text()


def test_further_deadlines_and_borrowed_rows_are_those_of_the_first_device(
    zygote: Zygote, finished: Path, tmp_path: Path
) -> None:
    """The first device is in another state than the table it borrows from."""
    shutil.copytree(finished / "tables" / "simulated-0", tmp_path / "other")
    stored = tmp_path / "other" / "device.json"
    stored.write_text(stored.read_text().replace('"power_mode": "none"', '"power_mode": "slow"'))
    file = write_both(tmp_path, finished / "cache")
    life = zygote.run(tmp_path / "log", file, f"run.foreign_table={tmp_path / 'other'}", "budget.also_ms=[0.0062]")
    assert life.code in (0, 3), (tmp_path / "log").read_text()
    view = load_view(tmp_path / "run")
    assert FOREIGN_MARK in view.provenance
    assert FOREIGN_MARK not in view.others[0].provenance
    assert [pick.budget_ms for pick in view.also] == [0.0062]
    assert view.others[0].also == ()


def test_a_device_that_the_run_is_not_for_is_refused_with_those_that_it_is_for(both: Path) -> None:
    with pytest.raises(
        UsageError, match=r"not for device 'simulated:2'; did you mean 'simulated:1'\? \(its devices: cpu"
    ):
        load_view(both / "run", "simulated:2")


def test_a_deadline_that_nothing_keeps_on_the_second_device_ends_the_search_before_any_training(
    finished: Path, tmp_path: Path
) -> None:
    experiment = load_experiment(
        write_both(tmp_path, finished / "cache"), [f"also_on=[{{device: '{SECOND}', ms: 0.0001}}]"]
    )
    problem = r"no candidate of space mini-16 keeps 0.0001 ms \(worst\) on simulated-1; .* \(in also_on \{device: "
    with pytest.raises(BudgetError, match=problem):
        run_search(experiment, Notes(), device=SimulatedDevice(), others=[simulated(SECOND)])
    assert not (tmp_path / "run" / "trials.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("{device: cpu, ms: 1}", r"also_on: device 'cpu' appears twice"),
        ("{device: 'simulated:1', ms: 1}, {device: 'simulated-1', ms: 1}", r"device 'simulated:1' appears twice"),
        ("{device: x, ms: 0}", r"also_on\[0\]: ms must be positive, got 0"),
        (
            "{devise: x, device: x, ms: 1}",
            r"also_on\[0\].devise: unknown key; did you mean 'device'\? \(keys: device, ms\)",
        ),
        ("{device: x}", r"also_on\[0\].ms: is missing; it is: milliseconds of one inference"),
        ("cpu:2", r"also_on\[0\]: expected a mapping with keys such as device, ms, got \"cpu:2\""),
        ("{device: x, ms: 3 parsec}", r"also_on\[0\].ms: .*3 parsec"),
    ],
)
def test_a_mistake_in_a_further_device_is_told_with_its_place(tmp_path: Path, given: str, problem: str) -> None:
    with pytest.raises((ConfigError, UsageError), match=problem):
        load_experiment(write_experiment(tmp_path), [f"also_on=[{given}]"])


def test_deadlines_of_further_devices_may_have_units(tmp_path: Path) -> None:
    experiment = load_experiment(write_experiment(tmp_path), ["also_on=[{device: x, ms: 800us}]"])
    assert experiment.budget_on("x").ms == pytest.approx(0.8)
    assert experiment.budget_on("") is experiment.budget


def test_the_latency_that_counts_for_promotion_is_that_of_every_device() -> None:
    top1 = [0.9, 0.8, 0.8, 0.7]
    assert sorted(promoted(top1, [4.0, 2.0, 3.0, 1.0], 3)) == [0, 1, 3]
    on_both = np.array([[4.0, 4.0], [2.0, 3.0], [3.0, 2.0], [2.5, 3.5]])
    assert sorted(promoted(top1, on_both, 3)) == [0, 1, 2]  # the last one is slower than the second on both


def test_resolved_settings_name_the_further_devices(both: Path) -> None:
    resolved = load_experiment(both / "run" / "experiment.yaml")
    assert [(o.device, o.ms) for o in resolved.also_on] == [(SECOND, SECOND_MS)]
