"""What the tests of the running process share: a workspace, the program as a process, a door.

    def test_it(workspace: Workspace) -> None:
        workspace.add_job("nightly", "batch_a")     # and its batch at the simulator
        daemon = workspace.daemon()                 # the real teckochecker.py
        workspace.sim.finish("batch_a")
        daemon.wait_for_event("trigger_sent", job="nightly")

Nothing here sleeps for a fixed time: all that waits, waits for a condition, with a time-out.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import io
import json
import os
import pty
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import yaml
from cryptography.fernet import Fernet
from simulator import Simulator, iso

import teckochecker

JsonObject = dict[str, Any]

_ONE_AT_A_TIME = threading.Lock()

HERE = Path(__file__).resolve().parent
# Another program may be put to the same tests, such as that of an older commit.
PROGRAM = Path(os.environ.get("TECKOCHECKER_PROGRAM") or HERE.parent / "teckochecker.py")
OPENAI_KEY = "sk-test-6f0c2d9e4b7a1853"
KEBOOLA_TOKEN = "1234-567890-kbc5e2a9d7f31c"
COMPONENT = "kds-team.app-custom-python"
PATIENCE_S = 20.0  # for one step on a slow and busy machine; nearly all take under three
FOREIGN = ("TECKOCHECKER_", "NOTIFY_SOCKET", "WATCHDOG_", "CREDENTIALS_DIRECTORY")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def trigger_id(name: str, batch_ids: Sequence[str], rerun: int = 0) -> str:
    """The trigger id as the design defines it, put together without the program."""
    identity = json.dumps([1, name, sorted(batch_ids), rerun], separators=(",", ":"))
    return hashlib.sha256(identity.encode()).hexdigest()


def variables(job: JsonObject) -> dict[str, str]:
    """The variables of a Keboola job."""
    return {pair["name"]: pair["value"] for pair in job["variableValuesData"]["values"]}


def wait_until(
    condition: Callable[[], Any], what: str, timeout: float = PATIENCE_S, every: float = 0.01
) -> Any:  # noqa: ANN401
    """Asks again and again, for what cannot wake us; returns the condition's value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(every)
    return value


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what would lead the program elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and name.lower() not in PROXIES
    }
    return kept | more


@dataclass(frozen=True, slots=True)
class Outcome:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[JsonObject]:
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]


class Daemon:
    """The program as a running process; a thread collects the JSON lines of its log."""

    def __init__(self, command: Sequence[str], cwd: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.pid = self._process.pid
        self.lines: list[str] = []
        self.events: list[JsonObject] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="log reader")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                with suppress(ValueError):
                    self.events.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def events_of(self, event: str, *, since: int = 0, **fields: object) -> list[JsonObject]:
        """All events of a name, from a `mark()` on, that have these fields."""
        return [
            found
            for found in self.events[since:]
            if found.get("event") == event and fields.items() <= found.items()
        ]

    def mark(self) -> int:
        """The place in the log up to which `since` looks at nothing."""
        return len(self.events)

    def wait_for_event(
        self, event: str, timeout: float = PATIENCE_S, *, since: int = 0, **fields: object
    ) -> JsonObject:
        """The first such event, as soon as it is there; fails at once if the process ends."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not (found := self.events_of(event, since=since, **fields)):
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._ended:
                    why = "before the process ended" if self._ended else f"within {timeout:g} s"
                    log = "\n".join(line[:400] for line in self.lines[-30:])
                    raise TimeoutError(f"no {event} {fields} {why}; its log:\n{log}")
                self._news.wait(left_s)
        return found[0]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit code, once the process has ended and its log is read."""
        code = self._process.wait(timeout)
        self._reader.join()
        assert self._process.stderr
        self._process.stderr.close()
        return code

    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        """Ends it as systemd does; the exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Ends it as a power cut does."""
        self._process.kill()
        self.wait()

    def log(self) -> str:
        return "\n".join(self.lines)


class Terminal:
    """A command on a terminal of its own; `text` is all that it has shown there so far."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        env: dict[str, str],
        size: tuple[int, int] = (24, 80),
    ) -> None:
        """Start it; `size` is lines and columns."""
        self.text = ""
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, size)
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - see Ctrl-C
        )
        self._theirs = theirs  # open, so that what was shown can be read after the command's end

    def _read(self, timeout_s: float) -> bool:
        """Take what is shown by now; returns whether there was anything."""
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return False
        self.text += os.read(self._ours, 65_536).decode(errors="replace")
        return True

    def wait_for(self, text: str, times: int = 1, timeout: float = PATIENCE_S) -> None:
        """Waits until something was shown, so many times."""
        deadline = time.monotonic() + timeout
        while self.text.count(text) < times:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} within {timeout:g} s, but: {self.text!r}")
            self._read(0.05)

    def type(self, text: str) -> None:
        """Types on its keyboard; character 3 is Ctrl-C."""
        os.write(self._ours, text.encode())

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._theirs)[3] & termios.ECHO)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit code, once the command has ended and all that it showed is in `text`."""
        deadline = time.monotonic() + timeout
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise TimeoutError(f"still runs after {timeout:g} s: {self.text!r}")
            self._read(0.05)
        while self._read(0):
            pass
        os.close(self._ours)
        os.close(self._theirs)
        return self._process.returncode


