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
Run it:

    teckochecker.py --config config.yaml            the daemon, in the foreground
    teckochecker.py --config config.yaml --once     one pass, for cron
    teckochecker.py status                          what it knows; see --help for the other commands

Sections: 1 Errors and model - 2 Config - 3 Secrets - 4 Decisions - 5 Store and lock - 6 Http and
Keboola - 7 Engine - 8 Showing - 9 Commands - 10 Command line. Each uses only what stands above it.
Start with `Run` (1), `next_action` and its neighbours (4), and `drive_run` (7).

Exit codes: 0 fine; 1 something needs attention, or the command could not do it; 2 usage or config
error; 75 another instance holds the state file; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
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
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
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

__version__ = "1.1.0"

MINUTE_S: Final = 60
HOUR_S: Final = 3600
DAY_S: Final = 86400

# ==================================================================================================
# 1. Errors and model: what a person is told, and the nouns. No I/O here
# ==================================================================================================


class TeckoError(Exception):
    """Something a user, a server or a disk did; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)


class UsageError(TeckoError):
    """The command line asks for something that is not there."""

    exit_code = 2


class ConfigError(TeckoError):
    """Everything that is wrong with a config, one `Problem` a line."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.line, p.column))
        lines = [str(problem) for problem in self.problems[:1000]]
        more = len(self.problems) - len(lines)
        super().__init__("\n".join([*lines, f"and {more} more problems"] if more else lines))


class LockedError(TeckoError):
    """Another process acts on the same state file."""

    exit_code = 75


class StateError(TeckoError):
    """The state file cannot be used as it is: damaged, of another version, replaced, unreadable."""


class StorageError(TeckoError):
    """One transaction did not get through (full disk, locked file); nothing of it is stored."""


class ApiError(TeckoError):
    """A request that did not bring what was asked for.

    `retryable`: the same request may do better in a moment. `retry_after_s`: how long the server
    wants it to wait. `status`: the HTTP status, where there was one. `sent` is False only where it
    is certain that the server saw nothing of the request.
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
        subject = f"{self.path}: " if self.path else ""
        text = one_line(f"{subject}{self.what}; {self.cure}", 1000)
        return f"{self.file}:{self.line}:{self.column}: {text}"


class Secret:
    """A token that cannot be printed by accident; `reveal` is the only way to its value."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value, for a request header."""
        return self._value

    def digest(self) -> str:
        """Return a hash that tells this value from another one."""
        return hashlib.sha256(self._value.encode("utf-8", "replace")).hexdigest()

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not for storing")


# --- batches --------------------------------------------------------------------------------------

