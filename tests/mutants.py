#!/usr/bin/env python3
"""Proof that the tests can fail: breaks the program in one place, and has them notice.

    python tests/mutants.py                     every breakage of the table below
    python tests/mutants.py grace "no search"   those whose names have one of these words

Each breakage is made in a copy of the project and meets only the tests that are there to notice it.
Exit codes: 0 all were caught; 1 some survived, which is a bug of the tests; 2 the table does not
fit the program, or the tests fail without any breakage.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "teckochecker.py"
COPIED = (PROGRAM, "tests", "pyproject.toml", "config.example.yaml", "systemd", "README.md")
TIMEOUT_S = 120.0  # for one breakage: a test that hangs has noticed something, too
TESTS = {
    "D": "test_decisions.py",
    "G": "test_guards.py",
    "M": "test_model.py::test_quick",
    "T": "test_trigger.py::test_several_matches",
}


class Mutant(NamedTuple):
    """A breakage: who must notice, its name, what stands in the program, and what instead."""

    tests: str  # letters of TESTS
    name: str
    old: str  # exactly once in the program, whatever the white space
    new: str


def table(text: str) -> list[Mutant]:
    """Return the mutants of a table: `TESTS: name`, and below `old => new`."""
    mutants = []
    for tests, name, change in re.findall(r"^([A-Z]+): (.*)\n((?:    .*\n)+)", text, re.MULTILINE):
        old, _, new = change.partition("=>")
        mutants.append(Mutant(tests, name, old.strip(), re.sub(r"\\n\n?", "\n", new.strip())))
    return mutants


MUTANTS = table(r"""
M: intent not committed before the search
    engine.commit([(aimed, [Event.of("trigger_intended", run, **facts)] if is_new else [])])
    => engine.runs[run.id] = aimed
M: sending not committed before the POST
    engine.commit([(after, events)])  # nothing was awaited since the search was judged
    => engine.runs[run.id] = after
M: POST although the commit of sending failed
    engine.commit([(after, events)])  # nothing was awaited since the search was judged
    => with contextlib.suppress(StorageError): engine.commit([(after, events)])
G: synchronous=NORMAL
    PRAGMA synchronous = FULL => PRAGMA synchronous = NORMAL
G: a transaction that fails keeps its first half
    with self.db:  # commits, or rolls back => if True:
M: no search before the POST
    began, came = await keboola.search(run.target, since, run.trigger_id)
    => began, came = await asyncio.sleep(1, (clock.boot_time(), []))
D: one empty search instead of two
    if not (is_late and run.empty_searches >= 2): => if not (is_late and run.empty_searches >= 1):
D: grace ignored
    is_late = elapsed_s >= run.repeat_after_s => is_late = True
M: grace ignored, as histories see it
    is_late = elapsed_s >= run.repeat_after_s => is_late = True
D: grace counted to the search's end
    run.unknown_since.until_s(began) if run.unknown_since
    => run.unknown_since.until_s(terms.boot_time) if run.unknown_since
D: searches before the last POST counted
    empty_searches=0, forced=False, => forced=False,
D: force outlives its POST
    empty_searches=0, forced=False, => empty_searches=0,
D: sending found at the start is an intent
    return after_post(replace(run, **late), lost, terms)
    => return replace(run, **late, phase=Phase.INTENT), []
M: sending found at the start is an intent, and its search counts
    return after_post(replace(run, **late), lost, terms)
    => return replace(run, **late, phase=Phase.INTENT), []
D: id computed again
    trigger_id=run.trigger_id or own_id => trigger_id=own_id
D: batches of the id not sorted
    ids = sorted(batch.id for batch in run.batches)
    identity => ids = [batch.id for batch in run.batches]\n
    identity
D: a group's id like a set's
    identity = [2, run.job, run.group, run.rerun] if run.group else
    => identity = [1, run.job, run.group, run.rerun] if run.group else
M: a sent trigger follows the config
    if job and run.sending_at is None:  # nothing was sent => if job:  # nothing was sent
M: a token of another project
    if await keboola.project() == target.project: => if await keboola.project():
M: an incomplete search says nothing is there
    if not ours and failure: => if False:
M: first page of the search only
    if not jobs or (not fresh and (len(jobs) < longest or has_no_offset)): => if jobs is not None:
M: a stale outcome is stored after a rename
    run = engine.runs[run_id]  # a reload may have renamed it meanwhile => pass
M: pages without overlap
    (min(times) + timedelta(seconds=1)) => (min(times) - timedelta(seconds=1))
