"""From kill -9 of an endpoint to the first instruction of its successor.

Measured: an endpoint's leader gets SIGKILL; its successor notes CLOCK_BOOTTIME at its very first line. Between the two
lie the daemon's wake, a look at the box, the decision, the journal, the shim and the records. Once without a GPU; once
on a GPU of a simulated node that gives memory back at once; once with its default of 300 ms after the death: nothing
may start before that memory is seen free, so this case has no aim.
Floor: the same stub spawned by a bare Popen in the same run, turn about; the interpreter's own start is in both.
Only first restarts, which are immediate: `reconciler reset` after each one forgets the failure, or back-off would be
measured. Aim: at most 60 ms above the floor.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics

from stage import Box, box, describe, now_ns, show, spawn_directly

CASES = (
    ("no GPU", 0, "0s", "60"),
    ("one GPU, its memory back at once", 1, "0s", "60"),
    ("one GPU, its memory back after 300 ms", 1, "300ms", ""),
)


def restart(one: Box, name: str) -> float:
    """Milliseconds of one restart."""
    pid = one.wait_healthy()[name]["pid"]
    before = now_ns()
    os.kill(pid, signal.SIGKILL)
    taken = one.wait_noted(name, "first", before)
    one.wait_healthy()
    one.json("reset", name)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    rows = []
    for title, gpus, release, aim in CASES:
        with box() as one:
            one.describe_node(release_delay=release)
            one.endpoint("subject", gpus=gpus, gib=60 if gpus else None)
            one.write()
            one.start()
            floors, restarts = [], []
            for _ in range(runs):
                floors.append(spawn_directly(one, "floor"))
                restarts.append(restart(one, "subject"))
        above = statistics.median(restarts) - statistics.median(floors)
        rows.append([title, *describe(floors), *describe(restarts), f"{above:.1f}", aim])
    head = ["case", "floor p50", "floor p90", "restart p50", "restart p90", "p50 above floor", "aim"]
    show(f"kill -9 → first instruction of the successor, ms, {runs} runs each", head, rows)


if __name__ == "__main__":
    main()
