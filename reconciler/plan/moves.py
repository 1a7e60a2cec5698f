"""Moves: who is started anew on other GPUs so that others fit.

A move is a departure with a place kept for it. The core's search decides on it as on a victim, except that it counts as
a move: what it costs is its lost readiness and the GPUs that it is started on. Which moves are worth trying is
proposed by `solver`; without it nobody is moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice, product
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from reconciler.plan.board import Board, Need, Tenant, endpoint_key
from reconciler.plan.draft import Draft
from reconciler.plan.moving import under_way
from reconciler.plan.observed import Subject
from reconciler.plan.pricing import Branch
from reconciler.plan.search import LIMIT, solve
from reconciler.plan.settling import own_need
from reconciler.plan.solver import Back, Places, Problem, Proposal, Work, compared, propose
from reconciler.plan.wishes import Choice, Cost, MayDisplace, Wish
from reconciler.spec.spec import GpuCount

TRIES = 12
"""So many proposals are carried out for one decision: the first usually is the answer."""
STEPS = 15_000
"""Of the core's search (`search.LIMIT`), for all that one decision carries out: an overlay that waits is decided on
anew at each look, which may take some tenths of a second longer for it."""
RETURN_STEPS = 2_000
"""Of those, to see that everybody of the baseline has a place to come back to after one answer."""
MOST_ANSWERING = 8
"""So many ways to say for whom each is moved are tried for one proposal: one box has two or three overlays waiting."""
FEW = 4
"""Of so many moves every part is tried, where it is not proved that all of them are needed."""
KEPT = "move/"


class Answer(Struct, frozen=True):
    """What came of the search for moves."""

    choice: Choice
    """The least that was found; the core's own if no moves make it less."""
    places: Places
    by: Mapping[str, str]
    """Key of a tenant that moves, or of a victim of who moves → the asker for whom it is."""


class _Budget(Struct):
    """What one decision may still spend on carrying proposals out."""

    left: int = STEPS

    def search(self, most: int, wishes: Sequence[Wish], board: Board, **how: Any) -> Choice | None:
        """`solve`, within what is left; one that finds nothing counts as having spent all that it was allowed."""
        limit = min(most, self.left)
        choice = solve(wishes, board, limit=limit, **how) if limit > 0 else None
        self.left -= limit if choice is None else choice.proof.steps
        return choice


# ---------------------------------------------------------------- the choice


def improve(problem: Problem, core: Choice) -> Answer:
    """The least answer with moves, never worse than the core's; how sure it is, is in its proof.

    Args:
        problem: what is asked
        core: the least answer without any move
    """
    best = Answer(core, {}, {})
    tried: list[Places] = []
    work, budget = Work(), _Budget()
    bound: Cost | None = None
    proved, all_tried = core.proof.optimal, True
    for _ in range(TRIES):
        if budget.left <= 0:
            bound = None
            break
        proposal = propose(problem, core, tried, work)
        if proposal is None:
            bound = None
            break
        bound = proposal.bound
        if bound >= compared(best.choice.cost):
            break
        for by in _answering(problem, proposal):
            if by is None:
                all_tried = False
                break
            found = _carried_out(problem, proposal.places, by, budget)
            if found is not None and found.choice.cost < best.choice.cost:
                best = found
                proved = found.choice.proof.optimal
        tried.append(proposal.places)
        if bound >= compared(best.choice.cost):
            break
    if proved and all_tried and budget.left > 0 and bound is not None and bound >= compared(best.choice.cost):
        return best
    return _as_bounded(_least_part(problem, best, budget), bound)


def _answering(problem: Problem, proposal: Proposal) -> Iterator[Mapping[str, str] | None]:
    """For whom each may be moved: as proposed, and every other way where that says who may give way to those that move.

    None at the end: there are more than `MOST_ANSWERING`.
    """
    if not proposal.places:
        return
    yield proposal.by
    board, meeting = problem.board.without(proposal.places), []
    for key, gpus in sorted(proposal.places.items()):
        need = problem.movers[key].need
        rooms = [board.free(gpu, alone=need.exclusive) for gpu in gpus]
        if any(free is None or free < need.memory_bytes[gpu] for gpu, free in zip(gpus, rooms, strict=True)):
            meeting.append(key)
        board.add(Tenant(key, 0, need.holds(gpus)))
    ways = product(*(sorted(problem.movers[key].askers) for key in meeting))
    others = (by for way in ways if (by := {**proposal.by, **dict(zip(meeting, way, strict=True))}) != proposal.by)
    yield from islice(others, MOST_ANSWERING)
    if next(others, None) is not None:
        yield None


