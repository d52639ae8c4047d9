"""Where batches stand in their account's list: the chart, and looks at a list that moves.

The list of the last part is in this process, and a look's requests are counted: whatever happens to
the list, a look never takes more than one request for each batch that is due.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest

import teckochecker as tc
from teckochecker import ApiError, Batch, Chart, Job, Look, Page, Poller, Target, Walk, Watch, Work

NOON = 1_800_000_000.0
ROWS = 100


def listing(
    keys: Sequence[str],
    watched: Container[str],
    cursor: str | None = None,
    *,
    rows: int = ROWS,
    ages: Mapping[str, float | None] | None = None,
) -> Page:
    """The page of a list after a row; its rows are two seconds apart where `ages` has no others."""
    start = keys.index(cursor) + 1 if cursor else 0
    shown = keys[start : start + rows]

    def age(key: str) -> float | None:
        return ages[key] if ages else NOON - 2 * keys.index(key)

    return Page(
        ids=shown,
        batches={
            key: Batch(key, "in_progress", created_at=age(key)) for key in shown if key in watched
        },
        newest_at=age(shown[0]) if shown else None,
        oldest_at=age(shown[-1]) if shown else None,
        has_more=start + rows < len(keys),
    )


def names(count: int) -> list[str]:
    """Ids of a list, the newest first."""
    return [f"batch_{number:05}" for number in range(count)]


def charted(keys: Sequence[str], watched: Container[str]) -> Chart:
    """A chart that has seen all of a list at once."""
    chart = Chart()
    chart.learn(None, listing(keys, watched, rows=len(keys)))
    return chart


# ---- which pages ----

# Rows of the watched batches, and the rows that the pages have to begin at.
PAGES: dict[str, tuple[Sequence[int], list[int]]] = {
    "none": ([], []),
    "one alone": ([7], []),
    "two together": ([7, 8], [7]),
    "two that a page just holds": ([7, 106], [7]),
    "two that a page does not hold": ([7, 107], []),
    "first rows of the list": ([0, 1, 2], [0]),
    "a full page and one more": (range(20, 121), [20]),
    "a full page and two more": (range(20, 122), [20, 120]),
    "a page begins where it pays": ([7, 120, 130, 219, 220], [120]),
    "all": (range(1000), [*range(0, 1000, 100)]),
    "alone, together, alone": ([5, 200, 201, 400], [200]),
}


@pytest.mark.parametrize("case", PAGES)
def test_the_fewest_pages(case: str) -> None:
    """A page begins at a batch, shows at least another one, and all others are left to be asked."""
    rows, begins = PAGES[case]
    keys = names(1000)
    watched = [keys[row] for row in rows]
    if not watched:
        assert Chart().pages(keys) == []
    expected = [(keys[row - 1] if row else None, keys[row]) for row in begins]
    assert charted(keys, set(watched)).pages(watched) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_pages_is_smaller(seed: int) -> None:
    """What the pages cannot show in fewer requests, no other pages could."""
    chance = random.Random(seed)  # noqa: S311 - the same every time
    keys = names(600)
    rows = sorted(chance.sample(range(600), chance.choice((2, 9, 40, 200))))
    watched = [keys[row] for row in rows]
    pages = charted(keys, set(watched)).pages(watched)
    shown = {key for cursor, _ in pages for key in listing(keys, watched, cursor).batches}
    requests = len(pages) + len(set(watched) - shown)
    # From the top: each batch not yet answered for is the first row of a page, or is asked singly.
    fewest, row = 0, -1
    for first in rows:
        if first > row:
            fewest, row = fewest + 1, first + ROWS - 1
    assert requests == fewest
    assert all(len(listing(keys, watched, cursor).batches) >= 2 for cursor, _ in pages)


def test_only_what_is_wanted_makes_a_page() -> None:
    """Watched batches that are not due now pay for no page."""
    keys = names(100)
    chart = charted(keys, set(keys))
    assert chart.pages([keys[5]]) == []
    assert chart.pages([keys[50], keys[5], "batch_unknown"]) == [(keys[4], keys[5])]


# ---- what a moving list does to it ----


def test_new_batches_push_all_others_down_alike() -> None:
    """What was learned before stays true after any number of new batches at the top."""
    keys = names(300)
    watched = {keys[40], keys[60], keys[250], keys[260]}
    chart = charted(keys, watched)
    grown = [f"batch_new{number}" for number in range(500)] + keys
    for cursor, first in chart.pages(watched):
        page = listing(grown, watched, cursor)
        assert page.ids[0] == first
        assert len(page.batches) == 2
        chart.learn(cursor, page)
    assert chart.pages(watched) == [(keys[39], keys[40]), (keys[249], keys[250])]


def test_the_first_batch_of_the_list_gets_a_neighbour() -> None:
    """The batch that was the newest is looked for at the top, until newer ones are known."""
    keys = names(50)
    watched = {keys[0], keys[1]}
    chart = charted(keys, watched)
    assert chart.pages(watched) == [(None, keys[0])]
    grown = ["batch_new", *keys]
    chart.learn(None, listing(grown, watched))
    assert chart.pages(watched) == [("batch_new", keys[0])]


def test_deleted_rows_let_others_up() -> None:
    """Rows between two batches that are gone make them fit on one page again, once it is read."""
    keys = names(300)
    watched = {keys[10], keys[60], keys[140]}
    chart = charted(keys, watched)
    assert chart.pages(watched) == [(keys[9], keys[10])]
    left = keys[:61] + keys[120:]
    chart.learn(keys[9], listing(left, watched, keys[9]))
    assert chart.pages(watched) == [(keys[9], keys[10])]
    assert chart.pages([keys[60], keys[140]]) == [(keys[59], keys[60])]


def test_a_lost_cursor_takes_its_follower_with_it() -> None:
    """A row that is gone begins no page any more; the batches around it are still known."""
    keys = names(100)
    watched = {keys[10], keys[20], keys[30]}
    chart = charted(keys, watched)
    chart.lose_cursor(keys[9])
    assert chart.pages(watched) == [(keys[19], keys[20])]
    chart.lose(keys[20])
    assert chart.pages(watched) == []
    unplaced = chart.unplaced(Batch(key, created_at=NOON) for key in sorted(watched))
    assert [batch.id for batch in unplaced] == [keys[10], keys[20]]


def test_a_lost_cursor_is_no_mark() -> None:
    """The last row of a page, once it is gone, is not gone on from."""
    keys = names(300)
    chart = Chart()
    chart.learn(keys[99], listing(keys, set(), keys[99]))
    goals = [Batch(key, created_at=NOON - 2 * (200 + n)) for n, key in enumerate(keys[200:210])]
    ages = [(batch.created_at or 0, batch.id) for batch in reversed(goals)]
    assert [walk.cursor for walk in chart.guesses(goals, ages, 5)] == [keys[199]]
    chart.lose_cursor(keys[199])
    assert [walk.cursor for walk in chart.guesses(goals, ages, 5)] != [keys[199]]


def test_parts_of_the_list_are_joined_where_a_page_shows_both() -> None:
    """Two pages with nothing in common are far apart, until one page has batches of both."""
    keys = names(400)
    watched = {keys[10], keys[150]}
    chart = Chart()
    chart.learn(keys[4], listing(keys, watched, keys[4], rows=50))
    chart.learn(keys[144], listing(keys, watched, keys[144], rows=50))
    assert chart.pages(watched) == []
    chart.learn(keys[60], listing(keys, watched, keys[60]))
    assert chart.pages(watched) == []  # 140 rows apart
    left = keys[:11] + keys[100:]
    chart.learn(keys[4], listing(left, watched, keys[4]))
    assert chart.pages(watched) == [(keys[9], keys[10])]


def test_pages_read_one_after_the_other_are_one_part() -> None:
    """A page that begins where another one ended joins on to it, whoever stands there."""
    keys = names(200)
    watched = {keys[95], keys[105]}
    chart = Chart()
    chart.learn(None, listing(keys, watched))
    chart.learn(keys[99], listing(keys, watched, keys[99]))
    assert chart.pages(watched) == [(keys[94], keys[95])]


def test_a_page_after_a_known_batch_needs_no_other_in_common() -> None:
    """A page that begins after a batch joins on to it."""
    keys = names(100)
    watched = {keys[10], keys[40]}
    chart = Chart()
    chart.learn(None, listing(keys, watched, rows=20))
    chart.learn(keys[10], listing(keys, watched, keys[10]))
    assert chart.pages(watched) == [(keys[9], keys[10])]


@pytest.mark.parametrize("twice", [1, 2, 5])
def test_repeated_rows_do_no_harm(twice: int) -> None:
    """Where a list repeats rows, a page begins after another batch than the one it has to show."""
    keys = [key for key in names(10) for _ in range(twice)]
    watched = {"batch_00003", "batch_00004"}
    chart = Chart()
    chart.learn(None, listing(keys, watched))
    assert chart.pages(watched) == [("batch_00002", "batch_00003")]


# ---- looking for batches ----


def aged(*ages: float | None) -> list[Batch]:
    """Batches that were created so many seconds ago."""
    return [
        Batch(f"batch_{n}", created_at=None if age is None else NOON - age)
        for n, age in enumerate(ages)
    ]


def ages_of(batches: Iterable[Batch]) -> list[tuple[float, str]]:
    return sorted((b.created_at, b.id) for b in batches if b.created_at)


def test_the_unknown_are_looked_for_first_and_then_the_newest() -> None:
    """Of unknown age come first; batches whose place is known are not looked for."""
    chart = Chart()
    batches = aged(50, None, 10, 30, None)
    order = [batch.id for batch in chart.unplaced(batches)]
    assert order == ["batch_1", "batch_4", "batch_2", "batch_3", "batch_0"]
    chart.learn(None, listing(["batch_2"], {"batch_2"}))
    assert "batch_2" not in [batch.id for batch in chart.unplaced(batches)]


def test_what_was_missed_is_looked_for_ever_more_rarely() -> None:
    """After n misses a batch is looked for in one of 2**n looks, at least in one of 1,024."""
    chart = Chart()
    (batch,) = aged(1)
    looked_for = []
    for look in range(1, 3000):
        chart.begin_look({batch.id: batch})
        if chart.unplaced([batch]):
            looked_for.append(look)
            chart.note_miss(batch.id)
    assert looked_for == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    chart.learn(None, listing([batch.id], {batch.id}))
    chart.lose(batch.id)
    assert chart.unplaced([batch])  # what was seen has no misses


def test_guesses_are_pages_for_several() -> None:
    """By age, a page after one batch shows those created soon after; fewer than five do not pay."""
    cluster = [100 + 10 * n for n in range(6)]
    batches = aged(*cluster, 10_000, 10_010, 10_020, 10_030)
    walks = Chart().guesses(batches, ages_of(batches), 9)
    assert [(walk.cursor, walk.goal) for walk in walks] == [("batch_0", batches[1])]
    assert Chart().guesses(batches[:5], ages_of(batches[:5]), 9) == []
    assert Chart().guesses(batches, ages_of(batches), 0) == []


def test_guesses_are_as_many_as_may_be() -> None:
    """Every group gets its page, the newest first, up to the number allowed."""
    groups = [1000 * group + 10 * n for group in range(4) for n in range(7)]
    batches = aged(*groups)
    walks = Chart().guesses(batches, ages_of(batches), 3)
    assert [walk.cursor for walk in walks] == ["batch_0", "batch_7", "batch_14"]
    assert len(Chart().guesses(batches, ages_of(batches), 99)) == 4


def test_of_one_age_a_guess_is_one_page() -> None:
    """Batches that were all created in one second are worth one page, not one each."""
    batches = aged(*[100] * 50)
    (walk,) = Chart().guesses(batches, ages_of(batches), 99)
    assert walk.goal
    assert walk.cursor != walk.goal.id


def test_unknown_ages_have_one_way() -> None:
    """Batches of unknown age are walked to from the top, all of them at once."""
    batches = aged(None, None, 10)
    assert Chart().ways(batches, ages_of(batches), 9) == [Walk(None)]
    assert Chart().guesses(aged(None, None), [], 9) == []


def test_ways_lead_to_batches_with_neighbours() -> None:
    """A walk begins at the nearest newer row known, or at the top; one alone is not walked to."""
    batches = aged(*[5000 + 10 * n for n in range(6)], 90_000)
    ages = ages_of(batches)
    walks = Chart().ways(batches, ages, 2)
    assert [walk.goal for walk in walks] == batches[:2]
    assert [walk.cursor for walk in walks] == [None, "batch_0"]
    assert Chart().ways(batches, ages, 0) == []
    assert Chart().ways(batches[6:], ages, 9) == []


END_OF_WALK: dict[str, tuple[Page, bool, bool]] = {  # with the goal of age 100, and without any
    "nothing on it": (Page([], {}, None, None, has_more=True), True, True),
    "the last one": (Page(["x"], {}, NOON, NOON, has_more=False), True, True),
    "newer rows only": (Page(["x"], {}, NOON, NOON - 50, has_more=True), False, False),
    "as old as the goal": (Page(["x"], {}, NOON, NOON - 100, has_more=True), False, False),
    "older than the goal": (Page(["x"], {}, NOON, NOON - 101, has_more=True), True, False),
    "no ages": (Page(["x"], {}, None, None, has_more=True), True, False),
    "the goal": (
        Page(["batch_0"], {"batch_0": Batch("batch_0")}, NOON, NOON, has_more=True),
        True,
        False,
    ),
}


@pytest.mark.parametrize("case", END_OF_WALK)
def test_where_a_walk_ends(case: str) -> None:
    """A walk ends at the list's end, at its goal, and where its goal cannot follow."""
    page, with_goal, without = END_OF_WALK[case]
    assert Walk(None, aged(100)[0]).ends_at(page) is with_goal
    assert Walk(None).ends_at(page) is without


