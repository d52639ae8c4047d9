"""A world in which time is virtual: one machine, its disk and clock, OpenAI, Keboola, a person.

The engine, its carriers and pollers, the decisions and the SQLite store are the program's own. What
is played: the two servers (behind the client interface), the clock, the death of the process, the
full disk. The world knows what must never happen and notes it in `violations`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import json
import math
import random
import selectors
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import teckochecker
from teckochecker import (
    NO_MAIL,
    TERMINAL,
    Account,
    ApiError,
    Batch,
    Config,
    Engine,
    Event,
    Hook,
    Http,
    Job,
    KeboolaClient,
    KeboolaJob,
    KeboolaSecret,
    Limits,
    Mail,
    Moment,
    Note,
    Notifier,
    OpenAIClient,
    OpenAISecret,
    Page,
    Place,
    Redactor,
    Request,
    Secret,
    SecretSource,
    Setup,
    StateError,
    StateLock,
    StorageError,
    Store,
    Target,
    Told,
    Trigger,
    TriggerState,
    Watch,
    Work,
    batch_key,
)

EPOCH = 1_790_000_000.0  # the servers' clocks show this when a history begins
HOUR_S = 3600.0
PAGE_ROWS = 3
EU, US = "https://connection.eu.example", "https://connection.us.test"
NOWHERE = "https://connection.nowhere.test"
STACKS = {"keboola-eu": EU, "keboola-us": US, "keboola-eu-too": EU, "keboola-eu-other": EU}
PROJECTS = {"keboola-eu": 1, "keboola-us": 2, "keboola-eu-too": 1, "keboola-eu-other": 3}
FILES_WAIT_S = 300.0
OPENAI = ("openai-a", "openai-b")
POST_FAULTS = ("not sent", "limited", "curable", "rejected", "unknown", "slow", "no id", "any")
SEARCH_FAULTS = ("error", "incomplete", "now and then")
UNSETTLED = (TriggerState.INTENT, TriggerState.SENDING, TriggerState.UNKNOWN)
LOOK_FAULTS = ("error", "held", "missing", "now and then")


class Crash(BaseException):
    """SIGKILL, as well as one task of a process can play it."""


class VirtualSelector(selectors.SelectSelector):
    """Never waits: it moves the time on by as much as it was asked to wait."""

    now = 0.0
    rounds = 0  # of the loop, without any time passing

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everything waits for ever")
        if timeout > 0:
            self.now += timeout
            self.rounds = 0
        self.rounds += 1
        if self.rounds > 20_000:
            raise AssertionError("the loop spins: no time passes")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which an hour takes as long as what happens in it."""

    def __init__(self) -> None:
        self.virtual = VirtualSelector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


@dataclass(slots=True)
class ServerBatch:
    """A batch as OpenAI has it now."""

    status: str
    created_at: float | None
    ended_at: float | None = None
    ended: float = 0.0  # these are the world's seconds
    file_at: float | None = None  # when its file shows; None: it has none


@dataclass(slots=True)
class ServerJob:
    """A job that Keboola has started; times are the world's seconds."""

    id: str
    trigger: str
    target: Target
    project: int
    payload: Mapping[str, Any]
    created_at: float
    visible_at: float
    row: tuple[int, int, int]  # which state file, which row of it, which rerun


@dataclass(slots=True)
class Doubt:
    """A POST whose outcome the process cannot know, and the searches since that found nothing."""

    since: float
    clear_searches: list[float]  # when each began
    number: int = 1  # of such POSTs in a row
    asked_s: float = 0.0  # what the server wanted to be waited for,
    told: Process | None = None  # and who was told so


