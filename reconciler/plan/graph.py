"""The action graph: in which order what was decided may happen, and when each step is predicted.

Nothing starts on a GPU before everything that leaves it is gone and its memory is seen free. On one GPU one engine
loads at a time, and nothing stops beside one that loads: engines measure free memory while they load.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.plan.actions import Action, Cause, Op
from reconciler.plan.departures import draining, stop_for
from reconciler.plan.draft import OVERRIDING, Arriving, Draft, Leaving
from reconciler.plan.ledger import Nap, Timings
from reconciler.plan.naps import asleep_for, drained, rested, wakes
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.overlays import (
    MEMORY_RETURN_S,
    MEMORY_TIMEOUT_S,
    WORKLOAD_STOP_S,
    OverlayStep,
    memory_return_s,
    predicted_end,
)
from reconciler.plan.progress import arrival
from reconciler.plan.restoring import Return, returning
from reconciler.spec.spec import EndpointSpec

KILL_SLACK_S = 10.0
"""How long a whole tree may take to vanish after SIGKILL before the attempt counts as failed."""
SPAWN_S = 0.1
SPAWN_TIMEOUT_S = 30.0
UNKNOWN_RUN_S = 86400.0
_LOADS = ("starting", "unhealthy", "unknown")
"""States of one that was never ready in which it may be measuring memory."""
CALL_TIMEOUT_S = 120.0
"""How long an engine may take to sleep or to wake up: moving 140 GB of weights over PCIe takes half a minute."""


class Graph(Struct):
    """Actions under construction; ids are ordinal and every need precedes its dependant."""

    draft: Draft
    actions: list[Action] = field(default_factory=list)
    _vacated_by: dict[str, int] = field(default_factory=dict)
    """Incarnation id → the action after which its GPUs, port and lock are free."""
    _vacating: list[Incarnation] = field(default_factory=list)
    """These incarnations."""
    _loaded_by: dict[Subject, int] = field(default_factory=dict)
    """Subject → the action after which it is loaded."""
    _loading_on: dict[str, list[tuple[Subject, int]]] = field(default_factory=dict)
    """GPU → who loads there, and the action after which that is over."""
    _dozing_on: dict[str, int] = field(default_factory=dict)
    """GPU → the action after which whoever falls asleep there is seen asleep."""
    _started_for: dict[str, list[int]] = field(default_factory=dict)
    """Overlay → the starts of its own endpoints: it does not end before they began."""
    _ended_by: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Overlay → the actions after which it is over and its memory free."""

    def build(self) -> tuple[Action, ...]:
        """The whole graph of the draft."""
        self._loading()
        for incarnation in self._going():
            self._departure(incarnation)
        self._naps()
        for item in sorted(self.draft.arriving.values(), key=self._arrival_order):
            if item.subject.kind == "endpoint":
                self._endpoint_start(item)
        for step in self.draft.steps.values():
            if step.spec is not None and step.record.state in OVERRIDING:
                self._overlay_run(step)
            elif step.record.state == "completing":
                self._overlay_end(step)
        self._restorations()
        return tuple(self.actions)

    def _add(
        self,
        op: Op,
        subject: Subject,
        gpus: tuple[str, ...],
        needs: Iterable[int],
        *,
        reason: str,
        cause: Cause,
        timeout_s: float,
        predicted_s: float,
        not_before: float = 0.0,
        held: bool = False,
        template: Arriving | None = None,
        incarnation: str | None = None,
    ) -> int:
        required = tuple(sorted(set(needs)))
        begin = max([self.draft.now.wall, not_before, *(self.actions[n - 1].expected[1] for n in required)])
        action = Action(
            id=len(self.actions) + 1,
            needs=required,
            op=op,
            subject=subject,
            gpus=gpus,
            reason=reason,
            cause=cause,
            timeout_s=timeout_s,
            expected=(begin, begin + max(0.0, predicted_s)),
            ready=not required and not held,
            incarnation=incarnation,
        )
        if template is not None:
            action = replace(
                action,
                memory_bytes=template.memory_bytes,
                exclusive=template.exclusive,
                process_hash=template.process_hash,
                attempt=template.attempt,
                overlay=template.overlay,
            )
        self.actions.append(action)
        return action.id

    # ------------------------------------------------------------ what is under way

    def _loading(self) -> None:
        """Wait for those that load. One that cannot be verified, or is late and cannot be ended, may load yet.

        Until twice its deadline nobody loads beside such a one; that others end does it no harm that counts.
        """
        draft = self.draft
        for name in draft.stirring():
            standing = draft.standings[name]
            current = standing.current
            ready = current is not None and standing.record.ready_incarnation == current.id
            if current is None or ready or current.id in draft.leaving or standing.state not in _LOADS:
                continue
            endpoint = draft.wanted.get(name)
            startup = endpoint.health.startup_s if endpoint else 0.0
            left = startup - draft.now.since(current.started)
            late = standing.state != "starting"
            if late and left <= -startup:
                continue
            load = draft.situation.timings(endpoint).load_s if endpoint else 0.0
            cause = Cause("setpoint", endpoint.source if endpoint else None)
            action = self._add(
                "wait_ready", current.subject, current.gpus, (), reason="it loads", cause=cause,
                timeout_s=max(0.0, left), predicted_s=load - draft.now.since(current.started), incarnation=current.id,
            )  # fmt: skip
            if late:
                draft.wakes.append(current.started.plus(2 * startup))
                self._vacating.append(current)
                self._vacated_by[current.id] = action
            else:
                self._note_loading(current.subject, current.gpus, action)
        for name, nap in draft.naps.items():  # one that is being woken measures and takes memory as one that loads
            if nap.waking is not None:
                self._wake(name, nap, ())

    def _note_loading(self, subject: Subject, gpus: tuple[str, ...], action: int) -> None:
        self._loaded_by[subject] = action
        for gpu in gpus:
            self._loading_on.setdefault(gpu, []).append((subject, action))

    def _after_loading(self, subject: Subject, gpus: tuple[str, ...]) -> list[int]:
        return [a for gpu in gpus for who, a in self._loading_on.get(gpu, []) if who != subject]

    # ------------------------------------------------------------ sleeping

    def _naps(self) -> None:
        """Everything until those who have to are seen asleep; then those wake up who have their place again.

        In this order, and on one GPU one after the other: a sleep and a wake at once can hang (vllm#37065).
        """
        draft = self.draft
        begun = sorted(draft.naps, key=lambda n: (draft.naps[n].begun is None, n))
        for name in begun:
            nap, current = draft.naps[name], draft.standings[name].current
            if current is None or nap.waking is not None:
                continue
            if not rested(draft.situation, draft.wanted[name], current, nap) and not (
                nap.slept is not None and wakes(draft, name)
            ):
                self._lie_down(draft.wanted[name], current, nap)
        for name, nap in draft.naps.items():
            if nap.waking is None and wakes(draft, name):
                current = draft.standings[name].current
                assert current is not None  # noqa: S101 - `wakes` says so
                needs = self._after_departures(current.subject, current.gpus, None)
                self._wake(name, nap, [*needs, *self._after_loading(current.subject, current.gpus)])

    def _lie_down(self, endpoint: EndpointSpec, current: Incarnation, nap: Nap) -> None:
        draft, holders = self.draft, sorted(self.draft.evicted_from(endpoint.name))
        overlay = holders[0] if holders else None
        source = draft.steps[overlay].record.source if overlay else endpoint.source
        reason, cause = asleep_for(holders, nap), Cause("evict", source, overlay)
        needs: list[int] = []
        if nap.begun is None:
            needs = [
                *self._after_loading(current.subject, current.gpus),
                *(a for g in current.gpus if (a := self._dozing_on.get(g)) is not None),
            ]
            until = drained(draft, endpoint, current, nap)
            if until is not None:
                draft.wakes.append(until)
                needs = [
                    self._add(
                        "drain", current.subject, current.gpus, needs, reason=reason, cause=cause,
                        timeout_s=endpoint.stop.drain_s, predicted_s=draft.situation.timings(endpoint).drain_s,
                    )
                ]  # fmt: skip
        if nap.slept is None and draft.situation.sees(current.gpus):  # what was told already is seen through
            needs = [
                self._add(
                    "sleep", current.subject, current.gpus, needs, reason=reason, cause=cause,
                    timeout_s=CALL_TIMEOUT_S, predicted_s=draft.situation.nap_s(endpoint, nap.level)[0],
                    incarnation=current.id,
                )
            ]  # fmt: skip
        self._memory(current, tuple(needs), reason, cause)
        for gpu in current.gpus:
            self._dozing_on[gpu] = self._vacated_by[current.id]

    def _wake(self, name: str, nap: Nap, needs: Iterable[int]) -> None:
        draft, current = self.draft, self.draft.standings[name].current
        assert current is not None  # noqa: S101 - a nap is one of a living incarnation
        endpoint = draft.wanted.get(name) or draft.situation.spec.endpoints[name]
        overlay = draft.records[name].evicted_by
        kind: Literal["restore", "setpoint"] = "restore" if overlay else "setpoint"
        reason = f"{overlay} no longer needs its place" if overlay else "its set point is running"
        cause = Cause(kind, endpoint.source, overlay)
        if nap.woken is None:
            call = self._add(
                "wake", current.subject, current.gpus, needs, reason=reason, cause=cause,
                timeout_s=CALL_TIMEOUT_S, predicted_s=draft.situation.nap_s(endpoint, nap.level)[1],
                incarnation=current.id,
            )  # fmt: skip
            needs = (call,)
        ready = self._add(
            "wait_ready", current.subject, current.gpus, needs, reason=reason, cause=cause,
            timeout_s=endpoint.health.startup_s, predicted_s=SPAWN_S, incarnation=current.id,
        )  # fmt: skip
        self._note_loading(current.subject, current.gpus, ready)

    # ------------------------------------------------------------ leaving

    def _going(self) -> list[Incarnation]:
        """Whoever may have to go, or may have gone, as observed."""
        draft = self.draft
        some = {i.id for i in draft.situation.passing} | draft.leaving.keys()
        return [i for i in draft.situation.observed.incarnations if i.id in some] if some else []

    def _departure(self, incarnation: Incarnation) -> None:
        """Everything until this incarnation's GPUs are seen free, if it leaves or has left."""
        draft = self.draft
        leaving = draft.leaving.get(incarnation.id)
        if incarnation.subject.kind == "workload":
            step = draft.steps.get(incarnation.subject.name)
            overlay = step.spec if step else None
            stop_reason = step.stop_workload if step else "its overlay is unknown"
            if incarnation.alive and stop_reason is not None:
                cause = Cause("cancel", overlay.source if overlay else None, incarnation.subject.name)
                leaving = Leaving(incarnation, stop_reason, cause)
        if leaving is None:
            if not incarnation.alive and not draft.situation.memory_returned(incarnation):
                self._memory(incarnation, (), "its memory is not seen free yet", Cause("cleanup"))
            elif incarnation.alive and incarnation.stop is not None:  # it ends, seen or not
                self._memory(incarnation, (), "its end is under way", Cause("cleanup"))
            return
        if incarnation.phase == "unknown":
            return
        needs = self._after_loading(incarnation.subject, incarnation.gpus)
        gone = self._ending(incarnation, leaving, needs)
        if incarnation.gpus:
            self._memory(incarnation, (gone,), leaving.reason, leaving.cause)
        else:
            self._vacating.append(incarnation)
            self._vacated_by[incarnation.id] = gone

    def _ending(self, incarnation: Incarnation, leaving: Leaving, needs: list[int]) -> int:
        subject, draft = incarnation.subject, self.draft
        stop = stop_for(draft.situation.spec, subject, incarnation)
        if incarnation.phase in ("exited", "vanished"):
            return self._add(
                "kill", subject, incarnation.gpus, needs, reason=leaving.reason, cause=leaving.cause,
                timeout_s=KILL_SLACK_S, predicted_s=0.1, incarnation=incarnation.id,
            )  # fmt: skip
        endpoint = draft.situation.spec.endpoints.get(subject.name) if subject.kind == "endpoint" else None
        times = (
            draft.situation.timings(endpoint)
            if endpoint
            else Timings(load_s=0.0, drain_s=stop.drain_s, stop_s=WORKLOAD_STOP_S)
        )
        drained_until = draining(draft, incarnation, stop)
        if drained_until is not None:
            left = drained_until.since(draft.now)
            drain = self._add(
                "drain", subject, incarnation.gpus, needs, reason=leaving.reason, cause=leaving.cause,
                timeout_s=stop.drain_s, predicted_s=min(left, times.drain_s), incarnation=incarnation.id,
            )  # fmt: skip
            needs = [drain]
            if incarnation.stop is not None:
                draft.wakes.append(drained_until)
        return self._add(
            "stop" if subject.kind == "endpoint" else "stop_workload", subject, incarnation.gpus, needs,
            reason=leaving.reason, cause=leaving.cause, timeout_s=stop.grace_s + KILL_SLACK_S, predicted_s=times.stop_s,
            incarnation=incarnation.id,
        )  # fmt: skip

    def _memory(self, incarnation: Incarnation, needs: tuple[int, ...], reason: str, cause: Cause) -> None:
        self._vacating.append(incarnation)
        endpoint = self.draft.situation.spec.endpoints.get(incarnation.subject.name)
        known = endpoint if incarnation.subject.kind == "endpoint" else None
        predicted_s = MEMORY_RETURN_S if known is None else memory_return_s(self.draft.situation.timings(known))
        self._vacated_by[incarnation.id] = self._add(
            "wait_memory", incarnation.subject, incarnation.gpus, needs, reason=reason, cause=cause,
            timeout_s=MEMORY_TIMEOUT_S, predicted_s=predicted_s, incarnation=incarnation.id,
        )  # fmt: skip

    def _after_departures(self, subject: Subject, gpus: tuple[str, ...], port: int | None) -> list[int]:
        """What must be gone first: whoever leaves these GPUs, this port, or is the subject's own predecessor."""
        return [
            self._vacated_by[i.id]
            for i in self._vacating
            if (i.subject == subject or set(i.gpus) & set(gpus) or (port is not None and i.port == port))
        ]

    # ------------------------------------------------------------ arriving

    def _arrival_order(self, item: Arriving) -> tuple[bool, bool, int, str]:
        """Overlays' own first, then by priority: the order in which engines load that share a GPU.

        Who failed again and again and is not to be tried yet comes last: the others would wait for its next failure.
        """
        endpoint = self.draft.wanted.get(item.subject.name)
        priority = endpoint.priority if endpoint else 0
        return (item.not_before is not None, item.overlay is None, -priority, item.subject.name)

    def _endpoint_start(self, item: Arriving, after: Iterable[int] = ()) -> int:
        draft = self.draft
        endpoint = draft.wanted.get(item.subject.name) or draft.situation.spec.endpoints[item.subject.name]
        needs = [
            *after,
            *self._after_departures(item.subject, item.gpus, endpoint.port),
            *self._after_loading(item.subject, item.gpus),
        ]
        not_before = 0.0 if item.not_before is None else draft.now.wall + item.not_before.since(draft.now)
        start = self._add(
            "start", item.subject, item.gpus, needs, reason=item.reason, cause=item.cause, timeout_s=SPAWN_TIMEOUT_S,
            predicted_s=SPAWN_S, not_before=not_before, held=item.not_before is not None, template=item,
        )  # fmt: skip
        ready = self._add(
            "wait_ready", item.subject, item.gpus, (start,), reason=item.reason, cause=item.cause,
            timeout_s=endpoint.health.startup_s, predicted_s=draft.situation.timings(endpoint).load_s,
        )  # fmt: skip
        self._note_loading(item.subject, item.gpus, ready)
        if item.overlay is not None:
            self._started_for.setdefault(item.overlay, []).append(start)
        return ready

    def _overlay_run(self, step: OverlayStep) -> None:
        """The workload's start, once its GPUs are free and what it requires is ready, and its end."""
        draft, overlay, record = self.draft, step.spec, step.record
        assert overlay is not None  # noqa: S101 - the caller filters
        subject = Subject("workload", record.name)
        cause = Cause("overlay", overlay.source, record.name)
        leases = [x for x in draft.leases if x.overlay == record.name]
        gpus = tuple(x.gpu for x in draft.leased(subject))
        required = [
            action
            for who, action in self._loaded_by.items()
            if who.name in draft.wanted and set(overlay.requires) & set(draft.wanted[who.name].capabilities)
        ]
        needs: list[int] = []
        yielding = [
            self._vacated_by[i] for i, x in draft.leaving.items() if x.overlay == record.name and i in self._vacated_by
        ]
        if overlay.workload is not None and record.state in ("admitted", "evicting", "starting"):
            if not draft.situation.living(subject):
                item = draft.arriving.get(subject)
                needs = [*self._after_departures(subject, gpus, None), *self._after_loading(subject, gpus)]
                needs += [*required, *yielding]
                start = self._add(
                    "start_workload", subject, gpus, needs, reason=f"the work of overlay {record.name}", cause=cause,
                    timeout_s=SPAWN_TIMEOUT_S, predicted_s=SPAWN_S, not_before=record.window_start,
                    held=item is None, template=item or arrival(draft, step, overlay),
                )  # fmt: skip
                needs = [start]
        elif record.state in ("admitted", "evicting", "starting"):
            for gpu in sorted({x.gpu for x in leases}):
                needs.extend(self._after_departures(subject, (gpu,), None))
            needs += [*required, *yielding]
        declared, usual = overlay.makespan.duration_s, draft.situation.ledger.runs.get(record.name)
        span = declared if declared is None or usual is None else min(declared, usual)
        if span is None:
            span = max(0.0, (overlay.makespan.deadline or draft.now.wall + UNKNOWN_RUN_S) - draft.now.wall)
        if record.active_since is not None:
            span = predicted_end(record, overlay.makespan, draft.now.wall, usual) - draft.now.wall
        end = self._add(
            "wait_end", subject, gpus, [*needs, *self._started_for.get(record.name, [])],
            reason=f"overlay {record.name} holds its GPUs", cause=cause,
            timeout_s=max(span, declared or 0.0) + overlay.makespan.grace_s, predicted_s=span,
            not_before=record.window_start,
        )  # fmt: skip
        if leases:
            end = self._add(
                "wait_memory", subject, tuple(sorted({x.gpu for x in leases})), (end,), reason="its memory comes back",
                cause=cause, timeout_s=MEMORY_TIMEOUT_S, predicted_s=MEMORY_RETURN_S,
            )  # fmt: skip
        self._ended_by[record.name] = (end,)

    def _overlay_end(self, step: OverlayStep) -> None:
        """What is left of an overlay that is over: its work and providers end, and their memory comes back."""
        name = step.record.name
        gpus = tuple(x.gpu for x in self.draft.leases if x.overlay == name)
        gone = self._after_departures(Subject("workload", name), gpus, None)
        if gone:
            self._ended_by[name] = tuple(gone)

    def _restorations(self) -> None:
        """The predicted way back of everything an overlay displaced."""
        for back in returning(self.draft, frozenset(self._ended_by)):
            if back.nap is not None:
                self._wake(back.endpoint.name, back.nap, [a for o in back.after for a in self._ended_by[o]])
            else:
                self._restore(back)

    def _restore(self, back: Return) -> None:
        endpoint, names = back.endpoint, ", ".join(sorted(back.holders))
        item = Arriving(
            Subject("endpoint", endpoint.name), back.gpus, back.memory_bytes, back.exclusive, endpoint.process_hash,
            f"{names} no longer {'needs' if len(back.holders) == 1 else 'need'} its place",
            Cause("restore", endpoint.source, back.holders[0]),
        )  # fmt: skip
        self._endpoint_start(item, [action for o in back.after for action in self._ended_by[o]])
