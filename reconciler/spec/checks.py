"""What must hold between endpoints: ports, pins and floors; and between a spec and a real box."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from reconciler.errors import Problem, suggest
from reconciler.spec.engines import meeting_port
from reconciler.spec.findings import Findings
from reconciler.spec.spec import (
    EndpointSpec,
    GpuClaim,
    GpuCount,
    GpuPins,
    MemoryFraction,
    Source,
    Spec,
    WholeGpu,
)
from reconciler.spec.tree import Node, child, locate
from reconciler.units import counted

_EXACT_UP_TO = 10  # providers of one capability for which every set is tried; beyond, the simple count stands


def check_ports(endpoints: Sequence[EndpointSpec], texts: Mapping[str, Node], findings: Findings) -> None:
    """Note every port that two endpoints claim; the first of `endpoints` has it."""
    first: dict[int, tuple[EndpointSpec, str]] = {}
    for endpoint in endpoints:
        for port, use in ((endpoint.port, ""), (meeting_port(endpoint), ", where its GPUs' processes meet,")):
            if port is None:
                continue
            if port in first:
                other, its_use = first[port]
                message = f'port {port}{use} is already taken by endpoint "{other.name}"{its_use.rstrip(",")}'
                findings.add(
                    _at(endpoint, texts, "port"), message, f"{_where(other, endpoint)}; give one of them another port"
                )
            else:
                first[port] = endpoint, use


def check_metrics_port(port: int | None, endpoints: Iterable[EndpointSpec], text: Node, findings: Findings) -> None:
    """Note that the page of metrics and an endpoint claim one port; the endpoint has it."""
    for endpoint in endpoints:
        if port is not None and endpoint.port == port:
            at = locate(text, ("metrics", "port"))
            findings.add(at, f'port {port} is already taken by endpoint "{endpoint.name}"', "give metrics another port")


def check_pins(endpoints: Sequence[EndpointSpec], texts: Mapping[str, Node], findings: Findings) -> None:
    """Note running endpoints whose pins cannot hold at the same time."""
    running = [e for e in sorted(endpoints, key=lambda e: e.source) if e.state == "running"]
    by_gpu: dict[int | str, list[EndpointSpec]] = {}
    for endpoint in running:
        for ref in endpoint.gpus.refs if isinstance(endpoint.gpus, GpuPins) else ():
            by_gpu.setdefault(ref, []).append(endpoint)
    told: set[str] = set()
    for ref, claimants in by_gpu.items():
        for index, endpoint in enumerate(claimants):
            earlier = [e for e in claimants[:index] if isinstance(e.memory, WholeGpu)][:1]
            if isinstance(endpoint.memory, WholeGpu):
                earlier = claimants[: min(index, 1)]
            if earlier and endpoint.name not in told:
                told.add(endpoint.name)
                message = f'GPU {ref} is pinned by "{earlier[0].name}" too, and one of them wants it whole'
                hint = (
                    f"{_where(earlier[0], endpoint)}; give both a `memory`, other GPUs, or one of them `state: standby`"
                )
                findings.add(_at(endpoint, texts, "gpus"), message, hint)
        shares = [e.memory.fraction for e in claimants if isinstance(e.memory, MemoryFraction)]
        if len(shares) > 1 and len(shares) == len(claimants) and sum(shares) > 1 + 1e-9:
            last, names = claimants[-1], ", ".join(e.name for e in claimants)
            message = f"GPU {ref} is pinned for {sum(shares):.2f} of its memory ({names})"
            findings.add(_at(last, texts, "memory"), message, "the fractions on one GPU may add up to 1")


def check_floors(
    floors: Mapping[str, int], endpoints: Sequence[EndpointSpec], text: Node, node_gpus: int | None, findings: Findings
) -> None:
    """Note every floor that no set of endpoints can meet, and floors of capabilities that nobody offers."""
    offered = {name for endpoint in endpoints for name in endpoint.capabilities}
    at_once: dict[tuple[str, ...], int] = {}
    for name, floor in floors.items():
        if name not in offered:
            at = locate(text, ("capabilities", name), key=True)
            hint = suggest(name, offered) or "list it under the `capabilities` of an endpoint"
            findings.add(at, f'no endpoint offers the capability "{name}"', hint)
            continue
        providers = [e for e in endpoints if name in e.capabilities and e.state != "stopped"]
        if not floor:
            continue
        key = tuple(e.name for e in providers)
        if key not in at_once:
            at_once[key] = _most_at_once(providers, node_gpus)
        most = at_once[key]
        if floor > most:
            at = locate(text, ("capabilities", name, "min_available"))
            wanted = counted(floor, "ready provider")
            message = f'"{name}" shall have {wanted}, and at most {most} can run at the same time'
            listed = ", ".join(e.name for e in providers[:10]) or "none that may run"
            findings.add(at, message, f"providers: {listed}")


def check_against_node(spec: Spec, gpu_indices: Sequence[int], gpu_uuids: Sequence[str]) -> tuple[Problem, ...]:
    """Claims that the box itself cannot serve: pins to GPUs it does not have, counts above their number.

    Args:
        spec: what people wrote.
        gpu_indices: NVML indices of the box's GPUs.
        gpu_uuids: their UUIDs, in the same order.
    """
    index_of: dict[int | str, int] = {uuid: index for index, uuid in zip(gpu_indices, gpu_uuids, strict=True)}
    index_of |= {index: index for index in gpu_indices}
    found = Findings()
    whole_file = Source(next((e.source.file for e in spec.endpoints.values()), "node.gpus"), 0, 0)
    for ref in spec.node.gpus or ():
        if ref not in index_of:
            found.add(whole_file, f"node.gpus names GPU {ref}, which this box does not have", _box(gpu_indices))
    usable = {
        index_of[ref] for ref in (spec.node.gpus if spec.node.gpus is not None else gpu_indices) if ref in index_of
    }
    for what, claim, source in _claims(spec):
        match claim:
            case GpuCount(count):
                if count > len(usable):
                    message = f"{what} wants {counted(count, 'GPU')}, the node has {len(usable)}"
                    found.add(source, message, _box(gpu_indices))
            case GpuPins(refs):
                found.extend(_check_refs(what, refs, source, index_of, usable, _box(gpu_indices)))
    return tuple(found)


def _check_refs(
    what: str, refs: Sequence[int | str], source: Source, index_of: Mapping[int | str, int], usable: set[int], box: str
) -> Iterator[Problem]:
    seen: dict[int, int | str] = {}
    for ref in refs:
        index = index_of.get(ref)
        if index is None:
            message = f"{what} is pinned to GPU {ref}, which this box does not have"
        elif index not in usable:
            message = f"{what} is pinned to GPU {ref}, which is not in node.gpus"
        elif index in seen:
            message = f"{what} is pinned twice to one GPU: {seen[index]} is {ref}"
        else:
            seen[index] = ref
            continue
        yield Problem(source.file, source.line, source.column, message, box)


def _claims(spec: Spec) -> Iterator[tuple[str, GpuClaim, Source]]:
    for endpoint in spec.endpoints.values():
        yield f'endpoint "{endpoint.name}"', endpoint.gpus, endpoint.source
    for overlay in spec.overlays.values():
        if overlay.gpus is not None:
            yield f'overlay "{overlay.name}"', overlay.gpus, overlay.source
        for endpoint in overlay.endpoints.values():
            yield f'endpoint "{endpoint.name}"', endpoint.gpus, endpoint.source


def _box(gpu_indices: Sequence[int]) -> str:
    return f"the box has {counted(len(gpu_indices), 'GPU')}: {', '.join(map(str, gpu_indices)) or 'none'}"


def _most_at_once(providers: Sequence[EndpointSpec], node_gpus: int | None) -> int:
    """Size of the largest set of providers that pins and the number of GPUs allow together."""
    if len(providers) > _EXACT_UP_TO:
        return len(providers)
    for size in range(len(providers), 0, -1):
        if any(_compatible(chosen, node_gpus) for chosen in combinations(providers, size)):
            return size
    return 0


def _compatible(chosen: Sequence[EndpointSpec], node_gpus: int | None) -> bool:
    whole = [e for e in chosen if isinstance(e.memory, WholeGpu)]
    if node_gpus is not None and sum(e.gpus.count for e in whole) > node_gpus:
        return False
    for one, other in combinations(chosen, 2):
        if isinstance(one.gpus, GpuPins) and isinstance(other.gpus, GpuPins):
            exclusive = isinstance(one.memory, WholeGpu) or isinstance(other.memory, WholeGpu)
            if exclusive and set(one.gpus.refs) & set(other.gpus.refs):
                return False
    return True


def _at(endpoint: EndpointSpec, texts: Mapping[str, Node], key: str) -> Source:
    text = texts.get(endpoint.name)
    if text is None or child(text, key) is None:
        return endpoint.source
    return locate(text, (key,))


def _where(other: EndpointSpec, endpoint: EndpointSpec) -> str:
    same = other.source.file == endpoint.source.file
    return f"it is on line {other.source.line}" if same else f"it is at {other.source}"
