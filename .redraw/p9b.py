# --- editing the config ---------------------------------------------------------------------------

QUOTED_KEYS: Final = ("config_id", "branch_id", "config_row_ids")  # a bare 0123 would be a number


def yaml_text(value: object, *, quote: bool = False) -> str:
    """Return a value in YAML's flow style, in quotes where text would be read as another type.

    Raises UsageError for what no YAML file can hold.
    """
    if isinstance(value, Mapping):
        items = ((k, yaml_text(v, quote=k in QUOTED_KEYS)) for k, v in value.items())
        return f"{{{', '.join(f'{yaml_text(key)}: {text}' for key, text in items)}}}"
    if isinstance(value, list):
        return f"[{', '.join(yaml_text(item, quote=quote) for item in value)}]"
    if not isinstance(value, str):
        return str(value).lower()  # a number, true, false
    if re.search("[\ud800-\udfff]", value):
        raise UsageError(f"{quoted(value)} is not UTF-8 text", "nothing is changed")
    is_bare = not quote and re.fullmatch(r"\w(?:[\w ./+=@-]|:(?=[\w/]))*(?<! )", value)
    node: Any = yaml.compose(value, Loader=_LOADER) if is_bare else None
    if node and node.tag == f"{_TAG}str":
        return value
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


class ConfigEditor:
    """A config's text, changed at the marks of its YAML nodes; all else keeps every byte.

    A path is a tuple of keys: ("jobs", "nightly", "paused"). A change that would not read back as
    it is meant raises TeckoError, and the text stays.
    """

    def __init__(self, text: str, path: Path = Path("config.yaml")) -> None:
        self.path = path
        self._byte_order_mark = "\ufeff" if text.startswith("\ufeff") else ""
        self._line_end = "\r\n" if "\r\n" in text else "\n"
        self._read(text.removeprefix("\ufeff"))

    @property
    def text(self) -> str:
        return self._byte_order_mark + self._text

    def find(self, path: tuple[str, ...]) -> Any:  # noqa: ANN401 - a node, or None
        """Return what stands at a path, by keys of its own (`<<` brings others)."""
        node: Any = self.tree.node
        for name in path:
            place = self._place(node, name)
            if place is None:
                return None
            node = node.value[place][1]
        return node

    def set(self, path: tuple[str, ...], value: object) -> None:
        """Replace a value, or add it as the last one."""
        parent = self.find(path[:-1])
        place = self._place(parent, path[-1])
        if place is None:
            return self.add(path, value)
        start, end = self._span(parent, place)
        new, old = yaml_text(value, quote=path[-1] in QUOTED_KEYS), self._text[start:end]
        # An anchor or a tag before the old value stays, and a comment behind a block's `|`.
        parts = re.match(r"((?:[&!]\S*\s+)*)(?:[|>][-+\d]*([ \t]+#[^\r\n]*)?)?", old)
        before, comment = parts.groups("") if parts and old else (" ", "")
        return self._apply([(start, end, f"{before}{new}{comment}")], self._meant(path, value))

    def add(self, path: tuple[str, ...], value: object) -> None:
        """Add a key with its value below those beside it; makes a missing section."""
        parent, meant = self.find(path[:-1]), self._meant(path, value)
        if parent is None:
            return self.add(path[:-1], {path[-1]: value})
        pair = yaml_text({path[-1]: value})[1:-1]
        if not parent.value or not isinstance(parent, yaml.MappingNode):
            return self._apply(self._first(path, value, pair), meant)
        column, end = parent.value[-1][0].start_mark.column, self._span(parent, -1)[1]
        if parent.flow_style:
            return self._apply([(end, end, f", {pair}")], meant)
        below = self._below(end, column)
        return self._apply([(below, below, self._lines(path, value, column))], meant)

    def remove(self, path: tuple[str, ...]) -> None:
        """Remove a key with its value and the comments inside; an emptied section becomes {}."""
        parent, text = self.find(path[:-1]), self._text
        place = self._place(parent, path[-1])
        if place is None:
            raise UsageError(f"{self.path} has no {'.'.join(path)}", "nothing is changed")
        key, (_, end) = parent.value[place][0].start_mark, self._span(parent, place)
        start, splices = key.index, []
        if not parent.flow_style:
            start -= key.column
            end = self._below(end, key.column)
            end += len(self._line_end) if text.startswith(self._line_end, end) else 0
            if len(parent.value) == 1:
                outer = self.find(path[:-2])
                section = outer.value[self._place(outer, path[-2])][0]
                colon = text.find(":", section.end_mark.index) + 1
                splices.append((colon, colon, " {}"))
        elif len(parent.value) > 1:  # with the comma before it, or behind the first one
            cut = (self._span(parent, place - 1)[1], start)
            if place == 0:
                cut = (end, parent.value[1][0].start_mark.index)
            self._refuse_if("#" in text[slice(*cut)])
            start, end = min(start, cut[0]), max(end, cut[1])
        return self._apply([(start, end, ""), *splices], self._meant(path, None))

    # --- the text and what it means ---

    def _read(self, text: str) -> None:
        problems: list[Problem] = []
        tree = compose(text, self.path, problems)
        if tree is None:
            raise ConfigError(problems)
        self._text, self.tree = text, tree
        # A block has no end of its own: it ends where the last token in it does.
        tokens = [t for t in yaml.scan(text, Loader=_LOADER) if type(t) is not yaml.FlowEntryToken]
        spans = [(token.start_mark.index, token.end_mark.index) for token in tokens]
        self._ends = [start + len(text[start:end].rstrip()) for start, end in spans if start < end]

    def _refuse_if(self, condition: bool) -> None:  # noqa: FBT001 - it says it
        if condition:
            what = f"cannot change {self.path}: this layout cannot be edited"
            raise TeckoError(what, "edit it by hand")

    def _apply(self, splices: Iterable[tuple[int, int, str]], meant: object) -> None:
        """Change the text, if it then reads as `meant`."""
        before = text = self._text
        for start, end, new in sorted(splices, reverse=True):
            text = text[:start] + new + text[end:]
        with contextlib.suppress(ConfigError):
            self._read(text)
            if self._plain(self.tree.node) == meant:
                return
        self._read(before)
        self._refuse_if(condition=True)

    def _plain(self, node: Any) -> Any:  # noqa: ANN401 - a tree
        """Return a tree as dicts, lists and tags with values."""
        if isinstance(node, yaml.MappingNode):
            return {(k.tag == f"{_TAG}merge", str(k.value)): self._plain(v) for k, v in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item) for item in node.value]
        return node.tag, node.value

    def _meant(self, path: tuple[str, ...], value: object) -> object:
        """Return what the text should say with another value at a path, or None for no value."""
        meant = inner = self._plain(self.tree.node)
        for name in path[:-1]:
            if not isinstance(inner.get((False, name)), dict):
                inner[False, name] = {}
            inner = inner[False, name]
        if value is None:
            del inner[False, path[-1]]
        else:
            inner[False, path[-1]] = self._plain(yaml.compose(yaml_text(value), Loader=_LOADER))
        return meant

    def _place(self, node: object, name: str) -> int | None:
        """Return which entry of a mapping has this key. Raises UsageError for two of them."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = [key.value if key.tag != f"{_TAG}merge" else None for key, _ in pairs]
        if keys.count(name) > 1:
            raise UsageError(f"{self.path} has the key {quoted(name)} twice", "keep one of them")
        return keys.index(name) if name in keys else None

    def _span(self, parent: yaml.MappingNode, place: int) -> tuple[int, int]:
        """Return where an entry's value begins and ends."""
        key, value = parent.value[place]
        following = [key.start_mark.index for key, _ in parent.value[place:][1:]]
        after: Any = parent.end_mark
        limit = following[0] if following else after.index - bool(parent.flow_style)
        start, end = value.start_mark.index, max(end for end in self._ends if end <= limit)
        if start < key.end_mark.index:  # an alias: its node stands where the anchor is
            start = self._text.rindex("*", key.end_mark.index, end)
        return start, end

    # --- how it is written ---

    def _lines(self, path: tuple[str, ...], value: object, column: int) -> str:
        """Return lines to put behind a line: a key and its value, in block style."""
        head = f"{self._line_end}{' ' * column}{yaml_text(path[-1])}:"
        if value and isinstance(value, Mapping) and len(path) < 3:
            column += column or 2
            inner = (self._lines((*path, key), item, column) for key, item in value.items())
            return f"{head}{''.join(inner)}"
        return f"{head} {yaml_text(value, quote=path[-1] in QUOTED_KEYS)}"

    def _below(self, end: int, column: int) -> int:
        """Return where the comments end that belong to a value: behind it, and deeper below."""
        comments = rf"[ \t]*(?:#[^\r\n]*)?(?:\r?\n[ \t]{{{column + 1},}}#[^\r\n]*)*"
        found = re.compile(comments).match(self._text, end)
        return found.end() if found else end

    def _first(self, path: tuple[str, ...], value: object, pair: str) -> list[tuple[int, int, str]]:
        """Return the splices that put the first key into what is empty: `{}`, or null."""
        outer = self.find(path[:-2]) if path[1:] else None
        if outer is None:  # the whole file is {}
            end = self.find(()).end_mark.index
            return [(end - 1, end - 1, pair)]
        place = self._place(outer, path[-2]) or 0
        column, (start, end) = outer.value[place][0].start_mark.column, self._span(outer, place)
        old = self._text[start:end]
        if old.endswith("}") and (outer.flow_style or old != "{}"):
            return [(end - 1, end - 1, pair)]
        self._refuse_if(outer.flow_style or old not in {"", "{}", "~", "null"})
        below = self._below(end, column)
        start = len(self._text[:start].rstrip(" \t"))
        return [(start, end, ""), (below, below, self._lines(path, value, column + (column or 2)))]


