"""`import OLD.db`: a config with the jobs of TeckoChecker 0.9, of which the active ones run."""

from __future__ import annotations

import base64
import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet
from harness import COMPONENT, KEBOOLA_TOKEN, OPENAI_KEY, Outcome, Workspace

import teckochecker as tecko

SECRET_KEY = "the old program's own"
STACK = "https://connection.keboola.com"
REST = "it is paused now: remove paused: to start it, or write done: true"

# As TeckoChecker 0.9 made them, with SQLAlchemy.
TABLES = """
CREATE TABLE secrets (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL UNIQUE,
    type VARCHAR(50) NOT NULL, value BLOB NOT NULL, created_at DATETIME);
CREATE TABLE polling_jobs (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL,
    openai_secret_id INTEGER REFERENCES secrets(id), keboola_secret_id INTEGER,
    keboola_stack_url VARCHAR(255), keboola_component_id VARCHAR(255),
    keboola_configuration_id VARCHAR(255), poll_interval_seconds INTEGER, status VARCHAR(50),
    last_check_at DATETIME, next_check_at DATETIME, created_at DATETIME, completed_at DATETIME);
CREATE TABLE job_batches (id INTEGER PRIMARY KEY, job_id INTEGER NOT NULL,
    batch_id VARCHAR(255) NOT NULL, status VARCHAR(50), created_at DATETIME, completed_at DATETIME);
CREATE TABLE polling_logs (id INTEGER PRIMARY KEY, job_id INTEGER, status VARCHAR(50),
    message TEXT, created_at DATETIME);
CREATE TABLE login_attempts (id INTEGER PRIMARY KEY, text TEXT);
INSERT INTO login_attempts (text) VALUES ('keboola_triggered');
"""
STARTED = ("keboola_triggered", "Action: keboola_triggered, Result: 987654")
FAILED = ("error", "Keboola trigger failed: 401 Unauthorized")
POLL_FAILED = ("error", "Failed to check batch batch_a: time-out")


def old_token(text: str, key: str = SECRET_KEY) -> bytes:
    digest = hashlib.sha256(key.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(digest)).encrypt(text.encode())


class OldDatabase:
    """A database of TeckoChecker 0.9: secret 1 is OpenAI's, secret 2 is Keboola's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack_url = STACK
        self.change(TABLES)
        self.add_secret("openai-prod", "openai", old_token(OPENAI_KEY))
        self.add_secret("keboola-prod", "keboola", old_token(KEBOOLA_TOKEN).decode())

    def change(self, script: str) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            db.executescript(script)

    def _insert(self, table: str, **values: Any) -> int:  # noqa: ANN401
        marks = ", ".join("?" * len(values))
        statement = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})"  # noqa: S608
        with closing(sqlite3.connect(self.path)) as db, db:
            return db.execute(statement, tuple(values.values())).lastrowid or 0

    def add_secret(self, name: str, kind: str, value: object) -> int:
        return self._insert("secrets", name=name, type=kind, value=value)

    def add_job(
        self,
        name: str,
        batch_ids: Iterable[object] = ("batch_a",),
        log: Iterable[tuple[str, str]] = (),
        batch_status: str = "in_progress",
        **columns: object,
    ) -> None:
        row = {
            "openai_secret_id": 1,
            "keboola_secret_id": 2,
            "keboola_stack_url": self.stack_url,
            "keboola_component_id": COMPONENT,
            "keboola_configuration_id": "123",
            "poll_interval_seconds": 120,
            "status": "active",
        }
        job_id = self._insert("polling_jobs", name=name, **row | columns)
        for batch_id in batch_ids:
            self._insert("job_batches", job_id=job_id, batch_id=batch_id, status=batch_status)
        for status, message in log:
            self._insert("polling_logs", job_id=job_id, status=status, message=message)


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


def jobs_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the jobs with the defaults filled in."""
    return {name: config["defaults"] | job for name, job in config["jobs"].items()}


def check(workspace: Workspace, done: Outcome) -> Outcome:
    """Put what was printed in place, as `>` does, and check it."""
    workspace.write(done.stdout)
    return workspace.run("check")


def refused(done: Outcome) -> str:
    """Return the one line that a refusal is, with exit code 2 and nothing printed."""
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.removeprefix("teckochecker: ").rstrip("\n")


# --- a whole move ---------------------------------------------------------------------------------

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
}


def test_statuses(workspace: Workspace, old: OldDatabase) -> None:
    """Nothing starts by itself that may have been started; what is not certain is told."""
    for name, (columns, _, _) in MOVES.items():
        old.add_job(name, **columns)
    done = import_it(workspace, old.path)
    notes = [f"the job {name} {note}" for name, (_, _, note) in MOVES.items() if note]
    jobs = config_of(done, notes)["jobs"]
    rests = {name: "".join(key for key in ("done", "paused") if key in jobs[name]) for name in jobs}
    assert rests == {name: rest for name, (_, rest, _) in MOVES.items()}
    assert check(workspace, done).stdout.endswith(": fine: 12 jobs, 12 batches, 2 secrets\n")


