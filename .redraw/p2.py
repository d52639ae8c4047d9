# ==================================================================================================
# 2. Config: text in, Config out; every problem with its place and its cure
# ==================================================================================================

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
MAX_DEPTH: Final = 64  # libyaml's composer recurses and takes the process down at some 30,000

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is five times faster
_TAG: Final = "tag:yaml.org,2002:"
_TAGS: Final = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
_BAD: Final = object()  # a value that has a problem, which is noted already

# What makes a value of a node: a function, or the readers of a mapping's values.
Reader = Callable[["YamlNode"], Any] | Mapping[str, Any]


@dataclass(slots=True)
class YamlNode:
    """A node of the YAML tree, and what all nodes of a file share.

    What a method returns where it notes a problem does not count.
    """

    node: yaml.Node
    key: yaml.Node  # the node itself, where it has none
    path: str
    file: str
    problems: list[Problem]
    secrets: dict[str, SecretEntry | None] = field(default_factory=dict)  # None: with a problem

    @property
    def is_null(self) -> bool:
        return bool(self.node.tag == _TAG + "null")

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    def bad(self, what: str, cure: str, at: yaml.Node | None = None) -> None:
        """Note a problem, here or at another node; returns None, for `return node.bad(...)`."""
        mark = (at or self.node).start_mark
        place = (self.file, mark.line + 1, mark.column + 1, self.path)
        self.problems.append(Problem(*place, what, cure))

    def _is(self, node_type: type[yaml.Node], kind: str, cure: str) -> bool:
        if not isinstance(self.node, node_type):
            self.bad(f"is not {kind}", cure)
        return isinstance(self.node, node_type)

    def items(self, cure: str) -> list[YamlNode]:
        nodes = enumerate(self.node.value if self._is(yaml.SequenceNode, "a list", cure) else ())
        return [replace(self, node=n, key=n, path=f"{self.path}[{i}]") for i, n in nodes]

    def entries(self, cure: str) -> dict[str, YamlNode]:
        """Return a mapping's values by key, merge keys (`<<`) resolved."""
        own: dict[str, YamlNode] = {}
        merged: dict[str, YamlNode] = {}
        for key, value in self.node.value if self._is(yaml.MappingNode, "a mapping", cure) else ():
            if key.tag == _TAG + "merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # of several, the first one wins
                    merged |= replace(self, node=source).entries("write << and a mapping")
            elif not isinstance(key, yaml.ScalarNode):
                self.bad("a key is not a single value", cure, key)
            elif key.value in own:
                line = own[key.value].key.start_mark.line + 1
                what = f"the key {self.shown(key.value)} stands here and in line {line}"
                self.bad(what, "keep one of them", key)
            else:
                path = f"{self.path}.{key.value}" if self.path else key.value
                own[key.value] = replace(self, node=value, key=key, path=path)
        return merged | own

    def read(self, nodes: Mapping[str, YamlNode], readers: Mapping[str, Reader]) -> dict[str, Any]:
        """Return what the readers make of a mapping's values: None of null, _BAD of a problem."""
        for name in nodes.keys() - readers.keys():
            what = f"the key {self.shown(name)} is not known"
            self.bad(what, f"allowed here: {', '.join(readers)}", nodes[name].key)
        values: dict[str, Any] = {}
        for name in [name for name in readers if name in nodes]:
            noted_before, node, reader = len(self.problems), nodes[name], readers[name]
            if node.is_null:
                values[name] = None
            elif isinstance(reader, Mapping):
                values[name] = node.read(node.entries("write keys and values"), reader)
            else:
                values[name] = reader(node)
            if len(self.problems) > noted_before and not isinstance(values[name], dict):
                values[name] = _BAD
        return values

    def shown(self, text: str) -> str:
        """Return what is written, for a message; what is long, or among secrets, may be a token.

        Nothing is cut: the redactor, which comes later, would not know the rest.
        """
        plain = "[a-z_]{1,30}" if self.path.startswith("secrets.") else "(?s).{,60}"
        return quoted(text) if re.fullmatch(plain, text) else '"***"'

    def text(self, cure: str) -> str | None:
        """Return a scalar's text just as written (`0123` stays so), or None."""
        if self.is_null:
            return self.bad("is empty", cure)
        is_scalar = self._is(yaml.ScalarNode, "a single value", cure)
        return str(self.node.value).strip() if is_scalar else None

    def matching(self, pattern: str, kind: str, cure: str) -> str | None:
        text = self.text(cure)
        if text is None or re.fullmatch(pattern, text):
            return text
        return self.bad(f"{self.shown(text)} is not {kind}" if text else "is empty", cure)

    def keboola_id(self) -> str | None:
        cure = "copy the id from Keboola: letters, digits, . _ and -"
        return self.matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", "an id of Keboola's", cure)

    def batch_id(self) -> str | None:
        cure = "copy the batch id: letters, digits, . _ = and -"
        return self.matching(r"[A-Za-z0-9._=-]{1,1000}", "a batch id", cure)

    def file_path(self) -> str | None:
        return self.matching(r"[^\0]+", "a path", "write a path")

    def choice(self, *choices: str) -> str | None:
        words = f"{', '.join(choices[:-1])} or {choices[-1]}"
        return self.matching("|".join(choices), "one of them", f"write {words}")

    def boolean(self) -> bool:
        text = self.matching("(?i)true|yes|on|false|no|off", "true or false", "write true or false")
        return str(text).lower() in {"true", "yes", "on"}

    def count(self, least: int, most: int) -> int:
        numbers = "|".join(map(str, range(least, most + 1)))
        kind = f"a number from {least} to {most}"
        return int(self.matching(numbers, kind, "write a whole number") or 0)

    def duration(self, least_s: int, most_s: int) -> int | None:
        text = self.text("write 30s, 2m or 1h")
        if text is None:
            return None
        seconds = parse_duration(text)
        if seconds is None:
            return self.bad(f"{self.shown(text)} is not a duration", "write 30s, 2m or 1h")
        if least_s <= seconds <= most_s:
            return seconds
        cure = f"write {show_duration(least_s)} to {show_duration(most_s)}"
        return self.bad(f"{self.shown(text)} is out of range", cure)

    def wait(self, least_s: int, most_s: int) -> int | None:
        """Return a duration; shorter ones are for tests, with every stack on a loopback address."""
        stacks = (secret.stack_url for secret in self.secrets.values() if secret)
        is_test = all(is_loopback(url) for url in stacks if url)
        return self.duration(0 if is_test else least_s, most_s)

    def secret_name(self, kind: str) -> str | None:
        names = [name for name, secret in self.secrets.items() if secret and secret.type == kind]
        cure = f"write {' or '.join(names)}" if names else "add one under secrets:"
        name = self.text(cure)
        if name is None or name in names or self.secrets.get(name, _BAD) is None:
            return name
        # Not echoed: it may be a token that stands in the wrong place.
        return self.bad(f"is not the name of a secret of type {kind}", cure)

    def plain_value(self) -> object:
        """Return a node as a JSON value; what is no JSON number stays the text that was written."""
        cure = "write what JSON knows: text, numbers, lists, and mappings with plain keys"
        if isinstance(self.node, yaml.SequenceNode):
            return [item.plain_value() for item in self.items(cure)]
        if self.is_mapping:
            return {key: item.plain_value() for key, item in self.entries(cure).items()}
        if self.node.tag == _TAG + "bool":
            return self.boolean()
        text = None if self.is_null else self.text(cure)
        is_number = re.fullmatch(r"-?(0|[1-9]\d{0,15})(\.\d+)?", text or "")
        return json.loads(text or "") if is_number and self.node.tag != _TAG + "str" else text


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are there and good; the model has a default for the others."""
    return {key: v for key, v in values.items() if v is not None and v is not _BAD}


def is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def url_problem(url: str) -> str | None:
    """Return what is wrong with a server's address, or None."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or re.search(r"[^!-~]", url):
        return "is not an address"
    if "?" in url or "#" in url or "@" in parts.netloc:
        return "has more than scheme, host, port and path"
    return None if parts.scheme == "https" or is_loopback(url) else "is not https"


