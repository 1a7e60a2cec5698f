"""What `reconciler sim status` shows: who holds how much of which simulated GPU, and what is broken."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct, to_builtins

from reconciler.sim import faults
from reconciler.sim.ledger import Allocation, Ledger
from reconciler.sim.node import load


class Holding(Struct, frozen=True):
    """One process's memory on one GPU."""

    pid: int
    command: str | None
    """None: the process is gone, or does not say."""
    memory_bytes: int
    alive: bool
    """False: on its way back."""


class GpuReport(Struct, frozen=True):
    """One simulated GPU."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    reserved_bytes: int
    holdings: tuple[Holding, ...]
    faults: tuple[str, ...]
    """Names of the faults in force, `hang` with its seconds."""


class NodeReport(Struct, frozen=True):
    """The simulated node now."""

    sim_dir: str
    time_scale: float
    release_delay_s: float
    driver_version: str
    driver_loaded: bool
    gpus: tuple[GpuReport, ...]
    faults_problem: str | None
    """Why the file of faults is not read as such: it counts as none."""


def report(sim_dir: Path) -> NodeReport:
    """Look at the node in `sim_dir`, without the driver.

    Raises:
        StateError: no simulated node lives there.
    """
    node = load(sim_dir)
    ledger = Ledger(sim_dir, node.release_delay_s)
    broken = faults.read(sim_dir)
    gpus = []
    for index, gpu in enumerate(node.gpus):
        holdings = tuple(_holding(allocation) for allocation in ledger.allocations(index))
        gpus.append(
            GpuReport(
                index,
                node.uuid(index),
                gpu.name,
                gpu.memory_bytes,
                sum(holding.memory_bytes for holding in holdings),
                gpu.reserved_bytes,
                holdings,
                _names(broken.of(index)),
            )
        )
    return NodeReport(
        str(sim_dir),
        node.time_scale,
        node.release_delay_s,
        node.driver_version,
        not broken.no_driver,
        tuple(gpus),
        faults.problem(sim_dir),
    )


def _names(gpu: faults.GpuFaults) -> tuple[str, ...]:
    return tuple(f"hang {value:g}s" if kind == "hang" else kind for kind, value in to_builtins(gpu).items())


def _holding(allocation: Allocation) -> Holding:
    command = None
    if allocation.alive:
        try:
            words = Path(f"/proc/{allocation.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            command = " ".join(word.decode(errors="replace") for word in words) or None
        except OSError:
            command = None
    return Holding(allocation.pid, command, allocation.memory_bytes, allocation.alive)