M: rows that do not tell count as foreign
    (await self.job(job_id)).trigger_id or "" => ""
D: the newest of several
    (ours, *others), now = jobs, terms.now => (*others, ours), now = jobs, terms.now
T: the newest of several first
    len(job.id), job.id)) => len(job.id), job.id), reverse=True)
G: redirects followed
    follow_redirects=False, => follow_redirects=True,
G: what was sent counts as not sent
    sent = any(event.endswith("send_request_headers.started") for event in events)
    => sent = False
G: what was not sent counts as sent
    sent = any(event.endswith("send_request_headers.started") for event in events)
    => sent = True
M: the outcome given up on a full disk
    (PATIENCE_S if engine.once else math.inf) => -1
M: two drivers for one run
    if driver is None or driver.done(): => if True:
M: files deleted under the process
    if not (self.store.is_in_place() and self.lock.is_in_place()): => if False:
M: lock file deleted under the process
    if not (self.store.is_in_place() and self.lock.is_in_place()):
    => if not self.store.is_in_place():
M: state file deleted under the process
    if not (self.store.is_in_place() and self.lock.is_in_place()):
    => if not self.lock.is_in_place():
G: the lock not taken
    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB) => pass
M: last POST not noted
    engine.lock.note_post(clock.boot_time()) => pass
M: an older state file trusted
    if not came and began.uptime_s < engine.empty_counts_from: => if False:
G: a clock set forward over a reboot
    return min(by_clock_s, now.uptime_s) if now.boot else by_clock_s => return by_clock_s
D: a final batch overwritten
    if known.is_final: => if False:
D: a terminal status overwritten
    came = replace(known, files_due_at=None, **late) => came = replace(came, **late)
G: cancellation is an error to retry
    lambda e: isinstance(e, ApiError) and e.retryable)
    => lambda e: not isinstance(e, ApiError) or e.retryable)
D: a file is not waited for
    and (lacks_output or lacks_errors) and now < due_at: => and False:
D: a file is waited for without end
    and (lacks_output or lacks_errors) and now < due_at: => and (lacks_output or lacks_errors):
D: a late batch joins after the start
    room = 1000 - count if run.phase is Phase.POLLING else 0 => room = 1000 - count
D: a group starts before its size
    unclear or len(run.batches) < int(size) => unclear
M: a group starts before its size, as histories see it
    unclear or len(run.batches) < int(size) => unclear
D: a group starts before it has settled
    whole_at = (run.joined_at or now) + job.settle => whole_at = now
M: since ignored
    is_new = (self.batch.created_at or 0.0) >= job.since => is_new = True
D: since ignored by a row
    is_new = (self.batch.created_at or 0.0) >= job.since => is_new = True
D: a start at the deadline forgets the pending
    kind = "pending" if not b.is_terminal else => kind =
D: a deadline from the newest batch
    due_at = min(created) + job.deadline => due_at = max(created) + job.deadline
D: a deadline always starts
    (now >= due_at and job.on_deadline == "start") => now >= due_at
D: a rerun counted twice
    rerun=run.rerun + 1, **kept) => rerun=run.rerun + 2, **kept)
M: the overlap of the list left out
    read_to[job.name] - HOUR_S) => read_to[job.name])
D: a new name is new work
    if own or claims: => if own:
D: another target takes over
    claims = [run for run in left if target in {str(run.target), last.get(run.job)}]
    => claims = left
D: a job that is there loses its runs to another
    left = [run for run in known if run.job not in jobs and run.id not in taken]
    => left = [run for run in known if run.id not in taken]
M: a paused job is started
    return job is not None and not job.rests and not self.is_stopping
    => return job is not None and not self.is_stopping
D: no answer counts as not sent
    if not came.sent: => if not came.sent or came.status is None:
D: 5xx counts as rejected
    not 400 <= came.status < 500 or came.status in {408, 429}
    => came.status < 400 or came.status in {408, 429}
D: 429 counts as rejected
    came.status in {408, 429}: => came.status in {408}:
D: 408 counts as rejected
    came.status in {408, 429}: => came.status in {429}:
D: a rejected run keeps its target
    phase=Phase.REJECTED, sending_at=None, => phase=Phase.REJECTED,
D: Retry-After of an unknown outcome ignored
    max(grace_s if run.repeat_after_s == 0 else doubled, min(asked_s, HOUR_S))
    => (grace_s if run.repeat_after_s == 0 else doubled)
