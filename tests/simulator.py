#!/usr/bin/env python3
"""OpenAI's Batch API, Keboola's Storage and Queue APIs on loopback sockets, faults on demand.

From a test:

    with Simulator() as sim:
        sim.add_key("sk-test")
        sim.add_token("kbc-test")
        sim.add_batch("batch_a", [(0, "in_progress"), (0.2, "completed")])
        sim.fault("queue.create", "reset_after")  # the job exists, its answer is lost
        ...  # point the program at sim.openai_url and sim.stack_url
        sim.wait_for(lambda: sim.jobs)

A request's way, on which holds stop it and a fault bends it:

    recorded -> hold "before" -> handled -> hold "after" -> latency -> half -> hold "half" -> rest

The servers live in a thread with an event loop of its own. One lock guards all state; whoever
waits for a state (`wait_for`) is woken by each request and each change. What is due by the clock
(a batch's timeline, a job's end) stands in an agenda and is done before anybody looks.

By hand: `python tests/simulator.py --help`. OpenAI's own client works with it, too: upload,
create with metadata, list, retrieve, cancel.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from email.policy import HTTP
from email.utils import formatdate
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Generic, NoReturn, TypeVar
from urllib.parse import parse_qsl, unquote

T = TypeVar("T")
JsonObject = dict[str, Any]
Timeline = str | Sequence[tuple[float, str]]
DEFAULT_PROJECT = "proj_default"

# ---- HTTP messages ----


@dataclass(slots=True)
class Request:
    """One request as it came; `at` is the monotonic clock's time when it was complete."""

    at: float
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    route: str = ""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    def text(self) -> str:
        """The whole request as text: what the `match` of a fault or a hold is looked for in."""
        head = "\n".join(f"{name}: {value}" for name, value in self.headers.items())
        return f"{self.method} {self.target}\n{head}\n\n{self.body.decode(errors='replace')}"

    def json(self) -> JsonObject:
        """The body as a JSON object; anything else is the client's error."""
        try:
            value = json.loads(self.body)
        except ValueError:
            raise ApiError(400, "The body is not valid JSON.") from None
        if not isinstance(value, dict):
            raise ApiError(400, "The body must be a JSON object.")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """The query's whole number `name`, which must lie in low..high."""
        text = self.query.get(name, str(default))
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ApiError(400, f"Invalid '{name}': expected an integer from {low} to {high}.")
        return int(text)


@dataclass(slots=True)
class Answer:
    """What is sent back, before it becomes bytes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    @classmethod
    def json(cls, value: object, status: int = 200) -> Answer:
        return cls(status, json.dumps(value).encode())

    def head(self, framing: str) -> bytes:
        """Status line and headers; `framing` is the header that tells where the body ends."""
        lines = [f"HTTP/1.1 {self.status} Simulated", f"content-type: {self.content_type}", framing]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def encode(self) -> tuple[bytes, bytes]:
        return self.head(f"content-length: {len(self.body)}"), self.body


class ApiError(Exception):
    """Raised by a handler; its API renders it in its own error shape."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


Handler = Callable[..., Answer]


class Api:
    """A set of routes with an error shape; a route's handler is the method of its name."""

    name: ClassVar[str]
    routes: ClassVar[dict[str, str]]  # methods and patterns, whose groups the handlers get

    def __init__(self, agenda: Agenda) -> None:
        self._serial = itertools.count(1)
        self._agenda = agenda
        self.ahead_s = 0.0  # how far this clock is from the true one

    def _wall(self, at: float | None = None) -> float:
        return self._agenda.wall(at) + self.ahead_s

    def find(self, method: str, target: str) -> tuple[str, Handler]:
        """The route's name and a handler that wants only the request."""
        wanted = f"{method} {target.partition('?')[0]}"
        for name, pattern in self.routes.items():
            if match := re.fullmatch(pattern, wanted):
                handler = getattr(self, name)
                return f"{self.name}.{name}", partial(handler, *map(unquote, match.groups()))
        return f"{self.name}.other", self._unknown

    def _unknown(self, request: Request) -> NoReturn:
        raise ApiError(404, f"No such endpoint: {request.method} {request.path}")

    def answer(self, handler: Handler, request: Request) -> Answer:
        """Carries the request out."""
        try:
            return handler(request)
        except ApiError as error:
            return self.error(error)

    def error(self, error: ApiError) -> Answer:
        raise NotImplementedError

    def sign(self, answer: Answer) -> None:
        """Adds the headers that every answer of this API has."""


# ---- Time ----


class Agenda:
    """What happens when, by the monotonic clock; each action is given its wall-clock time."""

    def __init__(self) -> None:
        # Wall time is derived, so that it can never run backwards under the job search.
        self._offset = time.time() - time.monotonic()
        self._due: list[tuple[float, int, Callable[[float], object]]] = []
        self._serial = itertools.count()

    @staticmethod
    def now() -> float:
        return time.monotonic()

    def wall(self, at: float | None = None) -> float:
        return self._offset + (time.monotonic() if at is None else at)

    def add(self, at: float, action: Callable[[float], object]) -> None:
        heapq.heappush(self._due, (at, next(self._serial), action))

    def next_due(self) -> float:
        return self._due[0][0] if self._due else float("inf")

    def run(self) -> bool:
        """Does everything that is due; tells whether there was anything."""
        now, worked = self.now(), False
        while self._due and self._due[0][0] <= now:
            at, _, action = heapq.heappop(self._due)
            action(self.wall(at))
            worked = True
        return worked


# ---- OpenAI ----

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
STAMPED = TERMINAL | {"in_progress", "finalizing", "cancelling"}
STAMPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
PARTIAL = frozenset({"expired", "cancelled"})
CANCEL_S = 0.5  # the real one takes up to ten minutes


