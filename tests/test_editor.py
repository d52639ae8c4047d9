"""The config editor and its commands: what they change, what they keep, and what they refuse."""

# ruff: noqa: E501 - tables of texts
from __future__ import annotations

import errno
import fcntl
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

import teckochecker as tecko

KEY, OTHER_KEY = Fernet.generate_key().decode(), Fernet.generate_key().decode()


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
COMMAND = [sys.executable, str(Path(tecko.__file__))]


class Place:
    """A directory with a config and a key, and the command line in this process."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, capsys: Any) -> None:  # noqa: ANN401
        self.config, self.key_file = path / "config.yaml", path / "teckochecker.key"
        self.patch, self.capsys = patch, capsys
        self.key_file.write_text(KEY)
        self.key_file.chmod(0o600)
        for name in ("TECKOCHECKER_KEY", "CREDENTIALS_DIRECTORY", "TECKOCHECKER_CONFIG"):
            patch.delenv(name, raising=False)

    def write(self, text: str) -> None:
        self.config.write_bytes(text.encode())

    def read(self) -> str:
        return self.config.read_bytes().decode()

    def run(self, *arguments: str, typed: bytes = b"sk-typed") -> int:
        """Return the exit code; `out` and `err` then are what was printed."""
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        code = tecko.main(["--config", str(self.config), *arguments])
        self.out, self.err = self.capsys.readouterr()
        return code

    def add(self, name: str) -> int:
        return self.run("job", "add", name, "--batch-id", "batch_1", "--config-id", "7")

    def refuses(self, code: int, message: str, *arguments: str, **more: bytes) -> None:
        """One line, a code, and the file stays byte for byte, with nothing beside it."""
        before, inode = self.read(), self.config.stat().st_ino
        assert (self.run(*arguments, **more), self.out) == (code, "")
        assert message in self.err
        assert self.err.count("\n") == 1
        assert (self.read(), self.config.stat().st_ino) == (before, inode)
        self.is_alone()

    def is_alone(self) -> None:
        names = sorted(path.name for path in self.config.parent.iterdir())
        assert names == ["config.yaml", "teckochecker.key"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Place:  # noqa: ANN401
    return Place(tmp_path, monkeypatch, capsys)


# --- what is changed, and what is refused ---------------------------------------------------------

NEW = 'new:\n    batch_ids: [batch_1]\n    config_id: "7"\n'
NEW_FLOW = 'new: {batch_ids: [batch_1], config_id: "7"}'
OLD = 'old: {batch_ids: [batch_0], config_id: "6"}'
A, B = (f'{n}:\n    batch_ids: [batch_1]\n    config_id: "1"  # {n}\n' for n in "ab")
BY_HAND = "an anchor, a key that stands twice, or the layout is in the way; edit it by hand"

CHANGED: dict[str, tuple[str, str]] = {  # by the command that a name begins with
    "add: after the last one": (f"jobs:\n  {OLD}  # x\n", f"jobs:\n  {OLD}  # x\n  {NEW}"),
    "add: no line end": (f"jobs:\n  {OLD}", f"jobs:\n  {OLD}\n  {NEW.rstrip()}"),
    "add: braces": ("jobs: {}\n", f"jobs:\n  {NEW}"),
    "add: braces with a comment": ("jobs:   {}   # all\n# end\n", f"jobs:   # all\n  {NEW}# end\n"),
    "add: braces around a comment": ("jobs: { # x\n  }\n", f"jobs: {{ # x\n  {NEW_FLOW}}}\n"),
    "add: empty without line end": ("jobs:", f"jobs:\n  {NEW.rstrip()}"),
    "add: empty with comments": ("jobs:  # all\n  # below\n# end\n", f"jobs:  # all\n  # below\n  {NEW}# end\n"),
    "add: null": ("jobs: null # all\nlog: {}\n", f"jobs: # all\n  {NEW}log: {{}}\n"),
    "add: anchor": ("jobs: &j {}\n", f"jobs: &j {{{NEW_FLOW}}}\n"),
    "add: quoted section": (f'"jobs":\n  {OLD}\n', f'"jobs":\n  {OLD}\n  {NEW}'),
    "add: no section": ("# the end\n", f"jobs:\n  {NEW}# the end\n"),
    "add: flow": (f"jobs: {{{OLD}}}  # x\n", f"jobs: {{{OLD}, {NEW_FLOW}}}  # x\n"),
    "add: flow, comma": (f"jobs: {{\n  {OLD},  # x\n}}\n", f"jobs: {{\n  {OLD},  # x\n  {NEW_FLOW},\n}}\n"),
    "add: flow, lines": (f"jobs: {{\n  {OLD}  # x\n}}\n", f"jobs: {{\n  {OLD},  # x\n  {NEW_FLOW}\n}}\n"),
    "add: flow, last in line": (f"jobs: {{\n  {OLD}}}\n", f"jobs: {{\n  {OLD}, {NEW_FLOW}}}\n"),
    "add: apart": (f"jobs:\n  {OLD}\n\n  # b\n  b:  # y\n\nlog: {{}}\n", f"jobs:\n  {OLD}\n\n  # b\n  b:  # y\n  {NEW}\nlog: {{}}\n"),
    "add: comments of the last one": (f"jobs:\n  {A}    # c\n\n  # the end\n", f"jobs:\n  {A}    # c\n  {NEW}\n  # the end\n"),
    "add: wider": ("jobs:\n    a:\n        done: 1\n", "jobs:\n    a:\n        done: 1\n    " + NEW.replace("    ", "        ")),
    "add: list": ("jobs:\n  a:\n    x:\n    - 1\n    -  2 # x\nlog: {}\n", f"jobs:\n  a:\n    x:\n    - 1\n    -  2 # x\n  {NEW}log: {{}}\n"),
    "add: block": ("jobs:\n  a:\n    x: |\n      6\n\nlog: {}\n", f"jobs:\n  a:\n    x: |\n      6\n  {NEW}\nlog: {{}}\n"),
    "add: alias": ("log: &l {}\njobs:\n  old: *l  # x\n", f"log: &l {{}}\njobs:\n  old: *l  # x\n  {NEW}"),
    "add: null at the end": ("jobs:\n  old:\n    done:  # x\n", f"jobs:\n  old:\n    done:  # x\n  {NEW}"),
    "add: document marks": (f"jobs:\n  {OLD}\n...\n", f"jobs:\n  {OLD}\n  {NEW}...\n"),
    "remove: last one": (f"jobs:  # all\n  # below\n  {A}# end\n", "jobs: {}  # all\n  # below\n# end\n"),
    "remove: first of two": (f"jobs:\n  {A}  {B}", f"jobs:\n  {B}"),
    "remove: comments": (f"jobs:\n  # of a\n  {A}    # c\n  # of b\n  {B}", f"jobs:\n  # of a\n  # of b\n  {B}"),
    "remove: apart, end": (f"jobs:\n  {B}\n  {A}\nlog: {{}}\n", f"jobs:\n  {B}\n\nlog: {{}}\n"),
    "remove: block scalar": ("jobs:\n  a:\n    x: |+\n      x\n\n  b:\n", "jobs:\n\n  b:\n"),
    "remove: flow, only one": ("jobs: {a: {done: true}} # x\n", "jobs: {} # x\n"),
    "remove: flow, first": ("jobs: {a: {}, b: {}}\n", "jobs: {b: {}}\n"),
    "remove: flow, last": ("jobs: {b: {}, a: {}}\n", "jobs: {b: {}}\n"),
    "remove: flow, comma": ("jobs: {b: {}, a: {},}\n", "jobs: {b: {}, }\n"),
    "remove: flow, own line": ("jobs: {\n  b: {},\n  a: {}\n}\n", "jobs: {\n  b: {},\n}\n"),
    "remove: flow, lines": ("jobs: {\n  a: {}, # a\n  b: {} # b\n}\n", "jobs: {\n  # a\n  b: {} # b\n}\n"),
    "remove: flow, last line": ("jobs: {\n  b: {}, # b\n  a: {} # a\n}\n", "jobs: {\n  b: {}, # b\n   # a\n}\n"),
    "pause: absent": ("jobs:\n  a:\n    x: 1  # y\n    # z\n", "jobs:\n  a:\n    x: 1  # y\n    paused: true\n    # z\n"),
    "pause: flow": ("jobs:\n  a: {x: 1}\n", "jobs:\n  a: {x: 1, paused: true}\n"),
    "pause: flow, empty": ("jobs:\n  a: {}\n", "jobs:\n  a:\n    paused: true\n"),
    "pause: empty value": ("jobs:\n  a:\n    paused:  # y\n", "jobs:\n  a:\n    paused: true  # y\n"),
    "resume: there": ("jobs:\n  a:\n    paused: true  # y\n", "jobs:\n  a:\n    paused: false  # y\n"),
}  # fmt: skip


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", CHANGED)
def test_all_else_is_kept(kind: str, place: Place, *, windows: bool) -> None:
    """Only what is meant changes, in the style of what stands beside it; comments inside go too."""
    before, after = (f"# ěšč 🌙\n{SECRETS}{text}" for text in CHANGED[kind])
    if windows:
        before, after = ("\ufeff" + text.replace("\n", "\r\n") for text in (before, after))
    place.write(before)
    action, _, _ = kind.partition(":")
    assert (place.add("new") if action == "add" else place.run("job", action, "a")) == 0
    assert place.read() == after
    assert place.out == {"add": "added: new\n", "remove": "removed: a\n"}.get(
        action, f"{action}d: a\n"
    )


NAMES = [
    "plain", "two words", "it's", 'say "hi"', "a: b", "a #b", "#a", "-", "- a", "true", "null", "12",
    "1:30", "0x1f", "2026-11-25", "~", "<<", "=", "[x]", "{x}", "*a", "&a", "!a", "%a", "@a", "`a",
    "?", "? a", "|", ">", "ěšč", "日本語", "🌙", "back\\slash", "a,b", "a:b", "...", "é" * 200,
]  # fmt: skip


@pytest.mark.parametrize("style", ["jobs: {}\n", "jobs: {x: {done: true}}\n", "jobs:\n  x:\n"])
def test_names(style: str, place: Place) -> None:
    """Names of every kind can be added, paused, resumed and removed."""
    place.write(SECRETS + style)
    for name in NAMES:
        assert (place.add(name), place.run("job", "pause", name)) == (0, 0)
    jobs = tecko.read_config_file(place.config, tecko.Files())[0].jobs
    assert all(jobs[name].paused for name in NAMES)
    for name in NAMES:
        assert (place.run("job", "resume", name), place.run("job", "remove", name)) == (0, 0)
    assert place.read().startswith(SECRETS)
    assert not {*NAMES} & {*yaml.safe_load(place.read())["jobs"]}


def test_every_key_is_an_option(place: Place) -> None:
    """Each key of a job can be given, and reads back as it was."""
    place.write(SECRETS + "jobs:\n")
    options = (
        "--match pipeline=a=b --match 12=true --since 2026-11-25 --group-by 1 --group-size 3 "
        "--branch-id 0012 --config-id 0123 --config-row-id 1 --config-row-id r2 --mode debug "
        "--poll-interval 300 --trigger-on any_output --deadline 26h --on-deadline start --follow "
        "--retry-on-error 0 --no-paused --variable a=12 --openai-secret openai-prod --variable"
    )
    assert place.run("job", "add", "x", *options.split(), "b=two\nlines: #x") == 0
    assert place.read() == SECRETS + (
        'jobs:\n  x:\n    match: {pipeline: a=b, "12": "true"}\n'
        '    since: "2026-11-25"\n    group_by: "1"\n    group_size: "3"\n'
        "    openai_secret: openai-prod\n"
        '    config_id: "0123"\n    branch_id: "0012"\n    config_row_ids: ["1", r2]\n'
        '    mode: debug\n    variables: {a: "12", b: "two\\nlines: #x"}\n    poll_interval: "300"\n'
        "    trigger_on: any_output\n    deadline: 26h\n    on_deadline: start\n    follow: true\n"
        '    retry_on_error: "0"\n    paused: false\n'
    )
    assert place.run("check") == 0


JOB_A = f"{SECRETS}jobs:\n  {A}"
ALIAS = f"{SECRETS}jobs:\n  a: &a {{config_id: 1}}\n  b: *a\n"
SHARED = "secrets:\n  a: &a {type: openai, value: &t S3CR3T}\n  b: "
SOURCES = JOB_A.replace(":\n", ":\n  e: {type: openai, env: E}\n  f: {type: openai, file: F}\n", 1)
NO_NAME = "is not a job's name; use 1 to 200 printable characters, and no /"
IDS = "--batch-id batch_1 --config-id 1"
SET = "secret set openai-prod"
REFUSED: list[tuple[str, str, str]] = [  # the config, a command with what is typed, the message
    ("", "job add x", "is empty"),
    ("jobs: [\n", "job add x", "is not YAML"),
    ("a: \x01\n", "job add x", "has the control character"),
    (JOB_A, "job add a --config-id 1", 'there is a job "a" already; choose another name'),
    (JOB_A, "job pause z", 'there is no job "z"; `status` lists them all'),
    (JOB_A, "job add z", "jobs.z: config_id is missing; add config_id: here or under defaults"),
    (JOB_A, "job add z --config-id 1", "jobs.z: batch_ids is missing; add batch_ids: here, or match: and since:"),
    (JOB_A, f"job add z/1 {IDS}", f'jobs.z/1: "z/1" {NO_NAME}'),
    (JOB_A, f"job add  {IDS}", f'jobs.: "" {NO_NAME}'),
    (JOB_A, "job add z --batch-id b\t1 --config-id 1", 'jobs.z.batch_ids[0]: "b 1" is not a batch id; copy the batch id'),
    (JOB_A, f"job add z {IDS} --poll-interval soon", 'jobs.z.poll_interval: "soon" is not a duration; write 30s, 2m or 1h'),
    (JOB_A, "job add z --variable x", "variables is written KEY=VALUE; nothing is changed"),
    (JOB_A, "job add z --match a=x --match a=y", "match has one KEY twice; nothing is changed"),
    (JOB_A, "job add z\udcff --config-id 1", "is not UTF-8 text; nothing is changed"),
    (f"{SECRETS}jobs: &j  # x\n", "job add z --config-id 1", BY_HAND),
    (f"{SECRETS}jobs: 1\n", "job add z --config-id 1", BY_HAND),
    ("jobs:\n  a: {done: true}\n  a: {done: true}\n", "job remove a", BY_HAND),
    (f"jobs: &j\n  {A}", "job remove a", BY_HAND),
    (ALIAS, "job pause a", BY_HAND),
    (ALIAS, "job remove a", BY_HAND),
    ("jobs: {a: &a {config_id: 1}, b: *a}\n", "job remove a", BY_HAND),
    ("jobs:\n  a: {paused: &f false}\n  b: {paused: *f}\n", "job pause b", BY_HAND),
    ("o: &o {a: {}}\njobs: {<<: *o, b: {}}\n", "job remove a", 'there is no job "a"'),
    (f"{SHARED}{{type: openai, value: *t}}\njobs: {{}}\n", "encrypt", f"cannot change secrets.a.value in config: {BY_HAND}"),
    (f"{SHARED}{{<<: *a, project: p}}\njobs: {{}}\n", "encrypt", f"cannot change secrets.a.value in config: {BY_HAND}"),
    (JOB_A, "secret set new < x", "secrets.new: type is missing; add type: openai, keboola or webhook"),
    (JOB_A, "secret set new --type x < x", 'secrets.new.type: "x" is not a value of type; write openai, keboola or webhook'),
    (JOB_A, "secret set new --type keboola < x", "secrets.new: stack_url is missing; add stack_url: "),
    (JOB_A, "secret set new --type keboola --stack-url http://x.y < x", "secrets.new.stack_url: is not https"),
    (JOB_A, f"{SET} --type webhook < x", "is of another type, openai; leave --type out"),
    (SOURCES, "secret set e < x", "secrets.e: has value and env; write one of"),
    (JOB_A, f"{SET} < ", "secrets.openai-prod.value: is empty"),
    (JOB_A, f"{SET} < S3CR3T b", "has characters that no token has"),
    (JOB_A, f"{SET} < S3CR3T\udcff", "has characters that no token has"),
    (JOB_A, f"{SET} < YOUR-OPENAI-KEY", "is the placeholder of the example"),
    (JOB_A, f"{SET} < {token('YOUR-KEY')}", "is the placeholder of the example"),
    (JOB_A, f"{SET} < {token('x', OTHER_KEY)}", "with another key"),
    (JOB_A, f"{SET} < {'a' * 80_000}", "is over 64 KiB"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(REFUSED)))
def test_refused(row: int, place: Place) -> None:
    """One line without a secret, exit code 2 (1 for a layout), and the file stays byte for byte."""
    text, command, message = REFUSED[row]
    text = f"\ufeff# x\n{text}".replace("\n", "\r\n") if row % 2 else text
    place.write(text)
    command, _, typed = command.partition(" < ")
    message = message.replace(" in config:", f" in {place.config}:")
    code = 1 if BY_HAND in message else 2
    place.refuses(code, message, *command.split(" "), typed=typed.encode(errors="surrogateescape"))
    assert "S3CR3T" not in place.err


def test_old_problems_do_not_matter(place: Place) -> None:
    """A config with other problems can be changed; one of the same kind cannot be added."""
    place.write(f"nope: 1\n{SECRETS}jobs:\n  x: {{batch_ids: [b 1], config_id: 1}}\n  {A}")
    place.refuses(2, '"b 1"', "job", "add", "y", "--batch-id", "b 1", "--config-id", "1")
    for command in ("pause a", "pause x", "remove x"):
        assert place.run("job", *command.split()) == 0
    place.config.unlink()
    assert place.run("job", "remove", "a") == 2  # there is no file, and none is made
    assert not place.config.exists()


def test_secret_set_makes_an_entry(place: Place) -> None:
    """A new secret gets its type and address; the value is a token only."""
    place.write("# x\njobs: {}\n")
    url = "https://connection.keboola.com"
    new = ("secret", "set", "k", "--type", "keboola", "--stack-url", url)
    assert (place.run(*new, typed=b" 12-abc \n"), place.out) == (0, "encrypted: k\n")
    before, _, after = place.read().partition("    value: ")
    assert before == "# x\njobs: {}\nsecrets:\n  k:\n    type: keboola\n"
    assert after.endswith(f'\n    stack_url: "{url}"\n')
    assert Fernet(KEY).decrypt(after.split("\n")[0]) == b"12-abc"
    assert place.run("secret", "set", "k", "--stack-url", url.replace("n.", "n.eu.")) == 0
    assert 'stack_url: "https://connection.eu.keboola.com"\n' in place.read()
    for more in (("--type", "webhook"), ()):
        assert place.run("secret", "set", "w", *more, typed=b"https://hooks.example.com/a?b=c") == 0
    assert place.run("check") == 0


def test_secret_remove(place: Place) -> None:
    """It is refused while anything uses the secret, also a job with other problems."""
    more = "secrets:\n  spare: {type: openai, env: E}\n  hook: {type: webhook, env: H}\n"
    jobs = "jobs:\n  a: {nope: 1}\n  b: {openai_secret: spare}\nnotify: [{secret: hook}]\n"
    place.write(f"{SECRETS}{jobs}".replace("secrets:\n", more, 1))
    for name, users in (("openai-prod", "defaults, a"), ("spare", "b"), ("hook", "notify")):
        message = f"the secret {name} is used by {users}; change that first"
        place.refuses(2, message, "secret", "remove", name)
    place.run("job", "remove", "b")
    assert (place.run("secret", "remove", "spare"), place.out) == (0, "removed: spare\n")
    assert "spare" not in place.read()
    place.refuses(2, "has no secrets.spare", "secret", "remove", "spare")


def test_secret_list_shows_no_value(place: Place) -> None:
    """Names, types and users; what may be a token by mistake is not shown."""
    place.write(JOB_A.replace(":\n", ":\n  p: {type: openai, value: S3CR3T}\n  q: S3CR3T\n", 1))
    assert place.run("secret", "list") == 0
    assert place.out.splitlines() == [
        "SECRET        TYPE                       USED BY",
        "p             openai                     nobody",
        "q             not readable: run `check`  nobody",
        "openai-prod   openai                     defaults, a",
        "keboola-prod  keboola                    defaults, a",
    ]


def test_encrypt(place: Place) -> None:
    """Plain values become tokens where they stand, and are kept; --rotate is for the first key."""
    place.write(
        "nope: 1\nsecrets:\n  a: {type: openai, value: 'S3CR3T-1'} # x\n"
        "  d:\n    value: | # of Anna\n      S3CR3T-2\n    type: openai\n"
        f"  e: {{type: openai, value: {token('x-y-z')}}}\n  f: {{type: openai, value: }}\njobs: {{x: {{}}}}\n"
    )
    assert (place.run("encrypt"), place.out) == (0, "encrypted: a, d\n")
    text = place.read()
    assert "S3CR3T" not in text
    assert "=} # x\n  d:\n    value: gAAAA" in text
    assert "= # of Anna\n    type: openai\n" in text
    assert (place.run("encrypt"), place.read()) == (0, text)
    assert place.out == "nothing to do: no value is in plain\n"
    place.key_file.write_text(f"{OTHER_KEY}\n{KEY}\n")
    assert place.run("encrypt", "--rotate") == 0
    place.key_file.write_text(OTHER_KEY)
    assert place.run("encrypt") == 0


def test_encrypt_refuses_what_is_no_token(place: Place) -> None:
    """Placeholders, also encrypted ones, and tokens of another key: a line each, nothing written."""
    values = ("YOUR-KEY", token("YOUR-KEY"), token("x", OTHER_KEY), "good")
    entries = (f"  s{i}: {{type: openai, value: {value}}}\n" for i, value in enumerate(values))
    text = f"secrets:\n{''.join(entries)}jobs: {{}}\n"
    place.write(text)
    assert place.run("encrypt") == 2
    assert [line.removeprefix(f"{place.config}:") for line in place.err.splitlines()] == [
        "2:29: secrets.s0.value: is the placeholder of the example; put your own there",
        "3:29: secrets.s1.value: is the placeholder of the example; put your own there",
        "4:29: secrets.s2.value: is encrypted with another key; add that key after the first one",
    ]
    assert place.read() == text


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
START_FLOW = f"{{jobs: {{}}, {yaml.safe_dump(yaml.safe_load(SECRETS), default_flow_style=True)[1:]}"


@pytest.mark.parametrize("seed", range(6))
def test_fifty_random_edits(seed: int, place: Place) -> None:
    """After each the file says what was meant, and every comment of others is still there."""
    dice = random.Random(seed)  # noqa: S311
    text = [START, START_FLOW, "\ufeff" + START.replace("\n", "\r\n")][seed % 3]
    place.write(text)
    meant = yaml.safe_load(text)
    jobs, secrets = meant["jobs"], set(meant["secrets"])
    for i in range(50):
        action = dice.choice(["add", "add", "pause", "resume", "remove", "set", "drop"])
        spare = sorted(secrets - {"openai-prod", "keboola-prod"})
        name = f"{dice.choice(NAMES)[:100]} {i}" if action == "add" else dice.choice([*jobs, ""])
        if action == "set":
            assert place.run("secret", "set", f"s{i}", "--type", "openai") == 0
            secrets.add(f"s{i}")
        elif action == "drop" and spare:
            assert place.run("secret", "remove", spare[0]) == 0
            secrets.remove(spare[0])
        elif action == "add":
            assert place.add(name) == 0
            jobs[name] = {"batch_ids": ["batch_1"], "config_id": "7"}
        elif name and action != "drop":
            assert place.run("job", action, name) == 0
            jobs[name]["paused"] = action == "pause"
            jobs = {n: job for n, job in jobs.items() if (n, action) != (name, "remove")}
        document = yaml.safe_load(place.read())
        assert (document["jobs"], set(document["secrets"])) == (jobs, secrets)
    assert place.run("check") == 0
    after = place.read()
    assert after.startswith(text[:7])
    assert after.count("\r\n") == (after.count("\n") if "\r" in text else 0)
    for comment in ("# the team's config", "# what is watched", "# the first one", "# the end"):
        assert (comment in after) == (comment in text)


@pytest.mark.long
def test_twenty_at_once(place: Place) -> None:
    """Twenty processes lose none of their jobs."""
    place.write(START)
    command = [*COMMAND, "--config", str(place.config), "job", "add", "--batch-id", "batch_1"]
    command += ["--config-id", "1"]
    started = [subprocess.Popen([*command, f"job {i}"], stdout=-3) for i in range(20)]  # DEVNULL
    assert [process.wait(60) for process in started] == [0] * 20
    assert {f"job {i}" for i in range(20)} < yaml.safe_load(place.read())["jobs"].keys()
    place.is_alone()


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
    assert place.run("job", "pause", "second") == 0
    assert place.config.is_symlink()
    status = real.stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert os.geteuid() or (status.st_uid, status.st_gid) == (1234, 4321)
    assert [p.name for p in real.parent.iterdir()] == ["team.yaml"]


def test_changed_meanwhile(place: Place) -> None:
    """What a person saved between reading and replacing is kept."""
    place.write(START)
    place.patch.setattr(os, "fsync", lambda _: place.write("jobs: {}  # mine\n"))
    assert place.run("job", "pause", "second") == 1
    what = f"{place.config} was changed meanwhile; run the command again"
    assert (place.err, place.read()) == (f"teckochecker: {what}\n", "jobs: {}  # mine\n")
    place.is_alone()


@pytest.mark.parametrize("step", ["fsync", "fchown", "replace"])
def test_what_fails_changes_nothing(step: str, place: Place) -> None:
    """A full disk leaves the old file whole, and no other beside it."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.patch.setattr(Path if step == "replace" else os, step, fail)
    place.write(START)
    hint = "No space left on device; run this as the file's owner"
    place.refuses(1, hint, "job", "pause", "second")


