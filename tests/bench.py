#!/usr/bin/env python3
"""Measures teckochecker.py against tests/simulator.py, beside bare httpx loops, in one table.

    .venv/bin/python tests/bench.py [--quick] [PART ...]

The program, the simulator and the loops are processes of their own; the simulator sends prepared
bytes. The first half of the table has every size at both latencies, and below each the same
batches read by two bare loops: pages of 100 one after another (the least that can be done) and
single GETs, 10 at a time (the usual way). SECONDS go from a look's first request to its last, or,
of the loops, to the last answer. The second half has what must hold, with its limit.

Not a test: it takes some six minutes (--quick: two) and depends on the machine. CPU is the time
of the client's process alone; all else is shared between it and the simulator, which matters
where there are two cores. Exits 1 if a limit is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

TESTS = Path(__file__).resolve().parent
PROGRAM = TESTS.parent / "teckochecker.py"
TOKEN = "1-bench-0123456789abcdef"
CONCURRENCY = 10
PAGE = 100
PATIENCE_S = 180.0  # for anything that is waited for, on a busy machine
QUIET_S = 0.6  # without a request: a look has ended
SAMPLE = 500  # single GETs: of more batches, so many are asked for and the rest reckoned

# ======================================================================================
# The table
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the second half; without a limit it is for information."""

    what: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def is_good(self) -> bool:
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        limit = f"{self.limit:g} {self.unit}" if self.limit is not None else ""
        verdict = "" if self.limit is None else "ok" if self.is_good else "NOT MET"
        return f"{self.what:<72} {self.value:>8.3g} {self.unit:<6} {limit:>10} {verdict}".rstrip()


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of the first half: what it costs to look at all batches once."""

    what: str
    requests: float
    look_s: float
    cpu_s: float  # per 1,000 batches
    peak_mb: float

    HEAD: ClassVar[str] = (
        f"{'EACH LOOK':<50} {'REQUESTS':>9} {'SECONDS':>8} {'CPU S/1,000':>12} {'PEAK MB':>8}"
    )

    def __str__(self) -> str:
        return (
            f"{self.what:<50} {self.requests:>9.4g} {self.look_s:>8.2f} {self.cpu_s:>12.4f}"
            f" {self.peak_mb:>8.0f}"
        )


def latency_text(latency_s: float) -> str:
    return f"{latency_s * 1000:g} ms"


# ======================================================================================
# The world: batches, accounts, the simulator
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Place:
    """A batch in an account's list: when it was created, and whether a job watches it."""

    created_at: int
    is_watched: bool


Layout = Sequence[Place]  # an account's batches, the oldest first
EPOCH_S = 1_750_000_000


