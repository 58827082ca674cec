"""The page as text: harmless names, nothing from outside, every state of a run, the script copied once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import made_view

from nas.core.errors import StorageError
from nas.core.run import BudgetPick, FailedCandidate, Point, RunView, TableChange
from nas.report.html import render_page, safe_json, write_report

EVIL = '</script><img src=x onerror="window.evil = 1"><b>bold</b>\'{{ 7 * 7 }}'


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="run-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def evil_view() -> RunView:
    """A run where every name that a user chooses is an attack."""
    view = made_view(name=EVIL)
    assert view.device and view.teacher and view.dataset and view.package
    points = tuple(replace(p, label=f"{EVIL} {i}", export_command=EVIL) for i, p in enumerate(view.points))
    return replace(
        view,
        points=points,
        device=replace(view.device, name=EVIL, board=EVIL, details={EVIL: EVIL}),
        teacher=replace(view.teacher, name=EVIL),
        dataset=replace(view.dataset, name=EVIL, class_names=(EVIL,), warnings=(EVIL,)),
        failed=(FailedCandidate(EVIL, EVIL, EVIL),),
        importances=tuple(replace(i, gene=EVIL) for i in view.importances[:1]),
        predictions=tuple(replace(p, candidate_id=EVIL) for p in view.predictions[:2]),
        space_name=EVIL,
        scorer=EVIL,
        pick_reason=EVIL,
        next_reason=EVIL,
        also=(BudgetPick(1.0, points[0].id, EVIL), BudgetPick(0.5, None, EVIL)),
        changes=(
            TableChange(EVIL, EVIL, "rows", 1.0, 0.1, 3, 2, 0.9, 1.1),
            TableChange("fp32", EVIL, "cost", 1.0, 0.1, 3),
        ),
        package=replace(view.package, path=EVIL, reason=EVIL),
        provenance={EVIL: EVIL},
        commands=(EVIL,),
    )


def test_page_holds_pick_reason_and_every_student() -> None:
    view = made_view()
    page = render_page(view)
    assert view.pick_reason in page
    for p in view.points:
        assert f'data-select="{p.id}"' in page
    assert {c["id"] for c in data_of(page)["cards"]} == {p.id for p in view.points}
    assert data_of(page)["first"] == view.pick_id


def test_page_shows_what_measured_networks_changed_in_the_table() -> None:
    changes = (
        TableChange("fp32", "inverted_residual fp32", "rows", 1.082, 0.011, 14, 96, 0.97, 1.31),
        TableChange("fp32", "each layer", "cost", -0.0004, 0.0002, 14),
    )
    page = render_page(replace(made_view(), changes=changes))
    row = page[page.index("inverted residual fp32") :]
    assert row.index(">96<") < row.index("+8.2 &plusmn; 1.1 %") < row.index("-3.0 to +31.0 %") < row.index(">14<")
    assert "-0.40 &plusmn; 0.20 us" in row
    assert "What measured networks changed" not in render_page(made_view())


def test_page_names_the_pick_of_every_deadline() -> None:
    view = made_view()
    also = (BudgetPick(1.5, view.points[0].id, "because"), BudgetPick(0.5, None, "fastest measured student: 0.9 ms"))
    page = render_page(replace(view, also=also))
    assert re.search(rf'1\.50 ms: <button [^>]*data-select="{re.escape(view.points[0].id)}".*because', page)
    assert "0.500 ms: nothing keeps it; fastest measured student: 0.9 ms" in page


def test_names_are_text_and_never_markup() -> None:
    plain, evil = render_page(made_view()), render_page(evil_view())
    assert "<img" not in evil
    assert evil.count("<script") == plain.count("<script") and evil.count("</script>") == plain.count("</script>")
    assert "&lt;/script&gt;&lt;img src=x" in evil
    assert "{{ 7 * 7 }}" in evil  # a template in a name is not run
    assert data_of(evil)["cards"][0]["name"].startswith(EVIL)


def test_json_in_a_script_element_reads_back_unchanged() -> None:
    value = {"</script>": "<!-- & \u2028 \u2029 ' \" \\ \u00e9 \U0001f600"}
    text = safe_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_page_asks_for_nothing_from_outside() -> None:
    page = render_page(made_view())
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,", "plotly.min.js"]
    assert "url(" not in page and "@import" not in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    nonces = set(re.findall(r'nonce="([0-9a-f]{32})"', page))
    assert len(nonces) == 1
    assert f"script-src 'nonce-{nonces.pop()}';" in policy.group(1)
    assert policy.group(1).startswith("default-src 'none'")


def test_equal_runs_give_equal_pages_below_300_kb() -> None:
    page = render_page(made_view())
    assert page == render_page(made_view())
    assert len(page.encode()) < 300_000


def test_script_is_copied_once_and_mended_when_torn(tmp_path: Path) -> None:
    page = write_report(made_view(), tmp_path / "report")
    script = tmp_path / "report" / "plotly.min.js"
    assert page == tmp_path / "report" / "index.html"
    before = script.stat().st_mtime_ns
    write_report(made_view(), tmp_path / "report")
    assert script.stat().st_mtime_ns == before
    whole = script.read_bytes()
    script.write_bytes(whole[:1000])
    write_report(made_view(), tmp_path / "report")
    assert script.read_bytes() == whole


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(made_view(), tmp_path / "file" / "report")


def test_young_run_has_a_page() -> None:
    page = render_page(RunView(name="young", status="running", created_at="now"))
    assert "This run is still going" in page
    assert "No student is on the front yet." in page
    assert "every latency is a prediction" in page
    assert data_of(page) == {"figures": {}, "cards": [], "front": [], "first": None}


def test_run_with_scores_only_shows_them() -> None:
    view = made_view()
    page = render_page(replace(view, points=(), pick_id=None, next_id=None, package=None))
    assert 'id="show-trials" checked' in page
    assert set(data_of(page)["figures"]) == {"front", "estimate", "hypervolume", "importance"}


def test_run_that_missed_its_budget_says_so_and_shows_the_closest() -> None:
    view = made_view()
    fastest = view.front[0]
    missed = replace(
        view, budget_ms=0.01, pick_id=None, next_id=None, closest_id=fastest.id, closest_reason="a smaller resolution"
    )
    page = render_page(missed)
    assert "Nothing meets the budget of 0.0100 ms" in page
    assert "a smaller resolution" in page
    assert data_of(page)["first"] == fastest.id


def test_simulated_latencies_are_called_so() -> None:
    view = made_view()
    assert view.device is not None
    words = "come from a simulated device"
    assert words in render_page(view)
    assert words not in render_page(replace(view, device=replace(view.device, kind="measured")))


def test_accuracies_of_different_splits_are_announced() -> None:
    view = made_view()
    words = "test split where it is known, else of the validation split"
    assert words not in render_page(view)
    assert words in render_page(replace(view, points=(replace(view.points[0], test=None), *view.points[1:])))


def test_run_without_teacher_data_or_device_has_a_page() -> None:
    page = render_page(replace(made_view(), teacher=None, dataset=None, device=None, package=None, budget_ms=None))
    assert "the teacher's accuracy" not in page


def test_secrets_and_home_are_not_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/somebody")
    provenance = {"data": "/people/somebody/images", "store": "postgresql://ann:letmein@host/db", "log": "token=abc123"}
    page = render_page(replace(made_view(), provenance=provenance))
    for secret in ("somebody", "letmein", "abc123", "should-not-be-seen"):
        assert secret not in page
    assert "~/images" in page


def test_student_on_a_front_of_its_own_is_shown_without_pick() -> None:
    view = made_view()
    only: Point = view.front[0]
    page = render_page(replace(view, points=(only,), pick_id=None, next_id=None, package=None))
    assert data_of(page)["first"] == only.id
