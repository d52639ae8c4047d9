"""What follows for a run from what came in: tables of pure functions, without I/O and clocks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import teckochecker as tc
from teckochecker import ApiError, Batch, BootTime, Job, KeboolaJob, Phase, Row, Run

NOW, DAY_S, INF = 1_800_000_000.0, 86400, math.inf
TARGET = tc.Target("https://connection.x.test", "app", "7", project="1")
JOB = Job("job", "openai", "keboola", "app", "7", ("a", "b"))
GROUPED = replace(JOB, batch_ids=(), match=(("k", "v"),), group_by="run", settle=900)
DONE = Batch("a", "completed", 1, 1, 0, output_file_id="f", created_at=NOW - 500, ended_at=NOW - 50)
BAD = replace(DONE, id="b", status="failed", completed=0, output_file_id=None)
BUSY = Batch("b", "in_progress", created_at=NOW - 400)
RUN = Run(1, "job", TARGET, batches=(DONE, BAD))
TERMS = tc.Terms(JOB, BootTime(NOW, "boot", 1000.0), jitter=1.0, may_post=True)
INTENT = replace(RUN, phase=Phase.INTENT)
UNKNOWN = replace(RUN, phase=Phase.UNKNOWN, sending_at=NOW, posts=1, repeat_after_s=60.0)
UNKNOWN = replace(UNKNOWN, unknown_since=BootTime(NOW, "boot", 900.0), post_error="lost")
SENT = replace(RUN, phase=Phase.SENT, keboola_job_id="5", keboola_status="waiting")
ENDED = replace(RUN, phase=Phase.FINISHED)


def names(events: list[tc.Event]) -> list[str]:
    return [event.name for event in events]


def keboola_job(job_id: str = "5", status: str = "created") -> KeboolaJob:
    is_finished = status not in {"created", "processing"}
    return KeboolaJob(job_id, status, is_finished, "1", "boom", None, None)


def trigger_id(job: str, group: str, ids: str, rerun: int) -> str:
    batches = tuple(map(Batch, ids))
    return tc.as_intended(Run(1, job, TARGET, group, batches, rerun=rerun), NOW).trigger_id


def test_trigger_id() -> None:
    """The id is that of the design, whatever the order of the batches."""
    # SHA-256 of [1,"job",["a","b"],0] and so on, made without the program
    for job, group, ids, rerun, digest in (
        ("job", "", "ba", 0, "e409c462972d0e8c3d354d88dc7d900c94539f918f1bbee13b6b40aaad1d8145"),
        ("job", "", "ab", 3, "88c231d0407071be1778aefcf32c6bcb210bc6d03a38ccadee5efef055b0e188"),
        ("job", "x", "a", 0, "afcae36e2f3f431c7f6644f914e38fa8b684f43d6b8ae6468df57d9997be2b01"),
        ("jöb", "", "a", 0, "5f43590bad0ccec07de39f53a6397807a59e676ba1caec82b142014d2dbc2d8f"),
    ):
        assert trigger_id(job, group, ids, rerun) == digest


def test_terminal_is_for_ever() -> None:
    """A final batch takes nothing more; a finished one whose file is late takes files alone."""
    assert tc.merged(DONE, replace(BUSY, output_file_id="other"), NOW) == DONE
    late = tc.merged(BUSY, replace(DONE, output_file_id=None), NOW)
    assert (late.status, late.files_due_at) == ("completed", NOW + 300)
    uncounted = replace(DONE, total=3, completed=0, failed=0, output_file_id=None)
    assert tc.merged(BUSY, uncounted, NOW).files_due_at == NOW + 300  # counts are late as well
    came = tc.merged(late, replace(DONE, status="in_progress", output_file_id="f2"), NOW + 10)
    assert (came.status, came.output_file_id, came.files_due_at) == ("completed", "f2", None)
    assert tc.merged(late, replace(late, files_due_at=None), NOW + 300).files_due_at is None


def test_poll() -> None:
    """A failed poll makes a run wait longer each time, and never fails it; a good one ends that."""
    run, error = replace(RUN, batches=(DONE, BUSY)), ApiError("gone", status=404)
    after, events = tc.after_poll(run, JOB, {"b": error}, TERMS, INF)
    assert (after.phase, after.error, after.next_at) == (Phase.POLLING, "b: gone", NOW + 30)
    assert names(events) == ["poll_failed"]
    again, events = tc.after_poll(after, JOB, {"b": error}, TERMS, INF)
    assert (again.next_at, again.error_since, events) == (NOW + 60, NOW, [])
    slow = ApiError("busy", retry_after_s=500.0)
    assert tc.after_poll(run, JOB, {"b": slow}, TERMS, INF)[0].next_at == NOW + 500
    good, events = tc.after_poll(again, JOB, {"b": BAD}, TERMS, INF)
    assert (good.phase, good.error) == (Phase.INTENT, None)
    assert names(events) == ["batch_status_changed", "poll_recovered"]


def test_start() -> None:
    """A run starts when all of its batches have ended, with an id that it keeps."""
    for batch in (BUSY, replace(BAD, files_due_at=NOW + 9)):
        assert tc.decide(replace(RUN, batches=(DONE, batch)), JOB, NOW).phase is Phase.POLLING
    ready = tc.decide(RUN, JOB, NOW)
    assert (ready.phase, ready.intended_at) == (Phase.INTENT, NOW)
    assert ready.trigger_id == trigger_id("job", "", "ab", 0)
    assert tc.decide(replace(RUN, job="new", trigger_id="old"), JOB, NOW).trigger_id == "old"


def test_deadline() -> None:
    """A deadline counts from the oldest batch; it is told, or starts with what has ended."""
    run, job = replace(RUN, batches=(BAD, BUSY), next_at=NOW + 60), replace(JOB, deadline=500)
    told = tc.decide(run, job, NOW)
    assert (told.phase, told.deadline_told) == (Phase.POLLING, True)
    early = tc.decide(run, replace(job, deadline=520), NOW)
    assert (early.deadline_told, early.next_at) == (False, NOW + 20)
    job = replace(job, on_deadline="start")
    body = tc.as_aimed(tc.decide(run, job, NOW), JOB, TARGET, tc.Secret("t")).payload
    assert '{"name":"batch_ids_pending","value":"[\\"b\\"]"}' in body
    assert tc.decide(run, replace(job, trigger_on="all_completed"), NOW).phase is Phase.REFUSED
    grouped = replace(GROUPED, deadline=500, on_deadline="start", group_size="9")
    assert tc.decide(replace(run, group="g"), grouped, NOW).phase is Phase.INTENT


def test_whole() -> None:
    """A group is whole at its size or, without one, when none has joined for `settle`."""
    rows: list[tuple[str | None, str, float, object]] = [
        (None, "", 899, (Phase.POLLING, NOW + 1, None)),
        (None, "", 900, (Phase.INTENT, NOW, None)),
        ("2", "", 0, (Phase.INTENT, NOW, None)),
        ("3", "", 0, (Phase.POLLING, INF, None)),
        ("metadata.n", "2", 0, (Phase.INTENT, NOW, None)),
        ("metadata.n", "odd", 0, (Phase.POLLING, INF, "the size of the group is unclear: odd")),
    ]
    for group_size, size, joined_s, whole in rows:
        run = replace(RUN, size=size, joined_at=NOW - joined_s)
        after = tc.decide(run, replace(GROUPED, group_size=group_size), NOW)
        assert (after.phase, after.next_at, after.error) == whole


def test_policy() -> None:
    """A policy refuses what it is there to refuse, and says how to start it all the same."""
    none, expired = replace(DONE, completed=0), replace(DONE, status="expired")
    for trigger_on, batches, why in (
        ("all_terminal", (BAD,), ""),
        ("all_completed", (DONE, replace(DONE, completed=None)), ""),
        ("all_completed", (DONE, BAD), "b failed"),
        ("all_completed", (none,), "a has no successful request"),
        ("any_output", (BAD, expired), ""),
        ("any_output", (BAD,), "no batch has an output file"),
    ):
        job, run = replace(JOB, trigger_on=trigger_on), replace(RUN, batches=batches)
        text = f"trigger_on: {trigger_on}, but {why}; `retry --force` starts it" if why else ""
        after = tc.decide(run, job, NOW)
        assert (after.phase, after.error or "") == (Phase.REFUSED if why else Phase.INTENT, text)


def test_unknown() -> None:
    """Only two empty searches, the last one begun a grace later, allow the next POST."""
    for elapsed_s, empty, may_post, phase, wait_s in (
        (60, 1, True, Phase.SENDING, INF),
        (60, 0, True, Phase.UNKNOWN, 10),
        (59, 1, True, Phase.UNKNOWN, 1),
        (60, 1, False, Phase.UNKNOWN, 3600),
    ):
        began, terms = BootTime(NOW, "boot", 900.0 + elapsed_s), replace(TERMS, may_post=may_post)
        after, _ = tc.after_search(replace(UNKNOWN, empty_searches=empty), [], began, terms)
        assert (after.phase, after.next_at - NOW) == (phase, wait_s)


def test_search() -> None:
    """Found is sent, empty lets an intent go, and incomplete says nothing."""
    began, held = TERMS.boot_time, replace(TERMS, may_post=False)
    found, events = tc.after_search(UNKNOWN, [keboola_job("5"), keboola_job("9")], began, TERMS)
    assert (found.phase, found.keboola_job_id) == (Phase.SENT, "5")
    assert events[0].fields["other_keboola_job_ids"] == ["9"]
    assert tc.after_search(INTENT, [], began, TERMS)[0].phase is Phase.SENDING
    assert tc.after_search(INTENT, [], began, held)[0].phase is Phase.INTENT
    for run in (INTENT, UNKNOWN):
        failed, _ = tc.after_search(run, ApiError("no"), began, TERMS)
        assert (failed.phase, failed.empty_searches, failed.next_at) == (run.phase, 0, NOW + 5)
    forced, _ = tc.after_search(replace(INTENT, forced=True), ApiError("no"), began, TERMS)
    assert (forced.phase, forced.forced) == (Phase.SENDING, False)
    off = replace(TERMS, job=replace(JOB, follow=False))
    assert tc.after_search(INTENT, [keboola_job()], began, off)[0].phase is Phase.FINISHED


def test_post() -> None:
    """Every answer to a POST is sent, not sent, rejected or unknown."""
    sending, _ = tc.after_search(replace(INTENT, empty_searches=2), [], TERMS.boot_time, TERMS)
    assert (sending.empty_searches, sending.posts, sending.sending_at) == (0, 1, NOW)
    rejected = dict.fromkeys((401, 402, 403, 404, 409, 423), 300) | dict.fromkeys((400, 422), INF)
    table = dict.fromkeys((None, 200, 302, 408, 429, 500, 503), (Phase.UNKNOWN, 10.0))
    for status, came in (table | {c: (Phase.REJECTED, s) for c, s in rejected.items()}).items():
        after, _ = tc.after_post(sending, ApiError("x", status=status), TERMS)
        assert (after.phase, after.next_at - NOW) == came, status
        assert (after.sending_at is None) == (after.phase is Phase.REJECTED)  # free to change
    unsent, _ = tc.after_post(sending, ApiError("x", sent=False), TERMS)
    assert (unsent.phase, unsent.next_at, unsent.sending_at) == (Phase.INTENT, NOW + 5, NOW)
    good, events = tc.after_post(sending, keboola_job("8"), TERMS)
    assert (good.phase, good.keboola_job_id, names(events)) == (Phase.SENT, "8", ["trigger_sent"])


def test_unknown_waits() -> None:
    """A repeat waits for the grace, then twice as long, up to an hour, or as a server asks."""
    run, waits = replace(UNKNOWN, repeat_after_s=0.0), []
    for _ in range(8):
        sending = replace(run, phase=Phase.SENDING)
        run, _ = tc.after_post(sending, ApiError("x", status=500), TERMS)
        waits.append(run.repeat_after_s)
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert (run.unknown_since, run.post_error) == (TERMS.boot_time, "x")
    for asked_s, wait_s in ((90.0, 90.0), (9e9, 3600.0), (5.0, 60.0)):
        asked = ApiError("x", status=429, retry_after_s=asked_s)
        first = replace(run, repeat_after_s=0.0)
        assert tc.after_post(first, asked, TERMS)[0].repeat_after_s == wait_s


def test_search_since() -> None:
    """The search goes back a day before the latest end, or before now or the POST if earlier."""
    run, sent = replace(RUN, batches=(DONE, BAD)), replace(RUN, sending_at=NOW - 7200)
    assert tc.search_since(run, NOW) == NOW - 50 - DAY_S
    assert tc.search_since(run, NOW - 60) == NOW - 60 - DAY_S
    assert tc.search_since(sent, NOW) == NOW - 7200 - DAY_S


def test_follow() -> None:
    """Success and a warning finish a run; every other end fails it, in Keboola's words."""
    for status in ("success", "warning", "error", "terminated", "cancelled"):
        after, events = tc.after_follow(SENT, keboola_job(status=status), TERMS)
        is_good = status in {"success", "warning"}
        error = None if is_good else f"Keboola job 5 ended in {status}: boom"
        assert (after.phase, after.error, bool(events)) == (Phase.FINISHED, error, is_good)
    for poll_interval, wait_s in ((30, 30), (3600, 300)):
        terms = replace(TERMS, job=replace(JOB, poll_interval=poll_interval))
        busy, _ = tc.after_follow(SENT, keboola_job(status="processing"), terms)
        assert (busy.phase, busy.next_at) == (Phase.SENT, NOW + wait_s)
    gone, _ = tc.after_follow(SENT, ApiError("gone", status=404), TERMS)
    assert (gone.phase, gone.keboola_status) == (Phase.FINISHED, "deleted")
    ill, _ = tc.after_follow(SENT, ApiError("ill", status=500), TERMS)
    assert (ill.phase, ill.error) == (Phase.SENT, "ill")


