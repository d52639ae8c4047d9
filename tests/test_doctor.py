"""`doctor`: finds each thing that is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from harness import (
    COMPONENT,
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PROGRAM,
    Outcome,
    Workspace,
    clean_environment,
)
from simulator import Simulator

import teckochecker as tecko

NOBODY = 65534
MINUTE_S = 60.0


@pytest.fixture
def healthy(workspace: Workspace) -> Workspace:
    """A workspace with two jobs, of which everything is right."""
    workspace.config["limits"]["request_timeout"] = "1s"
    workspace.add_job("one", "batch_a", "batch_b", status="in_progress")
    workspace.add_job("two", "batch_c", status="in_progress")
    workspace.write()
    return workspace


def examine(workspace: Workspace, **env: str) -> Outcome:
    """Run `doctor`; whatever it finds, it prints no secret, no traceback and nothing but lines."""
    done = workspace.run("doctor", **env)
    for secret in (OPENAI_KEY, KEBOOLA_TOKEN, workspace.key, "S3CR3T"):
        assert secret not in done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines
    assert all(line[:2] in {"✓ ", "✗ "} for line in lines), done.stdout
    assert done.code == int(any(line.startswith("✗") for line in lines))
    return done


def wrong_lines(done: Outcome) -> list[str]:
    return [line[2:] for line in done.stdout.splitlines() if line.startswith("✗")]


def right_lines(done: Outcome) -> list[str]:
    return [line[2:] for line in done.stdout.splitlines() if line.startswith("✓")]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# --- all is well ----------------------------------------------------------------------------------


def test_all_is_well(healthy: Workspace) -> None:
    """A line for each thing that is right, exit code 0; only GETs, and no file is made."""
    before = contents(healthy.directory)
    now = {"date": formatdate(usegmt=True)}
    healthy.sim.fault("storage.verify", "header", None, headers=now)
    done = examine(healthy)
    assert done.code == 0
    stack, queue = healthy.sim.stack_url, healthy.sim.queue_url
    no_variables = "is there, and declares no variables: its Keboola job gets no batch ids"
    lines = right_lines(done)
    assert lines.pop(1).startswith(f"{healthy.directory}, for the state file: ")
    assert lines == [
        f"{healthy.path}: 2 jobs, 2 secrets, and every secret opens",
        f"the state file {healthy.state} is not there yet: the first start makes it",
        "nothing runs now",
        f"openai: {healthy.sim.openai_url} takes the key",
        "openai: reads 3 of 3 batches",
        'keboola: the token is one of project "Simulated project"',
        f"keboola: the queue is {queue}",
        f"job one: {COMPONENT} one on {stack} {no_variables}",
        f"job two: {COMPONENT} two on {stack} {no_variables}",
        lines[-1],
    ]
    assert re.fullmatch(r"the clock agrees with the servers' to [0-9]+ s", lines[-1])
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
    assert done.code == 0, done.stdout
    assert "running now: daemon" in right_lines(done)
    assert f"the state file {healthy.state} is whole" in right_lines(done)
    after = contents(healthy.directory)
    assert after.keys() == before.keys()
    for name in ("config.yaml", "teckochecker.key", "teckochecker.db"):  # the daemon has the -wal
        assert after[name] == before[name]
    assert daemon.stop() == 0
    before = contents(healthy.directory)
    done = examine(healthy)
    assert done.code == 0
    assert "nothing runs now" in right_lines(done)
    after = contents(healthy.directory)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if after[name]} - before.keys() <= {"teckochecker.db-shm"}


def test_what_is_over_is_not_looked_at(workspace: Workspace) -> None:
    """Batches that have ended and jobs that are finished or done may be gone by now: no matter."""
    workspace.add_job("over", "batch_a")
    assert workspace.once().code == 0
    workspace.add_job("half", "batch_b", "batch_c", status="in_progress")
    workspace.sim.finish("batch_b")
    assert workspace.once().code == 0
    workspace.add_job("elsewhere", "batch_old", done=True)
    for batch_id in ("batch_a", "batch_b", "batch_old"):
        workspace.sim.delete_batch(batch_id)
    workspace.sim.add_config(COMPONENT, "half")
    workspace.write()
    done = examine(workspace)
    assert wrong_lines(done) == []
    assert "openai: reads 1 of 1 batches" in right_lines(done)


def test_no_list(healthy: Workspace) -> None:
    """Where a server has no list of batches, they are asked for one by one."""
    healthy.sim.fault("openai.list", "status", None, code=405)
    done = examine(healthy)
    assert done.code == 0
    assert "openai: reads 3 of 3 batches" in right_lines(done)
    healthy.jobs.clear()
    healthy.write()
    line = f"openai: {healthy.sim.openai_url} has no list of batches, and no job a batch"
    assert f"{line}: the key is not tried" in right_lines(examine(healthy))


def test_variables_are_covered(healthy: Workspace) -> None:
    """A configuration's variables are those that are always sent, and those of the job."""
    healthy.sim.add_config(COMPONENT, "one", {"variables_id": "55"})
    healthy.sim.add_config(COMPONENT, "two", {"variables_id": 55})
    names = ["batch_ids_completed", "teckochecker_trigger_id", "dataset"]
    variables = {"variables": [{"name": name, "type": "string"} for name in names]}
    healthy.sim.add_config("keboola.variables", "55", variables)
    healthy.jobs["one"]["variables"] = {"dataset": "products"}
    healthy.write()
    done = examine(healthy)
    stack = healthy.sim.stack_url
    line = f"job one: {COMPONENT} one on {stack} is there, and gets its variables"
    assert line in right_lines(done)
    (wrong,) = wrong_lines(done)
    assert wrong == (
        f"job two: {COMPONENT} two on {stack} needs the variables dataset;"
        " add them to the job's variables: what is sent replaces the defaults"
    )


