"""The trigger's protocol, proved from outside: a real process, real sockets, a real state file.

Nothing here knows how the program is made. What counts is what the simulator was sent, with which
token and how often, what `status --json` says, and exit codes. Another program can be put to the
same tests by `TECKOCHECKER_PROGRAM`.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import (
    COMPONENT,
    KEBOOLA_TOKEN,
    OPENAI_KEY,
    PATIENCE_S,
    PROGRAM,
    Daemon,
    JsonObject,
    Outcome,
    Workspace,
    add_foreign_jobs,
    outcome_of,
    variables,
    wait_until,
)
from simulator import Request, Simulator

HOUR_S = 3600
ALPHA, BETA = 4711, 4712  # two projects on one stack
ALPHA_TOKEN, SECOND_ALPHA_TOKEN = "4711-1-alphaalpha", "4711-2-secondalpha"
BETA_TOKEN = "4712-1-betabetabeta"
EXCEPTION_ID = "job-queue-api-1a2b"
ERROR_500 = f'{{"error": "Application error", "code": 500, "exceptionId": "{EXCEPTION_ID}"}}'

# The program, to which all clocks are so many seconds later than they are.
LATER = """
import runpy, sys, time

seconds = float(sys.argv[1])
del sys.argv[:2]
clocks = {time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME}

def shift(name, unit):
    real = getattr(time, name)
    setattr(time, name, lambda: real() + type(real())(seconds * unit))

def shift_clock(name, unit):
    real = getattr(time, name)
    by = {clock: type(real(clock))(seconds * unit) for clock in clocks}
    setattr(time, name, lambda clock: real(clock) + by.get(clock, 0))

for name in ("time", "monotonic"):
    shift(name, 1)
    shift(name + "_ns", 10**9)
shift_clock("clock_gettime", 1)
shift_clock("clock_gettime_ns", 10**9)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ---- what is seen from outside ----


def shown(space: Workspace) -> dict[str, JsonObject]:
    """The runs by name, as `status --json` of a process of its own shows them."""
    said = space.run("status", "--json")
    jobs = json.loads(said.stdout)["jobs"] if said.stdout.startswith("{") else []
    return {job["name"]: job for job in jobs}


def wait_shown(
    space: Workspace, condition: Callable[[JsonObject], object], what: str
) -> dict[str, JsonObject]:
    """Waits until `status --json` shows the runs of the config as the condition wants."""

    def found() -> dict[str, JsonObject] | None:
        jobs = shown(space)
        return jobs if all(n in jobs and condition(jobs[n]) for n in space.jobs) else None

    jobs: dict[str, JsonObject] = wait_until(found, what, 3 * PATIENCE_S)  # some have megabytes
    return jobs


def trigger_of(job: JsonObject) -> JsonObject:
    """The trigger, or nothing."""
    return job.get("trigger") or {}


def words(job: JsonObject) -> str:
    """What a run says of its errors."""
    return f"{job.get('error')} {trigger_of(job).get('error')}"


def is_stuck(job: JsonObject) -> bool:
    return job["status"] == "triggering" and words(job) != "None None"


def is_sent(job: JsonObject) -> bool:
    return bool(trigger_of(job).get("state") == "sent")


def wait_stuck(space: Workspace) -> dict[str, JsonObject]:
    """Waits until all runs of the config say why they cannot start."""
    return wait_shown(space, is_stuck, "all stuck")


def wait_sent(space: Workspace) -> dict[str, JsonObject]:
    """Waits until all runs of the config have their Keboola job."""
    return wait_shown(space, is_sent, "all sent")


def token_of(request: Request) -> str:
    return request.headers.get("x-storageapi-token", "")


def run_of(request: Request) -> str:
    """The TeckoChecker job that a POST speaks for."""
    return variables(request.json())["teckochecker_job"]


def posts(sim: Simulator, name: str = "") -> list[Request]:
    """The POSTs that came, whatever became of them, of one TeckoChecker job or of all."""
    found = [request for request in sim.requests if request.route == "queue.create"]
    return [request for request in found if not name or run_of(request) == name]


def queue_tokens(sim: Simulator) -> set[str]:
    """With which tokens the queue was asked for anything."""
    return {token_of(r) for r in sim.requests if r.route.startswith("queue.")}


def post_of(config: str) -> str:
    """What a fault's `match` finds in the POSTs for one configuration."""
    return f'"config":"{config}"'


def wait_for_posts(sim: Simulator, name: str, count: int) -> list[Request]:
    sim.wait_for(lambda: len(posts(sim, name)) >= count, PATIENCE_S)
    return posts(sim, name)


def gaps(requests: Sequence[Request]) -> list[float]:
    """The seconds between one request and the next."""
    return [later.at - earlier.at for earlier, later in itertools.pairwise(requests)]


