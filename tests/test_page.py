"""The page in a real Chromium: what a person sees, and that nothing in it can do harm.

PYTHONPATH=. python tests/test_page.py FILE        makes a picture of it, for the README
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Page
from harness import Workspace, wait_until
from test_showing import (  # noqa: F401 - `busy` is a fixture
    EVIL,
    NOW,
    STATS,
    busy,
    many,
    morning,
    published,
    run,
    shot_of,
    started,
)

import teckochecker as tc
from teckochecker import Phase

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

EVENTS = [replace(tc.Event.of("poll_failed", error=EVIL), at=NOW)] * 50
# The worst contrast of any text (WCAG 2: at least 4.5), on an alarm's ground or the browser's own.
CONTRAST = """
const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
  .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], .05);
const paper = matchMedia("(prefers-color-scheme: dark)").matches ? "18 18 18" : "255 255 255";
const shown = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility());
Math.min(...shown.map(e => {
  const alarm = e.closest(".alarm"), behind = alarm && getComputedStyle(alarm).backgroundColor;
  const ratio = light(getComputedStyle(e).color) / light(behind || paper);
  return Math.max(ratio, 1 / ratio);
}));
"""
HEIGHT = "document.documentElement.scrollHeight"
# Has all that the page does by the clock done twenty times as fast.
IN_A_HURRY = "const slow = setInterval; setInterval = (what, ms) => slow(what, ms / 20);"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of this file."""
    with tempfile.TemporaryDirectory(prefix="tecko-page-") as name, Browser(Path(name)) as found:
        yield found


def texts(page: Page, selector: str) -> list[str]:
    """The texts of all such elements that can be seen."""
    found = f"[...document.querySelectorAll('{selector}')].filter(e => e.checkVisibility())"
    return list(page.value(f"{found}.map(e => e.innerText)"))


@pytest.fixture
def page(browser: Browser, busy: Workspace) -> Iterator[Page]:  # noqa: F811
    """The page of a running daemon, as it is once its runs are where they stay."""
    path = busy.directory / "www" / "status.html"
    busy.daemon()
    wanted = {"refused": "failed", "partly": "completed_with_failures", "whole": "completed"}
    wait_until(lambda: wanted.items() <= published(busy).items(), "the ends on the page")
    wait_until(lambda: "deleted" in path.read_text(), "the lost batch on the page")
    with closing(browser.open(path.as_uri())) as opened:
        yield opened
        assert opened.complaints() == []


@pytest.mark.long
def test_what_a_person_sees(page: Page, busy: Workspace) -> None:  # noqa: F811
    """What needs attention comes first; a run is a row with its bar, and its details are folded."""
    assert page.value("document.title") == "1 needs attention - TeckoChecker"
    parts = [text.partition(" (")[0] for text in texts(page, "h2")]
    assert parts == ["Needs attention", "Active", "Paused", "Finished", "Log"]
    names = texts(page, ".run strong")
    assert (names[:4], len(names)) == (["refused", "half", "gone", "quiet"], 7)
    bars = page.value("[...document.querySelectorAll('progress')].map(e => e.value)")
    assert bars[:2] == [100, 68]
    errors = texts(page, "summary .error")
    assert errors[0].startswith("Keboola answered 400")
    assert errors[1].endswith("…")
    assert len(texts(page, "a")) == 0
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    (keboola_job,) = busy.started("partly")
    link = f"{busy.sim.stack_url}/admin/projects/1/queue/{keboola_job['id']}"
    assert link in page.value("[...document.querySelectorAll('main a')].map(a => a.href)")
    (story,) = [text for text in texts(page, ".run") if text.startswith("partly")]
    time_ = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \((\d+s ago|just now)\)"
    ended = rf"\nended: {time_}\nKeboola job: {link}\nbatch_e expired, 50/100 requests, "
    assert re.search(ended, story)
    asked = {asked for asked in page.asked_for() if not asked.startswith("data:")}
    assert asked == {(busy.directory / "www" / "status.html").as_uri()}


@pytest.mark.long
def test_it_comes_up_to_date_by_itself(page: Page, busy: Workspace) -> None:  # noqa: F811
    """Left open, it shows what has happened since; while somebody reads details, it waits."""
    page.call("Page.addScriptToEvaluateOnNewDocument", source=IN_A_HURRY)
    page.go((busy.directory / "www" / "status.html").as_uri())
    page.value("document.querySelector('details').open = true")
    busy.sim.finish("batch_2")
    wait_until(lambda: published(busy)["half"] == "completed", "a finished run")
    assert len(texts(page, ".completed")) == 2
    page.value("document.querySelector('details').open = false")
    wait_until(lambda: len(texts(page, ".completed")) == 3, "the new page")


