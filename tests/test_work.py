"""What a job is: names, ids and targets that change in the config, and what starts over."""

from __future__ import annotations

from harness import PATIENCE_S, Workspace, trigger_id, variables, wait_until


def test_pause(workspace: Workspace) -> None:
    """A paused job is neither looked at nor started; it goes on where it was."""
    workspace.add_job("looked_at", "batch_a", status="in_progress", paused=True)
    workspace.add_job("other", "batch_other", status="in_progress")
    daemon = workspace.daemon()
    workspace.wait_for_looks("batch_other", 1)
    assert workspace.looks("batch_a") == 0
    assert workspace.statuses() == {"looked_at": "paused", "other": "active"}
    assert workspace.run("--once").code == 75  # which changes nothing

    workspace.jobs["looked_at"]["paused"] = False
    workspace.reload(daemon)
    daemon.wait_for_event("batch_status_changed", job="looked_at")
    workspace.jobs["looked_at"]["paused"] = True
    workspace.reload(daemon)
    workspace.sim.finish("batch_a")
    looks = workspace.looks("batch_a")
    workspace.wait_for_looks("batch_other", 2)
    assert workspace.looks("batch_a") == looks

    del workspace.jobs["looked_at"]["paused"]
    workspace.write()
    daemon.wait_for_event("trigger_sent", job="looked_at")
    workspace.assert_one_job("looked_at")


def test_done_elsewhere(workspace: Workspace) -> None:
    """A job that is `done` is neither looked at nor started; without the key, it is a new one."""
    workspace.add_job("elsewhere", "batch_a", done=True)
    workspace.add_job("other", "batch_other")
    workspace.write()
    assert workspace.run("--once").code == 0
    assert workspace.statuses() == {"elsewhere": "completed", "other": "completed"}
    assert workspace.looks("batch_a") == 0
    assert workspace.run("retry", "elsewhere", "--force").code == 2

    del workspace.jobs["elsewhere"]["done"]
    workspace.write()
    assert workspace.run("--once").code == 0
    workspace.assert_one_job("elsewhere")


def test_pause_with_an_intent(workspace: Workspace) -> None:
    """Paused between the decision and its POST, nothing is sent; unpaused, it is, once."""
    hold = workspace.sim.hold("queue.search", "after")
    workspace.add_job("job", "batch_a")
    workspace.add_job("other", "batch_other", status="in_progress")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    workspace.jobs["job"]["paused"] = True
    workspace.reload(daemon)
    hold.release()
    workspace.wait_for_looks("batch_other", 1)
    assert workspace.posts("job") == 0
    assert workspace.statuses()["job"] == "paused"
    workspace.jobs["job"]["paused"] = False
    workspace.write()
    daemon.wait_for_event("trigger_sent", job="job")
    workspace.assert_one_job("job")


def test_unknown_while_paused_or_gone(workspace: Workspace) -> None:
    """An unknown trigger of a paused or removed job is searched for, but not posted again."""
    for name in ("paused", "gone", "found_paused", "found_gone"):
        workspace.add_job(name, f"batch_{name}")
        kind = "reset_after" if name.startswith("found") else "reset_before"
        workspace.sim.fault("queue.create", kind, match=f'"config":"{name}"')
    hold = workspace.sim.hold("queue.create", "before", times=4)
    daemon = workspace.daemon()
    workspace.sim.wait_for(lambda: hold.reached == 4, PATIENCE_S)
    for name in ("paused", "found_paused"):
        workspace.jobs[name]["paused"] = True
    removed = {name: workspace.jobs.pop(name) for name in ("gone", "found_gone")}
    workspace.reload(daemon)
    hold.release()
    for name in ("found_paused", "found_gone"):
        daemon.wait_for_event("trigger_found", job=name)
    for name in ("paused", "gone"):
        workspace.sim.wait_for(lambda: workspace.searches(name) >= 3, PATIENCE_S)  # noqa: B023
        # The search has been answered; what it led to is known once it is committed.
        wait_until(lambda: workspace.trigger_row(name)["clear_searches"] == 2, "two clear ones")  # noqa: B023
        assert workspace.posts(name) == 1

    workspace.jobs |= removed
    workspace.jobs["paused"]["paused"] = False
    workspace.jobs["found_paused"]["paused"] = False
    workspace.write()
    for name in ("paused", "gone"):
        daemon.wait_for_event("trigger_sent", job=name)
        assert workspace.posts(name) == 2
    for name in workspace.jobs:
        workspace.assert_one_job(name)


