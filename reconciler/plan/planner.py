"""`plan()`: the whole decision, from four values to one.

The order is fixed: take in the facts, seat everybody, let overlays move on and admit waiting ones until nothing moves,
then derive what to do from what was decided. Nothing here knows the box, a clock or a file.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan import solver
from reconciler.plan.actions import Action, Cause, EndpointView, Plan
from reconciler.plan.admission import admit_all
from reconciler.plan.agenda import forecast_entries, keep_agenda
from reconciler.plan.answers import Answers
from reconciler.plan.changes import cause_of, changes, drifts, is_converged
from reconciler.plan.draft import HOLDING, OVERRIDING, Draft
from reconciler.plan.graph import Graph
from reconciler.plan.guests import know_strangers
from reconciler.plan.ledger import TERMINAL, EndpointRecord, EndpointState, Ledger
from reconciler.plan.moving import remembered
from reconciler.plan.naps import asleep_for, begin
from reconciler.plan.observed import Incarnation, Observed, Subject
from reconciler.plan.progress import arrange_workload, progress, quarantine_overdue
from reconciler.plan.reboot import carried_over, say_that_the_box_went_down
from reconciler.plan.situation import Situation
from reconciler.plan.spans import account
from reconciler.spec.spec import Spec
from reconciler.units import counted

MAX_ROUNDS = 100
"""Each round moves an overlay at least one state on, and there are four states to pass in one decision."""


def plan(spec: Spec, observed: Observed, ledger: Ledger, now: Instant) -> Plan:
    """What to do about the difference between what should be and what is.

    Args:
        spec: the set points and overlays in force
        observed: one look at the box, not older than `now`
        ledger: what was decided before; leases, records, agenda
        now: the moment of the decision, on both clocks

    Returns:
        The plan, whose `ledger` has to be made durable before any of its actions runs.
    """
    situation = Situation(spec, observed, carried_over(ledger, observed, now), now)
    draft = Draft.of(situation)
    say_that_the_box_went_down(draft)
    quarantine_overdue(draft)
    for _ in range(MAX_ROUNDS):
        before = {name: step.record for name, step in draft.steps.items()}
        admit_all(draft)
        went_on = progress(draft)
        if before == {name: step.record for name, step in draft.steps.items()}:
            break
        if not went_on and not _anybody_waits(draft):  # all are seated for what was decided, and nobody is left
            break
        draft.want()
    for step in draft.steps.values():
        if step.record.state == "starting":
            arrange_workload(draft, step)
    draft.leases = know_strangers(draft)
    actions = Graph(draft).build()
    begin(draft, actions)
    stirring = draft.stirring()
    views = _views(draft, actions)
    _restate(draft, {name: views[name] for name in stirring})
    _say_how_they_give_way(draft)
    _say_moves(draft)
    agenda = keep_agenda(draft, actions)
    records = _records(draft)
    after = Ledger(
        boot_id=observed.boot_id,
        overlays={n: account(step, actions, draft.blocked, now) for n, step in sorted(draft.steps.items())},
        leases=tuple(sorted(draft.leases, key=lambda x: (x.overlay, x.subject, x.gpu))),
        endpoints=records,
        quarantines=dict(sorted(draft.quarantines.items())),
        agenda=agenda,
        timings=ledger.timings,
        runs=ledger.runs,
    )
    blocked = tuple(sorted(draft.blocked.values(), key=lambda b: b.subject))
    victims, moved = _victims(draft), sorted({name for verdict in draft.verdicts for name in verdict.moves})
    return Plan(
        spec_hash=spec.digest,
        observed_fingerprint=fingerprint(observed, situation),
        now=now,
        converged=is_converged(actions),
        drift=drifts(draft, views),
        changes=changes(draft, actions, blocked),
        actions=actions,
        blocked=blocked,
        budgets=_budgets(draft),
        objective={
            "victims": float(len(victims)),
            "moves": float(len(moved)),
            "lost_readiness_s": sum(draft.situation.timings(spec.endpoints[n]).load_s for n in (*victims, *moved)),
        },
        proof=_proof(draft),
        agenda=forecast_entries(draft, agenda, actions),
        ledger=after,
        events=tuple(draft.events),
        endpoints=views,
        next_wake=min((w for w in draft.wakes if w.mono > now.mono), key=lambda w: w.mono, default=None),
        archive=_archive(draft),
        verdicts=tuple(draft.verdicts),
        notes=_notes(draft),
        solved=draft.solved,
    )


def _anybody_waits(draft: Draft) -> bool:
    """Whether an overlay is to begin some time."""
    known = ((step.record.state, step.spec) for step in draft.steps.values() if step.spec is not None)
    return any(state == "pending" or spec.makespan.schedule is not None for state, spec in known)


def _notes(draft: Draft) -> tuple[str, ...]:
    """What people should know beyond the plan."""
    if not draft.unmoved:
        return ()
    names = ", ".join(draft.unmoved)
    if solver.is_available():
        return (f"{names} may be moved, and the box is too large to look for moves",)
    return (f"{names} may be moved to make room, and nobody is without the solver: `{solver.INSTALL}`",)


def _proof(draft: Draft) -> str:
    """How sure it is that nothing less would do, in a word."""
    if not draft.verdicts:
        return "nobody is displaced"
    return "optimal" if all(v.optimal for v in draft.verdicts) else "bounded"


def _victims(draft: Draft) -> list[str]:
    """Endpoints of the baseline that this decision displaces."""
    before = draft.situation.ledger.overlays
    admitted = [
        step.record
        for name, step in draft.steps.items()
        if step.record.state in OVERRIDING and (name not in before or before[name].state not in OVERRIDING)
    ]
    return sorted({n for record in admitted for n in record.evicted if n in draft.situation.spec.endpoints})


def fingerprint(observed: Observed, situation: Situation) -> str:
    """Hash of the observed facts that a decision reads; utilisation, times and small changes of memory are none.

    Nor is what strangers hold of the reserve, which is not planned: a desktop takes and gives back all the time.
    """
    step, reserve = 256 << 20, situation.spec.node.reserve_bytes
    strange = {uuid: max(0, room.foreign_bytes - reserve) // step for uuid, room in situation.rooms.items()}
    facts = (
        observed.boot_id,
        observed.gpus_known,
        tuple((g.uuid, g.state, g.healthy, strange[g.uuid]) for g in observed.gpus),
        _digest([i.id for i in observed.incarnations]),
        tuple(
            (i.id, i.phase, i.strays, i.exit_code, i.stop is not None)
            for i in situation.passing  # of the others no more than that they run
        ),
        tuple((answer, _digest(sorted(who))) for answer, who in sorted(_answers(observed).items(), key=repr)),
        tuple((port, holder.pid) for port, holder in sorted(observed.ports.items())),
        tuple(sorted(observed.obstacles)),
        tuple((n, r.state, r.attempt) for n, r in sorted(situation.ledger.overlays.items())),
        tuple((x.overlay, x.gpu) for x in situation.ledger.leases),
        tuple(sorted(situation.ledger.quarantines)),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _answers(observed: Observed) -> dict[tuple[bool | None, bool | None], list[str]]:
    """Who is ready, and who sleeps: few answers of many."""
    found: dict[tuple[bool | None, bool | None], list[str]] = defaultdict(list)
    for key, probe in observed.probes.items():
        found[probe.ready, probe.sleeping].append(key)
    return found


def _views(draft: Draft, actions: tuple[Action, ...]) -> Mapping[str, EndpointView]:
    """How every endpoint stands, by name; of a calm one it is said when somebody asks."""
    calm = draft.calm

    def as_ever(name: str) -> EndpointView:
        return EndpointView(name, "healthy", "running", "", calm[name].id, calm[name].gpus)

    views = Answers(draft.records, as_ever)
    for name in draft.stirring():
        views[name] = _view(draft, name, actions)
    return views


def _view(draft: Draft, name: str, actions: tuple[Action, ...]) -> EndpointView:
    """How one endpoint stands, in the words people see."""
    standing, subject = draft.standings[name], Subject("endpoint", name)
    blocked, arriving = draft.blocked.get(subject), draft.arriving.get(subject)
    state: EndpointState = standing.state
    wanted = name in draft.wanted
    if state == "stopped" and wanted:
        state = "failed" if draft.records[name].failed else "pending"
    holders = sorted(draft.evicted_from(name))
    reason = standing.reason
    current = standing.current
    if current is not None and current.id in draft.leaving and current.undying_since is None:
        reason = draft.leaving[current.id].reason
    elif name in draft.naps and holders:
        reason = asleep_for(holders, draft.naps[name])
    elif blocked is not None:
        reason = f"{blocked.reason}: {blocked.message}"
    elif state == "pending" and arriving is not None:
        start = next((a for a in actions if a.subject == subject and a.op == "start"), None)
        needs = [actions[n - 1] for n in start.needs] if start is not None else []
        before = [a for a in needs if a.op == "wait_ready"]
        first = next((a.subject.name for a in before if a.ready), before[0].subject.name if before else None)
        reason = arriving.reason
        if any(a.op == "wait_memory" for a in needs):
            reason = "WaitingForVram: memory on its GPUs is not seen free yet"
        elif first is not None:  # nobody else loads on a GPU meanwhile
            reason = f"{reason}; {first} loads there first"
    gpus = standing.current.gpus if standing.current else (arriving.gpus if arriving else ())
    known = draft.situation.spec.endpoints.get(name)
    set_point = known.state if known else "stopped"
    desired = "running" if wanted else ("displaced" if holders else set_point)
    dozes = name in draft.naps and draft.naps[name].waking is None
    if wanted and holders and (dozes or (standing.current is None and arriving is None)):
        desired = "displaced"
    incarnation = standing.current.id if standing.current else None
    return EndpointView(name, state, desired, reason, incarnation, gpus)


def _restate(draft: Draft, views: dict[str, EndpointView]) -> None:
    """Note each endpoint's new state in its record, with an event for a change; forget evictions that are over."""
    for name, view in views.items():
        record = draft.records[name]
        if record.evicted_by is not None:
            record = replace(record, evicted_by=_kept_away_by(draft, name, view, record.evicted_by))
        if view.state != record.state:
            cause = cause_of(draft, name)
            draft.say(view.state, name, view.reason or f"{record.state} -> {view.state}", cause)
            record = replace(record, state=view.state, state_since=draft.now)
        draft.records[name] = record


