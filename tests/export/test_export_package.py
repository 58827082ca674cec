import ast
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_networks import (
    MEAN,
    PROFILE,
    STD,
    network_input,
    optimised_counts,
    run,
    small_candidate,
    smooth_images,
    time_models,
)
from PIL import Image

from nas.compress.calibrate import calibrate
from nas.core.errors import DeviceError, RecordError, UsageError
from nas.core.jsonio import file_sha256
from nas.core.records import Candidate, Measurement
from nas.export.check import PackageError, checked_model
from nas.export.forms import deployed_layers
from nas.export.graph import network_model, random_weights, tensors_model
from nas.export.manifest import ArtefactAccuracy
from nas.export.package import (
    Instruments,
    PackagePlan,
    export_package,
    measured_accuracy,
    verify_package,
)

CLASSES = ("fine", "scratch | <b>", "Loch größer", "=cmd", "dent")
LABELS = np.arange(40) % 5
TEST_IMAGES = smooth_images(40, 32, 1)


def instruments(exits: int = 2) -> Instruments:
    return Instruments(
        run=run,
        measure_accuracy=lambda model: measured_accuracy(run, model, TEST_IMAGES, LABELS, exits=exits),
        measure_latency=time_models,
        device=PROFILE,
        op_counts=executed_ops,
    )


