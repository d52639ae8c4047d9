#!/usr/bin/env python3
"""Measures teckochecker.py against tests/simulator.py; prints one Markdown table.

    .venv/bin/python tests/bench.py [--quick] [PART ...]

The program is a process of its own, the simulator a thread of this one. Requests of a poll are
counted from the third poll after a start on, and again after a restart, with the account's batches
created 0 s, 30 s and 600 s apart. CPU is that of the program's process alone, beside a bare httpx
loop that reads the same pages of 100; all else is shared with the simulator, which matters where
there are two cores. Not a test: it takes some eight minutes (--quick: three) and depends on the
machine. Exits 1 if something wanted is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program, for the harness

import httpx
import yaml
from harness import KEBOOLA_TOKEN, PROGRAM, Daemon, Workspace, clean_environment, wait_until
from simulator import Simulator

PATIENCE_S = 300.0  # for anything that is waited for, on a busy machine
PAGE = 100
FROM, POLLS = 1.5, 3  # intervals after the first request: the third poll and two more count
GAPS_S = (0, 30, 600)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; without a limit it is for information."""

    what: str
    value: float
    unit: str = ""
    limit: float | None = None

    @property
    def is_good(self) -> bool:
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        limit = "" if self.limit is None else f"at most {self.limit:g}{unit}"
        verdict = "" if self.is_good else " **not met**"
        return f"| {self.what} | {self.value:.3g}{unit} | {limit}{verdict} |"


# ---- A world with many batches, and the program in it ----

Layout = Sequence[bool]  # an account's batches, the oldest first: is it watched?


def newest(watched: int, others: int) -> Layout:
    return [False] * others + [True] * watched


def spread(others: int, clusters: int, size: int) -> Layout:
    """Clusters of watched batches, evenly among others."""
    part = [False] * (others // clusters // 2)
    return (part + [True] * size + part) * clusters


class Space(Workspace):
    """A workspace with many jobs: the C dumper writes their config in seconds, not minutes."""

    def command(self, *arguments: str) -> list[str]:
        """As users run it, without the tests' warnings as errors."""
        return [sys.executable, str(PROGRAM), "--config", str(self.path), *arguments]

    def text(self) -> str:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        return str(yaml.dump(self.config, Dumper=dumper, sort_keys=False, width=1000))


@dataclass(frozen=True, slots=True)
class World:
    """A simulator, a workspace whose jobs watch its batches, and the ids of those by key."""

    sim: Simulator
    space: Space
    watched: dict[str, list[str]]
    interval_s: int

    def times(self) -> list[float]:
        """When the requests to OpenAI came."""
        return [r.at for r in self.sim.requests if r.route.startswith("openai.")]

    def first_at(self) -> float:
        wait_until(self.times, "the first request", PATIENCE_S)
        return self.times()[0]

    def wait_for_intervals(self, count: float) -> float:
        """Waits until so many have passed since the first request, which was when it returns."""
        first_at = self.first_at()
        time.sleep(max(0.0, first_at + count * self.interval_s - time.monotonic()))
        return first_at


@contextmanager
def world(
    layouts: Sequence[Layout],
    *,
    per_job: int = 10,
    interval_s: int = 5,
    gap_s: int = 2,
    status: str = "in_progress",
) -> Iterator[World]:
    """An account for each layout; its batches were created `gap_s` apart, until now."""
    watched: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="teckochecker-bench-") as name, Simulator() as sim:
        sim.add_token(KEBOOLA_TOKEN)
        space = Space(Path(name), sim)
        space.config["limits"] = {"trigger_grace": "30s", "max_concurrency": 10}
        space.config["defaults"]["poll_interval"] = interval_s
        for number, layout in enumerate(layouts):
            key = f"sk-bench-{number:02}-0123456789abcdef"
            sim.add_key(key, f"proj_{number}")
            space.secrets[f"openai-{number}"] = space.openai_secret(key)
            watched[key] = []
            for place, is_watched in enumerate(layout):
                batch_id = f"batch_{number:04x}{place:028x}"  # as long as OpenAI's own
                created_at = int(time.time()) - (len(layout) - place) * gap_s
                sim.add_batch(batch_id, status, project=f"proj_{number}", created_at=created_at)
                if is_watched:
                    watched[key].append(batch_id)
            for start in range(0, len(watched[key]), per_job):
                space.jobs[f"job-{number}-{start}"] = {
                    "batch_ids": watched[key][start : start + per_job],
                    "config_id": f"{number}-{start}",
                    "openai_secret": f"openai-{number}",
                }
        del space.secrets["openai"], space.config["defaults"]["openai_secret"]
        try:
            yield World(sim, space, watched, interval_s)
        finally:
            space.close()


