"""The simulated driver, put where pynvml keeps the loaded libnvidia-ml: below pynvml, whose own code runs unchanged.

pynvml loads the library only while its `nvmlLib` is None, and every call is a cached `getattr(nvmlLib, name)`
(nvidia-ml-py 12.575 and 13). A name that this pynvml knows but `calls` does not answers NOT_SUPPORTED, as a driver
does for what a board cannot do; a name unknown to both is missing, and pynvml says FUNCTION_NOT_FOUND.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml

from reconciler.sim.calls import NOT_SUPPORTED, Refused, calls
from reconciler.sim.node import load


def install(sim_dir: Path) -> None:
    """Put the simulated node in `sim_dir` below pynvml, in this process; whoever was initialised before is not now.

    Raises:
        StateError: no simulated node lives there.
    """
    _place(SimulatedLibrary(sim_dir))


def uninstall() -> None:
    """Take it away again: the next initialisation looks for the real library."""
    _place(None)


class SimulatedLibrary:
    """Stands where a `ctypes.CDLL` would: attributes are functions taking ctypes arguments, returning a code."""

    def __init__(self, sim_dir: Path) -> None:
        self._calls = calls(sim_dir, load(sim_dir))
        self._known: frozenset[str] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "nvmlErrorString":
            return _error_string()
        if name in self._calls:
            return _returning_code(self._calls[name])
        if self._known is None:
            self._known = _names_known_to_pynvml()
        if name in self._known:
            return _not_supported()
        raise AttributeError(name)


def _place(library: SimulatedLibrary | None) -> None:
    with pynvml.libLoadLock:
        pynvml.nvmlLib = library
        pynvml._nvmlLib_refcount = 0  # noqa: SLF001 - pynvml has no door for this; the names are checked by a test
        pynvml._nvmlGetFunctionPointer_cache.clear()  # noqa: SLF001


# Each of these makes a plain function: pynvml sets `restype` on what it finds, and a bound method takes no attributes.


def _returning_code(call: Callable[..., None]) -> Callable[..., int]:
    def function(*args: Any) -> int:
        try:
            call(*args)
        except Refused as refused:
            return refused.code
        return 0

    return function


def _not_supported() -> Callable[..., int]:
    def function(*_args: Any) -> int:
        return NOT_SUPPORTED

    return function


def _error_string() -> Callable[..., bytes]:
    def function(code: Any) -> bytes:
        # pynvml's own table: asking NVMLError for its text would come back here for a code that it does not list
        texts: dict[int, str] = pynvml.NVMLError._errcode_to_string  # noqa: SLF001
        number = int(getattr(code, "value", code))
        return texts.get(number, f"Unknown Error code {number}").encode()

    return function


def _names_known_to_pynvml() -> frozenset[str]:
    return frozenset(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', inspect.getsource(pynvml)))
