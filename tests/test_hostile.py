"""Hostile and sick servers: whatever they answer stays with the job that they answer for.

One process meets all of them at once: each job has an account or a configuration of its own, and
the faults pick their job by it.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import simulator
from harness import KEBOOLA_TOKEN, OPENAI_KEY, Daemon, JsonObject, Workspace, variables, wait_until
from simulator import Answer, FaultKind, HangUp, Simulator, Wire, iso

PATIENCE_S = 180.0  # for all cases together, on a busy machine; they take 30
MEGABYTE = 1024 * 1024
HUGE = 100 * MEGABYTE
# Of a hundred answers at a time some are of just under 16 MiB; uncapped they would be of 100 MB.
MEMORY_KB = 800 * 1024
DEEP = 100_000
NOT_JSON = "an answer that is not JSON"
LATE = "no whole answer within 3s"
STRANGE = "12'3\"4\n5\\\ud800\x00\u2028é"


# ---- what the simulator has no fault for: bytes as they come ----


async def deliver_raw(wire: Wire, answer: Answer, options: JsonObject) -> None:
    """Sends what `parts` makes of the honest answer, with pauses if told to, then closes."""
    for part in options["parts"](answer):
        await wire.send(part)
        await asyncio.sleep(options.get("pause_s", 0))
    if options.get("hang"):
        await wire.hang()
    raise HangUp


RAW = FaultKind(("parts", "pause_s", "hang"), deliver=deliver_raw)


@pytest.fixture(autouse=True)
def raw_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of fault, `raw`, for this file only."""
    monkeypatch.setitem(simulator.FAULTS, "raw", RAW)


