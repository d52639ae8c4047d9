"""Runs teckochecker and kills it, as kill -9 does, right before or after one of its commits.

    python tests/crashing.py STATE before|after NUMBER [TECKOCHECKER'S ARGUMENTS]

The commit is the NUMBERth one that brings a trigger into STATE. What no other process can time
is timed here, around the program instead of in it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import teckochecker as program


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class CrashingStore(program.Store):
    """The state file's store, up to the commit at which the process ends."""

    state = ""
    when = ""
    commits_left = 0

    def save(
        self,
        changes: Iterable[tuple[program.Work, program.Work]],
        events: Sequence[program.Event],
        now: float,
        mail: program.Mail = program.NO_MAIL,
    ) -> None:
        """Save, unless this is the moment."""
        changes = list(changes)
        for before, after in changes:
            old, new = before.trigger, after.trigger
            if new and new.state == self.state and (old is None or old.state != new.state):
                type(self).commits_left -= 1
        is_the_one = self.commits_left == 0
        if is_the_one and self.when == "before":
            die()
        super().save(changes, events, now, mail)
        if is_the_one and self.when == "after":
            die()


def main(arguments: Sequence[str]) -> int:
    state, when, number, *rest = arguments
    CrashingStore.state, CrashingStore.when = state, when
    CrashingStore.commits_left = int(number)
    program.Store = CrashingStore  # type: ignore[misc]
    return program.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
