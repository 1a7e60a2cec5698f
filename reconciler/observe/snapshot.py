"""One look at the box: GPUs, incarnations, probes and ports in one `Observed`, each part with its own time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from reconciler.clock import Clock, Instant
from reconciler.identity import boot_id
from reconciler.observe.gpus import NvmlReader
from reconciler.observe.nvml import CACHED, ReadOptions
from reconciler.observe.probe import ProbeTarget
from reconciler.observe.process import ProcessReader
from reconciler.observe.worker import DeadlineThread, StillHanging
from reconciler.plan.observed import Gpu, GpuProcess, Incarnation, Observed, Obstacle, PortHolder, Probe
from reconciler.spec.profiles import LOG_TAIL_BYTES
from reconciler.spec.spec import EndpointSpec, Spec

MOST_FAILURES = 200
"""Remembered readings of logs; ended incarnations are put away within a tick or two."""
LOOKUP_DEADLINE_S = 1.0
"""To look for programs takes a ms or two; longer takes only a disk that does not answer."""
CLOCK_JUMP_S = 60.0
"""The wall clock may move this far against the monotonic one between two looks (semantics: Time)."""


class Probes(Protocol):
    """Who knows what the endpoints last said: a `Prober`, or nobody."""

    def watch(self, targets: Mapping[str, ProbeTarget]) -> None:
        """Ask exactly these from now on."""
        ...

    def results(self) -> Mapping[str, Probe]:
        """What they last said, by incarnation id."""
        ...


class ObserveOptions(Struct, frozen=True):
    """How to look."""

    gpus: ReadOptions = CACHED
    """Fresher while someone waits for memory."""
    ended: bool = False
    """A process of ours has ended since the last look."""
    ready_before: Collection[str] = ()
    """Incarnations that were ready once (from the ledger): asked at the usual pace after the daemon's restart, too."""
    draining: Collection[str] = ()
    """Incarnations whose requests in flight are to be counted, besides those whose records say that they drain."""


USUAL = ObserveOptions()


class Observer:
    """Puts the readers together. One thread at a time."""

    def __init__(
        self,
        nvml: NvmlReader,
        processes: ProcessReader,
        prober: Probes,
        clock: Clock,
        obstacles: Callable[[Spec, tuple[Incarnation, ...]], Mapping[str, Obstacle]] = lambda _spec, _running: {},
    ) -> None:
        """`obstacles`: what is certain to keep something from being started (`act.programs.not_startable`)."""
        self._find_obstacles = obstacles
        self._obstacles: Mapping[str, Obstacle] = {}
        self._lookups = DeadlineThread("programs", clock)
        self._nvml = nvml
        self._processes = processes
        self._prober = prober
        self._clock = clock
        self._last: Instant | None = None
        self._failures: dict[str, str | None] = {}
        """What the logs of ended incarnations said, oldest first."""

    def observe(self, spec: Spec, options: ObserveOptions = USUAL) -> Observed:
        """What the box shows now. The prober is told whom to ask from now on; its answers are the last ones.

        1. Incarnations first: an owner can only be named once its incarnation is known.
        2. GPUs next, so that a process that came in between is foreign for one look at worst. Where one of ours has
           ended, processes are listed anew: an older list says nothing of its memory.
        3. Probes and ports. A port that could not be looked at is held by somebody unknown.

        Raises:
            StateError: the records of incarnations cannot be listed.
        """
        incarnations = tuple(self._with_failure(spec, i) for i in self._processes.read())  # 1
        readings = self._nvml.read(self._reading(options, incarnations))  # 2
        gpus = tuple(self._named(gpu) for gpu in readings.gpus)
        targets = probe_targets(spec, incarnations, options)  # 3
        self._prober.watch(targets)
        probes = {**self._prober.results(), **portless(incarnations, self._clock.now())}
        return Observed(
            at=(now := self._clock.now()),
            boot_id=boot_id(),
            gpus=gpus,
            incarnations=incarnations,
            probes={i.id: probes[i.id] for i in incarnations if i.id in probes},
            ports=self._ports(spec, incarnations),
            clock_jumped=self._has_jumped(now),
            gpus_known=readings.known,
            gpus_detail=readings.detail,
            host_available_bytes=host_available(),
            obstacles=self._obstacles_of(spec, incarnations),
        )

    def close(self) -> None:
        """Let go of its thread."""
        self._lookups.close()

    def _obstacles_of(self, spec: Spec, incarnations: tuple[Incarnation, ...]) -> Mapping[str, Obstacle]:
        """What cannot be started, where somebody would have to end for it.

        A program may lie on a file system whose server is away, and whoever looks there waits for it: the last answer
        counts meanwhile.
        """
        if not spec.overlays and not any(_is_edited(spec, i) for i in incarnations):
            return {}
        with suppress(StillHanging):
            self._obstacles = self._lookups.call(lambda: self._find_obstacles(spec, incarnations), LOOKUP_DEADLINE_S)
        return self._obstacles

    def _reading(self, options: ObserveOptions, incarnations: Iterable[Incarnation]) -> ReadOptions:
        """How to read the GPUs: as the loop wants it, and of those that somebody left, what is younger than that."""
        now, since = self._clock.now().mono, dict[str, float]()
        for incarnation in incarnations:
            if incarnation.alive or not (incarnation.exited or options.ended):
                continue
            left = incarnation.exited.mono if incarnation.exited else now  # nobody knows when it vanished
            since |= {uuid: max(left, since.get(uuid, left)) for uuid in incarnation.gpus}
        return replace(options.gpus, listed_since=since)

    def _with_failure(self, spec: Spec, incarnation: Incarnation) -> Incarnation:
        """With what its log says of its end; the log of one that ended is read once."""
        if incarnation.subject.kind != "endpoint" or incarnation.phase not in ("exited", "vanished"):
            return incarnation
        if incarnation.failure is not None:  # its program could not be run: there is no log of it
            return incarnation
        if incarnation.id not in self._failures:
            endpoint = endpoint_of(spec, incarnation)
            patterns = endpoint.profile.failures if endpoint else ()
            told = self._processes.log_tail(incarnation, LOG_TAIL_BYTES) if patterns else ""
            first = next((f for f in patterns if re.search(f.pattern, told)), None)
            self._failures[incarnation.id] = str(first) if first else None
            while len(self._failures) > MOST_FAILURES:
                del self._failures[next(iter(self._failures))]
        return replace(incarnation, failure=self._failures[incarnation.id])

    def _named(self, gpu: Gpu) -> Gpu:
        if not gpu.processes:
            return gpu
        return replace(gpu, processes=tuple(self._with_owner(process) for process in gpu.processes))

    def _with_owner(self, process: GpuProcess) -> GpuProcess:
        known = self._processes.describe(process.pid)
        return replace(process, owner=known.owner, user=known.user, command=known.command)

    def _ports(self, spec: Spec, incarnations: Iterable[Incarnation]) -> Mapping[int, PortHolder]:
        ports = wanted_ports(spec, incarnations)
        try:
            return self._processes.foreign_listeners(ports)
        except OSError:
            return {port: PortHolder(port, None, None) for port in sorted(ports)}

    def _has_jumped(self, now: Instant) -> bool:
        last, self._last = self._last, now
        return last is not None and abs((now.wall - last.wall) - now.since(last)) > CLOCK_JUMP_S


