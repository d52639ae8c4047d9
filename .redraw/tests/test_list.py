"""Pages of an account's list: what they save, and that nothing on them can lose or double a job.

A look reads pages from twenty due batches on, so that each account here has at least thirty.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import simulator
from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PATIENCE_S,
    Daemon,
    JsonObject,
    Workspace,
    variables,
)
from simulator import Answer, ApiError, Request, Simulator
from test_crash import UNHANDLED, LaggingQueue, World

LOOKING = Path(__file__).with_name("looking.py")
IDS_EACH = 10  # batches of a job, as many as one may have
Transform = Callable[[JsonObject], object]
Bent = Callable[[Request, simulator.Handler], Answer]


# ---- a workspace whose looks can be told apart ----


class Looker(Workspace):
    """Looks happen one at a time, when a test wants one, and their requests are counted."""

    looks_made = 0

    def command(self, *arguments: str) -> list[str]:
        whole = super().command(*arguments)
        return [*whole[:3], str(LOOKING), *whole[4:]]

    def add_jobs(self, prefix: str, batch_ids: Sequence[str], **keys: object) -> list[str]:
        """Adds jobs of ten batches each, all of which the simulator has; their names."""
        names = []
        for start in range(0, len(batch_ids), IDS_EACH):
            names.append(f"{prefix}{start // IDS_EACH}")
            ids = list(batch_ids[start : start + IDS_EACH])
            self.jobs[names[-1]] = {"batch_ids": ids, "config_id": names[-1], **keys}
        return names

    def look(self, daemon: Daemon | None = None) -> tuple[Daemon, list[Request]]:
        """Has every account looked at once; the daemon, and the requests of that.

        Nothing but a change of its interval makes a job due.
        """
        self.looks_made += 1
        self.config["defaults"]["poll_interval"] = f"{3600 + self.looks_made}s"
        self.sim.reset_stats()
        unfinished = self.unfinished(is_begun=daemon is not None)
        mark = daemon.mark() if daemon else 0
        if daemon:
            self.write()
        else:
            daemon = self.start()
        self.wait_for_ends(daemon, mark, len(unfinished))
        return daemon, [r for r in self.requests if r.route.startswith("openai.")]

    def unfinished(self, *, is_begun: bool = True) -> set[str]:
        """The accounts that have something to be looked at."""
        jobs = self.status()["jobs"] if is_begun else [{"name": name} for name in self.jobs]
        return {
            self.jobs[job["name"]].get("openai_secret", "openai")
            for job in jobs
            if not is_begun or job["completed_count"] + job["failed_count"] < job["batch_count"]
        }

    @staticmethod
    def wait_for_ends(daemon: Daemon, mark: int, accounts: int) -> None:
        """Waits until the looks at so many accounts are over."""
        place = mark
        ended: set[str] = set()
        while len(ended) < accounts:
            event = daemon.wait_for_event("look_ended", 60.0, since=place)
            place = daemon.events.index(event, place) + 1
            ended.add(event["account"])


def looker_of(directory: Path, sim: Simulator) -> Iterator[Looker]:
    space = Looker(directory, sim)
    try:
        yield space
    finally:
        space.close()


@pytest.fixture
def looker(tmp_path: Path, sim: Simulator) -> Iterator[Looker]:
    yield from looker_of(tmp_path / "looker", sim)


def batch_ids(count: int, salt: str = "") -> list[str]:
    """Ids as OpenAI makes them: their order says nothing."""
    names = (hashlib.sha256(f"{salt}{number}".encode()).hexdigest() for number in range(count))
    return [f"batch_{name[:24]}" for name in names]


def seed(sim: Simulator, ids: Iterable[str], *, spaced_s: int = 0, **more: Any) -> None:  # noqa: ANN401
    """Adds batches, the last one the newest; `spaced_s` lie between two of them."""
    ids = list(ids)
    now = int(time.time())
    for number, batch_id in enumerate(ids):
        created_at = now - spaced_s * (len(ids) - number)
        sim.add_batch(batch_id, created_at=created_at, **more)


# ---- accounts ----


def key_of(name: str) -> str:
    """A key of its own for an account; its end tells it from others."""
    return f"sk-list-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def add_account(workspace: Workspace, name: str, project: str = "proj_default") -> str:
    """Makes an account known to simulator and config; its key."""
    workspace.sim.add_key(key_of(name), project)
    workspace.secrets[name] = workspace.openai_secret(key_of(name))
    return key_of(name)


def by_account(requests: Iterable[Request], names: Iterable[str]) -> dict[str, int]:
    """How many requests each account has made."""
    made = [r.headers["authorization"] for r in requests]
    return {name: made.count(f"Bearer {key_of(name)}") for name in names}


# ---- how many requests ----

SPACINGS = pytest.mark.parametrize("spaced_s", [2, 0], ids=["spaced", "at_once"])


def count_looks(looker: Looker, times: int, daemon: Daemon | None = None) -> list[int]:
    """The numbers of requests of some looks, one after the other."""
    counts = []
    for _ in range(times):
        daemon, requests = looker.look(daemon)
        counts.append(len(requests))
    return counts


TOTAL = 20_000
# Which batches an account watches, and how many requests its first and its later looks may take.
SCENES: dict[str, tuple[Sequence[int], int, int]] = {
    "newest": (range(TOTAL - 1000, TOTAL), 11, 11),
    "clusters": ([200 * n + k for n in range(100) for k in range(50, 60)], 1000, 120),
    "singly": (range(100, TOTAL, TOTAL // 10), 10, 10),
    "deep": (range(5000, 5050), 50, 50),
}


@SPACINGS
def test_requests_per_look(looker: Looker, spaced_s: int) -> None:
    """Where batches stand together a page answers for them; a look never takes more than one each.

    Four accounts see the same 20,000 batches, each with others of them in its jobs.
    """
    ids = batch_ids(TOTAL)
    seed(looker.sim, ids, spaced_s=spaced_s)
    for name, (watched, _, _) in SCENES.items():
        add_account(looker, name)
        looker.add_jobs(name, [ids[number] for number in watched], openai_secret=name)
    looker.config["limits"]["max_concurrency"] = 50
    daemon, requests = looker.look()
    for name, count in by_account(requests, SCENES).items():
        assert 0 < count <= SCENES[name][1], name
    for _ in range(4 if spaced_s else 2):
        daemon, requests = looker.look(daemon)
        counts = by_account(requests, SCENES)
        for name, count in counts.items():
            assert 0 < count <= SCENES[name][2], name
    if spaced_s:  # where all are of one age, nothing tells in which part of the list they are
        assert counts["deep"] <= 5
    assert len(daemon.events_of("batch_status_changed")) == 1000 + 1000 + 10 + 50
    assert daemon.events_of("list_not_usable") == []


@pytest.mark.parametrize(
    ("scene", "spaced_s"),
    [
        pytest.param("newest", 2, id="newest-spaced"),
        pytest.param("newest", 0, id="newest-at_once"),
        pytest.param("clusters", 2, id="clusters-spaced"),
    ],
)
def test_requests_per_look_after_a_restart(looker: Looker, scene: str, spaced_s: int) -> None:
    """A restart knows the batches' ages already, and has its pages within a few looks."""
    ids = batch_ids(4000)
    seed(looker.sim, ids, spaced_s=spaced_s)
    clusters = [200 * n + k for n in range(20) for k in range(50, 60)]
    numbers = range(3800, 4000) if scene == "newest" else clusters
    looker.add_jobs("job", [ids[number] for number in numbers])
    daemon, _ = looker.look()
    daemon.kill()
    daemon, _ = looker.look()
    counts = count_looks(looker, 4, daemon)
    most = 3 if scene == "newest" else 24
    assert min(counts) <= most, counts


