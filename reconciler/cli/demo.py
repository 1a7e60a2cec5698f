"""`demo`: evict, render, restore, on a simulated node; and a check that it really was so."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from reconciler.cli.arguments import group
from reconciler.cli.demo_stage import ENDPOINTS, NODE, OVERLAY, RENDER_S, VICTIM, Stage
from reconciler.cli.face import Face
from reconciler.cli.tables import clock, endpoints_table, gpu_list, gpus_table, overlays_table
from reconciler.errors import ReconcilerError
from reconciler.units import format_duration

DEADLINE_S = 55.0
LOOK_S = 1.0
"""Looked at this often even when no event comes."""

Status = dict[str, Any]
app = group()


@app.command()
def demo(ctx: typer.Context) -> int:
    """See it work on a simulated node, in under a minute.

    Three model servers fill four simulated GPUs; a render job borrows one; the least important server gives way and
    comes back. Everything is real but the GPUs. Nothing is left behind.

    Example: reconciler demo
    """
    face = Face.of(ctx)
    with Stage() as stage, Story(face, stage) as story:
        summary = _play(stage, story)
    wrong = summary["wrong"]
    if face.is_json:
        face.answer(summary)
    else:
        for line in _told(summary):
            face.line(line)
        for what in wrong:
            face.note(f"error: {what}")
    return 1 if wrong else 0


class Story:
    """What the audience sees: tables that move on a terminal, a line per step elsewhere."""

    def __init__(self, face: Face, stage: Stage) -> None:
        self._face, self._stage = face, stage
        self._began = time.monotonic()
        self._steps: list[str] = []
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if not self._face.is_json and self._face.out.is_terminal:
            self._live = self._stack.enter_context(Live(console=self._face.out, auto_refresh=False, transient=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the curtain rose."""
        return time.monotonic() - self._began

    def step(self, text: str) -> None:
        """Something worth telling happened."""
        line = f"{self.elapsed_s:5.1f}s  {text}"
        self._steps.append(line)
        if self._live is None:
            (self._face.note if self._face.is_json else self._face.line)(line)

    def until(self, what: str, condition: Callable[[Status], bool]) -> Status:
        """Look whenever something stirs, until the condition holds.

        Raises:
            ReconcilerError: it did not within the demo's time, or the daemon is gone.
        """
        while True:
            self._stage.check_daemon()
            self._stage.stirred.clear()
            try:
                seen = self._stage.ask("status")
            except ReconcilerError as error:  # a daemon that has only just begun does not know yet
                states = error.message
            else:
                self._draw(seen)
                if condition(seen):
                    return seen
                states = ", ".join(f"{e['name']} {e['state']}" for e in seen["endpoints"])
            if self.elapsed_s > DEADLINE_S:
                raise ReconcilerError(f"not within {DEADLINE_S:g} s: {what}; at the end: {states}")
            self._stage.stirred.wait(LOOK_S)

    def _draw(self, seen: Status) -> None:
        if self._live is None:
            return
        steps = [Text(step) for step in self._steps]
        events = [
            Text(f"{clock(e['time'])}  {e['kind']:<12} {e['subject']:<10} {e['message']}", "dim", no_wrap=True)
            for e in self._stage.events
        ]
        overlays: list[RenderableType] = [overlays_table(seen["overlays"]), Text()] if seen["overlays"] else []
        blank = Text()
        self._live.update(
            Group(
                *steps, blank, endpoints_table(seen["endpoints"]), blank, gpus_table(seen["gpus"]), blank, *overlays,
                *events,
            ),
            refresh=True,
        )  # fmt: skip


def _play(stage: Stage, story: Story) -> dict[str, Any]:
    """The four acts; what came of them."""
    story.step(f"a node of {NODE} that does not exist, a daemon (pid {stage.daemon_pid}), {len(ENDPOINTS)} set points")
    seen = story.until("the baseline is healthy", _is_baseline)
    before = _pids(seen)
    story.step("the baseline is healthy: " + ", ".join(f"{name} (pid {pid})" for name, pid in before.items()))

    stage.drop_overlay()
    story.step(
        f"overlays/{OVERLAY}.yaml is written: 1 GPU for {RENDER_S:g} s, priority 600, may displace what is lower"
    )
    seen = story.until(
        f"{OVERLAY} runs", lambda s: _overlay(s)["state"] in ("active", "completing", "restoring", "done")
    )
    displaced = list(_overlay(seen)["evicted"])
    gpus = gpu_list(_overlay(seen)["gpus"])
    story.step(f"{', '.join(displaced) or 'nobody'} gave way; {OVERLAY} runs on GPU {gpus}")
    during = _pids(seen)

    story.until(f"{OVERLAY} has rendered", lambda s: _overlay(s)["state"] in ("restoring", "done", "failed"))
    story.step(f"{OVERLAY} is through; the difference to the set points is the way back")
    seen = story.until("the baseline is back", lambda s: _overlay(s)["state"] in ("done", "failed") and _is_baseline(s))
    after = _pids(seen)
    story.step(f"the baseline is back: {VICTIM} (pid {after[VICTIM]})")
    incidents = stage.ask("incidents", "--all")["incidents"]
    overlay = _overlay(seen)
    others = [name for name in ENDPOINTS if name != VICTIM]
    checks = {
        f"{VICTIM} alone was displaced": displaced == [VICTIM],
        f"{VICTIM} did not run meanwhile": during[VICTIM] is None,
        f"{VICTIM} is back with a process of its own": after[VICTIM] not in (None, before[VICTIM]),
        f"{' and '.join(others)} kept their processes": all(before[n] == during[n] == after[n] for n in others),
        f"{OVERLAY} is done with exit code 0": overlay["state"] == "done" and overlay["exit_code"] == 0,
        "no incident was raised": not incidents,
    }
    return {
        "seconds": round(story.elapsed_s, 1),
        "pids": {"before": before, "during": during, "after": after},
        "overlay": overlay,
        "checks": checks,
        "wrong": [f"not true: {what}" for what, holds in checks.items() if not holds]
        + [f"incident: {i['kind']} of {i['subject']}: {i['message']}" for i in incidents],
    }


def _told(summary: dict[str, Any]) -> list[str]:
    marks = [f"  {'yes' if holds else ' NO'}  {what}" for what, holds in summary["checks"].items()]
    took = format_duration(summary["seconds"])
    return [f"In {took}, on a node that does not exist:", *marks, "Everything is stopped, nothing is left behind."]


def _is_baseline(seen: Status) -> bool:
    return len(seen["endpoints"]) == len(ENDPOINTS) and all(e["state"] == "healthy" for e in seen["endpoints"])


def _overlay(seen: Status) -> dict[str, Any]:
    return next((o for o in seen["overlays"] if o["name"] == OVERLAY), {"state": "", "evicted": [], "gpus": []})


def _pids(seen: Status) -> dict[str, int | None]:
    pids = {e["name"]: e["pid"] for e in seen["endpoints"]}
    return {name: pids.get(name) for name in ENDPOINTS}
