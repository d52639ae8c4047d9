#!/usr/bin/env python3
"""TeckoChecker: when OpenAI has finished a team's batches, their Keboola job runs, once, by itself.

One asyncio process reads jobs and encrypted secrets from a YAML file that people edit, polls the
OpenAI batches of each job until all are finished, starts the job's Keboola configuration once,
follows the Keboola job to its end, and keeps what it did in a SQLite file. It opens no port.

    config.yaml --> Config, secrets                                            (2, 3)
                        |
    OpenAI --batches--> Engine: decide (4), commit (5), act (6, 7) <--> state file (SQLite)
                        |                                                    |
                        +--> Keboola: search, start, follow                 +--> status, logs, page,
                                                                                  webhooks (8, 9)
Run it: `teckochecker.py --config config.yaml` is the daemon, in the foreground; with `--once` it
makes one pass, for cron; `teckochecker.py status` shows what it knows; --help has the others.

Sections: 1 Errors and model - 2 Config - 3 Secrets - 4 Decisions - 5 Store and lock - 6 Http and
Keboola - 7 Engine - 8 Showing - 9 Commands - 10 Command line. Each uses only what stands above it.
Start with `Run` (1), the picture at the top of 4, and `drive_run` (7).

Exit codes: 0 fine; 1 something needs attention, or the command could not do it; 2 usage or config
error; 75 another instance holds the state file; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
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
import queue
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
import textwrap
import threading
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, Final, NoReturn

import httpx
import structlog
import tenacity
import yaml
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

__version__ = "1.2.0"

MINUTE_S: Final = 60
HOUR_S: Final = 3600
DAY_S: Final = 86400

# ==================================================================================================
# 1. Errors and model: what a person is told, and the nouns. No I/O here
# ==================================================================================================


def one_line(text: str, limit: int = 500) -> str:
    """Return one printable line of valid Unicode, at most `limit` characters long."""
    text = text[: 4 * limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def quoted(text: str) -> str:
    return f'"{one_line(text, 60)}"'


def counted(n: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def compact_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def rfc3339(unix_s: float | None) -> str | None:
    if unix_s is None or not math.isfinite(unix_s):
        return None
    within = min(max(unix_s, 0.0), 253402300799.0)  # the last second that has a date
    return datetime.fromtimestamp(int(within), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def show_duration(seconds: float) -> str:
    """Return seconds as the config writes them, the two largest units: `1h30m`."""
    rest = max(0, round(seconds))
    parts = []
    for unit, size in (("d", DAY_S), ("h", HOUR_S), ("m", MINUTE_S), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


class TeckoError(Exception):
    """Something a user, a server or a disk did; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)


class UsageError(TeckoError):
    """A command line or a config that cannot be meant; nothing was done."""

    exit_code = 2


class ConfigError(UsageError):
    """Everything that is wrong with a config, one `Problem` a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.line, p.column))
        super().__init__("\n".join(map(str, self.problems)))


class LockedError(TeckoError):
    """Another process acts on the state file; without a message, it is the pass before this one."""

    exit_code = 75


class StateError(TeckoError):
    """The state file cannot be used as it is: damaged, of another version, replaced, unreadable."""


class StorageError(TeckoError):
    """One transaction did not get through (full disk, locked file); nothing of it is stored."""


@dataclass(eq=False)
class ApiError(TeckoError):
    """A request that did not bring what was asked for."""

    message: str
    status: int | None = None  # of HTTP, where there was an answer
    retryable: bool = False  # the same request may do better in a moment
    retry_after_s: float | None = None  # how long the server wants it to wait
    sent: bool = True  # False only where it is certain that the server saw nothing of it
    request_id: str = ""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: where (line and column count from 1), what, and the cure."""

    file: str
    line: int
    column: int
    path: str
    what: str
    cure: str

    def __str__(self) -> str:
        what = f"{self.path}: {self.what}" if self.path else self.what
        text = one_line(f"{what}; {self.cure}", 1000)
        return f"{self.file}:{self.line}:{self.column}: {text}"


class Secret:
    """A token that cannot be printed, copied or stored by accident; `reveal` tells its value."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def digest(self) -> str:
        return hashlib.sha256(self._value.encode("utf-8", "replace")).hexdigest()

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not for storing")


# How far a batch has come (OpenAI's API reference, the batch object). 3: it is finished.
STATUS_RANK: Final = {
    "validating": 0,
    "in_progress": 1,
    **dict.fromkeys(("finalizing", "cancelling"), 2),
    **dict.fromkeys(("completed", "failed", "expired", "cancelled"), 3),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """An OpenAI batch as last known. Times are Unix seconds; those but the last are OpenAI's."""

    id: str
    status: str | None = None  # None: not polled yet. An unknown one is kept as it came
    total: int | None = None
    completed: int | None = None
    failed: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: float | None = None
    expires_at: float | None = None
    ended_at: float | None = None
    error: str | None = None  # the first message of its `errors`
    files_due_at: float | None = None  # finished, but counts requests whose file may yet come

    @property
    def is_terminal(self) -> bool:
        return STATUS_RANK.get(self.status or "") == 3

    @property
    def is_final(self) -> bool:
        return self.files_due_at is None and self.is_terminal

    @property
    def has_failed(self) -> bool:
        return self.is_terminal and self.status != "completed"


@dataclass(frozen=True, slots=True)
class SecretEntry:
    """An entry under `secrets`: its type, where its value comes from, and where it is used."""

    name: str
    type: str
    source: str  # value (a Fernet token), env or file
    text: Secret = field(compare=False)  # what stands there: people first write tokens in plain
    line: int = field(compare=False)
    column: int = field(compare=False)
    base_url: str = "https://api.openai.com/v1"
    organization: str | None = None
    project: str | None = None
    auth_header: str = "Authorization"
    api_version: str | None = None
    stack_url: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """The Keboola configuration that a run starts. `project` is "" until Keboola has named it."""

    stack_url: str
    component_id: str
    config_id: str
    branch_id: str = ""
    project: str = ""

    def __str__(self) -> str:
        branch = f", branch {self.branch_id}" if self.branch_id else ""
        return f"{self.component_id} {self.config_id}{branch} on {self.stack_url}"


@dataclass(frozen=True, slots=True)
class Job:
    """An entry under `jobs`, with `defaults` filled in. Durations are seconds."""

    name: str
    openai_secret: str
    keboola_secret: str
    component_id: str
    config_id: str
    batch_ids: tuple[str, ...] = ()
    match: tuple[tuple[str, str], ...] = ()
    since: float = 0.0  # Unix seconds
    group_by: str | None = None
    group_size: str | None = None  # a number as text, or metadata.KEY
    settle: int = 15 * MINUTE_S
    branch_id: str | None = None
    config_row_ids: tuple[str, ...] = ()
    mode: str = "run"
    variables: tuple[tuple[str, str], ...] = ()
    poll_interval: int = 30
    trigger_on: str = "all_terminal"
    deadline: int | None = None
    on_deadline: str = "alert"
    follow: bool = True
    retry_on_error: int = 0
    paused: bool = False
    done: bool = False  # something else has started it: nothing is to be done

    @property
    def rests(self) -> bool:
        """Whether neither its batches are polled nor its Keboola job is started."""
        return self.paused or self.done

    @property
    def match_key(self) -> str:
        """What tells one way of finding batches from another; "" for batch_ids."""
        return compact_json([sorted(self.match), self.group_by]) if self.match else ""


@dataclass(frozen=True, slots=True)
class Config:
    """A config file, read and checked, its secrets not opened. Durations are seconds."""

    path: Path
    sha256: str
    state_path: Path
    key_path: Path
    key_line: int = 1
    key_column: int = 1
    publish_path: Path | None = None
    log_level: str = "info"
    log_format: str = "auto"
    retention: int = 30 * DAY_S
    max_concurrency: int = 10
    request_timeout: int = 30
    trigger_grace: int = 60
    follow_interval: int = 30
    secrets: Mapping[str, SecretEntry] = field(default_factory=dict)
    notify: tuple[tuple[str, tuple[str, ...]], ...] = ()  # a webhook's secret, and its events
    jobs: Mapping[str, Job] = field(default_factory=dict)

    def target(self, job: Job) -> Target:
        stack_url = self.secrets[job.keboola_secret].stack_url
        return Target(stack_url, job.component_id, job.config_id, job.branch_id or "")

    def of_type(self, kind: str) -> list[str]:
        return [name for name, secret in self.secrets.items() if secret.type == kind]


class Phase(enum.StrEnum):
    """How far a run has come; see the picture at the top of section 4."""

    POLLING = "polling"  # not all batches are finished, or the group is not whole
    REFUSED = "refused"  # all are, but the job's policy says no
    INTENT = "intent"  # to be started; a search for an earlier start comes first
    SENDING = "sending"  # the POST may be on its way
    UNKNOWN = "unknown"  # the POST's outcome is not known: only a search can tell
    REJECTED = "rejected"  # Keboola said no
    SENT = "sent"  # the Keboola job exists and is followed
    FINISHED = "finished"  # the Keboola job is finished (follow: false: was started)


@dataclass(frozen=True, slots=True)
class BootTime:
    """A time that can be measured from after a restart, whatever the clock was set to meanwhile."""

    wall: float  # Unix seconds
    boot: str = ""  # which boot of the machine; empty where the system does not say
    uptime_s: float = 0.0  # since that boot

    def until_s(self, now: BootTime) -> float:
        """Return how many seconds have certainly passed: over a reboot, `now`'s uptime at most."""
        if self.boot and self.boot == now.boot:
            return max(0.0, now.uptime_s - self.uptime_s)
        by_clock_s = max(0.0, now.wall - self.wall)
        return min(by_clock_s, now.uptime_s) if now.boot else by_clock_s


@dataclass(frozen=True, slots=True)
class Run:
    """One set of batches of a job that leads to one Keboola job: one row, its trigger inside.

    Times are Unix seconds. From the first POST on, `target` and `payload` are those that were sent,
    whatever the config says; before, they follow it.
    """

    id: int
    job: str
    target: Target
    group: str = ""  # "" for a job with batch_ids
    batches: tuple[Batch, ...] = ()
    phase: Phase = Phase.POLLING
    rerun: int = 0
    trigger_id: str = ""
    payload: str = ""
    input_digest: str = ""  # of what Keboola judged: another one arms a rejected run again
    next_at: float = 0.0  # when its next poll, search or follow is due; inf: not by itself
    failures: int = 0  # in a row, of whatever is due
    error: str | None = None
    error_since: float | None = None
    attention: str = ""  # the event that told what needs a person, until it is over
    forced: bool = False  # a person said `retry --force`
    posts: int = 0
    post_error: str | None = None  # what became of the last POST
    repeat_after_s: float = 0.0  # how long an unknown outcome waits before the POST is repeated
    unknown_since: BootTime | None = None
    empty_searches: int = 0
    retries: int = 0  # after a Keboola job that ended in error
    sending_at: float | None = None  # the first POST of this rerun
    sent_at: float | None = None
    keboola_job_id: str | None = None
    keboola_status: str | None = None
    keboola_error: str | None = None
    url: str | None = None
    size: str = ""  # what the batches' metadata says of the group's size
    joined_at: float | None = None  # when the last batch was first seen
    intended_at: float | None = None  # when it was to be started
    deadline_told: bool = False
    last_check_at: float | None = None
    finished_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self.job}/{self.group}" if self.group else self.job

    @property
    def is_begun(self) -> bool:  # its end is not known
        return self.phase not in {Phase.POLLING, Phase.REFUSED, Phase.FINISHED}

    @property
    def may_be_at_keboola(self) -> bool:
        """Whether it goes on to its end also without its job: Keboola may have it."""
        is_open = self.sending_at is not None and self.phase is not Phase.FINISHED
        return is_open or self.phase is Phase.SENT

    @property
    def has_failed(self) -> bool:
        refused = self.phase in {Phase.REFUSED, Phase.REJECTED}
        return refused or (self.phase is Phase.FINISHED and self.error is not None)


@dataclass(frozen=True, slots=True)
class KeboolaJob:
    """A Keboola job as the queue shows it; `trigger_id` is None where the row does not tell."""

    id: str
    status: str | None
    is_finished: bool
    project: str
    message: str | None  # of its result
    created_time: datetime | None
    trigger_id: str | None


