# --- doctor ---------------------------------------------------------------------------------------

DOCTOR_PATIENCE_S: Final = 45  # for all requests with one secret; the secrets go side by side

Finding = tuple[str, str, str]  # ✓ (right), ! (could be better) or ✗ (wrong); what; the cure


class Doctor:
    """Tries everything that has to be right, and prints a line about each."""

    def __init__(self, config: Config, secrets: Mapping[str, Secret], redactor: Redactor) -> None:
        self.config = config
        self.counts: collections.Counter[str] = collections.Counter()  # of findings, by mark
        self._secrets = secrets
        self._redactor = redactor
        # The batches that are polled, by job. What `done` or a finished run is about may be gone.
        self._polled = {name: [*job.batch_ids] for name, job in config.jobs.items() if not job.done}
        self._skews: dict[str, float] = {}  # how far our clock is ahead of a secret's server

    def tell(self, found: Iterable[Finding]) -> None:
        """Print findings, and count them."""
        shown = {"✓": painted("✓", GREEN), "!": "!", "✗": painted("✗", RED)}
        if not can_show("✓✗"):
            shown = {"✓": "ok", "!": "!", "✗": "WRONG"}
        for mark, what, cure in found:
            self.counts[mark] += 1
            text = self._redactor.text(f"{what}; {cure}" if cure else what)
            print(shown[mark], one_line(text, 1000), flush=True)

    # --- this machine ---

    def check_files(self) -> Iterator[Finding]:
        """Check directories, the state file and what lies beside it, and who runs."""
        state, publish = self.config.state_path, self.config.publish_path
        yield self._check_directory(state.parent, "the state file")
        if publish:
            place = publish if os.path.lexists(publish) else publish.parent
            yield self._check_directory(place, "published files")
        try:
            with Store.reading(state) as store:
                if store:
                    check_undamaged(store.db, state)
                    self._leave_out_finished(store)
            there = "is whole" if store else "is not there yet: the first start makes it"
            yield "✓", f"the state file {state} {there}", ""
            yield from self._check_owners(state)
        except TeckoError as error:
            yield "✗", str(error), ""
        owner = lock_owner(state)
        pid = owner["pid"]
        if owner["running"] or owner["once"]:
            kind = "the daemon" if owner["running"] else "a pass of --once"
            yield "✓", f"running now: {kind} (pid {pid})", ""
        elif pid:
            what = f"nothing runs: pid {pid} was killed or hangs since {owner['last_loop_at']}"
            yield "!", what, "see its log, and start it again"
        else:
            yield "✓", "nothing runs now", ""

    @staticmethod
    def _check_directory(directory: Path, what: str) -> Finding:
        """Check that files can be made in a directory, and that its disk has room."""
        text = f"{directory}, for {what},"
        try:
            free_mib = shutil.disk_usage(directory).free >> 20
        except OSError as error:
            cure = "create it (under systemd, the unit does)"
            return "✗", f"{text} cannot be used: {error.strerror}", cure
        if not os.access(directory, os.W_OK | os.X_OK):
            cure = "run this as the daemon's user, or chown it to that user"
            return "✗", f"{text} cannot be written by this user", cure
        is_full = free_mib < 100
        return (
            "✗" if is_full else "✓",
            f"{text} has {free_mib:,} MiB left",
            ("make room on that disk" if is_full else ""),
        )

    @staticmethod
    def _check_owners(state: Path) -> Iterator[Finding]:
        """Check that the files belong to the directory's owner, and can be written.

        In a directory of root's the daemon may be anybody: then the lock file tells who it is.
        """
        lock = state.with_name(f"{state.name}.lock")
        beside = (state.with_name(f"{state.name}{end}") for end in ("-wal", "-shm"))
        users = [path for path in (state.parent, lock) if path.exists() and path.stat().st_uid]
        model = [*users, state.parent][0]
        user = model.stat()
        for path in (path for path in (state, lock, *beside) if path.exists()):
            if path.stat().st_uid != user.st_uid:
                what = f"{path} belongs to {owner_of(path)}, but {model} to {owner_of(model)}"
                yield "✗", what, f"run: chown {user.st_uid}:{user.st_gid} {shlex.quote(str(path))}"
            elif not os.access(path, os.R_OK | os.W_OK):
                cure = "run this as the daemon's user, or chown it to that user"
                yield "✗", f"{path} cannot be written by this user", cure

    def _leave_out_finished(self, store: Store) -> None:
        """Leave out the jobs and batches that are finished, and add the batches of groups."""
        jobs = self.config.jobs
        targets = {name: self.config.target(job) for name, job in jobs.items()}
        runs = store.runs_for(jobs, recent=False)
        for name, run in assign(jobs, targets, [r for r in runs if not r.group]).items():
            if run.phase is Phase.FINISHED:
                self._polled.pop(name, None)
            elif name in self._polled:
                self._polled[name] = [batch.id for batch in run.batches if not batch.is_final]
        for run in runs:
            if run.group and run.phase is Phase.POLLING and run.job in self._polled:
                self._polled[run.job] += [b.id for b in run.batches if not b.is_final]

    # --- the servers ---

    async def check_servers(self) -> None:
        """Ask OpenAI and Keboola with every secret about all that the jobs need of them."""
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        timeout_s = min(8, self.config.request_timeout)
        http = Http(replace(self.config, request_timeout=timeout_s), self._redactor)
        for entry in http.rules.unreadable:
            what = f"$NO_PROXY has {quoted(entry)}, which is neither host nor network"
            self.tell([("!", what, "it is ignored: correct or remove it")])
        names = [*self.config.of_type("openai"), *self.config.of_type("keboola")]
        checks = [
            asyncio.create_task(self._check_secret(name, http))
            for name in names
            if name in self._secrets
        ]
        try:
            for check in checks:
                self.tell(await check)
        finally:
            await http.close()
        for name, skew_s in self._skews.items():
            if abs(skew_s) > MINUTE_S:
                side = "ahead of" if skew_s > 0 else "behind"
                what = f"the clock is {in_words(abs(skew_s))} {side} that of {name}'s server"
                self.tell([("!", what, "let NTP set it (systemd-timesyncd, chrony)")])

    async def _check_secret(self, name: str, http: Http) -> list[Finding]:
        """Return what is found with one secret, as far as the time allows."""
        found: list[Finding] = []
        check = {"openai": self._check_openai, "keboola": self._check_keboola}
        try:
            async with asyncio.timeout(DOCTOR_PATIENCE_S):
                await check[self.config.secrets[name].type](name, http, found)
        except TimeoutError:
            what = f"{name}: not everything was answered within {DOCTOR_PATIENCE_S} s"
            cure = "see why its server is slow; for very many jobs, raise max_concurrency"
            found.append(("✗", what, cure))
        return found

    def _note(self, name: str, _: ApiError | None, date: float | None) -> None:
        """Remember what a server's clock says."""
        if date is not None:
            self._skews[name] = time.time() - date

    def _new_token(self, name: str) -> str:
        """Return where a new token for a secret belongs."""
        entry = self.config.secrets[name]
        if entry.source != "value":
            return f"make a new one, and put it into {entry.source} {entry.text.reveal()}"
        config = shlex.quote(str(self.config.path))
        return f"make a new one, then run: teckochecker --config {config} secret set {name}"

    def _cure(self, name: str, error: ApiError) -> str:
        """Return what to do where a server does not answer as it should."""
        if error.status in {401, 403}:
            return self._new_token(name)
        if error.status is None:
            return "check the address, the network and the proxy"
        if error.status < 400:
            return "check the address: something else answers there"
        return "see the server's own words, and its status page"

    # --- OpenAI ---

    async def _ask_openai(
        self, http: Http, name: str, path: str, read: Callable[[Any], Any], after: str | None = None
    ) -> Any:  # noqa: ANN401 - what `read` returns
        """Return what `read` makes of an answer's JSON. Raises ApiError after the retries."""
        entry, key = self.config.secrets[name], self._secrets[name].reveal()
        headers = {"OpenAI-Organization": entry.organization, "OpenAI-Project": entry.project}
        is_bearer = entry.auth_header == "Authorization"
        headers[entry.auth_header] = f"Bearer {key}" if is_bearer else key
        params = {"api-version": entry.api_version, "after": after}
        params["limit"] = None if path else "100"

        async def attempt(left_s: float) -> Any:  # noqa: ANN401
            url = f"{entry.base_url}/batches{path}"
            got = http.get(url, given(headers), given(params), left_s)
            answer = await noted(got, "OpenAI", functools.partial(self._note, name))
            try:
                return read(answer.json())
            except ValueError as error:
                message = f"OpenAI's answer is not what it should be: it {error}"
                message += server_words(answer)
                raise answer.error(message, retryable=True) from None

        return await with_retries(attempt)

    async def _check_openai(self, name: str, http: Http, found: list[Finding]) -> None:
        """Check an OpenAI key, and whether it reads the batches that are polled with it."""
        url = self.config.secrets[name].base_url
        jobs = [job for job in map(self.config.jobs.get, self._polled) if job]
        jobs = [job for job in jobs if job.openai_secret == name]
        polled = {batch_id for job in jobs for batch_id in self._polled[job.name]}
        left, failures = polled, dict[str, ApiError]()
        try:
            left = await self._unlisted(http, name, polled)
            found.append(("✓", f"{name}: {url} takes the key", ""))
        except ApiError as error:
            if error.status not in {404, 405, 429, 501}:  # these are the list's alone
                found.append(("✗", f"{name}: {url}: {error}", self._cure(name, error)))
                return
            mark, what = "✓", f"{name}: {url} lists no batches ({error})"
            if any(job.match for job in jobs):
                mark, what = "✗", f"{what}, and match needs the list"
            elif not polled:
                mark, what = "!", f"{what}, and no job has one: the key is not tried"
            found.append((mark, what, "" if mark == "✓" else "use batch_ids, which need no list"))

        async def ask(batch_id: str) -> None:
            read = functools.partial(parse_batch, batch_id=batch_id)
            try:
                await self._ask_openai(http, name, f"/{batch_id}", read)
            except ApiError as error:
                failures[batch_id] = error

        await asyncio.gather(*map(ask, sorted(left)))
        for job in jobs:
            for batch_id in (i for i in self._polled[job.name] if i in failures):
                cure = self._cure(name, failures[batch_id])
                if failures[batch_id].status == 404:
                    cure = "it was deleted, or is of another project: correct batch_ids or secret"
                found.append(("✗", f"job {job.name}: {batch_id}: {failures[batch_id]}", cure))
        if len(failures) < len(polled):
            count = f"{len(polled) - len(failures):,} of {counted(len(polled), 'batch')}"
            found.append(("✓", f"{name}: reads {count}", ""))

    async def _unlisted(self, http: Http, name: str, polled: Collection[str]) -> set[str]:
        """Return which batches the account's list does not show on pages that pay."""

        def read(data: object) -> tuple[list[str], bool]:
            rows = data.get("data") if isinstance(data, dict) else None
            if not isinstance(data, dict) or not isinstance(rows, list):
                raise ValueError("has no list of batches")
            ids = [str(row.get("id")) for row in rows if isinstance(row, dict)]
            return ids, bool(ids) and data.get("has_more") is not False

        left, after = {*polled}, None
        while True:
            ids, has_more = await self._ask_openai(http, name, "", read, after)
            shown = left & {*ids}
            left -= shown
            if not left or not has_more or len(shown) < 10:
                return left
            after = ids[-1]

    # --- Keboola ---

    async def _check_keboola(self, name: str, http: Http, found: list[Finding]) -> None:
        """Check a Keboola token, its queue, and every configuration that is started with it."""
        entry, note = self.config.secrets[name], functools.partial(self._note, name)
        keboola = Keboola(entry, self._secrets[name], http, Clock(), note)
        jobs: dict[Target, list[Job]] = {}
        for job in (self.config.jobs[job_name] for job_name in self._polled):
            if job.keboola_secret == name:
                jobs.setdefault(self.config.target(job), []).append(job)
        what = entry.stack_url
        try:
            found += self._check_token(name, await keboola.verify())
            what = "the queue"
            url = await keboola.queue_url()
            for target in [*jobs][:1]:
                await keboola.search(target, time.time() - MINUTE_S, "-")
            found.append(("✓", f"{name}: the queue is {url}", ""))
        except ApiError as error:
            found.append(("✗", f"{name}: {what}: {error}", self._cure(name, error)))
            if what == entry.stack_url:
                return
        checks = [self._check_target(keboola, target, own) for target, own in jobs.items()]
        for findings in await asyncio.gather(*checks):
            found += findings

    def _check_token(self, name: str, said: Mapping[str, Any]) -> Iterator[Finding]:
        """Check what Keboola says of a token: its project, its end, its rights."""
        owner = said.get("owner")
        project = text_or_none(owner.get("name")) if isinstance(owner, dict) else None
        if project is None:
            what = f"{name}: {self.config.secrets[name].stack_url} names no project of the token"
            yield "✗", what, "correct stack_url: it is no Keboola stack"
            return
        left_s, when = math.inf, ""
        with contextlib.suppress(ValueError, OverflowError):
            expires = datetime.fromisoformat(str(said.get("expires")))
            left_s = expires.replace(tzinfo=expires.tzinfo or UTC).timestamp() - time.time()
            when = f", expires in {in_words(left_s)}" if left_s > 0 else ", has expired"
        mark = "✓" if left_s > 14 * DAY_S else "!" if left_s > 0 else "✗"
        cure = "" if mark == "✓" else self._new_token(name)
        yield mark, f"{name}: the token is one of project {quoted(project)}{when}", cure
        if said.get("canCreateJobs") is False:
            cure = f"give it that right, or {self._new_token(name)}"
            yield "✗", f"{name}: the token may not start jobs (canCreateJobs is false)", cure

    async def _check_target(
        self, keboola: Keboola, target: Target, jobs: Sequence[Job]
    ) -> list[Finding]:
        """Check that a configuration is there, and fits each of the jobs that start it."""
        more = f" (and {len(jobs) - 1} more)" if len(jobs) > 1 else ""
        text = f"job {jobs[0].name}{more}: {target}"
        try:
            said = await keboola.configuration(target)
            declared = await declared_variables(keboola, target, said)
        except ApiError as error:
            is_about_it = error.status in {400, 401, 403, 404}
            cure = "correct component_id, config_id, branch_id or the token's rights"
            cure = cure if is_about_it else self._cure(keboola.name, error)
            return [("✗", f"{text}: {error}", cure)]
        found: list[Finding] = []
        if said.get("isDisabled") is True and any(job.mode != "forceRun" for job in jobs):
            found.append(("✗", f"{text} is disabled", "enable it in Keboola"))
        rows = said.get("rows")
        there = {str(r.get("id")) for r in rows if isinstance(r, dict)} if rows else set()
        for job in jobs:
            what = f"job {job.name}: {target}"
            gone = [
                row for row in job.config_row_ids if isinstance(rows, list) and row not in there
            ]
            if gone:
                found.append(
                    ("✗", f"{what} has no rows {', '.join(gone)}", "correct config_row_ids")
                )
            sent = keboola_variables(Run(0, job.name, target, "a" if job.match else ""), job)
            missing = [variable for variable in declared or () if variable not in sent]
            if missing:
                cure = "add them to the job's variables: what is sent replaces the defaults"
                found.append(("✗", f"{what} needs the variables {', '.join(missing)}", cure))
        is_flow = target.component_id in {"keboola.orchestrator", "keboola.flow"}
        if declared is None and not is_flow:
            what = f"{text} has no variables_id: its Keboola job gets no batch ids"
            cure = "connect a variables configuration to it (README, What Keboola gets)"
            found.append(("!", what, cure))
        takes = "its tasks get the variables" if is_flow else "it gets its variables"
        return found or [("✓", f"{text} is there, and {takes}", "")]


