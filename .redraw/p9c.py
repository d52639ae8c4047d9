# --- doctor ---------------------------------------------------------------------------------------

DOCTOR_PATIENCE_S: Final = 45  # for all requests with one secret; the secrets go side by side

OWNER_CURE: Final = "run this as the daemon's user, or chown it to that user"

Verdict = tuple[str, str, str]  # ✓ (right), ! (could be better) or ✗ (wrong); what; the cure


class Doctor:
    """Tries everything that has to be right, and prints a line about each."""

    def __init__(self, config: Config, secrets: Mapping[str, Secret], redactor: Redactor) -> None:
        self.config = config
        self.counts: collections.Counter[str] = collections.Counter()  # of verdicts, by mark
        self._secrets = secrets
        self._redactor = redactor
        # The batches that are polled, by job. What `done` or a finished run is about may be gone.
        self._polled = {name: [*job.batch_ids] for name, job in config.jobs.items() if not job.done}
        self._skews: dict[str, float] = {}  # how far our clock is ahead of a secret's server

    def tell(self, found: Iterable[Verdict]) -> None:
        """Print verdicts, and count them."""
        words = {} if can_show("✓✗") else {"✓": "ok", "✗": "WRONG"}
        for mark, what, cure in found:
            self.counts[mark] += 1
            shown = painted(words.get(mark, mark), {"✓": GREEN, "✗": RED}.get(mark, ""))
            text = self._redactor.text(f"{what}; {cure}" if cure else what)
            print(shown, one_line(text, 1000), flush=True)

    # --- this machine ---

    def check_files(self) -> Iterator[Verdict]:
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
        kind = "the daemon" if owner["running"] else "a pass of --once" if owner["once"] else ""
        if owner["pid"] and not kind:
            what = f"pid {owner['pid']} was killed, or hangs, since {owner['last_loop_at']}"
            yield "!", what, "see its log, and start it again"
        else:
            yield "✓", f"{kind} runs, pid {owner['pid']}" if kind else "nothing runs now", ""

    @staticmethod
    def _check_directory(directory: Path, what: str) -> Verdict:
        """Check that files can be made in a directory, and that its disk has room."""
        text = f"{directory}, for {what},"
        try:
            free_mib = shutil.disk_usage(directory).free >> 20
        except OSError as error:
            return "✗", f"{text} cannot be used: {error.strerror}", "create it, as the unit does"
        if not os.access(directory, os.W_OK | os.X_OK):
            return "✗", f"{text} cannot be written by this user", OWNER_CURE
        if free_mib < 100:
            return "✗", f"{text} has only {free_mib} MiB left", "make room on that disk"
        return "✓", f"{text} has {free_mib:,} MiB left", ""

    @staticmethod
    def _check_owners(state: Path) -> Iterator[Verdict]:
        """Check that the files belong to the directory's owner, and can be written.

        In a directory of root's the daemon may be anybody: then the lock file tells who it is.
        """
        lock, *beside = (state.with_name(state.name + end) for end in (".lock", "-wal", "-shm"))
        paths = [path for path in (state, lock, *beside) if path.exists()]
        model = state.parent
        if lock in paths and model.stat().st_uid == 0:
            model = lock
        for path in paths:
            user = model.stat()
            if path.stat().st_uid != user.st_uid:
                what = f"{path} belongs to {owner_of(path)}, but {model} to {owner_of(model)}"
                yield "✗", what, f"run: chown {user.st_uid}:{user.st_gid} {shlex.quote(str(path))}"
            elif not os.access(path, os.R_OK | os.W_OK):
                yield "✗", f"{path} cannot be written by this user", OWNER_CURE

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
        opened = [name for name in names if name in self._secrets]
        checks = [asyncio.create_task(self._check_secret(name, http)) for name in opened]
        try:
            for check in checks:
                self.tell(await check)
        finally:
            await http.close()
        for name, skew_s in self._skews.items():
            if abs(skew_s) > MINUTE_S:
                side = "ahead of" if skew_s > 0 else "behind"
                what = f"the clock is {show_duration(abs(skew_s))} {side} that of {name}'s server"
                self.tell([("!", what, "let NTP set it (systemd-timesyncd, chrony)")])

    async def _check_secret(self, name: str, http: Http) -> list[Verdict]:
        """Return what is found with one secret, as far as the time allows."""
        found: list[Verdict] = []
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

    async def _check_openai(self, name: str, http: Http, found: list[Verdict]) -> None:
        """Check an OpenAI key, and whether it reads the batches that are polled with it."""
        url, note = self.config.secrets[name].base_url, functools.partial(self._note, name)
        openai = OpenAI(self.config.secrets[name], self._secrets[name], http, Clock(), note)
        jobs = [self.config.jobs[job_name] for job_name in self._polled]
        jobs = [job for job in jobs if job.openai_secret == name]
        left = polled = {batch_id for job in jobs for batch_id in self._polled[job.name]}
        try:
            left = await self._unlisted(openai, polled)
            found.append(("✓", f"{name}: {url} takes the key", ""))
        except ApiError as error:
            if error.status not in {404, 405, 429, 501}:  # these are the list's alone
                found.append(("✗", f"{name}: {url}: {error}", self._cure(name, error)))
                return
            what = f"{name}: the list of batches cannot be read: {error}"
            finders = [job.name for job in jobs if job.match]
            cure = f"job {finders[0]} needs it: write batch_ids there" if finders else ""
            found.append(("✗" if finders else "✓", what, cure))
        ids = sorted(left)
        came = await asyncio.gather(*map(openai.ask, ids), return_exceptions=True)
        failures = {k: e for k, e in zip(ids, came, strict=True) if isinstance(e, ApiError)}
        for job in jobs:
            for batch_id in (key for key in self._polled[job.name] if key in failures):
                what = f"job {job.name}: {batch_id}: {failures[batch_id]}"
                cure = self._cure(name, failures[batch_id])
                if failures[batch_id].status == 404:
                    cure = "correct the id, the secret or its base_url"
                found.append(("✗", what, cure))
        if len(failures) < len(polled):
            count = f"{len(polled) - len(failures):,} of {counted(len(polled), 'batch')}"
            found.append(("✓", f"{name}: reads {count}", ""))

    async def _unlisted(self, openai: OpenAI, polled: Collection[str]) -> set[str]:
        """Return which batches the account's list does not show on pages that pay."""
        left, after, has_more = {*polled}, None, True
        while has_more:
            rows, has_more = await openai.page(after)
            shown = left & {row["id"] for row in rows}
            left -= shown
            if not left or len(shown) < 10:
                break
            after = rows[-1]["id"]
        return left

    # --- Keboola ---

    async def _check_keboola(self, name: str, http: Http, found: list[Verdict]) -> None:
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

    def _check_token(self, name: str, said: Mapping[str, Any]) -> Iterator[Verdict]:
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
            end = f"expires in {counted(int(left_s // DAY_S), 'day')}"
            when = f", {end}" if left_s > 0 else ", has expired"
        mark = "✓" if left_s > 14 * DAY_S else "!" if left_s > 0 else "✗"
        cure = "" if mark == "✓" else self._new_token(name)
        yield mark, f"{name}: the token is one of project {quoted(project)}{when}", cure
        if said.get("canCreateJobs") is False:
            cure = f"give it that right, or {self._new_token(name)}"
            yield "✗", f"{name}: the token may not start jobs (canCreateJobs is false)", cure

    async def _check_target(
        self, keboola: Keboola, target: Target, jobs: Sequence[Job]
    ) -> list[Verdict]:
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
        found: list[Verdict] = []
        if said.get("isDisabled") is True and any(job.mode != "forceRun" for job in jobs):
            found.append(("✗", f"{text} is disabled", "enable it in Keboola"))
        rows = said.get("rows")
        for job in jobs:
            there = [str(row.get("id")) for row in rows or () if isinstance(row, dict)]
            gone = [row for row in job.config_row_ids if rows is not None and row not in there]
            if gone:
                what = f"job {job.name}: {target} has no rows {', '.join(gone)}"
                found.append(("✗", what, "correct config_row_ids"))
            sent = keboola_variables(Run(0, job.name, target, "a" if job.match else ""), job)
            missing = [variable for variable in declared or () if variable not in sent]
            if missing:
                what = f"job {job.name}: {target} needs the variables {', '.join(missing)}"
                cure = "add them to the job's variables: what is sent replaces the defaults"
                found.append(("✗", what, cure))
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
    """Try everything that has to be right.

    Config, key, owners, disk, state file, clock, every OpenAI key and polled batch, every Keboola
    token, queue and configuration: a line each, with the cure. Nothing is started or changed, and
    it works beside the daemon. Exits 1 if anything is wrong.
    """
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
        self._started: set[int] = set()  # the old ids of jobs
        self._failed: set[int] = set()
        self._read_log()

    def config(self) -> dict[str, Any]:
        """Return the config as plain data. Raises UsageError where a secret does not open."""
        jobs: dict[str, dict[str, Any]] = {}
        for row in self._db.execute(OLD_JOBS).fetchall():
            name = free_name(one_line(str(row["name"]).replace("/", "-"), 190) or "job", jobs)
            if name != row["name"]:
                self.notes.append(f"the job {quoted(str(row['name']))} is called {name} now")
            query = "SELECT batch_id, status FROM job_batches WHERE job_id = ? ORDER BY id"
            found = self._db.execute(query, (row["id"],))
            batches = {str(b): Batch(str(b), str(status).lower()) for b, status in found}
            try:
                jobs[name] = self._job(row, [*batches])
                jobs[name] |= self._rest(name, row, batches.values())
            except ValueError as error:
                self.notes.append(f"the job {name} is left out: {error}")
        used = {old_id for old_id, _ in self._names}
        for name in (str(row["name"]) for old_id, row in self._rows.items() if old_id not in used):
            self.notes.append(f"the secret {quoted(name)} is left out: no job here uses it")
        defaults: dict[str, str] = {}  # without config_id: a new job must name its own
        for key in ("openai_secret", "keboola_secret", "component_id", "poll_interval"):
            for value, n in collections.Counter(job[key] for job in jobs.values()).items():
                if n > len(jobs) / 2:
                    defaults[key] = value
        jobs = {
            name: {key: value for key, value in job.items() if defaults.get(key) != value}
            for name, job in jobs.items()
        }
        return {"secrets": self._secrets, "defaults": defaults, "jobs": jobs}

    def _read_log(self) -> None:
        """Note for which jobs the log has a start of Keboola, and for which a failed one."""
        tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE '%log%'"
        for (table,) in self._db.execute(tables).fetchall():
            name = table.replace('"', '""')
            for row in self._db.execute(f'SELECT * FROM "{name}"'):
                if "job_id" not in row.keys():  # noqa: SIM118 - a row contains values
                    break
                text = " ".join(value for value in row if isinstance(value, str)).lower()
                if "keboola_triggered" in text:
                    self._started.add(row["job_id"])
                elif "trigger" in text and re.search("fail|error", text):
                    self._failed.add(row["job_id"])

    def _job(self, row: sqlite3.Row, batch_ids: list[str]) -> dict[str, Any]:
        """Return a job as the config has it, without its status. Raises ValueError with why not."""
        url = str(row["keboola_stack_url"] or "").strip().rstrip("/")
        url = url if "://" in url else f"https://{url}"
        if not 1 <= len(batch_ids) <= 10:
            batches = counted(len(batch_ids), "batch")
            raise ValueError(f"it has {batches}, and 1 to 10 are possible")
        if url_problem(url):
            raise ValueError("its stack's address is none")
        if not {row["openai_secret_id"], row["keboola_secret_id"]} <= self._rows.keys():
            raise ValueError("one of its secrets is not there")
        if not (row["keboola_component_id"] and row["keboola_configuration_id"]):
            raise ValueError("it has no component or no configuration")
        parts = urllib.parse.urlsplit(url)
        if (parts.hostname or "").startswith("connection."):  # the page of a project, perhaps
            url = f"{parts.scheme}://{parts.netloc}"
        interval_s = min(DAY_S, max(1, count_or_none(row["poll_interval_seconds"]) or 120))
        return {
            "batch_ids": batch_ids,
            "config_id": str(row["keboola_configuration_id"]),
            "openai_secret": self._secret(row["openai_secret_id"], ""),
            "keboola_secret": self._secret(row["keboola_secret_id"], url),
            "component_id": str(row["keboola_component_id"]),
            "poll_interval": f"{interval_s}s",
        }

    def _rest(self, name: str, row: sqlite3.Row, batches: Iterable[Batch]) -> dict[str, bool]:
        """Return what keeps a job from being started twice; what is not certain gets a note."""
        status = str(row["status"]).lower()
        is_over = status in {"completed", "completed_with_failures"}
        started, failed = row["id"] in self._started, row["id"] in self._failed
        if status == "paused":
            return {"paused": True}
        if is_over and (started or not failed):
            return {"done": True}
        if status == "active" and started:
            self.notes.append(f"the job {name} was active, but has started Keboola: it is done now")
            return {"done": True}
        if status == "active" and not all(batch.is_terminal for batch in batches):
            return {}
        why = f"was {one_line(status)}"
        if is_over:
            why += ", but could not start Keboola"
        elif status == "active":
            why += ", and all its batches are finished, but its log has no start of Keboola"
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
        secret = self._secrets[name] = {"type": kind, "value": self._encrypted(name, kind, row)}
        base_url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/")
        if stack_url or base_url:
            secret["stack_url" if stack_url else "base_url"] = stack_url or base_url
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
    """Print a config made of a database of TeckoChecker 0.9.

    The old secrets are opened with $SECRET_KEY and encrypted with our key. Exits 1 if something is
    left out, or a person has to decide about it, which is told on standard error.
    """
    old, old_key = Path(args.old), os.environ.get("SECRET_KEY", "")
    addresses = (args.old, os.environ.get("DATABASE_URL", ""))
    is_postgres = any(re.match(r"postgres\w*(\+\w+)?:", address) for address in addresses)
    copy_it = "copy the tables of PostgreSQL, with the log, into a SQLite file, and name that"
    if not old.is_file():  # an address is not echoed: there is a password in it
        if is_postgres:
            raise UsageError("the old database is PostgreSQL, which is not read here", copy_it)
        raise UsageError(f"there is no file {old}", "name the database of TeckoChecker 0.9")
    if not old_key:
        cure = "set it as the old program had it: it opens the secrets"
        raise UsageError("$SECRET_KEY is not set", cure)
    path, files = config_path(args), Files()
    opener = SecretOpener(read_config_file(path, files)[0], files, os.environ)
    keys = opener.fernet()
    if keys is None:
        raise ConfigError(opener.problems)
    digest = hashlib.sha256(old_key.encode(errors="surrogateescape")).digest()
    uri = f"{old.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            importer = Importer(db, Fernet(base64.urlsafe_b64encode(digest)), keys)
            config = importer.config()
    except sqlite3.Error as error:
        cure = "name a copy of the database of TeckoChecker 0.9, made while it was stopped"
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            cure = f"{cure}, or {copy_it}"
        raise UsageError(f"cannot import {old}: {error}", cure) from None
    if is_postgres:
        importer.notes.append(f"$DATABASE_URL is PostgreSQL's: make sure that {old} has all of it")
    layout: Any = {"sort_keys": False, "allow_unicode": can_show("ěš🌙"), "width": 1000}
    text = (
        f"# Imported from {one_line(str(old))}. Put it in place of config.yaml, then run `check`.\n"
    )
    text += yaml.safe_dump({k: config[k] for k in ("secrets", "defaults")}, **layout)
    text += yaml.safe_dump({"jobs": config["jobs"]}, default_flow_style=None, **layout)
    problems = parse_config(text, Path("<imported>"))[1]
    for note in (*importer.notes, *map(str, problems)):
        print(f"teckochecker: {note}", file=sys.stderr)
    print(text, end="")
    return 1 if importer.notes or problems else 0
