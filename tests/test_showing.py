"""What is shown: the snapshot and its renderers as text, in a browser, on a terminal, as files."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM, Outcome, Workspace, outcome_of, wait_until

import teckochecker as tc
from teckochecker import Batch, Job, Phase, Run, SecretStats, Target

JsonObject = dict[str, Any]
DATA = Path(__file__).with_name("data")
NOW = 1_795_426_200.0  # 2026-11-23T09:30:00Z
TARGET = Target(
    "https://connection.keboola.com", "kds-team.app-custom-python", "7203114", project="4711"
)
EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt;"
STATS = [
    SecretStats("keboola", "keboola", 96, 14, NOW - 60, error="no"),
    SecretStats("openai", "openai", 20_417, 3, NOW - 12, refused_since=NOW - 10, error="401"),
]
DAEMON = {"running": True, "pid": 4711, "started_at": "2026-11-23T06:12:40Z", "once": False}
LOADED = {"path": "c.yaml", "sha256": "5e", "loaded_at": "2026-11-23T06:12:41Z", "error": None}


def run(name: str, *statuses: str | None, **more: Any) -> Run:  # noqa: ANN401
    """A run whose batches were created two hours ago and are half done, or have ended."""
    half = [Batch(f"b_{n}", s, 100, 50, 0, created_at=NOW - 7200) for n, s in enumerate(statuses)]
    ended: JsonObject = {"completed": 100, "ended_at": NOW - 600, "output_file_id": "file-1"}
    batches = [replace(batch, **ended) if batch.is_terminal else batch for batch in half]
    run = Run(1, name, TARGET, batches=tuple(batches), last_check_at=NOW - 12, next_at=NOW + 120)
    return replace(run, **more)


def started(job_id: str, phase: Phase = Phase.FINISHED, **more: Any) -> JsonObject:  # noqa: ANN401
    """What a run has once its Keboola job was started, three hours ago."""
    url = f"{TARGET.stack_url}/admin/projects/4711/queue/{job_id}"
    status = "success" if phase is Phase.FINISHED else "processing"
    facts: JsonObject = {"phase": phase, "keboola_job_id": job_id, "trigger_id": "4f" * 32}
    facts |= {"url": url, "keboola_status": status, "sent_at": NOW - 10_800}
    return facts | {"finished_at": NOW - 10_000 if status == "success" else None} | more


def morning() -> list[Run]:
    """Runs with something of everything."""
    error = "Keboola answered 404: Configuration 7203150 not found"
    unknown: JsonObject = {"error": "the POST's outcome is not known", "error_since": NOW}
    return [
        run("done", "completed", "completed", **started("11")),
        run("partly", "completed", "expired", **started("12", finished_at=NOW - 90)),
        run("nightly", "completed", "in_progress"),
        run("rejected", "completed", phase=Phase.REJECTED, trigger_id="b", error=error),
        run("unknown", "completed", phase=Phase.UNKNOWN, intended_at=NOW - 900, **unknown),
        run("quiet", "in_progress"),
        run("follows", "completed", **started("13", Phase.SENT)),
    ]


def shot_of(runs: list[Run], **loaded: str) -> JsonObject:
    """The snapshot of runs, of which `quiet` is paused, and of STATS."""
    jobs = {r.job: Job(r.job, "openai", "keboola", "c", "1", paused=r.job == "quiet") for r in runs}
    config = tc.Config(Path("c.yaml"), "5e", Path("x"), Path("x"), jobs=jobs)
    return tc.snapshot(config, runs, STATS, DAEMON, LOADED | loaded, now=NOW)


def many(count: int) -> list[Run]:
    """The morning's runs over and over, under names of their own and with ten batches."""
    batches = tuple(Batch(f"batch_{i:032x}", "in_progress", 100, 50, 0) for i in range(10))
    runs = itertools.islice(itertools.cycle(morning()), count)
    return [replace(r, job=f"{r.job}-{n}", batches=batches) for n, r in enumerate(runs)]


def test_the_document_and_the_metrics() -> None:
    """They are what stands in tests/data, to the letter; what is missing there is written anew."""
    shot = shot_of(morning()) | {"version": "1.0"}
    metrics = tc.metrics(shot, STATS, {"success": 9, "error": 1})
    texts = {"showing.json": f"{json.dumps(shot, indent=1)}\n", "showing.prom": metrics}
    for path, text in ((DATA / name, text) for name, text in texts.items()):
        if not path.exists():
            path.write_text(text)
        assert path.read_text() == text


