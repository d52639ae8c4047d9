"""Pages of an account's list save requests, and nothing on them can lose, double or end a batch.

What is counted are the requests that the simulator got in one poll, of all due batches at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence

import pytest
from harness import COMPONENT, Daemon, Workspace, variables, wait_until
from simulator import Simulator

IDS_EACH = 10  # batches of a job, as many as one may have
PATIENCE_S = 60.0

# How many batches there are, which of them are watched (0: the oldest), and what a poll may cost.
WORLDS: dict[str, tuple[int, Sequence[int], int]] = {
    "one job": (10, range(10), 3),
    "newest": (1_000, range(1_000), 12),
    "clusters": (20_000, [200 * k + n for k in range(100) for n in range(10)], 210),
    "singly": (20_000, range(1_000, 20_000, 2_000), 12),
}


def batch_id(number: int) -> str:
    return f"batch_{number * 7919 % 100_003:05}"  # their order says nothing


def seed(sim: Simulator, total: int, spaced_s: int) -> None:
    """Adds batches in progress, so many seconds apart; of very many, 200 are of one second."""
    now = int(time.time())
    with sim.changing():
        for number in range(total):
            hour = number // 200 if total > 1_000 and not spaced_s else 0
            created_at = now - spaced_s * (total - number) - 3600 * (total // 200 - hour)
            sim.add_batch(batch_id(number), created_at=created_at)


def watch(workspace: Workspace, numbers: Iterable[int]) -> None:
    ids = [batch_id(number) for number in numbers]
    for start in range(0, len(ids), IDS_EACH):
        name = f"job{start // IDS_EACH}"
        workspace.jobs[name] = {"batch_ids": ids[start : start + IDS_EACH], "config_id": name}


def polled(workspace: Workspace) -> int:
    """How many requests there were for batches and pages."""
    counts = workspace.sim.request_counts
    return sum(counts.get(f"openai.{route}", 0) for route in ("get", "list"))


def show_all_as(workspace: Workspace, status: str) -> None:
    """Has the list show each batch with the status."""

    def bend(page: dict[str, list[dict[str, object]]]) -> object:
        return page | {"data": [row | {"status": status} for row in page["data"]]}

    workspace.sim.fault("openai.list", "json", None, transform=bend)


class Polls:
    """Has all jobs polled when a test wants it: nothing but a change of its interval does."""

    def __init__(self, workspace: Workspace) -> None:
        self._space = workspace
        self._interval_s = workspace.config["defaults"]["poll_interval"] = 3600

    def daemon(self) -> Daemon:
        """Starts the daemon, and waits for its first poll."""
        daemon = self._space.start()
        self.count()
        return daemon

    def count(self) -> int:
        """The requests of one more poll, of every run with another interval."""
        self._interval_s += 60
        self._space.config["defaults"]["poll_interval"] = self._interval_s
        self._space.sim.reset_stats()
        self._space.write()

        def is_over() -> bool:
            times = [(r["last_check_at"] or 0, r["next_at"] or 0) for r in self._space.runs()]
            is_new = [abs(due_at - at - self._interval_s) < 25 for at, due_at in times]
            return len(is_new) == len(self._space.jobs) and all(is_new)

        wait_until(is_over, "a poll", PATIENCE_S, every=0.2)
        return polled(self._space)


@pytest.mark.long
@pytest.mark.parametrize("spaced_s", [0, 30, 600])
@pytest.mark.parametrize("world", WORLDS)
def test_requests_per_poll_after_a_restart(workspace: Workspace, world: str, spaced_s: int) -> None:
    """From the third poll on, pages keep its requests low, with a restart before each of them."""
    total, watched, most = WORLDS[world]
    seed(workspace.sim, total, spaced_s)
    watch(workspace, watched)
    counts = []
    for _ in range(4):
        workspace.sim.reset_stats()
        assert workspace.once().code == 0
        counts.append(polled(workspace))
    assert max(counts[2:]) <= most, counts


@pytest.mark.long
@pytest.mark.parametrize("world", WORLDS)
def test_requests_per_poll(workspace: Workspace, world: str) -> None:
    """The same within one process."""
    total, watched, most = WORLDS[world]
    seed(workspace.sim, total, 600)
    watch(workspace, watched)
    polls = Polls(workspace)
    polls.daemon()
    polls.count()
    counts = [polls.count() for _ in range(2)]
    assert max(counts) <= most, counts


@pytest.mark.long
def test_never_much_more_than_single_requests(workspace: Workspace) -> None:
    """Where pages show nothing of use, a poll costs two requests more at most."""
    seed(workspace.sim, 700, 600)
    watch(workspace, range(0, 100, 5))  # far from the newest, and from each other
    polls = Polls(workspace)
    polls.daemon()
    assert max(polls.count() for _ in range(3)) <= 20 + 2


@pytest.mark.long
def test_only_its_own_answer_ends_a_batch(workspace: Workspace) -> None:
    """A page that calls batches completed makes them be asked for; their own answer counts."""
    seed(workspace.sim, 10, 0)
    watch(workspace, range(10))

    show_all_as(workspace, "completed")
    polls = Polls(workspace)
    daemon = polls.daemon()
    assert polls.count() == 11  # a page, and each batch by itself
    assert workspace.job("job0")["completed_count"] == 0
    workspace.sim.clear_faults()
    for number in range(10):
        workspace.sim.finish(batch_id(number), "expired" if number == 3 else "completed")
    daemon.send(signal.SIGHUP)  # nothing has changed, and nothing is due
    workspace.config["defaults"]["poll_interval"] = "2h"
    workspace.write()
    daemon.wait_for_event("completed_with_failures", job="job0")
    (job,) = workspace.sim.jobs
    assert job["component"] == COMPONENT
    assert variables(job)["batch_ids_failed"] == f'["{batch_id(3)}"]'


@pytest.mark.long
def test_stale_list(workspace: Workspace) -> None:
    """A list that shows less than an answer before it is told of once, and done without."""
    seed(workspace.sim, 10, 0)
    watch(workspace, range(10))
    polls = Polls(workspace)
    daemon = polls.daemon()
    show_all_as(workspace, "validating")
    polls.count()
    daemon.wait_for_event("list_not_usable")
    assert [polls.count() for _ in range(2)] == [10, 10]
    workspace.sim.finish(batch_id(0))
    polls.count()
    assert workspace.job("job0")["completed_count"] == 1
    assert len(daemon.events_of("list_not_usable")) == 1


@pytest.mark.long
@pytest.mark.parametrize("code", [404, 405, 429, 500])
def test_server_without_a_list(workspace: Workspace, code: int) -> None:
    """Without a list, batches are asked for one by one, and no poll fails for that."""
    seed(workspace.sim, 10, 0)
    watch(workspace, range(10))
    workspace.sim.fault("openai.list", "status", None, code=code)
    polls = Polls(workspace)
    daemon = polls.daemon()
    assert [polls.count(), polls.count()] == [10, 10]
    assert daemon.events_of("poll_failed") == []


def test_list_without_after(workspace: Workspace) -> None:
    """A server that shows the same page for ever is not asked for it for ever."""
    seed(workspace.sim, 7, 0)
    watch(workspace, range(7))
    rows = [{"id": batch_id(n), "status": "in_progress", "created_at": 1} for n in range(5)]
    workspace.sim.fault("openai.list", "json", None, obj={"data": rows, "has_more": True})
    assert workspace.once().code == 0
    assert polled(workspace) <= 7 + 2
