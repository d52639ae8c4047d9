"""Attention: what a person has to do something about, the same in status, --check and --once.

Time that has to pass is taken from the state file's recorded times while nothing runs.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from harness import KEBOOLA_TOKEN, OPENAI_KEY, JsonObject, Workspace, wait_until
from simulator import Simulator

MINUTES_10 = 601


def agreed(workspace: Workspace) -> int:
    """The number `attention`, on which `status --check` and the runs' own flags agree."""
    document = json.loads(workspace.run("status", "--json").stdout)
    count: int = document["attention"]
    assert workspace.run("status", "--check").code == (count > 0)
    assert sum(job["attention"] for job in document["jobs"]) <= count
    return count


def told(events: list[JsonObject], name: str, job: str | None = "job") -> int:
    return sum(e["event"] == name and e.get("job") == job for e in events)


def age(workspace: Workspace, column: str, seconds: int = MINUTES_10) -> None:
    """Makes a recorded time so much older, while nothing runs."""
    change = f"UPDATE runs SET {column} = {column} - {seconds}, next_at = 0"  # noqa: S608
    workspace.change_state(change)


@pytest.mark.long
def test_healthy_start(workspace: Workspace) -> None:
    """From the first poll to the Keboola job's end, a healthy run never needs a person."""
    workspace.sim.job_seconds = None
    workspace.add_job("job", "batch_a", status="in_progress")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="job")
    assert agreed(workspace) == 0
    workspace.sim.finish("batch_a")
    hold.wait_reached()
    assert workspace.job("job")["trigger"]["state"] == "sending"
    assert agreed(workspace) == 0
    hold.release()
    workspace.wait_for_job("job", lambda job: job["status"] == "running")
    assert agreed(workspace) == 0
    workspace.sim.finish_job(workspace.sim.jobs[0]["id"])
    daemon.wait_for_event("completed", job="job")
    assert agreed(workspace) == 0
    assert daemon.stop() == 0
    assert workspace.once().code == 0
    with closing(sqlite3.connect(workspace.state)) as db:
        levels = db.execute("SELECT DISTINCT level FROM events").fetchall()
    assert levels == [("info",)]


@pytest.mark.long
def test_lost_answer_settles_by_itself(workspace: Workspace) -> None:
    """A lost POST and a failed poll that are right again soon were never attention."""
    workspace.sim.fault("queue.create", "reset_after")
    workspace.sim.fault("openai.get", "status", code=404)
    workspace.add_job("job", "batch_a")
    daemon = workspace.daemon()
    daemon.wait_for_event("poll_failed", job="job")
    assert agreed(workspace) == 0
    daemon.wait_for_event("trigger_unknown", job="job")
    daemon.wait_for_event("completed", job="job")
    assert agreed(workspace) == 0
    assert not [e for e in daemon.events if e["level"] == "error"]


@pytest.mark.long
def test_failing_poll(workspace: Workspace) -> None:
    """A poll error is attention once it has lasted for ten minutes, and told once; then it ends."""
    workspace.add_job("job", "batch_gone")
    workspace.sim.delete_batch("batch_gone")
    assert workspace.once().code == 0
    assert workspace.job("job")["error_since"]
    assert agreed(workspace) == 0
    age(workspace, "error_since")
    assert agreed(workspace) == 1
    first, second = workspace.once(), workspace.once()
    assert (first.code, second.code) == (1, 1)
    assert told(first.events, "poll_failing") == 1
    assert told(first.events, "jobs_need_attention", None) == 1
    assert second.events == []  # of what still needs attention, cron mails once a day
    workspace.change_state(
        "UPDATE meta SET value = json_set(value, '$.at', 1) WHERE key = 'attention_told'"
    )
    assert told(workspace.once().events, "jobs_need_attention", None) == 1
    workspace.sim.add_batch("batch_gone")
    after = workspace.once()
    assert after.code == 0
    assert told(after.events, "poll_failing_recovered") == 1
    assert agreed(workspace) == 0


