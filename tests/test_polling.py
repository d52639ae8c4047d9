"""Polling: what OpenAI answers, what it does not answer, and what a job makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Workspace, variables

# What one look meets twice, in a row, before the honest answer.
MENDED: dict[str, tuple[str, dict[str, Any]]] = {
    "html": ("body", {}),
    "broken_json": ("body", {"body": '{"id": "batch_', "content_type": "application/json"}),
    "no_status": ("json", {"obj": {"id": "batch_no_status", "object": "batch"}}),
    "status_null": ("json", {"obj": {"id": "batch_status_null", "status": None}}),
    "list": ("json", {"obj": []}),
    "other_id": ("json", {"obj": {"id": "batch_another", "status": "completed"}}),
    "status_408": ("status", {"code": 408}),
    "status_409": ("status", {"code": 409}),
    "status_500": ("status", {"code": 500}),
    "limited": ("status", {"code": 429, "retry_after": 1}),
    "limited_ms": ("status", {"code": 429, "retry_after_ms": 200}),
    "limited_date": ("status", {"code": 429, "retry_after_date": 1}),
    "limited_oddly": ("status", {"code": 429, "retry_after": "soon"}),
    "reset": ("reset_before", {}),
    "closed": ("close_after", {}),
    "truncated": ("truncated", {}),
}


@pytest.mark.long
def test_mended(workspace: Workspace) -> None:
    """What goes wrong with a look and may go right the next time is tried again at once."""
    workspace.config["limits"]["max_concurrency"] = 40
    faults = {}
    for name, (kind, options) in MENDED.items():
        # A key for each: what one of them is held back for is not the others' business.
        key = f"sk-{name.replace('_', '-')}-0123456789"
        workspace.sim.add_key(key)
        workspace.secrets[name] = workspace.openai_secret(key)
        workspace.add_job(name, f"batch_{name}", openai_secret=name)
        line = f"/batches/batch_{name}\n"
        faults[name] = workspace.sim.fault("openai.get", kind, 2, match=line, **options)
    assert workspace.once().code == 0
    for name in MENDED:
        assert faults[name].hits == 2, name
        assert len(workspace.started(name)) == 1, name
    assert set(workspace.statuses().values()) == {"completed"}


@pytest.mark.long
def test_one_key_is_held_back(workspace: Workspace) -> None:
    """A 429 with a long wait holds back all jobs of its key, and none of another one."""
    other = "sk-other-9e8d7c6b5a4f"
    workspace.sim.add_key(other)
    workspace.secrets["other"] = workspace.openai_secret(other)
    workspace.sim.fault("openai.get", "status", 1, match=other, code=429, retry_after=3600)
    for number in range(4):
        workspace.add_job(f"held{number}", f"batch_{number}", openai_secret="other")
    workspace.add_job("free", "batch_free", status="in_progress")
    workspace.config["limits"]["max_concurrency"] = 1
    daemon = workspace.daemon()
    for number in range(4):
        daemon.wait_for_event("poll_failed", job=f"held{number}")
    workspace.wait_for_looks("batch_free", 2)
    assert sum(other in r.text() for r in workspace.requests) == 1
    workspace.sim.finish("batch_free")
    daemon.wait_for_event("trigger_sent", job="free")
    held = workspace.job("held3")
    assert held["status"] == "active"
    assert "429" in held["error"]


@pytest.mark.long
def test_one_hung_batch(workspace: Workspace) -> None:
    """A batch whose answer never comes delays no other job."""
    workspace.config["limits"]["max_concurrency"] = 2
    workspace.sim.fault("openai.get", "hang_before", None, match="batch_hangs")
    workspace.add_job("hung", "batch_fine", "batch_hangs")
    workspace.add_job("lively", "batch_lively", status="in_progress")
    daemon = workspace.daemon()
    workspace.wait_for_looks("batch_lively", 3)
    first, *_, last = [r.at for r in workspace.requests if r.path.endswith("batch_lively")]
    assert last - first < 2 + 1.5
    assert workspace.looks("batch_hangs") == 1
    workspace.sim.finish("batch_lively")
    daemon.wait_for_event("trigger_sent", job="lively")
    assert workspace.started("hung") == []


@pytest.mark.long
def test_not_found(workspace: Workspace) -> None:
    """A batch that is not there keeps the job from starting, in words that name both causes."""
    workspace.add_job("job", "batch_a", "batch_gone")
    workspace.sim.delete_batch("batch_gone")
    daemon = workspace.daemon()
    daemon.wait_for_event("poll_failed", job="job", status=404)
    job = workspace.job("job")
    assert job["status"] == "active"
    assert job["error"].startswith("batch_gone: OpenAI answered 404: No batch found")
    assert "the batch was deleted, or the key belongs to another OpenAI project" in job["error"]
    assert (job["completed_count"], job["trigger"]) == (1, None)

    workspace.wait_for_looks("batch_gone", 1)  # a failed look is no end
    workspace.sim.add_batch("batch_gone", "completed")
    workspace.jobs["job"]["poll_interval"] = "2s"  # a change of its config ends the waiting
    workspace.write()
    daemon.wait_for_event("trigger_sent", 3.0, job="job")
    assert workspace.job("job")["error"] is None
    assert len(daemon.events_of("poll_failed", job="job")) == 1


def test_wrong_key(workspace: Workspace) -> None:
    """A refused key is no reason to fail: the job shows it, and the log has OpenAI's request id."""
    workspace.secrets["openai"] = workspace.openai_secret("sk-unknown-0a1b2c3d4e5f")
    workspace.add_job("job", "batch_a")
    daemon = workspace.daemon()
    event = daemon.wait_for_event("poll_failed", job="job", status=401)
    assert event["request_id"].startswith("req_")
    assert f"(x-request-id {event['request_id']})" in workspace.run("status", "job").stdout
    assert workspace.looks("batch_a") == 1
    assert "Incorrect API key provided" in workspace.job("job")["error"]


