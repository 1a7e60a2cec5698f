"""Asking every endpoint again and again, each at its own pace, on a few threads; and keeping what they last said.

One thread sleeps until the next question is due; up to `MAX_WORKERS` others put the questions, so that endpoints that
hang until their timeout do not delay the rest. An endpoint is never asked by two at once.
"""

from __future__ import annotations

import heapq
import logging
import math
import queue
import threading
from collections.abc import Callable, Collection, Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.clock import Clock, Instant
from reconciler.observe.probe import Answer, Connection, OwnsListener, ProbeTarget
from reconciler.plan.observed import Probe

LOG = logging.getLogger(__name__)

MAX_WORKERS, IDLE_WORKERS = 16, 2
"""Two do on a healthy box, even where all endpoints are due at once. More exist while some hang, or many start."""
PATIENCE_S = 0.02
"""A question that has waited so long has one more worker begun: those that there are may all ask somebody who hangs."""
FIRST_PACE_S = 0.05
"""Pace at the beginning of a start: engines that load nothing are ready in 0.2 s."""
SLOWEST_START_PACE_S = 1.0
START_PACE_GROWTH = 0.05
"""While starting the pace is this part of the time waited so far: readiness is seen at most 5 % late."""
DRAIN_PACE_S = 0.25
"""Pace while draining: the end of the last request is what a stop waits for."""


class _Watch(Struct, eq=False):
    """One endpoint being asked. Its fields change under the prober's lock, its connection only with `asking` set."""

    target: ProbeTarget
    since: Instant
    due: float
    asking: bool = False
    dropped: bool = False
    again: bool = False
    """Asked for once more while a question was out."""
    probe: Probe | None = None
    counted: bool = False
    """The last answer told the requests in flight, or that there is no figure."""
    connection: Connection | None = None
    ticket: int = field(default=0)
    """Counts the heap entries made for it; only the newest is valid."""


