"""Under which settings examples are made up; and this folder is on the path: `ports` is found from every room."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# the same examples in every run, however slow the machine is: what fails by chance tells nothing of a change
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
