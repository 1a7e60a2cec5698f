"""What an eviction costs, by how the victim gives way, over makespans from half a minute to eight hours.

Twice, and side by side. *Decided*: the planner decides for a plant on a virtual clock, with the times below.
*Measured*: the installed program evicts a real process on the simulated node, an engine that takes a tenth of these
times, and what is measured is told ten times as long. The work is a second long there, whatever its makespan says: how
the victim gives way is decided by the makespan, and what that costs beyond the work does not depend on how long it
really takes. One run measures half a minute in full, to show so.

Two figures for each overlay: how much longer than the work the victim was away, and how long the GPU did nothing for
either. usage: python benchmarks/eviction.py [--svg FILE] [--decided-only]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/plan"))

import stage
import yaml
from builders import endpoint, overlay, spec
from plant import Behaviour, Plant, Run

from reconciler.journal.reader import JournalEvent, JournalReader
from reconciler.plan import naps
from reconciler.plan.actions import Plan
from reconciler.spec.spec import Evict, Stop
from reconciler.units import GIB

NAPPER = Path(__file__).resolve().with_name("napper.py")
LOAD_S = 98.0
"""A cold start of 235B on four A100 (published); 38 s for 0.6B, 240 s for 70B from a slow disk."""
WAKE_S = {1: 6.0, 2: 0.4 * LOAD_S}
"""Level 1: the slowest that was published (0.3-6 s). Level 2: the profile's guess, nobody published it."""
SLEEP_S = {1: 5.0, 2: 2.0}
"""Guesses, like the profile's: nobody published them."""
STOP_S, MEMORY_S = 0.9, 1.5
"""Measured on vLLM 0.32: SIGTERM to exit while idle; the driver gives memory back within 1.5 s."""
MAKESPANS = (30.0, 60.0, 300.0, 900.0, 3600.0, 7200.0, 4 * 3600.0, 8 * 3600.0)
SCALE = 0.1
"""Of the engine's times on the simulated node."""
WORK_S = 1.0
"""Real seconds of work there."""
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


# ---------------------------------------------------------------- on the simulated node


def prepare(one: stage.Box, way: str) -> None:
    """One GPU that gives memory back late, and one endpoint on it that gives way like this."""
    node = one.root / "node.yaml"
    node.write_text(f"gpus: [{{name: Card, memory: 80GiB, count: 1}}]\nrelease_delay: {MEMORY_S * SCALE:.3f}s\n")
    one.node = str(node)
    times = [LOAD_S, STOP_S, SLEEP_S[1], WAKE_S[1], SLEEP_S[2], WAKE_S[2]]
    calls = {n: {"sleep": [{"path": f"/sleep?level={n}"}], "wake": [{"path": "/wake_up"}]} for n in (1, 2)}
    one.spec["engines"] = {
        "napper": {
            "executable": sys.executable,
            "args": [str(NAPPER), "{port}", "60", *(f"{seconds * SCALE:.3f}" for seconds in times)],
            "load": f"{LOAD_S * SCALE:.3f}s",
            "residual": "1536MiB",
            "sleep": {
                "check": {"path": "/is_sleeping", "field": "is_sleeping"},
                "level_1": calls[1],
                "level_2": calls[2],
            },
        }
    }
    asked = WAYS[way]
    one.spec["policy"] = {"max_evictions_per_hour": 1000, "min_ready": "0s"}
    one.spec["endpoints"]["ask"] = {
        "engine": "napper",
        "model": "m",
        "port": stage.free_port(),
        "gpus": [0],
        "memory": "60GiB",
        "priority": 100,
        "evict": {"method": asked.method, "level": asked.level, "weights": "1MiB"},
        "health": {"interval": "200ms"},
        "stop": {"drain": "0s"},
    }
    one.write()


