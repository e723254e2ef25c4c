"""Pages in headless Chromium: what they show, what they fetch, and what they complain about.

Without a Chromium on the PATH these tests are skipped; with FEATSTORE_REQUIRE_BROWSER=1 they fail instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = (390, 844)
DESKTOP = (1280, 900)


@dataclasses.dataclass
class Visit:
    """A page that is open, and what it did."""

    page: Any
    requests: list[str]
    """URLs that it asked for, but for data URIs."""
    complaints: list[str]
    """Errors and warnings of its console, and exceptions of its scripts."""

    def overflow_px(self) -> int:
        """How far the page can be scrolled sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture
def visit() -> Iterator[Callable[..., Visit]]:
    """Opens pages; they are closed at the end of the test."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        reason = "no chromium on the PATH: apt-get install chromium"
        if os.environ.get("FEATSTORE_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with contextlib.ExitStack() as stack:
        # Started and ended within a test: while it runs, so does an event loop, which other tests could not use.
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        stack.callback(browser.close)

        def open_page(url: str, *, size: tuple[int, int] = DESKTOP, offline: bool = False, dark: bool = False) -> Visit:
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                offline=offline,
                color_scheme="dark" if dark else "light",
                has_touch=size == PHONE,
            )
            visit = Visit(page=context.new_page(), requests=[], complaints=[])
            visit.page.on("request", lambda one: visit.requests.append(one.url) if one.url[:5] != "data:" else None)
            visit.page.on(
                "console", lambda one: visit.complaints.append(one.text) if one.type in ("error", "warning") else None
            )
            visit.page.on("pageerror", lambda one: visit.complaints.append(str(one)))
            visit.page.on("dialog", lambda one: (visit.complaints.append(f"dialog {one.message}"), one.dismiss()))
            visit.page.goto(url)
            return visit

        yield open_page
