"""A search that is killed at any moment goes on with the same command: nothing lost, nothing done twice, all whole."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from search_examples import Zygote, write_experiment

from nas.core.jsonio import file_sha256, parse_json, read_lines, read_record
from nas.export.manifest import Manifest
from nas.latency.lines import GATE_KEY, OVERHEAD_KEY, REFERENCE_KEY
from nas.latency.table import LatencyTable
from nas.recipe.records import FinishedStudent, ScoredStudent, read_logits
from nas.search.folder import Batch, Chosen, Event, MeasuredExit, RunFolder, TrialRecord
from nas.search.precision import EVENT as MIXED_EVENT
from nas.search.view import load_outcome, load_view

OPEN_FILES = ("final-", "quant", "sensitivity", "confidence-", "weights")
REWRITTEN = (
    "ranges-",
    "quant-",
    "finished.json",
)  # two workers may write the same; further steps are added to a record
LINES = {
    "trials.jsonl": TrialRecord,
    "batches.jsonl": Batch,
    "events.jsonl": Event,
    "chosen.jsonl": Chosen,
    "measured.jsonl": MeasuredExit,
}


@dataclass
class Watch:
    """Looks at the folder of a run after each life, and compares with what it saw before."""

    folder: Path
    scores: dict[Path, tuple[int, int]] = field(default_factory=dict)
    lines: dict[Path, bytes] = field(default_factory=dict)

    def check(self) -> None:
        """All that must hold whenever no search is running."""
        self._everything_can_be_read()
        self._lines_are_only_added()
        self._nothing_is_scored_twice()
        self._table_is_whole()
        self._packages_are_whole()
        run = self.folder / "run"
        if (run / "fingerprint.json").exists():
            assert load_view(run).status in ("interrupted", "finished")

    def _files(self, pattern: str) -> list[Path]:
        return [p for p in self.folder.rglob(pattern) if not any(part.startswith(".") for part in p.parts)]

    def _everything_can_be_read(self) -> None:
        for path in self._files("*.json"):
            parse_json(path.read_text(), str(path))
        for name, kind in LINES.items():
            for path in self._files(f"run/**/{name}"):
                list(read_lines(kind, path))
        numbers = [r.number for r in RunFolder(self.folder / "run").trials()]
        assert numbers == sorted(set(numbers)), "a trial was recorded twice"
        for path in self._files("run/**/measured.jsonl"):
            keys = [m.key for m in read_lines(MeasuredExit, path)]
            assert len(keys) == len(set(keys)), "a finished student was measured twice"
        genotypes = [g for b in RunFolder(self.folder / "run").batches() for g in b.genotypes]
        assert len(genotypes) == len(set(genotypes)), "a candidate was proposed twice"

    def _lines_are_only_added(self) -> None:
        for path in self._files("*.jsonl"):
            now = path.read_bytes()
            before = self.lines.get(path, b"")
            assert now.startswith(before[: before.rfind(b"\n") + 1]), f"{path.name}: lines changed"
            self.lines[path] = now

    def _nothing_is_scored_twice(self) -> None:
        for path in (*self._files("students/*/*.json"), *self._files("students/*/weights.safetensors")):
            if path.suffix == ".json" and "logits_file" in json.loads(path.read_text()):
                assert np.isfinite(read_logits(path.parent, read_record(ScoredStudent, path))).all()
            if path.name.startswith(REWRITTEN) or (path.name.startswith(OPEN_FILES) and not _is_settled(path)):
                continue
            state = (path.stat().st_mtime_ns, path.stat().st_ino)
            assert self.scores.setdefault(path, state) == state, f"{path} was computed twice"

    def _table_is_whole(self) -> None:
        for device in self._files("tables/*/device.json"):
            LatencyTable.read(device.parent)
            for name in ("rows.jsonl", "networks.jsonl"):
                path = device.parent / name
                text = path.read_text() if path.exists() else ""
                keys = [parse_json(line, name)["row"] for line in text.split("\n")[:-1]]
                keys = [k.get("measurement", k)["key"] for k in keys]
                once = [k for k in keys if k not in (OVERHEAD_KEY, REFERENCE_KEY, GATE_KEY)]
                log = self.folder / "log"
                is_drift = log.exists() and "measured anew" in log.read_text()  # networks contradicted the table
                assert is_drift or len(once) == len(set(once)), f"{name}: measured twice"

    def _packages_are_whole(self) -> None:
        for folder in self._files("run/**/packages/*"):
            manifest = read_record(Manifest, folder / "manifest.json")
            for name, sha256 in manifest.files.items():
                assert file_sha256(folder / name) == sha256, f"{folder.name}/{name}"


def _is_settled(path: Path) -> bool:
    """Whether a finalist's record tells of the step that wrote the file; before that it may be written again."""
    record = path.parent / "finished.json"
    if not record.exists():
        return False
    told = {step.precision or "fp32" for step in read_record(FinishedStudent, record).steps}
    kind, _, label = path.stem.partition("-")
    return kind not in ("confidence", "weights") or (label or "fp32") in told


