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

By hand: `python tests/simulator.py --help`. OpenAI's own client works with it, too: it takes the
upload of a file and the creation of a batch, with metadata, as the real API does.

A request's way, on which holds stop it and a fault bends it:

    recorded -> hold "before" -> handled -> hold "after" -> latency -> half -> hold "half" -> rest

The servers live in a thread with an event loop of its own. One lock guards all state; whoever
waits for a state (`wait_for`) is woken by each request and each change. No timers change the
state: what is due by the clock (a batch's timeline, a job's end) stands in an agenda and is done
before anybody looks.

Sections: HTTP messages, Time, OpenAI, Keboola Storage, Keboola Queue, Faults, The wire, Servers,
Holds, Simulator, Control over HTTP, Command line. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from email.policy import HTTP
from email.utils import formatdate
from fnmatch import fnmatchcase
from functools import partial
from http import HTTPStatus
from operator import attrgetter
from typing import Any, ClassVar, NoReturn, TypeVar
from urllib.parse import parse_qsl, unquote

T = TypeVar("T")
JsonObject = dict[str, Any]
Timeline = str | Sequence[tuple[float, str]]
DEFAULT_PROJECT = "proj_default"

# ======================================================================================
# HTTP messages
# ======================================================================================


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
            raise ApiError(
                400, f"Invalid '{name}': expected an integer from {low} to {high}.", name
            )
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
        reason = HTTPStatus(self.status).phrase if self.status in HTTP_STATUSES else "Unknown"
        lines = [f"HTTP/1.1 {self.status} {reason}", f"content-type: {self.content_type}", framing]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def encode(self) -> tuple[bytes, bytes]:
        return self.head(f"content-length: {len(self.body)}"), self.body


HTTP_STATUSES = frozenset(int(status) for status in HTTPStatus)


class ApiError(Exception):
    """Raised by a handler; its API renders it in its own error shape."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


Handler = Callable[..., Answer]


@dataclass(frozen=True, slots=True)
class Route:
    """A name for one endpoint; the pattern's groups become the handler's arguments."""

    name: str
    method: str
    pattern: re.Pattern[str]
    handler: Handler


class Api:
    """A set of routes with an error shape; subclasses hold the state behind them."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.routes: list[Route] = []
        self._serial = itertools.count(1)

    def _route(self, name: str, method: str, pattern: str, handler: Handler) -> None:
        self.routes.append(Route(f"{self.name}.{name}", method, re.compile(pattern), handler))

    def find(self, method: str, target: str) -> tuple[str, Handler]:
        """The route's name and a handler that wants only the request."""
        path = target.partition("?")[0]
        for route in self.routes:
            if route.method == method and (match := route.pattern.fullmatch(path)):
                return route.name, partial(route.handler, *map(unquote, match.groups()))
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


# ======================================================================================
# Time
# ======================================================================================


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


