"""The simulator, and a workspace for the program that is pointed at it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import KEBOOLA_TOKEN, OPENAI_KEY, Workspace
from simulator import Simulator

# A shell that starts us in the background has SIGINT ignored, and the program would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def sim(caplog: pytest.LogCaptureFixture) -> Iterator[Simulator]:
    """OpenAI and Keboola, with a key and a token that they know."""
    with Simulator() as simulator:
        simulator.add_key(OPENAI_KEY)
        simulator.add_token(KEBOOLA_TOKEN)
        simulator.job_seconds = 0
        yield simulator
    # What goes wrong inside the event loop is only logged by asyncio.
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.fixture
def workspace(tmp_path: Path, sim: Simulator) -> Iterator[Workspace]:
    """A config without jobs yet; whatever was started in it ends with the test."""
    space = Workspace(tmp_path / "work", sim)
    try:
        yield space
    finally:
        space.close()