@dataclass(slots=True)
class Batch:
    """One batch; its JSON is rendered when asked for and kept until something changes."""

    id: str
    project: str
    created_at: int
    total: int = 100
    failed: int = 0
    output: bool = True
    metadata: dict[str, str] | None = None
    endpoint: str = "/v1/chat/completions"
    input_file_id: str = ""  # none: one that bears the batch's name
    position: int = 0
    status: str = "validating"
    deleted: bool = False
    planned: int = 0  # grows whenever the timeline is replaced
    stamps: dict[str, int] = field(default_factory=dict)
    overrides: JsonObject = field(default_factory=dict)
    _json: bytes | None = None

    def enter(self, status: str, wall: float) -> None:
        """Moves to a status, with its time stamp."""
        self.status = status
        if status.lower() in STAMPED:
            self.stamps[status.lower()] = int(wall)
        self._json = None

    def override(self, fields: JsonObject) -> None:
        self.overrides = {**self.overrides, **fields}
        self._json = None

    def json(self) -> bytes:
        if self._json is None:
            self._json = json.dumps(self.document()).encode()
        return self._json

    def shown_status(self) -> str:
        return str(self.overrides.get("status", self.status))

    def document(self) -> JsonObject:
        """The object as the API shows it; optional fields are null where they do not apply."""
        has_output, has_errors = self._files()
        stamps = {f"{name}_at": self.stamps.get(name) for name in STAMPS}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": self._errors(),
            "input_file_id": self.input_file_id or f"file-{self.id}-input",
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": f"file-{self.id}-output" if has_output else None,
            "error_file_id": f"file-{self.id}-errors" if has_errors else None,
            "created_at": self.created_at,
            "expires_at": self.created_at + 86_400,
            **stamps,
            "request_counts": self._counts(),
            "metadata": self.metadata,
            "usage": None,
            "model": None,
            **self.overrides,
        }

    def _counts(self) -> dict[str, int]:
        status = self.status.lower()
        if status in {"validating", "failed"}:  # a failed batch did not pass validation
            return {"total": 0, "completed": 0, "failed": 0}
        if status in {"in_progress", "cancelling"}:
            return {"total": self.total, "completed": 0, "failed": 0}
        done = self.total - self.failed
        if status in PARTIAL:
            done = (done + 1) // 2
        return {"total": self.total, "completed": done, "failed": self.failed}

    def _files(self) -> tuple[bool, bool]:
        """Whether there is an output file and an error file: at the end, but not after `failed`."""
        if self.status.lower() not in TERMINAL - {"failed"}:
            return False, False
        has_output = self.output and self._counts()["completed"] > 0
        return has_output, self.failed > 0

    def _errors(self) -> JsonObject | None:
        if self.status.lower() != "failed":
            return None
        message = "This line is not parseable as valid JSON."
        error = {"code": "invalid_json_line", "message": message, "param": None, "line": 1}
        return {"object": "list", "data": [error]}


class OpenAI(Api):
    """The Files and Batch APIs: one key sees the files and batches of one project."""

    name = "openai"
    routes: ClassVar = {
        "get": "GET /v1/batches/([^/]+)",
        "list": "GET /v1/batches",
        "create": "POST /v1/batches",
        "cancel": "POST /v1/batches/([^/]+)/cancel",
        "upload": "POST /v1/files",
    }

    def __init__(self, agenda: Agenda) -> None:
        super().__init__(agenda)
        self._made = itertools.count(1)
        self.keys: dict[str, str] = {}
        self.files: dict[str, list[bytes]] = {}  # the lines of each
        self.batches: dict[str, Batch] = {}
        self._by_project: dict[str, list[Batch]] = {}
        self.batch_seconds: float | None = None

    # ---- what becomes of batches ----

    def plan(self, batch: Batch, timeline: Iterable[tuple[float, str]]) -> None:
        """Sets what the batch will come to; what was planned before is void."""
        batch.planned += 1
        now = self._agenda.now()
        for after_s, status in timeline:
            if after_s <= 0:
                batch.enter(status, self._wall())
            else:
                self._agenda.add(now + after_s, partial(self._enter, batch, batch.planned, status))

    def _enter(self, batch: Batch, planned: int, status: str, wall: float) -> None:
        if batch.planned == planned:
            batch.enter(status, wall + self.ahead_s)

    def add(self, batch: Batch) -> None:
        if batch.id in self.batches:
            raise ValueError(f"batch {batch.id} exists already; delete_batch() it first")
        siblings = self._by_project.setdefault(batch.project, [])
        batch.position = len(siblings)
        siblings.append(batch)
        self.batches[batch.id] = batch

    def delete(self, batch_id: str) -> None:
        """Forgets a batch; its place in the project's list stays, so that positions stay true."""
        self.batches.pop(batch_id).deleted = True

    # ---- requests ----

    def upload(self, request: Request) -> Answer:
        """Takes a multipart form with a batch's requests."""
        self._project(request)
        head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n"
        message = message_from_bytes(head.encode() + request.body, policy=HTTP)
        name, content = "", b""
        for part in message.iter_parts() if message.is_multipart() else ():
            payload = part.get_payload(decode=True)
            if part.get_filename() and isinstance(payload, bytes):
                name, content = str(part.get_filename()), payload
        file_id = f"file-{next(self._made):024x}"
        self.files[file_id] = content.splitlines()
        fields = {"object": "file", "bytes": len(content), "purpose": "batch", "filename": name}
        fields |= {"created_at": int(self._wall()), "status": "processed"}
        return Answer.json({"id": file_id, **fields})

    def create(self, request: Request) -> Answer:
        """Begins a batch, which ends after `batch_seconds`; one with a broken line fails."""
        project, body = self._project(request), request.json()
        file_id = body.get("input_file_id", "")
        if (lines := self.files.get(file_id)) is None:
            raise ApiError(400, f"Invalid input file: {file_id}.")
        name, total = f"batch_{next(self._made):032x}", len(lines)
        batch = Batch(name, project, int(self._wall()), total, metadata=body.get("metadata"))
        batch.endpoint, batch.input_file_id = body.get("endpoint", ""), file_id
        self.add(batch)
        answer = Answer(body=batch.json())
        timeline = [(0.0, "in_progress")]
        if not lines or any(map(is_broken, lines)):
            timeline.append((self.batch_seconds or 0.1, "failed"))
        elif self.batch_seconds is not None:
            timeline.append((self.batch_seconds, "completed"))
        self.plan(batch, timeline)
        return answer

    def cancel(self, batch_id: str, request: Request) -> Answer:
        batch = self._visible(batch_id, self._project(request))
        if batch.status in TERMINAL:
            raise ApiError(409, f"Cannot cancel a batch with status '{batch.status}'.")
        self.plan(batch, [(0, "cancelling"), (CANCEL_S, "cancelled")])
        return Answer(body=batch.json())

    def get(self, batch_id: str, request: Request) -> Answer:
        return Answer(body=self._visible(batch_id, self._project(request)).json())

    def list(self, request: Request) -> Answer:
        project = self._project(request)
        limit = request.integer("limit", 20, 1, 100)
        siblings = self._by_project.get(project, [])
        after = request.query.get("after")
        end = self._visible(after, project).position if after else len(siblings)
        older = (siblings[i] for i in range(end - 1, -1, -1) if not siblings[i].deleted)
        page = [*itertools.islice(older, limit + 1)]
        return self._page(page[:limit], has_more=len(page) > limit)

    @staticmethod
    def _page(page: Sequence[Batch], *, has_more: bool) -> Answer:
        """A page put together from the batches' rendered bytes."""
        rest = {
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": has_more,
        }
        data = b", ".join(batch.json() for batch in page)
        tail = json.dumps(rest).encode()[1:]
        return Answer(body=b'{"object": "list", "data": [' + data + b"], " + tail)

    def _project(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "You didn't provide an API key.")
        if key not in self.keys:
            masked = f"{key[:5]}***{key[-4:]}"
            raise ApiError(401, f"Incorrect API key provided: {masked}.", code="invalid_api_key")
        return self.keys[key]

    def _visible(self, batch_id: str, project: str) -> Batch:
        batch = self.batches.get(batch_id)
        if batch is None or batch.project != project:
            raise ApiError(404, f"No batch found with id '{batch_id}'.")
        return batch

    def error(self, error: ApiError) -> Answer:
        kinds = {429: "requests", 500: "server_error", 503: "server_error"}
        shape = {
            "message": error.message,
            "type": kinds.get(error.status, "invalid_request_error"),
            "param": None,
            "code": error.code,
        }
        return Answer.json({"error": shape}, error.status)

    def sign(self, answer: Answer) -> None:
        answer.headers["x-request-id"] = f"req_{next(self._serial):032x}"


