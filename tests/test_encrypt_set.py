"""`encrypt --set NAME`: one secret, unseen, into its place, and nothing else changed."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from harness import PROGRAM, Outcome, Terminal, clean_environment, wait_until

import teckochecker as tecko

KEY = Fernet.generate_key().decode()
VALUE = "sk-S3CR3T-typed"


def opened(value: str) -> str:
    return Fernet(KEY).decrypt(value).decode()


def token(value: str) -> str:
    return Fernet(KEY).encrypt(value.encode()).decode()


class Place:
    """A directory with a config and a key, and `encrypt --set` in this process."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = directory / "config.yaml"
        self.key_file = directory / "teckochecker.key"
        self.key_file.write_text(KEY)
        self.key_file.chmod(0o600)
        self._patch = monkeypatch
        for name in (tecko.KEY_VARIABLE, "CREDENTIALS_DIRECTORY", "TECKOCHECKER_CONFIG"):
            monkeypatch.delenv(name, raising=False)

    def write(self, text: str) -> None:
        self.config.write_bytes(text.encode())

    def read(self) -> str:
        return self.config.read_bytes().decode()

    def set(self, name: str, given: bytes = VALUE.encode()) -> int:
        """Run the command with something on standard input; returns its exit code."""
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return tecko.main(["--config", str(self.config), "encrypt", "--set", name])

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(PROGRAM), "--config", str(self.config), "encrypt", *arguments]

    def terminal(self, *arguments: str) -> Terminal:
        return Terminal(self.command(*arguments), self.config.parent, clean_environment())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def new_value(text: str, frame: str) -> str:
    """Return what stands in `text` in the place of TOKEN in `frame`; all else must be equal."""
    before, after = frame.split("TOKEN")
    assert text.startswith(before), text
    assert text.endswith(after), text
    return opened(text[len(before) : len(text) - len(after)])


# --- where it is put ------------------------------------------------------------------------------

AROUND = """\
# ěšč 🌙 the config of the team
secrets:   # all of them

  mine:
    {}
    # base_url: https://example.com

  other:   {{ type: openai ,value: sk-in-plain }}  # {{}}
jobs:   {{}}
# the end"""

