"""All waiting overlays at once, with the endpoints that look for a place: whom to admit, where, and in whose place.

Nothing is taken here; `admission` carries the choice out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, islice

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.plan import solver
from reconciler.plan.actions import Verdict
from reconciler.plan.asking import consents_of, own_needs, provider_choices, providers_of, running
from reconciler.plan.board import Board, Need, Tenant, Victims, endpoint_key
from reconciler.plan.draft import Draft
from reconciler.plan.moves import Answer, can_move, improve, way_back
from reconciler.plan.moving import under_way
from reconciler.plan.observed import Subject
from reconciler.plan.preemption import Consents
from reconciler.plan.search import Search, solve
from reconciler.plan.settling import need_elsewhere
from reconciler.plan.solver import PLACES, Mover, Problem
from reconciler.plan.why import judge, judge_moves
from reconciler.plan.windows import ahead_of, keeping_off, may_prolong
from reconciler.plan.wishes import MOST_TOGETHER, Choice, MayDisplace, Wish
from reconciler.spec.spec import GpuCount, OverlaySpec

MOST_CHOICES = 64
"""So many combinations of providers are tried for one overlay."""


class Asker(Struct, frozen=True):
    """A waiting overlay, with what it asks for."""

    overlay: OverlaySpec
    wish: Wish
    consents: Consents
    may_move: MayDisplace
    """Whom it may have started on other GPUs: the rules are those for victims, less that these need be preemptible."""


class Seat(Struct, frozen=True):
    """What one overlay gets."""

    overlay: OverlaySpec
    needs: tuple[Need, ...]
    """Those that it gets GPUs for; a provider that another overlay starts is not among them."""
    gpus: Mapping[Subject, tuple[str, ...]]
    victims: Victims
    """Whom it displaces."""
    moves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Endpoint that makes room for it -> the GPUs that it is started on in exchange."""

    @property
    def leavers(self) -> Victims:
        """The keys of all who leave for it."""
        return self.victims | {endpoint_key(name) for name in self.moves}


class Together(Struct, frozen=True):
    """The least choice for all of them."""

    seats: tuple[Seat, ...]
    """In the order in which they were asked for."""
    places: Mapping[str, tuple[str, ...]]
    """Endpoint that looks for a place → the GPUs left to it."""
    why: Callable[[], Verdict | None]
    """Finds out why these victims, by a search for others; None: there are none."""
    unmoved: tuple[str, ...] = ()
    """Endpoints that it was not tried to move, though it might have spared somebody: there is no solver, or they are
    too many."""


def seat_together(draft: Draft, overlays: Sequence[OverlaySpec]) -> Together:
    """The least choice for these overlays, the most important first and of equals the one that was due first.

    Endpoints that are about to be started and may choose their GPUs make room: each keeps a place, unless an overlay
    that may displace it takes the last one.
    """
    askers = [a for a in (_asker(draft, o) for o in overlays[:MOST_TOGETHER]) if a is not None]
    askers = _with_rivals(_grouped(askers))
    restless = _restless(draft)
    board = draft.board.without(frozenset(f"endpoint/{n}" for n in restless))
    wishes = [a.wish for a in askers]
    for name, need in restless.items():
        tenant = draft.board.tenants[f"endpoint/{name}"]
        takers = frozenset(a.wish.key for a in askers if a.consents.may_displace(tenant))
        wishes.append(Wish(tenant.key, ((need,),), may_prolong=_comes_not_back, yields=(takers, tenant.priority)))

    def law(victims: Victims, seated: frozenset[str]) -> bool:
        return lawful(askers, victims, seated)

    search = Search(wishes, board, law)
    core = search.least()
    if core is None:  # the work is bounded: everybody stays where they are, and is decided on one by one
        return Together((), {}, lambda: None)
    movers = {} if _nobody_waits(askers, core) else _movers(draft, askers, board)
    few = sum(len(m.need.candidates) * len(m.askers) for m in movers.values()) <= PLACES
    tried = bool(movers) and few and solver.is_available()
    answer = Answer(core, {}, {})
    if tried:
        draft.solved = True
        answer = improve(Problem(tuple(wishes), board, movers, way_back(draft, board), law), core)
    choice = answer.choice
    places = {s.name: g for s, g in choice.gpus.items() if choice.owners[s] == f"endpoint/{s.name}"}
    seats = tuple(_seat(a, answer) for a in askers if a.wish.key in choice.seated)

    def why() -> Verdict | None:
        if answer.places:
            return judge_moves(choice, core, answer.by, answer.places)
        if not choice.victims:
            return None
        runner_up, all_seen = search.next_best(choice)
        kept = {name for seat in seats if seat.victims for name in _kept_from(draft, seat)}
        return replace(judge(choice, runner_up, all_seen=all_seen), kept=tuple(sorted(kept)))

    unmoved = () if tried else tuple(key.partition("/")[2] for key in sorted(movers))
    return Together(seats, places, why, unmoved)


