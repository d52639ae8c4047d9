"""The config: what is refused, in which words and at which place, and what a good file means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import teckochecker as tecko

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
BAD_FILES = sorted(path.name for path in DATA.glob("*.yaml"))
KEY = "A" * 43 + "="
ENV = {"TECKOCHECKER_KEY": KEY, "OPENAI": "sk-SECRET123", "KEBOOLA": "123-SECRET123"}
EXPECT = "# expect: "  # the messages of a bad file, in order, without its name, at its end

SECRETS = """\
secrets:
  openai-prod: {type: openai, env: OPENAI}
  keboola-prod: {type: keboola, env: KEBOOLA, stack_url: https://connection.keboola.com}
"""
DEFAULTS = """\
defaults: &defaults
  openai_secret: openai-prod
  keboola_secret: keboola-prod
  component_id: kds-team.app-custom-python
  config_id: "123456"
"""
GOOD = SECRETS + DEFAULTS


def messages(text: str) -> list[str]:
    """Return what is wrong with a config's text, without the file's name."""
    problems = tecko.parse_config(text, Path("c.yaml")).problems
    return [str(problem).removeprefix("c.yaml:") for problem in problems]


def parsed(text: str) -> tecko.Config:
    """Return what a good config's text says."""
    draft = tecko.parse_config(text, Path("c.yaml"))
    assert list(map(str, draft.problems)) == []
    return draft.config


def job_with(lines: str) -> tecko.Job:
    """Return the only job of a config that has `lines` beside the ids of its batches."""
    head = f"{GOOD}jobs:\n  nightly:\n    batch_ids: [batch_a]\n"
    return parsed(head + "".join(f"    {line}\n" for line in lines.splitlines())).jobs["nightly"]


def refusal(path: Path) -> str:
    """Return what a start says to a config that it refuses."""
    with pytest.raises(tecko.ConfigError) as refused:
        tecko.load_setup(path, tecko.Files(), ENV, tecko.Redactor())
    return str(refused.value)


def expected(name: str) -> list[str]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [f"{name}:{line.removeprefix(EXPECT)}" for line in lines if line.startswith(EXPECT)]


@pytest.fixture
def in_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in tests/data with the environment that its files are written for."""
    monkeypatch.chdir(DATA)
    for name in (tecko.KEY_VARIABLE, "CREDENTIALS_DIRECTORY", "TECKOCHECKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_data")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_gives_exactly_its_messages(name: str) -> None:
    """Every mistake in a file is told at once, in order, at its place and with its cure."""
    assert expected(name), f"{name} ends without `{EXPECT}` lines"
    assert refusal(Path(name)).splitlines() == expected(name)


@pytest.mark.usefixtures("in_data")
@pytest.mark.parametrize("name", BAD_FILES)
def test_check_of_a_bad_file_exits_2_and_shows_no_secret(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` turns every bad file into one line a problem and exit code 2, and echoes no token."""
    assert tecko.main(["--config", name, "check"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for line in err.splitlines():
        assert re.fullmatch(r".+:\d+:\d+: .+; .+", line)
    assert "SECRET123" not in out + err


@pytest.mark.parametrize(
    "name",
    [
        "alias-bomb.yaml",
        "many-errors-in-the-environment.yaml",
        "many-errors.yaml",
        "secret-not-a-mapping.yaml",
        "tag-python-object.yaml",
        "yaml-recursive-alias.yaml",
    ],
)
def test_check_as_a_process(name: str) -> None:
    """A real process, too, ends with the file's messages, exit code 2 and no traceback."""
    done = subprocess.run(
        [sys.executable, ROOT / "teckochecker.py", "--config", name, "check"],
        cwd=DATA,
        env={"PATH": os.environ["PATH"], **ENV},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == expected(name)


def test_there_are_files_for_every_kind_of_mistake() -> None:
    """The table above has not silently become empty."""
    assert len(BAD_FILES) >= 80


BYTES = {
    "empty": (b"", "1:1: the file is empty; write a config; see config.example.yaml"),
    "white space": (
        b" \n\n\t\r\n",
        "1:1: the file is empty; write a config; see config.example.yaml",
    ),
    "only a byte order mark": (
        b"\xef\xbb\xbf",
        "1:1: the file is empty; write a config; see config.example.yaml",
    ),
    "a program": (
        b"\x7fELF\x02\x01\x01\x00\x00",
        "1:1: has the control character 0x7f; a config is plain text: take it out",
    ),
    "a control character": (
        b"jobs: {}\nstate: a\x07b\n",
        "2:9: has the control character 0x07; a config is plain text: take it out",
    ),
    "Latin-1": (b"jobs:\n  caf\xe9: {}\n", "2:6: is not UTF-8 text; save it as UTF-8"),
    "UTF-16 with a byte order mark": (
        "jobs: {}\n".encode("utf-16"),
        "1:1: is not UTF-8 text; save it as UTF-8",
    ),
    "UTF-16 without one": (
        "jobs: {}\n".encode("utf-16-le"),
        "1:2: has the control character 0x00; a config is plain text: take it out",
    ),
    "an encoded surrogate": (b"state: \xed\xa0\x80\n", "1:8: is not UTF-8 text; save it as UTF-8"),
    "over 16 MiB": (
        b"# " + b"x" * (16 * 1024 * 1024 - 1),
        "1:1: is over 16 MiB; a config is smaller: check the path",
    ),
    "a cut-off sequence": (
        b"jobs: [batch_a,",
        (
            "2:1: is not YAML: while parsing a flow node did not find expected node content; "
            "mend the YAML here or just above: indentation (no tabs), quotes, brackets"
        ),
    ),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_config(kind: str, tmp_path: Path) -> None:
    """A file that an editor would not show as text is refused as a whole, in one line."""
    data, message = BYTES[kind]
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    assert refusal(path) == f"{path}:{message}"


def test_a_file_of_exactly_16_mib_is_read(tmp_path: Path) -> None:
    """The limit itself is still allowed."""
    path = tmp_path / "c.yaml"
    text = "jobs: {}\n#"
    path.write_text(text + "x" * (tecko.MAX_FILE_BYTES - len(text)), encoding="ascii")
    tecko.load_setup(path, tecko.Files(), ENV, tecko.Redactor())


@pytest.mark.parametrize(
    ("name", "why"),
    [("no-such.yaml", "No such file or directory"), ("a-directory", "Is a directory")],
)
def test_a_path_that_is_no_file(name: str, why: str, tmp_path: Path) -> None:
    """A wrong path is told like any other mistake, and says how to give the right one."""
    (tmp_path / "a-directory").mkdir()
    path = tmp_path / name
    cure = "check the path, or pass --config PATH"
    assert refusal(path) == f"{path}:1:1: cannot be read: {why}; {cure}"


def test_a_named_pipe_does_not_hold_the_program(tmp_path: Path) -> None:
    """A config that is a pipe without a writer is refused instead of waited for."""
    path = tmp_path / "c.yaml"
    os.mkfifo(path)
    cure = "check the path, or pass --config PATH"
    assert refusal(path) == f"{path}:1:1: cannot be read: Not a regular file; {cure}"


NESTED = {  # where libyaml has a limit of its own, it is met further on
    "brackets": ("[", r"1:\d+: nests deeper than 64; flatten it"),
    "braces": ("{", r"1:\d+: nests deeper than 64; flatten it"),
    "dashes": ("- ", "1:129: nests deeper than 64; flatten it"),
    "question marks": ("? ", "1:129: nests deeper than 64; flatten it"),
}


@pytest.mark.parametrize("kind", NESTED)
def test_thirty_thousand_levels_do_not_crash_the_process(kind: str) -> None:
    """Nesting that would overflow libyaml's stack is refused before it gets there."""
    opening, message = NESTED[kind]
    code = f"""
import pathlib, teckochecker
for problem in teckochecker.parse_config({opening!r} * 30000, pathlib.Path("c.yaml")).problems:
    print(problem)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"c\.yaml:{message}\n", done.stdout)


def test_64_levels_are_allowed() -> None:
    """The limit of nesting is where it is said to be."""
    levels = tecko.MAX_DEPTH - 4  # above stand the file, jobs, the job and its variables
    job = job_with(f"variables:\n  deep: {'[' * levels}{']' * levels}")
    assert dict(job.variables)["deep"] == "[" * levels + "]" * levels
    with pytest.raises(AssertionError, match="nests deeper than 64"):
        job_with(f"variables:\n  deep: {'[' * (levels + 1)}{']' * (levels + 1)}")


def test_a_name_of_the_file_that_is_a_path_stays_as_given() -> None:
    """Messages name the file as the person did, so that an editor can jump there."""
    draft = tecko.parse_config("jobs: 1\n", Path("../etc/my config.yaml"))
    assert str(draft.problems[0]).startswith("../etc/my config.yaml:1:7: jobs: ")


def test_problems_stand_in_order_of_the_file() -> None:
    """Problems of the environment are sorted in among those of the text."""
    refused = tecko.ConfigError(
        [
            tecko.Problem("c", tecko.Place(2, 1), "b", "is bad", "mend it"),
            tecko.Problem("c", tecko.Place(1, 9), "a", "is bad", "mend it"),
            tecko.Problem("c", tecko.Place(10, 1), "c", "is bad", "mend it"),
        ]
    )
    assert str(refused).splitlines() == [
        "c:1:9: a: is bad; mend it",
        "c:2:1: b: is bad; mend it",
        "c:10:1: c: is bad; mend it",
    ]


def test_a_mistake_in_defaults_is_told_once() -> None:
    """What defaults got wrong is not repeated for every job that takes it."""
    text = f"{GOOD}  mode: fast\njobs:\n" + "".join(
        f"  job-{i}: {{batch_ids: [batch_{i}]}}\n" for i in range(50)
    )
    assert messages(text) == [
        '9:9: defaults.mode: "fast" is not one of them; write run, forceRun or debug'
    ]


def test_what_could_be_read_stays_in_the_draft() -> None:
    """With a broken job the state file and the other jobs are still known, for `status`."""
    text = f"state: var/my.db\n{GOOD}jobs:\n  a: {{batch_ids: [batch_a]}}\n  b: {{batch_ids: []}}\n"
    draft = tecko.parse_config(text, Path("/etc/tecko/c.yaml"))
    assert len(draft.problems) == 1
    assert draft.config.state_path == Path("/etc/tecko/var/my.db")
    assert list(draft.config.jobs) == ["a"]


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
    draft = tecko.parse_config(f"{line}\njobs: [", Path("/etc/c.yaml"))
    assert draft.problems
    assert draft.config.state_path == Path(path)


# --- what a good file means -----------------------------------------------------------------------


def test_the_example_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example that people start from is itself without a mistake."""
    example = ROOT / "config.example.yaml"
    if not example.exists():
        pytest.skip("there is no config.example.yaml yet")
    monkeypatch.chdir(tmp_path)
    draft = tecko.read_draft(example, tecko.Files())
    assert list(map(str, draft.problems)) == []
    assert draft.config.jobs


def test_defaults_of_the_program() -> None:
    """A config with the least keys gets what the documentation promises."""
    config = parsed(GOOD + "jobs:\n  nightly: {batch_ids: [batch_a]}\n")
    assert (config.state_path, config.key_path) == (
        Path("teckochecker.db"),
        Path("teckochecker.key"),
    )
    assert config.log == tecko.LogSettings("info", "auto", 30 * 86400)
    assert (config.limits.max_concurrency, config.limits.request_timeout_s) == (10, 30)
    assert config.limits.trigger_grace_s == 60
    assert config.openai["openai-prod"].base_url == "https://api.openai.com/v1"
    assert config.jobs["nightly"] == tecko.Job(
        name="nightly",
        batch_ids=("batch_a",),
        openai_secret="openai-prod",
        keboola_secret="keboola-prod",
        component_id="kds-team.app-custom-python",
        config_id="123456",
        branch_id=None,
        config_row_ids=(),
        mode="run",
        variables=(),
        poll_interval_s=30,
        paused=False,
    )


def test_every_key_is_read() -> None:
    """No key is accepted and then forgotten."""
    config = parsed("""\
state: /srv/tecko.db
key_file: keys/tecko.key
publish: www
log: {level: debug, format: json, retention: 7d}
limits: {max_concurrency: 3, request_timeout: 5s, trigger_grace: 90s}
secrets:
  o: {type: openai, file: o.txt, base_url: http://localhost:8080/v1/, organization: org-1,
      project: proj_1}
  k: {type: keboola, value: gAAAA, stack_url: https://connection.keboola.com/}
  w: {type: webhook, value: gAAAA}
notify:
  - {secret: w, events: [completed, job_failed]}
  - {secret: w}
jobs:
  j:
    batch_ids: [batch_b, batch_a]
    openai_secret: o
    keboola_secret: k
    component_id: c
    config_id: "1"
    branch_id: "2"
    config_row_ids: ["3", "4"]
    mode: forceRun
    variables: {dataset: products}
    poll_interval: 1h30m
    paused: true
    done: true
""")
    assert (config.state_path, config.key_path) == (Path("/srv/tecko.db"), Path("keys/tecko.key"))
    assert config.log == tecko.LogSettings("debug", "json", 7 * 86400)
    assert config.limits.max_concurrency == 3
    assert config.limits.request_timeout_s == 5
    assert config.limits.trigger_grace_s == 90
    openai, keboola = config.openai["o"], config.keboola["k"]
    assert (openai.base_url, openai.organization, openai.project) == (
        "http://localhost:8080/v1",
        "org-1",
        "proj_1",
    )
    assert (openai.source.kind, openai.source.text.reveal()) == ("file", "o.txt")
    assert (keboola.stack_url, keboola.source.kind) == ("https://connection.keboola.com", "value")
    job = config.jobs["j"]
    assert job == tecko.Job(
        "j", ("batch_b", "batch_a"), "o", "k", "c", "1", "2", ("3", "4"), "forceRun",
        (("dataset", "products"),), 5400, paused=True, done=True,
    )  # fmt: skip
    assert config.publish_path == Path("www")
    assert config.webhook["w"].source.kind == "value"
    some, every = ("completed", "job_failed"), tuple(tecko.Told)
    assert config.notify == (tecko.Hook("w", some), tecko.Hook("w", every))
    assert config.target(job) == tecko.Target("https://connection.keboola.com", "c", "1", "2")


@pytest.mark.parametrize("written", ["0123", "1e3", "0x10", "1.50", "2024-01-01", "yes", "789"])
def test_a_bare_id_stays_as_written(written: str) -> None:
    """YAML's ideas about numbers, dates and truth do not reach an id."""
    job = job_with(f"branch_id: {written}\nconfig_row_ids: [{written}]")
    assert (job.branch_id, job.config_row_ids) == (written, (written,))


@pytest.mark.parametrize("written", ["0123", "12:30", "0x10", "1e3", "0o17", ".5", "on", "+1", "="])
def test_a_bare_variable_stays_as_written(written: str) -> None:
    """Keboola gets the characters that stand in the file."""
    assert job_with(f"variables: {{v: {written}}}").variables == (("v", written),)


def test_bare_job_names_stay_as_written() -> None:
    """A name is what stands there, also where YAML would read a number or a boolean."""
    names = ["0123", "12:30", "yes", "2024-01-01", "null"]
    config = parsed(GOOD + "jobs:\n" + "".join(f"  {n}: {{batch_ids: [batch_a]}}\n" for n in names))
    assert list(config.jobs) == names


VARIABLES = {
    "[a, b]": '["a","b"]',
    "[1, -2.5, 0123, 12:30, 0x10, 1e3]": '[1,-2.5,"0123","12:30","0x10","1e3"]',
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
    if written[0] in "[{":
        json.loads(value)


DURATIONS = {
    "30s": 30,
    "2m": 120,
    "1h": 3600,
    "1h30m": 5400,
    "1h0m30s": 3630,
    "90m": 5400,
    "24h": 86400,
    "1d": 86400,
    "0d1h": 3600,
    "1": 1,
    "007": 7,
    "3600": 3600,
    '"45"': 45,
    '" 45s "': 45,
}


@pytest.mark.parametrize("written", DURATIONS)
def test_durations(written: str) -> None:
    """Durations are numbers with units, largest first, or whole seconds."""
    assert job_with(f"poll_interval: {written}").poll_interval_s == DURATIONS[written]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (1, "1s"),
        (59.6, "1m"),
        (90, "1m30s"),
        (5400, "1h30m"),
        (90061, "1d1h"),
        (-5, "0s"),
    ],
)
def test_durations_are_shown_in_the_same_notation(seconds: float, shown: str) -> None:
    """A message's duration can be copied into the config."""
    assert tecko.show_duration(seconds) == shown


@pytest.mark.parametrize(
    ("written", "means"),
    [(word, True) for word in ("true", "True", "TRUE", "yes", "on", "On")]
    + [(word, False) for word in ("false", "no", "off", "OFF")],
)
def test_booleans(written: str, *, means: bool) -> None:
    """All the words for true and false that YAML 1.1 knows are understood."""
    assert job_with(f"paused: {written}").paused is means


@pytest.mark.parametrize(
    "url",
    ["http://localhost:1", "http://127.0.0.1", "http://127.8.8.8:80", "http://[::1]:8080"],
)
def test_http_is_for_loopback_only(url: str) -> None:
    """Tests and local servers may do without TLS, and then without the long grace too."""
    text = f"""\
limits: {{trigger_grace: 1s}}
secrets:
  k: {{type: keboola, env: K, stack_url: "{url}"}}
jobs: {{}}
"""
    config = parsed(text)
    assert config.keboola["k"].stack_url == url
    assert config.limits.trigger_grace_s == 1


def test_one_real_stack_is_enough_to_need_the_grace() -> None:
    """A loopback stack beside a real one does not shorten the real one's grace."""
    text = """\
limits: {trigger_grace: 1s}
secrets:
  k: {type: keboola, env: K, stack_url: "http://localhost:1"}
  real: {type: keboola, env: K, stack_url: "https://connection.keboola.com"}
jobs: {}
"""
    assert messages(text) == [
        '1:25: limits.trigger_grace: "1s" is out of range; write 30s to 1d',
    ]


def test_a_jobs_own_values_win_and_null_takes_them_back() -> None:
    """A null in a job means `as if it stood in neither place`."""
    config = parsed(
        GOOD
        + """\
  branch_id: "1"
  mode: debug
  poll_interval: 1h
  paused: yes
  variables: {region: eu}
  config_row_ids: ["1"]
jobs:
  as-defaults: {batch_ids: [batch_a]}
  own: {batch_ids: [batch_a], branch_id: 2, mode: run, poll_interval: 1m, paused: no,
        variables: {dataset: x}, config_row_ids: []}
  taken-back: {batch_ids: [batch_a], branch_id: null, mode: , poll_interval: ~, paused: null,
        variables: null, config_row_ids: null}
"""
    )

    def chosen(name: str) -> tuple[Any, ...]:
        job = config.jobs[name]
        seconds, variables = job.poll_interval_s, job.variables
        return job.branch_id, job.mode, seconds, job.paused, variables, job.config_row_ids

    assert chosen("as-defaults") == ("1", "debug", 3600, True, (("region", "eu"),), ("1",))
    assert chosen("own") == ("2", "run", 60, False, (("dataset", "x"),), ())
    assert chosen("taken-back") == (None, "run", 30, False, (), ())


def test_optional_parts_may_be_null() -> None:
    """A part whose keys are all commented out counts as not there."""
    config = parsed("state:\nkey_file:\nlog:\nlimits:\nsecrets:\ndefaults:\njobs: {}\n")
    assert config == parsed("jobs: {}\n").__class__(
        Path("c.yaml"), config.sha256, Path("teckochecker.db"), Path("teckochecker.key")
    )


def test_merge_keys() -> None:
    """`<<` takes one mapping or several, in jobs and in variables; what stands nearer wins."""
    config = parsed("""\
secrets:
  openai-prod: &key {type: openai, env: OPENAI}
  openai-dev: {<<: *key, organization: org-1}
  keboola-prod: {type: keboola, env: KEBOOLA, stack_url: https://connection.keboola.com}
jobs:
  first: &first
    batch_ids: &ids [batch_a, batch_b]
    openai_secret: openai-prod
    keboola_secret: keboola-prod
    component_id: c
    config_id: "1"
    variables: &vars {a: 1, b: 2}
  second:
    <<: *first
    config_id: "2"
    variables: {<<: *vars, b: 3}
  third:
    batch_ids: [batch_c]
    <<: [{mode: debug, config_id: "3"}, *first]
  fourth: {<<: *first, batch_ids: *ids, openai_secret: openai-dev}
""")
    jobs = config.jobs
    assert jobs["second"].config_id == "2"
    assert jobs["second"].batch_ids == ("batch_a", "batch_b")
    assert dict(jobs["second"].variables) == {"a": "1", "b": "3"}
    assert (jobs["third"].batch_ids, jobs["third"].mode) == (("batch_c",), "debug")
    assert (jobs["third"].config_id, jobs["third"].component_id) == ("3", "c")
    assert jobs["fourth"].batch_ids == jobs["first"].batch_ids
    assert config.openai["openai-dev"].organization == "org-1"
    assert config.openai["openai-dev"].source.text.reveal() == "OPENAI"


def test_a_mistake_in_a_merged_mapping_names_the_job_and_the_written_place() -> None:
    """What a merge key brings in is told where it stands, under the job it breaks."""
    text = f"{GOOD}jobs:\n  a: &a {{batch_ids: [batch_a], mode: x}}\n  b: {{<<: *a, mode: run}}\n"
    assert messages(text) == [
        '10:38: jobs.a.mode: "x" is not one of them; write run, forceRun or debug'
    ]


def test_names_outside_ascii() -> None:
    """A job may have a name in any script, in quotes or not."""
    config = parsed(
        f'{GOOD}jobs:\n  "noční přepočet 🌙": {{batch_ids: [batch_a]}}\n'
        "  夜間: {batch_ids: [batch_b]}\n"
    )
    assert list(config.jobs) == ["noční přepočet 🌙", "夜間"]


def test_a_column_counts_characters_also_after_other_scripts() -> None:
    """Places are those that an editor shows, not offsets of bytes."""
    assert messages(f"{GOOD}jobs:\n  夜間🌙: {{batch_ids: []}}\n") == [
        "10:20: jobs.夜間🌙.batch_ids: has 0 batch ids; write a list of 1 to 10 batch ids"
    ]


@pytest.mark.parametrize("prefix", ["", "\ufeff", "---\n", "%YAML 1.1\n---\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks(prefix: str, newline: str) -> None:
    """What editors on other systems do to a file changes nothing in its meaning."""
    text = f"{prefix}{GOOD}jobs:\n  nightly:\n    batch_ids:\n    - batch_a\n"
    assert parsed(text.replace("\n", newline)).jobs["nightly"].batch_ids == ("batch_a",)


def test_windows_line_ends_keep_places() -> None:
    """A line that ends in CR and LF is one line."""
    text = f"{GOOD}jobs:\n  nightly: {{batch_ids: []}}\n".replace("\n", "\r\n")
    (message,) = messages(text)
    assert message.startswith("10:24: jobs.nightly.batch_ids: ")


def test_json_is_a_config_too() -> None:
    """A config that a program wrote as JSON loads as it is."""
    data = {
        "secrets": {
            "o": {"type": "openai", "env": "O"},
            "k": {"type": "keboola", "env": "K", "stack_url": "https://connection.keboola.com"},
        },
        "jobs": {
            "j": {
                "batch_ids": ["batch_a"],
                "openai_secret": "o",
                "keboola_secret": "k",
                "component_id": "c",
                "config_id": "0123",
                "paused": True,
                "variables": {"list": [1, None, {"a": "b"}]},
            }
        },
    }
    for indent in (None, 2, "\t"):
        job = parsed(json.dumps(data, indent=indent)).jobs["j"]
        assert (job.config_id, job.paused) == ("0123", True)
        assert job.variables == (("list", '[1,null,{"a":"b"}]'),)


def test_ten_batches_are_allowed_and_keep_their_order() -> None:
    """The most that a job can have, in the order of the file."""
    ids = [f"batch_{i}" for i in (3, 1, 2, 10, 9, 8, 7, 6, 5, 4)]
    config = parsed(f"{GOOD}jobs:\n  nightly: {{batch_ids: [{', '.join(ids)}]}}\n")
    assert list(config.jobs["nightly"].batch_ids) == ids


def test_the_longest_batch_id_is_allowed() -> None:
    """249 characters after `batch_`."""
    long = "batch_" + "x" * 249
    assert parsed(f"{GOOD}jobs:\n  j: {{batch_ids: [{long}]}}\n").jobs["j"].batch_ids == (long,)


def test_a_thousand_jobs_load_right() -> None:
    """A large config gives every job, with its own ids and those of its defaults."""
    text = f"{GOOD}jobs:\n" + "".join(
        f"  job-{i}:\n    <<: *defaults\n    batch_ids: [batch_{i}a, batch_{i}b]\n"
        f"    config_id: {i:06}\n"
        for i in range(1000)
    )
    config = parsed(text)
    assert [job.batch_ids for job in config.jobs.values()] == [
        (f"batch_{i}a", f"batch_{i}b") for i in range(1000)
    ]
    assert [job.config_id for job in config.jobs.values()] == [f"{i:06}" for i in range(1000)]
    assert {job.component_id for job in config.jobs.values()} == {"kds-team.app-custom-python"}


def test_ten_thousand_jobs_with_merged_keys_are_no_bomb() -> None:
    """The limit on aliases is far above what a large, honest config needs."""
    text = f"{GOOD}jobs:\n" + "".join(
        f"  job-{i}: {{<<: *defaults, batch_ids: [batch_{i}]}}\n" for i in range(10_000)
    )
    assert len(parsed(text).jobs) == 10_000


def test_the_pure_python_loader_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libyaml the config, its places and its refusals are the same."""
    good = f"{GOOD}jobs:\n  nightly: {{<<: *defaults, batch_ids: [batch_a], branch_id: 0123}}\n"
    bad = f"{GOOD}jobs:\n  nightly: {{batch_ids: [], nope: 1}}\n"
    deep = "- " * 30_000
    before = parsed(good), messages(bad), messages(deep)
    monkeypatch.setattr(tecko, "_YAML_LOADER", yaml.SafeLoader)
    assert (parsed(good), messages(bad), messages(deep)) == before


# --- edges ----------------------------------------------------------------------------------------


def test_a_key_inside_a_variable_has_a_cure_too() -> None:
    """A key of a nested mapping that is a list is refused with what to write instead."""
    head = f"{GOOD}jobs:\n  nightly:\n    batch_ids: [batch_a]\n"
    (message,) = messages(f"{head}    variables: {{filter: {{[a, b]: 1}}}}\n")
    assert re.search(r"a key is not a single value; .+", message)


@pytest.mark.parametrize(
    "line",
    [
        "variables: !!python/object:os.system {a: 1}",
        "config_row_ids: !!python/tuple [1]",
        "variables: {a: !ours [1]}",
        "variables: {a: [!!python/name:os.system x]}",
    ],
)
def test_a_tag_on_anything_is_refused(line: str) -> None:
    """A tag asks for something that this program does not do, wherever it stands."""
    head = f"{GOOD}jobs:\n  nightly:\n    batch_ids: [batch_a]\n"
    (message,) = messages(f"{head}    {line}\n")
    assert "the tag " in message


@pytest.mark.parametrize("end", ["?", "#"])
def test_a_url_with_an_empty_query_is_refused(end: str) -> None:
    """A path put after the `?` would never reach the server."""
    text = SECRETS.replace("https://connection.keboola.com", f"'https://example.com/x{end}'")
    (message,) = messages(f"{text}jobs: {{}}\n")
    assert "has more than scheme, host, port and path" in message
