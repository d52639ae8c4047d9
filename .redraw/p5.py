# ==================================================================================================
# 5. Store and lock: what must survive a crash, in one SQLite file
# ==================================================================================================

SCHEMA_VERSION: Final = 10
STATE_HINT: Final = "restore it from a backup, or move it away: Keboola is searched before any POST"
Statement = tuple[str, Sequence[object]]


@functools.cache
def columns(cls: type) -> Mapping[str, str]:
    """Return the columns for a dataclass's fields (but for nested ones): name and SQL type."""
    kinds = {"str": "TEXT", "int": "INTEGER", "bool": "INTEGER", "float": "REAL", "Phase": "TEXT"}
    kinds["Mapping[str, Any]"] = "TEXT"  # as JSON
    types = {f.name: str(f.type).partition(" | ") for f in fields(cls)}
    return {
        name: kinds[kind] + (" NOT NULL" if not null else "")
        for name, (kind, _, null) in types.items()
        if kind in kinds
    }


def as_row(item: object) -> dict[str, Any]:
    """Return a dataclass instance's fields by column."""
    return {name: getattr(item, name) for name in columns(type(item))}  # type: ignore[arg-type]


def insert(into: str, row: Mapping[str, object]) -> Statement:
    """Return what stores a row, in place of the one with its key."""
    names = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join("?" * len(row))
    return f"INSERT OR REPLACE INTO {into} ({names}) VALUES ({marks})", [*row.values()]


@dataclass(frozen=True, slots=True)
class SecretStats:
    """How the requests with one secret have fared since the state file began. Unix seconds."""

    name: str
    type: str
    requests: int = 0
    errors: int = 0  # of the requests: all that brought no 2xx
    last_success_at: float | None = None
    refused_since: float | None = None  # the server has refused it ever since
    error: str | None = None  # what became of the last request, if it failed

    def after(self, error: ApiError | None, now: float) -> SecretStats:
        """Return how it has fared after one more request."""
        requests = self.requests + 1
        if error is None:
            return SecretStats(self.name, self.type, requests, self.errors, now)
        after = replace(self, requests=requests, errors=self.errors + 1, error=str(error))
        if error.status == 401:
            return replace(after, refused_since=self.refused_since or now)
        # Whatever a server says of a request other than that it refuses the key, it takes the key.
        takes_key = (error.status or 500) < 500 and error.status not in {408, 429}
        return replace(after, refused_since=None) if takes_key else after

    def statement(self) -> Statement:
        """Return what stores it."""
        return insert("secrets", as_row(self))


def create_table(name: str, key: str, *classes: type, **own: str) -> str:
    """Return the SQL of a table of dataclasses; `own` are further columns, or other types."""
    of_fields = itertools.chain.from_iterable(columns(cls).items() for cls in classes)
    lines = [f'"{column}" {sql}' for column, sql in (dict(of_fields) | own).items()]
    body = ",\n    ".join([*lines, f"PRIMARY KEY ({key})"])
    what = str(classes[0].__doc__).partition("\n")[0]
    options = "STRICT" if key == "id" else "STRICT, WITHOUT ROWID"
    return f"-- {what}\nCREATE TABLE {name} (\n    {body}\n) {options}"


