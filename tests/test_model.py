"""Thousands of random histories, each played by the real engine and store in virtual time.

A history is a list of steps that follows from its seed: batches end, servers fail, the config is
edited, the process is killed between any two things it does, the disk is full, the clock jumps, the
state file is lost or replaced by an older copy. In the end the world is made well, and everything
that is finished must have been started exactly once. What must never happen is in `model.py`.

A history that fails is made as short as it gets and printed with its seed; to play it again:

    TECKO_SEED=4711 pytest tests/test_model.py          # one history, its steps printed with -s
    TECKO_HISTORIES=20000 pytest tests/test_model.py    # more of them than usual
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from model import (
    HOUR_S,
    LOOK_FAULTS,
    NOWHERE,
    POST_FAULTS,
    PROJECTS,
    SEARCH_FAULTS,
    STACKS,
    Process,
    World,
    played,
)

from teckochecker import TERMINAL, Job, LockedError, StateLock, StorageError, Store

HISTORIES = int(os.environ.get("TECKO_HISTORIES", "500"))
WORKERS = min(2, os.cpu_count() or 1)
SETTLE_S = 8 * HOUR_S
Step = tuple[str, int]  # the name of a method of History, and the seed of its choices


class History:
    """One history: a world, and the steps that are done to it."""

    def __init__(self, directory: Path, seed: int, steps: Sequence[Step]) -> None:
        self.world = World(directory, seed)
        self.steps = steps
        self.left: dict[str, Job] = {}  # jobs that were removed, as they were
        self.past_ids: dict[str, list[tuple[str, ...]]] = {}
        self.past_names: dict[str, list[str]] = {}
        self.copies: list[bytes] = []
        self.names = 0

    @property
    def random(self) -> random.Random:
        return self.world.random

    def play(self) -> list[str]:
        """Play all steps and make the world well; returns what should not have happened."""
        with asyncio.Runner(loop_factory=lambda: self.world.loop) as runner:
            try:
                runner.run(self._play())
            except (AssertionError, sqlite3.Error) as error:
                self.world.claim(holds=False, text=f"{type(error).__name__}: {error}")
        return self.world.violations

    async def _play(self) -> None:
        world = self.world
        for _ in range(self.random.randint(1, 3)):
            self._add_job()
        world.save_config()
        self._start(once=self.random.random() < 0.25)
        for name, number in self.steps:
            world.random.seed(number)
            if self._process() is None and self.random.random() < 0.8:
                await self._pass(0, self.random.choice((0.1, 3, 40)))
                self._start(once=self.random.random() < 0.4)
            step: Callable[[], Awaitable[None] | None] = getattr(self, name)
            world.tell(name)
            result = step()
            if result is not None:
                await result
            await self._pass(0, self.random.choice((0.01, 1, 5, 30)))
            world.check_state()
            if world.violations:
                break
        else:
            await self._make_well()
        if process := self._process():
            await process.kill()

    # --- helpers ---

    async def _pass(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(least_s, most_s))

    def _process(self) -> Process | None:
        """Return the process that runs now, if any."""
        process = self.world.process
        if process and process.task.done():
            process.task.result()
            self.world.tell("no process runs any more")
            self.world.process = process = None
        return process

    def _start(self, *, once: bool) -> None:
        self.world.tell(f"start {'--once' if once else 'the daemon'}")
        self.world.process = Process(self.world, once=once)

    def _save(self, *jobs: Job) -> None:
        """Take jobs into the config, under their names."""
        self.world.jobs.update({job.name: job for job in jobs})
        self.world.save_config()

    def _job(self) -> Job | None:
        return self.random.choice(list(self.world.jobs.values())) if self.world.jobs else None

    def _new_name(self) -> str:
        self.names += 1
        return f"job{self.names}"

    def _add_job(self) -> Job:
        name = self._new_name()
        count = self.random.choice((1, 1, 2, 3))
        job = Job(
            name=name,
            batch_ids=tuple(self.world.new_batch() for _ in range(count)),
            openai_secret=self.random.choice(("openai-a", "openai-a", "openai-b")),
            keboola_secret=self.random.choice(self._secrets()),
            component_id="component",
            config_id=self.random.choice("12"),
            poll_interval_s=self.random.choice((30, 60, 300, 1800)),
        )
        self.world.jobs[name] = job
        return job

    # --- time and batches ---

    async def wait_a_moment(self) -> None:
        await self._pass(0, 15)

    async def wait_a_while(self) -> None:
        await self._pass(15, 400)

    async def wait_long(self) -> None:
        await self._pass(400, 1.5 * HOUR_S)

    def end_batches(self) -> None:
        """All batches of a job come to their end; sometimes all but one, or one of all."""
        job = self._job()
        if job:
            ended = job.batch_ids[: self.random.choice((1, None, None, None))]
            for batch_id in ended:
                if self.world.batches[batch_id].status not in TERMINAL:
                    self.world.end_batch(batch_id)

    def change_an_end(self) -> None:
        """A batch that had ended has another status now."""
        ended = [b for b in self.world.batches.values() if b.status in TERMINAL]
        if ended:
            self.random.choice(ended).status = self.random.choice(("in_progress", *TERMINAL))

    # --- servers ---

    def post_fault(self) -> None:
        """From now on POSTs fail in one way, mostly just when there is one to be made."""
        self.world.post_fault = self.random.choice(POST_FAULTS)
        self.world.tell(f"  {self.world.post_fault}")
        if self.random.random() < 0.6:
            self.end_batches()
        if self.random.random() < 0.3:
            self.search_fault()

    def search_fault(self) -> None:
        self.world.search_fault = self.random.choice(SEARCH_FAULTS)

    def look_fault(self) -> None:
        self.world.look_fault = self.random.choice(LOOK_FAULTS)

    def list_fault(self) -> None:
        self.world.list_fault = self.random.choice(("", "none", "lies"))

    async def lost_answer(self) -> None:
        """Answers of POSTs are lost while the search fails; later all is well again."""
        self.world.post_fault = self.random.choice(("unknown", "slow", "no id"))
        self.end_batches()
        for _ in range(300):
            if self.world.doubts:
                break
            await self._pass(0, 2)
        self.world.search_fault = "error"
        await self._pass(0, 2 * self.world.grace_s)
        self.servers_well()

    def servers_well(self) -> None:
        self.world.post_fault = self.world.search_fault = self.world.look_fault = ""

    # --- the config ---

    def add_job(self) -> None:
        self._save(self._add_job())

    def copy_job(self) -> None:
        """A second job with the same batches, for another component, is work of its own."""
        if job := self._job():
            name = self._new_name()
            self._save(replace(job, name=name, component_id=f"component-of-{name}"))

    def rename(self) -> None:
        """The name changes, sometimes back to an earlier one; order and all else stay."""
        if not (job := self._job()):
            return
        earlier = [n for n in self.past_names.get(job.name, []) if n not in self.world.jobs]
        back = earlier and self.random.random() < 0.4
        new = self.random.choice(earlier) if back else self._new_name()
        names = self.past_names.pop(job.name, [])
        self.past_names[new] = [*names, job.name]
        self.past_ids[new] = self.past_ids.pop(job.name, [])
        self.world.tell(f"  {job.name} -> {new}")
        renamed = replace(job, name=new)
        self.world.jobs = {
            renamed.name if name == job.name else name: renamed if name == job.name else other
            for name, other in self.world.jobs.items()
        }
        self.world.save_config()

    def remove(self) -> None:
        if job := self._job():
            self.world.tell(f"  {job.name}")
            self.left[job.name] = self.world.jobs.pop(job.name)
            self.world.save_config()

    def bring_back(self) -> None:
        if self.left:
            name = self.random.choice(list(self.left))
            self.world.tell(f"  {name}")
            self._save(self.left.pop(name))

    async def remove_for_a_while(self) -> None:
        """A job that is not done, where there is one, leaves and comes back unchanged."""
        with self.world.reading() as db:
            works = Store(db, self.world.path).works() if db else []
        open_ = {w.name for w in works if w.trigger and not w.is_finished} & set(self.world.jobs)
        names = sorted(open_ or self.world.jobs)
        if names:
            name = self.random.choice(names)
            self.world.tell(f"  {name}")
            job = self.world.jobs.pop(name)
            self.world.save_config()
            await self._pass(0, self.random.choice((1, 20, 400)))
            self._save(job)

    async def refused_and_removed(self) -> None:
        """Keboola refuses what can be cured, and the job leaves and comes back before it is."""
        self.world.post_fault = "curable"
        self.end_batches()
        await self._pass(5, 400)
        await self.remove_for_a_while()
        self.servers_well()

    def new_ids(self) -> None:
        if job := self._job():
            self.past_ids.setdefault(job.name, []).append(job.batch_ids)
            self._save(replace(job, batch_ids=(self.world.new_batch(), *job.batch_ids[:1])))

    def earlier_ids(self) -> None:
        job = self._job()
        if job and (past := self.past_ids.get(job.name)):
            self._save(replace(job, batch_ids=self.random.choice(past)))
            past.append(job.batch_ids)

    def other_variables(self) -> None:
        if job := self._job():
            self._save(replace(job, variables=(("n", str(self.random.random())),)))

    def other_target(self) -> None:
        if job := self._job():
            secret, config = self.random.choice(self._secrets()), self.random.choice("12")
            self.world.tell(f"  {job.name} -> {secret} {config}")
            self._save(replace(job, keboola_secret=secret, config_id=config))

    def other_account(self) -> None:
        if job := self._job():
            secret = "openai-b" if job.openai_secret == "openai-a" else "openai-a"
            self._save(replace(job, openai_secret=secret))

    def _secrets(self) -> list[str]:
        """Return the Keboola secrets that the config has."""
        return [name for name in self.world.stacks if name not in self.world.absent]

    def _secret(self) -> str:
        """Return a Keboola secret, mostly one that is used for what is not started yet."""
        with self.world.reading() as db:
            works = Store(db, self.world.path).works() if db else []
        open_ = {w.name for w in works if not w.is_finished}
        jobs = self.world.jobs
        used = sorted({jobs[name].keboola_secret for name in open_ & set(jobs)})
        return self.random.choice(used if used and self.random.random() < 0.8 else self._secrets())

    def other_token(self) -> None:
        """A token of the same project takes another one's place, which may be revoked."""
        name = self._secret()
        if self.random.random() < 0.5:
            self.world.whose.pop(self.world.tokens[name], None)
        self.world.new_token(name)
        self.world.tell(f"  {name}")
        self.world.save_config()

    def revoke_token(self) -> None:
        """A token is of no use any more; some time later the job may have another secret."""
        self.world.whose.pop(self.world.tokens[self._secret()], None)
        if self.random.random() < 0.5:
            self.other_target()

    def other_project(self) -> None:
        """A secret gets the token of another project of its stack."""
        name = self._secret()
        alike = sorted({PROJECTS[n] for n, url in STACKS.items() if url == STACKS[name]})
        self.world.new_token(name, self.random.choice(alike))
        self.world.tell(f"  {name}: {self.world.whose[self.world.tokens[name]]}")
        self.world.save_config()

    def other_stack(self) -> None:
        """An address is mistyped, or names another region, or is right again."""
        name = self._secret()
        wrong = self.random.choice((NOWHERE, *STACKS.values()))
        is_wrong = self.world.stacks[name] != STACKS[name]
        self.world.stacks[name] = STACKS[name] if is_wrong else wrong
        self.world.tell(f"  {name}: {self.world.stacks[name]}")
        self.world.save_config()

    async def wrong_stack_for_a_while(self) -> None:
        """An address is wrong just when something is to be started there."""
        name = self._secret()
        self.world.stacks[name] = self.random.choice((NOWHERE, *STACKS.values()))
        self.world.save_config()
        await self._pass(0, 5)
        self.end_batches()
        await self._pass(0, self.random.choice((5, 400)))
        self.world.stacks[name] = STACKS[name]
        self.world.save_config()

    def secret_leaves(self) -> None:
        """A secret leaves the config, and its jobs have another one: or it comes back."""
        world = self.world
        if world.absent:
            world.absent.clear()
        else:
            name = self._secret()
            world.absent.add(name)
            for job in list(world.jobs.values()):
                if job.keboola_secret == name:
                    other = self.random.choice(self._secrets())
                    world.jobs[job.name] = replace(job, keboola_secret=other)
            self.left = {n: j for n, j in self.left.items() if j.keboola_secret != name}
            world.tell(f"  {name}")
        world.save_config()

    def secrets_in_another_order(self) -> None:
        self.world.stacks = dict(reversed(self.world.stacks.items()))
        self.world.save_config()

    def secrets_well(self) -> None:
        """All secrets are there, with the right address and a token of the right project."""
        world = self.world
        world.absent.clear()
        for name, url in STACKS.items():
            world.stacks[name] = url
            if world.whose.get(world.tokens[name]) != (url, PROJECTS[name]):
                world.new_token(name)
        world.save_config()

    def other_order(self) -> None:
        """Jobs and ids stand in another order: nothing starts over."""
        jobs = [replace(j, batch_ids=j.batch_ids[::-1]) for j in self.world.jobs.values()]
        self.world.jobs = {job.name: job for job in reversed(jobs)}
        self.world.save_config()

    def pause(self) -> None:
        if job := self._job():
            self._save(replace(job, paused=True))

    def do_elsewhere(self) -> None:
        if job := self._job():
            self._save(replace(job, done=True))

    def unpause(self) -> None:
        jobs = self.world.jobs.values()
        self._save(*(replace(job, paused=False, done=False) for job in jobs))

    # --- a person asks ---

    def retry(self) -> None:
        if job := self._job():
            self._ask(job.name, force=False)

    def retry_force(self) -> None:
        if job := self._job():
            self._ask(job.name, force=True)

    def _ask(self, name: str, *, force: bool) -> None:
        with self.world.reading() as db, contextlib.suppress(StorageError):
            works = Store(db, self.world.path).works() if db else []
            asked = [w for w in works if w.name == name and w.position is not None]
            if db and asked:
                self.world.tell(f"  retry {name}{' --force' if force else ''}")
                Store(db, self.world.path).ask(asked[0], force=force, now=0)

    # --- the process ---

    async def kill(self) -> None:
        """The process dies at any moment of the next seconds, or minutes."""
        await self._pass(0, self.random.choice((0.1, 3, 200)))
        if process := self._process():
            await process.kill()

    def kill_soon(self) -> None:
        """The process dies at one of the next places where it does something that counts."""
        if process := self._process():
            process.crash_in = self.random.randint(1, 15)

    async def stop(self) -> None:
        if process := self._process():
            await process.stop()

    async def daemon_instead(self) -> None:
        """The daemon runs, whatever ran before."""
        await self.stop()
        self._process()
        self._start(once=False)

    async def one_pass(self) -> None:
        """The daemon stops, and cron makes a pass."""
        await self.stop()
        self._process()
        self._start(once=True)

    def second_process(self) -> None:
        """Someone starts a second one, which must not come in."""
        if self._process():
            with contextlib.suppress(LockedError):
                lock = StateLock(self.world.path, "second")
                lock.close()
                self.world.claim(holds=False, text="a second process got the lock")

    # --- the machine ---

    async def clock_forward(self) -> None:
        await self._pass(0.01, 1)  # whatever has just been started has seen the time before
        self.world.move_clock(HOUR_S)

    def clock_back(self) -> None:
        self.world.move_clock(-HOUR_S)

    async def reboot(self) -> None:
        """The machine comes up with its clock an hour off, and the daemon starts, or a pass."""
        await self.kill()
        self._process()
        self.world.reboot()
        self.world.move_clock(self.random.choice((HOUR_S, HOUR_S, -HOUR_S)))
        self._start(once=self.random.random() < 0.3)

    def disk_full(self) -> None:
        self.world.disk_full = self.random.choice((1.0, 1.0, 0.5))

    def disk_free(self) -> None:
        self.world.disk_full = 0.0

    def back_up(self) -> None:
        with self.world.reading() as db:
            if db:
                self.copies.append(db.serialize())

    async def lose_state(self) -> None:
        """The state file is deleted, under the process or after its end."""
        await self._replace_state(None)

    async def restore_state(self) -> None:
        """The state file is replaced by an older copy of it."""
        if self.copies:
            await self._replace_state(self.random.choice(self.copies))

    async def _replace_state(self, content: bytes | None) -> None:
        """Do it, provided that the search shows what was posted: as the promise says."""
        if self.random.random() < 0.5:
            await self.stop()
            self._process()
        if self.world.all_shown():
            self.world.forget(content)
        else:
            self.world.tell("  not now: the search does not show the last POST yet")

    # --- the end ---

    async def _make_well(self) -> None:
        """Everything works, nothing is paused, all batches have ended: all gets done."""
        world = self.world
        world.tell("all is well now")
        self.servers_well()
        self.secrets_well()
        self.disk_free()
        self.unpause()
        for job in world.jobs.values():
            for batch_id in job.batch_ids:
                if world.batches[batch_id].status not in TERMINAL:
                    world.end_batch(batch_id)
        as_passes = self.random.random() < 0.3
        if process := self._process():
            process.crash_in = None
        deadline = world.now + SETTLE_S
        while open_ := self._what_is_open():
            if world.now > deadline or world.violations:
                world.claim(holds=False, text=f"waits for ever: {open_}")
                return
            process = self._process()
            if process and not process.store.is_in_place():  # it may have no reason to notice
                await process.kill()
                process = self._process()
            if process is None:
                self._start(once=as_passes)
            await asyncio.sleep(300)
        world.check_state()
        self._check_end()

    def _what_is_open(self) -> list[str]:
        """Return the jobs that are not done, after a `retry` for those that were refused."""
        world = self.world
        with world.reading() as db:
            if not db:
                return ["no state file"]
            open_ = [f"request {r.id}" for r in Store(db, world.path).requests()]
            works = Store(db, world.path).works()
        done = {w.name for w in works if w.position is not None and w.is_finished}
        for work in works:
            state = work.trigger.state if work.trigger else None
            if work.name in world.jobs and work.position is None:
                open_.append(f"{work.name} with earlier ids: {state}")
            if work.position is not None and state == "rejected":
                self._ask(work.name, force=False)
        wrong = {w.name for w in works if w.position is not None} ^ set(world.jobs)
        return [*open_, *(world.jobs.keys() - done), *wrong]

    def _check_end(self) -> None:
        """Every job of the config has one Keboola job, made of what the state file knows."""
        world = self.world
        with world.reading() as db:
            assert db
            works = [w for w in Store(db, world.path).works() if w.position is not None]
        started = {job.id: job for job in world.keboola}
        for work in works:
            assert work.trigger
            job = started.get(str(work.trigger.keboola_job_id))
            world.claim(job and job.trigger == work.trigger.id, f"{work.name}: a wrong Keboola job")
            if not job or job.row[0] != world.incarnation:
                continue
            values = {v["name"]: v["value"] for v in job.payload["variableValuesData"]["values"]}
            statuses = {batch.id: batch.status for batch in work.batches}
            told = json.loads(values["batch_statuses"])
            world.claim(told == statuses, f"{work.name}: told {told}, known {statuses}")


