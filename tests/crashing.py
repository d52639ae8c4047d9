"""Runs teckochecker and kills it, as kill -9 does, right before or after one of its commits.

    python tests/crashing.py PHASE before|after NUMBER [TECKOCHECKER'S ARGUMENTS]

The commit is the NUMBERth one that brings a run into PHASE. What no other process can time is
timed here, around the program instead of in it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import teckochecker as program


class CrashingStore(program.Store):
    """The state file's store, up to the commit at which the process ends."""

    phase = ""
    when = ""
    commits_left = 0

    def commit(
        self,
        runs: Iterable[tuple[program.Run | None, program.Run]],
        events: Iterable[program.Event],
        now: float,
        also: Sequence[program.Statement] = (),
    ) -> list[program.Event]:
        """Commit, unless this is the moment."""
        runs = list(runs)
        for _, after in runs:
            stored = self.one("SELECT phase FROM runs WHERE id = ?", after.id)
            if after.phase == self.phase != stored:
                type(self).commits_left -= 1
        is_the_one = self.commits_left <= 0
        if is_the_one and self.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        told = super().commit(runs, events, now, also)
        if is_the_one and self.when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return told


def main(arguments: Sequence[str]) -> int:
    CrashingStore.phase, CrashingStore.when, number, *rest = arguments
    CrashingStore.commits_left = int(number)
    program.Store = CrashingStore  # type: ignore[misc]
    return program.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
