"""What is published: metrics, JSON and page as text, as files, and by the running program."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from harness import JsonObject, Workspace, wait_until
from reports import EVIL, NOW, full_of_evil, morning, page_of, sent, trigger, work
from simulator import Simulator

import teckochecker as tc
from teckochecker import Batch, Event, Holder, JobStatus, Report, TriggerState, Usage, Work

S = TriggerState
ENDS = {
    tc.STATUS_FILE: "}\n",
    tc.METRICS_FILE: "\n",
    tc.PAGE_FILE: "</html>\n",
    tc.AGAIN_FILE: "</html>\n",
}

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]  # by name, by labels

PLAIN = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


# ---- readers of our own ----


def parsed(text: str) -> Samples:
    """Prometheus' text format, read strictly: HELP and TYPE before the samples, unescaped."""
    label = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"'
    found: Samples = {}
    name = ""
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            assert rest
            assert what in {"HELP", "TYPE"}
            assert what == "HELP" or rest == ("counter" if name.endswith("_total") else "gauge")
            found.setdefault(name, {})
            continue
        match = re.fullmatch(rf"([a-z_]+)(?:\{{({label}(?:,{label})*)\}})? (\S+)", line)
        assert match, line
        assert match[1] == name
        pairs = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or "")
        labels = tuple((k, re.sub(r"\\.", lambda m: PLAIN[m[0]], v)) for k, v in pairs)
        assert labels not in found[name], line
        found[name][labels] = float(match[3])
    return found


def counted(samples: Samples, name: str) -> dict[str, float]:
    """A metric of one label, by its values."""
    return {labels[0][1]: value for labels, value in samples[f"teckochecker_{name}"].items()}


class Seen(HTMLParser):
    """What a page shows of its jobs, in its order: name, status, how many batches have ended."""

    VOID = frozenset({"meta", "link", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.jobs: list[dict[str, str]] = []
        self.alarms: list[str] = []
        self.tags: Counter[str] = Counter()
        self.bars: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append((tag, kind))
        if tag == "article":
            self.jobs.append({})
            self.bars.append([])
        if tag == "div" and "alarm" in kind:
            self.alarms.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, kind = self.open[-1] if self.open else ("", "")
        if ("article", "job") in self.open or ("article", "job need") in self.open:
            if tag == "h3":
                self.jobs[-1]["name"] = data
            elif kind.startswith("pill"):
                self.jobs[-1]["status"] = data.replace(" ", "_")
            elif re.fullmatch(r"\d+/\d+", data):
                self.jobs[-1]["ended"] = data
            elif tag == "title":
                self.bars[-1].append(data)
        if any("alarm" in kind for _, kind in self.open):
            self.alarms[-1] += data


# ---- in words ----


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (0.6, "1 s"),
        (59, "59 s"),
        (59.6, "1 min"),
        (60, "1 min"),
        (150, "2 min"),
        (3540, "59 min"),
        (3599, "1 h"),
        (7000, "2 h"),
        (86_399, "1 day"),
        (86_400, "1 day"),
        (10 * 86_400, "10 days"),
    ],
)
def test_lengths_of_time(seconds: float, words: str) -> None:
    """Times are said as people say them: one number, one unit, never `60 s`."""
    assert tc.in_words(seconds) == words


@pytest.mark.parametrize(
    ("at", "past", "future"),
    [
        (None, "never", "now"),
        (NOW, "just now", "now"),
        (NOW - 0.5, "just now", "now"),
        (NOW - 60, "1 min ago", "now"),
        (NOW + 60, "just now", "in 1 min"),
    ],
)
def test_times_from_now(at: float | None, past: str, future: str) -> None:
    """What is recorded in the future was just now; what is overdue is due now."""
    assert tc.ago(at, NOW) == past
    assert tc.until(at, NOW) == future


SOON = NOW + 120


