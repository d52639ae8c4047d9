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

    def tell(self, found: Iterable[Verdict]) -> None:
        """Print verdicts, and count them."""
        words = {} if can_show("✓✗") else {"✓": "ok", "✗": "WRONG"}
        for mark, what, cure in found:
            self.counts[mark] += 1
            shown = painted(words.get(mark, mark), {"✓": GREEN, "✗": RED}.get(mark, ""))
            text = self._redactor.text(f"{what}; {cure}" if cure else what)
            print(shown, one_line(text, 1000), flush=True)

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
        if kind or not owner["pid"]:
            yield "✓", f"{kind} runs, pid {owner['pid']}" if kind else "nothing runs now", ""
            return
        what = f"pid {owner['pid']} was killed, or hangs, since {owner['last_loop_at']}"
        yield "!", what, "see its log, and start it again"

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
        model = lock if lock in paths and state.parent.stat().st_uid == 0 else state.parent
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
        tasks = [asyncio.create_task(self._check_secret(name, http)) for name in opened]
        try:
            for task in tasks:
                self.tell(await task)
        finally:
            await http.close()

    async def _check_secret(self, name: str, http: Http) -> list[Verdict]:
        """Return what is found with one secret, as far as the time allows."""
        found: list[Verdict] = []
        ahead_s = 0.0  # how far our clock is ahead of the server's

        def note(_: ApiError | None, date: float | None) -> None:
            nonlocal ahead_s
            ahead_s = ahead_s if date is None else time.time() - date

        entry, key = self.config.secrets[name], self._secrets[name]
        try:
            async with asyncio.timeout(DOCTOR_PATIENCE_S):
                if entry.type == "openai":
                    await self._check_openai(OpenAI(entry, key, http, Clock(), note), found)
                else:
                    await self._check_keboola(Keboola(entry, key, http, Clock(), note), found)
        except TimeoutError:
            what = f"{name}: not everything was answered within {DOCTOR_PATIENCE_S} s"
            cure = "see why its server is slow; for very many jobs, raise max_concurrency"
            found.append(("✗", what, cure))
        if abs(ahead_s) > MINUTE_S:
            side = "ahead of" if ahead_s > 0 else "behind"
            what = f"the clock is {show_duration(abs(ahead_s))} {side} that of {name}'s server"
            found.append(("!", what, "let NTP set it (systemd-timesyncd, chrony)"))
        return found

    def _new_token(self, name: str) -> str:
        """Return where a new token for a secret belongs."""
        entry, config = self.config.secrets[name], shlex.quote(str(self.config.path))
        if entry.source != "value":
            return f"make a new one, and put it into {entry.source} {entry.text.reveal()}"
        return f"make a new one, then run: teckochecker --config {config} secret set {name}"

    def _cure(self, name: str, error: ApiError, not_there: str = "") -> str:
        """Return what to do where a server does not answer as it should."""
        if not_there and error.status in {400, 403, 404}:
            return not_there
        if error.status in {401, 403}:
            return self._new_token(name)
        if error.status is None:
            return "check the address, the network and the proxy"
        if error.status < 400:
            return "check the address: something else answers there"
        return "see the server's own words, and its status page"

    async def _check_openai(self, openai: OpenAI, found: list[Verdict]) -> None:
        """Check an OpenAI key, and whether it reads the batches that are polled with it."""
        name, url = openai.name, self.config.secrets[openai.name].base_url
        jobs = [self.config.jobs[job_name] for job_name in self._polled]
        jobs = [job for job in jobs if job.openai_secret == name]
        left = polled = {batch_id for job in jobs for batch_id in self._polled[job.name]}
        try:
            rows, _ = await openai.page(None)
            left = polled - {row["id"] for row in rows}
            found.append(("✓", f"{name}: {url} takes the key", ""))
        except ApiError as error:
            if error.status not in {404, 405, 429, 501}:  # these are the list's alone
                found.append(("✗", f"{name}: {url}: {error}", self._cure(name, error)))
                return
            what = f"{name}: the list of batches cannot be read: {error}"
            finders = [job.name for job in jobs if job.match]
            cure = f"job {finders[0]} needs it: write batch_ids there" if finders else ""
            found.append(("✗" if finders else "✓", what, cure))
        answers = await asyncio.gather(*map(openai.ask, left), return_exceptions=True)
        failures = {k: e for k, e in zip(left, answers, strict=True) if isinstance(e, ApiError)}
        for job in jobs:
            for batch_id in (key for key in self._polled[job.name] if key in failures):
                failure = failures[batch_id]
                cure = self._cure(name, failure, "correct the id, the secret or its base_url")
                found.append(("✗", f"job {job.name}: {batch_id}: {failure}", cure))
        if len(failures) < len(polled):
            count = f"{len(polled) - len(failures):,} of {counted(len(polled), 'batch')}"
            found.append(("✓", f"{name}: reads {count}", ""))

    async def _check_keboola(self, keboola: Keboola, found: list[Verdict]) -> None:
        """Check a Keboola token, its queue, and every configuration that is started with it."""
        name = keboola.name
        jobs: dict[Target, list[Job]] = {}
        for job in (self.config.jobs[job_name] for job_name in self._polled):
            if job.keboola_secret == name:
                jobs.setdefault(self.config.target(job), []).append(job)
        what = stack = self.config.secrets[name].stack_url
        try:
            found += self._check_token(name, await keboola.verify())
            what = "the queue"
            url = await keboola.queue_url()
            for target in [*jobs][:1]:
                await keboola.search(target, time.time() - MINUTE_S, "-")
            found.append(("✓", f"{name}: the queue is {url}", ""))
        except ApiError as error:
            found.append(("✗", f"{name}: {what}: {error}", self._cure(name, error)))
            if what == stack:
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
        declared: list[str] | None = None
        try:
            said = await keboola.configuration(target)
            inner = said.get("configuration")
            key = inner.get("variables_id") if isinstance(inner, dict) else None
            if isinstance(key, str | int) and key:
                place = replace(target, component_id="keboola.variables", config_id=str(key))
                content = (await keboola.configuration(place)).get("configuration")
                variables = content.get("variables") if isinstance(content, dict) else None
                declared = [str(v.get("name")) for v in variables or () if isinstance(v, dict)]
        except ApiError as error:
            cure = "correct component_id, config_id, branch_id or the token's rights"
            return [("✗", f"{text}: {error}", self._cure(keboola.name, error, cure))]
        found: list[Verdict] = []
        if said.get("isDisabled") is True and any(job.mode != "forceRun" for job in jobs):
            found.append(("✗", f"{text} is disabled", "enable it in Keboola"))
        rows = said.get("rows")
        there = [str(row.get("id")) for row in rows or () if isinstance(row, dict)]
        for job in jobs:
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


