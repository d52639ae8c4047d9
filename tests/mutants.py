#!/usr/bin/env python3
"""Proof that the tests can fail: breaks the program, one line at a time, and has them notice.

    python tests/mutants.py                     every breakage of the table below
    python tests/mutants.py grace "no search"   those whose names have one of these words
    python tests/mutants.py --jobs 4            so many at a time
    python tests/mutants.py --verbose NAME      with what the tests said
    python tests/mutants.py --list

Each breakage is made in a copy of the project and meets only the tests that are there to notice it,
so that the whole takes minutes. Before that, these tests have to pass without any breakage.

Exit codes: 0 all were caught; 1 some survived, which is a bug of the tests; 2 the table does not
fit the program, or the tests do not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "teckochecker.py"
COPIED = (PROGRAM, "tests", "pyproject.toml", "config.example.yaml", "systemd", "README.md")
TIMEOUT_S = 120.0  # for one breakage: a test that hangs has noticed something, too
BASELINE_TIMEOUT_S = 900.0
PASSED, FAILED = 0, 1  # pytest's exit codes; all others mean that it did not test


class TableError(Exception):
    """The table does not fit the program or the tests."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A breakage: what stands in the program, what stands there instead, and who must notice."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]  # as pytest takes them, without the directory


MUTANTS: tuple[Mutant, ...] = (
    # --- nothing happens before it is committed ---
    Mutant(
        name="intent not committed",
        old='self._commit(trigger, "trigger_intended", config_id=trigger.target.config_id)',
        new="self._watch.work = replace(self._watch.work, trigger=trigger)",
        tests=("test_engine.py::test_each_step_is_committed_before_the_next",),
    ),
    Mutant(
        name="`sending` not committed",
        old='self._commit(sending, "trigger_sending")',
        new="watch.work = replace(watch.work, trigger=sending)",
        tests=("test_engine.py::test_each_step_is_committed_before_the_next",),
    ),
    Mutant(
        name="result of the POST committed before it is known",
        old='self._commit(sending, "trigger_sending")',
        new='self._commit(as_sent(sending, KeboolaJob("?", None, None, None, None), 0.0))',
        tests=("test_engine.py::test_each_step_is_committed_before_the_next",),
    ),
    Mutant(
        name="synchronous=NORMAL",
        old='"PRAGMA synchronous = FULL"',
        new='"PRAGMA synchronous = NORMAL"',
        tests=("test_state.py::test_commits_survive_power_loss",),
    ),
    Mutant(
        name="a transaction that fails keeps its first half",
        old='self._db.execute("ROLLBACK")',
        new='self._db.execute("COMMIT")',
        tests=("test_state.py::test_a_change_is_stored_whole_or_not_at_all",),
    ),
    Mutant(
        name="a result that cannot be committed is given up",
        old="if self._clock.mono() > give_up_at:",
        new="if self._clock.mono() >= 0:",
        tests=("test_engine.py::test_a_result_is_kept_until_it_can_be_committed",),
    ),
    Mutant(
        name="with a full disk, looks without a pause",
        old="            watch.due = now + wait_s\n",
        new="            pass\n",
        tests=("test_engine.py::test_with_a_full_disk_nothing_is_begun",),
    ),
    Mutant(
        name="--once waits for a full disk",
        old="if self._engine.once or not await self._wait(min(wait_s, PATIENCE_S)):",
        new="if not await self._wait(min(wait_s, PATIENCE_S)):",
        tests=("test_engine.py::test_a_pass_does_not_wait_for_a_full_disk",),
    ),
    # --- when to search, and what a search says ---
    Mutant(
        name="the first POST without a search",
        old="await self._search(trigger)\n",
        new="await (self._search if trigger.sending_at else self._post)(trigger)\n",
        tests=("test_engine.py::test_the_oldest_of_several_is_ours",),
    ),
    Mutant(
        name="POST again without a search",
        old="await self._search(trigger)\n",
        new="await (self._post if trigger.sending_at else self._search)(trigger)\n",
        tests=("test_engine.py::test_an_unknown_outcome_takes_two_clear_searches_and_the_grace",),
    ),
    Mutant(
        name="a trigger found at start sent at once",
        old="return self._recover(trigger)",
        new="trigger = replace(trigger, state=TriggerState.INTENT)",
        tests=("test_engine.py::test_killed_in_a_post",),
    ),
    Mutant(
        name="grace ignored",
        old="is_late = unknown_for_s >= needed_s",
        new="is_late = True",
        tests=("test_decisions.py::test_a_clear_search_of_an_unknown_trigger",),
    ),
    Mutant(
        name="grace of the config ignored",
        old="unknown_for_s=begun_at - self._watch.unknown_since,",
        new="unknown_for_s=math.inf,",
        tests=("test_engine.py::test_a_job_that_shows_late_is_found",),
    ),
    Mutant(
        name="grace counted from the search's end",
        old="unknown_for_s=begun_at - self._watch.unknown_since,",
        new="unknown_for_s=self._clock.mono() - self._watch.unknown_since,",
        tests=("test_engine.py::test_a_search_begun_before_the_grace_is_over_does_not_count",),
    ),
    Mutant(
        name="grace counted from the POST's beginning",
        old="TriggerState.UNKNOWN and (not before or before.state != trigger.state)",
        new="TriggerState.SENDING",
        tests=("test_engine.py::test_the_grace_counts_from_the_record_of_the_outcome",),
    ),
    Mutant(
        name="one search instead of two",
        old="CLEAR_SEARCHES_NEEDED: Final = 2",
        new="CLEAR_SEARCHES_NEEDED: Final = 1",
        tests=("test_decisions.py::test_a_clear_search_of_an_unknown_trigger",),
    ),
    Mutant(
        name="searches before the last POST counted",
        old="        sending_at=now,\n        unknown_at=None,\n        clear_searches=0,\n",
        new="        sending_at=now,\n        unknown_at=None,\n",
        tests=("test_decisions.py::test_sending_begins_the_count_of_searches_anew",),
    ),
    Mutant(
        name="a failed search counted as empty",
        old="            failure = error\n",
        new="            failure = None\n",
        tests=("test_engine.py::test_a_failed_search_sends_nothing",),
    ),
    Mutant(
        name="a failed search repeated without a wait",
        old="error=text, next_try_at=now + wait_s), Step.WAIT",
        new="error=text), Step.WAIT",
        tests=("test_decisions.py::test_a_failed_search_sends_nothing",),
    ),
    Mutant(
        name="a search that breaks off counted as complete",
        old="if not ours_oldest_first(seen.values(), trigger):",
        new="if not seen:",
        tests=("test_http.py::test_an_error_on_the_way_leaves_nothing_said",),
    ),
    Mutant(
        name="first page of the search only",
        old="if not fresh and not is_full:",
        new="if page:",
        tests=("test_http.py::test_every_page_is_read",),
    ),
    Mutant(
        name="a short page taken for the last one",
        old="if not fresh and not is_full:",
        new="if not is_full:",
        tests=("test_http.py::test_a_server_that_caps_the_limit",),
    ),
    Mutant(
        name="pages without overlap",
        old="before = min(times) + timedelta(seconds=1)",
        new="before = min(times) - timedelta(microseconds=1)",
        tests=("test_http.py::test_pages_overlap",),
    ),
    Mutant(
        name="an unsorted list taken for complete",
        old="if is_full and not (is_sorted and (fresh or not offset)):",
        new="if is_full and offset and not fresh:",
        tests=("test_http.py::test_rows_out_of_order_are_no_complete_search",),
    ),
    Mutant(
        name="the cap on rows taken for the end",
        old='raise ApiError(f"Keboola\'s job list does not end after {MAX_SEARCH_ROWS} rows")',
        new="return",
        tests=("test_http.py::test_too_many_pages_are_no_complete_search",),
    ),
    Mutant(
        name="a row that hides its variables counted as foreign",
        old="if job.trigger_id is not None:",
        new="if True:",
        tests=("test_http.py::test_rows_without_variables_are_read_by_their_id",),
    ),
    Mutant(
        name="trigger id compared with the wrong variable",
        old='item.get("name") == TRIGGER_ID_VARIABLE:',
        new='item.get("name") == "teckochecker_job":',
        tests=("test_http.py::test_every_page_is_read",),
    ),
    Mutant(
        name="any job that carries a trigger id taken for ours",
        old="if job.trigger_id == trigger]",
        new="if job.trigger_id]",
        tests=("test_decisions.py::test_the_oldest_of_several_jobs_comes_first",),
    ),
    Mutant(
        name="the newest of several jobs taken for ours",
        old="ours = jobs[0]",
        new="ours = jobs[-1]",
        tests=("test_engine.py::test_the_oldest_of_several_is_ours",),
    ),
    Mutant(
        name="the search begins an hour before the last end",
        old="SEARCH_BACK_S: Final = DAY_S",
        new="SEARCH_BACK_S: Final = HOUR_S",
        tests=("test_decisions.py::test_the_search_begins_a_day_before_the_last_end",),
    ),
    Mutant(
        name="the search begins in the future",
        old="bound = min(max(ended) if ended else min(created), now)",
        new="bound = max(ended) if ended else min(created)",
        tests=("test_decisions.py::test_the_search_begins_a_day_before_the_last_end",),
    ),
    Mutant(
        name="the branch narrows the search",
        old='"limit": str(limit),',
        new='"limit": str(limit), "branchId": target.branch_id or "",',
        tests=("test_http.py::test_what_the_search_asks_for",),
    ),
    Mutant(
        name="what came during a search ignored",
        old="return self._watch.work.trigger == trigger and self._engine.is_carried(self._watch)",
        new="return True",
        tests=("test_engine.py::test_retry_force_during_a_search_is_not_forgotten",),
    ),
    Mutant(
        name="a lost state file searched for at once",
        old="if step is Step.POST and not failure and begun_at < engine.clear_from:",
        new="if False:",
        tests=("test_once.py::test_state_lost_within_the_grace",),
    ),
    Mutant(
        name="POSTs not noted beside the state file",
        old="        engine.note_post(sending)\n",
        new="",
        tests=("test_once.py::test_state_lost_within_the_grace",),
    ),
    Mutant(
        name="a lost state file holds a start until the clock has caught up",
        old="by_clock_s = max(0.0, now.wall - since.wall)",
        new="by_clock_s = now.wall - since.wall",
        tests=("test_decisions.py::test_what_has_certainly_passed",),
    ),
    # --- the trigger's id and target ---
    Mutant(
        name="trigger id without the job's name",
        old="compact_json([1, name, sorted(batch_ids), rerun])",
        new="compact_json([1, sorted(batch_ids), rerun])",
        tests=("test_decisions.py::test_the_trigger_id_depends_on_all_of_its_parts",),
    ),
    Mutant(
        name="trigger id without the rerun",
        old="compact_json([1, name, sorted(batch_ids), rerun])",
        new="compact_json([1, name, sorted(batch_ids)])",
        tests=("test_decisions.py::test_the_trigger_id_depends_on_all_of_its_parts",),
    ),
    Mutant(
        name="trigger id recomputed after a rename",
        old="own_id = old.id if old else trigger_id(work.name, ids, work.rerun)",
        new="own_id = trigger_id(work.name, ids, work.rerun)",
        tests=("test_decisions.py::test_arming_again_keeps_the_id_and_rebuilds_the_payload",),
    ),
    Mutant(
        name="target of the new config searched for what was sent",
        old="client.search(trigger.target, since, trigger.id)",
        new="client.search(self._watch.work.target, since, trigger.id)",
        tests=("test_engine.py::test_what_was_once_sent_keeps_its_target",),
    ),
    Mutant(
        name="target of the new config sent for what was sent",
        old="job = await client.create(sending.payload)",
        new=(
            "job = await client.create(keboola_payload(engine.setup.config.jobs[watch.work.name],"
            " watch.work.target, watch.work.batches, sending.id))"
        ),
        tests=("test_engine.py::test_what_was_once_sent_keeps_its_target",),
    ),
    # --- whose token, which target, and how often ---
    Mutant(
        name="429 taken as rejected",
        old="frozenset(range(400, 500)) - {408, 429}",
        new="frozenset(range(400, 500)) - {408}",
        tests=("test_decisions.py::test_what_a_failed_post_comes_to",),
    ),
    Mutant(
        name="an unsent intent does not follow the config",
        old="wanted = self._wanted() if trigger.follows_config else None",
        new="wanted = None",
        tests=("test_engine.py::test_a_mistyped_stack_is_corrected",),
    ),
    Mutant(
        name="what was once sent follows the config",
        old="return self.state == TriggerState.INTENT and self.sending_at is None",
        new="return self.state == TriggerState.INTENT",
        tests=("test_engine.py::test_what_was_once_sent_keeps_its_target",),
    ),
    Mutant(
        name="a reload during the search is not seen",
        old="elif self._is_outdated(trigger):",
        new="elif False:",
        tests=("test_engine.py::test_a_reload_during_the_search_makes_another_intent",),
    ),
    Mutant(
        name="earlier ids keep a mistyped stack",
        old="target = replace(old.target, stack_url=setup.config.keboola[secret].stack_url)",
        new="target = old.target",
        tests=("test_engine.py::test_a_mistyped_stack_is_corrected_for_earlier_ids_too",),
    ),
    Mutant(
        name="another project's token carries a trigger",
        old="if project is not None and (project == trigger.project_id or not is_bound):",
        new="if project is not None:",
        tests=("test_engine.py::test_only_a_token_of_the_project_carries_a_trigger",),
    ),
    Mutant(
        name="any token carries a trigger whose project is not known",
        old="if trigger.project_id is not None and not trigger.follows_config:",
        new="if not trigger.follows_config:",
        tests=("test_engine.py::test_a_trigger_of_an_earlier_version_keeps_its_secret",),
    ),
    Mutant(
        name="a new secret of the project is not noticed",
        old="if is_changed or (work.trigger and is_other_keboola):",
        new="if is_changed:",
        tests=("test_engine.py::test_only_a_token_of_the_project_carries_a_trigger",),
    ),
    Mutant(
        name="a token's project asked for each time",
        old="        if (key := (self._stack_url, self._token)) not in known:\n",
        new="        if key := (self._stack_url, self._token):\n",
        tests=("test_http.py::test_a_tokens_project_is_asked_for_once",),
    ),
    Mutant(
        name="repeated POSTs do not come later each time",
        old="doubled = grace_s * 2.0 ** min(max(trigger.unknowns - 1, 0), 16)",
        new="doubled = grace_s",
        tests=("test_engine.py::test_posts_that_bring_nothing_are_ever_further_apart",),
    ),
    Mutant(
        name="repeated POSTs are days apart",
        old="return max(grace_s, min(MAX_BACKOFF_S, max(doubled, trigger.asked_wait_s)))",
        new="return max(grace_s, doubled, trigger.asked_wait_s)",
        tests=("test_decisions.py::test_the_wait_for_a_repeated_post_doubles",),
    ),
    Mutant(
        name="Retry-After of an unknown outcome ignored",
        old="min(MAX_BACKOFF_S, max(doubled, trigger.asked_wait_s))",
        new="min(MAX_BACKOFF_S, doubled)",
        tests=("test_decisions.py::test_the_wait_for_a_repeated_post_doubles",),
    ),
    Mutant(
        name="the words of the last POST forgotten",
        old='said = f": {trigger.said}" if trigger.said else ""',
        new='said = ""',
        tests=("test_decisions.py::test_a_clear_search_of_an_unknown_trigger",),
    ),
    Mutant(
        name="the row of unknown outcomes goes on after --force",
        old="forced=True, unknowns=0)",
        new="forced=True)",
        tests=("test_decisions.py::test_unknown_outcomes_in_a_row_are_counted",),
    ),
    Mutant(
        name="the old list not asked before a second POST",
        old="if not jobs and trigger.sending_at is not None:",
        new="if False:",
        tests=("test_engine.py::test_the_old_list_is_asked_before_a_second_post",),
    ),
    Mutant(
        name="a row read by each search that needs it",
        old="                if key not in known:\n                    said",
        new="                if True:\n                    said",
        tests=("test_http.py::test_a_row_is_read_once_by_all_searches",),
    ),
    Mutant(
        name="an empty list of variables taken as told",
        old='return "" if values else None',
        new='return ""',
        tests=("test_http.py::test_what_counts_as_not_telling",),
    ),
    Mutant(
        name="a row that may not be read stops the search",
        old="if error.status not in {403, 404}:",
        new="if True:",
        tests=("test_http.py::test_a_row_that_may_not_be_read_is_foreign",),
    ),
    Mutant(
        name="any row that cannot be read is foreign",
        old="if error.status not in {403, 404}:",
        new="if False:",
        tests=("test_http.py::test_an_unreadable_row_is_no_foreign_one",),
    ),
    Mutant(
        name="a job that is not there yet is foreign for ever",
        old='return "" if error.status == 403 else None',
        new='return ""',
        tests=("test_http.py::test_a_row_that_may_not_be_read_is_foreign",),
    ),
    Mutant(
        name="a page that is too large is given up",
        old="limit //= 2",
        new="raise",
        tests=("test_http.py::test_a_page_that_is_too_large_is_asked_for_in_halves",),
    ),
    Mutant(
        name="a page of halved size taken for the last one",
        old="is_full = len(page) >= limit",
        new="is_full = len(page) >= SEARCH_LIMIT",
        tests=("test_http.py::test_a_page_that_is_too_large_is_asked_for_in_halves",),
    ),
    Mutant(
        name="pages by place do not go on",
        old="offset += len(page)",
        new="offset += 0",
        tests=("test_http.py::test_pages_go_on_by_place_where_the_bound_changes_nothing",),
    ),
    Mutant(
        name="Keboola's clock ignored",
        old=" - SEARCH_BACK_S - max(0.0, behind_s))",
        new=" - SEARCH_BACK_S)",
        tests=("test_decisions.py::test_the_search_goes_by_keboolas_clock",),
    ),
    Mutant(
        name="Keboola's clock ahead shortens the search",
        old="max(0.0, behind_s)",
        new="behind_s",
        tests=("test_decisions.py::test_the_search_goes_by_keboolas_clock",),
    ),
    Mutant(
        name="Keboola's Date not read",
        old='if date := http_date(answer.headers.get("date", "")):',
        new="if date := None:",
        tests=("test_http.py::test_keboolas_clock_is_seen",),
    ),
    Mutant(
        name="a first start that was killed is never started again",
        old="            roll_back(path)\n",
        new="",
        tests=("test_state.py::test_a_first_start_that_was_killed",),
    ),
    Mutant(
        name="files of a batch not waited for",
        old="now - since >= FILES_WAIT_S",
        new="now - since >= 0",
        tests=("test_decisions.py::test_files_that_come_after_the_end_are_waited_for",),
    ),
    Mutant(
        name="files of a batch waited for without end",
        old="now - since >= FILES_WAIT_S",
        new="now - since >= math.inf",
        tests=("test_decisions.py::test_files_that_come_after_the_end_are_waited_for",),
    ),
    Mutant(
        name="an end that lacks its files is taken back",
        old="        if seen.status != known.status:  # what has ended has ended\n",
        new="        if False:\n",
        tests=("test_decisions.py::test_files_that_come_after_the_end_are_waited_for",),
    ),
    Mutant(
        name="late files looked for at the interval of the job",
        old="wait_s = min(wait_s, FILES_LOOK_S)",
        new="pass",
        tests=("test_decisions.py::test_a_batch_whose_files_are_late_is_looked_at_soon",),
    ),
    Mutant(
        name="a row without the files of its batch counts",
        old=" and not batch.lacks_files):",
        new="):",
        tests=("test_chart.py::test_a_row_that_lacks_files_is_not_taken",),
    ),
    Mutant(
        name="an id beyond all measure taken",
        old="if len(value) > MAX_ID_LENGTH:",
        new="if False:",
        tests=("test_http.py::test_an_id_is_never_cut",),
    ),
    Mutant(
        name="a long id refused",
        old="MAX_ID_LENGTH: Final = 4096",
        new="MAX_ID_LENGTH: Final = 500",
        tests=("test_http.py::test_an_id_is_never_cut",),
    ),
    Mutant(
        name="NO_PROXY with an IPv6 network stops everything",
        old="left_out.append(entry.strip())",
        new="kept.append(entry)",
        tests=("test_http.py::test_entries_of_no_proxy_that_httpx_cannot_take",),
    ),
    # --- what is work, and when it is due ---
    Mutant(
        name="terminal status overwritten",
        old="if known.is_terminal or seen == known:",
        new="if seen == known:",
        tests=("test_decisions.py::test_a_terminal_status_is_never_overwritten",),
    ),
    Mutant(
        name="trigger when one batch is not terminal",
        old="return all(batch.is_terminal for batch in self.batches)",
        new="return sum(not batch.is_terminal for batch in self.batches) < 2",
        tests=("test_decisions.py::test_job_status_by_example",),
    ),
    Mutant(
        name="trigger in spite of `paused`",
        old="return job is not None and not job.rests and not self.is_stopping",
        new="return job is not None and not self.is_stopping",
        tests=("test_engine.py::test_paused_during_the_search",),
    ),
    Mutant(
        name="trigger of a removed job",
        old="return job is not None and not job.rests and not self.is_stopping",
        new="return (job is None or not job.rests) and not self.is_stopping",
        tests=("test_engine.py::test_no_post_for_what_is_gone_or_paused",),
    ),
    Mutant(
        name="`paused` asked before the search only",
        old=(
            "may_post = self._engine.may_post(self._watch)  # asked now: a reload "
            "may have paused it"
        ),
        new="may_post = True",
        tests=("test_engine.py::test_paused_during_the_search",),
    ),
    Mutant(
        name="decided in spite of `paused`",
        old="return may_post and watch.work.is_ready and",
        new="return watch.work.is_ready and",
        tests=("test_engine.py::test_retry_force_of_a_paused_job_decides_nothing",),
    ),
    Mutant(
        name="SIGTERM stops nothing",
        old="self.is_stopping = True",
        new="pass",
        tests=("test_engine.py::test_nothing_begins_after_sigterm",),
    ),
    Mutant(
        name="a paused job looked at",
        old="if watch.job is None or watch.job.rests or self.is_stopping:",
        new="if watch.job is None or self.is_stopping:",
        tests=("test_work.py::test_pause",),
    ),
    Mutant(
        name="a rename is new work",
        old="if row.name not in jobs:",
        new="if False:",
        tests=("test_decisions.py::test_which_row_a_job_is",),
    ),
    Mutant(
        name="a copy takes over the work of its original",
        old="if row.name not in jobs:",
        new="if True:",
        tests=("test_decisions.py::test_which_row_a_job_is",),
    ),
    Mutant(
        name="unfinished work taken over first",
        old="return (not row.is_finished, ",
        new="return (row.is_finished, ",
        tests=("test_decisions.py::test_which_row_a_job_is",),
    ),
    Mutant(
        name="work of another target taken over",
        old="absent.setdefault((row.batch_ids, row.target), []).append(row)",
        new=(
            "for target in targets.values():\n"
            "                absent.setdefault((row.batch_ids, target), []).append(row)"
        ),
        tests=("test_decisions.py::test_which_row_a_job_is",),
    ),
    Mutant(
        name="`retry --force` of two people starts two jobs",
        old="if request.force and seen != (watch.work.rerun, watch.work.is_finished):",
        new="if False:",
        tests=("test_commands.py::test_retry_force_repeats_only_what_was_seen",),
    ),
    Mutant(
        name="`retry --force` during a POST",
        old="    if is_posting:\n",
        new="    if False:\n",
        tests=("test_decisions.py::test_retry_leaves_a_post_under_way_alone",),
    ),
    Mutant(
        name="`retry` without --force decides an unknown trigger",
        old="case TriggerState.UNKNOWN | TriggerState.SENDING | TriggerState.INTENT if force:",
        new="case TriggerState.UNKNOWN | TriggerState.SENDING | TriggerState.INTENT:",
        tests=("test_decisions.py::test_what_retry_does",),
    ),
    # --- what a POST came to ---
    Mutant(
        name="5xx taken as not sent",
        old="    if not error.sent:\n        wait_s = backoff_s(failures, FIRST_TRIGGER",
        new=(
            "    if not error.sent or (error.status or 0) >= 500:\n"
            "        wait_s = backoff_s(failures, FIRST_TRIGGER"
        ),
        tests=("test_decisions.py::test_what_a_failed_post_comes_to",),
    ),
    Mutant(
        name="429 taken as not sent",
        old="    if not error.sent:\n        wait_s = backoff_s(failures, FIRST_TRIGGER",
        new=(
            "    if not error.sent or error.status == 429:\n"
            "        wait_s = backoff_s(failures, FIRST_TRIGGER"
        ),
        tests=("test_decisions.py::test_what_a_failed_post_comes_to",),
    ),
    Mutant(
        name="a rejected trigger sent again at any reload",
        old="if trigger_basis(job, target, token) != trigger.basis:",
        new="if True:",
        tests=("test_engine.py::test_a_rejected_trigger_waits_for_another_basis",),
    ),
    Mutant(
        name="408 taken as rejected",
        old="frozenset(range(400, 500)) - {408, 429}",
        new="frozenset(range(400, 500)) - {429}",
        tests=("test_decisions.py::test_what_a_failed_post_comes_to",),
    ),
    Mutant(
        name="2xx without id taken as sent",
        old='raise nonsense(f"Keboola\'s answer is not a job: it {error}", answer) from None',
        new="return KeboolaJob(str(error), None, None, None, None)",
        tests=("test_http.py::test_a_post_that_brings_another_answer",),
    ),
    Mutant(
        name="a lost answer taken as not sent",
        old="                error.sent = started\n",
        new="                error.sent = False\n",
        tests=("test_http.py::test_a_post_that_brings_no_answer",),
    ),
    Mutant(
        name="an error's kind trusted where bytes were sent",
        old="                error.sent = started\n",
        new="",
        tests=("test_http.py::test_a_post_that_brings_no_answer",),
    ),
    Mutant(
        name="the POST repeated at once",
        old=(
            'answer = await noted(self._http.post(f"{url}/jobs", headers, payload),'
            " self._note_request)"
        ),
        new=(
            "try:\n"
            '            answer = await self._http.post(f"{url}/jobs", headers, payload)\n'
            "        except ApiError:\n"
            '            answer = await self._http.post(f"{url}/jobs", headers, payload)'
        ),
        tests=("test_http.py::test_a_post_that_brings_no_answer",),
    ),
    Mutant(
        name="the POST over a kept connection",
        old="        async with self.gate, self.new_client() as client:\n",
        new=(
            "        client = self._client = self._client or self.new_client()\n"
            "        async with self.gate:\n"
        ),
        tests=("test_http.py::test_each_post_has_a_connection_of_its_own",),
    ),
    Mutant(
        name="redirects followed",
        old="follow_redirects=False,",
        new="follow_redirects=True,",
        tests=("test_http.py::test_a_redirect_is_not_followed",),
    ),
    Mutant(
        name="cookies taken",
        old="cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),",
        new="cookies=CookieJar(),",
        tests=("test_hostile.py::test_cookies",),
    ),
    # --- the state file ---
    Mutant(
        name="lock not taken",
        old="                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        new="",
        tests=("test_state.py::test_a_second_process_is_told_who_holds_the_lock",),
    ),
    Mutant(
        name="inode check left out",
        old="if not (self.store.is_in_place() and self._lock.is_in_place()):",
        new="if False:",
        tests=("test_engine.py::test_without_its_files_nothing_is_begun",),
    ),
    Mutant(
        name="inode check of the lock file left out",
        old="if not (self.store.is_in_place() and self._lock.is_in_place()):",
        new="if not self.store.is_in_place():",
        tests=("test_engine.py::test_without_its_files_nothing_is_begun",),
    ),
    Mutant(
        name="inode check left out before the intent",
        old=(
            "        self._engine.check_in_place()\n"
            '        self._commit(trigger, "trigger_intended"'
        ),
        new='        self._commit(trigger, "trigger_intended"',
        tests=("test_engine.py::test_without_its_files_nothing_is_begun",),
    ),
    Mutant(
        name="inode check left out before `sending`",
        old="        engine.check_in_place()\n        sending = ",
        new="        sending = ",
        tests=("test_engine.py::test_without_its_files_nothing_is_begun",),
    ),
    Mutant(
        name="links followed where own files are opened",
        old="flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC",
        new="flags = os.O_RDWR | os.O_CLOEXEC",
        tests=("test_state.py::test_own_files_are_no_links",),
    ),
    Mutant(
        name="links followed where a reader opens the lock file",
        old="os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)",
        new="os.O_RDONLY | os.O_CLOEXEC)",
        tests=("test_state.py::test_a_link_is_no_lock",),
    ),
    Mutant(
        name="a newer schema taken",
        old="if version > len(MIGRATIONS):",
        new="if False:",
        tests=("test_state.py::test_a_newer_schema_is_refused_and_not_touched",),
    ),
    Mutant(
        name="a damaged file taken",
        old='if result != "ok":',
        new="if False:",
        tests=("test_state.py::test_a_damaged_file_is_refused_and_not_touched",),
    ),
    Mutant(
        name="future time trusted",
        old="trigger = as_of_now(work.trigger, wall)",
        new="trigger = work.trigger",
        tests=("test_engine.py::test_a_clock_set_back_holds_nothing",),
    ),
    Mutant(
        name="future time of an unknown outcome trusted",
        old="unknown_at = None if trigger.unknown_at is None else min(trigger.unknown_at, now)",
        new="unknown_at = trigger.unknown_at",
        tests=("test_decisions.py::test_times_in_the_future_count_as_now",),
    ),
    Mutant(
        name="a clock that was set forward trusted",
        old="        return max(0.0, now.uptime_s - since.uptime_s)\n",
        new="        return max(0.0, now.wall - since.wall)\n",
        tests=("test_engine.py::test_a_clock_set_forward_shortens_no_grace",),
    ),
    # --- secrets ---
    Mutant(
        name="redactor left out of the log",
        old="            redact,  # the last before the line is made: nothing gets around it\n",
        new="",
        tests=("test_secrets.py::test_no_log_line_has_a_secret",),
    ),
    Mutant(
        name="redactor left out of the state file",
        old="cleaned = {key: self._http.redactor.tree(value) for",
        new="cleaned = {key: value for",
        tests=("test_engine.py::test_an_event_is_stored_without_secrets",),
    ),
    Mutant(
        name="redactor left out of servers' answers",
        old="body = self.redactor.body(body, is_data=response.is_success)",
        new="pass",
        tests=("test_http.py::test_an_echoed_key_is_masked",),
    ),
    Mutant(
        name="redactor left out of servers' headers",
        old="headers = {name: self.redactor.text(value) for name, value in told.items()}",
        new="headers = told",
        tests=("test_http.py::test_an_echoed_key_is_masked_in_headers",),
    ),
    Mutant(
        name="redactor forgets after a reload",
        old="known = set(self._longest_first)",
        new="known = set()",
        tests=("test_secrets.py::test_redactor_never_forgets",),
    ),
    Mutant(
        name="a Secret prints itself",
        old='return "Secret(***)"',
        new='return f"Secret({self._value})"',
        tests=("test_secrets.py::test_a_secret_does_not_print",),
    ),
    Mutant(
        name="a key file that others can read is taken",
        old="if mode & stat.S_IRWXO:",
        new="if mode & stat.S_IWOTH:",
        tests=("test_secrets.py::test_key_file_open_to_others_is_refused",),
    ),
    Mutant(
        name="a plain token taken for an encrypted one",
        old='return self.bad(source.place, path, "is not encrypted", command)',
        new="return Secret(source.text.reveal())",
        tests=("test_secrets.py::test_plain_value",),
    ),
    Mutant(
        name="the token sent where the queue's address is asked for",
        old='index = await self._get(f"{self._stack_url}/v2/storage", {})',
        new='index = await self._get(f"{self._stack_url}/v2/storage", self._headers)',
        tests=("test_http.py::test_a_queue_by_the_stacks_index",),
    ),
    Mutant(
        name="the token sent to a queue without https",
        old="if url_problem(url) or is_loopback(url) > is_loopback(self._stack_url):",
        new="if is_loopback(url) > is_loopback(self._stack_url):",
        tests=("test_http.py::test_a_queue_that_is_refused",),
    ),
    # --- requests ---
    Mutant(
        name="body cap left out",
        old="if len(body) > MAX_BODY_BYTES or (",
        new="if (",
        tests=("test_http.py::test_the_body_is_capped_while_it_streams",),
    ),
    Mutant(
        name="cap on what is expanded left out",
        old="expander.decompress(chunk, MAX_BODY_BYTES)",
        new="expander.decompress(chunk)",
        tests=("test_http.py::test_a_bomb_is_not_expanded_first",),
    ),
    Mutant(
        name="deadline per read instead of per request",
        old=(
            "asyncio.timeout(timeout_s):\n"
            "                request = client.build_request(method, url, **parts)"
        ),
        new=(
            "asyncio.timeout(None):\n"
            '                parts["timeout"] = timeout_s\n'
            "                request = client.build_request(method, url, **parts)"
        ),
        tests=("test_http.py::test_a_drip_does_not_put_the_deadline_off",),
    ),
    Mutant(
        name="cancellation taken for a failure to retry",
        old="lambda e: isinstance(e, ApiError) and e.retryable)",
        new="lambda e: not isinstance(e, ApiError) or e.retryable)",
        tests=("test_http.py::test_cancellation_is_no_failure_to_retry",),
    ),
    # --- what webhooks are told ---
    Mutant(
        name="a message not committed with what it tells of",
        old="self.store.save(works, told, self.clock.wall(), mail)",
        new="self.store.save(works, told, self.clock.wall())",
        tests=("test_notify.py::test_what_was_not_told_is_told_after_a_kill",),
    ),
    Mutant(
        name="an alarm forgotten between two passes",
        old="self._alarms = store.alarms()",
        new="self._alarms: dict[Alarm, str | None] = {}",
        tests=("test_notify.py::test_once_tells_too",),
    ),
    Mutant(
        name="webhooks behind the gate of the jobs",
        old="teller = Teller(engine, Http(Teller.limits(setup.config.limits), redactor, clock))",
        new="teller = Teller(engine, http)",
        tests=("test_notify.py::test_a_dead_webhook_delays_nothing",),
    ),
    Mutant(
        name="each try told as a failure of its own",
        old="    if alarm and (alarm, subject) not in standing:",
        new="    if alarm:",
        tests=("test_notify.py::test_what_a_change_is_told_as",),
    ),
    Mutant(
        name="a message kept for ever",
        old="if is_tried and now - n.at > NOTICE_LIFE_S]",
        new="if is_tried and now - n.at > 1000 * NOTICE_LIFE_S]",
        tests=("test_notify.py::test_a_day_is_enough",),
    ),
    # --- what is published ---
    Mutant(
        name="a text on the page not escaped",
        old="return html.escape(str(text), quote=True)",
        new="return str(text)",
        tests=("test_publish.py::test_every_text_is_escaped",),
    ),
    Mutant(
        name="a quote on the page not escaped",
        old="return html.escape(str(text), quote=True)",
        new="return html.escape(str(text), quote=False)",
        tests=("test_publish.py::test_a_link_stays_in_its_attribute",),
    ),
    Mutant(
        name="any address made a link",
        old='if not (trigger.url and trigger.url.startswith(("https://", "http://"))):',
        new="if not trigger.url:",
        tests=("test_publish.py::test_only_web_addresses_are_links",),
    ),
    Mutant(
        name="a published file written in its place",
        old="    new = directory / new_name(name)\n",
        new="    new = directory / name\n",
        tests=("test_publish.py::test_a_reader_never_sees_a_part",),
    ),
    Mutant(
        name="a stale page does not know itself",
        old="url={other}?{own}#{own}",
        new="url={other}?{own}",
        tests=("test_publish.py::test_the_head",),
    ),
    Mutant(
        name="a stale page stays stale for ever",
        old="other = AGAIN_FILE if name == PAGE_FILE else PAGE_FILE",
        new="other = name",
        tests=("test_publish.py::test_the_head",),
    ),
    Mutant(
        name="files grow old where publishing takes long",
        old="pause_s = min(HEARTBEAT_S, max(",
        new="pause_s = max(HEARTBEAT_S, max(",
        tests=("test_publish.py::test_files_are_written_though_nothing_changes",),
    ),
    Mutant(
        name="a bug in publishing ends the daemon",
        old="        except Exception as error:  # noqa: BLE001 - a bug here must",
        new="        except RuntimeError as error:  # a bug here must",
        tests=("test_publish.py::test_trouble_is_told_once",),
    ),
    # --- the config, while it runs ---
    Mutant(
        name="config swapped before decrypting",
        old=("        try:\n            setup = await asyncio.to_thread("),
        new=(
            "        draft = read_draft(self._path, files)\n"
            "        engine.setup = replace(engine.setup, config=draft.config)\n"
            "        try:\n"
            "            setup = await asyncio.to_thread("
        ),
        tests=("test_engine.py::test_a_bad_config_changes_nothing",),
    ),
    Mutant(
        name="bad config swapped in",
        old=("event)\n            return\n        engine.apply(setup)\n"),
        new=(
            "event)\n"
            "            draft = read_draft(self._path, files)\n"
            "            setup = replace(engine.setup, config=draft.config)\n"
            "        engine.apply(setup)\n"
        ),
        tests=("test_engine.py::test_a_bad_config_changes_nothing",),
    ),
    Mutant(
        name="another state file taken while running",
        old="            refuse_other_state(engine.setup.config, setup.config)\n",
        new="",
        tests=("test_reload.py::test_state_stays",),
    ),
    Mutant(
        name="a look's answer recorded for what a reload has changed",
        old="for watch in watches if self._is_mine(watch)]",
        new="for watch in watches]",
        tests=("test_engine.py::test_a_look_at_a_job_that_was_paused_meanwhile_says_nothing",),
    ),
    # --- looks and pages ---
    Mutant(
        name="a held account taken for a list that is gone",
        old="return ApiError(self._held_for, status=429, retry_after_s=left_s, sent=False)",
        new="return ApiError(self._held_for, status=429, retry_after_s=left_s)",
        tests=("test_looks.py::test_a_hold_amid_the_pages_says_nothing_about_the_list",),
    ),
    Mutant(
        name="a limited page told as no list",
        old="if error.status != 429:  # which",
        new="if True:  # which",
        tests=("test_looks.py::test_what_may_pass_is_no_absence",),
    ),
    Mutant(
        name="a page that may come in a moment taken for absent",
        old="is_absent = error.status is not None and not error.retryable",
        new="is_absent = error.status is not None",
        tests=("test_looks.py::test_what_may_pass_is_no_absence",),
    ),
    Mutant(
        name="the list of a silent account read",
        old="is_ill = self._client.is_silent or self._client.refusal() is not None",
        new="is_ill = self._client.refusal() is not None",
        tests=("test_looks.py::test_a_silent_account_says_nothing_about_its_list",),
    ),
    Mutant(
        name="an older answer recorded over a newer one",
        old="if came_at > asked_at:",
        new="if False:",
        tests=("test_looks.py::test_an_answer_that_was_overtaken_by_a_page",),
    ),
    Mutant(
        name="an older page recorded over a newer answer",
        old="self._hear(key, page.batches[key], asked_at)",
        new="self._hear(key, page.batches[key], math.inf)",
        tests=("test_looks.py::test_a_page_that_was_overtaken_by_answers",),
    ),
    Mutant(
        name="known pages asked for after one has failed",
        old="                    look.is_broken = True\n",
        new="                    pass\n",
        tests=("test_looks.py::test_a_list_that_breaks_takes_no_request_more",),
    ),
    Mutant(
        name="a page asked for twice",
        old="return await self._in_turn(attempt, Budget(self._clock), is_page=True)",
        new="turn = functools.partial(self._in_turn, attempt, is_page=True)\n"
        "        return await with_retries(turn, self._clock)",
        tests=("test_looks.py::test_a_list_that_breaks_takes_no_request_more",),
    ),
    Mutant(
        name="a list that refuses every cursor believed in",
        old="self._is_in_doubt = not look.pages",
        new="pass",
        tests=("test_looks.py::test_no_list_is_noticed_after_a_restart",),
    ),
    Mutant(
        name="a work that a page has shown kept busy",
        old="self._free(other, other.whole(theirs))",
        new="pass",
        tests=("test_looks.py::test_what_another_look_has_shown_is_free",),
    ),
    Mutant(
        name="what was left out forgotten",
        old="self._left_out -= look.due.keys() - left_out",
        new="self._left_out.clear()",
        tests=("test_looks.py::test_what_was_left_out_comes_first_whatever_else_is_looked_at",),
    ),
    Mutant(
        name="batches asked for after SIGTERM",
        old="        for poller in self._pollers.values():\n            poller.stop()\n",
        new="",
        tests=("test_engine.py::test_no_batch_is_asked_for_after_sigterm",),
    ),
    Mutant(
        name="batches asked for with a key that is gone",
        old="self._pollers.pop(account).stop()",
        new="self._pollers.pop(account).take(())",
        tests=("test_engine.py::test_a_key_that_is_gone_is_not_used",),
    ),
    Mutant(
        name="each pass of --once reads pages in vain",
        old="return bool(0 <= self._engine.clock.wall() - at < rest_s)",
        new="return False",
        tests=("test_looks.py::test_passes_learn_that_there_is_no_list",),
    ),
    Mutant(
        name="--once leaves out what decides",
        old="left = [batch for batch in look.missing() if self._matters(batch.id, look)]",
        new="left: list[Batch] = []",
        tests=("test_looks.py::test_passes_learn_that_there_is_no_list",),
    ),
    Mutant(
        name="a work that was paused looked at twice at a time",
        old="        self._watches = {watch.work.id: watch for watch in polled}\n",
        new="        self._watches = {watch.work.id: watch for watch in polled}\n"
        "        self._busy.intersection_update(polled)\n",
        tests=("test_looks.py::test_paused_and_unpaused_there_is_one_look",),
    ),
    Mutant(
        name="more pages risked than batches can wait",
        old="self.saved + min(self.risk, len(self.due) - self.found)",
        new="self.saved + self.risk",
        tests=("test_chart.py::test_what_a_page_saves",),
    ),
    Mutant(
        name="a slow list explored to its end",
        old="return self._engine.clock.mono() > look.explores_until",
        new="return False",
        tests=("test_looks.py::test_a_slow_list_holds_nobody_up_for_long",),
    ),
    # --- what nobody has thought of ---
    Mutant(
        name="a bug met again and again without a pause",
        old="                watch.due = mono + MINUTE_S\n",
        new="                pass\n",
        tests=("test_engine.py::test_a_bug_that_one_job_meets_is_not_the_others",),
    ),
    Mutant(
        name="an unknown key taken",
        old="            if name not in names:\n",
        new="            if False:\n",
        tests=("test_config.py::test_bad_file_gives_exactly_its_messages",),
    ),
    Mutant(
        name="of a key that stands twice the last one taken",
        old="elif key.value in own:",
        new="elif False:",
        tests=("test_config.py::test_bad_file_gives_exactly_its_messages",),
    ),
    Mutant(
        name="nesting without end composed",
        old="if len(self._open) > MAX_DEPTH:",
        new="if False:",
        tests=("test_config.py::test_thirty_thousand_levels_do_not_crash_the_process",),
    ),
    # --- commands ---
    Mutant(
        name="import has finished jobs run again",
        old='            return {"done": True}\n',
        new="            return {}\n",
        tests=("test_import.py::test_one_pass_starts_only_what_was_active",),
    ),
    Mutant(
        name="doctor finds ills and exits 0",
        old="self.is_ill = self.is_ill or not is_right",
        new="self.is_ill = False",
        tests=("test_doctor.py::test_it_finds",),
    ),
    Mutant(
        name="doctor looks at what is over",
        old="if not job.done and (job.name, batch_key(job.batch_ids)) not in self._finished",
        new="if not job.done",
        tests=("test_doctor.py::test_what_is_over_is_not_looked_at",),
    ),
    Mutant(
        name="what is typed for encrypt --set is shown",
        old='return getpass.getpass(f"{name}: ")',
        new='return input(f"{name}: ")',
        tests=("test_encrypt_set.py::test_hidden_on_a_terminal",),
    ),
    Mutant(
        name="encrypt --set changes another secret with it",
        old="if raw_values(text, path) != wanted:",
        new="if raw_values(text, path).get(name) != token:",
        tests=("test_encrypt_set.py::test_refused",),
    ),
    Mutant(
        name="a full disk below the output is a traceback",
        old="if args.run is run_daemon:",
        new="if args.run:",
        tests=("test_terminal.py::test_a_full_disk_below_the_output",),
    ),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What pytest came to: its exit code (None: none in time), the first failure, all it said."""

    code: int | None
    failed: str
    seconds: float
    output: str


def mutated(mutant: Mutant, text: str) -> str:
    """Return the program with the breakage. Raises TableError where it fits nowhere or twice."""
    count = text.count(mutant.old)
    if count != 1:
        raise TableError(f"{mutant.name}: its old text stands {count} times in {PROGRAM}, not once")
    return text.replace(mutant.old, mutant.new)


@contextmanager
def project_copy() -> Iterator[Path]:
    """Yield a copy of what the tests need; it and all that they write go at the end."""
    with tempfile.TemporaryDirectory(prefix="tecko-mutant-") as name:
        copy = Path(name)
        copy.chmod(0o755)  # some tests run the program as another user
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, copy / part)
        yield copy


def run_tests(copy: Path, tests: Iterable[str], timeout_s: float) -> Run:
    """Run some tests there, up to the first failure."""
    chosen = [f"tests/{test}" for test in tests]
    options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}"]
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *chosen],
        cwd=copy,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that whatever the tests have started can be ended with them
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if code is None:
            output, _ = process.communicate()
    first = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)
    return Run(code, first[1] if first else "", time.monotonic() - started, output)


def try_out(mutant: Mutant, text: str) -> Run:
    """Make one breakage and let its tests meet it."""
    with project_copy() as copy:
        (copy / PROGRAM).write_text(mutated(mutant, text), encoding="utf-8")
        return run_tests(copy, mutant.tests, TIMEOUT_S)


def verdict(run: Run) -> str:
    """Return what a run says of its breakage. Raises TableError where nothing was tested."""
    took = f"in {run.seconds:.1f} s"
    if run.code is None:
        return f"caught: hung, ended {took}"
    if run.code < 0:
        return f"caught: {signal.Signals(-run.code).name} {took}"
    if run.code == PASSED:
        return f"SURVIVED {took}"
    if run.code == FAILED:
        return f"caught by {run.failed} {took}"
    raise TableError(f"pytest exited {run.code}, which tests nothing:\n{run.output}")


def check_unbroken(mutants: Sequence[Mutant]) -> None:
    """Run the tests of all breakages without any. Raises TableError unless they pass."""
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    with project_copy() as copy:
        run = run_tests(copy, tests, BASELINE_TIMEOUT_S)
    if run.code != PASSED:
        raise TableError(f"the tests do not pass without any breakage:\n{run.output}")
    print(f"unbroken: all pass in {run.seconds:.1f} s", flush=True)


def try_all(mutants: Sequence[Mutant], *, jobs: int, verbose: bool) -> list[str]:
    """Try the breakages, some at a time, tell of each; returns the names of the survivors."""
    text = (ROOT / PROGRAM).read_text(encoding="utf-8")
    for mutant in mutants:
        mutated(mutant, text)  # before the first minute is spent
    check_unbroken(mutants)
    survivors = []
    width = max(len(mutant.name) for mutant in mutants)
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(try_out, mutant, text): mutant for mutant in mutants}
        try:
            for done in as_completed(runs):
                mutant, run = runs[done], done.result()
                print(f"{mutant.name:<{width}}  {verdict(run)}", flush=True)
                if verbose:
                    print(run.output)
                if run.code == PASSED:
                    survivors.append(mutant.name)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return survivors


def chosen(words: Sequence[str]) -> list[Mutant]:
    """Return the breakages that have one of the words in their names; without words, all."""
    found = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not found:
        raise TableError(f"no name has {' or '.join(words)} in it; see --list")
    return found


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of a breakage's name")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at a time")
    parser.add_argument("--list", action="store_true", help="list the breakages")
    parser.add_argument("--verbose", action="store_true", help="show what the tests said")
    args = parser.parse_args()
    started = time.monotonic()
    try:
        mutants = chosen(args.names)
        if args.list:
            print(*(mutant.name for mutant in mutants), sep="\n")
            return 0
        survivors = try_all(mutants, jobs=args.jobs, verbose=args.verbose)
    except TableError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    caught = len(mutants) - len(survivors)
    print(f"{caught} of {len(mutants)} caught, in {time.monotonic() - started:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
