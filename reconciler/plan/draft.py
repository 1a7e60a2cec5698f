"""`Draft`: a decision while it is being made. Nothing outside one call of `plan()` sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Blocked, Cause, Event, Verdict
from reconciler.plan.answers import Answers
from reconciler.plan.board import Board, Residents
from reconciler.plan.endpoints import Standing, as_tenant, stand
from reconciler.plan.ledger import EndpointRecord, Lease, Nap, OverlayRecord, Quarantine
from reconciler.plan.observed import Incarnation, Subject
from reconciler.plan.overlays import OverlayStep, advance
from reconciler.plan.situation import Situation
from reconciler.spec.spec import EndpointSpec

OVERRIDING = ("admitted", "evicting", "starting", "active", "overrun")
"""States in which an overlay's `set` and `requires` are in force."""
HOLDING = (*OVERRIDING, "completing")
"""States in which an overlay keeps its leases, and those it displaced stay displaced."""


class Leaving(Struct, frozen=True):
    """An incarnation that has to go."""

    incarnation: Incarnation
    reason: str
    cause: Cause
    overlay: str | None = None
    """The overlay it gives way to."""


class Arriving(Struct, frozen=True):
    """A subject that is to be started on these GPUs."""

    subject: Subject
    gpus: tuple[str, ...]
    memory_bytes: tuple[int, ...]
    exclusive: bool
    process_hash: str
    reason: str
    cause: Cause
    overlay: str | None = None
    not_before: Instant | None = None
    attempt: int = 0


class Window(Struct, frozen=True):
    """The place of one overlay whose time has not come. Moments are epoch seconds."""

    name: str
    priority: int
    opens: float
    """When its victims begin to leave: its start less their predicted drain, stop and return of memory."""
    start: float
    end: float
    """Predicted."""
    victims: tuple[str, ...]
    """Endpoints that will give way to it, as it looks now."""
    beside: Mapping[str, int]
    """GPU → bytes that others may hold there while it lasts; 0 where it is alone."""
    requires: tuple[str, ...] = ()
    """Capabilities of which a provider has to be there."""
    taken: bool = False
    """Of a schedule, not its next one: as it looks now, a window that is not less important has its place then."""


class Return(Struct, frozen=True):
    """The place of one endpoint that is away on somebody's account, and that it is to have again."""

    endpoint: EndpointSpec
    at: float
    """Epoch seconds at which it is predicted to be free again."""
    memory_bytes: Mapping[str, int]
    """GPU → bytes that it will want there."""
    exclusive: bool


