"""The daemon as a process: signals, its lock, its sockets, the service manager, its secrets."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import KEBOOLA_TOKEN, OPENAI_KEY, PATIENCE_S, Workspace

SOCKET_TABLES = ("tcp", "tcp6", "udp", "udp6")
LISTENING = "0A"

# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_end(workspace: Workspace, number: signal.Signals) -> None:
    """Asked to end while nothing is in flight, the daemon does so at once, with exit code 0."""
    workspace.add_job("job", "batch_a", status="in_progress", poll_interval="24h")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="job")
    daemon.send(number)
    assert daemon.wait(5.0) == 0
    assert not workspace.state.with_name("teckochecker.db-wal").exists()


@pytest.mark.long
def test_end_while_waiting(workspace: Workspace) -> None:
    """Looks, searches and waits for a retry do not hold up the end either."""
    workspace.add_job("looking", "batch_a")
    workspace.add_job("searching", "batch_b")
    workspace.add_job("retrying", "batch_c")
    workspace.sim.fault("openai.get", "hang_before", match="batch_a")
    workspace.sim.fault("openai.get", "status", None, match="batch_c", code=500)
    hold = workspace.sim.hold("queue.search")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    workspace.sim.wait_for(lambda: workspace.looks("batch_c") >= 2, PATIENCE_S)
    daemon.send(signal.SIGTERM)
    assert daemon.wait(5.0) == 0
    assert workspace.sim.jobs == []


def test_end_with_a_post_in_flight(workspace: Workspace) -> None:
    """SIGTERM lets a POST that is under way be recorded, and nothing new begins meanwhile."""
    workspace.add_job("job", "batch_a")
    workspace.add_job("later", "batch_b", status="in_progress")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    workspace.sim.finish("batch_b")
    daemon.send(signal.SIGTERM)
    workspace.sim.finish_job(workspace.sim.jobs[0]["id"])
    assert daemon.is_running()
    hold.release()
    assert daemon.wait() == 0
    assert daemon.events_of("trigger_sent", job="job")
    workspace.assert_one_job("job")


@pytest.mark.long
def test_second_signal(workspace: Workspace) -> None:
    """A second signal ends it now; the next start knows that the POST's outcome is open."""
    workspace.add_job("job", "batch_a")
    hold = workspace.sim.hold("queue.create", "after")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    daemon.send(signal.SIGTERM)
    daemon.send(signal.SIGINT)
    assert daemon.wait(3.0) == 130
    assert workspace.job("job")["trigger"]["state"] in {"sending", "unknown"}
    hold.release()
    assert workspace.once().code == 0
    assert workspace.posts("job") == 1
    workspace.assert_one_job("job")


def test_once_interrupted(workspace: Workspace) -> None:
    """`--once` that is interrupted says so with exit code 130."""
    workspace.sim.fault("openai.get", "hang_before", None)
    workspace.add_job("job", "batch_a")
    once = workspace.start("--once")
    workspace.sim.wait_for(lambda: workspace.looks("batch_a"), PATIENCE_S)
    once.send(signal.SIGINT)
    assert once.wait(5.0) == 130


# ---- one at a time ----


@pytest.mark.long
def test_only_one_acts(workspace: Workspace) -> None:
    """Beside a daemon, `--once` and another daemon exit 75 and name who holds the state file."""
    workspace.add_job("job", "batch_a", status="in_progress")
    daemon = workspace.daemon()
    requests = workspace.sim.request_counts
    for arguments in (["--once"], []):
        done = workspace.run(*arguments)
        assert done.code == 75
        assert f"teckochecker.db.lock: pid {daemon.pid} (daemon)" in done.stderr
    assert set(workspace.sim.request_counts) == set(requests) | {"openai.get"}
    daemon.kill()
    assert workspace.once().code == 0  # the kernel lets the lock of a dead process go


def test_once_holds_the_lock_too(workspace: Workspace) -> None:
    """A daemon that is started during a `--once` exits 75."""
    hold = workspace.sim.hold("openai.get")
    workspace.add_job("job", "batch_a")
    once = workspace.start("--once")
    hold.wait_reached(PATIENCE_S)
    done = workspace.run()
    assert done.code == 75
    assert f"pid {once.pid} (--once)" in done.stderr
    hold.release()
    assert once.wait() == 0


# ---- sockets ----


def sockets_of(pid: int) -> set[str]:
    """The inodes of the sockets that a process has open."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(entry.readlink().name)
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def table_of(pid: int, name: str) -> list[tuple[str, str, str]]:
    """A table of the kernel's: local address, state and inode of each socket."""
    path = Path(f"/proc/{pid}/net/{name}")
    text = path.read_text() if path.exists() else ""  # there may be no IPv6 here
    rows = [line.split() for line in text.splitlines()[1:]]
    return [(row[1], row[3], row[9]) for row in rows]


