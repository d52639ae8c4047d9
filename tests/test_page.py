"""The page in a real Chromium: what a person sees, and that nothing in it can do harm.

python tests/test_page.py [FILE]        makes the README's picture, tests/status-page.png
"""

from __future__ import annotations

import http.server
import itertools
import math
import struct
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, Page
from harness import wait_until
from reports import EVIL, NOW, full_of_evil, morning, page_of

import teckochecker as tc
from teckochecker import Holder, Report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

PICTURE = Path(__file__).with_name("status-page.png")
PHONE = 360


# ---- where it is put, and who looks ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of this file."""
    with tempfile.TemporaryDirectory(prefix="tecko-page-") as name, Browser(Path(name)) as found:
        yield found


def put(directory: Path, report: Report) -> str:
    """Writes the page under both of its names, as the publisher does; returns its address."""
    for name in (tc.PAGE_FILE, tc.AGAIN_FILE):
        tc.put_file(directory, name, page_of(report, name))
    return (directory / tc.PAGE_FILE).as_uri()


@contextmanager
def opened(browser: Browser, url: str, width: int = 900) -> Iterator[Page]:
    """A page for a while; whatever the test was about, nobody may have complained."""
    with closing(browser.open(url, width)) as page:
        yield page
        assert page.complaints() == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(params=["http", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and the address of the page in it: from a web server, and as a file."""
    if request.param == "file":
        yield tmp_path, (tmp_path / tc.PAGE_FILE).as_uri()
        return
    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield tmp_path, f"http://127.0.0.1:{server.server_port}/{tc.PAGE_FILE}"
        finally:
            server.shutdown()
            thread.join()


# ---- what is done to the page, in the page ----

# All texts that can be seen, each with its colour and the one behind it.
TEXTS = """
(() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const solid = colour => !/^rgba\\(.*, 0\\)$/.test(colour);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || element.tagName === "title" || !element.checkVisibility()) continue;
    let behind = element;
    const ground = () => getComputedStyle(behind).backgroundColor;
    while (!solid(ground())) behind = behind.parentElement;
    const style = getComputedStyle(element);
    found.push([text, style.color, ground(), parseFloat(style.fontSize)]);
  }
  return found;
})()
"""
OWN_ID = "document.querySelector('.stale')?.id"
STALE = "[...document.querySelectorAll('.stale')].map(e => e.checkVisibility())"
TOO_WIDE = """
[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll table"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)
"""


def luminance(colour: str) -> float:
    """The relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """How much two colours differ, from 1 to 21, as WCAG defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def tree(page: Page) -> list[tuple[str, str, Any]]:
    """What a screen reader has to read: role, name and level of all that is not left out."""
    nodes = {node["nodeId"]: node for node in page.call("Accessibility.getFullAXTree")["nodes"]}
    found, left = [], [next(iter(nodes))]
    while left:
        node = nodes[left.pop()]
        left += [child for child in reversed(node["childIds"]) if child in nodes]
        if not node["ignored"]:
            facts = {fact["name"]: fact["value"].get("value") for fact in node["properties"]}
            name = node.get("name", {}).get("value", "")
            found.append((node["role"]["value"], name, facts.get("level")))
    return found


# ---- the tests ----


def test_it_is_one_file_and_says_nothing(browser: Browser, place: tuple[Path, str]) -> None:
    """The page asks for nothing but itself, runs no script, and the console stays empty."""
    directory, url = place
    put(directory, morning())
    with opened(browser, url) as page:
        assert [asked for asked in page.asked_for() if not asked.startswith("data:")] == [url]
        assert page.value("document.title") == "2 in need - TeckoChecker"
        assert page.value("document.compatMode") == "CSS1Compat"
        assert page.value("document.scripts.length") == 0


def test_nothing_in_it_is_a_script(browser: Browser, tmp_path: Path) -> None:
    """Whatever a config or a server says, it is shown as text: no dialog, no element, no link."""
    with opened(browser, put(tmp_path, full_of_evil())) as page:
        assert page.value("document.querySelectorAll('script, img').length") == 0
        attributes = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
        assert page.value(f"{attributes}.filter(name => name.startsWith('on'))") == []
        links = page.value("[...document.querySelectorAll('main a')].map(a => a.protocol)")
        assert links == ["https:"]
        names = page.value("[...document.querySelectorAll('h3')].map(e => e.textContent)")
        assert len(names) == 4
        assert all(name.startswith(EVIL) for name in names)
        page.value("document.querySelectorAll('main a').forEach(a => a.click())")


def test_even_a_script_in_it_would_not_run(browser: Browser, tmp_path: Path) -> None:
    """Should a tag get through one day, the page's own policy still keeps it from running."""
    put(tmp_path, morning())
    path = tmp_path / tc.PAGE_FILE
    text = path.read_text()
    path.write_text(text.replace("<main>", f"<main>{EVIL}<img src=x onerror=alert(2)>"))
    with closing(browser.open(path.as_uri())) as page:
        assert page.value("document.scripts.length") == 1
        assert page.events("Page.javascriptDialogOpening") == []
        assert "Content Security Policy" in " ".join(page.complaints())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """Every text has the contrast that WCAG asks for (AA), by day and by night; none is tiny."""
    report = replace(morning(), config={**morning().config, "error": "config.yaml:1:1: bad"})
    with opened(browser, f"{put(tmp_path, report)}#{tc.page_id(report)}") as page:
        page.prefer(scheme)
        texts = page.value(TEXTS)
        assert len(texts) > 50
        seen = [text for text, *_ in texts]
        assert {"This page is stale.", "product-texts-de", "Keboola job 1284417702"} <= set(seen)
        bad = [(text, *colours) for text, *colours, _ in texts if contrast(*colours) < 4.5]
        assert bad == []
        assert min(size for *_, size in texts) >= 13
        paper = luminance(page.value("getComputedStyle(document.body).backgroundColor"))
        assert (paper > 0.5) == (scheme == "light")


@pytest.mark.parametrize("report", [morning(), full_of_evil()], ids=["morning", "evil"])
def test_it_fits_a_phone(browser: Browser, tmp_path: Path, report: Report) -> None:
    """Nothing is wider than a phone's screen; only the table scrolls, by itself."""
    with opened(browser, f"{put(tmp_path, report)}#{tc.page_id(report)}", PHONE) as page:
        assert page.value("innerWidth") == PHONE
        assert page.value("document.documentElement.scrollWidth") <= PHONE
        assert page.value(TOO_WIDE) == []


def test_it_can_be_heard(browser: Browser, tmp_path: Path) -> None:
    """Headings are in order, landmarks are there, bars and links have names, tables have heads."""
    with opened(browser, put(tmp_path, morning())) as page:
        found = tree(page)
        levels = [level for role, _, level in found if role == "heading"]
        assert levels[:3] == [1, 2, 3]
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        roles = [role for role, *_ in found]
        assert roles.count("main") == roles.count("banner") == 1
        named = [(role, name) for role, name, _ in found if role in {"image", "link", "heading"}]
        assert [role for role, name in named if not name] == []
        assert ("image", "1/3 batches have ended") in named
        assert [name for role, name in named if role == "link"] == [
            "Keboola job 1284417702",
            "Keboola job 1284409315",
        ]
        heads = [name for role, name, _ in found if role == "columnheader"]
        assert heads == ["Secret", "Type", "Requests", "Errors", "Last success", "State"]
        assert page.value("document.documentElement.lang") == "en"


def test_what_needs_a_person_is_on_top(browser: Browser, tmp_path: Path) -> None:
    """On the first screen of a phone, there is what is wrong, in red, and nothing that is well."""
    with opened(browser, put(tmp_path, morning()), PHONE) as page:
        names = page.value("[...document.querySelectorAll('h3')].map(e => e.textContent)")
        assert names[:2] == ["product-texts-de", "support-tickets"]
        assert names[-1] == "invoices-ocr"
        top = "document.querySelector('.need .error').getBoundingClientRect().top"
        assert page.value(top) < 400
        assert page.value("document.querySelectorAll('details[open]').length") == 1


def test_a_stale_page_says_so_and_recovers(browser: Browser, place: tuple[Path, str]) -> None:
    """A page that finds itself again says that it is stale, as long as it does; no other one does.

    Each step is a load of its own, also from a stale page to itself: else, it would stay stale for
    ever.
    """
    directory, url = place
    first = replace(morning(), fresh_for_s=1)
    put(directory, first)
    with opened(browser, url) as page:
        assert page.value(STALE) == [False]
        for _ in range(3):
            page.wait_for_load(after=page.loads)
            assert page.value(STALE) == [True]
            assert page.value(OWN_ID) == tc.page_id(first)
        second = replace(morning(), at=NOW + 90, fresh_for_s=60)
        put(directory, second)
        wait_until(lambda: page.value(OWN_ID) == tc.page_id(second), "the next page")
        assert page.value(STALE) == [False]


def test_a_fresh_page_never_says_that_it_is_stale(
    browser: Browser, place: tuple[Path, str]
) -> None:
    """As long as there is a newer page each time, it goes on without a word."""
    directory, url = place
    put(directory, replace(morning(), fresh_for_s=2))
    with opened(browser, url) as page:
        for n in range(1, 4):
            report = replace(morning(), at=NOW + n, fresh_for_s=2)
            put(directory, report)
            wait_until(lambda: page.value(OWN_ID) == tc.page_id(report), "the next page")  # noqa: B023
            assert page.value(STALE) == [False]


def test_the_page_of_a_stopped_daemon(
    browser: Browser, place: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that the daemon was stopped, and notices the next one, also at a stale address."""
    directory, url = place
    monkeypatch.setattr(tc, "MINUTE_S", 1)
    stopped = replace(morning(), runs=Holder.NOBODY)
    put(directory, stopped)
    with opened(browser, f"{url}?made-1#made-1") as page:
        for _ in range(2):
            assert page.value(STALE) == []
            said = page.value("document.querySelector('.alarm').innerText")
            assert said.startswith("The daemon was stopped at 2026-11-23T09:30:00Z.")
            page.wait_for_load(after=page.loads)
        put(directory, replace(morning(), at=NOW + 9))
        wait_until(lambda: page.value(STALE) == [False], "the page of the next daemon")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels(png: bytes) -> tuple[int, list[bytes]]:
    """The width of a PNG as Chromium makes it, and its rows of three bytes a pixel."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) == (8, 2), "not plain RGB"
    data, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    raw, above, rows = zlib.decompress(data), bytearray(3 * width + 3), []
    for y in range(height):
        how, *line = raw[y * (3 * width + 1) : (y + 1) * (3 * width + 1)]
        row = bytearray(3)  # a black pixel before the first
        for x, value in enumerate(line):
            left, up, corner = row[x], above[x + 3], above[x]
            near = min((left, up, corner), key=lambda c: abs(left + up - corner - c))
            guess = (0, left, up, (left + up) // 2, near)[how]
            row.append((value + guess) & 255)
        rows.append(bytes(row[3:]))
        above = row
    return width, rows


def smaller(png: bytes) -> bytes:
    """The picture in its 256 most frequent colours, a third of the size."""
    width, rows = pixels(png)
    colours = Counter(row[x : x + 3] for row in rows for x in range(0, 3 * width, 3))
    best = [colour for colour, _ in colours.most_common(256)]
    place = {one: min(range(len(best)), key=lambda n: math.dist(one, best[n])) for one in colours}
    lines = [b"\0" + bytes(place[r[x : x + 3]] for x in range(0, 3 * width, 3)) for r in rows]
    head = struct.pack(">IIBBBBB", width, len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(lines), 9)
    parts = ((b"IHDR", head), (b"PLTE", b"".join(best)), (b"IDAT", data), (b"IEND", b""))
    return png[:8] + b"".join(chunk(kind, part) for kind, part in parts)


def picture(file: Path) -> None:
    """Makes the README's picture: a few jobs in a narrow window, so that it is small."""
    names = ("product-texts-de", "nightly-embeddings", "invoices-ocr")
    there = partial(replace, stack_url="https://connection.keboola.com")
    works = [replace(w, target=there(w.target)) for w in morning().works if w.name in names]
    report = replace(morning(), works=works, last_events={}, usages={})
    with tempfile.TemporaryDirectory(prefix="tecko-page-") as name:
        directory = Path(name)
        with Browser(directory) as found:
            page = found.open(put(directory, report), width=640)
            file.write_bytes(smaller(page.screenshot(page.value("document.body.scrollHeight"))))


if __name__ == "__main__":
    picture(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
