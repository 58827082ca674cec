"""The entry point: lazy imports, exit codes, one message per error."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nas.cli import main as cli_main
from nas.cli.options import common_options
from nas.core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DeviceError,
    InterruptedRunError,
    MissingRowError,
    NasError,
    RecordError,
    RunMismatchError,
    StorageError,
    TrainingError,
    UsageError,
)

HEAVY = (
    "torch",
    "torchvision",
    "optuna",
    "plotly",
    "pydantic",
    "onnx",
    "onnxruntime",
    "numpy",
    "scipy",
    "rich",
    "jinja2",
)


def _python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """A function that makes `nas doctor` raise the given error."""

    def make(error: BaseException) -> None:
        @click.command()
        @common_options
        def command() -> None:
            raise error

        class Module:
            pass

        module = Module()
        module.command = command
        monkeypatch.setattr(cli_main.importlib, "import_module", lambda _: module)

    return make


def test_help_and_import_load_no_heavy_library() -> None:
    done = _python(
        "import sys, nas\nfrom nas.cli.main import run\ncode = run(['--help'])\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert "130  interrupted" in done.stdout


@pytest.mark.parametrize("name", cli_main.COMMANDS)
def test_help_of_every_command_loads_no_heavy_library(name: str) -> None:
    done = _python(
        "import sys\nfrom nas.cli.main import run\ncode = run(sys.argv[1:])\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(code)",
        name,
        "--help",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    for option in ("--json", "--debug"):
        assert option in done.stdout


def test_every_command_file_is_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main.run([]) == 0
    text = capsys.readouterr().out
    for name in cli_main.COMMANDS:
        command = cli_main.cli.get_command(click.Context(cli_main.cli), name)
        assert command is not None and command.get_short_help_str(), name
        assert f"\n  {name} " in text
    folder = Path(cli_main.__file__).parent
    helpers = {"__init__", "main", "output", "options"}
    assert {p.stem.replace("_", "-") for p in folder.glob("*.py")} - helpers >= set(cli_main.COMMANDS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serch"], "error: no command 'serch'; did you mean 'search'?"),
        (["zzz"], f"(commands: {', '.join(cli_main.COMMANDS)}). Run: nas --help"),
        (["doctor", "--jsn"], "error: no such option '--jsn'; did you mean '--json'? Run: nas doctor --help"),
    ],
)
def test_a_mistyped_command_line_names_the_nearest(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_main.run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (NasError, 1),
        (UsageError, 2),
        (ConfigError, 2),
        (RecordError, 2),
        (RunMismatchError, 2),
        (TrainingError, 2),
        (BudgetError, 3),
        (DeviceError, 4),
        (MissingRowError, 4),
        (DataError, 5),
        (StorageError, 6),
        (InterruptedRunError, 130),
    ],
)
def test_exit_code_of_each_error(kind: type[NasError], code: int, failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(kind("what happened"))
    assert cli_main.run(["doctor"]) == code
    prefix = "interrupted" if code == 130 else "error"
    assert capsys.readouterr().err == f"{prefix}: what happened\n"
    assert f"\n  {code} " in cli_main.EXIT_CODES


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on"),
        (ModuleNotFoundError("no", name="tensorrt"), 2, "pip install 'nas[tensorrt]'"),
        (ModuleNotFoundError("no", name="click"), 2, "the package 'click' is not installed. Run: make setup"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 6, "runs/a: No space left on device"),
        (MemoryError(), 1, "search.workers=1"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_other_errors_end_as_one_message(
    error: BaseException, code: int, message: str, failing, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert cli_main.run(["doctor"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(StorageError("disk"))
    assert cli_main.run(["doctor", "--debug"]) == 6
    assert "Traceback" in capsys.readouterr().err


def test_json_gives_one_document_also_for_an_error(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(BudgetError("the closest point is 3 ms"))
    assert cli_main.run(["doctor", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document == {"error": {"type": "BudgetError", "message": "the closest point is 3 ms", "exit_code": 3}}


def test_json_document_for_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main.run(["search", "--json", "--no-such-option"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_a_closed_pipe_is_quiet() -> None:
    # The reader is gone before the first line is written.
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.readline(); from nas.cli.main import main; main()", "--help"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(30) == 141
