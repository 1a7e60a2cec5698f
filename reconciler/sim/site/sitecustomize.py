"""Puts the simulated driver below pynvml in any Python program started by `sim exec`, at the moment it imports pynvml.

Not at start: most programs never import it, and must not pay for it. A sitecustomize that was there before is run
afterwards, as if this one were not. Whatever is missing here (pynvml, this project, the node) changes nothing.
"""
# ruff: noqa: INP001 - a folder on PYTHONPATH, not a package: what stands in it is found under its bare name

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType


class _Below:
    """Finds pynvml where it would be found anyway, and installs the simulated driver once it is loaded."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the signature is importlib's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "pynvml":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_then_install(module: ModuleType) -> None:
            load(module)
            sys.modules.setdefault(name, module)
            # by name: this file stands on its own, and the project may not be installed for this interpreter
            with suppress(Exception):
                driver = importlib.import_module("reconciler.sim.driver")
                driver.install(Path(os.environ["RECONCILER_SIM_DIR"]))

        # of this one loader, not of its class
        spec.loader.exec_module = load_then_install  # type: ignore[method-assign]
        return spec


def _run_the_one_before() -> None:
    here = str(Path(__file__).parent)
    elsewhere = [entry for entry in sys.path if str(Path(entry).absolute()) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("RECONCILER_SIM_DIR"):
    sys.meta_path.insert(0, _Below())
_run_the_one_before()
