"""Jobs with `match`: batches found by their metadata, in groups, each group started once."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

import pytest
from harness import PATIENCE_S, Daemon, Workspace, variables, wait_until
from simulator import Simulator, iso

HOUR_S = 3600
NIGHTLY = {"pipeline": "nightly"}
HOUR_AGO = iso(time.time() - HOUR_S)[:19] + "Z"


def add_match(workspace: Workspace, name: str = "found", **keys: object) -> None:
    """A job that finds batches of the pipeline, created within the last hour."""
    workspace.jobs[name] = {"match": dict(NIGHTLY), "since": HOUR_AGO, "config_id": name, **keys}


def create(
    sim: Simulator,
    batch_id: str,
    group: str | None = None,
    status: str = "completed",
    *,
    created_ago_s: int = 0,
    failed: int = 0,
    **metadata: str,
) -> None:
    """A batch of the pipeline comes."""
    metadata |= NIGHTLY | ({} if group is None else {"date": group})
    created_at = int(time.time()) - created_ago_s
    sim.add_batch(batch_id, status, metadata=metadata, created_at=created_at, failed=failed)


def trigger_id(job: str, group: str, rerun: int = 0) -> str:
    """The trigger id of a group as the design defines it, put together without the program."""
    identity = json.dumps([2, job, group, rerun], separators=(",", ":"))
    return hashlib.sha256(identity.encode()).hexdigest()


def groups(sim: Simulator) -> dict[str, list[str]]:
    """The groups that were started, each once, with the ids that completed."""
    told = [variables(job) for job in sim.jobs]
    by_group = {v["teckochecker_group"]: json.loads(v["batch_ids_completed"]) for v in told}
    assert len(by_group) == len(told), Counter(v["teckochecker_group"] for v in told)
    return by_group


def wait_for_groups(sim: Simulator, count: int, timeout: float = PATIENCE_S) -> None:
    sim.wait_for(lambda: len(sim.jobs) >= count, timeout)


def phases(workspace: Workspace) -> list[str]:
    return [run["phase"] for run in workspace.runs()]


def assert_quiet(workspace: Workspace, daemon: Daemon, posts: int) -> None:
    """Two more complete reads of the list start nothing."""
    seen = len([r for r in workspace.requests if r.route == "openai.list"])
    workspace.sim.wait_for(
        lambda: len([r for r in workspace.requests if r.route == "openai.list"]) >= seen + 2, 20.0
    )
    assert len([r for r in workspace.requests if r.route == "queue.create"]) == posts
    assert daemon.is_running()


# ---- what is a run, and when it is whole ----


@pytest.mark.long
def test_each_batch_is_a_run(workspace: Workspace, sim: Simulator) -> None:
    """Without `group_by` each batch that fits starts its own Keboola job, also one that comes."""
    add_match(workspace)
    create(sim, "batch_a")
    create(sim, "batch_b", status="failed")
    sim.add_batch("batch_other", "completed", metadata={"pipeline": "other"})
    sim.add_batch("batch_bare", "completed")
    daemon = workspace.daemon()
    wait_for_groups(sim, 2)
    create(sim, "batch_c")
    daemon.wait_for_event("completed", run="found/batch_c")
    assert groups(sim) == {"batch_a": ["batch_a"], "batch_b": [], "batch_c": ["batch_c"]}
    assert workspace.statuses() == {
        "found/batch_a": "completed",
        "found/batch_b": "completed_with_failures",
        "found/batch_c": "completed",
    }
    assert_quiet(workspace, daemon, 3)


def test_every_pair_must_fit(workspace: Workspace, sim: Simulator) -> None:
    """A batch with another value for one of the pairs is not the job's; two jobs may take it."""
    add_match(workspace, "two", match={"pipeline": "nightly", "part": "x"})
    add_match(workspace, "one")
    create(sim, "batch_a", part="x")
    create(sim, "batch_b", part="y")
    assert workspace.once().code == 0
    told = [variables(job) for job in sim.jobs]
    assert sorted((v["teckochecker_job"], v["teckochecker_group"]) for v in told) == [
        ("one", "batch_a"),
        ("one", "batch_b"),
        ("two", "batch_a"),
    ]


