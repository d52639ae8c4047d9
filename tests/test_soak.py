"""The soak, for a minute: `python tests/soak.py --minutes 30` is the whole of it."""

from __future__ import annotations

from pathlib import Path

from soak import soak

SEED = 20261123
SECONDS = 60.0  # and then the time that it takes to end all jobs


def test_soak(tmp_path: Path) -> None:
    """Among faults, edits and kills, every finished job is started exactly once."""
    figures = soak(tmp_path / "work", seconds=SECONDS, seed=SEED, jobs=200)
    assert (figures.duplicates, figures.lost, figures.wrong) == (0, 0, 0), figures
    assert figures.kills >= 1
    assert figures.faults >= 100
    assert figures.triggers >= 100
