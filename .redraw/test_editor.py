"""The config editor and its commands: what they change, what they keep, and what they refuse."""

# ruff: noqa: E501, ANN401 - tables of texts, and of arguments
from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet

sys.path.insert(0, os.environ.get("TECKO_DIR", str(Path(__file__).parent.parent)))

import teckochecker as tecko

KEY = Fernet.generate_key().decode()


def token(value: str, key: str = KEY) -> str:
    return Fernet(key).encrypt(value.encode()).decode()


SECRETS = f"""\
secrets:
  openai-prod: {{type: openai, value: {token("sk-S3CR3T-1")}}}
  keboola-prod:
    type: keboola
    value: {token("123-S3CR3T-2")}
    stack_url: https://connection.keboola.com

defaults: {{openai_secret: openai-prod, keboola_secret: keboola-prod, component_id: a.b}}
"""


class Place:
    """A directory with a config and a key, and the commands in this process."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.config = directory / "config.yaml"
        self.patch = patch
        self.key_file = directory / "teckochecker.key"
        self.key_file.write_text(KEY)
        self.key_file.chmod(0o600)
        for name in (tecko.KEY_VARIABLE, "CREDENTIALS_DIRECTORY", "TECKOCHECKER_CONFIG"):
            patch.delenv(name, raising=False)

    def write(self, text: str) -> None:
        self.config.write_bytes(text.encode())

    def read(self) -> str:
        return self.config.read_bytes().decode()

    def args(self, **given: Any) -> argparse.Namespace:
        return argparse.Namespace(config=str(self.config), **given)

    def job(self, action: str, name: str, *options: str) -> int:
        parser = argparse.ArgumentParser()
        tecko.add_job_options(parser)
        return tecko.run_job(
            self.args(action=action, name=name, **vars(parser.parse_args(options)))
        )

    def secret(self, action: str, name: str = "", given: bytes = b"sk-typed", **more: Any) -> int:
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        options = {"type": None, "stack_url": None, "base_url": None} | more
        return tecko.run_secret(self.args(action=action, name=name, **options))

    def encrypt(self, *, rotate: bool = False) -> int:
        return tecko.run_encrypt(self.args(rotate=rotate))

    def problems(self) -> list[str]:
        try:
            tecko.load_config(self.config, tecko.Files(), os.environ, tecko.Redactor())
        except tecko.ConfigError as error:
            return str(error).splitlines()
        return []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


# --- job add: where it is put ---------------------------------------------------------------------

NEW = 'new:\n    batch_ids: [batch_1]\n    config_id: "7"\n'
NEW_FLOW = 'new: {batch_ids: [batch_1], config_id: "7"}'
OLD = 'old: {batch_ids: [batch_0], config_id: "6"}'

ADDED: dict[str, tuple[str, str | None]] = {  # None: refused
    "after the last one": (f"jobs:\n  {OLD}  # x\n", f"jobs:\n  {OLD}  # x\n  {NEW}"),
    "no line end": (f"jobs:\n  {OLD}", f"jobs:\n  {OLD}\n  {NEW.rstrip()}"),
    "braces": ("jobs: {}\n", f"jobs:\n  {NEW}"),
    "braces with a comment": ("jobs:   {}   # all\n# end\n", f"jobs:   # all\n  {NEW}# end\n"),
    "braces around a comment": ("jobs: { # x\n  }\n", f"jobs: {{ # x\n  {NEW_FLOW}}}\n"),
    "empty": ("jobs:\n", f"jobs:\n  {NEW}"),
    "empty without line end": ("jobs:", f"jobs:\n  {NEW.rstrip()}"),
    "empty with comments": (
        "jobs:  # all\n  # below\n# end\n",
        f"jobs:  # all\n  # below\n  {NEW}# end\n",
    ),
    "null": ("jobs: null # all\nlog: {}\n", f"jobs: # all\n  {NEW}log: {{}}\n"),
    "tilde": ("jobs: ~\n", f"jobs:\n  {NEW}"),
    "anchor": ("jobs: &j {}\n", f"jobs: &j {{{NEW_FLOW}}}\n"),
    "anchor, empty": ("jobs: &j  # x\n", None),
    "quoted section": (f'"jobs":\n  {OLD}\n', f'"jobs":\n  {OLD}\n  {NEW}'),
    "flow": (f"jobs: {{{OLD}}}  # x\n", f"jobs: {{{OLD}, {NEW_FLOW}}}  # x\n"),
    "flow over lines": (
        f"jobs: {{\n  {OLD}\n}}\n",
        f"jobs: {{\n  {OLD}, {NEW_FLOW}\n}}\n",
    ),
    "flow over lines, comma": (
        f"jobs: {{\n  {OLD},\n}}\n",
        f"jobs: {{\n  {OLD}, {NEW_FLOW},\n}}\n",
    ),
    "flow over lines, comment": (
        f"jobs: {{\n  {OLD},  # x\n}}\n",
        f"jobs: {{\n  {OLD}, {NEW_FLOW},  # x\n}}\n",
    ),
    "apart": (
        f"jobs:\n  {OLD}\n\n  # two\n  b: {{paused: true}}  # y\n\nlog: {{}}\n",
        f"jobs:\n  {OLD}\n\n  # two\n  b: {{paused: true}}  # y\n  {NEW}\nlog: {{}}\n",
    ),
    "comments of the last one": (
        "jobs:\n  old:\n    config_id: 6\n    # branch_id: 1\n\n  # the end\n",
        f"jobs:\n  old:\n    config_id: 6\n    # branch_id: 1\n  {NEW}\n  # the end\n",
    ),
    "wider": (
        "jobs:\n    old:\n        config_id: 6\n",
        (
            "jobs:\n    old:\n        config_id: 6\n    "
            'new:\n        batch_ids: [batch_1]\n        config_id: "7"\n'
        ),
    ),
    "list at the end": (
        "jobs:\n  old:\n    batch_ids:\n    - batch_0\n    -  batch_1 # x\nlog: {}\n",
        f"jobs:\n  old:\n    batch_ids:\n    - batch_0\n    -  batch_1 # x\n  {NEW}log: {{}}\n",
    ),
    "block at the end": (
        "jobs:\n  old:\n    config_id: |\n      6\n\nlog: {}\n",
        f"jobs:\n  old:\n    config_id: |\n      6\n  {NEW}\nlog: {{}}\n",
    ),
    "block that keeps its line ends": (
        "jobs:\n  old:\n    config_id: |+\n      6\n\nlog: {}\n",
        None,
    ),
    "alias at the end": (
        "log: &l {}\njobs:\n  old: *l  # x\n",
        f"log: &l {{}}\njobs:\n  old: *l  # x\n  {NEW}",
    ),
    "null at the end": (
        "jobs:\n  old:\n    done:  # x\n",
        f"jobs:\n  old:\n    done:  # x\n  {NEW}",
    ),
    "document marks": (f"jobs:\n  {OLD}\n...\n", f"jobs:\n  {OLD}\n  {NEW}...\n"),
}


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", ADDED)
def test_add_keeps_all_else(kind: str, place: Place, *, windows: bool) -> None:
    """A new job stands below the others in their style; every other byte stays."""
    before, after = ADDED[kind]
    is_refused = after is None
    before, after = (f"# ěšč 🌙\n{SECRETS}{text}" for text in (before, after or before))
    if windows:
        before, after = ("\ufeff" + text.replace("\n", "\r\n") for text in (before, after))
    place.write(before)
    with pytest.raises(tecko.TeckoError) if is_refused else contextlib.nullcontext():
        assert place.job("add", "new", "--batch-id", "batch_1", "--config-id", "7") == 0
    assert place.read() == after


def test_missing_section(place: Place) -> None:
    """A section that is not there is made, below the last one."""
    place.write(SECRETS + "# the end\n")  # a blank line stands between the others
    place.job("add", "new", "--batch-id", "batch_1", "--config-id", "7")
    assert place.read() == f"{SECRETS}jobs:\n  {NEW}# the end\n"
    place.write("{}\n")
    place.secret("set", "a", type="openai")
    assert place.read().startswith("{secrets: {a: {type: openai, value: gAAAA")


NAMES = [
    "plain", "two words", "it's", 'say "hi"', "a: b", "a #b", "#a", "-", "- a", "true", "null", "12",
    "1:30", "0x1f", "2026-11-25", "~", "<<", "=", "[x]", "{x}", "*a", "&a", "!a", "%a", "@a", "`a",
    "?", "? a", "|", ">", "ěšč", "日本語", "🌙", "back\\slash", "a,b", "a:b", "---", "...", "é" * 200,
]  # fmt: skip


@pytest.mark.parametrize("style", ["jobs: {}\n", "jobs: {x: {done: true}}\n", "jobs:\n  x:\n"])
def test_names(style: str, place: Place) -> None:
    """Names of every kind can be added, paused, resumed and removed."""
    place.write(SECRETS + style)
    known = len(place.problems())
    for name in NAMES:
        assert place.job("add", name, "--batch-id", "batch_1", "--config-id", "7") == 0
        assert place.job("pause", name) == 0
    assert len(place.problems()) == known
    jobs = tecko.read_config_file(place.config, tecko.Files())[0].jobs
    assert set(NAMES) <= set(jobs)
    assert all(jobs[name].paused for name in NAMES)
    for name in NAMES:
        assert place.job("resume", name) == 0
        assert place.job("remove", name) == 0
    assert place.read().startswith(SECRETS)
    assert not {*NAMES} & {*tecko.read_config_file(place.config, tecko.Files())[0].jobs}


def test_every_key_is_an_option(place: Place) -> None:
    """Each key of a job can be given, and reads back as it was."""
    place.write(SECRETS + "jobs:\n")
    options = [
        "--match",
        "pipeline=a=b",
        "--match",
        "12=true",
        "--since",
        "2026-11-25",
        "--group-by",
        "1",
        "--group-size",
        "3",
        "--branch-id",
        "0012",
        "--config-id",
        "0123",
        "--config-row-id",
        "1",
        "--config-row-id",
        "r2",
        "--mode",
        "debug",
        "--poll-interval",
        "300",
        "--trigger-on",
        "any_output",
        "--deadline",
        "26h",
        "--on-deadline",
        "start",
        "--follow",
        "--retry-on-error",
        "0",
        "--no-paused",
        "--variable",
        "a=12",
        "--openai-secret",
        "openai-prod",
    ]
    assert place.job("add", "x", *options, "--variable", "b=two\nlines: #x") == 0
    assert place.read() == SECRETS + (
        'jobs:\n  x:\n    match: {pipeline: "a=b", "12": "true"}\n'.replace('"a=b"', "a=b")
        + '    since: "2026-11-25"\n    group_by: "1"\n    group_size: 3\n'
        "    openai_secret: openai-prod\n"
        '    config_id: "0123"\n    branch_id: "0012"\n    config_row_ids: ["1", "r2"]\n'
        '    mode: debug\n    variables: {a: "12", b: "two\\nlines: #x"}\n    poll_interval: 300\n'
        "    trigger_on: any_output\n    deadline: 26h\n    on_deadline: start\n    follow: true\n"
        "    retry_on_error: 0\n    paused: false\n"
    )
    assert place.problems() == []


# --- remove, pause, resume ------------------------------------------------------------------------

A, B = (f'{n}:\n    batch_ids: [batch_1]\n    config_id: "1"  # {n}\n' for n in "ab")
REMOVED: dict[str, tuple[str, str | None]] = {
    "last one": (f"jobs:  # all\n  # below\n  {A}# end\n", "jobs: {}  # all\n  # below\n# end\n"),
    "last one, anchor": (f"jobs: &j\n  {A}", None),
    "first of two": (f"jobs:\n  {A}  {B}", f"jobs:\n  {B}"),
    "second of two": (f"jobs:\n  {B}  {A}log: {{}}\n", f"jobs:\n  {B}log: {{}}\n"),
    "no line end": (f"jobs:\n  {B}  {A.rstrip()}", f"jobs:\n  {B}"),
    "comments inside": (
        f"jobs:\n  # of a\n  {A}    # branch_id: 1\n  # of b\n  {B}",
        f"jobs:\n  # of a\n  # of b\n  {B}",
    ),
    "apart, middle": (f"jobs:\n  {B}\n  {A}\n  c:\n", f"jobs:\n  {B}\n\n  c:\n"),
    "apart, end": (f"jobs:\n  {B}\n  {A}\nlog: {{}}\n", f"jobs:\n  {B}\n\nlog: {{}}\n"),
    "flow, only one": ("jobs: {a: {done: true}} # x\n", "jobs: {} # x\n"),
    "flow, first": ("jobs: {a: {}, b: {}}\n", "jobs: {b: {}}\n"),
    "flow, last": ("jobs: {b: {}, a: {}}\n", "jobs: {b: {}}\n"),
    "flow, trailing comma": ("jobs: {b: {}, a: {},}\n", "jobs: {b: {},}\n"),
    "flow, lines": (
        "jobs: {\n  a: {}, # of a\n  b: {} # of b\n}\n",
        None,
    ),
    "flow, last line": (
        "jobs: {\n  b: {}, # of b\n  a: {} # of a\n}\n",
        None,
    ),
    "flow, last line, no comments": ("jobs: {\n  b: {},\n  a: {}\n}\n", "jobs: {\n  b: {}\n}\n"),
    "block scalar": ("jobs:\n  a:\n    config_id: |\n      x\n\n  b:\n", "jobs:\n\n  b:\n"),
    "block scalar, all ends": (
        "jobs:\n  a:\n    config_id: |+\n      x\n\n  b:\n",
        "jobs:\n\n  b:\n",
    ),
}


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", REMOVED)
def test_remove_keeps_all_else(kind: str, place: Place, *, windows: bool) -> None:
    """A job goes with the comments inside; every other comment stays."""
    before, after = REMOVED[kind]
    is_refused = after is None
    before, after = (SECRETS + text for text in (before, after or before))
    if windows:
        before, after = ("\ufeff" + text.replace("\n", "\r\n") for text in (before, after))
    place.write(before)
    with pytest.raises(tecko.TeckoError) if is_refused else contextlib.nullcontext():
        assert place.job("remove", "a") == 0
    assert place.read() == after


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in ADDED
        if "null" not in kind and kind not in {"tilde", "apart"} and ADDED[kind][1]
    ],
)
def test_remove_is_add_backwards(kind: str, place: Place) -> None:
    """What was added can be removed, and the file is what it was, an empty section aside."""
    before, after = ADDED[kind]
    place.write(SECRETS + after)
    assert place.job("remove", "new") == 0
    emptied = [
        text.replace("{}", "").replace(" ", "").rstrip()
        for text in (place.read(), SECRETS + before)
    ]
    assert emptied[0].replace(",,", ",") == emptied[1]


PAUSED = {
    "absent": ("x:\n    config_id: 1  # y\n    # z\n", "x:\n    config_id: 1  # y\n    paused: true\n    # z\n"),
    "there": ("x:\n    paused: false  # y\n", "x:\n    paused: true  # y\n"),
    "flow": ("x: {config_id: 1}\n", "x: {config_id: 1, paused: true}\n"),
    "flow, empty": ("x: {}\n", "x:\n    paused: true\n"),
    "in quotes": ('x: {"paused": "no"}\n', 'x: {"paused": true}\n'),
    "empty value": ("x:\n    paused:  # y\n", "x:\n    paused: true  # y\n"),
    "merged": ("o: &o {paused: false}\n  x: {<<: *o}\n", "o: &o {paused: false}\n  x: {<<: *o, paused: true}\n"),
    "alias": ("o: {paused: &f false}\n  x: {paused: *f}\n", "o: {paused: &f false}\n  x: {paused: true}\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAUSED)
def test_pause(kind: str, place: Place) -> None:
    """It changes one word, or adds one line, and `resume` changes the word back."""
    before, after = (f"{SECRETS}jobs:\n  {text}" for text in PAUSED[kind])
    place.write(before)
    assert place.job("pause", "x") == 0
    assert place.read() == after
    assert place.job("resume", "x") == 0
    head, _, tail = after.rpartition("true")
    assert place.read() == f"{head}false{tail}"


def test_pause_twice(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What is so already is told, and the file is not touched."""
    place.write(SECRETS + f"jobs:\n  {A}")
    inode = place.config.stat().st_ino
    place.job("resume", "a")
    assert capsys.readouterr().out == "nothing to do: a is not paused\n"
    assert place.config.stat().st_ino == inode
    place.job("pause", "a")
    place.job("pause", "a")
    assert capsys.readouterr().out == "paused: a\nnothing to do: a is paused already\n"


