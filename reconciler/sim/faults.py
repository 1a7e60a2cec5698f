"""What is broken on the simulated node: `<sim_dir>/faults.json`, written by `sim fault`, read by driver and engines.

    {"no_driver": true, "gpus": {"0": {"lost": true}, "1": {"hang": 3.0}}}

An unreadable file means no faults: the simulation must not break in ways nobody asked for. Who writes it renames it
into its place, so that one is no half-written draft but a mistake, and `sim status` and `sim fault` say so (`problem`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field, to_builtins
from msgspec.json import Decoder
from msgspec.structs import replace

from reconciler.errors import StateError, UsageError


class GpuFaults(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is wrong with one GPU."""

    lost: bool = False
    """Every call on it answers GPU_IS_LOST (15)."""
    unknown: bool = False
    """Every call on it answers UNKNOWN (999)."""
    hole: bool = False
    """Its index and UUID are not found, the count is as before."""
    hang: Annotated[float, Meta(ge=0.0)] = 0.0
    """Seconds for which every call on it blocks."""
    not_supported_process_memory: bool = False
    """Its processes are listed, how much each one holds is not."""
    remap_pending: bool = False
    """A row remap waits for a reset: nothing new belongs on it."""


class Faults(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is wrong now."""

    no_driver: bool = False
    """The kernel module is not loaded (DRIVER_NOT_LOADED, 9); afterwards NVML must be initialised anew."""
    gpus: Mapping[int, GpuFaults] = field(default_factory=dict)

    def of(self, index: int) -> GpuFaults:
        """What is wrong with GPU `index`."""
        return self.gpus.get(index, GpuFaults())


KINDS = GpuFaults.__struct_fields__
"""Names of the faults that a GPU can have."""

_DECODER = Decoder(Faults, strict=False)
"""A flag that people write as 1 is one: engines, which read the file by themselves, take it for one as well."""


def read(sim_dir: Path) -> Faults:
    """The faults now in force."""
    try:
        fd = os.open(f"{sim_dir}/faults.json", os.O_RDONLY | os.O_CLOEXEC)  # with every call: mostly there is none
    except OSError:
        return Faults()
    try:
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            return _DECODER.decode(file.read())
    except (OSError, ValueError):
        return Faults()


def problem(sim_dir: Path) -> str | None:
    """Why the file counts as no faults though it is there; None: it does not, or it is not."""
    path = sim_dir / "faults.json"
    try:
        _DECODER.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{path}: {error}: nothing in it is in force"
    return None


def _to_change(sim_dir: Path) -> Faults:
    wrong = problem(sim_dir)
    if wrong is not None:
        raise StateError(wrong, hint="correct it, or have all mended: `reconciler sim fault mend`")
    return read(sim_dir)


def break_gpu(sim_dir: Path, index: int, kind: str, *, seconds: float = 0.0) -> None:
    """Give GPU `index` the fault `kind`; `seconds` is for `hang` alone.

    Raises:
        UsageError: there is no such fault, or `hang` without seconds.
        StateError: what is there cannot be read, and would be lost.
    """
    if kind not in KINDS:
        raise UsageError(f"no fault is called {kind!r}", hint="faults of a GPU: " + ", ".join(KINDS))
    if (kind == "hang") != (seconds > 0):
        raise UsageError("a hang, and nothing else, lasts some seconds", hint="write it as `hang 5s`")
    faults = _to_change(sim_dir)
    change: dict[str, Any] = {kind: seconds if kind == "hang" else True}
    broken = replace(faults.of(index), **change)
    _store(sim_dir, replace(faults, gpus={**faults.gpus, index: broken}))


def unload_driver(sim_dir: Path) -> None:
    """Take the driver away.

    Raises:
        StateError: as for `break_gpu`.
    """
    _store(sim_dir, replace(_to_change(sim_dir), no_driver=True))


def mend(sim_dir: Path, index: int | None = None) -> None:
    """Mend GPU `index`, or everything, a file that cannot be read as well.

    Raises:
        StateError: as for `break_gpu`, where one GPU is to be mended.
    """
    faults = Faults() if index is None else _to_change(sim_dir)
    _store(sim_dir, replace(faults, gpus={i: gpu for i, gpu in faults.gpus.items() if i != index}))


def _store(sim_dir: Path, faults: Faults) -> None:
    draft = sim_dir / f".faults.json.{os.getpid()}"
    draft.write_text(json.dumps(to_builtins(faults, str_keys=True), sort_keys=True) + "\n", "utf-8")
    draft.replace(sim_dir / "faults.json")