# --- the config file ------------------------------------------------------------------------------


@contextlib.contextmanager
def editors_lock(path: Path) -> Iterator[None]:
    """Keep other editors out of a config's directory. Raises TeckoError after ten seconds.

    Where there are no locks, `replace_file` still notices what another one has changed.
    """
    patience = time.monotonic() + 10
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: links in a circle
            fd = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > patience:
                        what = f"another command has been changing {path} for ten seconds"
                        raise TeckoError(what, "run this one again") from None
                    time.sleep(0.02)
        yield


def replace_file(path: Path, old: bytes, new: bytes) -> None:
    """Replace a file's content as a whole or not at all; mode, owner and links to it stay.

    Raises TeckoError if someone else has written it meanwhile, or it cannot be done.
    """
    real = path.resolve()
    with contextlib.ExitStack() as stack:
        try:
            fd, temporary = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name[:40]}.")
            stack.callback(Path(temporary).unlink, missing_ok=True)
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
                before = real.stat()
                file.write(new)
                file.flush()
                os.fchown(fd, before.st_uid, before.st_gid)
                os.fchmod(fd, stat.S_IMODE(before.st_mode))
                os.fsync(fd)
            if real.read_bytes() != old:
                raise TeckoError(f"{path} was changed meanwhile", "run the command again")
            Path(temporary).replace(real)
        except OSError as error:
            hint = "run this as the file's owner, with room on the disk"
            if error.errno == errno.EBUSY and any(mount_warning(path)):
                hint = "it is a mount of its own: mount its directory instead"
            raise TeckoError(f"cannot replace {path}: {error.strerror}", hint) from None