# Every event: its name, its level, the groups by which webhooks may name it, and its sentence.
EVENTS: Final[Mapping[str, tuple[str, str, str]]] = {
    name: (level, groups, sentence)
    for name, level, groups, sentence in (
        line.split(maxsplit=3)
        for line in """
daemon_started            info    -         version {version} runs as pid {pid}: {what_text}
daemon_stopped            info    -         teckochecker stopped
config_loaded             info    -         config loaded: {changes_text}
config_warning            warning -         {warning}
config_rejected           error   attention the config is bad, the previous one counts: {problem}
config_rejected_recovered info    attention the config file is good again
account_failing           error   attention {error}
account_failing_recovered info    attention the secret {secret} works again, or is no longer used
list_not_usable           warning -         the list of {secret} is not used for a while: {error}
list_usable               info    -         the list of batches of {secret} is used again
find_failed               warning -         new batches of {secret} cannot be found: {error}
find_recovered            info    -         new batches of {secret} are found again
run_found                 info    -         {batch_id} begins a new run
batch_joined              info    -         {batch_id} joins, {count} batches now
late_batch                warning -         {batch_id} came after the start, and starts nothing
batch_without_group       warning -         {batch_id} has no {group_by} in its metadata
batch_status_changed      info    -         {batch_id} {status}{counts_text}
batch_status_unknown      warning -         {batch_id} has the unknown status {status}
poll_failed               warning -         {error}
poll_recovered            info    -         polls succeed again
poll_failing              warning attention polls have failed for over ten minutes: {error}
poll_failing_recovered    info    attention its polls need no attention any more
group_size_unclear        warning attention {error}
group_size_unclear_recovered info attention the size of the group needs no attention any more
deadline_passed           warning attention the deadline has passed: {pending} of {count} unfinished
deadline_passed_recovered info    attention its deadline needs no attention any more
trigger_intended          info    -         will start {target}
trigger_search_failed     warning -         {error}
trigger_sending           info    -         starting {target}{again_text}
trigger_not_sent          warning -         {error}
trigger_unknown           warning -         {error}; Keboola is searched before a repeat
trigger_rejected          error   -         Keboola rejected the start: {error}
trigger_sent              info    -         started Keboola job {keboola_job_id} {url}
trigger_found             info    -         found its Keboola job {keboola_job_id} {url}
trigger_left_open         warning -         the process ends before Keboola's answer is stored
trigger_overdue           error   attention its Keboola job should have started by now: {error}
trigger_overdue_recovered info    attention its start needs no attention any more
keboola_job_unreadable    warning -         Keboola job {id} is unreadable, so not ours: {error}
keboola_job_status        info    -         Keboola job {keboola_job_id} is {status}
keboola_job_retried       warning -         {error}; it is started again in {wait}
follow_failed             warning -         cannot follow Keboola job {keboola_job_id}: {error}
follow_failing            warning attention its Keboola job cannot be followed: {error}
follow_failing_recovered  info    attention following its Keboola job needs no attention any more
completed                 info    finished  Keboola job {keboola_job_id} {ended}, {counts} {url}
completed_with_failures   warning finished  Keboola job {keboola_job_id} {ended}, {counts} {url}
job_failed                error   attention,finished failed: {error} {url}
job_failed_recovered      info    attention it is not failed any more
retry_taken               info    -         a person asked for a retry{how}
retry_refused             warning -         a person asked for a retry, but {why}
jobs_need_attention       warning -         these need attention: {runs}
state_is_older            warning -         no start for {wait_s} s: the state file lacks a POST
state_write_failed        error   attention {error}
state_write_failed_recovered info attention the state file can be written again
clock_changed             warning -         the clock was set by {seconds} s; all waits follow
watch_failed              warning -         the config's directory cannot be watched: {error}
notify_failed             warning -         cannot send to the webhook {secret} yet: {error}
notify_dropped            warning -         an event is not sent to the webhook {secret}: {why}
publish_failed            warning -         cannot publish to {directory}: {error}
publish_recovered         info    -         files are published again
library_warning           warning -         {logger}: {message}
internal_error            error   -         a bug in {where}: {error}
""".strip().splitlines()
    )
}


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log: a stable name, a level, whom it is about, fields and a sentence."""

    name: str
    level: str
    job: str | None
    run: str | None
    fields: Mapping[str, Any]
    text: str
    at: float = 0.0  # Unix seconds, once it is stored
    id: int = 0

    @classmethod
    def of(cls, name: str, run: Run | None = None, level: str = "", /, **fields_: object) -> Event:
        """Return an event with its sentence; a field named `..._text` is for that alone."""
        usual, _, sentence = EVENTS[name]
        words = collections.defaultdict(str, {k: v for k, v in fields_.items() if v is not None})
        job, about = (run.job, run.name) if run else (None, None)
        text = sentence.format_map(words)
        text = one_line(f"{about}: {text}" if about else text, 2000)
        told = {key: value for key, value in fields_.items() if not key.endswith("_text")}
        return cls(name, level or usual, job, about, told, text)

    def document(self) -> dict[str, Any]:
        head = {"time": rfc3339(self.at), "level": self.level, "event": self.name}
        about = {"job": self.job, "run": self.run} if self.job else {}
        return {**head, "text": self.text, **about, **self.fields}


Change = tuple[Run, list[Event]]

# ==================================================================================================
# 2. Config: text in, Config out; every problem with its place and its cure
# ==================================================================================================

MAX_FILE_BYTES: Final = 16 * 1024 * 1024

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is five times faster
_TAG: Final = "tag:yaml.org,2002:"


@dataclass(slots=True)
class YamlNode:
    """A node of the YAML tree, what all nodes of a file share, and the readers of its values.

    What a reader returns where it notes a problem does not count.
    """

    node: yaml.Node
    key: yaml.Node  # the node itself, where it has none
    path: str
    file: str
    problems: list[Problem]
    secrets: dict[str, SecretEntry | None] = field(default_factory=dict)  # None: with a problem

    @property
    def kind(self) -> str:
        """What YAML takes it for: str, int, float, bool, null, timestamp, seq or map."""
        return str(self.node.tag).removeprefix(_TAG)

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

    def entries(self, cure: str = "write keys and values") -> dict[str, YamlNode]:
        found: dict[str, YamlNode] = {}
        for key, value in self.node.value if self._is(yaml.MappingNode, "a mapping", cure) else ():
            if not isinstance(key, yaml.ScalarNode):
                self.bad("a key is not a single value", cure, key)
            elif key.value in found:
                line = found[key.value].key.start_mark.line + 1
                what = f"the key {self.shown(key.value)} stands here and in line {line}"
                self.bad(what, "keep one of them", key)
            else:
                path = f"{self.path}.{key.value}" if self.path else key.value
                found[key.value] = replace(self, node=value, key=key, path=path)
        return found

    def named(self) -> dict[str, YamlNode]:
        return self.entries("write names, each with its own keys below it")

    def read(self, nodes: Mapping[str, YamlNode], readers: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the readers make of a mapping's values: None of null, else its Problem."""
        for name in nodes.keys() - readers.keys():
            what = f"the key {self.shown(name)} is not known"
            self.bad(what, f"allowed here: {', '.join(readers)}", nodes[name].key)
        values: dict[str, Any] = {}
        for name in [name for name in readers if name in nodes]:
            noted_before, node, reader = len(self.problems), nodes[name], readers[name]
            if node.kind == "null":
                values[name] = None
            elif isinstance(reader, Mapping):
                values[name] = node.read(node.entries(), reader)
            else:
                values[name] = reader(node)
            if len(self.problems) > noted_before and not isinstance(values[name], dict):
                values[name] = self.problems[-1]
        return values

    def shown(self, text: str) -> str:
        """Return what is written, for a message; what is long, or among secrets, may be a token.

        Nothing is cut: the redactor, which comes later, would not know the rest.
        """
        plain = "[a-z_]{1,30}" if self.path.startswith("secrets.") else "(?s).{,60}"
        return quoted(text) if re.fullmatch(plain, text) else '"***"'

    def text(self, cure: str) -> str | None:
        """Return a scalar's text just as written (`0123` stays so), or None."""
        if self.kind == "null":
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
        cure, placeholder = "copy the batch id: letters, digits, . _ = and -", "batch_YOUR_ID"
        return self.matching(f"(?!{placeholder})[A-Za-z0-9._=-]{{1,1000}}", "a batch id", cure)

    def file_path(self) -> str | None:
        return self.matching(r"[^\0]+", "a path", "write a path")

    def header_value(self) -> str | None:
        cure = "write printable ASCII without spaces"
        return self.matching("[!-~]{1,255}", "a header's value", cure)

    def choice(self, *choices: str) -> str | None:
        words = f"{', '.join(choices[:-1])} or {choices[-1]}"
        kind = f"a value of {self.path.rpartition('.')[2]}"
        return self.matching("|".join(choices), kind, f"write {words}")

    def boolean(self) -> bool:
        text = self.matching("(?i)true|yes|on|false|no|off", "true or false", "write true or false")
        return str(text).lower() in {"true", "yes", "on"}

    def count(self, least: int, most: int) -> int:
        numbers = "|".join(map(str, range(least, most + 1)))
        kind = f"a number from {least} to {most}"
        return int(self.matching(numbers, kind, "write a whole number") or 0)

    def duration(self, least_s: int, most_s: int) -> int | None:
        cure = "write 30s, 2m or 1h"
        if (text := self.text(cure)) is None:
            return None
        units = "".join(f"(?:([0-9]{{1,12}}){unit})?" for unit in "dhms")
        match = re.fullmatch(units, f"{text}s" if text.isdigit() else text)
        if not text or not match:
            return self.bad(f"{self.shown(text)} is not a duration", cure)
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        seconds += days * DAY_S + hours * HOUR_S + minutes * MINUTE_S
        if least_s <= seconds <= most_s:
            return seconds
        cure = f"write {show_duration(least_s)} to {show_duration(most_s)}"
        return self.bad(f"{self.shown(text)} is out of range", cure)

    def wait(self, least_s: int, most_s: int) -> int | None:
        """Return a duration; shorter ones are for tests, with every stack on a loopback address."""
        urls = (s.stack_url for s in self.secrets.values() if s and s.stack_url)
        is_test = all(map(is_loopback, urls))
        return self.duration(0 if is_test else least_s, most_s)

    def since(self) -> float | None:
        """Read a date (UTC) or an RFC 3339 time as Unix seconds."""
        cure = "write a date, 2026-11-25, or a time, 2026-11-25T06:00:00Z"
        text = self.text(cure)
        if re.match(r"\d{4}-\d\d-\d\d(?![^Tt ])", text or ""):  # fromisoformat takes more
            with contextlib.suppress(ValueError, OverflowError):
                at = datetime.fromisoformat(str(text).upper())
                return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
        return None if text is None else self.bad(f"{self.shown(text)} is not a date", cure)

    def url(self) -> str | None:
        """Read the address of a Keboola stack, or of a server up to what precedes `/batches`."""
        cure = "write https://host (http only on a loopback address)"
        url = self.text(cure)
        if url is None:
            return None
        if problem := url_problem(url):
            return self.bad(problem, cure)  # not echoed: it may hold a password
        parts = urllib.parse.urlsplit(url.rstrip("/"))
        host, url = parts.hostname or "", parts.geturl()
        is_openai = f".{host}".endswith(".openai.com")
        if self.path.endswith("stack_url") and host.startswith("connection.") and parts.path:
            return self.bad("has a path", f"write {parts.scheme}://{parts.netloc}")  # of a page
        if parts.path.endswith("/batches"):
            stem = url.removesuffix("/batches")
            v1 = "/v1" if is_openai and parts.path == "/batches" else ""
            return self.bad("ends with /batches", f"write {stem}{v1}")
        if is_openai and not parts.path:
            return self.bad("misses /v1", f"write {url}/v1")
        return url

    def list_of(
        self, what: str, read: Callable[[YamlNode], str | None], least: int, most: int
    ) -> tuple[str | None, ...] | None:
        cure = f"write a list of {least} to {most} {what}"
        items, values = self.items(cure), []
        if isinstance(self.node, yaml.SequenceNode) and not least <= len(items) <= most:
            return self.bad(f"has {len(items)} {what}", cure)
        for item in items:
            value = read(item)
            if value is not None and value in values:
                item.bad(f"{item.shown(value)} stands here twice", "keep one of them")
            values.append(value)
        return tuple(values)

    def match(self) -> tuple[tuple[str, str | None], ...] | None:
        """Read the pairs that a batch's metadata must have; OpenAI knows only text there."""
        cure = "write KEY: VALUE, as the batch's metadata has it"
        entries = self.entries(cure)
        for item in entries.values():
            if item.node.tag in {_TAG + kind for kind in ("int", "float", "bool", "timestamp")}:
                item.bad(f"{item.shown(item.node.value)} is not text", "put it in quotes")
        if self.is_mapping and not entries:
            return self.bad("is empty, and every batch would match", cure)
        return tuple((name, item.text(cure)) for name, item in entries.items())

    def variables(self) -> tuple[tuple[str, str | None], ...]:
        """Read a job's own Keboola variables: text as written, lists and mappings as JSON."""
        ours = (  # what a Keboola job gets from us (`keboola_variables` in 4)
            "batch_(statuses|errors|request_counts|(output|error)_file_ids|count_total"
            "|(ids|count)_(completed|failed)|ids_pending)|teckochecker_(job|group|trigger_id)"
        )
        values: dict[str, str | None] = {}
        for name, item in self.entries("write names and values").items():
            if re.fullmatch(ours, name):
                item.bad("the name is taken by teckochecker", "choose another name", item.key)
            elif not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,254}", name):
                cure = "use letters, digits, _ and - (Keboola reads a dot as a path)"
                item.bad(f"{self.shown(name)} is not a variable's name", cure, item.key)
            if isinstance(item.node, yaml.ScalarNode):
                cure = "write a value: Keboola takes no empty ones"
                values[name] = item.matching("(?s).+", "a value", cure)
            else:
                values[name] = compact_json(item.plain_value())
        return tuple(values.items())

    def plain_value(self) -> object:
        """Return a node as a JSON value; what is no JSON number stays the text that was written."""
        cure = "write what JSON knows: text, numbers, lists, and mappings with plain keys"
        if isinstance(self.node, yaml.SequenceNode):
            return [item.plain_value() for item in self.items(cure)]
        if self.is_mapping:
            return {key: item.plain_value() for key, item in self.entries(cure).items()}
        if self.kind == "bool":
            return self.boolean()
        text = None if self.kind == "null" else self.text(cure)
        is_number = re.fullmatch(r"-?(0|[1-9]\d{0,15})(\.\d+)?", text or "")
        return json.loads(text or "") if is_number and self.kind != "str" else text

    def secret_name(self, kind: str) -> str | None:
        names = [name for name, secret in self.secrets.items() if secret and secret.type == kind]
        cure = f"write {' or '.join(names)}" if names else "add one under secrets:"
        name = self.text(cure)
        if name is None or name in names or self.secrets.get(name, "") is None:
            return name
        # Not echoed: it may be a token that stands in the wrong place.
        return self.bad(f"is not the name of a secret of type {kind}", cure)

    def secret(self) -> SecretEntry | None:
        """Read one entry of `secrets`. What stands there is never echoed."""
        noted_before, name, sources = len(self.problems), self.key.value, ("value", "env", "file")
        entries = self.entries("write type: and what belongs to it, each on its own line")
        if not self.is_mapping:
            return None
        kind = str(entries["type"].node.value) if "type" in entries else ""
        cure = "write one of value (a Fernet token), env (a variable's name) or file (a path)"
        readers: dict[str, Any] = {
            "type": lambda at: at.choice(*SECRET_KEYS),
            **dict.fromkeys(sources, lambda at: at.matching(r"[^\0]+", "text", cure)),
            **SECRET_KEYS.get(kind, dict.fromkeys(entries.keys() - {"type", *sources}, str)),
        }
        values = self.read(entries, readers)
        if values.get("type") is None:
            self.bad("type is missing", "add type: openai, keboola or webhook", self.key)
        if kind == "keboola" and values.get("stack_url") is None:
            example = "add stack_url: https://connection.keboola.com"
            self.bad("stack_url is missing", example, self.key)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            self.bad(f'"{name}" is not a secret\'s name', "use letters, digits, ._-", self.key)
        found = [source for source in sources if values.get(source) is not None]
        if len(found) != 1:
            self.bad(f"has {' and '.join(found) or 'no value'}", cure)
        if len(self.problems) > noted_before:
            return None
        text, mark = Secret(values[found[0]]), entries[found[0]].node.start_mark
        rest = given({key: values.get(key) for key in SECRET_KEYS[kind]})
        return SecretEntry(name, kind, found[0], text, mark.line + 1, mark.column + 1, **rest)

    def notify_rules(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Read which webhook is told of which events; without `events`, of what needs attention."""
        events = "|".join(("attention", "finished", *EVENTS))
        cure = "write attention, finished, or a name that `teckochecker logs --help` lists"
        event = functools.partial(YamlNode.matching, pattern=events, kind="an event", cure=cure)
        readers = {
            "secret": lambda at: at.secret_name("webhook"),
            "events": lambda at: at.list_of("events", event, 1, 100),
        }
        rules = []
        for item in self.items("write - {secret: NAME, events: [attention]}"):
            values = item.read(item.entries("write secret: NAME, events: [attention]"), readers)
            if item.is_mapping and values.get("secret") is None:
                item.bad("secret is missing", "name a secret of type webhook")
            rules.append((values.get("secret", ""), values.get("events") or ("attention",)))
        return tuple(rules)

    def job_keys(
        self, entries: Mapping[str, YamlNode], defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Read a job's keys, or `defaults` themselves; notes which do not go together.

        What only `defaults` has, and does not go with the job's own, is left out.
        """
        values = {**(defaults or {}), **self.read(entries, JOB_KEYS)}
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
            is_allowed = other not in has if how == "beside" else other in has or defaults is None
            if key in has and not is_allowed and key in entries:
                cure = "keep one of them" if how == "beside" else f"add {other}:, or remove {key}:"
                entries[key].bad(f"{key} {how} {other}", cure, entries[key].key)
            elif key in has and not is_allowed:
                values[key] = None
                has.remove(key)
        return values

    def job(self, defaults: Mapping[str, Any]) -> Job | None:
        """Read one job; its own values win over `defaults`."""
        noted_before, name = len(self.problems), self.key.value
        entries = self.entries("write batch_ids, config_id and so on, each on its own line")
        if not self.is_mapping:
            return None
        values = self.job_keys(entries, defaults)
        if not re.fullmatch("[^/]{1,200}", name) or name != name.strip() or not name.isprintable():
            cure = "use 1 to 200 printable characters, and no /"
            self.bad(f"{self.shown(name)} is not a job's name", cure, self.key)
        for key in ("openai_secret", "keboola_secret", "component_id", "config_id"):
            if values.get(key) is None:
                self.bad(f"{key} is missing", f"add {key}: here or under defaults", self.key)
        if values.get("batch_ids") is None and values.get("match") is None:
            self.bad("batch_ids is missing", "add batch_ids: here, or match: and since:", self.key)
        is_bad = any(isinstance(value, Problem) for value in values.values())
        if is_bad or len(self.problems) > noted_before:
            return None
        job = Job(name, **given(values))
        openai, keboola = self.secrets[job.openai_secret], self.secrets[job.keboola_secret]
        if openai and urllib.parse.urlsplit(openai.base_url).hostname == "api.openai.com":
            own_ids = entries.get("batch_ids") if job.batch_ids else None
            for item in own_ids.items("") if own_ids else ():
                if not item.node.value.strip().startswith("batch_"):
                    what = f"{item.shown(item.node.value)} is not a batch id of api.openai.com"
                    item.bad(what, "write batch_ and what follows it")
        return job if openai and keboola else None


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are there and good; the model has a default for the others."""
    return {k: v for k, v in values.items() if v is not None and not isinstance(v, Problem)}


def is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def url_problem(url: str) -> str | None:
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


# What a key's value is read with: a function of its node, or the readers of the keys below.
JOB_KEYS: Final[Mapping[str, Callable[[YamlNode], Any]]] = {
    "batch_ids": lambda node: node.list_of("batch ids", YamlNode.batch_id, 1, 10),
    "match": YamlNode.match,
    "since": YamlNode.since,
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
    "config_row_ids": lambda node: node.list_of("row ids", YamlNode.keboola_id, 0, 1000),
    "mode": lambda node: node.choice("run", "forceRun", "debug"),
    "variables": YamlNode.variables,
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
SECRET_KEYS: Final[Mapping[str, Mapping[str, Callable[[YamlNode], Any]]]] = {
    "openai": {
        "base_url": YamlNode.url,
        "organization": YamlNode.header_value,
        "project": YamlNode.header_value,
        "auth_header": lambda node: node.choice("Authorization", "api-key"),
        "api_version": YamlNode.header_value,
    },
    "keboola": {"stack_url": YamlNode.url},
    "webhook": {},
}

# Where a part names what is in another one, that one stands above it.
TOP_KEYS: Final[Mapping[str, Any]] = {
    "state": YamlNode.file_path,
    "key_file": YamlNode.file_path,
    "publish": YamlNode.file_path,
    "log": {
        "level": lambda node: node.choice("debug", "info", "warning", "error"),
        "format": lambda node: node.choice("auto", "console", "json"),
        "retention": lambda node: node.duration(HOUR_S, 3650 * DAY_S),
    },
    "secrets": lambda node: node.secrets.update(
        (name, at.secret()) for name, at in node.named().items()
    ),
    "limits": {
        "max_concurrency": lambda node: node.count(1, 100),
        "request_timeout": lambda node: node.duration(1, 60),
        "trigger_grace": lambda node: node.wait(30, DAY_S),
        "follow_interval": lambda node: node.wait(5, HOUR_S),
    },
    "notify": YamlNode.notify_rules,
    "defaults": lambda node: node.job_keys(node.entries()),
    "jobs": YamlNode.named,
}


def refuse_harm(text: str) -> None:
    """Raise YAMLError, its note the cure, for what costs the process its stack or its memory."""
    known_tag = _TAG + "(str|int|float|bool|null|timestamp|seq|map)"
    opened: list[tuple[str | None, int]] = []  # anchors, and the number of nodes before
    sizes: dict[str | None, int] = {}
    nodes = 0
    event: Any

    def refuse(what: str, cure: str) -> NoReturn:
        raise yaml.MarkedYAMLError(None, None, what, event.start_mark, cure)

    for event in yaml.parse(text, Loader=_LOADER):
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before_it = opened.pop()
            sizes[anchor] = nodes - before_it
        elif isinstance(event, yaml.AliasEvent):
            nodes += sizes.get(event.anchor, 1)
            if any(anchor for anchor, _ in opened):  # this is what a bomb is made of
                cure = "write out what it stands for"
                refuse("an alias stands inside what an anchor names", cure)
        if not re.fullmatch(known_tag, getattr(event, "tag", None) or f"{_TAG}str"):
            refuse("this tag means nothing here", "remove it")
        if len(opened) > 64:  # libyaml's composer takes the process down at some 30,000
            refuse("nests deeper than 64", "flatten it")
        if nodes > 1_000_000:  # 10,000 jobs have some 400,000
            refuse("there are too many values from here on", "split it up")


def compose(text: str, path: Path, problems: list[Problem]) -> YamlNode | None:
    """Return the root of the YAML tree, or None and a problem."""
    text = text.removeprefix("\ufeff")  # libyaml would not count it in its marks
    line = column = 0
    try:
        refuse_harm(text)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context == "while scanning a simple key":  # it begins before what is missed
            mark = error.context_mark
        if mark:
            line, column = mark.line, mark.column
        what, cure = str(error.problem), error.note or ""
        if not cure:
            what = f"is not YAML: {error.context or ''} {what}"
            cure = "mend the YAML here or just above: indentation (no tabs), quotes, brackets"
    except yaml.reader.ReaderError as error:  # its position counts bytes
        before = text.encode()[: error.position].decode(errors="replace").split("\n")
        line, column = len(before) - 1, len(before[-1])
        what = f"has the control character {error.character:#04x}"
        cure = "a config is plain text: remove it"
    else:
        if isinstance(node, yaml.MappingNode):
            return YamlNode(node, node, "", str(path), problems)
        what = "is not a mapping of keys" if node else "is empty"
        cure = "write secrets:, jobs: and so on; `teckochecker init` makes a first one"
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
    entries = root.entries()
    top = given(root.read(entries, TOP_KEYS))
    if "jobs" not in entries:
        root.bad("jobs is missing", "list them under jobs:, or write jobs: {} for none")
    jobs = {name: at.job(top.get("defaults", {})) for name, at in top.get("jobs", {}).items()}
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


# ==================================================================================================
# 3. Secrets: keys, opening, and keeping values out of sight
# ==================================================================================================


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
        if b"\\" in body:  # JSON can escape any character
            with contextlib.suppress(ValueError, RecursionError):
                text = json.dumps(json.loads(body), ensure_ascii=False)
                plain = text.encode(errors="surrogatepass")
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


def decrypted(keys: MultiFernet, text: str) -> tuple[str | None, bool]:
    """Return what these keys find in a token, or None; and whether it has the form of a token."""
    has_form = bool(re.fullmatch("gAAAAA[A-Za-z0-9_-]{91,}=*", text))
    try:
        return keys.decrypt(text.encode()).decode().strip(), has_form
    except (InvalidToken, ValueError):  # ValueError: a non-ASCII token, or binary inside
        return None, has_form


def token_problem(text: str, kind: str) -> tuple[str, str] | None:
    """Return what is wrong with a secret's value, and its cure, or None. Neither shows it."""
    unprintable = "has characters that no token has (it takes printable ASCII without spaces)"
    alone, after = "put the token there, alone", "write only what follows"
    is_webhook, is_kbc = kind == "webhook", kind == "keboola" and text.startswith("kbc_")
    url = url_problem(text.partition("?")[0]) if is_webhook else None
    has_name = not is_webhook and re.match("(export +)?[A-Za-z_][A-Za-z0-9_]*=.", text)
    has_scheme = re.match(r"(?i)(authorization:\s*)?bearer(\s|$)", text)
    is_example = "YOUR-" in text or text == "https://hooks.slack.com/services/T0/B0/XYZ"
    for is_wrong, what, cure in (
        (not text, "is empty", alone),
        (len(text) > 65536, "is over 64 KiB", alone),
        (has_scheme, "begins with Bearer", f"{after} it"),
        (has_name, "begins with NAME=", f"{after} the ="),
        # A newline inside a header value makes httpx print the whole value in its exception.
        (re.search("[^!-~]", text), unprintable, alone),
        (re.search("^[\"']|[\"']$", text), "has quotes around it", "write it without them"),
        (is_example, "is the placeholder of the example", "put your own there"),
        (url, f"{url}", "put the https address there"),
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
        return *(self.secrets[entry.name] for entry in entries), *entries


def read_keys(
    config: Config, files: Files, env: Mapping[str, str]
) -> tuple[MultiFernet, list[Secret], list[str]]:
    """Return the Fernet keys (the first encrypts, all decrypt), also as text, and warnings.

    They come from the first place that has any. Raises ConfigError.
    """
    where, path, text = "$TECKOCHECKER_KEY", config.key_path, env.get("TECKOCHECKER_KEY", "")
    make, what, warnings = "head -c 32 /dev/urandom | base64 | tr +/ -_", "", []
    cure = f"make one: {make}"
    if not text.strip():
        read, mode = files.read(path), files.read(path).mode
        if directory := env.get("CREDENTIALS_DIRECTORY"):
            found = files.read(Path(directory, "teckochecker.key"))
            if not isinstance(found.error, FileNotFoundError):
                path = Path(directory, "teckochecker.key")
                read, mode = found, 0  # its mode is the service manager's matter
        where, text = str(path), read.data.decode("ascii", "replace")
        if read.error:
            what = f"cannot read the key file {path}: {read.error.strerror}"
            cure = f"bring it back, put a first one there ({make}) or set $TECKOCHECKER_KEY"
            if read.error.errno == errno.EACCES:
                cure = "run this as the key's owner, or as root"
        elif mode & stat.S_IRWXO:
            what, cure = f"{path} can be read by others (mode {mode:04o})", f"run: chmod 600 {path}"
        elif mode & stat.S_IRWXG:
            warnings = [f"{path} can be read by its group; better: chmod 600 {path}"]
    keys = re.sub(r"#[^\r\n]*|,", " ", text).split()
    if not what:
        with contextlib.suppress(ValueError):
            return MultiFernet(map(Fernet, keys)), [Secret(key) for key in keys], warnings
        what = f"{where} holds {'something other than Fernet keys' if keys else 'no key'}"
    place = (str(config.path), config.key_line, config.key_column, "key_file")
    raise ConfigError([Problem(*place, what, cure)])


def open_secret(
    entry: SecretEntry, path: Path, files: Files, env: Mapping[str, str], keys: MultiFernet | None
) -> Secret | Problem | None:
    text, value = entry.text.reveal(), None
    if entry.source == "env":
        value = env.get(text)
        what, cure = "the environment has no such variable", "set it, or correct the name"
    elif entry.source == "file":
        read = files.read(path.parent / text)
        what = f"cannot read the file: {read.error.strerror if read.error else ''}"
        cure = "correct the path or its permissions"
        value = None if read.error else read.data[:100_000].decode("utf-8", "replace")
    elif keys is None:
        return None  # noted already, where the keys were looked for
    else:
        value, has_form = decrypted(keys, text)
        value = text if "YOUR-" in text else value
        what, cure = "is not encrypted", f"run: teckochecker --config {path} encrypt"
        if has_form:
            what = "is encrypted with another key"
            cure = f"bring that key back, or write the token in plain and {cure}"
    if value is not None:
        problem = token_problem(value.strip(), entry.type)
        if problem is None:
            return Secret(value.strip())
        what, cure = f"the secret {problem[0]}", problem[1]
    place = (entry.line, entry.column, f"secrets.{entry.name}.{entry.source}")
    return Problem(str(path), *place, what, cure)


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
    keys, secrets, warnings = None, {}, list[str]()
    try:
        if any(entry.source == "value" for entry in config.secrets.values()):
            keys, texts, warnings = read_keys(config, files, env)
            redactor.learn(("key", text) for text in texts)
    except ConfigError as error:
        problems += error.problems
    for name, entry in config.secrets.items():
        found = open_secret(entry, path, files, env, keys)
        if isinstance(found, Secret):
            secrets[name] = found
        elif found:
            problems.append(found)
    redactor.learn(secrets.items())
    for name in secrets.keys() & config.of_type("webhook"):  # the path of an address is secret
        parts = urllib.parse.urlsplit(secrets[name].reveal())
        paths = (parts.path, parts._replace(scheme="", netloc="").geturl())
        redactor.learn((f"{name} path", Secret(text)) for text in paths if len(text) > 8)
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        mount = re.sub(r"[ \t\n\\]", lambda m: f"\\{ord(m[0]):03o}", str(path.resolve()))
        if any(line.split(" ")[4:5] == [mount] for line in mounts.splitlines()):
            how = "its changes are not seen; mount its directory"
            warnings.append(f"{path} is a mount of its own: {how}")
    return LoadedConfig(config, secrets, text, tuple(warnings)), [
        Problem(p.file, p.line, p.column, *map(redactor.text, (p.path, p.what, p.cure)))
        for p in problems  # not cut yet: half of a token would not be known
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


# ==================================================================================================
# 4. Decisions: a run and what came in, the next run and its events out. No I/O, no clock
# ==================================================================================================
#
#   polling --ready--> intent --search: empty--> sending --POST--> sent --followed--> finished
#      |                 ^  ^                       |                                     |
#      +--> refused      |  +------ not sent -------+---> rejected --(config, retry)--> intent
#                        |                          |                                     ^
#                        +-- retry --force -- unknown --search: found--> sent             |
#                                                   |                   (retry, retry_on_error)
#                                                   +--two empty searches, the last one begun at
#                                                      least the grace later--> sending
#
# A `sending` that is found at the start is `unknown`. A search comes before every POST; with
# `retry --force`, one that failed will do. A rejected start is tried again by itself, too.

LASTING_S: Final = 10 * MINUTE_S  # an error that lasts longer does not settle by itself
UNCLEAR_SIZE: Final = "the size of the group is unclear"
NO_ERROR: Final[Mapping[str, Any]] = {"error": None, "error_since": None, "failures": 0}


def backoff_s(failures: int, first_s: float, jitter: float, asked_s: float | None = None) -> float:
    """Return how long to wait after the n-th failure in a row, or as long as a server asked."""
    doubled = min(HOUR_S, first_s * 2.0 ** min(max(failures, 1) - 1, 16))
    return min(HOUR_S, max(doubled * (0.75 + 0.25 * jitter), asked_s or 0.0))


@dataclass(frozen=True, slots=True)
class Terms:
    """What is decided by beside the run: its job, the time, chance, and what the config allows."""

    job: Job | None  # None: it is not in the config now
    boot_time: BootTime
    jitter: float = 0.0  # from 0 to 1
    grace_s: float = 60.0
    follow_interval_s: float = 30.0
    may_post: bool = False

    @property
    def now(self) -> float:
        return self.boot_time.wall

    def put_off(self, run: Run, event: Event, came: ApiError, first_s: float) -> Change:
        """Return a run that waits after a failure; an event if it is another one, or a POST's."""
        wait_s = backoff_s(run.failures + 1, first_s, self.jitter, came.retry_after_s)
        after = replace(
            run,
            error=str(event.fields["error"]),
            error_since=run.error_since or self.now,
            failures=run.failures + 1,
            next_at=self.now + wait_s,
        )
        is_new = after.error != run.error or run.phase is Phase.SENDING
        return after, [event] if is_new else []


# --- polls, and when a run starts -----------------------------------------------------------------


def merged(known: Batch, came: Batch, now: float) -> Batch:
    """Return a batch after its own answer; of a finished one only files and counts may still come.

    They are waited for at most five minutes. A terminal status is never overwritten.
    """
    if known.is_final:
        return known
    due_at = now + 5 * MINUTE_S
    if known.is_terminal:
        due_at = known.files_due_at or now
        names = ("total", "completed", "failed", "output_file_id", "error_file_id", "error")
        late = {name: getattr(came, name) or getattr(known, name) for name in names}
        came = replace(known, files_due_at=None, **late)
    is_counted = came.total and (came.completed or 0) + (came.failed or 0) >= came.total
    is_late = came.status == "completed" and came.total and not is_counted
    lacks_output = (came.completed or is_late) and not came.output_file_id
    lacks_errors = came.failed and not came.error_file_id
    if came.is_terminal and (lacks_output or lacks_errors) and now < due_at:
        came = replace(came, files_due_at=due_at)
    return came


def after_poll(
    run: Run, job: Job, answers: Mapping[str, Batch | ApiError], terms: Terms, began: float
) -> Change:
    """Return a run after a poll of its batches; a failed poll never fails it, but makes it wait.

    The next poll counts from when this one began, so that runs that are polled together stay so.
    """
    now, batches, events = terms.now, [], []
    for known in run.batches:
        came = answers.get(known.id)
        b = merged(known, came, now) if isinstance(came, Batch) else known
        if b.files_due_at is not None and not now < b.files_due_at <= now + 5 * MINUTE_S:
            b = replace(b, files_due_at=None)
        if b.status != known.status:
            counts = f", {b.completed or 0:,} of {b.total:,} requests" if b.total else ""
            counts += f": {b.error}" if b.error else ""
            facts: dict[str, Any] = {"batch_id": b.id, "status": b.status, "counts_text": counts}
            facts |= {"completed": b.completed, "failed": b.failed, "total": b.total}
            name = f"batch_status_{'changed' if b.status in STATUS_RANK else 'unknown'}"
            events.append(Event.of(name, run, "warning" if b.has_failed else "", **facts))
        batches.append(b)
    after = replace(run, batches=tuple(batches), last_check_at=now)
    errors = [(key, came) for key, came in answers.items() if isinstance(came, ApiError)]
    if errors:
        batch_id, error = max(errors, key=lambda item: item[1].retry_after_s or 0.0)
        others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        facts = {"batch_id": batch_id, "error": f"{batch_id}: {error}{others}"}
        facts |= {"status": error.status, "request_id": error.request_id}
        event = Event.of("poll_failed", run, **facts)
        after, told = terms.put_off(after, event, error, job.poll_interval)
        events += told
    else:
        is_waiting = any(batch.files_due_at is not None for batch in batches)
        interval_s = min(30, job.poll_interval) if is_waiting else job.poll_interval
        after = replace(after, **NO_ERROR, next_at=max(now, min(began, now) + interval_s))
        if run.error and run.failures:
            events.append(Event.of("poll_recovered", run))
    return decide(after, job, now), events


def decide(run: Run, job: Job, now: float) -> Run:
    """Return a polled run with what follows from its batches: start, refusal, or another poll."""
    whole_at, unclear = now, ""  # when it has all its batches; inf: when more have joined
    if job.group_size:
        size = job.group_size if job.group_size.isdigit() else run.size
        is_number = re.fullmatch("[0-9]{1,4}", size)
        unclear = "" if is_number else f"{UNCLEAR_SIZE}: {size or 'it is missing'}"
        whole_at = math.inf if unclear or len(run.batches) < int(size) else now
    elif job.group_by:
        whole_at = (run.joined_at or now) + job.settle
    pending = [batch for batch in run.batches if not batch.is_final]
    created = [batch.created_at for batch in run.batches if batch.created_at]
    due_at = min(created) + job.deadline if job.deadline and created else math.inf
    if (now >= whole_at and not pending) or (now >= due_at and job.on_deadline == "start"):
        why, bad = "", [b for b in run.batches if b.status != "completed" or b.completed == 0]
        if job.trigger_on == "all_completed" and bad:
            others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            what = "has no successful request" if bad[0].status == "completed" else bad[0].status
            why = f"{bad[0].id} {what or 'is not finished'}{others}"
        elif job.trigger_on == "any_output" and not any(b.output_file_id for b in run.batches):
            why = "no batch has an output file"
        if not why:
            return as_intended(run, now)
        error = f"trigger_on: {job.trigger_on}, but {why}; `retry --force` starts it"
        refused = replace(run, phase=Phase.REFUSED, next_at=math.inf)
        return replace(refused, error=error, error_since=run.error_since or now)
    next_at = run.next_at if pending else whole_at
    if now < due_at:
        next_at = min(next_at, due_at)
    if unclear and not run.error:
        run = replace(run, error=unclear, error_since=now)
    return replace(run, next_at=next_at, deadline_told=now >= due_at)


def as_intended(run: Run, now: float, *, again: bool = False) -> Run:
    """Return a run that is to be started, by an id that can be searched for; `again`: a rerun."""
    if again:
        names = ("attention", "retries", "size", "joined_at", "deadline_told", "last_check_at")
        kept = {name: getattr(run, name) for name in names}
        run = Run(run.id, run.job, run.target, run.group, run.batches, rerun=run.rerun + 1, **kept)
    ids = sorted(batch.id for batch in run.batches)
    identity = [2, run.job, run.group, run.rerun] if run.group else [1, run.job, ids, run.rerun]
    own_id = hashlib.sha256(compact_json(identity).encode()).hexdigest()
    due: dict[str, Any] = {"next_at": now, "intended_at": now, **NO_ERROR}
    return replace(run, phase=Phase.INTENT, trigger_id=run.trigger_id or own_id, **due)


# --- the trigger, step by step --------------------------------------------------------------------


def keboola_variables(run: Run, job: Job) -> dict[str, str]:
    """Return the variables of a run's Keboola job, all of them non-empty text."""
    ids: dict[str, list[str]] = {"completed": [], "failed": [], "pending": []}
    counts: dict[str, dict[str, int | None]] = {}
    for b in run.batches:
        kind = "pending" if not b.is_terminal else "failed" if b.has_failed else "completed"
        ids[kind].append(b.id)
        if b.total is not None:
            counts[b.id] = {"total": b.total, "completed": b.completed, "failed": b.failed}
    by_id = {
        "batch_statuses": {b.id: b.status for b in run.batches},
        "batch_output_file_ids": {b.id: b.output_file_id for b in run.batches if b.output_file_id},
        "batch_error_file_ids": {b.id: b.error_file_id for b in run.batches if b.error_file_id},
        "batch_request_counts": counts,
        "batch_errors": {b.id: b.error for b in run.batches if b.error},
    }
    return {
        **dict(job.variables),
        **{f"batch_ids_{kind}": compact_json(found) for kind, found in ids.items()},
        "batch_count_total": str(len(run.batches)),
        "batch_count_completed": str(len(ids["completed"])),
        "batch_count_failed": str(len(ids["failed"])),
        **{name: compact_json(found) for name, found in by_id.items()},
        "teckochecker_job": run.job,
        **({"teckochecker_group": run.group} if run.group else {}),
        "teckochecker_trigger_id": run.trigger_id,
    }


def as_aimed(run: Run, job: Job, target: Target, token: Secret) -> Run:
    """Return an intent with what the config says now; nothing of it has reached Keboola yet."""
    values = [{"name": name, "value": v} for name, v in keboola_variables(run, job).items()]
    body = {
        "component": target.component_id,
        "config": target.config_id,
        "mode": job.mode,
        **({"branchId": target.branch_id} if target.branch_id else {}),
        **({"configRowIds": list(job.config_row_ids)} if job.config_row_ids else {}),
        "variableValuesData": {"values": values},
    }
    digest = digest_of_input(job, target, token)
    return replace(run, target=target, payload=compact_json(body), input_digest=digest)


def digest_of_input(job: Job, target: Target, token: Secret) -> str:
    """Return a digest of what Keboola judges a start by, apart from the batches."""
    aim = [target.stack_url, target.component_id, target.config_id, target.branch_id]
    parts = [*aim, job.mode, job.config_row_ids, sorted(job.variables), token.digest()]
    return hashlib.sha256(compact_json(parts).encode()).hexdigest()


def search_since(run: Run, now: float) -> float:
    """Return since when a Keboola job for a run can exist, as Unix seconds of our clock."""
    ended = [batch.ended_at for batch in run.batches if batch.ended_at]
    created = [batch.created_at for batch in run.batches if batch.created_at]
    all_ended = len(ended) == len(run.batches)
    known = max(ended) if ended and all_ended else min(created, default=now)
    # A day, as OpenAI's clock and ours may be hours off; Keboola's is corrected elsewhere.
    return min(known, now, run.sending_at or now) - DAY_S


def after_search(
    run: Run, came: Sequence[KeboolaJob] | ApiError, began: BootTime, terms: Terms
) -> Change:
    """Return a run after a search for its Keboola job: found, SENDING, or searched for again.

    `came` are the jobs that carry the trigger id, the oldest first, or why the search, which began
    at `began`, is incomplete and says nothing. A run that comes back SENDING is to be committed and
    posted with nothing awaited in between.
    """
    if isinstance(came, ApiError):
        if not (run.forced and terms.may_post):
            text = f"cannot search Keboola for an earlier start: {came}"
            if run.post_error:
                text += f"; the start brought: {run.post_error}"
            event = Event.of("trigger_search_failed", run, error=text, status=came.status)
            return terms.put_off(run, event, came, 5)
    elif came:
        return as_started(run, came, "trigger_found", terms)
    elif run.phase is Phase.UNKNOWN:
        elapsed_s = run.unknown_since.until_s(began) if run.unknown_since else 0.0
        is_late = elapsed_s >= run.repeat_after_s
        run = replace(run, empty_searches=run.empty_searches + 1, failures=0)
        if run.post_error:
            text = f"a search did not find the Keboola job, and the start brought: {run.post_error}"
            run = replace(run, error=text)
        if not (is_late and run.empty_searches >= 2):
            left_s = max(run.repeat_after_s - elapsed_s, 0.1)
            wait_s = min(10.0, terms.grace_s / 4) if is_late else left_s
            return replace(run, next_at=terms.now + wait_s), []
    if not terms.may_post:
        # Paused or removed: an earlier POST's job may still show up, so the search goes on.
        return replace(run, next_at=terms.now + HOUR_S), []
    after = replace(
        run,
        phase=Phase.SENDING,
        posts=run.posts + 1,
        sending_at=run.sending_at or terms.now,
        empty_searches=0,
        forced=False,
        next_at=math.inf,
    )
    facts = {"trigger_id": run.trigger_id, "target": str(run.target)}
    again = (
        "; Keboola's search shows no job of this run yet" if run.posts and not run.forced else ""
    )
    return after, [Event.of("trigger_sending", run, **facts, again_text=again)]


def as_started(run: Run, jobs: Sequence[KeboolaJob], name: str, terms: Terms) -> Change:
    """Return a run once its Keboola job is known; of several, the first one is ours."""
    (ours, *others), now = jobs, terms.now
    created_at = ours.created_time.timestamp() if ours.created_time else now
    project = ours.project or run.target.project
    link = f"{run.target.stack_url}/admin/projects/{project}/queue/{ours.id}" if project else None
    after = replace(
        run,
        phase=Phase.SENT,
        keboola_job_id=ours.id,
        keboola_status=ours.status,
        url=link,
        sent_at=min(created_at, now) if name == "trigger_found" else now,
        next_at=now,
        **NO_ERROR,
    )
    facts: dict[str, Any] = {"keboola_job_id": ours.id, "trigger_id": run.trigger_id, "url": link}
    if others:
        facts["other_keboola_job_ids"] = [job.id for job in others]
    events = [Event.of(name, run, "warning" if others else "", **facts)]
    if terms.job and not terms.job.follow:
        after = replace(after, phase=Phase.FINISHED, finished_at=after.sent_at, next_at=math.inf)
        events.append(end_event(after, "was started"))
    return after, events


def after_post(run: Run, came: KeboolaJob | ApiError, terms: Terms) -> Change:
    """Return a run after its POST: sent, certainly not sent, rejected, or unknown.

    The first repeat of an unknown one waits for the grace; then the wait doubles, up to an hour.
    """
    if isinstance(came, KeboolaJob):
        return as_started(run, [came], "trigger_sent", terms)
    facts = {"trigger_id": run.trigger_id, "status": came.status, "request_id": came.request_id}
    if not came.sent:
        text = f"nothing was sent to Keboola: {came}"
        event = Event.of("trigger_not_sent", run, error=text, **facts)
        after, events = terms.put_off(run, event, came, 5)
        return replace(after, phase=Phase.INTENT), events
    if came.status is None or not 400 <= came.status < 500 or came.status in {408, 429}:
        grace_s, asked_s = terms.grace_s, came.retry_after_s or 0.0
        doubled = min(max(grace_s, HOUR_S), max(1.0, 2 * run.repeat_after_s))
        wait_s = max(grace_s if run.repeat_after_s == 0 else doubled, min(asked_s, HOUR_S))
        text = f"it is not known whether Keboola took the job: {came}"
        after = replace(
            run,
            phase=Phase.UNKNOWN,
            error=text,
            error_since=run.error_since or terms.now,
            failures=0,
            next_at=terms.now + min(10.0, grace_s / 4),
            post_error=str(came),
            repeat_after_s=wait_s,
            unknown_since=terms.boot_time,
        )
        return after, [Event.of("trigger_unknown", run, error=text, **facts)]
    event = Event.of("trigger_rejected", run, error=str(came), **facts)
    after, events = terms.put_off(run, event, came, 5 * MINUTE_S)
    next_at = after.next_at if came.status in {401, 402, 403, 404, 409, 423} else math.inf
    after = replace(after, phase=Phase.REJECTED, sending_at=None, post_error=None)
    return replace(after, next_at=next_at, repeat_after_s=0.0), events


def end_event(run: Run, ended: str) -> Event:
    completed = sum(batch.status == "completed" for batch in run.batches)
    failed_requests = sum(batch.failed or 0 for batch in run.batches)
    counts = f"{completed} of {counted(len(run.batches), 'batch')} completed"
    if failed_requests:
        counts += f", {counted(failed_requests, 'request')} failed"
    name = "completed" if completed == len(run.batches) else "completed_with_failures"
    facts = {"keboola_job_id": run.keboola_job_id, "keboola_status": run.keboola_status}
    return Event.of(name, run, **facts, ended=ended, counts=counts, url=run.url)


def after_follow(run: Run, came: KeboolaJob | ApiError, terms: Terms) -> Change:
    """Return a run after its Keboola job was asked for: running, finished, failed, or due again."""
    now, job = terms.now, terms.job
    wait_s = max(terms.follow_interval_s, min(job.poll_interval if job else HOUR_S, 5 * MINUTE_S))
    facts = {"keboola_job_id": run.keboola_job_id, "url": run.url}
    is_new = now - (run.sent_at or 0.0) < terms.grace_s  # what answers may not know it yet
    if isinstance(came, ApiError) and (came.status != 404 or is_new):
        event = Event.of("follow_failed", run, **facts, error=str(came), status=came.status)
        return terms.put_off(run, event, came, wait_s)
    if isinstance(came, ApiError):
        came = KeboolaJob("", "deleted", True, "", str(came), None, None)  # noqa: FBT003
    after = replace(run, **NO_ERROR, last_check_at=now, keboola_status=came.status)
    if not came.is_finished:
        event = Event.of("keboola_job_status", run, **facts, status=came.status)
        events = [event] if came.status != run.keboola_status else []
        return replace(after, next_at=now + wait_s), events
    after = replace(after, phase=Phase.FINISHED, finished_at=now, next_at=math.inf)
    if came.status in {"success", "warning"}:
        ended = "succeeded" if came.status == "success" else "ended with a warning"
        return after, [end_event(after, ended)]
    message = f": {came.message}" if came.message else ""
    error = f"Keboola job {run.keboola_job_id} ended in {came.status}{message}"
    after = replace(after, error=error, error_since=now)
    retries = job.retry_on_error if job and terms.may_post else 0
    if came.status == "error" and run.retries < retries:
        wait_s = min(HOUR_S, 5 * MINUTE_S * 2.0**run.retries)
        again = as_intended(replace(run, retries=run.retries + 1), now + wait_s, again=True)
        facts |= {"error": error, "wait": show_duration(wait_s)}
        event = Event.of("keboola_job_retried", run, **facts)
        return replace(again, error=error, error_since=now), [event]
    return replace(after, keboola_error=came.message or error), []


@dataclass(frozen=True, slots=True)
class RetryRequest:
    """A `retry` that someone asked for, and what the run was like when they did."""

    id: int
    run_id: int
    force: bool
    rerun: int
    phase: Phase


def after_retry(  # noqa: C901, PLR0911 - a table
    run: Run, job: Job | None, request: RetryRequest, now: float
) -> Change | str:
    """Return a run after `retry`, or why nothing could be done."""
    if job is None:
        return "its job is not in the config"
    if job.done:
        return "the config says done: true; remove that to start it"
    if job.paused and not run.may_be_at_keboola:
        return "it is paused; resume it first"
    force, now_due = request.force, replace(run, failures=0, next_at=now)
    finished = {Phase.FINISHED, Phase.REJECTED, Phase.REFUSED}
    if run.rerun != request.rerun or (
        run.phase != request.phase and (request.phase in finished or run.phase is Phase.UNKNOWN)
    ):
        return "its Keboola job was started or found meanwhile"
    match run.phase:
        case Phase.SENDING:
            return "its Keboola job is being started now"
        case Phase.SENT:
            return f"its Keboola job {run.keboola_job_id} is running; wait for its end"
        case Phase.FINISHED if run.error or force:
            after = replace(as_intended(run, now, again=True), retries=0)
        case Phase.FINISHED:
            return "its Keboola job has run; --force starts it once more"
        case Phase.REFUSED if not force:
            return "its policy refuses it; --force starts it all the same"
        case Phase.REFUSED | Phase.REJECTED:
            after = as_intended(run, now)
        case Phase.UNKNOWN | Phase.INTENT if force:
            after = replace(now_due, phase=Phase.INTENT, forced=True)
        case _:
            after = now_due
    return after, [Event.of("retry_taken", run, how=" by force" if force else "")]


# --- status and attention -------------------------------------------------------------------------


def status_of(run: Run, job: Job | None) -> str:
    if job and job.done and not run.may_be_at_keboola:
        return "completed"
    if run.has_failed:
        return "failed"
    if run.phase is Phase.FINISHED:
        is_clean = all(batch.status == "completed" for batch in run.batches)
        return "completed" if is_clean else "completed_with_failures"
    if job and job.paused:
        return "paused"
    if run.phase is Phase.POLLING:
        return "active"
    return "running" if run.phase is Phase.SENT else "triggering"


# The part of the page where the runs of a status stand, in the order in which people want them.
PART_OF_STATUS: Final = {
    "failed": "Needs attention",
    "triggering": "Active",
    "active": "Active",
    "running": "Running",
    "paused": "Paused",
    "completed_with_failures": "Finished",
    "completed": "Finished",
}


def counts_in_words(statuses: Iterable[str]) -> str:
    counts = collections.Counter(statuses)
    words = [f"{counts[s]} {s.replace('_', ' ')}" for s in PART_OF_STATUS if counts[s]]
    return ", ".join(words) or "no runs"


def attention_of(  # noqa: PLR0911 - a table
    run: Run, job: Job | None, grace_s: float, now: float
) -> str:
    """Return the event that says what a person has to do something about, or ""."""
    if job and job.done:
        return ""
    if run.has_failed:
        return "job_failed"
    if job is None or job.paused:
        return ""
    is_lasting = run.error_since is not None and now - run.error_since > LASTING_S
    match run.phase:
        case Phase.POLLING if run.deadline_told:
            return "deadline_passed"
        case Phase.POLLING if (run.error or "").startswith(UNCLEAR_SIZE):
            return "group_size_unclear"
        case Phase.POLLING:
            return "poll_failing" if is_lasting else ""
        case Phase.SENT:
            return "follow_failing" if is_lasting else ""
        case Phase.FINISHED:
            return ""
    if run.attention == "job_failed" and run.error:
        return "job_failed"  # a rejected start is tried again, and is not right for that
    is_overdue = now - (run.intended_at or now) > max(LASTING_S, 10 * grace_s)
    return "trigger_overdue" if is_overdue else ""


def after_attention(run: Run, job: Job | None, grace_s: float, now: float) -> Change:
    """Return a run that remembers what needs a person, with the events that tell of a change."""
    reason = attention_of(run, job, grace_s, now)
    if reason == run.attention:
        return run, []
    events = [Event.of(f"{run.attention}_recovered", run)] if run.attention else []
    if reason:
        pending = sum(not batch.is_terminal for batch in run.batches)
        facts = {"error": run.error, "url": run.url, "pending": pending, "count": len(run.batches)}
        events.append(Event.of(reason, run, **facts))
    return replace(run, attention=reason), events


# --- a new process or config: clocks, which run a job is, which batches are a group ---------------


def shifted(run: Run, by_s: float) -> Run:
    """Return a run whose pending times follow the clock that was set."""
    names = ("next_at", "error_since", "intended_at", "joined_at")
    moved = {n: getattr(run, n) + by_s for n in names if getattr(run, n) is not None}
    batches = (
        replace(b, files_due_at=b.files_due_at and b.files_due_at + by_s) for b in run.batches
    )
    return replace(run, batches=tuple(batches), **moved)


def as_loaded(run: Run, terms: Terms) -> Change:
    """Return a stored run as a new process takes it up.

    A POST that an earlier process was about to send, or had sent, is unknown. A recorded time in
    the future counts as now; polls begin at once, and no other wait is longer than an hour.
    """
    names = ("error_since", "intended_at", "joined_at", "sent_at", "finished_at", "last_check_at")
    times, now = {name: getattr(run, name) for name in names}, terms.now
    late: dict[str, Any] = {n: now for n, at in times.items() if at is not None and at > now}
    if run.phase is Phase.POLLING or now + HOUR_S < run.next_at < math.inf:
        late["next_at"] = now
    if run.phase is Phase.SENDING:
        lost = ApiError("the process ended before the answer was recorded")
        return after_post(replace(run, **late), lost, terms)
    return replace(run, **late), []


def assign(
    jobs: Mapping[str, Job],
    targets: Mapping[str, Target],
    runs: Iterable[Run],
    last: Mapping[str, str],
) -> dict[str, Run]:
    """Return the run of each job with batch_ids that has one; the others are new.

    A new job with the ids and the target of a job that has left the config (the run's target, or
    the `last` one of its name) is that job under a new name, not new work.
    """
    by_ids: dict[frozenset[str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.phase is not Phase.FINISHED, run.id)):
        by_ids.setdefault(frozenset(batch.id for batch in run.batches), []).append(run)
    assigned, taken = dict[str, Run](), set[int]()
    for name, job in jobs.items():
        known, target = by_ids.get(frozenset(job.batch_ids), []), str(targets[name])
        own = [run for run in known if run.job == name]
        left = [run for run in known if run.job not in jobs and run.id not in taken]
        claims = [run for run in left if target in {str(run.target), last.get(run.job)}]
        if own or claims:
            assigned[name] = own[-1] if own else claims[0]
            taken.add(assigned[name].id)
    return assigned


def in_order(job: Job, batches: Iterable[Batch]) -> tuple[Batch, ...]:
    place = {batch_id: i for i, batch_id in enumerate(job.batch_ids)}
    return tuple(sorted(batches, key=lambda b: (place.get(b.id, 0), b.created_at or 0.0, b.id)))


@dataclass(frozen=True, slots=True)
class Row:
    """A row of an account's list of batches, as far as it can be read."""

    batch: Batch
    metadata: Mapping[str, str]

    def is_of(self, job: Job) -> bool:
        is_new = (self.batch.created_at or 0.0) >= job.since
        return is_new and all(self.metadata.get(key) == value for key, value in job.match)

    def group_size(self, job: Job) -> str:
        """Return the size of its group as its metadata tells it, or what is wrong with it."""
        key = (job.group_size or "").partition("metadata.")[2]
        text = self.metadata.get(key, "") if key else ""
        if not key or re.fullmatch("[1-9][0-9]{0,2}|1000", text):
            return text
        return f"{quoted(text)} is not 1 to 1000" if text else f"a batch has no {key}"


def group_batches(
    job: Job, target: Target, rows: Sequence[Row], runs: Mapping[str, Run], now: float
) -> list[tuple[Run, list[Event], list[Batch]]]:
    """Return the runs that new batches begin (with the number 0) or join, and who came late."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group = row.metadata.get(job.group_by, "") if job.group_by else row.batch.id
        if group:
            groups.setdefault(group, []).append(row)
    changes = []
    for group, new in groups.items():
        run = runs.get(group) or Run(0, job.name, target, group, next_at=now)
        count, events = len(run.batches), []
        room = 1000 - count if run.phase is Phase.POLLING else 0  # the most of a run
        joined, late = new[:room], [row.batch for row in new[room:]]
        for row in joined:
            count += 1
            name = "batch_joined" if count > 1 else "run_found"
            events.append(Event.of(name, run, batch_id=row.batch.id, count=count))
        events += [Event.of("late_batch", run, batch_id=batch.id) for batch in late]
        if joined:
            batches = in_order(job, [*run.batches, *(row.batch for row in joined)])
            sizes = ({row.group_size(job) for row in joined} | {run.size}) - {""}
            differ = f"the batches differ in {str(job.group_size).removeprefix('metadata.')}"
            size = differ if len(sizes) > 1 else "".join(sizes)
            run = replace(run, batches=batches, joined_at=now, next_at=now, size=size)
        changes.append((run, events, late))
    return changes


# ==================================================================================================
# 5. Store and lock: what must survive a crash, in one SQLite file
# ==================================================================================================

SCHEMA_VERSION: Final = 5
STATE_HINT: Final = "restore it from a backup, or move it away: Keboola is searched before any POST"
Statement = tuple[str, Sequence[object]]

# Times are Unix seconds; a column is explained at the field of its name. Nothing here is a secret.
SCHEMA: Final = (
    """-- One set of batches of a job that leads to one Keboola job; its trigger and target inside.
-- batch_key: JSON, its sorted batch ids; empty for a group
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, job TEXT NOT NULL, "group" TEXT NOT NULL, batch_key TEXT NOT NULL,
    phase TEXT NOT NULL, rerun INTEGER NOT NULL, trigger_id TEXT NOT NULL, payload TEXT NOT NULL,
    input_digest TEXT NOT NULL, next_at REAL NOT NULL, failures INTEGER NOT NULL, error TEXT,
    error_since REAL, attention TEXT NOT NULL, forced INTEGER NOT NULL, posts INTEGER NOT NULL,
    post_error TEXT, repeat_after_s REAL NOT NULL, unknown_wall REAL, unknown_boot TEXT,
    unknown_uptime_s REAL, empty_searches INTEGER NOT NULL, retries INTEGER NOT NULL,
    sending_at REAL, sent_at REAL, keboola_job_id TEXT, keboola_status TEXT, keboola_error TEXT,
    url TEXT, size TEXT NOT NULL, joined_at REAL, intended_at REAL, deadline_told INTEGER NOT NULL,
    last_check_at REAL, finished_at REAL, stack_url TEXT NOT NULL, component_id TEXT NOT NULL,
    config_id TEXT NOT NULL, branch_id TEXT NOT NULL, project TEXT NOT NULL
) STRICT""",
    'CREATE INDEX runs_by_job ON runs (job, "group")',
    "CREATE INDEX runs_by_batches ON runs (batch_key) WHERE batch_key <> ''",
    "CREATE INDEX runs_open ON runs (phase) WHERE phase <> 'finished' OR attention <> ''",
    "CREATE INDEX runs_by_end ON runs (job, finished_at DESC) WHERE phase = 'finished'",
    """-- A batch as OpenAI last told it; place: of the run's batches, -1 for one that came late
CREATE TABLE batches (
    run_id INTEGER NOT NULL, place INTEGER NOT NULL, id TEXT NOT NULL, status TEXT, total INTEGER,
    completed INTEGER, failed INTEGER, output_file_id TEXT, error_file_id TEXT, created_at REAL,
    expires_at REAL, ended_at REAL, error TEXT, files_due_at REAL, PRIMARY KEY (run_id, id)
) STRICT, WITHOUT ROWID""",
    "CREATE INDEX batches_by_id ON batches (id)",
    """-- The log; fields: JSON
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, name TEXT NOT NULL, level TEXT NOT NULL, job TEXT,
    run TEXT, fields TEXT NOT NULL, text TEXT NOT NULL
) STRICT""",
    "CREATE INDEX events_by_job ON events (job, id) WHERE job IS NOT NULL",
    """-- What `retry` asked for, and what the run was like then
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, force INTEGER NOT NULL,
    rerun INTEGER NOT NULL, phase TEXT NOT NULL
) STRICT""",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    """-- told_up_to: the last event that it has had, or was not to have
CREATE TABLE webhooks (
    secret TEXT PRIMARY KEY, told_up_to INTEGER NOT NULL, failures INTEGER NOT NULL,
    next_at REAL NOT NULL
) STRICT, WITHOUT ROWID""",
)


@functools.cache
def columns(cls: type) -> Sequence[str]:
    """Return the columns that a dataclass's fields have; its nested ones are stored otherwise."""
    return [f.name for f in fields(cls) if f.name not in {"target", "batches", "unknown_since"}]


