"""A year of an installation in minutes: the real engine, store, reloader and config, virtual time.

300 jobs, half of them with `match` and a group on each night of the working week. People edit the
config, break it in a tenth of the edits, replace key and tokens each month, and retry what failed.
Servers are down for hours, Keboola jobs fail, POSTs and searches go wrong, the clock is set wrong
and right, the process is stopped, killed and upgraded, the disk is full for a day, the state file
is restored from last week. `model.py` has what is played: `Http`, clocks, disk. A year has 31
million seconds: polls are hours apart, and what is done every few seconds is done every few
minutes.

    python tests/test_year.py [--seed N] [--days N] [--jobs N]     # a year; pytest plays 40 days
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import model
import pytest
from cryptography.fernet import Fernet
from model import EPOCH, TOKENS, Key, Killed, ModelHttp, Process, ServerBatch, ServerJob, World

import teckochecker as tc

SEED = 20261125
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
DAY_S, HOUR_S, HOOK = 86400.0, 3600.0, "https://hooks.test/x"
FIRST_DAY = datetime.fromtimestamp(EPOCH, UTC).replace(hour=0, minute=0, second=0)
# Waits of the program: so many seconds, and how long they are here.
STRETCHED = {1.0: 300.0, 2.0: 6 * HOUR_S, 5.0: 1200.0, 30.0: 1200.0, 60.0: 900.0}
wait_for_event, run_engine = tc.wait_for_event, tc.run_engine
Act = Callable[[], Awaitable[None]]


class YearLoop(model.VirtualLoop):
    """Virtual time in which housekeeping is seldom; `tick` ends the wait for the next."""

    tick: asyncio.Future[None] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._clock_resolution = 1e-6  # as a float, a time after months has no nanoseconds

    def call_later(self, delay: float, *args: Any, **more: Any) -> asyncio.TimerHandle:  # type: ignore[override]  # noqa: ANN401
        self.tick = args[1] if delay == 2.0 and len(args) > 1 else self.tick
        return super().call_later(STRETCHED.get(delay, delay), *args, **more)


async def wait_longer(event: asyncio.Event, timeout_s: float) -> None:
    """Stand in for the program's; webhooks are told together, not after each commit."""
    event = asyncio.Event() if timeout_s == 5.0 else event
    await wait_for_event(event, STRETCHED.get(timeout_s, timeout_s))


def min_of_waits(*values: Any, **keys: Any) -> Any:  # noqa: ANN401
    """Stand in for `min` where the program waits half a minute at most."""
    if len(values) == 2 and 30.0 in values:
        values = tuple(STRETCHED[30.0] if value == 30.0 else value for value in values)
    return min(*values, **keys)


async def at_once(work: Callable[..., object], *arguments: object) -> object:
    return work(*arguments)


async def watch_nothing(*_: object) -> None:
    """Stand in for what watches the config's directory."""


class YearHttp(ModelHttp):
    """The way out: to the servers, and to a webhook."""

    world: Year

    async def post(
        self, url: str, headers: Mapping[str, str], body: str, timeout_s: float = 0.0
    ) -> tc.Answer:
        if url != HOOK:
            return await super().post(url, headers, body, timeout_s)
        await asyncio.sleep(0.2)
        self.process.point()
        if self.world.down["hook"]:
            raise tc.ApiError("ConnectError", retryable=True, sent=False)
        told = json.loads(body)
        self.world.told[told["event"], told["run"], told["at"]] += 1
        return self.world.reply(200, {})

    def _check_get(self, url: str, params: Mapping[str, str]) -> None:
        pass  # it reads the whole state file

    def _check_post(self, body: str) -> None:
        pass  # so does this


