"""How long a command lets a person wait.

Measured: wall time of whole processes, turn about, median: `reconciler --help`; `reconciler plan` on a simulated node
without a daemon (an empty box, where three endpoints are to be started); the same with a daemon, converged; `status`
with a daemon, which scripts call most.
Floor: `python -c "import pydantic"`, which everything that reads the files has to pay, in the same round.
Aims: `--help` at most 1.5 times the floor, `plan` at most 2.5 times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from stage import box, describe, show


def wall_ms(command: Sequence[str]) -> float:
    before = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    after = time.perf_counter()
    if done.returncode != 0:
        raise SystemExit(f"{command}: {done.stderr.decode()}")
    return (after - before) * 1e3


def measure(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[float]]:
    """Turn about; the first round, which reads cold files, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            taken = wall_ms(command)
            if turn > 0:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    pydantic = [sys.executable, "-c", "import pydantic"]
    interpreter = [sys.executable, "-c", "pass"]
    with box() as one:
        for number in range(3):
            one.endpoint(f"endpoint-{number}", gpus=1, gib=60)
        one.write()
        plan = one.argv("plan")
        alone = {"--help": one.argv("--help"), "plan, empty box, no daemon": plan}
        without = measure({"python": interpreter, "pydantic": pydantic, **alone}, runs)
        one.start()
        one.wait_healthy()
        beside = {"plan, converged, daemon": plan, "status, daemon": one.argv("status")}
        within = measure({"pydantic": pydantic, **beside}, runs)
    rows = []
    for times in (without, within):
        floor = statistics.median(times["pydantic"])
        for name, taken in times.items():
            aim = {"plan": "2.5", "--help": "1.5"}.get(name.split(",")[0], "")
            rows.append([name, *describe(taken), f"{statistics.median(taken) / floor:.2f}", aim])
    show(f"wall time of a command, ms, {runs} runs each", ["command", "p50", "p90", "ratio to pydantic", "aim"], rows)


if __name__ == "__main__":
    main()
