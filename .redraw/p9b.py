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
    # Bare: a letter or digit first, then nothing that YAML could take for punctuation.
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

    def set(self, path: tuple[str, ...], value: object, after: str = "") -> None:
        """Replace a value, or add it behind the key `after` or as the last one."""
        parent = self.find(path[:-1])
        place = self._place(parent, path[-1])
        if place is None:
            return self.add(path, value, after)
        start, end = self._span(parent, place)
        source = yaml_text(value, quote=path[-1] in QUOTED_KEYS)
        new = self._respelled(self._text[start:end], source)
        return self._apply([(start, end, new)], self._meant(path, value))

    def replace(self, values: Iterable[tuple[yaml.Node, str]]) -> None:
        """Replace the text of scalars, also for those that read them through an alias."""
        splices, texts = [], {}
        for node, text in values:
            start, end = node.start_mark.index, node.end_mark.index
            splices.append((start, end, self._respelled(self._text[start:end], yaml_text(text))))
            texts[id(node)] = text
        self._apply(splices, self._plain(self.tree.node, texts))

    def add(self, path: tuple[str, ...], value: object, after: str = "") -> None:
        """Add a key with its value in the style of those beside it; makes a missing section."""
        parent = self.find(path[:-1])
        if parent is None:
            return self.add(path[:-1], {path[-1]: value})
        pair = yaml_text({path[-1]: value})[1:-1]
        if not isinstance(parent, yaml.MappingNode) and parent.tag != f"{_TAG}null":
            raise UsageError(f"{'.'.join(path[:-1])} is not a mapping", "write keys and values")
        if not isinstance(parent, yaml.MappingNode) or not parent.value:
            return self._apply(self._first(path, value, pair), self._meant(path, value))
        place = self._place(parent, after)
        place = len(parent.value) - 1 if place is None else place
        key, (_, end) = parent.value[place][0].start_mark, self._span(parent, place)
        if parent.flow_style:
            is_alone = self._begins_line(key.index) and not self._matched(r"[^\r\n]*#", end)
            space = f"{self._line_end(end)}{' ' * key.column}" if is_alone else " "
            splice = (end, end, f",{space}{pair}")
        else:
            is_apart = place and len(path) < 3 and self._is_apart(key.index)
            gap = [""] if is_apart and self._text[end - 1] not in "\r\n" else []
            splice = self._below(end, key.column, gap + self._lines(path, value, key.column))
        return self._apply([splice], self._meant(path, value))

    def remove(self, path: tuple[str, ...]) -> None:
        """Remove a key with its value and the comments inside; an emptied section becomes {}."""
        parent, text = self.find(path[:-1]), self._text
        place = self._place(parent, path[-1])
        if place is None:
            raise UsageError(f"{self.path} has no {'.'.join(path)}", "nothing is changed")
        key, (_, end) = parent.value[place][0].start_mark, self._span(parent, place)
        start = key.index
        if parent.flow_style:
            comma, before = self._matched(r"\s*,[ \t]*", end), text[:start].rstrip()
            start = len(before) - 1 if before.endswith(",") and not comma else start
            end += len(comma)
        below = self._below(end, key.column, [])[0]
        ends_line = below == len(text) or re.search(r"[\r\n]", text[below - 1 : below + 1])
        if self._begins_line(start) and ends_line:
            start = len(text[:start].rstrip(" \t"))
            end = below + len(self._matched(r"\r\n?|\n", below))
            blank = re.search(
                r"(?>\r\n?|\n)([ \t]*(?>\r\n?|\n))\Z", text[max(0, start - 99) : start]
            )
            if blank and re.match(r"[ \t]*(?:[\r\n]|\Z)", text[end:]):
                start -= len(blank[1])  # of the blank lines around it, one is enough
        splices = [(start, end, "")]
        outer = self.find(path[:-2])
        if outer and len(parent.value) == 1 and not parent.flow_style:
            colon = outer.value[self._place(outer, path[-2])][0].end_mark.index
            colon += len(self._matched(r"\s*:(?:[ \t]+[&!]\S+)*", colon))
            splices.append((colon, colon, " {}"))
        return self._apply(splices, self._meant(path, None))

    # --- the text and what it means ---

    def _read(self, text: str) -> None:
        problems: list[Problem] = []
        tree = compose(text, self.path, problems)
        if tree is None:
            raise ConfigError(problems)
        self._text, self.tree = text, tree
        self._ends = []  # of scalars, aliases and braces: a block ends where the last of them does
        event: Any
        for event in yaml.parse(text, Loader=_LOADER):
            start, end = event.start_mark.index, event.end_mark.index
            source = text[start:end]
            if isinstance(event, yaml.ScalarEvent | yaml.AliasEvent) or source in {"]", "}"}:
                is_block = getattr(event, "style", None) in {"|", ">"}
                if is_block and not re.match(r"[^\r\n#]*\+", source):
                    end = start + len(source.rstrip(" \t\r\n"))
                self._ends.append(end)

    def _apply(self, splices: Iterable[tuple[int, int, str]], meant: object) -> None:
        """Change the text, if it then reads as `meant`."""
        before = text = self._text
        for start, end, new in sorted(splices, reverse=True):
            text = text[:start] + new + text[end:]
        with contextlib.suppress(ConfigError):
            self._read(text)
            if self._plain(self.tree.node, {}) == meant:
                return
        self._read(before)
        what = "an anchor, an alias or an unusual layout is in the way"
        raise TeckoError(f"cannot change {self.path}: {what}", "change it by hand, in an editor")

    def _plain(self, node: Any, texts: Mapping[int, str]) -> Any:  # noqa: ANN401 - a tree
        """Return a tree as dicts, lists and tags with values; `texts` take the place of some."""
        if isinstance(node, yaml.MappingNode):
            merge = f"{_TAG}merge"
            return {(k.tag == merge, str(k.value)): self._plain(v, texts) for k, v in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, texts) for item in node.value]
        return (f"{_TAG}str", texts[id(node)]) if id(node) in texts else (node.tag, node.value)

    def _meant(self, path: tuple[str, ...], value: object) -> object:
        """Return the tree with a value at a path, or (None) without what is there."""
        meant = inner = self._plain(self.tree.node, {})
        for name in path[:-1]:
            if not isinstance(inner.get((False, name)), dict):
                inner[False, name] = {}
            inner = inner[False, name]
        if value is None:
            del inner[False, path[-1]]
        else:
            node = yaml.compose(yaml_text(value), Loader=_LOADER)
            inner[False, path[-1]] = self._plain(node, {})
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
        after: Any = parent.end_mark
        limit = after.index - bool(parent.flow_style)
        if place + 1 < len(parent.value):
            limit = parent.value[place + 1][0].start_mark.index
        end = max(end for end in self._ends if end <= limit)
        start = value.start_mark.index
        if start < key.end_mark.index:  # an alias: its node stands where the anchor is
            start = self._text.rindex("*", key.end_mark.index, end)
        return start, end

    # --- how it is written ---

    def _matched(self, pattern: str, at: int) -> str:
        match = re.compile(pattern).match(self._text, at)
        return match[0] if match else ""

    def _line_end(self, at: int) -> str:
        ends = re.compile(r"\r\n?|\n")
        found = ends.search(self._text, at) or ends.search(self._text)
        return found[0] if found else "\n"

    def _begins_line(self, at: int) -> bool:
        return not self._text[:at].rstrip(" \t").rpartition("\n")[2].rpartition("\r")[2]

    def _is_apart(self, start: int) -> bool:
        """Return whether a blank line stands before an entry and the comments above it."""
        above = f"{self._text[:start]}.".splitlines()[:-1]
        while above and above[-1].lstrip().startswith("#"):
            above.pop()
        return bool(above) and not above[-1].strip()

    @staticmethod
    def _respelled(old: str, new: str) -> str:
        """Return a value's source with another value in it.

        An anchor or tag before it stays, a comment behind a block's `|`, and what ends the block.
        """
        if not old:
            return f" {new}"
        before = re.match(r"(?:[&!]\S*\s+|#[^\r\n]*\s+)*", old)
        prefix = before[0] if before else ""
        block = re.match(r"[|>][^\r\n#]*(#[^\r\n]*)", old[len(prefix) :])
        comment = f"  {block[1].rstrip()}" if block else ""
        return f"{prefix}{new}{comment}{old[len(old.rstrip()) :]}"

    def _lines(self, path: tuple[str, ...], value: object, column: int) -> list[str]:
        """Return a key and its value in block style; inside an entry, what is short in one line."""
        quote = path[-1] in QUOTED_KEYS
        head = f"{' ' * column}{yaml_text(path[-1])}:"
        line = f"{head} {yaml_text(value, quote=quote)}"
        column += self._step(path[0])
        if value and isinstance(value, Mapping) and (len(path) < 3 or len(line) > 100):
            inner = [self._lines((*path, key), item, column) for key, item in value.items()]
            return [head, *itertools.chain.from_iterable(inner)]
        if isinstance(value, list) and len(line) > 100:
            return [head, *(f"{' ' * column}- {yaml_text(item, quote=quote)}" for item in value)]
        return [line]

    def _step(self, section: str) -> int:
        """Return by how much this section indents, or else another one."""
        for key, value in sorted(self.tree.node.value, key=lambda pair: pair[0].value != section):
            if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
                step = int(value.value[0][0].start_mark.column - key.start_mark.column)
                if step > 0:  # else it is an alias
                    return step
        return 2

    def _below(self, end: int, column: int, lines: Sequence[str]) -> tuple[int, int, str]:
        """Return the splice that puts lines below a value and the comments that belong to it.

        Those are the one behind it, and those below that are indented deeper than `column`.
        """
        new_line = self._line_end(end)
        if self._text[:end].endswith(("\r", "\n")):  # a block that keeps its line ends, `|+`
            return end, end, new_line.join([*lines, ""])
        deeper = rf"(?:(?:\r\n?|\n)[ \t]{{{column + 1},}}#[^\r\n]*)*"
        place = end + len(self._matched(rf"[ \t]*(?:#[^\r\n]*)?{deeper}", end))
        return place, place, "".join(f"{new_line}{line}" for line in lines)

    def _first(self, path: tuple[str, ...], value: object, pair: str) -> list[tuple[int, int, str]]:
        """Return the splices that put the first key into what is empty: `{}`, or null."""
        root: Any = self.tree.node
        end = root.end_mark.index
        if len(path) == 1:  # the whole file is {}
            return [(end - 1, end - 1, pair)]
        outer = [self.find(path[:length]) for length in range(len(path) - 1)]
        place = self._place(outer[-1], path[-2]) or 0
        key, (start, end) = outer[-1].value[place][0].start_mark, self._span(outer[-1], place)
        old = self._text[start:end]
        in_braces = any(node.flow_style for node in outer)
        if old.endswith("}") and (in_braces or "#" in old):
            return [(end - 1, end - 1, pair)]
        if in_braces:
            return [(start, end, self._respelled(old, f"{{{pair}}}"))]
        lines = self._lines(path, value, key.column + self._step(path[0]))
        anchor = "".join(re.findall(r"^(?:[&!]\S+\s*)*", old)).rstrip()
        start = len(self._text[:start].rstrip(" \t"))
        return [(start, end, anchor and f" {anchor}"), self._below(end, key.column, lines)]


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
                if (os.fstat(fd).st_uid, os.fstat(fd).st_gid) != (before.st_uid, before.st_gid):
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


