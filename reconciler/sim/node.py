"""The simulated node: what it is, and the folder it lives in.

<sim_dir>/node.json                        the node, for programs that know nothing of this package
<sim_dir>/gpus/<index>/<pid>-<ticks>       the memory ledger (`ledger`)
<sim_dir>/dying/<index>/<pid>-<ticks>      when an entry's process was first seen dead
<sim_dir>/faults.json                      what is broken now (`faults`)
<sim_dir>/starts/<endpoint>                one byte a start, for the fault script
<sim_dir>/bin/vllm                         the simulated engine (`engine`)

All of it belongs to the user who made it, and nobody else may enter.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct, field, to_builtins
from msgspec.json import decode

from reconciler.errors import StateError

ENGINES = {"vllm": "engine/__main__.py"}
"""Executables put into `bin`, and the file of this package that each one runs. A new engine is a new row."""

DEFAULT_RELEASE_DELAY_S = 0.3
DEFAULT_DRIVER_VERSION = "580.95.05"


class SimGpu(Struct, frozen=True):
    """One GPU of the simulated node."""

    name: str
    memory_bytes: int
    reserved_bytes: int = 0
    """Held back by the driver: never free, and not part of `used` in NVML's second memory structure."""
    numa_node: int | None = None
    nvlink_island: int = 0
    """Cards that have NVLink are joined to those of the same island."""


class ModelFigures(Struct, frozen=True):
    """What is known of one model better than its name tells."""

    load_s: float | None = None
    """Cold start in real seconds, before `time_scale`."""
    weights_bytes: int | None = None
    """Weights, summed over all its GPUs."""


class EngineFault(Struct, frozen=True):
    """One rule of the fault script: what breaks in which starts of which simulated engines, and when."""

    fault: str
    """One of `engine.fate.KINDS`."""
    endpoint: str | None = None
    """None: of any."""
    model: str | None = None
    starts: tuple[int, ...] = ()
    """Which starts of the endpoint, counted from 1 since the node was made; empty: all."""
    chance: float = 1.0
    """Of each such start, drawn from the node's seed."""
    after_s: float = 0.0
    """Since it was ready, before `time_scale`."""
    requests: int = 0
    """Not before it was asked for so many completions."""
    for_s: float = 0.0
    """How long it takes, before `time_scale`."""


class SimNode(Struct, frozen=True):
    """A box that does not exist."""

    gpus: tuple[SimGpu, ...]
    time_scale: float = 1.0
    """Factor on every wait of the simulated engines; never on `release_delay_s`."""
    release_delay_s: float = DEFAULT_RELEASE_DELAY_S
    """Real seconds from a process first seen dead to its memory free. Not scaled: at 0.02 a scaled 300 ms would be
    6 ms, shorter than one look at the box, and nobody would ever see that memory comes back late."""
    driver_version: str = DEFAULT_DRIVER_VERSION
    seed: str = "node"
    """Two nodes with different seeds have different UUIDs, and different faults where chance has a say."""
    models: Mapping[str, ModelFigures] = field(default_factory=dict)
    faults: tuple[EngineFault, ...] = ()
    """The fault script of the engines; of the rules of one kind that meet a start, the first counts."""

    def uuid(self, index: int) -> str:
        """The UUID of GPU `index`, in NVIDIA's form; the same for the same seed and index, always."""
        digits = hashlib.sha256(f"{self.seed}/{index}".encode()).hexdigest()
        return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"


