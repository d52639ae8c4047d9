"""The trigger: one Keboola job per piece of work, whatever becomes of its POST."""

from __future__ import annotations

import json
import socket
from functools import partial
from typing import Any

import httpx
import pytest
from harness import (
    COMPONENT,
    KEBOOLA_TOKEN,
    PATIENCE_S,
    Workspace,
    add_foreign_jobs,
    trigger_id,
    variables,
)

# What becomes of the first POST, and whether Keboola has carried it out.
UNKNOWN_OUTCOMES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "status_500": ("status", {"code": 500}, False),
    "status_503_done": ("status", {"code": 503, "handled": True}, True),
    "status_408": ("status", {"code": 408}, False),
    "status_408_done": ("status", {"code": 408, "handled": True}, True),
    "proxy_502": ("status", {"code": 502, "body": "<html>Bad Gateway</html>"}, False),
    "redirect": ("redirect", {"code": 307}, False),
    "reset_before": ("reset_before", {}, False),
    "reset_after": ("reset_after", {}, True),
    "close_after": ("close_after", {}, True),
    "truncated": ("truncated", {}, True),
    "html": ("body", {}, True),
    "no_id": ("json", {"obj": {"status": "created"}}, True),
    "id_null": ("json", {"obj": {"id": None}}, True),
    "list": ("json", {"obj": []}, True),
    "hang_before": ("hang_before", {}, False),
    "hang_after": ("hang_after", {}, True),
    "drip": ("drip", {"interval": 0.2}, True),
}


@pytest.mark.long
def test_unknown_outcomes(workspace: Workspace) -> None:
    """Whatever leaves a POST's outcome open, the search decides, and one Keboola job exists."""
    workspace.config["limits"] |= {"request_timeout": "2s", "max_concurrency": 40}
    for name, (kind, options, _) in UNKNOWN_OUTCOMES.items():
        workspace.add_job(name, f"batch_{name}")
        workspace.sim.fault("queue.create", kind, match=f'"config":"{name}"', **options)
    daemon = workspace.daemon()
    for name, (_, _, done) in UNKNOWN_OUTCOMES.items():
        daemon.wait_for_event("trigger_unknown", job=name)
        daemon.wait_for_event("trigger_found" if done else "trigger_sent", job=name)
        assert workspace.posts(name) == (1 if done else 2), name
        if not done:  # one search before the first POST, two clear ones before the second
            assert workspace.searches(name) >= 3, name
    triggers = {job["name"]: job["trigger"] for job in workspace.status()["jobs"]}
    for name in UNKNOWN_OUTCOMES:
        jobs = workspace.started(name)
        assert [job["id"] for job in jobs] == [triggers[name]["keboola_job_id"]], name
        assert triggers[name]["state"] == "sent"
        assert triggers[name]["id"] == trigger_id(name, [f"batch_{name}"])
    assert daemon.stop() == 0


def test_not_reached(workspace: Workspace) -> None:
    """A refused connection is no outcome: the POST is tried again until the queue is back."""
    sim = workspace.sim
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        services = {"services": [{"id": "queue", "url": f"http://127.0.0.1:{port}"}]}
        sim.fault("storage.index", "json", times=None, obj=services)
        workspace.add_job("job", "batch_a")
        daemon = workspace.daemon()
        connection, _ = listener.accept()  # the search, which finds nothing
    with connection:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n[]")
    daemon.wait_for_event("trigger_not_sent", job="job")
    trigger = workspace.job("job")["trigger"]
    assert trigger["state"] == "intent"
    assert "nothing was sent to Keboola: ConnectError" in trigger["error"]
    assert daemon.events_of("trigger_unknown") == []
    sim.stop()
    sim._servers._ports["queue"] = port
    sim.start()
    workspace.jobs["job"]["poll_interval"] = "2s"  # a change ends the backoff
    workspace.write()
    daemon.wait_for_event("trigger_sent", job="job")
    workspace.assert_one_job("job")
    assert daemon.stop() == 0