def closed_port() -> str:
    """An address where connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def run_later(space: Workspace, later_s: float, *arguments: str) -> Outcome:
    """Runs the program as it would run so many seconds from now."""
    space.write()
    program = [str(PROGRAM), "--config", str(space.path), *arguments]
    command = [sys.executable, "-c", LATER, str(later_s), *program]
    done = outcome_of(command, cwd=space.directory)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def take_config(space: Workspace, daemon: Daemon, way: str) -> Daemon:
    """Lets the program take the config as it is now; by force where it cannot search then."""
    if way == "restart":
        assert daemon.stop() == 0
        return space.daemon()
    if way == "retry --force":
        space.sim.fault("queue.search", "status", None, code=403)
        space.reload(daemon)
        for name in space.jobs:
            assert space.run("retry", name, "--force").code == 0
    else:
        space.reload(daemon)
    return daemon


def hurry(space: Workspace, daemon: Daemon) -> None:
    """Ends all backoffs, by a change that means nothing."""
    interval = space.config["defaults"]["poll_interval"]
    space.config["defaults"]["poll_interval"] = "2s" if interval == "1s" else "1s"
    space.reload(daemon)


# ---- an intent that was never sent follows the config ----

WRONG_STACKS = ("refused", "401", "403", "404", "500")


@contextmanager
def another_stack() -> Iterator[Simulator]:
    """A stack that answers each kind's token in that kind's way."""
    with Simulator() as sim:
        for kind in ("403", "404", "500"):
            sim.add_token(f"token-of-{kind}")
            for route in ("storage.*", "queue.*"):
                sim.fault(route, "status", None, match=f"token-of-{kind}", code=int(kind))
        yield sim


@pytest.mark.long
@pytest.mark.parametrize("way", ["reload", "restart", "retry --force", "rename", "new name"])
def test_mistyped_stack(workspace: Workspace, way: str) -> None:
    """A job whose stack was mistyped starts once, at the right one, when that is corrected."""
    sim, space = workspace.sim, workspace
    with another_stack() as elsewhere:
        configs = mistype_stacks(space, elsewhere)
        daemon = space.daemon()
        wait_stuck(space)
        if way in {"rename", "new name"}:  # first the name and then the stack, or both at once
            for kind in WRONG_STACKS:
                space.jobs[f"new-{kind}"] = space.jobs.pop(f"job-{kind}")
        if way == "rename":
            space.reload(daemon)
            wait_stuck(space)
        correct_stacks(space)
        take_config(space, daemon, way)
        sim.wait_for(lambda: {job["config"] for job in sim.jobs} == configs, PATIENCE_S)
        wait_sent(space)
        assert Counter(job["config"] for job in sim.jobs) == dict.fromkeys(configs, 1)
        assert len(posts(sim)) == len(configs)
        assert posts(elsewhere) == []


@pytest.mark.long
def test_mistyped_stack_over_passes(workspace: Workspace) -> None:
    """The next pass of `--once` starts what the last one had looked for at a mistyped stack."""
    with another_stack() as elsewhere:
        configs = mistype_stacks(workspace, elsewhere)
        assert workspace.once().code == 1
        correct_stacks(workspace)
        assert workspace.once().code == 0
        assert sorted(job["config"] for job in workspace.sim.jobs) == sorted(configs)
        assert posts(elsewhere) == []


def mistype_stacks(space: Workspace, elsewhere: Simulator) -> set[str]:
    """Adds a job for each kind of wrong stack; returns their configurations."""
    for kind in WRONG_STACKS:
        space.sim.add_token(f"token-of-{kind}")
        secret = space.secrets[f"secret-{kind}"] = space.keboola_secret(f"token-of-{kind}")
        secret["stack_url"] = closed_port() if kind == "refused" else elsewhere.stack_url
        space.add_job(f"job-{kind}", f"batch_{kind}", keboola_secret=f"secret-{kind}")
    return set(space.jobs)


def correct_stacks(space: Workspace) -> None:
    for kind in WRONG_STACKS:
        space.secrets[f"secret-{kind}"]["stack_url"] = space.sim.stack_url


CHANGES: dict[str, JsonObject] = {
    "config": {"config_id": "another"},
    "component": {"component_id": "keboola.python-transformation-v2"},
    "branch": {"branch_id": "789"},
    "mode": {"mode": "forceRun"},
    "rows": {"config_row_ids": ["11", "22"]},
    "variables": {"variables": {"dataset": "products"}},
    "project": {"keboola_secret": "beta"},
}


def change_stuck_jobs(space: Workspace) -> None:
    """Makes each of the changes to its job, which is stuck until then."""
    space.sim.add_token(BETA_TOKEN, BETA, "Beta")
    space.secrets["beta"] = space.keboola_secret(BETA_TOKEN)
    for name in CHANGES:
        space.add_job(name, f"batch_{name}")
    daemon = space.daemon()
    wait_stuck(space)
    for name, change in CHANGES.items():
        space.jobs[name] |= change
    space.reload(daemon)
    space.sim.clear_faults()
    hurry(space, daemon)


@pytest.mark.long
def test_unsent_intent_follows_the_config(workspace: Workspace) -> None:
    """Whatever of target and payload changes while nothing was sent is in the one POST."""
    sim = workspace.sim
    sim.fault("queue.search", "status", None, code=403)
    change_stuck_jobs(workspace)
    wait_sent(workspace)
    bodies = {name: [request.json() for request in posts(sim, name)] for name in CHANGES}
    assert {name: len(found) for name, found in bodies.items()} == dict.fromkeys(CHANGES, 1)
    assert bodies["config"][0]["config"] == "another"
    assert bodies["component"][0]["component"] == "keboola.python-transformation-v2"
    assert bodies["branch"][0]["branchId"] == "789"
    assert bodies["mode"][0]["mode"] == "forceRun"
    assert bodies["rows"][0]["configRowIds"] == ["11", "22"]
    assert variables(bodies["variables"][0])["dataset"] == "products"
    assert bodies["variables"][0]["component"] == COMPONENT
    assert [token_of(request) for request in posts(sim, "project")] == [BETA_TOKEN]
    assert [job["project"]["name"] for job in workspace.started("project")] == ["Beta"]


@pytest.mark.long
def test_sent_trigger_keeps_its_target(workspace: Workspace) -> None:
    """Once a POST went out, a later one repeats it, whatever the config says by then."""
    sim = workspace.sim
    for name in CHANGES:
        sim.fault("queue.create", "reset_before", match=post_of(name))
        sim.fault("queue.search", "status", None, skip=1, match=f"configId={name}", code=403)
    change_stuck_jobs(workspace)
    for name in CHANGES:
        first, second = wait_for_posts(sim, name, 2)
        assert (first.json(), token_of(first)) == (second.json(), token_of(second)), name
        assert len(workspace.started(name)) == 1, name


@pytest.mark.long
@pytest.mark.parametrize("way", ["reload", "restart", "retry --force"])
def test_revoked_token(workspace: Workspace, way: str) -> None:
    """A job whose token was revoked before its start uses the new one alone."""
    sim, space = workspace.sim, workspace
    for name in ("revoked", "forbidden", "replaced"):
        if name == "forbidden":
            sim.add_token("old-forbidden")
            sim.fault("queue.*", "status", None, match="old-forbidden", code=403)
        sim.add_token(f"new-{name}")
        space.secrets[name] = space.keboola_secret(f"old-{name}")
        space.add_job(name, f"batch_{name}", keboola_secret=name)
    daemon = space.daemon()
    wait_stuck(space)
    space.secrets["replaced"] = space.keboola_secret("new-replaced")
    for name in ("revoked", "forbidden"):  # the old entry stays in the file
        space.secrets[f"new-{name}"] = space.keboola_secret(f"new-{name}")
        space.jobs[name]["keboola_secret"] = f"new-{name}"
    take_config(space, daemon, way)
    wait_sent(space)
    for name in space.jobs:
        assert [token_of(request) for request in posts(sim, name)] == [f"new-{name}"]


# ---- two projects on one stack ----


@pytest.fixture
def projects(workspace: Workspace) -> Workspace:
    """A config with a secret of each of two projects, the other project's first."""
    workspace.sim.add_token(ALPHA_TOKEN, ALPHA, "Alpha")
    workspace.sim.add_token(SECOND_ALPHA_TOKEN, ALPHA, "Alpha")
    workspace.sim.add_token(BETA_TOKEN, BETA, "Beta")
    del workspace.secrets["keboola"]
    workspace.secrets["beta"] = workspace.keboola_secret(BETA_TOKEN)
    workspace.secrets["alpha"] = workspace.keboola_secret(ALPHA_TOKEN)
    workspace.config["defaults"]["keboola_secret"] = "alpha"
    return workspace