@pytest.fixture
def trap() -> Iterator[socket.socket]:
    """Another host's port, to which redirects lead; nobody may ever have knocked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


Parts = Callable[[Answer], Iterable[bytes]]


def as_is(*parts: bytes) -> Parts:
    return lambda _: parts


def endless(start: bytes, part: bytes) -> Parts:
    """`start` and then `part` until the client has gone."""

    def parts(_: Answer) -> Iterator[bytes]:
        yield start
        while True:
            yield part

    return parts


def with_head(*lines: str, body: bytes = b"") -> Parts:
    """A whole answer with more lines in its head."""
    head = "\r\n".join(["HTTP/1.1 200 OK", "content-type: application/json", *lines, "", ""])
    return as_is(head.encode("latin-1") + body)


def bomb(layers: int) -> Parts:
    """A good answer behind 96 MiB of blanks, compressed once or twice, although not asked for."""

    def parts(answer: Answer) -> list[bytes]:
        body = b" " * (96 * MEGABYTE) + answer.body
        for _ in range(layers):
            body = gzip.compress(body, 6)
        coding = ", ".join(["gzip"] * layers)
        answer.headers["content-encoding"] = coding
        return [answer.head(f"content-length: {len(body)}"), body]

    return parts


def nulls(value: Any) -> Any:  # noqa: ANN401 - JSON
    return dict.fromkeys(value) if isinstance(value, dict) else [None] * 3


@dataclass(frozen=True)
class Case:
    """What a server does to one job, and what the job then says of it."""

    kind: str
    options: JsonObject = field(default_factory=dict)
    error: str = ""  # a part of the job's error; "": the answer is good enough


def body(data: bytes | str, error: str = NOT_JSON) -> Case:
    return Case("body", {"body": data, "content_type": "application/json"}, error)


def obj(value: object, error: str) -> Case:
    return Case("json", {"obj": value}, error)


def status(code: int, error: str, **options: object) -> Case:
    return Case("status", {"code": code, **options}, error)


def raw(parts: Parts, error: str, **options: object) -> Case:
    return Case("raw", {"parts": parts, **options}, error)


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# The same for OpenAI's batch, Keboola's search and Keboola's POST.
ANYWHERE = {
    "huge": Case("huge", {"size": HUGE}, "the answer is over 16 MiB"),
    "huge-length": raw(
        endless(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % HUGE, b"[" * 65_536),
        "the answer is over 16 MiB",
    ),
    "drip": Case("drip", {"interval": 0.3}, LATE),
    "silent": Case("hang_before", {}, LATE),
    "half": raw(as_is(CHUNKED, b'5\r\n{"id"\r\n'), LATE, hang=True),
    # In bursts, each as much as is read at once: a steady flood only keeps both sides' CPUs busy.
    "informed-without-end": raw(endless(b"", CONTINUE * 2600), LATE, pause_s=1),
    "cut": Case("truncated", {}, "RemoteProtocolError"),
    "reset": Case("reset_before", {}, "ReadError"),
    "chunked-garbage": raw(as_is(CHUNKED, b"zz\r\nnonsense\r\n"), "RemoteProtocolError"),
    "chunk-too-long": raw(as_is(CHUNKED, b"f" * 64 + b"\r\n"), "RemoteProtocolError"),
    "garbage": raw(as_is(b"\x00\xff<html>no HTTP at all\r\n\r\n"), "RemoteProtocolError"),
    "huge-head": raw(
        endless(b"HTTP/1.1 200 OK\r\n", b"x-filler: " + b"y" * 8000 + b"\r\n"),
        "RemoteProtocolError",
    ),
    "two-lengths": raw(
        with_head("content-length: 2", "content-length: 3", body=b"{}"), "RemoteProtocolError"
    ),
    "negative-length": raw(with_head("content-length: -1"), "RemoteProtocolError"),
    "html": Case("body", {}, f"{NOT_JSON} (text/html), with status 20"),
    "empty": body(b""),
    "not-utf8": body(b'{"id": "\xff\xfe", "status": "\xc3"}'),
    "deep-lists": body("[" * DEEP),
    "deep-objects": body('{"a":' * DEEP + "1" + "}" * DEEP),
    "long-number": body("9" * 10_000),
    "not-gzip": raw(
        with_head("content-encoding: gzip", "content-length: 2", body=b"{}"),
        "an encoding that was not asked for",
    ),
    "redirected": Case("redirect", {"code": 302}, "answered 302"),
    "server-error": status(500, "answered 500", body='{"error": {"message": 5}}'),
}

OPENAI = ANYWHERE | {
    "null": obj(None, "is not an object"),
    "list": obj([{"status": "completed"}], "is not an object"),
    "text": obj("completed", "is not an object"),
    "number-status": obj({"status": 5}, "has no status"),
    "list-status": obj({"status": ["completed"]}, "has no status"),
    "surrogate-status": obj({"status": "\ud800\n"}, "has no status"),
    "nulls": Case("json", {"transform": nulls}, "has no status"),
    "strange-id": obj({"id": STRANGE, "status": "completed"}, "has another id"),
    "strange-words": status(
        400,
        "OpenAI answered 400: 12'3\"4 5\\ é",
        body=json.dumps({"error": {"message": STRANGE, "code": {}, "type": None}}),
    ),
    "cookies": Case(
        "header",
        {"headers": {"set-cookie": "sticky=" + "c" * 4000 + "; Path=/; Max-Age=99999"}},
    ),
    "wrong-type": Case("header", {"headers": {"content-type": "image/png"}}),
    "strange-statuses": obj({"status": STRANGE.upper()}, ""),
    "strange-file": obj(
        {"status": "completed", "output_file_id": STRANGE}, "has a output_file_id that is no id"
    ),
}

# Times that are none, and other things of the wrong kind around a good status.
YEAR_10000 = 253_402_300_800
BAD_TIMES: tuple[object, ...] = (
    *(1e300, -62_135_596_801, "yesterday", YEAR_10000 - 1, YEAR_10000, [1], True, 1),
    *(float("inf"), float("nan")),
)


def bad_time(value: object) -> Case:
    """A completed batch whose times, counts and files are all the same nonsense."""
    times = dict.fromkeys(("created_at", "completed_at", "expires_at", "in_progress_at"), value)
    counts = dict.fromkeys(("total", "completed", "failed"), value)
    other: JsonObject = {"request_counts": counts, "errors": value, "metadata": value}
    change = {**times, **other, "output_file_id": "'\"/é", "error_file_id": "file-e"}
    return Case("json", {"transform": lambda batch: {**batch, **change}})


OPENAI |= {f"time-{number}": bad_time(value) for number, value in enumerate(BAD_TIMES)}

WAITS: dict[str, JsonObject] = {
    "an-age": {"retry_after": 999_999_999},
    "an-age-of-ms": {"retry_after_ms": 999_999_999_999},
    "until-9999": {"retry_after": "Fri, 31 Dec 9999 23:59:59 GMT"},
    "negative": {"retry_after": -5},
    "no-number": {"retry_after": "NaN"},
    "infinite": {"retry_after_ms": "1e999"},
    "digits": {"retry_after": "9" * 400},
    "garbage": {"retry_after": "'; DROP TABLE jobs; --"},
    "past": {"retry_after": "Thu, 01 Jan 1970 00:00:00 GMT"},
}
LONG_WAITS = {"an-age", "an-age-of-ms", "until-9999"}
OPENAI |= {
    f"{code}-{name}": status(code, f"OpenAI answered {code}", **options)
    for code in (429, 503)
    for name, options in WAITS.items()
}


# ---- looking at the process ----


def peak_kb(daemon: Daemon) -> int:
    """The most memory that the process has had."""
    text = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found
    return int(found[1])


def widest_gap(times: list[float]) -> float:
    return max(b - a for a, b in itertools.pairwise(times))


def wait_for_names(found: Callable[[], Iterable[str]], names: Iterable[str], what: str) -> None:
    """Waits until all of the names are found."""
    missing = set(names)
    deadline = time.monotonic() + PATIENCE_S
    while missing := missing - set(found()):
        assert time.monotonic() < deadline, f"no {what} for {sorted(missing)}"
        time.sleep(0.05)


def wait_for_all(daemon: Daemon, event: str, names: Iterable[str]) -> None:
    """Waits until each of the jobs has had the event."""
    wait_for_names(lambda: [e.get("job", "") for e in daemon.events_of(event)], names, event)


def wait_for_starts(workspace: Workspace, names: Iterable[str]) -> None:
    """Waits until there is a Keboola job for each; on a busy machine a search may have found it."""
    jobs = lambda: [variables(job)["teckochecker_job"] for job in workspace.sim.jobs]  # noqa: E731
    wait_for_names(jobs, names, "Keboola job")


def assert_told(daemon: Daemon, event: str, cases: dict[str, Case]) -> list[list[str]]:
    """Each case is told with its own error; returns what was told, by case."""
    all_told = []
    for name, case in cases.items():
        told = [str(found["error"]) for found in daemon.events_of(event, job=name)]
        assert case.error in told[0] or LATE in told[0], f"{name}: {told}"  # a busy machine
        all_told.append(told)
    return all_told


def assert_told_once(daemon: Daemon, event: str, cases: dict[str, Case]) -> None:
    """Each case is told with its own error, and no line twice, however often it was tried."""
    for told in assert_told(daemon, event, cases):
        assert len(told) == len(set(told)), told


def assert_honest_ones_unharmed(workspace: Workspace, daemon: Daemon) -> None:
    """The job of another account was looked at all the time."""
    assert not daemon.events_of("poll_failed", job="honest")
    looks = [r.at for r in workspace.requests if r.path.endswith("/batch_honest")]
    assert widest_gap(looks) < 6


def add_sick_job(workspace: Workspace, name: str, fault_route: str, case: Case) -> None:
    """A job whose account is its own, and what happens to its requests."""
    key = f"sk-test-of-{name}-0123456789"
    workspace.sim.add_key(key)
    workspace.secrets[f"openai-{name}"] = workspace.openai_secret(key)
    workspace.add_job(name, f"batch_{name}", openai_secret=f"openai-{name}")
    workspace.sim.fault(fault_route, case.kind, None, match=f"{key}\n", **case.options)


def redirects(listener: socket.socket) -> dict[str, Case]:
    """Redirects to another host, by every code."""
    location = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/batches/batch_a"
    return {
        f"away-{code}": Case("redirect", {"code": code, "location": location}, f"answered {code}")
        for code in (301, 302, 303, 307, 308)
    }


@pytest.mark.long
def test_openai(workspace: Workspace, trap: socket.socket) -> None:
    """No answer for a batch harms another job, costs memory, fills the log or meets a bug."""
    cases = OPENAI | redirects(trap)
    workspace.config["limits"] |= {"request_timeout": "3s", "max_concurrency": 100}
    for name, case in cases.items():
        add_sick_job(workspace, name, "openai.get", case)
    workspace.add_job("honest", "batch_honest", status="in_progress")
    workspace.add_job("done", "batch_done")
    sick = {name: case for name, case in cases.items() if case.error}
    well = cases.keys() - sick - {"strange-statuses"}
    daemon = workspace.daemon()

    wait_for_starts(workspace, {"done", *well})
    wait_for_all(daemon, "poll_failed", sick)
    workspace.wait_for_looks("batch_honest", 3)
    assert_told_once(daemon, "poll_failed", sick)
    assert_honest_ones_unharmed(workspace, daemon)
    assert len(daemon.events_of("batch_status_unknown", job="strange-statuses")) == 1
    now = time.time()
    for job in workspace.status()["jobs"]:
        if job["name"] in sick:
            due = datetime.fromisoformat(job["next_check_at"]).timestamp()
            assert due < now + 3601, job
            is_long = job["name"].removeprefix("429-").removeprefix("503-") in LONG_WAITS
            assert (due > now + 3000) == is_long, job
    assert peak_kb(daemon) < MEMORY_KB
    assert not [r.target for r in workspace.requests if "cookie" in r.headers]  # nobody's is kept

    held = {f"429-{name}" for name in LONG_WAITS}  # such an account is left alone for its hour
    workspace.sim.clear_faults()
    workspace.config["defaults"]["poll_interval"] = "2s"
    workspace.write()
    wait_for_starts(workspace, cases.keys() - held)
    for name in cases.keys() - held:
        assert len(workspace.started(name)) == 1, name
    assert daemon.stop() == 0


MEMORY = {name: OPENAI[name] for name in ("huge", "huge-length")}
BOMBS = {f"bomb-{n}": raw(bomb(n), "answer") for n in (1, 2)}


@pytest.mark.long
@pytest.mark.parametrize("cases", [MEMORY, BOMBS], ids=["plain", "bombs"])
def test_memory(workspace: Workspace, cases: dict[str, Case]) -> None:
    """Of 100 MB no more than the cap is kept, with and without a length, and compressed."""
    for name, case in cases.items():
        add_sick_job(workspace, name, "openai.get", case)
    daemon = workspace.daemon()
    batches = [f"batch_{name}" for name in cases]
    wait_until(lambda: min(map(workspace.looks, batches)) > 1, "second looks", PATIENCE_S)
    assert peak_kb(daemon) < 200 * 1024
    assert daemon.stop() == 0


# ---- Keboola ----


def rows(count: int, start: datetime, numbers: Iterator[int], **more: object) -> list[JsonObject]:
    """Somebody else's jobs, newest first, a second apart; all that came before have other ids."""
    return [
        {
            "id": str(next(numbers)),
            "createdTime": iso((start - timedelta(seconds=back)).timestamp()),
            "variableValuesData": {"values": [{"name": "theirs", "value": "1"}]},
            **more,
        }
        for back in range(count)
    ]