def test_the_allowance() -> None:
    """One page in a hundred due batches, at least one, at most three."""
    chart = Chart()
    due = (20, 99, 100, 199, 200, 300, 100_000)
    assert [chart.allowance(count) for count in due] == [1, 1, 1, 1, 2, 3, 3]


def test_risks_in_vain_make_it_rest() -> None:
    """After each look that risked pages in vain it rests twice as long; success ends that."""
    chart = Chart()
    risked = []
    for look in range(1, 5000):
        chart.begin_look({})
        if chart.allowance(20):
            risked.append(look)
            chart.note_risk(paid_off=False)
    rests = [later - earlier for earlier, later in pairwise(risked)]
    assert rests[:11] == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024]
    chart.note_risk(paid_off=True)
    assert chart.allowance(20) == 1
    chart.note_risk(paid_off=False)
    assert chart.allowance(20) == 0
    chart.begin_look({})
    chart.begin_look({})
    assert chart.allowance(20) == 1


# ---- memory ----


def test_a_chart_forgets_what_is_not_watched() -> None:
    """Places and misses of batches that have ended do not pile up, over any number of looks."""
    chart = Chart()
    for generation in range(200):
        watched = {f"batch_{generation}_{n}": Batch("") for n in range(20)}
        chart.begin_look(watched)
        chart.learn(None, listing([*watched], watched))
        for key in watched:
            chart.note_miss(key)
        assert len(chart._spots) <= 60 + tc.MAX_ROWS
        assert len(chart._misses) <= 60