def is_broken(line: bytes) -> bool:
    """Whether a line of a batch's file is no JSON object."""
    try:
        return not isinstance(json.loads(line), dict)
    except ValueError:
        return True


# ---- Keboola Storage ----


Project = JsonObject  # an id and a name: whose a token is
FIRST_PROJECT: Project = {"id": 1, "name": "Simulated project"}


class Keboola(Api):
    """What Storage and Queue share: tokens, configurations, a clock and the shape of errors."""

    def __init__(
        self,
        tokens: dict[str, Project],
        configs: dict[tuple[str, str], JsonObject],
        agenda: Agenda,
        queue_url: Callable[[], str],
    ) -> None:
        super().__init__(agenda)
        self.tokens, self.configs, self._queue_url = tokens, configs, queue_url

    def _project(self, request: Request) -> Project:
        """The token's project; a token that is not known is a 401."""
        token = request.headers.get("x-storageapi-token", "")
        if token not in self.tokens:
            raise ApiError(401, "Invalid access token")
        return self.tokens[token]

    def sign(self, answer: Answer) -> None:
        answer.headers.setdefault("date", formatdate(self._wall(), usegmt=True))

    def _config(self, component: str, config: str) -> JsonObject:
        """The configuration; where none was ever added, every one exists."""
        if self.configs and (component, config) not in self.configs:
            raise ApiError(404, f"Configuration {config} of component {component} not found")
        return self.configs.get((component, config), {})

    def error(self, error: ApiError) -> Answer:
        shape = {
            "error": error.message,
            "code": error.status,
            "status": "error",
            "exceptionId": f"exception-{next(self._serial):032x}",
        }
        return Answer.json(shape, error.status)


class Storage(Keboola):
    """The stack's own API: where the queue is, whose a token is, what a configuration holds."""

    name = "storage"
    routes: ClassVar = {
        "index": "GET /v2/storage/?",
        "verify": "GET /v2/storage/tokens/verify",
        "config": "GET /v2/storage(?:/branch/[^/]+)?/components/([^/]+)/configs/([^/]+)",
    }

    def index(self, request: Request) -> Answer:  # noqa: ARG002 - public: needs nothing of it
        services = [{"id": "import", "url": ""}, {"id": "queue", "url": self._queue_url()}]
        return Answer.json({"api": "storage", "services": services, "features": []})

    def verify(self, request: Request) -> Answer:
        return Answer.json({"canCreateJobs": True, "owner": self._project(request)})

    def config(self, component: str, config: str, request: Request) -> Answer:
        self._project(request)
        content = self._config(component, config)
        return Answer.json({"id": config, "configuration": content})


# ---- Keboola Queue ----

MODES = frozenset({"run", "forceRun", "debug"})
Target = tuple[str, str, int]  # component, configuration, project


@dataclass(slots=True)
class Job:
    """One Keboola job; `born` is monotonic (for the search's lag), `created_s` Unix seconds."""

    id: str
    born: float
    created_s: int
    document: JsonObject
    _json: bytes | None = None

    @property
    def target(self) -> Target:
        return self.document["component"], self.document["config"], self.project

    @property
    def project(self) -> int:
        return int(self.document["project"]["id"])

    def update(self, **fields: object) -> None:
        self.document.update(fields)
        self._json = None

    def json(self) -> bytes:
        if self._json is None:
            self._json = json.dumps(self.document).encode()
        return self._json


