"""A move with real processes: one of two halves of GPUs is started on the other GPU, and a job gets a whole one."""

from __future__ import annotations

import json

import pytest
from box_driver import Box

from reconciler.cli.main import run
from reconciler.plan import solver


@pytest.fixture
def halves(box: Box) -> Box:
    """Two GPUs, and on each of them an endpoint that takes 30 GiB and may be anywhere."""
    box.node = "2x80GiB"
    for index, name in enumerate(("left", "right")):
        box.endpoint(name, gpus=[index], gib=20, memory="30GiB", preemptible=False)
    box.write()
    box.start()
    box.wait_healthy()
    for endpoint in box.spec["endpoints"].values():
        endpoint |= {"gpus": 1, "movable": True}
    box.write()
    return box


def test_a_job_that_needs_a_whole_gpu_has_one_of_two_moved_once_and_the_decision_can_be_made_again(
    halves: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box, before = halves, halves.pids()
    box.overlay("job", gib=60)
    box.wait_overlay("job", "active")
    box.wait_healthy()
    after = box.pids()
    (moved,) = (name for name in before if after[name] != before[name])
    where = {name: seen["gpus"] for name, seen in box.endpoints().items()}
    assert where["left"] == where["right"]
    assert box.overlay_view("job")["evicted"] == []
    assert f"It had {moved} moved." in box.run("explain", "job").stdout
    box.finish("job")
    box.wait_overlay("job", "done")
    assert box.pids() == after, "it stays where it is"
    assert box.json("incidents", "--all")["data"]["incidents"] == []

    decision = str(next(e["data"]["decision"] for e in box.json("events")["data"]["events"] if e["kind"] == "moved"))
    capsys.readouterr()
    words = box.argv("explain", "--replay", decision)[3:]
    assert run(words) == 0
    assert "the plan is the same, byte for byte" in capsys.readouterr().out
    monkeypatch.setattr(solver, "is_available", lambda: False)
    assert run(words) == 1
    told = capsys.readouterr().out
    assert "the plan is another one" in told
    assert "Without that solver nobody is moved: `pip install 'reconciler[solver]'`" in told
    assert run([*words, "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["data"]["same"] is False