def evict(one: stage.Box, name: str, makespan_s: float, work_s: float) -> Clocked:
    """One overlay of this makespan on the running box; what it cost, in the seconds of the virtual clock."""
    body = {
        "version": 1,
        "priority": 600,
        "allow_baseline_eviction": True,
        "makespan": {"duration": f"{makespan_s:g}s"},
        "gpus": [0],
        "memory": "60GiB",
        "workload": {"command": ["sleep", f"{work_s:.3f}"]},
    }
    dropped = time.time()
    path = one.root / "overlays" / f"{name}.yaml"
    draft = path.with_name(f".{name}")
    draft.write_text(yaml.safe_dump(body))
    draft.chmod(0o644)
    draft.rename(path)

    def told(subject: str, *kinds: str) -> list[JournalEvent]:
        with JournalReader.open_readonly(one.root / "state" / "journal.sqlite") as journal:
            return [e for e in journal.events(subject=subject, limit=1000) if e.kind in kinds]

    stage.wait_for(lambda: told(name, "done", "failed"), f"{name} is over", poll_s=0.05)
    with JournalReader.open_readonly(one.root / "state" / "journal.sqlite") as journal:
        ran = next(span for span in journal.ledger().overlays[name].spans if span.part == "run")
    begun, ended = ran.began.wall, ran.began.wall + (ran.actual_s or 0.0)
    away = next(e.wall for e in told("ask", "evicted") if e.wall >= dropped)
    back = told("ask", "healthy")[-1].wall
    slept = [e.message for e in told("ask", "nap.slept") if e.wall >= away]
    level = int(slept[0].split("level ")[1][0]) if slept else None
    beyond = (back - away - (ended - begun)) / SCALE
    return Clocked(away_s=makespan_s + beyond, idle_s=(begun - away + back - ended) / SCALE, level=level)


def on_the_node() -> dict[tuple[str, float], list[Clocked]]:
    """Each way three times, what is chosen once at each makespan, and half a minute in full."""
    found: dict[tuple[str, float], list[Clocked]] = {}
    for way in WAYS:
        runs = [(makespan, WORK_S) for makespan in MAKESPANS] if way == "chosen" else [(MAKESPANS[0], WORK_S)] * 3
        if way == "sleep 1":
            runs.append((MAKESPANS[0], MAKESPANS[0] * SCALE))
        with stage.box() as one:
            prepare(one, way)
            one.start()
            one.wait_healthy()
            for number, (makespan, work_s) in enumerate(runs):
                found.setdefault((way, makespan), []).append(evict(one, f"o{number}", makespan, work_s))
                print(f"measured: {way}, {words(makespan)}", file=sys.stderr)
    return found


def side_by_side(decided: dict[tuple[str, float], Clocked], measured: dict[tuple[str, float], list[Clocked]]) -> str:
    """Both as a Markdown table; the difference is the program's own time, in real milliseconds."""
    lines = [
        "| way | makespan | level | runs | decided: away beyond the work | measured, median | apart, real ms |",
        "|---" * 7 + "|",
    ]
    for (way, makespan), runs in measured.items():
        wanted = decided[way, makespan]
        beyond = [run.away_s - makespan for run in runs]
        apart = [(b - (wanted.away_s - makespan)) * SCALE * 1000 for b in beyond]
        levels = sorted({str(run.level or "stop") for run in runs})
        same = "" if levels == [str(wanted.level or "stop")] else f" (decided: {wanted.level or 'stop'})"
        lines.append(
            f"| {way} | {words(makespan)} | {', '.join(levels)}{same} | {len(runs)} | {wanted.away_s - makespan:.1f} "
            f"| {statistics.median(beyond):.1f} | {min(apart):.0f} to {max(apart):.0f} |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- telling


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
    parser.add_argument("--decided-only", action="store_true", help="no processes: the virtual clock alone")
    options = parser.parse_args()
    results = {(way, makespan): measure(way, makespan) for way in WAYS for makespan in MAKESPANS}
    print(table(results))
    if options.svg:
        options.svg.write_text(svg(results), "utf-8")
    if not options.decided_only:
        print(f"\non the simulated node ({stage.machine()})\n")
        print(side_by_side(results, on_the_node()))


if __name__ == "__main__":
    main()