LAYOUTS = {
    "plain": ("type: openai\n    value: old", "type: openai\n    value: TOKEN"),
    "empty": ("type: openai\n    value:", "type: openai\n    value: TOKEN"),
    "empty with blanks": ("type: openai\n    value:  ", "type: openai\n    value: TOKEN  "),
    "empty with comment": (
        "type: openai\n    value:   # Anna's",
        "type: openai\n    value: TOKEN   # Anna's",
    ),
    "null": ("type: openai\n    value: null # x", "type: openai\n    value: TOKEN # x"),
    "tilde": ("value: ~\n    type: openai", "value: TOKEN\n    type: openai"),
    "empty quotes": ('type: openai\n    value: ""', "type: openai\n    value: TOKEN"),
    "quotes": ("type: openai\n    value: 'a ''b'  # x", "type: openai\n    value: TOKEN  # x"),
    "placeholder": ("value: YOUR-KEY # x\n    type: openai", "value: TOKEN # x\n    type: openai"),
    "block": (
        "value: |\n      old\n      older\n    type: openai",
        "value: TOKEN\n    type: openai",
    ),
    "folded": ("value: >-\n      old\n    type: openai", "value: TOKEN\n    type: openai"),
    "anchor": ("type: openai\n    value: &t old", "type: openai\n    value: &t TOKEN"),
    "tag": ("type: openai\n    value: !!str old", "type: openai\n    value: !!str TOKEN"),
    "list": ("type: openai\n    value: [a, b]", "type: openai\n    value: TOKEN"),
    "absent": ("type: openai", "type: openai\n    value: TOKEN"),
    "absent with comment": ("type: openai  # x", "type: openai  # x\n    value: TOKEN"),
    "absent, type in quotes": ('"type": "openai"', '"type": "openai"\n    value: TOKEN'),
    "absent, type not last": (
        "type: openai\n    project: proj_a",
        "type: openai\n    value: TOKEN\n    project: proj_a",
    ),
    "absent, type last": (
        "project: proj_a\n    type: openai",
        "project: proj_a\n    type: openai\n    value: TOKEN",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte but those of the value stays, also another secret that is in plain."""
    written, kept = LAYOUTS[kind]
    place.write(AROUND.format(written))
    assert place.set("mine") == 0
    assert new_value(place.read(), AROUND.format(kept)) == VALUE
    assert capsys.readouterr() == ("encrypted: mine\n", "")
    draft = tecko.read_draft(place.config, tecko.Files())
    assert draft.problems == []


FLOWS = {
    "value": ("{type: openai, value: old}", "{type: openai, value: TOKEN}"),
    "absent": ("{type: openai}", "{type: openai, value: TOKEN}"),
    "absent, not last": (
        "{ type: openai , project: proj_a }",
        "{ type: openai, value: TOKEN , project: proj_a }",
    ),
    "JSON": ('{"type":"openai","value":"old"}', '{"type":"openai","value":TOKEN}'),
    "JSON, absent": ('{"type":"openai"}', '{"type":"openai", value: TOKEN}'),
    "empty": ("{value: , type: openai}", "{value:  TOKEN, type: openai}"),
    "lines": (
        "{\n  type: openai,\n  value: old # x\n  }",
        "{\n  type: openai,\n  value: TOKEN # x\n  }",
    ),
    "lines, absent": ("{\n  type: openai\n  }", "{\n  type: openai, value: TOKEN\n  }"),
}


@pytest.mark.parametrize("kind", FLOWS)
def test_in_braces(kind: str, place: Place) -> None:
    """A secret inside a flow mapping takes its value just the same."""
    written, kept = FLOWS[kind]
    place.write(f"secrets: {{mine: {written}}}\njobs: {{}}\n")
    assert place.set("mine") == 0
    assert new_value(place.read(), f"secrets: {{mine: {kept}}}\njobs: {{}}\n") == VALUE


@pytest.mark.parametrize("kind", ["plain", "absent", "absent with comment", "block", "empty"])
def test_windows_files(kind: str, place: Place) -> None:
    """A byte order mark stays, and every line still ends as lines of this file do."""
    written, kept = LAYOUTS[kind]
    text, frame = ("\ufeff" + AROUND.format(form).replace("\n", "\r\n") for form in (written, kept))
    place.write(text)
    assert place.set("mine") == 0
    assert new_value(place.read(), frame) == VALUE


def test_at_the_files_end(place: Place) -> None:
    """A last line without an end is no obstacle."""
    place.write("jobs: {}\nsecrets:\n  mine:\n    type: openai")
    assert place.set("mine") == 0
    assert new_value(
        place.read(), "jobs: {}\nsecrets:\n  mine:\n    type: openai\n    value: TOKEN"
    )


def test_while_other_parts_are_wrong(place: Place) -> None:
    """A config whose jobs are not finished yet takes its secrets already."""
    place.write("secrets:\n  mine: {type: keboola}\njobs: {x: {}}\npolling: 1\n")
    assert place.set("mine", b"  1234-abc \r\n") == 0
    assert "mine: {type: keboola, value: gAAAA" in place.read()


def test_a_value_is_replaced_whoever_closed_it(place: Place) -> None:
    """An expired token makes room for a new one, also where its key is lost."""
    foreign = Fernet(Fernet.generate_key()).encrypt(b"x").decode()
    frame = AROUND.format("type: openai\n    value: TOKEN")
    for old in (token("old"), foreign):
        place.write(frame.replace("TOKEN", old))
        assert place.set("mine") == 0
        assert new_value(place.read(), frame) == VALUE


def test_a_webhook(place: Place) -> None:
    """A webhook's address may have a query, which may be its password."""
    place.write("secrets:\n  mine: {type: webhook}\njobs: {}\n")
    assert place.set("mine", b"https://hooks.example.com/T1?key=S3CR3T") == 0


# --- what is refused ------------------------------------------------------------------------------

GOOD = "secrets:\n  mine:\n    type: {}\n    value: old\njobs: {{}}\n"
OPENAI, WEBHOOK = GOOD.format("openai"), GOOD.format("webhook")
NO_PLACE = "mine: with type: and value: of its own, each on its own line"
REFUSED: dict[str, tuple[str, str, bytes, str]] = {
    "nothing": (OPENAI, "mine", b"", "what was given for mine is empty; nothing is changed"),
    "blanks": (OPENAI, "mine", b" \n\n", "what was given for mine is empty; nothing is changed"),
    "two lines": (OPENAI, "mine", b"S3CR3T\nb", "characters that are not printable ASCII"),
    "not ASCII": (OPENAI, "mine", "S3CR3Tě".encode(), "characters that are not printable ASCII"),
    "not UTF-8": (OPENAI, "mine", b"S3CR3T\xff", "characters that are not printable ASCII"),
    "too long": (OPENAI, "mine", b"S3CR3T" * 11_000, "what was given for mine is over 64 KiB"),
    "not https": (WEBHOOK, "mine", b"http://S3CR3T.example.com/", "given for mine is not https"),
    "no address": (WEBHOOK, "mine", b"S3CR3T", "what was given for mine is not an address"),
    "unknown": (OPENAI, "yours", b"S3CR3T", 'has no secret "yours" under secrets; write it there'),
    "no name": (OPENAI, "", b"S3CR3T", 'has no secret "" under secrets'),
    "no type": (
        OPENAI.replace("type", "kind"),
        "mine",
        b"S3CR3T",
        'has no secret "mine" under secrets; write it there with its type',
    ),
    "from the environment": (
        OPENAI.replace("value", "env"),
        "mine",
        b"S3CR3T",
        "the secret mine has env:; take env: out first",
    ),
    "from a file": (
        OPENAI.replace("value", "file"),
        "mine",
        b"S3CR3T",
        "the secret mine has file:; take file: out first",
    ),
    "twice": (
        OPENAI.replace("jobs", "    value: x\njobs"),
        "mine",
        b"S3CR3T",
        "stands here and in",
    ),
    "no YAML": ("jobs: [\n", "mine", b"S3CR3T", "is not YAML"),
    "an alias": (
        "secrets:\n  b: {type: openai, value: &t old}\n  mine: {type: openai, value: *t}\n",
        "mine",
        b"S3CR3T",
        NO_PLACE,
    ),
    "merged": (
        "secrets:\n  other: &t {type: openai, value: old}\n  mine: {<<: *t}\njobs: {}\n",
        "mine",
        b"S3CR3T",
        NO_PLACE,
    ),
    "its type is merged": (
        "secrets:\n  other: &t {type: openai}\n  mine:\n    <<: *t\njobs: {}\n",
        "mine",
        b"S3CR3T",
        NO_PLACE,
    ),
    "braces with a comment": (
        "secrets:\n  mine: {\n    type: openai # x\n    }\njobs: {}\n",
        "mine",
        b"S3CR3T",
        NO_PLACE,
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says why, without what was given; the file stays as it is, byte for byte."""
    text, name, given, expected = REFUSED[kind]
    place.write(text)
    code = place.set(name, given)
    out, err = capsys.readouterr()
    assert expected in err
    assert (code, out, err.count("\n")) == (1 if expected == NO_PLACE else 2, "", 1)
    assert "S3CR3T" not in err
    assert place.read() == text


def test_it_needs_a_key(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a key nothing is asked for."""
    place.write(OPENAI)
    place.key_file.unlink()
    assert place.set("mine") == 2
    assert "cannot read the key file" in capsys.readouterr().err


def test_not_with_rotate(place: Place) -> None:
    """It is one or the other."""
    place.write(OPENAI)
    with pytest.raises(SystemExit) as ended:
        tecko.main(["--config", str(place.config), "encrypt", "--rotate", "--set", "mine"])
    assert ended.value.code == 2


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_mode_and_link_stay(mode: int, place: Place, tmp_path: Path) -> None:
    """The file keeps its mode, and a link to it stays a link; nothing else is left behind."""
    real = tmp_path / "real" / "team.yaml"
    real.parent.mkdir()
    real.write_text(OPENAI)
    real.chmod(mode)
    place.config.symlink_to(real)
    assert place.set("mine") == 0
    assert place.config.is_symlink()
    assert real.stat().st_mode & 0o7777 == mode
    assert [path.name for path in real.parent.iterdir()] == ["team.yaml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_stays(place: Place) -> None:
    """What root sets in somebody's file stays theirs."""
    place.write(OPENAI)
    os.chown(place.config, 12345, 23456)
    assert place.set("mine") == 0
    status = place.config.stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


# --- as a process ---------------------------------------------------------------------------------


def run(place: Place, shell: str) -> Outcome:
    """Run a shell's line, in which CMD stands for the command."""
    line = shell.replace("CMD", shlex.join(place.command("--set", "mine")))
    done = subprocess.run(
        ["bash", "-c", line],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_from_a_pipe(place: Place) -> None:
    """It comes over standard input, and nothing is asked."""
    place.write(OPENAI)
    done = run(place, f"echo {VALUE} | CMD")
    assert (done.code, done.stdout, done.stderr) == (0, "encrypted: mine\n", "")
    assert new_value(place.read(), OPENAI.replace("old", "TOKEN")) == VALUE


@pytest.mark.parametrize("closed", ["CMD <&-", "CMD </dev/null"])
def test_without_standard_input(closed: str, place: Place) -> None:
    """Where there is nothing to read, that is said in one line."""
    place.write(OPENAI)
    done = run(place, closed)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == ("teckochecker: what was given for mine is empty; nothing is changed\n")


def test_hidden_on_a_terminal(place: Place) -> None:
    """On a terminal it is asked for by name, and what is typed is never shown."""
    place.write(OPENAI)
    terminal = place.terminal("--set", "mine")
    terminal.wait_for("mine: ")
    assert not terminal.echoes()
    terminal.type(f"{VALUE}\n")
    terminal.wait_for("encrypted: mine")
    assert terminal.echoes()
    assert terminal.wait() == 0
    assert terminal.text.split() == ["mine:", "encrypted:", "mine"]
    assert new_value(place.read(), OPENAI.replace("old", "TOKEN")) == VALUE


@pytest.mark.parametrize(
    ("key", "code", "told"),
    [
        ("\x03", 130, ""),
        ("\x04", 2, "teckochecker: what was given for mine is empty; nothing is changed"),
        ("\n", 2, "teckochecker: what was given for mine is empty; nothing is changed"),
    ],
    ids=["Ctrl-C", "Ctrl-D", "Enter"],
)
def test_given_up_on_a_terminal(key: str, code: int, told: str, place: Place) -> None:
    """Who gives up has changed nothing, and the terminal shows again what is typed."""
    place.write(OPENAI)
    terminal = place.terminal("--set", "mine")
    terminal.wait_for("mine: ")
    terminal.type(key)
    wait_until(terminal.echoes, "echo")
    assert terminal.wait() == code
    assert "Traceback" not in terminal.text
    assert told in terminal.text
    assert place.read() == OPENAI