class World:
    """Everything around the process, and what it must never do."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a seed is the point
        self.loop = VirtualLoop()
        self.path = directory / "state.db"
        self.directory = directory
        self.grace_s = self.random.choice((30, 60, 300))
        self.clock_offset_s = 0.0
        self.was_clock_set = False
        self.openai_ahead_s = self.random.choice((0.0, 0.0, 3 * HOUR_S, -3 * HOUR_S))
        self.keboola_ahead_s = self.random.choice((0.0, 0.0, 5 * HOUR_S, -5 * HOUR_S))
        self.boot, self.booted_at = 1, 0.0
        self.batches: dict[str, ServerBatch] = {}
        self.keboola: list[ServerJob] = []
        self.post_fault = self.search_fault = self.look_fault = self.list_fault = ""
        self.list_shows = False  # whether Keboola's old list always shows what was started
        self.disk_full = 0.0  # the share of transactions that it refuses
        self.jobs: dict[str, Job] = {}
        self.stacks = dict(STACKS)  # as the config has them,
        self.tokens = {name: f"{name}-0" for name in STACKS}
        self.absent: set[str] = set()  # secrets that are not in it now
        self.whose = {self.tokens[name]: (url, PROJECTS[name]) for name, url in STACKS.items()}
        self.new_tokens = 0
        self.setup = self.make_setup()
        self.setup_at = 0.0
        self.process: Process | None = None
        self.incarnation = 0  # of the state file: it can be lost, or replaced by an older copy
        self.sent: dict[tuple[int, int], tuple[str, str]] = {}  # what this state file said was sent
        self.forced: collections.Counter[str] = collections.Counter()
        self.doubts: dict[tuple[str, Target], Doubt] = {}  # by trigger id and target
        self.posted: set[tuple[int, int, int]] = set()  # rows that something was posted for
        self.violations: list[str] = []
        self.story: list[str] = []

    @property
    def now(self) -> float:
        return self.loop.time()

    def tell(self, text: str) -> None:
        """Add a line to the history that a failure prints."""
        self.story.append(f"{self.now:10.2f} s  {text.replace(str(self.directory), '')}")

    def claim(self, holds: object, text: str) -> None:
        """Note a violation unless something holds."""
        if not holds:
            self.tell(f"!!! {text}")
            self.violations.append(text)

    # --- the config ---

    def make_setup(self) -> Setup:
        """Return what a config with the jobs of now would be, read and opened."""
        source = SecretSource("env", Secret("NAME"), Place(), (0, 0))
        config = Config(
            path=self.directory / "config.yaml",
            sha256="0" * 64,
            state_path=self.path,
            key_path=self.directory / "key",
            limits=Limits(trigger_grace_s=self.grace_s),
            notify=(Hook("hook", tuple(Told)),),
            openai={name: OpenAISecret(name, source, f"https://{name}.test") for name in OPENAI},
            keboola={
                name: KeboolaSecret(name, source, url)
                for name, url in self.stacks.items()
                if name not in self.absent
            },
            jobs=dict(self.jobs),
        )
        secrets = {n: Secret(token) for n, token in self.tokens.items() if n not in self.absent}
        return Setup(config, secrets | {name: Secret(name) for name in OPENAI})

    def save_config(self) -> None:
        """Write the config; a running daemon takes it soon."""
        self.setup = self.make_setup()
        if self.process:
            self.process.config_changed.set()

    def new_token(self, name: str, project: int | None = None) -> None:
        """Put another token into a secret, of its own project or of another one of its stack."""
        self.new_tokens += 1
        project = PROJECTS[name] if project is None else project
        self.tokens[name] = f"{name}-{self.new_tokens}"
        self.whose[self.tokens[name]] = STACKS[name], project

    # --- OpenAI ---

    def new_batch(self) -> str:
        """Start a batch, which now and then will not tell its times."""
        batch_id = f"batch_{len(self.batches):03}"
        told = self.random.random() < 0.8
        created_at = EPOCH + self.now + self.openai_ahead_s if told else None
        self.batches[batch_id] = ServerBatch("in_progress", created_at)
        return batch_id

    def end_batch(self, batch_id: str) -> None:
        """Let a batch come to its end, whichever."""
        batch = self.batches[batch_id]
        batch.status = self.random.choice(("completed", "completed", *sorted(TERMINAL)))
        batch.ended_at = EPOCH + self.now + self.openai_ahead_s if batch.created_at else None
        is_first = not batch.ended  # what is known of it already may be without a file
        batch.ended = batch.ended or self.now
        if is_first and self.random.random() < 0.2:
            batch.file_at = self.now + self.random.choice((0.0, 20.0, 250.0, 4000.0))

    # --- Keboola ---

    def post_outcome(self) -> tuple[bool, float, ApiError | None]:
        """Return what comes of a POST: is a job started, after how long is what answered."""
        kind, pick = self.post_fault, self.random.choice
        if kind == "any":
            kind = pick(("", *POST_FAULTS[:-1]))
        error = {
            "not sent": ApiError("no connection", retryable=True, sent=False),
            "limited": ApiError("slowly", status=429, retry_after_s=pick((None, 1.0, 400.0))),
            "curable": ApiError("not now", status=pick((401, 402, 403, 404, 409, 423))),
            "rejected": ApiError("never", status=pick((400, 422))),
            "unknown": ApiError("lost", status=pick((None, 408, 500, 502, 503)), retryable=True),
            "slow": ApiError("no whole answer within 30s", retryable=True),
            "no id": ApiError("no job", status=201, retryable=True),
        }.get(kind)
        is_started = kind in ("", "no id")
        if kind in ("unknown", "slow", "limited"):
            is_started = self.random.random() < 0.6
        return is_started, 30.0 if kind == "slow" else self.random.uniform(0.01, 2), error

    @staticmethod
    def post_fault_tells(error: ApiError | None) -> bool:
        """Return whether an outcome of a POST leaves no doubt."""
        status = error.status if error else 200
        refused = status is not None and 400 <= status < 500 and status not in {408, 429}
        return error is None or not error.sent or refused

    def start_job(self, trigger: Trigger, row: tuple[int, int], took_s: float) -> ServerJob:
        """Start a Keboola job, which the search will show within the grace after the answer."""
        lag = self.random.choice((0.0, 0.5, 0.95, self.random.uniform(0, 0.95)))
        number = len(self.keboola) + 1
        job = ServerJob(
            id=f"kbc-{number}",
            trigger=trigger.id,
            target=trigger.target,
            project=int(trigger.project_id or 0),
            payload=json.loads(trigger.payload),
            created_at=self.now + self.random.uniform(0, took_s),
            visible_at=self.now + took_s + lag * self.grace_s,
            row=(self.incarnation, *row),
        )
        self.tell(f"Keboola starts {job.id} for {trigger.id[:6]}, shown at {job.visible_at:.2f} s")
        self.keboola.append(job)
        self.check_jobs(job)
        return job

    def check_jobs(self, new: ServerJob) -> None:
        """No piece of work is started twice, but for what a person has forced."""
        most = 1 + self.forced[new.trigger]
        what = new.trigger, new.target, new.project
        alike = [j.id for j in self.keboola if (j.trigger, j.target, j.project) == what]
        self.claim(len(alike) <= most, f"started {len(alike)} times in one target: {alike}")
        alike = [j.id for j in self.keboola if j.row == new.row]
        self.claim(len(alike) <= most, f"one row was started {len(alike)} times: {alike}")

    def check_doubt(self, trigger: Trigger) -> None:
        """No POST follows an unknown one before two searches, the last one after the grace."""
        doubt = self.doubts.get((trigger.id, trigger.target))
        if doubt:
            searches = doubt.clear_searches
            self.claim(len(searches) >= 2, f"a POST after {len(searches)} clear searches")
            asked_s = doubt.asked_s if doubt.told is self.process else 0.0
            wait_s = min(HOUR_S, max(asked_s, self.grace_s * 2.0 ** (doubt.number - 1)))
            if searches:
                waited_s = searches[-1] - doubt.since
                claimed = f"a POST after {waited_s:.0f} s, not {wait_s:.0f} s"
                self.claim(waited_s >= wait_s, claimed)

    def check_target(self, trigger: Trigger, work: Work, job: Job | None) -> None:
        """The first POST for a row is what the config says by now; later ones change nothing."""
        row = self.incarnation, work.id, trigger.rerun
        setup = self.process.engine.setup if self.process else self.setup
        is_same = job is not None and {b.id for b in work.batches} == set(job.batch_ids)
        if row not in self.posted and job and is_same:
            wanted = setup.config.target(job)
            self.claim(trigger.target == wanted, f"a POST to {trigger.target}, not {wanted}")
            values = json.loads(trigger.payload)["variableValuesData"]["values"]
            told = {item["name"]: item["value"] for item in values}
            self.claim(dict(job.variables).items() <= told.items(), "a POST with old variables")
        self.posted.add(row)

    def check_files(self, work: Work) -> None:
        """No file is left out that could still come, within the minutes that it may take."""
        for known in work.batches:
            batch = self.batches[known.id]
            is_early = self.now - batch.ended < FILES_WAIT_S
            missing = batch.file_at is not None and not known.output_file_id
            claimed = f"{known.id} is started without its file"
            self.claim(not (missing and is_early) or self.was_clock_set, claimed)

    def all_shown(self) -> bool:
        """Return whether the search shows every Keboola job by now, and no POST is under way."""
        posting = self.process and any(w.is_posting for w in self.process.engine.watches.values())
        return not posting and all(job.visible_at <= self.now for job in self.keboola)

    # --- the state file ---

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """Open the state file of its name, as a command does, if there is one with a schema."""
        if not self.path.exists() or not self.path.stat().st_size:
            yield None
            return
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            has_schema = db.execute("PRAGMA user_version").fetchone()[0]
            yield db if has_schema else None

    def forget(self, content: bytes | None) -> None:
        """Delete the state file, or replace it by an older copy."""
        self.incarnation += 1
        self.doubts = {}
        self.sent = {}
        for name in ("-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + name).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        if content is not None:
            self.path.write_bytes(content)
            self.sent = dict(self._sent_rows())
        if self.process:
            self.process.may_refuse = True

    def move_clock(self, by_s: float) -> None:
        """Set the machine's clock."""
        self.clock_offset_s += by_s
        self.was_clock_set = True

    def reboot(self) -> None:
        """Begin another boot, with an uptime of its own."""
        self.boot, self.booted_at = self.boot + 1, self.now

    def _sent_rows(self) -> list[tuple[tuple[int, int], tuple[str, str]]]:
        process = self.process
        if process and not process.task.done() and process.store.is_in_place():
            return sent_rows(process.store._db)  # an open connection costs less than a new one
        with self.reading() as db:
            return sent_rows(db) if db else []

    def check_state(self) -> None:
        """What was once recorded as sent is still there, and says the same."""
        rows = dict(self._sent_rows())
        for key, value in self.sent.items():
            self.claim(rows.get(key) == value, f"{value} was recorded as sent, now {rows.get(key)}")


