"""The running daemon and its files: every way in which people and machines save them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from harness import KEBOOLA_TOKEN, OPENAI_KEY, Daemon, Workspace, wait_until

SEEN_WITHIN_S = 3.0
BROKEN = "jobs: {nightly: {poll_interval: soon}}\n"


def plain_write(path: Path, text: str) -> None:
    path.write_text(text)


def vim(path: Path, text: str) -> None:
    """The old file becomes the backup, the new one is written under its name."""
    backup = path.with_name(path.name + "~")
    path.rename(backup)
    path.write_text(text)
    backup.unlink()


def vim_in_new_file(path: Path, text: str) -> None:
    """A file with a strange name is written first, then moved to the place of the old one."""
    new = path.with_name("4913")
    new.write_text(text)
    new.rename(path)


def vscode(path: Path, text: str) -> None:
    """The file is cut to nothing and then written in pieces."""
    with path.open("w") as file:
        file.flush()
        file.write(text[: len(text) // 2])
        file.flush()
        file.write(text[len(text) // 2 :])


def sed(path: Path, text: str) -> None:
    """What comes is one `sed -i` away from what is there: a job's name is spelled out."""
    path.write_text(text.replace("job_sed:", "job_SHORT:"))
    subprocess.run(["sed", "-i", "s/job_SHORT:/job_sed:/", str(path)], check=True)


def rename_over(path: Path, text: str) -> None:
    new = path.with_name(".config.yaml.tmp123")
    new.write_text(text)
    new.replace(path)


SAVES = (plain_write, vim, vim_in_new_file, vscode, sed, rename_over)


def assert_takes(workspace: Workspace, daemon: Daemon, name: str, save: Callable[[], None]) -> None:
    """The job that the save brings is looked at and started, soon after."""
    before = time.monotonic()
    save()
    daemon.wait_for_event("trigger_sent", job=name)
    seen_after_s = time.monotonic() - before
    assert seen_after_s < SEEN_WITHIN_S, f"{name} took {seen_after_s:.1f} s"
    assert len(workspace.started(name)) == 1


@pytest.mark.long
def test_every_way_to_save(workspace: Workspace) -> None:
    """A job added to the file in any editor's way triggers within three seconds, no restart."""
    daemon = workspace.daemon()
    for save in SAVES:
        name = workspace.add_job(f"job_{save.__name__}", f"batch_{save.__name__}")
        text = workspace.text()
        assert_takes(workspace, daemon, name, lambda: save(workspace.path, text))  # noqa: B023
    assert [job["name"] for job in workspace.status()["jobs"]] == list(workspace.jobs)
    assert daemon.stop() == 0


def test_kubernetes(workspace: Workspace) -> None:
    """A swap of the symbolic link `..data` is seen, which names no file of ours."""

    def publish(version: str) -> None:
        folder = workspace.directory / f"..{version}"
        folder.mkdir()
        (folder / "config.yaml").write_text(workspace.text())
        link = workspace.directory / "..data_tmp"
        link.symlink_to(folder.name)
        link.replace(workspace.directory / "..data")

    workspace.add_job("first", "batch_a")
    publish("2026_1")
    workspace.path.symlink_to("..data/config.yaml")
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_sent", job="first")
    for version in ("2026_2", "2026_3"):
        name = workspace.add_job(f"from_{version}", f"batch_{version}")
        assert_takes(workspace, daemon, name, lambda: publish(version))  # noqa: B023
    assert daemon.stop() == 0


def assert_rejects(
    workspace: Workspace, daemon: Daemon, change: Callable[[], object], looks: int = 0
) -> str:
    """The change is reported once; the daemon goes on with what it had. Returns the error."""
    mark = daemon.mark()
    change()
    event = daemon.wait_for_event("config_rejected", SEEN_WITHIN_S, since=mark)
    error: str = workspace.status()["config"]["error"]
    for problem in event["problems"]:
        assert problem in error
    workspace.wait_for_looks("batch_old", looks)
    assert len(daemon.events_of("config_rejected", since=mark)) == 1
    assert "old" in workspace.statuses()
    return error


