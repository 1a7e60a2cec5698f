"""How long a command lets a person wait.

Measured: wall time of whole processes, turn about, median: `reconciler --help`; `reconciler plan` on a simulated node
without a daemon (an empty box, where three endpoints are to be started); the same with a daemon, converged; `status`
with a daemon, which scripts call most.
Floor: `python -c "import pydantic"`, which everything that reads the files has to pay, in the same round; and beside
`plan` on the empty box the mere import of all that it loads and that is not the program's own.
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


def libraries(command: Sequence[str]) -> list[str]:
    """A process that imports whatever `command` does, of the standard library and of others, and nothing of ours."""
    traced = [command[0], "-X", "importtime", *command[1:]]
    told = subprocess.run(traced, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stderr
    names = [line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")]
    wanted = [name for name in names if name.partition(".")[0] not in ("imported package", "site", "reconciler")]
    load = (
        "import gc, importlib, os\ngc.disable()\n"  # the program does without the collector, too, and leaves as fast
        f"for name in {wanted}:\n    try: importlib.import_module(name)\n    except ImportError: pass\nos._exit(0)"
    )
    return [command[0], "-c", load]


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
        alone = {"--help": one.argv("--help"), "libraries of plan": libraries(plan), "plan, empty box, no daemon": plan}
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
