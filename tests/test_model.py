"""Random histories, each played by the real engine and store in virtual time.

A history follows from its seed: batches end, servers fail, the config is edited, the process is
killed at any request or commit, the disk is full, the clock is set, the state file is lost or
replaced by an older copy. In the end the world is made well, and what is finished must have been
started exactly once. What must never happen meanwhile is in `model.py`.

    TECKO_SEED=4711 pytest tests/test_model.py      # one history; its steps are printed with -s
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from model import EPOCH, TOKENS, Key, Killed, Process, ServerBatch, VirtualLoop, World

import teckochecker as tc

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
ENDS = ("completed", "completed", "completed", "failed", "expired", "cancelled")
OPENAI_FAULTS = ("dropped", "429", "500", "404", "stale")
UNSENT = {tc.Phase.INTENT, tc.Phase.SENDING, tc.Phase.UNKNOWN}


class History:
    """One history: a world, and what is done to it. A method whose name begins `do_` is a step.

    Where the state file is lost, nothing but the search knows what was started, and neither name
    nor target may change: that is left to the other histories. The name of a job is its line, which
    stays, and a letter.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.dice = random.Random(seed)  # noqa: S311 - a dice
        self.may_lose = self.dice.random() < 0.4
        self.copy: bytes | None = None
        self.left: dict[str, tc.Job] = {}  # jobs that were removed
        self.moved: set[str] = set()  # lines with another target, or
        self.renamed: set[str] = set()  # another name; both at once is new work
        self.old_ids: dict[str, list[tuple[str, ...]]] = {}
        self.was_set = False  # the clock: five minutes for a late file can be over at once
        self.count = 0
        self.keep_until = 0.0  # the lock file is lost: with the state file too, all is
        self.often = ["do_lose_state"] if self.may_lose else ["do_rename", "do_new_batch"]

    async def play(self) -> None:
        world, choice = self.world, self.dice.choice
        world.accident, world.search_rate = self.on_accident, choice((0, 0, 0.2))
        world.fault_rate = choice((0.2, 0.6))
        world.openai_skew, world.keboola_skew = choice((0.0, 2e4)), choice((0.0, -2e4))
        for _ in range(self.dice.randint(1, 3)):
            self.do_add()
        steps = sorted(name for name in dir(self) if name.startswith("do_"))
        for _ in range(self.dice.randint(5, 40)):
            if self.dice.random() < 0.8:
                self.start()
            step = choice([*steps, "do_end_batches", "do_end_batches", *self.often])
            world.tell(step)
            if came := getattr(self, step)():
                await came
            await self.pause(choice((0.1, 1, 10, 60)))
        await self.calm()

    # --- helpers ---

    async def pause(self, most_s: float) -> None:
        await asyncio.sleep(self.dice.uniform(0, most_s))

    def running(self) -> Process | None:
        process = self.world.process
        return process if process and not process.task.done() else None

    def start(self) -> None:
        if self.running() is None:
            fuse, once = (
                self.dice.choice((0, 0, self.dice.randint(1, 60))),
                self.dice.random() < 0.3,
            )
            self.world.tell(f"start{' --once' if once else ''}, dies at point {fuse}")
            self.world.process = Process(self.world, once=once, fuse=fuse)

    async def end(self, *, kill: bool = True) -> None:
        """End the process, by SIGKILL or SIGTERM."""
        if process := self.running():
            process.kill() if kill else process.stop.set()
            await asyncio.wait({process.task})

    def reload(self, jobs: dict[str, tc.Job]) -> None:
        """Save the config; the process takes it, or is killed: then the next one reads it."""
        self.world.jobs, process = jobs, self.running()
        if process and hasattr(process, "engine"):
            with suppress(tc.StorageError, Killed):
                return process.engine.apply(self.world.loaded())
            process.kill()
        return None

    def chosen(self, *, match: bool | None = None) -> tc.Job | None:
        jobs = [j for j in self.world.jobs.values() if match in {None, bool(j.match)}]
        return self.dice.choice(jobs) if jobs else None

    def change(self, job: tc.Job, **values: Any) -> None:  # noqa: ANN401
        self.reload(self.world.jobs | {job.name: replace(job, **values)})

    def new_batches(self, count: int, **metadata: str) -> tuple[str, ...]:
        batches, now = self.world.batches, self.world.loop.time()
        ids = [f"batch_{len(batches) + n:03}" for n in range(count)]
        for batch_id in ids:
            created, listed = now - self.dice.choice((0, 0, 40)), now + self.dice.choice((0, 0, 60))
            batches[batch_id] = ServerBatch(batch_id, created, metadata, listed)
            if self.dice.random() < 0.5:
                self.finish(batches[batch_id])
        return tuple(ids)

    def finish(self, batch: ServerBatch) -> None:
        batch.status, batch.ended = self.dice.choice(ENDS), self.world.loop.time()
        if batch.status in {"completed", "expired"}:
            batch.file_at = batch.ended + self.dice.choice((0, 0, 100))

    # --- the config ---

    def do_add(self) -> None:
        choice, some, world = self.dice.choice, self.dice.random, self.world
        self.count += 1
        line = f"line{self.count}"
        kind: dict[str, Any] = {"poll_interval": 60, "variables": (("line", line),)}
        if some() < 0.6:
            since = float(int(EPOCH + world.openai_skew + world.loop.time() - 300))
            kind |= {"match": (("pipe", line),), "since": since}
            old = world.batches[self.new_batches(1, pipe=line, run="old", size="1")[0]]
            old.created, old.status, old.ended = old.created - 2000, "failed", old.created - 1900
            if some() < 0.8:
                sizes = {"group_size": choice(("2", "metadata.size")), "settle": 900}
                kind |= {"group_by": "run", "settle": 60} | (sizes if some() < 0.6 else {})
        else:
            policy = choice(("all_terminal", "all_terminal", "all_completed", "any_output"))
            kind |= {"batch_ids": self.new_batches(self.dice.randint(1, 3)), "trigger_on": policy}
        if some() < 0.2:
            kind |= {"deadline": 600, "on_deadline": choice(("start", "alert"))}
        kind |= {"follow": False} if some() < 0.3 else {"retry_on_error": choice((0, 2))}
        job = tc.Job(f"{line}a", "openai", choice(list(TOKENS)), "app", choice("112"), **kind)
        self.reload(world.jobs | {job.name: job})

    def do_remove(self) -> None:
        if job := self.chosen():
            self.left[job.name] = job
            self.reload({n: j for n, j in self.world.jobs.items() if n != job.name})

    def do_bring_back(self) -> None:
        if self.left:
            name, job = self.left.popitem()
            self.reload(self.world.jobs | {name: job})

    def do_pause(self) -> None:
        if job := self.chosen():
            self.change(job, paused=not job.paused)

    def do_rename(self) -> None:
        job = self.chosen()
        if job and not self.may_lose and job.name[:-1] not in self.moved:
            self.renamed.add(job.name[:-1])
            name = job.name[:-1] + ("b" if job.name.endswith("a") else "a")
            rest = {n: j for n, j in self.world.jobs.items() if n != job.name}
            self.reload(rest | {name: replace(job, name=name)})

    def do_move(self, job: tc.Job | None = None) -> None:
        """Another configuration, or another project."""
        job = job or self.chosen()
        if job and not self.may_lose and job.name[:-1] not in self.renamed:
            self.moved.add(job.name[:-1])
            other = {"eu": "eu-other", "eu-other": "eu"}.get(job.keboola_secret, "eu")
            configs = {"config_id": self.dice.choice("123")}
            self.change(job, **self.dice.choice(({"keboola_secret": other}, configs)))

    def do_new_token(self) -> None:
        """A token is replaced; the old one stops to work."""
        self.count += 1
        name = self.dice.choice(list(TOKENS))
        self.world.tokens[name] = f"token-{name}-{self.count:04}"
        self.reload(self.world.jobs)

    def do_other_ids(self) -> None:
        """Another set of batches, or an earlier one again."""
        if job := self.chosen(match=False):
            old = self.old_ids.setdefault(job.name[:-1], [])
            old += [job.batch_ids, self.new_batches(self.dice.randint(1, 2))]
            self.change(job, batch_ids=self.dice.choice(old))

    # --- the servers ---

    def do_new_batch(self) -> None:
        if job := self.chosen(match=True):
            count, run = self.dice.randint(1, 3), self.dice.choice("uvw")
            self.new_batches(count, pipe=job.match[0][1], run=run, size="2")

    def do_end_batches(self) -> None:
        for batch in self.world.batches.values():
            if batch.ended is None and self.dice.random() < 0.6:
                self.finish(batch)

    def do_openai_fault(self) -> None:
        fault = self.dice.choice(OPENAI_FAULTS)
        self.world.set_for(self.dice.choice((2, 60)), "openai_fault", fault)

    def do_search_fault(self) -> None:
        fault = self.dice.choice(("500", "403", "second page"))
        self.world.set_for(self.dice.choice((2, 60)), "search_fault", fault)

    # --- the machine ---

    async def do_end(self) -> None:
        """The process is killed or stopped; perhaps with the machine."""
        await self.end(kill=self.dice.random() < 0.5)
        if self.dice.random() < 0.3:
            self.count += 1
            self.world.boot, self.world.booted = f"boot-{self.count}", self.world.loop.time()

    def do_fuse(self) -> None:
        if process := self.running():
            process.fuse = self.dice.randint(1, 20)

    def do_full_disk(self) -> None:
        self.world.set_for(self.dice.choice((2, 60)), "is_full", value=True)

    def do_bad_commits(self) -> None:
        self.world.bad_commits = self.dice.randint(1, 5)

    def do_set_clock(self) -> None:
        self.was_set, self.world.our_skew = True, self.dice.uniform(-2e4, 2e4)

    def do_retry(self) -> None:
        runs = self.stored()
        if runs and not self.world.is_full:
            run, force = self.dice.choice(runs), self.dice.random() < 0.3
            self.world.forced[self.key_of(run)] += force
            self.ask_retry(run, force=force)

    async def do_lose_state(self) -> None:
        """The state file is lost while nothing runs, or one of the files under the process."""
        process = self.running()
        if self.may_lose and self.dice.random() < 0.5:
            await self.end()
            self.lose()
        elif self.may_lose and process and hasattr(process, "engine"):
            self.do_add()  # something is about to start
            self.do_end_batches()
            process.is_doomed = not process.task.done()
            self.delete(self.dice.choice([(".lock",), ("", "-wal", "-shm")]))
            self.keep_until = self.world.loop.time() + 60
            await self.pause(60)
            await self.end()

    def delete(self, suffixes: Iterable[str] = ("", "-wal", "-shm")) -> None:
        self.world.open_posts.clear()
        for suffix in suffixes:
            self.world.state.with_name(f"state.db{suffix}").unlink(missing_ok=True)

    def lose(self) -> None:
        if self.world.loop.time() < self.keep_until:
            return
        self.delete()
        if self.copy and self.dice.random() < 0.5:
            self.world.tell("an older copy is restored")
            self.world.state.write_bytes(self.copy)
            self.world.forced.update(self.world.forced)  # it has people's requests again

    def do_copy_state(self) -> None:
        if self.world.state.exists():
            with closing(sqlite3.connect(self.world.state)) as db:
                self.copy = db.serialize()

    def on_accident(self, name: str) -> None:
        """Just after a start its target changes, or the process is killed, and its state lost."""
        process, later = self.running(), self.world.loop.call_later
        if not self.may_lose and self.dice.random() < 0.5:
            self.do_move(self.world.jobs.get(name))
        elif process:
            process.kill()
            if self.may_lose and self.dice.random() < 0.7:
                later(0.01, self.lose)
                later(0.02, self.start)

    # --- the end ---

    def stored(self) -> list[tc.Run]:
        with tc.Store.reading(self.world.state) as store:
            return store.runs("1") if store else []

    def ask_retry(self, run: tc.Run, *, force: bool) -> None:
        """Ask for a retry as the command does."""
        values, marks = (run.id, force, run.rerun, str(run.phase)), "VALUES (?, ?, ?, ?)"
        with closing(sqlite3.connect(self.world.state)) as db, db:
            db.execute(f"INSERT INTO requests (run_id, force, rerun, phase) {marks}", values)

    def key_of(self, run: tc.Run) -> Key:
        ids = frozenset() if run.group else frozenset(batch.id for batch in run.batches)
        return run.job[:-1], run.group, ids

    def wanted(self) -> set[Key]:
        """Return what must have been started, now that everything is finished."""
        keys, batches = set[Key](), self.world.batches
        for job in self.world.jobs.values():
            line = job.name[:-1]
            mine = [batches[i] for i in job.batch_ids]
            is_fit = {
                "all_terminal": True,
                "all_completed": all(batch.status == "completed" for batch in mine),
                "any_output": any(batch.file_at is not None for batch in mine),
            }[job.trigger_on]
            is_sure = job.on_deadline == "alert" and not self.was_set
            if job.batch_ids and is_fit and (is_sure or job.trigger_on == "all_terminal"):
                keys.add((line, "", frozenset(job.batch_ids)))
            found = [b for b in batches.values() if job.match and b.metadata.get("pipe") == line]
            found = [b for b in found if b.metadata["run"] != "old"]
            groups = Counter(b.metadata["run"] if job.group_by else b.id for b in found)
            least = 2 if job.group_size else 1
            keys |= {(line, group, frozenset()) for group, n in groups.items() if n >= least}
        return keys

    def unsettled(self) -> list[str]:
        """Return what has to come to an end yet; a removed job's unknown run is only searched."""
        lost = self.wanted() - {made.key for made in self.world.keboola}
        unsent = [
            run for run in self.stored() if run.phase in UNSENT and run.job in self.world.jobs
        ]
        sent = [run for run in self.stored() if run.phase is tc.Phase.SENT]
        return [*map(str, lost), *(f"{run.name} {run.phase} {run.error}" for run in unsent + sent)]

    async def calm(self) -> None:
        """Make the world well, wait, and see what has come of it."""
        world, process = self.world, self.running()
        world.tell("calm")
        if process and (process.is_doomed or self.dice.random() < 0.5):
            await self.end()
        world.bad_commits = 0
        for batch in world.batches.values():
            if batch.ended is None:
                self.finish(batch)
        self.reload({n: replace(j, paused=False) for n, j in (self.left | world.jobs).items()})
        for _ in range(250):
            if self.running() is None:
                world.process = Process(world)
            await asyncio.sleep(120)
            world.fault_rate, world.search_rate = world.fault_rate / 2, world.search_rate / 4
            for run in self.stored():
                if run.phase is tc.Phase.REJECTED:
                    self.ask_retry(run, force=False)
            if world.violations or not self.unsettled():
                break
        world.claim(holds=not self.unsettled(), text=f"never settled: {self.unsettled()}")
        await self.end()
        world.process = Process(world)
        await asyncio.sleep(300)
        await self.end(kill=False)
        errors = Counter(made.key for made in world.keboola if made.status == "error")
        for key, count in Counter(made.key for made in world.keboola).items():
            text = f"{key} was started {count} times"
            world.claim(holds=count <= 1 + errors[key] + world.forced[key], text=text)