# Times are Unix seconds; a column is explained at the field of its name. Nothing here is a secret.
SCHEMA: Final[Sequence[str]] = (
    create_table(
        "runs",
        "id",
        *(Run, Target),
        next_at="REAL /* NULL: nothing is due by itself */",
        unknown_wall="REAL /* unknown_since */",
        unknown_boot="TEXT",
        unknown_uptime_s="REAL",
        batch_key="TEXT NOT NULL /* JSON: its sorted batch ids; empty for a group */",
    ),
    'CREATE INDEX runs_by_job ON runs (job, "group")',
    "CREATE INDEX runs_by_batches ON runs (batch_key) WHERE batch_key <> ''",
    "CREATE INDEX runs_unfinished ON runs (phase) WHERE phase <> 'finished'",
    "CREATE INDEX runs_in_need ON runs (attention) WHERE attention <> ''",
    "CREATE INDEX runs_by_end ON runs (job, finished_at) WHERE phase = 'finished'",
    create_table(
        "batches", "run_id, id", Batch, run_id="INTEGER NOT NULL", place="INTEGER NOT NULL"
    ),
    "CREATE INDEX batches_by_id ON batches (id)",
    create_table("events", "id", Event),
    "CREATE INDEX events_by_job ON events (job, id) WHERE job IS NOT NULL",
    create_table("requests", "id", RetryRequest),
    create_table("secrets", "name", SecretStats),
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    """
    CREATE TABLE webhooks (
        secret TEXT PRIMARY KEY,
        told_up_to INTEGER NOT NULL, -- the last event that it has had, or was not to have
        failures INTEGER NOT NULL,
        next_at REAL NOT NULL
    ) STRICT, WITHOUT ROWID""",
)


# --- the clock, and files beside the state --------------------------------------------------------


class Clock:
    """The process's one clock: Unix time at the start, and what the boot-time clock adds to it.

    That one counts suspends too, and nobody sets it.
    """

    def __init__(self) -> None:
        self._boot = ""
        with contextlib.suppress(OSError):  # not Linux: the wall clock has to do
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._kind = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._started_at = time.time() - self.uptime_s()

    def uptime_s(self) -> float:
        """Return seconds that only grow."""
        return time.clock_gettime(self._kind)

    def now(self) -> float:
        """Return Unix seconds."""
        return self._started_at + self.uptime_s()

    def boot_time(self) -> BootTime:
        return BootTime(self.now(), self._boot, self.uptime_s())

    def jitter(self) -> float:
        """Return a random number from 0 to 1."""
        return random.random()  # noqa: S311 - spreads load, guards nothing

    def changed(self) -> float:
        """Return by how many seconds the system's clock was set, and follow it; or 0."""
        by_s = time.time() - self.now()
        if abs(by_s) <= MINUTE_S:
            return 0.0
        self._started_at += by_s
        return by_s


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return what tells this file from another one of its name, or None if there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def owner_of(path: Path) -> str:
    """Return the name of a file's owner, or its number."""
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def is_there(path: Path) -> bool:
    """Return whether a file exists. Raises StateError for what is no file, or may not be asked."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        hint = "run this as root, or as the daemon's user"
        raise StateError(f"cannot access {path}: {error.strerror}", hint) from None
    raise StateError(f"{path} is not a regular file", "correct the path")


def open_own(path: Path) -> int:
    """Open or make a file beside the state, for reading and writing; returns the descriptor.

    What root makes here is given to the directory's owner, who has to work with it too. Links are
    not followed: that owner could have root write somewhere else. Raises StateError.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        with contextlib.suppress(FileExistsError):
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(fd, owner.st_uid, owner.st_gid)
            return fd
        fd = os.open(path, flags)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(errno.EINVAL, "Not a regular file")
    except OSError as error:
        hint = "correct state:, or this user's rights to the directory"
        if error.errno == errno.ENOENT:
            hint = "create the directory (systemd does, when it starts the unit)"
        elif error.errno == errno.EACCES and inode_of(path):
            hint = f"it belongs to {owner_of(path)}: chown it to the daemon's user"
        elif error.errno in {errno.ELOOP, errno.EINVAL, errno.ENXIO}:
            hint = "put a file there, no link and no pipe"
        raise StateError(f"cannot open {path}: {error.strerror}", hint) from None


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
            holder = one_line(self._read().partition(" since ")[0]) or "it just started"
            message = f"another instance holds {self.path}: {holder}"
            raise LockedError(message, "wait for it, or stop it") from None
        except OSError as error:
            message = f"cannot lock {self.path}: {error.strerror}"
            raise StateError(message, "put state: on a local disk") from None
        number = r"([0-9]{1,15}\.[0-9]{1,9})"
        pattern = rf"last POST at {number} \(boot ([!-~]{{0,64}}) up {number}\)"
        match = re.search(pattern, self._read())
        self.last_post = BootTime(float(match[1]), match[2], float(match[3])) if match else None
        self._label = f"pid {os.getpid()} ({purpose}) since {started_at:.3f}\n"
        self._write(self._label)

    def note_post(self, now: BootTime) -> None:
        """Remember the time of a POST outside of the state file."""
        self.last_post = now
        self._write(self._label)

    def _read(self) -> str:
        return os.pread(self._fd, 400, 0).decode(errors="replace")

    def _write(self, label: str) -> None:
        if at := self.last_post:
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
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._fd), self.path.stat())
        return False

    def close(self) -> None:
        """Let the lock go, and with it the label that says who has it."""
        self._write("")
        os.close(self._fd)