async def declared_variables(
    keboola: Keboola, target: Target, said: Mapping[str, Any]
) -> list[str] | None:
    """Return the names of the variables that a configuration declares; None: it takes none."""
    inner = said.get("configuration")
    variables_id = inner.get("variables_id") if isinstance(inner, dict) else None
    if not isinstance(variables_id, str | int) or not variables_id:
        return None
    where = replace(target, component_id="keboola.variables", config_id=str(variables_id))
    content = (await keboola.configuration(where)).get("configuration")
    rows = content.get("variables") if isinstance(content, dict) else None
    return [str(row.get("name")) for row in rows or () if isinstance(row, dict)]


def run_doctor(args: argparse.Namespace) -> int:
    """Try everything that has to be right."""
    path, files, redactor = config_path(args), Files(), Redactor()
    config, problems, _ = read_config_file(path, files)
    opener = SecretOpener(config, files, os.environ)
    secrets = opener.open_all()
    redactor.learn(opener.all_known(secrets))
    doctor = Doctor(config, secrets, redactor)
    problems = sorted([*problems, *opener.problems], key=lambda p: (p.line, p.column))
    doctor.tell(("✗", str(problem), "") for problem in problems)
    if not problems:
        words = f"{counted(len(config.jobs), 'job')}, {counted(len(secrets), 'secret')}"
        doctor.tell([("✓", f"{path}: {words}, and every secret opens", "")])
    doctor.tell(("!", warning, "") for warning in [*opener.warnings, *mount_warning(path)])
    if config.sha256:
        doctor.tell(doctor.check_files())
        asyncio.run(doctor.check_servers())
    wrong, warnings = doctor.counts["✗"], doctor.counts["!"]
    print(f"{counted(wrong, 'problem')}, {counted(warnings, 'warning')}")
    return 1 if wrong else 0


