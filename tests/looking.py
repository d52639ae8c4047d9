"""Runs teckochecker and has it tell where each look at an account ends, in its log.

    python tests/looking.py [TECKOCHECKER'S ARGUMENTS]

A look's last request is over when it says `look_ended`; the next look begins after that.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import teckochecker as program

PARTS = {"Poller._ask", "Poller._ask_for"}  # what a look leaves to tasks
KEY_END = 8  # characters of an account's key, which tell accounts apart and are no secret


class TellingPoller(program.Poller):
    """Looks, waits for all that the look has begun, and tells of it."""

    async def _look(self, watches: Sequence[program.Watch]) -> None:
        await super()._look(watches)
        parts = [task for task in asyncio.all_tasks() if self._is_part(task.get_coro())]
        if parts:
            await asyncio.wait(parts)
        key = self._client._headers["Authorization"][-KEY_END:]
        program.say(program.Event("look_ended", fields={"account": key, "works": len(watches)}))

    def _is_part(self, work: object) -> bool:
        """Return whether this account's look runs in it."""
        frame = getattr(work, "cr_frame", None)
        is_mine = frame is not None and frame.f_locals.get("self") is self
        return is_mine and getattr(work, "__qualname__", "") in PARTS


if __name__ == "__main__":
    program.Poller = TellingPoller  # type: ignore[misc]
    sys.exit(program.main(sys.argv[1:]))