def test_a_log_that_is_not_there(workspace: Workspace, old: OldDatabase) -> None:
    """Without its log nobody can tell what has started Keboola: nothing comes over."""
    old.change("DROP TABLE polling_logs")
    line = refused(import_it(workspace, old.path))
    assert line.startswith(f"cannot import {old.path}: no such table: polling_logs; name a copy")


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
    assert {name: s for name, s in workspace.statuses().items() if name != "active"} == {
        "paused": "paused",
        "completed": "completed",
        "completed_with_failures": "completed",
        "failed": "paused",
    }


def test_what_comes_over(workspace: Workspace, old: OldDatabase) -> None:
    """Secrets open with our key, ids stay as they were written, and the database stays as it is."""
    batch_ids = ["batch_b", "batch_a", "batch_b"]
    old.add_job("one", batch_ids, keboola_configuration_id="0123", status="paused")
    old.add_job("two", ["batch_c"], keboola_component_id="keboola.flow", poll_interval_seconds=90)
    old.add_job("three", ["batch_d"], poll_interval_seconds=90)
    before = old.path.read_bytes()
    done = import_it(workspace, old.path)
    config = config_of(done)
    assert done.stdout.startswith(
        f"# Imported from {old.path}. Put it in place of config.yaml and "
    )
    assert "    batch_ids: [batch_b, batch_a]\n" in done.stdout
    assert config["defaults"] == {
        "openai_secret": "openai-prod",
        "keboola_secret": "keboola-prod",
        "component_id": COMPONENT,
        "poll_interval": "90s",
    }
    one = {"batch_ids": ["batch_b", "batch_a"], "config_id": "0123", "poll_interval": "120s"}
    assert config["jobs"] == {
        "one": one | {"paused": True},
        "two": {"batch_ids": ["batch_c"], "config_id": "123", "component_id": "keboola.flow"},
        "three": {"batch_ids": ["batch_d"], "config_id": "123"},
    }
    assert list(config["secrets"]) == ["openai-prod", "keboola-prod"]
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


def test_values(workspace: Workspace, old: OldDatabase) -> None:
    """An id that YAML would read as a number stays that id; an interval is within the limits."""
    intervals = {None: 120, 0: 120, -5: 120, 30: 30, 10**9: 86400, "soon": 120}
    ids = dict(zip(["0123", "1e3", "0x1F", "null", "2024-02-30", "NO"], intervals, strict=True))
    for key, seconds in ids.items():
        old.add_job(key, keboola_configuration_id=key, poll_interval_seconds=seconds)
    config, problems = tecko.parse_config(import_it(workspace, old.path).stdout, Path("x"))
    assert problems == []
    found = {job.config_id: job.poll_interval for job in config.jobs.values()}
    assert found == {key: intervals[seconds] for key, seconds in ids.items()}


NAMES = {
    "  my  job ": "my job",
    "noční běh 🌙": "noční běh 🌙",
    "a: b": "a: b",
    "0123": "0123",
    "no": "no",
    '"it\'s" {x} #1': '"it\'s" {x} #1',
    "a\nb": "a b",
    "a\x1b[31mb": "a [31mb",
    "a/b": "a-b",
    "x" * 250: "x" * 189 + "…",
    " ": "job",
    "<<": "<<",
    "a b": "a b-2",
}


def test_names(workspace: Workspace, old: OldDatabase) -> None:
    """A name stays where it can be one here, and is not taken; else it is made one."""
    for name in NAMES:
        old.add_job(name)
    done = import_it(workspace, old.path)
    notes = [f"the job {tecko.quoted(a)} is called {b} now" for a, b in NAMES.items() if a != b]
    assert list(config_of(done, notes)["jobs"]) == list(NAMES.values())
    assert check(workspace, done).code == 0
    latin = import_it(workspace, old.path, PYTHONIOENCODING="iso-8859-1")
    assert list(yaml.safe_load(latin.stdout)["jobs"]) == list(NAMES.values())


def test_one_token_with_two_stacks(workspace: Workspace, old: OldDatabase) -> None:
    """A token belongs to one stack: a job that used it with another one is left out."""
    old.add_job("one")
    old.add_job("two", keboola_stack_url="https://connection.north-europe.azure.keboola.com/")
    old.add_job("three", keboola_stack_url=f"{STACK}/admin/projects/1")
    note = "the job two is left out: the secret keboola-prod belongs to another stack"
    config = config_of(import_it(workspace, old.path), [note])
    assert list(config["jobs"]) == ["one", "three"]
    assert config["secrets"]["keboola-prod"]["stack_url"] == STACK


def test_names_of_secrets(workspace: Workspace, old: OldDatabase) -> None:
    """A secret's name becomes one that the config can have; its value may be bytes or text."""
    old.change("DELETE FROM secrets WHERE id = 1")
    names = ("Klíč: nový", "Kl-nov", "🌙", "0123", "-a.")
    for i, name in enumerate(names):
        token = old_token("sk-1234567")
        secret = old.add_secret(name, "openai", token if i % 2 else token.decode())
        old.add_job(name, openai_secret_id=secret)
    done = import_it(workspace, old.path)
    config = config_of(done)
    used = [job["openai_secret"] for job in jobs_of(config).values()]
    assert used == ["Kl-nov", "Kl-nov-2", "secret", "0123", "a"]
    values = [config["secrets"][name]["value"] for name in used]
    assert {Fernet(workspace.key).decrypt(value) for value in values} == {b"sk-1234567"}
    assert check(workspace, done).code == 0


