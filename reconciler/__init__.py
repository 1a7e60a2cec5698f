"""Declarative set points for the GPUs of one box.

    from reconciler import Orchestrator, AgendaTracker, EndpointStatus

Importing the package imports nothing else: a name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reconciler.orchestrator import CleanStartResult, Orchestrator
    from reconciler.orchestrator import EndpointStatus as EndpointStatus
    from reconciler.plan.agenda import AgendaTracker

__all__ = ["AgendaTracker", "CleanStartResult", "EndpointStatus", "Orchestrator", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "AgendaTracker":
        from reconciler.plan.agenda import AgendaTracker

        return AgendaTracker
    if name in ("CleanStartResult", "EndpointStatus", "Orchestrator"):
        from reconciler import orchestrator

        return getattr(orchestrator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
