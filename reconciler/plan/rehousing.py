"""A place for endpoints that have none: those that may be moved make room for them, as they do for overlays.

Asked once all overlays are decided on, of those alone that lost their place, or never had one, to other endpoints. Who
is away on an overlay's account comes back when that is over.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reconciler.plan import solver
from reconciler.plan.board import Board, Need, Tenant, Victims, endpoint_key
from reconciler.plan.draft import OVERRIDING, Draft
from reconciler.plan.moves import can_move, improve, way_back
from reconciler.plan.moving import begin
from reconciler.plan.preemption import Consents, Homeless
from reconciler.plan.search import Search, solve
from reconciler.plan.settling import own_need, port_taken
from reconciler.plan.solver import PLACES, Mover, Problem
from reconciler.plan.why import judge_moves
from reconciler.plan.windows import keeping_off
from reconciler.plan.wishes import MOST_TOGETHER, Wish


def rehouse(draft: Draft) -> bool:
    """Have some moved so that endpoints without a place get one; True if that was decided: all have to be seated anew.

    Nobody gives way to them. As many as possible get a place, the most important first, with the least lost readiness
    of those who move, then the fewest GPUs moved to.
    """
    homeless = _homeless(draft)
    if not homeless:
        return False
    consents = {key: _consents(draft, need) for key, need in homeless.items()}
    movers = _movers(draft, consents)
    homeless = {key: need for key, need in homeless.items() if _might_fit(draft.board, key, need, movers)}
    movers = {k: replace(m, askers=m.askers & homeless.keys()) for k, m in movers.items() if m.askers & homeless.keys()}
    if not movers:
        return False
    few = sum(len(m.need.candidates) * len(m.askers) for m in movers.values()) <= PLACES
    if not few or not solver.is_available():
        draft.unmoved = tuple(sorted({*draft.unmoved, *(key.partition("/")[2] for key in movers)}))
        return False
    wishes = tuple(
        Wish(key, ((need,),), rank=draft.wanted[need.subject.name].priority, may_displace=_nobody)
        for key, need in homeless.items()
    )
    rules = next(iter(consents.values()))

    def law(victims: Victims, _seated: frozenset[str]) -> bool:
        gone = frozenset(key.partition("/")[2] for key in victims)
        holds = all(rules.floor_holds(capability, floor, gone) for capability, floor in rules.floors.items())
        return holds and rules.hinders(victims) is None

    core = Search(wishes, draft.board, law).least()
    if core is None:
        return False
    draft.solved = True
    answer = improve(Problem(wishes, draft.board, movers, way_back(draft, draft.board), law), core)
    if not answer.places:
        return False
    draft.verdicts.append(judge_moves(answer.choice, core, answer.by, answer.places))
    for key, gpus in sorted(answer.places.items()):
        begin(draft, key.partition("/")[2], gpus, answer.by[key])
    draft.places |= {s.name: g for s, g in answer.choice.gpus.items() if endpoint_key(s.name) in homeless}
    return True


def _homeless(draft: Draft) -> dict[str, Need]:
    """By key, the most important first: endpoints of the baseline whose place others of it have."""
    base, found = draft.situation.spec.endpoints, []
    for subject, blocked in draft.blocked.items():
        endpoint = base.get(subject.name) if subject.kind == "endpoint" else None
        if endpoint is None or blocked.reason != "InsufficientGpus" or draft.wanted.get(subject.name) != endpoint:
            continue
        away = draft.evicted_from(subject.name) or subject.name in draft.owners
        need = own_need(draft, endpoint)
        idle = draft.standings[subject.name].current is None and port_taken(draft, endpoint) is None
        if need is not None and not away and idle:
            found.append((-endpoint.priority, endpoint.name, need))
    return {endpoint_key(name): need for _, name, need in sorted(found)[:MOST_TOGETHER]}


def _consents(draft: Draft, need: Need) -> Consents:
    """The rules for those whom an endpoint without a place may have moved."""
    live = {n: s.spec for n, s in draft.steps.items() if s.spec is not None and s.record.state in OVERRIDING}
    return Consents(
        draft.situation,
        Homeless(draft.wanted[need.subject.name].priority),
        draft.wanted,
        draft.standings,
        live,
        displaced={},
        leaving=frozenset(x.incarnation.subject.name for x in draft.leaving.values()),
        has_place=draft.has_place,
        calm=draft.calm.keys(),
        begin=draft.now,
        last=draft.now.wall,
        windows=draft.windows,
    )


def _movers(draft: Draft, consents: Mapping[str, Consents]) -> dict[str, Mover]:
    """Who may be moved, by whom, and where to: not where a window to come has its place."""
    off, found = keeping_off(draft.windows), {}
    for name, endpoint in sorted(draft.situation.spec.endpoints.items()):
        tenant = draft.board.tenants.get(endpoint_key(name)) if endpoint.movable else None
        need = can_move(draft, tenant) if tenant is not None else None
        if tenant is None or need is None:
            continue
        by = frozenset(key for key, rules in consents.items() if rules.broken_by(tenant) <= {"NotPreemptible"})
        if by:
            elsewhere = off(need)
            candidates = tuple(g for g in elsewhere.candidates if g in draft.board.capacity)
            found[tenant.key] = Mover(replace(elsewhere, candidates=candidates), by)
    return found


def _might_fit(board: Board, key: str, need: Need, movers: Mapping[str, Mover]) -> bool:
    """Whether all whom it may have moved find places beside it, wherever: where not, no solver is asked."""
    mine = {k: m.need for k, m in movers.items() if key in m.askers}
    for mover, elsewhere in mine.items():  # who stays has its place as well
        home = board.tenants[mover].holds
        candidates = tuple(
            g for g in board.capacity if g in elsewhere.candidates or g in home.keys() & elsewhere.memory_bytes.keys()
        )
        mine[mover] = replace(elsewhere, candidates=candidates)
    wishes = [Wish(key, ((need,),)), *(Wish(mover, ((anywhere,),)) for mover, anywhere in mine.items())]
    return bool(mine) and solve(wishes, board.without(mine)) is not None


def _nobody(_tenant: Tenant) -> bool:
    return False
