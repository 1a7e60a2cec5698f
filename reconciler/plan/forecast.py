"""What will run where: the planner's own decisions from now on, on a box where all goes as predicted.

Pure, like `plan`. It knows the files as they are, the present state and the clock; no crash, no edit, no stranger that
comes or goes. The same planner decides here as will decide then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from msgspec import Struct, field

from reconciler.clock import Instant
from reconciler.plan.actions import Blocked, Plan
from reconciler.plan.ledger import LIVE, TERMINAL, Ledger
from reconciler.plan.moving import for_whom
from reconciler.plan.observed import Observed, Subject
from reconciler.plan.planner import plan as decide
from reconciler.plan.predicted import PredictedBox
from reconciler.plan.situation import MEMORY_TOLERANCE
from reconciler.spec.spec import Spec

MOST_DECISIONS = 20_000
"""A minute of computing: what is not told by then is said to be missing."""
AT_ONCE = 100
"""Decisions in a row between which no time passes; after that a second is let go by."""

Kind = Literal["endpoint", "overlay", "foreign"]
Phase = Literal["loading", "ready", "unhealthy", "leaving", "asleep", "running", "reserved", "foreign"]


Place = tuple[str, str, Kind]
"""Whom a bar is about: GPU, name, kind."""


class Bar(Struct, frozen=True):
    """Somebody on one GPU for a while."""

    gpu: str
    """UUID."""
    name: str
    kind: Kind
    phase: Phase
    begin: float
    """Epoch seconds."""
    end: float


class Moment(Struct, frozen=True):
    """Something that will happen."""

    at: float
    """Epoch seconds."""
    kind: Literal["evict", "begin", "end", "back"]
    subject: str
    message: str


class Outage(Struct, frozen=True):
    """A time in which an endpoint that should run does not answer."""

    endpoint: str
    begin: float
    end: float
    overlay: str | None
    """Whom it gives way to; None: it loads, waits, or has failed."""
    lasts: bool
    """It goes on past the forecast."""


class Forecast(Struct, frozen=True):
    """The next hours."""

    begin: float
    """Epoch seconds."""
    end: float
    """Epoch seconds; earlier than was asked for if it had to stop."""
    gpus: tuple[tuple[int, str, str], ...]
    """Index, UUID and state, in NVML order."""
    bars: tuple[Bar, ...]
    moments: tuple[Moment, ...]
    outages: tuple[Outage, ...]
    waiting: tuple[Blocked, ...]
    """Overlays whose time has come and that still wait at the end, and why."""
    decisions: int
    complete: bool
    """False: there was more to decide than could be looked at."""


_NOT_TO_COME = frozenset({"active", "overrun", *TERMINAL})
"""That an overlay began, or was over, before the forecast is nothing that will happen."""


class _Tape(Struct):
    """What the decisions so far tell, as intervals that are open or closed."""

    spec: Spec
    bars: list[Bar] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    _on: dict[Place, tuple[Phase, float]] = field(default_factory=dict)
    _out: dict[str, tuple[float, str | None]] = field(default_factory=dict)
    _states: dict[str, str] = field(default_factory=dict)
    _evicted: dict[str, str] = field(default_factory=dict)

    def see(self, plan: Plan, observed: Observed) -> None:
        """Take note of one decision, and of the box at that moment."""
        now = plan.now.wall
        self._occupy(dict(_occupants(plan, observed)), now)
        self._answering(plan, now)
        self._moves(plan, observed, now)

    def close(self, end: float) -> None:
        """Nothing more is seen."""
        self._occupy({}, end)
        for name, (begin, overlay) in self._out.items():
            self.outages.append(Outage(name, begin, end, overlay, lasts=True))

    def _occupy(self, seen: dict[Place, Phase], now: float) -> None:
        for key, (phase, begin) in list(self._on.items()):
            if seen.get(key) != phase:
                del self._on[key]
                if now > begin:
                    self.bars.append(Bar(*key, phase, begin, now))
        for key, phase in seen.items():
            self._on.setdefault(key, (phase, now))

    def _answering(self, plan: Plan, now: float) -> None:
        for name, endpoint in self.spec.endpoints.items():
            view = plan.endpoints.get(name)
            out = endpoint.state == "running" and view is not None and view.state != "healthy"
            record = plan.ledger.endpoints.get(name)
            overlay = (
                record.evicted_by or (for_whom(record.move) if record.move is not None else None) if record else None
            )
            if out:
                begin, before = self._out.get(name, (now, None))
                self._out[name] = (begin, before or overlay)
            elif name in self._out:
                begin, before = self._out.pop(name)
                self.outages.append(Outage(name, begin, now, before, lasts=False))
                if before is not None:
                    self.moments.append(Moment(now, "back", name, f"is ready again, after {before}"))

    def _moves(self, plan: Plan, observed: Observed, now: float) -> None:
        indices = {gpu.uuid: gpu.index for gpu in observed.gpus}
        for name, record in plan.ledger.overlays.items():
            before, self._states[name] = self._states.get(name, "pending"), record.state
            told = [f"displaces {', '.join(record.evicted)}"] if record.evicted else []
            told += [f"has {', '.join(record.moved)} moved"] if record.moved else []
            leave = " and ".join(told)
            if record.state in LIVE and leave and self._evicted.get(name) != f"{record.window_start} {leave}":
                self._evicted[name] = f"{record.window_start} {leave}"
                self.moments.append(Moment(now, "evict", name, leave))
            if record.state == before:
                continue
            if record.state == "active" and before != "overrun":
                where = ", ".join(str(indices.get(g, g)) for g in sorted(record.gpus, key=lambda g: indices.get(g, -1)))
                self.moments.append(Moment(now, "begin", name, f"begins on GPU {where}" if where else "begins"))
            elif record.state == "completing":
                self.moments.append(Moment(now, "end", name, f"ends{f': {record.reason}' if record.reason else ''}"))
            elif record.state in TERMINAL and before not in ("completing", "restoring"):
                why = f": {record.reason}" if record.reason else ""
                self.moments.append(Moment(now, "end", name, f"is {record.state}{why}"))


def forecast(spec: Spec, observed: Observed, ledger: Ledger, now: Instant, span_s: float) -> Forecast:
    """Decide, let it happen, let time pass, and decide again, for `span_s` seconds from `now`.

    Args:
        spec: the files as they are; nobody edits them
        observed: the box as it is
        ledger: what was decided before, with the durations that were measured
        now: when it begins
        span_s: seconds that it covers
    """
    before: dict[str, str] = {
        name: record.state for name, record in ledger.overlays.items() if record.state in _NOT_TO_COME
    }
    quarantined = ledger.quarantines.keys()
    box, tape = PredictedBox(spec, observed, ledger, now), _Tape(spec, _states=before)
    end, decisions, at_once = now.mono + span_s, 0, 0
    decided = None
    while box.now.mono < end and decisions < MOST_DECISIONS:
        seen = box.observe()
        decided = decide(spec, seen, box.answer(ledger), box.now)
        decisions += 1
        tape.see(decided, seen)
        moved = decided.ledger != ledger or bool(decided.archive)
        ledger = decided.ledger
        if (box.act(decided) or moved) and at_once < AT_ONCE:
            at_once += 1
            continue
        at = min(box.next_event(), end, *([decided.next_wake.mono] if decided.next_wake is not None else []))
        box.advance(max(at, box.now.mono + (0.001 if at_once < AT_ONCE else 1.0)))
        at_once = 0
    last = min(box.now.mono, end) - now.mono + now.wall
    tape.close(last)
    return Forecast(
        begin=now.wall,
        end=last,
        gpus=tuple((g.index, g.uuid, "quarantined" if g.uuid in quarantined else g.state) for g in observed.gpus),
        bars=tuple(sorted(tape.bars, key=lambda b: (b.gpu, b.begin, b.kind, b.name))),
        moments=tuple(sorted(tape.moments, key=lambda m: (m.at, m.subject, m.kind))),
        outages=tuple(sorted(tape.outages, key=lambda o: (o.endpoint, o.begin))),
        waiting=_waiting(decided) if decided is not None else (),
        decisions=decisions,
        complete=box.now.mono >= end,
    )


def _waiting(last: Plan) -> tuple[Blocked, ...]:
    return tuple(b for b in last.blocked if b.subject.kind == "workload" and b.reason != "NotYet")


_PHASES: dict[str, Phase] = {
    "starting": "loading", "healthy": "ready", "unhealthy": "unhealthy", "stopping": "leaving", "sleeping": "asleep",
}  # fmt: skip


def _occupants(plan: Plan, observed: Observed) -> Iterator[tuple[Place, Phase]]:
    """Who is on which GPU: (UUID, name, kind) and how."""
    there: set[tuple[Subject, str]] = set()
    for one in observed.incarnations:
        if not one.alive:
            continue
        name = one.subject.name
        if one.subject.kind == "workload":
            phase: Phase = "running" if one.stop is None else "leaving"
        else:
            phase = _PHASES.get(plan.endpoints[name].state if name in plan.endpoints else "", "leaving")
        for gpu in one.gpus:
            there.add((one.subject, gpu))
            yield (gpu, name, "endpoint" if one.subject.kind == "endpoint" else "overlay"), phase
    for lease in plan.ledger.leases:
        reserved = lease.subject.kind == "workload" and (lease.subject, lease.gpu) not in there
        if reserved and plan.ledger.overlays[lease.overlay].state in ("active", "overrun"):
            yield (lease.gpu, lease.overlay, "overlay"), "reserved"
    for gpu_ in observed.gpus:
        strangers = [p for p in gpu_.processes or () if p.owner is None]
        if sum(p.memory_bytes or MEMORY_TOLERANCE for p in strangers) > MEMORY_TOLERANCE:
            yield (gpu_.uuid, "foreign", "foreign"), "foreign"
