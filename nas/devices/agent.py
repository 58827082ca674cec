"""The agent as one file: `nas/devices/board` packed so that the same source always gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "nas_board"
_ENTRY = f"from {PACKAGE}.__main__ import packed\n\npacked()\n"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first date that a zip file can hold
_FILE_MODE = 0o100600 << 16


@dataclass(frozen=True, slots=True)
class AgentFile:
    """A Python application in one file; `sha256` names it."""

    sha256: str
    data: bytes = field(repr=False)


@cache
def packed_agent() -> AgentFile:
    """The agent of this version."""
    return pack(Path(__file__).parent / "board")


def pack(folder: Path) -> AgentFile:
    """A folder of modules as a Python application whose entry is `packed` of its `__main__`.

    Nothing is compressed: compressed bytes would depend on the version of zlib.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [
            ("__main__.py", _ENTRY.encode()),
            *((f"{PACKAGE}/{p.name}", p.read_bytes()) for p in sorted(folder.glob("*.py"))),
        ]:
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.create_system = 3  # as on Unix, wherever it is packed
            entry.external_attr = _FILE_MODE
            archive.writestr(entry, data)
    data = out.getvalue()
    return AgentFile(hashlib.sha256(data).hexdigest(), data)
