"""`nas table`: the latency table as a thing of its own: shown, compared, merged, imported, exported, verified."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from nas.cli.options import common_options
from nas.cli.output import Console
from nas.core.errors import RecordError, UsageError, did_you_mean
from nas.core.records import Precision
from nas.core.units import format_ms

if TYPE_CHECKING:
    from nas.core.records import Measurement
    from nas.latency.compare import Merged, TableDifference
    from nas.latency.correction import Finding
    from nas.latency.entries import Imported, Unit
    from nas.latency.table import LatencyTable

FORMATS = ("ofa-yaml", "tfnas-json", "conv-csv", "trtexec-text", "trtexec-json")
SHOWN_KEYS = 5  # rows that are in one table only: the first few of each
LESS_IMPORTANT = ("measured", "C", "MHz", "source", "no.", "spread %", "p95 ms")

folder_argument = click.argument("table", type=click.Path(path_type=Path))
out_option = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new table.")


@click.group(short_help="Show, compare, merge, import, export or verify a latency table.", invoke_without_command=True)
@common_options
@click.pass_context
def command(ctx: click.Context) -> None:
    """Works on latency tables: folders with the measured rows of one device state. Nothing is measured here."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@command.command(short_help="The device state, the rows by group, and what was measured beside them.")
@folder_argument
@click.option("--group", help="Only this operator group, such as inverted_residual_se.")
@click.option("--key", "text", metavar="TEXT", help="Only rows whose key contains this text.")
@click.option("--summary", is_flag=True, help="Only the device state and the totals.")
@common_options
@click.pass_obj
def show(console: Console, table: Path, group: str | None, text: str | None, summary: bool) -> None:
    """Shows TABLE: every row with its samples, and the totals of each operator group."""
    from nas.latency.table import LatencyTable

    opened = LatencyTable.read(table)
    for line in opened.warnings:
        console.warn(line)
    records = [r for r in _records(opened) if _is_asked(r, group, text)]
    if group is not None and not records:
        groups = sorted({r["group"] for r in _records(opened)})
        if group not in groups:
            raise UsageError(
                f"--group {group}: {table} has none{did_you_mean(group, groups)} (groups: {', '.join(groups)})"
            )
    profile = opened.profile
    console.say(f"{table}: {profile.name}")
    for name, state in profile.state.items():
        console.say(f"  {name}: {state}")
    for name, value in sorted(profile.details.items()):
        console.say(f"  ({name}: {value})")
    if not summary:
        console.say()
        console.table(_SHOWN, [_cells(r) for r in records], LESS_IMPORTANT)
    console.say()
    totals = _totals(records)
    console.table(("group", "precision", "rows", "failed", "samples", "sum ms"), [_total_cells(t) for t in totals])
    for megabytes, cost in opened.streaming[1:]:
        console.say(f"weights of {megabytes:g} MB that leave the cache cost {format_ms(cost)}")
    console.result(
        {
            "table": str(table),
            "device": profile,
            "overhead_ms": opened.overhead_ms if opened.has_overhead else None,
            "gate_ms": opened.gate_ms if opened.has_overhead else None,
            "reference_ms": opened.reference_ms,
            "streaming_ms": [list(point) for point in opened.streaming],
            "groups": totals,
            "rows": records,
            "edited": opened.edited,
        }
    )


