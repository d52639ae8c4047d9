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
UNCLEAR_SIZE: Final = "the size of the group is unclear"


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
            ended: dict[str, Any] = {"phase": Phase.REFUSED, "next_at": math.inf, "error_since": now}
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
        return False, math.inf, f"{UNCLEAR_SIZE}: {size or 'it is missing'}"
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
    return after, [Event.of("trigger_sending", run, trigger_id=run.trigger_id, target=str(run.target))]


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


def after_search(  # noqa: PLR0911 - a table
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


def in_order(job: Job, batches: Iterable[Batch]) -> tuple[Batch, ...]:
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
        batches = in_order(job, [*run.batches, *(row.batch for row in joined)])
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


