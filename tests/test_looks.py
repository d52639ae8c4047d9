"""Looks that break off, overlap or have no next one: the poller and its client, in virtual time.

The server is played behind `Http`; client, list reader and poller are the program's own. What an
answer says is read when its request comes in, and may be long on its way back.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, cast

import pytest
from model import VirtualLoop

import teckochecker as tc
from teckochecker import (
    Account,
    Answer,
    ApiError,
    Batch,
    Event,
    Job,
    Limits,
    OpenAIClient,
    Poller,
    Secret,
    Target,
    Watch,
    Work,
)

NOON = 1_800_000_000.0
URL = "https://api.openai.com/v1"
TIMEOUT_S = 30.0
SILENCE = "silence"
RESET = "reset"
TARGET = Target("https://connection.keboola.com", "component", "1")


def now() -> float:
    return asyncio.get_running_loop().time()


class Server:
    """An account's batches, the newest first, as `Http` would bring its answers.

    `trouble` says what becomes of a request for a path: nothing, a status, SILENCE or RESET.
    `read_at` of a batch, its count of completed requests, tells when an answer was made.
    """

    def __init__(self, count: int, *, spaced_s: float = 2.0) -> None:
        self.limits = Limits(max_concurrency=100, request_timeout_s=int(TIMEOUT_S))
        self.clock = self
        self.keys = [f"batch_{number:05}" for number in range(count)]
        self.born = {key: NOON - 100 - spaced_s * n for n, key in enumerate(self.keys)}
        self.statuses = dict.fromkeys(self.keys, "in_progress")
        self.trouble: Callable[[str], object] = lambda _: None
        self.latency: Callable[[str], float] = lambda _: 1.0
        self.retry_after = ""
        self.requests: list[str] = []
        self.in_flight: Counter[str] = Counter()

    def mono(self) -> float:
        return now()

    def wall(self) -> float:
        return NOON + now()

    def jitter(self) -> float:
        return 0.5

    @property
    def pages(self) -> int:
        """How many pages were asked for."""
        return sum(path.startswith("page") for path in self.requests)

    def row(self, key: str) -> dict[str, object]:
        counts = {"total": 10**9, "completed": int(1000 * now()), "failed": 0}
        return {
            "id": key,
            "status": self.statuses[key],
            "created_at": self.born[key],
            "input_file_id": "file",
            "request_counts": counts,
        }

    def page(self, cursor: str | None) -> dict[str, object]:
        start = self.keys.index(cursor) + 1 if cursor else 0
        shown = self.keys[start : start + tc.PAGE_ROWS]
        has_more = start + len(shown) < len(self.keys)
        return {"data": [self.row(key) for key in shown], "has_more": has_more}

    async def get(
        self, url: str, _headers: object, params: Mapping[str, str] | None, *, budget: object
    ) -> Answer:
        assert budget
        cursor = params.get("after") if params else None
        path = f"page {cursor}" if params else url.rpartition("/")[2]
        self.requests.append(path)
        self.in_flight[path] += 1
        try:
            trouble = self.trouble(path)
            if cursor and cursor not in self.keys:
                trouble, cursor = trouble or 404, None
            document = self.page(cursor) if params else self.row(path)
            if trouble == SILENCE:
                await asyncio.sleep(TIMEOUT_S)
                raise ApiError("no whole answer within 30s", retryable=True)
            await asyncio.sleep(self.latency(path))
            if trouble == RESET:
                raise ApiError("ReadError", retryable=True)
            status = trouble if isinstance(trouble, int) else 200
            headers = {"retry-after": self.retry_after} if status == 429 else {}
            return Answer(status, headers, json.dumps(document).encode())
        finally:
            self.in_flight[path] -= 1


class Meta:
    """The part of a state file that a pass remembers in."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.writes = 0

    def meta(self, key: str) -> Any:  # noqa: ANN401 - JSON
        return self.kept.get(key)

    def put_meta(self, key: str, value: object, _events: Sequence[Event], _now: float) -> None:
        self.writes += 1
        self.kept[key] = json.loads(json.dumps(value))


