"""`Situation`: the planner's three inputs, indexed, with every symbolic claim resolved against the GPUs seen.

Nothing is decided here. Each question that several rules ask of the inputs is answered in this one place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import PurePath

from msgspec import Struct

from reconciler.clock import Instant
from reconciler.plan.calm import calm_ones
from reconciler.plan.ledger import EndpointRecord, Ledger, Timings
from reconciler.plan.observed import Gpu, Incarnation, Observed, Probe, Subject, SubjectKind
from reconciler.spec.spec import (
    EndpointSpec,
    GpuClaim,
    GpuCount,
    GpuPins,
    MemoryBytes,
    MemoryClaim,
    MemoryFraction,
    Spec,
    WholeGpu,
)

MEMORY_TOLERANCE = 512 << 20
"""Used bytes nobody is named for, below which a GPU still counts as free: drivers and displays keep some hundred MiB.
A larger `node.reserve` raises it."""


class Room(Struct, frozen=True):
    """What one GPU can hold once everything that is leaving has left."""

    gpu: Gpu
    capacity_bytes: int
    """Total less the larger of the reserve and foreign use; 0 when nothing may be placed."""
    foreign_bytes: int
    lingering_bytes: int
    """Memory of ended incarnations of ours that the driver has not given back yet."""
    unusable: str | None
    """Why nothing new is placed here: GpuUnknown, GpuLost, Quarantined, GpuUnhealthy, NotManaged; else None."""


class Situation:
    """Indexed inputs of one decision."""

    def __init__(self, spec: Spec, observed: Observed, ledger: Ledger, now: Instant) -> None:
        self.spec = spec
        self.observed = observed
        self.ledger = ledger
        self.now = now
        self.gpus: Mapping[str, Gpu] = {gpu.uuid: gpu for gpu in observed.gpus}
        self.rejected = frozenset(PurePath(problem.file).stem for problem in spec.problems)
        """Overlays whose file is there and cannot be accepted: unknown, not absent."""

    # ------------------------------------------------------------ incarnations

    @cached_property
    def _sifted(self) -> tuple[dict[str, Incarnation], list[Incarnation]]:
        return calm_ones(self.spec, self.observed, self.ledger.endpoints, self.satisfies)

    @property
    def calm(self) -> Mapping[str, Incarnation]:
        """Endpoints that need no decision as long as no overlay speaks of them, each with its only incarnation."""
        return self._sifted[0]

    @cached_property
    def _others(self) -> Mapping[SubjectKind, Mapping[str, list[Incarnation]]]:
        """Every incarnation that is not of a calm endpoint, by kind and name of its subject."""
        found: dict[SubjectKind, dict[str, list[Incarnation]]] = {"endpoint": {}, "workload": {}}
        for incarnation in self._sifted[1]:
            found[incarnation.subject.kind].setdefault(incarnation.subject.name, []).append(incarnation)
        return found

    @cached_property
    def passing(self) -> Sequence[Incarnation]:
        """Of endpoints those of which something may have ended, is to end, does not or has yet to begin; all workloads.

        As observed.
        """
        return [
            i
            for i in self._sifted[1]
            if i.subject.kind != "endpoint" or i.phase != "running" or i.stop is not None or i.undying_since is not None
        ]

    def incarnations(self, subject: Subject) -> Sequence[Incarnation]:
        """All incarnations of `subject` not yet archived, oldest first."""
        calm = self.calm.get(subject.name) if subject.kind == "endpoint" else None
        return self._others[subject.kind].get(subject.name, ()) if calm is None else (calm,)

    def living(self, subject: Subject) -> list[Incarnation]:
        """Those that may still run something."""
        return [i for i in self.incarnations(subject) if i.alive]

    def probe(self, incarnation: Incarnation) -> Probe | None:
        """The last answer of its HTTP port."""
        return self.observed.probes.get(incarnation.id)

    def endpoint_names(self) -> Mapping[str, None]:
        """Every endpoint that the files, the overlays, the records or the ledger speak of, in order."""
        names = dict.fromkeys(self.spec.endpoints)  # in order already, most often
        for overlay in self.spec.overlays.values():
            names.update(dict.fromkeys(overlay.endpoints))
        names.update(dict.fromkeys(self._others["endpoint"]))
        ordered = sorted(names)
        return names if list(names) == ordered else dict.fromkeys(ordered)

    @cached_property
    def running(self) -> Mapping[str, EndpointSpec]:
        """The endpoints of the baseline whose set point is running."""
        endpoints, calm = self.spec.endpoints, self.calm
        if len(calm) == len(endpoints):
            return endpoints
        resting = [name for name, e in endpoints.items() if name not in calm and e.state != "running"]
        running = dict(endpoints)
        for name in resting:
            del running[name]
        return running

    def record(self, name: str) -> EndpointRecord:
        """What is remembered of an endpoint; an empty record for a new one."""
        return self.ledger.endpoints.get(name) or EndpointRecord(name)

    def timings(self, endpoint: EndpointSpec) -> Timings:
        """Predicted load, drain and stop times: learnt, else the engine's defaults, within the endpoint's bounds."""
        learnt = self.ledger.timings.get(endpoint.name)
        if learnt is not None:
            return learnt
        defaults = endpoint.profile
        return Timings(
            load_s=min(defaults.load_s, endpoint.health.startup_s),
            drain_s=min(defaults.drain_s, endpoint.stop.drain_s),
            stop_s=min(defaults.stop_s, endpoint.stop.grace_s),
        )

    def leaving_s(self, endpoint: EndpointSpec, times: Timings) -> float:
        """Predicted seconds from asking it to give way until it has, whichever way it is that it goes."""
        if endpoint.evict.method != "sleep":
            return times.drain_s + times.stop_s
        levels = (n for n in endpoint.profile.sleep_levels if n >= endpoint.evict.level)
        return times.drain_s + max([times.stop_s, *(self.nap_s(endpoint, level)[0] for level in levels)])

    def nap_s(self, endpoint: EndpointSpec, level: int) -> tuple[float, float]:
        """Predicted seconds to fall asleep at a level that its engine has, and to be ready again after it."""
        times = self.timings(endpoint)
        sleep_s, wake_s = endpoint.profile.sleep_levels[level].predicted_s(times.load_s)
        return times.sleep_s.get(level, sleep_s), times.wake_s.get(level, wake_s)

    # ------------------------------------------------------------ GPUs

    @cached_property
    def placeable(self) -> tuple[str, ...]:
        """UUIDs that a count may be met with, in NVML order."""
        return tuple(u for u in self.gpus if u in self.managed)

    @cached_property
    def managed(self) -> frozenset[str]:
        """UUIDs that `node.gpus` allows."""
        allowed = self.spec.node.gpus
        if allowed is None:
            return frozenset(self.gpus)
        return frozenset(g.uuid for g in self.observed.gpus if g.index in allowed or g.uuid in allowed)

    @cached_property
    def _by_index(self) -> Mapping[int, str]:
        return {gpu.index: gpu.uuid for gpu in self.observed.gpus}

    @cached_property
    def on_port(self) -> Mapping[int, list[Incarnation]]:
        """Port → the incarnations that were given it, as observed; not all of them need be alive."""
        found: dict[int, list[Incarnation]] = {}
        for incarnation in self.observed.incarnations:
            port = incarnation.port
            if port is None:
                continue
            if port in found:
                found[port].append(incarnation)
            else:
                found[port] = [incarnation]
        return found

    @cached_property
    def _on_gpu(self) -> Mapping[str, list[Incarnation]]:
        """GPU → the incarnations that were given it, as observed."""
        found: dict[str, list[Incarnation]] = defaultdict(list)
        for incarnation in self.observed.incarnations:
            for uuid in incarnation.gpus:
                found[uuid].append(incarnation)
        return found

    def resolve_pins(self, pins: GpuPins) -> tuple[str, ...] | None:
        """UUIDs of pinned GPUs; None when one of them does not exist on this node."""
        found = [
            self._by_index.get(ref) if isinstance(ref, int) else (ref if ref in self.gpus else None)
            for ref in pins.refs
        ]
        return None if None in found else tuple(uuid for uuid in found if uuid is not None)

    def satisfies(self, claim: GpuClaim, gpus: tuple[str, ...]) -> bool:
        """Whether running on `gpus` is what `claim` asks for."""
        if isinstance(claim, GpuCount):
            return len(gpus) == claim.count
        wanted = self.resolve_pins(claim)
        return wanted is not None and sorted(wanted) == sorted(gpus)

    def sizes(self, memory: MemoryClaim, gpus: Sequence[str]) -> dict[str, int]:
        """Bytes claimed on each of these GPUs, by UUID."""
        if isinstance(memory, MemoryBytes):
            return dict.fromkeys(gpus, memory.bytes)
        return {uuid: self.claim_bytes(memory, self.gpus[uuid]) for uuid in gpus}

    def claim_bytes(self, memory: MemoryClaim, gpu: Gpu) -> int:
        """Bytes claimed on one GPU; the whole GPU is its total less the reserve."""
        match memory:
            case WholeGpu():
                return max(0, gpu.total_bytes - self.spec.node.reserve_bytes)
            case MemoryFraction(fraction):
                return int(gpu.total_bytes * fraction)
            case MemoryBytes(size):
                return size

    @cached_property
    def rooms(self) -> Mapping[str, Room]:
        """Every GPU with what it can hold, by UUID, in NVML order."""
        return {gpu.uuid: self._room(gpu) for gpu in self.observed.gpus}

    def _room(self, gpu: Gpu) -> Room:
        unusable = self._unusable(gpu)
        if gpu.used_bytes is None:
            return Room(gpu, 0, 0, 0, unusable or "GpuUnknown")
        foreign, lingering = self._attribute(gpu, gpu.used_bytes)
        reserve = self.spec.node.reserve_bytes
        capacity = 0 if unusable else max(0, gpu.total_bytes - max(reserve, foreign))
        return Room(gpu, capacity, foreign, lingering, unusable)

    def _unusable(self, gpu: Gpu) -> str | None:
        if gpu.uuid not in self.managed:
            return "NotManaged"
        if gpu.uuid in self.ledger.quarantines:
            return "Quarantined"
        if gpu.state == "lost":
            return "GpuLost"
        if gpu.state == "unknown" or not self.observed.gpus_known or gpu.processes is None:
            return "GpuUnknown"
        return None if gpu.healthy else "GpuUnhealthy"

    def _attribute(self, gpu: Gpu, used: int) -> tuple[int, int]:
        """Foreign and lingering bytes of one GPU.

        What NVML names a process for is that process's; if it was ours and is gone, it lingers. The nameless rest
        belongs, in this order, to living
        incarnations of ours that NVML names no memory for (containers hide pids), to ended ones whose memory comes
        back late, and to strangers.
        """
        foreign = lingering = 0
        rest, named = used, set()
        for process in gpu.processes or ():
            size, owner = process.memory_bytes, process.owner
            if owner is not None and size is not None:
                named.add(owner)
            if not size:
                continue
            rest -= size
            if owner is None:
                foreign += size
            elif not self.living(owner):
                lingering += size
        here = self._on_gpu.get(gpu.uuid, []) if rest > 0 else []
        for incarnation in here:
            if incarnation.alive and incarnation.subject not in named:
                rest -= min(max(rest, 0), self._planned_on(incarnation, gpu.uuid))
        for incarnation in here:
            if not incarnation.alive:
                share = min(max(rest, 0), self._planned_on(incarnation, gpu.uuid))
                rest -= share
                lingering += share
        return foreign + max(rest, 0), lingering

    @staticmethod
    def _planned_on(incarnation: Incarnation, uuid: str) -> int:
        return incarnation.memory_bytes[incarnation.gpus.index(uuid)]

    @property
    def tolerance_bytes(self) -> int:
        """Nameless memory below which a GPU counts as free."""
        return max(MEMORY_TOLERANCE, self.spec.node.reserve_bytes)

    def memory_returned(self, incarnation: Incarnation) -> bool:
        """Whether the memory of an ended incarnation is seen free on each of its GPUs.

        A GPU that cannot be read answers no: unknown is not free. One that is lost or quarantined is not waited for:
        nothing is placed on it.
        """
        for uuid in incarnation.gpus:
            gpu = self.gpus.get(uuid)
            if uuid in self.ledger.quarantines or (gpu is not None and gpu.state == "lost"):
                continue
            if gpu is None or gpu.used_bytes is None or gpu.state != "ok" or gpu.at.mono < self._ended_at(incarnation):
                return False
            if any(p.owner == incarnation.subject for p in gpu.processes or ()) and not self.living(
                incarnation.subject
            ):
                return False
            if self.rooms[uuid].lingering_bytes > self.tolerance_bytes:
                return False
        return True

    @staticmethod
    def _ended_at(incarnation: Incarnation) -> float:
        return incarnation.exited.mono if incarnation.exited else incarnation.started.mono

    @cached_property
    def seen(self) -> frozenset[str]:
        """UUIDs of the GPUs that can be read now."""
        return frozenset(uuid for uuid, gpu in self.gpus.items() if gpu.state == "ok")

    def sees(self, gpus: Iterable[str]) -> bool:
        """Whether every one of these GPUs can be read now; without it nothing destructive happens on them."""
        return self.seen.issuperset(gpus)