# How far a batch has come (OpenAI's API reference, the batch object). 3: it is finished.
STATUS_RANK: Final = {
    "validating": 0,
    "in_progress": 1,
    "finalizing": 2,
    "cancelling": 2,
    "completed": 3,
    "failed": 3,
    "expired": 3,
    "cancelled": 3,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """An OpenAI batch as last known. Times are Unix seconds; those but the last are OpenAI's.

    `files_due_at` is set while a finished batch is asked for again because it counts requests
    without naming their file: until then the file may come.
    """

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
    files_due_at: float | None = None

    @property
    def is_terminal(self) -> bool:
        return STATUS_RANK.get(self.status or "") == 3

    @property
    def is_final(self) -> bool:
        """Whether nothing more is expected of it."""
        return self.files_due_at is None and self.is_terminal

    @property
    def has_failed(self) -> bool:
        return self.is_terminal and self.status != "completed"


# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SecretEntry:
    """An entry under `secrets`: its type, where its value comes from, and where it is used.

    `source` is `value` (a Fernet token), `env` or `file`; `text` is what stands there, a Secret
    because people first write their tokens in plain.
    """

    name: str
    type: str
    source: str
    text: Secret
    line: int
    column: int
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
        """What tells one way of finding batches from another; "" for a job with batch_ids."""
        return compact_json([sorted(self.match), self.group_by]) if self.match else ""


@dataclass(frozen=True, slots=True)
class Config:
    """A config file, read and checked, its secrets still closed. Durations are seconds."""

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
        """Return what `job` starts."""
        stack_url = self.secrets[job.keboola_secret].stack_url
        return Target(stack_url, job.component_id, job.config_id, job.branch_id or "")

    def of_type(self, kind: str) -> list[str]:
        """Return the names of the secrets of one type."""
        return [name for name, secret in self.secrets.items() if secret.type == kind]


# --- runs -----------------------------------------------------------------------------------------


class Phase(enum.StrEnum):
    """How far a run has come; see `next_action`."""

    POLLING = "polling"  # not all batches are finished, or the group is not whole
    REFUSED = "refused"  # all are, but the job's policy says no
    INTENT = "intent"  # decided and stored; Keboola has certainly not seen it
    SENDING = "sending"  # the POST may be on its way
    UNKNOWN = "unknown"  # the POST's outcome is not known: only a search can tell
    REJECTED = "rejected"  # Keboola said no
    SENT = "sent"  # the Keboola job exists and is followed
    FINISHED = "finished"  # the Keboola job is finished (follow: false: was started)


@dataclass(frozen=True, slots=True)
class BootTime:
    """A time that can be measured from after a restart, whatever the clock was set to meanwhile.

    `uptime_s` counts from the machine's boot, and `boot` tells one boot from another; it is empty
    where the system does not say, and only the wall clock is left.
    """

    wall: float
    boot: str = ""
    uptime_s: float = 0.0

    def until_s(self, now: BootTime) -> float:
        """Return how many seconds have certainly passed until `now`.

        Over a reboot it is no more than the machine has been up for: the clock may have been set.
        """
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
        """What people call it: the job, with the group where there is one."""
        return f"{self.job}/{self.group}" if self.group else self.job

    @property
    def may_be_at_keboola(self) -> bool:
        """Whether it goes on to its end also without its job: Keboola may have it."""
        return self.phase in {Phase.SENDING, Phase.UNKNOWN, Phase.SENT}

    @property
    def has_failed(self) -> bool:
        """Whether it has come to an end that nobody wanted."""
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


# --- events ---------------------------------------------------------------------------------------


# Every event: its name, its level, the groups by which webhooks may name it, and its sentence.
EVENTS: Final[Mapping[str, tuple[str, str, str]]] = {
    name: (level, groups, sentence)
    for name, level, groups, sentence in (
        re.split(" +", line, maxsplit=3)
        for line in """
daemon_started            info    -         version {version} runs as pid {pid}: {jobs}, {batches}
daemon_stopped            info    -         teckochecker stopped
config_loaded             info    -         config loaded: {changes}
config_warning            warning -         {warning}
config_rejected           error   attention the config has problems, an older one counts: {problem}
config_rejected_recovered info    attention the config file is good again
account_failing           error   attention the secret {secret} is refused: {error}
account_failing_recovered info    attention the secret {secret} works again, or is no longer used
list_not_usable           warning -         the list of {secret} is not used for a while: {error}
list_usable               info    -         the list of batches of {secret} is used again
find_failed               warning -         new batches of {secret} cannot be found: {error}
find_recovered            info    -         new batches of {secret} are found again
run_found                 info    -         {batch_id} begins a new run
batch_joined              info    -         {batch_id} joins, {count} batches now
late_batch                warning -         {batch_id} came after the start, and starts nothing
batch_without_group       warning -         {batch_id} has no {group_by} in its metadata
batch_status_changed      info    -         {batch_id} {status}{counts}
batch_status_unknown      warning -         {batch_id} has the unknown status {status}
poll_failed               warning -         {error}
poll_recovered            info    -         polls succeed again
poll_failing              warning attention polls have failed for over ten minutes: {error}
poll_failing_recovered    info    attention polls do not fail any more
group_size_unclear        warning attention {error}
group_size_unclear_recovered info attention the size of the group is clear now
deadline_passed           warning attention the deadline has passed: {pending} of {count} unfinished
deadline_passed_recovered info    attention the batches are finished, after the deadline
trigger_intended          info    -         will start {target}
trigger_search_failed     warning -         {error}
trigger_sending           info    -         starting {target}
trigger_not_sent          warning -         {error}
trigger_unknown           warning -         {error}; Keboola is searched before a repeat
trigger_rejected          error   -         Keboola rejected the start: {error}
trigger_sent              info    -         started Keboola job {keboola_job_id} {url}
trigger_found             info    -         found its Keboola job {keboola_job_id} {url}
trigger_left_open         warning -         the process ends before Keboola's answer has come
trigger_overdue           error   attention its Keboola job should have started by now: {error}
trigger_overdue_recovered info    attention its Keboola job is known now
keboola_job_unreadable    warning -         Keboola job {id} counts as another's: {error}
keboola_job_status        info    -         Keboola job {keboola_job_id} is {status}
keboola_job_retried       warning -         {error}; it is started again in {wait}
follow_failed             warning -         cannot follow Keboola job {keboola_job_id}: {error}
follow_failing            warning attention its Keboola job cannot be followed: {error}
follow_failing_recovered  info    attention its Keboola job can be followed again
completed                 info    finished  Keboola job {keboola_job_id} {ended}, {counts} {url}
completed_with_failures   warning finished  Keboola job {keboola_job_id} {ended}, {counts} {url}
job_failed                error   attention,finished failed: {error} {url}
job_failed_recovered      info    attention it is not failed any more
retry_taken               info    -         a person asked for a retry{how}
retry_refused             warning -         a person asked for a retry, but {why}
jobs_need_attention       warning -         {count} need attention: {runs}
state_is_older            warning -         the state file does not know the last POST: {wait_s} s
state_write_failed        error   attention {error}
state_write_failed_recovered info attention the state file can be written again
clock_changed             warning -         the clock was set by {seconds} s, and all waits with it
watch_failed              warning -         the config's directory cannot be watched: {error}
notify_failed             warning -         the webhook {secret} cannot be told yet: {error}
notify_dropped            warning -         the webhook {secret} is not told of an event: {why}
publish_failed            warning -         cannot publish to {directory}: {error}
publish_recovered         info    -         files are published again
internal_error            error   -         a bug was met in {where}: {error}
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
        """Return an event with its sentence; what a sentence names and `fields_` lack is empty."""
        usual, _, sentence = EVENTS[name]
        words = collections.defaultdict(str, {k: v for k, v in fields_.items() if v is not None})
        text = one_line(sentence.format_map(words), 2000)
        if run:
            text = f"{run.name}: {text}"
        job, name_of_run = (run.job, run.name) if run else (None, None)
        return cls(name, level or usual, job, name_of_run, fields_, text)

    def document(self) -> dict[str, Any]:
        """Return the event as a line of the log in JSON has it."""
        head = {
            "time": rfc3339(self.at),
            "level": self.level,
            "event": self.name,
            "text": self.text,
        }
        about = {"job": self.job, "run": self.run} if self.job else {}
        return head | about | dict(self.fields)


Change = tuple[Run, list[Event]]

# --- words ----------------------------------------------------------------------------------------


def one_line(text: str, limit: int = 500) -> str:
    """Return `text` as one printable line of valid Unicode, at most `limit` characters long."""
    text = text[: 4 * limit]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def quoted(text: str) -> str:
    """Return a user's text in quotes, on one line, not too long for a message."""
    return f'"{one_line(text, 60)}"'


def counted(n: int, noun: str) -> str:
    """Return a number with its noun."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def compact_json(value: object) -> str:
    """Return JSON without spaces, in ASCII."""
    return json.dumps(value, separators=(",", ":"))


def rfc3339(unix_s: float | None) -> str | None:
    """Return a Unix time as RFC 3339 in UTC, to the second."""
    if unix_s is None or not math.isfinite(unix_s):
        return None
    within = min(max(unix_s, 0.0), 253402300799.0)  # the last second that has a date
    return datetime.fromtimestamp(int(within), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_duration(text: str) -> int | None:
    """Return the seconds of `30s`, `1h30m`, `7d` or a whole number; None for anything else."""
    if re.fullmatch("[0-9]{1,12}", text):
        return int(text)
    match = re.fullmatch("(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?", text)
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
    """A node of the YAML tree, its key, the path to it, and what all nodes of a file share.

    Where `text` notes a problem it returns None; what other methods return then does not count.
    `secrets` are those that were read already; one with a problem is None.
    """

    node: yaml.Node
    key: yaml.Node  # the node itself, where it has none
    path: str
    file: str
    problems: list[Problem]
    secrets: dict[str, SecretEntry | None] = field(default_factory=dict)

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
        """Return a list's elements, or nothing and a problem."""
        nodes = enumerate(self.node.value if self._is(yaml.SequenceNode, "a list", cure) else ())
        return [replace(self, node=n, key=n, path=f"{self.path}[{i}]") for i, n in nodes]

    def entries(self, cure: str) -> dict[str, YamlNode]:
        """Return a mapping's values by key, merge keys (`<<`) resolved; duplicates are problems."""
        own: dict[str, YamlNode] = {}
        merged: dict[str, YamlNode] = {}
        for key, value in self.node.value if self._is(yaml.MappingNode, "a mapping", cure) else ():
            if key.tag == _TAG + "merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # of several, the first one wins
                    at = replace(self, node=source)
                    merged |= at.entries("write << and a mapping or a list of mappings")
            elif not isinstance(key, yaml.ScalarNode):
                self.bad("a key is not a single value", cure, key)
            elif key.value in own:
                line = own[key.value].key.start_mark.line + 1
                what = f"the key {self._shown(key.value)} stands here and in line {line}"
                self.bad(what, "keep one of them", key)
            else:
                path = f"{self.path}.{key.value}" if self.path else key.value
                own[key.value] = replace(self, node=value, key=key, path=path)
        return merged | own

    def read(self, nodes: Mapping[str, YamlNode], readers: Mapping[str, Reader]) -> dict[str, Any]:
        """Return what the readers make of a mapping's values, in their order; null is None.

        What has a problem is _BAD, but a dict has good and bad values of its own.
        """
        for name in nodes.keys() - readers.keys():
            what = f"the key {self._shown(name)} is not known"
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

    def _shown(self, text: str) -> str:
        """Return what is written, for a message; among secrets it may be a token."""
        is_plain = not self.path.startswith("secrets.") or re.fullmatch("[a-z_]{1,30}", text)
        return quoted(text) if is_plain else '"***"'

    def text(self, cure: str) -> str | None:
        """Return a scalar's text just as written (`0123` stays so)."""
        if self.is_null:
            return self.bad("is empty", cure)
        is_scalar = self._is(yaml.ScalarNode, "a single value", cure)
        return str(self.node.value).strip() if is_scalar else None

    def matching(self, pattern: str, kind: str, cure: str) -> str | None:
        """Return text that matches a pattern as a whole."""
        text = self.text(cure)
        if text is None or re.fullmatch(pattern, text):
            return text
        return self.bad(f"{self._shown(text)} is not {kind}" if text else "is empty", cure)

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
        pattern = "(?i)true|yes|on|false|no|off"
        text = self.matching(pattern, "true or false", "write true or false")
        return str(text).lower() in {"true", "yes", "on"}

    def count(self, least: int, most: int) -> int:
        numbers = "|".join(map(str, range(least, most + 1)))
        kind = f"a number from {least} to {most}"
        return int(self.matching(numbers, kind, "write a whole number") or 0)

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
        text = None if self.is_null else self.text(cure)
        if self.node.tag == _TAG + "bool":
            return self.boolean()
        if self.node.tag != _TAG + "str" and re.fullmatch(
            r"-?(0|[1-9]\d{0,15})(\.\d+)?", str(text)
        ):
            return json.loads(str(text))
        return text


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are there and good; the model has a default for the others."""
    return {key: v for key, v in values.items() if v is not None and v is not _BAD}


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
        is_address = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or re.search(r"[^!-~]", url):
        return "is not an address"
    if "?" in url or "#" in url or "@" in parts.netloc:
        return "has more than scheme, host, port and path"
    if parts.scheme == "http" and not is_loopback(url):
        return "is not https"
    return None


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
    return None if text is None else node.bad(f"{quoted(text)} is not a date", cure)


def read_list(
    node: YamlNode, what: str, read: Callable[[YamlNode], Any], least: int, most: int
) -> Any:  # noqa: ANN401
    """Read a list of different values."""
    cure = f"write a list of {least} to {most} {what}"
    items = node.items(cure)
    if isinstance(node.node, yaml.SequenceNode) and not least <= len(items) <= most:
        return node.bad(f"has {len(items)} {what}", cure)
    values = [read(item) for item in items]
    for i, (item, value) in enumerate(zip(items, values, strict=True)):
        if value is not None and value in values[:i]:
            item.bad(f"{quoted(value)} stands here twice", "keep one of them")
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
            item.bad(f"{quoted(name)} is not a variable's name", cure, item.key)
        if isinstance(item.node, yaml.ScalarNode):
            cure = "write a value: Keboola takes no empty ones"
            values[name] = item.matching("(?s).+", "a value", cure)
        else:
            values[name] = compact_json(item.plain_value())
    return tuple(values.items())


def read_match(node: YamlNode) -> tuple[tuple[str, str | None], ...] | None:
    """Read which metadata a batch must have."""
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
    noted_before = len(node.problems)
    entries = node.entries("write type: and what belongs to it, each on its own line")
    if not node.is_mapping:
        return None
    kind = str(entries["type"].node.value) if "type" in entries else ""
    sources = ("value", "env", "file")
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
        node.bad(f"{quoted(name)} is not a secret's name", "use letters, digits, ._-", node.key)
    found = [source for source in sources if values.get(source) is not None]
    if len(found) != 1:
        node.bad(f"has {' and '.join(found) or 'no value'}", cure)
    if len(node.problems) > noted_before:
        return None
    rest = given({key: values.get(key) for key in SECRET_KEYS[kind]})
    mark = entries[found[0]].node.start_mark
    place = (mark.line + 1, mark.column + 1)
    return SecretEntry(name, kind, found[0], Secret(values[found[0]]), *place, **rest)


def check_combinations(entries: Mapping[str, YamlNode], values: dict[str, Any]) -> None:
    """Note which keys of a job do not go together; one that only `defaults` has is left out."""
    has = {key for key, value in values.items() if value is not None}
    has |= {"follow: false"} if values.get("follow") is False else set()
    for key, how, other in (
        ("match", "beside", "batch_ids"),
        ("settle", "beside", "group_size"),
        ("match", "without", "since"),
        ("since", "without", "match"),
        ("group_by", "without", "match"),
        ("group_size", "without", "group_by"),
        ("settle", "without", "group_by"),
        ("on_deadline", "without", "deadline"),
        ("retry_on_error", "beside", "follow: false"),
    ):
        if key not in has or (other in has) != (how == "beside"):
            continue
        if key in entries:
            cure = "keep one of them" if how == "beside" else f"add {other}:, or remove {key}:"
            entries[key].bad(f"{key} {how} {other}", cure, entries[key].key)
        else:
            values[key] = None
            has.remove(key)


def read_job(name: str, node: YamlNode, defaults: Mapping[str, Any]) -> Job | None:
    """Read one job; its own values win over `defaults`."""
    noted_before = len(node.problems)
    entries = node.entries("write batch_ids, config_id and so on, each on its own line")
    if not node.is_mapping:
        return None
    values = {**defaults, **node.read(entries, JOB_KEYS)}
    if not 0 < len(name) <= 200 or name != name.strip() or not name.isprintable() or "/" in name:
        cure = "use 1 to 200 printable characters, and no /"
        node.bad(f"{quoted(name)} is not a job's name", cure, node.key)
    for key in ("openai_secret", "keboola_secret", "component_id", "config_id"):
        if values.get(key) is None:
            node.bad(f"{key} is missing", f"add {key}: here or under defaults", node.key)
    check_combinations(entries, values)
    if values.get("batch_ids") is None and values.get("match") is None:
        node.bad("batch_ids is missing", "add batch_ids: here, or match: and since:", node.key)
    if _BAD in values.values() or len(node.problems) > noted_before:
        return None
    job = Job(name, **given(values))
    openai, keboola = node.secrets.get(job.openai_secret), node.secrets.get(job.keboola_secret)
    if openai and urllib.parse.urlsplit(openai.base_url).hostname == "api.openai.com":
        items = entries["batch_ids"].items("") if "batch_ids" in entries else ()
        for item, batch_id in zip(items, job.batch_ids, strict=False):
            if not batch_id.startswith("batch_"):
                what = f"{quoted(batch_id)} is not a batch id of api.openai.com"
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
    "defaults": JOB_KEYS,
    "jobs": lambda node: node.entries(_NAMES),
}


# --- from text to tree ----------------------------------------------------------------------------


def refuse_harm(text: str) -> None:
    """Raise YAMLError, its note the cure, for what costs the process its stack or its memory.

    The composer recurses, and an alias inside what an anchor names is what a bomb is made of.
    """
    opened: list[tuple[str | None, int]] = []  # anchors, and the number of nodes before
    sizes: dict[str | None, int] = {}
    nodes = 0
    event: Any
    for event in yaml.parse(text, Loader=_LOADER):
        what = ""
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before_it = opened.pop()
            sizes[anchor] = nodes - before_it
        elif isinstance(event, yaml.AliasEvent):
            nodes += sizes.get(event.anchor, 1)
            if any(anchor for anchor, _ in opened):
                what = "an alias stands inside what an anchor names"
                cure = "write out what it stands for"
        nodes += isinstance(event, yaml.NodeEvent)
        tag = getattr(event, "tag", None)  # one that is written there
        if tag and tag.removeprefix(_TAG) not in _TAGS:
            what, cure = f"the tag {quoted(tag)} means nothing here", "remove it"
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
    """Return the config that `text` says, and everything that is wrong with it.

    `path` is the file's name for messages, and what relative paths in it are relative to. Where
    there are problems, the config holds what could be read: `status` finds the state file with it.
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
    settings = given(top.get("log", {}) | top.get("limits", {}))
    settings |= {f"log_{key}": settings.pop(key) for key in settings.keys() & {"level", "format"}}
    key_mark = (entries.get("key_file") or entries.get("secrets") or root).node.start_mark
    config = Config(
        path,
        sha256,
        path.parent / top.get("state", "teckochecker.db"),
        path.parent / top.get("key_file", "teckochecker.key"),
        key_mark.line + 1,
        key_mark.column + 1,
        path.parent / top["publish"] if "publish" in top else None,
        secrets=given(root.secrets),
        notify=top.get("notify", ()),
        jobs=given(jobs),
        **settings,
    )
    return config, problems


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

    # JSON may write a character as `\u0041`, and `/` as `\/`. What would end or begin something in
    # JSON (quotes, backslashes) stays escaped, and others are no part of a token.
    _ESCAPES: Final = re.compile(rb"\\(?:u00(?!22|5[Cc]|7[Ff])([2-7][0-9A-Fa-f])|(/)|.)", re.DOTALL)

    def __init__(self) -> None:
        self._known: dict[str, list[str]] = {}
        self.learn(())

    def learn(self, secrets: Iterable[tuple[str, Secret]]) -> None:
        """Add values by name, each also in the forms in which JSON, Python and URLs write it.

        Values of fewer than four characters are no tokens, and would mask half of the log.
        """
        for name, secret in secrets:
            older = [value for value in self._known.get(name, ()) if value != secret.reveal()]
            self._known[name] = [*older, secret.reveal()][-20:]
        forms = set()
        for value in itertools.chain(*self._known.values()):
            if len(value) >= 4:
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
        plain = self._ESCAPES.sub(
            lambda escape: escape[2] or bytes.fromhex((escape[1] or b"").decode()) or escape[0],
            body,
        )
        for form in self._longest_first:
            if (len(form) >= 16 or not is_data) and form.encode() in plain:
                body = plain = plain.replace(form.encode(), b"***")
        return body

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
    alone, after = "put the token there, alone", "write only what follows"
    unprintable = "has characters that no token has (it takes printable ASCII without spaces)"
    kbc = "is a programmatic token, which is not supported"
    is_example = "YOUR-" in text or text == "https://hooks.slack.com/services/T0/B0/XYZ"
    url = url_problem(text.partition("?")[0]) if kind == "webhook" else None
    has_name = kind != "webhook" and re.match("[A-Za-z_][A-Za-z0-9_]*=.", text)
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
        (kind == "keboola" and text.startswith("kbc_"), kbc, "make a Storage API token"),
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
        where, text = f"${KEY_VARIABLE}", self._env.get(KEY_VARIABLE, "").strip() or None
        if text is None:
            where, text = self._read_key_file()
        if text is None:
            return None
        lines = (line.split("#")[0] for line in text.splitlines())
        keys = [key for line in lines for key in line.replace(",", " ").split()]
        with contextlib.suppress(ValueError):
            fernet = MultiFernet([Fernet(key) for key in keys])
            self.keys = [Secret(key) for key in keys]
            return fernet
        what = f"{where} holds {'something other than Fernet keys' if keys else 'no key'}"
        return self._bad_key(what, f"make one: {MAKE_KEY}")

    def _bad_key(self, what: str, cure: str) -> None:
        place = (str(self.config.path), self.config.key_line, self.config.key_column, "key_file")
        self.problems.append(Problem(*place, what, cure))

    def _read_key_file(self) -> tuple[str, str | None]:
        """Return the path of the key file, and its text or None and a problem."""
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
            self._bad_key(f"cannot read the key file {path}: {read.error.strerror}", cure)
        elif mode & stat.S_IRWXO:
            what = f"{path} can be read by others (mode {mode:04o})"
            self._bad_key(what, f"run: chmod 600 {path}")
        else:
            if mode & stat.S_IRWXG:
                self.warnings.append(f"{path} can be read by its group; better: chmod 600 {path}")
            return str(path), read.data.decode("ascii", "replace")
        return str(path), None

    def _open(self, entry: SecretEntry, keys: MultiFernet | None) -> Secret | None:
        """Return a secret, or None and a problem."""
        text, value = entry.text.reveal(), None
        what, cure = "the environment has no such variable", "set it, or correct the name"
        if entry.source == "env":
            value = self._env.get(text)
        elif entry.source == "file":
            # Relative paths are relative to the config; an absolute one replaces that altogether.
            read = self._files.read(self.config.path.parent / text)
            if read.error is None:
                value = read.data[:100_000].decode("utf-8", "replace")
            else:
                what = f"cannot read the file: {read.error.strerror}"
                cure = "correct the path or its permissions"
        elif keys is None:
            return None  # noted already, where the key was looked for
        else:
            value = decrypted(keys, text)
            what = "is not encrypted"
            cure = f"run: teckochecker --config {self.config.path} encrypt"
            if looks_encrypted(text):
                what = "is encrypted with another key"
                cure = f"bring that key back, or write the token in plain and {cure}"
        if value is not None:
            problem = token_problem(value.strip(), entry.type)
            if problem is None:
                return Secret(value.strip())
            what, cure = f"the secret {problem[0]}", problem[1]
        path = f"secrets.{entry.name}.{entry.source}"
        place = (str(self.config.path), entry.line, entry.column, path)
        self.problems.append(Problem(*place, what, cure))
        return None


def read_config_file(path: Path, files: Files) -> tuple[Config, list[Problem], str]:
    """Return what the file says so far as it can be read, what is wrong with it, and its text."""
    read, place = files.read(path), (1, 1)
    try:
        if read.error is None and len(read.data) <= MAX_FILE_BYTES:
            text = read.data.decode()
            return *parse_config(text, path), text
        what, cure = "is over 16 MiB", "a config is smaller: check the path"
    except UnicodeDecodeError as error:
        before = read.data[: error.start].decode().split("\n")
        place = (len(before), len(before[-1]) + 1)
        what, cure = "is not UTF-8 text", "save it as UTF-8"
    if read.error:
        what = f"cannot be read: {read.error.strerror}"
        cure = "check the path, pass --config PATH, or run `teckochecker init` for a first one"
        if read.error.errno == errno.EACCES:
            cure = "let this user read it; with all secrets encrypted, chmod 644 is safe"
    config = Config(path, "", path.parent / "teckochecker.db", path.parent / "teckochecker.key")
    return config, [Problem(str(path), *place, "", what, cure)], ""


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
# A `sending` that is found at the start is `unknown`. A search comes before every POST.

LASTING_S: Final = 10 * MINUTE_S  # an error that lasts longer does not settle by itself
FILES_WAIT_S: Final = 5 * MINUTE_S


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

    @property
    def follow(self) -> bool:
        return self.job is None or self.job.follow


def backoff_s(failures: int, first_s: float, jitter: float, asked_s: float | None = None) -> float:
    """Return how long to wait after the n-th failure in a row: doubling, an hour at most.

    `jitter` from 0 to 1 spreads the wait over its upper quarter; `asked_s` is what a server asked
    for: obeyed where it is longer, but an hour is the most here too.
    """
    doubled = min(HOUR_S, first_s * 2.0 ** min(max(failures, 1) - 1, 16))
    return min(HOUR_S, max(doubled * (0.75 + 0.25 * jitter), asked_s or 0.0))


def with_error(run: Run, error: str, now: float, wait_s: float) -> Run:
    """Return a run after a failure of what was due, which is due again after a wait."""
    since = now if run.error_since is None else run.error_since
    return replace(
        run, error=error, error_since=since, failures=run.failures + 1, next_at=now + wait_s
    )


def trigger_id(job: str, group: str, batch_ids: Iterable[str], rerun: int) -> str:
    """Return the id that makes a run recognizable at Keboola, the same on every machine.

    It is the SHA-256 of ASCII JSON, so that it survives the loss of the state file.
    """
    identity = [2, job, group, rerun] if group else [1, job, sorted(batch_ids), rerun]
    return hashlib.sha256(compact_json(identity).encode()).hexdigest()


# --- batches --------------------------------------------------------------------------------------


def merged(known: Batch, came: Batch, now: float) -> Batch:
    """Return what to remember of a batch after its own answer.

    A terminal status is never overwritten; only files and counts may still come, for a while.
    """
    if known.is_final:
        return known
    if known.is_terminal:
        came = replace(
            came,
            status=known.status,
            ended_at=known.ended_at,
            output_file_id=came.output_file_id or known.output_file_id,
            error_file_id=came.error_file_id or known.error_file_id,
            error=came.error or known.error,
        )
    if came.is_terminal:
        due_at = known.files_due_at if known.is_terminal else now + FILES_WAIT_S
        has_output = not came.completed or came.output_file_id
        is_waiting = not (has_output and (not came.failed or came.error_file_id))
        is_waiting = is_waiting and due_at is not None and now < due_at
        came = replace(came, files_due_at=due_at if is_waiting else None)
    return known if came == known else came


def batch_event(run: Run, batch: Batch) -> Event:
    """Return the event that a batch has a new status."""
    counts = ""
    if batch.total:
        counts = f", {batch.completed or 0:,} of {batch.total:,} requests"
    facts = {"batch_id": batch.id, "status": batch.status, "counts": counts}
    if batch.status not in STATUS_RANK:
        return Event.of("batch_status_unknown", run, **facts)
    level = "warning" if batch.has_failed else ""
    return Event.of("batch_status_changed", run, level, **facts)


def after_poll(run: Run, job: Job, answers: Mapping[str, Batch | ApiError], terms: Terms) -> Change:
    """Return a run after a poll of its batches, and what is decided with it.

    One failed poll never fails a run: it shows the error and is polled again, each time later.
    """
    now, batches, events = terms.now, [], []
    for known in run.batches:
        came = answers.get(known.id)
        batch = merged(known, came, now) if isinstance(came, Batch) else known
        if batch.files_due_at is not None and batch.files_due_at <= now:
            batch = replace(batch, files_due_at=None)
        if batch.status != known.status:
            events.append(batch_event(run, batch))
        batches.append(batch)
    errors = {key: came for key, came in answers.items() if isinstance(came, ApiError)}
    after = replace(run, batches=tuple(batches), last_check_at=now)
    if errors:
        batch_id, error = next(iter(errors.items()))
        others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        asked_s = max(e.retry_after_s or 0.0 for e in errors.values())
        wait_s = backoff_s(run.failures + 1, job.poll_interval, terms.jitter, asked_s)
        after = with_error(after, f"{batch_id}: {error}{others}", now, wait_s)
        facts = {"status": error.status, "request_id": error.request_id}
        if after.error != run.error:
            events.append(
                Event.of("poll_failed", run, batch_id=batch_id, error=after.error, **facts)
            )
    elif answers or run.failures:
        is_waiting = any(batch.files_due_at is not None for batch in batches)
        interval_s = min(30, job.poll_interval) if is_waiting else job.poll_interval
        after = replace(after, error=None, error_since=None, failures=0, next_at=now + interval_s)
        if run.error and run.failures:
            events.append(Event.of("poll_recovered", run))
    decided, more = decide(after, job, now)
    return decided, events + more


# --- when a run starts ----------------------------------------------------------------------------


def decide(run: Run, job: Job, now: float) -> Change:
    """Return a polled run with what follows from its batches: start, refusal, or another poll."""
    is_whole, whole_at, unclear = wholeness(run, job, now)
    pending = [batch for batch in run.batches if not batch.is_final]
    created = [batch.created_at for batch in run.batches if batch.created_at]
    due_at = min(created) + job.deadline if job.deadline and created else math.inf
    if (is_whole and not pending and run.batches) or (now >= due_at and job.on_deadline == "start"):
        refusal = policy_refusal(run, job)
        if refusal:
            ended: dict[str, Any] = {
                "phase": Phase.REFUSED,
                "next_at": math.inf,
                "error_since": now,
            }
            return replace(run, error=refusal, **ended), []
        return as_intended(run, now), []
    next_at = run.next_at if pending else whole_at
    if now < due_at:
        next_at = min(next_at, due_at)
    elif not run.deadline_told:
        run = replace(run, deadline_told=True)
    if unclear and not run.error:
        run = replace(run, error=unclear, error_since=now)
    return replace(run, next_at=next_at), []


def wholeness(run: Run, job: Job, now: float) -> tuple[bool, float, str]:
    """Return whether a run has all its batches, else when it may have, and what is unclear.

    Without `group_size`, a group is whole when all of it is finished and none joins for `settle`.
    """
    if not job.group_by:
        return True, now, ""
    if job.group_size is None:
        whole_at = (run.joined_at or now) + job.settle
        return now >= whole_at, whole_at, ""
    size = job.group_size if job.group_size.isdigit() else run.size
    if not re.fullmatch("[0-9]{1,4}", size):
        return False, math.inf, f"the size of the group is unclear: {size or 'it is missing'}"
    return len(run.batches) >= int(size), math.inf, ""


def policy_refusal(run: Run, job: Job) -> str:
    """Return why a job's `trigger_on` keeps a run from starting, or ""."""
    if job.trigger_on == "all_completed":
        bad = [b for b in run.batches if b.status != "completed" or b.completed == 0]
        if bad:
            others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            what = "has no successful request" if bad[0].status == "completed" else bad[0].status
            return (
                f"trigger_on: all_completed, but {bad[0].id} {what or 'is not finished'}{others};"
                " `retry --force` starts it"
            )
    if job.trigger_on == "any_output" and not any(b.output_file_id for b in run.batches):
        return "trigger_on: any_output, but no batch has an output file; `retry --force` starts it"
    return ""


def as_intended(run: Run, now: float) -> Run:
    """Return a run that is to be started."""
    own_id = trigger_id(run.job, run.group, (b.id for b in run.batches), run.rerun)
    return replace(
        run,
        phase=Phase.INTENT,
        trigger_id=run.trigger_id or own_id,
        next_at=now,
        intended_at=now,
        failures=0,
        error=None,
        error_since=None,
    )


def as_rerun(run: Run, now: float, wait_s: float = 0.0, error: str | None = None) -> Run:
    """Return a run that is to be started once more, as its next rerun."""
    fresh = Run(run.id, run.job, run.target, run.group, run.batches, rerun=run.rerun + 1)
    kept = ("attention", "retries", "size", "joined_at", "deadline_told", "last_check_at")
    fresh = replace(fresh, **{name: getattr(run, name) for name in kept})
    after = as_intended(fresh, now + wait_s)
    return replace(after, error=error, error_since=now if error else None)


# --- what Keboola gets ----------------------------------------------------------------------------


def keboola_variables(run: Run, job: Job) -> dict[str, str]:
    """Return the variables of a run's Keboola job, all of them non-empty text."""
    ids: dict[str, list[str]] = {"completed": [], "failed": [], "pending": []}
    for b in run.batches:
        kind = "pending" if not b.is_terminal else "failed" if b.has_failed else "completed"
        ids[kind].append(b.id)
    by_id = {
        "batch_statuses": {b.id: b.status for b in run.batches},
        "batch_output_file_ids": {b.id: b.output_file_id for b in run.batches if b.output_file_id},
        "batch_error_file_ids": {b.id: b.error_file_id for b in run.batches if b.error_file_id},
        "batch_request_counts": {
            b.id: {"total": b.total, "completed": b.completed, "failed": b.failed}
            for b in run.batches
            if b.total is not None
        },
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
    digest = input_digest(job, target, token)
    return replace(run, target=target, payload=compact_json(body), input_digest=digest)


def input_digest(job: Job, target: Target, token: Secret) -> str:
    """Return a digest of what Keboola judges a start by, apart from the batches."""
    aim = [target.stack_url, target.component_id, target.config_id, target.branch_id]
    parts = [*aim, job.mode, job.config_row_ids, sorted(job.variables), token.digest()]
    return hashlib.sha256(compact_json(parts).encode()).hexdigest()


# --- the trigger, step by step --------------------------------------------------------------------


class Action(enum.Enum):
    """What to do next for a run that is past its polls."""

    IDLE = "idle"  # nothing, until a person or the config changes something
    ARM = "arm"  # make a fresh intent of a rejected run
    SEARCH = "search"  # and start it, if the search allows it
    FOLLOW = "follow"


def next_action(run: Run, *, may_post: bool) -> Action:
    """Return what to do next for a run, at its `next_at`."""
    match run.phase:
        case Phase.SENT:
            return Action.FOLLOW
        case Phase.UNKNOWN:
            return Action.SEARCH
        case Phase.INTENT if may_post:
            return Action.SEARCH
        case Phase.REJECTED if may_post and run.next_at < math.inf:
            return Action.ARM
        case _:
            return Action.IDLE


def search_since(run: Run, now: float) -> float:
    """Return since when a Keboola job for a run can exist, as Unix seconds of our clock.

    A day covers clocks of OpenAI, Keboola and ours that differ by hours, and the time zones that
    people set them by; the caller corrects it by what Keboola says the time is.
    """
    ended = [batch.ended_at for batch in run.batches if batch.ended_at]
    created = [batch.created_at for batch in run.batches if batch.created_at]
    all_ended = len(ended) == len(run.batches)
    known = max(ended) if ended and all_ended else min(created, default=now)
    return min(known, now, run.sending_at or now) - DAY_S


def search_spacing_s(grace_s: float) -> float:
    """Return how far apart the searches for an unknown run are, apart from the grace itself."""
    return min(10.0, max(0.1, grace_s / 4))


def as_sending(run: Run, now: float) -> Change:
    """Return a run as it must be stored before its POST."""
    after = replace(
        run,
        phase=Phase.SENDING,
        posts=run.posts + 1,
        sending_at=run.sending_at or now,
        unknown_since=None,
        empty_searches=0,
        forced=False,
        next_at=math.inf,
    )
    return after, [
        Event.of("trigger_sending", run, trigger_id=run.trigger_id, target=str(run.target))
    ]


def as_unknown(run: Run, error: str, terms: Terms, asked_s: float = 0.0) -> Change:
    """Return a run when the outcome of its POST cannot be told.

    The first repeat waits for the grace; then the wait doubles each time, up to an hour.
    """
    grace_s = terms.grace_s
    doubled = min(max(grace_s, HOUR_S), max(1.0, 2 * run.repeat_after_s))
    wait_s = max(grace_s if run.repeat_after_s == 0 else doubled, min(asked_s, HOUR_S))
    text = f"it is not known whether Keboola took the job: {error}"
    after = replace(
        with_error(run, text, terms.now, search_spacing_s(grace_s)),
        phase=Phase.UNKNOWN,
        failures=0,
        post_error=error,
        repeat_after_s=max(wait_s, 0.001),
        unknown_since=terms.boot_time,
        empty_searches=0,
    )
    return after, [Event.of("trigger_unknown", run, trigger_id=run.trigger_id, error=text)]


def after_search(
    run: Run, came: Sequence[KeboolaJob] | ApiError, began: BootTime, terms: Terms
) -> Change:
    """Return a run after a search for its Keboola job: found, SENDING, or searched for again.

    `came` are the jobs that carry the trigger id, the oldest first, or why the search is
    incomplete: then it says nothing, and nothing is sent unless a person said `retry --force`.
    `began` is when the search did. A run that comes back SENDING is to be committed and posted with
    nothing awaited in between: what was found out and what is sent belong together.
    """
    now = terms.now
    if isinstance(came, ApiError):
        if run.forced and terms.may_post:
            return as_sending(run, now)
        text = f"cannot search Keboola for an earlier start: {came}"
        if run.post_error:
            text += f"; the start brought: {run.post_error}"
        wait_s = backoff_s(run.failures + 1, 5, terms.jitter, came.retry_after_s)
        event = Event.of("trigger_search_failed", run, error=text, status=came.status)
        return with_error(run, text, now, wait_s), [event] if text != run.error else []
    if came:
        return as_started(run, came, "trigger_found", terms)
    if run.phase is not Phase.UNKNOWN:
        return as_sending(run, now) if terms.may_post else (run, [])
    elapsed_s = run.unknown_since.until_s(began) if run.unknown_since else 0.0
    is_late = elapsed_s >= run.repeat_after_s
    after = replace(run, empty_searches=run.empty_searches + 1, failures=0)
    if run.post_error:
        text = f"a search did not find the Keboola job, and the start brought: {run.post_error}"
        after = replace(after, error=text)
    if is_late and after.empty_searches >= 2:
        if terms.may_post:
            return as_sending(after, now)
        # Paused or removed: an earlier POST's job may still show up, so the search goes on.
        return replace(after, next_at=now + HOUR_S), []
    spacing_s = search_spacing_s(terms.grace_s)
    wait_s = spacing_s if is_late else max(run.repeat_after_s - elapsed_s, 0.1)
    return replace(after, next_at=now + wait_s), []


def as_started(run: Run, jobs: Sequence[KeboolaJob], name: str, terms: Terms) -> Change:
    """Return a run once its Keboola job is known; of several, the first one is ours."""
    (ours, *others), now = jobs, terms.now
    created_at = ours.created_time.timestamp() if ours.created_time else now
    project = ours.project or run.target.project
    page = f"{run.target.stack_url}/admin/projects/{project}/queue/{ours.id}" if project else None
    after = replace(
        run,
        phase=Phase.SENT if terms.follow else Phase.FINISHED,
        keboola_job_id=ours.id,
        keboola_status=ours.status,
        url=page,
        sent_at=min(created_at, now) if name == "trigger_found" else now,
        next_at=now,
        error=None,
        error_since=None,
        failures=0,
        forced=False,
        posts=0,
        post_error=None,
        repeat_after_s=0.0,
        unknown_since=None,
    )
    facts: dict[str, Any] = {"keboola_job_id": ours.id, "trigger_id": run.trigger_id, "url": page}
    if others:
        facts["other_keboola_job_ids"] = [job.id for job in others]
    events = [Event.of(name, run, "warning" if others else "", **facts)]
    if not terms.follow:
        after = replace(after, finished_at=after.sent_at, next_at=math.inf)
        events.append(end_event(after, "was started"))
    return after, events


def after_post(run: Run, came: KeboolaJob | ApiError, terms: Terms) -> Change:
    """Return a run after its POST: sent, certainly not sent, rejected, or unknown."""
    if isinstance(came, KeboolaJob):
        return as_started(run, [came], "trigger_sent", terms)
    facts = {"trigger_id": run.trigger_id, "status": came.status, "request_id": came.request_id}
    if not came.sent:
        text = f"Keboola was not reached: {came}"
        wait_s = backoff_s(run.failures + 1, 5, terms.jitter, came.retry_after_s)
        after = replace(with_error(run, text, terms.now, wait_s), phase=Phase.INTENT)
        return after, [Event.of("trigger_not_sent", run, error=text, **facts)]
    if came.status is None or not 400 <= came.status < 500 or came.status in {408, 429}:
        return as_unknown(run, str(came), terms, came.retry_after_s or 0.0)
    is_curable = came.status in {401, 402, 403, 404, 409, 423}
    wait_s = backoff_s(run.failures + 1, 5 * MINUTE_S, terms.jitter, came.retry_after_s)
    after = replace(
        with_error(run, str(came), terms.now, wait_s if is_curable else math.inf),
        phase=Phase.REJECTED,
        sending_at=None,
        repeat_after_s=0.0,
    )
    return after, [Event.of("trigger_rejected", run, error=str(came), **facts)]


# --- following ------------------------------------------------------------------------------------


def end_event(run: Run, ended: str) -> Event:
    """Return the event that a run has come to a good end."""
    completed = sum(batch.status == "completed" for batch in run.batches)
    failed_requests = sum(batch.failed or 0 for batch in run.batches)
    counts = f"{completed} of {counted(len(run.batches), 'batch')} completed"
    if failed_requests:
        counts += f", {counted(failed_requests, 'request')} failed"
    name = "completed" if completed == len(run.batches) else "completed_with_failures"
    facts = {"keboola_job_id": run.keboola_job_id, "keboola_status": run.keboola_status}
    return Event.of(name, run, **facts, ended=ended, counts=counts, url=run.url)


def after_follow(run: Run, came: KeboolaJob | ApiError, terms: Terms) -> Change:
    """Return a run after a look at its Keboola job: finished, failed, started again, or running."""
    now, job = terms.now, terms.job
    poll_interval_s = job.poll_interval if job else HOUR_S
    wait_s = max(terms.follow_interval_s, min(poll_interval_s, 5 * MINUTE_S))
    facts = {"keboola_job_id": run.keboola_job_id, "url": run.url}
    if isinstance(came, ApiError) and came.status != 404:
        wait_s = backoff_s(run.failures + 1, wait_s, terms.jitter, came.retry_after_s)
        after = with_error(run, str(came), now, wait_s)
        event = Event.of("follow_failed", run, **facts, error=str(came), status=came.status)
        return after, [event] if after.error != run.error else []
    after = replace(run, error=None, error_since=None, failures=0, last_check_at=now)
    if isinstance(came, ApiError):
        came = KeboolaJob("", "deleted", True, "", str(came), None, None)  # noqa: FBT003
    after = replace(after, keboola_status=came.status)
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
    retries = job.retry_on_error if job and terms.may_post else 0
    if came.status == "error" and run.retries < retries:
        wait_s = min(HOUR_S, 5 * MINUTE_S * 2.0**run.retries)
        again = as_rerun(replace(run, retries=run.retries + 1), now, wait_s, error)
        wait = show_duration(wait_s)
        return again, [Event.of("keboola_job_retried", run, **facts, error=error, wait=wait)]
    return replace(after, error=error, error_since=now, keboola_error=came.message or error), []


# --- what a person asked for ----------------------------------------------------------------------


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
    force = request.force
    now_due: dict[str, Any] = {"failures": 0, "next_at": now}
    finished = {Phase.FINISHED, Phase.REJECTED, Phase.REFUSED}
    if run.rerun != request.rerun or (request.phase in finished and run.phase != request.phase):
        return "its Keboola job was started or found meanwhile"
    match run.phase:
        case Phase.SENDING:
            return "its Keboola job is being started now"
        case Phase.SENT:
            return f"its Keboola job {run.keboola_job_id} is running; wait for its end"
        case Phase.FINISHED if run.error or force:
            after = replace(as_rerun(run, now), retries=0)
        case Phase.FINISHED:
            return "its Keboola job has run; --force starts it once more"
        case Phase.REFUSED if force:
            after = as_intended(run, now)
        case Phase.REFUSED:
            return "its policy refuses it; --force starts it all the same"
        case Phase.REJECTED:
            after = as_intended(run, now)
        case Phase.UNKNOWN | Phase.INTENT if force:
            after = replace(run, phase=Phase.INTENT, forced=True, **now_due)
        case _:
            after = replace(run, **now_due)
    return after, [Event.of("retry_taken", run, how=" by force" if force else "")]


# --- status and attention -------------------------------------------------------------------------


def status_of(run: Run, job: Job | None) -> str:  # noqa: PLR0911 - a table
    """Return the status of a run, as people see it (design: `status --json`)."""
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


def attention_of(  # noqa: PLR0911 - a table
    run: Run, job: Job | None, grace_s: float, now: float
) -> str:
    """Return the event that says what a person has to do something about, or "".

    What settles by itself is none: an error counts once it has lasted, a start once it is overdue.
    """
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
        case Phase.POLLING if run.error and not run.failures:
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


# --- clocks ---------------------------------------------------------------------------------------


def shifted(run: Run, by_s: float) -> Run:
    """Return a run with all its pending times moved, after the clock was set."""
    names = ("next_at", "error_since", "intended_at", "joined_at")
    moved = {n: getattr(run, n) + by_s for n in names if getattr(run, n) is not None}
    batches = tuple(
        b if b.files_due_at is None else replace(b, files_due_at=b.files_due_at + by_s)
        for b in run.batches
    )
    return replace(run, batches=batches, **moved)


def as_loaded(run: Run, terms: Terms) -> Change:
    """Return a stored run as a new process takes it up.

    A POST that an earlier process was about to send, or had sent, is unknown. A recorded time in
    the future counts as now; polls begin at once, and no other wait is longer than an hour.
    """
    names = ("error_since", "intended_at", "joined_at", "sent_at", "finished_at", "last_check_at")
    times = {name: getattr(run, name) for name in names}
    now = terms.now
    late: dict[str, Any] = {n: now for n, at in times.items() if at is not None and at > now}
    if run.phase is Phase.POLLING or now + HOUR_S < run.next_at < math.inf:
        late["next_at"] = now
    longest = now + FILES_WAIT_S
    if any((b.files_due_at or 0) > longest for b in run.batches):
        due = [b.files_due_at and min(b.files_due_at, longest) for b in run.batches]
        late["batches"] = tuple(
            replace(b, files_due_at=at) for b, at in zip(run.batches, due, strict=True)
        )
    run = replace(run, **late) if late else run
    if run.phase is Phase.SENDING:
        return as_unknown(run, "the process ended before the answer was recorded", terms)
    return run, []


# --- which run a job of the config is, and which batches are a group ------------------------------


def assign(
    jobs: Mapping[str, Job], targets: Mapping[str, Target], runs: Iterable[Run]
) -> dict[str, Run]:
    """Return the run of each job with batch_ids that has one; the others are new.

    A run is a name and a set of ids. A new job with the ids and the target of a job that has left
    the config is that job under a new name, not new work. The project counts only where it is
    known: Keboola has not named it for a job that is new here.
    """
    own: dict[tuple[str, frozenset[str]], Run] = {}
    left: dict[tuple[frozenset[str], Target], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.phase is not Phase.FINISHED, run.id)):
        ids = frozenset(batch.id for batch in run.batches)
        own[run.job, ids] = run
        if run.job not in jobs:
            left.setdefault((ids, replace(run.target, project="")), []).append(run)
    assigned = {}
    for name, job in jobs.items():
        ids = frozenset(job.batch_ids)
        claims = left.get((ids, targets[name]), [])
        if (name, ids) in own:
            assigned[name] = own[name, ids]
        elif claims and not job.match:
            assigned[name] = claims.pop(0)
    return assigned


def in_order(run: Run, job: Job, batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """Return a run's batches in the config's order, or in that of creation."""
    if not job.match:
        place = {batch_id: i for i, batch_id in enumerate(job.batch_ids)}
        return tuple(sorted(batches, key=lambda batch: place.get(batch.id, 0)))
    return tuple(sorted(batches, key=lambda batch: (batch.created_at or 0.0, batch.id)))


@dataclass(frozen=True, slots=True)
class Row:
    """A row of an account's list of batches, as far as it can be read."""

    batch: Batch
    metadata: Mapping[str, str]

    def is_of(self, job: Job) -> bool:
        """Return whether a job that matches metadata is to take it."""
        is_new = (self.batch.created_at or 0.0) >= job.since
        return is_new and all(self.metadata.get(key) == value for key, value in job.match)


def group_batches(
    job: Job, target: Target, rows: Sequence[Row], runs: Mapping[str, Run], now: float
) -> list[tuple[Run, list[Event], list[Batch]]]:
    """Return the runs that new batches begin or join, with events, and the batches that came late.

    `runs` are those that are known of the groups. A new run has the number 0.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group = row.metadata.get(job.group_by, "") if job.group_by else row.batch.id
        if group:
            groups.setdefault(group, []).append(row)
    changes = []
    for group, found in groups.items():
        run = runs.get(group) or Run(0, job.name, target, group, next_at=now)
        known = {batch.id for batch in run.batches}
        new = [row for row in found if row.batch.id not in known]
        room = 1000 - len(known) if run.phase is Phase.POLLING else 0  # the most of a run
        joined, late = new[:room], new[room:]
        batches = in_order(run, job, [*run.batches, *(row.batch for row in joined)])
        after = run
        if joined:
            size = group_size_of(run.size, job, joined)
            after = replace(run, batches=batches, joined_at=now, next_at=now, size=size)
        begins = "batch_joined" if known else "run_found"
        events = [
            Event.of(begins if i == 0 else "batch_joined", run, batch_id=row.batch.id, count=n)
            for i, (n, row) in enumerate(enumerate(joined, len(known) + 1))
        ]
        events += [Event.of("late_batch", run, batch_id=row.batch.id) for row in late]
        if new:
            changes.append((after, events, [row.batch for row in late]))
    return changes


def group_size_of(known: str, job: Job, joined: Iterable[Row]) -> str:
    """Return what the metadata of a group says of its size: a number, or what is wrong with it."""
    if not (job.group_size or "").startswith("metadata."):
        return ""
    key = str(job.group_size).removeprefix("metadata.")
    sizes = {row.metadata.get(key, "") for row in joined} | ({known} if known else set())
    if len(sizes) > 1:
        return f"the batches differ in {key}"
    (size,) = sizes
    if not re.fullmatch("[1-9][0-9]{0,3}", size):
        return f"{quoted(size)} is no number" if size else f"a batch has no {key}"
    return size


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


# ==================================================================================================
# 6. Http and Keboola: requests out, facts or an ApiError back
# ==================================================================================================

PATIENCE_S: Final = 10.0  # the longest wait for one retry; whatever takes longer is scheduled
REQUEST_S: Final = 60.0  # a request with all of its retries

# Is told what became of a request with a secret, and the time that the server's `Date` says.
Note = Callable[[ApiError | None, float | None], None]


class TooLargeError(ApiError):
    """An answer of over 16 MiB."""


class DaemonThreads(ThreadPoolExecutor):
    """Gives each call a thread of its own, which no other call and no end of the process waits for.

    The loop resolves names with its executor. In a pool, a dead resolver (25 s for each name) would
    hold up whatever else runs there, and the end of the process too.
    """

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
        for entry in re.split(r"[,\s]+", self._proxies.pop("no", "")):
            text = re.sub(r"\]:[0-9]+$|[\[\]]", "", entry.lower())
            domain = re.fullmatch(r"\*|[*.]{0,2}([a-z0-9_-][a-z0-9._-]*)(:[0-9]+)?", text)
            try:
                self._networks.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                if domain:
                    self._domains.append(f".{domain[1]}" if domain[1] else "")
                elif text:
                    self.unreadable.append(entry)

    def proxy_for(self, url: str) -> str | None:
        """Return the proxy for an address; loopback never has one."""
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").lower()
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        if not proxy or is_loopback(url) or f".{host}".endswith(tuple(self._domains)):
            return None
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(host)
            if any(address in network for network in self._networks):
                return None
        return proxy if "://" in proxy else f"http://{proxy}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response."""

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

    def error(self, message: str, *, retryable: bool) -> ApiError:
        """Return an error of this answer."""
        return ApiError(
            f"{message}, with status {self.status}" if self.is_success else message,
            status=self.status,
            retryable=retryable,
            retry_after_s=retry_after_s(self.headers),
            request_id=one_line(self.headers.get("x-request-id", ""), 100),
        )


class Http:
    """The one way out: a limit, a deadline for whole requests, a cap on answers, redaction."""

    def __init__(self, config: Config, redactor: Redactor) -> None:
        self.rules = ProxyRules()
        self._redactor = redactor
        self._clients: dict[str | None, httpx.AsyncClient] = {}  # by proxy
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

    def _new_client(self, url: str) -> httpx.AsyncClient:
        try:
            self._tls = self._tls or httpx.create_ssl_context()
            return httpx.AsyncClient(
                verify=self._tls,
                proxy=self.rules.proxy_for(url),
                trust_env=False,  # `rules` is what the environment says
                timeout=None,  # noqa: S113 - `_fetch` has a deadline for the whole
                follow_redirects=False,  # a redirect would carry the token to another host
                headers={
                    "User-Agent": f"teckochecker/{__version__}",
                    "Accept-Encoding": "identity",
                },
                limits=httpx.Limits(max_keepalive_connections=10, keepalive_expiry=30),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # takes none
            )
        except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
            message = f"cannot set up connections: {one_line(str(error), 200)}"
            raise ApiError(self._redactor.text(message), sent=False) from None

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.aclose()

    async def get(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str], timeout_s: float
    ) -> Answer:
        """Return the answer to one GET. Raises ApiError where none came in time."""
        proxy = self.rules.proxy_for(url)
        if proxy not in self._clients:
            self._clients[proxy] = self._new_client(url)
        parts = {"headers": headers, "params": params or None}
        async with self._places:
            return await self._fetch(self._clients[proxy], max(1.0, timeout_s), "GET", url, parts)

    async def post(
        self, url: str, headers: Mapping[str, str], body: str, timeout_s: float = math.inf
    ) -> Answer:
        """Return the answer to one POST over a fresh connection; an ApiError tells if it was sent.

        A kept connection that the server is about to close looks like a lost answer.
        """
        started = False

        async def trace(event: str, _: object) -> None:
            nonlocal started
            started = started or event.endswith("send_request_headers.started")

        parts = {"headers": headers, "content": body.encode(), "extensions": {"trace": trace}}
        async with self._places, self._new_client(url) as client:
            try:
                return await self._fetch(client, timeout_s, "POST", url, parts)
            except ApiError as error:
                error.sent = started
                raise

    async def _fetch(
        self,
        client: httpx.AsyncClient,
        timeout_s: float,
        method: str,
        url: str,
        parts: Mapping[str, Any],
    ) -> Answer:
        """Send one request; httpx's own time-outs are per read, which a drip of bytes outlives."""
        timeout_s = min(self.timeout_s, timeout_s)
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
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError, RuntimeError) as error:
            text = one_line(self._redactor.text(str(error)), 200)  # in this order: no half a secret
            cure = ""
            if "CERTIFICATE_VERIFY_FAILED" in text:
                cure = (
                    "; where a proxy inspects TLS, set SSL_CERT_FILE to its certificate authority"
                )
            message = f"{type(error).__name__}{': ' + text if text else ''}{cure}"
            raise ApiError(message, retryable=True) from None
        headers = {name: self._redactor.text(text) for name, text in response.headers.items()}
        body = self._redactor.body(body, is_data=response.is_success)
        return Answer(response.status_code, headers, body)

    @staticmethod
    async def _read(response: httpx.Response) -> bytes:
        """Return the body, capped while it streams; nobody asked for compression."""
        if response.headers.get("content-encoding", "").lower() not in {"", "identity"}:
            message = "the answer has an encoding that was not asked for"
            raise ApiError(message, status=response.status_code)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > 16 * 1024 * 1024:
                raise TooLargeError("the answer is over 16 MiB", retryable=True)
        return bytes(body)


async def with_retries(attempt: Callable[[float], Awaitable[Any]]) -> Any:  # noqa: ANN401
    """Return what `attempt(seconds left)` returns, repeated while that may help; else its ApiError.

    Waits as the server asks, or exponentially with jitter, but never longer than PATIENCE_S at a
    time and REQUEST_S in all: what needs more is for the next poll.
    """
    until = time.monotonic() + REQUEST_S
    exponential = tenacity.wait_exponential(multiplier=0.5, max=8) + tenacity.wait_random(0, 0.5)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, ApiError) else None
        return exponential(state) if asked_s is None else asked_s

    def stop(state: tenacity.RetryCallState) -> bool:
        wait_s = state.upcoming_sleep
        is_long = wait_s > PATIENCE_S or time.monotonic() + wait_s > until - 1
        return is_long or state.attempt_number >= 4

    retrying = tenacity.AsyncRetrying(
        # Only ApiError: cancellation must get through.
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, ApiError) and e.retryable),
        wait=wait,
        stop=stop,
        reraise=True,
    )

    async def next_attempt() -> Any:  # noqa: ANN401 - tenacity takes no lambda for a coroutine
        return await attempt(until - time.monotonic())

    return await retrying(next_attempt)