# ======================================================================================
# OpenAI
# ======================================================================================

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
STAMPED = TERMINAL | {"in_progress", "finalizing", "cancelling"}
STAMPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
PARTIAL = frozenset({"expired", "cancelled"})
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
ENDPOINTS = [
    *("/v1/responses", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
    *("/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos"),
]
CANCEL_S = 0.5  # the real one takes up to ten minutes


@dataclass(slots=True)
class Batch:
    """One batch; its JSON is rendered when asked for and kept until something changes."""

    id: str
    project: str
    created_at: int
    total: int
    failed: int
    output: bool
    metadata: dict[str, str] | None
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
        error = {
            "code": "invalid_json_line",
            "message": "This line is not parseable as valid JSON.",
            "param": None,
            "line": 1,
        }
        return {"object": "list", "data": [error]}


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file; of a batch's requests, it counts the lines and those that are no JSON."""

    project: str
    purpose: str
    lines: int
    broken: int


class OpenAI(Api):
    """The Files and Batch APIs: one key sees the files and batches of one project."""

    name = "openai"

    def __init__(self, agenda: Agenda) -> None:
        super().__init__()
        self._agenda = agenda
        self._made = itertools.count(1)
        self.keys: dict[str, str] = {}
        self.files: dict[str, File] = {}
        self.batches: dict[str, Batch] = {}
        self._by_project: dict[str, list[Batch]] = {}
        self.ahead_s = 0.0  # how far this clock is from the true one
        self.batch_seconds: float | None = None
        self._route("get", "GET", r"/v1/batches/([^/]+)", self.get)
        self._route("list", "GET", r"/v1/batches", self.list)
        self._route("create", "POST", r"/v1/batches", self.create)
        self._route("cancel", "POST", r"/v1/batches/([^/]+)/cancel", self.cancel)
        self._route("upload", "POST", r"/v1/files", self.upload)

    # ---- what becomes of batches ----

    def wall(self) -> float:
        return self._agenda.wall() + self.ahead_s

    def plan(self, batch: Batch, timeline: Iterable[tuple[float, str]]) -> None:
        """Sets what the batch will come to; what was planned before is void."""
        batch.planned += 1
        now = self._agenda.now()
        for after_s, status in timeline:
            if after_s <= 0:
                batch.enter(status, self.wall())
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
        project, form = self._project(request), read_form(request)
        name, content = form.get("file", ("", b""))
        purpose = form.get("purpose", ("", b""))[1].decode()
        if purpose not in PURPOSES:
            message = f"Invalid value: '{purpose}'. Supported values are: {', '.join(PURPOSES)}."
            raise ApiError(400, message, "purpose")
        if purpose == "batch" and not name.endswith(".jsonl"):
            raise ApiError(400, "Invalid file format for Batch API. Must be .jsonl")
        lines = content.splitlines()
        file_id = f"file-{next(self._made):024x}"
        self.files[file_id] = File(project, purpose, len(lines), sum(map(is_broken, lines)))
        now = int(self.wall())
        return Answer.json(
            {
                "id": file_id,
                "object": "file",
                "bytes": len(content),
                "created_at": now,
                "filename": name,
                "purpose": purpose,
                "status": "processed",
                "expires_at": now + 30 * 86_400 if purpose == "batch" else None,
                "status_details": None,
            }
        )

    def create(self, request: Request) -> Answer:
        """Begins a batch, which ends after `batch_seconds`; one with a broken line fails."""
        project, body = self._project(request), request.json()
        check_new_batch(body)
        file = self.files.get(body["input_file_id"])
        if file is None or (file.project, file.purpose) != (project, "batch"):
            raise ApiError(400, f"Invalid input file: {body['input_file_id']}.", "input_file_id")
        batch = Batch(
            id=f"batch_{next(self._made):032x}",
            project=project,
            created_at=int(self.wall()),
            total=file.lines,
            failed=0,
            output=True,
            metadata=body.get("metadata"),
            endpoint=body["endpoint"],
            input_file_id=body["input_file_id"],
        )
        self.add(batch)
        answer = Answer(body=batch.json())
        ends_s = self.batch_seconds
        if file.broken or not file.lines:
            self.plan(batch, [(0, "validating"), (ends_s or 0.1, "failed")])
        elif ends_s is None:
            self.plan(batch, [(0, "in_progress")])
        else:
            self.plan(batch, [(0, "in_progress"), (ends_s, "completed")])
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
            "param": error.param,
            "code": error.code,
        }
        return Answer.json({"error": shape}, error.status)

    def sign(self, answer: Answer) -> None:
        answer.headers["x-request-id"] = f"req_{next(self._serial):032x}"


def read_form(request: Request) -> dict[str, tuple[str, bytes]]:
    """The fields of a multipart form: each one's file name (or nothing) and content."""
    head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n"
    message = message_from_bytes(head.encode() + request.body, policy=HTTP)
    if not message.is_multipart():
        raise ApiError(400, "Expected a multipart form with the fields file and purpose.")
    form = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(content, bytes):
            form[str(name)] = (part.get_filename() or "", content)
    return form


def is_broken(line: bytes) -> bool:
    """Whether a line of a batch's file is no JSON object."""
    try:
        return not isinstance(json.loads(line), dict)
    except ValueError:
        return True


def check_new_batch(body: JsonObject) -> None:
    """Refuses what OpenAI would refuse, with status 400."""
    for key in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(key), str):
            raise ApiError(400, f"Missing required parameter: '{key}'.", key)
    for key, allowed in (("endpoint", ENDPOINTS), ("completion_window", ["24h"])):
        if body[key] not in allowed:
            message = f"Invalid value: '{body[key]}'. Supported values are: {', '.join(allowed)}."
            raise ApiError(400, message, key)
    metadata = body.get("metadata") or {}
    if len(metadata) > 16:
        raise ApiError(400, "Invalid 'metadata': too many properties, at most 16.", "metadata")
    for key, value in metadata.items():
        if not isinstance(value, str) or len(key) > 64 or len(value) > 512:
            message = f"Invalid 'metadata.{key}': a string of at most 512 characters is expected."
            raise ApiError(400, message, "metadata")


# ======================================================================================
# Keboola Storage
# ======================================================================================


@dataclass(frozen=True, slots=True)
class Project:
    """Whose a token is."""

    id: int
    name: str

    def owner(self) -> JsonObject:
        return {"id": self.id, "name": self.name}


FIRST_PROJECT = Project(1, "Simulated project")


