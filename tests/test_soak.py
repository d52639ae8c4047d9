"""A short soak: `python tests/soak.py --minutes 30` is the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak

SEED = 20261125
SECONDS = 30.0  # and then the time that it takes to end all jobs


@pytest.mark.long
def test_soak(tmp_path: Path) -> None:
    """Among faults, edits and kills, every finished run is started and told exactly once."""
    figures = soak(tmp_path / "work", seconds=SECONDS, seed=SEED, jobs=100)
    assert (figures.duplicates, figures.lost, figures.wrong) == (0, 0, 0), figures
    assert figures.kills >= 1
    assert figures.faults >= 50
    assert figures.found >= 10
    assert figures.triggers >= 100
    assert figures.told >= 100
