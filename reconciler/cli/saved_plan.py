"""A plan in a file: what was decided, and on what grounds, so that it is not carried out on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.cli.whole_file import write_whole
from reconciler.errors import ReconcilerError, StalePlanError
from reconciler.plan.actions import Plan
from reconciler.plan.observed import Observed
from reconciler.plan.render import plan_data

FORMAT = "1"
_TIMELESS = ("id", "needs", "op", "subject", "gpus", "cause", "ready")
"""What makes an action the same one, whenever it is decided; reasons and predictions speak of times."""


class SavedPlan(Struct, frozen=True):
    """The grounds of a saved plan."""

    spec_hash: str
    observed_fingerprint: str
    deeds: list[list[object]]
    """What it would do: `_TIMELESS` of each action, in order."""


def save(path: Path, plan: Plan, observed: Observed) -> None:
    """Write the plan so that a reader finds all of it or nothing.

    Raises:
        ReconcilerError: it cannot be written.
    """
    document = {
        "format_version": FORMAT,
        "spec_hash": plan.spec_hash,
        "observed_fingerprint": plan.observed_fingerprint,
        "data": plan_data(plan, observed),
    }
    try:
        write_whole(path, json.dumps(document, indent=1) + "\n", 0o600)
    except OSError as error:
        raise ReconcilerError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_saved(path: Path) -> SavedPlan:
    """The grounds of the plan in `path`.

    Raises:
        ReconcilerError: it is not there, or no saved plan of this format.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["format_version"] != FORMAT:
            raise ReconcilerError(
                f"{path}: a plan of format {document['format_version']}", hint="save it again with `reconciler plan`"
            )
        return SavedPlan(
            str(document["spec_hash"]), str(document["observed_fingerprint"]), _deeds(document["data"]["actions"])
        )
    except OSError as error:
        raise ReconcilerError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReconcilerError(
            f"{path}: not a saved plan",
            hint="`reconciler plan --out FILE` writes one; set points are named --setpoints",
        ) from error


def refuse_if_stale(saved: SavedPlan, fresh: Plan, observed: Observed, path: Path) -> None:
    """Go on only if the same decision would be taken now, on the same grounds.

    Raises:
        StalePlanError: the spec or the box moved, or it is time for something else; nothing was done.
    """
    moved = []
    if saved.spec_hash != fresh.spec_hash:
        moved.append("the set points or overlays")
    if saved.observed_fingerprint != fresh.observed_fingerprint:
        moved.append("the box")
    if not moved and saved.deeds != _deeds(plan_data(fresh, observed)["actions"]):
        moved.append("what is to be done now")
    if moved:
        raise StalePlanError(
            f"{path}: {' and '.join(moved)} moved since this plan was saved; nothing was done",
            hint=f"look at the new one and save it: reconciler plan --out {path}",
        )


def _deeds(actions: Any) -> list[list[object]]:
    """Raises: KeyError, TypeError: these are no actions of a plan's JSON."""
    return [[action[key] for key in _TIMELESS] for action in actions]
