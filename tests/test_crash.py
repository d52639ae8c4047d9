"""Killed anywhere, with any fault after it: never two Keboola jobs, and one when all is well.

A case kills the real process at one point of the trigger, or at one after the other, while each of
its jobs meets another pair of faults: one on the POST and one on the search. The search lags, too:
not at all, under the grace, and until just before the second search, for a third of the jobs each.
Points that another process can see are held by the simulator; for those at a commit, `crashing.py`
runs the program.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import simulator
from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    Daemon,
    JsonObject,
    Workspace,
    trigger_id,
    variables,
    wait_until,
)
from simulator import FAULTS, Hold, Simulator

CRASHING = Path(__file__).with_name("crashing.py")
AT_ONCE = 6  # cases that run beside each other: nearly all of their time is waiting
PATIENCE_S = 60.0
GRACE_S = 1
LAGS_S = (0.0, 0.5 * GRACE_S, 0.95 * GRACE_S)
CUT = '{"id": "1000'  # half of a JSON text, in an answer that is whole

Kind = tuple[str, JsonObject]

# Each kind of fault that the simulator knows, and each status that the trigger tells from others.
FAULTS_ANYWHERE: dict[str, Kind] = {
    "none": ("header", {}),
    "500": ("status", {"code": 500}),
    "503": ("status", {"code": 503, "retry_after": 1}),
    "408": ("status", {"code": 408}),
    "403": ("status", {"code": 403}),
    "reset_before": ("reset_before", {}),
    "reset_after": ("reset_after", {}),
    "close_after": ("close_after", {}),
    "hang_before": ("hang_before", {}),
    "hang_after": ("hang_after", {}),
    "truncated": ("truncated", {}),
    "html": ("body", {}),
    "cut": ("body", {"body": CUT, "content_type": "application/json"}),
    "drip": ("drip", {"interval": 0.2}),
    "redirect": ("redirect", {"code": 308}),
    "huge": ("huge", {"size": 17 * 1024 * 1024}),
    "odd_header": ("header", {"headers": {"retry-after": "999999999", "date": "never"}}),
}
POST_FAULTS = FAULTS_ANYWHERE | {
    "502_done": ("status", {"code": 502, "handled": True, "body": "<html>Bad Gateway</html>"}),
    "429": ("status", {"code": 429, "retry_after": 1}),
    "429_date": ("status", {"code": 429, "retry_after_date": 1}),
    "400": ("status", {"code": 400}),
    "401": ("status", {"code": 401}),
    "404": ("status", {"code": 404}),
    "422": ("status", {"code": 422}),
    "no_id": ("json", {"obj": {"status": "created"}}),
    "list": ("json", {"obj": []}),
}
REJECTIONS = {"400", "401", "403", "404", "422"}
SEARCH_FAULTS = FAULTS_ANYWHERE | {
    "429": ("status", {"code": 429, "retry_after_ms": 700}),
    "no_list": ("json", {"obj": {"jobs": []}}),
    "null_rows": ("json", {"obj": [None]}),
}
HEAVY = {"huge"}  # megabytes: they go to few of the jobs


# ---- where the process is killed ----


@dataclass(frozen=True)
class Held:
    """Killed from outside while all jobs' requests of one route stand at one place of their way."""

    route: str
    when: str
    lost: bool = False  # these requests are never carried out


@dataclass(frozen=True)
class SecondSearch:
    """Killed from outside while the searches stand that come after a first one found nothing."""


@dataclass(frozen=True)
class Commit:
    """Killed from inside, before or after the n-th commit that brings a run into a phase."""

    phase: str
    when: str
    number: int


Crash = Held | SecondSearch | Commit

LOST = Held("queue.create", "before", lost=True)
UNHANDLED = Held("queue.create", "before")
HANDLED = Held("queue.create", "after")

