# ==================================================================================================
# 5. Store and lock: what must survive a crash, in one SQLite file
# ==================================================================================================

SCHEMA_VERSION: Final = 10

# Times are Unix seconds. Nothing here is ever a secret.
SCHEMA: Final[Sequence[str]] = (
    """
    CREATE TABLE runs (                 -- one row for each set of batches that leads to a Keboola job
        id               INTEGER PRIMARY KEY,
        job              TEXT NOT NULL,
        "group"          TEXT NOT NULL, -- '' for a job with batch_ids
        batch_key        TEXT NOT NULL, -- JSON list of its sorted batch ids; '' for a group
        stack_url        TEXT NOT NULL,
        component_id     TEXT NOT NULL,
        config_id        TEXT NOT NULL,
        branch_id        TEXT NOT NULL,
        project          TEXT NOT NULL,
        phase            TEXT NOT NULL CHECK (phase IN ('polling', 'refused', 'intent', 'sending',
                             'unknown', 'rejected', 'sent', 'finished')),
        rerun            INTEGER NOT NULL,
        trigger_id       TEXT NOT NULL,
        payload          TEXT NOT NULL, -- the body of POST /jobs
        input_digest     TEXT NOT NULL,
        next_at          REAL,          -- NULL: nothing is due by itself
        failures         INTEGER NOT NULL,
        error            TEXT,
        error_since      REAL,
        attention        TEXT NOT NULL,
        forced           INTEGER NOT NULL,
        posts            INTEGER NOT NULL,
        post_error       TEXT,
        repeat_after_s   REAL NOT NULL,
        unknown_wall     REAL,          -- when the outcome of the POST was recorded as unknown,
        unknown_boot     TEXT,          -- in which boot of the machine,
        unknown_uptime_s REAL,          -- and how long it had been up
        empty_searches   INTEGER NOT NULL,
        retries          INTEGER NOT NULL,
        sending_at       REAL,
        sent_at          REAL,
        keboola_job_id   TEXT,
        keboola_status   TEXT,
        keboola_error    TEXT,
        url              TEXT,
        size             TEXT NOT NULL,
        joined_at        REAL,
        intended_at      REAL,
        deadline_told    INTEGER NOT NULL,
        last_check_at    REAL,
        finished_at      REAL
    ) STRICT""",
    "CREATE INDEX runs_by_job ON runs (job, \"group\")",
    "CREATE INDEX runs_by_batches ON runs (batch_key) WHERE batch_key <> ''",
    "CREATE INDEX runs_unfinished ON runs (phase) WHERE phase <> 'finished'",
    "CREATE INDEX runs_in_need ON runs (attention) WHERE attention <> ''",
    "CREATE INDEX runs_by_end ON runs (job, finished_at) WHERE phase = 'finished'",
    "CREATE INDEX runs_by_sending ON runs (sending_at) WHERE sending_at IS NOT NULL",
    """
    CREATE TABLE batches (
        run_id         INTEGER NOT NULL REFERENCES runs (id),
        place          INTEGER NOT NULL, -- in the config's list, or by creation; -1: it came too late
        id             TEXT NOT NULL,
        status         TEXT,             -- NULL: not polled yet
        total          INTEGER,
        completed      INTEGER,
        failed         INTEGER,
        output_file_id TEXT,
        error_file_id  TEXT,
        created_at     REAL,
        expires_at     REAL,
        ended_at       REAL,
        error          TEXT,
        files_due_at   REAL,
        PRIMARY KEY (run_id, id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX batches_by_id ON batches (id)",
    """
    CREATE TABLE events (                -- the log, and the outbox of webhooks
        id     INTEGER PRIMARY KEY,
        at     REAL NOT NULL,
        level  TEXT NOT NULL,
        name   TEXT NOT NULL,
        job    TEXT,
        run    TEXT,
        fields TEXT NOT NULL,            -- JSON object
        text   TEXT NOT NULL             -- for people
    ) STRICT""",
    "CREATE INDEX events_by_job ON events (job, id) WHERE job IS NOT NULL",
    """
    CREATE TABLE requests (              -- what people asked for with `retry`
        id     INTEGER PRIMARY KEY,
        run_id INTEGER NOT NULL,
        force  INTEGER NOT NULL,
        rerun  INTEGER NOT NULL,         -- what the person saw
        phase  TEXT NOT NULL
    ) STRICT""",
    """
    CREATE TABLE webhooks (
        secret     TEXT PRIMARY KEY,
        told_up_to INTEGER NOT NULL,     -- the last event that it has had, or was not to have
        failures   INTEGER NOT NULL,
        next_at    REAL NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """
    CREATE TABLE secrets (               -- how the requests with each have fared
        name            TEXT PRIMARY KEY,
        type            TEXT NOT NULL,
        requests        INTEGER NOT NULL,
        errors          INTEGER NOT NULL,
        last_success_at REAL,
        refused_since   REAL,            -- the server has refused it ever since
        error           TEXT
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
)

STATE_HINT: Final = "restore it from a backup, or move it away: Keboola is searched before any POST"
Statement = tuple[str, Sequence[object]]


@dataclass(frozen=True, slots=True)
class SecretStats:
    """How the requests with one secret have fared since the state file began. Unix seconds."""

    name: str
    type: str
    requests: int = 0
    errors: int = 0  # of the requests: all that brought no 2xx
    last_success_at: float | None = None
    refused_since: float | None = None
    error: str | None = None  # what became of the last request, if it failed

    def after(self, error: ApiError | None, now: float) -> SecretStats:
        """Return how it has fared after one more request.

        Whatever a server says of a request other than that it refuses the key, it takes the key.
        """
        requests = self.requests + 1
        if error is None:
            return SecretStats(self.name, self.type, requests, self.errors, now)
        after = replace(self, requests=requests, errors=self.errors + 1, error=str(error))
        if error.status == 401:
            return replace(after, refused_since=self.refused_since or now)
        is_about_request = error.status is not None and error.status < 500
        is_about_request = is_about_request and error.status not in {408, 429}
        return replace(after, refused_since=None) if is_about_request else after

    @classmethod
    def statement(cls, stats: SecretStats) -> Statement:
        """Return what stores it."""
        values = [getattr(stats, f.name) for f in fields(cls)]
        return "INSERT OR REPLACE INTO secrets VALUES (?, ?, ?, ?, ?, ?, ?)", values


class Clock:
    """The process's one clock: Unix time at the start, and what the boot-time clock adds to it.

    That one counts suspends too, and nobody sets it. `changed` tells when the system's clock was
    set, and follows it.
    """

    def __init__(self) -> None:
        self._boot = ""
        with contextlib.suppress(OSError):  # not Linux: the wall clock has to do
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._kind = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._started_at = time.time() - self.uptime_s()

    def uptime_s(self) -> float:
        """Return seconds that only ever grow."""
        return time.clock_gettime(self._kind)

    def now(self) -> float:
        """Return Unix seconds."""
        return self._started_at + self.uptime_s()

    def boot_time(self) -> BootTime:
        """Return the time as it can be measured from later, after a restart too."""
        return BootTime(self.now(), self._boot, self.uptime_s())

    def jitter(self) -> float:
        """Return a random number from 0 to 1."""
        return random.random()  # noqa: S311 - spreads load, guards nothing

    def changed(self) -> float:
        """Return by how many seconds the system's clock was set since the last call, or 0."""
        by_s = time.time() - self.now()
        if abs(by_s) <= MINUTE_S:
            return 0.0
        self._started_at += by_s
        return by_s


# --- files beside the state -----------------------------------------------------------------------


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return what tells this file from another one of its name, or None if there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def is_there(path: Path) -> bool:
    """Return whether a file exists. Raises StateError where this user may not even ask."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        hint = "run this as root, or as the daemon's user"
        raise StateError(f"cannot access {path}: {error.strerror}", hint) from None
    return True


def open_own(path: Path) -> int:
    """Open or make a file beside the state, for reading and writing; returns the descriptor.

    What root makes here is given to the directory's owner, who has to work with it too. Links are
    not followed: that owner could have root write somewhere else. Raises StateError.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fd = os.open(path, flags)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.EINVAL, "Not a regular file") from None
            return fd
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    except OSError as error:
        hint = "correct state:, or this user's rights to the directory"
        if error.errno == errno.ENOENT:
            hint = "create the directory (systemd does, when it starts the unit)"
        elif error.errno == errno.EACCES and path.exists():
            hint = f"it belongs to {owner_of(path)}: chown it to the daemon's user"
        elif error.errno in {errno.ELOOP, errno.EINVAL, errno.ENXIO}:
            hint = "put a file there, no link and no pipe"
        raise StateError(f"cannot open {path}: {error.strerror}", hint) from None
    return fd


def owner_of(path: Path) -> str:
    """Return the name of a file's owner, or its number."""
    try:
        return path.owner()
    except (KeyError, OSError):
        return f"user {path.stat().st_uid}"


class StateLock:
    """The exclusive lock of the one process that acts on a state file; the kernel lets it go.

    The lock file says who holds it, and when the last POST was: should the state file be lost or
    replaced by an older one, this tells that Keboola's search may not show everything yet. Its
    modification time is when the holder last ran its loop.
    """

    def __init__(self, state_path: Path, purpose: str, started_at: float) -> None:
        """Take the lock. Raises LockedError, or StateError where there is no place for it."""
        self.path = state_path.with_name(state_path.name + ".lock")
        self._fd = open_own(self.path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            first = os.pread(self._fd, 200, 0).decode(errors="replace").partition(" since ")[0]
            os.close(self._fd)
            message = f"another instance holds {self.path}: {one_line(first) or 'it just started'}"
            raise LockedError(message, "wait for it, or stop it") from None
        except OSError as error:
            message = f"cannot lock {self.path}: {error.strerror}"
            raise StateError(message, "put state: on a local disk") from None
        self._inode = inode_of(self.path)
        self._label = f"pid {os.getpid()} ({purpose}) since {started_at:.3f}\n"
        number = r"([0-9]{1,15}\.[0-9]{1,9})"
        pattern = rf"last POST at {number} \(boot ([!-~]{{0,64}}) up {number}\)"
        match = re.search(pattern, os.pread(self._fd, 400, 0).decode(errors="replace"))
        self.last_post = BootTime(float(match[1]), match[2], float(match[3])) if match else None
        self._write(self._label)

    def note_post(self, now: BootTime) -> None:
        """Remember the time of a POST outside of the state file."""
        self.last_post = now
        self._write(self._label)

    def _write(self, label: str) -> None:
        if self.last_post:
            at = self.last_post
            label += f"last POST at {at.wall:.6f} (boot {at.boot} up {at.uptime_s:.3f})\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its label
            os.pwrite(self._fd, label.encode(), 0)
            os.ftruncate(self._fd, len(label.encode()))

    def touch(self) -> None:
        """Tell readers that the loop runs."""
        with contextlib.suppress(OSError):
            os.utime(self._fd)

    def is_in_place(self) -> bool:
        """Return whether the file that is locked is still the one of its name."""
        return inode_of(self.path) == self._inode

    def close(self) -> None:
        """Let the lock go, and with it the label that says who has it."""
        self._write("")
        os.close(self._fd)


def lock_owner(state_path: Path) -> dict[str, Any]:
    """Return who acts on a state file, without taking its lock (that could hold up a start).

    It is `daemon` of `status --json`, with `once` where it is a pass of --once.
    """
    path = state_path.with_name(state_path.name + ".lock")
    nobody: dict[str, Any] = dict.fromkeys(("pid", "started_at", "last_loop_at"))
    try:
        label = path.read_text(encoding="utf-8", errors="replace")
        looped_at = path.stat().st_mtime
    except OSError:
        return {"running": False, "once": False, **nobody}
    match = re.match(r"pid ([0-9]{1,9}) \((daemon|--once)\) since ([0-9.]{1,20})\n", label)
    if not match:
        return {"running": False, "once": False, **nobody}
    age_s = time.time() - looped_at
    is_alive = age_s < 5
    with contextlib.suppress(OSError):  # PermissionError: it lives
        is_alive = is_alive or os.kill(int(match[1]), 0) is None
    is_running = is_alive and age_s < MINUTE_S
    return {
        "running": is_running and match[2] == "daemon",
        "once": is_running and match[2] == "--once",
        "pid": int(match[1]),
        "started_at": rfc3339(float(match[3])),
        "last_loop_at": rfc3339(looped_at),
    }


# --- the database ---------------------------------------------------------------------------------


def check_database(db: sqlite3.Connection, path: Path) -> int:
    """Return the schema's version, 0 for none yet. Raises StateError for what is not ours."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        message = f"the state file {path} has schema {version}; this program knows {SCHEMA_VERSION}"
        raise StateError(message, "run the newer teckochecker that wrote it")
    if 0 < version < SCHEMA_VERSION:
        message = f"the state file {path} is of an older teckochecker (schema {version})"
        raise StateError(message, "move it away: Keboola is searched before any POST")
    if version == 0 and db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
        raise StateError(f"{path} is the database of another program", "correct state:")
    return version


def check_undamaged(db: sqlite3.Connection, path: Path) -> None:
    """Raise StateError if SQLite's quick_check finds damage, or stumbles over it."""
    try:
        result = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        result = str(error)
    if result != "ok":
        raise StateError(f"the state file {path} is damaged: {one_line(result)}", STATE_HINT)


def state_error(error: sqlite3.Error, path: Path, what: str = "use") -> StateError:
    """Return what a person is told of an error of SQLite's, with what to do about it."""
    hint = {
        sqlite3.SQLITE_FULL: "free the disk",
        sqlite3.SQLITE_BUSY: "see who else has the file open",
        sqlite3.SQLITE_READONLY: "give this user the right to write the file and its directory",
        sqlite3.SQLITE_CANTOPEN: "check the path, and this user's rights to file and directory",
        sqlite3.SQLITE_IOERR: "look into the system's log for disk errors",
    }.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, STATE_HINT)
    return StateError(f"cannot {what} the state file {path}: {error}", hint)


_TARGET: Final = tuple(f.name for f in fields(Target))
_BATCH: Final = tuple(f.name for f in fields(Batch))
_RUN: Final = tuple(
    f.name for f in fields(Run) if f.name not in {"batches", "target", "unknown_since"}
)


def run_row(run: Run) -> dict[str, Any]:
    """Return a run as a row of its table."""
    ids = [] if run.group else sorted(batch.id for batch in run.batches)
    unknown = run.unknown_since
    return {
        **{name: getattr(run, name) for name in _RUN},
        **{name: getattr(run.target, name) for name in _TARGET},
        "next_at": run.next_at if math.isfinite(run.next_at) else None,
        "batch_key": compact_json(ids) if ids else "",
        "unknown_wall": unknown and unknown.wall,
        "unknown_boot": unknown and unknown.boot,
        "unknown_uptime_s": unknown and unknown.uptime_s,
    }


def run_of(row: sqlite3.Row, batches: Iterable[Batch]) -> Run:
    """Return the run that stands in a row."""
    values = {name: row[name] for name in _RUN}
    values |= {"phase": Phase(row["phase"]), "forced": bool(row["forced"])}
    values |= {"deadline_told": bool(row["deadline_told"])}
    values["next_at"] = math.inf if row["next_at"] is None else row["next_at"]
    unknown = None
    if row["unknown_wall"] is not None:
        unknown = BootTime(row["unknown_wall"], row["unknown_boot"], row["unknown_uptime_s"])
    target = Target(**{name: row[name] for name in _TARGET})
    return Run(**values, target=target, batches=tuple(batches), unknown_since=unknown)


def event_of(row: sqlite3.Row) -> Event:
    """Return the event that stands in a row."""
    fields_ = json.loads(row["fields"])
    about = (row["name"], row["level"], row["job"], row["run"])
    return Event(*about, fields_, row["text"], row["at"], row["id"])


class Store:
    """The state file. Every change is one transaction; what fails raises StorageError whole."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        db.row_factory = sqlite3.Row
        self.db = db
        self.path = path
        self._inode = inode_of(path)
        self._last_event_id: int | None = None

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open for acting, under the lock. Raises StateError for what is no state file.

        What is damaged, newer or not ours is refused before anything is written to it, through a
        connection that only reads. It fails where a first start was killed: then nothing is there
        but a hot journal, which the other one rolls back.
        """
        os.close(open_own(path))
        try:
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(
                sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            ) as reading:
                check_database(reading, path)
                check_undamaged(reading, path)
            db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            version = check_database(db, path)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                message = f"{path}: this file system cannot do SQLite's WAL mode"
                raise StateError(message, "put state: on a local disk")
            # NORMAL does not sync commits: power loss could take back an intent that was acted on.
            db.execute("PRAGMA synchronous = FULL")
            store = cls(db, path)
            if version == 0:
                store.execute([(s, ()) for s in (*SCHEMA, f"PRAGMA user_version={SCHEMA_VERSION}")])
            # The loop stands still while it waits for another writer; what fails is tried again.
            db.execute("PRAGMA busy_timeout = 50")
        except sqlite3.Error as error:
            raise state_error(error, path) from None
        except StorageError as error:
            raise StateError(str(error)) from None
        return store

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path) -> Iterator[Store | None]:
        """Open for reading, beside a running daemon too; None where there is none yet.

        Without a WAL nobody writes, and SQLite is told so: else it would make files that root's
        `status` would leave to the daemon. Raises StateError where it cannot be read.
        """
        if not is_there(path):
            yield None
            return
        is_quiet = not is_there(path.with_name(path.name + "-wal"))
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_quiet else ''}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as db:
                yield cls(db, path) if check_database(db, path) else None
        except sqlite3.Error as error:
            raise state_error(error, path, "read") from None

    def execute(self, statements: Iterable[Statement]) -> None:
        """Commit statements, or nothing of them. Raises StorageError."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                for statement, parameters in statements:
                    self.db.execute(statement, parameters)
                self.db.execute("COMMIT")
            finally:
                if self.db.in_transaction:  # a failed COMMIT leaves it open
                    self.db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StorageError(str(state_error(error, self.path, "write"))) from error

    def commit(
        self,
        runs: Iterable[tuple[Run | None, Run]],
        events: Sequence[Event],
        now: float,
        also: Iterable[Statement] = (),
    ) -> list[Event]:
        """Commit how runs have changed, from what to what, and the events that tell of it.

        Returns the events as they are stored. Raises StorageError.
        """
        last_id = self.last_event_id() if self._last_event_id is None else self._last_event_id
        stored = [replace(e, at=now, id=last_id + i) for i, e in enumerate(events, 1)]
        statements: list[Statement] = list(also)
        for before, after in runs:
            row = run_row(after)
            names = ", ".join(f'"{name}"' for name in row)
            marks = ", ".join("?" * len(row))
            statement = f"INSERT OR REPLACE INTO runs ({names}) VALUES ({marks})"
            statements.append((statement, list(row.values())))
            old = {batch.id: (i, batch) for i, batch in enumerate(before.batches if before else ())}
            for place, batch in enumerate(after.batches):
                if old.get(batch.id) != (place, batch):
                    statements.append(batch_statement(after.id, place, batch))
        statements += [
            (
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (e.id, e.at, e.level, e.name, e.job, e.run, json.dumps(dict(e.fields)), e.text),
            )
            for e in stored
        ]
        if statements:
            self.execute(statements)
        self._last_event_id = last_id + len(stored)
        return stored

    def is_in_place(self) -> bool:
        """Return whether the open file is still the one of its name."""
        return self._inode is not None and inode_of(self.path) == self._inode

    def close(self) -> None:
        """Close the file; the last one to do so folds the WAL in."""
        with contextlib.suppress(sqlite3.Error):
            self.db.close()

    # --- runs ---

    def runs(self, where: str, parameters: Mapping[str, object] | None = None) -> list[Run]:
        """Return the runs for which an SQL condition holds, with their batches, in order."""
        batches: dict[int, list[Batch]] = {}
        columns = ", ".join(_BATCH)
        chosen = f"run_id IN (SELECT id FROM runs WHERE {where})"
        for row in self.db.execute(
            f"SELECT run_id, {columns} FROM batches WHERE {chosen} AND place >= 0"
            " ORDER BY run_id, place",
            parameters or {},
        ):
            _, batch_id, status, *rest = row
            batch = Batch(batch_id, status and sys.intern(status), *rest)
            batches.setdefault(row["run_id"], []).append(batch)
        rows = self.db.execute(f"SELECT * FROM runs WHERE {where} ORDER BY id", parameters or {})
        return [run_of(row, batches.get(row["id"], ())) for row in rows]

    def runs_for(self, jobs: Mapping[str, Job], *, recent: bool = True) -> list[Run]:
        """Return what a config is about: unfinished runs, those of its batch ids, the last groups.

        Of a job with `match`, finished runs are left out but for the last five and those that need
        attention. Also what may be at Keboola without its job is there.
        """
        names = compact_json(list(jobs))
        keys = compact_json([compact_json(sorted(j.batch_ids)) for j in jobs.values() if not j.match])
        in_config = "job IN (SELECT value FROM json_each(:names))"
        where = (
            f"phase IN ('sending', 'unknown', 'sent') OR (phase <> 'finished' AND {in_config})"
            f" OR (batch_key <> '' AND batch_key IN (SELECT value FROM json_each(:keys)))"
            f" OR (attention <> '' AND {in_config})"
        )
        last: list[int] = []
        for name in [name for name, job in jobs.items() if job.match] if recent else ():
            query = (
                "SELECT id FROM runs WHERE job = ? AND phase = 'finished'"
                " ORDER BY finished_at DESC LIMIT 5"
            )
            last += [row[0] for row in self.db.execute(query, (name,))]
        where += " OR id IN (SELECT value FROM json_each(:last))"
        return self.runs(where, {"names": names, "keys": keys, "last": compact_json(last)})

    def groups(self, job: str, groups: Collection[str]) -> dict[str, Run]:
        """Return the runs of a job's groups, by group."""
        where = 'job = :job AND "group" IN (SELECT value FROM json_each(:groups))'
        found = self.runs(where, {"job": job, "groups": compact_json(list(groups))})
        return {run.group: run for run in found}

    def known_batches(self, job: str, ids: Iterable[str]) -> set[str]:
        """Return which batches belong to a run of a job already, or came too late for one."""
        query = (
            "SELECT b.id FROM batches b JOIN runs r ON r.id = b.run_id"
            " WHERE b.id IN (SELECT value FROM json_each(?)) AND r.job = ?"
        )
        return {row[0] for row in self.db.execute(query, (compact_json(list(ids)), job))}

    def one(self, query: str, *parameters: object) -> Any:  # noqa: ANN401 - a value of SQLite's
        """Return the first value of the first row of a query, or None."""
        row = self.db.execute(query, parameters).fetchone()
        return row and row[0]

    # --- events, meta ---

    def last_event_id(self) -> int:
        """Return the number of the newest event, or 0."""
        return int(self.one("SELECT max(id) FROM events") or 0)

    def events(
        self, *, after: int = 0, name: str | None = None, most: int | None = None
    ) -> list[Event]:
        """Return events with a higher number, of one job or run or of all; the last, in order."""
        about = "" if name is None else "AND job = :job AND (:name = :job OR run = :name)"
        job = name and name.partition("/")[0]
        rows = self.db.execute(
            f"SELECT * FROM events WHERE id > :after {about} ORDER BY id DESC LIMIT :most",
            {"after": after, "name": name, "job": job, "most": -1 if most is None else most},
        ).fetchall()
        return [event_of(row) for row in reversed(rows)]

    def stats(self) -> dict[str, SecretStats]:
        """Return how the requests with each secret have fared, by its name."""
        rows = self.db.execute("SELECT * FROM secrets ORDER BY name")
        return {row["name"]: SecretStats(*row) for row in rows}

    def meta(self, key: str) -> Any:  # noqa: ANN401 - JSON
        """Return a stored fact, or None."""
        text = self.one("SELECT value FROM meta WHERE key = ?", key)
        return None if text is None else json.loads(text)

    @staticmethod
    def meta_statement(key: str, value: object) -> Statement:
        """Return what stores a fact as JSON."""
        return "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value))

    def prune(self, jobs: Mapping[str, Job], retention_s: float, now: float) -> None:
        """Drop old events, and finished groups that no list is read back to. Folds the WAL in.

        The newest event stays, so that no number is given twice, and so does what a webhook has
        not had yet.
        """
        before = now - retention_s
        told = self.one("SELECT min(told_up_to) FROM webhooks")
        newest = self.last_event_id()
        most = min(newest - 1, newest if told is None else told)
        statements: list[Statement] = [
            ("DELETE FROM events WHERE id <= ? AND (at < ? OR id <= ?)", (most, before, newest - 200_000))
        ]
        for name, job in jobs.items():
            if job.match:
                mark = (self.meta(f"read:{name}") or {}).get("to", 0.0)
                since = max(job.since, mark - 2 * HOUR_S)
                old = (
                    "SELECT id FROM runs WHERE job = ? AND phase = 'finished' AND finished_at < ?"
                    " AND attention = '' AND NOT EXISTS (SELECT 1 FROM batches b WHERE"
                    " b.run_id = runs.id AND coalesce(b.created_at, 9e99) >= ?)"
                )
                about = (name, before, since)
                statements.append((f"DELETE FROM batches WHERE run_id IN ({old})", about))
                statements.append((f"DELETE FROM runs WHERE id IN ({old})", about))
        self.execute(statements)
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("PRAGMA wal_checkpoint(PASSIVE)")


def batch_statement(run_id: int, place: int, batch: Batch) -> Statement:
    """Return what stores a batch; a `place` of -1 is that of one that came too late."""
    values = (run_id, place, *(getattr(batch, name) for name in _BATCH))
    names = ", ".join(("run_id", "place", *_BATCH))
    marks = ", ".join("?" * len(values))
    return f"INSERT OR REPLACE INTO batches ({names}) VALUES ({marks})", values


