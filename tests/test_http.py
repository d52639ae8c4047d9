"""OpenAI's and Keboola's clients alone: what they send, and what they make of every answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, TypeVar

import httpx
import pytest
import respx
from simulator import Simulator

import teckochecker as tc
from teckochecker import Account, ApiError, Batch, Gate, Http, KeboolaJob, Secret, TriggerState

T = TypeVar("T")
KEY = "sk-test-0123456789abcdef"
TOKEN = "1234-kbc-0123456789abcdef"
OPENAI = "https://api.openai.com/v1"
STACK = "https://connection.keboola.com"
QUEUE = "https://queue.keboola.com"
OWN_STACK = "https://keboola.example.com"
TARGET = tc.Target(STACK, "kds-team.app", "123")
BATCH = {"id": "batch_a", "object": "batch", "status": "in_progress", "created_at": 1_700_000_000}
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


class FakeClock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def wall(self) -> float:
        return NOON.timestamp() + self.now

    def mono(self) -> float:
        return 1000 + self.now

    def moment(self) -> tc.Moment:
        return tc.Moment(self.wall(), "a-boot", self.mono())

    def jitter(self) -> float:
        return 0.5

    async def sleep(self, seconds: float, result: object = None) -> object:
        self.sleeps.append(seconds)
        self.now += max(0.0, seconds)
        await turn()
        return result


real_sleep = asyncio.sleep
TLS = httpx.create_ssl_context()  # it costs more than all of the rest


async def turn() -> None:
    """Let the other tasks run."""
    await real_sleep(0)


async def settle() -> None:
    """Let the other tasks run until all of them wait."""
    for _ in range(50):
        await turn()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(asyncio, "sleep", fake.sleep)
    return fake


@pytest.fixture
def web() -> Iterator[respx.Router]:
    with respx.mock(assert_all_called=False) as router:
        yield router


@pytest.fixture
def http(clock: FakeClock) -> Http:
    return new_http(clock)


def new_http(clock: tc.Clock, **limits: Any) -> Http:  # noqa: ANN401 - any limit
    redactor = tc.Redactor()
    redactor.learn([Secret(KEY), Secret(TOKEN)])
    http = Http(tc.Limits(**limits), redactor, clock)
    http._tls = TLS
    return http


def openai(http: Http, key: str = KEY, **more: str) -> tc.OpenAIClient:
    given: dict[str, Any] = {"organization": None, "project": None, **more}
    return tc.OpenAIClient(Account(Secret(key), OPENAI, **given), http)


def keboola(
    http: Http, stack_url: str = STACK, learned: tc.Learned | None = None
) -> tc.KeboolaClient:
    return tc.KeboolaClient(stack_url, Secret(TOKEN), http, learned)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def failing(work: Awaitable[object]) -> ApiError:
    """The ApiError that the work must raise."""

    async def attempt() -> object:
        return await work

    with pytest.raises(ApiError) as caught:
        run(attempt())
    return caught.value


def answers(*rest: httpx.Response | Exception) -> Iterator[httpx.Response | Exception]:
    """One after the other; the last one again and again."""
    yield from rest
    while True:
        yield rest[-1]


def ok(**changes: object) -> httpx.Response:
    return httpx.Response(200, json={**BATCH, **changes})


# ---- OpenAI: requests ----


def test_what_openai_is_sent(web: respx.Router, http: Http) -> None:
    """The key is a bearer token; organization and project are sent only where configured."""
    route = web.get(f"{OPENAI}/batches/batch_a").mock(return_value=ok())
    assert run(openai(http).batch("batch_a")).status == "in_progress"
    run(openai(http, organization="org-1", project="proj_2").batch("batch_a"))
    plain, special = (call.request.headers for call in route.calls)
    assert plain["authorization"] == f"Bearer {KEY}"
    assert plain["user-agent"] == f"teckochecker/{tc.__version__}"
    assert not {"openai-organization", "openai-project", "x-storageapi-token"} & set(plain)
    assert (special["openai-organization"], special["openai-project"]) == ("org-1", "proj_2")


RETRIED: dict[str, httpx.Response | Exception] = {
    **{str(code): httpx.Response(code) for code in (408, 409, 429, 500, 502, 503, 504, 599)},
    "html": httpx.Response(200, html="<html>log in</html>"),
    "broken": httpx.Response(200, text='{"status": "comp'),
    "empty": httpx.Response(200),
    "no status": httpx.Response(200, json={"id": "batch_a"}),
    "null status": ok(status=None),
    "a list": httpx.Response(200, json=[BATCH]),
    "null": httpx.Response(200, json=None),
    "another batch": ok(id="batch_b"),
    "deep": httpx.Response(200, text="[" * 100_000),
    "deep object": httpx.Response(200, text='{"status":' * 100_000),
    "not utf-8": httpx.Response(200, content=b'{"status": "\xff\xfe"}'),
    "a number of 10,000 digits": httpx.Response(200, text='{"status": ' + "9" * 10_000 + "}"),
    "not gzip": httpx.Response(200, headers={"content-encoding": "gzip"}, stream=None),
    "refused": httpx.ConnectError("refused"),
    "connect timeout": httpx.ConnectTimeout("slow"),
    "read error": httpx.ReadError("reset"),
    "protocol": httpx.RemoteProtocolError("gone"),
    "proxy": httpx.ProxyError("502"),
}
del RETRIED["not gzip"]  # respx cannot make one; the drip's simulator could not either


@pytest.mark.parametrize("answer", RETRIED.values(), ids=RETRIED)
def test_what_is_retried(
    web: respx.Router, http: Http, clock: FakeClock, answer: httpx.Response | Exception
) -> None:
    """Trouble that may pass is met with another try, exponentially later each time."""
    route = web.get(path="/v1/batches/batch_a").mock(side_effect=answers(answer, answer, ok()))
    assert run(openai(http).batch("batch_a")).status == "in_progress"
    assert route.call_count == 3
    first, second = clock.sleeps
    assert 0.5 <= first <= 1
    assert 1 <= second <= 1.5


@pytest.mark.parametrize("answer", RETRIED.values(), ids=RETRIED)
def test_retries_end(
    web: respx.Router, http: Http, clock: FakeClock, answer: httpx.Response | Exception
) -> None:
    """After four tries the error is handed back, retryable, in one line, without the key."""
    route = web.get(path="/v1/batches/batch_a").mock(side_effect=answers(answer))
    error = failing(openai(http).batch("batch_a"))
    assert route.call_count == 4
    assert error.retryable
    assert len(str(error).splitlines()) == 1
    assert KEY not in str(error)
    assert sum(clock.sleeps) < 20


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 405, 410, 418, 422, 451, 499])
def test_what_is_not_retried(web: respx.Router, http: Http, clock: FakeClock, code: int) -> None:
    """Any other 4xx is a fact: one request, and the server's own words."""
    body = {"error": {"message": "Not like\nthis", "code": "x"}}
    headers = {"x-request-id": "req_1", "retry-after": "5"}
    answer = httpx.Response(code, json=body, headers=headers)
    route = web.get(path="/v1/batches/batch_a").mock(return_value=answer)
    error = failing(openai(http).batch("batch_a"))
    assert str(error).startswith(f"OpenAI answered {code}: Not like this")
    assert (error.status, error.retryable, error.request_id) == (code, False, "req_1")
    assert (route.call_count, clock.sleeps) == (1, [])


def test_a_404_names_both_causes(web: respx.Router, http: Http) -> None:
    """The batch is gone, or the key is another project's: the API does not tell which."""
    body = {"error": {"message": "No such batch"}}
    web.get(path="/v1/batches/batch_a").mock(return_value=httpx.Response(404, json=body))
    assert str(failing(openai(http).batch("batch_a"))) == (
        "OpenAI answered 404: No such batch: the batch was deleted, or the key belongs to"
        " another OpenAI project"
    )


def test_an_echoed_key_is_masked(web: respx.Router, http: Http) -> None:
    """A server that repeats the key in its error does not bring it into ours."""
    body = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    web.get(path="/v1/batches/batch_a").mock(return_value=httpx.Response(401, json=body))
    message = str(failing(openai(http).batch("batch_a")))
    assert message == "OpenAI answered 401: Incorrect API key provided: ***"


