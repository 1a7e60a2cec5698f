"""Who needs no decision: endpoints that run as they should, and of whom nothing is remembered that could move them.

Most endpoints are calm at most moments. For each of them every rule would come to the same end, at ten times the cost:
it stays, as it was remembered, and shows as healthy. So the rules are asked of the others alone, and of a calm one from
the moment on at which an overlay speaks of it. A plan is the same whether anybody counts as calm or nobody does; a test
has both made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from reconciler.plan.endpoints import Standing
from reconciler.plan.observed import Incarnation
from reconciler.plan.situation import Situation
from reconciler.spec.spec import GpuCount


def calm_ones(situation: Situation) -> dict[str, Incarnation]:
    """The endpoints that need no decision as long as no overlay speaks of them, each with the incarnation that runs.

    Those whose set point is running, and of whom all of this holds:
        1. it runs once, whole and verified, and nobody asked it to stop
        2. what runs is what its set point asks for, on as many GPUs or on the pinned ones
        3. it answers, was seen ready before, is awake and does not hang
        4. of its past nothing counts any more: no eviction, end in a row, nap, move, failure, or clean start to come
    """
    remembered, probes, found = situation.ledger.endpoints, situation.observed.probes, {}
    endpoints = situation.running
    for name, current in situation.sole.items():
        endpoint, record, probe = endpoints.get(name), remembered.get(name), probes.get(current.id)
        if (
            endpoint is not None
            and record is not None
            and probe is not None
            and current.phase == "running"
            and current.strays == ()
            and current.stop is None
            and current.undying_since is None  # 1
            and current.process_hash == endpoint.process_hash
            and (
                len(current.gpus) == endpoint.gpus.count
                if type(endpoint.gpus) is GpuCount
                else situation.satisfies(endpoint.gpus, current.gpus)
            )  # 2
            and (not probe.misses or probe.misses < endpoint.health.failures)
            and not probe.sleeping
            and record.ready_incarnation == current.id
            and (probe.moved is None or probe.frozen_s < endpoint.health.hung_s)  # 3
            and record.state == "healthy"
            and not record.evictions
            and not record.streak
            and record.evicted_by is None
            and record.unhealthy_since is None
            and record.nap is None
            and record.move is None
            and record.failed is None
            and record.renew_before is None  # 4
        ):
            found[name] = current
    return found


def _nobody(name: str) -> Standing:
    raise KeyError(name)


class Standings(Mapping[str, Standing]):
    """How every endpoint stands, by name and in order; how a calm one does is worked out when somebody asks."""

    def __init__(self, names: Iterable[str] = (), judge: Callable[[str], Standing] = _nobody) -> None:
        self._known: dict[str, Standing | None] = dict.fromkeys(names)
        self._judge = judge

    def __getitem__(self, name: str) -> Standing:
        standing = self._known[name]
        if standing is None:
            standing = self._known[name] = self._judge(name)
        return standing

    def __setitem__(self, name: str, standing: Standing) -> None:
        self._known[name] = standing

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
