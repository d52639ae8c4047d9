"""The decisions are pure functions: here they are held to the tables that the design gives."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from typing import Any

import pytest

import teckochecker as tc
from teckochecker import ApiError, Batch, Job, JobStatus, Known, Step, Target, Trigger, Work
from teckochecker import TriggerState as S

NOW = 1_800_000_000.0
GRACE = 60.0
TARGET = Target("https://connection.keboola.com", "kds-team.app-custom-python", "123456")
VECTOR = "a30bbfd9355ce7cba3032b70103b3870ce9ed6dd7676168164cc143ec79a1b1d"
TERMINAL = ("completed", "failed", "expired", "cancelled")
GOING_ON = ("validating", "in_progress", "finalizing", "cancelling", "some_news", None)


def job(name: str = "nightly-embeddings", *ids: str, **more: Any) -> Job:  # noqa: ANN401 - any field
    ids = ids or ("batch_a", "batch_b")
    given = {"component_id": TARGET.component_id, "config_id": TARGET.config_id, **more}
    return Job(name, ids, "openai-prod", "keboola-prod", **given)


def trigger(state: S = S.INTENT, **more: Any) -> Trigger:  # noqa: ANN401 - any field
    plain = Trigger("t" * 64, 0, state, TARGET, "keboola-prod", "{}", "basis", NOW - 100)
    return replace(plain, **more)


def work(*statuses: str | None, **more: Any) -> Work:  # noqa: ANN401 - any field
    batches = [Batch(f"batch_{n}", status) for n, status in enumerate(statuses)]
    plain = Work(7, "nightly-embeddings", tuple(batches), TARGET, position=0)
    return replace(plain, **more)


def changed(before: Trigger, after: Trigger) -> dict[str, object]:
    """What the second has that the first has not."""
    names = [field.name for field in fields(Trigger)]
    return {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}


# ---- the trigger's id ----


def test_the_trigger_id_has_its_test_vector() -> None:
    """The id is the SHA-256 of exactly this JSON, as `sha256sum` computes it too."""
    written = b'[1,"nightly-embeddings",["batch_abc123","batch_def456"],0]'
    assert hashlib.sha256(written).hexdigest() == VECTOR
    assert tc.trigger_id("nightly-embeddings", ["batch_abc123", "batch_def456"], 0) == VECTOR


def test_the_trigger_id_does_not_depend_on_the_order_of_ids() -> None:
    """The ids are a set: their order in the config makes no other trigger."""
    assert tc.trigger_id("nightly-embeddings", ["batch_def456", "batch_abc123"], 0) == VECTOR
    assert tc.trigger_id("nightly-embeddings", {"batch_def456", "batch_abc123"}, 0) == VECTOR


@pytest.mark.parametrize(
    ("name", "ids", "rerun"),
    [
        ("nightly-embedding", ["batch_abc123", "batch_def456"], 0),
        ("nightly-embeddings", ["batch_abc123"], 0),
        ("nightly-embeddings", ["batch_abc123", "batch_def457"], 0),
        ("nightly-embeddings", ["batch_abc123", "batch_def456"], 1),
    ],
)
def test_the_trigger_id_depends_on_all_of_its_parts(name: str, ids: list[str], rerun: int) -> None:
    """Another name, other ids or another rerun is another trigger."""
    first = tc.trigger_id("nightly-embeddings", ["batch_abc123", "batch_def456"], 0)
    assert tc.trigger_id(name, ids, rerun) != first


def test_the_trigger_id_of_a_name_beyond_ascii_is_taken_from_ascii_json() -> None:
    """A name's letters go in as JSON escapes, which no machine's locale can change."""
    written = b'[1,"n\\u00e1zev \\"x\\"",["batch_a"],2]'
    assert tc.trigger_id('název "x"', ["batch_a"], 2) == hashlib.sha256(written).hexdigest()


# ---- what Keboola gets ----

MIXED = (
    Batch("batch_z", "completed", output_file_id="file-1"),
    Batch("batch_a", "expired", output_file_id="file-2", error_file_id="file-3"),
    Batch("batch_m", "failed"),
    Batch("batch_b", "completed", output_file_id="", error_file_id="file-4"),
    Batch("batch_c", "cancelled"),
)
MIXED_VARIABLES = {
    "batch_ids_completed": '["batch_z","batch_b"]',
    "batch_ids_failed": '["batch_a","batch_m","batch_c"]',
    "batch_count_total": "5",
    "batch_count_completed": "2",
    "batch_count_failed": "3",
    "batch_statuses": '{"batch_z":"completed","batch_a":"expired","batch_m":"failed",'
    '"batch_b":"completed","batch_c":"cancelled"}',
    "batch_output_file_ids": '{"batch_z":"file-1","batch_a":"file-2"}',
    "batch_error_file_ids": '{"batch_a":"file-3","batch_b":"file-4"}',
    "teckochecker_job": "nightly-embeddings",
    "teckochecker_trigger_id": "tid",
}


def test_the_variables_are_the_contract() -> None:
    """Every variable is there, in the config's order of ids, as JSON or decimal text."""
    assert tc.keboola_variables(job(), MIXED, "tid") == MIXED_VARIABLES


def test_no_variable_is_empty_when_there_is_nothing_to_tell() -> None:
    """Keboola refuses empty values: where there is nothing, the JSON is an empty list or object."""
    variables = tc.keboola_variables(job(), [Batch("batch_a", "failed")], "tid")
    assert variables["batch_ids_completed"] == "[]"
    assert variables["batch_output_file_ids"] == variables["batch_error_file_ids"] == "{}"
    assert all(variables.values())


def test_a_jobs_own_variables_go_with_the_metadata_and_never_instead_of_it() -> None:
    """Own variables are sent too; one with a reserved name would not displace the program's."""
    own = job(variables=(("dataset", "products"), ("teckochecker_trigger_id", "forged")))
    expected = MIXED_VARIABLES | {"dataset": "products"}
    assert tc.keboola_variables(own, MIXED, "tid") == expected


def test_the_payload_is_the_contract() -> None:
    """The body of the POST has these keys and no others where nothing special is configured."""
    body = json.loads(tc.keboola_payload(job(), TARGET, MIXED, "tid"))
    values = body.pop("variableValuesData")
    assert body == {"component": TARGET.component_id, "config": "123456", "mode": "run"}
    assert [*values] == ["values"]
    assert {v["name"]: v["value"] for v in values["values"]} == MIXED_VARIABLES
    assert all(sorted(v) == ["name", "value"] for v in values["values"])


