#!/usr/bin/env python3
"""TeckoChecker: when OpenAI has finished a team's batches, their Keboola job runs, once, by itself.

One asyncio process reads jobs and encrypted secrets from a YAML file that people edit, polls the
OpenAI batches of each job until all are finished, starts the job's Keboola configuration once,
follows the Keboola job to its end, and keeps what it did in a SQLite file. It opens no port.

    config.yaml --> Config, secrets                                            (2, 3)
                        |
    OpenAI --batches--> Engine: decide (4), commit (5), act (6, 7) <--> state file (SQLite)
                        |                                                    |
                        +--> Keboola: search, start, follow                  +--> status, logs, page,
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


# Every event: its level, the group by which a webhook may name it, and its sentence.
EVENTS: Final[Mapping[str, tuple[str, str, str]]] = {
    "daemon_started": (
        "info",
        "",
        "teckochecker {version} started as pid {pid}: {jobs}, {batches}",
    ),
    "daemon_stopped": ("info", "", "teckochecker stopped"),
    "config_loaded": ("info", "", "config loaded: {changes}"),
    "config_warning": ("warning", "", "{warning}"),
    "config_rejected": (
        "error",
        "attention",
        "the config file has problems, the previous one still counts: {problem}",
    ),  # noqa: E501
    "config_rejected_recovered": ("info", "attention", "the config file is good again"),
    "account_failing": ("error", "attention", "the secret {secret} is refused: {error}"),
    "account_failing_recovered": (
        "info",
        "attention",
        "the secret {secret} works again, or is no longer used",
    ),  # noqa: E501
    "list_not_usable": (
        "warning",
        "",
        "the list of batches of {secret} is not used for a while: {error}",
    ),  # noqa: E501
    "list_usable": ("info", "", "the list of batches of {secret} is used again"),
    "find_failed": ("warning", "", "new batches of {secret} cannot be found: {error}"),
    "find_recovered": ("info", "", "new batches of {secret} are found again"),
    "run_found": ("info", "", "{batch_id} begins a new run"),
    "batch_joined": ("info", "", "{batch_id} joins, {count} batches now"),
    "late_batch": ("warning", "", "{batch_id} came after the start, and starts nothing"),
    "batch_without_group": (
        "warning",
        "",
        "{batch_id} has no {group_by} in its metadata, and starts nothing",
    ),  # noqa: E501
    "batch_status_changed": ("info", "", "{batch_id} {status}{counts}"),
    "batch_status_unknown": (
        "warning",
        "",
        "{batch_id} has the status {status}, which is not known, and is polled on",
    ),  # noqa: E501
    "poll_failed": ("warning", "", "{error}"),
    "poll_recovered": ("info", "", "polls succeed again"),
    "poll_failing": ("warning", "attention", "polls have failed for over ten minutes: {error}"),
    "poll_failing_recovered": ("info", "attention", "polls succeed again"),
    "group_size_unclear": ("warning", "attention", "{error}"),
    "group_size_unclear_recovered": ("info", "attention", "the size of the group is clear now"),
    "deadline_passed": (
        "warning",
        "attention",
        "the deadline has passed, and {pending} of {count} batches are not finished",
    ),  # noqa: E501
    "deadline_passed_recovered": (
        "info",
        "attention",
        "the batches are finished, after the deadline",
    ),
    "trigger_intended": ("info", "", "will start {target}"),
    "trigger_search_failed": ("warning", "", "{error}"),
    "trigger_sending": ("info", "", "starting {target}"),
    "trigger_not_sent": ("warning", "", "{error}"),
    "trigger_unknown": ("warning", "", "{error}; Keboola is searched before anything is repeated"),
    "trigger_rejected": ("error", "", "Keboola rejected the start: {error}"),
    "trigger_sent": ("info", "", "started Keboola job {keboola_job_id} {url}"),
    "trigger_found": (
        "info",
        "",
        "found Keboola job {keboola_job_id}, which this run has started {url}",
    ),  # noqa: E501
    "trigger_left_open": (
        "warning",
        "",
        "the process ends before Keboola's answer came; the next start searches for it",
    ),  # noqa: E501
    "trigger_overdue": (
        "error",
        "attention",
        "its Keboola job should have started by now: {error}",
    ),
    "trigger_overdue_recovered": ("info", "attention", "its Keboola job is known now"),
    "keboola_job_status": ("info", "", "Keboola job {keboola_job_id} is {status}"),
    "follow_failed": ("warning", "", "cannot follow Keboola job {keboola_job_id}: {error}"),
    "follow_failing": (
        "warning",
        "attention",
        "the Keboola job cannot be followed for over ten minutes: {error}",
    ),  # noqa: E501
    "follow_failing_recovered": ("info", "attention", "the Keboola job can be followed again"),
    "keboola_job_retried": ("warning", "", "{error}; it is started again in {wait}"),
    "completed": ("info", "finished", "Keboola job {keboola_job_id} {ended}, {counts} {url}"),
    "completed_with_failures": (
        "warning",
        "finished",
        "Keboola job {keboola_job_id} {ended}, {counts} {url}",
    ),  # noqa: E501
    "job_failed": ("error", "attention finished", "failed: {error} {url}"),
    "job_failed_recovered": ("info", "attention", "is not failed any more"),
    "retry_taken": ("info", "", "a person asked for a retry{how}"),
    "retry_refused": ("warning", "", "a retry was asked for, but {why}"),
    "jobs_need_attention": ("warning", "", "{count} need attention: {runs}"),
    "state_is_older": (
        "warning",
        "",
        "the state file does not know of the last POST; for {wait_s} s no empty search counts",
    ),  # noqa: E501
    "state_write_failed": ("error", "attention", "{error}"),
    "state_write_failed_recovered": ("info", "attention", "the state file can be written again"),
    "clock_changed": ("warning", "", "the clock was set by {seconds} s, and all waits with it"),
    "watch_failed": (
        "warning",
        "",
        "the config's directory cannot be watched, and is compared only: {error}",
    ),  # noqa: E501
    "notify_failed": (
        "warning",
        "",
        "the webhook {secret} cannot be told, and is tried again: {error}",
    ),
    "notify_dropped": ("warning", "", "the webhook {secret} was not told of {count} events: {why}"),
    "publish_failed": ("warning", "", "cannot publish to {directory}: {error}"),
    "publish_recovered": ("info", "", "files are published again"),
    "internal_error": ("error", "", "a bug was met in {where}: {error}"),
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
    def of(cls, name: str, run: Run | None = None, level: str = "", **fields_: object) -> Event:
        """Return an event with its sentence; what a sentence names and `fields_` lack is empty."""
        usual, _, sentence = EVENTS[name]
        words = collections.defaultdict(str, {k: v for k, v in fields_.items() if v is not None})
        text = one_line(sentence.format_map(words), 2000)
        if run:
            text = f"{run.name}: {text}"
        return cls(name, level or usual, run and run.job, run and run.name, fields_, text)

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
        yield (
            "match",
            "stands beside batch_ids",
            "keep one of them: ids, or metadata to find them by",
        )
    if "match" in has and "since" not in has:
        yield "match", "since is missing", "add since: 2026-11-25; older batches are not looked at"
    for key in ("since", "group_by"):
        if key in has and "match" not in has:
            yield key, f"{key} without match", f"add match:, or remove {key}:"
    for key in ("group_size", "settle"):
        if key in has and "group_by" not in has:
            yield key, f"{key} without group_by", f"add group_by:, or remove {key}:"
    if {"group_size", "settle"} <= has:
        yield (
            "settle",
            "stands beside group_size",
            "keep one of them: they answer the same question",
        )
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


# ==================================================================================================
# 4. Decisions: a run and what came in, the next run and its events out. No I/O, no clock
# ==================================================================================================
#
#   polling --ready--> intent --search: empty--> sending --POST--> sent --followed--> finished
#      |                 ^  ^                       |                                     |
#      +--> refused      |  +------ not sent -------+---> rejected --(config, retry)--> intent
#                        |                          |                                     ^
#                        +-- retry --force -- unknown --search: found--> sent             |
#                                                   |                   (rerun: retry, retry_on_error)
#                                                   +--two empty searches, the last one begun at
#                                                      least the grace later--> sending
#
# A `sending` that is found at the start is `unknown`. A search comes before every POST.

MAX_BATCHES: Final = 1000  # of a run
LASTING_S: Final = 10 * MINUTE_S  # an error that lasts longer does not settle by itself
FILES_WAIT_S: Final = 5 * MINUTE_S


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


def after_poll(
    run: Run, job: Job, answers: Mapping[str, Batch | ApiError], now: float, jitter: float
) -> Change:
    """Return a run after a poll of its batches, and what is decided with it.

    One failed poll never fails a run: it shows the error and is polled again, each time later.
    """
    batches, events = [], []
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
        wait_s = backoff_s(run.failures + 1, job.poll_interval, jitter, asked_s)
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
            ended = {"phase": Phase.REFUSED, "next_at": math.inf, "error_since": now}
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
            what = "has no successful request" if bad[0].status == "completed" else bad[0].status
            return (
                f"trigger_on: all_completed, but {bad[0].id} {what or 'is not finished'}"
                f"{f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''}; `retry --force` starts it"
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
    return replace(after, error=error, error_since=error and now or None)


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


def as_unknown(run: Run, error: str, grace_s: float, now: BootTime, asked_s: float = 0.0) -> Change:
    """Return a run when the outcome of its POST cannot be told.

    The first repeat waits for the grace; then the wait doubles each time, up to an hour.
    """
    doubled = min(max(grace_s, HOUR_S), max(1.0, 2 * run.repeat_after_s))
    wait_s = max(grace_s if run.repeat_after_s == 0 else doubled, min(asked_s, HOUR_S))
    text = f"it is not known whether Keboola took the job: {error}"
    after = replace(
        with_error(run, text, now.wall, search_spacing_s(grace_s)),
        phase=Phase.UNKNOWN,
        failures=0,
        post_error=error,
        repeat_after_s=max(wait_s, 0.001),
        unknown_since=now,
        empty_searches=0,
    )
    return after, [Event.of("trigger_unknown", run, trigger_id=run.trigger_id, error=text)]


def after_search(  # noqa: PLR0913 - what it goes by is named at each call
    run: Run,
    came: Sequence[KeboolaJob] | ApiError,
    *,
    began: BootTime,
    may_post: bool,
    follow: bool,
    grace_s: float,
    now: float,
    jitter: float,
) -> Change:
    """Return a run after a search for its Keboola job: found, SENDING, or searched for again.

    `came` are the jobs that carry the trigger id, the oldest first, or why the search is
    incomplete: then it says nothing, and nothing is sent unless a person said `retry --force`.
    `began` is when the search did. A run that comes back SENDING is to be committed and posted with
    nothing awaited in between: what was found out and what is sent belong together.
    """
    if isinstance(came, ApiError):
        if run.forced and may_post:
            return as_sending(run, now)
        text = f"cannot search Keboola for an earlier start: {came}"
        if run.post_error:
            text += f"; the start brought: {run.post_error}"
        wait_s = backoff_s(run.failures + 1, 5, jitter, came.retry_after_s)
        is_new = text != run.error
        events = [Event.of("trigger_search_failed", run, error=text, status=came.status)]
        return with_error(run, text, now, wait_s), events if is_new else []
    if came:
        return as_started(run, came, "trigger_found", now, follow=follow)
    if run.phase is not Phase.UNKNOWN:
        return as_sending(run, now) if may_post else (run, [])
    elapsed_s = run.unknown_since.until_s(began) if run.unknown_since else 0.0
    is_late = elapsed_s >= run.repeat_after_s
    after = replace(run, empty_searches=run.empty_searches + 1, failures=0)
    if run.post_error:
        text = f"a search did not find the Keboola job, and the start brought: {run.post_error}"
        after = replace(after, error=text)
    if is_late and after.empty_searches >= 2:
        if may_post:
            return as_sending(after, now)
        # Paused or removed: an earlier POST's job may still show up, so the search goes on.
        return replace(after, next_at=now + HOUR_S), []
    spacing_s = search_spacing_s(grace_s)
    wait_s = spacing_s if is_late else max(run.repeat_after_s - elapsed_s, 0.1)
    return replace(after, next_at=now + wait_s), []


def as_started(
    run: Run, jobs: Sequence[KeboolaJob], name: str, now: float, *, follow: bool
) -> Change:
    """Return a run once its Keboola job is known; of several, the first one is ours."""
    ours, *others = jobs
    created_at = ours.created_time.timestamp() if ours.created_time else now
    project = ours.project or run.target.project
    page = f"{run.target.stack_url}/admin/projects/{project}/queue/{ours.id}" if project else None
    after = replace(
        run,
        phase=Phase.SENT if follow else Phase.FINISHED,
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
    if not follow:
        after = replace(after, finished_at=after.sent_at, next_at=math.inf)
        events.append(end_event(after, "was started"))
    return after, events


def after_post(  # noqa: PLR0913 - what it goes by is named at each call
    run: Run,
    came: KeboolaJob | ApiError,
    *,
    follow: bool,
    grace_s: float,
    now: BootTime,
    jitter: float,
) -> Change:
    """Return a run after its POST: sent, certainly not sent, rejected, or unknown."""
    if isinstance(came, KeboolaJob):
        return as_started(run, [came], "trigger_sent", now.wall, follow=follow)
    facts = {"trigger_id": run.trigger_id, "status": came.status, "request_id": came.request_id}
    if not came.sent:
        text = f"Keboola was not reached: {came}"
        wait_s = backoff_s(run.failures + 1, 5, jitter, came.retry_after_s)
        after = replace(with_error(run, text, now.wall, wait_s), phase=Phase.INTENT)
        return after, [Event.of("trigger_not_sent", run, error=text, **facts)]
    if came.status is None or not 400 <= came.status < 500 or came.status in {408, 429}:
        return as_unknown(run, str(came), grace_s, now, came.retry_after_s or 0.0)
    is_curable = came.status in {401, 402, 403, 404, 409, 423}
    wait_s = backoff_s(run.failures + 1, 5 * MINUTE_S, jitter, came.retry_after_s)
    after = replace(
        with_error(run, str(came), now.wall, wait_s if is_curable else math.inf),
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


def after_follow(  # noqa: PLR0913 - what it goes by is named at each call
    run: Run,
    came: KeboolaJob | ApiError,
    *,
    poll_interval_s: float,
    follow_interval_s: float,
    retry_on_error: int,
    now: float,
    jitter: float,
) -> Change:
    """Return a run after a look at its Keboola job: finished, failed, started again, or running."""
    wait_s = max(follow_interval_s, min(poll_interval_s, 5 * MINUTE_S))
    facts = {"keboola_job_id": run.keboola_job_id, "url": run.url}
    if isinstance(came, ApiError) and came.status != 404:
        wait_s = backoff_s(run.failures + 1, wait_s, jitter, came.retry_after_s)
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
    if came.status == "error" and run.retries < retry_on_error:
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


def after_retry(run: Run, job: Job | None, request: RetryRequest, now: float) -> Change | str:
    """Return a run after `retry`, or why nothing could be done."""
    if job is None:
        return "its job is not in the config"
    if job.done:
        return "the config says done: true; remove that to start it"
    force, now_due = request.force, {"failures": 0, "next_at": now}
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


def status_of(run: Run, job: Job | None) -> str:
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


def attention_of(run: Run, job: Job | None, grace_s: float, now: float) -> str:
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


def as_loaded(run: Run, now: BootTime, grace_s: float) -> Change:
    """Return a stored run as a new process takes it up.

    A POST that an earlier process was about to send, or had sent, is unknown. A recorded time in
    the future counts as now; polls begin at once, and no other wait is longer than an hour.
    """
    names = ("error_since", "intended_at", "joined_at", "sent_at", "finished_at", "last_check_at")
    times = {name: getattr(run, name) for name in names}
    late = {n: min(at, now.wall) for n, at in times.items() if at is not None and at > now.wall}
    if run.phase is Phase.POLLING or now.wall + HOUR_S < run.next_at < math.inf:
        late["next_at"] = now.wall
    longest = now.wall + FILES_WAIT_S
    if any((b.files_due_at or 0) > longest for b in run.batches):
        due = [b.files_due_at and min(b.files_due_at, longest) for b in run.batches]
        late["batches"] = tuple(
            replace(b, files_due_at=at) for b, at in zip(run.batches, due, strict=True)
        )
    run = replace(run, **late) if late else run
    if run.phase is Phase.SENDING:
        return as_unknown(run, "the process ended before the answer was recorded", grace_s, now)
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
        room = MAX_BATCHES - len(known) if run.phase is Phase.POLLING else 0
        joined, late = new[:room], new[room:]
        batches = in_order(run, job, [*run.batches, *(row.batch for row in joined)])
        after = run
        if joined:
            size = group_size_of(run, job, joined)
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


def group_size_of(run: Run, job: Job, joined: Iterable[Row]) -> str:
    """Return what the metadata of a group says of its size: a number, or what is wrong with it."""
    if not (job.group_size or "").startswith("metadata."):
        return ""
    key = str(job.group_size).removeprefix("metadata.")
    sizes = {row.metadata.get(key, "") for row in joined} | ({run.size} if run.size else set())
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

# Times are Unix seconds. Nothing here is ever a secret.
SCHEMA: Final[Sequence[str]] = (
    """
    CREATE TABLE runs (                 -- one row for each set of batches that leads to a Keboola job
        id               INTEGER PRIMARY KEY,
        job              TEXT NOT NULL,
        "group"          TEXT NOT NULL, -- '' for a job with batch_ids
        batch_key        TEXT NOT NULL, -- JSON list of its sorted batch ids; '' for a group
        stack_url        TEXT NOT NULL,
        component_id     TEXT NOT NULL,
        config_id        TEXT NOT NULL,
        branch_id        TEXT NOT NULL,
        project          TEXT NOT NULL,
        phase            TEXT NOT NULL CHECK (phase IN ('polling', 'refused', 'intent', 'sending',
                             'unknown', 'rejected', 'sent', 'finished')),
        rerun            INTEGER NOT NULL,
        trigger_id       TEXT NOT NULL,
        payload          TEXT NOT NULL, -- the body of POST /jobs
        input_digest     TEXT NOT NULL,
        next_at          REAL,          -- NULL: nothing is due by itself
        failures         INTEGER NOT NULL,
        error            TEXT,
        error_since      REAL,
        attention        TEXT NOT NULL,
        forced           INTEGER NOT NULL,
        posts            INTEGER NOT NULL,
        post_error       TEXT,
        repeat_after_s   REAL NOT NULL,
        unknown_wall     REAL,          -- when the outcome of the POST was recorded as unknown,
        unknown_boot     TEXT,          -- in which boot of the machine,
        unknown_uptime_s REAL,          -- and how long it had been up
        empty_searches   INTEGER NOT NULL,
        retries          INTEGER NOT NULL,
        sending_at       REAL,
        sent_at          REAL,
        keboola_job_id   TEXT,
        keboola_status   TEXT,
        keboola_error    TEXT,
        url              TEXT,
        size             TEXT NOT NULL,
        joined_at        REAL,
        intended_at      REAL,
        deadline_told    INTEGER NOT NULL,
        last_check_at    REAL,
        finished_at      REAL
    ) STRICT""",
    'CREATE INDEX runs_by_job ON runs (job, "group")',
    "CREATE INDEX runs_by_batches ON runs (batch_key) WHERE batch_key <> ''",
    "CREATE INDEX runs_unfinished ON runs (phase) WHERE phase <> 'finished'",
    "CREATE INDEX runs_in_need ON runs (attention) WHERE attention <> ''",
    "CREATE INDEX runs_by_end ON runs (job, finished_at) WHERE phase = 'finished'",
    "CREATE INDEX runs_by_sending ON runs (sending_at) WHERE sending_at IS NOT NULL",
    """
    CREATE TABLE batches (
        run_id         INTEGER NOT NULL REFERENCES runs (id),
        place          INTEGER NOT NULL, -- in the config's list, or by creation; -1: it came too late
        id             TEXT NOT NULL,
        status         TEXT,             -- NULL: not polled yet
        total          INTEGER,
        completed      INTEGER,
        failed         INTEGER,
        output_file_id TEXT,
        error_file_id  TEXT,
        created_at     REAL,
        expires_at     REAL,
        ended_at       REAL,
        error          TEXT,
        files_due_at   REAL,
        PRIMARY KEY (run_id, id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX batches_by_id ON batches (id)",
    """
    CREATE TABLE events (                -- the log, and the outbox of webhooks
        id     INTEGER PRIMARY KEY,
        at     REAL NOT NULL,
        level  TEXT NOT NULL,
        name   TEXT NOT NULL,
        job    TEXT,
        run    TEXT,
        fields TEXT NOT NULL,            -- JSON object
        text   TEXT NOT NULL             -- for people
    ) STRICT""",
    "CREATE INDEX events_by_job ON events (job, id) WHERE job IS NOT NULL",
    """
    CREATE TABLE requests (              -- what people asked for with `retry`
        id     INTEGER PRIMARY KEY,
        run_id INTEGER NOT NULL,
        force  INTEGER NOT NULL,
        rerun  INTEGER NOT NULL,         -- what the person saw
        phase  TEXT NOT NULL
    ) STRICT""",
    """
    CREATE TABLE webhooks (
        secret     TEXT PRIMARY KEY,
        told_up_to INTEGER NOT NULL,     -- the last event that it has had, or was not to have
        failures   INTEGER NOT NULL,
        next_at    REAL NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """
    CREATE TABLE secrets (               -- how the requests with each have fared
        name            TEXT PRIMARY KEY,
        type            TEXT NOT NULL,
        requests        INTEGER NOT NULL,
        errors          INTEGER NOT NULL,
        last_success_at REAL,
        refused_since   REAL,            -- the server has refused it ever since
        error           TEXT
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
)

STATE_HINT: Final = "restore it from a backup, or move it away: Keboola is searched before any POST"
Statement = tuple[str, Sequence[object]]


@dataclass(frozen=True, slots=True)
class SecretStats:
    """How the requests with one secret have fared since the state file began. Unix seconds."""

    name: str
    type: str
    requests: int = 0
    errors: int = 0  # of the requests: all that brought no 2xx
    last_success_at: float | None = None
    refused_since: float | None = None
    error: str | None = None  # what became of the last request, if it failed

    def after(self, error: ApiError | None, now: float) -> SecretStats:
        """Return how it has fared after one more request.

        Whatever a server says of a request other than that it refuses the key, it takes the key.
        """
        requests = self.requests + 1
        if error is None:
            return SecretStats(self.name, self.type, requests, self.errors, now)
        after = replace(self, requests=requests, errors=self.errors + 1, error=str(error))
        if error.status == 401:
            return replace(after, refused_since=self.refused_since or now)
        is_about_request = error.status is not None and error.status < 500
        is_about_request = is_about_request and error.status not in {408, 429}
        return replace(after, refused_since=None) if is_about_request else after

    @classmethod
    def statement(cls, stats: SecretStats) -> Statement:
        """Return what stores it."""
        values = [getattr(stats, f.name) for f in fields(cls)]
        return "INSERT OR REPLACE INTO secrets VALUES (?, ?, ?, ?, ?, ?, ?)", values


class Clock:
    """The process's one clock: Unix time at the start, and what the boot-time clock adds to it.

    That one counts suspends too, and nobody sets it. `changed` tells when the system's clock was
    set, and follows it.
    """

    def __init__(self) -> None:
        self._boot = ""
        with contextlib.suppress(OSError):  # not Linux: the wall clock has to do
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._kind = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._started_at = time.time() - self.uptime_s()

    def uptime_s(self) -> float:
        """Return seconds that only ever grow."""
        return time.clock_gettime(self._kind)

    def now(self) -> float:
        """Return Unix seconds."""
        return self._started_at + self.uptime_s()

    def boot_time(self) -> BootTime:
        """Return the time as it can be measured from later, after a restart too."""
        return BootTime(self.now(), self._boot, self.uptime_s())

    def jitter(self) -> float:
        """Return a random number from 0 to 1."""
        return random.random()  # noqa: S311 - spreads load, guards nothing

    def changed(self) -> float:
        """Return by how many seconds the system's clock was set since the last call, or 0."""
        by_s = time.time() - self.now()
        if abs(by_s) <= MINUTE_S:
            return 0.0
        self._started_at += by_s
        return by_s


# --- files beside the state -----------------------------------------------------------------------


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return what tells this file from another one of its name, or None if there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


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
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fd = os.open(path, flags)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.EINVAL, "Not a regular file") from None
            return fd
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    except OSError as error:
        hint = "correct state:, or this user's rights to the directory"
        if error.errno == errno.ENOENT:
            hint = "create the directory (systemd does, when it starts the unit)"
        elif error.errno == errno.EACCES and path.exists():
            hint = f"it belongs to {owner_of(path)}: chown it to the daemon's user"
        elif error.errno in {errno.ELOOP, errno.EINVAL, errno.ENXIO}:
            hint = "put a file there, no link and no pipe"
        raise StateError(f"cannot open {path}: {error.strerror}", hint) from None
    return fd


def owner_of(path: Path) -> str:
    """Return the name of a file's owner, or its number."""
    try:
        return path.owner()
    except (KeyError, OSError):
        return f"user {path.stat().st_uid}"


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
            first = os.pread(self._fd, 200, 0).decode(errors="replace").partition(" since ")[0]
            os.close(self._fd)
            message = f"another instance holds {self.path}: {one_line(first) or 'it just started'}"
            raise LockedError(message, "wait for it, or stop it") from None
        except OSError as error:
            message = f"cannot lock {self.path}: {error.strerror}"
            raise StateError(message, "put state: on a local disk") from None
        self._inode = inode_of(self.path)
        self._label = f"pid {os.getpid()} ({purpose}) since {started_at:.3f}\n"
        number = r"([0-9]{1,15}\.[0-9]{1,9})"
        pattern = rf"last POST at {number} \(boot ([!-~]{{0,64}}) up {number}\)"
        match = re.search(pattern, os.pread(self._fd, 400, 0).decode(errors="replace"))
        self.last_post = BootTime(float(match[1]), match[2], float(match[3])) if match else None
        self._write(self._label)

    def note_post(self, now: BootTime) -> None:
        """Remember the time of a POST outside of the state file."""
        self.last_post = now
        self._write(self._label)

    def _write(self, label: str) -> None:
        if self.last_post:
            at = self.last_post
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
        return inode_of(self.path) == self._inode

    def close(self) -> None:
        """Let the lock go, and with it the label that says who has it."""
        self._write("")
        os.close(self._fd)


def lock_owner(state_path: Path) -> dict[str, Any]:
    """Return who acts on a state file, without taking its lock (that could hold up a start).

    It is `daemon` of `status --json`, with `once` where it is a pass of --once.
    """
    path = state_path.with_name(state_path.name + ".lock")
    nobody: dict[str, Any] = dict.fromkeys(("pid", "started_at", "last_loop_at"))
    try:
        label = path.read_text(encoding="utf-8", errors="replace")
        looped_at = path.stat().st_mtime
    except OSError:
        return {"running": False, "once": False, **nobody}
    match = re.match(r"pid ([0-9]{1,9}) \((daemon|--once)\) since ([0-9.]{1,20})\n", label)
    if not match:
        return {"running": False, "once": False, **nobody}
    age_s = time.time() - looped_at
    is_alive = age_s < 5
    with contextlib.suppress(OSError):  # PermissionError: it lives
        is_alive = is_alive or os.kill(int(match[1]), 0) is None
    is_running = is_alive and age_s < MINUTE_S
    return {
        "running": is_running and match[2] == "daemon",
        "once": is_running and match[2] == "--once",
        "pid": int(match[1]),
        "started_at": rfc3339(float(match[3])),
        "last_loop_at": rfc3339(looped_at),
    }


# --- the database ---------------------------------------------------------------------------------


def check_database(db: sqlite3.Connection, path: Path) -> int:
    """Return the schema's version, 0 for none yet. Raises StateError for what is not ours."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        message = f"the state file {path} has schema {version}; this program knows {SCHEMA_VERSION}"
        raise StateError(message, "run the newer teckochecker that wrote it")
    if 0 < version < SCHEMA_VERSION:
        message = f"the state file {path} is of an older teckochecker (schema {version})"
        raise StateError(message, "move it away: Keboola is searched before any POST")
    if version == 0 and db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
        raise StateError(f"{path} is the database of another program", "correct state:")
    return version


def check_undamaged(db: sqlite3.Connection, path: Path) -> None:
    """Raise StateError if SQLite's quick_check finds damage, or stumbles over it."""
    try:
        result = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        result = str(error)
    if result != "ok":
        raise StateError(f"the state file {path} is damaged: {one_line(result)}", STATE_HINT)


def state_error(error: sqlite3.Error, path: Path, what: str = "use") -> StateError:
    """Return what a person is told of an error of SQLite's, with what to do about it."""
    hint = {
        sqlite3.SQLITE_FULL: "free the disk",
        sqlite3.SQLITE_BUSY: "see who else has the file open",
        sqlite3.SQLITE_READONLY: "give this user the right to write the file and its directory",
        sqlite3.SQLITE_CANTOPEN: "check the path, and this user's rights to file and directory",
        sqlite3.SQLITE_IOERR: "look into the system's log for disk errors",
    }.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, STATE_HINT)
    return StateError(f"cannot {what} the state file {path}: {error}", hint)


