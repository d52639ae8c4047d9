# ==================================================================================================
# 8. Showing: one snapshot, and its renderers
# ==================================================================================================


def run_view(run: Run, job: Job | None, grace_s: float, now: float) -> dict[str, Any]:
    """Return a run as `status --json` shows it."""
    status = status_of(run, job)
    is_over = status in {"completed", "completed_with_failures"}
    error = None if is_over else run.error
    is_due = not is_over and status != "paused" and run.phase is not Phase.REFUSED
    trigger = {
        "id": run.trigger_id,
        "state": "sent" if run.phase is Phase.FINISHED else str(run.phase),
        "keboola_job_id": run.keboola_job_id,
        "keboola_status": run.keboola_status,
        "keboola_error": run.keboola_error,
        "url": run.url,
        "sent_at": rfc3339(run.sent_at),
        "finished_at": rfc3339(run.finished_at),
        "error": error,
    }
    return {
        "name": run.name,
        "job": run.job,
        "group": run.group or None,
        "status": status,
        "attention": bool(attention_of(run, job, grace_s, now)),
        "error": error,
        "error_since": rfc3339(run.error_since) if error else None,
        "batch_count": len(run.batches),
        "completed_count": sum(batch.status == "completed" for batch in run.batches),
        "failed_count": sum(batch.has_failed for batch in run.batches),
        "batches": [batch_view(batch) for batch in run.batches],
        "last_check_at": rfc3339(run.last_check_at),
        "next_check_at": rfc3339(run.next_at) if is_due else None,
        "completed_at": rfc3339(run.finished_at),
        "trigger": None if run.phase in {Phase.POLLING, Phase.REFUSED} else trigger,
    }


def batch_view(batch: Batch) -> dict[str, Any]:
    counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    return {
        "id": batch.id,
        "status": batch.status,
        "request_counts": counts if batch.total is not None else None,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": rfc3339(batch.created_at),
        "expires_at": rfc3339(batch.expires_at),
        "completed_at": rfc3339(batch.ended_at),
    }


def snapshot(  # noqa: PLR0913 - all that is known
    config: Config,
    runs: Iterable[Run],
    stats: Iterable[SecretStats],
    daemon: Mapping[str, Any],
    loaded: Mapping[str, Any],
    *,
    now: float,
) -> dict[str, Any]:
    """Return what is known at one moment: the document of `status --json`.

    `daemon` is what `lock_owner` says, `loaded` what the state file has of the config that counts.
    """
    views = [run_view(r, config.jobs.get(r.job), config.trigger_grace, now) for r in runs]
    of_config = {
        "path": str(config.path),
        "sha256": config.sha256,
        "loaded_at": None,
        "error": None,
    }
    of_config |= loaded
    refused = sum(secret.refused_since is not None for secret in stats)
    return {
        "version": __version__,
        "generated_at": rfc3339(now),
        "daemon": {
            key: daemon.get(key) for key in ("running", "pid", "started_at", "last_loop_at")
        },
        "config": of_config,
        "attention": sum(v["attention"] for v in views) + refused + bool(of_config["error"]),
        "jobs": views,
    }


# --- in words -------------------------------------------------------------------------------------

# The part of the page where the runs of a status stand, in the order in which people want them.
PART_OF_STATUS: Final = {
    "failed": "Needs attention",
    "triggering": "Active",
    "active": "Active",
    "running": "Running",
    "paused": "Paused",
    "completed_with_failures": "Finished",
    "completed": "Finished",
}


