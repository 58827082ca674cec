"""The plan of a search before it runs, what belongs to the identity of a run, and what is prepared once."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from search_examples import Notes, simulated, write_experiment

from nas.core.errors import ConfigError, DeviceError, InterruptedRunError, RunMismatchError
from nas.core.records import DeviceProfile
from nas.core.walk import expand, total_macs
from nas.devices.base import MeasureJob
from nas.devices.board_profile import LOCK_CLOCKS
from nas.latency.interpolate import family_of
from nas.measure.fill import Pace, fill, pace_of
from nas.search.checked import key_paths
from nas.search.experiment import Experiment, load_experiment
from nas.search.folder import RunFolder
from nas.search.plan import DeviceWork, Phase, Plan, check_plan, phases_of, plan_search
from nas.search.prepare import Inputs, fingerprint, load_inputs, open_table, scoring_plan, teacher_latency, worker_count
from nas.testing import SimulatedDevice, mean_model
from nas.train.teacher import Teacher


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device that is opened by name is the simulated one of the finished run."""
    monkeypatch.setattr("nas.search.prepare.open_device", lambda *_: SimulatedDevice())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Space, data and device of an experiment without a run."""
    folder = tmp_path_factory.mktemp("inputs")
    return load_inputs(load_experiment(write_experiment(folder)), Notes(), SimulatedDevice())


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Experiment file beside a copy of the finished run and its table."""
    for name in ("run", "tables"):
        shutil.copytree(finished / name, tmp_path / name)
    return write_experiment(tmp_path, finished / "cache")


def _plan(file: Path, *sets: str) -> Plan:
    return plan_search(load_experiment(file, sets), Notes())


def _phase(plan: Plan, name: str) -> Phase:
    return next(phase for phase in plan.phases if phase.name == name)


def test_plan_of_a_new_run_has_every_row_to_measure_and_makes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan = _plan(file)
    rows = {layer.key for layer in inputs.space.layers()}
    assert (plan.status, plan.scored, plan.differences) == ("new", 0, ())
    assert (set(plan.missing), len(plan.missing), plan.rows) == (rows, len(rows), len(rows))
    assert plan.is_whole_table
    assert (plan.run_dir, plan.device, plan.table) == (
        str(tmp_path / "run"),
        "simulated-0",
        str(tmp_path / "tables" / "simulated-0"),
    )
    assert plan.fastest_ms is None  # nothing is known yet
    assert plan.budget_ms == 0.0068
    assert [phase.name for phase in plan.phases] == [
        "teacher",
        "teacher's answers",
        "latency table",
        "supernet",
        "scores",
        "networks",
        "finalists",
        "robustness",
    ]
    assert _phase(plan, "latency table").what == f"{len(rows)} rows"
    assert _phase(plan, "scores").what == "10 of 10 candidates"
    assert _phase(plan, "networks").what == "7 whole networks on the device"
    check_plan(plan)
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_of_a_finished_run_has_nothing_to_do(copied: Path) -> None:
    plan = _plan(copied)
    assert (plan.status, plan.scored, plan.phases, plan.missing, plan.differences) == ("finished", 10, (), (), ())
    assert plan.about_s == 0
    check_plan(plan)


def test_plan_of_a_begun_run_counts_the_candidates_that_are_left(copied: Path) -> None:
    run = copied.parent / "run"
    (run / "outcome.json").unlink()
    folder = RunFolder(run)
    records = folder.trials()
    (run / "trials.jsonl").unlink()
    for record in records[:3]:
        folder.add_trial(record)
    folder.add_trial(replace(records[3], state="failed", reason="loss is not finite"))  # will be replaced by another
    plan = _plan(copied)
    assert (plan.status, plan.scored, plan.missing) == ("begun", 3, ())
    assert "latency table" not in [phase.name for phase in plan.phases]
    assert _phase(plan, "scores").what == "7 of 10 candidates"


def test_scores_take_no_time_where_all_candidates_are_scored(copied: Path) -> None:
    (copied.parent / "run" / "outcome.json").unlink()
    plan = _plan(copied)
    assert _phase(plan, "scores") == Phase("scores", "0 of 10 candidates", 0.0)
    assert _phase(plan, "finalists").about_s > 0


