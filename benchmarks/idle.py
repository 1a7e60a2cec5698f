"""What the program costs while nothing happens.

Measured: 20 healthy endpoints at the default cadence (a probe every 5 s each), left alone for 60 s. CPU: user and
system time of the daemon with its threads, from /proc/PID/stat. Memory: proportional set size of the daemon, and of the
shims per endpoint, from /proc/PID/smaps_rollup.
Floors: as many bare httpx probes of the same endpoints by a minimal loop, measured right after the daemon has ended; a
`python -I -S -c 'import time; time.sleep(…)'` that does nothing, as many of them as there are shims, since pages that
processes share weigh less in each the more there are.
Aims: at most 0.5 % of a core, 60 MiB for the daemon, 6 MiB per endpoint. `--runs` repeats the span.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from stage import Box, box, show

ENDPOINTS = 20
INTERVAL_S = 5.0
SETTLE_S = 10.0
"""After the last endpoint became healthy: first reads and caches are start, not idling."""

PROBES = """
import asyncio, sys, httpx
async def probe(client, port, delay):
    await asyncio.sleep(delay)
    while True:
        (await client.get(f"http://127.0.0.1:{port}/health")).raise_for_status()
        await asyncio.sleep(float(sys.argv[1]))
async def main():
    ports = sys.argv[2:]
    async with httpx.AsyncClient() as client:
        step = float(sys.argv[1]) / len(ports)
        await asyncio.gather(*(probe(client, port, i * step) for i, port in enumerate(ports)))
asyncio.run(main())
"""


def cpu_s(pid: int) -> float:
    """User and system time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"pid {pid} has no Pss")


def load_percent(pid: int, span_s: float) -> float:
    """Share of one core that a process takes over a span."""
    before, began = cpu_s(pid), time.monotonic()
    time.sleep(span_s)
    return (cpu_s(pid) - before) / (time.monotonic() - began) * 100


def shims(one: Box) -> list[int]:
    records = (one.root / "state" / "run").glob("*/run.json")
    return [int(json.loads(record.read_text())["shim_pid"]) for record in records]


def probe_floor(one: Box, span_s: float, runs: int) -> list[float]:
    """CPU of bare probes of the endpoints, which go on running without a daemon."""
    ports = [str(e["port"]) for e in one.spec["endpoints"].values()]
    floor = subprocess.Popen([sys.executable, "-c", PROBES, str(INTERVAL_S), *ports])
    time.sleep(SETTLE_S)
    loads = [load_percent(floor.pid, span_s) for _ in range(runs)]
    if floor.poll() is not None:
        raise SystemExit("the bare probes ended by themselves")
    floor.kill()
    floor.wait()
    return loads


def sleeper_floor(count: int) -> list[float]:
    """PSS of interpreters that do nothing, MiB each."""
    command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    sleepers = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(count)]
    time.sleep(1.0)
    sizes = [pss_mib(each.pid) for each in sleepers]
    for each in sleepers:
        each.kill()
        each.wait()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the idle span")
    options = parser.parse_args()
    with box() as one:
        for number in range(ENDPOINTS):
            one.endpoint(f"endpoint-{number}", gpus=0)
        one.write()
        daemon = one.start()
        one.wait_healthy()
        time.sleep(SETTLE_S)
        loads = [load_percent(daemon.pid, options.seconds) for _ in range(options.runs)]
        daemon_mib, shim_mib = pss_mib(daemon.pid), statistics.mean(map(pss_mib, shims(one)))
        daemon.terminate()
        daemon.wait()
        one.daemon = None
        bare_loads = probe_floor(one, options.seconds, options.runs)
    sleeper_mib = statistics.mean(sleeper_floor(ENDPOINTS))
    rows = [
        [
            "CPU of the daemon, % of a core",
            f"{statistics.median(loads):.2f}",
            f"{statistics.median(bare_loads):.2f}",
            "0.5",
        ],
        ["PSS of the daemon, MiB", f"{daemon_mib:.1f}", "", "60"],
        ["PSS of a shim, MiB per endpoint", f"{shim_mib:.1f}", f"{sleeper_mib:.1f}", "6"],
    ]
    title = f"{ENDPOINTS} endpoints idle for {options.seconds:g} s, {options.runs} runs"
    show(title, ["figure", "measured", "floor", "aim"], rows)


if __name__ == "__main__":
    main()
