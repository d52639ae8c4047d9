"""The units in systemd/: what systemd says about them, and the directives others depend on."""

import re
import shutil
from pathlib import Path

import pytest
from harness import Outcome, outcome_of

UNITS = Path(__file__).resolve().parent.parent / "systemd"
PROGRAM = "/opt/teckochecker/.venv/bin/teckochecker"
DAEMON = "teckochecker.service"
TEMPLATE = "teckochecker@.service"
ONCE = "teckochecker-once.service"
TIMER = "teckochecker-once.timer"
SERVICES = (DAEMON, TEMPLATE, ONCE)
README = UNITS.parent / "README.md"
GRACE_S = 20  # how long the program gives POSTs in flight after SIGTERM

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def directives(unit: str) -> dict[str, list[str]]:
    """Return all values of each `Section.Name`; configparser would keep the last only."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (UNITS / unit).read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(f"{section}.{name}", []).append(value)
    return found


def only(unit: str, name: str) -> str:
    """Return the value of a directive that must stand in the unit exactly once."""
    values = directives(unit).get(name, [])
    assert len(values) == 1, f"{unit}: {name} stands there {len(values)} times"
    return values[0]


def seconds(span: str) -> int:
    match = re.fullmatch(r"(\d+)(s|min)", span)
    assert match, f"{span!r} is not a number of s or min"
    return int(match[1]) * {"s": 1, "min": 60}[match[2]]


def analyze(*arguments: str, cwd: Path) -> Outcome:
    return outcome_of(["systemd-analyze", *arguments], cwd=cwd)


@pytest.fixture
def runnable(tmp_path: Path) -> Path:
    """Return a copy of the units whose program exists: `verify` complains if it does not."""
    program = shutil.which("true")
    assert program is not None
    for unit in UNITS.iterdir():
        text = unit.read_text(encoding="utf-8")
        (tmp_path / unit.name).write_text(text.replace(PROGRAM, program), encoding="utf-8")
    return tmp_path


def test_these_are_the_units() -> None:
    """No unit is added or renamed without this file knowing."""
    assert sorted(path.name for path in UNITS.iterdir()) == sorted([*SERVICES, TIMER])


@needs_systemd
@pytest.mark.parametrize("unit", [*SERVICES, "teckochecker@sales.service", TIMER])
def test_verify_is_silent(runnable: Path, unit: str) -> None:
    """Every directive and value is known: systemd prints about others and still exits 0."""
    result = analyze("verify", "--man=no", f"./{unit}", cwd=runnable)
    assert result == Outcome(0, "", "")


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES)
def test_exposure_is_at_most_1_5(runnable: Path, unit: str) -> None:
    """The sandbox leaves little but the network open (the threshold is in tenths)."""
    result = analyze("security", "--offline=true", "--threshold=15", f"./{unit}", cwd=runnable)
    assert result.code == 0, result.stdout + result.stderr


@pytest.mark.parametrize("unit", [*SERVICES, TIMER])
def test_a_unit_begins_with_what_it_is_and_how_to_install_it(unit: str) -> None:
    """A person who opens a unit reads first what it is for and which commands install it."""
    header = (UNITS / unit).read_text(encoding="utf-8").partition("[Unit]")[0]
    assert header.startswith("# ")
    assert "# Install" in header
    assert all(line.startswith("#") for line in header.split("\n") if line)


# The directives that others depend on, each exactly once in each of these units.
WANTED: dict[tuple[str, ...], dict[str, str]] = {
    SERVICES: {
        "Unit.Wants": "network-online.target",
        "Service.DynamicUser": "yes",
        "Service.StateDirectoryMode": "0700",
        "Service.UMask": "0077",
        "Service.LimitCORE": "0",
        "Service.CapabilityBoundingSet": "",
        "Service.RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
        "Service.SocketBindDeny": "any",
        "Service.MemoryDenyWriteExecute": "yes",
        "Service.ProtectSystem": "strict",
    },
    (DAEMON, ONCE): {
        "Unit.RequiresMountsFor": "/opt/teckochecker /etc/teckochecker",
        "Service.User": "teckochecker",
        "Service.StateDirectory": "teckochecker",
        "Service.LoadCredential": "teckochecker.key:/etc/teckochecker/teckochecker.key",
    },
    (TEMPLATE,): {
        "Unit.RequiresMountsFor": "/opt/teckochecker /etc/teckochecker/%i",
        "Service.User": "teckochecker-%i",
        "Service.StateDirectory": "teckochecker-%i",
        "Service.LoadCredential": "teckochecker.key:/etc/teckochecker/%i/teckochecker.key",
        "Service.ExecStart": f"{PROGRAM} --config /etc/teckochecker/%i/config.yaml",
    },
    # Crashes, hangs and a held state file (75) restart it, always; a config error (2) does not.
    (DAEMON, TEMPLATE): {
        "Service.Type": "notify",
        "Service.NotifyAccess": "main",
        "Service.ExecReload": "/bin/sh -c 'kill -HUP $MAINPID'",
        "Service.Restart": "on-failure",
        "Service.RestartPreventExitStatus": "2",
        "Unit.StartLimitIntervalSec": "0",
        "Install.WantedBy": "multi-user.target",
    },
    (DAEMON,): {"Service.ExecStart": f"{PROGRAM} --config /etc/teckochecker/config.yaml"},
    (ONCE,): {
        "Service.ExecStart": f"{PROGRAM} --config /etc/teckochecker/config.yaml --once",
        "Service.Type": "oneshot",
        "Service.SuccessExitStatus": "75",
    },
    (TIMER,): {
        "Unit.Conflicts": DAEMON,
        "Unit.After": DAEMON,
        "Timer.OnCalendar": "*:0/5",
        "Timer.Persistent": "yes",
        "Install.WantedBy": "timers.target",
    },
}


@pytest.mark.parametrize(
    ("unit", "name", "value"),
    [
        (unit, name, value)
        for units, wanted in WANTED.items()
        for unit in units
        for name, value in wanted.items()
    ],
)
def test_what_others_depend_on(unit: str, name: str, value: str) -> None:
    """Users, paths, sandbox, restarts and turns are as the README and the program have them."""
    assert only(unit, name) == value


@needs_systemd
@pytest.mark.parametrize("unit", [DAEMON, "teckochecker@sales.service"])
def test_the_readmes_drop_in_for_published_files(runnable: Path, unit: str) -> None:
    """All of it is known to systemd; what it writes to is not removed when the daemon stops."""
    block = README.read_text(encoding="utf-8").partition("install -d ")[2].partition("```")[0]
    made, _, drop_in = block.partition("\n")
    folder = runnable / f"{unit}.d"
    folder.mkdir()
    (folder / "override.conf").write_text(drop_in.replace("YOUR-MAILER", "teckochecker-once"))
    result = analyze("verify", "--man=no", f"./{unit}", cwd=runnable)
    assert result == Outcome(0, "", "")
    directory = re.search("^ReadWritePaths=(.*)$", drop_in, re.MULTILINE)
    assert directory
    assert directory[1] in made.split()
    assert "RuntimeDirectory" not in drop_in


@pytest.mark.parametrize("unit", [DAEMON, TEMPLATE])
def test_what_is_installed_can_be_run_by_the_units_user(unit: str) -> None:
    """On a host with umask 027 that user could not enter the program's directory: 203/EXEC."""
    text = (UNITS / unit).read_text(encoding="utf-8")
    assert re.search(r"^#   umask 022; python3 -m venv ", text, re.MULTILINE)


