"""Energy of a candidate from the rows of a table: additive, corrected by measured networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from latency_examples import candidate, profile

from nas.core.errors import MissingRowError, RecordError
from nas.core.jsonio import from_plain, to_plain
from nas.core.records import EnergyFigures, Measurement
from nas.core.walk import expand
from nas.latency.energy import ASSUMED_ERROR, LEAST_NETWORKS, EnergyEstimate, EnergyEstimator, figures, has_energy
from nas.latency.lines import OVERHEAD_KEY, line_of, network_key
from nas.latency.table import LatencyTable

CALL_MJ = 0.5


def measurement(key: str, kind: str, energy_mj: float | None, **changes: object) -> Measurement:
    std = None if energy_mj is None else 0.1
    made = Measurement(
        key,
        "overhead",
        "none",
        1.0,
        ((1.0,),),
        (True,),
        "device_event",
        "now",
        1,
        energy_mj=energy_mj,
        energy_std_mj=std,
    )
    return replace(made, kind=kind, **changes)  # type: ignore[arg-type]


def row_energies() -> dict[str, float]:
    """1, 2, 3, ... mJ for the rows of the example, in the order of the walk."""
    return {layer.key: float(i) for i, layer in enumerate(expand(candidate()), start=1)}


@pytest.fixture
def table(tmp_path: Path) -> LatencyTable:
    made = LatencyTable.open(tmp_path / "table", profile())
    made.add(measurement(OVERHEAD_KEY, "overhead", CALL_MJ))
    for layer in expand(candidate()):
        made.add(measurement(layer.key, "row", row_energies()[layer.key], precision=layer.precision, latency_ms=1.0))
    return made


def test_rows_are_added_without_their_call_which_counts_once(table: LatencyTable) -> None:
    layers = expand(candidate())
    found = EnergyEstimator(table).estimate(candidate())
    total = CALL_MJ + sum(row_energies()[layer.key] - CALL_MJ for layer in layers)
    assert found.worst_mj == pytest.approx(total)
    first = [layer for layer in layers if layer.segment == 0]
    assert found.exit_mj[0] == pytest.approx(CALL_MJ + sum(row_energies()[x.key] - CALL_MJ for x in first))
    assert len(found.exit_mj) == 2 and found.exit_mj[0] < found.exit_mj[1]


def test_without_measured_networks_the_error_is_assumed_and_says_so(table: LatencyTable) -> None:
    found = EnergyEstimator(table).estimate(candidate())
    assert found.networks == 0
    assert found.exit_std_mj[-1] > ASSUMED_ERROR * found.worst_mj
    told = figures(found, (0.25, 0.75))
    assert told.provenance == "predicted" and told.is_error_assumed
    assert told.expected_mj == pytest.approx(0.25 * found.exit_mj[0] + 0.75 * found.exit_mj[1])


def test_measured_networks_correct_the_sum_and_give_its_error(table: LatencyTable) -> None:
    plain = EnergyEstimator(table).estimate(candidate()).worst_mj
    factors = (0.80, 0.79, 0.81, 0.82)
    for i, factor in enumerate(factors):
        other = candidate().with_thresholds((None,))
        other = replace(other, num_classes=other.num_classes)
        form = ("logits", "if", "plain")[i] if i < 3 else "logits"
        if i == 3:
            other = replace(other, head=replace(other.head, conv_channels=88))
            for layer in expand(other):
                if layer.key not in row_energies():
                    last = row_energies()[expand(candidate())[-1].key]
                    table.add(measurement(layer.key, "row", last, precision=layer.precision))
        m = measurement(network_key(other, form), "network", factor * plain, precision="fp32")  # type: ignore[arg-type]
        table.add(m, other, form)  # type: ignore[arg-type]
    found = EnergyEstimator(table).estimate(candidate())
    assert found.networks == LEAST_NETWORKS
    assert found.worst_mj == pytest.approx(0.805 * plain, rel=1e-6)
    assert found.exit_std_mj[-1] < 0.05 * found.worst_mj, "far less than what is assumed without networks"
    assert not figures(found, (0.0, 1.0)).is_error_assumed


def test_measured_energy_is_told_as_such() -> None:
    told = figures(EnergyEstimate((1.0, 3.0), (0.1, 0.2), 0, "measured"), (0.5, 0.5))
    assert told == EnergyFigures(2.0, 3.0, pytest.approx(0.15), "measured")


def test_a_row_without_energy_is_named_with_what_to_do(table: LatencyTable) -> None:
    layer = expand(candidate())[2]
    table.add(measurement(layer.key, "row", None, precision=layer.precision, latency_ms=0.9, rounds_ms=((0.9,),)))
    with pytest.raises(MissingRowError, match=r"has no energy in .*table: the device has no power sensor.*nas doctor"):
        EnergyEstimator(table).estimate(candidate())


def test_a_table_without_energy_is_told_apart(tmp_path: Path, table: LatencyTable) -> None:
    assert has_energy(table)
    bare = LatencyTable.open(tmp_path / "bare", profile())
    bare.add(measurement(OVERHEAD_KEY, "overhead", None))
    assert not has_energy(bare)
    with pytest.raises(MissingRowError, match="overhead has no energy"):
        EnergyEstimator(bare)


def test_energy_survives_the_file_and_lines_without_it_stay_as_they_were(table: LatencyTable) -> None:
    again = LatencyTable.read(table.folder)
    assert {key: m.energy_mj for key, m in again.rows.items()} == row_energies()
    line = line_of(measurement(OVERHEAD_KEY, "overhead", None), "state")["row"]
    assert "energy_mj" not in line and "energy_std_mj" not in line
    assert from_plain(Measurement, line, "x").energy_mj is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"energy_mj": 0.0, "energy_std_mj": 0.0}, "energy_mj must be positive, got 0"),
        ({"energy_mj": 1.0, "energy_std_mj": -1.0}, "energy_std_mj must not be negative"),
        ({"energy_mj": 1.0, "energy_std_mj": None}, "energy_mj and energy_std_mj go together"),
    ],
)
def test_impossible_energies_are_refused(changes: dict[str, float | None], problem: str) -> None:
    plain = to_plain(measurement(OVERHEAD_KEY, "overhead", 1.0)) | changes
    with pytest.raises(RecordError, match=problem):
        from_plain(Measurement, plain, "line 3")
