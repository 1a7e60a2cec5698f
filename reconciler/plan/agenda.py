"""The agenda: which endpoint is expected to be in which states, until when, and on whose account.

An entry is written in the same decision as the leases or the stop it explains, before anything acts. It is bounded: its
`until` is fixed when it is written and moves only when the overlay that owns it enters another state, or when what kept
the endpoint away is over: from then on it has the time of its way back, whatever had been foreseen. Its states are what
is still ahead: an endpoint that is coming back is no longer expected to stop.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from reconciler.plan.actions import Action
from reconciler.plan.draft import Draft, Window
from reconciler.plan.ledger import AgendaEntry, EndpointState, OverlayRecord
from reconciler.plan.overlays import predicted_end
from reconciler.spec.spec import OverlaySpec

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
        2. an overlay has its place meanwhile, or will    → one entry until its predicted return after that one
           before it was worth to bring it back
        3. it leaves or starts for a planned cause        → one entry until it is predicted to be ready (or gone)
        4. it has an entry and is not there yet           → that entry stays, overdue or not
        5. otherwise, or it came and ended by itself      → none: a crash is nobody's plan

    In 3 and 4 an entry on an overlay's account, written while it was to be away, is from now on that of its way back.
    """
    old = {entry.endpoint: entry for entry in draft.situation.ledger.agenda}
    moves = _moves(actions)
    entries = []
    for name in draft.stirring():
        entry = _displaced(draft, name, old.get(name)) or _kept_off(draft, name, old.get(name))
        if entry is None:
            before = _on_its_way_back(draft, name, moves.get(name), old.get(name))
            if _came_to_an_end(draft, name, before):
                continue  # 5
            entry = _moving(draft, name, moves.get(name), before)
            if entry is None and before is not None and not _settled(draft, name):
                entry = before  # 4
        if entry is not None:
            entries.append(entry)
    return tuple(entries)


def _displaced(draft: Draft, name: str, old: AgendaEntry | None) -> AgendaEntry | None:
    """The entry of an endpoint that overlays displaced or set otherwise: on the account of the one that ends last."""
    holders = sorted({*draft.evicted_from(name), *([draft.owners[name]] if name in draft.owners else [])})
    if not holders:
        return None
    entries = []
    for overlay, step in ((n, draft.steps[n]) for n in holders):
        if step.spec is not None and (name in draft.wanted or name in draft.situation.spec.endpoints):
            reason = f"gives way to {overlay}" if name in step.record.evicted else f"as overlay {overlay} sets it"
            entries.append(_while_it_lasts(draft, name, step.record, step.spec, reason, old))
    return max(entries, key=lambda entry: entry.until, default=old)


def _kept_off(draft: Draft, name: str, old: AgendaEntry | None) -> AgendaEntry | None:
    """The entry of an endpoint that was displaced and that somebody else keeps from its place, or soon will again."""
    overlay = draft.kept_off.get(name)
    if overlay is None or draft.records[name].evicted_by is None:
        return None
    window = next((w for w in draft.windows if w.name == overlay), None)
    if window is not None:
        return replace(_in_window(draft, window, name), start=_begun(draft, overlay, old))
    step = draft.steps[overlay]
    if step.spec is None:
        return old
    return _while_it_lasts(draft, name, step.record, step.spec, f"its place is held by {overlay}", old)


def _while_it_lasts(
    draft: Draft, name: str, record: OverlayRecord, overlay: OverlaySpec, reason: str, old: AgendaEntry | None
) -> AgendaEntry:
    """The entry of an endpoint that an overlay keeps away: until its way back from the predicted end is through."""
    anchor = record.active_since or record.since
    end = predicted_end(record, overlay.makespan, anchor.wall) + overlay.makespan.grace_s
    if record.state == "completing":  # it has ended, sooner or later than was foreseen
        end = record.since.wall
    until = end + SLACK_FACTOR * _way_s(draft, name) + SLACK_S
    states = (*LEAVING_STATES, *RETURNING_STATES)
    return AgendaEntry(name, states, _begun(draft, overlay.name, old), until, reason, overlay.name)