def sent_rows(db: sqlite3.Connection) -> list[tuple[tuple[int, int], tuple[str, str]]]:
    """Return work, rerun, trigger id and Keboola job of what a state file says was sent."""
    rows = db.execute("SELECT job_id, rerun, id, keboola_job_id FROM triggers WHERE state = 'sent'")
    return [((row[0], row[1]), (row[2], row[3])) for row in rows]


class ProcessClock:
    """The clock as one process sees it."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def wall(self) -> float:
        return EPOCH + self.process.world.now + self.process.world.clock_offset_s

    def mono(self) -> float:
        return self.process.world.now

    def moment(self) -> Moment:
        world = self.process.world
        return Moment(self.wall(), f"boot-{world.boot}", world.now - world.booted_at)

    def jitter(self) -> float:
        return self.process.world.random.random()


class ModelStore(Store):
    """The real store, on a disk that may be full, in a process that may die in any commit."""

    process: Process
    _news: dict[tuple[int, int], tuple[str, str]]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self._news = {}
        self.process.point("begin")
        with super().transaction():
            yield
            self.process.point("before the commit")
            world = self.process.world
            if world.disk_full and world.random.random() < world.disk_full:
                self.process.may_refuse = True
                raise sqlite3.OperationalError("database or disk is full")
        if self.is_in_place():
            world.sent.update(self._news)
        self.process.point("after the commit")

    def sync(
        self, jobs: Mapping[str, Job], targets: Mapping[str, Target], works: Iterable[Work]
    ) -> list[Work]:
        """A job that has left is taken over by a new name with its ids and target."""
        keys = {batch_key(job.batch_ids) for job in jobs.values()}
        before = self.known(keys)
        live = super().sync(jobs, targets, works)
        names = {(row.name, row.batch_ids) for row in before}
        takers: collections.Counter[tuple[frozenset[str], Target]] = collections.Counter()
        for name, job in jobs.items():
            ids = frozenset(job.batch_ids)
            if (name, ids) not in names:
                takers[ids, targets[name]] += 1
        spare = collections.Counter((r.batch_ids, r.target) for r in before if r.name not in jobs)
        new = len(self.known(keys)) - len(before)
        expected = sum(max(0, count - spare[key]) for key, count in takers.items())
        self.process.world.claim(new == expected, f"{new} pieces of work are new, not {expected}")
        self.process.world.claim(
            {work.id for work in live} == {work.id for work in self.works()},
            "the live works are others than those of the state file",
        )
        return live

    def save(
        self,
        changes: Iterable[tuple[Work, Work]],
        events: Sequence[Event],
        now: float,
        mail: Mail = NO_MAIL,
    ) -> None:
        """Webhooks are told of each start with its commit, and of each alarm once."""
        if self.process.is_dead:
            raise Crash
        changes = list(changes)
        claim = self.process.world.claim
        started = [str(w.id) for old, w in changes if w.is_finished and not old.is_finished]
        told = [message.subject for message in mail.messages if not message.lasts]
        claim(started == told, f"{started} are started, and {told} told")
        standing = self.alarms()
        for message in mail.messages:
            is_known = (message.event, message.subject) in standing
            claim(message.is_over == is_known, f"told twice, or over what never was: {message}")
        claim(len(mail.copies) == len(mail.messages), "a message without a copy")
        super().save(changes, events, now, mail)

    def _write(self, before: Work, after: Work) -> None:
        claim = self.process.world.claim
        for batch in after.batches:
            old = self._db.execute(
                "SELECT status FROM batches WHERE job_id = ? AND id = ?", (after.id, batch.id)
            ).fetchone()
            kept = old[0] not in TERMINAL or old[0] == batch.status or batch in before.batches
            claim(kept, f"{batch.id} was {old[0]} and becomes {batch.status}")
        if after.trigger and after.trigger != before.trigger:
            self._check_trigger(after, after.trigger)
        super()._write(before, after)

    def _check_trigger(self, work: Work, new: Trigger) -> None:
        claim = self.process.world.claim
        key = work.id, new.rerun
        old = self._db.execute(
            "SELECT id, state, keboola_job_id, sending_at, payload, project_id, stack_url,"
            " component_id, config_id FROM triggers WHERE job_id = ? AND rerun = ?",
            key,
        ).fetchone()
        if old and old["sending_at"] is not None and old["state"] != "rejected":
            target = new.target.stack_url, new.target.component_id, new.target.config_id
            now = (new.payload, new.project_id, *target)
            was_known = old["project_id"] is not None  # else an earlier version has begun it
            then = (old["payload"], old["project_id"] if was_known else now[1], *tuple(old)[6:])
            claim(now == then, f"what was once sent becomes {now}")
        if old:
            claim(old[0] == new.id, f"the trigger id {old[0][:6]} becomes {new.id[:6]}")
            same = (new.state, new.keboola_job_id) == ("sent", old[2])
            claim(old[1] != "sent" or same, f"{old[2]} was sent, and its row becomes {new.state}")
        else:
            ids = sorted(batch.id for batch in work.batches)
            identity = json.dumps([1, work.name, ids, new.rerun], separators=(",", ":"))
            own_id = hashlib.sha256(identity.encode()).hexdigest()
            claim(new.id == own_id, f"a new trigger has the id {new.id[:6]}, not {own_id[:6]}")
        twins = self._db.execute(
            "SELECT count(*) FROM triggers WHERE job_id = ? AND rerun <> ? AND id = ?",
            (*key, new.id),
        ).fetchone()[0]
        claim(not twins, "two reruns have one trigger id")
        if new.state == TriggerState.SENT:
            self._news[key] = new.id, str(new.keboola_job_id)

    def is_committed(self, trigger: str) -> bool:
        """Return whether the state file has a trigger."""
        row = self._db.execute("SELECT 1 FROM triggers WHERE id = ?", (trigger,)).fetchone()
        return row is not None

    def row_of(self, payload: str) -> tuple[Trigger, Work] | None:
        """Return what is committed about a POST that is about to be sent."""
        works = [work for work in self.works() if work.trigger]
        for work in works:
            trigger = work.trigger
            if trigger and trigger.state == TriggerState.SENDING and trigger.payload == payload:
                return trigger, work
        return None


class ModelEngine(Engine):
    """The real engine, whose Keboola is the world's; it gets more answers than it asked for."""

    process: Process

    def keboola(self, name: str) -> KeboolaClient:
        stack_url = self.setup.config.keboola[name].stack_url
        return FakeKeboola(self.process, stack_url, self.setup.secrets[name])

    def record(
        self, looks: Iterable[tuple[Watch, Mapping[str, Batch | ApiError]]], begun_at: float
    ) -> list[Watch]:
        return super().record([(w, {**self._late(w), **seen}) for w, seen in looks], begun_at)

    def _late(self, watch: Watch) -> dict[str, Batch]:
        """Return, now and then, batches that have ended as if they went on."""
        if self.process.world.random.random() > 0.2:
            return {}
        ended = [batch for batch in watch.work.batches if batch.status in TERMINAL]
        return {batch.id: replace(batch, status="in_progress") for batch in ended}

    def _take_request(self, request: Request) -> None:
        for watch in self.watches.values():
            trigger = watch.work.trigger
            if request.force and watch.work.name == request.job and watch.job and trigger:
                self.process.world.forced[trigger.id] += trigger.state in UNSETTLED
                self.process.world.doubts.pop((trigger.id, trigger.target), None)
        super()._take_request(request)

    def note_bug(self, error: Exception, job: str) -> None:
        self.process.world.claim(holds=False, text=f"internal error in {job}: {error!r}")
        super().note_bug(error, job)


