"""Giving way by sleeping, end to end: the simulated vLLM behind real processes, ports and the driver's numbers."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from box_driver import Box, wait_for
from ports import free_port

from reconciler.journal.reader import JournalReader

GIB_MIB = 1024


@pytest.fixture
def sleepy(tmp_path: Path) -> Iterator[Box]:
    """One GPU with a `vllm serve` that may sleep."""
    box = Box(tmp_path)
    box.node = "1x80GiB"
    box.spec["endpoints"]["ask"] = {
        "engine": "vllm",
        "model": "Qwen/Qwen3-1.7B",
        "port": free_port(),
        "gpus": [0],
        "memory": "40GiB",
        "priority": 100,
        "evict": {"method": "sleep", "level": 1, "weights": "1MiB"},
        "health": {"interval": "500ms", "startup": "60s"},
        "stop": {"drain": "5s", "grace": "5s"},
    }
    box.write()
    yield box
    box.close()


def gpu_used(box: Box) -> int:
    return int(box.status()["gpus"][0]["memory_used_mib"])


def said(box: Box) -> list[str]:
    events: list[dict[str, Any]] = box.json("events")["data"]["events"]
    return [e["kind"] for e in events if e["subject"] == "ask"]


def test_an_overlay_puts_an_endpoint_to_sleep_and_it_wakes_up_as_the_same_process(sleepy: Box) -> None:
    sleepy.start()
    before = sleepy.wait_healthy("ask")["ask"]
    assert gpu_used(sleepy) > 30 * GIB_MIB
    path = sleepy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    sleepy.wait_overlay("render", "active")
    asleep = sleepy.endpoints()["ask"]
    assert (asleep["state"], asleep["pid"]) == ("sleeping", before["pid"])
    assert asleep["scheduled"]["overlay"] == "render"
    assert "asleep at level 1 (1MiB of weights in host memory, " in asleep["reason"]
    assert "asleep at level 1" in sleepy.run("explain", "ask").stdout
    # the job, and the residue of the one that sleeps
    wait_for(lambda: 70 * GIB_MIB < gpu_used(sleepy) < 72 * GIB_MIB, "both are seen on the GPU")
    assert not [i for i in sleepy.status()["incidents"] if not i.get("planned")]
    sleepy.finish("render")
    after = sleepy.wait_healthy("ask")["ask"]
    assert after["pid"] == before["pid"]
    assert gpu_used(sleepy) > 30 * GIB_MIB
    sleepy.wait_overlay("render", "done")
    path.unlink()
    assert not [kind for kind in said(sleepy) if kind in ("act.stop", "nap.failed")]
    with JournalReader.open_readonly(sleepy.state / "journal.sqlite") as journal:
        learnt = journal.timings()
    assert 0 < learnt["ask", "sleep1"][0] < 30
    assert 0 < learnt["ask", "wake1"][0] < 30


def test_a_daemon_killed_while_an_endpoint_sleeps_finds_it_asleep_and_wakes_it(sleepy: Box) -> None:
    sleepy.start()
    before = sleepy.wait_healthy("ask")["ask"]
    sleepy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    sleepy.wait_overlay("render", "active")
    sleepy.kill()
    sleepy.finish("render")
    sleepy.start()
    after = sleepy.wait_healthy("ask")["ask"]
    assert after["pid"] == before["pid"]


def test_an_engine_that_cannot_sleep_after_all_is_stopped_instead(sleepy: Box) -> None:
    """It was started before its set points asked for sleep, so it has no such calls."""
    evict = sleepy.spec["endpoints"]["ask"].pop("evict")
    sleepy.write()
    sleepy.start()
    before = sleepy.wait_healthy("ask")["ask"]
    sleepy.spec["endpoints"]["ask"]["evict"] = evict
    sleepy.write()
    sleepy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    sleepy.wait_overlay("render", "active")
    assert sleepy.endpoints()["ask"]["pid"] is None
    sleepy.finish("render")
    after = sleepy.wait_healthy("ask")["ask"]
    assert after["pid"] != before["pid"]
    assert "nap.failed" in said(sleepy)


def test_an_engine_that_dies_in_its_sleep_is_started_afresh(sleepy: Box) -> None:
    sleepy.start()
    before = sleepy.wait_healthy("ask")["ask"]
    sleepy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    sleepy.wait_overlay("render", "active")
    os.killpg(before["pid"], signal.SIGKILL)
    sleepy.finish("render")
    after = sleepy.wait_healthy("ask")["ask"]
    assert after["pid"] != before["pid"]


@pytest.mark.parametrize(
    ("fault", "asleep"), [("sleep_fails", False), ("wake_out_of_memory", True)], ids=["asleep never", "awake never"]
)
def test_a_nap_that_fails_costs_a_restart_and_nothing_else(sleepy: Box, fault: str, asleep: bool) -> None:
    """The engine refuses to sleep, and is stopped; or it runs out of memory as it wakes up, and ends with 0."""
    node = sleepy.root / "node.yaml"
    node.write_text(
        "gpus: [{name: Card, memory: 80GiB, count: 1}]\ntime_scale: 0.02\nrelease_delay: 100ms\n"
        f"faults: [{{fault: {fault}, start: 1}}]\n"
    )
    sleepy.node = str(node)
    sleepy.start()
    before = sleepy.wait_healthy("ask")["ask"]
    sleepy.overlay("render", gpus=[0], memory="70GiB", gib=70)
    sleepy.wait_overlay("render", "active")
    assert (sleepy.endpoints()["ask"]["pid"] == before["pid"]) == asleep
    sleepy.finish("render")
    sleepy.wait_overlay("render", "done")
    after = sleepy.wait_healthy("ask")["ask"]
    assert after["pid"] != before["pid"]
    assert [kind for kind in said(sleepy) if kind.startswith("nap.")] == ["nap.slept", "nap.failed"][not asleep :]
    assert gpu_used(sleepy) > 30 * GIB_MIB


@pytest.mark.parametrize("way", ["sleep", "stop", "removal"])
def test_requests_in_flight_are_answered_before_it_leaves_and_none_is_lost(sleepy: Box, way: str) -> None:
    """One that sleeps would answer only once it wakes up; one that stops would cut off what it is at, also if no file
    says any more what it is asked.
    """
    ask_spec = sleepy.spec["endpoints"]["ask"]
    ask_spec["stop"]["drain"] = "30s"
    ask_spec["evict"]["method"] = "sleep" if way == "sleep" else "stop"
    sleepy.spec["endpoints"]["other"] = {"engine": "custom", "command": ["true"], "gpus": 0, "state": "stopped"}
    ask_spec["args"] = ["--shutdown-timeout", "0"]  # else the engine finishes them by itself after the signal
    sleepy.write()
    sleepy.start()
    port = sleepy.wait_healthy("ask")["ask"]["port"]
    answered: list[tuple[int, str]] = []

    def ask() -> None:
        body = {"model": "Qwen/Qwen3-1.7B", "prompt": "x", "max_tokens": 8000}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        answered.append((answer.status_code, answer.json()["choices"][0]["finish_reason"]))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for one in asking:
        one.start()
    wait_for(lambda: running(port) == 3, "three requests are being worked on")
    if way == "removal":
        del sleepy.spec["endpoints"]["ask"]
        sleepy.write()
        wait_for(lambda: "act.stop" in said(sleepy), "what was taken out of the set points is stopped")
    else:
        sleepy.overlay("render", gpus=[0], memory="70GiB", gib=70)
        sleepy.wait_overlay("render", "active")
    for one in asking:
        one.join(60)
    assert answered == [(200, "length")] * 3
    assert f"act.{'sleep' if way == 'sleep' else 'stop'}" in said(sleepy)


def running(port: int) -> float:
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(r"^vllm:num_requests_running\S* (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0
