"""What supervision costs: restarts, edits, idling, coming up, flapping, each beside a floor measured in the same run.

The floor of every start is the same stub spawned by a bare Popen, turn about; of a restart, after a bare wait. Parts,
all of them or those named:

restart  kill -9 of an endpoint → first instruction of its successor: on a node without GPUs; on a simulated GPU whose
         memory is back at once; after 300 ms (nothing may start before it is seen free: no aim); adopted by a daemon
         that came after a kill -9 of the first. Only first restarts, which are immediate: `reset` follows each.
edit     rename of edited set points → the old process is in the handler of its stop signal; → first instruction of an
         endpoint that the edit adds.
up       start of the daemon → first instruction of the last of 20 and of 200 endpoints; floor: as many Popens in a row.
idle     20 and 200 healthy endpoints at the default cadence, left alone: CPU of the daemon, its fork server and all
         shims; PSS of the daemon and of everything else per endpoint. Floor of the CPU: as many bare probes with
         http.client.
flap     kill -9 of one endpoint 200 times: descriptors, threads, zombies and PSS of the daemon before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from stage import Box, box, describe, now_ns, respawn_directly, show, spawn_directly, wait_for

INTERVAL_S = 5.0
"""Between two probes of an endpoint: the default."""
SETTLE_S = 10.0
"""After the last endpoint became healthy: first reads and caches are start, not idling."""
FLAPS = 200

PROBES = """
import http.client, sys, time
ports, interval_s = sys.argv[2:], float(sys.argv[1])
due = time.monotonic()
while True:
    for port in ports:
        due += interval_s / len(ports)
        time.sleep(max(0.0, due - time.monotonic()))
        asked = http.client.HTTPConnection("127.0.0.1", int(port))
        asked.request("GET", "/health")
        answer = asked.getresponse()
        if answer.status != 200:
            sys.exit(f"port {port}: {answer.status}")
        answer.read()
        asked.close()
"""


# ---------------------------------------------------------------- restart


def restart(one: Box, name: str) -> float:
    """Milliseconds of one restart."""
    pid = one.wait_healthy()[name]["pid"]
    before = now_ns()
    os.kill(pid, signal.SIGKILL)
    taken = one.wait_noted(name, "first", before)
    one.wait_healthy()
    one.ask("reset", name=name)
    return taken


def measure_restarts(runs: int) -> None:
    cases = (
        ("no GPU", 0, "0s", False, "8"),
        ("one GPU, its memory back at once", 1, "0s", False, "8"),
        ("one GPU, its memory back after 300 ms", 1, "300ms", False, ""),
        ("one GPU, adopted by a second daemon", 1, "0s", True, "8"),
    )
    rows = []
    for title, gpus, release, adopted, aim in cases:
        with box() as one:
            one.describe_node(release_delay=release)
            one.endpoint("subject", gpus=gpus, gib=60 if gpus else None)
            one.write()
            one.start()
            one.wait_healthy()
            floors, restarts = [], []
            for _ in range(runs):
                if adopted:
                    one.replace_daemon()
                floors.append(respawn_directly(one, "floor"))
                restarts.append(restart(one, "subject"))
        above = statistics.median(restarts) - statistics.median(floors)
        rows.append([title, *describe(floors), *describe(restarts), f"{above:.1f}", aim])
    head = ["case", "floor p50", "floor p90", "restart p50", "restart p90", "p50 above floor", "aim"]
    show(f"kill -9 → first instruction of the successor, ms, {runs} runs each", head, rows)


# ---------------------------------------------------------------- edit


def measure_edits(runs: int) -> None:
    signals, starts, floors = [], [], []
    with box() as one:
        one.endpoint("edited", gpus=1, gib=60)
        one.endpoint("bystander", gpus=1, gib=60)
        one.write()
        one.start()
        one.wait_healthy()
        for turn in range(runs):
            floors.append(spawn_directly(one, "floor"))

            one.spec["endpoints"]["edited"]["env"] = {"TURN": str(turn)}
            renamed = one.write()
            signals.append(one.wait_noted("edited", "sigterm", renamed))
            one.wait_healthy()

            one.endpoint("added", gpus=0)
            renamed = one.write()
            starts.append(one.wait_noted("added", "first", renamed))
            one.wait_healthy()

            del one.spec["endpoints"]["added"]
            one.write()
            wait_for(lambda: "added" not in one.endpoints(), "the added endpoint is gone", poll_s=0.02)
    rows = [
        ["edited: rename → its old process is signalled", *describe(signals), "150"],
        ["added: rename → first instruction of its process", *describe(starts), "150"],
        ["floor: bare spawn → first instruction", *describe(floors), ""],
    ]
    show(f"edit → first act, ms, {runs} runs", ["case", "p50", "p90", "aim"], rows)


# ---------------------------------------------------------------- up


def come_up(count: int) -> float:
    """Milliseconds from the start of the daemon to the first instruction of the last endpoint."""
    with box() as one:
        add_endpoints(one, count)
        one.write()
        before = now_ns()
        one.start()
        return max(one.wait_noted(name, "first", before, poll_s=0.02) for name in one.spec["endpoints"])


def spawn_all(count: int) -> float:
    """The floor: the same stubs by a Popen each, one right after the other."""
    with box() as one:
        add_endpoints(one, count)
        before = now_ns()
        children = [
            subprocess.Popen(one.stub(name, str(fields["port"])), stdin=subprocess.DEVNULL)
            for name, fields in one.spec["endpoints"].items()
        ]
        taken = max(one.wait_noted(name, "first", before, poll_s=0.02) for name in one.spec["endpoints"])
        for child in children:
            child.kill()
            child.wait()
        return taken


def measure_coming_up(runs: int) -> None:
    rows = []
    for count, aim in ((20, "0.6"), (200, "2.5")):
        floors, ups = [], []
        for _ in range(runs):
            floors.append(spawn_all(count) / 1e3)
            ups.append(come_up(count) / 1e3)
        rows.append(
            [
                f"{count} endpoints",
                f"{statistics.median(floors):.2f}",
                f"{statistics.median(ups):.2f}",
                f"{max(ups):.2f}",
                aim,
            ]
        )
    head = ["case", "floor p50", "p50", "max", "aim"]
    show(f"start of the daemon → first instruction of the last endpoint, s, {runs} runs", head, rows)


def add_endpoints(one: Box, count: int) -> None:
    for number in range(count):
        one.endpoint(f"endpoint-{number}", gpus=0)


# ---------------------------------------------------------------- idle


def cpu_s(pid: int) -> float:
    """User and system time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"pid {pid} has no Pss")


