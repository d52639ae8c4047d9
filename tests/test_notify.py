"""What webhooks are told: each thing once, once more when it is over, and never at a job's cost."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from harness import PATIENCE_S, Workspace, wait_until

import teckochecker as tc
from teckochecker import Batch, Hook, Message, Target, Told, Trigger, TriggerState, Usage, Work

PATH_SECRET = "T0PS3CR3T-path-of-a-webhook"
NOW = 1_795_000_000.0
TARGET = Target("https://connection.keboola.com", "component", "1")


class Receiver:
    """A webhook: keeps what it gets, answers as it is told, or not at all."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.attempts = 0
        self.status = 200
        self.gate = threading.Event()  # while it is not set, nobody is answered
        self.gate.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.attempts += 1
                receiver.gate.wait(PATIENCE_S)
                if receiver.status < 300:
                    assert self.headers["Content-Type"] == "application/json"
                    receiver.bodies.append(json.loads(body))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{PATH_SECRET}?key={PATH_SECRET}"

    def events(self) -> list[tuple[str, str | None, bool]]:
        """What it was told: the event, the job, whether it is over."""
        return [(b["event"], b["job"], b.get("over", False)) for b in self.bodies]

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.bodies) >= count, f"{count} messages; so far {self.bodies}")

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with closing(found := Receiver()):
        yield found


@pytest.fixture
def told(workspace: Workspace, receiver: Receiver) -> Workspace:
    """A workspace with a webhook that is told everything."""
    workspace.secrets["hook"] = {"type": "webhook", "value": workspace.encrypt(receiver.url)}
    workspace.config["notify"] = [{"secret": "hook"}]
    return workspace


def reject(workspace: Workspace, name: str) -> Callable[[], None]:
    """Have Keboola reject a job's trigger; returns what ends that."""
    match = f'"config":"{name}"'
    return workspace.sim.fault("queue.create", "status", None, match=match, code=400).clear