WEIGHTS = {
    "wait_a_moment": 4, "wait_a_while": 5, "wait_long": 2,
    "end_batches": 9, "change_an_end": 1,
    "post_fault": 6, "search_fault": 3, "look_fault": 1, "list_fault": 3,
    "servers_well": 3, "lost_answer": 3,
    "add_job": 3, "copy_job": 1, "rename": 4, "remove": 3, "bring_back": 4,
    "remove_for_a_while": 4, "refused_and_removed": 3,
    "new_ids": 2, "earlier_ids": 2, "other_variables": 2, "other_target": 2,
    "other_account": 1, "other_token": 2, "revoke_token": 2, "other_project": 3, "other_stack": 3,
    "wrong_stack_for_a_while": 3, "secret_leaves": 3, "secrets_in_another_order": 1,
    "secrets_well": 3, "other_order": 1,
    "pause": 3, "do_elsewhere": 1, "unpause": 3, "retry": 2, "retry_force": 1,
    "kill": 4, "kill_soon": 6, "stop": 1, "daemon_instead": 2, "one_pass": 3, "second_process": 1,
    "clock_forward": 1, "clock_back": 1, "reboot": 3, "disk_full": 2, "disk_free": 3,
    "back_up": 1, "lose_state": 1, "restore_state": 1,
}  # fmt: skip


