"""What webhooks are told: each thing once, in order, and never at a run's cost."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from harness import PATIENCE_S, Webhook, Workspace, wait_until
from test_storage import LimitedFiles

PATH_SECRET = "T0PS3CR3T-path-of-a-webhook"


class Receiver(Webhook):
    """A webhook: keeps what it gets, answers as it is told, or not at all."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.attempts = 0
        self.status = 200
        self.gate = threading.Event()  # while it is not set, nobody is answered
        self.gate.set()
        super().__init__()
        self.url = f"{self.address}/{PATH_SECRET}?key={PATH_SECRET}"

    def take(self, body: bytes) -> int:
        self.attempts += 1
        self.gate.wait(PATIENCE_S)
        if self.status < 300:
            self.bodies.append(json.loads(body))
        return self.status

    def events(self) -> list[tuple[str, str | None]]:
        return [(body["event"], body["job"]) for body in self.bodies]

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.bodies) >= count, f"{count} messages; so far {self.bodies}")

    def close(self) -> None:
        self.gate.set()
        super().close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with closing(found := Receiver()):
        yield found


@pytest.fixture
def told(workspace: Workspace, receiver: Receiver) -> Workspace:
    """A workspace with a webhook that is told of attention and of every end."""
    workspace.secrets["hook"] = {"type": "webhook", "value": workspace.encrypt(receiver.url)}
    workspace.config["notify"] = [{"secret": "hook", "events": ["attention", "finished"]}]
    return workspace


def reject(workspace: Workspace, name: str) -> Callable[[], None]:
    """Have Keboola reject a job's start; returns what ends that."""
    match = f'"config":"{name}"'
    return workspace.sim.fault("queue.create", "status", None, match=match, code=400).clear


def webhook_row(workspace: Workspace) -> tuple[int, int]:
    """Return the number of the last event that the webhook has had, and its failures in a row."""
    with closing(sqlite3.connect(f"{workspace.state.as_uri()}?mode=ro", uri=True)) as db:
        told_up_to, failures = db.execute("SELECT told_up_to, failures FROM webhooks").fetchone()
    return told_up_to, failures


@pytest.mark.long
def test_a_morning(told: Workspace, receiver: Receiver) -> None:
    """Each end and each trouble is told once, and what was wrong once more when it is over."""
    told.add_job("good", "batch_good")
    told.add_job("half", "batch_half", "batch_bad")
    told.sim.finish("batch_bad", "failed")
    told.add_job("bad", "batch_of_bad")
    end = reject(told, "bad")
    daemon = told.daemon()
    receiver.wait_for(3)
    firsts = [("completed", "good"), ("completed_with_failures", "half"), ("job_failed", "bad")]
    assert sorted(receiver.events(), key=str) == firsts
    failed = next(body for body in receiver.bodies if body["job"] == "bad")
    assert failed["text"].startswith("TeckoChecker: bad: failed: Keboola answered 400")
    assert (failed["run"], failed["level"]) == ("bad", "error")
    end()
    assert told.run("retry", "bad").code == 0
    receiver.wait_for(5)
    assert receiver.events()[3:] == [("job_failed_recovered", "bad"), ("completed", "bad")]

    told.write("jobs: [\n")
    daemon.wait_for_event("config_rejected")
    receiver.wait_for(6)
    told.reload(daemon)
    receiver.wait_for(7)
    rejected = [("config_rejected", None), ("config_rejected_recovered", None)]
    assert receiver.events()[5:] == rejected
    assert f"{told.path}:" in receiver.bodies[5]["text"]
    assert PATH_SECRET not in daemon.log()


def test_only_what_its_rule_names(told: Workspace, receiver: Receiver) -> None:
    """A rule of event names gets these; one without events gets what needs attention."""
    with closing(Receiver()) as other:
        told.secrets["other"] = {"type": "webhook", "value": told.encrypt(other.url)}
        rules = [{"secret": "hook"}, {"secret": "other", "events": ["trigger_sent"]}]
        told.config["notify"] = rules
        told.add_job("good", "batch_good")
        told.add_job("bad", "batch_bad")
        reject(told, "bad")
        assert told.once().code == 1
        assert receiver.events() == [("job_failed", "bad")]
        assert other.events() == [("trigger_sent", "good")]


def test_two_rules_for_one_webhook(told: Workspace, receiver: Receiver) -> None:
    """A webhook with two rules that name the same event has it once, from a pass too."""
    told.config["notify"].append({"secret": "hook", "events": ["completed"]})
    told.add_job("job", "batch_a")
    assert told.once().code == 0
    assert receiver.events() == [("completed", "job")]


def test_told_on_a_full_disk(told: Workspace, receiver: Receiver) -> None:
    """What it has had, and could not be stored as such, it does not get again."""
    directory = told.directory / "disk"
    directory.mkdir()
    disk = LimitedFiles(told, directory)
    told.config["notify"][0]["events"] = ["finished"]
    receiver.gate.clear()
    told.add_job("first", "batch_a")
    daemon = told.daemon()
    wait_until(lambda: receiver.attempts, "the webhook is asked")
    disk.fill(daemon)
    receiver.gate.set()
    daemon.wait_for_event("state_write_failed")
    disk.free(daemon)
    told.add_job("second", "batch_b")
    told.reload(daemon)
    receiver.wait_for(2)
    assert receiver.events() == [("completed", "first"), ("completed", "second")]


