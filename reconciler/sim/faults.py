"""What is broken on the simulated node: `<sim_dir>/faults.json`, written by `sim fault`, read by driver and engines.

    {"no_driver": true, "gpus": {"0": {"lost": true}, "1": {"hang": 3.0}}}

An unreadable file means no faults: the simulation must not break in ways nobody asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.json import decode
from msgspec.structs import replace

from reconciler.errors import UsageError


class GpuFaults(Struct, frozen=True, omit_defaults=True):
    """What is wrong with one GPU."""

    lost: bool = False
    """Every call on it answers GPU_IS_LOST (15)."""
    unknown: bool = False
    """Every call on it answers UNKNOWN (999)."""
    hole: bool = False
    """Its index and UUID are not found, the count is as before."""
    hang: float = 0.0
    """Seconds for which every call on it blocks."""
    not_supported_process_memory: bool = False
    """Its processes are listed, how much each one holds is not."""
    remap_pending: bool = False
    """A row remap waits for a reset: nothing new belongs on it."""


class Faults(Struct, frozen=True):
    """Everything that is wrong now."""

    no_driver: bool = False
    """The kernel module is not loaded (DRIVER_NOT_LOADED, 9); afterwards NVML must be initialised anew."""
    gpus: Mapping[int, GpuFaults] = field(default_factory=dict)

    def of(self, index: int) -> GpuFaults:
        """What is wrong with GPU `index`."""
        return self.gpus.get(index, GpuFaults())


KINDS = GpuFaults.__struct_fields__
"""Names of the faults that a GPU can have."""


def read(sim_dir: Path) -> Faults:
    """The faults now in force."""
    try:
        with open(f"{sim_dir}/faults.json", "rb") as file:  # noqa: PTH123 - read with every call to the driver
            return decode(file.read(), type=Faults)
    except (OSError, ValueError):
        return Faults()


def break_gpu(sim_dir: Path, index: int, kind: str, *, seconds: float = 0.0) -> None:
    """Give GPU `index` the fault `kind`; `seconds` is for `hang` alone.

    Raises:
        UsageError: there is no such fault, or `hang` without seconds.
    """
    if kind not in KINDS:
        raise UsageError(f"no fault is called {kind!r}", hint="faults of a GPU: " + ", ".join(KINDS))
    if (kind == "hang") != (seconds > 0):
        raise UsageError("a hang, and nothing else, lasts some seconds", hint="write it as `hang 5s`")
    faults = read(sim_dir)
    change: dict[str, Any] = {kind: seconds if kind == "hang" else True}
    broken = replace(faults.of(index), **change)
    _store(sim_dir, replace(faults, gpus={**faults.gpus, index: broken}))


def unload_driver(sim_dir: Path) -> None:
    """Take the driver away."""
    _store(sim_dir, replace(read(sim_dir), no_driver=True))


def mend(sim_dir: Path, index: int | None = None) -> None:
    """Mend GPU `index`, or everything."""
    faults = read(sim_dir)
    kept = {} if index is None else {i: gpu for i, gpu in faults.gpus.items() if i != index}
    _store(sim_dir, Faults(no_driver=faults.no_driver and index is not None, gpus=kept))


def _store(sim_dir: Path, faults: Faults) -> None:
    draft = sim_dir / f".faults.json.{os.getpid()}"
    draft.write_text(json.dumps(to_builtins(faults, str_keys=True), sort_keys=True) + "\n", "utf-8")
    draft.replace(sim_dir / "faults.json")