POINTS: dict[str, tuple[Crash, ...]] = {
    "before_the_intent": (Commit("intent", "before", 5),),
    "after_the_intent": (Commit("intent", "after", 5),),
    "first_search_sent": (Held("queue.search", "before"),),
    "first_search_answered": (Held("queue.search", "half"),),
    "before_sending": (Commit("sending", "before", 5),),
    "before_connecting": (Commit("sending", "after", 5),),
    "sent_not_handled": (UNHANDLED,),
    "handled_not_answered": (HANDLED,),
    "half_an_answer": (Held("queue.create", "half"),),
    "answered_not_committed": (Commit("sent", "before", 3),),
    "committed": (Commit("sent", "after", 3),),
    "outcome_not_committed": (Commit("unknown", "before", 3),),
    "unknown_not_committed_at_start": (HANDLED, Commit("unknown", "before", 5)),
    "unknown_committed_at_start": (UNHANDLED, Commit("unknown", "after", 5)),
    "recoverys_first_search": (HANDLED, Held("queue.search", "before")),
    "recoverys_first_search_of_none": (LOST, Held("queue.search", "after")),
    "recoverys_second_search": (LOST, SecondSearch()),
    "found_not_committed": (HANDLED, Commit("sent", "before", 5)),
    "before_the_second_sending": (LOST, Commit("sending", "before", 5)),
    "before_the_second_connecting": (LOST, Commit("sending", "after", 5)),
    "second_post_sent": (LOST, UNHANDLED),
    "second_post_handled": (LOST, HANDLED),
    "second_post_not_committed": (LOST, Commit("sent", "before", 3)),
    "again_and_again": (LOST, LOST, SecondSearch(), UNHANDLED, Held("queue.search", "after")),
}
DECIDED = "phase IN ('sent', 'finished', 'rejected')"
BY_CRON = {"before_connecting", "handled_not_answered", "recoverys_second_search"}


# ---- the world of one case ----


class LaggingQueue(simulator.Queue):
    """Shows each configuration's jobs in the search after a lag of their own."""

    lags_s: Mapping[str, float] = MappingProxyType({})

    def _new_job(self, body: JsonObject) -> simulator.Job:
        job = super()._new_job(body)
        job.born += self.lags_s.get(body["config"], 0.0)
        return job


