"""Readers of published latency files: block tables of Once-for-All and TF-NAS, lists of convolutions, trtexec profiles.

Sources of the formats:
- `ofa-yaml`: Cai et al. 2020 (arXiv 1908.09791), latency tables of the Once-for-All code: one entry per block with
  count, mean and std. Only that flat form of YAML is read. A block without the field `hs` has a ReLU (clipped or not),
  one without `se` no SE.
- `tfnas-json`: Hu et al. 2020 (arXiv 2008.05314), latency tables of the TF-NAS code as JSON: block -> width -> time.
- `conv-csv`: isolated convolutions as the TinyNAS op profiler lists them; -1 says that measuring failed there.
- `trtexec-text`, `trtexec-json`: what trtexec prints with --dumpProfile (TensorRT 7 puts the layer first, 8 last) and
  writes with --exportProfile (`medianMs` is missing before 8.4). Layers there are fused nodes, never rows of ours.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nas.core.errors import DataError, RecordError, StorageError, UsageError
from nas.core.jsonio import MAX_FILE_BYTES, parse_json
from nas.core.records import Activation, DeviceProfile, LayerSpec, Measurement, squeeze_channels
from nas.latency.entries import Imported, ImportSettings, SourceEntry, finished, judged, number_of
from nas.latency.trtexec import trtexec_json, trtexec_text

Reader = Callable[[str, str, ImportSettings], list[SourceEntry]]

CONV_COLUMNS = (
    "conv_type", "batch", "in_c", "in_h", "in_w", "out_c", "kernel", "stride", "elmt_fused", "latency",
)  # fmt: skip
_OFA_BLOCK = re.compile(
    r"expanded_conv-input:(\d+)x(\d+)x(\d+)-output:(\d+)x(\d+)x(\d+)-expand:([\d.]+)-kernel:(\d+)-stride:(\d+)"
    r"-idskip:([01])(?:-se:([01]))?(?:-hs:([01]))?"
)
_OFA_OTHER = re.compile(r"([A-Za-z]\w*)-input:(\d+(?:x\d+)*)-output:(\d+(?:x\d+)*)(.*)")
_TFNAS = re.compile(r"MBInvertedResBlock_(\d+)_(\d+)_(\d+)_(\d+)_k(\d+)_s(\d+)_([\w-]+)")


def read_source(form: str, path: Path, settings: ImportSettings) -> Imported:
    """Every entry of a foreign file; a name that ends in .gz is unpacked.

    Args:
        form: one of `FORMATS`.
        path: the file.
        settings: what the file does not say.

    Raises:
        UsageError: an unknown format, or a unit that is needed and was not given.
        StorageError: the file cannot be read.
        DataError: the file is empty, of another format, or contradicts itself.
        RecordError: a number that is none, named by line or key; or a wrong unit.
    """
    if form not in FORMATS:
        raise UsageError(f"unknown format {form!r}; there are: {', '.join(FORMATS)}")
    text = _text_of(path)
    if not text.strip():
        raise DataError(
            f"{path}: the file is empty. Give the file that was downloaded, then run the same command again"
        )
    return finished(form, FORMATS[form](text, str(path), settings), str(path))


def measurements(imported: Imported, clock_kind: str = "wall") -> list[Measurement]:
    """Rows of the entries that are layers of ours, in the order of the file; each says what it was there.

    Args:
        imported: entries.
        clock_kind: `wall` or `device_event`: what the times were taken with.
    """
    result: list[Measurement] = []
    for entry in imported.of("row"):
        value = entry.image_ms
        if entry.key is None or value is None:
            continue
        said = [f"{entry.source}: {entry.latency_ms!r} ms"]
        if entry.images > 1:
            said.append(f"for {entry.images} images")
        if entry.count is not None:
            said.append(f"mean of {entry.count}")
        if entry.std_ms is not None:
            said.append(f"std {entry.std_ms!r} ms")
        if entry.reason:
            said.append(entry.reason)
        result.append(
            Measurement(
                key=entry.key,
                kind="row",
                precision=entry.key.rpartition("|")[2],  # type: ignore[arg-type]  # check_row compares it with the key
                latency_ms=value,
                rounds_ms=(),
                accepted=(),
                clock="device_event" if clock_kind == "device_event" else "wall",
                measured_at="",
                sequence=len(result) + 1,
                source=", ".join(said),
            )
        )
    return result


def imported_profile(
    name: str, settings: ImportSettings, *, state: dict[str, str], details: dict[str, str]
) -> DeviceProfile:
    """The device state of an imported table: what is told of it, `unstated` for the rest.

    Args:
        name: of the table.
        settings: precision and batch.
        state: board, runtime, runtime_version, power_mode, driver as far as they are known.
        details: where the numbers come from.
    """
    known = {key: value or "unstated" for key, value in state.items()}
    batch = f" batch={settings.batch}" if settings.batch > 1 else ""
    return DeviceProfile(
        name=name,
        board=known.get("board", "unstated"),
        runtime=known.get("runtime", "unstated") + batch,
        runtime_version=known.get("runtime_version", "unstated"),
        power_mode=known.get("power_mode", "unstated"),
        clocks_locked=False,
        threads=1,
        driver=known.get("driver", "unstated"),
        precisions=(settings.precision,),
        kind="imported",
        details=details,
    )


def _text_of(path: Path) -> str:
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else None
        if data is not None and path.suffix == ".gz":
            with gzip.open(path) as f:
                data = f.read(MAX_FILE_BYTES + 1)
        if data is None or len(data) > MAX_FILE_BYTES:
            raise StorageError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:
        raise StorageError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text (byte {e.start}). Is it the right file?") from e


def _block(
    c_in: int, size: int, c_out: int, k: int, s: int, wide: int, se: bool, act: Activation, settings: ImportSettings
) -> LayerSpec:
    out = -(-size // s)
    return LayerSpec("inverted_residual", c_in, size, c_out, out, k, s, wide, 0, se, act, settings.precision)


def _ofa_yaml(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """Entries `key:` with the indented fields count, mean and std below; comments and blank lines are passed over."""
    factor = settings.factor("ofa-yaml")
    entries: list[SourceEntry] = []
    seen: dict[str, int] = {}
    for start, key, fields in _flat_yaml(text, where):
        at = f"{where}:{start}"
        if "mean" not in fields:
            raise DataError(f"{at}: {key}: no field mean; an entry of this format has count, mean and std")
        if key in seen:
            raise DataError(f"{at}: {key} stands on line {seen[key]} already. Take one of them out")
        seen[key] = start
        mean = number_of(fields["mean"], f"{at}: {key}: mean") * factor
        std = number_of(fields["std"], f"{at}: {key}: std") * factor if "std" in fields else None
        count = int(number_of(fields["count"], f"{at}: {key}: count")) if "count" in fields else None
        entry = SourceEntry("", key, f"line {start}", "kept", mean, images=settings.batch, count=count, std_ms=std)
        entries.append(_ofa_entry(entry, key, settings, at))
    return entries


def _ofa_entry(entry: SourceEntry, key: str, settings: ImportSettings, at: str) -> SourceEntry:
    block = _OFA_BLOCK.fullmatch(key)
    if block is None:
        other = _OFA_OTHER.fullmatch(key)
        if other is None:
            raise DataError(f"{at}: {key!r} is no entry of ofa-yaml (KIND-input:HxWxC-output:HxWxC...)")
        name = f"{other[1].lower()}|in={other[2]}|out={other[3]}{other[4].replace('-', '|').replace(':', '=')}"
        return judged(replace(entry, name=name, reason="kernel or stride are not said"), None, None)
    h, w, c_in, h_out, w_out, c_out, k, s = (int(block[i]) for i in (1, 2, 3, 4, 5, 6, 8, 9))
    wide = round(c_in * float(block[7]))
    use_se, act = block[11] == "1", "hard_swish" if block[12] == "1" else "relu"
    skip = block[10] == "1"
    shape = f"in={c_in}x{h}x{w}|out={c_out}x{h_out}x{w_out}|k={k}|s={s}|e={wide}"
    name = f"block|{shape}|se={int(use_se)}|skip={int(skip)}|act={act}|{settings.precision}"
    entry = replace(entry, name=name)
    if h != w or h_out != w_out or s not in (1, 2) or k % 2 == 0 or min(h, c_in, c_out, wide) < 1:
        return judged(replace(entry, reason="shape that no block of ours has"), None, None)
    layer = _block(c_in, h, c_out, k, s, wide, use_se, "hard_swish" if act == "hard_swish" else "relu", settings)
    if layer.out_size != h_out or layer.has_residual != skip:
        return judged(replace(entry, reason="its skip or its output is not that of our block"), None, layer.macs)
    return judged(entry, layer, layer.macs)


def _flat_yaml(text: str, where: str) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Line, key and fields of each entry of a mapping of mappings."""
    current: tuple[int, str, dict[str, str]] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.partition(" #")[0].rstrip()
        if not bare.strip() or bare.lstrip().startswith("#") or bare in ("---", "..."):
            continue
        head, _, value = bare.strip().rpartition(":") if not bare[0].isspace() else bare.strip().partition(":")
        if not bare[0].isspace() and head and not value:
            if current is not None:
                yield current
            current = (number, head.strip("\"'"), {})
        elif bare[0].isspace() and current is not None and head in ("count", "mean", "std") and head not in current[2]:
            current[2][head] = value.strip()
        else:
            raise DataError(
                f"{where}:{number}: {bare.strip()[:60]!r} does not belong into ofa-yaml: an entry is a line `name:` and"
                " below it, indented, count, mean and std, once each. Is it the right file and format?"
            )
    if current is not None:
        yield current


