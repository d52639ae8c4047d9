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
OTHER_STACK = "https://connection.north-europe.azure.keboola.com"

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
"""


def old_token(text: str, key: str = SECRET_KEY) -> bytes:
    digest = hashlib.sha256(key.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(digest)).encrypt(text.encode())


class OldDatabase:
    """A database of TeckoChecker 0.9: secret 1 is OpenAI's, secret 2 is Keboola's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack_url = STACK
        self._change(TABLES)
        self.add_secret("openai-prod", "openai", old_token(OPENAI_KEY))
        self.add_secret("keboola-prod", "keboola", old_token(KEBOOLA_TOKEN).decode())

    def _change(self, script: str) -> None:
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
        self, name: str, batch_ids: Iterable[object] = ("batch_a",), **columns: object
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
            self._insert("job_batches", job_id=job_id, batch_id=batch_id, status="in_progress")

    def change(self, statement: str) -> None:
        self._change(statement)


@pytest.fixture
def old(tmp_path: Path) -> OldDatabase:
    return OldDatabase(tmp_path / "old #1.db")


def import_it(workspace: Workspace, old: Path, key: str = SECRET_KEY) -> Outcome:
    """Import an old database; whatever comes of it, no secret and no traceback is printed."""
    done = workspace.run("import", str(old), **({"SECRET_KEY": key} if key else {}))
    for secret in (OPENAI_KEY, KEBOOLA_TOKEN, SECRET_KEY, workspace.key, "Traceback"):
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


# --- a whole move ---------------------------------------------------------------------------------


def test_statuses(workspace: Workspace, old: OldDatabase) -> None:
    """Each status becomes what starts nothing by itself, but for `active`."""
    statuses = ["active", "paused", "completed", "completed_with_failures", "failed", "ACTIVE", "x"]
    for status in statuses:
        old.add_job(f"job {status}", status=status)
    done = import_it(workspace, old.path)
    paused = "and is paused now: take out paused: to start it, or write done: true"
    notes = [f"the job job failed was failed, {paused}", f"the job job x was x, {paused}"]
    jobs = config_of(done, notes)["jobs"]
    rests = {name: (job.get("paused"), job.get("done")) for name, job in jobs.items()}
    assert rests == {
        "job active": (None, None),
        "job paused": (True, None),
        "job completed": (None, True),
        "job completed_with_failures": (None, True),
        "job failed": (True, None),
        "job ACTIVE": (None, None),
        "job x": (True, None),
    }
    assert (
        check(workspace, done).stdout == f"{workspace.path}: fine: 7 jobs, 7 batches, 2 secrets\n"
    )


def test_one_pass_starts_only_what_was_active(workspace: Workspace, old: OldDatabase) -> None:
    """With the imported config in place, one pass looks at and starts the active jobs alone."""
    old.stack_url = workspace.sim.stack_url
    for status in ("active", "paused", "completed", "completed_with_failures", "failed"):
        batch_id = f"batch_{status}"
        workspace.sim.add_batch(batch_id, "completed")
        old.add_job(status, [batch_id], status=status, keboola_configuration_id=status)
    done = import_it(workspace, old.path)
    text = done.stdout.replace(
        "type: openai", f"type: openai\n    base_url: {workspace.sim.openai_url}"
    )
    workspace.write(text)
    assert workspace.run("--once").code == 0
    assert [job["config"] for job in workspace.sim.jobs] == ["active"]
    assert workspace.looks("batch_completed") == 0
    assert workspace.run("--once").code == 0
    assert len(workspace.sim.jobs) == 1
    assert workspace.statuses() == {
        "active": "completed",
        "paused": "paused",
        "completed": "completed",
        "completed_with_failures": "completed",
        "failed": "paused",
    }
    assert workspace.run("status", "--check").code == 0


