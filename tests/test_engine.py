"""The engine, step by step: one scene each, in virtual time, where chance has no part.

The random histories of `test_model.py` go through most of this as well. Here, each rule has a scene
that cannot do without it; a scene takes milliseconds, however many hours it plays.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import trigger_id
from model import EU, NOWHERE, US, Crash, Process, ServerJob, World, played

import teckochecker as tc
from teckochecker import (
    ApiError,
    Job,
    Secret,
    StateLock,
    Store,
    Target,
    Trigger,
    TriggerState,
    Work,
)

GRACE_S = 60
HOUR_S = 3600.0
Outcome = tuple[bool, float, ApiError | None]  # is a job started, after how long is what answered
TARGET = Target(EU, "component", "1")


def lost(after_s: float = 1.0, *, is_started: bool = False) -> Outcome:
    """An answer that never came."""
    return is_started, after_s, ApiError("reset", retryable=True)


NOT_REACHED: Outcome = (False, 1.0, ApiError("refused", retryable=True, sent=False))
REJECTED: Outcome = (False, 1.0, ApiError("never", status=400))


class Steady(random.Random):
    """Chance that always says the same: the longest time, the first choice."""

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002 - as random.Random has it
        return b

    def choice(self, seq: Any) -> Any:  # noqa: ANN401 - of anything
        return seq[0]

    def random(self) -> float:
        return 0.5


class Stage(World):
    """A world whose servers do as they are told: a look takes a second, a search takes two."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, seed=0)
        self.random = Steady()
        self.grace_s = GRACE_S
        self.outcomes: list[Outcome] = []  # of the next POSTs; then they are answered
        self.lag_s = 0.0  # from an answer until the search shows the job
        self.points: list[str] = []  # what processes have come to
        self.die_at = ""
        self.has_bugs = False  # the program, on purpose
        self.bugs_met = 0

    def claim(self, holds: object, text: str) -> None:
        if self.has_bugs and text.startswith("internal error"):
            self.bugs_met += 1
        else:
            super().claim(holds, text)

    def close(self) -> None:
        self.loop.close()

    def post_outcome(self) -> Outcome:
        return self.outcomes.pop(0) if self.outcomes else (True, 1.0, None)

    def start_job(self, trigger: Trigger, row: tuple[int, int], took_s: float) -> ServerJob:
        job = super().start_job(trigger, row, took_s)
        job.visible_at += self.lag_s
        return job

    def add(self, name: str = "job", *, has_ended: bool = True) -> Job:
        """Add a job with one batch, looked at every second."""
        batch_id = self.new_batch()
        if has_ended:
            self.end_batch(batch_id)
        job = Job(name, (batch_id,), "openai-a", "keboola-eu", "component", "1", poll_interval_s=1)
        self.change(job)
        return job

    def change(self, job: Job) -> None:
        """Write a job into the config."""
        self.jobs[job.name] = job
        self.save_config()

    def remove(self, job: Job) -> None:
        """Take a job out of the config."""
        del self.jobs[job.name]
        self.save_config()

    def start(self, *, once: bool = False) -> Process:
        """Start the process."""
        self.process = Actor(self, once=once)
        return self.process

    async def restart(self) -> Process:
        """Kill the process and start the daemon."""
        await self.running.kill()
        return self.start()

    @property
    def running(self) -> Process:
        assert self.process
        return self.process

    def count(self, point: str) -> int:
        """Return how often a process came to a point."""
        return self.points.count(point)

    def works(self) -> dict[str, Work]:
        """Return what is committed of the jobs, by name."""
        return {work.name: work for work in self.running.store.works()}

    def trigger(self) -> Trigger | None:
        """Return what is committed of the job's trigger."""
        work = self.works().get("job")
        return work.trigger if work else None

    def state(self) -> TriggerState | None:
        """Return the committed state of the job's trigger."""
        trigger = self.trigger()
        return trigger.state if trigger else None

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the fields, and the level, of the events of a name in the state file."""
        with self.reading() as db:
            assert db
            rows = db.execute(
                "SELECT level, fields FROM logs WHERE event = ? ORDER BY id", (event,)
            )
            return [{"level": level, **json.loads(fields)} for level, fields in rows]

    def retry(self, *, force: bool = False) -> None:
        """Do as `retry job` does, and have it taken at once."""
        self.running.store.ask(self.works()["job"], force=force, now=0)
        self.running.engine.take_requests(at_once=True)

    async def until(self, condition: Callable[[], object], within_s: float = 300.0) -> None:
        """Let time go by until something holds; stays close to the moment when it begins to."""
        deadline = self.now + within_s
        while not self.violations and not condition():
            assert self.now < deadline, "\n".join(["never comes about:", *self.points, *self.story])
            await asyncio.sleep(0.05)
        assert self.violations == [], "\n".join(self.story)


class Actor(Process):
    """A process that tells what it comes to, and can be told where to die."""

    def point(self, name: str) -> None:
        world = self.world
        assert isinstance(world, Stage)
        if not self.is_dead:
            world.points.append(name)
        if name == world.die_at:
            world.die_at = ""
            self.die()
            raise Crash
        super().point(name)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with played(), closing(found := Stage(tmp_path)):
        yield found


def play(stage: Stage, scene: Coroutine[Any, Any, None]) -> None:
    """Play a scene to its end; nothing may happen in it that must never happen."""

    async def whole() -> None:
        try:
            await scene
        finally:
            if stage.process and not stage.process.task.done():
                await stage.process.kill()

    with asyncio.Runner(loop_factory=lambda: stage.loop) as runner:
        runner.run(whole())
    assert stage.violations == [], "\n".join(stage.story)


# ---- the steps in their order ----


def test_each_step_is_committed_before_the_next(stage: Stage) -> None:
    """The intent and its project are stored before the search, `sending` before the POST."""

    async def scene() -> None:
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("verify") == 1)
        assert stage.state() == "intent"
        await stage.until(lambda: stage.count("search") == 1)
        trigger = stage.trigger()
        assert trigger
        assert trigger.project_id == "1"
        await stage.until(lambda: stage.count("POST handled") == 1)
        assert stage.state() == "sending"
        await stage.until(lambda: stage.state() == "sent")
        assert (stage.count("search"), stage.count("POST")) == (1, 1)
        work = stage.works()["job"]
        assert work.trigger
        assert work.trigger.keboola_job_id == stage.keboola[0].id
        assert work.completed_at == work.trigger.sent_at

    play(stage, scene())


def test_a_result_is_kept_until_it_can_be_committed(stage: Stage) -> None:
    """With a full disk, the answer waits in memory: no search has to find it again."""

    async def scene() -> None:
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("POST handled") == 1)
        stage.disk_full = 1.0
        await asyncio.sleep(100)
        assert stage.state() == "sending"
        stage.disk_full = 0.0
        await stage.until(lambda: stage.state() == "sent", 10)
        assert (stage.count("search"), stage.count("POST")) == (1, 1)

    play(stage, scene())


def test_nothing_begins_after_sigterm(stage: Stage) -> None:
    """While a POST in flight gets its time, a search that comes back clear begins no other."""

    async def scene() -> None:
        stage.outcomes = [(True, 10.0, None)]
        stage.add()
        later = stage.add("later", has_ended=False)
        stage.start()
        await stage.until(lambda: stage.count("POST handled") == 1)
        stage.end_batch(later.batch_ids[0])
        await stage.until(lambda: stage.count("search") == 2)
        await stage.running.stop()
        assert (stage.count("POST"), stage.count("POST answered")) == (1, 1)
        with stage.reading() as db:
            assert db
            states = [row[0] for row in db.execute("SELECT state FROM triggers ORDER BY job_id")]
        assert states == ["sent", "intent"]

    play(stage, scene())


def add_many(stage: Stage) -> Job:
    """Add a job with ten batches, of which two are asked for at a time."""
    batch_ids = tuple(stage.new_batch() for _ in range(10))
    job = Job("many", batch_ids, "openai-a", "keboola-eu", "component", "1", poll_interval_s=3600)
    stage.change(job)
    return job


def test_no_batch_is_asked_for_after_sigterm(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a POST in flight gets its time, a look that is under way goes no further."""
    monkeypatch.setattr(tc, "LIST_MIN", 100)
    monkeypatch.setattr(tc.Poller, "ASKED_AT_ONCE", 2)

    async def scene() -> None:
        stage.outcomes = [(True, 10.0, None)]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("POST handled") == 1)
        add_many(stage)
        await stage.until(lambda: stage.count("look") == 1 + 4)
        await stage.running.stop()
        assert stage.count("POST answered") == 1
        assert (stage.count("look"), stage.count("looked")) == (1 + 4, 1 + 2)

    play(stage, scene())