class Workspace:
    """A directory with a config, its key and its state file, pointed at a simulator."""

    def __init__(self, directory: Path, sim: Simulator) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.sim = sim
        self.path = directory / "config.yaml"
        self.state = directory / "teckochecker.db"
        self.key_file = directory / "teckochecker.key"
        self.key = Fernet.generate_key().decode()
        self.write_file(self.key_file, self.key)
        self.jobs: JsonObject = {}
        self.secrets: JsonObject = {
            "openai": self.openai_secret(OPENAI_KEY),
            "keboola": self.keboola_secret(KEBOOLA_TOKEN),
        }
        self.config: JsonObject = {
            "log": {"level": "info", "format": "json"},
            "limits": {"trigger_grace": "1s", "follow_interval": "1s"},
            "secrets": self.secrets,
            "defaults": {
                "openai_secret": "openai",
                "keboola_secret": "keboola",
                "component_id": COMPONENT,
                "poll_interval": "1s",
            },
            "jobs": self.jobs,
        }
        self._processes: list[Daemon] = []

    # ---- the config ----

    def encrypt(self, value: str) -> str:
        return Fernet(self.key).encrypt(value.encode()).decode()

    def openai_secret(self, key: str) -> JsonObject:
        return {"type": "openai", "value": self.encrypt(key), "base_url": self.sim.openai_url}

    def keboola_secret(self, token: str) -> JsonObject:
        return {
            "type": "keboola",
            "value": self.encrypt(token),
            "stack_url": self.sim.stack_url,
        }

    def add_job(self, name: str, *batch_ids: str, status: str = "completed", **keys: object) -> str:
        """Adds a job to the config, and those of its batches that are new to the simulator.

        Its Keboola configuration bears the job's name, so that a fault's `match` can pick it.
        """
        known = self.sim.state()["batches"]
        for batch_id in batch_ids:
            if batch_id not in known:
                self.sim.add_batch(batch_id, status)
        self.jobs[name] = {"batch_ids": list(batch_ids), "config_id": name, **keys}
        return name

    def text(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, width=1000)

    def write(self, text: str | None = None) -> None:
        """Puts the config in place as a whole, as a careful editor does."""
        self.write_file(self.path, self.text() if text is None else text)

    @staticmethod
    def write_file(path: Path, text: str) -> None:
        new = path.with_name(f".{path.name}.new")
        new.write_text(text)
        new.chmod(0o600)
        new.replace(path)

    # ---- the program ----

    def command(self, *arguments: str) -> list[str]:
        warnings = ["-W", "error::ResourceWarning"]
        return [sys.executable, *warnings, str(PROGRAM), "--config", str(self.path), *arguments]

    def start(self, *arguments: str, **env: str) -> Daemon:
        """Starts the program and does not wait for anything."""
        if not self.path.is_symlink():
            self.write()
        process = Daemon(self.command(*arguments), self.directory, clean_environment(**env))
        self._processes.append(process)
        return process

    def daemon(self, **env: str) -> Daemon:
        """Starts the daemon; it has read its config when this returns."""
        process = self.start(**env)
        process.wait_for_event("config_loaded")
        return process

    def reload(self, daemon: Daemon) -> None:
        """Writes the config and waits until the daemon has taken it."""
        mark = daemon.mark()
        self.write()
        daemon.wait_for_event("config_loaded", since=mark)

    def run(self, *arguments: str, **env: str) -> Outcome:
        """Runs a command to its end."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=clean_environment(**env),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def terminal(self, *arguments: str, size: tuple[int, int] = (24, 80), **env: str) -> Terminal:
        """Runs a command on a terminal, which has colours unless the environment says otherwise."""
        plain = {"TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "", "LINES": ""}
        return Terminal(
            self.command(*arguments), self.directory, clean_environment(**plain | env), size
        )

    def once(self) -> Outcome:
        """Writes the config and makes one pass."""
        self.write()
        return self.run("--once")

    def status(self) -> JsonObject:
        """What `status --json` prints; in this process, for it is asked for all the time.

        `sys.stdout` stays as it is: between two tests pytest replaces it, whatever threads do.
        """
        to_us = partial(print, file=(out := io.StringIO()))
        with _ONE_AT_A_TIME, patch.object(teckochecker, "print", to_us, create=True):
            assert teckochecker.main(["--config", str(self.path), "status", "--json"]) == 0
        document: JsonObject = json.loads(out.getvalue())
        return document

    def job(self, name: str) -> JsonObject:
        """One job of `status --json`."""
        job: JsonObject = next(job for job in self.status()["jobs"] if job["name"] == name)
        return job

    def statuses(self) -> dict[str, str]:
        return {job["name"]: job["status"] for job in self.status()["jobs"]}

    def wait_for_job(
        self, name: str, condition: Callable[[JsonObject], object], timeout: float = PATIENCE_S
    ) -> JsonObject:
        """The job as `status --json` shows it, as soon as the condition holds."""
        seen: list[JsonObject] = []

        def holds() -> object:
            seen.append(self.job(name))
            return condition(seen[-1])

        try:
            wait_until(holds, f"{name} as wanted", timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; last seen: {seen[-1]}") from None
        return seen[-1]

    def change_state(self, statement: str) -> None:
        """Changes the state file while nothing runs, such as its recorded times."""
        with closing(sqlite3.connect(self.state)) as db, db:
            db.execute(statement)

    def runs(self) -> list[JsonObject]:
        """The runs, straight from the state file, which stays as it is; none yet is none."""
        with (
            suppress(sqlite3.OperationalError),
            closing(sqlite3.connect(f"{self.state.as_uri()}?mode=ro", uri=True)) as db,
        ):
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute("SELECT * FROM runs ORDER BY id")]
        return []

    def run_row(self, name: str) -> JsonObject:
        """The newest run of a job."""
        return [run for run in self.runs() if run["job"] == name][-1]

    # ---- what came of it ----

    def started(self, name: str) -> list[JsonObject]:
        """The Keboola jobs that a TeckoChecker job has started, oldest first."""
        return [job for job in self.sim.jobs if variables(job).get("teckochecker_job") == name]

    def posts(self, name: str) -> int:
        """How often a Keboola job was asked for, whatever came of it."""
        return sum(r.route == "queue.create" and r.json()["config"] == name for r in self.requests)

    def searches(self, name: str) -> int:
        """How often a job's configuration was searched."""
        wanted = [r for r in self.requests if r.route == "queue.search"]
        return sum(r.query.get("configId") == name for r in wanted)

    def looks(self, batch_id: str) -> int:
        """How often a batch was asked for."""
        return sum(r.path.endswith(f"/{batch_id}") for r in self.requests)

    def wait_for_looks(self, batch_id: str, more: int) -> None:
        """Waits until a batch was asked for so many times more."""
        wanted = self.looks(batch_id) + more
        self.sim.wait_for(lambda: self.looks(batch_id) >= wanted, PATIENCE_S)

    @property
    def requests(self) -> list[Any]:
        return list(self.sim.requests)

    def assert_one_job(self, name: str) -> None:
        """There is one Keboola job for this one, and the state file knows that it is that."""
        jobs = self.started(name)
        assert len(jobs) == 1, f"{name} has {len(jobs)} Keboola jobs"
        trigger = self.job(name)["trigger"]
        assert (trigger["state"], trigger["keboola_job_id"]) == ("sent", jobs[0]["id"])

    def close(self) -> None:
        """Ends what still runs; whatever the test was about, no process may have met a bug."""
        for process in self._processes:
            if process.is_running():
                process.kill()
        for process in self._processes:
            log = process.log()
            assert "Traceback" not in log, log
            assert "internal_error" not in log, log


