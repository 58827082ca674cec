"""The run folder: who holds it, whose it is, what a kill leaves, what a fork takes along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from search_examples import SPACE, Notes, SimulatedTensorRT, Zygote, write_experiment

from nas.core.errors import RunMismatchError, StorageError
from nas.core.jsonio import read_record, write_record
from nas.core.run import FinishStep
from nas.recipe.records import FinishedStudent
from nas.search.api import run_search
from nas.search.experiment import load_experiment
from nas.search.folder import (
    FINISHED_FILES,
    OWNER_FILE,
    SCORE_KEYS,
    Batch,
    Event,
    Owner,
    RunFolder,
    TrialRecord,
    fork_run,
    is_running,
    is_young,
    open_run,
    settings_diff,
)
from nas.space.space import space_from_plain
from nas.space.yamlio import parse_yaml

MARKS = {"space": "mini 1", "data": "defects 2", "teacher": "resnet 3", "budget": "5 ms (worst)", "seed": "0"}
SETTINGS = "budget: {ms: 5.0}\nteacher: {epochs: 14}\n"


def _open(path: Path, settings: str = SETTINGS, **changed: str) -> RunFolder:
    with open_run(path, {**MARKS, **changed}, settings) as folder:
        return folder


def _record(number: int, state: str = "complete") -> TrialRecord:
    space = space_from_plain(parse_yaml(SPACE, "space"), "space", 10)
    genotype = space.smallest()
    return TrialRecord(number, 1, genotype, space.decode(genotype), state, "tpe", 0.1, top1=0.5)  # type: ignore[arg-type]


def test_same_command_opens_the_folder_again(tmp_path: Path) -> None:
    folder = _open(tmp_path / "run")
    folder.add_trial(_record(0))
    assert _open(tmp_path / "run").trials() == (_record(0),)
    assert (tmp_path / "run" / "experiment.yaml").read_text() == SETTINGS
    assert not (tmp_path / "run" / OWNER_FILE).exists()


def test_folder_of_another_run_is_refused_key_by_key(tmp_path: Path) -> None:
    _open(tmp_path).add_trial(_record(0))
    with pytest.raises(RunMismatchError) as error:
        _open(tmp_path, SETTINGS.replace("14", "20").replace("5.0", "4.0"), teacher="resnet 4", budget="4 ms (worst)")
    assert str(error.value) == (
        f"{tmp_path}: this folder holds a run with other settings:\n"
        "  budget: 5 ms (worst) -> 4 ms (worst)\n"
        "  teacher: resnet 3 -> resnet 4\n"
        "  budget.ms: 5.0 -> 4.0\n"
        "  teacher.epochs: 14 -> 20\n"
        "Go on with the old settings, start anew in another folder (--set run.dir=DIR), or copy what is still valid "
        "into a new run: --fork"
    )
    assert (tmp_path / "experiment.yaml").read_text() == SETTINGS  # untouched
    assert error.value.exit_code == 2


def test_folder_in_which_nothing_was_scored_takes_new_settings(tmp_path: Path) -> None:
    """The first call was refused, say for its budget: mending the budget must not need another folder."""
    folder = _open(tmp_path)
    folder.add_event(Event("first networks", 1.0))
    assert is_young(tmp_path)
    again = _open(tmp_path, budget="6 ms (worst)")
    assert again.events() == ()
    assert json.loads((tmp_path / "fingerprint.json").read_text())["budget"] == "6 ms (worst)"
    again.add_batch(Batch(0, 1, ((0,),), (0.1,), ("first",)))
    assert not is_young(tmp_path)


def test_settings_diff_passes_over_folders_of_results() -> None:
    before = "run: {dir: a}\nsearch: {trials: 9}\nname: x\n"
    assert settings_diff(before, "run: {dir: b}\nsearch: {trials: 9, seed: 1}\nname: x\n") == [
        "  search.seed: (absent) -> 1"
    ]
    assert settings_diff("", "") == []


HOLDER = """
import sys, time
from pathlib import Path
from nas.search.folder import open_run
with open_run(Path(sys.argv[1]), {"space": "mini 1"}, ""):
    print("held", flush=True)
    time.sleep(60)