def test_retry_on_error() -> None:
    """After an error alone a run is its next rerun, later each time, and only so often."""
    terms, run, waits = replace(TERMS, job=replace(JOB, retry_on_error=5)), SENT, []
    for count in range(1, 6):
        sent = replace(run, phase=Phase.SENT, sending_at=NOW, payload="{}")
        run, _ = tc.after_follow(sent, keboola_job(status="error"), terms)
        waits.append(run.next_at - NOW)
        assert (run.phase, run.rerun, run.retries) == (Phase.INTENT, count, count)
        assert run.trigger_id == trigger_id("job", "", "ab", count)
        assert (run.sending_at, run.keboola_job_id, run.payload) == (None, None, "")
    assert waits == [300, 600, 1200, 2400, 3600]
    last, _ = tc.after_follow(replace(run, phase=Phase.SENT), keboola_job(status="error"), terms)
    other, _ = tc.after_follow(SENT, keboola_job(status="terminated"), terms)
    assert (last.phase, other.phase) == (Phase.FINISHED, Phase.FINISHED)


def test_retry() -> None:
    """A retry makes a run due, starts what was refused or rejected, or says why it does not."""
    refused, rejected = replace(RUN, phase=Phase.REFUSED), replace(RUN, phase=Phase.REJECTED)
    for run, force, came in (
        (replace(RUN, next_at=NOW + 9), False, Phase.POLLING),
        (replace(RUN, phase=Phase.SENDING), True, "its Keboola job is being started now"),
        (SENT, True, "its Keboola job 5 is running; wait for its end"),
        (ENDED, False, "its Keboola job has run; --force starts it once more"),
        (refused, False, "its policy refuses it; --force starts it all the same"),
        (refused, True, Phase.INTENT),
        (rejected, False, Phase.INTENT),
        (UNKNOWN, False, Phase.UNKNOWN),
        (UNKNOWN, True, Phase.INTENT),
    ):
        after = tc.after_retry(run, JOB, tc.RetryRequest(1, 1, force, 0, run.phase), NOW)
        assert (after if isinstance(after, str) else after[0].phase) == came
        if not isinstance(after, str):
            assert (after[0].next_at, after[0].rerun) == (NOW, 0)
            assert after[0].forced == (force and run is UNKNOWN)


