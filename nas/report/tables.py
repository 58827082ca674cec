"""The front of a run as text rows, CSV and plain JSON: one line per student."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from nas.core.records import EnergyFigures
from nas.core.run import DIALECT_MARK, FOREIGN_MARK, INTERPOLATED_MARK, Point, RunView, latency_of
from nas.core.units import format_bytes, format_count

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
EQUAL = 0.02  # ratio below which two latencies are called equal
LATENCY_NAMES = {"expected": "expected", "worst": "worst case", "p99": "99th percentile"}


def front_table(view: RunView, points: Sequence[Point] | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names and one row of text per student, for a table on a terminal.

    Args:
        view: the run.
        points: the students to show, in this order; None: the front, fastest first.
    """
    shown = view.front if points is None else points
    with_energy = any(p.energy is not None for p in shown)
    columns = (
        "student",
        "top1 %",
        "split",
        "expected ms",
        "worst ms",
        "+- ms",
        "latency is",
        *(("energy mJ",) if with_energy else ()),
        "exits used %",
        "precision",
        "params",
        "MACs",
        "size",
        "trial",
        "proposer",
        "note",
    )
    rows: list[tuple[str, ...]] = [
        (
            plain_line(name_of(p)),
            f"{100 * p.top1:.1f}",
            p.split,
            format_number(p.latency.expected_ms),
            format_number(p.latency.worst_ms),
            format_spread(p.latency.expected_ms, p.latency.std_ms),
            latency_source(view, p),
            *((format_energy(p.energy),) if with_energy else ()),
            " / ".join(f"{100 * s:.0f}" for s in p.exit_shares) or "-",
            p.candidate.precision_text,
            format_count(p.params),
            format_count(p.macs),
            format_bytes(p.weight_bytes if p.model_bytes is None else p.model_bytes),
            "-" if p.trial is None else str(p.trial),
            plain_line(view.proposer_of(p)) or "-",
            ", ".join(notes(view, p)),
        )
        for p in shown
    ]
    return columns, rows


def format_energy(energy: EnergyFigures | None) -> str:
    """`12.3 +- 0.4`, marked where it was predicted; `-` where nothing is known."""
    if energy is None:
        return "-"
    mark = "" if energy.provenance == "measured" else " (predicted)"
    return f"{format_number(energy.expected_mj)} +- {format_spread(energy.expected_mj, energy.std_mj)}{mark}"


def proposer_table(view: RunView) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names and one row of text for each proposer: what came of its candidates."""
    columns = ("proposer", "scored", "failed", "on the front of scores", "students on the front", "lost without it")
    rows = [
        (
            plain_line(s.name),
            str(s.scored),
            str(s.failed),
            str(s.on_front),
            str(s.students),
            f"{100 * s.hypervolume_lost:.1f} % of hypervolume",
        )
        for s in view.proposers
    ]
    return columns, rows


def front_records(view: RunView, points: Sequence[Point] | None = None) -> list[dict[str, Any]]:
    """The same as one mapping of plain values per student; latencies in ms, accuracies and shares from 0 to 1."""
    return [
        {
            "id": p.id,
            "label": p.label,
            "trial": p.trial,
            "proposer": view.proposer_of(p) or None,
            "arch_id": p.arch_id,
            "top1": p.top1,
            "split": p.split,
            "images": p.accuracy.images,
            "val_top1": None if p.val is None else p.val.top1,
            "test_top1": None if p.test is None else p.test.top1,
            "expected_ms": p.latency.expected_ms,
            "worst_ms": p.latency.worst_ms,
            "p99_ms": p.latency.p99_ms,
            "std_ms": p.latency.std_ms,
            "latency_is": latency_source(view, p),
            "energy_mj": None if p.energy is None else p.energy.expected_mj,
            "energy_std_mj": None if p.energy is None else p.energy.std_mj,
            "energy_is": None if p.energy is None else p.energy.provenance,
            "precision": p.precision,
            "precisions": list(p.candidate.precisions),
            "exits": len(p.candidate.exits),
            "thresholds": list(p.thresholds),
            "exit_shares": list(p.exit_shares),
            "exit_ms": list(p.exit_ms),
            "exit_temperatures": [c.temperature for c in p.confidence],
            "stream_ms": None if p.stream is None else p.stream.mean_ms,
            "stream_p99_ms": None if p.stream is None else p.stream.p99_ms,
            "params": p.params,
            "macs": p.macs,
            "size_bytes": p.weight_bytes if p.model_bytes is None else p.model_bytes,
            "is_finished": p.is_finished,
            "on_front": p.on_front,
            "is_pick": p.id == view.pick_id,
            "is_for_all_devices": view.common is not None and p.id == view.common.student,
            "pick_for_ms": [pick.budget_ms for pick in view.also if pick.student == p.id],
            "meets_budget": view.meets_budget(p),
        }
        for p in (view.front if points is None else points)
    ]


def front_csv(view: RunView, points: Sequence[Point] | None = None) -> str:
    """The same as CSV (RFC 4180); lists are joined by spaces, text that a spreadsheet would run is guarded by `'`."""
    records = front_records(view, points)
    out = io.StringIO()
    names = list(records[0]) if records else ["id"]
    writer = csv.writer(out)
    writer.writerow(names)
    for record in records:
        writer.writerow([csv_cell(record[name]) for name in names])
    return out.getvalue()


def csv_cell(value: Any) -> str:
    """One cell: numbers as they are, text guarded against being run as a formula by a spreadsheet."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return " ".join(csv_cell(v) for v in value)
    text = str(value)
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA_STARTS) or text.startswith(_FORMULA_STARTS) else text


