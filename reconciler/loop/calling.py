"""From a planned sleep or wake to the calls that carry it out: the last step before `act`."""

from __future__ import annotations

from reconciler.act.engine import Order
from reconciler.errors import StateError
from reconciler.observe.snapshot import endpoint_of
from reconciler.plan.actions import Action
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Observed
from reconciler.spec.spec import Spec


def order_of(action: Action, spec: Spec, observed: Observed, ledger: Ledger) -> Order:
    """What `act` needs to have an engine fall asleep, or wake up.

    Args:
        action: a `sleep` or `wake`
        spec: whose engines are asked how
        observed: the engine's port
        ledger: how deeply it sleeps

    Raises:
        StateError: it has ended, is no longer described, or has no nap any more.
    """
    incarnation = next((i for i in observed.incarnations if i.id == action.incarnation), None)
    endpoint = endpoint_of(spec, incarnation) if incarnation is not None else None
    record = ledger.endpoints.get(action.subject.name)
    if incarnation is None or incarnation.port is None or endpoint is None or record is None or record.nap is None:
        raise StateError(f"{action.subject} is no longer there to {action.op}")
    level = endpoint.profile.sleep_levels[record.nap.level]
    return Order(
        incarnation=incarnation.id,
        port=incarnation.port,
        calls=level.sleep if action.op == "sleep" else level.wake,
        check=endpoint.profile.sleep_check,
        asleep=action.op == "sleep",
    )