def _kept_away_by(draft: Draft, name: str, view: EndpointView, before: str) -> str | None:
    """The overlay on whose account an endpoint that was displaced is away now, or was last; None: it is back."""
    holders, owner, keeper = draft.evicted_from(name), draft.owners.get(name), draft.kept_off.get(name)
    if view.state == "healthy" and not holders:
        return None
    if before in holders:
        return before
    live = keeper is not None and draft.steps[keeper].record.state in HOLDING
    return next((n for n in (*sorted(holders), owner, keeper if live else None) if n is not None), before)


def _say_how_they_give_way(draft: Draft) -> None:
    """That one stops, and why it does not sleep, is known to the decision that displaces it, and to no later one."""
    leaving = (x for x in draft.leaving.values() if x.incarnation.subject.kind == "endpoint")
    how = {x.incarnation.subject.name: x.reason for x in leaving if x.cause.kind == "evict"}
    draft.events = [
        replace(e, message=how.get(e.subject, e.message)) if e.kind == "evicted" else e for e in draft.events
    ]


def _say_moves(draft: Draft) -> None:
    """One event for each overlay that is now in another state than before this decision."""
    for name, step in sorted(draft.steps.items()):
        before = draft.situation.ledger.overlays.get(name)
        if before is None or before.state != step.record.state:
            cause = Cause("overlay", step.record.source, name)
            draft.say(step.record.state, name, step.record.reason or f"overlay {name} is {step.record.state}", cause)