# --- each thing that can be wrong -----------------------------------------------------------------

Break = Callable[[Workspace], object]


def with_config(**changes: Any) -> Break:  # noqa: ANN401
    """Return a breakage of the config's top-level keys."""

    def breakage(workspace: Workspace) -> None:
        workspace.config.update(changes)
        workspace.write()

    return breakage


def with_secret(name: str, **changes: Any) -> Break:  # noqa: ANN401
    """Return a breakage of one secret."""

    def breakage(workspace: Workspace) -> None:
        workspace.secrets[name].update(changes)
        workspace.write()

    return breakage


def with_token(name: str, token: str) -> Break:
    """Return a breakage that puts another token into a secret."""
    return lambda workspace: with_secret(name, value=workspace.encrypt(token))(workspace)


def with_job(**changes: Any) -> Break:  # noqa: ANN401
    """Return a breakage of job `two`."""

    def breakage(workspace: Workspace) -> None:
        workspace.jobs["two"].update(changes)
        workspace.write()

    return breakage


def with_fault(route: str, kind: str, **options: Any) -> Break:  # noqa: ANN401
    """Return a breakage of one route, for good."""
    return lambda workspace: workspace.sim.fault(route, kind, None, **options)


def with_answer(route: str, match: str = "", **changes: object) -> Break:
    """Return a breakage of an answer's JSON object."""
    return with_fault(route, "json", match=match, transform=lambda found: found | changes)


def with_date(ahead_s: float) -> Break:
    """Return a breakage of a server's clock."""

    def breakage(workspace: Workspace) -> None:
        headers = {"date": formatdate(time.time() + ahead_s, usegmt=True)}
        workspace.sim.fault("openai.list", "header", None, headers=headers)

    return breakage


def with_state(text: str) -> Break:
    """Return a breakage of the state file."""
    return lambda workspace: workspace.state.write_text(text * 4000)


def damage_state(workspace: Workspace) -> None:
    assert workspace.run("--once").code == 0
    pages = bytearray(workspace.state.read_bytes())
    pages[4096 * 2 : 4096 * 6] = b"\xff" * 4096 * 4
    workspace.state.write_bytes(pages)