def without_end(count: int) -> Case:
    """Each page has jobs that were on none before, each older than those."""
    numbers = iter(range(1, 1_000_000_000))
    now = datetime.now(UTC)

    def transform(_: object) -> list[JsonObject]:
        page = rows(count, now, numbers)
        for row in page:
            row["createdTime"] = iso(now.timestamp() - int(row["id"]))
        return page

    return Case("json", {"transform": transform}, "does not end after 200 pages")


def page(count: int, error: str, **row: object) -> Case:
    """Every page is the same, and there is something with its rows."""
    return obj(rows(count, datetime.now(UTC), iter(range(1, 1_000)), **row), error)


SEARCHES = ANYWHERE | {
    "null": obj(None, "job list is not a list"),
    "object": obj({"jobs": []}, "job list is not a list"),
    "nulls": obj([None, None], "a row of Keboola's job list is not an object"),
    "numbers": obj([1, 2.5], "a row of Keboola's job list is not an object"),
    "id-null": page(1, "a row of Keboola's job list has no id", id=None),
    "id-list": page(1, "a row of Keboola's job list has no id", id=["1"]),
    "id-surrogate": page(1, "a row of Keboola's job list has no id", id="\ud800"),
    "without-end": without_end(500),
    "without-end-short": without_end(3),
    "same-page": page(500, "does not end after 200 pages"),
    "no-times": page(500, "does not end after 200 pages", createdTime=STRANGE),
    "time-numbers": page(500, "does not end after 200 pages", createdTime=1e300),
    "time-lists": page(500, "does not end after 200 pages", createdTime=[[]]),
    "429-an-age": status(429, "Keboola answered 429", retry_after=999_999_999),
    "503-an-age": status(503, "Keboola answered 503", retry_after=999_999_999),
    "429-garbage": status(429, "Keboola answered 429", retry_after="soon"),
    "503-past": status(503, "Keboola answered 503", retry_after="Thu, 01 Jan 1970 00:00:00 GMT"),
    # Rows of no use, but harmless: the job is not there, and is started.
    "one-no-time": page(1, "", createdTime=STRANGE),
    "one-old-time": page(1, "", createdTime="0001-01-01T00:00:00+14:00"),
    "one-last-time": page(1, "", createdTime="9999-12-31T23:59:59.999999Z"),
    "strange-variables": page(
        1, "", variableValuesData={"values": [None, 5, {"name": ["x"]}, {"name": STRANGE}]}
    ),
    # A row without variables is read by its id; that is not found, and nobody's.
    "strange-row": page(1, "", id=STRANGE + "/../x?y#z", variableValuesData=7),
}