class Keboola(Api):
    """What Storage and Queue share: tokens, configurations, a clock and the shape of errors."""

    def __init__(
        self, tokens: dict[str, Project], configs: dict[tuple[str, str], JsonObject], agenda: Agenda
    ) -> None:
        super().__init__()
        self.tokens, self.configs = tokens, configs
        self._agenda = agenda
        self.ahead_s = 0.0  # how far this clock is from the true one

    def _wall(self, at: float | None = None) -> float:
        return self._agenda.wall(at) + self.ahead_s

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

    def __init__(
        self,
        tokens: dict[str, Project],
        configs: dict[tuple[str, str], JsonObject],
        agenda: Agenda,
        queue_url: Callable[[], str],
    ) -> None:
        super().__init__(tokens, configs, agenda)
        self._queue_url = queue_url
        config = r"/v2/storage(?:/branch/[^/]+)?/components/([^/]+)/configs/([^/]+)"
        self._route("index", "GET", r"/v2/storage/?", self.index)
        self._route("verify", "GET", r"/v2/storage/tokens/verify", self.verify)
        self._route("config", "GET", config, self.config)

    def index(self, request: Request) -> Answer:  # noqa: ARG002 - public: needs nothing of it
        services = [
            {"id": "import", "url": "http://127.0.0.1:9/import"},
            {"id": "queue", "url": self._queue_url()},
        ]
        return Answer.json({"api": "storage", "services": services, "features": []})

    def verify(self, request: Request) -> Answer:
        document = {
            "id": "1",
            "description": "simulator",
            "isMasterToken": False,
            "canManageBuckets": True,
            "canManageTokens": False,
            "canReadAllFileUploads": True,
            "canPurgeTrash": False,
            "canCreateJobs": True,
            "owner": self._project(request).owner(),
        }
        return Answer.json(document)

    def config(self, component: str, config: str, request: Request) -> Answer:
        self._project(request)
        content = self._config(component, config)
        return Answer.json(
            {"id": config, "name": f"{component} {config}", "configuration": content}
        )


# ======================================================================================
# Keboola Queue
# ======================================================================================

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
        owner: JsonObject = self.document["project"]
        return int(owner["id"])

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

    def __init__(
        self,
        tokens: dict[str, Project],
        configs: dict[tuple[str, str], JsonObject],
        agenda: Agenda,
        url: Callable[[], str],
    ) -> None:
        super().__init__(tokens, configs, agenda)
        self._url = url
        self.search_lag = 0.0
        self.job_seconds: float | None = None
        self.hides_variables = False
        self.jobs: dict[str, Job] = {}
        self._ordered: list[Job] = []
        self._by_target: dict[Target, list[Job]] = {}
        self._lines: dict[Target, deque[Job]] = {}
        self._route("create", "POST", r"/jobs", self.create)
        self._route("list", "GET", r"/jobs", self.list)
        self._route("get", "GET", r"/jobs/([^/]+)", self.get)
        self._route("search", "GET", r"/search/jobs", self.search)

    # ---- creating and ending ----

    def create(self, request: Request) -> Answer:
        project = self._project(request)
        body = request.json()
        check_new_job(body)
        self._config(body["component"], body["config"])
        job = self._new_job(body)
        job.update(projectId=str(project.id), project=project.owner())
        answer = Answer(201, job.json())  # a new job answers "created", also if it will wait
        self._line_up(job)
        return answer

    def _new_job(self, body: JsonObject) -> Job:
        born = self._agenda.now()
        created_s = int(self._wall(born))
        job_id = str(1_000_000_000 + next(self._serial))
        document = {
            "id": job_id,
            "runId": job_id,
            "projectId": str(FIRST_PROJECT.id),
            "project": FIRST_PROJECT.owner(),
            "branchId": str(body.get("branchId") or "1"),
            "status": "created",
            "desiredStatus": "processing",
            "mode": body["mode"],
            "component": body["component"],
            "config": body["config"],
            "configRowIds": body.get("configRowIds") or [],
            "tag": "1.0.0",
            "createdTime": iso(created_s),
            "startTime": None,
            "endTime": None,
            "isFinished": False,
            "url": f"{self._url()}/jobs/{job_id}",
            "variableValuesId": body.get("variableValuesId"),
            "variableValuesData": body.get("variableValuesData") or {"values": []},
            "result": {},
        }
        return Job(job_id, born, created_s, document)

    def _line_up(self, job: Job) -> None:
        self.jobs[job.id] = job
        self._ordered.append(job)
        self._by_target.setdefault(job.target, []).append(job)
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
        job.update(status=status, desiredStatus=status, isFinished=True, endTime=now)
        job.update(startTime=job.document["startTime"] or now)
        line = self._lines[job.target]
        was_first = line[0] is job
        line.remove(job)
        if was_first and line:
            self._start(line[0])

    # ---- reading ----

    def get(self, job_id: str, request: Request) -> Answer:
        project = self._project(request)
        job = self.jobs.get(job_id)
        if job is None or job.project != project.id:
            raise ApiError(404, f'Job "{job_id}" not found')
        return Answer(body=job.json())

    def list(self, request: Request) -> Answer:
        """The deprecated list: newest first, and without the search's lag."""
        project = self._project(request)
        limit = request.integer("limit", 100, 1, 500)
        offset = request.integer("offset", 0, 0, 10**9)
        wanted = {name: request.query[name] for name in LIST_FILTERS if request.query.get(name)}
        rows = (
            job
            for job in reversed(self._ordered)
            if job.project == project.id
            and all(job.document[name] == value for name, value in wanted.items())
        )
        page = itertools.islice(rows, offset, offset + limit)
        return Answer(body=b"[" + b", ".join(job.json() for job in page) + b"]")

    def search(self, request: Request) -> Answer:
        """Filters and pages; filters that it does not know are ignored without a word."""
        project = self._project(request)
        limit = request.integer("limit", 100, 1, 500)
        offset = request.integer("offset", 0, 0, 10**9)
        query = request.query
        wanted = {
            name: query[parameter]
            for parameter, name in SEARCH_FILTERS.items()
            if query.get(parameter)
        }
        if (query.get("sortBy", "createdTime"), query.get("sortOrder", "desc")) != NEWEST_FIRST:
            raise ApiError(400, "Simulated is only the search by createdTime, newest first.")
        jobs, low, high = self._visible_range(query, project)
        rows = (
            job
            for job in (jobs[i] for i in range(high - 1, low - 1, -1))
            if job.project == project.id
            and all(job.document[name] == value for name, value in wanted.items())
        )
        page = itertools.islice(rows, offset, offset + limit)
        return Answer(body=b"[" + b", ".join(map(self._row, page)) + b"]")

    def _visible_range(
        self, query: dict[str, str], project: Project
    ) -> tuple[Sequence[Job], int, int]:
        """Jobs in creation order, and the slice that the bounds and the search's lag leave."""
        target = (query.get("componentId", ""), query.get("configId", ""), project.id)
        jobs = self._by_target.get(target, []) if all(target) else self._ordered
        newest = self._agenda.now() - self.search_lag
        high = bisect_right(jobs, newest, key=attrgetter("born"))
        low = 0
        if text := query.get("createdTimeFrom"):
            low = bisect_left(jobs, moment(text), key=attrgetter("created_s"))
        if text := query.get("createdTimeTo"):
            high = min(high, bisect_right(jobs, moment(text), key=attrgetter("created_s")))
        return jobs, low, high

    def _row(self, job: Job) -> bytes:
        if not self.hides_variables:
            return job.json()
        shown = {k: v for k, v in job.document.items() if k != "variableValuesData"}
        return json.dumps(shown).encode()


