"""The state file on a full disk, damaged, deleted, replaced, locked: no second Keboola job."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from harness import Daemon, Workspace, wait_until
from simulator import Hold, Simulator

PATIENCE_S = 40.0  # a full disk is tried again at most every ten seconds
CHUNK = b"\0" * 65_536


class Disk:
    """A disk of its own for the state file, on which nothing can be written for a while."""

    looks = 3  # how often another job is looked at before there is room again

    def __init__(self, workspace: Workspace, directory: Path) -> None:
        self._state = directory / "teckochecker.db"
        workspace.state = self._state
        workspace.config["state"] = str(self._state)

    def fill(self, daemon: Daemon) -> None:
        """From now on, nothing can be committed there."""

    def free(self, daemon: Daemon) -> None:
        """There is room again."""


class SmallDisk(Disk):
    """A tmpfs, full."""

    def fill(self, daemon: Daemon) -> None:  # noqa: ARG002 - as the others
        filler = self._state.with_name("filler")
        with filler.open("ab", buffering=0) as out, suppress(OSError):
            while True:
                out.write(CHUNK)

    def free(self, daemon: Daemon) -> None:  # noqa: ARG002
        self._state.with_name("filler").unlink()


class LimitedFiles(Disk):
    """Files may not grow: an error of the disk's that SQLite does not call "full"."""

    looks = 1

    def fill(self, daemon: Daemon) -> None:
        size = self._state.with_name(self._state.name + "-wal").stat().st_size
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def free(self, daemon: Daemon) -> None:
        if daemon.is_running():
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, unlimited)


class LockedFile(Disk):
    """Another process writes, and does not come to an end."""

    looks = 1  # takes some eight seconds: see `test_locked_stands_still`

    def fill(self, daemon: Daemon) -> None:  # noqa: ARG002
        self._db = sqlite3.connect(self._state, timeout=30, isolation_level=None)
        self._db.execute("BEGIN IMMEDIATE")

    def free(self, daemon: Daemon) -> None:  # noqa: ARG002
        self._db.close()


@contextmanager
def mounted(directory: Path, size: str = "2m") -> Iterator[bool]:
    """A small tmpfs there, if we may."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    done = os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture(params=[SmallDisk, LimitedFiles, LockedFile])
def disk(workspace: Workspace, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """The workspace's state file is where nothing can be written for a while."""
    directory = workspace.directory / "disk"
    if request.param is not SmallDisk:
        directory.mkdir()
        yield request.param(workspace, directory)
        return
    with mounted(directory) as done:
        if not done:
            pytest.skip("only root can mount a tmpfs")
        yield SmallDisk(workspace, directory)
        workspace.close()  # before its disk goes


def phase(workspace: Workspace, name: str) -> str:
    """How far a job's run has come, as it is committed and another process sees it."""
    return str(workspace.run_row(name)["phase"])


# ---- a full disk ----


def start_four(workspace: Workspace) -> tuple[Daemon, list[Hold]]:
    """A daemon with a job before its intent, one before `sending`, one after its POST, a fourth."""
    workspace.add_job("intent", "batch_intent", status="in_progress")
    workspace.add_job("sending", "batch_sending")
    workspace.add_job("sent", "batch_sent")
    workspace.add_job("other", "batch_other", status="in_progress")
    search = workspace.sim.hold("queue.search", match="configId=sending&")
    post = workspace.sim.hold("queue.create", "after", match='"config":"sent"')
    daemon = workspace.daemon()
    for name in ("intent", "other"):
        daemon.wait_for_event("batch_status_changed", job=name)
    search.wait_reached()
    post.wait_reached()
    daemon.wait_for_event("trigger_intended", job="sending")  # all that it had to tell is told
    daemon.wait_for_event("trigger_sending", job="sent")
    return daemon, [search, post]


