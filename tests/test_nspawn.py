"""The units for real: Debian 12 boots in a container, and the README is followed there as root.

The container (systemd-nspawn) shares this machine's network, so the simulator on its loopback is
OpenAI and Keboola to it. Its tree, made by debootstrap, stays in CACHE for the next run; what a
run writes lies in memory over it and goes with it. Only one container runs at a time. All of
it dies with the process that tests, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from harness import (
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PATIENCE_S,
    JsonObject,
    Outcome,
    Workspace,
    outcome_of,
    wait_until,
)
from simulator import Simulator

pytestmark = pytest.mark.long

CHECKOUT = Path(__file__).resolve().parent.parent
# Not below /var/tmp: what is old is removed from there, and half a tree would be left.
CACHE = Path("/var/cache/teckochecker-tests")
SUITE = "bookworm"
PYTHON = "3.11"  # the suite's
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,ca-certificates"
NEEDED = ("apt-get", "debootstrap", "nsenter", "setpriv", "systemd-nspawn", "unshare")
BUILD_S = 600.0
BOOT_S = 60.0

ROOTS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VENV = "/opt/teckochecker/.venv"
DAEMON = "teckochecker.service"
TIMER = "teckochecker-once.timer"
# Everything that this file may have put into the machine but for the program itself.
CLEAN = """
systemctl stop 'teckochecker*' --all
systemctl disable -q teckochecker.service teckochecker-once.timer 2>/dev/null
rm -rf /etc/teckochecker /etc/systemd/system/teckochecker* /etc/systemd/system/*/teckochecker*
rm -rf /var/lib/teckochecker* /var/lib/private/teckochecker* /var/lib/systemd/timers
systemctl daemon-reload
systemctl reset-failed
"""


# ---- what the documents say ----


def readme_blocks() -> list[list[str]]:
    """The commands of the README's section on services, block by block."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## As a service\n")[2].partition("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"(?ms)^```sh\n(.*?)^```", section)]


def header_commands(unit: str) -> list[str]:
    """The commands that a unit's first lines name."""
    header = (CHECKOUT / "systemd" / unit).read_text(encoding="utf-8").partition("[Unit]")[0]
    return re.findall(r"^#   (\S.*)$", header, re.MULTILINE)


# ---- the machine ----


class CannotBoot(Exception):  # noqa: N818 - a reason to skip
    """This machine cannot make or boot such a container; the message says why."""


def tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])


def tied(*command: str) -> list[str]:
    """The command as one that dies with the process that starts it, and all that it has begun."""
    apart = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", *apart, *command]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def locked() -> Iterator[None]:
    """Holds a lock in the cache: what it guards is done by one run at a time."""
    with (CACHE / "machine.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(path: Path, *command: str) -> Path:
    """The directory that the command makes if it is not there yet: all of it or nothing."""
    part = path.with_name(path.name + ".part")
    if not path.is_dir():
        subprocess.run(["rm", "-rf", "--one-file-system", part], check=True)
        build = [argument.replace(str(path), str(part)) for argument in command]
        done = outcome_of(tied(*build), env=os.environ, timeout=BUILD_S)
        if done.code:
            raise CannotBoot(f"no {path.name}: {tail(done.stdout + done.stderr)}")
        part.rename(path)
    return path


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def mirror() -> str:
    """Where this machine's apt has the suite from."""
    targets = ["apt-get", "indextargets", "--format", "$(CODENAME) $(RELEASE) $(SITE)"]
    for line in outcome_of(targets).stdout.splitlines():
        codename, release, site = line.split(" ")
        if SUITE in (codename, release):
            return site
    raise CannotBoot(f"apt here knows no mirror of Debian {SUITE}")


def tree() -> Path:
    """The Debian that boots; made when it is not there, which takes a minute."""
    path = CACHE / f"{SUITE}-{digest(PACKAGES)}"
    if path.is_dir():
        return path
    options = ["--variant=minbase", f"--include={PACKAGES}"]
    return make(path, "debootstrap", *options, SUITE, str(path), mirror())


def wheels() -> Path:
    """What the program needs, in the versions that are tested here; and what builds it."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    ours = {found.name: found.version for found in distributions()}
    others = ("teckochecker", "pip", "setuptools")
    here = sorted(f"{name}=={version}" for name, version in ours.items() if name not in others)
    path = CACHE / f"wheels-{digest(*wanted, *here)}"
    constraints = CACHE / "constraints.txt"
    constraints.write_text("\n".join(here))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    fitting = ["--only-binary=:all:", f"--python-version={PYTHON}"]
    return make(path, *pip, *fitting, "-d", str(path), "-c", str(constraints), *wanted)


class Machine:
    """A booted Debian, in which commands run as root."""

    def __init__(self, checkout: Path) -> None:
        self.name = f"teckochecker-{os.getpid()}"
        self._log = checkout.with_name("console.log")
        command = [
            *("systemd-nspawn", "-q", "--directory", str(tree()), "--volatile=overlay"),
            *("--machine", self.name, "--register=no", "--console=pipe", "--notify-ready=yes"),
            *("--bind", f"{checkout}:/checkout", "--bind-ro", f"{wheels()}:/wheels"),
        ]
        if not Path("/run/systemd/system").is_dir():  # nobody to ask for a scope of its own
            command.append("--keep-unit")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(f"\0{self.name}")
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    tied(*command, "--boot"),
                    env=os.environ | {"NOTIFY_SOCKET": f"@{self.name}"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for pytest, which then ends this
                )
            try:
                self._leader = self._wait_for_boot(ready)
            except BaseException:
                self.close()
                raise
        self.root = Path(f"/proc/{self._leader}/root")

    def _wait_for_boot(self, ready: socket.socket) -> str:
        """The number of its first process here, as soon as it has booted."""
        deadline = time.monotonic() + BOOT_S
        ready.settimeout(0.1)
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                lines = ready.recv(4096).decode().splitlines()
            except TimeoutError:
                continue
            if "READY=1" in lines:
                (nspawn,) = children(self._process.pid)
                (leader,) = children(nspawn)
                return str(leader)
        raise CannotBoot(f"systemd does not boot here: {tail(self._log.read_text())}")

    def close(self) -> None:
        """Ends it, and all that runs in it."""
        with suppress(OSError):  # it has ended
            for nspawn in children(self._process.pid):
                for _ in range(2):  # the first one asks for a shutdown, the second one says now
                    os.kill(nspawn, signal.SIGTERM)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, *command: str, check: bool = True, **env: str) -> Outcome:
        """Runs a command in it, by default to success."""
        clean = {"PATH": ROOTS_PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        clean |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        enter = ["nsenter", "--all", "--target", self._leader]
        done = outcome_of([*enter, *command], env=clean | env, stdin=subprocess.DEVNULL)
        said = done.stdout + done.stderr
        assert done.code == 0 or not check, f"{command} ended with {done.code}:\n{said}"
        return done

    def follow(self, commands: Sequence[str]) -> str:
        """Types the commands in the checkout, in one shell, until one of them fails."""
        lines = [f"{{ {command}\n}} || exit" for command in commands]
        return self.run("bash", "-c", "\n".join(["cd /checkout", *lines])).stdout

    def run_as(self, user: str, *command: str) -> Outcome:
        """Runs a command as somebody else, by number, with no group beside the user's own."""
        who = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        return self.run("setpriv", *who, *command, check=False)

    def install(self, *units: str) -> None:
        """Puts units in place, as their headers and the README say."""
        files = " ".join(f"systemd/{unit}" for unit in units)
        self.follow([f"cp {files} /etc/systemd/system/ && systemctl daemon-reload"])

    def write_drop_in(self, unit: str, text: str) -> None:
        """Changes a unit, for the sake of time."""
        folder = self.root / f"etc/systemd/system/{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / "test.conf").write_text(text)
        self.run("systemctl", "daemon-reload")

    def show(self, unit: str) -> dict[str, str]:
        """What systemd knows about a unit."""
        pairs = self.run("systemctl", "show", unit).stdout.splitlines()
        return dict(pair.split("=", 1) for pair in pairs)

    def wait_for(self, unit: str, timeout: float = PATIENCE_S, **wanted: str) -> dict[str, str]:
        """What systemd knows about a unit, as soon as it is as wanted."""
        deadline = time.monotonic() + timeout
        while not wanted.items() <= (seen := self.show(unit)).items():
            if time.monotonic() > deadline:
                last = {name: seen.get(name) for name in ("ActiveState", "SubState", *wanted)}
                raise TimeoutError(f"{unit} is not as wanted, {wanted}, but {last}")
            time.sleep(0.05)
        return seen

    def journal(self, *which: str) -> str:
        """The messages of this test."""
        return self.run("journalctl", "-q", "-o", "cat", *which).stdout


class Site(Workspace):
    """A directory below /etc/teckochecker, with a job's worth of config and a key; and its unit."""

    def __init__(self, machine: Machine, sim: Simulator, instance: str = "") -> None:
        folder = Path("etc/teckochecker") / instance
        super().__init__(machine.root / folder, sim)
        self.machine = machine
        self.unit = f"teckochecker@{instance}.service" if instance else DAEMON
        self.config_path = f"/{folder}/config.yaml"
        self.key_path = f"/{folder}/teckochecker.key"
        self.state_folder = "/var/lib/teckochecker" + (f"-{instance}" if instance else "")
        self.state = machine.root / self.state_folder[1:] / "teckochecker.db"
        self.config["state"] = f"{self.state_folder}/teckochecker.db"

    def write(self, text: str | None = None) -> None:
        """Puts the config in place as a whole; the dynamic user can read it."""
        new = self.path.with_name(".new")
        new.write_text(self.text() if text is None else text)
        new.chmod(0o644)
        new.replace(self.path)

    def edit_as_a_person(self) -> None:
        """Changes what `init` has written, with the tokens in plain, as an editor does."""
        secrets = {
            "openai": self.openai_secret(OPENAI_KEY) | {"value": OPENAI_KEY},
            "keboola": self.keboola_secret(KEBOOLA_TOKEN) | {"value": KEBOOLA_TOKEN},
        }
        assert self.path.stat().st_mode & 0o777 == 0o600
        self.path.write_text(yaml.safe_dump(self.config | {"secrets": secrets}))

    def run(self, *arguments: str, **env: str) -> Outcome:
        """Runs the program as root."""
        program = [f"{VENV}/bin/teckochecker", "--config", self.config_path]
        return self.machine.run(*program, *arguments, check=False, **env)

    def status(self) -> JsonObject:
        outcome = self.run("status", "--json")
        assert outcome.code == 0, outcome.stderr
        document: JsonObject = json.loads(outcome.stdout)
        return document

    def systemctl(self, *arguments: str, check: bool = True) -> Outcome:
        return self.machine.run("systemctl", *arguments, self.unit, check=check)

    def launch(self) -> dict[str, str]:
        """Writes the config and starts the unit; what systemd knows about it when it is active."""
        self.write()
        self.systemctl("start")
        shown = self.show()
        assert shown["ActiveState"] == "active"
        return shown

    def show(self) -> dict[str, str]:
        return self.machine.show(self.unit)

    def events(self, name: str) -> list[JsonObject]:
        """All events of a name that the journal has of this unit."""
        lines = self.machine.journal("-u", self.unit).splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in events if event["event"] == name]

    def wait_for_events(self, name: str, count: int) -> None:
        what = f"{count} events {name}"
        wait_until(lambda: len(self.events(name)) >= count, what, every=0.05)

    def wait_for_trigger(self, name: str) -> None:
        """Waits until the state file knows the Keboola job's end; there is no other one."""
        wait_until(lambda: self.statuses().get(name) == "completed", f"{name} completed")
        self.assert_one_job(name)

    def files(self) -> list[tuple[str, int, str]]:
        """Name, user and mode of all in the state directory, and of itself."""
        found = self.machine.run("find", f"{self.state_folder}/", "-printf", "%f %U %m\n").stdout
        rows = [line.rsplit(" ", 2) for line in found.splitlines()]
        return [(name, int(user), mode) for name, user, mode in rows]


def why_not() -> str:
    """Why this machine cannot do it, as far as that can be said without trying."""
    missing = [program for program in NEEDED if not shutil.which(program)]
    if os.geteuid() != 0:
        return "only root can boot a container"
    return f"not installed: {', '.join(missing)}" if missing else ""


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The machine, with the program installed by the README's first command."""
    if reason := why_not():
        pytest.skip(reason)
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    checkout = tmp_path_factory.mktemp("machine") / "checkout"
    checkout.mkdir()
    for name in ("teckochecker.py", "pyproject.toml", "README.md", "config.example.yaml"):
        shutil.copy(CHECKOUT / name, checkout)
    shutil.copytree(CHECKOUT / "systemd", checkout / "systemd")
    with locked():  # two of them would share a control group
        try:
            machine = Machine(checkout)
        except CannotBoot as error:
            pytest.skip(str(error))
        with closing(machine):
            machine.follow(readme_blocks()[0][:1])
            yield machine


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """The machine without config, units, state and journal; afterwards, no bug was met in it."""
    booted.run("bash", "-c", CLEAN, check=False)
    booted.run("journalctl", "-q", "--rotate", "--vacuum-size=1")
    try:
        yield booted
    finally:
        log = booted.journal()
        print(log)
        booted.run("bash", "-c", CLEAN, check=False)
    assert "Traceback" not in log
    assert "internal_error" not in log


@pytest.fixture
def site(machine: Machine, sim: Simulator) -> Site:
    """The daemon's unit, ready to be started with one job whose batch goes on."""
    machine.install(DAEMON)
    site = Site(machine, sim)
    site.add_job("nightly", "batch_a", status="in_progress")
    site.write()
    return site


# ---- the README ----


def test_the_readme_leads_to_a_running_daemon(machine: Machine, sim: Simulator) -> None:
    """Its commands, and nothing else, end in a daemon that works and starts with the machine."""
    first, second = readme_blocks()
    machine.follow(first[1:])  # the fixture has run what stands before
    folder = machine.root / "etc/teckochecker"
    key = (folder / "teckochecker.key").read_text()
    site = Site(machine, sim)
    site.write_file(site.key_file, key)
    site.add_job("nightly", "batch_a")
    site.edit_as_a_person()
    machine.follow(second)
    site.wait_for_trigger("nightly")
    shown = site.show()
    assert (shown["ActiveState"], shown["UnitFileState"]) == ("active", "enabled")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"config.yaml": 0o644, "teckochecker.key": 0o600}
    text = (folder / "config.yaml").read_text()
    assert [secret for secret in (OPENAI_KEY, KEBOOLA_TOKEN) if secret in text] == []


# ---- the daemon's unit ----


def test_it_is_active_once_it_is_ready(site: Site) -> None:
    """While another process has the state it is not, and is tried again; then it is."""
    machine = site.machine
    machine.write_drop_in(site.unit, "[Service]\nRestartSec=100ms\n")
    site.launch()
    site.systemctl("stop")
    before = site.show()
    assert (before["ActiveState"], before["Result"]) == ("inactive", "success")
    hold = f"exec 9<>{site.state_folder}/teckochecker.db.lock; flock 9; echo held; exec sleep 1d"
    machine.run("systemd-run", "-q", "--unit=teckochecker-holder", "bash", "-c", hold)
    wait_until(lambda: "held" in machine.journal("-u", "teckochecker-holder"), "the lock")
    site.systemctl("start", "--no-block")
    machine.wait_for(site.unit, SubState="start", ExecMainStatus="0")  # it runs, and waits
    shown = machine.wait_for(site.unit, NRestarts="2", ExecMainStatus="75")
    active_at = "ActiveEnterTimestampMonotonic"
    assert (shown["ActiveState"], shown[active_at]) == ("activating", before[active_at])
    machine.run("systemctl", "stop", "teckochecker-holder")
    shown = machine.wait_for(site.unit, ActiveState="active")
    assert shown["StatusText"] == "1 active"


def test_a_hung_daemon_is_restarted(site: Site) -> None:
    """The watchdog leaves alone what works, and ends and starts anew what stands still."""
    drop_in = "[Service]\nWatchdogSec=3s\nRestartSec=100ms\n"
    site.machine.write_drop_in(site.unit, drop_in)
    begun = site.launch()
    site.wait_for_looks("batch_a", 5)  # one second apart
    assert site.show()["MainPID"] == begun["MainPID"]
    site.systemctl("kill", "--kill-who=main", "--signal=STOP")
    shown = site.machine.wait_for(site.unit, NRestarts="1", ActiveState="active")
    assert shown["MainPID"] != begun["MainPID"]
    assert "Watchdog timeout" in site.machine.journal("-u", site.unit)
    site.sim.finish("batch_a")
    site.wait_for_trigger("nightly")


def test_a_broken_config_is_not_tried_again(site: Site) -> None:
    """The unit fails for good with 2, says why, and starts once the config is mended."""
    site.machine.write_drop_in(site.unit, "[Service]\nRestartSec=100ms\n")
    site.write("jobs: [\n")
    assert site.systemctl("start", check=False).code == 1
    shown = site.show()  # one that waits for a restart would be "activating"
    assert (shown["ActiveState"], shown["Result"]) == ("failed", "exit-code")
    assert (shown["ExecMainStatus"], shown["NRestarts"]) == ("2", "0")
    assert "/etc/teckochecker/config.yaml:2:1: " in site.machine.journal("-u", site.unit)
    site.launch()


def test_the_key_comes_through_systemd_alone(site: Site) -> None:
    """Its user can read neither file nor environment for the key, and works with its own copy."""
    shown = site.launch()
    user, folder = shown["UID"], f"/run/credentials/{site.unit}"
    assert user not in ("0", "[not set]")
    info = site.key_file.stat()
    assert (info.st_uid, info.st_mode & 0o777) == (0, 0o600)
    denied = site.machine.run_as(user, "cat", site.key_path)
    assert (denied.stdout, "Permission denied" in denied.stderr) == ("", True)
    environment = (site.machine.root / "proc" / shown["MainPID"] / "environ").read_text()
    assert f"CREDENTIALS_DIRECTORY={folder}\0" in environment
    assert (site.key in environment, "TECKOCHECKER_KEY=" in environment) == (False, False)
    copy = f"{folder}/teckochecker.key"
    assert site.machine.run_as(user, "cat", copy).stdout == site.key
    assert site.machine.run_as("65534", "cat", copy).code == 1
    site.key_file.rename(site.key_file.with_name("away.key"))
    site.systemctl("reload")
    site.wait_for_events("config_loaded", 2)
    site.sim.finish("batch_a")
    site.wait_for_trigger("nightly")
    log = site.machine.journal()
    assert [text for text in (site.key, OPENAI_KEY, KEBOOLA_TOKEN) if text in log] == []


def test_root_asks_and_decides_while_the_daemon_runs(site: Site) -> None:
    """`status`, `logs` and `retry` as root are heard; all state stays the daemon's user's alone."""
    user = site.launch()["UID"]
    site.sim.finish("batch_a")
    site.wait_for_trigger("nightly")
    assert "nightly" in site.run("status").stdout
    assert "nightly: started Keboola job" in site.run("logs", "nightly").stdout
    retried = site.run("retry", "nightly", "--force")
    assert retried.code == 0, retried.stderr
    site.sim.wait_for(lambda: len(site.started("nightly")) == 2, PATIENCE_S)
    files = site.files()
    assert {Path(name).name for name, _, _ in files} >= {"teckochecker.db", "teckochecker.db-wal"}
    assert [row for row in files if row[1] != int(user) or not row[2].endswith("00")] == []
    for name, _, _ in files:
        assert site.machine.run_as("65534", "test", "-e", name).code == 1


# ---- the one-shot unit and its timer ----


def test_the_timer_and_the_daemon_take_turns(site: Site) -> None:
    """The timer's header's commands end the daemon, whose start ends the timer; one state."""
    site.launch()
    site.sim.finish("batch_a")
    site.wait_for_trigger("nightly")
    site.systemctl("enable")
    copy, *others = header_commands(TIMER)
    site.machine.follow([copy])
    every_second = "OnCalendar=\nOnCalendar=*:*:*\nAccuracySec=1ms\nRandomizedDelaySec=0\n"
    site.machine.write_drop_in(TIMER, f"[Timer]\n{every_second}")
    site.machine.follow(others)
    shown = site.show()
    assert (shown["ActiveState"], shown["UnitFileState"]) == ("inactive", "disabled")
    shown = site.machine.show(TIMER)
    assert (shown["ActiveState"], shown["UnitFileState"]) == ("active", "enabled")
    site.add_job("hourly", "batch_b")
    site.write()
    site.wait_for_trigger("hourly")
    site.systemctl("start")  # waits for a pass that is running
    assert site.machine.show(TIMER)["ActiveState"] == "inactive"
    assert site.show()["ActiveState"] == "active"
    site.machine.run("systemctl", "start", TIMER)
    assert site.show()["ActiveState"] == "inactive"
    site.assert_one_job("nightly")


# ---- the template ----


def test_two_instances_have_each_their_own_state(machine: Machine, sim: Simulator) -> None:
    """By the header's commands there are two daemons, with users and states of their own."""
    sites = {}
    for name in ("sales", "marketing"):
        _venv, init, *others = header_commands("teckochecker@.service")
        machine.follow([init.replace("sales", name)])
        key = (machine.root / "etc/teckochecker" / name / "teckochecker.key").read_text()
        sites[name] = site = Site(machine, sim, name)
        site.write_file(site.key_file, key)
        site.add_job(f"of-{name}", f"batch_{name}")
        site.edit_as_a_person()
        machine.follow([command.replace("sales", name) for command in others])
    for name, site in sites.items():
        site.wait_for_trigger(f"of-{name}")
        assert site.statuses() == {f"of-{name}": "completed"}
        assert (site.show()["ActiveState"], site.show()["UnitFileState"]) == ("active", "enabled")
    users = {name: site.show()["UID"] for name, site in sites.items()}
    assert len(set(users.values())) == 2
    for name, other in (("sales", "marketing"), ("marketing", "sales")):
        for path in (sites[other].state_folder + "/teckochecker.db", sites[other].key_path):
            assert machine.run_as(users[name], "cat", path).code == 1