def test_what_happens_next() -> None:
    """Attention comes first, then what goes on, rests, is finished; with what happens next."""
    refused = run("refused", "failed", phase=Phase.REFUSED, error="all_completed is not met")
    ended = run("ended", "completed", **started("14", error="bad", next_at=float("inf")))
    groups = [run("new", next_at=at, group=g) for g, at in (("g", float("inf")), ("h", NOW + 60))]
    shot = shot_of([*morning(), refused, ended, *groups, run("late", "completed")])
    parts = tc.in_parts(shot).items()
    assert [f"{p}: {v['name']} {tc.what_next(v, shot)}" for p, views in parts for v in views] == [
        "Needs attention: ended `retry` starts it again",
        "Needs attention: rejected tries again in 2m, or `retry`",
        "Needs attention: unknown searches Keboola again in 2m",
        "Needs attention: refused `retry --force` starts it all the same",
        "Active: nightly polls in 2m",
        "Active: new/g waits for more batches",
        "Active: new/h waits for more batches; decides in 1m",
        "Active: late a finished batch's file is not there yet; polls in 2m",
        "Running: follows Keboola job 13 is processing; polls in 2m",
        "Paused: quiet nothing while it is paused",
        "Finished: partly Keboola job 12: success, 1m30s ago",
        "Finished: done Keboola job 11: success, 2h46m ago",
    ]


def test_progress() -> None:
    """What has ended counts as done, well or badly, and nothing is ever done more than once."""
    views = shot_of([run("a", "expired", "in_progress"), run("b", None), run("c")])["jobs"]
    views[1]["batches"][0]["request_counts"] = {"total": 10, "completed": 30, "failed": None}
    assert [tc.progress_of(view) for view in views] == [("1/2", 75), ("0/1", 100), ("0/0", 0)]


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool here")
@pytest.mark.parametrize("runs", [[], morning(), [run(EVIL + '\\"\n', EVIL)]], ids=len)
def test_promtool(runs: list[Run]) -> None:
    """Prometheus' own checker has nothing to say, whatever a name or a status is made of."""
    text = tc.metrics(shot_of(runs, error=EVIL), STATS if runs else [], {EVIL: 1} if runs else {})
    command = ["promtool", "check", "metrics"]
    assert outcome_of(command, input=text) == Outcome(0, "", "")


@pytest.fixture
def busy(workspace: Workspace) -> Workspace:
    """A workspace with a run in every condition; its files are published in `www`."""
    sim, workspace.config["publish"] = workspace.sim, "www"
    workspace.add_job("whole", "batch_w1", "batch_w2")
    workspace.add_job("partly", "batch_e", status="expired")
    workspace.add_job("quiet", "batch_q", status="in_progress", paused=True)
    workspace.add_job("half", "batch_1", "batch_2", status="in_progress")
    sim.finish("batch_1")
    sim.set_batch("batch_2", request_counts={"total": 100, "completed": 36, "failed": 0})
    workspace.add_job("a-job-whose-name-is-longer-than-the-room-for-it", "batch_3", done=True)
    workspace.add_job("refused", "batch_f")
    sim.fault("queue.create", "status", None, code=400, match='"config":"refused"')
    workspace.add_job("gone", "batch_g")
    sim.delete_batch("batch_g")
    return workspace


@pytest.mark.long
def test_status_in_80_columns(busy: Workspace) -> None:
    """Nothing is wider, or cut without an ellipsis; errors wrap; colours only where wanted."""
    busy.write()
    assert busy.on_terminal("status").startswith("Nothing has run here yet: start the daemon, or ")
    assert busy.once().code == 1
    text = busy.on_terminal("status", NO_COLOR="1")
    assert "\x1b[31mrefused  " in busy.on_terminal("status")
    assert "\x1b" not in text + busy.run("status").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert " ".join(text.split()).startswith(
        "Nothing runs: start the daemon, or --once. 1 needs attention. 1 failed, 2 active, "
    )
    lines = text.partition("\n\n")[2].splitlines()
    titles, *rows = [re.split("  +", line)[:3] for line in lines if line[0] != " "]
    assert titles == ["RUN", "STATUS", "BATCHES"]
    assert rows[:2] == [["refused", "failed", "1/1 100%"], ["half", "active", "1/2"]]
    assert rows[2:4] == [["gone", "active", "0/1"], ["quiet", "paused", "0/1"]]
    assert rows[6] == ["a-job-whose-name-is-longe…", "completed", "0/1"]
    flat = " ".join(text.split())
    assert " waits for a change of its config, or `retry` Keboola answered 400" in flat


@pytest.mark.long
def test_one_run_in_full(busy: Workspace) -> None:
    """What the run is, what Keboola got, and its story: why did it (not) run?"""
    assert busy.once().code == 1
    assert_agree(busy)
    assert "was stopped" not in (busy.directory / "www" / "status.html").read_text()
    text = busy.run("status", "partly").stdout
    assert re.search(r"\nstatus +completed with failures\nnext +Keboola job \d+: success, ", text)
    assert re.search(r"\nBatches:\n  batch_e expired, 50/100 requests, file-batch_e-output\n", text)
    assert '  batch_ids_failed = ["batch_e"]\n' in text
    assert re.search(r"Z partly: started Keboola job \d+ http://", text)
    hint = 'teckochecker: there is no job "nothing"; `teckochecker status` lists them all\n'
    assert busy.run("status", "nothing").stderr == hint


def test_a_job_that_has_found_nothing_yet(workspace: Workspace) -> None:
    """It says what it waits for."""
    workspace.jobs["found"] = {"match": {"a": "b"}, "since": "2026-11-25", "config_id": "1"}
    workspace.write()
    what = "it finds batches with a: b, created since 2026-11-25T00:00:00Z"
    assert workspace.run("status", "found").stdout == f"found: no run yet; {what}\n"
    assert workspace.run("status").stdout.endswith(f"\nfound: no run yet; {what}\n")