def helpers(one: Box, daemon: int) -> list[int]:
    """The shims, by their records, and the fork server, the daemon's only child, with the shim forked in advance."""
    records = (one.root / "state" / "run").glob("*/run.json")
    shims = {int(json.loads(record.read_text())["shim_pid"]) for record in records}
    servers = children(daemon)
    return sorted(shims.union(servers, *map(children, servers)))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def cpu_a_minute(pids: Iterable[int], span_s: float) -> float:
    """CPU seconds a minute that these processes take together."""
    known = list(pids)
    before, began = sum(map(cpu_s, known)), time.monotonic()
    time.sleep(span_s)
    return (sum(map(cpu_s, known)) - before) / (time.monotonic() - began) * 60.0


def probe_floor(one: Box, span_s: float) -> float:
    """CPU of bare probes of the endpoints, which go on running without a daemon."""
    ports = [str(e["port"]) for e in one.spec["endpoints"].values()]
    floor = subprocess.Popen([sys.executable, "-c", PROBES, str(INTERVAL_S), *ports])
    time.sleep(SETTLE_S)
    taken = cpu_a_minute([floor.pid], span_s)
    if floor.poll() is not None:
        raise SystemExit("the bare probes ended by themselves")
    floor.kill()
    floor.wait()
    return taken


def measure_idling(span_s: float) -> None:
    rows = []
    for count, cpu_aim in ((20, "0.3"), (200, "")):
        with box() as one:
            add_endpoints(one, count)
            one.write()
            daemon = one.start()
            one.wait_healthy()
            time.sleep(SETTLE_S)
            others = helpers(one, daemon.pid)
            cpu = cpu_a_minute([daemon.pid, *others], span_s)
            daemon_mib, others_mib = pss_mib(daemon.pid), sum(map(pss_mib, others))
            daemon.terminate()
            daemon.wait()
            one.daemon = None
            floor = probe_floor(one, span_s)
        rows += [
            [f"{count} endpoints: CPU, s a minute", f"{cpu:.2f}", f"{floor:.2f}", cpu_aim],
            [f"{count} endpoints: PSS of the daemon, MiB", f"{daemon_mib:.1f}", "", "60"],
            [f"{count} endpoints: PSS of shims and fork server, MiB each", f"{others_mib / count:.2f}", "", "1.5"],
            [f"{count} endpoints: PSS of all, MiB", f"{daemon_mib + others_mib:.1f}", "", ""],
        ]
    show(f"idle for {span_s:g} s", ["figure", "measured", "floor: bare probes", "aim"], rows)


# ---------------------------------------------------------------- flap


def census(daemon: int) -> tuple[int, int, int, float]:
    """Descriptors, threads, zombies (of anybody) and PSS of the daemon."""
    zombies = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            zombies += stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
    threads = len(list(Path(f"/proc/{daemon}/task").iterdir()))
    return len(list(Path(f"/proc/{daemon}/fd").iterdir())), threads, zombies, pss_mib(daemon)


def measure_flapping() -> None:
    with box() as one:
        one.describe_node(release_delay="0s")
        one.endpoint("subject", gpus=1, gib=60)
        one.write()
        daemon = one.start()
        one.wait_healthy()
        for _ in range(20):
            restart(one, "subject")
        before = census(daemon.pid)
        for _ in range(FLAPS):
            restart(one, "subject")
        after = census(daemon.pid)
    names = ("descriptors of the daemon", "threads of the daemon", "zombies on the box", "PSS of the daemon, MiB")
    rows = [[name, f"{b:g}", f"{a:g}"] for name, b, a in zip(names, map(float, before), map(float, after), strict=True)]
    show(f"{FLAPS} restarts, after 20 that are not counted", ["figure", "before", "after"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the idle span")
    names = ("restart", "edit", "up", "idle", "flap")
    parser.add_argument("part", nargs="*", help=f"of {', '.join(names)}; without one: all")
    options = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "restart": lambda: measure_restarts(options.runs),
        "edit": lambda: measure_edits(options.runs),
        "up": lambda: measure_coming_up(min(options.runs, 5)),
        "idle": lambda: measure_idling(options.seconds),
        "flap": measure_flapping,
    }
    if unknown := set(options.part) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for name in options.part or names:
        parts[name]()


if __name__ == "__main__":
    main()