def read_url(node: YamlNode) -> str | None:
    """Read the address of a Keboola stack, or of a server up to what stands before `/batches`."""
    cure = "write https://host (http only on a loopback address)"
    url = node.text(cure)
    problem = None if url is None else url_problem(url)
    if url is None or problem:
        return problem and node.bad(problem, cure)  # not echoed: it may hold a password
    parts = urllib.parse.urlsplit(url.rstrip("/"))
    host = parts.hostname or ""
    if node.path.endswith("stack_url") and host.startswith("connection.") and parts.path:
        return node.bad("has a path", f"write {parts.scheme}://{parts.netloc}")  # a page's address
    if parts.path.endswith("/batches"):
        return node.bad("ends with /batches", f"write {parts.geturl().removesuffix('/batches')}")
    if host.endswith("openai.com") and not parts.path:
        return node.bad("misses /v1", f"write {parts.geturl()}/v1")
    return parts.geturl()


def read_since(node: YamlNode) -> float | None:
    """Read a date (UTC) or an RFC 3339 time as Unix seconds."""
    cure = "write a date, 2026-11-25, or a time, 2026-11-25T06:00:00Z"
    text = node.text(cure)
    with contextlib.suppress(ValueError, OverflowError):
        at = datetime.fromisoformat(text or "")
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    return None if text is None else node.bad(f"{node.shown(text)} is not a date", cure)