def _begun(draft: Draft, overlay: str, old: AgendaEntry | None) -> float:
    return old.start if old is not None and old.overlay == overlay else draft.now.wall


def _way_s(draft: Draft, name: str) -> float:
    """Predicted seconds of its way out and back; 0 for one that nobody describes any more."""
    endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints.get(name)
    if endpoint is None:
        return 0.0
    times = draft.situation.timings(endpoint)
    return times.drain_s + times.stop_s + times.load_s


def _on_its_way_back(draft: Draft, name: str, action: Action | None, entry: AgendaEntry | None) -> AgendaEntry | None:
    """The entry that was in force; once it has left and comes back, without what is behind it.

    What it was kept away for by an overlay is over then, and the entry has the time of the way back: twice what this
    decision predicts, its turn among others on its GPU included; of one that cannot start, for a stranger has its
    place, that of the way alone: who keeps it then is nobody's plan.
    """
    if entry is None or "stopped" not in entry.expected_states or name not in draft.wanted:
        return entry
    current = draft.standings[name].current
    begins = action is not None and action.op in ("start", "wake")
    if (current is not None and current.id in draft.leaving) or (entry.overlay is None and not begins):
        return entry
    ahead = ("sleeping",) * (name in draft.naps) + ("pending", *RETURNING_STATES)
    back = replace(entry, expected_states=tuple(s for s in entry.expected_states if s in ahead))
    if entry.overlay is None:
        return back if action is not None and action.ready else entry
    way = _way_s(draft, name)
    if action is not None and begins:
        way = max(way, action.expected[1] - draft.now.wall)
    return replace(back, until=draft.now.wall + SLACK_FACTOR * way + SLACK_S)


def _came_to_an_end(draft: Draft, name: str, entry: AgendaEntry | None) -> bool:
    """Whether an endpoint ended by itself as it came, or was about to leave only to come again, and is on its own now.

    What has an overlay's account is over once it ends on its way back: its entry began when it still ran.
    """
    record, current = draft.records[name], draft.standings[name].current
    last = record.exits[-1] if record.exits else None
    leaves = current is not None and current.id in draft.leaving
    if last is None or last.planned or record.ready_since is not None or leaves or name not in draft.wanted:
        return False
    if entry is None or entry.overlay is None:
        return entry is None or last.at.wall > entry.start
    known = draft.situation.record(name).exits
    return "stopped" not in entry.expected_states and all(last.incarnation != end.incarnation for end in known)


def _in_window(draft: Draft, window: Window, name: str) -> AgendaEntry:
    """What will be expected of an endpoint that a window displaces."""
    until = window.end + SLACK_FACTOR * _way_s(draft, name) + SLACK_S
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
    begins = action.op in ("start", "wake")
    again = not begins and old is not None and "stopping" not in old.expected_states  # edited while it came back
    if old is not None and old.reason == action.reason and old.overlay == action.cause.overlay and not again:
        return old
    if old is not None and begins and old.until > draft.now.wall and "healthy" in old.expected_states:
        return old  # the second half of a move that is on the agenda already
    way = _way_s(draft, name) or SLACK_S
    current, states = draft.standings[name].current, LEAVING_STATES
    leaves = current is not None and current.id in draft.leaving  # it was to be stopped, and is wanted after all
    if (leaves or not begins) and name in draft.wanted:
        states = (*LEAVING_STATES, *RETURNING_STATES)
    elif begins:
        states = ("sleeping" if action.op == "wake" else "pending", *RETURNING_STATES)
    until = action.expected[0] + SLACK_FACTOR * way + SLACK_S
    return AgendaEntry(name, states, draft.now.wall, until, action.reason, action.cause.overlay)


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
    """Entries in force, and those that will be written as it looks now: for windows to come, and predicted returns.

    Of a window of a schedule whose place another one has then nothing is told before it is the next: it may get another
    one.
    """
    known = {e.endpoint for e in entries}
    windows = [window for window in draft.windows if not window.taken]
    to_come = [_in_window(draft, window, name) for window in windows for name in window.victims]
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
