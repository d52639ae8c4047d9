"""`import OLD.db`: a config with the jobs of TeckoChecker 0.9, of which the active ones run."""

from __future__ import annotations

import base64
import hashlib
import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet
from harness import COMPONENT, KEBOOLA_TOKEN, OPENAI_KEY, Outcome, Workspace

SECRET_KEY = "the old program's own"
STACK = "https://connection.keboola.com"
OTHER_STACK = "https://connection.north-europe.azure.keboola.com"
REST = "it is paused now: remove paused: to start it, or write done: true"

# As TeckoChecker 0.9 made them, with SQLAlchemy, without their times.
TABLES = """
CREATE TABLE secrets (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL UNIQUE,
    type VARCHAR(50) NOT NULL, value BLOB NOT NULL);
CREATE TABLE polling_jobs (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL,
    openai_secret_id INTEGER REFERENCES secrets(id), keboola_secret_id INTEGER,
    keboola_stack_url VARCHAR(255), keboola_component_id VARCHAR(255),
    keboola_configuration_id VARCHAR(255), poll_interval_seconds INTEGER, status VARCHAR(50));
CREATE TABLE job_batches (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL,
    batch_id VARCHAR(255) NOT NULL, status VARCHAR(50));
CREATE TABLE polling_logs (id INTEGER PRIMARY KEY, job_id INTEGER, status VARCHAR(50),
    message TEXT);
"""
STARTED = ("keboola_triggered", "Action: keboola_triggered, Result: 987654")
FAILED = ("error", "Keboola trigger failed: 401 Unauthorized")
POLL_FAILED = ("error", "Failed to check batch batch_a: time-out")


def old_token(text: str) -> bytes:
    digest = hashlib.sha256(SECRET_KEY.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(digest)).encrypt(text.encode())


class OldDatabase:
    """A database of TeckoChecker 0.9: secret 1 is OpenAI's, secret 2 is Keboola's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack_url = STACK
        self.change(TABLES)
        self.insert("secrets", name="openai-prod", type="openai", value=old_token(OPENAI_KEY))
        value = old_token(KEBOOLA_TOKEN).decode()
        self.insert("secrets", name="keboola-prod", type="keboola", value=value)

    def change(self, script: str) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            db.executescript(script)

    def insert(self, table: str, **values: Any) -> int:  # noqa: ANN401
        marks = ", ".join("?" * len(values))
        statement = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})"  # noqa: S608
        with closing(sqlite3.connect(self.path)) as db, db:
            return db.execute(statement, tuple(values.values())).lastrowid or 0

    def add_job(
        self,
        name: str,
        batch_ids: Iterable[object] = ("batch_a",),
        log: Iterable[tuple[str, str]] = (),
        batch_status: str = "in_progress",
        **columns: object,
    ) -> None:
        row = {"openai_secret_id": 1, "keboola_secret_id": 2, "keboola_stack_url": self.stack_url}
        row |= {"keboola_component_id": COMPONENT, "keboola_configuration_id": "123"}
        row |= {"poll_interval_seconds": 120, "status": "active"}
        job_id = self.insert("polling_jobs", name=name, **row | columns)
        for batch_id in batch_ids:
            self.insert("job_batches", job_id=job_id, batch_id=batch_id, status=batch_status)
        for status, message in log:
            self.insert("polling_logs", job_id=job_id, status=status, message=message)


@pytest.fixture
def old(tmp_path: Path) -> OldDatabase:
    return OldDatabase(tmp_path / "old #1.db")


def import_it(workspace: Workspace, old: Path | str, **env: str) -> Outcome:
    """Import an old database; whatever comes of it, no secret and no traceback is printed."""
    done = workspace.run("import", str(old), **{"SECRET_KEY": SECRET_KEY} | env)
    for secret in (OPENAI_KEY, KEBOOLA_TOKEN, SECRET_KEY, workspace.key, "Traceback", "S3CR3T"):
        assert secret not in done.stdout + done.stderr
    return done


def config_of(done: Outcome, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the printed config; what is told besides must be these notes."""
    assert done.stderr.splitlines() == [f"teckochecker: {note}" for note in notes]
    assert done.code == int(bool(notes))
    config: dict[str, Any] = yaml.safe_load(done.stdout)
    return config


def check(workspace: Workspace, done: Outcome) -> Outcome:
    """Put what was printed in place, as `>` does, and check it."""
    workspace.write(done.stdout)
    return workspace.run("check")


def refused(done: Outcome) -> str:
    """Return the one line that a refusal is, with exit code 2 and nothing printed."""
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.removeprefix("teckochecker: ").rstrip("\n")