class Office:
    """What a poller needs of the engine."""

    def __init__(self, server: Server, store: Meta | None = None) -> None:
        self.server = server
        self.clock = server
        self.store = store or Meta()
        self.once = store is not None
        self.is_stopping = False
        self.events: list[Event] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.answered: set[str] = set()
        self.paused: set[Watch] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    async def ended(self) -> None:
        """Return when all that was spawned has ended."""
        while self.tasks:
            tasks, self.tasks = self.tasks, []
            await asyncio.gather(*tasks)

    def is_polled(self, watch: Watch) -> bool:
        return watch not in self.paused

    def record(
        self, looks: Iterable[tuple[Watch, Mapping[str, Batch | ApiError]]], begun_at: float
    ) -> list[Watch]:
        changed = []
        for watch, seen in looks:
            self.answered |= seen.keys()
            lag_s = now() - begun_at
            after, _ = tc.after_look(
                watch.work, seen, interval_s=120, now=NOON + now(), jitter=0.5, lag_s=lag_s
            )
            if tc.is_whole_look(watch.work, seen):
                watch.due = now() + tc.next_look_s(120, lag_s)
            assert_no_older(watch.work, after)
            watch.work = after
            changed.append(watch)
        return changed

    def note(self, *events: Event) -> None:
        self.events += events

    def told(self, name: str) -> int:
        """How often something was told."""
        return sum(event.name == name for event in self.events)

    def note_bug(self, error: Exception, _job: str = "") -> None:
        raise error

    note_trouble = note_bug


def assert_no_older(before: Work, after: Work) -> None:
    """What is recorded of a batch was never read before what it replaces."""
    for old, new in zip(before.batches, after.batches, strict=True):
        assert (new.completed or 0) >= (old.completed or 0), (old, new)


class Scene:
    """A server, its client and poller, and jobs of so many batches each."""

    def __init__(
        self,
        server: Server,
        *,
        size: int = 10,
        store: Meta | None = None,
        are_known: bool = False,
        keys: Sequence[str] = (),
    ) -> None:
        self.server = server
        self.office = Office(server, store)
        account = Account(Secret("sk-test"), URL, None, None)
        self.client = OpenAIClient(account, cast("Any", server))
        self.poller = Poller(cast("Any", self.office), self.client)
        watched = list(keys or server.keys)
        self.watches = []
        for start in range(0, len(watched), size):
            ids = tuple(watched[start : start + size])
            ages = [server.born[key] if are_known else None for key in ids]
            batches = tuple(Batch(k, created_at=age) for k, age in zip(ids, ages, strict=True))
            work = Work(start, f"job{start}", batches, TARGET, position=start)
            self.watches.append(Watch(work, Job(work.name, ids, "openai", "k", "c", "1")))
        self.poller.take(self.watches, "openai")

    async def look(self, watches: Sequence[Watch] | None = None) -> int:
        """Have works looked at; how many requests that took."""
        self.server.requests.clear()
        self.office.answered.clear()
        await self.poller._look(self.watches if watches is None else watches)
        await self.office.ended()
        return len(self.server.requests)


def play(scene: Coroutine[Any, Any, None]) -> None:
    """Play a scene in which an hour takes no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scene)


# ---- what says nothing about the list ----


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_no_absence(status: int) -> None:
    """After an answer that may be another one in a moment, the list is read again within minutes.

    A 429 is about the account: it is not even told.
    """

    async def scene() -> None:
        stage = Scene(Server(30))
        stage.server.trouble = lambda path: status if path.startswith("page") else None
        assert await stage.look() <= 30
        assert stage.office.told("list_not_usable") == (status != 429)
        stage.server.trouble = lambda _: None
        await asyncio.sleep(240)
        await stage.look()
        assert stage.server.pages
        assert stage.office.told("list_usable") == (status != 429)

    play(scene())


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_an_absence_lasts_an_hour(status: int) -> None:
    """Where there is no list, that is told once, and the next page is asked for an hour later."""

    async def scene() -> None:
        stage = Scene(Server(30))
        stage.server.trouble = lambda path: status if path.startswith("page") else None
        for at_s, pages in ((0, 1), (1800, 0), (1900, 1)):
            await asyncio.sleep(at_s)
            assert await stage.look() <= 30
            assert stage.server.pages == pages
        assert stage.office.told("list_not_usable") == 1

    play(scene())


def test_a_held_account_says_nothing_about_its_list() -> None:
    """While a 429 holds the account, no page is asked for; afterwards at once."""

    async def scene() -> None:
        stage = Scene(Server(30))
        stage.server.retry_after = "900"
        stage.server.trouble = lambda _: 429
        assert await stage.look(stage.watches[:1]) == 10
        assert await stage.look() == 0
        stage.server.trouble = lambda _: None
        await asyncio.sleep(901)
        assert await stage.look() == 1
        assert stage.office.events == []

    play(scene())


def test_a_hold_amid_the_pages_says_nothing_about_the_list() -> None:
    """A page that is not sent because another answer holds the account is not the list's fault."""

    async def scene() -> None:
        stage = Scene(Server(400))
        await stage.look()
        stage.server.retry_after = "60"
        stage.server.trouble = lambda path: None if path.startswith("page") else 429
        stage.server.latency = lambda path: 1.0 if path.startswith("page") else 0.5
        stage.poller._list._gate.set_limit(1)  # so that pages wait for each other
        await stage.poller._look(stage.watches[:1])
        assert await stage.look(stage.watches[1:]) <= 390
        assert 0 < stage.server.pages < 4
        stage.server.trouble = lambda _: None
        await asyncio.sleep(70)
        assert await stage.look() == 4
        assert stage.office.events == []

    play(scene())


