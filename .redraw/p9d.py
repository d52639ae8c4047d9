# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a command knows: the config that counts, its runs, and the snapshot of them."""

    config: Config
    runs: Sequence[Run]
    shot: Mapping[str, Any]


@contextlib.contextmanager
def viewing(args: argparse.Namespace) -> Iterator[tuple[View, Store | None]]:
    """Return what the state file knows, beside a running daemon too.

    Where the file has problems, the last good config counts, as it does for the daemon. Where
    nothing has run yet, the runs are those that the first start would make. Raises ConfigError where
    the file does not even tell where the state file is.
    """
    path, files, redactor = config_path(args), Files(), Redactor()
    config, problems, _ = read_config_file(path, files)
    if problems:
        opener = SecretOpener(config, files, os.environ)
        redactor.learn(opener.all_known(opener.open_all()))
        problems = [replace(p, what=redactor.text(p.what)) for p in problems]
        if not config.sha256 and not is_there(config.state_path):
            raise ConfigError(problems)
    with Store.reading(config.state_path) as store:
        loaded = (store and store.meta("config")) or {}
        good = (store and store.meta("good_config")) or {}
        if problems and good.get("path") == str(path.absolute()):
            config, _ = parse_config(good["text"], path)
        runs = known_runs(config, store)
        on_disk = "\n".join(map(str, ConfigError(problems).problems)) if problems else None
        stats = store.stats().values() if store else ()
        shot = snapshot(
            config,
            runs,
            daemon=lock_owner(config.state_path),
            loaded=dict(loaded) | {"error": on_disk or loaded.get("error")},
            refused=sum(s.refused_since is not None and s.name in config.secrets for s in stats),
            now=time.time(),
        )
        yield View(config, runs, shot), store


def known_runs(config: Config, store: Store | None) -> list[Run]:
    """Return the runs of a config's jobs, in its order, as the state file has them or will."""
    stored = store.runs_for(config.jobs) if store else []
    targets = {name: config.target(job) for name, job in config.jobs.items()}
    assigned = assign(config.jobs, targets, [run for run in stored if not run.group])
    runs = []
    for name, job in config.jobs.items():
        batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
        run = assigned.get(name) or Run(0, name, targets[name], batches=batches, next_at=math.inf)
        if not job.match:
            runs.append(replace(run, job=name, batches=in_order(run, job, run.batches)))
        others = [r for r in stored if r.job == name and (not runs or r.id != runs[-1].id)]
        runs += [r for r in others if (job.match and r.group) or r.may_be_at_keboola]
    return runs


def chosen(view: View, name: str) -> list[int]:
    """Return the places of the runs that a name means: of one run, or of a job. Raises UsageError."""
    found = [i for i, run in enumerate(view.runs) if name in {run.name, run.job}]
    if not found and name not in view.config.jobs:
        raise UsageError(f"there is no job {quoted(name)}", "`teckochecker status` lists them all")
    return found