def test_the_payload_has_branch_rows_and_mode_where_configured() -> None:
    """A development branch, rows and another mode come into the body under Keboola's names."""
    special = job(mode="debug", config_row_ids=("1", "2"))
    target = replace(TARGET, branch_id="789")
    body = json.loads(tc.keboola_payload(special, target, MIXED, "tid"))
    del body["variableValuesData"]
    assert body == {
        "component": TARGET.component_id,
        "config": "123456",
        "mode": "debug",
        "branchId": "789",
        "configRowIds": ["1", "2"],
    }


@pytest.mark.parametrize(
    ("changes", "target", "token", "is_same"),
    [
        ({}, TARGET, "tok", True),
        ({"poll_interval_s": 5, "paused": True}, TARGET, "tok", True),
        ({"variables": (("b", "2"), ("a", "1"))}, TARGET, "tok", True),
        ({"variables": (("a", "1"), ("b", "3"))}, TARGET, "tok", False),
        ({"mode": "debug"}, TARGET, "tok", False),
        ({"config_row_ids": ("1",)}, TARGET, "tok", False),
        ({}, replace(TARGET, branch_id="1"), "tok", False),
        ({}, replace(TARGET, stack_url="https://connection.north"), "tok", False),
        ({}, TARGET, "other", False),
    ],
)
def test_the_basis_changes_with_what_keboola_judges(
    changes: dict[str, Any], target: Target, token: str, *, is_same: bool
) -> None:
    """Target, mode, rows, variables and token make another basis; the rest and the order do not."""
    first = tc.trigger_basis(job(variables=(("a", "1"), ("b", "2"))), TARGET, tc.Secret("tok"))
    second = tc.trigger_basis(
        job(**{"variables": (("a", "1"), ("b", "2")), **changes}), target, tc.Secret(token)
    )
    assert (first == second) is is_same
    assert "tok" not in first


def test_a_new_trigger_is_an_intent_with_all_that_the_post_needs() -> None:
    """The intent has id, target, name of the secret, payload and basis, and no time but its own."""
    made = tc.new_trigger(work("completed", "failed"), job(), TARGET, tc.Secret("tok"), NOW)
    ids = ["batch_0", "batch_1"]
    own_id = tc.trigger_id("nightly-embeddings", ids, 0)
    batches = work("completed", "failed").batches
    assert made == Trigger(
        id=own_id,
        rerun=0,
        state=S.INTENT,
        target=TARGET,
        secret="keboola-prod",
        payload=tc.keboola_payload(job(), TARGET, batches, own_id),
        basis=tc.trigger_basis(job(), TARGET, tc.Secret("tok")),
        created_at=NOW,
    )


def test_arming_again_keeps_the_id_and_rebuilds_the_payload() -> None:
    """A rejected trigger's id stays, also under another name of its job."""
    renamed = job("renamed", config_row_ids=("9",))
    basis = tc.trigger_basis(renamed, TARGET, tc.Secret("tok"))
    old = trigger(S.REJECTED, id="stored", failures=3, error="no", next_try_at=NOW, basis=basis)
    known = work("completed", trigger=old, name="renamed")
    made = tc.new_trigger(known, renamed, TARGET, tc.Secret("tok"), NOW)
    assert (made.id, made.failures, made.state, made.error) == ("stored", 3, S.INTENT, None)
    assert '"configRowIds":["9"]' in made.payload
    assert '"stored"' in made.payload
    other = tc.new_trigger(known, renamed, TARGET, tc.Secret("another"), NOW)
    assert (other.id, other.failures) == ("stored", 0)


def test_another_rerun_gets_another_id() -> None:
    """What `retry --force` repeats is a start of its own."""
    known = work("completed", rerun=1, trigger=trigger(S.SENT, failures=3))
    made = tc.new_trigger(known, job(), TARGET, tc.Secret("tok"), NOW)
    assert made.failures == 0
    assert made.id == tc.trigger_id("nightly-embeddings", ["batch_0"], 1)
    assert made.rerun == 1


# ---- statuses ----


def expected_status(
    statuses: tuple[str | None, ...], state: S | None, *, paused: bool
) -> JobStatus:
    """The design's table, read aloud."""
    if state is S.SENT:
        whole = set(statuses) == {"completed"}
        return JobStatus.COMPLETED if whole else JobStatus.COMPLETED_WITH_FAILURES
    if paused:
        return JobStatus.PAUSED
    if state is S.REJECTED:
        return JobStatus.FAILED
    is_ready = all(status in TERMINAL for status in statuses)
    return JobStatus.TRIGGERING if is_ready or state else JobStatus.ACTIVE


def test_job_status_for_every_combination() -> None:
    """Each combination of two batch statuses, a trigger's state and `paused` has its status."""
    statuses = (*TERMINAL, *GOING_ON)
    for first, second, state, paused in product(statuses, statuses, (None, *S), (False, True)):
        one = work(first, second, paused=paused, trigger=trigger(state) if state else None)
        expected = expected_status((first, second), state, paused=paused)
        assert tc.job_status(one) == expected, (first, second, state, paused)


def test_what_is_done_elsewhere_is_completed_and_needs_nobody() -> None:
    """`done: true` says that nothing is to be started, whatever was seen of the batches before."""
    for statuses in (("in_progress", None), ("failed",), ("completed",)):
        one = work(*statuses, done=True, error="404", paused=True)
        assert tc.job_status(one) == JobStatus.COMPLETED
        assert tc.error_of(one) is None
        assert not tc.needs_person(one)
        why_not = "the config says that it is done; take done: out of it"
        assert tc.after_retry(one, force=True, now=NOW) == (one, why_not)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (work("completed", trigger=trigger(S.SENT)), JobStatus.COMPLETED),
        (work("completed", trigger=trigger(S.SENT), paused=True), JobStatus.COMPLETED),
        (work("failed", trigger=trigger(S.SENT)), JobStatus.COMPLETED_WITH_FAILURES),
        (work("completed", "expired", trigger=trigger(S.SENT)), JobStatus.COMPLETED_WITH_FAILURES),
        (work("completed", "in_progress"), JobStatus.ACTIVE),
        (work(None), JobStatus.ACTIVE),
        (work("COMPLETED?"), JobStatus.ACTIVE),
        (work("in_progress", paused=True), JobStatus.PAUSED),
        (work("completed", trigger=trigger(S.UNKNOWN), paused=True), JobStatus.PAUSED),
        (work("completed"), JobStatus.TRIGGERING),
        (work("completed", trigger=trigger(S.INTENT)), JobStatus.TRIGGERING),
        (work("completed", trigger=trigger(S.SENDING)), JobStatus.TRIGGERING),
        (work("completed", trigger=trigger(S.UNKNOWN)), JobStatus.TRIGGERING),
        (work("completed", trigger=trigger(S.REJECTED)), JobStatus.FAILED),
    ],
)
def test_job_status_by_example(one: Work, expected: JobStatus) -> None:
    """The rows of the design's table, one or more examples each."""
    assert tc.job_status(one) == expected