"""


def test_folder_in_use_says_by_whom_and_a_killed_holder_leaves_it_free(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_running(tmp_path)
        expected = rf"another search is using this run folder \(process {holder.pid} on .+\)\. Wait for it, or choose"
        with pytest.raises(StorageError, match=expected) as error:
            _open(tmp_path)
        assert error.value.exit_code == 6
        holder.kill()
    assert (tmp_path / OWNER_FILE).exists()  # its note stays, but nobody is there
    assert not is_running(tmp_path)
    with open_run(tmp_path, {"space": "mini 1"}, ""):
        assert read_record(Owner, tmp_path / OWNER_FILE).pid == os.getpid()


def test_note_of_an_earlier_process_with_our_number_is_not_us(tmp_path: Path) -> None:
    with open_run(tmp_path, MARKS, ""):
        owner = read_record(Owner, tmp_path / OWNER_FILE)
        assert is_running(tmp_path)
    for changed, expected in (
        (replace(owner, started="1"), False),
        (replace(owner, boot_id="another boot"), False),
        (replace(owner, pid=2**22 + 1), False),
        (replace(owner, host="elsewhere"), True),
        (owner, True),
    ):
        write_record(tmp_path / OWNER_FILE, changed)
        assert is_running(tmp_path) == expected


def test_torn_last_line_is_dropped_kept_aside_and_never_glued_to(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    folder.add_trial(_record(0))
    folder.add_trial(_record(1))
    file = tmp_path / "trials.jsonl"
    whole = file.read_bytes()
    for cut in (1, 10, len(whole) // 4):
        file.write_bytes(whole[:-cut])
        assert [r.number for r in folder.trials()] == [0]
        folder.add_trial(_record(1))
        assert [r.number for r in folder.trials()] == [0, 1]
    assert (tmp_path / "trials.jsonl.torn").read_text().count("\n") == 3


def test_trials_come_by_number_whatever_was_decided_first(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    for number in (1, 2, 0):
        folder.add_trial(_record(number))
    assert [r.number for r in folder.trials()] == [0, 1, 2]


def test_half_written_files_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    _open(tmp_path)
    for name in ("students/a1/.score.json.tmp-x1", ".outcome.json.tmp-9", "packages/.p.tmp-3/model.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    _open(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if ".tmp-" in str(p)) == []


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_folder_that_cannot_be_made_is_named_with_a_way_out(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" if kind == "file" else tmp_path / "file" / "run"
    with pytest.raises(StorageError, match=r"cannot be used as run folder: .* Choose another: --set run\.dir=DIR"):
        _open(path)


UNWRITABLE = """
import os, sys
from pathlib import Path
from nas.core.errors import StorageError
from nas.search.folder import open_run
os.setgid(65534); os.setuid(65534)
try:
    with open_run(Path(sys.argv[1]), {}, ""):
        pass
except StorageError as e:
    print(e)
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody else")
def test_folder_of_somebody_else_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:4]):
        if parent.name.startswith(("pytest", "popen")) or parent == tmp_path:  # popen: one of several test processes
            parent.chmod(0o755)
    answer = subprocess.run(
        [sys.executable, "-c", UNWRITABLE, str(folder)], capture_output=True, text=True, check=False
    )
    assert "cannot be written: Permission denied" in answer.stdout, answer.stderr
    assert "--set run.dir=DIR" in answer.stdout


def _old_run(path: Path) -> None:
    _open(path, **dict.fromkeys((*SCORE_KEYS[1:], "calibration"), "same"), space="one")
    folder = path / "students" / "a1"
    (path / "supernet").mkdir()
    folder.mkdir(parents=True)
    (path / "supernet" / "weights.safetensors").touch()
    for name in ("supernet-0-fp32.json", "standalone-2-int8.json", "score-2.ckpt", ".x.tmp-1"):
        (folder / name).touch()
    for pattern in FINISHED_FILES:
        (folder / pattern.replace("*", "val-fp32.json")).touch()


