"""`nas init`: writes an experiment file in which every key stands with its meaning and its default."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

import click

from nas.cli.options import Milliseconds, common_options
from nas.cli.output import Console
from nas.core.errors import DataError, UsageError, did_you_mean
from nas.core.jsonio import to_plain, write_text

WIDTH = 100
# What fits the embedded images of 32 px, and what fits photographs.
EMBEDDED_SPACE, PHOTO_SPACE = "tiny-32", "small-64"
# Images that a student sees in its full distillation: 10 passes over 8,000 images in experiments/quickstart.yaml and 60
# over 1,440 in experiments/surface-inspection.yaml, where the teacher gets as many. A small folder needs many passes.
SEEN_IMAGES = 86_000
FEWEST_EPOCHS, MOST_EPOCHS = 10, 120
# Weight of attention transfer, as in the files of experiments/. It needs the maps of the teacher, so it is no default.
ATTENTION = 3.0


@click.command(short_help="Write a commented experiment file to start from.")
@click.argument("file", type=click.Path(path_type=Path), default="experiment.yaml")
@click.option("--space", metavar="NAME", help="Search space that comes with the tool, or a file.")
@click.option("--data", metavar="DIR|NAME", help="Image folder, or a data set by name, such as CIFAR10.")
@click.option("--budget", type=Milliseconds(), help="The deadline, such as 5ms or 800us.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of experiment files instead, for editors.")
@common_options
@click.pass_obj
def command(
    console: Console, file: Path, space: str | None, data: str | None, budget: float | None, force: bool, schema: bool
) -> None:
    """Writes a commented experiment file: FILE, or experiment.yaml.

    Every key stands in it with its meaning; defaults are commented out.
    """
    from nas.search.experiment import experiment_schema, load_experiment, space_names

    if schema:
        document = experiment_schema()
        if not console.as_json:
            console.say(json.dumps(document, indent=2, ensure_ascii=False))
        console.result(document)
        return
    if file.exists() and not force:
        raise UsageError(f"{file} exists already; choose another name, or replace it: nas init {file} --force")
    names = space_names()
    chosen = space or (EMBEDDED_SPACE if data in (None, "defects") else PHOTO_SPACE)
    if space is not None and space not in names and not Path(space).is_file():
        raise UsageError(
            f"--space: no space {space!r}{did_you_mean(space, names)} (names: {', '.join(names)}, or a file)"
        )
    values: dict[str, Any] = {"space": chosen, "distill.attention": ATTENTION}
    if Path(chosen).suffix:
        values["space"] = str(Path(chosen).absolute())
    if budget is not None:
        values["budget.ms"] = budget
    if data is not None and (Path(data).is_dir() or "/" in data):
        values |= {"data.name": "folder", "data.path": str(Path(data).absolute())}
        epochs = _epochs_for(Path(data))
        if epochs is not None:
            values |= {"teacher.epochs": epochs, "distill.epochs": epochs}
    elif data is not None:
        # Where the published files are, or are downloaded to.
        values |= {"data.name": data} if data == "defects" else {"data.name": data, "data.path": f"data/{data}"}
    write_text(file, commented(values, file, names))
    load_experiment(file)  # what was just written must be readable
    name = shlex.quote(str(file))
    following = [f"nas search {name} --dry-run", f"nas search {name}"]
    console.say(f"wrote {file}. Next:")
    for line in following:
        console.say(f"  {line}")
    console.result({"file": str(file), "next": following})


def _epochs_for(folder: Path) -> int | None:
    """Passes over the images of a folder, or None where it cannot be read yet: the search will say what is wrong."""
    from nas.data.folder import count_training_images

    try:
        count = count_training_images(folder)
    except DataError:
        return None
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(SEEN_IMAGES / count)))


def commented(values: dict[str, Any], file: Path, spaces: tuple[str, ...]) -> str:
    """Text of an experiment file: every key with its meaning, those without a value of their own commented out.

    Args:
        values: key path -> value; `space` at least.
        file: where it will lie, named in the usage lines.
        spaces: names of the spaces that come with the tool.
    """
    from nas.search.experiment import Experiment

    name = os.fsencode(file).decode("utf-8", errors="replace")  # whatever the locale made of it
    shown = {"budget.ms": None, "budget.of": None, "data.name": None, **values}
    head = f"""\
        # What to search, for which deadline, on which data. "# text" explains the key below it, "#key: value" is a
        # default: take the '#' away to change it. Files that are read are taken from the folder of this file,
        # those that are written from the working directory.
        #
        #   nas search {name} --dry-run              what would be done, and how long it takes
        #   nas search {name}                        search; the same command goes on after a stop
        #   nas search {name} --set budget.ms=5      change one key for this run
        #
        """
    told = "Search spaces that come with the tool: " + ", ".join(spaces)
    lines = [textwrap.dedent(head) + textwrap.fill(told, 118, initial_indent="# ", subsequent_indent="# ") + "\n"]
    _section(Experiment(space=values["space"]), "", shown, lines)
    return "\n".join(lines) + "\n"


def _section(default: Any, prefix: str, shown: dict[str, Any], lines: list[str]) -> None:
    from nas.search.checked import field_meanings

    meanings, hints = field_meanings(type(default)), typing.get_type_hints(type(default))
    indent = "  " * prefix.count(".")
    for item in dataclasses.fields(default):
        key, value = prefix + item.name, getattr(default, item.name)
        if not prefix and dataclasses.is_dataclass(value):
            lines.append("")
        allowed = typing.get_args(hints[item.name]) if typing.get_origin(hints[item.name]) is Literal else ()
        text = meanings.get(item.name, "") + (f" [{' | '.join(allowed)}]" if allowed else "")
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if dataclasses.is_dataclass(value):
            lines.append(f"{indent}{item.name}:")
            _section(value, f"{key}.", shown, lines)
        else:
            written = value if shown.get(key) is None else shown[key]
            lines.append(f"{indent}{'' if key in shown else '#'}{item.name}: {_scalar(written)}")


def _scalar(value: Any) -> str:
    """A value on one line; JSON is YAML, and plain words need no quotes."""
    if isinstance(value, str) and _is_plain(value):
        return value
    return json.dumps(to_plain(value), ensure_ascii=False)


def _is_plain(text: str) -> bool:
    """True for text that needs no quotes in YAML."""
    return (
        text.replace("-", "").replace("_", "").isalnum() and text[0].isalpha() and text not in ("true", "false", "null")
    )
