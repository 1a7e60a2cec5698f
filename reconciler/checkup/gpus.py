"""The driver, and each GPU as it shows it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from reconciler.checkup.check import Check
from reconciler.errors import DriverError
from reconciler.observe.gpus import NvmlReader
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Gpu, Observed
from reconciler.spec.profiles import PROFILES, EngineProfile

_UNEXPLAINED = 1 << 30
"""Bytes in use that no process is named for: less is the driver's own."""


def check_driver(nvml: NvmlReader) -> Check:
    """Whether NVML can be loaded, and which driver it belongs to."""
    try:
        nvml.open()
        driver, cuda = nvml.versions()
    except DriverError as error:
        return Check("driver", "error", error.message, error.hint)
    return Check("driver", "ok", f"NVIDIA driver {driver}, CUDA {cuda}")


def check_gpus(
    observed: Observed, ledger: Ledger, engines: Collection[EngineProfile] = PROFILES.values()
) -> tuple[Check, ...]:
    """Every GPU, by index; what of it is not as it should be. Of `engines` the processes are known by their titles."""
    if not observed.gpus_known:
        return (Check("GPUs", "unknown", observed.gpus_detail, "dmesg | grep NVRM tells what the driver met"),)
    if not observed.gpus:
        hint = "`nvidia-smi -L` lists them; in a container, hand them in (docker run --gpus all)"
        return (Check("GPUs", "error", "the driver lists no GPU", hint),)
    return tuple(check for gpu in observed.gpus for check in _gpu(gpu, ledger, engines))


def _gpu(gpu: Gpu, ledger: Ledger, engines: Collection[EngineProfile]) -> Iterator[Check]:
    name = f"GPU {gpu.index} ({gpu.name}, {gpu.uuid})"
    quarantine = ledger.quarantines.get(gpu.uuid)
    if gpu.state != "ok":
        hint = "dmesg | grep NVRM names the fault (Xid); a reset or a reboot brings it back"
        yield Check("GPUs", "error", f"{name} is {gpu.state}: {gpu.detail}", hint)
        return
    if not gpu.healthy:
        yield Check("GPUs", "error", f"{name}: {gpu.detail}; nothing new is placed on it", "nvidia-smi --gpu-reset")
    if quarantine is not None:
        hint = f"find who holds it (fuser -v /dev/nvidia{gpu.index}), then `reconciler reset {gpu.index}`"
        yield Check("GPUs", "error", f"{name} is quarantined: {quarantine.reason}", hint)
    strangers = [p for p in gpu.processes or () if p.owner is None]
    for process in strangers:
        held = f" holds {process.memory_bytes >> 20} MiB" if process.memory_bytes is not None else " is on it"
        who = f"pid {process.pid} of {process.user or 'an unknown user'}"
        hint = "it counts as used memory and is never signalled; end it yourself if it should not be there"
        engine = next((e.name for e in engines if any(re.search(t, process.command or "") for t in e.titles)), None)
        if engine is not None:
            hint = f"part of a {engine} engine that is not this program's, perhaps left by a killed server; {hint}"
        yield Check("GPUs", "warning", f"{name}: {who}{held}: {process.command or '?'}", hint)
    used = gpu.used_bytes or 0
    if used > _UNEXPLAINED and gpu.processes is not None and not gpu.processes:
        hint = (
            f"another container, or a process that ended badly: fuser -v /dev/nvidia{gpu.index}, nvidia-smi --gpu-reset"
        )
        yield Check("GPUs", "warning", f"{name}: {used >> 20} MiB are in use, and no process is named for them", hint)
    elif gpu.healthy and quarantine is None and not strangers:
        yield Check("GPUs", "ok", f"{name}: {used >> 20} of {gpu.total_bytes >> 20} MiB in use")
