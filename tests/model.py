"""A world in which time is virtual: one machine, its disk and clock, OpenAI and Keboola.

Engine, store, lock and the servers' clients are the program's own. Played are what is around them:
`Http`, the clocks, the death of the process, the full disk. `violations` are what must never be.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import selectors
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import teckochecker as tc

EPOCH, GRACE_S = 1_790_000_000.0, 30.0
PAGE_ROWS = 6  # of OpenAI's list; what is listed a minute late is within two pages of what is new
HEAVY_ROWS = 3  # of Keboola's search, where rows are heavy
EU, US = "https://connection.eu.test", "https://connection.us.test"
TOKENS = {"eu": (EU, "1"), "eu-too": (EU, "1"), "eu-other": (EU, "2"), "us": (US, "3")}
# What becomes of a POST: whether Keboola carries it out, and the status that is seen, if any.
FATES: dict[str, tuple[bool, int | None]] = {
    "fine": (True, 201),
    "unsent": (False, None),
    "lost": (True, None),
    "lost before": (False, None),
    "500": (False, 500),
    "500 done": (True, 500),
    "429 done": (True, 429),
    "408": (False, 408),
    "302 done": (True, 302),
    "no id": (True, 200),
    "rejected": (False, 400),
    "curable": (False, 403),
}
Key = tuple[str, str, frozenset[str]]  # what is started once: the line of a job, group or batches


class Killed(BaseException):
    """SIGKILL, as well as one task of a process can play it."""


class VirtualSelector(selectors.SelectSelector):
    """Never waits: it moves the time on by as much as it was asked to wait."""

    now, rounds = 0.0, 0  # rounds of the loop in which no time passes

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.rounds = 0 if timeout else self.rounds + 1
        if timeout is None or self.rounds > 20_000:
            raise AssertionError("everything waits for ever, or the loop spins")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which an hour takes as long as what happens in it."""

    def __init__(self) -> None:
        self.virtual = VirtualSelector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now

    def call_later(self, delay: float, *args: Any, **more: Any) -> asyncio.TimerHandle:  # type: ignore[override]  # noqa: ANN401
        """Housekeeping every two seconds would be nine tenths of the work."""
        return super().call_later(20.0 if delay == 2.0 else delay, *args, **more)


@dataclass(slots=True)
class ServerBatch:
    """A batch as OpenAI has it; times are the world's seconds."""

    id: str
    created: float
    metadata: Mapping[str, str]
    listed: float  # when the list begins to show it
    status: str = "in_progress"
    ended: float | None = None
    file_at: float | None = None  # when its file shows; None: it has none

    def document(self, now: float, start: float) -> dict[str, Any]:
        has_file, done = self.file_at is not None and now >= self.file_at, self.file_at is not None
        ended = {f"{self.status}_at": int(start + self.ended)} if self.ended is not None else {}
        return ended | {
            "id": self.id,
            "status": self.status,
            "created_at": int(start + self.created),
            "metadata": self.metadata,
            "request_counts": {"total": 1, "completed": int(done), "failed": 0},
            "output_file_id": f"file-{self.id}" if has_file else None,
        }


@dataclass(slots=True)
class ServerJob:
    """A job that Keboola has made; times are the world's seconds."""

    project: str
    payload: dict[str, Any]
    id: str = ""
    created: float = 0.0
    visible: float = 0.0
    ended: float = 0.0
    status: str = "success"
    tells: bool = True  # whether the search's row has the variables
    told: dict[str, str] = field(default_factory=dict)  # the variables

    @property
    def key(self) -> Key:
        group, lists = self.told.get("teckochecker_group", ""), ("completed", "failed", "pending")
        ids = [i for name in lists for i in json.loads(self.told[f"batch_ids_{name}"])]
        return self.told["line"], group, frozenset() if group else frozenset(ids)