def test_a_config_without_jobs_and_one_with_problems(workspace: Workspace) -> None:
    """There is no empty table, but what to do; what is wrong with the file wraps."""
    workspace.write()
    what = "The config has no jobs yet: add one there, or with `job add`."
    assert workspace.on_terminal("status").endswith(f" no runs\n{what}\n")
    workspace.jobs["a job"] = {"batch_ids": ["b 1"], "config_id": "1", "poll_interval": "soon"}
    workspace.write()
    lines = workspace.on_terminal("status", NO_COLOR="1").splitlines()
    assert lines[0] == "The config file has problems:"
    assert all(len(line) <= 80 or str(workspace.path) in line for line in lines)


def test_of_very_many_runs_a_terminal_shows_the_first(workspace: Workspace) -> None:
    """It says how many are not shown."""
    for n in range(200):
        workspace.jobs[f"job-{n}"] = {"batch_ids": [f"batch_{n}"], "config_id": "1"}
    workspace.write()
    assert workspace.on_terminal("status").endswith("… and 140 runs more; see --json\n")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone may read it, planted links lead nowhere, and a full disk keeps the old one."""
    (tmp_path / "treasure").write_text("gold")
    for name in ("x", ".x.new"):
        (tmp_path / name).symlink_to(tmp_path / "treasure")
    tc.put_file(tmp_path / "x", "page \ud800")
    assert ((tmp_path / "x").read_text(), (tmp_path / "treasure").read_text()) == ("page ?", "gold")
    assert (tmp_path / "x").lstat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(os, "fchmod", lambda *_: os.open("/nowhere/x", os.O_RDONLY))
    with pytest.raises(OSError, match="No such file"):
        tc.put_file(tmp_path / "x", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["treasure", "x"]


def published(workspace: Workspace) -> JsonObject:
    """The runs' statuses, as `status.json` has them, by name."""
    path = workspace.directory / "www" / "status.json"
    jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
    return {job["name"]: job["status"] for job in jobs}


def assert_agree(workspace: Workspace) -> None:
    """The three files say what `status --json` says, and nothing else is there."""
    status, directory = workspace.status(), workspace.directory / "www"
    assert sorted(path.name for path in directory.iterdir()) == sorted(tc.PUBLISHED)
    document = json.loads((directory / "status.json").read_text())
    assert document | {"generated_at": ""} == status | {"generated_at": ""}
    page = (directory / "status.html").read_text()
    rows = re.findall(r"<strong>(.*?)</strong><span class=(\w+)>", page)
    assert dict(rows) == {job["name"]: job["status"] for job in status["jobs"]}
    samples = (directory / "metrics.prom").read_text()
    assert 'teckochecker_jobs{status="completed_with_failures"} 1\n' in samples
    assert f"teckochecker_attention {status['attention']}\n" in samples


@pytest.mark.long
def test_from_start_to_stop(busy: Workspace) -> None:
    """What is published follows the daemon and its config, up to its end."""
    page = busy.directory / "www" / "status.html"
    page.parent.write_text("in the way")
    daemon = busy.daemon()
    assert "File exists" in daemon.wait_for_event("publish_failed")["error"]
    page.parent.unlink()
    wait_until(lambda: published(busy).get("refused") == "failed", "a failed run")
    daemon.wait_for_event("publish_recovered")
    busy.sim.finish("batch_2")
    wait_until(lambda: published(busy)["half"] == "completed", "a finished run")
    busy.write("jobs: {broken: 5}\n")
    wait_until(lambda: "The config file has problems" in page.read_text(), "the error on the page")
    busy.reload(daemon)
    assert daemon.stop() == 0
    assert "The daemon was stopped at " in page.read_text()
    assert_agree(busy)


FULL = "teckochecker: cannot go on: No space left on device; see to that first\n"


@pytest.mark.parametrize("command", ["status", "status --json", "schema"])
@pytest.mark.parametrize("end", [("| head -n 1", 0, ""), (">&-", 0, ""), (">/dev/full", 1, FULL)])
def test_outputs_that_end(busy: Workspace, command: str, end: tuple[str, int, str]) -> None:
    """Who has seen enough gets no traceback; a full disk is told in a line, and is no success."""
    busy.write()
    program = shlex.join([sys.executable, str(PROGRAM), "--config", str(busy.path)])
    bash = ["bash", "-o", "pipefail", "-c", f"{program} {command} {end[0]}"]
    done = outcome_of(bash)
    assert (done.code, done.stderr) == end[1:]


@pytest.mark.parametrize("command", tc.COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself, with an example that is one, and the exit codes."""
    with pytest.raises(SystemExit, match=r"^0$"):
        tc.new_parser().parse_args([command, "--help"])
    example = capsys.readouterr().out.partition("\nexample: teckochecker ")[2]
    tc.new_parser().parse_args(shlex.split(re.split("[>\n]", example)[0]))
    assert "\n\nexit codes: 0 fine; 1 something needs attention, or " in example
