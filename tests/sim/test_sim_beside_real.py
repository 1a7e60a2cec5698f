"""The simulated engine beside the real vLLM: the same questions to both, and a difference fails.

What only exists with a GPU is not asked here. Some eight minutes on two idle cores.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from questions import SCENES, Kind, differences, real_kind, simulated_kind
from simulated_box import Engine

VLLM = os.environ.get("RECONCILER_TEST_VLLM", "")
RECORDED = json.loads(Path(__file__).with_name("real_vllm.json").read_text("utf-8"))

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not VLLM, reason="RECONCILER_TEST_VLLM names no vllm executable"),
]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Kind]:
    started: list[Engine] = []
    yield real_kind(Path(VLLM), tmp_path, started)
    for engine in started:
        with suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)
        engine.process.wait(10)


@pytest.mark.parametrize("scene", SCENES)
def test_both_answer_alike_and_as_it_was_recorded(tmp_path: Path, real: Kind, scene: str) -> None:
    told = SCENES[scene](real)
    with simulated_kind(scene, tmp_path) as simulated:
        assert differences(SCENES[scene](simulated), told) == {}
    assert told == RECORDED["answers"][scene], "record it anew: tests/sim/record_real_vllm.py"
