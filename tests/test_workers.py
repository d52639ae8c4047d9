"""The processes that run the tests: what pytest itself would say of a test comes home."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import workers
from harness import PATIENCE_S, clean_environment, wait_until

GOOD = """
def test_first(): print("of the first")
def test_second(): pass
"""
BAD = """
import pytest

@pytest.fixture
def broken(): raise ValueError("no fixture")

def test_fails():
    print("of the failing")
    assert 1 == 2

def test_without_fixture(broken): pass
def test_left_out(): pytest.skip("not today")
"""
DYING = """
import os

def test_well(): pass
def test_dies(): os._exit(0)
def test_never_begun(): pass
"""
WAITING = """
import pathlib, threading, pytest

@pytest.fixture
def thing():
    yield
    pathlib.Path("ended").touch()

def test_waits(thing):
    pathlib.Path("begun").touch()
    threading.Event().wait(120)
"""
FAILING = """
import pathlib, time

def test_fails():
    while not pathlib.Path("begun").exists(): time.sleep(0.01)
    assert 0
"""
GOING = """
import pathlib, time

def test_waits():
    pathlib.Path("begun").touch()
    while not pathlib.Path("killed").exists(): time.sleep(0.01)

def test_next(): pathlib.Path("went on").touch()
"""


def start(folder: Path, *options: str, **files: str) -> subprocess.Popen[str]:
    """A pytest of its own with these files, each of which has its process."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "workers", f"--workers={len(files)}"]
    return subprocess.Popen(
        [*command, *options, f"--rootdir={folder}", f"--basetemp={folder}/temp"],
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(Path(workers.__file__).parent)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_everything_is_reported(tmp_path: Path) -> None:
    """Passes, failures with their output, errors and skips come home; what does not has failed."""
    with start(tmp_path, "-rA", good=GOOD, bad=BAD, dying=DYING) as process:
        out, _ = process.communicate(timeout=PATIENCE_S * 3)
    assert process.returncode == 1
    assert set(re.findall(r"^[A-Z]+ (?:\[1\] )?test_.*", out, re.MULTILINE)) == {
        "PASSED test_good.py::test_first",
        "PASSED test_good.py::test_second",
        "FAILED test_bad.py::test_fails - assert 1 == 2",
        "ERROR test_bad.py::test_without_fixture - ValueError: no fixture",
        "SKIPPED [1] test_bad.py:12: not today",
        "PASSED test_dying.py::test_well",
        "FAILED test_dying.py::test_dies - the process that ran its file has died",
        "FAILED test_dying.py::test_never_begun - the process that ran its file has died",
    }
    assert re.search(
        r"_ test_fails _+\n(?:.*\n)+?-+ Captured stdout call -+\nof the failing\n", out
    )
    assert "3 failed, 3 passed, 1 skipped, 1 error" in out


def test_first_failure(tmp_path: Path) -> None:
    """With -x, what still runs is interrupted, and its fixtures end what they have begun."""
    with start(tmp_path, "-x", waiting=WAITING, failing=FAILING) as process:
        out, _ = process.communicate(timeout=PATIENCE_S * 3)
    assert process.returncode == pytest.ExitCode.TESTS_FAILED, out
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("send", "number", "code"),
    [
        (os.kill, signal.SIGINT, pytest.ExitCode.INTERRUPTED),
        (os.killpg, signal.SIGINT, pytest.ExitCode.INTERRUPTED),
        (os.killpg, signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_interrupted(
    tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals, code: int
) -> None:
    """The same after a signal, whether pytest alone gets it or, as with Ctrl-C, every process."""
    with start(tmp_path, waiting=WAITING, good=GOOD) as process:
        wait_until((tmp_path / "begun").exists, "the test that waits")
        send(process.pid, number)
        out, _ = process.communicate(timeout=PATIENCE_S * 3)  # until nobody can write to it
    assert process.returncode == code, out
    assert (tmp_path / "ended").exists()


def test_killed(tmp_path: Path) -> None:
    """Without pytest's process, the others end after the test that they are at."""
    with start(tmp_path, going=GOING, other=GOING) as process:
        wait_until((tmp_path / "begun").exists, "a test that waits")
        process.kill()
        process.wait(PATIENCE_S)
        (tmp_path / "killed").touch()
        out, _ = process.communicate(timeout=PATIENCE_S * 3)
    assert not (tmp_path / "went on").exists(), out