@pytest.mark.parametrize(
    ("one", "error", "needs"),
    [
        (work("in_progress"), None, False),
        (work("in_progress", error="404"), "404", True),
        (work("in_progress", error="404", paused=True), "404", False),
        (work("completed", trigger=trigger(S.INTENT)), None, True),
        (work("completed", error="old", trigger=trigger(S.UNKNOWN, error="?")), "?", True),
        (work("completed", error="old", trigger=trigger(S.SENT, error="?")), None, False),
        (work("completed", trigger=trigger(S.REJECTED, error="no")), "no", True),
    ],
)
def test_the_error_and_whether_a_person_is_needed(
    one: Work, error: str | None, *, needs: bool
) -> None:
    """The trigger's error goes before the look's; finished and paused work needs nobody."""
    assert tc.error_of(one) == error
    assert tc.needs_person(one) is needs


# ---- waits ----


@pytest.mark.parametrize("first_s", [0.1, 1, 5, 120, 1800, 3600, 86_400])
def test_backoff_grows_each_time_and_is_never_over_an_hour(first_s: float) -> None:
    """The luckiest wait after a failure is longer than the unluckiest before, up to the hour."""
    for failures in range(1, 60):
        least, most = (tc.backoff_s(failures, first_s, jitter) for jitter in (0.0, 1.0))
        following = tc.backoff_s(failures + 1, first_s, 0.0)
        assert 0 < least <= most <= 3600
        assert following > most or following == 2700.0
    assert tc.backoff_s(10**9, first_s, 1.0) == 3600


@pytest.mark.parametrize(
    ("failures", "asked_s", "expected"),
    [
        (1, None, 10.0),
        (2, None, 20.0),
        (3, 0.0, 40.0),
        (1, 5.0, 10.0),
        (1, 77.0, 77.0),
        (1, 86_400.0, 3600.0),
        (0, None, 10.0),
        (-1, None, 10.0),
    ],
)
def test_a_wait_that_a_server_asks_for_is_obeyed_up_to_an_hour(
    failures: int, asked_s: float | None, expected: float
) -> None:
    """It counts where it is longer than ours, and an hour is the most here too."""
    assert tc.backoff_s(failures, 10, 1.0, asked_s) == expected


# ---- batches ----


def test_a_terminal_status_is_never_overwritten() -> None:
    """Whatever comes after one of the four ends, the end stays with all of its facts."""
    for old, new in product(TERMINAL, (*TERMINAL, *GOING_ON)):
        known = Batch("batch_a", old, completed=1, output_file_id="file-1")
        assert tc.seen_again(known, Batch("batch_a", new, completed=2), NOW) is known


def test_any_other_status_gives_way() -> None:
    """An unknown or unfinished status is replaced by whatever is seen next."""
    for old, new in product(GOING_ON, (*TERMINAL, *GOING_ON)):
        seen = Batch("batch_a", new)
        assert tc.seen_again(Batch("batch_a", old), seen, NOW) == seen


LATE = [
    # what its counts promise, what is there, whether that is waited for
    ({"completed": 1, "failed": 0}, {}, True),
    ({"completed": 1, "failed": 0}, {"output_file_id": "file-1"}, False),
    ({"completed": 1, "failed": 2}, {"output_file_id": "file-1"}, True),
    ({"completed": 0, "failed": 2}, {"error_file_id": "file-2"}, False),
    ({"completed": 0, "failed": 0}, {}, False),
    ({}, {}, False),
]


@pytest.mark.parametrize("status", TERMINAL)
@pytest.mark.parametrize(("counts", "files", "is_waited_for"), LATE)
def test_files_that_come_after_the_end_are_waited_for(
    status: str, counts: dict[str, int], files: dict[str, str], *, is_waited_for: bool
) -> None:
    """A gateway tells the end of a batch first; within five minutes it tells the files."""
    seen = Batch("batch_a", status, **counts, **files)  # type: ignore[arg-type]
    waiting = tc.seen_again(Batch("batch_a", "in_progress"), seen, NOW)
    assert waiting.status == status
    assert waiting.is_terminal is not is_waited_for
    if not is_waited_for:
        assert waiting == seen
        return
    assert tc.seen_again(waiting, seen, NOW + 299) is waiting
    stale = tc.seen_again(waiting, Batch("batch_a", "in_progress"), NOW + 299)
    assert stale == waiting
    whole = replace(seen, output_file_id="file-1", error_file_id="file-2")
    assert tc.seen_again(waiting, whole, NOW + 9) == whole
    ended = tc.seen_again(waiting, seen, NOW + 300)
    assert (ended, ended.is_terminal) == (seen, True)
    assert tc.seen_again(waiting, stale, NOW + 300).is_terminal is False


def test_a_clock_set_back_does_not_prolong_the_wait_for_files() -> None:
    """What was noted in the future counts from now on."""
    seen = Batch("batch_a", "completed", completed=1)
    waiting = replace(seen, fileless_since=NOW + 9000)
    assert tc.seen_again(waiting, seen, NOW).fileless_since == NOW


def test_a_batch_whose_files_are_late_is_looked_at_soon() -> None:
    """Every 30 seconds at the latest, however long the interval of its job is."""
    known = work("in_progress")
    seen: dict[str, Batch | ApiError] = {"batch_0": Batch("batch_0", "completed", completed=1)}
    after, events = tc.after_look(known, seen, interval_s=3600, now=NOW, jitter=0)
    assert after.next_check_at == NOW + 30
    assert not after.is_ready
    assert [event.name for event in events] == ["batch_status_changed"]


