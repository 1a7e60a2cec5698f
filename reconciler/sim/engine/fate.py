"""The fault script as one start of an engine meets it: which of the node's rules strike it, and when.

Drawn once, when the API server starts, from the node's seed, the number of the rule, the endpoint and how often that
was started: the same seed and the same starts meet the same faults, whatever the clock says. Each one that strikes says
so in the log.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from .box import Node

KINDS = {
    "out_of_memory": "the start ends with 1: `Free memory on device …`",
    "memory_changed": "the start ends with 1: `Error in memory profiling …`",
    "crash": "the engine core dies while it loads: the start ends with 1",
    "slow_start": "loading takes `for` longer",
    "stuck_start": "loading never ends: alive, and no port",
    "dies": "the engine core dies: `/health` 503, then the server ends with 0",
    "hang": "no token is made any more; `/health` stays 200",
    "freeze": "the server is stopped: connections are taken, nothing is answered, SIGTERM does nothing",
    "slow_probe": "`/health` takes `for` longer, and nothing else is answered meanwhile",
    "sleep_fails": "`/sleep` is answered with 500",
    "wake_out_of_memory": "`/wake_up` runs out of memory: the engine core dies",
    "ignores_sigterm": "SIGTERM does nothing, ready or not",
}
"""Every fault, and what it does."""
LASTING = frozenset({"slow_start", "slow_probe"})
"""Those that need `for`."""
TIMED = frozenset({"dies", "hang", "freeze", "slow_probe"})
"""Those that can wait for a time after readiness or for a number of requests."""


class Fate:
    """The faults of one start."""

    def __init__(self, node: Node, options: dict[str, str]) -> None:
        self.scale = node.scale
        self.rules: dict[str, dict[str, Any]] = {}
        """Kind → the first rule of that kind that strikes."""
        self.ready_at: float | None = None
        self.struck: set[str] = set()
        if not node.faults:
            return
        import hashlib  # costs 3 ms, and only a node with a script needs it

        model, endpoint = options["model"], os.environ.get("RECONCILER_SUBJECT", "")
        who = endpoint or f"{model}:{options.get('port', '8000')}"
        start = count_start(node.folder, who)
        for number, rule in enumerate(node.faults):
            meant = rule["endpoint"] in (None, endpoint) and rule["model"] in (None, model)
            if meant and (not rule["starts"] or start in rule["starts"]):
                drawn = hashlib.sha256(f"{node.seed}/{number}/{who}/{start}".encode()).digest()
                if int.from_bytes(drawn[:8], "big") < rule["chance"] * 2**64:
                    self.rules.setdefault(rule["fault"], rule)

    def strikes(self, kind: str) -> bool:
        """Whether this start meets that fault, at whatever time; it is told in the log when it strikes."""
        if kind in self.rules and kind not in self.struck:
            self.struck.add(kind)
            with suppress(OSError):
                print(f"(pid={os.getpid()}) simulated fault: {kind}", flush=True)
        return kind in self.rules

    def lasts_s(self, kind: str) -> float:
        """How long that fault lasts, before `time_scale`; 0 when it does not strike."""
        return float(self.rules[kind]["for_s"]) if self.strikes(kind) else 0.0

    def ready(self) -> None:
        """From now on the times count."""
        self.ready_at = time.monotonic()

    def due(self, kind: str, requests: int) -> bool:
        """Whether a timed fault strikes now, `requests` having come since the start."""
        rule = self.rules.get(kind)
        if rule is None or self.ready_at is None or time.monotonic() < self.ready_at + rule["after_s"] * self.scale:
            return False
        return requests >= rule["requests"] and self.strikes(kind)

    def wait_s(self, *kinds: str) -> float | None:
        """Real seconds until the first of these comes due by time alone; None: none does."""
        if self.ready_at is None:
            return None
        now = time.monotonic()
        waits = [self.ready_at + self.rules[k]["after_s"] * self.scale - now for k in kinds if k in self.rules]
        return min((wait for wait in waits if wait > 0), default=None)


def count_start(folder: str, who: str) -> int:
    """Count one more start; 1 for the first. The position after an append is this writer's own, whoever else writes."""
    fd = os.open(
        f"{folder}/starts/{quote(who, safe='')[:200]}", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        os.write(fd, b".")
        return os.lseek(fd, 0, os.SEEK_CUR)
    finally:
        os.close(fd)