def in_parts(shot: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of a snapshot: attention first, finished last, of these the newest first."""
    parts: dict[str, list[Mapping[str, Any]]] = {part: [] for part in PART_OF_STATUS.values()}
    for view in sorted(shot["jobs"], key=lambda view: view["completed_at"] or "", reverse=True):
        parts[PART_OF_STATUS["failed" if view["attention"] else view["status"]]].append(view)
    return parts


def counts_in_words(shot: Mapping[str, Any]) -> str:
    """Return how many runs have which status, in one line."""
    counts = collections.Counter(view["status"] for view in shot["jobs"])
    words = [f"{counts[s]} {s.replace('_', ' ')}" for s in PART_OF_STATUS if counts[s]]
    return ", ".join(words) or "no jobs"


def general_troubles(shot: Mapping[str, Any], stats: Iterable[SecretStats]) -> list[str]:
    """Return what needs attention and is no run: the config file, and secrets that are refused."""
    error = shot["config"]["error"]
    what = "The config file has problems; the previous one still counts"
    texts = [f"{what}:\n{error}"] if error else []
    refused = [secret for secret in stats if secret.refused_since is not None]
    return texts + [f"The secret {secret.name} is refused: {secret.error}" for secret in refused]


def unix_of(text: str | None) -> float | None:
    """Return a time of a snapshot as Unix seconds."""
    return datetime.fromisoformat(text).timestamp() if text else None


def ago(text: str | None, shot: Mapping[str, Any]) -> str:
    """Return how long before a snapshot something was; what is recorded in the future is now."""
    at, now = unix_of(text), unix_of(shot["generated_at"]) or 0.0
    if at is None:
        return "never"
    return f"{show_duration(now - at)} ago" if now - at >= 1 else "just now"


def what_next(view: Mapping[str, Any], shot: Mapping[str, Any]) -> str:
    """Return what happens next to a run, and when; or what has come of it."""
    status, trigger = view["status"], view["trigger"] or {}
    due, now = unix_of(view["next_check_at"]), unix_of(shot["generated_at"]) or 0.0
    when = f"in {show_duration(due - now)}" if due and due - now >= 1 else "now"
    ended = trigger.get("keboola_status") or "started"
    keboola_job = f"Keboola job {trigger.get('keboola_job_id')}"
    again = f"tries again {when}" if due else "waits for a change of its config"
    idle = "waits for more batches" if view["group"] else "polls once something runs"
    words = {
        "active": f"polls {when}" if due else idle,
        "paused": "nothing while it is paused",
        "intent": f"searches Keboola {when}, then starts",
        "sending": "waits for Keboola's answer",
        "unknown": f"searches Keboola again {when}",
        "running": f"{keboola_job} is {ended}; polls {when}",
        "failed": "`retry --force` starts it all the same",  # its policy refused it
        "rejected": f"{again}, or `retry`",
        "sent": "`retry` starts it again",
    }
    if not status.startswith("completed"):
        is_by_trigger = trigger and status in {"triggering", "failed"}
        return words[trigger["state"] if is_by_trigger else status]
    failed = sum((batch["request_counts"] or {}).get("failed") or 0 for batch in view["batches"])
    lost = f", {counted(failed, 'request')} failed" if failed else ""
    if not trigger.get("keboola_job_id"):
        return "done elsewhere"
    return f"{keboola_job}: {ended}, {ago(view['completed_at'], shot)}{lost}"


def progress_of(view: Mapping[str, Any]) -> tuple[str, int]:
    """Return how many batches of a run are finished, and how much of its requests, in percent.

    Each batch counts the same, and as a whole once it is finished.
    """
    shares = []
    for batch in view["batches"]:
        counts = batch["request_counts"] or {}
        done = (counts.get("completed") or 0) + (counts.get("failed") or 0)
        share = done / counts["total"] if counts.get("total") else 0.0
        shares.append(1.0 if STATUS_RANK.get(batch["status"]) == 3 else min(1.0, share))
    percent = math.floor(100 * sum(shares) / max(1, len(shares)))
    return f"{view['completed_count'] + view['failed_count']}/{view['batch_count']}", percent


# --- as metrics -----------------------------------------------------------------------------------

Sample = tuple[Mapping[str, str], float | None]  # its labels, and its value where it is known


def waiting_since(view: Mapping[str, Any]) -> float | None:
    """Return since when a run waits: for its oldest batch, its start, or its Keboola job's end."""
    batches, trigger = view["batches"], view["trigger"] or {}
    times = {
        "active": [b["created_at"] for b in batches if STATUS_RANK.get(b["status"]) != 3],
        "triggering": [max((b["completed_at"] or "" for b in batches), default=None)],
        "running": [trigger.get("sent_at")],
    }
    return unix_of(min(filter(None, times[view["status"]]), default=None))


def metrics(shot: Mapping[str, Any], stats: Sequence[SecretStats], ended: Mapping[str, int]) -> str:
    """Return a snapshot in Prometheus' text format (version 0.0.4), for its textfile collector.

    `ended` is how many Keboola jobs of all times had which end. What is not known is left out.
    """
    views, config, now = shot["jobs"], shot["config"], unix_of(shot["generated_at"]) or 0.0
    jobs = collections.Counter(view["status"] for view in views)
    batches = collections.Counter(dict.fromkeys((*STATUS_RANK, "not_polled"), 0))
    batches.update(b["status"] or "not_polled" for view in views for b in view["batches"])

    def by_status(counts: Mapping[str, int]) -> list[Sample]:
        return [({"status": status}, count) for status, count in counts.items()]

    def by_run(status: str) -> list[Sample]:
        waits = [(v["name"], waiting_since(v)) for v in views if v["status"] == status]
        return [({"run": name}, at and max(0.0, now - at)) for name, at in waits]

    def by_secret(field_: str) -> list[Sample]:
        return [({"account": s.name, "service": s.type}, getattr(s, field_)) for s in stats]

    refused = [(labels, since is not None) for labels, since in by_secret("refused_since")]
    succeeded, loaded = by_secret("last_success_at"), unix_of(config["loaded_at"])
    is_good = not config["error"]
    families: list[tuple[str, str, Sequence[Sample]]] = [
        ("info", "The program's version.", [({"version": shot["version"]}, 1)]),
        ("generated_timestamp_seconds", "When this file was made.", [({}, now)]),
        ("daemon_running", "Whether the daemon ran then.", [({}, shot["daemon"]["running"])]),
        ("attention", "Runs, keys and configs that need a person.", [({}, shot["attention"])]),
        ("jobs", "Runs by status.", by_status({s: jobs[s] for s in PART_OF_STATUS})),
        ("batches", "Batches of these runs by status.", by_status(batches)),
        ("run_oldest_batch_age_seconds", "Age of its oldest unfinished batch.", by_run("active")),
        ("run_triggering_seconds", "How long a start has been due.", by_run("triggering")),
        ("run_running_seconds", "How long its Keboola job has been running.", by_run("running")),
        ("keboola_jobs", "Keboola jobs by how they ended.", by_status(ended)),
        ("requests_total", "Requests made with a secret.", by_secret("requests")),
        ("request_errors_total", "Those of them that failed.", by_secret("errors")),
        ("last_success_timestamp_seconds", "When one of them last succeeded.", succeeded),
        ("account_refused", "Whether the server refuses the secret (401).", refused),
        ("config_last_reload_successful", "Whether the config file is good.", [({}, is_good)]),
        ("config_last_reload_success_timestamp_seconds", "When it was loaded.", [({}, loaded)]),
    ]
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    lines = []
    for name, text, samples in families:
        known = [(labels, value) for labels, value in samples if value is not None]
        kind = "counter" if name.endswith("_total") else "gauge"
        if known:
            lines += [f"# HELP teckochecker_{name} {text}", f"# TYPE teckochecker_{name} {kind}"]
        for labels, value in known:
            pairs = ",".join(f'{key}="{label.translate(escapes)}"' for key, label in labels.items())
            lines.append(f"teckochecker_{name}{f'{{{pairs}}}' if pairs else ''} {value:.15g}")
    return "".join(f"{line}\n" for line in lines)


# --- as a page ------------------------------------------------------------------------------------

PAGE_STYLE: Final = """
:root { color-scheme: light dark; --dim: light-dark(#555d66, #a6adb7);
  --line: light-dark(#d5d9de, #3a3f46); --link: light-dark(#0b57c2, #8ab8ff);
  --good: light-dark(#17713a, #62d68d); --bad: light-dark(#b3261e, #ff8f86);
  --wait: light-dark(#8a5a00, #f2bd5c); }
body { margin: 0 auto; max-width: 70rem; padding: .75rem; font: 1rem/1.35 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1, h2 { font-size: 1.2rem; margin: .75rem 0 .25rem; }
p, ul, pre { margin: .25rem 0; white-space: pre-wrap; }
a, .active, .running { color: var(--link); }
.dim { color: var(--dim); }
.alarm { background: #a3170f; border-radius: .5rem; color: #fff; padding: .75rem; }
body:not(.old) .stale { display: none; }
.error, .failed { color: var(--bad); }
.completed { color: var(--good); }
.paused, .triggering, .completed_with_failures { color: var(--wait); }
.run { border-top: 1px solid var(--line); padding: .25rem 0; }
.run summary { display: grid; grid-template-columns: 4fr 4fr 5rem 6fr; gap: 0 .75rem; }
summary { cursor: pointer; }
.run summary > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.run[open] summary > * { white-space: normal; }
.run summary > .error { grid-column: 1 / -1; }
progress { width: 100%; accent-color: var(--link); }
@media (max-width: 45rem) { .run summary { grid-template-columns: 2fr 3fr; } }
"""

PAGE_SCRIPT: Final = """
const { made, alive } = document.body.dataset;
const age_s = () => Math.max(0, Math.round(Date.now() / 1000 - made));
function tell() {
  const s = age_s(), words = s < 90 ? s + " s" : s < 5400 ? Math.round(s / 60) + " min" :
    Math.round(s / 3600) + " h";
  document.getElementById("age").textContent = "(" + words + " ago)";
  document.body.classList.toggle("old", alive === "1" && s > 180);
}
tell();
setInterval(tell, 1000);
setInterval(() => {
  if (age_s() > 120 || !document.querySelector("details[open]")) location.reload();
}, 30000);
"""

PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{attention} - TeckoChecker</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<body data-made="{made:.0f}" data-alive="{alive:d}">
<h1>TeckoChecker</h1>
<p>{attention}. {counts}</p>
<p class=dim>Made at {at} <span id=age></span></p>
<main>
{main}</main>
<script>{script}</script>
</html>
"""


def page_row(view: Mapping[str, Any], shot: Mapping[str, Any]) -> str:
    """Return one run of the page: a line, and its details folded."""
    trigger, (finished, percent) = view["trigger"] or {}, progress_of(view)
    status, error, esc = view["status"], view["error"], html.escape
    facts = []
    if trigger.get("url"):
        link = f'<a href="{esc(trigger["url"])}" rel=noreferrer>'
        facts.append(f"{link}Keboola job {esc(trigger['keboola_job_id'])}</a>")
    for what, at in (("Last poll", view["last_check_at"]), ("Ended", view["completed_at"])):
        facts += [f"{what} {at} ({ago(at, shot)})"] if at else []
    facts += [f"Next step {view['next_check_at']}"] if view["next_check_at"] else []
    others = [b for b in view["batches"] if b["status"] != "completed"]
    facts += [esc(f"{b['id']} {b['status'] or 'not polled'}") for b in others[:10]]
    facts += [f"and {len(others) - 10:,} more"] if len(others) > 10 else []
    return (
        f"<details class=run><summary><strong>{esc(view['name'])}</strong>"
        f"<span class={status}>{status.replace('_', ' ')} {finished}</span>"
        f'<progress max=100 value={percent} title="{percent}% of the requests"></progress>'
        f"<span class=dim>{esc(what_next(view, shot))}</span>"
        f"{f'<span class=error>{esc(error)}</span>' if error else ''}</summary>"
        f"{'<br>'.join(facts)}</details>\n"
    )


def page(
    shot: Mapping[str, Any], stats: Iterable[SecretStats], events: Iterable[Event], *, once: bool
) -> str:
    """Return a snapshot as a page: what needs attention first; the rest folded where it is long.

    `once`: a pass of --once has made it, and no daemon is missed.
    """
    at, is_alive, needs = shot["generated_at"], shot["daemon"]["running"], shot["attention"]
    alarms = [("stale", f"This page was made at {at}, and no other one since: the daemon is dead.")]
    if not is_alive and not once:
        alarms.append(("", f"The daemon was stopped at {at}: nothing is polled or started."))
    alarms += [("", text) for text in general_troubles(shot, stats)]
    esc = html.escape
    main = [f'<p class="alarm {kind}" role=alert>{esc(text)}</p>\n' for kind, text in alarms]
    room = 15  # rows that stand unfolded
    for part, views in in_parts(shot).items():
        rows = [page_row(view, shot) for view in views]
        shown, rest = rows[: max(4, room)], rows[max(4, room) :]
        room -= len(shown)
        main += [f"<h2>{part} ({len(rows):,})</h2>\n", *shown] if rows else []
        more = f"<details><summary>{len(rest):,} more</summary>{''.join(rest)}</details>\n"
        main.append(more if rest else "")
    lines = "".join(f"<li>{rfc3339(event.at)} {esc(event.text)}\n" for event in events)
    main.append(f"<h2>Log</h2>\n<details><summary>newest first</summary><ul>{lines}</ul></details>")
    return PAGE.format(
        digest=base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode(),
        attention=f"{needs} need attention" if needs else "Nothing needs attention",
        style=PAGE_STYLE,
        script=PAGE_SCRIPT,
        made=unix_of(at) or 0.0,
        alive=is_alive,
        counts=counts_in_words(shot),
        at=at,
        main="".join(main),
    )


# --- as files -------------------------------------------------------------------------------------


def put_file(path: Path, text: str) -> None:
    """Write a file that everyone may read, as a whole or not at all. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with new.open("x", encoding="utf-8", errors="replace") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # a full disk is not to stay full for its sake


async def publish(engine: Engine, *, is_running: bool, trouble: str = "") -> str:
    """Write page, document and metrics, if the config has a place for them.

    Returns what is in the way, or ""; it is told where it differs from `trouble`, that of before.
    """
    config, path, stats = engine.loaded.config, engine.store.path, list(engine.stats.values())
    daemon = lock_owner(path) if is_running else {"running": False}
    loaded: dict[str, Any] = {}
    now = engine.clock.now()
    with contextlib.suppress(sqlite3.Error):
        loaded = engine.store.meta("config") or {}
    known = (config, engine.shown(), stats, daemon, loaded)

    def write(directory: Path) -> None:
        shot = snapshot(*known, now=now)
        with Store.reading(path) as store:
            events = store.events(most=50)[::-1] if store else []
            query = "SELECT keboola_status, count(*) FROM runs WHERE phase = 'finished' GROUP BY 1"
            ended = dict(store.db.execute(query).fetchall()) if store else {}
        ended.pop(None, None)  # started before its status was known
        directory.mkdir(exist_ok=True)
        put_file(directory / "status.json", f"{json.dumps(shot)}\n")
        put_file(directory / "metrics.prom", metrics(shot, stats, ended))
        put_file(directory / "status.html", page(shot, stats, events, once=engine.once))

    before, trouble = trouble, ""
    if config.publish_path:
        try:
            await asyncio.to_thread(write, config.publish_path)
        except Exception as error:  # noqa: BLE001 - nothing here may end what starts jobs
            trouble = one_line(f"{type(error).__name__}: {error}")
    if trouble != before:
        name = "publish_failed" if trouble else "publish_recovered"
        engine.log(Event.of(name, directory=str(config.publish_path), error=trouble))
    return trouble


async def keep_published(engine: Engine) -> None:
    """Publish whenever something has changed, and at least once a minute."""
    happened, trouble = asyncio.Event(), ""
    engine.told.append(happened)
    while True:
        happened.clear()
        started = time.monotonic()
        trouble = await publish(engine, is_running=True, trouble=trouble)
        rest_s = min(50.0, max(1.0, 30 * (time.monotonic() - started)))  # to cost little CPU
        await asyncio.sleep(rest_s)
        await wait_for_event(happened, 50.0 - rest_s)
