"""Whoever looks at the box, put together: for a daemon that keeps looking, and for a command that looks once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

from reconciler.clock import SystemClock
from reconciler.journal.layout import StateDir

if TYPE_CHECKING:
    from reconciler.observe.gpus import NvmlReader
    from reconciler.observe.probe import OwnsListener, ProbeTarget
    from reconciler.observe.snapshot import ObserveOptions
    from reconciler.plan.ledger import Ledger
    from reconciler.plan.observed import Observed, Probe
    from reconciler.spec.spec import Spec

PROBE_ONCE_S = 2.0
"""How long a command that looks once waits for the endpoints' answers."""


def prepare_node(simulate: str | None, state: StateDir) -> Mapping[str, str]:
    """Put a simulated driver under pynvml if one is asked for; what its children's environment needs."""
    if simulate is None:
        return {}
    from reconciler.sim.description import parse_node
    from reconciler.sim.driver import install
    from reconciler.sim.node import engine_environment, prepare

    node = parse_node(simulate)
    state.ensure_root()  # a look may come before any daemon
    prepare(state.sim, node)
    install(state.sim)
    return engine_environment(state.sim)


def _open_driver(nvml: NvmlReader, state: StateDir) -> None:
    """Initialise the driver; where there is none and a simulated node lived, say how to have it back."""
    from reconciler.errors import DriverError

    try:
        nvml.open()
    except DriverError as error:
        if not (state.sim / "node.json").exists():
            raise
        hint = "this state directory belongs to a simulated node: add the --simulate it was used with"
        raise DriverError(error.message, hint=hint) from error


class Watching:
    """A daemon's eyes: an observer with a prober that keeps asking."""

    def __init__(self, state: StateDir, wake: Callable[[], None], environment: Mapping[str, str]) -> None:
        """`environment`: of which a declared part is handed down to who is started."""
        from reconciler.act.programs import not_startable
        from reconciler.observe.gpus import NvmlReader
        from reconciler.observe.prober import Prober
        from reconciler.observe.process import ProcessReader
        from reconciler.observe.snapshot import Observer

        clock = SystemClock()
        self._nvml = NvmlReader(clock)
        _open_driver(self._nvml, state)
        self._processes = ProcessReader(state, clock)
        self._prober = Prober(clock, wake, owns=self._processes.owns_listener)
        unstartable = partial(not_startable, environment=environment)
        self._observer = Observer(self._nvml, self._processes, self._prober, clock, unstartable)

    def observe(self, spec: Spec, options: ObserveOptions) -> Observed:
        """One look."""
        return self._observer.observe(spec, options)

    def watches(self) -> Mapping[int, str]:
        """Descriptors that become readable when a process of ours ends."""
        return self._processes.watches()

    def probe_now(self, incarnations: Collection[str]) -> None:
        """Ask these at once."""
        self._prober.probe_now(incarnations)

    def owns_listener(self, incarnation: str, port: int) -> bool | None:
        """Whether who listens on a port is this incarnation; None: could not be seen."""
        return self._processes.owns_listener(incarnation, port)

    def close(self) -> None:
        """Let go of threads and descriptors."""
        self._observer.close()
        self._prober.close()
        self._processes.close()
        self._nvml.close()


class _AskedOnce:
    """Whoever is asked once, all at the same time: the probes of a command that looks and goes."""

    def __init__(self, owns: OwnsListener) -> None:
        self._owns = owns
        self._answers: dict[str, Probe] = {}

    def watch(self, targets: Mapping[str, ProbeTarget]) -> None:
        if targets:  # without an endpoint that runs nothing is asked, and no HTTP library is loaded
            from reconciler.observe.prober import probe_once

            self._answers = probe_once(targets, deadline_s=PROBE_ONCE_S, clock=SystemClock(), owns=self._owns)

    def results(self) -> Mapping[str, Probe]:
        return self._answers


def look_once(state: StateDir, spec: Spec, ledger: Ledger, environment: Mapping[str, str]) -> Observed:
    """Observe without a daemon: every endpoint is asked once."""
    from reconciler.act.programs import not_startable
    from reconciler.observe.gpus import NvmlReader
    from reconciler.observe.process import ProcessReader
    from reconciler.observe.snapshot import ObserveOptions, Observer

    clock = SystemClock()
    nvml, processes = NvmlReader(clock), ProcessReader(state, clock)
    try:
        _open_driver(nvml, state)
        ready = [r.ready_incarnation for r in ledger.endpoints.values() if r.ready_incarnation]
        probes = _AskedOnce(processes.owns_listener)
        unstartable = partial(not_startable, environment=environment)
        observer = Observer(nvml, processes, probes, clock, unstartable)
        try:
            return observer.observe(spec, ObserveOptions(ready_before=ready))
        finally:
            observer.close()
    finally:
        processes.close()
        nvml.close()
