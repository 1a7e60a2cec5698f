"""What a box lacks for those who find no place on it, whoever gives way."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from reconciler.plan.board import Need
from reconciler.plan.situation import Room, Situation
from reconciler.spec.spec import GpuClaim, GpuPins
from reconciler.units import counted, format_size

_UNUSABLE = {
    "GpuUnknown": (
        "it cannot be read at the moment",
        "wait: it is read again and again; `reconciler doctor` says more",
    ),
    "GpuLost": ("the driver has lost it", "reset GPU {index} (`nvidia-smi --gpu-reset -i {index}`), or reboot"),
    "GpuUnhealthy": ("it has to be reset", "reset GPU {index} (`nvidia-smi --gpu-reset -i {index}`), or reboot"),
    "Quarantined": ("its memory did not come back", "`reconciler reset {index}` once it is mended"),
    "NotManaged": ("it is not among those of `node.gpus`", "add it to `node.gpus`, or choose other GPUs"),
}
"""Why a GPU cannot be used, where the driver does not say more, and what would mend that."""


class Refusal(Struct, frozen=True):
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
                occupants(situation, [r.gpu.uuid for r in occupied]),
                ("end the foreign process, or choose other GPUs",),
                transient=True,
            )
        if broken and len(fitting) + len(occupied) + len(broken) >= need.count:
            first = broken[0]
            code, index = first.unusable or "GpuUnknown", first.gpu.index
            hint = _UNUSABLE[code][1].format(index=index)
            message = f"GPU {index} cannot be used: {why_unusable(situation, first)}"
            return Refusal(code, message, (hint,), transient=code == "GpuUnknown")
        offered = [r.gpu.total_bytes - situation.spec.node.reserve_bytes for r in rooms]
        if offered and (least := min(need.memory_bytes.values())) > max(offered):
            message = f"it wants {format_size(least)} on a GPU; the largest offers {format_size(max(offered))}"
            hint = "ask for less memory, or leave `memory:` out and have a whole GPU"
            return Refusal("InsufficientMemory", message, (hint,), transient=False)
        message = f"it wants {counted(need.count, 'GPU')}, and {len(rooms)} of this node may serve it"
        return Refusal("InsufficientGpus", message, ("ask for fewer GPUs",), transient=False)
    taken = ", ".join(names) or ", ".join(n.subject.name for n in needs)
    return Refusal("InsufficientGpus", f"no GPUs are left for {taken}", ("wait, or stop something",), transient=True)


def why_unusable(situation: Situation, room: Room) -> str:
    """Why nothing is placed on a GPU, in words."""
    quarantine = situation.ledger.quarantines.get(room.gpu.uuid)
    return quarantine.reason if quarantine else room.gpu.detail or _UNUSABLE[room.unusable or "GpuUnknown"][0]


def occupants(situation: Situation, gpus: Sequence[str]) -> str:
    """Who holds memory on these GPUs that is not ours, and how much."""
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


def no_such_gpu(situation: Situation, *claims: GpuClaim) -> tuple[str, str]:
    """Which pin names a GPU that this node does not have, and what would help."""
    pins = [ref for claim in claims if isinstance(claim, GpuPins) for ref in claim.refs]
    missing = sorted({str(ref) for ref in pins if situation.resolve_pins(GpuPins((ref,))) is None})
    there = ", ".join(str(gpu.index) for gpu in situation.observed.gpus) or "none"
    return f"it is pinned to GPU {', '.join(missing)}; those of this node are {there}", "correct gpus:"