def lose_answers(space: Workspace) -> Daemon:
    """Two jobs whose POST's outcome is unknown: one was not carried out, the other was."""
    sim = space.sim
    for name, kind in (("undone", "reset_before"), ("done", "reset_after")):
        space.add_job(name, f"batch_{name}")
        sim.fault("queue.create", kind, match=post_of(name))
        sim.fault("queue.search", "status", None, skip=1, match=f"configId={name}", code=403)
    daemon = space.daemon()
    wait_stuck(space)
    assert len(posts(sim)) == 2
    return daemon


LEAVING = [("another secret", "reload"), ("another secret", "restart"), ("another value", "reload")]


def leave_alpha(space: Workspace, change: str) -> None:
    """Takes the first project's token out of the config; from now on it opens nothing."""
    space.sim.revoke_token(ALPHA_TOKEN)
    space.sim.clear_faults()
    if change == "another value":
        space.secrets["alpha"] = space.keboola_secret(BETA_TOKEN)
    else:
        del space.secrets["alpha"]
        space.config["defaults"]["keboola_secret"] = "beta"


@pytest.mark.long
@pytest.mark.parametrize(("change", "way"), LEAVING)
def test_no_token_of_the_project(projects: Workspace, change: str, way: str) -> None:
    """A trigger waits for a token of its project, under any name, and its error names that."""
    sim, space = projects.sim, projects
    daemon = lose_answers(space)
    leave_alpha(space, change)
    daemon = take_config(space, daemon, way)

    def is_decided(job: JsonObject) -> object:
        return re.search(f"{ALPHA}|Alpha", words(job)) or BETA_TOKEN in queue_tokens(sim)

    jobs = wait_shown(space, is_decided, "with the project in their errors")
    assert {job["status"] for job in jobs.values()} == {"triggering"}
    assert BETA_TOKEN not in queue_tokens(sim)

    space.secrets["second-alpha"] = space.keboola_secret(SECOND_ALPHA_TOKEN)
    space.reload(daemon)
    wait_sent(space)
    for name in ("undone", "done"):
        assert len(space.started(name)) == 1, name
    assert [token_of(r) for r in posts(sim, "undone")] == [ALPHA_TOKEN, SECOND_ALPHA_TOKEN]
    assert [token_of(r) for r in posts(sim, "done")] == [ALPHA_TOKEN]
    assert BETA_TOKEN not in queue_tokens(sim)


