"""What happens on one box: its set points, the overlays dropped on it, how processes behave, what breaks and when."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

BREAKAGES = (
    "crash", "hang", "job_crash", "load_slow", "load_fails", "stop_slow", "unkillable", "memory_late", "driver_down",
    "gpu_unknown", "gpu_lost", "foreign", "port_taken", "identity_unknown", "setpoints_torn", "overlay_torn",
    "overlay_removed", "folder_gone", "clock_set", "kill", "disk_full", "look_slow",
)  # fmt: skip
NAP_FAULTS = ("sleep_fails", "sleep_keeps", "wake_fails", "wake_dies", "call_slow")
"""An engine refuses to sleep; says that it sleeps and keeps its memory; refuses to wake up; runs out of memory as it
wakes up, and ends with 0; takes its time."""
KINDS = (*BREAKAGES, *NAP_FAULTS)
DOZER = {
    "executable": "serve",
    "args": ["{port}"],
    "residual": "1536MiB",
    "load": "20s",
    "sleep": {
        "check": {"path": "/asleep", "field": "asleep"},
        "level_1": {"sleep": [{"path": "/sleep?level=1"}], "wake": [{"path": "/wake"}]},
        "level_2": {"sleep": [{"path": "/sleep?level=2"}], "wake": [{"path": "/wake"}]},
    },
}
STEADY = ("crash", "hang", "job_crash", "gpu_lost", "load_fails")
"""Faults that have to be an incident each, wherever they strike what runs as it should."""


class Fault(Struct, frozen=True, order=True):
    """One thing that breaks."""

    at: float
    """Seconds from the beginning."""
    kind: str
    which: int
    """Whom it strikes, by place, among those it can strike at that moment."""
    lasts: float
    """Seconds; for a kill: at which of the daemon's writes and acts after `at`."""

    def __str__(self) -> str:
        return f"{self.at:7.1f} s {self.kind} #{self.which} ({self.lasts:g})"


class Drop(Struct, frozen=True):
    """One overlay file."""

    at: float
    name: str
    body: dict[str, Any]
    run_s: float
    codes: tuple[int, ...]


class Scenario(Struct, frozen=True):
    """Everything that is drawn from a seed."""

    seed: int
    gpus: int
    gib: int
    endpoints: dict[str, dict[str, Any]]
    floors: dict[str, int]
    drops: tuple[Drop, ...]
    faults: tuple[Fault, ...]
    load_s: float = 20.0
    stop_s: float = 2.0
    memory_return_s: float = 1.0
    host_gib: int = 256
    tended: bool = False
    """Somebody resets what was given up, a while after each fault."""

    @property
    def over(self) -> float:
        """When the last fault is over and the last overlay dropped."""
        ends = [f.at + (60.0 if f.kind == "kill" else f.lasts) for f in self.faults] + [d.at for d in self.drops]
        return max(ends, default=0.0) + 5.0

    def without(self, fault: Fault) -> Scenario:
        return replace(self, faults=tuple(f for f in self.faults if f is not fault))

    def without_drop(self, drop: Drop) -> Scenario:
        return replace(self, drops=tuple(d for d in self.drops if d is not drop))

    def setpoints(self) -> dict[str, Any]:
        return {
            "version": 1,
            "node": {"name": "box"},
            "policy": {"resync": "30s"},
            "capabilities": {name: {"min_available": floor} for name, floor in self.floors.items()},
            "engines": {"dozer": DOZER} if any(e["engine"] == "dozer" for e in self.endpoints.values()) else {},
            "endpoints": self.endpoints,
        }

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.gpus} x {self.gib} GiB, floors {self.floors}"]
        lines += [f"  endpoint {n}: {e}" for n, e in self.endpoints.items()]
        lines += [f"  {d.at:7.1f} s overlay {d.name}: {d.body}, runs {d.run_s:g} s, ends {d.codes}" for d in self.drops]
        lines += [f"  {f}" for f in self.faults]
        return "\n".join(lines)


