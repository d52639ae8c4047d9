# ==================================================================================================
# 3. Secrets: keys, opening, and keeping values out of sight
# ==================================================================================================

KEY_VARIABLE: Final = "TECKOCHECKER_KEY"
MAKE_KEY: Final = "head -c 32 /dev/urandom | base64 | tr +/ -_"


@dataclass(frozen=True, slots=True)
class FileRead:
    """A file as it was read at one moment: its bytes, permission bits and inode, or why not."""

    data: bytes = b""
    mode: int = 0
    inode: tuple[int, int] = (0, 0)
    error: OSError | None = None

    @property
    def digest(self) -> bytes:
        """What tells this content from a different one."""
        failure = self.error.errno if self.error else None
        return hashlib.sha256(repr((failure, self.mode)).encode() + self.data).digest()


class Files:
    """Reads each file once, so that what is compared and what is parsed are the same bytes."""

    def __init__(self) -> None:
        self.seen: dict[Path, FileRead] = {}

    def read(self, path: Path) -> FileRead:
        """Return the file, at most MAX_FILE_BYTES and one byte of it."""
        if path not in self.seen:
            self.seen[path] = self._read(path)
        return self.seen[path]

    @staticmethod
    def _read(path: Path) -> FileRead:
        try:
            # Without O_NONBLOCK, a named pipe would hold the process until someone writes to it.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "Not a regular file")
                data = file.read(MAX_FILE_BYTES + 1)
                inode = (status.st_dev, status.st_ino)
                return FileRead(data, stat.S_IMODE(status.st_mode), inode)
        except OSError as error:
            return FileRead(error=error)


