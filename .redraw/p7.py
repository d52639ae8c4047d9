# ==================================================================================================
# 7. Engine: what runs
# ==================================================================================================


class LogWriter:
    """Writes lines to standard error from a thread of its own; what does not fit is counted.

    So a reader that is slow, full or gone never holds up the loop.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(10_000)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def msg(self, line: str) -> None:
        """Write a line, as structlog's loggers do."""
        try:
            if self._dropped:
                self._lines.put_nowait(f"({self._dropped} lines of the log were dropped)")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = error = msg

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data) :]

    def close(self) -> None:
        """Wait a moment until what was written has arrived."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(1.0)


def configure_logging(config: Config, redactor: Redactor, writer: LogWriter) -> None:
    """Send events, and the warnings of libraries, to standard error through one redactor."""
    is_console = config.log_format == "console"
    is_console = is_console or (config.log_format == "auto" and os.isatty(2))
    status = os.fstat(2)
    is_journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    priorities = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}

    def render(_: object, level: str, line: Mapping[str, Any]) -> str:
        head = {name: line[name] for name in ("time", "level", "event", "text")}
        told = redactor.tree(head | dict(line))  # the last before the line is made
        prefix = priorities[level] if is_journal else ""
        if not is_console:
            return prefix + json.dumps(told, ensure_ascii=False)
        at = datetime.fromisoformat(told["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        mark = "" if level == "info" else f"{level}: "
        return "\n".join((f"{prefix}{at} {mark}{told['text']}", *told.get("traceback", ())))

    class Forwarder(logging.Handler):
        """Passes on what a library has to say."""

        def emit(self, record: logging.LogRecord) -> None:
            text = one_line(record.getMessage(), 1000)
            say(Event("library_warning", "warning", None, None, {"logger": record.name}, text))

    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,
    )
    logging.getLogger().handlers = [Forwarder()]
    logging.getLogger().setLevel(logging.WARNING)  # httpx logs URLs at INFO, httpcore headers
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)  # see DaemonThreads


def say(event: Event) -> None:
    """Write one event to the log."""
    document = replace(event, at=event.at or time.time()).document()
    getattr(structlog.get_logger(), event.level)(document.pop("event"), **document)


class ServiceManager:
    """The service manager's side of the process (sd_notify(3)); silent where there is none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        is_ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = env.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog_us) / 1e6 if is_ours and watchdog_us.isdigit() else None

    def send(self, *lines: str) -> None:
        """Send one datagram."""
        if self._address:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
            ):
                out.sendto("\n".join(lines).encode(), self._address)


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until an event is set or a time has passed; returns whether it was set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()
    return event.is_set()


# --- one OpenAI account ---------------------------------------------------------------------------