class World(Workspace):
    """Many jobs, each with its faults, and a process that is killed."""

    def __init__(self, directory: Path, sim: Simulator, shift: int) -> None:
        super().__init__(directory, sim)
        assert isinstance(sim._queue, LaggingQueue)
        self.lags_s: dict[str, float] = {}
        sim._queue.lags_s = self.lags_s
        self.post_faults: dict[str, Kind] = {}
        self.search_faults: dict[str, Kind] = {}
        self._launcher: list[str] = []
        limits = {"request_timeout": "3s", "max_concurrency": 60, "trigger_grace": GRACE_S}
        self.config["limits"] |= limits
        for number, post in enumerate(POST_FAULTS):
            self._add(number, post, shift)

    def _add(self, number: int, post: str, shift: int) -> None:
        """Adds a job; which fault meets which one, and which lag, is another pair in each case."""
        searches = [*SEARCH_FAULTS]
        search = searches[(number + 7 * shift) % len(searches)]
        lag = (number + shift) % len(LAGS_S)
        post = "none" if post in HEAVY and shift % 4 else post
        search = "none" if search in HEAVY and (number + shift) % 4 else search
        name = f"j{number}_post_{post}_search_{search}_lag_{lag}"
        status = "expired" if number % 3 == 1 else "completed"
        self.add_job(name, f"batch_{number}", f"batch_{number}_b")
        self.sim.finish(f"batch_{number}", status)
        self.lags_s[name] = LAGS_S[lag]
        self.post_faults[name] = POST_FAULTS[post]
        self.search_faults[name] = SEARCH_FAULTS[search]

    def command(self, *arguments: str) -> list[str]:
        whole = super().command(*arguments)
        return [*whole[:3], *self._launcher, *whole[3 + bool(self._launcher) :]]

    # ---- faults ----

    def fault_posts(self) -> None:
        """Has each job's next POSTs go wrong in its own way: two where an outcome is not known."""
        for name, (kind, options) in self.post_faults.items():
            times = 1 if options.get("code", 500) in range(400, 500) else 2
            self.sim.fault("queue.create", kind, times, match=f'"config":"{name}"', **options)

    def fault_searches(self) -> None:
        """Has each job's next search go wrong in its own way."""
        for name, (kind, options) in self.search_faults.items():
            self.sim.fault("queue.search", kind, 1, match=f"configId={name}&", **options)

    # ---- crashing ----

    def crash(self, crash: Crash, *arguments: str) -> None:
        """Starts the process and kills it there."""
        match crash:
            case Commit():
                self._crash_at_commit(crash, *arguments)
            case Held():
                self._crash_at_hold(crash, *arguments)
            case SecondSearch():
                self._crash_at_second_search(*arguments)
        # What a server has begun goes on without its client, and ends before the next start.
        wait_until(lambda: self.sim._in_flight == 0, "the server has done all", PATIENCE_S)

    def _crash_at_commit(self, crash: Commit, *arguments: str) -> None:
        self._launcher = [str(CRASHING), crash.phase, crash.when, str(crash.number)]
        process = self.start(*arguments)
        self._launcher = []
        assert process.wait(PATIENCE_S) == -signal.SIGKILL, process.log()

    def _crash_at_hold(self, crash: Held, *arguments: str) -> None:
        with ExitStack() as stack:
            if crash.lost:
                fault = self.sim.fault(crash.route, "reset_before", None)
                self.sim._faults.insert(0, self.sim._faults.pop())  # of several, the first counts
                stack.callback(fault.clear)
            hold = self.sim.hold(crash.route, crash.when, None)
            stack.callback(hold.release)
            process = self.start(*arguments)
            self._wait_for_all(process, hold)
            process.kill()

    def _crash_at_second_search(self, *arguments: str) -> None:
        first = self.sim.hold("queue.search", "before", None)
        process = self.start(*arguments)
        self._wait_for_all(process, first)
        first.release()
        # Those that a fault has met are at their first search still: that is as good a place.
        self._wait_for(process, lambda: self.count("empty_searches > 0"), len(self.jobs) // 3)
        second = self.sim.hold("queue.search", "after", None)
        second.wait_reached(PATIENCE_S)
        process.kill()
        second.release()

    def _wait_for_all(self, process: Daemon, hold: Hold) -> None:
        """Waits until nearly every job that can come this far is held there."""
        open_jobs = len(self.jobs) - self.count(DECIDED)
        self._wait_for(process, lambda: hold.reached, max(1, open_jobs * 2 // 3))

    def _wait_for(self, process: Daemon, count: Callable[[], int], enough: int) -> None:
        is_over = lambda: count() >= enough or not process.is_running()  # noqa: E731
        wait_until(is_over, f"{enough} jobs at the point of the crash", PATIENCE_S)
        assert process.is_running(), process.log()

    def count(self, where: str) -> int:
        """How many runs the state file has that are like this; it is only read."""
        if not self.state.exists():
            return 0
        with closing(sqlite3.connect(f"{self.state.as_uri()}?mode=ro", uri=True)) as db:
            try:
                rows = db.execute(f"SELECT count(*) FROM runs WHERE {where}")  # noqa: S608
                return int(rows.fetchone()[0])
            except sqlite3.OperationalError:
                return 0  # not made yet

    # ---- and what comes of it ----

    def recover(self) -> None:
        """Runs the daemon until nothing is open, then with a server that is well, and ends it."""
        daemon = self.daemon()
        self._wait_while_changing(daemon, DECIDED)
        self.assert_rejections()
        self.cure()
        self._wait_while_changing(daemon, "phase = 'finished'")
        assert daemon.stop() == 0

    def _wait_while_changing(self, daemon: Daemon, where: str) -> None:
        """Waits until all runs are so; every second, a change that means nothing ends backoffs."""
        deadline = time.monotonic() + PATIENCE_S
        for poll_interval in itertools.cycle(["2s", "1s"]):
            self.config["defaults"]["poll_interval"] = poll_interval
            self.write()
            with suppress(TimeoutError):
                wait_until(lambda: self.count(where) == len(self.jobs), where, 1, every=0.1)
                return
            assert time.monotonic() < deadline, f"{self.open_jobs()}\n{daemon.log()[-4000:]}"

    def recover_by_cron(self) -> None:
        """The same with one pass after the other."""
        self._pass_until(DECIDED)
        self.assert_rejections()
        self.cure()
        self.write()
        self._pass_until("phase = 'finished'")

    def _pass_until(self, where: str) -> None:
        """Passes until all runs are so, as if time went by between them."""
        deadline = time.monotonic() + PATIENCE_S
        while self.count(where) < len(self.jobs):
            assert self.run("--once").code in {0, 1}
            assert time.monotonic() < deadline, f"still open: {self.open_jobs()}"
            self.change_state("UPDATE runs SET next_at = 0 WHERE phase = 'intent'")

    def open_jobs(self) -> list[JsonObject]:
        jobs = self.status()["jobs"]
        return [job for job in jobs if not job["trigger"] or job["trigger"]["state"] != "sent"]

    def cure(self) -> None:
        """Makes the server well, and a change that Keboola has to judge anew."""
        self.sim.clear_faults()
        for job in self.jobs.values():
            job["variables"] = {"cured": "yes"}

    def assert_at_most_one(self) -> None:
        """No job has two Keboola jobs, nor ever had, because those never vanish."""
        started = Counter(variables(job)["teckochecker_job"] for job in self.sim.jobs)
        assert [name for name, count in started.items() if count > 1] == []

    def assert_rejections(self) -> None:
        """Failed are those, and only those, whose POST Keboola has refused; none has two jobs."""
        self.assert_at_most_one()
        for job in self.open_jobs():
            fault = job["name"].split("_post_")[1].split("_search_")[0]
            assert fault in REJECTIONS, job
            assert job["status"] == "failed"
            assert "Simulated error" in job["error"]
            assert self.started(job["name"]) == []

    def assert_exactly_one(self) -> None:
        """Each job has one Keboola job, and the state file has its id and the right status."""
        started = {variables(job)["teckochecker_job"]: job for job in self.sim.jobs}
        assert len(self.sim.jobs) == len(started) == len(self.jobs)
        for job in self.status()["jobs"]:
            ids = self.jobs[job["name"]]["batch_ids"]
            known, ours = job["trigger"], started[job["name"]]
            assert (known["state"], known["keboola_job_id"]) == ("sent", ours["id"])
            assert known["id"] == trigger_id(job["name"], ids)
            assert variables(ours)["teckochecker_trigger_id"] == known["id"]
            is_whole = variables(ours)["batch_ids_failed"] == "[]"
            assert job["status"] == ("completed" if is_whole else "completed_with_failures")
            assert job["error"] is None


def run_case(point: str, directory: Path) -> None:
    """Crash by crash, and then to the end."""
    shift = [*POINTS].index(point)
    with Simulator() as sim:
        sim.add_key(OPENAI_KEY)
        sim.add_token(KEBOOLA_TOKEN)
        sim.job_seconds = 0
        world = World(directory, sim, shift)
        arguments = ["--once"] if point in BY_CRON else []
        with closing(world):
            crashes = POINTS[point]
            for number, crash in enumerate(crashes):
                if number == len(crashes) - 1 and not is_at_half(crash):
                    world.fault_posts()
                world.crash(crash, *arguments)
                world.assert_at_most_one()
                if number == 0:
                    world.fault_searches()
            world.fault_searches()
            world.recover_by_cron() if arguments else world.recover()
            world.assert_exactly_one()
    shutil.rmtree(directory)


def is_at_half(crash: Crash) -> bool:
    """Whether the crash wants an answer as it should be: no fault has its half held."""
    return isinstance(crash, Held) and (crash.route, crash.when) == ("queue.create", "half")


@pytest.fixture(scope="module")
def cases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The chosen cases, some of which run while the test of another one waits."""
    params: Sequence[Any] = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [p.params["point"] for p in params if p is not None and "point" in p.params]
    folder = tmp_path_factory.mktemp("crash")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(AT_ONCE) as pool:
        patch.setattr(simulator, "Queue", LaggingQueue)
        running = {
            point: pool.submit(run_case, point, folder / point)
            for point in POINTS
            if point in chosen
        }
        yield running
        for case in running.values():
            case.cancel()


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS)
def test_crash(cases: dict[str, Future[None]], point: str) -> None:
    """Killed there, whatever the servers do then, each job has one Keboola job in the end."""
    cases[point].result()


def test_every_fault() -> None:
    """The faults that the cases choose from are all that the simulator knows."""
    assert {kind for kind, _ in POST_FAULTS.values()} == set(FAULTS)
    assert {kind for kind, _ in SEARCH_FAULTS.values()} == set(FAULTS)
