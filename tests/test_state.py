"""The state file, with real SQLite files: what is stored is stored whole, and nothing is lost."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import teckochecker as tc
from teckochecker import (
    Batch,
    Event,
    Job,
    LockedError,
    Request,
    StateError,
    StateLock,
    StorageError,
    Store,
    Target,
    Trigger,
    TriggerState,
    Work,
)

NOW = 1_800_000_000.0
PROGRAM = Path(tc.__file__).resolve()
TARGET = Target("https://connection.keboola.com", "app", "1", None)
NOBODY = 65534
ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store.open(path)
    yield opened
    opened.close()


def job(name: str, *ids: str, paused: bool = False) -> Job:
    return Job(name, ids or ("batch_a", "batch_b"), "o", "k", "app", "1", paused=paused)


def sync(store: Store, *jobs: Job, target: Target = TARGET) -> list[Work]:
    targets = {one.name: target for one in jobs}
    return store.sync({one.name: one for one in jobs}, targets, store.works())


def all_known(path: Path, store: Store) -> list[tc.Known]:
    """Every piece of work that the state file has."""
    return store.known(key for (key,) in rows(path, "SELECT batch_key FROM jobs"))


def trigger(**more: Any) -> Trigger:  # noqa: ANN401 - any field
    plain = Trigger("tid", 0, TriggerState.INTENT, TARGET, "k", "{}", "basis", NOW)
    return replace(plain, **more)


def full_trigger() -> Trigger:
    """One whose every field has a value of its own."""
    return Trigger(
        id="a1",
        rerun=0,
        state=TriggerState.UNKNOWN,
        target=Target("https://connection.x", "component", "config", "branch"),
        secret="a secret's name",
        payload='{"a": "ř"}',
        basis="b2",
        created_at=NOW + 0.125,
        sending_at=NOW + 1.5,
        unknown_at=NOW + 2.5,
        unknown_boot="a-boot",
        unknown_uptime_s=77.5,
        clear_searches=3,
        forced=True,
        failures=4,
        next_try_at=NOW + 5.5,
        sent_at=NOW + 6.5,
        keboola_job_id="7",
        keboola_status="waiting",
        url="https://connection.x/job/7",
        error="what went wrong",
        project_id="4711",
        unknowns=2,
        asked_wait_s=8.5,
        said="what the server said",
    )


def full_batch(batch_id: str) -> Batch:
    """One whose every field has a value of its own."""
    return Batch(
        id=batch_id,
        status="expired",
        total=10**14,
        completed=2,
        failed=3,
        output_file_id="file-1",
        error_file_id="file-2",
        created_at=NOW - 10.5,
        ended_at=NOW - 5.25,
        error="a line of words",
        fileless_since=NOW - 4.5,
    )


def full_work(work: Work) -> Work:
    """A known piece of work with every other field changed."""
    return replace(
        work,
        batches=tuple(full_batch(batch.id) for batch in work.batches),
        target=Target("https://connection.y", "c2", "g2", "b2"),
        position=5,
        paused=True,
        done=True,
        error="ouch",
        failures=9,
        last_check_at=NOW + 0.5,
        next_check_at=NOW + 1.5,
        completed_at=NOW + 2.5,
        trigger=full_trigger(),
    )


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def logged(path: Path) -> list[str]:
    return [name for (name,) in rows(path, "SELECT event FROM logs ORDER BY id")]


@contextmanager
def traced(store: Store) -> Iterator[list[str]]:
    """The writing statements that SQLite runs meanwhile."""
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    try:
        yield statements
    finally:
        store._db.set_trace_callback(None)
        statements[:] = [s for s in statements if re.match(r"\s*(INSERT|UPDATE|DELETE|REPLACE)", s)]


# ---- the file ----


def test_commits_survive_power_loss(store: Store) -> None:
    """WAL with a sync at each commit, and foreign keys are checked."""
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "user_version")
    values = [store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
    assert values == ["wal", 2, 1, len(tc.MIGRATIONS)]


TABLES = (
    "jobs",
    "batches",
    "triggers",
    "logs",
    "requests",
    "meta",
    "accounts",
    "alarms",
    "notices",
)


def test_every_table_is_strict(store: Store) -> None:
    """A value of a wrong type is refused, not stored as it came."""
    tables = [*store._db.execute("SELECT name, strict FROM pragma_table_list WHERE schema='main'")]
    ours = {name: strict for name, strict in tables if not name.startswith("sqlite_")}
    assert ours == dict.fromkeys(TABLES, 1)
    with pytest.raises(StorageError, match="cannot store TEXT value in REAL column"):
        store.log([Event("fact")], "yesterday")  # type: ignore[arg-type]


def test_opening_again_changes_nothing(path: Path) -> None:
    """The schema is made once; a second start finds everything as it was."""
    with closing(Store.open(path)) as first:
        before = sync(first, job("a"))
    schema = rows(path, "SELECT * FROM sqlite_schema")
    with closing(Store.open(path)) as second:
        assert second.works() == before
    assert rows(path, "SELECT * FROM sqlite_schema") == schema


def test_an_interrupted_migration_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema is brought to its version as a whole, and what is left can be migrated later."""
    broken = (*tc.MIGRATIONS[-1], "CREATE NONSENSE")
    with monkeypatch.context() as patch:
        patch.setattr(tc, "MIGRATIONS", (*tc.MIGRATIONS[:-1], broken))
        with pytest.raises(StateError, match="NONSENSE"):
            Store.open(path)
    assert rows(path, "SELECT name FROM sqlite_schema") == []
    Store.open(path).close()