@pytest.mark.long
def test_terminal_is_for_ever(workspace: Workspace) -> None:
    """A batch that has ended stays so, whatever comes later."""
    workspace.add_job("job", "batch_a", "batch_b", status="in_progress")
    daemon = workspace.daemon()
    workspace.sim.finish("batch_a")
    daemon.wait_for_event("batch_status_changed", batch_id="batch_a", status="completed")
    workspace.sim.set_batch("batch_a", status="in_progress")
    workspace.wait_for_looks("batch_b", 1)
    workspace.sim.finish("batch_b", "cancelled")
    daemon.wait_for_event("trigger_sent", job="job")
    sent = variables(workspace.started("job")[0])
    assert sent["batch_ids_completed"] == '["batch_a"]'
    assert sent["batch_ids_failed"] == '["batch_b"]'


@pytest.mark.long
def test_unknown_status(workspace: Workspace) -> None:
    """A status that nobody knows is kept, told of once, and polled on; capitals do not matter."""
    workspace.add_job("job", "batch_a", "batch_b", status="pondering")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_unknown", batch_id="batch_b", status="pondering")
    workspace.wait_for_looks("batch_a", 2)
    assert len(daemon.events_of("batch_status_unknown", batch_id="batch_a")) == 1
    assert workspace.job("job")["batches"][0]["status"] == "pondering"
    workspace.sim.finish("batch_a", "COMPLETED")
    workspace.sim.finish("batch_b", "EXPIRED")
    daemon.wait_for_event("completed_with_failures", job="job")
    assert workspace.statuses() == {"job": "completed_with_failures"}


def test_same_batch_in_two_jobs(workspace: Workspace) -> None:
    """A batch may belong to two jobs; each of them starts its own Keboola job."""
    workspace.add_job("one", "batch_a", "batch_b")
    workspace.add_job("two", "batch_a")
    assert workspace.once().code == 0
    assert len(workspace.started("one")) == len(workspace.started("two")) == 1
