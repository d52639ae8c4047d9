"""Killed at any system call, or refused one: one Keboola job each time, and a start that works.

`strace` counts the calls of whole runs that matter: on the state file, on the files beside it, on
sockets. Then a run is killed at the n-th, or its n-th call fails, for every n, and the program is
started again. The WAL of a killed process is cut at the edge and in the middle of each frame.

    python tests/test_syscalls.py [--every N]     # the whole matrix, or each N-th case of it
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import KEBOOLA_TOKEN, OPENAI_KEY, Daemon, Workspace, clean_environment, wait_until
from simulator import Simulator

AT_ONCE = 4
PATIENCE_S = 90.0
HARMS = ("signal=SIGKILL", *(f"error={name}" for name in ("ENOSPC", "EIO", "EINTR", "EMFILE")))
PUBLIC = [f"public/{n}" for n in ("status.json", "metrics.prom", "status.html")]
FILES = [*PUBLIC, *(re.sub("/(.*)", r"/.\1.new", name) for name in PUBLIC)]
# What is counted together: calls on these files. strace counts those of each thread.
PLACES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "state": (
        [f"teckochecker.db{suffix}" for suffix in ("", "-wal", "-shm", "-journal", ".lock")],
        ("openat", "pwrite64", "fdatasync", "unlink"),
    ),
    "files": (["config.yaml", "teckochecker.key", *FILES], ("openat", "rename", "unlink")),
    "sockets": ((), ("connect", "sendto")),
}


def has_strace() -> bool:
    """Whether it is here, and may trace."""
    command = ["strace", "-D", "-o", "/dev/null", "true"]
    return bool(shutil.which("strace")) and subprocess.run(command, check=False).returncode == 0


class Case(NamedTuple):
    """Where a run is harmed, and how."""

    mode: str
    place: str
    call: str
    number: int
    harm: str


class Traced(Workspace):
    """A workspace with one job, whose batch is finished; the program can run under strace there."""

    def __init__(self, directory: Path, sim: Simulator, name: str, mode: str = "daemon") -> None:
        super().__init__(directory / name, sim)
        self.name, self.arguments = name, ["--once"] * (mode == "once")
        self.config["publish"] = "public"
        self.add_job(name, f"batch_{name}")

    def trace(self, place: str, *options: str) -> Daemon:
        """Start it; with `-D` the program is our child, and strace beside it."""
        self.write()
        paths = [word for path in PLACES[place][0] for word in ("-P", str(self.directory / path))]
        strace = ["strace", "-D", "-f", "-o", str(self.directory / "calls"), *paths, *options]
        command = [*strace, *self.command(*self.arguments)]
        self._processes.append(Daemon(command, self.directory, clean_environment()))
        return self._processes[-1]

    def calls(self, process: Daemon) -> str:
        """Return what strace has written, once that is all."""
        log, end = self.directory / "calls", re.compile(f"{process.pid} .*exited")
        wait_until(lambda: end.search(log.read_text()), "strace's last line")
        return log.read_text()

    def run_to_end(self, process: Daemon) -> int:
        """Return the exit code of a pass, or of a daemon that is stopped when all is done."""

        def is_over() -> bool:  # before its config is loaded, SIGTERM kills a daemon
            is_done = bool(process.events_of("config_loaded")) and self.is_finished()
            return not process.is_running() or (is_done and not self.arguments)

        wait_until(is_over, f"the end of {self.name}", PATIENCE_S, every=0.05)
        return process.stop() if process.is_running() else process.wait()

    def is_finished(self) -> bool:
        return [run["phase"] for run in self.runs()] == ["finished"]

    def start_again(self) -> None:
        """See that a start works, and that there is one Keboola job."""
        again = self.start(*self.arguments)
        assert self.run_to_end(again) == 0, again.log()
        assert self.is_finished()
        self.assert_one_job(self.name)


def counted_cases(directory: Path, sim: Simulator) -> Iterator[Case]:
    """Count the calls of whole runs; yields all cases that follow."""
    for mode, (place, (_, calls)) in product(("once", "daemon"), PLACES.items()):
        with closing(Traced(directory, sim, f"{mode}-{place}", mode)) as space:
            process = space.trace(place, "-e", f"trace={','.join(calls)}")
            assert space.run_to_end(process) == 0, process.log()
            found = Counter(re.findall(r"^([0-9]+) +(\w+)\(", space.calls(process), re.MULTILINE))
        for call in calls:
            most = max(n for (_, name), n in found.items() if name == call)
            yield from (Case(mode, place, call, *c) for c in product(range(1, most + 1), HARMS))


def play(case: Case, directory: Path, sim: Simulator) -> str:
    """Harm a run and start again; returns what the harm has done."""
    name = re.sub("[^a-z0-9]", "-", "-".join(map(str, case)).lower())
    with closing(Traced(directory, sim, name, case.mode)) as space:
        inject = f"inject={case.call}:{case.harm}:when={case.number}"
        code = space.run_to_end(space.trace(case.place, "-e", inject))
        codes = {-9, 0} if "SIGKILL" in case.harm else {0, 1}
        if case.place == "files" and "error" in case.harm:
            codes.add(2)  # the config or the key cannot be read
        assert code in codes, code
        space.start_again()
    shutil.rmtree(space.directory)
    outcome = {-9: "killed", 0: "went on"}.get(code, f"ended with {code}")
    return f"{case.mode} {case.call} {case.harm} {outcome}"


def cut_wal(space: Traced, cut: int) -> str:
    """Start with a state whose WAL ends there."""
    with closing(Traced(space.directory / str(cut), space.sim, space.name, "once")) as copy:
        for name in ("teckochecker.db", "teckochecker.db-wal", "teckochecker.db.lock"):
            shutil.copy(space.directory / name, copy.directory)
        os.truncate(copy.directory / "teckochecker.db-wal", cut)
        copy.start_again()
    shutil.rmtree(copy.directory)
    return "WAL cut"


def figures_of(play: Callable[[Any], str], cases: Iterable[Any]) -> Counter[str]:
    """Play cases beside each other; returns what came of them; what should not begins FAILED."""

    def outcome(case: object) -> str:
        try:
            return play(case)
        except (AssertionError, TimeoutError) as error:
            return f"FAILED {case}: {error}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return Counter(pool.map(outcome, cases))


def play_matrix(directory: Path, sim: Simulator, every: int) -> Counter[str]:
    cases = [*counted_cases(directory, sim)]
    return figures_of(partial(play, directory=directory, sim=sim), cases[::every])


def play_cuts(directory: Path, sim: Simulator, every: int) -> Counter[str]:
    """Have a process killed that has done all, and its WAL cut in each frame."""
    with closing(Traced(directory, sim, "wal")) as space:
        process = space.start()
        wait_until(space.is_finished, "the run is finished", PATIENCE_S, every=0.05)
        process.kill()
        size = space.state.with_name("teckochecker.db-wal").stat().st_size
        cuts = [0, 16, *range(32, size + 1, (24 + 4096) // 2)]
        return figures_of(partial(cut_wal, space), cuts[::every])


@pytest.mark.long
@pytest.mark.skipif(not has_strace(), reason="strace is not here, or may not trace")
def test_harmed(tmp_path: Path, sim: Simulator) -> None:
    """At a sample of all system calls, killed there or refused, there is one Keboola job."""
    figures = play_matrix(tmp_path, sim, 61)
    assert [text for text in figures if text.startswith("FAILED")] == []
    assert sum(n for text, n in figures.items() if text.endswith("killed")) > 2


@pytest.mark.long
def test_cut_wal(tmp_path: Path, sim: Simulator) -> None:
    """With a WAL that ends anywhere, the Keboola job is found again, and none is started."""
    figures = play_cuts(tmp_path, sim, 9)
    assert [*figures] == ["WAL cut"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    every, began = parser.parse_args().every, time.monotonic()
    with Simulator() as sim, tempfile.TemporaryDirectory() as directory:
        sim.add_key(OPENAI_KEY)
        sim.add_token(KEBOOLA_TOKEN)
        sim.job_seconds = 0
        figures = play_cuts(Path(directory), sim, every)
        figures += play_matrix(Path(directory), sim, every)
    for text, count in sorted(figures.items()):
        print(f"{count:5}  {text}")
    failed = sum(text.startswith("FAILED") for text in figures)
    print(f"{figures.total()} cases, {failed} failures, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
