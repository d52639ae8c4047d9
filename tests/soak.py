#!/usr/bin/env python3
"""Runs the daemon among faults, edits and kills, and counts what became of its jobs.

    python tests/soak.py --minutes 30

200 jobs are in the config at all times, a fifth of them with `match`; those whose Keboola jobs
have started are replaced. A tenth of all requests goes wrong, the config is edited every few
seconds, sometimes by ten `job add` at once, a fifth of the times into something broken, and every
20 seconds the process is killed, half of the times amid a POST. At the end the servers are made
well, every batch is finished, and the Keboola jobs, the state file and what a webhook was told are
compared with what is owed.

All edits are within the promise of the README: a new name and a new target at once are new work,
so that no job meets both of them.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program, for the harness

import yaml
from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PROGRAM,
    Daemon,
    JsonObject,
    Webhook,
    Workspace,
    clean_environment,
    variables,
    wait_until,
)
from simulator import Fault, Simulator, iso

from teckochecker import EVENTS

Ids = frozenset[str]
Figures = dict[str, int]  # what a soak came to
Told = tuple[str, str | None, str]  # an event's name, its run, its sentence

GRACE_S = 3
LAGS_S = (0.0, 0.3 * GRACE_S, 0.9 * GRACE_S)
TICK_S = 0.1
EDIT_EVERY_S = (1.5, 4.5)
KILL_EVERY_S = 20.0
TARGETS = 100  # Keboola configurations: the search finds other jobs' rows as well
PATIENCE_S = 60.0
END_WITHIN_S = 180.0
GROUPS = 4  # of a `match` job at most
ADDERS = 10  # `job add` at once

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
JOB_ENDS = ("success", "success", "success", "warning", "error", "terminated", "cancelled")


@dataclass(slots=True)
class Piece:
    """A job as it stands in the config, and the sets of batches that it is to be started for."""

    name: str
    keys: JsonObject
    may_rename: bool  # else its target may change
    owed: list[Ids] = field(default_factory=list)

    @property
    def is_match(self) -> bool:
        return "match" in self.keys


class SoakSpace(Workspace):
    """Its program runs as users run it: warnings of connections that a deadline cut are none."""

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(PROGRAM), "--config", str(self.path), *arguments]


class FaultyWebhook(Webhook):
    """Keeps what it is told; now and then it refuses, or takes an event and does not say so."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.is_well = False
        self.life = 0  # of the daemon: grows with each kill
        self.told: list[tuple[Told, int, bool]] = []  # with the life, and whether it was answered
        super().__init__()
        self.url = f"{self.address}/services/T0/B0/secret"

    def take(self, body: bytes) -> int | None:
        try:
            event = json.loads(body)
        except ValueError:
            return None  # killed in the middle of it
        fate = 1.0 if self.is_well else self.dice.random()
        if fate < 0.02:
            return 503
        self.told.append(((event["event"], event["run"], event["text"]), self.life, fate >= 0.04))
        return 200 if fate >= 0.04 else None

    def compare(self, expected: list[Told]) -> Iterator[str]:
        """What it was told other than each event once, or again after a lost answer or a kill."""
        place = 0
        before: tuple[Told, int, bool] | None = None
        for told, life, is_answered in self.told:
            if place < len(expected) and told == expected[place]:
                place += 1
            elif not (before and before[0] == told and (not before[2] or before[1] != life)):
                yield f"the webhook was told {told} where {expected[place : place + 1]} was next"
                return
            before = (told, life, is_answered)
        if place < len(expected):
            yield f"the webhook was not told {len(expected) - place} events, from {expected[place]}"


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
        self.webhook = FaultyWebhook(random.Random(seed))  # noqa: S311
        self.space = SoakSpace(directory, self.sim)
        limits = {"request_timeout": "2s", "max_concurrency": 40, "trigger_grace": GRACE_S}
        self.space.config["limits"] |= limits
        self.space.config["defaults"]["poll_interval"] = "4s"
        alerts = {"type": "webhook", "value": self.space.encrypt(self.webhook.url)}
        self.space.secrets["alerts"] = alerts
        self.space.config["notify"] = [{"secret": "alerts", "events": ["attention", "finished"]}]
        self.faults: list[Fault] = []
        self.daemons: list[Daemon] = []
        self.pieces: dict[str, Piece] = {}  # in the config, by name
        self.removed: list[Piece] = []
        self.sets: dict[Ids, bool] = {}  # all that ever were to be started; of a `match` job?
        self.started: Counter[Ids] = Counter()
        self.coming: list[tuple[float, str, JsonObject]] = []  # batches: when, id, metadata
        self.problems: list[str] = []
        self.kills = self.kills_in_post = self.added = 0
        self._serial = 0
        self._next_edit = self._next_kill = self._next_second = 0.0

    def close(self) -> None:
        """Ends the process and the servers; says so if the process has met a bug."""
        try:
            self.space.close()
        finally:
            self.webhook.close()
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
            self.let_pass(now)
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

    def let_pass(self, now: float) -> None:
        """Once a second, batches that are due come, and some Keboola jobs are finished."""
        if now < self._next_second:
            return
        self._next_second = now + 1
        due = [batch for batch in self.coming if batch[0] <= now]
        self.coming = [batch for batch in self.coming if batch[0] > now]
        for _, batch_id, metadata in due:
            self.add_batch(batch_id, metadata)
        for job in self.sim.jobs:
            if job["status"] in {"created", "processing"} and self.dice.random() < 0.3:
                self.sim.finish_job(job["id"], self.dice.choice(JOB_ENDS), "as the dice fell")

    def start(self) -> None:
        self.daemons.append(self.space.start())
        self.daemon.wait_for_event("config_loaded", PATIENCE_S)

    def kill(self) -> None:
        """Kills the process: just so, amid a POST, or twice."""
        manner = self.dice.choice(["blind", "post", "post", "twice"])
        if manner == "post":
            self._await_post(self.dice.choice(["before", "after", "half"]))
        else:
            self.kill_daemon()
        if manner == "twice":
            self.daemons.append(self.space.start())
            time.sleep(self.dice.uniform(0.2, 3))  # anywhere in its start: the clock decides
            self.kill_daemon()
        # What a server has begun goes on without its client.
        wait_until(lambda: self.sim._in_flight == 0, "the servers have done all", PATIENCE_S)

    def kill_daemon(self) -> None:
        self.kills += 1
        self.daemon.kill()
        self.webhook.life += 1

    def _await_post(self, when: str) -> None:
        """Kills the process while one of its POSTs stands at this place of its way."""
        hold = self.sim.hold("queue.create", when)
        try:
            hold.wait_reached(8)
            self.kills_in_post += 1
        except TimeoutError:
            pass  # no POST is due, or a fault was in front of it
        finally:
            self.kill_daemon()
            hold.release()

    def make_well(self) -> None:
        """Ends the faults and the batches, wakes every job, and waits until all is done."""
        self.sim.clear_faults()
        self.sim.search_lag = 0.0
        self.sim.job_seconds = 0.5
        self.webhook.is_well = True
        for _, batch_id, metadata in self.coming:
            self.add_batch(batch_id, metadata)
        for batch_id, status in self.sim.batch_statuses().items():
            if status == "in_progress":
                self.sim.finish(batch_id)
        for job in self.sim.jobs:
            self.sim.finish_job(job["id"])
        for piece in self.pieces.values():
            piece.keys.pop("paused", None)
            piece.keys["variables"] = {"round": "last"}  # arms what Keboola has refused
        self.write()
        try:
            wait_until(lambda: not self.missing(), "all is done", END_WITHIN_S, 0.5)
        except TimeoutError:
            print(f"not done within {END_WITHIN_S:g} s; see below", file=sys.stderr)
        self.daemon.send(signal.SIGTERM)
        self.daemon.wait(PATIENCE_S)

    def missing(self) -> list[str]:
        """What is not yet as it must be for the jobs in the config; those that left it are done."""
        self.look()
        owed = {ids for piece in self.pieces.values() for ids in piece.owed}
        found = [f"not started: {sorted(ids)}" for ids in owed if not self.started[ids]]
        recorded = {run["keboola_job_id"]: run for run in self.space.runs()}
        for job in self.sim.jobs:
            run = recorded.get(job["id"], {"phase": "not recorded", "keboola_status": None})
            if ids_of(job) in owed and not is_followed(run, job):
                where = f"{run['phase']}, {run['keboola_status']}"
                found.append(f"{where} in the state file: {brief(job)}")
        return [*found, *self.webhook.compare(self.events_for_webhook())]

    # ---- the config ----

    def fill(self) -> None:
        """Adds jobs until there are as many as there should be."""
        while len(self.pieces) < self.jobs:
            piece = self.new_piece(is_match=self.dice.random() < 0.2)
            self.pieces[piece.name] = piece

    def new_piece(self, *, is_match: bool) -> Piece:
        keys: JsonObject = {"config_id": f"c{self.dice.randrange(TARGETS)}"}
        piece = Piece(self.new_name("job"), keys, self.dice.random() < 0.5)
        if is_match:
            keys["match"] = {"pipeline": self.new_name("pipeline")}
            keys["since"] = iso(time.time() - 3600)[:19] + "Z"
            if self.dice.random() < 0.6:
                keys |= {"group_by": "date", "group_size": "metadata.size"}
        self.give_batches(piece)
        return piece

    def new_name(self, what: str) -> str:
        self._serial += 1
        return f"{what}-{self._serial}"

    def give_batches(self, piece: Piece) -> None:
        """Gives new batches to a job, or one more group to a `match` job; they run for a while."""
        count = self.dice.choice([1, 1, 1, 2, 3])
        if piece.is_match and "group_by" not in piece.keys:
            count = 1
        ids = [self.new_name("batch_").replace("-", "") for _ in range(count)]
        if piece.is_match:
            metadata = {**piece.keys["match"], "date": self.new_name("date"), "size": str(count)}
            self.add_batch(ids[0], metadata)
            for batch_id in ids[1:]:
                at = time.monotonic() + self.dice.uniform(0, 15)
                self.coming.append((at, batch_id, metadata))
            piece.owed.append(frozenset(ids))
        else:
            for batch_id in ids:
                self.add_batch(batch_id)
            piece.keys["batch_ids"] = ids
            piece.owed = [frozenset(ids)]
        self.sets[frozenset(ids)] = piece.is_match

    def add_batch(self, batch_id: str, metadata: JsonObject | None = None) -> None:
        ends_s, end = self.dice.uniform(2, 40), self.dice.choice(ENDS)
        timeline = [(0, "in_progress"), (ends_s, end)]
        self.sim.add_batch(batch_id, timeline, metadata=metadata)

    def write(self) -> None:
        self.space.jobs.clear()
        self.space.jobs.update({name: piece.keys for name, piece in self.pieces.items()})
        self.space.write()

    def edit(self) -> None:
        """Saves the config once more, other than before or broken, and turns Keboola's switches."""
        self.sim.search_lag = self.dice.choice(LAGS_S)
        self.sim.job_seconds = self.dice.choice([None, 5.0])
        if self.dice.random() < 0.2:
            self.dice.choice(BREAKAGES)(self)
            return
        self.look()
        for piece in [*self.pieces.values()]:  # those that are done make room for new ones
            is_full = not piece.is_match or len(piece.owed) >= GROUPS
            if all(self.started[ids] for ids in piece.owed) and self.dice.random() < 0.7:
                self.remove(piece) if is_full else self.give_batches(piece)
        for _ in range(self.dice.randint(1, 8)):
            change = self.dice.choice(CHANGES)
            change(self, self.dice.choice([*self.pieces.values()]))
        is_by_command = self.dice.random() < 0.1
        if not is_by_command:
            self.fill()
        self.write()
        if is_by_command:
            self.add_by_command()

    def add_by_command(self) -> None:
        """Adds jobs by several `job add` at once; the one editor takes them one after another."""
        pieces = [self.new_piece(is_match=number == 0) for number in range(ADDERS)]
        commands = [("job", "add", piece.name, *options_of(piece.keys)) for piece in pieces]
        directory, env = self.space.directory, clean_environment()
        lines = [self.space.command(*command) for command in commands]
        adding = [subprocess.Popen(line, cwd=directory, env=env) for line in lines]
        codes = [process.wait(PATIENCE_S) for process in adding]
        self.pieces |= {piece.name: piece for piece in pieces}
        self.added += len(pieces)
        written: JsonObject = yaml.safe_load(self.space.path.read_text())["jobs"]
        if any(codes) or written.keys() != self.pieces.keys():
            names = written.keys() ^ self.pieces.keys()
            self.problems.append(f"job add exited {codes}; amiss in the file: {names}")

    def remove(self, piece: Piece) -> None:
        self.removed.append(self.pieces.pop(piece.name))

    def rename(self, piece: Piece) -> None:
        if piece.may_rename:
            del self.pieces[piece.name]
            piece.name = self.new_name("job")
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
                piece.name = self.new_name("job")
            self.pieces[piece.name] = piece

    def pause(self, piece: Piece) -> None:
        piece.keys["paused"] = not piece.keys.get("paused", False)

    def unpause_all(self, _piece: Piece) -> None:
        for piece in self.pieces.values():
            piece.keys.pop("paused", None)

    def change_variables(self, piece: Piece) -> None:
        piece.keys["variables"] = {"round": self.dice.randrange(1000)}

    def reorder(self, piece: Piece) -> None:
        names = [*self.pieces]
        self.dice.shuffle(names)
        self.pieces = {name: self.pieces[name] for name in names}
        self.dice.shuffle(piece.keys.get("batch_ids", []))

    # ---- and edits that go wrong ----

    def cut(self) -> None:
        text = self.space.text()
        self.space.write(text[: len(text) // 2] + "\n\t[")

    def delete(self) -> None:
        self.space.path.unlink(missing_ok=True)

    def misspell(self) -> None:
        self.space.write(self.space.text().replace("poll_interval: 4s", "poll_interval: soon"))

    # ---- what came of it ----

    def look(self) -> None:
        """Counts the Keboola jobs by the batches that they are for."""
        self.started = Counter(ids_of(job) for job in self.sim.jobs)

    def count(self, seconds: float) -> Figures:
        """Compares what came of it with the jobs that there were."""
        missing = self.missing()
        lost = [line for line in missing if line.startswith("not started")]
        double = {ids: count for ids, count in self.started.items() if count > 1}
        statuses = self.sim.batch_statuses()
        wrong = [line for line in missing if line not in lost] + self.problems
        wrong += [f"told {brief(j)}" for j in self.sim.jobs if not self._is_right(j, statuses)]
        print(*lost, *(f"wrong: {line}" for line in wrong), sep="\n", file=sys.stderr)
        for ids, count in double.items():
            print(f"started {count} times: {sorted(ids)}", file=sys.stderr)
        return {
            "seconds": round(seconds),
            "seed": self.seed,
            "requests": sum(self.sim.request_counts.values()),
            "faults": sum(fault.hits for fault in self.faults),
            "kills": self.kills,
            "kills amid a POST": self.kills_in_post,
            "reloads": self._events("config_loaded") - len(self.daemons),
            "reloads refused": self._events("config_rejected"),
            "jobs by job add": self.added,
            "triggers": len(self.sim.jobs),
            "triggers of match jobs": sum(self.sets.get(ids_of(j), False) for j in self.sim.jobs),
            "events told": len(self.webhook.told),
            "duplicates": sum(double.values()) - len(double),
            "lost": len(lost),
            "wrong": len(wrong),
        }

    def _is_right(self, job: JsonObject, statuses: dict[str, str]) -> bool:
        """Whether a Keboola job is for a whole set of batches, and was told what they came to."""
        told = json.loads(variables(job)["batch_statuses"])
        return frozenset(told) in self.sets and told.items() <= statuses.items()

    def events_for_webhook(self) -> list[Told]:
        """The events of the log that the webhook is to be told, as it should have got them."""
        names = [name for name, (_, groups, _) in EVENTS.items() if groups != "-"]
        marks = ", ".join("?" * len(names))
        query = f"SELECT name, run, text FROM events WHERE name IN ({marks}) ORDER BY id"  # noqa: S608
        with closing(sqlite3.connect(f"{self.space.state.as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute(query, names).fetchall()
        return [(name, run, as_told(text)) for name, run, text in rows]

    def _events(self, name: str) -> int:
        return sum(len(daemon.events_of(name)) for daemon in self.daemons)


CHANGES: tuple[Callable[[Soak, Piece], None], ...] = (
    *(Soak.remove, Soak.rename, Soak.retarget, Soak.bring_back, Soak.bring_back, Soak.give_batches),
    *(Soak.pause, Soak.unpause_all, Soak.change_variables, Soak.reorder),
)
BREAKAGES: tuple[Callable[[Soak], None], ...] = (Soak.cut, Soak.delete, Soak.misspell)


def ids_of(job: JsonObject) -> Ids:
    """The batches that a Keboola job is for."""
    return frozenset(json.loads(variables(job)["batch_statuses"]))


def is_followed(run: JsonObject, job: JsonObject) -> bool:
    """Whether a run knows how its Keboola job has ended."""
    is_ended: bool = job["isFinished"] and run["phase"] == "finished"
    return is_ended and run["keboola_status"] == job["status"]


def brief(job: JsonObject) -> str:
    told = variables(job)
    name, group = told["teckochecker_job"], told.get("teckochecker_group", "")
    return f"Keboola job {job['id']} ({job['status']}) of {name}/{group}: {told['batch_statuses']}"


def as_told(text: str) -> str:
    """An event's sentence as a webhook gets it: angle brackets are commands to some."""
    return f"TeckoChecker: {text}".replace("<", "\u2039").replace(">", "\u203a")


def options_of(keys: JsonObject) -> list[str]:
    """A job's keys as the options of `job add`."""
    options: list[str] = []
    for key, value in keys.items():
        option = f"--{key.removesuffix('s') if key == 'batch_ids' else key}".replace("_", "-")
        pairs = [f"{k}={v}" for k, v in value.items()] if key == "match" else value
        for text in pairs if isinstance(pairs, list) else [str(pairs)]:
            options += [option, text]
    return options


def soak(directory: Path, *, seconds: float, seed: int, jobs: int) -> Figures:
    """One soak in a directory of its own; prints its figures."""
    with closing(Soak(directory, seed, jobs)) as run:
        figures = run.run(seconds)
        print(", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
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
    return 1 if figures["duplicates"] or figures["lost"] or figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
