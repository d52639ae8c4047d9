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
        about = repr((self.error and self.error.errno, self.mode))
        return hashlib.sha256(about.encode() + self.data).digest()


class Files:
    """Reads each file once, so that what is compared and what is parsed are the same bytes."""

    def __init__(self) -> None:
        self.seen: dict[Path, FileRead] = {}

    def read(self, path: Path) -> FileRead:
        """Return the file, at most MAX_FILE_BYTES and one byte of it."""
        if path in self.seen:
            return self.seen[path]
        try:
            # Without O_NONBLOCK, a named pipe would hold us until someone writes to it.
            with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "Not a regular file")
                data, inode = file.read(MAX_FILE_BYTES + 1), (status.st_dev, status.st_ino)
            self.seen[path] = FileRead(data, stat.S_IMODE(status.st_mode), inode)
        except OSError as error:
            self.seen[path] = FileRead(error=error)
        return self.seen[path]


class Redactor:
    """Replaces every secret value it knows; of each secret it remembers the last twenty."""

    def __init__(self) -> None:
        self._known: dict[str, list[str]] = {}
        self.learn(())

    def learn(self, secrets: Iterable[tuple[str, Secret]]) -> None:
        """Add values by name, each also in the forms in which JSON, Python and URLs write it."""
        for name, secret in secrets:
            older = [value for value in self._known.get(name, ()) if value != secret.reveal()]
            self._known[name] = [*older, secret.reveal()][-20:]
        forms = set()
        for value in itertools.chain(*self._known.values()):
            if len(value) >= 4:  # shorter ones are no tokens, and would mask half of the log
                forms |= {value, json.dumps(value)[1:-1], repr(value)[1:-1]}
                forms.add(urllib.parse.quote(value, safe=""))
        self._longest_first = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._longest_first)) or "(?!)")

    def text(self, text: str) -> str:
        return self._pattern.sub("***", text)

    def body(self, body: bytes, *, is_data: bool) -> bytes:
        """Return a server's answer without the tokens that it may echo.

        In data only long ones are looked for: a short one could be part of an honest id.
        """
        plain = body
        with contextlib.suppress(ValueError, RecursionError):  # JSON can escape any character
            plain = json.dumps(json.loads(body), ensure_ascii=False).encode(errors="surrogatepass")
        for form in self._longest_first:
            if (len(form) >= 16 or not is_data) and form.encode() in plain:
                body = plain = plain.replace(form.encode(), b"***")
        return body

    def tree(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Return a log field's value without any secret; what is not JSON becomes its repr."""
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.tree(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.tree(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return self.text(value if isinstance(value, str) else repr(value))


def looks_encrypted(value: str) -> bool:
    """Return whether a value has the form of a Fernet token, whoever's key it is for."""
    return bool(re.fullmatch("gAAAAA[A-Za-z0-9_-]{91,}=*", value))


def decrypted(keys: MultiFernet, token: str) -> str | None:
    """Return what is in a token, or None if these keys do not open it."""
    try:
        return keys.decrypt(token.encode()).decode().strip()
    except (InvalidToken, ValueError):  # ValueError: a non-ASCII token, or binary inside
        return None


def token_problem(text: str, kind: str) -> tuple[str, str] | None:
    """Return what is wrong with a secret's value, and its cure, or None. Neither shows it."""
    unprintable = "has characters that no token has (it takes printable ASCII without spaces)"
    alone, after = "put the token there, alone", "write only what follows"
    is_example = "YOUR-" in text or text == "https://hooks.slack.com/services/T0/B0/XYZ"
    is_webhook, is_kbc = kind == "webhook", kind == "keboola" and text.startswith("kbc_")
    url = url_problem(text.partition("?")[0]) if is_webhook else None
    has_name = not is_webhook and re.match("[A-Za-z_][A-Za-z0-9_]*=.", text)
    for is_wrong, what, cure in (
        (not text, "is empty", alone),
        (len(text) > 65536, "is over 64 KiB", alone),
        # A newline inside a header value makes httpx print the whole value in its exception.
        (re.search("[^!-~]", text.removeprefix("Bearer ")), unprintable, alone),
        (re.search("^[\"']|[\"']$", text), "has quotes around it", "write it without them"),
        (text.startswith("Bearer "), "begins with Bearer", f"{after} it"),
        (is_example, "is the placeholder of the example", "put your own there"),
        (url, f"{url}", "put the https address there"),
        (has_name, "begins with NAME=", f"{after} the ="),
        (is_kbc, "is a programmatic token, which is not supported", "make a Storage API token"),
    ):
        if is_wrong:
            return what, cure
    return None


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

    def open_all(self) -> dict[str, Secret]:
        """Return every secret that opens, by name; `problems` tells of the others."""
        entries = self.config.secrets.values()
        keys = self.fernet() if any(entry.source == "value" for entry in entries) else None
        opened = {entry.name: self._open(entry, keys) for entry in entries}
        return {name: secret for name, secret in opened.items() if secret}

    def all_known(self, secrets: Mapping[str, Secret]) -> Iterator[tuple[str, Secret]]:
        """Yield what must be shown nowhere: values, keys, and the paths of webhooks' addresses."""
        yield from secrets.items()
        yield from ((KEY_VARIABLE, key) for key in self.keys)
        for name in self.config.of_type("webhook"):
            parts = urllib.parse.urlsplit(secrets[name].reveal() if name in secrets else "")
            target = parts._replace(scheme="", netloc="").geturl()
            secret_parts = (("target", target), ("path", parts.path))
            yield from ((f"{name} {k}", Secret(text)) for k, text in secret_parts if len(text) > 8)

    def fernet(self) -> MultiFernet | None:
        """Return the keys (the first encrypts, all decrypt) from the first place that has any."""
        where, text, problem = self._read_key()
        lines = (line.split("#")[0] for line in text.splitlines())
        keys = [key for line in lines for key in line.replace(",", " ").split()]
        if not problem:
            with contextlib.suppress(ValueError):
                fernet = MultiFernet([Fernet(key) for key in keys])
                self.keys = [Secret(key) for key in keys]
                return fernet
            what = f"{where} holds {'something other than Fernet keys' if keys else 'no key'}"
            problem = (what, f"make one: {MAKE_KEY}")
        place = (str(self.config.path), self.config.key_line, self.config.key_column, "key_file")
        self.problems.append(Problem(*place, *problem))
        return None

    def _read_key(self) -> tuple[str, str, tuple[str, str] | None]:
        """Return where the keys come from, their text, and what is in the way, with its cure."""
        if text := self._env.get(KEY_VARIABLE, "").strip():
            return f"${KEY_VARIABLE}", text, None
        path, directory = self.config.key_path, self._env.get("CREDENTIALS_DIRECTORY")
        read, mode = self._files.read(path), self._files.read(path).mode
        if directory:
            credential = Path(directory, "teckochecker.key")
            found = self._files.read(credential)
            if not isinstance(found.error, FileNotFoundError):
                path, read, mode = credential, found, 0  # its mode is the service manager's matter
        if read.error:
            cure = f"put a Fernet key there ({MAKE_KEY}) or set ${KEY_VARIABLE}"
            if read.error.errno == errno.EACCES:
                cure = "run this as the key's owner, or as root"
            return "", "", (f"cannot read the key file {path}: {read.error.strerror}", cure)
        if mode & stat.S_IRWXO:
            what = f"{path} can be read by others (mode {mode:04o})"
            return "", "", (what, f"run: chmod 600 {path}")
        if mode & stat.S_IRWXG:
            self.warnings.append(f"{path} can be read by its group; better: chmod 600 {path}")
        return str(path), read.data.decode("ascii", "replace"), None

    def _open(self, entry: SecretEntry, keys: MultiFernet | None) -> Secret | None:
        """Return a secret, or None and a problem."""
        text, value = entry.text.reveal(), None
        what, cure = "the environment has no such variable", "set it, or correct the name"
        if entry.source == "env":
            value = self._env.get(text)
        elif entry.source == "file":
            read = self._files.read(self.config.path.parent / text)
            what = f"cannot read the file: {read.error.strerror if read.error else ''}"
            cure = "correct the path or its permissions"
            value = None if read.error else read.data[:100_000].decode("utf-8", "replace")
        elif keys is None:
            return None  # noted already, where the key was looked for
        else:
            value, what = decrypted(keys, text), "is not encrypted"
            cure = f"run: teckochecker --config {self.config.path} encrypt"
            if looks_encrypted(text):
                what = "is encrypted with another key"
                cure = f"bring that key back, or write the token in plain and {cure}"
        if value is not None:
            problem = token_problem(value.strip(), entry.type)
            if problem is None:
                return Secret(value.strip())
            what, cure = f"the secret {problem[0]}", problem[1]
        place = (entry.line, entry.column, f"secrets.{entry.name}.{entry.source}")
        self.problems.append(Problem(str(self.config.path), *place, what, cure))
        return None


def read_config_file(path: Path, files: Files) -> tuple[Config, list[Problem], str]:
    """Return what the file says so far as it can be read, what is wrong with it, and its text."""
    read, place = files.read(path), (1, 1)
    what, cure = "is over 16 MiB", "a config is smaller: check the path"
    if read.error:
        what = f"cannot be read: {read.error.strerror}"
        cure = "check the path, pass --config PATH, or run `teckochecker init` for a first one"
        if read.error.errno == errno.EACCES:
            cure = "let this user read it; with all secrets encrypted, chmod 644 is safe"
    elif len(read.data) <= MAX_FILE_BYTES:
        try:
            text = read.data.decode()
            return *parse_config(text, path), text
        except UnicodeDecodeError as error:
            before = read.data[: error.start].decode().split("\n")
            place = (len(before), len(before[-1]) + 1)
            what, cure = "is not UTF-8 text", "save it as UTF-8"
    config = Config(path, "", path.parent / "teckochecker.db", path.parent / "teckochecker.key")
    return config, [Problem(str(path), *place, "", what, cure)], ""


def open_config(
    path: Path, files: Files, env: Mapping[str, str], redactor: Redactor, text: str | None = None
) -> tuple[LoadedConfig, list[Problem]]:
    """Return the config and its secrets so far as they open, and every problem, without secrets.

    `text` takes the place of what the file says. `redactor` learns what must be shown nowhere.
    """
    if text is None:
        config, problems, text = read_config_file(path, files)
    else:
        config, problems = parse_config(text, path)
    opener = SecretOpener(config, files, env)
    secrets = opener.open_all()
    redactor.learn(opener.all_known(secrets))
    loaded = LoadedConfig(config, secrets, text, (*opener.warnings, *mount_warning(path)))
    return loaded, [
        Problem(p.file, p.line, p.column, *map(redactor.text, (p.path, p.what, p.cure)))
        for p in problems + opener.problems  # not cut yet: half of a token would not be known
    ]


def load_config(
    path: Path, files: Files, env: Mapping[str, str], redactor: Redactor, text: str | None = None
) -> LoadedConfig:
    """Return a config that is fine: the one way in for start, reload and `check`.

    Raises ConfigError with every problem of the file, the key and the secrets.
    """
    loaded, problems = open_config(path, files, env, redactor, text)
    if problems:
        raise ConfigError(problems)
    return loaded


def mount_warning(path: Path) -> Iterator[str]:
    """Warn of a config that is a mount point of its own: nobody can replace it."""
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        target = re.sub(r"[ \t\n\\]", lambda m: f"\\{ord(m[0]):03o}", str(path.resolve()))
        if any(line.split(" ")[4:5] == [target] for line in mounts.splitlines()):
            yield f"{path} is a mount of its own: its changes are not seen; mount its directory"