_TARGET: Final = tuple(f.name for f in fields(Target))
_BATCH: Final = tuple(f.name for f in fields(Batch))
_RUN: Final = tuple(
    f.name for f in fields(Run) if f.name not in {"batches", "target", "unknown_since"}
)


def run_row(run: Run) -> dict[str, Any]:
    """Return a run as a row of its table."""
    ids = [] if run.group else sorted(batch.id for batch in run.batches)
    unknown = run.unknown_since
    return {
        **{name: getattr(run, name) for name in _RUN},
        **{name: getattr(run.target, name) for name in _TARGET},
        "next_at": run.next_at if math.isfinite(run.next_at) else None,
        "batch_key": compact_json(ids) if ids else "",
        "unknown_wall": unknown and unknown.wall,
        "unknown_boot": unknown and unknown.boot,
        "unknown_uptime_s": unknown and unknown.uptime_s,
    }


def run_of(row: sqlite3.Row, batches: Iterable[Batch]) -> Run:
    """Return the run that stands in a row."""
    values = {name: row[name] for name in _RUN}
    values |= {"phase": Phase(row["phase"]), "forced": bool(row["forced"])}
    values |= {"deadline_told": bool(row["deadline_told"])}
    values["next_at"] = math.inf if row["next_at"] is None else row["next_at"]
    unknown = None
    if row["unknown_wall"] is not None:
        unknown = BootTime(row["unknown_wall"], row["unknown_boot"], row["unknown_uptime_s"])
    target = Target(**{name: row[name] for name in _TARGET})
    return Run(**values, target=target, batches=tuple(batches), unknown_since=unknown)


def event_of(row: sqlite3.Row) -> Event:
    """Return the event that stands in a row."""
    fields_ = json.loads(row["fields"])
    about = (row["name"], row["level"], row["job"], row["run"])
    return Event(*about, fields_, row["text"], row["at"], row["id"])


class Store:
    """The state file. Every change is one transaction; what fails raises StorageError whole."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        db.row_factory = sqlite3.Row
        self.db = db
        self.path = path
        self._inode = inode_of(path)
        self._last_event_id: int | None = None

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open for acting, under the lock. Raises StateError for what is no state file.

        What is damaged, newer or not ours is refused before anything is written to it, through a
        connection that only reads. It fails where a first start was killed: then nothing is there
        but a hot journal, which the other one rolls back.
        """
        os.close(open_own(path))
        try:
            with (
                contextlib.suppress(sqlite3.OperationalError),
                contextlib.closing(
                    sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
                ) as reading,
            ):
                check_database(reading, path)
                check_undamaged(reading, path)
            db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            version = check_database(db, path)
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                message = f"{path}: this file system cannot do SQLite's WAL mode"
                raise StateError(message, "put state: on a local disk")
            # NORMAL does not sync commits: power loss could take back an intent that was acted on.
            db.execute("PRAGMA synchronous = FULL")
            store = cls(db, path)
            if version == 0:
                store.execute([(s, ()) for s in (*SCHEMA, f"PRAGMA user_version={SCHEMA_VERSION}")])
            # The loop stands still while it waits for another writer; what fails is tried again.
            db.execute("PRAGMA busy_timeout = 50")
        except sqlite3.Error as error:
            raise state_error(error, path) from None
        except StorageError as error:
            raise StateError(str(error)) from None
        return store

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path) -> Iterator[Store | None]:
        """Open for reading, beside a running daemon too; None where there is none yet.

        Without a WAL nobody writes, and SQLite is told so: else it would make files that root's
        `status` would leave to the daemon. Raises StateError where it cannot be read.
        """
        if not is_there(path):
            yield None
            return
        is_quiet = not is_there(path.with_name(path.name + "-wal"))
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_quiet else ''}"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as db:
                yield cls(db, path) if check_database(db, path) else None
        except sqlite3.Error as error:
            raise state_error(error, path, "read") from None

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
            raise StorageError(str(state_error(error, self.path, "write"))) from error

    def commit(
        self,
        runs: Iterable[tuple[Run | None, Run]],
        events: Sequence[Event],
        now: float,
        also: Iterable[Statement] = (),
    ) -> list[Event]:
        """Commit how runs have changed, from what to what, and the events that tell of it.

        Returns the events as they are stored. Raises StorageError.
        """
        last_id = self.last_event_id() if self._last_event_id is None else self._last_event_id
        stored = [replace(e, at=now, id=last_id + i) for i, e in enumerate(events, 1)]
        statements: list[Statement] = list(also)
        for before, after in runs:
            row = run_row(after)
            names = ", ".join(f'"{name}"' for name in row)
            marks = ", ".join("?" * len(row))
            statement = f"INSERT OR REPLACE INTO runs ({names}) VALUES ({marks})"
            statements.append((statement, list(row.values())))
            old = {batch.id: (i, batch) for i, batch in enumerate(before.batches if before else ())}
            for place, batch in enumerate(after.batches):
                if old.get(batch.id) != (place, batch):
                    statements.append(batch_statement(after.id, place, batch))
        statements += [
            (
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (e.id, e.at, e.level, e.name, e.job, e.run, json.dumps(dict(e.fields)), e.text),
            )
            for e in stored
        ]
        if statements:
            self.execute(statements)
        self._last_event_id = last_id + len(stored)
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
        columns = ", ".join(_BATCH)
        chosen = f"run_id IN (SELECT id FROM runs WHERE {where})"
        for row in self.db.execute(
            f"SELECT run_id, {columns} FROM batches WHERE {chosen} AND place >= 0"
            " ORDER BY run_id, place",
            parameters or {},
        ):
            _, batch_id, status, *rest = row
            batch = Batch(batch_id, status and sys.intern(status), *rest)
            batches.setdefault(row["run_id"], []).append(batch)
        rows = self.db.execute(f"SELECT * FROM runs WHERE {where} ORDER BY id", parameters or {})
        return [run_of(row, batches.get(row["id"], ())) for row in rows]

    def runs_for(self, jobs: Mapping[str, Job], *, recent: bool = True) -> list[Run]:
        """Return what a config is about: unfinished runs, those of its batch ids, the last groups.

        Of a job with `match`, finished runs are left out but for the last five and those that need
        attention. Also what may be at Keboola without its job is there.
        """
        names = compact_json(list(jobs))
        keys = compact_json(
            [compact_json(sorted(j.batch_ids)) for j in jobs.values() if not j.match]
        )
        in_config = "job IN (SELECT value FROM json_each(:names))"
        where = (
            f"phase IN ('sending', 'unknown', 'sent') OR (phase <> 'finished' AND {in_config})"
            f" OR (batch_key <> '' AND batch_key IN (SELECT value FROM json_each(:keys)))"
            f" OR (attention <> '' AND {in_config})"
        )
        last: list[int] = []
        for name in [name for name, job in jobs.items() if job.match] if recent else ():
            query = (
                "SELECT id FROM runs WHERE job = ? AND phase = 'finished'"
                " ORDER BY finished_at DESC LIMIT 5"
            )
            last += [row[0] for row in self.db.execute(query, (name,))]
        where += " OR id IN (SELECT value FROM json_each(:last))"
        return self.runs(where, {"names": names, "keys": keys, "last": compact_json(last)})

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
        return {row[0] for row in self.db.execute(query, (compact_json(list(ids)), job))}

    def one(self, query: str, *parameters: object) -> Any:  # noqa: ANN401 - a value of SQLite's
        """Return the first value of the first row of a query, or None."""
        row = self.db.execute(query, parameters).fetchone()
        return row and row[0]

    # --- events, meta ---

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
        return [event_of(row) for row in reversed(rows)]

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
        return "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value))

    def prune(self, jobs: Mapping[str, Job], retention_s: float, now: float) -> None:
        """Drop old events, and finished groups that no list is read back to. Folds the WAL in.

        The newest event stays, so that no number is given twice, and so does what a webhook has
        not had yet.
        """
        before = now - retention_s
        told = self.one("SELECT min(told_up_to) FROM webhooks")
        newest = self.last_event_id()
        most = min(newest - 1, newest if told is None else told)
        statements: list[Statement] = [
            (
                "DELETE FROM events WHERE id <= ? AND (at < ? OR id <= ?)",
                (most, before, newest - 200_000),
            )
        ]
        for name, job in jobs.items():
            if job.match:
                mark = (self.meta(f"read:{name}") or {}).get("to", 0.0)
                since = max(job.since, mark - 2 * HOUR_S)
                old = (
                    "SELECT id FROM runs WHERE job = ? AND phase = 'finished' AND finished_at < ?"
                    " AND attention = '' AND NOT EXISTS (SELECT 1 FROM batches b WHERE"
                    " b.run_id = runs.id AND coalesce(b.created_at, 9e99) >= ?)"
                )
                about = (name, before, since)
                statements.append((f"DELETE FROM batches WHERE run_id IN ({old})", about))
                statements.append((f"DELETE FROM runs WHERE id IN ({old})", about))
        self.execute(statements)
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("PRAGMA wal_checkpoint(PASSIVE)")


def batch_statement(run_id: int, place: int, batch: Batch) -> Statement:
    """Return what stores a batch; a `place` of -1 is that of one that came too late."""
    values = (run_id, place, *(getattr(batch, name) for name in _BATCH))
    names = ", ".join(("run_id", "place", *_BATCH))
    marks = ", ".join("?" * len(values))
    return f"INSERT OR REPLACE INTO batches ({names}) VALUES ({marks})", values


# ==================================================================================================
# 6. Http and Keboola: requests out, facts or an ApiError back
# ==================================================================================================

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
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
        """Start a call."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                future.set_exception(error)
            else:
                future.set_result(result)

        future.set_running_or_notify_cancel()
        threading.Thread(target=run, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002
        """Wait for nothing."""


@dataclass(frozen=True, slots=True)
class ProxyRules:
    """What the environment says of proxies; `$NO_PROXY` also with networks, ports and brackets."""

    proxies: Mapping[str, str]
    exempt: tuple[str, ...] = ()
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    unreadable: tuple[str, ...] = ()

    @classmethod
    def of_environment(cls) -> ProxyRules:
        """Read the environment (and on macOS the system's settings)."""
        proxies = urllib.request.getproxies()
        hosts, networks, unreadable = [], [], []
        for entry in re.split(r"[,\s]+", proxies.pop("no", "")):
            text = re.sub(r"^\[(.*)\](:[0-9]+)?$", r"\1", entry.strip().lower())
            try:
                networks.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                if re.fullmatch(r"\*|[*.]{0,2}[a-z0-9_-][a-z0-9._-]*(:[0-9]+)?", text):
                    hosts.append(text.partition(":")[0].lstrip("*.") if text != "*" else "*")
                elif text:
                    unreadable.append(entry)
        return cls(proxies, tuple(hosts), tuple(networks), tuple(unreadable))

    def proxy_for(self, url: str) -> str | None:
        """Return the proxy for an address; loopback never has one."""
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").lower()
        proxy = self.proxies.get(parts.scheme) or self.proxies.get("all")
        if not proxy or is_loopback(url) or "*" in self.exempt:
            return None
        if any(host == name or host.endswith(f".{name}") for name in self.exempt):
            return None
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(host)
            if any(address in network for network in self.networks):
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

    @property
    def date(self) -> float | None:
        """The server's time, as Unix seconds."""
        return http_date(self.headers.get("date", ""))

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
    """The one way out: a limit, a deadline for the whole request, a cap on the answer, redaction."""

    def __init__(self, config: Config, redactor: Redactor) -> None:
        self.rules = ProxyRules.of_environment()
        self._redactor = redactor
        self._clients: dict[str | None, httpx.AsyncClient] = {}
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
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=10, keepalive_expiry=30
                ),
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
        self,
        url: str,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        timeout_s: float = math.inf,
    ) -> Answer:
        """Return the answer to one GET. Raises ApiError where none came in time."""
        proxy = self.rules.proxy_for(url)
        if proxy not in self._clients:
            self._clients[proxy] = self._new_client(url)
        async with self._places:
            timeout_s = max(1.0, min(self.timeout_s, timeout_s))
            client = self._clients[proxy]
            return await self._fetch(client, timeout_s, "GET", url, headers=headers, params=params)

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

        async with self._places, self._new_client(url) as client:
            parts = {"headers": headers, "content": body.encode(), "extensions": {"trace": trace}}
            try:
                timeout_s = min(self.timeout_s, timeout_s)
                return await self._fetch(client, timeout_s, "POST", url, **parts)
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
            raise ApiError(self._words(error), retryable=True, sent=was_sent(error)) from None
        body = self._redactor.body(body, is_data=response.is_success)
        names = (
            "content-type",
            "date",
            "retry-after",
            "retry-after-ms",
            "x-request-id",
            "x-should-retry",
        )
        told = {name: response.headers[name] for name in names if name in response.headers}
        headers = {name: self._redactor.text(value) for name, value in told.items()}
        return Answer(response.status_code, headers, body)

    def _words(self, error: Exception) -> str:
        """Return what went wrong with a connection, without any secret."""
        text = one_line(self._redactor.text(str(error)), 200)  # in this order: no half a secret
        cure = ""
        if "CERTIFICATE_VERIFY_FAILED" in text:
            cure = "; where a proxy inspects TLS, set SSL_CERT_FILE to its certificate authority"
        return f"{type(error).__name__}{': ' + text if text else ''}{cure}"

    @staticmethod
    async def _read(response: httpx.Response) -> bytes:
        """Return the body, capped while it streams; nobody asked for compression."""
        if response.headers.get("content-encoding", "").lower() not in {"", "identity"}:
            raise ApiError("the answer has an encoding that was not asked for")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise TooLargeError("the answer is over 16 MiB", retryable=True)
        return bytes(body)