def test_a_silent_account_says_nothing_about_its_list() -> None:
    """Where no request is answered, no page finds that out; when one is again, pages are read."""

    async def scene() -> None:
        stage = Scene(Server(30))
        stage.server.trouble = lambda _: SILENCE
        await stage.look(stage.watches[:1])
        await stage.look()
        assert stage.server.pages == 0
        stage.server.trouble = lambda _: None
        await stage.look(stage.watches[:1])
        assert await stage.look() == 1
        assert stage.office.events == []

    play(scene())


# ---- overlapping looks ----


@pytest.mark.parametrize("late", [None, 404], ids=["status", "error"])
def test_an_answer_that_was_overtaken_by_a_page(late: int | None) -> None:
    """What was read before a page, and comes after it, changes neither status nor error."""

    async def scene() -> None:
        server = Server(140)
        far = server.keys[-1]
        stage = Scene(server, keys=[*server.keys[:9], far, *server.keys[9:39]])
        first = stage.watches[0]
        server.latency = lambda path: 1.0 if path.startswith("page") else 50.0
        server.trouble = lambda path: None if path == far or path.startswith("page") else late
        await stage.poller._look([first])
        await asyncio.sleep(10)
        server.statuses = dict.fromkeys(server.keys, "finalizing")
        await stage.poller._look(stage.watches[1:])
        assert server.pages == 1
        await stage.office.ended()
        assert [b.status for b in first.work.batches] == ["finalizing"] * 9 + ["in_progress"]
        assert (first.work.error, first.work.failures) == (None, 0)

    play(scene())


def test_a_page_that_was_overtaken_by_answers() -> None:
    """What was read before an answer, and comes after it on a page, does not take it back."""

    async def scene() -> None:
        stage = Scene(Server(40))
        first = stage.watches[0]
        stage.server.latency = lambda path: 30.0 if path.startswith("page") else 1.0
        page = asyncio.ensure_future(stage.poller._look(stage.watches[1:]))
        await asyncio.sleep(5)
        stage.server.statuses = dict.fromkeys(stage.server.keys, "finalizing")
        await stage.poller._look([first])
        await page
        await stage.office.ended()
        assert {batch.status for batch in first.work.batches} == {"finalizing"}
        assert {batch.status for batch in stage.watches[1].work.batches} == {"in_progress"}

    play(scene())


def test_what_another_look_has_shown_is_free() -> None:
    """A work whose last missing batch a page has shown waits for nothing, and is due as others."""

    async def scene() -> None:
        stage = Scene(Server(40))
        first = stage.watches[0]
        slow = first.work.batches[3].id
        stage.server.latency = lambda path: 500.0 if path == slow else 1.0
        await stage.poller._look([first])
        await asyncio.sleep(10)
        assert first in stage.poller._busy
        await stage.poller._look(stage.watches[1:])
        assert first not in stage.poller._busy
        assert now() < first.due <= now() + 120
        assert stage.server.in_flight[slow] == 1
        await stage.office.ended()

    play(scene())