def test_a_file_of_the_first_schema_is_brought_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier version has stored is there after the migrations, none of it changed."""
    with monkeypatch.context() as patch:
        patch.setattr(tc, "MIGRATIONS", tc.MIGRATIONS[:1])
        store = Store.open(path)
        store._db.executescript(
            """
            INSERT INTO jobs (id, name, batch_key, stack_url, component_id, config_id)
            VALUES (7, 'old', '["batch_a"]', 'https://s', 'c', '1');
            INSERT INTO triggers (job_id, rerun, id, state, stack_url, component_id, config_id,
                secret, payload, basis, created_at, unknown_at)
            VALUES (7, 0, 'id', 'unknown', 'https://s', 'c', '1', 'k', '{}', 'b', 5, 6);
            """
        )
        store.close()
    store = Store.open(path)
    trigger = store.works()[0].trigger
    store.close()
    assert trigger
    assert (trigger.state, trigger.unknown_since) == (TriggerState.UNKNOWN, tc.Moment(6))


def test_a_newer_schema_is_refused_and_not_touched(path: Path) -> None:
    """The file of a newer program stays as it is, and the message says what to run."""
    Store.open(path).close()
    newer = len(tc.MIGRATIONS) + 1
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {newer}")
    before = path.read_bytes()
    message = f"the state file {path} has schema {newer}; this program knows {newer - 1}"
    for opening in (lambda: Store.open(path), lambda: read_all(path)):
        with pytest.raises(StateError) as caught:
            opening()
        assert str(caught.value) == f"{message}; run the newer teckochecker that wrote it"
    assert path.read_bytes() == before


def big_file(path: Path) -> None:
    with closing(Store.open(path)) as store:
        sync(store, *(job(f"job-{n}", f"batch_{n}") for n in range(300)))


def garble(path: Path, start: int, length: int = 4096) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + length] = b"\xa5" * len(data[start : start + length])
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_text("jobs:\n  nightly: {}\n" * 100),
    "short text": lambda path: path.write_text("jobs: {}\n"),
    "zeros": lambda path: path.write_bytes(bytes(20_000)),
    "a page": lambda path: garble(path, 2 * 4096),
    "all but the header": lambda path: garble(path, 100, 10**6),
    "the header": lambda path: garble(path, 0, 100),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 3 * 4096),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_and_not_touched(
    path: Path, damage: Callable[[Path], object]
) -> None:
    """What is no whole database is refused with the way out, and kept byte by byte."""
    big_file(path)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StateError) as caught:
        Store.open(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(tc.STATE_HINT)
    assert path.read_bytes() == before


KILLED = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")  # so that changes reach the file before the commit
db.execute("BEGIN")
db.execute("CREATE TABLE jobs (name TEXT)")
for _ in range(50):
    db.execute("INSERT INTO jobs VALUES (hex(randomblob(2000)))")
os._exit(9)
"""


def test_a_first_start_that_was_killed(path: Path) -> None:
    """What SQLite had half written is undone; read-only, as the file is checked, it cannot be."""
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    journal = path.with_name(path.name + "-journal")
    assert journal.stat().st_size
    assert path.stat().st_size
    with closing(Store.open(path)) as store:
        assert store.works() == []
    assert not journal.exists()


