"""Run any program as if it stood on the simulated node: `reconciler sim exec -- python -m nvitop`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from reconciler.errors import UsageError
from reconciler.sim.node import engine_environment, load


def environment(sim_dir: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (default: this process's environment), changed so that a Python program sees the simulated driver.

    PATH begins with the simulated engines and this interpreter's own folder, so that `python` is one that has pynvml;
    PYTHONPATH begins with a sitecustomize that waits for `import pynvml`.

    Raises:
        StateError: no simulated node lives in `sim_dir`.
    """
    load(sim_dir)
    result = dict(os.environ if base is None else base)
    own = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), result.get("PATH", os.defpath)]))
    result |= engine_environment(sim_dir, own)
    site = str(Path(__file__).with_name("site"))
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [site, result.get("PYTHONPATH", "")]))
    return result


def run(sim_dir: Path, command: Sequence[str], base: Mapping[str, str] | None = None) -> int:
    """Run `command` in the foreground on the simulated node, in an `environment`; its exit code, or -signal.

    Raises:
        UsageError: there is no such program.
        StateError: no simulated node lives in `sim_dir`.
    """
    if not command:
        raise UsageError("nothing to run", hint="reconciler sim exec -- python -m nvitop")
    env = environment(sim_dir, base)
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        raise UsageError(f"{command[0]}: no such program", hint="it is looked for on PATH")
    child = subprocess.Popen([program, *command[1:]], env=env)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the terminal sent it to the child, too, and the child decides what it means
