"""A real browser, Debian's chromium, driven through its own protocol over a pipe: no driver, no
port, no package.

Every wait has a limit. The browser ends with the block, and with this process.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import machine

PATIENCE_SECONDS = 30.0
_STOP_SECONDS = 10.0
# Without a sandbox of its own, which root can't have; and nothing that calls home.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-quic", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def why_no_browser() -> str | None:
    """None if there is one, else the reason in one line. Installs chromium where that is possible:
    40 s, once."""
    return machine.lacking("the tests of pages", {"chromium": "chromium"})


class Page:
    """One tab."""

    def __init__(self, browser: "_Pipe", session: str) -> None:
        self._browser = browser
        self._session = session

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """What a reader sees of the first element; empty if it is hidden or not there."""
        return str(
            self.run(
                f"document.querySelector({json.dumps(selector)})?.checkVisibility() ? "
                f"document.querySelector({json.dumps(selector)}).innerText : ''"
            )
        )

    def wait_for(self, script: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until the expression holds. Fails the test, with what the page shows, if it does
        not."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, (
                f"not within {seconds:g} s: {script}\n{self.text('body')}"
            )
            time.sleep(0.1)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def point(self, selector: str) -> None:
        """Have the mouse in the middle of the first element."""
        box = self.run(
            f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()"
        )
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def be_dark(self) -> None:
        self._call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark"}],
        )

    def picture(self, file: Path) -> None:
        """Write a PNG of the whole page."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[str]:
        """Errors of scripts, and what the page's policy refused, since it was opened."""
        return self._browser.complaints

    def _call(self, method: str, **parameters: object) -> Any:
        return self._browser.call(method, parameters, self._session)


class _Pipe:
    """Requests and answers, each a JSON object that ends in a zero byte."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._number = 0
        self._read = b""
        self.complaints: list[str] = []

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._requests,
            json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0",
        )
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(answer["params"]["exceptionDetails"]))
            elif (
                answer.get("method") == "Log.entryAdded"
                and answer["params"]["entry"]["source"] == "security"
            ):
                self.complaints.append(str(answer["params"]["entry"]["text"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            is_there, _, _ = select.select([self._answers], [], [], PATIENCE_SECONDS)
            assert is_there, f"no answer of the browser within {PATIENCE_SECONDS:g} s"
            piece = os.read(self._answers, 1 << 16)
            assert piece, "the browser has ended"
            self._read += piece
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browsing() -> Iterator[Page]:
    """A browser with one empty tab."""
    (to_browser, requests), (answers, from_browser) = os.pipe(), os.pipe()

    def take_pipes() -> None:
        # It reads at 3 and writes at 4; both may be in use by each other here.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        for end, number in zip(ends, (3, 4), strict=True):
            os.dup2(end, number)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [str(shutil.which("chromium")), *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(3, 4), preexec_fn=take_pipes, start_new_session=True,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield _first_tab(_Pipe(requests, answers))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_SECONDS)
            os.close(requests)
            os.close(answers)


def _first_tab(browser: _Pipe) -> Page:
    (tab,) = (
        each
        for each in browser.call("Target.getTargets", {})["targetInfos"]
        if each["type"] == "page"
    )
    session = browser.call("Target.attachToTarget", {"targetId": tab["targetId"], "flatten": True})[
        "sessionId"
    ]
    for domain in ("Page", "Runtime", "Log"):
        browser.call(f"{domain}.enable", {}, session)
    return Page(browser, session)
