"""`nas table`: shown, compared, merged, imported, exported and verified, with one JSON document and the exit codes."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas.cli.main import run
from nas.core.records import DeviceProfile, Measurement
from nas.latency.correction import Correction, Finding, NetworkEvidence, PrecisionFit
from nas.latency.table import LatencyTable

BLOCK = "ir|in=8x4x4|out=8x4x4|k=3|s=1|e=16|se=0|act=relu|fp32"
GATED = "ir|in=8x8x8|out=16x4x4|k=5|s=2|e=20|se=1|act=hard_swish|fp32"
HEAD = "head|in=8x4x4|out=4x1x1|e=0|h=0|act=relu|fp32"
STATE = DeviceProfile(
    "board", "a board", "ort", "1.0", "15W", True, 1, "d", ("fp32", "int8"), "measured", {"cpus": "2"}
)
OFA = """\
Logits-input:7x7x1280-output:1000:
  count: 1387
  mean: 1.5531997116077862
  std: 0.16853249646502297
expanded_conv-input:14x14x100-output:14x14x100-expand:5-kernel:3-stride:1-idskip:1:
  count: 155
  mean: 2.649470967741936
  std: 0.05
"""


def measured(key: str, value: float | None, **changes: Any) -> Measurement:
    samples = () if value is None else tuple(value * f for f in (1.0, 1.02, 1.04, 1.06))
    fields: dict[str, Any] = dict(
        key=key,
        kind="row" if "|" in key else "overhead",
        precision="fp32" if "|" in key else "none",
        latency_ms=value,
        rounds_ms=(samples, samples) if samples else (),
        accepted=(True, False) if samples else (),
        clock="thread_cpu",
        measured_at="2026-01-01T00:00:00+00:00",
        sequence=1,
        temperature_c=41.5,
        clock_mhz=1500.0,
    )
    return Measurement(**{**fields, **changes})


def table(folder: Path, factor: float = 1.0, **changes: Any) -> Path:
    opened = LatencyTable.open(folder, replace(STATE, name=folder.name, **changes))
    with opened.writing():
        fixed = {"overhead": 0.002, "gate": 0.003, "reference": 0.3, "weights-2MB": 0.5, "weights-2MB-cached": 0.4}
        for key, value in fixed.items():
            opened.add(measured(key, value * factor))
        for key, value in {BLOCK: 0.01, GATED: 0.02, HEAD: 0.005}.items():
            opened.add(measured(key, value * factor))
        opened.add(measured(HEAD.replace("fp32", "int8"), None, precision="int8", error="=no kernel"))
    return folder


def ok(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run([str(a) for a in ("table", *args)]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    return json.loads(ok(capsys, *args, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = run([str(a) for a in ("table", *args)])
    return code, capsys.readouterr().err


def test_show_tells_the_state_each_row_and_the_totals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ok(capsys, "show", table(tmp_path / "t"))
    assert "  power_mode: 15W\n" in text
    assert "  (cpus: 2)\n" in text
    (line,) = [x for x in text.splitlines() if x.startswith(BLOCK)]
    assert line.split()[1:9] == ["8", "1/2", "0.01", "-", "0.0103", "0.0106", "5.8", "41.5"]
    assert "failed: =no kernel" in text
    (total,) = [x for x in text.splitlines() if x.startswith("inverted_residual_se")]
    assert total.split() == ["inverted_residual_se", "fp32", "1", "0", "8", "0.02"]
    assert "weights of 2 MB that leave the cache cost 0.100 ms" in text


def test_rows_have_their_corrected_time_where_networks_were_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = table(tmp_path / "t")
    opened = LatencyTable.open(folder, replace(STATE, name="t"))
    fit = PrecisionFit(
        precision="fp32",
        method="bayes",
        reason="3 measured networks",
        scale=1.1,
        constant=Finding("all", 0.0, 0.03),
        groups=(Finding("inverted_residual_se fp32", 0.2, 0.04),),
        costs=(),
        rows=(Finding(BLOCK, 1.5, 0.1),),
        error=0.02,
        networks=(NetworkEvidence("n", 1.0, 1.1, True),),
    )
    opened.save_correction(Correction(opened.profile.fingerprint, (fit,)))
    rows = {r["key"]: r for r in document(capsys, "show", folder)["rows"]}
    assert rows[BLOCK]["corrected_ms"] == pytest.approx(1.5 * 0.008)  # without the overhead of its call
    assert rows[BLOCK]["corrected_std_ms"] == pytest.approx(0.1 * 0.008)
    assert rows[GATED]["corrected_ms"] == pytest.approx(1.1 * 1.2 * 0.018)  # no network has it: as its group
    assert rows[GATED]["corrected_std_ms"] == pytest.approx(1.1 * 0.05 * 0.018)
    (line,) = [x for x in ok(capsys, "show", folder).splitlines() if x.startswith(BLOCK)]
    assert line.split()[3:5] == ["0.01", "0.012"]


def test_show_as_json_has_rows_groups_and_fixed_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "show", table(tmp_path / "t"))
    assert (found["overhead_ms"], found["reference_ms"]) == (0.002, 0.3)
    assert found["gate_ms"] == pytest.approx(0.001)
    assert found["streaming_ms"] == [[0, 0], [2, pytest.approx(0.1)]]
    assert found["rows"][0]["group"] == "fixed"
    assert {r["key"]: r["latency_ms"] for r in found["rows"]}[GATED] == 0.02
    assert {(g["group"], g["precision"]): g["failed"] for g in found["groups"]}["head", "int8"] == 1


def test_a_reference_that_was_never_calm_has_not_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = LatencyTable.open(tmp_path / "t", STATE)
    with opened.writing():
        opened.add(measured("reference", 0.3, accepted=(False, False)))
    found = document(capsys, "show", tmp_path / "t")
    assert found["reference_ms"] is None, "it was measured in no good session"
    assert [(g["rows"], g["failed"]) for g in found["groups"]] == [(1, 0)]


def test_show_picks_rows_by_group_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "t")
    only = document(capsys, "show", folder, "--group", "head", "--key", "fp32")
    assert [r["key"] for r in only["rows"]] == [HEAD]
    assert BLOCK not in ok(capsys, "show", folder, "--summary")
    code, error = refused(capsys, "show", folder, "--group", "heads")
    assert (code, "--group heads: " in error, "did you mean 'head'?" in error) == (2, True, True)


def test_diff_works_across_device_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = table(tmp_path / "a"), table(tmp_path / "b", 2.0, power_mode="30W")
    found = document(capsys, "diff", a, b)
    assert found["state"] == [{"field": "power_mode", "a": "15W", "b": "30W"}]
    assert {g["group"]: g["median_ratio"] for g in found["groups"]} == {
        name: pytest.approx(2) for name in ("fixed", "head", "inverted_residual", "inverted_residual_se")
    }
    assert "power_mode  15W  30W" in ok(capsys, "diff", a, b)


def test_merge_keeps_the_sources_and_gives_the_median(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [table(tmp_path / f"board{i}", f) for i, f in enumerate((1.0, 1.2, 1.1))]
    before = (folders[1] / "rows.jsonl").read_bytes()
    found = document(capsys, "merge", *folders, "--out", tmp_path / "all")
    assert found["rows"] == 9
    assert [b["median_ratio"] for b in found["boards"]] == pytest.approx([1 / 1.1, 1.2 / 1.1, 1.0])
    assert LatencyTable.read(tmp_path / "all").row_ms(BLOCK) == pytest.approx(0.011)
    assert (tmp_path / "all" / "sources" / "2-board1" / "rows.jsonl").read_bytes() == before
    assert "nothing wrong" in ok(capsys, "verify", tmp_path / "all")
    text = ok(capsys, "show", tmp_path / "all", "--key", BLOCK)
    assert "median of board0 0.01 ms, board1 0.012 ms, board2 0.011" in text
    again = LatencyTable.open(tmp_path / "all", STATE)  # a merged table can be measured into
    again.add(measured(BLOCK, 0.02))
    assert again.row_ms(BLOCK) == 0.02


def test_merge_refuses_other_states_with_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = table(tmp_path / "a"), table(tmp_path / "b", runtime_version="2.0")
    code, error = refused(capsys, "merge", a, b, "--out", tmp_path / "all")
    assert code == 4
    assert "runtime_version: '1.0' and '2.0'" in error
    assert not (tmp_path / "all").exists()


def test_merge_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = table(tmp_path / "a"), table(tmp_path / "b", 2.0)
    code, error = refused(capsys, "merge", a, a, "--out", tmp_path / "all")
    assert (code, "was given twice" in error) == (2, True)
    code, error = refused(capsys, "merge", a, "--out", tmp_path / "all")
    assert (code, "needs at least two tables" in error) == (2, True)
    code, error = refused(capsys, "merge", a, b, "--out", b)
    assert (code, "exists already, and a table is never overwritten" in error) == (6, True)


def importing(tmp_path: Path, text: str = OFA, *more: str) -> list[str]:
    source = tmp_path / "lut.yaml"
    source.write_text(text)
    required = ["--out", str(tmp_path / "dpu"), "--precision", "int8", "--board", "DPU"]
    return ["import", "ofa-yaml", str(source), *required, *more]


def test_import_keeps_provenance_and_every_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = importing(tmp_path, OFA, "--unit", "ms", "--licence", "MIT", "--citation", "somebody 2020")
    found = document(capsys, *args)
    assert (found["entries"], found["row"], found["kept"], found["rejected"]) == (2, 1, 1, 0)
    device = json.loads((tmp_path / "dpu" / "device.json").read_text())["profile"]
    assert device["kind"] == "imported"
    details = device["details"]
    assert (details["source_file"], details["licence"], details["citation"]) == ("lut.yaml", "MIT", "somebody 2020")
    assert len(details["source_sha256"]) == 64
    entries = [json.loads(line) for line in (tmp_path / "dpu" / "entries.jsonl").read_text().splitlines()]
    assert [e["fate"] for e in entries] == ["kept", "row"]
    assert entries[1]["count"] == 155
    key = "ir|in=100x14x14|out=100x14x14|k=3|s=1|e=500|se=0|act=relu|int8"
    assert LatencyTable.read(tmp_path / "dpu").row_ms(key) == 2.649470967741936
    assert "expanded_conv-input:14x14x100" in ok(capsys, "show", tmp_path / "dpu")
    assert "nothing wrong" in ok(capsys, "verify", tmp_path / "dpu")


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        (OFA, [], 2, "Give --unit ms, us or s"),
        (OFA, ["--unit", "s"], 2, "line 5: expanded_conv-input:14x14x100"),
        (OFA, ["--unit", "min"], 2, "--unit"),
        (OFA.replace("2.649", "2,649"), ["--unit", "ms"], 2, "lut.yaml:5: "),
        ("", ["--unit", "ms"], 5, "the file is empty"),
        ("{}", ["--unit", "ms"], 5, "lut.yaml:1: '{}' does not belong into ofa-yaml"),
    ],
)
def test_import_refuses_what_it_cannot_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: list[str], code: int, message: str
) -> None:
    found, error = refused(capsys, *importing(tmp_path, text, *options))
    assert found == code
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["lut.yaml"]


def test_import_of_a_missing_file_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = importing(tmp_path, OFA, "--unit", "ms")
    Path(args[2]).unlink()
    code, error = refused(capsys, *args)
    assert (code, "lut.yaml: cannot be read: No such file" in error) == (6, True)


def test_csv_is_safe_for_spreadsheets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ok(capsys, "export", table(tmp_path / "t"), "--format", "csv")
    rows = {r["key"]: r for r in csv.DictReader(io.StringIO(text))}
    assert float(rows[BLOCK]["latency_ms"]) == 0.01
    assert rows[HEAD.replace("fp32", "int8")]["error"] == "'=no kernel"
    assert rows[HEAD.replace("fp32", "int8")]["latency_ms"] == ""


def test_exported_blocks_can_be_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "t")
    assert run(["table", "export", str(folder), "--format", "ofa-yaml"]) == 0
    out, error = capsys.readouterr()
    assert "1 rows are no inverted residuals and left out" in error
    (tmp_path / "lut.yaml").write_text(out)
    args = ["--out", tmp_path / "back", "--precision", "fp32", "--board", "b", "--unit", "ms"]
    ok(capsys, "import", "ofa-yaml", tmp_path / "lut.yaml", *args)
    first, back = LatencyTable.read(folder), LatencyTable.read(tmp_path / "back")
    assert set(back.rows) == {BLOCK, GATED}
    for key in back.rows:
        assert back.row_ms(key) == first.net_ms(key)  # the overhead of a call is counted once, not per block
    again = ok(capsys, "export", tmp_path / "back", "--format", "ofa-yaml")
    assert ("std:" in out, "std:" in again) == (True, False)  # no spread is made up where samples are not known
    assert back.rows[BLOCK].source in again


def test_export_refuses_what_a_format_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "t")
    opened = LatencyTable.open(folder, STATE)
    opened.add(measured(BLOCK.replace("fp32", "int8"), 0.01, precision="int8"))
    code, error = refused(capsys, "export", folder, "--format", "ofa-yaml")
    assert (code, "has fp32 and int8, and this format has one. Give --precision fp32" in error) == (2, True)
    code, error = refused(capsys, "export", folder, "--format", "csv", "--json")
    assert (code, "--json and --format csv exclude each other" in error) == (2, True)
    found = json.loads(ok(capsys, "export", folder, "--format", "json", "--precision", "int8"))
    assert [r["precision"] for r in found["rows"]] == ["int8", "int8"]


def test_verify_prints_each_problem_with_its_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "t")
    assert document(capsys, "verify", folder) == {"table": str(folder), "ok": True, "problems": []}
    path = folder / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.02", b"0.03", 1)[:-3])
    assert run(["table", "verify", str(folder)]) == 2
    out, error = capsys.readouterr()
    assert f"{path}:9: the last line is torn" in out
    assert "  fix: " in out
    assert "problems in 1 file, the first: " in error
    assert run(["table", "verify", str(folder), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], len(found["problems"])) == (False, out.count("fix:"))
    path.write_bytes(table(tmp_path / "other").joinpath("rows.jsonl").read_bytes()[:-3])
    assert run(["table", "verify", str(folder)]) == 2
    assert "1 problem, at " in capsys.readouterr().err


def test_a_missing_table_names_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("show", "verify"):
        code, error = refused(capsys, verb, tmp_path / "none")
        assert code == 6
        assert "no latency table here" in error and "measure --space NAME" in error


def test_the_group_alone_shows_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    text = ok(capsys)
    assert [verb for verb in ("show", "diff", "merge", "import", "export", "verify") if f"\n  {verb} " in text] == [
        "show", "diff", "merge", "import", "export", "verify",
    ]  # fmt: skip
    code, error = refused(capsys, "shw")
    assert (code, "shw" in error) == (2, True)
