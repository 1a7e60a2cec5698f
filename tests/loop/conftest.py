"""What the tests of the loop share."""

from __future__ import annotations

from pathlib import Path

import pytest
from loop_house import House


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)
