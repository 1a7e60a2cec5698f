"""`Incident`: something observed that neither the set points nor the agenda explain."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from reconciler.clock import Instant

IncidentKind = Literal[
    "Unplanned", "WrongWay", "Overdue", "Hung", "CrashLoop", "RestoreDegraded", "ForeignMemory", "PortInUse",
    "WorkloadFailed", "OverlayFailed", "OverlayOverdue", "GpuLost", "GpuQuarantined", "SpecRejected", "FloorBroken",
    "Blind",
]  # fmt: skip
"""
Unplanned:      away from its set point, and neither an agenda entry nor a reboot says why
WrongWay:       inside an agenda entry, in a state that the entry does not expect
Overdue:        still away after its agenda entry ended
Hung:           its engine stands still with requests running, however green its health page is
CrashLoop:      failed; it stays so until its spec changes or it is reset
RestoreDegraded: unwell or failed on its way back from an overlay: the baseline is not what it was before
ForeignMemory:  kept from starting by memory of a process that is not ours
PortInUse:      kept from starting by a port that someone else holds
WorkloadFailed: an overlay's own workload ended with an error; never suppressed
OverlayFailed:  an overlay failed for another reason than its workload's exit code
OverlayOverdue: an overlay runs past its duration and grace
GpuLost, GpuQuarantined: a GPU that can no longer be used
SpecRejected:   a file that could not be accepted and changes nothing
Blind:          the daemon cannot look at the box, for want of descriptors or memory; nothing is done meanwhile
FloorBroken:    fewer ready providers of a capability than `min_available`, and no provider's own incident says why
"""

Severity = Literal["info", "warning", "critical"]
RANK: dict[Severity, int] = {"info": 0, "warning": 1, "critical": 2}


class Incident(Struct, frozen=True):
    """One trouble of one subject, from its first sighting until it has stayed away for a while."""

    id: str
    """The fingerprint and the second of opening: unique over all history."""
    kind: IncidentKind
    subject: str
    """Endpoint, overlay, GPU UUID, file or capability."""
    severity: Severity
    """The worst it has been."""
    message: str
    state: Literal["open", "recovering", "resolved"]
    since: Instant
    """When it entered `state`."""
    opened: float
    """Epoch seconds."""
    last_seen: float
    """Epoch seconds; to the minute while it lasts."""
    count: int = 1
    """How often it came, the first time included; a flapping subject counts up and opens nothing new."""
    resolved_at: float | None = None
    overlay: str | None = None
    """The overlay whose planned transition it happened in or after, if any."""

    @property
    def fingerprint(self) -> str:
        """Kind and subject: at most one unresolved incident has it."""
        return f"{self.kind}/{self.subject}"
