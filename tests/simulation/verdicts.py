"""What the incidents of one story should have been."""

from __future__ import annotations

from running import Outcome

MISSES_S = 15.0
"""Three probes in a row, five seconds apart: before the third nobody can tell a hang from a slow answer."""
SEEN_S = 120.0
"""Within which an incident has to be open: a hang is one after some misses."""


def false_incidents(outcome: Outcome) -> list[str]:
    """Incidents of subjects that nothing was done to."""
    struck = {subject for _, subject, _ in outcome.box.struck}
    gpus = {subject for kind, subject, _ in outcome.box.struck if kind == "gpu_lost"}
    beside = struck | (set(outcome.scenario.endpoints) | {d.name for d in outcome.scenario.drops} if gpus else set())
    return [i.id for i in outcome.box.incidents.values() if i.subject not in beside]


def missed(outcome: Outcome) -> list[tuple[str, str, float]]:
    """Strikes that no incident of their subject tells of, and that somebody could have noticed.

    A hang is one after three misses. Who is displaced as planned before that is stopped anyhow, and comes back afresh.
    """
    found = outcome.box.incidents.values()
    return [
        (kind, subject, at)
        for kind, subject, at in outcome.box.struck
        if not any(
            i.subject == subject and i.opened <= at + SEEN_S and (i.resolved_at or i.last_seen + 60) >= at
            for i in found
        )
        and not (kind == "hang" and any(n == subject and at <= w <= at + MISSES_S for n, w in outcome.box.evictions))
    ]