@pytest.mark.parametrize(
    ("one", "step"),
    [
        (work("a", ("in_progress", 1), next_check_at=SOON), "look in 2 min"),
        (work("a", ("in_progress", 1), next_check_at=None), "look now"),
        (work("a", ("completed", 9)), "start it now"),
        (work("a", ("in_progress", 1), paused=True), "nothing while it is paused"),
        (work("a", (None, 0), done=True), "nothing: it is done elsewhere"),
        (work("a", ("failed", 1), trigger=sent("42", 1)), "started as Keboola job 42, 1 h ago"),
        (
            work("a", ("failed", 1), trigger=trigger(S.INTENT, next_try_at=SOON)),
            "search Keboola in 2 min, then start it",
        ),
        (work("a", ("failed", 1), trigger=trigger(S.SENDING)), "wait for Keboola's answer"),
        (
            work("a", ("failed", 1), trigger=trigger(S.UNKNOWN, next_try_at=SOON)),
            "search Keboola again in 2 min",
        ),
        (
            work("a", ("failed", 1), trigger=trigger(S.REJECTED, next_try_at=SOON)),
            "try again in 2 min, or `retry`",
        ),
        (
            work("a", ("failed", 1), trigger=trigger(S.REJECTED)),
            "wait for another target, variables or token, or `retry`",
        ),
        (
            work("a", ("failed", 1), trigger=trigger(S.REJECTED), paused=True),
            "nothing while it is paused",
        ),
    ],
)
def test_what_happens_next(one: Work, step: str) -> None:
    """For each state of a job it is said what happens next, and when."""
    assert tc.what_next(one, NOW) == step


def test_the_order_of_jobs() -> None:
    """First what needs a person, then what runs, rests, and is finished; else as in the config."""
    names = [w.name for w in tc.in_need_first(morning().works)]
    assert names == [
        "product-texts-de",
        "support-tickets",
        "nightly-embeddings",
        "reviews-sentiment",
        "weekly-summaries",
        "catalog-translations",
        "invoices-ocr",
    ]


@pytest.mark.parametrize(
    ("batch", "share"),
    [
        (Batch("b"), 0.0),
        (Batch("b", "in_progress", 0, 0, 0), 0.0),
        (Batch("b", "in_progress", 10, 2, 3), 0.5),
        (Batch("b", "in_progress", 10, 20, 0), 1.0),
        (Batch("b", "expired", 10, 2, 0), 1.0),
    ],
)
def test_progress(batch: Batch, share: float) -> None:
    """What has ended counts, well or badly, and nothing is ever done more than once."""
    assert tc.progress(batch) == share


# ---- as JSON ----


@pytest.mark.parametrize("works", [(), morning().works, full_of_evil().works])
def test_the_json_is_the_document(works: tuple[Work, ...]) -> None:
    """Encoded job by job, it is still the same document; `[]` in a text does not confuse it."""
    config = {"path": "[]", "sha256": "[]", "loaded_at": None, "error": '"jobs": []'}
    report = replace(morning(), works=works, config=config)
    assert json.loads(tc.status_json(report)) == tc.status_document(report)


# ---- as metrics ----


def test_metrics() -> None:
    """A report as metrics: every known status has its number, also where that is 0."""
    samples = parsed(tc.metrics(morning()))
    jobs = {"active": 2, "paused": 1, "triggering": 1, "completed": 1}
    assert counted(samples, "jobs") == {**jobs, "completed_with_failures": 1, "failed": 1}
    assert counted(samples, "batches") == {
        "validating": 1,
        "in_progress": 3,
        "finalizing": 1,
        "cancelling": 0,
        "completed": 13,
        "failed": 0,
        "expired": 1,
        "cancelled": 0,
        "unseen": 0,
    }
    triggers = {"intent": 0, "sending": 0, "sent": 2, "rejected": 1, "unknown": 1}
    assert counted(samples, "triggers") == triggers
    assert counted(samples, "requests_total") == {"openai-prod": 20_417, "keboola-prod": 96}
    assert counted(samples, "request_errors_total") == {"openai-prod": 3, "keboola-prod": 14}
    success = counted(samples, "last_success_timestamp_seconds")
    assert success == {"openai-prod": NOW - 12, "keboola-prod": NOW - 2.4 * 3600}
    assert counted(samples, "account_refused") == {"openai-prod": 0, "keboola-prod": 0}
    assert counted(samples, "info") == {tc.__version__: 1}
    single = {name: value[()] for name, value in samples.items() if () in value}
    assert single == {
        "teckochecker_generated_timestamp_seconds": NOW,
        "teckochecker_daemon_running": 1,
        "teckochecker_jobs_in_need": 2,
        "teckochecker_last_look_age_seconds": 12,
        "teckochecker_oldest_look_age_seconds": 12,
        "teckochecker_config_last_reload_successful": 1,
        "teckochecker_config_last_reload_success_timestamp_seconds": NOW - 11_839,
    }