async def noted(request: Awaitable[Answer], server: str, note: Note) -> Answer:
    """Return a successful answer, and tell what became of the request.

    Raises its ApiError; what is no success is one too, with the server's own words for it.
    """
    try:
        answer = await request
    except ApiError as error:
        note(error, None)
        raise
    failure = None
    if not answer.is_success:
        retryable = answer.status in {408, 409, 429} or not 400 <= answer.status < 500
        asked = answer.headers.get("x-should-retry")
        retryable = asked == "true" if asked in {"true", "false"} else retryable
        message = f"{server} answered {answer.status}{server_words(answer)}"
        failure = answer.error(message, retryable=retryable)
    note(failure, http_date(answer.headers.get("date", "")))
    if failure:
        raise failure
    return answer


# --- reading what came ----------------------------------------------------------------------------


def as_dict(value: object) -> dict[str, Any]:
    """Return a JSON object, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def text_or_none(value: object, limit: int = 300) -> str | None:
    """Return a JSON string as one clean line, or None for anything else, also the empty one."""
    return one_line(value, limit) or None if isinstance(value, str) else None


def count_or_none(value: object) -> int | None:
    """Return a JSON number as a count, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1e15 else None


def time_or_none(value: object) -> float | None:
    """Return a JSON number as Unix seconds of this age, or None for anything else."""
    count = count_or_none(value)
    return float(count) if count and count < 4e9 else None


def id_or_none(data: Mapping[str, Any], key: str) -> str | None:
    """Return a file's id, which is never cut. Raises ValueError for what is too long to be one."""
    value = data.get(key)
    if not isinstance(value, str) or not value:
        return None
    if len(value) > 4096 or not value.isprintable():
        raise ValueError(f"has a {key} that is no id ({len(value):,} characters)")
    return value


def id_text(value: object) -> str:
    """Return one of Keboola's ids, which come as text or number, or "" for anything else."""
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return one_line(str(value), 64) if is_id else ""


def parse_batch(data: object, batch_id: str) -> Batch:
    """Return a batch as OpenAI describes it. Raises ValueError for what is none.

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
    status = sys.intern({"canceled": "cancelled"}.get(status.lower(), status.lower()))
    counts = as_dict(data.get("request_counts"))
    total, completed, failed = map(count_or_none, map(counts.get, ("total", "completed", "failed")))
    errors = data.get("errors")
    errors = errors.get("data") if isinstance(errors, dict) else errors
    first = as_dict(errors[0] if isinstance(errors, list) and errors else None)
    ended_at = None
    if STATUS_RANK.get(status) == 3:
        ended = (data.get(f"{name}_at") for name in (status, "completed", "failed", "expired"))
        ended_at = next(filter(None, map(time_or_none, ended)), None)
    return Batch(
        batch_id,
        status,
        total,
        completed,
        failed,
        output_file_id=id_or_none(data, "output_file_id"),
        error_file_id=id_or_none(data, "error_file_id"),
        created_at=time_or_none(data.get("created_at")),
        expires_at=time_or_none(data.get("expires_at")),
        ended_at=ended_at,
        error=text_or_none(first.get("message")),
    )


def http_date(text: str) -> float | None:
    """Return a date of an HTTP header (RFC 9110, each of its three forms) as Unix seconds."""
    try:
        at = email.utils.parsedate_to_datetime(text)
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
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
    return max(0.0, until - (http_date(headers.get("date", "")) or time.time()))


def server_words(answer: Answer) -> str:
    """Return the message in an error's body, in any of the forms in which servers write it."""
    try:
        data = as_dict(answer.json())
    except ApiError:
        return ""
    found: list[object] = []
    for key in ("error", "message", "reason", "detail", "status"):
        value = data.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, dict):
            value = value.get("message") or value.get("msg")
        found.append(value)
    error, message, reason, detail, status = map(text_or_none, found)
    if reason and status:
        reason = f"{status}: {reason}"
    words = (message if error in {None, "error"} else error) or reason or detail
    exception_id = text_or_none(data.get("exceptionId"), 100)
    about = f" (exceptionId {exception_id})" if exception_id else ""
    return f": {words}{about}" if words else about


# --- Keboola --------------------------------------------------------------------------------------


def carried_trigger_id(data: object) -> str | None:
    """Return the trigger id among a job's variables; "" is another's, None is not told."""
    values = data.get("values") if isinstance(data, dict) else data
    if not isinstance(values, list) or not values:
        return None
    for item in map(as_dict, values):
        if item.get("name") == "teckochecker_trigger_id":
            return str(item.get("value"))
    return ""


def parse_keboola_job(row: object) -> KeboolaJob:
    """Return a job of Keboola's queue. Raises ValueError for what is none."""
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    job_id = id_text(row.get("id"))
    if not job_id:
        raise ValueError("has no id")
    created = None
    with contextlib.suppress(ValueError, OverflowError):
        at = datetime.fromisoformat(str(row.get("createdTime")))
        at = at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)
        created = at if at.year < 9999 else None
    status = text_or_none(row.get("status"), 64)
    is_finished = row.get("isFinished")
    if not isinstance(is_finished, bool):
        is_finished = status in {"success", "warning", "error", "terminated", "cancelled"}
    project = id_text(as_dict(row.get("project")).get("id"))
    result = as_dict(row.get("result"))
    message = text_or_none(result.get("message"), 1000)
    exception_id = text_or_none(as_dict(result.get("error")).get("exceptionId"))
    if exception_id:
        message = f"{message or 'no message'} (exceptionId {exception_id})"
    trigger = carried_trigger_id(row.get("variableValuesData"))
    return KeboolaJob(job_id, status, is_finished, project, message, created, trigger)


def oldest_first(jobs: Iterable[KeboolaJob]) -> list[KeboolaJob]:
    """Return the Keboola jobs of one run in order: the oldest one is ours."""
    never = datetime.max.replace(tzinfo=UTC)
    return sorted(jobs, key=lambda job: (job.created_time or never, len(job.id), job.id))


@dataclass(slots=True)
class SharedSearch:
    """A search of one configuration's jobs that all who asked before it began go by."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: list[float] = field(default_factory=list)  # since when, of each who waits
    began: BootTime | None = None
    since: float = 0.0
    jobs: dict[str, KeboolaJob] = field(default_factory=dict)  # by id
    failure: ApiError | None = None  # it is incomplete


class Keboola:
    """One stack and token: search, start, follow. The only place that knows Keboola's API.

    Source: the Job Queue API and the Storage API, as in Keboola's API documents.
    """

    def __init__(
        self, entry: SecretEntry, token: Secret, http: Http, clock: Clock, note: Note
    ) -> None:
        self.name = entry.name
        self.stack_url = entry.stack_url
        self.token = token
        self.skew_s = 0.0  # how far Keboola's clock is ahead of ours
        self.unreadable: dict[str, ApiError] = {}  # old jobs that answered 403 or 404
        self._http = http
        self._clock = clock
        self._note = note
        self._headers = {"X-StorageApi-Token": token.reveal()}
        self._project = ""
        self._queue_url = ""
        self._carried: dict[str, str] = {}  # job id -> trigger id, of rows that did not tell
        self._searches: dict[tuple[str, str], SharedSearch] = {}
        self._shown: dict[tuple[str, str], list[KeboolaJob]] = {}  # by the last searches, ours

    def _noted(self, error: ApiError | None, date: float | None) -> None:
        if date is not None:
            self.skew_s = date - self._clock.now()
        self._note(error, date)

    async def _get(self, url: str, params: Mapping[str, str], *, with_token: bool = True) -> Any:  # noqa: ANN401
        """Return the JSON of a GET. Raises ApiError after the retries."""
        headers = self._headers if with_token else {}
        # Without the token, an answer says nothing of it.
        note: Note = self._noted if with_token else lambda *_: None

        async def attempt(left_s: float) -> Any:  # noqa: ANN401
            try:
                got = self._http.get(url, headers, params, left_s)
                return (await noted(got, "Keboola", note)).json()
            except TooLargeError as error:
                error.retryable = False  # a smaller page is asked for
                raise

        return await with_retries(attempt)

    async def _storage(self, path: str, *, with_token: bool = True) -> dict[str, Any]:
        url = f"{self.stack_url}/v2/storage{path}"
        return as_dict(await self._get(url, {}, with_token=with_token))

    async def queue_url(self) -> str:
        """Return the queue's address: by the stack's name, or as the stack's index says."""
        parts = urllib.parse.urlsplit(self.stack_url.lower())
        if parts.netloc.startswith("connection."):
            return f"{parts.scheme}://queue.{parts.netloc.removeprefix('connection.')}"
        if not self._queue_url:
            services = (await self._storage("", with_token=False)).get("services")
            found = map(as_dict, services if isinstance(services, list) else ())
            urls = [str(s.get("url")).rstrip("/") for s in found if s.get("id") == "queue"]
            good = [url for url in urls if not url_problem(url)]
            if not good or is_loopback(good[0]) > is_loopback(self.stack_url):
                message = f"{self.stack_url}/v2/storage lists no usable https address of the queue"
                raise ApiError(message, sent=False)
            self._queue_url = good[0]
        return self._queue_url

    async def verify(self) -> dict[str, Any]:
        """Return what Keboola says of the token: its project, its rights, whether it expires."""
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
        """Return a configuration as Keboola has it. Raises ApiError, with status 404 for none."""
        branch = f"/branch/{target.branch_id}" if target.branch_id else ""
        path = f"{branch}/components/{target.component_id}/configs/{target.config_id}"
        return await self._storage(path)

    async def create(self, payload: str) -> KeboolaJob:
        """Start a job, in one attempt. Raises ApiError, which `after_post` understands.

        A 2xx without a readable id is no success and no failure: its outcome is unknown.
        """
        try:
            url = await self.queue_url()
        except ApiError as error:
            error.sent = False
            raise
        headers = {**self._headers, "Content-Type": "application/json"}
        posted = self._http.post(f"{url}/jobs", headers, payload)
        answer = await noted(posted, "Keboola", self._noted)
        try:
            return parse_keboola_job(answer.json())
        except ValueError as error:
            message = f"Keboola's answer is not a job: it {error}{server_words(answer)}"
            raise answer.error(message, retryable=False) from None

    async def job(self, job_id: str) -> KeboolaJob:
        """Return a job. Raises ApiError, with status 404 where it was deleted."""
        url = f"{await self.queue_url()}/jobs/{urllib.parse.quote(job_id, safe='')}"
        try:
            return parse_keboola_job(await self._get(url, {}))
        except ValueError as error:
            raise ApiError(f"Keboola's job {job_id} {error}", retryable=True) from None

    # --- searching ---

    async def search(
        self, target: Target, since: float, trigger: str
    ) -> tuple[BootTime, list[KeboolaJob]]:
        """Return when a search began, and the jobs that carry a trigger id, the oldest first.

        `since` is by our clock. Nothing found is said only after a complete search; an incomplete
        one raises ApiError. Who waits for the same configuration shares one search, and what an
        earlier one has shown needs no other: only that there is nothing has to be fresh.
        """
        asked = self._clock.boot_time()
        key = (target.component_id, target.config_id)
        if seen := [job for job in self._shown.get(key, ()) if job.trigger_id == trigger]:
            return asked, oldest_first(seen)
        shared = self._searches.setdefault(key, SharedSearch())
        shared.wanted.append(since)
        try:
            async with shared.lock:
                began = shared.began
                if began is None or began.uptime_s < asked.uptime_s or shared.since > since:
                    began = shared.began = self._clock.boot_time()
                    shared.since, shared.jobs = min(shared.wanted), {}
                    shared.failure = await self._read_pages(target, shared)
                    self._shown.pop(key, None)
                    self._shown[key] = [job for job in shared.jobs.values() if job.trigger_id]
                    while len(self._shown) > 20:
                        del self._shown[next(iter(self._shown))]
                ours = [j for j in shared.jobs.values() if j.trigger_id == trigger]
                if not ours and shared.failure:
                    raise shared.failure
                return began, oldest_first(ours)
        finally:
            shared.wanted.remove(since)
            if not shared.wanted:
                del self._searches[key]

    async def _read_pages(self, target: Target, shared: SharedSearch) -> ApiError | None:
        """Fill a search with the jobs of a configuration, newest first; returns why not whole.

        Keboola ignores filters that it does not know, so that every row is looked at.
        """
        since = max(0, int(shared.since + self.skew_s))
        params = {
            "componentId": target.component_id,
            "configId": target.config_id,
            "sortBy": "createdTime",
            "sortOrder": "desc",
            "createdTimeFrom": datetime.fromtimestamp(since, UTC).isoformat(),
        }
        limit, offset = 500, 0
        for _ in range(200):
            try:
                paging = {"limit": str(limit), "offset": str(offset)}
                page = await self._page("search/jobs", params | paging)
                fresh = [job for job in page if job.id not in shared.jobs]
                shared.jobs |= {job.id: job for job in await self._told(fresh)}
            except TooLargeError as error:
                if limit == 1:
                    return error
                limit //= 2
                continue
            except ApiError as error:
                return error
            if not fresh and len(page) < limit:
                return None  # not before: a server may cap `limit` lower than it was asked for
            times = [job.created_time for job in page if job.created_time]
            is_sorted = len(times) == len(page) and times == sorted(times, reverse=True)
            if fresh and is_sorted:
                # A second of overlap: rows of one second may stand on both sides of a page's end.
                params["createdTimeTo"] = (min(times) + timedelta(seconds=1)).isoformat()
                offset = 0
            else:
                offset += len(page)
        return ApiError("Keboola's job list does not end after 200 pages")

    async def recent(self, target: Target, trigger: str) -> list[KeboolaJob]:
        """Return what the deprecated list of jobs shows of a run; it may be ahead of the search."""
        params = {"component": target.component_id, "config": target.config_id, "limit": "100"}
        page = await self._page("jobs", params)
        return oldest_first(job for job in page if job.trigger_id == trigger)

    async def _page(self, path: str, params: Mapping[str, str]) -> list[KeboolaJob]:
        rows = await self._get(f"{await self.queue_url()}/{path}", params)
        if not isinstance(rows, list):
            raise ApiError("Keboola's job list is not a list", retryable=True)
        try:
            return [parse_keboola_job(row) for row in rows]
        except ValueError as error:
            raise ApiError(f"a row of Keboola's job list {error}", retryable=True) from None

    async def _told(self, jobs: Sequence[KeboolaJob]) -> list[KeboolaJob]:
        """Return jobs with their trigger ids; one whose row did not tell is read, once.

        Raises ApiError where one cannot be read; but 403 and 404 are another's: no token of this
        project has made it.
        """

        async def tell(job: KeboolaJob) -> None:
            try:
                self._carried[job.id] = (await self.job(job.id)).trigger_id or ""
            except ApiError as error:
                if error.status not in {403, 404}:
                    raise
                self.unreadable[job.id] = error
                self._carried[job.id] = ""

        silent = [job for job in jobs if job.trigger_id is None and job.id not in self._carried]
        for came in await asyncio.gather(*map(tell, silent), return_exceptions=True):
            if isinstance(came, BaseException):
                raise came
        return [
            job if job.trigger_id is not None else replace(job, trigger_id=self._carried[job.id])
            for job in jobs
        ]