@pytest.mark.long
def test_refused_key(workspace: Workspace) -> None:
    """A 401 is attention at once: one for the key, however many jobs use it."""
    workspace.secrets["openai"] = workspace.openai_secret("sk-unknown-0a1b2c3d4e5f")
    workspace.add_job("one", "batch_a")
    workspace.add_job("two", "batch_b")
    done = workspace.once()
    assert done.code == 1
    assert told(done.events, "account_failing", None) == 1
    assert agreed(workspace) == 1
    workspace.secrets["openai"] = workspace.openai_secret(OPENAI_KEY)
    done = workspace.once()
    assert done.code == 0
    assert told(done.events, "account_failing_recovered", None) == 1
    assert agreed(workspace) == 0


def test_refused_key_that_nobody_uses(workspace: Workspace) -> None:
    """A refused key needs nobody any more once no job uses it, although it stays in the config."""
    workspace.secrets["refused"] = workspace.openai_secret("sk-unknown-0a1b2c3d4e5f")
    workspace.add_job("job", "batch_a", openai_secret="refused")
    assert workspace.once().code == 1
    workspace.jobs["job"]["openai_secret"] = "openai"
    done = workspace.once()
    assert (done.code, told(done.events, "account_failing_recovered", None)) == (0, 1)
    assert agreed(workspace) == 0


def test_refused_token_of_a_run_without_its_job(workspace: Workspace) -> None:
    """What the run of a removed job is followed with is told once, not in each pass."""
    workspace.sim.job_seconds = None
    workspace.add_job("job", "batch_a")
    assert workspace.once().code == 0
    del workspace.jobs["job"]
    workspace.sim.revoke_token(KEBOOLA_TOKEN)
    events = [event for _ in range(3) for event in workspace.once().events]
    assert told(events, "account_failing", None) == 1
    assert told(events, "account_failing_recovered", None) == 0


def test_refused_token(workspace: Workspace) -> None:
    """The same for Keboola's token: it is the key that needs a person, not each run."""
    workspace.secrets["keboola"] = workspace.keboola_secret("9999-unknown-0a1b2c3d")
    workspace.add_job("job", "batch_a")
    workspace.daemon().wait_for_event("account_failing", secret="keboola")
    wait_until(lambda: agreed(workspace) == 1, "attention")
    assert workspace.job("job")["attention"] is False


@pytest.mark.long
def test_failed_runs(workspace: Workspace) -> None:
    """A rejected start and a Keboola job that failed are attention at once, until they are over."""
    workspace.sim.job_seconds = None
    workspace.add_job("rejected", "batch_a")
    workspace.add_job("failed", "batch_b")
    workspace.sim.fault("queue.create", "status", match='"config":"rejected"', code=400)
    daemon = workspace.daemon()
    daemon.wait_for_event("job_failed", job="rejected")
    daemon.wait_for_event("trigger_sent", job="failed")
    assert agreed(workspace) == 1
    workspace.sim.finish_job(workspace.sim.jobs[0]["id"], "error")
    daemon.wait_for_event("job_failed", job="failed")
    assert agreed(workspace) == 2
    workspace.sim.job_seconds = 0
    for name in ("rejected", "failed"):
        assert workspace.run("retry", name).code == 0
        daemon.wait_for_event("completed", job=name)
        assert daemon.events_of("job_failed_recovered", job=name)
    assert agreed(workspace) == 0


@pytest.mark.long
def test_overdue_start(workspace: Workspace) -> None:
    """A start that stays unsent is attention after ten minutes and longer than ten graces."""
    workspace.config["limits"]["trigger_grace"] = "2m"
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.search", "status", None, code=403)
    assert workspace.once().code == 0
    age(workspace, "intended_at")
    assert agreed(workspace) == 0
    age(workspace, "intended_at")
    assert agreed(workspace) == 1
    done = workspace.once()
    assert (done.code, told(done.events, "trigger_overdue")) == (1, 1)
    assert "cannot search Keboola" in workspace.job("job")["error"]
    workspace.sim.clear_faults()
    age(workspace, "intended_at", 0)
    done = workspace.once()
    assert (done.code, told(done.events, "trigger_overdue_recovered")) == (0, 1)