# --- what cannot come over ------------------------------------------------------------------------

LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"batch_ids": []}, "it has 0 batches; 1 to 10 are possible"),
    "11": ({"batch_ids": range(11)}, "it has 11 batches; 1 to 10 are possible"),
    "plain": ({"keboola_stack_url": "http://keboola.com"}, "its stack's address is none"),
    "no stack": ({"keboola_stack_url": None}, "its stack's address is none"),
    "no address": ({"keboola_stack_url": "a b"}, "its stack's address is none"),
    "no secret": ({"openai_secret_id": None}, "one of its secrets is not there"),
    "deleted": ({"keboola_secret_id": 77}, "one of its secrets is not there"),
    "no app": ({"keboola_component_id": None}, "it has no component or no configuration"),
    "no target": ({"keboola_configuration_id": ""}, "it has no component or no configuration"),
}


def test_left_out(workspace: Workspace, old: OldDatabase) -> None:
    """A job that a config cannot have is left out, which is told; the rest comes over."""
    for name, (columns, _) in LEFT_OUT.items():
        old.add_job(name, **columns)
    old.add_job("good")
    done = import_it(workspace, old.path)
    notes = [f"the job {name} is left out: {why}" for name, (_, why) in LEFT_OUT.items()]
    assert list(config_of(done, notes)["jobs"]) == ["good"]
    assert check(workspace, done).code == 0


def test_what_only_a_person_can_correct(workspace: Workspace, old: OldDatabase) -> None:
    """A batch id that is none is printed as it was, and told with its place."""
    old.add_job("odd", ["batch_a", "file-1"])
    done = import_it(workspace, old.path)
    assert done.code == 1
    lines = done.stdout.splitlines()
    number = next(n for n, line in enumerate(lines) if "file-1" in line)
    place = f"<imported>:{number + 1}:{lines[number].index('file-1') + 1}"
    assert done.stderr.startswith(f"teckochecker: {place}: jobs.odd.batch_ids")
    assert done.stderr.count("\n") == 1


def test_secrets_that_are_left_out_or_none(workspace: Workspace, old: OldDatabase) -> None:
    """A secret that nobody uses has no stack to belong to; one that is no token is told."""
    unused = [
        f'the secret "{n}-prod" is left out: no job here uses it' for n in ("openai", "keboola")
    ]
    config = config_of(import_it(workspace, old.path), unused)
    assert config == {"secrets": {}, "defaults": {}, "jobs": {}}
    number = old.add_secret("odd", "openai", old_token("sk-S3CR3T\nsk-b"))
    old.add_job("one", openai_secret_id=number)
    first, *_ = import_it(workspace, old.path).stderr.splitlines()
    assert first.startswith("teckochecker: the secret odd has characters that no token has")
    assert first.endswith(" run: teckochecker secret set odd")


# --- what is no import at all ---------------------------------------------------------------------


def test_keys(workspace: Workspace, old: OldDatabase) -> None:
    """Without both keys nothing is printed; the line says which variable or file it is."""
    cure = "set $SECRET_KEY as the old program had it"
    old.add_job("one")
    line = refused(import_it(workspace, old.path, SECRET_KEY="another"))
    assert line == f'$SECRET_KEY does not open the secret "openai-prod"; {cure}'
    line = refused(import_it(workspace, old.path, SECRET_KEY=""))
    assert line == "$SECRET_KEY is not set; set it as the old program had it"
    old.add_job("two", openai_secret_id=old.add_secret("odd", "openai", "příliš"))
    assert 'does not open the secret "odd"' in refused(import_it(workspace, old.path))
    workspace.write()
    workspace.key_file.unlink()
    done = import_it(workspace, old.path)
    assert (done.code, done.stdout) == (2, "")
    assert "cannot read the key file" in done.stderr


NO_DATABASE = {
    "missing": "OLD.db is not a file; name a copy of the SQLite file of TeckoChecker 0.9",
    "text": "cannot import {path}: file is not a database; name a copy of",
    "empty": "cannot import {path}: no such table: secrets; name a copy of",
    "postgresql://tecko:S3CR3T@db/tecko": "OLD.db is not a file; name a copy of the SQLite file",
}


@pytest.mark.parametrize("kind", NO_DATABASE)
def test_no_old_database(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    """What is no database of the old program is refused in one line, without its address."""
    path = kind if "://" in kind else str(tmp_path / "odd.db")
    if kind in {"text", "empty"}:
        Path(path).write_text("" if kind == "empty" else "PGDMP jobs: {}\n" * 1000)
    line = refused(import_it(workspace, path))
    assert line.startswith(NO_DATABASE[kind].format(path=path))