DAY = 86_400.0


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([], None),
        ([(None, None)], None),
        ([(NOW - 9000, None), (NOW - 8000, None)], NOW - 9000 - DAY),
        ([(NOW - 9000, NOW - 500), (NOW - 8000, NOW - 100)], NOW - 100 - DAY),
        ([(NOW - 90_000, NOW - 80_000), (NOW - 8000, None)], NOW - 80_000 - DAY),
        ([(None, NOW + 1800)], NOW - DAY),
        ([(None, NOW + 99_999)], NOW - DAY),
        ([(None, NOW - 50), (None, NOW + 99_999)], NOW - DAY),
        ([(NOW + 5, None)], NOW - DAY),
        ([(NOW, None)], NOW - DAY),
        ([(NOW + 5, None), (NOW - 7000, None)], NOW - 7000 - DAY),
        ([(0.0, 0.0)], None),
        ([(5.0, 5.0)], 0.0),
    ],
)
def test_the_search_begins_a_day_before_the_last_end(
    times: list[tuple[float | None, float | None]], expected: float | None
) -> None:
    """Else before the first creation, else unbounded; an end in the future counts as now."""
    batches = [
        Batch(f"batch_{n}", "completed", created_at=c, ended_at=e) for n, (c, e) in enumerate(times)
    ]
    assert tc.search_from(batches, NOW) == expected


@pytest.mark.parametrize(("behind_s", "more_s"), [(7200.0, 7200.0), (0.0, 0.0), (-7200.0, 0.0)])
def test_the_search_goes_by_keboolas_clock(behind_s: float, more_s: float) -> None:
    """Where that is behind, jobs seem older; where it is ahead, a wrong `Date` must hide none."""
    batches = [Batch("batch_a", "completed", ended_at=NOW - 100)]
    assert tc.search_from(batches, NOW, behind_s) == NOW - 100 - DAY - more_s


def found_job(job_id: str, minute: int | None, trigger_id: str | None = "ours") -> tc.KeboolaJob:
    created = None if minute is None else datetime(2026, 11, 23, 12, minute, tzinfo=UTC)
    return tc.KeboolaJob(job_id, "created", None, created, trigger_id)


def test_the_oldest_of_several_jobs_comes_first() -> None:
    """By time of creation, then by number; one without a time comes last, others' do not come."""
    rows = [
        found_job("900", None),
        found_job("20", 5),
        found_job("100", 5),
        found_job("7", 9),
        found_job("8", 1),
        found_job("1", 0, "theirs"),
        found_job("2", 0, ""),
        found_job("3", 0, None),
    ]
    expected = ["8", "20", "100", "7", "900"]
    assert [found.id for found in tc.ours_oldest_first(rows, "ours")] == expected
    assert [found.id for found in tc.ours_oldest_first(reversed(rows), "ours")] == expected
    assert tc.ours_oldest_first(rows, "nobody's") == []


def test_the_oldest_is_told_across_time_zones() -> None:
    """Times are compared as moments, not as they are written."""
    east = timezone(timedelta(hours=2))
    early = replace(found_job("2", 0), created_time=datetime(2026, 11, 23, 13, 59, tzinfo=east))
    assert [found.id for found in tc.ours_oldest_first([found_job("1", 0), early], "ours")] == [
        "2",
        "1",
    ]


# ---- the trigger, step by step ----


@pytest.mark.parametrize(
    ("state", "next_try_at", "may_post", "is_due", "expected"),
    [
        *[(S.SENT, t, m, d, Step.REST) for t, m, d in product((None, 1.0), (0, 1), (0, 1))],
        *[(S.REJECTED, None, m, d, Step.REST) for m, d in product((0, 1), (0, 1))],
        (S.REJECTED, 1.0, 0, 0, Step.REST),
        (S.REJECTED, 1.0, 0, 1, Step.REST),
        (S.REJECTED, 1.0, 1, 0, Step.WAIT),
        (S.REJECTED, 1.0, 1, 1, Step.ARM),
        (S.INTENT, None, 0, 0, Step.REST),
        (S.INTENT, None, 0, 1, Step.REST),
        (S.INTENT, None, 1, 0, Step.WAIT),
        (S.INTENT, None, 1, 1, Step.SEARCH),
        *[(S.UNKNOWN, None, m, 0, Step.WAIT) for m in (0, 1)],
        *[(S.UNKNOWN, None, m, 1, Step.SEARCH) for m in (0, 1)],
        *[(S.SENDING, None, m, 1, Step.SEARCH) for m in (0, 1)],
    ],
)
def test_next_step(
    state: S, next_try_at: float | None, may_post: int, is_due: int, expected: Step
) -> None:
    """No state leads to a POST without a search; without leave, only an unknown one goes on."""
    one = trigger(state, next_try_at=next_try_at)
    assert tc.next_step(one, may_post=bool(may_post), is_due=bool(is_due)) is expected


@pytest.mark.parametrize("state", [S.INTENT])
@pytest.mark.parametrize("may_post", [True, False])
def test_a_clear_search_of_an_intent_allows_the_post(state: S, *, may_post: bool) -> None:
    """One search is enough before the first POST, if the job is neither paused nor gone."""
    one = trigger(state, failures=3)
    after, step = tc.after_clear_search(
        one, unknown_for_s=0, grace_s=GRACE, may_post=may_post, now=NOW
    )
    assert after == one
    assert step is (Step.POST if may_post else Step.REST)


@pytest.mark.parametrize(
    ("searches", "unknown_for_s", "may_post", "wait_s", "expected"),
    [
        (0, 0.0, True, 60.0, Step.WAIT),  # too early: again when the grace is over
        (0, 10.0, True, 50.0, Step.WAIT),
        (1, 10.0, True, 50.0, Step.WAIT),  # two, but the last one too early
        (9, 59.95, True, 0.1, Step.WAIT),
        (9, 59.999, True, 0.1, Step.WAIT),
        (0, 60.0, True, 10.0, Step.WAIT),  # late, but the first one
        (0, 9999.0, True, 10.0, Step.WAIT),
        (1, 60.0, True, None, Step.POST),
        (7, 61.0, True, None, Step.POST),
        (1, 60.0, False, 3600.0, Step.WAIT),  # paused or gone: search on, now and then
        (0, 60.0, False, 10.0, Step.WAIT),
    ],
)
def test_a_clear_search_of_an_unknown_trigger(
    searches: int, unknown_for_s: float, *, may_post: bool, wait_s: float | None, expected: Step
) -> None:
    """Only the second one, at least the grace after the record of the outcome, allows a POST."""
    one = trigger(S.UNKNOWN, clear_searches=searches, failures=2, error="?", said="500: no")
    after, step = tc.after_clear_search(
        one, unknown_for_s=unknown_for_s, grace_s=GRACE, may_post=may_post, now=NOW
    )
    assert step is expected
    assert after.state == S.UNKNOWN
    assert after.error == (
        "it is not known whether Keboola took the job; a search did not find it: 500: no"
    )
    assert (after.clear_searches, after.failures) == (searches + 1, 0)
    if wait_s is not None:
        assert after.next_try_at == pytest.approx(NOW + wait_s, abs=0.001)