@pytest.mark.long
def test_group_size(workspace: Workspace, sim: Simulator) -> None:
    """A group is whole when so many were seen; its batches are in the order of creation."""
    add_match(workspace, group_by="date", group_size=3)
    create(sim, "batch_z", "monday", created_ago_s=30)
    create(sim, "batch_a", "monday", created_ago_s=20)
    create(sim, "batch_t", "tuesday", created_ago_s=15)
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_joined", run="found/monday")
    wait_until(lambda: workspace.job("found/monday")["completed_count"] == 2, "two are finished")
    assert_quiet(workspace, daemon, 0)
    assert workspace.job("found/monday")["status"] == "active"
    create(sim, "batch_m", "monday", "in_progress", created_ago_s=10)
    daemon.wait_for_event("batch_joined", run="found/monday", batch_id="batch_m")
    sim.finish("batch_m")
    daemon.wait_for_event("completed", run="found/monday")
    assert groups(sim) == {"monday": ["batch_z", "batch_a", "batch_m"]}
    (job,) = sim.jobs
    assert variables(job)["teckochecker_job"] == "found"
    assert variables(job)["teckochecker_trigger_id"] == trigger_id("found", "monday")


@pytest.mark.long
def test_group_size_in_the_metadata(workspace: Workspace, sim: Simulator) -> None:
    """`metadata.KEY` says how many; where it is missing, no number or differs, the run waits."""
    add_match(workspace, group_by="date", group_size="metadata.parts")
    create(sim, "batch_a", "good", parts="2")
    create(sim, "batch_b", "good", parts="2")
    create(sim, "batch_c", "missing")
    create(sim, "batch_d", "word", parts="all")
    create(sim, "batch_e", "differs", parts="2")
    create(sim, "batch_f", "differs", parts="3")
    daemon = workspace.daemon()
    daemon.wait_for_event("completed", run="found/good")
    for group in ("missing", "word", "differs"):
        daemon.wait_for_event("group_size_unclear", run=f"found/{group}")
        run = workspace.job(f"found/{group}")
        assert (run["status"], run["attention"]) == ("active", True)
        assert run["error"].startswith("the size of the group is unclear: ")
    assert_quiet(workspace, daemon, 1)


@pytest.mark.long
def test_settle(workspace: Workspace, sim: Simulator) -> None:
    """Without `group_size` a group is whole when all is finished and none has come for `settle`."""
    add_match(workspace, group_by="date", settle="3s")
    create(sim, "batch_a", "monday")
    daemon = workspace.daemon()
    daemon.wait_for_event("run_found", run="found/monday")
    create(sim, "batch_b", "monday")
    daemon.wait_for_event("batch_joined", run="found/monday")
    joined = time.monotonic()
    daemon.wait_for_event("completed", run="found/monday")
    assert time.monotonic() - joined > 2.5
    assert groups(sim) == {"monday": ["batch_a", "batch_b"]}


@pytest.mark.long
def test_settle_over_passes(workspace: Workspace, sim: Simulator) -> None:
    """Under cron, `settle` counts from the pass in which the last batch was seen."""
    add_match(workspace, group_by="date")  # 15 minutes
    create(sim, "batch_a", "monday")
    for _ in range(2):
        assert workspace.once().code == 0
        assert sim.jobs == []
    workspace.change_state("UPDATE runs SET joined_at = joined_at - 900, next_at = 0")
    assert workspace.once().code == 0
    assert groups(sim) == {"monday": ["batch_a"]}