def _kept_from(draft: Draft, found: Seat) -> set[str]:
    """The windows for which GPUs are kept that have room for what this overlay needs, nobody giving way."""
    windows = ahead_of(draft, found.overlay, draft.now.wall)
    kept: set[str] = set()
    for need in own_needs(draft, found.overlay) or ():
        room = draft.board.room_for(need)
        kept.update(w.name for w in windows if not room.keys() <= set(keeping_off([w])(need).candidates))
    return kept


def _nobody_waits(askers: Sequence[Asker], choice: Choice) -> bool:
    """Whether all are seated and nobody gives way: no move makes that better."""
    return not choice.victims and all(a.wish.key in choice.seated for a in askers)


def _movers(draft: Draft, askers: Sequence[Asker], board: Board) -> dict[str, Mover]:
    """Who may be moved, by whom, and where to: not where a window to come has its place."""
    asking = {a.overlay.name for a in askers}
    off = keeping_off(w for w in draft.windows if w.name not in asking)
    found: dict[str, Mover] = {}
    movable = (endpoint_key(n) for n, e in draft.situation.spec.endpoints.items() if e.movable)
    for key in sorted(key for key in movable if key in board.tenants):
        need = can_move(draft, board.tenants[key])
        if need is None:
            continue
        by = frozenset(a.wish.key for a in askers if a.may_move(board.tenants[key]))
        if by:
            elsewhere = off(need)
            candidates = tuple(g for g in elsewhere.candidates if g in board.capacity)
            found[key] = Mover(replace(elsewhere, candidates=candidates), by)
    return found


def foreseen_moves(
    draft: Draft, overlay: OverlaySpec, begin: float, board: Board, off: Callable[[Need], Need]
) -> tuple[str, ...]:
    """Who would have to be moved for an overlay to have a place at a moment to come, nobody giving way.

    Nobody: it has none with moves either. The fewest GPUs moved to, by the core's own search: who may be moved
    is seated anew, at home if that goes.
    """
    own, consents = own_needs(draft, overlay), consents_of(draft, overlay, begin)
    movers: dict[str, Need] = {}
    for key in (endpoint_key(n) for n, e in draft.situation.spec.endpoints.items() if e.movable):
        tenant = board.tenants.get(key)
        need = can_move(draft, tenant) if tenant is not None else None
        if tenant is not None and need is not None and consents.broken_by(tenant) <= {"NotPreemptible"}:
            home = tuple(tenant.holds)
            candidates = tuple(g for g in need.candidates if g in home or g in off(need).candidates)
            movers[key] = replace(need, candidates=candidates, prefer=home)
    if own is None or not 0 < len(movers) <= MOST_TOGETHER:
        return ()
    rest = board.without([*movers, *map(endpoint_key, overlay.endpoints)])
    seated = [Wish(key, ((need,),)) for key, need in movers.items()]
    for providers in islice(provider_choices(draft, overlay, board, placeless=True), MOST_CHOICES):
        needs = tuple(off(need) for need in (*own, *providers))
        choice = solve([Wish(f"overlay/{overlay.name}", (needs,)), *seated], rest)
        if choice is not None:
            moved = [k for k, n in movers.items() if set(choice.gpus[n.subject]) != set(n.prefer)]
            lawful = consents.floors_hold(frozenset(moved), providers_of(overlay, providers))
            return tuple(sorted(k.partition("/")[2] for k in moved)) if lawful else ()
    return ()


def _asker(draft: Draft, overlay: OverlaySpec) -> Asker | None:
    """What it asks for; None: nothing offers what it requires."""
    own = own_needs(draft, overlay)
    if own is None:
        return None
    off = keeping_off(ahead_of(draft, overlay, draft.now.wall))
    choices = list(islice(provider_choices(draft, overlay, draft.board), MOST_CHOICES))
    options = tuple(tuple(off(need) for need in (*own, *providers)) for providers in choices)
    starts = tuple(frozenset(map(endpoint_key, providers_of(overlay, providers))) for providers in choices)
    if not options:
        return None
    consents = consents_of(draft, overlay)
    begun = frozenset(x.gpu for x in draft.leases if begins_before(draft, x.overlay, overlay))

    def may(tenant: Tenant) -> bool:
        return not begun & tenant.holds.keys() and consents.may_displace(tenant)

    def may_move(tenant: Tenant) -> bool:
        return not begun & tenant.holds.keys() and consents.broken_by(tenant) <= {"NotPreemptible"}

    wish = Wish(
        key=f"overlay/{overlay.name}",
        options=options,
        rank=overlay.priority,
        may_displace=may if begun else consents.may_displace,
        may_prolong=_may_prolong(draft, overlay),
        frees=frozenset(f"endpoint/{n}" for n in overlay.endpoints),
        starts=starts,
    )
    return Asker(overlay, wish, consents, may_move)