def executed_ops(model: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        return optimised_counts(model, folder)


def plan(candidate: Candidate, form: str = "if", **changes: object) -> PackagePlan:
    return PackagePlan(
        "tiny", candidate, form, CLASSES, MEAN, STD, provenance={"run": "r1", "data set": "waves"}, **changes
    )


def export(folder: Path, precision: str = "fp32", form: str = "if", **changes: object) -> Path:
    candidate = small_candidate(precision)
    weights = random_weights(candidate, 0)
    quant = None
    if precision == "int8":
        quant = calibrate(run, *tensors_model(candidate, weights, MEAN, STD), smooth_images(64, 32, 3))
    export_package(folder, plan(candidate, form, **changes), weights, quant, smooth_images(20, 32, 9), instruments())
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("packages") / "tiny")


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "tiny"))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def python(folder: Path, *arguments: str, isolated: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a script of a package as a user would, far away from this project."""
    options = ["-I"] if isolated else []
    return subprocess.run(
        [sys.executable, *options, str(folder / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={"PATH": os.environ["PATH"], "HOME": str(folder.parent), "LC_ALL": "C.UTF-8"},
        timeout=60,
        check=False,
    )


class TestExport:
    @pytest.mark.parametrize(("precision", "form"), [("fp32", "plain"), ("int8", "if"), ("int8", "plain")])
    def test_round_trip_verifies_and_states_what_was_measured(self, tmp_path: Path, precision: str, form: str) -> None:
        folder = export(tmp_path / "p", precision, form, budget_ms=1e6, reference_top1=0.0)
        found = verify_package(folder, run)
        assert found.passed and found.parity is not None and found.parity.relative_l2 == 0.0
        manifest = found.package.manifest
        assert manifest.is_good and manifest.precision == precision and manifest.form == form
        assert manifest.accuracy.images == 40 and manifest.latency.device == PROFILE
        assert [p.exit_index for p in manifest.latency.paths] == ([2] if form == "plain" else [0, 1, 2])
        assert manifest.latency.figures.provenance == "measured"
        assert manifest.latency.figures.worst_ms >= manifest.latency.figures.expected_ms > 0
        assert manifest.parity.images == 16
        assert manifest.convolutions == sum(len(x.convolutions) for x in deployed_layers(small_candidate(), form))
        assert manifest.integer_convolutions == (manifest.convolutions if precision == "int8" else 0)
        if precision == "int8":
            assert manifest.calibration_images == 64 and 0 < manifest.parity.float_relative_l2 < 0.5
        model = onnx.load(folder / "model.onnx")
        assert [i.name for i in model.graph.input] == [i.name for i in manifest.inputs]
        assert [o.name for o in model.graph.output] == [o.name for o in manifest.outputs]

    def test_holds_the_model_that_was_measured(self, package: Path) -> None:
        candidate = small_candidate()
        written = network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="if")
        assert (package / "model.onnx").read_bytes() == written
        assert (package / "labels.txt").read_text().splitlines() == list(CLASSES)
        listed = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
        assert listed == {*manifest_of(package)["files"], "manifest.json"}

    def test_over_budget_is_not_called_good(self, tmp_path: Path) -> None:
        manifest = verify_package(export(tmp_path / "p", budget_ms=1e-6, reference_top1=1.0)).package.manifest
        assert manifest.verdict == "over_budget" and not manifest.is_good
        assert manifest.reasons[0].endswith("ms is above the budget of 1e-06 ms")
        assert "points below 100.00 %; allowed: 0.00" in manifest.reasons[1]
        assert "OVER BUDGET" in (tmp_path / "p" / "README.md").read_text()

    def test_lost_accuracy_is_not_called_good(self, tmp_path: Path) -> None:
        manifest = verify_package(
            export(tmp_path / "p", budget_ms=1e6, reference_top1=1.0, max_loss=0.01)
        ).package.manifest
        assert manifest.verdict == "accuracy_loss" and len(manifest.reasons) == 1
        assert verify_package(export(tmp_path / "q", reference_top1=1.0, max_loss=1.0)).package.manifest.is_good

    def test_card_names_the_device_and_quotes_foreign_text(self, package: Path) -> None:
        card = (package / "README.md").read_text()
        assert card.startswith("---\npipeline_tag: image-classification\n")
        assert "test board, ort " in card and "power mode none, clocks not locked; batch 1, fp32" in card
        assert "scratch \\| &lt;b&gt;" in card and "<b>" not in card
        assert "`threshold_0` = 0.5" in card and "**MEASURED: no budget and no accuracy limit was given**" in card
        table = card[card.index("| image leaves at") :].split("\n\n")[0].splitlines()
        assert len(table) == 5 and {row.count("|") for row in table} == {7}

    def test_existing_folder_is_kept_unless_overwriting_is_allowed(self, copy: Path) -> None:
        candidate = small_candidate()
        before = (copy / "manifest.json").read_bytes()
        arguments = (random_weights(candidate, 5), None, smooth_images(16, 32), instruments())
        with pytest.raises(UsageError, match="exists already; export to another folder"):
            export_package(copy, plan(candidate), *arguments)
        assert (copy / "manifest.json").read_bytes() == before
        export_package(copy, plan(candidate), *arguments, overwrite=True)
        assert (copy / "manifest.json").read_bytes() != before
        assert verify_package(copy, run).passed
        assert [p.name for p in copy.parent.iterdir()] == ["tiny"]

    def test_failed_measurement_leaves_nothing(self, tmp_path: Path) -> None:
        def broken(models: Sequence[bytes]) -> list[Measurement]:
            return [replace(m, latency_ms=None, error="device is gone") for m in time_models(models)]

        candidate = small_candidate()
        with pytest.raises(DeviceError, match="could not be measured: device is gone"):
            export_package(
                tmp_path / "p",
                plan(candidate),
                random_weights(candidate, 0),
                None,
                smooth_images(16, 32),
                replace(instruments(), measure_latency=broken),
            )
        assert list(tmp_path.iterdir()) == []

    def test_wrong_inputs_are_explained(self, tmp_path: Path) -> None:
        candidate = small_candidate()
        weights = random_weights(candidate, 0)
        with pytest.raises(
            UsageError, match=r"parity images must be uint8 \[N, 32, 32, 3\], got uint8 \[4, 24, 24, 3\]"
        ):
            export_package(tmp_path / "p", plan(candidate), weights, None, smooth_images(4, 24), instruments())
        with pytest.raises(UsageError, match="2 class names for 5 classes"):
            PackagePlan("x", candidate, "plain", ("a", "b"), MEAN, STD)
        with pytest.raises(UsageError, match=r"class name 'a\\nb' is empty or has a line break"):
            PackagePlan("x", candidate, "plain", ("a\nb", "b", "c", "d", "e"), MEAN, STD)
        shares = replace(instruments(), measure_accuracy=lambda _: ArtefactAccuracy(0.5, 40, "test", (0.5, 0.5)))
        with pytest.raises(UsageError, match="expected 3 exit shares"):
            export_package(tmp_path / "p", plan(candidate), weights, None, smooth_images(4, 32), shares)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_export_package import *
calls = 0
def run_then_die(model, images):
    global calls
    calls += 1
    if calls == {fatal}:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(model, images)
candidate = small_candidate()
fatal = replace(instruments(), run=run_then_die)
export_package(
    Path({folder!r}), plan(candidate), random_weights(candidate, 7), None, smooth_images(16, 32), fatal, overwrite=True
)
"""


def killed_export(folder: Path, fatal_call: int) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), fatal=fatal_call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


