#!/usr/bin/env python3
"""The whole way on one screen: batches finish at OpenAI, their Keboola jobs start, once each.

    .venv/bin/python tests/demo.py

OpenAI and Keboola are played by tests/simulator.py on this machine; the program is the real
teckochecker.py in a process of its own, and the lines that begin with a time are its log. Nothing
leaves the machine, and all files are in a temporary folder. Exits 0 if each piece of work has
exactly one Keboola job, else 1.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program, for the harness

import httpx
from harness import PROGRAM, clean_environment, outcome_of, variables
from simulator import Simulator

PATIENCE_S = 15.0  # for one step on a slow machine; the whole takes about fifteen seconds elsewhere
OPENAI_KEY = "sk-demo-0123456789abcdef"
KEBOOLA_TOKEN = "123-456-demo0123456789abcdef"
TODAY = f"{datetime.now(UTC):%Y-%m-%d}"

CONFIG = """\
log: {{format: console}}
limits: {{trigger_grace: 1s, follow_interval: 1s}}   # so short only with servers on this machine
secrets:
  openai-demo: {{type: openai, value: {openai_key}, base_url: "{openai_url}"}}
  keboola-demo: {{type: keboola, value: {keboola_token}, stack_url: "{stack_url}"}}
defaults: {{openai_secret: openai-demo, keboola_secret: keboola-demo, poll_interval: 1s,
    component_id: kds-team.app-custom-python}}
jobs:
  translations:
    batch_ids: [{batch_ids}]
    config_id: "1001"
  nightly:
    match: {{pipeline: nightly}}
    since: {today}
    group_by: run_date
    group_size: 2
    config_id: "1002"
"""
NEW_BATCH = {"endpoint": "/v1/responses", "completion_window": "24h"}
FINISHED = {
    "translations": "completed_with_failures",
    f"nightly/{TODAY}": "completed",
    "reviews": "completed",
}
SHOWN = ("batch_ids_completed", "batch_ids_failed", "batch_statuses", "teckochecker_trigger_id")


class DemoError(Exception):
    """The demo did not see what it promises."""


tell = partial(print, flush=True)


# --- OpenAI's and Keboola's side ------------------------------------------------------------------


def create_batch(sim: Simulator, *, is_broken: bool = False, **metadata: str) -> str:
    """Create a batch as OpenAI's own client does: upload its requests, then name their file."""
    request = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/responses", "body": {}})
    requests = "\n".join([*[request] * 100, *["no JSON"] * is_broken])
    headers = {"Authorization": f"Bearer {OPENAI_KEY}"}
    with httpx.Client(base_url=sim.openai_url, headers=headers, trust_env=False) as client:
        files = {"file": ("requests.jsonl", requests.encode())}
        file = client.post("/files", data={"purpose": "batch"}, files=files).raise_for_status()
        batch = {"input_file_id": file.json()["id"], "metadata": metadata, **NEW_BATCH}
        answer = client.post("/batches", json=batch).raise_for_status()
    batch_id: str = answer.json()["id"]
    return batch_id


def started(sim: Simulator) -> Counter[str]:
    """How many Keboola jobs each run has."""
    counts: Counter[str] = Counter()
    for told in map(variables, sim.jobs):
        group = told.get("teckochecker_group")
        counts[told["teckochecker_job"] + (f"/{group}" if group else "")] += 1
    return counts


def wait_for(sim: Simulator, run: str) -> None:
    """Wait until the Keboola job of a run is finished, as the newest one."""
    sim.wait_for(lambda: started(sim)[run] and sim.jobs[-1]["isFinished"], PATIENCE_S)


# --- the program ----------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> str:
    """Run a command of teckochecker.py in the folder; returns what it printed."""
    done = outcome_of([sys.executable, PROGRAM, *arguments], cwd=folder)
    if done.code != 0:
        raise DemoError(f"`{' '.join(arguments)}` exited {done.code}:\n{done.stderr}")
    return done.stdout


