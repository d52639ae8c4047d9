"""What a person types, beside the daemon and without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PATIENCE_S,
    PROGRAM,
    JsonObject,
    Outcome,
    Workspace,
    clean_environment,
    outcome_of,
    trigger_id,
    variables,
)
from simulator import Simulator

import teckochecker

NOBODY = 65534
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")

# The keys of `status --json`, exactly, with the types of their values; "time" is an RFC 3339 one.
SHAPES = {
    "document": (
        "version str, generated_at time, daemon dict, config dict, attention int, jobs list"
    ),
    "daemon": "running bool, pid int|None, started_at time|None, last_loop_at time|None",
    "config": "path str, sha256 str, loaded_at time|None, error str|None",
    "job": (
        "name str, job str, group None, status str, attention bool, error str|None, "
        "error_since time|None, batch_count int, completed_count int, failed_count int, "
        "batches list, last_check_at time|None, next_check_at time|None, "
        "completed_at time|None, trigger dict|None"
    ),
    "batch": (
        "id str, status str|None, request_counts dict|None, output_file_id str|None, "
        "error_file_id str|None, created_at time|None, expires_at time|None, "
        "completed_at time|None"
    ),
    "counts": "total int, completed int, failed int",
    "trigger": (
        "id str, state str, keboola_job_id str|None, keboola_status str|None, "
        "keboola_error str|None, url str|None, sent_at time|None, finished_at time|None, "
        "error str|None"
    ),
}


def assert_shape(value: JsonObject, shape: str) -> None:
    """The object has these keys, in this order, with values of these types."""
    keys = dict(pair.split(" ") for pair in SHAPES[shape].split(", "))
    assert list(value) == list(keys)
    for name, item in value.items():
        kind = type(item).__name__ if item is not None else "None"
        if isinstance(item, str) and "time" in keys[name]:
            assert TIME.fullmatch(item), f"{name}: {item}"
            kind = "time"
        assert kind in keys[name].split("|"), f"{name}: {item!r}"


def assert_status_shape(document: JsonObject) -> None:
    assert_shape(document, "document")
    assert_shape(document["daemon"], "daemon")
    assert_shape(document["config"], "config")
    for job in document["jobs"]:
        assert_shape(job, "job")
        for batch in job["batches"]:
            assert_shape(batch, "batch")
            if batch["request_counts"] is not None:
                assert_shape(batch["request_counts"], "counts")
        if job["trigger"] is not None:
            assert_shape(job["trigger"], "trigger")


def add_jobs(workspace: Workspace) -> None:
    workspace.sim.add_batch("batch_done", "completed", total=100, failed=2)
    ids = ("batch_done", "batch_runs")
    workspace.add_job("half", *ids, status="in_progress", poll_interval="1h")
    workspace.sim.add_batch("batch_expired", "expired")
    workspace.add_job("whole", "batch_ended", "batch_expired")
    workspace.add_job("quiet", "batch_quiet", paused=True)
    workspace.add_job("gone", "batch_gone")
    workspace.sim.delete_batch("batch_gone")


@pytest.mark.long
def test_status_json(workspace: Workspace) -> None:
    """The JSON has the design's keys and types, before, during and after the daemon's run."""
    add_jobs(workspace)
    workspace.write()
    before = json.loads(workspace.run("status", "--json").stdout)
    assert_status_shape(before)
    assert [job["status"] for job in before["jobs"]] == ["active", "active", "paused", "active"]
    assert not workspace.state.exists()

    daemon = workspace.daemon()
    daemon.wait_for_event("completed_with_failures", job="whole")
    daemon.wait_for_event("poll_failed", job="gone")
    during = workspace.wait_for_job("half", lambda job: job["completed_count"]) and (
        workspace.status()
    )
    assert_status_shape(during)
    jobs = {job["name"]: job for job in during["jobs"]}
    assert list(jobs) == ["half", "whole", "quiet", "gone"]
    assert during["version"] == teckochecker.__version__
    assert during["daemon"]["pid"] == daemon.pid
    assert during["config"]["path"] == str(workspace.path)
    assert during["config"]["error"] is None
    half = jobs["half"]
    assert (half["batch_count"], half["completed_count"], half["failed_count"]) == (2, 1, 0)
    assert half["next_check_at"] > half["last_check_at"]
    times = dict.fromkeys(("created_at", "expires_at", "completed_at"))
    assert half["batches"][0] | times == {
        "id": "batch_done",
        "status": "completed",
        "request_counts": {"total": 100, "completed": 98, "failed": 2},
        "output_file_id": "file-batch_done-output",
        "error_file_id": "file-batch_done-errors",
        **times,
    }
    whole = jobs["whole"]
    (keboola_job,) = workspace.started("whole")
    assert whole["status"] == "completed_with_failures"
    assert (whole["completed_count"], whole["failed_count"]) == (1, 1)
    assert whole["trigger"] == {
        "id": trigger_id("whole", ["batch_ended", "batch_expired"]),
        "state": "sent",
        "keboola_job_id": keboola_job["id"],
        "keboola_status": "success",
        "keboola_error": None,
        "url": f"{workspace.sim.stack_url}/admin/projects/1/queue/{keboola_job['id']}",
        "sent_at": whole["trigger"]["sent_at"],
        "finished_at": whole["completed_at"],
        "error": None,
    }
    assert "404" in jobs["gone"]["error"]
    assert jobs["quiet"]["status"] == "paused"

    assert daemon.stop() == 0
    after = json.loads(workspace.run("status", "--json").stdout)
    assert_status_shape(after)
    assert [job["status"] for job in after["jobs"]] == [job["status"] for job in during["jobs"]]
    only = json.loads(workspace.run("status", "half", "--json").stdout)["jobs"]
    assert [job["name"] for job in only] == ["half"]
    assert workspace.run("status", "nothing").code == 2


def test_status_with_a_bad_config(workspace: Workspace) -> None:
    """With the file broken, the status tells of it and of what the daemon knows."""
    workspace.add_job("job", "batch_a")
    workspace.once()
    workspace.write("jobs: [\n")
    document = workspace.status()
    assert_status_shape(document)
    assert str(workspace.path) in document["config"]["error"]
    assert [job["status"] for job in document["jobs"]] == ["completed"]
    assert "The config file has problems" in workspace.run("status").stdout


@pytest.fixture
def public(sim: Simulator) -> Iterator[Workspace]:
    """A workspace that everybody may read, and only root may write: pytest's own are private."""
    directory = Path(tempfile.mkdtemp(prefix="teckochecker-test-"))
    directory.chmod(0o755)
    workspace = Workspace(directory, sim)
    try:
        yield workspace
    finally:
        workspace.close()
        shutil.rmtree(directory)


