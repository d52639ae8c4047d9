#!/usr/bin/env python3
"""The whole way on one screen: batches end at OpenAI, their Keboola jobs start, once each.

    .venv/bin/python tests/demo.py

OpenAI and Keboola are played by tests/simulator.py on this machine; the program is the real
teckochecker.py in a process of its own. Nothing leaves the machine, and nothing stays on it: all
files are in a temporary folder. Exits 0 if each finished job has exactly one Keboola job, else 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cryptography.fernet import Fernet
from simulator import Simulator

PROGRAM = Path(__file__).resolve().parent.parent / "teckochecker.py"
PATIENCE_S = 15.0  # for one step on a slow machine; the whole takes some ten seconds on any other
OPENAI_KEY = "sk-demo-0123456789abcdef"
KEBOOLA_TOKEN = "123-456-demo0123456789abcdef"

CONFIG = """\
limits: {{trigger_grace: 1s}}      # as short as this only with a Keboola on the same machine
secrets:
  openai-demo:
    type: openai
    value: {openai_key}
    base_url: {openai_url}
  keboola-demo:
    type: keboola
    value: {keboola_token}
    stack_url: {stack_url}
defaults:
  openai_secret: openai-demo
  keboola_secret: keboola-demo
  component_id: kds-team.app-custom-python
  poll_interval: 1s
jobs:
  translations:
    batch_ids: [batch_tr1, batch_tr2]
    config_id: "1001"
    variables: {{dataset: products}}
  ratings:
    batch_ids: [batch_ra1, batch_ra2, batch_ra3]
    config_id: "1002"
  summaries:
    batch_ids: [batch_su1]
    config_id: "1003"
"""
ADDED = """\
  reviews:
    batch_ids: [batch_re1]
    config_id: "1004"
"""
FINISHED = {
    "translations": "completed",
    "ratings": "completed_with_failures",
    "reviews": "completed",
}
OFTEN_SHOWN = {"batch_ids_completed", "batch_ids_failed"}


class DemoError(Exception):
    """The demo did not see what it promises."""


def tell(text: str = "") -> None:
    print(text, flush=True)


def add_batches(sim: Simulator) -> None:
    """Lay out what OpenAI's batches will do, in seconds from now."""
    sim.add_batch("batch_tr1", [(0, "in_progress"), (2.0, "completed")])
    sim.add_batch("batch_tr2", [(0, "in_progress"), (3.0, "completed")], failed=4)
    sim.add_batch("batch_ra1", [(0, "in_progress"), (2.0, "completed")])
    sim.add_batch("batch_ra2", [(0, "validating"), (3.0, "failed")])
    sim.add_batch("batch_ra3", [(0, "in_progress"), (4.5, "expired")])
    sim.add_batch("batch_su1", "in_progress")
    sim.add_batch("batch_re1", "completed")


