"""Seats, victims and moves together, by CP-SAT of ortools, the optional extra `solver`: what is worth trying.

A proposal says who moves where. Whether it may be so, who then gives way, and what it costs is not decided here: the
core's own search carries each proposal out, and those that it has seen are not proposed again. So the model may leave
out rules, never invent one: its bound holds for every answer.

One worker, a fixed seed, and a limit counted in work and not in seconds: the same problem gives the same proposal.
Nothing of ortools is loaded before a proposal is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from reconciler.plan.board import Board, Hold, Need, Victims
from reconciler.plan.wishes import DUE, LOST, MOVES, Choice, Cost, Levels, Wish

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

INSTALL = "pip install 'reconciler[solver]'"
WORK = 0.5
"""Of CP-SAT's deterministic units, each about a second, for one choice."""
EFFORTS = ((2, 1 / 2), (1, 1 / 4))
"""How strong the linear relaxations are that one part of a proposal is sought by, and how much of `WORK` that may take.
The strong ones prove the answer on many crowded boxes, where the weak ones prove none; where they do not, a search with
the weak ones goes on from what they found, and finds better answers in the same time."""
TOO_LITTLE = WORK / 4
"""With less left no proposal is begun: it came to nothing after one that took so much."""
MOST_CUTS = 50
"""So many sets of leavers that a floor forbids are ruled out for one proposal."""
PLACES = 20_000
"""Of more places to move to, counted once for each who asks, none is looked at: it is a fleet and not a box."""
WIDEST = 1 << 44
"""Parts of a cost are minimised together as long as their common range is smaller than this."""

Literal = Any  # a Boolean variable of CP-SAT, or 0 or 1; ortools ships no types that mypy reads
Places = Mapping[str, tuple[str, ...]]
"""Key of a tenant that moves → its new GPUs."""


class Mover(Struct, frozen=True):
    """A tenant that may be started anew on other GPUs."""

    need: Need
    """What it needs, on GPUs where it may be started; `prefer` is where it is."""
    askers: frozenset[str]
    """The wishes that may have it moved."""


class Back(Struct, frozen=True):
    """An endpoint that has to have a place in the end."""

    need: Need
    home: Mapping[str, Hold] | None
    """What it holds once it is back where it is now, awake; None: it has no place now."""


class Problem(Struct, frozen=True):
    """Who wants a place, who has one, who may be moved, and who has to be back in the end."""

    wishes: tuple[Wish, ...]
    """In the order of the core's search; those that may not be left out come last."""
    board: Board
    movers: Mapping[str, Mover]
    """By the key of the tenant."""
    back: Mapping[str, Back]
    """By key: endpoints that have to have a place once all overlays are over, with those that moved where they are."""
    lawful: Callable[[Victims, frozenset[str]], bool]


class Proposal(Struct, frozen=True):
    """Who moves where, and for whom."""

    places: Places
    by: Mapping[str, str]
    """Key of a tenant that moves → the wish that has it moved."""
    bound: Cost
    """Of the first parts, moves included: no answer that was not tried before costs less."""


class Work(Struct):
    """What one decision may still spend on proposals."""

    left: float = WORK


@cache  # looking for it takes a millisecond, and it is asked in every decision that may move somebody
def is_available() -> bool:
    """Whether ortools can be imported; it is not."""
    return find_spec("ortools") is not None


def can_be_imported() -> bool:
    """Whether ortools really can be imported; it is, which takes half a second."""
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return False
    return cp_model is not None


