"""What the box itself lacks for what somebody needs, whoever gives way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reconciler.plan.board import Need
from reconciler.plan.situation import Situation
from reconciler.units import counted, format_size


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a set of needs finds no place."""

    reason: str
    message: str
    alternatives: tuple[str, ...]
    transient: bool


def lacking(situation: Situation, needs: Sequence[Need]) -> Refusal:
    """What the box itself lacks for these needs, whoever gives way."""
    names: list[str] = []
    for need in needs:
        rooms = [situation.rooms[g] for g in need.candidates if g in situation.rooms]
        small = [r for r in rooms if r.unusable is None and r.capacity_bytes < need.memory_bytes[r.gpu.uuid]]
        fitting = [r for r in rooms if r.unusable is None and r not in small]
        occupied = [
            r for r in small if r.gpu.total_bytes - situation.spec.node.reserve_bytes >= need.memory_bytes[r.gpu.uuid]
        ]
        broken = [r for r in rooms if r.unusable is not None]
        if len(fitting) >= need.count:
            continue
        names.append(need.subject.name)
        if occupied and len(fitting) + len(occupied) >= need.count:
            return Refusal(
                "GpuOccupied",
                _occupants(situation, [r.gpu.uuid for r in occupied]),
                ("end the foreign process, or choose other GPUs",),
                transient=True,
            )
        if broken and len(fitting) + len(occupied) + len(broken) >= need.count:
            first = broken[0]
            quarantine = situation.ledger.quarantines.get(first.gpu.uuid)
            why = quarantine.reason if quarantine else first.gpu.detail or first.unusable
            return Refusal(
                first.unusable or "GpuUnknown",
                f"GPU {first.gpu.index} cannot be used: {why}",
                (
                    f"`reconciler reset {first.gpu.index}` once it is mended"
                    if quarantine
                    else "see `reconciler status`",
                ),
                transient=first.unusable == "GpuUnknown",
            )
        offered = [r.gpu.total_bytes - situation.spec.node.reserve_bytes for r in rooms]
        if offered and (least := min(need.memory_bytes.values())) > max(offered):
            message = f"it wants {format_size(least)} on a GPU; the largest offers {format_size(max(offered))}"
            return Refusal("InsufficientMemory", message, ("ask for less memory",), transient=False)
        message = f"it wants {counted(need.count, 'GPU')}, and {len(rooms)} of this node may serve it"
        return Refusal("InsufficientGpus", message, ("ask for fewer GPUs",), transient=False)
    taken = ", ".join(names) or ", ".join(n.subject.name for n in needs)
    return Refusal("InsufficientGpus", f"no GPUs are left for {taken}", ("wait, or stop something",), transient=True)


def _occupants(situation: Situation, gpus: Sequence[str]) -> str:
    parts = []
    for uuid in gpus:
        gpu = situation.gpus[uuid]
        foreign = [p for p in gpu.processes or () if p.owner is None]
        who = (
            ", ".join(f"pid {p.pid}" + (f" ({p.user}: {p.command})" if p.command else "") for p in foreign)
            or "memory that no process is named for"
        )
        parts.append(f"GPU {gpu.index}: {format_size(situation.rooms[uuid].foreign_bytes)} held by {who}")
    return "; ".join(parts)