def run_doctor(args: argparse.Namespace) -> int:
    """Try everything that has to be right: a line each, with the cure.

    Nothing is started or changed, and it works beside the daemon. Exits 1 if anything is wrong.
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
        self._rows = {row["id"]: row for row in db.execute("SELECT * FROM secrets ORDER BY id")}
        self._names: dict[int, str] = {}  # of secrets, by old id
        self._secrets: dict[str, dict[str, str]] = {}
        self._started: set[int] = set()  # old ids of jobs whose log has a start of Keboola
        self._failed: set[int] = set()  # those whose log has a failed one
        log = db.execute("SELECT job_id, status, message FROM polling_logs")
        for job_id, status, message in log:
            text = f"{status} {message}".lower()
            if "keboola_triggered" in text:
                self._started.add(job_id)
            elif "trigger" in text and re.search("fail|error", text):
                self._failed.add(job_id)

    def config(self) -> dict[str, Any]:
        """Return the config as plain data. Raises UsageError where a secret does not open."""
        jobs: dict[str, dict[str, Any]] = {}
        for row in self._db.execute("SELECT * FROM polling_jobs ORDER BY id").fetchall():
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
        unused = [quoted(str(r["name"])) for key, r in self._rows.items() if key not in self._names]
        self.notes += [f"the secret {name} is left out: no job here uses it" for name in unused]
        defaults = {  # without config_id: a new job must name its own
            key: collections.Counter(job[key] for job in jobs.values()).most_common(1)[0][0]
            for key in ("openai_secret", "keboola_secret", "component_id", "poll_interval")
            if jobs
        }
        for name, job in jobs.items():
            jobs[name] = {k: value for k, value in job.items() if defaults.get(k) != value}
        return {"secrets": self._secrets, "defaults": defaults, "jobs": jobs}

    def _job(self, row: sqlite3.Row, batch_ids: list[str]) -> dict[str, Any]:
        """Return a job as the config has it, without its status. Raises ValueError with why not."""
        url = str(row["keboola_stack_url"] or "").strip().rstrip("/")
        url = url if "://" in url else f"https://{url}"
        if not 1 <= len(batch_ids) <= 10:
            raise ValueError(f"it has {counted(len(batch_ids), 'batch')}; 1 to 10 are possible")
        if url_problem(url):
            raise ValueError("its stack's address is none")
        if not {row["openai_secret_id"], row["keboola_secret_id"]} <= self._rows.keys():
            raise ValueError("one of its secrets is not there")
        if not (row["keboola_component_id"] and row["keboola_configuration_id"]):
            raise ValueError("it has no component or no configuration")
        parts = urllib.parse.urlsplit(url)  # of the page of a project, perhaps
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
        was_completed = status in {"completed", "completed_with_failures"}
        started, failed = row["id"] in self._started, row["id"] in self._failed
        is_finished = all(batch.is_terminal for batch in batches)
        if status == "paused":
            return {"paused": True}
        if status == "active" and started:
            self.notes.append(f"the job {name} was active, but has started Keboola: it is done now")
        if (was_completed and not failed) or (started and (was_completed or status == "active")):
            return {"done": True}
        if status == "active" and not is_finished:
            return {}
        why = ", but could not start Keboola" if was_completed else ""
        if status == "active":
            why = ", and all its batches are finished, but its log has no start of Keboola"
        cure = "it is paused now: remove paused: to start it, or write done: true"
        self.notes.append(f"the job {name} was {one_line(status)}{why}; {cure}")
        return {"paused": True}

    def _secret(self, old_id: int, stack_url: str) -> str:
        """Return the name of a secret in the config. Raises ValueError for a second stack."""
        if old_id in self._names:
            name = self._names[old_id]
            if self._secrets[name].get("stack_url", "") != stack_url:
                raise ValueError(f"the secret {name} belongs to another stack")
            return name
        row = self._rows[old_id]
        kind = "keboola" if stack_url else "openai"
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(row["name"])).strip("-._")[:80] or "secret"
        name = self._names[old_id] = free_name(name, self._secrets)
        try:
            token = row["value"] if isinstance(row["value"], bytes) else str(row["value"]).encode()
            text = self._old.decrypt(token.strip()).decode().strip()
        except (InvalidToken, ValueError):
            message = f"$SECRET_KEY does not open the secret {quoted(str(row['name']))}"
            raise UsageError(message, "set $SECRET_KEY as the old program had it") from None
        problem = token_problem(text, kind)
        if problem:
            cure = f"run: teckochecker secret set {name}"
            self.notes.append(f"the secret {name} {problem[0]}; {problem[1]}, and {cure}")
        value = self._new.encrypt(text.encode()).decode()
        base_url = "" if stack_url else os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/")
        entry = {"type": kind, "value": value, "stack_url": stack_url, "base_url": base_url}
        self._secrets[name] = {key: word for key, word in entry.items() if word}
        return name


def run_import(args: argparse.Namespace) -> int:
    """Print a config made of a database of TeckoChecker 0.9, with $SECRET_KEY from then.

    Exits 1 if standard error says what is left out, or what a person has to decide.
    """
    old, old_key = Path(args.old), os.environ.get("SECRET_KEY", "")
    cure = "name a copy of the SQLite file of TeckoChecker 0.9, made while it was stopped"
    if not old.is_file():  # what is named is not echoed: PostgreSQL's address has a password in it
        raise UsageError("OLD.db is not a file", f"{cure}; copy PostgreSQL's tables into one")
    if not old_key:
        raise UsageError("$SECRET_KEY is not set", "set it as the old program had it")
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
        raise UsageError(f"cannot import {old}: {error}", cure) from None
    layout: Any = {"sort_keys": False, "allow_unicode": can_show("ěš🌙"), "width": 1000}
    text = (
        f"# Imported from {one_line(str(old))}. Put it in place of config.yaml and run `check`.\n"
    )
    text += yaml.safe_dump({k: config[k] for k in ("secrets", "defaults")}, **layout)
    text += yaml.safe_dump({"jobs": config["jobs"]}, default_flow_style=None, **layout)
    problems = parse_config(text, Path("<imported>"))[1]
    for note in (*importer.notes, *map(str, problems)):
        print(f"teckochecker: {note}", file=sys.stderr)
    print(text, end="")
    return 1 if importer.notes or problems else 0
