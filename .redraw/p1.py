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
        head = {"time": rfc3339(self.at), "level": self.level, "event": self.name, "text": self.text}
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


