# ==================================================================================================
# 8. Showing: one snapshot, and its renderers
# ==================================================================================================


def run_view(run: Run, job: Job | None, grace_s: float, now: float) -> dict[str, Any]:
    """Return a run as `status --json` shows it."""
    status = status_of(run, job)
    is_over = status in {"completed", "completed_with_failures"}
    has_trigger = run.phase not in {Phase.POLLING, Phase.REFUSED}
    error = None if is_over else run.error
    is_due = not is_over and status != "paused" and run.phase is not Phase.REFUSED
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
        "trigger": {
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
        if has_trigger
        else None,
    }


def batch_view(batch: Batch) -> dict[str, Any]:
    """Return a batch as `status --json` shows it."""
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


def snapshot(
    config: Config,
    runs: Iterable[Run],
    *,
    daemon: Mapping[str, Any],
    loaded: Mapping[str, Any],
    refused: int,
    now: float,
) -> dict[str, Any]:
    """Return what is known at one moment: the document of `status --json`.

    `loaded` is what the process remembers of the config that it runs with, `refused` how many keys
    their servers refuse.
    """
    views = [run_view(r, config.jobs.get(r.job), config.trigger_grace, now) for r in runs]
    names = ("running", "pid", "started_at", "last_loop_at")
    error = loaded.get("error")
    return {
        "version": __version__,
        "generated_at": rfc3339(now),
        "daemon": {name: daemon.get(name) for name in names},
        "config": {
            "path": loaded.get("path", str(config.path)),
            "sha256": loaded.get("sha256", config.sha256),
            "loaded_at": loaded.get("loaded_at"),
            "error": error,
        },
        "attention": sum(view["attention"] for view in views) + refused + bool(error),
        "jobs": views,
    }


# --- in words -------------------------------------------------------------------------------------


def unix_of(text: str | None) -> float | None:
    """Return a time of a snapshot as Unix seconds."""
    return datetime.fromisoformat(text).timestamp() if text else None


def in_words(seconds: float) -> str:
    """Return a length of time as people say it: `3 min`."""
    for unit, size in (("day", DAY_S), ("h", HOUR_S), ("min", MINUTE_S)):
        count = round(seconds / size)
        if seconds >= size * 0.99:
            return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"
    return f"{max(0, round(seconds))} s"


def ago(text: str | None, now: float) -> str:
    """Return how long ago a time of a snapshot was; what is recorded in the future is now."""
    at = unix_of(text)
    if at is None:
        return "never"
    return f"{in_words(now - at)} ago" if now - at >= 1 else "just now"


def what_next(view: Mapping[str, Any], now: float) -> str:
    """Return what happens next to a run, and when; or what has come of it."""
    trigger = view["trigger"] or {}
    due = unix_of(view["next_check_at"])
    when = f"in {in_words(due - now)}" if due is not None and due - now >= 1 else "now"
    failed = sum((batch["request_counts"] or {}).get("failed") or 0 for batch in view["batches"])
    lost = f", {counted(failed, 'request')} failed" if failed else ""
    match view["status"]:
        case "active" if due is None:
            return "waits for more batches"
        case "active":
            return f"polls {when}"
        case "paused":
            return "nothing while it is paused"
        case "running":
            said = trigger["keboola_status"] or "started"
            return f"Keboola job {trigger['keboola_job_id']} is {said}; looks {when}"
        case "failed" if trigger.get("state") == "rejected" and due is not None:
            return f"tries again {when}, or `retry`"
        case "failed":
            return "waits for a change of its config, or `retry`"
        case "triggering":
            return {
                "sending": "waits for Keboola's answer",
                "unknown": f"searches Keboola again {when}",
            }.get(trigger.get("state", ""), f"searches Keboola {when}, then starts")
    if not trigger:
        return "done elsewhere"
    ended = f"Keboola job {trigger['keboola_job_id']}: {trigger['keboola_status'] or 'started'}"
    return f"{ended}, {ago(view['completed_at'], now)}{lost}"


