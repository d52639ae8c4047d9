# ==================================================================================================
# 7. Engine: what runs
# ==================================================================================================


class LogWriter:
    """Writes lines to standard error from a thread of its own: a reader that is slow, full or gone
    never holds up the loop. What does not fit is dropped and counted.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(10_000)
        self._dropped = 0
        self._thread: threading.Thread | None = None
        is_ours = False
        with contextlib.suppress(OSError):
            status = os.fstat(2)
            is_ours = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        self.has_priorities = is_ours  # journald takes them from the beginning of a line

    def msg(self, line: str) -> None:
        """Write a line, as structlog's loggers do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        try:
            if self._dropped:
                self._lines.put_nowait(f"({self._dropped} lines of the log were dropped)")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = error = critical = msg

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data) :]

    def close(self) -> None:
        """Wait a moment until what was written has arrived."""
        if self._thread:
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(1.0)


def configure_logging(config: Config, redactor: Redactor, writer: LogWriter) -> None:
    """Send events, and the warnings of libraries, to standard error through one redactor."""
    is_console = config.log_format == "console" or (
        config.log_format == "auto" and sys.stderr is not None and sys.stderr.isatty()
    )
    priorities = {"debug": 7, "info": 6, "warning": 4, "error": 3}

    def render(_: object, level: str, line: Mapping[str, Any]) -> str:
        head = {name: line[name] for name in ("time", "level", "event", "text")}
        told = redactor.tree(head | dict(line))  # the last before the line is made
        prefix = f"<{priorities.get(level, 3)}>" if writer.has_priorities else ""
        if not is_console:
            return prefix + json.dumps(told, ensure_ascii=False)
        at = datetime.fromisoformat(told["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        mark = "" if level == "info" else f"{level}: "
        return f"{prefix}{at} {mark}{told['text']}" + "".join(
            f"\n{line}" for line in told.get("traceback", "").splitlines()
        )

    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,
    )

    class Forwarder(logging.Handler):
        """Passes on what a library has to say."""

        def emit(self, record: logging.LogRecord) -> None:
            text = one_line(record.getMessage(), 1000)
            say(Event("library_warning", "warning", None, None, {"logger": record.name}, text))

    logging.raiseExceptions = False
    logging.getLogger().handlers = [Forwarder()]
    logging.getLogger().setLevel(logging.WARNING)  # httpx logs URLs at INFO, httpcore headers
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)  # see DaemonThreads


def say(event: Event) -> None:
    """Write one event to the log."""
    document = replace(event, at=event.at or time.time()).document()
    log = getattr(structlog.get_logger(), document["level"])
    log(document.pop("event"), **{"time": document.pop("time"), **document})


class ServiceManager:
    """The service manager's side of the process (sd_notify(3)); silent where there is none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = env.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog_us) / 1e6 if ours and watchdog_us.isdigit() else None

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
    try:
        async with asyncio.timeout(max(0.0, timeout_s) if math.isfinite(timeout_s) else None):
            await event.wait()
    except TimeoutError:
        pass
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
    newest_at: float = 0.0
    is_stale: bool = False

    def missing(self) -> list[Batch]:
        """Return the due batches that no page has shown, the newest first."""
        seen = self.unchanged.keys() | self.changed
        return sorted(
            (batch for key, batch in self.due.items() if key not in seen),
            key=lambda batch: -(batch.created_at or 0.0),
        )

    @property
    def overhead(self) -> int:
        """How many requests pages have cost beyond what they have saved."""
        return self.pages - len(self.unchanged)

    def take(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Note what a page shows; returns how many due batches."""
        before = len(self.unchanged) + len(self.changed)
        self.pages += 1
        for row in rows:
            known = self.known.get(row["id"])
            if known is not None:
                self._take_row(row, known)
        ages = [at for row in rows[:: max(1, len(rows) - 1)] if (at := time_or_none(row.get("created_at")))]
        if ages:
            self.newest_at = max(self.newest_at, *ages)
            self.span_s = max(self.span_s if len(rows) < 100 else 1.0, max(ages) - min(ages))
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
        counts = counts if isinstance(counts, dict) else {}
        told = [counts.get(name) for name in ("total", "completed", "failed")]
        if told != [known.total, known.completed, known.failed] and None not in told:
            total, completed, failed = map(count_or_none, told)
            known = replace(known, total=total, completed=completed, failed=failed)
        self.unchanged[known.id] = known