@pytest.mark.long
def test_full(workspace: Workspace, disk: Disk) -> None:
    """What cannot be committed is not done, or is kept; with room, all goes on by itself."""
    daemon, holds = start_four(workspace)
    disk.fill(daemon)
    mark = daemon.mark()
    for hold in holds:
        hold.release()
    workspace.sim.finish("batch_intent")
    for name in ("intent", "sending", "sent"):
        daemon.wait_for_event("state_write_failed", PATIENCE_S, since=mark, job=name)
    workspace.wait_for_looks("batch_other", disk.looks)
    told = [(event["event"], event.get("job")) for event in daemon.events[mark:]]
    assert len(told) == len(set(told)) <= 4, told  # the fourth: when batches were looked at
    assert phase(workspace, "intent") == "polling"
    assert phase(workspace, "sending") == "intent"
    assert phase(workspace, "sent") == "sending"
    assert workspace.searches("intent") == 0
    assert workspace.searches("sending") < 8  # each try begins with a search, each time later
    assert workspace.posts("intent") == workspace.posts("sending") == 0

    disk.free(daemon)
    for name in ("intent", "sending", "sent"):
        daemon.wait_for_event("trigger_sent", PATIENCE_S, job=name)
        workspace.assert_one_job(name)
        assert workspace.posts(name) == 1
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("disk", [SmallDisk], indirect=True)
def test_stopped_while_full(workspace: Workspace, disk: Disk) -> None:
    """SIGTERM gives a result that could not be committed the time until there is room."""
    daemon, holds = start_four(workspace)
    disk.fill(daemon)
    for hold in holds:
        hold.release()
    daemon.wait_for_event("state_write_failed", job="sent")
    daemon.send(signal.SIGTERM)
    disk.free(daemon)
    assert daemon.wait(PATIENCE_S) == 0
    assert daemon.events_of("trigger_sent", job="sent")
    workspace.assert_one_job("sent")


def test_full_at_start(workspace: Workspace) -> None:
    """On a disk without room there is no start, and one line says why."""
    directory = workspace.directory / "disk"
    with mounted(directory, "64k") as done:
        if not done:
            pytest.skip("only root can mount a tmpfs")
        SmallDisk(workspace, directory)
        workspace.add_job("job", "batch_a")
        done_once = workspace.once()
        assert done_once.code == 1
        assert len(done_once.stderr.splitlines()) == 1, done_once.stderr
        assert "database or disk is full; free the disk" in done_once.stderr
    assert workspace.requests == []


# ---- no place, and files that are none of ours ----


def assert_refused(workspace: Workspace, *words: str) -> None:
    """Both ways to run end with code 1 and the same single line."""
    workspace.write()
    seen = set()
    for arguments in ((), ("--once",)):
        done = workspace.run(*arguments)
        assert done.code == 1, done.stderr
        (line,) = done.stderr.splitlines()
        seen.add(line)
    (line,) = seen
    for word in words:
        assert word in line
    assert workspace.requests == []


@pytest.mark.long
def test_readonly_directory(workspace: Workspace) -> None:
    """Where nothing can be written, one line says so, with and without a state file there."""
    directory = workspace.directory / "disk"
    with mounted(directory) as done:
        if done:
            command = ["mount", "-o", "remount,ro", str(directory)]
            reason = "Read-only file system"
        else:
            command, reason = ["chmod", "555", str(directory)], "Permission denied"
        Disk(workspace, directory)
        workspace.add_job("job", "batch_a", status="in_progress", paused=True)
        workspace.once()
        names = {path.name for path in directory.iterdir()}
        assert "teckochecker.db" in names
        subprocess.run(command, check=True)
        if done:  # as its owner, one may still write to files in such a directory
            assert_refused(workspace, "cannot open", reason)
        subprocess.run(["mount", "-o", "remount,rw", str(directory)] * done or ["true"], check=True)
        for path in directory.iterdir():
            path.unlink()
        subprocess.run(command, check=True)
        assert_refused(workspace, "cannot open", reason)