def test_an_echoed_key_is_masked_in_headers(web: respx.Router, http: Http) -> None:
    """The request's id is kept, but not where it is no such thing."""
    answer = httpx.Response(401, headers={"x-request-id": f"req_{KEY}"})
    web.get(path="/v1/batches/batch_a").mock(return_value=answer)
    assert failing(openai(http).batch("batch_a")).request_id == "req_***"


def http_date(after_s: float) -> str:
    return format_datetime(NOON + timedelta(seconds=after_s), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after-ms": "70"}, 0.07),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "10"}, 10),
        ({"retry-after-ms": "70", "retry-after": "3"}, 0.07),
        ({"retry-after": http_date(4)}, 4),
        ({"retry-after": http_date(904), "date": http_date(900)}, 4),
        ({"retry-after": "0"}, 0),
        ({"retry-after": http_date(-60)}, 0),
    ],
)
@pytest.mark.parametrize("code", [429, 503])
def test_the_server_says_when(
    web: respx.Router,
    http: Http,
    clock: FakeClock,
    *,
    code: int,
    headers: dict[str, str],
    wait_s: float,
) -> None:
    """Milliseconds, seconds, or a date by the server's own clock: the next try comes then."""
    answer = httpx.Response(code, headers=headers)
    web.get(path="/v1/batches/batch_a").mock(side_effect=answers(answer, ok()))
    run(openai(http).batch("batch_a"))
    assert clock.now == pytest.approx(wait_s)


@pytest.mark.parametrize("wait", ["11", "3600", "1e3", http_date(86_400)])
def test_a_long_wait_is_left_to_the_next_look(
    web: respx.Router, http: Http, clock: FakeClock, wait: str
) -> None:
    """What takes over ten seconds is not waited for here: the error tells how long it is."""
    answer = httpx.Response(503, headers={"retry-after": wait})
    route = web.get(path="/v1/batches/batch_a").mock(return_value=answer)
    error = failing(openai(http).batch("batch_a"))
    if wait == "1e3":  # no form of the header: our own waits
        assert (error.retry_after_s, route.call_count) == (None, 4)
    else:
        assert (error.retry_after_s or 0) > 10
        assert (route.call_count, clock.sleeps) == (1, [])


def test_a_request_has_a_minute_with_all_its_retries(
    web: respx.Router, http: Http, clock: FakeClock
) -> None:
    """Slow failures use the budget up before the number of tries does."""

    def slow(_: httpx.Request) -> httpx.Response:
        clock.now += 25
        return httpx.Response(503)

    route = web.get(path="/v1/batches/batch_a").mock(side_effect=slow)
    failing(openai(http).batch("batch_a"))
    assert route.call_count == 3
    assert clock.now <= 80