def test_an_anchor_is_not_changed_for_others(place: Place) -> None:
    """Where a change would reach another job too, nothing is written."""
    text = f"{SECRETS}jobs:\n  a: &a {{config_id: 1}}\n  b: *a\n"
    place.write(text)
    for action, name in (("pause", "a"), ("pause", "b"), ("remove", "a")):
        with pytest.raises(tecko.TeckoError) as raised:
            place.job(action, name)
        assert raised.value.exit_code == 1
        assert str(raised.value) == (
            f"cannot change {place.config}: this layout cannot be edited; edit it by hand"
        )
        assert place.read() == text
    assert place.job("remove", "b") == 0
    assert place.job("pause", "a") == 0


# --- refused --------------------------------------------------------------------------------------

REFUSED: list[tuple[list[str], str]] = [
    (["add", "a", "--config-id", "1"], 'there is a job "a" already; choose another name'),
    (["pause", "z"], 'there is no job "z"; `teckochecker status` lists them all'),
    (["remove", "z"], 'there is no job "z"; `teckochecker status` lists them all'),
    (["add", "z"], "jobs.z: config_id is missing; add config_id: here or under defaults"),
    (["add", "z", "--config-id", "1"], "jobs.z: batch_ids is missing; add batch_ids: here, or match: and since:"),
    (["add", "z/1", "--batch-id", "batch_1", "--config-id", "1"],
     'jobs.z/1: "z/1" is not a job\'s name; use 1 to 200 printable characters, and no /'),
    (["add", "z", "--batch-id", "b 1", "--config-id", "1"],
     'jobs.z.batch_ids[0]: "b 1" is not a batch id; copy the batch id: letters, digits, . _ = and -'),
    (["add", "z", "--batch-id", "batch_1", "--config-id", "1", "--poll-interval", "soon"],
     'jobs.z.poll_interval: "soon" is not a duration; write 30s, 2m or 1h'),
    (["add", "z", "--variable", "x"], '"x" is not KEY=VALUE; nothing is changed'),
    (["add", "z", "--match", "=x"], '"" is not KEY=VALUE; nothing is changed'),
    (["add", "z", "--match", "a=x", "--match", "a=y"], "a key of match is given twice; keep one of them"),
    (["add", "z\udcff", "--config-id", "1"], '"z" is not UTF-8 text; nothing is changed'),
    (["add", "", "--batch-id", "batch_1", "--config-id", "1"],
     'jobs.: "" is not a job\'s name; use 1 to 200 printable characters, and no /'),
]  # fmt: skip


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_refused(command: list[str], message: str, place: Place) -> None:
    """One line, exit code 2, and the file stays byte for byte."""
    text = f"\ufeff# x\r\n{SECRETS}jobs:\n  {A}".replace("\n", "\r\n")
    place.write(text)
    inode = place.config.stat().st_ino
    with pytest.raises(tecko.UsageError) as raised:
        place.job(*command)
    assert str(raised.value) == message
    assert (place.read(), place.config.stat().st_ino) == (text, inode)
    assert sorted(p.name for p in place.config.parent.iterdir()) == [
        "config.yaml",
        "teckochecker.key",
    ]