def edit_config(path: Path, change: Callable[[ConfigEditor, Config], str]) -> int:
    """Change the config file, and print what `change` says that it did; returns 0.

    Problems that are there already do not matter. Raises UsageError for the first new one, and
    TeckoError if the file cannot be replaced: then it stays as it is.
    """

    def problems_in(text: str) -> list[tuple[str, Problem]]:
        try:
            load_config(path, files, os.environ, Redactor(), text)
        except ConfigError as error:
            return [(re.sub("line [0-9]+", "", f"{p.path}: {p.what}"), p) for p in error.problems]
        return []

    with editors_lock(path):
        files = Files()
        config, problems, text = read_config_file(path, files)
        if not config.sha256:
            raise ConfigError(problems)
        editor = ConfigEditor(text, path)
        done = change(editor, config)
        if editor.text != text:
            known = collections.Counter(key for key, _ in problems_in(text))
            for key, problem in problems_in(editor.text):
                known[key] -= 1
                if known[key] < 0:
                    what = f"{problem.path}: {problem.what}" if problem.path else problem.what
                    raise UsageError(one_line(what, 1000), problem.cure)
            replace_file(path, files.read(path).data, editor.text.encode())
    print(done)
    return 0


# --- encrypt, secret ------------------------------------------------------------------------------


def encrypted(
    config: Config, text: str, kind: str, *, rotate: bool = False
) -> str | tuple[str, str]:
    """Return a secret's value as a token, or what is wrong with it and the cure.

    Raises ConfigError where there is no key.
    """
    opener = SecretOpener(config, Files(), os.environ)
    keys = opener.fernet()
    if keys is None:
        raise ConfigError(opener.problems)
    opened = decrypted(keys, text)
    if opened is None and looks_encrypted(text):
        return "is encrypted with another key", "add that key after the first one"
    problem = token_problem(text if opened is None else opened, kind)
    if problem:
        return problem
    if opened is None:
        return keys.encrypt(text.encode()).decode()
    return keys.rotate(text.encode()).decode() if rotate else text


