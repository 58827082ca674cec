"""Two tables held against each other, and tables of several boards in one device state merged; nothing is written.

Comparing works across device states, because it only reads. Merging does not: numbers of two states have no centre.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nas.core.errors import DeviceError, UsageError
from nas.core.records import KEY_NAMES, Measurement
from nas.latency.keys import layer_of_key
from nas.latency.lines import FIXED_KEYS, MeasuredNetwork
from nas.latency.table import LatencyTable, state_differences

NETWORK_GROUP = "network"


@dataclass(frozen=True, slots=True)
class RowRatio:
    """A row of two tables: how many times slower the second has it."""

    key: str
    a_ms: float
    b_ms: float

    @property
    def ratio(self) -> float:
        return self.b_ms / self.a_ms


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """Common rows of one operator group and precision. `spread`: ratio of the 90 % to the 10 % quantile, minus 1."""

    group: str
    precision: str
    rows: int
    median_ratio: float
    spread: float
    least: RowRatio
    greatest: RowRatio


@dataclass(frozen=True, slots=True)
class TableDifference:
    """How two tables differ. `state` has (field, first, second) for each field of the device state that differs."""

    state: tuple[tuple[str, str, str], ...]
    groups: tuple[GroupDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupSpread:
    """How far the boards of a merged table are apart in one group: (largest - smallest) / centre of each row.

    `common` rows are in at least two tables, out of `rows`.
    """

    group: str
    precision: str
    rows: int
    common: int
    median: float
    greatest: float
    greatest_key: str


@dataclass(frozen=True, slots=True)
class Merged:
    """One row per key with the centre of the tables, and how far the tables are apart.

    `ratios`: name of each table, and how many times slower than the centre its rows are in the median.
    """

    rows: tuple[Measurement, ...]
    networks: tuple[MeasuredNetwork, ...]
    spreads: tuple[GroupSpread, ...]
    ratios: tuple[tuple[str, float], ...]


def group_of(key: str) -> tuple[str, str]:
    """Operator group and precision of a row key; fixed rows have the group `fixed`, networks `network`."""
    if key in FIXED_KEYS:
        return "fixed", "none"
    if key.partition("|")[0] not in KEY_NAMES.values():
        return NETWORK_GROUP, "-"
    layer = layer_of_key(key)
    return layer.group, layer.precision


def values_of(table: LatencyTable) -> dict[str, float]:
    """Latency (ms) of everything in a table that has one: rows, fixed rows as the table uses them, networks."""
    result = {key: row.latency_ms for key, row in table.rows.items() if row.latency_ms is not None}
    for key in table.fixed:
        value = table.fixed_ms(key)
        if value is not None:
            result[key] = value
    for key, network in table.networks.items():
        if network.measurement.latency_ms is not None:
            result[key] = network.measurement.latency_ms
    return result


def compare_tables(a: LatencyTable, b: LatencyTable) -> TableDifference:
    """Differences of two tables, of whatever device states.

    Args:
        a: the first; ratios are b / a.
        b: the second.
    """
    first, second = values_of(a), values_of(b)
    state = tuple((name, str(one), str(other)) for name, one, other in state_differences(a.profile, b.profile))
    common: dict[tuple[str, str], list[RowRatio]] = {}
    for key in first:
        if key in second:
            common.setdefault(group_of(key), []).append(RowRatio(key, first[key], second[key]))
    groups = []
    for (group, precision), ratios in sorted(common.items()):
        ordered = sorted(ratios, key=lambda r: r.ratio)
        low, middle, high = np.quantile([r.ratio for r in ordered], (0.1, 0.5, 0.9))
        groups.append(
            GroupDifference(
                group, precision, len(ordered), float(middle), float(high / low - 1), ordered[0], ordered[-1]
            )
        )
    return TableDifference(
        state,
        tuple(groups),
        tuple(key for key in first if key not in second),
        tuple(key for key in second if key not in first),
    )


def merge_tables(tables: Mapping[str, LatencyTable]) -> Merged:
    """The centre of tables of one device state, measured on several boards.

    The value of a row is the median of the tables' values. Its one round per table holds that table's value, calm
    where that table's row was, so that the deviation of the row is that between the boards. A row that failed
    everywhere stays failed. The order is that of the first table, then what the next ones add.

    Args:
        tables: by name, at least two; each given once.

    Raises:
        UsageError: fewer than two tables, or two with the very same measurements.
        DeviceError: tables of different device states; the message shows each field that differs.
    """
    _refuse(tables)
    everything: dict[str, None] = {}
    for table in tables.values():
        everything |= dict.fromkeys([*table.fixed, *table.rows])
    values = {name: values_of(table) for name, table in tables.items()}
    rows: list[Measurement] = []
    for key in everything:
        found = {name: _newest(table, key) for name, table in tables.items()}
        row = _centre({n: m for n, m in found.items() if m is not None}, values, key)
        rows.append(replace(row, sequence=len(rows) + 1))
    networks: list[MeasuredNetwork] = []
    for key in dict.fromkeys(k for table in tables.values() for k in table.networks):
        owners = {n: table.networks[key] for n, table in tables.items() if key in table.networks}
        first = next(iter(owners.values()))
        centre = _centre({n: network.measurement for n, network in owners.items()}, values, key)
        networks.append(replace(first, measurement=replace(centre, sequence=len(rows) + len(networks) + 1)))
    return Merged(tuple(rows), tuple(networks), _spreads(values), _ratios(values))


def _refuse(tables: Mapping[str, LatencyTable]) -> None:
    if len(tables) < 2:
        raise UsageError("merging needs at least two tables: nas table merge A B --out DIR")
    (first_name, first), *others = tables.items()
    for name, table in others:
        differences = state_differences(first.profile, table.profile)
        if differences:
            raise DeviceError(
                f"{first_name} and {name} were measured in different device states:\n  "
                + "\n  ".join(f"{field}: {one!r} and {another!r}" for field, one, another in differences)
                + f"\nTheir rows have no common value. Look at the difference: nas table diff {first_name} {name}"
            )
    seen: dict[tuple[tuple[str, Measurement], ...], str] = {}
    for name, table in tables.items():
        content = tuple(sorted(table.rows.items()))
        if content and content in seen:
            raise UsageError(
                f"{seen[content]} and {name} hold the very same measurements; one is a copy and would count twice"
            )
        seen[content] = name


def _newest(table: LatencyTable, key: str) -> Measurement | None:
    fixed = table.fixed.get(key)
    return fixed[-1] if fixed else table.rows.get(key)


def _centre(found: Mapping[str, Measurement], values: Mapping[str, Mapping[str, float]], key: str) -> Measurement:
    """One measurement for all: the median of those that have a value, or the failure that all share."""
    known = {name: values[name][key] for name in found if key in values[name]}
    template = next((found[name] for name in known), next(iter(found.values())))
    if not known:
        return replace(template, source="failed in " + ", ".join(f"{n} (line {m.sequence})" for n, m in found.items()))
    return replace(
        template,
        latency_ms=statistics.median(known.values()),
        rounds_ms=tuple((value,) for value in known.values()),
        accepted=tuple(found[name].is_stable for name in known),
        session_ms=tuple(sorted(known.values())) if template.kind == "network" else (),
        measured_at=max(found[name].measured_at for name in known),
        temperature_c=None,
        clock_mhz=None,
        energy_mj=None,
        energy_std_mj=None,
        error=None,
        source="median of " + ", ".join(f"{name} {value!r} ms" for name, value in known.items()),
    )


def _spreads(values: Mapping[str, Mapping[str, float]]) -> tuple[GroupSpread, ...]:
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for of_table in values.values():
        for key, value in of_table.items():
            groups.setdefault(group_of(key), {}).setdefault(key, []).append(value)
    result = []
    for (group, precision), rows in sorted(groups.items()):
        spreads = {k: (max(v) - min(v)) / statistics.median(v) for k, v in rows.items() if len(v) > 1}
        worst = max(spreads, key=lambda k: spreads[k], default="")
        middle = statistics.median(spreads.values()) if spreads else 0.0
        result.append(GroupSpread(group, precision, len(rows), len(spreads), middle, spreads.get(worst, 0.0), worst))
    return tuple(result)


def _ratios(values: Mapping[str, Mapping[str, float]]) -> tuple[tuple[str, float], ...]:
    """Median over the common rows of each table's value to the centre: shows a board that is slower as a whole."""
    centre: dict[str, list[float]] = {}
    for of_table in values.values():
        for key, value in of_table.items():
            centre.setdefault(key, []).append(value)
    middle = {key: statistics.median(found) for key, found in centre.items() if len(found) > 1}
    result = []
    for name, of_table in values.items():
        shared = [value / middle[key] for key, value in of_table.items() if key in middle]
        result.append((name, statistics.median(shared) if shared else 1.0))
    return tuple(result)
