"""The Keboola job is followed to its end, and started again where config or person says so."""

from __future__ import annotations

import pytest
from harness import PATIENCE_S, Daemon, JsonObject, Workspace, trigger_id


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Keboola jobs run until a test ends them."""
    workspace.sim.job_seconds = None
    return workspace


def started(workspace: Workspace, daemon: Daemon, name: str = "job") -> str:
    """The id of the Keboola job, once the daemon follows it."""
    workspace.add_job(name, f"batch_{name}")
    workspace.reload(daemon)
    event = daemon.wait_for_event("trigger_sent", job=name)
    return str(event["keboola_job_id"])


def wait_status(workspace: Workspace, status: str, name: str = "job") -> JsonObject:
    return workspace.wait_for_job(name, lambda job: job["status"] == status)


def gets(workspace: Workspace, job_id: str) -> int:
    """How often a Keboola job was asked for."""
    return sum(r.path.endswith(f"/jobs/{job_id}") for r in workspace.requests)


@pytest.mark.long
def test_running(workspace: Workspace) -> None:
    """A run is `running` with a link for people and Keboola's own status, until the end of it."""
    daemon = workspace.daemon()
    job_id = started(workspace, daemon)
    job = wait_status(workspace, "running")
    assert (job["attention"], job["error"], job["completed_at"]) == (False, None, None)
    trigger = job["trigger"]
    assert trigger["url"] == f"{workspace.sim.stack_url}/admin/projects/1/queue/{job_id}"
    assert (trigger["state"], trigger["keboola_job_id"]) == ("sent", job_id)
    assert trigger["finished_at"] is None
    seen = gets(workspace, job_id)
    workspace.sim.wait_for(lambda: gets(workspace, job_id) >= seen + 2, PATIENCE_S)
    workspace.sim.finish_job(job_id)
    daemon.wait_for_event("completed", job="job", keboola_job_id=job_id)
    job = wait_status(workspace, "completed")
    assert job["trigger"]["keboola_status"] == "success"
    assert job["trigger"]["finished_at"] == job["completed_at"] is not None
    asked = gets(workspace, job_id)
    workspace.add_job("other", "batch_other", status="in_progress")
    workspace.reload(daemon)
    workspace.wait_for_looks("batch_other", 3)
    assert gets(workspace, job_id) == asked


@pytest.mark.long
def test_follow_interval(workspace: Workspace) -> None:
    """A Keboola job is asked for at once, and then `limits.follow_interval` apart at least."""
    workspace.config["limits"]["follow_interval"] = "2s"
    daemon = workspace.daemon()
    job_id = started(workspace, daemon)
    workspace.sim.wait_for(lambda: gets(workspace, job_id) >= 2, PATIENCE_S)
    sent = next(r.at for r in workspace.requests if r.route == "queue.create")
    first, second = [r.at for r in workspace.requests if r.path.endswith(f"/jobs/{job_id}")][:2]
    assert first - sent < 1
    assert second - first >= 1.9


ENDS = {"success": "completed", "warning": "completed"}
ENDS |= dict.fromkeys(("error", "terminated", "cancelled"), "failed")


def test_every_end(workspace: Workspace) -> None:
    """`success` and `warning` are good ends; others show Keboola's words, people's are final."""
    for status in (*ENDS, "silent"):
        by_people = status in {"terminated", "cancelled"}
        workspace.add_job(status, f"batch_{status}", retry_on_error=5 if by_people else 0)
    daemon = workspace.daemon()
    silent = daemon.wait_for_event("trigger_sent", job="silent")["keboola_job_id"]
    workspace.sim.finish_job(silent, "error")
    for status in ENDS:
        job_id = daemon.wait_for_event("trigger_sent", job=status)["keboola_job_id"]
        workspace.sim.finish_job(job_id, status, f"it was a {status}", f"exception-{status}")
    for status, wanted in ENDS.items():
        job = wait_status(workspace, wanted, status)
        trigger = job["trigger"]
        assert (trigger["state"], trigger["keboola_status"]) == ("sent", status)
        is_good = wanted == "completed"
        assert daemon.wait_for_event(wanted if is_good else "job_failed", job=status)
        assert job["attention"] is not is_good
        for text in (job["error"], trigger["keboola_error"]):
            if is_good:
                assert text is None
            else:
                assert f"it was a {status}" in text
                assert f"exception-{status}" in text
    error = wait_status(workspace, "failed", "silent")["error"]
    assert f"Keboola job {silent} ended in error" in error
    assert len(workspace.sim.jobs) == len(ENDS) + 1
    assert daemon.events_of("keboola_job_retried") == []