@pytest.mark.long
def test_failing_follow(workspace: Workspace) -> None:
    """A Keboola job that cannot be followed for ten minutes is attention, and the run goes on."""
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.get", "status", None, code=500)
    assert workspace.once().code == 0
    assert agreed(workspace) == 0
    age(workspace, "error_since")
    done = workspace.once()
    assert done.code == 1
    assert told(done.events, "follow_failing") == 1
    assert workspace.job("job")["status"] == "running"
    workspace.sim.clear_faults()
    assert workspace.once().code == 0
    assert workspace.job("job")["status"] == "completed"


@pytest.mark.long
def test_passed_deadline(workspace: Workspace, sim: Simulator) -> None:
    """A passed deadline is attention, told once, and the batches are polled on to their end."""
    sim.add_batch("batch_a", created_at=1_700_000_000)
    workspace.add_job("job", "batch_a", deadline="26h")
    daemon = workspace.daemon()
    event = daemon.wait_for_event("deadline_passed", job="job")
    assert "1 of 1" in event["text"]
    workspace.wait_for_looks("batch_a", 2)
    assert len(daemon.events_of("deadline_passed")) == 1
    assert workspace.job("job")["status"] == "active"
    assert agreed(workspace) == 1
    sim.finish("batch_a")
    daemon.wait_for_event("deadline_passed_recovered", job="job")
    daemon.wait_for_event("completed", job="job")
    assert agreed(workspace) == 0


@pytest.mark.long
def test_start_on_the_last_good_config(workspace: Workspace) -> None:
    """A daemon whose file was broken meanwhile runs on the last good one, with attention."""
    workspace.add_job("job", "batch_a", status="in_progress")
    assert workspace.daemon().stop() == 0
    workspace.write("jobs: [\n")
    for command in ("check", "--once"):
        assert workspace.run(command).code == 2
    good, workspace.text = workspace.text(), lambda: "jobs: [\n"  # type: ignore[method-assign]
    daemon = workspace.start()
    daemon.wait_for_event("config_rejected")
    workspace.sim.finish("batch_a")
    daemon.wait_for_event("completed", job="job")
    assert agreed(workspace) == 1
    assert workspace.statuses() == {"job": "completed"}
    workspace.write(good)
    daemon.wait_for_event("config_rejected_recovered")
    assert agreed(workspace) == 0


@pytest.mark.long
def test_paused_is_none(workspace: Workspace) -> None:
    """A paused run with an old error, and one that is done, need nobody."""
    workspace.add_job("job", "batch_gone")
    workspace.sim.delete_batch("batch_gone")
    assert workspace.once().code == 0
    age(workspace, "error_since")
    assert workspace.once().code == 1
    workspace.jobs["job"]["paused"] = True
    assert workspace.once().code == 0
    assert agreed(workspace) == 0
    workspace.jobs["job"] |= {"paused": False, "done": True}
    assert workspace.once().code == 0
    assert workspace.statuses() == {"job": "completed"}


@pytest.mark.long
def test_alive(workspace: Workspace) -> None:
    """`--alive` is 1 without a daemon, or where its polls are overdue; attention is none of it."""
    workspace.add_job("job", "batch_gone")
    workspace.sim.delete_batch("batch_gone")
    workspace.write()
    assert workspace.run("status", "--alive").code == 1
    daemon = workspace.daemon()
    daemon.wait_for_event("poll_failed", job="job")
    assert workspace.run("status", "--alive").code == 0
    assert workspace.status()["daemon"]["pid"] == daemon.pid
    daemon.kill()
    wait_until(lambda: not workspace.status()["daemon"]["running"], "nothing runs")
    done = workspace.run("status", "--alive")
    assert (done.code, done.stderr) == (1, "teckochecker: no daemon runs\n")