@pytest.mark.parametrize(
    ("unknowns", "asked_s", "grace_s", "expected"),
    [
        (0, 0.0, 60, 60),
        (1, 0.0, 60, 60),
        (2, 0.0, 60, 120),
        (3, 0.0, 60, 240),
        (7, 0.0, 60, 3600),
        (10_000, 0.0, 60, 3600),
        (2, 0.0, 86_400, 86_400),
        (1, 300.0, 60, 300),
        (4, 300.0, 60, 480),
        (1, 9000.0, 60, 3600),
    ],
)
def test_the_wait_for_a_repeated_post_doubles(
    unknowns: int, asked_s: float, grace_s: float, expected: float
) -> None:
    """Up to an hour, but never less than the grace; and what the server asks for is obeyed."""
    one = trigger(S.UNKNOWN, unknowns=unknowns, asked_wait_s=asked_s, clear_searches=9)
    assert tc.unknown_wait_s(one, grace_s) == expected
    for waited_s, step in ((expected - 1, Step.WAIT), (expected, Step.POST)):
        after, found = tc.after_clear_search(
            one, unknown_for_s=waited_s, grace_s=grace_s, may_post=True, now=NOW
        )
        assert found is step
    early, _ = tc.after_clear_search(one, unknown_for_s=0, grace_s=grace_s, may_post=True, now=NOW)
    assert (early.next_try_at or 0) - NOW == min(expected, max(grace_s, 300))
    assert after.unknowns == unknowns


def test_unknown_outcomes_in_a_row_are_counted() -> None:
    """A crash in a POST is one too; an answer, or a person's word, ends the row."""
    one = trigger(S.SENDING, sending_at=NOW)
    error = ApiError("Keboola answered 503", status=503, retry_after_s=1e6)
    for number in (1, 2):
        one = tc.after_failed_post(one, error, grace_s=GRACE, now=tc.Moment(NOW), jitter=0)
        assert (one.unknowns, one.asked_wait_s, one.said) == (number, 3600, str(error))
    again = tc.as_unknown(one, "killed", grace_s=GRACE, now=tc.Moment(NOW))
    assert (again.unknowns, again.asked_wait_s, again.said) == (3, 0, "killed")
    found = tc.as_sent(again, tc.KeboolaJob("5", None, None, None, None), NOW)
    assert (found.unknowns, found.said) == (0, None)
    forced, _ = tc.after_retry(work("completed", trigger=again), force=True, now=NOW)
    assert forced.trigger
    assert forced.trigger.unknowns == 0


@pytest.mark.parametrize(
    ("since", "now", "expected"),
    [
        # One boot: the clock may have been set forward or back.
        (tc.Moment(NOW, "b", 100), tc.Moment(NOW + 9000, "b", 105), 5),
        (tc.Moment(NOW, "b", 100), tc.Moment(NOW - 9000, "b", 105), 5),
        (tc.Moment(NOW, "b", 100), tc.Moment(NOW, "b", 99), 0),
        # Another boot, or another machine that has been up for years.
        (tc.Moment(NOW, "b", 100), tc.Moment(NOW + 9000, "c", 30), 30),
        (tc.Moment(NOW, "b", 100), tc.Moment(NOW + 7, "c", 1e8), 7),
        (tc.Moment(NOW, "b", 100), tc.Moment(NOW - 7, "c", 30), 0),
        (tc.Moment(NOW), tc.Moment(NOW + 7, "c", 1e8), 7),
        # A system that does not tell its boots.
        (tc.Moment(NOW), tc.Moment(NOW + 7), 7),
        (tc.Moment(NOW), tc.Moment(NOW - 7), 0),
    ],
)
def test_what_has_certainly_passed(since: tc.Moment, now: tc.Moment, expected: float) -> None:
    """A clock that was set forward makes no time pass, and one set back takes none away."""
    assert tc.elapsed_s(since, now) == expected


@pytest.mark.parametrize(("grace_s", "expected"), [(0.1, 0.1), (2, 0.5), (60, 10), (86_400, 10)])
def test_searches_for_an_unknown_trigger_are_apart(grace_s: float, expected: float) -> None:
    """A quarter of the grace, ten seconds at most, and never at once."""
    assert tc.search_spacing_s(grace_s) == expected


@pytest.mark.parametrize("state", [S.INTENT, S.UNKNOWN])
@pytest.mark.parametrize("may_post", [True, False])
def test_a_failed_search_sends_nothing(state: S, *, may_post: bool) -> None:
    """The state stays, with the error, and the next search comes later each time."""
    waits = []
    one = trigger(state, clear_searches=1, said="500")
    for failures in range(1, 15):
        one, step = tc.after_failed_search(
            one, ApiError("503"), may_post=may_post, now=NOW, jitter=0.0
        )
        assert step is Step.WAIT
        assert (one.state, one.failures, one.clear_searches) == (state, failures, 1)
        assert one.error == "cannot search Keboola for an earlier start: 503" + (
            "; it is not known whether Keboola took the job: 500" if state == S.UNKNOWN else ""
        )
        waits.append((one.next_try_at or 0) - NOW)
    assert waits[:4] == [3.75, 7.5, 15, 30]
    assert waits == sorted(waits)
    assert max(waits) <= 3600


@pytest.mark.parametrize(
    ("forced", "may_post", "expected"),
    [
        (True, True, Step.POST),
        (True, False, Step.WAIT),
        (False, True, Step.WAIT),
        (False, False, Step.WAIT),
    ],
)
def test_only_a_person_decides_over_a_failed_search(
    *, forced: bool, may_post: bool, expected: Step
) -> None:
    """`retry --force` posts although the search fails; but not for a job that is paused or gone."""
    one = trigger(S.INTENT, forced=forced)
    error = ApiError("503")
    after, step = tc.after_failed_search(one, error, may_post=may_post, now=NOW, jitter=0.0)
    assert step is expected
    assert after.forced is forced


def test_a_found_job_settles_everything() -> None:
    """Whatever went wrong before, the trigger is sent and nothing is waited for any more."""
    link = "https://connection.keboola.com/jobs/5"
    one = trigger(S.UNKNOWN, error="?", failures=4, forced=True, next_try_at=NOW + 5)
    known = tc.KeboolaJob("5", "processing", link, None, one.id)
    assert changed(one, tc.as_sent(one, known, NOW)) == {
        "state": S.SENT,
        "sent_at": NOW,
        "keboola_job_id": "5",
        "keboola_status": "processing",
        "url": link,
        "error": None,
        "failures": 0,
        "forced": False,
        "next_try_at": None,
    }


