"""A foreign tenant: a process that is none of ours and holds GPU memory (`reconciler sim hold`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from reconciler.errors import ActError, UsageError
from reconciler.sim.ledger import Allocation, Ledger
from reconciler.sim.node import load


def hold(
    sim_dir: Path,
    gpu: int,
    memory_bytes: int,
    duration_s: float | None = None,
    *,
    held: Callable[[Allocation], None] | None = None,
) -> None:
    """Hold memory on GPU `gpu` in this process, for `duration_s` or until it is killed.

    `held` is called once the memory is taken. Afterwards the entry stays: like that of any process that ends, it falls
    away after the node's release delay, once this process is gone.

    Raises:
        UsageError: the node has no such GPU.
        ActError: it does not fit into what is free there.
        StateError: no simulated node lives in `sim_dir`.
    """
    node = load(sim_dir)
    if not 0 <= gpu < len(node.gpus):
        raise UsageError(f"the simulated node has no GPU {gpu}", hint=f"GPUs are 0 to {len(node.gpus) - 1}")
    if memory_bytes <= 0:
        raise UsageError("a tenant holds more than nothing", hint="--memory 20GiB")
    limit = node.gpus[gpu].memory_bytes - node.gpus[gpu].reserved_bytes
    try:
        allocation = Ledger(sim_dir, node.release_delay_s).claim(gpu, memory_bytes, limit_bytes=limit)
    except ActError as error:
        raise ActError(error.message, hint="`reconciler sim status` shows who holds the rest") from error
    if held is not None:
        held(allocation)
    threading.Event().wait(duration_s)