def prepare(sim_dir: Path, node: SimNode) -> None:
    """Make the folder of `node` ready for use; doing it twice does no harm.

    Raises:
        StateError: the folder belongs to another node on which processes still hold memory, or cannot be written.
    """
    wanted = _to_json(node)
    try:
        for folder in (sim_dir, sim_dir / "gpus", sim_dir / "dying"):
            _private_folder(folder)
        if (sim_dir / "node.json").exists() and (sim_dir / "node.json").read_text("utf-8") != wanted:
            _refuse_if_inhabited(sim_dir)
            _forget_gpus(sim_dir)
        for index in range(len(node.gpus)):
            _private_folder(sim_dir / "gpus" / str(index))
            _private_folder(sim_dir / "dying" / str(index))
        _private_folder(sim_dir / "bin")
        _private_folder(sim_dir / "starts")
        for name, source in ENGINES.items():
            _write(sim_dir / "bin" / name, _wrapper(sim_dir, Path(__file__).parent / source), 0o755)
        # last: whoever finds node.json finds the rest too
        _write(sim_dir / "node.json", wanted, 0o600)
    except OSError as error:
        raise StateError(f"{sim_dir}: the simulated node cannot be set up: {error.strerror or error}") from error


def load(sim_dir: Path) -> SimNode:
    """The node that `prepare` wrote into `sim_dir`.

    Raises:
        StateError: there is none, or it cannot be read.
    """
    try:
        return decode((sim_dir / "node.json").read_bytes(), type=SimNode)
    except FileNotFoundError as error:
        raise StateError(
            f"{sim_dir}: no simulated node lives here", hint="start something with --simulate 4x80GiB first"
        ) from error
    except (OSError, ValueError) as error:
        raise StateError(f"{sim_dir}/node.json: not the description of a simulated node: {error}") from error


def engine_environment(sim_dir: Path, path: str | None = None) -> dict[str, str]:
    """What a child of the simulated node gets: the simulated engines first on PATH, and where the ledger is.

    `path` is the PATH to build on; default: this process's own.
    """
    rest = os.environ.get("PATH", os.defpath) if path is None else path
    folder = str(sim_dir.absolute() / "bin")
    return {"RECONCILER_SIM_DIR": str(sim_dir.absolute()), "PATH": folder + (os.pathsep + rest if rest else "")}


def _refuse_if_inhabited(sim_dir: Path) -> None:
    from reconciler.sim.ledger import Ledger

    ledger = Ledger(sim_dir, release_delay_s=0.0)
    holders = sorted({a.pid for index in ledger.indices() for a in ledger.allocations(index) if a.alive})
    if holders:
        listed = ", ".join(str(pid) for pid in holders[:8]) + (", …" if len(holders) > 8 else "")
        raise StateError(
            f"{sim_dir}: the simulated node cannot change while processes hold its memory (pid {listed})",
            hint="stop them (`reconciler down`), give the node it had before, or use another --state-dir",
        )


def _forget_gpus(sim_dir: Path) -> None:
    # only what the ledger wrote is removed: names it does not know stay, and keep their folder
    for folder in (*sim_dir.glob("gpus/*"), *sim_dir.glob("dying/*")):
        for entry in folder.glob("*-*"):
            entry.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
    (sim_dir / "faults.json").unlink(missing_ok=True)
    for count in sim_dir.glob("starts/*"):
        count.unlink(missing_ok=True)


def _private_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a symbolic link")


def _write(path: Path, text: str, mode: int) -> None:
    """Write so that a reader sees the old or the new file, never half of one."""
    with suppress(FileNotFoundError):
        if path.read_text("utf-8") == text and path.stat().st_mode & 0o777 == mode:
            return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # nothing is written through a link
    with draft.open("x", encoding="utf-8") as file:
        file.write(text)
    draft.chmod(mode)
    draft.replace(path)


def _wrapper(sim_dir: Path, source: Path) -> str:
    # sh, not a shebang with the interpreter: its path may be long or hold blanks
    return (
        "#!/bin/sh\n"
        f': "${{RECONCILER_SIM_DIR:={shlex.quote(str(sim_dir.absolute()))}}}"; export RECONCILER_SIM_DIR\n'
        f'exec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(source))} "$@"\n'
    )


def _to_json(node: SimNode) -> str:
    document = to_builtins(node)
    for index, gpu in enumerate(document["gpus"]):
        gpu["uuid"] = node.uuid(index)
    return json.dumps(document, indent=1, sort_keys=True) + "\n"