def environment() -> dict[str, str]:
    """Return the environment without what would lead the program to another config or key."""
    foreign = ("TECKOCHECKER_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


def run(folder: Path, *arguments: str) -> str:
    """Run teckochecker.py to its end in the folder; returns what it printed."""
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if result.returncode != 0:
        command = " ".join(arguments)
        raise DemoError(f"`{command}` exited {result.returncode}:\n{result.stderr}")
    return result.stdout


class Daemon:
    """The daemon as a process; its log is read line by line, kept, and told in plain words."""

    def __init__(self, folder: Path, sim: Simulator) -> None:
        self._sim = sim
        self._started = time.monotonic()
        self._events: list[dict[str, Any]] = []
        self._other: list[str] = []
        self._has_shown_all = False
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            cwd=folder,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,))
        self._reader.start()

    def _read(self, log: TextIO) -> None:
        """Take the log, which is JSON lines because it goes to no terminal."""
        for line in log:
            with self._news:
                try:
                    event = json.loads(line)
                except ValueError:
                    self._other.append(line)
                else:
                    self._tell(event)
                    self._events.append(event)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _tell(self, event: dict[str, Any]) -> None:
        prefix = f"   {time.monotonic() - self._started:5.1f} s  {event.get('job', ''):<13}"
        for text in self._words(event):
            tell(prefix + text)
            prefix = " " * len(prefix)

    def _words(self, event: dict[str, Any]) -> Iterator[str]:
        """Say an event of the log in words; what tells a newcomer nothing is left out."""
        match event["event"]:
            case "batch_status_changed":
                yield f"{event['batch_id']} is {event['status']}"
            case "config_loaded":
                yield f"config.yaml read: {event['jobs']} jobs"
            case "config_rejected":
                yield from ("config.yaml is refused:", *event["problems"])
            case "trigger_sent" | "trigger_found":
                yield f">>> Keboola job {event['keboola_job_id']} started; its variables:"
                yield from self._variables(event["keboola_job_id"])

    def _variables(self, job_id: str) -> Iterator[str]:
        """Show the variables as Keboola got them: the first time all, then what differs most."""
        (job,) = (job for job in self._sim.jobs if job["id"] == job_id)
        for pair in job["variableValuesData"]["values"]:
            if pair["name"] in OFTEN_SHOWN or not self._has_shown_all:
                value = pair["value"] if len(pair["value"]) < 50 else pair["value"][:46] + "..."
                yield f"    {pair['name']:<24} {value}"
        self._has_shown_all = True

    def wait_for(self, name: str, job: str = "", after: int = 0) -> None:
        """Wait until the log has told an event; `after` passes over what was told before."""

        def told() -> bool:
            return any(
                event["event"] == name and event.get("job", "") == job
                for event in self._events[after:]
            )

        deadline = time.monotonic() + PATIENCE_S
        with self._news:
            while not told():
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._reader.is_alive() or self._process.poll() is not None:
                    what = f"the daemon did not report {name} {job}"
                    raise DemoError(f"{what}\n{''.join(self._other)}")
                self._news.wait(min(left_s, 1.0))

    @property
    def told(self) -> int:
        """How many events the log has told so far."""
        return len(self._events)

    def stop(self) -> int:
        """End the daemon in the orderly way; returns its exit code."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()


@contextmanager
def running(folder: Path, sim: Simulator) -> Iterator[Daemon]:
    """Give a daemon that is gone afterwards, whatever happens."""
    daemon = Daemon(folder, sim)
    try:
        yield daemon
    finally:
        daemon.kill()


# --- what is shown, in this order -----------------------------------------------------------------


def show_encrypting(folder: Path, sim: Simulator) -> Path:
    """Write key and config with plain tokens, and let the program encrypt them."""
    config = folder / "config.yaml"
    text = CONFIG.format(
        openai_key=OPENAI_KEY,
        openai_url=sim.openai_url,
        keboola_token=KEBOOLA_TOKEN,
        stack_url=sim.stack_url,
    )
    config.write_text(text, encoding="utf-8")
    key = folder / "teckochecker.key"
    key.touch(mode=0o600)
    key.write_bytes(Fernet.generate_key())
    tell("1. A config.yaml with two tokens in plain text; then, after `teckochecker.py encrypt`:")
    tell(f"      {line_with(config, 'value:')}")
    run(folder, "encrypt")
    tell(f"   -> {line_with(config, 'value:')[:60]}...")
    if any(token in config.read_text(encoding="utf-8") for token in (OPENAI_KEY, KEBOOLA_TOKEN)):
        raise DemoError("a token is still readable in config.yaml")
    return config


def line_with(path: Path, text: str) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if text in line)


def show_batches(daemon: Daemon) -> None:
    """Let the first job's batches end."""
    daemon.wait_for("trigger_sent", "translations")


def show_added_job(daemon: Daemon, config: Path) -> None:
    """Add a job to the file while the daemon runs."""
    tell("\n3. While it runs, a job `reviews` is added to config.yaml; its batch has ended before:")
    save(config, config.read_text(encoding="utf-8") + ADDED)
    daemon.wait_for("trigger_sent", "reviews")
    daemon.wait_for("trigger_sent", "ratings")