def run_as_nobody(workspace: Workspace, *arguments: str) -> Outcome:
    """A command that gives up all rights once the program is loaded, which may be root's alone."""
    script = f"""
import encodings.ascii, os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import teckochecker
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(teckochecker.main(["--config", {str(workspace.path)!r}, *{arguments!r}]))
"""
    env = clean_environment(TECKOCHECKER_KEY=workspace.key)
    return outcome_of([sys.executable, "-c", script], cwd=workspace.directory, env=env)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_what_only_reads_needs_no_more(public: Workspace) -> None:
    """Who can only read the files can use what only reads; all else is refused in one line."""
    public.add_job("job", "batch_a", status="in_progress")
    assert public.once().code == 0
    public.path.chmod(0o644)
    for file in public.directory.glob("teckochecker.db*"):
        file.chmod(0o644)  # the state is the daemon's alone, until somebody lets others read it
    before = {path.name: path.read_bytes() for path in public.directory.iterdir()}
    for command in ("status", "status job", "secret list", "check", "logs", "logs job", "schema"):
        done = run_as_nobody(public, *command.split())
        assert (done.code, done.stderr) == (0, ""), command
        assert done.stdout
    for command in ("retry job", "encrypt --rotate", "--once"):
        done = run_as_nobody(public, *command.split())
        assert (done.code, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert {path.name: path.read_bytes() for path in public.directory.iterdir()} == before


# ---- retry ----


@pytest.mark.long
def test_retry_a_failed_job(workspace: Workspace) -> None:
    """`retry` arms a rejected job again; without a running daemon, for the next start."""
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.create", "status", times=2, code=400)
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_rejected", job="job")
    done = workspace.run("retry", "job")
    assert (done.code, done.stderr) == (0, "")
    assert "the running daemon does it within two seconds" in done.stdout
    daemon.wait_for_event("retry_taken", 2.5, job="job")
    workspace.sim.wait_for(lambda: workspace.posts("job") == 2, PATIENCE_S)
    workspace.wait_for_job("job", lambda job: job["status"] == "failed")
    assert daemon.stop() == 0
    done = workspace.run("retry", "job")
    assert done.code == 0
    assert "the next start or --once does it" in done.stdout
    assert workspace.once().code == 0
    workspace.assert_one_job("job")
    assert workspace.job("job")["trigger"]["id"] == trigger_id("job", ["batch_a"])


@pytest.mark.long
def test_retry_force_decides(workspace: Workspace) -> None:
    """`--force` sends an unknown trigger again although the search is impossible; nothing else."""
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.create", "reset_before")
    workspace.sim.fault("queue.search", "status", None, skip=1, code=403)
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_search_failed", job="job")
    mark = daemon.mark()
    searches = workspace.searches("job")
    assert workspace.run("retry", "job").code == 0
    workspace.sim.wait_for(lambda: workspace.searches("job") > searches, PATIENCE_S)
    assert workspace.posts("job") == 1
    assert workspace.run("retry", "job", "--force").code == 0
    daemon.wait_for_event("trigger_sent", 3.0, since=mark, job="job")
    assert workspace.posts("job") == 2
    workspace.assert_one_job("job")


@pytest.mark.parametrize("fails", ["queue.search", "storage.verify"])  # aimed before; never aimed
def test_retry_force_needs_an_aim(workspace: Workspace, fails: str) -> None:
    """`--force` of what was never sent posts nothing before the token's project is known."""
    with Simulator() as new:
        new.add_token(KEBOOLA_TOKEN)
        workspace.add_job("job", "batch_a")
        workspace.sim.fault(fails, "status", None, code=503, retry_after=3600)
        new.fault("storage.verify", "status", None, code=503, retry_after=3600)
        assert workspace.once().code == 0
        workspace.secrets["keboola"]["stack_url"] = new.stack_url
        workspace.jobs["job"]["config_id"] = "moved"
        assert workspace.run("retry", "job", "--force").code == 0
        assert "retry_taken" in {event["event"] for event in workspace.once().events}
        assert workspace.sim.jobs == new.jobs == []
        new.clear_faults()
        workspace.change_state("UPDATE runs SET next_at = 0")
        assert workspace.once().code == 0
        posts = [r for sim in (workspace.sim, new) for r in sim.requests if r.method == "POST"]
        assert [post.json()["config"] for post in posts] == ["moved"]
        assert [variables(job)["teckochecker_job"] for job in new.jobs] == ["job"]


@pytest.mark.long
def test_retry_force_finds(workspace: Workspace) -> None:
    """`--force` on an unknown trigger still takes the job that a search finds: no second one."""
    workspace.config["limits"]["trigger_grace"] = "1h"
    workspace.sim.search_lag = 3600.0
    workspace.add_job("job", "batch_a")
    workspace.sim.fault("queue.create", "reset_after")
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_unknown", job="job")
    workspace.sim.search_lag = 0.0
    assert workspace.run("retry", "job", "--force").code == 0
    daemon.wait_for_event("trigger_found", job="job")
    workspace.assert_one_job("job")


@pytest.mark.long
def test_retry_looks_at_once(workspace: Workspace) -> None:
    """On a job that is being polled, `retry` means a look now."""
    workspace.add_job("job", "batch_a", status="in_progress", poll_interval="24h")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="job")
    workspace.sim.finish("batch_a")
    assert workspace.run("retry", "job").code == 0
    daemon.wait_for_event("trigger_sent", 3.0, job="job")