def read_list(
    node: YamlNode, what: str, read: Callable[[YamlNode], Any], least: int, most: int
) -> Any:  # noqa: ANN401
    cure = f"write a list of {least} to {most} {what}"
    items = node.items(cure)
    if isinstance(node.node, yaml.SequenceNode) and not least <= len(items) <= most:
        return node.bad(f"has {len(items)} {what}", cure)
    values: list[Any] = []
    for item in items:
        value = read(item)
        if value is not None and value in values:
            item.bad(f"{item.shown(value)} stands here twice", "keep one of them")
        values.append(value)
    return tuple(values)


# What a Keboola job gets from us (`keboola_variables` in 4); a job's own may not have these names.
OWN_VARIABLES: Final = (
    "batch_ids_(completed|failed|pending)|batch_count_(total|completed|failed)|batch_statuses"
    "|batch_output_file_ids|batch_error_file_ids|batch_request_counts|batch_errors"
    "|teckochecker_(job|group|trigger_id)"
)


def read_variables(node: YamlNode) -> tuple[tuple[str, str | None], ...]:
    """Read a job's own Keboola variables: text as written, lists and mappings as JSON."""
    values: dict[str, str | None] = {}
    for name, item in node.entries("write names and values").items():
        if re.fullmatch(OWN_VARIABLES, name):
            item.bad("the name is taken by teckochecker", "choose another name", item.key)
        elif not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,254}", name):
            cure = "use letters, digits, _ and - (Keboola reads a dot as a path)"
            item.bad(f"{node.shown(name)} is not a variable's name", cure, item.key)
        if isinstance(item.node, yaml.ScalarNode):
            cure = "write a value: Keboola takes no empty ones"
            values[name] = item.matching("(?s).+", "a value", cure)
        else:
            values[name] = compact_json(item.plain_value())
    return tuple(values.items())


def read_match(node: YamlNode) -> tuple[tuple[str, str | None], ...] | None:
    cure = "write KEY: VALUE, as the batch's metadata has it"
    pairs = tuple((name, item.text(cure)) for name, item in node.entries(cure).items())
    if node.is_mapping and not pairs:
        return node.bad("is empty, and every batch would match", cure)
    return pairs


