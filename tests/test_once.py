"""`--once`: one pass over every unfinished job, as cron starts it."""

from __future__ import annotations

import json
import threading
import time

import pytest
from harness import COMPONENT, Workspace, trigger_id, variables
from simulator import Simulator

EXTRA = {"dataset": "products", "tuning": {"depth": [1, 2]}, "runs": 3}


def add_three_jobs(workspace: Workspace) -> None:
    """One whose batches have all completed, one mixed, and one that still runs."""
    sim = workspace.sim
    sim.add_batch("batch_expired", "expired", failed=4)
    sim.add_batch("batch_partly", "completed", failed=3)
    workspace.add_job("whole", "batch_b", "batch_partly", "batch_a")
    sim.add_batch("batch_failed", "failed")
    workspace.add_job("mixed", "batch_failed", "batch_done", "batch_expired", variables=EXTRA)
    workspace.add_job("running", "batch_runs", status="in_progress")


def test_three_jobs(workspace: Workspace) -> None:
    """The two jobs that are ready start one Keboola job each, once, also without the state file."""
    add_three_jobs(workspace)
    expected = {"whole": "completed", "mixed": "completed_with_failures", "running": "active"}
    assert workspace.once().code == 0
    assert workspace.statuses() == expected
    started = [variables(job)["teckochecker_job"] for job in workspace.sim.jobs]
    assert sorted(started) == ["mixed", "whole"]
    for name in started:
        workspace.assert_one_job(name)

    assert workspace.once().code == 0
    assert len(workspace.sim.jobs) == 2

    workspace.lose_state()
    done = workspace.once()
    assert done.code == 0
    assert len(workspace.sim.jobs) == 2
    assert workspace.posts("whole") == workspace.posts("mixed") == 1
    assert workspace.statuses() == expected
    found = {event["job"] for event in done.events if event["event"] == "trigger_found"}
    assert found == {"whole", "mixed"}


def test_variables(workspace: Workspace) -> None:
    """Every variable of the design's table is there as text, in the config's order."""
    add_three_jobs(workspace)
    workspace.once()
    whole = variables(workspace.started("whole")[0])
    assert whole["batch_ids_completed"] == '["batch_b","batch_partly","batch_a"]'
    assert whole["batch_error_file_ids"] == '{"batch_partly":"file-batch_partly-errors"}'
    mixed = variables(workspace.started("mixed")[0])
    told = {"batch_failed": "failed", "batch_done": "completed", "batch_expired": "expired"}
    assert {name: parsed(value) for name, value in mixed.items()} == {
        **EXTRA,
        "batch_ids_completed": ["batch_done"],
        "batch_ids_failed": ["batch_failed", "batch_expired"],
        "batch_count_total": 3,
        "batch_count_completed": 1,
        "batch_count_failed": 2,
        "batch_statuses": told,
        "batch_output_file_ids": {i: f"file-{i}-output" for i in ("batch_done", "batch_expired")},
        "batch_error_file_ids": {"batch_expired": "file-batch_expired-errors"},
        "batch_ids_pending": [],
        "batch_request_counts": {
            "batch_failed": {"total": 0, "completed": 0, "failed": 0},
            "batch_done": {"total": 100, "completed": 100, "failed": 0},
            "batch_expired": {"total": 100, "completed": 48, "failed": 4},
        },
        "batch_errors": {"batch_failed": "This line is not parseable as valid JSON."},
        "teckochecker_job": "mixed",
        "teckochecker_trigger_id": trigger_id("mixed", [*told]),
    }