@cache
def version() -> str:
    """Which ortools is installed: a word for people, empty if none is."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return f"ortools {version_of('ortools')}"
    except PackageNotFoundError:
        return ""


def propose(problem: Problem, hint: Choice, tried: Sequence[Places], work: Work) -> Proposal | None:
    """The moves of the least answer that was not tried yet; None: none was found within the work allowed.

    Args:
        problem: what is asked
        hint: the core's answer, without any move, to begin with
        tried: places that the core's search has carried out already
        work: what may still be spent, and is spent here
    """
    if work.left < TOO_LITTLE:
        return None
    try:
        model = _Model(problem, tried, work)
    except ImportError:  # it is there, and its library does not fit this box: no reason for a daemon to end
        return None
    model.hint(hint)
    return model.solve()


def compared(cost: Cost) -> Cost:
    """The parts of a cost that are compared when moves are chosen: all up to the moves themselves."""
    return cost[: len(cost) + MOVES + 1]


class _Sum(Struct):
    """A part of the cost: a constant, and variables with their weights."""

    constant: int = 0
    terms: list[tuple[int, Literal]] = field(default_factory=list)

    def expression(self, weight: int) -> Any:
        return weight * (self.constant + sum(w * x for w, x in self.terms))

    @property
    def widest(self) -> int:
        """How many values it may have, at the most."""
        return 1 + sum(abs(w) for w, _ in self.terms)


class _Model:
    def __init__(self, problem: Problem, tried: Sequence[Places], work: Work) -> None:
        from ortools.sat.python import cp_model

        self._problem, self._board = problem, problem.board
        self._model = cp_model.CpModel()
        self._work = work
        self._levels = Levels(problem.wishes, problem.board)
        self._parts = [_Sum() for _ in self._levels.names]
        self._hints: dict[str, bool] = {}
        self._names: dict[str, Literal] = {}
        self._askers = [w for w in problem.wishes if w.rank is not None]
        self._seat = {w.key: self._bool("seat", w.key) for w in self._askers}
        self._at: dict[str, list[tuple[Hold, Literal, bool]]] = {g: [] for g in self._board.capacity}
        """GPU → what is held there if a literal holds, and whether it is new there."""
        self._later: dict[str, list[tuple[Hold, Literal, bool]]] = {g: [] for g in self._board.capacity}
        """The same once all overlays are over."""
        self._takes: dict[str, dict[str, list[Literal]]] = {w.key: {} for w in self._askers}
        """Asker → GPU → what is true if it takes a part of that GPU, or somebody does whom it has moved."""
        self._gone: dict[str, list[Literal]] = {}
        """Key → what is true if it leaves: as a victim, moved, or as a file says."""
        self._new: dict[str, dict[str, Literal]] = {}
        """Key of a mover → GPU → whether it moves there."""
        self._moved_by: dict[str, dict[str, Literal]] = {}
        self._leaves_for: list[tuple[str, str, Literal]] = []
        self._seats()
        self._movers()
        self._tenants()
        self._restless()
        self._near()
        self._way_back()
        self._rooms(self._at)
        self._rooms(self._later)
        for places in tried:
            self._not_again(places)

    # ------------------------------------------------------------ variables

    def _bool(self, *name: str) -> Literal:
        key = "/".join(name)
        if key not in self._names:
            self._names[key] = self._model.new_bool_var(key)
        return self._names[key]

    def _candidates(self, need: Need) -> list[str]:
        return [g for g in need.candidates if g in self._board.capacity]

    def _place(self, what: str, need: Need, given: Literal, where: dict[str, list[tuple[Hold, Literal, bool]]]) -> None:
        """Place a need on as many GPUs as it wants if `given` holds, on none otherwise."""
        taken = []
        for gpu in self._candidates(need):
            here = self._bool(what, need.subject.kind, need.subject.name, gpu)
            taken.append(here)
            where[gpu].append((Hold(need.memory_bytes[gpu], need.exclusive), here, True))
        self._model.add(sum(taken) == need.count * given)

    # ------------------------------------------------------------ who asks

    def _seats(self) -> None:
        """Each asker has one of the ways to have what it wants, or none; what two want both is met once."""
        active: dict[object, list[Literal]] = {}
        needs: dict[object, tuple[Need, set[str]]] = {}
        for position, wish in enumerate(self._askers):
            ways = [self._bool("way", wish.key, str(i)) for i in range(len(wish.options))]
            seat = self._seat[wish.key]
            self._model.add(sum(ways) == seat)
            for way, option in zip(ways, wish.options, strict=True):
                for need in option:
                    active.setdefault(need.subject, []).append(way)
                    needs.setdefault(need.subject, (need, set()))[1].add(wish.key)
            for rival in wish.rivals & self._seat.keys():
                self._model.add(seat + self._seat[rival] <= 1)
            left_out = self._parts[self._levels.seat(wish)]
            left_out.constant += 1
            left_out.terms.append((-1, seat))
            due = 1 << (len(self._askers) - 1 - position)
            self._parts[DUE].constant += due
            self._parts[DUE].terms.append((-due, seat))
        for subject, (need, askers) in needs.items():
            given = self._bool("given", str(subject), need.subject.kind)
            self._model.add_max_equality(given, active[subject])
            self._place("place", need, given, self._at)
            for gpu in self._candidates(need):
                here = self._bool("place", need.subject.kind, need.subject.name, gpu)
                if need.prefer and gpu not in need.prefer:
                    self._parts[MOVES].terms.append((1, here))
                for asker in askers:
                    self._takes[asker].setdefault(gpu, []).append(here)

    # ------------------------------------------------------------ who has a place

    def _movers(self) -> None:
        """Who may be moved: by whom, and where to."""
        for key, mover in self._problem.movers.items():
            self._new[key] = {}
            self._moved_by[key] = {}
            for gpu in self._candidates(mover.need):
                self._new[key][gpu] = self._bool("new", key, gpu)
            for asker in sorted(mover.askers):
                moved = self._bool("moved", key, asker)
                self._moved_by[key][asker] = moved
                for gpu in self._new[key]:  # who has it moved also answers for whom it meets there
                    here = self._bool("new", key, gpu, asker)
                    self._model.add_bool_and(self._new[key][gpu], moved).only_enforce_if(here)
                    self._takes[asker].setdefault(gpu, []).append(here)
            self._model.add(sum(self._new[key].values()) == mover.need.count * sum(self._moved_by[key].values()))
            for gpu, here in self._new[key].items():
                hold = Hold(mover.need.memory_bytes[gpu], mover.need.exclusive)
                self._at[gpu].append((hold, here, True))
                self._later[gpu].append((hold, here, True))
                if gpu not in mover.need.prefer:
                    self._parts[MOVES].terms.append((1, here))
            home = [here for gpu, here in self._new[key].items() if gpu in mover.need.prefer]
            if len(home) == mover.need.count:
                self._model.add(sum(home) < mover.need.count)

    def _tenants(self) -> None:
        """Who stays, who is a victim of whom, who moves, and who goes because a file says so."""
        for key, tenant in sorted(self._board.tenants.items()):
            leaves: list[Literal] = []
            for wish in self._askers:
                if wish.may_displace is not None and wish.may_displace(tenant):
                    victim = self._bool("victim", key, wish.key)
                    leaves.append(victim)
                    self._leaves_for.append((key, wish.key, victim))
                    self._parts[self._levels.victim(wish.key, tenant.priority)].terms.append((1, victim))
                    self._parts[LOST].terms.append((tenant.lost_ms, victim))
            for asker, moved in self._moved_by.get(key, {}).items():
                leaves.append(moved)
                self._leaves_for.append((key, asker, moved))
                self._parts[LOST].terms.append((tenant.lost_ms, moved))
            freeing = [self._seat[w.key] for w in self._askers if key in w.frees]
            if freeing:
                freed = self._bool("freed", key)
                self._model.add(sum(freeing) >= freed)
                leaves.append(freed)
            if not leaves:
                self._hold(tenant.holds, 1)
                continue
            stays = self._bool("stays", key)
            self._gone[key] = leaves
            self._model.add(sum(leaves) + stays == 1)
            for seat in freeing:
                self._model.add(seat + stays <= 1)
            self._hold(tenant.holds, stays)
        for _, asker, leaves_for in self._leaves_for:
            self._model.add_implication(leaves_for, self._seat[asker])

    def _hold(self, holds: Mapping[str, Hold], given: Literal) -> None:
        for gpu, hold in holds.items():
            if gpu in self._at:
                self._at[gpu].append((hold, given, False))

    def _near(self) -> None:
        """Nobody leaves for one that takes nothing of any of its GPUs, nor has anybody moved there."""
        for key, asker, leaves in self._leaves_for:
            there = [x for gpu in self._board.tenants[key].holds for x in self._takes[asker].get(gpu, ())]
            own = {self._bool("new", key, gpu, asker).index for gpu in self._new.get(key, {})}
            self._model.add_bool_or([x for x in there if x.index not in own]).only_enforce_if(leaves)

    def _restless(self) -> None:
        """Those that have to be seated, unless one that may takes their last place, or a file sets them aside."""
        for wish in self._problem.wishes[len(self._askers) :]:
            ((need,),) = wish.options
            takers, priority = wish.yields if wish.yields is not None else (frozenset[str](), 0)
            out: list[Literal] = []
            for asker in sorted(takers):
                by = self._bool("out", wish.key, asker)
                out.append(by)
                self._model.add_implication(by, self._seat[asker])
                self._parts[self._levels.victim(asker, priority)].terms.append((1, by))
            placed = self._bool("seated", wish.key)
            for asker in (w.key for w in self._askers if wish.key in w.frees):
                freed = self._bool("freed", wish.key, asker)
                out.append(freed)
                self._model.add_implication(freed, self._seat[asker])
                self._model.add(self._seat[asker] + placed <= 1)
            self._model.add(sum(out) + placed == 1)
            self._gone[wish.key] = out
            self._place("spot", need, placed, self._at)
            for gpu in self._candidates(need):
                here = self._bool("spot", need.subject.kind, need.subject.name, gpu)
                self._later[gpu].append((Hold(need.memory_bytes[gpu], need.exclusive), here, True))
                if need.prefer and gpu not in need.prefer:
                    self._parts[MOVES].terms.append((1, here))

    # ------------------------------------------------------------ what fits

    def _way_back(self) -> None:
        """Once all overlays are over, everybody who has to be back has a place: nobody was moved into it for good."""
        for key, back in self._problem.back.items():
            going = self._gone.get(key, [])
            for gpu, hold in (back.home or {}).items():
                if gpu in self._later:
                    self._later[gpu].append((hold, self._bool("stays", key) if going else 1, False))
            away: Literal = sum(x for x in going if x.index not in self._moves(key))
            if back.home is None and not going:
                away = 1
            if going or back.home is None:
                self._place("back", back.need, away, self._later)

    def _moves(self, key: str) -> set[int]:
        return {moved.index for moved in self._moved_by.get(key, {}).values()}

    def _rooms(self, where: Mapping[str, list[tuple[Hold, Literal, bool]]]) -> None:
        """No GPU holds more than it can; one that does already takes nobody in as long as it does."""
        for gpu, holds in where.items():
            capacity = -(-self._board.capacity[gpu] >> 20)
            load = sum((hold.memory_bytes >> 20) * literal for hold, literal, _ in holds)
            arriving = [literal for _, literal, new in holds if new]
            if sum(hold.memory_bytes >> 20 for hold, _, new in holds if not new) <= capacity:
                self._model.add(load <= capacity)
            else:
                for literal in arriving:
                    self._model.add(load <= capacity).only_enforce_if(literal)
            for position, (hold, literal, new) in enumerate(holds):
                for other, other_literal, other_new in holds[:position]:
                    if (hold.exclusive or other.exclusive) and (new or other_new):
                        self._model.add(literal + other_literal <= 1)

    def _not_again(self, places: Places) -> None:
        """These moves, and no others, were tried."""
        same: list[Literal] = []
        for key, new in self._new.items():
            chosen = places.get(key, ())
            same += [here if gpu in chosen else here.negated() for gpu, here in new.items()]
        self._model.add_bool_or([literal.negated() for literal in same])

    # ------------------------------------------------------------ answers

    def hint(self, choice: Choice) -> None:
        """Begin with an answer in which nobody moves."""
        true = {f"seat/{key}" for key in choice.seated} | {f"victim/{k}/{by}" for k, by in choice.victims.items()}
        for subject, gpus in choice.gpus.items():
            what = "spot" if choice.owners[subject] == f"endpoint/{subject.name}" else "place"
            true |= {f"{what}/{subject.kind}/{subject.name}/{gpu}" for gpu in gpus}
        for name, variable in self._names.items():
            if name.partition("/")[0] in ("seat", "victim", "place", "spot", "new", "moved"):
                self._model.add_hint(variable, name in true)

    def solve(self) -> Proposal | None:
        """The least answer, part after part; a law that it breaks is added, and it is sought anew."""
        for _ in range(MOST_CUTS):
            bound = self._minimise()
            if bound is None:
                return None
            solver, bounds = bound
            broken = self._broken(solver)
            if broken is None:
                return self._proposal(solver, bounds)
            self._model.add_bool_or([literal.negated() for literal in broken])
        return None

    def _minimise(self) -> tuple[cp_model.CpSolver, Cost] | None:
        """Each part of the cost in turn, those before it being kept as they are; with what is proved of each."""
        model, proved, bounds = self._model.clone(), True, []
        last: cp_model.CpSolver | None = None
        for chunk in self._chunks():
            weights, weight = [], 1
            for part in reversed(chunk):
                weights.append(weight)
                weight *= part.widest
            expression = sum(p.expression(w) for p, w in zip(chunk, reversed(weights), strict=True))
            model.minimize(expression)
            found = self._least(model)
            if found is None:
                return None
            last, least = found
            bounds += _values(chunk, list(reversed(weights)), least if proved else None)
            proved = proved and least == round(last.objective_value)
            model.add(expression <= round(last.objective_value))
            self._go_on_from(last, model)
        # of equal ones the one on the first GPUs, so that the answer is one and does not hang on the solver's ways
        order = {gpu: 1 + i + 1000 * self._board.contested.get(gpu, 0) for i, gpu in enumerate(self._board.capacity)}
        model.minimize(sum(order[g] * x for new in self._new.values() for g, x in new.items()))
        found = self._least(model)
        if found is not None:
            last, _ = found
        return None if last is None else (last, tuple(bounds))

    def _least(self, model: cp_model.CpModel) -> tuple[cp_model.CpSolver, int] | None:
        """The least answer that one effort after the other finds, until it is proved, and what none costs less than."""
        best: cp_model.CpSolver | None = None
        bounds: list[int] = []
        for relaxation, share in EFFORTS:
            solver = _solver(relaxation, min(WORK * share, self._work.left))
            if not _has_answer(solver, model, self._work):
                continue
            bounds.append(round(solver.best_objective_bound))
            if best is None or solver.objective_value < best.objective_value:
                best = solver
            if max(bounds) >= round(best.objective_value):
                break
            self._go_on_from(best, model)
        return None if best is None else (best, max(bounds))

    def _go_on_from(self, solver: cp_model.CpSolver, model: cp_model.CpModel) -> None:
        model.clear_hints()  # type: ignore[no-untyped-call] # ortools types its other methods, and not this one
        for variable in self._names.values():
            model.add_hint(variable, solver.value(variable))

    def _chunks(self) -> Iterable[list[_Sum]]:
        """The parts that are compared, each with those after it as long as their common range is not too wide."""
        chunk: list[_Sum] = []
        width = 1
        for part in self._parts[: len(self._parts) + MOVES + 1]:
            if chunk and width * part.widest > WIDEST:
                yield chunk
                chunk, width = [], 1
            chunk.append(part)
            width *= part.widest
        yield chunk

    def _broken(self, solver: cp_model.CpSolver) -> list[Literal] | None:
        """What of an answer no floor allows together: as little as that takes; None: it is lawful."""
        gone = {k: [x.name for x in xs if solver.boolean_value(x)] for k, xs in self._gone.items()}
        leaving = {k: self._away(k) for k, names in gone.items() if names and not names[0].startswith("freed/")}
        seated = {k: x for k, x in self._seat.items() if solver.boolean_value(x)}
        started = frozenset[str]().union(*(s for w in self._askers for s in w.starts))  # so that no more is cut than is

        def lawful() -> bool:
            return self._problem.lawful(frozenset(leaving), started.union(seated))

        if lawful():
            return None
        for some in (leaving, seated):
            for key in sorted(some):
                literal = some.pop(key)
                if lawful():
                    some[key] = literal
        return [*leaving.values(), *seated.values()]

    def _away(self, key: str) -> Literal:
        """Whether a tenant leaves, for whomever."""
        known = f"away/{key}" in self._names
        away = self._bool("away", key)
        if not known:
            self._model.add_max_equality(away, self._gone[key])
        return away

    def _proposal(self, solver: cp_model.CpSolver, bounds: Cost) -> Proposal:
        places = {
            key: tuple(g for g, here in new.items() if solver.boolean_value(here)) for key, new in self._new.items()
        }
        places = {key: gpus for key, gpus in places.items() if gpus}
        by = {k: next(a for a, x in self._moved_by[k].items() if solver.boolean_value(x)) for k in places}
        # the core numbers those that have to be seated as well
        shift = len(self._problem.wishes) - len(self._askers)
        due = len(bounds) + DUE - MOVES - 1
        return Proposal(places, by, (*bounds[:due], bounds[due] << shift, *bounds[due + 1 :]))


def _solver(relaxation: int, work: float) -> cp_model.CpSolver:
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = relaxation
    solver.parameters.max_deterministic_time = work
    return solver


def _has_answer(solver: cp_model.CpSolver, model: cp_model.CpModel, work: Work) -> bool:
    from ortools.sat.python import cp_model

    if work.left <= 0:
        return False
    found = solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    work.left -= solver.deterministic_time
    return found


def _values(chunk: Sequence[_Sum], weights: Sequence[int], bound: int | None) -> list[int]:
    """The least value of each part that a bound of their weighted sum allows, compared from left to right.

    A part may be negative less its constant, so each is counted from the least that it can be.
    """
    least = [part.constant + sum(w for w, _ in part.terms if w < 0) for part in chunk]
    if bound is None:
        return least
    left = bound - sum(w * v for w, v in zip(weights, least, strict=True))
    values = []
    for weight, base in zip(weights, least, strict=True):
        values.append(base + max(0, left) // weight)
        left = max(0, left) % weight
    return values
