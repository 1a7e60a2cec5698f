"""How long things took: measured durations, from which the caller predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Measure = Literal["load", "drain", "stop", "memory", "run", "sleep1", "sleep2", "wake1", "wake2"]
"""load: spawn to ready; drain: ask to nothing in flight; stop: signal to gone; memory: gone to its memory seen
free; run: a workload from start to exit;
sleep1: told to sleep at level 1 until it has; wake1: told to wake up until it is ready."""

KEPT_PER_KEY = 50
"""Measurements kept per (subject, measure): enough for a 95th percentile, few enough to follow a new disk or model."""


def p95(samples: Sequence[float]) -> float | None:
    """The 95th percentile by nearest rank, in the samples' unit; None without samples."""
    return sorted(samples)[math.ceil(0.95 * len(samples)) - 1] if samples else None
