"""What the tests of the running process share: a workspace, the program as a process.

    def test_it(workspace: Workspace) -> None:
        workspace.add_job("nightly", "batch_a")     # and its batch at the simulator
        daemon = workspace.daemon()                 # the real teckochecker.py
        workspace.sim.finish("batch_a")
        daemon.wait_for_event("trigger_sent", job="nightly")

Nothing here sleeps for a fixed time: all that waits, waits for a condition, with a time-out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import signal
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

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


def outcome_of(command: Sequence[object], **options: Any) -> Outcome:  # noqa: ANN401
    """Runs a command to its end, whatever that is."""
    wanted: JsonObject = {"env": clean_environment(), "timeout": 90, "text": True} | options
    done = subprocess.run([*map(str, command)], capture_output=True, check=False, **wanted)
    return Outcome(done.returncode, done.stdout, done.stderr)


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


class Webhook:
    """A server in a thread of its own; `take` says which status a POST gets, None: no answer."""

    def __init__(self) -> None:
        take = self.take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                is_json = self.headers["Content-Type"] == "application/json"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if (status := take(body) if is_json else 415) is not None:
                    self.send_response(status)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes) -> int | None:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


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
        defaults = {"openai_secret": "openai", "keboola_secret": "keboola"}
        self.config: JsonObject = {
            "log": {"level": "info", "format": "json"},
            "limits": {"trigger_grace": "1s", "follow_interval": "1s"},
            "secrets": self.secrets,
            "defaults": {**defaults, "component_id": COMPONENT, "poll_interval": "1s"},
            "jobs": self.jobs,
        }
        self._processes: list[Daemon] = []

    # ---- the config ----

    def encrypt(self, value: str) -> str:
        return Fernet(self.key).encrypt(value.encode()).decode()

    def openai_secret(self, key: str) -> JsonObject:
        return {"type": "openai", "value": self.encrypt(key), "base_url": self.sim.openai_url}

    def keboola_secret(self, token: str) -> JsonObject:
        return {"type": "keboola", "value": self.encrypt(token), "stack_url": self.sim.stack_url}

    def add_job(self, name: str, *batch_ids: str, status: str = "completed", **keys: object) -> str:
        """Adds a job, whose Keboola configuration bears its name, and the batches that are new."""
        known = self.sim.batch_statuses()
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
        command, env = self.command(*arguments), clean_environment(**env)
        return outcome_of(command, cwd=self.directory, env=env)

    def on_terminal(self, *arguments: str, **env: str) -> str:
        """All that a command shows, to its good end, on a terminal of 80 columns with colours."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        plain = {"TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "", "LINES": ""}
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=self.directory,
            env=clean_environment(**plain | env),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # where nobody has it open any more
            while chunk := os.read(ours, 65_536):
                shown += chunk
        os.close(ours)
        assert process.wait(PATIENCE_S) == 0
        return shown.decode(errors="replace").replace("\r", "")

    def once(self) -> Outcome:
        """Writes the config and makes one pass."""
        self.write()
        return self.run("--once")

    def status(self) -> JsonObject:
        """What `status --json` prints; in this process, for it is asked for all the time."""
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
        deadline = time.monotonic() + timeout
        while not condition(job := self.job(name)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} not as wanted within {timeout:g} s: {job}")
            time.sleep(0.01)
        return job

    def lose_state(self) -> None:
        """Deletes the state file, while nothing runs, and all beside it."""
        for file in self.directory.glob("teckochecker.db*"):
            file.unlink()

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
    """Adds somebody else's jobs of one configuration, from so many seconds ago on; their ids."""
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