class World:
    """Everything outside of the process, and what has to hold."""

    def __init__(self, directory: Path, seed: int, loop: VirtualLoop) -> None:
        self.random, self.loop = random.Random(seed), loop  # noqa: S311 - a dice
        self.main = asyncio.current_task()
        self.state = directory / "state.db"
        self.process: Process | None = None
        self.batches: dict[str, ServerBatch] = {}
        self.keboola: list[ServerJob] = []
        self.foreign: list[ServerJob] = []
        self.jobs: dict[str, tc.Job] = {}
        self.tokens = {name: f"token-{name}-0000" for name in TOKENS}
        self.search_fault = self.openai_fault = ""
        self.is_full, self.bad_commits = False, 0
        self.fault_rate = self.search_rate = 0.0  # of POSTs, of searches
        self.has_heavy_rows = self.random.random() < 0.5
        self.accident: Callable[[str], None] = lambda _: None  # soon after a start, told its job
        self.our_skew = self.openai_skew = self.keboola_skew = 0.0
        self.boot, self.booted = "boot-0", -9e4
        self.forced: Counter[Key] = Counter()
        self.open_posts: dict[str, tuple[str, Any]] = {}  # by trigger id: what cannot change now
        self.violations: list[str] = []
        self.story: list[str] = []

    def tell(self, text: str) -> None:
        self.story.append(f"{self.loop.time():9.1f} {text}")

    def claim(self, *, holds: bool, text: str) -> None:
        if not holds:
            self.tell(f"VIOLATION: {text}")
            self.violations.append(text)

    def set_for(self, seconds: float, name: str, value: object) -> None:
        self.tell(f"{name} {value}")
        setattr(self, name, value)
        self.loop.call_later(seconds, lambda: setattr(self, name, type(value)()))

    def fake_time(self) -> SimpleNamespace:
        """What stands in for the module `time` in the program."""
        wall = lambda: EPOCH + self.loop.time() + self.our_skew  # noqa: E731
        uptime = lambda *_: self.loop.time() - self.booted  # noqa: E731
        clocks = {"monotonic": uptime, "clock_gettime": uptime, "CLOCK_MONOTONIC": 0}
        return SimpleNamespace(time=wall, **clocks)

    def loaded(self) -> tc.LoadedConfig:
        """Return the config as it is now, as a process would read it."""
        entry = tc.SecretEntry("openai", "openai", "value", tc.Secret(""), 1, 1)
        entries = {"openai": entry}
        for name, (stack, _) in TOKENS.items():
            entries[name] = replace(entry, name=name, type="keboola", stack_url=stack)
        config_path, key_path = (self.state.with_name(name) for name in ("config.yaml", "key"))
        config = tc.Config(config_path, "", self.state, key_path, trigger_grace=int(GRACE_S))
        config = replace(config, secrets=entries, jobs=dict(self.jobs))
        values = {**self.tokens, "openai": "sk-1234567890"}
        return tc.LoadedConfig(config, {n: tc.Secret(text) for n, text in values.items()}, "")

    # --- the servers ---

    def reply(self, status: int, body: object, skew_s: float | None = None) -> tc.Answer:
        skew_s = self.keboola_skew if skew_s is None else skew_s
        date = datetime.fromtimestamp(EPOCH + self.loop.time() + skew_s, UTC)
        return tc.Answer(
            status, {"date": format_datetime(date, usegmt=True)}, json.dumps(body).encode()
        )

    def answer(self, url: str, headers: Mapping[str, str], params: Mapping[str, str]) -> tc.Answer:
        """Return what a GET brings. Raises ApiError where no answer comes."""
        path = urlsplit(url).path
        if "api.openai.com" in url:
            return self._openai(path, params)
        project = self._project_of(headers["X-StorageApi-Token"], url)
        if not project:
            return self.reply(401, {})
        if path == "/v2/storage/tokens/verify":
            return self.reply(200, {"owner": {"id": int(project)}})
        if path.startswith("/jobs/"):
            found = [job for job in self.keboola + self.foreign if path == f"/jobs/{job.id}"]
            return self.reply(200, self._row(found[0]))
        is_ill = self.search_fault in {"403", "500"} or self.random.random() < self.search_rate
        if is_ill or (self.search_fault == "second page" and "createdTimeTo" in params):
            return self.reply(int(self.search_fault) if self.search_fault.isdigit() else 403, {})
        if self.has_heavy_rows and int(params["limit"]) > HEAVY_ROWS:
            raise tc.TooLargeError("the answer is over 16 MiB", retryable=True)
        return self.reply(200, self._search(project, path, params))

    def _project_of(self, token: str, url: str) -> str:
        names = [name for name, known in self.tokens.items() if known == token]
        stack, project = TOKENS[names[0]] if names else ("", "")
        is_there = stack.partition(".")[2] == urlsplit(url).netloc.partition(".")[2]
        return project if is_there else ""

    def _openai(self, path: str, params: Mapping[str, str]) -> tc.Answer:
        now, skew_s, fault = self.loop.time(), self.openai_skew, self.openai_fault
        is_list = path.endswith("/batches")
        if fault == "dropped":
            raise tc.ApiError("ReadTimeout", retryable=True)
        if fault.isdigit() and (is_list or fault != "404"):
            return self.reply(int(fault), {}, skew_s)
        if not is_list:
            batch = self.batches[path.rpartition("/")[2]]
            return self.reply(200, batch.document(now, EPOCH + skew_s), skew_s)
        shown = [batch for batch in self.batches.values() if batch.listed <= now]
        ids = [b.id for b in sorted(shown, key=lambda batch: (-batch.created, batch.id))]
        if "after" in params and params["after"] not in ids:
            return self.reply(400, {}, skew_s)
        ids = ids[ids.index(params["after"]) + 1 if "after" in params else 0 :]
        page = [self.batches[i].document(now, EPOCH + skew_s) for i in ids[:PAGE_ROWS]]
        if fault == "stale":
            page = [row | {"status": "validating"} for row in page]
        return self.reply(200, {"data": page, "has_more": len(ids) > PAGE_ROWS}, skew_s)

    def _row(self, job: ServerJob) -> dict[str, Any]:
        is_finished = self.loop.time() >= job.ended
        created = datetime.fromtimestamp(EPOCH + job.created + self.keboola_skew, UTC)
        return {
            "id": job.id,
            "status": job.status if is_finished else "processing",
            "isFinished": is_finished,
            "project": {"id": job.project},
            "createdTime": created.isoformat(),
            "variableValuesData": job.payload["variableValuesData"],
        }

    def _search(self, project: str, path: str, params: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return a page of jobs, newest first; the old list, /jobs, has no other filters."""
        config, rows = params.get("configId", params.get("config")), []
        lowest, highest = params.get("createdTimeFrom", ""), params.get("createdTimeTo", "9")
        for job in sorted(self.keboola + self.foreign, key=lambda job: -job.created):
            row = self._row(job)
            is_fit = job.project == project and job.payload["config"] == config
            is_fit = is_fit and job.visible <= self.loop.time()
            if is_fit and lowest <= row["createdTime"] <= highest:
                is_mute = path == "/search/jobs" and not job.tells
                rows.append(row | ({"variableValuesData": None} if is_mute else {}))
        offset = int(params.get("offset", "0"))
        return rows[offset : offset + int(params["limit"])]

    def take_post(self, url: str, token: str, body: str, fate: str) -> tc.Answer:
        """Carry out a POST, or not, as its fate says; returns what Keboola answers."""
        project, (is_done, status) = self._project_of(token, url), FATES[fate]
        if not project:
            return self.reply(401, {})
        made = ServerJob(project, json.loads(body))
        made.told = {v["name"]: v["value"] for v in made.payload["variableValuesData"]["values"]}
        trigger = made.told["teckochecker_trigger_id"]
        before = self.open_posts.setdefault(trigger, (project, made.payload))
        text = f"{made.key} went to another target than before"
        self.claim(holds=before == (project, made.payload), text=text)
        if status in {400, 403}:
            del self.open_posts[trigger]
        if is_done:
            others = [job for job in self.keboola if trigger in job.told.values()]
            self._make(made, fate)
            is_new = len(others) <= self.forced[made.key]
            self.claim(holds=is_new, text=f"{made.key} was started twice")
        answer = self._row(made) if status == 201 else {"status": "created"}
        return self.reply(status or 201, answer)

    def _make(self, made: ServerJob, fate: str) -> None:
        """Make a Keboola job, with two of others after it, and see that it was ready."""
        now, more, dice = self.loop.time(), self.random.uniform, self.random.random
        made.id, made.created = str(1000 + len(self.keboola)), now
        made.visible = now + (more(0, 0.8 * GRACE_S) if dice() < 0.5 else 0)
        made.ended, made.tells = now + more(5, 300), dice() < 0.8
        made.status = "success" if dice() < 0.8 else "error"
        self.keboola.append(made)
        self.tell(f"Keboola job {made.id} {made.status} for {made.key} ({fate})")
        payload = {"config": made.payload["config"], "variableValuesData": {"values": [{}]}}
        for n in (1, 2):
            other = replace(made, id=f"{made.id}{n}", payload=payload, created=now + n / 4)
            self.foreign.append(other)
        if dice() < 0.3:
            self.loop.call_later(more(0, 4), self.accident, made.told["teckochecker_job"])
        told, job = made.told, self.jobs.get(made.told["teckochecker_job"])
        ids = [i for k in ("completed", "failed") for i in json.loads(told[f"batch_ids_{k}"])]
        is_ready = all(self.batches[i].ended is not None for i in ids)
        if job and job.on_deadline != "start":
            size = job.group_size or ""
            least = int(size) if size.isdigit() else 0
            is_ready = is_ready and told["batch_ids_pending"] == "[]" and len(ids) >= least
        if job and job.match:
            start = EPOCH + self.openai_skew + 1
            is_ready = is_ready and all(start + self.batches[i].created >= job.since for i in ids)
        self.claim(holds=is_ready, text=f"{made.key} was started too early, or from before `since`")


class ModelHttp(tc.Http):
    """The way out of a process, into the world."""

    def __init__(self, process: Process) -> None:
        self.process, self.world = process, process.world
        self.rules = tc.ProxyRules()

    def configure(self, config: tc.Config) -> None:
        self.max_concurrency = config.max_concurrency

    async def get(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str], timeout_s: float
    ) -> tc.Answer:
        del timeout_s
        self.process.point()
        self._check_get(url, params)
        await asyncio.sleep(self.world.random.uniform(0.01, 0.4))
        self.process.point()
        return self.world.answer(url, headers, params)

    def _check_get(self, url: str, params: Mapping[str, str]) -> None:
        if url.endswith("/search/jobs"):
            query = (
                "SELECT 1 FROM runs WHERE config_id = ? AND payload <> '' AND phase <> 'polling'"
            )
            is_stored = self.process.engine.store.one(query, params["configId"]) is not None
            self.world.claim(holds=is_stored, text="a search for what is not stored")

    async def post(
        self, url: str, headers: Mapping[str, str], body: str, timeout_s: float = 0.0
    ) -> tc.Answer:
        """Keboola carries a POST out also if the process dies meanwhile."""
        del timeout_s
        world, came = self.world, list[tc.Answer]()
        self._check_post(body)
        self.process.point()
        is_bad = world.random.random() < world.fault_rate
        fate = world.random.choice(list(FATES)) if is_bad else "fine"
        if is_bad and world.random.random() < 0.2:
            world.set_for(world.random.choice((2, 60)), "is_full", value=True)
        if fate == "unsent":
            await asyncio.sleep(0.1)
            raise tc.ApiError("ConnectError", retryable=True, sent=False)
        token = headers["X-StorageApi-Token"]
        take = lambda: came.append(world.take_post(url, token, body, fate))  # noqa: E731
        world.loop.call_later(world.random.uniform(0.05, 2), take)
        await asyncio.sleep(world.random.uniform(2.01, 3))
        self.process.point()
        if FATES[fate][1] is None:
            raise tc.ApiError("ReadError", retryable=True)
        return came[0]

    def _check_post(self, body: str) -> None:
        engine = self.process.engine
        runs = engine.store.runs("payload = :body", {"body": body})
        posted, now_s = engine.lock.last_post, engine.clock.uptime_s()
        job = engine.loaded.config.jobs.get(runs[0].job) if runs else None
        tasks = [task.get_coro() for task in asyncio.all_tasks()]
        driven: list[Any] = [c for c in tasks if getattr(c, "__name__", "") == "drive_run"]
        drivers = Counter(coro.cr_frame.f_locals["run_id"] for coro in driven if coro.cr_frame)
        for text, is_so in {
            "though a state file was deleted": self.process.is_doomed,
            "that is not stored as sending": [r.phase for r in runs] != [tc.Phase.SENDING],
            "that the lock file does not know": not posted or now_s - posted.uptime_s > 1,
            "for a paused or removed job": job is None or job.paused,
            "beside two drivers of one run": max(drivers.values(), default=1) > 1,
        }.items():
            self.world.claim(holds=not is_so, text=f"a POST {text}")


class ModelStore(tc.Store):
    """The real state file, on a disk that can be full, of a process that can die at any commit."""

    process: Process

    def execute(self, statements: Any) -> None:  # noqa: ANN401
        world = self.process.world
        self.process.point()
        if world.is_full or (world.bad_commits and world.random.random() < 0.4):
            world.bad_commits = max(0, world.bad_commits - 1)
            raise tc.StorageError("the disk is full")
        super().execute(statements)
        self.process.point()


class Process:
    """One process of the program."""

    engine: tc.Engine

    def __init__(self, world: World, *, once: bool = False, fuse: int = 0) -> None:
        self.world = world
        self.fuse = fuse  # it dies at that point; 0: at none
        self.is_dead = self.is_doomed = False
        self.stop = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(once=once))

    def point(self) -> None:
        """Die here, if it is to."""
        if self.fuse > 0:
            self.fuse -= 1
            if self.fuse == 0:
                self.kill()
        if self.is_dead:
            raise Killed

    def kill(self) -> None:
        self.is_dead = True
        self.task.cancel()

    async def _run(self, *, once: bool) -> None:
        world, clock, store = self.world, tc.Clock(), None
        clock._boot = world.boot
        lock = tc.StateLock(world.state, "daemon", clock.now())
        signals: Any = SimpleNamespace(stop=self.stop, now=asyncio.Event())
        try:
            store = ModelStore.open(world.state)
            assert isinstance(store, ModelStore)
            store.process = self
            around = (world.loaded(), store, lock, ModelHttp(self), clock, tc.Redactor())
            self.engine = tc.Engine(*around, once=once)
            await tc.run_engine(self.engine, signals, ())
        except tc.TeckoError as error:
            world.tell(f"the process ends: {error}")
        except BaseException as error:  # noqa: BLE001 - it may be dead
            world.claim(holds=self.is_dead, text=f"the process ended: {error!r}")
        finally:
            rest = asyncio.all_tasks() - {self.task, world.main}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            if store:
                store.close()
            os.close(lock._fd)