def insert(into: str, *items: object, **own: object) -> Statement:
    """Return what stores dataclasses and further columns as one row, in place of the one before."""
    row = {name: getattr(item, name) for item in items for name in columns(type(item))} | own  # type: ignore[arg-type]
    names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
    return f"INSERT OR REPLACE INTO {into} ({names}) VALUES ({marks})", [*row.values()]


@dataclass(frozen=True, slots=True)
class SecretStats:
    """How the requests with one secret have fared in this process. Times are Unix seconds."""

    name: str
    type: str
    requests: int = 0
    errors: int = 0  # of the requests: all that brought no 2xx
    last_success_at: float | None = None
    error: str | None = None  # what became of the last request, if it failed
    refused_since: float | None = None  # the server has refused it ever since
    find_error: str | None = None  # what has kept new batches from being found for long

    @property
    def trouble(self) -> str:
        """What a person has to do something about, or ""."""
        if self.refused_since is not None:
            return f"the secret {self.name} is refused: {self.error}; `secret set` takes a new one"
        return f"no new batches can be found: {self.find_error}" if self.find_error else ""

    def after(self, error: ApiError | None, now: float) -> SecretStats:
        after = replace(self, requests=self.requests + 1)
        if error is None:
            return replace(after, error=None, last_success_at=now, refused_since=None)
        after = replace(after, errors=self.errors + 1, error=str(error))
        if error.retryable:  # it says nothing of the secret
            return after
        since = (self.refused_since or now) if error.status == 401 else None
        return replace(after, refused_since=since)


class Clock:
    """The process's one clock: Unix time at its start, and the boot-time clock from then on."""

    def __init__(self) -> None:
        self._boot = ""
        with contextlib.suppress(OSError):  # not Linux: the wall clock has to do
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._started_at = time.time() - self.uptime_s()

    def uptime_s(self) -> float:
        """Return seconds that only grow, also while the machine is suspended."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def now(self) -> float:
        return self._started_at + self.uptime_s()

    def boot_time(self) -> BootTime:
        return BootTime(self.now(), self._boot, self.uptime_s())

    def jitter(self) -> float:
        return random.random()  # noqa: S311 - spreads load, guards nothing

    def changed(self) -> float:
        """Return by how many seconds the system's clock was set, and follow it; or 0."""
        by_s = time.time() - self.now()
        if abs(by_s) <= MINUTE_S:
            return 0.0
        self._started_at += by_s
        return by_s


def is_there(path: Path) -> bool:
    """Return whether there is such a file. Raises StateError for what is none, or is hidden."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        hint = "run this as root, or as the daemon's user"
        raise StateError(f"cannot access {path}: {error.strerror}", hint) from None
    raise StateError(f"{path} is not a regular file", "put a file there, no link and no pipe")


def owner_of(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def open_own(path: Path) -> int:
    """Open or make a file beside the state; returns the descriptor. Raises StateError.

    What root makes here is given to the directory's owner, who has to work with it too. Links are
    not followed: that owner could have root write somewhere else.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with contextlib.suppress(FileExistsError):
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(fd, owner.st_uid, owner.st_gid)
            return fd
        is_there(path)  # a pipe would hold us up
        return os.open(path, flags)
    except OSError as error:
        hint = "correct state: (a file, no link), or this user's rights to it and its directory"
        if error.errno == errno.ENOENT:
            hint = "create the directory (systemd does, when it starts the unit)"
        elif error.errno == errno.EACCES and os.path.exists(path):  # noqa: PTH110 - never raises
            hint = f"it belongs to {owner_of(path)}: chown it to the daemon's user"
        raise StateError(f"cannot open {path}: {error.strerror}", hint) from None


class StateLock:
    """The exclusive lock of the one process that acts on a state file.

    The file says who holds it and, by its modification time, when that one last ran its loop; and
    when the last POST was, whose job a search may not show yet if the state file is lost.
    """

    def __init__(self, state_path: Path, purpose: str, started_at: float) -> None:
        self.path = state_path.with_name(state_path.name + ".lock")
        self._fd = open_own(self.path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            label = self._read()
            begun = re.search(r"\(--once\) since ([0-9]{1,15}\.[0-9]{3})\n", label)
            if purpose == "--once" and begun and started_at - float(begun[1]) < 10 * MINUTE_S:
                raise LockedError("") from None  # cron would mail what is said
            holder = one_line(label.partition(" since ")[0]) or "it just started"
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
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._fd), self.path.stat())
        return False

    def close(self) -> None:
        self._write("")
        os.close(self._fd)


def lock_owner(state_path: Path) -> dict[str, Any]:
    """Return who acts on a state file, without the lock: taking it could hold up a start."""
    path = state_path.with_name(state_path.name + ".lock")
    label, looped_at = "", 0.0
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would hold us up
            label, looped_at = path.read_text("utf-8", "replace"), path.stat().st_mtime
    match = re.match(r"pid ([0-9]{1,9}) \((daemon|--once)\) since ([0-9]{1,15}\.[0-9]{3})\n", label)
    if not match:
        return {"running": False, "once": False}
    age_s, is_once = time.time() - looped_at, match[2] == "--once"
    is_running = age_s < (10 * MINUTE_S if is_once else MINUTE_S)  # a pass touches only at a POST
    try:
        os.kill(int(match[1]), 0)
    except OSError as error:  # a process in another container is not seen, but touches the file
        is_running &= error.errno != errno.ESRCH or age_s < 20
    return {
        "running": is_running and not is_once,
        "once": is_running and is_once,
        "pid": int(match[1]),
        "started_at": rfc3339(float(match[3])),
        "last_loop_at": rfc3339(looped_at),
    }


class Store:
    """The state file. Every change is one transaction; what fails raises StorageError whole."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        db.row_factory = sqlite3.Row
        self.db = db
        self.path = path
        self._opened = path.stat()

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open for acting, under the lock; what is not ours, or damaged, stays as it was."""
        os.close(open_own(path))
        try:
            db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            if is_there(path.with_name(path.name + "-journal")):  # a first start was killed
                db.execute("PRAGMA user_version")  # to read is to roll that back
            with cls.reading(path) as store:
                has_schema = store is not None
                if store:
                    store.check_undamaged()
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                message = f"{path}: this file system cannot do SQLite's WAL mode"
                raise StateError(message, "put state: on a local disk")
            # NORMAL does not sync commits: power loss could take back an intent that was acted on.
            db.execute("PRAGMA synchronous = FULL")
            if not has_schema:
                script = (*SCHEMA, f"PRAGMA user_version = {SCHEMA_VERSION}", "COMMIT")
                db.executescript(";\n".join(("BEGIN IMMEDIATE", *script)))
            db.execute("PRAGMA busy_timeout = 50")  # ms: the loop stands still while it waits
        except sqlite3.Error as error:
            raise cls._error(error, path) from None
        return cls(db, path)

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path) -> Iterator[Store | None]:
        """Open for reading, also beside a daemon; None where there is none. Raises StateError."""
        if not is_there(path):
            yield None
            return
        # Without a WAL nobody writes. SQLite is told so: else root's `status` would leave a WAL
        # that the daemon may not use.
        is_quiet = not is_there(path.with_name(path.name + "-wal"))
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_quiet else ''}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as db:
                version = int(db.execute("PRAGMA user_version").fetchone()[0])
                is_empty = db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is None
                if version != SCHEMA_VERSION and not is_empty:
                    hint = "it is of an older teckochecker or of another program: move it away"
                    hint += " (Keboola is searched before any POST), or correct state:"
                    if version > SCHEMA_VERSION:
                        hint = "run the newer teckochecker that wrote it"
                    what = f"has schema {version}; this program knows {SCHEMA_VERSION}"
                    raise StateError(f"the state file {path} {what}", hint)
                yield None if is_empty else cls(db, path)
        except sqlite3.Error as error:
            raise cls._error(error, path) from None

    @staticmethod
    def _error(error: sqlite3.Error, path: Path) -> StateError:
        files = [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]
        there = [file for file in files if os.path.exists(file)]  # noqa: PTH110 - never raises
        shut = [file for file in there if not os.access(file, os.R_OK | os.W_OK)]
        file = next(iter(shut or there), None)
        whose = f"{file} belongs to {owner_of(file)}" if file else "it is not there"
        allow = f"{whose}: let this user open and write it and its directory"
        hint = {
            sqlite3.SQLITE_FULL: "free the disk",
            sqlite3.SQLITE_BUSY: "see who else has the file open",
            sqlite3.SQLITE_READONLY: allow,
            sqlite3.SQLITE_CANTOPEN: allow,
            sqlite3.SQLITE_IOERR: "see the system's log for disk errors",
        }.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, STATE_HINT)
        return StateError(f"cannot use the state file {path}: {error}", hint)

    def check_undamaged(self) -> None:
        """Raise StateError, or SQLite's own error, for what is damaged."""
        if (result := str(self.one("PRAGMA quick_check(1)"))) != "ok":
            message = f"the state file {self.path} is damaged: {one_line(result)}"
            raise StateError(message, STATE_HINT)

    def execute(self, statements: Iterable[Statement]) -> None:
        """Commit statements, or nothing of them. Raises StorageError."""
        try:
            with self.db:  # commits, or rolls back
                self.db.execute("BEGIN IMMEDIATE")
                for statement, parameters in statements:
                    self.db.execute(statement, parameters)
        except sqlite3.Error as error:
            raise StorageError(str(self._error(error, self.path))) from error

    def commit(
        self,
        runs: Iterable[tuple[Run | None, Run]],
        events: Iterable[Event],
        now: float,
        also: Sequence[Statement] = (),
    ) -> list[Event]:
        """Commit how runs have changed, and their events, which it returns with their time."""
        rows, stored = list(runs), [replace(event, at=now) for event in events]

        def statements() -> Iterator[Statement]:  # one at a time: there may be 100,000 batches
            yield from also
            for before, run in rows:
                ids = [] if run.group else sorted(batch.id for batch in run.batches)
                row: dict[str, object] = {"batch_key": compact_json(ids) if ids else ""}
                for name in columns(BootTime):
                    row[f"unknown_{name}"] = getattr(run.unknown_since, name, None)
                yield insert("runs", run, run.target, **row)
                known = enumerate(before.batches if before else ())
                for place, batch in set(enumerate(run.batches)).difference(known):
                    yield insert("batches", batch, run_id=run.id, place=place)
            for event in stored:  # SQLite numbers them
                yield insert("events", event, id=None, fields=json.dumps(dict(event.fields)))

        if rows or stored or also:
            self.execute(statements())
        return stored

    def is_in_place(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(self._opened, self.path.stat())
        return False

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # the last one to close folds the WAL in
            self.db.close()

    def runs(self, where: str, parameters: Mapping[str, object] | None = None) -> list[Run]:
        """Return the runs for which an SQL condition holds, with their batches, in order."""
        values = parameters or {}
        query = f"""SELECT run_id, {", ".join(columns(Batch))} FROM batches WHERE place >= 0
            AND run_id IN (SELECT id FROM runs WHERE {where}) ORDER BY run_id, place"""
        batches, found = dict[int, list[Batch]](), []
        for run_id, *batch in self.db.execute(query, values):
            batches.setdefault(run_id, []).append(Batch(*batch))
        for row in self.db.execute(f"SELECT * FROM runs WHERE {where} ORDER BY id", values):
            facts = {name: row[name] for name in columns(Run)}
            facts |= {name: bool(row[name]) for name in ("forced", "deadline_told")}
            facts |= {"phase": Phase(row["phase"]), "batches": tuple(batches.get(row["id"], ()))}
            since = [row[f"unknown_{name}"] for name in columns(BootTime)]
            facts["unknown_since"] = None if since[0] is None else BootTime(*since)
            found.append(Run(**facts, target=Target(*(row[name] for name in columns(Target)))))
        return found

    def runs_for(self, jobs: Mapping[str, Job]) -> list[Run]:
        """Return what a config is about: unfinished runs, those of its batch ids, and attention.

        Of a job with `match` also the last five finished; of one that is gone, what may
        be at Keboola.
        """
        in_config = "+job IN (SELECT value FROM json_each(:names))"  # +: by the partial index
        where = f"""id IN (
            SELECT id FROM runs WHERE (phase <> 'finished' OR attention <> '') AND (
                {in_config} OR phase = 'sent' OR (phase <> 'finished' AND sending_at IS NOT NULL))
            UNION SELECT id FROM runs
                WHERE batch_key <> '' AND batch_key IN (SELECT value FROM json_each(:keys))
            UNION SELECT id FROM (
                SELECT id, row_number() OVER (PARTITION BY job ORDER BY finished_at DESC) AS place
                FROM runs WHERE phase = 'finished' AND job IN (SELECT value FROM json_each(:match))
            ) WHERE place <= 5)"""
        keys = [compact_json(sorted(job.batch_ids)) for job in jobs.values() if not job.match]
        matching = [name for name, job in jobs.items() if job.match]
        values = {"names": [*jobs], "keys": keys, "match": matching}
        return self.runs(where, {name: compact_json(value) for name, value in values.items()})

    def groups(self, job: str, groups: Iterable[str]) -> dict[str, Run]:
        where = 'job = :job AND "group" IN (SELECT value FROM json_each(:groups))'
        found = self.runs(where, {"job": job, "groups": compact_json(list(groups))})
        return {run.group: run for run in found}

    def known_batches(self, job: str, ids: Iterable[str]) -> set[str]:
        """Return which batches belong to a run of a job already, or came too late for one."""
        query = """SELECT b.id FROM batches b JOIN runs r ON r.id = b.run_id
            WHERE b.id IN (SELECT value FROM json_each(?)) AND r.job = ?"""
        return {row["id"] for row in self.db.execute(query, (compact_json(list(ids)), job))}

    def one(self, query: str, *parameters: object) -> Any:  # noqa: ANN401 - a value of SQLite's
        """Return the first value of the first row of a query, or None."""
        row = self.db.execute(query, parameters).fetchone()
        return row and row[0]

    def last_event_id(self) -> int:
        return int(self.one("SELECT max(id) FROM events") or 0)

    def events(
        self, *, after: int = 0, name: str | None = None, most: int | None = None
    ) -> list[Event]:
        """Return events with a higher number, of one job or run or of all; the last, in order."""
        about = "" if name is None else "AND job = :job AND (:name = :job OR run = :name)"
        query = f"SELECT * FROM events WHERE id > :after {about} ORDER BY id DESC LIMIT :most"
        values = {"after": after, "name": name, "job": name and name.partition("/")[0]}
        rows = self.db.execute(query, values | {"most": -1 if most is None else most}).fetchall()
        return [Event(**dict(row) | {"fields": json.loads(row["fields"])}) for row in rows[::-1]]

    def stats(self) -> dict[str, SecretStats]:
        """Return how the secrets with trouble fare, by name."""
        failing: dict[str, Any] = self.meta("failing") or {}
        return {name: SecretStats(name, **facts) for name, facts in failing.items()}

    def meta(self, key: str) -> Any:  # noqa: ANN401 - JSON
        text = self.one("SELECT value FROM meta WHERE key = ?", key)
        return None if text is None else json.loads(text)

    @staticmethod
    def meta_statement(key: str, value: object) -> Statement:
        return insert("meta", key=key, value=json.dumps(value))

    def prune(self, jobs: Mapping[str, Job], retention_s: float, now: float) -> None:
        """Drop old events, and finished groups that no list is read back to. Folds the WAL in."""
        # The newest event stays (no number is given twice), and what a webhook has not had yet.
        before, newest = now - retention_s, self.last_event_id()
        told = self.one("SELECT min(told_up_to) FROM webhooks")
        most = min(newest - 1, newest if told is None else told)
        drop_events = "DELETE FROM events WHERE id <= ? AND (at < ? OR id <= ?)"
        statements: list[Statement] = [(drop_events, (most, before, newest - 200_000))]
        old = """SELECT id FROM runs WHERE job = ? AND phase = 'finished' AND finished_at < ?
            AND attention = '' AND NOT EXISTS (SELECT 1 FROM batches b
                WHERE b.run_id = runs.id AND coalesce(b.created_at, 9e99) >= ?)"""
        for name in [name for name, job in jobs.items() if job.match]:
            read_to = (self.meta(f"read:{name}") or {}).get("to", 0.0)
            about = (name, before, max(jobs[name].since, read_to - 2 * HOUR_S))
            statements.append((f"DELETE FROM batches WHERE run_id IN ({old})", about))
            statements.append((f"DELETE FROM runs WHERE id IN ({old})", about))
        self.execute(statements)
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("PRAGMA wal_checkpoint(PASSIVE)")


# ==================================================================================================
# 6. Http and Keboola: requests out, facts or an ApiError back
# ==================================================================================================

PATIENCE_S: Final = 10.0  # the longest wait for one retry; whatever takes longer is scheduled


def as_dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def text_or_none(value: object, limit: int = 300) -> str | None:
    """Return a text, the message of an object, or the first of a list's, as one clean line."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, dict):
        value = value.get("message") or value.get("msg")
    return one_line(value, limit) or None if isinstance(value, str) else None


def count_or_none(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e15 else None


def time_or_none(value: object) -> float | None:
    """Return a JSON number as Unix seconds of this age, or None for anything else."""
    count = count_or_none(value)
    return float(count) if count and count < 4e9 else None


def id_text(value: object) -> str:
    """Return one of Keboola's ids, which come as text or number, or "" for anything else."""
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return one_line(str(value), 64) if is_id else ""


def parse_batch(data: object, batch_id: str) -> Batch:
    """Return a batch of OpenAI, or of what is like it. Raises ValueError for what is none."""
    if not isinstance(data, dict):
        raise ValueError("is not an object")
    status = text_or_none(data.get("status"), 64) if isinstance(data.get("status"), str) else None
    if not status:
        raise ValueError("has no status")
    status = status.lower().replace("canceled", "cancelled")
    if data.get("id") is not None and data["id"] != batch_id:
        raise ValueError("has another id")
    counts, errors = as_dict(data.get("request_counts")), data.get("errors")
    names = ("total", "completed", "failed")
    facts: dict[str, Any] = {name: count_or_none(counts.get(name)) for name in names}
    for key in ("output_file_id", "error_file_id"):  # they are never cut
        value = data.get(key)
        facts[key] = value if isinstance(value, str) and value else None
        if facts[key] and (len(facts[key]) > 4096 or not facts[key].isprintable()):
            raise ValueError(f"has a {key} that is no id ({len(facts[key]):,} characters)")
    ended = (data.get(f"{name}_at") for name in (status, "completed", "failed", "expired"))
    ended_at = next(filter(None, map(time_or_none, ended)), None)
    return Batch(
        batch_id,
        status,
        **facts,
        created_at=time_or_none(data.get("created_at")),
        expires_at=time_or_none(data.get("expires_at")),
        ended_at=ended_at if STATUS_RANK.get(status) == 3 else None,
        error=text_or_none(errors.get("data") if isinstance(errors, dict) else errors),
    )


class TooLargeError(ApiError):
    """An answer of over 16 MiB."""


class DaemonThreads(ThreadPoolExecutor):
    """Gives each call a thread: nothing waits for what a dead resolver takes 25 s for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                future.set_exception(error)

        future.set_running_or_notify_cancel()
        threading.Thread(target=run, daemon=True).start()
        return future


class ProxyRules:
    """What the environment says of proxies; `$NO_PROXY` also with networks, ports and brackets."""

    def __init__(self) -> None:
        self.unreadable: list[str] = []  # entries of $NO_PROXY
        self._proxies = urllib.request.getproxies()
        self._domains: list[str] = []  # each with its dot; "" is all of them
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in self._proxies.pop("no", "").replace(",", " ").split():
            text = re.sub(r"\]:[0-9]+$|[\[\]]", "", entry.lower())
            domain = re.fullmatch(r"\*|[*.]{0,2}([a-z0-9_-][a-z0-9._-]*)(:[0-9]+)?", text)
            try:
                if domain:
                    self._domains.append(f".{domain[1]}" if domain[1] else "")
                else:
                    self._networks.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                self.unreadable.append(entry)

    def proxy_for(self, url: str) -> str | None:
        """Return the proxy for an address; loopback never has one."""
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        if not proxy or is_loopback(url) or f".{host}".endswith(tuple(self._domains)):
            return None
        with contextlib.suppress(ValueError):
            if any(ipaddress.ip_address(host) in network for network in self._networks):
                return None
        return proxy if "://" in proxy else f"http://{proxy}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response, without secrets."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:  # noqa: ANN401 - JSON
        """Return the body as JSON. Raises ApiError (retryable) where it is something else."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            kind = one_line(self.headers.get("content-type", "no content type"), 60)
            raise self.error(f"an answer that is not JSON ({kind})", retryable=True) from None

    def words(self) -> str:
        """Return the message in the body, in any of the forms in which servers write it."""
        data: dict[str, Any] = {}
        with contextlib.suppress(ApiError):
            data = as_dict(self.json())
        found = [text_or_none(data.get(key)) for key in ("error", "message", "reason", "detail")]
        words = next((f": {text}" for text in found if text and text != "error"), "")
        if words and data.get("status") == "maintenance":
            words = f": maintenance{words}"
        exception_id = text_or_none(data.get("exceptionId"), 100)
        return f"{words} (exceptionId {exception_id})" if exception_id else words

    def date(self, header: str) -> float | None:
        """Return a date in a header (RFC 9110, each of its three forms) as Unix seconds."""
        try:
            at = email.utils.parsedate_to_datetime(self.headers.get(header, ""))
            return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
        except (ValueError, TypeError, OverflowError):
            return None

    def error(self, message: str, *, retryable: bool = False) -> ApiError:
        """Return what is wrong with the answer, and how long the server asks to wait."""
        asked_s = None
        if until := self.date("retry-after"):  # compared with the server's own clock
            asked_s = max(0.0, until - (self.date("date") or time.time()))
        for name, unit in (("retry-after", 1), ("retry-after-ms", 1000)):
            if re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", text := self.headers.get(name, "").strip()):
                asked_s = float(text) / unit
        message = f"{message}, with status {self.status}" if self.is_success else message
        request_id = one_line(self.headers.get("x-request-id", ""), 100)
        return ApiError(message, self.status, retryable, asked_s, request_id=request_id)


class Http:
    """The one way out: a limit, a deadline for whole requests, a cap on answers, redaction."""

    def __init__(self, config: Config, redactor: Redactor) -> None:
        self.rules = ProxyRules()
        self._redactor = redactor
        self._clients: dict[tuple[str | None, str], httpx.AsyncClient] = {}  # see `_client`
        self._tls: ssl.SSLContext | None = None  # takes tens of milliseconds to make: one for all
        self.configure(config)
        # httpcore imports sniffio several times a request, to tell asyncio from trio. Where it is
        # missing, each time is a search through all of sys.path: a fifth of the CPU.
        if importlib.util.find_spec("sniffio") is None:
            sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type] # "not there"

    def configure(self, config: Config) -> None:
        """Take new limits; requests in flight keep theirs."""
        self.timeout_s = config.request_timeout
        self.max_concurrency = config.max_concurrency
        self._places = asyncio.Semaphore(config.max_concurrency)

    def _client(self, method: str, url: str) -> httpx.AsyncClient:
        key = (self.rules.proxy_for(url), method)
        if key not in self._clients:
            # A kept connection that the server is about to close looks like a lost answer.
            kept = 0 if method == "POST" else 10
            self._tls = self._tls or httpx.create_ssl_context()
            self._clients[key] = httpx.AsyncClient(
                verify=self._tls,
                proxy=key[0],
                trust_env=False,  # `rules` is what the environment says
                timeout=None,  # noqa: S113 - `_fetch` has a deadline for the whole
                follow_redirects=False,  # a redirect would carry the token to another host
                headers={
                    "User-Agent": f"teckochecker/{__version__}",
                    "Accept-Encoding": "identity",
                },
                limits=httpx.Limits(max_keepalive_connections=kept, keepalive_expiry=30),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # takes none
            )
        return self._clients[key]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    async def get(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str], timeout_s: float
    ) -> Answer:
        parts = {"headers": headers, "params": params or None}
        return await self._fetch("GET", url, max(1.0, timeout_s), parts)

    async def post(
        self, url: str, headers: Mapping[str, str], body: str, timeout_s: float = math.inf
    ) -> Answer:
        return await self._fetch("POST", url, timeout_s, {"headers": headers, "content": body})

    async def _fetch(
        self, method: str, url: str, timeout_s: float, parts: Mapping[str, Any]
    ) -> Answer:
        """Return the whole answer. Raises ApiError, which tells if the server may know of it."""
        # httpx's own time-outs are per read, which a drip of bytes outlives.
        timeout_s = min(self.timeout_s, timeout_s)
        body, events = bytearray(), list[str]()

        async def trace(event: str, _: object) -> None:
            events.append(event)

        # Beside httpx's own: a bad header, no certificates, a closed client, a SOCKS proxy.
        local_errors = (ValueError, OSError, RuntimeError, ImportError)
        parts = {**parts, "extensions": {"trace": trace}}
        try:
            stream = self._client(method, url).stream(method, url, **parts)
            async with self._places, asyncio.timeout(timeout_s), stream as response:
                if response.headers.get("content-encoding", "").lower() not in {"", "identity"}:
                    message = "the answer has an encoding that was not asked for"
                    raise ApiError(message, status=response.status_code)
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_FILE_BYTES:
                        raise TooLargeError("the answer is over 16 MiB", retryable=True)
            headers = {name: self._redactor.text(text) for name, text in response.headers.items()}
            clean = self._redactor.body(bytes(body), is_data=response.is_success)
            return Answer(response.status_code, headers, clean)
        except TimeoutError:
            message = f"no whole answer within {show_duration(timeout_s)}"
        except (httpx.HTTPError, httpx.InvalidURL, *local_errors) as error:
            text = one_line(self._redactor.text(str(error)), 200)  # in this order: no half a secret
            message = f"{type(error).__name__}: {text}" if text else type(error).__name__
            if "CERTIFICATE" in text or isinstance(error, FileNotFoundError):
                message += "; where a proxy inspects TLS, SSL_CERT_FILE names its authority's file"
        sent = any(event.endswith("send_request_headers.started") for event in events)
        raise ApiError(message, retryable=True, sent=sent)