def newer_state(workspace: Workspace) -> None:
    with closing(sqlite3.connect(workspace.state)) as db, db:
        db.execute("PRAGMA user_version = 999")


def foreign_batch(workspace: Workspace) -> None:
    workspace.sim.add_batch("batch_theirs", project="proj_other")
    with_job(batch_ids=["batch_theirs"])(workspace)


def about_to_expire(workspace: Workspace) -> None:
    end = datetime.now(UTC) + timedelta(days=3, minutes=1)
    with_answer("storage.verify", expires=end.isoformat())(workspace)


ILLS: dict[str, tuple[Break, str]] = {
    "no config": (lambda w: w.path.unlink(), "cannot be read: No such file"),
    "bad config": (with_config(polling=1), 'the key "polling" is not known; allowed here: '),
    "no YAML": (lambda w: w.write("jobs: [\n"), "is not YAML: "),
    "key open to others": (lambda w: w.key_file.chmod(0o604), "; run: chmod 600 "),
    "key open to its group": (lambda w: w.key_file.chmod(0o640), "; better: chmod 600 "),
    "no key": (lambda w: w.key_file.unlink(), "cannot read the key file "),
    "another key": (
        lambda w: w.write_file(w.key_file, Fernet.generate_key().decode()),
        "secrets.openai.value: is encrypted with another key; bring that key back",
    ),
    "plain secret": (
        with_secret("openai", value="sk-S3CR3T-in-plain"),
        "secrets.openai.value: is not encrypted; run: teckochecker --config ",
    ),
    "no variable": (
        lambda w: (w.secrets["openai"].pop("value"), with_secret("openai", env="NOT_SET")(w)),
        "secrets.openai.env: the environment has no such variable; set it",
    ),
    "no directory": (
        with_config(state="missing/teckochecker.db"),
        "missing, for the state file: No such file or directory; create it",
    ),
    "nowhere to publish": (
        with_config(publish="missing/www"),
        "missing, for published files: No such file or directory; create it",
    ),
    "no database": (with_state("not a database. "), "cannot read the state file "),
    "damaged state": (damage_state, "teckochecker.db is damaged: "),
    "newer state": (newer_state, "has schema 999; this program knows "),
    "clock ahead": (with_date(-300), "the clock is 5 min ahead of the server's of openai; let NTP"),
    "clock behind": (with_date(7200), "the clock is 2 h behind the server's of openai; let NTP"),
    "bad OpenAI key": (
        with_token("openai", "sk-S3CR3T-of-nobody"),
        "; make a new one, then run `encrypt --set openai`",
    ),
    "OpenAI is ill": (
        with_fault("openai.list", "status", code=503),
        "/v1: OpenAI answered 503: Simulated error; see the server's own words",
    ),
    "OpenAI is a login page": (
        with_fault("openai.*", "body"),
        "/v1: an answer that is not JSON (text/html), with status 200; check the address: somethi",
    ),
    "no OpenAI there": (
        with_secret("openai", base_url="http://127.0.0.1:1/v1"),
        "http://127.0.0.1:1/v1: ConnectError: All connection attempts failed; check the address",
    ),
    "no batch": (
        with_job(batch_ids=["batch_gone"]),
        "job two: batch_gone: OpenAI answered 404: ",
    ),
    "batch of another project": (
        foreign_batch,
        "or the key belongs to another OpenAI project; correct batch_ids, or openai_secret",
    ),
    "bad token": (
        with_token("keboola", "S3CR3T-of-nobody"),
        ": Keboola answered 401: Invalid access token (exceptionId ",
    ),
    "token about to expire": (
        about_to_expire,
        '"Simulated project", expires in 3 days; make a new one, then run `encrypt --set keboola`',
    ),
    "no stack": (
        with_answer("storage.verify", owner=None),
        "names no project of the token; correct stack_url: it is no Keboola stack",
    ),
    "no Keboola there": (
        with_secret("keboola", stack_url="http://127.0.0.1:1"),
        "keboola: http://127.0.0.1:1: ConnectError: ",
    ),
    "no queue": (
        with_answer("storage.index", services=[]),
        "/v2/storage lists no usable https address of the queue; check the address",
    ),
    "queue refuses": (
        with_fault("queue.search", "status", code=403),
        "keboola: the queue: Keboola answered 403: Simulated error (exceptionId ",
    ),
    "no configuration": (
        lambda w: w.sim.add_config(COMPONENT, "one"),
        f"Configuration two of component {COMPONENT} not found",
    ),
    "disabled configuration": (
        with_answer("storage.config", "configs/two", isDisabled=True),
        " is disabled; enable it in Keboola",
    ),
    "no such row": (
        lambda w: (
            with_job(config_row_ids=["1", "7"])(w),
            with_answer("storage.config", "configs/two", rows=[{"id": "1"}, {"id": 2}])(w),
        ),
        " has no rows 7; correct config_row_ids",
    ),
    "no variables there": (
        lambda w: (
            w.sim.add_config(COMPONENT, "one"),
            w.sim.add_config(COMPONENT, "two", {"variables_id": "55"}),
        ),
        "Configuration 55 of component keboola.variables not found",
    ),
}
MORE_THAN_ONE = {"no key", "another key"}  # what follows from it is told, too