def _as_bounded(answer: Answer, bound: Cost | None) -> Answer:
    """An answer of which it is not proved that nothing costs less."""
    choice = answer.choice
    least = (0,) * len(choice.cost)
    if bound is not None:
        known = min(bound, compared(choice.proof.bound), compared(choice.cost))
        least = (*known, *least[len(known) :])
    return replace(answer, choice=replace(choice, proof=replace(choice.proof, optimal=False, bound=least)))


def _least_part(problem: Problem, answer: Answer, budget: _Budget) -> Answer:
    """The same with as few of its moves as will do."""
    best = answer
    for some in _parts(sorted(answer.places)):
        places = {key: answer.places[key] for key in some}
        found = _carried_out(problem, places, answer.by, budget)
        if found is not None and found.choice.cost < best.choice.cost:
            best = found
    return best


def _parts(keys: list[str]) -> Iterator[tuple[str, ...]]:
    sizes = range(1, len(keys)) if len(keys) <= FEW else range(len(keys) - 1, len(keys))
    for size in sizes:
        yield from combinations(keys, size)


def _carried_out(problem: Problem, places: Places, by: Mapping[str, str], budget: _Budget) -> Answer | None:
    """What the core's search makes of these moves: the least answer in which at the most they are made.

    It is none
        1. that does not fit
        2. in which somebody moves for one that is not seated, or for another than the one that answers for those whom
           it meets
        3. in which somebody leaves who could stay
        4. after which somebody of the baseline would have no place to come back to, or is not seen to have one
    """
    board = problem.board.without(frozenset())
    moving: list[Wish] = []
    groups = {w.key: w.group for w in problem.wishes}
    rights = {w.key: w.may_displace for w in problem.wishes}
    for key, gpus in sorted(places.items()):
        tenant, need = board.tenants[key], problem.movers[key].need
        board.add(replace(tenant, moves=len(set(gpus) - tenant.holds.keys())))
        kept = replace(need, candidates=tuple(g for g in need.candidates if g in gpus), prefer=())
        may = _may(problem, by[key], rights[by[key]])
        wish = Wish(_kept(key), ((kept,),), may_displace=may, group=groups[by[key]], waits=True)
        moving.append(wish)
    asking = [
        w if w.rank is None else replace(w, may_displace=_may(problem, w.key, w.may_displace)) for w in problem.wishes
    ]
    wishes, askers = [*moving, *asking], {w.key for w in asking if w.rank is not None}

    def may_be(branch: Branch) -> bool:
        owners = {victim: _asker(by, taker) for victim, taker in branch.by.items()}
        leaving = [key for key in places if key in owners]
        answering = {key for key in leaving if _kept(key) in branch.by.values()}
        if any(owners[k] not in branch.seated & askers or (k in answering and owners[k] != by[k]) for k in leaving):
            return False  # 2
        return not _in_vain(board, branch) and _come_back(problem, branch, places, budget)  # 3, 4

    choice = budget.search(LIMIT, wishes, board, lawful=problem.lawful, may_be=may_be)
    if choice is None:
        return None  # 1
    needed = {key: gpus for key, gpus in places.items() if key in choice.victims}
    if len(needed) < len(places):
        return _carried_out(problem, needed, by, budget) if needed else None
    return Answer(choice, places, {victim: _asker(by, taker) for victim, taker in choice.victims.items()})


def _kept(key: str) -> str:
    """The key of the wish that keeps a place for who moves."""
    return KEPT + key.partition("/")[2]


def _asker(by: Mapping[str, str], taker: str) -> str:
    """For whom somebody leaves: the wish that takes the place, or the one for which the taker moves."""
    return by[endpoint_key(taker.removeprefix(KEPT))] if taker.startswith(KEPT) else taker


