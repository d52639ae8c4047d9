"""`doctor`: finds each thing that is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from harness import COMPONENT, KEBOOLA_TOKEN, OPENAI_KEY, Outcome, Workspace, clean_environment

import teckochecker as tecko

NOBODY = 65534
NO_VARIABLES = (
    "has no variables_id: its Keboola job gets no batch ids;"
    " connect a variables configuration to it (README, What Keboola gets)"
)
Break = Callable[[Workspace], object]


@pytest.fixture
def healthy(workspace: Workspace) -> Workspace:
    """A workspace with two jobs, of which everything is right."""
    workspace.config["limits"]["request_timeout"] = "1s"
    for name in ("one", "two"):
        workspace.sim.add_config(COMPONENT, name, {"variables_id": "55"})
    declared = [{"name": "batch_ids_completed"}, {"name": "teckochecker_trigger_id"}]
    workspace.sim.add_config("keboola.variables", "55", {"variables": declared})
    workspace.add_job("one", "batch_a", "batch_b", status="in_progress")
    workspace.add_job("two", "batch_c", status="in_progress")
    workspace.write()
    return workspace


def examine(workspace: Workspace, **env: str) -> Outcome:
    """Run `doctor`; whatever it finds, it prints no secret, and counts what it prints."""
    done = workspace.run("doctor", **env)
    for hidden in (OPENAI_KEY, KEBOOLA_TOKEN, workspace.key, "S3CR3T"):
        assert hidden not in done.stdout + done.stderr
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    assert all(line[:2] in {"✓ ", "! ", "✗ "} for line in lines), done.stdout
    wrong, warnings = (len(marked(done, mark)) for mark in "✗!")
    assert last == (
        f"{wrong} problem{'s' * (wrong != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    )
    assert done.code == (wrong > 0)
    return done


def marked(done: Outcome, mark: str) -> list[str]:
    return [line[2:] for line in done.stdout.splitlines() if line.startswith(f"{mark} ")]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# --- all is well ----------------------------------------------------------------------------------


def test_all_is_well(healthy: Workspace) -> None:
    """A line for each thing that is right, exit code 0; only GETs, and no file is made."""
    before = contents(healthy.directory)
    done = examine(healthy)
    assert done.stdout.endswith("\n0 problems, 0 warnings\n")
    lines = marked(done, "✓")
    assert lines.pop(1).startswith(f"{healthy.directory}, for the state file, has ")
    stack = healthy.sim.stack_url
    assert lines == [
        f"{healthy.path}: 2 jobs, 2 secrets, and every secret opens",
        f"the state file {healthy.state} is not there yet: the first start makes it",
        "nothing runs now",
        f"openai: {healthy.sim.openai_url} takes the key",
        "openai: reads 3 of 3 batches",
        'keboola: the token is one of project "Simulated project"',
        f"keboola: the queue is {healthy.sim.queue_url}",
        f"job one: {COMPONENT} one on {stack} is there, and it gets its variables",
        f"job two: {COMPONENT} two on {stack} is there, and it gets its variables",
    ]
    assert {request.method for request in healthy.requests} == {"GET"}
    assert contents(healthy.directory) == before


def test_beside_the_daemon(healthy: Workspace) -> None:
    """It works while the daemon runs, says so, and leaves its files as they are."""
    healthy.config["defaults"]["poll_interval"] = "24h"
    daemon = healthy.daemon()
    for name in ("one", "two"):
        daemon.wait_for_event("batch_status_changed", job=name)
    before = contents(healthy.directory)
    done = examine(healthy)
    assert f"the daemon runs, pid {daemon.pid}" in marked(done, "✓")
    assert f"the state file {healthy.state} is whole" in marked(done, "✓")
    after = contents(healthy.directory)
    assert after.keys() == before.keys()
    for name in ("config.yaml", "teckochecker.key", "teckochecker.db"):  # the daemon has the -wal
        assert after[name] == before[name]
    daemon.kill()
    os.utime(healthy.state.with_name("teckochecker.db.lock"), (0, 0))
    what = f"pid {daemon.pid} was killed, or hangs, since 1970-01-01T00:00:00Z"
    assert marked(examine(healthy), "!") == [f"{what}; see its log, and start it again"]


def test_what_is_over_is_not_asked_for(workspace: Workspace) -> None:
    """Batches that are final and jobs that are finished or done may be gone by now: no matter."""
    workspace.add_job("over", "batch_a")
    while workspace.once().code == 0 and workspace.job("over")["status"] != "completed":
        pass
    workspace.add_job("half", "batch_b", "batch_c", status="in_progress")
    workspace.sim.finish("batch_b")
    assert workspace.once().code == 0
    workspace.add_job("elsewhere", "batch_old", done=True)
    for batch_id in ("batch_a", "batch_b", "batch_old"):
        workspace.sim.delete_batch(batch_id)
    workspace.sim.add_config(COMPONENT, "half", {"variables_id": 55})
    workspace.sim.add_config("keboola.variables", "55")
    workspace.write()
    done = examine(workspace)
    assert marked(done, "✗") == []
    assert "openai: reads 1 of 1 batch" in marked(done, "✓")


def test_no_list(healthy: Workspace) -> None:
    """Without a list of batches they are asked for one by one; only `match` cannot do without."""
    healthy.sim.fault("openai.list", "status", None, code=405)
    assert "openai: reads 3 of 3 batches" in marked(examine(healthy), "✓")
    healthy.jobs["one"] = {"match": {"a": "b"}, "since": "2026-11-25", "config_id": "one"}
    healthy.write()
    (wrong,) = marked(examine(healthy), "✗")
    assert wrong.startswith("openai: the list of batches cannot be read: OpenAI answered 405")
    assert wrong.endswith("; job one needs it: write batch_ids there")


def test_variables(healthy: Workspace) -> None:
    """What is missing is told of each job; that there are none, once for a configuration."""
    names = ["batch_ids_completed", "dataset", "teckochecker_group"]
    variables = {"variables": [{"name": name, "type": "string"} for name in names]}
    healthy.sim.add_config("keboola.variables", "55", variables)
    healthy.jobs["one"] |= {"variables": {"dataset": "products", "teckochecker_gr": "x"}}
    healthy.sim.add_config(COMPONENT, "bare")
    healthy.sim.add_config("keboola.flow", "7")
    for n in range(3):
        healthy.add_job(f"bare{n}", "batch_a", config_id="bare")
    healthy.add_job("flow", "batch_a", config_id="7", component_id="keboola.flow")
    healthy.write()
    done = examine(healthy)
    stack = healthy.sim.stack_url
    cure = "add them to the job's variables: what is sent replaces the defaults"
    both = "dataset, teckochecker_group"
    assert marked(done, "✗") == [
        f"job one: {COMPONENT} one on {stack} needs the variables teckochecker_group; {cure}",
        f"job two: {COMPONENT} two on {stack} needs the variables {both}; {cure}",
    ]
    assert marked(done, "!") == [
        f"job bare0 (and 2 more): {COMPONENT} bare on {stack} {NO_VARIABLES}"
    ]
    flow = f"job flow: keboola.flow 7 on {stack} is there, and its tasks get the variables"
    assert flow in marked(done, "✓")


# --- each thing that can be wrong -----------------------------------------------------------------


def config(**changes: Any) -> Break:  # noqa: ANN401
    return lambda w: (w.config.update(changes), w.write())


def secret(name: str, **changes: Any) -> Break:  # noqa: ANN401
    return lambda w: (w.secrets[name].update(changes), w.write())


def token(name: str, value: str) -> Break:
    return lambda w: secret(name, value=w.encrypt(value))(w)


def job(**changes: Any) -> Break:  # noqa: ANN401
    return lambda w: (w.jobs["two"].update(changes), w.write())


def fault(route: str, kind: str = "status", **options: Any) -> Break:  # noqa: ANN401
    return lambda w: w.sim.fault(route, kind, None, **options)


def answer(route: str, match: str = "", **changes: object) -> Break:
    return fault(route, "json", match=match, transform=lambda found: found | changes)


def date(behind_s: float) -> Break:
    headers = {"date": formatdate(time.time() - behind_s, usegmt=True)}
    return fault("openai.list", "header", headers=headers)


def end(**left: float) -> Break:
    return answer("storage.verify", expires=(datetime.now(UTC) + timedelta(**left)).isoformat())


def no_variable(w: Workspace) -> None:
    del w.secrets["openai"]["value"]
    secret("openai", env="NOT_SET")(w)


def damage(w: Workspace) -> None:
    assert w.run("--once").code == 0
    pages = bytearray(w.state.read_bytes())
    pages[4096 * 2 : 4096 * 6] = b"\xff" * 4096 * 4
    w.state.write_bytes(pages)


def newer(w: Workspace) -> None:
    with closing(sqlite3.connect(w.state)) as db, db:
        db.execute("PRAGMA user_version = 999")


def foreign_batch(w: Workspace) -> None:
    w.sim.add_batch("batch_theirs", project="proj_other")
    job(batch_ids=["batch_theirs"])(w)


def no_row(w: Workspace) -> None:
    job(config_row_ids=["1", "7"])(w)
    answer("storage.config", "configs/two", rows=[{"id": "1"}, {"id": 2}])(w)


NOWHERE = "http://127.0.0.1:1"
ILLS: dict[str, tuple[Break, str]] = {
    "no config": (lambda w: w.path.unlink(), "✗ *cannot be read: No such file*"),
    "bad config": (config(polling=1), '✗ *the key "polling" is not known; allowed here: *'),
    "no YAML": (lambda w: w.write("jobs: [\n"), "✗ *is not YAML: *"),
    "key open to others": (lambda w: w.key_file.chmod(0o604), "✗ *; run: chmod 600 *"),
    "key open to its group": (lambda w: w.key_file.chmod(0o640), "! *; better: chmod 600 *"),
    "no key": (lambda w: w.key_file.unlink(), "✗ *cannot read the key file *"),
    "plain": (secret("openai", value="sk-S3CR3T"), "✗ *is not encrypted; run: *encrypt"),
    "no variable": (no_variable, "✗ *the environment has no such variable; set it*"),
    "no directory": (config(state="missing/t.db"), "✗ *missing, for the state file, cannot*"),
    "nowhere to publish": (config(publish="missing/www"), "✗ *missing, for published files*"),
    "no database": (lambda w: w.state.write_text("text" * 999), "✗ *file is not a database; *"),
    "damaged state": (damage, "✗ *teckochecker.db is damaged: *"),
    "newer state": (newer, "✗ *has schema 999; this program knows *"),
    "clock ahead": (date(300), "! the clock is 5m* ahead of that of openai's server; let NTP*"),
    "clock behind": (date(-7200), "! the clock is 1h59m behind that of openai's server; *"),
    "bad OpenAI key": (token("openai", "sk-S3CR3T-of-nobody"), "✗ *yaml secret set openai"),
    "OpenAI is ill": (fault("openai.list", code=503), "✗ *answered 503: *; see the server's own*"),
    "a login page": (fault("openai.*", "body"), "✗ *not JSON (text/html)*; *something else *"),
    "no OpenAI": (secret("openai", base_url=f"{NOWHERE}/v1"), "✗ *ConnectError: *; check the *"),
    "no batch": (job(batch_ids=["batch_gone"]), "✗ job two: batch_gone: OpenAI answered 404: *"),
    "batch of another project": (foreign_batch, "✗ *belongs to another OpenAI project*"),
    "bad token": (token("keboola", "S3CR3T-of-nobody"), "✗ *answered 401: *secret set keboola"),
    "token expires soon": (end(days=3, minutes=1), '! *project", expires in 3 days; make a *'),
    "token has expired": (end(days=-1), "✗ *, has expired; make a new one*"),
    "no right": (answer("storage.verify", canCreateJobs=False), "✗ *may not start jobs (can*"),
    "no stack": (answer("storage.verify", owner=None), "✗ *; correct stack_url: it is no *"),
    "no Keboola": (secret("keboola", stack_url=NOWHERE), f"✗ keboola: {NOWHERE}: Connect*"),
    "no queue": (answer("storage.index", services=[]), "✗ keboola: the queue: *lists no usable *"),
    "queue refuses": (fault("queue.search", code=403), "✗ keboola: the queue: *answered 403: *"),
    "no configuration": (job(config_id="three"), "✗ *Configuration three of component * not *"),
    "disabled": (answer("storage.config", "two", isDisabled=True), "✗ * is disabled; enable *"),
    "no row": (no_row, "✗ * has no rows 7; correct config_row_ids"),
    "no variables": (lambda w: w.sim.add_config(COMPONENT, "two"), f"! job two: *{NO_VARIABLES}"),
}


@pytest.mark.parametrize(
    "ill", [pytest.param(n, marks=pytest.mark.long) if n == "no Keboola" else n for n in ILLS]
)
def test_it_finds(ill: str, healthy: Workspace) -> None:
    """Each thing that is wrong is one line with its cure, and changes nothing of the rest."""
    breakage, expected = ILLS[ill]
    breakage(healthy)
    before = contents(healthy.directory)
    done = examine(healthy)
    (line,) = [line for line in done.stdout.splitlines() if line[:2] in {"! ", "✗ "}]
    assert fnmatchcase(line, expected)
    assert ";" in line
    after = contents(healthy.directory)
    assert {name: after.get(name) for name in before} == before


def test_from_the_environment(healthy: Workspace) -> None:
    """A new token belongs where the old one is; entries that $NO_PROXY cannot have are named."""
    del healthy.secrets["openai"]["value"]
    secret("openai", env="MY_KEY")(healthy)
    done = examine(healthy, MY_KEY="sk-S3CR3T-old", NO_PROXY="fd07::/64,[::1]:80,@@")
    (line,) = marked(done, "✗")
    assert line.endswith("; make a new one, and put it into env MY_KEY")
    (line,) = marked(done, "!")
    assert line.startswith('$NO_PROXY has "@@", which is neither host nor network; ')


def run_here(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `doctor` in this process."""
    code = tecko.main(["--config", str(workspace.path), "doctor"])
    return code, capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("is_shared", [False, True])