@pytest.mark.parametrize("ill", ILLS)
def test_it_finds(ill: str, healthy: Workspace) -> None:
    """Each thing that is wrong is one line with its cure, and changes nothing of the rest."""
    breakage, expected = ILLS[ill]
    breakage(healthy)
    before = contents(healthy.directory)
    posts = len([r for r in healthy.requests if r.method == "POST"])
    started = time.monotonic()
    done = examine(healthy)
    assert time.monotonic() - started < MINUTE_S
    wrong = wrong_lines(done)
    assert done.code == 1
    assert any(expected in line for line in wrong), done.stdout
    assert len(wrong) == 1 or ill in MORE_THAN_ONE, done.stdout
    assert all(";" in line for line in wrong)
    after = contents(healthy.directory)
    assert {name: after.get(name) for name in before} == before
    assert len([r for r in healthy.requests if r.method == "POST"]) == posts


def test_an_expired_token_and_one_without_an_end(healthy: Workspace) -> None:
    """A token's end is told where Keboola tells it; a far one is fine, a past one is not."""
    verify = with_answer("storage.verify", expires="2099-01-01T00:00:00+0100")
    verify(healthy)
    (line,) = [line for line in right_lines(examine(healthy)) if "project" in line]
    assert ", expires in " in line
    assert line.endswith(" days")
    healthy.sim.clear_faults()
    with_answer("storage.verify", expires="2020-01-01T00:00:00")(healthy)
    assert ", has expired; make a new one" in wrong_lines(examine(healthy))[0]
    healthy.sim.clear_faults()
    with_answer("storage.verify", expires="some day")(healthy)
    assert examine(healthy).code == 0


def test_where_a_new_token_belongs(healthy: Workspace) -> None:
    """Who takes a token from elsewhere is told to put the new one there."""
    del healthy.secrets["openai"]["value"]
    with_secret("openai", env="MY_KEY")(healthy)
    (line,) = wrong_lines(examine(healthy, MY_KEY="sk-S3CR3T-old"))
    assert line.endswith("; make a new one, and put it into env MY_KEY")