@pytest.mark.parametrize("change", ["account", "key"])
def test_a_key_that_is_gone_is_not_used(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """When a job goes to another key, its look with the old one ends, and asks no more."""
    monkeypatch.setattr(tc, "LIST_MIN", 100)
    monkeypatch.setattr(tc.Poller, "ASKED_AT_ONCE", 2)

    async def scene() -> None:
        job = add_many(stage)
        stage.start()
        await stage.until(lambda: stage.count("look") == 4)
        stage.change(replace(job, openai_secret="openai-b") if change == "account" else job)
        if change == "key":
            secrets = {**stage.setup.secrets, "openai-a": Secret("a new key")}
            stage.setup = replace(stage.setup, secrets=secrets)
        await stage.until(lambda: stage.works()["many"].last_check_at)
        assert (stage.count("look"), stage.count("looked")) == (4 + 10, 2 + 10)

    play(stage, scene())


# ---- an unknown outcome ----


def test_an_unknown_outcome_takes_two_clear_searches_and_the_grace(stage: Stage) -> None:
    """The second POST comes after them, and soon after them."""

    async def scene() -> None:
        stage.outcomes = [lost()]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "unknown")
        since = stage.now
        await stage.until(lambda: stage.count("POST") == 2)
        assert GRACE_S <= stage.now - since < GRACE_S + 20
        assert stage.count("search") == 3
        await stage.until(lambda: stage.state() == "sent")

    play(stage, scene())