@pytest.mark.long
def test_removed_job_is_searched_in_its_project(projects: Workspace) -> None:
    """Of a removed job an unknown trigger is searched for with its project's tokens alone."""
    sim, space = projects.sim, projects
    daemon = lose_answers(space)
    leave_alpha(space, "another secret")
    space.jobs.clear()
    space.secrets["second-alpha"] = space.keboola_secret(SECOND_ALPHA_TOKEN)
    space.reload(daemon)
    sim.wait_for(lambda: queue_tokens(sim) - {ALPHA_TOKEN}, PATIENCE_S)
    assert queue_tokens(sim) == {ALPHA_TOKEN, SECOND_ALPHA_TOKEN}
    assert len(posts(sim)) == 2


@pytest.mark.long
def test_project_that_is_not_known_yet(projects: Workspace) -> None:
    """As long as `tokens/verify` does not say whose a secret is, no trigger goes with it."""
    sim, space = projects.sim, projects
    daemon = lose_answers(space)
    leave_alpha(space, "another secret")
    space.secrets["second-alpha"] = space.keboola_secret(SECOND_ALPHA_TOKEN)
    sim.fault("storage.verify", "status", None, match=SECOND_ALPHA_TOKEN, code=403)
    mark = len(sim.requests)
    space.reload(daemon)

    def asked() -> set[tuple[str, str]]:
        return {(r.route, token_of(r)) for r in sim.requests[mark:]}

    sim.wait_for(lambda: ("storage.verify", SECOND_ALPHA_TOKEN) in asked(), PATIENCE_S)
    assert queue_tokens(sim) == {ALPHA_TOKEN}
    sim.clear_faults()
    hurry(space, daemon)
    wait_sent(space)
    for name in ("undone", "done"):
        assert len(space.started(name)) == 1, name
    assert queue_tokens(sim) == {ALPHA_TOKEN, SECOND_ALPHA_TOKEN}


# ---- the search ----

CLOCKS_H: dict[str, tuple[float, float]] = {  # Keboola's and OpenAI's, hours ahead of ours
    "keboola-two-behind": (-2, 0),
    "keboola-thirty-behind": (-30, 0),
    "keboola-thirty-ahead": (30, 0),
    "openai-thirty-ahead": (0, 30),
    "openai-thirty-behind": (0, -30),
    "ours-thirty-ahead": (-30, -30),
    "ours-thirty-behind": (30, 30),
    "apart": (-30, 30),
}


def test_clocks(workspace: Workspace) -> None:
    """With any of the three clocks hours off, a job whose answer was lost is found."""
    with ExitStack() as stack:
        worlds: dict[str, Simulator] = {}
        for name, (keboola_h, openai_h) in CLOCKS_H.items():
            sim = worlds[name] = stack.enter_context(Simulator())
            sim.set_clocks(openai_ahead_s=openai_h * HOUR_S, keboola_ahead_s=keboola_h * HOUR_S)
            sim.add_key(OPENAI_KEY)
            sim.add_token(KEBOOLA_TOKEN)
            sim.add_batch("batch_a", "completed")
            sim.fault("queue.create", "reset_after")
            openai = workspace.openai_secret(OPENAI_KEY) | {"base_url": sim.openai_url}
            keboola = workspace.keboola_secret(KEBOOLA_TOKEN) | {"stack_url": sim.stack_url}
            workspace.secrets |= {f"o-{name}": openai, f"k-{name}": keboola}
            keys = {"openai_secret": f"o-{name}", "keboola_secret": f"k-{name}"}
            workspace.jobs[name] = {"batch_ids": ["batch_a"], "config_id": name, **keys}
        workspace.daemon()
        wait_sent(workspace)
        found = {name: len(sim.jobs) for name, sim in worlds.items()}
        assert found == dict.fromkeys(CLOCKS_H, 1)
        assert {name: len(posts(sim)) for name, sim in worlds.items()} == found