NEWEST_FIRST = ("createdTime", "desc")
LIST_FILTERS = ("component", "config", "branchId", "status")
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
    if body.get("variableValuesId") and body.get("variableValuesData"):
        raise ApiError(400, 'Only one of "variableValuesId" and "variableValuesData" can be set.')
    if (variables := body.get("variableValuesData")) is not None:
        check_variables(variables)


def check_variables(variables: object) -> None:
    values = variables.get("values") if isinstance(variables, dict) else None
    if not isinstance(values, list):
        raise ApiError(400, 'Invalid job: "variableValuesData.values" must be a list.')
    for index, pair in enumerate(values):
        for key in ("name", "value"):
            text = pair.get(key) if isinstance(pair, dict) else None
            if not (isinstance(text, str) and text):
                where = f"variableValuesData.values.{index}.{key}"
                raise ApiError(400, f'Invalid job: "{where}" cannot contain an empty value.')


# ======================================================================================
# Faults
# ======================================================================================


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

    text: str = ""
    options: frozenset[str] = frozenset()
    handled: bool = True
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


# ======================================================================================
# The wire
# ======================================================================================


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
        method, target, headers = parse_head(head)
        if "transfer-encoding" in headers:
            await self.send(Answer(411).head("connection: close"))
            raise HangUp
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise HangUp
        body = await self._reader.readexactly(int(length))
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


def parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers (names in lower case)."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return method, rest.partition(" ")[0], headers


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
    """Blanks and then the honest answer: valid JSON for a client that reads everything.

    Chunked, so that the client cannot know the size before it has counted.
    """
    await wire.send(answer.head("transfer-encoding: chunked"))
    blanks = max(0, options.get("size", 64 * 1024 * 1024) - len(answer.body))
    for start in range(0, blanks, 65_536):
        await wire.send(chunk(b" " * min(65_536, blanks - start)))
    rest = chunk(answer.body) if answer.body else b""
    await wire.send(rest + b"0\r\n\r\n", last=True)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def fault_kind(
    text: str,
    *options: str,
    handled: bool = True,
    rewrite: Rewrite | None = None,
    deliver: Deliver | None = None,
) -> FaultKind:
    return FaultKind(text, frozenset(options), handled, rewrite, deliver)


