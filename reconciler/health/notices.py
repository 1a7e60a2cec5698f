"""What a notifier is to be told: the difference between the incidents as they are and those it was last told of.

Level-triggered, as everything here: nothing is queued. What came and went before anybody could be told is not told, and
what could not be told stays due until it is told or no longer true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec import Struct

from reconciler.health.incident import RANK, Incident, Severity

Change = Literal["opened", "escalated", "resolved"]


class Notice(Struct, frozen=True):
    """One thing to tell of one incident."""

    change: Change
    incident: Incident


def due(incidents: Iterable[Incident], told: Mapping[str, Incident], least: Severity) -> tuple[Notice, ...]:
    """The notices that bring someone up to date, oldest incident first.

    An incident that recovers or returns is the same incident: nobody is told of its ups and downs.

    Args:
        incidents: those not resolved; resolved ones among them only tell when they were
        told: by incident id, each as it was when last told of and not yet told to be resolved
        least: severities below it are not told
    """
    now = {incident.id: incident for incident in incidents}
    found: list[Notice] = []
    for incident in now.values():
        if incident.state == "resolved" or RANK[incident.severity] < RANK[least]:
            continue
        before = told.get(incident.id)
        if before is None:
            found.append(Notice("opened", incident))
        elif RANK[incident.severity] > RANK[before.severity]:
            found.append(Notice("escalated", incident))
    for name, before in told.items():
        current = now.get(name, before)
        if name not in now or current.state == "resolved":
            found.append(Notice("resolved", current))
    return tuple(sorted(found, key=lambda notice: (notice.incident.opened, notice.incident.id)))


def after(told: Mapping[str, Incident], notices: Iterable[Notice]) -> dict[str, Incident]:
    """What someone has been told once these notices arrived."""
    known = dict(told)
    for notice in notices:
        if notice.change == "resolved":
            known.pop(notice.incident.id, None)
        else:
            known[notice.incident.id] = notice.incident
    return known