HAS_STARTED = "has started Keboola: it is done now"
NO_START = "and all its batches are finished, but its log has no start of Keboola"
REFUSED = "was completed, but could not start Keboola"
# What the old program knew of a job; what it comes as, and the note about it.
MOVES: dict[str, tuple[dict[str, Any], str, str]] = {
    "active": ({}, "", ""),
    "ACTIVE": ({"status": "ACTIVE"}, "", ""),
    "polls failed": ({"log": [POLL_FAILED, FAILED]}, "", ""),
    "started": ({"log": [FAILED, STARTED]}, "done", f"was active, but {HAS_STARTED}"),
    "finished": ({"batch_status": "Expired"}, "paused", f"was active, {NO_START}; {REST}"),
    "paused": ({"status": "paused", "batch_status": "completed"}, "paused", ""),
    "completed": ({"status": "completed"}, "done", ""),
    "partly": ({"status": "completed_with_failures", "log": [FAILED, STARTED]}, "done", ""),
    "completed, polls failed": ({"status": "completed", "log": [POLL_FAILED]}, "done", ""),
    "not started": ({"status": "completed", "log": [FAILED]}, "paused", f"{REFUSED}; {REST}"),
    "failed": ({"status": "failed", "log": [FAILED]}, "paused", f"was failed; {REST}"),
    "unknown": ({"status": "x"}, "paused", f"was x; {REST}"),
    "none": ({"status": None, "log": [(None, None)]}, "paused", f"was None; {REST}"),
}


@pytest.mark.long
def test_statuses(workspace: Workspace, old: OldDatabase) -> None:
    """Nothing starts by itself that may have been started; what is not certain is told."""
    for name, (columns, _, _) in MOVES.items():
        old.add_job(name, **columns)
    done = import_it(workspace, old.path)
    notes = [f"the job {name} {note}" for name, (_, _, note) in MOVES.items() if note]
    jobs = config_of(done, notes)["jobs"]
    rests = {name: "".join(key for key in ("done", "paused") if key in jobs[name]) for name in jobs}
    assert rests == {name: rest for name, (_, rest, _) in MOVES.items()}
    assert check(workspace, done).stdout.endswith(": fine: 13 jobs, 13 batches, 2 secrets\n")


@pytest.mark.long
def test_one_pass_starts_only_what_was_active(workspace: Workspace, old: OldDatabase) -> None:
    """With the imported config in place, passes poll and start the active jobs alone."""
    old.stack_url = workspace.sim.stack_url
    for status in ("active", "paused", "completed", "completed_with_failures", "failed"):
        batch_id = f"batch_{status}"
        workspace.sim.add_batch(batch_id, "completed")
        old.add_job(status, [batch_id], status=status, keboola_configuration_id=status)
    done = import_it(workspace, old.path, OPENAI_BASE_URL=f"{workspace.sim.openai_url}/")
    workspace.write(done.stdout)
    for _ in range(2):
        assert workspace.run("--once").code == 0
        assert [job["config"] for job in workspace.sim.jobs] == ["active"]
    assert workspace.looks("batch_completed") == 0
    _, *others = workspace.statuses().values()
    assert others == ["paused", "completed", "completed", "paused"]


def test_what_comes_over(workspace: Workspace, old: OldDatabase) -> None:
    """Secrets open with our key, ids stay as they were written, and the database stays as it is."""
    batch_ids = ["batch_b", "batch_a", "batch_b"]
    old.add_job("one", batch_ids, keboola_configuration_id="0123", status="paused")
    old.add_job("two", ["batch_c"], keboola_component_id="keboola.flow", poll_interval_seconds=None)
    before = old.path.read_bytes()
    done = import_it(workspace, old.path)
    config = config_of(done)
    assert "    batch_ids: [batch_b, batch_a]\n" in done.stdout
    assert config["defaults"] == {
        "openai_secret": "openai-prod",
        "keboola_secret": "keboola-prod",
        "poll_interval": "120s",
    }
    one = {"batch_ids": ["batch_b", "batch_a"], "config_id": "0123", "component_id": COMPONENT}
    assert config["jobs"] == {
        "one": one | {"paused": True},
        "two": {"batch_ids": ["batch_c"], "config_id": "123", "component_id": "keboola.flow"},
    }
    assert config["secrets"]["keboola-prod"]["stack_url"] == STACK
    assert "base_url" not in config["secrets"]["openai-prod"]
    values = {name: secret["value"] for name, secret in config["secrets"].items()}
    opened = {name: Fernet(workspace.key).decrypt(v).decode() for name, v in values.items()}
    assert opened == {"openai-prod": OPENAI_KEY, "keboola-prod": KEBOOLA_TOKEN}
    workspace.path.write_text("")  # as `> config.yaml` does: the key is found all the same
    assert import_it(workspace, old.path).code == 0
    assert check(workspace, done).code == 0
    assert old.path.read_bytes() == before
    assert [path.name for path in old.path.parent.iterdir() if path.is_file()] == [old.path.name]


# Names and configuration ids, and as what they come over.
NAMES = {
    "  my  job ": "my job",
    "noční běh 🌙": "noční běh 🌙",
    "0123": "0123",
    '"it\'s" {x} #1': '"it\'s" {x} #1',
    "a\nb": "a b",
    "a\x1b[31mb": "a [31mb",
    "a/b": "a-b",
    "x" * 250: "x" * 179 + "…",
    " ": "job",
    "a b": "a b-10",
}
IDS = ["0123", "1e3", "0x1F", "null", "2024-02-30", "NO", "1_0", "1", "2", "3"]