def test_what_comes_over(workspace: Workspace, old: OldDatabase) -> None:
    """Secrets open with our key, ids stay as they were written, and the database stays as it is."""
    batch_ids = ["batch_b", "batch_a", "batch_b"]
    old.add_job(
        "one", batch_ids, keboola_configuration_id="0123", poll_interval_seconds=90, status="paused"
    )
    before = old.path.read_bytes()
    done = import_it(workspace, old.path)
    config = config_of(done)
    first, *_ = done.stdout.splitlines()
    assert first == f"# Imported from {old.path}. Put it in place of config.yaml, then run `check`."
    assert config["jobs"] == {
        "one": {
            "batch_ids": ["batch_b", "batch_a"],
            "openai_secret": "openai-prod",
            "keboola_secret": "keboola-prod",
            "component_id": COMPONENT,
            "config_id": "0123",
            "poll_interval": "90s",
            "paused": True,
        }
    }
    assert list(config["secrets"]) == ["openai-prod", "keboola-prod"]
    assert config["secrets"]["keboola-prod"]["stack_url"] == STACK
    opened = {
        name: Fernet(workspace.key).decrypt(secret["value"]).decode()
        for name, secret in config["secrets"].items()
    }
    assert opened == {"openai-prod": OPENAI_KEY, "keboola-prod": KEBOOLA_TOKEN}
    assert check(workspace, done).code == 0
    assert old.path.read_bytes() == before
    assert [path.name for path in old.path.parent.iterdir() if path.is_file()] == [old.path.name]


def test_onto_the_config_itself(workspace: Workspace, old: OldDatabase) -> None:
    """`> config.yaml` empties that file before the program runs: it finds its key all the same."""
    old.add_job("one")
    workspace.path.write_text("")
    assert import_it(workspace, old.path).code == 0


@pytest.mark.parametrize(
    "config_id", ["0123", "1e3", "0x1F", "null", "2024-02-30", "NO", "1_000", "123"]
)
def test_ids_are_taken_as_written(config_id: str, workspace: Workspace, old: OldDatabase) -> None:
    """An id that YAML would read as a number or a date is the same id afterwards."""
    old.add_job("one", keboola_configuration_id=config_id)
    done = import_it(workspace, old.path)
    draft = tecko.parse_config(done.stdout, Path("x"))
    assert draft.problems == []
    assert draft.config.jobs["one"].config_id == config_id


NAMES = {
    "spaces": ("  my  job ", "my job"),
    "unicode": ("noční běh 🌙", "noční běh 🌙"),
    "colon": ("a: b", "a: b"),
    "number": ("0123", "0123"),
    "boolean": ("no", "no"),
    "quotes": ('"it\'s" {x} #1', '"it\'s" {x} #1'),
    "two lines": ("a\nb", "a b"),
    "escape": ("a\x1b[31mb", "a [31mb"),
    "long": ("x" * 250, "x" * 189 + "…"),
    "nothing": (" ", "job"),
    "merge": ("<<", "<<"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names(kind: str, workspace: Workspace, old: OldDatabase) -> None:
    """A name stays where it can be one here; else it is made one, which is told."""
    name, expected = NAMES[kind]
    old.add_job(name)
    done = import_it(workspace, old.path)
    notes = [f"the job {tecko.quoted(name)} is called {expected} now"] if name != expected else []
    assert list(config_of(done, notes)["jobs"]) == [expected]
    checked = check(workspace, done)
    assert checked.code == 0, checked.stderr


def test_two_jobs_of_one_name(workspace: Workspace, old: OldDatabase) -> None:
    """The second one gets a number, also where such a name is there already."""
    for name in ("a", "a-2", "a", "a"):
        old.add_job(name)
    notes = ['the job "a" is called a-3 now', 'the job "a" is called a-4 now']
    config = config_of(import_it(workspace, old.path), notes)
    assert list(config["jobs"]) == ["a", "a-2", "a-3", "a-4"]


def test_one_token_with_two_stacks(workspace: Workspace, old: OldDatabase) -> None:
    """A token belongs to one stack: used with two, it becomes two secrets."""
    old.add_job("one")
    old.add_job("two", keboola_stack_url=OTHER_STACK + "/")
    old.add_job("three", keboola_stack_url=f"{STACK}/admin/projects/1")
    done = import_it(workspace, old.path)
    config = config_of(done)
    second = "keboola-prod-north-europe.azure"
    assert [job["keboola_secret"] for job in config["jobs"].values()] == [
        "keboola-prod",
        second,
        "keboola-prod",
    ]
    assert config["secrets"][second]["stack_url"] == OTHER_STACK
    assert check(workspace, done).code == 0


def test_names_of_secrets(workspace: Workspace, old: OldDatabase) -> None:
    """A secret's name becomes one that the config can have, and stays different from others."""
    old.change("DELETE FROM secrets WHERE id = 1")
    for name in ("Klíč: nový", "Kl-nov", "🌙", "0123", "-a."):
        secret = old.add_secret(name, "openai", old_token("sk-1234567"))
        old.add_job(name, openai_secret_id=secret)
    done = import_it(workspace, old.path)
    names = [job["openai_secret"] for job in config_of(done)["jobs"].values()]
    assert names == ["Kl-nov", "Kl-nov-2", "secret", "0123", "a"]
    assert check(workspace, done).code == 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "120s"), (0, "120s"), (-5, "120s"), (30, "30s"), (10**9, "86400s"), ("soon", "120s")],
)
def test_intervals(seconds: object, expected: str, workspace: Workspace, old: OldDatabase) -> None:
    """An interval is brought within the limits."""
    old.add_job("one", poll_interval_seconds=seconds)
    config = config_of(import_it(workspace, old.path))
    assert config["jobs"]["one"]["poll_interval"] == expected