class Queue(Keboola):
    """Jobs: created, read, searched. Those of one configuration stand in one line."""

    name = "queue"
    routes: ClassVar = {
        "create": "POST /jobs",
        "list": "GET /jobs",
        "get": "GET /jobs/([^/]+)",
        "search": "GET /search/jobs",
    }

    def __init__(self, *shared: Any) -> None:  # noqa: ANN401
        super().__init__(*shared)
        self.search_lag = 0.0
        self.job_seconds: float | None = None
        self.hides_variables = False
        self.jobs: dict[str, Job] = {}
        self._ordered: list[Job] = []
        self._lines: dict[Target, deque[Job]] = {}

    # ---- creating and ending ----

    def create(self, request: Request) -> Answer:
        project, body = self._project(request), request.json()
        check_new_job(body)
        self._config(body["component"], body["config"])
        job = self._new_job(body)
        job.update(project=project)
        answer = Answer(201, job.json())  # a new job answers "created", also if it will wait
        self._line_up(job)
        return answer

    def _new_job(self, body: JsonObject) -> Job:
        born = self._agenda.now()
        created_s = int(self._wall(born))
        job_id = str(1_000_000_000 + next(self._serial))
        document = {
            "id": job_id,
            "project": FIRST_PROJECT,
            "branchId": str(body.get("branchId") or "1"),
            "status": "created",
            "mode": body["mode"],
            "component": body["component"],
            "config": body["config"],
            "configRowIds": body.get("configRowIds") or [],
            "createdTime": iso(created_s),
            "startTime": None,
            "endTime": None,
            "isFinished": False,
            "url": f"{self._queue_url()}/jobs/{job_id}",
            "variableValuesData": body.get("variableValuesData") or {"values": []},
            "result": {},
        }
        return Job(job_id, born, created_s, document)

    def _line_up(self, job: Job) -> None:
        self.jobs[job.id] = job
        self._ordered.append(job)
        line = self._lines.setdefault(job.target, deque())
        line.append(job)
        if line[0] is job:
            self._start(job)
        else:
            job.update(status="waiting")

    def _start(self, job: Job) -> None:
        """The job is first in its line: it stays "created", or runs if jobs run by themselves."""
        job.update(status="created")
        if self.job_seconds is not None:
            job.update(status="processing", startTime=iso(self._wall()))
            ends = self._agenda.now() + self.job_seconds
            self._agenda.add(ends, lambda _wall: self.finish(job.id, "success"))

    def finish(self, job_id: str, status: str) -> None:
        """Ends a job and starts the next in its line; a job that has ended stays as it is."""
        job = self.jobs[job_id]
        if job.document["isFinished"]:
            return
        now = iso(self._wall())
        started = job.document["startTime"] or now
        job.update(status=status, isFinished=True, startTime=started, endTime=now)
        line = self._lines[job.target]
        was_first = line[0] is job
        line.remove(job)
        if was_first and line:
            self._start(line[0])

    # ---- reading ----

    def get(self, job_id: str, request: Request) -> Answer:
        project, job = self._project(request), self.jobs.get(job_id)
        if job is None or job.project != project["id"]:
            raise ApiError(404, f'Job "{job_id}" not found')
        return Answer(body=job.json())

    def list(self, request: Request) -> Answer:
        """The deprecated list: newest first, and without the search's lag."""
        return self._page(request, LIST_FILTERS, lambda _: True, Job.json)

    def search(self, request: Request) -> Answer:
        """Filters and pages; filters that it does not know are ignored without a word."""
        query = request.query
        if (query.get("sortBy", "createdTime"), query.get("sortOrder", "desc")) != NEWEST_FIRST:
            raise ApiError(400, "Simulated is only the search by createdTime, newest first.")
        newest = self._agenda.now() - self.search_lag
        low = moment(query.get("createdTimeFrom") or "0001-01-01")
        high = moment(query.get("createdTimeTo") or "9999-12-31")

        def is_shown(job: Job) -> bool:
            return job.born <= newest and low <= job.created_s <= high

        return self._page(request, SEARCH_FILTERS, is_shown, self._row)

    def _page(
        self,
        request: Request,
        filters: dict[str, str],
        is_shown: Callable[[Job], bool],
        row: Callable[[Job], bytes],
    ) -> Answer:
        project, query = self._project(request)["id"], request.query
        limit = request.integer("limit", 100, 1, 500)
        offset = request.integer("offset", 0, 0, 10**9)
        wanted = {
            name: query[parameter] for parameter, name in filters.items() if query.get(parameter)
        }
        rows = (
            job
            for job in reversed(self._ordered)
            if all(job.document[name] == value for name, value in wanted.items())
            and job.project == project
            and is_shown(job)
        )
        page = itertools.islice(rows, offset, offset + limit)
        return Answer(body=b"[" + b", ".join(map(row, page)) + b"]")

    def _row(self, job: Job) -> bytes:
        if not self.hides_variables:
            return job.json()
        shown = {k: v for k, v in job.document.items() if k != "variableValuesData"}
        return json.dumps(shown).encode()


NEWEST_FIRST = ("createdTime", "desc")
LIST_FILTERS = {name: name for name in ("component", "config", "branchId", "status")}
SEARCH_FILTERS = {"componentId": "component", "configId": "config", "branchId": "branchId"}


def iso(wall: float) -> str:
    return datetime.fromtimestamp(int(wall), UTC).isoformat()


def moment(text: str) -> float:
    """Unix time of an RFC 3339 date; without an offset it is UTC."""
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise ApiError(400, f'"{text}" is not a valid date.') from None
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()


def check_new_job(body: JsonObject) -> None:
    """Refuses what the real queue would refuse, with status 400."""
    for key in ("component", "mode", "config"):
        if not (isinstance(body.get(key), str) and body[key]):
            raise ApiError(400, f'Invalid job: "{key}" must be a non-empty string.')
    if body["mode"] not in MODES:
        raise ApiError(400, f'Invalid job: "mode" must be one of {sorted(MODES)}.')
    variables = body.get("variableValuesData", {"values": []})
    values = variables.get("values") if isinstance(variables, dict) else None
    if not isinstance(values, list):
        raise ApiError(400, 'Invalid job: "variableValuesData.values" must be a list.')
    for index, pair in enumerate(values):
        for key in ("name", "value"):
            if not (isinstance(pair.get(key), str) and pair[key]):
                where = f"variableValuesData.values.{index}.{key}"
                raise ApiError(400, f'Invalid job: "{where}" cannot contain an empty value.')


# ---- Faults ----