def test_retry_counts_once() -> None:
    """A retry of what has ended is the next rerun, and one asked for before that does nothing."""
    request = tc.RetryRequest(1, 1, force=False, rerun=0, phase=Phase.FINISHED)
    after = tc.after_retry(replace(ENDED, error="x", trigger_id="x"), JOB, request, NOW)
    assert isinstance(after, tuple)
    assert after[0].trigger_id == trigger_id("job", "", "ab", 1)
    stale = tc.after_retry(after[0], JOB, request, NOW)
    assert stale == "its Keboola job was started or found meanwhile"
    assert tc.after_retry(ENDED, None, request, NOW) == "its job is not in the config"


def test_status() -> None:
    """Each phase has its status."""
    paused, done = replace(JOB, paused=True), replace(JOB, done=True)
    for run, job, status in (
        (RUN, JOB, "active"),
        (RUN, paused, "paused"),
        (RUN, done, "completed"),
        (UNKNOWN, done, "triggering"),
        (SENT, JOB, "running"),
        (ENDED, JOB, "completed_with_failures"),
        (replace(ENDED, batches=(DONE,)), paused, "completed"),
        (replace(ENDED, error="x"), JOB, "failed"),
        (replace(RUN, phase=Phase.REFUSED), JOB, "failed"),
    ):
        assert tc.status_of(run, job) == status