def test_another_editor_holds_the_lock(place: Place) -> None:
    """After ten seconds that is told, and nothing is written."""
    place.write(START)
    waits: list[float] = []
    place.patch.setattr("time.sleep", waits.append)
    fd = os.open(place.config.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    what = f"another command has been changing {place.config} for ten seconds; run this one again"
    place.refuses(1, what, "job", "pause", "second")
    assert sum(waits) == pytest.approx(10)
    os.close(fd)
    assert place.run("job", "pause", "second") == 0


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root")
def test_a_mount_of_its_own(place: Place) -> None:
    """A file that is mounted alone cannot be replaced: the cure is to mount its directory."""
    place.write(START)
    mounted = 'mount --bind "$0" "$0" || exit 77; exec "$@" --config "$0" job pause second'
    command = ["unshare", "-m", "sh", "-c", mounted, str(place.config), *COMMAND]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 1
    assert "it is a mount of its own: mount its directory instead" in done.stderr
    assert place.read() == START


@pytest.mark.parametrize(("typed", "code"), [("sk-real", 0), ("", 2), (None, 2)])
def test_standard_input(typed: str | None, code: int, place: Place) -> None:
    """A value comes through a pipe; an empty or closed input is told, without a traceback."""
    place.write(START)
    command = [*COMMAND, "--config", str(place.config), "secret", "set", "s", "--type", "openai"]
    if typed is None:
        command = ["sh", "-c", 'exec "$0" "$@" <&-', *command]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=False)
    assert (done.returncode, "value: is empty" in done.stderr) == (code, code == 2)
    assert (place.read() == START) == (code == 2)