@dataclass(slots=True)
class Fault:
    """Something that goes wrong with the requests it applies to; of several, the first."""

    route: str
    kind: str
    times: int | None
    skip: int
    match: str
    probability: float
    options: JsonObject
    hits: int = 0

    def applies(self, request: Request, chance: random.Random) -> bool:
        """Decides, and counts: the skipped ones down, the hits up."""
        if self.times is not None and self.hits >= self.times:
            return False
        if not fits(self, request) or chance.random() >= self.probability:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True

    def clear(self) -> None:
        """Ends the fault; `hits` stays readable."""
        self.times = 0

    @property
    def handled(self) -> bool:
        """Whether the request is carried out although its answer goes wrong."""
        return bool(self.options.get("handled", FAULTS[self.kind].handled))


def fits(rule: Fault | Hold, request: Request) -> bool:
    return fnmatchcase(request.route, rule.route) and (
        not rule.match or rule.match in request.text()
    )


Rewrite = Callable[[JsonObject, Api, Request, Answer], Answer]
Deliver = Callable[["Wire", Answer, JsonObject], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class FaultKind:
    """How a kind of fault works: it rewrites the answer, or delivers it in its own way."""

    options: tuple[str, ...] = ()
    handled: bool = True  # whether the request is carried out all the same
    rewrite: Rewrite | None = None
    deliver: Deliver | None = None


def rewrite_status(options: JsonObject, api: Api, _request: Request, _answer: Answer) -> Answer:
    answer = api.error(ApiError(options.get("code", 500), "Simulated error"))
    if options.get("body") is not None:
        answer.body = as_bytes(options["body"])
    if "retry_after" in options:
        answer.headers["retry-after"] = str(options["retry_after"])
    if "retry_after_ms" in options:
        answer.headers["retry-after-ms"] = str(options["retry_after_ms"])
    if "retry_after_date" in options:
        when = time.time() + float(options["retry_after_date"])
        answer.headers["retry-after"] = formatdate(when, usegmt=True)
    return answer


def rewrite_body(options: JsonObject, _api: Api, _request: Request, answer: Answer) -> Answer:
    page = "<html><body><h1>Please log in to the network</h1></body></html>"
    content_type = options.get("content_type", "text/html")
    status = answer.status if answer.status in {200, 201} else 200
    return Answer(status, as_bytes(options.get("body", page)), content_type=content_type)


def rewrite_redirect(options: JsonObject, _api: Api, request: Request, _answer: Answer) -> Answer:
    itself = f"http://{request.headers.get('host', '')}{request.target}"
    return Answer(options.get("code", 307), headers={"location": options.get("location", itself)})


def rewrite_header(options: JsonObject, _api: Api, _request: Request, answer: Answer) -> Answer:
    answer.headers.update(options.get("headers", {}))
    return answer


def rewrite_json(options: JsonObject, _api: Api, _request: Request, answer: Answer) -> Answer:
    if "transform" in options:
        return Answer.json(options["transform"](json.loads(answer.body)), answer.status)
    return Answer.json(options.get("obj"), answer.status)


def as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


# ---- The wire ----


class HangUp(Exception):  # noqa: N818 - no error: it is how a fault ends a connection
    """The connection is over on purpose."""


class Wire:
    """One accepted connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.before_last: Callable[[], object] = lambda: None

    async def receive(self) -> Request | None:
        """The next request, or None at the connection's end."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return Request(time.monotonic(), method, target, headers, body)

    async def send(self, data: bytes, *, last: bool = False) -> None:
        """Writes; before the answer's `last` bytes, `before_last` puts the statistics in order."""
        if last:
            self.before_last()
        self._writer.write(data)
        await self._writer.drain()

    async def hang(self) -> None:
        """Waits until the client has gone."""
        while await self._reader.read(65_536):
            pass

    def reset(self) -> None:
        """Closes with an RST instead of a FIN: to the client, "connection reset by peer"."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        """Closes when all is written, or at once where stop() cancels the wait."""
        self._writer.close()
        try:
            with suppress(OSError):
                await self._writer.wait_closed()
        except asyncio.CancelledError:
            self.abort()


async def deliver_reset(wire: Wire, _answer: Answer, _options: JsonObject) -> None:
    wire.reset()
    raise HangUp


async def deliver_nothing(_wire: Wire, _answer: Answer, _options: JsonObject) -> None:
    raise HangUp


async def deliver_never(wire: Wire, _answer: Answer, _options: JsonObject) -> None:
    await wire.hang()
    raise HangUp


async def deliver_truncated(wire: Wire, answer: Answer, _options: JsonObject) -> None:
    head, body = answer.encode()
    await wire.send(head + body[: len(body) // 2])
    raise HangUp


async def deliver_drip(wire: Wire, answer: Answer, options: JsonObject) -> None:
    data = b"".join(answer.encode())
    for position in range(len(data)):
        await wire.send(data[position : position + 1], last=position == len(data) - 1)
        await asyncio.sleep(options.get("interval", 0.1))


async def deliver_huge(wire: Wire, answer: Answer, options: JsonObject) -> None:
    """Blanks and then the honest answer, chunked, so that its size is not known before the end."""
    await wire.send(answer.head("transfer-encoding: chunked"))
    blanks = max(0, options.get("size", 64 * 1024 * 1024) - len(answer.body))
    for start in range(0, blanks, 65_536):
        await wire.send(chunk(b" " * min(65_536, blanks - start)))
    rest = chunk(answer.body) if answer.body else b""
    await wire.send(rest + b"0\r\n\r\n", last=True)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STATUS_OPTIONS = ("code", "retry_after", "retry_after_ms", "retry_after_date", "body", "handled")
FAULTS = {
    "status": FaultKind(STATUS_OPTIONS, handled=False, rewrite=rewrite_status),
    "reset_before": FaultKind(handled=False, deliver=deliver_reset),
    "reset_after": FaultKind(deliver=deliver_reset),
    "close_after": FaultKind(deliver=deliver_nothing),
    "hang_before": FaultKind(handled=False, deliver=deliver_never),
    "hang_after": FaultKind(deliver=deliver_never),
    "truncated": FaultKind(deliver=deliver_truncated),
    "body": FaultKind(("body", "content_type"), rewrite=rewrite_body),
    "drip": FaultKind(("interval",), deliver=deliver_drip),
    "redirect": FaultKind(("location", "code"), handled=False, rewrite=rewrite_redirect),
    "huge": FaultKind(("size",), deliver=deliver_huge),
    "header": FaultKind(("headers",), rewrite=rewrite_header),
    "json": FaultKind(("obj", "transform"), rewrite=rewrite_json),
}


# ---- Servers ----

Serve = Callable[[Api, Wire, Request], Awaitable[bool]]


class Servers:
    """The listening sockets, whose ports outlive a stop, and the thread that serves them."""

    def __init__(self, apis: dict[str, Api], serve: Serve) -> None:
        self._apis, self._serve = apis, serve
        self._ports = dict.fromkeys(apis, 0)
        self._open: dict[asyncio.Task[None], socket.socket] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    def start(self) -> None:
        listeners = {
            name: socket.create_server(("127.0.0.1", port), backlog=1024)
            for name, port in self._ports.items()
        }
        self._ports = {name: sock.getsockname()[1] for name, sock in listeners.items()}
        ready = threading.Event()
        main = self._main(listeners, ready)
        self._thread = threading.Thread(target=asyncio.run, args=(main,), daemon=True)
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        if self._thread:
            self.call(self._stopped.set)
            self._thread.join()
            self._thread = None

    def call(self, action: Callable[[], object]) -> None:
        """Runs the action in the servers' thread, if there is one."""
        with suppress(RuntimeError):  # it has just ended
            if self._loop:
                self._loop.call_soon_threadsafe(action)

    async def _main(self, listeners: dict[str, socket.socket], ready: threading.Event) -> None:
        self._stopped = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        for name, listener in listeners.items():
            listener.settimeout(0)
            loop.add_reader(listener, self._accept, self._apis[name], listener)
        ready.set()
        await self._stopped.wait()
        for listener in listeners.values():
            loop.remove_reader(listener)
            listener.close()
        still_open = dict(self._open)
        for task in still_open:
            task.cancel()
        if still_open:
            await asyncio.wait(still_open)
        for sock in still_open.values():  # a task cancelled before its first step closes nothing
            sock.close()

    def _accept(self, api: Api, listener: socket.socket) -> None:
        # Not asyncio.start_server: closed between a connection's accept and its first step, that
        # leaks the socket, and here tests stop servers at the worst moments.
        with suppress(OSError):  # the client has gone already
            sock, _ = listener.accept()
            sock.settimeout(0)
            task = asyncio.get_running_loop().create_task(self._connection(api, sock))
            self._open[task] = sock
            task.add_done_callback(self._open.pop)

    async def _connection(self, api: Api, sock: socket.socket) -> None:
        """Serves one connection until either side has had enough."""
        with sock, suppress(OSError, EOFError, HangUp):
            wire = Wire(*await asyncio.open_connection(sock=sock, limit=16 * 1024 * 1024))
            try:
                while (request := await wire.receive()) and await self._serve(api, wire, request):
                    pass
            except asyncio.CancelledError:
                wire.abort()
            finally:
                await wire.close()


# ---- Holds ----


class Hold:
    """Stops requests at one point of their way until a test has looked around."""

    def __init__(
        self, sim: Simulator, route: str, when: str, times: int | None, match: str
    ) -> None:
        self.route, self.when, self.match = route, when, match
        self.reached = 0
        self._sim, self._times, self._caught = sim, times, 0
        self._released = False
        self._gates: list[asyncio.Event] = []

    def catches(self, request: Request) -> bool:
        full = self._times is not None and self._caught >= self._times
        if self._released or full or not fits(self, request):
            return False
        self._caught += 1
        return True

    async def stand(self) -> None:
        """Keeps the request here until the release."""
        gate = asyncio.Event()
        with self._sim.changing():
            self.reached += 1
            if self._released:
                return
            self._gates.append(gate)
        await gate.wait()

    def wait_reached(self, timeout: float = 10.0) -> None:
        """Blocks until a request is held."""
        self._sim.wait_for(lambda: self.reached > 0, timeout)

    def release(self) -> None:
        """Lets the held ones and all later ones go on."""
        with self._sim.changing():
            self._released = True
            for gate in self._gates:
                self._sim._servers.call(gate.set)


# ---- Simulator ----


class Switch(Generic[T]):
    """An attribute of one of the simulated APIs, which may be set from any thread."""

    def __init__(self, api: str, name: str) -> None:
        self._api, self._name = api, name

    def __get__(self, sim: Simulator, _: object = None) -> T:
        value: T = getattr(getattr(sim, self._api), self._name)
        return value

    def __set__(self, sim: Simulator, value: T) -> None:
        with sim.changing():
            setattr(getattr(sim, self._api), self._name, value)


class Simulator:
    """Three servers in one thread, and the switches by which any other thread drives them."""

    def __init__(self, seed: int = 0) -> None:
        self.latency = 0.0
        self.record = True  # False: count requests per route, but do not keep them (benchmarks)
        self._lock = threading.Condition()
        self._version = 0
        self._agenda = Agenda()
        self._openai = OpenAI(self._agenda)
        tokens: dict[str, Project] = {}
        configs: dict[tuple[str, str], JsonObject] = {}
        shared = (tokens, configs, self._agenda, lambda: self.queue_url)
        self._storage, self._queue = Storage(*shared), Queue(*shared)
        apis = {"openai": self._openai, "stack": self._storage, "queue": self._queue}
        self._servers = Servers(apis, self._serve)
        self._chance = random.Random(seed)  # noqa: S311 - dice for faults, the same every time
        self._faults: list[Fault] = []
        self._holds: list[Hold] = []
        self._requests: list[Request] = []
        self._counts: Counter[str] = Counter()
        self._in_flight = self._max_in_flight = 0

    # ---- the world's state ----

    def add_key(self, key: str, project: str = DEFAULT_PROJECT) -> None:
        """Makes an OpenAI key known; it sees the batches of its project."""
        with self.changing():
            self._openai.keys[key] = project

    def add_token(self, token: str, project: int = 1, name: str = "Simulated project") -> None:
        """Makes a Keboola token known; it sees the jobs of its project."""
        with self.changing():
            self._queue.tokens[token] = {"id": project, "name": name}

    def revoke_token(self, token: str) -> None:
        """Makes a Keboola token unknown: a 401 from now on."""
        with self.changing():
            del self._queue.tokens[token]

    def set_clocks(self, *, openai_ahead_s: float = 0.0, keboola_ahead_s: float = 0.0) -> None:
        """Sets their clocks, as seen in times and `Date`; before there are batches and jobs."""
        with self.changing():
            self._openai.ahead_s = openai_ahead_s
            self._storage.ahead_s = self._queue.ahead_s = keboola_ahead_s

    def add_config(
        self, component: str, config: str, configuration: JsonObject | None = None
    ) -> None:
        """Adds a Keboola configuration; from the first one on, jobs of others are a 404."""
        with self.changing():
            self._queue.configs[component, config] = configuration or {}

    def add_batch(
        self,
        id: str,  # noqa: A002 - the API's own name for it
        timeline: Timeline = "in_progress",
        *,
        project: str = DEFAULT_PROJECT,
        total: int = 100,
        failed: int = 0,
        output: bool = True,
        metadata: dict[str, str] | None = None,
        created_at: int | None = None,
    ) -> None:
        """Adds a batch, the newest of its project; `timeline` has pairs of seconds and status."""
        created = int(self._openai._wall()) if created_at is None else created_at
        batch = Batch(id, project, created, total, failed, output, metadata)
        with self.changing():
            self._openai.add(batch)
            self._openai.plan(batch, [(0, timeline)] if isinstance(timeline, str) else timeline)

    def set_batch(self, batch_id: str, /, **fields: object) -> None:
        """Overrides fields of the JSON object for good; a `status` also ends the timeline."""
        with self.changing():
            batch = self._openai.batches[batch_id]
            batch.planned += "status" in fields
            batch.override(fields)

    def finish(self, id: str, status: str = "completed") -> None:  # noqa: A002
        """Ends the batch now, whatever its timeline says."""
        with self.changing():
            batch = self._openai.batches[id]
            batch.overrides.pop("status", None)
            self._openai.plan(batch, [(0, status)])

    def delete_batch(self, batch_id: str) -> None:
        with self.changing():
            self._openai.delete(batch_id)

    def finish_job(
        self, job_id: str, status: str = "success", message: str = "", exception_id: str = ""
    ) -> None:
        """Ends a Keboola job with its result; the next of the same configuration moves up."""
        with self.changing():
            if message:
                error = {"type": "user", "exceptionId": exception_id}
                result = {"message": message} | ({"error": error} if exception_id else {})
                self._queue.jobs[job_id].update(result=result)
            self._queue.finish(job_id, status)

    def delete_job(self, job_id: str) -> None:
        """Makes a Keboola job a 404, although the search may still show it."""
        with self.changing():
            del self._queue.jobs[job_id]

    search_lag: Switch[float] = Switch("_queue", "search_lag")
    search_hides_variables: Switch[bool] = Switch("_queue", "hides_variables")
    # How long a job runs by itself, or a batch that came over HTTP; None: until it is finished.
    job_seconds: Switch[float | None] = Switch("_queue", "job_seconds")
    batch_seconds: Switch[float | None] = Switch("_openai", "batch_seconds")

    # ---- faults and holds ----

    def fault(
        self,
        route: str,
        kind: str,
        times: int | None = 1,
        *,
        skip: int = 0,
        match: str = "",
        probability: float = 1.0,
        **options: object,
    ) -> Fault:
        """Has `times` requests (None: all) that fit `match` go wrong, after the first `skip`."""
        self._check_pattern(route)
        if kind not in FAULTS:
            raise ValueError(f"unknown fault {kind!r}; one of {', '.join(sorted(FAULTS))}")
        if unknown := set(options) - set(FAULTS[kind].options):
            raise ValueError(f"fault {kind!r} has no options {unknown}")
        fault = Fault(route, kind, times, skip, match, probability, options)
        with self.changing():
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self.changing():
            for fault in self._faults:
                fault.clear()
            self._faults.clear()

    def hold(
        self, route: str, when: str = "before", times: int | None = 1, match: str = ""
    ) -> Hold:
        """Holds requests "before" or "after" they are handled, or with "half" the answer sent."""
        self._check_pattern(route)
        if when not in {"before", "after", "half"}:
            raise ValueError(f"hold when {when!r}? It is one of before, after, half")
        hold = Hold(self, route, when, times, match)
        with self.changing():
            self._holds.append(hold)
        return hold

    def _check_pattern(self, pattern: str) -> None:
        apis: tuple[Api, ...] = (self._openai, self._storage, self._queue)
        names = [f"{api.name}.{name}" for api in apis for name in api.routes]
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no route fits {pattern!r}; there are {', '.join(names)}")

    # ---- looking ----

    @property
    def openai_url(self) -> str:
        return f"{self._servers.address('openai')}/v1"

    @property
    def stack_url(self) -> str:
        return self._servers.address("stack")

    @property
    def queue_url(self) -> str:
        return self._servers.address("queue")

    @property
    def jobs(self) -> list[JsonObject]:
        """The Keboola jobs, oldest first (copies)."""
        with self._lock:
            self._advance()
            return [dict(job.document) for job in self._queue.jobs.values()]

    @property
    def requests(self) -> list[Request]:
        """All requests since the start or `reset_stats()`, as they came."""
        with self._lock:
            return list(self._requests)

    @property
    def request_counts(self) -> dict[str, int]:
        """Requests per route; also kept where `record` is False."""
        with self._lock:
            return dict(self._counts)

    @property
    def max_in_flight(self) -> int:
        return self._max_in_flight

    def reset_stats(self) -> None:
        with self.changing():
            self._requests.clear()
            self._counts.clear()
            self._max_in_flight = self._in_flight

    def batch_statuses(self) -> dict[str, str]:
        with self._lock:
            self._advance()
            return {batch.id: batch.shown_status() for batch in self._openai.batches.values()}

    def wait_for(self, predicate: Callable[[], T], timeout: float = 10.0) -> T:
        """Returns the predicate's value as soon as it is true; asked again after each change."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                self._advance()
                seen = self._version
            if value := predicate():
                return value
            if time.monotonic() >= deadline:
                seen_so_far = f"{self.request_counts}, {len(self._queue.jobs)} Keboola jobs"
                raise TimeoutError(f"not true within {timeout:g} s; so far {seen_so_far}")
            with self._lock:
                left = min(deadline, self._agenda.next_due()) - time.monotonic()
                self._lock.wait_for(partial(self._has_changed, seen), max(0.0, left))

    def _has_changed(self, seen: int) -> bool:
        return self._version != seen

    # ---- locking ----

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Guards a change of state and wakes whoever waits for one."""
        with self._lock:
            self._advance()
            try:
                yield
            finally:
                self._announce()

    def _advance(self) -> None:
        """Does what is due by now; the lock is held."""
        if self._agenda.run():
            self._announce()

    def _announce(self) -> None:
        self._version += 1
        self._lock.notify_all()

    # ---- a request's way ----

    async def _serve(self, api: Api, wire: Wire, request: Request) -> bool:
        """Answers one request; tells whether the connection stays open."""
        request.route, handler = api.find(request.method, request.target)
        with self.changing():
            self._counts[request.route] += 1
            if self.record:
                self._requests.append(request)
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
        # It ends with the last byte of its answer: later, the client could have sent another one.
        with ExitStack() as flight:
            flight.callback(self._land)
            wire.before_last = flight.close
            await self._exchange(api, wire, request, handler)
        return request.headers.get("connection", "").lower() != "close"

    def _land(self) -> None:
        with self.changing():
            self._in_flight -= 1

    async def _exchange(self, api: Api, wire: Wire, request: Request, handler: Handler) -> None:
        fault, holds = self._interventions(request)
        kind = FAULTS[fault.kind] if fault else FaultKind()
        options = fault.options if fault else {}
        await self._pause(holds, "before")
        answer = Answer()
        if fault is None or fault.handled:
            with self.changing():
                answer = api.answer(handler, request)
        if kind.rewrite:
            answer = kind.rewrite(options, api, request, answer)
        api.sign(answer)
        await self._pause(holds, "after")
        if self.latency:
            await asyncio.sleep(self.latency)
        if kind.deliver:
            await kind.deliver(wire, answer, options)
        else:
            await self._send(wire, answer, holds)

    def _interventions(self, request: Request) -> tuple[Fault | None, list[Hold]]:
        """The fault and the holds that this request meets."""
        if not (self._faults or self._holds):
            return None, []
        with self.changing():
            holds = [hold for hold in self._holds if hold.catches(request)]
            hit = (fault for fault in self._faults if fault.applies(request, self._chance))
            return next(hit, None), holds

    @staticmethod
    async def _pause(holds: list[Hold], when: str) -> None:
        for hold in holds:
            if hold.when == when:
                await hold.stand()

    async def _send(self, wire: Wire, answer: Answer, holds: list[Hold]) -> None:
        head, body = answer.encode()
        if not holds:
            await wire.send(head + body, last=True)
            return
        await wire.send(head + body[: len(body) // 2])
        await self._pause(holds, "half")
        await wire.send(body[len(body) // 2 :], last=True)

    # ---- start and stop ----

    def start(self) -> Simulator:
        """Opens the ports (the same ones as before, if it ran before) and serves them."""
        self._servers.start()
        return self

    def stop(self) -> None:
        """Closes everything, also what hangs or is held; state and ports are kept."""
        self._servers.stop()

    def __enter__(self) -> Simulator:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()


# ---- Command line ----

CONFIG = """state: demo.db
limits: {{trigger_grace: 5s}}
secrets:
  openai-sim: {{type: openai, env: OPENAI_API_KEY, base_url: {openai}}}
  keboola-sim: {{type: keboola, env: KEBOOLA_TOKEN, stack_url: {stack}}}
defaults:
  openai_secret: openai-sim
  keboola_secret: keboola-sim
  component_id: kds-team.app-custom-python
  poll_interval: 1s
jobs:
  demo: {{batch_ids: [{batches}], config_id: "123456"}}
  found: {{match: {{pipeline: nightly}}, since: {today}, config_id: "123457"}}
"""


def parse_batch(text: str) -> tuple[str, list[tuple[float, str]]]:
    """Reads `batch_a=validating@0,completed@6`."""
    batch_id, _, steps = text.partition("=")
    pairs = [step.partition("@") for step in steps.split(",")]
    return batch_id, [(float(seconds or 0), status) for status, _, seconds in pairs]


def main() -> int:
    """Serves until Ctrl-C; prints its addresses and a configuration that works with them."""
    parser = argparse.ArgumentParser(description="OpenAI's Batch API and Keboola on this machine.")
    add = parser.add_argument
    add("--job-seconds", type=float, metavar="S", help="how long Keboola jobs run; else for ever")
    add("--batch-seconds", type=float, metavar="S", help="the same of batches created over HTTP")
    form = "ID=STATUS@SECONDS,..."
    add("--batch", type=parse_batch, action="append", metavar=form, help="may be repeated")
    options = parser.parse_args()
    example = parse_batch("batch_a=validating@0,in_progress@2,completed@6")
    key, token = "sk-simulator", "kbc-simulator"
    with Simulator() as sim:
        sim.job_seconds, sim.batch_seconds = options.job_seconds, options.batch_seconds
        sim.record = False  # it may run for days
        sim.add_key(key)
        sim.add_token(token)
        for batch_id, timeline in options.batch or [example]:
            sim.add_batch(batch_id, timeline)
        print(f"export OPENAI_API_KEY={key} KEBOOLA_TOKEN={token}\n")
        batches, today = ", ".join(sim.batch_statuses()), datetime.now(UTC).date()
        urls = {"openai": sim.openai_url, "stack": sim.stack_url}
        print(CONFIG.format(batches=batches, today=today, **urls), flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
