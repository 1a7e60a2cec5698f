"""Short ways to write the planner's inputs: set points, overlays, GPUs, incarnations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from reconciler.clock import Instant
from reconciler.plan.observed import Gpu, GpuProcess, Incarnation, Observed, Phase, Probe, Subject
from reconciler.spec.spec import (
    EndpointSpec,
    Evict,
    GpuClaim,
    GpuCount,
    GpuPins,
    Health,
    Makespan,
    MemoryBytes,
    MemoryClaim,
    MemoryFraction,
    Node,
    OverlaySpec,
    Policy,
    Restart,
    Source,
    Spec,
    Stop,
    WholeGpu,
    Workload,
)
from reconciler.units import GIB

RESERVE = GIB
"""Of every GPU, unless set otherwise: `node.reserve`."""
NOW = Instant(wall=1795467600.0, mono=50_000.0)
"""2026-11-23 21:00:00 UTC."""
AN_HOUR_AGO = NOW.plus(-3600)


def uuid(index: int) -> str:
    """The UUID of the GPU with this index on every node built here."""
    return f"GPU-{index:08d}"


def claim(gpus: int | Iterable[int] | None) -> GpuClaim | None:
    """`2` is a count, `[0, 1]` are pins."""
    if gpus is None:
        return None
    return GpuCount(gpus) if isinstance(gpus, int) else GpuPins(tuple(gpus))


def memory_claim(memory: int | float | None) -> MemoryClaim:
    """None is the whole GPU, a float a fraction, an int a number of GiB."""
    if memory is None:
        return WholeGpu()
    return MemoryFraction(memory) if isinstance(memory, float) else MemoryBytes(memory * GIB)


def digest(*parts: object) -> str:
    """A stable short hash of some values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def endpoint(
    name: str,
    gpus: int | Iterable[int] = 1,
    *,
    memory: int | float | None = None,
    model: str = "m",
    capabilities: tuple[str, ...] = (),
    priority: int = 500,
    state: Literal["running", "standby", "stopped"] = "running",
    preemptible: bool = True,
    movable: bool = False,
    port: int | None = None,
    stop: Stop | None = None,
    restart: Restart | None = None,
    health: Health | None = None,
    evict: Evict | None = None,
    line: int = 1,
) -> EndpointSpec:
    """An endpoint of the vllm engine on a port derived from its name."""
    gpu_claim, bytes_claim = claim(gpus), memory_claim(memory)
    assert gpu_claim is not None
    return EndpointSpec(
        name=name,
        model=model,
        engine="vllm",
        executable=None,
        capabilities=capabilities,
        gpus=gpu_claim,
        memory=bytes_claim,
        port=port if port is not None else 8000 + int(digest(name), 16) % 20000,
        priority=priority,
        state=state,
        preemptible=preemptible,
        movable=movable,
        evict=evict or Evict(),
        args=(),
        command=None,
        env={},
        env_file=None,
        cwd="/",
        health=health or Health(),
        stop=stop or Stop(),
        restart=restart or Restart(),
        process_hash=digest(model, gpu_claim.count, bytes_claim),
        source=Source("setpoints.yaml", line, 3),
    )


def overlay(
    name: str,
    gpus: int | Iterable[int] | None = 1,
    *,
    memory: int | float | None = None,
    priority: int = 600,
    evict: bool = True,
    duration: float | None = 600.0,
    grace: float = 60.0,
    start: float | None = None,
    deadline: float | None = None,
    on_overrun: Literal["continue", "stop"] = "continue",
    requires: tuple[str, ...] = (),
    workload: bool = True,
    retries: int = 0,
    preemptible: bool = False,
    sets: Iterable[EndpointSpec] = (),
) -> OverlaySpec:
    """An overlay with a workload, as soon as it is seen, for ten minutes."""
    sets = tuple(sets)
    work = Workload(("job", name), {}, None, "/", retries, preemptible, Stop())
    shape = (claim(gpus), memory_claim(memory), workload, requires, sets)
    return OverlaySpec(
        name=name,
        priority=priority,
        allow_baseline_eviction=evict,
        makespan=Makespan(start, duration, grace, on_overrun, deadline, None, None, 3600.0),
        gpus=claim(gpus),
        memory=memory_claim(memory),
        requires=requires,
        workload=work if workload else None,
        endpoints={e.name: e for e in sets},
        on_edit="wait",
        placement_hash=digest(name, *shape),
        source=Source(f"overlays/{name}.yaml", 1, 1),
    )


