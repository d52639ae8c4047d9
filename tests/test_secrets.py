"""Secrets: they do not print, open with the right key only, and are masked where they turn up."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import pickle
import re
import subprocess
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

import teckochecker as tecko

VALUE = 'sk-proj-"S3CR3T"/\\+value'  # every kind of character that some notation escapes
MAKE_KEY = "head -c 32 /dev/urandom | base64 | tr +/ -_"
# The command that messages give as a cure makes the keys, so all tests prove it.
KEYS = [subprocess.check_output(["sh", "-c", MAKE_KEY], text=True).strip() for _ in "123"]
KEY, OTHER_KEY, FOREIGN_KEY = KEYS


def token(value: str, key: str = KEY) -> str:
    return Fernet(key).encrypt(value.encode()).decode()


class Place:
    """A directory with a config of one secret, and an environment of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.key_file = directory / "teckochecker.key"
        self.env: dict[str, str] = {}
        self.files = tecko.Files()
        self.redactor = tecko.Redactor()

    def write_config(self, source: str, kind: str = "openai") -> None:
        text = f"secrets:\n  prod: {{type: {kind}, {source}}}\njobs: {{}}\n"
        self.config.write_text(text, encoding="utf-8")

    def write_key(self, text: str) -> None:
        self.key_file.write_text(text, encoding="utf-8")
        self.key_file.chmod(0o600)

    def load(self) -> tecko.LoadedConfig:
        self.files = tecko.Files()
        return tecko.load_config(self.config, self.files, self.env, self.redactor)

    def value(self) -> str:
        """Return the secret as a request would carry it."""
        return self.load().secrets["prod"].reveal()

    def refusal(self) -> str:
        """Return what a start says, without the name of the file."""
        with pytest.raises(tecko.ConfigError) as refused:
            self.load()
        return str(refused.value).removeprefix(f"{self.config}:")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def with_key(place: Place) -> Place:
    place.write_key(KEY)
    return place


@dataclasses.dataclass
class Holder:
    secret: tecko.Secret


PRINTERS: dict[str, Callable[[tecko.Secret], str]] = {
    "format": lambda secret: f"{secret} {secret!r} {secret!s} {secret=}",
    "percent": lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 - that is the case
    "in containers": lambda secret: f"{[secret]} {({'a': secret},)} { ({secret}) }",
    "dataclass": lambda secret: repr(Holder(secret)),
    "json default": lambda secret: json.dumps({"a": secret}, default=repr),
    "log": lambda s: logging.LogRecord("x", 40, "", 1, "%s %r", (s, s), None).getMessage(),
    "exception": lambda secret: repr(ValueError(secret, Holder(secret))),
}


@pytest.mark.parametrize("how", PRINTERS)
def test_a_secret_does_not_print(how: str) -> None:
    """No ordinary way of making text out of an object shows the value."""
    text = PRINTERS[how](tecko.Secret("S3CR3T-value"))
    assert ("S3CR3T" in text, "Secret(***)" in text) == (False, True)


REFUSED: dict[str, Callable[[Any], object]] = {
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "asdict": lambda secret: dataclasses.asdict(Holder(secret)),
    "json": json.dumps,
    "vars": vars,
    "concatenate": lambda secret: "Bearer " + secret,
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_secret_does_not_get_stored(how: str) -> None:
    """What would copy the value somewhere else raises, and without saying the value."""
    with pytest.raises(TypeError, match=r"^(?!.*S3CR3T)"):
        REFUSED[how](tecko.Secret("S3CR3T-value"))
    assert len({tecko.Secret("a"), tecko.Secret("a"), tecko.Secret("b")}) == 2  # as accounts are


def test_a_loaded_config_does_not_print_its_secrets(with_key: Place) -> None:
    """Neither the opened value nor what stands in the file is in a repr of what was loaded."""
    with_key.write_config(f"value: {token('S3CR3T-value')}")
    shown = repr(dataclasses.replace(with_key.load(), text=""))  # a text of tokens and names
    assert "Secret(***)" in shown
    assert not re.search("S3CR3T|gAAAA", shown)


def redactor(*values: str) -> tecko.Redactor:
    known = tecko.Redactor()
    known.learn((f"secret {i}", tecko.Secret(value)) for i, value in enumerate(values))
    return known


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": json.dumps,
    "JSON after JSON": lambda value: json.dumps({"a": json.dumps("x")}) + json.dumps([value]),
    "repr": lambda value: repr(ValueError(value)),
    "URL": lambda value: f"https://host/?q={urllib.parse.quote(value, safe='')}&a=b",
    "header": lambda value: f"Authorization: Bearer {value}\r\n",
    "middle": lambda value: f"<<{value}{value}>>",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [VALUE, 'S3CR3T-"\\x', "S3CR3T-\"'x"])
def test_redactor_finds_a_value_in_every_notation(form: str, value: str) -> None:
    """A value is masked plain, and escaped as JSON, Python and URLs do it."""
    text = redactor(value).text(FORMS[form](value))
    assert ("S3CR3T" in text, "***" in text) == (False, True)


def test_redactor_masks_secrets_and_nothing_else() -> None:
    """What is no secret, or too short for one, stays; of a longer one nothing stays behind."""
    assert redactor("S3CR3T").text("batch_abc is done") == "batch_abc is done"
    assert tecko.Redactor().text("S3CR3T") == "S3CR3T"
    assert redactor("", "abc").text("abcd") == "abcd"
    assert redactor("a.c+(x").text("a.c+(x abc") == "*** abc"  # no regular expression
    longest_first = redactor("sk-a", "sk-a-b", "sk-a-b-c-0123456789")
    assert longest_first.text("x sk-a-b-c-0123456789 y sk-a z") == "x *** y *** z"
    assert longest_first.body(b"sk-a-b-c-0123456789", is_data=False) == b"***"


def test_redactor_remembers_the_last_twenty_of_each_secret() -> None:
    """After a reload with a new key, the old one may still come up in a late answer."""
    known = tecko.Redactor()
    for i in range(21):
        known.learn([("prod", tecko.Secret(f"S3CR3T-{i:02}")), ("other", tecko.Secret("same"))])
    assert known.text("S3CR3T-00 S3CR3T-01 S3CR3T-20 same") == "S3CR3T-00 *** *** ***"
    known.learn([("prod", tecko.Secret("S3CR3T-01")), ("prod", tecko.Secret("new-one"))])
    assert known.text("S3CR3T-01 S3CR3T-02 new-one") == "*** S3CR3T-02 ***"


def test_redactor_walks_through_fields() -> None:
    """Keys, values, nested lists and objects of any kind lose the secret; numbers stay numbers."""
    tree: dict[str, Any] = {"S3CR3T": 1}
    tree |= {"a": ["S3CR3T", {"b": ("x S3CR3T", None, True, 1.5)}], "d": b"S3CR3T"}
    tree |= {"c": ValueError("no S3CR3T here"), "e": {"S3CR3T"}, "f": tecko.Secret("S3CR3T")}
    clean = {"***": 1, "a": ["***", {"b": ["x ***", None, True, 1.5]}], "d": "b'***'"}
    clean |= {"c": "ValueError('no *** here')", "e": ["***"], "f": "Secret(***)"}
    assert redactor("S3CR3T").tree(tree) == clean


def test_redactor_cleans_a_servers_answer() -> None:
    """An answer that echoes a token loses it; in data, a short value may be part of an id."""
    short, long = "S3CR3T", "S3CR3T-0123456789"
    assert redactor(short, long).body(b'{"e": "S3CR3T"}', is_data=False) == b'{"e": "***"}'
    assert redactor(short).body(b'{"id": "S3CR3T"}', is_data=True) == b'{"id": "S3CR3T"}'
    assert redactor(long).body(b'"S3CR3T-0123456789"', is_data=True) == b'"***"'
    body = json.dumps({"e": VALUE}).encode()
    assert redactor(VALUE).body(body, is_data=True) == b'{"e": "***"}'
    assert redactor(long).body(b"\xff\x00", is_data=False) == b"\xff\x00"


ESCAPED = {
    rb"sk-ab\/cdefghij=klmn": True,
    rb"sk-ab/cdefghij\u003dklmn": True,
    rb"\u0073k-ab\/cdefghij\u003Dklmn": True,
    rb"sk-ab\\/cdefghij=klmn": False,  # a backslash and a slash: another text
    rb"sk-other \u0022 \/": False,
}


@pytest.mark.parametrize("is_data", [True, False])
@pytest.mark.parametrize("written", ESCAPED)
def test_a_token_that_json_escapes(written: bytes, *, is_data: bool) -> None:
    """However a server's JSON writes the token, it is masked, and nothing else is changed."""
    body = b'{"error": "bad key ' + written + rb' \u0022 end"}'
    masked = redactor("sk-ab/cdefghij=klmn").body(body, is_data=is_data)
    assert masked == body or json.loads(masked) == {"error": 'bad key *** " end'}
    assert (masked != body) is ESCAPED[written]


def test_what_must_be_shown_nowhere(with_key: Place) -> None:
    """Keys are masked too, and of a webhook's address the path alone; also in a refusal."""
    with_key.write_config(f"value: {token('https://hooks.example.com/T0/S3CR3T?x=1')}", "webhook")
    with_key.load()
    text = f"{KEY} POST /T0/S3CR3T?x=1 and /T0/S3CR3T on hooks.example.com"
    assert with_key.redactor.text(text) == "*** POST *** and *** on hooks.example.com"
    with_key.write_config("env: OPENAI, organization: S3CR3T")
    with_key.env["OPENAI"] = "S3CR3T"
    with_key.config.write_text(with_key.config.read_text() + "S3CR3T: 1\n", encoding="ascii")
    assert with_key.refusal().startswith('4:1: the key "***" is not known; ')


LONG = "S3CR3T-" + "x" * 60
MISPLACED = [
    "poll_interval: {}", "mode: {}", "since: {}", "config_id: {}!", "batch_ids: [{}!, {}!]",
    "variables: {{{}!: 1}}", "follow: {}", "{}: 1", "{{{}: 1, {}: 2}}", "match: {{{}: [1]}}",
    "paused: &{} *{}", "mode: !{} x",
]  # fmt: skip


@pytest.mark.parametrize("written", MISPLACED)
@pytest.mark.parametrize("value", ["S3CR3T-short", LONG])
def test_a_token_in_a_wrong_place(value: str, written: str, place: Place) -> None:
    """A known token that stands among keys, names or values is shown nowhere, not even a part."""
    place.write_config("env: OPENAI")
    place.env["OPENAI"] = value
    place.load()
    text = written.replace("{}", value).replace("{{", "{").replace("}}", "}")
    body = text if text.startswith("{") else f"{{{text}}}"
    for name in ("a", value, f"a/{value}"):
        secrets = "secrets: {prod: {type: openai, env: OPENAI}}"
        place.config.write_text(f"{secrets}\njobs:\n  {name}: {body}\n", encoding="ascii")
        refusal = place.refusal()
        assert ("S3CR3T" in refusal, "; " in refusal) == (False, True)


def test_a_long_text_is_shown_whole_or_not_at_all(place: Place) -> None:
    """Half of a token that is not known yet would not be masked later, when it is known."""
    place.write_config("env: OPENAI")
    place.env["OPENAI"] = "sk-1"
    with place.config.open("a", encoding="ascii") as file:
        file.write(f"state: &{LONG} a\nlog: {{level: {LONG}, format: {'x' * 60}}}\n")
    assert [line.partition(": ")[2] for line in place.refusal().splitlines()] == [
        'log.level: "***" is not a value of level; write debug, info, warning or error',
        f'log.format: "{"x" * 60}" is not a value of format; write auto, console or json',
    ]


def test_three_places_of_the_key_in_order(place: Place, tmp_path: Path) -> None:
    """The environment wins over the service manager's credential, and that one over key_file."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    keys = {"variable": KEYS[0], "credential": KEYS[1], "file": KEYS[2]}

    def answers() -> list[str]:
        found = []
        for name, key in keys.items():
            place.write_config(f"value: {token('value', key)}")
            with contextlib.suppress(tecko.ConfigError):
                found += [name] * (place.load().warnings == ())
        return found

    assert answers() == []
    place.write_key(keys["file"])
    assert answers() == ["file"]
    place.env["CREDENTIALS_DIRECTORY"] = str(credentials)
    assert answers() == ["file"]  # a directory without our key is somebody else's
    (credentials / "teckochecker.key").write_text(keys["credential"], encoding="ascii")
    (credentials / "teckochecker.key").chmod(0o444)  # its mode is the service manager's matter
    assert answers() == ["credential"]
    place.env["TECKOCHECKER_KEY"] = keys["variable"]
    assert answers() == ["variable"]
    place.env["TECKOCHECKER_KEY"] = "  "
    assert answers() == ["credential"]


@pytest.mark.parametrize("path", ["my.key", "{}/my.key"])
def test_key_file_may_stand_elsewhere(path: str, place: Place, tmp_path: Path) -> None:
    """key_file is relative to the config, not to the working directory, or absolute."""
    place.key_file = tmp_path / "my.key"
    place.write_key(KEY)
    secrets = f"secrets: {{prod: {{type: openai, value: {token('value')}}}}}"
    text = f"key_file: {path.format(tmp_path)}\n{secrets}\njobs: {{}}\n"
    place.config.write_text(text, encoding="ascii")
    assert place.value() == "value"


LISTS = ["{}\n{}\n", "{},{}", "{} {}\r\n", "# new\n{}  # since May\n\n# old\n{}"]


@pytest.mark.parametrize("text", [layout.format(KEY, OTHER_KEY) for layout in LISTS])
def test_several_keys(text: str, place: Place) -> None:
    """All keys open, in whatever way they are listed; comments say which is which."""
    place.write_key(text)
    for key in (KEY, OTHER_KEY):
        place.write_config(f"value: {token('value', key)}")
        assert place.value() == "value"
    place.env["TECKOCHECKER_KEY"] = text
    place.key_file.unlink()
    keys = tecko.read_keys(place.load().config, tecko.Files(), place.env)[0]
    assert Fernet(KEY).decrypt(keys.encrypt(b"x")) == b"x"  # the first one encrypts


MODES = {0o644: "others", 0o602: "others", 0o777: "others", 0o640: "group", 0o660: "group"}


@pytest.mark.parametrize("mode", [*MODES, 0o600, 0o400])
def test_key_file_open_to_others(mode: int, with_key: Place) -> None:
    """A key that others can reach is refused; that its group can is a warning; both have a cure."""
    path = with_key.key_file
    path.chmod(mode)
    with_key.write_config(f"value: {token('value')}")
    if MODES.get(mode) == "others":
        what = f"{path} can be read by others (mode {mode:04o})"
        assert with_key.refusal() == f"2:3: key_file: {what}; run: chmod 600 {path}"
        return
    warning = f"{path} can be read by its group; better: chmod 600 {path}"
    assert with_key.load().warnings == ((warning,) if mode in MODES else ())


def test_no_key_is_needed_without_values(place: Place) -> None:
    """Whoever keeps all secrets in the environment or in files needs no Fernet key at all."""
    place.write_config("env: OPENAI")
    what = "the environment has no such variable; set it, or correct the name"
    assert place.refusal() == f"2:29: secrets.prod.env: {what}"
    place.env["OPENAI"] = "sk-1"
    assert place.value() == "sk-1"


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (str, "No such file or directory"),
    "directory": (lambda path: path.mkdir(mode=0o700), "Is a directory"),
    "named pipe": (os.mkfifo, "Not a regular file"),
    "loop of links": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_files(kind: str, place: Place) -> None:
    """A key or secret file that cannot be read is told at once; nothing waits for it."""
    make, why = UNREADABLE[kind]
    make(place.key_file)
    opened = len([*Path("/proc/self/fd").iterdir()])
    place.write_config(f"value: {token('value')}")
    cure = f"bring it back, put a first one there ({MAKE_KEY}) or set $TECKOCHECKER_KEY"
    what = f"cannot read the key file {place.key_file}: {why}"
    assert place.refusal() == f"2:3: key_file: {what}; {cure}"
    place.write_config("file: teckochecker.key")
    what = f"cannot read the file: {why}; correct the path or its permissions"
    assert place.refusal() == f"2:30: secrets.prod.file: {what}"
    assert len([*Path("/proc/self/fd").iterdir()]) == opened  # a daemon tries for ever


NO_KEY = {"": "no key", "# only a comment\n": "no key"}


@pytest.mark.parametrize("text", [*NO_KEY, "my S3CR3T", KEY[:-2], "klíč", f"{KEY}\nS3CR3T"])
def test_what_is_no_key(text: str, place: Place) -> None:
    """What holds no Fernet key is refused by its place, without showing what it holds."""
    what = NO_KEY.get(text, "something other than Fernet keys")
    place.write_key(text)
    place.write_config(f"value: {token('value')}")
    cure = f"make one: {MAKE_KEY}"
    assert place.refusal() == f"2:3: key_file: {place.key_file} holds {what}; {cure}"
    place.env["TECKOCHECKER_KEY"] = text or "#"
    assert place.refusal() == f"2:3: key_file: $TECKOCHECKER_KEY holds {what}; {cure}"


def put(place: Place, source: str, text: str, kind: str = "openai") -> None:
    """Write a secret's value where a source of it would have it."""
    written = {"value": token(text), "env": "OPENAI", "file": place.directory / "openai.txt"}[
        source
    ]
    place.write_config(f"{source}: {written}", kind)
    place.env["OPENAI"] = text
    (place.directory / "openai.txt").write_bytes(text.encode())