def test_retry_refusals(workspace: Workspace) -> None:
    """What cannot be retried is said in one line, with exit code 2."""
    workspace.add_job("job", "batch_a", status="in_progress")
    workspace.write()
    early = workspace.run("retry", "job")
    what = f"there is no state file {workspace.state}; start the daemon or --once first"
    assert (early.code, early.stderr) == (2, f"teckochecker: {what}\n")
    assert not workspace.state.exists()
    workspace.once()
    unknown = workspace.run("retry", "nothing")
    what = 'there is no job "nothing"; `teckochecker status` lists them all'
    assert (unknown.code, unknown.stderr) == (2, f"teckochecker: {what}\n")
    assert workspace.run("retry").code == 2


def test_no_secret_needed(workspace: Workspace) -> None:
    """`status` and `retry` work where the key is not at hand."""
    workspace.add_job("job", "batch_a")
    workspace.once()
    workspace.key_file.unlink()
    assert workspace.statuses() == {"job": "completed"}
    done = workspace.run("retry", "job", "--force")
    assert done.code == 0
    assert OPENAI_KEY not in done.stdout + done.stderr
    assert KEBOOLA_TOKEN not in done.stdout + done.stderr


def test_a_pass_prunes_the_log(workspace: Workspace) -> None:
    """Under cron, too, the log does not grow for ever; only its newest row stays."""
    workspace.add_job("job", "batch_a")
    assert workspace.once().code == 0
    with closing(sqlite3.connect(workspace.state)) as db, db:
        db.execute("UPDATE events SET at = 1")
    assert workspace.once().code == 0
    with closing(sqlite3.connect(workspace.state)) as db:
        assert db.execute("SELECT count(*) FROM events").fetchone() == (1,)


