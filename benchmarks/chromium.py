"""A headless Chromium for the time of a test or bench, spoken to over a pipe: real time, real input, screenshots.

with Chromium() as browser:
    browser.open("page.html", 360, 740, dark=True)
    browser.value("document.title")
    browser.picture("shot.png")
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120.0
"""Seconds in which an answer must come."""


def program() -> str | None:
    """Where Chromium is; None where it isn't installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page at a time. Raises `RuntimeError` for what the page throws, and where no answer comes."""

    def __init__(self, *flags: str):
        found = program()
        if found is None:
            raise RuntimeError("no Chromium is installed")
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        inner_read, self.write = os.pipe()
        self.read, inner_write = os.pipe()

        def ends() -> None:  # it reads 3 and writes 4
            a, b = os.dup(inner_read), os.dup(inner_write)
            os.dup2(a, 3)
            os.dup2(b, 4)

        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.folder.name}", "--no-first-run", *flags, "about:blank"]
        self.process = subprocess.Popen(
            command,
            preexec_fn=ends,  # noqa: PLW1509  no other way gives a child its third and fourth file
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inner_read)
        os.close(inner_write)
        self.number, self.rest, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.session = None
            self.call("Browser.close")
        except (OSError, RuntimeError):
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        os.close(self.write)
        self.folder.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.rest:
                if not select.select([self.read], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise RuntimeError(f"{method}: no answer in {PATIENCE:.0f} s")
                part = os.read(self.read, 1 << 20)
                if not part:
                    raise RuntimeError(f"{method}: Chromium ended")
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            found = json.loads(line)
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def open(
        self, file: str | Path, wide: int = 1280, high: int = 900, dark: bool = False, touch: bool = False
    ) -> None:
        """Shows a file in a window of this size, and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=wide,
            height=high,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=Path(file).absolute().as_uri())
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What an expression of the page gives, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            told = found["exceptionDetails"]
            raise RuntimeError(told.get("exception", {}).get("description") or told["text"])
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression of the page is true."""
        end = time.monotonic() + PATIENCE
        while not self.value(expression):
            if time.monotonic() > end:
                raise RuntimeError(f"{expression} didn't come true in {PATIENCE:.0f} s")
            time.sleep(0.05)

    def press(self, key: str, text: str = "") -> None:
        """A key goes down and up, as a person's does."""
        about = {"key": key, "code": "Space" if key == " " else key}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """The mouse goes down at one place of the window, and up at another."""
        about = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **about)
        for share in (0.3, 0.6, 1.0) if start != end else ():
            x, y = (a + share * (b - a) for a, b in zip(start, end))
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=1, **about)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **about)

    def tap(self, x: float, y: float) -> None:
        """A finger."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self, file: str | Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(found["data"]))