def test_smallest_network_is_predicted_as_the_device_measures_it(copied: Path, inputs: Inputs) -> None:
    smallest = inputs.space.decode(inputs.space.smallest())
    job = MeasureJob("any", "network", smallest.precision_label, b"", total_macs(smallest))
    plan = _plan(copied)
    assert plan.fastest_ms == pytest.approx(SimulatedDevice(noise=0).latency_ms(job), rel=0.15)


def test_only_rows_that_the_table_lacks_are_counted(inputs: Inputs, tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    own = {layer.key for layer in expand(inputs.space.decode(inputs.space.smallest()))}
    layers = list({layer.key: layer for layer in inputs.space.layers()}.values())
    table = open_table(load_experiment(file), inputs.device.profile)
    others = [layer for layer in layers if layer.key not in own][:4]
    fill(table, inputs.device, others)
    plan = _plan(file)
    assert set(plan.missing) == {layer.key for layer in layers} - {layer.key for layer in others}
    assert plan.fastest_ms is None
    fill(table, inputs.device, [layer for layer in layers if layer.key in own])
    plan = _plan(file)
    assert (plan.rows, len(plan.missing)) == (len(layers), len(layers) - 4 - len(own))
    assert _phase(plan, "latency table").what == f"{len(plan.missing)} rows"
    assert plan.fastest_ms is not None


def test_rows_of_a_space_with_too_many_are_measured_as_candidates_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.search.predictor.WHOLE_TABLE_ROWS", 5)
    plan = _plan(write_experiment(tmp_path))
    assert not plan.is_whole_table
    assert plan.rows > 5
    assert plan.missing == ()  # which ones is not known before the candidates are
    found = re.fullmatch(r"about (\d+) rows, as candidates need them", _phase(plan, "latency table").what)
    assert found is not None
    assert 5 < int(found[1]) <= plan.rows
    with pytest.raises(ConfigError, match=r"search\.sampler: greybox needs the latency of every candidate"):
        _plan(write_experiment(tmp_path), "search.sampler=greybox")
    assert _plan(write_experiment(tmp_path), "search.sampler=greybox", "feedback.max_rows=4").is_interpolated


def test_phases_add_up_and_follow_the_settings(inputs: Inputs) -> None:
    def phases(missing: int = 0, scored: int = 0, *sets: str) -> dict[str, Phase]:
        file = Path(inputs.experiment.space).with_name("experiment.yaml")
        changed = replace(inputs, experiment=load_experiment(file, sets))
        work = [DeviceWork(missing, pace_of("ort", None))]
        return {phase.name: phase for phase in phases_of(changed, work, scored)}

    plain = phases()
    assert phases(20)["latency table"].about_s == pytest.approx(2 * phases(10)["latency table"].about_s)
    assert phases(0, 5)["scores"].about_s == pytest.approx(plain["scores"].about_s / 2)
    assert phases(0, 99)["scores"].about_s == 0
    more = phases(0, 0, "search.workers=4")
    assert more["scores"].about_s == pytest.approx(plain["scores"].about_s / 2)
    assert more["finalists"].about_s == pytest.approx(plain["finalists"].about_s * 2 / 3)  # three students only
    twice = ("distill.epochs=4", "teacher.epochs=4", "finish.qat_epochs=2")
    longer = phases(0, 0, *twice, "supernet.steps=null", "supernet.cpu_seconds=7")
    assert longer["finalists"].about_s == pytest.approx(2 * plain["finalists"].about_s)
    assert longer["teacher"].about_s == pytest.approx(2 * plain["teacher"].about_s)
    assert longer["supernet"].about_s == pytest.approx(7 / 2)  # CPU seconds of two sub-networks side by side
    engines = [DeviceWork(3, Pace(7.0, 20.0)), DeviceWork(2, Pace(None, None))]
    known = {phase.name: phase for phase in phases_of(inputs, engines[:1], 0)}
    networks = inputs.experiment.feedback.engines(inputs.experiment.search.rounds)
    assert (known["latency table"].about_s, known["networks"].about_s) == (21.0, networks * 20.0)
    unknown = Plan("r", "new", 0, "d", "t", 1, (), True, False, None, 1.0, phases_of(inputs, engines, 0), ())
    assert unknown.unknown == ("latency table", "networks") and unknown.about_s > 0
    alone = phases(0, 0, "search.scorer=standalone")
    assert "supernet" not in alone
    assert alone["scores"].about_s > plain["scores"].about_s
    given = phases(0, 0, "teacher.kind=onnx", "teacher.weights=given.onnx")
    assert "teacher" not in given
    plan = Plan("run", "new", 0, "d", "t", 1, (), True, False, None, 1.0, tuple(plain.values()), ())
    assert plan.about_s == pytest.approx(sum(phase.about_s for phase in plain.values()))


def test_a_plan_with_other_settings_than_the_folder_lists_what_differs(copied: Path) -> None:
    plan = _plan(copied, "budget.ms=0.007", "search.seed=3")
    assert [p.what for p in plan.phases if p.name == "scores"] == ["10 of 10 candidates"]  # not those of the other run
    with pytest.raises(RunMismatchError) as error:
        check_plan(plan)
    assert str(error.value) == (
        f"{copied.parent / 'run'}: this folder holds a run with other settings:\n"
        "  budget: 0.0068 ms (worst), margin of 1 deviations, of packages 1.5 -> 0.007 ms (worst), margin of 1 "
        "deviations, of packages 1.5\n"
        "  seed: 4 -> 3\n"
        "Start anew in another folder (--set run.dir=DIR), or keep what is still valid: --fork"
    )


def test_a_folder_in_which_nothing_was_scored_counts_as_new(tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fingerprint.json").write_text(json.dumps({"budget": "another"}))
    plan = _plan(file)
    assert (plan.status, plan.differences) == ("new", ())


# Part of the fingerprint -> settings that change it, and nothing else.
MATTERS = {
    "budget": "budget.ms=9 budget.of=p99 budget.margin_std=0.5 budget.package_margin_std=0 budget.also_ms=[0.001] "
    "budget.total_ms=9",
    "data": "data.train_images=41 data.val_images=41 data.test_images=31 data.seed=1 data.threshold_share=0.4",
    "augmentation": "data.augment.shift=0.1 data.augment.horizontal_flip=false data.augment.vertical_flip=true "
    "data.augment.quarter_turns=true data.augment.brightness=0.1 data.augment.contrast=0.1 data.augment.cutout=0.1 "
    "data.augment.corruptions=[noise] data.augment.corrupted_share=0.2 data.augment.max_severity=5",
    "teacher": "teacher.name=x teacher.weights=given.onnx teacher.pixels=unit teacher.resolution=32 "
    "teacher.widths=[9] teacher.blocks=2 teacher.epochs=3 teacher.batch_size=21 teacher.lr=0.1 "
    "teacher.weight_decay=0.1 teacher.warmup=0.2 teacher.label_smoothing=0.1 teacher.seed=1 "
    'teacher.members=[{"name":"a"}] teacher.files=[{"name":"a","path":"a.npy"}] teacher.weight=2.0 '
    "teacher.average=logits",
    "distillation": "distill.epochs=3 distill.batch_size=21 distill.lr=0.1 distill.weight_decay=0.1 "
    "distill.warmup=0.2 distill.temperature=2.0 distill.alpha=0.5 distill.exit_weights=[0.1] "
    "distill.label_smoothing=0.1 distill.clip_norm=1.0 distill.ema=0.9 distill.variants=3 "
    "distill.recalibration_images=21 distill.assistants=1 distill.hints=1.0 distill.attention=1.0 "
    "distill.attention_maps=1.0 "
    "distill.teacher_layers=[stem] distill.dist_inter=2.0 distill.dist_intra=2.0 distill.dist_temperature=4.0 "
    "distill.self_distillation=0.5 distill.curriculum=0.5 distill.curriculum_start=0.5 distill.mining=0.3 "
    "distill.exit_gradient=0.5",
    "scorer": "search.scorer=standalone supernet.steps=5 supernet.batch_size=12 supernet.random_subnets=2 "
    "supernet.networks_per_step=1 supernet.lr=0.1 supernet.weight_decay=0.1 supernet.warmup=0.2 "
    "supernet.clip_norm=1.0 supernet.seed=1 supernet.latency_weight=0.5",
    "search": "search.trials=11 search.rounds=1 search.batch=4 search.sampler=random search.ladder=3 "
    "search.predictor_candidates=9 search.precision_seeds=2 search.energy=true",
    "enqueued": 'search.enqueue=[{"b.width":12}]',
    "accelerator": "search.accelerator=cuda",
    "seed": "search.seed=1",
    "feedback": "feedback.first_networks=4 feedback.networks_per_round=3 feedback.max_engines=5 feedback.max_rows=9",
    "finish": "finish.students=4 finish.exit_loss=0.01 finish.int8_loss=0.1 finish.precision_ladder=1 "
    "finish.exit_targets=[loss=0.02]",
    "robustness": "finish.robustness=[3]",
    "pruning": "finish.prune=[0.3]",
    "calibration": "finish.calibration_images=17 finish.qat_epochs=3 finish.qat_lr=0.2 finish.qat_least_loss=0.1 "
    "finish.calibrate_confidence=false",
    "foreign table": "run.foreign_table=x",
    "also on": 'also_on=[{"device":"simulated:1","ms":0.01}]',
}
# Where results go, how many processes work, and what another scorer, data set or pruned student would read.
MATTERS_NOT = (
    "name=other run.dir=x run.tables=x run.cache=x search.workers=7 standalone.rungs=[1,3] standalone.keep=0.9 "
    "data.path=x data.val_share=0.2 data.division=order data.max_corrupt_share=0.5 data.download=false "
    "finish.prune_mode=joint finish.prune_importance=l1 finish.prune_epochs=3 finish.prune_lr=0.1 finish.prune_rows=4 "
    "finish.stream_images=7"
)
# Have tests of their own, or enter with their section although they decide no result.
OTHERS = (
    {"space", "device", "data.name", "teacher.kind", "teacher.threads", "teacher.without"}
    | {
        f"budget.{name}"
        for name in ("capture_ms", "preprocess", "postprocess")  # parts of budget.total_ms
    }
    | {f"supernet.{name}" for name in ("cpu_seconds", "checkpoint_steps")}
)


def _marks(inputs: Inputs, *sets: str) -> dict[str, str]:
    experiment = load_experiment(Path(inputs.experiment.space).with_name("experiment.yaml"), sets)
    if any(text.startswith("data.") for text in sets):
        return fingerprint(load_inputs(experiment, Notes(), inputs.device))
    others = tuple(simulated(other.device) for other in experiment.also_on)
    return fingerprint(replace(inputs, experiment=experiment, others=others))


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


@pytest.mark.parametrize("part", MATTERS)
def test_a_setting_that_decides_results_changes_its_part_of_the_fingerprint(inputs: Inputs, part: str) -> None:
    plain = fingerprint(inputs)
    found = {text: _changed(plain, _marks(inputs, text)) for text in MATTERS[part].split()}
    assert found == {text: [part] for text in found}


def test_a_setting_that_decides_no_result_does_not_change_the_fingerprint(inputs: Inputs) -> None:
    plain = fingerprint(inputs)
    for text in MATTERS_NOT.split():
        assert _changed(plain, _marks(inputs, text)) == [], text


def test_every_setting_is_known_to_matter_or_not() -> None:
    """A new setting belongs into one of the lists above, and may have to go into the fingerprint."""
    listed = [text.split("=")[0] for text in " ".join([*MATTERS.values(), MATTERS_NOT]).split()]
    assert len(listed) == len(set(listed))
    keys = set(key_paths(Experiment))
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    assert {*listed, *OTHERS} == keys - sections


def test_the_scorer_that_is_used_decides_which_of_its_settings_matter(inputs: Inputs) -> None:
    alone = _marks(inputs, "search.scorer=standalone")
    for text, expected in (
        ("standalone.rungs=[1,3]", ["scorer"]),
        ("standalone.keep=0.9", ["scorer"]),
        ("supernet.steps=5", []),
    ):
        assert _changed(alone, _marks(inputs, "search.scorer=standalone", text)) == expected


def test_a_contributor_that_is_left_out_shows_in_the_fingerprint_and_its_file_is_not_needed(
    inputs: Inputs, tmp_path: Path
) -> None:
    files = f"teacher.files=[{{name: lab, path: {tmp_path / 'a.npy'}}}, {{name: us, path: {tmp_path / 'b.npy'}}}]"
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(b"one")
    both = _marks(inputs, files)["teacher"]
    assert both.endswith(" with lab, us")
    (tmp_path / "a.npy").write_bytes(b"another content")
    assert _marks(inputs, files)["teacher"] != both
    without = _marks(inputs, files, "teacher.without=[lab]")["teacher"]
    assert without.endswith(" with us, without lab")
    (tmp_path / "a.npy").unlink()
    assert _marks(inputs, files, "teacher.without=[lab]")["teacher"] == without


def test_how_students_are_pruned_matters_where_they_are(inputs: Inputs) -> None:
    pruned = _marks(inputs, "finish.prune=[0.3]")
    for text in MATTERS_NOT.split():
        expected = ["pruning"] if text.startswith("finish.prune_") else []
        assert _changed(pruned, _marks(inputs, "finish.prune=[0.3]", text)) == expected, text


def test_the_content_of_given_weights_matters_and_not_their_name(inputs: Inputs, tmp_path: Path) -> None:
    def marks(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return _marks(inputs, "teacher.kind=onnx", f"teacher.weights={tmp_path / name}")["teacher"]

    first = marks("a.onnx", b"one")
    assert first.startswith("onnx ")
    assert marks("b.onnx", b"one") == first
    assert marks("a.onnx", b"two") != first


def test_another_device_and_another_space_are_other_runs(inputs: Inputs, tmp_path: Path) -> None:
    plain = fingerprint(inputs)
    assert _changed(plain, fingerprint(replace(inputs, device=SimulatedDevice(seed=1)))) == ["device"]
    file = write_experiment(tmp_path)
    space = tmp_path / "mini.yaml"
    space.write_text(space.read_text().replace("kernel_size: [3, 5]", "kernel_size: [3]"))
    assert _changed(plain, fingerprint(load_inputs(load_experiment(file), Notes(), inputs.device))) == ["space"]


class FloatOnly(SimulatedDevice):
    """A device without int8."""

    @property
    def profile(self) -> DeviceProfile:
        return replace(super().profile, precisions=("fp32",))


def test_precisions_that_the_device_does_not_offer_are_dropped_and_told(tmp_path: Path) -> None:
    notes = Notes()
    found = load_inputs(load_experiment(write_experiment(tmp_path)), notes, FloatOnly())
    assert found.space.precisions == ("fp32",)
    assert notes.said == ["simulated-0 does not offer int8: dropped from the space"]


class SaysWhy(FloatOnly):
    """The same, and its profile says why."""

    @property
    def profile(self) -> DeviceProfile:
        return replace(super().profile, details={"without_int8": "no int8 instructions"})


def test_why_a_precision_is_dropped_is_told(tmp_path: Path) -> None:
    notes = Notes()
    load_inputs(load_experiment(write_experiment(tmp_path)), notes, SaysWhy())
    assert notes.said == ["simulated-0 does not offer int8: dropped from the space (no int8 instructions)"]


class Unlocked(SimulatedDevice):
    """A board whose clocks are not locked."""

    @property
    def profile(self) -> DeviceProfile:
        return replace(super().profile, clocks_locked=False, details={LOCK_CLOCKS: "sudo jetson_clocks"})


def test_clocks_that_are_not_locked_are_warned_about_before_a_search(tmp_path: Path) -> None:
    notes = Notes()
    experiment = load_experiment(write_experiment(tmp_path))
    load_inputs(experiment, notes, Unlocked())
    (warning,) = [line for line in notes.warned if "not locked" in line]
    assert "on the board: sudo jetson_clocks;" in warning
    assert f"nas doctor --device {experiment.device} --lock-clocks" in warning


def test_a_table_of_another_device_state_is_refused_with_what_differs(tmp_path: Path) -> None:
    experiment = load_experiment(write_experiment(tmp_path))
    profile = SimulatedDevice().profile
    assert open_table(experiment, profile).folder == tmp_path / "tables" / "simulated-0"
    assert open_table(experiment, profile).profile == profile
    with pytest.raises(DeviceError, match=r"was measured in another device state:\n") as error:
        open_table(experiment, replace(profile, power_mode="15W"))
    assert "power_mode" in str(error.value)
    assert "15W" in str(error.value)
    assert "nas search FILE --set run.tables=DIR" in str(error.value)


def _teacher(sha256: str, model: bytes) -> Teacher:
    return Teacher("small", sha256, "fp32", 0.5, 0.5, 0.0, None, None, 16, lambda images: images, lambda: model)


def test_the_latency_of_a_teacher_is_measured_once_per_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = teacher_latency(_teacher("one", mean_model()), SimulatedDevice(), folder)
    other_device = SimulatedDevice(seed=1)
    assert teacher_latency(_teacher("one", mean_model()), other_device, RunFolder(tmp_path)) == first
    assert [(e.kind, e.values) for e in folder.events()] == [("teacher", {"sha256": "one", "latency_ms": first})]
    another = teacher_latency(_teacher("two", mean_model()), other_device, folder)
    assert another != first
    assert teacher_latency(_teacher("one", mean_model()), other_device, folder) == first
    assert [e.values["sha256"] for e in folder.events()] == ["one", "two"]


def test_a_teacher_that_the_device_cannot_run_is_an_error_and_not_remembered(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the teacher small does not run on simulated-0: not an ONNX model"):
        teacher_latency(_teacher("one", b"\x00not onnx"), SimulatedDevice(), RunFolder(tmp_path))
    assert RunFolder(tmp_path).events() == ()


def test_score_jobs_share_the_training_of_their_scorer(inputs: Inputs, tmp_path: Path) -> None:
    shared = scoring_plan(inputs, RunFolder(tmp_path), "context.json")
    assert (shared.source, shared.rungs, shared.distill) == ("supernet", (0,), inputs.experiment.distill)
    search = replace(inputs.experiment.search, scorer="standalone", workers=3)
    alone = replace(inputs, experiment=replace(inputs.experiment, search=search))
    plan = scoring_plan(alone, RunFolder(tmp_path), "context.json")
    assert (plan.source, plan.rungs, plan.distill.epochs) == ("standalone", (1, 2), 2)
    assert worker_count(alone.experiment) == 3
    assert worker_count(replace(alone.experiment, search=replace(search, workers=0))) >= 1


def test_with_a_limit_of_rows_the_plan_says_which_are_measured_and_that_others_are_interpolated(
    inputs: Inputs, tmp_path: Path
) -> None:
    experiment = write_experiment(tmp_path)
    plan = plan_search(load_experiment(experiment, ["feedback.max_rows=12"]), Notes())
    assert plan.is_interpolated and not plan.is_whole_table
    families = {family_of(layer) for layer in inputs.space.layers()}
    assert 12 <= len(plan.missing) <= 12 + len(families) < plan.rows
    assert f"{len(plan.missing)} rows, the others are interpolated" in [phase.what for phase in plan.phases]
    assert not plan_search(load_experiment(experiment), Notes()).is_interpolated


def test_reading_a_folder_tells_how_far_it_is_and_may_be_stopped_on_the_way(tmp_path: Path) -> None:
    for i in range(160):  # told after each 64
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.pgm"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P5 16 16 255\n" + i.to_bytes(1, "big") * 256)
    experiment = load_experiment(write_experiment(tmp_path), ["data.name=folder", f"data.path={tmp_path / 'photos'}"])
    notes = Notes()
    load_inputs(experiment, notes)
    assert notes.stages.count("data") == 5  # the start, 64, 128 and 160 images, the end

    def stop(_: str) -> None:
        if len(stopped.stages) == 2:
            raise InterruptedRunError("stopped")

    stopped = Notes(on_progress=stop)
    with pytest.raises(InterruptedRunError):
        load_inputs(experiment, stopped)


def test_a_teacher_whose_file_is_missing_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^teacher\.weights: .*no\.onnx is not a file\..*--set teacher\.weights=FILE"
    ):
        _plan(write_experiment(tmp_path), "teacher.kind=onnx", "teacher.weights=no.onnx")