class FakeOpenAI(OpenAIClient):
    """Tells the world's batches, or what is wrong."""

    def __init__(self, account: Account, http: Http, note: Note | None = None) -> None:
        super().__init__(account, http, note)
        self._account = account
        clock = http.clock
        if not isinstance(clock, ProcessClock):
            raise TypeError("a process of the model has its own clock")
        self._process = clock.process

    async def batch(self, batch_id: str) -> Batch:
        process, world = self._process, self._process.world
        process.point("look")
        setup = process.engine.setup
        asking = [
            job
            for job in setup.config.jobs.values()
            if batch_id in job.batch_ids
            and not job.rests
            and teckochecker.account_of(setup, job) == self._account
        ]
        is_new = process.applied_at == world.now
        world.claim(asking or is_new, f"{batch_id} is looked at, of jobs that are paused or gone")
        world.claim(process.may_ask(), f"{batch_id} is looked at after SIGTERM")
        fault = world.look_fault  # as it is now: the answer may be on its way for long
        await asyncio.sleep(world.random.uniform(0.01, 1))
        process.point("looked")
        if fault == "now and then":
            fault = world.random.choice(("", "error"))
        if fault:
            status = {"error": 503, "held": 429, "missing": 404}[fault]
            wait_s = 900.0 if fault == "held" else None
            raise ApiError(fault, status=status, retryable=True, retry_after_s=wait_s)
        return self._batch(batch_id)

    def _batch(self, batch_id: str) -> Batch:
        batch = self._process.world.batches[batch_id]
        is_there = batch.file_at is not None and batch.file_at <= self._process.world.now
        return Batch(
            batch_id,
            batch.status,
            completed=None if batch.file_at is None else 1,
            output_file_id="file" if is_there else None,
            created_at=batch.created_at,
            ended_at=batch.ended_at,
        )

    async def page(self, cursor: str | None, known: Mapping[str, Batch]) -> Page:
        """Return some rows of the list, which may lack any, repeat any, and lie about its end."""
        process, world = self._process, self._process.world
        process.point("page")
        world.claim(process.may_ask(), "a page is read after SIGTERM")
        await asyncio.sleep(world.random.uniform(0.01, 1))
        process.point("page read")
        if world.list_fault == "none" or world.random.random() < 0.1:
            status = 405 if world.list_fault == "none" else world.random.choice((404, 429, 500))
            raise ApiError("no page", status=status, retryable=status in {429, 500})
        ids = list(reversed(world.batches))
        if world.list_fault == "lies":
            ids = world.random.choices(ids, k=len(ids))
        elif cursor:
            ids = ids[ids.index(cursor) + 1 :]
        rows = ids[:PAGE_ROWS]
        created = [world.batches[key].created_at for key in rows] or [None]
        return Page(
            ids=rows,
            batches={key: self._batch(key) for key in rows if key in known},
            newest_at=created[0],
            oldest_at=created[-1],
            has_more=len(ids) > len(rows) or world.list_fault == "lies",
        )