def section(tree: YamlNode, name: str) -> dict[str, YamlNode]:
    """Return the entries of a section; what is wrong there is no business of an editor."""
    found = tree.entries("").get(name)
    return found.entries("") if found else {}


def encrypt_values(editor: ConfigEditor, config: Config, *, rotate: bool) -> str:
    tokens, problems = {}, []
    for name, entry in section(editor.tree, "secrets").items():
        own = entry.entries("")
        at, kind = own.get("value"), own["type"].text("") if "type" in own else None
        text = at.text("") if at and not at.is_null else None
        if at is None or text is None:
            continue
        token = encrypted(config, text, kind or "", rotate=rotate)
        if isinstance(token, tuple):
            at.bad(*token)
            problems.append(at.problems[-1])
        elif token != text:
            tokens[name] = token
    if problems:
        raise ConfigError(problems)
    for name, token in tokens.items():
        editor.set(("secrets", name, "value"), token)
    return f"encrypted: {', '.join(tokens)}" if tokens else "nothing to do: no value is in plain"


def run_encrypt(args: argparse.Namespace) -> int:
    """Encrypt every plain value under `secrets:` in the config, in place.

    What is encrypted already stays, also when this is run again; with --rotate it is encrypted
    anew with the first key. The old key can then be removed from the key file. If one value cannot
    be encrypted, or is a placeholder, nothing is written.
    """
    return edit_config(config_path(args), functools.partial(encrypt_values, rotate=args.rotate))


def typed_text(name: str) -> str:
    """Return what a person types, unseen, or what comes over standard input."""
    if sys.stdin is None:  # closed by whoever started us
        return ""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            return getpass.getpass(f"{name}: ").strip()
        return ""
    return sys.stdin.buffer.read(70_000).decode("utf-8", "replace").strip()


def set_secret(editor: ConfigEditor, config: Config, args: argparse.Namespace) -> str:
    """Put what was typed into a secret's entry, encrypted; makes the entry if it is missing."""
    name, path = args.name, ("secrets", args.name)
    entry = section(editor.tree, "secrets").get(name)
    own = entry.entries("") if entry else {}
    old_kind = own["type"].text("") if "type" in own else None
    kind = args.type or old_kind or ""
    for source in own.keys() & {"env", "file"}:
        cure = f"remove {source}: from the config first"
        raise UsageError(f"the secret {name} comes from {source}:", cure)
    if old_kind not in {None, kind}:
        cure = "leave --type out, or remove the secret first"
        raise UsageError(f"the secret {name} is of another type, {old_kind}", cure)
    if kind not in SECRET_KEYS:
        cure = f"write --type {' or '.join(SECRET_KEYS)}"
        raise UsageError(f"the secret {name} is of no known type", cure)
    token = encrypted(config, args.value, kind)
    if isinstance(token, tuple):
        what, cure = token
        raise UsageError(f"what was given for {name} {what}", f"nothing is changed: {cure}")
    urls = given({"stack_url": args.stack_url, "base_url": args.base_url})
    if entry is None:
        editor.add(path, {"type": kind, "value": token, **urls})
    for key, value in {"type": kind, "value": token, **urls}.items():
        if entry and (key != "type" or key not in own):
            editor.set((*path, key), value)
    return f"encrypted: {name}"


def secret_users(tree: YamlNode) -> dict[str, list[str]]:
    """Return who uses each secret: jobs (also unfinished ones), `defaults` and `notify`."""
    defaults, rules = section(tree, "defaults"), tree.entries("").get("notify")
    uses = [("defaults", defaults)]
    uses += [(name, defaults | job.entries("")) for name, job in section(tree, "jobs").items()]
    uses += [("notify", rule.entries("")) for rule in (rules.items("") if rules else ())]
    users: dict[str, list[str]] = {}
    for user, keys in uses:
        for key in keys.keys() & {"openai_secret", "keboola_secret", "secret"}:
            names = users.setdefault(keys[key].text("") or "", [])
            names += [] if user in names else [user]
    return users