@pytest.mark.long
def test_late_batch(workspace: Workspace, sim: Simulator) -> None:
    """A batch that joins after the start is told of once, over restarts too, and starts nothing."""
    add_match(workspace, group_by="date", group_size=1)
    create(sim, "batch_a", "monday")
    daemon = workspace.daemon()
    daemon.wait_for_event("completed", run="found/monday")
    create(sim, "batch_late", "monday")
    daemon.wait_for_event("late_batch", run="found/monday", batch_id="batch_late")
    assert_quiet(workspace, daemon, 1)
    assert len(daemon.events_of("late_batch")) == 1
    assert daemon.stop() == 0
    daemon = workspace.daemon()
    assert_quiet(workspace, daemon, 1)
    assert daemon.events_of("late_batch") == []
    assert workspace.job("found/monday")["batch_count"] == 1


@pytest.mark.long
def test_batch_without_group(workspace: Workspace, sim: Simulator) -> None:
    """A batch that lacks the `group_by` key is told of once, also over restarts."""
    add_match(workspace, group_by="date", group_size=1)
    create(sim, "batch_lost")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_without_group", batch_id="batch_lost", job="found")
    assert_quiet(workspace, daemon, 0)
    assert daemon.stop() == 0
    daemon = workspace.daemon()
    assert_quiet(workspace, daemon, 0)
    assert daemon.events_of("batch_without_group") == []
    assert workspace.status()["jobs"] == []


def test_since(workspace: Workspace, sim: Simulator) -> None:
    """Batches that were created before `since` are not looked at, nor pages behind them read."""
    for number in range(250):
        create(sim, f"batch_old{number}", created_ago_s=2 * HOUR_S + 250 - number)
    create(sim, "batch_new", created_ago_s=60)
    add_match(workspace)
    assert workspace.once().code == 0
    assert groups(sim) == {"batch_new": ["batch_new"]}
    assert sim.request_counts["openai.list"] == 1
    assert {r.path.rpartition("/")[2] for r in sim.requests if r.route == "openai.get"} == {
        "batch_new"
    }


@pytest.mark.long
@pytest.mark.parametrize("count", [0, 1])
def test_idle_finding_is_cheap(workspace: Workspace, sim: Simulator, count: int) -> None:
    """Where nothing is new, a poll that finds costs three pages at most, however long the list."""
    for number in range(1_000):
        create(sim, f"batch_{number}", created_ago_s=1_000 - number, status="failed")
    add_match(workspace, match={"pipeline": "another"} if count == 0 else NIGHTLY | {"x": "y"})
    assert workspace.once().code == 0
    sim.reset_stats()
    assert workspace.once().code == 0
    assert sim.request_counts["openai.list"] <= 3


# ---- none is lost, and none doubled ----


def new_batches(sim: Simulator, numbers: Iterable[int]) -> None:
    with sim.changing():
        for number in numbers:
            create(sim, f"batch_{number}")


@pytest.mark.long
def test_many_over_restarts(workspace: Workspace, sim: Simulator) -> None:
    """Of batches that come before, while and after nothing runs, each starts one Keboola job."""
    add_match(workspace, config_id="shared")
    new_batches(sim, range(30))
    daemon = workspace.daemon()
    wait_for_groups(sim, 30)
    assert daemon.stop() == 0
    new_batches(sim, range(30, 180))  # more than a page
    daemon = workspace.daemon()
    new_batches(sim, range(180, 200))
    wait_for_groups(sim, 200, 60.0)
    assert_quiet(workspace, daemon, 200)
    assert groups(sim) == {f"batch_{n}": [f"batch_{n}"] for n in range(200)}