def test_rejected(workspace: Workspace) -> None:
    """A 400 fails the job in Keboola's own words, until target, variables or token change."""
    body = {"error": "Configuration is broken", "exceptionId": "exception-77", "code": 400}
    workspace.sim.add_token("1234-another-token")
    workspace.secrets["second"] = workspace.keboola_secret(KEBOOLA_TOKEN)
    workspace.sim.fault("queue.create", "status", times=3, code=400, body=json.dumps(body))
    workspace.add_job("variables", "batch_a")
    workspace.add_job("target", "batch_b")
    workspace.add_job("token", "batch_c", keboola_secret="second")
    daemon = workspace.daemon()
    for name in workspace.jobs:
        daemon.wait_for_event("trigger_rejected", job=name, status=400)
    before = {job["name"]: job for job in workspace.status()["jobs"]}
    for job in before.values():
        assert job["status"] == "failed"
        assert job["trigger"]["state"] == "rejected"
        assert "Configuration is broken" in job["error"]
        assert "exception-77" in job["error"]

    for job in workspace.jobs.values():
        job["poll_interval"] = "2s"  # nothing that Keboola judges by
    workspace.reload(daemon)
    assert workspace.sim.request_counts["queue.create"] == 3
    workspace.jobs["variables"]["variables"] = {"dataset": "products"}
    workspace.jobs["target"]["config_id"] = "another"
    workspace.secrets["second"] = workspace.keboola_secret("1234-another-token")
    workspace.write()
    for name in workspace.jobs:
        daemon.wait_for_event("completed", job=name)
    after = {job["name"]: job for job in workspace.status()["jobs"]}
    for name in workspace.jobs:
        assert len(workspace.started(name)) == 1
        assert (after[name]["status"], after[name]["error"]) == ("completed", None)
        assert after[name]["trigger"]["id"] == before[name]["trigger"]["id"]
    assert variables(workspace.started("variables")[0])["dataset"] == "products"
    assert workspace.started("target")[0]["config"] == "another"


@pytest.mark.long
def test_curable_rejections(workspace: Workspace) -> None:
    """What can be cured at Keboola is tried again by itself; a 400 waits for a person."""
    codes = {"forbidden": 403, "unpaid": 402, "gone": 404, "locked": 423, "bad": 400, "odd": 422}
    for name, code in codes.items():
        workspace.add_job(name, f"batch_{name}")
        workspace.sim.fault("queue.create", "status", match=f'"config":"{name}"', code=code)
    assert workspace.once().code == 1
    assert set(workspace.statuses().values()) == {"failed"}
    workspace.change_state("UPDATE runs SET next_at = next_at - 3600")
    assert workspace.once().code == 1
    curable = ("forbidden", "unpaid", "gone", "locked")
    assert workspace.statuses() == {
        name: "completed" if name in curable else "failed" for name in codes
    }
    for name in curable:
        workspace.assert_one_job(name)


@pytest.mark.long
def test_impossible_search(workspace: Workspace) -> None:
    """As long as the search fails there is no POST, neither a first nor a second one."""
    sim = workspace.sim
    faults: dict[str, tuple[str, dict[str, Any]]] = {
        "server_error": ("status", {"code": 500}),
        "forbidden": ("status", {"code": 403}),
        "html": ("body", {}),
        "no_list": ("json", {"obj": {"jobs": []}}),
        "rows_without_id": ("json", {"obj": [{"status": "created"}]}),
    }
    for name, (kind, options) in faults.items():
        workspace.add_job(name, f"batch_{name}")
        sim.fault("queue.search", kind, None, match=f"configId={name}&", **options)
    workspace.add_job("lost", "batch_lost")
    sim.fault("queue.create", "reset_before", match='"config":"lost"')
    sim.fault("queue.search", "status", None, skip=1, match="configId=lost&", code=403)
    daemon = workspace.daemon()
    for name in (*faults, "lost"):
        daemon.wait_for_event("trigger_search_failed", job=name)
    jobs = {job["name"]: job for job in workspace.status()["jobs"]}
    assert {job["status"] for job in jobs.values()} == {"triggering"}
    assert {name: job["trigger"]["state"] for name, job in jobs.items()} == {
        **dict.fromkeys(faults, "intent"),
        "lost": "unknown",
    }
    for name in faults:
        assert "cannot search Keboola" in jobs[name]["error"]
        assert workspace.posts(name) == 0
    assert workspace.posts("lost") == 1

    sim.clear_faults()
    workspace.config["defaults"]["poll_interval"] = "2s"  # a change ends everybody's backoff
    workspace.write()
    for name in jobs:
        daemon.wait_for_event("trigger_sent", job=name)
        assert len(workspace.started(name)) == 1
    assert workspace.posts("lost") == 2


