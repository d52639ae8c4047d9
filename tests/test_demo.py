"""The demo of the README, as a reader runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import outcome_of


@pytest.mark.long
def test_demo() -> None:
    """It shows each piece of work started once, within half a minute, and exits 0."""
    command = [sys.executable, "-W", "error", Path(__file__).with_name("demo.py")]
    done = outcome_of(command, timeout=30)
    assert (done.code, done.stderr) == (0, ""), done.stdout
    assert "\nChecked: exactly one Keboola job for each of translations, nightly/" in done.stdout
