"""The page in a real browser: charts are drawn, points and names can be selected, names do no harm, phones fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chromium_pipe import Chromium, find_chromium
from made_run import made_view
from test_html import EVIL, evil_view

from nas.core.run import Point, RunView
from nas.core.units import format_ms
from nas.report.html import write_report
from nas.testing import requires_program

DRAWN = "[...document.querySelectorAll('.chart')].every((c) => c.querySelector('.main-svg'))"

# Where a student's point is in the window, from its drawn marker.
POINT_PLACE = """
((id) => {
  const chart = document.getElementById('figure-front');
  const drawn = [...chart.querySelectorAll('.scatterlayer .trace')];
  for (const trace of chart._fullData) {
    const i = (trace.customdata || []).indexOf(id);
    if (i < 0) continue;
    chart.scrollIntoView({block: 'center'});
    const box = chart.getBoundingClientRect(), x = chart._fullLayout.xaxis, y = chart._fullLayout.yaxis;
    return [box.left + x._offset + x.d2p(trace.x[i]), box.top + y._offset + y.d2p(trace.y[i])];
  }
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = requires_program(find_chromium() or "chromium", "the report in a browser")
    with Chromium(program, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def view() -> RunView:
    return made_view()


@pytest.fixture(scope="module")
def page(view: RunView, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(view, tmp_path_factory.mktemp("report")).as_uri()


def shown(browser: Chromium, selector: str) -> Any:
    return browser.value(f"document.querySelector({selector!r}).innerText")


def card_fact(browser: Chromium, name: str) -> str:
    facts = browser.value(
        "Object.fromEntries([...document.querySelectorAll('#card-facts div')].map((d) =>"
        " [d.querySelector('dt').innerText, d.querySelector('dd').innerText]))"
    )
    return str(facts[name])


def opened(browser: Chromium, page: str, **window: Any) -> None:
    browser.events.clear()
    browser.open(page, **{"width": 1280, "height": 900, **window})
    browser.wait_for(DRAWN)


def assert_card_is_of(browser: Chromium, point: Point) -> None:
    assert shown(browser, "#card-name") == point.label
    assert shown(browser, "#card-id") == point.id
    assert card_fact(browser, "Expected latency") == format_ms(point.latency.expected_ms)
    assert card_fact(browser, "Accuracy, test") == f"{100 * point.top1:.1f} %"
    titles = browser.value("[...document.querySelectorAll('#card-diagram title')].map((t) => t.textContent)")
    blocks = [b for s in point.candidate.stages for b in s.blocks]
    assert len(titles) == len(blocks) + 2
    assert all(f"-> {b.expanded_channels} -> {b.out_channels}" in t for b, t in zip(blocks, titles[1:-1], strict=True))
    rows = browser.value("[...document.querySelectorAll('#card-exits tbody th')].map((t) => t.innerText)")
    assert rows == [f"Exit {k + 1}" for k in range(len(point.candidate.exits))] + ["Head"]


def test_pick_is_shown_first_and_nothing_is_wrong_with_the_page(browser: Chromium, page: str, view: RunView) -> None:
    opened(browser, page)
    assert_card_is_of(browser, view.point(view.pick_id or ""))
    assert browser.problems() == []


def test_click_on_a_point_shows_its_card(browser: Chromium, page: str, view: RunView) -> None:
    opened(browser, page)
    others = [p for p in view.points if p.id != view.pick_id]
    point = max(others, key=lambda p: p.latency.expected_ms)  # away from the others, so that the click is meant for it
    x, y = browser.value(f"{POINT_PLACE}({point.id!r})")
    browser.click(x, y)
    browser.wait_for(f"document.getElementById('card-id').innerText === {point.id!r}", timeout_s=5)
    assert_card_is_of(browser, point)
    assert browser.value("decodeURIComponent(location.hash)") == f"#student={point.id}"
    marked = browser.value("[...document.querySelectorAll('tr.selected')].map((r) => r.dataset.student)")
    assert marked == [point.id]
    assert browser.problems() == []


def test_address_with_a_student_shows_its_card(browser: Chromium, page: str, view: RunView) -> None:
    point = view.points[2]
    opened(browser, f"{page}#student={point.id}")
    assert_card_is_of(browser, point)


def test_address_of_an_unknown_student_shows_the_pick(browser: Chromium, page: str, view: RunView) -> None:
    for wrong in ("nobody", "%E0%A4%A"):
        opened(browser, f"{page}#student={wrong}")
        assert shown(browser, "#card-id") == view.pick_id
        assert browser.problems() == []


def test_keyboard_selects_from_the_table_and_steps_along_the_front(browser: Chromium, page: str, view: RunView) -> None:
    opened(browser, page)
    first, second = view.front[:2]
    browser.value(f"document.querySelector('table [data-select=\"{first.id}\"]').focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    assert shown(browser, "#card-id") == first.id
    assert browser.value("document.activeElement.id") == "card-name"
    browser.value("document.getElementById('card-after').click()")
    assert shown(browser, "#card-id") == second.id
    assert browser.value("document.getElementById('card-before').disabled") is False


def test_scores_of_the_search_are_shown_on_demand(browser: Chromium, page: str) -> None:
    opened(browser, page)
    count = "document.querySelectorAll('#figure-front .scatterlayer .trace').length"
    before = browser.value(count)
    browser.value("document.getElementById('show-trials').click()")
    browser.wait_for(f"{count} === {before} + 1")
    browser.value("document.getElementById('show-trials').click()")
    browser.wait_for(f"{count} === {before}")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_and_charts_fit_the_width(browser: Chromium, page: str, width: int) -> None:
    opened(browser, page, width=width, height=844, is_phone=width < 500)
    assert browser.value("document.documentElement.scrollWidth") <= width
    charts = browser.value(
        "[...document.querySelectorAll('.chart')].map((c) => [c.clientWidth, c.querySelector('.main-svg').clientWidth])"
    )
    assert len(charts) == 5 and all(0 < drawn <= room <= width for room, drawn in charts)
    longest = browser.value(
        "Math.max(...[...document.querySelectorAll('#card-diagram text')].map((t) => t.getBoundingClientRect().right))"
        " - document.getElementById('card').getBoundingClientRect().right"
    )
    assert longest <= 0


def test_dark_scheme_changes_page_and_charts(browser: Chromium, page: str) -> None:
    colours = []
    for scheme in ("light", "dark"):
        opened(browser, page, scheme=scheme)
        colours.append(
            browser.value(
                "[getComputedStyle(document.body).backgroundColor,"
                " document.getElementById('figure-front')._fullLayout.font.color]"
            )
        )
    assert colours[0][0] != colours[1][0] and colours[0][1] != colours[1][1]


def test_nothing_can_be_uploaded_from_a_chart(browser: Chromium, page: str) -> None:
    opened(browser, page)
    assert browser.value("document.getElementById('figure-front')._context.showSendToCloud") is False
    assert browser.value("document.getElementById('figure-front')._context.plotlyServerURL") == ""


def test_names_that_are_attacks_are_only_shown(browser: Chromium, tmp_path: Path) -> None:
    evil = evil_view()
    opened(browser, write_report(evil, tmp_path).as_uri())
    for p in evil.points:
        browser.value(f"location.hash = '#student=' + {p.id!r}")
        browser.wait_for(f"document.getElementById('card-id').innerText === {p.id!r}")
    x, y = browser.value(f"{POINT_PLACE}({evil.points[0].id!r})")
    browser.click(x, y)
    hover = "document.querySelector('#figure-front .hoverlayer')?.textContent"
    browser.wait_for(f"({hover} ?? '').includes('<b>bold</b>')", timeout_s=5)
    assert shown(browser, "h1") == EVIL
    assert browser.value("window.evil") is None
    assert browser.value("document.querySelectorAll('img, iframe, object, a').length") == 0
    assert browser.problems() == []


def test_policy_of_the_page_refuses_foreign_code_and_requests(browser: Chromium, page: str) -> None:
    opened(browser, page)
    browser.value(
        "window.refused = [], document.addEventListener('securitypolicyviolation',"
        " (e) => window.refused.push(e.effectiveDirective)), 1"
    )
    browser.value("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.evil = 1\" id=\"foreign\">')")
    browser.value("document.getElementById('foreign').click()")
    browser.value(
        "document.body.appendChild(Object.assign(document.createElement('script'), {text: 'window.evil = 2'}))"
    )
    browser.value("fetch('http://127.0.0.1:9/').then(() => 1, () => 0)")
    browser.wait_for("new Set(window.refused).size === 3", timeout_s=5)
    assert sorted(browser.value("[...new Set(window.refused)]")) == [
        "connect-src",
        "script-src-attr",
        "script-src-elem",
    ]
    assert browser.value("window.evil") is None


def test_young_run_has_a_page_without_charts(browser: Chromium, tmp_path: Path) -> None:
    young = RunView(name="young", status="running", created_at="now")
    opened(browser, write_report(young, tmp_path).as_uri())
    assert browser.value("document.querySelectorAll('#card, .chart').length") == 0
    assert browser.problems() == []


def test_run_with_scores_only_draws_them(browser: Chromium, tmp_path: Path, view: RunView) -> None:
    scored = replace(view, points=(), pick_id=None, next_id=None, package=None)
    opened(browser, write_report(scored, tmp_path).as_uri())
    assert (
        browser.value("document.getElementById('figure-front').data.find((t) => t.meta === 'trials').visible") is True
    )
    assert browser.problems() == []