class Prober:
    """Keeps asking the endpoints it was told to watch.

    `on_change` is called, on some thread of its own, when an answer differs materially: the first one, ready or not
    ready any more, misses reaching the target's limit, nothing in flight any more. `owns` guards against an answer from
    somebody else's server on the port.
    """

    def __init__(self, clock: Clock, on_change: Callable[[], None], *, owns: OwnsListener | None = None) -> None:
        self._clock = clock
        self._on_change = on_change
        self._owns = owns
        self._lock = threading.Condition()
        self._watches: dict[str, _Watch] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._tickets = 0
        self._work: queue.SimpleQueue[_Watch | None] = queue.SimpleQueue()
        self._workers = 0
        self._idle = 0  # workers without a question; below zero: questions without a worker
        self._scheduler: threading.Thread | None = None
        self._closed = False

    def watch(self, targets: Mapping[str, ProbeTarget]) -> None:
        """Ask exactly these from now on, by incarnation id; what is new at once, what is no longer named never again.

        Only incarnations verified to be alive belong here: a port outlives its process and may become another's.
        """
        dropped: list[_Watch] = []
        with self._lock:
            now = self._clock.now()
            for incarnation in [i for i in self._watches if i not in targets]:
                gone = self._watches.pop(incarnation)
                gone.dropped = True
                if not gone.asking:  # else its worker drops the connection
                    dropped.append(gone)
            for incarnation, target in targets.items():
                known = self._watches.get(incarnation)
                if known is None:
                    self._schedule(incarnation, self._watches.setdefault(incarnation, _Watch(target, now, now.mono)))
                elif known.target != target:
                    known.counted &= known.target.busy  # a count of an earlier drain is no count of this one
                    known.target = target
                    if not known.asking:  # else it is scheduled by the new target when the answer is there
                        known.due = min(known.due, now.mono + self._pace(known, now))
                        self._schedule(incarnation, known)
            if self._watches and self._scheduler is None and not self._closed:
                self._scheduler = threading.Thread(target=self._run_schedule, name="prober", daemon=True)
                self._scheduler.start()
        for watch in dropped:
            _disconnect(watch)

    def probe_now(self, incarnations: Collection[str]) -> None:
        """Ask these without waiting for their turn; unknown ids are ignored."""
        with self._lock:
            now = self._clock.now().mono
            for incarnation in incarnations:
                watch = self._watches.get(incarnation)
                if watch is None:
                    continue
                if watch.asking:
                    watch.again = True
                else:
                    watch.due = now
                    self._schedule(incarnation, watch)

    def results(self) -> dict[str, Probe]:
        """What each watched endpoint last said, by incarnation id; those not asked yet are left out.

        So is one whose requests in flight are to be counted and were not yet: its earlier answer, without a count,
        would look like that of an engine that cannot count, and a drain would end at once.
        """
        with self._lock:
            return {
                i: watch.probe
                for i, watch in self._watches.items()
                if watch.probe is not None and (watch.counted or not watch.target.busy)
            }

    def close(self) -> None:
        """Stop asking. Questions that are out end by their own timeouts; nobody waits for them."""
        self.watch({})
        with self._lock:
            self._closed = True
            for _ in range(self._workers):
                self._work.put(None)
            self._lock.notify()

    # ------------------------------------------------------------ pace

    def _pace(self, watch: _Watch, now: Instant) -> float:
        """Seconds until the next question."""
        interval_s = watch.target.interval_s
        if watch.target.busy:
            return min(interval_s, DRAIN_PACE_S)
        never_ready = watch.target.starting and (watch.probe is None or watch.probe.ready_since is None)
        if never_ready:
            waited = START_PACE_GROWTH * now.since(watch.since)
            return min(interval_s, max(FIRST_PACE_S, min(waited, SLOWEST_START_PACE_S)))
        return interval_s

    def _schedule(self, incarnation: str, watch: _Watch) -> None:
        self._tickets += 1
        watch.ticket = self._tickets
        heapq.heappush(self._heap, (watch.due, watch.ticket, incarnation))
        if self._heap[0][1] == watch.ticket:
            self._lock.notify()  # it is the next one now: the scheduler sleeps too long

    # ------------------------------------------------------------ threads

    def _run_schedule(self) -> None:
        with self._lock:
            while not self._closed:
                wait_s = self._heap[0][0] - self._clock.now().mono if self._heap else math.inf
                if wait_s > 0:
                    crowded = self._idle < 0 and self._workers < MAX_WORKERS
                    patience_s = min(wait_s, PATIENCE_S) if crowded else wait_s
                    notified = self._lock.wait(patience_s if patience_s < math.inf else None)
                    if crowded and not notified and self._idle < 0:
                        self._begin_worker()
                    continue
                _, ticket, incarnation = heapq.heappop(self._heap)
                watch = self._watches.get(incarnation)
                if watch is None or watch.ticket != ticket or watch.asking:
                    continue  # an older entry of one that was scheduled anew, or forgotten
                watch.asking = True
                self._idle -= 1
                if self._idle < 0 and self._workers < IDLE_WORKERS:
                    self._begin_worker()
                self._work.put(watch)

    def _begin_worker(self) -> None:
        self._workers += 1
        self._idle += 1
        threading.Thread(target=self._run_worker, name="probe", daemon=True).start()

    def _run_worker(self) -> None:
        while (watch := self._work.get()) is not None:
            target, asked = watch.target, self._clock.now()
            try:
                if watch.connection is None:
                    watch.connection = Connection(target, self._clock)
                answer = watch.connection.ask(target, self._owner_check(watch))
            except Exception as error:
                # a defect of ours must neither end the thread nor be taken for an answer of the endpoint
                LOG.exception("probe of %s failed", target.incarnation)
                answer = Answer(ready=None, detail=f"could not ask: {error!r}", counted=False)
            if self._keep(watch, target, asked, answer):
                try:
                    self._on_change()
                except Exception:
                    LOG.exception("nobody could be told of %s", target.incarnation)
            if self._is_one_too_many():
                return

    def _is_one_too_many(self) -> bool:
        """Whether this worker, which has just done its part, is to end."""
        with self._lock:
            if self._idle <= IDLE_WORKERS:
                return False
            self._idle -= 1
            self._workers -= 1
            return True

    def _owner_check(self, watch: _Watch) -> OwnsListener | None:
        """The check of the listener, for an answer that would make it ready: while it stays so, no other can listen."""
        return None if watch.probe is not None and watch.probe.ready else self._owns

    def _keep(self, watch: _Watch, target: ProbeTarget, asked: Instant, answer: Answer) -> bool:
        """Keep the answer and schedule the next question; whether it is a material change."""
        with self._lock:
            self._idle += 1
            watch.asking = False
            now = self._clock.now()
            before, had_counted = watch.probe, watch.counted
            watch.probe = after = next_probe(before, target, answer, asked)
            watch.counted = answer.counted
            if not watch.dropped:
                watch.due = now.mono if watch.again else now.mono + self._pace(watch, now)
                watch.again = False
                self._schedule(target.incarnation, watch)
                newly_counted = watch.target.busy and answer.counted and not had_counted
                return newly_counted or is_material(before, after, target)
        _disconnect(watch)
        return False