JOB_KEYS: Final[Mapping[str, Reader]] = {
    "batch_ids": lambda node: read_list(node, "batch ids", YamlNode.batch_id, 1, 10),
    "match": read_match,
    "since": read_since,
    "group_by": lambda node: node.matching(".{1,64}", "a metadata key", "name a metadata key"),
    "group_size": lambda node: node.matching(
        "[1-9][0-9]{0,2}|1000|metadata[.].{1,64}", "a size", "write 1 to 1000, or metadata.KEY"
    ),
    "settle": lambda node: node.duration(0, 7 * DAY_S),
    "openai_secret": lambda node: node.secret_name("openai"),
    "keboola_secret": lambda node: node.secret_name("keboola"),
    "component_id": YamlNode.keboola_id,
    "config_id": YamlNode.keboola_id,
    "branch_id": YamlNode.keboola_id,
    "config_row_ids": lambda node: read_list(node, "row ids", YamlNode.keboola_id, 0, 1000),
    "mode": lambda node: node.choice("run", "forceRun", "debug"),
    "variables": read_variables,
    "poll_interval": lambda node: node.duration(1, DAY_S),
    "trigger_on": lambda node: node.choice("all_terminal", "all_completed", "any_output"),
    "deadline": lambda node: node.duration(1, 365 * DAY_S),
    "on_deadline": lambda node: node.choice("alert", "start"),
    "follow": YamlNode.boolean,
    "retry_on_error": lambda node: node.count(0, 5),
    "paused": YamlNode.boolean,
    "done": YamlNode.boolean,
}