# --- OpenAI ---------------------------------------------------------------------------------------


class OpenAI:
    """One OpenAI key: batches and pages of the list, and how the account is doing.

    Source: OpenAI's API reference, `GET /batches/{id}` and `GET /batches`.
    """

    def __init__(
        self, entry: SecretEntry, key: Secret, http: Http, clock: Clock, note: Note
    ) -> None:
        self.name = entry.name
        self.answered_at: dict[str, float] = {}  # uptime of batches' last own answers
        self._http = http
        self._clock = clock
        self._note = note
        self._base_url = entry.base_url
        bearer = "Bearer " if entry.auth_header == "Authorization" else ""
        headers = {
            entry.auth_header: f"{bearer}{key.reveal()}",
            "OpenAI-Organization": entry.organization,
            "OpenAI-Project": entry.project,
        }
        self._headers = {name: value for name, value in headers.items() if value}
        self._params = {"api-version": entry.api_version} if entry.api_version else {}
        self._in_flight = 0
        self._silences = 0  # requests in a row that no answer came to
        self._held_until = -math.inf
        self._last_words = ""

    async def _get(self, path: str, params: Mapping[str, str], left_s: float) -> Answer:
        url, all_params = f"{self._base_url}{path}", {**self._params, **params}
        self._in_flight += 1
        try:
            got = self._http.get(url, self._headers, all_params, left_s)
            return await noted(got, "OpenAI", self._note)
        finally:
            self._in_flight -= 1

    def refusal(self) -> ApiError | None:
        """Return what stands in the way of any request, where that takes long.

        A dead server holds each request to its deadline: one at a time finds out when it is back,
        and the places are left to other accounts.
        """
        left_s = self._held_until - self._clock.uptime_s()
        if left_s > PATIENCE_S:
            return ApiError(self._last_words, status=429, retry_after_s=left_s, sent=False)
        if self._silences >= 5 and self._in_flight:
            return ApiError(self._last_words, sent=False)
        return None

    async def ask(self, batch_id: str) -> Batch:
        """Return a batch's own answer, the one that counts. Raises ApiError after the retries."""
        clock = self._clock

        async def attempt(left_s: float) -> Batch:
            while (held_s := self._held_until - clock.uptime_s()) > 0 and not self.refusal():
                await asyncio.sleep(held_s)
            if refusal := self.refusal():
                raise refusal
            try:
                answer = await self._get(f"/batches/{batch_id}", {}, left_s)
                batch = parse_batch(answer.json(), batch_id)
            except ValueError as error:
                message = f"OpenAI's answer is not a batch: it {error}{server_words(answer)}"
                raise answer.error(message, retryable=True) from None
            except ApiError as error:
                self._take_in(error)
                raise
            self._silences = 0
            return batch

        batch: Batch = await with_retries(attempt)
        self.answered_at[batch_id] = clock.uptime_s()
        return batch

    def _take_in(self, error: ApiError) -> None:
        """Remember what a failure says about the account as a whole, and what a 404 means."""
        self._silences = self._silences + 1 if error.status is None else 0
        self._last_words = str(error)
        if error.status == 429 and error.retry_after_s:
            until = self._clock.uptime_s() + min(error.retry_after_s, HOUR_S)
            self._held_until = max(self._held_until, until)
        if error.status == 404:
            causes = "the batch was deleted, or the key belongs to another OpenAI project"
            error.args = (f"{error}: {causes}, or base_url is wrong",)

    async def page(self, cursor: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return the rows of the account's newest batches, or of those after one, and if more come.

        Source: OpenAI's API reference, `GET /batches`. Raises ApiError, without retries: what it
        would have shown is asked for one by one.
        """
        params = {"limit": "100"} | ({"after": cursor} if cursor else {})
        answer = await self._get("/batches", params, REQUEST_S)
        data = answer.json()
        rows = data.get("data") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            message = f"OpenAI's answer is not a list{server_words(answer)}"
            raise answer.error(message, retryable=True)
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
        self._thread.start()

    def msg(self, line: str) -> None:
        """Write a line, as structlog's loggers do."""
        try:
            if self._dropped:
                self._lines.put_nowait(f"({self._dropped} lines of the log were dropped)")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = error = msg

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


def configure_logging(config: Config, redactor: Redactor, writer: LogWriter) -> None:
    """Send events, and the warnings of libraries, to standard error through one redactor."""
    is_console = config.log_format == "console"
    is_console = is_console or (config.log_format == "auto" and os.isatty(2))
    status = os.fstat(2)
    is_journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    priorities = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}

    def render(_: object, level: str, line: Mapping[str, Any]) -> str:
        head = {name: line[name] for name in ("time", "level", "event", "text")}
        told = redactor.tree(head | dict(line))  # the last before the line is made
        prefix = priorities[level] if is_journal else ""
        if not is_console:
            return prefix + json.dumps(told, ensure_ascii=False)
        at = datetime.fromisoformat(told["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        mark = "" if level == "info" else f"{level}: "
        return "\n".join((f"{prefix}{at} {mark}{told['text']}", *told.get("traceback", ())))

    class Forwarder(logging.Handler):
        """Passes on what a library has to say."""

        def emit(self, record: logging.LogRecord) -> None:
            text = one_line(record.getMessage(), 1000)
            say(Event("library_warning", "warning", None, None, {"logger": record.name}, text))

    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,
    )
    logging.getLogger().handlers = [Forwarder()]
    logging.getLogger().setLevel(logging.WARNING)  # httpx logs URLs at INFO, httpcore headers
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)  # see DaemonThreads


def say(event: Event) -> None:
    """Write one event to the log."""
    document = replace(event, at=event.at or time.time()).document()
    getattr(structlog.get_logger(), event.level)(document.pop("event"), **document)


class ServiceManager:
    """The service manager's side of the process (sd_notify(3)); silent where there is none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        is_ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = env.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog_us) / 1e6 if is_ours and watchdog_us.isdigit() else None

    def send(self, *lines: str) -> None:
        """Send one datagram."""
        if self._address:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
            ):
                out.sendto("\n".join(lines).encode(), self._address)


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until an event is set or a time has passed; returns whether it was set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()
    return event.is_set()


# --- one OpenAI account ---------------------------------------------------------------------------


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

    def missing(self) -> list[Batch]:
        """Return the due batches that no page has shown, the newest first."""
        shown = self.unchanged.keys() | self.changed
        missing = [batch for key, batch in self.due.items() if key not in shown]
        return sorted(missing, key=lambda batch: -(batch.created_at or 0.0))

    @property
    def overhead(self) -> int:
        """How many requests pages have cost beyond what they have saved."""
        return self.pages - len(self.unchanged)

    def take(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Note what a page shows; returns how many due batches."""
        before = len(self.unchanged) + len(self.changed)
        self.pages += 1
        for row in rows:
            if row["id"] in self.known:
                self._take_row(row, self.known[row["id"]])
        ages = creation_times(rows[:1]) + creation_times(rows[-1:])
        if ages and len(rows) > 1:
            self.span_s = max(ages) - min(ages)
        return len(self.unchanged) + len(self.changed) - before

    def _take_row(self, row: Mapping[str, Any], known: Batch) -> None:
        status = str(row.get("status")).lower()
        rank, known_rank = STATUS_RANK.get(status), STATUS_RANK.get(known.status or "")
        if rank is not None and known_rank is not None and rank < known_rank:
            self.is_stale = True
        if known.id not in self.due:
            return
        if status != known.status or known.is_terminal:
            self.changed.add(known.id)
            return
        counts = row.get("request_counts")
        if isinstance(counts, dict):
            told: dict[str, Any] = {
                n: count_or_none(counts.get(n)) for n in ("total", "completed", "failed")
            }
            if None not in told.values() and told["completed"] != known.completed:
                known = replace(known, **told)
        self.unchanged[known.id] = known


def creation_times(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return when the batches of rows were created, where they tell."""
    return [at for row in rows if (at := time_or_none(row.get("created_at")))]


def row_of(row: Mapping[str, Any]) -> Row | None:
    """Return a row of the list for finding; one that says that it is finished is only a hint."""
    try:
        batch = parse_batch(row, row["id"])
    except ValueError:
        return None
    if batch.is_terminal:
        batch = Batch(batch.id, created_at=batch.created_at)
    metadata = row.get("metadata")
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return Row(batch, {str(key): value for key, value in pairs if isinstance(value, str)})


class Finding:
    """How far an account's list has to be read back for the new batches of some jobs.

    To the newest row that was there at the last complete read, with an hour's overlap (a row may
    show up late) of at most two pages more than what is new; or to `since`.
    """

    def __init__(self, store: Store, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.newest_at = 0.0
        self._keys = {j.name: compact_json([j.match_key, j.since, j.openai_secret]) for j in jobs}
        marks = {job.name: store.meta(f"read:{job.name}") or {} for job in jobs}
        self._read_to = {n: m["to"] for n, m in marks.items() if m.get("key") == self._keys[n]}
        self._new_to = min(self._read_to.get(job.name, job.since) for job in jobs)
        floors = (max(j.since, self._read_to.get(j.name, j.since) - HOUR_S) for j in jobs)
        self._floor = min(floors)
        self._pages_beyond = 0

    def needs_more(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether to read on after a page."""
        ages = creation_times(rows) or [0.0]
        self.newest_at = max(self.newest_at, *ages)
        self._pages_beyond += min(ages) <= self._new_to
        return min(ages) > self._floor and self._pages_beyond <= 2

    def marks(self) -> list[Statement]:
        """Return what stores that the list was read completely, where that is new."""
        return [
            Store.meta_statement(f"read:{name}", {"key": key, "to": self.newest_at})
            for name, key in self._keys.items()
            if self.newest_at > self._read_to.get(name, -1.0)
        ]


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
        self.identity = (key, replace(entry, text=Secret(""), line=0, column=0))
        self.run_ids: set[int] = set()  # of the runs that it polls
        self.finders: list[Job] = []  # the jobs that it finds batches for
        self.wake = asyncio.Event()
        self.until = math.inf  # when `run` sees again what is due
        self._engine = engine
        self._places = asyncio.Semaphore(engine.http.max_concurrency)  # before those of all
        self._asking: dict[str, asyncio.Task[Batch | ApiError]] = {}
        self._busy: set[int] = set()  # runs that are being polled
        self._complete: list[tuple[int, dict[str, Batch | ApiError]]] = []
        self._list_from = -math.inf  # when pages may be read again
        self._list_failures = 0
        self._find_at = -math.inf
        self._find_failures = 0

    # --- the loop ---

    async def run(self) -> None:
        """Poll what is due, and find what is new, until cancelled."""
        engine, clock = self._engine, self._engine.clock
        while not engine.is_stopping:
            self.wake.clear()
            now = clock.now()
            idle = [engine.runs[i] for i in self.run_ids - self._busy]
            is_finding = bool(self.finders) and self._find_at <= now
            if is_finding or any(run.next_at <= now for run in idle):
                due = [run for run in idle if run.next_at <= now + self._early_s(run)]
                try:
                    await self._poll(due, is_finding=is_finding)
                except Exception as error:  # noqa: BLE001 - trouble of one account is not the others'
                    engine.note_failure(error, self.name)
                    self._busy -= {run.id for run in due}
                    self._find_at = clock.now() + 5
                    await asyncio.sleep(1)
            waiting = [engine.runs[i].next_at for i in self.run_ids - self._busy]
            self.until = min([*waiting, self._find_at if self.finders else math.inf])
            # A suspended machine's timers stand still: none is longer than half a minute.
            await wait_for_event(self.wake, min(30.0, self.until - clock.now()))

    def _early_s(self, run: Run) -> float:
        """Return how early a run may be polled together with one that is due."""
        job = self._engine.job_of(run)
        return min(job.poll_interval / 10, MINUTE_S) if job else 0.0

    async def run_once(self) -> None:
        """Poll all runs once, and those that are found meanwhile."""
        engine, polled, is_finding = self._engine, set[int](), bool(self.finders)
        while (new := self.run_ids - polled) or is_finding:
            polled |= new
            try:
                polls = await self._poll([engine.runs[i] for i in new], is_finding=is_finding)
                await asyncio.gather(*polls)
                self._record()
            except (StorageError, sqlite3.Error) as error:
                engine.note_failure(error, self.name)
            is_finding = False

    async def _poll(self, runs: Sequence[Run], *, is_finding: bool) -> list[asyncio.Task[None]]:
        """Begin the poll of some runs; each ends when its batches have answered."""
        due = {b.id: b for run in runs for b in run.batches if not b.is_final}
        known = {b.id: b for run in runs for b in run.batches}
        reading = ListReading({k: b for k, b in due.items() if k not in self._asking}, known)
        polled_before = sum(batch.status is not None for batch in reading.due.values())
        is_usable = self._list_from <= self._engine.clock.uptime_s() and not self.refusal()
        pays = polled_before >= 5 and is_usable
        self._busy |= {run.id for run in runs}
        if is_finding or pays:
            await self._read_list(reading, pays=pays, is_finding=is_finding)
        shown = reading.unchanged if pays and not reading.is_stale else {}
        if shown and reading.overhead <= 1:  # beside a list, the one not asked for longest
            shown.pop(min(shown, key=lambda key: self.answered_at.get(key, -math.inf)))
        polls = []
        for run in runs:
            ids = [batch.id for batch in run.batches if not batch.is_final]
            answers: dict[str, Batch | ApiError] = {i: shown[i] for i in ids if i in shown}
            if len(answers) == len(ids):
                self._end_poll(run.id, answers)
            else:
                polls.append(self._engine.spawn(self._poll_run(run.id, ids, answers)))
        return polls

    async def _poll_run(
        self, run_id: int, ids: Iterable[str], answers: dict[str, Batch | ApiError]
    ) -> None:
        """Ask for what no page has shown of a run; two runs with one batch share its answer."""
        for batch_id in ids:
            if batch_id not in answers and batch_id not in self._asking:
                task = asyncio.ensure_future(self._ask_one(batch_id))
                self._asking[batch_id] = task
                task.add_done_callback(functools.partial(self._end_asking, batch_id))
        missing = {i: self._asking[i] for i in ids if i not in answers}
        await asyncio.wait(missing.values())
        self._end_poll(run_id, answers | {i: task.result() for i, task in missing.items()})

    def _end_asking(self, batch_id: str, _: object) -> None:
        del self._asking[batch_id]

    async def _ask_one(self, batch_id: str) -> Batch | ApiError:
        async with self._places:
            try:
                return await self.ask(batch_id)
            except ApiError as error:
                return error
            except Exception as error:  # noqa: BLE001 - a bug that one batch meets is not the others'
                self._engine.note_failure(error, batch_id)
                return ApiError(f"internal error: {type(error).__name__}")

    def _end_poll(self, run_id: int, answers: dict[str, Batch | ApiError]) -> None:
        """Have a poll recorded, together with what else has come by then."""
        if not self._complete:
            asyncio.get_running_loop().call_soon(self._record)
        self._complete.append((run_id, answers))

    def _record(self) -> None:
        complete, self._complete = self._complete, []
        ids = {run_id for run_id, _ in complete}
        self._busy -= ids
        if complete and self._engine.accounts.get(self.name) is self:
            self._engine.record_polls(complete)
            runs = (self._engine.runs.get(run_id) for run_id in ids)
            if any(run and run.next_at < self.until for run in runs):
                self.wake.set()

    # --- the list ---

    async def _read_list(self, reading: ListReading, *, pays: bool, is_finding: bool) -> None:
        """Read the pages of the list that are needed to find, and those that save requests."""
        finding = Finding(self._engine.store, self.finders) if is_finding else None
        try:
            cursor: str | None = None
            while True:
                rows, has_more = await self.page(cursor)
                is_worth_it = reading.take(rows) >= 2 and pays and bool(reading.missing())
                if finding:
                    self._find(finding, rows)
                    is_worth_it = finding.needs_more(rows) or is_worth_it
                if not (has_more and is_worth_it):
                    break
                cursor = rows[-1]["id"]
            if finding:
                self._end_finding(finding)
            if pays:
                await self._read_clusters(reading)
                self._note_list(None, is_stale=reading.is_stale)
        except ApiError as error:
            if finding:
                self._note_find_failure(error)
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
                shown = reading.take(rows)
                left = {batch.id for batch in reading.missing()}
                missing = [batch for batch in missing if batch.id in left]
                last_at = min(creation_times(rows), default=0.0) - reading.span_s
                is_close = has_more and any((b.created_at or 0) >= last_at for b in missing)
                cursor = rows[-1]["id"] if rows else ""

    def _note_list(self, error: ApiError | None, *, is_stale: bool = False) -> None:
        """Do without the list for a while after a failure, for a day where there is none."""
        was_usable = self._list_failures == 0
        self._list_failures = 0 if error is None and not is_stale else self._list_failures + 1
        if self._list_failures == 0:
            if not was_usable:
                self._engine.log(Event.of("list_usable", secret=self.name))
            return
        wait_s = float(DAY_S)
        if error and (error.retryable or error.status == 429):
            jitter = self._engine.clock.jitter()
            wait_s = backoff_s(self._list_failures, MINUTE_S, jitter, error.retry_after_s)
        self._list_from = self._engine.clock.uptime_s() + wait_s
        if was_usable and not (error and error.status == 429):
            why = error or "it shows older statuses than the batches' own answers"
            self._engine.log(Event.of("list_not_usable", secret=self.name, error=str(why)))

    # --- finding ---

    def _find(self, finding: Finding, rows: Sequence[Mapping[str, Any]]) -> None:
        """Have the runs begun or joined that a page's rows belong to."""
        engine, read = self._engine, [found for row in rows if (found := row_of(row))]
        for job in finding.jobs:
            mine = [row for row in read if row.is_of(job)]
            known = engine.store.known_batches(job.name, [row.batch.id for row in mine])
            new = [row for row in mine if row.batch.id not in known]
            for row in new if job.group_by else ():
                if not row.metadata.get(str(job.group_by)):
                    self._note_without_group(job, row.batch.id)
            if new:
                key = job.group_by
                groups = [row.metadata.get(key, "") if key else row.batch.id for row in new]
                runs = engine.store.groups(job.name, groups)
                runs |= {g: engine.runs[r.id] for g, r in runs.items() if r.id in engine.runs}
                target, now = engine.loaded.config.target(job), engine.clock.now()
                engine.take_found(group_batches(job, target, new, runs, now))

    def _note_without_group(self, job: Job, batch_id: str) -> None:
        """Tell once of a batch that lacks what it would be grouped by."""
        query = (
            "SELECT 1 FROM events WHERE job = ? AND name = 'batch_without_group'"
            " AND json_extract(fields, '$.batch_id') = ?"
        )
        if not self._engine.store.one(query, job.name, batch_id):
            event = Event.of("batch_without_group", batch_id=batch_id, group_by=job.group_by)
            self._engine.log(replace(event, job=job.name, text=f"{job.name}: {event.text}"))

    def _end_finding(self, finding: Finding) -> None:
        """Remember how far the list was read back to, completely."""
        engine, interval_s = self._engine, min(job.poll_interval for job in finding.jobs)
        recovered = [Event.of("find_recovered", secret=self.name)] if self._find_failures else []
        self._find_failures, self._find_at = 0, engine.clock.now() + interval_s
        engine.commit([], recovered, finding.marks())

    def _note_find_failure(self, error: ApiError) -> None:
        self._find_failures += 1
        if self._find_failures == 1:
            self._engine.log(Event.of("find_failed", secret=self.name, error=str(error)))
        interval_s = min(job.poll_interval for job in self.finders)
        jitter = self._engine.clock.jitter()
        wait_s = backoff_s(self._find_failures, interval_s, jitter, error.retry_after_s)
        self._find_at = self._engine.clock.now() + wait_s

    def watch(self, finders: Sequence[Job]) -> None:
        """Take a new config: the runs are told one by one; what is to be found may be other now."""
        self.run_ids.clear()
        self.finders = list(finders)
        self._find_at = -math.inf
        self.wake.set()


# --- one run, from ready to its end ---------------------------------------------------------------


async def drive_run(engine: Engine, run_id: int) -> None:
    """Take a run from all batches finished to its Keboola job's end; the only one that moves it.

    What matters is committed before the next step begins, so that a process killed anywhere finds
    at its next start what may have happened. After each wait and request everything is checked
    again: a reload or a retry may have come.
    """
    failures = 0
    while (run := engine.runs.get(run_id)) is not None and not engine.is_stopping:
        action = next_action(run, may_post=engine.may_post(run))
        wait_s = run.next_at - engine.clock.now()
        if engine.once and action is Action.FOLLOW:
            wait_s = math.inf if run_id in engine.followed else 0.0  # once in a pass
        if action is Action.IDLE or (engine.once and wait_s > PATIENCE_S):
            return
        try:
            if wait_s > 0:
                await wait_for_event(engine.wakes[run_id], min(wait_s, 30.0))
                engine.wakes[run_id].clear()
            elif action is Action.ARM:
                engine.commit([(replace(as_intended(run, run.next_at), error=run.error), [])])
            elif action is Action.FOLLOW:
                await follow_run(engine, run)
            else:
                await search_and_start(engine, run)
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