@pytest.mark.long
def test_names_and_ids(workspace: Workspace, old: OldDatabase) -> None:
    """A name becomes one that is possible and free; what looks like a number stays as it was."""
    for name, config_id in zip(NAMES, IDS, strict=True):
        old.add_job(name, keboola_configuration_id=config_id)
    done = import_it(workspace, old.path)
    jobs = config_of(done)["jobs"]
    assert list(jobs) == list(NAMES.values())
    assert [job["config_id"] for job in jobs.values()] == IDS
    assert check(workspace, done).code == 0
    latin = import_it(workspace, old.path, PYTHONIOENCODING="iso-8859-1")
    assert list(yaml.safe_load(latin.stdout)["jobs"]) == list(NAMES.values())


def test_secrets(workspace: Workspace, old: OldDatabase) -> None:
    """A name becomes one that the config can have, and a token with two stacks two secrets."""
    old.change("DELETE FROM secrets WHERE id = 1")
    for i, name in enumerate(("Klíč: nový", "Kl-nov", "🌙", "0123", "-a.")):
        token = old_token("sk-1234567")
        value = token if i % 2 else token.decode()
        secret = old.insert("secrets", name=name, type="openai", value=value)
        old.add_job(name, openai_secret_id=secret)
    old.add_job("elsewhere", openai_secret_id=secret, keboola_stack_url=f"{OTHER_STACK}/")
    done = import_it(workspace, old.path)
    config = config_of(done)
    used = [job["openai_secret"] for job in config["jobs"].values()]
    assert used == ["Kl-nov", "Kl-nov-4", "secret", "0123", "a", "a"]
    values = [config["secrets"][name]["value"] for name in used]
    assert {Fernet(workspace.key).decrypt(value) for value in values} == {b"sk-1234567"}
    stacks = [config["secrets"][j["keboola_secret"]]["stack_url"] for j in config["jobs"].values()]
    assert stacks == [STACK] * 5 + [OTHER_STACK]
    assert check(workspace, done).code == 0


# What a config cannot have, and the key under which that is told.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"batch_ids": [], "status": "paused"}, "jobs.no batch.batch_ids"),
    "11": ({"batch_ids": range(11)}, "jobs.11.batch_ids"),
    "no stack": ({"keboola_stack_url": None}, "secrets.keboola-prod"),
    "no address": ({"keboola_stack_url": "a b"}, "secrets.keboola-prod.stack_url"),
    "no secret": ({"openai_secret_id": None}, "defaults.openai_secret"),
    "deleted": ({"keboola_secret_id": 77}, "defaults.keboola_secret"),
    "no app": ({"keboola_component_id": None}, "defaults.component_id"),
    "no target": ({"keboola_configuration_id": ""}, "jobs.no target.config_id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_only_a_person_can_correct(name: str, workspace: Workspace, old: OldDatabase) -> None:
    """It is printed as it was, and told with its place and cure."""
    columns, path = WRONG[name]
    old.add_job(name, **columns)
    done = import_it(workspace, old.path)
    assert done.code == 1
    assert name in yaml.safe_load(done.stdout)["jobs"]
    assert re.match(rf"teckochecker: <imported>:\d+:\d+: {re.escape(path)}: .*; ", done.stderr)


@pytest.mark.long
def test_keys(workspace: Workspace, old: OldDatabase) -> None:
    """Without both keys nothing is printed; the line says which variable or file it is."""
    cure = "set $SECRET_KEY as the old program had it"
    old.add_job("one")
    for key in ("another", ""):
        line = refused(import_it(workspace, old.path, SECRET_KEY=key))
        assert line == f'$SECRET_KEY does not open the secret "openai-prod"; {cure}'
    for name, value in (("odd", "příliš"), ("number", 5)):
        old.insert("secrets", name=name, type="openai", value=value)
        old.change("UPDATE polling_jobs SET openai_secret_id = (SELECT max(id) FROM secrets)")
        assert f'does not open the secret "{name}"' in refused(import_it(workspace, old.path))
    workspace.write()
    workspace.key_file.unlink()
    done = import_it(workspace, old.path)
    assert (done.code, done.stdout) == (2, "")
    assert "cannot read the key file" in done.stderr


NO_DATABASE = {
    "postgresql://tecko:S3CR3T@db/tecko": "unable to open database file",
    "text": "file is not a database",
    "empty": "no such table: polling_jobs",
    "no log": "no such table: polling_logs",  # nobody can tell what has started Keboola
}


@pytest.mark.parametrize("kind", NO_DATABASE)
def test_no_old_database(kind: str, workspace: Workspace, old: OldDatabase) -> None:
    """What is no database of the old program is refused in one line, without its address."""
    if kind == "no log":
        old.change("DROP TABLE polling_logs")
    else:
        old.path.write_text("PGDMP jobs: {}\n" * 1000 if kind == "text" else "")
    line = refused(import_it(workspace, kind if "://" in kind else old.path))
    cure = "name a copy of 0.9's SQLite file (if it was PostgreSQL, copy its tables into one)"
    assert line == f"cannot import OLD.db: {NO_DATABASE[kind]}; {cure}"