FAULTS = {
    "status": fault_kind(
        "an error in the API's own shape; with handled, after the request was carried out",
        *("code", "retry_after", "retry_after_ms", "retry_after_date", "body", "handled"),
        handled=False,
        rewrite=rewrite_status,
    ),
    "reset_before": fault_kind(
        "connection reset, nothing was done", handled=False, deliver=deliver_reset
    ),
    "reset_after": fault_kind(
        "connection reset, the request was carried out", deliver=deliver_reset
    ),
    "close_after": fault_kind("carried out, closed without an answer", deliver=deliver_nothing),
    "hang_before": fault_kind(
        "no answer until the client goes, nothing was done", handled=False, deliver=deliver_never
    ),
    "hang_after": fault_kind(
        "no answer until the client goes, the request was carried out", deliver=deliver_never
    ),
    "truncated": fault_kind("carried out, half of the body, closed", deliver=deliver_truncated),
    "body": fault_kind(
        "status 200 or 201 with another body, such as a login page",
        *("body", "content_type"),
        rewrite=rewrite_body,
    ),
    "drip": fault_kind(
        "the answer, one byte every `interval` seconds", "interval", deliver=deliver_drip
    ),
    "redirect": fault_kind(
        "to `location`, or to itself without end",
        *("location", "code"),
        handled=False,
        rewrite=rewrite_redirect,
    ),
    "huge": fault_kind(
        "the answer behind `size` bytes of blanks, chunked", "size", deliver=deliver_huge
    ),
    "header": fault_kind("adds `headers` to the answer", "headers", rewrite=rewrite_header),
    "json": fault_kind(
        "`obj` as the answer, or what `transform` makes of the answer's object",
        *("obj", "transform"),
        rewrite=rewrite_json,
    ),
}


# ======================================================================================
# Servers
# ======================================================================================

Serve = Callable[[Api, Wire, Request], Awaitable[bool]]


class Servers:
    """The listening sockets and the thread that serves them.

    `serve` answers one request and tells whether its connection stays open. The ports are kept
    from one start to the next, so that a test can take the servers down and up again.
    """

    def __init__(self, apis: dict[str, Api], ports: Iterable[int], serve: Serve) -> None:
        self._apis, self._serve = apis, serve
        self._ports = dict(zip(apis, ports, strict=True))
        self._open: dict[asyncio.Task[None], socket.socket] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()  # only against a loop that closes under a caller
        self._stopped = asyncio.Event()

    def address(self, name: str) -> str:
        if not self._ports[name]:
            raise RuntimeError("the simulator has no address before start()")
        return f"http://127.0.0.1:{self._ports[name]}"

    def start(self) -> None:
        if self._thread:
            raise RuntimeError("the simulator runs already")
        ready = threading.Event()
        main = self._main(self._listen(), ready)
        self._thread = threading.Thread(
            target=asyncio.run, args=(main,), name="simulator", daemon=True
        )
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        if self._thread:
            self.call(self._stopped.set)
            self._thread.join()
            self._thread = None

    def call(self, action: Callable[[], object]) -> None:
        """Runs the action in the servers' thread, if there is one."""
        with self._loop_lock:
            if self._loop:
                self._loop.call_soon_threadsafe(action)

    def _listen(self) -> dict[str, socket.socket]:
        sockets: dict[str, socket.socket] = {}
        try:
            for name, port in self._ports.items():
                sockets[name] = socket.create_server(("127.0.0.1", port), backlog=1024)
        except OSError:
            for sock in sockets.values():
                sock.close()
            raise
        self._ports = {name: sock.getsockname()[1] for name, sock in sockets.items()}
        return sockets

    async def _main(self, listeners: dict[str, socket.socket], ready: threading.Event) -> None:
        self._stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for name, listener in listeners.items():
            listener.settimeout(0)
            loop.add_reader(listener, self._accept, self._apis[name], listener)
        self._set_loop(loop)
        ready.set()
        await self._stopped.wait()
        self._set_loop(None)
        for listener in listeners.values():
            loop.remove_reader(listener)
            listener.close()
        await self._close_connections()

    def _accept(self, api: Api, listener: socket.socket) -> None:
        # Not asyncio.start_server: closed between a connection's accept and its first step, that
        # leaks the socket, and here tests stop servers at the worst moments.
        with suppress(OSError):  # the client has gone already
            sock, _ = listener.accept()
            sock.settimeout(0)
            task = asyncio.get_running_loop().create_task(self._connection(api, sock))
            self._open[task] = sock
            task.add_done_callback(self._open.pop)

    def _set_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        with self._loop_lock:
            self._loop = loop

    async def _close_connections(self) -> None:
        still_open = dict(self._open)
        for task in still_open:
            task.cancel()
        if still_open:
            await asyncio.wait(still_open)
        for sock in still_open.values():  # a task cancelled before its first step closes nothing
            sock.close()

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


# ======================================================================================
# Holds
# ======================================================================================


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
                self._sim.call_in_loop(gate.set)


# ======================================================================================
# Simulator
# ======================================================================================