def _tfnas_json(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """`{"base": t, "MBInvertedResBlock_<size>_<in>_<se>_<out>_k<k>_s<s>_<act>": {"<middle width>": t}}`.

    Differs from our blocks: middle widths up to the input's are not expanded there at all, the SE gate is a sigmoid,
    and swish is not the hard one.
    """
    factor = settings.factor("tfnas-json")
    bad = re.search(r'"([^"]*)"\s*:\s*(-?(?:NaN|Infinity))', text)
    if bad is not None:
        block = re.findall(r'"([^"]*)"\s*:\s*\{', text[: bad.start()])
        name = f"{block[-1]}: {bad[1]}" if block else bad[1]
        raise RecordError(f"{where}: {name}: {bad[2]} is not a finite number. Correct it, then run again")
    data = _json_of(text, where, "tfnas-json")
    if not isinstance(data, dict):
        raise DataError(f"{where}: tfnas-json is a mapping of blocks, this is a {type(data).__name__}")
    entries = []
    for block, widths in data.items():
        match = _TFNAS.fullmatch(block)
        if match is None:
            value = number_of(widths, f"{where}: {block}") * factor if not isinstance(widths, dict) else None
            if value is None:
                raise DataError(
                    f"{where}: {block!r} is no block of tfnas-json (MBInvertedResBlock_...). Is it the right file?"
                )
            entry = SourceEntry(f"sum|{block}", block, block, "kept", value, "not one layer", images=settings.batch)
            entries.append(judged(entry, None, None))
            continue
        if not isinstance(widths, dict):
            raise DataError(f"{where}: {block}: expected a mapping of middle widths to times")
        for wide, time in widths.items():
            entries.append(
                _tfnas_entry(match, wide, number_of(time, f"{where}: {block}: {wide}") * factor, settings, where)
            )
    return entries


def _tfnas_entry(
    match: re.Match[str], wide_text: str, value: float, settings: ImportSettings, where: str
) -> SourceEntry:
    size, c_in, squeeze, c_out, k, s = (int(match[i]) for i in range(1, 7))
    if not wide_text.isdecimal() or not wide_text.strip("0"):
        raise DataError(f"{where}: {match[0]}: {wide_text!r} is not a middle width")
    wide, act = int(wide_text), match[7]
    source = f"{match[0]}[{wide}]"
    out = -(-size // s) if s else 0
    entry = SourceEntry(
        f"block|in={c_in}x{size}x{size}|out={c_out}x{out}x{out}|k={k}|s={s}|e={wide}|se_width={squeeze}|act={act}"
        f"|{settings.precision}",
        source, source, "kept", value, images=settings.batch,
    )  # fmt: skip
    ours: Activation = "relu" if act == "relu" else "hard_swish"
    if s not in (1, 2) or k % 2 == 0 or min(size, c_in, c_out) < 1 or act not in ("relu", "swish", "h-swish"):
        return judged(replace(entry, reason="shape or activation that no block of ours has"), None, None)
    layer = _block(c_in, size, c_out, k, s, wide, squeeze > 0, ours, settings)
    if wide < c_in:
        return judged(replace(entry, reason="widths below the input's are not built as such in the source"), None, None)
    if squeeze and squeeze != squeeze_channels(wide):
        return judged(replace(entry, reason="another width of SE than ours"), None, layer.macs)
    differs = [
        text
        for holds, text in ((act == "swish", "swish for hard swish"), (squeeze > 0, "a sigmoid gate in SE"))
        if holds
    ]
    if differs:
        entry = replace(entry, reason=f"similar: it has {' and '.join(differs)}")
    return judged(entry, layer if settings.similar or not differs else None, layer.macs)


def _conv_csv(text: str, where: str, settings: ImportSettings) -> list[SourceEntry]:
    """Single convolutions, one per line; -1 says that it could not be measured there."""
    factor = settings.factor("conv-csv")
    lines = text.splitlines()
    if tuple(lines[0].strip().split(",")) != CONV_COLUMNS:
        raise DataError(f"{where}:1: the first line of conv-csv is {','.join(CONV_COLUMNS)}; got {lines[0][:80]!r}")
    entries = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        at, cells = f"{where}:{number}", line.strip().split(",")
        if len(cells) != len(CONV_COLUMNS):
            comma = "; write decimal points, not commas" if len(cells) > len(CONV_COLUMNS) else ""
            raise RecordError(f"{at}: {len(cells)} cells, the first line has {len(CONV_COLUMNS)}{comma}")
        shape = [_whole(cell, f"{at}: {name}") for name, cell in zip(CONV_COLUMNS[1:9], cells[1:9], strict=True)]
        batch, c_in, h, w, c_out, k, s, fused = shape
        if cells[0] not in ("Regular", "Depthwise") or min(batch, c_in, h, w, c_out, k, s) < 1 or fused > 1:
            raise RecordError(
                f"{at}: {line.strip()!r} is no convolution: conv_type is Regular or Depthwise, sizes from 1"
            )
        groups = c_in if cells[0] == "Depthwise" else 1
        h_out, w_out = -(-h // s), -(-w // s)
        name = (
            f"conv|in={c_in}x{h}x{w}|out={c_out}x{h_out}x{w_out}|k={k}|s={s}|groups={groups}|add={fused}|batch={batch}"
            f"|{settings.precision}"
        )
        raw = number_of(cells[9], f"{at}: latency")
        entry = SourceEntry(
            name, line.strip(), f"line {number}", "kept", raw * factor, "a single convolution", images=batch
        )
        if raw == -1:
            entries.append(replace(entry, fate="rejected", latency_ms=None, reason="failed in the source"))
        else:
            entries.append(judged(entry, None, c_out * (c_in // groups) * k * k * h_out * w_out))
    return entries


def _whole(cell: str, where: str) -> int:
    if not cell.isdecimal() or len(cell) > 9:
        raise RecordError(f"{where}: {cell!r} is not a whole number. Correct it, then run the same command again")
    return int(cell)


def _json_of(text: str, where: str, form: str) -> object:
    try:
        data: object = parse_json(text, where)
    except RecordError as e:
        if "not valid JSON" in str(e):
            raise DataError(f"{e}. The format {form} was asked for; is it the right file?") from e
        raise
    return data


FORMATS: dict[str, Reader] = {
    "ofa-yaml": _ofa_yaml,
    "tfnas-json": _tfnas_json,
    "conv-csv": _conv_csv,
    "trtexec-text": trtexec_text,
    "trtexec-json": trtexec_json,
}