def test_waiting_in_the_queue_costs_no_budget(
    web: respx.Router, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits long for a place has a whole minute still when it gets one."""
    http = new_http(clock, max_concurrency=1)
    web.get(path__startswith="/v1/batches/").mock(side_effect=lambda _: ok())
    timeouts: list[float | None] = []
    timeout = asyncio.timeout

    def noting(delay: float | None) -> asyncio.Timeout:
        timeouts.append(delay)
        return timeout(delay)

    monkeypatch.setattr(asyncio, "timeout", noting)

    async def scenario() -> Batch:
        client = openai(http)
        async with http.gate:
            waiting = asyncio.create_task(client.batch("batch_a"))
            await settle()
            clock.now += 500
        return await waiting

    assert run(scenario()).status == "in_progress"
    assert timeouts == [30]


def test_cancellation_is_no_failure_to_retry(web: respx.Router, http: Http) -> None:
    """A cancelled request ends at once, and gives its places back."""

    async def scenario() -> None:
        reached = asyncio.Event()

        async def never(_: httpx.Request) -> httpx.Response:
            assert not reached.is_set()
            reached.set()
            await asyncio.Event().wait()
            return ok()

        web.get(path="/v1/batches/batch_a").mock(side_effect=never)
        client = openai(http)
        task = asyncio.create_task(client.batch("batch_a"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert http.gate._inside == client._gate._inside == client._in_flight == 0

    run(scenario())


def test_a_redirect_is_not_followed(web: respx.Router, http: Http) -> None:
    """The key stays with the host that it was made for."""
    thief = web.route(host="thief.example").mock(return_value=ok())
    answer = httpx.Response(307, headers={"location": "https://thief.example/batches/batch_a"})
    web.get(path="/v1/batches/batch_a").mock(return_value=answer)
    assert failing(openai(http).batch("batch_a")).status == 307
    assert not thief.called


# ---- OpenAI: an account as a whole ----


def counted(web: respx.Router, answer: Callable[[httpx.Request], httpx.Response]) -> respx.Route:
    return web.get(path__startswith="/v1/batches/").mock(side_effect=answer)


def echo(request: httpx.Request) -> httpx.Response:
    return ok(id=request.url.path.rpartition("/")[2])


def test_a_long_429_holds_the_account_and_no_other(
    web: respx.Router, http: Http, clock: FakeClock
) -> None:
    """For that key nothing is sent until the time has come; another key goes on."""
    limited = True

    def answer(request: httpx.Request) -> httpx.Response:
        if limited and request.headers["authorization"] == f"Bearer {KEY}":
            return httpx.Response(429, headers={"retry-after": "100"})
        return echo(request)

    async def scenario() -> None:
        nonlocal limited
        route = counted(web, answer)
        client, other = openai(http), openai(http, "sk-other")
        for batch_id, wait_s in (("batch_a", 100), ("batch_b", 100), ("batch_c", 40)):
            if batch_id == "batch_c":
                clock.now += 60
            with pytest.raises(ApiError) as caught:
                await client.batch(batch_id)
            assert (caught.value.status, caught.value.retry_after_s) == (429, wait_s)
        assert route.call_count == 1
        await other.batch("batch_a")
        limited = False
        clock.now += 35
        await client.batch("batch_d")  # five seconds are waited for
        assert clock.now == 100

    run(scenario())


def test_no_429_holds_an_account_for_more_than_an_hour(
    web: respx.Router, http: Http, clock: FakeClock
) -> None:
    """A server that asks for days is asked again after an hour."""
    answers_ = answers(httpx.Response(429, headers={"retry-after": "999999"}), ok())
    web.get(path="/v1/batches/batch_a").mock(side_effect=answers_)

    async def scenario() -> None:
        client = openai(http)
        with pytest.raises(ApiError):
            await client.batch("batch_a")
        clock.now += 3599.0
        await client.batch("batch_a")
        assert clock.now == 3600

    run(scenario())


def test_a_held_account_tells_what_it_is_held_for(
    web: respx.Router, http: Http, clock: FakeClock
) -> None:
    """A batch that waits for a 429 must not show that another batch was deleted."""

    async def scenario() -> None:
        held, gone = asyncio.Event(), asyncio.Event()

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("batch_gone"):
                gone.set()
                await held.wait()
                return httpx.Response(404)
            return httpx.Response(429, headers={"retry-after": "100"})

        web.get(path__startswith="/v1/batches/").mock(side_effect=answer)
        client = openai(http)
        slow = asyncio.create_task(client.batch("batch_gone"))
        await gone.wait()
        with pytest.raises(ApiError):
            await client.batch("batch_a")
        held.set()
        with pytest.raises(ApiError, match="404"):
            await slow
        with pytest.raises(ApiError) as caught:
            await client.batch("batch_b")
        assert caught.value.status == 429
        assert clock.sleeps == []

    run(scenario())


def test_a_silent_account_is_asked_one_request_at_a_time(web: respx.Router, http: Http) -> None:
    """After five requests without an answer, one finds out; the others do not wait for it."""

    async def scenario() -> None:
        release, alive, asked = asyncio.Event(), False, 0

        async def answer(request: httpx.Request) -> httpx.Response:
            nonlocal asked
            asked += 1
            if not alive:
                await release.wait()
                raise httpx.ReadTimeout("silence")
            return echo(request)

        web.get(path__startswith="/v1/batches/").mock(side_effect=answer)
        client = openai(http)
        first = [asyncio.create_task(client.batch(f"batch_{n}")) for n in range(5)]
        await settle()
        assert asked == 5
        release.set()
        results = await asyncio.gather(*first, return_exceptions=True)
        assert all(isinstance(result, ApiError) for result in results)
        release.clear()
        before = asked
        scout = asyncio.create_task(client.batch("batch_scout"))
        await settle()
        assert asked == before + 1
        for n in range(3):
            with pytest.raises(ApiError, match="silence"):
                await client.batch(f"batch_{n}")
        assert asked == before + 1
        alive = True
        release.set()
        with contextlib.suppress(ApiError):
            await scout
        await client.batch("batch_scout")
        release.clear()
        after = asked
        await asyncio.gather(*(client.batch(f"batch_{n}") for n in range(8)))
        assert asked == after + 8

    run(asyncio.wait_for(scenario(), 10))


def test_answers_of_any_kind_are_no_silence(web: respx.Router, http: Http) -> None:
    """An account that answers 500 to everything is alive: all of its batches are asked for."""
    route = counted(web, lambda _: httpx.Response(500))

    async def scenario() -> None:
        client = openai(http)
        looks = (client.batch(f"batch_{n}") for n in range(9))
        await asyncio.gather(*looks, return_exceptions=True)

    run(scenario())
    assert route.call_count == 9 * 4


# ---- OpenAI: what a batch is ----


def parsed(**changes: object) -> Batch:
    return tc.parse_batch({"id": "batch_a", "status": "in_progress", **changes}, "batch_a")


def test_a_whole_batch_is_read() -> None:
    """Counts, files, times and the first error are taken from where OpenAI puts them."""
    batch = parsed(
        status="failed",
        request_counts={"total": 100, "completed": 98, "failed": 2},
        output_file_id="file-1",
        error_file_id="file-2",
        created_at=1_700_000_000,
        failed_at=1_700_000_600,
        completed_at=1_700_000_700,
        errors={"object": "list", "data": [{"message": "line 1: bad"}, {"message": "line 2"}]},
    )
    files = ("file-1", "file-2")
    times = (1_700_000_000.0, 1_700_000_600.0)
    assert batch == Batch("batch_a", "failed", 100, 98, 2, *files, *times, "line 1: bad")


@pytest.mark.parametrize("status", tc.TERMINAL)
def test_the_end_is_the_time_of_that_status(status: str) -> None:
    """Each end has a time of its own; while a batch goes on, it has none."""
    times = {f"{name}_at": 1_700_000_000 + n for n, name in enumerate(sorted(tc.TERMINAL))}
    assert parsed(status=status, **times).ended_at == times[f"{status}_at"]
    assert parsed(status=status.upper(), **times).ended_at == times[f"{status}_at"]
    assert parsed(status="finalizing", **times).ended_at is None


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("COMPLETED", "completed"),
        ("In_Progress", "in_progress"),
        ("  expired\n", "expired"),
        ("queued-somewhere", "queued-somewhere"),
        ("a\nb\ud800\x1b[31m", "a b [31m"),
        ("x" * 500, "x" * 63 + "…"),
    ],
)
def test_statuses_are_compared_in_lower_case(written: str, expected: str) -> None:
    """A status is one clean line; one that nobody knows is kept as it came."""
    assert parsed(status=written).status == expected


NONSENSE: tuple[object, ...] = (
    None,
    True,
    [],
    {},
    [1],
    {"a": 1},
    -1,
    "",
    float("nan"),
    float("inf"),
    10**400,
    1e300,
)


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_nonsense_is_nothing(value: object) -> None:
    """A field of a wrong type or size is left out: it does not hide the status."""
    everything = dict.fromkeys(
        ("output_file_id", "error_file_id", "created_at", "completed_at", "errors"), value
    )
    counts = dict.fromkeys(("total", "completed", "failed"), value)
    for request_counts in (value, counts):
        batch = parsed(status="completed", request_counts=request_counts, **everything)
        assert batch == Batch("batch_a", "completed")


@pytest.mark.parametrize(
    ("value", "expected"), [(1.9, 1), (0, 0), (10**14, 10**14), (1e15, None), ("5", None)]
)
def test_counts(value: object, expected: int | None) -> None:
    """Numbers that a count can have are taken, and the state file can hold them."""
    assert parsed(request_counts={"total": value}).total == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_700_000_000, 1.7e9),
        (1_700_000_000.7, 1.7e9),
        (0, None),
        (1_700_000_000_000, None),  # milliseconds
        ("2026-11-23T12:00:00Z", None),
    ],
)
def test_times(value: object, expected: float | None) -> None:
    """Unix seconds of this age are taken; what is something else would mislead the search."""
    assert parsed(created_at=value).created_at == expected


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({"data": [{"message": "a\nb"}]}, "a b"),
        ([{"message": "a"}, {"message": "b"}], "a"),
        ({"data": [{"message": None}]}, None),
        ({"data": ["text"]}, None),
        (["text"], None),
        ({"data": {"message": "a"}}, None),
        ({"data": []}, None),
        ("text", None),
    ],
)
def test_errors_in_both_forms(errors: object, expected: str | None) -> None:
    """OpenAI wraps them into an object, others write a plain list."""
    assert parsed(errors=errors).error == expected


@pytest.mark.parametrize("name", ["output_file_id", "error_file_id"])
def test_an_id_is_never_cut(name: str) -> None:
    """Another id would be another file: one beyond all measure is an error."""
    with pytest.raises(ValueError, match="has an id of over 4,096 characters"):
        parsed(**{name: "x" * 4097})
    assert getattr(parsed(**{name: "x" * 4096}), name) == "x" * 4096


def test_ids_are_one_line_of_valid_unicode() -> None:
    """What cannot be stored or printed does not come in with a file's id."""
    batch = parsed(output_file_id="file-1\nfile-2", error_file_id="file-\ud800\x00x")
    assert (batch.output_file_id, batch.error_file_id) == ("file-1 file-2", "file- x")
    for text in (batch.output_file_id, batch.error_file_id):
        assert (text or "").encode()


def test_a_keboola_jobs_id_is_never_cut() -> None:
    """Following it, and the link to it, need all of it."""
    assert tc.parse_keboola_job({"id": "7" * 4096}).id == "7" * 4096
    with pytest.raises(ValueError, match="has an id"):
        tc.parse_keboola_job({"id": "7" * 4097})


def test_an_absent_id_is_no_other_one() -> None:
    """An endpoint that leaves the id out is believed that it answers what it was asked."""
    assert tc.parse_batch({"status": "completed"}, "batch_a").id == "batch_a"


def test_a_null_id_is_no_other_one() -> None:
    """Some endpoints write null for what they leave out."""
    assert parsed(id=None).id == "batch_a"


@pytest.mark.parametrize("data", [None, [], "x", 5, {}, {"status": 5}, {"status": " \n"}])
def test_what_is_no_batch(data: object) -> None:
    """Without a readable status there is nothing to go by."""
    with pytest.raises(ValueError, match=r"is not an object|has no status"):
        tc.parse_batch(data, "batch_a")


# ---- retry-after ----


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        *[
            ({"retry-after": text}, None)
            for text in (
                *("", " ", "soon", "-5", "+5", "1e3", "1.2.3", ".", "...", "inf", "nan", "0x10"),
                *(
                    "9" * 400,
                    "\u0665",
                    "Wed, 99 Foo 2026 99:99:99 GMT",
                    "Mon, 01 Jan 99999 00:00 GMT",
                ),
                *("5 seconds", "\x00", "Wed,", ",", "12:00", "null", "{}"),
            )
        ],
        *[({"retry-after-ms": text}, None) for text in ("", "x", "nan", "inf", "1e999")],
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after": "7."}, 7.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "-5"}, None),
        ({"retry-after": http_date(0)}, 0.0),
        ({"retry-after": http_date(90)}, 90.0),
        ({"retry-after": http_date(90), "date": "nonsense"}, 90.0),
        ({"retry-after": http_date(90), "date": http_date(80)}, 10.0),
        ({"retry-after": http_date(90), "date": http_date(99)}, 0.0),
        ({"retry-after": "Mon, 23 Nov 2026 14:00:30 +0200"}, 30.0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 -2359"}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], expected: float | None) -> None:
    """All forms are understood, and nonsense is as if nothing was said."""
    far = headers.get("retry-after", "").startswith("Fri, 31 Dec 9999")
    found = tc.retry_after_s(httpx.Headers(headers, encoding="utf-8"), NOON.timestamp())
    assert found == expected or (far and (found or 0) > 1e11)


def test_no_header_breaks_the_reading() -> None:
    """Random headers, also made of pieces of real ones, give a wait or None and never raise."""
    dice = random.Random(5)  # noqa: S311 - the same dice every time
    pieces = ["Mon", "23", "Nov", "2026", "14:00:30", "GMT", "+0200", ",", " ", "-", ":", "9" * 12]
    for _ in range(20_000):
        names = ("retry-after", "retry-after-ms", "date")
        headers = {
            name: "".join(dice.choices(pieces, k=dice.randrange(9)))
            for name in names
            if dice.random() < 0.6
        }
        wait_s = tc.retry_after_s(headers, NOON.timestamp())
        assert wait_s is None or 0 <= wait_s < float("inf")


def test_an_unreadable_header_does_not_hide_the_other() -> None:
    """Where the milliseconds are nonsense, the seconds count."""
    assert tc.retry_after_s({"retry-after-ms": "soon", "retry-after": "5"}, 0) == 5


# ---- one request ----


def get(http: Http, url: str) -> Coroutine[Any, Any, tc.Answer]:
    return http.get(url, {}, budget=tc.Budget(http.clock))


def test_the_body_is_capped_while_it_streams(
    web: respx.Router, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless answer is cut off; it is not read to its end first."""
    monkeypatch.setattr(tc, "MAX_BODY_BYTES", 10_000)
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < 10**7:
                sent += 1000
                yield b" " * 1000

    web.get(f"{OPENAI}/x").mock(side_effect=lambda _: httpx.Response(200, stream=Endless()))
    error = failing(get(http, f"{OPENAI}/x"))
    assert (str(error), error.retryable) == ("the answer is over 16 MiB", True)
    assert isinstance(error, tc.TooLargeError)
    assert sent <= 20_000


def test_a_body_at_the_cap_is_read(
    web: respx.Router, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cap is what is allowed, and not one byte less."""
    monkeypatch.setattr(tc, "MAX_BODY_BYTES", 10_000)
    web.get(f"{OPENAI}/x").mock(return_value=httpx.Response(200, content=b"x" * 10_000))
    assert len(run(get(http, f"{OPENAI}/x")).body) == 10_000


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        simulator.add_key(KEY)
        simulator.add_token(TOKEN)
        simulator.add_batch("batch_a")
        yield simulator


def impatient(timeout_s: float = 0.3) -> Http:
    return new_http(tc.SystemClock(), request_timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("kind", "options"), [("drip", {"interval": 0.02}), ("hang_before", {}), ("hang_after", {})]
)
def test_a_request_has_a_deadline_as_a_whole(
    sim: Simulator, kind: str, options: dict[str, Any]
) -> None:
    """Neither silence nor a drip of bytes holds a request for longer than its time."""
    sim.fault("openai.get", kind, None, **options)

    async def scenario() -> float:
        http, loop = impatient(), asyncio.get_running_loop()
        started = loop.time()
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{sim.openai_url}/batches/batch_a"
        with pytest.raises(ApiError, match="no whole answer within") as caught:
            await http.get(url, headers, budget=tc.Budget(http.clock))
        assert caught.value.retryable
        elapsed = loop.time() - started
        await http.close()
        return elapsed

    assert 0.25 < run(scenario()) < 2


@contextlib.asynccontextmanager
async def asking(
    http: Http, serve: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[str]:
    """The address of a server for one client; it answers each request, on any connection."""
    tasks: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await serve(writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(handle(reader, writer)))

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as listening:
        try:
            yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        finally:
            await http.close()  # which ends the connections
            await asyncio.gather(*tasks)


def test_a_drip_does_not_put_the_deadline_off() -> None:
    """A byte now and then is an answer that goes on, and yet ends with the request's time."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}":
            writer.write(bytes([byte]))
            await writer.drain()
            await real_sleep(0.04)

    async def scenario() -> None:
        async with asking(http := impatient(), drip) as url:
            with pytest.raises(ApiError, match="no whole answer within"):
                await get(http, url)

    run(scenario())


def test_each_post_has_a_connection_of_its_own() -> None:
    """A kept connection may be at its end, which looks like a lost answer."""
    connections = set[asyncio.StreamWriter]()

    async def answer(writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async def scenario() -> None:
        async with asking(http := impatient(5), answer) as url:
            for _ in range(2):
                await get(http, url)
            assert len(connections) == 1
            for _ in range(2):
                assert (await http.post(url, {}, "")).status == 200

    run(scenario())
    assert len(connections) == 3


def test_a_bomb_is_not_expanded_first(
    web: respx.Router, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is over the cap is never in memory, however small it came."""
    monkeypatch.setattr(tc, "MAX_BODY_BYTES", 10_000)
    bomb = gzip.compress(bytes(20_000_000))

    class OneChunk(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield bomb

    answer = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=OneChunk())
    web.get(f"{OPENAI}/x").mock(side_effect=lambda _: answer)
    tracemalloc.start()
    try:
        assert str(failing(get(http, f"{OPENAI}/x"))) == "the answer is over 16 MiB"
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_compressed_answer_that_is_none(sim: Simulator) -> None:
    """A body that cannot be decoded is an error to retry, no crash."""
    sim.fault("openai.get", "header", None, headers={"content-encoding": "gzip"})

    async def scenario() -> None:
        http = impatient(5)
        url = f"{sim.openai_url}/batches/batch_a"
        with pytest.raises(ApiError, match="incorrect header check") as caught:
            await http.get(url, {}, budget=tc.Budget(http.clock))
        assert caught.value.retryable
        await http.close()

    run(scenario())


# ---- Keboola: the queue's address ----


@pytest.mark.parametrize(
    ("stack", "queue"),
    [
        (STACK, QUEUE),
        (
            "https://connection.eu-central-1.keboola.com",
            "https://queue.eu-central-1.keboola.com",
        ),
        ("https://CONNECTION.North.keboola.com", "https://queue.north.keboola.com"),
        ("https://connection.x.example:8443", "https://queue.x.example:8443"),
    ],
)
def test_a_queue_by_its_stacks_name(web: respx.Router, http: Http, stack: str, queue: str) -> None:
    """`connection.X` has its queue at `queue.X`; nobody is asked."""
    assert run(keboola(http, stack).queue_url()) == queue
    assert not web.calls


def index(*services: object) -> httpx.Response:
    return httpx.Response(200, json={"services": [*services]})


def test_a_queue_by_the_stacks_index(web: respx.Router, http: Http) -> None:
    """Any other host is asked, once, without the token, and the answer is shared."""
    services = [{"id": "import", "url": "https://i"}, 5, {"id": "queue", "url": "https://q.x/"}]
    route = web.get(f"{OWN_STACK}/v2/storage").mock(return_value=index(*services))
    learned = tc.Learned()
    for _ in range(2):
        assert run(keboola(http, OWN_STACK, learned).queue_url()) == "https://q.x"
    assert route.call_count == 1
    assert "x-storageapi-token" not in route.calls[0].request.headers
    assert learned.queue_urls == {OWN_STACK: "https://q.x"}


@pytest.mark.parametrize(
    "url",
    [
        "http://q.example",
        "http://127.0.0.1:9",
        "https://127.0.0.1:9",
        "https://localhost",
        "https://[::1]:9",
        "https://user@q.example",
        "https://q.example/?a=1",
        "ftp://q.example",
        "//q.example",
        "",
        None,
        5,
    ],
)
def test_a_queue_that_is_refused(web: respx.Router, http: Http, url: object) -> None:
    """The token goes nowhere but over https, and not to this machine unless the stack is here."""
    web.get(f"{OWN_STACK}/v2/storage").mock(return_value=index({"id": "queue", "url": url}))
    learned = tc.Learned()
    error = failing(keboola(http, OWN_STACK, learned).queue_url())
    assert str(error) == f"{OWN_STACK}/v2/storage lists no usable https address of the queue"
    assert learned.queue_urls == {}


def test_a_queue_that_is_no_address(web: respx.Router, http: Http) -> None:
    """An address that cannot even be parsed is refused like any other bad one."""
    bad = index({"id": "queue", "url": "https://[x"})
    web.get(f"{OWN_STACK}/v2/storage").mock(return_value=bad)
    assert "no usable https address" in str(failing(keboola(http, OWN_STACK).queue_url()))


@pytest.mark.parametrize("verb", ["search", "create"])
def test_an_address_that_httpx_refuses(web: respx.Router, http: Http, verb: str) -> None:
    """What httpx takes for no address is an error of the request, which was certainly not sent."""
    bad = index({"id": "queue", "url": "https://xn--a.example"})
    web.get(f"{OWN_STACK}/v2/storage").mock(return_value=bad)
    client = keboola(http, OWN_STACK)
    error = failing(client.create("{}") if verb == "create" else client.search(TARGET, None, "t"))
    assert not error.sent


@pytest.mark.parametrize(
    "body", [None, [], "x", {}, {"services": None}, {"services": {"id": "queue"}}]
)
def test_an_index_that_is_none(web: respx.Router, http: Http, body: object) -> None:
    """An index without a list of services names no queue."""
    web.get(f"{OWN_STACK}/v2/storage").mock(return_value=httpx.Response(200, text=json.dumps(body)))
    assert "no usable https address" in str(failing(keboola(http, OWN_STACK).queue_url()))


def test_a_local_stack_may_have_a_local_queue(web: respx.Router, http: Http) -> None:
    """On loopback plain http is allowed, from a stack that is on loopback itself."""
    local = "http://127.0.0.1:5"
    url = "http://localhost:6"
    web.get(f"{local}/v2/storage").mock(return_value=index({"id": "queue", "url": url}))
    assert run(keboola(http, local).queue_url()) == url


# ---- Keboola: the POST ----

CREATED = {"id": "42", "status": "created", "url": "https://x/42", "createdTime": NOON.isoformat()}


def test_what_keboola_is_sent(web: respx.Router, http: Http) -> None:
    """The body is the stored payload, byte by byte, with the token in Keboola's own header."""
    route = web.post(f"{QUEUE}/jobs").mock(return_value=httpx.Response(201, json=CREATED))
    job = run(keboola(http).create('{"component":"c"}'))
    assert job == KeboolaJob("42", "created", "https://x/42", NOON, None)
    request = route.calls[0].request
    assert request.content == b'{"component":"c"}'
    assert request.headers["x-storageapi-token"] == TOKEN
    assert request.headers["content-type"] == "application/json"
    assert "authorization" not in request.headers


def state_after(error: ApiError) -> TriggerState:
    sending = tc.Trigger("t", 0, TriggerState.SENDING, TARGET, "k", "{}", "b", 0.0)
    return tc.after_failed_post(sending, error, grace_s=60, now=tc.Moment(0), jitter=0).state


INTENT, REJECTED, UNKNOWN = TriggerState.INTENT, TriggerState.REJECTED, TriggerState.UNKNOWN


@pytest.mark.parametrize(
    ("failure", "is_started", "expected"),
    [
        (httpx.ConnectError("refused"), False, INTENT),
        (httpx.ConnectTimeout("slow"), False, INTENT),
        (httpx.PoolTimeout("full"), False, INTENT),
        (httpx.ProxyError("no proxy"), False, INTENT),
        (httpx.ReadError("reset"), True, UNKNOWN),
        (httpx.WriteError("reset"), True, UNKNOWN),
        (httpx.RemoteProtocolError("gone"), True, UNKNOWN),
        (httpx.ProxyError("502"), True, UNKNOWN),
        (httpx.DecodingError("gzip"), True, UNKNOWN),
        (httpx.ConnectError("odd, but after the first byte"), True, UNKNOWN),
    ],
    ids=repr,
)
def test_a_post_that_brings_no_answer(
    web: respx.Router, http: Http, failure: Exception, *, is_started: bool, expected: TriggerState
) -> None:
    """One attempt; whether the first byte of a request went out decides what is known."""

    async def answer(request: httpx.Request) -> httpx.Response:
        if is_started:
            await request.extensions["trace"]("http11.send_request_headers.started", {})
        raise failure

    route = web.post(f"{QUEUE}/jobs").mock(side_effect=answer)
    error = failing(keboola(http).create("{}"))
    assert error.sent is is_started
    assert state_after(error) is expected
    assert route.call_count == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *[(httpx.Response(code), REJECTED) for code in (400, 401, 403, 404, 409, 413, 422, 423)],
        (httpx.Response(429, headers={"retry-after": "5"}), UNKNOWN),
        *[(httpx.Response(code), UNKNOWN) for code in (302, 307, 408, 500, 502, 503, 504)],
        (httpx.Response(201, text="created"), UNKNOWN),
        (httpx.Response(201), UNKNOWN),
        (httpx.Response(201, json={"id": None}), UNKNOWN),
        (httpx.Response(201, json={"id": True}), UNKNOWN),
        (httpx.Response(201, json={"id": " "}), UNKNOWN),
        (httpx.Response(201, json=[CREATED]), UNKNOWN),
        (httpx.Response(200, text="[" * 100_000), UNKNOWN),
        (httpx.Response(204), UNKNOWN),
    ],
    ids=repr,
)
def test_a_post_that_brings_another_answer(
    web: respx.Router, http: Http, answer: httpx.Response, expected: TriggerState
) -> None:
    """Rejected, not sent or unknown; a 2xx without a readable id is no success, and no failure."""
    route = web.post(f"{QUEUE}/jobs").mock(return_value=answer)
    error = failing(keboola(http).create("{}"))
    assert state_after(error) is expected
    assert error.sent
    assert route.call_count == 1


def test_keboolas_own_words_and_its_exception_id(web: respx.Router, http: Http) -> None:
    """The message and the id that Keboola's support asks for are kept."""
    body = {"error": "Config not\nfound", "code": 404, "exceptionId": "exc-1"}
    web.post(f"{QUEUE}/jobs").mock(return_value=httpx.Response(404, json=body))
    error = failing(keboola(http).create("{}"))
    assert str(error) == "Keboola answered 404: Config not found (exceptionId exc-1)"


def test_a_post_without_a_queue_is_not_sent(web: respx.Router, http: Http) -> None:
    """Where the queue's address cannot be found out, nothing was sent, whatever the status."""
    web.get(f"{OWN_STACK}/v2/storage").mock(return_value=httpx.Response(403))
    error = failing(keboola(http, OWN_STACK).create("{}"))
    assert not error.sent
    assert state_after(error) is INTENT


@pytest.mark.parametrize(
    ("kind", "options", "jobs", "expected"),
    [
        ("reset_before", {}, 0, UNKNOWN),
        ("reset_after", {}, 1, UNKNOWN),
        ("close_after", {}, 1, UNKNOWN),
        ("truncated", {}, 1, UNKNOWN),
        ("hang_before", {}, 0, UNKNOWN),
        ("hang_after", {}, 1, UNKNOWN),
        ("drip", {"interval": 0.05}, 1, UNKNOWN),
        ("body", {"body": "<html>"}, 1, UNKNOWN),
        ("redirect", {"code": 307}, 0, UNKNOWN),
        ("status", {"code": 502, "handled": True}, 1, UNKNOWN),
        ("status", {"code": 503}, 0, UNKNOWN),
        ("status", {"code": 429}, 0, UNKNOWN),
        ("status", {"code": 429, "handled": True}, 1, UNKNOWN),
        ("status", {"code": 422}, 0, REJECTED),
    ],
)
def test_what_a_post_comes_to_over_a_socket(
    sim: Simulator, kind: str, options: dict[str, Any], jobs: int, expected: TriggerState
) -> None:
    """Nothing that Keboola may have carried out counts as not sent."""
    sim.fault("queue.create", kind, None, **options)
    body = json.dumps({"component": "app", "config": "1", "mode": "run"})

    async def scenario() -> ApiError:
        http = impatient()
        with pytest.raises(ApiError) as caught:
            await keboola(http, sim.stack_url).create(body)
        await http.close()
        return caught.value

    error = run(scenario())
    assert state_after(error) is expected
    assert len(sim.jobs) == jobs
    assert sim.request_counts["queue.create"] == 1


@contextlib.contextmanager
def no_server(answer: bytes | None) -> Iterator[int]:
    """A port where nobody listens (None), or where each connection gets bytes and its end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        if answer is None:
            listener.close()
            yield port
            return

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65_536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield port
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("scheme", "answer"),
    [("http", None), ("https", None), ("https", b"HTTP/1.1 400 Bad\r\n\r\n"), ("https", b"")],
)
def test_a_connection_that_is_not_made_sends_nothing(scheme: str, answer: bytes | None) -> None:
    """A refused connection and a TLS handshake that fails are certainly not sent."""
    stack = "http://127.0.0.1:1"

    async def scenario(port: int) -> ApiError:
        http = impatient(5)
        learned = tc.Learned(queue_urls={stack: f"{scheme}://127.0.0.1:{port}"})
        with pytest.raises(ApiError) as caught:
            await keboola(http, stack, learned).create("{}")
        await http.close()
        return caught.value

    with no_server(answer) as port:
        error = run(scenario(port))
    assert not error.sent
    assert state_after(error) is INTENT


def test_a_post_cancelled_on_its_way_is_cancelled(web: respx.Router, http: Http) -> None:
    """Cancellation comes through the POST, and gives the place back."""

    async def scenario() -> None:
        reached = asyncio.Event()

        async def never(_: httpx.Request) -> httpx.Response:
            reached.set()
            await asyncio.Event().wait()
            return httpx.Response(500)

        web.post(f"{QUEUE}/jobs").mock(side_effect=never)
        task = asyncio.create_task(keboola(http).create("{}"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert http.gate._inside == 0

    run(scenario())


# ---- Keboola: the search ----


class Rows:
    """Keboola's job search in memory, and what it can do wrong."""

    def __init__(self, web: respx.Router) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.cap = 10**9
        self.ignores_until = self.hides_variables = self.is_shuffled = False
        self.searches: list[httpx.URL] = []
        self.reads: list[str] = []
        self.fails_after = 10**9
        self.unreadable: set[str] = set()
        self.refusal = 404
        self.knows_offset = False
        web.get(f"{QUEUE}/search/jobs").mock(side_effect=self._search)
        web.get(path__regex=r"^/jobs/").mock(side_effect=self._read)

    def add(self, count: int, trigger: str = "theirs", *, step_s: float = 1.0) -> None:
        """Add jobs, each one newer than those before."""
        for _ in range(count):
            number = len(self.jobs)
            created = NOON + timedelta(seconds=number * step_s)
            self.jobs.append(keboola_row(str(1000 + number), created, trigger))

    def _search(self, request: httpx.Request) -> httpx.Response:
        self.searches.append(request.url)
        if len(self.searches) > self.fails_after:
            return httpx.Response(403)
        params = request.url.params
        rows = sorted(self.jobs, key=lambda row: row["createdTime"], reverse=True)
        if "createdTimeFrom" in params:
            rows = [r for r in rows if moment(r) >= iso(params["createdTimeFrom"])]
        if "createdTimeTo" in params and not self.ignores_until:
            rows = [r for r in rows if moment(r) <= iso(params["createdTimeTo"])]
        if self.is_shuffled:
            random.Random(1).shuffle(rows)  # noqa: S311 - the same dice every time
        if self.knows_offset:
            rows = rows[int(params.get("offset", 0)) :]
        rows = rows[: min(int(params["limit"]), self.cap)]
        hidden = {"variableValuesData"} if self.hides_variables else set()
        return httpx.Response(200, json=[without(row, hidden) for row in rows])

    async def _read(self, request: httpx.Request) -> httpx.Response:
        job_id = request.url.path.rpartition("/")[2]
        self.reads.append(job_id)
        await asyncio.sleep(0.01)  # so that others can be asked for meanwhile
        if job_id in self.unreadable:
            return httpx.Response(self.refusal)
        return httpx.Response(200, json=next(row for row in self.jobs if row["id"] == job_id))


def keboola_row(job_id: str, created: datetime, trigger: str) -> dict[str, Any]:
    values = [{"name": "a", "value": "b"}, {"name": tc.TRIGGER_ID_VARIABLE, "value": trigger}]
    return {
        "id": job_id,
        "status": "created",
        "createdTime": created.isoformat(),
        "variableValuesData": {"values": values},
    }


def without(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def iso(text: str) -> datetime:
    return datetime.fromisoformat(text)


def moment(row: dict[str, Any]) -> datetime:
    return iso(row["createdTime"])


@pytest.fixture
def rows(web: respx.Router, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """A search whose pages have five rows."""
    monkeypatch.setattr(tc, "SEARCH_LIMIT", 5)
    return Rows(web)


def search(http: Http, trigger: str = "ours", since: float | None = None) -> list[str]:
    return [job.id for job in run(keboola(http).search(TARGET, since, trigger))]


def test_what_the_search_asks_for(web: respx.Router, http: Http) -> None:
    """Component and configuration, no branch; newest first, 500 a page; a bound only if known."""
    rows = Rows(web)
    for since in (None, NOON.timestamp() + 0.7):
        assert search(http, since=since) == []
    plain, bound = (dict(url.params) for url in rows.searches)
    assert plain == {
        "componentId": "kds-team.app",
        "configId": "123",
        "limit": "500",
        "sortBy": "createdTime",
        "sortOrder": "desc",
    }
    assert bound == {**plain, "createdTimeFrom": "2026-11-23T12:00:00+00:00"}
    assert "+" not in rows.searches[1].query.decode()


@pytest.mark.parametrize("count", [1, 4, 5, 6, 9, 10, 11, 23, 50])
@pytest.mark.parametrize("step_s", [60.0, 1.0, 0.4])
def test_every_page_is_read(http: Http, rows: Rows, count: int, step_s: float) -> None:
    """The oldest row of all is found, also where rows stand close together, and none twice."""
    rows.add(1, "ours", step_s=step_s)
    rows.add(count - 1, step_s=step_s)
    assert search(http) == ["1000"]
    assert search(http, "nobody's") == []


def test_pages_overlap(http: Http, rows: Rows) -> None:
    """The next page begins a second after the last one's end, so that no row falls between."""
    rows.add(12, "ours", step_s=0.5)
    assert search(http) == [str(1000 + n) for n in range(12)]
    untils = [url.params.get("createdTimeTo") for url in rows.searches]
    assert untils[0] is None
    first_end = NOON + timedelta(seconds=7 * 0.5)
    assert iso(untils[1] or "") == first_end + timedelta(seconds=1)


def test_several_matches_come_oldest_first(http: Http, rows: Rows) -> None:
    """The oldest of several is ours; the pages bring the newest first."""
    for trigger in ("theirs", "ours", "theirs", "ours", "theirs", "theirs", "ours", "theirs"):
        rows.add(1, trigger)
    assert search(http) == ["1001", "1003", "1006"]


@pytest.mark.parametrize("cap", [2, 3, 4])
def test_a_server_that_caps_the_limit(http: Http, rows: Rows, cap: int) -> None:
    """A short page is not taken for the last one."""
    rows.cap = cap
    rows.add(1, "ours", step_s=60)
    rows.add(9, step_s=60)
    assert search(http) == ["1000"]


def test_a_server_that_ignores_the_bound(http: Http, rows: Rows) -> None:
    """Full pages that do not go on are an incomplete search; a short one is the whole list."""
    rows.ignores_until = True
    rows.add(4)
    assert search(http) == []
    rows.add(1)
    error = failing(keboola(http).search(TARGET, None, "ours"))
    assert str(error) == "Keboola's job list is not sorted by time: the search is incomplete"
    rows.add(1, "ours")
    assert search(http) == ["1005"]


def test_rows_out_of_order_are_no_complete_search(http: Http, rows: Rows) -> None:
    """Without the order by time, the end of a full page says nothing about the next one."""
    rows.is_shuffled = True
    rows.add(20)
    assert "not sorted by time" in str(failing(keboola(http).search(TARGET, None, "ours")))


def test_too_many_pages_are_no_complete_search(
    http: Http, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was found so far is not nothing there; but what was found counts."""
    monkeypatch.setattr(tc, "MAX_SEARCH_ROWS", 15)
    rows.add(40, step_s=60)
    error = failing(keboola(http).search(TARGET, None, "ours"))
    assert str(error) == "Keboola's job list does not end after 15 rows"
    assert len(rows.searches) == 3
    rows.add(1, "ours", step_s=60)
    assert search(http) == ["1040"]


@pytest.mark.parametrize("is_there", [True, False])
def test_an_error_on_the_way_leaves_nothing_said(http: Http, rows: Rows, *, is_there: bool) -> None:
    """An interrupted search does not say that there is none; it may say that there is one."""
    rows.fails_after = 1
    rows.add(8)
    rows.add(1, "ours" if is_there else "theirs")
    if is_there:
        assert search(http) == ["1008"]
    else:
        assert failing(keboola(http).search(TARGET, None, "ours")).status == 403


def test_rows_without_variables_are_read_by_their_id(http: Http, rows: Rows) -> None:
    """A row that does not tell is asked before it counts as foreign, and only once."""
    rows.hides_variables = True
    rows.add(6)
    rows.add(1, "ours")
    rows.add(1)
    assert search(http) == ["1006"]
    assert sorted(rows.reads) == [str(1000 + n) for n in range(8)]


@pytest.mark.parametrize(
    "hidden", [None, {}, {"values": None}, {"values": {}}, {"values": []}, [], "x", 5]
)
def test_what_counts_as_not_telling(http: Http, rows: Rows, hidden: object) -> None:
    """Null, an empty list or what is no list of values is not the same as no trigger id."""
    rows.add(1, "ours")
    shown = {**rows.jobs[0], "variableValuesData": hidden}
    job = tc.parse_keboola_job(shown)
    assert job.trigger_id is None
    assert run(keboola(http)._with_trigger_id(job)).trigger_id == "ours"


@pytest.mark.parametrize("told", [[{"name": "a"}], {"values": [{"name": "a"}, 5, None]}])
def test_what_counts_as_telling(told: object) -> None:
    """A list without our variable is a job that somebody else has started."""
    row = {"id": 5, "variableValuesData": told}
    assert tc.parse_keboola_job(row) == KeboolaJob("5", None, None, None, "")


@pytest.mark.parametrize("code", [400, 401, 410])
def test_an_unreadable_row_is_no_foreign_one(http: Http, rows: Rows, code: int) -> None:
    """A row that cannot be read may be ours: without it the search is not complete."""
    rows.hides_variables = True
    rows.add(3)
    rows.unreadable, rows.refusal = {"1001"}, code
    assert failing(keboola(http).search(TARGET, None, "ours")).status == code


@pytest.mark.parametrize(("code", "reads"), [(403, 3), (404, 4)])
def test_a_row_that_may_not_be_read_is_foreign(
    http: Http, rows: Rows, code: int, reads: int
) -> None:
    """Who has started a job may read it. It is told once; one that is gone is asked for again."""
    rows.hides_variables = True
    rows.add(3)
    rows.unreadable, rows.refusal = {"1001"}, code
    learned, told = tc.Learned(), list[tc.Event]()
    for _ in range(2):
        client = tc.KeboolaClient(STACK, Secret(TOKEN), http, learned, tell=told.append)
        assert run(client.search(TARGET, None, "ours")) == []
    assert len(rows.reads) == reads
    (event,) = told
    assert (event.name, event.level) == ("keboola_jobs_unreadable", "warning")
    assert event.fields["keboola_job_ids"] == ["1001"]
    assert event.fields["jobs"] == 1


def test_a_row_is_read_once_by_all_searches(http: Http, rows: Rows) -> None:
    """Many triggers are searched for at once, in the same list of a configuration."""
    rows.hides_variables = True
    rows.add(4)
    learned = tc.Learned()

    async def scenario() -> None:
        for _ in range(2):
            clients = [keboola(http, learned=learned) for _ in range(5)]
            await asyncio.gather(*(client.search(TARGET, None, "ours") for client in clients))

    run(scenario())
    assert sorted(rows.reads) == ["1000", "1001", "1002", "1003"]


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_a_page_that_is_too_large_is_asked_for_in_halves(
    http: Http, rows: Rows, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """Rows carry the data of their configuration: fewer of them are read at a time."""
    rows.knows_offset = True
    rows.add(1, "ours")
    rows.add(12)
    monkeypatch.setattr(tc, "SEARCH_LIMIT", 8)
    monkeypatch.setattr(tc, "MAX_BODY_BYTES", fits * len(json.dumps(rows.jobs[1])) + 20)
    assert search(http) == ["1000"]
    limits = [int(url.params["limit"]) for url in rows.searches]
    assert limits[:2] == [8, 4]
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == fits


def test_a_row_that_is_too_large_by_itself_leaves_nothing_said(
    http: Http, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving ends at one row."""
    rows.add(1)
    monkeypatch.setattr(tc, "MAX_BODY_BYTES", 20)
    assert "16 MiB" in str(failing(keboola(http).search(TARGET, None, "ours")))


def test_pages_go_on_by_place_where_the_bound_changes_nothing(http: Http, rows: Rows) -> None:
    """A server may ignore the bound, and more rows than a page has may be of one second."""
    rows.knows_offset = True
    rows.add(1, "ours", step_s=0.01)
    rows.add(33, step_s=0.01)
    assert search(http) == ["1000"]
    rows.ignores_until = True
    assert search(http) == ["1000"]
    assert search(http, "nobody's") == []


@pytest.mark.parametrize("project", ["4711", 4711])
def test_a_tokens_project_is_asked_for_once(web: respx.Router, http: Http, project: object) -> None:
    """A token does not move to another project."""
    owner = {"owner": {"id": project, "name": "Alpha"}}
    url = f"{STACK}/v2/storage/tokens/verify"
    route = web.get(url).mock(return_value=httpx.Response(200, json=owner))
    learned = tc.Learned()
    for _ in range(2):
        assert run(keboola(http, learned=learned).project()) == "4711"
    assert route.call_count == 1


@pytest.mark.parametrize("said", [{}, {"owner": None}, {"owner": {"id": None}}, {"owner": {}}, []])
def test_a_token_without_a_project_is_an_error(web: respx.Router, http: Http, said: object) -> None:
    """A trigger is never carried on a guess."""
    url = f"{STACK}/v2/storage/tokens/verify"
    web.get(url).mock(return_value=httpx.Response(200, json=said))
    assert "which project" in str(failing(keboola(http).project()))


def test_keboolas_clock_is_seen(web: respx.Router, http: Http) -> None:
    """Each answer tells it, also an error."""
    late = datetime.fromtimestamp(http.clock.wall(), UTC) - timedelta(hours=2)
    date = format_datetime(late, usegmt=True)
    web.get(f"{QUEUE}/search/jobs").mock(
        return_value=httpx.Response(403, headers={"date": date}, json={})
    )
    client = keboola(http)
    assert client.behind_s() == 0
    assert failing(client.search(TARGET, None, "ours")).status == 403
    assert client.behind_s() == pytest.approx(7200, abs=5)


def test_the_old_list_of_jobs(web: respx.Router, http: Http) -> None:
    """What it shows is ours; that it shows nothing, or fails, says nothing."""
    ours = keboola_row("5", NOON, "ours")
    route = web.get(f"{QUEUE}/jobs").mock(return_value=httpx.Response(200, json=[ours]))
    client = keboola(http)
    assert [job.id for job in run(client.listed(TARGET, "ours"))] == ["5"]
    assert run(client.listed(TARGET, "theirs")) == []
    params = route.calls[0].request.url.params
    assert (params["component"], params["config"]) == ("kds-team.app", "123")
    for answer in (
        httpx.Response(404),
        httpx.Response(200, json={}),
        httpx.Response(200, text="x"),
    ):
        route.mock(return_value=answer)
        assert run(client.listed(TARGET, "ours")) == []


NO_PROXIES = [
    ("localhost,::1,fd07:b51a:cc66:f0::/64", ["fd07:b51a:cc66:f0::/64"]),
    ("[::1],a.example", ["[::1]"]),
    ("a.example,.b.example,10.0.0.0/8,fd07::1,*.c.example,https://d.example,*", []),
    ("", []),
]


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize(("value", "left_out"), NO_PROXIES)
def test_entries_of_no_proxy_that_httpx_cannot_take(
    http: Http, monkeypatch: pytest.MonkeyPatch, name: str, value: str, left_out: list[str]
) -> None:
    """They are left out, and named once; all others count."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv(name, value)
    told: list[tc.Event] = []
    http.tell = told.append
    for _ in range(2):
        http.new_client()
    assert [event.fields["entries"] for event in told] == ([left_out] if left_out else [])
    kept = [entry for entry in value.split(",") if entry not in left_out]
    assert os.environ[name] == ",".join(kept)


def test_an_unreadable_row_does_not_hide_ours(http: Http, rows: Rows) -> None:
    """What was found counts, also if another row of its page cannot be read."""
    rows.hides_variables, rows.refusal = True, 401
    rows.add(2)
    rows.add(1, "ours")
    rows.unreadable = {"1000"}
    assert search(http) == ["1002"]


def test_a_time_at_the_end_of_time(http: Http, rows: Rows) -> None:
    """A nonsense time in a row is an answer like another, not a crash."""
    rows.jobs.append(keboola_row("5", datetime.max.replace(tzinfo=UTC), "theirs"))
    assert search(http) == []


@pytest.mark.parametrize(
    "body", [None, {}, {"jobs": []}, "x", [5], [{}], [{"id": None}], [{"id": []}]]
)
def test_a_list_that_is_none(web: respx.Router, http: Http, body: object) -> None:
    """What is no list of jobs is an incomplete search, never an empty one."""
    web.get(f"{QUEUE}/search/jobs").mock(return_value=httpx.Response(200, text=json.dumps(body)))
    assert failing(keboola(http).search(TARGET, None, "ours")).retryable


@pytest.mark.parametrize(
    ("url", "expected"),
    [("https://x/1", "https://x/1"), ("javascript:alert(1)", None), (5, None), (None, None)],
)
def test_a_link_is_a_web_address_or_nothing(url: object, expected: str | None) -> None:
    """What is published as a link comes from outside: only http and https are taken."""
    assert tc.parse_keboola_job({"id": "1", "url": url}).url == expected


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("2026-11-23T12:00:00Z", NOON),
        ("2026-11-23T14:00:00+0200", NOON),
        ("2026-11-23T12:00:00", NOON),
        ("soon", None),
        (None, None),
        (1_700_000_000, None),
    ],
)
def test_times_of_keboola_jobs(created: object, expected: datetime | None) -> None:
    """ISO times are moments; those without a zone are taken as UTC."""
    assert tc.parse_keboola_job({"id": "1", "createdTime": created}).created_time == expected


# ---- the gate ----


class Crowd:
    """Tasks that pass a gate, and who is inside."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside: list[int] = []
        self.came: list[int] = []
        self.most = 0
        self.leave = asyncio.Event()

    async def visit(self, number: int) -> None:
        async with self.gate:
            self.inside.append(number)
            self.came.append(number)
            self.most = max(self.most, len(self.inside))
            try:
                await self.leave.wait()
            finally:
                self.inside.remove(number)

    def start(self, *numbers: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.visit(number)) for number in numbers]


def with_crowd(limit: int, scenario: Callable[[Crowd], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await scenario(Crowd(Gate(limit)))

    run(main())


def test_a_gate_lets_in_only_so_many_in_their_order() -> None:
    """The limit is never passed, everybody gets in, first come first served."""

    async def scenario(crowd: Crowd) -> None:
        tasks = crowd.start(*range(9))
        await settle()
        assert crowd.inside == [0, 1, 2]
        crowd.leave.set()
        await asyncio.gather(*tasks)
        assert (crowd.most, crowd.came) == (3, [*range(9)])

    with_crowd(3, scenario)


def test_a_newcomer_does_not_overtake() -> None:
    """A place that became free in this moment belongs to who has waited, not to who comes now."""

    async def scenario(crowd: Crowd) -> None:
        tasks = crowd.start(0, 1)
        await settle()
        tasks[0].cancel()
        await turn()  # 0 has left, 1 does not run yet
        tasks += crowd.start(2)
        await settle()
        assert crowd.came == [0, 1]
        crowd.leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert crowd.came == [0, 1, 2]

    with_crowd(1, scenario)


def test_cancelled_while_waiting() -> None:
    """Who gives up waiting takes no place and stands in nobody's way."""

    async def scenario(crowd: Crowd) -> None:
        tasks = crowd.start(0, 1, 2)
        await settle()
        tasks[1].cancel()
        await settle()
        assert crowd.gate._inside == 1
        crowd.leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert crowd.came == [0, 2]
        assert crowd.gate._inside == 0

    with_crowd(1, scenario)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_cancelled_in_the_moment_of_being_admitted(*, cancel_first: bool) -> None:
    """The place goes on to the next one: nobody waits for ever at an empty gate."""

    async def scenario(crowd: Crowd) -> None:
        gate = crowd.gate
        await gate.__aenter__()
        tasks = crowd.start(1, 2, 3)
        await settle()
        if cancel_first:
            tasks[0].cancel()
        await gate.__aexit__()  # without a turn of the loop, 1 has its place and does not know
        if not cancel_first:
            tasks[0].cancel()
        await settle()
        assert crowd.inside == [2]
        crowd.leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (crowd.came, gate._inside, crowd.most) == ([2, 3], 0, 1)

    with_crowd(1, scenario)


def test_all_admitted_ones_are_cancelled_together() -> None:
    """Also when everybody who has just got in is cancelled at once, the rest get in."""

    async def scenario(crowd: Crowd) -> None:
        first = crowd.start(0, 1, 2)
        await settle()
        waiting, rest = crowd.start(3, 4, 5), crowd.start(6, 7, 8)
        await settle()
        for task in first:
            task.cancel()
        await turn()
        for task in waiting:
            task.cancel()
        await settle()
        assert crowd.inside == [6, 7, 8]
        crowd.leave.set()
        await asyncio.gather(*first, *waiting, *rest, return_exceptions=True)
        assert crowd.gate._inside == 0

    with_crowd(3, scenario)


def test_a_limit_that_changes() -> None:
    """A higher one lets in at once who waits; a lower one holds until enough have left."""

    async def scenario(crowd: Crowd) -> None:
        tasks = crowd.start(*range(8))
        await settle()
        crowd.gate.set_limit(4)
        await settle()
        assert crowd.inside == [0, 1, 2, 3]
        crowd.gate.set_limit(2)
        for number, inside in ((0, [1, 2, 3]), (1, [2, 3]), (2, [3, 4])):
            tasks[number].cancel()
            await settle()
            assert crowd.inside == inside
        crowd.leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert crowd.came == [*range(8)]

    with_crowd(1, scenario)


@pytest.mark.parametrize("seed", range(20))
def test_a_gate_in_a_crush(seed: int) -> None:
    """Random arrivals, cancellations and limits: never too many inside, nobody forgotten."""
    dice = random.Random(seed)  # noqa: S311 - the same dice every time

    async def visit(gate: Gate, inside: set[int], number: int, limits: list[int]) -> None:
        async with gate:
            inside.add(number)
            assert len(inside) <= max(limits)
            try:
                for _ in range(dice.randrange(4)):
                    await turn()
            finally:
                inside.discard(number)

    async def scenario() -> None:
        gate, inside, limits = Gate(3), set[int](), [3]
        tasks: list[asyncio.Task[None]] = []
        for number in range(300):
            tasks.append(asyncio.create_task(visit(gate, inside, number, limits)))
            if dice.random() < 0.5:
                dice.choice(tasks[-6:]).cancel()
            if dice.random() < 0.05:
                limits.append(dice.randrange(1, 6))
                gate.set_limit(limits[-1])
            if dice.random() < 0.6:
                await turn()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {type(result) for result in results}
        assert kinds <= {type(None), asyncio.CancelledError}
        assert (gate._inside, len(inside)) == (0, 0)
        async with asyncio.timeout(1), gate:
            pass

    run(scenario())
