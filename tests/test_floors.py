"""The house rules that a machine can see: floors, forbidden calls, docstrings, nothing of one machine in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nas"

# Imports point down only; packages on one floor do not import each other. What runs on a board stands below all: it
# imports nothing but itself.
BOARD = "devices/board"
FLOORS = (
    {BOARD},
    {"core"},
    {"space", "models", "latency", "devices", "data"},
    {"train", "compress", "export"},
    {"measure", "recipe"},
    {"search", "report"},
    {"cli"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

TORCH = {"torch", "torchvision", "safetensors"}
WITHOUT_TORCH = {"core", "space", "latency", "devices", "data", "export", "compress", "report", "cli"}

# Library -> where it may be imported. A deployed package runs `infer.py`, which is text here, not an import.
ONLY_IN = {
    "onnxruntime": ("nas/devices/onnxruntime", "nas/devices/board/ort_runner.py"),
    "optuna": ("nas/search/",),
    "optuna_dashboard": ("nas/search/",),
    "click": ("nas/cli/",),
    "rich": ("nas/cli/",),
    "plotly": ("nas/report/",),
    "jinja2": ("nas/report/",),
    "pydantic": ("nas/search/",),
    "yaml": ("nas/space/yamlio.py",),
}
# Fakes and contract suites for tests: stands above all floors, and no part of the product imports it.
TESTING = "nas/testing.py"
# Exceptions to the two tables above, each with its reason.
MAY_IMPORT = {
    ("nas/data/torchvision_sets.py", "torchvision"): "data sets by name; imported when one is asked for",
    ("nas/compress/fakequant.py", "torch"): "the int8 network that is trained; imported where students are",
    ("nas/cli/doctor.py", "torch"): "a real training step is one of the checks; imported when it runs",
}

# Where a broad except may end in something else than an error of ours.
BROAD_EXCEPT = {
    "nas/cli/main.py": "the one border where every error becomes a message and an exit code",
    "nas/cli/doctor.py": "a check that fails in any way is a line of the result",
    "nas/devices/onnxruntime_cpu.py": "the runtime's errors have no common base; a failed row is a row",
    "nas/devices/tensorrt.py": "as that of ONNX Runtime",
    "nas/devices/protocol.py": "a model that fails while it is timed is a row with its reason",
    "nas/devices/boards.py": "what ends the thread of a board is raised in the thread that asked for the work",
    "nas/devices/board/ort_runner.py": "a package of the wrong architecture fails in any way when it is imported",
    "nas/devices/board/rounds.py": "a model that fails while it is timed is a result with its reason",
    "nas/devices/board/serve.py": "what goes wrong with a request is its answer",
    "nas/devices/board/worker.py": "a model that fails is a result, a request that fails an answer, with its reason",
    "nas/recipe/pool.py": "a failed candidate is a row with a reason",
}

HEAVY_AT_START = {
    "torch",
    "torchvision",
    "optuna",
    "onnx",
    "onnxruntime",
    "plotly",
    "pydantic",
    "numpy",
    "scipy",
    "rich",
}


@cache
def _tracked() -> tuple[Path, ...]:
    """Files of the project: those that git tracks or would track; without git all but environments and outputs."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        return tuple(ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file())
    skipped = {".venv", "runs", "build", "dist", "__pycache__", ".git", ".nas-cache", "latency_tables"}
    return tuple(p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.relative_to(ROOT).parts))


@cache
def _modules() -> dict[str, ast.Module]:
    """Syntax tree of every Python file of the project, by path from the root."""
    files = [p for p in _tracked() if p.suffix == ".py"]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in files}


def _product() -> dict[str, ast.Module]:
    return {path: tree for path, tree in _modules().items() if path.startswith("nas/")}


def _package(path: str) -> str:
    """`latency` for nas/latency/x.py; an empty string for the modules directly in nas/."""
    if path.startswith(f"nas/{BOARD}/"):
        return BOARD
    parts = PurePosixPath(path).parts
    return parts[1] if len(parts) > 2 else ""


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a module: functions and TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            # modules of a board import each other relatively: there they are no part of `nas`
            module = f"nas.{BOARD.replace('/', '.')}.{node.module or ''}".rstrip(".") if node.level else node.module
            for name in node.names:
                yield node.lineno, f"{module}.{name.name}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_every_package_has_a_floor() -> None:
    packages = {p.parent.relative_to(PACKAGE).as_posix() for p in PACKAGE.glob("*/**/__init__.py")}
    assert packages == set(FLOOR_OF)
    assert {_package(path) for path in _product()} - {""} == packages