class Simulator:
    """Three servers in one thread, and the switches by which a test drives them.

    All public methods and attributes may be used from any thread. `stop()` keeps the state and
    the ports: a later `start()` goes on where it was.
    """

    def __init__(
        self,
        latency: float = 0.0,
        search_lag: float = 0.0,
        *,
        ports: tuple[int, int, int] = (0, 0, 0),
        seed: int = 0,
    ) -> None:
        self.latency = latency
        self.record = True  # False: count requests per route, but do not keep them (benchmarks)
        self.on_answer: Callable[[Request, str], object] | None = None
        self._lock = threading.Condition()
        self._version = 0
        self._agenda = Agenda()
        self._openai = OpenAI(self._agenda)
        tokens: dict[str, Project] = {}
        configs: dict[tuple[str, str], JsonObject] = {}
        self._storage = Storage(tokens, configs, self._agenda, lambda: self.queue_url)
        self._queue = Queue(tokens, configs, self._agenda, lambda: self.queue_url)
        self._queue.search_lag = search_lag
        self._control = Control(self)
        apis = {"openai": self._openai, "stack": self._storage, "queue": self._queue}
        self._servers = Servers(apis, ports, self._serve)
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

    def add_token(self, token: str, project: int = FIRST_PROJECT.id, name: str = "") -> None:
        """Makes a Keboola token known; it sees the jobs of its project."""
        owner = Project(project, name or (FIRST_PROJECT.name if project == 1 else f"no {project}"))
        with self.changing():
            self._queue.tokens[token] = owner

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
        """Adds a batch, the newest of its project.

        `timeline` holds (seconds from now, status) pairs; a plain string is a status for ever.
        With `failed` there is an error file as well, and without a completed request no output
        file, as in the real API.
        """
        created = int(self._openai.wall()) if created_at is None else created_at
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

    @property
    def search_lag(self) -> float:
        return self._queue.search_lag

    @search_lag.setter
    def search_lag(self, seconds: float) -> None:
        with self.changing():
            self._queue.search_lag = seconds

    @property
    def search_hides_variables(self) -> bool:
        return self._queue.hides_variables

    @search_hides_variables.setter
    def search_hides_variables(self, hides: bool) -> None:
        with self.changing():
            self._queue.hides_variables = hides

    @property
    def batch_seconds(self) -> float | None:
        """How long a batch that was created over HTTP runs; None: until `finish`."""
        return self._openai.batch_seconds

    @batch_seconds.setter
    def batch_seconds(self, seconds: float | None) -> None:
        with self.changing():
            self._openai.batch_seconds = seconds

    @property
    def job_seconds(self) -> float | None:
        """How long a job runs by itself; None: until `finish_job`."""
        return self._queue.job_seconds

    @job_seconds.setter
    def job_seconds(self, seconds: float | None) -> None:
        with self.changing():
            self._queue.job_seconds = seconds

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
        """Makes requests go wrong; `FAULTS` has the kinds and their options.

        `match` is looked for in the whole request as text (method, target, headers, body). The
        first `skip` requests that fit pass, then `times` of them are hit (None: all).
        """
        self._check_pattern(route)
        if kind not in FAULTS:
            raise ValueError(f"unknown fault {kind!r}; one of {', '.join(sorted(FAULTS))}")
        allowed = FAULTS[kind].options
        if unknown := sorted(set(options) - allowed):
            raise ValueError(f"fault {kind!r} has no options {unknown}; it has {sorted(allowed)}")
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

    def routes(self) -> list[str]:
        apis: tuple[Api, ...] = (self._openai, self._storage, self._queue)
        return [route.name for api in apis for route in api.routes]

    def _check_pattern(self, pattern: str) -> None:
        names = self.routes()
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

    def state(self) -> JsonObject:
        """What `GET /_sim/state` shows."""
        with self._lock:
            self._advance()
            batches = self._openai.batches.values()
            faults = [f for f in self._faults if f.times is None or f.hits < f.times]
            return {
                "batches": {batch.id: batch.shown_status() for batch in batches},
                "jobs": self.jobs,
                "requests": dict(self._counts),
                "max_in_flight": self._max_in_flight,
                "faults": [{"route": f.route, "kind": f.kind, "hits": f.hits} for f in faults],
            }

    def wait_for(self, predicate: Callable[[], T], timeout: float = 10.0) -> T:
        """Returns the predicate's value as soon as it is true; asked again after each change.

        The lock is not held while the predicate runs, so it may send requests itself.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                self._advance()
                seen = self._version
            if value := predicate():
                return value
            if time.monotonic() >= deadline:
                raise TimeoutError(self._describe(predicate, timeout))
            with self._lock:
                left = min(deadline, self._agenda.next_due()) - time.monotonic()
                self._lock.wait_for(partial(self._has_changed, seen), max(0.0, left))

    def _has_changed(self, seen: int) -> bool:
        return self._version != seen

    def _describe(self, predicate: Callable[[], object], timeout: float) -> str:
        code = getattr(predicate, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(predicate)
        with self._lock:
            return (
                f"not true within {timeout:g} s: {where}; requests so far: {dict(self._counts)}, "
                f"{self._in_flight} in flight, {len(self._queue.jobs)} Keboola jobs"
            )

    # ---- locking ----

    def changing(self) -> Changing:
        """Guards a change of state and wakes whoever waits for one."""
        return Changing(self)

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
        if api is self._storage and request.target.startswith("/_sim/"):
            api = self._control
        request.route, handler = api.find(request.method, request.target)
        if api is self._control:
            await wire.send(b"".join(self._handle(api, handler, request).encode()))
        else:
            with InFlight(self, request) as flight:
                wire.before_last = flight.end
                await self._exchange(api, wire, request, handler)
        return request.headers.get("connection", "").lower() != "close"

    async def _exchange(self, api: Api, wire: Wire, request: Request, handler: Handler) -> None:
        fault, holds = self._interventions(request)
        kind = FAULTS[fault.kind] if fault else HONEST
        options = fault.options if fault else {}
        await self._pause(holds, "before")
        answer = Answer()
        if fault is None or fault.handled:
            answer = self._handle(api, handler, request)
        if kind.rewrite:
            answer = kind.rewrite(options, api, request, answer)
        api.sign(answer)
        await self._pause(holds, "after")
        if self.latency:
            await asyncio.sleep(self.latency)
        if self.on_answer:
            self.on_answer(request, fault.kind if fault and kind.deliver else str(answer.status))
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

    def _handle(self, api: Api, handler: Handler, request: Request) -> Answer:
        with self.changing():
            return api.answer(handler, request)

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

    def call_in_loop(self, action: Callable[[], object]) -> None:
        """Runs the action in the servers' thread; where that has ended, nothing is to be done."""
        self._servers.call(action)


