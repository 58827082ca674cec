"""The report of a run: one HTML page that works offline, with Plotly's script once beside it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from nas.core.jsonio import from_plain, to_plain, write_bytes, write_text
from nas.core.run import LatencyKind, Point, RunView
from nas.core.units import format_bytes, format_count, format_duration, format_ms
from nas.report.cards import card, compared_with_teacher
from nas.report.estimate import error_figures
from nas.report.figures import figures
from nas.report.redact import redacted_deep
from nas.report.tables import (
    LATENCY_NAMES,
    budget_latency_ms,
    format_number,
    format_spread,
    front_notes,
    name_of,
    notes,
)

PAGE_NAME = "index.html"
SCRIPT_NAME = "plotly.min.js"  # the name that plotly's own include_plotlyjs="directory" uses, so both share one copy

# What would end the script element or start another one is written as JSON escapes; so are the line ends that old
# JavaScript does not allow in strings.
_JSON_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}

_NO_FILE_NAME = r"[^A-Za-z0-9._-]+"
_PRIVATE_DETAILS = ("host", "hostname", "user", "username", "node", "serial", "device_name")


def write_report(view: RunView, folder: Path) -> Path:
    """Writes `index.html` and, once, `plotly.min.js` into a folder; the path of the page.

    Each further device of the run has a page beside it; all pages link to each other.

    Raises:
        StorageError: the folder cannot be written.
    """
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs().encode()
    beside = folder / SCRIPT_NAME
    if not beside.is_file() or beside.read_bytes() != script:
        write_bytes(beside, script)
    pages = {PAGE_NAME: view} | {f"on-{re.sub(_NO_FILE_NAME, '-', own.device_name)}.html": own for own in view.others}
    links = tuple((own, name) for name, own in pages.items()) if view.others else ()
    for name, own in pages.items():
        write_text(folder / name, render_page(own, links))
    return folder / PAGE_NAME


def render_page(view: RunView, devices: Sequence[tuple[RunView, str]] = ()) -> str:
    """The page as text; it expects `plotly.min.js` beside it.

    Args:
        view: the run on one device.
        devices: the views of all its devices, and the names of their pages; empty where there is one.

    Equal runs give equal pages. Logins, tokens and the home folder are taken out of every text.
    """
    import jinja2
    from markupsafe import Markup

    view = from_plain(RunView, redacted_deep(to_plain(view)), "report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    environment.filters.update(
        ms=format_ms, bytes=format_bytes, count=format_count, duration=format_duration, number=format_number
    )
    data = page_data(view)
    data_json = safe_json(data)
    return environment.get_template("page.html").render(
        view=view,
        nonce=hashlib.sha256(data_json.encode()).hexdigest()[:32],
        data=Markup(data_json),
        script_name=SCRIPT_NAME,
        latency_names=LATENCY_NAMES,
        front=view.front,
        beside=_by_latency([p for p in view.points if not p.on_front], view.budget_of),
        pick=_point_or_none(view, view.pick_id),
        runner_up=_point_or_none(view, view.next_id),
        closest=_point_or_none(view, view.closest_id),
        is_mixed=len({p.split for p in view.points}) > 1,
        errors=_error_rows(view),
        charts=data["figures"],
        device_rows=_device_rows(view),
        devices=[(redacted_deep(own.device_name), own, name) for own, name in devices],
        name_of=name_of,
        format_spread=format_spread,
        notes=notes,
        front_notes=front_notes(view),
        budget_latency_ms=budget_latency_ms,
        compared_with_teacher=compared_with_teacher,
    )


def page_data(view: RunView) -> dict[str, Any]:
    """What the page's script reads: charts, one card per student, and the student that is shown first."""
    first = view.pick_id or view.closest_id
    order = [*view.front, *(p for p in view.points if not p.on_front)]
    return {
        "figures": figures(view),
        "cards": [card(view, p) for p in order],
        "front": [p.id for p in view.front],
        "first": first if first is not None else (order[-1].id if view.front == () and order else _last_front(view)),
    }


def _last_front(view: RunView) -> str | None:
    return view.front[-1].id if view.front else None


def safe_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(to_plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.translate(_JSON_ESCAPES)


def _template(name: str) -> str:
    return resources.files("nas.report").joinpath(name).read_text(encoding="utf-8")


def _by_latency(points: list[Point], kind: LatencyKind) -> list[Point]:
    from nas.core.run import latency_of

    return sorted(points, key=lambda p: latency_of(p.latency, kind))


def _point_or_none(view: RunView, point_id: str | None) -> Point | None:
    return None if point_id is None else view.point(point_id)


def _error_rows(view: RunView) -> list[tuple[str, Any]]:
    """Error figures of all predictions, of each precision and of the last round, each with its name."""
    rows = [("All", error_figures(view.predictions))]
    precisions = sorted({p.precision for p in view.predictions})
    if len(precisions) > 1:
        rows += [(name, error_figures([p for p in view.predictions if p.precision == name])) for name in precisions]
    numbers = sorted({p.round for p in view.predictions})
    if len(numbers) > 1:
        rows += [
            (f"Round {number}", error_figures([p for p in view.predictions if p.round == number])) for number in numbers
        ]
    return [(name, figures_) for name, figures_ in rows if figures_ is not None]


def _device_rows(view: RunView) -> list[tuple[str, str]]:
    device = view.device
    if device is None:
        return []
    rows = [
        ("Device", device.name),
        ("Board", device.board),
        ("Runtime", f"{device.runtime} {device.runtime_version}"),
        ("Power mode", device.power_mode),
        ("Clocks", "locked" if device.clocks_locked else "not locked"),
        ("Locked to (MHz)", device.locked_mhz),
        ("Threads", str(device.threads)),
        ("Driver", device.driver),
        ("Precisions", ", ".join(device.precisions)),
        ("Latencies", device.kind),
        ("Fingerprint", device.fingerprint),
    ]
    rows += [(k, v) for k, v in device.details.items() if k.lower() not in _PRIVATE_DETAILS]
    return [(name, value) for name, value in rows if value]
