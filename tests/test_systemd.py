"""The units in systemd/: what systemd says about them, and the directives others depend on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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


def analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


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
    assert (result.stdout, result.returncode) == ("", 0)


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES)
def test_exposure_is_at_most_1_5(runnable: Path, unit: str) -> None:
    """The sandbox leaves little but the network open (the threshold is in tenths)."""
    result = analyze("security", "--offline=true", "--threshold=15", f"./{unit}", cwd=runnable)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("unit", [*SERVICES, TIMER])
def test_a_unit_begins_with_what_it_is_and_how_to_install_it(unit: str) -> None:
    """A person who opens a unit reads first what it is for and which commands install it."""
    header = (UNITS / unit).read_text(encoding="utf-8").partition("[Unit]")[0]
    assert header.startswith("# ")
    assert "# Install" in header
    assert all(line.startswith("#") for line in header.split("\n") if line)


@pytest.mark.parametrize(
    ("unit", "name", "value"),
    [
        (DAEMON, "Service.ExecStart", f"{PROGRAM} --config /etc/teckochecker/config.yaml"),
        (TEMPLATE, "Service.ExecStart", f"{PROGRAM} --config /etc/teckochecker/%i/config.yaml"),
        (ONCE, "Service.ExecStart", f"{PROGRAM} --config /etc/teckochecker/config.yaml --once"),
        (DAEMON, "Unit.RequiresMountsFor", "/opt/teckochecker /etc/teckochecker"),
        (TEMPLATE, "Unit.RequiresMountsFor", "/opt/teckochecker /etc/teckochecker/%i"),
        (ONCE, "Unit.RequiresMountsFor", "/opt/teckochecker /etc/teckochecker"),
        (DAEMON, "Service.User", "teckochecker"),
        (TEMPLATE, "Service.User", "teckochecker-%i"),
        (ONCE, "Service.User", "teckochecker"),
        (DAEMON, "Service.StateDirectory", "teckochecker"),
        (TEMPLATE, "Service.StateDirectory", "teckochecker-%i"),
        (ONCE, "Service.StateDirectory", "teckochecker"),
        *(
            (unit, "Service.LoadCredential", f"teckochecker.key:{path}/teckochecker.key")
            for unit, path in [
                (DAEMON, "/etc/teckochecker"),
                (TEMPLATE, "/etc/teckochecker/%i"),
                (ONCE, "/etc/teckochecker"),
            ]
        ),
    ],
)
def test_paths_and_users(unit: str, name: str, value: str) -> None:
    """Daemon and one-shot share user, config, key and state; each instance has its own."""
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
    assert (result.stdout, result.returncode) == ("", 0)
    directory = re.search("^ReadWritePaths=(.*)$", drop_in, re.MULTILINE)
    assert directory
    assert directory[1] in made.split()
    assert "RuntimeDirectory" not in drop_in


@pytest.mark.parametrize("unit", [DAEMON, TEMPLATE])
def test_what_is_installed_can_be_run_by_the_units_user(unit: str) -> None:
    """On a host with umask 027 that user could not enter the program's directory: 203/EXEC."""
    text = (UNITS / unit).read_text(encoding="utf-8")
    assert re.search(r"^#   umask 022; python3 -m venv ", text, re.MULTILINE)


@pytest.mark.parametrize("unit", SERVICES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DynamicUser", "yes"),
        ("StateDirectoryMode", "0700"),
        ("UMask", "0077"),
        ("LimitCORE", "0"),
        ("CapabilityBoundingSet", ""),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("SocketBindDeny", "any"),
        ("MemoryDenyWriteExecute", "yes"),
        ("ProtectSystem", "strict"),
    ],
)
def test_every_service_has_the_sandbox(unit: str, name: str, value: str) -> None:
    """What protects secrets and state is in each service; the score does not know all of it."""
    assert only(unit, f"Service.{name}") == value


def test_the_sandbox_is_the_same_everywhere() -> None:
    """A directive added to one service's sandbox is not forgotten in the others."""
    sandboxes = {
        text.partition("# --- Sandbox")[2].partition("\n[")[0].strip()
        for text in ((UNITS / unit).read_text(encoding="utf-8") for unit in SERVICES)
    }
    assert len(sandboxes) == 1
    assert sandboxes != {""}


@pytest.mark.parametrize("unit", [DAEMON, TEMPLATE])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Service.Type", "notify"),
        ("Service.NotifyAccess", "main"),
        ("Service.ExecReload", "/bin/sh -c 'kill -HUP $MAINPID'"),
        ("Service.Restart", "on-failure"),
        ("Service.RestartPreventExitStatus", "2"),
        ("Unit.StartLimitIntervalSec", "0"),
        ("Install.WantedBy", "multi-user.target"),
    ],
)
def test_the_daemon_is_kept_running(unit: str, name: str, value: str) -> None:
    """Crashes, hangs and a held state file (75) restart it, always; a config error (2) does not."""
    assert only(unit, name) == value


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
    assert only(unit, "Unit.Wants") == "network-online.target"
    assert "network-online.target" in only(unit, "Unit.After").split()


def test_the_daemon_waits_for_a_running_pass() -> None:
    """Starting the daemon during a pass of the timer waits for its end instead of exiting 75."""
    assert ONCE in only(DAEMON, "Unit.After").split()


def test_the_one_shot_unit_is_no_failure_when_the_state_file_is_held() -> None:
    """A pass beside another one ends with 75: the work is being done; a hung pass has an end."""
    assert only(ONCE, "Service.Type") == "oneshot"
    assert only(ONCE, "Service.SuccessExitStatus") == "75"
    assert seconds(only(ONCE, "Service.TimeoutStartSec")) > 0


def test_the_timer_takes_turns_with_the_daemon() -> None:
    """Starting the timer stops the daemon first, and the other way round."""
    assert only(TIMER, "Unit.Conflicts") == DAEMON
    assert only(TIMER, "Unit.After") == DAEMON
    assert only(TIMER, "Timer.OnCalendar") == "*:0/5"
    assert only(TIMER, "Timer.Persistent") == "yes"
    assert only(TIMER, "Install.WantedBy") == "timers.target"
    # Without Unit= a timer starts the service of its own name.
    assert "Timer.Unit" not in directives(TIMER)