def test_old_rows_without_variables(workspace: Workspace) -> None:
    """However many runs are ready, each older job of their configuration is read once."""
    sim = workspace.sim
    older = add_foreign_jobs(sim, "shared", 300, ago_s=1800)
    sim.search_hides_variables = True
    for number in range(30):
        workspace.add_job(f"job-{number}", f"batch_{number}", config_id="shared")

    def reads() -> list[str]:
        return [r.path.rpartition("/")[2] for r in sim.requests if r.route == "queue.get"]

    workspace.daemon()
    sim.wait_for(lambda: len(sim.jobs) == 330 or len(reads()) > 1000, 30)
    times = Counter(reads())
    assert max(times[job_id] for job_id in older) == 1
    names = Counter(variables(job).get("teckochecker_job") for job in sim.jobs)
    assert {names[name] for name in workspace.jobs} == {1}


EMPTY_ROWS: dict[str, Any] = {
    "null": None,
    "values-empty": {"values": []},
    "values-null": {"values": None},
    "object-empty": {},
    "list-empty": [],
}


def test_empty_variables_are_read(workspace: Workspace) -> None:
    """A row without values, in whatever form, is read by itself before a second POST."""
    sim = workspace.sim

    def empty(rows: list[JsonObject]) -> list[JsonObject]:
        return [row | {"variableValuesData": EMPTY_ROWS.get(row["config"])} for row in rows]

    def leave_out(rows: list[JsonObject]) -> list[JsonObject]:
        return [{k: v for k, v in row.items() if k != "variableValuesData"} for row in rows]

    sim.fault("queue.search", "json", None, match="configId=missing", transform=leave_out)
    sim.fault("queue.search", "json", None, transform=empty)
    names = ["missing", *EMPTY_ROWS]
    for name in names:
        workspace.add_job(name, f"batch_{name}")
        sim.fault("queue.create", "reset_after", match=post_of(name))
    # The old list says nothing, so that the rows decide.
    sim.fault("queue.list", "status", None, code=404)
    workspace.daemon()
    wait_sent(workspace)
    assert {name: len(posts(sim, name)) for name in names} == dict.fromkeys(names, 1)


def test_unreadable_old_jobs(workspace: Workspace) -> None:
    """An old job that may not be read, or is gone, is another's: it is told and stops nothing."""
    sim = workspace.sim
    sim.search_hides_variables = True
    sim.fault("queue.list", "status", None, code=404)
    kinds = {"forbidden": 403, "gone": 404, "forbidden-lost": 403, "gone-lost": 404}
    old = {}
    for name, code in kinds.items():
        workspace.add_job(name, f"batch_{name}")
        (old[name], _) = add_foreign_jobs(sim, name, 2, ago_s=1800)
        sim.fault("queue.get", "status", None, match=f"/jobs/{old[name]}", code=code)
        if name.endswith("lost"):
            sim.fault("queue.create", "reset_after", match=post_of(name))
    daemon = workspace.daemon()
    wait_sent(workspace)
    for name in kinds:
        assert (len(workspace.started(name)), len(posts(sim, name))) == (1, 1), name
    warnings = [line for line in daemon.lines if '"warning"' in line]
    for name, job_id in old.items():
        assert any(job_id in line for line in warnings), name


@pytest.mark.long
def test_old_jobs_that_cannot_be_read_now(workspace: Workspace) -> None:
    """An old job whose read failed otherwise leaves the search incomplete: nothing is sent."""
    sim = workspace.sim
    sim.search_hides_variables = True
    for code in (401, 429, 500):
        workspace.add_job(f"job-{code}", f"batch_{code}")
        (old,) = add_foreign_jobs(sim, f"job-{code}", 1, ago_s=1800)
        sim.fault("queue.get", "status", None, match=f"/jobs/{old}", code=code)
    daemon = workspace.daemon()
    wait_stuck(workspace)
    assert posts(sim) == []
    sim.clear_faults()
    hurry(workspace, daemon)
    wait_sent(workspace)
    assert len(posts(sim)) == 3