POSTS = ANYWHERE | {
    "null": obj(None, "is not an object"),
    "list": obj([], "is not an object"),
    "nulls": Case("json", {"transform": nulls}, "has no id"),
    "id-list": obj({"id": ["1"]}, "has no id"),
    "id-true": obj({"id": True}, "has no id"),
    "id-blank": obj({"id": "\n\ud800 "}, "has no id"),
    "503-an-age": status(503, "Keboola answered 503", retry_after=999_999_999),
    "503-done": status(503, "Keboola answered 503", handled=True, retry_after="soon"),
    "strange-job": Case(
        "json",
        {"transform": lambda job: {**job, "id": STRANGE, "status": 5, "url": "javascript:x"}},
    ),
    "wrong-type": Case("header", {"headers": {"content-type": "text/html"}}),
    "number": Case("json", {"transform": lambda job: {**job, "id": 5, "createdTime": 1e300}}),
}
HELD = {
    f"429-{name}": status(429, "Keboola answered 429", **options) for name, options in WAITS.items()
}


NO_ADDRESS = "lists no usable https address"
URLS = {
    "number": 7,
    "plain-http": "http://queue.example.com",
    "strange-url": f"https://{STRANGE}",
    "half-a-url": "https://[::1",
}
INDEXES = {
    "html": Case("body", {}, f"{NOT_JSON} (text/html)"),
    "deep": body("[" * DEEP),
    "nulls": Case("json", {"transform": nulls}, NO_ADDRESS),
    **{
        name: obj({"services": [1, {"id": 5}, {"id": "queue", "url": url}]}, NO_ADDRESS)
        for name, url in URLS.items()
    },
    "huge": Case("huge", {"size": HUGE}, "the answer is over 16 MiB"),
    "silent": Case("hang_before", {}, LATE),
}


