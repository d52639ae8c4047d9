"""Made-up reports: a morning with some trouble, and one whose every text is an attack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from teckochecker import (
    PAGE_FILE,
    Batch,
    Event,
    Holder,
    LogRow,
    Report,
    Target,
    Trigger,
    TriggerState,
    Usage,
    Work,
    page_body,
    page_head,
)

NOW = 1_795_426_200.0  # 2026-11-23T09:30:00Z
HOST = "https://connection.eu-central-1.keboola.com"
TARGET = Target(HOST, "kds-team.app-custom-python", "7203114")
EVIL = "<script>alert(1)</script>"


def page_of(report: Report, name: str = PAGE_FILE) -> str:
    """The page of a report, as it is published under a name."""
    return page_head(report, name) + page_body(report)


def batches(name: str, *parts: tuple[str | None, int]) -> tuple[Batch, ...]:
    """Batches, each with its status and how many of its 1000 requests are done."""
    return tuple(
        Batch(f"batch_{name}_{n}", status, 1000, done, 0, ended_at=NOW - 600 * n)
        for n, (status, done) in enumerate(parts, 1)
    )


def work(name: str, *parts: tuple[str | None, int], **more: Any) -> Work:  # noqa: ANN401
    """A piece of work that was looked at 12 seconds ago."""
    slug = "".join(c for c in name if c.isalnum())[:12]
    plain = Work(1, name, batches(slug, *parts), TARGET, 0, last_check_at=NOW - 12)
    return replace(plain, **({"next_check_at": NOW + 18} | more))


def trigger(state: TriggerState, **more: Any) -> Trigger:  # noqa: ANN401
    plain = Trigger("4f" * 32, 0, state, TARGET, "keboola-prod", "{}", "basis", NOW - 900)
    return replace(plain, **more)


def sent(number: str, hours_ago: float) -> Trigger:
    """A trigger that has started a Keboola job."""
    url = f"{HOST}/admin/projects/4711/queue/{number}"
    at = NOW - hours_ago * 3600
    return trigger(TriggerState.SENT, keboola_job_id=number, url=url, sent_at=at)


def morning() -> Report:
    """A made-up report that has something of everything."""
    refused = "Keboola refuses it: 404: Configuration 7203150 not found"
    rejected = trigger(TriggerState.REJECTED, next_try_at=NOW + 1500, error=refused)
    unknown = trigger(
        TriggerState.UNKNOWN,
        next_try_at=NOW + 40,
        error="the POST's outcome is not known: no answer within 30 s",
    )
    done = ("completed", 1000)
    works = (
        work("nightly-embeddings", done, ("in_progress", 640), ("in_progress", 80)),
        work(
            "product-texts-de",
            *[done] * 4,
            target=replace(TARGET, config_id="7203150"),
            trigger=rejected,
            next_check_at=None,
        ),
        work("support-tickets", done, done, trigger=unknown, next_check_at=None),
        work("reviews-sentiment", done, ("validating", 0), ("finalizing", 990)),
        work("weekly-summaries", ("in_progress", 10), paused=True, next_check_at=None),
        work(
            "catalog-translations",
            *[done] * 3,
            trigger=sent("1284417702", 2.4),
            completed_at=NOW - 2.4 * 3600,
            next_check_at=None,
        ),
        work(
            "invoices-ocr",
            done,
            ("expired", 412),
            done,
            trigger=sent("1284409315", 9),
            completed_at=NOW - 9 * 3600,
            next_check_at=None,
        ),
    )
    events = [
        LogRow(1, NOW - 900, Event("trigger_rejected", "error", None, {"error": refused})),
        LogRow(2, NOW - 901, Event("trigger_intended", "info", None, {"config_id": "7203150"})),
    ]
    return Report(
        at=NOW,
        runs=Holder.DAEMON,
        config={
            "path": "config.yaml",
            "sha256": "5e" * 32,
            "loaded_at": "2026-11-23T06:12:41Z",
            "error": None,
        },
        works=works,
        usages={
            "openai-prod": Usage("openai", 20_417, 3, NOW - 12),
            "keboola-prod": Usage("keboola", 96, 14, NOW - 2.4 * 3600, error=refused),
        },
        last_events={"product-texts-de": events},
        fresh_for_s=45,
    )


def full_of_evil() -> Report:
    """A report in which every text that comes from elsewhere tries to be more than text."""
    evil = f"\"'>{EVIL}<img src=x onerror=alert(2)>&lt;b&gt;"
    target = Target(evil, evil, evil, evil)
    bad = trigger(TriggerState.REJECTED, target=target, error=evil)
    linked = sent(evil, 1)
    script = replace(linked, url="javascript:alert(3)")
    breaking = replace(linked, url=f'https://x/"onclick="alert(4)"><script>{EVIL}')
    batch = Batch(evil, "failed", error=evil)
    strange = Batch(evil, evil)
    works = tuple(
        Work(n, EVIL + evil, (batch, strange), target, n, error=evil, trigger=one)
        for n, one in enumerate((None, bad, script, breaking))
    )
    event = LogRow(1, NOW, Event(evil, "info", None, {evil: evil, "list": [evil]}))
    usage = Usage(evil, 1, 1, NOW, error=evil)
    return replace(
        morning(),
        config={"path": evil, "sha256": evil, "loaded_at": evil, "error": evil},
        works=works,
        usages={evil: usage},
        last_events={EVIL + evil: [event]},
    )