def test_deleted(workspace: Workspace) -> None:
    """A followed job that is a 404 was deleted: the run is `failed`, and nothing is started."""
    daemon = workspace.daemon()
    job_id = started(workspace, daemon)
    workspace.sim.delete_job(job_id)
    job = wait_status(workspace, "failed")
    assert "deleted" in job["error"]
    daemon.wait_for_event("job_failed", job="job")
    assert workspace.posts("job") == 1


@pytest.mark.long
def test_waiting(workspace: Workspace) -> None:
    """A job that waits for another one of its configuration is running, and shown as `waiting`."""
    workspace.add_job("first", "batch_first", config_id="shared")
    daemon = workspace.daemon()
    first = daemon.wait_for_event("trigger_sent", job="first")["keboola_job_id"]
    workspace.add_job("second", "batch_second", config_id="shared")
    workspace.reload(daemon)
    second = daemon.wait_for_event("trigger_sent", job="second")["keboola_job_id"]
    workspace.wait_for_job("second", lambda job: job["trigger"]["keboola_status"] == "waiting")
    assert workspace.statuses() == {"first": "running", "second": "running"}
    assert workspace.job("second")["attention"] is False
    workspace.sim.finish_job(first)
    wait_status(workspace, "completed", "first")
    workspace.sim.finish_job(second)
    wait_status(workspace, "completed", "second")


def test_follow_false(workspace: Workspace) -> None:
    """With `follow: false` the run is completed by its start, and the job is never asked for."""
    workspace.add_job("job", "batch_a", follow=False)
    assert workspace.once().code == 0
    assert workspace.once().code == 0
    job = workspace.job("job")
    assert job["status"] == "completed"
    assert job["trigger"]["keboola_status"] == "created"
    assert workspace.sim.request_counts.get("queue.get", 0) == 0


@pytest.mark.long
def test_retry_of_a_failed_run(workspace: Workspace) -> None:
    """`retry` starts it again as its next rerun, once, also when two people ask for it."""
    daemon = workspace.daemon()
    refused = workspace.run("retry", "nothing")
    assert refused.code == 2
    job_id = started(workspace, daemon)
    wait_status(workspace, "running")
    assert workspace.run("retry", "job").code == 1  # it is running: nothing to do
    workspace.sim.finish_job(job_id, "error", "out of memory")
    wait_status(workspace, "failed")
    assert daemon.stop() == 0
    assert [workspace.run("retry", "job").code for _ in range(2)] == [0, 0]
    daemon = workspace.daemon()
    again = trigger_id("job", ["batch_job"], 1)
    second = daemon.wait_for_event("trigger_sent", job="job", trigger_id=again)["keboola_job_id"]
    daemon.wait_for_event("job_failed_recovered", job="job")
    workspace.sim.finish_job(second)
    job = wait_status(workspace, "completed")
    assert (job["error"], job["trigger"]["keboola_job_id"]) == (None, second)
    assert len(workspace.sim.jobs) == 2


