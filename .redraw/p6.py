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
                    shared.failure = ApiError("the search was interrupted")
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