def named(prefix: str, cases: dict[str, Case]) -> dict[str, Case]:
    return {f"{prefix}-{name}": case for name, case in cases.items()}


def add_sick_stack(workspace: Workspace, name: str, case: Case) -> Simulator:
    """A job on a stack of its own that does not tell where its queue is."""
    stack = Simulator().start()
    stack.add_token(KEBOOLA_TOKEN)
    stack.fault("storage.index", case.kind, times=None, **case.options)
    secret = workspace.keboola_secret(KEBOOLA_TOKEN) | {"stack_url": stack.stack_url}
    workspace.secrets[f"keboola-{name}"] = secret
    workspace.add_job(name, f"batch_{name}", keboola_secret=f"keboola-{name}")
    return stack


def add_keboola_cases(
    workspace: Workspace, searched: dict[str, Case], posted: dict[str, Case]
) -> None:
    """Jobs whose batches have ended, and what happens to their searches and POSTs."""
    for name, case in searched.items():
        workspace.add_job(name, f"batch_{name}")
        match = f"configId={name}&"
        workspace.sim.fault("queue.search", case.kind, None, match=match, **case.options)
    for name, case in posted.items():
        workspace.add_job(name, f"batch_{name}")
        match = f'"config":"{name}"'
        workspace.sim.fault("queue.create", case.kind, match=match, **case.options)