def assert_recovers(workspace: Workspace, daemon: Daemon, change: Callable[[], object]) -> None:
    """The change makes the config good again, and is taken."""
    mark = daemon.mark()
    change()
    daemon.wait_for_event("config_loaded", SEEN_WITHIN_S, since=mark)
    assert workspace.status()["config"]["error"] is None


@pytest.mark.long
def test_bad_files(workspace: Workspace) -> None:
    """A broken, half-written, empty or deleted file changes nothing; the next good one is taken."""
    workspace.add_job("old", "batch_old", status="in_progress")
    daemon = workspace.daemon()
    good = workspace.path.read_text()

    # Three looks are long enough for the daemon to have compared the files again.
    error = assert_rejects(workspace, daemon, lambda: workspace.path.write_text(BROKEN), looks=3)
    assert 'jobs.nightly.poll_interval: "soon" is not a duration' in error
    workspace.add_job("new", "batch_new")
    assert_recovers(workspace, daemon, workspace.write)
    daemon.wait_for_event("trigger_sent", job="new")

    half = good[: good.index("batch_old") + 4]
    assert_rejects(workspace, daemon, lambda: workspace.path.write_text(half))
    assert_recovers(workspace, daemon, workspace.write)

    assert_rejects(workspace, daemon, lambda: workspace.path.write_text(""))
    assert_recovers(workspace, daemon, workspace.write)

    error = assert_rejects(workspace, daemon, workspace.path.unlink)
    assert "No such file" in error
    assert_recovers(workspace, daemon, workspace.write)
    assert len(workspace.started("new")) == 1


@pytest.mark.long
def test_directory_taken_away(workspace: Workspace, tmp_path: Path) -> None:
    """The whole directory renamed away and made anew is a bad file too, and its return is seen."""
    folder = tmp_path / "etc"
    folder.mkdir()
    workspace.path = folder / "config.yaml"
    workspace.config["state"] = str(workspace.state)
    workspace.config["key_file"] = str(workspace.key_file)
    workspace.add_job("old", "batch_old", status="in_progress")
    daemon = workspace.daemon()
    mark = daemon.mark()
    folder.rename(tmp_path / "away")
    daemon.wait_for_event("config_rejected", 5, since=mark)
    folder.mkdir()
    workspace.add_job("new", "batch_new")
    workspace.write()
    daemon.wait_for_event("trigger_sent", job="new")
    mark = daemon.mark()
    name = workspace.add_job("newer", "batch_newer")
    assert_takes(workspace, daemon, name, workspace.write)
    shutil.rmtree(tmp_path / "away")
    assert daemon.stop() == 0


@pytest.mark.long
def test_sighup(workspace: Workspace) -> None:
    """SIGHUP reads the file again, also one that has not changed, good or bad."""
    workspace.add_job("old", "batch_old", status="in_progress")
    daemon = workspace.daemon()
    mark = daemon.mark()
    daemon.send(signal.SIGHUP)
    daemon.wait_for_event("config_loaded", since=mark)
    assert_rejects(workspace, daemon, lambda: workspace.path.write_text(BROKEN))
    mark = daemon.mark()
    daemon.send(signal.SIGHUP)
    daemon.wait_for_event("config_rejected", since=mark)
    assert daemon.stop() == 0


@pytest.mark.long
def test_secret_files(workspace: Workspace, tmp_path: Path) -> None:
    """A secret's file that changes, wherever it lies, is taken, also while the state file does."""
    folder = tmp_path / "run"
    folder.mkdir()
    openai, keboola = folder / "openai", workspace.directory / "keboola"
    openai.write_text("sk-not-this-one-0000\n")
    keboola.write_text("not-this-one-0000\n")
    for name, file in (("openai", openai), ("keboola", keboola)):
        del workspace.secrets[name]["value"]
        workspace.secrets[name]["file"] = str(file)
    workspace.add_job("job", "batch_a", poll_interval="1h")
    workspace.secrets["busy"] = workspace.openai_secret(OPENAI_KEY)
    for n in range(5):
        workspace.add_job(f"busy{n}", f"batch_{n}", status="in_progress", openai_secret="busy")
    daemon = workspace.daemon()
    daemon.wait_for_event("poll_failed", job="job", status=401)
    workspace.wait_for_looks("batch_0", 3)
    workspace.write_file(openai, OPENAI_KEY + "\n")
    daemon.wait_for_event("trigger_search_failed", SEEN_WITHIN_S + 1, job="job")
    workspace.write_file(keboola, KEBOOLA_TOKEN)
    daemon.wait_for_event("trigger_sent", SEEN_WITHIN_S + 1, job="job")
    workspace.assert_one_job("job")