def progress_of(view: Mapping[str, Any]) -> float:
    """Return which share of a run's requests is done, from 0 to 1."""
    shares = []
    for batch in view["batches"]:
        counts = batch["request_counts"] or {}
        done = (counts.get("completed") or 0) + (counts.get("failed") or 0)
        share = done / counts["total"] if counts.get("total") else 0.0
        shares.append(1.0 if STATUS_RANK.get(batch["status"]) == 3 else min(1.0, share))
    return sum(shares) / len(shares) if shares else 0.0


# The order in which a person wants to see runs.
STATUSES: Final = (
    "failed",
    "triggering",
    "active",
    "running",
    "paused",
    "completed_with_failures",
    "completed",
)


def in_order_of_need(views: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return runs sorted: what needs attention, what goes on, what is finished, newest first."""

    def key(view: Mapping[str, Any]) -> tuple[object, ...]:
        ended = -(unix_of(view["completed_at"]) or 0.0)
        return (not view["attention"], max(1, min(5, STATUSES.index(view["status"]))), ended)

    return sorted(views, key=key)


def counts_in_words(views: Iterable[Mapping[str, Any]]) -> str:
    """Return how many runs have which status, in one line."""
    counts = collections.Counter(view["status"] for view in views)
    return ", ".join(f"{counts[s]} {s.replace('_', ' ')}" for s in STATUSES if counts[s])


# --- as metrics -----------------------------------------------------------------------------------


def metrics(
    shot: Mapping[str, Any], stats: Iterable[SecretStats], ended: Mapping[str, int]
) -> str:
    """Return a snapshot in Prometheus' text format (version 0.0.4), for its textfile collector.

    `ended` is how many Keboola jobs of all times had which end.
    """
    lines: list[str] = []
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

    def metric(
        name: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]], kind: str = "gauge"
    ) -> None:
        found = list(samples)
        if found:
            full = f"teckochecker_{name}"
            lines.extend((f"# HELP {full} {text}", f"# TYPE {full} {kind}"))
            for labels, value in found:
                pairs = ",".join(f'{k}="{v.translate(escapes)}"' for k, v in labels.items())
                lines.append(f"{full}{f'{{{pairs}}}' if pairs else ''} {value:.15g}")

    def by(label: str, names: Iterable[str], found: Iterable[str]) -> list[tuple[dict[str, str], int]]:
        counts = collections.Counter(dict.fromkeys(names, 0))
        counts.update(found)
        return [({label: name}, count) for name, count in counts.items()]

    now, views = unix_of(shot["generated_at"]) or 0.0, shot["jobs"]
    batches = [batch for view in views for batch in view["batches"]]
    loaded_at = unix_of(shot["config"]["loaded_at"])
    metric("info", "The program's version.", [({"version": shot["version"]}, 1)])
    metric("generated_timestamp_seconds", "When this file was made.", [({}, now)])
    metric("daemon_running", "Whether the daemon ran then.", [({}, shot["daemon"]["running"])])
    metric("attention", "Runs, keys and configs that need a person.", [({}, shot["attention"])])
    metric("jobs", "Runs by status.", by("status", STATUSES, (v["status"] for v in views)))
    statuses = (*STATUS_RANK, "not_polled")
    seen = (batch["status"] or "not_polled" for batch in batches)
    metric("batches", "Batches of these runs by status.", by("status", statuses, seen))
    metric(
        "run_oldest_batch_age_seconds",
        "Since the oldest unfinished batch of a run was created.",
        run_ages(views, now),
    )
    for status, since, text in (
        ("triggering", "batches", "Since the batches of a run that is being started were finished."),
        ("running", "trigger", "Since the Keboola job of a running run was started."),
    ):
        ages = [
            ({"run": v["name"]}, max(0.0, now - at))
            for v in views
            if v["status"] == status and (at := last_time(v, since)) is not None
        ]
        metric(f"run_{status}_seconds", text, ages)
    metric("keboola_jobs", "Keboola jobs by how they ended.", [({"status": s}, n) for s, n in ended.items()])
    labels = {use.name: {"account": use.name, "service": use.type} for use in stats}
    for name, kind, text, value in (
        ("requests_total", "counter", "Requests made with a secret.", "requests"),
        ("request_errors_total", "counter", "Requests with a secret that failed.", "errors"),
        ("last_success_timestamp_seconds", "gauge", "When one last succeeded.", "last_success_at"),
    ):
        samples = [(labels[use.name], getattr(use, value)) for use in stats]
        metric(name, text, [(label, n) for label, n in samples if n is not None], kind)
    refused = [(labels[use.name], use.refused_since is not None) for use in stats]
    metric("account_refused", "Whether the server refuses the secret (401).", refused)
    good = shot["config"]["error"] is None
    metric("config_last_reload_successful", "Whether the config file is good.", [({}, good)])
    times = [({}, loaded_at)] if loaded_at else []
    text = "When the config that counts was loaded."
    metric("config_last_reload_success_timestamp_seconds", text, times)
    return "".join(f"{line}\n" for line in lines)


def run_ages(views: Iterable[Mapping[str, Any]], now: float) -> Iterator[tuple[dict[str, str], float]]:
    """Yield how old the oldest unfinished batch of each active run is."""
    for view in views:
        ages = [
            now - (unix_of(batch["created_at"]) or now)
            for batch in view["batches"]
            if STATUS_RANK.get(batch["status"]) != 3 and batch["created_at"]
        ]
        if ages and view["status"] == "active":
            yield {"run": view["name"]}, max(0.0, *ages)


def last_time(view: Mapping[str, Any], since: str) -> float | None:
    """Return when a run's last batch was finished, or its Keboola job was started."""
    if since == "trigger":
        return unix_of(view["trigger"]["sent_at"])
    return max((unix_of(batch["completed_at"]) or 0.0 for batch in view["batches"]), default=0) or None


# --- as a page ------------------------------------------------------------------------------------

PAGE_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #555d66; --paper: #fff; --line: #d5d9de;
  --link: #0b57c2; --good: #17713a; --run: #2b66c9; --bad: #b3261e; --wait: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #a6adb7; --paper: #16181b;
  --line: #3a3f46; --link: #8ab8ff; --good: #62d68d; --run: #7fb0ff; --bad: #ff8f86;
  --wait: #f2bd5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 1.25rem 0 .25rem; }
p, ul { margin: .25rem 0; }
a { color: var(--link); }
.dim { color: var(--dim); }
.alarm { border: 2px solid var(--bad); border-radius: .5rem; padding: .75rem; margin: .75rem 0; }
.loud { background: #a3170f; border-color: #a3170f; color: #fff; font-size: 1.2rem; }
.error, .failed { color: var(--bad); }
.completed { color: var(--good); }
.active, .running { color: var(--run); }
.paused, .triggering, .completed_with_failures { color: var(--wait); }
.run { border-top: 1px solid var(--line); padding: .3rem 0; }
.run summary { display: grid; grid-template-columns: 2fr 1fr 7rem 3fr; gap: 0 .75rem; cursor: pointer; }
.run summary::before { display: none; }
.run ul { padding-left: 1.2rem; }
progress { width: 100%; height: .8rem; accent-color: var(--run); }
pre { white-space: pre-wrap; margin: .25rem 0; }
#stale { display: none; }
.stale #stale { display: block; }
@media (max-width: 40rem) { .run summary { grid-template-columns: 1fr 1fr; } }
"""

PAGE_SCRIPT: Final = """
const made = Number(document.body.dataset.made), alive = document.body.dataset.alive === "1";
function tell() {
  const s = Math.max(0, Math.round(Date.now() / 1000 - made));
  document.getElementById("age").textContent = s < 90 ? s + " s ago" :
    s < 5400 ? Math.round(s / 60) + " min ago" : Math.round(s / 3600) + " h ago";
  document.body.classList.toggle("stale", alive && s > 180);
}
tell();
setInterval(tell, 1000);
setTimeout(() => location.reload(), 30000);
"""


def page_row(view: Mapping[str, Any], now: float) -> str:
    """Return one run of the page: a line, and its details folded."""
    esc, trigger = html.escape, view["trigger"] or {}
    ended = sum(STATUS_RANK.get(b["status"]) == 3 for b in view["batches"])
    status = view["status"]
    lines = [f"<p class=error>{esc(view['error'])}</p>"] if view["error"] else []
    if trigger.get("url"):
        text = f"Keboola job {esc(trigger['keboola_job_id'])}"
        lines.append(f'<p><a href="{esc(trigger["url"])}" rel=noreferrer>{text}</a></p>')
    times = [
        (name, view[key])
        for name, key in (("Last look", "last_check_at"), ("Ended", "completed_at"))
        if view[key]
    ]
    lines += [f"<p class=dim>{name} {at} ({ago(at, now)})</p>" for name, at in times]
    if view["attention"] or not status.startswith("completed"):
        items = [f"<li>{esc(b['id'])} {esc(b['status'] or 'not polled')}" for b in view["batches"][:50]]
        lines.append(f"<ul>{''.join(items)}</ul>")
    bar = f"<progress max=100 value={math.floor(100 * progress_of(view))}></progress>"
    return (
        f"<details class=run{' open' if view['attention'] else ''}><summary>"
        f"<strong>{esc(view['name'])}</strong>"
        f"<span class={status}>{status.replace('_', ' ')} {ended}/{view['batch_count']}</span>{bar}"
        f"<span class=dim>{esc(what_next(view, now))}</span></summary>{''.join(lines)}</details>\n"
    )


def page(shot: Mapping[str, Any], events: Iterable[Event]) -> str:
    """Return a snapshot as a page: what needs attention first; the rest folded where it is long.

    The script is allowed by its hash; it says how old the page is, and that the daemon is dead when
    it is. Without it, the time stands beside the headline.
    """

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(PAGE_STYLE)}'; "
        f"script-src 'sha256-{digest(PAGE_SCRIPT)}'"
    )
    now = unix_of(shot["generated_at"]) or 0.0
    views = in_order_of_need(shot["jobs"])
    needs = shot["attention"]
    kinds = {
        "Needs attention": [v for v in views if v["attention"]],
        "Active": [v for v in views if not v["attention"] and v["status"] in {"active", "triggering"}],
        "Running": [v for v in views if not v["attention"] and v["status"] in {"running", "failed"}],
        "Paused": [v for v in views if not v["attention"] and v["status"] == "paused"],
        "Finished": [v for v in views if not v["attention"] and v["status"].startswith("completed")],
    }
    parts = []
    for title, found in kinds.items():
        rows = [page_row(view, now) for view in found]
        head, rest = rows[:15], rows[15:]
        if rows:
            parts.append(f"<h2>{title} ({len(rows):,})</h2>\n{''.join(head)}")
        if rest:
            more = f"<summary>{len(rest):,} more</summary>{''.join(rest)}"
            parts.append(f"<details>{more}</details>\n")
    told = "".join(f"<li>{rfc3339(e.at)} {html.escape(e.text)}" for e in events)
    title = f"{needs} need attention - TeckoChecker" if needs else "TeckoChecker"
    is_alive = int(bool(shot["daemon"]["running"]))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{title}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>{PAGE_STYLE}</style>\n</head>\n'
        f"<body data-made={now:.0f} data-alive={is_alive}>\n{page_alarms(shot)}<h1>TeckoChecker</h1>\n"
        f"<p>{counts_in_words(views) or 'no jobs'}</p>\n"
        f"<p class=dim>Made at {shot['generated_at']} <span id=age></span></p>\n<main>\n"
        f"{'' if needs else '<p class=completed>Nothing needs attention.</p>'}{''.join(parts)}"
        f"<h2>Last events</h2>\n<details><summary>the newest first</summary><ul>{told}</ul></details>\n"
        f"</main>\n<script>{PAGE_SCRIPT}</script>\n</body>\n</html>\n"
    )


def page_alarms(shot: Mapping[str, Any]) -> str:
    """Return what a reader of the page has to see before anything else."""
    made = shot["generated_at"]
    parts = [
        '<div class="alarm loud" role=alert id=stale><strong>This page is stale.</strong> It was made '
        f"at {made}, and no other one since: the daemon has died, or cannot write here.</div>\n"
    ]
    if shot["daemon"]["running"] is False:
        parts.append(
            '<div class="alarm loud" role=alert><strong>The daemon was stopped</strong> at '
            f"{made}. Nothing is polled and nothing is started.</div>\n"
        )
    if shot["config"]["error"]:
        parts.append(
            "<div class=alarm role=alert><strong>The config file has problems;</strong> the previous"
            f" one still counts.<pre>{html.escape(shot['config']['error'])}</pre></div>\n"
        )
    return "".join(parts)


# --- as files -------------------------------------------------------------------------------------


def put_file(directory: Path, name: str, text: str) -> None:
    """Write a file that everyone may read, as a whole or not at all. Raises OSError."""
    new = directory / f".{name}.new"
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - a descriptor
            os.fchmod(fd, 0o644)
            file.write(text)
        new.replace(directory / name)
    finally:
        new.unlink(missing_ok=True)  # a full disk is not to stay full for its sake


class Publisher:
    """Writes page, document and metrics whenever something has changed, and once a minute."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._trouble = ""
        self._took_s = 0.0

    async def run(self) -> None:
        """Publish while the process runs."""
        happened = asyncio.Event()
        self._engine.told.append(happened)
        while True:
            happened.clear()
            await self.publish(is_running=True)
            pause_s = min(50.0, max(1.0, 30 * self._took_s))  # a thirtieth of the time
            await asyncio.sleep(pause_s)
            await wait_for_event(happened, 50.0 - pause_s)

    async def publish(self, *, is_running: bool | None) -> None:
        """Write the files, if the config has a place for them; trouble is told once.

        `is_running` is None where a pass of --once makes them.
        """
        engine = self._engine
        directory = engine.loaded.config.publish_path
        if directory is None:
            return
        shown, stats = engine.shown(), list(engine.stats.values())
        daemon = lock_owner(engine.store.path) | {"running": is_running}
        loaded = (engine.store.meta("config") or {}) | {"error": engine.config_error}
        config, now, trouble = engine.loaded.config, engine.clock.now(), ""

        def write() -> None:
            started = time.monotonic()
            refused = sum(use.refused_since is not None for use in stats)
            shot = snapshot(
                config, shown, daemon=daemon, loaded=loaded, refused=refused, now=now
            )
            events, ended = [], {}
            with Store.reading(engine.store.path) as store:
                if store:
                    events, ended = store.events(most=50)[::-1], ends_of(store)
            directory.mkdir(exist_ok=True)
            put_file(directory, "status.json", f"{json.dumps(shot)}\n")
            put_file(directory, "metrics.prom", metrics(shot, stats, ended))
            put_file(directory, "status.html", page(shot, events))
            self._took_s = time.monotonic() - started

        try:
            await asyncio.to_thread(write)
        except (OSError, TeckoError, sqlite3.Error) as error:
            trouble = one_line(str(error))
        except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
            trouble = one_line(f"{type(error).__name__}: {error}")
        if trouble and trouble != self._trouble:
            engine.log(Event.of("publish_failed", directory=str(directory), error=trouble))
        elif self._trouble and not trouble:
            engine.log(Event.of("publish_recovered"))
        self._trouble = trouble


def ends_of(store: Store) -> dict[str, int]:
    """Return how many Keboola jobs had which end."""
    query = (
        "SELECT keboola_status, count(*) FROM runs WHERE phase = 'finished'"
        " AND keboola_status IS NOT NULL GROUP BY 1"
    )
    return {row[0]: row[1] for row in store.db.execute(query)}


