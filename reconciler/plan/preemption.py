"""Who may give way to whom, and why something that does not fit does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from math import inf
from typing import Protocol

from msgspec import Struct, field

from reconciler.clock import Instant
from reconciler.plan.board import Board, Need, Tenant, Victims
from reconciler.plan.draft import Window
from reconciler.plan.endpoints import EVICTION_WINDOW_S, Standing, cooling_down
from reconciler.plan.lacks import Refusal, lacking
from reconciler.plan.placement import Placement, place
from reconciler.plan.situation import Situation
from reconciler.spec.spec import EndpointSpec, OverlaySpec

RULES = (
    "NoConsent", "PriorityTooLow", "NotPreemptible", "FloorWouldBreak", "NoEvictionLeft", "CoolDown", "GpuUnknown",
    "WaitingForLease",
)  # fmt: skip
"""Every rule that can keep a tenant in its place, in the order in which they are named to people."""


class Asks(Protocol):
    """Who wants others to leave: an overlay."""

    @property
    def priority(self) -> int:
        """Whose is not lower stays."""

    @property
    def allow_baseline_eviction(self) -> bool:
        """Whether endpoints of the baseline may have to leave at all."""

    @property
    def requires(self) -> tuple[str, ...]:
        """Capabilities of which it needs a provider."""


class Homeless(Struct, frozen=True):
    """An endpoint that has no place: it asks for moves alone."""

    priority: int
    allow_baseline_eviction: bool = True
    requires: tuple[str, ...] = ()


class Consents(Struct, frozen=True, dict=True):  # for the properties that are cached
    """The rules of displacement for one that asks, as questions about tenants."""

    situation: Situation
    overlay: Asks
    endpoints: Mapping[str, EndpointSpec]
    """Every endpoint wanted now, as it is wanted now."""
    standings: Mapping[str, Standing]
    overlays: Mapping[str, OverlaySpec]
    """Live overlays: what they require stays, and lower ones may be displaced."""
    displaced: Mapping[str, tuple[str, ...]]
    """Live overlay → the endpoints it displaced: who takes its place keeps them away, and needs their consent."""
    vacated: frozenset[str] = frozenset()
    """Endpoints that the overlay itself sets aside: they count as gone already."""
    leaving: frozenset[str] = frozenset()
    """Endpoints that are about to leave anyhow: ready they may be, but not for long."""
    has_place: Callable[[str], bool] = lambda _: False
    """Whether a wanted endpoint runs and stays, or is about to be started."""
    calm: Collection[str] = frozenset()
    """Endpoints that are ready and of whose past nothing counts."""
    begin: Instant | None = None
    """When the overlay is to begin; None: now."""
    last: float = inf
    """Epoch seconds at which it has given its place back, whatever it does."""
    windows: tuple[Window, ...] = ()
    """Windows to come that it may not delay."""
    lent: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Overlay → the endpoints that run on its leases, or are to: where it has to leave they go with it, except those
    that somebody takes over."""
    ending: frozenset[str] = frozenset()
    """Overlays that are about to give back their places: nobody displaces them, and who comes back there counts."""

    @cached_property
    def placed(self) -> frozenset[str]:
        """Wanted endpoints that run and stay, or are about to be started."""
        return frozenset(filter(self.has_place, self.endpoints))

    @cached_property
    def floors(self) -> Mapping[str, int]:
        """Least number of ready providers: the set points', and one of whatever a live overlay requires."""
        return self._floors(self.required)

    @cached_property
    def required(self) -> frozenset[str]:
        """What live overlays require."""
        return frozenset(c for overlay in self.overlays.values() for c in overlay.requires)

    def floors_beside(self, victims: Victims) -> Mapping[str, int]:
        """The floors once these are gone, who then require nothing."""
        required = self.required_beside(victims)
        return self.floors if required is self.required else self._floors(required)

    def required_beside(self, victims: Victims) -> frozenset[str]:
        """What those live overlays require that are not among these victims."""
        if not any(key.startswith("overlay/") for key in victims):
            return self.required
        staying = (o for name, o in self.overlays.items() if f"overlay/{name}" not in victims)
        return frozenset(c for overlay in staying for c in overlay.requires)

    def _floors(self, required: Iterable[str]) -> Mapping[str, int]:
        floors = dict(self.situation.spec.floors)
        for capability in required:
            floors[capability] = max(1, floors.get(capability, 0))
        return floors

    def gone(self, victims: Victims, starts: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of the endpoints that are gone once these victims are, and what the overlay sets aside.

        With an overlay go the endpoints that run for it, but for those that are to run for somebody else (`starts`).
        """
        names = [key.partition("/") for key in victims]
        gone = self.vacated.union(name for kind, _, name in names if kind == "endpoint")
        lent = [self.lent[name] for kind, _, name in names if kind == "overlay" and name in self.lent]
        return gone.union(*(engines - starts for engines in lent)) if lent else gone

    def offered_by(self, names: Iterable[str]) -> frozenset[str]:
        """What these endpoints offer, as the set points describe them."""
        return frozenset(c for name in names for c in self.situation.spec.endpoints[name].capabilities)

    def may_displace(self, tenant: Tenant) -> bool:
        """Whether displacing this tenant by itself breaks no rule."""
        if tenant.priority >= self.overlay.priority:  # whoever is behind an overlay is one more reason against it
            return False
        if tenant.preemptible is None or self.windows:
            return not self.broken_by(tenant)
        consent = self.overlay.allow_baseline_eviction and tenant.preemptible
        return consent and self.situation.sees(tenant.holds)

    def broken_by(self, tenant: Tenant) -> frozenset[str]:
        """The rules that displacing this tenant would break by itself."""
        kind, _, name = tenant.key.partition("/")
        if kind == "overlay":
            other = self.overlays.get(name)
            preemptible = other is not None and other.workload is not None and other.workload.preemptible
            behind = [self.situation.spec.endpoints[n] for n in self._behind(name)]
            rules = {
                "NoConsent": bool(behind) and not self.overlay.allow_baseline_eviction,
                "PriorityTooLow": self._weight(tenant) >= self.overlay.priority,
                "NotPreemptible": not (preemptible or name in self.ending) or not all(e.preemptible for e in behind),
                "WaitingForLease": name in self.ending,
            }
            return frozenset(rule for rule, holds in rules.items() if holds)
        endpoint = self.endpoints.get(name)
        if endpoint is None and self.begin is not None and self.begin.wall > self.situation.now.wall:
            endpoint = self.situation.running.get(name)  # set aside by an overlay that is over by then
        standing = self.standings[name]
        if endpoint is None:  # it runs though nobody wants it, and cannot be read well enough to be stopped
            return frozenset({"GpuUnknown"})
        rules = {
            "NoConsent": not self.overlay.allow_baseline_eviction,
            "PriorityTooLow": tenant.priority >= self.overlay.priority,
            "NotPreemptible": not endpoint.preemptible,
            "NoEvictionLeft": self._promised_to(name) is not None,
            "CoolDown": self._tired(name) is not None,
            "GpuUnknown": standing.state == "unknown" or not self.situation.sees(tenant.holds),
        }
        return frozenset(rule for rule, holds in rules.items() if holds)

    def _behind(self, overlay: str) -> list[str]:
        """Endpoints that another overlay keeps away, and that whoever takes its place would keep away as well."""
        base = self.situation.spec.endpoints
        return [n for n in self.displaced.get(overlay, ()) if n in base and base[n].state == "running"]

    def _weight(self, tenant: Tenant) -> float:
        """The priority above which one has to be to displace it, and those behind it; -inf: it goes, and none is."""
        kind, _, name = tenant.key.partition("/")
        behind = self._behind(name) if kind == "overlay" else []
        own = [] if self._ends(tenant) else [tenant.priority]
        return max([*own, *(self.situation.spec.endpoints[n].priority for n in behind)], default=-inf)

    def _ends(self, tenant: Tenant) -> bool:
        """Whether this is the place of an overlay that is about to give it back."""
        kind, _, name = tenant.key.partition("/")
        return kind == "overlay" and name in self.ending

    def _tired(self, name: str) -> str | None:
        """Why an endpoint that runs may not be evicted again yet."""
        standing, policy = self.standings[name], self.situation.spec.policy
        if standing.current is None:
            return None
        return cooling_down(
            standing.record,
            self.begin or self.situation.now,
            max_evictions_per_hour=policy.max_evictions_per_hour,
            min_ready_s=policy.min_ready_s,
        )

    def _promised_to(self, name: str) -> str | None:
        """The window that could not have an endpoint's place any more, within the hour, if this overlay took it now."""
        if not self.windows:
            return None
        begin, evictions = (self.begin or self.situation.now).wall, self.standings[name].record.evictions
        here = [w for w in self.windows if name in w.victims]
        for window in here:
            hour = window.opens - EVICTION_WINDOW_S
            spent = [*evictions, begin, *(w.opens for w in here if w.opens < window.opens)]
            within = sum(hour < moment < window.opens for moment in spent)
            if hour < begin < window.opens and within >= self.situation.spec.policy.max_evictions_per_hour:
                return window.name
        return None

    def hinders(self, victims: Victims, starts: frozenset[str] = frozenset()) -> Window | None:
        """A window to come that could not displace whom it will, for want of providers, if these victims went.

        What the overlay itself requires has to be there beside the window's victims. Only windows count that
        open before all is back as it is.
        """
        if not self.windows:
            return None
        gone = self.gone(victims, starts)
        loads = [self.situation.timings(e).load_s for n in gone if (e := self.endpoints.get(n)) is not None]
        back = self.last + max(loads, default=0.0)
        for window in self.windows:
            if window.opens >= back or window.end <= (self.begin or self.situation.now).wall:
                continue
            floors = {**self.floors, **{c: max(1, self.floors.get(c, 0)) for c in window.requires}}
            for capability in {*floors, *self.overlay.requires}:
                offering = {n for n in self.placed if capability in self.endpoints[n].capabilities}
                left = offering.difference(window.victims)
                least = min(floors.get(capability, 0), len(left))
                if capability in self.overlay.requires and window.opens < self.last:
                    least = max(least, min(1, len(offering)))
                if len(left - gone) < least:
                    return window
        return None

    def floors_hold(self, victims: Victims, starts: frozenset[str] = frozenset()) -> bool:
        """Whether every capability keeps its floor of ready providers once the victims are gone.

        Of what this overlay and those that stay require, one provider has to stay that has a place, ready or not, or
        is among `starts`, those that begin or go on for this overlay; and windows to come keep their victims.
        """
        gone = self.gone(victims, starts)
        if self.hinders(victims, starts) is not None:
            return False
        if not all(self.floor_holds(c, floor, gone) for c, floor in self.floors_beside(victims).items()):
            return False
        return self.keeps_providers(self.required_beside(victims).union(self.overlay.requires), gone, starts)

    def keeps_providers(self, required: Iterable[str], gone: frozenset[str], starts: frozenset[str]) -> bool:
        """Whether of what is required one provider stays that has a place, ready or not, or one is started."""
        for capability in required:
            providers = {n for n in self.placed if capability in self.endpoints[n].capabilities}
            if providers and not providers - gone and capability not in self.offered_by(starts):
                return False
        return True

    def _floors_on(self, board: Board, starts: frozenset[str]) -> Callable[[Victims], bool]:
        """`floors_hold` for an overlay that begins now; for a window to come, as it will be on the board of its time.

        Whoever has a place there is counted as ready by then; what has to be there is what the set points say, and what
        overlays require that are not over by then.
        """
        if self.begin is None or self.begin.wall <= self.situation.now.wall:
            return lambda victims: self.floors_hold(victims, starts)
        base = self.situation.spec.endpoints
        lasting = {name: o for name, o in self.overlays.items() if f"overlay/{name}" in board.tenants}
        names = {key.partition("/")[2] for key in board.tenants if key.startswith("endpoint/")} | self.vacated
        names = names.union(*(self.lent.get(name, frozenset()) for name in lasting))
        there = {n: e for n in names if (e := self.endpoints.get(n) or base.get(n)) is not None}
        own = set(self.overlay.requires) - self.offered_by(starts)

        def hold(victims: Victims) -> bool:
            gone = self.gone(victims, starts)
            staying = (o for name, o in lasting.items() if f"overlay/{name}" not in victims)
            for capability, floor in self._floors(own.union(*(o.requires for o in staying))).items():
                offering = {n for n, e in there.items() if capability in e.capabilities}
                if len(offering - gone) < min(floor, len(offering)):
                    return False
            return self.hinders(victims, starts) is None

        return hold

    @cached_property
    def _ready(self) -> Mapping[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for name, endpoint in self.endpoints.items():
            ready = name in self.calm or self.standings[name].state == "healthy"
            if endpoint.capabilities and ready and name not in self.leaving:
                for capability in endpoint.capabilities:
                    found.setdefault(capability, set()).add(name)
        return {capability: frozenset(names) for capability, names in found.items()}

    def floor_holds(self, capability: str, floor: int, gone: frozenset[str]) -> bool:
        """Whether enough providers stay, of those that are ready, and of those that were and have a place.

        The second, so that one that restarts does not lose its place to whom its being ready kept out. A floor that is
        broken already is no reason against a victim that neither is ready nor was.
        """
        ready = self.ready_providers(capability)
        offering = {name for name in self.placed if capability in self.endpoints[name].capabilities}
        lasting = {name for name in offering if self.standings[name].record.ready_incarnation is not None}
        return all(len(providers - gone) >= min(floor, len(providers)) for providers in (ready, lasting))

    def ready_providers(self, capability: str) -> frozenset[str]:
        """Names of the endpoints that offer a capability, answer now and stay."""
        return self._ready.get(capability, frozenset())

    def seek(
        self,
        needs: Sequence[Need],
        board: Board,
        starts: frozenset[str] = frozenset(),
        *,
        waive: frozenset[str] = frozenset(),
    ) -> Placement | None:
        """The best lawful placement; with `waive`, as if those rules did not exist.

        `starts` are the names of those whose needs are among these because the overlay requires them.
        """
        floors = (lambda _: True) if "FloorWouldBreak" in waive else self._floors_on(board, starts)
        if not floors(frozenset()):
            return None
        may = (lambda t: self.broken_by(t) <= waive) if waive else self.may_displace
        return place(needs, board, may_displace=may, may_displace_all=floors)

    def explain(self, needs: Sequence[Need], board: Board, starts: frozenset[str] = frozenset()) -> Refusal:
        """Why `seek` found nothing: the first single rule whose absence would help, else what the box lacks.

        In order:
            1. one rule alone stands in the way: that rule, and the endpoints it protects; first a cool-down: it passes
            2. several do: the first of them, and all of them in the message
            3. nothing of ours could make room: foreign memory, unusable GPUs, or simply too little of it
        """
        there = {tenant.key: tenant for need in needs for gpu in need.candidates for tenant in board.on(gpu)}
        alone = {rule for tenant in there.values() if len(by := self.broken_by(tenant)) == 1 for rule in by}
        for rule in sorted(RULES, key=lambda rule: rule != "CoolDown"):  # 1
            if rule not in alone and rule != "FloorWouldBreak":
                continue  # without it nobody more could give way than did not do
            placement = self.seek(needs, board, starts, waive=frozenset({rule}))
            if placement is not None:
                return self._protected((rule,), placement, board)
        placement = self.seek(needs, board, starts, waive=frozenset(RULES))
        if placement is not None:  # 2
            broken = {r for key in placement.victims for r in self.broken_by(board.tenants[key])}
            if not self._floors_on(board, starts.union(*self.lent.values()))(placement.victims):  # were it to take over
                broken.add("FloorWouldBreak")
            return self._protected(tuple(r for r in RULES if r in broken), placement, board)
        return lacking(self.situation, needs)  # 3

    def _protected(self, rules: tuple[str, ...], placement: Placement, board: Board) -> Refusal:
        tenants = [board.tenants[key] for key in sorted(placement.victims)]
        messages, hints, known = [], [], ""
        for rule in rules:
            names = self._protected_by(rule, tenants)
            message, hint = self._told(rule, names, tenants, again=names == known)
            messages.append(message)
            hints.append(hint)
            known = names
        return Refusal(
            reason=rules[0],
            message="; and ".join(messages),
            alternatives=tuple(filter(None, hints)),
            transient=rules[0] in ("NoEvictionLeft", "CoolDown", "GpuUnknown", "NotPreemptible", "WaitingForLease"),
        )

    def _protected_by(self, rule: str, tenants: Sequence[Tenant]) -> str:
        """Names of those whose place it would need, and whom this rule keeps there, or brings back there."""
        victims = {tenant.key.partition("/")[2]: self.broken_by(tenant) for tenant in tenants}
        if rule == "FloorWouldBreak":
            window = self.hinders(frozenset(tenant.key for tenant in tenants))
            gone = {*victims, *self.vacated, *(window.victims if window is not None else ())}
            broken = self._broken_floors(frozenset(gone)) if window is None else set()
            offering = {n for n in gone if n in self.endpoints and broken & set(self.endpoints[n].capabilities)}
            return ", ".join(sorted(offering or gone))
        if rule == "WaitingForLease":
            return ", ".join(sorted(name for name, broken in victims.items() if rule in broken))
        kept = [t for t in tenants if rule in victims[t.key.partition("/")[2]]]
        return ", ".join(sorted({n for t in kept for n in self._who_stays(t)}))

    def _who_stays(self, tenant: Tenant) -> list[str]:
        """Whose place it is: of an overlay that ends, of those who come back there."""
        name = tenant.key.partition("/")[2]
        return self._behind(name) if self._ends(tenant) else [name]

    def _broken_floors(self, gone: frozenset[str]) -> set[str]:
        """Capabilities of which too few providers would stay; of a window to come: none that is known."""
        return {c for c, floor in self.floors.items() if floor and not self.floor_holds(c, floor, gone)}

    def _told(self, rule: str, names: str, tenants: Sequence[Tenant], *, again: bool) -> tuple[str, str]:
        """What stands in the way, and what would help; `again` whose place it is was told before."""
        place = f"it would need the place of {names}"
        match rule:
            case "NoConsent":
                return f"{place}, and may not evict", "set allow_baseline_eviction: true"
            case "PriorityTooLow":
                than = f"not lower than {self.overlay.priority}"
                message = f"the priority of {names} is {than}" if again else f"{place}, whose priority is {than}"
                return message, f"give it a priority above that of {names} ({max(map(self._weight, tenants)):g})"
            case "NotPreemptible":
                message = f"{names} may not be displaced" if again else f"{place}, which may not be displaced"
                return message, self._to_be_preemptible(tenants)
            case "FloorWouldBreak" if lost := self._lost(tenants):
                engines = "; ".join(f"{n}, which offers {', '.join(c)}, runs for {by}" for n, by, c in lost)
                holders = ", ".join(sorted({by for _, by, _ in lost}))
                return (
                    f"{place}, and would then not have what it requires: {engines}, and has no place beside this one",
                    f"wait for {holders} to end, or add a provider",
                )
            case "FloorWouldBreak":
                broken = self._broken_floors(self.vacated.union(*(t.key.partition("/")[2:] for t in tenants)))
                least = ", ".join(f"{c}: {f}" for c, f in sorted(self.floors.items()) if f and c in (broken or {c}))
                if not least:
                    required = {*self.overlay.requires, *(c for window in self.windows for c in window.requires)}
                    return f"without {names} nothing would offer {', '.join(sorted(required))}", "add a provider"
                message = f"without {names} fewer providers would be ready than have to be ({least})"
                return message, "lower min_available, or add a provider"
            case "NoEvictionLeft":
                windows = ", ".join(sorted({w for n in names.split(", ") if (w := self._promised_to(n)) is not None}))
                return f"{names} could then not give way to {windows} within the hour", "wait, or end before it"
            case "CoolDown":
                told = "; ".join(f"{name} {self._tired(name)}" for name in names.split(", "))
                return told, f"wait, or `reconciler reset {names}`"
            case "WaitingForLease":
                ending = [t for t in tenants if self._ends(t)]
                next_ = sorted({n for t in ending if len(self.broken_by(t)) > 1 for n in self._who_stays(t)})
                if next_:
                    return f"{names}, which ends, gives it back to {', '.join(next_)} first", ""
                return f"it waits for the place that {names}, which ends, is giving back", ""
            case _:
                return f"the GPUs of {names} cannot be read at the moment", "see `reconciler status`"

    def _lost(self, tenants: Sequence[Tenant]) -> list[tuple[str, str, list[str]]]:
        """Endpoints that would go with overlays among these, for whom each runs, and what of the required it offers."""
        base, required = self.situation.spec.endpoints, set(self.overlay.requires)
        overlays = sorted(name for kind, _, name in (t.key.partition("/") for t in tenants) if kind == "overlay")
        going = [(n, by, base.get(n)) for by in overlays for n in sorted(self.lent.get(by, ()))]
        return [(n, by, sorted(required.intersection(e.capabilities))) for n, by, e in going if e is not None]

    def _to_be_preemptible(self, tenants: Sequence[Tenant]) -> str:
        """What would have those of them give way that may not be displaced; of a reservation nothing but its end."""
        firm: list[str] = []
        ending: list[str] = []
        work: list[str] = []
        for tenant in tenants:
            kind, _, name = tenant.key.partition("/")
            if "NotPreemptible" not in self.broken_by(tenant):
                continue
            if kind == "endpoint" or name in self.ending:
                firm += [n for n in self._who_stays(tenant) if not self.situation.spec.endpoints[n].preemptible]
                continue
            ending.append(name)
            other = self.overlays.get(name)
            if other is not None and other.workload is not None and not other.workload.preemptible:
                work.append(name)
        hints = [f"set preemptible: true on {', '.join(firm)}"] if firm else []
        if ending:
            instead = f", or make the work of {', '.join(work)} preemptible" if work == ending else ""
            hints.append(f"wait for {', '.join(ending)} to end{instead}")
        return ", and ".join(hints)