def test_the_grace_counts_from_the_record_of_the_outcome(stage: Stage) -> None:
    """Not from the beginning of a POST that took long to fail."""

    async def scene() -> None:
        stage.outcomes = [lost(after_s=25.0)]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("POST") == 2)  # the world watches the time
        await stage.until(lambda: stage.state() == "sent")

    play(stage, scene())


def test_a_search_begun_before_the_grace_is_over_does_not_count(stage: Stage) -> None:
    """What it did not find may have shown up while it was under way."""

    async def scene() -> None:
        stage.outcomes = [lost()]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "unknown")
        since = stage.now
        await stage.until(lambda: stage.count("search") == 2)
        await asyncio.sleep(since + GRACE_S - 1 - stage.now)
        stage.retry()
        await stage.until(lambda: stage.count("searched") == 3)  # it ends after the grace
        assert stage.now - since > GRACE_S
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("search") == 4

    play(stage, scene())


@pytest.mark.parametrize("state", ["intent", "unknown"])
def test_a_failed_search_sends_nothing(stage: Stage, state: str) -> None:
    """Neither a first nor a second POST, and the search is not repeated all the time."""

    async def scene() -> None:
        stage.outcomes = [lost()] if state == "unknown" else []
        stage.search_fault = "" if state == "unknown" else "error"
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == state)
        stage.search_fault = "error"
        posts, searches = stage.count("POST"), stage.count("search")
        await asyncio.sleep(2 * HOUR_S)
        assert (stage.state(), stage.count("POST")) == (state, posts)
        assert 5 <= stage.count("search") - searches <= 15
        assert len(stage.logged("trigger_search_failed")) == 1
        stage.search_fault = ""
        await stage.until(lambda: stage.state() == "sent", 2 * HOUR_S)
        assert stage.count("POST") == posts + 1

    play(stage, scene())


def test_a_job_that_shows_late_is_found(stage: Stage) -> None:
    """A search that lags for nearly the whole grace brings no second job about."""

    async def scene() -> None:
        stage.lag_s = 0.98 * GRACE_S
        stage.outcomes = [lost(is_started=True)]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 1

    play(stage, scene())


def test_killed_in_a_post(stage: Stage) -> None:
    """A `sending` that is found at start is unknown, its grace begins then, no POST is blind."""

    async def scene() -> None:
        stage.lag_s = 0.9 * GRACE_S
        stage.add()
        stage.die_at = "POST handled"
        process = stage.start()
        await stage.until(process.task.done)
        stage.start()
        await stage.until(lambda: stage.state() == "unknown", 2)
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 1
        assert len(stage.logged("trigger_found")) == 1

    play(stage, scene())


