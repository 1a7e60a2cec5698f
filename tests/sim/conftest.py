"""The simulated node of a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_box import Box, box_of, small_node


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """Two GPUs of 24 GiB, a hundred times faster than life; memory comes back 200 ms late."""
    with box_of(tmp_path, small_node()) as box:
        yield box
