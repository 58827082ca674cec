"""The agent of a board: its language, its file, and what it makes of models that crash, hang or change the board."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.devices.agent import pack, packed_agent
from nas.devices.board import loader
from nas.devices.board.errors import BoardError
from nas.devices.board.lines import LineReader, LineWriter
from nas.devices.board.rounds import Plan
from nas.devices.board.serve import Agent
from nas.devices.board.state import identity, read_state
from nas.devices.board.store import Folder
from nas.devices.board.worker_process import WorkerProcess
from nas.testing import requires_package

BOARD = Path(loader.__file__).parent
MODULES = sorted(BOARD.glob("*.py"))
RUNNER = Path(__file__).with_name("board_runner.py")
OPTIONAL = {"numpy", "onnxruntime", "tensorrt", "pycuda", "cuda"}

PLAN: dict[str, Any] = {
    "sessions": 1,
    "rounds": 2,
    "round_ms": 5.0,
    "warmup_runs": 1,
    "min_runs": 4,
    "max_runs": 60,
    "retries": 0,
    "wait_ms": 0,
    "wait_round_ms": 0,
    "wait_share": 0,
    "gate_runs": 0,
    "gate_cpu_share": 0.97,
    "gate_drift": 1.05,
    "round_cpu_share": 0.95,
    "calibration_checks": 2,
    "alive": 8,
    "hang_s": 60.0,
    "build_s": 60.0,
    "whole": 0,
}


def _interpreters() -> dict[tuple[int, ...], str]:
    """Python 3 interpreters of this machine, by version."""
    found: dict[tuple[int, ...], str] = {}
    folders = [*os.get_exec_path(), *(str(p) for p in Path.home().glob(".pyenv/versions/3*/bin"))]
    for folder in folders:
        for path in sorted(Path(folder).glob("python3*")) if Path(folder).is_dir() else ():
            if re.fullmatch(r"python3(\.\d+)?", path.name) and os.access(path, os.X_OK):
                code = "import sys; print(*sys.version_info[:3])"
                done = subprocess.run([str(path), "-c", code], capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    found.setdefault(tuple(int(n) for n in done.stdout.split()), str(path))
    return found


class Board:
    """An agent in this process with scripted models and a scripted state."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[dict[str, Any]] = []
        self.states: list[dict[str, Any]] = [{"boot_id": "a", "power_mode": {"id": 0, "name": "MAXN"}}]
        self.folder = Folder(str(folder))
        self.worker = WorkerProcess([sys.executable, "-u", str(RUNNER)])
        self.agent = Agent(self.folder, self.worker, self._take, self._state, lambda: identity(self._state()), "test")

    def put(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        Path(self.folder.blob(name)).write_bytes(content)
        return name

    def ask(self, operation: str, **more: Any) -> list[dict[str, Any]]:
        self.sent = []
        self.agent.answer({"op": operation, **more})
        return self.sent

    def measure(self, *models: bytes, batch: str = "0123456789", **plan: Any) -> dict[str, dict[str, Any]]:
        jobs = [{"key": m.decode(), "sha256": self.put(m), "precision": "fp16"} for m in models]
        told = self.ask("measure", batch=batch, runner="scripted", plan={**PLAN, **plan}, jobs=jobs)
        assert told[-1].get("done"), told[-1]
        return {m["result"]["key"]: m["result"] for m in told if "result" in m}

    def _take(self, message: dict[str, Any], data: bytes = b"") -> None:
        self.sent.append({**json.loads(json.dumps(message)), **({"data": data} if data else {})})

    def _state(self) -> dict[str, Any]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    made = Board(tmp_path / "cache")
    yield made
    made.worker.end()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_what_runs_on_a_board_is_python_3_6(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path), feature_version=(3, 6))
    compile(text, str(path), "exec", dont_inherit=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise AssertionError(f"{path.name}:{node.lineno}: from __future__")
        if isinstance(node, ast.Call):
            names = {k.arg for k in node.keywords}
            assert not names & {"capture_output", "text"}, f"{path.name}:{node.lineno}: newer than 3.6"


def test_a_tool_that_knows_when_features_came_finds_nothing_newer_than_3_6() -> None:
    requires_package("vermin", "the check of the board's Python version")
    done = subprocess.run(
        [sys.executable, "-c", "from vermin import main; main()", "--no-tips", "--violations", "-t=3.6-", str(BOARD)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_what_runs_on_a_board_imports_itself_and_the_standard_library() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = {id(n) for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                if top in OPTIONAL:
                    assert id(node) in inside, f"{path.name}:{node.lineno}: {name} belongs into a function"
                else:
                    assert top in sys.stdlib_module_names, f"{path.name}:{node.lineno}: {name}"


def test_the_oldest_python_of_this_machine_runs_the_agent(tmp_path: Path) -> None:
    interpreters = _interpreters()
    version = min(v for v in interpreters if v >= (3, 6))
    agent = tmp_path / f"agent-{packed_agent().sha256[:16]}.pyz"
    agent.write_bytes(packed_agent().data)
    model = b"not a model"
    sha256 = hashlib.sha256(model).hexdigest()
    process = subprocess.Popen(
        [interpreters[version], "-u", str(agent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={"HOME": str(tmp_path)},
    )
    assert process.stdin is not None and process.stdout is not None
    writer, reader = LineWriter(process.stdin.fileno()), LineReader(process.stdout.fileno())

    def answer() -> dict[str, Any]:
        while True:
            message = reader.message(60)
            assert message is not None
            if "ok" in message:
                return message

    writer.send({"op": "hello", "client": "test"})
    hello = answer()
    assert hello["python"] == "{}.{}.{}".format(*version) and hello["agent"] == packed_agent().sha256
    assert [r["name"] for r in hello["runners"]][-1] == "onnxruntime"
    writer.send({"op": "have", "sha256": [sha256]})
    assert answer()["missing"] == [sha256]
    writer.send({"op": "put", "sha256": sha256, "bytes": len(model)}, model)
    assert answer() == {"ok": True}
    writer.send({"op": "have", "sha256": [sha256]})
    assert answer()["missing"] == []
    jobs = [{"key": "k", "sha256": sha256}]
    writer.send({"op": "measure", "batch": "0" * 8, "runner": "onnxruntime", "plan": PLAN, "jobs": jobs})
    while "result" not in (message := reader.message(60) or {}):
        assert message
    assert message["result"]["error"]["kind"] in ("build_failed", "not_found")
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()
    assert not list((tmp_path / ".cache" / "nas-board").glob("work-*")), "its scratch folder is left"


def test_the_same_source_gives_the_same_bytes_wherever_and_whenever_it_is_packed(tmp_path: Path) -> None:
    copy = tmp_path / "board"
    shutil.copytree(BOARD, copy, ignore=shutil.ignore_patterns("__pycache__"))
    os.utime(copy / "serve.py", (1, 1))
    (copy / "lines.py").chmod(0o600)
    assert pack(copy) == packed_agent()
    with (copy / "lines.py").open("a") as f:
        f.write("\n# changed\n")
    assert pack(copy).sha256 != packed_agent().sha256


def test_models_that_end_or_hang_the_runtime_fail_alone(board: Board) -> None:
    results = board.measure(b"good", b"crash", b"killed", b"exits", b"no engine", b"strange", b"other good")
    kinds = {key: (r["error"] or {}).get("kind") for key, r in results.items()}
    assert kinds == {
        "good": None,
        "crash": "killed",
        "killed": "killed",
        "exits": "killed",
        "no engine": "out_of_memory",
        "strange": "build_failed",
        "other good": None,
    }
    assert results["crash"]["error"]["message"] == "ended by signal 11, a crash of the runtime"
    assert "signal 9 (SIGKILL), which the kernel sends when memory is short" in results["killed"]["error"]["message"]
    assert results["no engine"]["error"]["message"] == "the builder ran out of memory"
    assert results["strange"]["error"]["message"] == "ValueError: what is this?"
    assert [len(s) for s in results["good"]["sessions"]] == [2]
    assert results["good"]["build_s"] == 0.5 and results["good"]["engine_bytes"] == 1234


def test_a_model_that_hangs_is_ended_after_its_limit(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.devices.board.worker_process.GRACE_S", 0.2)
    results = board.measure(b"good", b"hang", hang_s=1.0)
    assert results["hang"]["error"] == {"kind": "hung", "message": "did not return within 1 s"}
    assert results["good"]["error"] is None


def test_warnings_of_a_build_come_back(board: Board) -> None:
    assert board.measure(b"warns")["warns"]["warnings"] == ["skipped a tactic"]


def test_a_runner_that_is_missing_says_what_is_missing(board: Board) -> None:
    told = board.ask("hello", client="c")
    by_name = {r["name"]: r for r in told[-1]["runners"]}
    assert by_name["missing"]["missing"] == "no such program"
    assert by_name["scripted"]["slow_start"] is True and by_name["scripted"]["dynamic_batch"] is False


def test_a_runtime_that_raises_or_crashes_leaves_the_others(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_RUNNERS", "1")
    found = board.ask("hello", client="c")[-1]["runners"]
    assert [(r["name"], r["missing"]) for r in found] == [
        ("raising", "RuntimeError: module compiled against another version"),
        ("crashing", "it cannot be loaded: ended by signal 11, a crash of the runtime"),
        ("missing", "no such program"),
        ("scripted", None),
    ]
    assert found[-1]["version"] == "8.2.1"


def test_only_the_runtime_that_is_asked_for_is_loaded(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_RUNNERS", "1")
    found = board.ask("hello", client="c", runner="scripted")[-1]["runners"]
    others = "not looked for, as only scripted is asked for"
    assert [r["missing"] for r in found] == [others, others, others, None]


def test_a_timing_cache_is_of_one_power_mode_and_clock(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(board.worker, "ask", lambda request, _: asked.append(request) or {"layers": []})
    base = {"boot_id": "a", "power_mode": {"id": 0, "name": "MAXN"}, "clocks_locked": True, "locked_mhz": "gpu=1020"}
    changes: list[dict[str, Any]] = [
        {},
        {"boot_id": "b"},
        {"power_mode": {"id": 1, "name": "15W"}},
        {"clocks_locked": False},
        {"locked_mhz": "gpu=600"},
    ]
    for change in changes:
        board.states = [{**base, **change}]
        board.ask("profile", sha256=board.put(b"good"), runner="scripted", runs=7, limit_s=60)
    names = [request["timing_cache"] for request in asked]
    assert names[0] == names[1], "a boot changes no kernel's time"
    assert len(set(names)) == 4
    board.ask("profile", sha256=board.put(b"good"), runner="scripted", version="10.3", runs=7, limit_s=60)
    assert asked[-1]["timing_cache"] not in names
    assert all(Path(name).parent == Path(board.folder.root) for name in names)


def test_models_measured_while_the_board_changed_are_measured_again(board: Board) -> None:
    before, after = ({"boot_id": "a", "power_mode": {"id": n, "name": name}} for n, name in ((0, "MAXN"), (1, "5W")))
    board.states = [before, before, after, after]  # begin of the batch; before and after the models; then it stays
    result = board.measure(b"good")["good"]
    assert result["error"] is None and result["state"]["power_mode"] == "5W"


def test_a_board_that_does_not_stay_in_one_state_is_told(board: Board) -> None:
    board.states = [{"boot_id": str(n)} for n in range(20)]
    result = board.measure(b"good")["good"]
    assert result["error"]["kind"] == "state_changed"
    assert "the board did not stay in one state: boot_id: '5', then '6'" in result["error"]["message"]


def test_a_board_that_did_not_stay_in_one_state_is_measured_by_the_next_program(board: Board) -> None:
    board.states = [{"boot_id": str(n)} for n in range(8)]  # the last one then stays
    assert board.measure(b"good")["good"]["error"]["kind"] == "state_changed"
    assert board.measure(b"good")["good"]["error"] is None, "the same batch again, on a board that is steady now"


def test_a_batch_goes_on_where_it_was_and_a_torn_line_is_measured_again(board: Board) -> None:
    first = board.measure(b"one", b"two", b"three", alive=1)
    path = Path(board.folder.batch("0123456789"))
    path.write_bytes(path.read_bytes()[:-20])  # as after a power cut while the last one was written
    second = board.measure(b"one", b"two", b"three", alive=1)
    assert [first[k]["id"] == second[k]["id"] for k in ("one", "two", "three")] == [True, True, False]
    board.ask("acknowledge", batch="0123456789")
    assert not path.exists()
    assert board.ask("acknowledge", batch="0123456789") == [{"ok": True}], "twice, when the link was cut in between"
    third = board.measure(b"one", alive=1)
    assert third["one"]["id"] != first["one"]["id"]


def test_what_was_measured_in_another_power_mode_is_not_part_of_a_batch_that_goes_on(board: Board) -> None:
    first = board.measure(b"one")
    board.states = [{"boot_id": "b", "power_mode": {"id": 0, "name": "MAXN"}}]
    assert board.measure(b"one")["one"]["id"] == first["one"]["id"], "a reboot alone does not take results away"
    board.states = [{"boot_id": "b", "power_mode": {"id": 1, "name": "5W"}}]
    assert board.measure(b"one")["one"]["id"] != first["one"]["id"]


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        ({"op": "mesure"}, "bad_request", "unknown request 'mesure'"),
        ({"op": "have", "sha256": ["../../etc/passwd"]}, "bad_request", "not a sha256: '../../etc/passwd'"),
        ({"op": "acknowledge", "batch": "../x"}, "bad_request", "not a batch: '../x'"),
        (
            {"op": "measure", "plan": {**PLAN, "rounds": 0}},
            "bad_request",
            "plan: rounds must be within 1 and 1000, got 0",
        ),
        ({"op": "measure", "plan": {**PLAN, "hang_s": "x"}}, "bad_request", "plan: hang_s must be within"),
        ({"op": "run"}, "bad_request", "KeyError"),
        (
            {"op": "run", "sha256": "0" * 64, "runner": "scripted", "images": "0" * 64, "shape": [1], "limit_s": 1},
            "not_found",
            "is not on this board any more",
        ),
    ],
)
def test_a_wrong_request_is_an_answer_with_a_reason(
    board: Board, request_: dict[str, Any], kind: str, text: str
) -> None:
    board.agent.answer(request_)
    assert board.sent[-1]["ok"] is False
    assert board.sent[-1]["kind"] == kind and text in board.sent[-1]["error"]


def test_layers_of_a_model_are_told(board: Board) -> None:
    told = board.ask("profile", sha256=board.put(b"good"), runner="scripted", precision="fp16", runs=7, limit_s=60)
    assert told[-1]["layers"] == [{"name": "conv", "median_ms": 0.25, "metadata": "7 runs"}]


def test_many_short_steps_are_signs_of_life(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.devices.board.serve.TELL_EVERY_S", 0.0)
    name = board.put(b"good")
    more = {"images": board.put(bytes(12 * 5)), "shape": [5, 3], "precision": "fp16", "limit_s": 60}
    told = board.ask("run", sha256=name, runner="scripted", **more)
    assert len(told[-1]["data"]) == 5 * 4
    assert sum("progress" in message for message in told) >= 5, "a host takes an agent that says nothing for cut off"


def test_a_model_is_not_guilty_of_a_host_that_went_away(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(message: dict[str, Any], data: bytes = b"") -> None:  # noqa: ARG001
        raise BrokenPipeError

    monkeypatch.setattr(board.agent, "_send", gone)
    with pytest.raises(BrokenPipeError):
        board.measure(b"good", b"other good")
    assert Path(board.folder.batch("0123456789")).read_bytes() == b"", "a failure that never was meets the next program"


def test_another_host_waits_until_the_board_is_free(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.devices.board.store.WAIT_FOR_BOARD_S", 0.5)
    holder = json.dumps({"client": "other", "since": "noon", "pid": 4711})
    lock = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); f.write(sys.argv[2]); "
    argv = [sys.executable, "-c", lock + "f.flush(); print(1, flush=True); time.sleep(60)", board.folder.lock, holder]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        jobs = [{"key": "k", "sha256": board.put(b"good"), "precision": "fp16"}]
        told = board.ask("measure", batch="0" * 8, runner="scripted", plan=PLAN, jobs=jobs)
        other.kill()
    assert told[0] == {"progress": 0.0, "waiting": "another program measures on this board since noon"}
    assert told[-1]["kind"] == "busy" and told[-1]["error"].endswith("end it on the board: kill 4711")
    assert board.measure(b"good")["good"]["error"] is None


def test_a_worker_that_hangs_ends_with_its_agent_when_that_is_killed(tmp_path: Path) -> None:
    runner = tmp_path / "runner.py"
    shutil.copy(RUNNER, runner)
    (tmp_path / "model").write_bytes(b"hang")
    job = {"index": 0, "key": "k", "path": str(tmp_path / "model"), "precision": "fp16", "feeds": {}}
    asked = {"op": "measure", "runner": "scripted", "plan": PLAN, "jobs": [job], "work": str(tmp_path)}
    agent = (
        "import json, sys\nfrom nas.devices.board.worker_process import WorkerProcess\n"
        "worker = WorkerProcess([sys.executable, '-u', sys.argv[1]])\n"
        "worker.ask({'op': 'describe'}, lambda _: None)\nprint('ready', flush=True)\n"
        "worker.ask(json.loads(sys.argv[2]), lambda _: None)\n"
    )
    argv = [sys.executable, "-c", agent, str(runner), json.dumps(asked)]

    def workers() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [path.parent.name] if path.read_bytes().endswith(f"-u\0{runner}\0".encode()) else []
        return found

    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.5)  # it hangs now, and reads no more
        assert len(workers()) == 1
        process.kill()
    until = time.monotonic() + 10
    while workers() and time.monotonic() < until:
        time.sleep(0.02)
    assert not workers()


def test_files_that_nobody_used_for_long_are_removed(board: Board) -> None:
    old, new = board.put(b"old"), board.put(b"new")
    os.utime(board.folder.blob(old), (1, 1))
    stale = Path(board.folder.root) / "work-left"
    stale.mkdir()
    for folder in (stale, board.folder.work):
        os.utime(folder, (1, 1))
    board.folder.tidy(time.time())
    assert not board.folder.has(old) and board.folder.has(new) and not stale.exists()
    assert Path(board.folder.work).is_dir(), "of an agent that lives"


def test_agents_and_timing_caches_go_when_nobody_used_them_for_months(board: Board) -> None:
    root, now_s = Path(board.folder.root), time.time()
    months = {
        "agent-0123.pyz": 3,
        "agent-test.pyz": 3,
        "timing-cache-a.bin": 3,
        "timing-cache-b.bin": 1,
        "clocks.conf": 3,
    }
    for name, age in months.items():
        (root / name).write_bytes(b"x")
        os.utime(root / name, (now_s - age * 30 * 86400, now_s - age * 30 * 86400))
    board.ask("hello", client="c", runners=False)
    assert {name for name in months if (root / name).exists()} == {
        "agent-test.pyz",
        "timing-cache-b.bin",
        "clocks.conf",
    }


def test_images_go_when_they_were_run(board: Board) -> None:
    name, images = board.put(b"good"), board.put(bytes(12))
    more = {"runner": "scripted", "precision": "fp16", "limit_s": 60}
    assert board.ask("run", sha256=name, images=images, shape=[1, 3], **more)[-1]["ok"] is True
    assert board.folder.has(name) and not board.folder.has(images)
    bad = board.put(b"no engine")
    assert board.ask("run", sha256=bad, images=board.put(bytes(12)), shape=[1, 3], **more)[-1]["ok"] is False
    assert not board.folder.has(images), "also where it fails"


def stream(board: Board, *models: bytes, images: bytes = bytes([0, 1, 0]) * 9, **plan: Any) -> dict[str, Any]:
    """What the agent says last, or the result, of a stream of 9 images of 3 bytes."""
    job = {
        "key": "s",
        "models": [board.put(model) for model in models],
        "precisions": ["fp16"] * len(models),
        "thresholds": [0.5] * (len(models) - 1),
        "images": board.put(images),
        "images_kind": "uint8",
        "shape": [9, 3, 1, 1],
    }
    more = {"batch": "0123456789", "runner": "scripted", "plan": {**PLAN, "sessions": 2, **plan}}
    told = board.ask("stream", jobs=[job], **more)
    assert not board.folder.has(job["images"]), "images go when they were run, also where it fails"
    return next((m["result"] for m in told if "result" in m), told[-1])


def test_a_stream_comes_back_part_by_part_with_where_each_image_left(board: Board) -> None:
    images = b"".join(bytes([n % 2, 7, 7]) for n in range(9))
    told = stream(board, b"good", b"warns", images=images, min_runs=4, max_runs=4)
    assert told["error"] is None and told["warnings"] == ["skipped a tactic"] * 2
    assert len(told["sessions"]) == 2
    for session in told["sessions"]:
        assert session["exits"] == [n % 2 for n in range(9)]
        assert [[len(r["samples_ms"]) for r in block] for block in session["blocks"]] == [[4, 4], [4, 4], [1, 1]]
    again = stream(board, b"good", b"warns", images=images, min_runs=4, max_runs=4)
    assert again["id"] == told["id"], "what another connection did not fetch is not measured again"


@pytest.mark.parametrize(
    ("model", "kind", "told"),
    [
        (b"crash", "killed", "ended by signal 11, a crash of the runtime"),
        (b"no engine", "out_of_memory", "the builder ran out of memory"),
    ],
)
def test_a_chain_whose_model_fails_is_a_result_with_its_reason(
    model: bytes, kind: str, told: str, board: Board
) -> None:
    assert stream(board, b"good", model)["error"] == {"kind": kind, "message": told}
    assert board.measure(b"good", batch="9876543210")["good"]["error"] is None, "the next one is measured"


def test_images_of_another_size_are_refused(board: Board) -> None:
    assert stream(board, b"good", images=bytes(26))["error"] == {
        "kind": "bad_request",
        "message": "9 images need 27 bytes, got 26",
    }


def test_what_lies_on_a_board_is_bounded_and_the_oldest_goes_first(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.devices.board.store.MOST_BYTES", 25)
    now_s = time.time()
    names = [board.put(bytes([i]) * 10) for i in range(4)]
    for i, name in enumerate(names):
        os.utime(board.folder.blob(name), (now_s - 4000 + 1000 * i, now_s - 4000 + 1000 * i))
    board.folder.tidy(now_s)
    assert [Path(board.folder.blob(name)).exists() for name in names] == [False, False, True, True]
    busy = [board.put(bytes([9 + i]) * 20) for i in range(2)]
    board.folder.tidy(now_s)
    assert all(map(board.folder.has, busy)), "another agent may be about to read what was used just now"


def test_what_describes_runtimes_holds_no_memory_afterwards(board: Board) -> None:
    board.ask("hello", client="c")
    assert board.worker._process is None


def write_script(folder: Path, text: str) -> dict[str, Any]:
    (folder / "script.py").write_text(text)
    return {"folder": str(folder), "script": "script.py", "limit_s": 20.0}


def test_a_script_is_run_with_its_options_and_its_limit(board: Board, tmp_path: Path) -> None:
    program = "import sys, time\nprint(sys.argv[1:])\nprint('why', file=sys.stderr)\ntime.sleep(float(sys.argv[1]))\n"
    asked = write_script(tmp_path, program + "sys.exit(3)\n")
    told = board.ask("script", **asked, options=["0", "$(x)"])
    assert told == [{"ok": True, "code": 3, "out": "['0', '$(x)']\n", "err": "why\n"}]
    told = board.ask("script", **{**asked, "limit_s": 0.3}, options=["60"])
    assert told[-1]["kind"] == "hung"


def test_a_long_script_gives_signs_of_life(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.devices.board.processes.BEAT_S", 0.05)
    monkeypatch.setattr("nas.devices.board.serve.TELL_EVERY_S", 0.0)
    told = board.ask("script", **write_script(tmp_path, "import time; time.sleep(0.4)"), options=[])
    assert told[-1]["code"] == 0 and sum("progress" in m for m in told) >= 2


def test_a_board_that_is_held_waits_for_nobody_and_lets_nobody_in(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.devices.board.store.WAIT_FOR_BOARD_S", 0.3)
    other = Board(Path(board.folder.root))
    for _ in range(2):  # twice: a host that does not know whether its request arrived asks again
        assert board.ask("hold", is_held=True) == [{"ok": True}]
    assert board.measure(b"good")["good"]["error"] is None
    asked = write_script(tmp_path, "")
    assert board.ask("script", **asked, options=[])[-1]["code"] == 0
    assert other.ask("script", **asked, options=[])[-1]["kind"] == "busy"
    board.ask("hold", is_held=False)
    assert other.ask("script", **asked, options=[])[-1]["code"] == 0
    other.worker.end()


def test_an_idle_agent_ends_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """A link that was cut without a word: nothing comes any more, and what is said arrives nowhere."""
    program = (
        "from nas.devices.board import serve\nserve.IDLE_BEAT_S = 0.05\n"
        f"serve.ROOT = {str(tmp_path)!r}\nserve.serve(['true'], 'test')\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as agent:
        assert agent.stdin is not None and agent.stdout is not None
        assert agent.stdout.readline() == agent.stdout.readline() == b'{"idle": true}\n'
        agent.stdout.close()
        assert agent.wait(10) == 0
    assert not list(tmp_path.glob("work-*"))


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    for text in (b"[1]\n", b"{\n", b"\xff\n"):
        path = tmp_path / "lines"
        path.write_bytes(text)
        with path.open("rb") as f, pytest.raises(BoardError, match="not a JSON"):
            LineReader(f.fileno()).message()


def test_the_governor_is_part_of_what_may_not_change(tmp_path: Path) -> None:
    path = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    path.parent.mkdir(parents=True)
    path.write_text("performance\n")
    assert read_state(str(tmp_path))["governor"] == "performance"
    assert read_state(str(tmp_path / "nothing"))["governor"] is None
    state = {"boot_id": "abc", "power_mode": {"id": 0, "name": "MAXN"}, "governor": "performance", "python": "3.6.9"}
    assert identity(state) == {
        "boot_id": "abc",
        "power_mode": "MAXN",
        "governor": "performance",
        "clocks_locked": None,
        "locked_mhz": None,
    }


def test_a_plan_takes_every_number_that_it_needs() -> None:
    assert Plan(PLAN).max_runs == 60
    for name in PLAN:
        with pytest.raises(BoardError, match=f"plan: {name} must be within"):
            Plan({k: v for k, v in PLAN.items() if k != name})


def test_the_loader_is_sent_as_text_and_stands_alone() -> None:
    tree = ast.parse(Path(loader.__file__).read_text(encoding="utf-8"))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert importlib.util.find_spec("nas.devices.board.loader") is not None