def test_the_marks_are_bounded() -> None:
    """However many pages end at other rows, a bounded number of ends is remembered: the newest."""
    chart = Chart()
    for number in range(3 * tc.MAX_MARKS):
        chart.learn(
            None, Page([f"batch_{number}"], {}, NOON + number, NOON + number, has_more=True)
        )
    assert len(chart._ends) <= tc.MAX_MARKS
    assert chart._ends == sorted(chart._ends)
    assert chart._ends[-1] == (NOON + 3 * tc.MAX_MARKS - 1, f"batch_{3 * tc.MAX_MARKS - 1}")
    for _ in range(3):
        chart.learn(None, Page(["batch_same"], {}, NOON, NOON, has_more=True))
    assert sum(key == "batch_same" for _, key in chart._ends) == 1


def test_an_empty_page_teaches_nothing() -> None:
    """Neither an empty page nor one without ages is taken for an end."""
    chart = Chart()
    chart.learn(None, Page([], {}, None, None, has_more=True))
    chart.learn("batch_a", Page(["batch_b"], {}, None, None, has_more=True))
    assert chart._ends == []
    assert chart.pages(["batch_b"]) == []


# ---- what is taken of a page ----

ROW = {"id": "batch_a", "status": "in_progress", "created_at": 1_700_000_000, "input_file_id": "f"}
SEEN = Batch("batch_a", "in_progress", created_at=1_700_000_000.0)
WATCHED = {key: Batch(key) for key in ("batch_a", "batch_b")}