def next_probe(before: Probe | None, target: ProbeTarget, answer: Answer, asked: Instant) -> Probe:
    """What is known of an endpoint after one more answer, to a question put at `asked`.

    1. Could not be asked → `ready` None for now, the counts as they were.
    2. Ready → no misses; `ready_since` is when it became ready.
    3. Not ready → one miss more; `ready_since` stays until the misses reach the target's limit, so that one slow answer
       on a busy box is not an end of readiness.
    """
    before = before or Probe(target.incarnation, asked, ready=None, misses=0, failing_since=None, ready_since=None)
    # the moment of the question, not of the answer: what happened in between is not in it
    told = replace(before, at=asked, ready=answer.ready, busy=answer.busy, detail=answer.detail)
    if answer.sleeping is not None:  # else it is as asleep as before
        told = replace(told, sleeping=answer.sleeping, sleeping_at=asked)
    told = _watch_progress(before, told, answer, asked)
    if answer.ready is None:  # 1
        return told
    if answer.ready:  # 2
        return replace(told, misses=0, failing_since=None, ready_since=before.ready_since or asked)
    misses = before.misses + 1  # 3
    ready_since = before.ready_since if misses < target.failures else None
    return replace(told, misses=misses, failing_since=before.failing_since or asked, ready_since=ready_since)


def _watch_progress(before: Probe, told: Probe, answer: Answer, asked: Instant) -> Probe:
    """Since when the counter of work has stood still with requests running; an answer without it changes nothing.

    1. asleep, or nothing runs                                                → it stands still for good reason: None
    2. requests run, and the counter moved or nothing ran at the last reading → since now
    3. requests run, and the counter is where it was when they ran before     → since when it was seen there first
    """
    if answer.progress is None or answer.running is None:
        return told
    if answer.sleeping or answer.running <= 0:
        since = None  # 1
    else:
        since = before.moved if before.moved and before.progress == answer.progress else asked  # 2, 3
    return replace(told, progress=answer.progress, moved=since, progress_at=asked)


def is_material(before: Probe | None, after: Probe, target: ProbeTarget) -> bool:
    """Whether somebody should look.

    A first answer, ready or asleep flipped, misses at the limit, nothing in flight any more, a hang begun or over.
    """
    if before is None or before.ready != after.ready or before.sleeping != after.sleeping:
        return True
    if (before.frozen_s >= target.hung_s) != (after.frozen_s >= target.hung_s):
        return True
    return after.misses == target.failures or (after.busy == 0 and before.busy != 0)


def probe_once(
    targets: Mapping[str, ProbeTarget], *, deadline_s: float, clock: Clock, owns: OwnsListener | None = None
) -> dict[str, Probe]:
    """Ask each target once, all at the same time; one that has not answered by the deadline is a miss.

    For commands that look once and go: nothing is kept, so `misses` is 0 or 1.
    """
    results: queue.SimpleQueue[Probe] = queue.SimpleQueue()

    def ask(target: ProbeTarget) -> None:
        connection = Connection(target, clock)
        try:
            asked = clock.now()
            results.put(next_probe(None, target, connection.ask(target, owns), asked))
        finally:
            connection.close()

    until = clock.now().plus(deadline_s)
    for target in targets.values():
        hurried = replace(target, timeout_s=min(target.timeout_s, deadline_s))
        threading.Thread(target=ask, args=(hurried,), name="probe", daemon=True).start()
    found: dict[str, Probe] = {}
    while len(found) < len(targets):
        try:
            probe = results.get(timeout=max(0.0, until.mono - clock.now().mono))
        except queue.Empty:
            break
        found[probe.incarnation] = probe
    late = Answer(ready=False, detail=f"no answer within {deadline_s:g} s")
    return {i: found.get(i) or next_probe(None, target, late, clock.now()) for i, target in targets.items()}


def _disconnect(watch: _Watch) -> None:
    connection, watch.connection = watch.connection, None
    if connection is not None:
        connection.close()
