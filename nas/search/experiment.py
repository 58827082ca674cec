"""The experiment file: what to search, for which deadline, on which data. One YAML file composes the parts' settings.

What a run reads (`space`, `data.path`, files of teachers) is taken from the file's folder when it is written there, and
from the working directory when it is given with `--set`. Where results go (`run.*`) is always taken from the working
directory. `~` is the home folder. `space` may also be the name of one of the spaces that come with the tool.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from nas.core.errors import ConfigError, UsageError, did_you_mean
from nas.core.jsonio import to_plain
from nas.core.run import PipelineTimes
from nas.core.units import parse_ms
from nas.data.records import DataSettings
from nas.recipe.settings import StandaloneSettings, SupernetSettings
from nas.search.checked import checked, key_paths, schema, section_type
from nas.search.folder import device_folder
from nas.search.settings import (
    BudgetSettings,
    DeviceBudget,
    FeedbackSettings,
    FinishSettings,
    RunSettings,
    SearchSettings,
    placed,
)
from nas.space.yamlio import dump_yaml, load_yaml, parse_yaml
from nas.train.settings import DistillSettings, TeacherSettings

INPUT_KEYS = ("space", "data.path", "teacher.weights")
LISTED_INPUTS = ("teacher.members.weights", "teacher.files.path")  # of every entry of a list
PATH_KEYS = (*INPUT_KEYS, "run.dir", "run.tables", "run.cache", "run.foreign_table")
SEEDS_KEY = "search.enqueue"  # entries of which some have paths
TIME_KEYS = ("budget.ms", "budget.also_ms", "budget.total_ms", "budget.capture_ms")  # may have a unit: 800us
SPACES = Path(__file__).parents[2] / "search_spaces"


@dataclass(frozen=True, slots=True)
class Experiment:
    """Everything that decides a run.

    Fields:
        space: file of the search space, or the name of one that comes with the tool.
        name: names the run and its default folder; the file's name when absent. Letters, digits, `-`, `_` and `.`.
        device: where latencies are measured; `cpu` is this machine through ONNX Runtime, one thread, `cpu:2` with
            two, `ssh:USER@HOST` a board, `ssh:a,ssh:b` two boards of one state that share the work.
        budget: the deadline.
        also_on: further devices with their deadlines, such as [{device: "cpu:2", ms: 4}]; each has a table, a front and
            a pick of its own, and one student is chosen for all of them.
        data: the images.
        teacher: the accurate, slow network.
        distill: how students learn from it.
        search: how candidates are proposed and scored.
        supernet: how shared weights are trained, for the scorer `supernet`.
        standalone: successive halving, for the scorer `standalone`.
        feedback: which whole networks are measured to correct the table.
        finish: how finalists are completed.
        run: where files go.
    """

    space: str
    name: str = "experiment"
    device: str = "cpu"
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    also_on: tuple[DeviceBudget, ...] = ()
    data: DataSettings = field(default_factory=DataSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    supernet: SupernetSettings = field(default_factory=SupernetSettings)
    standalone: StandaloneSettings = field(default_factory=StandaloneSettings)
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)
    finish: FinishSettings = field(default_factory=FinishSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is None:
            raise ConfigError(
                f"name: {self.name!r} cannot name a folder; allowed: letters, digits, '-', '_' and '.', at most 100"
            )
        names = [self.device, *(other.device for other in self.also_on)]
        folders = [device_folder(name) for name in names]
        twice = next((name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"also_on: device {twice!r} appears twice; several deadlines on one device: --set budget.also_ms=[MS]"
            )

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir if self.run.dir is not None else f"runs/{self.name}")

    def budget_on(self, device: str) -> BudgetSettings:
        """The deadline on one of the run's devices; the empty name is the first one.

        Raises:
            UsageError: the run is not for this device; the message names those that it is for.
        """
        if device in ("", self.device):
            return self.budget
        for other in self.also_on:
            if other.device == device:
                return dataclasses.replace(self.budget, ms=other.ms, also_ms=(), total_ms=None)
        names = [self.device, *(other.device for other in self.also_on)]
        raise UsageError(
            f"run {self.name} is not for device {device!r}{did_you_mean(device, names)} (its devices: "
            f"{', '.join(names)})"
        )


def load_experiment(path: Path, sets: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, changed by `KEY=VALUE` texts.

    Args:
        path: a YAML file.
        sets: such as `budget.ms=5`; the last one of a key counts. A list is written `distill.exit_weights=[0.2, 0.5]`.

    Raises:
        ConfigError: the file cannot be read, or anything in it or in `sets` is wrong; all problems are listed.
    """
    try:
        data = load_yaml(path)
    except ConfigError as e:
        if path.exists():
            raise
        raise ConfigError(f"{e}. Write one: nas init {quote(str(path))}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys such as space, budget, data; an example is written by: nas init")
    _drop_bare_headings(Experiment, data)
    data.setdefault("name", _name_from(path))
    for key in (*PATH_KEYS, *LISTED_INPUTS):
        is_input = key in (*INPUT_KEYS, *LISTED_INPUTS)
        _change(data, key, partial(_below, path.parent if is_input else Path(), key))
    _place_seeds(data, path.parent)
    origins = {}
    for text in sets:
        key, value = parse_set(text)
        if key == SEEDS_KEY:
            value = placed(value, partial(_path_below, Path(), "search.enqueue"))
        for listed in (k for k in LISTED_INPUTS if k.startswith(f"{key}.")):
            _change_in(value, [listed.rpartition(".")[2]], partial(_below, Path(), listed))
        _put(data, key, value, text)
        origins[key] = f"from --set {text}"
    if data.get("also_on", ()) is None:  # every entry is commented out
        del data["also_on"]
    _check_one_deadline(data.get("budget"), origins, str(path))
    for key in TIME_KEYS:
        _change(data, key, partial(parse_ms, where=f"{path}: {key}"))
    further = data.get("also_on")
    for i, other in enumerate(further if isinstance(further, list) else ()):
        if isinstance(other, dict):
            _change(other, "ms", partial(parse_ms, where=f"{path}: also_on[{i}].ms"))
    experiment = checked(Experiment, data, str(path), origins)
    return dataclasses.replace(experiment, space=str(space_file(experiment.space, f"{path}: space")))