def page_of(*rows: object, **more: object) -> Page:
    return tc.parse_page({"object": "list", "data": [*rows], "has_more": False, **more}, WATCHED)


NO_PAGES: list[object] = [
    None,
    7,
    "html",
    [],
    [ROW],
    {},
    {"data": None},
    {"data": {}},
    {"data": "rows"},
    {"object": "list", "batches": [ROW]},
    ROW,
]


@pytest.mark.parametrize("document", NO_PAGES)
def test_no_page(document: object) -> None:
    """Whatever has no list of data is no page, and is said to be none."""
    with pytest.raises(ValueError, match="has no list of data"):
        tc.parse_page(document, WATCHED)


def test_a_row_that_lacks_files_is_not_taken() -> None:
    """Gateways' lists may have none; the batch is asked for by itself, and may have them."""
    ended = {**ROW, "status": "completed", "request_counts": {"completed": 1, "failed": 0}}
    assert page_of(ended).batches == {}
    (batch,) = page_of({**ended, "output_file_id": "file-1"}).batches.values()
    assert batch.is_terminal


def test_a_page_has_all_rows_and_the_watched_batches() -> None:
    """Foreign rows are kept as neighbours and ends; only watched ones are taken as batches."""
    page = page_of(
        {"id": "batch_x", "created_at": 1_700_000_009},
        ROW,
        {"id": "batch_y", "created_at": 1_600_000_000},
        has_more=True,
    )
    assert page.ids == ["batch_x", "batch_a", "batch_y"]
    assert page.batches == {"batch_a": SEEN}
    assert (page.newest_at, page.oldest_at) == (1_700_000_009.0, 1_600_000_000.0)
    assert page.has_more