@dataclass
class Draw:
    """Draws scenarios; the same seed, the same scenario, on every machine."""

    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def faulty(self) -> Scenario:
        """A small box, a few overlays, and up to six things that go wrong."""
        rng = self.rng
        base = self._base(rng.choice((1, 2, 2, 3, 4)), rng.choice((0, 1, 1, 2, 3)), careful=False)
        count = rng.choice((0, 1, 1, 2, 2, 3, 4, 6))
        faults = sorted(
            Fault(round(rng.uniform(1, 700), 1), kind, rng.randrange(8), self._lasts(kind))
            for kind in (rng.choice(BREAKAGES) for _ in range(count))
        )
        return self._sleepy(replace(base, faults=tuple(faults)))

    def planned(self, overlays: int) -> Scenario:
        """Overlays that all keep their word, on a box where nothing breaks."""
        return self._base(self.rng.choice((2, 3, 4)), overlays, careful=True)

    def _sleepy(self, base: Scenario) -> Scenario:
        """The same; on every other box some endpoints give way by sleeping, and some overlays leave room for that.

        Drawn apart from the rest, which stays what it was.
        """
        rng = random.Random(f"naps {self.seed}")
        if rng.random() < 0.5:
            return base
        endpoints = {}
        for name, body in base.endpoints.items():
            evict = {"method": "sleep", "level": rng.choice((1, 1, 2)), "weights": rng.choice(("10GiB", "30GiB"))}
            sleeper = {k: v for k, v in body.items() if k != "command"}
            sleeper |= {"engine": "dozer", "model": "m", "evict": evict}
            endpoints[name] = sleeper if rng.random() < 0.7 else body
        drops = []
        for drop in base.drops:
            memory = {"memory": rng.choice(("20GiB", "60GiB", "70GiB"))} if rng.random() < 0.8 else {}
            drops.append(replace(drop, body={**drop.body, **memory}))
        faults = list(base.faults)
        for _ in range(rng.choice((0, 1, 1, 2))):
            lasts = rng.choice((30.0, 120.0, 500.0))
            faults.append(Fault(round(rng.uniform(1, 700), 1), rng.choice(NAP_FAULTS), rng.randrange(8), lasts))
        host = rng.choice((12, 40, 256))
        return replace(base, endpoints=endpoints, drops=tuple(drops), faults=tuple(sorted(faults)), host_gib=host)

    def struck(self, overlays: int, faults: int) -> Scenario:
        """The same, and now and then something that nobody planned: far enough apart to tell one from the next."""
        base, rng = self._base(self.rng.choice((2, 3, 4)), overlays, careful=True), self.rng
        moments = [300.0 + 1500.0 * n + rng.uniform(0, 600) for n in range(faults)]
        drawn = [Fault(round(at, 1), rng.choice(STEADY), rng.randrange(8), 60.0) for at in moments]
        return replace(base, faults=tuple(drawn), tended=True)

    def _lasts(self, kind: str) -> float:
        if kind == "kill":
            return float(self.rng.randrange(1, 60))
        if kind == "clock_set":
            return self.rng.choice((-7200.0, -300.0, 90.0, 3600.0))
        return round(self.rng.choice((2.0, 15.0, 60.0, 200.0)) * self.rng.uniform(0.5, 1.5), 1)

    def _base(self, gpus: int, overlays: int, *, careful: bool) -> Scenario:
        rng = self.rng
        endpoints: dict[str, dict[str, Any]] = {}
        for gpu in range(gpus):
            for memory in rng.choice(((None,), (None,), (0.4, 0.4), (0.4,), ())):
                endpoints[f"e{len(endpoints)}"] = self._endpoint(len(endpoints), gpu, memory)
        if not endpoints:
            endpoints["e0"] = self._endpoint(0, 0, None)
        offered = {c for e in endpoints.values() for c in e["capabilities"]}
        floors = {c: 1 for c in sorted(offered) if rng.random() < 0.3}
        drops = tuple(self._drop(n, gpus, careful=careful) for n in range(overlays))
        return Scenario(
            self.seed, gpus, 80, endpoints, floors, tuple(sorted(drops, key=lambda d: d.at)), (),
            load_s=rng.choice((5.0, 20.0, 60.0)), stop_s=rng.choice((0.5, 3.0, 20.0)),
            memory_return_s=rng.choice((0.2, 1.0, 4.0)),
        )  # fmt: skip

    def _endpoint(self, index: int, gpu: int, memory: float | None) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = {
            "engine": "custom",
            "command": ["serve", "{port}"],
            "port": 8000 + index,
            "gpus": [gpu],
            "priority": rng.choice((10, 20, 30, 90)),
            "preemptible": rng.random() < 0.85,
            "capabilities": sorted(c for c in ("ask", "code") if rng.random() < 0.4),
            "stop": {"drain": rng.choice(("0s", "5s")), "grace": rng.choice(("5s", "30s"))},
        }
        if memory is not None:
            body["memory"] = memory
        return body

    def _drop(self, index: int, gpus: int, *, careful: bool) -> Drop:
        rng = self.rng
        duration = rng.choice((60, 180, 400))
        body: dict[str, Any] = {
            "version": 1,
            "priority": rng.choice((5, 25, 50, 95)),
            "allow_baseline_eviction": rng.random() < 0.85,
            "makespan": {"duration": f"{duration}s", "grace": "60s"},
            "gpus": rng.choice((1, 1, [rng.randrange(gpus)], min(2, gpus), gpus)),
            "workload": {
                "command": ["work"],
                "retries": rng.choice((0, 0, 1)),
                "preemptible": not careful and rng.random() < 0.2,
            },
        }
        if rng.random() < 0.4:
            body["memory"] = rng.choice((0.3, "10GiB", "60GiB"))
        run = duration * (rng.uniform(0.3, 0.9) if careful else rng.uniform(0.3, 1.4))
        codes = (0,) if careful else rng.choice(((0,), (0,), (0,), (1, 0), (1,)))
        spread = 900.0 * (index + 1) if careful else 600.0
        at = rng.uniform(900.0 * index, spread) if careful else rng.uniform(0.0, spread)
        return Drop(round(at, 1), f"o{index}", body, round(run, 1), codes)