class Draft(Struct):
    """Everything decided so far for one moment."""

    situation: Situation
    steps: dict[str, OverlayStep] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    standings: Answers[Standing] = field(default_factory=Answers)
    """How every endpoint stands, in order; how a calm one does is worked out when somebody asks."""
    calm: dict[str, Incarnation] = field(default_factory=dict)
    """Endpoints that nothing has to be decided on, and of which no overlay has spoken: each with what runs of it."""
    _stirring: tuple[str, ...] | None = None
    """Everybody else, as long as it is known."""
    roused: set[str] = field(default_factory=set)
    """Those that were calm when the decision began, and of which an overlay has spoken since."""
    moving: set[str] = field(default_factory=set)
    """Endpoints whose move begins with this decision."""
    residents: Residents = field(default_factory=Residents)
    """Everybody who was calm when the decision began, where they run."""
    records: dict[str, EndpointRecord] = field(default_factory=dict)
    wanted: dict[str, EndpointSpec] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    """Wanted endpoint → the overlay that overrides or demands it."""
    quarantines: dict[str, Quarantine] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Endpoint without a place → the GPUs chosen for it together with what others want."""
    # what seating produces; made anew each time it runs
    board: Board = field(default_factory=lambda: Board({}, {}))
    guests: dict[str, dict[str, int]] = field(default_factory=dict)
    """GPU → overlay → bytes of its reservation there that are used, and count as foreign memory already."""
    solved: bool = False
    """The solver was asked for moves."""
    unmoved: tuple[str, ...] = ()
    """Endpoints that might have been moved, and nobody tried."""
    windows: tuple[Window, ...] = ()
    """Windows to come that have a place."""
    returns: tuple[Return, ...] = ()
    """Endpoints that others keep from their place at the moment."""
    naps: dict[str, Nap] = field(default_factory=dict)
    """Endpoints that sleep, are about to, or wake up, by name."""
    leaving: dict[str, Leaving] = field(default_factory=dict)
    """By incarnation id."""
    arriving: dict[Subject, Arriving] = field(default_factory=dict)
    blocked: dict[Subject, Blocked] = field(default_factory=dict)
    owed: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """Endpoint that gave way to an overlay, or is set by one → GPUs that it is to have again, its bytes on each."""
    kept_off: dict[str, str] = field(default_factory=dict)
    """Endpoint without its place → the overlay, in force or to come, with whose end it is predicted to have it."""
    wakes: list[Instant] = field(default_factory=list)

    @classmethod
    def of(cls, situation: Situation) -> Draft:
        """Take in the facts: every overlay advanced, every endpoint judged."""
        draft = cls(situation)
        names = set(situation.spec.overlays) | set(situation.ledger.overlays)
        for name in sorted(names):
            step = advance(situation, name)
            if step is not None:
                draft.steps[name] = step
                if step.wake is not None:
                    draft.wakes.append(step.wake)
        draft.leases = [x for x in situation.ledger.leases if x.overlay in draft.steps and draft.steps[x.overlay].live]
        draft.bequeath()
        draft.leases += [x for step in draft.steps.values() for x in _adopted_leases(step, situation)]
        draft.quarantines = dict(situation.ledger.quarantines)
        draft.want()
        draft._take_in(situation.endpoint_names())
        return draft

    def _take_in(self, names: Mapping[str, None]) -> None:
        """Judge every endpoint that is not calm."""
        situation, remembered = self.situation, self.situation.ledger.endpoints
        base, wanted = situation.spec.endpoints, self.wanted

        def judge(name: str) -> Standing:
            if name in calm:
                return Standing(name, "healthy", "", calm[name], remembered[name], must_restart=None, wake=None)
            return stand(situation, name, wanted.get(name) or base.get(name))

        calm = dict(situation.calm)
        for name in self._spoken_of() & calm.keys():
            del calm[name]
        self.calm, self.standings, self._stirring = dict(calm), Answers(names, judge), None
        if len(calm) == len(names) and list(remembered) == list(names):  # as most often
            self.records = dict(remembered)
        else:
            self.records = {n: remembered[n] if n in calm else self.standings[n].record for n in names}
        for name in self.stirring():
            wake = self.standings[name].wake
            if wake is not None:
                self.wakes.append(wake)
        running = situation.running
        self.residents = Residents(
            lambda: (as_tenant(situation, run, running[name], ready=True, calm=True) for name, run in calm.items())
        )

    def rouse(self) -> None:
        """From here on decide on the endpoints of which an overlay speaks, and on those that are moved."""
        for name in self.calm.keys() & self._spoken_of():
            del self.calm[name]
            self.roused.add(name)
            self._stirring = None

    def _spoken_of(self) -> set[str]:
        """Endpoints that an overlay displaces, has moved, sets or asks for."""
        spoken = (
            {x.subject.name for x in self.leases if x.subject.kind == "endpoint"} | self.owners.keys() | self.moving
        )
        for step in self.steps.values():
            if step.record.state in HOLDING:
                spoken.update((*step.record.evicted, *step.record.moved))
        return spoken

    def stirring(self) -> tuple[str, ...]:
        """The endpoints that have to be decided on, in order."""
        if self._stirring is None:
            all_calm = len(self.calm) == len(self.standings)
            self._stirring = () if all_calm else tuple([name for name in self.standings if name not in self.calm])
        return self._stirring

    @property
    def now(self) -> Instant:
        """The moment of the decision."""
        return self.situation.now

    def has_place(self, name: str) -> bool:
        """Whether an endpoint runs and stays, awake, or is about to be started: as seated last."""
        if name in self.calm:
            return True
        current, nap = self.standings[name].current, self.naps.get(name)
        if Subject("endpoint", name) in self.arriving:
            return True
        return current is not None and current.id not in self.leaving and (nap is None or nap.waking is not None)

    def want(self) -> None:
        """Which endpoints are wanted now: the baseline, as overridden by overlays in force, the highest last."""
        base = self.situation.spec.endpoints
        self.wanted = dict(self.situation.running)
        self.owners = {}
        in_force = [s for s in self.steps.values() if s.spec is not None and s.record.state in OVERRIDING]
        for step in sorted(in_force, key=lambda s: (s.record.priority, s.record.name)):
            assert step.spec is not None  # noqa: S101 - narrowed by the filter above
            for name, endpoint in step.spec.endpoints.items():
                self.wanted.pop(name, None)
                self.owners[name] = step.record.name
                if endpoint.state == "running":
                    self.wanted[name] = endpoint
        for lease in self.leases:
            name, step = lease.subject.name, self.steps[lease.overlay]
            if lease.subject.kind != "endpoint" or step.record.state not in OVERRIDING:
                continue
            if name not in self.wanted and name in base:  # a standby provider that the overlay requires
                self.wanted[name] = base[name]
                self.owners[name] = lease.overlay

    def bequeath(self) -> None:
        """Hand the leases on standby providers of overlays that ended to one in force that requires them as well.

        Those of one that was displaced are not: whoever displaced it has taken over the provider, or has its place.
        """
        base = self.situation.spec.endpoints
        heirs = [s for s in self.steps.values() if s.spec is not None and s.record.state in OVERRIDING]
        seized = {name for s in self.steps.values() if s.live for name in s.record.seized}
        kept = []
        for lease in self.leases:
            provider = base.get(lease.subject.name) if lease.subject.kind == "endpoint" else None
            over = self.steps[lease.overlay].record.state not in OVERRIDING and lease.overlay not in seized
            if over and provider is not None and provider.state == "standby":
                heir = next((s for s in heirs if s.spec and set(s.spec.requires) & set(provider.capabilities)), None)
                lease = replace(lease, overlay=heir.record.name) if heir else lease  # noqa: PLW2901
            kept.append(lease)
        self.leases = kept

    def move(self, name: str, record: OverlayRecord) -> None:
        """Put an overlay into its next state, and say so."""
        self.steps[name] = replace(self.steps[name], record=record)

    def leased(self, subject: Subject) -> tuple[Lease, ...]:
        """The leases held for one subject, in NVML order."""
        mine = [x for x in self.leases if x.subject == subject]
        if len(mine) < 2:
            return tuple(mine)
        order = {uuid: i for i, uuid in enumerate(self.situation.gpus)}
        return tuple(sorted(mine, key=lambda x: order.get(x.gpu, len(order))))

    def evicted_from(self, name: str) -> dict[str, set[str]]:
        """The overlays that displaced this endpoint and still hold, each with the GPUs it holds against it.

        Among those are the places promised to who moves for it. An overlay that runs another version of the endpoint
        itself holds none against it.
        """
        found: dict[str, set[str]] = {}
        for step in self.steps.values():
            if name in step.record.evicted and step.record.state in HOLDING:
                leases = [x for x in self.leases if x.overlay == step.record.name]
                own = any(x.subject == Subject("endpoint", name) for x in leases)
                found[step.record.name] = set() if own else {x.gpu for x in leases}
                for other in step.record.moved if not own else ():
                    move = self.records[other].move if other in self.records else None
                    if move is not None and move.by == step.record.name:
                        found[step.record.name].update(move.gpus)
        return found

    def block(self, blocked: Blocked) -> None:
        """Name what cannot happen now; the first reason given for a subject stays."""
        self.blocked.setdefault(blocked.subject, blocked)

    def say(self, kind: str, subject: str, message: str, cause: Cause | str) -> None:
        """Add an event."""
        self.events.append(Event(kind, subject, message, str(cause)))

    def lender(self, name: str) -> str | None:
        """The overlay in force for which a standby endpoint was started that it requires; None: there is none."""
        endpoint = self.situation.spec.endpoints.get(name)
        if endpoint is None or endpoint.state != "standby":
            return None
        leases = self.leased(Subject("endpoint", name))
        step = self.steps[leases[0].overlay] if leases else None
        if step is None or step.spec is None or step.record.state not in OVERRIDING or name in step.spec.endpoints:
            return None
        return step.record.name

    def drop_leases(self, overlay: str, subjects: Iterable[Subject] | None = None) -> None:
        """Release an overlay's leases: all of them, or those of some subjects."""
        gone = None if subjects is None else set(subjects)
        self.leases = [x for x in self.leases if x.overlay != overlay or (gone is not None and x.subject not in gone)]


def _adopted_leases(step: OverlayStep, situation: Situation) -> list[Lease]:
    """What an overlay holds that was adopted from its workload: it has no leases in the ledger."""
    run, name = step.workload, step.record.name
    if name in situation.ledger.overlays or run is None or not step.live:
        return []
    return [
        Lease(name, run.subject, gpu, size, run.exclusive, run.started)
        for gpu, size in zip(run.gpus, run.memory_bytes, strict=True)
    ]