class Chance:
    """Looks at any time, answers that take any time, trouble of any kind, by chance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - the same every time
        server = Server(self.random.choice((40, 150, 400)))
        server.latency = self.latency
        server.trouble = self.trouble
        self.stage = Scene(server, size=self.random.choice((1, 3, 10)))
        self.share = self.random.choice((0, 0.05, 0.3))

    def latency(self, _path: str) -> float:
        return self.random.choice((0.1, 1.0, 5.0, 29.0)) * self.random.random()

    def trouble(self, _path: str) -> object:
        if self.random.random() > self.share:
            return None
        return self.random.choice((404, 500, 503, 429, SILENCE, RESET))

    async def play(self) -> None:
        """Begin looks at what no look is at, and move the list, for a while."""
        stage, pick = self.stage, self.random
        for _ in range(12):
            idle = [w for w in stage.watches if w not in stage.poller._busy]
            some = pick.sample(idle, pick.randint(0, len(idle)))
            if some:
                await stage.poller._look(some)
            await asyncio.sleep(pick.choice((0.0, 1.0, 20.0)))
            stage.server.keys[:0] = [new := f"batch_new{pick.random()}"]
            stage.server.born[new], stage.server.statuses[new] = NOON + now(), "validating"
            if pick.random() < 0.3:
                foreign = [k for k in stage.server.keys if k.startswith("batch_new")]
                stage.server.keys.remove(pick.choice(foreign))
        await stage.office.ended()


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_taken_back(seed: int) -> None:
    """However looks overlap, what is recorded of a batch was read after what was known of it."""
    play(Chance(seed).play())


# ---- a list that breaks ----

BREAKS = pytest.mark.parametrize("trouble", [SILENCE, RESET, 500, 401, 404, 429])


@BREAKS
def test_a_list_that_breaks_takes_no_request_more(trouble: object) -> None:
    """Where known pages fail, few are asked for, all others wait for nothing, and nobody waits."""

    async def scene() -> None:
        stage = Scene(Server(1000))
        await stage.look()
        assert await stage.look() == 10
        stage.server.trouble = lambda path: trouble if path.startswith("page") else None
        began = now()
        await stage.poller._look(stage.watches)
        assert now() - began <= TIMEOUT_S + 2
        stage.server.requests.clear()
        await asyncio.sleep(1000)
        for _ in range(3):
            assert await stage.look() <= 1000
            assert stage.server.pages <= (20 if trouble == 404 else 5)
            await asyncio.sleep(100)
        await asyncio.sleep(10_000)

    play(scene())


def test_a_slow_list_holds_nobody_up_for_long() -> None:
    """A look explores for a minute; what it has learned by then is where the next one goes on."""

    async def scene() -> None:
        server = Server(20_000)
        clusters = [key for number, key in enumerate(server.keys) if number % 200 < 10]
        stage = Scene(server, keys=clusters)
        server.latency = lambda path: 10.0 if path.startswith("page") else 0.1
        made = []
        for _ in range(30):
            began = now()
            await stage.poller._look(stage.watches)
            assert now() - began <= 60 + 10 + server.pages / 5 * 10
            await stage.office.ended()
            made.append(len(server.requests))
            assert len(stage.office.answered) == 1000
            server.requests.clear()
            stage.office.answered.clear()
            await asyncio.sleep(120)
        assert max(made) <= 1000
        assert made[-1] == 100

    play(scene())


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("count", [30, 300])
def test_no_list_is_noticed_after_a_restart(status: int, count: int) -> None:
    """Where every cursor is refused, the first page is asked for, and tells that there is none."""

    async def scene() -> None:
        stage = Scene(Server(count), are_known=True)
        stage.server.trouble = lambda path: status if path.startswith("page") else None
        for _ in range(4):
            assert await stage.look() <= count
            await asyncio.sleep(120)
        assert stage.office.told("list_not_usable") == 1
        for _ in range(60):
            assert await stage.look() <= count
            await asyncio.sleep(120)
        assert stage.office.told("list_not_usable") == 1

    play(scene())


def test_a_cursor_that_is_gone_is_no_absence() -> None:
    """Where one cursor of several is refused, the list is there."""

    async def scene() -> None:
        stage = Scene(Server(1000))
        await stage.look()
        await stage.look()
        (gone, *_) = [path for path in stage.server.requests if path != "page None"]
        stage.server.trouble = lambda path: 404 if path == gone else None
        for _ in range(5):
            assert await stage.look() <= 30
            await asyncio.sleep(120)
        assert stage.office.events == []

    play(scene())


# ---- what is left out ----


def test_what_was_left_out_comes_first_whatever_else_is_looked_at() -> None:
    """Looks at other jobs between do not make it forgotten."""

    async def scene() -> None:
        stage = Scene(Server(100))
        stage.server.trouble = lambda path: 500 if path.startswith("page") else None
        some, others = stage.watches[:3], stage.watches[3:]
        assert await stage.look(some) == 30
        (left_out,) = {b.id for w in some for b in w.work.batches} - stage.office.answered
        await stage.look(others[:2])
        await stage.look(others)
        await stage.look(some)
        assert stage.server.requests[0] == left_out

    play(scene())


# ---- the end of a look ----


def test_a_poller_that_is_stopped_asks_for_nothing_more() -> None:
    """What a look has begun ends with its account, and what it would have asked for is not."""

    async def scene() -> None:
        stage = Scene(Server(15), size=15)
        stage.poller.ASKED_AT_ONCE = 5  # type: ignore[misc]
        stage.server.latency = lambda _: 10.0
        stage.poller.start()
        await asyncio.sleep(15)
        assert len(stage.server.requests) == 10
        assert sum(stage.server.in_flight.values()) == 5
        stage.poller.stop()
        await asyncio.gather(*stage.office.tasks, return_exceptions=True)
        assert sum(stage.server.in_flight.values()) == 0
        await asyncio.sleep(100)
        assert len(stage.server.requests) == 10

    play(scene())


def test_paused_and_unpaused_there_is_one_look() -> None:
    """A job that comes back while its look is under way waits for the end of that."""

    async def scene() -> None:
        stage = Scene(Server(1))
        (watch,) = stage.watches
        stage.server.latency = lambda _: 20.0
        stage.poller.start()
        await asyncio.sleep(5)
        stage.office.paused.add(watch)
        stage.poller.take(stage.watches, "openai")
        await asyncio.sleep(1)
        stage.office.paused.clear()
        watch.due = now()  # as the engine has it, whose config has changed
        stage.poller.take(stage.watches, "openai")
        await asyncio.sleep(5)
        assert stage.server.in_flight.total() == 1
        await asyncio.sleep(200)
        assert len(stage.server.requests) == 2
        stage.poller.stop()
        await asyncio.gather(*stage.office.tasks, return_exceptions=True)

    play(scene())


# ---- passes of --once ----


async def passes(
    server: Server, store: Meta, count: int, *, every_s: float, size: int = 1
) -> list[int]:
    """The numbers of requests of some passes, each of which answers for all that decides."""
    made = []
    for _ in range(count):
        stage = Scene(server, size=size, store=store)
        made.append(await stage.look())
        waiting = [w for w in stage.watches if len({*w.pending()} & stage.office.answered) > 0]
        assert waiting == stage.watches
        await asyncio.sleep(every_s)
    return made


def test_passes_learn_that_there_is_no_list() -> None:
    """A pass in vain takes one request more, and is not repeated for ever longer, up to a day."""

    async def scene() -> None:
        server, store = Server(30), Meta()
        server.trouble = lambda path: 404 if path.startswith("page") else None
        made = await passes(server, store, 3 * 288, every_s=300)
        assert set(made) == {30, 31}
        assert made[:2] == [31, 30]
        assert made.count(31) == store.writes <= 10
        assert made[-288:].count(31) <= 1

    play(scene())


def test_passes_leave_out_what_decides_nothing() -> None:
    """Where a job waits for another batch anyway, a pass in vain takes no request more."""

    async def scene() -> None:
        server, store = Server(30), Meta()
        server.trouble = lambda path: 404 if path.startswith("page") else None
        assert await passes(server, store, 5, every_s=3600, size=10) == [30] * 5

    play(scene())


def test_passes_read_pages_that_pay() -> None:
    """Passes whose pages pay read them each time, and again soon after one has failed."""

    async def scene() -> None:
        server, store = Server(300), Meta()
        assert await passes(server, store, 3, every_s=300) == [3, 3, 3]
        assert store.writes == 0
        server.trouble = lambda path: 500 if path.startswith("page") else None
        assert await passes(server, store, 1, every_s=300) == [301]
        server.trouble = lambda _: None
        assert await passes(server, store, 4, every_s=300) == [300, 3, 3, 3]
        assert store.kept == {tc.VAIN_PASSES: {}}

    play(scene())


def test_a_pass_is_of_its_account() -> None:
    """What one account's passes have met is nothing to another's; a clock set back is none, too."""

    async def scene() -> None:
        server, store = Server(30), Meta()
        store.kept[tc.VAIN_PASSES] = {"other": [9, NOON]}
        assert await passes(server, store, 1, every_s=60) == [1]
        store.kept[tc.VAIN_PASSES] = {"openai": [9, NOON + 1e6]}
        assert await passes(server, store, 1, every_s=60) == [1]
        store.kept[tc.VAIN_PASSES] = {"openai": [9, NOON]}
        assert await passes(server, store, 1, every_s=60) == [30]

    play(scene())