def was_sent(error: Exception) -> bool:
    """Return whether something of a request may have reached the server, by httpx's exception."""
    not_sent = (
        httpx.ConnectError,
        httpx.ConnectTimeout,
        httpx.PoolTimeout,
        httpx.UnsupportedProtocol,
        httpx.InvalidURL,
        UnicodeError,  # from idna, for a host name that is none
    )
    return not isinstance(error, not_sent)


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

    async def next_attempt() -> Any:  # noqa: ANN401
        return await attempt(until - time.monotonic())

    return await retrying(next_attempt)


# --- reading what came ----------------------------------------------------------------------------


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
    counts = data.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    errors = data.get("errors")
    errors = errors.get("data") if isinstance(errors, dict) else errors
    first = errors[0] if isinstance(errors, list) and errors else None
    ended = (data.get(f"{name}_at") for name in (status, "completed", "failed", "expired"))
    return Batch(
        id=batch_id,
        status=status,
        total=count_or_none(counts.get("total")),
        completed=count_or_none(counts.get("completed")),
        failed=count_or_none(counts.get("failed")),
        output_file_id=id_or_none(data, "output_file_id"),
        error_file_id=id_or_none(data, "error_file_id"),
        created_at=time_or_none(data.get("created_at")),
        expires_at=time_or_none(data.get("expires_at")),
        ended_at=next(filter(None, map(time_or_none, ended)), None)
        if STATUS_RANK.get(status) == 3
        else None,
        error=text_or_none(first.get("message")) if isinstance(first, dict) else None,
    )


def http_date(text: str) -> float | None:
    """Return a date of an HTTP header as Unix seconds, or None."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
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
        data = answer.json()
    except ApiError:
        return ""
    if not isinstance(data, dict):
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
    words = message if error in {None, "error"} else error
    words = words or reason or detail
    exception_id = text_or_none(data.get("exceptionId"), 100)
    return (f": {words}" if words else "") + (
        f" (exceptionId {exception_id})" if exception_id else ""
    )


def http_error(server: str, answer: Answer) -> ApiError:
    """Return what an answer that is no success means, with the server's own words for it."""
    should_retry = answer.headers.get("x-should-retry", "")
    retryable = answer.status in {408, 409, 429} or not 400 <= answer.status < 500
    if should_retry in {"true", "false"}:
        retryable = should_retry == "true"
    message = f"{server} answered {answer.status}{server_words(answer)}"
    return answer.error(message, retryable=retryable)


async def noted(request: Awaitable[Answer], server: str, note: Note) -> Answer:
    """Return a successful answer, and tell what became of the request. Raises its ApiError."""
    try:
        answer = await request
    except ApiError as error:
        note(error, None)
        raise
    error = None if answer.is_success else http_error(server, answer)
    note(error, answer.date)
    if error:
        raise error
    return answer


# --- Keboola --------------------------------------------------------------------------------------


def carried_trigger_id(data: object) -> str | None:
    """Return the trigger id among a job's variables; "" is another's, None is not told."""
    values = data.get("values") if isinstance(data, dict) else data
    if not isinstance(values, list) or not values:
        return None
    for item in values:
        if isinstance(item, dict) and item.get("name") == "teckochecker_trigger_id":
            return str(item.get("value"))
    return ""


def parse_keboola_job(row: object) -> KeboolaJob:
    """Return a job of Keboola's queue. Raises ValueError for what is none."""
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    job_id = row.get("id")
    if isinstance(job_id, bool) or not isinstance(job_id, str | int) or not one_line(str(job_id)):
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
    project = row.get("project")
    project_id = project.get("id") if isinstance(project, dict) else None
    result = row.get("result")
    result = result if isinstance(result, dict) else {}
    error = result.get("error")
    message = text_or_none(result.get("message"), 1000)
    exception_id = text_or_none(error.get("exceptionId")) if isinstance(error, dict) else None
    if exception_id:
        message = f"{message or 'no message'} (exceptionId {exception_id})"
    return KeboolaJob(
        one_line(str(job_id), 64),
        status,
        is_finished,
        one_line(str(project_id), 64) if isinstance(project_id, str | int) else "",
        message,
        created,
        carried_trigger_id(row.get("variableValuesData")),
    )


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

    def _noted(self, error: ApiError | None, date: float | None) -> None:
        if date is not None:
            self.skew_s = date - self._clock.now()
        self._note(error, date)

    async def _get(
        self, url: str, params: Mapping[str, str] | None = None, *, with_token: bool = True
    ) -> Any:  # noqa: ANN401 - JSON
        """Return the JSON of a GET. Raises ApiError after the retries."""
        headers = self._headers if with_token else {}
        # Without the token, an answer says nothing of it.
        note: Note = self._noted if with_token else (lambda error, date: None)

        async def attempt(left_s: float) -> Any:  # noqa: ANN401
            try:
                got = self._http.get(url, headers, params, left_s)
                return (await noted(got, "Keboola", note)).json()
            except TooLargeError as error:
                error.retryable = False  # a smaller page is asked for
                raise

        return await with_retries(attempt)

    async def queue_url(self) -> str:
        """Return the queue's address: by the stack's name, or as the stack's index says."""
        parts = urllib.parse.urlsplit(self.stack_url.lower())
        if parts.netloc.startswith("connection."):
            return f"{parts.scheme}://queue.{parts.netloc.removeprefix('connection.')}"
        if not self._queue_url:
            index = await self._get(f"{self.stack_url}/v2/storage", with_token=False)
            services = index.get("services") if isinstance(index, dict) else None
            found = [
                str(service.get("url")).rstrip("/")
                for service in (services if isinstance(services, list) else ())
                if isinstance(service, dict) and service.get("id") == "queue"
            ]
            good = [url for url in found if not url_problem(url)]
            if not good or is_loopback(good[0]) > is_loopback(self.stack_url):
                message = f"{self.stack_url}/v2/storage lists no usable https address of the queue"
                raise ApiError(message, sent=False)
            self._queue_url = good[0]
        return self._queue_url

    async def verify(self) -> Mapping[str, Any]:
        """Return what Keboola says of the token: its project, its rights, whether it expires."""
        said = await self._get(f"{self.stack_url}/v2/storage/tokens/verify")
        return said if isinstance(said, dict) else {}

    async def project(self) -> str:
        """Return the id of the token's project; asked once. Raises ApiError."""
        if not self._project:
            owner = (await self.verify()).get("owner")
            project = owner.get("id") if isinstance(owner, dict) else None
            if isinstance(project, bool) or not isinstance(project, str | int) or project == "":
                message = f"{self.stack_url} does not say which project the token belongs to"
                raise ApiError(message, sent=False)
            self._project = one_line(str(project), 64)
        return self._project

    async def configuration(self, target: Target) -> Mapping[str, Any]:
        """Return a configuration as Keboola has it. Raises ApiError, with status 404 for none."""
        branch = f"/branch/{target.branch_id}" if target.branch_id else ""
        path = f"components/{target.component_id}/configs/{target.config_id}"
        said = await self._get(f"{self.stack_url}/v2/storage{branch}/{path}")
        return said if isinstance(said, dict) else {}

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
            return parse_keboola_job(await self._get(url))
        except ValueError as error:
            raise ApiError(f"Keboola's job {job_id} {error}", retryable=True) from None

    # --- searching ---

    async def search(
        self, target: Target, since: float, trigger: str
    ) -> tuple[BootTime, list[KeboolaJob]]:
        """Return when a search began, and the jobs that carry a trigger id, the oldest first.

        `since` is by our clock. Nothing found is said only after a complete search; an incomplete
        one raises ApiError. Who waits for the same configuration shares one search.
        """
        asked = self._clock.boot_time()
        key = (target.component_id, target.config_id)
        shared = self._searches.setdefault(key, SharedSearch())
        shared.wanted.append(since)
        try:
            async with shared.lock:
                began = shared.began
                if began is None or began.uptime_s < asked.uptime_s or shared.since > since:
                    began = shared.began = self._clock.boot_time()
                    shared.since, shared.jobs = min(shared.wanted), {}
                    shared.failure = await self._read_pages(target, shared)
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
                page = await self._page(
                    "search/jobs", params | {"limit": str(limit), "offset": str(offset)}
                )
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


# ==================================================================================================
# 7. Engine: what runs
# ==================================================================================================


class LogWriter:
    """Writes lines to standard error from a thread of its own: a reader that is slow, full or gone
    never holds up the loop. What does not fit is dropped and counted.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(10_000)
        self._dropped = 0
        self._thread: threading.Thread | None = None
        is_ours = False
        with contextlib.suppress(OSError):
            status = os.fstat(2)
            is_ours = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
        self.has_priorities = is_ours  # journald takes them from the beginning of a line

    def msg(self, line: str) -> None:
        """Write a line, as structlog's loggers do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        try:
            if self._dropped:
                self._lines.put_nowait(f"({self._dropped} lines of the log were dropped)")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = error = critical = msg

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            data = f"{line}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data) :]

    def close(self) -> None:
        """Wait a moment until what was written has arrived."""
        if self._thread:
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(1.0)


def configure_logging(config: Config, redactor: Redactor, writer: LogWriter) -> None:
    """Send events, and the warnings of libraries, to standard error through one redactor."""
    is_console = config.log_format == "console" or (
        config.log_format == "auto" and sys.stderr is not None and sys.stderr.isatty()
    )
    priorities = {"debug": 7, "info": 6, "warning": 4, "error": 3}

    def render(_: object, level: str, line: Mapping[str, Any]) -> str:
        head = {name: line[name] for name in ("time", "level", "event", "text")}
        told = redactor.tree(head | dict(line))  # the last before the line is made
        prefix = f"<{priorities.get(level, 3)}>" if writer.has_priorities else ""
        if not is_console:
            return prefix + json.dumps(told, ensure_ascii=False)
        at = datetime.fromisoformat(told["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        mark = "" if level == "info" else f"{level}: "
        return f"{prefix}{at} {mark}{told['text']}" + "".join(
            f"\n{line}" for line in told.get("traceback", "").splitlines()
        )

    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,
    )

    class Forwarder(logging.Handler):
        """Passes on what a library has to say."""

        def emit(self, record: logging.LogRecord) -> None:
            text = one_line(record.getMessage(), 1000)
            say(Event("library_warning", "warning", None, None, {"logger": record.name}, text))

    logging.raiseExceptions = False
    logging.getLogger().handlers = [Forwarder()]
    logging.getLogger().setLevel(logging.WARNING)  # httpx logs URLs at INFO, httpcore headers
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)  # see DaemonThreads


def say(event: Event) -> None:
    """Write one event to the log."""
    document = replace(event, at=event.at or time.time()).document()
    log = getattr(structlog.get_logger(), document["level"])
    log(document.pop("event"), **{"time": document.pop("time"), **document})


class ServiceManager:
    """The service manager's side of the process (sd_notify(3)); silent where there is none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = env.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog_us) / 1e6 if ours and watchdog_us.isdigit() else None

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
    try:
        async with asyncio.timeout(max(0.0, timeout_s) if math.isfinite(timeout_s) else None):
            await event.wait()
    except TimeoutError:
        pass
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
    newest_at: float = 0.0
    is_stale: bool = False

    def missing(self) -> list[Batch]:
        """Return the due batches that no page has shown, the newest first."""
        seen = self.unchanged.keys() | self.changed
        return sorted(
            (batch for key, batch in self.due.items() if key not in seen),
            key=lambda batch: -(batch.created_at or 0.0),
        )

    @property
    def overhead(self) -> int:
        """How many requests pages have cost beyond what they have saved."""
        return self.pages - len(self.unchanged)

    def take(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Note what a page shows; returns how many due batches."""
        before = len(self.unchanged) + len(self.changed)
        self.pages += 1
        for row in rows:
            known = self.known.get(row["id"])
            if known is not None:
                self._take_row(row, known)
        ages = [
            at
            for row in rows[:: max(1, len(rows) - 1)]
            if (at := time_or_none(row.get("created_at")))
        ]
        if ages:
            self.newest_at = max(self.newest_at, *ages)
            self.span_s = max(self.span_s if len(rows) < 100 else 1.0, max(ages) - min(ages))
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
        counts = counts if isinstance(counts, dict) else {}
        told = [counts.get(name) for name in ("total", "completed", "failed")]
        if told != [known.total, known.completed, known.failed] and None not in told:
            total, completed, failed = map(count_or_none, told)
            known = replace(known, total=total, completed=completed, failed=failed)
        self.unchanged[known.id] = known


