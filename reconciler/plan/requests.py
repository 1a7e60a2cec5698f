"""What people ask for beyond the files: changes of the ledger or the spec that the next decision then carries out."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import UnknownName
from reconciler.plan.actions import Event
from reconciler.plan.endpoints import forgiven
from reconciler.plan.ledger import TERMINAL, EndpointRecord, Ledger
from reconciler.spec.spec import Spec


def reset(ledger: Ledger, name: str, gpus: dict[str, str]) -> tuple[Ledger, tuple[Event, ...]] | None:
    """Clear what keeps an endpoint, overlay or GPU from being tried again; None when there is nothing of that name.

    Args:
        ledger: the ledger as it stands
        name: an endpoint, a finished overlay (it runs again), or a GPU by index or UUID
        gpus: index (as text) and UUID → UUID
    """
    uuid = gpus.get(name)
    if name in ledger.endpoints:
        record = ledger.endpoints[name]
        clean = replace(forgiven(record), evictions=(), unhealthy_since=None, ending=None)
        event = Event("reset", name, "failures, back-off and evictions forgotten", "request")
        return replace(ledger, endpoints={**ledger.endpoints, name: clean}), (event,)
    if name in ledger.overlays and ledger.overlays[name].state in TERMINAL:
        rest = {n: r for n, r in ledger.overlays.items() if n != name}
        return replace(ledger, overlays=rest), (Event("reset", name, "it runs again if its file is there", "request"),)
    if uuid is not None and uuid in ledger.quarantines:
        rest_gpus = {g: q for g, q in ledger.quarantines.items() if g != uuid}
        return replace(ledger, quarantines=rest_gpus), (Event("reset", uuid, "no longer quarantined", "request"),)
    if name in ledger.overlays or uuid is not None:
        return ledger, ()
    return None


def unknown(ledger: Ledger, name: str, gpus: dict[str, str]) -> UnknownName:
    """The error for a name that `reset` knows nothing of."""
    return UnknownName(f"nothing is named {name!r}", name=name, known={*ledger.endpoints, *ledger.overlays, *gpus})


def clean_start(ledger: Ledger, names: Collection[str], now: Instant) -> tuple[Ledger, tuple[Event, ...]]:
    """Have these endpoints ended, forgiven and started afresh; quarantined GPUs get another chance."""
    endpoints = dict(ledger.endpoints)
    for name in sorted(names):
        record = endpoints.get(name) or EndpointRecord(name)
        endpoints[name] = replace(forgiven(record), unhealthy_since=None, ending=None, renew_before=now)
    events = tuple(Event("clean-start", name, "a clean start was asked for", "request") for name in sorted(names))
    return replace(ledger, endpoints=endpoints, quarantines={}), events


def stopped(spec: Spec, names: Collection[str]) -> Spec:
    """The spec with these endpoints' set points stopped; with every endpoint, overlays are withdrawn as well."""
    endpoints = {n: replace(e, state="stopped") if n in names else e for n, e in spec.endpoints.items()}
    rest = replace(spec, endpoints=endpoints, floors={}, digest=spec.digest + "-stopped")
    everything = set(names) >= set(spec.endpoints)
    return replace(rest, overlays={}, withdrawn=tuple(spec.overlays)) if everything else rest