def test_owners(is_shared: bool, healthy: Workspace) -> None:  # noqa: FBT001
    """A restored state file of root's is named with its owner and what to run."""
    assert healthy.run("--once").code == 0
    lock = healthy.state.with_name("teckochecker.db.lock")
    os.chown(lock, NOBODY, NOBODY)
    if not is_shared:  # a directory of root's can be the place of anybody's state
        os.chown(healthy.directory, NOBODY, NOBODY)
    (wrong,) = marked(examine(healthy), "✗")
    model = lock if is_shared else healthy.directory
    assert wrong == (
        f"{healthy.state} belongs to root, but {model} to nobody;"
        f" run: chown {NOBODY}:{model.stat().st_gid} {healthy.state}"
    )
    os.chown(healthy.state, NOBODY, NOBODY)
    assert marked(examine(healthy), "✗") == []


def test_bad_places(
    healthy: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who may only read is told what they cannot write; under 100 MiB left is wrong."""
    assert healthy.run("--once").code == 0
    usage = shutil.disk_usage(healthy.directory)
    little = type(usage)(usage.total, usage.used, 99 << 20)
    with monkeypatch.context() as patches:
        patches.setattr(shutil, "disk_usage", lambda _: little)
        _, out = run_here(healthy, capsys)
    place = f"{healthy.directory}, for the state file,"
    assert f"✗ {place} has only 99 MiB left; make room on that disk\n" in out
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, out = run_here(healthy, capsys)
    cure = "run this as the daemon's user, or chown it to that user"
    assert code == 1
    for what in (place, healthy.state, f"{healthy.state}.lock"):
        assert f"✗ {what} cannot be written by this user; {cure}\n" in out


# --- servers that are dead, slow or many ----------------------------------------------------------


@pytest.mark.long
def test_servers_that_never_answer(healthy: Workspace) -> None:
    """A server that keeps silent costs a line for each secret, and no minute."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        secret("openai", base_url=url)(healthy)
        secret("keboola", stack_url=url)(healthy)
        started = time.monotonic()
        done = examine(healthy)
        assert time.monotonic() - started < 30
    assert marked(done, "✗") == [
        f"{name}: {url}: no whole answer within 1s; check the address, the network and the proxy"
        for name in ("openai", "keboola")
    ]


def test_it_loses_patience(
    healthy: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the answers with one secret take too long in all, what is known by then is told."""
    monkeypatch.setattr(tecko, "DOCTOR_PATIENCE_S", 1)
    healthy.sim.fault("storage.config", "hang_before", None)
    code, out = run_here(healthy, capsys)
    assert code == 1
    assert "✓ keboola: the queue is " in out
    assert "✓ openai: reads 3 of 3 batches\n" in out
    assert (
        "✗ keboola: not everything was answered within 1 s; see why its server is slow;"
        " for very many jobs, raise max_concurrency\n"
    ) in out


def test_many_batches(workspace: Workspace) -> None:
    """What the list shows is not asked for again, and a configuration is checked once."""
    for number in range(11):
        ids = [f"batch_{number}_{i}" for i in range(10)]
        workspace.add_job(f"job{number}", *ids, status="in_progress", config_id="shared")
    workspace.write()
    done = examine(workspace)
    assert done.code == 0
    assert "openai: reads 110 of 110 batches" in marked(done, "✓")
    counts = workspace.sim.request_counts
    assert (counts["openai.list"], counts["openai.get"], counts["storage.config"]) == (1, 10, 1)


# --- on a pipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["head", "Ctrl-C"])
def test_cut_short(how: str, healthy: Workspace) -> None:
    """Who has seen enough after one line, or types Ctrl-C, gets no traceback."""
    hold = healthy.sim.hold("storage.verify", times=None)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(healthy.command("doctor"), env=clean_environment(), **pipes) as process:
        assert process.stdout and process.stderr  # noqa: PT018 - for mypy
        hold.wait_reached()
        while "openai: reads 3 of 3" not in process.stdout.readline():
            pass
        if how == "head":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
        hold.release()
        assert process.stderr.read() == ""
        assert process.wait(timeout=10) == (0 if how == "head" else 130)


def test_without_the_marks(healthy: Workspace) -> None:
    """Where the terminal has no ✓ and ✗, words stand in their place."""
    done = healthy.run("doctor", PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert all(line.startswith("ok ") for line in done.stdout.splitlines()[:-1])
    healthy.write_file(healthy.key_file, Fernet.generate_key().decode())
    assert healthy.run("doctor", PYTHONIOENCODING="ascii").stdout.startswith("WRONG ")
