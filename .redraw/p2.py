# ==================================================================================================
# 2. Config: text in, Config out; every problem with its place and its cure
# ==================================================================================================

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
MAX_DEPTH: Final = 64  # libyaml's composer recurses and takes the process down at some 30,000

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is five times faster
_TAG: Final = "tag:yaml.org,2002:"
_TRUTH: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_BAD: Final = object()  # a value that has a problem, which is noted already

Reader = Callable[["YamlNode"], Any]

# What a Keboola job gets from us; a job's own variables may not use these names.
OWN_VARIABLES: Final = (
    "batch_ids_completed",
    "batch_ids_failed",
    "batch_ids_pending",
    "batch_count_total",
    "batch_count_completed",
    "batch_count_failed",
    "batch_statuses",
    "batch_output_file_ids",
    "batch_error_file_ids",
    "batch_request_counts",
    "batch_errors",
    "teckochecker_job",
    "teckochecker_group",
    "teckochecker_trigger_id",
)


@dataclass(slots=True)
class YamlNode:
    """A node of the YAML tree, the path to it, and the list that its problems go to.

    A method that reads a value returns None where it has noted a problem.
    """

    node: yaml.Node
    path: str
    file: str
    problems: list[Problem]
    key: yaml.Node | None = None

    @property
    def is_null(self) -> bool:
        return bool(self.node.tag == _TAG + "null")

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    def bad(self, what: str, cure: str, mark: Any = None) -> None:  # noqa: ANN401 - of two loaders
        """Note a problem here, or at a mark; returns None, for `return node.bad(...)`."""
        mark = mark or self.node.start_mark
        where = (self.file, mark.line + 1, mark.column + 1, self.path)
        self.problems.append(Problem(*where, what, cure))

    def bad_key(self, what: str, cure: str) -> None:
        """Note a problem at the node's key: something is missing, or should not be there."""
        self.bad(what, cure, (self.key or self.node).start_mark)

    def _has_tag(self, tags: Iterable[str], cure: str) -> bool:
        """Check the node's tag: a custom one asks for what this program does not do."""
        if self.node.tag.removeprefix(_TAG) not in tags:
            self.bad(f"the tag {quoted(self.node.tag)} means nothing here", cure)
            return False
        return True

    def _child(self, node: yaml.Node, name: str, key: yaml.Node | None = None) -> YamlNode:
        joint = "." if self.path and key else ""
        return YamlNode(node, f"{self.path}{joint}{name}", self.file, self.problems, key)

    # --- lists and mappings ---

    def items(self, cure: str) -> list[YamlNode]:
        """Return a list's elements, or nothing and a problem."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.bad("is not a list", cure)
            return []
        if not self._has_tag(("seq",), cure):
            return []
        return [self._child(node, f"[{i}]") for i, node in enumerate(self.node.value)]

    def entries(self, cure: str) -> dict[str, YamlNode]:
        """Return a mapping's values by key, merge keys (`<<`) resolved; duplicates are problems."""
        if not isinstance(self.node, yaml.MappingNode):
            self.bad("is not a mapping", cure)
            return {}
        if not self._has_tag(("map",), cure):
            return {}
        own: dict[str, YamlNode] = {}
        merged: dict[str, YamlNode] = {}
        for key, value in self.node.value:
            if key.tag == _TAG + "merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # of several, the first one wins
                    merge = self._child(source, "<<", key)
                    merged |= merge.entries("merge a mapping or a list of mappings")
            elif not isinstance(key, yaml.ScalarNode):
                self.bad("a key is not a single value", cure, key.start_mark)
            elif key.value in own:
                line = (own[key.value].key or key).start_mark.line + 1
                what = f"the key {self._shown(key.value)} stands here and in line {line}"
                self.bad(what, "keep one of them", key.start_mark)
            else:
                own[key.value] = self._child(value, key.value, key)
        return merged | own

    def allow(self, entries: Mapping[str, YamlNode], allowed: Iterable[str]) -> dict[str, YamlNode]:
        """Return the entries that are allowed here; the others are problems."""
        names = tuple(allowed)
        for name in entries.keys() - set(names):
            what = f"the key {self._shown(name)} is not known"
            mark = (entries[name].key or self.node).start_mark
            self.bad(what, f"allowed here: {', '.join(names)}", mark)
        return {name: node for name, node in entries.items() if name in names}

    def _shown(self, key: str) -> str:
        """Return a key for a message; among secrets it may be a token that someone pasted."""
        is_plain = not self.path.startswith("secrets.") or re.fullmatch("[a-z_]{1,30}", key)
        return quoted(key) if is_plain else "written here"

    def read(self, readers: Mapping[str, Reader], cure: str) -> dict[str, Any]:
        """Return what the readers make of a mapping's values, by key; a bad one is _BAD."""
        return read_values(self.allow(self.entries(cure), readers), readers)

    # --- single values ---

    def text(self, cure: str) -> str | None:
        """Return a scalar's text just as written (`0123` stays so)."""
        if self.is_null:
            return self.bad("is empty", cure)
        if not isinstance(self.node, yaml.ScalarNode):
            return self.bad("is not a single value", cure)
        if not self._has_tag(("str", "int", "float", "bool", "timestamp", "value", "merge"), cure):
            return None
        return str(self.node.value).strip()

    def matching(self, pattern: str, kind: str, cure: str) -> str | None:
        """Return text that matches a pattern as a whole."""
        text = self.text(cure)
        if text is None or re.fullmatch(pattern, text):
            return text
        return self.bad(f"{quoted(text)} is not {kind}", cure)

    def keboola_id(self) -> str | None:
        """Return an id of Keboola's."""
        cure = "copy the id from Keboola: letters, digits, . _ and -"
        return self.matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", "an id of Keboola's", cure)

    def choice(self, *choices: str) -> str | None:
        """Return one word out of several."""
        cure = f"write {', '.join(choices[:-1])} or {choices[-1]}"
        text = self.text(cure)
        if text is None or text in choices:
            return text
        return self.bad(f"{quoted(text)} is not one of them", cure)

    def duration(self, least_s: int, most_s: int) -> int | None:
        """Return a duration within limits, in seconds."""
        text = self.text("write 30s, 2m or 1h")
        if text is None:
            return None
        seconds = parse_duration(text)
        if seconds is None:
            return self.bad(f"{quoted(text)} is not a duration", "write 30s, 2m or 1h")
        if not least_s <= seconds <= most_s:
            limits = f"{show_duration(least_s)} to {show_duration(most_s)}"
            return self.bad(f"{quoted(text)} is out of range", f"write {limits}")
        return seconds

    def count(self, least: int, most: int) -> int | None:
        """Return a whole number within limits."""
        cure = f"write a whole number from {least} to {most}"
        text = self.text(cure)
        if text is None:
            return None
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            return self.bad(f"{quoted(text)} is not a number from {least} to {most}", cure)
        return int(text)

    def boolean(self) -> bool | None:
        """Return true or false."""
        text = self.text("write true or false")
        if text is None:
            return None
        if self.node.tag != _TAG + "bool" or text.lower() not in _TRUTH:
            return self.bad(f"{quoted(text)} is neither true nor false", "write true or false")
        return _TRUTH[text.lower()]

    def file_path(self) -> str | None:
        """Return a file's path."""
        text = self.text("write a path")
        if text is not None and (not text or "\0" in text):
            return self.bad("is empty", "write a path")
        return text

    def url(self) -> str | None:
        """Return a server's address: https, or http on a loopback address. It is never echoed."""
        cure = "write https://host (http only on a loopback address)"
        text = self.text(cure)
        problem = text is not None and url_problem(text)
        if text is None or problem:
            return problem and self.bad(problem, cure) or None
        return text.rstrip("/")

    def plain_value(self) -> object:
        """Return a node as a JSON value; what is no JSON number stays the text that was written."""
        cure = "write what JSON knows: text, numbers, lists, and mappings with plain keys"
        if isinstance(self.node, yaml.SequenceNode):
            return [item.plain_value() for item in self.items(cure)]
        if self.is_mapping:
            return {key: item.plain_value() for key, item in self.entries(cure).items()}
        text = None if self.is_null else self.text(cure)
        if text is None:
            return None
        if self.node.tag == _TAG + "bool":
            return _TRUTH.get(text.lower(), text)
        is_number = self.node.tag in {_TAG + "int", _TAG + "float"}
        if is_number and re.fullmatch(r"-?(0|[1-9][0-9]{0,15})(\.[0-9]+)?", text):
            return json.loads(text)
        return text


