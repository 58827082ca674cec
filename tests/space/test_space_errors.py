"""Mistakes in a space file end in one message: file, place, what was given, what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from nas.core.errors import ConfigError
from nas.space.space import load_space, space_from_plain
from nas.space.yamlio import load_yaml

SPACES = Path(__file__).parents[2] / "search_spaces"
WHERE = "search_spaces/x.yaml"
ABSENT = object()


def with_change(place: str, value: Any) -> dict[str, Any]:
    """The plain data of the 32 px space with the value at `stages.0.width`-like `place` replaced or removed."""
    data: dict[str, Any] = copy.deepcopy(load_yaml(SPACES / "tiny-32.yaml"))
    target: Any = data
    *path, last = place.split(".")
    for part in path:
        target = target[int(part) if part.isdigit() else part]
    if value is ABSENT:
        del target[last]
    else:
        target[int(last) if last.isdigit() else last] = value
    return data


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("stages.0.kernel", 3, "stages[0] (s1): unknown field 'kernel'; did you mean 'kernel_size'?"),
        (
            "zzz",
            3,
            "unknown field 'zzz'; fields: name, source, in_channels, resolution, stem, stages, head, exits, prec",
        ),
        ("source", ABSENT, "field 'source' is missing"),
        ("source", "  ", "source: expected text, got str '  '"),
        ("name", 3, "name: expected text, got int 3"),
        ("resolution", [], "resolution: no choices; give at least one value"),
        ("resolution", "32px", "resolution: expected a whole number of px, got str '32px'"),
        ("resolution", 32.0, "resolution: expected a whole number of px, got float 32.0"),
        ("resolution", [32, 32], "resolution: 32 is given twice"),
        ("resolution", 0, "resolution: 0 is out of range; allowed: 1 to 4096 px"),
        ("resolution", True, "resolution: expected a whole number of px, got bool True"),
        ("resolution", 4, "resolution: 4 px does not fit: stages.2.0: stride 2 on a map of 1 px"),
        ("resolution", [32, 4], "resolution: 4 px does not fit: stages.2.0: stride 2 on a map of 1 px"),
        ("in_channels", [1, 3], "in_channels: expected a whole number of channels, got list [1, 3]"),
        ("stem", 8, "stem: expected a mapping with the fields channels, kernel_size, stride, activation; got int 8"),
        ("stem.stride", 3, "stem: stride: 3 is out of range; allowed: 1 to 2 pixels"),
        ("stem.channels", None, "stem: channels: expected a whole number of channels, got NoneType None"),
        ("stages", [], "stages: 0 stages; allowed: 1 to 16"),
        ("stages", {"s1": {}}, "stages: expected a list of stages, got dict {'s1': {}}"),
        ("stages.1", None, "stages[1]: expected a mapping with the fields name, width"),
        ("stages.1.name", "s1", "stages[1] (s1): name 's1' is taken by stages[0]"),
        ("stages.1.name", "head", "stages[1] (head): name: 'head' is a reserved name; reserved: resolution, stem,"),
        ("stages.1.name", "a.b", "stages[1] (a.b): name: expected a name of letters, digits, - and _"),
        ("stages.1.width", 0, "stages[1] (s2): width: 0 is out of range; allowed: 1 to 16384 channels"),
        ("stages.1.width", 10**12, "stages[1] (s2): width: 1000000000000 is out of range"),
        ("stages.1.depth", [0, 1], "stages[1] (s2): depth: 0 is out of range; allowed: 1 to 32 blocks"),
        ("stages.1.kernel_size", [3, 4], "stages[1] (s2): kernel_size: 4 is even; a kernel needs a middle pixel"),
        ("stages.1.kernel_size", "3", "stages[1] (s2): kernel_size: expected a whole number of pixels, got str '3'"),
        ("stages.1.expansion", float("nan"), "stages[1] (s2): expansion: nan is out of range; expected a factor"),
        ("stages.1.expansion", -1, "stages[1] (s2): expansion: -1 is out of range; expected a factor"),
        (
            "stages.1.expansion",
            400,
            "expansion: 400 is out of range; expected a factor of the block's input channels fr",
        ),
        ("stages.1.use_se", "no", "stages[1] (s2): use_se: expected true or false, got str 'no'"),
        ("stages.1.use_se", 1, "stages[1] (s2): use_se: expected true or false, got int 1"),
        (
            "stages.1.activation",
            "hswish",
            "'hswish' is no activation; did you mean 'hard_swish'?; allowed: relu, hard_",
        ),
        ("stages.1.activation", 7, "activation: 7 is no activation; allowed: relu, hard_swish"),
        ("head.hidden_channels", -1, "head: hidden_channels: -1 is out of range; allowed: 0 to 16384 channels (0: no"),
        ("head.activation", ["relu", "hard_swish"], "head: activation: ['relu', 'hard_swish'] is no activation"),
        ("exits.after", ["s1", "x"], "exits: after: 'x' is no stage; allowed: s1, s2, s3, s4"),
        ("exits.after", ["s3", "s4"], "exits: after: an exit after 's4', the last stage, is the head itself; leave it"),
        ("exits.after", [], "exits: after: no choices; give at least one value"),
        ("exits.max_count", 4, "exits: max_count: 4 is out of range; allowed: 1 to 2 exits"),
        (
            "exits.thresholds",
            [50, 90],
            "exits: thresholds: 50 is out of range; expected a probability (a ratio, not per",
        ),
        (
            "exits.thresholds",
            "high",
            "exits: thresholds: expected a probability (a ratio, not percent), got str 'high'",
        ),
        (
            "precision.choices",
            ["fp32", "int4"],
            "precision: choices: 'int4' is no precision; did you mean 'int8'?; allo",
        ),
        ("precision.per", "layer", "precision: per: 'layer' is no unit; allowed: network, stage"),
    ],
)
def test_a_mistake_is_named_with_its_place(place: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_from_plain(with_change(place, value), WHERE, 10)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert message in str(caught.value)


def test_a_file_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    with pytest.raises(
        ConfigError, match=r"empty\.yaml: expected a mapping with the fields name, source, .*; got NoneType"
    ):
        load_space(file, 10)


def test_a_space_of_one_network_is_refused() -> None:
    stage = {"name": "a", "width": 8, "depth": 1, "stride": 1, "kernel_size": 3, "expansion": 2, "activation": "relu"}
    data = {"name": "one", "source": "x", "resolution": 32, "stem": {"channels": 8, "activation": "relu"}}
    with pytest.raises(ConfigError, match=r"x\.yaml: holds one network only; give at least one field two choices"):
        space_from_plain(data | {"stages": [stage]}, WHERE, 10)


def test_a_space_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_classes is 0; a space needs the classes of a data set, at least 1"):
        load_space(SPACES / "tiny-32.yaml", 0)


def test_optional_fields_have_their_defaults() -> None:
    data = with_change("exits", ABSENT)
    for field in ("head", "precision"):
        del data[field]
    space = space_from_plain(data, WHERE, 10)
    assert space.precisions == ("fp32",)
    assert space.thresholds == ()
    candidate = space.decode(space.largest())
    assert candidate.in_channels == 3
    assert (candidate.exits, candidate.head.conv_channels, candidate.head.hidden_channels) == ((), 0, 0)


def test_thresholds_may_be_left_to_be_solved() -> None:
    space = space_from_plain(with_change("exits.thresholds", ABSENT), WHERE, 10)
    assert space.thresholds == ()
    assert {e.threshold for e in space.decode(space.largest()).exits} == {None}
