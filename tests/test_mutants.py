"""The table of breakages fits the program: what each one changes is there, and so are its tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import MUTANTS, PROGRAM, ROOT, Mutant, mutated

TEXT = (ROOT / PROGRAM).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[str]:
    """The functions, classes and statements of a module: to compile one of them takes no time."""
    lines = text.splitlines(keepends=True)
    starts = [first_line(node) - 1 for node in ast.parse(text).body]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield "".join(lines[start:end])


def first_line(node: ast.stmt) -> int:
    """Where a statement begins, with its decorators."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


BLOCKS = list(blocks(TEXT))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_breakage_fits(mutant: Mutant) -> None:
    """Its old text stands once in the program, which is one afterwards, too, and another one."""
    assert mutated(mutant, TEXT) != TEXT
    (block,) = [block for block in BLOCKS if mutant.old in block]
    compile(mutated(mutant, block), PROGRAM, "exec")


def test_somebody_has_to_notice() -> None:
    """Each of the tests that the table names is there."""
    for test in sorted({test for mutant in MUTANTS for test in mutant.tests}):
        file, _, name = test.partition("::")
        source = Path(__file__).with_name(file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), test
    assert all(mutant.tests for mutant in MUTANTS)


def test_names_are_different() -> None:
    """What the script prints tells which breakage it was."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
