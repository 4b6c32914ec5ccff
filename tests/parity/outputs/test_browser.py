"""The page as people meet it: in a browser, light and dark, with a mouse, with keys, with hostile names."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qconvert.parity.outputs.page import as_page
from tests.parity.outputs.browser import Browser, chromium, opened
from tests.parity.outputs.reports import full_report, hostile_report

WANTED = "QCONVERT_BROWSER"
"""Set where these tests must run, as in ``.ci/run``: without a browser they fail there."""

pytestmark = pytest.mark.skipif(
    chromium() is None and not os.environ.get(WANTED), reason="no chromium on the path (Debian: apt install chromium)"
)

SQNR, TENSOR = "th:nth-child(4) button", "th:nth-child(1) button"
COLUMN = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[{}].dataset.value)"
SORTED_BY = "[...document.querySelectorAll('table.sortable thead th')].map(head => head.getAttribute('aria-sort'))"

CONTRAST = """
(() => {
  const light = (c) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.match(/[\\d.]+/g).map(v => linear(Number(v) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c !== "rgba(0, 0, 0, 0)") return c;
    }
    return getComputedStyle(document.documentElement).colorScheme.includes("dark")
      && matchMedia("(prefers-color-scheme: dark)").matches ? "rgb(0, 0, 0)" : "rgb(255, 255, 255)";
  };
  const out = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "TITLE", "DESC"].includes(e.tagName.toUpperCase())) continue;
    const s = getComputedStyle(e), front = e instanceof SVGElement ? s.fill : s.color;
    const [a, b] = [light(front), light(behind(e))].sort((x, y) => y - x);
    out.push((a + 0.05) / (b + 0.05));
  }
  return out;
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    out = {}
    for name, report in (("full", full_report()), ("hostile", hostile_report())):
        out[name] = folder / f"{name}.html"
        out[name].write_bytes(as_page(report).encode("utf-8", "backslashreplace"))
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def full(browser: Browser, pages: dict[str, Path]) -> Browser:
    browser.scheme("light")
    browser.open(pages["full"])
    return browser


def complaints(browser: Browser) -> list[object]:
    """What the console would show in red."""
    return [
        event
        for event in browser.events
        if event.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
    ]


def requests(browser: Browser) -> list[str]:
    return [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]


def test_a_click_sorts_the_table_and_another_turns_it_round(full: Browser) -> None:
    numbers = [float(value) for value in full.run(COLUMN.format(3))]
    assert len(numbers) == 36 and numbers == sorted(numbers)
    full.click(f"table.sortable {SQNR}")
    assert [float(value) for value in full.run(COLUMN.format(3))] == sorted(numbers, reverse=True)
    assert full.run(SORTED_BY) == ["none", "none", "none", "descending", "none", "none"]
    full.click(f"table.sortable {TENSOR}")
    names = full.run(COLUMN.format(0))
    assert names == sorted(names)
    assert full.run(SORTED_BY) == ["ascending", "none", "none", "none", "none", "none"]
    assert full.run("document.querySelector('[aria-live]').textContent") == "sorted by tensor, ascending"
    full.click(f"table.sortable {TENSOR}")
    assert full.run(COLUMN.format(0)) == sorted(names, reverse=True)


def test_keys_alone_reach_the_buttons_and_the_focus_is_seen(full: Browser) -> None:
    full.press("Tab", 9)
    assert full.run("document.activeElement.className") == "skip"
    assert full.run("document.activeElement.getBoundingClientRect().left >= 0")
    for _ in range(60):
        if full.run("document.activeElement.textContent") == "cosine":
            break
        full.press("Tab", 9)
    assert full.run("(s => [s.outlineStyle, s.outlineWidth])(getComputedStyle(document.activeElement))") == [
        "solid",
        "3px",
    ]
    full.press("Enter", 13, "\r")
    values = [float(value) for value in full.run(COLUMN.format(4))]
    assert values == sorted(values)
    assert full.run(SORTED_BY)[4] == "ascending"


def test_light_and_dark_are_pictures_of_the_same_page_in_other_colours(full: Browser) -> None:
    shots = {}
    for name in ("light", "dark"):
        full.scheme(name)
        shots[name] = np.asarray(Image.open(io.BytesIO(full.picture())).convert("L"), dtype=float)
    light, dark = shots["light"], shots["dark"]
    assert light.shape == dark.shape and min(light.shape) > 600
    for shot in shots.values():
        assert shot.std() > 5  # something is drawn
        assert len(np.unique(shot)) > 50
    assert np.median(light) > 200 and np.median(dark) < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(full: Browser, scheme: str) -> None:
    full.scheme(scheme)
    ratios = full.run(CONTRAST)
    assert len(ratios) > 100
    assert min(ratios) >= 4.5  # WCAG 2.2, 1.4.3


def test_it_asks_nobody_for_anything_and_complains_of_nothing(full: Browser, pages: dict[str, Path]) -> None:
    assert requests(full) == [pages["full"].as_uri()]
    assert complaints(full) == []


def test_nothing_is_wider_than_the_page(full: Browser) -> None:
    assert full.run("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_names_neither_run_nor_load(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["hostile"])
    assert browser.run("document.title").startswith("Parity fail: </script><img src=x")
    assert browser.run("document.images.length + document.scripts.length") == 1
    assert requests(browser) == [pages["hostile"].as_uri()]
    assert complaints(browser) == []
    browser.click(f"table.sortable {SQNR}")
    assert browser.run(COLUMN.format(3))[-1] == "-Infinity"


OUTSIDE = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
})
"""

OVER_EACH_OTHER = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], n) => boxes.slice(n + 1).filter(([other, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4
  ).map(([other]) => `${one} / ${other}`));
})
"""


def test_words_of_charts_are_inside_their_picture_and_apart(full: Browser) -> None:
    assert full.run("document.querySelectorAll('svg text').length") > 60
    assert full.run(OUTSIDE) == []
    assert full.run(OVER_EACH_OTHER) == []


def test_tables_of_a_window_as_wide_as_the_page_need_no_scrolling(full: Browser) -> None:
    wide = "[...document.querySelectorAll('#summary .scroll')].map(box => box.scrollWidth - box.clientWidth)"
    assert max(full.run(wide)) == 0