def status_table(view: View) -> list[str]:
    """Return the runs as lines, those first that need attention, each with what happens next.

    On a terminal nothing is wider than it, and of very many only the first are shown.
    """
    shot = view.shot
    now = unix_of(shot["generated_at"]) or 0.0
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else 10_000
    views = in_order_of_need(shot["jobs"])
    shown = views[:60] if is_terminal else views
    rows = [
        (
            fitted(run["name"], max(12, width // 3)),
            run["status"].replace("_", " "),
            f"{sum(STATUS_RANK.get(b['status']) == 3 for b in run['batches'])}/{run['batch_count']}"
            f" {math.floor(100 * progress_of(run)):>3}%",
            ago(run["last_check_at"], now),
        )
        for run in shown
    ]
    lines = []
    head, *body = table([("RUN", "STATUS", "BATCHES", "LAST POLL"), *rows])
    for run, line in zip(shown, body, strict=True):
        is_over = run["status"] in {"completed", "paused"}
        colour = RED if run["attention"] else DIM if is_over else ""
        lines.append(painted(fitted(line, width), colour))
        lines.append(painted(fitted(f"    {what_next(run, now)}", width), DIM))
        error = textwrap.wrap(run["error"] or "", max(20, width - 4), break_on_hyphens=False)
        lines += [painted(f"    {text}", RED) for text in error[:4]]
    if len(views) > len(shown):
        lines.append(f"... and {counted(len(views) - len(shown), 'run')} more; see --json")
    return [head, *lines] if views else ["no jobs"]


def job_story(view: View, place: int, store: Store | None) -> list[str]:
    """Return everything about one run: its batches, what Keboola got, and its whole story."""
    run, shown = view.runs[place], view.shot["jobs"][place]
    now = unix_of(view.shot["generated_at"]) or 0.0
    trigger = shown["trigger"] or {}
    facts = [
        ("run", run.name),
        ("status", shown["status"].replace("_", " ")),
        ("error", shown["error"]),
        ("next", what_next(shown, now)),
        ("target", str(run.target)),
        ("last poll", f"{shown['last_check_at']} ({ago(shown['last_check_at'], now)})"),
        ("trigger", f"{trigger['state']} {trigger['id']}" if trigger else None),
        ("Keboola job", trigger.get("url") or trigger.get("keboola_job_id")),
    ]
    lines = [f"{name:<12} {value}" for name, value in facts if value is not None]
    rows = [("BATCH", "STATUS", "REQUESTS", "EXPIRES", "OUTPUT", "NOTE")]
    for b in run.batches:
        requests = f"{b.completed or 0}/{b.total}" if b.total is not None else ""
        status = b.status or ("not polled" if not run.last_check_at else "no answer yet")
        expires = "" if b.is_terminal else rfc3339(b.expires_at) or ""
        rows.append((b.id, status, requests, expires, b.output_file_id or "", b.error or ""))
    lines += ["", *table(rows)]
    if run.payload:
        values = json.loads(run.payload)["variableValuesData"]["values"]
        lines += ["", "What Keboola gets:", *(f"  {v['name']} = {v['value']}" for v in values)]
    events = store.events(name=run.name) if store else []
    return [*lines, *([""] if events else []), *(f"{rfc3339(e.at)} {e.text}" for e in events)]


def run_status(args: argparse.Namespace) -> int:
    """Show what is known of the runs."""
    with viewing(args) as (view, store):
        shot = dict(view.shot)
        lines = []
        if shot["config"]["error"]:
            lines.append("The config file has problems; the previous one still counts:")
            lines += [painted(line, RED) for line in shot["config"]["error"].splitlines()]
        if args.job is not None:
            places = chosen(view, args.job)
            shot["jobs"] = [shot["jobs"][place] for place in places]
            stories = [job_story(view, place, store) for place in places]
            lines += [line for story in stories for line in (*story, "")][:-1]
        else:
            owner, runs = lock_owner(view.config.state_path), counts_in_words(shot["jobs"])
            who = "Nothing runs: start the daemon, or --once."
            if store is None:
                who = "Nothing has run here yet: start the daemon, or --once."
            elif owner["running"] or owner["once"]:
                who = "The daemon runs." if owner["running"] else "A pass of --once is being made."
            lines += [f"{who} {runs or 'No jobs.'}", "", *status_table(view)]
        print(json.dumps(shot, indent=2) if args.json else "\n".join(lines))
        if args.alive and (why := why_not_alive(view)):
            print(f"teckochecker: {why}", file=sys.stderr)
            return 1
        return 1 if args.check and view.shot["attention"] else 0


def why_not_alive(view: View) -> str:
    """Return why the daemon is to be called dead, or ""."""
    daemon, now = view.shot["daemon"], time.time()
    if not daemon["running"]:
        return "no daemon runs"
    for run in view.runs:
        job = view.config.jobs[run.job]
        since = max(run.last_check_at or 0.0, unix_of(daemon["started_at"]) or 0.0)
        is_due = run.phase is Phase.POLLING and not job.rests and math.isfinite(run.next_at)
        if is_due and max(since, run.next_at) < now - 2 * job.poll_interval - MINUTE_S:
            return f"the polls of {run.name} are overdue"
    return ""


# --- logs, schema, retry --------------------------------------------------------------------------


def run_logs(args: argparse.Namespace) -> int:
    """Print the events that the state file keeps, and with --follow what comes."""
    with viewing(args) as (view, _):
        state_path = view.config.state_path
        if args.job is not None:
            chosen(view, args.job)
    last, most = None, args.n
    while True:
        with Store.reading(state_path) as store:
            after = 0 if last is None else last
            events = store.events(after=after, name=args.job, most=most) if store else []
            last = store.last_event_id() if store else 0
        for event in events:
            mark = "" if event.level == "info" else f"{event.level}: "
            line = f"{rfc3339(event.at)} {mark}{event.text}"
            text = json.dumps(event.document(), ensure_ascii=False) if args.json else line
            print(text, flush=args.follow)
        if not args.follow:
            return 0
        most = None
        time.sleep(1.0)


def run_schema(_: argparse.Namespace) -> int:
    """Print the SQL of the state file."""
    print(f"PRAGMA user_version = {SCHEMA_VERSION};")
    for statement in SCHEMA:
        print(f"{textwrap.dedent(statement).strip()};")
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Ask for runs to be tried again, through the state file."""
    with viewing(args) as (view, store):
        if store is None:
            hint = "start the daemon or --once first"
            raise UsageError(f"there is no state file {view.config.state_path}", hint)
        path, places = view.config.state_path, chosen(view, args.job)
        exact = [view.runs[i] for i in places if view.runs[i].name == args.job]
        runs = exact or [r for i in places if (r := view.runs[i]).phase is not Phase.FINISHED]
        asked, refused = [], ["it has no unfinished runs"] if not runs else []
        for run in runs:
            request = RetryRequest(0, run.id, args.force, run.rerun, run.phase)
            why = after_retry(run, view.config.jobs[run.job], request, time.time())
            if isinstance(why, str):
                refused.append(why)
            else:
                asked.append((run.id, args.force, run.rerun, str(run.phase)))
        owner = lock_owner(path)
    if not asked:
        raise TeckoError(f"{args.job}: {refused[0]}")
    insert = "INSERT INTO requests (run_id, force, rerun, phase) VALUES (?, ?, ?, ?)"
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with contextlib.closing(
        sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
    ) as db:
        Store(db, path).execute([(insert, row) for row in asked])
    is_acting = owner["running"] or owner["once"]
    when = "the running daemon does it within two seconds"
    print(f"asked: {when if is_acting else 'nothing runs now; the next start or --once does it'}")
    return 0


