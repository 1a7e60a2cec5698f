"""Who holds what on which GPU, and what somebody wants of them: the values that places are sought among.

The board shows every GPU as it will be once all that is leaving has left. It knows no rule of who may displace whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from msgspec import Struct, field

from reconciler.plan.observed import Subject

Victims = frozenset[str]
"""Keys of tenants."""


def endpoint_key(name: str) -> str:
    """The key of an endpoint as a tenant."""
    return f"endpoint/{name}"


class Hold(Struct, frozen=True):
    """A tenant's part of one GPU."""

    memory_bytes: int
    exclusive: bool


class Need(Struct, frozen=True):
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

    def holds(self, gpus: Iterable[str]) -> dict[str, Hold]:
        """What it holds once it has these GPUs."""
        return {gpu: Hold(self.memory_bytes[gpu], self.exclusive) for gpu in gpus}


class Tenant(Struct, frozen=True):
    """Someone who holds, or is about to hold, parts of GPUs; never changed once it is made."""

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
    moves: int = 0
    """GPUs that it would be started on where it does not run, a place there being kept for it, if it had to leave; 0:
    none is, and it would be a victim."""
    preemptible: bool | None = None
    """Whether it may be displaced, of a calm endpoint: its set point alone has a say. None: others have one, too."""


class Residents:
    """Tenants that stay where they are whatever is decided: worked out when first asked for, and shared by boards."""

    def __init__(self, make: Callable[[], Iterable[Tenant]] = tuple) -> None:
        self._make = make

    @cached_property
    def tenants(self) -> Mapping[str, Tenant]:
        """By key."""
        return {tenant.key: tenant for tenant in self._make()}

    @cached_property
    def _by_gpu(self) -> tuple[dict[str, list[Tenant]], dict[str, Hold]]:
        on: dict[str, list[Tenant]] = {}
        sizes: dict[str, int] = {}
        alone: set[str] = set()
        for tenant in self.tenants.values():
            for gpu, hold in tenant.holds.items():
                if gpu in on:
                    on[gpu].append(tenant)
                    sizes[gpu] += hold.memory_bytes
                else:
                    on[gpu], sizes[gpu] = [tenant], hold.memory_bytes
                if hold.exclusive:
                    alone.add(gpu)
        return on, {gpu: Hold(size, gpu in alone) for gpu, size in sizes.items()}

    @property
    def on(self) -> Mapping[str, list[Tenant]]:
        """GPU → its residents, in the order in which they were made."""
        return self._by_gpu[0]

    @property
    def held(self) -> Mapping[str, Hold]:
        """GPU → all that its residents hold there together, exclusive if one of them is."""
        return self._by_gpu[1]


class Tenants(Mapping[str, Tenant]):
    """Everybody on one board, by key: residents that did not leave, then those who came."""

    __slots__ = ("came", "left", "residents")

    def __init__(
        self, residents: Residents, left: Iterable[str] = (), came: Mapping[str, Tenant] | None = None
    ) -> None:
        self.residents = residents
        self.left = set(left)
        self.came = dict(came or {})

    def __getitem__(self, key: str) -> Tenant:
        own = self.came.get(key)
        if own is not None:
            return own
        if key in self.left:
            raise KeyError(key)
        return self.residents.tenants[key]

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self.residents.tenants if key not in self.left)
        yield from self.came

    def __len__(self) -> int:
        return len(self.residents.tenants) - len(self.left) + len(self.came)

    def everybody(self) -> Iterator[Tenant]:
        """The same as `values()`, in the same order, without a look-up for each of them."""
        left = self.left
        yield from (tenant for key, tenant in self.residents.tenants.items() if key not in left)
        yield from self.came.values()