def test_another_programs_database_is_refused(path: Path) -> None:
    """A wrong `state:` must not make tables in a database that belongs to somebody else."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
    before = path.read_bytes()
    with pytest.raises(StateError):
        Store.open(path)
    assert path.read_bytes() == before


def test_a_place_without_a_directory_is_told(tmp_path: Path) -> None:
    """A missing directory is no traceback, for the file and for its lock."""
    missing = tmp_path / "missing" / "state.db"
    with pytest.raises(StateError, match="No such file or directory; create the directory"):
        Store.open(missing)
    with pytest.raises(StateError, match="No such file or directory; create the directory"):
        StateLock(missing, "daemon")


# ---- what is stored ----


def test_every_field_survives(path: Path, store: Store) -> None:
    """Each field of a work, its batches and its trigger is read back as it was written."""
    [before] = sync(store, job("a"))
    after = full_work(before)
    store.save([(before, after)], [], NOW)
    assert store.works() == [after]
    store.close()
    with closing(Store.open(path)) as again:
        assert again.works() == [after]


def test_the_fields_of_the_round_trip_are_all_there_are() -> None:
    """The test above has a value other than the default for each field there is."""
    plain = Work(1, "a", (Batch("b"),), TARGET, position=None)
    pairs: list[tuple[Any, Any, set[str]]] = [
        (full_work(plain), plain, {"id", "name", "rerun"}),
        (full_batch("b"), Batch("b"), {"id"}),
        (full_trigger(), trigger(), {"rerun"}),
    ]
    for full, bare, given in pairs:
        same = {f.name for f in fields(bare) if getattr(full, f.name) == getattr(bare, f.name)}
        assert same == given


@pytest.mark.parametrize("state", TriggerState)
def test_every_state_of_a_trigger_can_be_stored(store: Store, state: TriggerState) -> None:
    """The states that the model knows are those that the table takes."""
    [before] = sync(store, job("a"))
    store.save([(before, replace(before, trigger=trigger(state=state)))], [], NOW)
    [after] = store.works()
    assert after.trigger is not None
    assert after.trigger.state is state


def test_each_rerun_has_its_own_trigger(path: Path, store: Store) -> None:
    """A forced repetition begins without a trigger, and the first one's history stays."""
    [first] = sync(store, job("a"))
    sent = replace(first, trigger=trigger(state=TriggerState.SENT, keboola_job_id="5"))
    store.save([(first, sent)], [], NOW)
    repeated = replace(sent, rerun=1, trigger=None)
    store.save([(sent, repeated)], [], NOW)
    assert store.works() == [repeated]
    assert not all_known(path, store)[0].is_finished
    second = replace(repeated, trigger=trigger(rerun=1, id="other"))
    store.save([(repeated, second)], [], NOW)
    assert store.works() == [second]
    found = rows(path, "SELECT rerun, id, keboola_job_id FROM triggers ORDER BY rerun")
    assert found == [(0, "tid", "5"), (1, "other", None)]


def intend(store: Store, work: Work) -> None:
    """A change of everything: the work, a batch, its trigger and the log."""
    after = replace(
        work,
        error="new",
        batches=(replace(work.batches[0], status="completed"), *work.batches[1:]),
        trigger=trigger(payload="x" * 5000),
    )
    store.save([(work, after)], [Event("trigger_intended", job="a")], NOW)


@pytest.mark.parametrize("table", ["jobs", "batches", "triggers", "logs"])
def test_a_change_is_stored_whole_or_not_at_all(path: Path, store: Store, table: str) -> None:
    """If any of its rows cannot be written, none is, and the next change goes through."""
    [work] = sync(store, job("a"))
    verb = "UPDATE" if table == "jobs" else "INSERT"
    body = "BEGIN SELECT RAISE(ABORT, 'the disk is on fire'); END"
    store._db.execute(f"CREATE TRIGGER fire BEFORE {verb} ON {table} {body}")
    with pytest.raises(StorageError, match="the disk is on fire"):
        intend(store, work)
    assert store.works() == [work]
    assert logged(path) == []
    store._db.execute("DROP TRIGGER fire")
    intend(store, work)
    assert store.works() != [work]
    assert logged(path) == ["trigger_intended"]