# ---- init, secrets, logs, schema ----


def test_init(workspace: Workspace) -> None:
    """A new directory gets a config and a key for its owner only; from there it is three steps."""
    directory = workspace.directory / "new" / "place"
    done = workspace.run("init", str(directory))
    assert done.code == 0, done.stderr
    config, key = directory / "config.yaml", directory / "teckochecker.key"
    assert {file.stat().st_mode & 0o777 for file in (config, key)} == {0o600}
    assert config.read_text() == teckochecker.EXAMPLE_CONFIG
    assert str(config) in done.stdout
    before = config.read_bytes(), key.read_bytes()
    again = workspace.run("init", str(directory))
    assert again.code == 2
    assert "nothing is overwritten" in again.stderr
    assert (config.read_bytes(), key.read_bytes()) == before


def test_the_first_config(workspace: Workspace) -> None:
    """As `init` wrote it, it is refused; with what is in capitals filled in, `check` likes it."""
    workspace.path.unlink(missing_ok=True)
    workspace.key_file.unlink()
    assert workspace.run("init", str(workspace.directory)).code == 0
    assert workspace.run("check").code == 2
    assert "is the placeholder of the example" in workspace.run("encrypt").stderr
    text = workspace.path.read_text()
    for name, own in (("OPENAI-KEY", OPENAI_KEY), ("KEBOOLA-TOKEN", KEBOOLA_TOKEN), ("ID", "1")):
        text = re.sub(f"YOUR.{name}", own, text)
    workspace.path.write_text(re.sub("(?m)^( *)# (?= *([a-z_-]+:|- ))", r"\1", text))
    workspace.path.write_text(workspace.path.read_text().replace("YOUR-WEBHOOK", "chat.example"))
    assert workspace.run("encrypt").code == 0
    assert workspace.run("check").stdout == f"{workspace.path}: fine: 2 jobs, 1 batch, 3 secrets\n"


def test_init_makes_what_is_missing(workspace: Workspace, tmp_path: Path) -> None:
    """Where one of the two is there already, it stays, and the other one is made."""
    for name in ("config.yaml", "teckochecker.key"):
        directory = tmp_path / f"own-{name}"
        directory.mkdir()
        (directory / name).write_text("mine")
        assert workspace.run("init", str(directory)).code == 0
        assert (directory / name).read_text() == "mine"
        assert {file.name for file in directory.iterdir()} == {"config.yaml", "teckochecker.key"}