def parsed(value: str) -> object:
    """A variable's text as the Python script of a Keboola component reads it."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def test_target(workspace: Workspace) -> None:
    """Branch, rows and mode go into the request; where they are not given, they stay out."""
    workspace.add_job("full", "batch_a", branch_id="789", config_row_ids=["1", "22"], mode="debug")
    workspace.add_job("plain", "batch_b", config_id="0123")
    workspace.once()
    bodies = [r.json() for r in workspace.requests if r.route == "queue.create"]
    full, plain = sorted(bodies, key=len, reverse=True)
    for body in (full, plain):
        del body["variableValuesData"]
    assert full == {
        "component": COMPONENT,
        "config": "full",
        "mode": "debug",
        "branchId": "789",
        "configRowIds": ["1", "22"],
    }
    assert plain == {"component": COMPONENT, "config": "0123", "mode": "run"}


@pytest.mark.long
@pytest.mark.parametrize("route", ["openai.get", "queue.create", "queue.search"])
def test_long_waits_are_left_to_the_next_pass(workspace: Workspace, route: str) -> None:
    """Asked to come back in an hour, it records that and ends; the next pass goes on."""
    workspace.add_job("patient", "batch_a")
    workspace.sim.fault(route, "status", code=429, retry_after=3600)
    before = time.monotonic()
    assert workspace.once().code == 0
    assert time.monotonic() - before < 10
    assert workspace.sim.jobs == []
    assert "429" in workspace.job("patient")["error"]
    if route != "openai.get":  # what is recorded for a trigger holds for the next pass as well
        assert workspace.once().code == 0
        assert workspace.sim.jobs == []
        workspace.change_state(
            "UPDATE runs SET next_at = next_at - 3600, unknown_uptime_s = unknown_uptime_s - 3600"
        )
    assert workspace.once().code == 0
    workspace.assert_one_job("patient")


@pytest.mark.long
def test_unknown_goes_on_in_later_passes(workspace: Workspace) -> None:
    """The times of an unknown trigger are in the state file: no pass posts before the grace."""
    workspace.config["limits"]["trigger_grace"] = "40s"
    workspace.add_job("lost", "batch_a")
    workspace.sim.fault("queue.create", "reset_before")
    for change in (
        "UPDATE runs SET next_at = next_at",
        # The clock was set forward meanwhile: no reason to believe that the grace is over.
        "UPDATE runs SET unknown_wall = unknown_wall - 60, next_at = 0",
        "UPDATE runs SET unknown_uptime_s = unknown_uptime_s - 60, next_at = 0",
    ):
        assert workspace.once().code == 0
        assert workspace.job("lost")["trigger"]["state"] == "unknown"
        assert workspace.posts("lost") == 1
        workspace.change_state(change)
    assert workspace.once().code == 0
    workspace.assert_one_job("lost")
    assert workspace.posts("lost") == 2


@pytest.mark.long
def test_concurrency(workspace: Workspace) -> None:
    """A hundred batches are looked at with no more requests at a time than allowed, but as many."""
    workspace.config["limits"]["max_concurrency"] = 4
    workspace.sim.latency = 0.01
    workspace.sim.fault("openai.list", "status", None, code=405)
    for number in range(10):
        ids = [f"batch_{number}_{part}" for part in range(10)]
        workspace.add_job(f"job{number}", *ids)
    assert workspace.once().code == 0
    assert len(workspace.sim.jobs) == 10
    assert workspace.sim.request_counts["openai.get"] == 100
    assert workspace.sim.max_in_flight == 4


def test_poll_interval_is_crons(workspace: Workspace) -> None:
    """Each pass looks, however long the job's interval is."""
    workspace.add_job("slow", "batch_a", status="in_progress", poll_interval="24h")
    assert workspace.once().code == 0
    workspace.sim.finish("batch_a")
    assert workspace.once().code == 0
    workspace.assert_one_job("slow")


def test_no_jobs(workspace: Workspace, sim: Simulator) -> None:
    """A config without jobs is fine, and nobody is asked anything."""
    assert workspace.once().code == 0
    assert sim.requests == []


@pytest.mark.long
def test_state_lost_within_the_grace(workspace: Workspace, sim: Simulator) -> None:
    """What was posted just before the state file was lost is not posted again before it shows."""
    sim.search_lag = 1.5
    workspace.config["limits"]["trigger_grace"] = "2s"
    workspace.add_job("job", "batch_a")
    assert workspace.once().code == 0
    for leftover in workspace.directory.glob("teckochecker.db*"):
        if leftover.suffix != ".lock":
            leftover.unlink()
    again = workspace.once()
    assert "state_is_older" in {event["event"] for event in again.events}
    assert again.code == 0
    workspace.assert_one_job("job")


def test_state_lost_long_ago_holds_nothing_back(workspace: Workspace, sim: Simulator) -> None:
    """After the grace, a search that finds nothing counts, whatever the lock file remembers."""
    workspace.config["limits"]["trigger_grace"] = "0s"
    workspace.add_job("job", "batch_a")
    assert workspace.once().code == 0
    workspace.state.unlink()
    workspace.add_job("other", "batch_b")
    again = workspace.once()
    assert "state_is_older" not in {event["event"] for event in again.events}
    assert len(sim.jobs) == 2


def test_pass_that_still_runs(workspace: Workspace, sim: Simulator) -> None:
    """A pass that begins while the one before hangs says nothing, which cron would mail."""
    workspace.add_job("job", "batch_a")
    hold = sim.hold("openai.get", "before")
    first = workspace.start("--once")
    hold.wait_reached(20.0)
    second = workspace.run("--once")
    assert (second.code, second.stdout, second.stderr) == (75, "", "")
    hold.release()
    assert first.wait() == 0


@pytest.mark.long
def test_half_a_config(workspace: Workspace) -> None:
    """A pass that begins while the config is written in place takes none of its halves."""
    workspace.add_job("known", "batch_known", status="in_progress")
    assert workspace.once().code == 0
    workspace.add_job("torn", "batch_a", "batch_b")
    workspace.jobs["torn"] = {"config_id": "torn", "batch_ids": ["batch_a", "batch_b"]}
    text = workspace.text()
    workspace.path.write_text(text[: text.index("batch_a") + len("batch_a\n")])
    rest = threading.Timer(0.7, workspace.path.write_text, (text,))
    rest.start()
    assert workspace.run("--once").code == 0
    rest.join()
    (job,) = workspace.started("torn")
    assert json.loads(variables(job)["batch_ids_completed"]) == ["batch_a", "batch_b"]
