"""A headless Chromium, spoken to in its own protocol (DevTools) over a pipe: no port is opened, and no library is needed.

Messages are JSON with a zero byte behind each, as --remote-debugging-pipe has them. The browser writes to a folder of the
test, and ends with it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0
"""Seconds that an answer may take on a busy machine."""


def program() -> str | None:
    """The browser of this machine."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One tab: what it shows, the requests that it made, and what it printed to its console."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._from, self._rest, self._number = to, answers, b"", 0
        self.session: str | None = None
        self.requests: list[str] = []
        self.console: list[str] = []

    def start(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """What the browser answers; raises RuntimeError with its words where it refuses."""
        self._number += 1
        said = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            said["sessionId"] = self.session
        os.write(self._to, json.dumps(said).encode() + b"\0")
        return self._wait(lambda heard: heard.get("id") == self._number)["result"]

    def _wait(self, wanted: Any) -> Any:
        while True:
            heard = self._hear()
            if wanted(heard):
                if "error" in heard:
                    raise RuntimeError(heard["error"]["message"])
                return heard

    def _hear(self) -> Any:
        ends = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(ends - time.monotonic(), 0))
            more = os.read(self._from, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError("the browser does not answer")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        heard = json.loads(text)
        self._note(heard.get("method"), heard.get("params"))
        return heard

    def _note(self, method: str | None, params: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])

    def open(self, file: Path, mark: str = "") -> None:
        """Load *file*, at the place *mark*, and wait until it is there."""
        self.call("Page.navigate", url="about:blank")
        self.requests.clear()
        self.console.clear()
        self.call("Page.navigate", url=f"file://{file}{mark}")
        while self.js("location.href + document.readyState") != f"file://{file}{mark}complete":
            time.sleep(0.01)

    def js(self, expression: str) -> Any:
        """The value of *expression* in the page; raises RuntimeError where it throws."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
        return done["result"].get("value")

    def press(self, key: str) -> None:
        """Press and let go *key*."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def look(self, *, width: int = 1280, height: int = 860, dark: bool = False, media: str = "screen") -> None:
        """How the page is shown from now on."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", media=media, features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def script(self, allowed: bool) -> None:
        """Whether pages that are loaded from now on may run any."""
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def picture(self) -> bytes:
        """What is seen, as WebP: a fifth of what a PNG of it takes."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="webp", quality=75)["data"])

    def printed(self) -> bytes:
        """The page on paper, as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that keeps what it keeps in *folder*."""
    name = program()
    assert name is not None
    hear, say = os.pipe()
    answers, reply = os.pipe()
    # 3 and 4 are what the option means; the shell puts our ends there and is gone.
    script = f'exec "$@" 3<&{hear} 4>&{reply}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", name, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
         "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(hear, reply), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(hear)
    os.close(reply)
    try:
        there = Browser(say, answers)
        there.start()
        yield there
    finally:
        os.close(say)
        os.close(answers)
        process.terminate()
        process.wait()