def spread(others: int, clusters: int, size: int) -> Layout:
    """Clusters of watched batches, made 2 s apart, evenly among others, made 30 s apart."""
    places, now = [], EPOCH_S
    for number in range(others):
        if clusters and number % (others // clusters) == 0:
            places += [Place(now + 2 * i, is_watched=True) for i in range(size)]
            now += 2 * size
        places.append(Place(now, is_watched=False))
        now += 30
    return places


def newest(watched: int, others: int = 1000) -> Layout:
    """Watched batches, made 2 s apart, and the others older than they."""
    older = [Place(EPOCH_S - 30 * (others - i), is_watched=False) for i in range(others)]
    return older + [Place(EPOCH_S + 2 * i, is_watched=True) for i in range(watched)]


@dataclass(frozen=True, slots=True)
class Account:
    """An OpenAI project with its key, all of its batches, and the ids of those that jobs watch."""

    number: int
    layout: Layout

    @property
    def key(self) -> str:
        return f"sk-bench-{self.number:02}-0123456789abcdef"

    @property
    def project(self) -> str:
        return f"proj_{self.number:02}"

    @property
    def watched(self) -> list[str]:
        return [self._id(i) for i, place in enumerate(self.layout) if place.is_watched]

    def lines(self, status: str) -> Iterator[str]:
        """The account's batches as `simulator.py --batches` reads them."""
        for i, place in enumerate(self.layout):
            fields = {"id": self._id(i), "timeline": status, "project": self.project}
            yield json.dumps(fields | {"created_at": place.created_at}) + "\n"

    def _id(self, index: int) -> str:
        return f"batch_{self.number:04x}{index:028x}"  # as long as OpenAI's own


class Simulated:
    """The simulator as a process of its own."""

    def __init__(self, folder: Path, accounts: Sequence[Account], status: str) -> None:
        batches = folder / "batches.jsonl"
        with batches.open("w", encoding="utf-8") as lines:
            for account in accounts:
                lines.writelines(account.lines(status))
        command = [sys.executable, str(TESTS / "simulator.py"), "--quiet", "--token", TOKEN]
        command += [
            "--openai-port=0",
            "--stack-port=0",
            "--queue-port=0",
            "--batches",
            str(batches),
        ]
        for account in accounts:
            command += ["--key", f"{account.key}={account.project}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        addresses = {}
        for line in self.process.stdout:
            if match := re.fullmatch(r"(OpenAI|stack) +(http://\S+)\n", line):
                addresses[match[1]] = match[2]
            if line.startswith("Ctrl-C"):
                break
        self.openai_url, self.stack_url = addresses["OpenAI"], addresses["stack"]

    def stats(self) -> dict[str, Any]:
        return self._control("requests")

    def reset(self) -> None:
        self._control("requests", method="DELETE")

    def births(self) -> dict[str, list[float]]:
        return self._control("births")

    def finish(self, batch: str) -> None:
        self._control("finish", {"id": batch})

    def set_latency(self, seconds: float) -> None:
        self._control("latency", {"seconds": seconds})

    def count(self) -> int:
        """Requests to OpenAI so far."""
        counts = self.stats()["requests"]
        return sum(n for route, n in counts.items() if route.startswith("openai."))

    def _control(self, name: str, body: object = None, method: str | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.stack_url}/_sim/{name}"
        request = urllib.request.Request(url, data, method=method)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def simulated(
    layouts: Sequence[Layout], status: str = "in_progress"
) -> Iterator[tuple[Path, Simulated, list[Account]]]:
    """A folder and a simulator with an account for each layout."""
    accounts = [Account(number, layout) for number, layout in enumerate(layouts)]
    with tempfile.TemporaryDirectory(prefix="teckochecker-bench-") as name:
        sim = Simulated(Path(name), accounts, status)
        try:
            yield Path(name), sim, accounts
        finally:
            sim.stop()


# ======================================================================================
# The program, as a process
# ======================================================================================


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job of the config, as far as the cases differ."""

    batch_ids: Sequence[str]
    account: int = 0
    poll_interval: str = ""  # none: the default's


def jobs_of(accounts: Sequence[Account], size: int) -> list[JobSpec]:
    """Jobs of `size` batches each that watch what is watched."""
    return [
        JobSpec(ids[start : start + size], account.number)
        for account in accounts
        for ids in [account.watched]
        for start in range(0, len(ids), size)
    ]


def config_text(
    sim: Simulated,
    jobs: Sequence[JobSpec],
    interval: str,
    component: str = "bench.app",
    publish: str = "null",
) -> str:
    numbers = sorted({job.account for job in jobs})
    lines = [
        f"publish: {publish}",
        f"limits: {{max_concurrency: {CONCURRENCY}, trigger_grace: 30s}}",
        "secrets:",
        *(
            f"  openai-{n}: {{type: openai, env: BENCH_OPENAI_{n}, base_url: {sim.openai_url}}}"
            for n in numbers
        ),
        f"  keboola: {{type: keboola, env: BENCH_KEBOOLA, stack_url: {sim.stack_url}}}",
        "defaults:",
        f"  component_id: {component}",
        "  keboola_secret: keboola",
        f"  poll_interval: {interval}",
        "jobs:",
    ]
    for number, job in enumerate(jobs):
        lines += [f"  job-{number:05}:", f"    batch_ids: [{', '.join(job.batch_ids)}]"]
        lines += [f"    openai_secret: openai-{job.account}", f'    config_id: "{number}"']
        lines += [f"    poll_interval: {job.poll_interval}"] if job.poll_interval else []
    return "\n".join(lines) + "\n"


def write_config(config: Path, text: str) -> None:
    """Replace a config whole, as editors do."""
    new = config.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(config)


def environment(accounts: Sequence[Account], **more: str) -> dict[str, str]:
    foreign = ("TECKOCHECKER_", "NOTIFY_SOCKET", "WATCHDOG_", "CREDENTIALS_DIRECTORY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    keys = {f"BENCH_OPENAI_{account.number}": account.key for account in accounts}
    return kept | keys | {"BENCH_KEBOOLA": TOKEN} | more


def cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Daemon:
    """The program in the foreground, its log in a file."""

    def __init__(self, config: Path, env: Mapping[str, str]) -> None:
        self._log = config.with_suffix(".log")
        self.started_at = time.monotonic()
        with self._log.open("wb") as log:
            command = [sys.executable, str(PROGRAM), "--config", str(config)]
            self.process = subprocess.Popen(command, env=dict(env), stderr=log)

    def cpu_s(self) -> float:
        return cpu_s(self.process.pid)

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def wait_until(self, condition: Callable[[], bool], what: str, step_s: float = 0.05) -> None:
        """Ask again and again; gives up with the end of the log."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                end = self._log.read_text(encoding="utf-8")[-2000:]
                raise SystemExit(f"{what}: not within {PATIENCE_S:g} s; the log ends\n{end}")
            time.sleep(step_s)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


@contextlib.contextmanager
def daemon(config: Path, env: Mapping[str, str]) -> Iterator[Daemon]:
    running = Daemon(config, env)
    try:
        yield running
    finally:
        running.stop()


def run(command: Sequence[str | Path], env: Mapping[str, str]) -> tuple[float, float]:
    """Seconds and CPU seconds of a command; wait4 tells what this one child has used."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=dict(env), stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{command} exited {process.returncode}")
    return wall_s, usage.ru_utime + usage.ru_stime


def once(config: Path) -> list[str | Path]:
    return [sys.executable, PROGRAM, "--config", config, "--once"]


# ======================================================================================
# Looks
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests without a pause between them: a look, or a part of one where jobs fall apart."""

    requests: int
    seconds: float  # from the first request to the last
    ended_at: float
    cpu_s: float  # the program's, until then


def next_burst(sim: Simulated, program: Daemon, interval_s: float) -> Burst:
    """Wait for requests, and until there are no more, for a tenth of the interval at least."""
    quiet_s = max(QUIET_S, interval_s / 10)
    sim.reset()
    program.wait_until(lambda: sim.count() > 0, "a look")
    program.wait_until(lambda: is_quiet(sim, quiet_s), "the end of a look")
    stats = sim.stats()
    requests = sum(n for route, n in stats["requests"].items() if route.startswith("openai."))
    seconds = stats["last_at"] - stats["first_at"]
    return Burst(requests, seconds, stats["last_at"], program.cpu_s())


def is_quiet(sim: Simulated, quiet_s: float) -> bool:
    last_at = sim.stats()["last_at"]
    return last_at is not None and time.monotonic() - last_at > quiet_s


@dataclass(frozen=True, slots=True)
class Looks:
    """What a look costs on the average of several whole intervals, in each of which is one."""

    requests: float
    seconds: float
    cpu_s: float


def measured_looks(
    sim: Simulated, program: Daemon, before: Burst, interval_s: float, looks: int
) -> tuple[Looks, Burst]:
    """Measure from the end of one burst to that of another, some intervals later; returns it."""
    found = [next_burst(sim, program, interval_s)]
    while found[-1].ended_at - before.ended_at < (looks - 0.5) * interval_s:
        found.append(next_burst(sim, program, interval_s))
    last = found[-1]
    passed = round((last.ended_at - before.ended_at) / interval_s)
    measured = Looks(
        sum(burst.requests for burst in found) / passed,
        sum(burst.seconds for burst in found) / passed,
        (last.cpu_s - before.cpu_s) / passed,
    )
    return measured, last


# ======================================================================================
# The bare loops (run by this script in a process of its own)
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Task:
    """What a bare loop has to do."""

    way: str  # "list" or "get"
    url: str
    watched: Mapping[str, Sequence[str]]  # of each key
    cycles: int


async def list_loop(client: Any, task: Task, key: str) -> int:  # noqa: ANN401 - an httpx client
    """Read pages until every watched batch was seen; returns the requests."""
    missing = set(task.watched[key])
    seen: dict[str, str] = {}
    params, requests = {"limit": str(PAGE)}, 0
    headers = {"Authorization": f"Bearer {key}"}
    while missing:
        answer = await client.get(f"{task.url}/batches", params=params, headers=headers)
        page = answer.json()
        requests += 1
        seen.update((row["id"], row["status"]) for row in page["data"] if row["id"] in missing)
        missing -= seen.keys()
        params["after"] = page["last_id"]
    return requests


async def get_loop(client: Any, task: Task, key: str) -> int:  # noqa: ANN401
    """Ask for every watched batch by itself, 10 at a time; returns the requests."""
    headers = {"Authorization": f"Bearer {key}"}
    ids = iter(task.watched[key])
    seen: dict[str, str] = {}

    async def work() -> None:
        for batch_id in ids:
            answer = await client.get(f"{task.url}/batches/{batch_id}", headers=headers)
            seen[batch_id] = answer.json()["status"]

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return len(seen)


async def loop_cost(task: Task) -> dict[str, float]:
    """What cycles of a bare loop cost, its start left out as it is with the program."""
    import httpx  # noqa: PLC0415 - only in the loop's own process

    loop = {"list": list_loop, "get": get_loop}[task.way]
    async with httpx.AsyncClient(timeout=60) as client:
        await client.get(f"{task.url}/batches", params={"limit": "1"})
        started_at, cpu_before, requests = time.monotonic(), time.process_time(), 0
        for _ in range(task.cycles):
            requests += sum(await asyncio.gather(*(loop(client, task, k) for k in task.watched)))
        return {
            "requests": requests / task.cycles,
            "look_s": (time.monotonic() - started_at) / task.cycles,
            "cpu_s": (time.process_time() - cpu_before) / task.cycles,
        }


def bare_cost(way: str, sim: Simulated, accounts: Sequence[Account], latency_s: float) -> Cost:
    """Run a bare loop over all that is watched, or over a sample with single GETs."""
    watched = {account.key: account.watched for account in accounts}
    total = share = sum(map(len, watched.values()))
    if way == "get" and total > SAMPLE:
        share = SAMPLE
        watched = {key: ids[: SAMPLE // len(accounts)] for key, ids in watched.items()}
    requests = share if way == "get" else max(1, share // PAGE)
    cycles = 1 if latency_s else max(1, min(100, 500 // requests))
    task = {"way": way, "url": sim.openai_url, "watched": watched, "cycles": cycles}
    ran = subprocess.run(
        [sys.executable, __file__, "--bare"],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found, factor = json.loads(ran.stdout), total / share
    what = {"list": "    bare list loop", "get": "    bare single GETs, 10 at a time"}[way]
    if share < total:
        what += f" (of {share:,})"
    return Cost(
        what,
        found["requests"] * factor,
        found["look_s"] * factor,
        found["cpu_s"] / share * 1000,
        found["peak_mb"],
    )


def run_bare() -> None:
    cost = asyncio.run(loop_cost(Task(**json.load(sys.stdin))))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    cost["peak_mb"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps(cost))


# ======================================================================================
# The first half: sizes
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Size:
    """A size to be measured; `limits` are those of its peak memory, CPU ratio and core share."""

    batches: int
    accounts: int
    per_job: int
    interval_s: int
    looks: int = 3
    latencies: tuple[float, ...] = (0.0, 0.1)
    memory_limit: float | None = None
    ratio_limit: float | None = None
    share_limit: float | None = None

    def __str__(self) -> str:
        jobs = self.batches // self.per_job
        in_accounts = f" in {self.accounts} accounts" if self.accounts > 1 else ""
        return f"{jobs:,} job{'s' * (jobs > 1)} x {self.per_job} batches{in_accounts}"


SIZES = (
    Size(10, 1, 10, interval_s=2, looks=10),
    Size(1_000, 1, 10, interval_s=2, looks=5),
    Size(10_000, 1, 10, interval_s=5, memory_limit=80, ratio_limit=3),
    Size(10_000, 10, 10, interval_s=5, latencies=(0.1,)),
    Size(10_000, 1, 1, interval_s=5, latencies=(0.0,)),
    Size(100_000, 10, 10, 60, looks=1, latencies=(0.1,), memory_limit=250, share_limit=0.25),
)


def measure_size(size: Size) -> Iterator[Cost | Row]:
    """One size at each latency, beside the bare loops; then its limits."""
    each = size.batches // size.accounts
    costs: dict[float, Cost] = {}
    floors: dict[float, Cost] = {}
    with simulated([newest(each) for _ in range(size.accounts)]) as (folder, sim, accounts):
        config = folder / "config.yaml"
        jobs = jobs_of(accounts, size.per_job)
        write_config(config, config_text(sim, jobs, f"{size.interval_s}s"))
        with daemon(config, environment(accounts)) as program:
            burst = next_burst(
                sim, program, size.interval_s
            )  # the first look writes all that is new
            for latency_s in size.latencies:
                sim.set_latency(latency_s)
                what = f"{size}, {latency_text(latency_s)}"
                looks, burst = measured_looks(sim, program, burst, size.interval_s, size.looks)
                cpu = looks.cpu_s / size.batches * 1000
                peak = program.peak_mb()
                costs[latency_s] = Cost(what, looks.requests, looks.seconds, cpu, peak)
        for latency_s in size.latencies:
            sim.set_latency(latency_s)
            yield costs[latency_s]
            floors[latency_s] = bare_cost("list", sim, accounts, latency_s)
            yield floors[latency_s]
            yield bare_cost("get", sim, accounts, latency_s)
    yield from size_rows(size, costs, floors[size.latencies[0]])


def size_rows(size: Size, costs: Mapping[float, Cost], floor: Cost) -> Iterator[Row]:
    """What must hold of a size."""
    first = next(iter(costs.values()))
    if size.ratio_limit:
        what = f"CPU of a look at {size}, against the bare list loop"
        yield Row(what, first.cpu_s / floor.cpu_s, "x", size.ratio_limit)
    if size.memory_limit:
        peak = max(cost.peak_mb for cost in costs.values())
        yield Row(f"peak memory, {size}", peak, "MB", size.memory_limit)
    if size.share_limit:
        share = max(cost.cpu_s for cost in costs.values()) * size.batches / 1000 / size.interval_s
        what = f"share of a core, {size}, every {size.interval_s} s"
        yield Row(what, share, "cores", size.share_limit)


# ======================================================================================
# The second half: what must hold
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Scatter:
    """Where watched batches stand in an account's list, and how many requests a look may take."""

    what: str
    layout: Layout
    limit: int


def scatters() -> list[Scatter]:
    return [
        Scatter("1,000 watched, the newest of the account", newest(1000, others=20_000), 11),
        Scatter(
            "1,000 watched, in clusters of 10 among 20,000 others", spread(20_000, 100, 10), 120
        ),
        Scatter("10 watched, singly among 20,000 others", spread(20_000, 10, 1), 10),
    ]


def measure_scatter(scatter: Scatter, looks: int) -> list[Row]:
    """Requests of a look once positions are known, and of the first one."""
    with simulated([scatter.layout]) as (folder, sim, accounts):
        config = folder / "config.yaml"
        write_config(config, config_text(sim, jobs_of(accounts, 10), "3s"))
        with daemon(config, environment(accounts)) as program:
            first = next_burst(sim, program, 3)
            second = next_burst(sim, program, 3)
            known, _ = measured_looks(sim, program, second, 3, looks)
    return [
        Row(f"requests of a look, {scatter.what}", known.requests, "", scatter.limit),
        Row("  of the first look", first.requests, ""),
    ]


def measure_scatters(options: argparse.Namespace) -> Iterator[Row]:
    """All at once: nothing but requests is counted here."""
    looks = 3 if options.quick else 6
    with ThreadPoolExecutor() as pool:
        for rows in pool.map(lambda scatter: measure_scatter(scatter, looks), scatters()):
            yield from rows


def measure_sizes(options: argparse.Namespace) -> Iterator[Cost | Row]:
    """All sizes, but for the largest with --quick: one look of it a minute takes its time."""
    for size in SIZES:
        if not (options.quick and size.batches > 10_000):
            yield from measure_size(size)


# The program's packages, but for watchfiles, which is the daemon's alone.
PACKAGES = "import cryptography.fernet, httpx, structlog, tenacity, yaml"


def measure_once(options: argparse.Namespace) -> Iterator[Row]:
    """--once with nothing to do, against importing the same packages; in turn, medians."""
    rounds = 5 if options.quick else 9
    imports = [sys.executable, "-c", PACKAGES]
    with simulated([newest(1000, others=0)], "completed") as (folder, sim, accounts):
        env, jobs = environment(accounts), jobs_of(accounts, 1)
        configs = {10: folder / "small.yaml", 1000: folder / "large.yaml"}
        for size, config in configs.items():
            text = f"state: {config.stem}.db\n" + config_text(sim, jobs[:size], "1h")
            write_config(config, text)
            run(once(config), env)
        before = sim.count()
        found: dict[str, list[float]] = {"imports": [], "10": [], "1000": []}
        for _ in range(rounds):
            found["imports"].append(run(imports, env)[0])
            for size, config in configs.items():
                found[str(size)].append(run(once(config), env)[0])
        imports_s, small_s, large_s = map(statistics.median, found.values())
        yield Row(
            "--once with nothing to do (10 jobs), against importing its packages",
            small_s / imports_s,
            "x",
            1.5,
        )
        yield Row("  that is", small_s * 1000, "ms")
        yield Row("  with 1,000 jobs", large_s * 1000, "ms")
        yield Row("  requests to OpenAI", sim.count() - before, "", 0)


def measure_start(options: argparse.Namespace) -> Iterator[Row]:
    """From the start of the process to its first request, median; new state files each time."""
    rounds = 3 if options.quick else 5
    with simulated([newest(10_000)]) as (folder, sim, accounts):
        env = environment(accounts)
        for jobs, limit in ((1000, 1.0), (10_000, None)):
            found = []
            for number in range(rounds if jobs == 1000 else 1):
                config = folder / f"start-{jobs}-{number}.yaml"
                specs = jobs_of(accounts, 1)[:jobs]
                text = f"state: {config.stem}.db\n" + config_text(sim, specs, "1h")
                write_config(config, text)
                sim.reset()
                with daemon(config, env) as program:
                    program.wait_until(lambda: sim.count() > 0, "the first request", 0.02)
                    found.append(sim.stats()["first_at"] - program.started_at)
            what = f"start to first request, {jobs:,} jobs, new state file"
            yield Row(what, statistics.median(found), "s", limit)


def waits_for_posts(window_s: float, publish: str = "null") -> list[float]:
    """Seconds from the end of each job's last batch to the arrival of its POST, in order."""
    with simulated([newest(1000)]) as (folder, sim, accounts):
        config, jobs = folder / "config.yaml", jobs_of(accounts, 5)
        sim.set_latency(0.1)
        write_config(config, config_text(sim, jobs, "5s", publish=publish))
        with daemon(config, environment(accounts)) as program:
            next_burst(sim, program, 5)
            ended = end_all(sim, jobs, window_s)
            program.wait_until(lambda: len(sim.births()) == len(jobs), "all POSTs", 0.5)
            births = sim.births()
        assert all(len(times) == 1 for times in births.values())
        return sorted(births[number][0] - at for number, at in ended.items())


def measure_latency(options: argparse.Namespace) -> Iterator[Row]:
    """From a batch's end to the arrival of its job's POST; an idle daemon's CPU meanwhile."""
    window_s = 15 if options.quick else 30
    with ThreadPoolExecutor() as pool:
        idle = pool.submit(idle_cpu, window_s)
        waits = waits_for_posts(window_s)
        what = f"a batch's end to the POST, 1,000 batches every 5 s, {latency_text(0.1)}"
        yield Row(f"{what}: median", statistics.median(waits), "s", 4)
        yield Row("  99th percentile", waits[round(0.99 * (len(waits) - 1))], "s", 8)
        yield Row("CPU of an idle daemon, 100 finished jobs, a minute", idle.result(), "s", 0.1)


def measure_publish(options: argparse.Namespace) -> Iterator[Row]:
    """What `publish` adds, over some minutes of looks, and to the time until the POST."""
    interval_s, minutes = 5, 1 if options.quick else 3
    with simulated([newest(10_000)]) as (folder, sim, accounts):
        jobs, found = jobs_of(accounts, 10), {}
        for publish in ("null", "www"):
            config = folder / f"{publish}.yaml"
            text = config_text(sim, jobs, f"{interval_s}s", publish=publish)
            write_config(config, f"state: {publish}.db\n{text}")
            with daemon(config, environment(accounts)) as program:
                burst = next_burst(sim, program, interval_s)
                looks = minutes * 60 // interval_s
                found[publish], _ = measured_looks(sim, program, burst, interval_s, looks)
        what = f"CPU of looks at 1,000 jobs x 10 batches for {minutes} min, with publish"
        yield Row(what, found["www"].cpu_s / found["null"].cpu_s, "x", 1.05)
    waits = waits_for_posts(15 if options.quick else 30, "www")
    yield Row(
        "a batch's end to the POST, as above, with publish: median",
        statistics.median(waits),
        "s",
        4,
    )
    yield Row("CPU of an idle daemon, 100 finished jobs, with publish", idle_cpu(60, "www"), "s")


def end_all(sim: Simulated, jobs: Sequence[JobSpec], window_s: float) -> dict[str, float]:
    """End the jobs' batches one after another; returns when each config's last one did."""
    ids = [(str(n), batch_id) for n, job in enumerate(jobs) for batch_id in job.batch_ids]
    ended, started_at = {}, time.monotonic()
    for place, (number, batch_id) in enumerate(ids):
        time.sleep(max(0.0, started_at + window_s * place / len(ids) - time.monotonic()))
        ended[number] = time.monotonic()
        sim.finish(batch_id)
    return ended


def idle_cpu(window_s: float, publish: str = "null") -> float:
    """CPU seconds a minute of a daemon whose jobs are all finished."""
    with simulated([newest(100, others=0)], "completed") as (folder, sim, accounts):
        config, env = folder / "config.yaml", environment(accounts)
        write_config(config, config_text(sim, jobs_of(accounts, 1), "1s", publish=publish))
        run(once(config), env)
        with daemon(config, env) as program:
            time.sleep(3)  # its start is not what is measured
            before, started_at = program.cpu_s(), time.monotonic()
            time.sleep(window_s)
            return (program.cpu_s() - before) / (time.monotonic() - started_at) * 60


@dataclass(slots=True)
class Heartbeats:
    """What the program tells its service manager, and when: its loop turns as often as that."""

    path: Path
    heard: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(self.path))
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            text = listener.recv(4096).decode()
            self.heard.append((time.monotonic(), text))

    def env(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": "300000"}  # every 100 ms

    def times(self, word: str, since: float) -> list[float]:
        return [at for at, text in self.heard if at >= since and word in text]

    def longest_gap_s(self, since: float) -> float:
        times = [since, *(at for at, _ in self.heard if at >= since)]
        return max(b - a for a, b in itertools.pairwise(times))


def measure_reload(_options: argparse.Namespace) -> Iterator[Row]:
    """10,000 jobs, reloaded with one job changed and with all of them, while one is polled."""
    layouts = [newest(10_000), newest(1)]
    with simulated(layouts) as (folder, sim, accounts):
        config = folder / "config.yaml"
        jobs = jobs_of(accounts, 1)
        jobs[-1] = JobSpec(jobs[-1].batch_ids, jobs[-1].account, "1s")
        write_config(config, config_text(sim, jobs, "24h"))
        beats = Heartbeats(folder / "notify")
        with daemon(config, environment(accounts, **beats.env())) as program:
            program.wait_until(lambda: sim.count() > 102, "the first looks")
            time.sleep(3)
            texts = {
                "one of 10,000 jobs changed": config_text(sim, jobs, "24h").replace('"7"', '"x"'),
                "all 10,000 jobs changed": config_text(sim, jobs, "24h", "bench.other"),
            }
            for what, text in texts.items():
                yield from reload_rows(what, config, text, beats=beats, program=program, sim=sim)


def reload_rows(
    what: str, config: Path, text: str, *, beats: Heartbeats, program: Daemon, sim: Simulated
) -> Iterator[Row]:
    """How long a reload takes, and how long it keeps the loop and the looks from going on."""
    sim.reset()
    started_at = time.monotonic()
    write_config(config, text)
    program.wait_until(
        lambda: (
            bool(beats.times("RELOADING=1", started_at))
            and bool(beats.times("READY=1", beats.times("RELOADING=1", started_at)[0]))
        ),
        "the reload",
    )
    begun_at = beats.times("RELOADING=1", started_at)[0]
    done_at = beats.times("READY=1", begun_at)[0]
    time.sleep(2.5)  # the looks after it
    yield Row(f"{what}: file written to config taken", done_at - started_at, "s")
    yield Row("  of which reload", done_at - begun_at, "s")
    yield Row("  the loop stands still for", beats.longest_gap_s(started_at), "s", 1)
    yield Row("  between requests, one job polled every 1s", sim.stats()["longest_gap_s"], "s", 2)


PARTS: Mapping[str, Callable[[argparse.Namespace], Iterator[Cost | Row]]] = {
    "sizes": measure_sizes,
    "requests": measure_scatters,
    "start": measure_start,
    "once": measure_once,
    "latency": measure_latency,
    "publish": measure_publish,
    "reload": measure_reload,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="not 100,000 batches, fewer rounds")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only {', '.join(PARTS)}")
    options = parser.parse_args()
    if options.bare:
        run_bare()
        return 0
    cpus = os.cpu_count()
    print(f"Python {platform.python_version()}, {cpus} CPUs, max_concurrency {CONCURRENCY}\n")
    print(Cost.HEAD, flush=True)
    rows: list[Row] = []
    for name in options.parts or PARTS:
        for line in PARTS[name](options):
            if isinstance(line, Row):
                rows.append(line)
            print(line, flush=True)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
