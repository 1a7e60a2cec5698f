"""What a plan comes to, told of each subject: what changes, in one line, and what is not as it should be."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reconciler.plan.actions import Action, Blocked, Cause, Change, Drift, EndpointView, Op, Symbol
from reconciler.plan.draft import Draft
from reconciler.plan.observed import Subject

ENDINGS: frozenset[Op] = frozenset({"drain", "stop", "kill", "sleep", "stop_workload", "wait_memory"})


def changes(draft: Draft, actions: tuple[Action, ...], blocked: tuple[Blocked, ...]) -> tuple[Change, ...]:
    """Per subject what happens to it, departures before arrivals, and what is blocked."""
    behind: set[int] = set()
    groups: dict[tuple[Subject, str], list[Action]] = {}
    for action in actions:
        later = bool(behind & set(action.needs))
        if action.op == "wait_end" or later:
            behind.add(action.id)
        if action.op == "wait_end" or (action.op == "wait_memory" and later):
            continue
        phase = "ends" if action.op in ENDINGS else ("returns" if later else "begins")
        groups.setdefault((action.subject, phase), []).append(action)
    # Whose memory alone is waited for has left already: the box is still busy with it, we are not.
    groups = {key: group for key, group in groups.items() if any(a.op != "wait_memory" for a in group)}
    back = {a.subject: a.expected[1] for a in actions if a.op == "wait_ready" and a.id in behind}
    found: list[Change] = []
    for (subject, phase), group in groups.items():
        first, ids = group[0], tuple(a.id for a in group)
        symbol = _symbol(first, phase, edited=(subject, "begins") in groups and (subject, "ends") in groups)
        earlier = next((i for i, c in enumerate(found) if symbol == "~" and c.subject == subject), None)
        if earlier is not None:  # the second half of one edit
            found[earlier] = replace(found[earlier], actions=(*found[earlier].actions, *ids))
            continue
        expected_back = back.get(subject) if phase == "ends" else None
        found.append(Change(subject, symbol, ids, first.reason, first.cause, expected_back))
    known = {c.subject for c in found}
    for item in blocked:
        if item.subject not in known:
            symbol = "?" if item.reason in ("GpuUnknown", "GpuOccupied") else "x"
            cause = (
                cause_of(draft, item.subject.name)
                if item.subject.kind == "endpoint"
                else Cause("overlay", overlay=item.subject.name)
            )
            found.append(Change(item.subject, symbol, (), f"{item.reason}: {item.message}", cause, item.earliest_start))
    return tuple(found)


def _symbol(first: Action, phase: str, *, edited: bool) -> Symbol:
    """The first rule that holds names the change."""
    rules: tuple[tuple[bool, Symbol], ...] = (
        (phase == "ends" and first.cause.kind == "evict", "!"),
        (first.cause.kind == "restore", "<"),
        (edited and first.cause.kind in ("edit", "overlay", "request", "drift", "move"), "~"),
        (phase == "ends", "-"),
    )
    return next((symbol for holds, symbol in rules if holds), "+")


def drifts(draft: Draft, views: Mapping[str, EndpointView]) -> tuple[Drift, ...]:
    """Endpoints that are not as they are wanted."""
    found = []
    for name in draft.stirring():
        view, wanted = views[name], name in draft.wanted
        if wanted and view.state != "healthy":
            found.append(Drift(Subject("endpoint", name), "running", view.state))
        elif not wanted and draft.standings[name].current is not None:
            found.append(Drift(Subject("endpoint", name), "stopped", view.state))
    return tuple(found)


def is_converged(actions: tuple[Action, ...]) -> bool:
    """Whether all that is left is to wait for the ends of overlays, and what comes after them."""
    behind: set[int] = set()
    for action in actions:
        begun = action.op == "wait_end" and not set(action.needs) - behind
        if begun or set(action.needs) & behind:
            behind.add(action.id)
        else:
            return False
    return True


def cause_of(draft: Draft, name: str) -> Cause:
    """Why an endpoint goes where it goes: what makes it leave, else what brings it, else what asks for it."""
    standing = draft.standings[name]
    if standing.current is not None and standing.current.id in draft.leaving:
        return draft.leaving[standing.current.id].cause
    arriving = draft.arriving.get(Subject("endpoint", name))
    if arriving is not None:
        return arriving.cause
    endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints.get(name)
    return Cause("setpoint", endpoint.source if endpoint else None)
