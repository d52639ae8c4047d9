"""What commands show: on a terminal, on a pipe, to a new user, and where it cannot be shown."""

from __future__ import annotations

import itertools
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PATIENCE_S,
    PROGRAM,
    Outcome,
    Terminal,
    Workspace,
    clean_environment,
)
from simulator import Simulator

import teckochecker as tecko

COMMANDS = tuple(tecko.COMMAND_HELP)
NEED_CONFIG = (
    ("check",),
    ("encrypt",),
    ("encrypt", "--set", "openai"),
    ("doctor",),
    ("secrets",),
    ("status",),
    ("status", "--json"),
    ("logs",),
    ("retry", "job"),
    ("--once",),
)


def plain(text: str) -> str:
    """Return what a terminal shows, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def show(workspace: Workspace, *arguments: str, columns: int = 80, **env: str) -> str:
    """Return all that a command shows on a terminal that is so wide."""
    terminal = workspace.terminal(*arguments, size=(24, columns), **env)
    assert terminal.wait() == 0, terminal.text
    return terminal.text


def shell(workspace: Workspace, line: str) -> Outcome:
    """Run a shell's line, in which CMD stands for the program with its config."""
    command = shlex.join(workspace.command())
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("CMD", command)],
        cwd=workspace.directory,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def busy(workspace: Workspace) -> Workspace:
    """A workspace after one pass, with a job in every condition."""
    sim = workspace.sim
    workspace.add_job("finished", "batch_done")
    workspace.add_job("quiet", "batch_quiet", paused=True)
    workspace.add_job("half", "batch_ended", "batch_runs", status="in_progress", poll_interval="1h")
    sim.finish("batch_ended")
    sim.set_batch("batch_runs", request_counts={"total": 100, "completed": 36, "failed": 4})
    workspace.add_job("a-job-with-a-name-that-is-very-long-indeed", "batch_more", config_id="more")
    workspace.add_job("běh-日本", "batch_wide", config_id="wide", status="in_progress")
    workspace.add_job("rejected", "batch_rejected")
    sim.fault("queue.create", "status", None, code=400, match="batch_rejected")
    workspace.add_job("gone", "batch_gone")
    sim.delete_batch("batch_gone")
    workspace.add_job("elsewhere", "batch_elsewhere", done=True)
    assert workspace.once().code == 1
    return workspace


# --- status on a terminal -------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_as_wide_as_the_terminal(columns: int, busy: Workspace) -> None:
    """No line of the table is wider than the terminal; a wide one shows all there is."""
    text = plain(show(busy, "status", columns=columns))
    head, _, *lines = text.splitlines()
    assert head.startswith("Nothing runs: start the daemon, or --once. 3 active, 1 paused, ")
    assert max(map(tecko.columns_of, lines)) <= columns
    assert ("…" in text) == (columns < 200)
    assert ("a-job-with-a-name-that-is-very-long-indeed" in text) == (columns == 200)


def test_columns_stand_below_each_other(busy: Workspace) -> None:
    """Names of characters that are two columns wide move nothing."""
    _, _, head, *lines = plain(show(busy, "status", columns=200)).splitlines()
    at = head.index("STATUS")
    rows = {line.split()[0]: line for line in lines}
    assert tecko.columns_of(rows["běh-日本"].partition("active")[0]) == at
    assert rows["half"].index("active") == at


def test_those_in_need_come_first(busy: Workspace) -> None:
    """What needs a person comes first, with what is wrong below; what is finished comes last."""
    _, _, _, *lines = plain(show(busy, "status", columns=200)).splitlines()
    names = [line.split()[0] for line in lines if not line.startswith("  ")]
    assert set(names[:2]) == {"rejected", "gone"}
    assert set(names[2:4]) == {"half", "běh-日本"}
    assert names[4] == "quiet"
    below = {line.split()[0]: after for line, after in itertools.pairwise(lines)}
    assert below["gone"].startswith("  batch_gone: OpenAI answered 404: ")
    assert below["rejected"].startswith("  Keboola answered 400: ")
    assert sum(line.startswith("  ") for line in lines) == 2


