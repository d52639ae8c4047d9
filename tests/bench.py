#!/usr/bin/env python3
"""Measures teckochecker.py against tests/simulator.py and prints a table.

    .venv/bin/python tests/bench.py [--idle SECONDS]

The program and the simulator are processes of their own. Not a test: it takes about half a minute
and depends on the machine. Exits 1 if a measure does not meet its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PROGRAM = TESTS.parent / "teckochecker.py"
KEY, TOKEN = "sk-bench-0123456789abcdef", "1-bench-0123456789abcdef"
JOBS, BATCHES_PER_JOB, LATENCY_S, CONCURRENCY = 100, 10, 0.1, 10
LOAD_JOBS = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; without a limit it is for information."""

    what: str
    value: float
    unit: str
    limit: float | None = None
    is_exact: bool = False

    @property
    def is_good(self) -> bool:
        if self.limit is None:
            return True
        return self.value == self.limit if self.is_exact else self.value <= self.limit

    def text(self) -> str:
        limit = f"{self.limit:g} {self.unit}" if self.limit is not None else ""
        verdict = "" if self.is_good else "  NOT MET"
        return f"{self.what:<66} {self.value:>8.4g} {self.unit:<4} {limit:>8}{verdict}"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the program cost."""

    wall_s: float
    cpu_s: float
    peak_mb: float


class Simulated:
    """The simulator as a process of its own."""

    def __init__(self, batches: list[str]) -> None:
        command = [sys.executable, str(TESTS / "simulator.py"), "--latency", str(LATENCY_S)]
        command += ["--key", KEY, "--token", TOKEN]
        command += ["--openai-port", "0", "--stack-port", "0", "--queue-port", "0"]
        for batch in batches:
            command += ["--batch", f"{batch}=in_progress"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        addresses = {}
        for line in self.process.stdout:
            if match := re.fullmatch(r"(OpenAI|stack) +(http://\S+)\n", line):
                addresses[match[1]] = match[2]
            if line.startswith("Ctrl-C"):
                break
        self.openai_url, self.stack_url = addresses["OpenAI"], addresses["stack"]
        # It prints a line for each request, and would stop at a pipe that nobody empties.
        self._drain = subprocess.Popen(
            ["cat"], stdin=self.process.stdout, stdout=subprocess.DEVNULL
        )

    def state(self) -> dict[str, Any]:
        return self._control("state")

    def finish(self, batch: str) -> None:
        self._control("finish", {"id": batch})

    def _control(self, name: str, body: object = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.stack_url}/_sim/{name}", data) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._drain.wait()


@contextlib.contextmanager
def simulated(batches: list[str]) -> Iterator[Simulated]:
    sim = Simulated(batches)
    try:
        yield sim
    finally:
        sim.stop()


def environment() -> dict[str, str]:
    return {**os.environ, "BENCH_OPENAI": KEY, "BENCH_KEBOOLA": TOKEN}


def config_text(openai_url: str, stack_url: str, jobs: int) -> str:
    lines = [
        f"limits: {{max_concurrency: {CONCURRENCY}, trigger_grace: 30s}}",
        "secrets:",
        f"  openai: {{type: openai, env: BENCH_OPENAI, base_url: {openai_url}}}",
        f"  keboola: {{type: keboola, env: BENCH_KEBOOLA, stack_url: {stack_url}}}",
        "defaults: {openai_secret: openai, keboola_secret: keboola, component_id: bench.app}",
        "jobs:",
    ]
    for job in range(jobs):
        ids = ", ".join(batch_id(job, number) for number in range(BATCHES_PER_JOB))
        lines += [f"  job-{job}:", f"    batch_ids: [{ids}]", f'    config_id: "{job}"']
    return "\n".join(lines) + "\n"


def batch_id(job: int, number: int) -> str:
    return f"batch_{job:04}_{number}"


def run_once(config: Path) -> Run:
    """Run one pass; wait4 tells what this one child has used."""
    with (config.parent / "log").open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--config", str(config), "--once"],
            env=environment(),
            stderr=log,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"--once exited {process.returncode}:\n{log_end(config)}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def log_end(config: Path) -> str:
    return (config.parent / "log").read_text(encoding="utf-8")[-2000:]


def measure_passes(config: Path, sim: Simulated, batches: list[str]) -> Iterator[Row]:
    """A pass with all batches in progress, one in which all have ended, one with nothing to do."""
    size = f"{JOBS} jobs x {BATCHES_PER_JOB} batches"
    looks = run_once(config)
    yield Row(f"--once, {size}, {LATENCY_S * 1000:g} ms latency", looks.wall_s, "s", 12)
    yield Row("  peak memory", looks.peak_mb, "MB", 80)
    yield Row("  CPU time", looks.cpu_s, "s")
    for batch in batches:
        sim.finish(batch)
    starts = run_once(config)
    yield Row(f"the same, all batches ended: {JOBS} Keboola jobs started", starts.wall_s, "s")
    yield Row("  peak memory", starts.peak_mb, "MB", 80)
    state = sim.state()
    yield Row("  Keboola jobs", len(state["jobs"]), "", JOBS, is_exact=True)
    yield Row(
        "most requests in flight in both, as the server saw it", state["max_in_flight"], "", 10
    )
    idle = run_once(config)
    yield Row("--once with nothing to do", idle.wall_s, "s")
    yield Row("  requests", count(sim) - sum(state["requests"].values()), "", 0)


def count(sim: Simulated) -> int:
    return sum(sim.state()["requests"].values())


def measure_idle(config: Path, seconds: float) -> Row:
    """CPU time of a daemon whose jobs are all finished, as seconds per minute."""
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--config", str(config)], env=environment(), stderr=log
        )
    try:
        time.sleep(2)  # its start is not what is measured
        before = cpu_s(process.pid)
        time.sleep(seconds)
        used_s = cpu_s(process.pid) - before
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    return Row(f"CPU time of an idle daemon, {JOBS} finished jobs", used_s * 60 / seconds, "s/min")


def cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_loading(folder: Path) -> Row:
    """Read, parse, check and open a config of 1,000 jobs, best of five."""
    # Imported here and last: wait4 counts what this process was when it started a child as the
    # child's memory, so it has to be small until then.
    sys.path.insert(0, str(PROGRAM.parent))
    import teckochecker  # noqa: PLC0415

    config = folder / "large.yaml"
    url = "https://api.example.com"
    config.write_text(config_text(url, url, LOAD_JOBS), encoding="utf-8")
    times_s = []
    for _ in range(5):
        started = time.perf_counter()
        setup = teckochecker.load_setup(
            config, teckochecker.Files(), environment(), teckochecker.Redactor()
        )
        times_s.append(time.perf_counter() - started)
        assert len(setup.config.jobs) == LOAD_JOBS
    what = f"loading {LOAD_JOBS:,} jobs x {BATCHES_PER_JOB} batches, best of 5"
    return Row(what, min(times_s) * 1000, "ms", 500)


def measure(folder: Path, idle_s: float) -> Iterator[Row]:
    batches = [batch_id(job, number) for job in range(JOBS) for number in range(BATCHES_PER_JOB)]
    with simulated(batches) as sim:
        config = folder / "config.yaml"
        config.write_text(config_text(sim.openai_url, sim.stack_url, JOBS), encoding="utf-8")
        yield from measure_passes(config, sim, batches)
        if idle_s > 0:
            yield measure_idle(config, idle_s)
    yield measure_loading(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure one pass, loading and memory against limits; exit 1 if one is not met."
    )
    parser.add_argument(
        "--idle",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="also measure the CPU time of an idle daemon, over that long (default: not)",
    )
    options = parser.parse_args()
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs, max_concurrency {CONCURRENCY}"
    )
    print(f"{'MEASURE':<66} {'VALUE':>8} {'':<4} {'LIMIT':>8}", flush=True)
    is_good = True
    with tempfile.TemporaryDirectory(prefix="teckochecker-bench-") as name:
        for row in measure(Path(name), options.idle):
            print(row.text(), flush=True)
            is_good = is_good and row.is_good
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
