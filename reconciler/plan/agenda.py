"""The agenda: which endpoint is expected to be in which states, until when, and on whose account.

An entry is written in the same decision as the leases or the stop it explains, before anything acts. It is bounded: its
`until` is fixed when it is written and moves only when the overlay that owns it enters another state. Its states are
what is still ahead: an endpoint that is coming back is no longer expected to stop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from reconciler.plan.actions import Action
from reconciler.plan.draft import Draft, Window
from reconciler.plan.ledger import AgendaEntry, EndpointState
from reconciler.plan.overlays import predicted_end

SLACK_S = 60.0
SLACK_FACTOR = 2.0
"""An entry lasts for twice the predicted time and a minute: predictions are p95 of a short history at best."""

PLANNED_CAUSES = ("setpoint", "edit", "removed", "overlay", "evict", "restore", "request", "move")
LEAVING_STATES: tuple[EndpointState, ...] = ("sleeping", "stopping", "stopped", "pending")
RETURNING_STATES: tuple[EndpointState, ...] = ("starting", "healthy")


def keep_agenda(draft: Draft, actions: Iterable[Action]) -> tuple[AgendaEntry, ...]:
    """The entries in force after this decision, by endpoint.

    Per endpoint the first that holds:
        1. an overlay displaced or overrides it          → one entry until its predicted return
        2. it leaves or starts for a planned cause        → one entry until it is predicted to be ready (or gone)
        3. it has an entry and is not there yet           → that entry stays, overdue or not
        4. otherwise                                      → none
    """
    old = {entry.endpoint: entry for entry in draft.situation.ledger.agenda}
    moves = _moves(actions)
    entries = []
    for name in draft.stirring():
        entry = _displaced(draft, name, old.get(name)) or _moving(draft, name, moves.get(name), old.get(name))
        if entry is None and name in old and not _settled(draft, name):
            entry = old[name]  # 3
        if entry is not None:
            entries.append(entry)
    return tuple(entries)


def _displaced(draft: Draft, name: str, old: AgendaEntry | None) -> AgendaEntry | None:
    holders = sorted({*draft.evicted_from(name), *([draft.owners[name]] if name in draft.owners else [])})
    if not holders:
        return None
    overlay = holders[0]
    step = draft.steps[overlay]
    endpoint = draft.situation.spec.endpoints.get(name) or draft.wanted.get(name)
    if endpoint is None or step.spec is None:
        return old
    reason = f"gives way to {overlay}" if name in step.record.evicted else f"as overlay {overlay} sets it"
    states = (*LEAVING_STATES, *RETURNING_STATES)
    times = draft.situation.timings(endpoint)
    anchor = step.record.active_since or step.record.since
    way = times.drain_s + times.stop_s + times.load_s
    end = predicted_end(step.record, step.spec.makespan, anchor.wall) + step.spec.makespan.grace_s
    if step.record.state in ("completing", "restoring"):  # it has ended, sooner or later than was foreseen
        end = step.record.since.wall
    until = end + SLACK_FACTOR * way + SLACK_S
    begin = old.start if old is not None and old.overlay == overlay else draft.now.wall
    return AgendaEntry(name, states, begin, until, reason, overlay)


def _in_window(draft: Draft, window: Window, name: str) -> AgendaEntry:
    """What will be expected of an endpoint that a window displaces."""
    endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints.get(name)
    times = draft.situation.timings(endpoint) if endpoint else None
    way = times.drain_s + times.stop_s + times.load_s if times else 0.0
    until = window.end + SLACK_FACTOR * way + SLACK_S
    states = (*LEAVING_STATES, *RETURNING_STATES)
    return AgendaEntry(name, states, window.opens, until, f"gives way to {window.name}", window.name)


def _moves(actions: Iterable[Action]) -> dict[str, Action]:
    """The first planned act on each endpoint that is not the far end of somebody else's makespan."""
    behind: set[int] = set()
    moves: dict[str, Action] = {}
    for action in actions:
        if action.op == "wait_end" or behind & set(action.needs):
            behind.add(action.id)
        elif action.subject.kind == "endpoint" and action.cause.kind in PLANNED_CAUSES and action.op != "wait_ready":
            moves.setdefault(action.subject.name, action)
    return moves


