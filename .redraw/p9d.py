# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a command knows: the config that counts, its runs, and the snapshot of these."""

    config: Config
    runs: Sequence[Run]
    shot: dict[str, Any]
    stats: Sequence[SecretStats]  # of the secrets that the config has
    store: Store | None  # None: nothing has run yet

    def chosen(self, name: str) -> list[tuple[Run, dict[str, Any]]]:
        """Return the runs that a name means: one run, or those of a job. Raises UsageError."""
        pairs = zip(self.runs, self.shot["jobs"], strict=True)
        found = [(run, shown) for run, shown in pairs if name in {run.name, run.job}]
        if not found and name not in self.config.jobs:
            raise UsageError(
                f"there is no job {quoted(name)}", "`teckochecker status` lists them all"
            )
        return found


@contextlib.contextmanager
def viewing(args: argparse.Namespace) -> Iterator[View]:
    """Return what the state file knows, beside a running daemon too.

    Where the file has problems, the last good config counts, as it does for the daemon. Where
    nothing has run yet, the runs are those that the first start would make. Raises ConfigError
    where the file does not even tell where the state file is.
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
        if problems:
            loaded["error"] = str(ConfigError(problems))
            if good.get("path") == str(path.absolute()):
                config, _ = parse_config(good["text"], path)
        runs = known_runs(config, store, args.job or "")
        stats = [s for s in store.stats().values() if s.name in config.secrets] if store else []
        daemon = lock_owner(config.state_path)
        shot = snapshot(config, runs, stats, daemon, loaded, now=time.time())
        yield View(config, runs, shot, stats, store)


def known_runs(config: Config, store: Store | None, wanted: str) -> list[Run]:
    """Return the runs of a config's jobs, in its order, as the state file has them or will.

    Of a match job these are the recent ones, and the one whose name is `wanted`.
    """
    stored = {run.id: run for run in store.runs_for(config.jobs)} if store else {}
    job_name, _, group = wanted.partition("/")
    if store and group:
        stored |= {run.id: run for run in store.groups(job_name, [group]).values()}
    targets = {name: config.target(job) for name, job in config.jobs.items()}
    assigned = assign(config.jobs, targets, [run for run in stored.values() if not run.group])
    runs = []
    for name, job in config.jobs.items():
        if not job.match:
            batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
            new = Run(0, name, targets[name], batches=batches, next_at=math.inf)
            run = assigned.get(name, new)
            stored.pop(run.id, None)
            runs.append(replace(run, job=name, batches=in_order(job, run.batches)))
        others = [run for run in stored.values() if run.job == name]
        runs += [r for r in others if (job.match and r.group) or r.may_be_at_keboola]
    return runs


def status_table(shot: Mapping[str, Any], head: str) -> list[str]:
    """Return the runs as lines below a head: attention first, each with what happens next.

    On a terminal nothing is wider than it, and of very many only the first are shown.
    """
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else 10_000
    views = [shown for part in in_parts(shot).values() for shown in part]
    shown = views[:60] if is_terminal else views
    rows = [("RUN", "STATUS", "BATCHES", "LAST POLL")]
    for run in shown:
        finished, percent = progress_of(run)
        name, status = one_line(run["name"], max(12, width - 54)), run["status"].replace("_", " ")
        rows.append((name, status, f"{finished} {percent:>3}%", ago(run["last_check_at"], shot)))
    titles, *body = table(rows)
    lines = [*textwrap.wrap(head, width), "", titles]
    for run, line in zip(shown, body, strict=True):
        is_quiet = run["status"] in {"completed", "paused"}
        lines.append(painted(line, RED if run["attention"] else DIM if is_quiet else ""))
        for text, colour in ((what_next(run, shot), DIM), (run["error"] or "", RED)):
            wrapped = textwrap.wrap(text, width - 4, max_lines=4, placeholder=" …")
            lines += [painted(f"    {part}", colour) for part in wrapped]
    if len(views) > len(shown):
        lines.append(f"… and {counted(len(views) - len(shown), 'run')} more; see --json")
    return lines


def job_story(view: View, run: Run, shown: Mapping[str, Any]) -> str:
    """Return everything about one run: its batches, what Keboola got, and its whole story."""
    trigger, polled_at = shown["trigger"] or {}, shown["last_check_at"]
    facts = {
        "run": run.name,
        "status": shown["status"].replace("_", " "),
        "error": shown["error"],
        "next": what_next(shown, view.shot),
        "target": str(run.target),
        "last poll": f"{polled_at} ({ago(polled_at, view.shot)})" if polled_at else "never",
        "trigger": f"{trigger['state']} {trigger['id']}" if trigger else None,
        "Keboola job": trigger.get("url") or trigger.get("keboola_job_id"),
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items() if value is not None]
    rows = [("BATCH", "STATUS", "REQUESTS", "EXPIRES", "OUTPUT", "NOTE")]
    for b in run.batches:
        requests = f"{b.completed or 0}/{b.total}" if b.total is not None else ""
        expires = "" if b.is_terminal else rfc3339(b.expires_at) or ""
        status = b.status or ("no answer yet" if run.last_check_at else "not polled")
        rows.append((b.id, status, requests, expires, b.output_file_id or "", b.error or ""))
    lines += ["", *table(rows)]
    if run.payload:
        values = json.loads(run.payload)["variableValuesData"]["values"]
        lines += ["", "What Keboola gets:", *(f"  {v['name']} = {v['value']}" for v in values)]
    events = view.store.events(name=run.name) if view.store else []
    return "\n".join([*lines, "", *(f"{rfc3339(e.at)} {e.text}" for e in events)])


def run_status(args: argparse.Namespace) -> int:
    """Show the runs, or one job with its whole story.

    It reads the state file, whether the daemon runs or not, and says which. What needs attention
    comes first. BATCHES: finished/all, and how much of their requests is done.
    """
    with viewing(args) as view:
        shot, troubles = dict(view.shot), general_troubles(view.shot, view.stats)
        lines = [painted(line, RED) for text in troubles for line in text.splitlines()]
        if args.job is not None:
            pairs = view.chosen(args.job)
            shot["jobs"] = [shown for _, shown in pairs]
            lines.append("\n\n".join(job_story(view, run, shown) for run, shown in pairs))
        else:
            owner = lock_owner(view.config.state_path)
            nothing = "Nothing runs" if view.store else "Nothing has run here yet"
            who = "A pass of --once is being made." if owner["once"] else "The daemon runs."
            if not owner["running"] and not owner["once"]:
                who = f"{nothing}: start the daemon, or --once."
            lines += status_table(shot, f"{who} {counts_in_words(shot)}")
        print(json.dumps(shot, indent=2) if args.json else "\n".join(lines))
        why = why_not_alive(view) if args.alive else ""
        if why:
            print(f"teckochecker: {why}", file=sys.stderr)
        return 1 if why or (args.check and view.shot["attention"]) else 0


def why_not_alive(view: View) -> str:
    """Return why the daemon is to be called dead, or ""."""
    daemon, now = view.shot["daemon"], time.time()
    if not daemon["running"]:
        return "no daemon runs"
    for run in view.runs:
        job = view.config.jobs[run.job]
        due_at = max(run.next_at, run.last_check_at or 0.0, unix_of(daemon["started_at"]) or 0.0)
        is_polled = run.phase is Phase.POLLING and not job.rests
        if is_polled and due_at < now - 2 * job.poll_interval - MINUTE_S:
            return f"the polls of {run.name} are overdue"
    return ""


# --- logs, schema, retry --------------------------------------------------------------------------


def run_logs(args: argparse.Namespace) -> int:
    """Show what has happened, of all jobs or of one.

    It reads the events that the state file keeps, also while the daemon runs.
    """
    if args.n < 0:
        raise UsageError("-n is a number of lines", "write -n 20")
    with viewing(args) as view:
        state_path = view.config.state_path
        has_any = view.store and view.store.events(name=args.job, most=1)
        if args.job is not None and not has_any:
            view.chosen(args.job)
    last, most = 0, args.n
    while True:
        with Store.reading(state_path) as store:
            newest = store.last_event_id() if store else 0
            events = store.events(after=last, name=args.job, most=most) if store else []
        last = max([newest, *(event.id for event in events)])
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
    """Print the SQL of the state file, for whoever reads it with other programs."""
    print(f"PRAGMA user_version = {SCHEMA_VERSION};")
    for statement in SCHEMA:
        print(f"{textwrap.dedent(statement).strip()};")
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Try a run again now, or all unfinished ones of a job.

    Polls, searches, or starts again what Keboola rejected or what failed there. A running daemon
    does it within two seconds, otherwise the next start or --once.
    """
    with viewing(args) as view:
        path, found = view.config.state_path, [run for run, _ in view.chosen(args.job)]
        if view.store is None:
            raise UsageError(f"there is no state file {path}", "start the daemon or --once first")
        unfinished = [run for run in found if run.phase is not Phase.FINISHED]
        asked, why = [], "it has no unfinished runs"
        for run in [run for run in found if run.name == args.job] or unfinished:
            request = RetryRequest(0, run.id, args.force, run.rerun, run.phase)
            after = after_retry(run, view.config.jobs[run.job], request, time.time())
            if isinstance(after, str):
                why = after
            else:
                asked.append((run.id, args.force, run.rerun, str(run.phase)))
        owner = lock_owner(path)
    if not asked:
        raise TeckoError(f"{args.job}: {why}")
    insert = "INSERT INTO requests (run_id, force, rerun, phase) VALUES (?, ?, ?, ?)"
    with contextlib.closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as db:
        Store(db, path).execute([(insert, row) for row in asked])
    is_acting = owner["running"] or owner["once"]
    when = "the running daemon does it within two seconds"
    print(f"asked: {when if is_acting else 'nothing runs now; the next start or --once does it'}")
    return 0