@pytest.mark.long
def test_key_file(workspace: Workspace) -> None:
    """A key file that no longer opens the secrets is refused; one with a new first key is taken."""
    workspace.add_job("old", "batch_old", status="in_progress")
    daemon = workspace.daemon()
    other = Fernet.generate_key().decode()
    error = assert_rejects(
        workspace, daemon, lambda: workspace.write_file(workspace.key_file, other)
    )
    assert "is encrypted with another key" in error
    both = f"{other}\n{workspace.key}\n"
    assert_recovers(workspace, daemon, lambda: workspace.write_file(workspace.key_file, both))
    error = assert_rejects(workspace, daemon, lambda: workspace.key_file.chmod(0o644))
    assert f"chmod 600 {workspace.key_file}" in error


def test_state_stays(workspace: Workspace) -> None:
    """Another `state:` is refused while the daemon runs: it would forget what it did."""
    workspace.add_job("old", "batch_old", status="in_progress")
    daemon = workspace.daemon()
    workspace.config["state"] = "other.db"
    mark = daemon.mark()
    workspace.write()
    daemon.wait_for_event("config_rejected", SEEN_WITHIN_S, since=mark)
    assert not (workspace.directory / "other.db").exists()


@pytest.mark.parametrize("broken", ["", BROKEN])
def test_bad_at_start(workspace: Workspace, broken: str) -> None:
    """A bad file at the start ends the daemon with exit code 2 and the place of what is wrong."""
    workspace.write(broken)
    done = workspace.run()
    assert done.code == 2
    assert str(workspace.path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not workspace.state.exists()


@pytest.mark.long
def test_a_token_in_the_wrong_place(workspace: Workspace) -> None:
    """A token that is pasted where another value belongs is told of, and shown nowhere."""
    workspace.config["publish"] = "www"
    workspace.add_job("job", "batch_a", status="in_progress")
    daemon = workspace.daemon()
    workspace.jobs["job"]["mode"] = OPENAI_KEY
    workspace.write()
    daemon.wait_for_event("config_rejected")
    page = workspace.directory / "www" / "status.html"
    wait_until(lambda: "config file has problems" in page.read_text(), "the page tells of it")
    assert 'jobs.job.mode: "***" is not a value of mode' in workspace.status()["config"]["error"]
    for command in ("check", "status", "--once"):
        done = workspace.run(command)
        assert OPENAI_KEY not in done.stdout + done.stderr
    daemon.stop()
    kept = [path.read_bytes() for path in workspace.directory.rglob("*") if path.is_file()]
    assert sum(OPENAI_KEY.encode() in data for data in kept) == 1  # the config that it is in
    assert OPENAI_KEY not in daemon.log()


def test_sighup_amid_a_slow_write(workspace: Workspace) -> None:
    """SIGHUP takes no half of a config that is written in place either."""
    workspace.add_job("known", "batch_known", status="in_progress")
    daemon = workspace.daemon()
    mark = daemon.mark()
    workspace.add_job("torn", "batch_a", "batch_b", status="in_progress")
    workspace.jobs["torn"] = {"config_id": "torn", "batch_ids": ["batch_a", "batch_b"]}
    text = workspace.text()
    workspace.path.write_text(text[: text.index("batch_a") + len("batch_a\n")])
    daemon.send(signal.SIGHUP)
    rest = threading.Timer(0.7, workspace.path.write_text, (text,))
    rest.start()
    daemon.wait_for_event("config_loaded", since=mark)
    rest.join()
    keys = [run["batch_key"] for run in workspace.runs() if run["job"] == "torn"]
    assert keys == ['["batch_a","batch_b"]']