async def play(directory: Path, seed: int, loop: VirtualLoop) -> World:
    world = World(directory, seed, loop)

    def say(event: tc.Event) -> None:
        world.tell(f"    {event.name} {event.text}")
        text = f"{event.text} {event.fields.get('traceback')}"
        world.claim(holds=event.name != "internal_error", text=text)

    def on_exception(_: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseExceptionGroup):
            error = error.split(Killed)[1]
        world.claim(holds=isinstance(error, Killed | None), text=str(context))

    loop.set_exception_handler(on_exception)
    clocks: Any = mock.patch.object(tc, "time", world.fake_time())
    with clocks, mock.patch.object(tc, "say", say):
        history = History(world, seed)
        try:
            await history.play()
        finally:
            await history.end()
    return world


def played(seed: int) -> tuple[int, list[str], list[str]]:
    """Play one history; returns its seed, what should not have happened, and its steps."""
    random.seed(seed)
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as directory,
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        loop: Any = runner.get_loop()
        world = runner.run(play(Path(directory), seed, loop))
    return seed, world.violations, world.story


def play_all(seeds: Iterable[int]) -> None:
    """Play histories on two cores; the first one that fails is told with its seed and steps."""
    with ProcessPoolExecutor(2) as pool:
        for seed, violations, story in pool.map(played, seeds, chunksize=5):
            if violations:
                pool.shutdown(wait=False, cancel_futures=True)
                pytest.fail("\n".join((*story, f"seed {seed}: {violations[0]}")))


def test_quick() -> None:
    """In 300 histories nothing is started twice and nothing is lost."""
    if "TECKO_SEED" in os.environ:
        _, violations, story = played(int(os.environ["TECKO_SEED"]))
        print("\n".join(story))
        assert not violations
    else:
        play_all(range(300))


@pytest.mark.long
def test_many() -> None:
    """In 1,500 further histories neither."""
    play_all(range(1000, 2500))
