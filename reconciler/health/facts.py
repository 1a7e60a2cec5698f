"""`Facts`: one look at the box and what was decided on it, as the rules of health read them."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from reconciler.errors import Problem
from reconciler.plan.actions import Blocked, EndpointView
from reconciler.plan.ledger import LIVE, Ledger
from reconciler.plan.observed import Gpu, Observed
from reconciler.spec.spec import EndpointSpec, Spec


class Facts(Struct, frozen=True):
    """One tick: the spec in force, how its endpoints stand, the ledger once decided, and what was seen."""

    spec: Spec
    endpoints: Mapping[str, EndpointView]
    ledger: Ledger
    """Its agenda is what explains; its overlays, records and quarantines are what can be wrong."""
    observed: Observed
    problems: tuple[Problem, ...] = ()
    """Of files that were not accepted; those of `spec.problems` count with or without standing here."""
    blocked: tuple[Blocked, ...] = ()
    """`Plan.blocked`: tells what waits for a person from what passes by itself."""

    @property
    def gpus(self) -> tuple[Gpu, ...] | None:
        """None: the driver did not answer; nothing is known of any GPU."""
        return self.observed.gpus if self.observed.gpus_known else None

    def providers(self, capability: str) -> tuple[str, ...]:
        """The endpoints that offer it, temporary ones of live overlays included."""
        endpoints: list[EndpointSpec] = list(self.spec.endpoints.values())
        for name, overlay in self.spec.overlays.items():
            record = self.ledger.overlays.get(name)
            if record is not None and record.state in LIVE:
                endpoints.extend(overlay.endpoints.values())
        return tuple(sorted({e.name for e in endpoints if capability in e.capabilities}))

    def ready(self, capability: str) -> int:
        """How many providers are ready; one that could not be seen counts, for unknown is not absent."""
        views = (self.endpoints.get(name) for name in self.providers(capability))
        return sum(view is not None and view.state in ("healthy", "unknown") for view in views)