class FakeKeboola(KeboolaClient):
    """Starts and finds the world's Keboola jobs, or not."""

    def __init__(self, process: Process, stack_url: str, token: Secret) -> None:
        super().__init__(stack_url, token, process.http, process.engine._learned)
        self._process = process
        self._url, self._value = stack_url, token.reveal()

    def _whose(self) -> int:
        """Return the project of the token; raises ApiError where it is of no use."""
        if self._url not in STACKS.values():
            raise ApiError("no connection", retryable=True, sent=False)
        url, project = self._process.world.whose.get(self._value, ("", 0))
        if url != self._url:
            raise ApiError("Keboola answered 401: Invalid access token", status=401)
        return project

    async def verify(self) -> Mapping[str, Any]:
        process, world = self._process, self._process.world
        process.point("verify")
        await asyncio.sleep(world.random.uniform(0.01, 1))
        process.point("verified")
        return {"owner": {"id": self._whose()}}

    def behind_s(self) -> float:
        world = self._process.world
        return world.clock_offset_s - world.keboola_ahead_s

    async def create(self, payload: str) -> KeboolaJob:
        process, world = self._process, self._process.world
        process.point("POST")
        committed = process.store.row_of(payload)
        world.claim(committed, "a POST without a committed `sending`")
        if not committed:
            raise Crash
        trigger, work = committed
        world.claim(trigger.target.stack_url == self._url, "a POST to another stack")
        project = world.whose.get(self._value, ("", 0))[1]
        is_ours = not project or str(project) == trigger.project_id
        world.claim(is_ours, f"a POST for project {trigger.project_id} to {project}")
        world.claim(process.engine.store.is_in_place(), "a POST without its state file")
        job = process.engine.setup.config.jobs.get(work.name)
        world.claim(job and not job.rests, f"a POST for {work.name}, which is paused or gone")
        world.claim(not process.engine.is_stopping, "a POST after SIGTERM")
        world.claim(all(b.status in TERMINAL for b in work.batches), "a POST before the end")
        world.check_doubt(trigger)
        world.check_target(trigger, work, job)
        world.check_files(work)
        old = world.doubts.get((trigger.id, trigger.target))
        doubt = Doubt(world.now, [], old.number + 1 if old else 1)
        world.doubts[trigger.id, trigger.target] = doubt
        is_started, took_s, error = world.post_outcome()
        try:
            self._whose()
        except ApiError as refusal:
            is_started, error = False, refusal
        started = world.start_job(trigger, (work.id, trigger.rerun), took_s) if is_started else None
        world.tell(f"POST for {trigger.id[:6]} ({work.name}): {error or 'answered'}")
        process.point("POST handled")
        await asyncio.sleep(took_s)
        process.point("POST answered")
        doubt.since = world.now
        doubt.asked_s, doubt.told = (error.retry_after_s or 0.0) if error else 0.0, process
        if world.post_fault_tells(error):
            world.doubts.pop((trigger.id, trigger.target), None)
        if error or started is None:
            raise error or ApiError("nothing")
        return self._as_told(started)

    async def search(self, target: Target, since: float | None, trigger: str) -> list[KeboolaJob]:
        process, world = self._process, self._process.world
        process.point("search")
        world.claim(target.stack_url == self._url, "a search on another stack than the intent's")
        project = self._whose()
        world.claim(process.store.is_committed(trigger), "a search without a committed intent")
        began = world.now
        await asyncio.sleep(world.random.uniform(0.01, 1))
        hits = [
            job
            for job in world.keboola
            if job.visible_at <= world.now
            and (job.trigger, job.target, job.project) == (trigger, target, project)
            and (since is None or EPOCH + job.created_at + world.keboola_ahead_s >= since)
        ]
        await asyncio.sleep(world.random.uniform(0.01, 1))
        process.point("searched")
        fault = world.search_fault
        if fault == "now and then":
            fault = world.random.choice(("", "error", "incomplete"))
        if fault == "error" or (fault and (not hits or world.random.random() < 0.5)):
            raise ApiError("the search is not well", status=503, retryable=True)
        if not hits and (trigger, target) in world.doubts:
            world.doubts[trigger, target].clear_searches.append(began)
        return [self._as_told(job) for job in sorted(hits, key=lambda job: job.created_at)]

    async def listed(self, target: Target, trigger: str) -> list[KeboolaJob]:
        """Now and then, the old list shows what the search does not yet."""
        process, world = self._process, self._process.world
        process.point("list")
        await asyncio.sleep(world.random.uniform(0.01, 1))
        process.point("listed")
        shown = world.keboola if world.list_shows or world.random.random() < 0.3 else ()
        project = world.whose.get(self._value, ("", 0))[1]
        wanted = trigger, target, project
        hits = [job for job in shown if (job.trigger, job.target, job.project) == wanted]
        return [self._as_told(job) for job in sorted(hits, key=lambda job: job.created_at)]

    def _as_told(self, job: ServerJob) -> KeboolaJob:
        ahead_s = self._process.world.keboola_ahead_s
        created = datetime.fromtimestamp(EPOCH + job.created_at + ahead_s, UTC)
        return KeboolaJob(job.id, "created", None, created, job.trigger)