def test_progress_and_what_is_next(busy: Workspace) -> None:
    """A bar tells how much of the requests is done, words when something was and will be."""
    then = time.time() - 183
    times = f"last_check_at = {then}, next_check_at = {then + 3600}"
    busy.change_state(f"UPDATE jobs SET {times} WHERE name = 'half'")  # noqa: S608
    rows = {
        line.split()[0]: re.split(r" {2,}", line)
        for line in plain(show(busy, "status", columns=200)).splitlines()
        if line and not line.startswith("  ")
    }
    assert rows["half"][1:] == [
        "active",
        "███████░░░",
        "1/2",
        "70%",
        "3 min ago",
        "look in 57 min",
    ]
    assert rows["finished"][1:4] == ["completed", "██████████", "1/1 100%"]
    assert rows["finished"][-1].startswith("started as Keboola job 10000000")
    assert rows["quiet"][1:] == [
        "paused",
        "░░░░░░░░░░",
        "0/1",
        "0%",
        "never",
        "nothing while it is paused",
    ]
    assert rows["elsewhere"][1] == "completed"
    assert rows["elsewhere"][-1] == "nothing: it is done elsewhere"
    assert rows["rejected"][-1] == "wait for another target, variables or token, or `retry`"


def test_where_the_terminal_has_few_characters(busy: Workspace) -> None:
    """Without UTF-8, the bar is made of ASCII, and what is cut just ends."""
    text = show(busy, "status", PYTHONIOENCODING="ascii")
    assert text.isascii()
    assert "#######..." in text


def test_colours(busy: Workspace) -> None:
    """There are colours on a terminal, but not with NO_COLOR, on a dumb one, or on a pipe."""
    assert "\x1b[31mgone" in show(busy, "status")
    assert "\x1b[2mquiet" in show(busy, "status")
    for text in (show(busy, "status", NO_COLOR="1"), show(busy, "status", TERM="dumb")):
        assert "\x1b" not in text
        assert "█" in text
    for arguments in (("status",), ("status", "gone"), ("doctor",), ("secrets",), ("logs",)):
        assert "\x1b" not in busy.run(*arguments).stdout
    assert "█" not in busy.run("status").stdout
    terminal = busy.terminal("doctor")
    assert terminal.wait() == 1
    assert "\x1b[32m✓" in terminal.text
    assert "\x1b[31m✗" in terminal.text


def test_one_job_in_full(busy: Workspace) -> None:
    """One job is shown whole, however narrow the terminal: ids and errors are to be copied."""
    text = plain(show(busy, "status", "gone", columns=40)).replace("\n", "")
    assert "or the key belongs to another OpenAI project" in text
    text = plain(show(busy, "status", "half", columns=40))
    assert "file-batch_ended-output" in text
    assert "36/100" in text


def test_who_runs(workspace: Workspace) -> None:
    """It says whether the daemon runs, a pass is being made, or nothing runs."""
    workspace.add_job("one", "batch_a", status="in_progress")
    workspace.write()
    assert workspace.run("status").stdout.startswith("Nothing runs: start the daemon, or --once. ")
    hold = workspace.sim.hold("openai.*", times=None)
    once = workspace.start("--once")
    hold.wait_reached()
    assert workspace.run("status").stdout.startswith("A pass of --once is being made. ")
    hold.release()
    assert once.wait() == 0
    daemon = workspace.daemon()
    assert workspace.run("status").stdout.startswith("The daemon runs. 1 active\n")
    daemon.kill()
    assert workspace.run("status").stdout.startswith("Nothing runs: ")


# --- status --watch -------------------------------------------------------------------------------


def end_watch(terminal: Terminal) -> None:
    """Ctrl-C ends it with 130, and leaves the terminal as it was."""
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert "Traceback" not in terminal.text
    assert terminal.text.rindex(tecko.WRAP) > terminal.text.rindex(tecko.NO_WRAP)
    assert terminal.text.endswith("\n")


def test_watch(workspace: Workspace) -> None:
    """It draws in place, again and again, what has become of the jobs meanwhile."""
    workspace.add_job("one", "batch_a", status="in_progress")
    daemon = workspace.daemon()
    daemon.wait_for_event("batch_status_changed", job="one")
    terminal = workspace.terminal("status", "--watch", size=(10, 70))
    terminal.wait_for("The daemon runs. 1 active")
    workspace.sim.finish("batch_a")
    daemon.wait_for_event("trigger_sent", job="one")
    terminal.wait_for("The daemon runs. 1 completed")
    assert daemon.stop() == 0
    terminal.wait_for("Nothing runs: ")
    assert terminal.text.count(tecko.HOME) >= 3
    end_watch(terminal)


def test_watch_more_than_fits(busy: Workspace) -> None:
    """Of many jobs, those that need a person are seen: nothing is pushed off the top."""
    terminal = busy.terminal("status", "--watch", size=(6, 40))
    terminal.wait_for(tecko.CLEAR_BELOW)
    drawn = terminal.text.partition(tecko.CLEAR_BELOW)[0]
    assert drawn.count("\n") == 5
    assert drawn.startswith(f"{tecko.HOME}{tecko.NO_WRAP}Nothing runs: ")
    assert "rejected" in drawn
    end_watch(terminal)