def test_a_full_disk_loses_nothing(path: Path, store: Store) -> None:
    """What does not fit is not stored at all; when there is room again, it is."""
    [work] = sync(store, job("a"))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match=r"database or disk is full; free the disk$"):
        intend(store, work)
    assert store.works() == [work]
    assert logged(path) == []
    store._db.execute(f"PRAGMA max_page_count = {pages + 100}")
    intend(store, work)
    assert logged(path) == ["trigger_intended"]


def test_an_exception_inside_a_transaction_takes_it_back(path: Path, store: Store) -> None:
    """Also what is no error of SQLite leaves nothing half done and nothing locked."""
    [work] = sync(store, job("a"))
    broken = replace(work, batches=())  # not as many as before: ValueError
    with pytest.raises(ValueError, match="zip"):
        store.save([(work, replace(broken, error="half"))], [], NOW)
    assert store.works() == [work]
    store.log([Event("fine")], NOW)
    assert logged(path) == ["fine"]


def test_another_writer_makes_it_fail_for_a_while(path: Path, store: Store) -> None:
    """While somebody else writes, nothing is stored and the error says so; then all goes on."""
    [work] = sync(store, job("a"))
    store._db.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError) as caught:
            intend(store, work)
        assert "database is locked; see who else has the file open" in str(caught.value)
        other.execute("ROLLBACK")
    intend(store, work)
    assert logged(path) == ["trigger_intended"]


def test_a_file_of_this_version_opens_beside_a_writer(path: Path) -> None:
    """Nothing is written at a start that changes nothing, so nobody has to be waited for."""
    Store.open(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        Store.open(path).close()


def names(works: list[Work]) -> list[tuple[str, int | None]]:
    return [(work.name, work.position) for work in works]


def test_the_rows_follow_the_config(path: Path, store: Store) -> None:
    """New jobs get rows, others are left out or moved, and the order is the config's."""
    a, b, c = (job(name, f"batch_{name}") for name in "abc")
    assert names(sync(store, a, b)) == [("a", 0), ("b", 1)]
    assert names(sync(store, b, c)) == [("b", 0), ("c", 1)]
    assert names(sync(store, c, b, a)) == [("c", 0), ("b", 1), ("a", 2)]
    assert [known.name for known in all_known(path, store)] == ["a", "b", "c"]
    assert sync(store) == []


def test_an_unchanged_config_writes_nothing(store: Store) -> None:
    """The same config again writes no row."""
    jobs = [job(f"job-{n}", f"batch_{n}") for n in range(20)]
    sync(store, *jobs)
    before = store._db.total_changes
    with traced(store) as statements:
        sync(store, *jobs)
    assert statements == []
    assert store._db.total_changes == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"paused": True}, ["jobs"]),
        ({"batch_ids": ("batch_2", "batch_1")}, ["batches", "batches"]),
        ({"mode": "debug", "poll_interval_s": 9, "variables": (("a", "b"),)}, []),
        ({"batch_ids": ("batch_9",)}, ["jobs", "jobs", "batches"]),
    ],
)
def test_only_what_differs_is_written(
    store: Store, change: dict[str, Any], expected: list[str]
) -> None:
    """A changed job costs the rows of the change, and the other jobs' rows nothing."""
    others = [job(f"job-{n}", f"batch_x{n}") for n in range(20)]
    one = job("one", "batch_1", "batch_2")
    sync(store, *others, one)
    with traced(store) as statements:
        sync(store, *others, replace(one, **change))
    tables = [re.findall("jobs|batches|triggers", statement)[0] for statement in statements]
    assert sorted(tables, key=len) == expected


def test_only_the_changed_batch_is_written(store: Store) -> None:
    """A look that shows news of one batch writes that batch's row only."""
    [work] = sync(store, job("a", "batch_1", "batch_2", "batch_3"))
    seen = replace(work.batches[1], status="completed")
    with traced(store) as statements:
        store.save(
            [(work, replace(work, batches=(work.batches[0], seen, work.batches[2])))], [], NOW
        )
    assert len(statements) == 1
    assert "batches" in statements[0]


def test_a_new_order_of_ids_keeps_what_is_known(store: Store) -> None:
    """The same ids in another order are the same work, shown in the config's order."""
    [work] = sync(store, job("a", "batch_1", "batch_2"))
    store.save([(work, full_work(work))], [], NOW)
    [after] = sync(store, job("a", "batch_2", "batch_1"))
    assert after.id == work.id
    assert after.batches == (full_batch("batch_2"), full_batch("batch_1"))
    assert after.trigger == full_trigger()