def read_values(found: Mapping[str, YamlNode], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Return what the readers make of values, by key; a bad one is _BAD, null is None."""
    values: dict[str, Any] = {}
    for key, node in found.items():
        value = None if node.is_null else readers[key](node)
        values[key] = _BAD if value is None and not node.is_null else value
    return values


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are there and good; the model has a default for the others."""
    return {key: v for key, v in values.items() if v is not None and v is not _BAD}


# --- addresses ------------------------------------------------------------------------------------


def is_loopback(url: str) -> bool:
    """Return whether a URL's host is this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def url_problem(url: str) -> str | None:
    """Return what is wrong with a server's address, or None."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:
        return "is not an address"
    if re.search(r"[^!-~]", url) or parts.scheme not in {"http", "https"} or not parts.hostname:
        return "is not an address"
    if "?" in url or "#" in url or "@" in parts.netloc:
        return "has more than scheme, host, port and path"
    if parts.scheme == "http" and not is_loopback(url):
        return "is not https"
    return None


def read_stack_url(node: YamlNode) -> str | None:
    """Read a Keboola stack's address; people paste the address of a page of theirs."""
    url = node.url()
    parts = urllib.parse.urlsplit(url or "")
    if parts.path and (parts.hostname or "").startswith("connection."):
        return node.bad("has a path", f"write {parts.scheme}://{parts.netloc}")
    return url


def read_base_url(node: YamlNode) -> str | None:
    """Read an OpenAI-compatible server's address, up to what stands before `/batches`."""
    url = node.url()
    parts = urllib.parse.urlsplit(url or "")
    if parts.path.endswith("/batches"):
        return node.bad("ends with /batches", f"write {str(url).removesuffix('/batches')}")
    if (parts.hostname or "").endswith("openai.com") and not parts.path:
        return node.bad("misses /v1", f"write {url}/v1")
    return url


# --- the keys of each part ------------------------------------------------------------------------


def read_list(node: YamlNode, what: str, read: Reader, least: int, most: int) -> Any:  # noqa: ANN401
    """Read a list of different values."""
    cure = f"write a list of {least} to {most} {what}"
    items = node.items(cure)
    values = [read(item) for item in items]
    if not isinstance(node.node, yaml.SequenceNode):
        return None
    if not least <= len(items) <= most:
        return node.bad(f"has {len(items)} {what}", cure)
    for i, (item, value) in enumerate(zip(items, values, strict=True)):
        if value is not None and value in values[:i]:
            return item.bad(f"{quoted(value)} stands here twice", "keep one of them")
    return None if None in values else tuple(values)


def read_batch_id(node: YamlNode) -> str | None:
    """Read a batch's id, as its server calls it."""
    cure = "copy the batch id: letters, digits, . _ = and -"
    return node.matching(r"[A-Za-z0-9._=-]{1,1000}", "a batch id", cure)


def read_variables(node: YamlNode) -> tuple[tuple[str, str], ...] | None:
    """Read a job's own Keboola variables: text as written, lists and mappings as JSON."""
    values: dict[str, str | None] = {}
    for name, item in node.entries("write names and values").items():
        if name in OWN_VARIABLES:
            item.bad("the name is taken by teckochecker", "choose another name")
        elif not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,254}", name):
            cure = "use letters, digits, _ and - (Keboola reads a dot as a path)"
            item.bad(f"{quoted(name)} is not a variable's name", cure)
        elif isinstance(item.node, yaml.ScalarNode):
            values[name] = item.text("write a value")
            if values[name] == "":
                item.bad("is empty", "write a value: Keboola takes no empty ones")
        else:
            values[name] = compact_json(item.plain_value())
    good = node.is_mapping and None not in values.values()
    return tuple((name, str(value)) for name, value in values.items()) if good else None