def test_attention() -> None:
    """What settles by itself is no attention; what has lasted over ten minutes, or failed, is."""
    old: dict[str, Any] = {"error": "x", "error_since": NOW - 601, "intended_at": NOW - 601}
    rows: list[tuple[Run, Job | None, float, str]] = [
        (replace(RUN, **old), JOB, 60, "poll_failing"),
        (replace(RUN, error="x", error_since=NOW - 599), JOB, 60, ""),
        (replace(RUN, **old), replace(JOB, paused=True), 60, ""),
        (replace(RUN, deadline_told=True), JOB, 60, "deadline_passed"),
        (replace(RUN, error=tc.UNCLEAR_SIZE), GROUPED, 60, "group_size_unclear"),
        (replace(RUN, phase=Phase.REFUSED), JOB, 60, "job_failed"),
        (replace(SENT, **old), JOB, 60, "follow_failing"),
        (replace(UNKNOWN, **old), JOB, 60, "trigger_overdue"),
        (replace(UNKNOWN, **old), JOB, 61, ""),
        (replace(UNKNOWN, **old), None, 60, ""),
    ]
    for run, job, grace_s, reason in rows:
        after, events = tc.after_attention(run, job, grace_s, NOW)
        assert (after.attention, names(events)) == (reason, [reason] if reason else [])
        _, over = tc.after_attention(replace(RUN, attention=reason), JOB, 60, NOW)
        assert names(over) == ([f"{reason}_recovered"] if reason else [])


