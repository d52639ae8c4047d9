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
    assert [figures[name] for name in ("duplicates", "lost", "wrong")] == [0, 0, 0], figures
    least = {"kills": 1, "faults": 50, "triggers of match jobs": 10, "triggers": 100}
    assert [
        n for n, least_n in (least | {"events told": 100}).items() if figures[n] < least_n
    ] == []