HONEST = FaultKind()


class Changing:
    """The lock, with what is due done first and everybody woken at the end."""

    __slots__ = ("_sim",)

    def __init__(self, sim: Simulator) -> None:
        self._sim = sim

    def __enter__(self) -> None:
        self._sim._lock.acquire()
        self._sim._advance()

    def __exit__(self, *_error: object) -> None:
        self._sim._announce()
        self._sim._lock.release()


class InFlight:
    """Records a request, and counts it until the last byte of its answer is about to be sent.

    Counted any longer, a client that sends one request after another could be seen with two.
    """

    __slots__ = ("_counted", "_request", "_sim")

    def __init__(self, sim: Simulator, request: Request) -> None:
        self._sim, self._request, self._counted = sim, request, True

    def __enter__(self) -> InFlight:
        sim = self._sim
        with sim.changing():
            sim._counts[self._request.route] += 1
            if sim.record:
                sim._requests.append(self._request)
            sim._in_flight += 1
            sim._max_in_flight = max(sim._max_in_flight, sim._in_flight)
        return self

    def end(self) -> None:
        if self._counted:
            self._counted = False
            with self._sim.changing():
                self._sim._in_flight -= 1

    def __exit__(self, *_error: object) -> None:
        self.end()


# ======================================================================================
# Control over HTTP
# ======================================================================================


class Control(Api):
    """`/_sim/` on the stack's port: the switches for people. Neither recorded nor delayed."""

    name = "control"

    def __init__(self, sim: Simulator) -> None:
        super().__init__()
        self._sim = sim
        self._route("state", "GET", r"/_sim/state", self._state)
        self._route("finish", "POST", r"/_sim/finish", partial(self._call, sim.finish))
        self._route("faults", "POST", r"/_sim/faults", partial(self._call, sim.fault))
        self._route("clear", "DELETE", r"/_sim/faults", self._clear)

    def _state(self, request: Request) -> Answer:  # noqa: ARG002 - a handler's signature
        return Answer.json(self._sim.state())

    def _clear(self, request: Request) -> Answer:  # noqa: ARG002
        self._sim.clear_faults()
        return Answer.json({"ok": True})

    @staticmethod
    def _call(method: Callable[..., object], request: Request) -> Answer:
        """Calls the method with the body's keys as its keywords."""
        try:
            method(**request.json())
        except (KeyError, TypeError, ValueError) as error:
            raise ApiError(400, f"{type(error).__name__}: {error}") from error
        return Answer.json({"ok": True})

    def error(self, error: ApiError) -> Answer:
        return Answer.json({"error": error.message}, error.status)


# ======================================================================================
# Command line
# ======================================================================================

HELP = """
example:
  python tests/simulator.py --batch 'batch_a=validating@0,in_progress@2,completed@6'

A batch is ID=STATUS@SECONDS,... (seconds after the start; a lone STATUS counts from 0).

Batches are created over HTTP as at OpenAI, by its own client or by hand:
  curl localhost:8101/v1/files -H 'Authorization: Bearer sk-simulator' \\
    -F purpose=batch -F file=@requests.jsonl
  curl localhost:8101/v1/batches -H 'Authorization: Bearer sk-simulator' \\
    -d '{"input_file_id": "file-...", "endpoint": "/v1/responses", "completion_window": "24h",
         "metadata": {"pipeline": "nightly"}}'

While it runs (the stack's port; the JSON keys are the keywords of the Python methods):
  curl localhost:8102/_sim/state
  curl localhost:8102/_sim/finish  -d '{"id": "batch_a", "status": "failed"}'
  curl localhost:8102/_sim/faults  -d '{"route": "openai.*", "kind": "status", "code": 429}'
  curl -X DELETE localhost:8102/_sim/faults

routes: %(routes)s, and patterns such as openai.* or *
faults, with their options (all have times, 1 if not given and null for always, skip, match
and probability; transform is for Python only):
%(faults)s
"""