def test_old_problems_do_not_matter(place: Place) -> None:
    """A config with other problems can be changed; a second one of the same kind cannot be added."""
    bad = "x: {batch_ids: [b 1], config_id: 1}"
    place.write(f"nope: 1\n{SECRETS}jobs:\n  {bad}\n  {A}")
    assert place.job("pause", "a") == 0
    assert place.job("pause", "x") == 0
    assert place.job("remove", "x") == 0
    with pytest.raises(tecko.UsageError):
        place.job("add", "y", "--batch-id", "b 1", "--config-id", "1")


@pytest.mark.parametrize(
    "text", ["", "jobs: [\n", "- a\n", "jobs: 1\n", "# nothing\n", "a: \x01\n"]
)
def test_no_config(text: str, place: Place) -> None:
    """What is no config is not changed."""
    place.write(text)
    with pytest.raises(tecko.TeckoError) as raised:
        place.job("add", "x", "--batch-id", "batch_1", "--config-id", "1")
    assert raised.value.exit_code == (1 if text == "jobs: 1\n" else 2)
    assert place.read() == text
    place.config.unlink()
    with pytest.raises(tecko.ConfigError, match="No such file"):
        place.job("remove", "x")


def test_a_key_that_stands_twice(place: Place) -> None:
    """It is not clear which one is meant."""
    place.write(f"{SECRETS}jobs:\n  a: {{done: true}}\n  a: {{done: true}}\n")
    with pytest.raises(tecko.UsageError, match='has the key "a" twice; keep one of them'):
        place.job("remove", "a")


