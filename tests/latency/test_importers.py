"""Published latency files become entries: rows where they are exactly our layers, and nothing is dropped silently."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from latency_examples import filled, measured, profile

from nas.core.errors import DataError, NasError, RecordError, StorageError, UsageError
from nas.core.records import Measurement
from nas.latency.entries import Imported, ImportSettings
from nas.latency.importers import FORMATS, imported_profile, measurements, read_source
from nas.latency.keys import layer_of_key
from nas.latency.newtable import write_table
from nas.latency.table import FOREIGN_ROW_STD, LatencyTable

# Lines of the published files, shortened: MIT (once-for-all fork, TF-NAS), Apache-2.0 (TinyNAS).
OFA = """\
Conv-input:224x224x3-output:112x112x30:
  count: 1406
  mean: 3.58649146514936
  std: 0.24611484007984194
expanded_conv-input:112x112x20-output:56x56x30-expand:4-kernel:3-stride:2-idskip:0:
  count: 153
  mean: 7.375339869281047
  std: 0.17678930864809245
expanded_conv-input:14x14x100-output:14x14x100-expand:5-kernel:3-stride:1-idskip:1:
  count: 155
  mean: 2.649470967741936
  std: 0.05
"""
STRIDED = "ir|in=20x112x112|out=30x56x56|k=3|s=2|e=80|se=0|act=relu|int8"
SKIPPED = "ir|in=100x14x14|out=100x14x14|k=3|s=1|e=500|se=0|act=relu|int8"
TFNAS = {
    "base": 1.985807514190674,
    "MBInvertedResBlock_112_16_0_24_k3_s2_relu": {
        "1": -0.23309380454676498,
        "10": -0.0035714890275682087,
        "12": 0.047433469976697396,
        "16": 0.1494433879852295,
        "32": 0.8011963367462158,
    },
    "MBInvertedResBlock_28_40_0_40_k5_s1_swish": {"120": 0.5},
    "MBInvertedResBlock_56_24_24_24_k3_s1_relu": {"96": 0.9, "144": 1.3},
}
EXACT = "ir|in=16x112x112|out=24x56x56|k=3|s=2|e=32|se=0|act=relu|fp32"
CONVS = """\
conv_type,batch,in_c,in_h,in_w,out_c,kernel,stride,elmt_fused,latency
Regular,128,3,480,480,192,7,2,1,30.9881
Regular,128,3,480,480,160,7,2,1,-1
Depthwise,1,64,28,28,64,3,1,0,0.0101
"""
PROFILE_7 = """\
[I] GPU Compute
[I] median: 3.66748 ms
[I] === Profile (1514 iterations ) ===
[I]                           Layer   Time (ms)   Avg. Time (ms)   Time %
[I]                     data to nvm       68.17             0.05      1.2
[I]              {conv1/7x7_s2,pool1}     500.00             0.33      8.9
[I]                           Total      568.17             0.38    100.0
&&&& PASSED
"""
PROFILE_8 = """\
[05/08/2024-14:05:14] [I] === Profile (2094 iterations ) ===
[05/08/2024-14:05:14] [I]    Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer
[05/08/2024-14:05:14] [I]       16.15       0.0077       0.0075       0.5   Reformatting CopyNode for Input Tensor 0
[05/08/2024-14:05:14] [I]       47.82       0.0228       0.0225       1.6   conv1 + res_conv1_bn_1
[05/08/2024-14:05:14] [I]        0.00       0.0000       0.0000       0.0   shape
[05/08/2024-14:05:14] [I]       63.97       0.0305       0.0300     100.0   Total
"""
EXPORTED = '[{"count": 120}, {"name": "Conv_0 + Relu_1", "timeMs": 6.1, "averageMs": 0.0508, "medianMs": 0.0505}]'


def read(
    tmp_path: Path, form: str, text: str | bytes | dict[str, object], name: str = "source.txt", **settings: object
) -> Imported:
    path = tmp_path / name
    if isinstance(text, dict):
        text = json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    defaults: dict[str, object] = {"precision": "fp32", "unit": None if form.startswith("trtexec") else "ms"}
    return read_source(form, path, ImportSettings(**{**defaults, **settings}))  # type: ignore[arg-type]


def fates(found: Imported) -> list[str]:
    return [e.fate for e in found.entries]


def row_of(found: Imported, key: str) -> Measurement:
    return next(m for m in measurements(found) if m.key == key)


def test_ofa_blocks_become_rows_with_count_and_std(tmp_path: Path) -> None:
    found = read(tmp_path, "ofa-yaml", OFA, precision="int8")
    assert fates(found) == ["kept", "row", "row"]
    assert [e.key for e in found.entries] == [None, STRIDED, SKIPPED]
    assert [(e.count, e.std_ms) for e in found.entries][1] == (153, 0.17678930864809245)
    assert found.entries[0].name == "conv|in=224x224x3|out=112x112x30"
    assert found.entries[0].reason == "kernel or stride are not said"
    row = row_of(found, STRIDED)
    assert row.latency_ms == 7.375339869281047
    assert row.source.startswith("expanded_conv-input:112x112x20-output:56x56x30-expand:4-kernel:3")
    assert row.source.endswith("mean of 153, std 0.17678930864809245 ms")


def test_the_unit_scales_value_and_deviation(tmp_path: Path) -> None:
    in_us = (
        "expanded_conv-input:112x112x20-output:56x56x30-expand:4-kernel:3-stride:2-idskip:0:\n  mean: 7375\n  std: 5\n"
    )
    entry = read(tmp_path, "ofa-yaml", in_us, unit="us", precision="int8").entries[0]
    assert entry.latency_ms == pytest.approx(7.375)
    assert entry.std_ms == pytest.approx(0.005)
    assert entry.count is None


def test_ofa_fields_for_se_and_hard_swish_are_read(tmp_path: Path) -> None:
    text = "expanded_conv-input:14x14x16-output:14x14x24-expand:4-kernel:5-stride:1-idskip:0-se:1-hs:1:\n  mean: 0.2\n"
    assert read(tmp_path, "ofa-yaml", text).entries[0].key == (
        "ir|in=16x14x14|out=24x14x14|k=5|s=1|e=64|se=1|act=hard_swish|fp32"
    )


def test_an_ofa_block_whose_skip_is_not_ours_is_kept_beside(tmp_path: Path) -> None:
    text = OFA.replace("expand:5-kernel:3-stride:1-idskip:1", "expand:5-kernel:3-stride:1-idskip:0")
    entry = read(tmp_path, "ofa-yaml", text, precision="int8").entries[2]
    assert (entry.fate, entry.key) == ("kept", None)
    assert "its skip or its output is not that of our block" in entry.reason


def test_tfnas_negative_entries_are_rejected_by_name_and_counted(tmp_path: Path) -> None:
    found = read(tmp_path, "tfnas-json", TFNAS)
    assert found.warnings == (
        "2 of 9 entries rejected (negative): MBInvertedResBlock_112_16_0_24_k3_s2_relu[1],"
        " MBInvertedResBlock_112_16_0_24_k3_s2_relu[10]",
    )
    assert [e.source.rpartition("_")[2] for e in found.of("rejected")] == ["relu[1]", "relu[10]"]
    assert all(m.latency_ms is not None and m.latency_ms > 0 for m in measurements(found))


def test_only_exact_tfnas_blocks_become_rows_unless_similar_ones_are_asked_for(tmp_path: Path) -> None:
    strict, similar = (read(tmp_path, "tfnas-json", TFNAS, similar=s) for s in (False, True))
    assert [e.key for e in strict.of("row")] == [EXACT.replace("e=32", "e=16"), EXACT]
    swish = "ir|in=40x28x28|out=40x28x28|k=5|s=1|e=120|se=0|act=hard_swish|fp32"
    gated = "ir|in=24x56x56|out=24x56x56|k=3|s=1|e=96|se=1|act=relu|fp32"
    assert [e.key for e in similar.of("row")][2:] == [swish, gated]
    assert "similar: it has swish for hard swish" in row_of(similar, swish).source
    assert {e.source: e.reason for e in strict.of("kept")} == {
        "base": "not one layer",
        "MBInvertedResBlock_112_16_0_24_k3_s2_relu[12]": "widths below the input's are not built as such in the source",
        "MBInvertedResBlock_28_40_0_40_k5_s1_swish[120]": "similar: it has swish for hard swish",
        "MBInvertedResBlock_56_24_24_24_k3_s1_relu[96]": "similar: it has a sigmoid gate in SE",
        "MBInvertedResBlock_56_24_24_24_k3_s1_relu[144]": "another width of SE than ours",
    }


def test_a_batch_is_divided_off_for_rows_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, "tfnas-json", TFNAS, batch=32)
    row = row_of(found, EXACT)
    assert row.latency_ms == pytest.approx(0.8011963367462158 / 32)
    assert row.source == "MBInvertedResBlock_112_16_0_24_k3_s2_relu[32]: 0.8011963367462158 ms, for 32 images"
    assert imported_profile("x", ImportSettings("fp32", "ms", 32), state={}, details={}).runtime == "unstated batch=32"


def test_failed_convolutions_are_rejected_and_the_others_kept_by_a_neutral_name(tmp_path: Path) -> None:
    packed = gzip.compress(CONVS.encode())
    found = read(tmp_path, "conv-csv", packed, "convs.csv.gz")
    assert fates(found) == ["kept", "rejected", "kept"]
    assert found.entries[1].latency_ms is None
    assert found.entries[2].name == "conv|in=64x28x28|out=64x28x28|k=3|s=1|groups=64|add=0|batch=1|fp32"
    assert found.warnings[0] == ("1 of 3 entries rejected (failed in the source): Regular,128,3,480,480,160,7,2,1,-1")
    assert "a search can borrow nothing from this table" in found.warnings[1]


def test_trtexec_7_has_the_layer_first_and_the_total_is_no_layer(tmp_path: Path) -> None:
    found = read(tmp_path, "trtexec-text", PROFILE_7)
    assert [e.source for e in found.entries] == ["data to nvm", "{conv1/7x7_s2,pool1}"]
    assert [e.latency_ms for e in found.entries] == pytest.approx([68.17 / 1514, 500 / 1514])  # more digits than 0.05
    assert found.entries[0].count == 1514


def test_trtexec_8_has_the_layer_last_and_a_median(tmp_path: Path) -> None:
    found = read(tmp_path, "trtexec-text", PROFILE_8)
    assert [(e.source, e.latency_ms) for e in found.of("kept")] == [
        ("Reformatting CopyNode for Input Tensor 0", 0.0075),
        ("conv1 + res_conv1_bn_1", 0.0225),
    ]
    assert found.warnings[0] == "1 of 3 entries rejected (zero): shape"


def test_an_exported_profile_is_read_with_and_without_a_median(tmp_path: Path) -> None:
    assert read(tmp_path, "trtexec-json", EXPORTED).entries[0].latency_ms == 0.0505
    old = EXPORTED.replace(', "medianMs": 0.0505', ', "percentage": nan')
    assert read(tmp_path, "trtexec-json", old).entries[0].latency_ms == pytest.approx(6.1 / 120)


def test_names_that_break_the_json_of_a_profile_are_read_line_by_line(tmp_path: Path) -> None:
    layer = '{ "name" : "a "quoted" \\layer", "timeMs" : 2, "averageMs" : 0.2, "percentage" : -nan }'
    text = f'[\n  {{ "count" : 10 }}\n, {layer}\n]'
    entry = read(tmp_path, "trtexec-json", text).entries[0]
    assert (entry.source, entry.latency_ms) == ('a "quoted" \\layer', 0.2)


def test_layers_of_one_name_in_a_profile_are_different_layers(tmp_path: Path) -> None:
    item = '{"name": "copy", "timeMs": 1, "averageMs": 0.1}'
    found = read(tmp_path, "trtexec-json", f'[{{"count": 10}}, {item}, {item.replace("1,", "2,")}]')
    assert [(e.name, e.latency_ms) for e in found.entries] == [("layer|copy|fp32", 0.1), ("layer|copy|fp32#2", 0.2)]


WITH_COMMA = OFA.replace("mean: 7.37", "mean: 7,37")
LATER = "\nDepthwise,1,64,28,28,64,3,1,0,"


@pytest.mark.parametrize(
    ("form", "text", "error", "message"),
    [
        ("ofa-yaml", "", DataError, "source.txt: the file is empty"),
        ("ofa-yaml", " \n\n", DataError, "source.txt: the file is empty"),
        ("ofa-yaml", "# nothing\n", DataError, "no entry of the format ofa-yaml"),
        ("ofa-yaml", WITH_COMMA, RecordError, r"source.txt:5: .*mean: '7,3.*' is not a number; write a decimal point"),
        ("ofa-yaml", OFA.replace("mean: 7.37", "mean: .nan #"), RecordError, "txt:5: .*mean: .nan is not a finite"),
        ("ofa-yaml", OFA.replace("  mean: 7.3", "  maen: 7.3"), DataError, "source.txt:7: 'maen: 7.3.*does not belong"),
        ("ofa-yaml", OFA.replace("  mean: 7.375339869281047\n", ""), DataError, "source.txt:5: .*no field mean"),
        ("ofa-yaml", OFA + OFA, DataError, "source.txt:13: Conv-.* stands on line 1 already"),
        ("ofa-yaml", json.dumps(TFNAS), DataError, "does not belong into ofa-yaml.*Is it the right file and format"),
        ("ofa-yaml", "hello:\n  mean: 1\n", DataError, "source.txt:1: 'hello' is no entry of ofa-yaml"),
        ("ofa-yaml", b"\xff\xfe\x00", DataError, "source.txt: not UTF-8 text"),
        ("tfnas-json", OFA, DataError, "not valid JSON: .*The format tfnas-json was asked for; is it the right file"),
        ("tfnas-json", "[1]", DataError, "tfnas-json is a mapping of blocks, this is a list"),
        ("tfnas-json", '{"x": {"1": 2}}', DataError, "'x' is no block of tfnas-json"),
        ("tfnas-json", json.dumps(TFNAS).replace("0.5", "NaN"), RecordError, "swish: 120: NaN is not a finite"),
        ("tfnas-json", json.dumps(TFNAS).replace("0.5", '"0,5"'), RecordError, "swish: 120: '0,5' .*decimal point"),
        ("tfnas-json", json.dumps(TFNAS).replace("0.5", "1e999"), RecordError, "swish: 120: .*is not a"),
        ("tfnas-json", '{"base": 1, "base": 2}', RecordError, "key 'base' appears twice"),
        ("conv-csv", CONVS.replace(",latency", ",ms"), DataError, "source.txt:1: the first line of conv-csv is"),
        ("conv-csv", CONVS.replace(",", ";"), DataError, "source.txt:1: the first line of conv-csv is"),
        ("conv-csv", CONVS.replace("30.9881", "30,9881"), RecordError, "txt:2: 11 cells, .*write decimal points"),
        ("conv-csv", CONVS.replace("30.9881", "nan"), RecordError, "source.txt:2: latency: nan is not a finite number"),
        ("conv-csv", CONVS.replace("Depthwise", "Dilated"), RecordError, "source.txt:4: .* is no convolution"),
        ("conv-csv", CONVS.replace("64,28", "64,2.8"), RecordError, "source.txt:4: in_h: '2.8' is not a whole number"),
        ("conv-csv", CONVS.strip() + LATER + "0.02", DataError, "line 5 contradicts line 4: .*0.02 ms and 0.0101"),
        ("trtexec-text", "[I] nothing\n", DataError, "no layers after a line `=== Profile"),
        ("trtexec-text", PROFILE_8.replace("0.0225", "0,0225"), RecordError, "source.txt:4: conv1.*median: '0,0225'"),
        ("trtexec-json", "{}", DataError, 'a list that begins with {"count": N}'),
        ("trtexec-json", '[{"count": 0}]', DataError, 'a list that begins with {"count": N}'),
        ("trtexec-json", '[{"count": 9}]', DataError, "the profile has no layers"),
        ("trtexec-json", '[{"count": 9}, {"name": "a"}]', DataError, r"source.txt\[1\]: a layer of the profile has"),
        ("trtexec-json", "not json", DataError, "not JSON of --exportProfile"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_line_or_key(
    tmp_path: Path, form: str, text: str | bytes, error: type[NasError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, form, text)


def test_the_same_line_twice_is_used_once_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, "conv-csv", CONVS.strip() + LATER + "0.0101\n")
    assert len(found.entries) == 3
    assert "1 entries stand in the file more than once" in found.warnings[1]


@pytest.mark.parametrize("form", ["ofa-yaml", "tfnas-json", "conv-csv"])
def test_a_unit_that_the_file_does_not_say_is_not_guessed(tmp_path: Path, form: str) -> None:
    text: dict[str, str | dict[str, object]] = {"ofa-yaml": OFA, "tfnas-json": dict(TFNAS), "conv-csv": CONVS}
    with pytest.raises(UsageError, match=f"{form} does not say in which unit .* Give --unit ms, us or s"):
        read(tmp_path, form, text[form], unit=None)


def test_trtexec_states_its_unit_so_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--unit us: trtexec writes milliseconds"):
        read(tmp_path, "trtexec-json", EXPORTED, unit="us")


@pytest.mark.parametrize(
    ("form", "unit", "message"),
    [
        ("ofa-yaml", "s", "line 5: expanded_conv.* 7375.34 ms is too long for 29854720 multiply-adds"),
        ("tfnas-json", "s", r"k3_s2_relu\[16\]: impossible for a row: .*is too long.* and 4 more of 7"),
        (
            "conv-csv",
            "us",
            "line 2: Regular,128,3,480,.*,30.9881: .* is too short for 1625702400 multiply-adds",
        ),
    ],
)
def test_a_wrong_unit_is_found_by_the_work_and_names_the_row(
    tmp_path: Path, form: str, unit: str, message: str
) -> None:
    text: dict[str, str | dict[str, object]] = {"ofa-yaml": OFA, "tfnas-json": dict(TFNAS), "conv-csv": CONVS}
    with pytest.raises(RecordError, match=message) as e:
        read(tmp_path, form, text[form], unit=unit)
    assert "give the right --unit (ms, us, s) and --batch" in str(e.value)


def test_missing_and_torn_files_are_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing.csv: cannot be read: No such file"):
        read_source("conv-csv", tmp_path / "nothing.csv", ImportSettings("fp32", "ms"))
    with pytest.raises(StorageError, match=r"torn.csv.gz: cannot be read"):
        read(tmp_path, "conv-csv", gzip.compress(CONVS.encode())[:-12], "torn.csv.gz")
    with pytest.raises(StorageError, match=r"no.csv.gz: cannot be read: Not a gzipped file"):
        read(tmp_path, "conv-csv", CONVS, "no.csv.gz")
    with pytest.raises(UsageError, match="unknown format 'xml'; there are: ofa-yaml"):
        read_source("xml", tmp_path / "nothing.csv", ImportSettings("fp32", "ms"))


@pytest.mark.parametrize("form", FORMATS)
def test_cut_files_are_read_in_part_or_refused_but_never_crash(tmp_path: Path, form: str) -> None:
    text = {
        "ofa-yaml": OFA,
        "tfnas-json": json.dumps(TFNAS),
        "conv-csv": CONVS,
        "trtexec-text": PROFILE_8,
        "trtexec-json": EXPORTED,
    }[form]
    whole = {e.name for e in read(tmp_path, form, text).entries}
    for cut in range(0, len(text), 7):
        try:
            found = read(tmp_path, form, text[:cut])
        except NasError as e:
            assert "source.txt" in str(e)
        else:
            names = {e.name for e in found.entries}
            assert len(names - whole) <= 1  # the last name may be cut; every number before it is as it was


def test_an_imported_table_answers_for_rows_that_a_table_lacks(tmp_path: Path) -> None:
    found = read(tmp_path, "tfnas-json", TFNAS)
    state = imported_profile(
        "x", ImportSettings("fp32", "ms"), state={"board": "Titan RTX"}, details={"licence": "MIT"}
    )
    write_table(tmp_path / "x", state, measurements(found), readme="# x\n")
    imported = LatencyTable.read(tmp_path / "x")
    assert imported.profile.kind == "imported"
    assert imported.profile.details == {"licence": "MIT"}
    assert imported.overhead_ms == 0
    assert imported.net_ms(EXACT) == 0.8011963367462158
    assert imported.edited == ()

    table = filled(tmp_path / "own", [])
    with table.writing():
        table.add(measured("reference", "overhead", "fp32", 0.4))
    table.borrow(tmp_path / "x")
    assert table.borrowed == {EXACT, EXACT.replace("e=32", "e=16")}
    assert table.missing([EXACT]) == []
    assert table.row_ms(EXACT) == pytest.approx(0.8011963367462158 + table.overhead_ms)
    assert table.row_std_ms(EXACT) == pytest.approx(FOREIGN_ROW_STD * table.row_ms(EXACT))
    assert layer_of_key(EXACT).macs > 0


def test_an_imported_table_is_never_the_devices_own(tmp_path: Path) -> None:
    state = imported_profile("x", ImportSettings("fp32", "ms"), state={}, details={})
    write_table(tmp_path / "x", state, [], readme="# x\n")
    with pytest.raises(NasError, match="kind: the table has 'imported', this device has 'measured'"):
        LatencyTable.open(tmp_path / "x", profile())


def test_a_new_table_is_all_or_nothing_and_never_over_another(tmp_path: Path) -> None:
    state = imported_profile("x", ImportSettings("fp32", "ms"), state={}, details={})
    bad = measured("not a key", "row", "fp32", 1.0)
    with pytest.raises(RecordError, match="is not a row key"):
        write_table(tmp_path / "x", state, [bad], readme="")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot be written"):
        write_table(tmp_path / "x", state, [], readme="", files={"device.json/inside": "a file is no folder"})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match=r"x: exists already, and a table is never overwritten. Give another folder"):
        write_table(tmp_path / "x", state, [], readme="")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