def with_deadline(experiment: Experiment, times: PipelineTimes | None) -> Experiment:
    """The experiment with the network's own deadline in `budget.ms`, where it has one of the whole pipeline."""
    if times is None:
        return experiment
    return dataclasses.replace(experiment, budget=dataclasses.replace(experiment.budget, ms=times.network_ms))


def _check_one_deadline(budget: Any, origins: dict[str, str], where: str) -> None:
    """Refuses deadlines of network and pipeline together; that of the command line replaces that of a file."""
    if not isinstance(budget, dict) or budget.get("total_ms") is None or "ms" not in budget:
        return
    given = [key for key in ("ms", "total_ms") if f"budget.{key}" in origins]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: budget.ms is the deadline of the network, budget.total_ms that of the whole pipeline, of which "
            "the network gets the rest. Give one of them"
        )
    if given == ["ms"]:
        budget["total_ms"] = None
    else:
        del budget["ms"]


def parse_set(text: str) -> tuple[str, Any]:
    """Key path and value of a `KEY=VALUE` text. The value is YAML; of a key that takes text it is the text as given.

    Raises:
        ConfigError: no `=`, an unknown key, a section instead of a key, or a value that is not YAML.
    """
    where = f"--set {text}"
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise ConfigError(f"{where}: expected KEY=VALUE, such as --set budget.ms=5")
    kind = section_type(Experiment, key.split("."))
    if kind is None:
        raise ConfigError(f"{where}: unknown key '{key}'{did_you_mean(key, key_paths(Experiment))}{_keys_beside(key)}")
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        names = [f"{key}.{name.name}" for name in dataclasses.fields(kind)]
        raise ConfigError(f"{where}: '{key}' is a section; set one of its keys: {', '.join(names)}")
    options = () if typing.get_origin(kind) is tuple else typing.get_args(kind) or (kind,)
    if str in options and not (type(None) in options and value in ("null", "")):
        return key, _below(Path(), key, value)
    return key, parse_yaml(value, where)