class Account:
    """One OpenAI key: polls the batches of its runs, and finds new ones.

    Due batches are polled together. Pages of the account's list are a hint and save requests; what
    counts is a batch's own answer. A request that hangs is left to its deadline while the loop goes
    on. A poll takes at most two requests more than single GETs would, apart from the pages that new
    batches are looked for on.
    """

    def __init__(self, engine: Engine, entry: SecretEntry, identity: tuple[Any, ...]) -> None:
        """Take what tells this account from another one: the key first, then how it is used."""
        key: Secret = identity[0]
        self.name = entry.name
        self.base_url = entry.base_url
        self.identity = identity
        self.run_ids: set[int] = set()  # of the runs that it polls
        self.finders: list[Job] = []  # the jobs that it finds batches for
        self.wake = asyncio.Event()
        self._engine = engine
        self._headers = {entry.auth_header: key.reveal()}
        if entry.auth_header == "Authorization":
            self._headers = {"Authorization": f"Bearer {key.reveal()}"}
        if entry.organization:
            self._headers["OpenAI-Organization"] = entry.organization
        if entry.project:
            self._headers["OpenAI-Project"] = entry.project
        self._params = {"api-version": entry.api_version} if entry.api_version else {}
        self._places = asyncio.Semaphore(engine.http.max_concurrency)  # before those of all
        self._waiting: dict[str, list[int]] = {}  # batches that are asked for, and for which runs
        self._answers: dict[int, dict[str, Batch | ApiError]] = {}  # of runs that are being polled
        self._complete: list[int] = []  # of these, what can be recorded
        self._answered_at: dict[str, float] = {}
        self.until = math.inf  # when `run` sees again what is due
        self._in_flight = 0
        self._silences = 0  # requests in a row that no answer came to
        self._held_until = -math.inf
        self._last_words = ""
        self._list_from = -math.inf  # when pages may be read again
        self._list_failures = 0
        self._find_at = -math.inf
        self._find_failures = 0
        self._told_without_group: set[str] = set()

    # --- requests ---

    async def _get(self, path: str, params: Mapping[str, str], left_s: float) -> Answer:
        engine = self._engine
        url = f"{self.base_url}{path}"
        note = functools.partial(engine.note_request, self.name)
        self._in_flight += 1
        try:
            got = engine.http.get(url, self._headers, {**self._params, **params}, left_s)
            return await noted(got, "OpenAI", note)
        finally:
            self._in_flight -= 1

    def _refusal(self) -> ApiError | None:
        """Return what stands in the way of any request, where that takes long.

        A dead server holds each request to its deadline: one at a time finds out when it is back,
        and the places are left to other accounts.
        """
        left_s = self._held_until - self._engine.clock.uptime_s()
        if left_s > PATIENCE_S:
            return ApiError(self._last_words, status=429, retry_after_s=left_s, sent=False)
        if self._silences >= 5 and self._in_flight:
            return ApiError(self._last_words, sent=False)
        return None

    async def ask(self, batch_id: str) -> Batch:
        """Return a batch's own answer, the one that counts. Raises ApiError after the retries."""
        clock = self._engine.clock

        async def attempt(left_s: float) -> Batch:
            while (held_s := self._held_until - clock.uptime_s()) > 0 and not self._refusal():
                await asyncio.sleep(held_s)
            refusal = self._refusal()
            if refusal:
                raise refusal
            try:
                answer = await self._get(f"/batches/{batch_id}", {}, left_s)
                batch = self._batch_of(answer, batch_id)
            except ApiError as error:
                self._note(error)
                raise
            self._silences = 0
            return batch

        batch: Batch = await with_retries(attempt)
        self._answered_at[batch_id] = clock.uptime_s()
        return batch

    def _batch_of(self, answer: Answer, batch_id: str) -> Batch:
        try:
            return parse_batch(answer.json(), batch_id)
        except ValueError as error:
            message = f"OpenAI's answer is not a batch: it {error}{server_words(answer)}"
            raise answer.error(message, retryable=True) from None

    def _note(self, error: ApiError) -> None:
        """Remember what a failure says about the account as a whole, and what a 404 means."""
        self._silences = self._silences + 1 if error.status is None else 0
        if error.status is None or (error.status == 429 and error.retry_after_s):
            self._last_words = str(error)
        if error.status == 429 and error.retry_after_s:
            until = self._engine.clock.uptime_s() + min(error.retry_after_s, HOUR_S)
            self._held_until = max(self._held_until, until)
        if error.status == 404:
            causes = "the batch was deleted, or the key belongs to another OpenAI project"
            error.args = (f"{error}: {causes}, or base_url is wrong",)

    async def page(self, cursor: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return the rows of the account's newest batches, or of those after one, and if more come.

        Source: OpenAI's API reference, `GET /batches`. Raises ApiError, without retries: what it
        would have shown is asked for one by one.
        """
        params = {"limit": "100"} | ({"after": cursor} if cursor else {})
        answer = await self._get("/batches", params, REQUEST_S)
        data = answer.json()
        rows = data.get("data") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            message = f"OpenAI's answer is not a list{server_words(answer)}"
            raise answer.error(message, retryable=True)
        good = [
            row
            for row in rows
            if isinstance(row, dict) and isinstance(row.get("id"), str) and row["id"]
        ]
        return good, bool(good) and data.get("has_more") is not False

    # --- the loop ---

    async def run(self) -> None:
        """Poll what is due, and find what is new, until cancelled; with --once, all of it, once."""
        engine, clock = self._engine, self._engine.clock
        while not engine.is_stopping:
            self.wake.clear()
            now = clock.now()
            idle = [engine.runs[i] for i in self.run_ids if i not in self._answers]
            is_finding = bool(self.finders) and self._find_at <= now
            if is_finding or any(run.next_at <= now for run in idle):
                try:
                    due = [run for run in idle if run.next_at <= now + self._early_s(run)]
                    await self._poll(due, is_finding=is_finding)
                except (StorageError, sqlite3.Error) as error:
                    engine.note_trouble(error)
                    self._find_at = clock.now() + 5
                except Exception as error:  # noqa: BLE001 - a bug in one account is not the others'
                    engine.note_bug(error, self.name)
                    self._find_at = clock.now() + MINUTE_S
            waiting = [engine.runs[i].next_at for i in self.run_ids if i not in self._answers]
            self.until = min([*waiting, self._find_at if self.finders else math.inf], default=0)
            # A suspended machine's timers stand still: none is longer than half a minute.
            await wait_for_event(self.wake, min(30.0, self.until - clock.now()))

    def _early_s(self, run: Run) -> float:
        """Return how early a run may be polled together with one that is due."""
        job = self._engine.job_of(run)
        return min(job.poll_interval / 10, MINUTE_S) if job else 0.0

    async def run_once(self) -> None:
        """Poll all runs once, and those that are found meanwhile."""
        engine = self._engine
        polled: set[int] = set()
        is_finding = bool(self.finders)
        while True:
            runs = [engine.runs[i] for i in self.run_ids if i not in polled]
            if not runs and not is_finding:
                return
            polled |= {run.id for run in runs}
            try:
                await self._poll(runs, is_finding=is_finding)
            except (StorageError, sqlite3.Error) as error:
                engine.note_trouble(error)
            is_finding = False
            while self._answers and not engine.is_stopping:
                self.wake.clear()
                await self.wake.wait()

    async def _poll(self, runs: Sequence[Run], *, is_finding: bool) -> None:
        """Begin the poll of some runs; it ends when each of their batches has answered."""
        due: dict[str, Batch] = {}  # what nobody is asking for yet
        known: dict[str, Batch] = {}
        for run in runs:
            known |= {batch.id: batch for batch in run.batches}
            pending = [batch for batch in run.batches if not batch.is_final]
            self._answers[run.id] = {}
            for batch in pending:
                if batch.id not in self._waiting:
                    due[batch.id] = batch
                self._waiting.setdefault(batch.id, []).append(run.id)
            if not pending:
                self._complete.append(run.id)
        reading = ListReading(due, known)
        seen_before = sum(batch.status is not None for batch in due.values())
        is_usable = self._list_from <= self._engine.clock.uptime_s() and not self._refusal()
        pays = seen_before >= 5 and is_usable
        if is_finding or pays:
            await self._read_list(reading, pays=pays, is_finding=is_finding)
        oldest = self._oldest_answer(reading)
        for batch_id, batch in reading.unchanged.items() if pays and not reading.is_stale else ():
            if batch_id != oldest:
                self._hear(batch_id, batch)
        self._engine.spawn(self._ask_all([key for key in due if key in self._waiting]))
        self._record()

    def _oldest_answer(self, reading: ListReading) -> str | None:
        """Return the batch to be asked for by itself beside a list: the one that was not longest."""
        if reading.overhead > 1:
            return None
        return min(
            reading.unchanged, key=lambda key: self._answered_at.get(key, -math.inf), default=None
        )

    async def _ask_all(self, batch_ids: Iterable[str]) -> None:
        """Ask for batches one by one, as many at a time as the account may."""
        async with asyncio.TaskGroup() as group:
            for batch_id in batch_ids:
                await self._places.acquire()
                group.create_task(self._ask_one(batch_id))

    async def _ask_one(self, batch_id: str) -> None:
        answer: Batch | ApiError
        try:
            answer = await self.ask(batch_id)
        except ApiError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - a bug that one batch meets is not the others'
            self._engine.note_bug(error, batch_id)
            answer = ApiError(f"internal error: {type(error).__name__}")
        finally:
            self._places.release()
        self._hear(batch_id, answer)

    def _hear(self, batch_id: str, answer: Batch | ApiError) -> None:
        """Take a batch's answer for all runs that wait for it."""
        if not self._complete:  # what is answered together is recorded as one
            asyncio.get_running_loop().call_soon(self._record)
        for run_id in self._waiting.pop(batch_id, ()):
            answers = self._answers.get(run_id)
            run = self._engine.runs.get(run_id)
            if answers is None:
                continue
            answers[batch_id] = answer
            if run is None or all(b.id in answers for b in run.batches if not b.is_final):
                self._complete.append(run_id)

    def _record(self) -> None:
        """Have the engine record the polls that are complete."""
        complete, self._complete = self._complete, []
        came = [(run_id, self._answers.pop(run_id)) for run_id in complete if run_id in self._answers]
        if not came:
            return
        self._engine.record_polls(came)
        found = (self._engine.runs.get(run_id) for run_id, _ in came)
        if self._engine.once or any(run and run.next_at < self.until for run in found):
            self.wake.set()

    def find_soon(self) -> None:
        """Have new batches found at once: the jobs that find them may be others now."""
        self._find_at = -math.inf
        self.wake.set()

    def forget(self, run_id: int) -> None:
        """Stop polling a run."""
        self.run_ids.discard(run_id)
        self._answers.pop(run_id, None)
        self.wake.set()

    # --- the list ---

    async def _read_list(self, reading: ListReading, *, pays: bool, is_finding: bool) -> None:
        """Read the pages of the list that are needed to find, and those that save requests."""
        finding = Finding(self._engine, self.finders) if is_finding else None
        try:
            cursor: str | None = None
            while True:
                rows, has_more = await self.page(cursor)
                shown = reading.take(rows)
                is_needed = finding is not None and self._find(finding, rows)
                is_worth_it = pays and shown >= 2 and bool(reading.missing())
                if not has_more or not (is_needed or is_worth_it):
                    break
                cursor = rows[-1]["id"]
            if finding:
                self._end_finding(finding, reading.newest_at)
            if pays:
                await self._read_clusters(reading)
                self._note_list(None, is_stale=reading.is_stale)
        except ApiError as error:
            if finding:
                self._note_find_failure(error)
            if pays:
                self._note_list(error)

    async def _read_clusters(self, reading: ListReading) -> None:
        """Read a page after each batch that others were created close to, while that saves."""
        missing = reading.missing()
        while missing and reading.overhead <= 1:
            first, *missing = missing
            if first.created_at is None:
                return
            close = [b for b in missing if (b.created_at or 0) >= first.created_at - reading.span_s]
            if len(close) < 2:
                continue
            cursor, shown, has_more = first.id, 2, True
            while shown >= 2 and has_more and reading.overhead <= 1:
                try:
                    rows, has_more = await self.page(cursor)
                except ApiError as error:
                    if error.status not in {400, 404}:  # the list has lost the cursor
                        raise
                    reading.pages += 1
                    break
                shown = reading.take(rows)
                left = {batch.id for batch in reading.missing()}
                missing = [batch for batch in missing if batch.id in left]
                last_at = time_or_none(rows[-1].get("created_at")) if rows else None
                if not any((b.created_at or 0) >= (last_at or 0) - reading.span_s for b in missing):
                    break
                cursor = rows[-1]["id"] if rows else cursor

    def _note_list(self, error: ApiError | None, *, is_stale: bool = False) -> None:
        """Do without the list for a while after a failure, for a day where there is none."""
        was_usable = self._list_failures == 0
        if error is None and not is_stale:
            if not was_usable:
                self._engine.log(Event.of("list_usable", secret=self.name))
            self._list_failures = 0
            return
        self._list_failures += 1
        wait_s = float(DAY_S)
        if error and (error.retryable or error.status == 429):
            jitter = self._engine.clock.jitter()
            wait_s = backoff_s(self._list_failures, MINUTE_S, jitter, error.retry_after_s)
        self._list_from = self._engine.clock.uptime_s() + wait_s
        if was_usable and not (error and error.status == 429):
            why = error or "it shows older statuses than the batches' own answers"
            self._engine.log(Event.of("list_not_usable", secret=self.name, error=str(why)))

    # --- finding ---

    def _find(self, finding: Finding, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Have the runs begun or joined that a page's rows belong to; returns if more are needed."""
        for job in finding.jobs:
            found = []
            for row in rows:
                with contextlib.suppress(ValueError):
                    found.append(row_of(row))
            self._find_for(job, [row for row in found if row.is_of(job)])
        ages = [at for row in rows if (at := time_or_none(row.get("created_at")))]
        return finding.needs_more(min(ages, default=0.0))

    def _find_for(self, job: Job, rows: Sequence[Row]) -> None:
        engine = self._engine
        known = engine.store.known_batches(job.name, [row.batch.id for row in rows])
        new = [row for row in rows if row.batch.id not in known]
        if not new:
            return
        for row in new if job.group_by else ():
            if not row.metadata.get(str(job.group_by)):
                self._note_without_group(job, row.batch.id)
        groups = {row.metadata.get(job.group_by, "") if job.group_by else row.batch.id for row in new}
        runs = engine.store.groups(job.name, groups)
        runs |= {g: engine.runs[run.id] for g, run in runs.items() if run.id in engine.runs}
        target = engine.loaded.config.target(job)
        engine.take_found(group_batches(job, target, new, runs, engine.clock.now()))

    def _note_without_group(self, job: Job, batch_id: str) -> None:
        """Tell once of a batch that lacks what it would be grouped by."""
        query = (
            "SELECT 1 FROM events WHERE job = ? AND name = 'batch_without_group'"
            " AND json_extract(fields, '$.batch_id') = ?"
        )
        if batch_id not in self._told_without_group:
            self._told_without_group.add(batch_id)
            if not self._engine.store.one(query, job.name, batch_id):
                event = Event.of("batch_without_group", batch_id=batch_id, group_by=job.group_by)
                text = f"{job.name}: {event.text}"
                self._engine.log(replace(event, job=job.name, text=text))

    def _end_finding(self, finding: Finding, newest_at: float) -> None:
        """Remember how far the list was read back to, completely."""
        now = self._engine.clock.now()
        if self._find_failures:
            self._engine.log(Event.of("find_recovered", secret=self.name))
        self._find_failures = 0
        self._find_at = now + min(job.poll_interval for job in finding.jobs)
        self._engine.commit([], also=finding.marks(newest_at))

    def _note_find_failure(self, error: ApiError) -> None:
        self._find_failures += 1
        if self._find_failures == 1:
            self._engine.log(Event.of("find_failed", secret=self.name, error=str(error)))
        interval_s = min(job.poll_interval for job in self.finders)
        jitter = self._engine.clock.jitter()
        wait_s = backoff_s(self._find_failures, interval_s, jitter, error.retry_after_s)
        self._find_at = self._engine.clock.now() + wait_s


def row_of(row: Mapping[str, Any]) -> Row:
    """Return a row of the list for finding. Raises ValueError for what is none.

    A row is a hint: one that says that its batch is finished leaves that to its own answer.
    """
    batch = parse_batch(row, row["id"])
    if batch.is_terminal:
        batch = Batch(batch.id, created_at=batch.created_at)
    batch = replace(batch, output_file_id=None, error_file_id=None)
    metadata = row.get("metadata")
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return Row(batch, {str(key): value for key, value in pairs if isinstance(value, str)})


class Finding:
    """How far an account's list has to be read back for new batches.

    To the newest row that was there at the last complete read, with an hour's overlap (a row may
    show up late) of at most two pages more than what is new; or to `since`.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self._marks: dict[str, float] = {}
        for job in jobs:
            mark = engine.store.meta(f"read:{job.name}") or {}
            if mark.get("key") == self._key(job):
                self._marks[job.name] = mark["to"]
        self._new_to = min(self._marks.get(job.name, job.since) for job in jobs)
        self._floor = min(
            max(job.since, self._marks.get(job.name, job.since) - HOUR_S) for job in jobs
        )
        self._pages_beyond = 0

    @staticmethod
    def _key(job: Job) -> str:
        return compact_json([job.match_key, job.since, job.openai_secret])

    def needs_more(self, oldest_at: float) -> bool:
        """Return whether to read on after a page whose oldest row was created at a time."""
        if oldest_at <= self._new_to:
            self._pages_beyond += 1
        return oldest_at > self._floor and self._pages_beyond <= 2

    def marks(self, newest_at: float) -> list[Statement]:
        """Return what stores that the list was read completely, where that is new."""
        return [
            Store.meta_statement(f"read:{job.name}", {"key": self._key(job), "to": newest_at})
            for job in self.jobs
            if newest_at > self._marks.get(job.name, 0.0) or job.name not in self._marks
        ]


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
        if action is Action.IDLE:
            return
        wait_s = run.next_at - engine.clock.now()
        if engine.once and action is Action.FOLLOW:
            if run_id in engine.followed:
                return
            wait_s = 0.0
        try:
            if wait_s > 0:
                if engine.once and wait_s > PATIENCE_S:
                    return
                await wait_for_event(engine.wakes[run_id], min(wait_s, 30.0))
                engine.wakes[run_id].clear()
            elif action is Action.ARM:
                engine.commit([(replace(as_intended(run, run.next_at), error=run.error), [])])
            elif action is Action.FOLLOW:
                await follow_run(engine, run)
            else:
                await search_and_start(engine, run)
            failures = 0
        except StorageError as error:
            failures += 1
            engine.note_trouble(error, run)
            if engine.once:
                return
            await asyncio.sleep(min(PATIENCE_S, backoff_s(failures, 1, engine.clock.jitter())))
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug that one run meets is not the others'
            engine.note_bug(error, run.name)
            if engine.once:
                return
            await asyncio.sleep(MINUTE_S)


async def search_and_start(engine: Engine, run: Run) -> None:
    """Search Keboola for a run's job; start it where the search allows that."""
    clock, grace_s = engine.clock, engine.loaded.config.trigger_grace
    job = engine.job_of(run)
    follow = job is None or job.follow
    began = clock.boot_time()
    came: list[KeboolaJob] | ApiError
    keboola = None
    try:
        if run.sending_at is None and job:
            keboola = engine.keboolas[job.keboola_secret]
            target = replace(engine.loaded.config.target(job), project=await keboola.project())
            if engine.runs.get(run.id) is not run or engine.job_of(run) is not job:
                return
            run = engine.commit_aimed(as_aimed(run, job, target, keboola.token), before=run)
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
    is_ours = keboola is not None and engine.keboolas.get(keboola.name) is keboola
    may_post = engine.may_post(run) and is_ours
    if not came and began.uptime_s < engine.empty_counts_from:
        engine.commit([(replace(run, next_at=clock.now() + engine.empty_counts_from - began.uptime_s), [])])
        return
    change = after_search(
        run,
        came,
        began=began,
        may_post=may_post,
        follow=follow,
        grace_s=grace_s,
        now=clock.now(),
        jitter=clock.jitter(),
    )
    if change[0].phase is not Phase.SENDING or keboola is None:
        if change[0] != run:
            engine.commit([change])
        return
    engine.check_in_place()
    engine.commit([change])  # nothing was awaited since the search was judged
    await post_run(engine, keboola, change[0].id)


async def post_run(engine: Engine, keboola: Keboola, run_id: int) -> None:
    """Send a run that was committed as SENDING, and commit what came of it, however long it takes."""
    clock = engine.clock
    run = engine.runs[run_id]
    engine.lock.note_post(clock.boot_time())
    engine.posting.add(run_id)
    came: KeboolaJob | ApiError
    try:
        try:
            came = await keboola.create(run.payload)
        except ApiError as error:
            came = error
        job = engine.job_of(run)
        change = after_post(
            engine.runs[run_id],
            came,
            follow=job is None or job.follow,
            grace_s=engine.loaded.config.trigger_grace,
            now=clock.boot_time(),
            jitter=clock.jitter(),
        )
        # The outcome is known only here. With --once, the next pass finds `sending`, and searches.
        give_up_at = clock.uptime_s() + (PATIENCE_S if engine.once else math.inf)
        while True:
            try:
                engine.commit([change])
            except StorageError as error:
                if clock.uptime_s() > give_up_at:
                    raise
                engine.note_trouble(error, run)
                await asyncio.sleep(1)
            else:
                return
    finally:
        engine.posting.discard(run_id)


async def follow_run(engine: Engine, run: Run) -> None:
    """Look once at a run's Keboola job."""
    engine.followed.add(run.id)
    config, job = engine.loaded.config, engine.job_of(run)
    came: KeboolaJob | ApiError
    try:
        came = await (await engine.keboola_for(run)).job(str(run.keboola_job_id))
    except ApiError as error:
        came = error
    if engine.runs.get(run.id) is not run:
        return
    change = after_follow(
        run,
        came,
        poll_interval_s=job.poll_interval if job else 5 * MINUTE_S,
        follow_interval_s=config.follow_interval,
        retry_on_error=job.retry_on_error if job and not job.rests else 0,
        now=engine.clock.now(),
        jitter=engine.clock.jitter(),
    )
    engine.commit([change])


# --- everything -----------------------------------------------------------------------------------


class Engine:
    """What runs: applies a config, has accounts polled, runs driven, and commits what came of it.

    `apply` takes a new config at any time; `run` works until it is cancelled or, with --once, until
    every unfinished run has had its poll and its step.
    """

    def __init__(  # noqa: PLR0913 - what it works with
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
        self.followed: set[int] = set()  # runs whose Keboola job was looked at in this process
        self.stats = store.stats()
        self.is_stopping = False
        self.has_failed = False  # something could not be written, or a bug was met
        self.config_error: str | None = None
        self.told: list[asyncio.Event] = []  # set whenever something was committed
        self.empty_counts_from = -math.inf  # uptime: an empty search that began earlier says nothing
        self._redactor = redactor
        self._tasks: asyncio.TaskGroup | None = None
        self._drivers: dict[int, asyncio.Task[None]] = {}
        self._polling: dict[str, asyncio.Task[None]] = {}  # the accounts' loops
        self._current: set[int] = set()  # runs of the batch_ids that the config has now
        self._next_id = int(store.one("SELECT max(id) FROM runs") or 0) + 1
        self._touched: set[int] = set()  # runs whose poll changed nothing but its times
        self._touched_at = 0.0
        self._stats_changed: set[str] = set()
        self._pruned_at = -math.inf
        self._swept_at = -math.inf
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
                if self.once:
                    for account in self.accounts.values():
                        self.spawn(account.run_once())
                else:
                    self.spawn(self._keep_house())
                for helper in helpers:
                    self.spawn(helper())
        except BaseExceptionGroup as group:
            errors, _ = group.split(TeckoError)
            while isinstance(errors, BaseExceptionGroup):
                errors = errors.exceptions[0]
            if errors:
                raise errors from None
            raise

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
        known = float(self.store.one("SELECT max(at) FROM events WHERE name = 'trigger_sending'") or 0)
        if posted is None or posted.wall < known + 1:
            return
        left_s = self.loaded.config.trigger_grace - posted.until_s(self.clock.boot_time())
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
                self.note_trouble(error)
            await asyncio.sleep(1.0)

    def _follow_clock(self) -> None:
        """Move every pending time when the system's clock was set."""
        by_s = self.clock.changed()
        if by_s:
            for run in list(self.runs.values()):
                self.runs[run.id] = shifted(run, by_s)
            self._touched |= self.runs.keys()
            for account in self.accounts.values():
                account.wake.set()
            self.log(Event.of("clock_changed", seconds=round(by_s)))

    def sweep(self) -> None:
        """Tell what has come to need a person by lasting; once an hour, drop what is old."""
        now = self.clock.uptime_s()
        if now - self._swept_at >= 5:
            self._swept_at = now
            pairs = [(run, self._with_attention(run)) for run in self.runs.values()]
            self.commit([change for run, change in pairs if change[0] is not run])
        if now - self._pruned_at >= HOUR_S:
            self._pruned_at = now
            config = self.loaded.config
            self.store.prune(config.jobs, config.retention, self.clock.now())
            cutoff = self.clock.now() - MINUTE_S
            self._last_told = {key: at for key, at in self._last_told.items() if at > cutoff}
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
        for run_id in self.posting:
            self.log(Event.of("trigger_left_open", self.runs[run_id]))

    # --- taking a config ---

    def apply(self, loaded: LoadedConfig) -> None:
        """Make a new config the one that counts. After a StorageError, apply it again."""
        self.flush(at_once=True)
        old, config = self.loaded, loaded.config
        now = self.clock.boot_time()
        last_id = self.store.last_event_id()
        insert = "INSERT OR IGNORE INTO webhooks VALUES (?, ?, 0, 0)"
        self.store.execute([(insert, (name, last_id)) for name, _ in config.notify])
        known = {run.id: run for run in self.store.runs_for(config.jobs)}
        changes: list[Change] = []
        for run in known.values():
            mine = self.runs.get(run.id)
            changes.append((mine, []) if mine else as_loaded(run, now, config.trigger_grace))
        changes = self._renamed(config, changes)
        changes, current = self._assigned(config, changes)
        before = (self.runs, self._current)
        self.loaded, self._current = loaded, current
        try:
            changes = [self._with_config(run, events, old) for run, events in changes]
            stored = {run.id: before[0].get(run.id) or known.get(run.id) for run, _ in changes}
            new = [
                (run, events)
                for run, events in changes
                if events or not (was := stored[run.id]) or replace(run, next_at=was.next_at) != was
            ]
            self.runs = {run_id: run for run_id, run in stored.items() if run}
            self.commit(new, also=[Store.meta_statement("match_jobs", self._match_jobs(config))])
        except StorageError:
            self.loaded, (self.runs, self._current) = old, before
            raise
        written = {run.id for run, _ in new}
        self.runs |= {run.id: run for run, _ in changes if run.id not in written}
        self.http.configure(config)
        self._arrange(loaded)
        self.take_requests(at_once=True)
        for run in list(self.runs.values()):
            self._place(run)

    def _renamed(self, config: Config, changes: list[Change]) -> list[Change]:
        """Take the groups of a match job that has left the config over to its new name."""
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        mine = self._match_jobs(config)
        left = {tuple(key): name for name, key in known.items() if name not in config.jobs}
        for name, key in mine.items():
            old = left.pop(tuple(key), None) if name not in known else None
            if old:
                self.store.execute(
                    [
                        ("UPDATE runs SET job = ? WHERE job = ? AND \"group\" <> ''", (name, old)),
                        (
                            "INSERT OR REPLACE INTO meta SELECT 'read:' || ?, value FROM meta"
                            " WHERE key = 'read:' || ?",
                            (name, old),
                        ),
                    ]
                )
                ids = {run.id for run, _ in changes}
                self.runs = {
                    i: replace(r, job=name) if r.group and r.job == old else r
                    for i, r in self.runs.items()
                }
                now = self.clock.boot_time()
                for run in self.store.runs_for({name: config.jobs[name]}):
                    if run.id not in ids:
                        changes.append(as_loaded(run, now, config.trigger_grace))
                changes = [
                    (replace(r, job=name) if r.group and r.job == old else r, e)
                    for r, e in changes
                ]
        return changes

    def _match_jobs(self, config: Config) -> dict[str, list[str]]:
        """Return what tells the jobs with `match` from each other, by name, also of those gone."""
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        return known | {
            name: [job.match_key, str(config.target(job))]
            for name, job in config.jobs.items()
            if job.match
        }

    def _assigned(
        self, config: Config, changes: Sequence[Change]
    ) -> tuple[list[Change], set[int]]:
        """Return changes with the runs of jobs with batch_ids as the config has them, and new ones."""
        jobs = config.jobs
        targets = {name: config.target(job) for name, job in jobs.items()}
        assigned = assign(jobs, targets, (run for run, _ in changes if not run.group))
        events = {run.id: told for run, told in changes}
        after = {run.id: run for run, _ in changes}
        current = set()
        for name, job in jobs.items():
            run = assigned.get(name)
            if run:
                after[run.id] = replace(run, job=name, batches=in_order(run, job, run.batches))
            elif not job.match:
                batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
                run = Run(self._next_id, name, targets[name], batches=batches)
                run = replace(run, next_at=self.clock.now())
                self._next_id += 1
                after[run.id] = run
            if run:
                current.add(run.id)
        return [(run, events.get(run.id, [])) for run in after.values()], current

    def _with_config(self, run: Run, events: list[Event], old: LoadedConfig) -> Change:
        """Return a run as a new config has it: what has changed for it is due at once."""
        job, old_job = self.loaded.config.jobs.get(run.job), old.config.jobs.get(run.job)
        if job is None or run.id not in self.runs:
            return run, events
        if job == old_job and self.loaded.access(job) == old.access(old_job):
            return run, events
        if run.phase is Phase.REJECTED:
            target = self.loaded.config.target(job)
            token = self.loaded.secrets[job.keboola_secret]
            if input_digest(job, target, token) == run.input_digest:
                return run, events
            return as_intended(run, self.clock.now()), events
        if run.phase in {Phase.POLLING, Phase.INTENT, Phase.SENT, Phase.UNKNOWN}:
            return replace(run, failures=0, next_at=min(run.next_at, self.clock.now())), events
        return run, events

    def _arrange(self, loaded: LoadedConfig) -> None:
        """Have an account for each OpenAI key that is used, and a client for each Keboola token."""
        config, secrets = loaded.config, loaded.secrets
        for name in config.of_type("keboola"):
            entry, known = config.secrets[name], self.keboolas.get(name)
            if not known or (known.stack_url, known.token) != (entry.stack_url, secrets[name]):
                note = functools.partial(self.note_request, name)
                self.keboolas[name] = Keboola(entry, secrets[name], self.http, self.clock, note)
        kept = set(config.of_type("keboola"))
        self.keboolas = {name: k for name, k in self.keboolas.items() if name in kept}
        used = {job.openai_secret for job in config.jobs.values()}
        identity = {
            name: (secrets[name], replace(config.secrets[name], text=Secret(""), line=0, column=0))
            for name in used
        }
        for name in list(self.accounts):
            if identity.get(name) != self.accounts[name].identity:
                del self.accounts[name]
                if task := self._polling.pop(name, None):
                    task.cancel()
        for name in used:
            if name not in self.accounts:
                self.accounts[name] = Account(self, config.secrets[name], identity[name])
                if not self.once:
                    self._polling[name] = self.spawn(self.accounts[name].run())
            account = self.accounts[name]
            account.run_ids.clear()
            account.finders = [
                job
                for job in config.jobs.values()
                if job.match and job.openai_secret == name and not job.rests
            ]
            account.find_soon()
        self._drop_stats(config)

    def _drop_stats(self, config: Config) -> None:
        """Forget how secrets fared that the config no longer has."""
        for name in self.stats.keys() - config.secrets.keys():
            stats = self.stats.pop(name)
            refused = [Event.of("account_failing_recovered", secret=name)]
            also: list[Statement] = [("DELETE FROM secrets WHERE name = ?", (name,))]
            self.commit([], refused if stats.refused_since else [], also)

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

    async def keboola_for(self, run: Run) -> Keboola:
        """Return a client whose token is of a run's stack and project. Raises ApiError for none.

        A token of another project never carries a run.
        """
        job, failure = self.job_of(run), None
        names = [job.keboola_secret] if job else []
        for name in dict.fromkeys([*names, *self.keboolas]):
            keboola = self.keboolas.get(name)
            if keboola and keboola.stack_url == run.target.stack_url:
                try:
                    if await keboola.project() == run.target.project:
                        return keboola
                except ApiError as error:
                    failure = failure or error
        if failure:
            raise failure
        where = f"project {run.target.project} on {run.target.stack_url}"
        message = f"the config has no token of {where}, where this run was started"
        raise ApiError(message, sent=False)

    def check_in_place(self) -> None:
        """Raise StateError if the state file was deleted or replaced under the process.

        A commit into a deleted file succeeds, and would be forgotten.
        """
        if not (self.store.is_in_place() and self.lock.is_in_place()):
            message = f"the state file {self.store.path} or its lock was deleted or replaced"
            raise StateError(message, "nothing more is sent; start again")

    def record_polls(self, came: Iterable[tuple[int, Mapping[str, Batch | ApiError]]]) -> None:
        """Store what polls have brought, as one. Of what has not changed only times are written."""
        now = self.clock.now()
        changes = []
        for run_id, answers in came:
            run = self.runs.get(run_id)
            job = run and self.job_of(run)
            if run is None or job is None or not self.is_polled(run):
                continue
            try:
                after, events = after_poll(run, job, answers, now, self.clock.jitter())
            except Exception as error:  # noqa: BLE001 - a bug that one run meets is not the others'
                self.note_bug(error, run.name)
                self.runs[run_id] = replace(run, next_at=now + MINUTE_S)
                continue
            quiet = replace(after, next_at=run.next_at, last_check_at=run.last_check_at)
            if events or quiet != run:
                changes.append((after, events))
            else:
                self.runs[run_id] = after
                self._touched.add(run_id)
        try:
            if changes:
                self.commit(changes)
        except StorageError as error:
            for run, _ in changes:
                self.note_trouble(error, run)
                self.runs[run.id] = replace(self.runs[run.id], next_at=now + 5)

    def take_found(self, found: Sequence[tuple[Run, list[Event], list[Batch]]]) -> None:
        """Store runs that new batches begin or join, and batches that came late."""
        changes, also = [], []
        for run, events, late in found:
            if run.id == 0:
                run = replace(run, id=self._next_id)  # noqa: PLW2901 - the same run, numbered
                self._next_id += 1
            also += [batch_statement(run.id, -1, batch) for batch in late]
            changes.append((run, events))
        self.commit(changes, also=also)

    # --- writing and telling ---

    def _with_attention(self, run: Run) -> Change:
        grace_s = self.loaded.config.trigger_grace
        return after_attention(run, self.job_of(run), grace_s, self.clock.now())

    def commit(
        self, changes: Iterable[Change], events: Iterable[Event] = (), also: Iterable[Statement] = ()
    ) -> None:
        """Commit the next states of runs with the events that tell of them, then tell them."""
        rows: list[tuple[Run | None, Run]] = []
        told = list(events)
        for changed, its_events in changes:
            run, more = self._with_attention(self._clean_run(changed))
            rows.append((self.runs.get(run.id), run))
            told += [*its_events, *more]
        now = self.clock.now()
        told = [self._clean(event) for event in told if not self._is_repeated(event, now)]
        if self._trouble:
            told.append(Event.of("state_write_failed_recovered"))
        stored = self.store.commit(rows, told, now, also)
        self._trouble.clear()
        for _, run in rows:
            self.runs[run.id] = run
            self._place(run)
        for event in stored:
            say(event)
        if rows or stored:
            for happened in self.told:
                happened.set()

    def commit_aimed(self, run: Run, *, before: Run) -> Run:
        """Commit an intent's target and payload, where they are new; returns the run as stored."""
        if run == before:
            return before
        facts = {"trigger_id": run.trigger_id, "target": str(run.target)}
        events = [] if before.payload else [Event.of("trigger_intended", run, **facts)]
        self.check_in_place()
        self.commit([(run, events)])
        return self.runs[run.id]

    def _place(self, run: Run) -> None:
        """Have a run polled, driven, or dropped from memory, as its phase says."""
        job = self.job_of(run)
        for name, account in self.accounts.items():
            if job and name == job.openai_secret and self.is_polled(run):
                account.run_ids.add(run.id)
                if run.next_at < account.until:
                    account.wake.set()
            elif run.id in account.run_ids:
                account.forget(run.id)
        is_driven = run.phase not in {Phase.POLLING, Phase.FINISHED, Phase.REFUSED}
        if is_driven and self._tasks is not None and not self.is_stopping:
            self.wakes.setdefault(run.id, asyncio.Event()).set()
            driver = self._drivers.get(run.id)
            if driver is None or driver.done():
                self._drivers[run.id] = self.spawn(drive_run(self, run.id))
        elif run.phase is Phase.FINISHED:
            self._drop_finished(run, job)

    def _drop_finished(self, run: Run, job: Job | None) -> None:
        """Keep of a match job's finished runs only the last five, and those that need attention."""
        if job and job.match and run.group:
            ended = [
                r
                for r in self.runs.values()
                if r.job == run.job and r.phase is Phase.FINISHED and not r.attention
            ]
            ended.sort(key=lambda r: r.finished_at or 0.0)
            for old in ended[:-5]:
                del self.runs[old.id]

    def log(self, *events: Event) -> None:
        """Tell events that go with no change of a run; a full disk must not silence the log."""
        try:
            self.commit([], events)
        except StorageError:
            for event in events:
                say(self._clean(event))

    def _is_repeated(self, event: Event, now: float) -> bool:
        """Return whether the same was told within the last minute: something flaps."""
        if not event.name.startswith(("batch_status", "poll_", "list_", "find_", "follow_", "account_")):
            return False
        key = (event.name, event.run, event.fields.get("batch_id"), event.fields.get("secret"))
        if now - self._last_told.get(key, -math.inf) < MINUTE_S:
            return True
        self._last_told[key] = now
        return False

    def _clean(self, event: Event) -> Event:
        """Return an event without secrets: the state file keeps it, and others read it."""
        cleaned = self._redactor.tree(dict(event.fields))
        return replace(event, fields=cleaned, text=self._redactor.text(event.text))

    def _clean_run(self, run: Run) -> Run:
        """Return a run whose errors hold no secret."""
        names = ("error", "post_error", "keboola_error", "keboola_status")
        texts = {name: getattr(run, name) for name in names}
        clean = {name: self._redactor.text(text) for name, text in texts.items() if text}
        changed = {name: text for name, text in clean.items() if text != texts[name]}
        return replace(run, **changed) if changed else run

    def note_trouble(self, error: Exception, run: Run | None = None) -> None:
        """Tell once of trouble with the state file, until something could be written again."""
        self.has_failed = True
        key = (run and run.id, str(error))
        if key not in self._trouble:
            self._trouble.add(key)
            say(Event.of("state_write_failed", run, error=str(error)))

    def note_bug(self, error: Exception, where: str) -> None:
        """Tell of an exception that nobody has thought of, with its traceback."""
        self.has_failed = True
        trace = "".join(traceback.format_exception(error))
        say(Event.of("internal_error", where=where, error=type(error).__name__, traceback=trace))

    def note_request(self, name: str, error: ApiError | None, _: float | None) -> None:
        """Remember how a request with a secret has fared."""
        entry = self.loaded.config.secrets.get(name)
        if entry is None:
            return
        before = self.stats.get(name) or SecretStats(name, entry.type)
        after = before.after(error, self.clock.now())
        self.stats[name] = after
        self._stats_changed.add(name)
        if after.refused_since and not before.refused_since:
            self.log(Event.of("account_failing", secret=name, error=after.error))
        elif before.refused_since and not after.refused_since:
            self.log(Event.of("account_failing_recovered", secret=name))

    def note_config(self, error: str | None, *events: Event) -> None:
        """Remember which config the process runs with, and what is wrong with the file, if so."""
        config = self.loaded.config
        before, self.config_error = self.config_error, error and self._redactor.text(error)
        known = self.store.meta("config") or {}
        told = list(events)
        also = []
        if error is None:
            loaded_at = rfc3339(self.clock.now())
            known = {"path": str(config.path), "sha256": config.sha256, "loaded_at": loaded_at}
            good = {"path": str(config.path.absolute()), "text": self.loaded.text}
            also.append(Store.meta_statement("good_config", good))
            if before:
                told.append(Event.of("config_rejected_recovered"))
        also.append(Store.meta_statement("config", {**known, "error": self.config_error}))
        self.commit([], told, also)

    def flush(self, *, at_once: bool = False) -> None:
        """Write when runs were polled, and how secrets fared, now and then."""
        now = self.clock.uptime_s()
        is_time = at_once or now - self._touched_at >= max(2.0, len(self._touched) * 0.005)
        if not is_time or not (self._touched or self._stats_changed):
            return
        runs = [self.runs[i] for i in self._touched if i in self.runs]
        statement = "UPDATE runs SET last_check_at = ?, next_at = ? WHERE id = ?"
        rows: list[Statement] = [
            (statement, (r.last_check_at, r.next_at if math.isfinite(r.next_at) else None, r.id))
            for r in runs
        ]
        rows += [SecretStats.statement(self.stats[n]) for n in self._stats_changed if n in self.stats]
        self.store.execute(rows)
        self._touched.clear()
        self._stats_changed.clear()
        self._touched_at = now

    # --- what people ask for ---

    def take_requests(self, *, at_once: bool = False) -> None:
        """Do what people asked for with `retry` since the last time."""
        version = int(self.store.one("PRAGMA data_version"))
        if version == self._data_version and not at_once:
            return
        for row in self.store.db.execute("SELECT * FROM requests ORDER BY id").fetchall():
            id_, run_id, force, rerun, phase = row
            request = RetryRequest(id_, run_id, bool(force), rerun, Phase(phase))
            done: list[Statement] = [("DELETE FROM requests WHERE id = ?", (id_,))]
            run = self.runs.get(run_id) or next(iter(self.store.runs("id = :id", {"id": run_id})), None)
            if run is None:
                self.commit([], also=done)
                continue
            if run.id in self.posting:
                run = replace(run, phase=Phase.SENDING)
            came = after_retry(run, self.job_of(run), request, self.clock.now())
            if isinstance(came, str):
                self.commit([], [Event.of("retry_refused", run, why=came)], done)
            else:
                self.runs.setdefault(run.id, run)
                self.commit([came], also=done)
        self._data_version = version

    def summary(self) -> str:
        """Return how the runs are, in one line."""
        statuses = [status_of(run, job) for run in self.shown() if (job := self.job_of(run))]
        counts = [f"{n} {status}" for status, n in sorted(collections.Counter(statuses).items())]
        summary = ", ".join(counts) or "no jobs"
        if self.config_error:
            summary += "; the config file has problems, the previous one still counts"
        return summary

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


def what_changed(old: Config | None, new: Config) -> tuple[str, dict[str, list[str]]]:
    """Return which jobs a config adds, removes and changes: as a sentence, and by name."""
    before = old.jobs if old else {}
    jobs = {
        "added": [name for name in new.jobs if name not in before],
        "removed": [name for name in before if name not in new.jobs],
        "changed": [n for n, job in new.jobs.items() if n in before and before[n] != job],
    }
    words = [
        f"{kind} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for kind, names in jobs.items()
        if names
    ]
    return "; ".join(words) if old else counted(len(new.jobs), "job"), jobs


def note_loaded(engine: Engine, old: Config | None) -> None:
    """Tell that a config counts now, and what could be better about it."""
    config = engine.loaded.config
    known = engine.store.meta("config") or {}
    if engine.once and known.get("sha256") == config.sha256 and not known.get("error"):
        return  # from cron, a pass without news says nothing
    changes, jobs = what_changed(old, config)
    facts = {"sha256": config.sha256, "jobs": len(config.jobs), **(jobs if old else {})}
    events = [Event.of("config_loaded", changes=changes or "no job has changed", **facts)]
    warnings = [*engine.loaded.warnings]
    if engine.http.rules.unreadable:
        left_out = ", ".join(map(quoted, engine.http.rules.unreadable))
        warnings.append(f"$NO_PROXY has entries that are neither host nor network: {left_out}")
    events += [Event.of("config_warning", warning=warning) for warning in warnings]
    engine.note_config(None, *events)


class Reloader:
    """Sees that the config, its key file or a secret's file has changed, and has it taken."""

    def __init__(
        self,
        engine: Engine,
        files: Files,
        env: Mapping[str, str],
        redactor: Redactor,
        manager: ServiceManager,
        configure: Callable[[Config], None],
    ) -> None:
        self.hangup = asyncio.Event()
        self._engine = engine
        self._env = env
        self._redactor = redactor
        self._manager = manager
        self._configure = configure
        self._path = engine.loaded.config.path
        self._seen = dict(files.seen)
        self._ripening: dict[Path, bytes] = {}  # rewritten in place; it may be half of a file
        self._ripe_at = math.inf
        self._happened = asyncio.Event()

    async def run(self) -> None:
        """Compare the files on every event, every two seconds, and on SIGHUP, and take them."""
        while True:
            self._happened.clear()
            force = self.hangup.is_set()
            self.hangup.clear()
            try:
                await self.check(force=force)
            except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
                self._engine.note_bug(error, "reload")
            if not self.hangup.is_set():
                left_s = self._ripe_at - self._engine.clock.uptime_s()
                await wait_for_event(self._happened, min(2.0, max(0.05, left_s)))

    def on_hangup(self) -> None:
        """Reload, whatever the files say."""
        self.hangup.set()
        self._happened.set()

    async def watch(self) -> None:
        """Set off a comparison on every event in the config's directory.

        The directory is watched, not the file: editors replace it, Kubernetes swaps a link.
        """
        import watchfiles  # noqa: PLC0415 - it costs the other commands a third of their start

        engine = self._engine
        ours = engine.store.path.name

        def is_theirs(_: object, path: str) -> bool:
            name = Path(path).name
            return not (name.startswith(ours) or name.lstrip(".").startswith(PUBLISHED))

        while True:
            try:
                async for _ in watchfiles.awatch(
                    self._path.parent, watch_filter=is_theirs, step=100, recursive=False
                ):
                    self._happened.set()
            except (OSError, RuntimeError) as error:  # the comparison sees what this does not
                engine.log(Event.of("watch_failed", error=one_line(str(error))))
            await asyncio.sleep(MINUTE_S)

    async def check(self, *, force: bool = False) -> None:
        """Take the files if they differ from those last tried, good or bad.

        A file that was replaced is whole. One that was rewritten in place counts when it has stayed
        the same for two seconds: half of a config can be valid YAML.
        """
        files = Files()
        await asyncio.to_thread(lambda: [files.read(path) for path in self._seen])
        changed = {p: r for p, r in files.seen.items() if r.digest != self._seen[p].digest}
        if not changed and not force:
            self._seen, self._ripe_at, self._ripening = dict(files.seen), math.inf, {}
            return
        in_place = {
            path: read.digest
            for path, read in changed.items()
            if read.inode == self._seen[path].inode and not read.error
        }
        now = self._engine.clock.uptime_s()
        if in_place and not force:
            if in_place != self._ripening:
                self._ripening, self._ripe_at = in_place, now + 2.0
            if now < self._ripe_at:
                return
        self._ripening, self._ripe_at = {}, math.inf
        self._manager.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await self._take(files)
            self._seen = dict(files.seen)
        except (StorageError, sqlite3.Error) as error:  # tried again at the next comparison
            self._engine.note_trouble(error)
        finally:
            self._manager.send("READY=1", f"STATUS={self._engine.summary()}")

    async def _take(self, files: Files) -> None:
        """Parse and decrypt all of it; only then, in one step, let it count."""
        engine, old = self._engine, self._engine.loaded.config
        try:
            loaded = await asyncio.to_thread(
                load_config, self._path, files, self._env, self._redactor
            )
            if old.state_path != loaded.config.state_path:
                what = f"the running process has {old.state_path} open"
                cure = "restart it to use another state file"
                raise ConfigError([Problem(str(self._path), 1, 1, "state", what, cure)])
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            event = Event.of("config_rejected", problem=problems[0], problems=problems)
            engine.note_config("\n".join(problems), event)
            return
        engine.apply(loaded)
        self._configure(loaded.config)
        note_loaded(engine, old)


# --- webhooks -------------------------------------------------------------------------------------


async def send_webhooks(engine: Engine, http: Http, *, once: bool = False) -> None:
    """Have each webhook told of the events that its rule names; a dead one delays no other.

    They read the event log: for each there is the number of the last event that it has had.
    """
    happened = asyncio.Event()
    engine.told.append(happened)
    sending: dict[str, asyncio.Task[None]] = {}
    while True:
        happened.clear()
        config = engine.loaded.config
        for name in {name for name, _ in config.notify}:
            if name not in sending or sending[name].done():
                sending[name] = asyncio.create_task(tell_webhook(engine, http, name))
        if once:
            await asyncio.gather(*sending.values())
            return
        await wait_for_event(happened, 5.0)
        await asyncio.sleep(0.05)


async def tell_webhook(engine: Engine, http: Http, name: str) -> None:
    """Tell one webhook what it has not had yet, in order, until one event does not get through."""
    store, clock = engine.store, engine.clock
    try:
        row = store.db.execute("SELECT * FROM webhooks WHERE secret = ?", (name,)).fetchone()
        _, told_up_to, failures, next_at = row
        if next_at > clock.now() and next_at < clock.now() + HOUR_S:
            return
        for event in store.events(after=told_up_to):
            wanted = {word for rule, words in engine.loaded.config.notify if rule == name for word in words}
            groups = EVENTS[event.name][1].split() if event.name in EVENTS else []
            if wanted & {event.name, *groups}:
                address = engine.loaded.secrets.get(name)
                if address is None:
                    return
                failure = await post_event(engine, http, name, address, event)
                if failure and (clock.now() - event.at < DAY_S or failures < 5):
                    note_webhook_failure(engine, name, failures + 1, failure)
                    return
                if failure:
                    engine.log(Event.of("notify_dropped", secret=name, count=1, why=str(failure)))
                failures = 0
                update = "UPDATE webhooks SET told_up_to = ?, failures = 0, next_at = 0 WHERE secret = ?"
                store.execute([(update, (event.id, name))])
    except (StorageError, sqlite3.Error) as error:
        engine.note_trouble(error)
    except Exception as error:  # noqa: BLE001 - a bug here is not the runs'
        engine.note_bug(error, "notify")


def note_webhook_failure(engine: Engine, name: str, failures: int, error: ApiError) -> None:
    """Have a webhook told again later, each time later."""
    wait_s = backoff_s(failures, 5, engine.clock.jitter(), error.retry_after_s)
    update = "UPDATE webhooks SET failures = ?, next_at = ? WHERE secret = ?"
    engine.store.execute([(update, (failures, engine.clock.now() + wait_s, name))])
    if failures == 1:
        engine.log(Event.of("notify_failed", secret=name, error=str(error)))


async def post_event(
    engine: Engine, http: Http, name: str, address: Secret, event: Event
) -> ApiError | None:
    """Post one event to a webhook; returns why it was not taken, or None.

    Angle brackets would be commands to some chat programs.
    """
    text = one_line(f"TeckoChecker: {event.text}", 1000)
    text = text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")
    text = text.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
    body = {"text": text, "event": event.name, "job": event.job, "run": event.run}
    body |= {"level": event.level, "at": rfc3339(event.at)}
    headers = {"Content-Type": "application/json"}
    try:
        answer = await http.post(address.reveal(), headers, compact_json(body), 10.0)
    except ApiError as error:
        failure: ApiError | None = error
    else:  # its words may be an echo of the address, which is secret
        said = f"it answered {answer.status}"
        failure = None if answer.is_success else answer.error(said, retryable=True)
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
    interval_s = min(10.0, (manager.watchdog_s or 60.0) / 3)
    watchdog = ["WATCHDOG=1"] if manager.watchdog_s else []
    manager.send("READY=1")
    while True:
        manager.send(*watchdog, f"STATUS={engine.summary()}")
        await asyncio.sleep(interval_s)


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
    interrupted = not running.done()
    if interrupted:
        manager.send("STOPPING=1")
        await engine.drain(signals.now)
        running.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    with contextlib.suppress(StorageError):
        engine.flush(at_once=True)
    if signals.now.is_set() or (interrupted and engine.once):
        return 130
    return 0