def read_job_keys(
    node: YamlNode, entries: Mapping[str, YamlNode], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a job's keys, or `defaults` themselves; notes which do not go together.

    What only `defaults` has, and does not go with the job's own, is left out.
    """
    values = {**(defaults or {}), **node.read(entries, JOB_KEYS)}
    has = {key for key, value in values.items() if value is not None}
    has |= {"follow: false"} if values.get("follow") is False else set()
    for key, how, other in (
        ("match", "beside", "batch_ids"),
        ("settle", "beside", "group_size"),
        ("retry_on_error", "beside", "follow: false"),
        ("match", "without", "since"),
        ("since", "without", "match"),
        ("group_by", "without", "match"),
        ("group_size", "without", "group_by"),
        ("settle", "without", "group_by"),
        ("on_deadline", "without", "deadline"),
    ):
        is_wrong = other in has if how == "beside" else other not in has and defaults is not None
        if key not in has or not is_wrong:
            continue
        if key in entries:
            cure = "keep one of them" if how == "beside" else f"add {other}:, or remove {key}:"
            entries[key].bad(f"{key} {how} {other}", cure, entries[key].key)
        else:
            values[key] = None
            has.remove(key)
    return values


_HEADER_VALUE: Final = ("[!-~]{1,255}", "a header's value", "write printable ASCII without spaces")

# What each type of secret has beside `type` and its value.
SECRET_KEYS: Final[Mapping[str, Mapping[str, Reader]]] = {
    "openai": {
        "base_url": read_url,
        "organization": lambda node: node.matching(*_HEADER_VALUE),
        "project": lambda node: node.matching(*_HEADER_VALUE),
        "auth_header": lambda node: node.choice("Authorization", "api-key"),
        "api_version": lambda node: node.matching(*_HEADER_VALUE),
    },
    "keboola": {"stack_url": read_url},
    "webhook": {},
}


def read_secret(name: str, node: YamlNode) -> SecretEntry | None:
    """Read one entry of `secrets`. What stands there is never echoed."""
    noted_before, sources = len(node.problems), ("value", "env", "file")
    entries = node.entries("write type: and what belongs to it, each on its own line")
    if not node.is_mapping:
        return None
    kind = str(entries["type"].node.value) if "type" in entries else ""
    cure = "write one of value (a Fernet token), env (a variable's name) or file (a path)"
    readers: dict[str, Reader] = {
        "type": lambda at: at.choice(*SECRET_KEYS),
        **dict.fromkeys(sources, lambda at: at.matching(r"[^\0]+", "text", cure)),
        **SECRET_KEYS.get(kind, dict.fromkeys(entries.keys() - {"type", *sources}, str)),
    }
    values = node.read(entries, readers)
    if values.get("type") is None:
        node.bad("type is missing", "add type: openai, keboola or webhook", node.key)
    if kind == "keboola" and values.get("stack_url") is None:
        node.bad("stack_url is missing", "add stack_url: https://connection.keboola.com", node.key)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        node.bad(f'"{name}" is not a secret\'s name', "use letters, digits, ._-", node.key)
    found = [source for source in sources if values.get(source) is not None]
    if len(found) != 1:
        node.bad(f"has {' and '.join(found) or 'no value'}", cure)
    if len(node.problems) > noted_before:
        return None
    rest = given({key: values.get(key) for key in SECRET_KEYS[kind]})
    text, mark = Secret(values[found[0]]), entries[found[0]].node.start_mark
    return SecretEntry(name, kind, found[0], text, mark.line + 1, mark.column + 1, **rest)


def read_job(name: str, node: YamlNode, defaults: Mapping[str, Any]) -> Job | None:
    """Read one job; its own values win over `defaults`."""
    noted_before = len(node.problems)
    entries = node.entries("write batch_ids, config_id and so on, each on its own line")
    if not node.is_mapping:
        return None
    values = read_job_keys(node, entries, defaults)
    if not 0 < len(name) <= 200 or name != name.strip() or not name.isprintable() or "/" in name:
        cure = "use 1 to 200 printable characters, and no /"
        node.bad(f"{node.shown(name)} is not a job's name", cure, node.key)
    for key in ("openai_secret", "keboola_secret", "component_id", "config_id"):
        if values.get(key) is None:
            node.bad(f"{key} is missing", f"add {key}: here or under defaults", node.key)
    if values.get("batch_ids") is None and values.get("match") is None:
        node.bad("batch_ids is missing", "add batch_ids: here, or match: and since:", node.key)
    if _BAD in values.values() or len(node.problems) > noted_before:
        return None
    job = Job(name, **given(values))
    openai, keboola = node.secrets.get(job.openai_secret), node.secrets.get(job.keboola_secret)
    if openai and urllib.parse.urlsplit(openai.base_url).hostname == "api.openai.com":
        for item in entries["batch_ids"].items("") if "batch_ids" in entries else ():
            if not item.node.value.strip().startswith("batch_"):
                what = f"{item.shown(item.node.value)} is not a batch id of api.openai.com"
                item.bad(what, "write batch_ and what follows it")
    return job if openai and keboola else None


def read_notify(node: YamlNode) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read which webhook is told of which events; without `events`, of what needs attention."""
    names = "|".join(("attention", "finished", *EVENTS))
    cure = "write attention, finished, or a name that `teckochecker logs --help` lists"
    readers: dict[str, Reader] = {
        "secret": lambda at: at.secret_name("webhook"),
        "events": lambda at: read_list(
            at, "events", lambda item: item.matching(names, "an event", cure), 1, 100
        ),
    }
    rules = []
    for item in node.items("write - {secret: NAME, events: [attention]}"):
        values = item.read(item.entries("write secret: NAME, events: [attention]"), readers)
        if item.is_mapping and values.get("secret") is None:
            item.bad("secret is missing", "name a secret of type webhook")
        rules.append((values.get("secret", ""), values.get("events") or ("attention",)))
    return tuple(rules)


_NAMES: Final = "write names, each with its own keys below it"

# Where a part names what is in another one, that one stands above it.
TOP_KEYS: Final[Mapping[str, Reader]] = {
    "state": YamlNode.file_path,
    "key_file": YamlNode.file_path,
    "publish": YamlNode.file_path,
    "log": {
        "level": lambda node: node.choice("debug", "info", "warning", "error"),
        "format": lambda node: node.choice("auto", "console", "json"),
        "retention": lambda node: node.duration(HOUR_S, 3650 * DAY_S),
    },
    "secrets": lambda node: node.secrets.update(
        (name, read_secret(name, at)) for name, at in node.entries(_NAMES).items()
    ),
    "limits": {
        "max_concurrency": lambda node: node.count(1, 100),
        "request_timeout": lambda node: node.duration(1, 60),
        "trigger_grace": lambda node: node.wait(30, DAY_S),
        "follow_interval": lambda node: node.wait(5, HOUR_S),
    },
    "notify": read_notify,
    "defaults": lambda node: read_job_keys(node, node.entries("write keys and values")),
    "jobs": lambda node: node.entries(_NAMES),
}


def refuse_harm(text: str) -> None:
    """Raise YAMLError, its note the cure, for what costs the process its stack or its memory."""
    opened: list[tuple[str | None, int]] = []  # anchors, and the number of nodes before
    sizes: dict[str | None, int] = {}
    nodes = 0
    event: Any
    for event in yaml.parse(text, Loader=_LOADER):
        what = ""
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before_it = opened.pop()
            sizes[anchor] = nodes - before_it
        elif isinstance(event, yaml.AliasEvent):
            nodes += sizes.get(event.anchor, 1)
            if any(anchor for anchor, _ in opened):  # this is what a bomb is made of
                what = "an alias stands inside what an anchor names"
                cure = "write out what it stands for"
        tag = getattr(event, "tag", None)  # one that is written there
        if tag and tag.removeprefix(_TAG) not in _TAGS:
            what, cure = "this tag means nothing here", "remove it"
        if len(opened) > MAX_DEPTH:
            what, cure = f"nests deeper than {MAX_DEPTH}", "flatten it"
        if nodes > 1_000_000:  # 10,000 jobs have some 400,000
            what, cure = "there are too many values from here on", "split it up"
        if what:
            raise yaml.MarkedYAMLError(None, None, what, event.start_mark, cure)


def compose(text: str, path: Path, problems: list[Problem]) -> YamlNode | None:
    """Return the root of the YAML tree, or None and a problem."""
    text = text.removeprefix("\ufeff")  # libyaml would not count it in its marks
    try:
        refuse_harm(text)
        node = yaml.compose(text, Loader=_LOADER)
        if isinstance(node, yaml.MappingNode):
            return YamlNode(node, node, "", str(path), problems)
        what = "is not a mapping of keys" if node else "is empty"
        cure = "write secrets:, jobs: and so on; `teckochecker init` makes a first one"
        raise yaml.MarkedYAMLError(None, None, what, getattr(node, "start_mark", None), cure)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        what, cure = str(error.problem), error.note or ""
        if not cure:
            what = f"is not YAML: {error.context or ''} {what}"
            cure = "mend the YAML here or just above: indentation (no tabs), quotes, brackets"
    except yaml.reader.ReaderError as error:  # its position counts bytes
        before = text.encode()[: error.position].decode(errors="replace").split("\n")
        line, column = len(before) - 1, len(before[-1])
        what = f"has the control character {error.character:#04x}"
        cure = "a config is plain text: remove it"
    problems.append(Problem(str(path), line + 1, column + 1, "", what, cure))
    return None


def parse_config(text: str, path: Path) -> tuple[Config, list[Problem]]:
    """Return the config that `text` says so far as it can be read, and what is wrong with it.

    `path` is the file's name for messages, and what relative paths in it are relative to.
    """
    problems: list[Problem] = []
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    root = compose(text, path, problems)
    if root is None:
        state = re.search(r"^state:[ \t]*[\"']?([^\"'#\n]+)", text, re.MULTILINE)
        state_path = path.parent / (state[1].strip() if state else "teckochecker.db")
        return Config(path, sha256, state_path, path.parent / "teckochecker.key"), problems
    entries = root.entries("write keys and values")
    top = given(root.read(entries, TOP_KEYS))
    if "jobs" not in entries:
        root.bad("jobs is missing", "list them under jobs:, or write jobs: {} for none")
    defaults, nodes = top.get("defaults", {}), top.get("jobs", {})
    jobs = {name: read_job(name, node, defaults) for name, node in nodes.items()}
    settings = {"secrets": given(root.secrets), "notify": top.get("notify"), "jobs": given(jobs)}
    settings = given(settings | top.get("log", {}) | top.get("limits", {}))
    settings |= {f"log_{key}": settings.pop(key) for key in settings.keys() & {"level", "format"}}
    mark = (entries.get("key_file") or entries.get("secrets") or root).node.start_mark
    state_path = path.parent / top.get("state", "teckochecker.db")
    key_path = path.parent / top.get("key_file", "teckochecker.key")
    publish_path = path.parent / top["publish"] if "publish" in top else None
    place = (mark.line + 1, mark.column + 1)
    config = Config(path, sha256, state_path, key_path, *place, publish_path, **settings)
    return config, problems