def spec(
    *items: EndpointSpec | OverlaySpec,
    floors: Mapping[str, int] | None = None,
    node_gpus: tuple[int | str, ...] | None = None,
    policy: Policy | None = None,
) -> Spec:
    """The whole, from endpoints and overlays in any order."""
    return Spec(
        node=Node("box", node_gpus),
        policy=policy or Policy(),
        floors=floors or {},
        endpoints={e.name: e for e in items if isinstance(e, EndpointSpec)},
        overlays={o.name: o for o in items if isinstance(o, OverlaySpec)},
        digest=digest(*sorted(repr(i) for i in items)),
    )


def claimed(memory: MemoryClaim, total: int) -> int:
    """Bytes on one GPU."""
    match memory:
        case WholeGpu():
            return total - RESERVE
        case MemoryFraction(fraction):
            return int(total * fraction)
        case MemoryBytes(size):
            return size


def gpu(index: int, *, total: int = 80 * GIB, used: int | None = 0, **fields: Any) -> Gpu:
    """A GPU in order, with nothing on it."""
    default: dict[str, Any] = {
        "state": "ok", "processes": (), "detail": "", "healthy": True, "at": NOW, "name": "Simulated 80GB",
    }  # fmt: skip
    return Gpu(index=index, uuid=uuid(index), total_bytes=total, used_bytes=used, **{**default, **fields})


def foreign(pid: int, size: int, command: str = "python train.py") -> GpuProcess:
    """A process of somebody else on a GPU."""
    return GpuProcess(pid, size, None, "someone", command)


def incarnation(
    of: EndpointSpec | OverlaySpec,
    on: Iterable[int],
    *,
    key: str | None = None,
    phase: Phase = "running",
    started: Instant = AN_HOUR_AGO,
    total: int = 80 * GIB,
    **fields: Any,
) -> Incarnation:
    """One start of `of` on these GPUs, an hour ago."""
    indices = tuple(on)
    is_endpoint = isinstance(of, EndpointSpec)
    match of.memory:
        case MemoryBytes(size):
            each = size
        case MemoryFraction(fraction):
            each = int(total * fraction)
        case WholeGpu():
            each = total - GIB
    made_for = of.process_hash if isinstance(of, EndpointSpec) else of.placement_hash
    default: dict[str, Any] = {"process_hash": made_for, "pid": 4000, "strays": (), "exit_code": None, "exited": None}
    return Incarnation(
        id=key or f"{of.name}-0",
        subject=Subject("endpoint" if is_endpoint else "workload", of.name),
        gpus=tuple(uuid(i) for i in indices),
        memory_bytes=(each,) * len(indices),
        exclusive=isinstance(of.memory, WholeGpu),
        port=of.port if isinstance(of, EndpointSpec) else None,
        started=started,
        phase=phase,
        questions=of.questions if isinstance(of, EndpointSpec) else None,
        **{**default, **fields},
    )


def ready(of: Incarnation, at: Instant = NOW) -> Probe:
    """The probe of an incarnation that answers."""
    return Probe(of.id, at, True, 0, None, of.started.plus(60), 0)


def observed(
    *gpus: Gpu, incarnations: Iterable[Incarnation] = (), healthy: bool = True, at: Instant = NOW, **fields: Any
) -> Observed:
    """One look at the box; every running incarnation answers unless `healthy` is false."""
    found = tuple(sorted(incarnations, key=lambda i: (i.subject, i.started.wall, i.id)))
    probes = {i.id: ready(i, at) for i in found if healthy and i.phase == "running" and i.subject.kind == "endpoint"}
    return Observed(at, "boot", gpus, found, probes, **fields)