def long_waits(workspace: Workspace) -> list[float]:
    """How long the starts that Keboola wants to wait will be unknown."""
    with closing(sqlite3.connect(workspace.state)) as db:
        told = "phase = 'unknown' AND post_error LIKE 'Keboola answered%'"
        query = f"SELECT repeat_after_s FROM runs WHERE {told}"  # noqa: S608
        return [wait_s for (wait_s,) in db.execute(query)]


@pytest.mark.long
def test_keboola(workspace: Workspace, trap: socket.socket) -> None:
    """Whatever Keboola answers: without a complete search no POST, and one job in the end."""
    away = redirects(trap)
    searched, posted = named("s", SEARCHES | away), named("p", POSTS | away)
    unled, delayed = named("i", INDEXES | away), named("h", HELD)
    names = {*searched, *posted, *unled, *delayed}
    no_search = {n: c for n, c in (searched | unled).items() if c.error}
    no_answer = {n: c for n, c in posted.items() if c.error}
    workspace.config["limits"] |= {"request_timeout": "3s", "max_concurrency": 100}
    add_keboola_cases(workspace, searched, posted | delayed)
    workspace.add_job("honest", "batch_honest", status="in_progress")
    workspace.add_job("done", "batch_done")
    with ExitStack() as stack:
        stacks = {n: add_sick_stack(workspace, n, c) for n, c in unled.items()}
        for sim in stacks.values():
            stack.callback(sim.stop)
        daemon = workspace.daemon()
        wait_for_starts(workspace, {"done"})
        wait_for_all(daemon, "trigger_search_failed", no_search)
        wait_for_all(daemon, "trigger_unknown", no_answer)
        told = assert_told(daemon, "trigger_unknown", no_answer)
        posts = map(workspace.posts, no_answer)
        assert all(len(lines) <= count for lines, count in zip(told, posts, strict=True))
        assert_told_once(daemon, "trigger_search_failed", no_search)
        held = {"p-503-an-age", *(f"h-429-{name}" for name in LONG_WAITS)}
        wait_for_starts(workspace, names - held - no_search.keys())
        assert {name for name in no_search if workspace.posts(name)} == set()
        assert_honest_ones_unharmed(workspace, daemon)
        assert peak_kb(daemon) < MEMORY_KB
        waits = [wait for wait in long_waits(workspace) if wait > 60]
        assert waits == [3600] * len(held)

        for sim in (workspace.sim, *stacks.values()):
            sim.clear_faults()
        workspace.config["defaults"]["poll_interval"] = "2s"
        workspace.write()
        wait_for_starts(workspace, no_search.keys() - stacks.keys())
        wait_until(lambda: all(sim.jobs for sim in stacks.values()), "jobs of sick stacks")
        assert {len(sim.jobs) for sim in stacks.values()} == {1}
        assert {len(workspace.started(n)) for n in names - stacks.keys() - held} == {1}
        assert OPENAI_KEY not in daemon.log()
        assert KEBOOLA_TOKEN not in daemon.log()
        assert daemon.stop() == 0
