"""What the kernel may refuse at any call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn


def refusing(number: int) -> Callable[..., NoReturn]:
    """In the place of any function: it raises what the kernel would say by this `errno`."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse
