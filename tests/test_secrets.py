"""Secrets: they do not print, they open with the right key only, and `encrypt` closes them."""

from __future__ import annotations

import copy
import dataclasses
import errno
import io
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography.fernet import Fernet

import teckochecker as tecko

ROOT = Path(__file__).resolve().parent.parent
VALUE = 'sk-proj-"S3CR3T"/\\+value'  # every kind of character that some notation escapes
KEYS = [Fernet.generate_key().decode() for _ in range(3)]
KEY, OTHER_KEY, FOREIGN_KEY = KEYS
CURE_KEY = tecko.MAKE_KEY


def token(value: str, key: str = KEY) -> str:
    return Fernet(key).encrypt(value.encode()).decode()


def opened(value: str, *keys: str) -> str | None:
    """Return what is in a token, or None if the keys do not open it."""
    secret = tecko.Keyring([tecko.Secret(key) for key in keys or (KEY,)]).decrypt(value)
    return None if secret is None else secret.reveal()


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Place:
    """A directory with a config of one secret, and an environment of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.key_file = directory / "teckochecker.key"
        self.env: dict[str, str] = {}

    def write_config(self, source: str) -> None:
        text = f"secrets:\n  openai-prod: {{type: openai, {source}}}\njobs: {{}}\n"
        self.config.write_text(text, encoding="utf-8")

    def write_key(self, *keys: str, mode: int = 0o600) -> None:
        self.key_file.write_text("\n".join(keys) + "\n", encoding="ascii")
        self.key_file.chmod(mode)

    def load(self) -> tecko.Setup:
        return tecko.load_setup(self.config, tecko.Files(), self.env, tecko.Redactor())

    def value(self) -> str:
        """Return the secret as a request would carry it."""
        return self.load().secrets["openai-prod"].reveal()

    def refusal(self) -> str:
        """Return what a start says, which has to be one line, without the name of the file."""
        with pytest.raises(tecko.ConfigError) as refused:
            self.load()
        return str(refused.value).removeprefix(f"{self.config}:")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def with_key(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place whose commands, too, find KEY in the key file."""
    for name in (tecko.KEY_VARIABLE, "CREDENTIALS_DIRECTORY", "TECKOCHECKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    place.write_key(KEY)
    return place


# --- the Secret type ------------------------------------------------------------------------------


@dataclasses.dataclass
class Holder:
    secret: tecko.Secret


def log_line(secret: tecko.Secret) -> str:
    stream = io.StringIO()
    logger = logging.Logger("test")  # noqa: LOG001 - not one that others may have set up
    logger.addHandler(logging.StreamHandler(stream))
    logger.error("it is %s and %r", secret, secret)
    logger.error(secret)
    return stream.getvalue()


def trace_with_locals(secret: tecko.Secret) -> str:
    try:
        holder = Holder(secret)
        raise ValueError(secret, holder)
    except ValueError as error:
        return "".join(
            traceback.TracebackException.from_exception(error, capture_locals=True).format()
        )


PRINTERS: dict[str, Callable[[tecko.Secret], str]] = {
    "repr": repr,
    "str": str,
    "format": format,
    "format with width": lambda secret: f"{secret:>40}",
    "f-string": lambda secret: f"{secret} {secret!r} {secret!s} {secret=}",
    "percent": lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 - that is the case
    "in containers": lambda secret: f"{[secret]} {({'a': secret},)} { ({secret}) }",
    "dataclass": lambda secret: repr(Holder(secret)),
    "json default": lambda secret: json.dumps({"a": secret}, default=repr),
    "logging": log_line,
    "traceback": trace_with_locals,
    "attributes": lambda secret: f"{dir(secret)}",
}


@pytest.mark.parametrize("how", PRINTERS)
def test_a_secret_does_not_print(how: str) -> None:
    """No ordinary way of making text out of an object shows the value."""
    text = PRINTERS[how](tecko.Secret("S3CR3T-value"))
    assert "S3CR3T" not in text
    assert "Secret(***)" in text or how == "attributes"


REFUSED: dict[str, Callable[[Any], object]] = {
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "asdict": lambda secret: dataclasses.asdict(Holder(secret)),
    "json": json.dumps,
    "vars": vars,
    "join": lambda secret: "".join([secret]),
    "concatenate": lambda secret: "Bearer " + secret,
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_secret_does_not_get_stored(how: str) -> None:
    """What would copy the value somewhere else raises, and without saying the value."""
    with pytest.raises(TypeError) as refused:
        REFUSED[how](tecko.Secret("S3CR3T-value"))
    assert "S3CR3T" not in str(refused.value)


def test_equal_secrets_are_equal() -> None:
    """Secrets can be compared and be keys of a dict, as accounts are."""
    assert tecko.Secret("a") == tecko.Secret("a")
    assert hash(tecko.Secret("a")) == hash(tecko.Secret("a"))
    assert tecko.Secret("a") != tecko.Secret("b")
    assert tecko.Secret("a") != "a"


def test_a_loaded_config_does_not_print_its_secrets(with_key: Place) -> None:
    """Neither the opened value nor what stands in the file, plain or not, is in a repr."""
    encrypted = token("S3CR3T-value")
    with_key.write_config(f"value: {encrypted}")
    shown = repr(with_key.load())
    assert "Secret(***)" in shown
    assert "S3CR3T" not in shown
    assert encrypted not in shown


# --- the redactor ---------------------------------------------------------------------------------


def redactor(*values: str) -> tecko.Redactor:
    known = tecko.Redactor()
    known.learn(map(tecko.Secret, values))
    return known


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": json.dumps,
    "JSON in JSON": lambda value: json.dumps({"a": json.dumps("x")}) + json.dumps([value]),
    "URL": lambda value: f"https://host/?q={urllib.parse.quote(value, safe='')}&a=b",
    "header": lambda value: f"Authorization: Bearer {value}\r\n",
    "middle": lambda value: f"<<{value}{value}>>",
}


@pytest.mark.parametrize("form", FORMS)
def test_redactor_finds_a_value_in_every_notation(form: str) -> None:
    """A value is masked plain, escaped as JSON does it, and quoted as URLs do it."""
    text = redactor(VALUE).text(FORMS[form](VALUE))
    assert "S3CR3T" not in text
    assert "***" in text


def test_redactor_leaves_other_text_alone() -> None:
    """What is no secret stays as it is; without secrets nothing is masked."""
    assert redactor("S3CR3T").text("batch_abc is done") == "batch_abc is done"
    assert tecko.Redactor().text("S3CR3T") == "S3CR3T"
    assert redactor("").text("abc") == "abc"


def test_redactor_takes_the_longest_value_first() -> None:
    """Where one secret begins with another one, nothing of the longer one stays."""
    assert redactor("sk-a", "sk-a-b", "sk-a-b-c").text("x sk-a-b-c y sk-a z") == "x *** y *** z"


def test_redactor_takes_values_literally() -> None:
    """A secret with characters of regular expressions masks itself and nothing else."""
    known = redactor("a.c+(x")
    assert known.text("a.c+(x abc") == "*** abc"


def test_redactor_never_forgets() -> None:
    """After a reload with a new key the old one may still come up in a late answer."""
    known = redactor("old-S3CR3T")
    known.learn([tecko.Secret("new-S3CR3T")])
    assert known.text("old-S3CR3T new-S3CR3T") == "*** ***"


def test_redactor_walks_through_fields() -> None:
    """Keys, values, nested lists and objects of any kind lose the secret; numbers stay numbers."""
    tree = {
        "S3CR3T": 1,
        "a": ["S3CR3T", {"b": ("x S3CR3T", None, True, 1.5)}],
        "c": ValueError("no S3CR3T here"),
        "d": b"S3CR3T",
        "e": {"S3CR3T"},
        "f": tecko.Secret("S3CR3T"),
    }
    cleaned = redactor("S3CR3T").tree(tree)
    assert cleaned == {
        "***": 1,
        "a": ["***", {"b": ["x ***", None, True, 1.5]}],
        "c": "ValueError('no *** here')",
        "d": "b'***'",
        "e": ["***"],
        "f": "Secret(***)",
    }


def test_redactor_cleans_a_servers_answer() -> None:
    """An answer that echoes a token loses it; in data, a short value may be part of an id."""
    short, long = "S3CR3T", "S3CR3T-0123456789"
    assert redactor(short, long).body(b'{"e": "S3CR3T"}', is_data=False) == b'{"e": "***"}'
    assert redactor(short).body(b'{"id": "S3CR3T"}', is_data=True) == b'{"id": "S3CR3T"}'
    assert redactor(long).body(b'"S3CR3T-0123456789"', is_data=True) == b'"***"'
    body = json.dumps({"e": VALUE}).encode()
    assert redactor(VALUE).body(body, is_data=True) == b'{"e": "***"}'
    assert redactor(long).body(b"\xff\x00", is_data=False) == b"\xff\x00"


def test_redactor_cleans_a_body_of_the_longest_value_first() -> None:
    """In an answer's bytes, too, nothing of a longer secret stays behind a shorter one."""
    for i in range(40):  # the order of a set is another one for every pair
        short = f"S3CR3T-{i:04}-0123456789"
        body = redactor(short, short + "-TAIL").body(f"{short}-TAIL".encode(), is_data=True)
        assert body == b"***"


@pytest.mark.parametrize("value", ['S3CR3T-"\\x', "S3CR3T-\"'x"])
def test_redactor_finds_a_repr(value: str) -> None:
    """An exception in a log field is shown as its repr, where Python escapes its own way."""
    assert "S3CR3T" not in str(redactor(value).tree(ValueError(value)))


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Put the global settings of logging back."""
    root, raising = logging.getLogger(), logging.raiseExceptions
    handlers, level = root.handlers, root.level
    levels = {n: logging.getLogger(n).level for n in ("httpx", "httpcore", "watchfiles", "asyncio")}
    yield
    root.handlers, logging.raiseExceptions = handlers, raising
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)
    structlog.reset_defaults()


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("style", ["json", "console"])
def test_no_log_line_has_a_secret(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Event, fields and exception text of both renderers are redacted, also of foreign loggers."""
    value = VALUE.replace("\\", "")  # see test_redactor_finds_a_repr
    tecko.configure_logging(tecko.LogSettings("debug", style), redactor(value))
    log = tecko.logger()
    log.info(
        " ".join(["event", value]), field=value, nested={"a": [value]}, other=ValueError(value)
    )
    try:
        raise RuntimeError(f"it was {value}") from ValueError(value)
    except RuntimeError:
        log.exception("internal_error")
    logging.getLogger("someone.else").warning("got %s", value, extra={"token": value})
    err = capsys.readouterr().err
    assert err.count("***") >= 6
    assert "S3CR3T" not in err


# --- where the key comes from ---------------------------------------------------------------------


def test_three_places_of_the_key_in_order(place: Place, tmp_path: Path) -> None:
    """The environment wins over the service manager's credential, and that one over key_file."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    keys = {"variable": KEYS[0], "credential": KEYS[1], "file": KEYS[2]}

    def answers() -> list[str]:
        found = []
        for name, key in keys.items():
            place.write_config(f"value: {token('v', key)}")
            try:
                found += [name] if place.value() == "v" else []
            except tecko.ConfigError:
                continue
        return found

    assert answers() == []
    place.write_key(keys["file"])
    assert answers() == ["file"]
    place.env["CREDENTIALS_DIRECTORY"] = str(credentials)
    assert answers() == ["file"]  # a directory without our key is somebody else's
    (credentials / "teckochecker.key").write_text(keys["credential"], encoding="ascii")
    assert answers() == ["credential"]
    place.env["TECKOCHECKER_KEY"] = keys["variable"]
    assert answers() == ["variable"]
    place.env["TECKOCHECKER_KEY"] = "  "
    assert answers() == ["credential"]


def test_key_file_may_stand_elsewhere(place: Place, tmp_path: Path) -> None:
    """key_file is relative to the config, not to the working directory, or absolute."""
    (tmp_path / "keys").mkdir()
    place.key_file = tmp_path / "keys" / "my.key"
    place.write_key(KEY)
    for path in ("keys/my.key", str(place.key_file)):
        place.write_config(f"value: {token('v')}")
        place.config.write_text(f"key_file: {path}\n" + place.config.read_text(encoding="utf-8"))
        assert place.value() == "v"


@pytest.mark.parametrize(
    "text",
    [
        f"{KEY}\n{OTHER_KEY}\n",
        f"{KEY},{OTHER_KEY}",
        f"{KEY} {OTHER_KEY}\r\n",
        f"# new\n{KEY}  # since May\n\n# old\n{OTHER_KEY}",
    ],
)
def test_several_keys(text: str, place: Place) -> None:
    """All keys open, in whatever way they are listed; comments say which is which."""
    place.write_key(text)
    for key in (KEY, OTHER_KEY):
        place.write_config(f"value: {token('v', key)}")
        assert place.value() == "v"
    place.env["TECKOCHECKER_KEY"] = text
    place.key_file.unlink()
    assert place.value() == "v"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601, 0o666, 0o777])
def test_key_file_open_to_others_is_refused(mode: int, place: Place) -> None:
    """A key that others can reach is refused with the command that cures it."""
    place.write_key(KEY, mode=mode)
    place.write_config(f"value: {token('v')}")
    path = place.key_file
    assert place.refusal() == (
        f"2:3: key_file: {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
    )


@pytest.mark.parametrize("mode", [0o640, 0o660, 0o440])
def test_key_file_open_to_its_group_warns(mode: int, place: Place) -> None:
    """A key that the group can read works, with a warning that names the better mode."""
    place.write_key(KEY, mode=mode)
    place.write_config(f"value: {token('v')}")
    path = place.key_file
    assert place.load().warnings == (f"{path} can be read by its group; better: chmod 600 {path}",)
    assert place.value() == "v"


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_private_key_file_is_fine(mode: int, place: Place) -> None:
    """The modes that are asked for give no warning."""
    place.write_key(KEY, mode=mode)
    place.write_config(f"value: {token('v')}")
    assert place.load().warnings == ()


def test_credential_is_the_service_managers_business(place: Place, tmp_path: Path) -> None:
    """The mode of a file under $CREDENTIALS_DIRECTORY is not ours to judge."""
    place.key_file = tmp_path / "credentials" / "teckochecker.key"
    place.key_file.parent.mkdir()
    place.write_key(KEY, mode=0o444)
    place.env["CREDENTIALS_DIRECTORY"] = str(place.key_file.parent)
    place.write_config(f"value: {token('v')}")
    assert place.load().warnings == ()


def test_the_warning_is_shown_by_check(with_key: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` passes with a group-readable key, and says so on stderr."""
    with_key.write_key(KEY, mode=0o640)
    with_key.write_config(f"value: {token('v')}")
    assert tecko.main(["--config", str(with_key.config), "check"]) == 0
    out, err = capsys.readouterr()
    key = with_key.key_file
    assert out == f"{with_key.config}: fine: 0 jobs, 0 batches, 1 secret\n"
    assert err == (
        f"{with_key.config}: warning: {key} can be read by its group; better: chmod 600 {key}\n"
    )


def test_no_key_is_needed_without_values(place: Place) -> None:
    """Whoever keeps all secrets in the environment or in files needs no Fernet key at all."""
    place.write_config("env: OPENAI")
    place.env["OPENAI"] = "sk-1"
    assert place.value() == "sk-1"


def make_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _: None, "No such file or directory"),
    "directory": (lambda path: path.mkdir(mode=0o700), "Is a directory"),
    "named pipe": (make_fifo, "Not a regular file"),
    "loop of links": (make_loop, "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_key_file(kind: str, place: Place) -> None:
    """A key file that cannot be read is told at once, with the command that makes a key."""
    make, why = UNREADABLE[kind]
    make(place.key_file)
    place.write_config(f"value: {token('v')}")
    assert place.refusal() == (
        f"2:3: key_file: cannot read the key file {place.key_file}: {why}; "
        f"put a Fernet key there ({CURE_KEY}) or set $TECKOCHECKER_KEY"
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no key"),
        ("# only a comment\n", "no key"),
        ("my password\n", "something other than Fernet keys"),
        (KEY[:-2], "something other than Fernet keys"),
        (f"{KEY}\nS3CR3T", "something other than Fernet keys"),
        ("klíč", "something other than Fernet keys"),
    ],
)
def test_key_file_without_a_key(text: str, what: str, place: Place) -> None:
    """A file that holds no Fernet key is refused without showing what it holds."""
    place.key_file.write_text(text, encoding="utf-8")
    place.key_file.chmod(0o600)
    place.write_config(f"value: {token('v')}")
    assert place.refusal() == (
        f"2:3: key_file: {place.key_file} holds {what}; make one: {CURE_KEY}"
    )