class ModelSignals:
    """SIGTERM, without a signal."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.now = asyncio.Event()


class Process:
    """One process, from its start to its end, however that comes."""

    def __init__(self, world: World, *, once: bool) -> None:
        """Start like `serve`. Raises LockedError or StateError."""
        self.world = world
        self.once = once
        self.is_dead = False
        self.may_refuse = False  # it met a full disk, or its state file was taken away
        self.crash_in: int | None = None
        self.applied_at = -1.0
        self.stopped_at = math.inf
        self.config_changed = asyncio.Event()
        self.signals = ModelSignals()
        self._lock = StateLock(world.path, "model")
        try:
            store = ModelStore.open(world.path)
        except BaseException:
            self._lock.close()
            raise
        assert isinstance(store, ModelStore)
        store.process = self
        clock = ProcessClock(self)
        self.http = http = Http(world.setup.config.limits, Redactor(), clock)
        self.engine = ModelEngine(world.setup, store, self._lock, http, once=once)
        self.engine.process = self
        self.engine.store = self.store = store
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        """Run to the end, and see that the end has a reason."""
        try:
            self.applied_at = self.world.now
            teckochecker.note_loaded(self.engine, self.engine.setup)
            helpers = () if self.once else (self._follow_config,)
            signals: Any = self.signals
            await teckochecker.run_engine(self.engine, signals, helpers, Notifier({}))
        except (Crash, asyncio.CancelledError):
            self.world.claim(self.is_dead, "the process was cancelled")
        except BaseExceptionGroup as group:
            _, others = group.split(Crash)
            self.world.claim(others is None, f"the process ended with {others!r}")
        except (StateError, StorageError) as error:
            self.world.claim(self.may_refuse, f"the process ended with: {error}")
            self.world.tell(f"the process ends: {error}")
        except Exception as error:  # noqa: BLE001 - a bug of the program is a finding
            self.world.claim(holds=False, text=f"the process ended with {error!r}")
        finally:
            self.store.close()
            self._lock.close()

    async def _follow_config(self) -> None:
        """Take new configs as the program's Reloader does: again, while that cannot be stored."""
        while True:
            await self.config_changed.wait()
            self.config_changed.clear()
            setup = self.world.setup
            self.applied_at = self.world.now
            try:
                self.engine.apply(setup)
                teckochecker.note_loaded(self.engine, setup)
            except (StorageError, sqlite3.Error):
                self.config_changed.set()
                await asyncio.sleep(2)

    def point(self, name: str) -> None:
        """Be a place where the process can die."""
        if self.is_dead:
            raise Crash
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.world.tell(f"killed: {name}")
                self.die()
                raise Crash

    def may_ask(self) -> bool:
        """Return whether OpenAI may be asked: not after SIGTERM, but for what has just begun."""
        return self.world.now <= self.stopped_at

    def die(self) -> None:
        """From now on the process does nothing; Keboola finishes what it has begun, in time."""
        self.is_dead = True
        latest = self.world.now + 0.95 * self.world.grace_s
        for job in self.world.keboola:
            job.visible_at = min(job.visible_at, max(latest, job.created_at))

    async def kill(self) -> None:
        """End it now, wherever its tasks are."""
        self.die()
        me = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not me]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Ask for an orderly end and wait for it."""
        self.stopped_at = min(self.stopped_at, self.world.now)
        self.signals.stop.set()
        await asyncio.wait({self.task})


def say_nothing(_: Event) -> None:
    """Write no log."""


@contextlib.contextmanager
def played() -> Iterator[None]:
    """Put the world's OpenAI in the place of the real one, and keep everything quiet and fast."""
    with (
        mock.patch.object(teckochecker, "OpenAIClient", FakeOpenAI),
        mock.patch.object(teckochecker, "LIST_MIN", 2),
        mock.patch.object(teckochecker, "NEAR", 2),
        mock.patch.object(teckochecker, "PAGE_ROWS", PAGE_ROWS),
        mock.patch.object(teckochecker, "say", say_nothing),
        mock.patch.object(teckochecker, "REQUESTS_LOOK_S", 30.0),
        mock.patch.object(StateLock, "PATIENCE_S", -1.0),
    ):
        yield