def test_sending_begins_the_count_of_searches_anew() -> None:
    """What earlier searches and a person's word allowed is used up by this one POST."""
    one = trigger(S.UNKNOWN, clear_searches=2, unknown_at=NOW - 99, forced=True, next_try_at=NOW)
    assert changed(one, tc.as_sending(one, NOW)) == {
        "state": S.SENDING,
        "sending_at": NOW,
        "unknown_at": None,
        "clear_searches": 0,
        "forced": False,
        "next_try_at": None,
    }


OUTCOMES: list[tuple[str, ApiError, S, float | None]] = [
    # not sent: again, soon
    ("refused", ApiError("x", retryable=True, sent=False), S.INTENT, 5),
    ("queue address 401", ApiError("x", status=401, sent=False), S.INTENT, 5),
    ("asked", ApiError("x", sent=False, retry_after_s=40.0), S.INTENT, 40),
    ("asked for days", ApiError("x", sent=False, retry_after_s=1e6), S.INTENT, 3600),
    # rejected: what Keboola's side can cure is tried again, later
    *[(f"{s}", ApiError("x", status=s), S.REJECTED, 300.0) for s in (401, 402, 403, 404, 409, 423)],
    # rejected: until something else is asked for
    *[(f"{s}", ApiError("x", status=s), S.REJECTED, None) for s in (400, 405, 410, 413, 422, 499)],
    # unknown: only a search can tell
    ("reset", ApiError("x", retryable=True), S.UNKNOWN, 10),
    ("no id", ApiError("x", status=201, retryable=True), S.UNKNOWN, 10),
    ("redirect", ApiError("x", status=302), S.UNKNOWN, 10),
    *[(f"{s}", ApiError("x", status=s), S.UNKNOWN, 10.0) for s in (408, 429, 500, 502, 503, 599)],
]


@pytest.mark.parametrize(
    ("error", "state", "wait_s"), [row[1:] for row in OUTCOMES], ids=[row[0] for row in OUTCOMES]
)
def test_what_a_failed_post_comes_to(error: ApiError, state: S, wait_s: float | None) -> None:
    """Each kind of error is not sent, rejected or unknown, with its wait."""
    sending = tc.as_sending(trigger(), NOW)
    forgotten = replace(sending, failures=9, clear_searches=9) if state is S.UNKNOWN else sending
    after = tc.after_failed_post(forgotten, error, grace_s=GRACE, now=tc.Moment(NOW), jitter=1.0)
    assert after.state is state
    assert after.next_try_at == (None if wait_s is None else NOW + wait_s)
    assert after.unknown_at == (NOW if state is S.UNKNOWN else None)
    assert after.failures == (0 if state is S.UNKNOWN else 1)
    assert after.clear_searches == 0
    assert "x" in (after.error or "")
    assert (after.id, after.payload, after.target) == (sending.id, sending.payload, TARGET)


def test_what_is_not_sent_is_tried_with_growing_waits_without_end() -> None:
    """A Keboola that cannot be reached is tried again each time later, at most an hour apart."""
    one, waits = trigger(), []
    for _ in range(30):
        error = ApiError("refused", sent=False)
        one = tc.after_failed_post(
            tc.as_sending(one, NOW), error, grace_s=GRACE, now=tc.Moment(NOW), jitter=1.0
        )
        assert one.state is S.INTENT
        waits.append((one.next_try_at or 0) - NOW)
    assert waits[:4] == [5, 10, 20, 40]
    assert waits[-1] == 3600


@pytest.mark.parametrize(
    ("one", "next_try_at", "unknown_at"),
    [
        (trigger(), None, None),
        (trigger(next_try_at=NOW - 5), NOW - 5, None),
        (trigger(next_try_at=NOW + 3000), NOW + 3000, None),
        (trigger(next_try_at=NOW + 3601), NOW, None),
        (trigger(next_try_at=NOW + 90_000), NOW, None),
        (trigger(S.UNKNOWN, next_try_at=NOW + 86_000, unknown_at=NOW), NOW + 86_000, NOW),
        (trigger(next_try_at=NOW + 3000, created_at=NOW + 1), NOW, None),
        (trigger(next_try_at=NOW + 3000, sending_at=NOW + 1), NOW, None),
        (trigger(S.UNKNOWN, next_try_at=NOW + 50, unknown_at=NOW - 9), NOW + 50, NOW - 9),
        (trigger(S.UNKNOWN, next_try_at=NOW + 50, unknown_at=NOW + 9), NOW, NOW),
        (trigger(S.UNKNOWN, unknown_at=NOW + 9), None, NOW),
    ],
)
def test_times_in_the_future_count_as_now(
    one: Trigger, next_try_at: float | None, unknown_at: float | None
) -> None:
    """A clock that was set back holds no trigger, and makes no outcome older than it is."""
    after = tc.as_of_now(one, NOW)
    assert (after.next_try_at, after.unknown_at) == (next_try_at, unknown_at)
    assert replace(after, next_try_at=None, unknown_at=None) == replace(
        one, next_try_at=None, unknown_at=None
    )


# ---- which row a job is ----

ELSEWHERE = replace(TARGET, config_id="other")


def row(
    row_id: int, name: str, *ids: str, target: Target = TARGET, is_finished: bool = False
) -> Known:
    return Known(row_id, name, frozenset(ids or ("batch_a", "batch_b")), target, is_finished)


def assigned(
    jobs: list[Job], rows: list[Known], targets: Mapping[str, Target] | None = None
) -> dict[str, int]:
    plain = {one.name: TARGET for one in jobs}
    return tc.assign({one.name: one for one in jobs}, {**plain, **(targets or {})}, rows)


