"""An engine whose ways to sleep and to wake up are written in the set points alone, with real processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_driver import HERE, Box, wait_for
from ports import free_port

GIB_MIB = 1024


@pytest.fixture
def dozy(tmp_path: Path) -> Iterator[Box]:
    """One GPU with an engine that nobody has heard of."""
    box = Box(tmp_path)
    box.node = "1x80GiB"
    box.spec["engines"] = {
        "dozer": {
            "executable": sys.executable,
            "model_args": [str(HERE / "stub_dozer.py"), "{model}"],
            "args": ["--port", "{port}", "--gib", "40", "--refuse", str(tmp_path / "refuse")],
            "health_path": "/up",
            "residual": "1GiB",
            "sleep": {
                "args": ["--can-doze"],
                "check": {"path": "/power", "field": "power.state", "asleep": "suspended", "awake": "running"},
                "level_2": {
                    "sleep": [
                        {
                            "path": "/power?to=suspended",
                            "method": "PUT",
                            "status": 202,
                            "answer": {"accepted": True},
                        }
                    ],
                    "wake": [{"path": "/power", "method": "PUT", "body": {"to": "running"}}, {"path": "/warm"}],
                },
            },
        }
    }
    box.spec["endpoints"]["ask"] = {
        "engine": "dozer",
        "model": "m",
        "port": free_port(),
        "gpus": [0],
        "memory": "40GiB",
        "priority": 100,
        "evict": {"method": "sleep"},
        "health": {"interval": "500ms", "startup": "60s"},
        "stop": {"drain": "0s", "grace": "5s"},
    }
    box.write()
    yield box
    box.close()


def refuse(box: Box, *calls: str) -> None:
    (box.root / "refuse").write_text(" ".join(calls))


def naps(box: Box) -> list[tuple[str, str]]:
    events: list[dict[str, Any]] = box.json("events")["data"]["events"]
    return [(e["kind"], e["message"]) for e in events if e["kind"].startswith("nap.")]


def test_an_engine_described_in_the_set_points_sleeps_and_wakes_by_its_own_calls(dozy: Box) -> None:
    dozy.start()
    before = dozy.wait_healthy("ask")["ask"]
    dozy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    dozy.wait_overlay("render", "active")
    asleep = dozy.endpoints()["ask"]
    assert (asleep["state"], asleep["pid"]) == ("sleeping", before["pid"])
    used = 70.5 * GIB_MIB
    wait_for(lambda: abs(dozy.status()["gpus"][0]["memory_used_mib"] - used) < 512, "the job and what it keeps")
    dozy.finish("render")
    after = dozy.wait_healthy("ask")["ask"]
    assert after["pid"] == before["pid"]
    assert [kind for kind, _ in naps(dozy)] == ["nap.slept", "nap.woken"]


def test_one_that_refuses_to_sleep_is_stopped_and_started_again_afterwards(dozy: Box) -> None:
    dozy.start()
    before = dozy.wait_healthy("ask")["ask"]
    refuse(dozy, "suspended")
    dozy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    dozy.wait_overlay("render", "active")
    assert dozy.endpoints()["ask"]["pid"] is None
    assert not [i for i in dozy.status()["incidents"] if not i.get("planned")]
    dozy.finish("render")
    after = dozy.wait_healthy("ask")["ask"]
    assert after["pid"] != before["pid"]
    assert [kind for kind, _ in naps(dozy)] == ["nap.failed"]
    assert "PUT /power?to=suspended answered 500" in naps(dozy)[0][1]


@pytest.mark.parametrize("call", ["running", "warm"])
def test_one_that_fails_at_any_step_of_waking_up_is_started_afresh(dozy: Box, call: str) -> None:
    dozy.start()
    before = dozy.wait_healthy("ask")["ask"]
    dozy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    dozy.wait_overlay("render", "active")
    refuse(dozy, call)
    dozy.finish("render")
    wait_for(lambda: len(naps(dozy)) == 2, "the waking failed")
    after = dozy.wait_healthy("ask")["ask"]
    assert after["pid"] != before["pid"]
    assert [kind for kind, _ in naps(dozy)] == ["nap.slept", "nap.failed"]
    assert "answered 500" in naps(dozy)[1][1]
    dozy.wait_overlay("render", "done")