@pytest.mark.parametrize("source", ["value", "env", "file"])
@pytest.mark.parametrize("text", ["sk-1", "  sk-1\n", "\r\n\tsk-1\r\n\r\n"])
def test_white_space_around_a_secret_goes(source: str, text: str, with_key: Place) -> None:
    """An editor's newline at the end of a secret does not reach a header."""
    put(with_key, source, text)
    assert with_key.value() == "sk-1"


ALONE = "put the token there, alone"
STRANGE = f"has characters that no token has (it takes printable ASCII without spaces); {ALONE}"
EXAMPLE = "is the placeholder of the example; put your own there"
QUOTES = "has quotes around it; write it without them"
PROGRAMMATIC = "is a programmatic token, which is not supported; make a Storage API token"
STRANGE_TEXTS = ("S3CR3T\nX: 1", "S3CR3T x", "S3CR3Tž", "\ufeffS3CR3T", "S3CR3T\x7f", "S\x00")
NO_TOKENS = [
    *(("openai", text, STRANGE) for text in STRANGE_TEXTS),
    ("openai", " \n", f"is empty; {ALONE}"),
    ("openai", "S" * 65537, f"is over 64 KiB; {ALONE}"),
    ("openai", '"sk-S3CR3T"', QUOTES),
    ("keboola", "'1-S3CR3T", QUOTES),
    ("openai", "Bearer sk-S3CR3T", "begins with Bearer; write only what follows it"),
    ("openai", "OPENAI_API_KEY=S3CR3T", "begins with NAME=; write only what follows the ="),
    ("openai", "YOUR-OPENAI-KEY", EXAMPLE),
    ("keboola", "YOUR-KEBOOLA-TOKEN", EXAMPLE),
    ("webhook", "https://hooks.slack.com/services/T0/B0/XYZ", EXAMPLE),
    ("webhook", "hooks.example.com/S3CR3T", "is not an address; put the https address there"),
    ("webhook", "http://example.com/S3CR3T", "is not https; put the https address there"),
    ("keboola", "kbc_at_S3CR3T", PROGRAMMATIC),
]