# ---- a job that is not due ----


def test_what_is_not_due_is_brought_up_to_date(workspace: Workspace) -> None:
    """A page that is read for others' sake shows a job's end an hour before it would be asked."""
    ids = batch_ids(40)
    seed(workspace.sim, ids)
    for start in (10, 20, 30):  # created later, so that a page goes on from them to the rare one
        workspace.add_job(f"busy{start}", *ids[start : start + 10])
    workspace.add_job("rare", *ids[:10], poll_interval="1h")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="rare")
    for batch_id in ids[:10]:
        workspace.sim.finish(batch_id)
    daemon.wait_for_event("trigger_sent", job="rare")
    workspace.assert_one_job("rare")
    assert "openai.get" not in workspace.sim.request_counts


# ---- lists that are none, and odd ones ----

JOBS_EACH = 3  # of an account
WATCHED = [*range(60, 75), *range(140, 155)]  # of an account's 180 batches, in order of creation


class Accounts(Looker):
    """Accounts with a project and three jobs each, among foreign batches."""

    def __init__(self, directory: Path, sim: Simulator) -> None:
        super().__init__(directory, sim)
        self.watched: dict[str, list[str]] = {}
        self.job_names: dict[str, list[str]] = {}
        self.config["limits"] |= {"max_concurrency": 30, "request_timeout": "1s"}

    def add(self, name: str) -> None:
        key = add_account(self, name, project=name)
        ids = batch_ids(180, salt=name)
        seed(self.sim, ids, spaced_s=2, project=name)
        self.watched[name] = [ids[number] for number in WATCHED]
        self.job_names[name] = self.add_jobs(f"{name}-", self.watched[name], openai_secret=name)
        assert key == key_of(name)

    def look_at_all(self, daemon: Daemon | None = None) -> tuple[Daemon, dict[str, list[Request]]]:
        """Has all accounts looked at; each one's requests."""
        daemon, requests = self.look(daemon)
        made: dict[str, list[Request]] = {name: [] for name in self.watched}
        names = {f"Bearer {key_of(name)}": name for name in self.watched}
        for request in requests:
            made[names[request.headers["authorization"]]].append(request)
        return daemon, made

    def finish_all(self) -> None:
        """Ends all batches; one of each job, in the config's order the last, fails."""
        for ids in self.watched.values():
            for number, batch_id in enumerate(ids):
                self.sim.finish(batch_id, "failed" if number % IDS_EACH == 9 else "completed")

    def assert_one_job_each(self, daemon: Daemon) -> None:
        """Each job gets one Keboola job, with its own batches in the config's order."""
        for name in self.jobs:
            daemon.wait_for_event("trigger_sent", job=name)
        started = [variables(job) for job in self.sim.jobs]
        assert len(started) == JOBS_EACH * len(self.watched)
        by_name = {values["teckochecker_job"]: values for values in started}
        for name, job in self.jobs.items():
            *completed, failed = job["batch_ids"]
            assert by_name[name]["batch_ids_completed"] == compact(completed)
            assert by_name[name]["batch_ids_failed"] == compact([failed])


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.fixture
def accounts(tmp_path: Path, sim: Simulator) -> Iterator[Accounts]:
    space = Accounts(tmp_path / "accounts", sim)
    try:
        yield space
    finally:
        space.close()