def test_a_refused_key(told: Workspace, receiver: Receiver) -> None:
    """A key that is refused is told by name, and that it works again."""
    told.add_job("job", "batch_a", status="in_progress")
    fault = told.sim.fault("openai.*", "status", None, code=401)
    assert told.once().code == 1
    assert receiver.events() == [("account_failing", None)]
    assert "the secret openai is refused: " in receiver.bodies[0]["text"]
    assert told.once().code == 1
    assert len(receiver.bodies) == 1
    fault.clear()
    assert told.once().code == 0
    assert receiver.events()[1:] == [("account_failing_recovered", None)]


@pytest.mark.long
def test_a_dead_webhook_delays_nothing(told: Workspace, receiver: Receiver) -> None:
    """With one place for requests and a webhook that hangs, runs start and others are told."""
    with closing(Receiver()) as quick:
        told.secrets["quick"] = {"type": "webhook", "value": told.encrypt(quick.url)}
        told.config["notify"].append({"secret": "quick", "events": ["finished"]})
        told.config["limits"] |= {"max_concurrency": 1}
        receiver.gate.clear()
        told.add_job("first", "batch_a")
        daemon = told.daemon()
        wait_until(lambda: receiver.attempts, "the webhook is asked")
        told.add_job("second", "batch_b")
        told.reload(daemon)
        quick.wait_for(2)
        assert daemon.events_of("notify_failed") == []  # it hangs still
        assert receiver.bodies == []


@pytest.mark.long
def test_a_webhook_that_comes_back(told: Workspace, receiver: Receiver) -> None:
    """What it refused is told later, in order, after a kill too; the trouble is logged once."""
    receiver.status = 500
    told.add_job("first", "batch_a")
    daemon = told.daemon()
    assert daemon.wait_for_event("notify_failed")["error"] == "it answered 500"
    told.add_job("second", "batch_b")
    told.reload(daemon)
    daemon.wait_for_event("completed", job="second")
    wait_until(lambda: receiver.attempts >= 2, "a second attempt")
    assert len(daemon.events_of("notify_failed")) == 1
    daemon.kill()
    told.change_state("UPDATE webhooks SET next_at = 0")
    receiver.status = 200
    told.daemon()
    receiver.wait_for(2)
    assert receiver.events() == [("completed", "first"), ("completed", "second")]


def test_a_day_is_enough(told: Workspace, receiver: Receiver) -> None:
    """What could not be told for a day is dropped with a line, once it was tried five times."""
    receiver.status = 500
    told.add_job("job", "batch_a")
    assert told.once().code == 0
    told.change_state("UPDATE events SET at = at - 90000")
    told.change_state("UPDATE webhooks SET next_at = 0")
    assert "notify_dropped" not in told.run("--once").stderr  # the network may come back now
    told.change_state("UPDATE webhooks SET failures = 5, next_at = 0")
    (dropped,) = [e for e in told.run("--once").events if e["event"] == "notify_dropped"]
    assert dropped["why"].startswith("it answered 500")
    assert webhook_row(told)[1] == 0


@pytest.mark.long
def test_once_does_not_wait_for_a_webhook(told: Workspace, receiver: Receiver) -> None:
    """A webhook that hangs holds up a pass for ten seconds at most, and is told by the next."""
    receiver.gate.clear()
    told.add_job("job", "batch_a")
    started = time.monotonic()
    assert told.once().code == 0
    assert time.monotonic() - started < 15
    receiver.gate.set()
    told.change_state("UPDATE webhooks SET next_at = 0")
    told.once()
    assert ("completed", "job") in receiver.events()


def test_a_clock_that_was_set_back(told: Workspace, receiver: Receiver) -> None:
    """A webhook whose next try is recorded far in the future is tried now."""
    receiver.status = 500
    told.add_job("job", "batch_a")
    told.once()
    told.change_state("UPDATE webhooks SET next_at = next_at + 1e7")
    receiver.status = 200
    assert told.run("--once").code == 0
    assert receiver.events() == [("completed", "job")]


def test_a_webhook_that_is_new(told: Workspace, receiver: Receiver) -> None:
    """It is told from here on, and not again of all that was when it comes back."""
    rules = told.config.pop("notify")
    told.add_job("first", "batch_a")
    told.once()
    told.config["notify"] = rules
    told.add_job("second", "batch_b")
    told.once()
    assert receiver.events() == [("completed", "second")]


@pytest.mark.long
def test_no_address_anywhere(told: Workspace, receiver: Receiver) -> None:
    """A webhook's address is its password, also where it cannot be reached."""
    told.add_job("job", "batch_a")
    receiver.close()
    daemon = told.daemon()
    assert "ConnectError" in daemon.wait_for_event("notify_failed")["error"]
    daemon.stop()
    assert PATH_SECRET not in daemon.log()
    assert PATH_SECRET.encode() not in told.state.read_bytes()
    for command in (("status",), ("logs",), ("secret", "list"), ("status", "--json")):
        assert PATH_SECRET not in told.run(*command).stdout


def test_interrupted_while_a_webhook_hangs(told: Workspace, receiver: Receiver) -> None:
    """Ctrl-C ends a pass that tells a webhook what it has found, at once; it is told later."""
    receiver.gate.clear()
    told.add_job("job", "batch_a")
    running = told.start("--once")
    wait_until(lambda: receiver.attempts, "the webhook is asked")
    asked_at = time.monotonic()
    running.send(signal.SIGINT)
    assert running.wait() == 130
    assert time.monotonic() - asked_at < 5
    assert webhook_row(told)[1] == 0
