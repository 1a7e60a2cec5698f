"""What must hold of every single plan, whatever the box: told from the plan and the observation alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from builders import spec
from msgspec import Struct
from msgspec.structs import replace
from plant import Plant, Run

from reconciler.plan.actions import Action, Plan
from reconciler.plan.ledger import LIVE, Ledger
from reconciler.plan.naps import rested
from reconciler.plan.observed import Gpu, Incarnation, Observed, Subject
from reconciler.plan.planner import plan
from reconciler.plan.situation import Situation
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Spec
from reconciler.units import GIB

DESTRUCTIVE = ("drain", "stop", "kill", "sleep", "stop_workload")


class _Share(Struct, frozen=True):
    """A part of one GPU that somebody may hold at some moment of carrying out a plan."""

    who: str
    gpu: str
    size: int
    exclusive: bool
    begins: int | None
    """The action from which it is held; None: it is held already."""
    ends: frozenset[int]
    """Actions of which each says that it is held no more."""
    guest: int = 0
    """Of a reservation: so much of it is held by strangers to us."""


class Account(Struct, frozen=True, dict=True):
    """One decision with its inputs."""

    spec: Spec
    observed: Observed
    before: Ledger
    plan: Plan

    def check(self) -> None:
        """Everything at once."""
        self.graph_is_ordered()
        self.no_prefix_oversubscribes()
        self.starts_wait_for_those_who_leave()
        self.victims_are_lawful()
        self.moves_are_lawful()
        self.floors_hold()
        self.gangs_are_whole()
        self.the_unknown_is_left_alone()
        self.only_ours_are_named()
        self.only_the_living_hold_leases()

    # ------------------------------------------------------------ order

    @cached_property
    def ancestors(self) -> dict[int, frozenset[int]]:
        """Action → everything that has to have succeeded before it begins."""
        found: dict[int, frozenset[int]] = {}
        for action in self.plan.actions:
            found[action.id] = frozenset(action.needs).union(*(found[n] for n in action.needs))
        return found

    def graph_is_ordered(self) -> None:
        """Ids are ordinal, needs come first (so there is no cycle), and ready means that nothing is needed."""
        for position, action in enumerate(self.plan.actions, start=1):
            assert action.id == position
            assert all(0 < n < action.id for n in action.needs)
            assert not (action.ready and action.needs)
            assert action.expected[0] <= action.expected[1]
            assert all(self.plan.actions[n - 1].expected[1] <= action.expected[0] for n in action.needs)

    # ------------------------------------------------------------ memory

    @cached_property
    def overlay_ends(self) -> dict[str, frozenset[int]]:
        """Overlay → the actions after which it is over and its memory back."""
        ends: dict[str, frozenset[int]] = {}
        waits = {a.id: a.subject.name for a in self.plan.actions if a.op == "wait_end"}
        for action in self.plan.actions:
            if action.op == "wait_memory" and set(action.needs) & set(waits):
                ends[action.subject.name] = frozenset({action.id})
        return ends

    def _nap_shares(self, i: Incarnation) -> list[_Share]:
        """One that sleeps, or is about to: what it keeps, what it holds until it is asleep, and from its waking on."""
        nap = self.plan.ledger.endpoints[i.subject.name].nap
        endpoint = next(e for e in self._known if e.name == i.subject.name)
        kept = endpoint.profile.residual_bytes
        seen = any(a.op == "wait_memory" and a.incarnation == i.id for a in self.plan.actions)
        asleep = (
            rested(Situation(self.spec, self.observed, self.before, self.plan.now), endpoint, i, nap) if nap else False
        )
        wakes = [a.id for a in self.plan.actions if a.op == "wake" and a.incarnation == i.id]
        ends = self._incarnation_ends(i)
        found = []
        for gpu, size in zip(i.gpus, i.memory_bytes, strict=True):
            found.append(_Share(f"{i.id} asleep", gpu, min(kept, size), False, None, frozenset()))
            if not asleep:
                freed = frozenset(a.id for a in self.plan.actions if a.op == "wait_memory" and a.incarnation == i.id)
                found.append(
                    _Share(
                        f"{i.id} falling asleep", gpu, max(0, size - kept), i.exclusive, None, freed if seen else ends
                    )
                )
            for wake in wakes:
                found.append(_Share(f"#{wake} {i.id} waking", gpu, max(0, size - kept), i.exclusive, wake, frozenset()))
        return found

    @property
    def _known(self) -> list[EndpointSpec]:
        return [*self.spec.endpoints.values(), *(e for o in self.spec.overlays.values() for e in o.endpoints.values())]

    def _naps(self, i: Incarnation) -> bool:
        record = self.plan.ledger.endpoints.get(i.subject.name) if i.subject.kind == "endpoint" else None
        going = any(a.incarnation == i.id and a.op in ("stop", "kill") for a in self.plan.actions)
        return record is not None and record.nap is not None and record.nap.incarnation == i.id and not going

    def _incarnation_ends(self, incarnation: Incarnation) -> frozenset[int]:
        own = {a.id for a in self.plan.actions if a.op == "wait_memory" and a.incarnation == incarnation.id}
        leases = self.plan.ledger.leases
        holders = {x.overlay for x in leases if x.subject == incarnation.subject and x.gpu in incarnation.gpus}
        return frozenset(own).union(*(self.overlay_ends.get(o, frozenset()) for o in holders))

    @cached_property
    def shares(self) -> list[_Share]:
        """Everybody who holds something now or is started by the plan."""
        found = []
        for i in self.observed.incarnations:
            if self._naps(i):
                found += self._nap_shares(i)
            elif i.alive or i.id not in self.plan.archive:
                ends = self._incarnation_ends(i)
                for gpu, size in zip(i.gpus, i.memory_bytes, strict=True):
                    found.append(_Share(i.id, gpu, size, i.exclusive, None, ends))
        for a in self.plan.actions:
            if a.op in ("start", "start_workload"):
                ends = self.overlay_ends.get(a.overlay or "", frozenset())
                for gpu, size in zip(a.gpus, a.memory_bytes, strict=True):
                    found.append(_Share(f"#{a.id} {a.subject}", gpu, size, a.exclusive, a.id, ends))
        for a in self.plan.actions:
            name = a.subject.name
            if a.op == "wait_end" and self.spec.overlays[name].workload is None:
                runs = any(i.alive and i.subject == Subject("workload", name) for i in self.observed.incarnations)
                for x in self.plan.ledger.leases:
                    if x.subject == Subject("workload", name) and not runs:  # work, when it began
                        ends = self.overlay_ends[name]
                        guest = self.guests.get((name, x.gpu), 0)
                        holds = name in self.before.overlays and self.before.overlays[name].state == "active"
                        begins = None if holds else a.id
                        share = _Share(f"#{a.id} {name}", x.gpu, x.memory_bytes, x.exclusive, begins, ends, guest)
                        found.append(share)
        return found

    @cached_property
    def guests(self) -> dict[tuple[str, str], int]:
        """Reservation and GPU → bytes of its claim there that its guest has, who is a stranger to us as well.

        A guest has no more than came since the reservation became active, and than it claims. What came for the second
        of two came for one of them.
        """
        found: dict[tuple[str, str], int] = {}
        for gpu in self.observed.gpus:
            held = {p.pid: p.memory_bytes or 0 for p in gpu.processes or () if p.owner is None}
            hosts = [x for x in self.before.leases if x.gpu == gpu.uuid and x.strangers is not None]
            since: list[int] = []  # of those before: what came since each of them, less what was given to guests
            for lease in sorted(hosts, key=lambda x: self._active_since(x.overlay)):
                assert lease.strangers is not None
                then = dict(lease.strangers.processes)
                gone = sum(size for pid, size in then.items() if pid not in held) + lease.strangers.nameless_bytes
                came = sum(size for pid, size in held.items() if pid not in then)
                since.append(max(0, came - gone))
                guest = min(lease.memory_bytes, *since)
                since = [size - guest for size in since]
                found[lease.overlay, gpu.uuid] = guest
        return found

    def _active_since(self, overlay: str) -> float:
        since = self.before.overlays[overlay].active_since
        return since.wall if since is not None else self.plan.now.wall

    def no_prefix_oversubscribes(self) -> None:
        """At the worst moment at which anything begins, its GPU has room for all that may be there then."""
        gpus = {g.uuid: g for g in self.observed.gpus}
        for share in self.shares:
            if share.begins is None:
                continue
            before = self.ancestors[share.begins]
            near = [s for s in self.shares if s.gpu == share.gpu and s is not share]
            there = self._heaviest([s for s in near if self._may_meet(s, share, before)])
            total = share.size + sum(s.size for s in there)
            room = self._room(gpus[share.gpu], sum(s.guest for s in (share, *there)))
            story = f"{share} meets {there} on {room}\n" + "\n".join(map(str, self.plan.actions))
            assert total <= room, story
            assert not there or not (share.exclusive or any(s.exclusive for s in there)), story

    def _heaviest(self, shares: list[_Share]) -> list[_Share]:
        """Those of `shares` that may all be held at once, and hold the most together."""
        if not shares:
            return []
        first, rest = shares[0], shares[1:]
        without = self._heaviest(rest)
        together = [s for s in rest if not self._replaces(s, first) and not self._replaces(first, s)]
        if len(together) == len(rest):
            return [first, *without]
        including = [first, *self._heaviest(together)]
        return max(including, without, key=lambda found: sum(s.size - s.guest for s in found))

    def _replaces(self, later: _Share, earlier: _Share) -> bool:
        """Whether `later` begins only after `earlier` is held no more."""
        return later.begins is not None and bool(earlier.ends & self.ancestors[later.begins])

    def _may_meet(self, other: _Share, share: _Share, before: frozenset[int]) -> bool:
        """Whether `other` may be held at the moment at which `share` begins."""
        if other.ends & before:
            return False
        if other.begins is None:
            return True
        later = share.begins == other.begins or share.begins in self.ancestors[other.begins]
        return not later or other.begins in before

    def _room(self, gpu: Gpu, guests: int) -> int:
        """What there is beside strangers, beyond those guests who are in the places of reservations."""
        strangers = sum(p.memory_bytes or 0 for p in gpu.processes or () if p.owner is None)
        return gpu.total_bytes - max(self.spec.node.reserve_bytes, strangers - guests)

    def starts_wait_for_those_who_leave(self) -> None:
        """A start comes after the memory of everybody who leaves one of its GPUs is seen free."""
        leaving = {a.incarnation for a in self.plan.actions if a.op in DESTRUCTIVE}
        gone = {a.incarnation: a.id for a in self.plan.actions if a.op == "wait_memory" and a.incarnation}
        for action in self.plan.actions:
            if action.op not in ("start", "start_workload"):
                continue
            for i in self.observed.incarnations:
                if i.id in leaving and set(i.gpus) & set(action.gpus):
                    assert gone[i.id] in self.ancestors[action.id], f"{action} before {i.id} is gone"

    # ------------------------------------------------------------ consent

    @cached_property
    def admitted(self) -> list[str]:
        """Overlays that this decision admits."""
        now, then = self.plan.ledger.overlays, self.before.overlays
        holding = ("admitted", "evicting", "starting", "active", "overrun")
        return [n for n, r in now.items() if r.state in holding and (n not in then or then[n].state not in holding)]

    def victims_are_lawful(self) -> None:
        """Every victim is strictly lower, and both sides consented; what waits displaces nobody."""
        for name in self.admitted:
            record, asking = self.plan.ledger.overlays[name], self.spec.overlays[name]
            for victim in record.evicted:
                if victim in asking.endpoints:  # set aside by name
                    continue
                endpoint = self.spec.endpoints.get(victim)
                assert endpoint is not None, f"{name} evicts {victim}, which the files do not know"
                assert asking.allow_baseline_eviction, f"{name} evicts {victim} without consent"
                assert endpoint.preemptible, f"{name} evicts {victim}, which is not preemptible"
                assert endpoint.priority < asking.priority, f"{name} evicts {victim}, which is not lower"
            for victim in record.seized:
                lower = self.spec.overlays[victim]
                assert lower.priority < asking.priority
                assert lower.workload is not None
                assert lower.workload.preemptible
        for name, record in self.plan.ledger.overlays.items():
            if record.state == "pending":
                assert not any(x.overlay == name for x in self.plan.ledger.leases)

    def moves_are_lawful(self) -> None:
        """Who begins to move consented, is strictly lower, counts its GPUs, and has a place elsewhere in the plan."""
        movers = {n: r.move for n, r in self.plan.ledger.endpoints.items() if r.move is not None}
        known = {n for n, r in self.before.endpoints.items() if r.move is not None}
        for name, move in movers.items():
            if name in known:
                continue
            endpoint, homeless = self.spec.endpoints[name], move.by.removeprefix("endpoint/")
            asking = self.spec.endpoints[homeless] if homeless != move.by else self.spec.overlays[move.by]
            if isinstance(asking, EndpointSpec):
                comes = [a for a in starts(self.plan) if a.subject == Subject("endpoint", homeless)]
                assert comes, f"{name} moves for {homeless}, which is not started"
            else:
                assert move.by in self.admitted, f"{name} moves for {move.by}, which is not admitted"
                assert name in self.plan.ledger.overlays[move.by].moved
                assert asking.allow_baseline_eviction, f"{move.by} has {name} moved without consent"
            assert endpoint.movable, f"{name} is moved without consent"
            assert endpoint.priority < asking.priority, f"{move.by} has {name} moved, which is not lower"
            runs = next(i for i in self.observed.incarnations if i.id == move.incarnation)
            assert len(set(move.gpus)) == endpoint.gpus.count
            assert set(move.gpus) != set(runs.gpus), f"{name} is moved to where it is"
            later = [a for a in starts(self.plan) if a.subject == runs.subject]
            assert [set(a.gpus) for a in later] == [set(move.gpus)], f"{name} is not started where it is to go"

    def floors_hold(self) -> None:
        """No admission takes a capability below its floor, or further below it."""
        if not self.admitted:
            return
        begun = {n for n, r in self.before.overlays.items() if r.state != "pending"} - set(self.admitted)
        others = {n: o for n, o in self.spec.overlays.items() if n in begun}
        without = plan(replace(self.spec, overlays=others), self.observed, self.before, self.plan.now)
        going = {a.subject.name for a in self.plan.actions if a.op in DESTRUCTIVE}
        anyhow = {a.subject.name for a in without.actions if a.op in DESTRUCTIVE}
        ready = {n for n, v in self.plan.endpoints.items() if v.state == "healthy"}
        for capability, floor in self.spec.floors.items():
            providers = {
                n for n, e in self.spec.endpoints.items() if capability in e.capabilities and e.state == "running"
            }
            had, has = providers & ready - anyhow, providers & ready - going - anyhow
            assert len(has) >= min(floor, len(had)), f"{capability}: {sorted(had)} before, {sorted(has)} after"

    # ------------------------------------------------------------ the rest

    def gangs_are_whole(self) -> None:
        """What is started or leased has all the GPUs it claims, or none."""
        for action in self.plan.actions:
            if action.op == "start_workload":
                claim = self.spec.overlays[action.subject.name].gpus
                assert len(set(action.gpus)) == (claim.count if claim else 0)
            if action.op == "start":
                claims = {o.endpoints[action.subject.name].gpus.count for o in self.spec.overlays.values()
                          if action.subject.name in o.endpoints}  # fmt: skip
                known = self.spec.endpoints.get(action.subject.name)
                assert len(set(action.gpus)) in claims | ({known.gpus.count} if known else set())

    def the_unknown_is_left_alone(self) -> None:
        """Nothing is done to whom we cannot see, and nothing is placed where we cannot look."""
        dark = {g.uuid for g in self.observed.gpus if g.state != "ok"}
        seen = {i.id: i for i in self.observed.incarnations}
        for action in self.plan.actions:
            if action.op in DESTRUCTIVE:
                if action.op == "drain" and action.incarnation is None:
                    continue  # waited for only: nothing is recorded, and nobody told
                target = seen[action.incarnation or ""]
                assert target.phase != "unknown"
                if target.subject.kind == "endpoint":
                    assert not dark & set(target.gpus), f"{action} on a GPU that cannot be read"
            if action.op in ("start", "start_workload") and action.ready:
                assert not dark & set(action.gpus), f"{action} on a GPU that cannot be read"

    def only_ours_are_named(self) -> None:
        """Every action is about something that the files or our own records name."""
        ours = {i.subject for i in self.observed.incarnations}
        ours |= {Subject("endpoint", n) for n in self.plan.endpoints}
        ours |= {Subject("workload", n) for n in self.spec.overlays}
        ids = {i.id for i in self.observed.incarnations}
        for action in self.plan.actions:
            assert action.subject in ours
            assert action.incarnation is None or action.incarnation in ids

    def only_the_living_hold_leases(self) -> None:
        """A lease has a live owner."""
        for lease in self.plan.ledger.leases:
            assert self.plan.ledger.overlays[lease.overlay].state in LIVE


def lawful(run: Run, decided: Plan) -> None:
    """Every rule of every plan, for the `watch` of a run."""
    Account(run.spec, run.plant.observe(), run.ledger, decided).check()


def settled(*items: EndpointSpec | OverlaySpec, gpus: int = 1, floors: Mapping[str, int] | None = None) -> Run:
    """A box of GPUs of 80 GiB on which everything that can be ready is; every decision is checked."""
    run = Run(spec(*items, floors=floors), Plant(totals=[80 * GIB] * gpus), watch=lawful)
    run.settle()
    return run


def starts(decided: Plan) -> list[Action]:
    """What a plan starts."""
    return [a for a in decided.actions if a.op in ("start", "start_workload")]