@pytest.mark.long
def test_logs(workspace: Workspace) -> None:
    """The log of the state file, of one job or of all, the last lines, in sentences or as JSON."""
    workspace.add_job("one", "batch_a")
    workspace.add_job("two", "batch_b", status="failed")
    told = workspace.once().events
    lines = workspace.run("logs").stdout.splitlines()
    events = [json.loads(line) for line in workspace.run("logs", "--json").stdout.splitlines()]
    assert events == told  # the same objects as on standard error
    assert len(lines) == len(events)
    for line, event in zip(lines, events, strict=True):
        mark = "" if event["level"] == "info" else f"{event['level']}: "
        assert line == f"{event['time']} {mark}{event['text']}"
    assert "two: batch_b failed" in "\n".join(lines)
    own = [json.loads(line) for line in workspace.run("logs", "two", "--json").stdout.splitlines()]
    assert own == [event for event in events if event.get("job") == "two"]
    assert workspace.run("logs", "-n", "2").stdout.splitlines() == lines[-2:]
    assert workspace.run("logs", "-n", "many").code == 2
    assert "trigger_sent" in workspace.run("logs", "--help").stdout


def test_the_log_for_people_reads_like_logs(workspace: Workspace) -> None:
    """Time in UTC, level if it is not info, sentence: the same in both, wherever one is."""
    workspace.add_job("one", "batch_a", status="failed")
    workspace.config["log"]["format"] = "console"
    workspace.write()
    told = workspace.run("--once", TZ="Asia/Tokyo").stderr
    assert "Z warning: one: batch_a failed" in told
    assert told == workspace.run("logs").stdout


@pytest.mark.long
def test_logs_follow(workspace: Workspace) -> None:
    """With --follow, what happens is told as it happens, also before there is a state file."""
    workspace.add_job("one", "batch_a")
    workspace.write()
    command = [*workspace.command("logs", "--follow", "--json", "one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        try:
            workspace.daemon().wait_for_event("trigger_sent", job="one")
            assert follower.stdout
            told = (json.loads(line)["event"] for line in follower.stdout)
            assert next(event for event in told if event == "trigger_sent")
        finally:
            follower.send_signal(signal.SIGINT)
        assert follower.wait() == 130


def test_follow_only_what_comes(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With -n 0, nothing old is shown."""
    workspace.add_job("one", "batch_a")
    assert workspace.once().code == 0
    passes: list[int] = []

    def sleep(_: float) -> None:
        if passes:
            raise KeyboardInterrupt
        passes.append(workspace.run("retry", "one", "--force").code)
        passes.append(workspace.once().code)

    monkeypatch.setattr(teckochecker, "time", SimpleNamespace(time=time.time, sleep=sleep))
    follow = ["--config", str(workspace.path), "logs", "-n", "0", "--follow", "--json"]
    assert (teckochecker.main(follow), passes) == (130, [0, 0])
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert (events[0], events[-1]) == ("retry_taken", "completed")


def test_schema(workspace: Workspace) -> None:
    """It makes just the tables and indexes that a state file has."""
    workspace.add_job("one", "batch_a")
    assert workspace.once().code == 0
    text = workspace.run("schema").stdout
    columns = "SELECT s.name, c.name FROM sqlite_schema AS s, pragma_table_info(s.name) AS c"
    with (
        closing(sqlite3.connect(":memory:")) as made,
        closing(sqlite3.connect(workspace.state)) as own,
    ):
        made.executescript(text)
        for query in (columns, "PRAGMA user_version"):
            of_made, of_own = (set(db.execute(query)) for db in (made, own))
            assert of_made == of_own
            assert of_made


@pytest.mark.long
def test_older_state_file(workspace: Workspace) -> None:
    """A state file of an older version is refused, in a line that says what to do; it stays."""
    workspace.add_job("job", "batch_a")
    assert workspace.once().code == 0
    workspace.change_state("PRAGMA user_version = 3")
    before = workspace.state.read_bytes()
    for command in ("status", "logs", "retry job", "--once", ""):
        done = workspace.run(*command.split())
        assert (done.code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"teckochecker: the state file {workspace.state} ")
        assert "older teckochecker" in line
        assert "move it away" in line
        assert "Keboola is searched before any POST" in line
    assert workspace.state.read_bytes() == before