@pytest.mark.parametrize(
    ("jobs", "rows", "expected"),
    [
        pytest.param([], [row(1, "a")], {}, id="nothing in the config"),
        pytest.param([job("a")], [], {}, id="nothing known"),
        pytest.param([job("a")], [row(1, "a")], {"a": 1}, id="the same"),
        pytest.param([job("a", "batch_b", "batch_a")], [row(1, "a")], {"a": 1}, id="other order"),
        pytest.param([job("a", "batch_c")], [row(1, "a")], {}, id="other ids are new work"),
        pytest.param(
            [job("a")],
            [row(1, "a", "batch_c"), row(2, "a"), row(3, "a", "batch_d")],
            {"a": 2},
            id="an earlier set again",
        ),
        pytest.param([job("b")], [row(1, "a")], {"b": 1}, id="renamed"),
        pytest.param([job("a")], [row(1, "a", target=ELSEWHERE)], {"a": 1}, id="another target"),
        pytest.param([job("b")], [row(1, "a", target=ELSEWHERE)], {}, id="renamed and retargeted"),
        pytest.param([job("b", "batch_a")], [row(1, "a")], {}, id="fewer ids are no rename"),
        pytest.param([job("a"), job("b")], [row(1, "a")], {"a": 1}, id="a copy is new work"),
        pytest.param(
            [job("a", "batch_c"), job("b")], [row(1, "a")], {}, id="the name is still in use"
        ),
        pytest.param(
            [job("b")],
            [row(1, "a"), row(2, "x"), row(3, "y", is_finished=True)],
            {"b": 3},
            id="finished ones first",
        ),
        pytest.param(
            [job("z"), job("c"), job("d"), job("e")],
            [row(5, "a"), row(2, "b"), row(9, "f", is_finished=True)],
            {"z": 9, "c": 2, "d": 5},
            id="one to one, in order",
        ),
        pytest.param(
            [job("b"), job("a")],
            [row(1, "a", is_finished=True), row(2, "x")],
            {"a": 1, "b": 2},
            id="its own row first",
        ),
    ],
)
def test_which_row_a_job_is(jobs: list[Job], rows: list[Known], expected: dict[str, int]) -> None:
    """A name and a set of ids is a piece of work; one that left may come back under a new name."""
    assert assigned(jobs, rows) == expected
    assert assigned(jobs, rows[::-1]) == expected


def test_another_target_is_no_rename() -> None:
    """Stack, component, configuration and branch must all be the same to be a rename."""
    for change in ("stack_url", "component_id", "config_id", "branch_id"):
        target = replace(TARGET, **{change: "other"})
        assert assigned([job("b")], [row(1, "a")], {"b": target}) == {}


@pytest.mark.parametrize("seed", range(25))
def test_assign_gives_each_row_at_most_once(seed: int) -> None:
    """On random configs and histories: one to one, the own row first, whatever the order."""
    dice = random.Random(seed)  # noqa: S311 - the same dice every time
    sets = [("batch_a",), ("batch_b",), ("batch_a", "batch_b")]
    targets = [TARGET, ELSEWHERE]
    for _ in range(80):
        keys = [(f"job-{n}", ids) for n in range(8) for ids in sets]
        known = [
            row(n, name, *ids, target=dice.choice(targets), is_finished=dice.random() < 0.5)
            for n, (name, ids) in enumerate(dice.sample(keys, dice.randrange(len(keys))))
        ]
        names = dice.sample([f"job-{n}" for n in range(12)], dice.randrange(12))
        jobs = {name: job(name, *dice.choice(sets)) for name in names}
        wanted = {name: dice.choice(targets) for name in names}
        result = tc.assign(jobs, wanted, known)
        assert len(set(result.values())) == len(result)
        shuffled = dice.sample(known, len(known))
        assert tc.assign(jobs, wanted, shuffled) == result
        check_assigned(jobs, wanted, {one.id: one for one in known}, result)


def check_assigned(
    jobs: dict[str, Job], wanted: dict[str, Target], rows: dict[int, Known], result: dict[str, int]
) -> None:
    """Each row that was given is the job's own or a true rename, and none was kept back."""
    own = {(one.name, one.batch_ids): one.id for one in rows.values()}
    taken = set(result.values())
    for name, one in jobs.items():
        ids = frozenset(one.batch_ids)
        if (name, ids) in own:
            assert result[name] == own[name, ids]
            continue
        fitting = [
            r
            for r in rows.values()
            if r.name not in jobs and (r.batch_ids, r.target) == (ids, wanted[name])
        ]
        if name in result:
            got = rows[result[name]]
            assert got in fitting
            assert got.is_finished or not any(r.is_finished for r in fitting if r.id not in taken)
        else:
            assert all(r.id in taken for r in fitting)


# ---- looks ----


def look(
    one: Work, seen: dict[str, Batch | ApiError], interval_s: float = 100, jitter: float = 1.0
) -> tuple[Work, list[tc.Event]]:
    return tc.after_look(one, seen, interval_s=interval_s, now=NOW, jitter=jitter)


def test_a_look_without_news_only_moves_the_times() -> None:
    """Nothing is told, and the next look comes after the interval."""
    one = work("in_progress", "completed")
    after, events = look(one, {"batch_0": Batch("batch_0", "in_progress")})
    assert after == replace(one, last_check_at=NOW, next_check_at=NOW + 100)
    assert events == []


def test_a_look_tells_each_change_of_status() -> None:
    """Each batch with a new status is told once; an end that is no success is a warning."""
    seen: dict[str, Batch | ApiError] = {
        "batch_0": Batch("batch_0", "completed"),
        "batch_1": Batch("batch_1", "expired"),
        "batch_2": Batch("batch_2", "in_progress"),
        "batch_3": Batch("batch_3", "thinking"),
        "batch_4": Batch("batch_4", "in_progress", completed=5),
    }
    after, events = look(work(None, "in_progress", "validating", None, "in_progress"), seen)
    assert after.batches == tuple(seen.values())
    assert [(e.name, e.level, e.fields["batch_id"], e.fields["status"]) for e in events] == [
        ("batch_status_changed", "info", "batch_0", "completed"),
        ("batch_status_changed", "warning", "batch_1", "expired"),
        ("batch_status_changed", "info", "batch_2", "in_progress"),
        ("batch_status_unknown", "warning", "batch_3", "thinking"),
    ]
    assert {e.job for e in events} == {"nightly-embeddings"}


def test_the_last_look_leaves_no_next_one() -> None:
    """When all batches have ended, none is looked at again."""
    after, _ = look(work("completed", "finalizing"), {"batch_1": Batch("batch_1", "cancelled")})
    assert after.is_ready
    assert after.next_check_at is None