@dataclass(eq=False)
class Client:
    """A server, asked with one secret; `note` is told of each request's error, or None."""

    entry: SecretEntry
    token: Secret
    http: Http
    clock: Clock
    note: Callable[[ApiError | None], None]
    server = ""  # its name in messages

    def __post_init__(self) -> None:
        self.name = self.entry.name
        self._skew_s = 0.0  # how far the server's clock is ahead of ours

    async def _checked(self, request: Awaitable[Answer]) -> Answer:
        """Return a successful answer. Raises ApiError with the server's words for another one."""
        try:
            answer = await request
            if date := answer.date("date"):
                self._skew_s = date - self.clock.now()
            if not answer.is_success:
                retryable = answer.status in {408, 409, 429} or not 400 <= answer.status < 500
                asked = answer.headers.get("x-should-retry", "")
                retryable = {"true": True, "false": False}.get(asked, retryable)
                message = f"{self.server} answered {answer.status}{answer.words()}"
                raise answer.error(message, retryable=retryable)
        except ApiError as error:
            self.note(error)
            raise
        self.note(None)
        return answer

    @staticmethod
    async def retried(attempt: Callable[[float], Awaitable[Any]]) -> Any:  # noqa: ANN401
        """Return what `attempt(seconds left)` does, repeated while that may help; else raise."""
        until = time.monotonic() + MINUTE_S
        exponential = tenacity.wait_exponential(0.5, max=8) + tenacity.wait_random(0, 0.5)

        def wait(state: tenacity.RetryCallState) -> float:
            asked_s = getattr(state.outcome and state.outcome.exception(), "retry_after_s", None)
            return exponential(state) if asked_s is None else float(asked_s)

        def stop(state: tenacity.RetryCallState) -> bool:
            left_s = min(PATIENCE_S, until - 1 - time.monotonic())
            return state.upcoming_sleep > left_s or state.attempt_number >= 4

        # Only ApiError: cancellation must get through.
        retry = tenacity.retry_if_exception(lambda e: isinstance(e, ApiError) and e.retryable)

        @tenacity.retry(retry=retry, wait=wait, stop=stop, reraise=True)
        async def next_attempt() -> Any:  # noqa: ANN401
            return await attempt(until - time.monotonic())

        return await next_attempt()


class Keboola(Client):
    """One stack and token. Source: Keboola's API documents, Job Queue API and Storage API."""

    server = "Keboola"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stack_url = self.entry.stack_url
        self.unreadable: dict[str, ApiError] = {}  # old jobs that answered 403 or 404
        self._project = ""
        self._queue_url = ""
        self._headers = {"X-StorageApi-Token": self.token.reveal()}
        self._carried: dict[str, str] = {}  # job id -> trigger id, of rows that did not tell
        # Of each configuration: when the last search began, from when on, its jobs without those
        # that are another's, and why it is incomplete.
        self._searches: dict[str, tuple[BootTime, float, list[KeboolaJob], ApiError | None]] = {}
        self._locks = collections.defaultdict[str, asyncio.Lock](asyncio.Lock)

    async def _get(self, url: str, params: Mapping[str, str]) -> Any:  # noqa: ANN401 - JSON
        async def attempt(left_s: float) -> Any:  # noqa: ANN401
            try:
                got = self.http.get(url, self._headers, params, left_s)
                return (await self._checked(got)).json()
            except ApiError as error:
                error.sent = False  # a GET starts nothing
                if isinstance(error, TooLargeError):
                    error.retryable = False  # a smaller page is asked for
                raise

        return await self.retried(attempt)

    async def _storage(self, path: str) -> dict[str, Any]:
        return as_dict(await self._get(f"{self.stack_url}/v2/storage{path}", {}))

    async def queue_url(self) -> str:
        """Return the queue's address: by the stack's name, or as the stack's index says."""
        parts = urllib.parse.urlsplit(self.stack_url.lower())
        if parts.netloc.startswith("connection."):
            return f"{parts.scheme}://queue.{parts.netloc.removeprefix('connection.')}"
        if not self._queue_url:
            services = (await self._storage("")).get("services")
            found = map(as_dict, services if isinstance(services, list) else ())
            urls = (str(s.get("url")).rstrip("/") for s in found if s.get("id") == "queue")
            url = next(urls, "")
            if url_problem(url) or is_loopback(url) > is_loopback(self.stack_url):
                message = f"{self.stack_url}/v2/storage lists no usable https address of the queue"
                raise ApiError(message, sent=False)
            self._queue_url = url
        return self._queue_url

    async def verify(self) -> dict[str, Any]:
        return await self._storage("/tokens/verify")

    async def project(self) -> str:
        """Return the id of the token's project; asked once. Raises ApiError."""
        if not self._project:
            self._project = id_text(as_dict((await self.verify()).get("owner")).get("id"))
            if not self._project:
                message = f"{self.stack_url} does not say which project the token belongs to"
                raise ApiError(message, sent=False)
        return self._project

    async def configuration(self, target: Target) -> dict[str, Any]:
        branch = f"/branch/{target.branch_id}" if target.branch_id else ""
        path = f"{branch}/components/{target.component_id}/configs/{target.config_id}"
        return await self._storage(path)

    @staticmethod
    def _parse_job(row: object, what: str) -> KeboolaJob:
        """Return a job of the queue. Raises ApiError, which begins with `what`, if it is none."""
        if not isinstance(row, dict):
            raise ApiError(f"{what} is not an object")
        if not (job_id := id_text(row.get("id"))):
            raise ApiError(f"{what} has no id")
        created = None
        with contextlib.suppress(ValueError, OverflowError):
            at = datetime.fromisoformat(str(row.get("createdTime")))
            at = at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)
            created = at if at.year < 9999 else None
        status, is_finished = text_or_none(row.get("status"), 64), row.get("isFinished")
        if not isinstance(is_finished, bool):
            is_finished = status in {"success", "warning", "error", "terminated", "cancelled"}
        project = id_text(as_dict(row.get("project")).get("id"))
        result = as_dict(row.get("result"))
        message = text_or_none(result.get("message"), 1000)
        if exception_id := text_or_none(as_dict(result.get("error")).get("exceptionId")):
            message = f"{message or 'no message'} (exceptionId {exception_id})"
        variables = row.get("variableValuesData")
        values = variables.get("values") if isinstance(variables, dict) else variables
        trigger = None  # it does not tell
        if isinstance(values, list) and values:
            ours = [v for v in map(as_dict, values) if v.get("name") == "teckochecker_trigger_id"]
            trigger = str(ours[0].get("value")) if ours else ""
        return KeboolaJob(job_id, status, is_finished, project, message, created, trigger)

    async def create(self, payload: str) -> KeboolaJob:
        """Start a job, in one attempt. A 2xx without a readable id is an ApiError too."""
        headers = {**self._headers, "Content-Type": "application/json"}
        url = f"{await self.queue_url()}/jobs"
        answer = await self._checked(self.http.post(url, headers, payload))
        what = f"Keboola's answer is not a job{answer.words()}: it"
        return self._parse_job(answer.json(), what)

    async def job(self, job_id: str) -> KeboolaJob:
        """Return a job. Raises ApiError, with status 404 where it was deleted."""
        url = f"{await self.queue_url()}/jobs/{urllib.parse.quote(job_id, safe='')}"
        return self._parse_job(await self._get(url, {}), f"Keboola's job {job_id}")

    async def search(
        self, target: Target, since: float, trigger: str
    ) -> tuple[BootTime, list[KeboolaJob]]:
        """Return when a search began, and the jobs that carry a trigger id, the oldest first.

        That there is none is said only after a complete search that began after the call.
        """
        asked = self.clock.boot_time()
        since -= since % HOUR_S  # so that runs of about the same time share one search
        key = f"{target.component_id} {target.config_id}"
        async with self._locks[key]:  # all who asked before a search began go by it
            began, from_s, jobs, failure = self._searches.get(key, (asked, math.inf, [], None))
            is_fresh = began.uptime_s >= asked.uptime_s and from_s <= since
            if not is_fresh and not self._carriers(jobs, trigger):
                began, jobs, failure = self.clock.boot_time(), [], None
                try:
                    await self._read_pages(target, since, jobs)
                except ApiError as error:
                    failure = error
                self._searches[key] = began, since, jobs, failure
            ours = self._carriers(jobs, trigger)
            if not ours and failure:
                raise failure
            return began, ours

    async def recent(self, target: Target, trigger: str) -> list[KeboolaJob]:
        """Return what the deprecated list of jobs shows of a run; it may be ahead of the search."""
        params = {"component": target.component_id, "config": target.config_id, "limit": "100"}
        return self._carriers(await self._list_jobs("jobs", params), trigger)

    def _carriers(self, jobs: Iterable[KeboolaJob], trigger: str) -> list[KeboolaJob]:
        ours = [job for job in jobs if trigger in {job.trigger_id, self._carried.get(job.id)}]
        never = datetime.max.replace(tzinfo=UTC)
        return sorted(ours, key=lambda job: (job.created_time or never, len(job.id), job.id))

    async def _list_jobs(self, path: str, params: Mapping[str, str]) -> list[KeboolaJob]:
        rows = await self._get(f"{await self.queue_url()}/{path}", params)
        if not isinstance(rows, list):
            raise ApiError("Keboola's job list is not a list")
        return [self._parse_job(row, "a row of Keboola's job list") for row in rows]

    async def _read_pages(self, target: Target, since_s: float, found: list[KeboolaJob]) -> None:
        """Add what may be ours, newest first. Raises ApiError where that is not all of it."""
        since = datetime.fromtimestamp(max(0, int(since_s + self._skew_s)), UTC)
        params = {
            "componentId": target.component_id,
            "configId": target.config_id,
            "sortBy": "createdTime",
            "sortOrder": "desc",
            "createdTimeFrom": since.isoformat(),
        }
        seen, before = set[str](), list[str]()  # ids: of all pages, of the page before
        limit, offset, longest = 500, 0, 0  # the longest page: a server may cap `limit` lower
        for _ in range(200):
            try:
                paging = {"limit": str(limit), "offset": str(offset)}
                jobs = await self._list_jobs("search/jobs", params | paging)
            except TooLargeError:
                if limit == 1:
                    raise
                limit, longest = limit // 2, 0
                continue
            longest = max(longest, len(jobs))
            fresh = [job for job in jobs if job.id not in seen]
            seen |= {job.id for job in fresh}
            found += [job for job in fresh if job.trigger_id != ""]
            await self._read_silent(fresh)
            ids = [job.id for job in jobs]
            has_no_offset = offset > 0 and ids == before and len(jobs) < limit
            if not jobs or (not fresh and (len(jobs) < longest or has_no_offset)):
                return
            before = ids
            times = [job.created_time for job in jobs if job.created_time]
            is_sorted = len(times) == len(jobs) and times == sorted(times, reverse=True)
            if fresh and is_sorted:
                # A second of overlap: rows of one second may stand on both sides of a page's end.
                params["createdTimeTo"] = (min(times) + timedelta(seconds=1)).isoformat()
                offset = 0
            else:
                offset += len(jobs)
        raise ApiError("Keboola's job list does not end after 200 pages")

    async def _read_silent(self, jobs: Iterable[KeboolaJob]) -> None:
        """Read the jobs whose rows did not tell, once; what answers 403 or 404 is another's."""

        async def read(job_id: str) -> None:
            try:
                self._carried[job_id] = (await self.job(job_id)).trigger_id or ""
            except ApiError as error:
                if error.status not in {403, 404}:
                    raise
                self._carried[job_id], self.unreadable[job_id] = "", error

        silent = [j.id for j in jobs if j.trigger_id is None and j.id not in self._carried]
        await asyncio.gather(*map(read, silent))


class OpenAI(Client):
    """One OpenAI key. Source: OpenAI's API reference, `GET /batches/{id}` and `GET /batches`."""

    server = "OpenAI"

    def __post_init__(self) -> None:
        super().__post_init__()
        bearer = "Bearer " if self.entry.auth_header == "Authorization" else ""
        headers = {
            self.entry.auth_header: f"{bearer}{self.token.reveal()}",
            "OpenAI-Organization": self.entry.organization,
            "OpenAI-Project": self.entry.project,
        }
        self._headers = {name: value for name, value in headers.items() if value}
        version = self.entry.api_version
        self._params = {"api-version": version} if version else {}
        self.answered_at: dict[str, float] = {}  # uptime of unfinished batches' last own answers
        self._held_until, self._held_by = -math.inf, ApiError("")  # uptime; the last 429

    async def _get(self, path: str, params: Mapping[str, str], left_s: float) -> Answer:
        url, all_params = f"{self.entry.base_url}{path}", {**self._params, **params}
        return await self._checked(self.http.get(url, self._headers, all_params, left_s))

    def refusal(self) -> ApiError | None:
        """Return what the account waits for, and how long, where it does."""
        left_s = self._held_until - self.clock.uptime_s()
        if left_s <= 0:
            return None
        return ApiError(str(self._held_by), 429, retryable=True, retry_after_s=left_s)

    async def ask(self, batch_id: str) -> Batch:
        """Return a batch's own answer, the one that counts. Raises ApiError after the retries."""

        async def attempt(left_s: float) -> Batch:
            if refusal := self.refusal():
                raise refusal
            try:
                answer = await self._get(f"/batches/{batch_id}", {}, left_s)
                return parse_batch(answer.json(), batch_id)
            except ValueError as error:
                message = f"OpenAI's answer is not a batch: it {error}{answer.words()}"
                raise answer.error(message, retryable=True) from None
            except ApiError as error:
                until = self.clock.uptime_s() + min(error.retry_after_s or 0.0, HOUR_S)
                if error.status == 429 and until > self._held_until:
                    self._held_until, self._held_by = until, error
                if error.status == 404:
                    causes = "the batch was deleted, or the key belongs to another OpenAI project"
                    error.message = f"{str(error).rstrip('.')}: {causes}, or base_url is wrong"
                raise

        batch: Batch = await self.retried(attempt)
        self.answered_at[batch_id] = self.clock.uptime_s()
        if batch.is_terminal:
            del self.answered_at[batch_id]
        return batch

    async def page(self, cursor: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return a page of the list, and if more come. Not retried: single requests can do it."""
        params = {"limit": "100"} | ({"after": cursor} if cursor else {})
        answer = await self._get("/batches", params, math.inf)
        data = answer.json()
        rows = data.get("data") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise answer.error(f"OpenAI's answer is not a list{answer.words()}", retryable=True)
        good = [r for r in rows if isinstance(r, dict) and isinstance(r.get("id"), str) and r["id"]]
        return good, bool(good) and data.get("has_more") is not False


# ==================================================================================================
# 7. Engine: what runs
# ==================================================================================================


class LogWriter:
    """Writes lines to standard error from a thread of its own; what does not fit is counted.

    So a reader that is slow, full or gone never holds up the loop.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(10_000)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            hint = "allow more (TasksMax=, ulimit -u)"
            raise TeckoError(f"cannot go on: {error}", hint) from None

    def msg(self, line: str) -> None:
        try:
            if self._dropped:
                self._lines.put_nowait(f"({self._dropped} lines of the log were dropped)")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = error = msg  # structlog calls a logger by the level's name

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data) :]

    def close(self) -> None:
        """Wait a moment until what was written has arrived."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(1.0)


class LibraryLog(logging.Handler):
    """Passes on what a library has to say."""

    def emit(self, record: logging.LogRecord) -> None:
        text = one_line(record.getMessage(), 100_000)  # not cut: half a token would not be known
        say(Event.of("library_warning", logger=record.name, message=text))


def configure_logging(config: Config, redactor: Redactor, writer: LogWriter) -> None:
    """Send events, and the warnings of libraries, to standard error through one redactor."""
    is_console = {"console": True, "json": False}.get(config.log_format, os.isatty(2))
    status = os.fstat(2)
    is_journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    priorities = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}

    def render(_: object, level: str, line: Mapping[str, Any]) -> str:
        head = {name: line[name] for name in ("time", "level", "event", "text")}
        told = redactor.tree(head | dict(line))  # the last before the line is made
        prefix = priorities[level] if is_journal else ""
        if not is_console:
            return prefix + json.dumps(told, ensure_ascii=False)
        mark = "" if level == "info" else f"{level}: "
        return "\n".join(
            (f"{prefix}{told['time']} {mark}{told['text']}", *told.get("traceback", ()))
        )

    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,
    )
    logging.getLogger().handlers = [LibraryLog()]
    logging.getLogger().setLevel(logging.WARNING)  # httpx logs URLs at INFO, httpcore headers
    threads = logging.getLogger("concurrent.futures")
    threads.setLevel(logging.CRITICAL)  # DaemonThreads: results that nobody awaits


def say(event: Event) -> None:
    """Write one event to the log."""
    document = replace(event, at=event.at or time.time()).document()
    getattr(structlog.get_logger(), event.level)(document.pop("event"), **document)


class ServiceManager:
    """The service manager's side of the process (sd_notify(3)); silent where there is none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address, watchdog_us = env.get("NOTIFY_SOCKET", ""), env.get("WATCHDOG_USEC", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self.watchdog_s = int(watchdog_us) / 1e6 if watchdog_us.isdigit() else math.inf

    def send(self, *lines: str) -> None:
        if self._address:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
            ):
                out.sendto("\n".join(lines).encode(), self._address)


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until an event is set or a time has passed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()


# --- one OpenAI account ---------------------------------------------------------------------------

Poll = tuple[int, Mapping[str, Batch | ApiError], float]  # a run's number, answers, when it began