def name_of(point: Point) -> str:
    """What a student is called in tables: its label, else its id."""
    return point.label or point.id


def latency_source(view: RunView, point: Point) -> str:
    """`measured`, `predicted`, or that the prediction rests on rows of another device state."""
    is_foreign = FOREIGN_MARK in view.provenance and point.latency.provenance == "predicted"
    return "predicted, foreign rows" if is_foreign else point.latency.provenance


def notes(view: RunView, point: Point) -> list[str]:
    """What is worth saying of a student in a table: pick, runner-up, closest, over budget, not finished."""
    result = []
    if point.id == view.pick_id:
        result.append("pick")
    result += [f"pick for {pick.budget_ms:g} ms" for pick in view.also if pick.student == point.id]
    if view.common is not None and point.id == view.common.student:
        result.append("for all devices")
    if point.id == view.next_id:
        result.append("next best")
    if point.id == view.closest_id:
        result.append("closest")
    if not view.meets_budget(point):
        result.append("over budget")
    if not point.is_finished:
        result.append("not finished")
    return result


def front_notes(view: RunView) -> tuple[str, ...]:
    """What must be said beside the front, a sentence each: rows of another device state or interpolated ones, whose
    accuracies in int8 they are, then `precision_notes`.
    """
    foreign, guessed = view.provenance.get(FOREIGN_MARK), view.provenance.get(INTERPOLATED_MARK)
    found = precision_notes(view)
    if (borrowed := view.provenance.get(DIALECT_MARK)) is not None:
        found = (f"accuracies and thresholds in int8 are {borrowed}", *found)
    if guessed is not None:
        found = (
            f"candidates were proposed by a table of which {guessed} rows are interpolated from measured ones; those "
            "of finished students are measured",
            *found,
        )
    if foreign is None:
        return found
    return (
        f"predicted latencies rest on rows that were measured in another device state ({foreign}), scaled to this one; "
        "measured latencies are this device's own",
        *found,
    )


def precision_notes(view: RunView) -> tuple[str, ...]:
    """What each precision does to the latency of the students on this device, a sentence each.

    A user who expects int8 to be faster must see that the device decides that: on many CPUs it is slower than fp32.
    """
    worst: dict[str, dict[tuple[int | None, str], Point]] = {}
    for point in view.points:
        if point.precision != "mixed":
            known = worst.setdefault(point.precision, {})
            key = (point.trial, point.candidate.architecture.arch_id)
            if key not in known or point.latency.provenance == "measured":
                known[key] = point
    full = worst.pop("fp32", {})
    result = []
    for precision, students in sorted(worst.items()):
        pairs = [(full[key], students[key]) for key in students if key in full]
        if not pairs:
            continue
        ratio = statistics.median(b.latency.worst_ms / a.latency.worst_ms for a, b in pairs)
        measured = sum({a.latency.provenance, b.latency.provenance} == {"measured"} for a, b in pairs)
        verdict = "no gain here" if abs(ratio - 1) <= EQUAL else ("slower here" if ratio > 1 else "faster here")
        result.append(
            f"{precision} takes {ratio:.2f} times the worst-case latency of fp32 ({verdict}; median of {len(pairs)} "
            f"deployments, {measured} of them measured in both, the others by the corrected table)"
        )
    return tuple(result)


def budget_latency_ms(view: RunView, point: Point) -> float:
    """The latency of a student that its run's budget limits."""
    return latency_of(point.latency, view.budget_of)


def plain_line(text: str) -> str:
    """Text as one printable line: a name cannot move a terminal's cursor or break a table."""
    return "".join(c if c.isprintable() else "?" for c in text)


def format_spread(value: float, std: float) -> str:
    """A standard deviation with as many decimals as its value is shown with, or one digit where that would give 0."""
    shown = format_number(value)
    decimals = len(shown.partition(".")[2])
    if std == 0 or float(f"{std:.{decimals}f}") > 0:
        return f"{std:.{decimals}f}"
    return f"{std:.{-int(f'{std:e}'.split('e')[1])}f}"


def format_number(value: float) -> str:
    """A number with three significant digits and no exponent: `0.0312`, `1.25`, `148`."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:.{digits}f}"