# --- what cannot come over ------------------------------------------------------------------------

LEFT_OUT: dict[str, tuple[Sequence[str], dict[str, object], str]] = {
    "no batches": ((), {}, "it has 0 batches, and 1 to 10 are possible"),
    "11 batches": (
        [f"batch_{n}" for n in range(11)],
        {},
        "it has 11 batches, and 1 to 10 are possible",
    ),
    "plain http": (
        ["batch_b"],
        {"keboola_stack_url": "http://connection.keboola.com"},
        "its stack's address is none",
    ),
    "no stack": (["batch_b"], {"keboola_stack_url": None}, "its stack's address is none"),
    "no address": (["batch_b"], {"keboola_stack_url": "a b"}, "its stack's address is none"),
    "no secret": (["batch_b"], {"openai_secret_id": None}, "one of its secrets is not there"),
    "secret deleted": (["batch_b"], {"keboola_secret_id": 77}, "one of its secrets is not there"),
    "no component": (
        ["batch_b"],
        {"keboola_component_id": None},
        "it has no component or no configuration",
    ),
    "no configuration": (
        ["batch_b"],
        {"keboola_configuration_id": ""},
        "it has no component or no configuration",
    ),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_left_out(kind: str, workspace: Workspace, old: OldDatabase) -> None:
    """A job that a config cannot have is left out, which is told; the rest comes over."""
    batch_ids, columns, why = LEFT_OUT[kind]
    old.add_job("good")
    old.add_job("odd", batch_ids, **columns)
    done = import_it(workspace, old.path)
    config = config_of(done, [f"the job odd is left out: {why}"])
    assert list(config["jobs"]) == ["good"]
    assert check(workspace, done).code == 0


def test_a_batch_id_that_is_none(workspace: Workspace, old: OldDatabase) -> None:
    """What only a person can correct is printed as it was, with its place in what is printed."""
    old.add_job("odd", ["batch_a", "file-1"])
    done = import_it(workspace, old.path)
    assert done.code == 1
    line, column = next(
        (number, text.index("file-1") + 1)
        for number, text in enumerate(done.stdout.splitlines(), 1)
        if "file-1" in text
    )
    assert done.stderr.startswith(f"teckochecker: <imported>:{line}:{column}: jobs.odd.batch_ids")
    assert done.stderr.count("\n") == 1


def test_unused_secrets(workspace: Workspace, old: OldDatabase) -> None:
    """A secret that nobody uses has no stack to belong to: it is left out, which is told."""
    config = config_of(
        import_it(workspace, old.path),
        [
            'the secret "openai-prod" is left out: no job here uses it',
            'the secret "keboola-prod" is left out: no job here uses it',
        ],
    )
    assert config == {"secrets": {}, "jobs": {}}


def test_a_secret_that_cannot_be_one(workspace: Workspace, old: OldDatabase) -> None:
    """A value that no header can carry is told by its name, and how to write it anew."""
    number = old.add_secret("odd", "openai", old_token("sk-a\nsk-b"))
    old.add_job("one", openai_secret_id=number)
    done = import_it(workspace, old.path)
    assert done.code == 1
    assert done.stderr.splitlines()[0] == (
        "teckochecker: the secret odd has characters that are not printable ASCII:"
        " run `encrypt --set odd`"
    )
    assert "sk-a" not in done.stdout + done.stderr


# --- what is no import at all ---------------------------------------------------------------------


def refused(done: Outcome) -> str:
    """Return the one line that a refusal is, with exit code 2 and nothing printed."""
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.removeprefix("teckochecker: ").rstrip("\n")


def test_wrong_key(workspace: Workspace, old: OldDatabase) -> None:
    """Without the old program's key nothing is printed; the line says which variable it is."""
    old.add_job("one")
    assert refused(import_it(workspace, old.path, key="another")) == (
        '$SECRET_KEY does not open the secret "openai-prod"; set $SECRET_KEY as the old program'
        " had it"
    )
    assert refused(import_it(workspace, old.path, key="")) == (
        "$SECRET_KEY is not set; set it as the old program had it: it opens the old secrets"
    )


def test_a_damaged_secret(workspace: Workspace, old: OldDatabase) -> None:
    """A value that is no token is refused like one of another key."""
    old.add_job("one", openai_secret_id=old.add_secret("odd", "openai", "příliš"))
    assert 'does not open the secret "odd"' in refused(import_it(workspace, old.path))


def test_no_own_key(workspace: Workspace, old: OldDatabase) -> None:
    """Without our key there is nothing to close the secrets with."""
    old.add_job("one")
    workspace.write()
    workspace.key_file.unlink()
    done = import_it(workspace, old.path)
    assert (done.code, done.stdout) == (2, "")
    assert "cannot read the key file" in done.stderr


@pytest.mark.parametrize("kind", ["missing", "directory", "text", "empty", "ours", "column"])
def test_no_old_database(kind: str, workspace: Workspace, old: OldDatabase) -> None:
    """What is no database of the old program is refused in one line."""
    path = old.path.with_name("odd.db")
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("jobs: {}\n" * 1000)
    elif kind == "empty":
        path.touch()
    elif kind == "ours":
        assert workspace.once().code == 0
        path = workspace.state
    elif kind == "column":
        path = old.path
        old.change("ALTER TABLE polling_jobs RENAME COLUMN status TO state")
    line = refused(import_it(workspace, path))
    if kind == "missing":
        assert line == f"there is no file {path}; name the database of TeckoChecker 0.9"
    else:
        assert line.startswith(f"cannot import {path}: ")
        assert "; name a copy of the database of TeckoChecker 0.9" in line


def test_without_a_name(workspace: Workspace) -> None:
    """The database has to be named."""
    assert workspace.run("import").code == 2


def test_bytes_and_text(workspace: Workspace, old: OldDatabase) -> None:
    """Old values are bytes or text, and mean the same."""
    old.change("DELETE FROM secrets WHERE id = 1")
    for number, value in enumerate([old_token("sk-1234567"), old_token("sk-1234567").decode()]):
        secret = old.add_secret(f"s{number}", "openai", value)
        old.add_job(f"job{number}", openai_secret_id=secret)
    config = config_of(import_it(workspace, old.path))
    values = [config["secrets"][name]["value"] for name in ("s0", "s1")]
    assert [Fernet(workspace.key).decrypt(value) for value in values] == [b"sk-1234567"] * 2


def test_where_output_is_not_utf8(workspace: Workspace, old: OldDatabase) -> None:
    """A name that the output's encoding does not have is written so that YAML reads it back."""
    old.add_job("noční 🌙")
    done = workspace.run(
        "import", str(old.path), SECRET_KEY=SECRET_KEY, PYTHONIOENCODING="iso-8859-1"
    )
    assert done.code == 0
    assert list(yaml.safe_load(done.stdout)["jobs"]) == ["noční 🌙"]