@pytest.mark.long
@pytest.mark.parametrize(("count", "size"), [(700, 38_000), (3, 9_000_000)])
def test_heavy_rows(workspace: Workspace, count: int, size: int) -> None:
    """A page over 16 MiB is read in smaller ones, and one Keboola job comes of it."""
    sim = workspace.sim
    for name in ("answered", "lost"):
        add_foreign_jobs(sim, name, count, ago_s=1800, configData={"script": "x" * size})
        workspace.add_job(name, f"batch_{name}")
    sim.fault("queue.create", "reset_after", match=post_of("lost"))
    workspace.daemon()
    wait_sent(workspace)
    for name in workspace.jobs:
        assert (len(posts(sim, name)), len(workspace.started(name))) == (1, 1)
        searches = [r.query for r in sim.requests if r.query.get("configId") == name]
        limits = [int(query.get("limit", "100")) for query in searches]
        assert len(searches) < 60
        assert min(limits) < max(limits)


# ---- what became of the POST ----

TOO_MANY: dict[str, JsonObject] = {
    "plain": {},
    "seconds": {"retry_after": 1},
    "date": {"retry_after_date": 1},
    "gateway": {"retry_after": 1, "body": "<html>Too Many Requests</html>"},
}


@pytest.mark.long
def test_429_after_it_was_handled(workspace: Workspace) -> None:
    """After a 429 the search decides: what was carried out is found, and the rest is repeated."""
    sim = workspace.sim
    workspace.config["limits"]["trigger_grace"] = "7s"
    sim.search_lag = 6.5  # just under the grace
    sim.fault("queue.list", "status", None, code=404)  # so that only the search can tell
    for name, options in TOO_MANY.items():
        for is_done in (True, False):
            run = f"{name}-{'done' if is_done else 'undone'}"
            workspace.add_job(run, f"batch_{run}")
            answer = {"code": 429, "handled": is_done, **options}
            sim.fault("queue.create", "status", match=post_of(run), **answer)
    workspace.daemon()
    wait_sent(workspace)
    for run in workspace.jobs:
        assert len(workspace.started(run)) == 1, run
    for name in TOO_MANY:
        assert len(posts(sim, f"{name}-done")) == 1, name
        assert gaps(posts(sim, f"{name}-undone"))[0] >= 7, name


@pytest.mark.long
def test_post_that_always_fails(workspace: Workspace) -> None:
    """A POST that always gets 500 is repeated ever later, and `status` keeps the server's words."""
    sim = workspace.sim
    sim.fault("queue.create", "status", None, code=500, body=ERROR_500)
    workspace.add_job("job", "batch_a")
    workspace.daemon()
    wait_shown(workspace, lambda job: EXCEPTION_ID in words(job), "with the answer")

    def is_told() -> bool:
        said = words(shown(workspace)["job"])
        assert [w for w in ("500", EXCEPTION_ID, "Application error") if w not in said] == []
        return len(posts(sim)) >= 3

    wait_until(is_told, "a third POST")
    first, second = gaps(posts(sim)[:3])
    assert first >= 1
    assert second >= 1.9
    assert sim.jobs == []


@pytest.mark.long
def test_retry_after_an_unknown_outcome(workspace: Workspace) -> None:
    """No second POST before the time that a 503 names, also after a restart."""
    sim = workspace.sim
    forms: dict[str, JsonObject] = {"seconds": {"retry_after": 3}, "date": {"retry_after_date": 4}}
    for name, options in forms.items():
        workspace.add_job(name, f"batch_{name}")
        sim.fault("queue.create", "status", match=post_of(name), code=503, **options)
    daemon = workspace.daemon()
    wait_shown(workspace, lambda job: "503" in words(job), "with the 503")
    assert daemon.stop() == 0
    workspace.daemon()
    for name in forms:
        assert gaps(wait_for_posts(sim, name, 2))[0] >= 3  # a date has whole seconds
    wait_sent(workspace)
    assert len(sim.jobs) == 2


@pytest.mark.long
def test_waits_end_at_an_hour(workspace: Workspace) -> None:
    """The waits between POSTs grow over passes of `--once`, but never over an hour."""
    sim = workspace.sim
    sim.fault("queue.create", "status", None, code=500, body=ERROR_500)
    workspace.add_job("job", "batch_a")
    made = []
    for hours in range(16):
        before = len(posts(sim))
        code = run_later(workspace, hours * (HOUR_S + 60), "--once").code
        assert code == (hours > 0)  # what has not lasted yet is no attention
        made.append(len(posts(sim)) - before)
        assert EXCEPTION_ID in words(shown(workspace)["job"])
    assert min(made) >= 1  # a pass may wait for a few that are near
    assert made[-8:] == [1] * 8
    for minutes in (20, 40):
        run_later(workspace, hours * (HOUR_S + 60) + minutes * 60, "--once")
    assert sum(made) == len(posts(sim))