def _forked(tmp_path: Path, **changed: str) -> set[str]:
    old, new = tmp_path / "old", tmp_path / "new"
    if not old.exists():
        _old_run(old)
    shutil.rmtree(new, ignore_errors=True)
    marks = {**MARKS, **dict.fromkeys((*SCORE_KEYS[1:], "calibration"), "same"), "space": "one", **changed}
    notes = fork_run(old, new, marks)
    assert notes
    return {str(p.relative_to(new)) for p in new.rglob("*") if p.is_file()}


def test_fork_takes_scores_and_finished_students_along(tmp_path: Path) -> None:
    found = _forked(tmp_path, budget="9 ms (worst)", search="200 trials")
    assert found == {
        "supernet/weights.safetensors",
        *(f"students/a1/{n}" for n in ("supernet-0-fp32.json", "standalone-2-int8.json", "score-2.ckpt")),
        *(f"students/a1/{p.replace('*', 'val-fp32.json')}" for p in FINISHED_FILES),
    }


def test_fork_into_another_space_leaves_the_shared_weights_and_their_scores(tmp_path: Path) -> None:
    found = _forked(tmp_path, space="two")
    assert "students/a1/standalone-2-int8.json" in found
    assert not any("supernet" in name for name in found)


def test_fork_with_another_calibration_leaves_the_finished_files(tmp_path: Path) -> None:
    found = _forked(tmp_path, calibration="9 images")
    assert "students/a1/supernet-0-fp32.json" in found
    assert not any("final" in name or "finish" in name or "quant" in name for name in found)


def test_fork_to_a_device_of_another_dialect_takes_fp32_along_and_no_int8(finished: Path, tmp_path: Path) -> None:
    """Weights are not trained again; what its graphs answer, and what was trained for them, is new."""
    for name in ("run", "tables", "cache"):
        shutil.copytree(finished / name, tmp_path / name)
    notes = Notes()
    experiment = load_experiment(write_experiment(tmp_path), ["budget.ms=0.02"])
    view = run_search(experiment, notes, fork=True, device=SimulatedTensorRT(), start_workers="fork")
    assert view.status == "finished"
    (said,) = (line for line in notes.said if "students: " in line)
    assert "without int8 and mixes, which were of graphs of dialect ort; this device reads tensorrt-8.4" in said
    assert json.loads((tmp_path / "run-2" / "fingerprint.json").read_text())["dialect"] == "tensorrt-8.4"
    old, new = (
        {str(p.relative_to(tmp_path / run)): p for p in (tmp_path / run).glob("s*/**/*") if p.is_file()}
        for run in ("run", "run-2")
    )
    copied = {name for name in old.keys() & new.keys() if old[name].stat().st_mtime_ns == new[name].stat().st_mtime_ns}
    assert "supernet/weights.safetensors" in copied
    again = {str(Path(name).parent) for name in old.keys() & new.keys() if name.endswith("/final-val-int8.json")}
    assert again  # finalists of both runs
    for folder in again:
        assert {f"{folder}/{n}" for n in ("weights.safetensors", "quant.json", "final-val-fp32.json")} <= copied
        steps = read_record(FinishedStudent, new[f"{folder}/finished.json"]).steps
        assert [s.precision for s in steps].count("") == 1
        labels = [(s.name, s.precision) for s in steps]
        assert len(labels) == len(set(labels))
    assert not any("int8" in name or "i8" in name or "sensitivity" in name for name in copied)


