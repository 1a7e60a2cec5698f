"""Predictions from the journal's own history: how long endpoints took to load, drain and stop, and work to run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, assert_never

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.journal.timings import Measure, p95
from reconciler.plan.ledger import EndpointRecord, Ledger, Timings
from reconciler.plan.observed import Observed
from reconciler.spec.spec import Spec

if TYPE_CHECKING:
    from reconciler.journal.journal import Journal  # the writer's part, which a command that reads does without


_NAP_MEASURES: Mapping[int, tuple[Measure, Measure]] = {1: ("sleep1", "wake1"), 2: ("sleep2", "wake2")}
"""By level: falling asleep, and waking up."""


class _Learnt(Struct):
    """What history foretells of one endpoint, in seconds; None: it has none yet."""

    load_s: float | None = None
    drain_s: float | None = None
    stop_s: float | None = None
    memory_s: float | None = None
    sleep_s: dict[int, float] = field(default_factory=dict)
    wake_s: dict[int, float] = field(default_factory=dict)


def predicted(measured: Mapping[tuple[str, Measure], Sequence[float]], spec: Spec) -> Mapping[str, Timings]:
    """p95 of what was measured, per endpoint that was measured at all; the engine's defaults for the rest of it.

    Args:
        measured: seconds by (endpoint, measure), as the journal has them
        spec: bounds what was not measured, and how long a drain may take now
    """
    learnt: dict[str, _Learnt] = {}
    for (subject, what), samples in measured.items():
        entry, seconds = learnt.setdefault(subject, _Learnt()), p95(samples)
        if seconds is None:
            continue
        match what:
            case "load":
                entry.load_s = seconds
            case "drain":
                entry.drain_s = seconds
            case "stop":
                entry.stop_s = seconds
            case "memory":
                entry.memory_s = seconds
            case "sleep1" | "sleep2":
                entry.sleep_s[int(what[-1])] = seconds
            case "wake1" | "wake2":
                entry.wake_s[int(what[-1])] = seconds
            case "run":
                continue
            case _:
                assert_never(what)
    answer: dict[str, Timings] = {}
    temporary = {n: e for _, overlay in sorted(spec.overlays.items()) for n, e in overlay.endpoints.items()}
    for name, entry in sorted(learnt.items()):
        endpoint = spec.endpoints.get(name) or temporary.get(name)
        if endpoint is None:
            continue
        default = endpoint.profile
        answer[name] = Timings(
            load_s=min(default.load_s, endpoint.health.startup_s) if entry.load_s is None else entry.load_s,
            drain_s=min(default.drain_s if entry.drain_s is None else entry.drain_s, endpoint.stop.drain_s),
            stop_s=min(default.stop_s, endpoint.stop.grace_s) if entry.stop_s is None else entry.stop_s,
            sleep_s=entry.sleep_s,
            wake_s=entry.wake_s,
            memory_s=entry.memory_s,
        )
    return answer


def usual_runs(measured: Mapping[tuple[str, Measure], Sequence[float]]) -> Mapping[str, float]:
    """Seconds that the work of each overlay usually takes: p95 of its runs that went well."""
    found = {subject: p95(seconds) for (subject, what), seconds in sorted(measured.items()) if what == "run"}
    return {subject: seconds for subject, seconds in found.items() if seconds is not None}


def learn(ledger: Ledger, measured: Mapping[tuple[str, Measure], Sequence[float]], spec: Spec) -> Ledger:
    """The ledger with what `measured` teaches."""
    return replace(ledger, timings=predicted(measured, spec), runs=usual_runs(measured))


class Learner:
    """`learn`, for whoever asks again and again: predicted anew is only what was measured or edited since."""

    def __init__(self) -> None:
        self._last: tuple[Mapping[tuple[str, Measure], Sequence[float]], Spec, Ledger] | None = None

    def learn(self, ledger: Ledger, measured: Mapping[tuple[str, Measure], Sequence[float]], spec: Spec) -> Ledger:
        """The ledger with what `measured` teaches; the same values are taken to teach the same."""
        if self._last is None or self._last[0] is not measured or self._last[1] is not spec:
            self._last = measured, spec, learn(Ledger(), measured, spec)
        learnt = self._last[2]
        return replace(ledger, timings=learnt.timings, runs=learnt.runs)


def record_durations(
    journal: Journal, before: Ledger, after: Ledger, observed: Observed, since: Instant, archived: Collection[str] = ()
) -> None:
    """Measure what this decision saw come to its end: a load, a stop, a nap's step, or work that went well.

    Not what began before `since`, when this daemon did, if it waits to be seen: it waited for a daemon, too. Of those
    incarnations that are `archived` the memory is seen free.
    """
    incarnations = {i.id: i for i in observed.incarnations}
    for one in (incarnations[name] for name in archived if name in incarnations):
        if one.subject.kind == "endpoint" and one.gpus and one.exited is not None and one.exited.mono >= since.mono:
            journal.record_timing(one.subject.name, "memory", max(0.0, observed.at.since(one.exited)))
    for name, record in after.endpoints.items():
        old = before.endpoints.get(name)
        ready = record.ready_incarnation
        if ready is not None and record.ready_since is not None and (old is None or old.ready_incarnation != ready):
            started = incarnations[ready].started if ready in incarnations else None
            if started is not None and started.mono >= since.mono:
                journal.record_timing(name, "load", record.ready_since.since(started))
        for what, seconds in _nap_times(old, record, since):
            journal.record_timing(name, what, seconds)
        counted = {e.incarnation for e in old.exits} if old else set()
        for end in record.exits:
            ended = incarnations.get(end.incarnation)
            if end.incarnation in counted or ended is None or ended.stop is None or ended.stop.signalled is None:
                continue
            if ended.bygone:  # asked to stop in one boot, and seen to have ended on the clock of the next
                continue
            journal.record_timing(name, "drain", ended.stop.signalled.since(ended.stop.requested))
            journal.record_timing(name, "stop", max(0.0, end.at.since(ended.stop.signalled)))
    for name, overlay in after.overlays.items():
        was = before.overlays.get(name)
        if overlay.outcome != "done" or overlay.exit_code != 0 or was is None or was.outcome == "done":
            continue
        ran = next((span.actual_s for span in reversed(overlay.spans) if span.part == "run"), None)
        if ran is not None:
            journal.record_timing(name, "run", ran)


def _nap_times(before: EndpointRecord | None, after: EndpointRecord, since: Instant) -> Iterator[tuple[Measure, float]]:
    """How long the step of a nap took that came to its end between these two: 1. it fell asleep; 2. it woke up."""
    was, now = before.nap if before else None, after.nap
    if was is None or was.failed is not None:
        return
    asleep, awake = _NAP_MEASURES[was.level]
    if now is not None and now.slept is not None and was.slept is None and now.incarnation == was.incarnation:
        if was.begun is not None and was.begun.mono >= since.mono:
            yield asleep, now.slept.since(was.begun)  # 1
        return
    ready = after.ready_since if now is None and after.ready_incarnation == was.incarnation else None
    if ready is not None and was.waking is not None and was.waking.mono >= since.mono:
        yield awake, ready.since(was.waking)  # 2