def test_second_post_asks_the_old_list(workspace: Workspace) -> None:
    """A job that the search does not show in time is found on the deprecated list."""
    sim = workspace.sim
    sim.search_lag = 3600
    for name, kind in (("job", "reset_after"), ("closed", "close_after")):
        workspace.add_job(name, f"batch_{name}")
        sim.fault("queue.create", kind, match=post_of(name))
    workspace.daemon()
    wait_sent(workspace)
    for name in ("job", "closed"):
        assert (len(posts(sim, name)), len(workspace.started(name))) == (1, 1), name


@pytest.mark.long
def test_old_list_that_fails_says_nothing(workspace: Workspace) -> None:
    """Where the deprecated list cannot be read, two empty searches are enough."""
    sim = workspace.sim
    kinds: dict[str, tuple[str, JsonObject]] = {
        "forbidden": ("status", {"code": 403}),
        "gone": ("status", {"code": 404}),
        "error": ("status", {"code": 500}),
        "html": ("body", {}),
        "no-list": ("json", {"obj": {"jobs": []}}),
        "null-rows": ("json", {"obj": [None]}),
    }
    for name, (kind, options) in kinds.items():
        workspace.add_job(name, f"batch_{name}")
        sim.fault("queue.list", kind, None, match=f"config={name}", **options)
        sim.fault("queue.create", "reset_before", match=post_of(name))
    workspace.daemon()
    wait_sent(workspace)
    for name in kinds:
        assert (len(posts(sim, name)), len(workspace.started(name))) == (2, 1), name
    asked = {r.query.get("config") for r in sim.requests if r.route == "queue.list"}
    assert asked == set(kinds)


# ---- the first start ----


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64", "unlink", "openat"])
def test_killed_at_the_first_start(tmp_path: Path, sim: Simulator, call: str) -> None:
    """A first start that was killed at any step in its state file can be started again."""
    sim.add_batch("batch_a", "in_progress")
    for number in range(1, 41):
        space = Workspace(tmp_path / str(number), sim)
        space.add_job("job", "batch_a")
        space.write()
        inject = [f"--trace={call}", f"--inject={call}:signal=SIGKILL:when={number}"]
        endings = ("", "-journal", "-wal", "-shm", ".lock")
        paths = [argument for ending in endings for argument in ("-P", f"{space.state}{ending}")]
        strace = ["strace", "-f", "-qq", "-o", str(space.directory / "strace.log")]
        command = [*strace, *inject, *paths, *space.command("--once")]
        done = outcome_of(command, cwd=space.directory)
        if done.code == 0:
            assert number > (5 if call == "fdatasync" else 1)  # else nothing was tried
            return
        assert done.code == -9, done.stderr
        again = space.run("--once")
        assert again.code == 0, f"{call} {number}: {again.stderr}"
        assert space.statuses() == {"job": "active"}, f"{call} {number}"


# ---- what a batch brings ----

LATE: dict[str, dict[str, Any]] = {  # what the first answers lack, and what comes at last
    "output": {"request_counts": {"total": 3, "completed": 3, "failed": 0}},
    "errors": {"request_counts": {"total": 3, "completed": 0, "failed": 3}},
    "both": {"request_counts": {"total": 3, "completed": 2, "failed": 1}},
    "expired": {"request_counts": {"total": 3, "completed": 1, "failed": 0}},
    "empty": {"request_counts": {"total": 3, "completed": 3, "failed": 0}},
}


def add_late_batches(space: Workspace) -> None:
    """Batches that have ended and whose files are not there yet."""
    for name, counts in LATE.items():
        status = "expired" if name == "expired" else "completed"
        space.add_job(name, f"batch_{name}", status=status)
        missing = "" if name == "empty" else None
        files = {"output_file_id": missing, "error_file_id": missing}
        space.sim.set_batch(f"batch_{name}", **files, **counts)


def complete_late_batch(sim: Simulator, name: str) -> dict[str, JsonObject]:
    """Brings the files; returns what the Keboola job has to be told of them."""
    counts = LATE[name]["request_counts"]
    batch_id = f"batch_{name}"
    output = f"file-out-{name}" if counts["completed"] else None
    errors = f"file-err-{name}" if counts["failed"] else None
    sim.set_batch(batch_id, output_file_id=output, error_file_id=errors)
    return {
        "batch_output_file_ids": {batch_id: output} if output else {},
        "batch_error_file_ids": {batch_id: errors} if errors else {},
    }


def told_files(sim: Simulator, name: str) -> dict[str, JsonObject]:
    (post,) = posts(sim, name)
    told = variables(post.json())
    return {key: json.loads(told[key]) for key in ("batch_output_file_ids", "batch_error_file_ids")}