def creation_times(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    return [at for row in rows if (at := time_or_none(row.get("created_at")))]


def row_of(row: Mapping[str, Any]) -> Row:
    """Return a row of the list for finding; that it is finished, or unreadable, is only a hint."""
    batch = Batch(row["id"], created_at=time_or_none(row.get("created_at")))
    with contextlib.suppress(ValueError):
        if not (read := parse_batch(row, batch.id)).is_terminal:
            batch = read
    pairs = as_dict(row.get("metadata")).items()
    texts = {key: value for key, value in pairs if isinstance(value, str)}
    # SQLite stores no lone surrogate, and its JSON ends at a NUL: no such value is one of ours.
    return Row(batch, {k: v for k, v in texts.items() if not re.search("[\0\ud800-\udfff]", v)})


@dataclass(slots=True)
class ListReading:
    """What one poll has learnt of an account's list so far."""

    due: Mapping[str, Batch]  # what is to be shown
    known: Mapping[str, Batch]  # with the finished batches of the same runs
    unchanged: dict[str, Batch] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)  # these are asked for by themselves
    pages: int = 0
    span_s: float = 3 * MINUTE_S  # how long the batches of a page have taken to be created
    is_stale: bool = False
    goes_on: bool = False  # the last page showed due batches near its end

    def missing(self) -> list[Batch]:
        """Return the due batches that no page has shown, the newest first.

        Of one second, the last of a job's ids is taken for the newest: so people write them.
        """
        shown = self.unchanged.keys() | self.changed
        missing = [self.due[key] for key in reversed([*self.due]) if key not in shown]
        return sorted(missing, key=lambda batch: -(batch.created_at or 0.0))

    @property
    def is_complete(self) -> bool:
        return len(self.unchanged) + len(self.changed) >= len(self.due)

    @property
    def overhead(self) -> int:
        """How many requests pages have cost beyond what they have saved."""
        return self.pages - len(self.unchanged)

    def read_page(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Note what a page shows; returns how many due batches."""
        due = [place for place, row in enumerate(rows) if row["id"] in self.due]
        self.goes_on = bool(due) and due[-1] >= len(rows) * 3 // 4
        self.pages += 1
        for row in rows:
            if known := self.known.get(row["id"]):
                self._read_row(row, known)
        if len(ages := creation_times(rows)) > 1:
            self.span_s = max(ages) - min(ages)
        return len(due)

    def _read_row(self, row: Mapping[str, Any], known: Batch) -> None:
        status = str(row.get("status")).lower()
        rank, known_rank = STATUS_RANK.get(status), STATUS_RANK.get(known.status or "")
        if rank is not None and known_rank is not None and rank < known_rank:
            self.is_stale = True
        if known.id not in self.due:
            return
        if known.status is None and rank is not None and rank < 3:
            self.unchanged[known.id] = row_of(row).batch
        elif status != known.status or known.is_terminal:
            self.changed.add(known.id)
        else:
            counts = as_dict(row.get("request_counts"))
            if counts.get("completed") not in {None, known.completed}:
                names = ("total", "completed", "failed")
                told: dict[str, Any] = {name: count_or_none(counts.get(name)) for name in names}
                known = replace(known, **told) if None not in told.values() else known
            self.unchanged[known.id] = known


class Account(OpenAI):
    """One OpenAI key: polls the batches of its runs, and finds new ones.

    Due batches are polled together. Pages of the account's list are a hint and save requests; what
    counts is a batch's own answer. A request that hangs is left to its deadline while the loop goes
    on. A poll takes at most two requests more than single GETs would, apart from the pages that new
    batches are looked for on.
    """

    def __init__(self, engine: Engine, entry: SecretEntry, key: Secret) -> None:
        note = functools.partial(engine.note_request, entry.name)
        super().__init__(entry, key, engine.http, engine.clock, note)
        self.identity = key, entry
        self.run_ids: set[int] = set()  # of the runs that it polls
        self.finders: list[Job] = []  # the jobs that it finds batches for
        self.wake = asyncio.Event()
        self.until = math.inf  # when `run` sees again what is due
        self.find_at = -math.inf
        self._engine = engine
        self._places = asyncio.Semaphore(engine.http.max_concurrency)  # before those of all
        self._busy: set[int] = set()  # runs that are being polled
        self._complete: list[Poll] = []
        self._list_from = -math.inf  # uptime from which pages may save requests again
        self._list_failures = 0
        self._find_failures = 0

    def configure(self, finders: Sequence[Job]) -> None:
        """Take a new config: the runs are told one by one; what is to be found may be other now."""
        self.run_ids.clear()
        self._places = asyncio.Semaphore(self._engine.http.max_concurrency)
        self.finders = list(finders)
        self.find_at = -math.inf
        self.wake.set()

    async def run(self) -> None:
        """Poll what is due, and find what is new, until cancelled."""
        engine, clock = self._engine, self._engine.clock
        while not engine.is_stopping:
            self.wake.clear()
            now = clock.now()
            idle = [engine.runs[i] for i in self.run_ids - self._busy]
            is_finding = bool(self.finders) and self.find_at <= now
            if is_finding or any(run.next_at <= now for run in idle):
                interval_s = {r.id: engine.loaded.config.jobs[r.job].poll_interval for r in idle}
                early_s = {i: min(MINUTE_S, seconds / 10) for i, seconds in interval_s.items()}
                due = [run for run in idle if run.next_at <= now + early_s[run.id]]
                try:
                    await self._poll(due, is_finding=is_finding)
                except Exception as error:  # noqa: BLE001 - trouble of one account is not the others'
                    engine.note_failure(error, self.name)
                    self._busy -= {run.id for run in due}
                    self.find_at = clock.now() + 5
                    await asyncio.sleep(1)
            waiting = [engine.runs[i].next_at for i in self.run_ids - self._busy]
            self.until = min([*waiting, self.find_at if self.finders else math.inf])
            # A suspended machine's timers stand still: none is longer than half a minute.
            await wait_for_event(self.wake, min(30.0, self.until - clock.now()))

    async def run_once(self) -> None:
        """Poll all runs once, and those that are found meanwhile."""
        engine, polled, is_finding = self._engine, set[int](), bool(self.finders)
        while (new := self.run_ids - polled) or is_finding:
            polled |= new
            try:
                polls = await self._poll([engine.runs[i] for i in new], is_finding=is_finding)
                await asyncio.gather(*polls)
                self._record()
            except Exception as error:  # noqa: BLE001 - trouble of one account is not the others'
                engine.note_failure(error, self.name)
            is_finding = False

    async def _poll(self, runs: Sequence[Run], *, is_finding: bool) -> list[asyncio.Task[None]]:
        """Begin the poll of some runs; each ends when its batches have answered."""
        known = {b.id: b for run in runs for b in run.batches}
        reading = ListReading({k: b for k, b in known.items() if not b.is_final}, known)
        began = self._engine.clock.now()
        is_usable = self._list_from <= self._engine.clock.uptime_s() and not self.refusal()
        pays = len(reading.due) >= 5 and is_usable
        self._busy |= {run.id for run in runs}
        if is_finding or pays:
            await self._read_list(reading, pays=pays, finders=self.finders if is_finding else ())
        shown = reading.unchanged if pays and not reading.is_stale else {}
        if shown and reading.overhead <= 1:  # beside a list, the one not asked for longest
            shown.pop(min(shown, key=lambda key: self.answered_at.get(key, -math.inf)))
        polls = []
        for run in runs:
            due = [batch.id for batch in run.batches if not batch.is_final]
            answers: dict[str, Batch | ApiError] = {i: shown[i] for i in due if i in shown}
            if missing := [batch_id for batch_id in due if batch_id not in shown]:
                polls.append(self._engine.spawn(self._ask_all(run.id, missing, answers, began)))
            else:
                self._end_poll((run.id, answers, began))
        return polls

    async def _ask_all(
        self, run_id: int, missing: list[str], answers: dict[str, Batch | ApiError], began: float
    ) -> None:
        """Ask for what no page has shown of a run."""

        async def ask(batch_id: str) -> Batch | ApiError:
            async with self._places:
                try:
                    return await self.ask(batch_id)
                except ApiError as error:
                    return error
                except Exception as error:  # noqa: BLE001 - a bug that one batch meets is not the others'
                    self._engine.note_failure(error, batch_id)
                    return ApiError(f"internal error: {type(error).__name__}")

        came = await asyncio.gather(*map(ask, missing))
        self._end_poll((run_id, answers | dict(zip(missing, came, strict=True)), began))

    def _end_poll(self, poll: Poll) -> None:
        """Have a poll recorded, together with what else has come by then."""
        if not self._complete:
            asyncio.get_running_loop().call_soon(self._record)
        self._complete.append(poll)

    def _record(self) -> None:
        complete, self._complete = self._complete, []
        ids = {run_id for run_id, _, _ in complete}
        self._busy -= ids
        if complete and self._engine.accounts.get(self.name) is self:
            for start in range(0, len(complete), 50):  # a first poll has an event for each batch
                self._engine.record_polls(complete[start : start + 50])
            runs = (self._engine.runs.get(run_id) for run_id in ids)
            if any(run and run.next_at < self.until for run in runs):
                self.wake.set()

    async def _read_list(self, reading: ListReading, *, pays: bool, finders: Sequence[Job]) -> None:
        """Read the pages of the list that are needed to find, and those that save requests.

        To find, it is read back to the newest row that was there at the last complete read, with an
        hour's overlap (a row may show up late) of at most two pages more than what is new; or to
        `since`.
        """
        store, read_to = self._engine.store, dict[str, float]()
        keys = {j.name: compact_json([j.match_key, j.since, j.openai_secret]) for j in finders}
        for job in finders:
            mark = store.meta(f"read:{job.name}") or {}
            read_to[job.name] = mark["to"] if mark.get("key") == keys[job.name] else job.since
        new_to = min(read_to.values(), default=math.inf)
        floors = (max(job.since, read_to[job.name] - HOUR_S) for job in finders)
        floor, newest_at, pages_beyond = min(floors, default=math.inf), 0.0, 0
        waiting = finders  # until the list is read back far enough
        try:
            cursor, seen = None, set[str]()
            while True:
                rows, has_more = await self.page(cursor)
                # A server that knows no `after` shows the same page for ever.
                has_more = has_more and not seen.issuperset(row["id"] for row in rows)
                seen.update(row["id"] for row in rows)
                is_worth_it = reading.read_page(rows) >= 2 and pays and not reading.is_complete
                self._find(finders, rows)
                ages = creation_times(rows) or [0.0]
                newest_at = max(newest_at, *ages)
                pages_beyond += min(ages) <= new_to
                if not has_more or min(ages) <= floor or pages_beyond > 2:
                    newer = [name for name, at in read_to.items() if newest_at > at]
                    marks = {f"read:{n}": {"key": keys[n], "to": newest_at} for n in newer}
                    statements = [Store.meta_statement(*mark) for mark in marks.items()]
                    self._end_finding(waiting, None, statements)
                    waiting = ()  # what fails from here on is none of theirs
                if not (has_more and (waiting or is_worth_it)):
                    break
                cursor = rows[-1]["id"]
            if pays:
                await self._read_clusters(reading)
                self._note_list(None, is_stale=reading.is_stale)
        except ApiError as error:
            self._end_finding(waiting, error)
            if pays:
                self._note_list(error)

    async def _read_clusters(self, reading: ListReading) -> None:
        """Read a page after each batch that others were created close to, while that saves.

        A cursor that the list has lost (400, 404) shows nothing.
        """
        missing = reading.missing()
        while len(missing) > 2 and missing[2].created_at and reading.overhead <= 1:
            first, third = missing[0], missing[2]
            missing = missing[1:]
            is_close = (third.created_at or 0) >= (first.created_at or 0) - reading.span_s
            cursor, shown = first.id, 2
            while is_close and shown >= 2 and reading.overhead <= 1:
                try:
                    rows, has_more = await self.page(cursor)
                except ApiError as error:
                    if error.status not in {400, 404}:
                        raise
                    rows, has_more = [], False
                shown = reading.read_page(rows)
                left = {batch.id for batch in reading.missing()}
                missing = [batch for batch in missing if batch.id in left]
                is_close = has_more and reading.goes_on and bool(missing)
                cursor = rows[-1]["id"] if rows else ""

    def _note_list(self, error: ApiError | None, *, is_stale: bool = False) -> None:
        """Do without the list for a while after a failure, for a day where there is none."""
        engine, was_usable = self._engine, self._list_failures == 0
        if error is None and not is_stale:
            self._list_failures = 0
            engine.log(*([] if was_usable else [Event.of("list_usable", secret=self.name)]))
            return
        self._list_failures += 1
        wait_s = float(DAY_S)
        if error and (error.retryable or error.status == 429):
            jitter = engine.clock.jitter()
            wait_s = backoff_s(self._list_failures, MINUTE_S, jitter, error.retry_after_s)
        self._list_from = engine.clock.uptime_s() + wait_s
        told = """SELECT 1 FROM events WHERE name = 'list_not_usable' AND at > ?
            AND json_extract(fields, '$.secret') = ?"""
        day = engine.clock.now() - DAY_S, self.name
        was_usable = was_usable and not (engine.once and engine.store.one(told, *day))
        if was_usable and not (error and error.status == 429):
            why = error or "it shows older statuses than the batches' own answers"
            engine.log(Event.of("list_not_usable", secret=self.name, error=str(why)))

    def _find(self, finders: Iterable[Job], rows: Sequence[Mapping[str, Any]]) -> None:
        """Have the runs begun or joined that a page's rows belong to."""
        engine, store = self._engine, self._engine.store
        read = [row_of(row) for row in rows] if finders else []
        for job in (job for job in finders if job in self.finders):  # a reload may have come
            mine, key = [row for row in read if row.is_of(job)], job.group_by
            known = store.known_batches(job.name, [row.batch.id for row in mine])
            new = [row for row in mine if row.batch.id not in known]
            if not new:
                continue
            groups = [row.metadata.get(key, "") if key else row.batch.id for row in new]
            runs = store.groups(job.name, groups)
            runs |= {g: engine.runs[r.id] for g, r in runs.items() if r.id in engine.runs}
            target, now = engine.loaded.config.target(job), engine.clock.now()
            engine.record_found(group_batches(job, target, new, runs, now))
            for row, group in zip(new, groups, strict=True):
                told = """SELECT 1 FROM events WHERE job = ? AND name = 'batch_without_group'
                    AND json_extract(fields, '$.batch_id') = ?"""
                if not group and not store.one(told, job.name, row.batch.id):
                    event = Event.of("batch_without_group", batch_id=row.batch.id, group_by=key)
                    text = f"{job.name}: {event.text}"
                    engine.log(replace(event, job=job.name, text=text))

    def _end_finding(
        self, jobs: Sequence[Job], error: ApiError | None, marks: Sequence[Statement] = ()
    ) -> None:
        """Remember how far the list was read back to, completely, or tell why it was not."""
        if not jobs:
            return
        engine, now, key = self._engine, self._engine.clock.now(), f"find_failing:{self.name}"
        wait_s: float = min(job.poll_interval for job in jobs)
        failing_since = engine.store.meta(key)  # also over the passes of --once
        if error is None:
            events = [Event.of("find_recovered", secret=self.name)] if failing_since else []
            also = [*marks, *([Store.meta_statement(key, None)] if failing_since else [])]
            self._find_failures = 0
            engine.note_finding(self.name, None)
            engine.commit([], events, also)
        else:
            self._find_failures += 1
            if failing_since is None:
                event = Event.of("find_failed", secret=self.name, error=str(error))
                engine.commit([], [event], [Store.meta_statement(key, now)])
            elif now - failing_since > LASTING_S:
                engine.note_finding(self.name, error)
            jitter = engine.clock.jitter()
            wait_s = backoff_s(self._find_failures, wait_s, jitter, error.retry_after_s)
        if jobs is self.finders:  # else a reload has come, and brought others
            self.find_at = now + wait_s


# --- one run, from ready to its end ---------------------------------------------------------------

Step = Callable[["Engine", Run], Coroutine[Any, Any, None]]


async def drive_run(engine: Engine, run_id: int) -> None:
    """Take a run from all batches finished to its Keboola job's end; the only one that moves it.

    What matters is committed before the next step begins, so that a process killed anywhere finds
    at its next start what may have happened. After each wait and request everything is checked
    again: a reload or a retry may have come.
    """
    failures = 0
    while (run := engine.runs.get(run_id)) is not None and not engine.is_stopping:
        step, wait_s = next_step(engine, run), run.next_at - engine.clock.now()
        if engine.once and step is follow_run:  # once in a pass
            wait_s = math.inf if run_id in engine.followed else 0.0
        if step is None or (engine.once and wait_s > PATIENCE_S):
            return
        try:
            if wait_s > 0:
                await wait_for_event(engine.wakes[run_id], min(wait_s, 30.0))
                engine.wakes[run_id].clear()
            else:
                await step(engine, run)
            failures = 0
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - trouble of one run is not the others'
            failures += 1
            engine.note_failure(error, run.name, run)
            if engine.once:
                return
            first_s = 1 if isinstance(error, StorageError) else MINUTE_S
            await asyncio.sleep(min(MINUTE_S, backoff_s(failures, first_s, engine.clock.jitter())))


def next_step(engine: Engine, run: Run) -> Step | None:
    """Return what to do next for a run; None: nothing, until a person or the config changes it."""
    may_post = engine.may_post(run)
    match run.phase:
        case Phase.SENT:
            return follow_run
        case Phase.REJECTED if may_post and run.next_at < math.inf:
            return search_and_start
        case Phase.INTENT if may_post or run.sending_at is not None:
            return search_and_start
        case Phase.UNKNOWN:
            return search_and_start
    return None


async def search_and_start(engine: Engine, run: Run) -> None:  # noqa: C901, PLR0912 - one step
    """Search Keboola for a run's job; start it where the search allows that."""
    clock, job, began, keboola = engine.clock, engine.job_of(run), engine.clock.boot_time(), None
    if run.phase is Phase.REJECTED:  # what Keboola said stays until it says something else
        armed = replace(as_intended(run, run.next_at), error=run.error, failures=run.failures)
        return engine.commit([(armed, [])])
    came: Sequence[KeboolaJob] | ApiError
    try:
        if job and run.sending_at is None:  # nothing was sent: what the config says now counts
            its_own = engine.keboolas[job.keboola_secret]
            if (aimed := await aim_run(engine, run, job, its_own)) is None:
                return None
            run, keboola = aimed, its_own
        else:
            keboola = await engine.keboola_for(run)
        since = search_since(run, clock.now())
        began, came = await keboola.search(run.target, since, run.trigger_id)
        if not came and run.posts:  # before a second POST, what may be ahead of the search
            with contextlib.suppress(ApiError):
                came = await keboola.recent(run.target, run.trigger_id)
    except ApiError as error:
        came = error
    if engine.runs.get(run.id) is not run or engine.is_stopping:
        return None  # a reload or a retry has come
    terms, events = engine.terms(run), list[Event]()
    if keboola and (unreadable := keboola.unreadable):
        ids, why = ", ".join([*unreadable][:20]), str(next(iter(unreadable.values())))
        engine.log(Event.of("keboola_job_unreadable", id=ids, error=why))
        unreadable.clear()
    if keboola and engine.keboolas.get(keboola.name) is not keboola:
        return None  # the token is another one now
    if not keboola:  # nobody knows where it would be sent to
        terms = replace(terms, may_post=False)
    if isinstance(came, ApiError) and job and not run.payload:
        # So that a correction of what failed is seen, after a restart too.
        token = engine.loaded.secrets[job.keboola_secret]
        run = as_aimed(run, job, engine.loaded.config.target(job), token)
    if not came and began.uptime_s < engine.empty_counts_from:
        wait_s = engine.empty_counts_from - began.uptime_s
        after = replace(run, next_at=clock.now() + wait_s)
    else:
        after, events = after_search(run, came, began, terms)
    if after.phase is Phase.SENDING and keboola:
        engine.check_in_place()
        engine.commit([(after, events)])  # nothing was awaited since the search was judged
        await post_run(engine, keboola, run.id)
    elif after != engine.runs[run.id]:
        engine.commit([(after, events)])
    return None


async def aim_run(engine: Engine, run: Run, job: Job, keboola: Keboola) -> Run | None:
    """Store what is to be sent, by the config and in the token's project; None after a change.

    Raises ApiError where Keboola does not name the project.
    """
    target = replace(engine.loaded.config.target(job), project=await keboola.project())
    if engine.runs.get(run.id) is not run or engine.job_of(run) is not job:
        return None
    aimed = as_aimed(run, job, target, keboola.token)
    if aimed != run:
        engine.check_in_place()
        facts = {"trigger_id": run.trigger_id, "target": str(target)}
        is_new = not (run.payload and run.target.project)
        engine.commit([(aimed, [Event.of("trigger_intended", run, **facts)] if is_new else [])])
    return engine.runs[run.id]


async def post_run(engine: Engine, keboola: Keboola, run_id: int) -> None:
    """Send a run that was committed as SENDING, and commit what came of it, however long it takes.

    The outcome is known only here; with --once, the next pass finds `sending`, and searches.
    """
    clock, run = engine.clock, engine.runs[run_id]
    came: KeboolaJob | ApiError
    engine.lock.note_post(clock.boot_time())
    engine.posting.add(run_id)
    try:
        try:
            came = await keboola.create(run.payload)
        except ApiError as error:
            came = error
        except Exception as error:  # noqa: BLE001 - whatever it was, it may have been sent
            engine.note_failure(error, run.name, run)
            came = ApiError(f"internal error: {type(error).__name__}")
        give_up_at = clock.uptime_s() + (PATIENCE_S if engine.once else math.inf)
        while True:
            run = engine.runs[run_id]  # a reload may have renamed it meanwhile
            try:
                return engine.commit([after_post(run, came, engine.terms(run))])
            except StorageError as error:
                if clock.uptime_s() > give_up_at:
                    raise
                engine.note_failure(error, run.name, run)
                await asyncio.sleep(1)
    finally:
        engine.posting.discard(run_id)


async def follow_run(engine: Engine, run: Run) -> None:
    """Ask once how a run's Keboola job is."""
    if engine.once:
        engine.followed.add(run.id)
    came: KeboolaJob | ApiError
    try:
        keboola = await engine.keboola_for(run)
    except ApiError as error:  # a 404 here says nothing of the Keboola job
        error.status, came = None, error
    else:
        try:
            came = await keboola.job(str(run.keboola_job_id))
        except ApiError as error:
            came = error
    if engine.runs.get(run.id) is run and not engine.is_stopping:
        engine.commit([after_follow(run, came, engine.terms(run))])


# --- everything -----------------------------------------------------------------------------------

# Of these, a run, a batch or a secret writes at most one a minute. Names begin like this.
FLAPPING: Final = ("batch_status", "poll_", "list_", "find_", "follow_")


def config_changes(config: Config, old: Config | None) -> dict[str, Any]:
    """Return what `config_loaded` tells: which jobs were added, removed and changed."""
    facts: dict[str, Any] = {"sha256": config.sha256, "jobs": len(config.jobs)}
    if old is None:
        return facts | {"changes_text": counted(len(config.jobs), "job")}
    before, after, words = old.jobs, config.jobs, []
    facts["added"] = [name for name in after if name not in before]
    facts["removed"] = [name for name in before if name not in after]
    facts["changed"] = [n for n, job in after.items() if n in before and before[n] != job]
    for kind in ("added", "removed", "changed"):
        first, more = ", ".join(facts[kind][:5]), len(facts[kind]) - 5
        words += [f"{kind} {first}{f' and {more} more' if more > 0 else ''}"] if first else []
    return facts | {"changes_text": "; ".join(words) or "no job changed"}


@dataclass(eq=False)
class Engine:
    """What runs: applies a config, has accounts polled, runs driven, and commits what came of it.

    `apply` takes a new config at any time; `run` works until it is cancelled or, with --once, until
    every unfinished run has had its poll and its step.
    """

    loaded: LoadedConfig
    store: Store
    lock: StateLock
    http: Http
    clock: Clock
    redactor: Redactor
    once: bool = False
    manager: ServiceManager = field(default_factory=lambda: ServiceManager({}))

    def __post_init__(self) -> None:
        self.runs: dict[int, Run] = {}
        self.wakes: dict[int, asyncio.Event] = {}  # of runs that are driven
        self.accounts: dict[str, Account] = {}
        self.keboolas: dict[str, Keboola] = {}
        self.posting: set[int] = set()
        self.followed: set[int] = set()  # with --once: runs whose Keboola job was seen
        self.stats = self.store.stats()
        self.publishing = threading.Lock()
        self.told_up_to: dict[str, int] = {}  # by webhook, also what could not be stored yet
        self.is_stopping = False
        self.has_failed = False  # something could not be written, or a bug was met
        self.config_error: str | None = None
        self.told: list[asyncio.Event] = []  # set whenever something was committed
        self.empty_counts_from = -math.inf  # uptime: an empty search begun earlier says nothing
        self._tasks: asyncio.TaskGroup | None = None
        self._drivers: dict[int, asyncio.Task[None]] = {}
        self._polling: dict[str, asyncio.Task[None]] = {}  # the accounts' loops
        self._current: set[int] = set()  # runs of the batch_ids that the config has now
        self._last_id = int(self.store.one("SELECT max(id) FROM runs") or 0)
        self._pruned_at = self._swept_at = -math.inf
        self._trouble: set[tuple[int | None, str]] = set()  # told, and not over
        self._last_told: dict[tuple[object, ...], float] = {}

    # --- running ---

    async def run(self, helpers: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
        """Work, the daemon with `helpers`. Raises StateError where it could start a job twice."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._look_for_last_post()
                self.apply(self.loaded)
                accounts = [account.run_once for account in self.accounts.values()]
                for work in accounts if self.once else (self._keep_house, *helpers):
                    self.spawn(work())
        except BaseExceptionGroup as group:
            errors: BaseException | None = group.split((TeckoError, sqlite3.Error))[0]
            while isinstance(errors, BaseExceptionGroup):
                errors = errors.exceptions[0]
            raise (errors or group) from None
        finally:
            self._tasks = None

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Start a task that `run` waits for, and whose exception ends it."""
        if self._tasks is None:
            raise RuntimeError("the engine does not run")
        return self._tasks.create_task(work)  # type: ignore[arg-type] # coroutines all

    def _look_for_last_post(self) -> None:
        """Take no empty search for an answer yet where the state file does not know the last POST.

        It was lost or restored; what was posted shows in Keboola's search within the grace.
        """
        posted = self.lock.last_post
        query = "SELECT 1 FROM events WHERE name = 'trigger_sending' AND abs(at - ?) < 2"
        if posted and not self.store.one(query, posted.wall):
            passed_s = posted.until_s(self.clock.boot_time())
            left_s = self.loaded.config.trigger_grace - passed_s
            if left_s > 0:
                self.empty_counts_from = self.clock.uptime_s() + left_s
                self.log(Event.of("state_is_older", wait_s=round(left_s, 1)))

    async def _keep_house(self) -> None:
        """See every two seconds what has changed outside, and what has come to last."""
        self.manager.send("READY=1", f"STATUS={self.summary()}")
        while True:
            self.manager.send("WATCHDOG=1")
            self.check_in_place()
            try:
                if by_s := self.clock.changed():  # every pending time moves with it
                    self.runs = {run.id: shifted(run, by_s) for run in self.runs.values()}
                    self._last_told.clear()
                    for account in self.accounts.values():
                        account.find_at += by_s
                        account.wake.set()
                    self.log(Event.of("clock_changed", seconds=round(by_s)))
                self.take_requests()
                self.sweep()
            except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
                self.note_failure(error, "housekeeping")
            await asyncio.sleep(min(2.0, self.manager.watchdog_s / 3))

    def sweep(self) -> None:
        """Tell what needs attention because it has lasted; once an hour, drop what is old."""
        now = self.clock.uptime_s()
        if now - self._swept_at >= 5:
            self._swept_at = now
            self.lock.touch()
            self.manager.send(f"STATUS={self.summary()}")
            changes = [self._with_attention(run) for run in self.runs.values()]
            self.commit([change for change in changes if change[1]])
        if now - self._pruned_at >= HOUR_S:
            self._pruned_at = now
            config, wall = self.loaded.config, self.clock.now()
            self.store.prune(config.jobs, config.retention, wall)
            told = self._last_told.items()
            self._last_told = {key: at for key, at in told if at > wall - MINUTE_S}
            self._drivers = {i: task for i, task in self._drivers.items() if not task.done()}
            self.wakes = {i: wake for i, wake in self.wakes.items() if i in self._drivers}

    async def drain(self, hurry: asyncio.Event) -> None:
        """Begin nothing new, and give POSTs in flight up to 20 s; `hurry` cuts it short."""
        self.is_stopping = True
        for task in self._polling.values():
            task.cancel()
        until = self.clock.uptime_s() + 20
        while self.posting and self.clock.uptime_s() < until and not hurry.is_set():
            await wait_for_event(hurry, 0.05)
        self.log(*(Event.of("trigger_left_open", self.runs[i]) for i in self.posting))

    # --- taking a config ---

    def apply(self, loaded: LoadedConfig) -> None:
        """Make a new config the one that counts; where its commit fails, the old one still does."""
        config = loaded.config
        terms = Terms(None, self.clock.boot_time(), grace_s=config.trigger_grace)
        renamed, also = self._renamed(config)
        old_names = {old: config.jobs[new] for old, new in renamed.items()}
        changes, before = dict[int, Change](), dict[int, Run]()
        for stored in self.store.runs_for({**config.jobs, **old_names}):
            mine = self.runs.get(stored.id)
            run, events = (mine, []) if mine else as_loaded(stored, terms)
            name = renamed.get(run.job, run.job) if run.group else run.job
            if name != run.job and not self.store.groups(name, [run.group]):
                run = replace(run, job=name)
            changes[run.id] = (run, events)
            before[run.id] = mine or stored
        old = self.loaded, self.runs, self._current
        try:
            self._current = self._assign(config, changes)
            self.loaded, self.runs = loaded, before
            new = [self._with_config(change, old[0]) for change in changes.values()]
            self.commit([c for c in new if c[1] or c[0] != before.get(c[0].id)], also=also)
        except Exception:
            self.loaded, self.runs, self._current = old
            raise
        self._arrange(loaded)
        for run in list(self.runs.values()):
            self._place(run)
        self.take_requests()

    def _renamed(self, config: Config) -> tuple[dict[str, str], list[Statement]]:
        """Return which match jobs have a new name (old: new), and what a config changes at once.

        A match job under a new name takes over the groups of one that has left the config. Webhooks
        that are new are told from here on.
        """
        webhooks = compact_json([name for name, _ in config.notify])
        add = "INSERT OR IGNORE INTO webhooks SELECT value, ?, 0, 0 FROM json_each(?)"
        drop = "DELETE FROM webhooks WHERE secret NOT IN (SELECT value FROM json_each(?))"
        statements: list[Statement] = [(drop, (webhooks,))]
        statements.append((add, (self.store.last_event_id(), webhooks)))
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        left = {name: key for name, key in known.items() if name not in config.jobs}
        targets = {name: str(config.target(job)) for name, job in config.jobs.items()}
        renamed: dict[str, str] = {}
        for name, job in config.jobs.items():
            key = [job.match_key, targets[name]]
            if not job.match or known.get(name) == key:
                continue
            known[name] = key
            if old := next((other for other, its in left.items() if its == key), None):
                renamed[old] = name
                del left[old], known[old]
                rename = """UPDATE runs SET job = ?1 WHERE job = ?2 AND "group" <> ''
                    AND "group" NOT IN (SELECT "group" FROM runs WHERE job = ?1)"""
                copy = "INSERT OR REPLACE INTO meta SELECT ?, value FROM meta WHERE key = ?"
                statements.append((rename, (name, old)))
                statements.append((copy, (f"read:{name}", f"read:{old}")))
        finding = {j.openai_secret for j in config.jobs.values() if j.match and not j.rests}
        over = """DELETE FROM meta WHERE key LIKE 'find_failing:%'
            AND substr(key, 14) NOT IN (SELECT value FROM json_each(?))"""
        statements.append((over, (compact_json([*finding]),)))
        statements.append(Store.meta_statement("match_jobs", known))
        statements.append(Store.meta_statement("targets", targets))
        return renamed, statements

    def _assign(self, config: Config, changes: dict[int, Change]) -> set[int]:
        """Bring the runs of jobs with batch_ids to what the config says; returns their numbers."""
        targets = {name: config.target(job) for name, job in config.jobs.items()}
        runs = [run for run, _ in changes.values() if not run.group]
        last = self.store.meta("targets") or {}
        assigned, current = assign(config.jobs, targets, runs, last), set()
        for name, job in config.jobs.items():
            if run := assigned.get(name):
                after = replace(run, job=name, batches=in_order(job, run.batches))
                changes[run.id] = (after if after != run else run, changes[run.id][1])
            elif not job.match:
                batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
                now, self._last_id = self.clock.now(), self._last_id + 1
                run = Run(self._last_id, name, targets[name], batches=batches, next_at=now)
                changes[run.id] = (run, [])
            if run:
                current.add(run.id)
        return current

    def _with_config(self, change: Change, old: LoadedConfig) -> Change:
        """Return a run as a new config has it: what has changed for it is due at once."""
        run, events = change
        job, old_job = self.job_of(run), old.config.jobs.get(run.job)
        now = self.clock.now()
        if job and run.phase in {Phase.REJECTED, Phase.INTENT} and run.sending_at is None:
            target, token = self.loaded.config.target(job), self.loaded.secrets[job.keboola_secret]
            if run.input_digest not in {"", digest_of_input(job, target, token)}:
                return replace(as_intended(run, now), input_digest=""), events
        if job is None or (job == old_job and self.loaded.access(job) == old.access(old_job)):
            return change
        if run.phase in {Phase.POLLING, Phase.INTENT, Phase.SENT, Phase.UNKNOWN}:
            return replace(run, failures=0, next_at=min(run.next_at, now)), events
        return change

    def _arrange(self, loaded: LoadedConfig) -> None:
        """Have an account for each OpenAI key that is used, and a client for each Keboola token."""
        config, secrets = loaded.config, loaded.secrets
        self.http.configure(config)
        before, self.keboolas = self.keboolas, {}
        for name in config.of_type("keboola"):
            entry, known = config.secrets[name], before.get(name)
            if not known or (known.stack_url, known.token) != (entry.stack_url, secrets[name]):
                note = functools.partial(self.note_request, name)
                known = Keboola(entry, secrets[name], self.http, self.clock, note)
            self.keboolas[name] = known
        accounts, self.accounts = self.accounts, {}
        for name in {job.openai_secret for job in config.jobs.values()}:
            account = Account(self, config.secrets[name], secrets[name])
            if name in accounts and accounts[name].identity == account.identity:
                account = accounts[name]
            elif not self.once:
                if name in self._polling:
                    self._polling[name].cancel()
                self._polling[name] = self.spawn(account.run())
            self.accounts[name] = account
            jobs = [job for job in config.jobs.values() if job.match and not job.rests]
            account.configure([job for job in jobs if job.openai_secret == name])
            if not account.finders:
                self.note_finding(name, None)
        for name in self._polling.keys() - self.accounts.keys():  # nobody uses them now
            self._polling.pop(name).cancel()
        self._forget_unused(config)

    def _forget_unused(self, config: Config) -> None:
        """Forget how secrets have fared that nothing uses any more: they need nobody."""
        used = {name for name, _ in config.notify}
        used |= {n for job in config.jobs.values() for n in (job.openai_secret, job.keboola_secret)}
        if any(run.is_begun for run in self.runs.values()):  # each may be of a run's project
            used |= set(config.of_type("keboola"))
        for name in self.stats.keys() - used:
            self._set_stats(SecretStats(name, self.stats[name].type))
            del self.stats[name]

    # --- what accounts and drivers need ---

    def job_of(self, run: Run) -> Job | None:
        return self.loaded.config.jobs.get(run.job)

    def is_polled(self, run: Run) -> bool:
        job = self.job_of(run)
        if job is None or job.rests or self.is_stopping or run.phase is not Phase.POLLING:
            return False
        return run.id in self._current or bool(job.match and run.group)

    def may_post(self, run: Run) -> bool:
        """Return whether a run may be started now.

        Other ids under the same name do not stop it; a job that is gone or paused does.
        """
        job = self.job_of(run)
        return job is not None and not job.rests and not self.is_stopping

    def terms(self, run: Run) -> Terms:
        config = self.loaded.config
        limits = (config.trigger_grace, config.follow_interval, self.may_post(run))
        return Terms(self.job_of(run), self.clock.boot_time(), self.clock.jitter(), *limits)

    async def keboola_for(self, run: Run) -> Keboola:
        """Return a client whose token is of a run's stack and project. Raises ApiError for none.

        A token of another project never carries a run.
        """
        job, failure, target = self.job_of(run), None, run.target
        own = [job.keboola_secret] if job else []
        for keboola in [self.keboolas[name] for name in dict.fromkeys([*own, *self.keboolas])]:
            if keboola.stack_url == target.stack_url:
                try:
                    if await keboola.project() == target.project:
                        return keboola
                except ApiError as error:
                    failure = failure or error
        where = f"project {target.project} on {target.stack_url}"
        message = f"the config has no token of {where}, where this run was started"
        raise failure or ApiError(message, sent=False)

    def check_in_place(self) -> None:
        """Raise StateError if the state file was deleted or replaced under the process.

        A commit into a deleted file succeeds, and would be forgotten.
        """
        if not (self.store.is_in_place() and self.lock.is_in_place()):
            message = f"the state file {self.store.path} or its lock was deleted or replaced"
            raise StateError(message, "nothing more is sent; start again")

    def record_polls(self, came: Iterable[Poll]) -> None:
        """Store what polls have brought, as one."""
        changes = []
        for run_id, answers, began in came:
            run = self.runs.get(run_id)
            job = self.job_of(run) if run else None
            if run and job and self.is_polled(run):
                changes.append(after_poll(run, job, answers, self.terms(run), began))
        try:
            self.commit(changes)
        except StorageError as error:
            for run, events in changes:
                self.note_failure(error, "polls", run if events else None)
                next_at = self.clock.now() + 5
                self.runs[run.id] = replace(self.runs[run.id], next_at=next_at)

    def record_found(self, found: Iterable[tuple[Run, list[Event], list[Batch]]]) -> None:
        """Store runs that new batches begin or join, and batches that came late."""
        changes, also = [], []
        for changed, events, late in found:
            self._last_id += changed.id == 0
            run = changed if changed.id else replace(changed, id=self._last_id)
            also += [insert("batches", batch, run_id=run.id, place=-1) for batch in late]
            changes.append((run, events))
        if changes:
            self.commit(changes, also=also)

    # --- writing and telling ---

    def _with_attention(self, run: Run) -> Change:
        grace_s = self.loaded.config.trigger_grace
        return after_attention(run, self.job_of(run), grace_s, self.clock.now())

    def commit(
        self,
        changes: Iterable[Change],
        events: Iterable[Event] = (),
        also: Sequence[Statement] = (),
    ) -> None:
        """Commit the next states of runs with the events that tell of them, then tell them."""
        rows: list[tuple[Run | None, Run]] = []
        told, now = list(events), self.clock.now()
        for changed, its_events in changes:
            run, more = self._with_attention(self._clean_run(changed))
            rows.append((self.runs.get(run.id), run))
            told += [*its_events, *more]
        if self._trouble:
            told.append(Event.of("state_write_failed_recovered"))
        last_told, fresh = dict(self._last_told), []
        for event in told:
            if event.name.startswith(FLAPPING):
                about = map(event.fields.get, ("batch_id", "status", "secret"))
                key = event.name, event.run, *about
                if now - last_told.get(key, 0.0) < MINUTE_S:
                    continue
                last_told[key] = now
            cleaned = self.redactor.tree(dict(event.fields))
            fresh.append(replace(event, fields=cleaned, text=self.redactor.text(event.text)))
        stored = self.store.commit(rows, fresh, now, also)
        self._last_told = last_told
        self._trouble.clear()
        for _, run in rows:
            self.runs[run.id] = run
            self._place(run)
        for event in stored:
            say(event)
        for happened in self.told:
            happened.set()

    def _place(self, run: Run) -> None:
        """Have a run polled, driven, or dropped from memory, as its phase says."""
        job = self.job_of(run)
        mine = self.accounts.get(job.openai_secret) if job and self.is_polled(run) else None
        for account in self.accounts.values():
            account.run_ids.discard(run.id)
        if mine:
            mine.run_ids.add(run.id)
            if run.next_at < mine.until:
                mine.wake.set()
        if run.is_begun and self._tasks is not None and not self.is_stopping:
            self.wakes.setdefault(run.id, asyncio.Event()).set()
            driver = self._drivers.get(run.id)
            if driver is None or driver.done():
                self._drivers[run.id] = self.spawn(drive_run(self, run.id))
        elif run.phase is Phase.FINISHED and job and job.match:  # the state file has the older ones
            ended = [r for r in self.runs.values() if r.job == run.job and r.group]
            ended = [r for r in ended if r.phase is Phase.FINISHED and not r.attention]
            for old in sorted(ended, key=lambda r: r.finished_at or 0.0)[:-5]:
                del self.runs[old.id]

    def log(self, *events: Event) -> None:
        """Tell events that go with no change of a run; a full disk must not silence the log."""
        try:
            self.commit([], events)
        except StorageError:
            for event in events:
                say(event)

    def _clean_run(self, run: Run) -> Run:
        names = ("error", "post_error", "keboola_error", "keboola_status")
        texts: dict[str, Any] = {name: text for name in names if (text := getattr(run, name))}
        clean: dict[str, Any] = {n: self.redactor.text(text) for n, text in texts.items()}
        if any(batch.error for batch in run.batches):
            errors = (batch.error and self.redactor.text(batch.error) for batch in run.batches)
            batches = map(lambda b, error: replace(b, error=error), run.batches, errors)
            run = replace(run, batches=tuple(batches))
        return replace(run, **clean) if clean != texts else run

    def note_failure(self, error: Exception, where: str, run: Run | None = None) -> None:
        """Tell once of trouble with the state file, until it is over; of a bug with its trace."""
        self.has_failed = True
        if not isinstance(error, StorageError | sqlite3.Error):
            trace = "".join(traceback.format_exception(error)).splitlines()
            name = type(error).__name__
            say(Event.of("internal_error", where=where, error=name, traceback=trace))
        elif (key := (run.id if run else None, str(error))) not in self._trouble:
            self._trouble.add(key)
            say(Event.of("state_write_failed", run, error=str(error)))

    # --- how secrets fare ---

    def note_request(self, name: str, error: ApiError | None) -> None:
        """Remember how a request with a secret has fared."""
        if entry := self.loaded.config.secrets.get(name):
            before = self.stats.get(name) or SecretStats(name, entry.type)
            self._set_stats(before.after(error, self.clock.now()))

    def note_finding(self, name: str, error: ApiError | None) -> None:
        """Remember what has kept an account's new batches from being found for long."""
        if name in self.stats:
            find_error = None if error is None else str(error)
            self._set_stats(replace(self.stats[name], find_error=find_error))

    def _set_stats(self, after: SecretStats) -> None:
        """Tell when a secret begins to need attention, and when that is over."""
        before = self.stats.get(after.name) or SecretStats(after.name, after.type)
        self.stats[after.name] = after
        if bool(after.trouble) != bool(before.trouble):
            name = "account_failing" if after.trouble else "account_failing_recovered"
            event = Event.of(name, secret=after.name, error=after.trouble)
            keys = ("type", "refused_since", "error", "find_error")
            bad = [s for s in self.stats.values() if s.trouble]
            known = {s.name: {key: getattr(s, key) for key in keys} for s in bad}
            try:
                self.commit([], [event], [Store.meta_statement("failing", known)])
            except StorageError as error:
                self.note_failure(error, after.name)
                self.stats[after.name] = before  # so that it is told with the next request

    # --- what people ask for, and are shown ---

    def note_config(self, rejected: ConfigError | None, old: Config | None = None) -> None:
        """Tell and remember which config counts, and what is wrong with the file, if so."""
        config, known = self.loaded.config, self.store.meta("config") or {}
        is_known = known.get("sha256") == config.sha256 and not known.get("error")
        if self.once and is_known and not rejected:
            return  # from cron, a pass that changes nothing says nothing
        also: list[Statement] = []
        if rejected:
            problems = str(rejected).splitlines()
            events = [Event.of("config_rejected", problem=problems[0], problems=problems)]
        else:
            loaded_at, path = rfc3339(self.clock.now()), str(config.path)
            known = {"path": path, "sha256": config.sha256, "loaded_at": loaded_at}
            text = self.redactor.body(self.loaded.text.encode(), is_data=True)  # a comment's token
            good: dict[str, Any] = {"path": str(config.path.absolute()), "text": text.decode()}
            with contextlib.suppress(OSError):
                good["inode"] = config.path.stat().st_ino
            also.append(Store.meta_statement("good_config", good))
            events = [Event.of("config_loaded", **config_changes(config, old))]
            warnings = [*self.loaded.warnings]
            if entries := ", ".join(map(quoted, self.http.rules.unreadable)):
                warnings.append(f"$NO_PROXY has entries that are no host and no network: {entries}")
            events += [Event.of("config_warning", warning=warning) for warning in warnings]
            events += [Event.of("config_rejected_recovered")] if self.config_error else []
        self.config_error = self.redactor.text(str(rejected)) if rejected else None
        also.append(Store.meta_statement("config", {**known, "error": self.config_error}))
        self.commit([], events, also)

    def take_requests(self) -> None:
        """Do what people asked for with `retry` since the last time."""
        for row in self.store.db.execute("SELECT * FROM requests ORDER BY id").fetchall():
            id_, run_id, force, rerun, phase = row
            request = RetryRequest(id_, run_id, bool(force), rerun, Phase(phase))
            done: list[Statement] = [("DELETE FROM requests WHERE id = ?", (id_,))]
            stored = self.store.runs("id = :id", {"id": run_id})
            run = self.runs.get(run_id) or (stored[0] if stored else None)
            came: Change | str = "it is gone"
            if run:
                came = after_retry(run, self.job_of(run), request, self.clock.now())
            if isinstance(came, str):
                self.commit([], [Event.of("retry_refused", run, why=came)], done)
            else:
                self.commit([came], also=done)

    def shown(self) -> list[Run]:
        """Return the runs that people are shown, in the config's order."""
        place = {name: i for i, name in enumerate(self.loaded.config.jobs)}
        runs = [
            run
            for run in self.runs.values()
            if run.job in place and (run.id in self._current or run.group or run.is_begun)
        ]
        return sorted(runs, key=lambda r: (place[r.job], r.id not in self._current, r.id))

    def summary(self) -> str:
        """Return how the runs are, in one line."""
        bad = "; the config file has problems, the previous one still counts"
        words = counts_in_words(status_of(run, self.job_of(run)) for run in self.shown())
        return f"{words}{bad if self.config_error else ''}"


# --- reloading ------------------------------------------------------------------------------------


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for an end now.

    SIGHUP asks for a reload; those of log rotation are ignored.
    """

    def __init__(self) -> None:
        self.stop, self.now = asyncio.Event(), asyncio.Event()
        self.is_hangup = False
        self.files_changed = asyncio.Event()  # perhaps
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_signal(self) -> None:
        (self.now if self.stop.is_set() else self.stop).set()

    def _on_hangup(self) -> None:
        self.is_hangup = True
        self.files_changed.set()


async def keep_loaded(
    engine: Engine, files: Files, configure: Callable[[Config], None], signals: Signals
) -> None:
    """Take the config again when it, its key file or a secret's file has changed, and on SIGHUP.

    `files` are those that the config was read from. They are compared on every event in the
    directory and every two seconds. A file that was replaced is whole. One that was rewritten in
    place counts when it has stayed the same for two seconds: half of a config can be valid YAML.
    """
    seen, growing, grown_at, clock = files.seen, dict[Path, bytes](), 0.0, engine.clock
    engine.spawn(watch_directory(engine, signals.files_changed))
    while True:
        signals.files_changed.clear()
        is_forced, signals.is_hangup, read = signals.is_hangup, False, Files()
        try:
            for path in [*seen]:
                await asyncio.to_thread(read.read, path)
            changed = {p: f for p, f in read.seen.items() if f.digest != seen[p].digest}
            rewritten = {p: f for p, f in changed.items() if f.inode == seen[p].inode}
            still = growing
            growing = {path: file.digest for path, file in rewritten.items() if not file.error}
            grown_at = grown_at if growing == still else clock.uptime_s()
            is_whole = not growing or clock.uptime_s() - grown_at >= 2
            signals.is_hangup |= is_forced and not is_whole
            if is_whole and (is_forced or changed):
                growing, seen = {}, read.seen
                await reload(engine, read, configure)
        except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
            engine.note_failure(error, "reload")
            signals.is_hangup = True  # what could not be stored is tried again
        rested_s = clock.uptime_s() - grown_at
        wait_s = max(0.05, 2 - rested_s) if growing else 2.0
        await wait_for_event(signals.files_changed, wait_s)


async def watch_directory(engine: Engine, happened: asyncio.Event) -> None:
    """Set an event on every change in the config's directory.

    The directory is watched, not the file: editors replace it, Kubernetes swaps a link.
    """
    import watchfiles  # it costs the other commands a third of their start

    directory = engine.loaded.config.path.parent
    ours = (engine.store.path.name, *PUBLISHED, *(f".{name}" for name in PUBLISHED))
    while True:
        try:
            async for _ in watchfiles.awatch(
                directory,
                watch_filter=lambda _, path: not Path(path).name.startswith(ours),
                step=100,
                recursive=False,
            ):
                happened.set()
        except Exception as error:  # noqa: BLE001 - the comparison sees what this does not
            engine.log(Event.of("watch_failed", error=one_line(str(error))))
        await asyncio.sleep(MINUTE_S)


async def reload(engine: Engine, files: Files, configure: Callable[[Config], None]) -> None:
    """Parse and decrypt all of the config; only then, in one step, let it count."""
    old, rejected = engine.loaded.config, None
    engine.manager.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        load = functools.partial(load_config, old.path, files, os.environ, engine.redactor)
        loaded = await asyncio.to_thread(load)
        if old.state_path != loaded.config.state_path:
            what = f"the running process has {old.state_path} open"
            cure = "restart it to use another state file"
            raise ConfigError([Problem(str(old.path), 1, 1, "state", what, cure)])
        engine.apply(loaded)
        configure(loaded.config)
    except ConfigError as error:
        rejected = error
    finally:
        engine.manager.send("READY=1", f"STATUS={engine.summary()}")
    engine.note_config(rejected, old)


# --- webhooks -------------------------------------------------------------------------------------


async def send_webhooks(engine: Engine, http: Http) -> None:
    """Have each webhook told of the events that its rules name; a dead one delays no other.

    They read the event log: for each there is the number of the last event that it has had.
    """
    happened, sending = asyncio.Event(), dict[str, asyncio.Task[None]]()
    engine.told.append(happened)
    while True:
        happened.clear()
        for name, _ in engine.loaded.config.notify:
            if name not in sending or sending[name].done():
                sending[name] = engine.spawn(tell_webhook(engine, http, name))
        await wait_for_event(happened, 5.0)


async def tell_webhook(engine: Engine, http: Http, name: str) -> None:
    """Tell one webhook what it has not had yet, in order, until one event does not get through.

    An event that did not for a day is dropped.
    """
    store, clock = engine.store, engine.clock
    update = "UPDATE webhooks SET told_up_to = ?, failures = ?, next_at = ? WHERE secret = ?"
    try:
        row = store.db.execute("SELECT * FROM webhooks WHERE secret = ?", (name,)).fetchone()
        told_up_to, failures, next_at = tuple(row)[1:]
        told_up_to = max(told_up_to, engine.told_up_to.get(name, 0))
        if clock.now() < next_at < clock.now() + HOUR_S:
            return
        for event in store.events(after=told_up_to):
            rules = [words for rule, words in engine.loaded.config.notify if rule == name]
            groups = EVENTS[event.name][1].split(",") if event.name in EVENTS else []
            if not any(word in rule for rule in rules for word in (event.name, *groups)):
                if event.id >= told_up_to + 100:  # so that the log can be pruned up to there
                    told_up_to = event.id
                    store.execute([(update, (told_up_to, failures, 0, name))])
                continue
            failure = await post_event(engine, http, name, event)
            if failure and (clock.now() - event.at < DAY_S or failures < 5):
                wait_s = backoff_s(failures + 1, 5, clock.jitter(), failure.retry_after_s)
                state = (told_up_to, failures + 1, clock.now() + wait_s, name)
                store.execute([(update, state)])
                if failures == 0:
                    engine.log(Event.of("notify_failed", secret=name, error=str(failure)))
                return
            told_up_to = engine.told_up_to[name] = event.id
            failures = 0
            store.execute([(update, (told_up_to, 0, 0, name))])
            if failure:
                engine.log(Event.of("notify_dropped", secret=name, why=str(failure)))
    except Exception as error:  # noqa: BLE001 - trouble here is not the runs'
        engine.note_failure(error, "notify")


async def post_event(engine: Engine, http: Http, name: str, event: Event) -> ApiError | None:
    """Post one event to a webhook; returns why it was not taken, or None.

    Angle brackets would be commands to some chat programs. What it answers may be an echo of its
    address, which is secret.
    """
    text = one_line(f"TeckoChecker: {event.text}", 1000)
    text = text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")
    text = text.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
    body = {"text": text, "event": event.name, "job": event.job, "run": event.run}
    body |= {"level": event.level, "at": rfc3339(event.at)}
    headers = {"Content-Type": "application/json"}
    failure: ApiError | None = None
    try:
        address = engine.loaded.secrets[name].reveal()
        answer = await http.post(address, headers, compact_json(body), 10.0)
        if not answer.is_success:
            failure = answer.error(f"it answered {answer.status}")
    except ApiError as error:
        failure = error
    engine.note_request(name, failure)
    return failure


# --- the process ----------------------------------------------------------------------------------

PUBLISHED: Final = ("status.html", "status.json", "metrics.prom")


async def run_engine(
    engine: Engine, signals: Signals, helpers: Sequence[Callable[[], Awaitable[None]]]
) -> int:
    """Let the engine work until it is done or a signal ends it; returns the exit code."""
    running = asyncio.ensure_future(engine.run(helpers))
    stopped = asyncio.ensure_future(signals.stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    is_interrupted = not running.done()
    if is_interrupted:
        engine.manager.send("STOPPING=1")
        await engine.drain(signals.now)
        running.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return 130 if signals.now.is_set() or (is_interrupted and engine.once) else 0


# ==================================================================================================
# 8. Showing: one snapshot, and its renderers
# ==================================================================================================


Shown = Mapping[str, Any]  # a snapshot, or a run or a batch of it
Stats = Sequence[SecretStats]


def run_view(run: Run, job: Job | None, grace_s: float, now: float) -> dict[str, Any]:
    """Return a run as `status --json` shows it."""
    status = status_of(run, job)
    is_complete = status.startswith("completed")
    error = None if is_complete else run.error
    is_held = job is not None and job.paused and not run.may_be_at_keboola
    same = ("keboola_job_id", "keboola_status", "keboola_error", "url")
    trigger = {
        "id": run.trigger_id,
        "state": "sent" if run.phase is Phase.FINISHED else str(run.phase),
        **{name: getattr(run, name) for name in same},
        "sent_at": rfc3339(run.sent_at),
        "finished_at": rfc3339(run.finished_at),
        "error": error,
    }
    batches = []
    for b in run.batches:
        counts = {"total": b.total, "completed": b.completed, "failed": b.failed}
        files = {"output_file_id": b.output_file_id, "error_file_id": b.error_file_id}
        times = {"created_at": b.created_at, "expires_at": b.expires_at, "completed_at": b.ended_at}
        known: dict[str, Any] = {"id": b.id, "status": b.status}
        known |= {"request_counts": None if b.total is None else counts, **files}
        batches.append(known | {name: rfc3339(at) for name, at in times.items()})
    return {
        "name": run.name,
        "job": run.job,
        "group": run.group or None,
        "status": status,
        "attention": bool(attention_of(run, job, grace_s, now)),
        "error": error,
        "error_since": rfc3339(run.error_since) if error else None,
        "batch_count": len(run.batches),
        "completed_count": sum(b.status == "completed" for b in run.batches),
        "failed_count": sum(b.has_failed for b in run.batches),
        "batches": batches,
        "last_check_at": rfc3339(run.last_check_at),
        "next_check_at": None if is_complete or is_held else rfc3339(run.next_at),
        "completed_at": rfc3339(run.finished_at),
        "trigger": None if run.phase in {Phase.POLLING, Phase.REFUSED} else trigger,
    }


def snapshot(  # noqa: PLR0913 - all that is known
    config: Config, runs: Iterable[Run], stats: Stats, daemon: Shown, loaded: Shown, *, now: float
) -> dict[str, Any]:
    """Return `status --json`; `loaded` is what the state file has of the config that counts."""
    views = [run_view(r, config.jobs.get(r.job), config.trigger_grace, now) for r in runs]
    of_config: dict[str, Any] = {"path": str(config.path), "sha256": config.sha256}
    of_config |= {"loaded_at": None, "error": None, **loaded}
    refused = sum(bool(secret.trouble) for secret in stats)
    return {
        "version": __version__,
        "generated_at": rfc3339(now),
        "daemon": {k: daemon.get(k) for k in ("running", "pid", "started_at", "last_loop_at")},
        "config": of_config,
        "attention": sum(v["attention"] for v in views) + refused + bool(of_config["error"]),
        "jobs": views,
    }


def in_parts(shot: Shown) -> dict[str, list[Shown]]:
    """Return the runs of a snapshot: attention first, finished last, of these the newest first."""
    parts: dict[str, list[Shown]] = {part: [] for part in PART_OF_STATUS.values()}
    for view in sorted(shot["jobs"], key=lambda view: view["completed_at"] or "", reverse=True):
        parts[PART_OF_STATUS["failed" if view["attention"] else view["status"]]].append(view)
    return parts


def general_troubles(shot: Shown, stats: Stats) -> list[str]:
    """Return what needs attention and is no run: the config file, and secrets that are refused."""
    errors = (shot["config"]["error"] or "").splitlines()
    older = "; the previous one still counts" if shot["config"]["loaded_at"] else ""
    texts = [f"The config file has problems{older}:", *errors[:5]]
    if len(errors) > 5:
        texts.append(f"and {len(errors) - 5:,} more: see `teckochecker check`")
    secrets = [s.trouble[0].upper() + s.trouble[1:] for s in stats if s.trouble]
    return [*(["\n".join(texts)] if errors else []), *secrets]


def unix_of(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def ago(text: str | None, shot: Shown) -> str:
    """Return how long before a snapshot something was; what is recorded in the future is now."""
    at, now = unix_of(text), unix_of(shot["generated_at"]) or 0.0
    if at is None:
        return "never"
    return f"{show_duration(now - at)} ago" if now - at >= 1 else "just now"


def what_next(view: Shown, shot: Shown) -> str:
    """Return what happens next to a run, and when; or what has come of it."""
    status, trigger = view["status"], view["trigger"] or {}
    due, now = unix_of(view["next_check_at"]), unix_of(shot["generated_at"]) or 0.0
    when = "now" if shot["daemon"]["running"] else "once something runs"
    if due and due - now >= 1 and shot["daemon"]["running"]:
        when = f"in {show_duration(due - now)}"
    ended = trigger.get("keboola_status") or "started"
    keboola_job = f"Keboola job {trigger.get('keboola_job_id')}"
    if status.startswith("completed"):
        failed = sum((b["request_counts"] or {}).get("failed") or 0 for b in view["batches"])
        lost = f", {counted(failed, 'request')} failed" if failed else ""
        outcome = f"{keboola_job}: {ended}, {ago(view['completed_at'], shot)}{lost}"
        return outcome if trigger.get("keboola_job_id") else "done elsewhere"
    if status == "paused" and not due:
        return "nothing while it is paused"
    if status == "failed" and not trigger:  # its policy refused it
        return "`retry --force` starts it all the same"
    again = f"tries again {when}" if due else "waits for a change of its config"
    polls = f"polls {when}"
    if all(STATUS_RANK.get(batch["status"]) == 3 for batch in view["batches"]):
        is_group = view["group"] not in {None, *(batch["id"] for batch in view["batches"])}
        decides = f"; decides {when}" if due else ""
        late = f"a finished batch's file is not there yet; {polls}"
        polls = f"waits for more batches{decides}" if is_group else late
    words = {
        "polling": polls,
        "intent": f"searches Keboola {when}, then starts",
        "sending": "waits for Keboola's answer",
        "unknown": f"searches Keboola again {when}",
        "rejected": f"{again}, or `retry`",
        "sent": f"{keboola_job} is {ended}; polls {when}" if due else "`retry` starts it again",
    }
    return words[trigger.get("state", "polling")]


def progress_of(view: Shown) -> tuple[str, int]:
    """Return how many batches of a run are finished, and how much of its requests, in percent."""
    total_share = 0.0  # each batch counts the same, and as a whole once it is finished
    for batch in view["batches"]:
        counts = batch["request_counts"] or {}
        done = (counts.get("completed") or 0) + (counts.get("failed") or 0)
        is_finished = STATUS_RANK.get(batch["status"]) == 3
        total_share += 1.0 if is_finished else min(1.0, done / (counts.get("total") or math.inf))
    percent = math.floor(100 * total_share / max(1, view["batch_count"]))
    return f"{view['completed_count'] + view['failed_count']}/{view['batch_count']}", percent


def facts_of(view: Shown, shot: Shown) -> dict[str, str]:
    trigger, due = view["trigger"] or {}, view["next_check_at"]
    facts = {"error": view["error"], "next": what_next(view, shot) + (f" ({due})" if due else "")}
    for what, at in (("last poll", view["last_check_at"]), ("ended", view["completed_at"])):
        facts[what] = f"{at} ({ago(at, shot)})" if at else None
    facts["Keboola job"] = trigger.get("url") or trigger.get("keboola_job_id")
    return {what: fact for what, fact in facts.items() if fact}


def batch_words(batch: Shown, view: Shown) -> str:
    status = batch["status"] or ("status not known" if view["last_check_at"] else "not polled")
    words, counts = [f"{batch['id']} {status}"], batch["request_counts"]
    if counts:
        words.append(f"{counts['completed'] or 0}/{counts['total']} requests")
    if batch["expires_at"] and STATUS_RANK.get(batch["status"]) != 3:
        words.append(f"expires {batch['expires_at']}")
    return ", ".join([*words, *filter(None, (batch["output_file_id"], batch["error_file_id"]))])


def metrics(shot: Shown, stats: Stats, ended: Mapping[str, int]) -> str:
    """Return a snapshot in Prometheus' text format 0.0.4; `ended` counts all Keboola jobs."""

    def labels(**pairs: str) -> str:
        parts = [f"{key}={json.dumps(text, ensure_ascii=False)}" for key, text in pairs.items()]
        return f"{{{','.join(parts)}}}"

    def by_status(counts: Mapping[str, int]) -> dict[str, float | None]:
        return {labels(status=status): count for status, count in counts.items()}

    def by_secret(key: str) -> dict[str, float | None]:
        return {labels(account=s.name, service=s.type): getattr(s, key) for s in stats}

    views, config, now = shot["jobs"], shot["config"], unix_of(shot["generated_at"]) or 0.0
    jobs = dict.fromkeys(PART_OF_STATUS, 0) | collections.Counter(view["status"] for view in views)
    batches = collections.Counter(dict.fromkeys((*STATUS_RANK, "not_polled"), 0))
    waits: dict[str, dict[str, float | None]] = {status: {} for status in PART_OF_STATUS}
    for view in views:
        batches.update(b["status"] or "not_polled" for b in view["batches"])
        pending = [b for b in view["batches"] if STATUS_RANK.get(b["status"]) != 3]
        times = {
            "active": [b["created_at"] for b in pending],
            "triggering": [max((b["completed_at"] or "" for b in view["batches"]), default=None)],
            "running": [(view["trigger"] or {}).get("sent_at")],
        }.get(view["status"], [])
        since = unix_of(min(filter(None, times), default=None))
        waits[view["status"]][labels(run=view["name"])] = since and max(0.0, now - since)
    refused = {key: since is not None for key, since in by_secret("refused_since").items()}
    succeeded, is_good = by_secret("last_success_at"), not config["error"]
    loaded_at, lines = unix_of(config["loaded_at"]), []
    families: list[tuple[str, str, Mapping[str, float | None]]] = [
        ("info", "The program's version.", {labels(version=shot["version"]): 1}),
        ("generated_timestamp_seconds", "When this file was made.", {"": now}),
        ("daemon_running", "Whether the daemon ran then.", {"": shot["daemon"]["running"]}),
        ("attention", "Runs, keys and configs that need attention.", {"": shot["attention"]}),
        ("jobs", "Runs by status.", by_status(jobs)),
        ("batches", "Batches of these runs by status.", by_status(batches)),
        ("run_oldest_batch_age_seconds", "Age of its oldest unfinished batch.", waits["active"]),
        ("run_triggering_seconds", "How long a start has been due.", waits["triggering"]),
        ("run_running_seconds", "How long its Keboola job has been running.", waits["running"]),
        ("keboola_jobs", "Keboola jobs by how they ended.", by_status(ended)),
        ("requests_total", "Requests made with a secret.", by_secret("requests")),
        ("request_errors_total", "Those of them that failed.", by_secret("errors")),
        ("last_success_timestamp_seconds", "When one of them last succeeded.", succeeded),
        ("account_refused", "Whether the server refuses the secret (401).", refused),
        ("config_last_reload_successful", "Whether the config file is good.", {"": is_good}),
        ("config_last_reload_success_timestamp_seconds", "When it was loaded.", {"": loaded_at}),
    ]
    for name, text, samples in families:
        known = {key: value for key, value in samples.items() if value is not None}
        kind = "counter" if name.endswith("_total") else "gauge"
        if known:
            lines += [f"# HELP teckochecker_{name} {text}", f"# TYPE teckochecker_{name} {kind}"]
        lines += [f"teckochecker_{name}{key} {value:.15g}" for key, value in known.items()]
    return "".join(f"{line}\n" for line in lines)


PAGE_STYLE: Final = """
:root { color-scheme: light dark; --dim: light-dark(#555d66, #a6adb7);
  --link: light-dark(#0b57c2, #8ab8ff); --good: light-dark(#17713a, #62d68d);
  --bad: light-dark(#b3261e, #ff8f86); --wait: light-dark(#8a5a00, #f2bd5c); }
body { margin: auto; max-width: 70rem; padding: .75rem; font: 1rem/1.35 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1, h2 { font-size: 1.2rem; margin: .75rem 0 .25rem; }
p { margin: .25rem 0; white-space: pre-wrap; }
.dim { color: var(--dim); }
.alarm { background: #a3170f; border-radius: .5rem; color: #fff; padding: .75rem; }
body:not(.old) .stale { display: none; }
a, .active, .running { color: var(--link); }
.error, .failed { color: var(--bad); }
.completed { color: var(--good); }
.paused, .triggering, .completed_with_failures { color: var(--wait); }
summary { cursor: pointer; }
.run { border-top: 1px solid #8888; padding: .25rem 0; }
.run summary { display: flex; flex-wrap: wrap; gap: 0 .75rem; }
.run summary > * { flex: 1 9rem; }
.run summary::before { content: "\\25B8"; }
.run progress { accent-color: var(--link); flex: 0 5rem; margin: .3rem 0; }
.run .error { flex-basis: 100%; }
"""

PAGE_SCRIPT: Final = """
const { made, alive } = document.body.dataset;
const age_s = () => Math.max(0, Math.round(Date.now() / 1000 - made));
function tell() {
  const s = age_s(), minutes = Math.round(s / 60);
  age.textContent = "(" + (s < 90 ? s + " s" : minutes < 90 ? minutes + " min" :
    Math.round(s / 3600) + " h") + " ago)";
  document.body.classList.toggle("old", alive === "1" && s > 180);
}
tell();
setInterval(tell, 1000);
setInterval(() => (age_s() > 120 || !document.querySelector("details[open]")) &&
  location.reload(), 30000);
"""


def page_row(view: Shown, shot: Shown) -> str:
    (finished, percent), esc = progress_of(view), html.escape
    error, facts = one_line(view["error"] or "", 120), facts_of(view, shot).items()
    details = [f"{what}: {esc(fact)}" for what, fact in facts if fact != error]
    if (view["trigger"] or {}).get("url"):  # it stands last
        details[-1] = f'<a href="{esc(view["trigger"]["url"])}" rel=noreferrer>{details[-1]}</a>'
    others = [esc(batch_words(b, view)) for b in view["batches"] if b["status"] != "completed"]
    details += others[:4]
    if len(others) > 4:
        details.append(f"and {len(others) - 4:,} more")
    return (
        f"<details class=run><summary><strong>{esc(view['name'])}</strong>"
        f"<span class={view['status']}>{view['status'].replace('_', ' ')} {finished}</span>"
        f'<progress max=100 value={percent} title="{percent}% of the requests"></progress>'
        f"<span class=dim>{esc(what_next(view, shot))}</span>"
        f"{f'<span class=error>{esc(error)}</span>' if error else ''}</summary>"
        f"{'<br>'.join(details)}</details>\n"
    )


def page(shot: Shown, stats: Stats, events: Iterable[Event], *, once: bool) -> str:
    """Return a snapshot as a page; with `once`, a pass of --once made it: no daemon is missed."""
    at, is_alive, needs = shot["generated_at"], shot["daemon"]["running"], shot["attention"]
    attention = f"{needs or 'Nothing'} need{'' if needs > 1 else 's'} attention"
    troubles = general_troubles(shot, stats)
    if not is_alive and not once:
        attention = f"Stopped, {attention[0].lower()}{attention[1:]}"
        troubles = [f"The daemon was stopped at {at}: nothing is polled or started.", *troubles]
    esc, room = html.escape, 8  # rows that stand unfolded, or three of each part
    body = [f"<p class=alarm role=alert>{esc(text)}</p>\n" for text in troubles]
    for part, views in in_parts(shot).items():
        rows = [page_row(view, shot) for view in views]
        shown, rest = rows[: max(3, room)], rows[max(3, room) :]
        room -= len(shown)
        body += [f"<h2>{part} ({len(rows):,})</h2>\n", *shown] if rows else []
        more = f"<details><summary>{len(rest):,} more</summary>{''.join(rest)}</details>\n"
        body.append(more if rest else "")
    lines = "".join(f"<li>{rfc3339(event.at)} {esc(event.text)}\n" for event in events)
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{attention} - TeckoChecker</title>
<link rel="icon" href="data:,">
<style>{PAGE_STYLE}</style>
<body data-made="{unix_of(at):.0f}" data-alive="{is_alive:d}">
<h1>TeckoChecker</h1>
<p>{attention}. {counts_in_words(v["status"] for v in shot["jobs"])}</p>
<p class=dim>Made at {at} <span id=age></span></p>
<p class="alarm stale">This page was made at {at}, and no other one since: the daemon is dead.</p>
<main>
{"".join(body)}<h2>Log</h2>
<details><summary>newest first</summary><ul>{lines}</ul></details></main>
<script>{PAGE_SCRIPT}</script>
</html>
"""


def put_file(path: Path, text: str, before: bytes | None = None) -> None:
    """Write a file that everyone may read, as a whole or not at all. Raises OSError.

    In the place of `before`, mode and owner stay; raises TeckoError if it has changed since.
    """
    new, old = path.with_name(f".{path.name}.new"), None if before is None else path.stat()
    new.unlink(missing_ok=True)
    private = functools.partial(os.open, mode=0o600)
    try:
        with open(new, "x", encoding="utf-8", errors="replace", opener=private) as file:
            if old:
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode) if old else 0o644)
            file.write(text)
            if old:
                file.flush()
                os.fsync(file.fileno())
        if before is not None and path.read_bytes() != before:
            raise TeckoError(f"{path} was changed meanwhile", "run the command again")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # a full disk is not to stay full for its sake


async def publish(engine: Engine, *, is_last: bool = False) -> None:
    """Write page, document and metrics on every change, and once a minute; or once, at the end."""

    def write(config: Config, directory: Path, runs: list[Run], stats: list[SecretStats]) -> None:
        daemon = {"running": False} if is_last else lock_owner(config.state_path)
        with Store.reading(config.state_path) as store:
            loaded = (store and store.meta("config")) or {}
            events = store.events(most=50)[::-1] if store else []
            query = """SELECT keboola_status, count(*) FROM runs
                WHERE phase = 'finished' AND keboola_status <> '' GROUP BY 1"""
            ended = dict(store.db.execute(query).fetchall()) if store else {}
        shot = snapshot(config, runs, stats, daemon, loaded, now=engine.clock.now())
        directory.mkdir(exist_ok=True)
        with engine.publishing:  # at the end, a thread may still write the one before
            put_file(directory / "status.json", f"{json.dumps(shot)}\n")
            put_file(directory / "metrics.prom", metrics(shot, stats, ended))
            put_file(directory / "status.html", page(shot, stats, events, once=engine.once))

    happened, trouble = asyncio.Event(), ""
    engine.told.append(happened)
    while True:
        happened.clear()
        started, before, trouble = time.monotonic(), trouble, ""
        config, stats = engine.loaded.config, list(engine.stats.values())
        directory = config.publish_path
        if directory:
            try:
                await asyncio.to_thread(write, config, directory, engine.shown(), stats)
            except Exception as error:  # noqa: BLE001 - nothing here may end what starts jobs
                trouble = one_line(f"{type(error).__name__}: {error}")
        if trouble != before:
            name = "publish_failed" if trouble else "publish_recovered"
            engine.log(Event.of(name, directory=str(directory), error=trouble))
        if is_last:
            return
        rest_s = min(50.0, max(1.0, 30 * (time.monotonic() - started)))  # to cost little CPU
        await asyncio.sleep(rest_s)
        await wait_for_event(happened, 50.0 - rest_s)


# ==================================================================================================
# 9. Commands: what a person types. Only these print
# ==================================================================================================


def config_path(args: argparse.Namespace) -> Path:
    given_path = getattr(args, "config", None)
    return Path(given_path or os.environ.get("TECKOCHECKER_CONFIG") or "config.yaml")


def wait_until_whole(path: Path) -> None:
    """Wait until a config that is rewritten in place has rested for two seconds, as a reload does.

    The state file knows what it said before, and its inode: one that was replaced is whole.
    """
    for _ in range(5):
        config, known, good = read_config_file(path, Files())[0], None, None
        with contextlib.suppress(TeckoError), Store.reading(config.state_path) as store:
            known, good = (store and store.meta(key) for key in ("config", "good_config"))
        rest_s = 0.0
        with contextlib.suppress(OSError):
            status = path.stat()
            if good and good.get("inode") == status.st_ino:
                rest_s = 2 - max(0.0, time.time() - status.st_mtime)
        if rest_s <= 0 or not known or known.get("sha256") == config.sha256:
            return
        time.sleep(rest_s)


def load_at_start(
    path: Path, files: Files, redactor: Redactor, *, once: bool
) -> tuple[LoadedConfig, ConfigError | None]:
    """Return the config to run with, and what is wrong with the file, if it is not that one.

    A daemon whose file the last edit broke goes on with the last good one of the state file.
    """
    wait_until_whole(path)
    try:
        return load_config(path, files, os.environ, redactor), None
    except ConfigError as error:
        state_path = read_config_file(path, files)[0].state_path
        with contextlib.suppress(TeckoError), Store.reading(state_path) as store:
            good = store and store.meta("good_config")
            if good and not once and good["path"] == str(path.absolute()):
                return load_config(path, files, os.environ, redactor, good["text"]), error
        raise


async def serve(path: Path, *, once: bool) -> int:
    """Be the daemon or, with `once`, one pass of it; returns the exit code."""
    redactor, files, writer, clock = Redactor(), Files(), LogWriter(), Clock()
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    loaded, rejected = load_at_start(path, files, redactor, once=once)
    config, signals = loaded.config, Signals()
    configure = functools.partial(configure_logging, redactor=redactor, writer=writer)
    configure(config)
    lock = StateLock(config.state_path, "--once" if once else "daemon", clock.now())
    store, http = Store.open(config.state_path), Http(config, redactor)
    webhooks = Http(replace(config, max_concurrency=10, request_timeout=10), redactor)
    engine = Engine(loaded, store, lock, http, clock, redactor, once, ServiceManager(os.environ))
    helpers = [
        functools.partial(keep_loaded, engine, files, configure, signals),
        functools.partial(publish, engine),
        functools.partial(send_webhooks, engine, webhooks),
    ]
    try:
        if not once:
            batches = sum(len(job.batch_ids) for job in config.jobs.values())
            facts: dict[str, Any] = {"jobs": len(config.jobs), "batches": batches}
            facts |= {"pid": os.getpid(), "version": __version__, "config": str(path)}
            what = f"{counted(len(config.jobs), 'job')}, {counted(batches, 'batch')}"
            engine.log(Event.of("daemon_started", what_text=what, **facts))
        engine.note_config(rejected)
        code = await run_engine(engine, signals, helpers)
        if not once:
            engine.log(Event.of("daemon_stopped"))
        elif code == 0:
            code = end_of_pass(engine)
        names = dict(config.notify) if once and not signals.stop.is_set() else {}
        telling = [tell_webhook(engine, webhooks, name) for name in names]
        hurry = asyncio.ensure_future((signals.stop if once else signals.now).wait())
        ending: list[asyncio.Future[Any]] = [
            asyncio.gather(publish(engine, is_last=True), *telling),
            hurry,
        ]
        await asyncio.wait(ending, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
    finally:
        await http.close()
        await webhooks.close()
        for used in (store, lock, writer):
            used.close()
    return 130 if once and signals.stop.is_set() else code


def end_of_pass(engine: Engine) -> int:
    """Tell what needs attention, when that is new and then once a day; returns the exit code."""
    engine.sweep()
    needs = {r.name: r.error or r.attention for r in engine.shown() if r.attention}
    needs |= {name: use.trouble for name, use in engine.stats.items() if use.trouble}
    names, now = list(needs), engine.clock.now()
    told = engine.store.meta("attention_told") or {}
    if needs and (told.get("names") != names or not 0 <= now - told["at"] < DAY_S):
        runs = "; ".join(f"{name} ({why})" for name, why in needs.items())
        event = Event.of("jobs_need_attention", count=len(names), runs=runs, names=names)
        remember = Store.meta_statement("attention_told", {"names": names, "at": now})
        engine.commit([], [event], [remember])
    elif told and not needs:
        engine.commit([], [], [Store.meta_statement("attention_told", {})])
    return 1 if needs or engine.has_failed else 0


def run_daemon(args: argparse.Namespace) -> int:
    """Start a Keboola job, once, when OpenAI has finished a team's batches.

    Without a command: run as the daemon, in the foreground, until SIGTERM; the config is read again
    whenever it changes, and on SIGHUP.
    """
    return asyncio.run(serve(config_path(args), once=args.once))


def painted(text: str, colour: str) -> str:
    """Return text in a colour, on a terminal whose owner wants colours (https://no-color.org)."""
    is_wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    code = {"red": 31, "green": 32, "dim": 2}.get(colour)
    return f"\033[{code}m{text}\033[0m" if code and text and is_wanted else text


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[text.ljust(n) for text, n in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def output_width() -> int:
    """Return how wide lines may be: a terminal's width, and elsewhere so wide that none breaks."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 10_000


def known_runs(config: Config, store: Store | None, wanted: str = "") -> list[Run]:
    """Return the runs of a config's jobs, as the state file has them or will; and one by name."""
    stored = {run.id: run for run in store.runs_for(config.jobs)} if store else {}
    job_name, _, group = wanted.partition("/")
    if store and group:
        stored |= {run.id: run for run in store.groups(job_name, [group]).values()}
    runs, by_job = [], dict[str, dict[int, Run]]()
    for run in stored.values():
        by_job.setdefault(run.job, {})[run.id] = run
    for name, job in config.jobs.items():
        own = by_job.get(name, {})
        if ids := {*job.batch_ids}:
            batches = tuple(map(Batch, job.batch_ids))
            new = Run(0, name, config.target(job), batches=batches, next_at=math.inf)
            same = (r for r in own.values() if not r.group and {b.id for b in r.batches} == ids)
            run = next(same, new)
            runs.append(replace(run, batches=in_order(job, run.batches)))
            own.pop(run.id, None)
        runs += [r for r in own.values() if (job.match and r.group) or r.is_begun]
    return runs


def run_check(args: argparse.Namespace) -> int:
    """Validate the config offline, just as the start does.

    YAML, every key, the Fernet key and every secret. Each problem is one line with its place and
    its cure. No server is asked.
    """
    path = config_path(args)
    loaded = load_config(path, Files(), os.environ, Redactor())
    for warning in loaded.warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    jobs, secrets = loaded.config.jobs.values(), counted(len(loaded.secrets), "secret")
    batches = counted(sum(len(job.batch_ids) for job in jobs), "batch")
    print(f"{path}: fine: {counted(len(jobs), 'job')}, {batches}, {secrets}")
    return 0


EXAMPLE_CONFIG: Final = """\
# A first config for TeckoChecker. Put your own in place of what is in CAPITALS, then run
# `teckochecker encrypt` and `teckochecker check`. config.example.yaml names all keys.

# publish: www                       # a directory for status.html, status.json, metrics.prom

secrets:
  openai-prod:
    type: openai
    value: YOUR-OPENAI-KEY           # in plain only until `teckochecker encrypt`
  keboola-prod:
    type: keboola
    value: YOUR-KEBOOLA-TOKEN
    stack_url: https://connection.keboola.com   # the address in your browser, up to the first /
  # alerts: {type: webhook, value: https://YOUR-WEBHOOK}   # the address is secret: encrypt it

# notify:                            # who is told when something needs attention
#   - {secret: alerts}

defaults:                            # any key of a job; the job's own value wins
  openai_secret: openai-prod
  keboola_secret: keboola-prod
  component_id: kds-team.app-custom-python   # keboola.orchestrator or keboola.flow starts a Flow
  poll_interval: 30s                 # 1s to 24h; durations are 30s, 2m, 1h30m, 7d

jobs:
  my-first-job:                      # any name without a /
    batch_ids: [batch_YOUR_ID]       # 1 to 10; when all are finished, the Keboola job is started
    config_id: "123456"              # the Keboola configuration to start
    # deadline: 26h                  # needs attention when the batches take longer than that
  # found-by-metadata:               # batches are found by their metadata, as they come
  #   match: {pipeline: nightly}     # every pair must be equal; instead of batch_ids
  #   since: 2026-11-25              # batches created before that date (UTC) are ignored
  #   config_id: "123457"
"""


def run_init(args: argparse.Namespace) -> int:
    """Write a commented config.yaml and a new key file.

    Only you can read them (mode 0600). What is there already is never overwritten.
    """
    directory, made = Path(args.directory), []
    config, key = directory / "config.yaml", directory / "teckochecker.key"
    directory.mkdir(parents=True, exist_ok=True)
    private = functools.partial(os.open, mode=0o600)
    for path, text in ((config, EXAMPLE_CONFIG), (key, f"{Fernet.generate_key().decode()}\n")):
        with contextlib.suppress(FileExistsError):
            with open(path, "x", encoding="utf-8", opener=private) as file:
                file.write(text)
            made.append(path)
    if not made:
        raise UsageError(f"{config} and {key} are there already", "nothing is overwritten")
    command = f"teckochecker --config {shlex.quote(str(config))}"
    print(f"wrote {' and '.join(map(str, made))}, which only you can read. Next:")
    print(f"  1. edit {config}: stack, batch ids, config_id, and the tokens, in plain for now")
    print(f"  2. {command} encrypt")
    print(f"  3. {command} doctor, then without a command: the daemon")
    return 0


# --- editing the config ---------------------------------------------------------------------------


@dataclass(slots=True)
class ConfigEditor:
    """A config's text, changed at the marks of its YAML nodes; all else keeps every byte.

    Each change is read back: where the new text does not say what is meant, or says more than that,
    TeckoError is raised, and the text stays. A byte order mark is no part of the text.
    """

    text: str
    tree: YamlNode

    def find(self, *path: str) -> YamlNode | None:
        found: YamlNode | None = self.tree
        for name in path:
            found = found.entries("").get(name) if found else None
        return found

    def entries(self, *path: str) -> dict[str, YamlNode]:
        found = self.find(*path)
        return found.entries("") if found else {}

    def secret_users(self) -> dict[str, list[str]]:
        """Return who uses each secret: jobs (also unfinished ones), `defaults` and `notify`."""
        defaults, rules = self.entries("defaults"), self.find("notify")
        uses = [("defaults", defaults)]
        uses += [(name, defaults | job.entries("")) for name, job in self.entries("jobs").items()]
        uses += [("notify", rule.entries("")) for rule in (rules.items("") if rules else ())]
        users: dict[str, list[str]] = {}
        for user, keys in uses:
            for key in ("openai_secret", "keboola_secret", "secret"):
                if key in keys and (name := keys[key].text("")):
                    users.setdefault(name, []).append(user)
        return users

    def set(self, value: object, *path: str) -> None:
        """Replace a value, or add it below those beside it; makes a missing section."""
        node, parent = self.find(*path), self.find(*path[:-1])
        if parent is None:
            self.set({path[-1]: value}, *path[:-1])
        elif node is None:
            self._apply(self._added(parent, value, *path), value, *path)
        else:
            start, end = node.node.start_mark.index, node.node.end_mark.index
            end = start + len(self.text[start:end].rstrip())  # a block's mark is where others begin
            comment = re.match(r"[|>][-+\d]*([ \t]+#[^\r\n]*)", self.text[start:end])
            new = f"{'' if start < end else ' '}{self._yaml(value)}{comment[1] if comment else ''}"
            self._apply([(start, end, new)], value, *path)

    def remove(self, *path: str) -> None:
        """Remove a key with its value and the comments inside; an emptied section becomes {}."""
        entry, parent = self.find(*path), self.find(*path[:-1])
        if entry is None or parent is None:
            raise UsageError(f"{self.tree.file} has no {'.'.join(path)}", "nothing is changed")
        start, end, splices = entry.key.start_mark.index, entry.node.end_mark.index, []
        node: Any = parent.node
        if not node.flow_style:
            start, end = start - entry.key.start_mark.column, self._end_of(entry.key, parent)
            end = self.text.find("\n", end) + 1 or end
            if len(node.value) == 1:
                colon = self.text.find(":", parent.key.end_mark.index) + 1
                splices = [(colon, colon, " {}")]
        elif comma := re.match(r"\s*,[ \t]*", self.text[end:]):
            end += comma.end()
        elif (before := self.text[:start].rstrip(" \t")).endswith(","):
            start = len(before) - 1
        line, rest = self.text.rfind("\n", 0, start) + 1, re.match(r"[ \t]*\r?\n", self.text[end:])
        if node.flow_style and rest and not self.text[line:start].strip():
            start, end = line, end + rest.end()  # it had lines of its own
        self._apply([(start, end, ""), *splices], None, *path)

    def _yaml(self, value: object) -> str:
        """Return a value in flow style, in quotes where text would be read as another type."""
        if isinstance(value, Mapping):
            pairs = (f"{self._yaml(key)}: {self._yaml(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._yaml, value))}]"
        text = json.dumps(value, ensure_ascii=False)  # which is YAML too
        if re.search("[\ud800-\udfff]", text):
            raise UsageError(f"{quoted(text)} is not UTF-8 text", "nothing is changed")
        if isinstance(value, str) and re.fullmatch(r"\w[\w ./=@-]*(?<! )", value):
            node: Any = yaml.compose(value, Loader=_LOADER)
            text = value if node.tag == f"{_TAG}str" else text
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)

    def _block(self, values: Mapping[str, object], column: int, depth: int) -> Iterator[str]:
        """Yield lines in block style; below depth 3, where a job has its keys, in flow style."""
        for key, value in values.items():
            head = f"{' ' * column}{self._yaml(key)}:"
            if value and isinstance(value, Mapping) and depth < 3:
                yield head
                yield from self._block(value, column + (column or 2), depth + 1)
            else:
                yield f"{head} {self._yaml(value)}"

    def _end_of(self, key: yaml.Node, parent: YamlNode) -> int:
        """Return where the last line of an entry ends: of its value, or of a deeper comment."""
        start, column = key.start_mark.index, key.start_mark.column
        limits = [parent.node.end_mark.index, *(k.start_mark.index for k, _ in parent.node.value)]
        lines = self.text[start : min(limit for limit in limits if limit > start)].split("\n")
        while re.fullmatch(rf"\s*| {{0,{column}}}#.*", lines[-1]):
            lines.pop()
        return start + len("\n".join(lines).rstrip("\r"))

    def _added(self, parent: YamlNode, value: object, *path: str) -> list[tuple[int, int, str]]:
        """Return the splices that put a key below those beside it, in their style."""
        node: Any = parent.node
        outer: Any = self.find(*path[:-2])
        pair, splices = {path[-1]: value}, []
        start, end = node.start_mark.index, node.end_mark.index
        is_empty = self.text[start:end] in {"", "{}", "~", "null"}
        if is_empty and path[1:] and not outer.node.flow_style:
            splices = [(len(self.text[:start].rstrip(" \t")), end, "")]
            column, below = parent.key.start_mark.column, self._end_of(parent.key, outer)
            column += column or 2
        elif not parent.is_mapping:
            return []
        elif node.flow_style:
            new = self._yaml(pair)[1:-1]
            if not node.value:
                return [(end - 1, end - 1, new)]
            end, last = node.value[-1][1].end_mark.index, node.value[-1][0].start_mark
            indent = self.text[last.index - last.column : last.index]
            rest = re.match(r"([ \t]*,)?[ \t]*(?:#[^\r\n]*)?(?=(\r?\n))", self.text[end:])
            if indent.isspace() and rest:  # each begins a line, and so does the new one
                comma = (rest[1] or "").strip()
                new = f"{rest[0]}{rest[2]}{indent}{new}{comma}"
                return [(end, end + rest.end(), new if comma else f",{new}")]
            return [(end, end, f", {new}")]
        else:
            last = node.value[-1][0]
            column, below = last.start_mark.column, self._end_of(last, parent)
        line_end = "\r\n" if "\r\n" in self.text else "\n"
        lines = "".join(f"{line_end}{line}" for line in self._block(pair, column, len(path)))
        return [*splices, (below, below, lines)]

    def _apply(self, splices: list[tuple[int, int, str]], value: object, *path: str) -> None:
        """Change the text, if all it says differently then is `value` at `path` (None: removed)."""
        meant: Any = self.tree.plain_value()
        inner = meant
        for name in path[:-1]:
            inner[name] = inner[name] if isinstance(inner.get(name), dict) else {}
            inner = inner[name]
        inner.pop(path[-1], None)
        if value is not None:
            node: Any = yaml.compose(self._yaml(value), Loader=_LOADER)
            inner[path[-1]] = replace(self.tree, node=node).plain_value()
        text = self.text
        for start, end, new in sorted(splices, reverse=True):
            text = text[:start] + new + text[end:]
        tree = compose(text, Path(self.tree.file), [])
        if tree is None or tree.plain_value() != meant:
            what = f"cannot change {one_line('.'.join(path))} in {self.tree.file}"
            why = "an anchor, a key that stands twice, or the layout is in the way"
            raise TeckoError(f"{what}: {why}", "edit it by hand")
        self.text, self.tree = text, tree


def edit_config(path: Path, change: Callable[[ConfigEditor, Config], str]) -> int:
    """Change the config file, if that brings no new problem; print what `change` says, return 0."""
    real, files = Path(os.path.realpath(path)), Files()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without locks, what others change is still noticed
            fd = os.open(real.parent, os.O_RDONLY)
            stack.callback(os.close, fd)
            for _ in range(500):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.02)
            else:
                what = f"another command has been changing {path} for ten seconds"
                raise TeckoError(what, "run this one again")
        config, problems, text = read_config_file(path, files)
        tree = compose(text, path, [])
        if tree is None:
            raise ConfigError(problems)
        old = text.removeprefix("\ufeff")
        editor = ConfigEditor(old, tree)
        done = change(editor, config)
        known = {(problem.path, problem.what) for problem in problems}
        for problem in parse_config(editor.text, path)[1]:
            if (problem.path, problem.what) not in known:
                raise UsageError(one_line(f"{problem.path}: {problem.what}", 1000), problem.cure)
        try:
            if editor.text != old:
                new = text[: len(text) - len(old)] + editor.text
                put_file(real, new, files.read(path).data)
        except OSError as error:
            hint = "run this as the file's owner, with room on the disk"
            if error.errno == errno.EBUSY:
                hint = "it is a mount of its own: mount its directory instead"
            raise TeckoError(f"cannot replace {path}: {error.strerror}", hint) from None
    print(done)
    if problems:
        print(f"but no daemon takes this config: {problems[0]}", file=sys.stderr)
    return 0


def encrypt_values(editor: ConfigEditor, config: Config, *only: str, rotate: bool = False) -> str:
    """Put tokens in the place of plain values. Raises ConfigError for each that cannot be one."""
    keys, tokens, problems = read_keys(config, Files(), os.environ)[0], {}, []
    for name in only or editor.entries("secrets"):
        own = editor.entries("secrets", name)
        texts = {key: node.text("") for key, node in own.items()}
        if (text := texts.get("value")) is None:
            continue
        opened, has_form = decrypted(keys, text)
        plain = text if opened is None else opened
        problem = token_problem(plain, texts.get("type") or "")
        if opened is None and has_form:
            problem = "is encrypted with another key", "add that key after the first one"
        if problem:
            own["value"].bad(*problem)
            problems.append(own["value"].problems[-1])
        elif opened is None or rotate:
            tokens[name] = keys.encrypt(plain.encode()).decode()
    if problems:
        raise ConfigError(problems)
    for name, token in tokens.items():
        editor.set(token, "secrets", name, "value")
    return f"encrypted: {', '.join(tokens)}" if tokens else "nothing to do: no value is in plain"


def run_encrypt(args: argparse.Namespace) -> int:
    """Encrypt every plain value under `secrets:` in the config, in place.

    What is encrypted already stays, but --rotate encrypts it with the first key; the old one can
    then be removed from the key file. If one value cannot be encrypted, nothing is written.
    """
    return edit_config(config_path(args), functools.partial(encrypt_values, rotate=args.rotate))


def run_secret(args: argparse.Namespace) -> int:
    """List the secrets of the config, set one, or remove one.

    `set` asks for the value without showing it, or reads it from standard input, and writes it into
    the config, encrypted. A new secret needs --type; one of type keboola also --stack-url. `remove`
    is refused while anything uses the secret. `list` shows types and users, and never a value.
    """
    name, value = getattr(args, "name", ""), ""
    if args.action == "set":  # not under the lock: it may take long
        with contextlib.suppress(EOFError, AttributeError):  # AttributeError: it is closed
            if sys.stdin.isatty():
                value = getpass.getpass(f"{name}: ").strip()
            else:
                value = sys.stdin.buffer.read(70_000).decode("utf-8", "replace").strip()

    def change(editor: ConfigEditor, config: Config) -> str:
        users = editor.secret_users()
        if args.action == "list":
            rows = [("SECRET", "TYPE", "USED BY")]
            for each in editor.entries("secrets"):
                secret, using = config.secrets.get(each), ", ".join(users.get(each, ["nobody"]))
                kind = secret.type if secret else "not readable: run `check`"
                rows.append((one_line(each), kind, one_line(using, 80)))
            return "\n".join(table(rows)) if rows[1:] else "no secrets"
        if args.action == "remove":
            if name in users:
                using = one_line(", ".join(users[name]))
                raise UsageError(f"the secret {name} is used by {using}", "change that first")
            editor.remove("secrets", name)
            return f"removed: {name}"
        old = config.secrets.get(name)
        if old and args.type not in {None, old.type}:
            cure = "leave --type out, or remove the secret first"
            raise UsageError(f"the secret {name} is of another type, {old.type}", cure)
        values = {"type": None if old else args.type, "value": value}
        values |= {"stack_url": args.stack_url, "base_url": args.base_url}
        for key, text in given(values).items():
            editor.set(text, "secrets", name, key)
        return encrypt_values(editor, config, name)

    return edit_config(config_path(args), change)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    for key, reader in JOB_KEYS.items():
        option, is_ids = f"--{key.replace('_', '-')}", key.endswith("_ids")
        if reader is YamlNode.boolean:
            parser.add_argument(option, dest=key, action=argparse.BooleanOptionalAction)
        elif is_ids or key in {"match", "variables"}:
            option, form = option.removesuffix("s"), "ID" if is_ids else "KEY=VALUE"
            parser.add_argument(option, dest=key, metavar=form, action="append", help="repeatable")
        else:
            parser.add_argument(option, dest=key, metavar="TEXT")


def run_job(args: argparse.Namespace) -> int:
    """Add a job to the config, or pause, resume or remove one.

    The daemon sees the change by itself. `add` needs --batch-id or --match, and what `defaults:`
    does not say already. A paused job polls nothing and starts nothing; of a removed one, the runs
    in flight are finished. Comments and layout of the file stay as they are.
    """
    name = args.name

    def change(editor: ConfigEditor, _: Config) -> str:
        is_there = editor.find("jobs", name) is not None
        if args.action == "add":
            if is_there:
                raise UsageError(f"there is a job {quoted(name)} already", "choose another name")
            values = given({key: getattr(args, key) for key in JOB_KEYS})
            for key in values.keys() & {"match", "variables"}:
                pairs = [text.partition("=") for text in values[key]]
                if not all(left and equals for left, equals, _ in pairs):
                    raise UsageError(f"{key} is written KEY=VALUE", "nothing is changed")
                values[key] = {left: right for left, _, right in pairs}
                if len(values[key]) < len(pairs):
                    raise UsageError(f"{key} has one KEY twice", "nothing is changed")
            editor.set(values, "jobs", name)
        elif not is_there:
            raise UsageError(f"there is no job {quoted(name)}", "`status` lists them all")
        elif args.action == "remove":
            editor.remove("jobs", name)
        else:
            editor.set(args.action == "pause", "jobs", name, "paused")
        return f"{args.action.removesuffix('e')}ed: {name}"

    return edit_config(config_path(args), change)


# --- doctor, import -------------------------------------------------------------------------------


class Doctor:
    """Tries everything that has to be right, and prints a line about each thing."""

    def __init__(self, loaded: LoadedConfig, redactor: Redactor) -> None:
        self.counts: collections.Counter[str] = collections.Counter()  # of lines, by mark
        self._config, self._secrets, self._redactor = loaded.config, loaded.secrets, redactor
        self._polled: dict[str, set[str]] = {}  # job -> batches; what is over may be gone by now

    def tell(self, mark: str, what: str, cure: str = "") -> None:
        """Print what is right (✓), could be better (!) or is wrong (✗), and count it."""
        self.counts[mark] += 1
        is_utf = (sys.stdout.encoding or "").lower().startswith("utf")
        words = {} if is_utf else {"✓": "ok", "✗": "WRONG"}
        shown = painted(words.get(mark, mark), {"✓": "green", "✗": "red"}.get(mark, ""))
        text = self._redactor.text(f"{what}; {cure}" if cure else what)
        print(shown, one_line(text, 1000), flush=True)

    def check_files(self) -> None:  # noqa: C901 - one thing after the other
        config, jobs = self._config, self._config.jobs
        state, publish = config.state_path, config.publish_path
        places = {"the state file": state.parent}
        if publish:
            places["published files"] = publish if os.path.lexists(publish) else publish.parent
        for what, directory in places.items():
            text = f"{directory}, for {what},"
            if not os.access(directory, os.W_OK | os.X_OK):
                cure = "create it, or run this as the daemon's user"
                self.tell("✗", f"{text} is not there, or not this user's to write", cure)
            elif (free_mib := shutil.disk_usage(directory).free >> 20) < 100:
                self.tell("✗", f"{text} has only {free_mib} MiB left", "make room on that disk")
            else:
                self.tell("✓", f"{text} has {free_mib:,} MiB left")
        runs, there = known_runs(config, None), "is not there yet: the first start makes it"
        try:
            with Store.reading(state) as store:
                if store:
                    store.check_undamaged()
                    runs, there = known_runs(config, store), "is whole"
            is_there(state.with_name(f"{state.name}.lock"))
            self.tell("✓", f"the state file {state} {there}")
            if state.parent.is_dir():
                self._check_owners()
        except TeckoError as error:
            self.tell("✗", str(error))
        self._polled = {n: set() for n, job in jobs.items() if job.match and not job.done}
        for run in runs:
            if run.phase is not Phase.FINISHED and not jobs[run.job].done:
                ids = {batch.id for batch in run.batches if not batch.is_final}
                self._polled.setdefault(run.job, set()).update(ids)
        if over := len(jobs) - len(self._polled):
            self.tell("✓", f"{counted(over, 'job')} finished: not tried any more")

    def _check_owners(self) -> None:
        # The daemon's user is the directory's owner; in one of root's, the lock file tells who.
        config, state = self._config.path, self._config.state_path
        lock, *others = (state.with_name(state.name + end) for end in (".lock", "-wal", "-shm"))
        model = lock if lock.exists() and state.parent.stat().st_uid == 0 else state.parent
        user = model.stat()
        is_private = user.st_uid != 0 and not config.stat().st_mode & 0o044
        for path in (*([config] if is_private else []), state, lock, *others):
            if path.exists() and path.stat().st_uid != user.st_uid:
                what = f"{path} belongs to {owner_of(path)}, but {model} to {owner_of(model)}"
                run = f"run: chown {user.st_uid}:{user.st_gid} {shlex.quote(str(path))}"
                self.tell("✗", what, run)

    async def check_servers(self) -> None:
        """Ask OpenAI and Keboola with every secret about all that the jobs need of them."""
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        http, clock = Http(self._config, self._redactor), Clock()
        try:
            for name, secret in self._secrets.items():
                entry = self._config.secrets[name]
                parts = entry, secret, http, clock
                with self._trying(name, f"{name}: {entry.stack_url or entry.base_url}"):
                    if entry.type == "openai":
                        await self._check_openai(OpenAI(*parts, lambda *_: None))
                    elif entry.type == "keboola":
                        await self._check_keboola(Keboola(*parts, lambda *_: None))
        finally:
            await http.close()

    @contextlib.contextmanager
    def _trying(self, name: str, what: str, not_there: str = "") -> Iterator[None]:
        """Tell of a request that fails; `not_there` is the cure of an id that is wrong."""
        try:
            yield
        except ApiError as error:
            token, address = self._new_token(name), "check the address, the network and the proxy"
            cures = {None: address, 200: address, 401: token, 403: token, 404: address}
            cures |= dict.fromkeys((400, 403, 404), not_there) if not_there else {}
            otherwise = "see the server's own words, and its status page"
            self.tell("✗", f"{what}: {error}", cures.get(error.status, otherwise))

    def _new_token(self, name: str) -> str:
        entry, config = self._config.secrets[name], shlex.quote(str(self._config.path))
        if entry.source != "value":
            return f"make a new one, and put it into {entry.source} {entry.text.reveal()}"
        return f"make a new one, then run: teckochecker --config {config} secret set {name}"

    async def _check_openai(self, openai: OpenAI) -> None:
        """Check an OpenAI key, and whether it reads the batches that are polled with it."""
        name, jobs, shown = openai.name, self._config.jobs, set[str]()
        polled = {job: ids for job, ids in self._polled.items() if jobs[job].openai_secret == name}
        count = sum(map(len, polled.values()))
        try:
            shown = {row["id"] for row in (await openai.page(None))[0]}
            self.tell("✓", f"{name}: {self._config.secrets[name].base_url} takes the key")
        except ApiError as error:
            is_needed = not count or any(jobs[job].match for job in polled)
            if is_needed or error.status not in {404, 405, 429, 501}:  # these are the list's alone
                raise
        read, cure = 0, "correct the id, the secret or its base_url"
        for job, batch_id in ((job, batch_id) for job, ids in polled.items() for batch_id in ids):
            with self._trying(name, f"job {job}: {batch_id}", cure):
                if batch_id not in shown:
                    await openai.ask(batch_id)
                read += 1
        if read:
            self.tell("✓", f"{name}: reads {read:,} of {counted(count, 'batch')}")

    async def _check_keboola(self, keboola: Keboola) -> None:
        """Check a Keboola token, and every configuration that is started with it."""
        name, said = keboola.name, await keboola.verify()
        project = text_or_none(as_dict(said.get("owner")).get("name")) or await keboola.project()
        mark, end, cure = "✓", "", ""
        with contextlib.suppress(ValueError, OverflowError):  # most tokens do not expire
            expires = datetime.fromisoformat(str(said.get("expires")))
            left_s = expires.replace(tzinfo=expires.tzinfo or UTC).timestamp() - time.time()
            end = f", expires in {counted(max(0, int(left_s // DAY_S)), 'day')}"
            if left_s < 14 * DAY_S:
                mark, cure = "!", self._new_token(name)
        self.tell(mark, f"{name}: the token is one of project {quoted(project)}{end}", cure)
        if said.get("canCreateJobs") is False:
            cure = f"give it that right, or {self._new_token(name)}"
            self.tell("✗", f"{name}: the token may not start jobs (canCreateJobs is false)", cure)
        jobs: dict[Target, list[Job]] = {}
        for job in map(self._config.jobs.__getitem__, self._polled):
            if job.keboola_secret == name:
                jobs.setdefault(self._config.target(job), []).append(job)
        for target, its_jobs in jobs.items():
            cure = "correct component_id, config_id, branch_id or the token's rights"
            more = f" (and {len(its_jobs) - 1} more)" if len(its_jobs) > 1 else ""
            text = f"job {its_jobs[0].name}{more}: {target}"
            with self._trying(name, text, cure):
                await self._check_target(keboola, target, text, its_jobs)

    async def _check_target(
        self, keboola: Keboola, target: Target, text: str, jobs: list[Job]
    ) -> None:
        """Check that a configuration can be started, and gets its variables from each job."""
        await keboola.search(target, time.time() - MINUTE_S, "-")
        content = as_dict((await keboola.configuration(target)).get("configuration"))
        if key := id_text(content.get("variables_id")):
            place = replace(target, component_id="keboola.variables", config_id=key)
            content = as_dict((await keboola.configuration(place)).get("configuration"))
        self.tell("✓", f"{text} is there")
        # The tasks of a Flow get the variables that it is started with.
        if not key and target.component_id not in {"keboola.orchestrator", "keboola.flow"}:
            cure = "connect a variables configuration to it (README, What Keboola gets)"
            self.tell("!", f"{text} has no variables_id: its Keboola job gets no batch ids", cure)
        rows = content.get("variables") if key else None
        declared = [str(as_dict(v).get("name")) for v in rows] if isinstance(rows, list) else []
        for job in jobs:
            sent = keboola_variables(Run(0, job.name, target, "a" if job.match else ""), job)
            if missing := ", ".join(name for name in declared if name not in sent):
                cure = "add them to the job's variables: what is sent replaces the defaults"
                self.tell("✗", f"job {job.name}: {target} needs the variables {missing}", cure)


def run_doctor(args: argparse.Namespace) -> int:
    """Try everything that has to be right: a line each, with the cure.

    Nothing is started or changed, and it works beside the daemon. Exits 1 if anything is wrong.
    """
    redactor = Redactor()
    loaded, problems = open_config(config_path(args), Files(), os.environ, redactor)
    config, doctor = loaded.config, Doctor(loaded, redactor)
    for problem in ConfigError(problems).problems:
        doctor.tell("✗", str(problem))
    if not problems:
        jobs = counted(len(config.jobs), "job")
        doctor.tell("✓", f"{config.path}: {jobs}, and every secret opens")
    for warning in loaded.warnings:
        doctor.tell("!", warning)
    if config.sha256:
        doctor.check_files()
        asyncio.run(doctor.check_servers())
    wrong, warnings = doctor.counts["✗"], doctor.counts["!"]
    print(f"{counted(wrong, 'problem')}, {counted(warnings, 'warning')}")
    return 1 if wrong else 0


class Importer:
    """Makes a config of TeckoChecker 0.9's database; `notes` tell what a person has to decide."""

    def __init__(self, db: sqlite3.Connection, old: Fernet, new: MultiFernet) -> None:
        db.row_factory = sqlite3.Row
        self.notes: list[str] = []
        self.secrets: dict[str, dict[str, str]] = {}
        self._db, self._old, self._new = db, old, new
        self._names: dict[tuple[int, str], str] = {}  # of secrets, by old id and stack

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return the jobs; none starts by itself that may have been started: a note tells why."""
        jobs: dict[str, dict[str, Any]] = {}
        cure = "it is paused now: remove paused: to start it, or write done: true"
        unclear = "all its batches are finished, but its log has no start of Keboola"
        rows = self._db.execute("SELECT * FROM polling_jobs ORDER BY id").fetchall()
        logs = self._db.execute("SELECT job_id, status, message FROM polling_logs")
        lines = [(job_id, f"{status} {message}".lower()) for job_id, status, message in logs]
        started = {job_id for job_id, line in lines if "keboola_triggered" in line}
        trouble = re.compile("trigger.*(fail|error)|(fail|error).*trigger", re.DOTALL)
        failed = {job_id for job_id, line in lines if trouble.search(line)}
        query = "SELECT batch_id, status FROM job_batches WHERE job_id = ? ORDER BY id"
        for row in rows:
            batches = self._db.execute(query, (row["id"],)).fetchall()
            statuses = {str(status).lower() for _, status in batches} - {"canceled"}
            state = one_line(str(row["status"] and row["status"].lower()))
            was_completed, was_started = state.startswith("completed"), row["id"] in started
            is_pending = any(STATUS_RANK.get(status) != 3 for status in statuses)
            cases = (
                (state == "paused", "paused", ""),
                (was_completed and (was_started or row["id"] not in failed), "done", ""),
                (was_completed, "paused", f", but could not start Keboola; {cure}"),
                (state != "active", "paused", f"; {cure}"),
                (was_started, "done", ", but has started Keboola: it is done now"),
                (not is_pending, "paused", f", and {unclear}; {cure}"),
                (True, "", ""),
            )
            rest, note = next((rest, note) for holds, rest, note in cases if holds)
            name = one_line(str(row["name"]).replace("/", "-"), 180) or "job"
            while name in jobs:
                name = f"{name}-{row['id']}"
            self.notes += [f"the job {name} was {state}{note}"] if note else []
            stack_url = (row["keboola_stack_url"] or "").rstrip("/")
            jobs[name] = {
                "batch_ids": [*dict.fromkeys(str(batch_id) for batch_id, _ in batches)],
                "config_id": str(row["keboola_configuration_id"] or ""),
                "openai_secret": self._secret(row["openai_secret_id"], "openai", ""),
                "keboola_secret": self._secret(row["keboola_secret_id"], "keboola", stack_url),
                "component_id": str(row["keboola_component_id"] or ""),
                "poll_interval": f"{row['poll_interval_seconds'] or 120}s",
                **({rest: True} if rest else {}),
            }
        return jobs

    def _secret(self, number: int, kind: str, stack_url: str) -> str:
        """Have a secret in the config; returns its name. A token with two stacks becomes two."""
        query = "SELECT name, value FROM secrets WHERE id = ?"
        row = self._db.execute(query, (number,)).fetchone()
        if row is None or (number, stack_url) in self._names:
            return self._names.get((number, stack_url), f"secret-{number}")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(row["name"])).strip("-._")[:80] or "secret"
        while name in self.secrets:
            name = f"{name}-{number}"
        try:
            value = self._new.encrypt(self._old.decrypt(row["value"])).decode()
        except (InvalidToken, ValueError, TypeError):
            message = f"$SECRET_KEY does not open the secret {quoted(str(row['name']))}"
            raise UsageError(message, "set $SECRET_KEY as the old program had it") from None
        base_url = os.environ.get("OPENAI_BASE_URL") if kind == "openai" else ""
        entry = {"type": kind, "value": value, "stack_url": stack_url, "base_url": base_url}
        self.secrets[name] = {key: text for key, text in entry.items() if text}
        self._names[number, stack_url] = name
        return name


def run_import(args: argparse.Namespace) -> int:
    """Print a config made from a database of TeckoChecker 0.9, with its $SECRET_KEY.

    Exits 1 if something is left to correct or to decide; standard error says what.
    """
    path, files = config_path(args), Files()
    keys = read_keys(read_config_file(path, files)[0], files, os.environ)[0]
    digest = hashlib.sha256(os.environb.get(b"SECRET_KEY", b"")).digest()
    uri = f"{Path(args.old).absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            importer = Importer(db, Fernet(base64.urlsafe_b64encode(digest)), keys)
            jobs = importer.jobs()
    except sqlite3.Error as error:  # its name is not echoed: PostgreSQL's has a password in it
        cure = "name a copy of 0.9's SQLite file (if it was PostgreSQL, copy its tables into one)"
        raise UsageError(f"cannot import OLD.db: {error}", cure) from None
    defaults = {}
    for key in ("openai_secret", "keboola_secret", "component_id", "poll_interval"):
        if len({job[key] for job in jobs.values()}) == 1:
            *_, defaults[key] = [job.pop(key) for job in jobs.values()]
    is_utf = (sys.stdout.encoding or "").lower().startswith("utf")
    layout: Any = {"sort_keys": False, "allow_unicode": is_utf, "width": 1000}
    head = "# Imported from TeckoChecker 0.9. Put it in place of config.yaml and run `check`."
    shared = yaml.safe_dump({"secrets": importer.secrets, "defaults": defaults}, **layout)
    text = f"{head}\n{shared}{yaml.safe_dump({'jobs': jobs}, default_flow_style=None, **layout)}"
    notes = [*importer.notes, *map(str, parse_config(text, Path("<imported>"))[1])]
    for note in notes:
        print(f"teckochecker: {note}", file=sys.stderr)
    print(text, end="")
    return 1 if notes else 0


# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a command knows: the config that counts, its runs, and the snapshot of these."""

    config: Config
    runs: Sequence[Run]
    shot: dict[str, Any]
    troubles: Sequence[str]  # what needs attention and is no run
    store: Store | None  # None: nothing has run yet

    @classmethod
    @contextlib.contextmanager
    def open(cls, args: argparse.Namespace) -> Iterator[View]:
        """Open what the state file knows or, where nothing has run yet, what the start would make.

        Where the config has problems, the last good one counts, as it does for the daemon.
        """
        if re.search("[\ud800-\udfff]", args.job or ""):
            raise UsageError("the name is not UTF-8 text")
        path, files = config_path(args), Files()
        config, problems, _ = read_config_file(path, files)
        if problems:
            _, problems = open_config(path, files, os.environ, Redactor())  # without secrets
            if not config.sha256 and not is_there(config.state_path):
                raise ConfigError(problems)
        with Store.reading(config.state_path) as store:
            loaded = (store and store.meta("config")) or {}
            good = (store and store.meta("good_config")) or {}
            if problems:
                loaded["error"] = str(ConfigError(problems))
                if good.get("path") == str(path.absolute()):
                    config, _ = parse_config(good["text"], path)
            runs = known_runs(config, store, args.job or "")
            stats = [s for s in store.stats().values() if s.name in config.secrets] if store else []
            owner = lock_owner(config.state_path)
            shot = snapshot(config, runs, stats, owner, loaded, now=time.time())
            yield cls(config, runs, shot, general_troubles(shot, stats), store)

    def chosen(self, name: str) -> list[tuple[Run, dict[str, Any]]]:
        """Return the runs that a name means: one run, or those of a job. Raises UsageError."""
        pairs = zip(self.runs, self.shot["jobs"], strict=True)
        found = [(run, shown) for run, shown in pairs if name in {run.name, run.job}]
        if not found and name not in self.config.jobs:
            hint = "`teckochecker status` lists them all"
            raise UsageError(f"there is no job {quoted(name)}", hint)
        return found

    def overview(self) -> Iterator[str]:
        """Yield the runs, attention first; on a terminal within its width, and not too many."""
        shot, width = self.shot, output_width()
        views = [view for part in in_parts(shot).values() for view in part]
        shown = views[:60] if sys.stdout.isatty() else views
        rows = [("RUN", "STATUS", "BATCHES", "LAST POLL")]
        for view in shown:
            (finished, percent), status = progress_of(view), view["status"].replace("_", " ")
            name, polled = one_line(view["name"], max(12, width - 54)), view["last_check_at"]
            rows.append((name, status, f"{finished} {percent:>3}%", ago(polled, shot)))
        titles, *body = table(rows)
        nothing = "Nothing runs" if self.store else "Nothing has run here yet"
        start = f"{nothing}: start the daemon, or --once."
        head = "The daemon runs." if shot["daemon"]["running"] else start
        if needs := shot["attention"]:
            head += f" {needs} need{'' if needs > 1 else 's'} attention."
        yield from (
            *textwrap.wrap(f"{head} {counts_in_words(v['status'] for v in shot['jobs'])}", width),
            *(("", titles) if views else ()),
        )
        for view, line in zip(shown, body, strict=True):
            is_quiet = view["status"] in {"completed", "paused"}
            yield painted(line, "red" if view["attention"] else "dim" if is_quiet else "")
            for text, colour in ((what_next(view, shot), "dim"), (view["error"] or "", "red")):
                wrapped = textwrap.wrap(text, width - 4, max_lines=4, placeholder=" …")
                yield from (painted(f"    {part}", colour) for part in wrapped)
        if len(views) > len(shown):
            yield f"… and {counted(len(views) - len(shown), 'run')} more; see --json"
        found = {run.job for run in self.runs}
        for name in (name for name in self.config.jobs if name not in found):
            yield from textwrap.wrap(self.no_run_yet(name), width)
        if not self.config.jobs:
            yield "The config has no jobs yet: add one there, or with `job add`."

    def no_run_yet(self, name: str) -> str:
        job = self.config.jobs[name]
        match = ", ".join(f"{key}: {value}" for key, value in job.match)
        what = f"finds batches with {match}, created since {rfc3339(job.since)}"
        return f"{name}: no run yet; {'once it is resumed, it' if job.rests else 'it'} {what}"

    def story(self, run: Run, shown: Shown) -> Iterator[str]:
        """Yield everything about one run: its batches, what Keboola got, and its whole story."""
        trigger = shown["trigger"] or {}
        facts = {"run": run.name, "status": shown["status"].replace("_", " ")}
        facts |= {**facts_of(shown, self.shot), "target": str(run.target)}
        facts |= {"trigger": f"{trigger['state']} {trigger['id']}"} if trigger else {}
        yield from (f"{name:<12} {value}" for name, value in facts.items())
        yield from ("", "Batches:")
        for batch, known in zip(run.batches, shown["batches"], strict=True):
            yield f"  {batch_words(known, shown)}{f': {batch.error}' if batch.error else ''}"
        if run.payload:
            yield from ("", "What is sent to Keboola:")
            values = json.loads(run.payload)["variableValuesData"]["values"]
            yield from (f"  {value['name']} = {value['value']}" for value in values)
        events = self.store.events(name=run.name) if self.store else []
        yield ""
        for event in events:
            asked = event.fields.get("request_id")
            words = f" (x-request-id {asked})" if asked else ""
            yield f"{rfc3339(event.at)} {event.text}{words}"

    def why_not_alive(self) -> str:
        """Return why the daemon is to be called dead, or ""."""
        if not self.shot["daemon"]["running"]:
            return "no daemon runs"
        started_at = unix_of(self.shot["daemon"]["started_at"]) or 0.0
        for run in self.runs:
            job = self.config.jobs[run.job]
            late_s = time.time() - max(run.next_at, run.last_check_at or 0.0, started_at)
            is_polled = run.phase is Phase.POLLING and not job.rests
            if is_polled and late_s > 2 * job.poll_interval + MINUTE_S:
                return f"the polls of {run.name} are overdue"
        return ""


def run_status(args: argparse.Namespace) -> int:
    """Show the runs, or one job with its whole story.

    It reads the state file, whether the daemon runs or not, and says which. What needs attention
    comes first. BATCHES: finished/all, and how much of their requests is done.
    """
    with View.open(args) as view:
        shot = dict(view.shot)
        layout: Any = {"width": output_width(), "subsequent_indent": "    "}
        layout |= {"break_long_words": False, "break_on_hyphens": False}  # a path stays whole
        troubles = [line for text in view.troubles for line in text.splitlines()]
        lines = [
            painted(part, "red") for line in troubles for part in textwrap.wrap(line, **layout)
        ]
        if args.job is None:
            lines += view.overview()
        else:
            pairs = view.chosen(args.job)
            shot["jobs"] = [shown for _, shown in pairs]
            stories = ["\n".join(view.story(run, shown)) for run, shown in pairs]
            lines.append("\n\n".join(stories or [view.no_run_yet(args.job)]))
        print(json.dumps(shot, indent=2) if args.json else "\n".join(lines))
        why = view.why_not_alive() if args.alive else ""
        if why:
            print(f"teckochecker: {why}", file=sys.stderr)
        return 1 if why or (args.check and view.shot["attention"]) else 0


def run_logs(args: argparse.Namespace) -> int:
    """Show what has happened, of all jobs or of one.

    It reads the events that the state file keeps, also while the daemon runs.
    """
    if not 0 <= args.n < 10**9:
        raise UsageError("-n is how many lines", "write 0 or more")
    with View.open(args) as view:
        path = view.config.state_path
        if args.job and not (view.store and view.store.events(name=args.job, most=1)):
            view.chosen(args.job)  # it has a name of something, or nothing is shown
    last, most = 0, args.n
    while True:
        with Store.reading(path) as store:
            newest = store.last_event_id() if store else 0
            events = store.events(after=last, name=args.job, most=most) if store else []
        last = max([newest, *(event.id for event in events)])
        for event in events:
            mark = "" if event.level == "info" else f"{event.level}: "
            line = f"{rfc3339(event.at)} {mark}{event.text}"
            document = json.dumps(event.document(), ensure_ascii=False)
            print(document if args.json else line, flush=args.follow)
        if not args.follow:
            return 0
        most = None
        time.sleep(1.0)


def run_schema(_: argparse.Namespace) -> int:
    """Print the SQL of the state file, for whoever reads it with other programs."""
    print(f"PRAGMA user_version = {SCHEMA_VERSION};")
    print("\n".join(f"{textwrap.dedent(statement).strip()};" for statement in SCHEMA))
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Try a run again now, or all unfinished ones of a job.

    Polls, searches, or starts again what Keboola rejected or what failed there. A running daemon
    does it within two seconds, otherwise the next start or --once.
    """
    with View.open(args) as view:
        path, found = view.config.state_path, [run for run, _ in view.chosen(args.job)]
        if view.store is None:
            raise UsageError(f"there is no state file {path}", "start the daemon or --once first")
        asked, why = [], "it has no unfinished runs"
        own = [run for run in found if run.name == args.job]
        for run in own or [run for run in found if run.phase is not Phase.FINISHED]:
            request = RetryRequest(0, run.id, args.force, run.rerun, run.phase)
            after = after_retry(run, view.config.jobs[run.job], request, time.time())
            if isinstance(after, str):
                why = after
            else:
                asked.append(insert("requests", request, id=None))
    if not asked:
        raise TeckoError(f"{args.job}: {why}")
    with contextlib.closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as db:
        Store(db, path).execute(asked)
    when = "no daemon runs now; the next start or --once does it"
    if lock_owner(path)["running"]:
        when = "the running daemon does it within two seconds"
    print(f"asked: {when}")
    return 0


# ==================================================================================================
# 10. Command line, and the one place where exceptions become exit codes
# ==================================================================================================

# Each command: what does it, whose docstring is its help, and an example of its arguments.
COMMANDS: Final[Mapping[str, tuple[Callable[[argparse.Namespace], int], str]]] = {
    "init": (run_init, "/srv/teckochecker"),
    "check": (run_check, "--config config.yaml"),
    "doctor": (run_doctor, "--config /etc/teckochecker/config.yaml"),
    "encrypt": (run_encrypt, "--rotate"),
    "secret": (run_secret, "set openai-prod --type openai"),
    "job": (run_job, "add nightly --batch-id batch_abc123 --config-id 123456"),
    "status": (run_status, "nightly-embeddings"),
    "logs": (run_logs, "nightly-embeddings -n 20 --follow"),
    "retry": (run_retry, "nightly-embeddings --force"),
    "import": (run_import, "old/teckochecker.db > imported.yaml"),
    "schema": (run_schema, "> schema.sql"),
}

ACTIONS: Final[Mapping[str, str]] = {
    "secret list": "list names, types and users of all secrets, and never a value",
    "secret set": "ask for a secret's value, and write it into the config, encrypted",
    "secret remove": "remove a secret that nothing uses",
    "job add": "add a job; each option is the key of that name in config.example.yaml",
    "job pause": "poll and start nothing of a job until it is resumed",
    "job resume": "poll and start a paused job again",
    "job remove": "remove a job; its Keboola jobs in flight are followed to their end",
}


def add_options(parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    add = {name: parser.add_argument for name, parser in parsers.items()}
    add["init"]("directory", nargs="?", metavar="DIR", default=".", help="where (default: here)")
    add["import"]("old", metavar="OLD.db", help="the old program's database")
    add["encrypt"]("--rotate", action="store_true", help="encrypt all under the first key")
    for name in ("status", "logs"):
        add[name]("job", nargs="?", metavar="JOB", help="only this run, or the runs of this job")
        add[name]("--json", action="store_true", help="print JSON, for programs")
    add["status"]("--check", action="store_true", help="exit 1 if anything needs attention")
    overdue = "exit 1 if no daemon runs, or polls are overdue"
    add["status"]("--alive", action="store_true", help=overdue)
    add["logs"]("-n", type=int, metavar="N", default=100, help="the last N lines (default: 100)")
    add["logs"]("--follow", action="store_true", help="then new events as they come, until Ctrl-C")
    add["retry"]("job", metavar="JOB", help="the name of a run, or of a job")
    force = "start although an earlier start is unknown, was refused by the policy, or succeeded"
    add["retry"]("--force", action="store_true", help=force)


def new_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    text = "the config file (default: $TECKOCHECKER_CONFIG, then config.yaml)"
    shared.add_argument("--config", metavar="PATH", default=argparse.SUPPRESS, help=text)
    raw = argparse.RawDescriptionHelpFormatter
    style: dict[str, Any] = {"parents": [shared], "formatter_class": raw}
    codes = "exit codes" + str(__doc__).rpartition("Exit codes")[2].rstrip(".\n")

    def told(run: Callable[[argparse.Namespace], int], example: str) -> dict[str, Any]:
        parts = [textwrap.fill(" ".join(p.split()), 88) for p in str(run.__doc__).split("\n\n")]
        if run is run_logs:
            parts.append(textwrap.fill(f"events: {', '.join(EVENTS)}", 88))
        epilog = f"example: teckochecker {example}\n\n{codes}"
        return {"description": "\n\n".join(parts), "epilog": epilog, **style}

    example = "--config /etc/teckochecker/config.yaml"
    parser = argparse.ArgumentParser("teckochecker", **told(run_daemon, example))
    parser.set_defaults(run=run_daemon)
    parser.add_argument("--version", action="version", version=f"teckochecker {__version__}")
    once = "make one pass over every unfinished run, start what is ready, and exit (for cron)"
    parser.add_argument("--once", action="store_true", help=once)
    commands, parsers = parser.add_subparsers(title="commands", metavar="COMMAND"), {}
    for name, (run, arguments) in COMMANDS.items():
        line = str(run.__doc__).splitlines()[0].rstrip(".")
        about = told(run, f"{name} {arguments}")
        parsers[name] = commands.add_parser(name, help=line[0].lower() + line[1:], **about)
        parsers[name].set_defaults(run=run)
    add_options(parsers)
    for command, names in (("secret", "list set remove"), ("job", "add pause resume remove")):
        actions = parsers[command].add_subparsers(dest="action", metavar="ACTION", required=True)
        for name in names.split():
            what = ACTIONS[f"{command} {name}"]
            line = f"{what[0].upper()}{what[1:]}."
            action = actions.add_parser(name, help=what, description=line, **style)
            if name != "list":
                action.add_argument("name", metavar="NAME")
            for option in ("--type", "--stack-url", "--base-url") if name == "set" else ():
                action.add_argument(option, metavar="TEXT")
            if name == "add":
                add_job_options(action)
    return parser


def open_standard_files() -> None:
    """Have 0, 1 and 2 open: else the state file could get one of them, and the log into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):  # what it cannot show is no crash
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, and tells what is raised for a person."""
    open_standard_files()
    parser = new_parser()
    args = parser.parse_args(argv)
    if args.once and args.run is not run_daemon:
        parser.error("--once goes without a command")
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        code, text = 0, ""
    except TeckoError as error:  # a ConfigError's lines begin with their places
        who = "" if isinstance(error, ConfigError) else "teckochecker: "
        code, text = error.exit_code, f"{who}{error}" if str(error) else ""
    except sqlite3.Error as error:
        code, text = 1, f"teckochecker: cannot use the state file: {error}; {STATE_HINT}"
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        what = f"{error.strerror or error}{where}"
        code, text = 1, f"teckochecker: cannot go on: {what}; see to that first"
    else:
        return code
    with contextlib.suppress(OSError):
        print(text, end="\n" if text else "", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # at its end, the interpreter would try again to write what cannot arrive
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
