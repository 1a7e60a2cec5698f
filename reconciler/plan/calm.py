"""Who needs no decision: endpoints that run as they should, and of whom nothing is remembered that could move them.

Most endpoints are calm at most moments. For each of them every rule would come to the same end, at ten times the cost:
it stays, as it was remembered, and shows as healthy. So the rules are asked of the others alone, and of a calm one from
the moment on at which an overlay speaks of it. A plan is the same whether anybody counts as calm or nobody does; a test
has both made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reconciler.plan.ledger import EndpointRecord
from reconciler.plan.observed import Incarnation, Observed
from reconciler.spec.spec import GpuClaim, GpuCount, Spec


def calm_ones(
    spec: Spec,
    observed: Observed,
    remembered: Mapping[str, EndpointRecord],
    satisfies: Callable[[GpuClaim, tuple[str, ...]], bool],
) -> tuple[dict[str, Incarnation], list[Incarnation]]:
    """The endpoints that need no decision as long as no overlay speaks of them, each with the incarnation that runs.

    And every other incarnation, as observed. It is the one walk over all that runs, so each is looked at once.
    Calm are those whose set point is running, and of whom all of this holds:
        1. it runs once, whole and verified, and nobody asked it to stop
        2. what runs is what its set point asks for, on as many GPUs or on the pinned ones
        3. it answers, was seen ready before, is awake and does not hang
        4. of its past nothing counts any more: no eviction, end in a row, nap, move, failure, or clean start to come
    """
    endpoints, probes = spec.endpoints, observed.probes
    calm: dict[str, Incarnation] = {}
    others: list[Incarnation] = []
    for current in observed.incarnations:
        name = current.subject.name
        endpoint, record, probe = endpoints.get(name), remembered.get(name), probes.get(current.id)
        if (
            endpoint is not None
            and record is not None
            and probe is not None
            and name not in calm
            and current.subject.kind == "endpoint"
            and current.phase == "running"
            and current.strays == ()
            and current.stop is None
            and current.undying_since is None  # 1
            and endpoint.state == "running"
            and current.process_hash == endpoint.process_hash
            and (
                len(current.gpus) == endpoint.gpus.count
                if type(endpoint.gpus) is GpuCount
                else satisfies(endpoint.gpus, current.gpus)
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
            calm[name] = current
        else:
            others.append(current)
    twice = {i.subject.name for i in others if i.subject.kind == "endpoint"} & calm.keys()
    if twice:
        for name in twice:
            del calm[name]
        others = [i for i in observed.incarnations if calm.get(i.subject.name) is not i]
    return calm, others