@command.command(short_help="What differs between two tables, of whatever device states.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@common_options
@click.pass_obj
def diff(console: Console, a: Path, b: Path) -> None:
    """Compares table B with table A; ratios are B / A. Two power modes, runtimes or boards may be compared."""
    from nas.latency.compare import compare_tables
    from nas.latency.table import LatencyTable

    found = compare_tables(LatencyTable.read(a), LatencyTable.read(b))
    _say_difference(console, found, a, b)
    groups = [
        {
            "group": g.group,
            "precision": g.precision,
            "rows": g.rows,
            "median_ratio": g.median_ratio,
            "spread": g.spread,
            "least": {"key": g.least.key, "ratio": g.least.ratio},
            "greatest": {"key": g.greatest.key, "ratio": g.greatest.ratio},
        }
        for g in found.groups
    ]
    state = [{"field": name, "a": first, "b": second} for name, first, second in found.state]
    console.result(
        {"a": str(a), "b": str(b), "state": state, "groups": groups, "only_a": found.only_a, "only_b": found.only_b}
    )


@command.command(short_help="One table of several that were measured in one device state.")
@click.argument("tables", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_option
@common_options
@click.pass_obj
def merge(console: Console, tables: tuple[Path, ...], out: Path) -> None:
    """Merges TABLES of several boards in one device state: each row gets the median of the tables' values.

    The tables are kept inside the new one, under sources/, as they are.
    """
    from nas.latency.compare import merge_tables
    from nas.latency.newtable import refuse_existing, write_table
    from nas.latency.table import LatencyTable
    from nas.latency.verify import SOURCES_FOLDER

    refuse_existing(out)
    names = [path.name if [p.name for p in tables].count(path.name) == 1 else str(path) for path in tables]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} was given twice; each table counts once")
    opened = {name: LatencyTable.read(path) for name, path in zip(names, tables, strict=True)}
    merged = merge_tables(opened)
    first = next(iter(opened.values())).profile
    write_table(
        out,
        _merged_profile(first, out.name, names),
        merged.rows,
        merged.networks,
        readme=_merged_readme(out.name, names),
        copies={f"{SOURCES_FOLDER}/{i}-{path.name}": path for i, path in enumerate(tables, start=1)},
    )
    LatencyTable.read(out)
    _say_merged(console, merged)
    console.say(f"table {out}: {len(merged.rows)} rows and {len(merged.networks)} networks of {len(tables)} tables")
    console.result(
        {
            "table": str(out),
            "tables": [str(path) for path in tables],
            "rows": len(merged.rows),
            "networks": len(merged.networks),
            "boards": [{"table": name, "median_ratio": ratio} for name, ratio in merged.ratios],
            "groups": merged.spreads,
        }
    )


@command.command("import", short_help="A table of a published latency file, to borrow rows from.")
@click.argument("form", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("file", type=click.Path(path_type=Path))
@out_option
@click.option("--precision", required=True, type=click.Choice(get_args(Precision)), help="Of the measured layers.")
@click.option("--board", required=True, help="What was measured on.")
@click.option("--unit", type=click.Choice(("ms", "us", "s")), help="Of the times; trtexec says its own.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per timed call.")
@click.option("--similar", is_flag=True, help="Also blocks that differ from ours in the form of an activation only.")
@click.option("--runtime", default="", help="What ran the layers.")
@click.option("--runtime-version", default="", help="Its version.")
@click.option("--power-mode", default="", help="Of the board.")
@click.option("--licence", default="", help="Of the file, such as MIT; kept with the table.")
@click.option("--citation", default="", help="Where the file is from; kept with the table.")
@common_options
@click.pass_obj
def import_command(
    console: Console,
    form: str,
    file: Path,
    out: Path,
    precision: Precision,
    board: str,
    unit: Unit | None,
    batch: int,
    similar: bool,
    runtime: str,
    runtime_version: str,
    power_mode: str,
    licence: str,
    citation: str,
) -> None:
    """Makes a table of FILE. A search may borrow its rows, never take them as its own.

    FORMAT: ofa-yaml, tfnas-json, conv-csv, trtexec-text or trtexec-json. Entries that are exactly
    one of our layers become rows; all entries are kept in entries.jsonl.
    """
    from datetime import UTC, datetime

    from nas.core.jsonio import canonical_json, file_sha256, to_plain
    from nas.latency.entries import ImportSettings
    from nas.latency.importers import imported_profile, measurements, read_source
    from nas.latency.newtable import refuse_existing, write_table
    from nas.latency.table import LatencyTable
    from nas.latency.verify import ENTRIES_FILE, IMPORT_FILE

    refuse_existing(out)
    settings = ImportSettings(precision, unit, batch, similar)
    found = read_source(form, file, settings)
    provenance = {
        "source_file": file.name,
        "source_sha256": file_sha256(file),
        "format": form,
        "unit": unit or "ms",
        "batch": str(batch),
        "licence": licence or "unstated",
        "citation": citation or "unstated",
        "imported_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    counts = {"entries": len(found.entries), **{fate: len(found.of(fate)) for fate in ("row", "kept", "rejected")}}
    record = {**provenance, **counts, "precision": precision, "similar": similar}
    state = {
        "board": board,
        "runtime": runtime,
        "runtime_version": runtime_version,
        "power_mode": power_mode,
        "driver": "",
    }
    rows = measurements(found, "device_event" if form.startswith("trtexec") else "wall")
    profile = imported_profile(out.name, settings, state=state, details=provenance)
    write_table(
        out,
        profile,
        rows,
        readme=_import_readme(out.name, provenance, counts),
        files={
            ENTRIES_FILE: "".join(f"{canonical_json(entry)}\n" for entry in found.entries),
            IMPORT_FILE: json.dumps(to_plain(record), indent=2, ensure_ascii=False) + "\n",
        },
    )
    LatencyTable.read(out)
    _say_import(console, found, counts, file, out)
    console.result({"table": str(out), "device": profile, **record, "warnings": found.warnings})


@command.command(short_help="The rows as CSV or JSON, or as a block table for other tools.")
@folder_argument
@click.option("--format", "form", required=True, type=click.Choice(("csv", "json", "ofa-yaml")), help="Form.")
@click.option("--precision", type=click.Choice(get_args(Precision)), help="Only rows of this precision.")
@common_options
@click.pass_obj
def export(console: Console, table: Path, form: Literal["csv", "json", "ofa-yaml"], precision: str | None) -> None:
    """Prints the rows of TABLE on stdout; json has every sample of every round.

    ofa-yaml has blocks only, each without the overhead of its call, so that a sum over blocks counts it once.
    """
    from nas.latency.table import LatencyTable

    if console.as_json and form != "json":
        raise UsageError(f"--json and --format {form} exclude each other; give one of them")
    opened = LatencyTable.read(table)
    for line in opened.warnings:
        console.warn(line)
    records = [r for r in _records(opened) if precision in (None, r["precision"])]
    if form == "json":
        console.as_json = True
        found = _measured(opened)
        for record in records:
            m = found[record["key"]]
            record |= {"rounds_ms": m.rounds_ms, "accepted": m.accepted, "session_ms": m.session_ms}
        console.result({"table": str(table), "device": opened.profile, "rows": records})
    elif form == "csv":
        click.echo(_csv(records), nl=False)
    else:
        click.echo(_ofa_yaml(console, opened, precision), nl=False)


@command.command(short_help="Checks every line of a table, and says how to repair what is wrong.")
@folder_argument
@common_options
@click.pass_obj
def verify(console: Console, table: Path) -> None:
    """Checks TABLE line by line. The exit code is 0 only when nothing is wrong."""
    from nas.latency.verify import summary_line, verify_table

    problems = verify_table(table)
    for problem in problems:
        console.say(f"{problem.place}: {problem.what}\n  fix: {problem.fix}")
    console.result({"table": str(table), "ok": not problems, "problems": problems})
    if problems:
        raise RecordError(f"{table}: {summary_line(problems)}")
    console.say(f"{table}: nothing wrong")


_SHOWN = (
    *("key", "samples", "rounds", "latency ms", "corrected ms", "median ms", "p95 ms", "spread %"),
    *("C", "MHz", "no.", "measured", "source"),
)


def _records(table: LatencyTable) -> list[dict[str, Any]]:
    """Everything measured in a table, the newest of each, ordered by group, precision and key; fixed rows first."""
    from nas.latency.compare import NETWORK_GROUP, group_of, values_of
    from nas.latency.fitting import written_back

    values = values_of(table)
    correction = table.correction()
    corrected = {} if correction is None else written_back(table, correction)
    order = {"fixed": 0, NETWORK_GROUP: 2}
    records = []
    for key, m in _measured(table).items():
        group, precision = group_of(key)
        if group == NETWORK_GROUP:
            precision = m.precision
        records.append(_record(key, group, precision, m, values.get(key), corrected.get(key)))
    return sorted(records, key=lambda r: (order.get(r["group"], 1), r["group"], r["precision"], r["key"]))


def _measured(table: LatencyTable) -> dict[str, Measurement]:
    """The newest measurement of everything in a table, by key."""
    found: dict[str, Measurement] = {key: rows[-1] for key, rows in table.fixed.items()}
    found |= table.rows
    found |= {key: network.measurement for key, network in table.networks.items()}
    return found


def _record(
    key: str, group: str, precision: str, m: Measurement, value: float | None, corrected: Finding | None
) -> dict[str, Any]:
    import numpy as np

    samples = [s for r in m.rounds_ms for s in r]
    low, middle, high, p95 = np.quantile(samples, (0.1, 0.5, 0.9, 0.95)).tolist() if samples else (None,) * 4
    return {
        "key": key,
        "group": group,
        "precision": precision,
        "latency_ms": value,
        "corrected_ms": None if corrected is None else corrected.value,
        "corrected_std_ms": None if corrected is None else corrected.std,
        "error": m.error,
        "samples": len(samples),
        "rounds": len(m.rounds_ms),
        "rounds_accepted": sum(m.accepted),
        "median_ms": middle,
        "p95_ms": p95,
        "spread": (high - low) / middle if samples and middle > 0 else None,
        "energy_mj": m.energy_mj,
        "energy_std_mj": m.energy_std_mj,
        "transfer_ms": m.transfer_ms,
        "temperature_c": m.temperature_c,
        "clock_mhz": m.clock_mhz,
        "clock": m.clock,
        "sequence": m.sequence,
        "measured_at": m.measured_at,
        "source": m.source,
    }


def _is_asked(record: dict[str, Any], group: str | None, text: str | None) -> bool:
    return (group is None or record["group"] == group) and (text is None or text in record["key"])


def _cells(r: dict[str, Any]) -> list[str]:
    def ms(name: str) -> str:
        return "-" if r[name] is None else f"{r[name]:.4g}"

    return [
        r["key"],
        str(r["samples"]),
        f"{r['rounds_accepted']}/{r['rounds']}",
        ms("latency_ms") if r["error"] is None else f"failed: {r['error']}",
        ms("corrected_ms"),
        ms("median_ms"),
        ms("p95_ms"),
        "-" if r["spread"] is None else f"{100 * r['spread']:.1f}",
        ms("temperature_c"),
        ms("clock_mhz"),
        str(r["sequence"]),
        r["measured_at"] or "-",
        r["source"] or "-",
    ]


def _totals(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["group"], record["precision"]), []).append(record)
    return [
        {
            "group": group,
            "precision": precision,
            "rows": len(found),
            "failed": sum(r["error"] is not None for r in found),
            "samples": sum(r["samples"] for r in found),
            "sum_ms": sum(r["latency_ms"] or 0.0 for r in found),
        }
        for (group, precision), found in groups.items()
    ]


def _total_cells(t: dict[str, Any]) -> list[str]:
    return [t["group"], t["precision"], str(t["rows"]), str(t["failed"]), str(t["samples"]), f"{t['sum_ms']:.4g}"]


def _say_difference(console: Console, found: TableDifference, a: Path, b: Path) -> None:
    console.say(f"A = {a}\nB = {b}")
    if found.state:
        console.table(("state", "A", "B"), found.state)
    else:
        console.say("the device state is the same")
    rows = [
        [
            g.group,
            g.precision,
            str(g.rows),
            f"{g.median_ratio:.3f}",
            f"{100 * g.spread:.1f}",
            f"{g.least.ratio:.3f}",
            g.least.key,
            f"{g.greatest.ratio:.3f}",
            g.greatest.key,
        ]
        for g in found.groups
    ]
    columns = ("group", "precision", "rows", "B/A", "spread %", "least", "least of", "greatest", "greatest of")
    console.table(columns, rows, ("greatest of", "least of", "spread %"))
    for name, keys in (("A", found.only_a), ("B", found.only_b)):
        if keys:
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            console.say(f"only in {name}: {len(keys)} rows and networks: {', '.join(keys[:SHOWN_KEYS])}{more}")


def _say_merged(console: Console, merged: Merged) -> None:
    rows = [
        [
            s.group,
            s.precision,
            str(s.rows),
            str(s.common),
            f"{100 * s.median:.1f}",
            f"{100 * s.greatest:.1f}",
            s.greatest_key,
        ]
        for s in merged.spreads
    ]
    columns = ("group", "precision", "rows", "in several", "apart % (median)", "apart % (most)", "which")
    console.table(columns, rows, ("which",))
    for name, ratio in merged.ratios:
        console.say(f"{name}: {ratio:.3f} times the common value in the median")


def _merged_profile(first: Any, name: str, names: list[str]) -> Any:
    from dataclasses import replace

    return replace(first, name=name, details={**first.details, "merged_from": ", ".join(names)})


def _merged_readme(name: str, names: list[str]) -> str:
    listed = "\n".join(f"- {n}" for n in names)
    return (
        f"# Latency table: {name}\n\nThe centre of these tables, which were measured in one device state and lie whole"
        f" under `sources/`:\n\n{listed}\n\nEvery row is the median of their values and says so in its field `source`;"
        " its rounds are those values.\n"
    )


def _import_readme(name: str, provenance: dict[str, str], counts: dict[str, int]) -> str:
    rows = "\n".join(f"| {key} | {str(value).replace('|', ' ')} |" for key, value in {**provenance, **counts}.items())
    return (
        f"# Latency table: {name}\n\nImported from a published file, not measured here. A search may borrow its rows"
        f" (`--allow-foreign-table`) and then says so.\n\n| what | |\n|---|---|\n{rows}\n\n"
        "`entries.jsonl` has every entry of the file with its fate (row, kept, rejected) and the reason. Rows are"
        " milliseconds per image.\n"
    )


def _say_import(console: Console, found: Imported, counts: dict[str, int], file: Path, out: Path) -> None:
    for line in found.warnings:
        console.warn(line)
    console.say(
        f"{file}: {counts['entries']} entries: {counts['row']} rows, {counts['kept']} kept beside,"
        f" {counts['rejected']} rejected"
    )
    reasons: dict[str, int] = {}
    for entry in found.of("kept"):
        reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        console.say(f"  kept beside: {count}: {reason}")
    console.say(f"table {out}")
    if counts["row"]:
        console.say(f"next: nas search FILE --allow-foreign-table {quote(str(out))}")


def _csv(records: list[dict[str, Any]]) -> str:
    import csv
    import io

    from nas.report.tables import csv_cell

    names = list(records[0]) if records else ["key"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        writer.writerow([csv_cell(record[name]) for name in names])
    return out.getvalue()


def _ofa_yaml(console: Console, table: LatencyTable, precision: str | None) -> str:
    """Blocks with mean, count and std (where there are samples), as Once-for-All reads them; `se`, `hs` always said."""
    from nas.latency.keys import layer_of_key

    layers = [layer_of_key(key) for key, row in table.rows.items() if row.latency_ms is not None]
    there = sorted({x.precision for x in layers})
    if precision is None and len(there) > 1:
        raise UsageError(
            f"{table.folder} has {' and '.join(there)}, and this format has one. Give --precision {there[0]}"
        )
    chosen = [x for x in layers if precision in (None, x.precision)]
    blocks = [x for x in chosen if x.kind == "inverted_residual"]
    if len(blocks) < len(chosen):
        console.warn(f"{len(chosen) - len(blocks)} rows are no inverted residuals and left out; --format json has all")
    lines = [f"# ms per block without the overhead of a call ({table.overhead_ms:.4g} ms); {table.profile.name}"]
    for x in blocks:
        row = table.rows[x.key]
        lines.append(
            f"expanded_conv-input:{x.in_size}x{x.in_size}x{x.in_channels}"
            f"-output:{x.out_size}x{x.out_size}x{x.out_channels}-expand:{x.expanded_channels / x.in_channels:.8g}"
            f"-kernel:{x.kernel_size}-stride:{x.stride}-idskip:{int(x.has_residual)}-se:{int(x.use_se)}"
            f"-hs:{int(x.activation == 'hard_swish')}:"
        )
        lines.append(f"  mean: {table.net_ms(x.key)!r}")
        if count := sum(map(len, row.rounds_ms)):
            lines += [f"  count: {count}", f"  std: {table.row_std_ms(x.key)!r}"]
        else:  # imported or interpolated: a spread that nobody measured is not written
            lines.append(f"  # {' '.join(row.source.split()) or 'no samples'}")
    return "\n".join(lines) + "\n"