def run_here(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `doctor` in this process."""
    code = tecko.main(["--config", str(workspace.path), "doctor"])
    return code, capsys.readouterr().out


def test_a_full_disk(
    healthy: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under 100 MiB left for the state file is wrong."""
    usage = shutil.disk_usage(healthy.directory)
    little = type(usage)(usage.total, usage.used, 99 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    code, out = run_here(healthy, capsys)
    assert code == 1
    assert (
        f"✗ {healthy.directory}, for the state file, has 99 MiB left; free some of the disk\n"
    ) in out


# --- as somebody else -----------------------------------------------------------------------------


@pytest.fixture
def public(sim: Simulator) -> Iterator[Workspace]:
    """A workspace that everybody may read, and only root may write."""
    directory = Path(tempfile.mkdtemp(prefix="teckochecker-test-"))
    directory.chmod(0o755)
    workspace = Workspace(directory, sim)
    try:
        yield workspace
    finally:
        workspace.close()
        shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_as_nobody(public: Workspace) -> None:
    """Who may only read is told what they cannot write; all the rest is tried out as ever.

    Before root's rights are given up, a first run loads what the interpreter loads late: it may lie
    where nobody else can read it.
    """
    public.add_job("one", "batch_a", status="in_progress")
    assert public.once().code == 0
    public.path.chmod(0o644)
    warm = public.directory / "warm"
    warm.mkdir()
    shutil.copy(public.path, warm)
    script = f"""
import contextlib, io, os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import teckochecker
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert teckochecker.main(["--config", {str(warm / "config.yaml")!r}, "doctor"]) == 0, out
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(teckochecker.main(["--config", {str(public.path)!r}, "doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=public.directory,
        env=clean_environment(TECKOCHECKER_KEY=public.key),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert (outcome.code, outcome.stderr) == (1, "")
    wrong = wrong_lines(outcome)
    assert [line.split("; ")[0] for line in wrong] == [
        f"{public.directory}, for the state file, cannot be written by this user",
        f"{public.state} cannot be written by this user",
        f"{public.state}.lock cannot be written by this user",
    ]
    assert f"the state file {public.state} is whole" in right_lines(outcome)
    assert "openai: reads 1 of 1 batches" in right_lines(outcome)


# --- servers that are dead, slow or many ----------------------------------------------------------


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    kept: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def accept() -> None:
        while True:
            try:
                kept.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in kept:
            connection.close()


def test_servers_that_never_answer(healthy: Workspace) -> None:
    """A server that accepts and keeps silent costs a line for each secret, and no minute."""
    with silent_server() as url:
        with_secret("openai", base_url=url)(healthy)
        with_secret("keboola", stack_url=url)(healthy)
        started = time.monotonic()
        done = examine(healthy)
        took_s = time.monotonic() - started
    assert wrong_lines(done) == [
        f"{name}: {url}: no whole answer within 1s; check the address, the network and the proxy"
        for name in ("openai", "keboola")
    ]
    assert took_s < 30


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


def test_a_thousand_batches(workspace: Workspace) -> None:
    """Very many batches are read by the list's pages, the few that it does not show one by one."""
    workspace.sim.add_batch("batch_hidden")
    for _ in range(150):
        workspace.sim.add_batch(f"batch_foreign{_}")
    for number in range(100):
        ids = [f"batch_{number}_{i}" for i in range(10)]
        workspace.add_job(f"job{number}", *ids, status="in_progress", config_id="shared")
    workspace.add_job("hidden", "batch_hidden", config_id="shared")
    workspace.write()
    started = time.monotonic()
    done = examine(workspace)
    assert time.monotonic() - started < 30
    assert done.code == 0
    assert "openai: reads 1001 of 1001 batches" in right_lines(done)
    counts = workspace.sim.request_counts
    assert counts["openai.list"] <= 11
    assert counts["openai.get"] <= 1
    assert counts["storage.config"] == 1


# --- on a pipe ------------------------------------------------------------------------------------


def test_head(healthy: Workspace) -> None:
    """Who has seen enough after one line gets no traceback."""
    healthy.sim.latency = 0.2
    with subprocess.Popen(
        healthy.command("doctor"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("✓")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_interrupted(healthy: Workspace) -> None:
    """Ctrl-C ends it at once, with 130 and without a traceback."""
    hold = healthy.sim.hold("storage.verify", times=None)
    with subprocess.Popen(
        healthy.command("doctor"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        text=True,
    ) as process:
        hold.wait_reached()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
        assert (process.returncode, stderr) == (130, "")
    hold.release()


def test_without_the_marks(healthy: Workspace) -> None:
    """Where the terminal has no ✓ and ✗, words stand in their place."""
    done = healthy.run("doctor", PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    healthy.path.unlink()
    assert healthy.run("doctor", PYTHONIOENCODING="ascii").stdout.startswith("WRONG ")