def edit_config(
    path: Path, change: Callable[[ConfigEditor, Config], str], *, dry_run: bool = False
) -> str:
    """Change the config file; returns what `change` says that it did.

    Problems that are there already do not matter. Raises UsageError for the first new one, and
    TeckoError if the file cannot be replaced: then it stays as it is. `dry_run` writes nothing.
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
            if not dry_run:
                replace_file(path, files.read(path).data, editor.text.encode())
    return done


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
    """Encrypt all plain values; that of an alias and of its anchor stays one."""
    tokens: dict[int, tuple[yaml.Node, str]] = {}
    names, problems = [], []
    for name, entry in section(editor.tree, "secrets").items():
        own = entry.entries("")
        at = own.get("value")
        text = at.text("") if at and not at.is_null else None
        if at is None or text is None:
            continue
        if id(at.node) not in tokens:
            kind = own["type"].text("") if "type" in own else None
            token = encrypted(config, text, kind or "", rotate=rotate)
            if isinstance(token, tuple):
                at.bad(*token)
                problems.append(at.problems[-1])
                continue
            tokens[id(at.node)] = (at.node, token)
        if tokens[id(at.node)][1] != text:
            names.append(name)
    if problems:
        raise ConfigError(problems)
    editor.replace((node, token) for node, token in tokens.values() if token != node.value)
    return f"encrypted: {', '.join(names)}" if names else "nothing to do: no value is in plain"


def run_encrypt(args: argparse.Namespace) -> int:
    """Encrypt the plain values of the config, in place; or a new value for one secret."""
    if args.set is not None:
        return set_secret(config_path(args), args.set, None, {})
    print(edit_config(config_path(args), functools.partial(encrypt_values, rotate=args.rotate)))
    return 0


def typed_text(name: str) -> str:
    """Return what a person types, unseen, or what comes over standard input."""
    if sys.stdin is None:  # closed by whoever started us
        return ""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            return getpass.getpass(f"{name}: ").strip()
        return ""
    return sys.stdin.buffer.read(70_000).decode("utf-8", "replace").strip()


def set_secret(path: Path, name: str, kind: str | None, urls: Mapping[str, str | None]) -> int:
    """Ask for a secret's value and put it into the config; makes the entry if it is missing."""
    types = " or ".join(SECRET_KEYS)

    def change(editor: ConfigEditor, config: Config, typed: str) -> str:
        entry = section(editor.tree, "secrets").get(name)
        own = entry.entries("") if entry else {}
        old_kind = own["type"].text("") if "type" in own else None
        wanted = kind or old_kind or ""
        for source in own.keys() & {"env", "file"}:
            cure = f"remove {source}: from the config first"
            raise UsageError(f"the secret {name} comes from {source}:", cure)
        if not wanted:
            raise UsageError(
                f"{path} has no secret {quoted(name)} with a type", f"add --type {types}"
            )
        if old_kind not in {None, wanted}:
            cure = "leave --type out, or remove the secret first"
            raise UsageError(f"the secret {name} is of another type, {old_kind}", cure)
        if wanted not in SECRET_KEYS:
            raise UsageError(f"{quoted(wanted)} is not a type of secret", f"write {types}")
        token = encrypted(config, typed, wanted)
        if isinstance(token, tuple):
            what, cure = token
            raise UsageError(f"what was given for {name} {what}", f"nothing is changed: {cure}")
        values = {"type": wanted, "value": token, **given(urls)}
        if entry is None:
            editor.add(("secrets", name), values)
            return f"encrypted: {name}"
        for key, value in values.items():
            if key not in own or key != "type":
                editor.set(("secrets", name, key), value, after="type")
        return f"encrypted: {name}"

    # All else is checked before a person is asked, with what could be a value of any type.
    trial = functools.partial(change, typed="https://example.com/a")
    edit_config(path, trial, dry_run=True)
    print(edit_config(path, functools.partial(change, typed=typed_text(name))))
    return 0


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