async def search_and_start(engine: Engine, run: Run) -> None:  # noqa: C901, PLR0912 - see below
    """Search Keboola for a run's job; start it where the search allows that."""
    clock, config, job = engine.clock, engine.loaded.config, engine.job_of(run)
    began, keboola, aimed = clock.boot_time(), None, run
    came: Sequence[KeboolaJob] | ApiError
    try:
        if job and run.sending_at is None:  # nothing was sent: what the config says now counts
            keboola, target = engine.keboolas[job.keboola_secret], config.target(job)
            aimed = as_aimed(run, job, target, keboola.token)
            target = replace(target, project=await keboola.project())
            if engine.runs.get(run.id) is not run or engine.job_of(run) is not job:
                return
            aimed = as_aimed(run, job, target, keboola.token)
            if aimed != run:
                engine.check_in_place()
                facts = {"trigger_id": run.trigger_id, "target": str(target)}
                events = [] if run.payload else [Event.of("trigger_intended", run, **facts)]
                engine.commit([(aimed, events)])
                run = engine.runs[run.id]
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
        return
    if keboola:
        engine.tell_unreadable(keboola)
    if not came and began.uptime_s < engine.empty_counts_from:
        wait_s = engine.empty_counts_from - began.uptime_s
        engine.commit([(replace(run, next_at=clock.now() + wait_s), [])])
        return
    if isinstance(came, ApiError) and not run.payload:
        run = aimed  # so that a correction of what failed is seen after a restart, too
    terms = engine.terms(run)
    if not keboola or engine.keboolas.get(keboola.name) is not keboola:
        terms = replace(terms, may_post=False)  # the token is another one now
    after, events = after_search(run, came, began, terms)
    if after.phase is Phase.SENDING and keboola:
        engine.check_in_place()
        engine.commit([(after, events)])  # nothing was awaited since the search was judged
        await post_run(engine, keboola, run.id)
    elif after != engine.runs[run.id]:
        engine.commit([(after, events)])


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
        run = engine.runs[run_id]
        change = after_post(run, came, engine.terms(run))
        give_up_at = clock.uptime_s() + (PATIENCE_S if engine.once else math.inf)
        while True:
            try:
                return engine.commit([change])
            except StorageError as error:
                if clock.uptime_s() > give_up_at:
                    raise
                engine.note_failure(error, run.name, run)
                await asyncio.sleep(1)
    finally:
        engine.posting.discard(run_id)


async def follow_run(engine: Engine, run: Run) -> None:
    """See once how a run's Keboola job is."""
    engine.followed.add(run.id)
    came: KeboolaJob | ApiError
    try:
        came = await (await engine.keboola_for(run)).job(str(run.keboola_job_id))
    except ApiError as error:
        came = error
    if engine.runs.get(run.id) is run:
        engine.commit([after_follow(run, came, engine.terms(run))])


# --- everything -----------------------------------------------------------------------------------