def test_other_ids_are_new_work_and_the_old_outcome_comes_back(store: Store) -> None:
    """A job's history stays while its ids are others, and is shown again with them."""
    [work] = sync(store, job("a", "batch_1"))
    done = replace(work, trigger=trigger(state=TriggerState.SENT), completed_at=NOW)
    store.save([(work, done)], [], NOW)
    [other] = sync(store, job("a", "batch_2"))
    assert other.id != work.id
    assert other.trigger is None
    assert sync(store, job("a", "batch_1")) == [done]


def test_a_job_that_comes_back_is_the_same_work(store: Store) -> None:
    """Removed and brought back, also after a while, it has its trigger still."""
    [work] = sync(store, job("a"))
    done = replace(work, trigger=trigger(state=TriggerState.SENT))
    store.save([(work, done)], [], NOW)
    assert sync(store) == []
    assert sync(store, job("b", "batch_z"))[0].id != work.id
    assert sync(store, job("a")) == [done]


def test_a_renamed_job_keeps_its_row_and_its_trigger(path: Path, store: Store) -> None:
    """The row gets the new name, and what is stored under it stays."""
    [work] = sync(store, job("a"))
    done = replace(work, trigger=trigger(state=TriggerState.SENT))
    store.save([(work, done)], [], NOW)
    assert sync(store, job("b")) == [replace(done, name="b")]
    assert rows(path, "SELECT count(*) FROM jobs") == [(1,)]
    assert sync(store, job("a")) == [done]


def test_a_swap_of_names_is_no_conflict(store: Store) -> None:
    """Two jobs that exchange their ids are two other pieces of work, and exchange them back."""
    first = sync(store, job("a", "batch_1"), job("b", "batch_2"))
    crossed = sync(store, job("a", "batch_2"), job("b", "batch_1"))
    assert {work.id for work in first}.isdisjoint(work.id for work in crossed)
    assert sync(store, job("a", "batch_1"), job("b", "batch_2")) == first


@pytest.mark.parametrize("state", TriggerState)
def test_an_undecided_trigger_is_live_without_its_job(store: Store, state: TriggerState) -> None:
    """Of a removed job, only a trigger that is neither sent nor rejected is gone on with."""
    [work] = sync(store, job("a"))
    store.save([(work, replace(work, trigger=trigger(state=state)))], [], NOW)
    is_decided = state in {TriggerState.SENT, TriggerState.REJECTED}
    assert names(sync(store)) == ([] if is_decided else [("a", None)])


def test_a_sync_that_fails_changes_nothing(path: Path, store: Store) -> None:
    """The rows follow a config as a whole or not at all."""
    before = sync(store, job("a", "batch_1"))
    body = "WHEN new.id = 'batch_bad' BEGIN SELECT RAISE(ABORT, 'no'); END"
    store._db.execute(f"CREATE TRIGGER fire BEFORE INSERT ON batches {body}")
    with pytest.raises(StorageError):
        sync(store, job("b", "batch_2"), job("c", "batch_bad"))
    assert store.works() == before
    assert len(all_known(path, store)) == 1


def test_touch_writes_only_the_times(store: Store) -> None:
    """A look without news stores when it was, when the next one is, and what it took."""
    [work] = sync(store, job("a"))
    looked = replace(work, last_check_at=NOW, next_check_at=NOW + 60)
    usage = tc.Usage("openai", 3, 1, NOW, NOW - 2, NOW - 1, "503")
    store.touch([(work.id, NOW, NOW + 60)], {"o": usage})
    assert store.works() == [looked]
    assert store.usages() == {"o": usage}


# ---- log, requests, facts ----


def test_log_rows_are_json_objects(path: Path, store: Store) -> None:
    """An event's fields are stored as JSON, whatever they are, with their time and level."""
    values = {"batch_id": "batch_a", "n": 1, "text": "ř\ud800", "path": Path("x")}
    store.log([Event("fact", "warning", "a", values)], NOW)
    [(at, level, event, job_name, stored)] = rows(
        path, "SELECT at, level, event, job, fields FROM logs"
    )
    assert (at, level, event, job_name) == (NOW, "warning", "fact", "a")
    assert json.loads(stored) == {**values, "path": repr(Path("x"))}


