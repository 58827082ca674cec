"""What leaves the machine in a report: no logins, no tokens, no home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.report.redact import redacted, redacted_deep

HOME = Path("/people/ann")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://ann:pw@db.example/x", "postgresql://***@db.example/x"),
        ("export API_KEY=abcdef", "export API_KEY=***"),
        ('{"hf_token": "abc", "lr": 1}', '{"hf_token": "***", "lr": 1}'),
        ("--password hunter2hunter2", "--password ***"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("got ghp_0123456789abcdefghij0123 here", "got *** here"),
        ("/people/ann/runs/x", "~/runs/x"),
        ("data=/people/ann", "data=~"),
    ],
)
def test_secrets_and_home_are_replaced(text: str, expected: str) -> None:
    assert redacted(text, HOME) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/people/anna/x",
        "see /data/people/ann2",
        "tokens per second",
        "class 'key part'",
        "10 images",
        "a -> b",
        "r32-d7-x1",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redacted(text, HOME) == text


def test_nested_values_are_walked() -> None:
    value = {"a": ["/people/ann/x", 1, None], "b": ({"c": "token=x"}, True)}
    assert redacted_deep(value, HOME) == {"a": ["~/x", 1, None], "b": ({"c": "token=***"}, True)}


def test_root_as_home_replaces_nothing() -> None:
    assert redacted("/etc/x", Path("/")) == "/etc/x"


def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert redacted("got hf_0123456789abcdefghij in /people/ann/x") == "got *** in /people/ann/x"
