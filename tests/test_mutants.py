"""The table of breakages fits the program, and each of them is noticed."""

from __future__ import annotations

import ast

import pytest
from mutants import MUTANTS, PROGRAM, ROOT, TESTS, Mutant, mutated, survivors

TEXT = (ROOT / PROGRAM).read_text(encoding="utf-8")


def test_table() -> None:
    """There are at least sixty, each with a name of its own and tests to notice it."""
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {letter for mutant in MUTANTS for letter in mutant.tests} == set(TESTS)


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_fits(mutant: Mutant) -> None:
    """Its place is in the program once, and what comes out is another program."""
    broken = mutated(mutant, TEXT)
    assert broken != TEXT
    ast.parse(broken)


@pytest.mark.long
def test_caught() -> None:
    """No breakage gets through: every fourth of them here, all with `python tests/mutants.py`."""
    assert survivors(MUTANTS[::4]) == []