# --- secrets --------------------------------------------------------------------------------------


def test_secret_set_makes_an_entry(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A new secret gets its type and address; the value is a token only."""
    place.write("# x\njobs: {}\n")
    stack = "https://connection.keboola.com"
    assert place.secret("set", "k", b" 12-abc \n", type="keboola", stack_url=stack) == 0
    before, _value, after = place.read().partition("    value: ")
    assert before == "# x\njobs: {}\nsecrets:\n  k:\n    type: keboola\n"
    assert after[-len(stack) - 20 :].endswith(f"    stack_url: {stack}\n")
    assert Fernet(KEY).decrypt(after.split("\n")[0]) == b"12-abc"
    assert place.problems() == []
    assert place.secret("set", "k", b"13-abc", stack_url="https://connection.eu.keboola.com") == 0
    assert "stack_url: https://connection.eu.keboola.com\n" in place.read()
    assert place.secret("set", "w", b"https://hooks.example.com/a?b=c", type="webhook") == 0
    assert place.secret("set", "w", b"https://hooks.example.com/b") == 0
    assert capsys.readouterr().out.split() == ["encrypted:", "k"] * 2 + ["encrypted:", "w"] * 2


SECRET_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "new"}, 'the secret new is of no known type; write --type openai or keboola or webhook'),
    ({"name": "new", "type": "x"}, 'the secret new is of no known type; write --type openai'),
    ({"name": "new", "type": "keboola"}, "secrets.new: stack_url is missing; add stack_url: "),
    ({"name": "new", "type": "openai", "stack_url": "https://x.y"}, 'the key "stack_url" is not known'),
    ({"name": "new", "type": "keboola", "stack_url": "http://x.y"}, "secrets.new.stack_url: is not https"),
    ({"name": "n w", "type": "openai"}, "\"n w\" is not a secret's name"),
    ({"name": "openai-prod", "type": "webhook"}, "is of another type, openai; leave --type out"),
    ({"name": "e"}, "the secret e comes from env:; remove env: from the config first"),
    ({"name": "f"}, "the secret f comes from file:; remove file: from the config first"),
    ({"name": "openai-prod", "given": b""}, "what was given for openai-prod is empty; nothing is changed"),
    ({"name": "openai-prod", "given": b"a b"}, "has characters that no token has"),
    ({"name": "openai-prod", "given": b"S3\xff"}, "has characters that no token has"),
    ({"name": "openai-prod", "given": b"Bearer abc"}, "begins with Bearer"),
    ({"name": "openai-prod", "given": b"'abc'"}, "has quotes around it"),
    ({"name": "openai-prod", "given": b"KEY=abc"}, "begins with NAME="),
    ({"name": "openai-prod", "given": b"YOUR-OPENAI-KEY"}, "is the placeholder of the example"),
    ({"name": "openai-prod", "given": token("YOUR-KEY").encode()}, "is the placeholder of the example"),
    ({"name": "openai-prod", "given": token("x", Fernet.generate_key().decode()).encode()}, "with another key"),
    ({"name": "openai-prod", "given": b"a" * 80_000}, "is over 64 KiB"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), SECRET_REFUSED)
def test_secret_set_refused(given: dict[str, Any], message: str, place: Place) -> None:
    """One line without the value, exit code 2, and the file stays byte for byte."""
    text = f"{SECRETS}jobs: {{}}\n".replace(
        "secrets:\n", "secrets:\n  e: {type: openai, env: E}\n  f: {type: openai, file: F}\n"
    )
    place.write(text)
    with pytest.raises(tecko.UsageError) as raised:
        place.secret("set", **given)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert place.read() == text


def test_secret_remove(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused while anything uses the secret, also a job with other problems."""
    place.write(
        f"{SECRETS}jobs:\n  a: {{nope: 1}}\n  b: {{openai_secret: spare}}\n"
        "notify: [{secret: hook}]\n"
    )
    text = place.read().replace(
        "secrets:\n",
        "secrets:\n  spare: {type: openai, env: E}\n  hook: {type: webhook, env: H}\n",
        1,
    )
    place.write(text)
    for name, users in (("openai-prod", "defaults, a"), ("spare", "b"), ("hook", "notify")):
        with pytest.raises(tecko.UsageError) as raised:
            place.secret("remove", name)
        assert str(raised.value) == f"the secret {name} is used by {users}; change that first"
        assert place.read() == text
    place.job("remove", "b")
    assert place.secret("remove", "spare") == 0
    assert "spare" not in place.read()
    with pytest.raises(tecko.UsageError, match="has no secrets.spare"):
        place.secret("remove", "spare")
    place.write("secrets:\n  x: {type: openai, env: E}\njobs: {}\n")
    place.secret("remove", "x")
    assert place.read() == "secrets: {}\njobs: {}\n"
    assert capsys.readouterr().out.endswith("removed: x\n")


def test_secret_list_shows_no_value(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, types, sources and users; what may be a token by mistake is not shown."""
    place.write(
        f"{SECRETS}jobs:\n  {A}".replace(
            "secrets:\n",
            "secrets:\n  p: {type: openai, value: sk-S3CR3T}\n  e: {type: openai, env: sk-S3CR3T}\n"
            "  g: {type: openai, env: GOOD}\n  f: {type: openai, file: /run/x}\n  q: S3CR3T\n",
        )
    )
    assert place.secret("list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "SECRET        TYPE     FROM                                 USED BY",
        "p             openai   value, NOT ENCRYPTED: run `encrypt`  nobody",
        "e             openai   env, but not a variable's name       nobody",
        "g             openai   env GOOD                             nobody",
        "f             openai   file /run/x                          nobody",
        "q             ?        not readable: run `check`            nobody",
        "openai-prod   openai   value                                defaults, a",
        "keboola-prod  keboola  value                                defaults, a",
    ]


def test_encrypt(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain values become tokens where they stand; an anchor and a comment stay."""
    place.write(
        "nope: 1\nsecrets:\n  a: {type: openai, value: &t S3CR3T-1}\n"
        "  d:\n    value: | # of Anna\n      S3CR3T-2\n    type: openai\n"
        f"  e: {{type: openai, value: {token('x-y-z')}}}\n  f: {{type: openai, value: }}\njobs: {{x: {{}}}}\n"
    )
    assert place.encrypt() == 0
    text = place.read()
    assert "S3CR3T" not in text
    assert "value: &t gAAAA" in text
    assert " # of Anna\n    type: openai\n" in text
    assert place.encrypt() == 0
    assert place.read() == text
    out = "encrypted: a, d\nnothing to do: no value is in plain\n"
    assert capsys.readouterr().out == out
    other = Fernet.generate_key().decode()
    place.key_file.write_text(f"{other}\n{KEY}\n")
    assert place.encrypt(rotate=True) == 0
    place.key_file.write_text(other)
    assert not [problem for problem in place.problems() if "another key" in problem]


@pytest.mark.parametrize("other", ["{type: openai, value: *t}", "{<<: *a, project: p}"])
def test_encrypt_refuses_shared_values(other: str, place: Place) -> None:
    """A value that stands in two places is left to a person, and nothing is written."""
    text = f"secrets:\n  a: &a {{type: openai, value: &t S3CR3T-1}}\n  b: {other}\njobs: {{}}\n"
    place.write(text)
    with pytest.raises(tecko.TeckoError, match="this layout cannot be edited"):
        place.encrypt()
    assert place.read() == text


def test_encrypt_refuses(place: Place) -> None:
    """Placeholders, also encrypted ones, and tokens of another key: a line each, nothing written."""
    foreign = token("x", Fernet.generate_key().decode())
    text = (
        "secrets:\n  a: {type: openai, value: YOUR-KEY}\n"
        f"  b: {{type: openai, value: {token('YOUR-KEY')}}}\n"
        f"  c: {{type: openai, value: {foreign}}}\n  d: {{type: openai, value: good}}\njobs: {{}}\n"
    )
    place.write(text)
    with pytest.raises(tecko.ConfigError) as raised:
        place.encrypt()
    lines = str(raised.value).splitlines()
    assert [line.removeprefix(f"{place.config}:") for line in lines] == [
        "2:28: secrets.a.value: is the placeholder of the example; put your own there",
        "3:28: secrets.b.value: is the placeholder of the example; put your own there",
        "4:28: secrets.c.value: is encrypted with another key; add that key after the first one",
    ]
    assert place.read() == text


# --- many edits -----------------------------------------------------------------------------------

START = f"""\
# the team's config

{SECRETS}
log: {{level: info}}

# what is watched
jobs:
  # the first one
  "first: one":          # by Anna
    batch_ids: [batch_0, batch_9]   # two
    config_id: '1'
    # branch_id: "789"

  second: {{batch_ids: [batch_2], config_id: "2"}}

# the end
"""


@pytest.mark.parametrize("seed", range(6))
def test_fifty_random_edits(seed: int, place: Place) -> None:
    """After each the file says what was meant, and every comment of others is still there."""
    dice = random.Random(seed)  # noqa: S311
    text = START if seed % 2 else "\ufeff" + START.replace("\n", "\r\n")
    if seed > 3:
        text = "{jobs: {}, " + SECRETS_FLOW
    place.write(text)
    jobs = yaml.safe_load(text)["jobs"]
    secrets = set(yaml.safe_load(text)["secrets"])
    for i in range(50):
        action = dice.choice(["add", "add", "pause", "resume", "remove", "set", "drop"])
        name = f"{dice.choice(NAMES[:20])} {i}" if action == "add" else dice.choice([*jobs, ""])
        if action == "add":
            place.job("add", name, "--batch-id", f"batch_{i}", "--config-id", str(i))
            jobs[name] = {"batch_ids": [f"batch_{i}"], "config_id": str(i)}
        elif action == "set":
            place.secret("set", f"s{i}", type="openai")
            secrets.add(f"s{i}")
        elif action == "drop" and (spare := sorted(secrets - {"openai-prod", "keboola-prod"})):
            place.secret("remove", spare[0])
            secrets.remove(spare[0])
        elif name and action == "remove":
            place.job("remove", name)
            del jobs[name]
        elif name and action in {"pause", "resume"}:
            before = place.read()
            place.job(action, name)
            if place.read() != before:
                jobs[name]["paused"] = action == "pause"
        document = yaml.safe_load(place.read())
        assert document["jobs"] == jobs
        assert set(document["secrets"]) == secrets
        assert place.problems() == []
    after = place.read()
    assert after.startswith(text[:7])
    if "\r" in text:
        assert after.count("\n") == after.count("\r\n")
    for comment in ("# the team's config", "# what is watched", "# the first one", "# the end"):
        assert (comment in after) == (comment in text)


SECRETS_FLOW = (
    f"secrets: {{openai-prod: {{type: openai, value: {token('a-b')}}}, keboola-prod: {{type: keboola, "
    f"value: {token('c-d')}, stack_url: 'https://connection.keboola.com'}}}},\n"
    "defaults: {openai_secret: openai-prod, keboola_secret: keboola-prod, component_id: a.b}}\n"
)


def test_twenty_at_once(place: Place) -> None:
    """Twenty processes lose none of their jobs."""
    place.write(START)
    script = (
        "import sys, argparse, teckochecker as t; p = argparse.ArgumentParser(); t.add_job_options(p);"
        "o = p.parse_args(['--batch-id', 'batch_1', '--config-id', '1']);"
        "t.run_job(argparse.Namespace(config=sys.argv[1], action='add', name=sys.argv[2], **vars(o)))"
    )
    directory = str(Path(tecko.__file__).parent)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(place.config), f"job {i}"],
            env={**os.environ, "PYTHONPATH": directory},
        )
        for i in range(20)
    ]
    assert [process.wait(60) for process in started] == [0] * 20
    jobs = yaml.safe_load(place.read())["jobs"]
    assert {f"job {i}" for i in range(20)} < jobs.keys()
    assert sorted(p.name for p in place.config.parent.iterdir()) == [
        "config.yaml",
        "teckochecker.key",
    ]
    assert place.problems() == []


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_mode_owner_and_link_stay(mode: int, place: Place, tmp_path: Path) -> None:
    """The file behind a link is changed, and is whose it was."""
    real = tmp_path / "real" / "team.yaml"
    real.parent.mkdir()
    real.write_text(START)
    real.chmod(mode)
    if os.geteuid() == 0:
        os.chown(real, 1234, 4321)
    place.config.symlink_to("real/team.yaml")
    assert place.job("pause", "second") == 0
    assert place.config.is_symlink()
    status = real.stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert os.geteuid() or (status.st_uid, status.st_gid) == (1234, 4321)
    assert [p.name for p in real.parent.iterdir()] == ["team.yaml"]