def _moving(draft: Draft, name: str, action: Action | None, old: AgendaEntry | None) -> AgendaEntry | None:
    if action is None:
        return None
    if old is not None and old.reason == action.reason and old.overlay == action.cause.overlay:
        return old
    begins = action.op in ("start", "wake")
    if old is not None and begins and old.until > draft.now.wall:
        # the second half of a move that is on the agenda already
        return _advanced(old, action.op) if action.ready else old
    endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints.get(name)
    times = draft.situation.timings(endpoint) if endpoint else None
    way = times.drain_s + times.stop_s + times.load_s if times else SLACK_S
    states = LEAVING_STATES
    if not begins and name in draft.wanted:
        states = (*LEAVING_STATES, *RETURNING_STATES)
    elif begins:
        states = ("sleeping" if action.op == "wake" else "pending", *RETURNING_STATES)
    until = action.expected[0] + SLACK_FACTOR * way + SLACK_S
    return AgendaEntry(name, states, draft.now.wall, until, action.reason, action.cause.overlay)


def _advanced(entry: AgendaEntry, op: str) -> AgendaEntry:
    """The entry from where an endpoint comes back on: what it has behind it is expected no more."""
    ahead = ("sleeping", "pending", *RETURNING_STATES) if op == "wake" else ("pending", *RETURNING_STATES)
    return replace(entry, expected_states=tuple(s for s in entry.expected_states if s in ahead))


def _settled(draft: Draft, name: str) -> bool:
    """Whether an endpoint is where its set point wants it, or has been given up."""
    standing = draft.standings[name]
    if draft.records[name].failed is not None:
        return True
    if name not in draft.wanted:
        return standing.current is None
    nap = draft.records[name].nap
    woken = nap is not None and nap.waking is not None  # asleep until it is seen awake, which may be a look later
    ready = standing.state == "healthy" or (standing.state == "sleeping" and not woken)
    return ready and standing.current is not None and standing.current.id not in draft.leaving


class AgendaTracker:
    """Answers from the agenda: is what we see planned?"""

    def __init__(self, entries: Iterable[AgendaEntry], now: float) -> None:
        self._entries = {e.endpoint: e for e in entries if e.start <= now < e.until}

    def is_endpoint_in_scheduled_transition(self, name: str) -> bool:
        """Whether an entry in force covers this endpoint at this moment."""
        return name in self._entries

    def get_scheduled_endpoint_state(self, name: str) -> tuple[EndpointState, ...] | None:
        """The states expected of it, in order; None when nothing is scheduled."""
        entry = self._entries.get(name)
        return entry.expected_states if entry else None

    def entry(self, name: str) -> AgendaEntry | None:
        """The entry in force for this endpoint."""
        return self._entries.get(name)


def forecast_entries(
    draft: Draft, entries: Iterable[AgendaEntry], actions: Iterable[Action]
) -> tuple[AgendaEntry, ...]:
    """Entries in force, and those that will be written as it looks now: for windows to come, and predicted returns."""
    known = {e.endpoint for e in entries}
    to_come = [_in_window(draft, window, name) for window in draft.windows for name in window.victims]
    for action in actions:
        if action.op in ("start", "wake") and action.needs and action.subject.name not in known:
            begin, end = action.expected
            until = end + SLACK_S
            to_come.append(
                AgendaEntry(
                    action.subject.name,
                    ("sleeping" if action.op == "wake" else "pending", *RETURNING_STATES),
                    begin,
                    until,
                    action.reason,
                    action.cause.overlay,
                )
            )
    return (*entries, *to_come)