@contextmanager
def daemon(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon, which shows its log beside our lines; it is gone afterwards."""
    command = [sys.executable, str(PROGRAM)]
    env = clean_environment()
    with subprocess.Popen(command, cwd=folder, env=env, stderr=sys.stdout) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


# --- what is shown, in this order -----------------------------------------------------------------


def show_config(folder: Path, sim: Simulator) -> None:
    batch_ids = [create_batch(sim), create_batch(sim, is_broken=True)]
    keys = {"openai_key": OPENAI_KEY, "keboola_token": KEBOOLA_TOKEN, "today": TODAY}
    urls = {"openai_url": sim.openai_url, "stack_url": sim.stack_url}
    config = CONFIG.format(batch_ids=", ".join(batch_ids), **keys, **urls)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    run(folder, "init")
    run(folder, "encrypt")
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    if OPENAI_KEY in text or KEBOOLA_TOKEN in text:
        raise DemoError("a token is still readable in config.yaml")
    tell("1. `teckochecker init` has made a key, `encrypt` has replaced the tokens. The jobs:\n")
    tell(text[text.index("jobs:") :])


def show_batch_ids(sim: Simulator) -> None:
    wait_for(sim, "translations")
    (job,) = sim.jobs
    tell("   Keboola was told, among other things:")
    for name, value in variables(job).items():
        if name in SHOWN:
            tell(f"      {name:<24} {value}")


def show_match(sim: Simulator) -> None:
    tell('\n3. Two batches with the metadata {"pipeline": "nightly"} are created while it runs:')
    for _ in range(2):
        create_batch(sim, pipeline="nightly", run_date=TODAY)
    create_batch(sim, pipeline="other")
    wait_for(sim, f"nightly/{TODAY}")


def show_job_add(folder: Path, sim: Simulator) -> None:
    command = ("job", "add", "reviews", "--batch-id", create_batch(sim), "--config-id", "1003")
    tell(f"\n4. The config is edited while it runs: teckochecker {' '.join(command)}")
    run(folder, *command)
    wait_for(sim, "reviews")


def show_status(folder: Path) -> None:
    """Print `status`, once it says what must have happened."""
    deadline = time.monotonic() + PATIENCE_S
    statuses = None
    while statuses != FINISHED:
        if time.monotonic() > deadline:
            raise DemoError(f"the statuses are {statuses}")
        jobs = json.loads(run(folder, "status", "--json"))["jobs"]
        statuses = {job["name"]: job["status"] for job in jobs}
    tell("\n5. `teckochecker status`:\n")
    tell("   " + run(folder, "status").rstrip().replace("\n", "\n   ") + "\n")


def show_lost_state(folder: Path, sim: Simulator) -> None:
    """Forget everything, and see that nothing starts twice."""
    for path in folder.glob("teckochecker.db*"):
        path.unlink()
    before = len(sim.jobs)
    run(folder, "--once")
    tell("\n6. The state file is deleted, and `teckochecker --once` makes a pass: it searches")
    tell(f"   Keboola for what was started before, and starts {len(sim.jobs) - before} more.")


def show(folder: Path, sim: Simulator) -> None:
    tell("OpenAI and Keboola are simulated on this machine; teckochecker.py is the real one.\n")
    show_config(folder, sim)
    tell("2. The daemon starts. One batch of `translations` will complete, one will fail:")
    with daemon(folder) as process:
        show_batch_ids(sim)
        show_match(sim)
        show_job_add(folder, sim)
        show_status(folder)
        process.send_signal(signal.SIGTERM)
        if process.wait(PATIENCE_S) != 0:
            raise DemoError(f"the daemon exited {process.returncode} after SIGTERM")
    show_lost_state(folder, sim)
    if started(sim) != Counter(FINISHED.keys()):
        raise DemoError(f"expected one Keboola job each for {[*FINISHED]}, got {started(sim)}")


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="teckochecker-demo-") as name, Simulator() as sim:
        sim.add_key(OPENAI_KEY)
        sim.add_token(KEBOOLA_TOKEN)
        sim.batch_seconds, sim.job_seconds = 2.0, 1.0
        try:
            show(Path(name), sim)
        except (DemoError, TimeoutError, subprocess.TimeoutExpired, httpx.HTTPError) as error:
            print(f"\nThe demo FAILED: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    took_s = time.monotonic() - began
    tell(f"\nChecked: exactly one Keboola job for each of {', '.join(FINISHED)}. {took_s:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