def test_the_oldest_of_several_is_ours(stage: Stage) -> None:
    """Of several jobs that bear the trigger id the oldest is taken, and nothing is sent."""

    async def scene() -> None:
        job = stage.add()
        own_id = trigger_id("job", job.batch_ids)
        for n in range(3):
            row = (-1, n, 0)
            job_ = ServerJob(f"kbc-{n}", own_id, TARGET, 1, {}, float(n), 0.0, row)
            stage.keboola.append(job_)
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        trigger = stage.trigger()
        assert trigger
        assert trigger.keboola_job_id == "kbc-0"
        (event,) = stage.logged("trigger_found")
        assert (event["level"], event["other_keboola_job_ids"]) == ("warning", ["kbc-1", "kbc-2"])
        assert stage.count("POST") == 0

    play(stage, scene())


# ---- the config changes meanwhile ----


@pytest.mark.parametrize("change", ["removed", "paused"])
def test_no_post_for_what_is_gone_or_paused(stage: Stage, change: str) -> None:
    """An unknown trigger is searched for, hour after hour, and sent again when its job is back."""

    async def scene() -> None:
        stage.outcomes = [lost()]
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "unknown")
        stage.remove(job) if change == "removed" else stage.change(replace(job, paused=True))
        await asyncio.sleep(3 * HOUR_S)
        assert stage.count("POST") == 1
        assert 4 <= stage.count("search") <= 7
        stage.change(job)
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 2

    play(stage, scene())


def test_paused_during_the_search(stage: Stage) -> None:
    """What a search allows is asked again after it: a reload may have paused the job meanwhile."""

    async def scene() -> None:
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.count("search") == 1)
        stage.change(replace(job, paused=True))
        await asyncio.sleep(HOUR_S)
        assert stage.count("POST") == 0
        stage.change(job)
        await stage.until(lambda: stage.state() == "sent")

    play(stage, scene())


@pytest.mark.parametrize("sent", ["never", "not reached", "lost"])
def test_what_was_once_sent_keeps_its_target(stage: Stage, sent: str) -> None:
    """Until then, another target, secret or variable in the config counts."""

    async def scene() -> None:
        stage.outcomes = {"never": [], "not reached": [NOT_REACHED], "lost": [lost()]}[sent]
        stage.search_fault = "error" if sent == "never" else ""
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.count("POST answered" if stage.outcomes else "searched"))
        await stage.until(lambda: stage.state() == ("unknown" if sent == "lost" else "intent"))
        other = replace(job, config_id="2", keboola_secret="keboola-us", variables=(("a", "b"),))
        stage.change(other)
        await stage.until(lambda: stage.works()["job"].target.config_id == "2")
        stage.search_fault = ""
        await stage.until(lambda: stage.state() == "sent")
        (started,) = stage.keboola
        is_new = sent == "never"
        assert started.target == (Target(US, "component", "2") if is_new else TARGET)
        assert started.payload["config"] == ("2" if is_new else "1")
        values = started.payload["variableValuesData"]["values"]
        assert ({"name": "a", "value": "b"} in values) is is_new

    play(stage, scene())


def test_a_reload_during_the_search_makes_another_intent(stage: Stage) -> None:
    """What was searched for is not what is to be sent: it is searched for again first."""

    async def scene() -> None:
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.count("search") == 1)
        stage.change(replace(job, config_id="2"))
        await stage.until(lambda: stage.state() == "sent")
        (started,) = stage.keboola
        assert started.target == replace(TARGET, config_id="2")
        assert stage.count("search") == 2

    play(stage, scene())


@pytest.mark.parametrize("way", ["as it is", "restart", "retry", "retry --force"])
@pytest.mark.parametrize("wrong", [NOWHERE, US])
def test_a_mistyped_stack_is_corrected(stage: Stage, wrong: str, way: str) -> None:
    """A refused connection, or another region's 401, is over when the address is right."""

    async def scene() -> None:
        stage.stacks["keboola-eu"] = wrong
        stage.add()
        stage.start()
        await stage.until(lambda: stage.logged("trigger_search_failed"))
        await asyncio.sleep(HOUR_S)
        assert stage.state() == "intent"
        if way.startswith("retry"):
            stage.retry(force=way != "retry")
        await asyncio.sleep(60)
        assert stage.count("POST") == 0
        if way == "restart":
            await stage.running.kill()
        stage.stacks["keboola-eu"] = EU
        stage.save_config()
        if way == "restart":
            stage.start()
        await stage.until(lambda: stage.state() == "sent", 20)
        assert [job.target for job in stage.keboola] == [TARGET]

    play(stage, scene())