def test_watch_goes_on_over_a_bad_config(workspace: Workspace) -> None:
    """A config that is being edited is told of, and ends nothing."""
    workspace.add_job("one", "batch_a", status="in_progress")
    assert workspace.once().code == 0
    terminal = workspace.terminal("status", "--watch", "one", size=(20, 120))
    terminal.wait_for("in_progress")
    workspace.write("jobs: [")
    terminal.wait_for("The config file has problems")
    workspace.path.unlink()
    terminal.wait_for("cannot be read: No such file")
    workspace.write()
    times = terminal.text.count(tecko.HOME)
    terminal.wait_for(tecko.HOME, times + 2)
    assert "problems" not in terminal.text.split(tecko.HOME)[-2]
    end_watch(terminal)


def test_watch_only_on_a_terminal(workspace: Workspace) -> None:
    """On a pipe it is refused, and so is what it cannot be joined with."""
    workspace.add_job("one", "batch_a", status="in_progress")
    workspace.write()
    done = workspace.run("status", "--watch")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == (
        "teckochecker: --watch draws on a terminal; use --json, or `logs --follow`\n"
    )
    for other in ("--json", "--check"):
        terminal = workspace.terminal("status", "--watch", other)
        assert terminal.wait() == 2
        assert "--watch goes without --json and --check" in terminal.text


# --- speed ----------------------------------------------------------------------------------------