class Year(World):
    """The servers, the machine and the people of an installation."""

    loop: YearLoop
    process: Process

    def __init__(self, directory: Path, seed: int, loop: YearLoop, jobs: int) -> None:
        super().__init__(directory, seed, loop)
        self.config, key = directory / "config.yaml", Fernet.generate_key()
        self.config.with_name("key").touch(0o600)
        self.config.with_name("key").write_bytes(key)
        self.fernet, self.key, self.has_heavy_rows = Fernet(key), "sk-first-0000", False
        self.fault_rate = self.search_rate = 0.02
        self.down = Counter[str]()  # servers
        self.order: list[str] = []  # ids of batches, as they were created
        self.of_config: dict[str, list[ServerJob]] = {}  # the last Keboola jobs of each
        self.by_id: dict[str, ServerJob] = {}
        self.due, self.started, self.errors = set[Key](), Counter[Key](), Counter[Key]()
        self.logged, self.told = Counter[Any](), Counter[Any]()  # what webhooks are to be told
        self.said: dict[tuple[Any, ...], float] = {}
        self.figures, self.held, self.seen_id = Counter[str](), list[int](), 0
        self.files_changed = asyncio.Event()
        self.entries: dict[str, dict[str, Any]] = {}
        kinds: Any = ({"group_size": "2"}, {"group_size": "metadata.size"}, {"settle": "2h"})
        since = f"{FIRST_DAY + timedelta(1):%F}"
        for n in range(jobs):
            name, secret = f"job-{n}", [*TOKENS][n % 4]
            entry: dict[str, Any] = {"config_id": name, "keboola_secret": secret}
            entry["variables"] = {"line": name}
            if n % 2:
                entry |= {"match": {"pipe": name}, "group_by": "day", "since": since}
                entry |= kinds[n // 2 % 3] | {"retry_on_error": n % 3}
            else:
                entry["batch_ids"] = self.make_batches(name, "", 1, 60)
            self.entries[name] = entry

    # --- the servers ---

    def answer(self, url: str, headers: Mapping[str, str], params: Mapping[str, str]) -> tc.Answer:
        server = "openai" if "api.openai.com" in url else "keboola"
        self.figures["requests"] += 1
        if self.down[server]:
            if self.random.random() < 0.5:
                raise tc.ApiError("ReadTimeout", retryable=True)
            return self.reply(503, {})
        if headers.get("Authorization", f"Bearer {self.key}") != f"Bearer {self.key}":
            return self.reply(401, {})
        one = self.by_id.get(url.rpartition("/")[2])
        of_config = self.of_config.get(params.get("configId", params.get("config", "")), [])
        self.keboola = [one] if one else of_config
        return super().answer(url, headers, params)

    def _openai(self, path: str, params: Mapping[str, str]) -> tc.Answer:
        now, end = self.loop.time(), len(self.order)
        if not path.endswith("/batches"):
            return super()._openai(path, params)
        if "after" in params:
            end = self.order.index(params["after"], max(0, int(params["after"][6:]) - 9_000))
        rows = [self.batches[i].document(now, EPOCH) for i in self.order[max(0, end - 100) : end]]
        return self.reply(200, {"data": rows[::-1], "has_more": end > 100}, 0.0)

    def take_post(self, url: str, token: str, body: str, fate: str) -> tc.Answer:
        self.keboola = self.of_config.setdefault(json.loads(body)["config"], [])
        return (
            self.reply(503, {})
            if self.down["keboola"]
            else super().take_post(url, token, body, fate)
        )

    def _make(self, made: ServerJob, fate: str) -> None:
        now, more, dice = self.loop.time(), self.random.uniform, self.random.random
        made.id, made.created, made.tells = str(1000 + self.started.total()), now, dice() < 0.9
        made.visible, made.ended = now + (more(0, 25) if dice() < 0.3 else 0), now + more(5, 280)
        made.status = "success" if dice() < 0.95 else "error"
        self.keboola.append(made)
        self.by_id[made.id] = made
        if len(self.keboola) > 15:  # a fortnight's
            del self.by_id[self.keboola.pop(0).id]
        self.started[made.key] += 1
        is_new = self.started[made.key] <= 1 + self.errors[made.key] and made.key in self.due
        self.claim(holds=is_new, text=f"{made.key} was started twice, or too early ({fate})")
        self.errors[made.key] += made.status == "error"
        self.open_posts.clear()

    def make_batches(
        self, name: str, group: str, n: int, within_s: float, **about: str
    ) -> list[str]:
        """Have the batches of a run made within so many seconds, and ended within hours."""
        ids = [f"batch_{len(self.batches) + i:07}" for i in range(n)]
        key, left, dice = (name, group, frozenset(() if group else ids)), {*ids}, self.random

        def make(batch: ServerBatch) -> None:
            batch.created = batch.listed = self.loop.time()
            self.order.append(batch.id)
            self.loop.call_later(dice.uniform(1, 8) * HOUR_S, end, batch)

        def end(batch: ServerBatch) -> None:
            batch.status = dice.choice(("completed",) * 8 + ("failed", "expired"))
            batch.ended = self.loop.time()
            batch.file_at = None if batch.status == "failed" else batch.ended
            left.discard(batch.id)
            if not left and group != "too early":
                self.due.add(key)

        for batch_id in ids:
            self.batches[batch_id] = ServerBatch(batch_id, 0.0, about | {"size": str(n)}, 0.0)
            self.loop.call_later(dice.uniform(0, within_s), make, self.batches[batch_id])
        return ids

    # --- the process ---

    def loaded(self) -> tc.LoadedConfig:
        self.files = tc.Files()
        loaded, self.rejected = tc.load_at_start(self.config, self.files, tc.Redactor(), once=False)
        return loaded

    async def run_engine(self, engine: tc.Engine, signals: Any, _: object) -> int:  # noqa: ANN401
        """Stand in for the program's: here a process gets its helpers."""
        self.said.clear()
        signals.is_hangup, signals.files_changed = False, self.files_changed
        engine.note_config(self.rejected)
        load = partial(tc.keep_loaded, engine, self.files, lambda _: None, signals)
        tell = partial(tc.send_webhooks, engine, engine.http)
        return await run_engine(engine, signals, (load, tell))

    def say(self, event: tc.Event) -> None:
        self.figures[f"event {event.name}"] += 1
        is_bug = event.name == "internal_error"
        self.claim(holds=not is_bug, text=f"{event.text} {event.fields.get('traceback')}")
        if event.name == "clock_changed":
            self.said.clear()
        if event.name.startswith(tc.FLAPPING):
            about = map(event.fields.get, ("batch_id", "status", "secret"))
            key, now = (event.name, event.run, *about), self.loop.time()
            is_new = now - self.said.get(key, -60.0) >= 60
            self.claim(holds=is_new, text=f"{key} twice within a minute")
            self.said[key] = now

    def on_exception(self, _: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseExceptionGroup):
            error = error.split(Killed)[1]
        self.claim(holds=isinstance(error, Killed | None), text=f"{context}")

    async def stop(self) -> None:
        self.process.stop.set()
        await asyncio.wait({self.process.task})
        self.collect()

    def collect(self) -> None:
        """Read what the log has for webhooks, before it is pruned."""
        with tc.Store.reading(self.state) as store:
            for event in store.events(after=self.seen_id) if store else ():
                self.seen_id = event.id
                if tc.EVENTS[event.name][1] != "-":
                    self.logged[event.name, event.run, tc.rfc3339(event.at)] += 1

    # --- people and accidents ---

    def save(self, *, is_broken: bool = False) -> None:
        """Write the config as it is to be; JSON is YAML, and quickly written."""

        def seal(text: str) -> str:
            return self.fernet.encrypt(text.encode()).decode()

        secrets: dict[str, Any] = {"openai": {"type": "openai", "value": seal(self.key)}}
        for name, token in self.tokens.items():
            keboola = {"type": "keboola", "stack_url": TOKENS[name][0]}
            secrets[name] = keboola | {"value": seal(token)}
        secrets["hook"] = {"type": "webhook", "value": seal(HOOK)}
        defaults = {"openai_secret": "openai", "component_id": "app", "poll_interval": "8h"}
        config: dict[str, Any] = {"state": "state.db", "key_file": "key", "defaults": defaults}
        config |= {"limits": {"trigger_grace": "30s", "follow_interval": "5m"}}
        config |= {"notify": [{"secret": "hook", "events": ["attention", "finished"]}]}
        text = json.dumps(config | {"secrets": secrets, "jobs": self.entries}, indent=1)
        new = self.config.with_name("config.yaml.new")
        new.write_text(text[: -200 if is_broken else None])
        new.replace(self.config)
        self.files_changed.set()

    async def edit(self) -> None:
        """Some jobs get another set of batches; a tenth of the edits is broken at first."""
        sets = {n: e for n, e in self.entries.items() if "batch_ids" in e}
        for name in self.random.sample([*sets], max(1, len(sets) // 15)):
            if (name, "", frozenset(sets[name]["batch_ids"])) in self.started:
                size = self.random.randint(1, 3)
                sets[name]["batch_ids"] = self.make_batches(name, "", size, 60)
        await asyncio.sleep(120)  # until there are these batches
        self.figures["edits"] += 1
        if self.figures["edits"] % 10 == 5:
            self.figures["broken edits"] += 1
            self.save(is_broken=True)
            await asyncio.sleep(HOUR_S)
        self.save()

    async def replace_secrets(self) -> None:
        """The old ones are refused at once; the config follows, perhaps later."""
        self.figures["secrets replaced"] += 1
        self.key = f"sk-{self.figures['secrets replaced']:010}"
        self.tokens = {name: f"token-{name}-{self.key}" for name in TOKENS}
        await asyncio.sleep(self.random.choice((0, 3 * HOUR_S)))
        self.save()

    async def retry_failed(self) -> None:
        with closing(sqlite3.connect(self.state)) as db, db:
            db.execute("""INSERT INTO requests (run_id, force, rerun, phase)
                SELECT id, 0, rerun, phase FROM runs
                WHERE attention <> '' AND phase IN ('finished', 'rejected')""")

    async def fill_disk(self) -> None:
        self.set_for(DAY_S, "is_full", value=True)

    async def measure(self) -> None:
        self.held.append(held_by(self.process.engine) // 1000)

    async def break_down(self, server: str, hours: float) -> None:
        self.down[server] += 1
        self.figures["outages"] += 1
        self.loop.call_later(hours * HOUR_S, lambda: self.down.subtract([server]))

    async def set_clock(self, seconds: float) -> None:
        self.our_skew = seconds
        self.figures["clocks set"] += 1
        if self.loop.tick and not self.loop.tick.done():
            self.loop.tick.set_result(None)

    async def restart(self) -> None:
        """Stopped or killed, with the machine or without; an upgrade is no more than that."""
        self.figures["restarts"] += 1
        if self.figures["restarts"] % 2:
            self.figures["kills"] += 1
            self.process.fuse = self.random.randint(1, 60)
            await asyncio.sleep(self.random.uniform(0, 3) * HOUR_S)
        await self.stop()
        if self.random.random() < 0.5:
            self.boot, self.booted = f"boot-{self.figures['restarts']}", self.loop.time()
        await asyncio.sleep(self.random.uniform(70, 2 * HOUR_S))
        self.process = Process(self)

    async def copy_state(self) -> None:
        self.collect()
        with closing(sqlite3.connect(self.state)) as db:
            self.copy = db.serialize(), self.seen_id, self.logged - self.told

    async def restore_state(self) -> None:
        """What was on its way when the copy was made is told again; what is lost cannot be."""
        await self.stop()
        data, self.seen_id, on_its_way = self.copy
        self.logged = (self.logged & self.told) + (on_its_way & self.told)
        for suffix in ("-wal", "-shm"):
            self.state.with_name(f"state.db{suffix}").unlink(missing_ok=True)
        self.state.write_bytes(data)
        self.process = Process(self)

    def plan(self, day: int, days: int) -> Iterator[tuple[float, Act]]:
        """Return what happens on a day, and at what hour."""
        dice, is_wild = self.random.random, day < days * 2 // 3  # then, one process goes on
        if day >= days:
            yield 12, self.retry_failed
            return
        if day % 2 == 0 and not self.is_full:
            yield 9, self.edit
        if day % 30 == 12:
            yield 10, self.replace_secrets
        if day % 7 == 3 and not self.is_full:
            yield 11, self.retry_failed
        if dice() < 0.15:
            server = self.random.choice(("openai", "keboola", "hook"))
            yield 24 * dice(), partial(self.break_down, server, 1 + 7 * dice())
        if day == days // 3:  # so that there are messages to be told on the full disk
            yield 4, partial(self.break_down, "hook", 20)
        if day % 20 in {14, 16}:
            skew = self.random.uniform(-6, 6) * HOUR_S if day % 20 == 14 else 0.0
            yield 14, partial(self.set_clock, skew)
        if is_wild and day % 11 == 5 and not self.is_full:
            yield 15, self.restart
        special: dict[int, Act] = {days // 3: self.fill_disk, days // 2: self.copy_state}
        special |= dict.fromkeys((days // 6, days * 2 // 3 + 3, days - 1), self.measure)
        if act := (special | {days // 2 + 7: self.restore_state}).get(day):
            yield 22, act

    async def live(self, days: int) -> None:
        """Play so many days, and four calm ones."""
        self.make_batches("job-1", "too early", 1, 60, pipe="job-1", day="too early")
        await asyncio.sleep(120)
        self.save()
        self.process = Process(self)
        for day in range(days + 4):
            today = FIRST_DAY + timedelta(day + 1)
            midnight = today.timestamp() - EPOCH
            await asyncio.sleep(midnight - self.loop.time())
            is_night = day < days and today.weekday() < 5
            for name, entry in self.entries.items() if is_night else ():
                if "match" in entry:
                    size = 2 if entry.get("group_size") == "2" else self.random.randint(1, 3)
                    within_s = 300 if "settle" in entry else 3 * HOUR_S
                    group = f"{today:%F}"
                    self.make_batches(name, group, size, within_s, pipe=name, day=group)
            for hour, act in sorted(self.plan(day, days), key=lambda entry: entry[0]):
                await asyncio.sleep(max(0.0, midnight + hour * HOUR_S - self.loop.time()))
                if self.process.task.done():
                    self.process = Process(self)
                await act()
            self.collect()
        await self.stop()

    def judge(self) -> None:
        """See what has become of it."""
        missing, again = self.logged - self.told, self.told - self.logged
        with tc.Store.reading(self.state) as store:
            assert store
            is_open = store.one("SELECT count(*) FROM runs WHERE phase <> 'finished'")
            oldest = store.one("SELECT min(at) FROM events") - EPOCH - self.loop.time()
        size = self.state.stat().st_size
        for text, is_so in {
            f"lost: {self.due - self.started.keys()}": not self.due <= self.started.keys(),
            f"messages not told: {missing}": bool(missing),
            # Killed between the answer and its commit, a process leaves it to the next one.
            f"messages told again: {again}": again.total() > self.figures["kills"],
            f"{is_open} runs are open": is_open,
            "the log is older than its retention": oldest < -31 * DAY_S,
            f"the state file has {size:,} bytes": size > 1e8,
            f"memory grows: {self.held} kB": max(self.held[1:]) > 1.5 * self.held[0],
        }.items():
            self.claim(holds=not is_so, text=text)
        self.figures |= {"runs": len(self.due), "Keboola jobs": self.started.total()}
        self.figures |= {"Keboola jobs in error": self.errors.total(), "told": self.told.total()}
        self.figures |= {f"kB held, {n}": held for n, held in enumerate(self.held)}
        self.figures |= {"kB of state file": size // 1000, "batches": len(self.batches)}


def held_by(root: object) -> int:
    """Return how many bytes an engine holds, with all that it leads to."""
    seen, waiting, total = set[int](), [root], 0
    others = (type, ModuleType, FunctionType, World, Process, ModelHttp, asyncio.AbstractEventLoop)
    while waiting:
        thing = waiting.pop()
        if id(thing) not in seen and not isinstance(thing, others):
            seen.add(id(thing))
            total += sys.getsizeof(thing)
            waiting += gc.get_referents(thing)
    return total


async def play(year: Callable[[], Year], days: int) -> Year:
    world = year()
    clocks, patch = world.fake_time(), mock.patch.object
    clocks.monotonic_ns = lambda: int(clocks.monotonic() * 1e9)
    world.loop.set_exception_handler(world.on_exception)
    ours: dict[str, Any] = {
        "time": clocks,
        "say": world.say,
        "wait_for_event": wait_longer,
        "watch_directory": watch_nothing,
        "min": min_of_waits,
    }
    program: Any = mock.patch.multiple(tc, create=True, run_engine=world.run_engine, **ours)
    with program, patch(asyncio, "to_thread", at_once), patch(model, "ModelHttp", YearHttp):
        await world.live(days)
    world.judge()
    return world


def played(seed: int, days: int, jobs: int) -> Year:
    """Play so many days, in a time zone with daylight saving."""
    random.seed(seed)
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as directory,
        asyncio.Runner(loop_factory=YearLoop) as runner,
        mock.patch.dict(os.environ, {"TZ": "Europe/Prague"}),
    ):
        time.tzset()
        loop: Any = runner.get_loop()
        world = runner.run(play(partial(Year, Path(directory), seed, loop, jobs), days))
    time.tzset()
    return world


@pytest.mark.long
def test_forty_days() -> None:
    """Of 60 jobs nothing is lost or started twice, and each message is told once."""
    assert played(SEED, 40, 60).violations == []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"seed": SEED, "days": 365, "jobs": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, began = parser.parse_args(), time.monotonic()
    year = played(args.seed, args.days, args.jobs)
    for name, count in sorted(year.figures.items()):
        print(f"{count:9,}  {name}")
    print(*(text[:2000] for text in year.violations[:20]), sep="\n")
    print(f"seed {args.seed}: {len(year.violations)} violations, {time.monotonic() - began:.0f} s")
    return int(bool(year.violations))


if __name__ == "__main__":
    sys.exit(main())