@pytest.mark.long
def test_kill_9(workspace: Workspace, sim: Simulator) -> None:
    """Killed while pages, answers, searches and POSTs are under way, none is lost or doubled."""
    add_match(workspace, group_by="date", group_size=2)
    wanted = {}
    places = ["openai.list before", "openai.list after", "openai.get after"]
    places += ["queue.search after", "queue.create before", "queue.create after"]
    for number, place in enumerate(places):
        for part in "ab":
            create(sim, f"batch_{number}{part}", f"day-{number}")
        wanted[f"day-{number}"] = [f"batch_{number}a", f"batch_{number}b"]
        route, when = place.split()
        hold = sim.hold(route, when)
        daemon = workspace.start()
        hold.wait_reached(PATIENCE_S)
        daemon.kill()
        hold.release()
    daemon = workspace.daemon()
    wait_until(lambda: phases(workspace) == ["finished"] * len(wanted), "all are finished")
    assert {group: sorted(ids) for group, ids in groups(sim).items()} == wanted


@pytest.mark.long
def test_lost_state_file(workspace: Workspace, sim: Simulator) -> None:
    """Without its state file it starts none of 300 twice, and asks Keboola only a few times."""
    add_match(workspace, config_id="shared")
    new_batches(sim, range(300))
    daemon = workspace.daemon()
    wait_for_groups(sim, 300, 60.0)
    wait_until(lambda: phases(workspace) == ["finished"] * 300, "all ended", 60.0)
    daemon.kill()
    workspace.lose_state()
    sim.reset_stats()
    workspace.daemon()
    wait_until(lambda: phases(workspace) == ["finished"] * 300, "all are found", 60.0)
    assert len(sim.jobs) == len(groups(sim)) == 300
    assert sim.request_counts.get("queue.create", 0) == 0
    assert sim.request_counts["queue.search"] <= 4  # one search, and a page more


@pytest.mark.long
def test_incomplete_list_is_read_again(workspace: Workspace, sim: Simulator) -> None:
    """Where a page fails, nothing behind it is taken as seen: the next poll reads it again."""
    add_match(workspace, config_id="shared")
    new_batches(sim, range(150))
    sim.fault("openai.list", "status", times=2, skip=1, code=500)
    daemon = workspace.daemon()
    daemon.wait_for_event("find_failed")
    wait_for_groups(sim, 150, 60.0)
    daemon.wait_for_event("find_recovered")
    assert len(groups(sim)) == 150


def test_only_pages_to_find_count(workspace: Workspace, sim: Simulator) -> None:
    """A failing page that was read to save requests says nothing of finding, and is told once."""
    now = int(time.time())
    for n in range(6):
        sim.add_batch(f"batch_old_{n}", "in_progress", created_at=now - 200_000 + n)
    for n in range(150):
        sim.add_batch(f"batch_new_{n}", "in_progress", created_at=now - 100_000 + n)
    workspace.add_job("ids", *(f"batch_old_{n}" for n in range(6)))
    add_match(workspace, since=f"{datetime.now(UTC):%F}")
    sim.fault("openai.list", "status", None, match="after=", code=500)
    passes = [workspace.once() for _ in range(3)]
    told = Counter(event["event"] for done in passes for event in done.events)
    assert (told["find_failed"], told["find_recovered"], told["list_not_usable"]) == (0, 0, 1)


def test_failing_find_over_passes(workspace: Workspace, sim: Simulator) -> None:
    """Under cron, what fails in each pass is told once, and is attention after ten minutes."""
    add_match(workspace)
    fault = sim.fault("openai.list", "status", None, code=503, retry_after=3600)
    passes = [workspace.once(), workspace.once()]
    workspace.change_state("UPDATE meta SET value = value - 601 WHERE key = 'find_failing:openai'")
    passes += [workspace.once(), workspace.once()]
    fault.clear()
    passes.append(workspace.once())
    assert [done.code for done in passes] == [0, 0, 1, 1, 0]
    told = Counter(event["event"] for done in passes for event in done.events)
    names = ("find_failed", "account_failing", "account_failing_recovered", "find_recovered")
    assert [told[name] for name in names] == [1, 1, 1, 1]