def steps_of(seed: int) -> list[Step]:
    """Return the steps of a history, which follow from its seed alone."""
    chance = random.Random(seed)  # noqa: S311 - a seed is the point
    names = chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=chance.randint(10, 40))
    return [(name, chance.randrange(2**32)) for name in names]


@contextlib.contextmanager
def fast_directory() -> Iterator[Path]:
    """Yield a directory in memory where there is one: every commit is synced."""
    memory = Path("/dev/shm")  # noqa: S108 - a fresh directory in it
    is_there = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if is_there else None) as name:
        yield Path(name)


def play(seed: int, steps: Sequence[Step]) -> History:
    """Play one history in a world of its own."""
    with fast_directory() as directory, played():
        history = History(directory, seed, steps)
        history.play()
        return history


def shortened(seed: int, steps: Sequence[Step]) -> list[Step]:
    """Return as few of the steps as still fail."""
    kept = list(steps)
    for index in reversed(range(len(steps))):
        fewer = kept[:index] + kept[index + 1 :]
        if play(seed, fewer).world.violations:
            kept = fewer
    return kept


def report(seed: int) -> str:
    """Return what is wrong with a history, with its shortest form, or nothing."""
    steps = steps_of(seed)
    violations = play(seed, steps).world.violations
    if not violations:
        return ""
    short = play(seed, shortened(seed, steps))
    lines = [f"TECKO_SEED={seed}: {violations[0]}", *short.world.story]
    return "\n".join(lines)


def first_failures(seeds: Sequence[int]) -> list[str]:
    """Return the reports of the first histories that fail."""
    reports: list[str] = []
    for seed in seeds:
        if text := report(seed):
            reports.append(text)
            if len(reports) == 3:
                break
    return reports


def test_no_history_starts_a_job_twice_or_never() -> None:
    """Whatever happens, in any order: one Keboola job per finished work, and nothing is lost."""
    if chosen := os.environ.get("TECKO_SEED"):
        history = play(int(chosen), steps_of(int(chosen)))
        print("\n".join(history.world.story))
        failures = [report(int(chosen))]
    else:
        shares = [range(first, HISTORIES, WORKERS) for first in range(WORKERS)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
            failures = [text for texts in pool.map(first_failures, shares) for text in texts]
    if any(failures):
        pytest.fail("\n\n".join(filter(None, failures)), pytrace=False)


def test_a_history_follows_from_its_seed() -> None:
    """The same seed is the same history, to the last step: a failure can be played again."""
    first, second = (play(11, steps_of(11)).world.story for _ in range(2))
    assert first == second
    assert len(first) > 10