class Redactor:
    """Replaces every secret value it knows; of each secret it remembers the last twenty."""

    # JSON may write a character as `\u0041`, and `/` as `\/`; others are no part of a token.
    _ESCAPES: Final = re.compile(rb"\\(?:u00([2-7][0-9A-Fa-f])|(/)|.)", re.DOTALL)

    def __init__(self) -> None:
        self._known: dict[str, dict[str, None]] = {}
        self._longest_first: list[str] = []
        self._pattern = re.compile("(?!)")  # matches nothing

    def learn(self, secrets: Iterable[tuple[str, Secret]]) -> None:
        """Add values by name, each also in the forms in which JSON, Python and URLs write it.

        Values of fewer than four characters are no tokens, and would mask half of the log.
        """
        for name, secret in secrets:
            value = secret.reveal()
            values = self._known.setdefault(name, {})
            values.pop(value, None)
            if len(value) >= 4:
                values[value] = None
            while len(values) > 20:
                del values[next(iter(values))]
        forms = set()
        for value in itertools.chain.from_iterable(self._known.values()):
            forms |= {value, json.dumps(value)[1:-1], repr(value)[1:-1]}
            forms.add(urllib.parse.quote(value, safe=""))
        self._longest_first = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._longest_first)) or "(?!)")

    def text(self, text: str) -> str:
        """Return `text` without any secret."""
        return self._pattern.sub("***", text)

    def body(self, body: bytes, *, is_data: bool) -> bytes:
        """Return a server's answer without the tokens that it may echo.

        In data only long ones are looked for: a short one could be part of an honest id.
        """
        plain = self._ESCAPES.sub(self._unescaped, body) if b"\\" in body else body
        for form in self._longest_first:
            if (len(form) >= 16 or not is_data) and form.encode() in plain:
                body = plain = plain.replace(form.encode(), b"***")
        return body

    @staticmethod
    def _unescaped(escape: re.Match[bytes]) -> bytes:
        """Return what an escape stands for, unless it would end or begin something in JSON."""
        if escape[2]:
            return b"/"
        character = bytes.fromhex(escape[1].decode()) if escape[1] else b'"'
        return escape[0] if character in b'"\\\x7f' else character

    def tree(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Return a log field's value without any secret; what is not JSON becomes its repr."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.tree(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.tree(item) for item in value]
        return self.text(repr(value))


# --- one value ------------------------------------------------------------------------------------


def looks_encrypted(value: str) -> bool:
    """Return whether a value has the form of a Fernet token, whoever's key it is for."""
    try:
        data = base64.urlsafe_b64decode(value)
    except (binascii.Error, ValueError):
        return False
    return len(data) >= 73 and data[0] == 0x80


def decrypted(keys: MultiFernet, token: str) -> str | None:
    """Return what is in a token, or None if these keys do not open it."""
    try:
        return keys.decrypt(token.encode()).decode().strip()
    except (InvalidToken, ValueError):  # ValueError: a non-ASCII token, or binary inside
        return None


def token_problem(text: str, kind: str) -> tuple[str, str] | None:
    """Return what is wrong with a secret's value, and its cure, or None. Neither shows it."""
    alone = "put the token there, alone"
    if not text:
        return "is empty", alone
    if len(text) > 65536:
        return "is over 64 KiB", alone
    # A newline inside a header value makes httpx print the whole value in its exception.
    if not all("!" <= c <= "~" for c in text.removeprefix("Bearer ")):
        return "has characters that no token has (it takes printable ASCII without spaces)", alone
    if text[0] in "\"'" or text[-1] in "\"'":
        return "has quotes around it", "write it without: docker's --env-file keeps quotes"
    if text.startswith("Bearer "):
        return "begins with Bearer", "write only what follows it"
    if "YOUR-" in text or text in {"https://hooks.slack.com/services/T0/B0/XYZ"}:
        return "is the placeholder of the example", "put your own there"
    if kind == "webhook":
        problem = url_problem(text.partition("?")[0])
        return (f"{problem}", "put the https address there") if problem else None
    if re.match("[A-Za-z_][A-Za-z0-9_]*=.", text):
        return "begins with NAME=", "write only what follows the ="
    if kind == "keboola" and text.startswith("kbc_"):
        cure = "make a Storage API token in the project's settings"
        return "is a programmatic token, which is not supported", cure
    return None


# --- all of a config's ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config with its secrets opened: what the engine runs with, swapped as one reference."""

    config: Config
    secrets: Mapping[str, Secret]
    text: str
    warnings: tuple[str, ...] = ()

    def access(self, job: Job) -> tuple[object, ...]:
        """Return all that a job reaches its servers with, to tell whether it has changed."""
        entries = [self.config.secrets[name] for name in (job.openai_secret, job.keboola_secret)]
        values = [self.secrets[entry.name] for entry in entries]
        return (*values, *(replace(e, text=Secret(""), line=0, column=0) for e in entries))


class SecretOpener:
    """Opens a config's secrets, and notes what is in the way, each problem at its place."""

    def __init__(self, config: Config, files: Files, env: Mapping[str, str]) -> None:
        self.config = config
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.keys: list[Secret] = []
        self._files = files
        self._env = env
        self._has_credential = False  # the key is the service manager's copy, made at the start

    def open_all(self) -> dict[str, Secret]:
        """Return every secret that opens, by name; `problems` tells of the others."""
        entries = self.config.secrets.values()
        keys = self.fernet() if any(entry.source == "value" for entry in entries) else None
        opened = {entry.name: self._open(entry, keys) for entry in entries}
        return {name: Secret(text) for name, text in opened.items() if text is not None}

    def all_known(self, secrets: Mapping[str, Secret]) -> Iterator[tuple[str, Secret]]:
        """Yield what must be shown nowhere: values, keys, and the paths of webhooks' addresses."""
        yield from secrets.items()
        yield from ((KEY_VARIABLE, key) for key in self.keys)
        for name in self.config.of_type("webhook"):
            parts = urllib.parse.urlsplit(secrets[name].reveal() if name in secrets else "")
            target = parts._replace(scheme="", netloc="").geturl()
            for place, text in enumerate((target, parts.path)):
                if len(text) > 8:
                    yield f"{name} {place}", Secret(text)

    def fernet(self) -> MultiFernet | None:
        """Return the keys (the first encrypts, all decrypt) from the first place that has any."""
        text = self._env.get(KEY_VARIABLE, "").strip()
        if text:
            return self._parse_keys(text, f"${KEY_VARIABLE}")
        directory = self._env.get("CREDENTIALS_DIRECTORY")
        if directory:
            credential = Path(directory) / "teckochecker.key"
            read = self._files.read(credential)
            if not isinstance(read.error, FileNotFoundError):
                self._has_credential = True
                return self._read_keys(credential, read)
        path = self.config.key_path
        read = self._files.read(path)
        if read.error is None and read.mode & stat.S_IRWXO:
            what = f"{path} can be read by others (mode {read.mode:04o})"
            return self._bad_key(what, f"run: chmod 600 {path}")
        if read.error is None and read.mode & stat.S_IRWXG:
            self.warnings.append(f"{path} can be read by its group; better: chmod 600 {path}")
        return self._read_keys(path, read)

    def _bad_key(self, what: str, cure: str) -> None:
        place = (self.config.key_line, self.config.key_column)
        self.problems.append(Problem(str(self.config.path), *place, "key_file", what, cure))

    def _read_keys(self, path: Path, read: FileRead) -> MultiFernet | None:
        if read.error:
            cure = f"put a Fernet key there ({MAKE_KEY}) or set ${KEY_VARIABLE}"
            if read.error.errno == errno.EACCES:
                cure = "run this as the key's owner, or as root"
            return self._bad_key(f"cannot read the key file {path}: {read.error.strerror}", cure)
        return self._parse_keys(read.data.decode("ascii", "replace"), str(path))

    def _parse_keys(self, text: str, where: str) -> MultiFernet | None:
        lines = (line.split("#")[0] for line in text.splitlines())
        keys = [key for line in lines for key in line.replace(",", " ").split()]
        try:
            if keys:
                fernet = MultiFernet([Fernet(key) for key in keys])
                self.keys = [Secret(key) for key in keys]
                return fernet
        except ValueError:
            pass
        what = f"{where} holds {'something other than Fernet keys' if keys else 'no key'}"
        return self._bad_key(what, f"make one: {MAKE_KEY}")

    def _open(self, entry: SecretEntry, keys: MultiFernet | None) -> str | None:
        """Return a secret's value, or None and a problem."""
        found = getattr(self, f"_from_{entry.source}")(entry, keys)
        if isinstance(found, str):
            problem = token_problem(found, entry.type)
            if not problem:
                return found
            found = (f"the secret {problem[0]}", problem[1])
        if found:
            path = f"secrets.{entry.name}.{entry.source}"
            place = (str(self.config.path), entry.line, entry.column, path)
            self.problems.append(Problem(*place, *found))
        return None

    def _from_value(
        self, entry: SecretEntry, keys: MultiFernet | None
    ) -> str | tuple[str, str] | None:
        if keys is None:
            return None  # noted already, where the key was looked for
        text = decrypted(keys, entry.text.reveal())
        if text is not None:
            return text
        command = f"run: teckochecker --config {self.config.path} encrypt"
        if not looks_encrypted(entry.text.reveal()):
            return "is not encrypted", command
        cure = f"bring that key back, or write the token in plain and {command}"
        if self._has_credential:
            cure = f"if the key is new, restart the service; else {cure}"
        return "is encrypted with another key", cure

    def _from_env(self, entry: SecretEntry, _: object) -> str | tuple[str, str]:
        value = self._env.get(entry.text.reveal())
        if value is None:
            return "the environment has no such variable", "set it, or correct the name"
        return value.strip()

    def _from_file(self, entry: SecretEntry, _: object) -> str | tuple[str, str]:
        # Relative paths are relative to the config; an absolute one replaces that altogether.
        read = self._files.read(self.config.path.parent / entry.text.reveal())
        if read.error:
            what = f"cannot read the file: {read.error.strerror}"
            return what, "correct the path or its permissions"
        return read.data[:100_000].decode("utf-8", "replace").strip()


def read_config_file(path: Path, files: Files) -> tuple[Config, list[Problem], str]:
    """Return what the file says so far as it can be read, what is wrong with it, and its text."""
    read = files.read(path)

    def refuse(what: str, cure: str, line: int = 1, column: int = 1) -> tuple[Any, ...]:
        config = Config(path, "", path.parent / "teckochecker.db", path.parent / "teckochecker.key")
        return config, [Problem(str(path), line, column, "", what, cure)], ""

    if read.error:
        cure = "check the path, pass --config PATH, or run `teckochecker init` for a first one"
        if read.error.errno == errno.EACCES:
            cure = "let this user read it; with all secrets encrypted, chmod 644 is safe"
        return refuse(f"cannot be read: {read.error.strerror}", cure)
    if len(read.data) > MAX_FILE_BYTES:
        return refuse("is over 16 MiB", "a config is smaller: check the path")
    try:
        text = read.data.decode()
    except UnicodeDecodeError as error:
        before = read.data[: error.start]
        place = (before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        return refuse("is not UTF-8 text", "save it as UTF-8", *place)
    return *parse_config(text, path), text


def load_config(
    path: Path, files: Files, env: Mapping[str, str], redactor: Redactor, text: str | None = None
) -> LoadedConfig:
    """Return the config with its secrets opened: the one way in for start, reload and `check`.

    `text` takes the place of what the file says. Raises ConfigError with every problem of the file,
    the key and the secrets, in words without any secret.
    """
    if text is None:
        config, problems, text = read_config_file(path, files)
    else:
        config, problems = parse_config(text, path)
    opener = SecretOpener(config, files, env)
    secrets = opener.open_all()
    redactor.learn(opener.all_known(secrets))
    problems += opener.problems
    if problems:
        raise ConfigError(replace(p, what=redactor.text(p.what)) for p in problems)
    warnings = [*opener.warnings, *mount_warning(path)]
    return LoadedConfig(config, secrets, text, tuple(warnings))


def mount_warning(path: Path) -> Iterator[str]:
    """Warn of a config that is a mount point of its own: nobody can replace it."""
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        target = str(path.resolve())
        places = {line.split(" ")[4] for line in mounts.splitlines() if line.count(" ") > 5}
        if target in {re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), p) for p in places}:
            yield f"{path} is a mount of its own: its changes are not seen; mount its directory"