def read_match(node: YamlNode) -> tuple[tuple[str, str], ...] | None:
    """Read which metadata a batch must have (OpenAI: keys to 64 characters, values to 512)."""
    cure = "write KEY: VALUE, as the batch's metadata has it"
    entries = node.entries(cure)
    values = {name: item.text(cure) for name, item in entries.items()}
    if node.is_mapping and not entries:
        return node.bad("is empty, and every batch would match", cure)
    if not node.is_mapping or None in values.values():
        return None
    return tuple((name, str(value)) for name, value in values.items())


def read_since(node: YamlNode) -> float | None:
    """Read a date (UTC) or an RFC 3339 time as Unix seconds."""
    cure = "write a date, 2026-11-25, or a time, 2026-11-25T06:00:00Z"
    text = node.text(cure)
    if text is None:
        return None
    with contextlib.suppress(ValueError, OverflowError):
        if re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}($|[T ])", text):
            at = datetime.fromisoformat(text)
            return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    return node.bad(f"{quoted(text)} is not a date", cure)


JOB_KEYS: Final[Mapping[str, Reader]] = {
    "batch_ids": lambda node: read_list(node, "batch ids", read_batch_id, 1, 10),
    "match": read_match,
    "since": read_since,
    "group_by": lambda node: node.matching(".{1,64}", "a metadata key", "name a metadata key"),
    "group_size": lambda node: node.matching(
        "[1-9][0-9]{0,2}|1000|metadata[.].{1,64}",
        "a size",
        "write a number from 1 to 1000, or metadata.KEY",
    ),
    "settle": lambda node: node.duration(0, 7 * DAY_S),
    "openai_secret": lambda node: node.text("name a secret of type openai"),
    "keboola_secret": lambda node: node.text("name a secret of type keboola"),
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

# What each type of secret has beside `type` and its value.
SECRET_KEYS: Final[Mapping[str, Mapping[str, Reader]]] = {
    "openai": {
        "base_url": read_base_url,
        **dict.fromkeys(
            ("organization", "project", "api_version"),
            lambda node: node.matching(
                "[!-~]{1,255}", "a header's value", "write printable ASCII without spaces"
            ),
        ),
        "auth_header": lambda node: node.choice("Authorization", "api-key"),
    },
    "keboola": {"stack_url": read_stack_url},
    "webhook": {},
}


def secret_name_reader(kind: str, kinds: Mapping[str, str | None]) -> Reader:
    """Return a reader of the name of a secret of one type; `kinds` are those of all secrets.

    A kind of None is one that could not be read, which is a problem of its own already.
    """
    names = ", ".join(name for name in kinds if kinds[name] == kind) or "none there yet"
    cure = f"name a secret of type {kind}: {names}"

    def read(node: YamlNode) -> str | None:
        name = node.text(cure)
        if name is None or kinds.get(name, "") in {kind, None}:
            return name
        if name in kinds:
            return node.bad(f"{quoted(name)} is a secret of another type", cure)
        return node.bad("is not the name of a secret", cure)  # not echoed: it may be a token

    return read


def read_secret(name: str, node: YamlNode) -> SecretEntry | None:
    """Read one entry of `secrets`. What stands there is never echoed."""
    entries = node.entries("write type: and what belongs to it, each on its own line")
    if not node.is_mapping:
        return None
    cure = "write type: openai, type: keboola or type: webhook"
    if "type" not in entries:
        return node.bad_key("type is missing", cure)
    kind = entries["type"].text(cure)
    if kind is None or kind not in SECRET_KEYS:
        return None if kind is None else entries["type"].bad("is not a type of secret", cure)
    noted_before = len(node.problems)
    readers = SECRET_KEYS[kind]
    found = node.allow(entries, ("type", "value", "env", "file", *readers))
    values = read_values({key: found[key] for key in readers if key in found}, readers)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        node.bad_key(f"{quoted(name)} is not a secret's name", "use letters, digits, . _ and -")
    if kind == "keboola" and values.get("stack_url") is None:
        node.bad_key("stack_url is missing", "add stack_url: https://connection.keboola.com")
    source, text = read_source(node, found)
    if text is None or len(node.problems) > noted_before:
        return None
    mark = found[source].node.start_mark
    place = (mark.line + 1, mark.column + 1)
    return SecretEntry(name, kind, source, Secret(text), *place, **given(values))


def read_source(node: YamlNode, found: Mapping[str, YamlNode]) -> tuple[str, str | None]:
    """Read where a secret's value comes from, and what stands there."""
    sources = [source for source in ("value", "env", "file") if source in found]
    cure = "write one of value (a Fernet token), env (a variable's name) or file (a path)"
    if len(sources) != 1:
        what = f"has {' and '.join(sources)}" if sources else "has no value"
        return "", node.bad(what, cure)
    at = found[sources[0]]
    text = at.text(cure)
    if text is not None and (not text or "\0" in text):
        return "", at.bad("is empty", cure)
    return sources[0], text


def read_job(
    name: str, node: YamlNode, readers: Mapping[str, Reader], defaults: Mapping[str, Any]
) -> Job | None:
    """Read one job; its own values win over `defaults`."""
    found = node.allow(
        node.entries("write batch_ids, config_id and so on, each on its own line"), readers
    )
    if not node.is_mapping:
        return None
    noted_before = len(node.problems)
    values = {**defaults, **read_values(found, readers)}
    for key in ("openai_secret", "keboola_secret", "component_id", "config_id"):
        if values.get(key) is None:
            node.bad_key(f"{key} is missing", f"add {key}: here or under defaults")
    if len(name) > 200 or name != name.strip() or not name or not name.isprintable() or "/" in name:
        cure = "use 1 to 200 printable characters, and no /"
        node.bad_key(f"{quoted(name)} is not a job's name", cure)
    for key, what, cure in wrong_combinations(values):
        (found.get(key) or node).bad_key(what, cure)
    if _BAD in values.values() or len(node.problems) > noted_before:
        return None
    return Job(name, **given(values))


def wrong_combinations(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield which keys of a job do not go together: the key, what is wrong, the cure."""
    has = {key for key, value in values.items() if value is not None}
    if "batch_ids" not in has and "match" not in has:
        yield "", "batch_ids is missing", "add batch_ids: here, or match: and since:"
    if {"batch_ids", "match"} <= has:
        yield "match", "stands beside batch_ids", "keep one of them: ids, or metadata to find them by"
    if "match" in has and "since" not in has:
        yield "match", "since is missing", "add since: 2026-11-25; older batches are not looked at"
    for key in ("since", "group_by"):
        if key in has and "match" not in has:
            yield key, f"{key} without match", f"add match:, or remove {key}:"
    for key in ("group_size", "settle"):
        if key in has and "group_by" not in has:
            yield key, f"{key} without group_by", f"add group_by:, or remove {key}:"
    if {"group_size", "settle"} <= has:
        yield "settle", "stands beside group_size", "keep one of them: they answer the same question"
    if "on_deadline" in has and "deadline" not in has:
        yield "on_deadline", "on_deadline without deadline", "add deadline: 26h, or remove it"
    if values.get("retry_on_error") not in {None, 0, _BAD} and values.get("follow") is False:
        yield "retry_on_error", "retry_on_error with follow: false", "remove one of them"


def read_notify(
    node: YamlNode, read_secret_name: Reader
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read which webhook is told of which events; without `events`, of what needs attention."""
    words = ("attention", "finished", *EVENTS)

    def read_event(item: YamlNode) -> str | None:
        cure = "write attention, finished, or a name that `teckochecker logs --help` lists"
        text = item.text(cure)
        if text is None or text in words:
            return text
        return item.bad(f"{quoted(text)} is not an event", cure)

    cure = "write - {secret: NAME, events: [attention]}"
    readers: dict[str, Reader] = {
        "secret": read_secret_name,
        "events": lambda events: read_list(events, "events", read_event, 1, 100),
    }
    rules = []
    for item in node.items(cure):
        values = item.read(readers, cure)
        if item.is_mapping and values.get("secret") is None:
            item.bad("secret is missing", "name a secret of type webhook")
        elif item.is_mapping and _BAD not in values.values():
            rules.append((values["secret"], values.get("events") or ("attention",)))
    return tuple(rules)


def read_config(root: YamlNode, path: Path, sha256: str) -> Config:
    """Read the whole tree."""
    parts = ("state", "key_file", "publish", "log", "limits", "secrets", "notify", "defaults")
    allowed = root.allow(root.entries("write keys and values"), (*parts, "jobs"))
    found = {key: node for key, node in allowed.items() if not node.is_null}
    names = "write names, each with its own keys below it"
    nodes = found["secrets"].entries(names) if "secrets" in found else {}
    read = {name: read_secret(name, node) for name, node in nodes.items()}
    secrets = {name: secret for name, secret in read.items() if secret}
    kinds = {name: secret and secret.type for name, secret in read.items()}
    readers = {
        **JOB_KEYS,
        "openai_secret": secret_name_reader("openai", kinds),
        "keboola_secret": secret_name_reader("keboola", kinds),
    }
    defaults: dict[str, Any] = {}
    if "defaults" in found:
        defaults = found["defaults"].read(readers, "write keys and values")
    if "jobs" not in allowed:
        root.bad("jobs is missing", "list them under jobs:, or write jobs: {} for none")
    nodes = found["jobs"].entries(names) if "jobs" in found else {}
    jobs = {name: read_job(name, node, readers, defaults) for name, node in nodes.items()}
    key_mark = (found.get("key_file") or found.get("secrets") or root).node.start_mark
    own = {key: found[key].file_path() for key in ("state", "key_file", "publish") if key in found}
    values = read_settings(found, secrets)
    if "notify" in found:
        values["notify"] = read_notify(found["notify"], secret_name_reader("webhook", kinds))
    good = {name: job for name, job in jobs.items() if job and is_complete(job, secrets)}
    check_batch_ids(nodes, good, secrets)
    return Config(
        path,
        sha256,
        path.parent / (own.get("state") or "teckochecker.db"),
        path.parent / (own.get("key_file") or "teckochecker.key"),
        key_mark.line + 1,
        key_mark.column + 1,
        path.parent / publish if (publish := own.get("publish")) else None,
        secrets=secrets,
        jobs=good,
        **values,
    )


def is_complete(job: Job, secrets: Mapping[str, SecretEntry]) -> bool:
    """Return whether a job's secrets could be read."""
    return {job.openai_secret, job.keboola_secret} <= secrets.keys()


def check_batch_ids(
    nodes: Mapping[str, YamlNode], jobs: Mapping[str, Job], secrets: Mapping[str, SecretEntry]
) -> None:
    """Note ids that OpenAI's own server cannot have made: its ids begin with `batch_`."""
    for name, job in jobs.items():
        host = urllib.parse.urlsplit(secrets[job.openai_secret].base_url).hostname
        bad = [batch_id for batch_id in job.batch_ids if not batch_id.startswith("batch_")]
        if host == "api.openai.com" and bad:
            node = nodes[name].entries("").get("batch_ids") or nodes[name]
            items = node.node.value if isinstance(node.node, yaml.SequenceNode) else []
            marks = [item.start_mark for item in items if item.value in bad]
            for place, batch_id in enumerate(bad):
                what = f"{quoted(batch_id)} is not a batch id of api.openai.com"
                node.bad(what, "write batch_ and what follows it", (marks[place:] or [None])[0])


def read_settings(
    found: Mapping[str, YamlNode], secrets: Mapping[str, SecretEntry]
) -> dict[str, Any]:
    """Read `log` and `limits`; short waits are for tests, with a stack on a loopback address."""
    is_test = all(is_loopback(s.stack_url) for s in secrets.values() if s.type == "keboola")
    log: dict[str, Reader] = {
        "level": lambda node: node.choice("debug", "info", "warning", "error"),
        "format": lambda node: node.choice("auto", "console", "json"),
        "retention": lambda node: node.duration(HOUR_S, 3650 * DAY_S),
    }
    limits: dict[str, Reader] = {
        "max_concurrency": lambda node: node.count(1, 100),
        "request_timeout": lambda node: node.duration(1, 60),
        "trigger_grace": lambda node: node.duration(0 if is_test else 30, DAY_S),
        "follow_interval": lambda node: node.duration(0 if is_test else 5, HOUR_S),
    }
    values = given(found["log"].read(log, "write keys and values")) if "log" in found else {}
    for key in ("level", "format"):
        if key in values:
            values[f"log_{key}"] = values.pop(key)
    if "limits" in found:
        values |= given(found["limits"].read(limits, "write keys and values"))
    return values


# --- from text to tree ----------------------------------------------------------------------------


def refusal_before_composing(text: str) -> tuple[int, int, str, str] | None:
    """Return line, column, what and cure of what would cost the process its stack or its memory.

    The composer recurses, and an alias inside what an anchor names is what a bomb is made of.
    """
    if not text.strip("\ufeff \t\r\n"):
        return 0, 0, "the file is empty", "write a config; `teckochecker init` makes a first one"
    bad = re.search("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    if bad:
        before = text[: bad.start()]
        what = f"has the control character {ord(bad[0]):#04x}"
        column = len(before) - before.rfind("\n") - 1
        return before.count("\n"), column, what, "a config is plain text: remove it"
    opened: list[tuple[str | None, int]] = []  # anchors, and the number of nodes before
    sizes: dict[str, int] = {}
    nodes = added = 0
    for event in yaml.parse(text, Loader=_LOADER):
        mark = event.start_mark
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before_it = opened.pop()
            sizes |= {anchor: nodes - before_it} if anchor else {}
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            if len(opened) > MAX_DEPTH:
                return mark.line, mark.column, f"nests deeper than {MAX_DEPTH}", "flatten it"
        if isinstance(event, yaml.AliasEvent):
            added += sizes.get(str(event.anchor), 1)
            if any(anchor for anchor, _ in opened):
                what = "an alias stands inside what an anchor names"
                return mark.line, mark.column, what, "write out what it stands for"
        if nodes > 1_000_000 or added > 250_000:  # 10,000 jobs have some 400,000
            return mark.line, mark.column, "there are too many values from here on", "split it up"
    return None


def compose(text: str, path: Path, problems: list[Problem]) -> YamlNode | None:
    """Return the root of the YAML tree, or None and a problem."""

    def refuse(line: int, column: int, what: str, cure: str) -> None:
        problems.append(Problem(str(path), line + 1, column + 1, "", what, cure))

    try:
        text = text.removeprefix("\ufeff")  # libyaml would not count it in its marks
        refusal = refusal_before_composing(text)
        if refusal:
            return refuse(*refusal)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = (mark.line, mark.column) if mark else (0, 0)
        parts = (getattr(error, "context", ""), getattr(error, "problem", ""))
        what = " ".join(filter(None, parts)) or "unreadable"
        if "nesting depth" in what:  # a libyaml with a limit of its own reads ahead
            return refuse(*place, f"nests deeper than {MAX_DEPTH}", "flatten it")
        cure = "mend the YAML here or just above: indentation (no tabs), quotes, brackets"
        return refuse(*place, f"is not YAML: {what}", cure)
    if not isinstance(node, yaml.MappingNode):
        mark = node.start_mark if node else None  # None: nothing but comments
        place = (mark.line, mark.column) if mark else (0, 0)
        cure = "write secrets:, jobs: and so on; see config.example.yaml"
        return refuse(*place, "is not a mapping of keys", cure)
    return YamlNode(node, "", str(path), problems)


def parse_config(text: str, path: Path) -> tuple[Config, list[Problem]]:
    """Return the config that `text` says, and everything that is wrong with it.

    `path` is the file's name for messages, and what relative paths in it are relative to. Where
    there are problems, the config holds what could be read: `status` finds the state file with it.
    """
    problems: list[Problem] = []
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    root = compose(text, path, problems)
    if root:
        return read_config(root, path, sha256), problems
    state = re.search(r"^state:[ \t]*[\"']?([^\"'#\n]+)", text, re.MULTILINE)
    state_path = path.parent / (state[1].strip() if state else "teckochecker.db")
    return Config(path, sha256, state_path, path.parent / "teckochecker.key"), problems