def _is_edited(spec: Spec, incarnation: Incarnation) -> bool:
    """Whether an endpoint runs otherwise than the baseline has it."""
    endpoint = spec.endpoints.get(incarnation.subject.name)
    is_endpoint = incarnation.subject.kind == "endpoint"
    return is_endpoint and endpoint is not None and endpoint.process_hash != incarnation.process_hash


def host_available() -> int | None:
    """Host memory that can be had without swapping (MemAvailable of proc_meminfo(5)), in bytes; None: not readable."""
    try:
        with open("/proc/meminfo", "rb") as file:  # noqa: PTH123 - read with every look: 20 us
            line = next(line for line in file if line.startswith(b"MemAvailable:"))
        return int(line.split()[1]) << 10
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def all_endpoints(spec: Spec) -> Iterator[EndpointSpec]:
    """Endpoints of the baseline, then those that overlays patch or add."""
    yield from spec.endpoints.values()
    for overlay in spec.overlays.values():
        yield from overlay.endpoints.values()


def wanted_ports(spec: Spec, incarnations: Iterable[Incarnation]) -> frozenset[int]:
    """Ports that an endpoint wants and no living incarnation of ours was given."""
    wanted = {endpoint.port for endpoint in all_endpoints(spec) if endpoint.port is not None}
    return frozenset(wanted - {i.port for i in incarnations if i.alive})


def probe_targets(
    spec: Spec, incarnations: Iterable[Incarnation], options: ObserveOptions = USUAL
) -> dict[str, ProbeTarget]:
    """Whom to ask, by incarnation id: endpoints that run, verified, on a port. The port is the incarnation's own.

    Requests in flight are counted of those that drain: their stop was asked for, and neither the drain is over nor a
    signal was sent.
    An endpoint that an overlay patches is asked as the version that this incarnation was started for; one that is in
    no file any more as it was when it was started, which tells when its requests are done.
    """
    targets: dict[str, ProbeTarget] = {}
    for incarnation in incarnations:
        if incarnation.phase != "running" or incarnation.subject.kind != "endpoint" or incarnation.port is None:
            continue
        endpoint, stop = endpoint_of(spec, incarnation), incarnation.stop
        asked = endpoint.questions if endpoint is not None else incarnation.questions
        if asked is None:
            continue
        targets[incarnation.id] = ProbeTarget(
            incarnation=incarnation.id,
            port=incarnation.port,
            health_path=asked.health_path,
            busy_metrics=asked.busy_metrics,
            interval_s=asked.interval_s,
            timeout_s=asked.timeout_s,
            failures=asked.failures,
            starting=incarnation.id not in options.ready_before,
            busy=incarnation.id in options.draining
            or (stop is not None and not stop.drained and stop.signalled is None),
            running_metrics=asked.running_metrics,
            progress_metrics=asked.progress_metrics,
            hung_s=asked.hung_s,
            load_path=asked.load_path,
            metrics_path=asked.metrics_path,
            sleep_check=endpoint.profile.sleep_check if endpoint and endpoint.evict.method == "sleep" else None,
        )
    return targets


def portless(incarnations: Iterable[Incarnation], now: Instant) -> dict[str, Probe]:
    """Probes of endpoints that nobody can ask, for want of a port: ready as long as they live."""
    return {
        i.id: Probe(i.id, now, ready=True, misses=0, failing_since=None, ready_since=i.started)
        for i in incarnations
        if i.phase == "running" and i.subject.kind == "endpoint" and i.port is None
    }


def endpoint_of(spec: Spec, incarnation: Incarnation) -> EndpointSpec | None:
    """The endpoint that an incarnation is one of: the version it was started for, else the baseline's, else any."""
    versions = [endpoint for endpoint in all_endpoints(spec) if endpoint.name == incarnation.subject.name]
    exact = (endpoint for endpoint in versions if endpoint.process_hash == incarnation.process_hash)
    return next(exact, versions[0] if versions else None)