def show_broken_edit(daemon: Daemon, config: Path, sim: Simulator) -> None:
    """Break the file, see that the work goes on, and mend it."""
    tell("\n4. Someone breaks config.yaml. The daemon says where, and goes on with the one before:")
    good = config.read_text(encoding="utf-8")
    save(config, good.replace("poll_interval: 1s", "poll_interval: soon"))
    daemon.wait_for("config_rejected")
    looks = sim.request_counts["openai.get"]
    sim.wait_for(lambda: sim.request_counts["openai.get"] > looks, PATIENCE_S)
    tell("            `summaries` was looked at meanwhile, as before. Now the file is mended:")
    told = daemon.told
    save(config, good)
    daemon.wait_for("config_loaded", after=told)


def save(config: Path, text: str) -> None:
    """Save as editors do: a new file, moved over the old one."""
    new = config.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(config)


def show_status(folder: Path) -> None:
    """Print `status`, and compare it with what must have happened."""
    tell("\n5. `teckochecker.py status` (BATCHES is ended/all):\n")
    tell("   " + run(folder, "status").rstrip().replace("\n", "\n   "))
    jobs = json.loads(run(folder, "status", "--json"))["jobs"]
    statuses = {job["name"]: job["status"] for job in jobs}
    if statuses != FINISHED | {"summaries": "active"}:
        raise DemoError(f"the statuses are {statuses}")


def show_lost_state(folder: Path, sim: Simulator) -> None:
    """Forget everything, and see that nothing starts twice."""
    for path in folder.glob("teckochecker.db*"):
        path.unlink()
    before = len(sim.jobs)
    run(folder, "--once")
    tell(
        "   Its state file is deleted, and `--once` makes one pass: it searches Keboola, finds its"
    )
    tell(f"   own jobs there, and starts {len(sim.jobs) - before} new ones.")


def check_once(sim: Simulator) -> None:
    """Raise DemoError unless each finished job has exactly one Keboola job."""
    starts: Counter[str] = Counter()
    for job in sim.jobs:
        values = {pair["name"]: pair["value"] for pair in job["variableValuesData"]["values"]}
        starts[values["teckochecker_job"]] += 1
    if starts != Counter(FINISHED.keys()):
        raise DemoError(f"expected one Keboola job for each of {[*FINISHED]}, got {dict(starts)}")


def show(folder: Path, sim: Simulator) -> None:
    tell("OpenAI and Keboola are simulated on this machine; teckochecker.py is the real one.\n")
    config = show_encrypting(folder, sim)
    tell("\n2. The daemon starts. It looks at each job's batches at OpenAI until all have ended,")
    tell("   then starts that job's Keboola configuration. `translations` will succeed, `ratings`")
    tell("   will succeed in part, `summaries` takes longer than this demo:")
    add_batches(sim)
    with running(folder, sim) as daemon:
        show_batches(daemon)
        show_added_job(daemon, config)
        show_broken_edit(daemon, config, sim)
        show_status(folder)
        code = daemon.stop()
    tell(f"\n6. SIGTERM: the daemon exits with code {code}.")
    if code != 0:
        raise DemoError("it should have exited with 0")
    show_lost_state(folder, sim)
    check_once(sim)


def timed(action: Callable[[], None]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="teckochecker-demo-") as name, Simulator() as sim:
        sim.add_key(OPENAI_KEY)
        sim.add_token(KEBOOLA_TOKEN)
        sim.job_seconds = 1.0
        try:
            took_s = timed(lambda: show(Path(name), sim))
        except (DemoError, TimeoutError, subprocess.TimeoutExpired) as error:
            print(f"\nThe demo FAILED: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    tell(f"\nChecked: {len(FINISHED)} jobs finished, exactly one Keboola job each. {took_s:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
