"""Who holds what on which GPU, and what somebody wants of them: the values that places are sought among.

The board shows every GPU as it will be once all that is leaving has left. It knows no rule of who may displace whom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reconciler.plan.observed import Subject

Victims = frozenset[str]
"""Keys of tenants."""


def endpoint_key(name: str) -> str:
    """The key of an endpoint as a tenant."""
    return f"endpoint/{name}"


@dataclass(frozen=True, slots=True)
class Need:
    """One subject's all-or-nothing wish: so many GPUs, so many bytes on each."""

    subject: Subject
    candidates: tuple[str, ...]
    """UUIDs that may serve, in NVML order. With a pin exactly the pinned ones, and `count` of them."""
    count: int
    memory_bytes: Mapping[str, int]
    """Bytes claimed on each candidate."""
    exclusive: bool
    prefer: tuple[str, ...] = ()
    """Where it ran last; other GPUs count as moves."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A tenant's part of one GPU."""

    memory_bytes: int
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Tenant:
    """Someone who holds, or is about to hold, parts of GPUs."""

    key: str
    """Unique and sortable: `endpoint/NAME` or `overlay/NAME`."""
    priority: int
    holds: Mapping[str, Hold]
    lost_ms: int = 0
    """Lost readiness that displacing it is predicted to cost, in capability-milliseconds: an integer, so that sums do
    not depend on their order."""
    departure_ms: int = 0
    """Predicted time from asking it to leave until its memory is back."""
    offers: tuple[str, ...] | None = None
    """Its capabilities: two that offer the same and cost the same are alike. None: it is like no other."""


@dataclass(slots=True)
class Board:
    """Every GPU with its capacity and its tenants."""

    capacity: Mapping[str, int]
    """Usable bytes of each GPU that may be used at all, in NVML order."""
    numa: Mapping[str, int | None]
    """The host memory node next to each GPU."""
    tenants: dict[str, Tenant] = field(default_factory=dict)
    islands: Mapping[str, int | None] = field(default_factory=dict)
    """The NVLink island of each GPU."""
    contested: Mapping[str, int] = field(default_factory=dict)
    """How many waiting pins name this GPU: taken last by those who may choose."""
    _on: dict[str, dict[str, Tenant]] | None = None
    """GPU → its tenants by key; made when first asked for."""
    _held: dict[str, Hold | None] = field(default_factory=dict)
    """GPU → all that is held there, as far as it was asked for."""

    def add(self, tenant: Tenant) -> None:
        """Seat a tenant; what it holds under the same key is replaced."""
        before = self.tenants.get(tenant.key)
        self.tenants[tenant.key] = tenant
        for gpu in (*tenant.holds, *(before.holds if before is not None else ())):
            self._held.pop(gpu, None)
        if self._on is None:
            return
        for gpu in before.holds if before is not None else ():
            del self._on[gpu][tenant.key]
        for gpu in tenant.holds:
            self._on.setdefault(gpu, {})[tenant.key] = tenant

    def on(self, gpu: str) -> list[Tenant]:
        """The tenants of one GPU, in the order in which they were seated."""
        if self._on is None:
            self._on = {}
            for tenant in self.tenants.values():
                for held in tenant.holds:
                    self._on.setdefault(held, {})[tenant.key] = tenant
        return list(self._on.get(gpu, {}).values())

    def held(self, gpu: str) -> Hold | None:
        """All that the tenants of one GPU hold together, exclusive if one of them is; None: there are none."""
        if gpu not in self._held:
            holds = [t.holds[gpu] for t in self.on(gpu)]
            size, alone = sum(h.memory_bytes for h in holds), any(h.exclusive for h in holds)
            self._held[gpu] = Hold(size, alone) if holds else None
        return self._held[gpu]

    def near(self, gpu: str) -> tuple[int | None, int | None]:
        """Where a GPU is: its NVLink island and its NUMA node."""
        return self.islands.get(gpu), self.numa.get(gpu)

    def without(self, keys: Victims) -> Board:
        """The board after these tenants left; a copy."""
        rest = {k: t for k, t in self.tenants.items() if k not in keys} if keys else dict(self.tenants)
        return Board(self.capacity, self.numa, rest, self.islands, self.contested)