@dataclass(slots=True)
class ListReading:
    """What one poll has learnt of an account's list so far."""

    due: Mapping[str, Batch]  # what is to be shown
    known: Mapping[str, Batch]  # with the finished batches of the same runs
    unchanged: dict[str, Batch] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)  # these are asked for by themselves
    pages: int = 0
    span_s: float = 3 * MINUTE_S  # how long the batches of a page have taken to be created
    is_stale: bool = False

    def missing(self) -> list[Batch]:
        """Return the due batches that no page has shown, the newest first.

        Of one second, the last of a job's ids is taken for the newest: so people write them.
        """
        shown = self.unchanged.keys() | self.changed
        missing = [self.due[key] for key in reversed([*self.due]) if key not in shown]
        return sorted(missing, key=lambda batch: -(batch.created_at or 0.0))

    @property
    def overhead(self) -> int:
        """How many requests pages have cost beyond what they have saved."""
        return self.pages - len(self.unchanged)

    def take(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Note what a page shows; returns how many due batches."""
        before = len(self.unchanged) + len(self.changed)
        self.pages += 1
        for row in rows:
            if row["id"] in self.known:
                self._take_row(row, self.known[row["id"]])
        ages = creation_times(rows[:1]) + creation_times(rows[-1:])
        if ages and len(rows) > 1:
            self.span_s = max(ages) - min(ages)
        return len(self.unchanged) + len(self.changed) - before

    def _take_row(self, row: Mapping[str, Any], known: Batch) -> None:
        status = str(row.get("status")).lower()
        rank, known_rank = STATUS_RANK.get(status), STATUS_RANK.get(known.status or "")
        if rank is not None and known_rank is not None and rank < known_rank:
            self.is_stale = True
        if known.id not in self.due:
            return
        if status != known.status or known.is_terminal:
            self.changed.add(known.id)
            return
        counts = row.get("request_counts")
        if isinstance(counts, dict):
            told: dict[str, Any] = {n: count_or_none(counts.get(n)) for n in ("total", "completed", "failed")}
            if None not in told.values() and told["completed"] != known.completed:
                known = replace(known, **told)
        self.unchanged[known.id] = known


def creation_times(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return when the batches of rows were created, where they tell."""
    return [at for row in rows if (at := time_or_none(row.get("created_at")))]


def row_of(row: Mapping[str, Any]) -> Row | None:
    """Return a row of the list for finding; one that says that it is finished is only a hint."""
    try:
        batch = parse_batch(row, row["id"])
    except ValueError:
        return None
    if batch.is_terminal:
        batch = Batch(batch.id, created_at=batch.created_at)
    metadata = row.get("metadata")
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return Row(batch, {str(key): value for key, value in pairs if isinstance(value, str)})


class Finding:
    """How far an account's list has to be read back for the new batches of some jobs.

    To the newest row that was there at the last complete read, with an hour's overlap (a row may
    show up late) of at most two pages more than what is new; or to `since`.
    """

    def __init__(self, store: Store, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.newest_at = 0.0
        self._keys = {j.name: compact_json([j.match_key, j.since, j.openai_secret]) for j in jobs}
        marks = {job.name: store.meta(f"read:{job.name}") or {} for job in jobs}
        self._read_to = {n: m["to"] for n, m in marks.items() if m.get("key") == self._keys[n]}
        self._new_to = min(self._read_to.get(job.name, job.since) for job in jobs)
        floors = (max(j.since, self._read_to.get(j.name, j.since) - HOUR_S) for j in jobs)
        self._floor = min(floors)
        self._pages_beyond = 0

    def needs_more(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether to read on after a page."""
        ages = creation_times(rows) or [0.0]
        self.newest_at = max(self.newest_at, *ages)
        self._pages_beyond += min(ages) <= self._new_to
        return min(ages) > self._floor and self._pages_beyond <= 2

    def marks(self) -> list[Statement]:
        """Return what stores that the list was read completely, where that is new."""
        return [
            Store.meta_statement(f"read:{name}", {"key": key, "to": self.newest_at})
            for name, key in self._keys.items()
            if self.newest_at > self._read_to.get(name, -1.0)
        ]


class Account(OpenAI):
    """One OpenAI key: polls the batches of its runs, and finds new ones.

    Due batches are polled together. Pages of the account's list are a hint and save requests; what
    counts is a batch's own answer. A request that hangs is left to its deadline while the loop goes
    on. A poll takes at most two requests more than single GETs would, apart from the pages that new
    batches are looked for on.
    """

    def __init__(self, engine: Engine, entry: SecretEntry, key: Secret) -> None:
        note = functools.partial(engine.note_request, entry.name)
        super().__init__(entry, key, engine.http, engine.clock, note)
        self.identity = (key, replace(entry, text=Secret(""), line=0, column=0))
        self.run_ids: set[int] = set()  # of the runs that it polls
        self.finders: list[Job] = []  # the jobs that it finds batches for
        self.wake = asyncio.Event()
        self.until = math.inf  # when `run` sees again what is due
        self._engine = engine
        self._places = asyncio.Semaphore(engine.http.max_concurrency)  # before those of all
        self._asking: dict[str, asyncio.Task[Batch | ApiError]] = {}
        self._busy: set[int] = set()  # runs that are being polled
        self._complete: list[tuple[int, dict[str, Batch | ApiError]]] = []
        self._list_from = -math.inf  # when pages may be read again
        self._list_failures = 0
        self.find_at = -math.inf
        self._find_failures = 0

    # --- the loop ---

    async def run(self) -> None:
        """Poll what is due, and find what is new, until cancelled."""
        engine, clock = self._engine, self._engine.clock
        while not engine.is_stopping:
            self.wake.clear()
            now = clock.now()
            idle = [engine.runs[i] for i in self.run_ids - self._busy]
            is_finding = bool(self.finders) and self.find_at <= now
            if is_finding or any(run.next_at <= now for run in idle):
                due = [run for run in idle if run.next_at <= now + self._early_s(run)]
                try:
                    await self._poll(due, is_finding=is_finding)
                except Exception as error:  # noqa: BLE001 - trouble of one account is not the others'
                    engine.note_failure(error, self.name)
                    self._busy -= {run.id for run in due}
                    self.find_at = clock.now() + 5
                    await asyncio.sleep(1)
            waiting = [engine.runs[i].next_at for i in self.run_ids - self._busy]
            self.until = min([*waiting, self.find_at if self.finders else math.inf])
            # A suspended machine's timers stand still: none is longer than half a minute.
            await wait_for_event(self.wake, min(30.0, self.until - clock.now()))

    def _early_s(self, run: Run) -> float:
        """Return how early a run may be polled together with one that is due."""
        job = self._engine.job_of(run)
        return min(job.poll_interval / 10, MINUTE_S) if job else 0.0

    async def run_once(self) -> None:
        """Poll all runs once, and those that are found meanwhile."""
        engine, polled, is_finding = self._engine, set[int](), bool(self.finders)
        while (new := self.run_ids - polled) or is_finding:
            polled |= new
            try:
                polls = await self._poll([engine.runs[i] for i in new], is_finding=is_finding)
                await asyncio.gather(*polls)
                self._record()
            except (StorageError, sqlite3.Error) as error:
                engine.note_failure(error, self.name)
            is_finding = False

    async def _poll(
        self, runs: Sequence[Run], *, is_finding: bool
    ) -> list[asyncio.Task[None]]:
        """Begin the poll of some runs; each ends when its batches have answered."""
        due = {b.id: b for run in runs for b in run.batches if not b.is_final}
        known = {b.id: b for run in runs for b in run.batches}
        reading = ListReading({k: b for k, b in due.items() if k not in self._asking}, known)
        polled_before = sum(batch.status is not None for batch in reading.due.values())
        is_usable = self._list_from <= self._engine.clock.uptime_s() and not self.refusal()
        pays = polled_before >= 5 and is_usable
        self._busy |= {run.id for run in runs}
        if is_finding or pays:
            await self._read_list(reading, pays=pays, is_finding=is_finding)
        shown = reading.unchanged if pays and not reading.is_stale else {}
        if shown and reading.overhead <= 1:  # beside a list, the one not asked for longest
            shown.pop(min(shown, key=lambda key: self.answered_at.get(key, -math.inf)))
        polls = []
        for run in runs:
            ids = [batch.id for batch in run.batches if not batch.is_final]
            answers: dict[str, Batch | ApiError] = {i: shown[i] for i in ids if i in shown}
            if len(answers) == len(ids):
                self._end_poll(run.id, answers)
            else:
                polls.append(self._engine.spawn(self._poll_run(run.id, ids, answers)))
        return polls

    async def _poll_run(
        self, run_id: int, ids: Iterable[str], answers: dict[str, Batch | ApiError]
    ) -> None:
        """Ask for what no page has shown of a run; two runs with one batch share its answer."""
        for batch_id in ids:
            if batch_id not in answers and batch_id not in self._asking:
                task = asyncio.ensure_future(self._ask_one(batch_id))
                self._asking[batch_id] = task
                task.add_done_callback(functools.partial(self._end_asking, batch_id))
        missing = {i: self._asking[i] for i in ids if i not in answers}
        await asyncio.wait(missing.values())
        self._end_poll(run_id, answers | {i: task.result() for i, task in missing.items()})

    def _end_asking(self, batch_id: str, _: object) -> None:
        del self._asking[batch_id]

    async def _ask_one(self, batch_id: str) -> Batch | ApiError:
        async with self._places:
            try:
                return await self.ask(batch_id)
            except ApiError as error:
                return error
            except Exception as error:  # noqa: BLE001 - a bug that one batch meets is not the others'
                self._engine.note_failure(error, batch_id)
                return ApiError(f"internal error: {type(error).__name__}")

    def _end_poll(self, run_id: int, answers: dict[str, Batch | ApiError]) -> None:
        """Have a poll recorded, together with what else has come by then."""
        if not self._complete:
            asyncio.get_running_loop().call_soon(self._record)
        self._complete.append((run_id, answers))

    def _record(self) -> None:
        complete, self._complete = self._complete, []
        ids = {run_id for run_id, _ in complete}
        self._busy -= ids
        if complete and self._engine.accounts.get(self.name) is self:
            self._engine.record_polls(complete)
            runs = (self._engine.runs.get(run_id) for run_id in ids)
            if any(run and run.next_at < self.until for run in runs):
                self.wake.set()

    # --- the list ---

    async def _read_list(self, reading: ListReading, *, pays: bool, is_finding: bool) -> None:
        """Read the pages of the list that are needed to find, and those that save requests."""
        finding = Finding(self._engine.store, self.finders) if is_finding else None
        try:
            cursor: str | None = None
            while True:
                rows, has_more = await self.page(cursor)
                is_worth_it = reading.take(rows) >= 2 and pays and bool(reading.missing())
                if finding:
                    self._find(finding, rows)
                    is_worth_it = finding.needs_more(rows) or is_worth_it
                if not (has_more and is_worth_it):
                    break
                cursor = rows[-1]["id"]
            if finding:
                self._end_finding(finding)
            if pays:
                await self._read_clusters(reading)
                self._note_list(None, is_stale=reading.is_stale)
        except ApiError as error:
            if finding:
                self._note_find_failure(error)
            if pays:
                self._note_list(error)

    async def _read_clusters(self, reading: ListReading) -> None:
        """Read a page after each batch that others were created close to, while that saves.

        A cursor that the list has lost (400, 404) shows nothing.
        """
        missing = reading.missing()
        while len(missing) > 2 and missing[2].created_at and reading.overhead <= 1:
            first, third = missing[0], missing[2]
            missing = missing[1:]
            is_close = (third.created_at or 0) >= (first.created_at or 0) - reading.span_s
            cursor, shown = first.id, 2
            while is_close and shown >= 2 and reading.overhead <= 1:
                try:
                    rows, has_more = await self.page(cursor)
                except ApiError as error:
                    if error.status not in {400, 404}:
                        raise
                    rows, has_more = [], False
                shown = reading.take(rows)
                left = {batch.id for batch in reading.missing()}
                missing = [batch for batch in missing if batch.id in left]
                last_at = min(creation_times(rows), default=0.0) - reading.span_s
                is_close = has_more and any((b.created_at or 0) >= last_at for b in missing)
                cursor = rows[-1]["id"] if rows else ""

    def _note_list(self, error: ApiError | None, *, is_stale: bool = False) -> None:
        """Do without the list for a while after a failure, for a day where there is none."""
        was_usable = self._list_failures == 0
        self._list_failures = 0 if error is None and not is_stale else self._list_failures + 1
        if self._list_failures == 0:
            if not was_usable:
                self._engine.log(Event.of("list_usable", secret=self.name))
            return
        wait_s = float(DAY_S)
        if error and (error.retryable or error.status == 429):
            jitter = self._engine.clock.jitter()
            wait_s = backoff_s(self._list_failures, MINUTE_S, jitter, error.retry_after_s)
        self._list_from = self._engine.clock.uptime_s() + wait_s
        if was_usable and not (error and error.status == 429):
            why = error or "it shows older statuses than the batches' own answers"
            self._engine.log(Event.of("list_not_usable", secret=self.name, error=str(why)))

    # --- finding ---

    def _find(self, finding: Finding, rows: Sequence[Mapping[str, Any]]) -> None:
        """Have the runs begun or joined that a page's rows belong to."""
        engine, read = self._engine, [found for row in rows if (found := row_of(row))]
        for job in (job for job in finding.jobs if job in self.finders):  # a reload may have come
            mine = [row for row in read if row.is_of(job)]
            known = engine.store.known_batches(job.name, [row.batch.id for row in mine])
            new = [row for row in mine if row.batch.id not in known]
            for row in new if job.group_by else ():
                if not row.metadata.get(str(job.group_by)):
                    self._note_without_group(job, row.batch.id)
            if new:
                key = job.group_by
                groups = [row.metadata.get(key, "") if key else row.batch.id for row in new]
                runs = engine.store.groups(job.name, groups)
                runs |= {g: engine.runs[r.id] for g, r in runs.items() if r.id in engine.runs}
                target, now = engine.loaded.config.target(job), engine.clock.now()
                engine.take_found(group_batches(job, target, new, runs, now))

    def _note_without_group(self, job: Job, batch_id: str) -> None:
        """Tell once of a batch that lacks what it would be grouped by."""
        query = (
            "SELECT 1 FROM events WHERE job = ? AND name = 'batch_without_group'"
            " AND json_extract(fields, '$.batch_id') = ?"
        )
        if not self._engine.store.one(query, job.name, batch_id):
            event = Event.of("batch_without_group", batch_id=batch_id, group_by=job.group_by)
            self._engine.log(replace(event, job=job.name, text=f"{job.name}: {event.text}"))

    def _end_finding(self, finding: Finding) -> None:
        """Remember how far the list was read back to, completely."""
        engine, interval_s = self._engine, min(job.poll_interval for job in finding.jobs)
        recovered = [Event.of("find_recovered", secret=self.name)] if self._find_failures else []
        self._find_failures, self.find_at = 0, engine.clock.now() + interval_s
        engine.commit([], recovered, finding.marks())

    def _note_find_failure(self, error: ApiError) -> None:
        self._find_failures += 1
        if self._find_failures == 1:
            self._engine.log(Event.of("find_failed", secret=self.name, error=str(error)))
        interval_s = min(job.poll_interval for job in self.finders)
        jitter = self._engine.clock.jitter()
        wait_s = backoff_s(self._find_failures, interval_s, jitter, error.retry_after_s)
        self.find_at = self._engine.clock.now() + wait_s

    def watch(self, finders: Sequence[Job]) -> None:
        """Take a new config: the runs are told one by one; what is to be found may be other now."""
        self.run_ids.clear()
        self._places = asyncio.Semaphore(self._engine.http.max_concurrency)
        self.finders = list(finders)
        self.find_at = -math.inf
        self.wake.set()


# --- one run, from ready to its end ---------------------------------------------------------------


async def drive_run(engine: Engine, run_id: int) -> None:
    """Take a run from all batches finished to its Keboola job's end; the only one that moves it.

    What matters is committed before the next step begins, so that a process killed anywhere finds
    at its next start what may have happened. After each wait and request everything is checked
    again: a reload or a retry may have come.
    """
    failures = 0
    while (run := engine.runs.get(run_id)) is not None and not engine.is_stopping:
        action = next_action(run, may_post=engine.may_post(run))
        wait_s = run.next_at - engine.clock.now()
        if engine.once and action is Action.FOLLOW:
            wait_s = math.inf if run_id in engine.followed else 0.0  # once in a pass
        if action is Action.IDLE or (engine.once and wait_s > PATIENCE_S):
            return
        try:
            if wait_s > 0:
                await wait_for_event(engine.wakes[run_id], min(wait_s, 30.0))
                engine.wakes[run_id].clear()
            elif action is Action.ARM:
                armed = as_intended(run, run.next_at)
                armed = replace(armed, error=run.error, failures=run.failures)
                engine.commit([(armed, [])])
            elif action is Action.FOLLOW:
                await follow_run(engine, run)
            else:
                await search_and_start(engine, run)
            failures = 0
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - trouble of one run is not the others'
            failures += 1
            engine.note_failure(error, run.name, run)
            if engine.once:
                return
            first_s = 1 if isinstance(error, StorageError) else MINUTE_S
            await asyncio.sleep(min(MINUTE_S, backoff_s(failures, first_s, engine.clock.jitter())))


async def search_and_start(engine: Engine, run: Run) -> None:  # noqa: C901, PLR0912 - see below
    """Search Keboola for a run's job; start it where the search allows that."""
    clock, config, job = engine.clock, engine.loaded.config, engine.job_of(run)
    began, keboola, aimed = clock.boot_time(), None, run
    came: Sequence[KeboolaJob] | ApiError
    try:
        if job and run.sending_at is None:  # nothing was sent: what the config says now counts
            keboola, target = engine.keboolas[job.keboola_secret], config.target(job)
            aimed = as_aimed(run, job, target, keboola.token)
            target = replace(target, project=await keboola.project())
            if engine.runs.get(run.id) is not run or engine.job_of(run) is not job:
                return
            aimed = as_aimed(run, job, target, keboola.token)
            if aimed != run:
                engine.check_in_place()
                facts = {"trigger_id": run.trigger_id, "target": str(target)}
                events = [] if run.payload else [Event.of("trigger_intended", run, **facts)]
                engine.commit([(aimed, events)])
                run = engine.runs[run.id]
        else:
            keboola = await engine.keboola_for(run)
        since = search_since(run, clock.now())
        began, came = await keboola.search(run.target, since, run.trigger_id)
        if not came and run.posts:  # before a second POST, what may be ahead of the search
            with contextlib.suppress(ApiError):
                came = await keboola.recent(run.target, run.trigger_id)
    except ApiError as error:
        came = error
    if engine.runs.get(run.id) is not run or engine.is_stopping:
        return
    if keboola:
        engine.tell_unreadable(keboola)
    if not came and began.uptime_s < engine.empty_counts_from:
        wait_s = engine.empty_counts_from - began.uptime_s
        engine.commit([(replace(run, next_at=clock.now() + wait_s), [])])
        return
    if isinstance(came, ApiError) and not run.payload:
        run = aimed  # so that a correction of what failed is seen after a restart, too
    terms = engine.terms(run)
    if not keboola or engine.keboolas.get(keboola.name) is not keboola:
        terms = replace(terms, may_post=False)  # the token is another one now
    after, events = after_search(run, came, began, terms)
    if after.phase is Phase.SENDING and keboola:
        engine.check_in_place()
        engine.commit([(after, events)])  # nothing was awaited since the search was judged
        await post_run(engine, keboola, run.id)
    elif after != engine.runs[run.id]:
        engine.commit([(after, events)])


async def post_run(engine: Engine, keboola: Keboola, run_id: int) -> None:
    """Send a run that was committed as SENDING, and commit what came of it, however long it takes.

    The outcome is known only here; with --once, the next pass finds `sending`, and searches.
    """
    clock, run = engine.clock, engine.runs[run_id]
    came: KeboolaJob | ApiError
    engine.lock.note_post(clock.boot_time())
    engine.posting.add(run_id)
    try:
        try:
            came = await keboola.create(run.payload)
        except ApiError as error:
            came = error
        run = engine.runs[run_id]
        change = after_post(run, came, engine.terms(run))
        give_up_at = clock.uptime_s() + (PATIENCE_S if engine.once else math.inf)
        while True:
            try:
                return engine.commit([change])
            except StorageError as error:
                if clock.uptime_s() > give_up_at:
                    raise
                engine.note_failure(error, run.name, run)
                await asyncio.sleep(1)
    finally:
        engine.posting.discard(run_id)


async def follow_run(engine: Engine, run: Run) -> None:
    """See once how a run's Keboola job is."""
    engine.followed.add(run.id)
    came: KeboolaJob | ApiError
    try:
        keboola = await engine.keboola_for(run)
    except ApiError as error:  # a 404 here says nothing of the Keboola job
        error.status, came = None, error
    else:
        try:
            came = await keboola.job(str(run.keboola_job_id))
        except ApiError as error:
            came = error
    if engine.runs.get(run.id) is run:
        engine.commit([after_follow(run, came, engine.terms(run))])


# --- everything -----------------------------------------------------------------------------------


class Engine:
    """What runs: applies a config, has accounts polled, runs driven, and commits what came of it.

    `apply` takes a new config at any time; `run` works until it is cancelled or, with --once, until
    every unfinished run has had its poll and its step.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what it works with
        self,
        loaded: LoadedConfig,
        store: Store,
        lock: StateLock,
        http: Http,
        clock: Clock,
        redactor: Redactor,
        *,
        once: bool = False,
    ) -> None:
        self.loaded = loaded
        self.store = store
        self.lock = lock
        self.http = http
        self.clock = clock
        self.once = once
        self.runs: dict[int, Run] = {}
        self.wakes: dict[int, asyncio.Event] = {}  # of runs that are driven
        self.accounts: dict[str, Account] = {}
        self.keboolas: dict[str, Keboola] = {}
        self.posting: set[int] = set()
        self.followed: set[int] = set()  # runs whose Keboola job was seen in this process
        self.stats = store.stats()
        self.is_stopping = False
        self.has_failed = False  # something could not be written, or a bug was met
        self.config_error: str | None = None
        self.told: list[asyncio.Event] = []  # set whenever something was committed
        self.empty_counts_from = -math.inf  # uptime: an empty search begun earlier says nothing
        self._redactor = redactor
        self._tasks: asyncio.TaskGroup | None = None
        self._drivers: dict[int, asyncio.Task[None]] = {}
        self._polling: dict[str, asyncio.Task[None]] = {}  # the accounts' loops
        self._current: set[int] = set()  # runs of the batch_ids that the config has now
        self._next_id = int(store.one("SELECT max(id) FROM runs") or 0) + 1
        self._touched: set[int] = set()  # runs whose poll changed nothing but its times
        self._touched_at = 0.0
        self._stats_changed: set[str] = set()
        self._pruned_at = self._swept_at = -math.inf
        self._data_version = -1
        self._trouble: set[tuple[int | None, str]] = set()  # told, and not over
        self._last_told: dict[tuple[object, ...], float] = {}

    # --- running ---

    async def run(self, helpers: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
        """Work, with `helpers` beside. Raises StateError where going on could start a job twice."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._see_if_state_is_older()
                self.apply(self.loaded)
                for account in self.accounts.values() if self.once else ():
                    self.spawn(account.run_once())
                for helper in helpers if self.once else (self._keep_house, *helpers):
                    self.spawn(helper())
        except BaseExceptionGroup as group:
            errors: BaseException | None = group.split(TeckoError)[0]
            while isinstance(errors, BaseExceptionGroup):
                errors = errors.exceptions[0]
            raise (errors or group) from None
        finally:
            self._tasks = None

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Start a task that `run` waits for, and whose exception ends it."""
        if self._tasks is None:
            raise RuntimeError("the engine does not run")
        return self._tasks.create_task(work)  # type: ignore[arg-type] # coroutines all

    def _see_if_state_is_older(self) -> None:
        """Take no empty search for an answer yet where the state file does not know the last POST.

        It was lost or restored; what was posted shows in Keboola's search within the grace.
        """
        posted = self.lock.last_post
        query = "SELECT max(at) FROM events WHERE name = 'trigger_sending'"
        if posted and posted.wall > (self.store.one(query) or 0) + 1:
            passed_s = posted.until_s(self.clock.boot_time())
            left_s = self.loaded.config.trigger_grace - passed_s
            if left_s > 0:
                self.empty_counts_from = self.clock.uptime_s() + left_s
                self.log(Event.of("state_is_older", wait_s=round(left_s, 1)))

    async def _keep_house(self) -> None:
        """See every second what has changed outside, and write down what may wait."""
        while True:
            self.check_in_place()
            self.lock.touch()
            try:
                self._follow_clock()
                self.take_requests()
                self.flush()
                self.sweep()
            except (StorageError, sqlite3.Error) as error:
                self.note_failure(error, "housekeeping")
            await asyncio.sleep(1.0)

    def _follow_clock(self) -> None:
        """Move every pending time when the system's clock was set."""
        if by_s := self.clock.changed():
            self.runs = {run.id: shifted(run, by_s) for run in self.runs.values()}
            self._touched |= self.runs.keys()
            self._last_told.clear()
            for account in self.accounts.values():
                account.find_at += by_s
                account.wake.set()
            self.log(Event.of("clock_changed", seconds=round(by_s)))

    def sweep(self) -> None:
        """Tell what has come to need a person by lasting; once an hour, drop what is old."""
        now = self.clock.uptime_s()
        if now - self._swept_at >= 5:
            self._swept_at = now
            changes = [self._with_attention(run) for run in self.runs.values()]
            self.commit([change for change in changes if change[1]])
        if now - self._pruned_at >= HOUR_S:
            self._pruned_at = now
            config, wall = self.loaded.config, self.clock.now()
            self.store.prune(config.jobs, config.retention, wall)
            told = self._last_told.items()
            self._last_told = {key: at for key, at in told if at > wall - MINUTE_S}
            self._drivers = {i: task for i, task in self._drivers.items() if not task.done()}
            self.wakes = {i: wake for i, wake in self.wakes.items() if i in self._drivers}

    async def drain(self, hurry: asyncio.Event) -> None:
        """Begin nothing new, and give POSTs in flight up to 20 s; `hurry` cuts it short."""
        self.is_stopping = True
        for task in self._polling.values():
            task.cancel()
        until = self.clock.uptime_s() + 20
        while self.posting and self.clock.uptime_s() < until and not hurry.is_set():
            await wait_for_event(hurry, 0.05)
        self.log(*(Event.of("trigger_left_open", self.runs[i]) for i in self.posting))

    # --- taking a config ---

    def apply(self, loaded: LoadedConfig) -> None:
        """Make a new config the one that counts. After a StorageError, apply it again."""
        self.flush(at_once=True)
        config, terms = loaded.config, Terms(None, self.clock.boot_time())
        terms = replace(terms, grace_s=config.trigger_grace)
        self.store.execute(self._prepare(config))
        changes: dict[int, Change] = {}
        for run in self.store.runs_for(config.jobs):
            mine = self.runs.get(run.id)
            is_mine = mine is not None and mine.job == run.job
            changes[run.id] = (mine, []) if mine and is_mine else as_loaded(run, terms)
        known = {run.id: run for run, _ in changes.values()}
        old, before = self.loaded, (self.runs, self._current)
        try:
            self._current = self._assign(config, changes)
            self.loaded = loaded
            self.runs = {i: before[0].get(i, run) for i, run in known.items()}
            new = [self._with_config(change, old) for change in changes.values()]
            self.commit([c for c in new if c[1] or c[0] != self.runs.get(c[0].id)])
        except StorageError:
            self.loaded, (self.runs, self._current) = old, before
            raise
        self._arrange(loaded)
        self.take_requests(at_once=True)
        for run in list(self.runs.values()):
            self._place(run)

    def _prepare(self, config: Config) -> list[Statement]:
        """Return what a config changes before its runs are read.

        Webhooks that are new are told from here on. A match job under a new name takes over the
        groups of one that has left the config.
        """
        last_id = self.store.last_event_id()
        statements: list[Statement] = [
            ("INSERT OR IGNORE INTO webhooks VALUES (?, ?, 0, 0)", (name, last_id))
            for name, _ in config.notify
        ]
        told = compact_json([name for name, _ in config.notify])
        gone = "DELETE FROM webhooks WHERE secret NOT IN (SELECT value FROM json_each(?))"
        statements.append((gone, (told,)))
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        matching = [(n, job) for n, job in config.jobs.items() if job.match]
        mine = {name: [job.match_key, str(config.target(job))] for name, job in matching}
        left = {tuple(key): name for name, key in known.items() if name not in config.jobs}
        for name, key in mine.items():
            if name not in known and (old := left.pop(tuple(key), None)):
                rename = "UPDATE runs SET job = ? WHERE job = ? AND \"group\" <> ''"
                copy = "INSERT OR REPLACE INTO meta SELECT ?, value FROM meta WHERE key = ?"
                statements.append((rename, (name, old)))
                statements.append((copy, (f"read:{name}", f"read:{old}")))
        if known | mine != known:
            statements.append(Store.meta_statement("match_jobs", known | mine))
        return statements

    def _assign(self, config: Config, changes: dict[int, Change]) -> set[int]:
        """Bring the runs of jobs with batch_ids to what the config says; returns their numbers."""
        targets = {name: config.target(job) for name, job in config.jobs.items()}
        runs = [run for run, _ in changes.values() if not run.group]
        assigned, current = assign(config.jobs, targets, runs), set()
        for name, job in config.jobs.items():
            if run := assigned.get(name):
                after = replace(run, job=name, batches=in_order(job, run.batches))
                changes[run.id] = (after if after != run else run, changes[run.id][1])
            elif not job.match:
                batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
                now, self._next_id = self.clock.now(), self._next_id + 1
                run = Run(self._next_id, name, targets[name], batches=batches, next_at=now)
                changes[run.id] = (run, [])
            if run:
                current.add(run.id)
        return current

    def _with_config(self, change: Change, old: LoadedConfig) -> Change:
        """Return a run as a new config has it: what has changed for it is due at once."""
        run, events = change
        job, old_job = self.job_of(run), old.config.jobs.get(run.job)
        if job is None:
            return change
        now = self.clock.now()
        if run.phase in {Phase.REJECTED, Phase.INTENT} and run.sending_at is None:
            target, token = self.loaded.config.target(job), self.loaded.secrets[job.keboola_secret]
            if run.input_digest not in {"", input_digest(job, target, token)}:
                return replace(as_intended(run, now), input_digest=""), events
        if job == old_job and self.loaded.access(job) == old.access(old_job):
            return change
        if run.phase in {Phase.POLLING, Phase.INTENT, Phase.SENT, Phase.UNKNOWN}:
            return replace(run, failures=0, next_at=min(run.next_at, now)), events
        return change

    def _arrange(self, loaded: LoadedConfig) -> None:
        """Have an account for each OpenAI key that is used, and a client for each Keboola token."""
        config, secrets = loaded.config, loaded.secrets
        self.http.configure(config)
        before, self.keboolas = self.keboolas, {}
        for name in config.of_type("keboola"):
            entry, known = config.secrets[name], before.get(name)
            if not known or (known.stack_url, known.token) != (entry.stack_url, secrets[name]):
                note = functools.partial(self.note_request, name)
                known = Keboola(entry, secrets[name], self.http, self.clock, note)
            self.keboolas[name] = known
        used = {job.openai_secret for job in config.jobs.values()}
        accounts, self.accounts = self.accounts, {}
        for name in used:
            account = Account(self, config.secrets[name], secrets[name])
            known_account = accounts.pop(name, None)
            if known_account and known_account.identity == account.identity:
                account = known_account
            elif not self.once:
                if task := self._polling.pop(name, None):
                    task.cancel()
                self._polling[name] = self.spawn(account.run())
            self.accounts[name] = account
            jobs = [job for job in config.jobs.values() if job.match and not job.rests]
            account.watch([job for job in jobs if job.openai_secret == name])
        for name in accounts:  # nobody uses them now
            if task := self._polling.pop(name, None):
                task.cancel()
        for name in self.stats.keys() - config.secrets.keys():
            was_refused = self.stats.pop(name).refused_since
            told = [Event.of("account_failing_recovered", secret=name)] if was_refused else []
            self.commit([], told, [("DELETE FROM secrets WHERE name = ?", (name,))])

    # --- what accounts and drivers need ---

    def job_of(self, run: Run) -> Job | None:
        """Return the job that a run belongs to, where the config has it."""
        return self.loaded.config.jobs.get(run.job)

    def is_polled(self, run: Run) -> bool:
        """Return whether a run's batches are polled."""
        job = self.job_of(run)
        if job is None or job.rests or self.is_stopping or run.phase is not Phase.POLLING:
            return False
        return run.id in self._current or bool(job.match and run.group)

    def may_post(self, run: Run) -> bool:
        """Return whether a run may be started now.

        Other ids under the same name do not stop it; a job that is gone or paused does.
        """
        job = self.job_of(run)
        return job is not None and not job.rests and not self.is_stopping

    def terms(self, run: Run) -> Terms:
        """Return what is decided by now for a run."""
        config = self.loaded.config
        limits = (config.trigger_grace, config.follow_interval, self.may_post(run))
        return Terms(self.job_of(run), self.clock.boot_time(), self.clock.jitter(), *limits)

    async def keboola_for(self, run: Run) -> Keboola:
        """Return a client whose token is of a run's stack and project. Raises ApiError for none.

        A token of another project never carries a run.
        """
        job, failure, target = self.job_of(run), None, run.target
        own = [job.keboola_secret] if job else []
        for keboola in [self.keboolas[name] for name in dict.fromkeys([*own, *self.keboolas])]:
            if keboola.stack_url == target.stack_url:
                try:
                    if await keboola.project() == target.project:
                        return keboola
                except ApiError as error:
                    failure = failure or error
        where = f"project {target.project} on {target.stack_url}"
        message = f"the config has no token of {where}, where this run was started"
        raise failure or ApiError(message, sent=False)

    def tell_unreadable(self, keboola: Keboola) -> None:
        """Tell once of old jobs that cannot be read, and count as another's."""
        unreadable, keboola.unreadable = keboola.unreadable, {}
        if unreadable:
            ids, error = list(unreadable), next(iter(unreadable.values()))
            self.log(Event.of("keboola_job_unreadable", id=", ".join(ids[:20]), error=str(error)))

    def check_in_place(self) -> None:
        """Raise StateError if the state file was deleted or replaced under the process.

        A commit into a deleted file succeeds, and would be forgotten.
        """
        if not (self.store.is_in_place() and self.lock.is_in_place()):
            message = f"the state file {self.store.path} or its lock was deleted or replaced"
            raise StateError(message, "nothing more is sent; start again")

    def record_polls(self, came: Iterable[tuple[int, Mapping[str, Batch | ApiError]]]) -> None:
        """Store what polls have brought, as one. Of what has not changed only times are written."""
        now, changes = self.clock.now(), []
        for run_id, answers in came:
            run = self.runs.get(run_id)
            job = self.job_of(run) if run else None
            if run is None or job is None or not self.is_polled(run):
                continue
            after, events = after_poll(run, job, answers, self.terms(run))
            times: dict[str, Any] = {"next_at": run.next_at, "last_check_at": run.last_check_at}
            if events or replace(after, **times) != run:
                changes.append((after, events))
            else:
                self.runs[run_id] = after
                self._touched.add(run_id)
        try:
            if changes:
                self.commit(changes)
        except StorageError as error:
            for run, _ in changes:
                self.note_failure(error, run.name, run)
                self.runs[run.id] = replace(self.runs[run.id], next_at=now + 5)

    def take_found(self, found: Iterable[tuple[Run, list[Event], list[Batch]]]) -> None:
        """Store runs that new batches begin or join, and batches that came late."""
        changes, also = [], []
        for changed, events, late in found:
            self._next_id += changed.id == 0
            run = changed if changed.id else replace(changed, id=self._next_id)
            also += [batch_statement(run.id, -1, batch) for batch in late]
            changes.append((run, events))
        self.commit(changes, also=also)

    # --- writing and telling ---

    def _with_attention(self, run: Run) -> Change:
        grace_s = self.loaded.config.trigger_grace
        return after_attention(run, self.job_of(run), grace_s, self.clock.now())

    def commit(
        self,
        changes: Iterable[Change],
        events: Iterable[Event] = (),
        also: Iterable[Statement] = (),
    ) -> None:
        """Commit the next states of runs with the events that tell of them, then tell them."""
        rows: list[tuple[Run | None, Run]] = []
        told, now = list(events), self.clock.now()
        for changed, its_events in changes:
            run, more = self._with_attention(self._clean_run(changed))
            rows.append((self.runs.get(run.id), run))
            told += [*its_events, *more]
        if self._trouble:
            told.append(Event.of("state_write_failed_recovered"))
        fresh = [event for event in told if not self._is_repeated(event, now)]
        stored = self.store.commit(rows, map(self._clean, fresh), now, also)
        self._last_told |= {self._repeat_key(event): now for event in fresh}
        self._trouble.clear()
        for _, run in rows:
            self.runs[run.id] = run
            self._place(run)
        for event in stored:
            say(event)
        for happened in self.told:
            happened.set()

    def _place(self, run: Run) -> None:
        """Have a run polled, driven, or dropped from memory, as its phase says."""
        job = self.job_of(run)
        mine = self.accounts.get(job.openai_secret) if job and self.is_polled(run) else None
        for account in self.accounts.values():
            if account is mine:
                account.run_ids.add(run.id)
                if run.next_at < account.until:
                    account.wake.set()
            else:
                account.run_ids.discard(run.id)
        is_driven = run.phase not in {Phase.POLLING, Phase.FINISHED, Phase.REFUSED}
        if is_driven and self._tasks is not None and not self.is_stopping:
            self.wakes.setdefault(run.id, asyncio.Event()).set()
            driver = self._drivers.get(run.id)
            if driver is None or driver.done():
                self._drivers[run.id] = self.spawn(drive_run(self, run.id))
        elif run.phase is Phase.FINISHED and job and job.match:
            ended = [
                r
                for r in self.runs.values()
                if r.job == run.job and r.phase is Phase.FINISHED and not r.attention
            ]
            for old in sorted(ended, key=lambda r: r.finished_at or 0.0)[:-5]:
                del self.runs[old.id]  # the state file has it

    def log(self, *events: Event) -> None:
        """Tell events that go with no change of a run; a full disk must not silence the log."""
        try:
            self.commit([], events)
        except StorageError:
            for event in events:
                say(self._clean(event))

    def _is_repeated(self, event: Event, now: float) -> bool:
        """Return whether the same was told within the last minute: something flaps."""
        kinds = ("batch_status", "poll_", "list_", "find_", "follow_")
        if not event.name.startswith(kinds):
            return False
        return now - self._last_told.get(self._repeat_key(event), -math.inf) < MINUTE_S

    @staticmethod
    def _repeat_key(event: Event) -> tuple[object, ...]:
        return event.name, event.run, *map(event.fields.get, ("batch_id", "status", "secret"))

    def _clean(self, event: Event) -> Event:
        """Return an event without secrets: the state file keeps it, and others read it."""
        cleaned = self._redactor.tree(dict(event.fields))
        return replace(event, fields=cleaned, text=self._redactor.text(event.text))

    def _clean_run(self, run: Run) -> Run:
        names = ("error", "post_error", "keboola_error", "keboola_status")
        texts: dict[str, Any] = {name: text for name in names if (text := getattr(run, name))}
        clean: dict[str, Any] = {n: self._redactor.text(text) for n, text in texts.items()}
        return replace(run, **clean) if clean != texts else run

    def note_failure(self, error: Exception, where: str, run: Run | None = None) -> None:
        """Tell once of trouble with the state file, until it is over; of a bug with its trace."""
        self.has_failed = True
        if not isinstance(error, StorageError | sqlite3.Error):
            trace = "".join(traceback.format_exception(error)).splitlines()
            name = type(error).__name__
            say(self._clean(Event.of("internal_error", where=where, error=name, traceback=trace)))
        elif (key := (run.id if run else None, str(error))) not in self._trouble:
            self._trouble.add(key)
            say(Event.of("state_write_failed", run, error=str(error)))

    def note_request(self, name: str, error: ApiError | None, _: float | None) -> None:
        """Remember how a request with a secret has fared."""
        entry = self.loaded.config.secrets.get(name)
        if entry is None:
            return
        before = self.stats.get(name) or SecretStats(name, entry.type)
        after = self.stats[name] = before.after(error, self.clock.now())
        self._stats_changed.add(name)
        if bool(after.refused_since) != bool(before.refused_since):
            kind = "account_failing" if after.refused_since else "account_failing_recovered"
            with contextlib.suppress(StorageError):  # else it is written with the next flush
                self.store.execute([SecretStats.statement(after)])
            self.log(Event.of(kind, secret=name, error=after.error))

    def note_config(self, error: str | None, *events: Event) -> None:
        """Remember which config the process runs with, and what is wrong with the file, if so."""
        config, told = self.loaded.config, list(events)
        before, self.config_error = self.config_error, error and self._redactor.text(error)
        known, also = self.store.meta("config") or {}, []
        if error is None:
            loaded_at = rfc3339(self.clock.now())
            known = {"path": str(config.path), "sha256": config.sha256, "loaded_at": loaded_at}
            good = {"path": str(config.path.absolute()), "text": self.loaded.text}
            also.append(Store.meta_statement("good_config", good))
            told += [Event.of("config_rejected_recovered")] if before else []
        also.append(Store.meta_statement("config", {**known, "error": self.config_error}))
        self.commit([], told, also)

    def flush(self, *, at_once: bool = False) -> None:
        """Write when runs were polled, and how secrets fared, now and then."""
        now = self.clock.uptime_s()
        if not at_once and now - self._touched_at < max(2.0, len(self._touched) * 0.005):
            return
        statement = "UPDATE runs SET last_check_at = ?, next_at = ? WHERE id = ?"
        runs = [self.runs[i] for i in self._touched if i in self.runs]
        rows: list[Statement] = [
            (statement, (r.last_check_at, r.next_at if math.isfinite(r.next_at) else None, r.id))
            for r in runs
        ]
        names = self._stats_changed & self.stats.keys()
        rows += [SecretStats.statement(self.stats[name]) for name in names]
        if rows:
            self.store.execute(rows)
        self._touched.clear()
        self._stats_changed.clear()
        self._touched_at = now

    # --- what people ask for, and are shown ---

    def take_requests(self, *, at_once: bool = False) -> None:
        """Do what people asked for with `retry` since the last time."""
        version = int(self.store.one("PRAGMA data_version"))
        if version == self._data_version and not at_once:
            return
        for row in self.store.db.execute("SELECT * FROM requests ORDER BY id").fetchall():
            id_, run_id, force, rerun, phase = row
            request = RetryRequest(id_, run_id, bool(force), rerun, Phase(phase))
            done: list[Statement] = [("DELETE FROM requests WHERE id = ?", (id_,))]
            stored = self.store.runs("id = :id", {"id": run_id})
            run = self.runs.get(run_id) or (stored[0] if stored else None)
            came: Change | str = "it is gone"
            if run and run_id in self.posting:
                came = "its Keboola job is being started now"
            elif run:
                came = after_retry(run, self.job_of(run), request, self.clock.now())
            if isinstance(came, str):
                self.commit([], [Event.of("retry_refused", run, why=came)], done)
            else:
                self.commit([came], also=done)
        self._data_version = version

    def summary(self) -> str:
        """Return how the runs are, in one line."""
        statuses = [status_of(run, self.job_of(run)) for run in self.shown()]
        counts = [f"{n} {status}" for status, n in sorted(collections.Counter(statuses).items())]
        bad = "; the config file has problems, the previous one still counts"
        return f"{', '.join(counts) or 'no jobs'}{bad if self.config_error else ''}"

    def shown(self) -> list[Run]:
        """Return the runs that people are shown, in the config's order."""
        place = {name: i for i, name in enumerate(self.loaded.config.jobs)}
        runs = [
            run
            for run in self.runs.values()
            if run.job in place and (run.id in self._current or run.group or run.may_be_at_keboola)
        ]
        return sorted(runs, key=lambda r: (place[r.job], r.id not in self._current, r.id))


# --- reloading ------------------------------------------------------------------------------------


def note_loaded(engine: Engine, old: Config | None) -> None:
    """Tell that a config counts now, which jobs it changes, and what could be better about it."""
    config, known = engine.loaded.config, engine.store.meta("config") or {}
    if engine.once and known.get("sha256") == config.sha256 and not known.get("error"):
        return  # from cron, a pass without news says nothing
    facts: dict[str, Any] = {"sha256": config.sha256, "jobs": len(config.jobs)}
    changes = [counted(len(config.jobs), "job")]
    if old:
        before, after = old.jobs, config.jobs
        jobs = {
            "added": [name for name in after if name not in before],
            "removed": [name for name in before if name not in after],
            "changed": [n for n, job in after.items() if n in before and before[n] != job],
        }
        facts |= jobs
        changes = [
            f"{kind} {', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}"
            for kind, names in jobs.items()
            if names
        ]
    events = [Event.of("config_loaded", changes="; ".join(changes) or "no job changed", **facts)]
    warnings = [*engine.loaded.warnings]
    if unreadable := ", ".join(map(quoted, engine.http.rules.unreadable)):
        warnings.append(f"$NO_PROXY has entries that are neither host nor network: {unreadable}")
    events += [Event.of("config_warning", warning=warning) for warning in warnings]
    engine.note_config(None, *events)


def note_rejected(engine: Engine, error: ConfigError) -> None:
    """Tell that the config file has problems, and that another one counts."""
    problems = [str(problem) for problem in error.problems]
    event = Event.of("config_rejected", problem=problems[0], problems=problems)
    engine.note_config("\n".join(problems), event)


class Reloader:
    """Sees that the config, its key file or a secret's file has changed, and has it taken."""

    def __init__(
        self,
        engine: Engine,
        files: Files,
        manager: ServiceManager,
        redactor: Redactor,
        configure: Callable[[Config], None],
    ) -> None:
        self._configure = configure
        self._engine = engine
        self._redactor = redactor
        self._manager = manager
        self._path = engine.loaded.config.path
        self._seen = dict(files.seen)
        self._ripening: dict[Path, bytes] = {}  # rewritten in place: it may be half of a file
        self._ripe_at = math.inf
        self._is_hangup = False
        self._happened = asyncio.Event()

    async def run(self) -> None:
        """Compare the files on every event, every two seconds, and on SIGHUP, and take them."""
        while True:
            self._happened.clear()
            try:
                await self.check()
            except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
                self._engine.note_failure(error, "reload")
            left_s = self._ripe_at - self._engine.clock.uptime_s()
            await wait_for_event(self._happened, min(2.0, max(0.05, left_s)))

    def on_hangup(self) -> None:
        """Reload, whatever the files say."""
        self._is_hangup = True
        self._happened.set()

    async def watch(self) -> None:
        """Set off a comparison on every event in the config's directory.

        The directory is watched, not the file: editors replace it, Kubernetes swaps a link.
        """
        import watchfiles  # it costs the other commands a third of their start

        ours = (self._engine.store.path.name, *PUBLISHED, *(f".{name}" for name in PUBLISHED))
        while True:
            try:
                async for _ in watchfiles.awatch(
                    self._path.parent,
                    watch_filter=lambda _, path: not Path(path).name.startswith(ours),
                    step=100,
                    recursive=False,
                ):
                    self._happened.set()
            except (OSError, RuntimeError) as error:  # the comparison sees what this does not
                self._engine.log(Event.of("watch_failed", error=one_line(str(error))))
            await asyncio.sleep(MINUTE_S)

    async def check(self) -> None:
        """Take the files if they differ from those last tried, good or bad.

        A file that was replaced is whole. One that was rewritten in place counts when it has stayed
        the same for two seconds: half of a config can be valid YAML.
        """
        force, self._is_hangup = self._is_hangup, False
        files = Files()
        await asyncio.to_thread(lambda: [files.read(path) for path in self._seen])
        pairs = {path: (self._seen[path], read) for path, read in files.seen.items()}
        changed = {p: now for p, (was, now) in pairs.items() if now.digest != was.digest}
        in_place = {
            path: read.digest
            for path, read in changed.items()
            if read.inode == self._seen[path].inode and not read.error
        }
        if in_place and in_place != self._ripening and not force:
            self._ripe_at = self._engine.clock.uptime_s() + 2.0
        self._ripening = in_place
        if force or not in_place:
            self._ripe_at = -math.inf
        if not force and (not changed or self._engine.clock.uptime_s() < self._ripe_at):
            self._ripe_at = self._ripe_at if changed else math.inf
            return
        self._ripening, self._ripe_at = {}, math.inf
        self._manager.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await self._take(files)
            self._seen = dict(files.seen)
        finally:  # what could not be stored is tried again at the next comparison
            self._manager.send("READY=1", f"STATUS={self._engine.summary()}")

    async def _take(self, files: Files) -> None:
        """Parse and decrypt all of it; only then, in one step, let it count."""
        engine, old = self._engine, self._engine.loaded.config
        try:
            load = functools.partial(load_config, self._path, files, os.environ, self._redactor)
            loaded = await asyncio.to_thread(load)
            if old.state_path != loaded.config.state_path:
                what = f"the running process has {old.state_path} open"
                cure = "restart it to use another state file"
                raise ConfigError([Problem(str(self._path), 1, 1, "state", what, cure)])
        except ConfigError as error:
            return note_rejected(engine, error)
        engine.apply(loaded)
        self._configure(loaded.config)
        return note_loaded(engine, old)


# --- webhooks -------------------------------------------------------------------------------------


async def send_webhooks(engine: Engine, http: Http, *, once: bool = False) -> None:
    """Have each webhook told of the events that its rules name; a dead one delays no other.

    They read the event log: for each there is the number of the last event that it has had.
    """
    happened, sending = asyncio.Event(), dict[str, asyncio.Task[None]]()
    engine.told.append(happened)
    while True:
        happened.clear()
        for name, _ in engine.loaded.config.notify:
            if name not in sending or sending[name].done():
                sending[name] = asyncio.ensure_future(tell_webhook(engine, http, name))
        if once:
            await asyncio.gather(*sending.values())
            return
        await wait_for_event(happened, 5.0)


async def tell_webhook(engine: Engine, http: Http, name: str) -> None:
    """Tell one webhook what it has not had yet, in order, until one event does not get through.

    An event that did not for a day is dropped.
    """
    store, clock = engine.store, engine.clock
    update = "UPDATE webhooks SET told_up_to = ?, failures = ?, next_at = ? WHERE secret = ?"
    try:
        row = store.db.execute("SELECT * FROM webhooks WHERE secret = ?", (name,)).fetchone()
        told_up_to, failures, next_at = tuple(row)[1:]
        if clock.now() < next_at < clock.now() + HOUR_S:
            return
        for event in store.events(after=told_up_to):
            rules = [words for rule, words in engine.loaded.config.notify if rule == name]
            groups = EVENTS[event.name][1].split(",") if event.name in EVENTS else []
            if not any(word in rule for rule in rules for word in (event.name, *groups)):
                if event.id >= told_up_to + 100:  # so that the log can be pruned up to there
                    told_up_to = event.id
                    store.execute([(update, (told_up_to, failures, 0, name))])
                continue
            failure = await post_event(engine, http, name, event)
            if failure and (clock.now() - event.at < DAY_S or failures < 5):
                wait_s = backoff_s(failures + 1, 5, clock.jitter(), failure.retry_after_s)
                state = (told_up_to, failures + 1, clock.now() + wait_s, name)
                store.execute([(update, state)])
                if failures == 0:
                    engine.log(Event.of("notify_failed", secret=name, error=str(failure)))
                return
            told_up_to, failures = event.id, 0
            store.execute([(update, (told_up_to, 0, 0, name))])
            if failure:
                engine.log(Event.of("notify_dropped", secret=name, why=str(failure)))
    except Exception as error:  # noqa: BLE001 - trouble here is not the runs'
        engine.note_failure(error, "notify")


async def post_event(engine: Engine, http: Http, name: str, event: Event) -> ApiError | None:
    """Post one event to a webhook; returns why it was not taken, or None.

    Angle brackets would be commands to some chat programs. What it answers may be an echo of its
    address, which is secret.
    """
    text = one_line(f"TeckoChecker: {event.text}", 1000)
    text = text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")
    text = text.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
    body = {"text": text, "event": event.name, "job": event.job, "run": event.run}
    body |= {"level": event.level, "at": rfc3339(event.at)}
    headers = {"Content-Type": "application/json"}
    failure: ApiError | None = None
    try:
        address = engine.loaded.secrets[name].reveal()
        answer = await http.post(address, headers, compact_json(body), 10.0)
        if not answer.is_success:
            failure = answer.error(f"it answered {answer.status}", retryable=True)
    except ApiError as error:
        failure = error
    engine.note_request(name, failure, None)
    return failure


# --- the process ----------------------------------------------------------------------------------

PUBLISHED: Final = ("status.html", "status.json", "metrics.prom")


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for an end now."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # of log rotation: nothing is to be done

    def _on_signal(self) -> None:
        (self.now if self.stop.is_set() else self.stop).set()


async def keep_alive(engine: Engine, manager: ServiceManager) -> None:
    """Tell the service manager that the loop runs, and how the runs are."""
    watchdog = ["WATCHDOG=1"] if manager.watchdog_s else []
    manager.send("READY=1")
    while True:
        manager.send(*watchdog, f"STATUS={engine.summary()}")
        await asyncio.sleep(min(10.0, (manager.watchdog_s or 60.0) / 3))


async def run_engine(
    engine: Engine,
    signals: Signals,
    helpers: Sequence[Callable[[], Awaitable[None]]],
    manager: ServiceManager,
) -> int:
    """Let the engine work until it is done or a signal ends it; returns the exit code."""
    running = asyncio.ensure_future(engine.run(helpers))
    stopped = asyncio.ensure_future(signals.stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    is_interrupted = not running.done()
    if is_interrupted:
        manager.send("STOPPING=1")
        await engine.drain(signals.now)
        running.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    with contextlib.suppress(StorageError):
        engine.flush(at_once=True)
    return 130 if signals.now.is_set() or (is_interrupted and engine.once) else 0


