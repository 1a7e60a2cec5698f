"""`examples/cpu-vllm` as its page says: two real vLLM servers, an overlay that evicts one, and its return."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from box_driver import Box, wait_for
from ports import free_ports

VLLM = os.environ.get("RECONCILER_TEST_VLLM", "")
EXAMPLE = Path(__file__).parents[2] / "examples/cpu-vllm"
LOAD_S = 600.0
"""27-59 s alone on two cores; two at once on a busy machine take a multiple."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not VLLM, reason="RECONCILER_TEST_VLLM names no vllm executable"),
]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    box.node = "2x24GiB"
    box.spec = yaml.safe_load((EXAMPLE / "setpoints.yaml").read_text("utf-8"))
    lab = Path(VLLM).parents[2]
    box.spec["defaults"] |= {"executable": VLLM, "model": str(lab / "tiny-model")}
    for endpoint, port in zip(box.spec["endpoints"].values(), free_ports(2), strict=True):
        endpoint["port"] = port
    box.write()
    yield box
    box.close()


def completes(port: int) -> bool:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, trust_env=False, timeout=60)
    return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 4


def processes_of(pid: int) -> list[str]:
    """Titles of the living processes of its session."""
    return [title for title, _ in members(pid)]


def members(pid: int) -> list[tuple[str, int]]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid and fields[0] not in "ZX":
                found.append(((entry / "cmdline").read_bytes().split(b"\0")[0].decode(), int(entry.name)))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_an_overlay_evicts_a_real_server_with_all_its_processes_and_it_returns(box: Box) -> None:
    box.start()
    wait_for(lambda: all(e["state"] == "healthy" for e in box.endpoints().values()), "both are ready", LOAD_S)
    before = box.endpoints()
    assert completes(before["thinking"]["port"])
    assert completes(before["asking"]["port"])
    tree = processes_of(before["asking"]["pid"])
    assert "VLLM::EngineCore" in tree
    slow = {
        i["id"] for i in box.status()["incidents"]
    }  # on a busy box two loads can be overdue, as they should be told
    shutil.copy(EXAMPLE / "overlays.available/render.yaml", box.overlays / "render.yaml")
    box.wait_overlay("render", "active")
    during = box.endpoints()
    assert during["asking"]["pid"] is None
    assert processes_of(before["asking"]["pid"]) == []
    assert during["thinking"]["pid"] == before["thinking"]["pid"]
    assert completes(before["thinking"]["port"])
    assert {i["id"] for i in box.status()["incidents"]} <= slow, "nothing of the eviction is an incident"
    wait_for(lambda: box.endpoints()["asking"]["state"] == "healthy", "asking returned", LOAD_S)
    after = box.endpoints()
    assert after["asking"]["pid"] != before["asking"]["pid"]
    assert after["thinking"]["pid"] == before["thinking"]["pid"]
    assert completes(after["asking"]["port"])
    box.wait_overlay("render", "done")
    ends = [e for e in box.json("events")["data"]["events"] if e["subject"] == "asking" and "act.stop" in e["kind"]]
    assert len(ends) == 1, "one stop, and one only"


def core_of(pid: int | None) -> int:
    """The engine core of a server; 0 while there is none."""
    return next((p for title, p in members(pid or -1) if title == "VLLM::EngineCore"), 0)


def test_what_a_real_server_does_to_its_keeper_is_survived(box: Box) -> None:
    """SIGTERM lost while it loads; its server killed, the engine left behind; its engine killed, an exit with 0."""
    del box.spec["endpoints"]["thinking"]
    asking = box.spec["endpoints"]["asking"]
    asking["stop"] = {"drain": "0s", "grace": "8s"}
    box.write()
    box.start()

    def back(than: int) -> int:
        def look() -> int:
            seen = box.endpoints()["asking"]
            return seen["pid"] if seen["state"] == "healthy" and seen["pid"] != than else 0

        return int(wait_for(look, f"it is back\n{box.log()}", LOAD_S))

    def events(kind: str) -> list[dict[str, object]]:
        return [e for e in box.json("events")["data"]["events"] if e["subject"] == "asking" and kind in e["kind"]]

    # 1. SIGTERM is lost between the engine's spawn and ready: after the grace the whole group is killed
    loading = wait_for(lambda: box.endpoints()["asking"]["pid"], "it is started", 60)
    wait_for(lambda: core_of(loading), "its engine core is there", LOAD_S)
    asking["state"] = "stopped"
    box.write()
    wait_for(lambda: box.endpoints()["asking"]["state"] == "stopped", "it is stopped", 120)
    assert processes_of(loading) == []
    asking["state"] = "running"
    box.write()
    first = back(loading)

    # 2. SIGKILL of the server orphans its engine: that is found and ended before the next start
    core = core_of(first)
    os.kill(first, signal.SIGKILL)
    second = back(first)
    assert processes_of(first) == []
    assert core_of(second) not in (0, core)
    assert completes(asking["port"])

    # 3. the death of the engine ends the server with 0: drift, and started again
    os.kill(core_of(second), signal.SIGKILL)
    third = back(second)
    assert processes_of(second) == []
    assert completes(asking["port"])
    assert third != second
    assert [e for e in box.json("events")["data"]["events"] if "exit code 0" in str(e.get("message"))], events("")