def test_a_request_is_done_once(path: Path, store: Store) -> None:
    """Its effect and that it is settled are one transaction, in the order of asking."""
    [work] = sync(store, job("a"))
    with closing(Store.open(path)) as person:
        person.ask(work, force=True, now=NOW)
        person.ask(replace(work, rerun=2), force=False, now=NOW)
    first = Request(1, "a", force=True, rerun=0, was_finished=False)
    asked = [first, Request(2, "a", force=False, rerun=2, was_finished=False)]
    assert store.requests() == asked
    after = replace(work, rerun=1)
    body = "BEGIN SELECT RAISE(ABORT, 'no'); END"
    store._db.execute(f"CREATE TRIGGER fire BEFORE INSERT ON logs {body}")
    with pytest.raises(StorageError):
        store.settle(1, work, after, [Event("retry_taken")], NOW)
    assert store.requests() == asked
    assert store.works() == [work]
    store._db.execute("DROP TRIGGER fire")
    store.settle(1, work, after, [Event("retry_taken")], NOW)
    assert store.requests() == asked[1:]
    assert store.works() == [after]
    store.dismiss(2, [Event("retry_refused")], NOW)
    assert store.requests() == []
    assert logged(path) == ["retry_taken", "retry_refused"]


def test_pruning_keeps_what_is_young_or_open(path: Path, store: Store) -> None:
    """Old log rows and old settled requests go; open requests and jobs stay however old."""
    [work] = sync(store, job("a"))
    for at in (NOW - 100, NOW, NOW + 100):
        store.log([Event(f"at_{at - NOW:.0f}")], at)
        store.ask(work, force=False, now=at)
    store.dismiss(1, [], NOW - 100)
    store.dismiss(2, [], NOW)
    store.prune(NOW)
    assert logged(path) == ["at_0", "at_100"]
    assert [row[0] for row in rows(path, "SELECT id FROM requests ORDER BY id")] == [2, 3]
    assert [request.id for request in store.requests()] == [3]
    assert store.works() == [work]
    store.prune(NOW + 1000)
    assert logged(path) == ["at_100"]  # numbers go on from the newest: `logs --follow` counts on it


def test_facts_about_the_process(store: Store) -> None:
    """A fact is stored as JSON, replaced by the next one, and None where there is none."""
    assert store.meta("config") is None
    for value in ({"path": "x", "error": None}, {"path": "y", "error": "ř"}):
        store.put_meta("config", value, [Event("config_loaded")], NOW)
        assert store.meta("config") == value


def test_the_data_version_shows_what_others_commit(path: Path, store: Store) -> None:
    """It changes when another connection commits, and not by what this one does."""
    [work] = sync(store, job("a"))
    first = store.data_version()
    store.log([Event("own")], NOW)
    assert store.data_version() == first
    with closing(Store.open(path)) as other:
        other.ask(work, force=False, now=NOW)
        second = store.data_version()
        assert second != first
        assert store.data_version() == second
        other.ask(work, force=False, now=NOW)
        assert store.data_version() != second


# ---- in place ----


@pytest.mark.parametrize("replacing", [False, True])
def test_a_file_that_is_gone_is_noticed(path: Path, store: Store, *, replacing: bool) -> None:
    """A state file that was deleted or replaced is no longer the one that is open."""
    assert store.is_in_place()
    if replacing:
        shutil.copy(path, path.with_name("copy"))
        path.with_name("copy").replace(path)
    else:
        path.unlink()
    assert not store.is_in_place()


@pytest.mark.parametrize("replacing", [False, True])
def test_a_lock_that_is_gone_is_noticed(path: Path, *, replacing: bool) -> None:
    """A lock file that was deleted or replaced keeps nobody out any more."""
    with closing(StateLock(path, "daemon")) as lock:
        assert lock.is_in_place()
        other = path.with_name("copy")
        other.touch()
        other.replace(lock.path) if replacing else lock.path.unlink()
        assert not lock.is_in_place()


def test_the_directory_moved_away_is_noticed(tmp_path: Path) -> None:
    """Also where the whole directory was moved, file and lock are not in place."""
    (tmp_path / "old").mkdir()
    path = tmp_path / "old" / "state.db"
    with closing(StateLock(path, "daemon")) as lock, closing(Store.open(path)) as store:
        (tmp_path / "old").rename(tmp_path / "new")
        assert not store.is_in_place()
        assert not lock.is_in_place()


# ---- the lock ----

HOLD = "import teckochecker as tc, pathlib, sys; lock = tc.StateLock(pathlib.Path(sys.argv[1]),"


