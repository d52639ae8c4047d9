#!/usr/bin/env python3
"""Runs the daemon among faults, edits and kills, and counts what became of its jobs.

    python tests/soak.py --minutes 30

200 jobs are in the config at all times; those whose Keboola job has started are replaced by new
ones. A tenth of all requests goes wrong. Every few seconds the config is edited, a fifth of the
times into something broken, and every 20 seconds the process is killed with SIGKILL, half of the
times in the middle of a POST. At the end the servers are made well, every batch is finished, and
the Keboola jobs are compared with the jobs that there were.

All edits are within the promise of the README. Where two edits that the daemon sees as one could
leave it (a new name and a new target at once), no job meets both of them.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program, for the harness

from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PROGRAM,
    Daemon,
    JsonObject,
    Workspace,
    variables,
    wait_until,
)
from simulator import Fault, Simulator

Ids = frozenset[str]

GRACE_S = 3
LAGS_S = (0.0, 0.3 * GRACE_S, 0.9 * GRACE_S)
TICK_S = 0.1
EDIT_EVERY_S = (1.5, 4.5)
KILL_EVERY_S = 20.0
TARGETS = 100  # Keboola configurations: the search finds other jobs' rows as well
PATIENCE_S = 60.0
END_WITHIN_S = 180.0

# Which requests go wrong, how, and how many in a thousand: a tenth of them in all. A 429 holds a
# whole OpenAI account back, so that it comes less often there.
FAULTS: tuple[tuple[str, str, int, JsonObject], ...] = (
    ("*", "status", 15, {"code": 500}),
    ("*", "status", 10, {"code": 503, "retry_after_ms": 300}),
    ("*", "status", 5, {"code": 502, "handled": True, "body": "<html>Bad Gateway</html>"}),
    ("*", "status", 5, {"code": 408, "handled": True}),
    ("openai.*", "status", 2, {"code": 429, "retry_after_ms": 200}),
    ("queue.*", "status", 10, {"code": 429, "retry_after": 1}),
    ("openai.*", "status", 1, {"code": 404}),
    ("queue.create", "status", 10, {"code": 403}),
    ("queue.create", "status", 10, {"code": 400}),
    ("queue.search", "status", 5, {"code": 403}),
    ("*", "reset_before", 15, {}),
    ("*", "reset_after", 15, {}),
    ("*", "close_after", 10, {}),
    ("*", "truncated", 10, {}),
    ("*", "body", 5, {}),
    ("*", "json", 5, {"obj": {"nothing": None}}),
    ("*", "redirect", 2, {}),
    ("*", "hang_before", 2, {}),
    ("*", "hang_after", 2, {}),
    ("queue.create", "hang_after", 20, {}),
    ("*", "drip", 2, {"interval": 0.05}),
    ("*", "header", 2, {"headers": {"retry-after": "999999999"}}),
    ("queue.*", "huge", 1, {"size": 17 * 1024 * 1024}),
)
ENDS = ("completed", "completed", "completed", "failed", "expired", "cancelled")


@dataclass(slots=True)
class Piece:
    """A piece of work: the ids of its batches, and how it stands in the config."""

    ids: Ids
    name: str
    keys: JsonObject
    may_rename: bool  # else its target may change


@dataclass(frozen=True, slots=True)
class Figures:
    """What a soak came to."""

    seconds: float
    seed: int
    requests: int
    faults: int
    kills: int
    kills_in_post: int
    reloads: int
    rejected: int
    triggers: int
    duplicates: int
    lost: int
    wrong: int

    @property
    def is_good(self) -> bool:
        return not (self.duplicates or self.lost or self.wrong)

    def __str__(self) -> str:
        return (
            f"{self.seconds / 60:.1f} minutes, seed {self.seed}: {self.requests} requests, "
            f"{self.faults} faults injected, "
            f"{self.kills} kills ({self.kills_in_post} amid a POST), "
            f"{self.reloads} reloads ({self.rejected} more refused), {self.triggers} triggers, "
            f"{self.duplicates} duplicates, {self.lost} lost, {self.wrong} wrong"
        )


class SoakSpace(Workspace):
    """Its program runs as users run it.

    The tests' warnings as errors would have httpx's pool, when a deadline cuts its closing of
    connections short, print a traceback for each one that the garbage collector closes instead.
    """

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(PROGRAM), "--config", str(self.path), *arguments]


class Soak:
    """The config's jobs and what is owed for each, the process, and the dice."""

    def __init__(self, directory: Path, seed: int, jobs: int) -> None:
        self.seed = seed
        self.jobs = jobs
        self.dice = random.Random(seed)  # noqa: S311 - the same every time
        self.sim = Simulator(seed=seed)
        self.sim.record = False
        self.sim.add_key(OPENAI_KEY)
        self.sim.add_token(KEBOOLA_TOKEN)
        self.sim.start()
        self.space = SoakSpace(directory, self.sim)
        self.space.config["limits"] = {
            "request_timeout": "2s",
            "max_concurrency": 40,
            "trigger_grace": GRACE_S,
        }
        self.space.config["defaults"]["poll_interval"] = "4s"
        self.faults: list[Fault] = []
        self.daemons: list[Daemon] = []
        self.pieces: dict[str, Piece] = {}  # in the config, by name
        self.removed: list[Piece] = []
        self.started: Counter[Ids] = Counter()
        self.kills = self.kills_in_post = 0
        self._serial = 0
        self._next_edit = self._next_kill = 0.0

    def close(self) -> None:
        """Ends the process and the simulator; says so if the process has met a bug."""
        try:
            self.space.close()
        finally:
            self.sim.stop()

    @property
    def daemon(self) -> Daemon:
        return self.daemons[-1]

    # ---- the run ----

    def run(self, seconds: float) -> Figures:
        """Lets everything happen for so long, then makes the world well and counts."""
        began = time.monotonic()
        self.fill()
        self.start()
        for route, kind, in_thousand, options in FAULTS:
            fault = self.sim.fault(route, kind, None, probability=in_thousand / 1000, **options)
            self.faults.append(fault)
        self._next_edit, self._next_kill = began + 2, began + KILL_EVERY_S
        while (now := time.monotonic()) < began + seconds:
            if not self.daemon.is_running():
                raise RuntimeError(f"the daemon has ended by itself:\n{self.daemon.log()[-3000:]}")
            if now >= self._next_edit:
                self.edit()
                self._next_edit = now + self.dice.uniform(*EDIT_EVERY_S)
            if now >= self._next_kill:
                self._next_kill += KILL_EVERY_S
                self.kill()
                self.start()
            time.sleep(TICK_S)  # the soak goes by the clock
        self.make_well()
        return self.count(time.monotonic() - began)

    def start(self) -> None:
        self.daemons.append(self.space.start())
        self.daemon.wait_for_event("config_loaded", PATIENCE_S)

    def kill(self) -> None:
        """Kills the process: just so, amid a POST, twice, or for once as systemd does."""
        manner = self.dice.choice(["blind", "post", "post", "post", "post", "twice", "politely"])
        if manner == "politely":
            self.daemon.send(signal.SIGTERM)
            if (code := self.daemon.wait(PATIENCE_S)) != 0:
                raise RuntimeError(f"exit code {code} after SIGTERM:\n{self.daemon.log()[-3000:]}")
            return
        if manner == "post":
            self._await_post(self.dice.choice(["before", "after", "half"]))
        else:
            self.kills += 1
            self.daemon.kill()
        if manner == "twice":
            self.daemons.append(self.space.start())
            time.sleep(self.dice.uniform(0.2, 3))  # anywhere in its start: the clock decides
            self.kills += 1
            self.daemon.kill()
        # What a server has begun goes on without its client.
        wait_until(lambda: self.sim._in_flight == 0, "the servers have done all", PATIENCE_S)

    def _await_post(self, when: str) -> None:
        """Kills the process while one of its POSTs stands at this place of its way."""
        hold = self.sim.hold("queue.create", when)
        try:
            hold.wait_reached(8)
            self.kills_in_post += 1
        except TimeoutError:
            pass  # no POST is due, or a fault was in front of it
        finally:
            self.kills += 1
            self.daemon.kill()
            hold.release()

    def make_well(self) -> None:
        """Ends the faults and the batches, wakes every job, and waits until all are started."""
        self.sim.clear_faults()
        self.sim.search_lag = 0.0
        for batch_id, status in self.sim.state()["batches"].items():
            if status == "in_progress":
                self.sim.finish(batch_id)
        for piece in self.pieces.values():
            piece.keys.pop("paused", None)
            piece.keys["variables"] = {"round": "last"}  # arms what Keboola has refused
        self.write()
        try:
            wait_until(self.is_done, "every job started", END_WITHIN_S)
        except TimeoutError:
            print(f"not all jobs were started within {END_WITHIN_S:g} s", file=sys.stderr)
        self.daemon.send(signal.SIGTERM)
        self.daemon.wait(PATIENCE_S)

    def is_done(self) -> bool:
        self.look()
        if not all(self.started[piece.ids] for piece in self.pieces.values()):
            return False
        with closing(sqlite3.connect(f"{self.space.state.as_uri()}?mode=ro", uri=True)) as db:
            where = "phase IN ('intent', 'sending', 'unknown', 'rejected')"
            found = db.execute(f"SELECT count(*) FROM runs WHERE {where}").fetchone()  # noqa: S608
        return int(found[0]) == 0

    # ---- the config ----

    def fill(self) -> None:
        """Adds jobs until there are as many as there should be."""
        while len(self.pieces) < self.jobs:
            keys: JsonObject = {"config_id": f"c{self.dice.randrange(TARGETS)}"}
            piece = Piece(frozenset(), self.new_name(), keys, self.dice.random() < 0.5)
            self.give_ids(piece)
            self.pieces[piece.name] = piece

    def new_name(self) -> str:
        self._serial += 1
        return f"job-{self._serial}"

    def give_ids(self, piece: Piece) -> None:
        """Gives new batches to a job, which run for a while."""
        ids = []
        for _ in range(self.dice.choice([1, 1, 1, 2, 3])):
            self._serial += 1
            ids.append(f"batch_{self._serial}")
            ends_s, end = self.dice.uniform(2, 40), self.dice.choice(ENDS)
            self.sim.add_batch(ids[-1], [(0, "in_progress"), (ends_s, end)])
        piece.keys["batch_ids"] = ids
        piece.ids = frozenset(ids)

    def write(self) -> None:
        self.space.jobs.clear()
        self.space.jobs.update({name: piece.keys for name, piece in self.pieces.items()})
        self.space.write()

    def edit(self) -> None:
        """Saves the config once more, other than before or broken, and turns the search's lag."""
        self.sim.search_lag = self.dice.choice(LAGS_S)
        if self.dice.random() < 0.2:
            self.dice.choice(BREAKAGES)(self)
            return
        self.look()
        for piece in [*self.pieces.values()]:  # those that are done make room for new ones
            if self.started[piece.ids] and self.dice.random() < 0.7:
                self.remove(piece)
        for _ in range(self.dice.randint(1, 8)):
            change = self.dice.choice(CHANGES)
            change(self, self.dice.choice([*self.pieces.values()]))
        self.fill()
        self.write()

    def remove(self, piece: Piece) -> None:
        self.removed.append(self.pieces.pop(piece.name))

    def rename(self, piece: Piece) -> None:
        if piece.may_rename:
            del self.pieces[piece.name]
            piece.name = self.new_name()
            self.pieces[piece.name] = piece

    def retarget(self, piece: Piece) -> None:
        if not piece.may_rename:
            piece.keys["config_id"] = f"c{self.dice.randrange(TARGETS)}"

    def bring_back(self, _piece: Piece) -> None:
        """Brings a removed job back, with its name or another one; it may be done long ago."""
        if self.removed:
            recent = min(len(self.removed), 60)
            piece = self.removed.pop(-self.dice.randint(1, recent))
            if piece.may_rename and self.dice.random() < 0.3:
                piece.name = self.new_name()
            self.pieces[piece.name] = piece

    def change_ids(self, piece: Piece) -> None:
        """Gives other ids to a name; what is begun for the earlier ones is carried to its end."""
        self.give_ids(piece)

    def pause(self, piece: Piece) -> None:
        piece.keys["paused"] = not piece.keys.get("paused", False)

    def unpause_all(self, _piece: Piece) -> None:
        for piece in self.pieces.values():
            piece.keys.pop("paused", None)

    def change_variables(self, piece: Piece) -> None:
        piece.keys["variables"] = {"round": self.dice.randrange(1000)}

    def change_interval(self, piece: Piece) -> None:
        piece.keys["poll_interval"] = self.dice.choice(["1s", "3s", "10s"])

    def reorder(self, piece: Piece) -> None:
        names = [*self.pieces]
        self.dice.shuffle(names)
        self.pieces = {name: self.pieces[name] for name in names}
        self.dice.shuffle(piece.keys["batch_ids"])

    # ---- and edits that go wrong ----

    def cut(self) -> None:
        text = self.space.text()
        self.space.write(text[: len(text) // 2] + "\n\t[")

    def empty(self) -> None:
        self.space.path.write_text("")

    def delete(self) -> None:
        self.space.path.unlink(missing_ok=True)

    def misspell(self) -> None:
        self.space.write(self.space.text().replace("poll_interval: 4s", "poll_interval: soon"))

    def doubled(self) -> None:
        self.space.write(self.space.text() + "jobs: {}\n")

    def wrong_token(self) -> None:
        text = self.space.text()
        token = self.space.secrets["openai"]["value"]
        self.space.write(text.replace(token, token[:-8] + "AAAAAAA="))

    # ---- what came of it ----

    def look(self) -> None:
        """Counts the Keboola jobs by the batches that they are for."""
        self.started = Counter(ids_of(job) for job in self.sim.jobs)

    def count(self, seconds: float) -> Figures:
        """Compares the Keboola jobs with the jobs that there were."""
        self.look()
        lost = [piece for piece in self.pieces.values() if not self.started[piece.ids]]
        double = {ids: count for ids, count in self.started.items() if count > 1}
        statuses = self.sim.state()["batches"]
        wrong = [job for job in self.sim.jobs if not self._is_right(job, statuses)]
        known = self._recorded_ids()
        wrong += [j for j in self.sim.jobs if ids_of(j) in self._owed() and j["id"] not in known]
        for piece in lost:
            print(f"lost: {piece}", file=sys.stderr)
        for ids, count in double.items():
            print(f"started {count} times: {sorted(ids)}", file=sys.stderr)
            self._tell_story(ids)
        for job in wrong:
            print(f"not as it should be: {job}", file=sys.stderr)
        return Figures(
            seconds=seconds,
            seed=self.seed,
            requests=sum(self.sim.request_counts.values()),
            faults=sum(fault.hits for fault in self.faults),
            kills=self.kills,
            kills_in_post=self.kills_in_post,
            reloads=self._events("config_loaded") - len(self.daemons),
            rejected=self._events("config_rejected"),
            triggers=len(self.sim.jobs),
            duplicates=sum(double.values()) - len(double),
            lost=len(lost),
            wrong=len(wrong),
        )

    def _owed(self) -> set[Ids]:
        return {piece.ids for piece in self.pieces.values()}

    @staticmethod
    def _is_right(job: JsonObject, statuses: dict[str, str]) -> bool:
        """Whether a Keboola job was told what its batches came to, all of which have ended."""
        told = json.loads(variables(job)["batch_statuses"])
        return bool(told) and all(statuses.get(key) == value for key, value in told.items())

    def _recorded_ids(self) -> set[str]:
        """The ids of the Keboola jobs that the state file knows."""
        with closing(sqlite3.connect(f"{self.space.state.as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT keboola_job_id FROM runs WHERE phase IN ('sent', 'finished')")
            return {row[0] for row in rows}

    def _events(self, name: str) -> int:
        return sum(len(daemon.events_of(name)) for daemon in self.daemons)

    def _tell_story(self, ids: Ids) -> None:
        """Prints what the processes said of a job that was started twice."""
        names = {variables(j)["teckochecker_job"] for j in self.sim.jobs if ids_of(j) == ids}
        for daemon in self.daemons:
            for event in daemon.events:
                if event.get("job") in names:
                    print(f"  {daemon.pid}: {json.dumps(event)}", file=sys.stderr)


CHANGES: tuple[Callable[[Soak, Piece], None], ...] = (
    Soak.remove,
    Soak.rename,
    Soak.rename,
    Soak.retarget,
    Soak.bring_back,
    Soak.bring_back,
    Soak.change_ids,
    Soak.pause,
    Soak.unpause_all,
    Soak.change_variables,
    Soak.change_interval,
    Soak.reorder,
)
BREAKAGES: tuple[Callable[[Soak], None], ...] = (
    Soak.cut,
    Soak.empty,
    Soak.delete,
    Soak.misspell,
    Soak.doubled,
    Soak.wrong_token,
)


def ids_of(job: JsonObject) -> Ids:
    """The batches that a Keboola job is for."""
    return frozenset(json.loads(variables(job)["batch_statuses"]))


def soak(directory: Path, *, seconds: float, seed: int, jobs: int) -> Figures:
    """One soak in a directory of its own; prints its figures."""
    with closing(Soak(directory, seed, jobs)) as run:
        figures = run.run(seconds)
        print(figures, flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=1.0, metavar="N", help="how long (default: 1)")
    add("--seed", type=int, metavar="S", help="of the dice (default: another one each time)")
    add("--jobs", type=int, default=200, metavar="N", help="at all times (default: 200)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    with tempfile.TemporaryDirectory(prefix="teckochecker-soak-") as directory:
        figures = soak(
            Path(directory) / "work", seconds=60 * options.minutes, seed=seed, jobs=options.jobs
        )
    return 0 if figures.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