class Engine:
    """What runs: applies a config, has accounts polled, runs driven, and commits what came of it.

    `apply` takes a new config at any time; `run` works until it is cancelled or, with --once, until
    every unfinished run has had its poll and its step.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what it works with
        self,
        loaded: LoadedConfig,
        store: Store,
        lock: StateLock,
        http: Http,
        clock: Clock,
        redactor: Redactor,
        *,
        once: bool = False,
    ) -> None:
        self.loaded = loaded
        self.store = store
        self.lock = lock
        self.http = http
        self.clock = clock
        self.once = once
        self.runs: dict[int, Run] = {}
        self.wakes: dict[int, asyncio.Event] = {}  # of runs that are driven
        self.accounts: dict[str, Account] = {}
        self.keboolas: dict[str, Keboola] = {}
        self.posting: set[int] = set()
        self.followed: set[int] = set()  # runs whose Keboola job was seen in this process
        self.stats = store.stats()
        self.is_stopping = False
        self.has_failed = False  # something could not be written, or a bug was met
        self.config_error: str | None = None
        self.told: list[asyncio.Event] = []  # set whenever something was committed
        self.empty_counts_from = -math.inf  # uptime: an empty search begun earlier says nothing
        self._redactor = redactor
        self._tasks: asyncio.TaskGroup | None = None
        self._drivers: dict[int, asyncio.Task[None]] = {}
        self._polling: dict[str, asyncio.Task[None]] = {}  # the accounts' loops
        self._current: set[int] = set()  # runs of the batch_ids that the config has now
        self._next_id = int(store.one("SELECT max(id) FROM runs") or 0) + 1
        self._touched: set[int] = set()  # runs whose poll changed nothing but its times
        self._touched_at = 0.0
        self._stats_changed: set[str] = set()
        self._pruned_at = self._swept_at = -math.inf
        self._data_version = -1
        self._trouble: set[tuple[int | None, str]] = set()  # told, and not over
        self._last_told: dict[tuple[object, ...], float] = {}

    # --- running ---

    async def run(self, helpers: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
        """Work, with `helpers` beside. Raises StateError where going on could start a job twice."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._see_if_state_is_older()
                self.apply(self.loaded)
                for account in self.accounts.values() if self.once else ():
                    self.spawn(account.run_once())
                for helper in helpers if self.once else (self._keep_house, *helpers):
                    self.spawn(helper())
        except BaseExceptionGroup as group:
            errors: BaseException | None = group.split(TeckoError)[0]
            while isinstance(errors, BaseExceptionGroup):
                errors = errors.exceptions[0]
            raise (errors or group) from None

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Start a task that `run` waits for, and whose exception ends it."""
        if self._tasks is None:
            raise RuntimeError("the engine does not run")
        return self._tasks.create_task(work)  # type: ignore[arg-type] # coroutines all

    def _see_if_state_is_older(self) -> None:
        """Take no empty search for an answer yet where the state file does not know the last POST.

        It was lost or restored; what was posted shows in Keboola's search within the grace.
        """
        posted = self.lock.last_post
        query = "SELECT max(at) FROM events WHERE name = 'trigger_sending'"
        if posted and posted.wall > (self.store.one(query) or 0) + 1:
            passed_s = posted.until_s(self.clock.boot_time())
            left_s = self.loaded.config.trigger_grace - passed_s
            if left_s > 0:
                self.empty_counts_from = self.clock.uptime_s() + left_s
                self.log(Event.of("state_is_older", wait_s=round(left_s, 1)))

    async def _keep_house(self) -> None:
        """See every second what has changed outside, and write down what may wait."""
        while True:
            self.check_in_place()
            self.lock.touch()
            try:
                self._follow_clock()
                self.take_requests()
                self.flush()
                self.sweep()
            except (StorageError, sqlite3.Error) as error:
                self.note_failure(error, "housekeeping")
            await asyncio.sleep(1.0)

    def _follow_clock(self) -> None:
        """Move every pending time when the system's clock was set."""
        if by_s := self.clock.changed():
            self.runs = {run.id: shifted(run, by_s) for run in self.runs.values()}
            self._touched |= self.runs.keys()
            for account in self.accounts.values():
                account.wake.set()
            self.log(Event.of("clock_changed", seconds=round(by_s)))

    def sweep(self) -> None:
        """Tell what has come to need a person by lasting; once an hour, drop what is old."""
        now = self.clock.uptime_s()
        if now - self._swept_at >= 5:
            self._swept_at = now
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
        """Make a new config the one that counts. After a StorageError, apply it again."""
        self.flush(at_once=True)
        config, terms = loaded.config, Terms(None, self.clock.boot_time())
        terms = replace(terms, grace_s=config.trigger_grace)
        self.store.execute(self._prepare(config))
        changes: dict[int, Change] = {}
        for run in self.store.runs_for(config.jobs):
            mine = self.runs.get(run.id)
            is_mine = mine is not None and mine.job == run.job
            changes[run.id] = (mine, []) if mine and is_mine else as_loaded(run, terms)
        known = {run.id: run for run, _ in changes.values()}
        old, before = self.loaded, (self.runs, self._current)
        try:
            self._current = self._assign(config, changes)
            self.loaded = loaded
            self.runs = {i: before[0].get(i, run) for i, run in known.items()}
            new = [self._with_config(change, old) for change in changes.values()]
            self.commit([c for c in new if c[1] or c[0] != self.runs.get(c[0].id)])
        except StorageError:
            self.loaded, (self.runs, self._current) = old, before
            raise
        self._arrange(loaded)
        self.take_requests(at_once=True)
        for run in list(self.runs.values()):
            self._place(run)

    def _prepare(self, config: Config) -> list[Statement]:
        """Return what a config changes before its runs are read.

        Webhooks that are new are told from here on. A match job under a new name takes over the
        groups of one that has left the config.
        """
        last_id = self.store.last_event_id()
        statements: list[Statement] = [
            ("INSERT OR IGNORE INTO webhooks VALUES (?, ?, 0, 0)", (name, last_id))
            for name, _ in config.notify
        ]
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        matching = [(n, job) for n, job in config.jobs.items() if job.match]
        mine = {name: [job.match_key, str(config.target(job))] for name, job in matching}
        left = {tuple(key): name for name, key in known.items() if name not in config.jobs}
        for name, key in mine.items():
            if name not in known and (old := left.pop(tuple(key), None)):
                rename = "UPDATE runs SET job = ? WHERE job = ? AND \"group\" <> ''"
                copy = "INSERT OR REPLACE INTO meta SELECT ?, value FROM meta WHERE key = ?"
                statements.append((rename, (name, old)))
                statements.append((copy, (f"read:{name}", f"read:{old}")))
        if known | mine != known:
            statements.append(Store.meta_statement("match_jobs", known | mine))
        return statements

    def _assign(self, config: Config, changes: dict[int, Change]) -> set[int]:
        """Bring the runs of jobs with batch_ids to what the config says; returns their numbers."""
        targets = {name: config.target(job) for name, job in config.jobs.items()}
        runs = [run for run, _ in changes.values() if not run.group]
        assigned, current = assign(config.jobs, targets, runs), set()
        for name, job in config.jobs.items():
            if run := assigned.get(name):
                after = replace(run, job=name, batches=in_order(run, job, run.batches))
                changes[run.id] = (after if after != run else run, changes[run.id][1])
            elif not job.match:
                batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
                now, self._next_id = self.clock.now(), self._next_id + 1
                run = Run(self._next_id, name, targets[name], batches=batches, next_at=now)
                changes[run.id] = (run, [])
            if run:
                current.add(run.id)
        return current

    def _with_config(self, change: Change, old: LoadedConfig) -> Change:
        """Return a run as a new config has it: what has changed for it is due at once."""
        run, events = change
        job, old_job = self.job_of(run), old.config.jobs.get(run.job)
        if job is None:
            return change
        now = self.clock.now()
        if run.phase in {Phase.REJECTED, Phase.INTENT} and run.sending_at is None:
            target, token = self.loaded.config.target(job), self.loaded.secrets[job.keboola_secret]
            if run.input_digest not in {"", input_digest(job, target, token)}:
                return replace(as_intended(run, now), input_digest=""), events
        if job == old_job and self.loaded.access(job) == old.access(old_job):
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
        used = {job.openai_secret for job in config.jobs.values()}
        accounts, self.accounts = self.accounts, {}
        for name in used:
            account = Account(self, config.secrets[name], secrets[name])
            known_account = accounts.pop(name, None)
            if known_account and known_account.identity == account.identity:
                account = known_account
            elif not self.once:
                if task := self._polling.pop(name, None):
                    task.cancel()
                self._polling[name] = self.spawn(account.run())
            self.accounts[name] = account
            jobs = [job for job in config.jobs.values() if job.match and not job.rests]
            account.watch([job for job in jobs if job.openai_secret == name])
        for name in accounts:  # nobody uses them now
            if task := self._polling.pop(name, None):
                task.cancel()
        for name in self.stats.keys() - config.secrets.keys():
            was_refused = self.stats.pop(name).refused_since
            told = [Event.of("account_failing_recovered", secret=name)] if was_refused else []
            self.commit([], told, [("DELETE FROM secrets WHERE name = ?", (name,))])

    # --- what accounts and drivers need ---

    def job_of(self, run: Run) -> Job | None:
        """Return the job that a run belongs to, where the config has it."""
        return self.loaded.config.jobs.get(run.job)

    def is_polled(self, run: Run) -> bool:
        """Return whether a run's batches are polled."""
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
        """Return what is decided by now for a run."""
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

    def tell_unreadable(self, keboola: Keboola) -> None:
        """Tell once of old jobs that cannot be read, and count as another's."""
        unreadable, keboola.unreadable = keboola.unreadable, {}
        if unreadable:
            ids, error = list(unreadable), next(iter(unreadable.values()))
            self.log(Event.of("keboola_job_unreadable", id=", ".join(ids[:20]), error=str(error)))

    def check_in_place(self) -> None:
        """Raise StateError if the state file was deleted or replaced under the process.

        A commit into a deleted file succeeds, and would be forgotten.
        """
        if not (self.store.is_in_place() and self.lock.is_in_place()):
            message = f"the state file {self.store.path} or its lock was deleted or replaced"
            raise StateError(message, "nothing more is sent; start again")

    def record_polls(self, came: Iterable[tuple[int, Mapping[str, Batch | ApiError]]]) -> None:
        """Store what polls have brought, as one. Of what has not changed only times are written."""
        now, changes = self.clock.now(), []
        for run_id, answers in came:
            run = self.runs.get(run_id)
            job = self.job_of(run) if run else None
            if run is None or job is None or not self.is_polled(run):
                continue
            after, events = after_poll(run, job, answers, self.terms(run))
            times: dict[str, Any] = {"next_at": run.next_at, "last_check_at": run.last_check_at}
            if events or replace(after, **times) != run:
                changes.append((after, events))
            else:
                self.runs[run_id] = after
                self._touched.add(run_id)
        try:
            if changes:
                self.commit(changes)
        except StorageError as error:
            for run, _ in changes:
                self.note_failure(error, run.name, run)
                self.runs[run.id] = replace(self.runs[run.id], next_at=now + 5)

    def take_found(self, found: Iterable[tuple[Run, list[Event], list[Batch]]]) -> None:
        """Store runs that new batches begin or join, and batches that came late."""
        changes, also = [], []
        for changed, events, late in found:
            self._next_id += changed.id == 0
            run = changed if changed.id else replace(changed, id=self._next_id)
            also += [batch_statement(run.id, -1, batch) for batch in late]
            changes.append((run, events))
        self.commit(changes, also=also)

    # --- writing and telling ---

    def _with_attention(self, run: Run) -> Change:
        grace_s = self.loaded.config.trigger_grace
        return after_attention(run, self.job_of(run), grace_s, self.clock.now())

    def commit(
        self,
        changes: Iterable[Change],
        events: Iterable[Event] = (),
        also: Iterable[Statement] = (),
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
        fresh = [event for event in told if not self._is_repeated(event, now)]
        stored = self.store.commit(rows, map(self._clean, fresh), now, also)
        self._last_told |= {self._repeat_key(event): now for event in fresh}
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
            if account is mine:
                account.run_ids.add(run.id)
                if run.next_at < account.until:
                    account.wake.set()
            else:
                account.run_ids.discard(run.id)
        is_driven = run.phase not in {Phase.POLLING, Phase.FINISHED, Phase.REFUSED}
        if is_driven and self._tasks is not None and not self.is_stopping:
            self.wakes.setdefault(run.id, asyncio.Event()).set()
            driver = self._drivers.get(run.id)
            if driver is None or driver.done():
                self._drivers[run.id] = self.spawn(drive_run(self, run.id))
        elif run.phase is Phase.FINISHED and job and job.match:
            ended = [
                r
                for r in self.runs.values()
                if r.job == run.job and r.phase is Phase.FINISHED and not r.attention
            ]
            for old in sorted(ended, key=lambda r: r.finished_at or 0.0)[:-5]:
                del self.runs[old.id]  # the state file has it

    def log(self, *events: Event) -> None:
        """Tell events that go with no change of a run; a full disk must not silence the log."""
        try:
            self.commit([], events)
        except StorageError:
            for event in events:
                say(self._clean(event))

    def _is_repeated(self, event: Event, now: float) -> bool:
        """Return whether the same was told within the last minute: something flaps."""
        kinds = ("batch_status", "poll_", "list_", "find_", "follow_", "account_")
        if not event.name.startswith(kinds):
            return False
        return now - self._last_told.get(self._repeat_key(event), -math.inf) < MINUTE_S

    @staticmethod
    def _repeat_key(event: Event) -> tuple[object, ...]:
        return event.name, event.run, event.fields.get("batch_id"), event.fields.get("secret")

    def _clean(self, event: Event) -> Event:
        """Return an event without secrets: the state file keeps it, and others read it."""
        cleaned = self._redactor.tree(dict(event.fields))
        return replace(event, fields=cleaned, text=self._redactor.text(event.text))

    def _clean_run(self, run: Run) -> Run:
        names = ("error", "post_error", "keboola_error", "keboola_status")
        texts: dict[str, Any] = {name: text for name in names if (text := getattr(run, name))}
        clean: dict[str, Any] = {n: self._redactor.text(text) for n, text in texts.items()}
        return replace(run, **clean) if clean != texts else run

    def note_failure(self, error: Exception, where: str, run: Run | None = None) -> None:
        """Tell once of trouble with the state file, until it is over; of a bug with its trace."""
        self.has_failed = True
        if not isinstance(error, StorageError | sqlite3.Error):
            trace = "".join(traceback.format_exception(error)).splitlines()
            name = type(error).__name__
            say(self._clean(Event.of("internal_error", where=where, error=name, traceback=trace)))
        elif (key := (run.id if run else None, str(error))) not in self._trouble:
            self._trouble.add(key)
            say(Event.of("state_write_failed", run, error=str(error)))

    def note_request(self, name: str, error: ApiError | None, _: float | None) -> None:
        """Remember how a request with a secret has fared."""
        entry = self.loaded.config.secrets.get(name)
        if entry is None:
            return
        before = self.stats.get(name) or SecretStats(name, entry.type)
        after = self.stats[name] = before.after(error, self.clock.now())
        self._stats_changed.add(name)
        if bool(after.refused_since) != bool(before.refused_since):
            kind = "account_failing" if after.refused_since else "account_failing_recovered"
            self.log(Event.of(kind, secret=name, error=after.error))

    def note_config(self, error: str | None, *events: Event) -> None:
        """Remember which config the process runs with, and what is wrong with the file, if so."""
        config, told = self.loaded.config, list(events)
        before, self.config_error = self.config_error, error and self._redactor.text(error)
        known, also = self.store.meta("config") or {}, []
        if error is None:
            loaded_at = rfc3339(self.clock.now())
            known = {"path": str(config.path), "sha256": config.sha256, "loaded_at": loaded_at}
            good = {"path": str(config.path.absolute()), "text": self.loaded.text}
            also.append(Store.meta_statement("good_config", good))
            told += [Event.of("config_rejected_recovered")] if before else []
        also.append(Store.meta_statement("config", {**known, "error": self.config_error}))
        self.commit([], told, also)

    def flush(self, *, at_once: bool = False) -> None:
        """Write when runs were polled, and how secrets fared, now and then."""
        now = self.clock.uptime_s()
        if not at_once and now - self._touched_at < max(2.0, len(self._touched) * 0.005):
            return
        statement = "UPDATE runs SET last_check_at = ?, next_at = ? WHERE id = ?"
        runs = [self.runs[i] for i in self._touched if i in self.runs]
        rows: list[Statement] = [
            (statement, (r.last_check_at, r.next_at if math.isfinite(r.next_at) else None, r.id))
            for r in runs
        ]
        names = self._stats_changed & self.stats.keys()
        rows += [SecretStats.statement(self.stats[name]) for name in names]
        if rows:
            self.store.execute(rows)
        self._touched.clear()
        self._stats_changed.clear()
        self._touched_at = now

    # --- what people ask for, and are shown ---

    def take_requests(self, *, at_once: bool = False) -> None:
        """Do what people asked for with `retry` since the last time."""
        version = int(self.store.one("PRAGMA data_version"))
        if version == self._data_version and not at_once:
            return
        for row in self.store.db.execute("SELECT * FROM requests ORDER BY id").fetchall():
            id_, run_id, force, rerun, phase = row
            request = RetryRequest(id_, run_id, bool(force), rerun, Phase(phase))
            done: list[Statement] = [("DELETE FROM requests WHERE id = ?", (id_,))]
            stored = self.store.runs("id = :id", {"id": run_id})
            run = self.runs.get(run_id) or (stored[0] if stored else None)
            came: Change | str = "it is gone"
            if run and run_id in self.posting:
                came = "its Keboola job is being started now"
            elif run:
                came = after_retry(run, self.job_of(run), request, self.clock.now())
            if isinstance(came, str):
                self.commit([], [Event.of("retry_refused", run, why=came)], done)
            else:
                self.runs.setdefault(run_id, came[0])
                self.commit([came], also=done)
        self._data_version = version

    def summary(self) -> str:
        """Return how the runs are, in one line."""
        statuses = [status_of(run, self.job_of(run)) for run in self.shown()]
        counts = [f"{n} {status}" for status, n in sorted(collections.Counter(statuses).items())]
        bad = "; the config file has problems, the previous one still counts"
        return f"{', '.join(counts) or 'no jobs'}{bad if self.config_error else ''}"

    def shown(self) -> list[Run]:
        """Return the runs that people are shown, in the config's order."""
        place = {name: i for i, name in enumerate(self.loaded.config.jobs)}
        runs = [
            run
            for run in self.runs.values()
            if run.job in place and (run.id in self._current or run.group or run.may_be_at_keboola)
        ]
        return sorted(runs, key=lambda r: (place[r.job], r.id not in self._current, r.id))


# --- reloading ------------------------------------------------------------------------------------


def note_loaded(engine: Engine, old: Config | None) -> None:
    """Tell that a config counts now, which jobs it changes, and what could be better about it."""
    config, known = engine.loaded.config, engine.store.meta("config") or {}
    if engine.once and known.get("sha256") == config.sha256 and not known.get("error"):
        return  # from cron, a pass without news says nothing
    facts: dict[str, Any] = {"sha256": config.sha256, "jobs": len(config.jobs)}
    changes = [counted(len(config.jobs), "job")]
    if old:
        before, after = old.jobs, config.jobs
        jobs = {
            "added": [name for name in after if name not in before],
            "removed": [name for name in before if name not in after],
            "changed": [n for n, job in after.items() if n in before and before[n] != job],
        }
        facts |= jobs
        changes = [
            f"{kind} {', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}"
            for kind, names in jobs.items()
            if names
        ]
    events = [Event.of("config_loaded", changes="; ".join(changes) or "no job changed", **facts)]
    warnings = [*engine.loaded.warnings]
    if unreadable := ", ".join(map(quoted, engine.http.rules.unreadable)):
        warnings.append(f"$NO_PROXY has entries that are neither host nor network: {unreadable}")
    events += [Event.of("config_warning", warning=warning) for warning in warnings]
    engine.note_config(None, *events)


def note_rejected(engine: Engine, error: ConfigError) -> None:
    """Tell that the config file has problems, and that another one counts."""
    problems = [str(problem) for problem in error.problems]
    event = Event.of("config_rejected", problem=problems[0], problems=problems)
    engine.note_config("\n".join(problems), event)


class Reloader:
    """Sees that the config, its key file or a secret's file has changed, and has it taken."""

    def __init__(
        self,
        engine: Engine,
        files: Files,
        manager: ServiceManager,
        redactor: Redactor,
        configure: Callable[[Config], None],
    ) -> None:
        self._configure = configure
        self._engine = engine
        self._redactor = redactor
        self._manager = manager
        self._path = engine.loaded.config.path
        self._seen = dict(files.seen)
        self._ripening: dict[Path, bytes] = {}  # rewritten in place: it may be half of a file
        self._ripe_at = math.inf
        self._is_hangup = False
        self._happened = asyncio.Event()

    async def run(self) -> None:
        """Compare the files on every event, every two seconds, and on SIGHUP, and take them."""
        while True:
            self._happened.clear()
            try:
                await self.check()
            except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
                self._engine.note_failure(error, "reload")
            left_s = self._ripe_at - self._engine.clock.uptime_s()
            await wait_for_event(self._happened, min(2.0, max(0.05, left_s)))

    def on_hangup(self) -> None:
        """Reload, whatever the files say."""
        self._is_hangup = True
        self._happened.set()

    async def watch(self) -> None:
        """Set off a comparison on every event in the config's directory.

        The directory is watched, not the file: editors replace it, Kubernetes swaps a link.
        """
        import watchfiles  # it costs the other commands a third of their start

        ours = (self._engine.store.path.name, *PUBLISHED, *(f".{name}" for name in PUBLISHED))
        while True:
            try:
                async for _ in watchfiles.awatch(
                    self._path.parent,
                    watch_filter=lambda _, path: not Path(path).name.startswith(ours),
                    step=100,
                    recursive=False,
                ):
                    self._happened.set()
            except (OSError, RuntimeError) as error:  # the comparison sees what this does not
                self._engine.log(Event.of("watch_failed", error=one_line(str(error))))
            await asyncio.sleep(MINUTE_S)

    async def check(self) -> None:
        """Take the files if they differ from those last tried, good or bad.

        A file that was replaced is whole. One that was rewritten in place counts when it has stayed
        the same for two seconds: half of a config can be valid YAML.
        """
        force, self._is_hangup = self._is_hangup, False
        files = Files()
        await asyncio.to_thread(lambda: [files.read(path) for path in self._seen])
        pairs = {path: (self._seen[path], read) for path, read in files.seen.items()}
        changed = {p: now for p, (was, now) in pairs.items() if now.digest != was.digest}
        in_place = {
            path: read.digest
            for path, read in changed.items()
            if read.inode == self._seen[path].inode and not read.error
        }
        if in_place and in_place != self._ripening and not force:
            self._ripe_at = self._engine.clock.uptime_s() + 2.0
        self._ripening = in_place
        if force or not in_place:
            self._ripe_at = -math.inf
        if not force and (not changed or self._engine.clock.uptime_s() < self._ripe_at):
            self._ripe_at = self._ripe_at if changed else math.inf
            return
        self._ripening, self._ripe_at = {}, math.inf
        self._manager.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await self._take(files)
            self._seen = dict(files.seen)
        finally:  # what could not be stored is tried again at the next comparison
            self._manager.send("READY=1", f"STATUS={self._engine.summary()}")

    async def _take(self, files: Files) -> None:
        """Parse and decrypt all of it; only then, in one step, let it count."""
        engine, old = self._engine, self._engine.loaded.config
        try:
            load = functools.partial(load_config, self._path, files, os.environ, self._redactor)
            loaded = await asyncio.to_thread(load)
            if old.state_path != loaded.config.state_path:
                what = f"the running process has {old.state_path} open"
                cure = "restart it to use another state file"
                raise ConfigError([Problem(str(self._path), 1, 1, "state", what, cure)])
        except ConfigError as error:
            return note_rejected(engine, error)
        engine.apply(loaded)
        self._configure(loaded.config)
        return note_loaded(engine, old)


# --- webhooks -------------------------------------------------------------------------------------


async def send_webhooks(engine: Engine, http: Http, *, once: bool = False) -> None:
    """Have each webhook told of the events that its rules name; a dead one delays no other.

    They read the event log: for each there is the number of the last event that it has had.
    """
    happened, sending = asyncio.Event(), dict[str, asyncio.Task[None]]()
    engine.told.append(happened)
    while True:
        happened.clear()
        for name, _ in engine.loaded.config.notify:
            if name not in sending or sending[name].done():
                sending[name] = asyncio.ensure_future(tell_webhook(engine, http, name))
        if once:
            await asyncio.gather(*sending.values())
            return
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
        if clock.now() < next_at < clock.now() + HOUR_S:
            return
        for event in store.events(after=told_up_to):
            rules = [words for rule, words in engine.loaded.config.notify if rule == name]
            groups = EVENTS[event.name][1].split(",") if event.name in EVENTS else []
            if not any(word in rule for rule in rules for word in (event.name, *groups)):
                continue
            failure = await post_event(engine, http, name, event)
            if failure and (clock.now() - event.at < DAY_S or failures < 5):
                wait_s = backoff_s(failures + 1, 5, clock.jitter(), failure.retry_after_s)
                state = (told_up_to, failures + 1, clock.now() + wait_s, name)
                store.execute([(update, state)])
                if failures == 0:
                    engine.log(Event.of("notify_failed", secret=name, error=str(failure)))
                return
            told_up_to, failures = event.id, 0
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
            failure = answer.error(f"it answered {answer.status}", retryable=True)
    except ApiError as error:
        failure = error
    engine.note_request(name, failure, None)
    return failure


# --- the process ----------------------------------------------------------------------------------

PUBLISHED: Final = ("status.html", "status.json", "metrics.prom")


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for an end now."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # of log rotation: nothing is to be done

    def _on_signal(self) -> None:
        (self.now if self.stop.is_set() else self.stop).set()


async def keep_alive(engine: Engine, manager: ServiceManager) -> None:
    """Tell the service manager that the loop runs, and how the runs are."""
    watchdog = ["WATCHDOG=1"] if manager.watchdog_s else []
    manager.send("READY=1")
    while True:
        manager.send(*watchdog, f"STATUS={engine.summary()}")
        await asyncio.sleep(min(10.0, (manager.watchdog_s or 60.0) / 3))


async def run_engine(
    engine: Engine,
    signals: Signals,
    helpers: Sequence[Callable[[], Awaitable[None]]],
    manager: ServiceManager,
) -> int:
    """Let the engine work until it is done or a signal ends it; returns the exit code."""
    running = asyncio.ensure_future(engine.run(helpers))
    stopped = asyncio.ensure_future(signals.stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    is_interrupted = not running.done()
    if is_interrupted:
        manager.send("STOPPING=1")
        await engine.drain(signals.now)
        running.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    with contextlib.suppress(StorageError):
        engine.flush(at_once=True)
    return 130 if signals.now.is_set() or (is_interrupted and engine.once) else 0


# ==================================================================================================
# 8. Showing: one snapshot, and its renderers
# ==================================================================================================


def run_view(run: Run, job: Job | None, grace_s: float, now: float) -> dict[str, Any]:
    """Return a run as `status --json` shows it."""
    status = status_of(run, job)
    is_over = status in {"completed", "completed_with_failures"}
    error = None if is_over else run.error
    is_due = not is_over and status != "paused" and run.phase is not Phase.REFUSED
    trigger = {
        "id": run.trigger_id,
        "state": "sent" if run.phase is Phase.FINISHED else str(run.phase),
        "keboola_job_id": run.keboola_job_id,
        "keboola_status": run.keboola_status,
        "keboola_error": run.keboola_error,
        "url": run.url,
        "sent_at": rfc3339(run.sent_at),
        "finished_at": rfc3339(run.finished_at),
        "error": error,
    }
    return {
        "name": run.name,
        "job": run.job,
        "group": run.group or None,
        "status": status,
        "attention": bool(attention_of(run, job, grace_s, now)),
        "error": error,
        "error_since": rfc3339(run.error_since) if error else None,
        "batch_count": len(run.batches),
        "completed_count": sum(batch.status == "completed" for batch in run.batches),
        "failed_count": sum(batch.has_failed for batch in run.batches),
        "batches": [batch_view(batch) for batch in run.batches],
        "last_check_at": rfc3339(run.last_check_at),
        "next_check_at": rfc3339(run.next_at) if is_due else None,
        "completed_at": rfc3339(run.finished_at),
        "trigger": None if run.phase in {Phase.POLLING, Phase.REFUSED} else trigger,
    }


def batch_view(batch: Batch) -> dict[str, Any]:
    counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    return {
        "id": batch.id,
        "status": batch.status,
        "request_counts": counts if batch.total is not None else None,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": rfc3339(batch.created_at),
        "expires_at": rfc3339(batch.expires_at),
        "completed_at": rfc3339(batch.ended_at),
    }


def snapshot(  # noqa: PLR0913 - all that is known
    config: Config,
    runs: Iterable[Run],
    stats: Iterable[SecretStats],
    daemon: Mapping[str, Any],
    loaded: Mapping[str, Any],
    *,
    now: float,
) -> dict[str, Any]:
    """Return what is known at one moment: the document of `status --json`.

    `daemon` is what `lock_owner` says, `loaded` what the state file has of the config that counts.
    """
    views = [run_view(r, config.jobs.get(r.job), config.trigger_grace, now) for r in runs]
    of_config = {
        "path": str(config.path),
        "sha256": config.sha256,
        "loaded_at": None,
        "error": None,
    }
    of_config |= loaded
    refused = sum(secret.refused_since is not None for secret in stats)
    return {
        "version": __version__,
        "generated_at": rfc3339(now),
        "daemon": {
            key: daemon.get(key) for key in ("running", "pid", "started_at", "last_loop_at")
        },
        "config": of_config,
        "attention": sum(v["attention"] for v in views) + refused + bool(of_config["error"]),
        "jobs": views,
    }


# --- in words -------------------------------------------------------------------------------------

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


def in_parts(shot: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of a snapshot: attention first, finished last, of these the newest first."""
    parts: dict[str, list[Mapping[str, Any]]] = {part: [] for part in PART_OF_STATUS.values()}
    for view in sorted(shot["jobs"], key=lambda view: view["completed_at"] or "", reverse=True):
        parts[PART_OF_STATUS["failed" if view["attention"] else view["status"]]].append(view)
    return parts


def counts_in_words(shot: Mapping[str, Any]) -> str:
    """Return how many runs have which status, in one line."""
    counts = collections.Counter(view["status"] for view in shot["jobs"])
    words = [f"{counts[s]} {s.replace('_', ' ')}" for s in PART_OF_STATUS if counts[s]]
    return ", ".join(words) or "no jobs"


def general_troubles(shot: Mapping[str, Any], stats: Iterable[SecretStats]) -> list[str]:
    """Return what needs attention and is no run: the config file, and secrets that are refused."""
    error = shot["config"]["error"]
    what = "The config file has problems; the previous one still counts"
    texts = [f"{what}:\n{error}"] if error else []
    refused = [secret for secret in stats if secret.refused_since is not None]
    return texts + [f"The secret {secret.name} is refused: {secret.error}" for secret in refused]


def unix_of(text: str | None) -> float | None:
    """Return a time of a snapshot as Unix seconds."""
    return datetime.fromisoformat(text).timestamp() if text else None


def ago(text: str | None, shot: Mapping[str, Any]) -> str:
    """Return how long before a snapshot something was; what is recorded in the future is now."""
    at, now = unix_of(text), unix_of(shot["generated_at"]) or 0.0
    if at is None:
        return "never"
    return f"{show_duration(now - at)} ago" if now - at >= 1 else "just now"


def what_next(view: Mapping[str, Any], shot: Mapping[str, Any]) -> str:
    """Return what happens next to a run, and when; or what has come of it."""
    status, trigger = view["status"], view["trigger"] or {}
    due, now = unix_of(view["next_check_at"]), unix_of(shot["generated_at"]) or 0.0
    when = f"in {show_duration(due - now)}" if due and due - now >= 1 else "now"
    ended = trigger.get("keboola_status") or "started"
    keboola_job = f"Keboola job {trigger.get('keboola_job_id')}"
    again = f"tries again {when}" if due else "waits for a change of its config"
    idle = "waits for more batches" if view["group"] else "polls once something runs"
    words = {
        "active": f"polls {when}" if due else idle,
        "paused": "nothing while it is paused",
        "intent": f"searches Keboola {when}, then starts",
        "sending": "waits for Keboola's answer",
        "unknown": f"searches Keboola again {when}",
        "running": f"{keboola_job} is {ended}; polls {when}",
        "failed": "`retry --force` starts it all the same",  # its policy refused it
        "rejected": f"{again}, or `retry`",
        "sent": "`retry` starts it again",
    }
    if not status.startswith("completed"):
        is_by_trigger = trigger and status in {"triggering", "failed"}
        return words[trigger["state"] if is_by_trigger else status]
    failed = sum((batch["request_counts"] or {}).get("failed") or 0 for batch in view["batches"])
    lost = f", {counted(failed, 'request')} failed" if failed else ""
    if not trigger.get("keboola_job_id"):
        return "done elsewhere"
    return f"{keboola_job}: {ended}, {ago(view['completed_at'], shot)}{lost}"


def progress_of(view: Mapping[str, Any]) -> tuple[str, int]:
    """Return how many batches of a run are finished, and how much of its requests, in percent.

    Each batch counts the same, and as a whole once it is finished.
    """
    shares = []
    for batch in view["batches"]:
        counts = batch["request_counts"] or {}
        done = (counts.get("completed") or 0) + (counts.get("failed") or 0)
        share = done / counts["total"] if counts.get("total") else 0.0
        shares.append(1.0 if STATUS_RANK.get(batch["status"]) == 3 else min(1.0, share))
    percent = math.floor(100 * sum(shares) / max(1, len(shares)))
    return f"{view['completed_count'] + view['failed_count']}/{view['batch_count']}", percent


# --- as metrics -----------------------------------------------------------------------------------

Sample = tuple[Mapping[str, str], float | None]  # its labels, and its value where it is known


def waiting_since(view: Mapping[str, Any]) -> float | None:
    """Return since when a run waits: for its oldest batch, its start, or its Keboola job's end."""
    batches, trigger = view["batches"], view["trigger"] or {}
    times = {
        "active": [b["created_at"] for b in batches if STATUS_RANK.get(b["status"]) != 3],
        "triggering": [max((b["completed_at"] or "" for b in batches), default=None)],
        "running": [trigger.get("sent_at")],
    }
    return unix_of(min(filter(None, times[view["status"]]), default=None))


def metrics(shot: Mapping[str, Any], stats: Sequence[SecretStats], ended: Mapping[str, int]) -> str:
    """Return a snapshot in Prometheus' text format (version 0.0.4), for its textfile collector.

    `ended` is how many Keboola jobs of all times had which end. What is not known is left out.
    """
    views, config, now = shot["jobs"], shot["config"], unix_of(shot["generated_at"]) or 0.0
    jobs = collections.Counter(view["status"] for view in views)
    batches = collections.Counter(dict.fromkeys((*STATUS_RANK, "not_polled"), 0))
    batches.update(b["status"] or "not_polled" for view in views for b in view["batches"])

    def by_status(counts: Mapping[str, int]) -> list[Sample]:
        return [({"status": status}, count) for status, count in counts.items()]

    def by_run(status: str) -> list[Sample]:
        waits = [(v["name"], waiting_since(v)) for v in views if v["status"] == status]
        return [({"run": name}, at and max(0.0, now - at)) for name, at in waits]

    def by_secret(field_: str) -> list[Sample]:
        return [({"account": s.name, "service": s.type}, getattr(s, field_)) for s in stats]

    refused = [(labels, since is not None) for labels, since in by_secret("refused_since")]
    succeeded, loaded = by_secret("last_success_at"), unix_of(config["loaded_at"])
    is_good = not config["error"]
    families: list[tuple[str, str, Sequence[Sample]]] = [
        ("info", "The program's version.", [({"version": shot["version"]}, 1)]),
        ("generated_timestamp_seconds", "When this file was made.", [({}, now)]),
        ("daemon_running", "Whether the daemon ran then.", [({}, shot["daemon"]["running"])]),
        ("attention", "Runs, keys and configs that need a person.", [({}, shot["attention"])]),
        ("jobs", "Runs by status.", by_status({s: jobs[s] for s in PART_OF_STATUS})),
        ("batches", "Batches of these runs by status.", by_status(batches)),
        ("run_oldest_batch_age_seconds", "Age of its oldest unfinished batch.", by_run("active")),
        ("run_triggering_seconds", "How long a start has been due.", by_run("triggering")),
        ("run_running_seconds", "How long its Keboola job has been running.", by_run("running")),
        ("keboola_jobs", "Keboola jobs by how they ended.", by_status(ended)),
        ("requests_total", "Requests made with a secret.", by_secret("requests")),
        ("request_errors_total", "Those of them that failed.", by_secret("errors")),
        ("last_success_timestamp_seconds", "When one of them last succeeded.", succeeded),
        ("account_refused", "Whether the server refuses the secret (401).", refused),
        ("config_last_reload_successful", "Whether the config file is good.", [({}, is_good)]),
        ("config_last_reload_success_timestamp_seconds", "When it was loaded.", [({}, loaded)]),
    ]
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    lines = []
    for name, text, samples in families:
        known = [(labels, value) for labels, value in samples if value is not None]
        kind = "counter" if name.endswith("_total") else "gauge"
        if known:
            lines += [f"# HELP teckochecker_{name} {text}", f"# TYPE teckochecker_{name} {kind}"]
        for labels, value in known:
            pairs = ",".join(f'{key}="{label.translate(escapes)}"' for key, label in labels.items())
            lines.append(f"teckochecker_{name}{f'{{{pairs}}}' if pairs else ''} {value:.15g}")
    return "".join(f"{line}\n" for line in lines)


# --- as a page ------------------------------------------------------------------------------------

PAGE_STYLE: Final = """
:root { color-scheme: light dark; --dim: light-dark(#555d66, #a6adb7);
  --line: light-dark(#d5d9de, #3a3f46); --link: light-dark(#0b57c2, #8ab8ff);
  --good: light-dark(#17713a, #62d68d); --bad: light-dark(#b3261e, #ff8f86);
  --wait: light-dark(#8a5a00, #f2bd5c); }
body { margin: 0 auto; max-width: 70rem; padding: .75rem; font: 1rem/1.35 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1, h2 { font-size: 1.2rem; margin: .75rem 0 .25rem; }
p, ul, pre { margin: .25rem 0; white-space: pre-wrap; }
a, .active, .running { color: var(--link); }
.dim { color: var(--dim); }
.alarm { background: #a3170f; border-radius: .5rem; color: #fff; padding: .75rem; }
body:not(.old) .stale { display: none; }
.error, .failed { color: var(--bad); }
.completed { color: var(--good); }
.paused, .triggering, .completed_with_failures { color: var(--wait); }
.run { border-top: 1px solid var(--line); padding: .25rem 0; }
.run summary { display: grid; grid-template-columns: 4fr 4fr 5rem 6fr; gap: 0 .75rem; }
summary { cursor: pointer; }
.run summary > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.run[open] summary > * { white-space: normal; }
.run summary > .error { grid-column: 1 / -1; }
progress { width: 100%; accent-color: var(--link); }
@media (max-width: 45rem) { .run summary { grid-template-columns: 2fr 3fr; } }
"""

PAGE_SCRIPT: Final = """
const { made, alive } = document.body.dataset;
const age_s = () => Math.max(0, Math.round(Date.now() / 1000 - made));
function tell() {
  const s = age_s(), words = s < 90 ? s + " s" : s < 5400 ? Math.round(s / 60) + " min" :
    Math.round(s / 3600) + " h";
  document.getElementById("age").textContent = "(" + words + " ago)";
  document.body.classList.toggle("old", alive === "1" && s > 180);
}
tell();
setInterval(tell, 1000);
setInterval(() => {
  if (age_s() > 120 || !document.querySelector("details[open]")) location.reload();
}, 30000);
"""

PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{attention} - TeckoChecker</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<body data-made="{made:.0f}" data-alive="{alive:d}">
<h1>TeckoChecker</h1>
<p>{attention}. {counts}</p>
<p class=dim>Made at {at} <span id=age></span></p>
<main>
{main}</main>
<script>{script}</script>
</html>
"""


def page_row(view: Mapping[str, Any], shot: Mapping[str, Any]) -> str:
    """Return one run of the page: a line, and its details folded."""
    trigger, (finished, percent) = view["trigger"] or {}, progress_of(view)
    status, error, esc = view["status"], view["error"], html.escape
    facts = []
    if trigger.get("url"):
        link = f'<a href="{esc(trigger["url"])}" rel=noreferrer>'
        facts.append(f"{link}Keboola job {esc(trigger['keboola_job_id'])}</a>")
    for what, at in (("Last poll", view["last_check_at"]), ("Ended", view["completed_at"])):
        facts += [f"{what} {at} ({ago(at, shot)})"] if at else []
    facts += [f"Next step {view['next_check_at']}"] if view["next_check_at"] else []
    others = [b for b in view["batches"] if b["status"] != "completed"]
    facts += [esc(f"{b['id']} {b['status'] or 'not polled'}") for b in others[:10]]
    facts += [f"and {len(others) - 10:,} more"] if len(others) > 10 else []
    return (
        f"<details class=run><summary><strong>{esc(view['name'])}</strong>"
        f"<span class={status}>{status.replace('_', ' ')} {finished}</span>"
        f'<progress max=100 value={percent} title="{percent}% of the requests"></progress>'
        f"<span class=dim>{esc(what_next(view, shot))}</span>"
        f"{f'<span class=error>{esc(error)}</span>' if error else ''}</summary>"
        f"{'<br>'.join(facts)}</details>\n"
    )


def page(
    shot: Mapping[str, Any], stats: Iterable[SecretStats], events: Iterable[Event], *, once: bool
) -> str:
    """Return a snapshot as a page: what needs attention first; the rest folded where it is long.

    `once`: a pass of --once has made it, and no daemon is missed.
    """
    at, is_alive, needs = shot["generated_at"], shot["daemon"]["running"], shot["attention"]
    alarms = [("stale", f"This page was made at {at}, and no other one since: the daemon is dead.")]
    if not is_alive and not once:
        alarms.append(("", f"The daemon was stopped at {at}: nothing is polled or started."))
    alarms += [("", text) for text in general_troubles(shot, stats)]
    esc = html.escape
    main = [f'<p class="alarm {kind}" role=alert>{esc(text)}</p>\n' for kind, text in alarms]
    room = 15  # rows that stand unfolded
    for part, views in in_parts(shot).items():
        rows = [page_row(view, shot) for view in views]
        shown, rest = rows[: max(4, room)], rows[max(4, room) :]
        room -= len(shown)
        main += [f"<h2>{part} ({len(rows):,})</h2>\n", *shown] if rows else []
        more = f"<details><summary>{len(rest):,} more</summary>{''.join(rest)}</details>\n"
        main.append(more if rest else "")
    lines = "".join(f"<li>{rfc3339(event.at)} {esc(event.text)}\n" for event in events)
    main.append(f"<h2>Log</h2>\n<details><summary>newest first</summary><ul>{lines}</ul></details>")
    return PAGE.format(
        digest=base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode(),
        attention=f"{needs} need attention" if needs else "Nothing needs attention",
        style=PAGE_STYLE,
        script=PAGE_SCRIPT,
        made=unix_of(at) or 0.0,
        alive=is_alive,
        counts=counts_in_words(shot),
        at=at,
        main="".join(main),
    )


# --- as files -------------------------------------------------------------------------------------


def put_file(path: Path, text: str) -> None:
    """Write a file that everyone may read, as a whole or not at all. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with new.open("x", encoding="utf-8", errors="replace") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # a full disk is not to stay full for its sake


async def publish(engine: Engine, *, is_running: bool, trouble: str = "") -> str:
    """Write page, document and metrics, if the config has a place for them.

    Returns what is in the way, or ""; it is told where it differs from `trouble`, that of before.
    """
    config, path, stats = engine.loaded.config, engine.store.path, list(engine.stats.values())
    daemon = lock_owner(path) if is_running else {"running": False}
    loaded, now = engine.store.meta("config") or {}, engine.clock.now()
    known = (config, engine.shown(), stats, daemon, loaded)

    def write(directory: Path) -> None:
        shot = snapshot(*known, now=now)
        with Store.reading(path) as store:
            events = store.events(most=50)[::-1] if store else []
            query = "SELECT keboola_status, count(*) FROM runs WHERE phase = 'finished' GROUP BY 1"
            ended = dict(store.db.execute(query).fetchall()) if store else {}
        ended.pop(None, None)  # started before its status was known
        directory.mkdir(exist_ok=True)
        put_file(directory / "status.json", f"{json.dumps(shot)}\n")
        put_file(directory / "metrics.prom", metrics(shot, stats, ended))
        put_file(directory / "status.html", page(shot, stats, events, once=engine.once))

    before, trouble = trouble, ""
    if config.publish_path:
        try:
            await asyncio.to_thread(write, config.publish_path)
        except Exception as error:  # noqa: BLE001 - nothing here may end what starts jobs
            trouble = one_line(f"{type(error).__name__}: {error}")
    if trouble != before:
        name = "publish_failed" if trouble else "publish_recovered"
        engine.log(Event.of(name, directory=str(config.publish_path), error=trouble))
    return trouble


async def keep_published(engine: Engine) -> None:
    """Publish whenever something has changed, and at least once a minute."""
    happened, trouble = asyncio.Event(), ""
    engine.told.append(happened)
    while True:
        happened.clear()
        started = time.monotonic()
        trouble = await publish(engine, is_running=True, trouble=trouble)
        rest_s = min(50.0, max(1.0, 30 * (time.monotonic() - started)))  # to cost little CPU
        await asyncio.sleep(rest_s)
        await wait_for_event(happened, 50.0 - rest_s)


# ==================================================================================================
# 9. Commands: what a person types. Only these print
# ==================================================================================================


def config_path(args: argparse.Namespace) -> Path:
    """Return the config that a command is about."""
    given_path = getattr(args, "config", None)
    return Path(given_path or os.environ.get("TECKOCHECKER_CONFIG") or "config.yaml")


# --- the daemon and --once ------------------------------------------------------------------------


async def at_most(seconds: float, work: Awaitable[object], hurry: asyncio.Event) -> None:
    """Do something for so long at most, or until an event is set."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hurry.wait())]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def load_at_start(
    path: Path, files: Files, redactor: Redactor, *, once: bool
) -> tuple[LoadedConfig, ConfigError | None]:
    """Return the config to run with, and what is wrong with the file, if it is not that one.

    A daemon whose file was broken by the last edit goes on with the last good one of that path, as
    the state file has it. Raises ConfigError where there is none.
    """
    try:
        return load_config(path, files, os.environ, redactor), None
    except ConfigError as error:
        good = None
        state_path = read_config_file(path, files)[0].state_path
        with contextlib.suppress(TeckoError), Store.reading(state_path) as store:
            good = store and store.meta("good_config")
        if once or not good or good["path"] != str(path.absolute()):
            raise
        return load_config(path, files, os.environ, redactor, good["text"]), error


async def serve(path: Path, *, once: bool) -> int:
    """Be the daemon or, with `once`, one pass of it; returns the exit code.

    Raises ConfigError, LockedError and StateError before anything was asked of a server.
    """
    loop, redactor, files, writer = asyncio.get_running_loop(), Redactor(), Files(), LogWriter()
    loop.set_default_executor(DaemonThreads())
    loaded, rejected = load_at_start(path, files, redactor, once=once)
    config, clock, manager = loaded.config, Clock(), ServiceManager(os.environ)
    configure = functools.partial(configure_logging, redactor=redactor, writer=writer)
    configure(config)
    lock = StateLock(config.state_path, "--once" if once else "daemon", clock.now())
    store = Store.open(config.state_path)
    http = Http(config, redactor)
    webhooks = Http(replace(config, max_concurrency=10, request_timeout=10), redactor)
    engine, signals = Engine(loaded, store, lock, http, clock, redactor, once=once), Signals()
    helpers: list[Callable[[], Awaitable[None]]] = []
    if not once:
        reloader = Reloader(engine, files, manager, redactor, configure)
        loop.add_signal_handler(signal.SIGHUP, reloader.on_hangup)
        alive = functools.partial(keep_alive, engine, manager)
        tell = functools.partial(send_webhooks, engine, webhooks)
        show = functools.partial(keep_published, engine)
        helpers = [alive, reloader.run, reloader.watch, show, tell]
    try:
        note_start(engine, rejected)
        code = await run_engine(engine, signals, helpers, manager)
        if once and code == 0:
            code = end_of_pass(engine)
            telling = send_webhooks(engine, webhooks, once=True)
            await at_most(PATIENCE_S, telling, signals.stop)
            code = 130 if signals.stop.is_set() else code
        elif not once:
            engine.log(Event.of("daemon_stopped"))
        await at_most(PATIENCE_S, publish(engine, is_running=False), signals.now)
    finally:
        await http.close()
        await webhooks.close()
        store.close()
        lock.close()
        writer.close()
    return code


def note_start(engine: Engine, rejected: ConfigError | None) -> None:
    """Tell what runs, and with which config."""
    config = engine.loaded.config
    if not engine.once:
        batches = counted(sum(len(job.batch_ids) for job in config.jobs.values()), "batch")
        facts = {"jobs": counted(len(config.jobs), "job"), "batches": batches}
        facts |= {"version": __version__, "pid": str(os.getpid()), "config": str(config.path)}
        engine.log(Event.of("daemon_started", None, **facts))
    if rejected is None:
        return note_loaded(engine, None)
    problems = str(rejected).splitlines()
    event = Event.of("config_rejected", problem=problems[0], problems=problems)
    return engine.note_config("\n".join(problems), event)


def end_of_pass(engine: Engine) -> int:
    """Tell what needs attention, when that is new and then once a day; returns the exit code."""
    engine.sweep()
    needs = {r.name: r.error or r.attention for r in engine.shown() if r.attention}
    needs |= {name: use.error or "" for name, use in engine.stats.items() if use.refused_since}
    names, now = list(needs), engine.clock.now()
    told = engine.store.meta("attention_told") or {}
    if needs and (told.get("names") != names or not 0 <= now - told["at"] < DAY_S):
        runs = "; ".join(f"{name} ({why})" for name, why in needs.items())
        event = Event.of("jobs_need_attention", count=len(names), runs=runs, names=names)
        remember = Store.meta_statement("attention_told", {"names": names, "at": now})
        engine.commit([], [event], [remember])
    return 1 if needs or engine.has_failed else 0


def run_daemon(args: argparse.Namespace) -> int:
    """Start a Keboola job, once, when OpenAI has finished a team's batches.

    Without a command: run as the daemon, in the foreground, until SIGTERM; the config is read again
    whenever it changes, and on SIGHUP.
    """
    return asyncio.run(serve(config_path(args), once=args.once))


# --- what commands share --------------------------------------------------------------------------

RED: Final = "\033[31m"
GREEN: Final = "\033[32m"
DIM: Final = "\033[2m"


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
    return f"{colour}{text}\033[0m" if colour and text and is_wanted else text


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[text.ljust(n) for text, n in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


# --- check, init ----------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """Validate the config offline, just as the start does.

    YAML, every key, the Fernet key and every secret. Each problem is one line with its place and
    its cure. No server is asked.
    """
    path = config_path(args)
    loaded = load_config(path, Files(), os.environ, Redactor())
    for warning in loaded.warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    jobs = loaded.config.jobs.values()
    batches = counted(sum(len(job.batch_ids) for job in jobs), "batch")
    counts = f"{counted(len(jobs), 'job')}, {batches}, {counted(len(loaded.secrets), 'secret')}"
    print(f"{path}: fine: {counts}")
    return 0


EXAMPLE_CONFIG: Final = """\
# A first config for TeckoChecker: replace what is in CAPITALS, then `teckochecker encrypt`, then
# `teckochecker check`. What is commented out is optional, and shows its default unless it says
# "e.g.". Durations: 30s, 2m, 1h30m, 7d.

# state: teckochecker.db             # SQLite file; relative paths are relative to this file
# key_file: teckochecker.key         # Fernet key, mode 0600: opens what `encrypt` has encrypted
# publish: www                       # e.g.; a directory for status.html, status.json, metrics.prom
# log:
#   level: info                      # debug | info | warning | error
#   format: auto                     # auto (console on a terminal, else json) | console | json
#   retention: 30d                   # how long events are kept: 1h to 3650d
# limits:
#   max_concurrency: 10              # requests at a time, to all servers together: 1 to 100
#   request_timeout: 30s             # for a request as a whole: 1s to 60s
#   trigger_grace: 60s               # how long Keboola's search may miss a new job: 30s to 24h
#   follow_interval: 30s             # the least time between two polls of a Keboola job: 5s to 1h

secrets:                             # each has one of value, env (a variable), file (a path)
  openai-prod:
    type: openai
    value: YOUR-OPENAI-KEY           # in plain only until `teckochecker encrypt`
    # base_url: https://api.openai.com/v1   # any OpenAI-compatible batch endpoint
    # organization: org-abc          # e.g.; header OpenAI-Organization
    # project: proj_abc              # e.g.; header OpenAI-Project
    # auth_header: Authorization     # Authorization | api-key (Azure)
    # api_version: 2025-04-01-preview   # e.g., for Azure; sent as ?api-version=
  keboola-prod:
    type: keboola
    value: YOUR-KEBOOLA-TOKEN
    stack_url: https://connection.keboola.com   # the address in your browser, up to the first /
  # alerts:                          # e.g.; a webhook, for `notify`
  #   type: webhook
  #   value: https://hooks.slack.com/services/T0/B0/XYZ   # the address is a secret: encrypt it

# notify:                            # e.g.; events: the groups attention (default) and finished,
#   - {secret: alerts, events: [attention, finished]}   # or names from `teckochecker logs --help`

defaults:                            # any key of a job; the job's own value wins
  openai_secret: openai-prod
  keboola_secret: keboola-prod
  component_id: kds-team.app-custom-python   # keboola.orchestrator or keboola.flow starts a Flow
  # poll_interval: 30s               # 1s to 24h

jobs:
  my-first-job:                      # any name without a /
    batch_ids: [batch_YOUR_ID]       # 1 to 10; all of them finished start the Keboola job, once
    config_id: "123456"              # the Keboola configuration to start
    # branch_id: "789"               # e.g.; a development branch
    # config_row_ids: ["1", "2"]     # e.g.; only these rows of the configuration
    # mode: run                      # run | forceRun | debug
    # variables: {dataset: products}   # e.g.; more variables for the Keboola job, as text
    # trigger_on: all_terminal       # all_terminal | all_completed | any_output; else it has failed
    # deadline: 26h                  # e.g.; after the creation of the oldest batch
    # on_deadline: alert             # with deadline: alert | start (with what is finished)
    # follow: true                   # follow the Keboola job to its end
    # retry_on_error: 0              # start again after a Keboola job's error: 0 to 5 times
    # paused: false                  # true: nothing is polled or started
    # done: false                    # true: it was started elsewhere, and nothing is to be done
  # found-by-metadata:               # e.g.; batches are found by their metadata, as they come
  #   match: {pipeline: nightly}     # every pair must be equal; instead of batch_ids
  #   since: 2026-11-25              # with match: the earliest creation: a date (UTC) or RFC 3339
  #   group_by: run_date             # batches with the same value are one run; without it each is
  #   settle: 15m                    # with group_by: whole when no new batch has come for so long
  #   # group_size: 5                # or instead: when so many came; a number, or metadata.KEY
  #   config_id: "123457"
"""


def run_init(args: argparse.Namespace) -> int:
    """Write a commented config.yaml and a new key file.

    Both only for your eyes (mode 0600). What is there already is never overwritten.
    """
    directory, made = Path(args.directory), []
    config, key = directory / "config.yaml", directory / "teckochecker.key"
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in ((config, EXAMPLE_CONFIG), (key, f"{Fernet.generate_key().decode()}\n")):
        with contextlib.suppress(FileExistsError):
            opener = functools.partial(os.open, mode=0o600)
            with open(path, "x", encoding="utf-8", opener=opener) as file:
                made.append(path)
                file.write(text)
    if not made:
        raise UsageError(f"{config} and {key} are there already", "nothing is overwritten")
    command = f"teckochecker --config {shlex.quote(str(config))}"
    print(f"wrote {' and '.join(map(str, made))}, which only you can read. Next:")
    print(f"  1. edit {config}: stack, batch ids, config_id, and the tokens, in plain for now")
    print(f"  2. {command} encrypt")
    print(f"  3. {command} doctor, then without a command: the daemon")
    return 0


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


# --- doctor ---------------------------------------------------------------------------------------

DOCTOR_PATIENCE_S: Final = 45  # for all requests with one secret; the secrets go side by side
OWNER_CURE: Final = "run this as the daemon's user, or chown it to that user"

Verdict = tuple[str, str, str]  # ✓ (right), ! (could be better) or ✗ (wrong); what; the cure


class Doctor:
    """Tries everything that has to be right, and prints a line about each."""

    def __init__(self, config: Config, secrets: Mapping[str, Secret], redactor: Redactor) -> None:
        self.config = config
        self.counts: collections.Counter[str] = collections.Counter()  # of verdicts, by mark
        self._secrets = secrets
        self._redactor = redactor
        # The batches that are polled, by job. What `done` or a finished run is about may be gone.
        self._polled = {name: [*job.batch_ids] for name, job in config.jobs.items() if not job.done}

    def tell(self, found: Iterable[Verdict]) -> None:
        """Print verdicts, and count them."""
        words = {} if can_show("✓✗") else {"✓": "ok", "✗": "WRONG"}
        for mark, what, cure in found:
            self.counts[mark] += 1
            shown = painted(words.get(mark, mark), {"✓": GREEN, "✗": RED}.get(mark, ""))
            text = self._redactor.text(f"{what}; {cure}" if cure else what)
            print(shown, one_line(text, 1000), flush=True)

    def check_files(self) -> Iterator[Verdict]:
        """Check directories, the state file and what lies beside it, and who runs."""
        state, publish = self.config.state_path, self.config.publish_path
        yield self._check_directory(state.parent, "the state file")
        if publish:
            place = publish if os.path.lexists(publish) else publish.parent
            yield self._check_directory(place, "published files")
        try:
            with Store.reading(state) as store:
                if store:
                    check_undamaged(store.db, state)
                    self._leave_out_finished(store)
            there = "is whole" if store else "is not there yet: the first start makes it"
            yield "✓", f"the state file {state} {there}", ""
            yield from self._check_owners(state)
        except TeckoError as error:
            yield "✗", str(error), ""
        owner = lock_owner(state)
        kind = "the daemon" if owner["running"] else "a pass of --once" if owner["once"] else ""
        if kind or not owner["pid"]:
            yield "✓", f"{kind} runs, pid {owner['pid']}" if kind else "nothing runs now", ""
            return
        what = f"pid {owner['pid']} was killed, or hangs, since {owner['last_loop_at']}"
        yield "!", what, "see its log, and start it again"

    @staticmethod
    def _check_directory(directory: Path, what: str) -> Verdict:
        """Check that files can be made in a directory, and that its disk has room."""
        text = f"{directory}, for {what},"
        try:
            free_mib = shutil.disk_usage(directory).free >> 20
        except OSError as error:
            return "✗", f"{text} cannot be used: {error.strerror}", "create it, as the unit does"
        if not os.access(directory, os.W_OK | os.X_OK):
            return "✗", f"{text} cannot be written by this user", OWNER_CURE
        if free_mib < 100:
            return "✗", f"{text} has only {free_mib} MiB left", "make room on that disk"
        return "✓", f"{text} has {free_mib:,} MiB left", ""

    @staticmethod
    def _check_owners(state: Path) -> Iterator[Verdict]:
        """Check that the files belong to the directory's owner, and can be written.

        In a directory of root's the daemon may be anybody: then the lock file tells who it is.
        """
        lock, *beside = (state.with_name(state.name + end) for end in (".lock", "-wal", "-shm"))
        paths = [path for path in (state, lock, *beside) if path.exists()]
        model = lock if lock in paths and state.parent.stat().st_uid == 0 else state.parent
        for path in paths:
            user = model.stat()
            if path.stat().st_uid != user.st_uid:
                what = f"{path} belongs to {owner_of(path)}, but {model} to {owner_of(model)}"
                yield "✗", what, f"run: chown {user.st_uid}:{user.st_gid} {shlex.quote(str(path))}"
            elif not os.access(path, os.R_OK | os.W_OK):
                yield "✗", f"{path} cannot be written by this user", OWNER_CURE

    def _leave_out_finished(self, store: Store) -> None:
        """Leave out the jobs and batches that are finished, and add the batches of groups."""
        jobs = self.config.jobs
        targets = {name: self.config.target(job) for name, job in jobs.items()}
        runs = store.runs_for(jobs, recent=False)
        for name, run in assign(jobs, targets, [r for r in runs if not r.group]).items():
            if run.phase is Phase.FINISHED:
                self._polled.pop(name, None)
            elif name in self._polled:
                self._polled[name] = [batch.id for batch in run.batches if not batch.is_final]
        for run in runs:
            if run.group and run.phase is Phase.POLLING and run.job in self._polled:
                self._polled[run.job] += [b.id for b in run.batches if not b.is_final]

    # --- the servers ---

    async def check_servers(self) -> None:
        """Ask OpenAI and Keboola with every secret about all that the jobs need of them."""
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        timeout_s = min(8, self.config.request_timeout)
        http = Http(replace(self.config, request_timeout=timeout_s), self._redactor)
        for entry in http.rules.unreadable:
            what = f"$NO_PROXY has {quoted(entry)}, which is neither host nor network"
            self.tell([("!", what, "it is ignored: correct or remove it")])
        names = [*self.config.of_type("openai"), *self.config.of_type("keboola")]
        opened = [name for name in names if name in self._secrets]
        tasks = [asyncio.create_task(self._check_secret(name, http)) for name in opened]
        try:
            for task in tasks:
                self.tell(await task)
        finally:
            await http.close()

    async def _check_secret(self, name: str, http: Http) -> list[Verdict]:
        """Return what is found with one secret, as far as the time allows."""
        found: list[Verdict] = []
        ahead_s = 0.0  # how far our clock is ahead of the server's

        def note(_: ApiError | None, date: float | None) -> None:
            nonlocal ahead_s
            ahead_s = ahead_s if date is None else time.time() - date

        entry, key = self.config.secrets[name], self._secrets[name]
        try:
            async with asyncio.timeout(DOCTOR_PATIENCE_S):
                if entry.type == "openai":
                    await self._check_openai(OpenAI(entry, key, http, Clock(), note), found)
                else:
                    await self._check_keboola(Keboola(entry, key, http, Clock(), note), found)
        except TimeoutError:
            what = f"{name}: not everything was answered within {DOCTOR_PATIENCE_S} s"
            cure = "see why its server is slow; for very many jobs, raise max_concurrency"
            found.append(("✗", what, cure))
        if abs(ahead_s) > MINUTE_S:
            side = "ahead of" if ahead_s > 0 else "behind"
            what = f"the clock is {show_duration(abs(ahead_s))} {side} that of {name}'s server"
            found.append(("!", what, "let NTP set it (systemd-timesyncd, chrony)"))
        return found

    def _new_token(self, name: str) -> str:
        """Return where a new token for a secret belongs."""
        entry, config = self.config.secrets[name], shlex.quote(str(self.config.path))
        if entry.source != "value":
            return f"make a new one, and put it into {entry.source} {entry.text.reveal()}"
        return f"make a new one, then run: teckochecker --config {config} secret set {name}"

    def _cure(self, name: str, error: ApiError, not_there: str = "") -> str:
        """Return what to do where a server does not answer as it should."""
        if not_there and error.status in {400, 403, 404}:
            return not_there
        if error.status in {401, 403}:
            return self._new_token(name)
        if error.status is None:
            return "check the address, the network and the proxy"
        if error.status < 400:
            return "check the address: something else answers there"
        return "see the server's own words, and its status page"

    async def _check_openai(self, openai: OpenAI, found: list[Verdict]) -> None:
        """Check an OpenAI key, and whether it reads the batches that are polled with it."""
        name, url = openai.name, self.config.secrets[openai.name].base_url
        jobs = [self.config.jobs[job_name] for job_name in self._polled]
        jobs = [job for job in jobs if job.openai_secret == name]
        left = polled = {batch_id for job in jobs for batch_id in self._polled[job.name]}
        try:
            rows, _ = await openai.page(None)
            left = polled - {row["id"] for row in rows}
            found.append(("✓", f"{name}: {url} takes the key", ""))
        except ApiError as error:
            if error.status not in {404, 405, 429, 501}:  # these are the list's alone
                found.append(("✗", f"{name}: {url}: {error}", self._cure(name, error)))
                return
            what = f"{name}: the list of batches cannot be read: {error}"
            finders = [job.name for job in jobs if job.match]
            cure = f"job {finders[0]} needs it: write batch_ids there" if finders else ""
            found.append(("✗" if finders else "✓", what, cure))
        answers = await asyncio.gather(*map(openai.ask, left), return_exceptions=True)
        failures = {k: e for k, e in zip(left, answers, strict=True) if isinstance(e, ApiError)}
        for job in jobs:
            for batch_id in (key for key in self._polled[job.name] if key in failures):
                failure = failures[batch_id]
                cure = self._cure(name, failure, "correct the id, the secret or its base_url")
                found.append(("✗", f"job {job.name}: {batch_id}: {failure}", cure))
        if len(failures) < len(polled):
            count = f"{len(polled) - len(failures):,} of {counted(len(polled), 'batch')}"
            found.append(("✓", f"{name}: reads {count}", ""))

    async def _check_keboola(self, keboola: Keboola, found: list[Verdict]) -> None:
        """Check a Keboola token, its queue, and every configuration that is started with it."""
        name = keboola.name
        jobs: dict[Target, list[Job]] = {}
        for job in (self.config.jobs[job_name] for job_name in self._polled):
            if job.keboola_secret == name:
                jobs.setdefault(self.config.target(job), []).append(job)
        what = stack = self.config.secrets[name].stack_url
        try:
            found += self._check_token(name, await keboola.verify())
            what = "the queue"
            url = await keboola.queue_url()
            for target in [*jobs][:1]:
                await keboola.search(target, time.time() - MINUTE_S, "-")
            found.append(("✓", f"{name}: the queue is {url}", ""))
        except ApiError as error:
            found.append(("✗", f"{name}: {what}: {error}", self._cure(name, error)))
            if what == stack:
                return
        checks = [self._check_target(keboola, target, own) for target, own in jobs.items()]
        for findings in await asyncio.gather(*checks):
            found += findings

    def _check_token(self, name: str, said: Mapping[str, Any]) -> Iterator[Verdict]:
        """Check what Keboola says of a token: its project, its end, its rights."""
        owner = said.get("owner")
        project = text_or_none(owner.get("name")) if isinstance(owner, dict) else None
        if project is None:
            what = f"{name}: {self.config.secrets[name].stack_url} names no project of the token"
            yield "✗", what, "correct stack_url: it is no Keboola stack"
            return
        left_s, when = math.inf, ""
        with contextlib.suppress(ValueError, OverflowError):
            expires = datetime.fromisoformat(str(said.get("expires")))
            left_s = expires.replace(tzinfo=expires.tzinfo or UTC).timestamp() - time.time()
            end = f"expires in {counted(int(left_s // DAY_S), 'day')}"
            when = f", {end}" if left_s > 0 else ", has expired"
        mark = "✓" if left_s > 14 * DAY_S else "!" if left_s > 0 else "✗"
        cure = "" if mark == "✓" else self._new_token(name)
        yield mark, f"{name}: the token is one of project {quoted(project)}{when}", cure
        if said.get("canCreateJobs") is False:
            cure = f"give it that right, or {self._new_token(name)}"
            yield "✗", f"{name}: the token may not start jobs (canCreateJobs is false)", cure

    async def _check_target(
        self, keboola: Keboola, target: Target, jobs: Sequence[Job]
    ) -> list[Verdict]:
        """Check that a configuration is there, and fits each of the jobs that start it."""
        more = f" (and {len(jobs) - 1} more)" if len(jobs) > 1 else ""
        text = f"job {jobs[0].name}{more}: {target}"
        declared: list[str] | None = None
        try:
            said = await keboola.configuration(target)
            inner = said.get("configuration")
            key = inner.get("variables_id") if isinstance(inner, dict) else None
            if isinstance(key, str | int) and key:
                place = replace(target, component_id="keboola.variables", config_id=str(key))
                content = (await keboola.configuration(place)).get("configuration")
                variables = content.get("variables") if isinstance(content, dict) else None
                declared = [str(v.get("name")) for v in variables or () if isinstance(v, dict)]
        except ApiError as error:
            cure = "correct component_id, config_id, branch_id or the token's rights"
            return [("✗", f"{text}: {error}", self._cure(keboola.name, error, cure))]
        found: list[Verdict] = []
        if said.get("isDisabled") is True and any(job.mode != "forceRun" for job in jobs):
            found.append(("✗", f"{text} is disabled", "enable it in Keboola"))
        rows = said.get("rows")
        there = [str(row.get("id")) for row in rows or () if isinstance(row, dict)]
        for job in jobs:
            gone = [row for row in job.config_row_ids if rows is not None and row not in there]
            if gone:
                what = f"job {job.name}: {target} has no rows {', '.join(gone)}"
                found.append(("✗", what, "correct config_row_ids"))
            sent = keboola_variables(Run(0, job.name, target, "a" if job.match else ""), job)
            missing = [variable for variable in declared or () if variable not in sent]
            if missing:
                what = f"job {job.name}: {target} needs the variables {', '.join(missing)}"
                cure = "add them to the job's variables: what is sent replaces the defaults"
                found.append(("✗", what, cure))
        is_flow = target.component_id in {"keboola.orchestrator", "keboola.flow"}
        if declared is None and not is_flow:
            what = f"{text} has no variables_id: its Keboola job gets no batch ids"
            cure = "connect a variables configuration to it (README, What Keboola gets)"
            found.append(("!", what, cure))
        takes = "its tasks get the variables" if is_flow else "it gets its variables"
        return found or [("✓", f"{text} is there, and {takes}", "")]


def run_doctor(args: argparse.Namespace) -> int:
    """Try everything that has to be right: a line each, with the cure.

    Nothing is started or changed, and it works beside the daemon. Exits 1 if anything is wrong.
    """
    path, files, redactor = config_path(args), Files(), Redactor()
    config, problems, _ = read_config_file(path, files)
    opener = SecretOpener(config, files, os.environ)
    secrets = opener.open_all()
    redactor.learn(opener.all_known(secrets))
    doctor = Doctor(config, secrets, redactor)
    problems = sorted([*problems, *opener.problems], key=lambda p: (p.line, p.column))
    doctor.tell(("✗", str(problem), "") for problem in problems)
    if not problems:
        words = f"{counted(len(config.jobs), 'job')}, {counted(len(secrets), 'secret')}"
        doctor.tell([("✓", f"{path}: {words}, and every secret opens", "")])
    doctor.tell(("!", warning, "") for warning in [*opener.warnings, *mount_warning(path)])
    if config.sha256:
        doctor.tell(doctor.check_files())
        asyncio.run(doctor.check_servers())
    wrong, warnings = doctor.counts["✗"], doctor.counts["!"]
    print(f"{counted(wrong, 'problem')}, {counted(warnings, 'warning')}")
    return 1 if wrong else 0


# --- import ---------------------------------------------------------------------------------------


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name, with a number behind it where it is taken."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


class Importer:
    """Makes a config of TeckoChecker 0.9's database; `notes` tell what a person has to see."""

    def __init__(self, db: sqlite3.Connection, old: Fernet, new: MultiFernet) -> None:
        db.row_factory = sqlite3.Row
        self.notes: list[str] = []
        self._db = db
        self._old = old
        self._new = new
        self._rows = {row["id"]: row for row in db.execute("SELECT * FROM secrets ORDER BY id")}
        self._names: dict[int, str] = {}  # of secrets, by old id
        self._secrets: dict[str, dict[str, str]] = {}
        self._started: set[int] = set()  # old ids of jobs whose log has a start of Keboola
        self._failed: set[int] = set()  # those whose log has a failed one
        log = db.execute("SELECT job_id, status, message FROM polling_logs")
        for job_id, status, message in log:
            text = f"{status} {message}".lower()
            if "keboola_triggered" in text:
                self._started.add(job_id)
            elif "trigger" in text and re.search("fail|error", text):
                self._failed.add(job_id)

    def config(self) -> dict[str, Any]:
        """Return the config as plain data. Raises UsageError where a secret does not open."""
        jobs: dict[str, dict[str, Any]] = {}
        for row in self._db.execute("SELECT * FROM polling_jobs ORDER BY id").fetchall():
            name = free_name(one_line(str(row["name"]).replace("/", "-"), 190) or "job", jobs)
            if name != row["name"]:
                self.notes.append(f"the job {quoted(str(row['name']))} is called {name} now")
            query = "SELECT batch_id, status FROM job_batches WHERE job_id = ? ORDER BY id"
            found = self._db.execute(query, (row["id"],))
            batches = {str(b): Batch(str(b), str(status).lower()) for b, status in found}
            try:
                jobs[name] = self._job(row, [*batches])
                jobs[name] |= self._rest(name, row, batches.values())
            except ValueError as error:
                self.notes.append(f"the job {name} is left out: {error}")
        unused = [quoted(str(r["name"])) for key, r in self._rows.items() if key not in self._names]
        self.notes += [f"the secret {name} is left out: no job here uses it" for name in unused]
        defaults = {  # without config_id: a new job must name its own
            key: collections.Counter(job[key] for job in jobs.values()).most_common(1)[0][0]
            for key in ("openai_secret", "keboola_secret", "component_id", "poll_interval")
            if jobs
        }
        for name, job in jobs.items():
            jobs[name] = {k: value for k, value in job.items() if defaults.get(k) != value}
        return {"secrets": self._secrets, "defaults": defaults, "jobs": jobs}

    def _job(self, row: sqlite3.Row, batch_ids: list[str]) -> dict[str, Any]:
        """Return a job as the config has it, without its status. Raises ValueError with why not."""
        url = str(row["keboola_stack_url"] or "").strip().rstrip("/")
        url = url if "://" in url else f"https://{url}"
        if not 1 <= len(batch_ids) <= 10:
            raise ValueError(f"it has {counted(len(batch_ids), 'batch')}; 1 to 10 are possible")
        if url_problem(url):
            raise ValueError("its stack's address is none")
        if not {row["openai_secret_id"], row["keboola_secret_id"]} <= self._rows.keys():
            raise ValueError("one of its secrets is not there")
        if not (row["keboola_component_id"] and row["keboola_configuration_id"]):
            raise ValueError("it has no component or no configuration")
        parts = urllib.parse.urlsplit(url)  # of the page of a project, perhaps
        url = f"{parts.scheme}://{parts.netloc}"
        interval_s = min(DAY_S, max(1, count_or_none(row["poll_interval_seconds"]) or 120))
        return {
            "batch_ids": batch_ids,
            "config_id": str(row["keboola_configuration_id"]),
            "openai_secret": self._secret(row["openai_secret_id"], ""),
            "keboola_secret": self._secret(row["keboola_secret_id"], url),
            "component_id": str(row["keboola_component_id"]),
            "poll_interval": f"{interval_s}s",
        }

    def _rest(self, name: str, row: sqlite3.Row, batches: Iterable[Batch]) -> dict[str, bool]:
        """Return what keeps a job from being started twice; what is not certain gets a note."""
        status = str(row["status"]).lower()
        was_completed = status in {"completed", "completed_with_failures"}
        started, failed = row["id"] in self._started, row["id"] in self._failed
        is_finished = all(batch.is_terminal for batch in batches)
        if status == "paused":
            return {"paused": True}
        if status == "active" and started:
            self.notes.append(f"the job {name} was active, but has started Keboola: it is done now")
        if (was_completed and not failed) or (started and (was_completed or status == "active")):
            return {"done": True}
        if status == "active" and not is_finished:
            return {}
        why = ", but could not start Keboola" if was_completed else ""
        if status == "active":
            why = ", and all its batches are finished, but its log has no start of Keboola"
        cure = "it is paused now: remove paused: to start it, or write done: true"
        self.notes.append(f"the job {name} was {one_line(status)}{why}; {cure}")
        return {"paused": True}

    def _secret(self, old_id: int, stack_url: str) -> str:
        """Return the name of a secret in the config. Raises ValueError for a second stack."""
        if old_id in self._names:
            name = self._names[old_id]
            if self._secrets[name].get("stack_url", "") != stack_url:
                raise ValueError(f"the secret {name} belongs to another stack")
            return name
        row = self._rows[old_id]
        kind = "keboola" if stack_url else "openai"
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(row["name"])).strip("-._")[:80] or "secret"
        name = self._names[old_id] = free_name(name, self._secrets)
        try:
            token = row["value"] if isinstance(row["value"], bytes) else str(row["value"]).encode()
            text = self._old.decrypt(token.strip()).decode().strip()
        except (InvalidToken, ValueError):
            message = f"$SECRET_KEY does not open the secret {quoted(str(row['name']))}"
            raise UsageError(message, "set $SECRET_KEY as the old program had it") from None
        problem = token_problem(text, kind)
        if problem:
            cure = f"run: teckochecker secret set {name}"
            self.notes.append(f"the secret {name} {problem[0]}; {problem[1]}, and {cure}")
        value = self._new.encrypt(text.encode()).decode()
        base_url = "" if stack_url else os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/")
        entry = {"type": kind, "value": value, "stack_url": stack_url, "base_url": base_url}
        self._secrets[name] = {key: word for key, word in entry.items() if word}
        return name


def run_import(args: argparse.Namespace) -> int:
    """Print a config made of a database of TeckoChecker 0.9, with $SECRET_KEY from then.

    Exits 1 if standard error says what is left out, or what a person has to decide.
    """
    old, old_key = Path(args.old), os.environ.get("SECRET_KEY", "")
    cure = "name a copy of the SQLite file of TeckoChecker 0.9, made while it was stopped"
    if not old.is_file():  # what is named is not echoed: PostgreSQL's address has a password in it
        raise UsageError("OLD.db is not a file", f"{cure}; copy PostgreSQL's tables into one")
    if not old_key:
        raise UsageError("$SECRET_KEY is not set", "set it as the old program had it")
    path, files = config_path(args), Files()
    opener = SecretOpener(read_config_file(path, files)[0], files, os.environ)
    keys = opener.fernet()
    if keys is None:
        raise ConfigError(opener.problems)
    digest = hashlib.sha256(old_key.encode(errors="surrogateescape")).digest()
    uri = f"{old.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            importer = Importer(db, Fernet(base64.urlsafe_b64encode(digest)), keys)
            config = importer.config()
    except sqlite3.Error as error:
        raise UsageError(f"cannot import {old}: {error}", cure) from None
    layout: Any = {"sort_keys": False, "allow_unicode": can_show("ěš🌙"), "width": 1000}
    text = (
        f"# Imported from {one_line(str(old))}. Put it in place of config.yaml and run `check`.\n"
    )
    text += yaml.safe_dump({k: config[k] for k in ("secrets", "defaults")}, **layout)
    text += yaml.safe_dump({"jobs": config["jobs"]}, default_flow_style=None, **layout)
    problems = parse_config(text, Path("<imported>"))[1]
    for note in (*importer.notes, *map(str, problems)):
        print(f"teckochecker: {note}", file=sys.stderr)
    print(text, end="")
    return 1 if importer.notes or problems else 0


# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a command knows: the config that counts, its runs, and the snapshot of these."""

    config: Config
    runs: Sequence[Run]
    shot: dict[str, Any]
    stats: Sequence[SecretStats]  # of the secrets that the config has
    store: Store | None  # None: nothing has run yet

    def chosen(self, name: str) -> list[tuple[Run, dict[str, Any]]]:
        """Return the runs that a name means: one run, or those of a job. Raises UsageError."""
        pairs = zip(self.runs, self.shot["jobs"], strict=True)
        found = [(run, shown) for run, shown in pairs if name in {run.name, run.job}]
        if not found and name not in self.config.jobs:
            raise UsageError(
                f"there is no job {quoted(name)}", "`teckochecker status` lists them all"
            )
        return found


@contextlib.contextmanager
def viewing(args: argparse.Namespace) -> Iterator[View]:
    """Return what the state file knows, beside a running daemon too.

    Where the file has problems, the last good config counts, as it does for the daemon. Where
    nothing has run yet, the runs are those that the first start would make. Raises ConfigError
    where the file does not even tell where the state file is.
    """
    path, files, redactor = config_path(args), Files(), Redactor()
    config, problems, _ = read_config_file(path, files)
    if problems:
        opener = SecretOpener(config, files, os.environ)
        redactor.learn(opener.all_known(opener.open_all()))
        problems = [replace(p, what=redactor.text(p.what)) for p in problems]
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
        daemon = lock_owner(config.state_path)
        shot = snapshot(config, runs, stats, daemon, loaded, now=time.time())
        yield View(config, runs, shot, stats, store)


def known_runs(config: Config, store: Store | None, wanted: str) -> list[Run]:
    """Return the runs of a config's jobs, in its order, as the state file has them or will.

    Of a match job these are the recent ones, and the one whose name is `wanted`.
    """
    stored = {run.id: run for run in store.runs_for(config.jobs)} if store else {}
    job_name, _, group = wanted.partition("/")
    if store and group:
        stored |= {run.id: run for run in store.groups(job_name, [group]).values()}
    targets = {name: config.target(job) for name, job in config.jobs.items()}
    assigned = assign(config.jobs, targets, [run for run in stored.values() if not run.group])
    runs = []
    for name, job in config.jobs.items():
        if not job.match:
            batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
            new = Run(0, name, targets[name], batches=batches, next_at=math.inf)
            run = assigned.get(name, new)
            stored.pop(run.id, None)
            runs.append(replace(run, job=name, batches=in_order(run, job, run.batches)))
        others = [run for run in stored.values() if run.job == name]
        runs += [r for r in others if (job.match and r.group) or r.may_be_at_keboola]
    return runs


def status_table(shot: Mapping[str, Any], head: str) -> list[str]:
    """Return the runs as lines below a head: attention first, each with what happens next.

    On a terminal nothing is wider than it, and of very many only the first are shown.
    """
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else 10_000
    views = [shown for part in in_parts(shot).values() for shown in part]
    shown = views[:60] if is_terminal else views
    rows = [("RUN", "STATUS", "BATCHES", "LAST POLL")]
    for run in shown:
        finished, percent = progress_of(run)
        name, status = one_line(run["name"], max(12, width - 54)), run["status"].replace("_", " ")
        rows.append((name, status, f"{finished} {percent:>3}%", ago(run["last_check_at"], shot)))
    titles, *body = table(rows)
    lines = [*textwrap.wrap(head, width), "", titles]
    for run, line in zip(shown, body, strict=True):
        is_quiet = run["status"] in {"completed", "paused"}
        lines.append(painted(line, RED if run["attention"] else DIM if is_quiet else ""))
        for text, colour in ((what_next(run, shot), DIM), (run["error"] or "", RED)):
            wrapped = textwrap.wrap(text, width - 4, max_lines=4, placeholder=" …")
            lines += [painted(f"    {part}", colour) for part in wrapped]
    if len(views) > len(shown):
        lines.append(f"… and {counted(len(views) - len(shown), 'run')} more; see --json")
    return lines


def job_story(view: View, run: Run, shown: Mapping[str, Any]) -> str:
    """Return everything about one run: its batches, what Keboola got, and its whole story."""
    trigger, polled_at = shown["trigger"] or {}, shown["last_check_at"]
    facts = {
        "run": run.name,
        "status": shown["status"].replace("_", " "),
        "error": shown["error"],
        "next": what_next(shown, view.shot),
        "target": str(run.target),
        "last poll": f"{polled_at} ({ago(polled_at, view.shot)})" if polled_at else "never",
        "trigger": f"{trigger['state']} {trigger['id']}" if trigger else None,
        "Keboola job": trigger.get("url") or trigger.get("keboola_job_id"),
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items() if value is not None]
    rows = [("BATCH", "STATUS", "REQUESTS", "EXPIRES", "OUTPUT", "NOTE")]
    for b in run.batches:
        requests = f"{b.completed or 0}/{b.total}" if b.total is not None else ""
        expires = "" if b.is_terminal else rfc3339(b.expires_at) or ""
        status = b.status or ("no answer yet" if run.last_check_at else "not polled")
        rows.append((b.id, status, requests, expires, b.output_file_id or "", b.error or ""))
    lines += ["", *table(rows)]
    if run.payload:
        values = json.loads(run.payload)["variableValuesData"]["values"]
        lines += ["", "What Keboola gets:", *(f"  {v['name']} = {v['value']}" for v in values)]
    events = view.store.events(name=run.name) if view.store else []
    return "\n".join([*lines, "", *(f"{rfc3339(e.at)} {e.text}" for e in events)])


def run_status(args: argparse.Namespace) -> int:
    """Show the runs, or one job with its whole story.

    It reads the state file, whether the daemon runs or not, and says which. What needs attention
    comes first. BATCHES: finished/all, and how much of their requests is done.
    """
    with viewing(args) as view:
        shot, troubles = dict(view.shot), general_troubles(view.shot, view.stats)
        lines = [painted(line, RED) for text in troubles for line in text.splitlines()]
        if args.job is not None:
            pairs = view.chosen(args.job)
            shot["jobs"] = [shown for _, shown in pairs]
            lines.append("\n\n".join(job_story(view, run, shown) for run, shown in pairs))
        else:
            owner = lock_owner(view.config.state_path)
            nothing = "Nothing runs" if view.store else "Nothing has run here yet"
            who = "A pass of --once is being made." if owner["once"] else "The daemon runs."
            if not owner["running"] and not owner["once"]:
                who = f"{nothing}: start the daemon, or --once."
            lines += status_table(shot, f"{who} {counts_in_words(shot)}")
        print(json.dumps(shot, indent=2) if args.json else "\n".join(lines))
        why = why_not_alive(view) if args.alive else ""
        if why:
            print(f"teckochecker: {why}", file=sys.stderr)
        return 1 if why or (args.check and view.shot["attention"]) else 0


def why_not_alive(view: View) -> str:
    """Return why the daemon is to be called dead, or ""."""
    daemon, now = view.shot["daemon"], time.time()
    if not daemon["running"]:
        return "no daemon runs"
    for run in view.runs:
        job = view.config.jobs[run.job]
        due_at = max(run.next_at, run.last_check_at or 0.0, unix_of(daemon["started_at"]) or 0.0)
        is_polled = run.phase is Phase.POLLING and not job.rests
        if is_polled and due_at < now - 2 * job.poll_interval - MINUTE_S:
            return f"the polls of {run.name} are overdue"
    return ""


# --- logs, schema, retry --------------------------------------------------------------------------


def run_logs(args: argparse.Namespace) -> int:
    """Show what has happened, of all jobs or of one.

    It reads the events that the state file keeps, also while the daemon runs.
    """
    if args.n < 0:
        raise UsageError("-n is a number of lines", "write -n 20")
    with viewing(args) as view:
        state_path = view.config.state_path
        has_any = view.store and view.store.events(name=args.job, most=1)
        if args.job is not None and not has_any:
            view.chosen(args.job)
    last, most = 0, args.n
    while True:
        with Store.reading(state_path) as store:
            newest = store.last_event_id() if store else 0
            events = store.events(after=last, name=args.job, most=most) if store else []
        last = max([newest, *(event.id for event in events)])
        for event in events:
            mark = "" if event.level == "info" else f"{event.level}: "
            line = f"{rfc3339(event.at)} {mark}{event.text}"
            text = json.dumps(event.document(), ensure_ascii=False) if args.json else line
            print(text, flush=args.follow)
        if not args.follow:
            return 0
        most = None
        time.sleep(1.0)


def run_schema(_: argparse.Namespace) -> int:
    """Print the SQL of the state file, for whoever reads it with other programs."""
    print(f"PRAGMA user_version = {SCHEMA_VERSION};")
    for statement in SCHEMA:
        print(f"{textwrap.dedent(statement).strip()};")
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Try a run again now, or all unfinished ones of a job.

    Polls, searches, or starts again what Keboola rejected or what failed there. A running daemon
    does it within two seconds, otherwise the next start or --once.
    """
    with viewing(args) as view:
        path, found = view.config.state_path, [run for run, _ in view.chosen(args.job)]
        if view.store is None:
            raise UsageError(f"there is no state file {path}", "start the daemon or --once first")
        unfinished = [run for run in found if run.phase is not Phase.FINISHED]
        asked, why = [], "it has no unfinished runs"
        for run in [run for run in found if run.name == args.job] or unfinished:
            request = RetryRequest(0, run.id, args.force, run.rerun, run.phase)
            after = after_retry(run, view.config.jobs[run.job], request, time.time())
            if isinstance(after, str):
                why = after
            else:
                asked.append((run.id, args.force, run.rerun, str(run.phase)))
        owner = lock_owner(path)
    if not asked:
        raise TeckoError(f"{args.job}: {why}")
    insert = "INSERT INTO requests (run_id, force, rerun, phase) VALUES (?, ?, ?, ?)"
    with contextlib.closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as db:
        Store(db, path).execute([(insert, row) for row in asked])
    is_acting = owner["running"] or owner["once"]
    when = "the running daemon does it within two seconds"
    print(f"asked: {when if is_acting else 'nothing runs now; the next start or --once does it'}")
    return 0


# ==================================================================================================
# 10. Command line, and the one place where exceptions become exit codes
# ==================================================================================================

EXIT_CODES: Final = """\
exit codes: 0 fine; 1 something needs attention, or the command could not do it; 2 usage or config
error; 75 another instance holds the state file; 130 interrupted"""

# Each command: what does it, whose docstring is its help, and an example of its arguments.
COMMANDS: Final[Mapping[str, tuple[Callable[[argparse.Namespace], int], str]]] = {
    "init": (run_init, "/srv/teckochecker"),
    "check": (run_check, "--config config.yaml"),
    "doctor": (run_doctor, "--config /etc/teckochecker/config.yaml"),
    "encrypt": (run_encrypt, "--rotate"),
    "secret": (
        run_secret,
        "set keboola-prod --type keboola --stack-url https://connection.keboola.com",
    ),
    "job": (run_job, "add nightly --batch-id batch_abc123 --config-id 123456"),
    "status": (run_status, "nightly-embeddings"),
    "logs": (run_logs, "nightly-embeddings -n 20 --follow"),
    "retry": (run_retry, "nightly-embeddings --force"),
    "import": (run_import, "old/teckochecker.db > imported.yaml"),
    "schema": (run_schema, "> schema.sql"),
}


def add_options(parsers: Mapping[str, argparse.ArgumentParser], style: Mapping[str, Any]) -> None:
    """Add each command's own options; `style` is for the parsers of actions."""
    parsers["init"].add_argument("directory", nargs="?", metavar="DIR", default=".")
    parsers["import"].add_argument("old", metavar="OLD.db", help="the old program's database")
    encrypt = parsers["encrypt"].add_mutually_exclusive_group().add_argument
    encrypt("--rotate", action="store_true", help="encrypt under the first key what is already")
    encrypt("--set", metavar="NAME", help="the same as `secret set NAME`")
    status, logs, retry = (parsers[name].add_argument for name in ("status", "logs", "retry"))
    for add in (status, logs):
        add("job", nargs="?", metavar="JOB", help="only this run, or the runs of this job")
        add("--json", action="store_true", help="print JSON, for programs")
    status("--check", action="store_true", help="exit 1 if anything needs attention")
    status("--alive", action="store_true", help="exit 1 if no daemon runs, or polls are overdue")
    logs("-n", type=int, metavar="N", default=100, help="the last N lines (default: 100)")
    logs("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    retry("job", metavar="JOB", help="the name of a run, or of a job")
    force = "decide an unknown start, start what the policy refused, or repeat a success"
    retry("--force", action="store_true", help=force)
    for command, names in (("secret", "list set remove"), ("job", "add pause resume remove")):
        actions = parsers[command].add_subparsers(dest="action", metavar="ACTION", required=True)
        for action in names.split():
            parser = actions.add_parser(
                action, help=f"{action} {command}{'s' if action == 'list' else ''}", **style
            )
            if action != "list":
                parser.add_argument("name", metavar="NAME")
            if action == "set":
                for option in ("--type", "--stack-url", "--base-url"):
                    parser.add_argument(option, metavar="TEXT")
            elif action == "add":
                add_job_options(parser)


def new_parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    shared = argparse.ArgumentParser(add_help=False)
    text = "the config file (default: $TECKOCHECKER_CONFIG, then config.yaml)"
    shared.add_argument("--config", metavar="PATH", default=argparse.SUPPRESS, help=text)
    style: dict[str, Any] = {
        "parents": [shared],
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }

    def told(run: Callable[[argparse.Namespace], int], example: str) -> dict[str, Any]:
        parts = [textwrap.fill(" ".join(p.split()), 88) for p in str(run.__doc__).split("\n\n")]
        if run is run_logs:
            parts.append(textwrap.fill(f"events: {', '.join(EVENTS)}", 88))
        epilog = f"example: teckochecker {example}\n\n{EXIT_CODES}"
        return {"description": "\n\n".join(parts), "epilog": epilog}

    example = "--config /etc/teckochecker/config.yaml"
    parser = argparse.ArgumentParser("teckochecker", **told(run_daemon, example), **style)
    parser.set_defaults(run=run_daemon)
    parser.add_argument("--version", action="version", version=f"teckochecker {__version__}")
    once = "make one pass over every unfinished run, start what is ready, and exit (for cron)"
    parser.add_argument("--once", action="store_true", help=once)
    commands, parsers = parser.add_subparsers(title="commands", metavar="COMMAND"), {}
    for name, (run, arguments) in COMMANDS.items():
        line = str(run.__doc__).splitlines()[0].rstrip(".")
        about = told(run, f"{name} {arguments}")
        parsers[name] = commands.add_parser(name, help=line[0].lower() + line[1:], **about, **style)
        parsers[name].set_defaults(run=run)
    add_options(parsers, style)
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
        code, text = error.exit_code, f"{who}{error}"
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