class Board(Struct):
    """Every GPU with its capacity and its tenants.

    A copy costs what was changed, not what there is: residents are shared, and only GPUs on which somebody came or went
    have tenants of their own here.
    """

    capacity: Mapping[str, int]
    """Usable bytes of each GPU that may be used at all, in NVML order."""
    numa: Mapping[str, int | None]
    """The host memory node next to each GPU."""
    islands: Mapping[str, int | None] = field(default_factory=dict)
    """The NVLink island of each GPU."""
    contested: Mapping[str, int] = field(default_factory=dict)
    """How many waiting pins name this GPU: taken last by those who may choose."""
    tenants: Tenants = field(default_factory=lambda: Tenants(Residents()))
    _on: dict[str, list[Tenant]] = field(default_factory=dict)
    """GPU on which somebody came or went → its tenants."""
    _held: dict[str, Hold | None] = field(default_factory=dict)
    """Of these GPUs: all that is held there, as far as it was asked for."""

    def add(self, tenant: Tenant) -> None:
        """Seat a tenant; what it holds under the same key is replaced."""
        self.remove(tenant.key)
        self.tenants.came[tenant.key] = tenant
        for gpu in tenant.holds:
            self._on[gpu] = [*self.on(gpu), tenant]
            self._held.pop(gpu, None)

    def remove(self, key: str) -> None:
        """Have a tenant leave, if it is there."""
        tenant = self.tenants.get(key)
        if tenant is None:
            return
        if self.tenants.came.pop(key, None) is None:
            self.tenants.left.add(key)
        for gpu in tenant.holds:
            self._on[gpu] = [t for t in self.on(gpu) if t.key != key]
            self._held.pop(gpu, None)

    def on(self, gpu: str) -> Sequence[Tenant]:
        """The tenants of one GPU, residents first and then in the order in which they were seated."""
        return self._on[gpu] if gpu in self._on else self.tenants.residents.on.get(gpu, ())

    def held(self, gpu: str) -> Hold | None:
        """All that the tenants of one GPU hold together, exclusive if one of them is; None: there are none."""
        if gpu not in self._on:
            return self.tenants.residents.held.get(gpu)
        if gpu not in self._held:
            holds = [tenant.holds[gpu] for tenant in self._on[gpu]]
            size, alone = sum([hold.memory_bytes for hold in holds]), any(hold.exclusive for hold in holds)
            self._held[gpu] = Hold(size, alone) if holds else None
        return self._held[gpu]

    def free(self, gpu: str, *, alone: bool) -> int | None:
        """Bytes that nobody holds of one GPU; None: it cannot be used, or somebody is there who cannot share it.

        With `alone` whoever asks cannot.
        """
        capacity, held = self.capacity.get(gpu), self.held(gpu)
        if held is None or capacity is None:
            return capacity
        return None if alone or held.exclusive else capacity - held.memory_bytes

    def room_for(self, need: Need) -> dict[str, int]:
        """The GPUs that a need may have beside everybody → bytes that nobody holds there, in NVML order."""
        found: dict[str, int] = {}
        shared, sizes, alone = self.tenants.residents.held, need.memory_bytes, need.exclusive
        for gpu in need.candidates:
            capacity = self.capacity.get(gpu)
            if capacity is None:
                continue
            held = self.held(gpu) if gpu in self._on else shared.get(gpu)
            if held is not None:
                if alone or held.exclusive:
                    continue
                capacity -= held.memory_bytes
            if sizes[gpu] <= capacity:
                found[gpu] = capacity
        return found

    def is_crowded(self, gpu: str) -> bool:
        """Whether the tenants of one GPU do not fit there together."""
        held = self.held(gpu)
        if held is None or gpu not in self.capacity:
            return False
        return held.memory_bytes > self.capacity[gpu] or (held.exclusive and len(self.on(gpu)) > 1)

    def near(self, gpu: str) -> tuple[int | None, int | None]:
        """Where a GPU is: its NVLink island and its NUMA node."""
        return self.islands.get(gpu), self.numa.get(gpu)

    def without(self, keys: Iterable[str]) -> Board:
        """The board after these tenants left; a copy."""
        tenants = Tenants(self.tenants.residents, self.tenants.left, self.tenants.came)
        copy = Board(self.capacity, self.numa, self.islands, self.contested, tenants)
        copy._on, copy._held = dict(self._on), dict(self._held)
        for key in keys:
            copy.remove(key)
        return copy
