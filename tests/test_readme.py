"""What the documents say is true: blocks marked as tested run, links lead somewhere, commands and options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nas.cli.main import COMMANDS, EXIT_CODES, cli
from nas.search.experiment import load_experiment

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")) if not p.parent.name.startswith("runs"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Examples that need an argument or a device are run as they stand too: the CPU is a device.
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _environment() -> dict[str, str]:
    """That of the user, with the environment's own commands first and one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _tested_blocks() -> list[tuple[str, str]]:
    blocks = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(r"<!-- tested -->\s*```sh\n(.*?)```", text, re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            blocks.append((f"{document.relative_to(ROOT)}:{line}", match[1]))
    return blocks


@pytest.mark.parametrize("block", [pytest.param(block, id=where) for where, block in _tested_blocks()])
def test_blocks_marked_as_tested_run(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", block],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-1000:]}"


def test_there_is_something_to_run() -> None:
    assert _tested_blocks()
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout.splitlines()) >= 3


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_linked_file_exists(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and "://" not in path and not (document.parent / path).exists():
            missing.append(target)
    assert not missing


def test_commands_and_options_in_the_readme_exist() -> None:
    context = click.Context(cli)
    wrong = []
    for line in re.findall(r"(?:^|`)nas ([^`\n]+)", README, re.MULTILINE):
        name, *rest = line.split()
        if name.startswith("-"):
            continue
        command = cli.get_command(context, name)
        if command is None:
            wrong.append(f"nas {name}")
            continue
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        wrong += [f"nas {name} {word}" for word in rest if word.startswith("--") and word.split("=")[0] not in known]
    assert not wrong
    assert all(f"nas {name}" in README for name in COMMANDS)


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"(?:^|`)make (\w+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert used <= targets
    assert {"setup", "search", "test", "check", "bench"} <= targets


def test_exit_codes_are_the_same_in_the_readme_and_in_the_help() -> None:
    in_help = {
        int(code): " ".join(text.split()) for code, text in re.findall(r"^  (\d+) +(.+)$", EXIT_CODES, re.MULTILINE)
    }
    in_readme = {
        int(code): text.replace("`", "") for code, text in re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE)
    }
    assert in_help == in_readme


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_experiments_that_come_with_the_tool_load(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert Path(experiment.space).is_file()
    assert path.name in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


def test_benchmarks_and_their_list_agree() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True
    )
    there = {line.split()[0] for line in done.stdout.split("\n\n")[0].splitlines()}
    listed = set(
        re.findall(r"^\| `(\w+)` \|", (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert there == listed


def test_an_unknown_benchmark_names_those_that_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: no benchmark 'nonsense'; there are: " in done.stderr


def test_setup_refuses_an_old_or_missing_python_with_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    copy = tmp_path / "a copy with spaces"
    copy.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (copy / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for python, message in (
        (str(old), "is Python 3.9.2. Python 3.11 or newer is needed; name it: make setup PYTHON="),
        (str(tmp_path / "nowhere"), "was not found. Python 3.11 or newer is needed"),
    ):
        done = subprocess.run(["make", "-C", str(copy), "setup", f"PYTHON={python}"], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (copy / ".venv").exists()


def test_another_interpreter_that_is_named_makes_the_environment_anew(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for name in ("one", "two"):
        python = tmp_path / name
        pip = f"'#!/bin/sh\\necho \"$@\" >> {tmp_path}/pip\\n'"
        python.write_text(
            f'#!/bin/sh\n[ "$2" = venv ] || exit 0\necho {name} $3 >> {made}\nmkdir -p .venv/bin\n'
            f"printf {pip} > .venv/bin/python\nchmod +x .venv/bin/python\n",
            encoding="utf-8",
        )
        python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for named in ("PYTHON=./one", "PYTHON=./one", "ARGS=", "PYTHON=./two", "ARGS="):
        done = subprocess.run(["make", "-C", str(tmp_path), "setup", named], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert made.read_text(encoding="utf-8") == "one .venv\ntwo --clear\n"