def _comes_not_back(tenant: Tenant) -> bool:
    """Whether an endpoint may have the place of one that leaves: an endpoint that gives way has its own again."""
    return not tenant.key.startswith("endpoint/")


def _may_prolong(draft: Draft, overlay: OverlaySpec) -> MayDisplace:
    """Whether it may have the place of a tenant that another overlay displaces."""

    def may(tenant: Tenant) -> bool:
        kind, _, name = tenant.key.partition("/")
        endpoint = draft.wanted.get(name) if kind == "endpoint" else None
        return endpoint is None or may_prolong(overlay, endpoint)

    return may


def begins_before(draft: Draft, name: str, overlay: OverlaySpec) -> bool:
    """Whether an overlay, not less important than another, is about to begin: an eviction on its GPUs delays it."""
    record = draft.steps[name].record
    return record.state in ("admitted", "evicting", "starting") and record.priority >= overlay.priority


def _grouped(askers: Sequence[Asker]) -> list[Asker]:
    """In groups of those that may evict and those that may not.

    Nobody gives way to one before, so that one which may not evict, and comes later, has a place.
    """
    groups = groupby(askers, key=lambda a: a.overlay.allow_baseline_eviction)
    return [replace(a, wish=replace(a.wish, group=i)) for i, (_, some) in enumerate(groups) for a in some]


def _with_rivals(askers: Sequence[Asker]) -> list[Asker]:
    """Those that set an endpoint which another would run are not admitted beside it."""

    def runs(asker: Asker) -> set[str]:
        needs = (n.subject for option in asker.wish.options for n in option)
        return {s.name for s in needs if s.kind == "endpoint"} | {e.name for e in running(asker.overlay)}

    def clash(one: Asker, other: Asker) -> bool:
        return bool(runs(one) & set(other.overlay.endpoints) or runs(other) & set(one.overlay.endpoints))

    rivals = {a.wish.key: frozenset(b.wish.key for b in askers if b is not a and clash(a, b)) for a in askers}
    return [replace(a, wish=replace(a.wish, rivals=rivals[a.wish.key])) for a in askers]


def _restless(draft: Draft) -> dict[str, Need]:
    """Endpoints that are about to be started and may choose among GPUs, in the order in which they were seated."""
    found: dict[str, Need] = {}
    for subject in draft.arriving:
        endpoint = draft.wanted.get(subject.name) if subject.kind == "endpoint" else None
        if endpoint is None or not isinstance(endpoint.gpus, GpuCount) or draft.leased(subject):
            continue
        if under_way(draft, endpoint.name) is not None:  # its place was promised, and others' way back hangs on it
            continue
        need = need_elsewhere(draft, endpoint)
        if (
            need is not None
            and 0 < need.count < len(need.candidates)
            and f"endpoint/{subject.name}" in draft.board.tenants
        ):
            found[subject.name] = need
    return found if len(found) <= MOST_TOGETHER else {}


def lawful(askers: Sequence[Asker], victims: Victims, seated: frozenset[str]) -> bool:
    """Whether every floor holds without these victims, with these overlays admitted, and whom they start.

    What an admitted overlay requires has a floor of one ready provider, unless one is started for it; and it keeps one
    that has a place, ready or not.
    """
    admitted = [a for a in askers if a.wish.key in seated]
    if not admitted:
        return True
    rules = admitted[0].consents
    base = rules.situation.spec.endpoints
    engines = (key.partition("/")[2] for key in seated if key.startswith("endpoint/"))
    starts = frozenset(n for n in engines if base[n].state == "standby")
    gone = rules.gone(victims, starts).union(*(a.consents.vacated for a in admitted))
    required = {c for a in admitted for c in a.overlay.requires}
    floors = dict(rules.floors_beside(victims))
    for capability in required - rules.offered_by(starts):
        floors[capability] = max(1, floors.get(capability, 0))
    if not all(rules.floor_holds(capability, floor, gone) for capability, floor in floors.items()):
        return False
    return rules.keeps_providers(required | rules.required_beside(victims), gone, starts)


def _seat(asker: Asker, answer: Answer) -> Seat:
    key, choice = asker.wish.key, answer.choice
    needs = {n.subject: n for option in asker.wish.options for n in option if choice.owners.get(n.subject) == key}
    gpus = {subject: choice.gpus[subject] for subject in needs}
    mine = [victim for victim, by in choice.victims.items() if answer.by.get(victim, by) == key]
    victims = frozenset(victim for victim in mine if victim not in answer.places)
    moves = {k.partition("/")[2]: answer.places[k] for k in mine if k in answer.places}
    return Seat(asker.overlay, tuple(needs.values()), gpus, victims, moves)
