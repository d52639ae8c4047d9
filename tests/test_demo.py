"""The demo of the README, as a reader runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import clean_environment


@pytest.mark.long
def test_demo() -> None:
    """It shows each piece of work started once, within half a minute, and exits 0."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("demo.py"))],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "\nChecked: exactly one Keboola job for each of translations, nightly/" in done.stdout