NO_LISTS: dict[str, tuple[str, JsonObject]] = {
    "status_404": ("status", {"code": 404}),
    "status_405": ("status", {"code": 405}),
    "status_401": ("status", {"code": 401}),
    "status_500": ("status", {"code": 500}),
    "html": ("body", {}),
    "bare_list": ("json", {"obj": []}),
    "other_shape": ("json", {"obj": {"batches": []}}),
    "redirect": ("redirect", {}),
    "hang": ("hang_before", {}),
}


def test_no_usable_list(accounts: Accounts) -> None:
    """Without a list each batch is asked for by itself, in the same look; that is told once."""
    for name, (kind, options) in NO_LISTS.items():
        accounts.add(name)
        accounts.sim.fault("openai.list", kind, None, match=key_of(name), **options)
    accounts.add("honest")
    daemon = None
    for number in range(2):
        daemon, made = accounts.look_at_all(daemon)
        for name, requests in made.items():
            asked = [r for r in requests if r.route == "openai.get"]
            pages = [r for r in requests if r.route == "openai.list"]
            if name == "honest":
                assert len(pages) <= 4
                assert asked == []
            else:
                assert len(asked) >= 29 + (number > 0), name
                assert len(pages) <= (2 if number == 0 else 0), name
    assert daemon
    assert len(daemon.events_of("list_not_usable")) == len(NO_LISTS)
    assert daemon.events_of("poll_failed") == []
    accounts.finish_all()
    accounts.look(daemon)
    accounts.assert_one_job_each(daemon)


