"""`doctor`: finds each thing that is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from harness import COMPONENT, KEBOOLA_TOKEN, OPENAI_KEY, Outcome, Workspace, clean_environment

import teckochecker as tecko

NOBODY = 65534
SOON = (datetime.now(UTC) + timedelta(days=3, hours=1)).isoformat()
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
    wrong, better = (len(marked(done, mark)) for mark in "✗!")
    assert last == f"{wrong} problem{'s' * (wrong != 1)}, {better} warning{'s' * (better != 1)}"
    assert done.code == (wrong > 0)
    return done


def marked(done: Outcome, mark: str) -> list[str]:
    return [line[2:] for line in done.stdout.splitlines() if line.startswith(f"{mark} ")]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_all_is_well(healthy: Workspace) -> None:
    """A line for each thing that is right, exit code 0; only GETs, and no file is made."""
    before = contents(healthy.directory)
    done = examine(healthy)
    assert done.stdout.endswith("\n0 problems, 0 warnings\n")
    first, place, state, *lines = marked(done, "✓")
    assert first == f"{healthy.path}: 2 jobs, and every secret opens"
    assert place.startswith(f"{healthy.directory}, for the state file, has ")
    assert state == f"the state file {healthy.state} is not there yet: the first start makes it"
    stack = healthy.sim.stack_url
    assert sorted(lines) == [
        f"job one: {COMPONENT} one on {stack} is there",
        f"job two: {COMPONENT} two on {stack} is there",
        'keboola: the token is one of project "Simulated project"',
        f"openai: {healthy.sim.openai_url} takes the key",
        "openai: reads 3 of 3 batches",
    ]
    assert {request.method for request in healthy.requests} == {"GET"}
    assert contents(healthy.directory) == before


def test_beside_the_daemon(healthy: Workspace) -> None:
    """It works while the daemon runs, and leaves its files as they are."""
    healthy.config["defaults"]["poll_interval"] = "24h"
    daemon = healthy.daemon()
    for name in ("one", "two"):
        daemon.wait_for_event("batch_status_changed", job=name)
    before = contents(healthy.directory)
    assert f"the state file {healthy.state} is whole" in marked(examine(healthy), "✓")
    after = contents(healthy.directory)
    assert after.keys() == before.keys()
    for name in ("config.yaml", "teckochecker.key", "teckochecker.db"):  # the daemon has the -wal
        assert after[name] == before[name]


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
    """Without a list, batches are asked for one by one; only `match` cannot do without."""
    healthy.sim.fault("openai.list", "status", None, code=405)
    assert "openai: reads 3 of 3 batches" in marked(examine(healthy), "✓")
    healthy.jobs["one"] = {"match": {"a": "b"}, "since": "2026-11-25", "config_id": "one"}
    healthy.write()
    (wrong,) = marked(examine(healthy), "✗")
    assert wrong.startswith(f"openai: {healthy.sim.openai_url}: OpenAI answered 405")


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
    assert sorted(marked(done, "✗")) == [
        f"job one: {COMPONENT} one on {stack} needs the variables teckochecker_group; {cure}",
        f"job two: {COMPONENT} two on {stack} needs the variables {both}; {cure}",
    ]
    bare = f"job bare0 (and 2 more): {COMPONENT} bare on {stack}"
    assert marked(done, "!") == [f"{bare} {NO_VARIABLES}"]
    assert f"job flow: keboola.flow 7 on {stack} is there" in marked(done, "✓")


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


def elsewhere(w: Workspace, **source: str) -> None:
    del w.secrets["openai"]["value"]
    (w.directory / "openai.key").write_text("sk-S3CR3T")
    secret("openai", **source)(w)


def damage(w: Workspace) -> None:
    assert w.run("--once").code == 0
    pages = bytearray(w.state.read_bytes())
    pages[4096 * 2 : 4096 * 6] = b"\xff" * 4096 * 4
    w.state.write_bytes(pages)


NOWHERE = "http://127.0.0.1:1"
ILLS: dict[str, tuple[Break, str]] = {
    "no config": (lambda w: w.path.unlink(), "✗ *cannot be read: No such file*"),
    "bad config": (config(polling=1), '✗ *the key "polling" is not known; allowed here: *'),
    "no YAML": (lambda w: w.write("jobs: [\n"), "✗ *is not YAML: *"),
    "key open to others": (lambda w: w.key_file.chmod(0o604), "✗ *; run: chmod 600 *"),
    "key open to its group": (lambda w: w.key_file.chmod(0o640), "! *; better: chmod 600 *"),
    "no key": (lambda w: w.key_file.unlink(), "✗ *cannot read the key file *"),
    "plain": (secret("openai", value="sk-S3CR3T"), "✗ *is not encrypted; run: *encrypt"),
    "no variable": (lambda w: elsewhere(w, env="NO"), "✗ *the environment has no such variable; *"),
    "bad file": (lambda w: elsewhere(w, file="openai.key"), "✗ *, and put it into file openai.key"),
    "no directory": (config(state="missing/t.db"), "✗ *missing, for the state file, is not*"),
    "nowhere to publish": (config(publish="missing/www"), "✗ *missing, for published files*"),
    "no database": (lambda w: w.state.write_text("text" * 999), "✗ *file is not a database; *"),
    "damaged state": (damage, "✗ *teckochecker.db is damaged: *"),
    "bad OpenAI key": (token("openai", "sk-S3CR3T-of-nobody"), "✗ *yaml secret set openai"),
    "OpenAI is ill": (fault("openai.list", code=503), "✗ *answered 503: *; see the server's own*"),
    "a login page": (fault("openai.*", "body"), "✗ *not JSON (text/html)*; check the *"),
    "no OpenAI": (secret("openai", base_url=f"{NOWHERE}/v1"), "✗ *ConnectError: *; check the *"),
    "no batch": (job(batch_ids=["batch_gone"]), "✗ job two: batch_gone: OpenAI answered 404: *"),
    "bad token": (token("keboola", "S3CR3T-of-nobody"), "✗ *answered 401: *secret set keboola"),
    "old token": (answer("storage.verify", expires=SOON), "! *expires in 3 days; make a *"),
    "no right": (answer("storage.verify", canCreateJobs=False), "✗ *may not start jobs (can*"),
    "no stack": (answer("storage.verify", owner=None), "✗ *does not say which project the*"),
    "no Keboola": (secret("keboola", stack_url=NOWHERE), f"✗ keboola: {NOWHERE}: Connect*"),
    "queue refuses": (fault("queue.search", match="two", code=403), "✗ job two: *answered 403: *"),
    "no configuration": (job(config_id="three"), "✗ *Configuration three of component * not *"),
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("is_shared", [False, True])
def test_owners(is_shared: bool, healthy: Workspace) -> None:  # noqa: FBT001
    """A restored state file of root's, or a config of his alone, is named with what to run."""
    assert healthy.run("--once").code == 0
    lock = healthy.state.with_name("teckochecker.db.lock")
    os.chown(lock, NOBODY, NOBODY)
    if not is_shared:  # a directory of root's can be the place of anybody's state
        os.chown(healthy.directory, NOBODY, NOBODY)
    model = lock if is_shared else healthy.directory
    healthy.path.chmod(0o600)
    assert marked(examine(healthy), "✗") == [
        f"{path} belongs to root, but {model} to nobody;"
        f" run: chown {NOBODY}:{model.stat().st_gid} {path}"
        for path in (healthy.path, healthy.state)
    ]
    healthy.path.chmod(0o644)
    os.chown(healthy.state, NOBODY, NOBODY)
    assert marked(examine(healthy), "✗") == []


def test_bad_places(
    healthy: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under 100 MiB left is wrong, and so is a directory that this user may not write."""
    usage = shutil.disk_usage(healthy.directory)._replace(free=99 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    place = f"✗ {healthy.directory}, for the state file,"
    assert tecko.main(["--config", str(healthy.path), "doctor"]) == 1
    assert f"{place} has only 99 MiB left; make room on that disk\n" in capsys.readouterr().out
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert tecko.main(["--config", str(healthy.path), "doctor"]) == 1
    assert f"{place} is not there, or not this user's to write; " in capsys.readouterr().out


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