def cpu_s(daemon: Daemon) -> float:
    """User and system time of the process so far (proc(5), fields 14 and 15)."""
    stat = Path(f"/proc/{daemon.pid}/stat").read_text(encoding="ascii")
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(daemon: Daemon) -> float:
    status = Path(f"/proc/{daemon.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# ---- What is measured ----


# Where the watched batches stand in the list, and how many requests a poll may take.
CASES = {
    "10 batches of one job": (newest(10, 1000), 3),
    "1,000 batches, the newest": (newest(1000, 20_000), 12),
    "1,000 batches in 100 clusters of 10 among 20,000": (spread(20_000, 100, 10), 210),
    "10 batches singly among 20,000": (spread(20_000, 10, 1), 12),
}


def measure_case(case: str, gap_s: int) -> list[Row]:
    """Requests of a poll after a start, and after a restart."""
    rows = []
    layout, limit = CASES[case]
    with world([layout], gap_s=gap_s) as here:
        for when in ("", ", after a restart"):
            here.sim.reset_stats()
            daemon = here.space.daemon()
            first_at = here.wait_for_intervals(FROM + POLLS)
            begin, end = (first_at + n * here.interval_s for n in (FROM, FROM + POLLS))
            requests = sum(begin < at <= end for at in here.times())
            daemon.stop()
            what = f"requests of a poll: {case}, {gap_s} s apart{when}"
            rows.append(Row(what, requests / POLLS, limit=limit))
    return rows


def measure_requests(options: argparse.Namespace) -> Iterator[Row]:
    """Three at a time: nothing but requests is counted here."""
    gaps_s = GAPS_S[1:2] if options.quick else GAPS_S
    tasks = [(case, gap_s) for case in CASES for gap_s in gaps_s]
    with ThreadPoolExecutor(3) as pool:
        for rows in pool.map(lambda task: measure_case(*task), tasks):
            yield from rows


def measure_size(batches: int, accounts: int, interval_s: int, memory_mb: float) -> Iterator[Row]:
    """CPU of a poll, against the bare list loop, and the peak of memory."""
    layouts = [newest(batches // accounts, 100)] * accounts
    with world(layouts, interval_s=interval_s) as here:
        here.sim.record = False

        def wait_for_rows(count: int) -> int:
            def rows() -> int:
                counts = here.sim.request_counts
                return counts.get("openai.get", 0) + PAGE * counts.get("openai.list", 0)

            wait_until(lambda: rows() >= count, f"{count} rows", 2 * PATIENCE_S, 0.2)
            return rows()

        daemon = here.space.daemon()
        wait_for_rows(batches)  # the first poll, which asks for each by itself
        before = wait_for_rows(2 * batches)
        before_s = cpu_s(daemon)
        after = wait_for_rows(before + 2 * batches)
        poll_s = (cpu_s(daemon) - before_s) / (after - before) * batches
        memory = peak_mb(daemon)
        daemon.stop()
        bare_s = bare_loop_s(here)
    what = f"{batches:,} watched batches"
    yield Row(f"CPU of a poll, per 1,000 of {what}", poll_s / batches * 1e6, "ms")
    yield Row(f"the bare list loop, per 1,000 of {what}", bare_s / batches * 1e6, "ms")
    yield Row(f"CPU of a poll against the bare list loop, {what}", poll_s / bare_s, "x", 2)
    yield Row(f"peak memory, {what}", memory, "MB", memory_mb)


def measure_sizes(options: argparse.Namespace) -> Iterator[Row]:
    yield from measure_size(10_000, 1, 8, 80)
    if not options.quick:
        yield from measure_size(100_000, 10, 60, 220)


def measure_latency(_options: argparse.Namespace) -> Iterator[Row]:
    """From the end of each job's last batch to the arrival of its POST."""
    window_s = 30
    with world([newest(1000, 1000)], per_job=5, interval_s=5) as here:
        here.sim.latency = 0.1
        daemon = here.space.daemon()
        here.wait_for_intervals(1.5)
        ended: dict[str, float] = {}
        began = time.monotonic()
        jobs = here.space.jobs.values()
        ids = [(job["config_id"], id_) for job in jobs for id_ in job["batch_ids"]]
        for place, (config_id, batch_id) in enumerate(ids):
            time.sleep(max(0.0, began + window_s * place / len(ids) - time.monotonic()))
            ended[config_id] = time.monotonic()
            here.sim.finish(batch_id)
        wait_until(lambda: len(here.sim.jobs) >= len(ended), "all POSTs", PATIENCE_S, 0.5)
        posts = [r for r in here.sim.requests if r.route == "queue.create"]
        daemon.stop()
    assert len(posts) == len(ended)
    waits_s = sorted(post.at - ended[post.json()["config"]] for post in posts)
    what = "a batch's end to the POST, 1,000 batches every 5 s, 100 ms server"
    yield Row(f"{what}: median", statistics.median(waits_s), "s", 4)
    yield Row(f"{what}: 99th percentile", waits_s[round(0.99 * (len(waits_s) - 1))], "s", 8)


def measure_start(options: argparse.Namespace) -> Iterator[Row]:
    """From the start of the process to its first request; a new state file each time."""
    found = []
    with world([newest(1000, 0)], per_job=1, interval_s=3600) as here:
        here.space.write()
        for _ in range(3 if options.quick else 5):
            here.space.lose_state()
            here.sim.reset_stats()
            began = time.monotonic()
            daemon = Daemon(here.space.command(), here.space.directory, clean_environment())
            found.append(here.first_at() - began)
            daemon.kill()
    what = "start to first request, 1,000 jobs, new state file"
    yield Row(what, statistics.median(found), "s", 1)


def measure_idle(options: argparse.Namespace) -> Iterator[Row]:
    """CPU of a daemon whose jobs are all finished."""
    window_s = 20 if options.quick else 60
    with world([newest(100, 0)], per_job=1, interval_s=1, status="completed") as here:
        here.sim.job_seconds = 0
        daemon = here.space.daemon()
        wait_until(lambda: len(daemon.events_of("completed")) == 100, "all ends", PATIENCE_S)
        time.sleep(3)  # what follows the last end is not what is measured
        before_s = cpu_s(daemon)
        time.sleep(window_s)
        used_s = cpu_s(daemon) - before_s
        daemon.stop()
    what = "CPU of an idle daemon, 100 finished jobs, a minute"
    yield Row(what, used_s / window_s * 60, "s", 0.1)


# ---- The bare loop (run by this script in a process of its own) ----


def bare_loop_s(here: World) -> float:
    """CPU seconds of a loop that reads pages until every watched batch was seen."""
    task = json.dumps({"url": here.sim.openai_url, "watched": here.watched})
    command = [sys.executable, __file__, "--bare"]
    done = subprocess.run(
        command, input=task, stdout=subprocess.PIPE, text=True, check=True, env=clean_environment()
    )
    return float(done.stdout)


async def read_pages(client: httpx.AsyncClient, url: str, key: str, watched: list[str]) -> None:
    missing = set(watched)
    seen: dict[str, str] = {}
    params = {"limit": str(PAGE)}
    while missing:
        headers = {"Authorization": f"Bearer {key}"}
        page = (await client.get(f"{url}/batches", params=params, headers=headers)).json()
        seen.update((row["id"], row["status"]) for row in page["data"] if row["id"] in missing)
        missing -= seen.keys()
        params["after"] = page["last_id"]


async def run_bare(url: str, watched: dict[str, list[str]]) -> float:
    """CPU seconds of one reading; the start and the first connection are left out."""
    async with httpx.AsyncClient(timeout=60) as client:
        await client.get(f"{url}/batches")
        before_s = time.process_time()
        cycles = 3 if len(watched) == 1 else 1
        for _ in range(cycles):
            loops = (read_pages(client, url, key, ids) for key, ids in watched.items())
            await asyncio.gather(*loops)
        return (time.process_time() - before_s) / cycles


# ---- Command line ----

PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "requests": measure_requests,
    "sizes": measure_sizes,
    "latency": measure_latency,
    "start": measure_start,
    "idle": measure_idle,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="not 100,000 batches, one gap")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only {', '.join(PARTS)}")
    options = parser.parse_args()
    if options.bare:
        print(asyncio.run(run_bare(**json.load(sys.stdin))))
        return 0
    print(f"| Python {platform.python_version()}, {os.cpu_count()} CPUs | measured | wanted |")
    print("|---|---|---|", flush=True)
    rows: list[Row] = []
    for name in options.parts or PARTS:
        for row in PARTS[name](options):
            rows.append(row)
            print(row, flush=True)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