def secret_lines(editor: ConfigEditor, config: Config) -> list[str]:
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
    return table(rows) if len(rows) > 1 else ["no secrets"]


def run_secret(args: argparse.Namespace) -> int:
    """List, set or remove secrets in the config."""
    path = config_path(args)

    def remove(editor: ConfigEditor, _: Config) -> str:
        users = secret_users(editor.tree).get(args.name)
        if editor.find(("secrets", args.name)) is None:
            cure = "`teckochecker secret list` lists them all"
            raise UsageError(f"there is no secret {quoted(args.name)}", cure)
        if users:
            using = one_line(", ".join(users))
            raise UsageError(f"the secret {args.name} is used by {using}", "change that first")
        editor.remove(("secrets", args.name))
        return f"removed: {args.name}"

    if args.action == "set":
        urls = {"stack_url": args.stack_url, "base_url": args.base_url}
        return set_secret(path, args.name, args.type, urls)
    if args.action == "remove":
        print(edit_config(path, remove))
        return 0
    config, problems, text = read_config_file(path, Files())
    if not config.sha256:
        raise ConfigError(problems)
    print("\n".join(secret_lines(ConfigEditor(text, path), config)))
    return 0


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
    """Add, pause, resume or remove a job in the config."""
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

    print(edit_config(config_path(args), change))
    return 0
