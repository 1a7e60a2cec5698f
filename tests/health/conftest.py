"""The planner's own plant (tests/plan) stands in for the box where health is held against real plans."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "plan"))
