"""Runs the files of tests beside each other, in a few processes: most of their time is waiting.

    python -m pytest --workers 1        # in pytest's process alone

The processes are forks of pytest's, made when it has collected the tests. Each takes the next file
that nobody has taken, runs its tests one after the other as pytest does, and sends home what there
is to report of them. Names, failures, durations, `-x`, Ctrl-C and the exit code stay as they are.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

FORK = multiprocessing.get_context("fork")
CORES = os.cpu_count() or 1
# They begin first, so that none of them is left alone at the end.
LONGEST = (
    "test_nspawn.py",
    "test_soak.py",
    "test_crash.py",
    "test_hostile.py",
    "test_trigger.py",
    "test_storage.py",
)

Files = Sequence[Sequence[pytest.Item]]
Data = dict[str, Any]  # a report as it travels


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--workers`."""
    what = f"how many processes run files of tests (default: {CORES + 1}, one more than cores)"
    parser.addoption("--workers", type=int, default=CORES + 1, metavar="N", help=what)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Takes the place of pytest's own loop, where there is more than one file to run."""
    option, files = session.config.option, files_of(session)
    workers = min(option.workers, len(files))
    if workers < 2 or option.usepdb or option.collectonly or session.testsfailed:
        return None
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one for all
    with closing(Team(session)) as team:
        team.start(files, workers)
        team.report()
    return True


def files_of(session: pytest.Session) -> Files:
    """The tests by their files, the longest ones first."""
    files: dict[Path, list[pytest.Item]] = defaultdict(list)
    for item in session.items:
        files[item.path].append(item)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    return [files[path] for path in sorted(files, key=lambda path: ranks.get(path.name, 99))]


# ---- at home ----


class Team:
    """The processes, and whose reports are still to come."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._unheard = {item.nodeid: item for item in session.items}
        self._homes: list[Connection] = []
        self._processes: list[ForkProcess] = []

    def start(self, files: Files, workers: int) -> None:
        """Starts the processes."""
        next_file = FORK.Value("i", 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # amid a fork it would be lost
        for _ in range(workers):
            home, away = FORK.Pipe(duplex=False)
            self._homes.append(home)
            arguments = (self._session, files, next_file, away, self._homes)
            self._processes.append(FORK.Process(target=work, args=arguments))
            self._processes[-1].start()
            away.close()  # each end is in one process alone, so that the other notices its death
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def report(self) -> None:
        """Reports each test as it comes home, and those that never do."""
        homes = list(self._homes)
        while homes:
            for home in wait(homes):
                assert isinstance(home, Connection)
                try:
                    nodeid, travelled = home.recv()
                except (EOFError, OSError):
                    homes.remove(home)
                else:
                    self._report(nodeid, map(self._unpacked, travelled))
        for nodeid, item in [*self._unheard.items()]:
            why = "the process that ran its file has died"
            lost = pytest.TestReport(nodeid, item.location, {}, "failed", why, "call")
            self._report(nodeid, [lost])

    def _unpacked(self, data: Data) -> pytest.TestReport:
        config = self._session.config
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        assert isinstance(report, pytest.TestReport)
        return report

    def _report(self, nodeid: str, reports: Iterable[pytest.TestReport]) -> None:
        """Says of a test what pytest's own loop says of it."""
        session, hook = self._session, self._session.config.hook
        location = self._unheard.pop(nodeid).location
        hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    def close(self) -> None:
        """Interrupts what still runs: as after Ctrl-C, fixtures end what they have begun."""
        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        for process in self._processes:
            process.join()


# ---- away ----


class Reports:
    """What pytest reports of a test, in a form that can travel."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._data: list[Data] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._data.append(hook.pytest_report_to_serializable(config=self._config, report=report))

    def take(self) -> list[Data]:
        """All since the last time."""
        taken, self._data = self._data, []
        return taken


def work(
    session: pytest.Session,
    files: Files,
    next_file: Synchronized[int],
    away: Connection,
    homes: Sequence[Connection],
) -> None:
    """Runs one file after the other, as long as there is one."""
    for home in homes:
        home.close()
    keep_to_oneself(session.config)
    reports = Reports(session.config)
    session.config.pluginmanager.register(reports)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while (taken := take_number(next_file)) < len(files):
            for item, following in itertools.pairwise([*files[taken], None]):
                assert item
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                away.send((item.nodeid, reports.take()))
    except (KeyboardInterrupt, BrokenPipeError):
        session._setupstate.teardown_exact(None)


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Interrupts once: a terminal's Ctrl-C comes here by itself, and then from home as well."""
    signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def keep_to_oneself(config: pytest.Config) -> None:
    """Shows nothing, and captures output into files of its own: a fork shares those it had."""
    if terminal := config.pluginmanager.getplugin("terminalreporter"):
        config.pluginmanager.unregister(terminal)
    if capture := config.pluginmanager.getplugin("capturemanager"):
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()


def take_number(counter: Synchronized[int]) -> int:
    with counter.get_lock():
        counter.value += 1
        return counter.value - 1
