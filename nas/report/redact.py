"""Text that goes into a report without secrets and without the name of the person who ran it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HIDDEN = "***"

_URL_LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
_SECRET = re.compile(
    r"(?i)\b([\w-]*(?:token|password|passwd|secret|api[_-]?key|access[_-]?key|authorization))"
    r"(\"?'?\s*[=:]\s*\"?'?|\s+(?=\S{12,}))(?:bearer\s+)?[^\s\"',;&]+"
)
_KNOWN_TOKENS = re.compile(r"\b(?:gh[pousr]_\w{20,}|hf_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|xox[abp]-[\w-]{10,})")


def redacted(text: str, home: Path | None = None) -> str:
    """Text with logins, tokens and passwords replaced by `***`, and the home folder by `~`.

    Args:
        text: any text.
        home: the folder to shorten; None: that of the user who runs this.
    """
    text = _URL_LOGIN.sub(rf"\g<1>{HIDDEN}@", text)
    text = _SECRET.sub(rf"\g<1>\g<2>{HIDDEN}", text)
    text = _KNOWN_TOKENS.sub(HIDDEN, text)
    folder = str(_home() if home is None else home)
    return re.sub(rf"(?<![\w/]){re.escape(folder)}(?=/|$|\W)", "~", text) if len(folder) > 1 else text


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user without an entry in the list of users: containers have them
        return Path("/")


def redacted_deep(value: Any, home: Path | None = None) -> Any:
    """The same for every text in nested lists, tuples and mappings; other values stay."""
    if isinstance(value, str):
        return redacted(value, home)
    if isinstance(value, dict):
        return {key: redacted_deep(item, home) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_deep(item, home) for item in value)
    return value
