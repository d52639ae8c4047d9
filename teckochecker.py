#!/usr/bin/env python3
"""TeckoChecker: when OpenAI has finished a team's batches, their Keboola job starts, once.

One asyncio process reads jobs and encrypted secrets from a YAML file that people edit, looks at the
OpenAI batches of each job (1 to 10) until all have ended, starts the job's Keboola configuration
once, and remembers what it did in a SQLite file. It opens no network port.

    config.yaml --> Config --> Setup --+                       (3, 4: read, check, decrypt)
                                       v
    OpenAI  <-- look -->  Engine: decide what to do next  <--> State (SQLite)     (5, 6, 7, 8)
                                       |               |
              intent, search, sending, POST, result    +-----> webhooks, page, metrics  (8, 9)
                                       v
                                    Keboola                                       (5, 7, 8)

Run it:

    teckochecker.py --config config.yaml            the daemon, in the foreground
    teckochecker.py --config config.yaml --once     one pass, for cron
    teckochecker.py status                          what it knows; see --help for the other commands

Sections: 1 Errors - 2 Model - 3 Config - 4 Secrets - 5 Decisions - 6 State - 7 OpenAI and Keboola -
8 Daemon - 9 Publishing - 10 Commands - 11 main. Each uses only what stands above it. Where to look
first: the decisions of the trigger are `next_step` and its neighbours (5), its steps `Carrier` (8).

Exit codes: 0 fine; 1 a job has an error or needs a person; 2 usage or config error; 75 another
instance holds the state file; 130 interrupted.
"""

from __future__ import annotations

import gc

# What is imported stays. To look for garbage among it, now or ever, would be an eighth of a pass
# of --once that finds nothing to do.
gc.disable()

