"""Lists the benchmarks, or runs one: `python -m benchmarks [NAME [OPTIONS...]]`."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name -> first line of its docstring, of every module here that is a command."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem.startswith("_") or "__main__" not in text:
            continue
        found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found


def main(args: list[str]) -> int:
    """Runs one command line; gives the exit code."""
    known = benchmarks()
    if not args:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {line}" for name, line in known.items()))
        print("\nRun one: make bench NAME=thresholds, or python -m benchmarks.thresholds --json")
        return 0
    if args[0] not in known:
        print(f"error: no benchmark {args[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    sys.argv = [f"benchmarks.{args[0]}", *args[1:]]
    runpy.run_module(f"benchmarks.{args[0]}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