@pytest.mark.parametrize("row", [None, 7, "batch_a", [], {}, {"status": "completed"}, {"id": 7}])
def test_rows_that_are_none(row: object) -> None:
    """A row without an id is passed over; the others count."""
    assert page_of(row, ROW, row) == page_of(ROW)
    assert page_of(row).ids == []


TAKEN: dict[str, tuple[dict[str, object], str | None]] = {  # and with which status
    "as it is": ({}, "in_progress"),
    "without ages": ({"created_at": None}, "in_progress"),
    "capitals": ({"status": "FINALIZING"}, "finalizing"),
    "capitals at the end": ({"status": "COMPLETED"}, "completed"),
    "unknown": ({"status": "pondering"}, "pondering"),
    "no status": ({"status": None}, None),
    "empty status": ({"status": ""}, None),
    "a number for a status": ({"status": 4}, None),
}


@pytest.mark.parametrize("case", TAKEN)
def test_which_rows_are_taken(case: str) -> None:
    """A row is taken as leniently as an answer for one batch, and not at all without a status."""
    changes, status = TAKEN[case]
    page = page_of({**ROW, **changes})
    assert page.ids == ["batch_a"]
    assert [batch.status for batch in page.batches.values()] == ([status] if status else [])


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled", "EXPIRED"])
def test_an_end_needs_a_whole_row(status: str) -> None:
    """What says no more than that a batch has ended is not taken: the batch itself is asked for."""
    bare = {"id": "batch_a", "status": status, "created_at": 1_700_000_000}
    assert page_of(bare).batches == {}
    assert page_of(bare, {**ROW, "status": status}).batches["batch_a"].status == status.lower()
    assert page_of({**bare, "input_file_id": None}).batches["batch_a"].is_terminal
    going_on = {**bare, "status": "in_progress"}
    assert page_of(going_on).batches == {"batch_a": SEEN}


def test_of_repeated_rows_the_first_good_one_counts() -> None:
    """A batch that stands on a page twice is taken once; a wrong row does not hide a good one."""
    later = {**ROW, "status": "finalizing"}
    assert page_of(ROW, later).batches == {"batch_a": SEEN}
    assert page_of({**ROW, "status": None}, later).batches["batch_a"].status == "finalizing"
    assert page_of(ROW, ROW).ids == ["batch_a", "batch_a"]


