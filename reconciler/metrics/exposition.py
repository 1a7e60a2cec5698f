"""What the metrics are: gauges read off the last tick, and counters of what was seen since this daemon began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from reconciler.loop.tick import Tick
from reconciler.plan.agenda import AgendaTracker
from reconciler.plan.ledger import LIVE, TERMINAL, EndpointState, OverlayRecord
from reconciler.plan.overlays import predicted_end

TICK_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RESTORE_BUCKETS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
STATES: tuple[EndpointState, ...] = get_args(EndpointState)


class Exposition(Collector):
    """Metrics over ticks. Seconds and bytes, as Prometheus wants them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tick: Tick | None = None
        self._began: float | None = None
        """Epoch seconds of the first tick: what is older was counted by an earlier daemon."""
        self._known: frozenset[str] = frozenset()
        """Incidents already counted."""
        self._evicted: dict[str, float] = {}
        """By endpoint: epoch seconds of the last eviction that was counted."""
        self._returning: dict[str, float] = {}
        """By endpoint on its way back: monotonic seconds when it was allowed to come back."""
        registry = self.registry
        self._ticks = Histogram(
            "reconciler_tick_seconds", "Time one look, decision and its starts took", buckets=TICK_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self._evictions = Counter(
            "reconciler_evictions", "Times an endpoint gave way to an overlay", ["endpoint"], registry=registry
        )
        self._restores = Histogram(
            "reconciler_restore_seconds", "From the end of an overlay until who gave way is ready again",
            ["endpoint"], buckets=RESTORE_BUCKETS, registry=registry,
        )  # fmt: skip
        self._opened = Counter(
            "reconciler_incidents_opened", "Incidents opened", ["kind", "severity"], registry=registry
        )
        self._nvml_errors = Counter(
            "reconciler_nvml_errors", "Looks that the driver did not answer, or not for every GPU", registry=registry
        )
        registry.register(self)

    def take(self, tick: Tick) -> None:
        """Count what is new in this tick, and answer from it until the next."""
        now = tick.plan.now
        if self._began is None:
            self._began = now.wall
        self._ticks.observe(tick.seconds)
        if not tick.observed.gpus_known or any(gpu.state == "unknown" for gpu in tick.observed.gpus):
            self._nvml_errors.inc()
        for incident in tick.incidents:
            if incident.id not in self._known and incident.opened >= int(self._began):
                self._opened.labels(incident.kind, incident.severity).inc()
        self._known = frozenset(incident.id for incident in tick.incidents)
        for name, record in tick.plan.ledger.endpoints.items():
            last = self._evicted.get(name, self._began)
            fresh = [at for at in record.evictions if at > last or (at == last and name not in self._evicted)]
            if fresh:
                self._evictions.labels(name).inc(len(fresh))
                self._evicted[name] = max(fresh)
            self._measure_return(tick, name, record.evicted_by)
        self._tick = tick

    def _measure_return(self, tick: Tick, name: str, evicted_by: str | None) -> None:
        view, now = tick.plan.endpoints.get(name), tick.plan.now.mono
        if view is None or (evicted_by is not None and view.desired != "running"):
            self._returning.pop(name, None)
        elif evicted_by is not None:
            self._returning.setdefault(name, now)
        elif (since := self._returning.pop(name, None)) is not None and view.state == "healthy":
            self._restores.labels(name).observe(now - since)

    def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and page, in the format that a scraper accepts."""
        encode, kind = choose_encoder(accept)
        return kind, encode(self.registry)

    def collect(self) -> Iterable[Metric]:
        """The gauges of the last tick; none before the first."""
        if self._tick is None:
            return ()
        return (
            *_daemon(self._tick),
            *_endpoints(self._tick),
            *_gpus(self._tick),
            *_overlays(self._tick),
            *_capabilities(self._tick),
        )


def _daemon(tick: Tick) -> Iterator[Metric]:
    plan, in_force = tick.plan, tick.spec
    build = GaugeMetricFamily("reconciler_build_info", "Version of the program", labels=["version"])
    build.add_metric([_version()], 1)
    yield build
    yield GaugeMetricFamily("reconciler_last_tick_timestamp_seconds", "When the box was last looked at", plan.now.wall)
    yield GaugeMetricFamily("reconciler_converged", "Whether nothing is left to do", int(plan.converged))
    yield GaugeMetricFamily("reconciler_spec_problems", "Problems of files not in force", len(in_force.problems))
    yield GaugeMetricFamily("reconciler_nvml_up", "Whether the driver answers", int(tick.observed.gpus_known))
    incidents = GaugeMetricFamily(
        "reconciler_incidents", "Incidents not yet resolved", labels=["kind", "severity", "subject"]
    )
    for incident in tick.incidents:
        if incident.state != "resolved":
            incidents.add_metric([incident.kind, incident.severity, incident.subject], 1)
    yield incidents
    untold = Metric("reconciler_notification_failures", "Deliveries of notices given up", "counter")
    for name in in_force.spec.notify:
        untold.add_sample("reconciler_notification_failures_total", {"notifier": name}, tick.untold.get(name, 0))
    yield untold


def _endpoints(tick: Tick) -> Iterator[Metric]:
    plan = tick.plan
    tracker = AgendaTracker(plan.ledger.agenda, plan.now.wall)
    state = GaugeMetricFamily("reconciler_endpoint_state", "1 for the state it is in", labels=["endpoint", "state"])
    desired = GaugeMetricFamily(
        "reconciler_endpoint_desired", "1 for what it is meant to be", labels=["endpoint", "desired"]
    )
    expected = GaugeMetricFamily(
        "reconciler_endpoint_expected_state", "1 for each state that the agenda expects of it now",
        labels=["endpoint", "state"],
    )  # fmt: skip
    planned = GaugeMetricFamily(
        "reconciler_endpoint_planned", "Whether the agenda explains the state it is in", labels=["endpoint"]
    )
    until = GaugeMetricFamily(
        "reconciler_endpoint_planned_until_timestamp_seconds", "End of its agenda entry in force", labels=["endpoint"]
    )
    for name, view in sorted(plan.endpoints.items()):
        entry = tracker.entry(name)
        states = entry.expected_states if entry else ()
        for each in STATES:
            state.add_metric([name, each], int(view.state == each))
        desired.add_metric([name, view.desired], 1)
        for each in dict.fromkeys(states):
            expected.add_metric([name, each], 1)
        planned.add_metric([name], int(view.state in states))
        if entry is not None:
            until.add_metric([name], entry.until)
    yield from (state, desired, expected, planned, until)


def _gpus(tick: Tick) -> Iterator[Metric]:
    labels = ["gpu", "uuid"]
    state = GaugeMetricFamily("reconciler_gpu_state", "1 for the state it is in", labels=[*labels, "state"])
    total = GaugeMetricFamily("reconciler_gpu_memory_total_bytes", "Memory of a GPU", labels=labels)
    used = GaugeMetricFamily("reconciler_gpu_memory_used_bytes", "Memory in use, by anybody", labels=labels)
    foreign = GaugeMetricFamily("reconciler_gpu_foreign_processes", "Processes on it that are not ours", labels=labels)
    for gpu in tick.observed.gpus:
        who = [str(gpu.index), gpu.uuid]
        held = gpu.uuid in tick.plan.ledger.quarantines and gpu.state == "ok"
        state.add_metric([*who, "quarantined" if held else gpu.state], 1)
        total.add_metric(who, gpu.total_bytes)
        if gpu.used_bytes is not None:
            used.add_metric(who, gpu.used_bytes)
        if gpu.processes is not None:
            foreign.add_metric(who, sum(process.owner is None for process in gpu.processes))
    yield from (state, total, used, foreign)


def _overlays(tick: Tick) -> Iterator[Metric]:
    state = GaugeMetricFamily("reconciler_overlay_state", "1 for the state it is in", labels=["overlay", "state"])
    predicted = GaugeMetricFamily(
        "reconciler_overlay_makespan_predicted_seconds", "How long its work should take", labels=["overlay"]
    )
    actual = GaugeMetricFamily(
        "reconciler_overlay_makespan_actual_seconds", "How long its work took, or has taken so far", labels=["overlay"]
    )
    for name, record in sorted(tick.plan.ledger.overlays.items()):
        state.add_metric([name, record.state], 1)
        spec = tick.spec.spec.overlays.get(name)
        began = record.active_since
        if began is None:
            continue
        if spec is not None:
            end = predicted_end(record, spec.makespan, began.wall)
            predicted.add_metric([name], max(0.0, end - began.wall))
        actual.add_metric([name], max(0.0, _worked_until(record, tick.plan.now.wall) - began.wall))
    yield from (state, predicted, actual)


def _worked_until(record: OverlayRecord, now: float) -> float:
    """Epoch seconds when its work ended, or now while it goes on."""
    return record.since.wall if record.state in TERMINAL or record.state not in LIVE else now


def _capabilities(tick: Tick) -> Iterator[Metric]:
    ready = GaugeMetricFamily("reconciler_capability_ready", "Ready providers", labels=["capability"])
    floor = GaugeMetricFamily("reconciler_capability_min_available", "Floor on ready providers", labels=["capability"])
    spec = tick.spec.spec
    offered = {name for endpoint in spec.endpoints.values() for name in endpoint.capabilities}
    for name in sorted(offered | set(spec.floors)):
        providers = [e.name for e in spec.endpoints.values() if name in e.capabilities]
        views = [tick.plan.endpoints.get(provider) for provider in providers]
        ready.add_metric([name], sum(view is not None and view.state == "healthy" for view in views))
        floor.add_metric([name], spec.floors.get(name, 0))
    yield from (ready, floor)


def _version() -> str:
    try:
        return version("reconciler")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
