"""Debian's chromium, driven by Playwright, whose own browsers are not downloaded.

Every wait has a time limit. The browser ends with the block, and Playwright ends it if this
process is killed.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from lab import machine

PATIENCE_SECONDS = 30.0
# Root can't use chromium's sandbox; the other flags keep it from connecting elsewhere.
_FLAGS = ("--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-sync")

expect.set_options(timeout=1000 * PATIENCE_SECONDS)


def why_no_browser() -> str | None:
    """Return why there is no browser, in one line, or None; installs chromium if it can."""
    return machine.lacking("the tests of pages", {"chromium": "chromium"})


@dataclass
class Tab:
    """A page in a context of its own: cookies, storage and cache are empty at first.

    `complaints`: errors of scripts, and what the page's content security policy refused.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """Return the visible text of the first element; empty if it is hidden or missing."""
        found = self.page.locator(selector).first
        return found.inner_text() if found.is_visible() else ""

    def expect_count(self, selector: str, count: int) -> None:
        """Wait until that many elements match."""
        expect(self.page.locator(selector)).to_have_count(count)

    def expect_no_scrolling_sideways(self, width: int) -> None:
        """Wait until the document is not wider than the window."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (found := self.page.evaluate("document.documentElement.scrollWidth")) > width:
            assert time.monotonic() < deadline, f"the page is {found} wide; expected {width}"
            time.sleep(0.1)

    def _note(self, message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            self.complaints.append(message.text)


@contextmanager
def browsing() -> Iterator[Browser]:
    """Run a browser until the block ends."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=_FLAGS,
            timeout=1000 * PATIENCE_SECONDS,
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opening(browser: Browser) -> Iterator[Tab]:
    """Open an empty tab that shares nothing with earlier ones; all close when the block ends."""
    try:
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        tab = Tab(page)
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        page.on("console", tab._note)
        yield tab
    finally:
        for context in browser.contexts:
            context.close()