@pytest.mark.parametrize("value", [None, True, 0, "false", "no", []])
def test_only_a_plain_no_ends_the_list(value: object) -> None:
    """A list ends where `has_more` is false, and not where it is missing or something else."""
    assert page_of(ROW, has_more=value).has_more
    assert tc.parse_page({"data": [ROW]}, WATCHED).has_more
    assert not page_of(ROW).has_more


@pytest.mark.parametrize("value", [None, "now", -5, 0, True, 1e300, float("nan"), float("inf"), []])
def test_odd_ages(value: object) -> None:
    """A time of creation that is none is not known."""
    page = page_of({**ROW, "created_at": value})
    assert (page.newest_at, page.oldest_at) == (None, None)
    assert page.batches["batch_a"].created_at is None


# ---- a look ----


def look_of(due: int, *, risk: int = 0) -> Look:
    batches = {f"batch_{n}": Batch(f"batch_{n}") for n in range(due)}
    return Look(0.0, batches, risk)


def showing(*keys: str) -> dict[str, Batch]:
    return {key: Batch(key) for key in keys}


def test_what_a_page_saves() -> None:
    """A page saves a request for each due batch that no page has shown before."""
    look = look_of(5)
    look.cost = 2
    look.take(showing("batch_0", "batch_1", "batch_not_due"))
    look.take(showing("batch_1", "batch_2", "batch_not_due"))
    assert look.saved == 1
    assert [batch.id for batch in look.missing()] == ["batch_3", "batch_4"]
    assert look.credit == 1
    look.risk = 1
    assert look.credit == 2
    look.risk = 3
    assert look.credit == 3  # no more than can wait


@pytest.mark.parametrize(("saved", "asked"), [(0, 5), (-1, 4), (-3, 2), (-5, 0), (-9, 0)])
def test_what_pages_have_cost_is_asked_for_later(saved: int, asked: int) -> None:
    """As many batches wait as pages were read in vain."""
    look = look_of(5)
    look.cost = -saved
    assert len(look.affordable(())) == asked


def test_what_ended_is_not_seen_again() -> None:
    """Of what a look has seen, a work gets what has not ended for it."""
    look = look_of(1)
    look.take({"batch_0": Batch("batch_0", "completed")})
    work = Work(1, "job", (Batch("batch_0"), Batch("batch_z")), Target("s", "c", "1"), 0)
    assert look.seen_of(Watch(work)) == {"batch_0": Batch("batch_0", "completed")}
    ended = Work(1, "job", (Batch("batch_0", "failed"),), Target("s", "c", "1"), 0)
    assert look.seen_of(Watch(ended)) == {}


# ---- looks at a list that moves ----

JOB_SIZE = 5
LOOKS = 10
LISTS = ("honest", "one age", "no ages", "from the top", "short pages", "liar", "forgetful", "none")