def lock_owner(state_path: Path) -> dict[str, Any]:
    """Return who acts on a state file, without taking its lock (that could hold up a start).

    It is `daemon` of `status --json`, with `once` where it is a pass of --once.
    """
    path = state_path.with_name(state_path.name + ".lock")
    label, looped_at = "", 0.0
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would hold us up
            label = path.read_text(encoding="utf-8", errors="replace")
            looped_at = path.stat().st_mtime
    match = re.match(r"pid ([0-9]{1,9}) \((daemon|--once)\) since ([0-9]{1,15}\.[0-9]{3})\n", label)
    if not match:
        nobody = dict.fromkeys(("pid", "started_at", "last_loop_at"))
        return {"running": False, "once": False, **nobody}
    age_s = time.time() - looped_at
    is_gone = False
    try:
        os.kill(int(match[1]), 0)
    except OSError as error:  # what lives in another container touches the file
        is_gone = error.errno == errno.ESRCH and age_s >= 5
    is_running = not is_gone and age_s < MINUTE_S
    return {
        "running": is_running and match[2] == "daemon",
        "once": is_running and match[2] == "--once",
        "pid": int(match[1]),
        "started_at": rfc3339(float(match[3])),
        "last_loop_at": rfc3339(looped_at),
    }


# --- the database ---------------------------------------------------------------------------------


def check_undamaged(db: sqlite3.Connection, path: Path) -> None:
    """Raise StateError, or SQLite's own error, for what is damaged."""
    result = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
    if result != "ok":
        raise StateError(f"the state file {path} is damaged: {one_line(result)}", STATE_HINT)


def state_error(error: sqlite3.Error, path: Path) -> StateError:
    """Return what a person is told of an error of SQLite's, with what to do about it."""
    whose = f"it belongs to {owner_of(path)}" if inode_of(path) else "it is not there"
    hint = {
        sqlite3.SQLITE_FULL: "free the disk",
        sqlite3.SQLITE_BUSY: "see who else has the file open",
        sqlite3.SQLITE_READONLY: f"{whose}: give this user the right to write it and its directory",
        sqlite3.SQLITE_CANTOPEN: f"{whose}: check this user's rights to it and its directory",
        sqlite3.SQLITE_IOERR: "look into the system's log for disk errors",
    }.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, STATE_HINT)
    return StateError(f"cannot use the state file {path}: {error}", hint)


def run_row(run: Run) -> dict[str, Any]:
    ids = [] if run.group else sorted(batch.id for batch in run.batches)
    return {
        **as_row(run),
        **as_row(run.target),
        "next_at": run.next_at if math.isfinite(run.next_at) else None,
        **{f"unknown_{name}": getattr(run.unknown_since, name, None) for name in columns(BootTime)},
        "batch_key": compact_json(ids) if ids else "",
    }


def run_of(row: sqlite3.Row, batches: Iterable[Batch]) -> Run:
    values = {name: row[name] for name in columns(Run)}
    values |= {name: bool(row[name]) for name in ("forced", "deadline_told")}
    values["phase"] = Phase(row["phase"])
    values["next_at"] = math.inf if row["next_at"] is None else row["next_at"]
    since = [row[f"unknown_{name}"] for name in columns(BootTime)]
    values["unknown_since"] = None if since[0] is None else BootTime(*since)
    target = Target(*(row[name] for name in columns(Target)))
    return Run(**values, target=target, batches=tuple(batches))