@pytest.mark.long
def test_paging(workspace: Workspace) -> None:
    """Ours is found behind a thousand newer jobs of the same configuration."""
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.create", "reset_after")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    add_foreign_jobs(workspace.sim, "job", 1100)
    hold.release()
    daemon.wait_for_event("trigger_found", job="job")
    workspace.assert_one_job("job")
    assert workspace.posts("job") == 1
    pages = [r.query for r in workspace.requests if r.route == "queue.search"]
    assert {page["limit"] for page in pages} == {"500"}
    assert len({page.get("createdTimeTo") for page in pages}) >= 3


def test_several_matches(workspace: Workspace) -> None:
    """Of several jobs that bear the trigger id the oldest is ours; the others are told of."""
    own = {"name": "teckochecker_trigger_id", "value": trigger_id("job", ["batch_a"])}
    body = {"component": COMPONENT, "config": "job", "mode": "run"}
    body["variableValuesData"] = {"values": [own]}  # type: ignore[assignment]
    headers = {"X-StorageApi-Token": KEBOOLA_TOKEN}
    ids = [
        httpx.post(f"{workspace.sim.queue_url}/jobs", json=body, headers=headers).json()["id"]
        for _ in range(3)
    ]
    workspace.add_job("job", "batch_a")
    daemon = workspace.daemon()
    event = daemon.wait_for_event("trigger_found", job="job", keboola_job_id=ids[0])
    assert event["level"] == "warning"
    assert sorted(event["other_keboola_job_ids"]) == ids[1:]
    assert workspace.job("job")["trigger"]["keboola_job_id"] == ids[0]
    assert len(workspace.sim.jobs) == 3


def test_kill_9(workspace: Workspace) -> None:
    """Killed when Keboola has answered, but before the answer has come: one Keboola job."""
    workspace.add_job("job", "batch_a")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    daemon.kill()
    assert workspace.run_row("job")["phase"] == "sending"
    restarted = workspace.daemon()
    restarted.wait_for_event("trigger_found", job="job")
    assert restarted.stop() == 0
    assert workspace.posts("job") == 1
    workspace.assert_one_job("job")


def test_waits_do_not_hold_places(workspace: Workspace) -> None:
    """Triggers that wait to try again leave every place to the jobs that can go on."""
    workspace.config["limits"]["max_concurrency"] = 1
    blocked = partial(workspace.sim.fault, "queue.search", "status", None, code=500)
    for number in range(3):
        name = workspace.add_job(f"stuck{number}", f"batch_{number}")
        blocked(match=f"configId={name}&")
    workspace.add_job("free", "batch_free", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_intended", job="stuck0")
    workspace.sim.finish("batch_free")
    daemon.wait_for_event("trigger_sent", 8, job="free")


def test_token_replaced_during_the_last_search(workspace: Workspace) -> None:
    """A reload that brings another token while an unknown run is searched for puts nothing off."""
    sim, token = workspace.sim, "1234-another-token"
    sim.add_token(token)
    sim.fault("queue.create", "reset_before")
    workspace.add_job("job", "batch_a")
    post = sim.hold("queue.create")
    daemon = workspace.daemon()
    post.wait_reached(PATIENCE_S)
    search = sim.hold("queue.search")
    post.release()
    search.wait_reached(PATIENCE_S)
    last = sim.hold("queue.search")  # by then the grace is over: after it, the second POST
    search.release()
    last.wait_reached(PATIENCE_S)
    workspace.secrets["keboola"] = workspace.keboola_secret(token)
    workspace.reload(daemon)
    last.release()
    daemon.wait_for_event("trigger_sent", job="job")
    assert workspace.posts("job") == 2
    first, second = daemon.events_of("trigger_sending", job="job")
    assert second["text"] == f"{first['text']}; Keboola's search shows no job of this run yet"