class TestKill:
    def test_between_staging_and_renaming_leaves_no_package(self, tmp_path: Path) -> None:
        folder = tmp_path / "tiny"
        killed_export(folder, 2)  # the second run is the check of the staged, complete folder
        (staged,) = tmp_path.iterdir()
        assert not folder.exists() and staged.name.startswith(".pkg.tmp-tiny-")
        assert (staged / "manifest.json").exists() and verify_package(staged, run).passed
        export(folder)
        assert [p.name for p in tmp_path.iterdir()] == ["tiny"]  # the leftover is gone
        assert verify_package(folder, run).passed

    def test_keeps_the_old_package(self, copy: Path) -> None:
        before = manifest_of(copy)
        killed_export(copy, 2)
        assert manifest_of(copy) == before and verify_package(copy, run).passed

    def test_old_package_moved_away_comes_back(self, copy: Path) -> None:
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        old = copy.with_name(f".pkg.tmp-tiny-{int(dead.stdout)}-abc-old")
        copy.rename(old)
        candidate = small_candidate()
        broken = replace(instruments(), run=lambda _, images: [np.zeros((len(images), 5)), np.zeros(len(images))])
        with pytest.raises(PackageError, match="does not reproduce its own outputs"):
            # the logits are zero and the check asks for a norm: an export that fails after cleaning up
            export_package(
                copy, plan(candidate), random_weights(candidate, 0), None, smooth_images(16, 32), broken, overwrite=True
            )
        assert verify_package(copy, run).passed and [p.name for p in copy.parent.iterdir()] == ["tiny"]