CONFIG = """state: demo.db
limits: {{trigger_grace: 5s}}
secrets:
  openai-sim:
    type: openai
    env: OPENAI_API_KEY
    base_url: {openai}
  keboola-sim:
    type: keboola
    env: KEBOOLA_TOKEN
    stack_url: {stack}
defaults:
  openai_secret: openai-sim
  keboola_secret: keboola-sim
  component_id: kds-team.app-custom-python
  poll_interval: 1s
jobs:
  demo:
    batch_ids: [{batches}]
    config_id: "123456"
  found:
    match: {{pipeline: nightly}}
    since: {today}
    config_id: "123457"
"""


DEFAULT_KEY = ("sk-simulator", DEFAULT_PROJECT)


def parse_key(text: str) -> tuple[str, str]:
    """Reads `sk-one=proj_one`, or a lone key."""
    key, _, project = text.partition("=")
    return key, project or DEFAULT_PROJECT


def parse_batch(text: str) -> tuple[str, list[tuple[float, str]]]:
    """Reads `batch_a=validating@0,completed@6`."""
    batch_id, _, steps = text.partition("=")
    if not (batch_id and steps):
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=STATUS@SECONDS,...")
    timeline = []
    for step in steps.split(","):
        status, _, seconds = step.partition("@")
        try:
            timeline.append((float(seconds or 0), status))
        except ValueError:
            message = f"{seconds!r} in {text!r} is not a number of seconds"
            raise argparse.ArgumentTypeError(message) from None
    return batch_id, timeline


def parser() -> argparse.ArgumentParser:
    faults = "\n".join(
        f"  {name:13} {kind.text}" + (f" ({', '.join(sorted(kind.options))})" * bool(kind.options))
        for name, kind in FAULTS.items()
    )
    result = argparse.ArgumentParser(
        description="Simulates OpenAI's Batch API and Keboola's Storage and Queue APIs.",
        epilog=HELP % {"routes": ", ".join(Simulator().routes()), "faults": faults},
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--openai-port", type=int, default=8101, metavar="N", help="default 8101; 0: any")
    add("--stack-port", type=int, default=8102, metavar="N", help="default 8102; 0: any")
    add("--queue-port", type=int, default=8103, metavar="N", help="default 8103; 0: any")
    add(
        "--key",
        type=parse_key,
        action="append",
        metavar="KEY[=PROJECT]",
        help="an OpenAI key it knows, and whose batches it sees (default: sk-simulator)",
    )
    add("--token", default="kbc-simulator", help="the Keboola token (default: kbc-simulator)")
    add("--latency", type=float, default=0.0, metavar="S", help="seconds added to each answer")
    add("--search-lag", type=float, default=0.0, metavar="S", help="until the search shows a job")
    add("--job-seconds", type=float, metavar="S", help="how long Keboola jobs run; else for ever")
    add("--batch-seconds", type=float, metavar="S", help="the same of batches created over HTTP")
    add(
        "--batch", type=parse_batch, action="append", default=[], metavar="ID=...", help="see below"
    )
    return result


def build(options: argparse.Namespace) -> Simulator:
    """The simulator that the options describe; without any batch, an example."""
    ports = (options.openai_port, options.stack_port, options.queue_port)
    sim = Simulator(options.latency, options.search_lag, ports=ports)
    sim.job_seconds = options.job_seconds
    sim.record = False  # it may run for days
    sim.batch_seconds = options.batch_seconds
    sim.on_answer = print_answer
    for key, project in options.key or [DEFAULT_KEY]:
        sim.add_key(key, project)
    sim.add_token(options.token)
    example = parse_batch("batch_a=validating@0,in_progress@2,completed@6")
    for batch_id, timeline in options.batch or [example]:
        sim.add_batch(batch_id, timeline)
    return sim


def print_answer(request: Request, outcome: str) -> None:
    now = datetime.now().astimezone().strftime("%H:%M:%S")
    print(f"{now} {request.method} {request.target} -> {outcome}", flush=True)


def introduce(sim: Simulator, options: argparse.Namespace) -> None:
    """Prints the addresses and a configuration that works with them."""
    batches = ", ".join([*sim.state()["batches"]][:10])  # a job has at most ten
    key = (options.key or [DEFAULT_KEY])[0][0]
    print(f"OpenAI   {sim.openai_url}\nstack    {sim.stack_url}\nqueue    {sim.queue_url}\n")
    print(f"export OPENAI_API_KEY={key} KEBOOLA_TOKEN={options.token}\n")
    today = datetime.now(UTC).date()
    print(CONFIG.format(openai=sim.openai_url, stack=sim.stack_url, batches=batches, today=today))
    print("Ctrl-C ends it.", flush=True)


def main() -> int:
    options = parser().parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    sim = build(options)
    try:
        sim.start()
    except OSError as error:
        print(f"simulator: {error}; choose other ports (--help)", file=sys.stderr)
        return 1
    introduce(sim, options)
    ended.wait()
    sim.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