def test_status_of_a_thousand_jobs(workspace: Workspace) -> None:
    """It takes the CPU less than a second, also where all of them need a person."""
    for number in range(1000):
        workspace.jobs[f"job-{number:04}"] = {
            "batch_ids": [f"batch_{number}_{i}" for i in range(3)],
            "config_id": "1",
            "paused": True,
        }
    assert workspace.once().code == 0
    workspace.change_state("UPDATE jobs SET paused = 0, error = 'OpenAI answered 404'")
    for arguments in (("status",), ("status", "--json"), ("status", "job-0500")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert workspace.run(*arguments).code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


# --- pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "status --json", "logs", "logs --json", "schema"])
def test_head(command: str, busy: Workspace) -> None:
    """Who has seen enough after one line gets no traceback, and no failure."""
    done = shell(busy, f"CMD {command} | head -n 1")
    assert (done.code, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_head_of_what_is_told_as_it_happens(workspace: Workspace) -> None:
    """`logs --follow | head` ends with the next line after `head` has gone, without a word."""
    workspace.add_job("one", "batch_a", status="in_progress")
    workspace.write()
    with subprocess.Popen(
        workspace.command("logs", "--follow"),
        cwd=workspace.directory,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        assert follower.stdout
        assert follower.stderr
        daemon = workspace.daemon()
        assert "config_loaded" in follower.stdout.readline()
        follower.stdout.close()
        workspace.sim.finish("batch_a")
        daemon.wait_for_event("trigger_sent", job="one")
        assert follower.wait(PATIENCE_S) == 0
        assert follower.stderr.read() == ""


@pytest.mark.parametrize("command", ["status", "secrets", "logs", "schema", "check", "doctor"])
def test_a_full_disk_below_the_output(command: str, busy: Workspace) -> None:
    """What cannot be written is told in one line, and is no success."""
    done = shell(busy, f"CMD {command} > /dev/full")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr == (
        "teckochecker: cannot go on: No space left on device; see to that first\n"
    )


@pytest.mark.parametrize(
    "command", ["status", "secrets", "logs", "schema", "check", "status --watch"]
)
def test_a_closed_output(command: str, busy: Workspace) -> None:
    """Whoever closes the output gets an exit code, and no traceback."""
    done = shell(busy, f"CMD {command} >&-")
    assert done.code == (2 if "--watch" in command else 0)
    assert "Traceback" not in done.stderr
    done = shell(busy, f"CMD {command} >&- 2>&-")
    assert (done.stdout, done.stderr) == ("", "")


# --- help, and what is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, workspace: Workspace) -> None:
    """Every command explains itself, with an example that is one, and the exit codes."""
    done = workspace.run(command, "--help")
    assert (done.code, done.stderr) == (0, "")
    assert "exit codes: 0 fine; 1 a job has an error or needs a person; 2 usage" in done.stdout
    example = re.search(r"^example: teckochecker (.*)$", done.stdout, re.MULTILINE)
    assert example
    words = shlex.split(example[1].partition(">")[0])
    assert words[0] == command
    tecko.new_parser().parse_args(words)
    assert f"    {command} " in workspace.run("--help").stdout


@pytest.mark.parametrize("arguments", NEED_CONFIG, ids=" ".join)
@pytest.mark.parametrize("ill", ["missing", "directory", "binary", "bomb"])
def test_without_a_usable_config(
    ill: str, arguments: tuple[str, ...], workspace: Workspace
) -> None:
    """Every command says in one line what is wrong with the config."""
    if ill == "directory":
        workspace.path.mkdir()
    elif ill == "binary":
        workspace.path.write_bytes(b"jobs: \xff\xfe\0")
    elif ill == "bomb":
        workspace.write("[" * 30_000)
    done = workspace.run(*arguments)
    lines = (done.stdout + done.stderr).splitlines()
    assert "Traceback" not in done.stderr
    if arguments[0] == "doctor":
        assert (done.code, done.stderr) == (1, "")
        assert lines[0].startswith(f"✗ {workspace.path}:1:")
    elif arguments[0] in {"status", "logs", "retry"} and ill == "bomb":
        assert done.code in {0, 2}  # where the state file is can still be told
    else:
        assert (done.code, done.stdout, len(lines)) == (2, "", 1)
        assert lines[0].startswith(f"{workspace.path}:1:")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("status", "a", "b"),
        ("logs", "-n", "-1"),
        ("init", "a", "b"),
        ("encrypt", "--set"),
        ("--once", "status"),
        ("retry", "a", "--now"),
    ],
    ids=" ".join,
)
def test_usage(arguments: tuple[str, ...], workspace: Workspace) -> None:
    """A command line that is none is told with its usage, exit code 2."""
    done = workspace.run(*arguments)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: teckochecker ")
    assert "Traceback" not in done.stderr


def test_logs_of_no_job(workspace: Workspace) -> None:
    """A name that is neither in the config nor in the log is a mistake; one that was is none."""
    workspace.add_job("one", "batch_a")
    workspace.add_job("two", "batch_b")
    assert workspace.once().code == 0
    del workspace.jobs["one"]
    workspace.write()
    assert workspace.run("logs", "one").code == 0
    done = workspace.run("logs", "oen")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == 'teckochecker: there is no job "oen"; `status` lists them all\n'


def test_secrets_that_stand_in_the_wrong_place(workspace: Workspace) -> None:
    """A token that someone wrote as the name of a variable is not shown."""
    workspace.secrets["odd"] = {"type": "openai", "env": "sk-S3CR3T-0123456789"}
    workspace.add_job("one", "batch_a")
    workspace.write()
    done = workspace.run("secrets")
    assert done.code == 0
    assert "S3CR3T" not in done.stdout
    assert "env, BUT NOT A VARIABLE'S NAME" in done.stdout


# --- a new user -----------------------------------------------------------------------------------


def test_from_init_to_a_started_job(sim: Simulator, tmp_path: Path) -> None:
    """Who follows the three steps that `init` prints has a Keboola job started."""
    directory = tmp_path / "my place"
    program = [sys.executable, str(PROGRAM)]

    def step(*arguments: str) -> Outcome:
        done = subprocess.run(
            [*program, *arguments],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    steps = step("init", "my place").stdout.splitlines()
    assert len(steps) == 4
    config = directory / "config.yaml"
    text = config.read_text()
    for old, new in {
        "YOUR-OPENAI-KEY": OPENAI_KEY,
        "YOUR-KEBOOLA-TOKEN": KEBOOLA_TOKEN,
        "# base_url: https://api.openai.com/v1 ": f"base_url: {sim.openai_url} ",
        "https://connection.keboola.com": sim.stack_url,
        "batch_YOUR_ID": "batch_mine",
    }.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    sim.add_batch("batch_mine", "completed")
    printed = [shlex.split(line.split(". ", 1)[1]) for line in steps[2:]]
    encrypt, check = printed[0], printed[1][:4]
    assert encrypt[0] == "teckochecker"
    assert step(*encrypt[1:]).stdout == "encrypted: openai-prod, keboola-prod\n"
    check[3] = check[3].rstrip(",")
    assert step(*check[1:]).stdout == "my place/config.yaml: fine: 1 job, 1 batch, 2 secrets\n"
    assert step(*check[1:3], "doctor").code == 0
    with subprocess.Popen(
        [*program, *check[1:3]],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as daemon:
        sim.wait_for(lambda: sim.jobs, PATIENCE_S)
        daemon.send_signal(signal.SIGTERM)
        _, log = daemon.communicate(timeout=PATIENCE_S)
    assert daemon.returncode == 0
    assert OPENAI_KEY not in log
    assert os.listdir(tmp_path) == ["my place"]  # noqa: PTH208