def test_ids_changed_under_an_intent(workspace: Workspace) -> None:
    """The committed intent is carried to its end with its own ids and target; the rest is new."""
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.search", "status", None, code=403)
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_search_failed", job="job")
    workspace.sim.clear_faults()
    workspace.add_job("job", "batch_b", status="in_progress", config_id="another")
    workspace.write()
    daemon.wait_for_event("trigger_sent", job="job", trigger_id=trigger_id("job", ["batch_a"]))
    assert workspace.job("job")["status"] == "active"
    workspace.sim.finish("batch_b")
    daemon.wait_for_event("trigger_sent", job="job", trigger_id=trigger_id("job", ["batch_b"]))
    jobs = workspace.started("job")
    assert [(job["config"], variables(job)["batch_ids_completed"]) for job in jobs] == [
        ("job", '["batch_a"]'),
        ("another", '["batch_b"]'),
    ]
    assert workspace.job("job")["trigger"]["keboola_job_id"] == jobs[1]["id"]


def test_ids_changed_under_a_post(workspace: Workspace) -> None:
    """Ids changed while the POST is under way: its answer belongs to the old ids."""
    workspace.add_job("job", "batch_a")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    workspace.add_job("job", "batch_b", status="in_progress")
    workspace.reload(daemon)
    hold.release()
    daemon.wait_for_event("trigger_sent", job="job")
    assert workspace.job("job")["trigger"] is None
    workspace.add_job("job", "batch_a")
    workspace.reload(daemon)
    workspace.assert_one_job("job")


def test_target_changed_under_an_unknown_trigger(workspace: Workspace) -> None:
    """An unknown trigger is searched for and sent to where it was meant to go."""
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.create", "reset_after")
    hold = workspace.sim.hold("queue.create", "before")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    workspace.jobs["job"]["config_id"] = "another"
    workspace.reload(daemon)
    hold.release()
    daemon.wait_for_event("trigger_found", job="job")
    workspace.assert_one_job("job")
    assert workspace.started("job")[0]["config"] == "job"
    assert workspace.searches("another") == 0


def test_rename(workspace: Workspace) -> None:
    """A new name for a finished or a running job is the same work: nothing starts twice."""
    workspace.add_job("finished", "batch_a")
    workspace.add_job("running", "batch_b", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_sent", job="finished")
    for old, new in (("finished", "renamed"), ("running", "still_running")):
        workspace.jobs[new] = workspace.jobs.pop(old)
    workspace.reload(daemon)
    assert workspace.statuses() == {"renamed": "completed", "still_running": "active"}
    workspace.sim.finish("batch_b")
    daemon.wait_for_event("trigger_sent", job="still_running")
    assert len(workspace.sim.jobs) == 2
    assert daemon.stop() == 0
    assert workspace.once().code == 0
    assert len(workspace.sim.jobs) == 2
    assert workspace.sim.request_counts["queue.create"] == 2


def test_rename_under_a_post(workspace: Workspace) -> None:
    """A name changed while the POST is under way: the answer is taken, and nothing is repeated."""
    workspace.add_job("old", "batch_a")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    workspace.jobs["new"] = workspace.jobs.pop("old")
    workspace.reload(daemon)
    hold.release()
    daemon.wait_for_event("trigger_sent")
    assert workspace.statuses() == {"new": "completed"}
    assert len(workspace.sim.jobs) == 1
    assert workspace.job("new")["trigger"]["id"] == trigger_id("old", ["batch_a"])


def test_removed_and_back(workspace: Workspace) -> None:
    """A job that was taken out and comes back unchanged has its history, and does not start."""
    workspace.add_job("job", "batch_a")
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_sent", job="job")
    first = workspace.job("job")
    removed = workspace.jobs.pop("job")
    workspace.reload(daemon)
    assert workspace.status()["jobs"] == []
    workspace.jobs["job"] = removed | {"poll_interval": "3s", "variables": {"more": "1"}}
    workspace.reload(daemon)
    assert workspace.job("job") == first
    assert daemon.stop() == 0
    assert workspace.sim.request_counts["queue.create"] == 1


def test_earlier_ids(workspace: Workspace) -> None:
    """Other ids are new work; with the earlier ones, in any order, the old outcome is back."""
    workspace.add_job("job", "batch_a", "batch_b")
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_sent", job="job")
    first = workspace.job("job")["trigger"]
    mark = daemon.mark()
    workspace.add_job("job", "batch_a", "batch_c")
    workspace.write()
    daemon.wait_for_event("trigger_sent", job="job", since=mark)
    assert workspace.job("job")["trigger"]["id"] == trigger_id("job", ["batch_a", "batch_c"])
    workspace.add_job("job", "batch_b", "batch_a")
    workspace.reload(daemon)
    job = workspace.job("job")
    assert job["trigger"] == first
    assert [batch["id"] for batch in job["batches"]] == ["batch_b", "batch_a"]
    assert daemon.stop() == 0
    assert len(workspace.sim.jobs) == 2