def row(workspace: Workspace, query: str) -> list[Any]:
    with closing(sqlite3.connect(f"{workspace.state.as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(query).fetchall()


# ---- what is told ----


def work(state: TriggerState | None = None, *, failed: bool = False, **more: Any) -> Work:  # noqa: ANN401
    """A piece of work whose trigger has come so far."""
    trigger = None
    if state:
        trigger = Trigger("t", 0, state, TARGET, "k", "{}", "b", NOW, error="no", url="https://k/7")
        trigger = replace(trigger, keboola_job_id="7" if state == TriggerState.SENT else None)
    batches = (Batch("batch_a", "failed" if failed else "completed"), Batch("batch_b", "completed"))
    return Work(1, "job", batches, TARGET, 0, trigger=trigger, **more)


def told_of(messages: list[Message]) -> list[tuple[str, bool]]:
    return [(message.event, message.is_over) for message in messages]


FAILED, UNKNOWN = (Told.JOB_FAILED, "1"), (Told.TRIGGER_UNKNOWN, "1")
CHANGES = [
    (work(), work(TriggerState.INTENT), (), []),
    (work(), work(TriggerState.REJECTED), (), [("job_failed", False)]),
    (work(), work(TriggerState.REJECTED), (FAILED,), []),
    (work(TriggerState.REJECTED), work(TriggerState.INTENT), (FAILED,), []),
    (work(), work(TriggerState.UNKNOWN), (), [("trigger_unknown", False)]),
    (work(TriggerState.UNKNOWN), work(TriggerState.SENDING), (UNKNOWN,), []),
    (
        work(TriggerState.SENDING),
        work(TriggerState.REJECTED),
        (UNKNOWN,),
        [("trigger_unknown", True), ("job_failed", False)],
    ),
    (
        work(TriggerState.SENDING),
        work(TriggerState.SENT),
        (UNKNOWN, FAILED),
        [("job_failed", True), ("trigger_unknown", True), ("completed", False)],
    ),
    (
        work(TriggerState.SENDING),
        work(TriggerState.SENT, failed=True),
        (),
        [("completed_with_failures", False)],
    ),
    (work(TriggerState.SENT), work(TriggerState.SENT), (), []),
    (work(TriggerState.REJECTED), work(), (FAILED,), []),
    (
        work(TriggerState.REJECTED),
        work(TriggerState.REJECTED, done=True),
        (FAILED,),
        [("job_failed", True)],
    ),
]


@pytest.mark.parametrize(("before", "after", "standing", "expected"), CHANGES)
def test_what_a_change_is_told_as(
    before: Work, after: Work, standing: tuple[tuple[str, str], ...], expected: list[Any]
) -> None:
    """An alarm is told when it begins and when it ends, and not for each try in between."""
    assert told_of(tc.work_messages(before, after, set(standing))) == expected


def test_an_alarm_ends_with_its_job() -> None:
    """What is no longer live cannot change any more, so its alarm is over."""
    standing: dict[tuple[str, str], str | None] = {FAILED: "job", (Told.ACCOUNT_FAILING, "2"): None}
    (message,) = tc.gone_messages([], standing)
    assert (message.event, message.job, message.is_over) == (Told.JOB_FAILED, "job", True)
    assert tc.gone_messages([work(TriggerState.REJECTED)], standing) == []
    out = replace(work(TriggerState.UNKNOWN), position=None)
    assert told_of(tc.work_messages(out, out, {UNKNOWN})) == [("trigger_unknown", True)]


REQUESTS = [  # what came, in order; the time since which the key counts as refused, the errors
    ([(None, None)], None, 0),
    ([(401, "no")], 0, 1),
    ([(401, "no"), (403, "no")], 0, 2),
    ([(401, "no"), (None, "reset"), (500, "x"), (429, "x"), (408, "x")], 0, 5),
    ([(401, "no"), (404, "none")], None, 2),
    ([(401, "no"), (None, None), (401, "no")], 2, 2),
    ([(None, "reset")], None, 1),
]


@pytest.mark.parametrize(("came", "since", "errors"), REQUESTS)
def test_since_when_a_key_is_refused(
    came: list[tuple[int | None, str | None]], since: int | None, errors: int
) -> None:
    """From its first refusal until an answer that is none; what brings no answer says nothing."""
    usage = Usage("openai")
    for second, (status, error) in enumerate(came):
        usage = tc.after_request(usage, status, error, NOW + second)
    assert usage.refused_since == (None if since is None else NOW + since)
    assert (usage.requests, usage.errors) == (len(came), errors)


@pytest.mark.parametrize(
    ("refused_s", "is_standing", "expected"),
    [
        (None, False, []),
        (599, False, []),
        (601, False, [("account_failing", False)]),
        (601, True, []),
        (None, True, [("account_failing", True)]),
    ],
)
def test_a_key_that_is_refused_for_long(
    refused_s: int | None, *, is_standing: bool, expected: list[Any]
) -> None:
    """Refusals over ten minutes are told, and the first answer that is none; one alone is not."""
    since = None if refused_s is None else NOW - refused_s
    usages = {"prod": Usage("openai", 1, 1, None, since, NOW)}
    standing = {(Told.ACCOUNT_FAILING, "prod")} if is_standing else set()
    assert told_of(tc.account_messages(usages, standing)) == expected
    gone = [("account_failing", True)] if is_standing else []
    assert told_of(tc.account_messages({}, standing)) == gone


def test_the_body_is_what_chat_programs_show() -> None:
    """Text, event and job; one line, and nothing in it that a chat program would obey."""
    message = Message(Told.JOB_FAILED, "1", "job <!channel>\n failed: x > y", "<!channel>")
    body = json.loads(tc.message_body(message))
    assert body == {
        "text": "TeckoChecker: job \u2039!channel\u203a failed: x \u203a y",
        "event": "job_failed",
        "job": "<!channel>",
    }
    over = json.loads(tc.message_body(replace(message, is_over=True)))
    assert over == {**body, "over": True}


def test_each_webhook_gets_its_own_events() -> None:
    """A message goes to those webhooks that asked for its event."""
    hooks = (Hook("all", tuple(Told)), Hook("some", ("completed",)), Hook("none", ("job_failed",)))
    mail = tc.mail_of([Message(Told.COMPLETED, "1", "x", "job")], hooks)
    assert [secret for secret, _ in mail.copies] == ["all", "some"]


# ---- the daemon ----


def test_a_morning(told: Workspace, receiver: Receiver) -> None:
    """Each event of the issue is told once, and what was wrong once more when it is over."""
    told.add_job("good", "batch_good")
    told.add_job("half", "batch_half", "batch_bad")
    told.sim.finish("batch_bad", "failed")
    told.add_job("bad", "batch_of_bad")
    end = reject(told, "bad")
    daemon = told.daemon()
    receiver.wait_for(3)
    assert sorted(receiver.events()) == [
        ("completed", "good", False),
        ("completed_with_failures", "half", False),
        ("job_failed", "bad", False),
    ]
    failed = next(b["text"] for b in receiver.bodies if b["job"] == "bad")
    assert failed.startswith("TeckoChecker: job bad has failed: Keboola answered 400")
    end()
    assert told.run("retry", "bad").code == 0
    receiver.wait_for(5)
    assert receiver.events()[3:] == [("job_failed", "bad", True), ("completed", "bad", False)]

    told.write("jobs: [\n")
    daemon.wait_for_event("config_rejected")
    receiver.wait_for(6)
    told.write("jobs: {\n")  # bad in another way: nothing new to tell
    wait_until(lambda: len(daemon.events_of("config_rejected")) == 2, "the second refusal")
    told.reload(daemon)
    receiver.wait_for(7)
    rejected = [("config_rejected", None, False), ("config_rejected", None, True)]
    assert receiver.events()[5:] == rejected
    assert f"{told.path}:" in receiver.bodies[5]["text"]
    assert PATH_SECRET not in daemon.log()
    wait_until(lambda: row(told, "SELECT count(*) FROM notices") == [(0,)], "all is delivered")
    assert row(told, "SELECT count(*) FROM alarms") == [(0,)]


def test_an_unknown_start_and_its_end(told: Workspace, receiver: Receiver) -> None:
    """A POST whose answer is lost is told, and that its job was found after all."""
    told.add_job("job", "batch_a")
    told.sim.fault("queue.create", "reset_after")
    told.daemon()
    receiver.wait_for(3)
    assert receiver.events() == [
        ("trigger_unknown", "job", False),
        ("trigger_unknown", "job", True),
        ("completed", "job", False),
    ]
    told.assert_one_job("job")


def test_a_refused_key(told: Workspace, receiver: Receiver) -> None:
    """A key that has been refused for ten minutes is told, and then that it works."""
    told.add_job("job", "batch_a", status="in_progress")
    fault = told.sim.fault("openai.*", "status", None, code=401)
    assert told.once().code == 1
    assert receiver.bodies == []
    told.change_state("UPDATE accounts SET refused_since = refused_since - 600")
    assert told.run("--once").code == 1
    assert receiver.events() == [("account_failing", None, False)]
    assert (
        "the secret openai has been refused for over 10 minutes: 401" in receiver.bodies[0]["text"]
    )
    told.run("--once")
    assert len(receiver.bodies) == 1
    fault.clear()
    told.daemon()
    receiver.wait_for(2)
    assert receiver.events()[1:] == [("account_failing", None, True)]


def test_a_token_that_may_search_but_not_start(told: Workspace, receiver: Receiver) -> None:
    """Keboola's 403 for a start, between searches that it answers, is no refused key."""
    told.add_job("job", "batch_a")
    told.sim.fault("queue.create", "status", None, code=403)
    assert told.once().code == 1
    told.change_state("UPDATE accounts SET refused_since = refused_since - 700")
    told.change_state("UPDATE triggers SET next_try_at = 0")
    assert told.run("--once").code == 1
    assert receiver.events() == [("job_failed", "job", False)]


def test_an_event_that_nobody_wants_does_not_stand(told: Workspace, receiver: Receiver) -> None:
    """What no webhook asked for is told once one does, and its end is never told before that."""
    told.config["notify"] = [{"secret": "hook", "events": ["completed"]}]
    told.add_job("bad", "batch_a")
    end = reject(told, "bad")
    assert told.once().code == 1
    assert row(told, "SELECT * FROM alarms") == []
    told.config["notify"] = [{"secret": "hook", "events": ["job_failed"]}]
    assert told.once().code == 1
    assert receiver.events() == [("job_failed", "bad", False)]
    end()
    assert told.run("retry", "bad").code == 0
    assert told.run("--once").code == 0
    assert receiver.events()[1:] == [("job_failed", "bad", True)]


def test_a_new_address_is_tried_at_once(told: Workspace, receiver: Receiver) -> None:
    """A reload with another address ends the wait that the old one has earned."""
    dead = receiver.url.replace("127.0.0.1:", "127.0.0.2:")
    told.secrets["hook"]["value"] = told.encrypt(dead)
    told.add_job("job", "batch_a")
    assert told.once().code == 0
    told.change_state("UPDATE notices SET next_try_at = next_try_at + 3000, failures = 9")
    daemon = told.daemon()
    assert receiver.bodies == []
    told.secrets["hook"]["value"] = told.encrypt(receiver.url)
    told.reload(daemon)
    receiver.wait_for(1)


def test_a_bug_in_a_message_is_not_the_jobs(
    told: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is recorded and the pass ends, whatever becomes of what it would tell."""

    def broken(*_: object) -> list[Message]:
        raise ZeroDivisionError

    monkeypatch.setattr(tc, "work_messages", broken)
    monkeypatch.setattr(tc.Engine, "note_bug", lambda *_: None)
    told.add_job("job", "batch_a")
    told.write()
    assert tc.main(["--config", str(told.path), "--once"]) == 0
    told.assert_one_job("job")


def test_a_dead_webhook_delays_nothing(told: Workspace, receiver: Receiver) -> None:
    """With one place for requests and a webhook that hangs, jobs start as ever."""
    told.config["limits"] |= {"max_concurrency": 1}
    receiver.gate.clear()
    told.add_job("first", "batch_a")
    daemon = told.daemon()
    wait_until(lambda: receiver.attempts, "the webhook is asked")
    told.add_job("second", "batch_b")
    told.reload(daemon)
    daemon.wait_for_event("trigger_sent", job="second")
    assert daemon.events_of("notify_failed") == []  # it hangs still
    assert receiver.bodies == []


def test_a_webhook_that_comes_back(told: Workspace, receiver: Receiver) -> None:
    """What it refused is told again later, in order, and the trouble is logged once."""
    receiver.status = 500
    told.add_job("first", "batch_a")
    daemon = told.daemon()
    failed = daemon.wait_for_event("notify_failed")
    assert failed["webhook"] == "hook"
    assert failed["error"] == "the webhook answered 500"
    told.add_job("second", "batch_b")
    told.reload(daemon)
    wait_until(lambda: receiver.attempts >= 2, "a second attempt")
    receiver.status = 200
    receiver.wait_for(2)
    assert [job for _, job, _ in receiver.events()] == ["first", "second"]
    assert len(daemon.events_of("notify_failed")) == 1


def test_what_was_not_told_is_told_after_a_kill(told: Workspace, receiver: Receiver) -> None:
    """A message is committed with what it tells of, so that a crash does not lose it."""
    receiver.status = 500
    told.add_job("job", "batch_a")
    daemon = told.daemon()
    daemon.wait_for_event("notify_failed")
    daemon.kill()
    told.change_state("UPDATE notices SET next_try_at = 0")
    receiver.status = 200
    told.daemon()
    receiver.wait_for(1)
    assert receiver.events() == [("completed", "job", False)]


def test_a_day_is_enough(told: Workspace, receiver: Receiver) -> None:
    """What could not be told for a day is dropped, with a line in the log that says so."""
    receiver.status = 500
    told.add_job("job", "batch_a")
    assert told.once().code == 0
    told.change_state("UPDATE notices SET at = at - 90000, next_try_at = 0")
    done = told.run("--once")  # a host that was off for a day has to have its network back first
    assert "notify_dropped" not in done.stderr
    told.change_state("UPDATE notices SET failures = 5, next_try_at = 0")
    done = told.run("--once")
    (dropped,) = [event for event in done.events if event["event"] == "notify_dropped"]
    assert dropped["why"].startswith("not delivered within a day: the webhook answered 500")
    assert row(told, "SELECT count(*) FROM notices") == [(0,)]


def test_once_tells_too(told: Workspace, receiver: Receiver) -> None:
    """A pass from cron tells what it has found; the next one tells nothing again."""
    told.add_job("good", "batch_good")
    told.add_job("bad", "batch_bad")
    reject(told, "bad")
    assert told.once().code == 1
    assert sorted(receiver.events()) == [("completed", "good", False), ("job_failed", "bad", False)]
    assert told.run("--once").code == 1
    assert len(receiver.bodies) == 2
    del told.jobs["bad"]
    assert told.once().code == 0
    assert receiver.events()[2:] == [("job_failed", "bad", True)]


def test_once_does_not_wait_for_a_webhook(told: Workspace, receiver: Receiver) -> None:
    """A webhook that hangs holds up a pass for its time-out, and what it misses is kept."""
    told.config["limits"] |= {"request_timeout": "1s"}
    receiver.gate.clear()
    told.add_job("job", "batch_a")
    started = time.monotonic()
    assert told.once().code == 0
    assert time.monotonic() - started < 10
    assert row(told, "SELECT failures FROM notices") == [(1,)]


def test_a_clock_that_was_set_back(told: Workspace, receiver: Receiver) -> None:
    """A message whose next try is recorded far in the future is due now."""
    receiver.status = 500
    told.add_job("job", "batch_a")
    told.once()
    told.change_state("UPDATE notices SET at = at + 1e7, next_try_at = next_try_at + 1e7")
    receiver.status = 200
    assert told.run("--once").code == 0
    assert receiver.events() == [("completed", "job", False)]


def test_a_dead_webhook_is_not_asked_all_the_time(told: Workspace, receiver: Receiver) -> None:
    """Also where its messages bear a time in the future, each failure makes it wait."""
    receiver.status = 500
    told.add_job("job", "batch_a")
    told.once()
    told.change_state("UPDATE notices SET at = at + 600, failures = 0, next_try_at = at + 600")
    before = receiver.attempts
    daemon = told.daemon()
    wait_until(lambda: receiver.attempts > before, "it is asked")
    told.add_job("later", "batch_b")
    told.reload(daemon)
    daemon.wait_for_event("trigger_sent", job="later")
    wait_until(lambda: receiver.attempts > before + 1, "it is asked because of what is new")
    told.add_job("last", "batch_c", status="in_progress")
    told.reload(daemon)
    daemon.wait_for_event("batch_status_changed", job="last")
    assert receiver.attempts <= before + 3


def test_a_webhook_that_leaves_the_config(told: Workspace, receiver: Receiver) -> None:
    """What it was still to be told is dropped with it; what is told later begins anew."""
    receiver.status = 500
    told.add_job("bad", "batch_a")
    reject(told, "bad")
    assert told.once().code == 1
    del told.config["notify"], told.secrets["hook"]
    told.change_state("UPDATE notices SET next_try_at = 0")
    done = told.once()
    (dropped,) = [event for event in done.events if event["event"] == "notify_dropped"]
    assert dropped["why"] == "the config no longer has this webhook"


def test_what_stands_when_notify_comes(told: Workspace, receiver: Receiver) -> None:
    """Those who ask to be told are told of what is wrong already, not of what is long done."""
    hooks = told.config.pop("notify")
    told.add_job("good", "batch_good")
    told.add_job("bad", "batch_bad")
    reject(told, "bad")
    assert told.once().code == 1
    assert receiver.bodies == []
    told.config["notify"] = hooks
    daemon = told.daemon()
    receiver.wait_for(1)
    daemon.send(signal.SIGTERM)
    daemon.wait()
    assert receiver.events() == [("job_failed", "bad", False)]


def test_no_address_anywhere(told: Workspace, receiver: Receiver) -> None:
    """A webhook's address is its password, also where the server echoes it."""
    told.add_job("job", "batch_a")
    receiver.close()
    daemon = told.daemon()
    failed = daemon.wait_for_event("notify_failed")
    assert "ConnectError" in failed["error"]
    daemon.stop()
    assert PATH_SECRET not in daemon.log()
    assert PATH_SECRET.encode() not in told.state.read_bytes()
    for command in (("status",), ("logs",), ("secrets",), ("status", "--json")):
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
    assert row(told, "SELECT failures FROM notices") == [(0,)]


def test_a_slow_webhook_delays_no_other(told: Workspace, receiver: Receiver) -> None:
    """While one webhook hangs, another is told at once of what happens meanwhile."""
    with closing(Receiver()) as slow:
        slow.gate.clear()
        told.secrets["slow"] = {"type": "webhook", "value": told.encrypt(slow.url)}
        told.config["notify"] = [{"secret": "slow"}, {"secret": "hook"}]
        told.add_job("first", "batch_a")
        daemon = told.daemon()
        receiver.wait_for(1)
        wait_until(lambda: slow.attempts, "the slow one is asked")
        told.add_job("second", "batch_b")
        told.reload(daemon)
        receiver.wait_for(2)
        assert daemon.events_of("notify_failed") == []  # it hangs still
        slow.gate.set()
        slow.wait_for(2)


def test_a_new_address_gets_what_waits_behind_a_delivery(
    told: Workspace, receiver: Receiver
) -> None:
    """What is still to be told goes to the address that the config has by then."""
    with closing(Receiver()) as old:
        old.gate.clear()
        told.secrets["hook"]["value"] = told.encrypt(old.url)
        for name in ("a", "b", "c"):
            told.add_job(name, f"batch_{name}")
        daemon = told.daemon()
        wait_until(lambda: old.attempts, "the old one is asked")
        for name in ("a", "b", "c"):
            told.wait_for_job(name, lambda job: job["status"] == "completed")
        told.secrets["hook"]["value"] = told.encrypt(receiver.url)
        told.reload(daemon)
        old.gate.set()
        receiver.wait_for(2)
        assert len(old.bodies) == 1