def _records(draft: Draft) -> dict[str, EndpointRecord]:
    """Records of endpoints that are still spoken of; `renew_before` is forgotten once it is fulfilled."""
    kept = dict(draft.records)
    for name in draft.stirring():
        record, standing = draft.records[name], draft.standings[name]
        fulfilled = record.renew_before is not None and (
            standing.state == "healthy"
            and standing.current is not None
            and standing.current.started.mono >= record.renew_before.mono
        )
        subject = Subject("endpoint", name)
        # nothing of it is left, and it is not its turn to start: displaced, blocked
        fulfilled = fulfilled or not (subject in draft.arriving or draft.situation.incarnations(subject))
        broken = record.nap if record.nap is not None and record.nap.failed is not None else None
        kept[name] = replace(
            record,
            renew_before=None if fulfilled else record.renew_before,
            nap=draft.naps.get(name, broken),  # until who broke is gone: his last answer may still be that he sleeps
            move=remembered(draft, name),
        )
    return kept


def _budgets(draft: Draft) -> tuple[str, ...]:
    limit = draft.situation.spec.policy.max_evictions_per_hour
    lines = []
    for name in draft.stirring():
        record = draft.records[name]
        if record.evictions:
            lines.append(f"{name}: {len(record.evictions)} of {limit} evictions this hour")
        endpoint = draft.wanted.get(name)
        if endpoint is not None and record.streak:
            ends = counted(record.streak, "unplanned end", "unplanned ends in a row")
            lines.append(f"{name}: {ends} (at most {endpoint.restart.max_restarts})")
    return tuple(lines)


def _archive(draft: Draft) -> tuple[str, ...]:
    """Ended incarnations that nothing needs to look at again: counted, and their memory back or given up on."""
    done = []
    for incarnation in draft.situation.passing:
        if incarnation.alive or not _counted(draft, incarnation):
            continue
        if draft.situation.memory_returned(incarnation):
            done.append(incarnation.id)
    return tuple(sorted(done))


def _counted(draft: Draft, incarnation: Incarnation) -> bool:
    if incarnation.phase not in ("exited", "vanished"):
        return False
    name = incarnation.subject.name
    if incarnation.subject.kind == "endpoint":
        record = draft.records.get(name)
        return record is None or any(e.incarnation == incarnation.id for e in record.exits)
    step = draft.steps.get(name)
    if step is None or incarnation.attempt < step.record.attempt:
        return True
    return step.record.state in ("pending", "completing", "restoring", *TERMINAL)