import argparse
import asyncio
import base64
import binascii
import bisect
import collections
import contextlib
import email.utils
import enum
import errno
import fcntl
import functools
import getpass
import hashlib
import html
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import zlib
from collections.abc import (
    Callable,
    Collection,
    Container,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, NoReturn, Protocol, TypeVar

import yaml

# What a pass of --once without work can do without is imported where it is used.
if TYPE_CHECKING:
    import httpx
    import structlog
    import tenacity
    from cryptography.fernet import Fernet

gc.freeze()
gc.enable()

__version__ = "1.0.0"

MINUTE_S: Final = 60
HOUR_S: Final = 3600
DAY_S: Final = 86400
LAST_S: Final = 253402300799.0  # the last second that has a date: 9999-12-31T23:59:59Z
MAX_PROBLEMS: Final = 1000  # of one config, that a person is shown

# ==================================================================================================
# 1. Errors: what a person is told, in one line, with the next step
# ==================================================================================================


class TeckoError(Exception):
    """Something a user, a server or a disk did; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.hint}" if self.hint else message


class UsageError(TeckoError):
    """The command line asks for something that is not there."""

    exit_code = 2


class ConfigError(TeckoError):
    """Everything that is wrong with a config, one `Problem` a line."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: p.place))
        lines = [str(problem) for problem in self.problems[:MAX_PROBLEMS]]
        more = len(self.problems) - len(lines)
        super().__init__("\n".join([*lines, f"and {more} more problems"] if more else lines))


class LockedError(TeckoError):
    """Another process acts on the same state file."""

    exit_code = 75


class StateError(TeckoError):
    """The state file cannot be used as it is: damaged, too new, replaced, not readable."""


class StorageError(TeckoError):
    """One transaction did not get through (full disk, locked file); nothing of it is stored."""


class ApiError(TeckoError):
    """A request that did not bring what was asked for.

    `retryable` says whether the same request may do better in a moment, `retry_after_s` how long
    the server wants it to wait, `status` the HTTP status where there was one. `sent` is False only
    where it is certain that the server saw nothing of the request.
    """

    def __init__(  # noqa: PLR0913 - all but the message are optional facts
        self,
        message: str,
        *,
        status: int | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
        sent: bool = True,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.sent = sent
        self.request_id = request_id


class TooLargeError(ApiError):
    """An answer that is over the cap."""


# ==================================================================================================
# 2. Model: the nouns. No I/O here
# ==================================================================================================


class BatchStatus(enum.StrEnum):
    """The statuses of OpenAI's Batch API; another one is kept as the text that came."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


TERMINAL: Final = frozenset(
    {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)
KNOWN_STATUSES: Final = frozenset(BatchStatus)


class JobStatus(enum.StrEnum):
    """What `status` says of a job."""

    ACTIVE = "active"
    PAUSED = "paused"
    TRIGGERING = "triggering"
    COMPLETED = "completed"
    COMPLETED_WITH_FAILURES = "completed_with_failures"
    FAILED = "failed"


class TriggerState(enum.StrEnum):
    """How far a trigger has come; see `next_step`."""

    INTENT = "intent"  # decided and recorded; Keboola has certainly not seen it
    SENDING = "sending"  # the POST may be on its way
    SENT = "sent"  # the Keboola job's id is known
    REJECTED = "rejected"  # Keboola said no
    UNKNOWN = "unknown"  # the POST's outcome is not known: only a search can tell


class Secret:
    """A token that cannot be printed by accident; `reveal` is the only way to its value."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value, for a request header."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not for storing")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something stands in a file; line and column count from 1."""

    line: int = 1
    column: int = 1


def one_line(text: str, limit: int = 500) -> str:
    """Return `text` as one printable line of valid Unicode, at most `limit` characters long."""
    text = text[: 4 * limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: where, what, and what to write instead."""

    file: str
    place: Place
    path: str
    what: str
    cure: str

    def __str__(self) -> str:
        subject = f"{self.path}: " if self.path else ""
        text = f"{subject}{self.what}; {self.cure}"
        return f"{self.file}:{self.place.line}:{self.place.column}: {one_line(text, 1000)}"


@dataclass(frozen=True, slots=True)
class SecretSource:
    """Where a secret's value comes from: `value` (Fernet token), `env` or `file`, and its place.

    `text` is a Secret because people first write their tokens in plain. `span` is the character
    range of the node in the config's text.
    """

    kind: str
    text: Secret
    place: Place
    span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class OpenAISecret:
    """An entry under `secrets` with `type: openai`."""

    kind: ClassVar[str] = "openai"

    name: str
    source: SecretSource
    base_url: str
    organization: str | None = None
    project: str | None = None


@dataclass(frozen=True, slots=True)
class KeboolaSecret:
    """An entry under `secrets` with `type: keboola`: a token is valid on one stack only."""

    kind: ClassVar[str] = "keboola"

    name: str
    source: SecretSource
    stack_url: str


@dataclass(frozen=True, slots=True)
class WebhookSecret:
    """An entry under `secrets` with `type: webhook`: its value is an address that takes a POST."""

    kind: ClassVar[str] = "webhook"

    name: str
    source: SecretSource


AnySecret = OpenAISecret | KeboolaSecret | WebhookSecret


class Told(enum.StrEnum):
    """What webhooks can be told, in the order of how much a person is needed."""

    JOB_FAILED = "job_failed"
    TRIGGER_UNKNOWN = "trigger_unknown"
    ACCOUNT_FAILING = "account_failing"
    CONFIG_REJECTED = "config_rejected"
    COMPLETED_WITH_FAILURES = "completed_with_failures"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True)
class Hook:
    """An entry under `notify`: the webhook that is told, and of which events."""

    secret: str
    events: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The Keboola configuration that a job starts."""

    stack_url: str
    component_id: str
    config_id: str
    branch_id: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the config has it, with `defaults` filled in."""

    name: str
    batch_ids: tuple[str, ...]
    openai_secret: str
    keboola_secret: str
    component_id: str
    config_id: str
    branch_id: str | None = None
    config_row_ids: tuple[str, ...] = ()
    mode: str = "run"
    variables: tuple[tuple[str, str], ...] = ()
    poll_interval_s: int = 30  # see the README on how many requests that takes
    paused: bool = False
    done: bool = False  # by something else: nothing is to be started

    @property
    def rests(self) -> bool:
        """Whether neither its batches are looked at nor its Keboola job is started."""
        return self.paused or self.done


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The config's `log`."""

    level: str = "info"
    format: str = "auto"
    retention_s: int = 30 * DAY_S


@dataclass(frozen=True, slots=True)
class Limits:
    """The config's `limits`."""

    max_concurrency: int = 10
    request_timeout_s: int = 30
    trigger_grace_s: int = 60


@dataclass(frozen=True, slots=True)
class Config:
    """A config file, read and checked, its secrets still closed."""

    path: Path
    sha256: str
    state_path: Path
    key_path: Path
    key_place: Place = Place()
    publish_path: Path | None = None
    log: LogSettings = LogSettings()
    limits: Limits = Limits()
    openai: Mapping[str, OpenAISecret] = field(default_factory=dict)
    keboola: Mapping[str, KeboolaSecret] = field(default_factory=dict)
    webhook: Mapping[str, WebhookSecret] = field(default_factory=dict)
    notify: tuple[Hook, ...] = ()
    jobs: Mapping[str, Job] = field(default_factory=dict)

    @property
    def secrets(self) -> Mapping[str, AnySecret]:
        """All entries of `secrets`, by name."""
        return {**self.openai, **self.keboola, **self.webhook}

    def target(self, job: Job) -> Target:
        """Return what `job` starts."""
        stack_url = self.keboola[job.keboola_secret].stack_url
        return Target(stack_url, job.component_id, job.config_id, job.branch_id)


@dataclass(frozen=True, slots=True)
class Setup:
    """A config with its secrets opened: what the daemon runs with, swapped as one reference."""

    config: Config
    secrets: Mapping[str, Secret]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Account:
    """One OpenAI account: the key and where it is used."""

    key: Secret
    base_url: str
    organization: str | None
    project: str | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What is known of one batch. Times are Unix seconds as OpenAI reported them."""

    id: str
    status: str | None = None  # None: not looked at yet
    total: int | None = None
    completed: int | None = None
    failed: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: float | None = None
    ended_at: float | None = None
    error: str | None = None
    fileless_since: float | None = None  # it has ended, and its files are still waited for

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended, with all that is to be told of it."""
        return self.status in TERMINAL and self.fileless_since is None

    @property
    def lacks_files(self) -> bool:
        """Whether it has ended without a file that its counts promise."""
        return self.status in TERMINAL and bool(
            (self.completed and not self.output_file_id) or (self.failed and not self.error_file_id)
        )


@dataclass(frozen=True, slots=True)
class Page:
    """A page of an account's list of batches, which is newest first.

    `ids` are those of all rows, `batches` the watched ones among them. The times are when the first
    and the last row were created, in Unix seconds.
    """

    ids: Sequence[str]
    batches: Mapping[str, Batch]
    newest_at: float | None
    oldest_at: float | None
    has_more: bool


@dataclass(frozen=True, slots=True)
class Moment:
    """A time that can be measured from after a restart, whatever the clock was set to meanwhile.

    `uptime_s` counts since the machine's boot, and `boot` tells one boot from another; where the
    system does not say, `boot` is empty, and only the wall clock is left.
    """

    wall: float
    boot: str = ""
    uptime_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trigger:
    """One start of a Keboola job, from the decision to the job's id. Times are Unix seconds.

    Until it was `sending` once, it follows the config; from then on `target`, `project_id` and
    `payload` stay what they were. `project_id` is Keboola's, None until it is asked for. `basis` is
    a digest of what the trigger was made from: a new one arms a rejected one again. `unknowns`
    counts the POSTs in a row whose outcome is unknown, `asked_wait_s` is what the server asked for
    with the last one, and `said` is what came of it.
    """

    id: str
    rerun: int
    state: TriggerState
    target: Target
    secret: str
    payload: str
    basis: str
    created_at: float
    sending_at: float | None = None
    unknown_at: float | None = None
    unknown_boot: str = ""
    unknown_uptime_s: float = 0.0
    clear_searches: int = 0
    forced: bool = False
    failures: int = 0
    next_try_at: float | None = None
    sent_at: float | None = None
    keboola_job_id: str | None = None
    keboola_status: str | None = None
    url: str | None = None
    error: str | None = None
    project_id: str | None = None
    unknowns: int = 0
    asked_wait_s: float = 0.0
    said: str | None = None

    @property
    def follows_config(self) -> bool:
        """Whether Keboola has certainly not seen it: a mistyped stack or token is corrected."""
        return self.state == TriggerState.INTENT and self.sending_at is None

    @property
    def made_of(self) -> tuple[object, ...]:
        """What it takes from the config."""
        return self.target, self.secret, self.payload, self.basis

    @property
    def unknown_since(self) -> Moment | None:
        """When the outcome of the POST was recorded as unknown."""
        if self.unknown_at is None:
            return None
        return Moment(self.unknown_at, self.unknown_boot, self.unknown_uptime_s)


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work: a job's name and its set of batch ids, with all that is known of it."""

    id: int
    name: str
    batches: tuple[Batch, ...]
    target: Target
    position: int | None  # its place among the config's jobs; None: not in the config
    paused: bool = False
    done: bool = False
    rerun: int = 0
    error: str | None = None
    failures: int = 0
    last_check_at: float | None = None
    next_check_at: float | None = None
    completed_at: float | None = None
    trigger: Trigger | None = None

    @property
    def is_ready(self) -> bool:
        """Whether every batch has ended, which is when the Keboola job is due."""
        return all(batch.is_terminal for batch in self.batches)

    @property
    def is_finished(self) -> bool:
        return self.trigger is not None and self.trigger.state == TriggerState.SENT


@dataclass(frozen=True, slots=True)
class Request:
    """A `retry` that someone asked for, and what the work was like when they did."""

    id: int
    job: str
    force: bool
    rerun: int
    was_finished: bool


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log: a stable snake_case fact and its fields."""

    name: str
    level: str = "info"
    job: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogRow:
    """An event as the state file keeps it; `at` is Unix seconds."""

    id: int
    at: float
    event: Event


@dataclass(frozen=True, slots=True)
class Usage:
    """How the requests with one secret have fared since the state file began. Unix seconds."""

    service: str  # the secret's type
    requests: int = 0
    errors: int = 0  # of the requests: all that brought no 2xx
    last_success_at: float | None = None
    refused_since: float | None = None  # the server has refused the key ever since,
    last_refused_at: float | None = None  # and did so the last time then
    error: str | None = None  # what became of the last request, if it failed


@dataclass(frozen=True, slots=True)
class Message:
    """What webhooks are told of an event, once; and with `is_over` once more, when it is over.

    `subject` tells it from the same event elsewhere: the number of a piece of work, or a secret.
    """

    event: Told
    subject: str
    text: str
    job: str | None = None
    is_over: bool = False

    @property
    def lasts(self) -> bool:
        """Whether it is something that will be over some day."""
        return self.event not in {Told.COMPLETED, Told.COMPLETED_WITH_FAILURES}


@dataclass(frozen=True, slots=True)
class Mail:
    """Messages, and what is to be posted for them: names of webhooks with JSON bodies."""

    messages: Sequence[Message] = ()
    copies: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Notice:
    """A message on its way to one webhook. Times are Unix seconds."""

    id: int
    at: float
    secret: str
    body: str
    failures: int
    next_try_at: float


@dataclass(frozen=True, slots=True)
class KeboolaJob:
    """A Keboola job as the queue shows it; `trigger_id` is None where the row does not tell."""

    id: str
    status: str | None
    url: str | None
    created_time: datetime | None
    trigger_id: str | None


def quoted(text: str) -> str:
    """Return a user's text in quotes, on one line, not too long for a message."""
    return f'"{one_line(text, 60)}"'


def compact_json(value: object) -> str:
    """Return JSON without spaces, in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def rfc3339(unix_s: float | None) -> str | None:
    """Return a Unix time as RFC 3339 in UTC, to the second."""
    if unix_s is None:
        return None
    within = min(max(unix_s, 0.0), LAST_S)
    return datetime.fromtimestamp(int(within), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ==================================================================================================
# 3. Config: text in, Config out; every problem with its place and its cure
# ==================================================================================================

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
MAX_DEPTH: Final = 64  # libyaml's composer recurses and takes the process down at some 30,000
TOO_DEEP: Final = (f"nests deeper than {MAX_DEPTH}", "flatten it")
MAX_NODES: Final = 1_000_000  # 10,000 jobs have some 400,000
MAX_ALIAS_NODES: Final = 250_000  # what aliases may add: 10,000 jobs with twelve merged keys each
BYTE_ORDER_MARK: Final = "\ufeff"
MIN_GRACE_S: Final = 30
OPENAI_URL: Final = "https://api.openai.com/v1"
DEFAULT_STATE: Final = "teckochecker.db"
DEFAULT_KEY: Final = "teckochecker.key"

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is five times faster
_YAML_TAG: Final = "tag:yaml.org,2002:"
_TEXT_TAGS: Final = ("str", "int", "float", "bool", "timestamp", "value", "merge")
_TRUTH: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DURATION = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")

_REQUIRED_OF_JOB: Final = (
    "batch_ids",
    "openai_secret",
    "keboola_secret",
    "component_id",
    "config_id",
)
_BATCH_ID: Final = r"batch_[A-Za-z0-9_-]{1,249}"
_KEBOOLA_ID: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}"
_VARIABLE_NAME: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_HEADER_VALUE: Final = r"[!-~]{1,255}"

TRIGGER_ID_VARIABLE: Final = "teckochecker_trigger_id"
OWN_VARIABLES: Final = (
    "batch_ids_completed",
    "batch_ids_failed",
    "batch_count_total",
    "batch_count_completed",
    "batch_count_failed",
    "batch_statuses",
    "batch_output_file_ids",
    "batch_error_file_ids",
    "teckochecker_job",
    TRIGGER_ID_VARIABLE,
)


def place_of(mark: Any) -> Place:  # noqa: ANN401 - the two YAML loaders have marks of their own
    """Return the place of a YAML mark, which counts from 0."""
    return Place(mark.line + 1, mark.column + 1)


@dataclass(frozen=True, slots=True)
class Draft:
    """What could be read of a config, and what is wrong with it; fit for use without problems."""

    config: Config
    problems: list[Problem]


@dataclass(slots=True)
class Cursor:
    """A node of the YAML tree, the path to it, and the list that its problems go to."""

    node: yaml.Node
    path: str
    file: str
    problems: list[Problem]
    key: yaml.Node | None = None

    @property
    def place(self) -> Place:
        return place_of(self.node.start_mark)

    @property
    def key_place(self) -> Place:
        """Where the node's key stands, for what is missing or should not be there at all."""
        return place_of((self.key or self.node).start_mark)

    @property
    def is_null(self) -> bool:
        return self.node.tag == _YAML_TAG + "null"

    def bad(self, what: str, cure: str, place: Place | None = None) -> None:
        """Note a problem here; returns None, for `return at.bad(...)`."""
        self.problems.append(Problem(self.file, place or self.place, self.path, what, cure))

    def text(self, cure: str) -> str | None:
        """Return a scalar's text just as written (`0123` stays so), or None and a problem."""
        if self.is_null:
            return self.bad("is empty", cure)
        if not isinstance(self.node, yaml.ScalarNode):
            return self.bad("is not a single value", cure)
        if not self._has_tag(_TEXT_TAGS, cure):
            return None
        return str(self.node.value).strip()

    def _has_tag(self, tags: Iterable[str], cure: str) -> bool:
        """Check the node's tag: a custom one asks for what this program does not do."""
        if self.node.tag.removeprefix(_YAML_TAG) in tags:
            return True
        self.bad(f"the tag {quoted(self.node.tag)} means nothing here", cure)
        return False

    def items(self, cure: str) -> list[Cursor]:
        """Return a list's elements, or nothing and a problem."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.bad("is not a list", cure)
            return []
        if not self._has_tag(("seq",), cure):
            return []
        return [self._child(node, f"[{i}]") for i, node in enumerate(self.node.value)]

    def entries(self, cure: str) -> dict[str, Cursor]:
        """Return a mapping's values by key, merge keys (`<<`) resolved; duplicates are problems."""
        if not isinstance(self.node, yaml.MappingNode):
            self.bad("is not a mapping", cure)
            return {}
        if not self._has_tag(("map",), cure):
            return {}
        own: dict[str, Cursor] = {}
        merged: dict[str, Cursor] = {}
        for key, value in self.node.value:
            if key.tag == _YAML_TAG + "merge":
                self._merge(value, merged)
            elif not isinstance(key, yaml.ScalarNode):
                self.bad("a key is not a single value", cure, place_of(key.start_mark))
            elif key.value in own:
                line = own[key.value].key_place.line
                what = f"the key {self._shown(key.value)} stands here and in line {line}"
                self.bad(what, "keep one of them", place_of(key.start_mark))
            else:
                own[key.value] = self._child(value, key.value, key)
        return merged | own

    def fields(
        self, allowed: Iterable[str], cure: str = "write keys and values"
    ) -> dict[str, Cursor]:
        """Return a mapping's values by key; a key that is not allowed is a problem."""
        return self.only(self.entries(cure), allowed)

    def only(self, entries: Mapping[str, Cursor], allowed: Iterable[str]) -> dict[str, Cursor]:
        """Return the entries that are allowed here; the others are problems."""
        names = tuple(allowed)
        for name, at in entries.items():
            if name not in names:
                what = f"the key {self._shown(name)} is not known"
                self.bad(what, f"allowed here: {', '.join(names)}", at.key_place)
        return {name: at for name, at in entries.items() if name in names}

    def _shown(self, key: str) -> str:
        """Return a key for a message; among secrets it may be a token that someone pasted."""
        is_plain = not self.path.startswith("secrets.") or re.fullmatch("[a-z_]{1,30}", key)
        return quoted(key) if is_plain else "written here"

    def _merge(self, node: yaml.Node, merged: dict[str, Cursor]) -> None:
        """Add what a merge key brings; of several mappings the first one wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            at = self._child(source, "<<", node)
            for name, entry in at.entries("merge a mapping or a list of mappings").items():
                merged.setdefault(name, entry)

    def _child(self, node: yaml.Node, name: str, key: yaml.Node | None = None) -> Cursor:
        joint = "." if self.path and key else ""
        return Cursor(node, f"{self.path}{joint}{name}", self.file, self.problems, key)


Reader = Callable[[Cursor], Any]
T = TypeVar("T")


def parse_duration(text: str) -> int | None:
    """Return the seconds of `30s`, `1h30m`, `7d` or a whole number; None for anything else."""
    if re.fullmatch("[0-9]{1,12}", text):
        return int(text)
    match = _DURATION.fullmatch(text)
    if not text or not match or len(text) > 30:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * DAY_S + hours * HOUR_S + minutes * MINUTE_S + seconds


def show_duration(seconds: float) -> str:
    """Return seconds in the config's notation, the two largest units: `1h30m`."""
    rest = max(0, round(seconds))
    parts = []
    for unit, size in (("d", DAY_S), ("h", HOUR_S), ("m", MINUTE_S), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def is_loopback(url: str) -> bool:
    """Return whether a URL's host is this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
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


def webhook_problem(url: str) -> str | None:
    """Return what is wrong with a webhook's address, whose query may be its password, or None."""
    return url_problem(url.partition("?")[0])


# --- readers: one value each; None where a problem was noted --------------------------------------


def read_matching(pattern: str, cure: str) -> Callable[[Cursor], str | None]:
    """Return a reader of text that matches `pattern` as a whole."""
    compiled = re.compile(pattern)

    def read(at: Cursor) -> str | None:
        text = at.text(cure)
        if text is None or compiled.fullmatch(text):
            return text
        return at.bad(f"{quoted(text)} is not one", cure)

    return read


def read_choice(*choices: str) -> Callable[[Cursor], str | None]:
    """Return a reader of one word out of several."""

    def read(at: Cursor) -> str | None:
        cure = f"write {', '.join(choices[:-1])} or {choices[-1]}"
        text = at.text(cure)
        if text is None or text in choices:
            return text
        return at.bad(f"{quoted(text)} is not one of them", cure)

    return read


def read_duration(least_s: int, most_s: int) -> Callable[[Cursor], int | None]:
    """Return a reader of a duration within limits, in seconds."""

    def read(at: Cursor) -> int | None:
        text = at.text("write 30s, 2m or 1h")
        if text is None:
            return None
        seconds = parse_duration(text)
        if seconds is None:
            return at.bad(f"{quoted(text)} is not a duration", "write 30s, 2m or 1h")
        if not least_s <= seconds <= most_s:
            limits = f"{show_duration(least_s)} to {show_duration(most_s)}"
            return at.bad(f"{quoted(text)} is out of range", f"write {limits}")
        return seconds

    return read


def read_count(least: int, most: int) -> Callable[[Cursor], int | None]:
    """Return a reader of a whole number within limits."""

    def read(at: Cursor) -> int | None:
        cure = f"write a whole number from {least} to {most}"
        text = at.text(cure)
        if text is None:
            return None
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            return at.bad(f"{quoted(text)} is not one", cure)
        return int(text)

    return read


def read_bool(at: Cursor) -> bool | None:
    """Read true or false."""
    text = at.text("write true or false")
    if text is None:
        return None
    if at.node.tag != _YAML_TAG + "bool" or text.lower() not in _TRUTH:
        return at.bad(f"{quoted(text)} is neither true nor false", "write true or false")
    return _TRUTH[text.lower()]


def read_url(at: Cursor) -> str | None:
    """Read a server's address: https, or http on a loopback address. It is never echoed."""
    cure = "write https://host (http only on a loopback address)"
    text = at.text(cure)
    if text is None:
        return None
    problem = url_problem(text)
    return at.bad(problem, cure) if problem else text.rstrip("/")


def read_stack_url(at: Cursor) -> str | None:
    """Read a Keboola stack's address; people paste the address of a page of theirs."""
    url = read_url(at)
    if url is None:
        return None
    parts = urllib.parse.urlsplit(url)
    if parts.path and (parts.hostname or "").startswith("connection."):
        return at.bad("has a path", f"write {parts.scheme}://{parts.netloc}")
    return url


def read_path(at: Cursor) -> str | None:
    """Read a file's path."""
    text = at.text("write a path")
    if text is not None and (not text or "\0" in text):
        return at.bad("is empty", "write a path")
    return text


def read_batch_ids(at: Cursor) -> tuple[str, ...] | None:
    """Read 1 to 10 different batch ids."""
    cure = "write a list of 1 to 10 batch ids"
    read_id = read_matching(_BATCH_ID, "write batch_ and then letters, digits, _ or -")
    items = at.items(cure)
    ids = [read_id(item) for item in items]
    if isinstance(at.node, yaml.SequenceNode) and not 1 <= len(items) <= 10:
        return at.bad(f"has {len(items)} batch ids", cure)
    for i, (item, batch_id) in enumerate(zip(items, ids, strict=True)):
        if batch_id is not None and batch_id in ids[:i]:
            return item.bad(f"{quoted(batch_id)} stands here twice", "keep one of them")
    good = tuple(batch_id for batch_id in ids if batch_id is not None)
    return good if items and len(good) == len(items) else None


def read_row_ids(at: Cursor) -> tuple[str, ...] | None:
    """Read the ids of configuration rows."""
    read_id = read_matching(_KEBOOLA_ID, "write the row's id")
    ids = [read_id(item) for item in at.items("write a list of row ids")]
    return None if None in ids else tuple(str(row_id) for row_id in ids)


def plain_value(at: Cursor) -> object:
    """Return a node as a JSON value; what is no JSON number stays the text that was written."""
    cure = "write what JSON knows: text, numbers, lists, and mappings with plain keys"
    if isinstance(at.node, yaml.SequenceNode):
        return [plain_value(item) for item in at.items(cure)]
    if isinstance(at.node, yaml.MappingNode):
        return {key: plain_value(item) for key, item in at.entries(cure).items()}
    text = None if at.is_null else at.text(cure)
    if text is None:
        return None
    if at.node.tag == _YAML_TAG + "bool":
        return _TRUTH.get(text.lower(), text)
    is_number = at.node.tag in {_YAML_TAG + "int", _YAML_TAG + "float"}
    if is_number and re.fullmatch(r"-?(0|[1-9][0-9]{0,15})(\.[0-9]+)?", text):
        return json.loads(text)
    return text


def read_variables(at: Cursor) -> tuple[tuple[str, str], ...] | None:
    """Read a job's own Keboola variables: text as written, lists and mappings as JSON."""
    values = {}
    for name, item in at.entries("write names and values").items():
        if name in OWN_VARIABLES:
            item.bad("the name is taken by teckochecker", "choose another name")
        elif not re.fullmatch(_VARIABLE_NAME, name):
            item.bad("the name is not one", "use letters, digits, _ . and -")
        elif isinstance(item.node, yaml.ScalarNode):
            values[name] = item.text("write a value")
            if values[name] == "":
                item.bad("is empty", "write a value: Keboola takes no empty ones")
        else:
            values[name] = compact_json(plain_value(item))
    good = isinstance(at.node, yaml.MappingNode) and None not in values.values()
    return tuple((name, str(value)) for name, value in values.items()) if good else None


def read_secret_name(kind: str, kinds: Mapping[str, str | None]) -> Reader:
    """Return a reader of the name of a secret of one kind; `kinds` are those of all secrets.

    A kind of None is one that could not be read, which is a problem of its own already.
    """
    names = ", ".join(name for name in kinds if kinds[name] == kind) or "none there yet"
    cure = f"name a secret of type {kind}: {names}"

    def read(at: Cursor) -> str | None:
        name = at.text(cure)
        if name is None or kinds.get(name, "") in {kind, None}:
            return name
        if name in kinds:
            return at.bad(f"{quoted(name)} is a secret of another type", cure)
        return at.bad("is not the name of a secret", cure)  # not echoed: it may be a token itself

    return read


# --- the parts of the file ------------------------------------------------------------------------

_DURATIONS: Final = {"retention", "request_timeout", "trigger_grace", "poll_interval"}
_BAD: Final = object()  # a key is there, but its value has a problem that is already noted


def read_values(found: Mapping[str, Cursor], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Return what the readers make of the values that are there; null is `not there`."""
    values: dict[str, Any] = {}
    for key, at in found.items():
        if at.is_null:
            values[key] = None
        else:
            value = readers[key](at)
            values[key] = _BAD if value is None else value
    return values


def is_good(values: Mapping[str, Any]) -> bool:
    """Return whether every value could be read."""
    return all(value is not _BAD for value in values.values())


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are there and could be read, by attribute of the model.

    What is left out takes its default there. Durations carry their unit in the model only.
    """
    good = {key: value for key, value in values.items() if value is not None and value is not _BAD}
    return {f"{key}_s" if key in _DURATIONS else key: value for key, value in good.items()}


def read_log(at: Cursor) -> LogSettings:
    """Read `log`."""
    readers: dict[str, Reader] = {
        "level": read_choice("debug", "info", "warning", "error"),
        "format": read_choice("auto", "console", "json"),
        "retention": read_duration(HOUR_S, 3650 * DAY_S),
    }
    return LogSettings(**given(read_values(at.fields(readers), readers)))


def read_limits(at: Cursor, *, loopback_only: bool) -> Limits:
    """Read `limits`; a short grace is for tests, where the stack is on a loopback address."""
    least_grace_s = 0 if loopback_only else MIN_GRACE_S
    readers: dict[str, Reader] = {
        "max_concurrency": read_count(1, 100),
        "request_timeout": read_duration(1, 60),
        "trigger_grace": read_duration(least_grace_s, DAY_S),
    }
    return Limits(**given(read_values(at.fields(readers), readers)))


def read_source(at: Cursor, found: dict[str, Cursor]) -> SecretSource | None:
    """Read where a secret's value comes from. What stands there is never echoed."""
    kinds = [kind for kind in ("value", "env", "file") if kind in found]
    cure = "write one of value (a Fernet token), env (a variable's name) or file (a path)"
    if len(kinds) != 1:
        return at.bad(f"has {' and '.join(kinds)}" if kinds else "has no value", cure)
    source = found[kinds[0]]
    text = source.text(cure)
    if text is None:
        return None
    if not text or "\0" in text:
        return source.bad("is empty", cure)
    span = (source.node.start_mark.index, source.node.end_mark.index)
    return SecretSource(kinds[0], Secret(text), source.place, span)


_HEADER = read_matching(_HEADER_VALUE, "write printable ASCII without spaces")
_SECRET_READERS: Final[Mapping[str, Mapping[str, Reader]]] = {
    "openai": {"base_url": read_url, "organization": _HEADER, "project": _HEADER},
    "keboola": {"stack_url": read_stack_url},
    "webhook": {},
}


def read_secret_kind(at: Cursor, entries: Mapping[str, Cursor]) -> str | None:
    """Read which type of secret an entry is. What stands there is never echoed."""
    cure = "write type: openai, type: keboola or type: webhook"
    if "type" not in entries:
        return at.bad("type is missing", cure, at.key_place)
    kind = entries["type"].text(cure)
    if kind is not None and kind not in _SECRET_READERS:
        return entries["type"].bad("is not a type of secret", cure)
    return kind


def read_secret(name: str, at: Cursor) -> AnySecret | None:
    """Read one entry of `secrets`."""
    entries = at.entries("write type: and what belongs to it, each on its own line")
    if not isinstance(at.node, yaml.MappingNode):
        return None
    kind = read_secret_kind(at, entries)
    if kind is None:
        return None
    noted_before = len(at.problems)
    readers = _SECRET_READERS[kind]
    found = at.only(entries, ("type", "value", "env", "file", *readers))
    values = read_values({key: found[key] for key in readers if key in found}, readers)
    source = read_source(at, found)
    if not re.fullmatch(_NAME, name):
        at.bad("the name is not one", "use letters, digits, . _ and -", at.key_place)
    if kind == "keboola" and values.get("stack_url") is None:
        cure = "add stack_url: https://connection.keboola.com"
        at.bad("stack_url is missing", cure, at.key_place)
    if source is None or len(at.problems) > noted_before:
        return None
    if kind == "keboola":
        return KeboolaSecret(name, source, **given(values))
    if kind == "webhook":
        return WebhookSecret(name, source)
    return OpenAISecret(name, source, **({"base_url": OPENAI_URL} | given(values)))


def job_readers(secret_kinds: Mapping[str, str | None]) -> dict[str, Reader]:
    """Return the readers of a job's keys, which are also those of `defaults`."""
    keboola_id = read_matching(_KEBOOLA_ID, "copy the id from Keboola: letters, digits, . _ and -")
    return {
        "batch_ids": read_batch_ids,
        "openai_secret": read_secret_name("openai", secret_kinds),
        "keboola_secret": read_secret_name("keboola", secret_kinds),
        "component_id": keboola_id,
        "config_id": keboola_id,
        "branch_id": keboola_id,
        "config_row_ids": read_row_ids,
        "mode": read_choice("run", "forceRun", "debug"),
        "variables": read_variables,
        "poll_interval": read_duration(1, DAY_S),
        "paused": read_bool,
        "done": read_bool,
    }


def read_job(
    name: str, at: Cursor, readers: Mapping[str, Reader], defaults: Mapping[str, Any]
) -> Job | None:
    """Read one job; its own values win over `defaults`."""
    found = at.fields(readers, "write batch_ids, config_id and so on, each on its own line")
    if not isinstance(at.node, yaml.MappingNode):
        return None
    values = {**defaults, **read_values(found, readers)}
    missing = [key for key in _REQUIRED_OF_JOB if values.get(key) is None]
    for key in missing:
        also = "" if key == "batch_ids" else " or under defaults"
        at.bad(f"{key} is missing", f"add {key}: here{also}", at.key_place)
    if len(name) > 200 or name != name.strip() or not name or not name.isprintable():
        return at.bad("the name is not one", "use 1 to 200 printable characters", at.key_place)
    if missing or not is_good(values):
        return None
    return Job(name, **given(values))


def read_hooks(at: Cursor, secret_kinds: Mapping[str, str | None]) -> tuple[Hook, ...]:
    """Read `notify`; without `events`, a webhook is told all of them."""
    read_event = read_choice(*Told)

    def read_events(events: Cursor) -> tuple[str, ...] | None:
        cure = "write a list of events, or none of the key for all"
        words = [read_event(item) for item in events.items(cure)]
        if isinstance(events.node, yaml.SequenceNode) and not words:
            return events.bad("is empty", cure)
        return tuple(str(word) for word in words) if words and None not in words else None

    cure = "write - {secret: NAME, events: [job_failed]}"
    readers: dict[str, Reader] = {
        "secret": read_secret_name("webhook", secret_kinds),
        "events": read_events,
    }
    hooks = []
    for item in at.items(cure):
        values = read_values(item.fields(readers, cure), readers)
        if isinstance(item.node, yaml.MappingNode) and values.get("secret") is None:
            item.bad("secret is missing", "name a secret of type webhook")
        elif "secret" in values and is_good(values):
            hooks.append(Hook(values["secret"], values.get("events", tuple(Told))))
    return tuple(hooks)


def read_entries(at: Cursor | None, read: Callable[[str, Cursor], T | None]) -> dict[str, T | None]:
    """Return what `read` makes of each entry of a mapping, by name; None is what it refused."""
    entries = at.entries("write names, each with its own keys below it") if at else {}
    return {name: read(name, child) for name, child in entries.items()}


_PATHS: Final = ("state", "key_file", "publish")
_PARTS: Final = (*_PATHS, "log", "limits", "secrets", "notify", "defaults", "jobs")


def read_config(root: Cursor, path: Path, sha256: str) -> Config:
    """Read the whole tree."""
    found = {k: at for k, at in root.fields(_PARTS).items() if not at.is_null}
    paths = {key: read_path(found[key]) for key in _PATHS if key in found}
    secrets = read_entries(found.get("secrets"), read_secret)
    openai = {name: s for name, s in secrets.items() if isinstance(s, OpenAISecret)}
    keboola = {name: s for name, s in secrets.items() if isinstance(s, KeboolaSecret)}
    webhook = {name: s for name, s in secrets.items() if isinstance(s, WebhookSecret)}
    kinds = {name: getattr(secret, "kind", None) for name, secret in secrets.items()}
    readers = job_readers(kinds)
    defaults: dict[str, Any] = {}
    if "defaults" in found:
        defaults = read_values(found["defaults"].fields(readers), readers)
    if "jobs" not in found:
        root.bad("jobs is missing or empty", "list them under jobs:, or write jobs: {} for none")
    jobs = read_entries(found.get("jobs"), lambda name, at: read_job(name, at, readers, defaults))
    config = Config(
        path=path,
        sha256=sha256,
        state_path=path.parent / (paths.get("state") or DEFAULT_STATE),
        key_path=path.parent / (paths.get("key_file") or DEFAULT_KEY),
        key_place=(found.get("key_file") or found.get("secrets") or root).place,
        publish_path=path.parent / publish if (publish := paths.get("publish")) else None,
        openai=openai,
        keboola=keboola,
        webhook=webhook,
        jobs={
            name: job
            for name, job in jobs.items()
            if job and job.openai_secret in openai and job.keboola_secret in keboola
        },
    )
    if "log" in found:
        config = replace(config, log=read_log(found["log"]))
    if "notify" in found:
        config = replace(config, notify=read_hooks(found["notify"], kinds))
    if "limits" in found:
        loopback_only = all(is_loopback(secret.stack_url) for secret in keboola.values())
        config = replace(config, limits=read_limits(found["limits"], loopback_only=loopback_only))
    return config


# --- from text to tree ----------------------------------------------------------------------------


class RefusedError(Exception):
    """A file that is not even given to the YAML composer."""

    def __init__(self, place: Place, what: str, cure: str) -> None:
        super().__init__(what)
        self.place, self.what, self.cure = place, what, cure


class SizeGuard:
    """Counts the nodes that a file will have once its aliases stand for what they name.

    The size of what an alias names counts the aliases inside it, so that a bomb is seen before it
    goes off.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # of what has an anchor
        self._open: list[tuple[str | None, int]] = []  # anchor, and the count when it was opened
        self._count = 0
        self._added = 0

    def see(self, event: yaml.Event) -> None:
        """Take the next event of the YAML parser. Raises RefusedError."""
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self._open.pop()
            if anchor:
                self._sizes[anchor] = self._count - before
        if not isinstance(event, yaml.NodeEvent):
            return
        place = place_of(event.start_mark)
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, self._count))
            if len(self._open) > MAX_DEPTH:
                raise RefusedError(place, *TOO_DEEP)
        if isinstance(event, yaml.AliasEvent):
            self._see_alias(str(event.anchor), place)
        self._count += 1
        if self._count > MAX_NODES:
            raise RefusedError(place, f"has over {MAX_NODES:,} values", "split it up")

    def _see_alias(self, anchor: str, place: Place) -> None:
        if any(anchor == name for name, _ in self._open):
            raise RefusedError(place, "an alias stands inside what it names", "take it out")
        size = self._sizes.get(anchor, 1)
        self._added += size
        self._count += size
        if self._added > MAX_ALIAS_NODES:
            raise RefusedError(place, "aliases repeat too much", "write fewer of them")


def guard(text: str) -> None:
    """Refuse what would cost the process its stack, its memory or its time, before composing it."""
    if not text.strip("\ufeff \t\r\n"):
        raise RefusedError(Place(), "the file is empty", "write a config; see config.example.yaml")
    unprintable = _UNPRINTABLE.search(text)
    if unprintable:
        line = text.count("\n", 0, unprintable.start()) + 1
        column = unprintable.start() - (text.rfind("\n", 0, unprintable.start()) + 1) + 1
        what = f"has the control character {ord(unprintable[0]):#04x}"
        raise RefusedError(Place(line, column), what, "a config is plain text: take it out")
    sizes = SizeGuard()
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        sizes.see(event)


def compose(text: str, path: Path, problems: list[Problem]) -> Cursor | None:
    """Return a cursor at the root of the YAML tree, or None and a problem."""
    try:
        text = text.removeprefix(BYTE_ORDER_MARK)  # libyaml would not count it in its marks
        guard(text)
        node = yaml.compose(text, Loader=_YAML_LOADER)
    except RefusedError as refused:
        problems.append(Problem(str(path), refused.place, "", refused.what, refused.cure))
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = " ".join(
            filter(None, (getattr(error, "context", ""), getattr(error, "problem", "")))
        )
        place = place_of(mark) if mark else Place()
        if "nesting depth" in what:  # a libyaml with a limit of its own reads ahead, and is faster
            problems.append(Problem(str(path), place, "", *TOO_DEEP))
            return None
        cure = "mend the YAML here or just above: indentation (no tabs), quotes, brackets"
        problems.append(Problem(str(path), place, "", f"is not YAML: {what or 'unreadable'}", cure))
        return None
    if not isinstance(node, yaml.MappingNode):
        where = place_of(node.start_mark) if node else Place()  # None: nothing but comments
        cure = "write secrets:, jobs: and so on; see config.example.yaml"
        problems.append(Problem(str(path), where, "", "is not a mapping of keys", cure))
        return None
    return Cursor(node, "", str(path), problems)


def parse_config(text: str, path: Path) -> Draft:
    """Return the config that `text` says, and everything that is wrong with it.

    `path` is the file's name for messages, and what relative paths in it are relative to. Where
    there are problems, the config holds what could be read: `status` finds the state file with it.
    """
    problems: list[Problem] = []
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    state = re.search(r"^state:[ \t]*[\"']?([^\"'#\n]+)", text, re.MULTILINE)
    state_path = path.parent / (state[1].strip() if state else DEFAULT_STATE)
    nothing = Config(path, sha256, state_path, path.parent / DEFAULT_KEY)
    root = compose(text, path, problems)
    if root is None:
        return Draft(nothing, problems)
    try:
        return Draft(read_config(root, path, sha256), problems)
    except RecursionError:  # aliases inside aliases go deeper than what is written
        problems.append(Problem(str(path), Place(), "", "nests too deep", "write fewer aliases"))
        return Draft(nothing, problems)


def secret_entries(text: str, path: Path, problems: list[Problem]) -> dict[str, dict[str, Cursor]]:
    """Return what stands under each name in `secrets`, whatever else is wrong with the config."""

    def entries(at: Cursor | None) -> dict[str, Cursor]:
        return at.entries("") if at and isinstance(at.node, yaml.MappingNode) else {}

    root = compose(text, path, problems)
    return {name: entries(at) for name, at in entries(entries(root).get("secrets")).items()}


def secret_values(text: str, path: Path, problems: list[Problem]) -> dict[str, Cursor]:
    """Return where each `secrets.NAME.value` stands."""
    inside = secret_entries(text, path, problems)
    return {name: found["value"] for name, found in inside.items() if "value" in found}


# ==================================================================================================
# 4. Secrets: keys, opening, and keeping values out of sight
# ==================================================================================================

MIN_MASKED: Final = 4  # characters; real tokens have dozens, and "1" would mask half of the log
MAX_SECRET_BYTES: Final = 65536
KEY_VARIABLE: Final = "TECKOCHECKER_KEY"
MAKE_KEY: Final = "head -c 32 /dev/urandom | base64 | tr +/ -_"


@dataclass(frozen=True, slots=True)
class FileRead:
    """A file as it was read at one moment: its bytes and permission bits, or why not."""

    data: bytes = b""
    mode: int = 0
    error: OSError | None = None

    def digest(self) -> bytes:
        """Return what tells this reading from a different one."""
        failure = self.error.errno if self.error else None
        return hashlib.sha256(repr((failure, self.mode)).encode() + self.data).digest()


class Files:
    """Reads each file once, so that what is compared and what is parsed are the same bytes."""

    def __init__(self) -> None:
        self._read: dict[Path, FileRead] = {}

    def read(self, path: Path) -> FileRead:
        """Return the file, at most MAX_FILE_BYTES and one byte of it."""
        if path not in self._read:
            self._read[path] = self._read_now(path)
        return self._read[path]

    def fingerprint(self) -> Mapping[Path, bytes]:
        """Return a digest of every file that was read."""
        return {path: read.digest() for path, read in self._read.items()}

    @staticmethod
    def _read_now(path: Path) -> FileRead:
        try:
            # Without O_NONBLOCK, a named pipe would hold the process until someone writes to it.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "Not a regular file")
                return FileRead(file.read(MAX_FILE_BYTES + 1), stat.S_IMODE(status.st_mode))
        except OSError as error:
            return FileRead(error=error)


class Redactor:
    """Replaces every secret value it knows; it never forgets one, not even after a reload."""

    MASK: Final = "***"

    def __init__(self) -> None:
        self._longest_first: list[str] = []
        self._pattern = re.compile("(?!)")  # matches nothing

    def learn(self, secrets: Iterable[Secret]) -> None:
        """Add values, each also in the forms in which JSON, Python and URLs write it."""
        known = set(self._longest_first)
        for secret in secrets:
            value = secret.reveal()
            if len(value) < MIN_MASKED:
                continue
            known |= {value, json.dumps(value)[1:-1], repr(value)[1:-1]}
            known.add(urllib.parse.quote(value, safe=""))
        self._longest_first = sorted(known - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._longest_first)) or "(?!)")

    def text(self, text: str) -> str:
        """Return `text` without any secret."""
        return self._pattern.sub(self.MASK, text)

    def body(self, body: bytes, *, is_data: bool) -> bytes:
        """Return a server's answer without the tokens that it may echo.

        In data only long ones are looked for: a short one could be part of an honest id.
        """
        plain = self._ESCAPES.sub(self._unescaped, body) if b"\\" in body else body
        for form in self._longest_first:
            if (len(form) >= 16 or not is_data) and form.encode() in plain:
                body = plain = plain.replace(form.encode(), self.MASK.encode())
        return body

    # JSON may write a character as `\u0041`, and `/` as `\/`; others are no part of a token.
    _ESCAPES: Final = re.compile(rb"\\(?:u00([2-7][0-9A-Fa-f])|(/)|.)", re.DOTALL)

    @staticmethod
    def _unescaped(escape: re.Match[bytes]) -> bytes:
        """Return what an escape stands for, unless it would end or begin something in JSON."""
        if escape[2]:
            return b"/"
        character = bytes.fromhex(escape[1].decode()) if escape[1] else b'"'
        return escape[0] if character in b'"\\\x7f' else character

    def tree(self, value: object) -> object:
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


class Keyring:
    """The Fernet keys (AES-128-CBC with HMAC-SHA256): the first encrypts, all decrypt."""

    def __init__(self, keys: Sequence[Secret]) -> None:
        """Take keys in order; raises ValueError for what is not a Fernet key."""
        from cryptography.fernet import Fernet, MultiFernet

        self._fernet = MultiFernet([Fernet(key.reveal()) for key in keys])

    def encrypt(self, value: Secret) -> str:
        """Return a token that only these keys open."""
        return self._fernet.encrypt(value.reveal().encode()).decode()

    def decrypt(self, token: str) -> Secret | None:
        """Return what is in a token, or None if these keys do not open it."""
        from cryptography.fernet import InvalidToken

        try:
            return Secret(self._fernet.decrypt(token.encode()).decode())
        except (InvalidToken, ValueError):  # ValueError: non-ASCII token, or binary inside
            return None

    def rotate(self, token: str) -> str:
        """Return the token closed again with the first key, its time stamp kept."""
        return self._fernet.rotate(token).decode()


def looks_encrypted(value: str) -> bool:
    """Return whether a value has the form of a Fernet token, whoever's key it is for."""
    try:
        data = base64.urlsafe_b64decode(value)
    except (binascii.Error, ValueError):
        return False
    return len(data) >= 73 and data[0] == 0x80


def check_secret_value(text: str) -> str | None:
    """Return what is wrong with a secret's value, or None."""
    if not text:
        return "is empty"
    # A newline inside a header value makes httpx print the whole value in its exception.
    if not all(" " <= c <= "~" for c in text):
        return "has characters that are not printable ASCII"
    return None


class Opener:
    """Opens a config's secrets, and notes what is in the way, each problem at its place."""

    def __init__(self, config: Config, files: Files, env: Mapping[str, str]) -> None:
        self.config = config
        self.files = files
        self.env = env
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.keys: tuple[Secret, ...] = ()
        self.has_credential = False  # the key is the service manager's copy, made at the start

    def bad(self, place: Place, path: str, what: str, cure: str) -> None:
        """Note a problem; returns None, for `return self.bad(...)`."""
        self.problems.append(Problem(str(self.config.path), place, path, what, cure))

    def open_all(self) -> dict[str, Secret]:
        """Return every secret that opens, by name; `problems` tells of the others."""
        sources = {name: secret.source for name, secret in self.config.secrets.items()}
        keyring = None
        if any(source.kind == "value" for source in sources.values()):
            keyring = self.keyring()
        opened = {name: self._open(name, source, keyring) for name, source in sources.items()}
        found = {name: secret for name, secret in opened.items() if secret is not None}
        for name in self.config.webhook.keys() & found.keys():
            self._check_address(name, found[name])
        return found

    def _check_address(self, name: str, address: Secret) -> None:
        """Check what a webhook's secret holds."""
        problem = webhook_problem(address.reveal())
        if problem:
            source = self.config.webhook[name].source
            path = f"secrets.{name}.{source.kind}"
            self.bad(source.place, path, f"the secret {problem}", "put the https address there")

    def webhook_paths(self, secrets: Mapping[str, Secret]) -> list[Secret]:
        """Return what is secret in the addresses of webhooks, apart from their hosts."""
        names = self.config.webhook.keys() & secrets.keys()
        parts = [urllib.parse.urlsplit(secrets[name].reveal()) for name in names]
        targets = [part._replace(scheme="", netloc="").geturl() for part in parts]
        return [
            Secret(text) for text in (*targets, *(part.path for part in parts)) if len(text) > 8
        ]

    def keyring(self) -> Keyring | None:
        """Return the keys from the first of the three places that has any."""
        text = self.env.get(KEY_VARIABLE, "").strip()
        if text:
            return self._parse_keys(text, f"${KEY_VARIABLE}")
        directory = self.env.get("CREDENTIALS_DIRECTORY")
        if directory:
            credential = Path(directory) / DEFAULT_KEY
            read = self.files.read(credential)
            if not isinstance(read.error, FileNotFoundError):
                self.has_credential = True
                return self._read_keys(credential, read)
        read = self.files.read(self.config.key_path)
        if read.error is None and not self._is_private(read.mode):
            return None
        return self._read_keys(self.config.key_path, read)

    def _is_private(self, mode: int) -> bool:
        """Check a key file's permissions: others must not read it, the group should not."""
        path = self.config.key_path
        if mode & stat.S_IRWXO:
            what = f"{path} can be read by others (mode {mode:04o})"
            self.bad(self.config.key_place, "key_file", what, f"run: chmod 600 {path}")
        elif mode & stat.S_IRWXG:
            self.warnings.append(f"{path} can be read by its group; better: chmod 600 {path}")
        return not mode & stat.S_IRWXO

    def _read_keys(self, path: Path, read: FileRead) -> Keyring | None:
        if read.error:
            what = f"cannot read the key file {path}: {read.error.strerror}"
            cure = f"put a Fernet key there ({MAKE_KEY}) or set ${KEY_VARIABLE}"
            if read.error.errno == errno.EACCES:
                cure = "run this as the key's owner, or as root"
            return self.bad(self.config.key_place, "key_file", what, cure)
        return self._parse_keys(read.data.decode("ascii", "replace"), str(path))

    def _parse_keys(self, text: str, where: str) -> Keyring | None:
        lines = (line.split("#")[0] for line in text.splitlines())
        keys = [Secret(key) for line in lines for key in line.replace(",", " ").split()]
        try:
            if keys:
                keyring = Keyring(keys)
                self.keys = tuple(keys)
                return keyring
        except ValueError:
            pass
        what = f"{where} holds {'something other than Fernet keys' if keys else 'no key'}"
        return self.bad(self.config.key_place, "key_file", what, f"make one: {MAKE_KEY}")

    def _open(self, name: str, source: SecretSource, keyring: Keyring | None) -> Secret | None:
        path = f"secrets.{name}.{source.kind}"
        text = source.text.reveal()
        if source.kind == "value":
            secret = self._decrypt(source, path, keyring)
        elif source.kind == "env":
            value = self.env.get(text)
            secret = (
                Secret(value.strip())
                if value is not None
                else self.bad(
                    source.place,
                    path,
                    "the environment has no such variable",
                    "set it, or correct the name",
                )
            )
        else:
            secret = self._read_secret_file(source, path, text)
        if secret is None:
            return None
        problem = check_secret_value(secret.reveal())
        if problem:
            return self.bad(
                source.place, path, f"the secret {problem}", "put the token there, alone"
            )
        return secret

    def _decrypt(self, source: SecretSource, path: str, keyring: Keyring | None) -> Secret | None:
        if keyring is None:
            return None  # noted already, where the key was looked for
        secret = keyring.decrypt(source.text.reveal())
        if secret is not None:
            return Secret(secret.reveal().strip())
        command = f"run: teckochecker --config {self.config.path} encrypt"
        if looks_encrypted(source.text.reveal()):
            cure = f"bring that key back, or write the token in plain and {command}"
            if self.has_credential:
                cure = f"if the key is new, restart the service; else {cure}"
            return self.bad(source.place, path, "is encrypted with another key", cure)
        return self.bad(source.place, path, "is not encrypted", command)

    def _read_secret_file(self, source: SecretSource, path: str, text: str) -> Secret | None:
        # Relative paths are relative to the config; an absolute one replaces that altogether.
        read = self.files.read(self.config.path.parent / text)
        if read.error:
            what = f"cannot read the file: {read.error.strerror}"
            return self.bad(source.place, path, what, "correct the path or its permissions")
        if len(read.data) > MAX_SECRET_BYTES:
            return self.bad(
                source.place, path, "the file is over 64 KiB", "put the token there, alone"
            )
        return Secret(read.data.decode("utf-8", "replace").strip())


def read_draft(path: Path, files: Files) -> Draft:
    """Return what the file says so far as it can be read; never raises for what is in it."""
    read = files.read(path)
    nothing = Config(path, "", path.parent / DEFAULT_STATE, path.parent / DEFAULT_KEY)

    def refuse(what: str, cure: str, place: Place | None = None) -> Draft:
        return Draft(nothing, [Problem(str(path), place or Place(), "", what, cure)])

    if read.error:
        cure = "check the path, or pass --config PATH"
        if read.error.errno == errno.EACCES:
            cure = "let this user read it; with all secrets encrypted, chmod 644 is safe"
        return refuse(f"cannot be read: {read.error.strerror}", cure)
    if len(read.data) > MAX_FILE_BYTES:
        return refuse("is over 16 MiB", "a config is smaller: check the path")
    try:
        return parse_config(read.data.decode(), path)
    except UnicodeDecodeError as error:
        before = read.data[: error.start]
        place = Place(before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        return refuse("is not UTF-8 text", "save it as UTF-8", place)


def without_secrets(problems: Iterable[Problem], redactor: Redactor) -> list[Problem]:
    """Return problems that show no known token: someone may have pasted it in the wrong place."""
    return [replace(problem, what=redactor.text(problem.what)) for problem in problems]


def load_setup(path: Path, files: Files, env: Mapping[str, str], redactor: Redactor) -> Setup:
    """Return the config with its secrets opened: the one way in for start, reload and `check`.

    Raises ConfigError with every problem of the file, the key and the secrets.
    """
    draft = read_draft(path, files)
    opener = Opener(draft.config, files, env)
    secrets = opener.open_all()
    redactor.learn((*secrets.values(), *opener.keys, *opener.webhook_paths(secrets)))
    problems = without_secrets([*draft.problems, *opener.problems], redactor)
    if problems:
        raise ConfigError(problems)
    return Setup(draft.config, secrets, tuple(opener.warnings))


def account_of(setup: Setup, job: Job) -> Account:
    """Return the OpenAI account that a job's batches are looked at with."""
    secret = setup.config.openai[job.openai_secret]
    key = setup.secrets[secret.name]
    return Account(key, secret.base_url, secret.organization, secret.project)


# ==================================================================================================
# 5. Decisions: pure functions. No I/O, no clock, no randomness of their own
# ==================================================================================================

MAX_BACKOFF_S: Final = HOUR_S
FILES_WAIT_S: Final = 5 * MINUTE_S  # for the files of a batch that has ended,
FILES_LOOK_S: Final = 30.0  # with looks at most so far apart
FIRST_TRIGGER_BACKOFF_S: Final = 5
FIRST_REJECTED_BACKOFF_S: Final = 5 * MINUTE_S
CLEAR_SEARCHES_NEEDED: Final = 2
SEARCH_BACK_S: Final = DAY_S  # how far clocks may be apart without hiding a job
SEARCH_AGAIN_S: Final = 5 * MINUTE_S  # the most between two searches for an unknown trigger
CURABLE_REJECTIONS: Final = frozenset({401, 402, 403, 404, 409, 423})
REJECTING: Final = frozenset(range(400, 500)) - {408, 429}  # after these, no job was made
RETRYABLE: Final = frozenset({408, 409, 429})


def backoff_s(failures: int, first_s: float, jitter: float, asked_s: float | None = None) -> float:
    """Return how long to wait after the n-th failure in a row: doubling, an hour at most.

    `jitter` from 0 to 1 spreads the wait over its upper quarter; `asked_s` is what a server asked
    for: obeyed where it is longer, but an hour is the most here too.
    """
    doubled = min(MAX_BACKOFF_S, first_s * 2.0 ** min(max(failures, 1) - 1, 16))
    spread = doubled * (0.75 + 0.25 * jitter)
    return min(MAX_BACKOFF_S, max(spread, asked_s or 0.0))


def seen_again(known: Batch, seen: Batch, now: float) -> Batch:
    """Return what to remember of a batch after a look: a terminal status is never overwritten.

    What has not changed stays the same object, which is quickly compared. Gateways tell the end of
    a batch before its files: one without a file that its counts promise waits for some minutes.
    """
    if known.is_terminal or seen == known:
        return known
    if known.fileless_since is not None:
        if seen.status != known.status:  # what has ended has ended
            seen = replace(known, fileless_since=None)
        since = min(known.fileless_since, now)
    else:
        since = now
    if not seen.lacks_files or now - since >= FILES_WAIT_S:
        return seen
    waiting = replace(seen, fileless_since=since)
    return known if waiting == known else waiting


def trigger_id(name: str, batch_ids: Iterable[str], rerun: int) -> str:
    """Return the id that makes a trigger recognizable at Keboola, the same on every machine.

    It is the SHA-256 of ASCII JSON, so that it survives the loss of the state file.
    """
    identity = compact_json([1, name, sorted(batch_ids), rerun])
    return hashlib.sha256(identity.encode()).hexdigest()


def keboola_variables(job: Job, batches: Sequence[Batch], trigger: str) -> dict[str, str]:
    """Return the variables that a Keboola job gets, all of them non-empty text."""
    completed = [batch.id for batch in batches if batch.status == BatchStatus.COMPLETED]
    failed = [batch.id for batch in batches if batch.status != BatchStatus.COMPLETED]
    outputs = {batch.id: batch.output_file_id for batch in batches if batch.output_file_id}
    errors = {batch.id: batch.error_file_id for batch in batches if batch.error_file_id}
    return {
        **dict(job.variables),
        "batch_ids_completed": compact_json(completed),
        "batch_ids_failed": compact_json(failed),
        "batch_count_total": str(len(batches)),
        "batch_count_completed": str(len(completed)),
        "batch_count_failed": str(len(failed)),
        "batch_statuses": compact_json({batch.id: batch.status for batch in batches}),
        "batch_output_file_ids": compact_json(outputs),
        "batch_error_file_ids": compact_json(errors),
        "teckochecker_job": job.name,
        TRIGGER_ID_VARIABLE: trigger,
    }


def keboola_payload(job: Job, target: Target, batches: Sequence[Batch], trigger: str) -> str:
    """Return the body of `POST /jobs` (Keboola Job Queue API)."""
    variables = keboola_variables(job, batches, trigger)
    body: dict[str, object] = {
        "component": target.component_id,
        "config": target.config_id,
        "mode": job.mode,
    }
    if target.branch_id:
        body["branchId"] = target.branch_id
    if job.config_row_ids:
        body["configRowIds"] = list(job.config_row_ids)
    values = [{"name": name, "value": value} for name, value in variables.items()]
    body["variableValuesData"] = {"values": values}
    return compact_json(body)


def trigger_basis(job: Job, target: Target, token: Secret) -> str:
    """Return a digest of what Keboola judges a trigger by.

    A rejected one is worth another try when target, variables or token are different ones.
    """
    digest = hashlib.sha256(token.reveal().encode()).hexdigest()
    parts = [repr(target), job.mode, job.config_row_ids, sorted(job.variables), digest]
    return hashlib.sha256(compact_json(parts).encode()).hexdigest()


def new_trigger(work: Work, job: Job, target: Target, token: Secret, now: float) -> Trigger:
    """Return the intent to start the work's Keboola job; an id that was stored is kept."""
    old = work.trigger if work.trigger and work.trigger.rerun == work.rerun else None
    ids = [batch.id for batch in work.batches]
    own_id = old.id if old else trigger_id(work.name, ids, work.rerun)
    basis = trigger_basis(job, target, token)
    return Trigger(
        id=own_id,
        rerun=work.rerun,
        state=TriggerState.INTENT,
        target=target,
        secret=job.keboola_secret,
        payload=keboola_payload(job, target, work.batches, own_id),
        basis=basis,
        created_at=now,
        failures=old.failures if old and old.basis == basis else 0,
    )


def search_from(batches: Sequence[Batch], now: float, behind_s: float = 0.0) -> float | None:
    """Return since when a Keboola job for these batches can exist, as Unix seconds, or None.

    By Keboola's clock, which is `behind_s` behind this one. A day covers clocks that differ; an end
    in the future is nonsense and would hide every job.
    """
    ended = [batch.ended_at for batch in batches if batch.ended_at]
    created = [batch.created_at for batch in batches if batch.created_at]
    if not ended and not created:
        return None
    bound = min(max(ended) if ended else min(created), now)
    return max(0.0, bound - SEARCH_BACK_S - max(0.0, behind_s))


def ours_oldest_first(jobs: Iterable[KeboolaJob], trigger: str) -> list[KeboolaJob]:
    """Return the Keboola jobs that carry a trigger id, the oldest first: that one is ours."""
    never = datetime.max.replace(tzinfo=UTC)
    ours = [job for job in jobs if job.trigger_id == trigger]
    return sorted(ours, key=lambda job: (job.created_time or never, len(job.id), job.id))


def is_failure(batch: Batch) -> bool:
    """Return whether a batch has ended otherwise than completed."""
    return batch.is_terminal and batch.status != BatchStatus.COMPLETED


def job_status(work: Work) -> JobStatus:
    """Return the status of a piece of work, as people see it."""
    if work.is_finished:
        whole = all(batch.status == BatchStatus.COMPLETED for batch in work.batches)
        return JobStatus.COMPLETED if whole else JobStatus.COMPLETED_WITH_FAILURES
    if work.done:  # elsewhere: what is known of its batches may be old, or nothing
        return JobStatus.COMPLETED
    if work.paused:
        return JobStatus.PAUSED
    if work.trigger and work.trigger.state == TriggerState.REJECTED:
        return JobStatus.FAILED
    return JobStatus.TRIGGERING if work.is_ready or work.trigger else JobStatus.ACTIVE


def error_of(work: Work) -> str | None:
    """Return what is wrong with a piece of work now, or None."""
    if work.is_finished or work.done:
        return None
    return (work.trigger.error if work.trigger else None) or work.error


def needs_person(work: Work) -> bool:
    """Return whether a job has an error or waits for someone, which is what exit code 1 says."""
    if work.is_finished or work.paused or work.done:
        return False
    unsettled = work.trigger is not None and work.trigger.state != TriggerState.SENT
    return unsettled or error_of(work) is not None


# --- the trigger, step by step --------------------------------------------------------------------
#
#   (ready) --> intent --search: clear--> sending --POST--> sent
#                 ^  ^                       |
#                 |  +------ not sent -------+------ rejected --(a new basis, retry)--> intent
#                 |                          |
#                 |                          +------ unknown --search: found----------> sent
#                 |                                     |
#                 +---- retry --force ------------------+--two clear searches, the last one at
#                                                          least the grace later--> sending
#   A `sending` that is found at start becomes `unknown`. Any search that finds ours: sent.


class Step(enum.Enum):
    """What to do next for a trigger."""

    REST = "rest"  # nothing, until a person or the config changes something
    WAIT = "wait"
    ARM = "arm"  # make a fresh intent, of what the config says now
    SEARCH = "search"
    POST = "post"


def next_step(trigger: Trigger, *, may_post: bool, is_due: bool) -> Step:
    """Return what to do next for a trigger.

    A POST comes only after a search: see `after_clear_search`.
    """
    match trigger.state:
        case TriggerState.SENT:
            return Step.REST
        case TriggerState.REJECTED:
            if not may_post or trigger.next_try_at is None:
                return Step.REST
            return Step.ARM if is_due else Step.WAIT
        case TriggerState.INTENT if not may_post:
            return Step.REST
        case _:
            return Step.SEARCH if is_due else Step.WAIT


def elapsed_s(since: Moment, now: Moment) -> float:
    """Return how many seconds have certainly passed between two moments.

    Within one boot, the machine's uptime tells. Over a reboot, no more than it has been up for:
    the wall clock alone may have been set forward.
    """
    if since.boot and since.boot == now.boot:
        return max(0.0, now.uptime_s - since.uptime_s)
    by_clock_s = max(0.0, now.wall - since.wall)
    return min(by_clock_s, now.uptime_s) if now.boot else by_clock_s


def search_spacing_s(grace_s: float) -> float:
    """Return how far apart the searches for an unknown trigger are, apart from the grace itself."""
    return min(10.0, max(0.1, grace_s / 4))


def unknown_wait_s(trigger: Trigger, grace_s: float) -> float:
    """Return how long after an unknown outcome the next POST may come, at the earliest.

    The grace; after each repeated POST twice as long, up to an hour, or what the server asked for.
    """
    doubled = grace_s * 2.0 ** min(max(trigger.unknowns - 1, 0), 16)
    return max(grace_s, min(MAX_BACKOFF_S, max(doubled, trigger.asked_wait_s)))


def unknown_text(trigger: Trigger, more: str = "") -> str:
    """Return what a person is told of an unknown trigger: what came of its POST, above all."""
    said = f": {trigger.said}" if trigger.said else ""
    return f"it is not known whether Keboola took the job{more}{said}"


def after_clear_search(
    trigger: Trigger, *, unknown_for_s: float, grace_s: float, may_post: bool, now: float
) -> tuple[Trigger, Step]:
    """Return the trigger after a complete search without errors that did not find it, and a step.

    `unknown_for_s` is the time between the record of the unknown outcome and the search's start.
    """
    if trigger.state != TriggerState.UNKNOWN:
        return trigger, Step.POST if may_post else Step.REST
    clear = replace(
        trigger,
        clear_searches=trigger.clear_searches + 1,
        failures=0,
        error=unknown_text(trigger, "; a search did not find it"),
    )
    needed_s = unknown_wait_s(trigger, grace_s)
    is_late = unknown_for_s >= needed_s
    if is_late and clear.clear_searches >= CLEAR_SEARCHES_NEEDED:
        if may_post:
            return clear, Step.POST
        # Paused or removed: an earlier POST's job may still show up, so the search goes on.
        return replace(clear, next_try_at=now + HOUR_S), Step.WAIT
    left_s = min(needed_s - unknown_for_s, max(grace_s, SEARCH_AGAIN_S))
    wait_s = search_spacing_s(grace_s) if is_late else max(left_s, 0.1)
    return replace(clear, next_try_at=now + wait_s), Step.WAIT


def after_failed_search(
    trigger: Trigger, error: ApiError, *, may_post: bool, now: float, jitter: float
) -> tuple[Trigger, Step]:
    """Return the trigger after a search that could not be completed, and a step.

    It says nothing, so nothing is sent; unless a person has said `retry --force`. Without a token
    that is known to be of the trigger's project there is no POST either way (`may_post`).
    """
    if trigger.forced and may_post:
        return trigger, Step.POST
    failures = trigger.failures + 1
    wait_s = backoff_s(failures, FIRST_TRIGGER_BACKOFF_S, jitter, error.retry_after_s)
    text = f"cannot search Keboola for an earlier start: {error}"
    if trigger.state == TriggerState.UNKNOWN:
        text = f"{text}; {unknown_text(trigger)}"
    return replace(trigger, failures=failures, error=text, next_try_at=now + wait_s), Step.WAIT


def as_sent(trigger: Trigger, job: KeboolaJob, now: float) -> Trigger:
    """Return the trigger once its Keboola job is known."""
    return replace(
        trigger,
        state=TriggerState.SENT,
        sent_at=now,
        keboola_job_id=job.id,
        keboola_status=job.status,
        url=job.url,
        error=None,
        said=None,
        failures=0,
        unknowns=0,
        forced=False,
        next_try_at=None,
    )


def as_sending(trigger: Trigger, now: float) -> Trigger:
    """Return the trigger as it must be stored before its POST."""
    return replace(
        trigger,
        state=TriggerState.SENDING,
        sending_at=now,
        unknown_at=None,
        clear_searches=0,
        forced=False,
        next_try_at=None,
    )


def as_unknown(
    trigger: Trigger, error: str, *, grace_s: float, now: Moment, asked_s: float | None = None
) -> Trigger:
    """Return the trigger when the outcome of its POST cannot be told.

    `asked_s` is how long the server wants not to be asked again.
    """
    after = replace(trigger, said=error, unknowns=trigger.unknowns + 1)
    return replace(
        after,
        state=TriggerState.UNKNOWN,
        unknown_at=now.wall,
        unknown_boot=now.boot,
        unknown_uptime_s=now.uptime_s,
        clear_searches=0,
        failures=0,
        asked_wait_s=min(MAX_BACKOFF_S, asked_s or 0.0),
        error=unknown_text(after),
        next_try_at=now.wall + search_spacing_s(grace_s),
    )


def after_failed_post(
    trigger: Trigger, error: ApiError, *, grace_s: float, now: Moment, jitter: float
) -> Trigger:
    """Return the trigger after a POST that brought no job id: not sent, rejected or unknown.

    A gateway may answer 429 after the job was made, as it may answer 500.
    """
    failures = trigger.failures + 1
    next_try_at: float | None
    if not error.sent:
        wait_s = backoff_s(failures, FIRST_TRIGGER_BACKOFF_S, jitter, error.retry_after_s)
        next_try_at = now.wall + wait_s
        text, state = f"Keboola was not reached: {error}", TriggerState.INTENT
    elif error.status in REJECTING:
        curable = error.status in CURABLE_REJECTIONS
        wait_s = backoff_s(failures, FIRST_REJECTED_BACKOFF_S, jitter, error.retry_after_s)
        next_try_at = now.wall + wait_s if curable else None
        text, state = str(error), TriggerState.REJECTED
    else:
        asked_s = error.retry_after_s
        return as_unknown(trigger, str(error), grace_s=grace_s, now=now, asked_s=asked_s)
    return replace(trigger, state=state, failures=failures, error=text, next_try_at=next_try_at)


def as_of_now(trigger: Trigger, now: float) -> Trigger:
    """Return a stored trigger with no time in the future that this program would not have set.

    They tell that the clock was set back meanwhile, and would else hold the trigger until it
    has caught up.
    """
    stamps = (trigger.created_at, trigger.sending_at, trigger.unknown_at)
    is_ahead = any(at is not None and at > now for at in stamps)
    longest_s = DAY_S if trigger.state == TriggerState.UNKNOWN else MAX_BACKOFF_S  # the grace's
    next_try_at = trigger.next_try_at
    if next_try_at is not None and (is_ahead or next_try_at > now + longest_s):
        next_try_at = now
    unknown_at = None if trigger.unknown_at is None else min(trigger.unknown_at, now)
    return replace(trigger, next_try_at=next_try_at, unknown_at=unknown_at)


# --- which row of the state file a job of the config is -------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """A row of the state file, as far as it matters for whose it is."""

    id: int
    name: str
    batch_ids: frozenset[str]
    target: Target
    is_finished: bool
    position: int | None = None  # in the config so far


def known_of(work: Work) -> Known:
    """Return what matters of a piece of work for whose it is."""
    ids = frozenset(batch.id for batch in work.batches)
    return Known(work.id, work.name, ids, work.target, work.is_finished, work.position)


def is_live(work: Work) -> bool:
    """Return whether a process works on it: it is in the config, or may be at Keboola unseen.

    A rejected trigger is not: Keboola said no; if its job comes back, it is in the config again.
    """
    settled = (TriggerState.SENT, TriggerState.REJECTED)
    is_open = work.trigger is not None and work.trigger.state not in settled
    return work.position is not None or is_open


def as_in_config(work: Work, job: Job, target: Target, position: int) -> Work:
    """Return a piece of work as the config has it now."""
    batches = work.batches
    if tuple(batch.id for batch in batches) != job.batch_ids:
        by_id = {batch.id: batch for batch in batches}
        batches = tuple(by_id[batch_id] for batch_id in job.batch_ids)
    after = replace(
        work,
        name=job.name,
        batches=batches,
        target=target,
        position=position,
        paused=job.paused,
        done=job.done,
    )
    return work if after == work else after


def claim_order(row: Known) -> tuple[bool, bool, int, int]:
    """Return what sorts rows that may be taken over: finished ones, then the config's order."""
    return (not row.is_finished, row.position is None, row.position or 0, row.id)


def assign(
    jobs: Mapping[str, Job], targets: Mapping[str, Target], rows: Sequence[Known]
) -> dict[str, int]:
    """Return the row of each job that has one; the others are new work.

    A piece of work is a name and a set of ids. A new one with the ids and the target of a job that
    has left the config is that job under a new name, not new work.
    """
    by_work = {(row.name, row.batch_ids): row.id for row in rows}
    absent: dict[tuple[frozenset[str], Target], list[Known]] = {}
    for row in sorted(rows, key=claim_order, reverse=True):
        if row.name not in jobs:
            absent.setdefault((row.batch_ids, row.target), []).append(row)
    assigned = {}
    for name, job in jobs.items():
        ids = frozenset(job.batch_ids)
        if (name, ids) in by_work:
            assigned[name] = by_work[name, ids]
        elif absent.get((ids, targets[name])):
            assigned[name] = absent[ids, targets[name]].pop().id
    return assigned


# --- where batches stand in their account's list --------------------------------------------------

LIST_MIN: Final = 20  # due batches; fewer are asked for one by one, and no page is risked
PAGE_ROWS: Final = 100  # of a page; OpenAI gives no more
NEAR: Final = 5  # batches created close together, which are worth a page that may show them
ONE_PAGE_S: Final = 180.0  # in which OpenAI's limit, 2,000 an hour, lets a page of batches be made
BARREN_PAGES: Final = 3  # in a row, after which a walk along the list is given up
UNCHARTED: Final = 1_000_000_000  # rows between parts of the list that no page has connected
MAX_MARKS: Final = 5000
MAX_ROWS: Final = 1000  # remembered beyond twice the watched ones
END_OF_IDS: Final = "\x7f"  # sorts after every batch id


class Spot(NamedTuple):
    """Where a batch stands: `row` counts from anywhere, `after` is the id of the row before it."""

    row: int
    after: str | None  # None: it was the first one of the list


@dataclass(frozen=True, slots=True)
class Walk:
    """A way along the list, page by page from a cursor, to a batch; or to any that are due."""

    cursor: str | None
    goal: Batch | None = None

    def ends_at(self, page: Page) -> bool:
        """Return whether to go no further than a page: the goal is there, or cannot follow."""
        if not page.ids or not page.has_more:
            return True
        if self.goal is None:
            return False
        created_at = self.goal.created_at or 0.0
        return self.goal.id in page.batches or (page.oldest_at or 0.0) < created_at


class Chart:
    """Where an account's batches stand in its list, so far as pages have shown it.

    The list has no filter, only a cursor: the id of the row before. New batches push all rows down
    alike and deleted ones let them up, so that what lasts is each batch's neighbour, and about how
    many rows lie between two batches. What is wrong here costs a request, never a result: whatever
    no page shows is asked for by itself.
    """

    def __init__(self) -> None:
        self._spots: dict[str, Spot] = {}
        self._ends: list[tuple[float, str]] = []  # the last rows of pages, by creation
        self._misses: collections.Counter[str] = collections.Counter()
        self._parts = 0
        self._page_s = ONE_PAGE_S
        self._looks = 0
        self._rest_until = 0
        self._fruitless = 0

    def begin_look(self, watched: Mapping[str, object]) -> None:
        """Count a look, and forget what is no longer watched."""
        self._looks += 1
        if len(self._spots) > 2 * len(watched) + MAX_ROWS:
            self._spots = {key: spot for key, spot in self._spots.items() if key in watched}
        if len(self._misses) > 2 * len(watched):
            self._misses = collections.Counter(
                {key: count for key, count in self._misses.items() if key in watched}
            )

    def pages(self, wanted: Iterable[str]) -> list[tuple[str | None, str]]:
        """Return the fewest pages that show at least two of `wanted` each.

        A page is the cursor that it starts after, and the batch that has to be its first row.
        """
        placed = sorted((self._spots[key].row, key) for key in wanted if key in self._spots)
        pages = []
        start = 0
        while start < len(placed):
            row, key = placed[start]
            end = bisect.bisect_left(placed, (row + PAGE_ROWS,))
            if end - start > 1:
                pages.append((self._spots[key].after, key))
            start = end
        return pages

    def learn(self, cursor: str | None, page: Page) -> None:
        """Remember where a page has shown the watched batches."""
        rows = list(dict.fromkeys(page.ids))  # one that is there twice would be its own neighbour
        first = self._first_row(cursor, rows, page.batches)
        # The next page may begin after the last row, and belongs to the same part then.
        last = rows[-1:] if page.has_more else []
        before = cursor
        for offset, key in enumerate(rows):
            if key in page.batches or key in last:
                self._spots[key] = Spot(first + offset, before)
                self._misses.pop(key, None)
            before = key
        if page.has_more and page.oldest_at is not None and page.newest_at is not None:
            self._page_s = max(1.0, page.newest_at - page.oldest_at)
            end = (page.oldest_at, page.ids[-1])
            place = bisect.bisect_left(self._ends, end)
            if self._ends[place : place + 1] != [end]:
                self._ends.insert(place, end)
                if len(self._ends) > MAX_MARKS:  # the oldest are the least likely to be wanted
                    del self._ends[: MAX_MARKS // 2]

    def _first_row(self, cursor: str | None, rows: Sequence[str], batches: Container[str]) -> int:
        """Return the row of a page's beginning, by what it shows and where it was asked for."""
        if cursor in self._spots:
            return self._spots[cursor].row + 1
        for offset, key in enumerate(rows):
            if key in self._spots and key in batches:
                return self._spots[key].row - offset
        self._parts += 1
        return self._parts * UNCHARTED

    def lose(self, batch_id: str) -> None:
        """Forget where a batch stands: it was not there."""
        self._spots.pop(batch_id, None)

    def lose_cursor(self, cursor: str) -> None:
        """Forget a row that is no longer in the list."""
        self._ends = [end for end in self._ends if end[1] != cursor]
        for key in [key for key, spot in self._spots.items() if spot.after == cursor]:
            del self._spots[key]

    def allowance(self, due_count: int) -> int:
        """Return how many pages may be risked for which no savings have been made yet.

        Some in a hundred, and after a look that risked them in vain none for a while.
        """
        return 0 if self._looks < self._rest_until else max(1, min(3, due_count // 100))

    def note_risk(self, *, paid_off: bool) -> None:
        """Remember whether the risk that a look has taken was worth it."""
        self._fruitless = 0 if paid_off else self._fruitless + 1
        rest = 0 if paid_off else 2 ** min(self._fruitless, 10)
        self._rest_until = self._looks + rest

    def unplaced(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return the batches to look for: those of unknown age first, then the newest."""
        found = [
            batch
            for batch in batches
            if batch.id not in self._spots
            and not self._looks % 2 ** min(self._misses[batch.id], 10)
        ]
        return sorted(found, key=lambda batch: -(batch.created_at or math.inf))

    def note_miss(self, batch_id: str) -> None:
        """Remember that a batch was looked for in vain: it is the longer not looked for again."""
        self._misses[batch_id] += 1

    def guesses(
        self, unplaced: Sequence[Batch], ages: Sequence[tuple[float, str]], most: int
    ) -> list[Walk]:
        """Return pages that, by the times of creation, show several of `unplaced` each.

        `ages` are the times of creation and ids of all that is watched, the oldest first.
        """
        walks: list[Walk] = []
        known = sorted((batch for batch in unplaced if batch.created_at), key=_age)
        end = len(known)
        while end and len(walks) < most:
            goal = known[end - 1]
            mark, reach = self._newer(goal, ages), goal.created_at or 0.0
            if not mark or mark[0] - reach > self._page_s:
                mark = self._alike(goal, ages)
            if mark:
                start = bisect.bisect_left(known, mark[0] - self._page_s, key=_age)
                if end - start >= NEAR:
                    walks.append(Walk(mark[1], goal))
                    end = min(start, end - 1)
                    continue
            end -= 1
        return walks

    def ways(
        self, unplaced: Sequence[Batch], ages: Sequence[tuple[float, str]], most: int
    ) -> list[Walk]:
        """Return walks to batches that have neighbours, each from the nearest newer row known."""
        walks: list[Walk] = []
        for goal in unplaced:
            if goal.created_at is None:
                return [Walk(None)]
            start = bisect.bisect_left(ages, (goal.created_at - self._page_s,))
            end = bisect.bisect_left(ages, (goal.created_at + self._page_s,))
            if end - start >= NEAR and goal.id not in self._spots and len(walks) < most:
                mark = self._newer(goal, ages)
                walks.append(Walk(mark[1] if mark else None, goal))
        return walks

    def _newer(self, goal: Batch, ages: Sequence[tuple[float, str]]) -> tuple[float, str] | None:
        """Return the row known to be newer than a batch, by as little as possible."""
        marks: list[tuple[float, str]] = []
        for rows in (self._ends, ages):
            place = bisect.bisect_right(rows, (goal.created_at or 0.0, END_OF_IDS))
            marks += rows[place : place + 1]
        return min(marks, default=None)

    def _alike(self, goal: Batch, ages: Sequence[tuple[float, str]]) -> tuple[float, str] | None:
        """Return a batch of the same second, which may be newer: at each look another one."""
        start = bisect.bisect_left(ages, (goal.created_at or 0.0,))
        end = bisect.bisect_right(ages, (goal.created_at or 0.0, END_OF_IDS))
        alike = [row for row in ages[start:end] if row[1] != goal.id]
        return alike[self._looks % len(alike)] if alike else None


def _age(batch: Batch) -> float:
    return batch.created_at or 0.0


# --- what a look and a person's request make of a piece of work -----------------------------------


def is_old_news(work: Work, seen: Mapping[str, Batch | ApiError]) -> bool:
    """Return whether a look has shown only what is known: this is so nearly every time."""
    return (
        work.error is None
        and work.failures == 0
        and all(batch.is_terminal or seen.get(batch.id) == batch for batch in work.batches)
    )


def is_whole_look(work: Work, seen: Container[str]) -> bool:
    """Return whether all that was unfinished of a work has been seen."""
    return all(batch.is_terminal or batch.id in seen for batch in work.batches)


def next_look_s(interval_s: float, lag_s: float) -> float:
    """Return how long after a look the next one begins: an interval after its own beginning.

    So works looked at together stay together. After a look that took long, there is half of it.
    """
    return max(interval_s - lag_s, interval_s / 2)


def look_error(errors: Mapping[str, ApiError]) -> str | None:
    """Return what is wrong with the last look at a job, or None."""
    if not errors:
        return None
    batch_id, error = next(iter(errors.items()))
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{batch_id}: {error}{others}"


def batch_event(work: Work, batch: Batch) -> Event:
    """Return the news that a batch has a new status."""
    fields_ = {"batch_id": batch.id, "status": batch.status}
    if batch.status not in KNOWN_STATUSES:
        return Event("batch_status_unknown", "warning", work.name, fields_)
    level = "warning" if is_failure(batch) else "info"
    return Event("batch_status_changed", level, work.name, fields_)


def look_events(before: Work, after: Work, errors: Mapping[str, ApiError]) -> list[Event]:
    """Return the news of a look that went wrong, or right again; an old error is no news."""
    if after.error == before.error:
        return []
    if after.error is None:
        return [Event("look_recovered", "info", after.name)]
    batch_id, error = next(iter(errors.items()))
    fields_ = {"batch_id": batch_id, "error": after.error, "status": error.status}
    return [
        Event("look_failed", "warning", after.name, {**fields_, "request_id": error.request_id})
    ]


def after_look(  # noqa: PLR0913 - what it goes by is named at each call
    work: Work,
    seen: Mapping[str, Batch | ApiError],
    *,
    interval_s: float,
    now: float,
    jitter: float,
    lag_s: float = 0.0,
) -> tuple[Work, list[Event]]:
    """Return the work after a look at its unfinished batches, and what is worth telling of it.

    One failed look never fails a job: it shows the error and is looked at again, each time later.
    Where only some of the batches were seen, it is a glimpse: the look itself is still due.
    `lag_s` is how long ago the look began.
    """
    found = {key: value for key, value in seen.items() if isinstance(value, Batch)}
    batches = tuple(seen_again(b, found.get(b.id, b), now) for b in work.batches)
    events = [
        batch_event(work, b)
        for b, old in zip(batches, work.batches, strict=True)
        if b.status != old.status
    ]
    if not is_whole_look(work, seen):
        return replace(work, batches=batches), events
    errors = {key: value for key, value in seen.items() if isinstance(value, ApiError)}
    failures = work.failures + 1 if errors else 0
    wait_s = next_look_s(interval_s, lag_s)
    if any(batch.fileless_since is not None for batch in batches):
        wait_s = min(wait_s, FILES_LOOK_S)
    if errors:
        asked_s = max(error.retry_after_s or 0.0 for error in errors.values())
        wait_s = backoff_s(failures, interval_s, jitter, asked_s)
    after = replace(
        work,
        batches=batches,
        error=look_error(errors),
        failures=failures,
        last_check_at=now - lag_s,
        next_check_at=None if all(b.is_terminal for b in batches) else now + wait_s,
    )
    return after, events + look_events(work, after, errors)


def after_retry(
    work: Work, *, force: bool, now: float, is_posting: bool = False
) -> tuple[Work, str | None]:
    """Return the work after `retry`, and why nothing could be done, if so.

    A `sending` without `is_posting` is what an earlier process has left behind: as `unknown`.
    """
    trigger = work.trigger
    if is_posting:
        return work, "its Keboola job is being started now"
    if work.done:
        return work, "the config says that it is done; take done: out of it"
    if trigger is None:
        return replace(work, failures=0, next_check_at=now), None
    again = replace(trigger, failures=0, next_try_at=now)
    match trigger.state:
        case TriggerState.SENT if force:
            return replace(work, rerun=work.rerun + 1, completed_at=None, trigger=None), None
        case TriggerState.SENT:
            return work, "it is triggered; --force starts the Keboola job once more"
        case TriggerState.UNKNOWN | TriggerState.SENDING | TriggerState.INTENT if force:
            again = replace(again, state=TriggerState.INTENT, forced=True, unknowns=0)
        case _:
            pass
    return replace(work, trigger=again), None


# --- how the requests with a secret fare, and what webhooks are told ------------------------------

REFUSED: Final = frozenset({401, 403})
REFUSED_LONG_S: Final = 10 * MINUTE_S
NOTICE_BACKOFF_S: Final = 5
NOTICE_LIFE_S: Final = DAY_S
NOTICE_TRIES: Final = 5
NO_MAIL: Final = Mail()

Alarm = tuple[str, str]  # the event and the subject of what has been told and is not over


def after_request(usage: Usage, status: int | None, error: str | None, now: float) -> Usage:
    """Return how a secret has fared after one more request; no `error` is a success.

    Whatever a server says of a request other than that it refuses the key, it has taken the key.
    """
    requests = usage.requests + 1
    if error is None:
        return Usage(usage.service, requests, usage.errors, now)
    after = replace(usage, requests=requests, errors=usage.errors + 1, error=error)
    if status in REFUSED:
        since = now if usage.refused_since is None else usage.refused_since
        return replace(after, refused_since=since, last_refused_at=now)
    if status is not None and status < 500 and status not in RETRYABLE:
        return replace(after, refused_since=None)
    return after


def alarm_of(work: Work) -> Told | None:
    """Return what is wrong with a piece of work that a person should be told of, or None."""
    state = work.trigger.state if work.trigger else None
    if work.position is None or work.done:
        return None
    if state == TriggerState.REJECTED:
        return Told.JOB_FAILED
    return Told.TRIGGER_UNKNOWN if state == TriggerState.UNKNOWN else None


def has_ended(alarm: str, work: Work) -> bool:
    """Return whether an alarm is over: not while the trigger is merely tried again."""
    if work.is_finished or work.position is None or work.done:
        return True
    return alarm == Told.TRIGGER_UNKNOWN and alarm_of(work) == Told.JOB_FAILED


def outcome_message(work: Work) -> Message:
    """Return the news that a piece of work is finished."""
    failed = sum(map(is_failure, work.batches))
    trigger_ = work.trigger
    job_id = trigger_.keboola_job_id if trigger_ else None
    counts = f"{len(work.batches) - failed} of {len(work.batches)} batches completed"
    link = f" {trigger_.url}" if trigger_ and trigger_.url else ""
    text = f"job {work.name} has started Keboola job {job_id}: {counts}{link}"
    return Message(Told(job_status(work)), str(work.id), text, work.name)


def work_messages(before: Work, after: Work, standing: Container[Alarm]) -> list[Message]:
    """Return what webhooks are told of a change; where `before` is the same, of what stands."""
    subject, messages = str(after.id), []
    for event in (Told.JOB_FAILED, Told.TRIGGER_UNKNOWN):
        if (event, subject) in standing and has_ended(event, after):
            why = "is taken out of the config"
            if after.is_finished and after.trigger:
                why = f"has its Keboola job {after.trigger.keboola_job_id} now"
            elif after.position is not None:
                why = "is done" if after.done else "has Keboola's answer now"
            text = f"{event} is over: job {after.name} {why}"
            messages.append(Message(event, subject, text, after.name, is_over=True))
    alarm = alarm_of(after)
    if alarm and (alarm, subject) not in standing:
        what = "has failed" if alarm == Told.JOB_FAILED else "may have been started, or not"
        text = f"job {after.name} {what}: {error_of(after)}"
        messages.append(Message(alarm, subject, text, after.name))
    if after.is_finished and not before.is_finished:
        messages.append(outcome_message(after))
    return messages


def gone_messages(works: Iterable[Work], standing: Mapping[Alarm, str | None]) -> list[Message]:
    """Return what webhooks are told of alarms whose work is not among those that are live."""
    live = {str(work.id) for work in works}
    return [
        Message(
            Told(event),
            subject,
            f"{event} is over: job {job} is taken out of the config",
            job,
            is_over=True,
        )
        for (event, subject), job in standing.items()
        if event in {Told.JOB_FAILED, Told.TRIGGER_UNKNOWN} and subject not in live
    ]


def account_messages(usages: Mapping[str, Usage], standing: Iterable[Alarm]) -> list[Message]:
    """Return what webhooks are told of keys that are refused for long, or no longer.

    `usages` are those of the secrets that the config has. What counts is the time between two
    refusals, not that since one: nothing may have been asked meanwhile.
    """
    event = Told.ACCOUNT_FAILING
    messages = []
    for _, name in sorted(alarm for alarm in standing if alarm[0] == event):
        if name not in usages or usages[name].refused_since is None:
            text = f"{event} is over: the secret {name} works again, or is no longer used"
            messages.append(Message(event, name, text, is_over=True))
    for name, usage in usages.items():
        since, last = usage.refused_since, usage.last_refused_at
        is_long = since is not None and last is not None and last - since > REFUSED_LONG_S
        if is_long and (event, name) not in standing:
            text = f"the secret {name} has been refused for over 10 minutes: {usage.error}"
            messages.append(Message(event, name, text))
    return messages


def config_messages(error: str | None, standing: Container[Alarm]) -> list[Message]:
    """Return what webhooks are told of a config that was refused, or is good again."""
    event = Told.CONFIG_REJECTED
    if error is None and (event, "") in standing:
        return [Message(event, "", f"{event} is over: the config file is good again", is_over=True)]
    if error is None or (event, "") in standing:
        return []
    text = f"the config file has problems, the previous one still counts: {error}"
    return [Message(event, "", text)]


def message_body(message: Message) -> str:
    """Return the JSON of a message. Angle brackets would be commands to some chat programs."""
    text = one_line(f"TeckoChecker: {message.text}", 1000)
    text = text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")
    text = text.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
    body = {"text": text, "event": message.event, "job": message.job}
    return compact_json(body | ({"over": True} if message.is_over else {}))


def mail_of(messages: Sequence[Message], hooks: Iterable[Hook]) -> Mail:
    """Return messages with a copy for each webhook that wants to be told of them."""
    hooks = tuple(hooks)
    copies = [
        (hook.secret, message_body(message))
        for message in messages
        for hook in hooks
        if message.event in hook.events
    ]
    return Mail(messages, copies)


def after_failed_notice(notice: Notice, error: ApiError, now: float, jitter: float) -> Notice:
    """Return a notice that could not be delivered: it is tried again, each time later."""
    failures = notice.failures + 1
    wait_s = backoff_s(failures, NOTICE_BACKOFF_S, jitter, error.retry_after_s)
    return replace(notice, failures=failures, next_try_at=now + wait_s)


# ==================================================================================================
# 6. State: what must survive a crash, in one SQLite file
# ==================================================================================================

# Each migration is a list of statements, run in one transaction; its number is the user_version
# that it leads to. Times are Unix seconds. Nothing here is ever a secret.
MIGRATIONS: Final[Sequence[Sequence[str]]] = (
    (
        """
        CREATE TABLE jobs (            -- one row for each piece of work, for ever
            id            INTEGER PRIMARY KEY,
            name          TEXT NOT NULL,
            batch_key     TEXT NOT NULL,  -- JSON list of the sorted batch ids
            stack_url     TEXT NOT NULL,
            component_id  TEXT NOT NULL,
            config_id     TEXT NOT NULL,
            branch_id     TEXT,
            position      INTEGER,        -- in the config; NULL: not in it now
            paused        INTEGER NOT NULL DEFAULT 0,
            rerun         INTEGER NOT NULL DEFAULT 0,
            error         TEXT,
            failures      INTEGER NOT NULL DEFAULT 0,
            last_check_at REAL,
            next_check_at REAL,
            completed_at  REAL,
            UNIQUE (name, batch_key)
        ) STRICT""",
        """
        CREATE TABLE batches (
            job_id         INTEGER NOT NULL REFERENCES jobs (id),
            position       INTEGER NOT NULL,  -- in the config's list
            id             TEXT NOT NULL,
            status         TEXT,              -- NULL: not looked at yet
            total          INTEGER,
            completed      INTEGER,
            failed         INTEGER,
            output_file_id TEXT,
            error_file_id  TEXT,
            created_at     REAL,
            ended_at       REAL,
            error          TEXT,
            PRIMARY KEY (job_id, id)
        ) STRICT, WITHOUT ROWID""",
        """
        CREATE TABLE triggers (
            job_id         INTEGER NOT NULL REFERENCES jobs (id),
            rerun          INTEGER NOT NULL,
            id             TEXT NOT NULL,
            state          TEXT NOT NULL CHECK (
                state IN ('intent', 'sending', 'sent', 'rejected', 'unknown')),
            stack_url      TEXT NOT NULL,
            component_id   TEXT NOT NULL,
            config_id      TEXT NOT NULL,
            branch_id      TEXT,
            secret         TEXT NOT NULL,     -- the name of the secret
            payload        TEXT NOT NULL,
            basis          TEXT NOT NULL,
            created_at     REAL NOT NULL,
            sending_at     REAL,
            unknown_at     REAL,
            clear_searches INTEGER NOT NULL DEFAULT 0,
            forced         INTEGER NOT NULL DEFAULT 0,
            failures       INTEGER NOT NULL DEFAULT 0,
            next_try_at    REAL,
            sent_at        REAL,
            keboola_job_id TEXT,
            keboola_status TEXT,
            url            TEXT,
            error          TEXT,
            PRIMARY KEY (job_id, rerun)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX triggers_by_state ON triggers (state) WHERE state <> 'sent'",
        """
        CREATE TABLE logs (
            id     INTEGER PRIMARY KEY,
            at     REAL NOT NULL,
            level  TEXT NOT NULL,
            event  TEXT NOT NULL,
            job    TEXT,
            fields TEXT NOT NULL              -- JSON object
        ) STRICT""",
        "CREATE INDEX logs_by_time ON logs (at)",
        """
        CREATE TABLE requests (               -- what people asked for with `retry`
            id      INTEGER PRIMARY KEY,
            at      REAL NOT NULL,
            job     TEXT NOT NULL,
            force   INTEGER NOT NULL,
            rerun   INTEGER NOT NULL,         -- what the person saw: the rerun,
            was_finished INTEGER NOT NULL,    -- and whether it was finished
            done_at REAL
        ) STRICT""",
        """
        CREATE TABLE meta (                   -- about the process: which config it runs with
            key   TEXT PRIMARY KEY,
            value TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        # Beside unknown_at: the boot it was in, and how long the machine had been up.
        "ALTER TABLE triggers ADD COLUMN unknown_boot TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE triggers ADD COLUMN unknown_uptime_s REAL NOT NULL DEFAULT 0",
        "CREATE INDEX jobs_by_batches ON jobs (batch_key)",  # a renamed job is found by its ids
    ),
    (
        "ALTER TABLE jobs ADD COLUMN done INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX logs_by_job ON logs (job, id) WHERE job IS NOT NULL",
        """
        CREATE TABLE accounts (               -- how the requests with each secret have fared
            secret          TEXT PRIMARY KEY, -- its name
            service         TEXT NOT NULL,
            requests        INTEGER NOT NULL,
            errors          INTEGER NOT NULL,
            last_success_at REAL,
            refused_since   REAL,
            last_refused_at REAL,
            error           TEXT
        ) STRICT, WITHOUT ROWID""",
        """
        CREATE TABLE alarms (                 -- what webhooks have been told and is not over
            event   TEXT NOT NULL,
            subject TEXT NOT NULL,
            job     TEXT,
            at      REAL NOT NULL,
            PRIMARY KEY (event, subject)
        ) STRICT, WITHOUT ROWID""",
        """
        CREATE TABLE notices (                -- what webhooks are still to be told
            id          INTEGER PRIMARY KEY,
            at          REAL NOT NULL,
            secret      TEXT NOT NULL,        -- the webhook
            body        TEXT NOT NULL,        -- JSON object
            failures    INTEGER NOT NULL DEFAULT 0,
            next_try_at REAL NOT NULL
        ) STRICT""",
    ),
    (
        "ALTER TABLE triggers ADD COLUMN project_id TEXT",  # NULL: not asked for yet
        "ALTER TABLE triggers ADD COLUMN unknowns INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE triggers ADD COLUMN asked_wait_s REAL NOT NULL DEFAULT 0",
        "ALTER TABLE triggers ADD COLUMN said TEXT",  # what came of the last POST, if unknown
        # Since when a batch has ended, but without files that its counts promise.
        "ALTER TABLE batches ADD COLUMN fileless_since REAL",
    ),
)

# The columns are the model's own names; a target has four, wherever it stands.
_TARGET_COLUMNS: Final = tuple(f.name for f in fields(Target))
_BATCH_COLUMNS: Final = tuple(f.name for f in fields(Batch))
_USAGE_COLUMNS: Final = tuple(f.name for f in fields(Usage))
_NOTICE_COLUMNS: Final = tuple(f.name for f in fields(Notice))
_TRIGGER_COLUMNS: Final = tuple(f.name for f in fields(Trigger) if f.name != "target")
_WORK_COLUMNS: Final = tuple(
    f.name for f in fields(Work) if f.name not in {"batches", "target", "trigger"}
)

COMMAND_TIMEOUT_S: Final = 5.0  # how long a command waits for another writer

STATE_HINT: Final = "restore it from a backup, or move it away: Keboola is searched before any POST"
_STATE_HINTS: Final = {
    sqlite3.SQLITE_FULL: "free the disk",
    sqlite3.SQLITE_BUSY: "see who else has the file open",
    sqlite3.SQLITE_READONLY: "give this user the right to write the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "check the path, and this user's rights to the file and its directory",
    sqlite3.SQLITE_IOERR: "look into the system's log for disk errors",
}

# What a process works on, see `is_live`, as SQL.
LIVE: Final = (
    "(position IS NOT NULL OR id IN"
    " (SELECT job_id FROM triggers WHERE state IN ('intent', 'sending', 'unknown')))"
)


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
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return os.open(path, flags)
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    except OSError as error:
        hints = {
            errno.ENOENT: "create the directory (systemd does, when it starts the unit)",
            errno.ELOOP: "put the file itself there, not a link to it",
        }
        hint = hints.get(error.errno or 0, "correct state:, or this user's rights to the directory")
        raise StateError(f"cannot open {path}: {error.strerror}", hint) from None
    return fd


def batch_key(batch_ids: Iterable[str]) -> str:
    """Return a set of batch ids as the state file has it."""
    return compact_json(sorted(batch_ids))


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return what tells this file from another one of its name, or None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


PAGE_FILE: Final = "status.html"  # what there is under `publish`
AGAIN_FILE: Final = "status-again.html"  # the same page; see `page_head`
STATUS_FILE: Final = "status.json"
METRICS_FILE: Final = "metrics.prom"
PUBLISHED: Final = (STATUS_FILE, METRICS_FILE, PAGE_FILE, AGAIN_FILE)


def new_name(name: str) -> str:
    """Return the name under which a file is written before it takes its place."""
    return f".{name}.new"


def lock_path(state_path: Path) -> Path:
    """Return the lock file of a state file."""
    return state_path.with_name(state_path.name + ".lock")


class Holder(enum.StrEnum):
    """Who acts on a state file."""

    DAEMON = "daemon"
    ONCE = "--once"
    NOBODY = ""
    HIDDEN = "hidden"  # from a user who may not read the lock file


class StateLock:
    """The exclusive lock of the one process that acts on a state file; the kernel lets it go.

    The lock file says who has it, and when something was last posted: should the state file be
    lost or replaced by an older one, this tells that Keboola's search may not show everything yet.
    """

    PATIENCE_S: Final = 1.0  # a reader holds it for moments: see `read_store`

    def __init__(self, state_path: Path, purpose: str) -> None:
        """Take the lock. Raises LockedError, or StateError where there is no place for it."""
        self.path = lock_path(state_path)
        self._fd = open_own(self.path)
        self._take()
        status = os.fstat(self._fd)
        self._inode = (status.st_dev, status.st_ino)
        self._holder = f"pid {os.getpid()} ({purpose})"
        self.last_post = self._read_last_post()
        self._write_label()

    def note_post(self, now: Moment) -> None:
        """Remember the time of a POST outside of the state file."""
        self.last_post = now
        self._write_label()

    def _read_last_post(self) -> Moment | None:
        number = r"([0-9]{1,15}\.[0-9]{1,9})"
        pattern = rf"last POST at {number} \(boot ([!-~]{{0,64}}) up {number}\)"
        match = re.search(pattern, self._label())
        return Moment(float(match[1]), match[2], float(match[3])) if match else None

    def _label(self) -> str:
        return os.pread(self._fd, 200, 0).decode(errors="replace")

    def _write_label(self, *, is_held: bool = True) -> None:
        lines = [self._holder] if is_held else []
        if self.last_post:
            wall, boot, uptime_s = astuple(self.last_post)
            lines.append(f"last POST at {wall:.6f} (boot {boot} up {uptime_s:.3f})")
        text = "".join(f"{line}\n" for line in lines).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its label
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))

    def _take(self) -> None:
        deadline = time.monotonic() + self.PATIENCE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    label = self._label()
                    holder = label.splitlines()[0] if label.startswith("pid") else "a reader"
                    os.close(self._fd)
                    message = f"another instance holds {self.path}: {holder}"
                    raise LockedError(message, "wait for it, or stop it") from None
                time.sleep(0.05)
            except OSError as error:
                message = f"cannot lock {self.path}: {error.strerror}"
                raise StateError(message, "put state: on a local disk") from None

    def is_in_place(self) -> bool:
        """Return whether the file that is locked is still the one of its name."""
        return inode_of(self.path) == self._inode

    def close(self) -> None:
        """Let the lock go, and with it the label that says who has it."""
        self._write_label(is_held=False)
        os.close(self._fd)


def state_hint(error: sqlite3.Error) -> str:
    """Return what to do about an error of SQLite's, by its primary result code."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return _STATE_HINTS.get(code, STATE_HINT)


def picked(row: sqlite3.Row, columns: Sequence[str]) -> dict[str, Any]:
    """Return some of a row's values by column."""
    return {column: row[column] for column in columns}


def as_row(part: Target | Batch | Usage) -> dict[str, Any]:
    """Return a part of the model as columns."""
    return {column: getattr(part, column) for column in part.__slots__}


def target_of(row: sqlite3.Row) -> Target:
    """Return the target that stands in a row."""
    return Target(**picked(row, _TARGET_COLUMNS))


def connect_readonly(uri: str) -> sqlite3.Connection:
    """Return a connection that has proved that it can read."""
    db = sqlite3.connect(uri, uri=True, timeout=COMMAND_TIMEOUT_S, isolation_level=None)
    try:
        db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db


def check_version(db: sqlite3.Connection, path: Path) -> int:
    """Return the schema's version; a newer one is refused, and so is another program's file."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        known = len(MIGRATIONS)
        message = f"the state file {path} has schema {version}; this program knows {known}"
        raise StateError(message, "run the newer teckochecker that wrote it")
    if version == 0 and db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
        raise StateError(f"{path} is the database of another program", "correct state:")
    return version


def check_file(path: Path) -> None:
    """Refuse a file that is damaged, newer or not ours, before anything is written to it.

    Through a connection of its own: one that may write folds the WAL in when it is closed.
    """
    uri = path.absolute().as_uri() + "?mode=ro"
    with seeing_damage(path), contextlib.closing(connect_readonly(uri)) as db:
        check_version(db, path)
        refuse_damage(db, path)


def roll_back(path: Path) -> None:
    """Undo what a process was killed in before the file was in WAL mode; read-only, none can."""
    if is_there(path.with_name(path.name + "-journal")):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("SELECT count(*) FROM sqlite_schema").fetchone()


def damaged(path: Path, what: str) -> StateError:
    """Return the error of a damaged state file."""
    return StateError(f"the state file {path} is damaged: {one_line(what)}", STATE_HINT)


@contextlib.contextmanager
def seeing_damage(path: Path) -> Iterator[None]:
    """Have the damage that SQLite stumbles over told as a StateError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        raise damaged(path, str(error)) from None


def refuse_damage(db: sqlite3.Connection, path: Path) -> None:
    """Raise StateError if SQLite's quick_check finds the file damaged."""
    with seeing_damage(path):
        result = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if result != "ok":  # some damage it reports, over some it stumbles
        raise damaged(path, result)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the schema to this version, all of it or nothing."""
    if check_version(db, path) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        version = check_version(db, path)
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


class Store:
    """The state file. Every change is one transaction; what fails raises StorageError whole."""

    START_TIMEOUT_S: Final = 1.0  # how long to wait for another writer
    LOOP_TIMEOUT_S: Final = 0.05  # the loop stands still meanwhile; what fails is tried again

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._db.row_factory = sqlite3.Row
        self.path = path
        self._inode = inode_of(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open for acting, under the lock. Raises StateError for what is no state file."""
        os.close(open_own(path))
        try:
            roll_back(path)
            if path.stat().st_size:
                check_file(path)
            db = sqlite3.connect(path, timeout=cls.START_TIMEOUT_S, isolation_level=None)
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                message = f"{path}: this file system cannot do SQLite's WAL mode"
                raise StateError(message, "put state: on a local disk")
            # NORMAL does not sync commits: power loss could take back an intent that was acted on.
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            migrate(db, path)
        except sqlite3.Error as error:
            message = f"cannot use the state file {path}: {error}"
            raise StateError(message, state_hint(error)) from None
        return cls(db, path)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what happens inside, or nothing of it."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:  # a failed COMMIT leaves it open; so does an exception
                    self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            message = f"cannot write the state file {self.path}: {error}"
            raise StorageError(message, state_hint(error)) from error

    def is_in_place(self) -> bool:
        """Return whether the open file is still the one of its name."""
        return self._inode is not None and inode_of(self.path) == self._inode

    def be_quick(self) -> None:
        """Wait for another writer only as long as an event loop may stand still."""
        self._db.execute(f"PRAGMA busy_timeout = {round(self.LOOP_TIMEOUT_S * 1000)}")

    def refuse_damage(self) -> None:
        """Raise StateError if the file is damaged."""
        refuse_damage(self._db, self.path)

    def data_version(self) -> int:
        """Return a number that changes when another connection has committed something."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the file; the last one to do so folds the WAL in."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    # --- pieces of work ---

    def known(self, batch_keys: Iterable[str]) -> list[Known]:
        """Return every piece of work there ever was with these batches, for `assign`."""
        rows = self._db.execute(
            "SELECT *, EXISTS (SELECT 1 FROM triggers t WHERE t.job_id = jobs.id"
            " AND t.rerun = jobs.rerun AND t.state = 'sent') AS is_finished FROM jobs"
            " WHERE batch_key IN (SELECT value FROM json_each(?))",
            (compact_json(list(batch_keys)),),
        )
        return [
            Known(
                id=row["id"],
                name=row["name"],
                batch_ids=frozenset(json.loads(row["batch_key"])),
                target=target_of(row),
                is_finished=bool(row["is_finished"]),
                position=row["position"],
            )
            for row in rows
        ]

    def works(self, where: str = LIVE, ids: Iterable[int] = ()) -> list[Work]:
        """Return pieces of work with their batches and current triggers, in the config's order.

        They are those for which `where` holds, and those with one of `ids`.
        """
        where = f"({where} OR id IN (SELECT value FROM json_each(:ids)))"
        chosen = f"job_id IN (SELECT id FROM jobs WHERE {where})"
        wanted = {"ids": compact_json(list(ids))}
        batches: dict[int, list[Batch]] = {}
        for row in self._db.execute(
            f"SELECT * FROM batches WHERE {chosen} ORDER BY job_id, position", wanted
        ):
            batch = Batch(**picked(row, _BATCH_COLUMNS))
            batches.setdefault(row["job_id"], []).append(batch)
        triggers: dict[tuple[int, int], Trigger] = {}
        for row in self._db.execute(f"SELECT * FROM triggers WHERE {chosen}", wanted):
            values = picked(row, _TRIGGER_COLUMNS)
            values |= {"state": TriggerState(row["state"]), "forced": bool(row["forced"])}
            trigger = Trigger(target=target_of(row), **values)
            triggers[row["job_id"], trigger.rerun] = trigger
        return [
            Work(
                **picked(row, _WORK_COLUMNS)
                | {"paused": bool(row["paused"]), "done": bool(row["done"])},
                batches=tuple(batches.get(row["id"], ())),
                target=target_of(row),
                trigger=triggers.get((row["id"], row["rerun"])),
            )
            for row in self._db.execute(
                f"SELECT * FROM jobs WHERE {where} ORDER BY position, id", wanted
            )
        ]

    def last_sending_at(self) -> float:
        """Return when the last POST was begun, so far as this file knows; 0 for never."""
        return float(self._db.execute("SELECT max(sending_at) FROM triggers").fetchone()[0] or 0)

    def sync(
        self, jobs: Mapping[str, Job], targets: Mapping[str, Target], works: Iterable[Work]
    ) -> list[Work]:
        """Make the rows follow the config, writing only what differs; return all live works.

        `works` are those that are live so far: they are not read again.
        """
        with self.transaction():
            before = {work.id: work for work in works}
            rows = [known_of(work) for work in before.values()]
            settled = {(row.name, row.batch_ids) for row in rows}
            keys = [
                batch_key(job.batch_ids)
                for name, job in jobs.items()
                if (name, frozenset(job.batch_ids)) not in settled
            ]
            rows += [row for row in self.known(keys) if row.id not in before]
            assigned = assign(jobs, targets, rows)
            returning = [row_id for row_id in assigned.values() if row_id not in before]
            before |= {work.id: work for work in self.works("FALSE", returning)}
            kept = set(assigned.values())
            after = {
                work.id: replace(work, position=None)
                for work in before.values()
                if work.id not in kept
            }
            for position, (name, job) in enumerate(jobs.items()):
                target, old = targets[name], before.get(assigned.get(name, -1))
                new = (
                    as_in_config(old, job, target, position)
                    if old
                    else self._insert(job, target, position)
                )
                after[new.id] = new
            for work_id, work in after.items():
                if work_id in before:
                    self._write(before[work_id], work)
        return [work for work in after.values() if is_live(work)]

    def _insert(self, job: Job, target: Target, position: int) -> Work:
        row = {"name": job.name, "batch_key": batch_key(job.batch_ids), "position": position}
        row |= {"paused": job.paused, "done": job.done}
        work_id = self._put("jobs", row | as_row(target), verb="INSERT")
        batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
        self._db.executemany(
            "INSERT INTO batches (job_id, position, id) VALUES (?, ?, ?)",
            [(work_id, place, batch.id) for place, batch in enumerate(batches)],
        )
        return Work(work_id, job.name, batches, target, position, job.paused, job.done)

    def save(
        self,
        changes: Iterable[tuple[Work, Work]],
        events: Sequence[Event],
        now: float,
        mail: Mail = NO_MAIL,
    ) -> None:
        """Store how works have changed, together with log rows and mail that tell of it."""
        with self.transaction():
            for before, after in changes:
                self._write(before, after)
            self._write_events(events, now)
            self._write_mail(mail, now)

    def touch(self, looks: Iterable[tuple[int, float, float]], usages: Mapping[str, Usage]) -> None:
        """Store when works, by their ids, were looked at and will be: nothing else has changed.

        With it, how the requests with some secrets have fared.
        """
        with self.transaction():
            self._db.executemany(
                "UPDATE jobs SET last_check_at = ?2, next_check_at = ?3 WHERE id = ?1", looks
            )
            for secret, usage in usages.items():
                self._put("accounts", {"secret": secret} | as_row(usage))

    def _write(self, before: Work, after: Work) -> None:
        """Write what differs between two states of one piece of work."""
        if after is before:
            return
        row = {
            c: getattr(after, c) for c in _WORK_COLUMNS if getattr(after, c) != getattr(before, c)
        }
        if after.target != before.target:
            row |= as_row(after.target)
        if row:
            changes = ", ".join(f"{column} = :{column}" for column in row)
            self._db.execute(f"UPDATE jobs SET {changes} WHERE id = :id", row | {"id": before.id})
        for place, (old, new) in enumerate(zip(before.batches, after.batches, strict=True)):
            if old != new:
                self._write_batch(after.id, place, new)
        if after.trigger and after.trigger != before.trigger:
            row = {column: getattr(after.trigger, column) for column in _TRIGGER_COLUMNS}
            self._put("triggers", {"job_id": after.id} | as_row(after.trigger.target) | row)

    def _write_batch(self, work_id: int, place: int, batch: Batch) -> None:
        self._put("batches", {"job_id": work_id, "position": place} | as_row(batch))

    def _put(self, table: str, row: Mapping[str, object], verb: str = "INSERT OR REPLACE") -> int:
        """Insert a row, or replace the one with its key; returns the row's number."""
        marks = ", ".join(f":{column}" for column in row)
        statement = f"{verb} INTO {table} ({', '.join(row)}) VALUES ({marks})"
        return int(self._db.execute(statement, row).lastrowid or 0)

    # --- log, requests, meta ---

    def log(self, events: Sequence[Event], now: float) -> None:
        """Store log rows that go with no other change."""
        with self.transaction():
            self._write_events(events, now)

    def _write_events(self, events: Sequence[Event], now: float) -> None:
        self._db.executemany(
            "INSERT INTO logs (at, level, event, job, fields) VALUES (?, ?, ?, ?, ?)",
            [(now, e.level, e.name, e.job, json.dumps(e.fields, default=repr)) for e in events],
        )

    def logs(self, *, after: int, job: str | None, most: int | None) -> list[LogRow]:
        """Return log rows with a higher id, of one job or of all; the last `most`, in order."""
        of_job = "" if job is None else "AND job = :job"  # so written, the index by job is used
        rows = self._db.execute(
            f"SELECT * FROM logs WHERE id > :after {of_job} ORDER BY id DESC LIMIT :most",
            {"after": after, "job": job, "most": -1 if most is None else most},
        ).fetchall()
        return [
            LogRow(
                r["id"], r["at"], Event(r["event"], r["level"], r["job"], json.loads(r["fields"]))
            )
            for r in reversed(rows)
        ]

    def last_log_id(self) -> int:
        """Return the number of the newest log row, or 0."""
        return int(self._db.execute("SELECT max(id) FROM logs").fetchone()[0] or 0)

    def prune(self, before: float) -> None:
        """Drop log rows and settled requests older than a Unix time."""
        with self.transaction():
            # The newest row stays, so that no number is given twice: `logs --follow` counts on it.
            newest = "(SELECT max(id) FROM logs)"
            self._db.execute(f"DELETE FROM logs WHERE at < ? AND id < {newest}", (before,))
            self._db.execute("DELETE FROM requests WHERE done_at < ?", (before,))

    def ask(self, work: Work, *, force: bool, now: float) -> None:
        """Store that a person asked for a retry, and of what."""
        row = {"at": now, "job": work.name, "force": force}
        with self.transaction():
            seen = {"rerun": work.rerun, "was_finished": work.is_finished}
            self._put("requests", row | seen, verb="INSERT")

    def requests(self) -> list[Request]:
        """Return the open requests."""
        rows = self._db.execute("SELECT * FROM requests WHERE done_at IS NULL ORDER BY id")
        return [
            Request(r["id"], r["job"], bool(r["force"]), r["rerun"], bool(r["was_finished"]))
            for r in rows
        ]

    def settle(
        self, request: int, before: Work, after: Work, events: Sequence[Event], now: float
    ) -> None:
        """Store a request's effect and that it was done, as one: it is never done twice."""
        with self.transaction():
            self._db.execute("UPDATE requests SET done_at = ? WHERE id = ?", (now, request))
            self._write(before, after)
            self._write_events(events, now)

    def dismiss(self, request: int, events: Sequence[Event], now: float) -> None:
        """Store that a request came to nothing."""
        with self.transaction():
            self._db.execute("UPDATE requests SET done_at = ? WHERE id = ?", (now, request))
            self._write_events(events, now)

    def put_meta(
        self, key: str, value: object, events: Sequence[Event], now: float, mail: Mail = NO_MAIL
    ) -> None:
        """Store a fact about the process as JSON."""
        with self.transaction():
            self._put("meta", {"key": key, "value": compact_json(value)})
            self._write_events(events, now)
            self._write_mail(mail, now)

    # --- webhooks and accounts ---

    def alarms(self) -> dict[Alarm, str | None]:
        """Return what webhooks have been told and is not over, with the job that it is about."""
        rows = self._db.execute("SELECT * FROM alarms")
        return {(row["event"], row["subject"]): row["job"] for row in rows}

    def _write_mail(self, mail: Mail, now: float) -> None:
        for message in mail.messages:
            alarm = {"event": message.event, "subject": message.subject}
            if message.is_over:
                where = "event = :event AND subject = :subject"
                self._db.execute(f"DELETE FROM alarms WHERE {where}", alarm)
            elif message.lasts:
                self._put("alarms", alarm | {"job": message.job, "at": now})
        for secret, body in mail.copies:
            row = {"at": now, "secret": secret, "body": body, "next_try_at": now}
            self._put("notices", row, verb="INSERT")

    def notices(self) -> list[Notice]:
        """Return what webhooks are still to be told, the oldest first."""
        rows = self._db.execute("SELECT * FROM notices ORDER BY id")
        return [Notice(**picked(row, _NOTICE_COLUMNS)) for row in rows]

    def put_off(self, notices: Iterable[Notice]) -> None:
        """Store when notices are tried again."""
        with self.transaction():
            self._db.executemany(
                "UPDATE notices SET failures = ?, next_try_at = ? WHERE id = ?",
                [(notice.failures, notice.next_try_at, notice.id) for notice in notices],
            )

    def hurry_notices(self, webhooks: Iterable[str], now: float) -> None:
        """Have all messages of some webhooks tried at once."""
        with self.transaction():
            self._db.executemany(
                "UPDATE notices SET next_try_at = ? WHERE secret = ?",
                [(now, webhook) for webhook in webhooks],
            )

    def next_notice_at(self) -> float | None:
        """Return when the next message is due."""
        row = self._db.execute("SELECT min(next_try_at) FROM notices").fetchone()
        return None if row[0] is None else float(row[0])

    def drop_notices(self, ids: Iterable[int]) -> None:
        """Forget notices: they are delivered, or never will be."""
        with self.transaction():
            self._db.executemany("DELETE FROM notices WHERE id = ?", [(i,) for i in ids])

    def usages(self) -> dict[str, Usage]:
        """Return how the requests with each secret have fared, by its name."""
        rows = self._db.execute("SELECT * FROM accounts ORDER BY secret")
        return {row["secret"]: Usage(**picked(row, _USAGE_COLUMNS)) for row in rows}

    def meta(self, key: str) -> Any:  # noqa: ANN401 - JSON
        """Return a stored fact, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None


@contextlib.contextmanager
def read_store(path: Path) -> Iterator[Store | None]:
    """Open the state file for reading, beside a running daemon too; None where there is none yet.

    Raises StateError where it cannot be read.
    """
    if not is_there(path):
        yield None
        return
    uri = path.absolute().as_uri()
    with contextlib.ExitStack() as stack:
        try:
            try:
                db = connect_readonly(uri + "?mode=ro")
            except sqlite3.OperationalError:
                # Without write permission, a WAL database opens only while someone else has it
                # open. With nobody writing (the shared lock sees to that), it is just a file.
                wal = path.with_name(path.name + "-wal")
                if not stack.enter_context(shared_lock(path)) or is_there(wal):
                    raise
                db = connect_readonly(uri + "?mode=ro&immutable=1")
            stack.callback(db.close)
            version = check_version(db, path)
            if 0 < version < len(MIGRATIONS):  # until the daemon's restart after an upgrade
                old, db = db, sqlite3.connect(":memory:", isolation_level=None)
                stack.callback(db.close)
                old.backup(db)
                migrate(db, path)
        except sqlite3.Error as error:
            hint = "run this as the user of the daemon, or as root"
            raise StateError(f"cannot read the state file {path}: {error}", hint) from None
        yield Store(db, path) if version else None


@contextlib.contextmanager
def shared_lock(state_path: Path) -> Iterator[bool]:
    """Keep the acting process out while a reader reads; False where one is in already."""
    try:
        fd = os.open(lock_path(state_path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # nobody has acted on this file here: a copy
        return
    except OSError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def holder_of(state_path: Path) -> Holder:
    """Return who holds the state file now."""
    with shared_lock(state_path) as free:
        if free:
            return Holder.NOBODY
    try:
        label = lock_path(state_path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Holder.HIDDEN
    return Holder.ONCE if "(--once)" in label else Holder.DAEMON


# ==================================================================================================
# 7. OpenAI and Keboola: requests out, facts or an ApiError back
# ==================================================================================================

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
PATIENCE_S: Final = 10.0  # the longest wait for one retry; whatever takes longer is scheduled
REQUEST_BUDGET_S: Final = 60.0  # a request with all of its retries
MAX_ATTEMPTS: Final = 4
SEARCH_LIMIT: Final = 500
MAX_SEARCH_ROWS: Final = 20_000
MAX_ID_LENGTH: Final = 4096
MAX_IDS_TOLD: Final = 20
USER_AGENT: Final = f"teckochecker/{__version__}"

_HEADERS_READ: Final = ("content-type", "date", "retry-after", "retry-after-ms", "x-request-id")


def was_sent(error: Exception) -> bool:
    """Return whether something of a request may have reached the server, by httpx's exception."""
    import httpx

    not_sent = (
        httpx.ConnectError,
        httpx.ConnectTimeout,
        httpx.PoolTimeout,
        httpx.UnsupportedProtocol,
        httpx.InvalidURL,
        UnicodeError,  # from idna, for a host name that is none
    )
    return not isinstance(error, not_sent)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def request_id(self) -> str:
        return one_line(self.headers.get("x-request-id", ""), 100)


class Gate:
    """At most `limit` holders at a time, first come first served; the limit can change.

    A place is handed over, not given up and taken: nobody overtakes, and whoever is cancelled in
    the moment of getting it hands it on.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    def set_limit(self, limit: int) -> None:
        """Change the limit; who is inside stays."""
        self._limit = limit
        self._admit()

    async def __aenter__(self) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._inside < self._limit:
            place = self._waiting.popleft()
            if not place.done():  # else its owner was cancelled while waiting
                self._inside += 1
                place.set_result(None)


class Clock(Protocol):
    """Time and chance, passed in so that tests can make their own."""

    def wall(self) -> float:
        """Return Unix seconds, for what is recorded; it may jump."""

    def mono(self) -> float:
        """Return seconds that only ever grow, for what is waited for."""

    def moment(self) -> Moment:
        """Return the time as it can be measured from later, after a restart too."""

    def jitter(self) -> float:
        """Return a random number from 0 to 1."""


class SystemClock:
    """The machine's clock."""

    def __init__(self) -> None:
        self._boot = ""
        with contextlib.suppress(OSError):  # not Linux: the wall clock has to do
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._uptime = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def wall(self) -> float:
        return time.time()

    def moment(self) -> Moment:
        return Moment(time.time(), self._boot, time.clock_gettime(self._uptime))

    def mono(self) -> float:
        return time.monotonic()

    def jitter(self) -> float:
        return random.random()  # noqa: S311 - spreads load, guards nothing


def settle_sniffio() -> None:
    """Have the absence of sniffio remembered.

    httpcore 1.0 imports it several times a request, to tell asyncio from trio. Where it is missing,
    as beside a recent anyio, each time is a search through all of sys.path: a fifth of the CPU.
    """
    if importlib.util.find_spec("sniffio") is None:
        sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type] # "known not to be there"


class Budget:
    """What is left of REQUEST_BUDGET_S, counted from the first attempt, not from the queue."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: float | None = None

    def left_s(self) -> float:
        """Return the seconds left."""
        now = self._clock.mono()
        self._until = now + REQUEST_BUDGET_S if self._until is None else self._until
        return self._until - now


def leave_out_no_proxy(env: MutableMapping[str, str]) -> list[str]:
    """Take out of NO_PROXY what httpx has no form for, such as an IPv6 network; return that.

    One such entry would let no client be made at all.
    """
    import httpx

    left_out = []
    for name in ("no_proxy", "NO_PROXY"):
        kept = []
        for entry in env.get(name, "").split(","):
            host = entry.strip()
            pattern = host if "://" in host else f"all://*{host}"  # as httpx has it
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(host.split("/")[0])
                pattern = f"all://[{host}]" if address.version == 6 else f"all://{host}"
            try:
                httpx.URL(pattern)
            except httpx.InvalidURL:
                left_out.append(entry.strip())
            else:
                kept.append(entry)
        if name in env and len(kept) < len(env[name].split(",")):
            env[name] = ",".join(kept)
    return list(dict.fromkeys(left_out))


class Http:
    """The one way out: a gate, a deadline for the whole request, and a cap on the answer."""

    def __init__(self, limits: Limits, redactor: Redactor, clock: Clock) -> None:
        self.limits = limits
        self.clock = clock
        self.redactor = redactor
        self.gate = Gate(limits.max_concurrency)
        self.tell: Callable[[Event], None] | None = None
        settle_sniffio()
        self._tls: ssl.SSLContext | None = None
        self._client: httpx.AsyncClient | None = None

    def set_limits(self, limits: Limits) -> None:
        """Take new limits; requests in flight keep theirs."""
        self.limits = limits
        self.gate.set_limit(limits.max_concurrency)

    def new_client(self) -> httpx.AsyncClient:
        """Return a client with connections of its own; the TLS context is costly, and shared."""
        import httpx

        left_out = leave_out_no_proxy(os.environ)
        if left_out and self.tell:
            self.tell(Event("no_proxy_ignored", "warning", None, {"entries": left_out}))
        try:
            return self._new_client()
        except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
            # A proxy or certificates set amiss.
            message = f"cannot set up connections: {one_line(str(error), 200)}"
            raise ApiError(self.redactor.text(message), sent=False) from None

    def _new_client(self) -> httpx.AsyncClient:
        from http.cookiejar import CookieJar, DefaultCookiePolicy

        import httpx

        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        loopback = ("127.0.0.1", "localhost", "[::1]")
        return httpx.AsyncClient(
            verify=self._tls,
            timeout=None,  # noqa: S113 - `_fetch` has a deadline for the whole
            follow_redirects=False,  # a redirect would carry the token to another host
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=10, keepalive_expiry=30
            ),
            mounts={f"all://{host}": None for host in loopback},  # a proxy is not for these
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # takes none
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client:
            await self._client.aclose()

    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        *,
        budget: Budget,
    ) -> Answer:
        """Return the answer to a GET; raises ApiError where none came in time."""
        if self._client is None:
            self._client = self.new_client()
        async with self.gate:
            timeout_s = max(1.0, min(self.limits.request_timeout_s, budget.left_s()))
            return await self._fetch(
                self._client, timeout_s, "GET", url, headers=headers, params=params
            )

    async def post(self, url: str, headers: Mapping[str, str], body: str) -> Answer:
        """Return the answer to one POST over a fresh connection; an ApiError tells if it was sent.

        A kept connection that the server is about to close looks like a lost answer.
        """
        started = False

        async def trace(event: str, _: object) -> None:
            nonlocal started
            started = started or event.endswith("send_request_headers.started")

        async with self.gate, self.new_client() as client:
            try:
                return await self._fetch(
                    client,
                    self.limits.request_timeout_s,
                    "POST",
                    url,
                    headers=headers,
                    content=body.encode(),
                    extensions={"trace": trace},
                )
            except ApiError as error:
                error.sent = started
                raise

    async def _fetch(
        self,
        client: httpx.AsyncClient,
        timeout_s: float,
        method: str,
        url: str,
        **parts: Any,  # noqa: ANN401 - as httpx.AsyncClient.build_request takes them
    ) -> Answer:
        """Send one request; httpx's own time-outs are per read, which a drip of bytes outlives."""
        import httpx

        try:
            async with asyncio.timeout(timeout_s):
                request = client.build_request(method, url, **parts)
                response = await client.send(request, stream=True)
                try:
                    body = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            message = f"no whole answer within {show_duration(timeout_s)}"
            raise ApiError(message, retryable=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError, zlib.error) as error:
            text = one_line(self.redactor.text(str(error)), 200)  # in this order: no half a secret
            message = f"{type(error).__name__}{': ' + text if text else ''}"
            raise ApiError(message, retryable=True, sent=was_sent(error)) from None
        body = self.redactor.body(body, is_data=response.is_success)
        told = {name: response.headers[name] for name in _HEADERS_READ if name in response.headers}
        headers = {name: self.redactor.text(value) for name, value in told.items()}
        return Answer(response.status_code, headers, body)

    @staticmethod
    async def _read(response: httpx.Response) -> bytes:
        """Return the body, capped while it streams, and while it is expanded.

        Nobody asked for compression; httpx would expand whatever comes without a limit.
        """
        encoding = response.headers.get("content-encoding", "").lower() or "identity"
        expander = zlib.decompressobj(wbits=47) if encoding in {"gzip", "deflate"} else None
        if expander is None and encoding != "identity":
            raise ApiError("the answer has an encoding that was not asked for")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += expander.decompress(chunk, MAX_BODY_BYTES) if expander else chunk
            if len(body) > MAX_BODY_BYTES or (expander and expander.unconsumed_tail):
                raise TooLargeError("the answer is over 16 MiB", retryable=True)
            if expander and expander.eof:
                break  # what follows would only be collected
        return bytes(body)


# --- reading what came ----------------------------------------------------------------------------


def nonsense(what: str, answer: Answer) -> ApiError:
    """Return the error of an answer that is not what it claims to be; the next one may be."""
    message = f"{what}, with status {answer.status}"
    return ApiError(message, status=answer.status, retryable=True, request_id=answer.request_id)


def parse_json(answer: Answer) -> Any:  # noqa: ANN401 - JSON
    """Return the body as JSON; raises ApiError (retryable) where it is something else."""
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        kind = one_line(answer.headers.get("content-type", "no content type"), 60)
        raise nonsense(f"an answer that is not JSON ({kind})", answer) from None


def text_or_none(value: object, limit: int = 300) -> str | None:
    """Return a JSON string as one clean line, or None for anything else, also the empty one."""
    return one_line(value, limit) or None if isinstance(value, str) else None


def id_or_none(value: object) -> str | None:
    """Return an id on one line, or None for what is none; raises ValueError rather than cut it."""
    if not isinstance(value, str):
        return None
    if len(value) > MAX_ID_LENGTH:
        raise ValueError(f"has an id of over {MAX_ID_LENGTH:,} characters")
    return one_line(value, MAX_ID_LENGTH) or None


def count_or_none(value: object) -> int | None:
    """Return a JSON number as a count, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1e15 else None


def time_or_none(value: object) -> float | None:
    """Return a JSON number as Unix seconds of this age, or None for anything else."""
    count = count_or_none(value)
    return float(count) if count and count < 4e9 else None


def first_error(errors: object) -> str | None:
    """Return the first message of a batch's `errors`, in either of the forms seen."""
    items = errors.get("data") if isinstance(errors, dict) else errors
    first = items[0] if isinstance(items, list) and items else None
    return text_or_none(first.get("message")) if isinstance(first, dict) else None


def parse_batch(data: object, batch_id: str) -> Batch:
    """Return a batch as OpenAI describes it; raises ValueError for what is none.

    Compatible endpoints leave much out, write statuses in capitals and `errors` as a list: only
    `status` is indispensable, and the id must not be another one's.
    """
    if not isinstance(data, dict):
        raise ValueError("is not an object")
    status = text_or_none(data.get("status"), 64)
    if status is None:
        raise ValueError("has no status")
    if data.get("id") is not None and data["id"] != batch_id:
        raise ValueError("has another id")
    status = status.lower()
    counts = data.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    return Batch(
        id=batch_id,
        status=status,
        total=count_or_none(counts.get("total")),
        completed=count_or_none(counts.get("completed")),
        failed=count_or_none(counts.get("failed")),
        output_file_id=id_or_none(data.get("output_file_id")),
        error_file_id=id_or_none(data.get("error_file_id")),
        created_at=time_or_none(data.get("created_at")),
        ended_at=time_or_none(data.get(f"{status}_at")) if status in TERMINAL else None,
        error=first_error(data.get("errors")),
    )


def is_batch_id(value: object) -> bool:
    """Return whether a row's id may serve as a cursor; also for batches that nobody watches."""
    return isinstance(value, str) and 0 < len(value) <= 256


def is_as_known(row: Mapping[str, object], known: Batch) -> bool:
    """Return whether a row shows a batch that runs as it is known: the same status and counts.

    Nothing else that is remembered of a batch changes before its end (OpenAI's API reference, the
    batch object). This spares most rows of most pages the reading.
    """
    counts = row.get("request_counts")
    return (
        row.get("status") == known.status
        and not known.is_terminal
        and isinstance(counts, dict)
        and counts.get("completed") == known.completed
        and counts.get("failed") == known.failed
        and counts.get("total") == known.total
    )


def parse_page(data: object, known: Mapping[str, Batch]) -> Page:
    """Return a page of OpenAI's list of batches; raises ValueError for what is none.

    `known` are the watched batches. A row that is no batch, or ends one without being a whole one,
    is not taken: the batch is then asked for by itself.
    """
    rows = data.get("data") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(rows, list):
        raise ValueError("has no list of data")
    rows = [row for row in rows if isinstance(row, dict) and is_batch_id(row.get("id"))]
    batches: dict[str, Batch] = {}
    for row in rows:
        batch_id = row["id"]
        if batch_id not in known or batch_id in batches:
            continue
        if is_as_known(row, known[batch_id]):
            batches[batch_id] = known[batch_id]
            continue
        with contextlib.suppress(ValueError):
            batch = parse_batch(row, batch_id)
            if not batch.is_terminal or ("input_file_id" in row and not batch.lacks_files):
                batches[batch_id] = batch
    return Page(
        ids=[row["id"] for row in rows],
        batches=batches,
        newest_at=time_or_none(rows[0].get("created_at")) if rows else None,
        oldest_at=time_or_none(rows[-1].get("created_at")) if rows else None,
        has_more=data.get("has_more") is not False,
    )


def http_date(text: str) -> float | None:
    """Return a date of an HTTP header as Unix seconds, or None."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return how long a server asks to wait: `retry-after-ms`, or `Retry-After` in either form.

    A date is compared with the server's own clock where it tells it; nonsense is None.
    """
    asked = headers.get("retry-after", "")
    for text, unit in ((headers.get("retry-after-ms", ""), 1000), (asked, 1)):
        if re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", text.strip()):
            return float(text) / unit
    until = http_date(asked)
    if until is None:
        return None
    return max(0.0, until - (http_date(headers.get("date", "")) or now))


def server_words(answer: Answer) -> str:
    """Return the message in an error's body: `{"error": {"message"}}` or Keboola's `{"error"}`."""
    try:
        data = parse_json(answer)
    except ApiError:
        return ""
    error = data.get("error") if isinstance(data, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    words = text_or_none(message)
    exception_id = text_or_none(data.get("exceptionId"), 100) if isinstance(data, dict) else None
    support = f" (exceptionId {exception_id})" if exception_id else ""
    return f": {words}{support}" if words else support


def http_error(server: str, answer: Answer, now: float) -> ApiError:
    """Return what an answer that is no success means, with the server's own words for it."""
    return ApiError(
        f"{server} answered {answer.status}{server_words(answer)}",
        status=answer.status,
        retryable=answer.status in RETRYABLE or not 400 <= answer.status < 500,
        retry_after_s=retry_after_s(answer.headers, now),
        request_id=answer.request_id,
    )


def carried_trigger_id(data: object) -> str | None:
    """Return the trigger id among a job's variables; "" is another's job, None is not told."""
    values = data.get("values") if isinstance(data, dict) else data
    if not isinstance(values, list):
        return None
    for item in values:
        if isinstance(item, dict) and item.get("name") == TRIGGER_ID_VARIABLE:
            return str(item.get("value"))
    return "" if values else None  # an empty list may be a row that does not tell


def parse_keboola_job(row: object) -> KeboolaJob:
    """Return a job of Keboola's queue; raises ValueError for what is none."""
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    job_id = row.get("id")
    if isinstance(job_id, int) and not isinstance(job_id, bool):
        job_id = str(job_id)
    job_id = id_or_none(job_id)
    if job_id is None:
        raise ValueError("has no id")
    try:
        created = datetime.fromisoformat(str(row.get("createdTime")))
        created = created.replace(tzinfo=created.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        created = None
    url = text_or_none(row.get("url"), 2000)
    return KeboolaJob(
        id=job_id,
        status=text_or_none(row.get("status"), 64),
        url=url if url and url.startswith(("https://", "http://")) else None,
        created_time=created if created and created.year < 9999 else None,
        trigger_id=carried_trigger_id(row.get("variableValuesData")),
    )


# --- asking ---------------------------------------------------------------------------------------


async def with_retries(attempt: Callable[[Budget], Coroutine[Any, Any, T]], clock: Clock) -> T:
    """Return what `attempt(budget)` returns, repeated while that may help; else its ApiError.

    Waits as the server asks, or exponentially with jitter, but never longer than PATIENCE_S at a
    time and REQUEST_BUDGET_S in all: what needs more is for the next look.
    """
    import tenacity

    budget = Budget(clock)
    exponential = tenacity.wait_exponential(multiplier=0.5, max=8) + tenacity.wait_random(0, 0.5)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, ApiError) else None
        return exponential(state) if asked_s is None else asked_s

    def stop(state: tenacity.RetryCallState) -> bool:
        wait_s = state.upcoming_sleep
        is_long = wait_s > PATIENCE_S or wait_s > budget.left_s() - 1
        return is_long or state.attempt_number >= MAX_ATTEMPTS

    retrying = tenacity.AsyncRetrying(
        # Only ApiError: cancellation must get through.
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, ApiError) and e.retryable),
        wait=wait,
        stop=stop,
        reraise=True,
    )
    return await retrying(attempt, budget)


Note = Callable[[Answer | ApiError], None]  # is told what has come of each request with a secret


async def noted(request: Coroutine[Any, Any, Answer], note: Note | None) -> Answer:
    """Return the answer to a request, and tell what has come of it. Raises its ApiError."""
    came: Answer | ApiError | None = None
    try:
        came = await request
    except ApiError as error:
        came = error
        raise
    finally:
        if note and came:
            note(came)
    return came


class OpenAIClient:
    """One OpenAI account, and how it is doing: what it refuses for one batch may hold for all."""

    SILENT_AFTER: Final = 5  # requests in a row, for any batches, that no answer came to

    def __init__(self, account: Account, http: Http, note: Note | None = None) -> None:
        self._http = http
        self._note_request = note
        self._clock = http.clock
        self.base_url = account.base_url
        self._headers = {"Authorization": f"Bearer {account.key.reveal()}"}
        if account.organization:
            self._headers["OpenAI-Organization"] = account.organization
        if account.project:
            self._headers["OpenAI-Project"] = account.project
        self._gate = Gate(http.limits.max_concurrency)
        self._in_flight = 0
        self._silences = 0
        self._held_until = -math.inf
        self._held_for = ""
        self._silent_for = ""

    async def batch(self, batch_id: str) -> Batch:
        """Return a batch (`GET /batches/{id}`); raises ApiError after the retries."""

        async def attempt(budget: Budget) -> Batch:
            answer = await self._get(f"/batches/{batch_id}", None, budget)
            if answer.status == 404:
                raise self._not_found(answer)
            try:
                return parse_batch(self._json(answer), batch_id)
            except ValueError as error:
                raise nonsense(f"OpenAI's answer is not a batch: it {error}", answer) from None

        return await with_retries(functools.partial(self._in_turn, attempt), self._clock)

    async def page(self, cursor: str | None, known: Mapping[str, Batch]) -> Page:
        """Return the page of the account's batches after a row, or the newest; raises ApiError.

        `known` are the batches to look for. Source: OpenAI's API reference, `GET /batches`.
        """
        params = {"limit": str(PAGE_ROWS)} | ({"after": cursor} if cursor else {})

        async def attempt(budget: Budget) -> Page:
            answer = await self._get("/batches", params, budget)
            try:
                return parse_page(self._json(answer), known)
            except ValueError as error:
                raise nonsense(f"OpenAI's answer is not a list: it {error}", answer) from None

        # Not repeated: what it would have shown is asked for one by one.
        return await self._in_turn(attempt, Budget(self._clock), is_page=True)

    async def _in_turn(
        self,
        attempt: Callable[[Budget], Coroutine[Any, Any, T]],
        budget: Budget,
        *,
        is_page: bool = False,
    ) -> T:
        """Make one attempt when this account may, and note what it says about the account.

        The silence of a page says nothing: a list may be too much for a server that has batches.
        """
        self._gate.set_limit(self._http.limits.max_concurrency)
        async with self._gate:  # so that this account's queue is not in front of everyone else
            await self._enter()
            self._in_flight += 1
            try:
                found = await attempt(budget)
            except ApiError as error:
                if error.status is not None or not is_page:
                    self._note(error)
                raise
            finally:
                self._in_flight -= 1
            self._silences = 0
            return found

    async def _get(self, path: str, params: Mapping[str, str] | None, budget: Budget) -> Answer:
        url = self.base_url + path
        return await noted(
            self._http.get(url, self._headers, params, budget=budget), self._note_request
        )

    def _json(self, answer: Answer) -> object:
        if not answer.is_success:
            raise http_error("OpenAI", answer, self._clock.wall())
        return parse_json(answer)

    def _not_found(self, answer: Answer) -> ApiError:
        error = http_error("OpenAI", answer, self._clock.wall())
        text = f"{error}: the batch was deleted, or the key belongs to another OpenAI project"
        return ApiError(text, status=404, request_id=error.request_id)

    def refusal(self) -> ApiError | None:
        """Return what stands in the way of any request to this account, where that takes long."""
        left_s = self._held_until - self._clock.mono()
        if left_s > PATIENCE_S:
            return ApiError(self._held_for, status=429, retry_after_s=left_s, sent=False)
        # A dead server holds each request to its deadline: one at a time finds out when it is back,
        # and the places are left to other accounts.
        if self.is_silent and self._in_flight:
            return ApiError(self._silent_for, sent=False)
        return None

    @property
    def is_silent(self) -> bool:
        """Whether no answer has come for a while, which is not the fault of what was asked."""
        return self._silences >= self.SILENT_AFTER

    async def _enter(self) -> None:
        """Wait while the account is held for a moment. Raises `refusal`."""
        while not (refusal := self.refusal()):
            left_s = self._held_until - self._clock.mono()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)
        raise refusal

    def _note(self, error: ApiError) -> None:
        """Remember what a failure says about the account as a whole."""
        if error.status is None:
            self._silences += 1
            self._silent_for = str(error)
        else:
            self._silences = 0
        if error.status == 429 and error.retry_after_s:
            until = self._clock.mono() + min(error.retry_after_s, MAX_BACKOFF_S)
            if until > self._held_until:
                self._held_until, self._held_for = until, str(error)


@dataclass(slots=True)
class Learned:
    """What a process has found out about Keboola so far, by stack; shared between clients."""

    queue_urls: dict[str, str] = field(default_factory=dict)
    projects: dict[tuple[str, Secret], str] = field(default_factory=dict)  # by stack and token
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)  # a `Date`, and when
    trigger_ids: dict[tuple[str, str], str] = field(default_factory=dict)  # of jobs read by id,
    reading: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)
    unreadable: set[tuple[str, str]] = field(default_factory=set)  # and those that were not


class KeboolaClient:
    """Keboola's queue on one stack, with one token."""

    def __init__(  # noqa: PLR0913 - the last three are optional
        self,
        stack_url: str,
        token: Secret,
        http: Http,
        learned: Learned | None = None,
        note: Note | None = None,
        *,
        tell: Callable[[Event], None] | None = None,
    ) -> None:
        self._http = http
        self._note_request = note
        self._clock = http.clock
        self._stack_url = stack_url
        self._token = token
        self._headers = {"X-StorageApi-Token": token.reveal()}
        self._learned = learned or Learned()
        self._unreadable: dict[str, str] = {}  # not told yet: why, by job
        self._tell = tell

    async def _get(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> object:
        """Return the JSON of a GET; raises ApiError after the retries."""

        async def attempt(budget: Budget) -> object:
            tell = (
                self._note_request if headers else None
            )  # without the token, it says nothing of it
            try:
                answer = await noted(self._http.get(url, headers, params, budget=budget), tell)
            except TooLargeError as error:
                error.retryable = False  # a page is asked for with fewer rows instead
                raise
            if date := http_date(answer.headers.get("date", "")):
                self._learned.clocks[self._stack_url] = date, self._clock.mono()
            if not answer.is_success:
                raise http_error("Keboola", answer, self._clock.wall())
            return parse_json(answer)

        return await with_retries(attempt, self._clock)

    def behind_s(self) -> float:
        """Return how far Keboola's clock is behind ours, by the last `Date`; negative for ahead."""
        wall, mono = self._clock.wall(), self._clock.mono()
        date, came_at = self._learned.clocks.get(self._stack_url, (wall, mono))
        return wall - (date + mono - came_at)

    async def queue_url(self) -> str:
        """Return the queue's address: by the stack's name, or as the stack's index says."""
        parts = urllib.parse.urlsplit(self._stack_url.lower())
        if parts.netloc.startswith("connection."):
            return f"{parts.scheme}://queue.{parts.netloc.removeprefix('connection.')}"
        if self._stack_url not in self._learned.queue_urls:
            index = await self._get(f"{self._stack_url}/v2/storage", {})
            self._learned.queue_urls[self._stack_url] = self._find_queue(index)
        return self._learned.queue_urls[self._stack_url]

    def _find_queue(self, index: object) -> str:
        services = index.get("services") if isinstance(index, dict) else None
        for service in services if isinstance(services, list) else ():
            if isinstance(service, dict) and service.get("id") == "queue":
                url = str(service.get("url"))
                if url_problem(url) or is_loopback(url) > is_loopback(self._stack_url):
                    break
                return url.rstrip("/")
        raise ApiError(
            f"{self._stack_url}/v2/storage lists no usable https address of the queue",
            retryable=True,
        )

    async def verify(self) -> Mapping[str, Any]:
        """Return what Keboola says of the token: its project, whether it expires."""
        said = await self._get(f"{self._stack_url}/v2/storage/tokens/verify", self._headers)
        return said if isinstance(said, dict) else {}

    async def project(self) -> str:
        """Return the id of the token's project; asked once for each token. Raises ApiError."""
        known = self._learned.projects
        if (key := (self._stack_url, self._token)) not in known:
            owner = (await self.verify()).get("owner")
            number = owner.get("id") if isinstance(owner, dict) else None
            if isinstance(number, bool) or not isinstance(number, str | int) or number == "":
                raise ApiError("Keboola does not say which project the token is of", retryable=True)
            known[key] = one_line(str(number), 100)
        return known[key]

    async def configuration(self, target: Target) -> Mapping[str, Any]:
        """Return a configuration as Keboola has it; raises ApiError, with status 404 for none."""
        branch = f"/branch/{target.branch_id}" if target.branch_id else ""
        path = f"components/{target.component_id}/configs/{target.config_id}"
        said = await self._get(f"{self._stack_url}/v2/storage{branch}/{path}", self._headers)
        return said if isinstance(said, dict) else {}

    async def create(self, payload: str) -> KeboolaJob:
        """Start a job, in one attempt; raises ApiError, which `after_failed_post` understands.

        A 2xx without a readable id is no success and no failure: its outcome is unknown.
        """
        try:
            url = await self.queue_url()
        except ApiError as error:
            error.sent = False
            raise
        headers = {**self._headers, "Content-Type": "application/json"}
        answer = await noted(self._http.post(f"{url}/jobs", headers, payload), self._note_request)
        if not answer.is_success:
            raise http_error("Keboola", answer, self._clock.wall())
        try:
            return parse_keboola_job(parse_json(answer))
        except ValueError as error:
            raise nonsense(f"Keboola's answer is not a job: it {error}", answer) from None

    async def search(self, target: Target, since: float | None, trigger: str) -> list[KeboolaJob]:
        """Return the jobs that carry a trigger id, the oldest first.

        Nothing found is said only after a complete search; an incomplete one raises ApiError.
        Keboola ignores filters that it does not know, so that every row is looked at.
        """
        seen: dict[str, KeboolaJob] = {}
        try:
            await self._read_pages(target, since, seen)
        except ApiError:
            if not ours_oldest_first(seen.values(), trigger):
                raise
        finally:
            self._tell_unreadable(target)
        return ours_oldest_first(seen.values(), trigger)

    def _tell_unreadable(self, target: Target) -> None:
        """Tell once of jobs that could not be read, which count as somebody else's."""
        if self._tell and self._unreadable:
            fields_ = {
                "config_id": target.config_id,
                "jobs": len(self._unreadable),
                "keboola_job_ids": [*self._unreadable][:MAX_IDS_TOLD],
                "error": next(iter(self._unreadable.values())),
            }
            self._tell(Event("keboola_jobs_unreadable", "warning", None, fields_))
        self._unreadable.clear()

    async def listed(self, target: Target, trigger: str) -> list[KeboolaJob]:
        """Return the jobs that carry a trigger id on the deprecated `GET /jobs`, the oldest first.

        It may show at once what the search shows later. Nothing found says nothing, nor does an
        error.
        """
        params = {
            "component": target.component_id,
            "config": target.config_id,
            "limit": str(SEARCH_LIMIT),
        }
        try:
            rows = await self._jobs(f"{await self.queue_url()}/jobs", params)
        except ApiError:
            return []
        told = await asyncio.gather(*map(self._with_trigger_id, rows), return_exceptions=True)
        return ours_oldest_first((job for job in told if isinstance(job, KeboolaJob)), trigger)

    async def _read_pages(
        self, target: Target, since: float | None, seen: dict[str, KeboolaJob]
    ) -> None:
        """Fill `seen` with the jobs since a time, newest first, until a page brings none.

        Pages go on by time, with overlap, or by place where that changes nothing.
        """
        before: datetime | None = None
        limit, offset, asked = SEARCH_LIMIT, 0, 0
        while asked < MAX_SEARCH_ROWS:
            try:
                page = await self._search_page(target, since, before, limit, offset)
            except TooLargeError:
                if limit == 1:
                    raise
                limit //= 2  # rows carry the data of their configuration
                continue
            asked += limit
            fresh = [job for job in page if job.id not in seen]
            told = await asyncio.gather(*map(self._with_trigger_id, fresh), return_exceptions=True)
            seen |= {job.id: job for job in told if isinstance(job, KeboolaJob)}
            for failure in told:
                if isinstance(failure, BaseException):
                    raise failure
            is_full = len(page) >= limit
            if not fresh and not is_full:
                return  # not before: a server may cap `limit` lower than it was asked for
            times = [job.created_time for job in page if job.created_time]
            is_sorted = len(times) == len(page) and times == sorted(times, reverse=True)
            if is_full and not (is_sorted and (fresh or not offset)):
                raise ApiError("Keboola's job list is not sorted by time: the search is incomplete")
            if not times:
                return
            if offset or not fresh:
                offset += len(page)
            else:
                # A second of overlap: rows of one second may stand on both sides of a page's end.
                before = min(times) + timedelta(seconds=1)
        raise ApiError(f"Keboola's job list does not end after {MAX_SEARCH_ROWS} rows")

    async def _search_page(
        self, target: Target, since: float | None, before: datetime | None, limit: int, offset: int
    ) -> list[KeboolaJob]:
        params = {
            "componentId": target.component_id,
            "configId": target.config_id,
            "limit": str(limit),
            "sortBy": "createdTime",
            "sortOrder": "desc",
        }
        if since is not None:
            params["createdTimeFrom"] = datetime.fromtimestamp(int(since), UTC).isoformat()
        if before is not None:
            params["createdTimeTo"] = before.isoformat()
        if offset:
            params["offset"] = str(offset)
        return await self._jobs(f"{await self.queue_url()}/search/jobs", params)

    async def _jobs(self, url: str, params: Mapping[str, str]) -> list[KeboolaJob]:
        rows = await self._get(url, self._headers, params)
        if not isinstance(rows, list):
            raise ApiError("Keboola's job list is not a list", retryable=True)
        try:
            return [parse_keboola_job(row) for row in rows]
        except ValueError as error:
            raise ApiError(f"a row of Keboola's job list {error}", retryable=True) from None

    async def _with_trigger_id(self, job: KeboolaJob) -> KeboolaJob:
        """Return the job with its trigger id told; where its row did not, it is read, once."""
        if job.trigger_id is not None:
            return job
        key = self._stack_url, job.id
        known = self._learned.trigger_ids
        if key not in known:
            async with self._learned.reading.setdefault(key, asyncio.Lock()):
                if key not in known:
                    said = await self._read_trigger_id(key, job.id)
                    if said is None:
                        return replace(job, trigger_id="")
                    known[key] = said
        return replace(job, trigger_id=known[key])

    async def _read_trigger_id(self, key: tuple[str, str], job_id: str) -> str | None:
        """Return the trigger id that a job carries, None for a job that is not there.

        Raises ApiError unless it was told. A job that may not be read is not ours: who has made a
        job may read it. One that is not there may merely be too new, so that is not remembered.
        """
        quoted_id = urllib.parse.quote(job_id, safe="")
        try:
            row = await self._get(f"{await self.queue_url()}/jobs/{quoted_id}", self._headers)
            return parse_keboola_job(row).trigger_id or ""
        except ValueError as error:
            raise ApiError(f"Keboola's job {job_id} {error}", retryable=True) from None
        except ApiError as error:
            if error.status not in {403, 404}:
                raise
            if key not in self._learned.unreadable:
                self._unreadable[job_id] = str(error)
            self._learned.unreadable.add(key)
            return "" if error.status == 403 else None


# ==================================================================================================
# 8. Daemon: what runs
# ==================================================================================================

DRAIN_S: Final = 20.0  # what triggers in flight get to be recorded in, after SIGTERM
RELOAD_LOOK_S: Final = 1.5  # how often files are compared that no event tells of
REQUESTS_LOOK_S: Final = 1.0
VAIN_PASSES: Final = "vain_passes"  # in the state file: how often --once has read pages in vain,
FIRST_VAIN_REST_S: Final = 600.0  # after which it does without; twice as long after each
MAX_VAIN_PASSES: Final = 9  # to count: a day is the longest
TOUCH_S: Final = 2.0  # how often the times of looks are written,
TOUCH_S_EACH: Final = 0.005  # and the more rarely, the more of them there are


def log_processors() -> list[structlog.typing.Processor]:
    """Return what is done first to every event, our own or another library's."""
    import structlog

    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
    return [structlog.stdlib.add_log_level, stamp]


def log_formatter(settings: LogSettings, redactor: Redactor) -> logging.Formatter:
    """Return what makes lines of events."""
    import structlog

    def redact(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {key: redactor.tree(value) for key, value in event.items()}

    is_console = settings.format == "console" or (
        settings.format == "auto" and sys.stderr is not None and sys.stderr.isatty()
    )
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if is_console
        else structlog.processors.JSONRenderer(default=repr)
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=log_processors(),
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            redact,  # the last before the line is made: nothing gets around it
            renderer,
        ],
    )


class LateFormatter(logging.Formatter):
    """Makes its formatter for the first line: most passes of --once have none to make."""

    def __init__(self, settings: LogSettings, redactor: Redactor) -> None:
        super().__init__()
        self._make = functools.partial(log_formatter, settings, redactor)
        self._made: logging.Formatter | None = None

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        if self._made is None:
            self._made = self._make()
        return self._made.format(record)


def configure_logging(settings: LogSettings, redactor: Redactor) -> None:
    """Send structlog and the standard library's logging to stderr, through one redactor."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LateFormatter(settings, redactor))
    logging.raiseExceptions = False  # a full disk under stderr must not stop the work
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level.upper())
    for name in ("httpx", "httpcore", "watchfiles", "asyncio"):  # URLs and headers, at DEBUG
        logging.getLogger(name).setLevel(logging.WARNING)


def logger() -> structlog.stdlib.BoundLogger:
    """Return the program's own logger, which hands events to the standard library's logging."""
    import structlog

    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                *log_processors(),
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
        )
    found: structlog.stdlib.BoundLogger = structlog.get_logger("teckochecker")
    return found


def say(event: Event) -> None:
    """Write one event to the log."""
    subject = {"job": event.job} if event.job else {}
    level = getattr(logging, event.level.upper())
    logger().log(level, event.name, **subject, **event.fields)


class Notifier:
    """The service manager's side of the process (sd_notify(3)); silent where there is none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = env.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog_us) / 1e6 if ours and watchdog_us.isdigit() else None

    def send(self, *lines: str) -> None:
        """Send one datagram."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
        ):
            out.sendto("\n".join(lines).encode(), address)

    def reloading(self) -> None:
        """Tell that a reload has begun; `READY=1` has to follow."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def secrets_of(setup: Setup, job: Job | None) -> tuple[object, ...]:
    """Return all of a setup's secrets that matter to a job, to tell whether they have changed."""
    if job is None:
        return ()
    target = setup.config.target(job)
    return account_of(setup, job), target, setup.secrets[job.keboola_secret]


def keboola_secrets(setup: Setup) -> dict[str, tuple[str, Secret]]:
    """Return the stacks and tokens of a setup, to tell whether they have changed."""
    return {
        name: (secret.stack_url, setup.secrets[name])
        for name, secret in setup.config.keboola.items()
    }


def first_leaf(group: BaseExceptionGroup[TeckoError]) -> TeckoError:
    """Return the first exception inside nested groups."""
    first = group.exceptions[0]
    return first_leaf(first) if isinstance(first, BaseExceptionGroup) else first


@dataclass(slots=True, eq=False)
class Watch:
    """A piece of work while the process runs: its row, its job in the config, its deadlines.

    Deadlines are monotonic, so that the machine's clock may jump.
    """

    work: Work
    job: Job | None = None  # None: these ids are not in the config now
    due: float = 0.0
    looked_at: float = 0.0  # Unix seconds
    trigger_due: float = 0.0
    unknown_since: float = 0.0
    is_posting: bool = False
    carrier: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # ends a carrier's wait

    def pending(self) -> list[str]:
        """Return the batches that have not ended."""
        return [batch.id for batch in self.work.batches if not batch.is_terminal]


async def all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all of these, whatever becomes of some; then raise what the first one has raised."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def is_nearly_due(watch: Watch, now: float) -> bool:
    """Return whether a work is looked at now, together with one that is due.

    A tenth of its interval early does no harm, and looks that fall together share their pages.
    """
    interval_s = watch.job.poll_interval_s if watch.job else 0
    return watch.due <= now + min(interval_s / 10, MINUTE_S)


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until an event is set or a time has passed; returns whether it was set."""
    try:
        async with asyncio.timeout(timeout_s if math.isfinite(timeout_s) else None):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()


@dataclass(slots=True, eq=False)
class Look:
    """One look at an account: what is due, what has been seen of it, and what pages have cost."""

    begun_at: float
    due: Mapping[str, Batch]
    explores_until: float = math.inf
    risk: int = 0  # pages that may be asked for beyond what pages have saved
    cost: int = 0  # pages that were asked for,
    pages: int = 0  # of which these came,
    found: int = 0  # and due batches that they have shown
    is_broken: bool = False  # a page has failed, and no more are asked for
    seen: dict[str, Batch | ApiError] = field(default_factory=dict)
    open: set[Watch] = field(default_factory=set)  # works that are not seen whole yet

    @property
    def saved(self) -> int:
        """How many requests pages have saved, less the pages themselves."""
        return self.found - self.cost

    @property
    def credit(self) -> int:
        """How many more pages may be asked for: in vain, no more than batches can wait for it."""
        return self.saved + min(self.risk, len(self.due) - self.found)

    def missing(self) -> list[Batch]:
        """Return the due batches that have not been seen."""
        return [batch for key, batch in self.due.items() if key not in self.seen]

    def affordable(self, left_out: Container[str]) -> list[Batch]:
        """Return which of them to ask for one by one: all, or as many as pages have not cost.

        Of what was risked in vain, as many wait for the next look, in which they come first.
        """
        missing = sorted(self.missing(), key=lambda batch: batch.id not in left_out)
        return missing[: max(0, len(missing) + min(0, self.saved))]

    def goals(self, unplaced: Iterable[Batch], tried: Container[str]) -> list[Batch]:
        """Return what may still be looked for in the list."""
        if self.credit <= 0:
            return []
        return [b for b in unplaced if b.id not in self.seen and b.id not in tried]

    def take(self, shown: Mapping[str, Batch]) -> None:
        """Note what this look's pages have shown."""
        self.found += sum(key in self.due and key not in self.seen for key in shown)
        self.seen |= shown

    def is_waiting(self, watch: Watch) -> bool:
        """Return whether a work is fine and waits for a batch that was seen to go on."""
        seen = self.seen_of(watch).values()
        is_fine = watch.work.error is None and all(isinstance(batch, Batch) for batch in seen)
        return is_fine and any(isinstance(b, Batch) and not b.is_terminal for b in seen)

    def seen_of(self, watch: Watch) -> dict[str, Batch | ApiError]:
        """Return what has been seen of a work that is unfinished."""
        return {key: self.seen[key] for key in watch.pending() if key in self.seen}

    def whole(self, watches: Iterable[Watch]) -> set[Watch]:
        """Return those of the open works that are seen whole now."""
        return {w for w in watches if w in self.open and is_whole_look(w.work, self.seen)}


class ListReader:
    """Reads the pages of an account's list that pay for a look, and learns where batches stand.

    A page pays that shows several of the due batches. What is not known yet is found out with the
    requests that pages have saved, and what a look may risk.
    """

    KNOWN_ROUNDS: Final = 3  # a list that moves while it is read is read again, but not for ever
    WALKS_AT_ONCE: Final = 10
    PAGES_AT_ONCE: Final = 5  # the pool of connections costs each request, the larger it is
    EXPLORE_S: Final = 60.0  # in a look: what is due waits meanwhile, and the next look goes on

    def __init__(
        self,
        client: OpenAIClient,
        engine: Engine,
        take: Callable[[Look, Sequence[Page], float], None],
    ) -> None:
        self._client = client
        self._engine = engine
        self._take = take  # what is done with pages, and when they were asked for
        self._chart = Chart()
        self._gate = Gate(self.PAGES_AT_ONCE)
        self._usable_from = -math.inf
        self._failures = 0
        self._is_told = False  # that the list is not usable
        self._is_in_doubt = False  # whether there is a list: every cursor was refused

    def pays(self, look: Look) -> bool:
        """Return whether pages may be of use to a look.

        Where the account itself is held or silent, they would find out nothing about the list.
        """
        is_ill = self._client.is_silent or self._client.refusal() is not None
        return self._usable_from <= look.begun_at and not is_ill and len(look.due) >= LIST_MIN

    async def read(self, look: Look, known: Mapping[str, Batch]) -> None:
        """Read what pays; `known` are all unfinished batches of the account, due or not.

        Never raises: what no page has shown is asked for one by one.
        """
        self._chart.begin_look(known)
        try:
            await self._read_known(look, known)
            await self._explore(look, known)
        except ApiError as error:
            if error.sent:  # else it says nothing about the list
                self._note_failure(error)
        except Exception as error:  # noqa: BLE001 - a bug in what may be done without
            self._usable_from = self._engine.clock.mono() + HOUR_S
            self._engine.note_bug(error, self._client.base_url)
        else:
            if look.seen:
                self._failures = 0
                self._note_usability(is_usable=True)

    async def _read_known(self, look: Look, known: Mapping[str, Batch]) -> None:
        """Read the pages that are known to show several of the due batches."""
        for _ in range(self.KNOWN_ROUNDS):
            starts = self._chart.pages(batch.id for batch in look.missing())
            if not starts:
                return
            await self._read(look, known, [cursor for cursor, _ in starts])
            for _, batch_id in starts:
                if batch_id not in look.seen:
                    self._chart.lose(batch_id)

    async def _explore(self, look: Look, known: Mapping[str, Batch]) -> None:
        """Find out where the others stand, as far as the savings of this look allow."""
        chart = self._chart
        look.risk = chart.allowance(len(look.due))
        look.explores_until = self._engine.clock.mono() + self.EXPLORE_S
        if self._is_in_doubt and look.credit > 0:
            await self._read(look, known, [None])
        unplaced = chart.unplaced(look.missing())
        if unplaced:
            await self._find(look, known, unplaced)

    async def _find(
        self, look: Look, known: Mapping[str, Batch], unplaced: Sequence[Batch]
    ) -> None:
        """Look for batches in the list: first where they should be, then along the way to them."""
        chart = self._chart
        ages = sorted((b.created_at, b.id) for b in known.values() if b.created_at)
        tried: set[str] = set()
        while not self._is_late(look) and (goals := look.goals(unplaced, tried)):
            walks = chart.guesses(goals, ages, look.credit)
            if not walks:
                break
            tried |= {walk.goal.id for walk in walks if walk.goal}
            await self._read(look, known, [walk.cursor for walk in walks])
        while not self._is_late(look) and (goals := look.goals(unplaced, tried)):
            walks = chart.ways(goals, ages, min(self.WALKS_AT_ONCE, look.credit))
            if self._engine.once:  # a way is of use to later looks, but for what it shows itself
                walks = [walk for walk in walks if walk.cursor is None]
            if not walks:
                break
            tried |= {walk.goal.id for walk in walks if walk.goal}
            if walks[0].goal is None:  # it was for all whose age is not known
                tried |= {goal.id for goal in goals if goal.created_at is None}
            await all_of(self._walk(look, known, walk) for walk in walks)
        for batch_id in () if self._is_late(look) else tried - look.seen.keys():
            chart.note_miss(batch_id)
        if tried:
            chart.note_risk(paid_off=look.saved >= 0)

    def _is_late(self, look: Look) -> bool:
        """Return whether a look has explored for long enough."""
        return self._engine.clock.mono() > look.explores_until

    async def _walk(self, look: Look, known: Mapping[str, Batch], walk: Walk) -> None:
        """Read page after page until there is nothing more to be gained."""
        cursor, barren = walk.cursor, 0
        passed: set[str] = set()
        while look.credit > 0 and barren < BARREN_PAGES and not self._is_late(look):
            before = len(look.seen)
            pages = await self._read(look, known, [cursor])
            if not pages:
                return
            page = pages[0]
            barren = 0 if len(look.seen) > before else barren + 1
            if walk.ends_at(page) or page.ids[-1] in passed or not look.missing():
                return
            cursor = page.ids[-1]
            passed.add(cursor)

    async def _read(
        self, look: Look, known: Mapping[str, Batch], cursors: Sequence[str | None]
    ) -> list[Page]:
        """Return pages, all read at once and taken as one. Raises the first one's ApiError."""
        pages: list[Page] = []
        asked_at = self._engine.clock.mono()
        look.cost += len(cursors)  # at once: the credit is for all that are read side by side
        try:
            await all_of(self._read_page(look, known, cursor, pages) for cursor in cursors)
        except Exception:  # not a cancellation: nothing begins at the end of the process
            self._take(look, pages, asked_at)
            raise
        self._take(look, pages, asked_at)
        return pages

    async def _read_page(
        self, look: Look, known: Mapping[str, Batch], cursor: str | None, pages: list[Page]
    ) -> None:
        """Add a page to `pages`, unless its cursor is gone from the list. Raises ApiError.

        Once a page has failed, those that wait for their turn are not asked for.
        """
        async with self._gate:
            if look.is_broken:
                look.cost -= 1
                return
            try:
                page = await self._client.page(cursor, known)
            except ApiError as error:
                look.cost -= not error.sent
                if cursor is None or error.status not in {400, 404}:
                    look.is_broken = True
                    raise
                self._chart.lose_cursor(cursor)
                self._is_in_doubt = not look.pages
            else:
                look.pages += 1
                self._is_in_doubt = False
                self._chart.learn(cursor, page)
                pages.append(page)

    def _note_failure(self, error: ApiError) -> None:
        """Do without the list for a while; for longer where there seems to be none."""
        self._failures += 1
        clock = self._engine.clock
        is_absent = error.status is not None and not error.retryable
        wait_s = backoff_s(self._failures, MINUTE_S, clock.jitter())
        self._usable_from = clock.mono() + (HOUR_S if is_absent else wait_s)
        if error.status != 429:  # which is about the account
            self._note_usability(is_usable=False, error=str(error))

    def _note_usability(self, *, is_usable: bool, **fields_: str) -> None:
        """Tell whether the list is usable, if that is news."""
        if self._is_told is is_usable:
            self._is_told = not is_usable
            name, level = ("list_usable", "info") if is_usable else ("list_not_usable", "warning")
            self._engine.note(Event(name, level, None, {"url": self._client.base_url, **fields_}))


class Poller:
    """One OpenAI account: looks at the batches of all its jobs that are due, together.

    A look reads pages of the account's list where they pay, and asks for the other batches one by
    one. It never takes more requests than one by one for all of them: of what pages have cost in
    vain, as many batches wait for the next look. With --once, which has none, they are those whose
    answers would change nothing. Where there are too few of them it takes up to three more, and the
    state file has later passes do without: for ten minutes, then twenty, and so on up to a day.
    """

    ROUND_S: Final = 0.05  # looks that end close together make one round of the loop
    ASKED_AT_ONCE: Final = 500  # batches; a task for each of 100,000 would hold the loop up

    def __init__(self, engine: Engine, client: OpenAIClient) -> None:
        self._engine = engine
        self._client = client
        self._list = ListReader(client, engine, self._take)
        self._watches: dict[int, Watch] = {}  # those that are polled
        self._watchers: dict[str, list[Watch]] = {}  # of each batch that has not ended
        self._known: dict[str, Batch] = {}  # these batches, as they were seen last
        self._heard: dict[str, tuple[float, Batch | ApiError]] = {}  # last answers, when they came
        self._looks: set[Look] = set()  # those under way,
        self._busy: set[Watch] = set()  # and the works that they are at
        self._left_out: set[str] = set()  # batches that their last look could not afford
        self._secret = ""  # the name of the account's
        self._until = math.inf  # when `run` looks around again
        self._tasks: set[asyncio.Task[None]] = set()
        self.wake = asyncio.Event()

    def start(self) -> None:
        """Begin to look."""
        self._spawn(self.run())

    def stop(self) -> None:
        """Begin nothing more, and give up what is under way: it has nothing to lose."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._engine.spawn(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def take(self, watches: Iterable[Watch], secret: str = "") -> None:
        """Have these works looked at from now on; `secret` is the name of the account's."""
        polled = [watch for watch in watches if self._engine.is_polled(watch)]
        self._watches = {watch.work.id: watch for watch in polled}
        self._watchers = {}
        for watch in polled:
            for batch_id in watch.pending():
                self._watchers.setdefault(batch_id, []).append(watch)
        batches = (batch for watch in polled for batch in watch.work.batches)
        self._known = {batch.id: batch for batch in batches if batch.id in self._watchers}
        self._heard = {key: news for key, news in self._heard.items() if key in self._watchers}
        self._left_out &= self._watchers.keys()
        self._secret = secret
        self.wake.set()

    def _follow(self, watch: Watch) -> None:
        """Remember how a work has changed, and forget what has ended of it."""
        for batch in watch.work.batches:
            watchers = self._watchers.get(batch.id, [])
            if watch not in watchers:
                continue
            self._known[batch.id] = batch
            if batch.is_terminal:
                watchers.remove(watch)
            if not watchers:
                del self._watchers[batch.id], self._known[batch.id]
                self._heard.pop(batch.id, None)
        if watch.work.is_ready:
            self._watches.pop(watch.work.id, None)

    async def run(self) -> None:
        """Start looks when they are due; with --once, all of them, once."""
        clock, engine = self._engine.clock, self._engine
        while not engine.is_stopping:
            self.wake.clear()
            now = clock.mono()
            idle = [watch for watch in self._watches.values() if watch not in self._busy]
            if any(watch.due <= now for watch in idle):
                await self._look([watch for watch in idle if is_nearly_due(watch, now)])
            if engine.once:
                return
            waiting = (watch.due for watch in self._watches.values() if watch not in self._busy)
            self._until = min(waiting, default=math.inf)
            await wait_for_event(self.wake, self._until - clock.mono())
            await asyncio.sleep(self.ROUND_S)

    async def _look(self, watches: Sequence[Watch]) -> None:
        """Look at every unfinished batch of these works. What fails stays with its job."""
        due = {b.id: b for watch in watches for b in watch.work.batches if not b.is_terminal}
        look = Look(self._engine.clock.mono(), due)
        self._looks.add(look)
        self._busy.update(watches)
        if self._list.pays(look) and not (self._engine.once and self._is_too_soon()):
            await self._list.read(look, self._known)
            if self._engine.once:
                self._note_pass(in_vain=look.saved < 0)
        missing = {batch.id for batch in look.missing()}
        look.open = {watch for watch in watches if not missing.isdisjoint(watch.pending())}
        self._busy.difference_update(watches)
        self._busy |= look.open
        self._spawn(self._ask_for(look))

    def _is_too_soon(self) -> bool:
        """Return whether an earlier pass has read pages in vain, and not long ago."""
        try:
            vain = self._engine.store.meta(VAIN_PASSES) or {}
        except sqlite3.Error as error:
            self._engine.note_trouble(error)
            return False
        passes, at = vain.get(self._secret, (1, -math.inf))
        rest_s = min(DAY_S, FIRST_VAIN_REST_S * 2 ** (passes - 1))
        return bool(0 <= self._engine.clock.wall() - at < rest_s)

    def _note_pass(self, *, in_vain: bool) -> None:
        """Remember for later passes how many have read pages in vain, in a row, and when."""
        store, now = self._engine.store, self._engine.clock.wall()
        try:
            vain = store.meta(VAIN_PASSES) or {}
            passes, _ = vain.pop(self._secret, (0, None))
            if in_vain or passes:
                news = {self._secret: (min(passes + 1, MAX_VAIN_PASSES), now)} if in_vain else {}
                store.put_meta(VAIN_PASSES, vain | news, (), now)
        except (StorageError, sqlite3.Error) as error:
            self._engine.note_trouble(error)

    async def _ask_for(self, look: Look) -> None:
        """Ask one by one for what no page has shown, so far as the look can afford it."""
        await self._ask_all(look, look.affordable(self._left_out))
        if self._engine.once:
            left = [batch for batch in look.missing() if self._matters(batch.id, look)]
            await self._ask_all(look, left)
        left_out = {batch.id for batch in look.missing()}
        self._left_out -= look.due.keys() - left_out
        self._left_out |= left_out & self._watchers.keys()
        for watch in look.open:  # not all of them was asked for
            if watch.due <= look.begun_at and watch.job:
                watch.due = look.begun_at + min(watch.job.poll_interval_s, MINUTE_S)
        self._close(look, set(look.open))
        self._looks.discard(look)

    def _matters(self, batch_id: str, look: Look) -> bool:
        """Return whether a batch may decide something for a job: no other one still runs."""
        return not all(look.is_waiting(watch) for watch in self._watchers.get(batch_id, ()))

    async def _ask_all(self, look: Look, batches: Iterable[Batch]) -> None:
        """Ask for batches, and record each work that is seen whole then."""
        answers: asyncio.Queue[tuple[str, Batch | ApiError, float]] = asyncio.Queue()
        todo = collections.deque(batches)
        in_flight = 0
        async with asyncio.TaskGroup() as asking:  # who gives the look up gives up all of them
            while todo or in_flight:
                refusal = self._client.refusal()
                while todo and in_flight < self.ASKED_AT_ONCE:
                    batch_id = todo.popleft().id
                    if batch_id in look.seen or batch_id not in self._watchers:
                        continue  # a later look was shown it, or its job has gone
                    in_flight += 1
                    if refusal:
                        answers.put_nowait((batch_id, refusal, self._engine.clock.mono()))
                    else:
                        asking.create_task(self._ask(batch_id, answers))
                come = [await answers.get()] if in_flight else []
                while not answers.empty():  # what is answered together is recorded as one
                    come.append(answers.get_nowait())
                in_flight -= len(come)
                look.seen |= {key: self._hear(key, answer, at) for key, answer, at in come}
                concerned = {w for key, _, _ in come for w in self._watchers.get(key, ())}
                self._close(look, look.whole(concerned))
                await asyncio.sleep(0)  # `get` lets nobody else run where there is something to get

    async def _ask(
        self, batch_id: str, answers: asyncio.Queue[tuple[str, Batch | ApiError, float]]
    ) -> None:
        """Put a batch into the queue, or why there is none, with when it was asked for."""
        asked_at = self._engine.clock.mono()
        answer: Batch | ApiError
        try:
            answer = await self._client.batch(batch_id)
        except ApiError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - a bug that one batch meets is not the others'
            self._engine.note_bug(error, batch_id)
            answer = ApiError(f"internal error: {type(error).__name__}")
        answers.put_nowait((batch_id, answer, asked_at))

    def _hear(self, batch_id: str, answer: Batch | ApiError, asked_at: float) -> Batch | ApiError:
        """Return the newest answer for a batch: this one, unless it may be older than another.

        It is surely newer only if it was asked for when the other one had come.
        """
        came_at, newest = self._heard.get(batch_id, (-math.inf, answer))
        if came_at > asked_at:
            return newest
        if batch_id in self._watchers:
            self._heard[batch_id] = (self._engine.clock.mono(), answer)
        return answer

    def _take(self, look: Look, pages: Iterable[Page], asked_at: float) -> None:
        """Record what pages show, also of works that are not due yet, or that others look at."""
        shown: dict[str, Batch] = {}
        for page in pages:
            for key in page.batches.keys() & self._watchers.keys():
                newest = self._hear(key, page.batches[key], asked_at)
                if isinstance(newest, Batch):
                    shown[key] = newest
        look.take(shown)
        self._known |= shown
        watches = {watch.work.id: watch for key in shown for watch in self._watchers[key]}.values()
        free = list(watches)
        for other in self._looks:
            other.seen |= shown
            theirs = [watch for watch in free if watch in other.open]
            free = [watch for watch in free if watch not in other.open]
            self._record(other, theirs)
            self._free(other, other.whole(theirs))
        self._record(look, free)

    def _close(self, look: Look, watches: set[Watch]) -> None:
        """Record the look at some works, which are free for the next one then."""
        self._record(look, watches)
        self._free(look, watches)

    def _free(self, look: Look, watches: set[Watch]) -> None:
        """Have works wait for their next look."""
        look.open -= watches
        self._busy -= watches
        if min((watch.due for watch in watches), default=math.inf) < self._until:
            self.wake.set()

    def _is_mine(self, watch: Watch) -> bool:
        """Return whether a work is still polled here, after something was awaited."""
        return self._watches.get(watch.work.id) is watch

    def _record(self, look: Look, watches: Collection[Watch]) -> None:
        """Store what a look has brought for some works, as one."""
        watches = [watch for watch in watches if self._is_mine(watch)]
        looks = [(watch, look.seen_of(watch)) for watch in watches]
        try:
            for watch in self._engine.record(looks, look.begun_at):
                self._follow(watch)
        except (StorageError, sqlite3.Error) as error:
            self._engine.note_trouble(error, self._put_off(watches, FIRST_TRIGGER_BACKOFF_S))
        except Exception as error:  # noqa: BLE001 - as in `_ask`
            self._engine.note_bug(error, self._put_off(watches, MINUTE_S))

    def _put_off(self, watches: Collection[Watch], wait_s: float) -> str:
        """Have works looked at again whose news could not be stored; returns one's name."""
        now = self._engine.clock.mono()
        late = [watch for watch in watches if watch.due <= now]
        for watch in late:
            watch.due = now + wait_s
        return min(watch.work.name for watch in late or watches)


class Carrier:
    """Takes one trigger from the decision to the Keboola job's id, whatever breaks on the way.

    Each step that matters is committed before the next one begins, so that a process killed
    anywhere finds at its next start what may have happened.
    """

    def __init__(self, engine: Engine, watch: Watch) -> None:
        self._engine = engine
        self._watch = watch
        self._clock = engine.clock

    async def run(self) -> None:
        """Go on until nothing is left to do, or, with --once, until it would take long."""
        storage_failures = 0
        while self._engine.is_carried(self._watch):
            try:
                if not await self._advance():
                    return
                storage_failures = 0
            except (StorageError, sqlite3.Error) as error:
                storage_failures += 1
                self._engine.note_trouble(error, self._watch.work.name)
                wait_s = backoff_s(storage_failures, 1, self._clock.jitter())
                if self._engine.once or not await self._wait(min(wait_s, PATIENCE_S)):
                    return
            except StateError:
                raise
            except Exception as error:  # noqa: BLE001 - as in Poller
                self._engine.note_bug(error, self._watch.work.name)
                if not await self._wait(MINUTE_S):
                    return

    async def _advance(self) -> bool:
        """Do one step; returns whether there may be another one."""
        watch, trigger = self._watch, self._watch.work.trigger
        if watch.changed.is_set():  # set by `retry` or a reload, perhaps during the last step
            watch.changed.clear()
            watch.trigger_due = self._clock.mono()
        may_post = self._engine.may_post(watch)
        if trigger is None:
            return may_post and watch.work.is_ready and self._intend()
        if trigger.state == TriggerState.SENDING:
            return self._recover(trigger)
        left_s = watch.trigger_due - self._clock.mono()
        step = next_step(trigger, may_post=may_post, is_due=left_s <= 0)
        if may_post and self._is_outdated(trigger):
            step = Step.ARM
        match step:
            case Step.ARM:
                return self._intend()
            case Step.SEARCH:
                await self._search(trigger)
                return True
            case Step.WAIT:
                return await self._wait(left_s)
        return False

    def _intend(self) -> bool:
        """Commit the decision: trigger id, payload and target. Nothing is sent without it."""
        trigger = self._wanted()
        if trigger is None:
            return False
        self._engine.check_in_place()
        self._commit(trigger, "trigger_intended", config_id=trigger.target.config_id)
        return True

    def _wanted(self) -> Trigger | None:
        """Return the intent as the config has it now; None where it has no such job.

        What was decided of a job's earlier ids stays, but for a secret or an address amiss.
        """
        setup, work, job = self._engine.setup, self._watch.work, self._watch.job
        if job:
            token = setup.secrets[job.keboola_secret]
            return new_trigger(work, job, setup.config.target(job), token, self._clock.wall())
        old, named = work.trigger, setup.config.jobs.get(work.name)
        if old is None or named is None or not old.follows_config:
            return None
        secret = old.secret if old.secret in setup.config.keboola else named.keboola_secret
        target = replace(old.target, stack_url=setup.config.keboola[secret].stack_url)
        return replace(old, secret=secret, target=target, failures=0, next_try_at=None, error=None)

    def _is_outdated(self, trigger: Trigger) -> bool:
        """Return whether an intent that Keboola has not seen differs from what the config says."""
        wanted = self._wanted() if trigger.follows_config else None
        return wanted is not None and wanted.made_of != trigger.made_of

    def _recover(self, trigger: Trigger) -> bool:
        """Record as unknown a POST that an earlier process was about to send, or had sent."""
        grace_s = self._engine.setup.config.limits.trigger_grace_s
        error = "the process ended before the answer was recorded"
        unknown = as_unknown(trigger, error, grace_s=grace_s, now=self._clock.moment())
        self._commit(unknown, "trigger_unknown", "warning", error=error)
        return True

    async def _search(self, trigger: Trigger) -> None:
        """Ask Keboola for a job with this trigger id; POST only if there is certainly none."""
        watch, engine = self._watch, self._engine
        begun_at = self._clock.mono()
        jobs: list[KeboolaJob] = []
        failure: ApiError | None = None
        chosen: tuple[str, str] | None = None
        try:
            chosen = await engine.find_secret(watch, trigger)
            if not self._is_current(trigger):
                return
            trigger = self._bound(trigger, chosen[1])
            jobs = await self._jobs_of(trigger, chosen[0])
        except ApiError as error:
            failure = error
        if not self._is_current(trigger):
            return
        if jobs:
            self._adopt(trigger, jobs)
        elif self._is_outdated(trigger):  # by a reload: the answer was about something else
            watch.trigger_due = self._clock.mono()
        else:
            await self._go_on(trigger, failure, chosen, begun_at)

    async def _go_on(
        self,
        trigger: Trigger,
        failure: ApiError | None,
        chosen: tuple[str, str] | None,
        begun_at: float,
    ) -> None:
        """Send a trigger that a search did not find, or wait for the next search."""
        watch, engine = self._watch, self._engine
        after, step = self._after_search(trigger, failure, begun_at, is_allowed=chosen is not None)
        if step is Step.POST and engine.chosen_secret(watch, trigger) != chosen:
            return  # another token carries it since a reload: it searches first
        if step is Step.POST and not failure and begun_at < engine.clear_from:
            watch.trigger_due = engine.clear_from
            return
        # Nothing is awaited between this decision and the commit of `sending` in `_post`: what was
        # found out and what is sent belong together.
        if step is Step.POST and chosen:
            await self._post(replace(after, secret=chosen[0]))
        elif failure and after.error != trigger.error:
            self._commit(after, "trigger_search_failed", "warning", error=after.error)
        elif after != trigger:
            self._commit(after)

    def _is_current(self, trigger: Trigger) -> bool:
        """Return whether neither `retry` nor a reload nor a signal has come meanwhile."""
        return self._watch.work.trigger == trigger and self._engine.is_carried(self._watch)

    def _bound(self, trigger: Trigger, project_id: str) -> Trigger:
        """Return the trigger with its project, which is stored before anything is searched."""
        if trigger.project_id == project_id:
            return trigger
        bound = replace(trigger, project_id=project_id)
        self._commit(bound)
        return bound

    async def _jobs_of(self, trigger: Trigger, secret: str) -> list[KeboolaJob]:
        """Return the Keboola jobs that carry a trigger's id. Raises ApiError unless that is sure.

        Before a second POST the old list is asked too, which may know what the search does not yet.
        """
        client = self._engine.keboola(secret)
        since = search_from(self._watch.work.batches, self._clock.wall(), client.behind_s())
        jobs = await client.search(trigger.target, since, trigger.id)
        if not jobs and trigger.sending_at is not None:
            jobs = await client.listed(trigger.target, trigger.id)
        return jobs

    def _after_search(
        self, trigger: Trigger, failure: ApiError | None, begun_at: float, *, is_allowed: bool
    ) -> tuple[Trigger, Step]:
        """Return the trigger after a search that did not find it, and a step.

        `is_allowed` says whether there is a token that may carry it.
        """
        now = self._clock.wall()
        may_post = self._engine.may_post(self._watch)  # asked now: a reload may have paused it
        if failure:
            may_post = may_post and is_allowed
            jitter = self._clock.jitter()
            return after_failed_search(trigger, failure, may_post=may_post, now=now, jitter=jitter)
        return after_clear_search(
            trigger,
            unknown_for_s=begun_at - self._watch.unknown_since,
            grace_s=self._engine.setup.config.limits.trigger_grace_s,
            may_post=may_post,
            now=now,
        )

    def _adopt(self, trigger: Trigger, jobs: Sequence[KeboolaJob]) -> None:
        """Take the Keboola job that an earlier POST has started; the oldest of several."""
        ours = jobs[0]
        others = [job.id for job in jobs[1:]]
        found_at = self._clock.wall()
        created_at = ours.created_time.timestamp() if ours.created_time else found_at
        after = as_sent(trigger, ours, min(created_at, found_at))
        level = "warning" if others else "info"
        more = {"other_keboola_job_ids": others} if others else {}
        self._commit(after, "trigger_found", level, keboola_job_id=ours.id, **more)

    async def _post(self, trigger: Trigger) -> None:
        """Commit `sending`, send, and commit what came of it."""
        watch, engine = self._watch, self._engine
        client = engine.keboola(trigger.secret)
        engine.check_in_place()
        sending = as_sending(trigger, self._clock.wall())
        self._commit(sending, "trigger_sending")
        engine.note_post(sending)
        watch.is_posting = True
        try:
            job = await client.create(sending.payload)
        except ApiError as error:
            await self._settle(sending, error)
        else:
            sent = as_sent(sending, job, self._clock.wall())
            await self._commit_surely(sent, "trigger_sent", "info", keboola_job_id=job.id)
        finally:
            watch.is_posting = False

    async def _settle(self, sending: Trigger, error: ApiError) -> None:
        """Commit what a POST came to that brought no job id."""
        after = after_failed_post(
            sending,
            error,
            grace_s=self._engine.setup.config.limits.trigger_grace_s,
            now=self._clock.moment(),
            jitter=self._clock.jitter(),
        )
        name, level = {
            TriggerState.INTENT: ("trigger_not_sent", "warning"),
            TriggerState.REJECTED: ("trigger_rejected", "error"),
        }.get(after.state, ("trigger_unknown", "warning"))
        await self._commit_surely(after, name, level, error=str(error), status=error.status)

    async def _commit_surely(
        self, trigger: Trigger, name: str, level: str, **fields_: object
    ) -> None:
        """Commit an outcome, however long the disk stays full: it is known only here.

        With --once, not that long: the next pass finds `sending`, and searches.
        """
        give_up_at = self._clock.mono() + (PATIENCE_S if self._engine.once else math.inf)
        while True:
            try:
                self._commit(trigger, name, level, **fields_)
            except StorageError as error:
                if self._clock.mono() > give_up_at:
                    raise
                self._engine.note_trouble(error, self._watch.work.name)
                await asyncio.sleep(1)
            else:
                return

    def _commit(
        self, trigger: Trigger, name: str = "", level: str = "info", **fields_: object
    ) -> None:
        """Store the trigger's new state and, with it, the log row that tells of it."""
        watch = self._watch
        before = watch.work.trigger
        now, mono = self._clock.wall(), self._clock.mono()
        after = replace(watch.work, trigger=trigger)
        if trigger.state == TriggerState.SENT:
            after = replace(after, completed_at=trigger.sent_at, error=None)
        fields_ = {"trigger_id": trigger.id, **fields_}
        events = [Event(name, level, after.name, fields_)] if name else []
        self._engine.save([(watch, after)], events)
        # Only what is committed counts; the waits that follow from it are measured from here on.
        watch.trigger_due = mono + max(0.0, (trigger.next_try_at or now) - now)
        if trigger.state == TriggerState.UNKNOWN and (not before or before.state != trigger.state):
            watch.unknown_since = mono

    async def _wait(self, wait_s: float) -> bool:
        """Wait until the trigger is due or something changed; returns False for `not now`."""
        if self._engine.once and wait_s > PATIENCE_S:
            return False
        await wait_for_event(self._watch.changed, wait_s)
        return True


Helper = Callable[[], Coroutine[Any, Any, None]]  # what runs beside the engine, until it ends


class Engine:
    """Everything that runs: which jobs there are, who looks at them, who carries their triggers.

    `apply` takes a new setup at any time; `run` works until it is cancelled or, with --once, until
    every unfinished job has had its look and its step.
    """

    def __init__(
        self, setup: Setup, store: Store, lock: StateLock, http: Http, *, once: bool = False
    ) -> None:
        self.setup = setup
        self.store = store
        self.clock = http.clock
        self.once = once
        self.watches: dict[int, Watch] = {}
        self.is_stopping = False
        self._lock = lock
        self._http = http
        http.tell = self.note
        self._pollers: dict[Account, Poller] = {}
        self._learned = Learned()
        self._tasks: asyncio.TaskGroup | None = None
        self._touched: set[Watch] = set()
        self._touched_at = -math.inf
        self._pruned_at = -math.inf
        self._data_version = -1
        self._trouble: dict[str | None, str] = {}
        self._usages = store.usages()
        self._used: set[str] = set()  # secrets whose usage is not written yet
        self._accounts: dict[Account, str] = {}  # the names of their secrets
        self._alarms = store.alarms()
        self.news_came = asyncio.Event()  # there is something to publish,
        self.mail_came = asyncio.Event()  # and something to tell webhooks
        self.clear_from = -math.inf  # a search before that, with nothing found, says nothing
        self.is_config_rejected = False
        self.has_failed = False  # something could not be written, or a bug was met

    # --- running ---

    async def run(self, helpers: Sequence[Helper] = ()) -> None:
        """Work, with `helpers` beside. Raises StateError where going on could start a job twice."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._see_if_state_is_older()
                self.apply(self.setup)
                if not self.once:
                    self.store.be_quick()
                    self.spawn(self._keep_house())
                for helper in helpers:
                    self.spawn(helper())
        except BaseExceptionGroup as group:
            errors, _ = group.split(TeckoError)
            if errors:
                raise first_leaf(errors) from None
            raise

    def _see_if_state_is_older(self) -> None:
        """Take no search for an answer yet where the state file does not know of the last POST.

        It was lost or restored; what was posted shows in Keboola's search within the grace.
        """
        posted = self._lock.last_post
        if posted is None or posted.wall < self.store.last_sending_at() + 0.01:
            return
        grace_s = self.setup.config.limits.trigger_grace_s
        wait_s = grace_s - elapsed_s(posted, self.clock.moment())
        if wait_s > 0:
            self.clear_from = self.clock.mono() + wait_s
            self.note(Event("state_is_older", "warning", None, {"wait_s": round(wait_s, 1)}))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that `run` waits for, and whose exception ends it."""
        if self._tasks is None:
            raise RuntimeError("the engine does not run")
        return self._tasks.create_task(work)

    async def drain(self, now: asyncio.Event) -> None:
        """Begin nothing new, and give POSTs in flight their time; `now` cuts it short."""
        self.is_stopping = True
        for poller in self._pollers.values():
            poller.stop()
        posting = {w.carrier for w in self.watches.values() if w.is_posting and w.carrier}
        hurry = asyncio.ensure_future(now.wait())
        deadline = self.clock.mono() + DRAIN_S
        while posting and not hurry.done() and (left_s := deadline - self.clock.mono()) > 0:
            await asyncio.wait(
                {*posting, hurry}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            posting = {w.carrier for w in self.watches.values() if w.is_posting and w.carrier}
        hurry.cancel()
        for watch in self.watches.values():
            if watch.is_posting:
                self.note(Event("trigger_left_open", "warning", watch.work.name))

    async def _keep_house(self) -> None:
        """See what people asked for, and write down what may wait."""
        while True:
            self.check_in_place()
            try:
                self.take_requests()
                self.flush()
                self.prune()
                self.see_accounts()
            except (StorageError, sqlite3.Error) as error:
                self.note_trouble(error)
            await asyncio.sleep(REQUESTS_LOOK_S)

    def prune(self) -> None:
        """Drop old log rows, once an hour."""
        if self.clock.mono() - self._pruned_at > HOUR_S:
            self.store.prune(self.clock.wall() - self.setup.config.log.retention_s)
            self._pruned_at = self.clock.mono()

    # --- taking a setup ---

    def apply(self, setup: Setup) -> None:
        """Make a new setup the one that counts. After a StorageError, apply it again."""
        self.flush(at_once=True)
        jobs = setup.config.jobs
        targets = {name: setup.config.target(job) for name, job in jobs.items()}
        known = [watch.work for watch in self.watches.values()] or self.store.works()
        works = self.store.sync(jobs, targets, known)
        old, self.setup = self.setup, setup
        is_other_keboola = keboola_secrets(old) != keboola_secrets(setup)  # any may carry a trigger
        self._http.set_limits(setup.config.limits)
        watches = {}
        for work in works:
            job = jobs.get(work.name) if work.position is not None else None
            watch = self.watches.get(work.id)
            if watch is None:
                watch = self._begin(work)
            else:
                is_changed = job != watch.job or (
                    secrets_of(old, watch.job) != secrets_of(setup, job)
                )
                if is_changed or (work.trigger and is_other_keboola):
                    self._rouse(watch)
                watch.work = work
            watch.job = job
            watches[work.id] = watch
        for gone in self.watches.keys() - watches.keys():
            # Its row may come back, with a watch and a carrier of its own: never two at a time.
            carrier = self.watches[gone].carrier
            if carrier:
                carrier.cancel()
        self.watches = watches
        self._hurry_notices(old)
        self._tell_standing()
        self._rearm()
        self._arrange_pollers()
        self.take_requests(at_once=True)
        for watch in self.watches.values():
            self.carry(watch)

    def _hurry_notices(self, old: Setup) -> None:
        """Have webhooks asked at once whose address is another one now."""
        names = self.setup.config.webhook.keys()
        changed = [n for n in names if old.secrets.get(n) != self.setup.secrets.get(n)]
        if changed:
            self.store.hurry_notices(changed, self.clock.wall())
            self.mail_came.set()

    def _begin(self, work: Work) -> Watch:
        """Return a watch for a row, its recorded times turned into deadlines of this process.

        A recorded time in the future counts as now; a clock that was set back wedges nothing.
        """
        wall, mono = self.clock.wall(), self.clock.mono()
        watch = Watch(work, due=mono)
        if work.trigger:
            trigger = as_of_now(work.trigger, wall)
            watch.work = replace(work, trigger=trigger)
            watch.trigger_due = mono + max(0.0, (trigger.next_try_at or wall) - wall)
            unknown_for_s = 0.0
            if trigger.unknown_since:
                unknown_for_s = elapsed_s(trigger.unknown_since, self.clock.moment())
            watch.unknown_since = mono - unknown_for_s
        return watch

    def _rouse(self, watch: Watch) -> None:
        """End the backoff of a work whose config has changed."""
        watch.due = self.clock.mono()
        watch.changed.set()

    def _rearm(self) -> None:
        """Make rejected triggers due whose target, variables or token are others now."""
        for watch in self.watches.values():
            trigger, job = watch.work.trigger, watch.job
            if trigger and job and trigger.state == TriggerState.REJECTED:
                target, token = (
                    self.setup.config.target(job),
                    self.setup.secrets[job.keboola_secret],
                )
                if trigger_basis(job, target, token) != trigger.basis:
                    armed = replace(trigger, next_try_at=self.clock.wall(), failures=0)
                    watch.work = replace(watch.work, trigger=armed)
                    self._rouse(watch)

    def _arrange_pollers(self) -> None:
        """Give each account's watches to its poller; pollers come and go with accounts."""
        by_account: dict[Account, list[Watch]] = {}
        names: dict[Account, str] = {}  # where secrets share an account, the first one's counts
        for watch in self.watches.values():
            if watch.job:
                account = account_of(self.setup, watch.job)
                by_account.setdefault(account, []).append(watch)
                names[account] = min(names.get(account, END_OF_IDS), watch.job.openai_secret)
        self._accounts |= names
        for account in [account for account in self._pollers if account not in by_account]:
            self._pollers.pop(account).stop()
        for account, watches in by_account.items():
            if account not in self._pollers:
                note = functools.partial(self._note_account, account)
                self._pollers[account] = Poller(self, OpenAIClient(account, self._http, note))
                self._pollers[account].start()
            self._pollers[account].take(watches, names[account])

    # --- what pollers and carriers need ---

    def wake_pollers(self) -> None:
        """Have the pollers see what is due now."""
        for poller in self._pollers.values():
            poller.wake.set()

    def is_polled(self, watch: Watch) -> bool:
        """Return whether a work's batches are looked at."""
        if watch.job is None or watch.job.rests or self.is_stopping:
            return False
        return not (watch.work.is_ready or watch.work.trigger)

    def may_post(self, watch: Watch) -> bool:
        """Return whether a work's trigger may be sent now.

        Other ids under the same name do not stop it; a job that is gone or paused does.
        """
        job = self.setup.config.jobs.get(watch.work.name)
        return job is not None and not job.rests and not self.is_stopping

    def carry(self, watch: Watch) -> None:
        """Start a carrier for a work that may need one and has none."""
        running = watch.carrier is not None and not watch.carrier.done()
        if (
            not running
            and not watch.work.is_finished
            and (watch.work.trigger or watch.work.is_ready)
        ):
            watch.carrier = self.spawn(Carrier(self, watch).run())

    def is_carried(self, watch: Watch) -> bool:
        """Return whether a watch's carrier may go on: it is the row's only one, and has time."""
        return self.watches.get(watch.work.id) is watch and not self.is_stopping

    def keboola(self, name: str) -> KeboolaClient:
        """Return a client with a Keboola secret of the config."""
        stack_url = self.setup.config.keboola[name].stack_url
        note = functools.partial(self.note_request, name, KeboolaSecret.kind)
        token = self.setup.secrets[name]
        return KeboolaClient(stack_url, token, self._http, self._learned, note, tell=self.note)

    def may_carry(self, watch: Watch, trigger: Trigger) -> list[str]:
        """Return the secrets that may carry a trigger if they are of its project, the best first.

        Its job's own comes first. Where the project is not known, only the one that it was begun
        with may be of it: another one of the stack may be another project's.
        """
        config = self.setup.config
        job = config.jobs.get(watch.work.name)
        names = [trigger.secret]
        if trigger.project_id is not None and not trigger.follows_config:
            names = [*([job.keboola_secret] if job else ()), trigger.secret, *config.keboola]
        stack_url = trigger.target.stack_url
        usable = {n: s for n, s in config.keboola.items() if s.stack_url == stack_url}
        return [name for name in dict.fromkeys(names) if name in usable]

    def chosen_secret(self, watch: Watch, trigger: Trigger) -> tuple[str, str] | None:
        """Return which secret carries a trigger, and its project, by what is known already."""
        for name in self.may_carry(watch, trigger):
            key = trigger.target.stack_url, self.setup.secrets[name]
            project = self._learned.projects.get(key)
            is_bound = trigger.project_id is not None and not trigger.follows_config
            if project is not None and (project == trigger.project_id or not is_bound):
                return name, project
        return None

    async def find_secret(self, watch: Watch, trigger: Trigger) -> tuple[str, str]:
        """Return which secret carries a trigger, and its project, asking Keboola whose it is.

        Raises ApiError where there is none: a token of another project never carries a trigger.
        """
        why = ""
        for name in self.may_carry(watch, trigger):
            try:
                project = await self.keboola(name).project()
            except ApiError as error:
                if trigger.follows_config:
                    raise
                why += f"; {name}: {error}"
            else:
                chosen = self.chosen_secret(watch, trigger)
                if chosen:
                    return chosen
                why += f"; {name} is of project {project}"
        missing = f"project {trigger.project_id}"
        if trigger.project_id is None:
            missing = f"the project of the secret {trigger.secret}"
        message = (
            f"the config has no secret of {missing} on {trigger.target.stack_url},"
            f" where this trigger was begun{why}"
        )
        raise ApiError(message, sent=False)

    def check_in_place(self) -> None:
        """Raise StateError if the state file was deleted or replaced under the process.

        A commit into a deleted file succeeds, and would be forgotten.
        """
        if not (self.store.is_in_place() and self._lock.is_in_place()):
            message = f"the state file {self.store.path} or its lock was deleted or replaced"
            raise StateError(message, "nothing more is sent; start again")

    def note_post(self, sending: Trigger) -> None:
        """Remember beside the state file, too, that something is posted now."""
        self._lock.note_post(replace(self.clock.moment(), wall=sending.sending_at or 0.0))

    def record(
        self, looks: Iterable[tuple[Watch, Mapping[str, Batch | ApiError]]], begun_at: float
    ) -> list[Watch]:
        """Store what a look has shown, as one, and start the triggers of which it was the last.

        Returns what has changed. Of the others only the times are written, now and then: see
        `flush`. `begun_at` is the monotonic time of the look's beginning.
        """
        now, mono = self.clock.wall(), self.clock.mono()
        lag_s = mono - begun_at
        changed: list[tuple[Watch, Work]] = []
        news: list[Event] = []
        whole: list[tuple[Watch, float]] = []
        for watch, seen in looks:
            interval_s = watch.job.poll_interval_s if watch.job else 0
            if is_old_news(watch.work, seen):
                self._note_look(watch, now - lag_s, mono + next_look_s(interval_s, lag_s))
                continue
            try:
                after, events = after_look(
                    watch.work,
                    seen,
                    interval_s=interval_s,
                    lag_s=lag_s,
                    now=now,
                    jitter=self.clock.jitter(),
                )
            except Exception as error:  # noqa: BLE001 - a bug that one job meets is not the others'
                self.note_bug(error, watch.work.name)
                watch.due = mono + MINUTE_S
                continue
            news += events
            if after != watch.work:
                changed.append((watch, after))
            if is_whole_look(watch.work, seen):
                whole.append((watch, mono + max(0.0, (after.next_check_at or now) - now)))
        if changed:
            self.save(changed, news)
        for watch, due in whole:
            self._note_look(watch, now - lag_s, due)
            self.carry(watch)
        return [watch for watch, _ in changed]

    def _note_look(self, watch: Watch, looked_at: float, due: float) -> None:
        """Remember when a work was looked at, and is to be looked at again."""
        watch.looked_at, watch.due = looked_at, due
        self._touched.add(watch)

    def summary(self) -> str:
        """Return how the jobs are, in one line."""
        statuses = [job_status(watch.work) for watch in self.watches.values() if watch.job]
        counts = [f"{n} {status}" for status, n in sorted(collections.Counter(statuses).items())]
        summary = ", ".join(counts) or "no jobs"
        if self.is_config_rejected:
            summary += "; the config file has problems, the previous one still counts"
        return summary

    def in_need(self) -> set[str]:
        """Return the jobs of the config that have an error or need a person."""
        jobs = self.setup.config.jobs
        works = [watch.work for watch in self.watches.values()]
        return {work.name for work in works if work.name in jobs and needs_person(work)}

    # --- writing ---

    def save(self, changes: Sequence[tuple[Watch, Work]], events: Sequence[Event]) -> None:
        """Commit the new states of works with the events that tell of them, then tell them."""
        told = [self._clean(event) for event in events]
        works = [(watch.work, after) for watch, after in changes]
        mail = self._mail(lambda: self._messages(works))
        self.store.save(works, told, self.clock.wall(), mail)
        for watch, after in changes:
            watch.work = after
        self._say(told, mail)

    def note(self, *events: Event) -> None:
        """Tell events that go with no change of a job; a full disk must not silence the log."""
        told = [self._clean(event) for event in events]
        with contextlib.suppress(StorageError):
            self.store.log(told, self.clock.wall())
        self._say(told)

    def note_trouble(self, error: Exception, job: str | None = None) -> None:
        """Tell once of trouble with the state file, until something could be written again."""
        self.has_failed = True
        if self._trouble.get(job) != str(error):
            self._trouble[job] = str(error)
            say(Event("state_write_failed", "error", job, {"error": str(error)}))

    def note_bug(self, error: Exception, where: str) -> None:
        """Tell of an exception that nobody has thought of, with its traceback."""
        self.has_failed = True
        logger().error("internal_error", where=where, exc_info=error)

    def note_config(self, config: Config | None, error: str | None, *events: Event) -> None:
        """Remember which config the process runs with, and what was wrong with the last one."""
        self.is_config_rejected = error is not None
        error = self._http.redactor.text(error) if error else None
        known = self.store.meta("config") or {}
        if config:
            loaded_at = rfc3339(self.clock.wall())
            known = {"path": str(config.path), "sha256": config.sha256, "loaded_at": loaded_at}
        told = [self._clean(event) for event in events]
        first = error.splitlines()[0] if error else None
        mail = self._mail(lambda: config_messages(first, self._alarms))
        self.store.put_meta("config", {**known, "error": error}, told, self.clock.wall(), mail)
        self._say(told, mail)

    def _say(self, events: Iterable[Event], mail: Mail = NO_MAIL) -> None:
        """Tell what has been committed."""
        self._trouble.clear()
        self.news_came.set()
        for event in events:
            say(event)
        for message in mail.messages:
            alarm = (message.event, message.subject)
            if message.is_over:
                self._alarms.pop(alarm, None)
            elif message.lasts:
                self._alarms[alarm] = message.job
        if mail.copies:
            self.mail_came.set()

    def _clean(self, event: Event) -> Event:
        """Return an event without secrets: the state file keeps it too."""
        cleaned = {key: self._http.redactor.tree(value) for key, value in event.fields.items()}
        return replace(event, fields=cleaned)

    def flush(self, *, at_once: bool = False) -> None:
        """Write when works were looked at, and how keys fared, now and then."""
        wait_s = max(TOUCH_S, len(self._touched) * TOUCH_S_EACH)
        is_time = at_once or self.clock.mono() - self._touched_at >= wait_s
        if is_time and (self._touched or self._used):
            wall, mono = self.clock.wall(), self.clock.mono()
            looks = [
                (watch.work.id, watch.looked_at, wall + watch.due - mono)
                for watch in self._touched
                if not watch.work.is_ready
            ]
            self.store.touch(looks, {name: self._usages[name] for name in self._used})
            self._touched.clear()
            self._used.clear()
            self._touched_at = self.clock.mono()

    # --- accounts and webhooks ---

    def usages(self) -> dict[str, Usage]:
        """Return how the requests with each secret of the config have fared."""
        secrets = self.setup.config.secrets
        return {name: usage for name, usage in self._usages.items() if name in secrets}

    def note_request(self, secret: str, service: str, came: Answer | ApiError) -> None:
        """Remember how a request with a secret has fared."""
        status, error = None, None
        if isinstance(came, ApiError):
            error = str(came)
        elif not came.is_success:
            status, error = came.status, f"{came.status}{server_words(came)}"
        usage = self._usages.get(secret)
        if usage is None or usage.service != service:
            usage = Usage(service)
        self._usages[secret] = after_request(usage, status, error, self.clock.wall())
        self._used.add(secret)

    def _note_account(self, account: Account, came: Answer | ApiError) -> None:
        """Remember how a request to an account has fared, under its secret's present name."""
        self.note_request(self._accounts[account], OpenAISecret.kind, came)

    def see_accounts(self) -> None:
        """Have webhooks told of keys that are refused for long."""
        self._send(lambda: account_messages(self.usages(), self._alarms))

    def _tell_standing(self) -> None:
        """Have webhooks told of what is wrong already, and of what is over with its job."""
        works = [watch.work for watch in self.watches.values()]
        self._send(
            lambda: [
                *self._messages((work, work) for work in works),
                *gone_messages(works, self._alarms),
            ]
        )

    def _messages(self, changes: Iterable[tuple[Work, Work]]) -> list[Message]:
        """Return what webhooks are told of changes."""
        if not (self.setup.config.notify or self._alarms):
            return []
        return [m for before, after in changes for m in work_messages(before, after, self._alarms)]

    def _mail(self, make: Callable[[], Sequence[Message]]) -> Mail:
        """Return mail without secrets: the state file keeps it, and others read it.

        A bug in what makes it is not the jobs': what it would tell of is stored all the same.
        """
        try:
            hooks = self.setup.config.notify
            redact = self._http.redactor.text
            clean = [replace(message, text=redact(message.text)) for message in make()]
            # An alarm that nobody was told of does not stand.
            wanted = {event for hook in hooks for event in hook.events}
            return mail_of([m for m in clean if m.is_over or m.event in wanted], hooks)
        except Exception as error:  # noqa: BLE001 - see above
            self.note_bug(error, "notify")
            return NO_MAIL

    def _send(self, make: Callable[[], Sequence[Message]]) -> None:
        """Store messages that go with no other change."""
        mail = self._mail(make)
        if mail.messages:
            self.store.save((), (), self.clock.wall(), mail)
            self._say((), mail)

    # --- what people ask for ---

    def take_requests(self, *, at_once: bool = False) -> None:
        """Do what people asked for with `retry` since the last time."""
        version = self.store.data_version()
        if version == self._data_version and not at_once:
            return
        for request in self.store.requests():
            self._take_request(request)
        self._data_version = version

    def _take_request(self, request: Request) -> None:
        now = self.clock.wall()
        current = [w for w in self.watches.values() if w.work.name == request.job and w.job]
        if not current:
            event = Event(
                "retry_refused", "warning", request.job, {"why": "it is not in the config"}
            )
            self.store.dismiss(request.id, [event], now)
            self._say([event])
            return
        watch = current[0]
        after, why_not = after_retry(
            watch.work, force=request.force, now=now, is_posting=watch.is_posting
        )
        seen = (request.rerun, request.was_finished)
        if request.force and seen != (watch.work.rerun, watch.work.is_finished):
            after, why_not = watch.work, "its Keboola job was started or found meanwhile"
        event = Event("retry_taken", "info", request.job, {"force": request.force})
        if why_not is not None:
            event = Event("retry_refused", "warning", request.job, {"why": why_not})
        self.store.settle(request.id, watch.work, after, [event], now)
        self._say([event])
        watch.work = after
        if why_not is None:
            self._rouse(watch)
            self.carry(watch)
            self.wake_pollers()


def refuse_other_state(old: Config, new: Config) -> None:
    """Raise ConfigError if a running process is asked to remember in another file."""
    if old.state_path != new.state_path:
        what = f"the running process has {old.state_path} open"
        cure = "restart it to use another state file"
        raise ConfigError([Problem(str(new.path), Place(), "state", what, cure)])


def note_loaded(engine: Engine, setup: Setup) -> None:
    """Tell that a config counts now, and what could be better about it."""
    known = engine.store.meta("config") or {}
    is_known = known.get("sha256") == setup.config.sha256 and not known.get("error")
    if engine.once and is_known:
        return  # from cron, a pass without news says nothing
    jobs = len(setup.config.jobs)
    events = [Event("config_loaded", "info", None, {"jobs": jobs, "sha256": setup.config.sha256})]
    events += [Event("config_warning", "warning", None, {"warning": w}) for w in setup.warnings]
    engine.note_config(setup.config, None, *events)


class Reloader:
    """Sees that the config, its key file or a secret's file has changed, and has it taken."""

    def __init__(
        self,
        engine: Engine,
        files: Files,
        env: Mapping[str, str],
        redactor: Redactor,
        notifier: Notifier,
    ) -> None:
        self._engine = engine
        self._env = env
        self._redactor = redactor
        self._notifier = notifier
        self._path = engine.setup.config.path
        self._seen = files.fingerprint()
        self._one_at_a_time = asyncio.Lock()
        self.hangup = asyncio.Event()

    async def watch_clock(self) -> None:
        """Compare the files every now and then, and reload on SIGHUP whatever they say.

        Events tell nothing of what lies elsewhere, of network file systems, and of what changed
        before the watch began.
        """
        while True:
            force = await wait_for_event(self.hangup, RELOAD_LOOK_S)
            self.hangup.clear()
            await self.check(force=force)

    async def watch_files(self) -> None:
        """Compare the files on every event in the config's directory.

        The directory is watched, not the file: editors replace it, Kubernetes swaps a link.
        """
        # Here, because importing it costs the other commands a third of their start.
        import watchfiles

        state = self._engine.store.path.name
        ours = {state, state + "-wal", state + "-shm", state + "-journal", state + ".lock"}
        for name in PUBLISHED:
            ours |= {name, new_name(name)}
        while True:
            try:
                async for _ in watchfiles.awatch(
                    self._path.parent,
                    watch_filter=lambda _, path: Path(path).name not in ours,
                    step=200,  # a file still being written is left alone that long
                    recursive=False,
                ):
                    await self.check()
            except (OSError, RuntimeError) as error:  # the clock sees what this does not
                say(Event("watch_failed", "warning", None, {"error": one_line(str(error))}))
            await asyncio.sleep(MINUTE_S)

    async def check(self, *, force: bool = False) -> None:
        """Take the files if they differ from those last tried, good or bad."""
        async with self._one_at_a_time:
            files = Files()
            for path in self._seen:
                files.read(path)
            if not force and files.fingerprint() == self._seen:
                return
            self._notifier.reloading()
            try:
                await self._take(files)
                self._seen = files.fingerprint()
            except (StorageError, sqlite3.Error) as error:  # tried again at the next look
                self._engine.note_trouble(error)
            finally:
                self._notifier.send("READY=1", f"STATUS={self._engine.summary()}")

    async def _take(self, files: Files) -> None:
        """Parse and decrypt all of it; only then, in one step, let it count."""
        engine = self._engine
        try:
            setup = await asyncio.to_thread(
                load_setup, self._path, files, self._env, self._redactor
            )
            refuse_other_state(engine.setup.config, setup.config)
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            event = Event("config_rejected", "error", None, {"problems": problems})
            engine.note_config(None, "\n".join(problems), event)
            return
        engine.apply(setup)
        configure_logging(setup.config.log, self._redactor)
        note_loaded(engine, setup)


class Teller:
    """Delivers what webhooks are to be told. A dead one holds up its own messages, nothing else.

    What is to be told was committed together with what it tells of, so that it is not lost; a
    message whose answer is lost is sent again.
    """

    TIMEOUT_S: Final = 10

    def __init__(self, engine: Engine, http: Http) -> None:
        self._engine = engine
        self._http = http  # of its own: its requests take none of the places of others
        http.tell = engine.note
        self._delivered: set[int] = set()  # that are not dropped from the state file yet
        self._busy: set[str] = set()  # webhooks that something is on its way to

    @classmethod
    def limits(cls, limits: Limits) -> Limits:
        """Return the limits for webhooks."""
        timeout_s = min(cls.TIMEOUT_S, limits.request_timeout_s)
        return replace(limits, request_timeout_s=timeout_s, max_concurrency=10)

    async def run(self) -> None:
        """Deliver whatever there is, as long as the process runs; each webhook at its own pace."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._engine.mail_came.clear()
                for secret, notices in self._due().items():
                    if secret not in self._busy:
                        self._busy.add(secret)
                        group.create_task(self._deliver(secret, notices))
                await wait_for_event(self._engine.mail_came, self._wait_s())

    def _wait_s(self) -> float:
        """Return how long it is until something is due."""
        now = self._engine.clock.wall()
        with contextlib.suppress(sqlite3.Error):
            due = self._engine.store.next_notice_at()
            return max(1.0, min(MINUTE_S, math.inf if due is None else due - now))
        return MINUTE_S

    async def deliver(self) -> None:
        """Try once to deliver what is due."""
        await all_of(self._deliver(secret, notices) for secret, notices in self._due().items())

    def _due(self) -> dict[str, list[Notice]]:
        """Return all messages of each webhook that is due for one, in their order."""
        now = self._engine.clock.wall()
        by_webhook: dict[str, list[Notice]] = {}
        due = set()
        try:
            for notice in self._engine.store.notices():
                by_webhook.setdefault(notice.secret, []).append(notice)
                is_new = notice.failures == 0
                is_ahead = notice.next_try_at > now + MAX_BACKOFF_S  # the clock was set back
                if is_new or is_ahead or notice.next_try_at <= now:
                    due.add(notice.secret)
        except sqlite3.Error as error:
            self._engine.note_trouble(error)
        return {secret: notices for secret, notices in by_webhook.items() if secret in due}

    async def _deliver(self, secret: str, notices: Sequence[Notice]) -> None:
        """Deliver one webhook's messages. Never raises: no job depends on it."""
        try:
            await self._deliver_in_order(secret, notices)
        except (StorageError, sqlite3.Error) as error:
            self._engine.note_trouble(error)
        except Exception as error:  # noqa: BLE001 - a bug here is not the jobs'
            self._engine.note_bug(error, "notify")
        else:
            self._engine.mail_came.set()  # there may be more by now
        self._busy.discard(secret)

    async def _deliver_in_order(self, secret: str, notices: Sequence[Notice]) -> None:
        """Deliver one webhook's messages until one of them does not get through.

        The others wait with it: a dead webhook is asked once, not once for each message.
        """
        for place, notice in enumerate(notices):
            setup = self._engine.setup  # asked each time: a reload may have changed the address
            if secret not in setup.config.webhook:
                self._drop(notices[place:], "the config no longer has this webhook")
                return
            try:
                if notice.id not in self._delivered:
                    await self._post(setup.secrets[secret], notice)
            except ApiError as error:
                self._put_off(notices[place:], error)
                return
            self._delivered.add(notice.id)
            self._engine.store.drop_notices([notice.id])
            self._delivered.discard(notice.id)

    async def _post(self, address: Secret, notice: Notice) -> None:
        """Post one message; raises ApiError unless it was taken."""
        headers = {"Content-Type": "application/json"}
        answer = await self._http.post(address.reveal(), headers, notice.body)
        if not answer.is_success:  # its words may be an echo of the address, which is secret
            message = f"the webhook answered {answer.status}"
            wait_s = retry_after_s(answer.headers, self._engine.clock.wall())
            raise ApiError(message, status=answer.status, retry_after_s=wait_s)

    def _put_off(self, notices: Sequence[Notice], error: ApiError) -> None:
        """Have messages tried again later; those that are a day old are given up."""
        now, jitter = self._engine.clock.wall(), self._engine.clock.jitter()
        # A host that was off for a day has to have its network back first.
        is_tried = notices[0].failures >= NOTICE_TRIES
        old = [n for n in notices if is_tried and now - n.at > NOTICE_LIFE_S]
        young = [n for n in notices if not is_tried or now - n.at <= NOTICE_LIFE_S]
        if old:
            self._drop(old, f"not delivered within a day: {error}")
        first = after_failed_notice(notices[0], error, now, jitter)
        later = [replace(first, id=notice.id) for notice in young]
        if notices[0].failures == 0:  # told once; it would go on for a day
            fields_ = {"webhook": notices[0].secret, "error": str(error)}
            self._engine.note(Event("notify_failed", "warning", None, fields_))
        self._engine.store.put_off(later)

    def _drop(self, notices: Sequence[Notice], why: str) -> None:
        fields_ = {"webhook": notices[0].secret, "messages": len(notices), "why": why}
        self._engine.note(Event("notify_dropped", "warning", None, fields_))
        self._engine.store.drop_notices([notice.id for notice in notices])


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for an end now."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.now if self.stop.is_set() else self.stop).set()


async def keep_alive(engine: Engine, notifier: Notifier) -> None:
    """Tell the service manager that the loop turns, and how the jobs are."""
    interval_s = min(10.0, (notifier.watchdog_s or 60.0) / 3)
    watchdog = ["WATCHDOG=1"] if notifier.watchdog_s else []
    notifier.send("READY=1")
    while True:
        notifier.send(*watchdog, f"STATUS={engine.summary()}")
        await asyncio.sleep(interval_s)


async def run_engine(
    engine: Engine,
    signals: Signals,
    helpers: Sequence[Helper],
    notifier: Notifier,
) -> int:
    """Let the engine work until it is done or a signal ends it; returns the exit code."""
    running = asyncio.ensure_future(engine.run(helpers))
    stopped = asyncio.ensure_future(signals.stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    interrupted = not running.done()
    if interrupted:
        notifier.send("STOPPING=1")
        await engine.drain(signals.now)
        running.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    with contextlib.suppress(StorageError):
        engine.flush(at_once=True)
        engine.prune()
    if signals.now.is_set() or (interrupted and engine.once):
        return 130
    return 0


# ==================================================================================================
# 9. Publishing: what is known at one moment, for people and for programs
# ==================================================================================================


HEARTBEAT_S: Final = 50.0  # the longest that published files stay as they are
FRESH_S: Final = 15.0  # how much longer a page waits for the next one
PUBLISH_SHARE: Final = 1 / 30  # of the time is spent on it, or more if it takes over a second
LAST_EVENTS: Final = 3  # of each job, that are shown


@dataclass(frozen=True, slots=True)
class Report:
    """What is known at one moment: what `status`, the page and the metrics show."""

    at: float  # Unix seconds
    runs: Holder
    config: Mapping[str, str | None]  # path, sha256, loaded_at, error, as `status --json` has them
    works: Sequence[Work]  # the config's, in its order
    usages: Mapping[str, Usage]  # by the secret's name
    last_events: Mapping[str, Sequence[LogRow]]  # of each job that has any
    fresh_for_s: float = 0.0  # a page of the daemon's that is older has outlived it


# --- in words -------------------------------------------------------------------------------------


def in_words(seconds: float) -> str:
    """Return a length of time as people say it: `3 min`."""
    for unit, size in (("day", DAY_S), ("h", HOUR_S), ("min", MINUTE_S)):
        count = round(seconds / size)
        if seconds >= size * 0.99:
            return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"
    return f"{max(0, round(seconds))} s"


def ago(unix_s: float | None, now: float) -> str:
    """Return how long ago something was; what is recorded in the future is now."""
    if unix_s is None:
        return "never"
    return f"{in_words(now - unix_s)} ago" if now - unix_s >= 1 else "just now"


def until(unix_s: float | None, now: float) -> str:
    """Return how long it is until something."""
    return f"in {in_words(unix_s - now)}" if unix_s is not None and unix_s - now >= 1 else "now"


def progress(batch: Batch) -> float:
    """Return which share of a batch is done, from 0 to 1."""
    if batch.is_terminal:
        return 1.0
    ended = (batch.completed or 0) + (batch.failed or 0)
    return min(1.0, ended / batch.total) if batch.total else 0.0


def ratio(work: Work) -> str:
    """Return how many batches have ended: `1/2`."""
    return f"{sum(batch.is_terminal for batch in work.batches)}/{len(work.batches)}"


def next_of_trigger(trigger: Trigger, now: float) -> str:
    """Return what happens next to a trigger that has not started a Keboola job yet."""
    when = until(trigger.next_try_at, now)
    match trigger.state:
        case TriggerState.REJECTED if trigger.next_try_at is None:
            return "wait for another target, variables or token, or `retry`"
        case TriggerState.REJECTED:
            return f"try again {when}, or `retry`"
        case TriggerState.SENDING:
            return "wait for Keboola's answer"
        case TriggerState.UNKNOWN:
            return f"search Keboola again {when}"
        case _:
            return f"search Keboola {when}, then start it"


def what_next(work: Work, now: float) -> str:
    """Return what happens next to a job, and when; or what has come of it."""
    trigger = work.trigger
    if work.is_finished and trigger:
        return f"started as Keboola job {trigger.keboola_job_id}, {ago(trigger.sent_at, now)}"
    if work.done or work.paused:
        return "nothing: it is done elsewhere" if work.done else "nothing while it is paused"
    if trigger:
        return next_of_trigger(trigger, now)
    return "start it now" if work.is_ready else f"look {until(work.next_check_at, now)}"


def who_runs(report: Report) -> str:
    """Return whether anyone acts on the state file, as a sentence."""
    return {
        Holder.DAEMON: "The daemon runs.",
        Holder.ONCE: "A pass of --once is being made.",
        Holder.NOBODY: "Nothing runs: start the daemon, or --once.",
        Holder.HIDDEN: "Whether the daemon runs, this user may not see.",
    }.get(report.runs, "")


def in_need_first(works: Iterable[Work]) -> list[Work]:
    """Return jobs in the order in which a person wants to see them: what needs them, then the rest.

    What runs comes before what rests and what is finished.
    """
    last = {JobStatus.PAUSED: 2, JobStatus.COMPLETED: 3, JobStatus.COMPLETED_WITH_FAILURES: 3}
    return sorted(works, key=lambda w: 0 if needs_person(w) else last.get(job_status(w), 1))


def jobs_in_words(works: Iterable[Work]) -> str:
    """Return how many jobs have which status, in one line."""
    counts = collections.Counter(map(job_status, works))
    return ", ".join(f"{counts[status]} {status}" for status in JobStatus if counts[status])


# --- as JSON --------------------------------------------------------------------------------------


def batch_view(batch: Batch) -> dict[str, object]:
    """Return a batch as `status --json` shows it."""
    counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    return {
        "id": batch.id,
        "status": batch.status,
        "request_counts": counts if batch.total is not None else None,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "completed_at": rfc3339(batch.ended_at),
    }


def trigger_view(trigger: Trigger | None) -> dict[str, object] | None:
    """Return a trigger as `status --json` shows it."""
    if trigger is None:
        return None
    return {
        "id": trigger.id,
        "state": trigger.state,
        "keboola_job_id": trigger.keboola_job_id,
        "keboola_status": trigger.keboola_status,
        "url": trigger.url,
        "sent_at": rfc3339(trigger.sent_at),
        "error": trigger.error,
    }


def job_view(work: Work) -> dict[str, object]:
    """Return a job as `status --json` shows it."""
    failed = sum(is_failure(b) for b in work.batches)
    status = job_status(work)
    return {
        "name": work.name,
        "status": status,
        "error": error_of(work),
        "batch_count": len(work.batches),
        "completed_count": sum(b.status == BatchStatus.COMPLETED for b in work.batches),
        "failed_count": failed,
        "batches": [batch_view(batch) for batch in work.batches],
        "last_check_at": rfc3339(work.last_check_at),
        "next_check_at": rfc3339(work.next_check_at) if status == JobStatus.ACTIVE else None,
        "completed_at": rfc3339(work.completed_at),
        "trigger": trigger_view(work.trigger),
    }


def status_document(report: Report) -> dict[str, object]:
    """Return what `status --json` prints and `status.json` holds."""
    return {
        "version": __version__,
        "generated_at": rfc3339(report.at),
        "config": dict(report.config),
        "jobs": [job_view(work) for work in report.works],
    }


def status_json(report: Report) -> str:
    """Return the document as JSON. Job by job: other threads wait while one piece is encoded."""
    head, end = json.dumps(status_document(replace(report, works=()))).rsplit("[]", 1)
    return f"{head}[{', '.join(json.dumps(job_view(work)) for work in report.works)}]{end}\n"


# --- as metrics -----------------------------------------------------------------------------------


Sample = tuple[Mapping[str, str], float]


def metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    """Return the lines of a metric in Prometheus' text format (version 0.0.4)."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    full = f"teckochecker_{name}"
    lines = [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
    for labels, value in samples:
        pairs = ",".join(f'{key}="{label.translate(escapes)}"' for key, label in labels.items())
        lines.append(f"{full}{f'{{{pairs}}}' if pairs else ''} {value:.15g}")
    return lines if len(lines) > 2 else []


def by_label(label: str, names: Iterable[str], found: Iterable[str]) -> list[Sample]:
    """Return how often each name was found; those that were not found are 0, not missing."""
    counts = collections.Counter({str(name): 0 for name in names})
    counts.update(map(str, found))
    return [({label: name}, count) for name, count in counts.items()]


def account_metrics(usages: Mapping[str, Usage]) -> list[str]:
    """Return how the requests with each secret have fared."""
    labels = {name: {"account": name, "service": use.service} for name, use in usages.items()}
    return [
        *metric(
            "requests_total",
            "counter",
            "Requests made with a secret.",
            [(labels[name], use.requests) for name, use in usages.items()],
        ),
        *metric(
            "request_errors_total",
            "counter",
            "Requests with a secret that brought no success.",
            [(labels[name], use.errors) for name, use in usages.items()],
        ),
        *metric(
            "last_success_timestamp_seconds",
            "gauge",
            "When a request with a secret last succeeded.",
            [(labels[n], use.last_success_at) for n, use in usages.items() if use.last_success_at],
        ),
        *metric(
            "account_refused",
            "gauge",
            "Whether the server refuses the secret (401, 403).",
            [(labels[name], use.refused_since is not None) for name, use in usages.items()],
        ),
    ]


def config_metrics(config: Mapping[str, str | None]) -> list[str]:
    """Return whether the config file counts, and since when the one that does."""
    loaded_at = config.get("loaded_at")
    loaded: list[Sample] = []
    if loaded_at:
        loaded = [({}, datetime.fromisoformat(loaded_at).timestamp())]
    good: list[Sample] = [({}, config.get("error") is None)]
    return [
        *metric("config_last_reload_successful", "gauge", "Whether the config file counts.", good),
        *metric(
            "config_last_reload_success_timestamp_seconds",
            "gauge",
            "When the config that counts was loaded.",
            loaded,
        ),
    ]


def look_metrics(works: Iterable[Work], now: float) -> list[str]:
    """Return how long ago batches were looked at."""
    active = [work for work in works if job_status(work) == JobStatus.ACTIVE]
    ages = [max(0.0, now - work.last_check_at) for work in active if work.last_check_at]
    samples: list[list[Sample]] = [[({}, age)] for age in (min(ages), max(ages))] if ages else []
    names = ("last_look_age_seconds", "oldest_look_age_seconds")
    texts = (
        "Seconds since the last look at the batches of any active job.",
        "Seconds since the last look at the active job that has waited longest.",
    )
    lines = [metric(n, "gauge", t, s) for n, t, s in zip(names, texts, samples, strict=False)]
    return [line for found in lines for line in found]


def metrics(report: Report) -> str:
    """Return the state of all jobs in Prometheus' text format, for its textfile collector."""
    works = report.works
    batches = (batch.status or "unseen" for work in works for batch in work.batches)
    statuses = (*BatchStatus, "unseen")
    states = (work.trigger.state for work in works if work.trigger)
    needs: list[Sample] = [({}, sum(map(needs_person, works)))]
    made: list[Sample] = [({}, report.at)]
    info: list[Sample] = [({"version": __version__}, 1)]
    runs: list[Sample] = [({}, report.runs == Holder.DAEMON)]
    lines = [
        *metric("info", "gauge", "The program's version.", info),
        *metric("generated_timestamp_seconds", "gauge", "When this file was made.", made),
        *metric("daemon_running", "gauge", "Whether the daemon ran then.", runs),
        *metric(
            "jobs",
            "gauge",
            "Jobs of the config by status.",
            by_label("status", JobStatus, map(job_status, works)),
        ),
        *metric("jobs_in_need", "gauge", "Jobs that need a person.", needs),
        *metric(
            "batches",
            "gauge",
            "Batches of the config's jobs by status.",
            by_label("status", statuses, batches),
        ),
        *metric(
            "triggers",
            "gauge",
            "Starts of Keboola jobs by how far they have come.",
            by_label("state", TriggerState, states),
        ),
        *look_metrics(works, report.at),
        *account_metrics(report.usages),
        *config_metrics(report.config),
    ]
    return "".join(f"{line}\n" for line in lines)


# --- as a page ------------------------------------------------------------------------------------

PAGE_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #555d66; --paper: #fff; --card: #f5f6f8;
  --line: #d5d9de; --link: #0b57c2; --good: #17713a; --run: #2b66c9; --bad: #b3261e;
  --wait: #8a5a00; --track: #c9ced6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #a6adb7; --paper: #16181b;
  --card: #202328; --line: #3a3f46; --link: #8ab8ff; --good: #62d68d; --run: #7fb0ff;
  --bad: #ff8f86; --wait: #f2bd5c; --track: #444a53; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; flex: 1 1 8rem; }
p, ul { margin: .25rem 0; }
ul { padding-left: 1.2rem; }
a { color: var(--link); }
.dim { color: var(--dim); }
.alarm { border: 2px solid var(--bad); border-radius: .5rem; padding: .75rem; margin: .75rem 0; }
.alarm strong, .need .error { color: var(--bad); }
.error { color: var(--wait); }
.loud { background: #a3170f; border-color: #a3170f; color: #fff; font-size: 1.3rem; }
.loud strong { color: inherit; }
.stale { display: none; }
.stale:target { display: block; }
.job { background: var(--card); border: 1px solid var(--line);
  border-left: .35rem solid var(--track); border-radius: .4rem; padding: .6rem .8rem;
  margin: .5rem 0; }
.job.need { border-left-color: var(--bad); }
.job header { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: baseline; }
.pill { font-weight: 600; }
.completed, .good { color: var(--good); }
.active { color: var(--run); }
.paused, .triggering, .completed_with_failures { color: var(--wait); }
.failed, .need .pill { color: var(--bad); }
.bar { display: block; width: 100%; height: .6rem; margin: .4rem 0 .2rem; }
.bar .track { fill: var(--track); }
.bar .run { fill: var(--run); }
.bar .good { fill: var(--good); }
.bar .bad { fill: var(--bad); }
summary { cursor: pointer; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
td:last-child { white-space: normal; min-width: 14rem; }
.scroll { overflow-x: auto; }
pre { white-space: pre-wrap; margin: .25rem 0; }
"""


def esc(text: object) -> str:
    """Return text that is only text in HTML, in an attribute too."""
    return html.escape(str(text), quote=True)


def dim(text: object) -> str:
    """Return text that is not so important."""
    return f'<span class="dim">{esc(text)}</span>'


def bar(work: Work) -> str:
    """Return a job's batches as a picture of one piece each, filled as far as it is done."""
    pieces = []
    for place, batch in enumerate(work.batches):
        done = progress(batch)
        kind = "bad" if is_failure(batch) else "good" if batch.is_terminal else "run"
        width = 1 if place == len(work.batches) - 1 else 0.97
        parts = ((kind, done), ("track", 1 - done))
        rects = [
            f'<rect class="{name}" x="{place + (name == "track") * width * done:.4g}" '
            f'width="{width * share:.3g}" height="1"/>'
            for name, share in parts
            if share
        ]
        title = f"<title>{esc(batch.id)}: {esc(batch.status or 'not looked at yet')}</title>"
        pieces.append(f"<g>{title}{''.join(rects)}</g>")
    label = f"{ratio(work)} batches have ended"
    box = f'viewBox="0 0 {len(work.batches)} 1" preserveAspectRatio="none"'
    return f'<svg class="bar" role="img" aria-label="{label}" {box}>{"".join(pieces)}</svg>'


def keboola_link(trigger: Trigger | None) -> str:
    """Return the Keboola job of a trigger, as a link where its address is known."""
    if trigger is None or trigger.keboola_job_id is None:
        return ""
    text = f"Keboola job {esc(trigger.keboola_job_id)}"
    if not (trigger.url and trigger.url.startswith(("https://", "http://"))):
        return f"{text}. "
    return f'<a href="{esc(trigger.url)}" rel="noreferrer">{text}</a>. '


def target_text(target: Target) -> str:
    """Return what a job starts, in one line."""
    branch = f", branch {target.branch_id}" if target.branch_id else ""
    return f"{target.component_id} {target.config_id}{branch} on {target.stack_url}"


def event_line(row: LogRow) -> str:
    """Return an event without its job, in one line."""
    facts = ", ".join(
        f"{key} {one_line(str(value), 200)}" for key, value in row.event.fields.items()
    )
    return f"{rfc3339(row.at)} {row.event.name}{': ' if facts else ''}{facts}"


def job_card(work: Work, events: Sequence[LogRow], now: float) -> str:
    """Return one job of the page."""
    status = job_status(work)
    error = error_of(work)
    ended_badly = [
        f"{b.id} {b.status}" + (f": {b.error}" if b.error else "")
        for b in work.batches
        if is_failure(b)
    ]
    is_needy = needs_person(work)
    looked = dim(f"Last look {ago(work.last_check_at, now)}.")
    times = f"Next: {esc(what_next(work, now))}. {looked}"
    if work.is_finished:
        times = dim(f"Started {ago(work.completed_at, now)}.")
    lines = [
        f'<article class="job{" need" if is_needy else ""}">',
        f'<header><h3>{esc(work.name)}</h3><span><span class="pill {status}">',
        f'{status.replace("_", " ")}</span> <span class="dim">{ratio(work)}</span></span></header>',
        bar(work),
        f'<p class="error">{esc(error)}</p>' if error else "",
        *(f'<p class="error">{esc(line)}</p>' for line in ended_badly),
        f"<p>{keboola_link(work.trigger)}{times}</p>",
        f'<p class="dim">Target: {esc(target_text(work.target))}</p>',
    ]
    if events:
        items = "".join(f"<li>{esc(event_line(row))}</li>" for row in events)
        opened = " open" if is_needy else ""
        lines.append(f"<details{opened}><summary>Last events</summary><ul>{items}</ul></details>")
    return "".join([*lines, "</article>\n"])


def account_table(usages: Mapping[str, Usage], now: float) -> str:
    """Return how the requests with each secret have fared."""
    rows = []
    for name, use in usages.items():
        since = use.refused_since
        last = f'<span class="error">refused since {rfc3339(since)}</span>' if since else ""
        if use.error and not since:
            last = f"last request failed: {esc(use.error)}"
        cells = (
            esc(name),
            esc(use.service),
            use.requests,
            use.errors,
            ago(use.last_success_at, now),
            last,
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n")
    names = ("Secret", "Type", "Requests", "Errors", "Last success", "State")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(rows)
    whole = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    scroll = 'class="scroll" role="region" aria-label="Accounts" tabindex="0"'
    return f"<div {scroll}><table>{whole}</table></div>\n"


def page_alarms(report: Report) -> str:
    """Return what a reader of the page has to see before anything else."""
    parts = []
    if report.runs == Holder.DAEMON:
        # Shown only where the page is asked for anew and is still this one: see `page_head`.
        parts.append(
            f'<div class="alarm loud stale" role="alert" id="{page_id(report)}"><strong>This page '
            f"is stale.</strong> It was made at {rfc3339(report.at)}, and no other one since: the "
            "daemon has died, or cannot write here.</div>\n"
        )
    elif report.runs == Holder.NOBODY:
        parts.append(
            f'<div class="alarm loud" role="alert"><strong>The daemon was stopped</strong> at '
            f"{rfc3339(report.at)}. Nothing is looked at and nothing is started.</div>\n"
        )
    if report.config.get("error"):
        parts.append(
            '<div class="alarm" role="alert"><strong>The config file has problems;</strong> the '
            f"previous one still counts.<pre>{esc(report.config['error'])}</pre></div>\n"
        )
    return "".join(parts)


def page_id(report: Report) -> str:
    """Return what tells this page from the next one."""
    return f"made-{report.at:.3f}".replace(".", "-")


def page_refresh(report: Report, name: str) -> str:
    """Return when the page that stands in a file is to be asked for anew, and from where."""
    other = AGAIN_FILE if name == PAGE_FILE else PAGE_FILE
    if report.runs != Holder.DAEMON:  # there may never be another one
        return f"{MINUTE_S}; url={other}"
    own = page_id(report)
    return f"{math.ceil(report.fresh_for_s)}; url={other}?{own}#{own}"


def page_head(report: Report, name: str = PAGE_FILE) -> str:
    """Return the page's head. It needs no script, and would run none.

    The page asks for itself anew when there must be another one: with an address that points at an
    element of this one. Should it still be there, it is shown, and says that the page is stale.

    Browsers do not load again what they show already, they only go to its element. So the page
    is there under two names, each of which asks for the other one. A web server should send it
    with `Cache-Control: no-cache`: what has not changed for a day, browsers keep for hours.
    """
    digest = base64.b64encode(hashlib.sha256(PAGE_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    needs = sum(map(needs_person, report.works))
    title = f"{needs} in need - TeckoChecker" if needs else "TeckoChecker"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta http-equiv="refresh" content="{page_refresh(report, name)}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{PAGE_STYLE}</style>
</head>
"""


def page_body(report: Report) -> str:
    """Return the page below its head: what needs a person first."""
    ordered = in_need_first(report.works)
    needs = sum(map(needs_person, ordered))
    cards = [job_card(w, report.last_events.get(w.name, ()), report.at) for w in ordered]
    made = {Holder.DAEMON: "Made by the daemon", Holder.ONCE: "Made by a pass of --once"}
    loaded = report.config.get("loaded_at")
    parts = [
        f"<body>\n<header>\n{page_alarms(report)}<h1>TeckoChecker</h1>\n",
        f"<p>{jobs_in_words(report.works) or 'no jobs'}</p>\n",
        f'<p class="dim">{made.get(report.runs, "Made")} at {rfc3339(report.at)}',
        f"; config loaded at {esc(loaded)}</p>\n</header>\n" if loaded else "</p>\n</header>\n",
        "<main>\n",
        f"<h2>Needs a person ({needs})</h2>\n{''.join(cards[:needs])}"
        if needs
        else '<p class="good">No job needs a person.</p>\n',
        f"<h2>Jobs ({len(cards) - needs})</h2>\n{''.join(cards[needs:]) or '<p>none</p>'}",
        f"<h2>Accounts</h2>\n{account_table(report.usages, report.at)}" if report.usages else "",
        "</main>\n</body>\n</html>\n",
    ]
    return "".join(parts)


# --- as files -------------------------------------------------------------------------------------


class LastEvents:
    """The last events of each job, read from the log as it grows."""

    def __init__(self) -> None:
        self._rows: dict[str, collections.deque[LogRow]] = {}
        self._last_id = 0

    def read(self, store: Store, jobs: Iterable[str]) -> Mapping[str, Sequence[LogRow]]:
        """Return the last events of these jobs, the newest first."""
        names = set(jobs)
        self._rows = {name: rows for name, rows in self._rows.items() if name in names}
        last_id = store.last_log_id()
        if self._rows:
            for row in store.logs(after=self._last_id, job=None, most=None):
                if row.event.job in self._rows and row.id <= last_id:
                    self._rows[row.event.job].appendleft(row)
        for name in names - self._rows.keys():
            rows = store.logs(after=0, job=name, most=LAST_EVENTS)
            found = [row for row in reversed(rows) if row.id <= last_id]
            self._rows[name] = collections.deque(found, maxlen=LAST_EVENTS)
        self._last_id = last_id
        return self._rows


def put_file(directory: Path, name: str, text: str) -> None:
    """Write a file that everyone may read, as a whole or not at all. Raises OSError.

    It is not synced: after a power loss the next one comes soon.
    """
    new = directory / new_name(name)
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # A descriptor, not a path; and what cannot be encoded must not end the process.
        with open(fd, "w", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            os.fchmod(fd, 0o644)
            file.write(text)
        new.replace(directory / name)
    finally:
        new.unlink(missing_ok=True)  # a full disk is not to stay full for its sake


def published(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what is published, by the names of the files, each when the one before is written."""
    yield STATUS_FILE, status_json(report)
    yield METRICS_FILE, metrics(report)
    body = page_body(report)
    for name in (PAGE_FILE, AGAIN_FILE):
        yield name, page_head(report, name) + body


async def in_daemon_thread(work: Callable[[], None]) -> None:
    """Do something in a thread that does not keep the process from ending, as a pool's would.

    A directory on a network that hangs would hold it for ever.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if done.done():  # given up meanwhile
            return
        if error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def run() -> None:
        came: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            came = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, came)

    threading.Thread(target=run, name="publish", daemon=True).start()
    await done


class Publisher:
    """Writes what is `published` whenever something has changed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last_events = LastEvents()
        self._one_at_a_time = threading.Lock()
        self._trouble = ""
        self._took_s = 0.0

    async def run(self) -> None:
        """Publish what has changed, and now and then what has not, while the process runs."""
        while True:
            self._engine.news_came.clear()
            await self.publish(Holder.DAEMON)
            pause_s = min(HEARTBEAT_S, max(1.0, self._took_s / PUBLISH_SHARE))
            await asyncio.sleep(pause_s)
            await wait_for_event(self._engine.news_came, HEARTBEAT_S - pause_s)

    async def publish(self, runs: Holder) -> None:
        """Write the files, if the config has a place for them; trouble is told once."""
        directory = self._engine.setup.config.publish_path
        if directory is None:
            return
        trouble = ""
        try:
            await in_daemon_thread(functools.partial(self._write, directory, self._report(runs)))
        except (OSError, TeckoError, sqlite3.Error) as error:
            trouble = one_line(str(error))
        except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
            trouble = one_line(f"{type(error).__name__}: {error}")
        if trouble and trouble != self._trouble:
            fields_ = {"directory": str(directory), "error": trouble}
            self._engine.note(Event("publish_failed", "warning", None, fields_))
        elif self._trouble and not trouble:
            self._engine.note(Event("publish_recovered", "info"))
        self._trouble = trouble

    def _report(self, runs: Holder) -> Report:
        """Return what the engine knows now; its works are not changed, only replaced."""
        engine = self._engine
        clock = engine.clock
        wall, mono = clock.wall(), clock.mono()
        config, usages = engine.setup.config, engine.usages()
        asked = dict.fromkeys(config.openai, OpenAISecret.kind)
        asked |= dict.fromkeys(config.keboola, KeboolaSecret.kind)
        watches = [watch for watch in engine.watches.values() if watch.job]
        watches.sort(key=lambda watch: watch.work.position or 0)
        return Report(
            at=wall,
            runs=runs,
            config=config_view(config, engine.store.meta("config") or {}),
            works=[as_looked_at(watch, wall, mono) for watch in watches],
            usages={name: usages.get(name, Usage(kind)) for name, kind in asked.items()},
            last_events={},
            fresh_for_s=HEARTBEAT_S + FRESH_S + 2 * self._took_s,
        )

    def _write(self, directory: Path, report: Report) -> None:
        """Write the files, in a thread."""
        started = time.monotonic()
        with self._one_at_a_time:
            with read_store(self._engine.store.path) as store:
                names = [work.name for work in report.works]
                events = self._last_events.read(store, names) if store else {}
            directory.mkdir(exist_ok=True)
            for name, text in published(replace(report, last_events=events)):
                put_file(directory, name, text)
        self._took_s = time.monotonic() - started


def as_looked_at(watch: Watch, wall: float, mono: float) -> Work:
    """Return a watch's work with the times of its looks, which the state file learns later."""
    if not watch.looked_at or watch.work.is_ready:
        return watch.work
    return replace(watch.work, last_check_at=watch.looked_at, next_check_at=wall + watch.due - mono)


def config_view(config: Config, meta: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the config that counts, as `status --json` shows it; `meta` is the process's word."""
    return {
        "path": meta.get("path", str(config.path)),
        "sha256": meta.get("sha256", config.sha256),
        "loaded_at": meta.get("loaded_at"),
        "error": meta.get("error"),
    }


# ==================================================================================================
# 10. Commands: what a person types. Only these print
# ==================================================================================================


# --- the daemon and --once ------------------------------------------------------------------------


def config_path(args: argparse.Namespace) -> Path:
    """Return the config that a command is about."""
    given_path = getattr(args, "config", None)
    return Path(given_path or os.environ.get("TECKOCHECKER_CONFIG") or "config.yaml")


async def was_cut_short(work: Coroutine[Any, Any, None], by: asyncio.Event) -> bool:
    """Do something unless an event is or becomes set; returns whether it was."""
    doing, waiting = asyncio.ensure_future(work), asyncio.ensure_future(by.wait())
    try:
        if not by.is_set():
            await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        is_cut = not doing.done()
    finally:
        doing.cancel()
        waiting.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)
    if not is_cut:
        doing.result()  # raises what it raised
    return is_cut


async def tell_once(engine: Engine, teller: Teller) -> None:
    """Tell webhooks what a pass has found out; what takes long is for the next one."""
    try:
        engine.see_accounts()
    except (StorageError, sqlite3.Error) as error:
        engine.note_trouble(error)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            await teller.deliver()


async def serve(path: Path, env: Mapping[str, str], *, once: bool) -> int:
    """Be the daemon or, with `once`, one pass of it; returns the exit code.

    Raises ConfigError, LockedError and StateError before anything was asked of a server.
    """
    redactor, files = Redactor(), Files()
    setup = load_setup(path, files, env, redactor)
    configure_logging(setup.config.log, redactor)
    notifier = Notifier(env)
    clock = SystemClock()
    lock = StateLock(setup.config.state_path, Holder.ONCE if once else Holder.DAEMON)
    store = Store.open(setup.config.state_path)
    http = Http(setup.config.limits, redactor, clock)
    engine = Engine(setup, store, lock, http, once=once)
    publisher = Publisher(engine)
    teller = Teller(engine, Http(Teller.limits(setup.config.limits), redactor, clock))
    signals = Signals()
    helpers: list[Helper] = []
    if not once:
        reloader = Reloader(engine, files, env, redactor, notifier)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.hangup.set)
        alive = functools.partial(keep_alive, engine, notifier)
        helpers = [alive, reloader.watch_clock, reloader.watch_files, publisher.run, teller.run]
    try:
        note_loaded(engine, setup)
        code = await run_engine(engine, signals, helpers, notifier)
        if once and code == 0 and await was_cut_short(tell_once(engine, teller), signals.stop):
            code = 130
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                last = publisher.publish(Holder.ONCE if once else Holder.NOBODY)
                await was_cut_short(last, signals.stop if once else signals.now)
    finally:
        await http.close()
        store.close()
        lock.close()
    if code == 0 and once:
        names = sorted(engine.in_need())
        if names:  # said in every such pass: an exit code alone explains nothing
            say(Event("jobs_need_attention", "warning", None, {"jobs": names}))
        code = 1 if names or engine.has_failed else 0
    return code


def run_daemon(args: argparse.Namespace) -> int:
    """Run the daemon, or one pass with --once."""
    return asyncio.run(serve(config_path(args), os.environ, once=args.once))


# --- check, and what commands share ---------------------------------------------------------------


def draft_for_reading(args: argparse.Namespace) -> Draft:
    """Return the config so far as it can be read, for commands that look at the state file.

    Raises ConfigError where that does not even tell where the state file is.
    """
    files, redactor = Files(), Redactor()
    draft = read_draft(config_path(args), files)
    if draft.problems:
        redactor.learn(Opener(draft.config, files, os.environ).open_all().values())
        draft = replace(draft, problems=without_secrets(draft.problems, redactor))
    if not draft.config.sha256 and not is_there(draft.config.state_path):
        raise ConfigError(draft.problems)
    return draft


def no_such_job(name: str) -> UsageError:
    """Return the error of a command about a job that is not there."""
    return UsageError(f"there is no job {quoted(name)}", "`status` lists them all")


def counted(n: int, noun: str) -> str:
    """Return a number with its noun."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"


def run_check(args: argparse.Namespace) -> int:
    """Validate the config just as the start does, without asking any server."""
    path = config_path(args)
    setup = load_setup(path, Files(), os.environ, Redactor())
    for warning in setup.warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    jobs = setup.config.jobs.values()
    batches = sum(len(job.batch_ids) for job in jobs)
    counts = ((len(jobs), "job"), (batches, "batch"), (len(setup.secrets), "secret"))
    print(f"{path}: fine: {', '.join(counted(n, noun) for n, noun in counts)}")
    return 0


RED: Final = "\033[31m"
GREEN: Final = "\033[32m"
DIM: Final = "\033[2m"
PLAIN: Final = "\033[0m"


def can_show(text: str) -> bool:
    """Return whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def painted(text: str, colour: str) -> str:
    """Return text in a colour, on a terminal whose owner wants colours (https://no-color.org)."""
    is_dumb = os.environ.get("TERM") == "dumb"
    is_wanted = sys.stdout.isatty() and not is_dumb and not os.environ.get("NO_COLOR")
    return f"{colour}{text}{PLAIN}" if colour and text and is_wanted else text


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def fitted(text: str, most: int | None) -> str:
    """Return a line, cut to so many columns."""
    if most is None or columns_of(text) <= most:
        return text
    text = text[:most]
    while text and columns_of(text) >= most:
        text = text[:-1]
    return f"{text}…" if can_show("…") else text


def terminal_columns() -> int | None:
    """Return how wide the terminal is; None where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    rows: Sequence[Sequence[str]], colours: Sequence[str] = (), most: int | None = None
) -> list[str]:
    """Return rows as lines with aligned columns, cut to a width if there is one."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, colour in itertools.zip_longest(rows, colours, fillvalue=""):
        cells = [
            cell + " " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(painted(fitted("  ".join(cells).rstrip(), most), colour))
    return lines


# --- init -----------------------------------------------------------------------------------------

EXAMPLE_CONFIG: Final = """\
# A first config for TeckoChecker. Replace what is in CAPITALS, then run `teckochecker encrypt` and
# `teckochecker check`. What is commented out is optional; a key with a value there shows its
# default, unless the line says "for example".

# state: teckochecker.db            # the SQLite file; relative paths are relative to this file
# key_file: teckochecker.key        # encrypts the values under `secrets`; mode 0600
# publish: www                      # for example; a directory for a status page and metrics

# log:
#   level: info                     # debug | info | warning | error
#   format: auto                    # auto (console on a terminal, else JSON lines) | console | json
#   retention: 30d                  # how long the state file keeps its log
# limits:
#   max_concurrency: 10             # requests in flight, all servers together: 1 to 100
#   request_timeout: 30s            # for one request as a whole: 1s to 60s
#   trigger_grace: 60s              # how long Keboola's search may not show a new job: 30s to 24h

secrets:
  openai-prod:
    type: openai
    value: YOUR-OPENAI-KEY          # in plain only until `teckochecker encrypt` has run
    # env: OPENAI_API_KEY           # or, instead of value: the name of an environment variable
    # file: /run/secrets/openai     # or a file with nothing but the key
    # base_url: https://api.openai.com/v1    # or another server with the same batch API
    # organization: org-abc         # for example; header OpenAI-Organization
    # project: proj_abc             # for example; header OpenAI-Project
  keboola-prod:
    type: keboola
    value: YOUR-KEBOOLA-TOKEN       # env: and file: work here too
    stack_url: https://connection.keboola.com    # the address in your browser, up to the first /
  # alerts:                         # for example; a webhook, which `notify` below makes use of
  #   type: webhook
  #   value: https://hooks.slack.com/services/T0/B0/XYZ    # the address is a secret: encrypt it

# notify:                           # for example; without events: all of them
#   - {secret: alerts, events: [job_failed, trigger_unknown, account_failing, config_rejected]}

# Any key of a job may stand here; the job's own value wins.
defaults:
  openai_secret: openai-prod
  keboola_secret: keboola-prod
  component_id: kds-team.app-custom-python
  # poll_interval: 30s              # 1s to 24h

jobs:
  my-first-job:                     # any name; with the batch ids it is what a job is known by
    batch_ids: [batch_YOUR_ID]      # 1 to 10; the Keboola job starts when all of them have ended
    config_id: "123456"             # the Keboola configuration to start
    # branch_id: "789"              # for example; a Keboola development branch
    # config_row_ids: ["1", "2"]    # for example; only these rows of the configuration
    # mode: run                     # run | forceRun | debug
    # variables: {dataset: products}    # for example; more variables for the Keboola job
    # paused: false                 # true: no looks at the batches, no Keboola job
    # done: false                   # true: something else has started it; nothing is to be done
"""


def write_new(path: Path, text: str) -> None:
    """Write a file that only its owner can read. Raises UsageError if there is one already."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(
            f"{path} is there already", "nothing is overwritten: choose another DIR"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another DIR") from None
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(text)
        file.flush()
        os.fsync(fd)


def run_init(args: argparse.Namespace) -> int:
    """Write a first config and a new key."""
    from cryptography.fernet import Fernet

    directory = Path(args.directory)
    config, key = directory / "config.yaml", directory / DEFAULT_KEY
    for path in (config, key):  # so that not one of them is written where the other one is there
        if is_there(path):
            raise UsageError(
                f"{path} is there already", "nothing is overwritten: choose another DIR"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make {directory}: {error.strerror}", "choose another DIR"
        ) from None
    write_new(key, Fernet.generate_key().decode() + "\n")
    write_new(config, EXAMPLE_CONFIG)
    shown = shlex.quote(str(config))
    print(f"wrote {config} and {key}, which only you can read. Next:")
    print(f"  1. edit {config}: tokens in plain, stack, batch ids, config_id")
    print(f"  2. teckochecker --config {shown} encrypt")
    print(f"  3. teckochecker --config {shown} check, then doctor, then neither: the daemon")
    return 0


# --- secrets --------------------------------------------------------------------------------------


def source_text(source: SecretSource) -> str:
    """Return where a secret's value comes from; never the value."""
    text = source.text.reveal()
    if source.kind == "value":
        return "value" if looks_encrypted(text) else "value, NOT ENCRYPTED: run `encrypt`"
    if source.kind == "env" and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", text):
        return "env, BUT NOT A VARIABLE'S NAME"  # it may be the token itself
    return f"{source.kind} {one_line(text, 200)}"


def run_secrets(args: argparse.Namespace) -> int:
    """List the secrets, and who uses each."""
    draft = read_draft(config_path(args), Files())
    if draft.problems:
        raise ConfigError(draft.problems)
    config = draft.config
    users: dict[str, list[str]] = {hook.secret: ["notify"] for hook in config.notify}
    for job in config.jobs.values():
        users.setdefault(job.openai_secret, []).append(job.name)
        users.setdefault(job.keboola_secret, []).append(job.name)
    rows = [("SECRET", "TYPE", "FROM", "USED BY")]
    for secret in config.secrets.values():
        jobs = ", ".join(users.get(secret.name, ())) or "nobody"
        rows.append((secret.name, secret.kind, source_text(secret.source), jobs))
    print("\n".join(table(rows)) if config.secrets else "no secrets")
    return 0


# --- encrypt --------------------------------------------------------------------------------------


def encrypted_value(at: Cursor, old: str, keyring: Keyring, *, rotate: bool) -> str | None:
    """Return what to write instead of a value, or None and a problem."""
    if keyring.decrypt(old) is not None:
        return keyring.rotate(old) if rotate else old
    if looks_encrypted(old):
        return at.bad("is encrypted with another key", "add that key after the first one")
    problem = check_secret_value(old)
    return at.bad(problem, "write the token") if problem else keyring.encrypt(Secret(old))


def spliced(node_text: str, token: str) -> str:
    """Return a scalar's source text with its value replaced.

    An anchor stays, a comment behind it or behind a block's `|`, and what ends a block.
    """
    anchor = re.match(r"(?:[&!]\S*\s+|#[^\n]*\n\s*)*", node_text)
    prefix = anchor[0] if anchor else ""
    block = re.match(r"[|>][^\r\n#]*(#[^\r\n]*)?\r?\n", node_text[len(prefix) :])
    comment = f"  {block[1].rstrip()}" if block and block[1] else ""
    end = node_text[len(node_text.rstrip()) :]
    return f"{prefix}{token}{comment}{end}"


def encrypted_text(
    text: str, values: Mapping[str, Cursor], keyring: Keyring, *, rotate: bool
) -> tuple[str, list[str]]:
    """Return the config's text with its plain values encrypted, and the names of their secrets.

    With `rotate`, tokens are closed again with the first key too. Raises ConfigError.
    """
    changes: dict[tuple[int, int], str] = {}
    names: list[str] = []
    problems: list[Problem] = []
    secrets: list[Secret] = []
    for name, at in values.items():
        old = at.text("write the token")
        secrets.append(keyring.decrypt(old or "") or Secret(old or ""))
        new = None if old is None else encrypted_value(at, old, keyring, rotate=rotate)
        problems = at.problems
        if new and new != old:
            changes[at.node.start_mark.index, at.node.end_mark.index] = new
            names.append(name)
    if problems:
        raise ConfigError(problems)
    for (start, end), token in sorted(changes.items(), reverse=True):
        text = text[:start] + spliced(text[start:end], token) + text[end:]
    again = secret_values(text, Path(), problems)
    if [keyring.decrypt(str(at.node.value)) for at in again.values()] != secrets:
        raise TeckoError(
            "an encrypted value would not read back the same", "write it in quotes, on one line"
        )
    return text, names


def replace_file(path: Path, old: bytes, new: bytes) -> None:
    """Replace a file's content as a whole or not at all; mode and owner stay.

    Raises TeckoError if someone else has written it meanwhile, or it cannot be done.
    """
    real = path.resolve()
    fd, temporary = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}.")
    try:
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
    finally:
        Path(temporary).unlink(missing_ok=True)


def typed_text(name: str) -> str:
    """Return what a person types, unseen, or what comes over standard input."""
    if sys.stdin is None:  # closed by whoever started us
        return ""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            return getpass.getpass(f"{name}: ")
        return ""
    return sys.stdin.buffer.read(MAX_SECRET_BYTES + 1).decode("utf-8", "replace")


def new_secret(name: str, kind: str | None) -> Secret:
    """Return a new value for a secret. Raises UsageError for what can be none."""
    text = typed_text(name)
    problem = f"is over {MAX_SECRET_BYTES >> 10} KiB" if len(text) > MAX_SECRET_BYTES else None
    text = text.strip()
    problem = problem or check_secret_value(text)
    if problem is None and kind == WebhookSecret.kind:
        problem = webhook_problem(text)
    if problem:
        raise UsageError(f"what was given for {name} {problem}", "nothing is changed")
    return Secret(text)


def text_with_value(text: str, found: Mapping[str, Cursor], token: str) -> str:
    """Return the config's text with a token as the `value` of a secret; `found` are its keys."""
    if "value" in found:
        node = found["value"].node
        start, end = node.start_mark.index, node.end_mark.index
        new = spliced(text[start:end], token) if end > start else f" {token}"
        return text[:start] + new + text[end:]
    last = found["type"]
    place = last.node.end_mark.index
    if last.key is None or text[place:].lstrip()[:1] in {",", "}"}:  # in braces
        return f"{text[:place]}, value: {token}{text[place:]}"
    line = text[place:].partition("\n")[0]
    end_of_line = "\r\n" if line.endswith("\r") else "\n"
    place += len(line.rstrip("\r"))  # behind a comment
    indent = " " * last.key.start_mark.column
    return f"{text[:place]}{end_of_line}{indent}value: {token}{text[place:]}"


def set_value(text: str, path: Path, name: str, keyring: Keyring) -> str:
    """Return the config's text with a new value for one secret. Raises TeckoError."""
    problems: list[Problem] = []
    entries = secret_entries(text, path, problems)
    if problems:
        raise ConfigError(problems)
    found = entries.get(name, {})
    other = next((kind for kind in ("env", "file") if kind in found), None)
    if "type" not in found:
        cure = "write it there with its type: (and stack_url:) first"
        raise UsageError(f"{path} has no secret {quoted(name)} under secrets", cure)
    if other:
        raise UsageError(f"the secret {name} has {other}:", f"take {other}: out first")
    secret = new_secret(name, found["type"].text(""))
    token = keyring.encrypt(secret)
    wanted = raw_values(text, path) | {name: token}
    text = text_with_value(text, found, token)
    if raw_values(text, path) != wanted:  # an anchor would change another one with it
        cure = f"write {name}: with type: and value: of its own, each on its own line"
        raise TeckoError(f"the value has no place of its own in {path}", cure)
    return text


def raw_values(text: str, path: Path) -> dict[str, str]:
    """Return what is written as each secret's `value`; nothing where the text cannot be read."""
    problems: list[Problem] = []
    values = secret_values(text, path, problems)
    return {} if problems else {name: str(at.node.value) for name, at in values.items()}


def run_encrypt(args: argparse.Namespace) -> int:
    """Encrypt the plain values of the config, in place; or a new value for one secret."""
    path, files = config_path(args), Files()
    draft = read_draft(path, files)
    if not draft.config.sha256:
        raise ConfigError(draft.problems)
    data = files.read(path).data
    text = data.decode().removeprefix(BYTE_ORDER_MARK)
    mark = data[: len(data) - len(text.encode())]
    problems: list[Problem] = []
    values = secret_values(text, path, problems)
    if problems:
        raise ConfigError(problems)
    names: list[str] = []
    if values or args.set is not None:
        opener = Opener(draft.config, files, os.environ)
        keyring = opener.keyring()
        if keyring is None:
            raise ConfigError(opener.problems)
        if args.set is not None:
            text, names = set_value(text, path, args.set, keyring), [args.set]
        else:
            text, names = encrypted_text(text, values, keyring, rotate=args.rotate)
    try:
        if names:
            replace_file(path, data, mark + text.encode())
    except OSError as error:
        hint = "run this as the file's owner, with room on the disk"
        raise TeckoError(f"cannot replace {path}: {error.strerror}", hint) from None
    print(f"encrypted: {', '.join(names)}" if names else "nothing to do: no value is in plain")
    return 0


# --- doctor ---------------------------------------------------------------------------------------

LEAST_FREE_BYTES: Final = 100 * 1024 * 1024
MOST_SKEW_S: Final = MINUTE_S
EXPIRES_SOON_S: Final = 14 * DAY_S
DOCTOR_TIMEOUT_S: Final = 10
DOCTOR_PATIENCE_S: Final = 45  # for all requests with one secret; the secrets go side by side
WORTH_A_PAGE: Final = 10  # batches that a page of the list shows; fewer are asked for one by one
VARIABLES_COMPONENT: Final = "keboola.variables"


def new_token_cure(secret: AnySecret) -> str:
    """Return where a new token belongs."""
    if secret.source.kind == "value":
        return f"make a new one, then run `encrypt --set {secret.name}`"
    return f"make a new one, and put it into {source_text(secret.source)}"


def cure_for(secret: AnySecret, error: ApiError) -> str:
    """Return what to do where a server takes no request with a secret."""
    return new_token_cure(secret) if error.status in REFUSED else server_cure(error)


def server_cure(error: ApiError) -> str:
    """Return what to do where it is not the secret that a server refuses."""
    if error.status is None:
        return "check the address, the network and the proxy"
    if error.status < 400:
        return "check the address: something else answers there"
    return "see the server's own words, and its status page"


class Findings:
    """What is right and what is wrong, in the order in which it is told.

    What is found out side by side gets a `part` each, in the order of the config.
    """

    def __init__(self) -> None:
        self._found: list[tuple[bool, str] | Findings] = []

    def good(self, text: str) -> None:
        """Note what is right."""
        self._found.append((True, text))

    def bad(self, text: str, cure: str = "") -> None:
        """Note what is wrong, and what to do about it."""
        self._found.append((False, f"{text}; {cure}" if cure else text))

    def part(self) -> Findings:
        """Return a place for what is yet to be found out."""
        part = Findings()
        self._found.append(part)
        return part

    def lines(self) -> Iterator[tuple[bool, str]]:
        """Return each line, with whether it tells of something right."""
        for found in self._found:
            if isinstance(found, Findings):
                yield from found.lines()
            else:
                yield found


Sight = Callable[[str, Http, Findings], Coroutine[Any, Any, None]]


class Doctor:
    """Tries out everything that has to be right, and prints a line about each."""

    def __init__(self, config: Config, secrets: Mapping[str, Secret], redactor: Redactor) -> None:
        self.config = config
        self.is_ill = False
        self._secrets = secrets
        self._redactor = redactor
        self._ended: set[str] = set()  # batches that nobody looks at again
        self._finished: set[tuple[str, str]] = set()  # jobs, by name and batches
        self._skews: dict[str, float] = {}  # by the secret whose server told the time

    def tell(self, found: Findings) -> None:
        """Print what was found out."""
        for is_right, text in found.lines():
            self.is_ill = self.is_ill or not is_right
            right, wrong = ("✓", "✗") if can_show("✓✗") else ("ok", "WRONG")
            mark = painted(right, GREEN) if is_right else painted(wrong, RED)
            print(mark, one_line(self._redactor.text(text), 1000), flush=True)

    # --- this machine ---

    def see_config(self, draft: Draft, opener: Opener) -> None:
        """Tell what is wrong with the config, the key and the secrets."""
        found = Findings()
        problems = sorted([*draft.problems, *opener.problems], key=lambda problem: problem.place)
        for problem in problems:
            found.bad(str(problem))
        if not problems:
            jobs, secrets = len(self.config.jobs), len(self._secrets)
            words = f"{counted(jobs, 'job')}, {counted(secrets, 'secret')}, and every secret opens"
            found.good(f"{self.config.path}: {words}")
        for warning in opener.warnings:
            found.bad(warning)
        self.tell(found)

    def see_files(self) -> None:
        """Check what lies on this machine's disk."""
        found, path = Findings(), self.config.state_path
        self._see_directory(path.parent, "the state file", found)
        place = self.config.publish_path
        if place:
            where = place if os.path.lexists(place) else place.parent
            self._see_directory(where, "published files", found)
        try:
            with read_store(path) as store:
                if store:
                    store.refuse_damage()
                    self._learn(store.works("position IS NOT NULL"))
            self._see_rights(path, found)
            there = "is whole" if store else "is not there yet: the first start makes it"
            found.good(f"the state file {path} {there}")
        except TeckoError as error:
            found.bad(str(error))
        except sqlite3.Error as error:
            found.bad(f"cannot use the state file {path}: {error}", state_hint(error))
        holder = holder_of(path)
        running = {Holder.NOBODY: "nothing runs now", Holder.HIDDEN: "something may run now"}
        found.good(running.get(holder, f"running now: {holder}"))
        self.tell(found)

    def _learn(self, works: Iterable[Work]) -> None:
        """Remember what is over: its batches and its configuration may be gone by now."""
        for work in works:
            self._ended |= {batch.id for batch in work.batches if batch.is_terminal}
            if work.is_finished:
                self._finished.add((work.name, batch_key(batch.id for batch in work.batches)))

    def _open_jobs(self) -> list[Job]:
        """Return the jobs that something is still to be done for."""
        jobs = self.config.jobs.values()
        return [
            job
            for job in jobs
            if not job.done and (job.name, batch_key(job.batch_ids)) not in self._finished
        ]

    def _see_directory(self, directory: Path, what: str, found: Findings) -> None:
        """Check that files can be made in a directory, and that its disk has room."""
        try:
            free = shutil.disk_usage(directory).free
        except OSError as error:
            cure = "create it (under systemd, the unit does)"
            return found.bad(f"{directory}, for {what}: {error.strerror}", cure)
        if not os.access(directory, os.W_OK | os.X_OK):
            cure = "as the daemon's user, it would have to be: chown it, or run this as that user"
            return found.bad(f"{directory}, for {what}, cannot be written by this user", cure)
        if free < LEAST_FREE_BYTES:
            text = f"{directory}, for {what}, has {free >> 20} MiB left"
            return found.bad(text, "free some of the disk")
        return found.good(f"{directory}, for {what}: {free >> 20:,} MiB free")

    def _see_rights(self, state_path: Path, found: Findings) -> None:
        """Check that the files that are there already can be written."""
        for path in (state_path, lock_path(state_path)):
            if is_there(path) and not os.access(path, os.R_OK | os.W_OK):
                cure = "chown it to the daemon's user, or run this as that user"
                found.bad(f"{path} cannot be written by this user", cure)

    # --- the servers ---

    async def see_servers(self) -> None:
        """Ask OpenAI and Keboola with every secret, about everything that the jobs need of them."""
        timeout_s = min(DOCTOR_TIMEOUT_S, self.config.limits.request_timeout_s)
        limits = replace(self.config.limits, request_timeout_s=timeout_s)
        http = Http(limits, self._redactor, SystemClock())
        sights = [(self._see_openai, name) for name in self.config.openai if name in self._secrets]
        sights += [
            (self._see_keboola, name) for name in self.config.keboola if name in self._secrets
        ]
        tasks = [asyncio.create_task(self._patiently(see, name, http)) for see, name in sights]
        try:
            for task in tasks:
                self.tell(await task)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await http.close()
        self._see_skews()

    async def _patiently(self, see: Sight, name: str, http: Http) -> Findings:
        """Return what is found out with one secret, as far as the time allows."""
        found = Findings()
        try:
            async with asyncio.timeout(DOCTOR_PATIENCE_S):
                await see(name, http, found)
        except TimeoutError:
            text = f"{name}: not everything was answered within {DOCTOR_PATIENCE_S} s"
            found.bad(text, "see why its server is slow; for very many jobs, raise max_concurrency")
        return found

    def _note_time(self, name: str, came: Answer | ApiError) -> None:
        """Remember how far a server's clock is from ours."""
        server_s = None if isinstance(came, ApiError) else http_date(came.headers.get("date", ""))
        if server_s is not None:
            self._skews[name] = time.time() - server_s

    def _see_skews(self) -> None:
        found = Findings()
        wrong = {name: skew for name, skew in self._skews.items() if abs(skew) > MOST_SKEW_S}
        for name, skew in wrong.items():
            side = "ahead of" if skew > 0 else "behind"
            cure = "let NTP set it (systemd-timesyncd, chrony)"
            found.bad(f"the clock is {in_words(abs(skew))} {side} the server's of {name}", cure)
        if self._skews and not wrong:
            most = max(map(abs, self._skews.values()))
            found.good(f"the clock agrees with the servers' to {most:.0f} s")
        self.tell(found)

    # --- OpenAI ---

    async def _see_openai(self, name: str, http: Http, found: Findings) -> None:
        """Check an OpenAI key, and whether it reads the batches that are watched with it."""
        secret = self.config.openai[name]
        account = Account(self._secrets[name], secret.base_url, secret.organization, secret.project)
        client = OpenAIClient(account, http, functools.partial(self._note_time, name))
        jobs = [job for job in self._open_jobs() if job.openai_secret == name]
        ids = dict.fromkeys(batch_id for job in jobs for batch_id in job.batch_ids)
        watched = [batch_id for batch_id in ids if batch_id not in self._ended]
        listed: set[str] = set()
        try:
            listed = await self._listed(client, watched)
            found.good(f"{name}: {secret.base_url} takes the key")
        except ApiError as error:
            if error.status not in {404, 405}:
                found.bad(f"{name}: {secret.base_url}: {error}", cure_for(secret, error))
                return
            if not watched:
                text = f"{name}: {secret.base_url} has no list of batches"
                found.good(f"{text}, and no job a batch: the key is not tried")
        failures = await self._unreadable(client, [key for key in watched if key not in listed])
        self._tell_failures(name, jobs, failures, found)
        if len(failures) < len(watched):
            found.good(f"{name}: reads {len(watched) - len(failures)} of {len(watched)} batches")

    def _tell_failures(
        self,
        name: str,
        jobs: Iterable[Job],
        failures: Mapping[str, ApiError],
        found: Findings,
    ) -> None:
        for job in jobs:
            for batch_id in job.batch_ids:
                error = failures.get(batch_id)
                if error is None:
                    continue
                cure = cure_for(self.config.secrets[name], error)
                if error.status == 404:
                    cure = "correct batch_ids, or openai_secret, or that secret's base_url"
                found.bad(f"job {job.name}: {batch_id}: {error}", cure)

    async def _listed(self, client: OpenAIClient, watched: Sequence[str]) -> set[str]:
        """Return which batches the account's list shows, page after page while they show many."""
        known = {batch_id: Batch(batch_id) for batch_id in watched}
        listed: set[str] = set()
        cursor = None
        while True:
            page = await client.page(cursor, known)
            fresh = page.batches.keys() - listed
            listed |= fresh
            is_worth_it = len(fresh) >= WORTH_A_PAGE and len(listed) < len(known)
            if not (is_worth_it and page.has_more):
                return listed
            cursor = page.ids[-1]

    async def _unreadable(
        self, client: OpenAIClient, batch_ids: Sequence[str]
    ) -> dict[str, ApiError]:
        """Return which batches cannot be read, and why."""
        failures: dict[str, ApiError] = {}

        async def see(batch_id: str) -> None:
            try:
                await client.batch(batch_id)
            except ApiError as error:
                failures[batch_id] = error

        await all_of(map(see, batch_ids))
        return failures

    # --- Keboola ---

    async def _see_keboola(self, name: str, http: Http, found: Findings) -> None:
        """Check a Keboola token, its queue, and every configuration that is started with it."""
        stack_url = self.config.keboola[name].stack_url
        note = functools.partial(self._note_time, name)
        client = KeboolaClient(stack_url, self._secrets[name], http, note=note)
        try:
            self._see_token(name, await client.verify(), found)
        except ApiError as error:
            return found.bad(
                f"{name}: {stack_url}: {error}", cure_for(self.config.secrets[name], error)
            )
        jobs: dict[Target, list[Job]] = {}
        for job in self._open_jobs():
            if job.keboola_secret == name:
                jobs.setdefault(self.config.target(job), []).append(job)
        queue = self._see_queue(name, client, next(iter(jobs), None), found.part())
        sights = [self._see_target(client, t, own, found.part()) for t, own in jobs.items()]
        return await all_of([queue, *sights])

    def _see_token(self, name: str, said: Mapping[str, Any], found: Findings) -> None:
        owner = said.get("owner")
        project = text_or_none(owner.get("name")) if isinstance(owner, dict) else None
        if project is None:
            text = f"{name}: {self.config.keboola[name].stack_url} names no project of the token"
            return found.bad(text, "correct stack_url: it is no Keboola stack")
        left_s, when = math.inf, ""
        with contextlib.suppress(ValueError, OverflowError):
            expires = datetime.fromisoformat(str(said.get("expires")))
            left_s = expires.replace(tzinfo=expires.tzinfo or UTC).timestamp() - time.time()
            when = f", expires in {in_words(left_s)}" if left_s > 0 else ", has expired"
        text = f"{name}: the token is one of project {quoted(project)}{when}"
        if left_s < EXPIRES_SOON_S:
            return found.bad(text, new_token_cure(self.config.keboola[name]))
        return found.good(text)

    async def _see_queue(
        self, name: str, client: KeboolaClient, target: Target | None, found: Findings
    ) -> None:
        """Check that the queue is there, and that it can be searched."""
        try:
            url = await client.queue_url()
            if target:
                await client.search(target, time.time() - MINUTE_S, "-")
            found.good(f"{name}: the queue is {url}")
        except ApiError as error:
            found.bad(f"{name}: the queue: {error}", cure_for(self.config.secrets[name], error))

    async def _see_target(
        self, client: KeboolaClient, target: Target, jobs: Sequence[Job], found: Findings
    ) -> None:
        """Check that the configuration of some jobs is there, and fits each of them."""
        try:
            said = await client.configuration(target)
            needed = await self._variables_of(client, target, said)
        except ApiError as error:
            cure = server_cure(error)
            if error.status in {400, 404, *REFUSED}:
                cure = "correct component_id, config_id, branch_id or the token's rights"
            for job in jobs:
                found.bad(f"job {job.name}: {target_text(target)}: {error}", cure)
            return
        for job in jobs:
            self._see_job(job, said, needed, found)

    def _see_job(
        self, job: Job, said: Mapping[str, Any], needed: list[str] | None, found: Findings
    ) -> None:
        """Check that a configuration is enabled, has a job's rows, and gets all its variables."""
        text = f"job {job.name}: {target_text(self.config.target(job))}"
        rows = said.get("rows")
        gone: list[str] = []
        if isinstance(rows, list):
            there = {str(row.get("id")) for row in rows if isinstance(row, dict)}
            gone = [row_id for row_id in job.config_row_ids if row_id not in there]
        missing = [n for n in needed or () if n not in {*OWN_VARIABLES, *dict(job.variables)}]
        if said.get("isDisabled") is True:
            return found.bad(f"{text} is disabled", "enable it in Keboola")
        if gone:
            return found.bad(f"{text} has no rows {', '.join(gone)}", "correct config_row_ids")
        if missing:
            cure = "add them to the job's variables: what is sent replaces the defaults"
            return found.bad(f"{text} needs the variables {', '.join(missing)}", cure)
        takes = "gets its variables"
        if needed is None:
            takes = "declares no variables: its Keboola job gets no batch ids"
        return found.good(f"{text} is there, and {takes}")

    async def _variables_of(
        self, client: KeboolaClient, target: Target, said: Mapping[str, Any]
    ) -> list[str] | None:
        """Return the names of the variables that a configuration declares; None: it takes none."""
        inner = said.get("configuration")
        variables_id = inner.get("variables_id") if isinstance(inner, dict) else None
        if not isinstance(variables_id, str | int):
            return None
        where = replace(target, component_id=VARIABLES_COMPONENT, config_id=str(variables_id))
        found = (await client.configuration(where)).get("configuration")
        variables = found.get("variables") if isinstance(found, dict) else None
        rows = variables if isinstance(variables, list) else []
        return [str(row.get("name")) for row in rows if isinstance(row, dict)]


def run_doctor(args: argparse.Namespace) -> int:
    """Try out everything that has to be right."""
    redactor, files = Redactor(), Files()
    draft = read_draft(config_path(args), files)
    opener = Opener(draft.config, files, os.environ)
    secrets = opener.open_all()
    redactor.learn((*secrets.values(), *opener.keys, *opener.webhook_paths(secrets)))
    doctor = Doctor(draft.config, secrets, redactor)
    doctor.see_config(draft, opener)
    if draft.config.sha256:
        doctor.see_files()
        asyncio.run(doctor.see_servers())
    return 1 if doctor.is_ill else 0


# --- import ---------------------------------------------------------------------------------------

OLD_KEY_VARIABLE: Final = "SECRET_KEY"
_OLD_SECRETS: Final = "SELECT id, name, type, value FROM secrets ORDER BY id"
_OLD_JOBS: Final = """
SELECT id, name, openai_secret_id, keboola_secret_id, keboola_stack_url, keboola_component_id,
       keboola_configuration_id, poll_interval_seconds, status
FROM polling_jobs ORDER BY id"""
_OLD_BATCHES: Final = "SELECT job_id, batch_id FROM job_batches ORDER BY id"
_OLD_DONE: Final = frozenset({"completed", "completed_with_failures"})


def numbered(name: str) -> Iterator[str]:
    """Return a name, then the same with numbers behind it."""
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def name_for_secret(text: str, taken: Container[str]) -> str:
    """Return a name for a secret that is like `text`, and not taken."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:80] or "secret"
    return next(n for n in numbered(plain) if n not in taken)


def name_for_job(text: str, taken: Container[str]) -> str:
    """Return a name for a job that is like `text`, and not taken."""
    plain = one_line(text, 190) or "job"
    return next(n for n in numbered(plain) if n not in taken)


def old_stack_url(text: str) -> str | None:
    """Return a stack's address as the config has it; None for what is none."""
    url = text.strip().rstrip("/")
    if not url or url_problem(url if "://" in url else f"https://{url}"):
        return None
    parts = urllib.parse.urlsplit(url if "://" in url else f"https://{url}")
    is_page = (parts.hostname or "").startswith("connection.")  # of Keboola's, on that stack
    return f"{parts.scheme}://{parts.netloc}{'' if is_page else parts.path}"


class Importer:
    """Makes a config of the database of TeckoChecker 0.9; `notes` tell what a person has to see."""

    def __init__(self, db: sqlite3.Connection, old: Fernet, new: Keyring) -> None:
        db.row_factory = sqlite3.Row
        self._db = db
        self._old = old
        self._new = new
        self.notes: list[str] = []
        self._rows = {row["id"]: row for row in db.execute(_OLD_SECRETS)}
        self._names: dict[tuple[int, str], str] = {}  # of secrets, by old id and stack
        self._secrets: dict[str, dict[str, str]] = {}

    def config(self) -> dict[str, object]:
        """Return the config as plain data. Raises UsageError where a secret does not open."""
        batches: dict[int, list[str]] = {}
        for row in self._db.execute(_OLD_BATCHES):
            ids = batches.setdefault(row["job_id"], [])
            if str(row["batch_id"]) not in ids:
                ids.append(str(row["batch_id"]))
        jobs: dict[str, object] = {}
        for row in self._db.execute(_OLD_JOBS):
            name = name_for_job(str(row["name"]), jobs)
            if name != row["name"]:
                self.notes.append(f"the job {quoted(str(row['name']))} is called {name} now")
            job = self._job(name, row, batches.get(row["id"], []))
            if job:
                jobs[name] = job
        for old_id, row in self._rows.items():
            if not any(key[0] == old_id for key in self._names):
                text = quoted(str(row["name"]))
                self.notes.append(f"the secret {text} is left out: no job here uses it")
        return {"secrets": self._secrets, "jobs": jobs}

    def _job(self, name: str, row: sqlite3.Row, batch_ids: list[str]) -> dict[str, object] | None:
        """Return a job as the config has it; None, and a note, where it cannot have it."""
        stack_url = old_stack_url(str(row["keboola_stack_url"] or ""))
        why_not = None
        if not 1 <= len(batch_ids) <= 10:
            why_not = f"it has {counted(len(batch_ids), 'batch')}, and 1 to 10 are possible"
        elif stack_url is None:
            why_not = "its stack's address is none"
        elif not {row["openai_secret_id"], row["keboola_secret_id"]} <= self._rows.keys():
            why_not = "one of its secrets is not there"
        elif not (row["keboola_component_id"] and row["keboola_configuration_id"]):
            why_not = "it has no component or no configuration"
        if why_not or stack_url is None:
            self.notes.append(f"the job {name} is left out: {why_not}")
            return None
        job: dict[str, object] = {
            "batch_ids": batch_ids,
            "openai_secret": self._secret(row["openai_secret_id"], ""),
            "keboola_secret": self._secret(row["keboola_secret_id"], stack_url),
            "component_id": str(row["keboola_component_id"]),
            "config_id": str(row["keboola_configuration_id"]),
            "poll_interval": imported_interval(row["poll_interval_seconds"]),
        }
        return job | self._status(name, str(row["status"]).lower())

    def _status(self, name: str, status: str) -> dict[str, object]:
        """Return what keeps a job from starting again, as far as its status asks for that."""
        if status in _OLD_DONE:
            return {"done": True}
        if status == "active":
            return {}
        if status != "paused":
            words = "take out paused: to start it, or write done: true"
            self.notes.append(f"the job {name} was {one_line(status)}, and is paused now: {words}")
        return {"paused": True}

    def _secret(self, old_id: int, stack_url: str) -> str:
        """Return the name of a secret in the config; a token used with two stacks becomes two."""
        if (old_id, stack_url) not in self._names:
            row = self._rows[old_id]
            text = str(row["name"])
            if any(key[0] == old_id for key in self._names):
                host = urllib.parse.urlsplit(stack_url).hostname or "other"
                text = f"{text}-{host.removeprefix('connection.').removesuffix('.keboola.com')}"
            name = name_for_secret(text, self._secrets)
            self._names[old_id, stack_url] = name
            kind = KeboolaSecret.kind if stack_url else OpenAISecret.kind
            self._secrets[name] = {"type": kind, "value": self._reencrypted(name, row)}
            if stack_url:
                self._secrets[name]["stack_url"] = stack_url
        return self._names[old_id, stack_url]

    def _reencrypted(self, name: str, row: sqlite3.Row) -> str:
        """Return a secret's value, closed with our key."""
        from cryptography.fernet import InvalidToken

        value = row["value"]
        try:
            token = value if isinstance(value, bytes) else str(value).encode()
            text = self._old.decrypt(token.strip()).decode().strip()
        except (InvalidToken, ValueError):
            cure = f"set ${OLD_KEY_VARIABLE} as the old program had it"
            message = f"${OLD_KEY_VARIABLE} does not open the secret {quoted(str(row['name']))}"
            raise UsageError(message, cure) from None
        problem = check_secret_value(text)
        if problem:
            self.notes.append(f"the secret {name} {problem}: run `encrypt --set {name}`")
        return self._new.encrypt(Secret(text))


def imported_interval(seconds: object) -> str:
    """Return an old interval as the config writes it, within its limits."""
    return f"{min(DAY_S, max(1, count_or_none(seconds) or 120))}s"


def run_import(args: argparse.Namespace) -> int:
    """Print a config made of the database of TeckoChecker 0.9."""
    from cryptography.fernet import Fernet

    old = Path(args.old)
    if not is_there(old):
        raise UsageError(f"there is no file {old}", "name the database of TeckoChecker 0.9")
    old_key = os.environ.get(OLD_KEY_VARIABLE, "")
    if not old_key:
        cure = "set it as the old program had it: it opens the old secrets"
        raise UsageError(f"${OLD_KEY_VARIABLE} is not set", cure)
    path, files = config_path(args), Files()
    opener = Opener(read_draft(path, files).config, files, os.environ)
    keyring = opener.keyring()
    if keyring is None:
        raise ConfigError(opener.problems)
    key = base64.urlsafe_b64encode(
        hashlib.sha256(old_key.encode(errors="surrogateescape")).digest()
    )
    try:
        with contextlib.closing(connect_readonly(old.absolute().as_uri() + "?mode=ro")) as db:
            importer = Importer(db, Fernet(key), keyring)
            config = importer.config()
    except sqlite3.Error as error:
        cure = "name a copy of the database of TeckoChecker 0.9, made while it was stopped"
        raise UsageError(f"cannot import {old}: {error}", cure) from None
    text = (
        f"# Imported from {one_line(str(old))}. Put it in place of config.yaml, then run `check`.\n"
    )
    text += yaml.safe_dump(config, sort_keys=False, allow_unicode=can_show("ěš🌙"), width=1000)
    problems = parse_config(text, Path("<imported>")).problems
    for note in (*importer.notes, *map(str, problems)):
        print(f"teckochecker: {note}", file=sys.stderr)
    print(text, end="")
    return 1 if importer.notes or problems else 0


# --- status ---------------------------------------------------------------------------------------


def read_report(draft: Draft, *, events_of: Container[str] = ()) -> Report:
    """Return what the state file knows of the config's jobs, with the last events of some.

    Where nothing has run yet, it is what the first start would make of the config.
    """
    config = draft.config
    runs = holder_of(config.state_path)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(read_store(config.state_path))
        if store is None:
            db = stack.enter_context(
                contextlib.closing(sqlite3.connect(":memory:", isolation_level=None))
            )
            migrate(db, config.state_path)
            store = Store(db, config.state_path)
            targets = {name: config.target(job) for name, job in config.jobs.items()}
            store.sync(config.jobs, targets, store.works())
        works = store.works("position IS NOT NULL")
        names = [work.name for work in works if work.name in events_of]
        view = config_view(config, store.meta("config") or {})
        on_disk = "\n".join(map(str, draft.problems)) or None
        usages = store.usages()
        return Report(
            at=time.time(),
            runs=runs,
            config=view | {"error": on_disk or view["error"]},
            works=works,
            usages={name: usages[name] for name in config.secrets if name in usages},
            last_events={name: store.logs(after=0, job=name, most=10) for name in names},
        )


def progress_bar(work: Work, width: int = 10) -> str:
    """Return how far a job's batches are: on a terminal as a bar, elsewhere in numbers only."""
    share = sum(map(progress, work.batches)) / len(work.batches)
    numbers = f"{ratio(work):>5} {math.floor(100 * share):>3}%"
    if not sys.stdout.isatty():
        return numbers.strip()
    full, empty = ("█", "░") if can_show("█░") else ("#", ".")
    done = math.floor(width * share)
    return f"{full * done}{empty * (width - done)} {numbers}"


def job_table(works: Sequence[Work], now: float) -> list[str]:
    """Return the jobs as lines of a table, those first that need a person.

    On a terminal, what is wrong with a job has a line of its own: it would stand beyond the edge.
    """
    if not works:
        return ["no jobs"]
    most = terminal_columns()
    rows, colours, below = [("JOB", "STATUS", "PROGRESS", "LAST LOOK", "NEXT")], [""], [""]
    for work in in_need_first(works):
        error, step = one_line(error_of(work) or ""), what_next(work, now)
        name = work.name
        if most is None:
            step = f"{step}; {error}" if error else step
        else:
            name = fitted(name, max(12, most // 4))
            below.append(error and painted(fitted(f"  {error}", most), RED))
        status = job_status(work)
        rows.append((name, status, progress_bar(work), ago(work.last_check_at, now), step))
        is_done = status in {JobStatus.COMPLETED, JobStatus.PAUSED}
        colours.append(RED if needs_person(work) else DIM if is_done else "")
    lines = itertools.zip_longest(table(rows, colours, most), below, fillvalue="")
    return [line for pair in lines for line in pair if line]


def job_details(work: Work, events: Sequence[LogRow], now: float) -> str:
    """Return everything about one job, with every batch and what happened last."""
    trigger = work.trigger
    facts = [
        ("job", work.name),
        ("status", job_status(work)),
        ("error", error_of(work)),
        ("batches", progress_bar(work)),
        ("target", target_text(work.target)),
        ("last look", ago(work.last_check_at, now)),
        ("next", what_next(work, now)),
        ("trigger", f"{trigger.state} {trigger.id}" if trigger else None),
        ("Keboola job", trigger.keboola_job_id if trigger else None),
        ("address", trigger.url if trigger else None),
        ("started", rfc3339(work.completed_at)),
    ]
    lines = [f"{name:<12} {value}" for name, value in facts if value is not None]
    rows = [("BATCH", "STATUS", "REQUESTS", "OUTPUT", "NOTE")]
    for b in work.batches:
        requests = f"{b.completed or 0}/{b.total}" if b.total is not None else ""
        rows.append(
            (b.id, b.status or "not looked at", requests, b.output_file_id or "", b.error or "")
        )
    happened = [event_line(row) for row in events]
    return "\n".join([*lines, "", *table(rows), *([""] if happened else []), *happened])


def status_text(report: Report, job: str | None) -> str:
    """Return a report for people: of all jobs, or of one."""
    lines = []
    if report.config["error"]:
        lines += ["The config file has problems; a running daemon goes on with the previous one:"]
        lines += [painted(line, RED) for line in report.config["error"].splitlines()]
        lines.append("")
    if job is not None:
        events = report.last_events.get(job, ())
        return "\n".join([*lines, job_details(report.works[0], events, report.at)])
    lines.append(f"{who_runs(report)} {jobs_in_words(report.works) or 'No jobs.'}")
    return "\n".join([*lines, "", *job_table(report.works, report.at)])


WATCH_S: Final = 2.0
HOME: Final = "\033[H"
NO_WRAP: Final = "\033[?7l"  # a long line is cut by the terminal, and pushes nothing off it
WRAP: Final = "\033[?7h"
CLEAR_BELOW: Final = "\033[J"


def watch_status(args: argparse.Namespace) -> NoReturn:
    """Draw the status again and again, until Ctrl-C."""
    if args.json or args.check:
        raise UsageError("--watch goes without --json and --check", "leave one of them out")
    if not sys.stdout.isatty():
        raise UsageError("--watch draws on a terminal", "use --json, or `logs --follow`")
    try:
        while True:
            try:
                text = status_text(chosen_report(args), args.job)
            except TeckoError as error:  # a file is replaced, or away for a moment
                text = str(error)
            lines = text.splitlines()[: shutil.get_terminal_size().lines - 1]
            drawn = "".join(f"{line}\033[K\n" for line in lines)
            print(f"{HOME}{NO_WRAP}{drawn}{CLEAR_BELOW}{WRAP}", end="", flush=True)
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        print(WRAP)  # it may have come while one was drawn; and a line's end behind the ^C
        raise


def chosen_report(args: argparse.Namespace) -> Report:
    """Return the report on all jobs, or on the one that was named. Raises UsageError."""
    report = read_report(draft_for_reading(args), events_of=(args.job,))
    if args.job is None:
        return report
    works = [work for work in report.works if work.name == args.job]
    if not works:
        raise no_such_job(args.job)
    return replace(report, works=works)


def run_status(args: argparse.Namespace) -> int:
    """Show what is known of the jobs."""
    if args.watch:
        watch_status(args)
    report = chosen_report(args)
    if args.json:
        print(json.dumps(status_document(report), indent=2))
    else:
        print(status_text(report, args.job))
    is_bad = report.config["error"] is not None or any(map(needs_person, report.works))
    return 1 if args.check and is_bad else 0


# --- logs and schema ------------------------------------------------------------------------------


def log_line(row: LogRow) -> str:
    """Return a row of the log as one line for people."""
    subject = {"job": row.event.job} if row.event.job else {}
    facts = [
        f"{key}={one_line(str(value))}" for key, value in (subject | dict(row.event.fields)).items()
    ]
    return " ".join([rfc3339(row.at) or "", f"{row.event.level:<7}", row.event.name, *facts])


def log_json(row: LogRow) -> str:
    """Return a row of the log as one line of JSON."""
    event = row.event
    facts = {"at": rfc3339(row.at), "level": event.level, "event": event.name, "job": event.job}
    return json.dumps(facts | {"fields": dict(event.fields)})


def run_logs(args: argparse.Namespace) -> int:
    """Print the log that the state file keeps, and with --follow what comes."""
    config = draft_for_reading(args).config
    last, most = 0, args.n
    while True:
        with read_store(config.state_path) as store:
            rows = store.logs(after=last, job=args.job, most=most) if store else []
            if not (rows or last or most == 0 or args.job is None or args.job in config.jobs):
                raise no_such_job(args.job)
        for row in rows:
            print(log_json(row) if args.json else log_line(row), flush=args.follow)
            last = row.id
        if not args.follow:
            return 0
        most = None
        time.sleep(REQUESTS_LOOK_S)


def run_schema(_: argparse.Namespace) -> int:
    """Print the SQL of the state file."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db, Path(":memory:"))
        print(f"PRAGMA user_version = {len(MIGRATIONS)};")
        for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL"):
            print(re.sub(r"\n {8}", "\n", sql.strip()) + ";")
    return 0


# --- retry ----------------------------------------------------------------------------------------


def run_retry(args: argparse.Namespace) -> int:
    """Ask for a job to be tried again, through the state file."""
    draft = draft_for_reading(args)
    path = draft.config.state_path
    if not is_there(path):
        raise UsageError(f"there is no state file {path}", "start the daemon or --once first")
    works = {work.name: work for work in read_report(draft).works}
    if args.job not in works:
        raise no_such_job(args.job)
    now = time.time()
    _, why_not = after_retry(works[args.job], force=args.force, now=now)
    if why_not:
        raise UsageError(f"{args.job}: {why_not}")
    uri = path.absolute().as_uri() + "?mode=rw"
    with contextlib.closing(
        sqlite3.connect(uri, uri=True, timeout=COMMAND_TIMEOUT_S, isolation_level=None)
    ) as db:
        check_version(db, path)
        Store(db, path).ask(works[args.job], force=args.force, now=now)
    acting = holder_of(path) != Holder.NOBODY
    print(
        "asked: the running daemon does it within two seconds"
        if acting
        else "asked: nothing runs now; the next start or --once does it"
    )
    return 0


# ==================================================================================================
# 11. main: the command line, and the one place where exceptions become exit codes
# ==================================================================================================

EXIT_CODES: Final = """\
exit codes: 0 fine; 1 a job has an error or needs a person; 2 usage or config error;
75 another instance holds the state file; 130 interrupted"""


COMMAND_HELP: Final = {
    "init": (
        "write a commented config.yaml and a new key file",
        "Both only for your eyes (mode 0600). What is there already is never overwritten.",
        "init /srv/teckochecker",
    ),
    "check": (
        "validate the config offline",
        """\
It goes the daemon's own way: YAML, every key, the Fernet key, every secret. Each
problem is one line with its place and its cure. No server is asked.""",
        "check --config config.yaml",
    ),
    "encrypt": (
        "encrypt every plain value under secrets, in place",
        """\
Comments and layout stay, and so do the file's mode and owner; the file is replaced as
a whole. With --set, it takes one secret from a prompt, or from standard input, and puts it
in its place. The key comes from $TECKOCHECKER_KEY, $CREDENTIALS_DIRECTORY/teckochecker.key
or key_file (Fernet: AES-128-CBC with HMAC-SHA256); of several, the first encrypts.""",
        "encrypt --rotate",
    ),
    "doctor": (
        "try out everything that has to be right",
        """\
Config, key, permissions, disk, state file, clock, every OpenAI key and watched batch, every
Keboola token, queue and configuration: a line each, ✗ with the cure. Nothing is started,
nothing is changed; it works beside the daemon. Exits 1 if there is any ✗.""",
        "doctor --config /etc/teckochecker/config.yaml",
    ),
    "secrets": (
        "list the secrets and which jobs use each",
        "Names, types and where the values come from; never a value.",
        "secrets",
    ),
    "status": (
        "show the jobs, or one job with its batches",
        """\
It reads the state file, whether the daemon runs or not, and says which. PROGRESS is
batches ended/all, and how much of their requests is done.""",
        "status nightly-embeddings --json",
    ),
    "logs": (
        "show what has happened, of all jobs or of one",
        "It reads the log that the state file keeps, also while the daemon runs.",
        "logs nightly-embeddings -n 20 --follow",
    ),
    "import": (
        "print a config made of a database of TeckoChecker 0.9",
        """\
The old secrets are opened with $SECRET_KEY and closed again with our key. Jobs that were
completed come with done: true, so that nothing starts again. Exits 1 if something is left
out, which is told on standard error.""",
        "import old/teckochecker.db > imported.yaml",
    ),
    "schema": (
        "print the SQL of the state file",
        "For whoever wants to read it with other programs. It needs no config.",
        "schema",
    ),
    "retry": (
        "try a job again now",
        """\
Arms a trigger that Keboola rejected, searches at once for one whose outcome is
unknown, or looks at the batches at once. A running daemon does it within two seconds,
otherwise the next start or --once.""",
        "retry nightly-embeddings --force",
    ),
}


def count_of(text: str) -> int:
    """Return a number of lines. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of lines")
    return int(text)


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser
) -> None:
    """Add each command with its help and its own options."""
    runs = {
        "init": run_init,
        "check": run_check,
        "encrypt": run_encrypt,
        "doctor": run_doctor,
        "secrets": run_secrets,
        "import": run_import,
        "status": run_status,
        "logs": run_logs,
        "schema": run_schema,
        "retry": run_retry,
    }
    parsers = {}
    for name, (text, more, example) in COMMAND_HELP.items():
        parsers[name] = commands.add_parser(
            name,
            parents=[shared],
            help=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"{text[0].upper()}{text[1:]}.\n{more}",
            epilog=f"example: teckochecker {example}\n\n{EXIT_CODES}",
        )
        parsers[name].set_defaults(run=runs[name])
    encrypt = parsers["encrypt"].add_mutually_exclusive_group().add_argument
    encrypt(
        "--rotate",
        action="store_true",
        help="also encrypt again, under the first key, what is encrypted already",
    )
    encrypt("--set", metavar="NAME", help="ask for this secret's value, and put it there")
    parsers["import"].add_argument("old", metavar="OLD.db", help="the old program's database")
    status = parsers["status"].add_argument
    status("job", nargs="?", metavar="JOB", help="show only this job, with every batch")
    status("--json", action="store_true", help="print JSON, for programs")
    status("--watch", action="store_true", help="draw it again every two seconds, until Ctrl-C")
    status("--check", action="store_true", help="exit 1 if anything needs a person")
    init = parsers["init"].add_argument
    init("directory", nargs="?", metavar="DIR", default=".", help="where (default: here)")
    logs = parsers["logs"].add_argument
    logs("job", nargs="?", metavar="JOB", help="only what concerns this job")
    logs("-n", type=count_of, metavar="N", default=100, help="the last N lines (default: 100)")
    logs("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    logs("--json", action="store_true", help="print a JSON object a line")
    retry = parsers["retry"].add_argument
    retry("job", metavar="JOB", help="the job's name")
    retry(
        "--force",
        action="store_true",
        help="start the Keboola job of a finished job once more, or send an unknown trigger again "
        "although the first one may have arrived",
    )


def new_parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="the config file (default: $TECKOCHECKER_CONFIG, then config.yaml)",
    )
    parser = argparse.ArgumentParser(
        prog="teckochecker",
        parents=[shared],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Start a Keboola job, once, when OpenAI has finished a team's batches.\n"
        "Without a command: run as the daemon, in the foreground, until SIGTERM; the config is\n"
        "read again whenever it changes, and on SIGHUP.",
        epilog=f"example: teckochecker --config /etc/teckochecker/config.yaml\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"teckochecker {__version__}")
    parser.add_argument(
        "--once",
        action="store_true",
        help="make one pass over every unfinished job, start what is ready, and exit (for cron)",
    )
    parser.set_defaults(run=run_daemon)
    add_commands(parser.add_subparsers(title="commands", metavar="COMMAND"), shared)
    return parser


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Have all that a command prints arrive before it ends.

    What cannot arrive is dropped: at its end, the interpreter would try once more, and complain.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, io.TextIOWrapper(io.FileIO(nowhere, "w", closefd=False)))
    try:
        yield
        sys.stdout.flush()
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def exit_code(args: argparse.Namespace) -> int:
    """Run a command; what it raises for a person is told, and becomes its exit code."""
    try:
        return int(args.run(args))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except TeckoError as error:
        print(f"teckochecker: {error}", file=sys.stderr)
        return error.exit_code
    except sqlite3.Error as error:
        hint = state_hint(error)
        print(f"teckochecker: cannot use the state file: {error}; {hint}", file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = new_parser()
    args = parser.parse_args(argv)
    if args.once and args.run is not run_daemon:
        parser.error("--once goes without a command")
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no crash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with printing():
            return exit_code(args)
    except BrokenPipeError:  # `| head` has seen enough
        return 0
    except OSError as error:
        if args.run is run_daemon:
            raise
        with contextlib.suppress(OSError):
            what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            print(f"teckochecker: cannot go on: {what}; see to that first", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