def test_a_mistyped_stack_is_corrected_for_earlier_ids_too(stage: Stage) -> None:
    """They go to the configuration that they were for, on the stack that was meant."""

    async def scene() -> None:
        stage.stacks["keboola-eu"] = NOWHERE
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.logged("trigger_search_failed"))
        stage.change(replace(job, batch_ids=(stage.new_batch(),), config_id="2"))
        await asyncio.sleep(HOUR_S)
        stage.stacks["keboola-eu"] = EU
        stage.save_config()
        await stage.until(lambda: stage.keboola, 20)
        assert [job.target for job in stage.keboola] == [TARGET]

    play(stage, scene())


@pytest.mark.parametrize("sent", ["never", "lost"])
@pytest.mark.parametrize("left", ["gone", "another project's", "there"])
def test_only_a_token_of_the_project_carries_a_trigger(stage: Stage, sent: str, left: str) -> None:
    """The job's own, or another one of the project; until something was sent, the job's own."""

    async def scene() -> None:
        stage.stacks = dict(reversed(stage.stacks.items()))  # the other project's is the first
        stage.outcomes = [lost()] if sent == "lost" else []
        stage.search_fault = "error"
        job = stage.add()
        stage.start()
        if sent == "lost":
            stage.search_fault = ""
            await stage.until(lambda: stage.state() == "unknown")
            stage.search_fault = "error"
        await stage.until(lambda: stage.logged("trigger_search_failed"))
        if left == "gone":
            stage.absent.add("keboola-eu")
        elif left == "another project's":
            stage.new_token("keboola-eu", 3)
        stage.absent.add("keboola-eu-too")
        stage.change(replace(job, keboola_secret="keboola-eu-other"))
        await asyncio.sleep(60)
        stage.search_fault = ""
        if sent == "lost" and left != "there":
            await asyncio.sleep(2 * HOUR_S)
            (work,) = stage.works().values()
            error = tc.error_of(work) or ""
            assert f"has no secret of project 1 on {EU}" in error
            assert "keboola-eu-other is of project 3" in error
            assert stage.count("POST") == 1
            stage.absent.discard("keboola-eu-too")
            stage.save_config()
        await stage.until(lambda: stage.state() == "sent", 200)
        assert [job.project for job in stage.keboola] == [1 if sent == "lost" else 3]

    play(stage, scene())


def test_a_trigger_of_an_earlier_version_keeps_its_secret(stage: Stage) -> None:
    """Its project is not known: only the secret that it was begun with tells."""

    async def scene() -> None:
        stage.outcomes = [lost()]
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "unknown")
        await stage.running.kill()
        with closing(sqlite3.connect(stage.path)) as db, db:
            db.execute("UPDATE triggers SET project_id = NULL")
        stage.absent.add("keboola-eu")
        stage.change(replace(job, keboola_secret="keboola-eu-too"))
        stage.start()
        await stage.until(lambda: stage.logged("trigger_search_failed"))
        (event,) = stage.logged("trigger_search_failed")
        assert "no secret of the project of the secret keboola-eu on" in event["error"]
        stage.absent.clear()
        stage.save_config()
        await stage.until(lambda: stage.state() == "sent", HOUR_S)
        assert len(stage.keboola) == 1

    play(stage, scene())


def test_retry_force_needs_a_token_that_is_known(stage: Stage) -> None:
    """A person decides over a search that fails, not over whose token is taken."""

    async def scene() -> None:
        stage.whose.clear()
        stage.add()
        stage.start()
        await stage.until(lambda: stage.logged("trigger_search_failed"))
        stage.retry(force=True)
        await asyncio.sleep(HOUR_S)
        assert stage.count("POST") == 0

    play(stage, scene())