# --- import ---------------------------------------------------------------------------------------

OLD_JOBS: Final = """
SELECT id, name, openai_secret_id, keboola_secret_id, keboola_stack_url, keboola_component_id,
       keboola_configuration_id, poll_interval_seconds, status
FROM polling_jobs ORDER BY id"""


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name, with a number behind it where it is taken."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


def old_url(text: str) -> str | None:
    """Return an address of the old program's as the config has it; None for what is none."""
    url = text.strip().rstrip("/")
    url = url if "://" in url else f"https://{url}"
    if url_problem(url):
        return None
    parts = urllib.parse.urlsplit(url)
    is_page = (parts.hostname or "").startswith("connection.")  # of Keboola's, on that stack
    return f"{parts.scheme}://{parts.netloc}{'' if is_page else parts.path}"


class Importer:
    """Makes a config of TeckoChecker 0.9's database; `notes` tell what a person has to see."""

    def __init__(self, db: sqlite3.Connection, old: Fernet, new: MultiFernet) -> None:
        db.row_factory = sqlite3.Row
        self.notes: list[str] = []
        self._db = db
        self._old = old
        self._new = new
        rows = db.execute("SELECT id, name, type, value FROM secrets ORDER BY id")
        self._rows = {row["id"]: row for row in rows}
        self._names: dict[tuple[int, str], str] = {}  # of secrets, by old id and stack
        self._secrets: dict[str, dict[str, str]] = {}

    def config(self) -> dict[str, Any]:
        """Return the config as plain data. Raises UsageError where a secret does not open."""
        batches: dict[int, dict[str, Batch]] = {}
        for row in self._db.execute("SELECT job_id, batch_id, status FROM job_batches ORDER BY id"):
            batch = Batch(str(row["batch_id"]), str(row["status"]).lower())
            batches.setdefault(row["job_id"], {})[batch.id] = batch
        started, failed = self._logged()
        jobs: dict[str, dict[str, Any]] = {}
        for row in self._db.execute(OLD_JOBS):
            name = free_name(one_line(str(row["name"]).replace("/", "-"), 190) or "job", jobs)
            if name != row["name"]:
                self.notes.append(f"the job {quoted(str(row['name']))} is called {name} now")
            own = list(batches.get(row["id"], {}).values())
            job = self._job(name, row, [batch.id for batch in own])
            if job:
                logged = (row["id"] in started, row["id"] in failed)
                jobs[name] = job | self._rest(name, str(row["status"]).lower(), own, *logged)
        for row in self._rows.values():
            if row["id"] not in {old_id for old_id, _ in self._names}:
                what = f"the secret {quoted(str(row['name']))} is left out"
                self.notes.append(f"{what}: no job here uses it")
        defaults = {}
        for key in ("openai_secret", "keboola_secret", "component_id", "poll_interval"):
            [(value, count)] = collections.Counter(j[key] for j in jobs.values()).most_common(
                1
            ) or [("", 0)]
            if count > len(jobs) / 2:
                defaults[key] = value
        for job in jobs.values():
            for key in [key for key in defaults if job[key] == defaults[key]]:
                del job[key]
        return {"secrets": self._secrets, "defaults": defaults, "jobs": jobs}

    def _logged(self) -> tuple[set[int], set[int]]:
        """Return of which jobs the log says that Keboola was started, and that it failed."""
        started, failed = set(), set()
        tables = self._db.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE '%log%'"
        )
        for (table,) in tables.fetchall():
            name = table.replace('"', '""')
            for row in self._db.execute(f'SELECT * FROM "{name}"'):
                if "job_id" not in row.keys():  # noqa: SIM118 - a row contains values
                    break
                text = " ".join(value for value in row if isinstance(value, str)).lower()
                if "keboola_triggered" in text:
                    started.add(row["job_id"])
                elif "trigger" in text and ("fail" in text or "error" in text):
                    failed.add(row["job_id"])
        return started, failed

    def _job(self, name: str, row: sqlite3.Row, batch_ids: Sequence[str]) -> dict[str, Any] | None:
        """Return a job as the config has it; None, and a note, where it cannot have it."""
        stack_url = old_url(str(row["keboola_stack_url"] or "-"))
        why_not = None
        if not 1 <= len(batch_ids) <= 10:
            why_not = f"it has {counted(len(batch_ids), 'batch')}, and 1 to 10 are possible"
        elif stack_url is None:
            why_not = "its stack's address is none"
        elif not {row["openai_secret_id"], row["keboola_secret_id"]} <= self._rows.keys():
            why_not = "one of its secrets is not there"
        elif not (row["keboola_component_id"] and row["keboola_configuration_id"]):
            why_not = "it has no component or no configuration"
        if why_not or stack_url is None:
            self.notes.append(f"the job {name} is left out: {why_not}")
            return None
        interval_s = min(DAY_S, max(1, count_or_none(row["poll_interval_seconds"]) or 120))
        return {
            "batch_ids": [*batch_ids],
            "config_id": str(row["keboola_configuration_id"]),
            "openai_secret": self._secret(row["openai_secret_id"], ""),
            "keboola_secret": self._secret(row["keboola_secret_id"], stack_url),
            "component_id": str(row["keboola_component_id"]),
            "poll_interval": f"{interval_s}s",
        }

    def _rest(
        self, name: str, status: str, batches: Sequence[Batch], started: bool, failed: bool
    ) -> dict[str, bool]:
        """Return what keeps a job from being started twice; what is not certain gets a note."""
        if status == "paused":
            return {"paused": True}
        is_completed = status in {"completed", "completed_with_failures"}
        if is_completed and (started or not failed):
            return {"done": True}
        if status == "active" and started:
            self.notes.append(f"the job {name} was active, but has started Keboola: it is done now")
            return {"done": True}
        if status == "active" and not all(batch.is_terminal for batch in batches):
            return {}
        why = f"was {one_line(status)}"
        if is_completed:
            why += ", but could not start Keboola"
        elif status == "active":
            why += ", and all its batches are finished, but no start of Keboola is in its log"
        cure = "remove paused: to start it, or write done: true"
        self.notes.append(f"the job {name} {why}; it is paused now: {cure}")
        return {"paused": True}

    def _secret(self, old_id: int, stack_url: str) -> str:
        """Return the name of a secret in the config; a token used with two stacks becomes two."""
        if (old_id, stack_url) in self._names:
            return self._names[old_id, stack_url]
        row = self._rows[old_id]
        text = str(row["name"])
        if any(key[0] == old_id for key in self._names):
            host = urllib.parse.urlsplit(stack_url).hostname or "other"
            text += f"-{host.removeprefix('connection.').removesuffix('.keboola.com')}"
        text = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:80] or "secret"
        name = self._names[old_id, stack_url] = free_name(text, self._secrets)
        kind = "keboola" if stack_url else "openai"
        self._secrets[name] = {"type": kind, "value": self._encrypted(name, kind, row)}
        base_url = os.environ.get("OPENAI_BASE_URL", "")
        if stack_url:
            self._secrets[name]["stack_url"] = stack_url
        elif base_url:
            self._secrets[name]["base_url"] = base_url.strip().rstrip("/")
        return name

    def _encrypted(self, name: str, kind: str, row: sqlite3.Row) -> str:
        """Return a secret's value, encrypted with our key."""
        value = row["value"]
        try:
            token = value if isinstance(value, bytes) else str(value).encode()
            text = self._old.decrypt(token.strip()).decode().strip()
        except (InvalidToken, ValueError):
            message = f"$SECRET_KEY does not open the secret {quoted(str(row['name']))}"
            raise UsageError(message, "set $SECRET_KEY as the old program had it") from None
        problem = token_problem(text, kind)
        if problem:
            cure = f"run: teckochecker secret set {name}"
            self.notes.append(f"the secret {name} {problem[0]}; {problem[1]}, and {cure}")
        return self._new.encrypt(text.encode()).decode()


