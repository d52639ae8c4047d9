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
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

JsonObject = dict[str, Any]

CHROMIUM = shutil.which("chromium")
PATIENCE_S = 30.0  # for one step, on a slow and busy machine
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
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
    """Chromium as a running process; a thread collects what it says."""

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
        self._news = threading.Condition()
        self._results: dict[int, JsonObject] = {}
        self._events: list[JsonObject] = []
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="chromium reader")
        self._reader.start()

    def _read(self) -> None:
        """Collects answers and events until Chromium closes its end."""
        rest = b""
        while chunk := os.read(self._answers, 1 << 20):
            *messages, rest = (rest + chunk).split(b"\0")
            with self._news:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._results[message["id"]] = message
                    else:
                        self._events.append(message)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, find: Callable[[], Any], what: str) -> Any:  # noqa: ANN401
        """What `find` returns, as soon as that is something; it looks at what has come so far."""
        deadline = time.monotonic() + PATIENCE_S
        with self._news:
            while not (found := find()):
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._ended:
                    raise BrowserError(f"{'it ended' if self._ended else 'too late'}: {what}")
                self._news.wait(left_s)
        return found

    def call(self, method: str, session: str | None = None, **params: object) -> JsonObject:
        """Sends a command; returns its result."""
        number = next(self._numbers)
        command: JsonObject = {"id": number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        data = memoryview(json.dumps(command).encode() + b"\0")
        while data:
            data = data[os.write(self._commands, data) :]
        answer = self.wait_for(lambda: self._results.pop(number, None), method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: JsonObject = answer["result"]
        return result

    def events(self, method: str, session: str) -> list[JsonObject]:
        """The parameters of all events of a name that a page has sent so far."""
        found = [e for e in list(self._events) if e.get("sessionId") == session]
        return [event["params"] for event in found if event["method"] == method]

    def open(self, url: str, width: int = 900, height: int = 700) -> Page:
        """Opens an address in a new page, and waits until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, target, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.go(url)
        return page

    def close(self) -> None:
        """Ends it, and whatever it has started; asked first, so that it tidies up its profile."""
        with suppress(BrowserError, OSError):
            self.call("Browser.close")
        os.close(self._commands)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        os.close(self._answers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Page:
    """A page of the browser's, and what it has said and asked for."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser = browser
        self._target = target
        self._session = session

    def call(self, method: str, **params: object) -> JsonObject:
        """Sends a command to the page; returns its result."""
        return self._browser.call(method, self._session, **params)

    def events(self, method: str) -> list[JsonObject]:
        return self._browser.events(method, self._session)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Gives it another screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Sets what its reader prefers: `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def go(self, url: str) -> None:
        """Goes to an address, and waits until it is loaded."""
        loads = self.loads
        self.call("Page.navigate", url=url)
        self.wait_for_load(after=loads)

    @property
    def loads(self) -> int:
        """How often it has loaded something."""
        return len(self.events("Page.loadEventFired"))

    def wait_for_load(self, after: int) -> None:
        """Waits until it has loaded more often than that."""
        self._browser.wait_for(lambda: self.loads > after, "a page is loaded")

    def value(self, expression: str) -> Any:  # noqa: ANN401 - whatever JSON can say
        """What an expression comes to: the tests may run scripts, whatever the page allows.

        It is asked for again where the page has just gone to another one.
        """
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

    def screenshot(self, height: int | None = None) -> bytes:
        """A PNG of what its screen shows; with a height, of so much of the page."""
        clip: JsonObject = {}
        if height:
            size = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
            clip = {"clip": size, "captureBeyondViewport": True}
        return base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"])

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
