"""The report's page in a browser, headless Chromium: at three widths, light, dark and printed. Skipped where there is none.

COUNTERWEIGHT_SCREENSHOTS=DIR keeps what it looked like.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from tests.browsers import SCREENSHOTS, chromium
from tests.pipeline.report_documents import PREFILL, mixtral, report, task
from tests.pipeline.test_report_making import made

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LOOKS = [("light", 390), ("light", 820), ("light", 1440), ("dark", 390), ("print", 718)]
"""How it is shown, and how wide: a phone, a tablet, a screen; A4 within its margins."""

COLOURS = ("color", "backgroundColor")

OUTSIDE = """
() => {
  const wide = document.documentElement.clientWidth, found = [];
  const inside = (node) => node !== null && (node.matches('.scroll, pre') || inside(node.parentElement));
  if (document.documentElement.scrollWidth > wide) found.push(`page: ${document.documentElement.scrollWidth} > ${wide}`);
  for (const node of document.body.querySelectorAll('*')) {
    const box = node.getBoundingClientRect();
    if (box.width && box.right > wide + 1 && !inside(node)) found.push(`${node.tagName} ${node.className} to ${box.right}`);
  }
  return found;
}
"""
"""What reaches over the right edge, outside of boxes that scroll."""

CLIPPED = """
() => [...document.querySelectorAll('h1, h2, h3, p, dd, .value, .note, summary')]
  .filter((node) => node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== 'inline')
  .map((node) => `${node.tagName}: ${node.textContent.slice(0, 60)}`)
"""
"""Text that does not fit into its own box."""


HIDDEN = """
() => [...document.querySelectorAll('.pair .scroll')]
  .filter((node) => node.scrollWidth > node.clientWidth + 1)
  .map((node) => node.textContent.slice(0, 60))
"""
"""Tables with columns that only scrolling shows."""

OVERLAPPING = """
() => [...document.querySelectorAll('svg.plot')].flatMap((plot) => {
  const texts = [...plot.querySelectorAll('text')], boxes = texts.map((text) => text.getBoundingClientRect());
  return texts.flatMap((text, i) => texts.slice(0, i).filter((_, j) =>
    boxes[i].left < boxes[j].right && boxes[j].left < boxes[i].right &&
    boxes[i].top < boxes[j].bottom - 2 && boxes[j].top < boxes[i].bottom - 2
  ).map((other) => `${text.textContent} over ${other.textContent}`));
})
"""
"""Words of a plot that lie over each other."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def sparse() -> Report:
    """Experts, residual stores, many tasks, long names."""
    tasks = [task(f"block {i}", load=0.1, forward=0.4, solve=1.0, write=0.1, device=1 << 30) for i in range(32)]
    found = report(mixtral(), tasks, prefill=PREFILL)
    return found.model_copy(update={"name": "a-name-of-the-most-characters-that-a-name-may-have-which-are-63"})


REPORTS = {"dense": made, "sparse": sparse}


@pytest.mark.parametrize(("look", "width"), LOOKS)
def test_nothing_overflows_and_nothing_is_complained_about(
    look: str, width: int, browser: Browser, tmp_path: Path
) -> None:
    said: list[str] = []
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if look == "dark" else "light"
    )
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.emulate_media(media="print" if look == "print" else "screen")
    for name, made_report in REPORTS.items():
        (tmp_path / "report.html").write_text(render(made_report()), encoding="utf-8")
        page.goto((tmp_path / "report.html").as_uri())
        page.evaluate("() => document.querySelectorAll('details').forEach((one) => { one.open = true })")
        if SCREENSHOTS is not None:
            page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}-{look}-{width}.png"), full_page=True)
        assert said == []
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(CLIPPED) == []
        if width == max(wide for _, wide in LOOKS):
            assert page.evaluate(HIDDEN) == []
            assert page.evaluate(OVERLAPPING) == []
        ink, paper = (page.evaluate(f"() => getComputedStyle(document.body).{what}") for what in COLOURS)
        assert (brightness(paper) > brightness(ink)) == (look != "dark")
    page.close()


def brightness(colour: str) -> float:
    """Mean of the channels of `rgb(r, g, b)`."""
    channels = [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    return sum(channels) / 3