def batch_statement(run_id: int, place: int, batch: Batch) -> Statement:
    """Return what stores a batch; a `place` of -1 is that of one that came too late."""
    return insert("batches", as_row(batch) | {"run_id": run_id, "place": place})


class Store:
    """The state file. Every change is one transaction; what fails raises StorageError whole."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        db.row_factory = sqlite3.Row
        self.db = db
        self.path = path
        self._inode = inode_of(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open for acting, under the lock. Raises StateError for what is no state file.

        What is damaged, newer or not ours is refused before anything is written to it.
        """
        os.close(open_own(path))
        try:
            db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            if is_there(path.with_name(path.name + "-journal")):  # a first start was killed
                db.execute("PRAGMA user_version")  # to read is to roll that back
            with cls.reading(path) as store:
                has_schema = store is not None
                if store:
                    check_undamaged(store.db, path)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                message = f"{path}: this file system cannot do SQLite's WAL mode"
                raise StateError(message, "put state: on a local disk")
            # NORMAL does not sync commits: power loss could take back an intent that was acted on.
            db.execute("PRAGMA synchronous = FULL")
            if not has_schema:
                script = (*SCHEMA, f"PRAGMA user_version = {SCHEMA_VERSION}", "COMMIT")
                db.executescript(";\n".join(("BEGIN IMMEDIATE", *script)))
            # The loop stands still while it waits for another writer; what fails is tried again.
            db.execute("PRAGMA busy_timeout = 50")
        except sqlite3.Error as error:
            raise state_error(error, path) from None
        return cls(db, path)

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path) -> Iterator[Store | None]:
        """Open for reading, beside a running daemon too; None where there is none yet.

        Without a WAL nobody writes, and SQLite is told so: else it would make files that root's
        `status` would leave to the daemon. Raises StateError for what is no state file of ours.
        """
        if not is_there(path):
            yield None
            return
        is_quiet = not is_there(path.with_name(path.name + "-wal"))
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_quiet else ''}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as db:
                version = int(db.execute("PRAGMA user_version").fetchone()[0])
                is_empty = db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is None
                what = f"the state file {path} has schema {version}"
                if version > SCHEMA_VERSION:
                    message = f"{what}; this program knows {SCHEMA_VERSION}"
                    raise StateError(message, "run the newer teckochecker that wrote it")
                if version < SCHEMA_VERSION and not is_empty:
                    hint = "move it away (Keboola is searched before any POST), or correct state:"
                    message = f"{what}: it is of an older teckochecker or of another program"
                    raise StateError(message, hint)
                yield None if is_empty else cls(db, path)
        except sqlite3.Error as error:
            raise state_error(error, path) from None

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
            raise StorageError(str(state_error(error, self.path))) from error

    def commit(
        self,
        runs: Iterable[tuple[Run | None, Run]],
        events: Iterable[Event],
        now: float,
        also: Iterable[Statement] = (),
    ) -> list[Event]:
        """Commit how runs have changed, from what to what, and the events that tell of it.

        Returns the events with their time. Raises StorageError.
        """
        statements = list(also)
        for before, after in runs:
            statements.append(insert("runs", run_row(after)))
            known = enumerate(before.batches if before else ())
            changed = set(enumerate(after.batches)).difference(known)
            statements += [batch_statement(after.id, place, batch) for place, batch in changed]
        stored = [replace(event, at=now) for event in events]
        for event in stored:  # SQLite numbers them
            row = as_row(event) | {"id": None, "fields": json.dumps(dict(event.fields))}
            statements.append(insert("events", row))
        if statements:
            self.execute(statements)
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
        query = (
            f"SELECT run_id, {', '.join(columns(Batch))} FROM batches WHERE place >= 0"
            f" AND run_id IN (SELECT id FROM runs WHERE {where}) ORDER BY run_id, place"
        )
        for run_id, batch_id, status, *rest in self.db.execute(query, parameters or {}):
            batch = Batch(batch_id, status and sys.intern(status), *rest)
            batches.setdefault(run_id, []).append(batch)
        rows = self.db.execute(f"SELECT * FROM runs WHERE {where} ORDER BY id", parameters or {})
        return [run_of(row, batches.get(row["id"], ())) for row in rows]

    def runs_for(self, jobs: Mapping[str, Job], *, recent: bool = True) -> list[Run]:
        """Return what a config is about: unfinished runs, those of its batch ids, the last groups.

        Of a job with `match`, finished runs are left out but for the last five and those that need
        attention. Also what may be at Keboola without its job is there.
        """
        batch_keys = [compact_json(sorted(job.batch_ids)) for job in jobs.values() if not job.match]
        last: list[int] = []
        query = (
            "SELECT id FROM runs WHERE job = ? AND phase = 'finished'"
            " ORDER BY finished_at DESC LIMIT 5"
        )
        for name in [name for name, job in jobs.items() if job.match and recent]:
            last += [row["id"] for row in self.db.execute(query, (name,))]
        in_config = "+job IN (SELECT value FROM json_each(:names))"  # +: by the partial indexes
        where = f"""id IN (
            SELECT id FROM runs WHERE phase <> 'finished'
                AND (phase IN ('sending', 'unknown', 'sent') OR {in_config})
            UNION SELECT id FROM runs WHERE attention <> '' AND {in_config}
            UNION SELECT id FROM runs
                WHERE batch_key <> '' AND batch_key IN (SELECT value FROM json_each(:keys))
            UNION SELECT value FROM json_each(:last))"""
        values = {"names": [*jobs], "keys": batch_keys, "last": last}
        return self.runs(where, {name: compact_json(value) for name, value in values.items()})

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
        return {row["id"] for row in self.db.execute(query, (compact_json(list(ids)), job))}

    def one(self, query: str, *parameters: object) -> Any:  # noqa: ANN401 - a value of SQLite's
        """Return the first value of the first row of a query, or None."""
        row = self.db.execute(query, parameters).fetchone()
        return row and row[0]

    # --- everything else ---

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
        return [Event(**dict(row) | {"fields": json.loads(row["fields"])}) for row in rows[::-1]]

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
        return insert("meta", {"key": key, "value": json.dumps(value)})

    def prune(self, jobs: Mapping[str, Job], retention_s: float, now: float) -> None:
        """Drop old events, and finished groups that no list is read back to. Folds the WAL in.

        The newest event stays, so that no number is given twice, and so does what a webhook has
        not had yet.
        """
        before, newest = now - retention_s, self.last_event_id()
        told = self.one("SELECT min(told_up_to) FROM webhooks")
        most = min(newest - 1, newest if told is None else told)
        drop_events = "DELETE FROM events WHERE id <= ? AND (at < ? OR id <= ?)"
        statements: list[Statement] = [(drop_events, (most, before, newest - 200_000))]
        old = (
            "SELECT id FROM runs WHERE job = ? AND phase = 'finished' AND finished_at < ?"
            " AND attention = '' AND NOT EXISTS (SELECT 1 FROM batches b"
            " WHERE b.run_id = runs.id AND coalesce(b.created_at, 9e99) >= ?)"
        )
        for name in [name for name, job in jobs.items() if job.match]:
            read_to = (self.meta(f"read:{name}") or {}).get("to", 0.0)
            about = (name, before, max(jobs[name].since, read_to - 2 * HOUR_S))
            statements.append((f"DELETE FROM batches WHERE run_id IN ({old})", about))
            statements.append((f"DELETE FROM runs WHERE id IN ({old})", about))
        self.execute(statements)
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("PRAGMA wal_checkpoint(PASSIVE)")