class TestVerify:
    def test_every_file_is_protected(self, package: Path, tmp_path: Path) -> None:
        for name in manifest_of(package)["files"]:
            folder = Path(shutil.copytree(package, tmp_path / name.replace("/", "-")))
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            (folder / name).write_bytes(data)
            with pytest.raises(PackageError, match=f"{name} was changed after the export"):
                verify_package(folder)
            (folder / name).unlink()
            with pytest.raises(PackageError, match=f"{name} is missing"):
                verify_package(folder)

    @pytest.mark.parametrize(
        "name", ["../secret", "/etc/passwd", "a/../../b", "C:evil", "a\\b", "", "parity//x", "./x"]
    )
    def test_paths_out_of_the_folder_are_refused(self, copy: Path, name: str) -> None:
        changed = manifest_of(copy)
        changed["files"][name] = "0" * 64
        (copy / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(PackageError, match="only plain relative paths are allowed"):
            verify_package(copy)

    def test_links_are_refused(self, copy: Path, tmp_path: Path) -> None:
        target = tmp_path / "model.onnx"
        (copy / "model.onnx").rename(target)
        (copy / "model.onnx").symlink_to(target)
        with pytest.raises(PackageError, match=r"model\.onnx is a symbolic link"):
            verify_package(copy)

    def test_linked_folder_is_refused(self, copy: Path, tmp_path: Path) -> None:
        (copy / "parity").rename(tmp_path / "elsewhere")
        (copy / "parity").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(PackageError, match="is a symbolic link"):
            verify_package(copy)

    def test_unlisted_file_is_refused(self, copy: Path) -> None:
        (copy / "numpy.py").write_text("print('imported beside infer.py')")
        with pytest.raises(PackageError, match=r"numpy\.py is not listed in manifest\.json"):
            verify_package(copy)

    def test_file_taken_off_the_list_is_missed(self, copy: Path) -> None:
        changed = manifest_of(copy)
        del changed["files"]["model.onnx"]
        (copy / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(PackageError, match=r"model\.onnx is not listed"):
            verify_package(copy)

    def test_other_outputs_do_not_pass(self, package: Path) -> None:
        found = verify_package(package, lambda m, x: [o * 1.1 if o.dtype == np.float32 else o for o in run(m, x)])
        assert found.parity is not None and found.parity.relative_l2 == pytest.approx(0.1, rel=1e-3)
        assert not found.passed and not verify_package(package).passed

    def test_folder_without_manifest_is_no_package(self, tmp_path: Path) -> None:
        with pytest.raises(PackageError, match=r"not a package \(no manifest\.json\)"):
            verify_package(tmp_path)

    def test_later_schema_is_refused_with_the_reason(self, copy: Path) -> None:
        changed = manifest_of(copy)
        changed["schema_version"] = 3
        (copy / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(RecordError, match="schema version 3; this program reads versions 1 to 2"):
            verify_package(copy)


class TestModelCheck:
    def model(self) -> onnx.ModelProto:
        candidate = small_candidate()
        return onnx.load_from_string(network_model(candidate, random_weights(candidate, 0), MEAN, STD, form="if"))

    def test_external_data_in_a_branch_is_refused(self) -> None:
        model = self.model()
        gate = next(n for n in model.graph.node if n.op_type == "If")
        tail = next(a.g for a in gate.attribute if a.name == "else_branch")
        tail.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        tail.initializer[0].external_data.add(key="location", value="../../etc/passwd")
        with pytest.raises(PackageError, match=r"m: 'after_0/.*' lies in another file"):
            checked_model(model.SerializeToString(), "m")

    def test_foreign_operators_are_refused(self) -> None:
        model = self.model()
        model.opset_import.add(domain="evil.ops", version=1)
        with pytest.raises(PackageError, match=r"operators of 'evil\.ops'"):
            checked_model(model.SerializeToString(), "m")

    def test_absurd_sizes_are_refused(self) -> None:
        model = self.model()
        model.graph.initializer.add(name="big", data_type=1, dims=[2**40, 2**20])
        with pytest.raises(PackageError, match="tensor 'big' claims"):
            checked_model(model.SerializeToString(), "m")

    @pytest.mark.parametrize("data", [b"", b"<html>not found</html>", os.urandom(1000)])
    def test_files_that_are_no_model_are_refused(self, data: bytes) -> None:
        with pytest.raises(PackageError, match=r"m: .*ONNX model"):
            checked_model(data, "m")


class TestScripts:
    def test_are_python_3_8(self, package: Path) -> None:
        for name in ("infer.py", "parity.py"):
            ast.parse((package / name).read_text(), feature_version=(3, 8))

    def test_need_numpy_and_onnxruntime_only(self, package: Path) -> None:
        allowed = {"numpy", "onnxruntime", "PIL", "infer", "build_engine", *sys.stdlib_module_names}
        for name in ("infer.py", "parity.py", "bench.py"):
            for node in ast.walk(ast.parse((package / name).read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert {n.split(".")[0] for n in names} <= allowed

    @pytest.mark.parametrize("kind", ["png", "ppm", "npy"])
    def test_infer_gives_what_the_model_gives(self, package: Path, tmp_path: Path, kind: str) -> None:
        folder = Path(shutil.copytree(package, tmp_path / "clean"))
        pixels = smooth_images(1, 32, 77)[0]
        path = tmp_path / f"photo.{kind}"
        if kind == "npy":
            np.save(path, pixels)
        else:
            Image.fromarray(pixels).save(path)
        logits, exits = run((folder / "model.onnx").read_bytes(), network_input(pixels[None]))
        e = np.exp(logits[0].astype(float) - logits[0].max())
        done = python(folder, "infer.py", str(path), "--json", "--top-k", "2")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["top"][0]["class"] == CLASSES[int(logits[0].argmax())] and len(answer["top"]) == 2
        assert answer["top"][0]["probability"] == pytest.approx(float((e / e.sum()).max()), rel=1e-6)
        assert answer["exit_index"] == exits[0] and answer["ms"] > 0
        shown = python(folder, "infer.py", str(path)).stdout
        assert f" ms  {'head' if exits[0] == 2 else f'exit {exits[0]}'}\n" in shown and shown.count("%") == 5

    def test_infer_takes_folders_and_reports_bad_files_at_the_end(self, package: Path, tmp_path: Path) -> None:
        pictures = tmp_path / "ñ 目录" / "sub"
        pictures.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(smooth_images(1, 40 + i, i)[0]).save(pictures / f"{i}.jpg")
        (pictures / "broken.png").write_bytes(b"no picture")
        (pictures / "notes.txt").write_text("not an image")
        done = python(package, "infer.py", str(pictures.parent), "--json")
        assert done.returncode == 1 and done.stdout.count("\n") == 3
        assert "broken.png: not an image, or a broken one" in done.stderr

    def test_infer_refuses_another_model(self, copy: Path, tmp_path: Path) -> None:
        with (copy / "model.onnx").open("ab") as f:
            f.write(b"\0")
        np.save(tmp_path / "a.npy", smooth_images(1, 32)[0])
        done = python(copy, "infer.py", str(tmp_path / "a.npy"))
        assert done.returncode == 2 and "model.onnx is not the file that manifest.json describes" in done.stderr

    def test_infer_explains_what_is_missing(self, package: Path, tmp_path: Path) -> None:
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        (hidden / "PIL.py").write_text("raise ImportError")
        Image.fromarray(smooth_images(1, 32)[0]).save(tmp_path / "a.png")
        lines = (
            "import runpy, sys",
            f"sys.path.insert(0, {str(hidden)!r})",
            f"sys.argv = ['infer.py', {str(tmp_path / 'a.png')!r}]",
            f"runpy.run_path({str(package / 'infer.py')!r}, run_name='__main__')",
        )
        command = [sys.executable, "-c", "\n".join(lines)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "this format needs Pillow. Run: python -m pip install pillow; or give .npy, PPM or PGM" in done.stderr

    def test_parity_script_passes_and_fails(self, copy: Path) -> None:
        done = python(copy, "parity.py", isolated=False)
        assert done.returncode == 0 and done.stdout.startswith("PASS  16 images: same exit 100.0 %"), done.stderr
        assert verify_package(copy, run).passed  # nothing was left behind by running it
        np.save(copy / "parity" / "logits.npy", np.load(copy / "parity" / "logits.npy") + 1)
        done = python(copy, "parity.py", isolated=False)
        assert done.returncode == 1 and "changed or missing: parity/logits.npy" in done.stdout

    def test_parity_script_fails_on_other_results(self, copy: Path) -> None:
        manifest = manifest_of(copy)
        path = copy / "parity" / "logits.npy"
        np.save(path, np.load(path) * 1.2)
        manifest["files"]["parity/logits.npy"] = file_sha256(path)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        done = python(copy, "parity.py", isolated=False)
        assert done.returncode == 1 and done.stdout.startswith("FAIL  16 images") and "do not deploy" in done.stdout


def test_manifest_can_be_read_back_as_it_was(package: Path) -> None:
    manifest = verify_package(package).package.manifest
    assert dataclasses.asdict(manifest)["candidate"]["resolution"] == 32
    assert manifest.candidate == small_candidate()
    assert manifest.provenance["run"] == "r1" and manifest.tools["onnxruntime"]