@pytest.mark.long
def test_late_files(workspace: Workspace) -> None:
    """A batch whose files come after its end is asked for again, and they are in the one POST."""
    sim = workspace.sim
    add_late_batches(workspace)
    workspace.daemon()
    for name in LATE:
        workspace.wait_for_looks(f"batch_{name}", 1)
    assert posts(sim) == []
    files = {name: complete_late_batch(sim, name) for name in LATE}
    for name in LATE:
        wait_for_posts(sim, name, 1)
        assert told_files(sim, name) == files[name], name


def test_late_files_over_passes(workspace: Workspace) -> None:
    """A pass of `--once` leaves a batch without its files to the next one."""
    sim = workspace.sim
    add_late_batches(workspace)
    workspace.once()
    assert posts(sim) == []
    files = {name: complete_late_batch(sim, name) for name in LATE}
    assert workspace.once().code == 0
    assert {name: told_files(sim, name) for name in LATE} == files


@pytest.mark.long
def test_files_that_never_come(workspace: Workspace) -> None:
    """Five minutes after its end a batch counts as it is, and not before."""
    sim = workspace.sim
    add_late_batches(workspace)
    workspace.once()
    run_later(workspace, 240, "--once")
    assert posts(sim) == []
    assert run_later(workspace, 400, "--once").code == 0
    for name in LATE:
        assert told_files(sim, name) == {"batch_output_file_ids": {}, "batch_error_file_ids": {}}


def test_batches_without_files_to_come(workspace: Workspace) -> None:
    """Where no count is above zero, nothing is waited for."""
    sim = workspace.sim
    sim.add_batch("batch_failed", "failed")
    sim.add_batch("batch_empty", "completed", total=0)
    sim.add_batch("batch_uncounted", "completed", output=False)
    sim.set_batch("batch_uncounted", request_counts=None)
    for name in ("failed", "empty", "uncounted"):
        workspace.add_job(name, f"batch_{name}")
    assert workspace.once().code == 0
    assert len(sim.jobs) == 3


@pytest.mark.long
def test_long_file_ids(workspace: Workspace) -> None:
    """A file id reaches Keboola and `status --json` as it came; over 4,096 characters, nothing."""
    sim = workspace.sim
    files = {}
    for length in (200, 201, 518, 4096):
        name, batch_id = f"job-{length}", f"batch_{length}"
        output, errors = ("bGl0abcDEF1234" * 400)[:length], ("bGl0errors9876" * 400)[:length]
        files[name] = (output, errors)
        workspace.add_job(name, batch_id)
        sim.set_batch(batch_id, output_file_id=output, error_file_id=errors)
    for key in ("output_file_id", "error_file_id"):
        workspace.add_job(key, f"batch_{key}")
        sim.set_batch(f"batch_{key}", **{key: "x" * 4097})
    assert workspace.once().code == 0
    jobs = shown(workspace)
    assert {run_of(post) for post in posts(sim)} == {*files}
    assert {name for name, job in jobs.items() if job["error"]} == {*jobs} - {*files}
    for name, (output, errors) in files.items():
        (batch,) = jobs[name]["batches"]
        assert told_files(sim, name) == {
            "batch_output_file_ids": {batch["id"]: output},
            "batch_error_file_ids": {batch["id"]: errors},
        }
        assert (batch["output_file_id"], batch["error_file_id"]) == (output, errors)


# ---- the environment ----

NO_PROXY = ("fd07:b51a:cc66:f0::/64", "[::1]", "[fd07:b51a:cc66:f1::]/64")


@pytest.mark.long
@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_no_proxy_with_ipv6(workspace: Workspace, variable: str) -> None:
    """Entries of NO_PROXY in every form of IPv6 are understood, or named once at most."""
    workspace.add_job("job", "batch_a")
    entries = ",".join(("localhost", "127.0.0.1", "::1", *NO_PROXY))
    environment = {variable: entries, "HTTP_PROXY": closed_port(), "HTTPS_PROXY": closed_port()}
    daemon = workspace.daemon(**environment)
    wait_for_posts(workspace.sim, "job", 1)
    wait_sent(workspace)
    assert daemon.stop() == 0
    named = [sum(entry in line for line in daemon.lines) for entry in NO_PROXY]
    assert max(named) <= 1
    again = workspace.run("--once", **environment)
    assert (again.code, len(posts(workspace.sim))) == (0, 1)
    assert "Traceback" not in again.stderr


def test_renamed_after_its_target_changed(workspace: Workspace) -> None:
    """A finished job whose target was changed is not new work under another name, either."""
    workspace.add_job("old", "batch_a")
    assert workspace.once().code == 0
    workspace.jobs["old"]["config_id"] = "second"
    assert workspace.once().code == 0
    workspace.jobs["new"] = workspace.jobs.pop("old")
    assert workspace.once().code == 0
    assert len(workspace.sim.jobs) == 1
    assert workspace.statuses() == {"new": "completed"}