def test_fork_within_a_dialect_takes_int8_along_and_out_of_it_nothing_unknown(tmp_path: Path) -> None:
    record = FinishedStudent(
        1,
        _record(0).candidate,
        2,
        7.0,
        (FinishStep("distil", 2, 0.5, 4.0), FinishStep("calibrate", 0, 0.4, 1.0, precision="int8")),
    )
    folder = tmp_path / "old" / "students" / "a1"
    _old_run(tmp_path / "old")
    write_record(folder / "finished.json", record)
    (folder / "of-a-later-version.json").touch()
    assert "students/a1/standalone-2-int8.json" in _forked(tmp_path, device="another")
    found = {Path(name).name for name in _forked(tmp_path, dialect="tensorrt-8.4") if name.startswith("students")}
    assert found >= {"supernet-0-fp32.json", "score-2.ckpt", "finished.json", "final-val-fp32.json", "quant.json"}
    assert found.isdisjoint(
        ("standalone-2-int8.json", "sensitivity.json", "quant-val-fp32.json", "of-a-later-version.json")
    )
    kept = read_record(FinishedStudent, tmp_path / "new" / "students" / "a1" / "finished.json")
    assert kept == replace(record, cost_s=6.0, steps=record.steps[:1])


@pytest.mark.parametrize("key", SCORE_KEYS[1:])
def test_fork_takes_nothing_along_when_scores_mean_something_else(tmp_path: Path, key: str) -> None:
    assert _forked(tmp_path, **{key: "changed"}) == set()
    notes = fork_run(tmp_path / "old", tmp_path / "new", {**dict.fromkeys(SCORE_KEYS[1:], "same"), key: "changed"})
    assert notes == [f"nothing: {key} changed, so old scores mean something else"]


def test_fork_of_what_is_no_run_and_onto_what_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"not a run folder \(no fingerprint\.json\)"):
        fork_run(tmp_path / "missing", tmp_path / "new", MARKS)
    _old_run(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").touch()
    with pytest.raises(StorageError, match="exists already; choose another folder"):
        fork_run(tmp_path / "old", tmp_path / "new", MARKS)


def test_forked_search_repeats_no_training(zygote: Zygote, finished: Path, tmp_path: Path) -> None:
    """A larger budget and one more trial: the scores and the finished students of the old run are used again."""
    for name in ("run", "tables", "cache"):
        shutil.copytree(finished / name, tmp_path / name)
    experiment = write_experiment(tmp_path)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("supernet/*")}
    refused = zygote.run(tmp_path / "refused", experiment, "budget.ms=0.007")
    assert refused.code == 2
    assert (
        "budget: 0.0068 ms (worst), margin of 1 deviations, of packages 1.5 -> 0.007 ms"
        in (tmp_path / "refused").read_text()
    )
    life = zygote.run(tmp_path / "log", experiment, "budget.ms=0.007", "--fork")
    log = (tmp_path / "log").read_text()
    assert life.code == 0, log
    assert f"new run folder: {tmp_path / 'run-2'}; go on with it later: --set run.dir={tmp_path / 'run-2'}" in log
    assert "\nsupernet 4/4" not in log
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run-2").glob("supernet/*")} == times
    old, new = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run-2")
    shared = {r.candidate.id for r in old.trials()} & {r.candidate.id for r in new.trials()}
    assert shared  # at least the smallest and the first proposals
    for record in (r for r in new.trials() if r.candidate.id in shared):
        scores = sorted(old.student(record.candidate.arch_id).glob("supernet-*.json"))
        copies = [new.student(record.candidate.arch_id) / score.name for score in scores]
        assert [c.stat().st_mtime_ns for c in copies] == [s.stat().st_mtime_ns for s in scores]


def test_trials_of_a_run_from_before_scores_can_be_read(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    folder.add_trial(replace(_record(0), rung_scores=(0.25, 0.5)))
    file = tmp_path / "trials.jsonl"
    plain = json.loads(file.read_text())
    plain["rung_top1"] = plain.pop("rung_scores")
    del plain["soft_top1"]
    file.write_text(json.dumps(plain) + "\n")
    (found,) = folder.trials()
    assert found.rung_scores == (0.25, 0.5)
    assert found.score == found.top1 == 0.5
