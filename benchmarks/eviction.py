"""What an eviction costs, by how the victim gives way, over makespans from half a minute to eight hours.

The planner decides as it does for a daemon; a plant on a virtual clock carries it out, with the times below.
Two figures for each overlay: how much longer than the work the victim was away, and how long the GPU did nothing for
either. usage: python benchmarks/eviction.py [--svg FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/plan"))

from builders import endpoint, overlay, spec
from plant import Behaviour, Plant, Run

from reconciler.plan import naps
from reconciler.plan.actions import Plan
from reconciler.spec.spec import Evict, Stop
from reconciler.units import GIB

LOAD_S = 98.0
"""A cold start of 235B on four A100 (published); 38 s for 0.6B, 240 s for 70B from a slow disk."""
WAKE_S = {1: 6.0, 2: 0.4 * LOAD_S}
"""Level 1: the slowest that was published (0.3-6 s). Level 2: the profile's guess, nobody published it."""
SLEEP_S = {1: 5.0, 2: 2.0}
"""The profile's guesses."""
STOP_S, MEMORY_S = 0.9, 1.5
"""Measured on vLLM 0.32: SIGTERM to exit while idle; the driver gives memory back within 1.5 s."""
MAKESPANS = (30.0, 60.0, 300.0, 900.0, 3600.0, 7200.0, 4 * 3600.0, 8 * 3600.0)
WAYS = {
    "stop": Evict("stop"),
    "sleep 1": Evict("sleep", 1, 10 * GIB),
    "sleep 2": Evict("sleep", 2, 10 * GIB),
    "chosen": Evict("sleep", 1, 10 * GIB),
}


@dataclass
class Clocked:
    """Integrates over one run, from decision to decision."""

    away_s: float = 0.0
    idle_s: float = 0.0
    level: int | None = None
    last: tuple[float, bool, bool] | None = None

    def see(self, run: Run, decided: Plan) -> None:
        """Add the time since the last decision to what held then."""
        now = run.plant.now.mono
        if self.last is not None:
            at, serves, works = self.last
            self.away_s += 0.0 if serves else now - at
            self.idle_s += 0.0 if serves or works else now - at
        works = run.plant.current("render", "workload") is not None
        self.last = (now, decided.endpoints["ask"].state == "healthy", works)
        nap = decided.ledger.endpoints["ask"].nap
        if nap is not None:
            self.level = nap.level
            run.plant.behaviour.sleep_s, run.plant.behaviour.wake_s = SLEEP_S[nap.level], WAKE_S[nap.level]


def measure(way: str, makespan_s: float) -> Clocked:
    """One overlay of this makespan against one endpoint that has been ready for an hour."""
    ask = endpoint("ask", [0], memory=60, priority=100, evict=WAYS[way], stop=Stop(drain_s=0.0))
    behaviour = Behaviour(load_s=LOAD_S, stop_s=STOP_S, memory_return_s=MEMORY_S, default_run_s=makespan_s)
    run = Run(spec(ask), Plant(behaviour=behaviour))
    run.settle()
    run.plant.advance(3600.0)
    run.settle()
    seen = Clocked()
    run.watch = seen.see
    run.spec = spec(ask, overlay("render", [0], memory=60, duration=makespan_s))
    longest = naps.LONGEST_PARKED_S
    try:
        naps.LONGEST_PARKED_S = longest if way == "chosen" else math.inf
        run.settle(max_steps=2000)
    finally:
        naps.LONGEST_PARKED_S = longest
    assert run.ledger.overlays["render"].state == "done"
    assert run.plant.is_ready("ask")
    return seen


def words(seconds: float) -> str:
    """30 s, 5 min, 8 h."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds:g} s"


def table(results: dict[tuple[str, float], Clocked]) -> str:
    """The figures as a Markdown table."""
    lines = ["| makespan | " + " | ".join(WAYS) + " | level chosen |", "|---" * (len(WAYS) + 2) + "|"]
    for makespan in MAKESPANS:
        cells = [
            f"{results[way, makespan].away_s - makespan:.1f} / {results[way, makespan].idle_s:.1f}" for way in WAYS
        ]
        lines.append(f"| {words(makespan)} | " + " | ".join(cells) + f" | {results['chosen', makespan].level} |")
    return "\n".join(lines)


def svg(results: dict[tuple[str, float], Clocked]) -> str:
    """Part of the victim's absence that was not the work's, over the makespan, both on logarithmic scales."""
    left, top, width, height = 70, 20, 560, 280
    low, high = math.log10(MAKESPANS[0]), math.log10(MAKESPANS[-1])
    floor, ceiling = -4.0, 0.0
    colours = {"stop": "#c0392b", "sleep 1": "#2980b9", "sleep 2": "#8e44ad", "chosen": "#27ae60"}

    def x(makespan: float) -> float:
        return left + width * (math.log10(makespan) - low) / (high - low)

    def y(part: float) -> float:
        return top + height * (ceiling - max(floor, math.log10(part))) / (ceiling - floor)

    box = f"0 0 {left + width + 90} {top + height + 50}"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="12">']
    for power in range(int(floor), 1):
        at = y(10.0**power)
        out.append(f'<path d="M{left} {at:.1f}h{width}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0 ** (power + 2):g} %</text>')
    out += [
        f'<text x="{x(makespan):.1f}" y="{top + height + 18}" text-anchor="middle">{words(makespan)}</text>'
        for makespan in MAKESPANS
    ]
    for number, way in enumerate(WAYS):
        parts = [(m, 1.0 - m / results[way, m].away_s) for m in MAKESPANS]
        points = " ".join(f"{x(m):.1f},{y(part):.1f}" for m, part in parts)
        dash = ' stroke-dasharray="6 4"' if way == "chosen" else ""
        out.append(f'<polyline points="{points}" fill="none" stroke="{colours[way]}" stroke-width="2"{dash}/>')
        out.append(f'<text x="{left + width + 8}" y="{top + 16 * number + 12}" fill="{colours[way]}">{way}</text>')
    out.append(
        f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">makespan of the overlay</text>'
    )
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main() -> None:
    """Measure, print the table, and draw the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="draw the plot into this file")
    options = parser.parse_args()
    results = {(way, makespan): measure(way, makespan) for way in WAYS for makespan in MAKESPANS}
    print(table(results))
    if options.svg:
        options.svg.write_text(svg(results), "utf-8")


if __name__ == "__main__":
    main()