def test_no_port_is_open(workspace: Workspace) -> None:
    """The process has connections to its servers, and no socket on which it listens."""
    workspace.add_job("looking", "batch_a")
    workspace.add_job("starting", "batch_b")
    workspace.sim.fault("openai.get", "hang_before", match="batch_a")
    hold = workspace.sim.hold("queue.create")
    daemon = workspace.daemon()
    hold.wait_reached(PATIENCE_S)
    own = sockets_of(daemon.pid)
    tables = {name: table_of(daemon.pid, name) for name in SOCKET_TABLES}
    tcp = [row for name in ("tcp", "tcp6") for row in tables[name] if row[2] in own]
    udp = [row for name in ("udp", "udp6") for row in tables[name] if row[2] in own]
    assert len(tcp) >= 2  # else the test looks at the wrong process
    assert [row for row in tcp if row[1] == LISTENING] == []
    assert udp == []
    assert any(state == LISTENING for _, state, _ in tables["tcp"])  # the simulator's are seen


# ---- the service manager ----


class ServiceManager(socket.socket):
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bind("\0" + address[1:] if address.startswith("@") else address)
        self.settimeout(PATIENCE_S)
        self.received: list[list[str]] = []

    def wait_for(self, line: str) -> list[str]:
        """The lines of the next datagram that has a line which begins so."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            datagram = self.recv(65_536).decode().split("\n")
            self.received.append(datagram)
            if any(found.startswith(line) for found in datagram):
                return datagram
        raise TimeoutError(f"no {line} in {self.received}")


def assert_reload_told(manager: ServiceManager) -> None:
    """One datagram begins the reload, with the monotonic time of its beginning, another ends it."""
    reloading = manager.wait_for("RELOADING=1")
    (stamp,) = [line for line in reloading if line.startswith("MONOTONIC_USEC=")]
    age_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) / 1000 - int(stamp.partition("=")[2])
    assert 0 <= age_us < 5_000_000
    manager.wait_for("READY=1")


def test_a_failure_at_the_end(workspace: Workspace) -> None:
    """A Keboola job that fails while SIGTERM waits for a POST is started again after it."""
    sim, sim.job_seconds = workspace.sim, None
    workspace.add_job("failing", "batch_a", retry_on_error=1)
    workspace.add_job("other", "batch_b")
    follow, post = sim.hold("queue.get"), sim.hold("queue.create", match='"config":"other"')
    address = f"@teckochecker-test-{os.getpid()}-{workspace.directory.parent.name}"
    with ServiceManager(address) as manager:
        daemon = workspace.daemon(NOTIFY_SOCKET=address)
        follow.wait_reached(PATIENCE_S)
        post.wait_reached(PATIENCE_S)
        sim.finish_job(sim.jobs[0]["id"], "error")
        daemon.send(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
    follow.release()
    post.release()
    assert daemon.wait() == 0
    assert workspace.once().code == 0
    workspace.change_state("UPDATE runs SET next_at = next_at - 300")
    assert workspace.once().code == 0
    assert len(workspace.started("failing")) == 2


@pytest.mark.long
def test_notify(workspace: Workspace) -> None:
    """READY, STATUS, every reload with its end (good, bad, forced), WATCHDOG and STOPPING."""
    workspace.add_job("job", "batch_a")
    workspace.add_job("other", "batch_b", status="in_progress")
    with (
        tempfile.TemporaryDirectory(prefix="tecko-") as directory,
        ServiceManager(address := f"{directory}/notify") as manager,
    ):
        daemon = workspace.daemon(NOTIFY_SOCKET=address, WATCHDOG_USEC="600000")
        manager.wait_for("READY=1")
        daemon.wait_for_event("trigger_sent", job="job")
        assert "STATUS=1 active, 1 completed" in manager.wait_for("STATUS=1 active, 1 completed")
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
        workspace.path.write_text("jobs: [\n")
        daemon.send(signal.SIGHUP)
        assert_reload_told(manager)
        daemon.wait_for_event("config_rejected")
        workspace.write()
        daemon.send(signal.SIGHUP)
        assert_reload_told(manager)
        daemon.send(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert daemon.wait() == 0
    assert all("MONOTONIC_USEC" in str(d) for d in manager.received if "RELOADING=1" in d)


def test_notify_abstract(workspace: Workspace) -> None:
    """An abstract address works too."""
    address = f"@teckochecker-test-{os.getpid()}-{workspace.directory.parent.name}"
    with ServiceManager(address) as manager:
        daemon = workspace.daemon(NOTIFY_SOCKET=address)
        manager.wait_for("READY=1")
        manager.wait_for("STATUS=")
        assert daemon.stop() == 0
        manager.wait_for("STOPPING=1")


# ---- secrets ----

PLAIN_IN_CONFIG = "sk-pasted-in-plain-0123456789"


def fail_in_every_way(workspace: Workspace) -> None:
    """Faults whose answers echo the secrets, for jobs of their own."""
    sim = workspace.sim
    echo = f"you sent {OPENAI_KEY} and {KEBOOLA_TOKEN}"
    errors = json.dumps({"error": {"message": echo}})
    keboola = json.dumps({"error": echo, "exceptionId": f"exception-{KEBOOLA_TOKEN}"})
    batch = {"id": "batch_echo", "status": f"odd-{OPENAI_KEY}"}
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "look_401": ("status", {"code": 401, "body": errors}),
        "look_500": ("status", {"code": 500, "body": errors}),
        "look_html": ("body", {"body": f"<p>{echo}</p>", "content_type": f"text/{OPENAI_KEY}"}),
        "look_header": ("header", {"headers": {"x-request-id": OPENAI_KEY}}),
        "look_reset": ("reset_before", {}),
        "look_location": ("redirect", {"location": f"http://x/{OPENAI_KEY}"}),
        "echo": ("json", {"obj": batch}),
    }
    for name, (kind, options) in looks.items():
        workspace.add_job(name, f"batch_{name}")
        sim.fault("openai.get", kind, None, match=f"/batch_{name}\n", **options)
    posts: dict[str, tuple[str, dict[str, Any]]] = {
        "post_400": ("status", {"code": 400, "body": keboola}),
        "post_500": ("status", {"code": 500, "body": keboola}),
        "post_reset": ("reset_before", {}),
        "post_html": ("body", {"body": echo}),
        "post_echo": ("json", {"obj": {"id": KEBOOLA_TOKEN, "status": KEBOOLA_TOKEN}}),
    }
    for name, (kind, options) in posts.items():
        workspace.add_job(name, f"batch_{name}")
        sim.fault("queue.create", kind, 1, match=f'"config":"{name}"', **options)
    workspace.add_job("search", "batch_search")
    sim.fault("queue.search", "status", None, match="configId=search&", code=403, body=keboola)


def assert_no_secret(text: str | bytes, where: str, *more: str) -> None:
    data = text.encode() if isinstance(text, str) else text
    for secret in (OPENAI_KEY, KEBOOLA_TOKEN, PLAIN_IN_CONFIG, *more):
        assert secret.encode() not in data, f"{where} shows {secret}"


@pytest.mark.long
def test_no_secret_anywhere(workspace: Workspace) -> None:
    """No key or token is in the log at debug level, the state file, the arguments or any output."""
    workspace.config["log"] = {"level": "debug", "format": "json"}
    fail_in_every_way(workspace)
    daemon = workspace.daemon()
    workspace.sim.wait_for(lambda: workspace.looks("batch_look_500") >= 4, PATIENCE_S)
    workspace.sim.wait_for(lambda: workspace.searches("post_500") >= 3, PATIENCE_S)
    workspace.sim.wait_for(lambda: workspace.looks("batch_look_location") >= 2, PATIENCE_S)
    assert_no_secret(Path(f"/proc/{daemon.pid}/cmdline").read_bytes(), "ps", workspace.key)

    good = workspace.secrets["openai"]["value"]
    workspace.secrets["openai"]["value"] = PLAIN_IN_CONFIG
    workspace.secrets["openai"][PLAIN_IN_CONFIG] = KEBOOLA_TOKEN
    workspace.write()
    daemon.wait_for_event("config_rejected")
    outputs = [workspace.run(*c.split()) for c in ("check", "status", "--once", "retry post_400")]
    del workspace.secrets["openai"][PLAIN_IN_CONFIG]
    workspace.secrets["openai"]["value"] = good
    workspace.write_file(workspace.key_file, f"not-{workspace.key}\n")
    workspace.write()
    outputs += [workspace.run("check"), workspace.run("encrypt")]
    assert [done.code for done in outputs] == [2, 0, 2, 0, 2, 2]
    workspace.write_file(workspace.key_file, workspace.key)
    outputs += [workspace.run("status", "--json"), workspace.run("status", "post_400")]

    for file in workspace.directory.glob("teckochecker.db*"):
        assert_no_secret(file.read_bytes(), file.name, workspace.key)
    for done in outputs:
        assert_no_secret(done.stdout + done.stderr, "an output", workspace.key)
    assert daemon.stop() == 0
    assert "***" in daemon.log()  # the servers have echoed them
    assert_no_secret(daemon.log(), "the log", workspace.key)
    assert_no_secret(workspace.state.read_bytes(), "the state file", workspace.key)