def test_a_failed_look_keeps_what_is_known_and_comes_later_each_time() -> None:
    """The job shows the error, other batches' news count, the waits double up to an hour."""
    one = work("in_progress", "in_progress", "in_progress")
    seen: dict[str, Batch | ApiError] = {
        "batch_0": ApiError("OpenAI answered 500", status=500, request_id="req_1"),
        "batch_1": Batch("batch_1", "completed"),
        "batch_2": ApiError("other"),
    }
    after, events = look(one, seen)
    assert after.error == "batch_0: OpenAI answered 500 (and 1 more)"
    assert [batch.status for batch in after.batches] == ["in_progress", "completed", "in_progress"]
    assert [(e.name, e.level) for e in events] == [
        ("batch_status_changed", "info"),
        ("look_failed", "warning"),
    ]
    assert events[1].fields == {
        "batch_id": "batch_0",
        "error": after.error,
        "status": 500,
        "request_id": "req_1",
    }
    waits = []
    for _ in range(8):
        after, _ = look(after, {**seen, "batch_2": after.batches[2]})
        waits.append((after.next_check_at or 0) - NOW)
    assert waits == [200, 400, 800, 1600, 3200, 3600, 3600, 3600]
    assert after.error == "batch_0: OpenAI answered 500"


def test_an_error_is_told_once_and_so_is_its_end() -> None:
    """The same error again is no news, another one is, and so is the first look that goes well."""
    first, told = look(work("in_progress"), {"batch_0": ApiError("a")})
    assert [e.name for e in told] == ["look_failed"]
    second, told = look(first, {"batch_0": ApiError("a")})
    assert told == []
    third, told = look(second, {"batch_0": ApiError("b")})
    assert [e.name for e in told] == ["look_failed"]
    fourth, told = look(third, {"batch_0": Batch("batch_0", "in_progress")})
    assert [e.name for e in told] == ["look_recovered"]
    assert (fourth.error, fourth.failures, fourth.next_check_at) == (None, 0, NOW + 100)


def test_a_look_obeys_the_longest_wait_that_was_asked_for() -> None:
    """Of several Retry-After the longest counts, and an hour is the most."""
    one = work("in_progress", "in_progress")
    for asked_s, expected in ((500.0, 500.0), (9e9, 3600.0)):
        seen = {
            "batch_0": ApiError("429", status=429, retry_after_s=7.0),
            "batch_1": ApiError("429", status=429, retry_after_s=asked_s),
        }
        after, _ = look(one, {**seen})
        assert after.next_check_at == NOW + expected


# ---- retry ----

REFUSED = "it is triggered; --force starts the Keboola job once more"


def test_retry_leaves_a_post_under_way_alone() -> None:
    """What this very process is sending is neither sent again nor marked otherwise."""
    one = work("completed", trigger=trigger(S.SENDING))
    after, reason = tc.after_retry(one, force=True, now=NOW, is_posting=True)
    assert (after, reason) == (one, "its Keboola job is being started now")


@pytest.mark.parametrize(
    ("state", "force", "why_not", "expected_state"),
    [
        (S.SENT, False, REFUSED, S.SENT),
        (S.SENT, True, None, None),
        (S.SENDING, False, None, S.SENDING),
        (S.SENDING, True, None, S.INTENT),
        (S.REJECTED, False, None, S.REJECTED),
        (S.REJECTED, True, None, S.REJECTED),
        (S.UNKNOWN, False, None, S.UNKNOWN),
        (S.UNKNOWN, True, None, S.INTENT),
        (S.INTENT, False, None, S.INTENT),
        (S.INTENT, True, None, S.INTENT),
    ],
)
def test_what_retry_does(
    state: S, *, force: bool, why_not: str | None, expected_state: S | None
) -> None:
    """`retry` makes a trigger due; --force decides an unknown one and repeats a sent one."""
    one = work(
        "completed",
        completed_at=NOW - 5,
        trigger=trigger(state, failures=4, next_try_at=NOW + 900),
    )
    after, reason = tc.after_retry(one, force=force, now=NOW)
    assert reason == why_not
    if why_not:
        assert after == one
    elif expected_state is None:
        assert (after.rerun, after.trigger, after.completed_at) == (1, None, None)
    else:
        again = after.trigger
        assert again is not None
        assert (again.state, again.failures, again.next_try_at) == (expected_state, 0, NOW)
        assert (again.id, after.rerun) == (trigger().id, 0)
        assert again.forced is (force and state in {S.UNKNOWN, S.INTENT, S.SENDING})


def test_retry_of_an_unknown_trigger_is_no_license_to_post() -> None:
    """Without --force it is searched for at once, and the two clear searches stay necessary."""
    one = work("completed", trigger=trigger(S.UNKNOWN, unknown_at=NOW - 5, clear_searches=0))
    after, _ = tc.after_retry(one, force=False, now=NOW)
    assert after.trigger is not None
    assert tc.next_step(after.trigger, may_post=True, is_due=True) is Step.SEARCH
    _, step = tc.after_clear_search(
        after.trigger, unknown_for_s=5, grace_s=GRACE, may_post=True, now=NOW
    )
    assert step is Step.WAIT


def test_retry_before_the_trigger_looks_at_once() -> None:
    """A job that still waits for its batches is looked at again without its backoff."""
    one = work("in_progress", failures=6, error="404", next_check_at=NOW + 3000)
    after, reason = tc.after_retry(one, force=False, now=NOW)
    assert reason is None
    assert after == replace(one, failures=0, next_check_at=NOW)


def test_rows_to_take_over_come_in_the_order_of_the_config_so_far() -> None:
    """Of several that fit, finished ones go first, then those that were in the config, in order."""
    target, ids = TARGET, frozenset(("batch_a", "batch_b"))
    rows = [
        Known(1, "long gone", ids, target, is_finished=False),
        Known(2, "second", ids, target, is_finished=False, position=1),
        Known(3, "first", ids, target, is_finished=False, position=0),
        Known(4, "done", ids, target, is_finished=True),
    ]
    names = ["a", "b", "c", "d"]
    assert assigned([job(name) for name in names], rows) == dict(
        zip(names, (4, 3, 2, 1), strict=True)
    )


def test_a_stored_time_in_the_future_counts_as_now() -> None:
    """A clock that was set back holds nothing until it has caught up, and cuts no grace short."""
    ahead = trigger(S.UNKNOWN, unknown_at=NOW + 900, next_try_at=NOW + 960)
    again = tc.as_of_now(ahead, NOW)
    assert (again.unknown_at, again.next_try_at) == (NOW, NOW)


@pytest.mark.parametrize("stamp", [-1e15, 0.0, 1e15, 1e308, float("inf")])
def test_no_recorded_time_is_too_odd_to_show(stamp: float) -> None:
    """A time that no calendar has is shown as the nearest one that it has."""
    shown = tc.rfc3339(stamp)
    assert shown == ("1970-01-01T00:00:00Z" if stamp <= 0 else "9999-12-31T23:59:59Z")