def fill_state(workspace: Workspace) -> None:
    """A state file of some pages, closed in good order."""
    for number in range(30):
        workspace.add_job(f"job-{number}", *(f"batch_{number}_{n}" for n in range(10)), paused=True)
    assert workspace.once().code == 0
    assert not workspace.state.with_name("teckochecker.db-wal").exists()


def garbage_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    half = len(data) // 2 // 4096 * 4096
    data[half : half + 8192] = b"\xa5" * 8192
    path.write_bytes(data)


def change_version(path: Path, *pragmas: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")


VERSION = "user_version = 99"
BACKUP = "restore it from a backup"
SPOILS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "garbage": (garbage_in_the_middle, "is damaged:", BACKUP),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 8192 * 4096), "malformed", BACKUP),
    "cut in a page": (lambda p: os.truncate(p, 3 * 4096 + 100), "malformed", BACKUP),
    "cut in the head": (lambda p: os.truncate(p, 50), "", BACKUP),
    "text": (lambda p: p.write_text("text\n" * 5000), "file is not a database", "restore it"),
    "newer": (
        lambda p: change_version(p, VERSION, "wal_checkpoint(TRUNCATE)"),
        *("has schema 99; this program knows", "run the newer"),
    ),
    "newer without WAL": (
        lambda p: change_version(p, "journal_mode = DELETE", VERSION),
        *("has schema 99", "run the newer"),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", SPOILS)
def test_spoilt(workspace: Workspace, kind: str) -> None:
    """What is no whole state file of this version is refused, and not one byte of it changed."""
    fill_state(workspace)
    spoil, *words = SPOILS[kind]
    spoil(workspace.state)
    before = workspace.state.read_bytes()
    assert_refused(workspace, str(workspace.state), *words)
    assert workspace.state.read_bytes() == before


@pytest.mark.long
def test_damaged_after_a_crash(workspace: Workspace) -> None:
    """A damaged file is not touched either while there is a WAL beside it."""
    fill_state(workspace)
    workspace.add_job("runs", "batch_runs", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="runs")
    daemon.kill()
    workspace.sim.reset_stats()
    garbage_in_the_middle(workspace.state)
    wal = workspace.state.with_name("teckochecker.db-wal")
    before = workspace.state.read_bytes(), wal.read_bytes()
    assert_refused(workspace, "restore it from a backup")
    assert (workspace.state.read_bytes(), wal.exists() and wal.read_bytes()) == before


# ---- deleted, replaced, restored ----


def replace_by_copy(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    copy.replace(path)


def delete_all(path: Path) -> None:
    for file in path.parent.glob(path.name + "*"):
        file.unlink()


def delete_lock(path: Path) -> None:
    path.with_name(path.name + ".lock").unlink()


def move_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.mkdir()


DELETIONS: list[tuple[Callable[[Path], object], str]] = [
    (replace_by_copy, "intent"),
    (delete_all, "intent"),
    (delete_lock, "intent"),
    (Path.unlink, "sending"),
    (replace_by_copy, "sending"),
    (move_directory, "sending"),
]


@pytest.fixture
def spaces(tmp_path: Path, sim: Simulator) -> Iterator[list[Workspace]]:
    """One workspace for each of the deletions, each with one job."""
    found = []
    for number, (_, when) in enumerate(DELETIONS):
        space = Workspace(tmp_path / str(number), sim)
        (space.directory / "disk").mkdir()
        Disk(space, space.directory / "disk")
        space.add_job(f"{when}-{number}", f"batch_{number}", status="in_progress")
        found.append(space)
    try:
        yield found
    finally:
        for space in found:
            space.close()


@pytest.mark.long
def test_deleted_while_running(spaces: list[Workspace], sim: Simulator) -> None:
    """It posts nothing any more, says so and ends with code 1; the next start posts once."""
    daemons = [space.start() for space in spaces]  # all at once, to save time
    names = [name for space in spaces for name in space.jobs]
    for daemon in daemons:
        daemon.wait_for_event("batch_status_changed", PATIENCE_S)
    for number, (change, when) in enumerate(DELETIONS):
        search = sim.hold("queue.search", match=f"configId={names[number]}&")
        if when == "sending":
            sim.finish(f"batch_{number}")
            search.wait_reached(PATIENCE_S)
        change(spaces[number].state)
        sim.finish(f"batch_{number}")
        search.release()
    for space, daemon, name in zip(spaces, daemons, names, strict=True):
        assert daemon.wait(PATIENCE_S) == 1
        assert "was deleted or replaced; nothing more is sent; start again" in daemon.lines[-1]
        assert space.posts(name) == 0
    daemons = [space.start() for space in spaces]
    for space, daemon, name in zip(spaces, daemons, names, strict=True):
        daemon.wait_for_event("trigger_sent", PATIENCE_S)
        space.assert_one_job(name)
        daemon.kill()


@pytest.mark.long
def test_overwritten_while_running(workspace: Workspace) -> None:
    """An older copy written over the open file leads to no second job, now or after a restart."""
    workspace.add_job("job", "batch_a", status="in_progress")
    assert workspace.once().code == 0
    copy = workspace.directory / "copy"
    shutil.copyfile(workspace.state, copy)
    daemon = workspace.daemon()
    workspace.wait_for_looks("batch_a", 1)
    shutil.copyfile(copy, workspace.state)
    workspace.sim.finish("batch_a")
    daemon.wait_for_event("trigger_sent", job="job")
    daemon.kill()
    shutil.copyfile(copy, workspace.state)
    daemon = workspace.daemon()
    wait_until(lambda: phase(workspace, "job") == "finished", "finished")
    workspace.assert_one_job("job")
    assert workspace.posts("job") == 1
    assert daemon.stop() == 0


@pytest.mark.long
def test_wal_deleted_while_running(workspace: Workspace) -> None:
    """What was committed to a WAL that is gone is searched for at the next start."""
    workspace.add_job("job", "batch_a", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="job")
    for ending in ("-wal", "-shm"):
        workspace.state.with_name(workspace.state.name + ending).unlink()
    workspace.sim.finish("batch_a")
    daemon.wait_for_event("trigger_sent", job="job")
    daemon.kill()
    daemon = workspace.daemon()
    daemon.wait_for_event("trigger_found", job="job")
    workspace.assert_one_job("job")
    assert workspace.posts("job") == 1
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("disk", [LockedFile], indirect=True)
def test_locked_stands_still(workspace: Workspace, disk: Disk) -> None:
    """While the file is locked, other jobs are looked at as ever."""
    for number in range(8):
        workspace.add_job(f"job-{number}", f"batch_{number}", status="in_progress")
    workspace.add_job("other", "batch_other", status="in_progress")
    daemon = workspace.daemon()
    for name in workspace.jobs:
        daemon.wait_for_event("batch_status_changed", job=name)
    disk.fill(daemon)
    for number in range(8):
        workspace.sim.finish(f"batch_{number}")
    daemon.wait_for_event("state_write_failed", job="job-0")
    looks = workspace.looks("batch_other")
    try:
        wait_until(lambda: workspace.looks("batch_other") > looks + 2, "three looks", 20)
    finally:
        disk.free(daemon)


@pytest.mark.long
def test_long_reader(workspace: Workspace) -> None:
    """Somebody who reads all the time, and copies an old state, holds nothing up."""
    workspace.add_job("job", "batch_a", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="job")
    with closing(sqlite3.connect(workspace.state, isolation_level=None)) as db:
        db.execute("BEGIN")
        assert db.execute("SELECT phase FROM runs").fetchall() == [("polling",)]
        workspace.sim.finish("batch_a")
        daemon.wait_for_event("trigger_sent", job="job")
        assert db.execute("SELECT phase FROM runs").fetchall() == [("polling",)]
        workspace.assert_one_job("job")
        assert not daemon.events_of("state_write_failed")
        assert daemon.stop() == 0
    assert workspace.once().code == 0
    workspace.assert_one_job("job")
    assert workspace.posts("job") == 1
