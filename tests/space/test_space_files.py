"""The shipped spaces load, and the table in their README says what they hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nas.core.walk import total_macs
from nas.measure.covering import covering_plan, least_networks
from nas.space.space import SearchSpace, load_space

FOLDER = Path(__file__).parents[2] / "search_spaces"
README = (FOLDER / "README.md").read_text()
ROWS = {cells[0]: cells for line in README.splitlines() if (cells := [c.strip() for c in line.strip("|").split("|")])}
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def millions(macs: int) -> str:
    return f"{macs / 1e6:.2f}" if macs < 10e6 else f"{macs / 1e6:.0f}"


def row_of(space: SearchSpace) -> list[str]:
    """The cells of the README's table for a space."""
    least, most = (total_macs(space.decode(g)) for g in (space.smallest(), space.largest()))
    return [
        space.name,
        str(space.num_classes),
        "/".join(map(str, space.resolution)),
        str(len(space.genes)),
        f"10^{space.log10_size:.1f}",
        f"{millions(least)}-{millions(most)} M",
        f"{len(space.layers(space.precisions[:1])):,}",
        f"{least_networks(space, {layer.key for layer in space.layers(space.precisions[:1])}):,}",
    ]


def test_every_space_is_in_the_table() -> None:
    assert [name for name in ROWS if name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_the_file_holds(name: str) -> None:
    cells = ROWS[name]
    space = load_space(FOLDER / f"{name}.yaml", int(cells[1]))
    assert space.name == name
    assert "arXiv" in space.source
    assert cells == row_of(space)


@pytest.mark.parametrize("name", ["small-64", "tiny-32"])  # the others take ten seconds and more
def test_as_few_networks_cover_all_rows_as_the_table_says(name: str) -> None:
    space = load_space(FOLDER / f"{name}.yaml", 10, ("fp32",))
    assert str(len(covering_plan(space).networks)) == ROWS[name][-1]


def test_the_hours_in_the_readme_are_those_of_the_spaces_as_they_are_shipped() -> None:
    told = " ".join(README.split()).partition("It would be")[2].partition(". A search")[0]
    hours = {
        name: float(found[1])
        for found in re.finditer(r"(\d+\.\d) (?:hours )?for ((?:(?!\d+\.\d ).)*)", told)
        for name in re.findall(r"[\w-]+", found[2])
    }
    for name in NAMES:
        space = load_space(FOLDER / f"{name}.yaml", int(ROWS[name][1]))
        assert space.precisions == (("fp16", "int8") if name == "jetson-64" else ("fp32", "int8"))
        networks = least_networks(space, {layer.key for layer in space.layers()})
        assert networks == 2 * int(ROWS[name][-1].replace(",", ""))
        assert hours[name] == round(networks * 60 / 3600, 1)


def test_the_small_space_stays_small_enough_for_the_first_run() -> None:
    """Larger networks cannot be trained in the minutes that the first run has."""
    space = load_space(FOLDER / "tiny-32.yaml", 10)
    assert total_macs(space.decode(space.largest())) < 1.3e6
    assert len(space.layers(("fp32",))) <= 400
