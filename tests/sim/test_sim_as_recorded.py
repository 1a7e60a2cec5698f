"""The simulated engine is held to what the real vLLM answered, did and left behind when it was asked the same.

`real_vllm.json` holds the real one's answers with its version and the date; `record_real_vllm.py` makes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from questions import SCENES, differences, simulated_kind

from reconciler.spec.profiles import PROFILES

RECORDED = json.loads(Path(__file__).with_name("real_vllm.json").read_text("utf-8"))


@pytest.mark.parametrize("scene", SCENES)
def test_the_simulated_one_does_as_the_real_one_did(tmp_path: Path, scene: str) -> None:
    with simulated_kind(scene, tmp_path) as simulated:
        assert differences(SCENES[scene](simulated), RECORDED["answers"][scene]) == {}


def test_the_real_one_has_every_figure_that_is_read_of_it() -> None:
    vllm = PROFILES["vllm"]
    wanted = {*vllm.busy_metrics, *vllm.running_metrics, *vllm.progress_metrics}
    assert wanted <= set(RECORDED["answers"]["answering"]["metrics"])


def test_every_scene_was_recorded_and_no_other() -> None:
    assert RECORDED["answers"].keys() == SCENES.keys()
    assert RECORDED["vllm"]
    assert RECORDED["asked"]