class Account:
    """One OpenAI key: polls the batches of its runs, and finds new ones.

    Due batches are polled together. Pages of the account's list are a hint and save requests; what
    counts is a batch's own answer. A request that hangs is left to its deadline while the loop goes
    on. A poll takes at most two requests more than single GETs would, apart from the pages that new
    batches are looked for on.
    """

    def __init__(self, engine: Engine, entry: SecretEntry, identity: tuple[Any, ...]) -> None:
        """Take what tells this account from another one: the key first, then how it is used."""
        key: Secret = identity[0]
        self.name = entry.name
        self.base_url = entry.base_url
        self.identity = identity
        self.run_ids: set[int] = set()  # of the runs that it polls
        self.finders: list[Job] = []  # the jobs that it finds batches for
        self.wake = asyncio.Event()
        self._engine = engine
        self._headers = {entry.auth_header: key.reveal()}
        if entry.auth_header == "Authorization":
            self._headers = {"Authorization": f"Bearer {key.reveal()}"}
        if entry.organization:
            self._headers["OpenAI-Organization"] = entry.organization
        if entry.project:
            self._headers["OpenAI-Project"] = entry.project
        self._params = {"api-version": entry.api_version} if entry.api_version else {}
        self._places = asyncio.Semaphore(engine.http.max_concurrency)  # before those of all
        self._waiting: dict[str, list[int]] = {}  # batches that are asked for, and for which runs
        self._answers: dict[int, dict[str, Batch | ApiError]] = {}  # of runs that are being polled
        self._complete: list[int] = []  # of these, what can be recorded
        self._answered_at: dict[str, float] = {}
        self.until = math.inf  # when `run` sees again what is due
        self._in_flight = 0
        self._silences = 0  # requests in a row that no answer came to
        self._held_until = -math.inf
        self._last_words = ""
        self._list_from = -math.inf  # when pages may be read again
        self._list_failures = 0
        self._find_at = -math.inf
        self._find_failures = 0
        self._told_without_group: set[str] = set()

    # --- requests ---

    async def _get(self, path: str, params: Mapping[str, str], left_s: float) -> Answer:
        engine = self._engine
        url = f"{self.base_url}{path}"
        note = functools.partial(engine.note_request, self.name)
        self._in_flight += 1
        try:
            got = engine.http.get(url, self._headers, {**self._params, **params}, left_s)
            return await noted(got, "OpenAI", note)
        finally:
            self._in_flight -= 1

    def _refusal(self) -> ApiError | None:
        """Return what stands in the way of any request, where that takes long.

        A dead server holds each request to its deadline: one at a time finds out when it is back,
        and the places are left to other accounts.
        """
        left_s = self._held_until - self._engine.clock.uptime_s()
        if left_s > PATIENCE_S:
            return ApiError(self._last_words, status=429, retry_after_s=left_s, sent=False)
        if self._silences >= 5 and self._in_flight:
            return ApiError(self._last_words, sent=False)
        return None

    async def ask(self, batch_id: str) -> Batch:
        """Return a batch's own answer, the one that counts. Raises ApiError after the retries."""
        clock = self._engine.clock

        async def attempt(left_s: float) -> Batch:
            while (held_s := self._held_until - clock.uptime_s()) > 0 and not self._refusal():
                await asyncio.sleep(held_s)
            refusal = self._refusal()
            if refusal:
                raise refusal
            try:
                answer = await self._get(f"/batches/{batch_id}", {}, left_s)
                batch = self._batch_of(answer, batch_id)
            except ApiError as error:
                self._note(error)
                raise
            self._silences = 0
            return batch

        batch: Batch = await with_retries(attempt)
        self._answered_at[batch_id] = clock.uptime_s()
        return batch

    def _batch_of(self, answer: Answer, batch_id: str) -> Batch:
        try:
            return parse_batch(answer.json(), batch_id)
        except ValueError as error:
            message = f"OpenAI's answer is not a batch: it {error}{server_words(answer)}"
            raise answer.error(message, retryable=True) from None

    def _note(self, error: ApiError) -> None:
        """Remember what a failure says about the account as a whole, and what a 404 means."""
        self._silences = self._silences + 1 if error.status is None else 0
        if error.status is None or (error.status == 429 and error.retry_after_s):
            self._last_words = str(error)
        if error.status == 429 and error.retry_after_s:
            until = self._engine.clock.uptime_s() + min(error.retry_after_s, HOUR_S)
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
        good = [
            row
            for row in rows
            if isinstance(row, dict) and isinstance(row.get("id"), str) and row["id"]
        ]
        return good, bool(good) and data.get("has_more") is not False

    # --- the loop ---

    async def run(self) -> None:
        """Poll what is due, and find what is new, until cancelled; with --once, all of it, once."""
        engine, clock = self._engine, self._engine.clock
        while not engine.is_stopping:
            self.wake.clear()
            now = clock.now()
            idle = [engine.runs[i] for i in self.run_ids if i not in self._answers]
            is_finding = bool(self.finders) and self._find_at <= now
            if is_finding or any(run.next_at <= now for run in idle):
                try:
                    due = [run for run in idle if run.next_at <= now + self._early_s(run)]
                    await self._poll(due, is_finding=is_finding)
                except (StorageError, sqlite3.Error) as error:
                    engine.note_trouble(error)
                    self._find_at = clock.now() + 5
                except Exception as error:  # noqa: BLE001 - a bug in one account is not the others'
                    engine.note_bug(error, self.name)
                    self._find_at = clock.now() + MINUTE_S
            waiting = [engine.runs[i].next_at for i in self.run_ids if i not in self._answers]
            self.until = min([*waiting, self._find_at if self.finders else math.inf], default=0)
            # A suspended machine's timers stand still: none is longer than half a minute.
            await wait_for_event(self.wake, min(30.0, self.until - clock.now()))

    def _early_s(self, run: Run) -> float:
        """Return how early a run may be polled together with one that is due."""
        job = self._engine.job_of(run)
        return min(job.poll_interval / 10, MINUTE_S) if job else 0.0

    async def run_once(self) -> None:
        """Poll all runs once, and those that are found meanwhile."""
        engine = self._engine
        polled: set[int] = set()
        is_finding = bool(self.finders)
        while True:
            runs = [engine.runs[i] for i in self.run_ids if i not in polled]
            if not runs and not is_finding:
                return
            polled |= {run.id for run in runs}
            try:
                await self._poll(runs, is_finding=is_finding)
            except (StorageError, sqlite3.Error) as error:
                engine.note_trouble(error)
            is_finding = False
            while self._answers and not engine.is_stopping:
                self.wake.clear()
                await self.wake.wait()

    async def _poll(self, runs: Sequence[Run], *, is_finding: bool) -> None:
        """Begin the poll of some runs; it ends when each of their batches has answered."""
        due: dict[str, Batch] = {}  # what nobody is asking for yet
        known: dict[str, Batch] = {}
        for run in runs:
            known |= {batch.id: batch for batch in run.batches}
            pending = [batch for batch in run.batches if not batch.is_final]
            self._answers[run.id] = {}
            for batch in pending:
                if batch.id not in self._waiting:
                    due[batch.id] = batch
                self._waiting.setdefault(batch.id, []).append(run.id)
            if not pending:
                self._complete.append(run.id)
        reading = ListReading(due, known)
        seen_before = sum(batch.status is not None for batch in due.values())
        is_usable = self._list_from <= self._engine.clock.uptime_s() and not self._refusal()
        pays = seen_before >= 5 and is_usable
        if is_finding or pays:
            await self._read_list(reading, pays=pays, is_finding=is_finding)
        oldest = self._oldest_answer(reading)
        for batch_id, batch in reading.unchanged.items() if pays and not reading.is_stale else ():
            if batch_id != oldest:
                self._hear(batch_id, batch)
        self._engine.spawn(self._ask_all([key for key in due if key in self._waiting]))
        self._record()

    def _oldest_answer(self, reading: ListReading) -> str | None:
        """Return the batch to be asked for by itself beside a list: the one that was not longest."""
        if reading.overhead > 1:
            return None
        return min(
            reading.unchanged, key=lambda key: self._answered_at.get(key, -math.inf), default=None
        )

    async def _ask_all(self, batch_ids: Iterable[str]) -> None:
        """Ask for batches one by one, as many at a time as the account may."""
        async with asyncio.TaskGroup() as group:
            for batch_id in batch_ids:
                await self._places.acquire()
                group.create_task(self._ask_one(batch_id))

    async def _ask_one(self, batch_id: str) -> None:
        answer: Batch | ApiError
        try:
            answer = await self.ask(batch_id)
        except ApiError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - a bug that one batch meets is not the others'
            self._engine.note_bug(error, batch_id)
            answer = ApiError(f"internal error: {type(error).__name__}")
        finally:
            self._places.release()
        self._hear(batch_id, answer)

    def _hear(self, batch_id: str, answer: Batch | ApiError) -> None:
        """Take a batch's answer for all runs that wait for it."""
        if not self._complete:  # what is answered together is recorded as one
            asyncio.get_running_loop().call_soon(self._record)
        for run_id in self._waiting.pop(batch_id, ()):
            answers = self._answers.get(run_id)
            run = self._engine.runs.get(run_id)
            if answers is None:
                continue
            answers[batch_id] = answer
            if run is None or all(b.id in answers for b in run.batches if not b.is_final):
                self._complete.append(run_id)

    def _record(self) -> None:
        """Have the engine record the polls that are complete."""
        complete, self._complete = self._complete, []
        came = [
            (run_id, self._answers.pop(run_id)) for run_id in complete if run_id in self._answers
        ]
        if not came:
            return
        self._engine.record_polls(came)
        found = (self._engine.runs.get(run_id) for run_id, _ in came)
        if self._engine.once or any(run and run.next_at < self.until for run in found):
            self.wake.set()

    def find_soon(self) -> None:
        """Have new batches found at once: the jobs that find them may be others now."""
        self._find_at = -math.inf
        self.wake.set()

    def forget(self, run_id: int) -> None:
        """Stop polling a run."""
        self.run_ids.discard(run_id)
        self._answers.pop(run_id, None)
        self.wake.set()

    # --- the list ---

    async def _read_list(self, reading: ListReading, *, pays: bool, is_finding: bool) -> None:
        """Read the pages of the list that are needed to find, and those that save requests."""
        finding = Finding(self._engine, self.finders) if is_finding else None
        try:
            cursor: str | None = None
            while True:
                rows, has_more = await self.page(cursor)
                shown = reading.take(rows)
                is_needed = finding is not None and self._find(finding, rows)
                is_worth_it = pays and shown >= 2 and bool(reading.missing())
                if not has_more or not (is_needed or is_worth_it):
                    break
                cursor = rows[-1]["id"]
            if finding:
                self._end_finding(finding, reading.newest_at)
            if pays:
                await self._read_clusters(reading)
                self._note_list(None, is_stale=reading.is_stale)
        except ApiError as error:
            if finding:
                self._note_find_failure(error)
            if pays:
                self._note_list(error)

    async def _read_clusters(self, reading: ListReading) -> None:
        """Read a page after each batch that others were created close to, while that saves."""
        missing = reading.missing()
        while missing and reading.overhead <= 1:
            first, *missing = missing
            if first.created_at is None:
                return
            close = [b for b in missing if (b.created_at or 0) >= first.created_at - reading.span_s]
            if len(close) < 2:
                continue
            cursor, shown, has_more = first.id, 2, True
            while shown >= 2 and has_more and reading.overhead <= 1:
                try:
                    rows, has_more = await self.page(cursor)
                except ApiError as error:
                    if error.status not in {400, 404}:  # the list has lost the cursor
                        raise
                    reading.pages += 1
                    break
                shown = reading.take(rows)
                left = {batch.id for batch in reading.missing()}
                missing = [batch for batch in missing if batch.id in left]
                last_at = time_or_none(rows[-1].get("created_at")) if rows else None
                if not any((b.created_at or 0) >= (last_at or 0) - reading.span_s for b in missing):
                    break
                cursor = rows[-1]["id"] if rows else cursor

    def _note_list(self, error: ApiError | None, *, is_stale: bool = False) -> None:
        """Do without the list for a while after a failure, for a day where there is none."""
        was_usable = self._list_failures == 0
        if error is None and not is_stale:
            if not was_usable:
                self._engine.log(Event.of("list_usable", secret=self.name))
            self._list_failures = 0
            return
        self._list_failures += 1
        wait_s = float(DAY_S)
        if error and (error.retryable or error.status == 429):
            jitter = self._engine.clock.jitter()
            wait_s = backoff_s(self._list_failures, MINUTE_S, jitter, error.retry_after_s)
        self._list_from = self._engine.clock.uptime_s() + wait_s
        if was_usable and not (error and error.status == 429):
            why = error or "it shows older statuses than the batches' own answers"
            self._engine.log(Event.of("list_not_usable", secret=self.name, error=str(why)))

    # --- finding ---

    def _find(self, finding: Finding, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Have the runs begun or joined that a page's rows belong to; returns if more are needed."""
        for job in finding.jobs:
            found = []
            for row in rows:
                with contextlib.suppress(ValueError):
                    found.append(row_of(row))
            self._find_for(job, [row for row in found if row.is_of(job)])
        ages = [at for row in rows if (at := time_or_none(row.get("created_at")))]
        return finding.needs_more(min(ages, default=0.0))

    def _find_for(self, job: Job, rows: Sequence[Row]) -> None:
        engine = self._engine
        known = engine.store.known_batches(job.name, [row.batch.id for row in rows])
        new = [row for row in rows if row.batch.id not in known]
        if not new:
            return
        for row in new if job.group_by else ():
            if not row.metadata.get(str(job.group_by)):
                self._note_without_group(job, row.batch.id)
        groups = {
            row.metadata.get(job.group_by, "") if job.group_by else row.batch.id for row in new
        }
        runs = engine.store.groups(job.name, groups)
        runs |= {g: engine.runs[run.id] for g, run in runs.items() if run.id in engine.runs}
        target = engine.loaded.config.target(job)
        engine.take_found(group_batches(job, target, new, runs, engine.clock.now()))

    def _note_without_group(self, job: Job, batch_id: str) -> None:
        """Tell once of a batch that lacks what it would be grouped by."""
        query = (
            "SELECT 1 FROM events WHERE job = ? AND name = 'batch_without_group'"
            " AND json_extract(fields, '$.batch_id') = ?"
        )
        if batch_id not in self._told_without_group:
            self._told_without_group.add(batch_id)
            if not self._engine.store.one(query, job.name, batch_id):
                event = Event.of("batch_without_group", batch_id=batch_id, group_by=job.group_by)
                text = f"{job.name}: {event.text}"
                self._engine.log(replace(event, job=job.name, text=text))

    def _end_finding(self, finding: Finding, newest_at: float) -> None:
        """Remember how far the list was read back to, completely."""
        now = self._engine.clock.now()
        if self._find_failures:
            self._engine.log(Event.of("find_recovered", secret=self.name))
        self._find_failures = 0
        self._find_at = now + min(job.poll_interval for job in finding.jobs)
        self._engine.commit([], also=finding.marks(newest_at))

    def _note_find_failure(self, error: ApiError) -> None:
        self._find_failures += 1
        if self._find_failures == 1:
            self._engine.log(Event.of("find_failed", secret=self.name, error=str(error)))
        interval_s = min(job.poll_interval for job in self.finders)
        jitter = self._engine.clock.jitter()
        wait_s = backoff_s(self._find_failures, interval_s, jitter, error.retry_after_s)
        self._find_at = self._engine.clock.now() + wait_s


def row_of(row: Mapping[str, Any]) -> Row:
    """Return a row of the list for finding. Raises ValueError for what is none.

    A row is a hint: one that says that its batch is finished leaves that to its own answer.
    """
    batch = parse_batch(row, row["id"])
    if batch.is_terminal:
        batch = Batch(batch.id, created_at=batch.created_at)
    batch = replace(batch, output_file_id=None, error_file_id=None)
    metadata = row.get("metadata")
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return Row(batch, {str(key): value for key, value in pairs if isinstance(value, str)})


class Finding:
    """How far an account's list has to be read back for new batches.

    To the newest row that was there at the last complete read, with an hour's overlap (a row may
    show up late) of at most two pages more than what is new; or to `since`.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self._marks: dict[str, float] = {}
        for job in jobs:
            mark = engine.store.meta(f"read:{job.name}") or {}
            if mark.get("key") == self._key(job):
                self._marks[job.name] = mark["to"]
        self._new_to = min(self._marks.get(job.name, job.since) for job in jobs)
        self._floor = min(
            max(job.since, self._marks.get(job.name, job.since) - HOUR_S) for job in jobs
        )
        self._pages_beyond = 0

    @staticmethod
    def _key(job: Job) -> str:
        return compact_json([job.match_key, job.since, job.openai_secret])

    def needs_more(self, oldest_at: float) -> bool:
        """Return whether to read on after a page whose oldest row was created at a time."""
        if oldest_at <= self._new_to:
            self._pages_beyond += 1
        return oldest_at > self._floor and self._pages_beyond <= 2

    def marks(self, newest_at: float) -> list[Statement]:
        """Return what stores that the list was read completely, where that is new."""
        return [
            Store.meta_statement(f"read:{job.name}", {"key": self._key(job), "to": newest_at})
            for job in self.jobs
            if newest_at > self._marks.get(job.name, 0.0) or job.name not in self._marks
        ]


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
        if action is Action.IDLE:
            return
        wait_s = run.next_at - engine.clock.now()
        if engine.once and action is Action.FOLLOW:
            if run_id in engine.followed:
                return
            wait_s = 0.0
        try:
            if wait_s > 0:
                if engine.once and wait_s > PATIENCE_S:
                    return
                await wait_for_event(engine.wakes[run_id], min(wait_s, 30.0))
                engine.wakes[run_id].clear()
            elif action is Action.ARM:
                engine.commit([(replace(as_intended(run, run.next_at), error=run.error), [])])
            elif action is Action.FOLLOW:
                await follow_run(engine, run)
            else:
                await search_and_start(engine, run)
            failures = 0
        except StorageError as error:
            failures += 1
            engine.note_trouble(error, run)
            if engine.once:
                return
            await asyncio.sleep(min(PATIENCE_S, backoff_s(failures, 1, engine.clock.jitter())))
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug that one run meets is not the others'
            engine.note_bug(error, run.name)
            if engine.once:
                return
            await asyncio.sleep(MINUTE_S)


async def search_and_start(engine: Engine, run: Run) -> None:
    """Search Keboola for a run's job; start it where the search allows that."""
    clock, grace_s = engine.clock, engine.loaded.config.trigger_grace
    job = engine.job_of(run)
    follow = job is None or job.follow
    began = clock.boot_time()
    came: list[KeboolaJob] | ApiError
    keboola = None
    try:
        if run.sending_at is None and job:
            keboola = engine.keboolas[job.keboola_secret]
            target = replace(engine.loaded.config.target(job), project=await keboola.project())
            if engine.runs.get(run.id) is not run or engine.job_of(run) is not job:
                return
            run = engine.commit_aimed(as_aimed(run, job, target, keboola.token), before=run)
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
    is_ours = keboola is not None and engine.keboolas.get(keboola.name) is keboola
    may_post = engine.may_post(run) and is_ours
    if not came and began.uptime_s < engine.empty_counts_from:
        engine.commit(
            [(replace(run, next_at=clock.now() + engine.empty_counts_from - began.uptime_s), [])]
        )
        return
    change = after_search(
        run,
        came,
        began=began,
        may_post=may_post,
        follow=follow,
        grace_s=grace_s,
        now=clock.now(),
        jitter=clock.jitter(),
    )
    if change[0].phase is not Phase.SENDING or keboola is None:
        if change[0] != run:
            engine.commit([change])
        return
    engine.check_in_place()
    engine.commit([change])  # nothing was awaited since the search was judged
    await post_run(engine, keboola, change[0].id)


async def post_run(engine: Engine, keboola: Keboola, run_id: int) -> None:
    """Send a run that was committed as SENDING, and commit what came of it, however long it takes."""
    clock = engine.clock
    run = engine.runs[run_id]
    engine.lock.note_post(clock.boot_time())
    engine.posting.add(run_id)
    came: KeboolaJob | ApiError
    try:
        try:
            came = await keboola.create(run.payload)
        except ApiError as error:
            came = error
        job = engine.job_of(run)
        change = after_post(
            engine.runs[run_id],
            came,
            follow=job is None or job.follow,
            grace_s=engine.loaded.config.trigger_grace,
            now=clock.boot_time(),
            jitter=clock.jitter(),
        )
        # The outcome is known only here. With --once, the next pass finds `sending`, and searches.
        give_up_at = clock.uptime_s() + (PATIENCE_S if engine.once else math.inf)
        while True:
            try:
                engine.commit([change])
            except StorageError as error:
                if clock.uptime_s() > give_up_at:
                    raise
                engine.note_trouble(error, run)
                await asyncio.sleep(1)
            else:
                return
    finally:
        engine.posting.discard(run_id)


async def follow_run(engine: Engine, run: Run) -> None:
    """Look once at a run's Keboola job."""
    engine.followed.add(run.id)
    config, job = engine.loaded.config, engine.job_of(run)
    came: KeboolaJob | ApiError
    try:
        came = await (await engine.keboola_for(run)).job(str(run.keboola_job_id))
    except ApiError as error:
        came = error
    if engine.runs.get(run.id) is not run:
        return
    change = after_follow(
        run,
        came,
        poll_interval_s=job.poll_interval if job else 5 * MINUTE_S,
        follow_interval_s=config.follow_interval,
        retry_on_error=job.retry_on_error if job and not job.rests else 0,
        now=engine.clock.now(),
        jitter=engine.clock.jitter(),
    )
    engine.commit([change])


# --- everything -----------------------------------------------------------------------------------


class Engine:
    """What runs: applies a config, has accounts polled, runs driven, and commits what came of it.

    `apply` takes a new config at any time; `run` works until it is cancelled or, with --once, until
    every unfinished run has had its poll and its step.
    """

    def __init__(  # noqa: PLR0913 - what it works with
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
        self.followed: set[int] = set()  # runs whose Keboola job was looked at in this process
        self.stats = store.stats()
        self.is_stopping = False
        self.has_failed = False  # something could not be written, or a bug was met
        self.config_error: str | None = None
        self.told: list[asyncio.Event] = []  # set whenever something was committed
        self.empty_counts_from = (
            -math.inf
        )  # uptime: an empty search that began earlier says nothing
        self._redactor = redactor
        self._tasks: asyncio.TaskGroup | None = None
        self._drivers: dict[int, asyncio.Task[None]] = {}
        self._polling: dict[str, asyncio.Task[None]] = {}  # the accounts' loops
        self._current: set[int] = set()  # runs of the batch_ids that the config has now
        self._next_id = int(store.one("SELECT max(id) FROM runs") or 0) + 1
        self._touched: set[int] = set()  # runs whose poll changed nothing but its times
        self._touched_at = 0.0
        self._stats_changed: set[str] = set()
        self._pruned_at = -math.inf
        self._swept_at = -math.inf
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
                if self.once:
                    for account in self.accounts.values():
                        self.spawn(account.run_once())
                else:
                    self.spawn(self._keep_house())
                for helper in helpers:
                    self.spawn(helper())
        except BaseExceptionGroup as group:
            errors, _ = group.split(TeckoError)
            while isinstance(errors, BaseExceptionGroup):
                errors = errors.exceptions[0]
            if errors:
                raise errors from None
            raise

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
        known = float(
            self.store.one("SELECT max(at) FROM events WHERE name = 'trigger_sending'") or 0
        )
        if posted is None or posted.wall < known + 1:
            return
        left_s = self.loaded.config.trigger_grace - posted.until_s(self.clock.boot_time())
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
                self.note_trouble(error)
            await asyncio.sleep(1.0)

    def _follow_clock(self) -> None:
        """Move every pending time when the system's clock was set."""
        by_s = self.clock.changed()
        if by_s:
            for run in list(self.runs.values()):
                self.runs[run.id] = shifted(run, by_s)
            self._touched |= self.runs.keys()
            for account in self.accounts.values():
                account.wake.set()
            self.log(Event.of("clock_changed", seconds=round(by_s)))

    def sweep(self) -> None:
        """Tell what has come to need a person by lasting; once an hour, drop what is old."""
        now = self.clock.uptime_s()
        if now - self._swept_at >= 5:
            self._swept_at = now
            pairs = [(run, self._with_attention(run)) for run in self.runs.values()]
            self.commit([change for run, change in pairs if change[0] is not run])
        if now - self._pruned_at >= HOUR_S:
            self._pruned_at = now
            config = self.loaded.config
            self.store.prune(config.jobs, config.retention, self.clock.now())
            cutoff = self.clock.now() - MINUTE_S
            self._last_told = {key: at for key, at in self._last_told.items() if at > cutoff}
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
        for run_id in self.posting:
            self.log(Event.of("trigger_left_open", self.runs[run_id]))

    # --- taking a config ---

    def apply(self, loaded: LoadedConfig) -> None:
        """Make a new config the one that counts. After a StorageError, apply it again."""
        self.flush(at_once=True)
        old, config = self.loaded, loaded.config
        now = self.clock.boot_time()
        last_id = self.store.last_event_id()
        insert = "INSERT OR IGNORE INTO webhooks VALUES (?, ?, 0, 0)"
        self.store.execute([(insert, (name, last_id)) for name, _ in config.notify])
        known = {run.id: run for run in self.store.runs_for(config.jobs)}
        changes: list[Change] = []
        for run in known.values():
            mine = self.runs.get(run.id)
            changes.append((mine, []) if mine else as_loaded(run, now, config.trigger_grace))
        changes = self._renamed(config, changes)
        changes, current = self._assigned(config, changes)
        before = (self.runs, self._current)
        self.loaded, self._current = loaded, current
        try:
            changes = [self._with_config(run, events, old) for run, events in changes]
            stored = {run.id: before[0].get(run.id) or known.get(run.id) for run, _ in changes}
            new = [
                (run, events)
                for run, events in changes
                if events or not (was := stored[run.id]) or replace(run, next_at=was.next_at) != was
            ]
            self.runs = {run_id: run for run_id, run in stored.items() if run}
            self.commit(new, also=[Store.meta_statement("match_jobs", self._match_jobs(config))])
        except StorageError:
            self.loaded, (self.runs, self._current) = old, before
            raise
        written = {run.id for run, _ in new}
        self.runs |= {run.id: run for run, _ in changes if run.id not in written}
        self.http.configure(config)
        self._arrange(loaded)
        self.take_requests(at_once=True)
        for run in list(self.runs.values()):
            self._place(run)

    def _renamed(self, config: Config, changes: list[Change]) -> list[Change]:
        """Take the groups of a match job that has left the config over to its new name."""
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        mine = self._match_jobs(config)
        left = {tuple(key): name for name, key in known.items() if name not in config.jobs}
        for name, key in mine.items():
            old = left.pop(tuple(key), None) if name not in known else None
            if old:
                self.store.execute(
                    [
                        ("UPDATE runs SET job = ? WHERE job = ? AND \"group\" <> ''", (name, old)),
                        (
                            "INSERT OR REPLACE INTO meta SELECT 'read:' || ?, value FROM meta"
                            " WHERE key = 'read:' || ?",
                            (name, old),
                        ),
                    ]
                )
                ids = {run.id for run, _ in changes}
                self.runs = {
                    i: replace(r, job=name) if r.group and r.job == old else r
                    for i, r in self.runs.items()
                }
                now = self.clock.boot_time()
                for run in self.store.runs_for({name: config.jobs[name]}):
                    if run.id not in ids:
                        changes.append(as_loaded(run, now, config.trigger_grace))
                changes = [
                    (replace(r, job=name) if r.group and r.job == old else r, e) for r, e in changes
                ]
        return changes

    def _match_jobs(self, config: Config) -> dict[str, list[str]]:
        """Return what tells the jobs with `match` from each other, by name, also of those gone."""
        known: dict[str, list[str]] = self.store.meta("match_jobs") or {}
        return known | {
            name: [job.match_key, str(config.target(job))]
            for name, job in config.jobs.items()
            if job.match
        }

    def _assigned(self, config: Config, changes: Sequence[Change]) -> tuple[list[Change], set[int]]:
        """Return changes with the runs of jobs with batch_ids as the config has them, and new ones."""
        jobs = config.jobs
        targets = {name: config.target(job) for name, job in jobs.items()}
        assigned = assign(jobs, targets, (run for run, _ in changes if not run.group))
        events = {run.id: told for run, told in changes}
        after = {run.id: run for run, _ in changes}
        current = set()
        for name, job in jobs.items():
            run = assigned.get(name)
            if run:
                after[run.id] = replace(run, job=name, batches=in_order(run, job, run.batches))
            elif not job.match:
                batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
                run = Run(self._next_id, name, targets[name], batches=batches)
                run = replace(run, next_at=self.clock.now())
                self._next_id += 1
                after[run.id] = run
            if run:
                current.add(run.id)
        return [(run, events.get(run.id, [])) for run in after.values()], current

    def _with_config(self, run: Run, events: list[Event], old: LoadedConfig) -> Change:
        """Return a run as a new config has it: what has changed for it is due at once."""
        job, old_job = self.loaded.config.jobs.get(run.job), old.config.jobs.get(run.job)
        if job is None or run.id not in self.runs:
            return run, events
        if job == old_job and self.loaded.access(job) == old.access(old_job):
            return run, events
        if run.phase is Phase.REJECTED:
            target = self.loaded.config.target(job)
            token = self.loaded.secrets[job.keboola_secret]
            if input_digest(job, target, token) == run.input_digest:
                return run, events
            return as_intended(run, self.clock.now()), events
        if run.phase in {Phase.POLLING, Phase.INTENT, Phase.SENT, Phase.UNKNOWN}:
            return replace(run, failures=0, next_at=min(run.next_at, self.clock.now())), events
        return run, events

    def _arrange(self, loaded: LoadedConfig) -> None:
        """Have an account for each OpenAI key that is used, and a client for each Keboola token."""
        config, secrets = loaded.config, loaded.secrets
        for name in config.of_type("keboola"):
            entry, known = config.secrets[name], self.keboolas.get(name)
            if not known or (known.stack_url, known.token) != (entry.stack_url, secrets[name]):
                note = functools.partial(self.note_request, name)
                self.keboolas[name] = Keboola(entry, secrets[name], self.http, self.clock, note)
        kept = set(config.of_type("keboola"))
        self.keboolas = {name: k for name, k in self.keboolas.items() if name in kept}
        used = {job.openai_secret for job in config.jobs.values()}
        identity = {
            name: (secrets[name], replace(config.secrets[name], text=Secret(""), line=0, column=0))
            for name in used
        }
        for name in list(self.accounts):
            if identity.get(name) != self.accounts[name].identity:
                del self.accounts[name]
                if task := self._polling.pop(name, None):
                    task.cancel()
        for name in used:
            if name not in self.accounts:
                self.accounts[name] = Account(self, config.secrets[name], identity[name])
                if not self.once:
                    self._polling[name] = self.spawn(self.accounts[name].run())
            account = self.accounts[name]
            account.run_ids.clear()
            account.finders = [
                job
                for job in config.jobs.values()
                if job.match and job.openai_secret == name and not job.rests
            ]
            account.find_soon()
        self._drop_stats(config)

    def _drop_stats(self, config: Config) -> None:
        """Forget how secrets fared that the config no longer has."""
        for name in self.stats.keys() - config.secrets.keys():
            stats = self.stats.pop(name)
            refused = [Event.of("account_failing_recovered", secret=name)]
            also: list[Statement] = [("DELETE FROM secrets WHERE name = ?", (name,))]
            self.commit([], refused if stats.refused_since else [], also)

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

    async def keboola_for(self, run: Run) -> Keboola:
        """Return a client whose token is of a run's stack and project. Raises ApiError for none.

        A token of another project never carries a run.
        """
        job, failure = self.job_of(run), None
        names = [job.keboola_secret] if job else []
        for name in dict.fromkeys([*names, *self.keboolas]):
            keboola = self.keboolas.get(name)
            if keboola and keboola.stack_url == run.target.stack_url:
                try:
                    if await keboola.project() == run.target.project:
                        return keboola
                except ApiError as error:
                    failure = failure or error
        if failure:
            raise failure
        where = f"project {run.target.project} on {run.target.stack_url}"
        message = f"the config has no token of {where}, where this run was started"
        raise ApiError(message, sent=False)

    def check_in_place(self) -> None:
        """Raise StateError if the state file was deleted or replaced under the process.

        A commit into a deleted file succeeds, and would be forgotten.
        """
        if not (self.store.is_in_place() and self.lock.is_in_place()):
            message = f"the state file {self.store.path} or its lock was deleted or replaced"
            raise StateError(message, "nothing more is sent; start again")

    def record_polls(self, came: Iterable[tuple[int, Mapping[str, Batch | ApiError]]]) -> None:
        """Store what polls have brought, as one. Of what has not changed only times are written."""
        now = self.clock.now()
        changes = []
        for run_id, answers in came:
            run = self.runs.get(run_id)
            job = run and self.job_of(run)
            if run is None or job is None or not self.is_polled(run):
                continue
            try:
                after, events = after_poll(run, job, answers, now, self.clock.jitter())
            except Exception as error:  # noqa: BLE001 - a bug that one run meets is not the others'
                self.note_bug(error, run.name)
                self.runs[run_id] = replace(run, next_at=now + MINUTE_S)
                continue
            quiet = replace(after, next_at=run.next_at, last_check_at=run.last_check_at)
            if events or quiet != run:
                changes.append((after, events))
            else:
                self.runs[run_id] = after
                self._touched.add(run_id)
        try:
            if changes:
                self.commit(changes)
        except StorageError as error:
            for run, _ in changes:
                self.note_trouble(error, run)
                self.runs[run.id] = replace(self.runs[run.id], next_at=now + 5)

    def take_found(self, found: Sequence[tuple[Run, list[Event], list[Batch]]]) -> None:
        """Store runs that new batches begin or join, and batches that came late."""
        changes, also = [], []
        for run, events, late in found:
            if run.id == 0:
                run = replace(run, id=self._next_id)  # noqa: PLW2901 - the same run, numbered
                self._next_id += 1
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
        told = list(events)
        for changed, its_events in changes:
            run, more = self._with_attention(self._clean_run(changed))
            rows.append((self.runs.get(run.id), run))
            told += [*its_events, *more]
        now = self.clock.now()
        told = [self._clean(event) for event in told if not self._is_repeated(event, now)]
        if self._trouble:
            told.append(Event.of("state_write_failed_recovered"))
        stored = self.store.commit(rows, told, now, also)
        self._trouble.clear()
        for _, run in rows:
            self.runs[run.id] = run
            self._place(run)
        for event in stored:
            say(event)
        if rows or stored:
            for happened in self.told:
                happened.set()

    def commit_aimed(self, run: Run, *, before: Run) -> Run:
        """Commit an intent's target and payload, where they are new; returns the run as stored."""
        if run == before:
            return before
        facts = {"trigger_id": run.trigger_id, "target": str(run.target)}
        events = [] if before.payload else [Event.of("trigger_intended", run, **facts)]
        self.check_in_place()
        self.commit([(run, events)])
        return self.runs[run.id]

    def _place(self, run: Run) -> None:
        """Have a run polled, driven, or dropped from memory, as its phase says."""
        job = self.job_of(run)
        for name, account in self.accounts.items():
            if job and name == job.openai_secret and self.is_polled(run):
                account.run_ids.add(run.id)
                if run.next_at < account.until:
                    account.wake.set()
            elif run.id in account.run_ids:
                account.forget(run.id)
        is_driven = run.phase not in {Phase.POLLING, Phase.FINISHED, Phase.REFUSED}
        if is_driven and self._tasks is not None and not self.is_stopping:
            self.wakes.setdefault(run.id, asyncio.Event()).set()
            driver = self._drivers.get(run.id)
            if driver is None or driver.done():
                self._drivers[run.id] = self.spawn(drive_run(self, run.id))
        elif run.phase is Phase.FINISHED:
            self._drop_finished(run, job)

    def _drop_finished(self, run: Run, job: Job | None) -> None:
        """Keep of a match job's finished runs only the last five, and those that need attention."""
        if job and job.match and run.group:
            ended = [
                r
                for r in self.runs.values()
                if r.job == run.job and r.phase is Phase.FINISHED and not r.attention
            ]
            ended.sort(key=lambda r: r.finished_at or 0.0)
            for old in ended[:-5]:
                del self.runs[old.id]

    def log(self, *events: Event) -> None:
        """Tell events that go with no change of a run; a full disk must not silence the log."""
        try:
            self.commit([], events)
        except StorageError:
            for event in events:
                say(self._clean(event))

    def _is_repeated(self, event: Event, now: float) -> bool:
        """Return whether the same was told within the last minute: something flaps."""
        if not event.name.startswith(
            ("batch_status", "poll_", "list_", "find_", "follow_", "account_")
        ):
            return False
        key = (event.name, event.run, event.fields.get("batch_id"), event.fields.get("secret"))
        if now - self._last_told.get(key, -math.inf) < MINUTE_S:
            return True
        self._last_told[key] = now
        return False

    def _clean(self, event: Event) -> Event:
        """Return an event without secrets: the state file keeps it, and others read it."""
        cleaned = self._redactor.tree(dict(event.fields))
        return replace(event, fields=cleaned, text=self._redactor.text(event.text))

    def _clean_run(self, run: Run) -> Run:
        """Return a run whose errors hold no secret."""
        names = ("error", "post_error", "keboola_error", "keboola_status")
        texts = {name: getattr(run, name) for name in names}
        clean = {name: self._redactor.text(text) for name, text in texts.items() if text}
        changed = {name: text for name, text in clean.items() if text != texts[name]}
        return replace(run, **changed) if changed else run

    def note_trouble(self, error: Exception, run: Run | None = None) -> None:
        """Tell once of trouble with the state file, until something could be written again."""
        self.has_failed = True
        key = (run and run.id, str(error))
        if key not in self._trouble:
            self._trouble.add(key)
            say(Event.of("state_write_failed", run, error=str(error)))

    def note_bug(self, error: Exception, where: str) -> None:
        """Tell of an exception that nobody has thought of, with its traceback."""
        self.has_failed = True
        trace = "".join(traceback.format_exception(error))
        say(Event.of("internal_error", where=where, error=type(error).__name__, traceback=trace))

    def note_request(self, name: str, error: ApiError | None, _: float | None) -> None:
        """Remember how a request with a secret has fared."""
        entry = self.loaded.config.secrets.get(name)
        if entry is None:
            return
        before = self.stats.get(name) or SecretStats(name, entry.type)
        after = before.after(error, self.clock.now())
        self.stats[name] = after
        self._stats_changed.add(name)
        if after.refused_since and not before.refused_since:
            self.log(Event.of("account_failing", secret=name, error=after.error))
        elif before.refused_since and not after.refused_since:
            self.log(Event.of("account_failing_recovered", secret=name))

    def note_config(self, error: str | None, *events: Event) -> None:
        """Remember which config the process runs with, and what is wrong with the file, if so."""
        config = self.loaded.config
        before, self.config_error = self.config_error, error and self._redactor.text(error)
        known = self.store.meta("config") or {}
        told = list(events)
        also = []
        if error is None:
            loaded_at = rfc3339(self.clock.now())
            known = {"path": str(config.path), "sha256": config.sha256, "loaded_at": loaded_at}
            good = {"path": str(config.path.absolute()), "text": self.loaded.text}
            also.append(Store.meta_statement("good_config", good))
            if before:
                told.append(Event.of("config_rejected_recovered"))
        also.append(Store.meta_statement("config", {**known, "error": self.config_error}))
        self.commit([], told, also)

    def flush(self, *, at_once: bool = False) -> None:
        """Write when runs were polled, and how secrets fared, now and then."""
        now = self.clock.uptime_s()
        is_time = at_once or now - self._touched_at >= max(2.0, len(self._touched) * 0.005)
        if not is_time or not (self._touched or self._stats_changed):
            return
        runs = [self.runs[i] for i in self._touched if i in self.runs]
        statement = "UPDATE runs SET last_check_at = ?, next_at = ? WHERE id = ?"
        rows: list[Statement] = [
            (statement, (r.last_check_at, r.next_at if math.isfinite(r.next_at) else None, r.id))
            for r in runs
        ]
        rows += [
            SecretStats.statement(self.stats[n]) for n in self._stats_changed if n in self.stats
        ]
        self.store.execute(rows)
        self._touched.clear()
        self._stats_changed.clear()
        self._touched_at = now

    # --- what people ask for ---

    def take_requests(self, *, at_once: bool = False) -> None:
        """Do what people asked for with `retry` since the last time."""
        version = int(self.store.one("PRAGMA data_version"))
        if version == self._data_version and not at_once:
            return
        for row in self.store.db.execute("SELECT * FROM requests ORDER BY id").fetchall():
            id_, run_id, force, rerun, phase = row
            request = RetryRequest(id_, run_id, bool(force), rerun, Phase(phase))
            done: list[Statement] = [("DELETE FROM requests WHERE id = ?", (id_,))]
            run = self.runs.get(run_id) or next(
                iter(self.store.runs("id = :id", {"id": run_id})), None
            )
            if run is None:
                self.commit([], also=done)
                continue
            if run.id in self.posting:
                run = replace(run, phase=Phase.SENDING)
            came = after_retry(run, self.job_of(run), request, self.clock.now())
            if isinstance(came, str):
                self.commit([], [Event.of("retry_refused", run, why=came)], done)
            else:
                self.runs.setdefault(run.id, run)
                self.commit([came], also=done)
        self._data_version = version

    def summary(self) -> str:
        """Return how the runs are, in one line."""
        statuses = [status_of(run, job) for run in self.shown() if (job := self.job_of(run))]
        counts = [f"{n} {status}" for status, n in sorted(collections.Counter(statuses).items())]
        summary = ", ".join(counts) or "no jobs"
        if self.config_error:
            summary += "; the config file has problems, the previous one still counts"
        return summary

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


def what_changed(old: Config | None, new: Config) -> tuple[str, dict[str, list[str]]]:
    """Return which jobs a config adds, removes and changes: as a sentence, and by name."""
    before = old.jobs if old else {}
    jobs = {
        "added": [name for name in new.jobs if name not in before],
        "removed": [name for name in before if name not in new.jobs],
        "changed": [n for n, job in new.jobs.items() if n in before and before[n] != job],
    }
    words = [
        f"{kind} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for kind, names in jobs.items()
        if names
    ]
    return "; ".join(words) if old else counted(len(new.jobs), "job"), jobs


def note_loaded(engine: Engine, old: Config | None) -> None:
    """Tell that a config counts now, and what could be better about it."""
    config = engine.loaded.config
    known = engine.store.meta("config") or {}
    if engine.once and known.get("sha256") == config.sha256 and not known.get("error"):
        return  # from cron, a pass without news says nothing
    changes, jobs = what_changed(old, config)
    facts = {"sha256": config.sha256, "jobs": len(config.jobs), **(jobs if old else {})}
    events = [Event.of("config_loaded", changes=changes or "no job has changed", **facts)]
    warnings = [*engine.loaded.warnings]
    if engine.http.rules.unreadable:
        left_out = ", ".join(map(quoted, engine.http.rules.unreadable))
        warnings.append(f"$NO_PROXY has entries that are neither host nor network: {left_out}")
    events += [Event.of("config_warning", warning=warning) for warning in warnings]
    engine.note_config(None, *events)


class Reloader:
    """Sees that the config, its key file or a secret's file has changed, and has it taken."""

    def __init__(
        self,
        engine: Engine,
        files: Files,
        env: Mapping[str, str],
        redactor: Redactor,
        manager: ServiceManager,
        configure: Callable[[Config], None],
    ) -> None:
        self.hangup = asyncio.Event()
        self._engine = engine
        self._env = env
        self._redactor = redactor
        self._manager = manager
        self._configure = configure
        self._path = engine.loaded.config.path
        self._seen = dict(files.seen)
        self._ripening: dict[Path, bytes] = {}  # rewritten in place; it may be half of a file
        self._ripe_at = math.inf
        self._happened = asyncio.Event()

    async def run(self) -> None:
        """Compare the files on every event, every two seconds, and on SIGHUP, and take them."""
        while True:
            self._happened.clear()
            force = self.hangup.is_set()
            self.hangup.clear()
            try:
                await self.check(force=force)
            except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
                self._engine.note_bug(error, "reload")
            if not self.hangup.is_set():
                left_s = self._ripe_at - self._engine.clock.uptime_s()
                await wait_for_event(self._happened, min(2.0, max(0.05, left_s)))

    def on_hangup(self) -> None:
        """Reload, whatever the files say."""
        self.hangup.set()
        self._happened.set()

    async def watch(self) -> None:
        """Set off a comparison on every event in the config's directory.

        The directory is watched, not the file: editors replace it, Kubernetes swaps a link.
        """
        import watchfiles  # noqa: PLC0415 - it costs the other commands a third of their start

        engine = self._engine
        ours = engine.store.path.name

        def is_theirs(_: object, path: str) -> bool:
            name = Path(path).name
            return not (name.startswith(ours) or name.lstrip(".").startswith(PUBLISHED))

        while True:
            try:
                async for _ in watchfiles.awatch(
                    self._path.parent, watch_filter=is_theirs, step=100, recursive=False
                ):
                    self._happened.set()
            except (OSError, RuntimeError) as error:  # the comparison sees what this does not
                engine.log(Event.of("watch_failed", error=one_line(str(error))))
            await asyncio.sleep(MINUTE_S)

    async def check(self, *, force: bool = False) -> None:
        """Take the files if they differ from those last tried, good or bad.

        A file that was replaced is whole. One that was rewritten in place counts when it has stayed
        the same for two seconds: half of a config can be valid YAML.
        """
        files = Files()
        await asyncio.to_thread(lambda: [files.read(path) for path in self._seen])
        changed = {p: r for p, r in files.seen.items() if r.digest != self._seen[p].digest}
        if not changed and not force:
            self._seen, self._ripe_at, self._ripening = dict(files.seen), math.inf, {}
            return
        in_place = {
            path: read.digest
            for path, read in changed.items()
            if read.inode == self._seen[path].inode and not read.error
        }
        now = self._engine.clock.uptime_s()
        if in_place and not force:
            if in_place != self._ripening:
                self._ripening, self._ripe_at = in_place, now + 2.0
            if now < self._ripe_at:
                return
        self._ripening, self._ripe_at = {}, math.inf
        self._manager.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await self._take(files)
            self._seen = dict(files.seen)
        except (StorageError, sqlite3.Error) as error:  # tried again at the next comparison
            self._engine.note_trouble(error)
        finally:
            self._manager.send("READY=1", f"STATUS={self._engine.summary()}")

    async def _take(self, files: Files) -> None:
        """Parse and decrypt all of it; only then, in one step, let it count."""
        engine, old = self._engine, self._engine.loaded.config
        try:
            loaded = await asyncio.to_thread(
                load_config, self._path, files, self._env, self._redactor
            )
            if old.state_path != loaded.config.state_path:
                what = f"the running process has {old.state_path} open"
                cure = "restart it to use another state file"
                raise ConfigError([Problem(str(self._path), 1, 1, "state", what, cure)])
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            event = Event.of("config_rejected", problem=problems[0], problems=problems)
            engine.note_config("\n".join(problems), event)
            return
        engine.apply(loaded)
        self._configure(loaded.config)
        note_loaded(engine, old)


# --- webhooks -------------------------------------------------------------------------------------


async def send_webhooks(engine: Engine, http: Http, *, once: bool = False) -> None:
    """Have each webhook told of the events that its rule names; a dead one delays no other.

    They read the event log: for each there is the number of the last event that it has had.
    """
    happened = asyncio.Event()
    engine.told.append(happened)
    sending: dict[str, asyncio.Task[None]] = {}
    while True:
        happened.clear()
        config = engine.loaded.config
        for name in {name for name, _ in config.notify}:
            if name not in sending or sending[name].done():
                sending[name] = asyncio.create_task(tell_webhook(engine, http, name))
        if once:
            await asyncio.gather(*sending.values())
            return
        await wait_for_event(happened, 5.0)
        await asyncio.sleep(0.05)


async def tell_webhook(engine: Engine, http: Http, name: str) -> None:
    """Tell one webhook what it has not had yet, in order, until one event does not get through."""
    store, clock = engine.store, engine.clock
    try:
        row = store.db.execute("SELECT * FROM webhooks WHERE secret = ?", (name,)).fetchone()
        _, told_up_to, failures, next_at = row
        if next_at > clock.now() and next_at < clock.now() + HOUR_S:
            return
        for event in store.events(after=told_up_to):
            wanted = {
                word
                for rule, words in engine.loaded.config.notify
                if rule == name
                for word in words
            }
            groups = EVENTS[event.name][1].split() if event.name in EVENTS else []
            if wanted & {event.name, *groups}:
                address = engine.loaded.secrets.get(name)
                if address is None:
                    return
                failure = await post_event(engine, http, name, address, event)
                if failure and (clock.now() - event.at < DAY_S or failures < 5):
                    note_webhook_failure(engine, name, failures + 1, failure)
                    return
                if failure:
                    engine.log(Event.of("notify_dropped", secret=name, count=1, why=str(failure)))
                failures = 0
                update = (
                    "UPDATE webhooks SET told_up_to = ?, failures = 0, next_at = 0 WHERE secret = ?"
                )
                store.execute([(update, (event.id, name))])
    except (StorageError, sqlite3.Error) as error:
        engine.note_trouble(error)
    except Exception as error:  # noqa: BLE001 - a bug here is not the runs'
        engine.note_bug(error, "notify")


def note_webhook_failure(engine: Engine, name: str, failures: int, error: ApiError) -> None:
    """Have a webhook told again later, each time later."""
    wait_s = backoff_s(failures, 5, engine.clock.jitter(), error.retry_after_s)
    update = "UPDATE webhooks SET failures = ?, next_at = ? WHERE secret = ?"
    engine.store.execute([(update, (failures, engine.clock.now() + wait_s, name))])
    if failures == 1:
        engine.log(Event.of("notify_failed", secret=name, error=str(error)))


async def post_event(
    engine: Engine, http: Http, name: str, address: Secret, event: Event
) -> ApiError | None:
    """Post one event to a webhook; returns why it was not taken, or None.

    Angle brackets would be commands to some chat programs.
    """
    text = one_line(f"TeckoChecker: {event.text}", 1000)
    text = text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")
    text = text.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
    body = {"text": text, "event": event.name, "job": event.job, "run": event.run}
    body |= {"level": event.level, "at": rfc3339(event.at)}
    headers = {"Content-Type": "application/json"}
    try:
        answer = await http.post(address.reveal(), headers, compact_json(body), 10.0)
    except ApiError as error:
        failure: ApiError | None = error
    else:  # its words may be an echo of the address, which is secret
        said = f"it answered {answer.status}"
        failure = None if answer.is_success else answer.error(said, retryable=True)
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
    interval_s = min(10.0, (manager.watchdog_s or 60.0) / 3)
    watchdog = ["WATCHDOG=1"] if manager.watchdog_s else []
    manager.send("READY=1")
    while True:
        manager.send(*watchdog, f"STATUS={engine.summary()}")
        await asyncio.sleep(interval_s)


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
    interrupted = not running.done()
    if interrupted:
        manager.send("STOPPING=1")
        await engine.drain(signals.now)
        running.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    with contextlib.suppress(StorageError):
        engine.flush(at_once=True)
    if signals.now.is_set() or (interrupted and engine.once):
        return 130
    return 0


# ==================================================================================================
# 8. Showing: one snapshot, and its renderers
# ==================================================================================================


def run_view(run: Run, job: Job | None, grace_s: float, now: float) -> dict[str, Any]:
    """Return a run as `status --json` shows it."""
    status = status_of(run, job)
    is_over = status in {"completed", "completed_with_failures"}
    has_trigger = run.phase not in {Phase.POLLING, Phase.REFUSED}
    error = None if is_over else run.error
    is_due = not is_over and status != "paused" and run.phase is not Phase.REFUSED
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
        "trigger": {
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
        if has_trigger
        else None,
    }


def batch_view(batch: Batch) -> dict[str, Any]:
    """Return a batch as `status --json` shows it."""
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


def snapshot(
    config: Config,
    runs: Iterable[Run],
    *,
    daemon: Mapping[str, Any],
    loaded: Mapping[str, Any],
    refused: int,
    now: float,
) -> dict[str, Any]:
    """Return what is known at one moment: the document of `status --json`.

    `loaded` is what the process remembers of the config that it runs with, `refused` how many keys
    their servers refuse.
    """
    views = [run_view(r, config.jobs.get(r.job), config.trigger_grace, now) for r in runs]
    names = ("running", "pid", "started_at", "last_loop_at")
    error = loaded.get("error")
    return {
        "version": __version__,
        "generated_at": rfc3339(now),
        "daemon": {name: daemon.get(name) for name in names},
        "config": {
            "path": loaded.get("path", str(config.path)),
            "sha256": loaded.get("sha256", config.sha256),
            "loaded_at": loaded.get("loaded_at"),
            "error": error,
        },
        "attention": sum(view["attention"] for view in views) + refused + bool(error),
        "jobs": views,
    }


# --- in words -------------------------------------------------------------------------------------


def unix_of(text: str | None) -> float | None:
    """Return a time of a snapshot as Unix seconds."""
    return datetime.fromisoformat(text).timestamp() if text else None


def in_words(seconds: float) -> str:
    """Return a length of time as people say it: `3 min`."""
    for unit, size in (("day", DAY_S), ("h", HOUR_S), ("min", MINUTE_S)):
        count = round(seconds / size)
        if seconds >= size * 0.99:
            return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"
    return f"{max(0, round(seconds))} s"


def ago(text: str | None, now: float) -> str:
    """Return how long ago a time of a snapshot was; what is recorded in the future is now."""
    at = unix_of(text)
    if at is None:
        return "never"
    return f"{in_words(now - at)} ago" if now - at >= 1 else "just now"


def what_next(view: Mapping[str, Any], now: float) -> str:
    """Return what happens next to a run, and when; or what has come of it."""
    trigger = view["trigger"] or {}
    due = unix_of(view["next_check_at"])
    when = f"in {in_words(due - now)}" if due is not None and due - now >= 1 else "now"
    failed = sum((batch["request_counts"] or {}).get("failed") or 0 for batch in view["batches"])
    lost = f", {counted(failed, 'request')} failed" if failed else ""
    match view["status"]:
        case "active" if due is None:
            return "waits for more batches"
        case "active":
            return f"polls {when}"
        case "paused":
            return "nothing while it is paused"
        case "running":
            said = trigger["keboola_status"] or "started"
            return f"Keboola job {trigger['keboola_job_id']} is {said}; looks {when}"
        case "failed" if trigger.get("state") == "rejected" and due is not None:
            return f"tries again {when}, or `retry`"
        case "failed":
            return "waits for a change of its config, or `retry`"
        case "triggering":
            return {
                "sending": "waits for Keboola's answer",
                "unknown": f"searches Keboola again {when}",
            }.get(trigger.get("state", ""), f"searches Keboola {when}, then starts")
    if not trigger:
        return "done elsewhere"
    ended = f"Keboola job {trigger['keboola_job_id']}: {trigger['keboola_status'] or 'started'}"
    return f"{ended}, {ago(view['completed_at'], now)}{lost}"


def progress_of(view: Mapping[str, Any]) -> float:
    """Return which share of a run's requests is done, from 0 to 1."""
    shares = []
    for batch in view["batches"]:
        counts = batch["request_counts"] or {}
        done = (counts.get("completed") or 0) + (counts.get("failed") or 0)
        share = done / counts["total"] if counts.get("total") else 0.0
        shares.append(1.0 if STATUS_RANK.get(batch["status"]) == 3 else min(1.0, share))
    return sum(shares) / len(shares) if shares else 0.0


# The order in which a person wants to see runs.
STATUSES: Final = (
    "failed",
    "triggering",
    "active",
    "running",
    "paused",
    "completed_with_failures",
    "completed",
)


def in_order_of_need(views: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return runs sorted: what needs attention, what goes on, what is finished, newest first."""

    def key(view: Mapping[str, Any]) -> tuple[object, ...]:
        ended = -(unix_of(view["completed_at"]) or 0.0)
        return (not view["attention"], max(1, min(5, STATUSES.index(view["status"]))), ended)

    return sorted(views, key=key)


def counts_in_words(views: Iterable[Mapping[str, Any]]) -> str:
    """Return how many runs have which status, in one line."""
    counts = collections.Counter(view["status"] for view in views)
    return ", ".join(f"{counts[s]} {s.replace('_', ' ')}" for s in STATUSES if counts[s])


# --- as metrics -----------------------------------------------------------------------------------


def metrics(shot: Mapping[str, Any], stats: Iterable[SecretStats], ended: Mapping[str, int]) -> str:
    """Return a snapshot in Prometheus' text format (version 0.0.4), for its textfile collector.

    `ended` is how many Keboola jobs of all times had which end.
    """
    lines: list[str] = []
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

    def metric(
        name: str,
        text: str,
        samples: Iterable[tuple[Mapping[str, str], float]],
        kind: str = "gauge",
    ) -> None:
        found = list(samples)
        if found:
            full = f"teckochecker_{name}"
            lines.extend((f"# HELP {full} {text}", f"# TYPE {full} {kind}"))
            for labels, value in found:
                pairs = ",".join(f'{k}="{v.translate(escapes)}"' for k, v in labels.items())
                lines.append(f"{full}{f'{{{pairs}}}' if pairs else ''} {value:.15g}")

    def by(
        label: str, names: Iterable[str], found: Iterable[str]
    ) -> list[tuple[dict[str, str], int]]:
        counts = collections.Counter(dict.fromkeys(names, 0))
        counts.update(found)
        return [({label: name}, count) for name, count in counts.items()]

    now, views = unix_of(shot["generated_at"]) or 0.0, shot["jobs"]
    batches = [batch for view in views for batch in view["batches"]]
    loaded_at = unix_of(shot["config"]["loaded_at"])
    metric("info", "The program's version.", [({"version": shot["version"]}, 1)])
    metric("generated_timestamp_seconds", "When this file was made.", [({}, now)])
    metric("daemon_running", "Whether the daemon ran then.", [({}, shot["daemon"]["running"])])
    metric("attention", "Runs, keys and configs that need a person.", [({}, shot["attention"])])
    metric("jobs", "Runs by status.", by("status", STATUSES, (v["status"] for v in views)))
    statuses = (*STATUS_RANK, "not_polled")
    seen = (batch["status"] or "not_polled" for batch in batches)
    metric("batches", "Batches of these runs by status.", by("status", statuses, seen))
    metric(
        "run_oldest_batch_age_seconds",
        "Since the oldest unfinished batch of a run was created.",
        run_ages(views, now),
    )
    for status, since, text in (
        (
            "triggering",
            "batches",
            "Since the batches of a run that is being started were finished.",
        ),
        ("running", "trigger", "Since the Keboola job of a running run was started."),
    ):
        ages = [
            ({"run": v["name"]}, max(0.0, now - at))
            for v in views
            if v["status"] == status and (at := last_time(v, since)) is not None
        ]
        metric(f"run_{status}_seconds", text, ages)
    metric(
        "keboola_jobs",
        "Keboola jobs by how they ended.",
        [({"status": s}, n) for s, n in ended.items()],
    )
    labels = {use.name: {"account": use.name, "service": use.type} for use in stats}
    for name, kind, text, value in (
        ("requests_total", "counter", "Requests made with a secret.", "requests"),
        ("request_errors_total", "counter", "Requests with a secret that failed.", "errors"),
        ("last_success_timestamp_seconds", "gauge", "When one last succeeded.", "last_success_at"),
    ):
        samples = [(labels[use.name], getattr(use, value)) for use in stats]
        metric(name, text, [(label, n) for label, n in samples if n is not None], kind)
    refused = [(labels[use.name], use.refused_since is not None) for use in stats]
    metric("account_refused", "Whether the server refuses the secret (401).", refused)
    good = shot["config"]["error"] is None
    metric("config_last_reload_successful", "Whether the config file is good.", [({}, good)])
    times = [({}, loaded_at)] if loaded_at else []
    text = "When the config that counts was loaded."
    metric("config_last_reload_success_timestamp_seconds", text, times)
    return "".join(f"{line}\n" for line in lines)


def run_ages(
    views: Iterable[Mapping[str, Any]], now: float
) -> Iterator[tuple[dict[str, str], float]]:
    """Yield how old the oldest unfinished batch of each active run is."""
    for view in views:
        ages = [
            now - (unix_of(batch["created_at"]) or now)
            for batch in view["batches"]
            if STATUS_RANK.get(batch["status"]) != 3 and batch["created_at"]
        ]
        if ages and view["status"] == "active":
            yield {"run": view["name"]}, max(0.0, *ages)


def last_time(view: Mapping[str, Any], since: str) -> float | None:
    """Return when a run's last batch was finished, or its Keboola job was started."""
    if since == "trigger":
        return unix_of(view["trigger"]["sent_at"])
    return (
        max((unix_of(batch["completed_at"]) or 0.0 for batch in view["batches"]), default=0) or None
    )


# --- as a page ------------------------------------------------------------------------------------

PAGE_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #555d66; --paper: #fff; --line: #d5d9de;
  --link: #0b57c2; --good: #17713a; --run: #2b66c9; --bad: #b3261e; --wait: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #a6adb7; --paper: #16181b;
  --line: #3a3f46; --link: #8ab8ff; --good: #62d68d; --run: #7fb0ff; --bad: #ff8f86;
  --wait: #f2bd5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 1.25rem 0 .25rem; }
p, ul { margin: .25rem 0; }
a { color: var(--link); }
.dim { color: var(--dim); }
.alarm { border: 2px solid var(--bad); border-radius: .5rem; padding: .75rem; margin: .75rem 0; }
.loud { background: #a3170f; border-color: #a3170f; color: #fff; font-size: 1.2rem; }
.error, .failed { color: var(--bad); }
.completed { color: var(--good); }
.active, .running { color: var(--run); }
.paused, .triggering, .completed_with_failures { color: var(--wait); }
.run { border-top: 1px solid var(--line); padding: .3rem 0; }
.run summary { display: grid; grid-template-columns: 2fr 1fr 7rem 3fr; gap: 0 .75rem; cursor: pointer; }
.run summary::before { display: none; }
.run ul { padding-left: 1.2rem; }
progress { width: 100%; height: .8rem; accent-color: var(--run); }
pre { white-space: pre-wrap; margin: .25rem 0; }
#stale { display: none; }
.stale #stale { display: block; }
@media (max-width: 40rem) { .run summary { grid-template-columns: 1fr 1fr; } }
"""

PAGE_SCRIPT: Final = """
const made = Number(document.body.dataset.made), alive = document.body.dataset.alive === "1";
function tell() {
  const s = Math.max(0, Math.round(Date.now() / 1000 - made));
  document.getElementById("age").textContent = s < 90 ? s + " s ago" :
    s < 5400 ? Math.round(s / 60) + " min ago" : Math.round(s / 3600) + " h ago";
  document.body.classList.toggle("stale", alive && s > 180);
}
tell();
setInterval(tell, 1000);
setTimeout(() => location.reload(), 30000);
"""


def page_row(view: Mapping[str, Any], now: float) -> str:
    """Return one run of the page: a line, and its details folded."""
    esc, trigger = html.escape, view["trigger"] or {}
    ended = sum(STATUS_RANK.get(b["status"]) == 3 for b in view["batches"])
    status = view["status"]
    lines = [f"<p class=error>{esc(view['error'])}</p>"] if view["error"] else []
    if trigger.get("url"):
        text = f"Keboola job {esc(trigger['keboola_job_id'])}"
        lines.append(f'<p><a href="{esc(trigger["url"])}" rel=noreferrer>{text}</a></p>')
    times = [
        (name, view[key])
        for name, key in (("Last look", "last_check_at"), ("Ended", "completed_at"))
        if view[key]
    ]
    lines += [f"<p class=dim>{name} {at} ({ago(at, now)})</p>" for name, at in times]
    if view["attention"] or not status.startswith("completed"):
        items = [
            f"<li>{esc(b['id'])} {esc(b['status'] or 'not polled')}" for b in view["batches"][:50]
        ]
        lines.append(f"<ul>{''.join(items)}</ul>")
    bar = f"<progress max=100 value={math.floor(100 * progress_of(view))}></progress>"
    return (
        f"<details class=run{' open' if view['attention'] else ''}><summary>"
        f"<strong>{esc(view['name'])}</strong>"
        f"<span class={status}>{status.replace('_', ' ')} {ended}/{view['batch_count']}</span>{bar}"
        f"<span class=dim>{esc(what_next(view, now))}</span></summary>{''.join(lines)}</details>\n"
    )


def page(shot: Mapping[str, Any], events: Iterable[Event]) -> str:
    """Return a snapshot as a page: what needs attention first; the rest folded where it is long.

    The script is allowed by its hash; it says how old the page is, and that the daemon is dead when
    it is. Without it, the time stands beside the headline.
    """

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(PAGE_STYLE)}'; "
        f"script-src 'sha256-{digest(PAGE_SCRIPT)}'"
    )
    now = unix_of(shot["generated_at"]) or 0.0
    views = in_order_of_need(shot["jobs"])
    needs = shot["attention"]
    kinds = {
        "Needs attention": [v for v in views if v["attention"]],
        "Active": [
            v for v in views if not v["attention"] and v["status"] in {"active", "triggering"}
        ],
        "Running": [
            v for v in views if not v["attention"] and v["status"] in {"running", "failed"}
        ],
        "Paused": [v for v in views if not v["attention"] and v["status"] == "paused"],
        "Finished": [
            v for v in views if not v["attention"] and v["status"].startswith("completed")
        ],
    }
    parts = []
    for title, found in kinds.items():
        rows = [page_row(view, now) for view in found]
        head, rest = rows[:15], rows[15:]
        if rows:
            parts.append(f"<h2>{title} ({len(rows):,})</h2>\n{''.join(head)}")
        if rest:
            more = f"<summary>{len(rest):,} more</summary>{''.join(rest)}"
            parts.append(f"<details>{more}</details>\n")
    told = "".join(f"<li>{rfc3339(e.at)} {html.escape(e.text)}" for e in events)
    title = f"{needs} need attention - TeckoChecker" if needs else "TeckoChecker"
    is_alive = int(bool(shot["daemon"]["running"]))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{title}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>{PAGE_STYLE}</style>\n</head>\n'
        f"<body data-made={now:.0f} data-alive={is_alive}>\n{page_alarms(shot)}<h1>TeckoChecker</h1>\n"
        f"<p>{counts_in_words(views) or 'no jobs'}</p>\n"
        f"<p class=dim>Made at {shot['generated_at']} <span id=age></span></p>\n<main>\n"
        f"{'' if needs else '<p class=completed>Nothing needs attention.</p>'}{''.join(parts)}"
        f"<h2>Last events</h2>\n<details><summary>the newest first</summary><ul>{told}</ul></details>\n"
        f"</main>\n<script>{PAGE_SCRIPT}</script>\n</body>\n</html>\n"
    )


def page_alarms(shot: Mapping[str, Any]) -> str:
    """Return what a reader of the page has to see before anything else."""
    made = shot["generated_at"]
    parts = [
        '<div class="alarm loud" role=alert id=stale><strong>This page is stale.</strong> It was made '
        f"at {made}, and no other one since: the daemon has died, or cannot write here.</div>\n"
    ]
    if shot["daemon"]["running"] is False:
        parts.append(
            '<div class="alarm loud" role=alert><strong>The daemon was stopped</strong> at '
            f"{made}. Nothing is polled and nothing is started.</div>\n"
        )
    if shot["config"]["error"]:
        parts.append(
            "<div class=alarm role=alert><strong>The config file has problems;</strong> the previous"
            f" one still counts.<pre>{html.escape(shot['config']['error'])}</pre></div>\n"
        )
    return "".join(parts)


# --- as files -------------------------------------------------------------------------------------


def put_file(directory: Path, name: str, text: str) -> None:
    """Write a file that everyone may read, as a whole or not at all. Raises OSError."""
    new = directory / f".{name}.new"
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - a descriptor
            os.fchmod(fd, 0o644)
            file.write(text)
        new.replace(directory / name)
    finally:
        new.unlink(missing_ok=True)  # a full disk is not to stay full for its sake


class Publisher:
    """Writes page, document and metrics whenever something has changed, and once a minute."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._trouble = ""
        self._took_s = 0.0

    async def run(self) -> None:
        """Publish while the process runs."""
        happened = asyncio.Event()
        self._engine.told.append(happened)
        while True:
            happened.clear()
            await self.publish(is_running=True)
            pause_s = min(50.0, max(1.0, 30 * self._took_s))  # a thirtieth of the time
            await asyncio.sleep(pause_s)
            await wait_for_event(happened, 50.0 - pause_s)

    async def publish(self, *, is_running: bool | None) -> None:
        """Write the files, if the config has a place for them; trouble is told once.

        `is_running` is None where a pass of --once makes them.
        """
        engine = self._engine
        directory = engine.loaded.config.publish_path
        if directory is None:
            return
        shown, stats = engine.shown(), list(engine.stats.values())
        daemon = lock_owner(engine.store.path) | {"running": is_running}
        loaded = (engine.store.meta("config") or {}) | {"error": engine.config_error}
        config, now, trouble = engine.loaded.config, engine.clock.now(), ""

        def write() -> None:
            started = time.monotonic()
            refused = sum(use.refused_since is not None for use in stats)
            shot = snapshot(config, shown, daemon=daemon, loaded=loaded, refused=refused, now=now)
            events, ended = [], {}
            with Store.reading(engine.store.path) as store:
                if store:
                    events, ended = store.events(most=50)[::-1], ends_of(store)
            directory.mkdir(exist_ok=True)
            put_file(directory, "status.json", f"{json.dumps(shot)}\n")
            put_file(directory, "metrics.prom", metrics(shot, stats, ended))
            put_file(directory, "status.html", page(shot, events))
            self._took_s = time.monotonic() - started

        try:
            await asyncio.to_thread(write)
        except (OSError, TeckoError, sqlite3.Error) as error:
            trouble = one_line(str(error))
        except Exception as error:  # noqa: BLE001 - a bug here must not end what starts jobs
            trouble = one_line(f"{type(error).__name__}: {error}")
        if trouble and trouble != self._trouble:
            engine.log(Event.of("publish_failed", directory=str(directory), error=trouble))
        elif self._trouble and not trouble:
            engine.log(Event.of("publish_recovered"))
        self._trouble = trouble


def ends_of(store: Store) -> dict[str, int]:
    """Return how many Keboola jobs had which end."""
    query = (
        "SELECT keboola_status, count(*) FROM runs WHERE phase = 'finished'"
        " AND keboola_status IS NOT NULL GROUP BY 1"
    )
    return {row[0]: row[1] for row in store.db.execute(query)}


# ==================================================================================================
# 9. Commands: what a person types. Only these print
# ==================================================================================================


def config_path(args: argparse.Namespace) -> Path:
    """Return the config that a command is about."""
    given_path = getattr(args, "config", None)
    return Path(given_path or os.environ.get("TECKOCHECKER_CONFIG") or "config.yaml")


# --- the daemon and --once ------------------------------------------------------------------------


async def was_cut_short(work: Awaitable[None], by: asyncio.Event) -> bool:
    """Do something for at most PATIENCE_S, unless an event is or becomes set; returns if it was."""
    doing, waiting = asyncio.ensure_future(work), asyncio.ensure_future(by.wait())
    try:
        if not by.is_set():
            await asyncio.wait(
                {doing, waiting}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED
            )
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)
    return by.is_set()


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
        state_path = read_config_file(path, files)[0].state_path
        text = None
        if not once:
            with contextlib.suppress(TeckoError), Store.reading(state_path) as store:
                good = (store and store.meta("good_config")) or {}
                text = good.get("text") if good.get("path") == str(path.absolute()) else None
        if text is None:
            raise
        return load_config(path, files, os.environ, redactor, text), error


async def serve(path: Path, *, once: bool) -> int:
    """Be the daemon or, with `once`, one pass of it; returns the exit code.

    Raises ConfigError, LockedError and StateError before anything was asked of a server.
    """
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    redactor, files, env, writer = Redactor(), Files(), os.environ, LogWriter()
    loaded, rejected = load_at_start(path, files, redactor, once=once)
    config, clock, manager = loaded.config, Clock(), ServiceManager(env)
    configure = functools.partial(configure_logging, redactor=redactor, writer=writer)
    configure(config)
    lock = StateLock(config.state_path, "--once" if once else "daemon", clock.now())
    store = Store.open(config.state_path)
    http = Http(config, redactor)
    engine = Engine(loaded, store, lock, http, clock, redactor, once=once)
    webhooks = Http(replace(config, max_concurrency=10, request_timeout=10), redactor)
    publisher, signals = Publisher(engine), Signals()
    helpers: list[Callable[[], Awaitable[None]]] = []
    if not once:
        reloader = Reloader(engine, files, env, redactor, manager, configure)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.on_hangup)
        alive = functools.partial(keep_alive, engine, manager)
        tell = functools.partial(send_webhooks, engine, webhooks)
        helpers = [alive, reloader.run, reloader.watch, publisher.run, tell]
    try:
        note_start(engine, rejected)
        code = await run_engine(engine, signals, helpers, manager)
        if once and code == 0:
            code = end_of_pass(engine)
            telling = send_webhooks(engine, webhooks, once=True)
            code = 130 if await was_cut_short(telling, signals.stop) else code
        elif not once:
            engine.log(Event.of("daemon_stopped"))
        await was_cut_short(publisher.publish(is_running=False), signals.now)
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
        batches = sum(len(job.batch_ids) for job in config.jobs.values())
        facts = {"jobs": counted(len(config.jobs), "job"), "batches": counted(batches, "batch")}
        about = {"version": __version__, "pid": os.getpid(), "config": str(config.path)}
        engine.log(Event.of("daemon_started", **about, **facts))
    if rejected:
        problems = [str(problem) for problem in rejected.problems]
        event = Event.of("config_rejected", problem=problems[0], problems=problems)
        engine.note_config("\n".join(problems), event)
    else:
        note_loaded(engine, None)


def end_of_pass(engine: Engine) -> int:
    """Tell what still needs attention, when that is new and then once a day; returns the exit code."""
    engine.sweep()
    runs = [run for run in engine.shown() if run.attention]
    keys = [name for name, use in engine.stats.items() if use.refused_since]
    names = [run.name for run in runs] + keys
    told = engine.store.meta("attention_told") or {}
    now = engine.clock.now()
    if names and (told.get("names") != names or not 0 <= now - told.get("at", 0) < DAY_S):
        reasons = [f"{run.name} ({run.error or run.attention})" for run in runs]
        facts = {"count": len(names), "runs": "; ".join([*reasons, *keys]), "names": names}
        remember = Store.meta_statement("attention_told", {"names": names, "at": now})
        engine.commit([], [Event.of("jobs_need_attention", **facts)], [remember])
    return 1 if names or engine.has_failed else 0


def run_daemon(args: argparse.Namespace) -> int:
    """Run the daemon, or one pass with --once."""
    try:
        return asyncio.run(serve(config_path(args), once=args.once))
    except LockedError:
        # From cron, a pass that takes long is no reason for mail: it does the work.
        owner = lock_owner(read_config_file(config_path(args), Files())[0].state_path)
        if args.once and owner["once"]:
            return LockedError.exit_code
        raise


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
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def fitted(text: str, width: int) -> str:
    """Return a line, cut to a number of columns."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


# --- check, init ----------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    """Validate the config just as the start does, without asking any server."""
    path = config_path(args)
    loaded = load_config(path, Files(), os.environ, Redactor())
    for warning in loaded.warnings:
        print(f"{path}: warning: {warning}", file=sys.stderr)
    jobs = loaded.config.jobs.values()
    batches = sum(len(job.batch_ids) for job in jobs)
    counts = ((len(jobs), "job"), (batches, "batch"), (len(loaded.secrets), "secret"))
    print(f"{path}: fine: {', '.join(counted(n, noun) for n, noun in counts)}")
    return 0


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


def write_new(path: Path, text: str) -> bool:
    """Write a file that only its owner can read; returns False if there is one already."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another DIR") from None
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(text)
        file.flush()
        os.fsync(fd)
    return True


def run_init(args: argparse.Namespace) -> int:
    """Write a first config and a new key; the one that is there stays as it is."""
    directory = Path(args.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose another DIR"
        raise UsageError(f"cannot make {directory}: {error.strerror}", hint) from None
    config, key = directory / "config.yaml", directory / "teckochecker.key"
    made = [
        p
        for p, text in ((key, f"{Fernet.generate_key().decode()}\n"), (config, EXAMPLE_CONFIG))
        if write_new(p, text)
    ]
    if not made:
        raise UsageError(f"{config} and {key} are there already", "nothing is overwritten")
    shown = shlex.quote(str(config))
    print(f"wrote {' and '.join(map(str, sorted(made)))}, which only you can read. Next:")
    print(f"  1. edit {config}: stack, batch ids, config_id, and the tokens, in plain for now")
    print(f"  2. teckochecker --config {shown} encrypt")
    print(f"  3. teckochecker --config {shown} doctor, then without a command: the daemon")
    return 0


def run_encrypt(args):
    return 0


def run_secret(args):
    return 0


def run_job(args):
    return 0


def add_job_options(parser):
    pass


# --- doctor ---------------------------------------------------------------------------------------

DOCTOR_PATIENCE_S: Final = 45  # for all requests with one secret; the secrets go side by side
LEAST_FREE_BYTES: Final = 100 * 1024 * 1024
FLOWS: Final = ("keboola.orchestrator", "keboola.flow")  # they hand variables on to their tasks

Finding = tuple[str, str, str]  # a mark (✓ is right, ! could be better, ✗ is wrong), what, the cure


class Doctor:
    """Tries everything that has to be right; each check adds its findings to a list."""

    def __init__(self, config: Config, secrets: Mapping[str, Secret], redactor: Redactor) -> None:
        self.config = config
        self.counts: collections.Counter[str] = collections.Counter()  # of findings, by mark
        self._secrets = secrets
        self._redactor = redactor
        # The batches that are still polled, by job; a job whose run is finished is not here.
        self._open = {name: list(j.batch_ids) for name, j in config.jobs.items() if not j.done}
        self._skews: dict[str, float] = {}  # how far our clock is ahead of a secret's server

    def tell(self, found: Iterable[Finding]) -> None:
        """Print findings, a line each, and count them."""
        words = {"✓": "ok", "!": "!", "✗": "WRONG"}
        colours = {"✓": GREEN, "!": "", "✗": RED}
        for mark, what, cure in found:
            self.counts[mark] += 1
            text = one_line(self._redactor.text(f"{what}; {cure}" if cure else what), 1000)
            print(painted(mark if can_show("✓✗") else words[mark], colours[mark]), text, flush=True)

    # --- this machine ---

    def check_files(self) -> Iterator[Finding]:
        """Check directories, the state file and its neighbours, and who runs."""
        state = self.config.state_path
        publish = self.config.publish_path
        yield self._check_directory(state.parent, "the state file")
        if publish:
            place = publish if os.path.lexists(publish) else publish.parent
            yield self._check_directory(place, "published files")
        try:
            with Store.reading(state) as store:
                if store:
                    check_undamaged(store.db, state)
                    self._skip_what_is_over(store)
            there = "is whole" if store else "is not there yet: the first start makes it"
            yield "✓", f"the state file {state} {there}", ""
            yield from self._check_rights(state)
        except TeckoError as error:
            yield "✗", str(error), ""
        owner = lock_owner(state)
        if owner["running"] or owner["once"]:
            kind = "the daemon" if owner["running"] else "a pass of --once"
            yield "✓", f"running now: {kind} (pid {owner['pid']})", ""
        elif owner["pid"]:
            what = f"pid {owner['pid']} has not run its loop since {owner['last_loop_at']}"
            yield "!", what, "it hangs or was killed: see its log, and start it again"
        else:
            yield "✓", "nothing runs now", ""

    @staticmethod
    def _check_directory(directory: Path, what: str) -> Finding:
        """Check that files can be made in a directory, and that its disk has room."""
        try:
            free = shutil.disk_usage(directory).free
        except OSError as error:
            cure = "create it (under systemd, the unit does)"
            return "✗", f"{directory}, for {what}: {error.strerror}", cure
        if not os.access(directory, os.W_OK | os.X_OK):
            cure = "chown it to the daemon's user, or run this as that user"
            return "✗", f"{directory}, for {what}, cannot be written by this user", cure
        if free < LEAST_FREE_BYTES:
            text = f"{directory}, for {what}, has {free >> 20} MiB left"
            return "✗", text, "make room on the disk"
        return "✓", f"{directory}, for {what}: {free >> 20:,} MiB free", ""

    @staticmethod
    def _check_rights(state: Path) -> Iterator[Finding]:
        """Check that the files belong to one user, the directory's, and can be written.

        In a directory of root's the daemon may be anybody: then the lock file tells who it is.
        """
        names = ("", ".lock", "-wal", "-shm")
        paths = [
            path for name in names if (path := state.with_name(f"{state.name}{name}")).exists()
        ]
        places = [state.parent, state.with_name(f"{state.name}.lock")]
        model = next((p for p in places if p.exists() and p.stat().st_uid != 0), state.parent)
        user = model.stat()
        for path in paths:
            if path.stat().st_uid != user.st_uid:
                what = f"{path} belongs to {owner_of(path)}, but {model} to {owner_of(model)}"
                yield "✗", what, f"run: chown {user.st_uid}:{user.st_gid} {shlex.quote(str(path))}"
            elif not os.access(path, os.R_OK | os.W_OK):
                cure = "run this as the daemon's user, or chown it to that user"
                yield "✗", f"{path} cannot be written by this user", cure

    def _skip_what_is_over(self, store: Store) -> None:
        """Leave out finished runs and batches, which may be gone by now; add those of groups."""
        config = self.config
        runs = store.runs_for(config.jobs, recent=False)
        targets = {name: config.target(job) for name, job in config.jobs.items()}
        for name, run in assign(config.jobs, targets, [r for r in runs if not r.group]).items():
            if run.phase is Phase.FINISHED:
                self._open.pop(name, None)
            elif name in self._open:
                self._open[name] = [batch.id for batch in run.batches if not batch.is_final]
        for run in runs:
            if run.group and run.phase is Phase.POLLING and run.job in self._open:
                self._open[run.job] += [b.id for b in run.batches if not b.is_final]

    # --- the servers ---

    async def check_servers(self) -> None:
        """Ask OpenAI and Keboola with every secret about all that the jobs need of them."""
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        timeout_s = min(8, self.config.request_timeout)
        http = Http(replace(self.config, request_timeout=timeout_s), self._redactor)
        if http.rules.unreadable:
            entries = ", ".join(map(quoted, http.rules.unreadable))
            what = f"$NO_PROXY has entries that are neither host nor network: {entries}"
            self.tell([("!", what, "remove them: they are ignored")])
        names = [
            name
            for kind in ("openai", "keboola")
            for name in self.config.of_type(kind)
            if name in self._secrets
        ]
        checks = [asyncio.create_task(self._check_secret(name, http)) for name in names]
        try:
            for check in checks:
                self.tell(await check)
        finally:
            await http.close()
        off = {name: skew for name, skew in self._skews.items() if abs(skew) > MINUTE_S}
        for name, skew in off.items():
            side = "ahead of" if skew > 0 else "behind"
            what = f"the clock is {in_words(abs(skew))} {side} that of {name}'s server"
            self.tell([("!", what, "let NTP set it (systemd-timesyncd, chrony)")])
        if self._skews and not off:
            most = max(map(abs, self._skews.values()))
            self.tell([("✓", f"the clock agrees with the servers' to {most:.0f} s", "")])

    async def _check_secret(self, name: str, http: Http) -> list[Finding]:
        """Return what is found with one secret, as far as the time allows."""
        found: list[Finding] = []
        check = {"openai": self._check_openai, "keboola": self._check_keboola}
        try:
            async with asyncio.timeout(DOCTOR_PATIENCE_S):
                await check[self.config.secrets[name].type](name, http, found)
        except TimeoutError:
            text = f"{name}: not everything was answered within {DOCTOR_PATIENCE_S} s"
            cure = "see why its server is slow; for very many jobs, raise max_concurrency"
            found.append(("✗", text, cure))
        return found

    def _note_for(self, name: str) -> Note:
        """Return what remembers how far the clock is from that of a secret's server."""

        def note(_: ApiError | None, date: float | None) -> None:
            if date is not None:
                self._skews[name] = time.time() - date

        return note

    def _new_token(self, name: str) -> str:
        """Return where a new token for a secret belongs."""
        entry = self.config.secrets[name]
        if entry.source == "value":
            config = shlex.quote(str(self.config.path))
            return f"make a new one, then run: teckochecker --config {config} secret set {name}"
        return f"make a new one, and put it into {entry.source} {entry.text.reveal()}"

    def _cure(self, name: str, error: ApiError) -> str:
        """Return what to do where a server does not answer as it should."""
        if error.status in {401, 403}:
            return self._new_token(name)
        if error.status is None:
            return "check the address, the network and the proxy"
        if error.status < 400:
            return "check the address: something else answers there"
        return "see the server's own words, and its status page"

    # --- OpenAI ---

    async def _ask_openai(
        self, http: Http, name: str, path: str, read: Callable[[Any], Any], cursor: str = ""
    ) -> Any:  # noqa: ANN401 - what `read` returns
        """Return what `read` makes of an answer's JSON. Raises ApiError after the retries."""
        entry, key = self.config.secrets[name], self._secrets[name].reveal()
        is_bearer = entry.auth_header == "Authorization"
        headers = {
            entry.auth_header: f"Bearer {key}" if is_bearer else key,
            "OpenAI-Organization": entry.organization or "",
            "OpenAI-Project": entry.project or "",
        }
        headers = {header: value for header, value in headers.items() if value}
        params = {"limit": "" if path else "100", "after": cursor}
        params["api-version"] = entry.api_version or ""
        params = {param: value for param, value in params.items() if value}
        url = f"{entry.base_url}/batches{path}"

        async def attempt(left_s: float) -> Any:  # noqa: ANN401
            got = http.get(url, headers, params, left_s)
            answer = await noted(got, "OpenAI", self._note_for(name))
            try:
                return read(answer.json())
            except ValueError as error:
                message = f"OpenAI's answer is not what was asked for: it {error}"
                message += server_words(answer)
                raise answer.error(message, retryable=True) from None

        return await with_retries(attempt)

    async def _check_openai(self, name: str, http: Http, found: list[Finding]) -> None:
        """Check an OpenAI key, and whether it reads the batches that are polled with it."""
        url = self.config.secrets[name].base_url
        jobs = [self.config.jobs[n] for n in self._open]
        jobs = [job for job in jobs if job.openai_secret == name]
        polled = dict.fromkeys(batch_id for job in jobs for batch_id in self._open[job.name])
        seen: set[str] = set()
        try:
            await self._read_list(http, name, polled, seen)
            found.append(("✓", f"{name}: {url} takes the key", ""))
        except ApiError as error:
            if error.status not in {404, 405, 429, 501}:
                found.append(("✗", f"{name}: {url}: {error}", self._cure(name, error)))
                return
            finders = [job.name for job in jobs if job.match]
            if finders:
                what = f"job {finders[0]}: new batches cannot be found: {url} has no list of them"
                found.append(("✗", f"{what}: {error}", "write batch_ids instead of match"))
            elif not polled:
                what = f"{name}: {url} has no list of batches, and no job a batch"
                found.append(("✓", f"{what}: the key is not tried", ""))
        failures: dict[str, ApiError] = {}

        async def ask(batch_id: str) -> None:
            read = functools.partial(parse_batch, batch_id=batch_id)
            try:
                await self._ask_openai(http, name, f"/{batch_id}", read)
            except ApiError as error:
                failures[batch_id] = error

        await asyncio.gather(*(ask(batch_id) for batch_id in polled if batch_id not in seen))
        for job in jobs:
            for batch_id in self._open[job.name]:
                if failure := failures.get(batch_id):
                    cure = self._cure(name, failure)
                    if failure.status == 404:
                        cure = "it was deleted, or belongs to another OpenAI project: correct "
                        cure += "batch_ids, openai_secret, or that secret's base_url"
                    found.append(("✗", f"job {job.name}: {batch_id}: {failure}", cure))
        if len(failures) < len(polled):
            what = f"{name}: reads {len(polled) - len(failures)} of {counted(len(polled), 'batch')}"
            found.append(("✓", what, ""))

    async def _read_list(
        self, http: Http, name: str, polled: Collection[str], seen: set[str]
    ) -> None:
        """Note which batches the account's list shows, page after page while they show many."""

        def read(data: object) -> tuple[list[str], bool]:
            rows = data.get("data") if isinstance(data, dict) else None
            if not isinstance(data, dict) or not isinstance(rows, list):
                raise ValueError("has no list of batches")
            ids = [str(row.get("id")) for row in rows if isinstance(row, dict)]
            return ids, bool(ids) and data.get("has_more") is not False

        cursor, shown, has_more = "", 10, True
        while has_more and shown >= 10:
            ids, has_more = await self._ask_openai(http, name, "", read, cursor)
            shown = len({*ids} & {*polled} - seen)
            seen |= {*ids} & {*polled}
            has_more = has_more and len(seen) < len(polled)
            cursor = ids[-1] if ids else ""

    # --- Keboola ---

    async def _check_keboola(self, name: str, http: Http, found: list[Finding]) -> None:
        """Check a Keboola token, its queue, and every configuration that is started with it."""
        entry = self.config.secrets[name]
        keboola = Keboola(entry, self._secrets[name], http, Clock(), self._note_for(name))
        try:
            found += self._check_token(name, await keboola.verify())
        except ApiError as error:
            found.append(("✗", f"{name}: {entry.stack_url}: {error}", self._cure(name, error)))
            return
        jobs: dict[Target, list[Job]] = {}
        for job in (self.config.jobs[job_name] for job_name in self._open):
            if job.keboola_secret == name:
                jobs.setdefault(self.config.target(job), []).append(job)
        try:
            url = await keboola.queue_url()
            if jobs:
                await keboola.search(next(iter(jobs)), time.time() - MINUTE_S, "-")
            found.append(("✓", f"{name}: the queue is {url}", ""))
        except ApiError as error:
            found.append(("✗", f"{name}: the queue: {error}", self._cure(name, error)))
        checks = [check_target(keboola, target, own) for target, own in jobs.items()]
        for findings in await asyncio.gather(*checks):
            found += findings

    def _check_token(self, name: str, said: Mapping[str, Any]) -> Iterator[Finding]:
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
            when = f", expires in {in_words(left_s)}" if left_s > 0 else ", has expired"
        mark = "✓" if left_s > 14 * DAY_S else "!" if left_s > 0 else "✗"
        cure = "" if mark == "✓" else self._new_token(name)
        yield mark, f"{name}: the token is one of project {quoted(project)}{when}", cure
        if said.get("canCreateJobs") is False:
            cure = f"give it that right (canCreateJobs), or {self._new_token(name)}"
            yield "✗", f"{name}: the token may not start jobs", cure


async def check_target(keboola: Keboola, target: Target, jobs: Sequence[Job]) -> list[Finding]:
    """Return whether a configuration is there, and fits each of the jobs that start it."""
    others = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    text = f"job {jobs[0].name}{others}: {target}"
    try:
        said = await keboola.configuration(target)
        declared = await declared_variables(keboola, target, said)
    except ApiError as error:
        cure = "see the server's own words, and its status page"
        if error.status in {400, 401, 403, 404}:
            cure = "correct component_id, config_id, branch_id or the token's rights"
        return [("✗", f"{text}: {error}", cure)]
    if said.get("isDisabled") is True and any(job.mode != "forceRun" for job in jobs):
        return [("✗", f"{text} is disabled", "enable it in Keboola")]
    found: list[Finding] = []
    rows = said.get("rows")
    for job in jobs:
        there = {str(row.get("id")) for row in rows or () if isinstance(row, dict)}
        gone = [row for row in job.config_row_ids if isinstance(rows, list) and row not in there]
        if gone:
            what = f"job {job.name}: {target} has no rows {', '.join(gone)}"
            found.append(("✗", what, "correct config_row_ids"))
        sent = {*OWN_VARIABLES, *dict(job.variables)} - ({"teckochecker_group"} - {*job.match})
        missing = [variable for variable in declared or () if variable not in sent]
        if missing:
            what = f"job {job.name}: {target} needs the variables {', '.join(missing)}"
            cure = "add them to the job's variables: what is sent replaces the defaults"
            found.append(("✗", what, cure))
    if declared is None and target.component_id not in FLOWS:
        what = f"{text} has no variables_id, so that its Keboola job gets no batch ids"
        cure = "connect a variables configuration to it, as in README under What Keboola gets"
        return [*found, ("!", what, cure)]
    takes = "hands its variables to its tasks" if declared is None else "gets its variables"
    return found or [("✓", f"{text} is there, and {takes}", "")]


async def declared_variables(
    keboola: Keboola, target: Target, said: Mapping[str, Any]
) -> list[str] | None:
    """Return the names of the variables that a configuration declares; None: it takes none."""
    inner = said.get("configuration")
    variables_id = inner.get("variables_id") if isinstance(inner, dict) else None
    if not isinstance(variables_id, str | int) or not variables_id:
        return None
    where = replace(target, component_id="keboola.variables", config_id=str(variables_id))
    content = (await keboola.configuration(where)).get("configuration")
    rows = content.get("variables") if isinstance(content, dict) else None
    return [str(row.get("name")) for row in rows or () if isinstance(row, dict)]


def run_doctor(args: argparse.Namespace) -> int:
    """Try everything that has to be right."""
    path, files, redactor = config_path(args), Files(), Redactor()
    config, problems, _ = read_config_file(path, files)
    opener = SecretOpener(config, files, os.environ)
    secrets = opener.open_all()
    redactor.learn(opener.all_known(secrets))
    problems = sorted([*problems, *opener.problems], key=lambda p: (p.line, p.column))
    doctor = Doctor(config, secrets, redactor)
    if not problems:
        words = f"{counted(len(config.jobs), 'job')}, {counted(len(secrets), 'secret')}"
        doctor.tell([("✓", f"{path}: {words}, and every secret opens", "")])
    doctor.tell(("✗", str(problem), "") for problem in problems)
    doctor.tell(("!", warning, "") for warning in [*opener.warnings, *mount_warning(path)])
    if config.sha256:
        doctor.tell(doctor.check_files())
        asyncio.run(doctor.check_servers())
    wrong, warnings = doctor.counts["✗"], doctor.counts["!"]
    print(f"{counted(wrong, 'problem')}, {counted(warnings, 'warning')}")
    return 1 if wrong else 0


# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a command knows: the config that counts, its runs, and the snapshot of them."""

    config: Config
    runs: Sequence[Run]
    shot: Mapping[str, Any]


@contextlib.contextmanager
def viewing(args: argparse.Namespace) -> Iterator[tuple[View, Store | None]]:
    """Return what the state file knows, beside a running daemon too.

    Where the file has problems, the last good config counts, as it does for the daemon. Where
    nothing has run yet, the runs are those that the first start would make. Raises ConfigError where
    the file does not even tell where the state file is.
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
        if problems and good.get("path") == str(path.absolute()):
            config, _ = parse_config(good["text"], path)
        runs = known_runs(config, store)
        on_disk = "\n".join(map(str, ConfigError(problems).problems)) if problems else None
        stats = store.stats().values() if store else ()
        shot = snapshot(
            config,
            runs,
            daemon=lock_owner(config.state_path),
            loaded=dict(loaded) | {"error": on_disk or loaded.get("error")},
            refused=sum(s.refused_since is not None and s.name in config.secrets for s in stats),
            now=time.time(),
        )
        yield View(config, runs, shot), store


def known_runs(config: Config, store: Store | None) -> list[Run]:
    """Return the runs of a config's jobs, in its order, as the state file has them or will."""
    stored = store.runs_for(config.jobs) if store else []
    targets = {name: config.target(job) for name, job in config.jobs.items()}
    assigned = assign(config.jobs, targets, [run for run in stored if not run.group])
    runs = []
    for name, job in config.jobs.items():
        batches = tuple(Batch(batch_id) for batch_id in job.batch_ids)
        run = assigned.get(name) or Run(0, name, targets[name], batches=batches, next_at=math.inf)
        if not job.match:
            runs.append(replace(run, job=name, batches=in_order(run, job, run.batches)))
        others = [r for r in stored if r.job == name and (not runs or r.id != runs[-1].id)]
        runs += [r for r in others if (job.match and r.group) or r.may_be_at_keboola]
    return runs


def chosen(view: View, name: str) -> list[int]:
    """Return the places of the runs that a name means: of one run, or of a job. Raises UsageError."""
    found = [i for i, run in enumerate(view.runs) if name in {run.name, run.job}]
    if not found and name not in view.config.jobs:
        raise UsageError(f"there is no job {quoted(name)}", "`teckochecker status` lists them all")
    return found


def status_table(view: View) -> list[str]:
    """Return the runs as lines, those first that need attention, each with what happens next.

    On a terminal nothing is wider than it, and of very many only the first are shown.
    """
    shot = view.shot
    now = unix_of(shot["generated_at"]) or 0.0
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else 10_000
    views = in_order_of_need(shot["jobs"])
    shown = views[:60] if is_terminal else views
    rows = [
        (
            fitted(run["name"], max(12, width // 3)),
            run["status"].replace("_", " "),
            f"{sum(STATUS_RANK.get(b['status']) == 3 for b in run['batches'])}/{run['batch_count']}"
            f" {math.floor(100 * progress_of(run)):>3}%",
            ago(run["last_check_at"], now),
        )
        for run in shown
    ]
    lines = []
    head, *body = table([("RUN", "STATUS", "BATCHES", "LAST POLL"), *rows])
    for run, line in zip(shown, body, strict=True):
        is_over = run["status"] in {"completed", "paused"}
        colour = RED if run["attention"] else DIM if is_over else ""
        lines.append(painted(fitted(line, width), colour))
        lines.append(painted(fitted(f"    {what_next(run, now)}", width), DIM))
        error = textwrap.wrap(run["error"] or "", max(20, width - 4), break_on_hyphens=False)
        lines += [painted(f"    {text}", RED) for text in error[:4]]
    if len(views) > len(shown):
        lines.append(f"... and {counted(len(views) - len(shown), 'run')} more; see --json")
    return [head, *lines] if views else ["no jobs"]


def job_story(view: View, place: int, store: Store | None) -> list[str]:
    """Return everything about one run: its batches, what Keboola got, and its whole story."""
    run, shown = view.runs[place], view.shot["jobs"][place]
    now = unix_of(view.shot["generated_at"]) or 0.0
    trigger = shown["trigger"] or {}
    facts = [
        ("run", run.name),
        ("status", shown["status"].replace("_", " ")),
        ("error", shown["error"]),
        ("next", what_next(shown, now)),
        ("target", str(run.target)),
        ("last poll", f"{shown['last_check_at']} ({ago(shown['last_check_at'], now)})"),
        ("trigger", f"{trigger['state']} {trigger['id']}" if trigger else None),
        ("Keboola job", trigger.get("url") or trigger.get("keboola_job_id")),
    ]
    lines = [f"{name:<12} {value}" for name, value in facts if value is not None]
    rows = [("BATCH", "STATUS", "REQUESTS", "EXPIRES", "OUTPUT", "NOTE")]
    for b in run.batches:
        requests = f"{b.completed or 0}/{b.total}" if b.total is not None else ""
        status = b.status or ("not polled" if not run.last_check_at else "no answer yet")
        expires = "" if b.is_terminal else rfc3339(b.expires_at) or ""
        rows.append((b.id, status, requests, expires, b.output_file_id or "", b.error or ""))
    lines += ["", *table(rows)]
    if run.payload:
        values = json.loads(run.payload)["variableValuesData"]["values"]
        lines += ["", "What Keboola gets:", *(f"  {v['name']} = {v['value']}" for v in values)]
    events = store.events(name=run.name) if store else []
    return [*lines, *([""] if events else []), *(f"{rfc3339(e.at)} {e.text}" for e in events)]


def run_status(args: argparse.Namespace) -> int:
    """Show what is known of the runs."""
    with viewing(args) as (view, store):
        shot = dict(view.shot)
        lines = []
        if shot["config"]["error"]:
            lines.append("The config file has problems; the previous one still counts:")
            lines += [painted(line, RED) for line in shot["config"]["error"].splitlines()]
        if args.job is not None:
            places = chosen(view, args.job)
            shot["jobs"] = [shot["jobs"][place] for place in places]
            stories = [job_story(view, place, store) for place in places]
            lines += [line for story in stories for line in (*story, "")][:-1]
        else:
            owner, runs = lock_owner(view.config.state_path), counts_in_words(shot["jobs"])
            who = "Nothing runs: start the daemon, or --once."
            if store is None:
                who = "Nothing has run here yet: start the daemon, or --once."
            elif owner["running"] or owner["once"]:
                who = "The daemon runs." if owner["running"] else "A pass of --once is being made."
            lines += [f"{who} {runs or 'No jobs.'}", "", *status_table(view)]
        print(json.dumps(shot, indent=2) if args.json else "\n".join(lines))
        if args.alive and (why := why_not_alive(view)):
            print(f"teckochecker: {why}", file=sys.stderr)
            return 1
        return 1 if args.check and view.shot["attention"] else 0


def why_not_alive(view: View) -> str:
    """Return why the daemon is to be called dead, or ""."""
    daemon, now = view.shot["daemon"], time.time()
    if not daemon["running"]:
        return "no daemon runs"
    for run in view.runs:
        job = view.config.jobs[run.job]
        since = max(run.last_check_at or 0.0, unix_of(daemon["started_at"]) or 0.0)
        is_due = run.phase is Phase.POLLING and not job.rests and math.isfinite(run.next_at)
        if is_due and max(since, run.next_at) < now - 2 * job.poll_interval - MINUTE_S:
            return f"the polls of {run.name} are overdue"
    return ""


# --- logs, schema, retry --------------------------------------------------------------------------


def run_logs(args: argparse.Namespace) -> int:
    """Print the events that the state file keeps, and with --follow what comes."""
    with viewing(args) as (view, _):
        state_path = view.config.state_path
        if args.job is not None:
            chosen(view, args.job)
    last, most = None, args.n
    while True:
        with Store.reading(state_path) as store:
            after = 0 if last is None else last
            events = store.events(after=after, name=args.job, most=most) if store else []
            last = store.last_event_id() if store else 0
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
    """Print the SQL of the state file."""
    print(f"PRAGMA user_version = {SCHEMA_VERSION};")
    for statement in SCHEMA:
        print(f"{textwrap.dedent(statement).strip()};")
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Ask for runs to be tried again, through the state file."""
    with viewing(args) as (view, store):
        if store is None:
            hint = "start the daemon or --once first"
            raise UsageError(f"there is no state file {view.config.state_path}", hint)
        path, places = view.config.state_path, chosen(view, args.job)
        exact = [view.runs[i] for i in places if view.runs[i].name == args.job]
        runs = exact or [r for i in places if (r := view.runs[i]).phase is not Phase.FINISHED]
        asked, refused = [], ["it has no unfinished runs"] if not runs else []
        for run in runs:
            request = RetryRequest(0, run.id, args.force, run.rerun, run.phase)
            why = after_retry(run, view.config.jobs[run.job], request, time.time())
            if isinstance(why, str):
                refused.append(why)
            else:
                asked.append((run.id, args.force, run.rerun, str(run.phase)))
        owner = lock_owner(path)
    if not asked:
        raise TeckoError(f"{args.job}: {refused[0]}")
    insert = "INSERT INTO requests (run_id, force, rerun, phase) VALUES (?, ?, ?, ?)"
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with contextlib.closing(
        sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
    ) as db:
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

# Each command: what does it, its help in a line, more of it, an example.
COMMANDS: Final[Mapping[str, tuple[Callable[[argparse.Namespace], int], str, str, str]]] = {
    "init": (
        run_init,
        "write a commented config.yaml and a new key file",
        "Both only for your eyes (mode 0600). What is there already is never overwritten.",
        "init /srv/teckochecker",
    ),
    "check": (
        run_check,
        "validate the config offline",
        "It goes the daemon's own way: YAML, every key, the Fernet key, every secret. Each\n"
        "problem is one line with its place and its cure. No server is asked.",
        "check --config config.yaml",
    ),
    "doctor": (
        run_doctor,
        "try everything that has to be right",
        "Config, key, permissions, disk, state file, clock, every OpenAI key and watched batch,\n"
        "every Keboola token, queue and configuration: a line each, with the cure. Nothing is\n"
        "started, nothing is changed; it works beside the daemon. Exits 1 if anything is wrong.",
        "doctor --config /etc/teckochecker/config.yaml",
    ),
    "encrypt": (
        run_encrypt,
        "encrypt every plain value under secrets, in place",
        "Comments and layout stay, and so do the file's mode and owner; the file is replaced as\n"
        "a whole. The key comes from $TECKOCHECKER_KEY, $CREDENTIALS_DIRECTORY/teckochecker.key\n"
        "or key_file (Fernet: AES-128-CBC with HMAC-SHA256); of several, the first encrypts.",
        "encrypt --rotate",
    ),
    "secret": (
        run_secret,
        "list, set or remove secrets in the config",
        "`list` shows names, types and users, never values. `set` asks for the value (hidden; over\n"
        "standard input otherwise), encrypts it, and makes the entry if it is missing.",
        "secret set keboola-prod --type keboola --stack-url https://connection.keboola.com",
    ),
    "job": (
        run_job,
        "add, pause, resume or remove jobs in the config",
        "The file is edited in place, as by a careful person; a running daemon takes it.",
        "job add nightly --batch-id batch_abc123 --config-id 123456",
    ),
    "status": (
        run_status,
        "show the runs, or one job with its whole story",
        "It reads the state file, whether the daemon runs or not, and says which. What needs\n"
        "attention comes first. BATCHES: finished/all, and how much of their requests is done.",
        "status nightly-embeddings",
    ),
    "logs": (
        run_logs,
        "show what has happened, of all jobs or of one",
        "It reads the events that the state file keeps, also while the daemon runs.\n\nevents:\n"
        + textwrap.fill(", ".join(EVENTS), 88),
        "logs nightly-embeddings -n 20 --follow",
    ),
    "retry": (
        run_retry,
        "try a run again now, or all unfinished ones of a job",
        "Polls, searches, or starts again what Keboola rejected or what failed there. A running\n"
        "daemon does it within two seconds, otherwise the next start or --once.",
        "retry nightly-embeddings --force",
    ),
    "import": (
        run_import,
        "print a config made of a database of TeckoChecker 0.9",
        "The old secrets are opened with $SECRET_KEY and encrypted with our key. Exits 1 if\n"
        "something is left out, or has to be looked at, which is told on standard error.",
        "import old/teckochecker.db > imported.yaml",
    ),
    "schema": (
        run_schema,
        "print the SQL of the state file",
        "For whoever wants to read it with other programs. It needs no config.",
        "schema",
    ),
}


def line_count(text: str) -> int:
    """Return a number of lines. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of lines")
    return int(text)


def add_options(
    parsers: Mapping[str, argparse.ArgumentParser], shared: argparse.ArgumentParser
) -> None:
    """Add each command's own options."""
    encrypt = parsers["encrypt"].add_mutually_exclusive_group().add_argument
    encrypt("--rotate", action="store_true", help="encrypt under the first key what is already")
    encrypt("--set", metavar="NAME", help="the same as `secret set NAME`")
    parsers["init"].add_argument("directory", nargs="?", metavar="DIR", default=".")
    parsers["import"].add_argument("old", metavar="OLD.db", help="the old program's database")
    status = parsers["status"].add_argument
    status("job", nargs="?", metavar="JOB", help="only this job or run, with its whole story")
    status("--json", action="store_true", help="print JSON, for programs")
    status("--check", action="store_true", help="exit 1 if anything needs attention")
    status("--alive", action="store_true", help="exit 1 if no daemon runs, or polls are overdue")
    logs = parsers["logs"].add_argument
    logs("job", nargs="?", metavar="JOB", help="only what concerns this job or run")
    logs("-n", type=line_count, metavar="N", default=100, help="the last N lines (default: 100)")
    logs("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    logs("--json", action="store_true", help="print a JSON object a line")
    retry = parsers["retry"].add_argument
    retry("job", metavar="JOB", help="the name of a run, or of a job")
    force = "decide an unknown start, start what the policy refused, or repeat a success"
    retry("--force", action="store_true", help=force)
    actions = parsers["secret"].add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", parents=[shared], help="names, types and users")
    setting = actions.add_parser("set", parents=[shared], help="ask for a value, and put it there")
    for option in ("--type", "--stack-url", "--base-url"):
        setting.add_argument(option, metavar="TEXT")
    removing = actions.add_parser("remove", parents=[shared], help="remove one that nobody uses")
    for parser in (setting, removing):
        parser.add_argument("name", metavar="NAME")
    actions = parsers["job"].add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in ("add", "pause", "resume", "remove"):
        parser = actions.add_parser(action, parents=[shared], help=f"{action} a job")
        parser.add_argument("name", metavar="NAME")
        if action == "add":
            add_job_options(parser)


def new_parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="the config file (default: $TECKOCHECKER_CONFIG, then config.yaml)",
    )
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="teckochecker",
        parents=[shared],
        **style,
        description="Start a Keboola job, once, when OpenAI has finished a team's batches.\n"
        "Without a command: run as the daemon, in the foreground, until SIGTERM; the config is\n"
        "read again whenever it changes, and on SIGHUP.",
        epilog=f"example: teckochecker --config /etc/teckochecker/config.yaml\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"teckochecker {__version__}")
    once = "make one pass over every unfinished run, start what is ready, and exit (for cron)"
    parser.add_argument("--once", action="store_true", help=once)
    parser.set_defaults(run=run_daemon)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parsers = {}
    for name, (run, text, more, example) in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            parents=[shared],
            help=text,
            **style,
            description=f"{text[0].upper()}{text[1:]}.\n{more}",
            epilog=f"example: teckochecker {example}\n\n{EXIT_CODES}",
        )
        parsers[name].set_defaults(run=run)
    add_options(parsers, shared)
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
            nowhere = io.FileIO(os.open(os.devnull, os.O_WRONLY), "w")
            setattr(sys, name, io.TextIOWrapper(nowhere))
        elif isinstance(stream, io.TextIOWrapper):  # what it cannot show is no crash
            stream.reconfigure(errors="backslashreplace")


def exit_code(args: argparse.Namespace) -> int:
    """Run a command; what it raises for a person is told, and becomes its exit code."""
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except TeckoError as error:
        print(f"teckochecker: {error}", file=sys.stderr)
        return error.exit_code
    except sqlite3.Error as error:
        print(f"teckochecker: cannot use the state file: {error}; {STATE_HINT}", file=sys.stderr)
        return 1
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    open_standard_files()
    parser = new_parser()
    args = parser.parse_args(argv)
    if args.once and args.run is not run_daemon:
        parser.error("--once goes without a command")
    try:
        return exit_code(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "thread" not in str(error):
            raise
        # At its end, the interpreter would try once more to write what cannot arrive.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return 0
        with contextlib.suppress(OSError):
            where = getattr(error, "filename", None)
            what = f"{getattr(error, 'strerror', None) or error}{f': {where}' if where else ''}"
            print(f"teckochecker: cannot go on: {what}; see to that first", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