def _drop_bare_headings(cls: type, data: dict[str, Any]) -> None:
    """Takes out sections of which the heading is left and every key is commented out: they mean the defaults."""
    for key in list(data):
        kind = section_type(cls, [key])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if data[key] is None:
                del data[key]
            elif isinstance(data[key], dict):
                _drop_bare_headings(kind, data[key])


def _keys_beside(key: str) -> str:
    parts = key.split(".")
    kind = section_type(Experiment, parts[:-1])
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        kind, parts = Experiment, [key]
    prefix = ".".join(parts[:-1])
    return f" (keys{f' of {prefix}' if prefix else ''}: {', '.join(f.name for f in dataclasses.fields(kind))})"


def _put(data: dict[str, Any], key: str, value: Any, text: str) -> None:
    *sections, last = key.split(".")
    place = data
    for name in sections:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {text}: the file gives {name} a value, so nothing can be set below it")
    place[last] = value


def _change(data: dict[str, Any], key: str, change: Callable[[str], Any]) -> None:
    """Replaces the text at a key path, where there is text, or a list with texts; of a list of sections in each."""
    _change_in(data, key.split("."), change)


def _change_in(place: Any, keys: Sequence[str], change: Callable[[str], Any]) -> None:
    if isinstance(place, list):
        for each in place:
            _change_in(each, keys, change)
    elif isinstance(place, dict) and len(keys) > 1:
        _change_in(place.get(keys[0]), keys[1:], change)
    elif isinstance(place, dict):
        found = place.get(keys[0])
        if isinstance(found, str):
            place[keys[0]] = change(found)
        elif isinstance(found, list):
            place[keys[0]] = [change(v) if isinstance(v, str) else v for v in found]


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "experiment"


def space_names() -> tuple[str, ...]:
    """Names of the search spaces that come with the tool."""
    return tuple(sorted(p.stem for p in SPACES.glob("*.yaml")))


def _is_name(space: str) -> bool:
    """True for the name of a space, False for a file."""
    return re.fullmatch(r"[\w-]+", space) is not None


def _below(base: Path, key: str, text: str) -> str:
    """The text of a key; a path is taken from `base`.

    Raises:
        ConfigError: it begins with the home folder of an unknown user.
    """
    if key not in (*PATH_KEYS, *LISTED_INPUTS) or not text or (key == "space" and _is_name(text)):
        return text
    return _path_below(base, key, text)


def _path_below(base: Path, key: str, text: str) -> str:
    try:
        return os.path.normpath(base / Path(text).expanduser())
    except RuntimeError as e:  # `~` without a home folder, or `~name` of nobody
        raise ConfigError(f"{key}: there is no home folder for {text!r}. Give the path without ~") from e


def _place_seeds(data: dict[str, Any], base: Path) -> None:
    """Takes the files and run folders of `search.enqueue` from `base`."""
    search = data.get("search")
    if isinstance(search, dict) and "enqueue" in search:
        search["enqueue"] = placed(search["enqueue"], partial(_path_below, base, "search.enqueue"))


def space_file(space: str, where: str) -> Path:
    """File of a search space that is given by name or by file.

    Raises:
        ConfigError: a name that no space of the tool has; the message begins with `where`.
    """
    if not _is_name(space):
        return Path(space)
    names = space_names()
    if space not in names:
        raise ConfigError(
            f"{where}: no space named {space!r}{did_you_mean(space, names)} (names: {', '.join(names)}); "
            "a file of your own ends in .yaml"
        )
    return SPACES / f"{space}.yaml"


def resolved_yaml(experiment: Experiment) -> str:
    """All settings of an experiment, defaults included, as a file that gives the same experiment from any folder."""
    data = to_plain(experiment)
    data["run"]["dir"] = str(experiment.run_dir)
    if experiment.budget.total_ms is not None:
        del data["budget"]["ms"]  # what is left for the network is measured, and kept in the run folder
    for key in (*PATH_KEYS, *LISTED_INPUTS):
        _change(data, key, os.path.abspath)
    data["search"]["enqueue"] = placed(data["search"]["enqueue"], os.path.abspath)
    return f"# Settings of the run '{experiment.name}', defaults included.\n{dump_yaml(data)}"


def experiment_schema() -> dict[str, Any]:
    """JSON Schema of experiment files, for editors."""
    return {"title": "nas experiment", **schema(Experiment)}
