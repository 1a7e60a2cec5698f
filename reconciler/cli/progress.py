"""Live progress of a convergence, on stderr: a moving table on a terminal, one line per change elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from reconciler.cli.face import Face
from reconciler.cli.tables import STATE_STYLES, gpu_list
from reconciler.plan.actions import Plan
from reconciler.plan.observed import Observed

_QUIET = ("pending", "done", "failed", "cancelled", "expired")
"""States of overlays that a convergence does not touch."""
_SETTLED = ("healthy", "stopped", "done", "failed", "cancelled", "expired")


class Progress:
    """Shown while it is entered; `show` is the callback."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._live: Live | None = None
        self._said: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._face.err.is_terminal and not self._face.is_json:
            live = Live(console=self._face.err, refresh_per_second=8, transient=True)
            self._live = self._stack.enter_context(live)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, plan: Plan, observed: Observed) -> None:
        """Take in the latest decision."""
        if self._live is not None:
            self._live.update(_table(plan, observed))
            return
        for name, words in _lines(plan):
            if self._said.get(name) != words:
                known = name in self._said
                self._said[name] = words
                if known or words.partition(" ")[0] not in _SETTLED:  # what rests from the start is no progress
                    self._face.note(f"{name}: {words}")


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    for name, view in sorted(plan.endpoints.items()):
        yield name, view.state + (f" ({view.reason})" if view.reason else "")
    for name, record in sorted(plan.ledger.overlays.items()):
        yield f"overlay {name}", record.state + (f" ({record.reason})" if record.reason else "")


def _table(plan: Plan, observed: Observed) -> Table:
    indices = {gpu.uuid: gpu.index for gpu in observed.gpus}
    doing = {action.subject.name: action.op for action in reversed(plan.actions) if action.ready}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column()
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for name, view in sorted(plan.endpoints.items()):
        busy = doing.get(name)
        table.add_row(
            Spinner("dots", style="cyan") if busy else " ",
            Text(name, "bold"),
            Text(view.state, STATE_STYLES.get(view.state, "")),
            Text(gpu_list(sorted(indices[u] for u in view.gpus if u in indices))),
            Text(" ".join(filter(None, [busy and busy.replace("_", " "), view.reason])), "dim"),
        )
    for name, record in sorted(plan.ledger.overlays.items()):
        if record.state not in _QUIET:
            table.add_row(
                "",
                Text(name, "bold"),
                Text(record.state, STATE_STYLES.get(record.state, "")),
                "",
                Text(record.reason, "dim"),
            )
    return table