def test_posts_that_bring_nothing_are_ever_further_apart(stage: Stage) -> None:
    """Twice as far each time, up to an hour; over a restart too."""

    async def scene() -> None:
        stage.outcomes = [lost()] * 12
        stage.add()
        stage.start()
        times = []

        def is_at(number: int) -> bool:
            return stage.count("POST answered") == number

        for number in range(1, 12):
            await stage.until(partial(is_at, number), 2 * HOUR_S)
            times.append(stage.now)
            if number in {3, 8}:
                await asyncio.sleep(1)
                await stage.restart()
        waits = [later - earlier for earlier, later in itertools.pairwise(times)]
        for number, wait_s in enumerate(waits):
            least_s = min(HOUR_S, GRACE_S * 2.0**number)
            assert least_s <= wait_s < least_s + 40

    play(stage, scene())


def test_the_old_list_is_asked_before_a_second_post(stage: Stage) -> None:
    """It may know at once what the search shows too late."""

    async def scene() -> None:
        stage.outcomes = [lost(is_started=True)]
        stage.lag_s = 9 * HOUR_S
        stage.list_shows = True
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        assert (stage.count("POST"), stage.count("list")) == (1, 1)

    play(stage, scene())


@pytest.mark.parametrize("change", ["account", "key"])
def test_a_look_that_a_reload_has_overtaken_says_nothing(stage: Stage, change: str) -> None:
    """What an account answers to the old key is not its word to the new one."""

    async def scene() -> None:
        job = stage.add()
        stage.look_fault = "missing"
        stage.start()
        await stage.until(lambda: stage.count("look") == 1)
        stage.look_fault = ""
        stage.change(replace(job, openai_secret="openai-b") if change == "account" else job)
        if change == "key":
            secrets = {**stage.setup.secrets, "openai-a": Secret("a new key")}
            stage.setup = replace(stage.setup, secrets=secrets)
        await stage.until(lambda: stage.state() == "sent")
        assert stage.logged("look_failed") == []

    play(stage, scene())


def test_a_look_at_a_job_that_was_paused_meanwhile_says_nothing(stage: Stage) -> None:
    """What comes for a job that is no longer looked at is not recorded."""

    async def scene() -> None:
        job = stage.add()
        stage.look_fault = "missing"
        stage.start()
        await stage.until(lambda: stage.count("look") == 1)
        stage.look_fault = ""
        stage.change(replace(job, paused=True))
        await stage.until(lambda: stage.count("looked") == 1)
        await asyncio.sleep(5)
        stage.change(job)
        await stage.until(lambda: stage.state() == "sent")
        assert stage.logged("look_failed") == []

    play(stage, scene())


def test_a_rejected_trigger_waits_for_another_basis(stage: Stage) -> None:
    """What Keboola does not judge by brings no POST when it changes; a variable does."""

    async def scene() -> None:
        stage.outcomes = [REJECTED]
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "rejected")
        stage.change(replace(job, poll_interval_s=2))
        await asyncio.sleep(2 * HOUR_S)
        assert stage.count("POST") == 1
        stage.change(replace(job, variables=(("a", "b"),)))
        await stage.until(lambda: stage.state() == "sent", 10)
        assert stage.count("POST") == 2

    play(stage, scene())


def test_a_token_that_is_lost_during_the_search(stage: Stage) -> None:
    """What was searched with it is not sent with another one: that one searches first."""

    async def scene() -> None:
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.count("search") == 1)
        stage.change(replace(job, keboola_secret="keboola-us"))
        setup, us = stage.setup, stage.setup.config.keboola["keboola-us"]
        stage.setup = replace(setup, config=replace(setup.config, keboola={us.name: us}))
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 1
        assert [job.target.stack_url for job in stage.keboola] == [US]

    play(stage, scene())


def test_retry_force_of_a_paused_job_decides_nothing(stage: Stage) -> None:
    """What is sent again is decided when the job may go on, with what the config says then."""

    async def scene() -> None:
        job = stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        stage.change(replace(job, paused=True))
        await asyncio.sleep(1)
        stage.retry(force=True)
        await asyncio.sleep(HOUR_S)
        assert stage.trigger() is None
        stage.change(job)
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 2

    play(stage, scene())


