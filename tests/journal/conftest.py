from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.journal.layout import StateDir


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "state")
    made.ensure()
    return made
