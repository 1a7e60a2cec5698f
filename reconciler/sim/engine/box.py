"""The node as an engine sees it: CUDA's choice of GPUs, and memory held in the ledger.

The ledger is read by `reconciler.sim.ledger` elsewhere; an engine has no such package at hand, so the protocol is
spoken here a second time, and a test holds the two together.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GIB = 1 << 30


class Failed(Exception):  # noqa: N818 - the text is what the real one prints
    """The engine cannot go on; the text is its last line on stderr."""


class Node:
    """The simulated box: its GPUs and its ledger."""

    def __init__(self) -> None:
        self.folder = os.environ["RECONCILER_SIM_DIR"]
        with open(f"{self.folder}/node.json", encoding="utf-8") as file:  # noqa: PTH123 - pathlib costs 5 ms here
            document = json.load(file)
        self.gpus: list[dict[str, Any]] = document["gpus"]
        self.scale: float = document["time_scale"]
        self.delay_s: float = document["release_delay_s"]
        self.models: dict[str, dict[str, Any]] = document["models"]
        self.seed: str = document["seed"]
        self.faults: list[dict[str, Any]] = document["faults"]

    def visible(self) -> list[int]:
        """The GPUs that CUDA would show: by index or UUID, cut off at the first one that does not exist."""
        order = list(range(len(self.gpus)))
        if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            order.sort(key=lambda i: -self.gpus[i]["memory_bytes"])  # CUDA's own order: fastest first
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return order
        shown: list[int] = []
        for word in (w.strip() for w in wanted.split(",")):
            by_uuid = [i for i in order if word.startswith("GPU-") and self.gpus[i]["uuid"].startswith(word)]
            by_index = [order[int(word)]] if word.isdecimal() and int(word) < len(order) else []
            match = by_uuid or by_index
            if len(match) != 1 or match[0] in shown:
                break
            shown.append(match[0])
        return shown

    def broken(self, index: int) -> bool:
        """Whether CUDA would fail on this GPU."""
        with suppress(OSError, ValueError), open(f"{self.folder}/faults.json", encoding="utf-8") as file:  # noqa: PTH123
            document = json.load(file)
            faults = document.get("gpus", {}).get(str(index), {})
            return bool(document.get("no_driver")) or any(faults.get(kind) for kind in ("lost", "unknown", "hole"))
        return False

    def others(self, index: int) -> int:
        """Bytes that other processes hold on a GPU, those of the dead until their release delay is over."""
        folder, me, total = f"{self.folder}/gpus/{index}", own_name(), 0
        for name in os.listdir(folder):  # noqa: PTH208
            if name == me or not re.fullmatch(r"\d+-\d+", name):
                continue
            with suppress(OSError, ValueError):
                if not gone(name) or not self.released(index, name):
                    with open(f"{folder}/{name}", encoding="ascii") as file:  # noqa: PTH123
                        total += int(file.read(64))
        return total

    def released(self, index: int, name: str) -> bool:
        """Note that an entry's process is dead, and remove the entry once the delay is over."""
        note = f"{self.folder}/dying/{index}/{name}"
        with suppress(FileExistsError):
            os.close(os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        if abs(time.time() - os.stat(note).st_mtime) < self.delay_s:  # noqa: PTH116
            return False
        for path in (f"{self.folder}/gpus/{index}/{name}", note):
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
        return True

    @contextmanager
    def locked(self, index: int) -> Iterator[None]:
        """Nobody else allocates on this GPU meanwhile."""
        fd = os.open(f"{self.folder}/gpus/{index}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def own_name() -> str:
    """This process's name in the ledger."""
    return f"{os.getpid()}-{stat_fields(os.getpid())[19]}"


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat after the command: field 3 first."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()


def gone(name: str) -> bool:
    """Whether the process of a ledger entry runs no more."""
    pid, _, ticks = name.partition("-")
    try:
        fields = stat_fields(int(pid))
    except (FileNotFoundError, ProcessLookupError):
        return True
    return fields[0] in "ZX" or fields[19] != ticks


class Holder:
    """The process that holds memory on one GPU: rank `rank` of the gang."""

    def __init__(self, node: Node, rank: int, gpu: int) -> None:
        self.node, self.rank, self.gpu = node, rank, gpu
        self.total: int = node.gpus[gpu]["memory_bytes"]
        self.usable: int = self.total - node.gpus[gpu]["reserved_bytes"]
        self.at_start = 0

    def obey(self, order: str) -> str:
        """Do one order of the engine core; "" when done, else the error."""
        verb, _, argument = order.partition(" ")
        if verb == "check":
            return self.check(float(argument))
        if verb == "profiled":
            return self.profiled(changed=bool(argument))
        return self.set(int(argument)) if verb == "set" else ""  # "step": being here to answer is all

    def check(self, utilization: float) -> str:
        """Whether enough is free to begin with."""
        if self.node.broken(self.gpu):
            return "RuntimeError: CUDA error: unknown error"
        self.at_start = self.node.others(self.gpu)
        free, want = self.usable - self.at_start, self.total * utilization
        if free >= want:
            return ""
        return (
            f"ValueError: Free memory on device cuda:{self.rank} ({gib(free)}/{gib(self.total)} GiB) on startup is "
            f"less than desired GPU memory utilization ({utilization}, {gib(want)} GiB). Decrease GPU memory "
            "utilization or reduce GPU memory used by other processes."
        )

    def profiled(self, *, changed: bool) -> str:
        """Whether the neighbours stayed as they were; vLLM takes memory that they free for its own mistake."""
        now = self.node.others(self.gpu)
        if now >= self.at_start and not changed:
            return ""
        return (
            f"AssertionError: Error in memory profiling. Initial free memory {gib(self.usable - self.at_start)} GiB, "
            f"current free memory {gib(self.usable - now)} GiB. This happens when other processes sharing the same "
            "container release GPU memory while vLLM is profiling during initialization. To fix this, ensure "
            "consistent GPU memory allocation or isolate vLLM in its own container."
        )

    def set(self, size: int) -> str:
        """Hold so much from now on."""
        name, folder = own_name(), f"{self.node.folder}/gpus/{self.gpu}"
        with self.node.locked(self.gpu):
            free = self.usable - self.node.others(self.gpu)
            if size > free:
                return (
                    f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {gib(size)} GiB. GPU {self.rank} "
                    f"has a total capacity of {gib(self.total)} GiB of which {gib(free)} GiB is free."
                )
            with open(f"{folder}/.{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(f"{size}\n")
            os.replace(f"{folder}/.{name}", f"{folder}/{name}")  # noqa: PTH105
        return ""


def gib(size: float) -> str:
    """GiB with two digits, as vLLM prints them."""
    return f"{max(0.0, size) / GIB:.2f}"