def _may(problem: Problem, asker: str, may_displace: MayDisplace | None) -> MayDisplace | None:
    """Whom a wish may have leave: whoever has a place to move to by the rules for moves, else by those for victims."""
    if may_displace is None:
        return None

    def may(tenant: Tenant) -> bool:
        if tenant.moves:
            return asker in problem.movers[tenant.key].askers
        return may_displace(tenant)

    return may


def _in_vain(board: Board, branch: Branch) -> bool:
    """Whether one of those that leave has room where it is all the same."""

    def has_room(tenant: Tenant, gpu: str) -> bool:
        own = _kept(tenant.key)
        holds = [hold for owner, hold in branch.taken.get(gpu, ()) if owner != own]
        holds += [t.holds[gpu] for t in board.on(gpu) if t.key not in branch.gone or t is tenant]
        alone = len(holds) == 1 or not any(hold.exclusive for hold in holds)
        return alone and sum(hold.memory_bytes for hold in holds) <= board.capacity[gpu]

    leaving = [board.tenants[key] for key in branch.by if key in board.tenants]
    return any(all(has_room(tenant, gpu) for gpu in tenant.holds) for tenant in leaving)


def _come_back(problem: Problem, branch: Branch, places: Places, budget: _Budget) -> bool:
    """Whether everybody of the baseline has a place once all overlays are over."""
    old = problem.board
    after = Board(old.capacity, old.numa)
    away: list[Wish] = []
    for key, back in problem.back.items():
        owner, gpus = branch.placed.get(back.need.subject, ("", ()))
        if key in places and key in branch.victims:
            after.add(Tenant(key, 0, problem.movers[key].need.holds(places[key])))
        elif owner == key:
            after.add(Tenant(key, 0, back.need.holds(gpus)))
        elif back.home is not None and key not in branch.gone:
            after.add(Tenant(key, 0, back.home))
        else:
            away.append(Wish(key, ((back.need,),)))
    return budget.search(RETURN_STEPS, away, after) is not None


# ---------------------------------------------------------------- who is in question


def way_back(draft: Draft, board: Board) -> dict[str, Back]:
    """Who of the baseline has to have a place in the end: who has one now, and who would have one without overlays.

    Args:
        draft: the decision so far, with everybody seated
        board: who has a place, without those that look for one
    """
    found: dict[str, Back] = {}
    outside: list[Wish] = []
    for name, endpoint in sorted(draft.situation.spec.endpoints.items()):
        if endpoint.state != "running" or draft.records[name].failed is not None or not endpoint.gpus.count:
            continue
        need, key = own_need(draft, endpoint), endpoint_key(name)
        if need is None:
            continue
        if key not in board.tenants:
            outside.append(Wish(key, ((need,),), rank=endpoint.priority))
            continue
        current = draft.standings[name].current
        home = board.tenants[key].holds
        if name in draft.naps and current is not None:
            home = replace(need, memory_bytes=dict(zip(current.gpus, current.memory_bytes, strict=True))).holds(
                current.gpus
            )
        found[key] = Back(need, home)
    if outside:
        baseline = Board(board.capacity, board.numa)
        for key, back in found.items():
            baseline.add(Tenant(key, 0, back.home or {}))
        choice = solve(outside, baseline)
        needs = {wish.key: wish.options[0][0] for wish in outside}
        found |= {key: Back(needs[key], None) for key in (choice.seated if choice is not None else ())}
    return found


def can_move(draft: Draft, tenant: Tenant) -> Need | None:
    """What a tenant needs elsewhere; None: it is not to be moved, whoever asks.

    1. it is no endpoint of the baseline that runs as its file says, with `movable: true` and a count of GPUs
    2. it sleeps, or is moved already
    """
    kind, _, name = tenant.key.partition("/")
    endpoint = draft.situation.spec.endpoints.get(name) if kind == "endpoint" else None
    if endpoint is None or not endpoint.movable or name in draft.owners or draft.wanted.get(name) != endpoint:
        return None  # 1
    current = draft.standings[name].current
    runs = current is not None and current.id not in draft.leaving and current.process_hash == endpoint.process_hash
    if (
        not runs
        or not isinstance(endpoint.gpus, GpuCount)
        or not endpoint.gpus.count
        or draft.leased(Subject("endpoint", name))
    ):
        return None  # 1
    if name in draft.naps or under_way(draft, name) is not None:
        return None  # 2
    return own_need(draft, endpoint)
