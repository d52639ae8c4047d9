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