def test_metrics_of_nothing() -> None:
    """Without jobs and before any request, statuses are 0; what never was is left out."""
    usages = {"openai-prod": Usage("openai")}
    config = {"path": "", "sha256": "", "loaded_at": None, "error": "bad"}
    report = replace(morning(), works=(), usages=usages, config=config, runs=Holder.NOBODY)
    samples = parsed(tc.metrics(report))
    assert counted(samples, "jobs") == dict.fromkeys(JobStatus, 0)
    assert counted(samples, "requests_total") == {"openai-prod": 0}
    assert samples["teckochecker_daemon_running"] == {(): 0}
    assert samples["teckochecker_config_last_reload_successful"] == {(): 0}
    assert "teckochecker_last_success_timestamp_seconds" not in samples
    assert "teckochecker_last_look_age_seconds" not in samples


def test_labels_are_escaped() -> None:
    """Whatever a status or a name is made of, it stays within its label."""
    nasty = 'a"b\\c\nteckochecker_jobs{} 1'
    works = (Work(1, "a", (Batch("b", nasty),), morning().works[0].target, 0),)
    report = replace(morning(), works=works, usages={nasty: Usage(nasty, 3)})
    samples = parsed(tc.metrics(report))
    assert counted(samples, "batches")[nasty] == 1
    labels = (("account", nasty), ("service", nasty))
    assert samples["teckochecker_requests_total"] == {labels: 3}


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool here")
@pytest.mark.parametrize(
    "report",
    [
        morning(),
        replace(full_of_evil(), config=morning().config),
        replace(morning(), works=(), usages={}),
    ],
    ids=["morning", "evil", "empty"],
)
def test_promtool(report: Report) -> None:
    """Prometheus' own checker has nothing to say, neither of the format nor of the names."""
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(
        command, input=tc.metrics(report), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- as a page ----


def test_every_text_is_escaped() -> None:
    """No text of a config or of a server becomes an element, nor leaves its attribute."""
    page = page_of(full_of_evil())
    seen = Seen(page)
    assert EVIL not in page
    assert [tag for tag in ("script", "img", "b", "iframe") if seen.tags[tag]] == []
    assert all(job["name"].startswith(EVIL) for job in seen.jobs)
    assert seen.tags["a"] == 1  # of two Keboola jobs: one address is none
    assert " on" not in "".join(re.findall(r"<[^>]*>", re.sub(r'"[^"]*"', "", page)))


@pytest.mark.parametrize(
    ("url", "is_link"),
    [
        ("https://connection.keboola.com/admin/1", True),
        ("http://127.0.0.1:8080/1", True),
        ("javascript:alert(1)", False),
        (" javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("//evil.example", False),
        (None, False),
    ],
)
def test_only_web_addresses_are_links(url: str | None, is_link: bool) -> None:  # noqa: FBT001
    """A Keboola job is a link where its address is one of the web; its number is always there."""
    text = tc.keboola_link(replace(sent("42", 1), url=url))
    assert text == (
        f'<a href="{url}" rel="noreferrer">Keboola job 42</a>. ' if is_link else "Keboola job 42. "
    )


def test_a_link_stays_in_its_attribute() -> None:
    """Quotes in an address do not end the attribute."""
    text = tc.keboola_link(replace(sent("42", 1), url="https://x/\"'><b>"))
    assert text.startswith('<a href="https://x/&quot;&#x27;&gt;&lt;b&gt;" rel="noreferrer">')


def head_of(report: Report, name: str = tc.PAGE_FILE) -> dict[str, str]:
    """What the page's head asks of a browser."""
    found = re.findall(r'<meta http-equiv="([^"]+)" content="([^"]*)">', tc.page_head(report, name))
    return dict(found)


def test_the_head() -> None:
    """The policy allows nothing but the one style; the refresh asks for the page's other name."""
    report = replace(morning(), at=NOW + 0.25, fresh_for_s=44.1)
    head = head_of(report)
    policy = head["Content-Security-Policy"].split("; ")
    assert policy[:2] == ["default-src 'none'", "img-src data:"]
    assert re.fullmatch(r"style-src 'sha256-[A-Za-z0-9+/=]{44}'", policy[2])
    own = f"made-{NOW:.0f}-250"
    assert head["refresh"] == f"45; url=status-again.html?{own}#{own}"
    assert head_of(report, tc.AGAIN_FILE)["refresh"] == f"45; url=status.html?{own}#{own}"
    assert f'class="alarm loud stale" role="alert" id="{own}"' in page_of(report)


@pytest.mark.parametrize("runs", [Holder.NOBODY, Holder.ONCE])
def test_the_head_where_no_daemon_runs(runs: Holder) -> None:
    """Nobody promises another page: it is asked for anew, but never calls itself stale."""
    report = replace(morning(), runs=runs)
    assert head_of(report)["refresh"] == "60; url=status-again.html"
    assert "stale" not in page_of(report).split("</style>")[1]
    assert ("The daemon was stopped" in page_of(report)) == (runs == Holder.NOBODY)


def test_the_page_of_a_good_day() -> None:
    """Where nothing is wrong, it says so; and it counts as nothing in the tab's title."""
    page = page_of(replace(morning(), works=morning().works[:1]))
    assert "<title>TeckoChecker</title>" in page
    assert "No job needs a person." in page
    assert "Needs a person" not in page


def test_the_bar() -> None:
    """Each batch is a piece of its own, with its name and status, as long as it is done."""
    picture = tc.bar(work("a", ("completed", 1000), ("in_progress", 250), (None, 0)))
    assert 'role="img" aria-label="1/3 batches have ended"' in picture
    rects = re.findall(r'class="(\w+)" x="([\d.]+)" width="([\d.]+)"', picture)
    assert rects == [
        ("good", "0", "0.97"),
        ("run", "1", "0.242"),
        ("track", "1.242", "0.728"),
        ("track", "2", "1"),
    ]
    titles = re.findall(r"<title>(.*?)</title>", picture)
    assert titles[1:] == ["batch_a_2: in_progress", "batch_a_3: not looked at yet"]


# ---- as files ----


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """While a file is replaced again and again, whoever reads it reads all of one of them."""
    texts = [letter * 500_000 for letter in "ab"]
    tc.put_file(tmp_path, "x", texts[0])
    is_over = threading.Event()

    def write() -> None:
        for n in range(200):
            tc.put_file(tmp_path, "x", texts[n % 2])
        is_over.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not is_over.is_set():
        seen.append((tmp_path / "x").read_text())
    thread.join()
    assert set(seen) <= set(texts)
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208 - hidden ones, too


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file stays as it is until the new one is there; what is left over is cleared away."""
    tc.put_file(tmp_path, "x", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            tc.put_file(tmp_path, "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    (tmp_path / tc.new_name("x")).write_text("left over, and longer")
    tc.put_file(tmp_path, "x", "newer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "newer"}


def test_planted_links_lead_nowhere(tmp_path: Path) -> None:
    """A link in the place of a file is replaced, not followed, whichever name it has."""
    treasure = tmp_path / "treasure"
    treasure.write_text("gold")
    directory = tmp_path / "www"
    directory.mkdir()
    for name in ("x", tc.new_name("x")):
        (directory / name).symlink_to(treasure)
    tc.put_file(directory, "x", "page")
    assert treasure.read_text() == "gold"
    assert not (directory / "x").is_symlink()
    assert (directory / "x").read_text() == "page"


def test_everyone_may_read(tmp_path: Path) -> None:
    """A web server is another user: the file's mode does not depend on the umask."""
    old = os.umask(0o077)
    try:
        tc.put_file(tmp_path, "x", "page \ud800")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "x").read_text() == "page ?"


# ---- the publisher, without a process ----


class FakeEngine:
    """What a publisher asks an engine for."""

    def __init__(self, directory: Path) -> None:
        path = directory / "config.yaml"
        state = directory / "teckochecker.db"
        config = tc.Config(path, "5e" * 32, state, path, publish_path=directory / "www")
        self.setup = tc.Setup(config, {})
        self.clock = tc.SystemClock()
        self.store = tc.Store.open(state)
        self.watches: dict[int, Any] = {}
        self.news_came = asyncio.Event()
        self.noted: list[Event] = []

    def usages(self) -> dict[str, Usage]:
        return {}

    def note(self, *events: Event) -> None:
        self.noted += events


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    found = FakeEngine(tmp_path)
    yield found
    found.store.close()


def publisher(engine: FakeEngine) -> tc.Publisher:
    return tc.Publisher(engine)  # type: ignore[arg-type]


def test_trouble_is_told_once(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that cannot be written to is told of once, and once more when it is cured."""
    one = publisher(engine)
    (tmp_path / "www").write_text("a file")

    async def thrice() -> None:
        for _ in range(3):
            await one.publish(Holder.DAEMON)

    asyncio.run(thrice())
    assert [event.name for event in engine.noted] == ["publish_failed"]
    assert engine.noted[0].level == "warning"
    assert engine.noted[0].fields["directory"] == str(tmp_path / "www")
    (tmp_path / "www").unlink()
    asyncio.run(thrice())
    assert [event.name for event in engine.noted] == ["publish_failed", "publish_recovered"]
    assert_whole(tmp_path / "www")

    monkeypatch.setattr(tc, "metrics", lambda report: report.no_such_thing)
    asyncio.run(thrice())  # a bug is no more than trouble
    assert engine.noted[2].fields["error"] == (
        "AttributeError: 'Report' object has no attribute 'no_such_thing'"
    )
    assert len(engine.noted) == 3


def test_files_are_written_though_nothing_changes(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any news, and however long it takes, files are no older than a beat and a half.

    This is what the page goes by when it calls itself stale.
    """
    one = publisher(engine)
    one._took_s = 1000.0
    monkeypatch.setattr(tc, "HEARTBEAT_S", 0.05)
    beats: list[Holder] = []
    enough = asyncio.Event()

    async def publish(runs: Holder) -> None:
        beats.append(runs)
        if len(beats) == 4:
            enough.set()

    monkeypatch.setattr(one, "publish", publish)

    async def run() -> None:
        running = asyncio.ensure_future(one.run())
        await asyncio.wait_for(enough.wait(), 20)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())
    assert beats == [Holder.DAEMON] * 4


def test_how_long_a_page_is_fresh(engine: FakeEngine) -> None:
    """It is longer than from one beat to the next, writing included, and within two minutes."""
    one = publisher(engine)
    for took_s in (0.0, 4.0):
        one._took_s = took_s
        fresh_for_s = one._report(Holder.DAEMON).fresh_for_s
        assert tc.HEARTBEAT_S + took_s < fresh_for_s < 120
    assert tc.HEARTBEAT_S + 4 < 60


def test_last_events_as_the_log_grows(engine: FakeEngine) -> None:
    """The last three of each job, the newest first, whether read at once or bit by bit."""
    bit_by_bit = tc.LastEvents()
    for n in range(7):
        job = ("a", "b", None)[n % 3]
        engine.store.log([Event(f"e{n}", "info", job), Event(f"f{n}", "info", "a")], NOW)
        bit_by_bit.read(engine.store, ["a", "b"])
    last: Mapping[str, Any] = bit_by_bit.read(engine.store, ["a", "b"])
    at_once = tc.LastEvents().read(engine.store, ["a", "b"])
    for found in (last, at_once):
        names = {job: [row.event.name for row in rows] for job, rows in found.items()}
        assert names == {"a": ["f6", "e6", "f5"], "b": ["e4", "e1"]}
    assert list(bit_by_bit.read(engine.store, ["b", "new"])) == ["b", "new"]


# ---- the program ----


def assert_whole(directory: Path) -> None:
    """All of it is there, nothing else, each to its last line; the files are of one moment."""
    texts = {path.name: path.read_text() for path in directory.iterdir()}
    assert texts.keys() == ENDS.keys()
    assert {name: texts[name][-len(end) :] for name, end in ENDS.items()} == ENDS
    made = json.loads(texts[tc.STATUS_FILE])["generated_at"]
    assert f"at {made}" in texts[tc.PAGE_FILE]
    second = parsed(texts[tc.METRICS_FILE])["teckochecker_generated_timestamp_seconds"][()]
    assert tc.rfc3339(second) == made
    bodies = [texts[name].split("</head>")[1] for name in (tc.PAGE_FILE, tc.AGAIN_FILE)]
    assert bodies[0] == bodies[1]


def www(workspace: Workspace, name: str = "www") -> Path:
    """Has the workspace publish into a directory."""
    workspace.config["publish"] = name
    return workspace.directory / name


def document(directory: Path) -> JsonObject:
    """What `status.json` says; nothing before there is one."""
    try:
        found: JsonObject = json.loads((directory / tc.STATUS_FILE).read_text())
    except FileNotFoundError:
        return {"jobs": [], "config": {}}
    return found


def wait_for_statuses(directory: Path, **statuses: str) -> None:
    """Waits until `status.json` says so; names have no dashes here."""

    def holds() -> bool:
        jobs = document(directory)["jobs"]
        return {job["name"]: job["status"] for job in jobs} == statuses

    wait_until(holds, f"{statuses} in status.json")


def assert_agree(workspace: Workspace, directory: Path) -> None:
    """The three files and the table say what `status --json` says."""
    assert_whole(directory)
    status = workspace.status()
    jobs = {job["name"]: job for job in status["jobs"]}
    published = document(directory)
    assert published | {"generated_at": ""} == status | {"generated_at": ""}

    page = Seen((directory / tc.PAGE_FILE).read_text())
    assert {job["name"]: job["status"] for job in page.jobs} == {
        name: job["status"] for name, job in jobs.items()
    }
    for shown, bar in zip(page.jobs, page.bars, strict=True):
        batches = jobs[shown["name"]]["batches"]
        assert bar == [f"{b['id']}: {b['status'] or 'not looked at yet'}" for b in batches]
        assert shown["ended"] == f"{ended(batches)}/{len(batches)}"

    _, _, _, *rows = workspace.run("status").stdout.splitlines()
    assert [row.split()[:3] for row in rows] == [
        [job["name"], job["status"], job["ended"]] for job in page.jobs
    ]

    samples = parsed((directory / tc.METRICS_FILE).read_text())
    assert nonzero(samples, "jobs") == Counter(job["status"] for job in jobs.values())
    batches = [batch for job in jobs.values() for batch in job["batches"]]
    assert nonzero(samples, "batches") == Counter(b["status"] or "unseen" for b in batches)
    triggers = [job["trigger"] for job in jobs.values() if job["trigger"]]
    assert nonzero(samples, "triggers") == Counter(t["state"] for t in triggers)
    assert samples["teckochecker_config_last_reload_successful"][()] == (
        status["config"]["error"] is None
    )


def ended(batches: list[JsonObject]) -> int:
    return sum(batch["status"] in tc.TERMINAL for batch in batches)


def nonzero(samples: Samples, name: str) -> dict[str, float]:
    return {label: value for label, value in counted(samples, name).items() if value}


def add_all_kinds(workspace: Workspace, sim: Simulator) -> None:
    """Adds jobs that come to every status there is."""
    workspace.add_job("runs", "batch_r1", "batch_r2", status="in_progress")
    workspace.add_job("rests", "batch_p", status="in_progress", paused=True)
    workspace.add_job("whole", "batch_w1", "batch_w2")
    workspace.add_job("partly", "batch_e", status="expired")
    workspace.add_job("refused", "batch_f")
    workspace.add_job("gone", "batch_g")
    sim.delete_batch("batch_g")
    sim.fault("queue.create", "status", None, code=400, match='"config":"refused"')


def test_from_start_to_stop(workspace: Workspace, sim: Simulator) -> None:
    """What is published follows the daemon, says at the end that it was stopped, and agrees."""
    directory = www(workspace)
    add_all_kinds(workspace, sim)
    statuses = {
        "runs": "active",
        "rests": "paused",
        "whole": "completed",
        "partly": "completed_with_failures",
        "refused": "failed",
        "gone": "active",
    }
    daemon = workspace.daemon()
    wait_for_statuses(directory, **statuses)
    page = (directory / tc.PAGE_FILE).read_text()
    assert "Made by the daemon at" in page
    assert [alarm[:20] for alarm in Seen(page).alarms] == ["This page is stale. "]
    sim.finish("batch_r1")
    wait_until(lambda: document(directory)["jobs"][0]["completed_count"] == 1, "one has ended")
    sim.finish("batch_r2")
    wait_for_statuses(directory, **statuses | {"runs": "completed"})
    wait_until(lambda: document(directory)["jobs"][5]["error"], "a job's error")
    assert daemon.stop() == 0
    alarms = Seen((directory / tc.PAGE_FILE).read_text()).alarms
    assert len(alarms) == 1
    assert alarms[0].startswith("The daemon was stopped at ")
    samples = parsed((directory / tc.METRICS_FILE).read_text())
    assert samples["teckochecker_daemon_running"] == {(): 0}
    assert samples["teckochecker_jobs_in_need"] == {(): 2}
    accounts = {dict(labels)["account"] for labels in samples["teckochecker_requests_total"]}
    assert accounts == {"openai", "keboola"}
    assert_agree(workspace, directory)


def test_a_reload_is_published(workspace: Workspace) -> None:
    """An edit shows, a bad one as well, and another directory is used from then on."""
    directory = www(workspace)
    workspace.add_job("first", "batch_1", status="in_progress")
    daemon = workspace.daemon()
    wait_for_statuses(directory, first="active")
    workspace.add_job("second", "batch_2", status="in_progress")
    workspace.reload(daemon)
    wait_for_statuses(directory, first="active", second="active")
    workspace.write("jobs: {broken: 5}\n")
    wait_until(lambda: document(directory)["config"]["error"], "the config's error")
    wait_until(
        lambda: "The config file has problems;" in (directory / tc.PAGE_FILE).read_text(),
        "the error on the page",
    )
    samples = parsed((directory / tc.METRICS_FILE).read_text())
    assert samples["teckochecker_config_last_reload_successful"] == {(): 0}
    assert counted(samples, "requests_total")["keboola"] == 0  # not missing
    assert document(directory)["config"]["error"] == workspace.status()["config"]["error"]
    elsewhere = www(workspace, "elsewhere")
    workspace.reload(daemon)
    wait_for_statuses(elsewhere, first="active", second="active")
    before = document(directory)
    assert daemon.stop() == 0
    assert document(directory) == before
    assert_agree(workspace, elsewhere)


def test_a_pass_is_published(workspace: Workspace, sim: Simulator) -> None:
    """--once publishes what it has come to; its page says so, and never that it is stale."""
    directory = www(workspace)
    add_all_kinds(workspace, sim)
    assert workspace.once().code == 1
    assert_agree(workspace, directory)
    page = (directory / tc.PAGE_FILE).read_text()
    assert "Made by a pass of --once at" in page
    assert Seen(page).alarms == []


def test_a_place_that_cannot_be_written_to(workspace: Workspace) -> None:
    """A file where the directory should be is told of once and does no harm; then it is cured."""
    directory = www(workspace)
    workspace.add_job("works", "batch_1", status="in_progress")
    workspace.write_file(directory, "in the way")
    daemon = workspace.daemon()
    failed = daemon.wait_for_event("publish_failed")
    assert failed["directory"] == str(directory)
    assert "File exists" in failed["error"]
    workspace.sim.finish("batch_1")
    daemon.wait_for_event("trigger_sent", job="works")
    directory.unlink()
    daemon.send(signal.SIGHUP)
    daemon.wait_for_event("publish_recovered")
    assert daemon.stop() == 0
    assert len(daemon.events_of("publish_failed")) == 1
    assert_agree(workspace, directory)


def test_published_beside_the_config(workspace: Workspace) -> None:
    """Published files in the config's own directory are no reason to look at the config."""
    workspace.config["publish"] = "."
    workspace.add_job("first", "batch_1", "batch_2", status="in_progress")
    daemon = workspace.daemon()
    page = workspace.directory / tc.PAGE_FILE
    for n, batch in enumerate(("batch_1", "batch_2")):
        wait_until(lambda: f"{n}/2</span>" in read(page), f"{n} have ended")  # noqa: B023
        workspace.sim.finish(batch)
    daemon.wait_for_event("trigger_sent")
    wait_for_statuses(workspace.directory, first="completed")
    assert daemon.stop() == 0
    assert len(daemon.events_of("config_loaded")) == 1
    assert daemon.events_of("config_rejected") == []


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_killed_while_it_publishes(workspace: Workspace) -> None:
    """However often the daemon is killed, whoever reads finds whole files."""
    directory = www(workspace)
    for n in range(30):
        workspace.add_job(f"job{n}", f"batch_{n}", status="in_progress")
    metrics = directory / tc.METRICS_FILE
    for _ in range(4):
        before = metrics.stat().st_ino if metrics.exists() else None
        daemon = workspace.daemon()
        wait_until(lambda: is_new(metrics, before), "new metrics", every=0)  # noqa: B023
        daemon.kill()  # the pages come after the metrics
        for path in directory.iterdir():
            assert path.name.startswith(".") or path.read_text().endswith(ENDS[path.name])
    daemon = workspace.daemon()
    wait_until(lambda: len(document(directory)["jobs"]) == 30, "all jobs")
    assert daemon.stop() == 0
    assert_agree(workspace, directory)


def is_new(path: Path, inode: int | None) -> bool:
    """Whether the file is there, and is another one than that."""
    return path.exists() and path.stat().st_ino != inode


def test_a_full_disk_keeps_nothing_of_what_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written whole leaves its room to others, and the old file in place."""
    (tmp_path / "status.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(OSError, match="No space"):
        tc.put_file(tmp_path, "status.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert (tmp_path / "status.json").read_text() == "old"


def test_a_directory_that_hangs_does_not_hold_the_end(tmp_path: Path) -> None:
    """A write that never returns is given up with the process: nothing waits for its thread."""
    code = f"""
import asyncio, sys, threading
sys.path.insert(0, {str(Path(tc.__file__).parent)!r})
import teckochecker
async def main():
    try:
        async with asyncio.timeout(0.1):
            await teckochecker.in_daemon_thread(threading.Event().wait)
    except TimeoutError:
        print("given up")
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")