@pytest.mark.parametrize("source", ["value", "env", "file"])
@pytest.mark.parametrize(("kind", "text", "message"), NO_TOKENS)
def test_what_is_no_token(kind: str, text: str, message: str, source: str, with_key: Place) -> None:
    """What cannot be a token is refused with its cure, wherever it stands, and is not shown."""
    more = ", stack_url: https://connection.keboola.com" if kind == "keboola" else ""
    put(with_key, source, text, f"{kind}{more}")
    said = with_key.refusal()
    assert said.partition(": ")[2] == f"secrets.prod.{source}: the secret {message}"
    assert "S3CR3T" not in said


def test_what_is_a_token() -> None:
    """Honest values pass; of a webhook the query may hold anything that a URL can."""
    honest = {"openai": "sk-a_b==", "keboola": "1-45-aB", "webhook": "https://example.com/a?t=b"}
    assert [tecko.token_problem(text, kind) for kind, text in honest.items()] == [None] * 3


DAMAGED = token("value")[:70] + "AAAA" + token("value")[74:]


@pytest.mark.parametrize("text", [token("S3CR3T", FOREIGN_KEY), DAMAGED, "sk-S3CR3T", "gAAAAAB-ž"])
def test_what_does_not_open(text: str, with_key: Place) -> None:
    """A damaged token, one of another key, and one in plain are refused with the command to run."""
    with_key.write_config(f"value: {text}")
    what, cure = "is not encrypted", f"run: teckochecker --config {with_key.config} encrypt"
    if len(text) > 50:
        what = "is encrypted with another key"
        cure = f"bring that key back, or write the token in plain and {cure}"
    assert with_key.refusal() == f"2:31: secrets.prod.value: {what}; {cure}"


def test_each_file_is_read_once(with_key: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fingerprinted and what is parsed are the same bytes, also if named twice."""
    value = token("value")
    secrets = [f"{{type: openai, {s}}}" for s in ("file: a", "file: a", f"value: {value}") * 2]
    lines = "".join(f"  s{i}: {secret}\n" for i, secret in enumerate(secrets))
    with_key.config.write_text(f"secrets:\n{lines}jobs: {{}}\n", encoding="ascii")
    (with_key.directory / "a").write_text("sk-1", encoding="ascii")
    opened: list[str] = []
    open_now = os.open

    def counted(path: Path, flags: int) -> int:
        opened.append(Path(path).name)
        return open_now(path, flags)

    monkeypatch.setattr(os, "open", counted)
    with_key.load()
    assert sorted(opened) == ["a", "config.yaml", "teckochecker.key"]
    assert {path.name for path in with_key.files.seen} == {*opened}


def test_the_digest_sees_content_mode_and_absence(tmp_path: Path) -> None:
    """Whatever would change the outcome of a reload changes the digest; to read does not."""
    path = tmp_path / "a"
    seen = [tecko.Files().read(path).digest]
    for change in (path.touch, lambda: path.write_bytes(b"x"), lambda: path.chmod(0o640)):
        change()
        seen.append(tecko.Files().read(path).digest)
    assert tecko.Files().read(path).digest == seen[-1]
    assert len(set(seen)) == 4