def bend(sim: Simulator, changes: dict[str, Bent]) -> None:
    """Has accounts' lists answered by functions, which are given the honest way to do it."""
    routes = sim._openai.routes
    (place,) = (n for n, route in enumerate(routes) if route.name == "openai.list")
    honest = routes[place].handler

    def handler(request: Request) -> Answer:
        change = changes.get(request.headers["authorization"].removeprefix("Bearer "))
        return change(request, honest) if change else honest(request)

    routes[place] = replace(routes[place], handler=handler)


def from_the_top(request: Request, honest: simulator.Handler) -> Answer:
    """Return the first page, whatever the cursor."""
    return honest(replace(request, target=request.path + "?limit=100"))


def cursor_not_known(status: int | None, request: Request, honest: simulator.Handler) -> Answer:
    """Answer a cursor that is not a batch any more with a status, or with the first page."""
    try:
        return honest(request)
    except ApiError as error:
        if error.status != 404:
            raise
        if status is None:
            return from_the_top(request, honest)
        raise ApiError(status, "Invalid 'after'.") from None


class MovingList:
    """A list to which batches are added, and from which foreign ones go, between any two pages."""

    def __init__(self, sim: Simulator, project: str, watched: Sequence[str], bent: Bent) -> None:
        self._sim, self._project, self._bent = sim, project, bent
        self._watched = set(watched)
        self._random = random.Random(project)  # noqa: S311 - the same every time
        self._added = 0

    def __call__(self, request: Request, honest: simulator.Handler) -> Answer:
        answer = self._bent(request, honest)
        ids = [row["id"] for row in json.loads(answer.body)["data"]]
        foreign = [key for key in ids if key not in self._watched]
        for gone in {*self._random.sample(foreign, len(foreign) // 8), *foreign[-1:]}:
            self._sim.delete_batch(gone)
        for _ in range(self._random.choice((0, 1, 7, 40))):
            self._added += 1
            self._sim.add_batch(f"batch_{self._project}_new{self._added}", project=self._project)
        return answer


def with_rows(change: Callable[[list[JsonObject]], list[Any]], **more: object) -> Transform:
    """What makes other rows of a page's; an error stays what it is."""

    def transform(document: JsonObject) -> object:
        if "data" not in document:
            return document
        return {**document, "data": change(document["data"]), **more}

    return transform


def with_garbage(rows: list[JsonObject]) -> list[Any]:
    garbage: list[Any] = [None, 7, "batch", [], {}, {"id": 7}, {"id": None, "status": "completed"}]
    wrong = [{**row, "status": None} if n % 3 == 0 else row for n, row in enumerate(rows)]
    mixed = [thing for row in wrong for thing in (*garbage, {"status": "completed"}, row)]
    return [*mixed, *garbage]


def with_odd_ids(rows: list[JsonObject], watched: Sequence[str]) -> list[JsonObject]:
    """Foreign ids become such as no URL can carry."""
    odd = ["\ud800", "batch_" + "x" * 70_000, "", "a&after=b#c", "\r\nX: y"]
    return [
        row if row["id"] in watched else {**row, "id": odd[n % len(odd)]}
        for n, row in enumerate(rows)
    ]


def with_odd_times(rows: list[JsonObject]) -> list[JsonObject]:
    odd: list[object] = [None, "now", -1, 1e300, True, [], 0]
    return [{**row, "created_at": odd[n % len(odd)]} for n, row in enumerate(rows)]


def ended(row: JsonObject) -> JsonObject:
    """Return a row that says no more than that its batch has ended."""
    return {"id": row["id"], "object": "batch", "status": "completed"}


def without_input(row: JsonObject) -> JsonObject:
    return {key: value for key, value in row.items() if key != "input_file_id"}


ODD_PAGES: dict[str, Callable[[Sequence[str]], Transform]] = {
    "garbage": lambda _: with_rows(with_garbage),
    "repeated": lambda _: with_rows(lambda rows: [r for row in rows for r in (row, row)] + rows),
    "foreign_only": lambda ids: with_rows(lambda rows: [r for r in rows if r["id"] not in ids]),
    "empty": lambda _: with_rows(lambda _: [], has_more=True),
    "said_to_end": lambda _: with_rows(list, has_more=False),
    "said_to_go_on": lambda _: with_rows(list, has_more=True),
    "without_has_more": lambda _: with_rows(list, has_more=None),
    "capitals": lambda _: with_rows(
        lambda rows: [{**row, "status": row["status"].upper()} for row in rows]
    ),
    "bare_ends": lambda _: with_rows(lambda rows: [ended(row) for row in rows]),
    "without_input": lambda _: with_rows(lambda rows: [without_input(row) for row in rows]),
    "odd_ids": lambda ids: with_rows(lambda rows: with_odd_ids(rows, ids)),
    "odd_times": lambda _: with_rows(with_odd_times),
    "few_rows": lambda _: with_rows(lambda rows: rows[:20], has_more=True),
    "oldest_first": lambda _: with_rows(lambda rows: rows[::-1]),
}
BENT: dict[str, Bent] = {
    "same_page_again": from_the_top,
    "moving": partial(cursor_not_known, 404),
    "moving_400": partial(cursor_not_known, 400),
    "moving_from_the_top": partial(cursor_not_known, None),
}


def test_odd_pages(accounts: Accounts) -> None:
    """Whatever pages show, no look takes more than one request a batch, and no job is mistaken."""
    for name, make in ODD_PAGES.items():
        accounts.add(name)
        transform = make(accounts.watched[name])
        accounts.sim.fault("openai.list", "json", None, match=key_of(name), transform=transform)
    bent: dict[str, Bent] = {}
    for name, change in BENT.items():
        accounts.add(name)
        if name.startswith("moving"):
            bent[key_of(name)] = MovingList(accounts.sim, name, accounts.watched[name], change)
        else:
            bent[key_of(name)] = change
    bend(accounts.sim, bent)
    daemon = None
    for _ in range(3):
        daemon, made = accounts.look_at_all(daemon)
        for name, requests in made.items():
            pages = sum(r.route == "openai.list" for r in requests)
            asked = {r.target for r in requests if r.route == "openai.get"}  # some maybe twice:
            assert pages + len(asked) <= len(WATCHED), name  # on a busy machine a second is short
    assert daemon
    assert accounts.sim.jobs == []
    accounts.finish_all()
    for _ in range(4):  # what a look has risked in vain is asked for in a later one
        if accounts.unfinished():
            accounts.look(daemon)
    accounts.assert_one_job_each(daemon)
    assert daemon.events_of("poll_failed") == []


def test_an_end_seen_on_a_page_stays(looker: Looker) -> None:
    """What a page has shown to have ended stays so, whatever later pages say."""
    ids = batch_ids(30)
    seed(looker.sim, ids)
    first, *_ = looker.add_jobs("job", ids)
    looker.sim.finish(ids[0], "cancelled")
    daemon, _ = looker.look()
    looker.sim.set_batch(ids[0], status="in_progress")
    looker.look(daemon)
    assert looker.job(first)["batches"][0]["status"] == "cancelled"
    for batch_id in ids[1:]:
        looker.sim.finish(batch_id)
    looker.look(daemon)
    daemon.wait_for_event("trigger_sent", job=first)
    assert variables(looker.started(first)[0])["batch_ids_failed"] == compact([ids[0]])
    assert "openai.get" not in looker.sim.request_counts


def test_a_cursor_that_is_gone_at_the_start(looker: Looker) -> None:
    """A deleted batch whose age is known from before a restart does not cost the list its use."""
    ids = batch_ids(40)
    seed(looker.sim, ids, spaced_s=2)
    looker.add_jobs("job", ids)
    looker.sim.finish(ids[-1])
    daemon, _ = looker.look()
    daemon.kill()
    looker.sim.delete_batch(ids[-1])
    daemon, requests = looker.look()
    assert len(requests) <= 40
    counts = count_looks(looker, 3, daemon)
    assert daemon.events_of("list_not_usable") == []
    assert min(counts) <= 3, counts


def test_a_list_that_hangs_from_now_on(looker: Looker) -> None:
    """Where pages get no answer any more, each batch is asked for by itself in the same look."""
    ids = batch_ids(1000)
    watched = [ids[100 * n + k] for n in range(10) for k in range(10)]
    seed(looker.sim, ids, spaced_s=2)
    looker.add_jobs("job", watched)
    looker.config["limits"]["request_timeout"] = "1s"
    daemon, _ = looker.look()
    _, requests = looker.look(daemon)
    assert len(requests) <= 11
    looker.sim.fault("openai.list", "hang_before", None)
    _, requests = looker.look(daemon)
    assert daemon.events_of("poll_failed") == []
    assert sum(r.route == "openai.get" for r in requests) >= 90
    assert len(daemon.events_of("list_not_usable")) == 1


@pytest.mark.parametrize("status", [400, 404])
def test_a_list_that_is_gone_at_the_start(looker: Looker, status: int) -> None:
    """A start that knows the ages, and asks with cursors only, finds out that there is no list."""
    ids = batch_ids(40)
    seed(looker.sim, ids, spaced_s=2)
    looker.add_jobs("job", ids)
    daemon, _ = looker.look()
    daemon.kill()
    looker.sim.fault("openai.list", "status", None, code=status)
    daemon, requests = looker.look()
    assert len(requests) <= 40
    assert max(count_looks(looker, 4, daemon)) <= 40
    assert len(daemon.events_of("list_not_usable")) == 1
    assert daemon.events_of("poll_failed") == []


@pytest.mark.parametrize(("size", "first"), [(1, 31), (10, 30)])
def test_passes_without_a_list(workspace: Workspace, size: int, first: int) -> None:
    """Where there is no list, one pass may take a request more, and no later one does."""
    ids = batch_ids(30)
    seed(workspace.sim, ids)
    for start in range(0, 30, size):
        workspace.add_job(f"job{start}", *ids[start : start + size])
    workspace.sim.fault("openai.list", "status", None, code=404)
    counts = []
    for _ in range(3):
        workspace.sim.reset_stats()
        outcome = workspace.once()
        assert outcome.code == 0
        counts.append(sum(r.route.startswith("openai.") for r in workspace.requests))
    assert counts == [first, 30, 30]
    for batch_id in ids:
        workspace.sim.finish(batch_id)
    assert workspace.once().code == 0
    assert len(workspace.sim.jobs) == 30 // size


# ---- while a page is on its way ----

LOST_S = PATIENCE_S  # a look that is lost never comes; the others are there within two
FILLED = ("job0", "job1", "job2")


@pytest.fixture
def filled(workspace: Workspace) -> Workspace:
    """Three jobs of ten batches in progress, which one page shows."""
    seed(workspace.sim, batch_ids(30))
    for number, name in enumerate(FILLED):
        workspace.add_job(name, *batch_ids(30)[10 * number : 10 * number + 10])
    return workspace


def hold_page(workspace: Workspace, when: str = "after") -> simulator.Hold:
    """Ends all batches and holds the page that shows it."""
    for batch_id in batch_ids(30):
        workspace.sim.finish(batch_id)
    return workspace.sim.hold("openai.list", when)


def assert_all_once(
    workspace: Workspace, daemon: Daemon, *names: str, within_s: float = PATIENCE_S
) -> None:
    """Each of the jobs gets its one Keboola job, and nothing else has started any."""
    for name in names:
        daemon.wait_for_event("trigger_sent", within_s, job=name)
    for name in names:
        workspace.assert_one_job(name)
        completed = variables(workspace.started(name)[0])["batch_ids_completed"]
        assert completed == compact(workspace.jobs[name]["batch_ids"])
    assert len(workspace.sim.jobs) == len(names)


def test_paused_while_a_page_is_held(filled: Workspace) -> None:
    """A job that is paused meanwhile learns nothing of the page, and goes on when it may again."""
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    filled.jobs["job1"]["paused"] = True
    filled.reload(daemon)
    hold.release()
    assert_all_once(filled, daemon, "job0", "job2")
    assert filled.job("job1")["completed_count"] == 0
    assert filled.job("job1")["status"] == "paused"
    filled.jobs["job1"]["paused"] = False
    filled.reload(daemon)
    assert_all_once(filled, daemon, *FILLED)


@pytest.mark.parametrize("back", ["while_held", "later"])
def test_removed_while_a_page_is_held(filled: Workspace, back: str) -> None:
    """A job that is gone when the page comes starts nothing, and does so when it is back."""
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    kept = filled.jobs.pop("job1")
    filled.reload(daemon)
    if back == "while_held":
        filled.jobs["job1"] = kept
        filled.reload(daemon)
        hold.release()
    else:
        hold.release()
        assert_all_once(filled, daemon, "job0", "job2")
        filled.jobs["job1"] = kept
        filled.reload(daemon)
    assert_all_once(filled, daemon, *FILLED)


def test_renamed_while_a_page_is_held(filled: Workspace) -> None:
    """A new name meanwhile is the same work: it starts one Keboola job, under that name."""
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    filled.jobs["renamed"] = filled.jobs.pop("job1")
    filled.reload(daemon)
    hold.release()
    assert_all_once(filled, daemon, "job0", "job2", "renamed")


def test_other_ids_while_a_page_is_held(filled: Workspace) -> None:
    """With other ids meanwhile, the name stands for new work, which the page does not end."""
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    filled.jobs.pop("job1")
    filled.add_job("job1", "batch_other", status="in_progress")
    filled.reload(daemon)
    hold.release()
    assert_all_once(filled, daemon, "job0", "job2")
    filled.sim.finish("batch_other")
    assert_all_once(filled, daemon, *FILLED)


@pytest.mark.parametrize("known", ["new_account", "known_account"])
def test_other_account_while_a_page_is_held(filled: Workspace, known: str) -> None:
    """A job that goes to another account learns nothing of the old one's page, but of the new."""
    add_account(filled, "other", project="other")
    if known == "known_account":
        filled.sim.add_batch("batch_there", project="other")
        filled.add_job("there", "batch_there", openai_secret="other", poll_interval="1h")
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    filled.jobs["job1"]["openai_secret"] = "other"
    filled.reload(daemon)
    time.sleep(0.2)  # until the other account has seen that the job is being looked at: no sign
    hold.release()
    assert_all_once(filled, daemon, "job0", "job2")
    daemon.wait_for_event("poll_failed", LOST_S, job="job1", status=404)
    assert filled.job("job1")["completed_count"] == 0


@pytest.mark.parametrize("count", [1, 3])
def test_new_key_while_a_page_is_held(filled: Workspace, count: int) -> None:
    """With a new key for some or for all jobs meanwhile, each is looked at with its own one."""
    add_account(filled, "new")
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    for name in FILLED[:count]:
        filled.jobs[name]["openai_secret"] = "new"
    filled.reload(daemon)
    hold.release()
    assert_all_once(filled, daemon, *FILLED, within_s=LOST_S)


def test_end_while_a_page_is_held(filled: Workspace) -> None:
    """SIGTERM does not wait for a page, and the next start begins anew."""
    hold = hold_page(filled)
    daemon = filled.daemon()
    hold.wait_reached()
    assert daemon.stop() == 0
    hold.release()
    assert filled.sim.jobs == []
    assert_all_once(filled, filled.daemon(), *FILLED)


def test_killed_while_pages_are_held(filled: Workspace) -> None:
    """Killed before, after and amid an answer with a page, each job starts one Keboola job."""
    for when in ("before", "after", "half"):
        hold = hold_page(filled, when)
        daemon = filled.daemon()
        hold.wait_reached()
        daemon.kill()
        hold.release()
    assert filled.sim.jobs == []
    assert_all_once(filled, filled.daemon(), *FILLED)


def test_one_broken_list_of_two(filled: Workspace) -> None:
    """An account whose pages never come delays no look of another one."""
    add_account(filled, "other", project="other")
    ids = batch_ids(30, salt="other")
    seed(filled.sim, ids, project="other")
    for number in range(3):
        mine = ids[10 * number : 10 * number + 10]
        filled.add_job(f"other{number}", *mine, openai_secret="other")
    hold = filled.sim.hold("openai.list", "before", None, match=key_of("other"))
    daemon = filled.daemon()
    hold.wait_reached()
    for batch_id in batch_ids(30):
        filled.sim.finish(batch_id)
    assert_all_once(filled, daemon, *FILLED)
    for batch_id in ids:
        filled.sim.finish(batch_id)
    hold.release()
    assert_all_once(filled, daemon, *FILLED, "other0", "other1", "other2")


# ---- many ends at once ----


def test_burst(workspace: Workspace) -> None:
    """Three hundred jobs whose ends pages show at once start one Keboola job each."""
    ids = batch_ids(300)
    seed(workspace.sim, ids)
    for number, batch_id in enumerate(ids):
        workspace.jobs[f"job{number}"] = {"batch_ids": [batch_id], "config_id": f"c{number}"}
    workspace.config["limits"]["max_concurrency"] = 50
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="job0")
    for batch_id in ids:
        workspace.sim.finish(batch_id)
    workspace.sim.wait_for(lambda: len(workspace.sim.jobs) >= 300, 60.0)
    assert daemon.stop() == 0
    started = [variables(job) for job in workspace.sim.jobs]
    assert {(v["teckochecker_job"], v["batch_ids_completed"]) for v in started} == {
        (f"job{number}", compact([batch_id])) for number, batch_id in enumerate(ids)
    }
    assert len(started) == 300
    assert {job["trigger"]["state"] for job in workspace.status()["jobs"]} == {"sent"}
    assert workspace.sim.request_counts.get("openai.get", 0) <= 3


# ---- crashes of the trigger, behind pages ----


def test_the_crash_matrix_is_behind_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `test_crash` kills the process at a trigger, all batches were seen on a page.

    One more of its cases: killed at pages, then at POSTs, each job starts one Keboola job.
    """
    monkeypatch.setattr(simulator, "Queue", LaggingQueue)
    with Simulator() as sim:
        sim.add_key(OPENAI_KEY)
        sim.add_token(KEBOOLA_TOKEN)
        with closing(World(tmp_path / "world", sim, shift=1)) as world:
            for when in ("before", "after", "half"):
                hold = sim.hold("openai.list", when)
                process = world.start()
                hold.wait_reached(PATIENCE_S)
                process.kill()
                hold.release()
            assert sim.jobs == []
            world.crash(UNHANDLED)
            world.recover()
            world.assert_exactly_one()
            assert sim.request_counts["openai.list"] >= 4
            assert "openai.get" not in sim.request_counts