@contextmanager
def another_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lock."""
    code = HOLD + " 'daemon'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=PROGRAM.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_holds_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loser names the holder's pid and purpose, and exits 75; after a kill the lock is free."""
    monkeypatch.setattr(StateLock, "PATIENCE_S", 0.01)
    with another_holder(path) as holder:
        assert tc.holder_of(path) == tc.Holder.DAEMON
        with pytest.raises(LockedError) as caught:
            StateLock(path, "once")
        assert f"another instance holds {path}.lock: pid {holder.pid} (daemon)" in str(caught.value)
        assert caught.value.exit_code == 75
    assert tc.holder_of(path) == tc.Holder.NOBODY
    StateLock(path, "once").close()


def test_a_lock_file_left_behind_is_no_obstacle(path: Path) -> None:
    """The kernel's lock counts, not the file; its old content is replaced by the new holder's."""
    lock_file = tc.lock_path(path)
    lock_file.write_bytes(b"pid 999999 (daemon)\n" + b"\xff\x00" * 500)
    with closing(StateLock(path, "once")):
        assert lock_file.read_text() == f"pid {os.getpid()} (once)\n"


@contextmanager
def reading(path: Path) -> Iterator[int]:
    fd = os.open(tc.lock_path(path), os.O_RDONLY | os.O_CREAT, 0o644)
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_reader_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader holds the lock for moments: who wants to act waits until it is done."""
    tried = threading.Event()
    flock = fcntl.flock

    def telling(fd: int, how: int) -> None:
        try:
            flock(fd, how)
        except BlockingIOError:
            tried.set()
            raise

    with reading(path) as fd:

        def end_reading() -> None:
            assert tried.wait(10)
            flock(fd, fcntl.LOCK_UN)

        monkeypatch.setattr(fcntl, "flock", telling)
        reader = threading.Thread(target=end_reading)
        reader.start()
        StateLock(path, "daemon").close()
        reader.join()
    assert tried.is_set()


def test_a_reader_that_stays_is_named_as_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in vain for a reader is told that it is one."""
    monkeypatch.setattr(StateLock, "PATIENCE_S", 0.01)
    with reading(path), pytest.raises(LockedError, match="a reader"):
        StateLock(path, "daemon")


@pytest.mark.parametrize("name", ["state.db", "state.db.lock"])
def test_own_files_are_no_links(path: Path, name: str) -> None:
    """A link in the place of a file of ours is refused, and what it leads to is left alone."""
    target = path.with_name("elsewhere")
    target.touch()
    path.with_name(name).symlink_to(target)
    with pytest.raises(StateError, match="put the file itself there, not a link to it"):
        StateLock(path, "daemon").close() if name.endswith(".lock") else Store.open(path).close()
    assert target.read_bytes() == b""


def test_a_link_is_no_lock(path: Path) -> None:
    """What hangs on a link could be anybody's: a reader that meets one does not rely on it."""
    target = path.with_name("elsewhere")
    target.touch()
    tc.lock_path(path).symlink_to(target)
    with tc.shared_lock(path) as is_free:
        assert not is_free


# ---- readers ----


def read_all(path: Path) -> list[Work] | None:
    with tc.read_store(path) as store:
        return store.works() if store else None


def test_a_reader_of_nothing(path: Path) -> None:
    """Where there is no state file yet, or an empty one, there is nothing, and nothing is made."""
    assert read_all(path) is None
    path.touch()
    assert read_all(path) is None
    assert path.read_bytes() == b""


def test_a_reader_sees_what_the_writer_commits(path: Path, store: Store) -> None:
    """Beside a writer in the middle of a transaction, a reader has the last commit."""
    works = sync(store, job("a"))
    with store.transaction():
        store._db.execute("UPDATE jobs SET error = 'half'")
        assert read_all(path) == works
    assert read_all(path) == [replace(works[0], error="half")]


def test_a_reader_after_a_clean_stop(path: Path) -> None:
    """A file that nobody has open is read all the same, and the daemon can go on with it."""
    with closing(Store.open(path)) as store:
        works = sync(store, job("a"))
    assert not path.with_name("state.db-wal").exists()
    assert read_all(path) == works
    with closing(Store.open(path)) as store:
        assert store.works() == works


def test_a_reader_cannot_write(path: Path) -> None:
    """What `status` opens cannot change anything."""
    with closing(Store.open(path)) as store:
        sync(store, job("a"))
    with tc.read_store(path) as reader:
        assert reader is not None
        with pytest.raises(StorageError, match="readonly"):
            reader.prune(NOW)


