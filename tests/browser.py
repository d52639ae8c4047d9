"""A real Chromium without a window, spoken to in its DevTools protocol over two pipes.

    with Browser(directory) as browser:
        page = browser.open("file:///tmp/status.html")
        page.value("document.title")

Nothing but the standard library, and no port: Chromium reads commands from descriptor 3 and writes
answers and events to descriptor 4, each a JSON object that a NUL ends.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

JsonObject = dict[str, Any]

CHROMIUM = shutil.which("chromium")
PATIENCE_S = 30.0  # for one step, on a slow and busy machine
SWITCHES = (
    *("--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-pipe"),
    *("--disable-gpu", "--disable-quic", "--disable-sync", "--disable-background-networking"),
    *("--disable-component-update", "--force-color-profile=srgb"),
)
# Puts the pipes where Chromium looks for them, and becomes Chromium.
LAUNCHER = """
import os, sys
commands, answers = map(int, sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class BrowserError(Exception):
    """Chromium has refused a command, or has gone."""


def out_of_the_way(fd: int) -> int:
    """The descriptor under a number that is neither 3 nor 4; the old one is closed."""
    new = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return new


class Browser:
    """Chromium as a running process; what it says is read while something is waited for."""

    def __init__(self, directory: Path) -> None:
        commands, self._commands = map(out_of_the_way, os.pipe())
        self._answers, answers = map(out_of_the_way, os.pipe())
        profile = f"--user-data-dir={directory / 'profile'}"
        launcher = [sys.executable, "-c", LAUNCHER, str(commands), str(answers)]
        self._process = subprocess.Popen(
            [*launcher, CHROMIUM or "chromium", *SWITCHES, profile],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that whatever it has started can be ended with it
        )
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._results: dict[int, JsonObject] = {}
        self._events: list[JsonObject] = []

    def wait_for(self, find: Callable[[], Any], what: str) -> Any:  # noqa: ANN401
        """What `find` returns, as soon as that is something; it looks at what has come so far."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := find()):
            if not self._read(max(0.0, deadline - time.monotonic())):
                raise BrowserError(f"it ended, or is too late: {what}")
        return found

    def _read(self, timeout_s: float) -> bool:
        """Collects what comes within this time; tells whether anything did."""
        is_there = select.select([self._answers], [], [], timeout_s)[0]
        chunk = os.read(self._answers, 1 << 20) if is_there else b""
        *messages, self._rest = (self._rest + chunk).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._results[message["id"]] = message
            else:
                self._events.append(message)
        return bool(chunk)

    def call(self, method: str, session: str | None = None, **params: object) -> JsonObject:
        """Sends a command; returns its result."""
        number = next(self._numbers)
        command: JsonObject = {"id": number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        answer = self.wait_for(lambda: self._results.pop(number, None), method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: JsonObject = answer["result"]
        return result

    def events(self, method: str, session: str) -> list[JsonObject]:
        """The parameters of all events of a name that a page has sent so far."""
        while self._read(0):
            pass
        found = [event for event in self._events if event.get("sessionId") == session]
        return [event["params"] for event in found if event["method"] == method]

    def open(self, url: str, width: int = 900, height: int = 700) -> Page:
        """Opens an address in a new page, and waits until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, target, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        page.call("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        page.go(url)
        return page

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it, and whatever it has started; asked first, so that it tidies up its profile."""
        with suppress(BrowserError, OSError):
            self.call("Browser.close")
        os.close(self._commands)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)


class Page:
    """A page of the browser's, and what it has said and asked for."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def call(self, method: str, **params: object) -> JsonObject:
        """Sends a command to the page; returns its result."""
        return self._browser.call(method, self._session, **params)

    def events(self, method: str) -> list[JsonObject]:
        return self._browser.events(method, self._session)

    def go(self, url: str) -> None:
        """Goes to an address, and waits until it is loaded."""
        loads = len(self.events("Page.loadEventFired"))
        self.call("Page.navigate", url=url)
        is_loaded = lambda: len(self.events("Page.loadEventFired")) > loads  # noqa: E731
        self._browser.wait_for(is_loaded, "a page is loaded")

    def value(self, expression: str) -> Any:  # noqa: ANN401 - whatever JSON can say
        """What an expression comes to; asked for again where the page has just gone elsewhere."""
        try:
            result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        except BrowserError as error:
            if not any(words in str(error) for words in ("navigated", "execution context")):
                raise
            return self.value(expression)
        if "exceptionDetails" in result:
            raise BrowserError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """All that the console shows, and all dialogs."""
        logged = [event["entry"]["text"] for event in self.events("Log.entryAdded")]
        called = [str(event["args"]) for event in self.events("Runtime.consoleAPICalled")]
        thrown = [str(event) for event in self.events("Runtime.exceptionThrown")]
        opened = [event["message"] for event in self.events("Page.javascriptDialogOpening")]
        return logged + called + thrown + opened

    def asked_for(self) -> list[str]:
        """The addresses it has asked for."""
        requests = [event["request"] for event in self.events("Network.requestWillBeSent")]
        return [request["url"] + request.get("urlFragment", "") for request in requests]

    def screenshot(self, height: int) -> bytes:
        """A PNG of so much of the page."""
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        options = {"clip": clip, "captureBeyondViewport": True}
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