D: repeats without a longer wait
    max(1.0, 2 * run.repeat_after_s)) => max(1.0, run.repeat_after_s))
D: no backoff
    first_s * 2.0 ** min(max(failures, 1) - 1, 16) => first_s
D: started while a search failed
    if not (run.forced and terms.may_post): => if not terms.may_post:
D: a day of margin left out of the search
    return min(known, now, run.sending_at or now) - DAY_S
    => return min(known, now, run.sending_at or now)
D: terminated is started again
    if came.status == "error" and run.retries < retries: => if run.retries < retries:
D: one retry too many
    run.retries < retries: => run.retries <= retries:
D: a rerun remembers its POSTs
    run = Run(run.id, run.job, run.target, run.group, run.batches, rerun=run.rerun + 1, **kept)
    => run = replace(run, trigger_id="", rerun=run.rerun + 1)
D: all_completed takes what has no success
    b.status != "completed" or b.completed == 0] => b.status != "completed"]
D: a wait far in the future is kept
    or now + HOUR_S < run.next_at < math.inf: => or False:
D: a failure that lasts is no attention
    now - run.error_since > LASTING_S => now - run.error_since > 1000 * LASTING_S
D: a group's size from its last batch alone
    | {run.size}) - {""} => ) - {""}
M: a run is not stored
    yield insert("runs", run, run.target, **row) => pass
D: a late batch starts a run of its own
    run = runs.get(group) or Run(
    => run = runs.get(group)\n
        run = run if run and run.phase is Phase.POLLING else Run(
D: a failed poll fails the run
    after, told = terms.put_off(after, event, error, job.poll_interval)
    => after, told = replace(after, error="", phase=Phase.REFUSED), []
D: what waits does not move with the clock
    "next_at", "error_since", "intended_at", "joined_at") moved
    => "error_since", "intended_at", "joined_at")\n    moved
G: POST over a kept connection
    kept = 0 if method == "POST" else 10 => kept = 10
M: groups are not renamed with their job
    if old := next((other for other, its in left.items() if its == key), None): => if old := None:
D: a stale retry taken
    run.rerun != request.rerun or (
    run.phase != request.phase and (request.phase in finished or run.phase is Phase.UNKNOWN))
    => False
G: last POST not written
    if at := self.last_post: => if not (at := BootTime(0)):
D: one pair of match is enough
    return is_new and all( => return is_new and any(
""")


def pattern(old: str) -> re.Pattern[str]:
    return re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", old))))


def mutated(mutant: Mutant, text: str) -> str:
    """Return the program with a breakage. Raises ValueError if its place is not there, once."""
    found = pattern(mutant.old).findall(text)
    if len(found) != 1:
        raise ValueError(f"{mutant.name}: its place is in the program {len(found)} times")
    return text.replace(found[0], mutant.new)


def copied(mutants: Sequence[Mutant], directory: Path) -> Path:
    """Return a copy of the project with these breakages."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, directory / name)
    text = (ROOT / PROGRAM).read_text(encoding="utf-8")
    for mutant in mutants:
        text = mutated(mutant, text)
    (directory / PROGRAM).write_text(text, encoding="utf-8")
    return directory


def is_caught(mutants: Sequence[Mutant], letters: str) -> tuple[bool, str]:
    """Return whether tests fail with these breakages, and what they said."""
    with tempfile.TemporaryDirectory() as directory:
        root = copied(mutants, Path(directory))
        tests = [str(root / "tests" / TESTS[letter]) for letter in letters]
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["--tb=line", *tests]
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return True, "it took too long"
    if done.returncode > 1:
        raise ValueError(f"{[m.name for m in mutants]}: no test ran: {done.stdout}{done.stderr}")
    return done.returncode == 1, done.stdout


def survivors(mutants: Sequence[Mutant]) -> list[str]:
    """Return the names of the breakages that no test notices. Raises ValueError."""
    caught, said = is_caught([], "".join(TESTS))
    if caught:
        raise ValueError(f"the tests fail without any breakage: {said}")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda mutant: is_caught([mutant], mutant.tests)[0], mutants)
        return [m.name for m, is_one in zip(mutants, results, strict=True) if not is_one]


def main(words: Sequence[str]) -> int:
    mutants = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    try:
        alive = survivors(mutants)
    except ValueError as error:
        print(error)
        return 2
    for name in alive:
        print(f"survived: {name}")
    print(f"{len(mutants) - len(alive)} of {len(mutants)} were caught")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