def test_retry_force_during_a_search_is_not_forgotten(stage: Stage) -> None:
    """A search that fails after a person has decided does not take the decision back."""

    async def scene() -> None:
        stage.search_fault = "error"
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("search") == 1)
        stage.retry(force=True)
        await stage.until(lambda: stage.count("POST") == 1, 30)

    play(stage, scene())


# ---- the clock ----


def test_a_clock_set_back_holds_nothing(stage: Stage) -> None:
    """A wait that was recorded an hour ahead of the clock is over at the next start."""

    async def scene() -> None:
        stage.outcomes = [NOT_REACHED]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("POST answered") == 1)
        await asyncio.sleep(0.1)
        assert stage.state() == "intent"
        stage.move_clock(-HOUR_S)
        await stage.restart()
        await stage.until(lambda: stage.state() == "sent", 30)

    play(stage, scene())


def test_a_clock_set_forward_shortens_no_grace(stage: Stage) -> None:
    """A daemon counts the grace anew: what a recorded time says may not have passed."""

    async def scene() -> None:
        stage.lag_s = 0.9 * GRACE_S
        stage.outcomes = [lost(is_started=True)]
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "unknown")
        stage.move_clock(HOUR_S)
        await stage.restart()
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 1

    play(stage, scene())


# ---- the state file ----


@pytest.mark.parametrize("file", ["state.db", "state.db.lock"])
@pytest.mark.parametrize("when", ["before the intent", "during the search"])
def test_without_its_files_nothing_is_begun(stage: Stage, file: str, when: str) -> None:
    """Before the intent nobody is even asked, and before `sending` nothing is sent."""

    async def scene() -> None:
        job = stage.add(has_ended=False)
        process = stage.start()
        await stage.until(lambda: stage.count("looked") == 1)
        if when == "during the search":
            stage.end_batch(job.batch_ids[0])
            await stage.until(lambda: stage.count("search") == 1)
        searches = stage.count("search")
        process.may_refuse = True
        (stage.directory / file).unlink()
        if when == "before the intent":
            stage.end_batch(job.batch_ids[0])
        await stage.until(process.task.done)
        assert (stage.count("search"), stage.count("POST")) == (searches, 0)

    play(stage, scene())


@pytest.mark.parametrize("when", ["before the intent", "during the search"])
def test_with_a_full_disk_nothing_is_begun(stage: Stage, when: str) -> None:
    """It is tried again, at most every ten seconds and not all the time, and then goes on."""

    async def scene() -> None:
        stage.add()
        stage.start()
        await stage.until(lambda: stage.count("look" if "intent" in when else "search") == 1)
        stage.disk_full = 1.0
        await asyncio.sleep(600)
        tries = stage.count("look") + stage.count("search")
        assert 40 <= tries <= 130
        assert stage.count("POST") == 0
        stage.disk_full = 0.0
        await stage.until(lambda: stage.state() == "sent", 20)
        assert stage.count("POST") == 1

    play(stage, scene())


@pytest.mark.parametrize("point", ["search", "POST handled"])
def test_a_pass_does_not_wait_for_a_full_disk(stage: Stage, point: str) -> None:
    """With --once, what cannot be committed is left to the next start, a result as well."""

    async def scene() -> None:
        stage.add()
        process = stage.start(once=True)
        await stage.until(lambda: stage.count(point) == 1)
        stage.disk_full = 1.0
        await stage.until(process.task.done, 30)
        assert process.engine.has_failed
        stage.disk_full = 0.0
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        assert stage.count("POST") == 1

    play(stage, scene())


@pytest.mark.parametrize("clock_s", [0.0, -HOUR_S])
def test_a_lost_state_file_is_searched_for_after_the_grace(stage: Stage, clock_s: float) -> None:
    """What was posted just before shows by then; until then, nothing found means nothing."""

    async def scene() -> None:
        stage.lag_s = 0.9 * GRACE_S
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        await stage.running.kill()
        stage.forget(None)
        stage.move_clock(clock_s)
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        assert (stage.count("POST"), stage.count("search")) == (1, 3)
        assert len(stage.logged("state_is_older")) == 1

    play(stage, scene())


