"""The pages in a browser, headless Chromium, by keys alone: on a screen and on a phone, light and dark; skipped without one.

COUNTERWEIGHT_SCREENSHOTS=DIR keeps what it looked like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.states import Cause
from tests.browsers import SCREENSHOTS, chromium
from tests.patience import PATIENCE
from tests.pipeline.jobs.memory import record
from tests.pipeline.service.house import House, document
from tests.pipeline.service.test_service_pull import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LOOKS = [("light", 1200), ("dark", 390)]
MANY_TABS = 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def tab_to(page: Page, selector: str) -> None:
    """By the key alone; whatever has the focus on the way shows it."""
    for _ in range(MANY_TABS):
        page.keyboard.press("Tab")
        focused = "document.activeElement"
        if page.evaluate(f"{focused}.matches({json.dumps(selector)})"):
            assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") != "none", selector
            return
    raise AssertionError(f"{selector} is not reached by {MANY_TABS} tabs")


def entered(page: Page) -> None:
    """Presses the key and waits for the page that follows."""
    with page.expect_navigation():
        page.keyboard.press("Enter")


@pytest.mark.parametrize(("look", "width"), LOOKS)
def test_a_job_is_submitted_and_cancelled_by_keyboard(look: str, width: int, browser: Browser) -> None:
    house = House()
    made = record("a-job-whose-name-is-rather-long-and-has-many-syllables", tenant="red")
    assert house.jobs.submit(made)
    failed = take(house.jobs, made.id, "host:1")
    assert failed is not None
    line = f"spec.model.uri: file:/allowed/{'m' * 120}: no such directory: expected a checkpoint"
    assert failed.end(Ended(cause=Cause.REQUEST, exit_code=2, line=line))
    said: list[str] = []
    with served(house) as url:
        page = browser.new_page(color_scheme=look, viewport={"width": width, "height": 844})  # type: ignore[arg-type]
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))

        def seen(name: str) -> None:
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name
            if SCREENSHOTS is not None:
                page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{look}-{width}.png")

        page.goto(url)
        tab_to(page, "#token")
        page.keyboard.type("submitter-token")
        seen("sign-in")
        entered(page)
        assert page.get_by_role("heading", level=1).inner_text() == "Jobs"
        seen("jobs")
        for path in (f"/jobs/{failed.id}", "/batches", "/schedules"):
            page.goto(f"{url}{path}")
            seen(path.split("/")[1])
        page.goto(f"{url}/submit")
        tab_to(page, "textarea")
        page.keyboard.insert_text(json.dumps(document("by-keyboard")))
        seen("submit")
        tab_to(page, "main button")
        entered(page)
        (id,) = (job.id for job in house.jobs.all() if job.record.name == "by-keyboard")
        tab_to(page, f"a[href='/jobs/{id}']")
        entered(page)
        assert page.get_by_role("heading", level=1).inner_text() == "by-keyboard"
        tab_to(page, "form[action$='/cancel'] button")
        seen("job")
        entered(page)
        assert page.locator("dd.state").inner_text() == "cancelled"
        page.close()
    assert said == []
