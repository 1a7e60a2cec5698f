"""One decision in one go."""

from __future__ import annotations

import gc

from reconciler.clock import Instant
from reconciler.plan.actions import Plan
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Observed
from reconciler.plan.planner import plan
from reconciler.spec.spec import Spec


def decide(spec: Spec, observed: Observed, ledger: Ledger, now: Instant) -> Plan:
    """The plan for this moment, with no garbage collected meanwhile.

    A decision makes many values that live as long as it does: on a fleet a collector that looks at them again and again
    costs a tenth of it, and finds nothing. It looks once, afterwards.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        return plan(spec, observed, ledger, now)
    finally:
        if was_on:
            gc.enable()