def test_retry_force_does_not_wait_for_a_lost_state_file(stage: Stage) -> None:
    """A person may know better, and where the search fails, waiting for it brings nothing."""

    async def scene() -> None:
        stage.add("other")
        stage.start()
        await stage.until(lambda: stage.count("POST answered") == 1)
        await stage.running.kill()
        stage.forget(None)
        stage.remove(stage.jobs["other"])
        stage.add()
        stage.search_fault = "error"
        stage.start()
        await stage.until(lambda: stage.state() == "intent")
        stage.retry(force=True)
        await stage.until(lambda: stage.state() == "sent", 10)

    play(stage, scene())


# ---- a bug ----


@pytest.mark.parametrize("function", ["after_look", "new_trigger", "after_clear_search"])
def test_a_bug_that_one_job_meets_is_not_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """The others go on, and the one is tried again every minute."""
    good = getattr(tc, function)

    def bad(first: Work | Trigger, *rest: Any, **named: Any) -> Any:  # noqa: ANN401 - a function's
        if "unlucky" in (first.payload if isinstance(first, Trigger) else first.name):
            raise ZeroDivisionError
        return good(first, *rest, **named)

    async def scene() -> None:
        monkeypatch.setattr(tc, function, bad)
        stage.has_bugs = True
        stage.add("unlucky")
        stage.add()
        stage.start()
        await stage.until(lambda: stage.state() == "sent")
        await asyncio.sleep(600)
        assert 9 <= stage.bugs_met <= 12
        assert len(stage.keboola) == 1
        monkeypatch.setattr(tc, function, good)
        await stage.until(lambda: len(stage.keboola) == 2)
        assert stage.running.engine.has_failed

    play(stage, scene())


# ---- an engine that does not run ----


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Callable[[tc.Setup, tc.Redactor], tc.Engine]]:
    """What makes an engine for a setup, with a state file of its own."""
    with ExitStack() as stack:

        def engine(setup: tc.Setup, redactor: tc.Redactor) -> tc.Engine:
            lock = stack.enter_context(closing(StateLock(tmp_path / "state.db", "test")))
            store = stack.enter_context(closing(Store.open(tmp_path / "state.db")))
            http = tc.Http(setup.config.limits, redactor, tc.SystemClock())
            return tc.Engine(setup, store, lock, http)

        yield engine


Idle = Callable[[tc.Setup, tc.Redactor], tc.Engine]


def test_an_event_is_stored_without_secrets(tmp_path: Path, stage: Stage, idle: Idle) -> None:
    """Whatever an event tells, the state file keeps no secret, nor does the log."""
    redactor = tc.Redactor()
    redactor.learn([Secret("sk-secret-0123456789")])
    engine = idle(stage.make_setup(), redactor)
    engine.note(tc.Event("told", fields={"error": ["it was sk-secret-0123456789"]}))
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        (fields,) = db.execute("SELECT fields FROM logs").fetchone()
    assert json.loads(fields) == {"error": ["it was ***"]}


CONFIG = """
limits: {{max_concurrency: {places}}}
secrets:
  openai: {{type: openai, env: {openai}}}
jobs: {{}}
"""


@pytest.mark.parametrize("bad", ["openai: NOT_SET", "openai: [", "places: many", "nothing"])
def test_a_bad_config_changes_nothing(
    tmp_path: Path, idle: Idle, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """The setup of before is the very same one, until a file comes that is good altogether."""
    monkeypatch.setattr(tc, "configure_logging", lambda *_: None)
    monkeypatch.setattr(tc, "say", lambda _: None)
    path, env = tmp_path / "config.yaml", {"OPENAI": "sk-secret-0123456789"}
    path.write_text(CONFIG.format(places=5, openai="OPENAI"))
    redactor, files = tc.Redactor(), tc.Files()
    setup = tc.load_setup(path, files, env, redactor)
    engine = idle(setup, redactor)
    reloader = tc.Reloader(engine, files, env, redactor, tc.Notifier({}))
    key, _, value = bad.partition(": ")
    text = CONFIG.format(**{"places": 7, "openai": "OPENAI", key: value}) if value else ""
    path.write_text(text)
    asyncio.run(reloader.check())
    assert engine.setup is setup
    assert engine.is_config_rejected
    path.write_text(CONFIG.format(places=7, openai="OPENAI"))
    asyncio.run(reloader.check())
    assert engine.setup.config.limits.max_concurrency == 7
    assert not engine.is_config_rejected