@pytest.mark.long
def test_retry_on_error(workspace: Workspace) -> None:
    """`retry_on_error` starts it again after five minutes, with an event and no attention."""
    workspace.add_job("job", "batch_job", retry_on_error=1)
    daemon = workspace.daemon()
    job_id = daemon.wait_for_event("trigger_sent", job="job")["keboola_job_id"]
    workspace.sim.finish_job(job_id, "error", "out of memory")
    event = daemon.wait_for_event("keboola_job_retried", job="job")
    assert event["wait"] == "5m"
    job = wait_status(workspace, "triggering")
    assert "out of memory" in job["error"]
    assert job["attention"] is False
    assert workspace.run("status", "--check").code == 0
    assert daemon.stop() == 0
    assert workspace.once().code == 0
    assert len(workspace.sim.jobs) == 1
    workspace.change_state("UPDATE runs SET next_at = next_at - 300")
    daemon = workspace.daemon()
    again = trigger_id("job", ["batch_job"], 1)
    second = daemon.wait_for_event("trigger_sent", job="job", trigger_id=again)["keboola_job_id"]
    workspace.sim.finish_job(second, "error", "out of memory again")
    job = wait_status(workspace, "failed")
    assert job["attention"] is True
    assert len(workspace.sim.jobs) == 2


@pytest.mark.long
def test_once_follows_in_later_passes(workspace: Workspace) -> None:
    """A pass of `--once` looks at the Keboola job once, and does not wait for its end."""
    workspace.add_job("job", "batch_a")
    assert workspace.once().code == 0
    (job,) = workspace.sim.jobs
    assert workspace.job("job")["status"] == "running"
    asked = gets(workspace, job["id"])
    for number in (1, 2):
        assert workspace.once().code == 0
        assert gets(workspace, job["id"]) == asked + number
    workspace.sim.finish_job(job["id"], "error", "out of memory")
    done = workspace.once()
    assert done.code == 1
    assert workspace.job("job")["status"] == "failed"
    assert "job_failed" in {event["event"] for event in done.events}
    assert len(workspace.sim.jobs) == 1


@pytest.mark.long
def test_killed_while_running(workspace: Workspace) -> None:
    """A process killed while it follows a job goes on with that at its next start."""
    daemon = workspace.daemon()
    job_id = started(workspace, daemon)
    wait_status(workspace, "running")
    daemon.kill()
    searches = workspace.searches("job")
    workspace.sim.finish_job(job_id)
    daemon = workspace.daemon()
    daemon.wait_for_event("completed", job="job", keboola_job_id=job_id)
    assert (workspace.posts("job"), workspace.searches("job")) == (1, searches)


@pytest.mark.long
def test_config_changes_while_running(workspace: Workspace) -> None:
    """Paused, renamed or removed, a job that runs is followed to its end."""
    daemon = workspace.daemon()
    ids = {name: started(workspace, daemon, name) for name in ("paused", "renamed", "removed")}
    workspace.jobs["paused"]["paused"] = True
    workspace.jobs["new-name"] = workspace.jobs.pop("renamed")
    del workspace.jobs["removed"]
    workspace.reload(daemon)
    for job_id in ids.values():
        workspace.sim.finish_job(job_id)
    for job_id in ids.values():
        daemon.wait_for_event("completed", keboola_job_id=job_id)
    assert workspace.statuses() == {"paused": "completed", "new-name": "completed"}
    assert len(workspace.sim.jobs) == 3


def test_follow_error(workspace: Workspace) -> None:
    """A failed follow is shown and tried again, and is no end of the run and no second start."""
    daemon = workspace.daemon()
    workspace.sim.fault("queue.get", "status", None, code=403)
    job_id = started(workspace, daemon)
    daemon.wait_for_event("follow_failed", job="job", status=403)
    job = wait_status(workspace, "running")
    assert "403" in job["error"]
    assert job["attention"] is False
    workspace.sim.clear_faults()
    workspace.sim.finish_job(job_id)
    workspace.jobs["job"]["poll_interval"] = "2s"  # a change ends the backoff
    workspace.write()
    daemon.wait_for_event("completed", job="job")
    assert workspace.job("job")["error"] is None