def test_relative_imports_stay_among_what_runs_on_a_board() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in _modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level > 1 or (node.level and _package(path) != BOARD))
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_point_down_only() -> None:
    wrong = []
    for path, tree in _product().items():
        package = _package(path)
        for line, name in _imports(tree):
            parts = name.split(".")
            target = parts[1] if parts[0] == "nas" and len(parts) > 1 else ""
            target = BOARD if parts[1:3] == BOARD.split("/") else target
            if target in ("", package) or not package:
                continue
            if FLOOR_OF.get(target, 0) >= FLOOR_OF[package]:
                wrong.append(f"{path}:{line}: {package} (floor {FLOOR_OF[package]}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_product_does_not_import_what_is_for_tests() -> None:
    wrong = [path for path, tree in _product().items() for _, name in _imports(tree) if name.startswith("nas.testing")]
    assert not wrong


def test_core_imports_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"nas", "__future__"}
    wrong = [
        f"{path}:{line}: {name}"
        for path, tree in _product().items()
        if _package(path) in ("core", "") and path != TESTING
        for line, name in _imports(tree)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_places() -> None:
    wrong = []
    for path, tree in _product().items():
        for line, name in _imports(tree):
            library = name.split(".")[0]
            if (path, library) in MAY_IMPORT:
                continue
            if library in TORCH and _package(path) in WITHOUT_TORCH:
                wrong.append(f"{path}:{line}: {library} is not for {_package(path)}")
            places = ONLY_IN.get(library)
            if places is not None and not path.startswith(places):
                wrong.append(f"{path}:{line}: {library} may only be imported in {', '.join(places)}")
    assert not wrong, "\n".join(wrong)


def test_exceptions_to_the_rules_are_still_needed() -> None:
    for (path, library), reason in MAY_IMPORT.items():
        if path in _product():
            assert any(name.split(".")[0] == library for _, name in _imports(_product()[path])), (path, reason)
    for path, reason in BROAD_EXCEPT.items():
        if path in _product():
            assert any(_swallows(node) for node in ast.walk(_product()[path])), (path, reason)


def test_commands_load_heavy_libraries_when_they_run_only() -> None:
    wrong = []
    for path, tree in _product().items():
        if _package(path) not in ("core", "cli", "") or path == TESTING:
            continue
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for _, name in _imports(ast.Module([node], [])):
                    inside = name.startswith("nas.") and name.split(".")[1] not in ("core", "cli")
                    if name.split(".")[0] in HEAVY_AT_START or inside:
                        wrong.append(f"{path}:{node.lineno}: {name} is imported when the module is")
    assert not wrong, "\n".join(wrong)


def test_no_call_that_runs_foreign_code() -> None:
    wrong = []
    for path, tree in _modules().items():
        for node, name in _calls(tree):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
            if keywords.get("shell", "False") != "False":
                wrong.append(f"{path}:{node.lineno}: shell=True")
            if keywords.get("allow_pickle", "False") != "False" and not path.startswith("tests/"):
                wrong.append(f"{path}:{node.lineno}: allow_pickle=True")
            if name in ("os.system", "os.popen", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                wrong.append(f"{path}:{node.lineno}: {name}")
        for line, name in _imports(tree):
            if name.split(".")[0] in ("dill", "cloudpickle", "joblib", "marshal", "shelve"):
                wrong.append(f"{path}:{line}: {name}")
        if not path.startswith("tests/"):  # tests write hostile files
            wrong += [
                f"{path}:{node.lineno}: {ast.unparse(node)}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "pickle"
                and node.attr != "UnpicklingError"  # what torch.load raises when it refuses a file
            ]
    assert not wrong, "\n".join(wrong)


def _swallows(node: ast.AST) -> bool:
    """True for an except of everything that does not end in `raise` or in an error of ours `from` the caught one."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    names = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    if not any(name is None or ast.unparse(name) in ("Exception", "BaseException") for name in names):
        return False
    last = node.body[-1]
    return not (isinstance(last, ast.Raise) and (last.exc is None or last.cause is not None))


def test_broad_excepts_only_where_a_failure_becomes_a_row_or_an_error_of_ours() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in _product().items()
        if path not in BROAD_EXCEPT
        for node in ast.walk(tree)
        if _swallows(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_users_mistakes_are_not_asserted_and_nothing_is_left_open() -> None:
    wrong = []
    for path, tree in _product().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith(" is not None"):  # for mypy
                wrong.append(f"{path}:{node.lineno}: assert")
            if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
                wrong.append(f"{path}:{node.lineno}: NotImplementedError")
        text = (ROOT / path).read_text(encoding="utf-8")
        for mark in re.finditer(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b", text):
            wrong.append(f"{path}: {mark[0]}")
    assert not wrong, "\n".join(wrong)


def test_public_modules_classes_and_functions_say_what_they_give() -> None:
    wrong = []
    for path, tree in _product().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if text.strip() and ast.get_docstring(tree) is None:
            wrong.append(f"{path}: module")
        for node in tree.body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and ast.get_docstring(node) is None:
                wrong.append(f"{path}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)


def test_environment_variables_are_read_in_the_command_line_only() -> None:
    wrong = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in _product().items()
        if _package(path) != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]
    assert not wrong, "\n".join(wrong)


# One letter of each in brackets, so that this file does not match itself.
_FOLDERS = "hom[e](?!/(?:ann|anna|somebody)\\b)|roo[t]|wor[k]|tm[p]|User[s]"  # made-up people of tests are fine
_INDEXES = r"pyp[i]\.|pythonhoste[d]|download\.pytorc[h]|--(?:extra-)?inde[x]|--find-link[s]"


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("an absolute path of one machine", rf"(?<![\w.~])/(?:{_FOLDERS})/\w"),
        ("the address of a package index", _INDEXES),
    ],
)
def test_the_tree_holds_nothing_of_one_machine(what: str, pattern: str) -> None:
    wrong = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(pattern, line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, f"{what}:\n" + "\n".join(wrong)


def test_no_large_or_generated_file_is_tracked() -> None:
    wrong = [
        str(p.relative_to(ROOT)) for p in _tracked() if p.stat().st_size > 1_000_000 or p.suffix in (".pyc", ".pt")
    ]
    assert not wrong