@pytest.mark.parametrize("damage", ["no database", "the header"])
def test_a_reader_refuses_a_damaged_file(path: Path, damage: str) -> None:
    """What is no database is told, also to a reader, without a traceback."""
    big_file(path)
    DAMAGES[damage](path)
    with pytest.raises(StateError, match="cannot read the state file"):
        read_all(path)


AS_NOBODY = f"""
import os, pathlib, sys
import teckochecker as tc
path = pathlib.Path(sys.argv[1])
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
try:
    with tc.read_store(path) as store:
        print([work.name for work in store.works()] if store else None, flush=True)
        if "stay" in sys.argv:
            sys.stdin.read()
except tc.StateError as error:
    print("refused:", error)
"""


@contextmanager
def nobody(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A reader without write permission; the interpreter may lie where it cannot go."""
    with subprocess.Popen(
        [sys.executable, "-c", AS_NOBODY, str(path), *words],
        cwd=PROGRAM.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_as_nobody(path: Path) -> str:
    with nobody(path) as process:
        return process.communicate(timeout=20)[0].strip()


@pytest.fixture
def public() -> Iterator[Path]:
    """A state file in a directory that everybody can read; pytest's own are private."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "state.db"


@ONLY_ROOT
def test_a_reader_without_write_permission(public: Path) -> None:
    """It reads beside the daemon and after a clean stop, and makes no files."""
    with closing(StateLock(public, "daemon")), closing(Store.open(public)) as store:
        sync(store, job("a"))
        assert read_as_nobody(public) == "['a']"
        sync(store, job("a"), job("b", "batch_b"))
        assert read_as_nobody(public) == "['a', 'b']"
    files = sorted(public.parent.iterdir())
    assert read_as_nobody(public) == "['a', 'b']"
    assert sorted(public.parent.iterdir()) == files


@ONLY_ROOT
def test_a_reader_that_takes_the_file_as_it_is_keeps_writers_out(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `immutable` is in use, nobody begins to act; when the reader is gone, all is free."""
    monkeypatch.setattr(StateLock, "PATIENCE_S", 0.01)
    with closing(StateLock(public, "daemon")), closing(Store.open(public)) as store:
        sync(store, job("a"))
    with nobody(public, "stay") as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "['a']\n"
        with pytest.raises(LockedError):
            StateLock(public, "daemon")
    StateLock(public, "daemon").close()


@ONLY_ROOT
def test_a_starting_daemon_is_not_read_past(public: Path) -> None:
    """With the lock held and no WAL to read, a reader without permission is refused, not fooled."""
    with closing(Store.open(public)) as store:
        sync(store, job("a"))
    with closing(StateLock(public, "daemon")):
        assert read_as_nobody(public).startswith("refused: cannot read the state file")
    assert read_as_nobody(public) == "['a']"


@ONLY_ROOT
def test_a_copy_without_a_lock_file_can_be_read(public: Path) -> None:
    """A copied state file, which nobody has acted on, is read without a lock."""
    with closing(Store.open(public)) as store:
        sync(store, job("a"))
    assert not tc.lock_path(public).exists()
    assert read_as_nobody(public) == "['a']"


@ONLY_ROOT
@pytest.mark.parametrize("private", ["file", "directory"])
def test_a_reader_that_may_not_read_is_told(public: Path, private: str) -> None:
    """A state file, or its directory, closed to others is an error with a next step."""
    with closing(Store.open(public)) as store:
        sync(store, job("a"))
    (public if private == "file" else public.parent).chmod(0o600)
    answer = read_as_nobody(public)
    assert answer.startswith("refused: cannot ")
    assert str(public) in answer
    assert "; run this as " in answer


@ONLY_ROOT
def test_what_root_makes_belongs_to_the_directorys_owner(public: Path) -> None:
    """A command that root ran must not leave files that the daemon's user cannot write."""
    os.chown(public.parent, NOBODY, NOBODY)
    with closing(StateLock(public, "once")), closing(Store.open(public)) as store:
        sync(store, job("a"))
        owners = {found.name: found.stat().st_uid for found in public.parent.iterdir()}
    names = ("state.db", "state.db-shm", "state.db-wal", "state.db.lock")
    assert owners == dict.fromkeys(names, NOBODY)