def add_foreign_jobs(
    sim: Simulator,
    config_id: str,
    count: int,
    per_second: int = 100,
    *,
    ago_s: int = 0,
    **fields: object,
) -> list[str]:
    """Adds somebody else's jobs of one configuration; returns their ids.

    They count as created from so many seconds ago on: the real queue would take minutes for so
    many. `ago_s` is for a configuration without jobs yet. `fields` are in each job's document.
    """
    body: JsonObject = {"component": COMPONENT, "config": config_id, "mode": "run"}
    ids = []
    with sim.changing():
        for number in range(count):
            job = sim._queue._new_job(body)
            job.created_s += number // per_second - ago_s
            job.born -= ago_s
            job.update(createdTime=iso(job.created_s), **fields)
            sim._queue._line_up(job)
            ids.append(job.id)
    return ids


class Door:
    """A port in front of the queue that can be shut: then, connections are refused.

    With `shut_after`, it shuts itself when a request with this text has been passed on, before
    its answer is.
    """

    def __init__(self, behind: str, shut_after: str = "") -> None:
        self._behind = urlsplit(behind).netloc
        self._shut_after = shut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._serve(self._listener)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _serve(self, listener: socket.socket) -> None:
        thread = threading.Thread(target=self._accept, args=(listener,))
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    self._pass_on(connection)

    def _pass_on(self, connection: socket.socket) -> None:
        head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        while len(body) < int(headers.get("Content-Length", "0")):
            body += connection.recv(65_536)
        with closing(http.client.HTTPConnection(self._behind)) as inner:
            inner.request(method, target, body or None, headers | {"Connection": "close"})
            answer = inner.getresponse()
            data = answer.read()
        if self._shut_after and self._shut_after in first:
            self._shut_after = ""
            self._listener.close()
        head = f"HTTP/1.1 {answer.status} OK\r\ncontent-length: {len(data)}\r\n".encode()
        with suppress(OSError):
            connection.sendall(head + b"connection: close\r\n\r\n" + data)

    def open(self) -> None:
        """Opens it again, at the same port."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._serve(self._listener)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()