def run_import(args: argparse.Namespace) -> int:
    """Print a config made of the database of TeckoChecker 0.9."""
    old, old_key = Path(args.old), os.environ.get("SECRET_KEY", "")
    is_postgres = os.environ.get("DATABASE_URL", "").startswith("postgres")
    to_sqlite = "copy its tables, with the log, into a SQLite file, and import that"
    if args.old.startswith("postgres") and "://" in args.old:  # not echoed: it has a password
        raise UsageError("the old database is PostgreSQL, which is not read here", to_sqlite)
    if not is_there(old):
        if is_postgres:
            what = f"there is no file {old}: $DATABASE_URL says that the old database is PostgreSQL"
            raise UsageError(what, to_sqlite)
        raise UsageError(f"there is no file {old}", "name the database of TeckoChecker 0.9")
    if not old_key:
        cure = "set it as the old program had it: it opens the old secrets"
        raise UsageError("$SECRET_KEY is not set", cure)
    path, files = config_path(args), Files()
    opener = SecretOpener(read_config_file(path, files)[0], files, os.environ)
    keys = opener.fernet()
    if keys is None:
        raise ConfigError(opener.problems)
    digest = hashlib.sha256(old_key.encode(errors="surrogateescape")).digest()
    try:
        uri = f"{old.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            importer = Importer(db, Fernet(base64.urlsafe_b64encode(digest)), keys)
            config = importer.config()
    except sqlite3.Error as error:
        cure = "name a copy of the database of TeckoChecker 0.9, made while it was stopped"
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            cure = f"if the old database is PostgreSQL, {to_sqlite}"
        raise UsageError(f"cannot import {old}: {error}", cure) from None
    if is_postgres:
        what = "$DATABASE_URL says that the old database is PostgreSQL"
        importer.notes.append(f"{what}: make sure that {old} has what is in it")
    text = f"# Made of {one_line(str(old))}. Put it in place of config.yaml, then run `check`.\n"
    layout = {"sort_keys": False, "allow_unicode": can_show("ěš🌙"), "width": 1000}
    jobs = {"jobs": config.pop("jobs")}
    text += (
        yaml.safe_dump({k: v for k, v in config.items() if v}, **layout)
        if any(config.values())
        else ""
    )
    text += yaml.safe_dump(jobs, default_flow_style=None, **layout)
    problems = parse_config(text, Path("<imported>"))[1]
    for note in (*importer.notes, *map(str, problems)):
        print(f"teckochecker: {note}", file=sys.stderr)
    print(text, end="")
    return 1 if importer.notes or problems else 0
