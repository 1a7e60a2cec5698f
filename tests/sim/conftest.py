"""The simulated node of a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_box import Box, small_node

from reconciler.sim.node import prepare


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """Two GPUs of 24 GiB, a hundred times faster than life; memory comes back 200 ms late."""
    node = small_node()
    prepare(tmp_path / "sim", node)
    box = Box(tmp_path / "sim", node)
    yield box
    box.sweep()