def test_the_sandbox_is_the_same_everywhere() -> None:
    """A directive added to one service's sandbox is not forgotten in the others."""
    sandboxes = {
        text.partition("# --- Sandbox")[2].partition("\n[")[0].strip()
        for text in ((UNITS / unit).read_text(encoding="utf-8") for unit in SERVICES)
    }
    assert len(sandboxes) == 1
    assert sandboxes != {""}


@pytest.mark.parametrize("unit", [DAEMON, TEMPLATE])
def test_restarts_have_a_pace_and_hangs_an_end(unit: str) -> None:
    """RestartSec is the only brake without a start limit, WatchdogSec all that notices a hang."""
    assert seconds(only(unit, "Service.RestartSec")) >= 10
    assert seconds(only(unit, "Service.WatchdogSec")) >= 30


@pytest.mark.parametrize("unit", SERVICES)
def test_stopping_leaves_the_program_its_grace(unit: str) -> None:
    """A SIGKILL within the program's own grace would leave a POST's outcome unknown."""
    assert seconds(only(unit, "Service.TimeoutStopSec")) >= GRACE_S + 10


@pytest.mark.parametrize("unit", SERVICES)
def test_the_network_is_up_first(unit: str) -> None:
    """The first poll after a boot does not fail because there is no network yet."""
    assert "network-online.target" in only(unit, "Unit.After").split()


def test_passes_and_daemon_take_turns() -> None:
    """The daemon waits for a pass that runs, which has an end; the timer starts no other unit."""
    assert ONCE in only(DAEMON, "Unit.After").split()
    assert seconds(only(ONCE, "Service.TimeoutStartSec")) > 0
    assert "Timer.Unit" not in directives(TIMER)  # without it, a timer starts its namesake