def list_secrets(editor: ConfigEditor, config: Config, _: argparse.Namespace) -> str:
    """Return a table of the secrets, without any value, and without what may be one by mistake."""
    users = secret_users(editor.tree)
    rows = [("SECRET", "TYPE", "FROM", "USED BY")]
    for name in section(editor.tree, "secrets"):
        secret, using = config.secrets.get(name), users.get(name, ["nobody"])
        kind, source, text = "?", "not readable: run `check`", ""
        if secret:
            kind, source, text = secret.type, secret.source, secret.text.reveal()
        if source == "value" and not looks_encrypted(text):
            source = "value, NOT ENCRYPTED: run `encrypt`"
        elif source == "file":
            source = f"file {one_line(text, 200)}"
        elif source == "env":
            is_name = re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", text)
            source = f"env {text}" if is_name else "env, but not a variable's name"
        more = f" and {len(using) - 5} more" if len(using) > 5 else ""
        rows.append((one_line(name), kind, source, one_line(", ".join(using[:5])) + more))
    return "\n".join(table(rows)) if rows[1:] else "no secrets"


def remove_secret(editor: ConfigEditor, _: Config, args: argparse.Namespace) -> str:
    if users := secret_users(editor.tree).get(args.name):
        using = one_line(", ".join(users))
        raise UsageError(f"the secret {args.name} is used by {using}", "change that first")
    editor.remove(("secrets", args.name))
    return f"removed: {args.name}"


def run_secret(args: argparse.Namespace) -> int:
    """List the secrets of the config, set one, or remove one.

    `set` asks for the value without showing it, or reads it from standard input, encrypts it, and
    writes it into the config; a secret that is not there yet needs --type, and one of type keboola
    also --stack-url. `remove` is refused while anything uses the secret. `list` shows types,
    sources and users, and never a value.
    """
    change = {"list": list_secrets, "set": set_secret, "remove": remove_secret}[args.action]
    if args.action == "set":  # before the lock: a person may think for long
        args.value = typed_text(args.name)
    return edit_config(config_path(args), lambda editor, config: change(editor, config, args))


# --- job ------------------------------------------------------------------------------------------


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each key that a job can have."""
    for key, reader in JOB_KEYS.items():
        option, how = f"--{key.replace('_', '-')}", {"metavar": "TEXT"}
        if reader is YamlNode.boolean:
            parser.add_argument(option, dest=key, action=argparse.BooleanOptionalAction)
            continue
        if key in {"match", "variables"} or key.endswith("_ids"):
            metavar = "ID" if key.endswith("_ids") else "KEY=VALUE"
            how = {"metavar": metavar, "action": "append", "help": "can be repeated"}
            option = option.removesuffix("s")
        parser.add_argument(option, dest=key, **how)  # type: ignore[arg-type]


def job_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of a job that the command line gives. Raises UsageError."""
    values = {key: getattr(args, key) for key in JOB_KEYS if getattr(args, key) is not None}
    for key in values.keys() & {"match", "variables"}:
        pairs = [text.partition("=") for text in values[key]]
        for name, equals, _ in pairs:
            if not (name and equals):
                raise UsageError(f"{quoted(name)} is not KEY=VALUE", "nothing is changed")
        values[key] = {name: value for name, _, value in pairs}
        if len(values[key]) < len(pairs):
            raise UsageError(f"a key of {key} is given twice", "keep one of them")
    numbers = {"group_size", "settle", "poll_interval", "deadline", "retry_on_error"}
    for key in values.keys() & numbers:
        if re.fullmatch("0|[1-9][0-9]{0,8}", values[key]):
            values[key] = int(values[key])  # it needs no quotes
    return values


def run_job(args: argparse.Namespace) -> int:
    """Add a job to the config, or pause, resume or remove one.

    The daemon sees the change by itself. `add` needs --batch-id or --match, and what `defaults:`
    does not say already. A paused job polls nothing and starts nothing; of a removed one, the runs
    in flight are finished. Comments and layout of the file stay as they are.
    """
    name, path = args.name, ("jobs", args.name)

    def change(editor: ConfigEditor, config: Config) -> str:
        is_there = editor.find(path) is not None
        if args.action == "add" and is_there:
            raise UsageError(f"there is a job {quoted(name)} already", "choose another name")
        if args.action != "add" and not is_there:
            cure = "`teckochecker status` lists them all"
            raise UsageError(f"there is no job {quoted(name)}", cure)
        if args.action == "add":
            editor.add(path, job_values(args))
            return f"added: {name}"
        if args.action == "remove":
            editor.remove(path)
            return f"removed: {name}"
        job, paused = config.jobs.get(name), args.action == "pause"
        if job and job.paused == paused:
            return f"nothing to do: {name} is {'paused already' if paused else 'not paused'}"
        editor.set((*path, "paused"), paused)
        return f"{'paused' if paused else 'resumed'}: {name}"

    return edit_config(config_path(args), change)