def test_bad_key_in_the_environment_names_the_variable(place: Place) -> None:
    """The message tells where the wrong key stands, and not what it is."""
    place.env["TECKOCHECKER_KEY"] = "S3CR3T"
    place.write_config(f"value: {token('v')}")
    assert place.refusal() == (
        "2:3: key_file: $TECKOCHECKER_KEY holds something other than Fernet keys; "
        f"make one: {CURE_KEY}"
    )


def test_the_cure_makes_a_key() -> None:
    """The command in the messages does what they promise."""
    command = CURE_KEY.replace("python3", f"'{sys.executable}'", 1)
    made = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert opened(token("v", made.stdout.strip()), made.stdout.strip()) == "v"


# --- where a value comes from ---------------------------------------------------------------------


def put_value(place: Place, text: str) -> None:
    place.write_config(f"value: {token(text)}")


def put_env(place: Place, text: str) -> None:
    place.write_config("env: OPENAI")
    place.env["OPENAI"] = text


def put_file(place: Place, text: str) -> None:
    place.write_config("file: openai.txt")
    (place.directory / "openai.txt").write_bytes(text.encode())


SOURCES: dict[str, tuple[Callable[[Place, str], None], int]] = {
    "value": (put_value, 38),  # and the column where the source's text begins
    "env": (put_env, 36),
    "file": (put_file, 37),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("text", ["sk-1", "  sk-1\n", "\r\n\tsk-1\r\n\r\n"])
def test_white_space_around_a_secret_goes(source: str, text: str, with_key: Place) -> None:
    """An editor's newline at the end of a secret does not reach a header."""
    SOURCES[source][0](with_key, text)
    assert with_key.value() == "sk-1"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("S3CR3T\nX-Other: 1", "has characters that are not printable ASCII"),
        ("S3CR3T\tx", "has characters that are not printable ASCII"),
        ("S3CR3Tž", "has characters that are not printable ASCII"),
        ("\ufeffS3CR3T", "has characters that are not printable ASCII"),
        ("S3CR3T\x00", "has characters that are not printable ASCII"),
        ("S3CR3T\x7f", "has characters that are not printable ASCII"),
    ],
)
def test_what_cannot_be_a_header(source: str, text: str, what: str, with_key: Place) -> None:
    """What remains must be printable ASCII, else an exception of httpx would show all of it."""
    put, column = SOURCES[source]
    put(with_key, text)
    assert with_key.refusal() == (
        f"2:{column}: secrets.openai-prod.{source}: the secret {what}; put the token there, alone"
    )


def test_unset_variable(place: Place) -> None:
    """A variable that is not there is told apart from one that is empty."""
    place.write_config("env: OPENAI")
    assert place.refusal() == (
        "2:36: secrets.openai-prod.env: the environment has no such variable; "
        "set it, or correct the name"
    )


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_secret_file(kind: str, place: Place) -> None:
    """A secret file that cannot be read is told at once; nothing waits for it."""
    make, why = UNREADABLE[kind]
    make(place.directory / "openai.txt")
    place.write_config("file: openai.txt")
    assert place.refusal() == (
        f"2:37: secrets.openai-prod.file: cannot read the file: {why}; "
        "correct the path or its permissions"
    )


def test_secret_file_may_be_absolute(place: Place, tmp_path: Path) -> None:
    """Container and systemd secrets stand in directories of their own."""
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "token"
    path.write_text("sk-1\n", encoding="ascii")
    place.write_config(f"file: {path}")
    assert place.value() == "sk-1"


@pytest.mark.parametrize("size", [65537, tecko.MAX_FILE_BYTES + 10])
def test_large_secret_file(size: int, place: Place) -> None:
    """A path to something large is a mistake, not a token."""
    put_file(place, "x" * size)
    assert place.refusal() == (
        "2:37: secrets.openai-prod.file: the file is over 64 KiB; put the token there, alone"
    )


def test_binary_secret_file(place: Place) -> None:
    """Bytes that are no text are refused like other unprintable text."""
    put_file(place, "")
    (place.directory / "openai.txt").write_bytes(b"\xff\xfeS\x00")
    assert "has characters that are not printable ASCII" in place.refusal()


def test_token_of_another_key(with_key: Place) -> None:
    """A token that the key does not open is refused with both ways out."""
    with_key.write_config(f"value: {token('v', FOREIGN_KEY)}")
    assert with_key.refusal() == (
        "2:38: secrets.openai-prod.value: is encrypted with another key; bring that key back, or "
        f"write the token in plain and run: teckochecker --config {with_key.config} encrypt"
    )


@pytest.mark.parametrize(
    "plain", ["sk-proj-S3CR3T", "gAAAAA", "gAAAAAB-S3CR3T", "ž-S3CR3T", "123-S3CR3T-456"]
)
def test_plain_value(plain: str, with_key: Place) -> None:
    """A token in plain is refused with the command to run, and is not shown."""
    with_key.write_config(f"value: {plain}")
    assert with_key.refusal() == (
        "2:38: secrets.openai-prod.value: is not encrypted; "
        f"run: teckochecker --config {with_key.config} encrypt"
    )


def test_a_damaged_token_does_not_open(with_key: Place) -> None:
    """One changed character is noticed (HMAC), not decrypted into rubbish."""
    good = token("v")
    middle = len(good) // 2
    other = "A" if good[middle] != "A" else "B"
    with_key.write_config(f"value: {good[:middle]}{other}{good[middle + 1 :]}")
    assert "is encrypted with another key" in with_key.refusal()


def test_each_file_is_read_once(with_key: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fingerprinted and what is parsed are the same bytes, also if named twice."""
    text = "secrets:\n" + "".join(
        f"  s{i}: {{type: openai, file: openai.txt}}\n"
        f"  v{i}: {{type: openai, value: {token('v')}}}\n"
        for i in range(3)
    )
    with_key.config.write_text(f"{text}jobs: {{}}\n", encoding="ascii")
    (with_key.directory / "openai.txt").write_text("sk-1", encoding="ascii")
    reads: list[str] = []
    read_now = tecko.Files._read_now

    def counted(path: Path) -> tecko.FileRead:
        reads.append(path.name)
        return read_now(path)

    monkeypatch.setattr(tecko.Files, "_read_now", staticmethod(counted))
    with_key.load()
    assert sorted(reads) == ["config.yaml", "openai.txt", "teckochecker.key"]


def test_the_fingerprint_sees_content_mode_and_absence(tmp_path: Path) -> None:
    """Whatever would change the outcome of a reload changes the fingerprint; a look does not."""
    path = tmp_path / "a"

    def look() -> bytes:
        files = tecko.Files()
        files.read(path)
        return files.fingerprint()[path]

    seen = [look()]
    path.write_bytes(b"")
    seen.append(look())
    path.write_bytes(b"x")
    seen.append(look())
    path.chmod(0o640)
    seen.append(look())
    assert look() == seen[-1]
    assert len(set(seen)) == 4


# --- encrypt --------------------------------------------------------------------------------------


def encrypt(path: Path, *options: str) -> int:
    return tecko.main(["--config", str(path), "encrypt", *options])


def split_token(text: str, frame: str) -> str:
    """Return what stands in `text` in the place of TOKEN in `frame`; all else must be equal."""
    before, after = frame.split("TOKEN")
    assert text.startswith(before)
    assert text.endswith(after)
    return text[len(before) : len(text) - len(after)]


LAYOUTS = {
    "plain": ("value: S3CR3T", "value: TOKEN"),
    "comment": ("value: S3CR3T   # of Anna", "value: TOKEN   # of Anna"),
    "double quotes": ('value:   "S3CR3T"', "value:   TOKEN"),
    "escapes": ('value: "S3\\x43R3\\u0054" # x', "value: TOKEN # x"),
    "single quotes": ("value: 'S3CR3T'  # x", "value: TOKEN  # x"),
    "quoted key": ('"value": S3CR3T', '"value": TOKEN'),
    "next line": ("value:  # here\n      S3CR3T", "value:  # here\n      TOKEN"),
    "anchor": ("value: &token S3CR3T", "value: &token TOKEN"),
    "tag": ("value: !!str 'S3CR3T' # x", "value: !!str TOKEN # x"),
    "anchor and tag": ("value: &t !!str S3CR3T", "value: &t !!str TOKEN"),
    "literal block": ("value: |\n      S3CR3T", "value: TOKEN"),
    "literal block, stripped": ("value: |-\n      S3CR3T", "value: TOKEN"),
    "folded block": ("value: >\n        S3CR3T", "value: TOKEN"),
    "block with comment": ("value: | # of Anna\n      S3CR3T", "value: TOKEN  # of Anna"),
    "block with anchor": ("value: &t |\n      S3CR3T", "value: &t TOKEN"),
    "complex key": ("? value\n    : S3CR3T", "? value\n    : TOKEN"),
}
AROUND = """\
# ěšč 🌙 the config of the team\n\n
secrets:   # all of them

  openai-prod:
    type:  openai
    {}
    # base_url: https://example.com

  other:   {{ type: openai ,env: OTHER }}  # {{}}
jobs:   {{}}
# the end"""


@pytest.mark.parametrize("kind", LAYOUTS)
def test_encrypt_keeps_the_layout(kind: str, with_key: Place) -> None:
    """Every byte but those of the value stays, in whatever way the value is written."""
    written, kept = LAYOUTS[kind]
    with_key.config.write_bytes(AROUND.format(written).encode())
    assert encrypt(with_key.config) == 0
    text = with_key.config.read_bytes().decode()
    assert opened(split_token(text, AROUND.format(kept))) == "S3CR3T"
    with_key.env["OTHER"] = "x"
    assert with_key.value() == "S3CR3T"


FLOWS = {
    "braces": ("{type: openai, value: S3CR3T}", "{type: openai, value: TOKEN}"),
    "value first": ("{value: 'S3CR3T',type: openai}", "{value: TOKEN,type: openai}"),
    "JSON": ('{"type":"openai","value":"S3CR3T"}', '{"type":"openai","value":TOKEN}'),
    "lines": (
        "{\n  type: openai,\n  value: S3CR3T # x\n  }",
        "{\n  type: openai,\n  value: TOKEN # x\n  }",
    ),
}


@pytest.mark.parametrize("kind", FLOWS)
def test_encrypt_inside_braces(kind: str, with_key: Place) -> None:
    """A value inside a flow mapping is replaced just the same."""
    written, kept = FLOWS[kind]
    with_key.config.write_text(f"secrets: {{openai-prod: {written}}}\njobs: {{}}", encoding="ascii")
    assert encrypt(with_key.config) == 0
    text = with_key.config.read_text(encoding="ascii")
    assert opened(split_token(text, f"secrets: {{openai-prod: {kept}}}\njobs: {{}}")) == "S3CR3T"
    assert with_key.value() == "S3CR3T"


def test_encrypt_takes_only_plain_values_and_names_them(
    with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens, variables and files are left as they are; the output tells what was done."""
    closed = token("closed")
    text = f"""\
secrets:
  one: {{type: openai, value: S3CR3T-1}}
  two: {{type: openai, value: {closed}}}
  three: {{type: openai, env: S3CR3T}}
  four: {{type: keboola, value: S3CR3T-4, stack_url: https://connection.keboola.com}}
jobs: {{}}
"""
    with_key.config.write_text(text, encoding="ascii")
    assert encrypt(with_key.config) == 0
    assert capsys.readouterr() == ("encrypted: one, four\n", "")
    after = with_key.config.read_text(encoding="ascii").splitlines()
    assert [after[i] for i in (0, 2, 3, 5)] == [text.splitlines()[i] for i in (0, 2, 3, 5)]
    with_key.env["S3CR3T"] = "from-env"
    assert {name: secret.reveal() for name, secret in with_key.load().secrets.items()} == {
        "one": "S3CR3T-1",
        "two": "closed",
        "three": "from-env",
        "four": "S3CR3T-4",
    }


def test_encrypt_twice_does_nothing(with_key: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run finds no plain value and does not even replace the file."""
    with_key.write_config("value: S3CR3T")
    assert encrypt(with_key.config) == 0
    capsys.readouterr()
    before, inode = with_key.config.read_bytes(), with_key.config.stat().st_ino
    assert encrypt(with_key.config) == 0
    assert capsys.readouterr() == ("nothing to do: no value is in plain\n", "")
    assert (with_key.config.read_bytes(), with_key.config.stat().st_ino) == (before, inode)


def test_encrypt_an_alias_and_a_merged_value(with_key: Place) -> None:
    """A value that several secrets share by alias is written once and opens for all of them."""
    with_key.config.write_text(
        """\
secrets:
  openai-prod: &o {type: openai, value: &t S3CR3T}
  alias: {type: openai, value: *t}
  merged: {<<: *o, project: p}
jobs: {}
""",
        encoding="ascii",
    )
    assert encrypt(with_key.config) == 0
    values = [secret.reveal() for secret in with_key.load().secrets.values()]
    assert values == ["S3CR3T"] * 3
    assert "value: *t" in with_key.config.read_text(encoding="ascii")


def test_rotate_closes_everything_under_the_first_key(with_key: Place) -> None:
    """After `encrypt --rotate` the old key can be thrown away."""
    old = token("S3CR3T", OTHER_KEY)
    with_key.write_key(KEY, OTHER_KEY)
    with_key.write_config(f"value: {old}  ")
    assert encrypt(with_key.config) == 0
    assert old in with_key.config.read_text(encoding="ascii")
    assert encrypt(with_key.config, "--rotate") == 0
    assert old not in with_key.config.read_text(encoding="ascii")
    with_key.write_key(KEY)
    assert with_key.value() == "S3CR3T"


def test_rotate_encrypts_plain_values_too(with_key: Place) -> None:
    """One run of `--rotate` leaves nothing in plain."""
    with_key.write_config("value: S3CR3T")
    assert encrypt(with_key.config, "--rotate") == 0
    assert with_key.value() == "S3CR3T"


@pytest.mark.parametrize("options", [(), ("--rotate",)])
def test_encrypt_refuses_a_foreign_token(
    options: tuple[str, ...], with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token of another key is not encrypted a second time, and nothing at all is written."""
    foreign = token("S3CR3T", FOREIGN_KEY)
    with_key.write_config(f"value: {foreign}")
    with with_key.config.open("a", encoding="ascii") as file:
        file.write("x: {}\n")
    before = with_key.config.read_bytes()
    assert encrypt(with_key.config, *options) == 2
    assert capsys.readouterr() == (
        "",
        (
            f"{with_key.config}:2:38: secrets.openai-prod.value: is encrypted with another key; "
            "add that key after the first one\n"
        ),
    )
    assert with_key.config.read_bytes() == before


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ('""', "is empty; write the token"),
        ('"  "', "is empty; write the token"),
        ('"S3CR3T\\nx"', "has characters that are not printable ASCII; write the token"),
        ("S3CR3Tž", "has characters that are not printable ASCII; write the token"),
    ],
)
def test_encrypt_refuses_what_cannot_be_a_token(
    written: str, what: str, with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a start would refuse is told before it is hidden inside a token."""
    with_key.write_config(f"value: {written}")
    before = with_key.config.read_bytes()
    assert encrypt(with_key.config) == 2
    err = capsys.readouterr().err
    assert err == f"{with_key.config}:2:38: secrets.openai-prod.value: {what}\n"
    assert with_key.config.read_bytes() == before


def test_encrypt_while_other_parts_are_unfinished(with_key: Place) -> None:
    """Secrets can be closed first and the jobs written later."""
    with_key.config.write_text(
        """\
nope: 1
limits: {max_concurrency: lots}
secrets:
  openai-prod: {type: open-ai, value: S3CR3T, nope: 2}
  keboola-prod: {value: S3CR3T}
jobs:
  nightly: {batch_ids: [YOUR_ID], mode: x, mode: y}
""",
        encoding="ascii",
    )
    assert encrypt(with_key.config) == 0
    assert "S3CR3T" not in with_key.config.read_text(encoding="ascii")


def test_encrypt_of_a_file_that_is_no_yaml(
    with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the values stand cannot be known, so nothing is written and the place is told."""
    with_key.config.write_text("secrets: [\n", encoding="ascii")
    assert encrypt(with_key.config) == 2
    assert capsys.readouterr().err.startswith(f"{with_key.config}:2:1: is not YAML: ")
    assert with_key.config.read_text(encoding="ascii") == "secrets: [\n"


def test_encrypt_without_a_file(with_key: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong path is the config's own message, exit code 2."""
    assert encrypt(with_key.config) == 2
    assert "cannot be read: No such file or directory" in capsys.readouterr().err


def test_encrypt_without_a_key(with_key: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a key nothing is written; the message has the command that makes one."""
    with_key.key_file.unlink()
    with_key.write_config("value: S3CR3T")
    before = with_key.config.read_bytes()
    assert encrypt(with_key.config) == 2
    err = capsys.readouterr().err
    assert "cannot read the key file" in err
    assert CURE_KEY in err
    assert with_key.config.read_bytes() == before


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664])
def test_encrypt_keeps_the_mode(mode: int, with_key: Place) -> None:
    """A config that a group may edit stays one."""
    with_key.write_config("value: S3CR3T")
    with_key.config.chmod(mode)
    assert encrypt(with_key.config) == 0
    assert stat.S_IMODE(with_key.config.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_encrypt_keeps_the_owner(with_key: Place) -> None:
    """When root encrypts, the service's user can still read its config."""
    with_key.write_config("value: S3CR3T")
    os.chown(with_key.config, 1234, 4321)
    assert encrypt(with_key.config) == 0
    after = with_key.config.stat()
    assert (after.st_uid, after.st_gid) == (1234, 4321)


def test_encrypt_keeps_a_symlink(with_key: Place, tmp_path: Path) -> None:
    """A config that is a link to a file elsewhere stays a link; the file behind it is changed."""
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real.yaml"
    with_key.write_config("value: S3CR3T")
    with_key.config.rename(real)
    with_key.config.symlink_to("elsewhere/real.yaml")
    assert encrypt(with_key.config) == 0
    assert with_key.config.is_symlink()
    assert "S3CR3T" not in real.read_text(encoding="ascii")
    assert with_key.value() == "S3CR3T"
    assert names_in(real.parent) == ["real.yaml"]


def test_encrypt_keeps_windows_line_ends(with_key: Place) -> None:
    """A file whose lines end in CR and LF has no other line ends afterwards."""
    text = "secrets:\r\n  openai-prod:\r\n    type: openai\r\n    value: S3CR3T\r\njobs: {}\r\n"
    with_key.config.write_bytes(text.encode())
    assert encrypt(with_key.config) == 0
    after = with_key.config.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == 5
    assert with_key.value() == "S3CR3T"


def test_encrypt_leaves_no_temporary_file(with_key: Place) -> None:
    """After success only the files that were there are there."""
    with_key.write_config("value: S3CR3T")
    before = names_in(with_key.directory)
    assert encrypt(with_key.config) == 0
    assert names_in(with_key.directory) == before


@pytest.mark.parametrize("step", ["fsync", "fchmod", "replace"])
def test_encrypt_that_fails_changes_nothing(
    step: str,
    with_key: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full disk or a lost permission leaves the old file whole and no temporary one beside it."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with_key.write_config("value: S3CR3T")
    before, names = with_key.config.read_bytes(), names_in(with_key.directory)
    assert encrypt(with_key.config) == 1
    assert capsys.readouterr() == (
        "",
        (
            f"teckochecker: cannot replace {with_key.config}: No space left on device; "
            "run this as the file's owner, with room on the disk\n"
        ),
    )
    assert with_key.config.read_bytes() == before
    assert names_in(with_key.directory) == names


def test_encrypt_does_not_overwrite_a_concurrent_change(
    with_key: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an editor saved between reading and replacing is kept, and the person is told."""
    with_key.write_config("value: S3CR3T")
    fsync = os.fsync

    def save_in_the_editor(fd: int) -> None:
        fsync(fd)
        with_key.config.write_text("jobs: {}  # mine\n", encoding="ascii")

    monkeypatch.setattr(os, "fsync", save_in_the_editor)
    names = names_in(with_key.directory)
    assert encrypt(with_key.config) == 1
    assert capsys.readouterr() == (
        "",
        f"teckochecker: {with_key.config} was changed meanwhile; run the command again\n",
    )
    assert with_key.config.read_text(encoding="ascii") == "jobs: {}  # mine\n"
    assert names_in(with_key.directory) == names


def test_the_new_file_is_never_more_open_than_the_old_one(
    with_key: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is written, the temporary file is its owner's alone."""
    modes: list[int] = []
    fchmod = os.fchmod

    def note_mode(fd: int, mode: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        fchmod(fd, mode)

    with_key.write_config("value: S3CR3T")
    with_key.config.chmod(0o644)
    monkeypatch.setattr(os, "fchmod", note_mode)
    assert encrypt(with_key.config) == 0
    assert modes == [0o600]


def test_encrypt_as_a_process_shows_no_secret(with_key: Place) -> None:
    """Neither output of a real run has the value, and the key is taken from the environment."""
    with_key.key_file.unlink()
    with_key.write_config("value: S3CR3T")
    done = subprocess.run(
        [sys.executable, ROOT / "teckochecker.py", "--config", with_key.config, "encrypt"],
        env={"PATH": os.environ["PATH"], "TECKOCHECKER_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "encrypted: openai-prod\n", "")
    with_key.write_key(KEY)
    assert with_key.value() == "S3CR3T"


# --- encrypt: the edges -------------------------------------------------------------------


def test_encrypt_keeps_a_byte_order_mark(with_key: Place) -> None:
    """A file that begins with a byte order mark is spliced at the right character."""
    with_key.write_config("value: S3CR3T")
    with_key.config.write_bytes(b"\xef\xbb\xbf" + with_key.config.read_bytes())
    assert encrypt(with_key.config) == 0
    assert with_key.config.read_bytes().startswith(b"\xef\xbb\xbfsecrets:")
    assert with_key.value() == "S3CR3T"


def test_encrypt_keeps_windows_line_ends_of_a_block(with_key: Place) -> None:
    """The line of a block scalar, too, ends in CR and LF afterwards."""
    text = "secrets:\n  openai-prod:\n    type: openai\n    value: |\n      S3CR3T\njobs: {}\n"
    with_key.config.write_bytes(text.replace("\n", "\r\n").encode())
    assert encrypt(with_key.config) == 0
    after = with_key.config.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == 5


def test_encrypt_keeps_blank_lines_after_a_block(with_key: Place) -> None:
    """The blank lines between two secrets stay where a block scalar stands before them."""
    text = "secrets:\n  openai-prod:\n    type: openai\n    value: |\n      S3CR3T\n\n\njobs: {}\n"
    with_key.config.write_text(text, encoding="ascii")
    assert encrypt(with_key.config) == 0
    assert with_key.config.read_text(encoding="ascii").endswith("=\n\n\njobs: {}\n")


def test_encrypt_keeps_a_comment_behind_an_anchor(with_key: Place) -> None:
    """A comment between an anchor and its value stays."""
    text = AROUND.format("value: &t # of Anna\n      S3CR3T")
    with_key.config.write_text(text, encoding="utf-8")
    assert encrypt(with_key.config) == 0
    assert "# of Anna" in with_key.config.read_text(encoding="utf-8")
    with_key.env["OTHER"] = "x"
    assert with_key.value() == "S3CR3T"


def test_encrypt_names_a_secret_with_a_dot(
    with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole name is printed, dots and all."""
    with_key.config.write_text("secrets: {a.b: {type: openai, value: S3CR3T}}\n", encoding="ascii")
    assert encrypt(with_key.config) == 0
    assert capsys.readouterr().out == "encrypted: a.b\n"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "2:38: secrets.openai-prod.value: is empty; write the token"),
        ("[S3CR3T]", "2:38: secrets.openai-prod.value: is not a single value; write the token"),
    ],
)
def test_encrypt_tells_each_problem_once(
    written: str, message: str, with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that is no text is one problem, not two."""
    with_key.write_config(f"value: {written}")
    assert encrypt(with_key.config) == 2
    assert capsys.readouterr().err == f"{with_key.config}:{message}\n"


def test_encrypt_tells_of_bad_yaml_before_the_key(
    with_key: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the YAML is broken, key_file is not known, so its absence is not the news."""
    with_key.key_file.rename(with_key.directory / "my.key")
    with_key.config.write_text("key_file: my.key\nsecrets: [\n", encoding="ascii")
    assert encrypt(with_key.config) == 2
    assert "is not YAML" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["secrets:\njobs: {}\n", "secrets: {a: }\n", "jobs: {}\n"])
def test_encrypt_without_values_has_nothing_to_do(text: str, with_key: Place) -> None:
    """Where no value is written there is nothing to encrypt, and no key is needed for it."""
    with_key.key_file.unlink()
    with_key.config.write_text(text, encoding="ascii")
    assert encrypt(with_key.config) == 0


# ---- what servers echo ----


@pytest.mark.parametrize(
    ("written", "is_hidden"),
    [
        (rb"sk-ab\/cdefghij=klmn", True),
        (rb"sk-ab/cdefghij\u003dklmn", True),
        (rb"\u0073k-ab\/cdefghij\u003Dklmn", True),
        (rb"sk-ab\\/cdefghij=klmn", False),  # a backslash and a slash: another text
        (rb"sk-other \u0022 \/", False),
    ],
)
@pytest.mark.parametrize("is_data", [True, False])
def test_a_token_that_json_escapes(written: bytes, *, is_hidden: bool, is_data: bool) -> None:
    """However a server's JSON writes the token, it is masked, and nothing else is changed."""
    redactor = tecko.Redactor()
    redactor.learn([tecko.Secret("sk-ab/cdefghij=klmn")])
    body = b'{"error": "bad key ' + written + rb' \u0022 end"}'
    masked = redactor.body(body, is_data=is_data)
    if is_hidden:
        assert json.loads(masked) == {"error": 'bad key *** " end'}
    else:
        assert masked == body
