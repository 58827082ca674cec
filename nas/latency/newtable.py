"""A whole table written at once, from rows that exist already: staged beside its place and renamed, never over another.

Measuring appends row by row (`LatencyTable.add`); importing and merging make a table of thousands of rows in one step.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from nas.core.errors import StorageError
from nas.core.jsonio import canonical_json, write_record, write_text
from nas.core.records import DeviceProfile, Measurement
from nas.latency.lines import MeasuredNetwork, check_network, check_row, line_of
from nas.latency.table import DeviceFile

STALE_S = 3600.0  # nobody needs an hour to write a table


def refuse_existing(folder: Path) -> None:
    """Raises StorageError when something is at the place of a new table, be it an empty folder."""
    if folder.exists() or folder.is_symlink():
        raise StorageError(
            f"{folder}: exists already, and a table is never overwritten. Give another folder by --out DIR"
        )


def write_table(
    folder: Path,
    profile: DeviceProfile,
    rows: Iterable[Measurement],
    networks: Iterable[MeasuredNetwork] = (),
    *,
    readme: str,
    files: Mapping[str, str] | None = None,
    copies: Mapping[str, Path] | None = None,
) -> None:
    """Writes a new table; a reader sees all of it or nothing.

    Args:
        folder: where; must not exist.
        profile: the device state that the numbers hold for.
        rows: rows and fixed rows, in the order in which they are written.
        networks: measured networks.
        readme: Markdown for people.
        files: further text files by name.
        copies: folders of tables that are kept inside, byte for byte, by name.

    Raises:
        StorageError: something is there already, or it cannot be written.
        RecordError: a row or network is impossible.
    """
    refuse_existing(folder)
    row_lines, network_lines = [], []
    for row in rows:
        check_row(row)
        row_lines.append(canonical_json(line_of(row, profile.fingerprint)))
    for network in networks:
        check_network(network)
        network_lines.append(canonical_json(line_of(network, profile.fingerprint)))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}.tmp-*"):  # of a process that was killed
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
    except OSError as e:
        raise StorageError(f"{folder}: cannot be written: {e.strerror or e}. Choose another folder by --out DIR") from e
    try:
        write_record(staged / "device.json", DeviceFile(profile, datetime.now(UTC).isoformat(timespec="seconds")))
        write_text(staged / "rows.jsonl", "".join(f"{line}\n" for line in row_lines))
        if network_lines:
            write_text(staged / "networks.jsonl", "".join(f"{line}\n" for line in network_lines))
        write_text(staged / "README.md", readme)
        for name, text in (files or {}).items():
            write_text(staged / name, text)
        for name, source in (copies or {}).items():
            shutil.copytree(source, staged / name, ignore=shutil.ignore_patterns(".lock*", ".*.tmp-*"))
        staged.chmod(0o755)
        refuse_existing(folder)
        staged.rename(folder)
    except OSError as e:
        raise StorageError(f"{folder}: cannot be written: {e.strerror or e}. Choose another folder by --out DIR") from e
    finally:
        shutil.rmtree(staged, ignore_errors=True)