def _counts(folder: Path) -> dict[str, object]:
    """What a run has at its end, whatever its proposals were."""
    run = folder / "run"
    view, trials = load_view(run), RunFolder(run).trials()
    events = [e for name in ("", *(own.device_name for own in view.others)) for e in RunFolder(run, name).events()]
    return {
        "status": view.status,
        "trials": len(trials),
        "states": sorted({r.state for r in trials}),
        "rounds": [r.round for r in trials],
        "events": [e.kind for e in events],
        # Whether a mix of precisions looks worth measuring hangs on the noise of the rows, which kills change.
        "measured": [len(e.pairs) for e in events if e.kind != MIXED_EVENT],
        "students": len(list(run.glob("students/*/finished.json"))),
        "packages": [own.package is not None for own in (view, *view.others)],
        "for all": 0 if view.common is None else len(view.common.packages),
        "study": (run / "study.db").exists(),
        "left": sorted(p.name for p in run.rglob(".*.tmp-*")),
        "owner": (run / "run.owner.json").exists(),
    }


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("settings", "kills_wanted"),
    [
        ((), 9),
        (("search.scorer=standalone", "search.sampler=greybox"), 6),
        (("also_on=[{device: 'simulated:1', ms: 0.0066}]",), 6),
    ],
    ids=["supernet", "standalone and greybox", "two devices"],
)
def test_search_that_is_killed_again_and_again_ends_like_one_that_was_not(
    zygote: Zygote, finished: Path, tmp_path: Path, settings: tuple[str, ...], kills_wanted: int
) -> None:
    whole = finished
    if settings:
        whole = tmp_path / "whole"
        assert zygote.run(tmp_path / "log", write_experiment(whole), *settings).code == 0
    expected = _counts(whole)
    assert (expected["trials"], expected["students"], expected["status"]) == (10, 3, "finished")
    rng = random.Random(20261120)
    kills = runs = 0
    started = time.monotonic()
    while kills < kills_wanted:
        folder = tmp_path / str(runs)
        runs += 1
        experiment, watch = write_experiment(folder), Watch(folder)
        for lives in itertools.count(1):
            life = zygote.start(folder / "log", experiment, *settings)
            # Short lives die in the set-up, long ones far into the work; on a slow machine all of them get longer.
            longest_s = rng.choice((0.4, 2.4)) * 1.05 ** max(0, lives - 30)
            if life.ends_within(rng.uniform(0.02, longest_s)):
                assert life.wait() == 0, life.log.read_text()
                watch.check()
                break
            life.send(signal.SIGKILL)
            code = life.wait()
            if code == 0:  # it ended by itself in the moment before the signal
                watch.check()
                break
            assert code == -signal.SIGKILL
            kills += 1
            assert not life.orphans(), "workers outlived their parent"
            watch.check()
        assert _counts(folder) == expected
        assert load_outcome(folder / "run").wall_s < time.monotonic() - started


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGTERM, "teacher"),
        (signal.SIGHUP, "supernet"),
        (signal.SIGINT, "scoring"),
        (signal.SIGINT, "full distillation"),
    ],
)
def test_first_signal_keeps_the_work_and_names_the_command_that_goes_on(
    zygote: Zygote, tmp_path: Path, number: signal.Signals, stage: str
) -> None:
    experiment, watch = write_experiment(tmp_path), Watch(tmp_path)
    life = zygote.start(tmp_path / "log", experiment)
    assert life.says(f"\n{stage} "), life.log.read_text()
    life.send(number)
    assert life.ends_within(60), life.log.read_text()
    assert life.wait() == 130
    assert not life.orphans()
    log = life.log.read_text()
    assert f"warning: {number.name}: finishing or checkpointing the current step; once more to end now" in log
    resume = f"nas search {tmp_path / 'run' / 'experiment.yaml'}"
    assert f"stopped; finished work is kept. Go on with: {resume}" in log
    watch.check()
    assert load_view(tmp_path / "run").status == "interrupted"
    assert zygote.run(life.log, resume.split()[-1]).code == 0
    watch.check()
    assert load_view(tmp_path / "run").status == "finished"


def test_second_signal_ends_the_run_at_once(zygote: Zygote, tmp_path: Path) -> None:
    """With many epochs of full distillation, which would otherwise be finished up to the end of an epoch."""
    experiment, watch = write_experiment(tmp_path), Watch(tmp_path)
    life = zygote.start(tmp_path / "log", experiment, "distill.epochs=50", "data.train_images=4000")
    assert life.says("\nfull distillation "), life.log.read_text()
    life.send(signal.SIGINT)
    assert life.says("warning: SIGINT")
    life.send(signal.SIGINT)
    assert life.ends_within(10), life.log.read_text()
    assert life.wait() == 130
    assert not life.orphans()
    watch.check()
    assert not (tmp_path / "run" / "run.owner.json").exists()


def test_ctrl_c_on_the_command_line_ends_with_130(zygote: Zygote, tmp_path: Path) -> None:
    """The real command on the real device, with worker processes of its own."""
    experiment = write_experiment(tmp_path)
    life = zygote.start(tmp_path / "log", "search", experiment, what="cli")
    assert life.says("latency table:"), life.log.read_text()
    life.send(signal.SIGINT)
    assert life.ends_within(60), life.log.read_text()
    assert life.wait() == 130
    assert not life.orphans()
    last = life.log.read_text().strip().splitlines()[-1]
    assert last.startswith("interrupted: stopped; finished work is kept. Go on with: nas search ")