def test_failing_find_ends_with_its_jobs(workspace: Workspace, sim: Simulator) -> None:
    """A match job that comes back long after a failure has its own ten minutes."""
    add_match(workspace)
    sim.fault("openai.list", "status", None, code=503, retry_after=3600)
    assert workspace.once().code == 0
    found = workspace.jobs.pop("found")
    assert workspace.once().code == 0
    workspace.change_state("UPDATE meta SET value = value - 601 WHERE key = 'find_failing:openai'")
    workspace.jobs["found"] = found
    assert workspace.once().code == 0


# ---- the config changes ----


def test_added_while_the_list_is_read(workspace: Workspace, sim: Simulator) -> None:
    """A match job that a reload brings meanwhile is looked for at once, not an interval later."""
    add_match(workspace, "slow", poll_interval="1h")
    create(sim, "batch_a")
    hold = sim.hold("openai.list")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    add_match(workspace, "new", poll_interval="1h")
    workspace.reload(daemon)
    hold.release()
    daemon.wait_for_event("completed", run="new/batch_a")


@pytest.mark.long
def test_renamed(workspace: Workspace, sim: Simulator) -> None:
    """A job's new name takes its runs over: what was started is not started again."""
    add_match(workspace, "old", group_by="date", group_size=2, config_id="same")
    for part in "ab":
        create(sim, f"batch_{part}", "done")
    create(sim, "batch_c", "half")
    daemon = workspace.daemon()
    daemon.wait_for_event("completed", run="old/done")
    daemon.wait_for_event("run_found", run="old/half")
    workspace.jobs["new"] = workspace.jobs.pop("old")
    workspace.reload(daemon)
    create(sim, "batch_d", "half")
    daemon.wait_for_event("completed", run="new/half")
    assert_quiet(workspace, daemon, 2)
    assert workspace.statuses() == {"new/done": "completed", "new/half": "completed"}
    assert sorted(groups(sim)["half"]) == ["batch_c", "batch_d"]


def test_renamed_and_back(workspace: Workspace, sim: Simulator) -> None:
    """A name that a match job had before takes its runs over too."""
    add_match(workspace, "old", config_id="same")
    assert workspace.once().code == 0
    workspace.jobs["new"] = workspace.jobs.pop("old")
    create(sim, "batch_a")
    assert workspace.once().code == 0
    assert workspace.statuses() == {"new/batch_a": "completed"}
    workspace.jobs["old"] = workspace.jobs.pop("new")
    assert workspace.once().code == 0
    assert len(sim.jobs) == 1


@pytest.mark.long
def test_renamed_to_a_name_of_before(workspace: Workspace, sim: Simulator) -> None:
    """Also where the new name belonged to another job once, or two are renamed at once."""
    add_match(workspace, "a", config_id="same")
    add_match(workspace, "b", match={"pipeline": "another"}, config_id="same")
    add_match(workspace, "c", config_id="same", variables={"x": "y"})
    create(sim, "batch_a")
    assert workspace.once().code == 0
    del workspace.jobs["b"]
    assert workspace.once().code == 0
    workspace.jobs["b"] = workspace.jobs.pop("a")
    workspace.jobs["c2"] = workspace.jobs.pop("c")
    assert workspace.once().code == 0
    assert workspace.statuses() == {"b/batch_a": "completed", "c2/batch_a": "completed"}
    assert len(sim.jobs) == 2


def test_metadata_that_is_no_text(workspace: Workspace, sim: Simulator) -> None:
    """A lone surrogate in one batch's metadata keeps no other batch from being found."""
    add_match(workspace, group_by="date", group_size=1)
    create(sim, "batch_bad", "bad\ud800")
    create(sim, "batch_good", "good")
    workspace.add_job("plain", "batch_plain")
    assert workspace.once().code == 0
    assert workspace.statuses() == {"found/good": "completed", "plain": "completed"}
    assert len(sim.jobs) == 2


