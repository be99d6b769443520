"""Empties the journal: posts kept results until Antenna has accepted them or they are useless, and sees jobs end.

Decides how results are grouped and when they are tried again; how a post travels is the client's business.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Protocol

from adc_worker.antenna.leases import lease_clock
from adc_worker.antenna.wire import (
    DELETED,
    FINAL_STATES,
    SERVED_STATES,
    JobState,
    PostEntry,
    Task,
    error_result,
    is_error_result,
)
from adc_worker.errors import (
    AntennaBodyTooLarge,
    AntennaError,
    AntennaRefused,
    AntennaRejected,
    AntennaUnavailable,
    ResultGone,
)
from adc_worker.journal.journal import HeldTask, Journal
from adc_worker.log import get_logger

_log = get_logger(__name__)

RESULTS_PER_POST = 50
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
TICK_S = 1.0
UNPROVEN_PAUSE_S = 30.0  # chosen: until results whose subjects could not be proved are looked at again
# After its last accepted result a job is looked at, then looked at with a repeat, at ever longer intervals. Antenna
# takes 0.3-0.9 s to save a result (docs/antenna.md, "Returning results").
LOOK_FIRST_S, LOOK_FACTOR = 0.5, 10.0
LOOKS = 2  # until a job that is not over was tried to be ended
# A result that cannot be posted by itself is tried again ever less often: it may be many megabytes.
HOLD_BACK_FACTOR = 8  # the first pause, in pauses of a job
HOLD_BACK_MAX_S = 300.0
_ENVELOPE_BYTES = 10_000  # what stands around one result in a post, rounded up
_JOB_UNKNOWN = 404
_INVALID = 400


class ResultReceiver(Protocol):
    """Where results go. A post returns the reply subjects of those that were accepted."""

    def post_results(self, job_id: int, entries: Sequence[PostEntry]) -> Collection[str]: ...
    def job(self, job_id: int) -> JobState: ...
    def fetch_tasks(self, job_id: int, count: int) -> list[Task]: ...


@dataclass(frozen=True, slots=True)
class PosterLimits:
    """How many posts are under way at once, and how large one may be."""

    pending_posts: int
    post_bytes: int


@dataclass(slots=True)
class _Retry:
    """A job whose posts fail: one of them is tried at `at`, the others wait. Or a result that fails by itself."""

    at: float
    backoff_s: float
    job_id: int


@dataclass(frozen=True, slots=True)
class _Unproven:
    """A kept result whose subject may be that of an earlier run of its job; it is looked at again at `until`."""

    job_id: int
    until: float


@dataclass(slots=True)
class _Ending:
    """A job whose results are all accepted, as far as they are ours."""

    look_at: float
    looks: int = 0


_FLUSH_CHECK_S = 0.5


class Poster:
    """Posts kept results in the background."""

    def __init__(
        self,
        journal: Journal,
        receiver: ResultReceiver,
        limits: PosterLimits,
        first_backoff_s: float = BACKOFF_FIRST_S,
        pipelines: Collection[str] | None = None,
    ) -> None:
        """Post with `limits`; tasks are fetched as a proof for jobs of `pipelines` only, by default for any job."""
        self._journal = journal
        self._receiver = receiver
        self._limits = limits
        self._first_backoff_s = first_backoff_s
        self._changed = threading.Condition()
        self._posting: set[int] = set()
        self._under_way: Counter[int] = Counter()  # by job
        self._retries: dict[int, _Retry] = {}  # by job
        self._held_back: dict[int, _Retry] = {}  # by task: results that the others of their job do not wait for
        self._refusals: dict[int, AntennaRefused] = {}  # by job, of its last post
        self._endings = {job_id: _Ending(0.0) for job_id in journal.finished_jobs()}
        self._pipelines = pipelines
        self._jobs_of_other_pipelines: set[int] = set()
        self._unproven: dict[int, _Unproven] = {}  # by task
        self._has_news = False  # something was kept or fetched: that may prove some of them
        self._proof_fetched_at: dict[int, float] = {}  # by job
        self._draining = False
        self._closing = False
        self.accepted: Counter[int] = Counter()  # results by job
        self._threads = [
            threading.Thread(target=self._run, name=f"post {number}", daemon=True)
            for number in range(limits.pending_posts)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def jobs_ended(self) -> bool:
        """Whether every job whose results are accepted was seen to be over, or had one of them repeated."""
        with self._changed:
            waits_for_nothing = self._held_back_jobs() | self._refusals.keys()
            endings = self._endings.items()
            return all(ending.looks >= LOOKS for job_id, ending in endings if job_id not in waits_for_nothing)

    def refuses(self, job_id: int) -> bool:
        """Whether results wait because Antenna refused them: this job's, or any job's for the sake of the token.

        What is fetched for the job now could not be posted. It ends when a post is answered otherwise, which is tried
        again and again, or when nothing waits any more.
        """
        refusals = self._refusals_that_last()
        return job_id in refusals or any(error.concerns_token for error in refusals.values())

    def refused_jobs(self) -> frozenset[int]:
        """Return the jobs whose results Antenna refuses although it accepts the token."""
        refusals = self._refusals_that_last()
        return frozenset(job_id for job_id, error in refusals.items() if not error.concerns_token)

    def held_back_jobs(self) -> frozenset[int]:
        """Return the jobs of which nothing is on record but results that could not be posted and are tried again."""
        with self._changed:
            return self._held_back_jobs()

    def _held_back_jobs(self) -> frozenset[int]:
        jobs = {retry.job_id for retry in self._held_back.values()}
        return frozenset(job_id for job_id in jobs if not self._journal.held_count(job_id, self._held_back))

    def _refusals_that_last(self) -> dict[int, AntennaRefused]:
        with self._changed:
            for job_id in list(self._refusals):
                if not self._under_way[job_id] and not self._journal.held_count(job_id):
                    del self._refusals[job_id]  # nothing of it is left to be tried
            return dict(self._refusals)

    def is_done(self, besides: Collection[int] = (), tried_until: float = float("inf")) -> bool:
        """Whether every result that may be posted is accepted, those of the jobs `besides` left out.

        Results whose stream is not proved may not be posted. Those that are held back, and that are not tried again
        until `tried_until` (monotonic seconds), are left out, too.
        """
        with self._changed:
            if any(count for job_id, count in self._under_way.items() if job_id not in besides):
                return False
            left_out = self._unproven.keys() | self._not_due(tried_until)
            return not self._journal.unposted(left_out, 1, self._limits.post_bytes, besides)

    def wake(self) -> None:
        """Tell the poster that there may be more to post: results were kept, or tasks were fetched."""
        with self._changed:
            self._has_news = True  # what follows is done by the poster's own threads: others must not wait for it
            self._changed.notify_all()

    def _heed_news(self) -> None:
        """Let results go on whose subjects are proved by what was fetched meanwhile."""
        if not self._has_news:
            return
        self._has_news = False
        for job_id in {one.job_id for one in self._unproven.values()}:
            for task_id in self._journal.live_ids(job_id):
                self._unproven.pop(task_id, None)

    def wait_idle(self, timeout_s: float, cut_short: threading.Event | None = None) -> bool:
        """Wait until every result that may be posted is accepted; False on time-out, or when `cut_short` is set."""
        return self._wait_until(self.is_done, timeout_s, cut_short)

    def _wait_until(self, done: Callable[[], bool], timeout_s: float, cut_short: threading.Event | None) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not done():
                left = deadline - time.monotonic()
                if left <= 0 or (cut_short and cut_short.is_set()):
                    return False
                self._changed.wait(min(left, _FLUSH_CHECK_S))
        return True

    def close(self, flush_s: float, cut_short: threading.Event | None = None) -> None:
        """Post what is kept for up to `flush_s` seconds, or until `cut_short`; the rest stays in the journal.

        What Antenna refuses is not waited for, nor is a result that is held back until later than that.
        """
        self._draining = True
        flushed_until = time.monotonic() + flush_s
        self._wait_until(lambda: self.is_done(self.refused_jobs(), flushed_until), flush_s, cut_short)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while work := self._next_work():
            work()

    def _next_work(self) -> Callable[[], None] | None:
        """Wait for something to do, and claim it; None when closing."""
        with self._changed:
            while not self._closing:
                self._journal.check_writable()
                work = self._claim_group() or self._claim_ending()
                if work is not None:
                    return work
                now = time.monotonic()
                retries = [*self._retries.values(), *self._held_back.values()]
                due = [retry.at - now for retry in retries if retry.at > now]
                self._changed.wait(min([TICK_S, *due]))
        return None

    def _claim_group(self) -> Callable[[], None] | None:
        """Claim one post's worth of one job's results."""
        now = time.monotonic()
        waiting = [job for job, retry in self._retries.items() if retry.at > now or self._under_way[job]]
        self._heed_news()
        self._unproven = {task_id: one for task_id, one in self._unproven.items() if one.until > now}
        self._drop_old_holds(now)
        not_now = self._posting | self._not_due(now) | self._unproven.keys()
        results = self._journal.unposted(not_now, RESULTS_PER_POST, self._limits.post_bytes, waiting)
        if not results:
            return None
        job_id = results[0].job_id
        group = list(takewhile(lambda kept: kept.job_id == job_id, results))
        self._posting.update(kept.id for kept in group)
        self._under_way[job_id] += 1
        return partial(self._work_on, job_id, partial(self._post, job_id, group), group)

    def _drop_old_holds(self, now: float) -> None:
        """Forget the holds of results that nobody tries any more: their jobs ended meanwhile."""
        for task_id, retry in list(self._held_back.items()):
            if now > retry.at + HOLD_BACK_MAX_S:
                del self._held_back[task_id]

    def _not_due(self, now: float) -> set[int]:
        """Return the results that are held back until later than `now`."""
        return {task_id for task_id, retry in self._held_back.items() if retry.at > now}

    def _claim_ending(self) -> Callable[[], None] | None:
        now = time.monotonic()
        for job_id, ending in list(self._endings.items()):
            retry = self._retries.get(job_id)
            if ending.look_at <= now and not self._under_way[job_id] and not (retry and retry.at > now):
                if self._journal.held_count(job_id) and job_id not in self._jobs_of_other_pipelines:
                    ending.look_at = now + TICK_S
                    continue
                if job_id in self._journal.jobs_of_others():
                    del self._endings[job_id]  # whoever is at it ends it; a task taken here would wait for nobody
                    continue
                self._under_way[job_id] += 1
                return partial(self._work_on, job_id, partial(self._see_end, job_id, ending))
        return None

    def _work_on(self, job_id: int, work: Callable[[], None], group: Sequence[HeldTask] = ()) -> None:
        try:
            work()
            with self._changed:
                self._retries.pop(job_id, None)
        except AntennaError as error:
            self._back_off(job_id, error)
        finally:
            with self._changed:
                self._posting.difference_update(kept.id for kept in group)
                self._under_way[job_id] -= 1
                self._changed.notify_all()

    def _note_answer(self, job_id: int) -> None:
        """A post of the job was answered, and not refused: neither the job nor the token is refused any more.

        Nothing else shows that: no outage, no detail of a job, and no results that were not posted for want of a proof.
        """
        with self._changed:
            self._refusals.pop(job_id, None)
            of_the_token = [other for other, error in self._refusals.items() if error.concerns_token]
            for other in of_the_token:
                del self._refusals[other]

    def _back_off(self, job_id: int, error: AntennaError) -> None:
        now = time.monotonic()
        with self._changed:
            if isinstance(error, AntennaRefused):
                self._refusals[job_id] = error
            retry = self._retries.get(job_id)
            if retry is not None and retry.at > now:
                return  # it was under way beside one that failed just before
            backoff_s = min(2 * retry.backoff_s, BACKOFF_MAX_S) if retry else self._first_backoff_s
            # Jitter: after an outage a fleet must not come back in step.
            self._retries[job_id] = _Retry(now + backoff_s * random.uniform(0.5, 1.0), backoff_s, job_id)  # noqa: S311 (no secret)
        _log.warning("post_failed", job_id=job_id, error=f"{error}{_hint(error)}", retry_in_s=round(backoff_s, 1))

    def _post(self, job_id: int, group: Sequence[HeldTask]) -> None:
        group = [kept for kept in group if self._journal.is_live(kept)] or self._prove(job_id, group)
        if not group:
            return
        try:
            accepted = self._receiver.post_results(job_id, [self._entry(kept) for kept in group])
        except ResultGone as error:
            _log.warning("post_broken_off", job_id=job_id, error=str(error), effect="the others of it are posted again")
        except AntennaRejected as error:
            self._note_answer(job_id)
            self._heed_rejection(job_id, group, error)
        else:
            self._note_answer(job_id)
            self._heed_acceptance(job_id, group, accepted)

    def _heed_acceptance(self, job_id: int, group: Sequence[HeldTask], accepted: Collection[str]) -> None:
        """Mark the results that Antenna's answer names; the others stay kept, and are posted again."""
        taken = [kept for kept in group if kept.task.reply_subject in accepted]
        left = [kept for kept in group if kept.task.reply_subject not in accepted]
        if not taken:
            raise AntennaUnavailable(f"job {job_id}: Antenna's answer names none of {len(group)} posted results")
        with self._changed:
            self.accepted[job_id] += len(taken)
        self._journal.settle([kept.id for kept in taken])
        with self._changed:
            self._endings[job_id] = _Ending(time.monotonic() + LOOK_FIRST_S)
            for kept in taken:
                self._held_back.pop(kept.id, None)
        for kept in left:
            self._hold_back(
                kept, "Antenna's answer to the post does not name it", "look at Antenna's log if this goes on"
            )

    def _look(self, job_id: int) -> JobState:
        """Ask for the job. In which run it is proves which subjects on record are of that run."""
        asked_at = lease_clock()
        state = self._receiver.job(job_id)
        self._journal.note_served(job_id, state.incarnation, asked_at)
        if self._pipelines is not None and state.pipeline_slug not in self._pipelines:
            self._jobs_of_other_pipelines.add(job_id)
        else:
            self._jobs_of_other_pipelines.discard(job_id)
        return state

    def _fetch_one(self, job_id: int) -> list[Task]:
        sent_at = lease_clock()
        tasks = self._receiver.fetch_tasks(job_id, 1)
        self._journal.record(job_id, tasks, sent_at)
        return tasks

    def _may_fetch(self, job_id: int) -> bool:
        """Whether a task may be taken: while nobody here works on it, its lease would be spent for nothing."""
        if self._draining or job_id in self._jobs_of_other_pipelines:
            return False
        return self._journal.check_writable()

    def _may_fetch_proof(self, job_id: int) -> bool:
        """Whether a task may be taken as a proof now: one at a time, and none while tasks of the job are worked on."""
        if not self._may_fetch(job_id) or self._journal.unfinished(job_id):
            return False
        now = time.monotonic()
        with self._changed:
            if now - self._proof_fetched_at.get(job_id, float("-inf")) < UNPROVEN_PAUSE_S:
                return False
            self._proof_fetched_at[job_id] = now
        return True

    def _prove(self, job_id: int, group: Sequence[HeldTask]) -> list[HeldTask]:
        """After a silence: return those results whose subjects are of the job's present run, and hold back the others.

        The run that Antenna names proves it at no cost. Where that is not the run that was on record, one task is
        fetched: its place in the stream may prove it, or that the subjects are dead.
        """
        asked_at = lease_clock()
        state = self._look(job_id)
        if state.is_lost and state.status != DELETED:  # that one takes a second answer
            self._retire(job_id, asked_at)
        if state.is_lost or not state.is_served:
            raise AntennaUnavailable(f"job {job_id} is {state.status}: nothing is posted to it")
        if not any(self._journal.is_live(kept) for kept in group) and self._may_fetch_proof(job_id):
            self._fetch_one(job_id)
        # A task that came may have retired some of them, or brought them a new subject.
        still_kept = [kept for one in group if (kept := self._journal.held(one.id)) and kept.result_bytes is not None]
        live = [kept for kept in still_kept if self._journal.is_live(kept)]
        doubtful = [kept.id for kept in still_kept if kept not in live]
        if doubtful:
            with self._changed:
                self._unproven.update(dict.fromkeys(doubtful, _Unproven(job_id, time.monotonic() + UNPROVEN_PAUSE_S)))
            _log.warning(
                "results_held_back",
                job_id=job_id,
                results=len(doubtful),
                reason="the job may have been started anew since they were fetched: posted now, they could acknowledge"
                " other images",
                next="they are posted when their images come again, or when their run is seen to go on",
            )
        return live

    def _see_end(self, job_id: int, ending: _Ending) -> None:
        """Close the job if it is over; if it stays open repeat a result, which ends it where Antenna lost count.

        Two results of a job's end that are saved at the same instant can leave it STARTED for ever (docs/antenna.md,
        "Returning results").
        """
        try:
            self._look_at_end(job_id, ending)
        except (AntennaRefused, AntennaRejected):
            self._look_later(ending)  # what Antenna will not tell is not waited for
            raise

    def _look_later(self, ending: _Ending) -> None:
        ending.looks += 1
        ending.look_at = time.monotonic() + LOOK_FIRST_S * LOOK_FACTOR ** min(ending.looks, LOOKS)

    def _look_at_end(self, job_id: int, ending: _Ending) -> None:
        status = self._look(job_id).status
        if status in FINAL_STATES or status == DELETED:
            if status != "REVOKED":  # a retry asks for the same images
                self._journal.close_job(job_id)
            with self._changed:
                self._endings.pop(job_id, None)
            return
        if ending.looks and status in SERVED_STATES and not self._draining:
            self._repeat_result(job_id, status)
        self._look_later(ending)

    def _repeat_result(self, job_id: int, status: str) -> None:
        """Post an accepted result again, if no task of the job is left and its subject is proved to be good."""
        tasks_left = bool(self._journal.held_count(job_id))
        if self._may_fetch(job_id):
            tasks_left = bool(self._fetch_one(job_id))
        entry = None if tasks_left else self._journal.newest_accepted(job_id)
        if entry is None:
            return
        if entry.reply_subject not in self._receiver.post_results(job_id, [entry]):
            raise AntennaUnavailable(f"job {job_id}: Antenna's answer does not name the result posted again")
        _log.info("result_repeated", job_id=job_id, reason=f"the job stays {status} with all results accepted")

    def _retire(self, job_id: int, asked_at: float) -> None:
        """The job takes nothing any more: no subject of it is used; its results stay for images that come again."""
        self._journal.bury(job_id, asked_at)
        with self._changed:
            self._endings[job_id] = _Ending(0.0)

    def _heed_rejection(self, job_id: int, group: Sequence[HeldTask], error: AntennaRejected) -> None:
        """Do what follows from an answer that calls a post wrong. Others than these tell about the way to Antenna."""
        if error.status == _JOB_UNKNOWN:
            self._confirm_job_is_gone(job_id, group, error)
        elif error.status == _INVALID or isinstance(error, AntennaBodyTooLarge):
            if len(group) > 1:
                self._post_apart(job_id, group, error)
            else:
                self._heed_rejection_of_one(group[0], error)
        else:
            raise error

    def _confirm_job_is_gone(self, job_id: int, group: Sequence[HeldTask], error: AntennaRejected) -> None:
        """One answer does not end a job: its detail must be unknown to Antenna, too."""
        asked_at = lease_clock()
        state = self._look(job_id)
        if state.status != DELETED:
            raise AntennaUnavailable(f"{error}; yet Antenna shows the job as {state.status}") from error
        reason = f"{error}; its detail is unknown, too"
        _log.warning("results_useless", job_id=job_id, results=len(group), reason=reason)
        self._retire(job_id, asked_at)

    def _post_apart(self, job_id: int, group: Sequence[HeldTask], error: AntennaRejected) -> None:
        """Post the results that Antenna names as invalid one by one and the others together; in halves else."""
        named = [kept for place, kept in enumerate(group) if place in error.entries]
        others = [kept for place, kept in enumerate(group) if place not in error.entries]
        if named and others:
            parts = [others, *([kept] for kept in named)]
        else:
            middle = len(group) // 2
            parts = [list(group[:middle]), list(group[middle:])]
        for part in parts:
            self._post(job_id, part)

    def _heed_rejection_of_one(self, kept: HeldTask, error: AntennaRejected) -> None:
        """Make an error of a result that Antenna itself calls invalid; hold back what only the way does not take."""
        if isinstance(error, AntennaBodyTooLarge):
            size_bytes = kept.result_bytes or 0
            do = (
                f"let the proxy before Antenna take request bodies of {size_bytes + _ENVELOPE_BYTES} bytes"
                " (nginx: client_max_body_size)"
            )
            self._hold_back(kept, f"{error}; the result has {size_bytes} bytes", do)
            return
        if not error.blames_result or (error.entries and 0 not in error.entries):
            self._hold_back(kept, str(error), "look at what a proxy makes of posts, and at Antenna's log")
            return
        start = next(iter(self._journal.parts(kept.id)), None)
        if start is None:
            return  # the job was restarted meanwhile
        if is_error_result(start):
            _log.error("result_rejected", job_id=kept.job_id, error=str(error))
            self._journal.forget([kept.id])
        else:
            self._replace_with_error(kept, error)

    def _hold_back(self, kept: HeldTask, reason: str, do: str) -> None:
        """Keep a result that cannot be posted now, and try it again ever less often; others of its job go on."""
        with self._changed:
            before = self._held_back.get(kept.id)
            first_s = HOLD_BACK_FACTOR * self._first_backoff_s
            backoff_s = min(2 * before.backoff_s, HOLD_BACK_MAX_S) if before else first_s
            self._held_back[kept.id] = _Retry(time.monotonic() + backoff_s, backoff_s, kept.job_id)
        _log.error(
            "result_held_back",
            job_id=kept.job_id,
            image_id=kept.task.image_id,
            error=reason,
            do=do,
            retry_in_s=round(backoff_s, 1),
        )

    def _replace_with_error(self, kept: HeldTask, error: AntennaRejected) -> None:
        text = f"Antenna refused the result: {error}"
        _log.error("result_replaced_by_error", job_id=kept.job_id, image_id=kept.task.image_id, reason=text)
        body = error_result(kept.task.image_id, text)
        size_bytes = self._journal.keep([(kept.id, [body])], {kept.id: kept.task.image_id})
        self._post(kept.job_id, [replace(kept, result_bytes=size_bytes)])

    def _entry(self, kept: HeldTask) -> PostEntry:
        return PostEntry(kept.task.reply_subject, kept.result_bytes or 0, partial(self._whole_parts, kept))

    def _whole_parts(self, kept: HeldTask) -> Iterator[bytes]:
        """Return a result's parts; what is shorter than announced must not look like the end of a post."""
        size_bytes = 0
        for part in self._journal.parts(kept.id):
            size_bytes += len(part)
            yield part
        if size_bytes != kept.result_bytes:
            raise ResultGone(f"of the {kept.result_bytes} bytes of a result {size_bytes} are there")


def _hint(error: AntennaError) -> str:
    """Return what a refusal stops, and what to do about it."""
    if not isinstance(error, AntennaRefused):
        return ""
    if error.concerns_token:
        return "; nothing is fetched until Antenna accepts the token: check AMI_ANTENNA_API_AUTH_TOKEN"
    return (
        "; nothing of this job is fetched until Antenna accepts its results: check what the user of"
        " AMI_ANTENNA_API_AUTH_TOKEN may do in its project"
    )
