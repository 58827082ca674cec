"""The front as rows, records and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from made_run import made_view

from nas.core.jsonio import canonical_json
from nas.core.records import EnergyFigures
from nas.core.run import BudgetPick, RunView
from nas.report.cards import card
from nas.report.tables import (
    csv_cell,
    format_energy,
    format_number,
    format_spread,
    front_csv,
    front_notes,
    front_records,
    front_table,
    notes,
    precision_notes,
    proposer_table,
)


def test_rows_are_the_front_with_the_pick_marked() -> None:
    view = made_view()
    columns, rows = front_table(view)
    assert len(rows) == len(view.front) and all(len(r) == len(columns) for r in rows)
    picked = [r for r in rows if "pick" in r[columns.index("note")].split(", ")]
    assert [r[0] for r in picked] == [view.point(view.pick_id or "").label]


def test_given_students_are_shown_in_their_order() -> None:
    view = made_view()
    given = view.points[3:1:-1]
    assert [r[0] for r in front_table(view, given)[1]] == [p.label for p in given]
    assert [r["id"] for r in front_records(view, given)] == [p.id for p in given]


def test_notes_say_what_is_wrong_with_a_student() -> None:
    view = made_view()
    slow = max(view.points, key=lambda p: p.latency.expected_ms)
    assert notes(view, replace(slow, is_finished=False)) == ["over budget", "not finished"]


def test_a_pick_for_a_further_deadline_is_noted() -> None:
    view = made_view()
    point = view.front[0]
    picked = replace(view, also=(BudgetPick(1.5, point.id, ""), BudgetPick(0.5, None, "")))
    assert "pick for 1.5 ms" in notes(picked, point)
    assert front_records(picked)[0]["pick_for_ms"] == [1.5]
    assert all(not r["pick_for_ms"] for r in front_records(picked)[1:])


@pytest.mark.parametrize(("factor", "verdict"), [(1.4, "slower"), (0.7, "faster"), (1.01, "no gain")])
def test_what_a_precision_does_to_latency_is_said_in_words(factor: float, verdict: str) -> None:
    view = replace(made_view(), pick_id=None, next_id=None, closest_id=None)
    full = next(p for p in view.points if p.precision == "fp32" and p.latency.provenance == "measured")
    latency = replace(full.latency, worst_ms=factor * full.latency.worst_ms)
    quantized = replace(full, id="quantized", candidate=full.candidate.with_precision("int8"), latency=latency)
    (line,) = precision_notes(replace(view, points=(full, quantized)))
    assert line.startswith(f"int8 takes {factor:.2f} times the worst-case latency of fp32 ({verdict} here; median of 1")
    assert "1 of them measured in both" in line
    assert precision_notes(replace(view, points=(full,))) == ()


def test_predictions_from_rows_of_another_device_state_say_so_everywhere() -> None:
    view = made_view()
    foreign = replace(view, provenance={**view.provenance, "foreign table": "tables/other"})
    sources = {p.latency.provenance for p in view.points}
    assert sources == {"predicted", "measured"}
    columns, rows = front_table(foreign, foreign.points)
    shown = {row[columns.index("latency is")] for row in rows}
    assert shown == {r["latency_is"] for r in front_records(foreign, foreign.points)}
    assert shown == {"predicted, foreign rows", "measured"}
    assert '"predicted, foreign rows"' in front_csv(foreign, foreign.points)
    assert "another device state (tables/other), scaled to this one" in front_notes(foreign)[0]
    assert front_notes(view) == precision_notes(view)


def test_records_are_plain_json_in_the_units_of_their_names() -> None:
    record = front_records(made_view())[0]
    assert canonical_json(record)
    assert 0 <= record["top1"] <= 1 and record["latency_is"] in ("measured", "predicted")
    assert sum(record["exit_shares"]) == pytest.approx(1)


def test_csv_reads_back() -> None:
    view = made_view()
    rows = list(csv.DictReader(io.StringIO(front_csv(view))))
    assert [r["id"] for r in rows] == [p.id for p in view.front]
    assert [float(r["expected_ms"]) for r in rows] == [p.latency.expected_ms for p in view.front]
    assert list(csv.reader(io.StringIO(front_csv(RunView(name="r", status="running", created_at=""))))) == [["id"]]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1"])
def test_text_that_a_spreadsheet_would_run_is_guarded(text: str) -> None:
    assert csv_cell(text) == "'" + text
    view = made_view()
    front = view.front
    renamed = replace(view, points=tuple(replace(p, label=text) for p in front), pick_id=None, next_id=None)
    row = next(csv.DictReader(io.StringIO(front_csv(renamed), newline="")))
    assert row["label"] == "'" + text


def test_numbers_keep_their_sign_in_csv() -> None:
    assert [csv_cell(v) for v in (-1.5, 3, None, True, (0.5, None, -2.0), "a-b")] == [
        "-1.5", "3", "", "true", "0.5  -2.0", "a-b",
    ]  # fmt: skip


def test_a_name_cannot_move_the_cursor_of_a_terminal() -> None:
    view = made_view()
    renamed = replace(view, points=tuple(replace(p, label="x\x1b[2J\ny") for p in view.points))
    assert front_table(renamed)[1][0][0] == "x?[2J?y"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0312, "0.0312"), (1.25, "1.25"), (148.2, "148"), (0, "0"), (1e-7, "0.000000100"), (12345.0, "12345")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [(0.301, 0.02, "0.020"), (0.301, 0.0002, "0.0002"), (12.3, 0.4, "0.4"), (5.0, 0.0, "0.00")],
)
def test_spread_has_the_decimals_of_its_value(value: float, std: float, text: str) -> None:
    assert format_spread(value, std) == text


def test_the_proposer_of_each_student_is_in_the_table_the_records_and_the_csv() -> None:
    view = made_view()
    point = view.front[0]
    trial = next(t for t in view.trials if t.number == point.trial)
    trials = tuple(replace(t, proposer="additive") if t is trial else t for t in view.trials)
    changed = replace(view, trials=trials)
    columns, rows = front_table(changed)
    assert rows[0][columns.index("proposer")] == "additive"
    assert front_records(changed)[0]["proposer"] == "additive"
    assert next(csv.DictReader(io.StringIO(front_csv(changed))))["proposer"] == "additive"
    unknown = replace(view, trials=())
    assert front_table(unknown)[1][0][columns.index("proposer")] == "-"
    assert front_records(unknown)[0]["proposer"] is None


def test_each_proposer_has_a_line_with_what_came_of_it() -> None:
    columns, rows = proposer_table(made_view())
    assert columns[0] == "proposer"
    assert rows == [
        ("greybox", "158", "3", "9", "5", "41.2 % of hypervolume"),
        ("first", "2", "0", "1", "0", "0.8 % of hypervolume"),
    ]


def test_energy_has_a_column_only_where_a_student_has_one() -> None:
    view = made_view()
    assert "energy mJ" not in front_table(view)[0]
    assert {r["energy_mj"] for r in front_records(view)} == {None}
    first, *others = view.front
    measured = replace(first, energy=EnergyFigures(12.34, 15.0, 0.41, "measured"))
    columns, rows = front_table(view, [measured, *others])
    assert [row[columns.index("energy mJ")] for row in rows][:2] == ["12.3 +- 0.4", "-"]
    record = front_records(view, [measured])[0]
    assert (record["energy_mj"], record["energy_std_mj"], record["energy_is"]) == (12.34, 0.41, "measured")
    assert format_energy(EnergyFigures(12.34, 15.0, 3.1, "predicted", True)) == "12.3 +- 3.1 (predicted)"


def test_the_card_says_where_an_energy_comes_from() -> None:
    view = made_view()
    assert "Energy" not in {fact["name"] for fact in card(view, view.front[0])["facts"]}
    point = replace(view.front[0], energy=EnergyFigures(12.34, 15.0, 3.1, "predicted", True))
    fact = next(f for f in card(view, point)["facts"] if f["name"] == "Energy")
    assert fact["value"] == "12.3 mJ"
    assert fact["detail"].startswith(
        "predicted, ± 3.1 mJ; with the idle power of the board; no measured network says yet"
    )
    assert fact["detail"].endswith("15.0 mJ where no exit is taken")
