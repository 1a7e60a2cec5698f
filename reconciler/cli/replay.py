"""`explain --replay`: a decision of the past is made again, from all that went into it."""

from __future__ import annotations

from datetime import datetime

from reconciler.cli import wiring
from reconciler.cli.face import Face
from reconciler.cli.local_time import LOCAL
from reconciler.errors import StateError, UsageError
from reconciler.journal.decisions import Decision, digest, maker
from reconciler.journal.reader import JournalReader
from reconciler.plan.actions import Plan
from reconciler.plan.planner import plan
from reconciler.plan.render import gpu_indices, plan_data, render_plan
from reconciler.plan.solver import INSTALL
from reconciler.plan.status import iso

NEWEST = "last"
EVENTS_SEARCHED = 1_000


def replay(face: Face, which: str, name: str | None) -> int:
    """Make decision `which` again and show the plan; exit 1 if it is another one than it was.

    Args:
        face: who asked
        which: the number of a decision, or `last`: the last one that is kept, or that an event of `name` came from
        name: an endpoint or overlay; None: anybody

    Raises:
        UsageError: `which` is neither.
        StateError: there is no such decision, or this program cannot read it.
    """
    with wiring.journal_reader(face.options) as journal:
        found = journal.decision(_number(journal, which, name))
    if found is None:
        kept = "no decision is kept yet" if which == NEWEST else f"decision {which} is not kept"
        raise StateError(kept, hint="`reconciler explain NAME` shows the numbers of those behind its last events")
    inputs = found.inputs
    again = plan(inputs.spec, inputs.observed, inputs.ledger, inputs.now)
    same = digest(again) == found.outcome
    if face.is_json:
        data = {"decision": found.id, "time": iso(found.wall), "version": found.version, "same": same}
        face.answer({**data, "plan": plan_data(again, inputs.observed)})
    else:
        face.line(render_plan(again, gpu_indices(inputs.observed), LOCAL))
        face.line("")
        face.line(_verdict(found, again, same=same))
    return 0 if same else 1


def _number(journal: JournalReader, which: str, name: str | None) -> int | None:
    """The number that is meant; None: the newest of all."""
    if which != NEWEST:
        if not which.isascii() or not which.isdigit():
            raise UsageError(f"{which!r} is not the number of a decision", hint=f"a number, or `{NEWEST}`")
        return int(which)
    if name is None:
        return None
    for event in reversed(journal.events(subject=name, limit=EVENTS_SEARCHED, newest=True)):
        if isinstance(number := event.data.get("decision"), int):
            return number
    raise StateError(f"no decision about {name!r} is kept", hint=f"`reconciler events --subject {name}`")


def _verdict(found: Decision, again: Plan, *, same: bool) -> str:
    made = f"Decision {found.id} of {datetime.fromtimestamp(found.wall).astimezone():%Y-%m-%d %H:%M:%S}"
    if same:
        return f"{made}: made again, the plan is the same, byte for byte."
    now = maker(again)
    versions = f"It was made by version {found.version}, and again by {'the same' if now == found.version else now}."
    if "ortools" in found.version and not again.solved:
        versions += f" Without that solver nobody is moved: `{INSTALL}`."
    return f"{made}: made again, the plan is another one. {versions}"