@pytest.mark.long
def test_paused(workspace: Workspace, sim: Simulator) -> None:
    """Paused, a job finds and starts nothing, and goes on with all of it afterwards."""
    add_match(workspace, group_by="date", group_size=1)
    create(sim, "batch_a", "monday", "in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("run_found", run="found/monday")
    workspace.jobs["found"]["paused"] = True
    workspace.add_job("other", "batch_other", status="in_progress")
    workspace.reload(daemon)
    sim.finish("batch_a")
    create(sim, "batch_b", "tuesday")
    workspace.wait_for_looks("batch_other", 3)
    assert workspace.statuses() == {"found/monday": "paused", "other": "active"}
    assert sim.jobs == []
    workspace.jobs["found"]["paused"] = False
    workspace.reload(daemon)
    wait_for_groups(sim, 2)
    assert sorted(groups(sim)) == ["monday", "tuesday"]


@pytest.mark.long
def test_removed(workspace: Workspace, sim: Simulator) -> None:
    """Removed, it finds and starts nothing; back again, it has lost and forgotten nothing."""
    add_match(workspace, config_id="same")
    create(sim, "batch_a")
    daemon = workspace.daemon()
    daemon.wait_for_event("completed", run="found/batch_a")
    kept = workspace.jobs.pop("found")
    workspace.add_job("other", "batch_other", status="in_progress")
    workspace.reload(daemon)
    create(sim, "batch_b")
    workspace.wait_for_looks("batch_other", 3)
    assert len(sim.jobs) == 1
    workspace.jobs["found"] = kept
    workspace.reload(daemon)
    daemon.wait_for_event("completed", run="found/batch_b")
    assert sorted(groups(sim)) == ["batch_a", "batch_b"]


# ---- when a run starts: policies and deadlines, which jobs with batch_ids have too ----


@pytest.mark.long
def test_trigger_on(workspace: Workspace, sim: Simulator) -> None:
    """Each policy starts or refuses each outcome as the design says; a person may overrule it."""
    outcomes = {"good": "completed", "partly": "expired", "empty": "completed", "bad": "failed"}
    starts = {
        "all_terminal": {"good", "partly", "empty", "bad"},
        "all_completed": {"good"},
        "any_output": {"good", "partly"},
    }
    for outcome, status in outcomes.items():
        failed = 100 if outcome == "empty" else 0
        create(sim, f"batch_{outcome}", status=status, failed=failed)
    for policy in starts:
        add_match(workspace, policy, trigger_on=policy)
    workspace.add_job("single", "batch_good", "batch_bad", trigger_on="all_completed")
    assert workspace.once().code == 1
    told = [variables(job) for job in sim.jobs]
    started = {(v["teckochecker_job"], v.get("teckochecker_group")) for v in told}
    assert started == {
        (policy, f"batch_{outcome}") for policy, good in starts.items() for outcome in good
    }
    refused = workspace.job("single")
    assert (refused["status"], refused["attention"], refused["trigger"]) == ("failed", True, None)
    assert refused["error"].startswith("trigger_on: all_completed, but batch_bad failed")
    assert "any_output" in workspace.job("any_output/batch_empty")["error"]

    assert workspace.run("retry", "single").code == 1
    for name in ("single", "any_output/batch_bad"):
        assert workspace.run("retry", name, "--force").code == 0
    before = len(sim.jobs)
    assert workspace.once().code == 1
    assert len(sim.jobs) == before + 2
    assert workspace.job("single")["status"] == "completed_with_failures"
    forced = variables(sim.jobs[-1]), variables(sim.jobs[-2])
    ids = {v["teckochecker_trigger_id"] for v in forced}
    assert trigger_id("any_output", "batch_bad") in ids  # as rerun 0


@pytest.mark.long
def test_deadline_starts(workspace: Workspace, sim: Simulator) -> None:
    """`on_deadline: start` starts with what is terminal, names the rest and polls it no more."""
    create(sim, "batch_done", "monday", created_ago_s=1800)
    create(sim, "batch_slow", "monday", "in_progress", created_ago_s=1700)
    add_match(workspace, group_by="date", group_size=5, deadline="20m", on_deadline="start")
    workspace.add_job("other", "batch_other", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("completed_with_failures", run="found/monday")
    told = variables(sim.jobs[0])
    assert json.loads(told["batch_ids_completed"]) == ["batch_done"]
    assert json.loads(told["batch_ids_failed"]) == []
    assert json.loads(told["batch_ids_pending"]) == ["batch_slow"]
    assert (told["batch_count_total"], told["batch_count_failed"]) == ("2", "0")
    looks = workspace.looks("batch_slow")
    workspace.wait_for_looks("batch_other", 3)
    assert workspace.looks("batch_slow") == looks
    assert workspace.job("found/monday")["attention"] is False


def test_deadline_with_nothing_terminal(workspace: Workspace, sim: Simulator) -> None:
    """A passed deadline starts with empty lists too; with `all_completed` it refuses."""
    for name, policy in (("starts", "all_terminal"), ("refuses", "all_completed")):
        sim.add_batch(f"batch_{name}", created_at=int(time.time()) - HOUR_S)
        keys = {"deadline": "30m", "on_deadline": "start", "trigger_on": policy}
        workspace.add_job(name, f"batch_{name}", **keys)
    assert workspace.once().code == 1
    assert workspace.statuses() == {"starts": "completed_with_failures", "refuses": "failed"}
    (job,) = sim.jobs
    assert variables(job)["batch_ids_completed"] == variables(job)["batch_ids_failed"] == "[]"


@pytest.mark.long
def test_deadline_alerts(workspace: Workspace, sim: Simulator) -> None:
    """`on_deadline: alert` tells once that a group is late, and waits on."""
    create(sim, "batch_a", "monday", created_ago_s=1800)
    add_match(workspace, group_by="date", group_size=2, deadline="20m")
    daemon = workspace.daemon()
    daemon.wait_for_event("deadline_passed", run="found/monday")
    assert_quiet(workspace, daemon, 0)
    late = workspace.wait_for_job("found/monday", lambda job: job["attention"])
    assert late["status"] == "active"
    create(sim, "batch_b", "monday")
    daemon.wait_for_event("completed", run="found/monday")
    assert len(daemon.events_of("deadline_passed")) == 1


@pytest.mark.long
def test_retry_of_a_group(workspace: Workspace, sim: Simulator) -> None:
    """`retry --force` of one run repeats that one, as the next rerun of its group."""
    add_match(workspace)
    create(sim, "batch_a")
    create(sim, "batch_b")
    assert workspace.once().code == 0
    assert workspace.run("retry", "found").code == 1  # a job's name means its unfinished runs
    assert workspace.run("retry", "found/batch_a", "--force").code == 0
    assert workspace.once().code == 0
    assert len(sim.jobs) == 3
    told = variables(sim.jobs[2])
    assert told["teckochecker_trigger_id"] == trigger_id("found", "batch_a", 1)
    assert workspace.statuses() == {"found/batch_a": "completed", "found/batch_b": "completed"}


def test_last_five(workspace: Workspace, sim: Simulator) -> None:
    """`status` has the unfinished runs, those that need attention, and the last five others."""
    add_match(workspace, trigger_on="all_completed")
    create(sim, "batch_bad", status="failed")
    for number in range(8):
        create(sim, f"batch_{number}")
    create(sim, "batch_runs", status="in_progress")
    assert workspace.once().code == 1
    counts = Counter(workspace.statuses().values())
    assert counts == {"completed": 5, "failed": 1, "active": 1}
    assert len(sim.jobs) == 8
    text = workspace.run("status", "found/batch_0").stdout
    assert "batch_0" in text
