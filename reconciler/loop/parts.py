"""What a daemon is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from typing import Protocol

from msgspec import Struct

from reconciler.act.engine import EngineActor
from reconciler.act.process import ProcessActor
from reconciler.clock import Clock
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir
from reconciler.loop.leftovers import Leftovers
from reconciler.loop.specs import SpecKeeper
from reconciler.loop.tick import Face
from reconciler.observe.snapshot import ObserveOptions
from reconciler.plan.observed import Observed
from reconciler.spec.spec import Spec


class Eyes(Protocol):
    """Whoever looks at the box."""

    def observe(self, spec: Spec, options: ObserveOptions) -> Observed:
        """One look."""
        ...

    def watches(self) -> Mapping[int, str]:
        """Descriptors that become readable when a process of ours ends."""
        ...

    def probe_now(self, incarnations: Collection[str]) -> None:
        """Ask these at once."""
        ...

    def owns_listener(self, incarnation: str, port: int) -> bool | None:
        """Whether who listens on a port is this incarnation; None: could not be seen."""
        ...

    def close(self) -> None:
        """Let go of threads and descriptors."""
        ...


class Parts(Struct, frozen=True):
    """Everything a daemon is made of; put together in `cli.wiring`."""

    state: StateDir
    clock: Clock
    journal: Journal
    specs: SpecKeeper
    actor: ProcessActor
    engines: EngineActor
    eyes: Callable[[Callable[[], None]], Eyes]
    """Given a function that wakes the loop from any thread."""
    inherited: Mapping[str, str]
    """This process's environment."""
    simulated: Mapping[str, str]
    """What a simulated node adds to a child's environment."""
    pid: int
    hold: Callable[[], None] = lambda: None
    """Sees to it that the state directory is still this daemon's own (`WriterLock.keep`)."""
    faces: Sequence[Face] = ()
    open_files: int | None = None
    """Soft limit of descriptors for what is run; None: this process's own."""
    leftovers: Leftovers | None = None
    """Follows files in /dev/shm; None: where there are none, as on a box in virtual time."""
    at_least_every_s: float = inf
    """Somebody expects a tick this often, whatever the set points say of `resync`."""