class MovingWorld:
    """An account's list, which changes at any time, and how often it was asked for what."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.chance = random.Random(f"{kind}{seed}")  # noqa: S311 - the same every time
        self.clock = 0.0
        self.keys = [self._name(n) for n in range(self.chance.choice((60, 900, 4000)))]
        self.born: dict[str, float | None] = {}
        for number, key in enumerate(self.keys):
            self.born[key] = self._age_of_new(-2 * number)
        self.watched = self._choose()
        self.requests: list[str] = []
        self.answered: set[str] = set()
        self.moves_within = self.chance.random() < 0.5
        self._added = 0

    def _name(self, number: int) -> str:
        return f"batch_{random.Random(number).getrandbits(64):016x}_{number}"  # noqa: S311

    def _age_of_new(self, offset_s: float) -> float | None:
        if self.kind == "no ages":
            return None
        return NOON if self.kind == "one age" else NOON + self.clock + offset_s

    def _choose(self) -> list[str]:
        """Clusters and single ones, by chance; twenty at least."""
        chosen: set[str] = set()
        wanted = self.chance.choice((20, 50, min(400, len(self.keys))))
        size = self.chance.choice((1, 4, 10, 60))
        while len(chosen) < min(wanted, len(self.keys)):
            start = self.chance.randrange(len(self.keys))
            chosen.update(self.keys[start : start + size])
        return self.chance.sample(sorted(chosen), len(chosen))

    def move(self) -> None:
        """Adds batches at the top and deletes some anywhere, now and then watched ones as well."""
        for _ in range(self.chance.choice((0, 0, 1, 5, 150))):
            self._added += 1
            key = f"batch_new{self._added}"
            self.keys.insert(0, key)
            self.born[key] = self._age_of_new(0)
        share = self.chance.choice((0, 0, 0.01, 0.2))
        spared = set(self.watched) if self.chance.random() < 0.9 else set()
        gone = {k for k in self.keys if k not in spared and self.chance.random() < share}
        self.keys = [key for key in self.keys if key not in gone]

    def seen(self, key: str) -> Batch:
        return Batch(key, "in_progress", created_at=self.born[key])

    is_silent = False

    def refusal(self) -> None:
        """Return what stands in the way: nothing."""

    async def batch(self, key: str) -> Batch:
        self.requests.append(key)
        await asyncio.sleep(0)
        if key not in self.keys:
            raise ApiError("gone", status=404)
        return self.seen(key)

    async def page(self, cursor: str | None, watched: Mapping[str, Batch]) -> Page:
        self.requests.append(f"page {cursor}")
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)
        if self.kind == "none" or (self.kind == "forgetful" and self.chance.random() < 0.05):
            raise ApiError("no", status=self.chance.choice((405, 500, None)), retryable=True)
        if self.moves_within:
            self.move()
        rows = 20 if self.kind == "short pages" else ROWS
        if self.kind == "liar":
            keys = self.chance.choices([*self.keys, "batch_a"], k=self.chance.randrange(150))
            self.born.setdefault("batch_a", None)
            return listing(keys, watched, rows=1000, ages={**self.born})
        if cursor is not None and cursor not in self.keys:
            if self.kind != "from the top":
                raise ApiError("no such batch", status=self.chance.choice((400, 404)))
            cursor = None
        return listing(self.keys, watched, cursor, rows=rows, ages=self.born)


class LookEngine:
    """What a poller needs of the engine: it takes looks, and notes which batches were answered."""

    once = False

    def __init__(self, world: MovingWorld) -> None:
        self.world = world
        self.clock = self
        self.tasks: list[asyncio.Task[Any]] = []

    def mono(self) -> float:
        return self.world.clock

    def jitter(self) -> float:
        return 0.5

    def spawn(self, work: Any) -> asyncio.Task[Any]:  # noqa: ANN401 - any coroutine
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    async def ended(self) -> None:
        """Return when all that was spawned has ended, and what that has spawned."""
        while self.tasks:
            tasks, self.tasks = self.tasks, []
            await asyncio.gather(*tasks)

    def is_polled(self, _watch: Watch) -> bool:
        return True

    def record(
        self, looks: Iterable[tuple[Watch, Mapping[str, Batch | ApiError]]], _begun_at: float
    ) -> list[Watch]:
        for watch, seen in looks:
            assert seen.keys() <= {batch.id for batch in watch.work.batches}
            self.world.answered |= seen.keys()
            after, _ = tc.after_look(
                watch.work, seen, interval_s=120, now=NOON + self.mono(), jitter=0.5
            )
            watch.work = replace(after, failures=0)
        return []

    def note(self, *_events: tc.Event) -> None:
        """Say nothing."""

    def wake_pollers(self) -> None:
        """Wake nobody."""

    def note_bug(self, error: Exception, _job: str) -> None:
        raise error

    note_trouble = note_bug


def poller_of(world: MovingWorld) -> tuple[Poller, LookEngine, list[Watch]]:
    """A poller of a world, and the watches of its jobs."""
    engine = LookEngine(world)
    poller = Poller(cast("Any", engine), cast("Any", world))
    cast("Any", world).base_url = "https://api.openai.com/v1"
    target = Target("https://connection.keboola.com", "component", "1")
    watches = []
    for start in range(0, len(world.watched), JOB_SIZE):
        ids = world.watched[start : start + JOB_SIZE]
        work = Work(start, f"job{start}", tuple(map(Batch, ids)), target, position=start)
        watches.append(Watch(work, Job(f"job{start}", tuple(ids), "o", "k", "c", "1")))
    poller.take(watches)
    return poller, engine, watches


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("seed", range(8))
def test_looks_at_a_moving_list(kind: str, seed: int) -> None:
    """No look takes more requests than due batches, and each of these is answered in the end.

    What is left out of a look, for pages that were read in vain, comes in a later one.
    """
    world = MovingWorld(kind, seed)

    async def play() -> None:
        poller, engine, watches = poller_of(world)
        waits: Counter[str] = Counter()
        for _ in range(LOOKS):
            world.requests.clear()
            world.answered.clear()
            for watch in watches:
                watch.due = world.clock
            chosen = watches
            if world.chance.random() < 0.3:
                chosen = world.chance.sample(watches, max(4, len(watches) // 2))
            await poller._look(chosen)
            await engine.ended()
            due = {batch.id for watch in chosen for batch in watch.work.batches}
            assert len(world.requests) <= len(due), (kind, seed)
            assert not poller._busy
            for key in due:
                waits[key] = 0 if key in world.answered else waits[key] + 1
            assert max(waits.values()) < LOOKS - 1, (kind, seed)
            world.clock += 120
            world.move()
            assert (
                len(poller._list._chart._spots) <= 2 * len(world.watched) + len(due) + tc.MAX_ROWS
            )

    asyncio.run(play())


def test_nobody_is_left_out_twice_in_a_row() -> None:
    """Where looks risk pages in vain, what was left out of one comes first in the next."""
    world = MovingWorld("none", 1)

    async def play() -> None:
        poller, engine, watches = poller_of(world)
        left_out: set[str] = set()
        for _ in range(3):
            world.answered.clear()
            await poller._look(watches)
            await engine.ended()
            assert left_out <= world.answered
            left_out = {*world.watched} - world.answered
            world.clock += 1200

    asyncio.run(play())


def test_a_look_is_over_when_it_is_over() -> None:
    """Where one of several walks meets an error, the others end with it, not after the look."""
    world = MovingWorld("honest", 1)
    world.keys = [world._name(number) for number in range(6000)]
    world.born = {key: NOON - 2 * number for number, key in enumerate(world.keys)}
    world.watched = [world.keys[200 * n + k] for n in range(30) for k in range(40, 50)]
    world.moves_within = False
    honest = world.page

    async def page(cursor: str | None, watched: Mapping[str, Batch]) -> Page:
        if cursor in world.watched:  # no walk yet: a guess
            return await honest(cursor, watched)
        if "page that fails" not in world.requests:
            world.requests.append("page that fails")
            raise ApiError("no", status=500, retryable=True)
        await asyncio.sleep(0.01)
        return await honest(cursor, watched)

    async def play() -> None:
        poller, engine, watches = poller_of(world)
        cast("Any", world).page = page
        for watch in watches:
            watch.work = replace(
                watch.work, batches=tuple(world.seen(b.id) for b in watch.work.batches)
            )
        poller.take(watches)
        await poller._look(watches)
        await engine.ended()
        made = len(world.requests)
        assert "page that fails" in world.requests
        await asyncio.sleep(0.1)
        assert len(world.requests) == made

    asyncio.run(play())


def test_a_look_that_is_cancelled_records_nothing() -> None:
    """At the end of the process, pages that have come beside one that has not begin nothing new."""
    world = MovingWorld("honest", 1)
    world.keys = [world._name(number) for number in range(400)]
    world.born = {key: NOON - 2 * number for number, key in enumerate(world.keys)}
    world.watched = world.keys[:]
    world.moves_within = False
    honest = world.page
    hangs = False

    async def page(cursor: str | None, watched: Mapping[str, Batch]) -> Page:
        if hangs and cursor is not None:
            await asyncio.Event().wait()
        return await honest(cursor, watched)

    async def play() -> None:
        nonlocal hangs
        poller, engine, watches = poller_of(world)
        cast("Any", world).page = page
        await poller._look(watches)
        await engine.ended()
        assert world.answered == {*world.watched}
        world.answered.clear()
        hangs = True
        look = asyncio.ensure_future(poller._look(watches))
        for _ in range(20):
            await asyncio.sleep(0)
        look.cancel()
        with pytest.raises(asyncio.CancelledError):
            await look
        assert not world.answered

    asyncio.run(play())
