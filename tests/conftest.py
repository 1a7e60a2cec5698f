"""What holds for every test, whoever started them; and this folder is on the path: `ports` is found from every room."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# the same examples in every run, however slow the machine is: what fails by chance tells nothing of a change
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_configure() -> None:
    """Let children hear Ctrl-C: a shell has what it starts in the background ignore it, and that is inherited.

    What is handled here is the default again in every program that is executed from here.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