def test_shifted() -> None:
    """When the clock is set, what is pending moves with it, and what has been stays."""
    batch = replace(DONE, files_due_at=NOW + 9)
    run = replace(RUN, batches=(batch,), next_at=NOW, joined_at=NOW, sending_at=NOW)
    moved = tc.shifted(run, -60)
    assert (moved.next_at, moved.joined_at, moved.sending_at) == (NOW - 60, NOW - 60, NOW)
    assert moved.batches[0].files_due_at == NOW + 9 - 60
    assert tc.shifted(replace(run, next_at=INF), 60).next_at == INF


def test_loaded() -> None:
    """A POST in flight at the end is unknown at the next start; the future counts as now."""
    after, _ = tc.as_loaded(replace(RUN, phase=Phase.SENDING, sending_at=NOW - 5), TERMS)
    assert (after.phase, after.unknown_since) == (Phase.UNKNOWN, TERMS.boot_time)
    assert after.repeat_after_s == 60.0
    future, _ = tc.as_loaded(replace(INTENT, intended_at=NOW + 9, next_at=NOW + 3601), TERMS)
    assert (future.intended_at, future.next_at) == (NOW, NOW)
    near = replace(INTENT, intended_at=NOW, next_at=NOW + 3599)
    assert tc.as_loaded(near, TERMS) == (near, [])


def test_assign() -> None:
    """A run is its job's and set's; a new name with the same ids and target takes it over."""
    mine, old = replace(ENDED, id=1), replace(RUN, id=2, job="old")
    aim, new = replace(TARGET, project=""), replace(JOB, batch_ids=("b", "a"))

    def assigned(target: tc.Target, **jobs: Job) -> dict[str, int]:
        found = tc.assign(jobs, dict.fromkeys(jobs, target), [mine, old], {})
        return {name: run.id for name, run in found.items()}

    assert assigned(aim, job=new) == {"job": 1}
    assert assigned(aim, job=JOB, new=new) == {"job": 1, "new": 2}
    assert assigned(replace(aim, config_id="8"), job=JOB, new=new) == {"job": 1}
    assert assigned(aim, job=JOB, new=replace(new, batch_ids=("a",))) == {"job": 1}
    assert assigned(aim, job=JOB, new=new, old=new) == {"job": 1, "old": 2}
    assert assigned(aim, job=JOB, new=new, new2=new) == {"job": 1, "new": 2}


def row(batch_id: str, created_s: float = 0, **metadata: str) -> Row:
    return Row(Batch(batch_id, created_at=NOW + created_s), metadata)


def test_groups() -> None:
    """New batches begin a run or join one, in order; what comes after the start is late."""
    rows = [row("c", 2, run="x"), row("d", 1, run="x"), row("e", run="y"), row("f")]
    x, y = tc.group_batches(GROUPED, TARGET, rows, {}, NOW)
    assert ([batch.id for batch in x[0].batches], y[0].group) == (["d", "c"], "y")
    assert (names(x[1]), x[0].joined_at) == (["run_found", "batch_joined"], NOW)
    begun, late = replace(x[0], id=7, phase=Phase.INTENT), row("g", run="x")
    ((after, events, batches),) = tc.group_batches(GROUPED, TARGET, [late], {"x": begun}, NOW)
    assert (after, names(events), batches) == (begun, ["late_batch"], [late.batch])
    alone = tc.group_batches(replace(GROUPED, group_by=None), TARGET, rows, {}, NOW)
    assert [run.group for run, *_ in alone] == ["c", "d", "e", "f"]
    many = [row(f"b{n}", run="x") for n in range(1002)]
    ((full, _, over),) = tc.group_batches(GROUPED, TARGET, many, {}, NOW)
    assert (len(full.batches), len(over)) == (1000, 2)
    job = replace(GROUPED, since=NOW)
    assert row("a", 0, k="v").is_of(job)
    assert not row("a", -1, k="v").is_of(job)
    assert not row("a", 0, k="v").is_of(replace(job, match=(("k", "v"), ("l", "m"))))


def test_group_size() -> None:
    """The size is what all of the batches' metadata agree on, also those of before."""
    job, differ = replace(GROUPED, group_size="metadata.n"), "the batches differ in n"
    bad = {size: f'"{size}" is not 1 to 1000' for size in ("many", "0", "1001")}
    told = {"3 3": "3", "3 4": differ, **bad}
    for sizes, size in (told | {"": "a batch has no n"}).items():
        rows = [row(f"b{n}", run="x", n=text) for n, text in enumerate(sizes.split(" "))]
        first = tc.group_batches(job, TARGET, [row("z", run="x", n="9")], {}, NOW)[0][0]
        assert tc.group_batches(job, TARGET, rows, {}, NOW)[0][0].size == size
        assert tc.group_batches(job, TARGET, rows, {"x": first}, NOW)[0][0].size == differ