@pytest.mark.long
def test_without_script(page: Page, busy: Workspace) -> None:  # noqa: F811
    """Where no script may run, its time is there, and details unfold all the same."""
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.go((busy.directory / "www" / "status.html").as_uri())
    assert re.fullmatch(r"Made at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", texts(page, ".dim")[0].strip())
    assert texts(page, ".alarm") == []
    page.value("document.querySelector('summary').click()")
    assert page.value("document.querySelectorAll('details[open]').length") == 1


@pytest.mark.long
@pytest.mark.parametrize("count", [0, 3, 200, 1000])
def test_it_can_be_read(browser: Browser, tmp_path: Path, count: int) -> None:
    """On a desk and on a phone, by day and by night, it is short, narrow and of good contrast."""
    error = "\n".join(["c.yaml:1:1: jobs.a.poll_interval: is bad; write 30s, 2m or 1h"] * 100)
    runs = [replace(r, error=r.error and f"{r.error}: {'so long ' * 40}") for r in many(count)]
    text = tc.page(shot_of(runs, error=error), STATS, EVENTS, once=False)
    assert len(text) < 1_000_000
    assert text.count("<details class=run>") == count
    (tmp_path / "p.html").write_text(text)
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        with closing(browser.open((tmp_path / "p.html").as_uri(), width)) as page:
            feature = {"name": "prefers-color-scheme", "value": scheme}
            page.call("Emulation.setEmulatedMedia", features=[feature])
            assert page.value(HEIGHT) <= 3000
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value(CONTRAST) >= 4.5
            assert page.value("document.querySelectorAll('details[open]').length") == 0
            assert page.complaints() == []


def test_nothing_in_it_is_a_script(browser: Browser, tmp_path: Path) -> None:
    """What a config or a server says is text; should a tag get through, the policy stops it."""
    evil = run(EVIL, EVIL, **started(EVIL, Phase.REJECTED, error=EVIL))
    text = tc.page(shot_of([evil], error=EVIL), STATS, EVENTS, once=False)
    (tmp_path / "p.html").write_text(text.replace("<main>", f"<main>{EVIL}"))
    with closing(browser.open((tmp_path / "p.html").as_uri())) as page:
        assert page.value("[document.scripts.length, document.images.length]") == [2, 1]
        assert page.events("Page.javascriptDialogOpening") == []
        assert "Content Security Policy" in " ".join(page.complaints())


OLD = [("runs", "This page was made"), ("stopped", "The daemon was stop"), ("once", "")]


@pytest.mark.parametrize(("daemon", "said"), OLD)
def test_an_old_page(browser: Browser, tmp_path: Path, daemon: str, said: str) -> None:
    """Opened cold, too, it says how old it is, and that the daemon is dead when it is."""
    shot = shot_of(morning()) | {"generated_at": tc.rfc3339(time.time() - 400)}
    shot["daemon"]["running"] = daemon == "runs"
    (tmp_path / "p.html").write_text(tc.page(shot, [], [], once=daemon == "once"))
    with closing(browser.open((tmp_path / "p.html").as_uri())) as page:
        assert "".join(texts(page, ".alarm")).startswith(said)
        assert bool(texts(page, ".alarm")) == bool(said)
        assert page.value("age.textContent") == "(7 min ago)"


NAMES = {
    "rejected": "product-texts-de",
    "unknown": "reviews",
    "nightly": "nightly-embeddings",
    "follows": "translations",
    "quiet": "product-names",
    "partly": "invoices-ocr",
    "done": "nightly-embeddings-22",
}


def picture(file: Path) -> None:
    """Makes the README's picture, as it was a few seconds after the page was made."""
    runs = [replace(found, job=NAMES[found.job]) for found in morning()]
    jobs = {r.job: tc.Job(r.job, "", "", "c", "1", paused=r.job == NAMES["quiet"]) for r in runs}
    config = tc.Config(Path("c.yaml"), "5e", Path("x"), Path("x"), jobs=jobs)
    shot = tc.snapshot(config, runs, [], {"running": True}, {}, now=NOW)
    with tempfile.TemporaryDirectory(prefix="tecko-page-") as name, Browser(Path(name)) as found:
        path = Path(name) / "status.html"
        path.write_text(tc.page(shot, [], EVENTS, once=False))
        page = found.open(path.as_uri(), width=1000, height=400)
        clock = f"Date.now = () => {1000 * (NOW + 13):.0f}"
        page.call("Page.addScriptToEvaluateOnNewDocument", source=clock)
        page.go(path.as_uri())
        file.write_bytes(page.screenshot(page.value(HEIGHT)))


if __name__ == "__main__":
    picture(Path(sys.argv[1]))