def test_changed_meanwhile(place: Place) -> None:
    """What a person saved between reading and replacing is kept."""
    place.write(START)
    fsync = os.fsync

    def save(fd: int) -> None:
        fsync(fd)
        place.write("jobs: {}  # mine\n")

    place.patch.setattr(os, "fsync", save)
    with pytest.raises(tecko.TeckoError) as raised:
        place.job("pause", "second")
    message = f"{place.config} was changed meanwhile; run the command again"
    assert (str(raised.value), raised.value.exit_code) == (message, 1)
    assert place.read() == "jobs: {}  # mine\n"
    assert sorted(p.name for p in place.config.parent.iterdir()) == [
        "config.yaml",
        "teckochecker.key",
    ]


@pytest.mark.parametrize("step", ["fsync", "fchmod", "replace"])
def test_what_fails_changes_nothing(step: str, place: Place) -> None:
    """A full disk leaves the old file whole, and no other beside it."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.patch.setattr(Path if step == "replace" else os, step, fail)
    place.write(START)
    with pytest.raises(
        tecko.TeckoError, match="No space left on device; run this as the file's owner"
    ):
        place.job("pause", "second")
    assert place.read() == START
    assert sorted(p.name for p in place.config.parent.iterdir()) == [
        "config.yaml",
        "teckochecker.key",
    ]


def test_another_editor_holds_the_lock(place: Place) -> None:
    """After ten seconds that is told, and nothing is written."""
    place.write(START)
    times = iter([0.0, 5.0, 11.0])
    place.patch.setattr(tecko.time, "monotonic", lambda: next(times))
    with tecko.editors_lock(place.config), pytest.raises(tecko.TeckoError) as raised:
        times = iter([0.0, 5.0, 11.0])
        place.job("pause", "second")
    what = f"another command has been changing {place.config} for ten seconds; run this one again"
    assert (str(raised.value), raised.value.exit_code) == (what, 1)
    assert place.read() == START


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root")
def test_a_mount_of_its_own(place: Place, tmp_path: Path) -> None:
    """A file that is mounted alone cannot be replaced: the cure is to mount its directory."""
    place.write(START)
    inner = (
        f"mount --bind {place.config} {place.config} || exit 77; exec {sys.executable} -c '"
        "import argparse, teckochecker as t\n"
        'try: t.run_job(argparse.Namespace(config="'
        + str(place.config)
        + '", action="pause", name="second"))\n'
        "except t.TeckoError as e: print(e)'"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inner],
        env={**os.environ, "PYTHONPATH": str(Path(tecko.__file__).parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert "it is a mount of its own: mount its directory instead" in done.stdout
    assert place.read() == START
