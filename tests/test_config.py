"""The config: what is refused, in which words and at which place, and what a good file means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import teckochecker as tecko

ROOT = Path(tecko.__file__).resolve().parent
DATA = Path(__file__).resolve().parent / "data"
BAD_FILES = sorted(path.name for path in DATA.glob("*.yaml"))
assert len(BAD_FILES) > 90  # the table of bad files has not silently become short
ENV = {"TECKOCHECKER_KEY": "A" * 43 + "=", "OPENAI": "sk-SECRET123", "KEBOOLA": "123-SECRET123"}
EXPECT = "# expect: "  # the messages of a bad file, in order, without its name, at its end

SECRETS = """\
secrets:
  openai-prod: {type: openai, env: OPENAI}
  keboola-prod: {type: keboola, env: KEBOOLA, stack_url: https://connection.keboola.com}
"""
GOOD = f"""\
{SECRETS}\
defaults:
  openai_secret: openai-prod
  keboola_secret: keboola-prod
  component_id: kds-team.app-custom-python
  config_id: "123456"
"""


def messages(text: str) -> list[str]:
    """Return what is wrong with a config's text, without the file's name."""
    _, problems = tecko.parse_config(text, Path("c.yaml"))
    return str(tecko.ConfigError(problems)).replace("c.yaml:", "").splitlines()


def parsed(text: str) -> tecko.Config:
    """Return what a good config's text says."""
    config, problems = tecko.parse_config(text, Path("c.yaml"))
    assert list(map(str, problems)) == []
    return config


def job_with(lines: str, defaults: str = "") -> tecko.Job:
    """Return the only job of a config that has `lines`, with batch ids if they find none."""
    ids = "" if "match:" in lines or "batch_ids:" in lines else "    batch_ids: [batch_a]\n"
    text = "".join(f"    {line}\n" for line in lines.splitlines())
    return parsed(f"{GOOD}{defaults}jobs:\n  nightly:\n{ids}{text}").jobs["nightly"]


def refusal(path: Path) -> str:
    """Return what a start says to a config that it refuses."""
    with pytest.raises(tecko.ConfigError) as refused:
        tecko.load_config(path, tecko.Files(), ENV, tecko.Redactor())
    return str(refused.value)


def expected(name: str) -> list[str]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [f"{name}:{line.removeprefix(EXPECT)}" for line in lines if line.startswith(EXPECT)]


@pytest.fixture
def in_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the directory of the bad files, with the environment that they are written for."""
    monkeypatch.chdir(DATA)
    for name in ("TECKOCHECKER_KEY", "CREDENTIALS_DIRECTORY", "TECKOCHECKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_data")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` tells every mistake of a file at once, in order, with place and cure; no token."""
    assert expected(name), f"{name} ends without `{EXPECT}` lines"
    assert refusal(Path(name)).splitlines() == expected(name)
    assert tecko.main(["--config", name, "check"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", expected(name))
    assert all(re.fullmatch(r".+:\d+:\d+: .+; .+", line) for line in err.splitlines())
    assert "SECRET123" not in err


EMPTY = "1:1: is empty; write secrets:, jobs: and so on; `teckochecker init` makes a first one"
MEND = "mend the YAML here or just above: indentation (no tabs), quotes, brackets"
PLAIN = "a config is plain text: remove it"
BYTES = {
    "empty": (b"", EMPTY),
    "white space": (b" \n\n \r\n", EMPTY),
    "only a byte order mark": (b"\xef\xbb\xbf", EMPTY),
    "a program": (b"\x7fELF\x02\x01", f"1:1: has the control character 0x7f; {PLAIN}"),
    "a bell": (b"jobs: {}\nstate: a\x07b\n", f"2:9: has the control character 0x07; {PLAIN}"),
    "a late bell": ("a: čř\x07b".encode(), f"1:6: has the control character 0x07; {PLAIN}"),
    "Latin-1": (b"jobs:\n  caf\xe9: {}\n", "2:6: is not UTF-8 text; save it as UTF-8"),
    "UTF-16": ("jobs: {}\n".encode("utf-16"), "1:1: is not UTF-8 text; save it as UTF-8"),
    "zeros": ("jobs".encode("utf-16-le"), f"1:2: has the control character 0x00; {PLAIN}"),
    "a surrogate": (b"state: \xed\xa0\x80\n", "1:8: is not UTF-8 text; save it as UTF-8"),
    "16 MiB": (b"#".ljust(tecko.MAX_FILE_BYTES), EMPTY),
    "one byte more": (
        b"#".ljust(tecko.MAX_FILE_BYTES + 1),
        "1:1: is over 16 MiB; a config is smaller: check the path",
    ),
    "a cut-off sequence": (
        b"jobs: [batch_a,",
        f"2:1: is not YAML: while parsing a flow node did not find expected node content; {MEND}",
    ),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_config(kind: str, tmp_path: Path) -> None:
    """A file that an editor would not show as text is refused as a whole, in one line."""
    data, message = BYTES[kind]
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    assert refusal(path) == f"{path}:{message}"


NO_FILES = {"missing": "No such file or directory", "directory": "Is a directory"}
NO_FILES["pipe"] = "Not a regular file"


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_path_that_is_no_file(kind: str, tmp_path: Path) -> None:
    """A wrong path is told like any other mistake; a pipe without a writer is not waited for."""
    path = tmp_path / "c.yaml"
    make: dict[str, Callable[[Path], object]] = {"directory": os.mkdir, "pipe": os.mkfifo}
    make.get(kind, str)(path)
    cure = "check the path, pass --config PATH, or run `teckochecker init` for a first one"
    assert refusal(path) == f"{path}:1:1: cannot be read: {NO_FILES[kind]}; {cure}"


@pytest.mark.parametrize("opening", ["[", "{", "- ", "? "])
def test_thirty_thousand_levels_do_not_crash_the_process(opening: str) -> None:
    """Nesting that would overflow libyaml's stack is refused before it gets there."""
    code = f"""
import pathlib, teckochecker
print(*teckochecker.parse_config({opening!r} * 30000, pathlib.Path("c.yaml"))[1])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"c\.yaml:1:\d+: (nests deeper|.* maximum nesting depth).*; .*\n", done.stdout
    )


def test_64_levels_are_allowed() -> None:
    """The limit of nesting is where it is said to be."""
    levels = 64 - 4  # above stand the file, jobs, the job and its variables
    job = job_with(f"variables:\n  deep: {'[' * levels}{']' * levels}")
    assert dict(job.variables)["deep"] == "[" * levels + "]" * levels
    with pytest.raises(AssertionError, match="nests deeper than 64"):
        job_with(f"variables:\n  deep: {'[' * (levels + 1)}{']' * (levels + 1)}")


def test_a_million_values_are_too_many() -> None:
    """Values that cost more memory than a config ever needs are refused, also by alias."""
    cure = "there are too many values from here on; split it up"
    assert re.fullmatch(rf"1:\d+: {cure}", messages(f"x: [{'[],' * 1_000_001}]")[0])
    text = f"x: &x [{'1,' * 2000}]\ny: [{'*x,' * 600}]"
    assert re.fullmatch(rf"2:\d+: {cure}", messages(text)[0])


def test_what_could_be_read_stays() -> None:
    """With mistakes the state file, the good jobs and secrets are still known, for `status`."""
    bad = SECRETS.replace("secrets:\n", "secrets:\n  x: {}\n") + GOOD.removeprefix(SECRETS)
    text = f"state: var/my.db\n{bad}jobs:\n  a: {{batch_ids: [batch_a]}}\n  b: {{batch_ids: []}}\n"
    config, problems = tecko.parse_config(text, Path("/etc/tecko/c.yaml"))
    assert [problem.path for problem in problems] == ["secrets.x"] * 2 + ["jobs.b.batch_ids"]
    assert config.state_path == Path("/etc/tecko/var/my.db")
    assert (list(config.jobs), list(config.secrets)) == (["a"], ["openai-prod", "keboola-prod"])


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("state: /var/lib/tecko/my.db", "/var/lib/tecko/my.db"),
        ('state: "my.db"   # here', "/etc/my.db"),
        ("# nothing", "/etc/teckochecker.db"),
    ],
)
def test_a_file_that_is_no_yaml_still_tells_its_state_file(line: str, path: str) -> None:
    """`status` works while someone is in the middle of an edit."""
    config, problems = tecko.parse_config(f"{line}\njobs: [", Path("/etc/c.yaml"))
    assert (config.state_path, len(problems)) == (Path(path), 1)


# --- what a good file means -----------------------------------------------------------------------


def test_defaults_of_the_program() -> None:
    """A config with the least keys gets what the documentation promises."""
    config = parsed(GOOD + "jobs:\n  nightly: {batch_ids: [batch_a]}\n")
    assert (str(config.state_path), str(config.key_path)) == ("teckochecker.db", "teckochecker.key")
    assert (config.log_level, config.log_format, config.retention) == ("info", "auto", 30 * 86400)
    assert (config.max_concurrency, config.request_timeout) == (10, 30)
    assert (config.trigger_grace, config.follow_interval, config.notify) == (60, 30, ())
    assert config.secrets["openai-prod"].base_url == "https://api.openai.com/v1"
    job = config.jobs["nightly"]
    names = ("openai-prod", "keboola-prod", "kds-team.app-custom-python", "123456")
    assert job == tecko.Job("nightly", *names, ("batch_a",))
    assert (job.mode, job.poll_interval, job.settle) == ("run", 30, 900)
    assert (job.trigger_on, job.on_deadline, job.deadline) == ("all_terminal", "alert", None)
    assert (job.follow, job.retry_on_error, job.paused, job.done) == (True, 0, False, False)


EVERY_KEY = """\
state: /srv/tecko.db
key_file: keys/tecko.key
publish: www
log: {level: debug, format: json, retention: 7d}
limits: {max_concurrency: 3, request_timeout: 5s, trigger_grace: 90s, follow_interval: 1m}
secrets:
  o: {type: openai, file: o.txt, base_url: http://localhost:8080/v1/, organization: org-1,
      project: proj_1, auth_header: api-key, api_version: 2025-04-01-preview}
  k: {type: keboola, value: gAAAA, stack_url: https://connection.keboola.com/}
  w: {type: webhook, value: gAAAA}
notify:
  - {secret: w, events: [finished, job_failed]}
  - {secret: w}
defaults: {openai_secret: o, keboola_secret: k, component_id: c}
jobs:
  j: {batch_ids: [batch_b, emb-1.2=], config_id: "1", branch_id: "2", config_row_ids: ["3", "4"],
      mode: forceRun, variables: {dataset: products}, poll_interval: 1h30m, paused: true,
      done: true, trigger_on: any_output, deadline: 26h, on_deadline: start, follow: false}
  found: {match: {pipeline: nightly, n: "1"}, since: 2026-11-25, group_by: run_date, settle: 5m,
      config_id: "5", retry_on_error: 2}
  sized: {match: {a: b}, since: "2026-11-25T06:00:00+01:00", group_by: d, group_size: metadata.n,
      config_id: "6"}
"""


def test_every_key_is_read() -> None:
    """No key is accepted and then forgotten."""
    config = parsed(EVERY_KEY)
    assert (config.state_path, config.key_path) == (Path("/srv/tecko.db"), Path("keys/tecko.key"))
    assert (config.publish_path, config.key_line, config.key_column) == (Path("www"), 2, 11)
    assert (config.log_level, config.log_format, config.retention) == ("debug", "json", 604800)
    assert (config.max_concurrency, config.request_timeout) == (3, 5)
    assert (config.trigger_grace, config.follow_interval) == (90, 60)
    assert config.notify == (("w", ("finished", "job_failed")), ("w", ("attention",)))
    openai = {f.name: getattr(config.secrets["o"], f.name) for f in fields(tecko.SecretEntry)}
    assert openai.pop("text").reveal() == "o.txt"
    assert openai == {
        "name": "o", "type": "openai", "source": "file", "line": 7, "column": 27, "stack_url": "",
        "base_url": "http://localhost:8080/v1", "organization": "org-1", "project": "proj_1",
        "auth_header": "api-key", "api_version": "2025-04-01-preview",
    }  # fmt: skip
    assert config.secrets["k"].stack_url == "https://connection.keboola.com"
    job = config.jobs["j"]
    assert job == tecko.Job(
        "j", "o", "k", "c", "1", ("batch_b", "emb-1.2="), branch_id="2", config_row_ids=("3", "4"),
        mode="forceRun", variables=(("dataset", "products"),), poll_interval=5400, paused=True,
        done=True, trigger_on="any_output", deadline=93600, on_deadline="start", follow=False,
    )  # fmt: skip
    assert config.jobs["found"] == tecko.Job(
        "found", "o", "k", "c", "5", match=(("pipeline", "nightly"), ("n", "1")),
        since=1795564800.0, group_by="run_date", settle=300, retry_on_error=2,
    )  # fmt: skip
    assert config.jobs["sized"].group_size == "metadata.n"
    assert config.jobs["sized"].since == 1795564800.0 + 5 * 3600
    assert config.target(job) == tecko.Target("https://connection.keboola.com", "c", "1", "2")


@pytest.mark.parametrize(
    "written", ["0123", "12:30", "1e3", "0x10", "2024-01-01", "yes", "夜間 🌙"]
)
def test_bare_ids_names_and_variables_stay_as_written(written: str) -> None:
    """YAML's ideas about numbers, dates and truth reach neither names, ids nor Keboola."""
    assert job_with(f"variables: {{v: {written}}}").variables == (("v", written),)
    text = f"{GOOD}jobs:\n  {written}: {{batch_ids: [batch_a]}}\n"
    assert list(parsed(text).jobs) == [written]
    if ":" not in written and written.isascii():
        job = job_with(f"branch_id: {written}\nconfig_row_ids: [{written}]\nbatch_ids: [batch_a]")
        assert (job.branch_id, job.config_row_ids) == (written, (written,))


VARIABLES = {
    "[a, b]": '["a","b"]',
    "[1, -2.5, 0123, 12:30, 0x10, 1e3]": '[1,-2.5,"0123","12:30","0x10","1e3"]',
    "[12345678901234567890, 1.0e+400, .inf]": '["12345678901234567890","1.0e+400",".inf"]',
    "[true, no, On, null, ~]": "[true,false,true,null,null]",
    "{region: eu, top: {n: 3}, none: }": '{"region":"eu","top":{"n":3},"none":null}',
    "[]": "[]",
    "{}": "{}",
    "[č, '1', \"a\\nb\"]": '["\\u010d","1","a\\nb"]',
    "čeština": "čeština",
    '" both "': "both",
    "|\n    two\n    lines\n": "two\nlines",
}


@pytest.mark.parametrize("written", VARIABLES)
def test_variables_become_text(written: str) -> None:
    """Lists and mappings travel as compact JSON, everything else as its text."""
    ((_, value),) = job_with(f"variables:\n  v: {written}").variables
    assert value == VARIABLES[written]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30s", 30), ("1h30m", 5400), ("90m", 5400), ("1d", 86400), ("007", 7), ('" 45s "', 45)],
)
def test_durations(written: str, seconds: int) -> None:
    """Durations are numbers with units, largest first, or whole seconds."""
    assert job_with(f"poll_interval: {written}").poll_interval == seconds


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "On", "false", "no", "off", "OFF"])
def test_booleans(word: str) -> None:
    """All the words for true and false that YAML 1.1 knows are understood."""
    assert job_with(f"paused: {word}").paused is (word.lower() in {"true", "yes", "on"})


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.8.8.8:80", "http://[::1]:8080"])
def test_http_is_for_loopback_only(url: str) -> None:
    """Tests and local servers may do without TLS, and then without the long grace too."""
    limits, secret = "limits: {trigger_grace: 1s}", f'{{type: keboola, env: K, stack_url: "{url}"}}'
    config = parsed(f"{limits}\nsecrets: {{k: {secret}}}\njobs: {{}}\n")
    assert (config.secrets["k"].stack_url, config.trigger_grace) == (url, 1)


def test_what_defaults_cannot_bring_together_is_refused() -> None:
    """Of two keys that exclude each other none is dropped silently where both are in defaults."""
    defaults = "  group_by: day\n  group_size: 3\n  settle: 5m\n  follow: no\n  retry_on_error: 1\n"
    job = "jobs:\n  nightly: {match: {a: b}, since: 2026-11-25}\n"
    assert messages(GOOD + defaults + job) == [
        "11:3: defaults.settle: settle beside group_size; keep one of them",
        "13:3: defaults.retry_on_error: retry_on_error beside follow: false; keep one of them",
    ]


def test_optional_parts_may_be_null() -> None:
    """A part whose keys are all commented out counts as not there, `jobs` too."""
    config = parsed("state:\nkey_file:\npublish:\nlog:\nlimits:\nsecrets:\nnotify:\njobs:\n")
    paths = (Path("c.yaml"), config.sha256, Path("teckochecker.db"), Path("teckochecker.key"))
    assert config == tecko.Config(*paths, key_line=2, key_column=10)


def test_aliases() -> None:
    """What an anchor names can stand elsewhere too; there is no merging of mappings."""
    jobs = parsed(f"""{GOOD}jobs:
  first: {{batch_ids: &ids [batch_a, batch_b], variables: &v {{a: 1, b: 2}}}}
  second: {{batch_ids: *ids, variables: *v}}
""").jobs
    assert jobs["second"].batch_ids == ("batch_a", "batch_b")
    assert jobs["second"].variables == (("a", "1"), ("b", "2"))


@pytest.mark.parametrize("prefix", ["", "\ufeff", "---\n", "%YAML 1.1\n---\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks(prefix: str, newline: str) -> None:
    """What editors on other systems do to a file changes neither its meaning nor its places."""
    text = f"{prefix}{GOOD}jobs:\n  nightly:\n    batch_ids:\n    - batch_a\n"
    assert parsed(text.replace("\n", newline)).jobs["nightly"].batch_ids == ("batch_a",)
    (message,) = messages(text.replace("- batch_a", "- a/b").replace("\n", newline))
    assert message.startswith(f"{12 + prefix.count(chr(10))}:7: jobs.nightly.batch_ids[0]: ")


def test_json_is_a_config_too() -> None:
    """A config that a program wrote as JSON loads as it is."""
    data = yaml.safe_load(EVERY_KEY.replace("2026-11-25,", '"2026-11-25",'))
    for indent in (None, 2, "\t"):
        assert parsed(json.dumps(data, indent=indent)).jobs == parsed(EVERY_KEY).jobs


def test_ten_thousand_jobs_with_aliases_are_no_bomb() -> None:
    """A large, honest config gives every job, with its own ids and those of its defaults."""
    line = "  job-{0}: {{variables: *v, batch_ids: [batch_{0}a, batch_{0}b], config_id: {0:06}}}\n"
    defaults = f"{GOOD}  variables: &v {{a: 1, b: 2}}\n"
    jobs = parsed(f"{defaults}jobs:\n" + "".join(map(line.format, range(10_000)))).jobs.values()
    ids = [(job.config_id, job.batch_ids) for job in jobs]
    assert ids == [(f"{i:06}", (f"batch_{i}a", f"batch_{i}b")) for i in range(10_000)]
    assert {job.component_id for job in jobs} == {"kds-team.app-custom-python"}


def test_the_pure_python_loader_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libyaml the config, its places and its refusals are the same."""
    bad = (f"{GOOD}jobs:\n  nightly: {{batch_ids: [], nope: 1}}\n", "- " * 30_000, "a: \x07")
    before = parsed(EVERY_KEY), [messages(text) for text in bad]
    monkeypatch.setattr(tecko, "_LOADER", yaml.SafeLoader)
    assert (parsed(EVERY_KEY), [messages(text) for text in bad]) == before
