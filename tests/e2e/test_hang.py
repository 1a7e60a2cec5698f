"""Engines that stand still behind a green health page, and those that only look like it: real processes and signals."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_driver import Box, is_gone, wait_for
from ports import free_ports

HUNG_S = 6.0
NAMES = ("stuck", "hung", "deaf", "slow", "idle")
RESTARTED = ("stuck", "hung", "deaf")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    box.spec["policy"] = {"resync": "2s"}
    for gpu, (name, port) in enumerate(zip(NAMES, free_ports(len(NAMES)), strict=True)):
        box.spec["endpoints"][name] = {
            "engine": "vllm",
            "model": "Qwen/Qwen3-0.6B",
            "port": port,
            "gpus": [gpu],
            "health": {"interval": "500ms", "timeout": "3s", "unhealthy_for": "3s", "hung": f"{HUNG_S:g}s"},
            "stop": {"drain": "10m", "grace": "2s"},  # what is in flight cannot finish: nobody waits for it
        }
    # `hung` is deaf to SIGTERM, as a core in a call of its driver is; `idle` answers slowly, as on a busy box
    node = tmp_path / "node.yaml"
    node.write_text(
        "gpus: [{memory: 24GiB, name: Card, count: 5}]\ntime_scale: 0.02\n"
        "faults:\n- {fault: slow_probe, endpoint: idle, for: 50s}\n"
        "- {fault: hang, endpoint: hung, requests: 2, start: 1}\n"
    )
    box.node = str(node)
    box.write()
    yield box
    box.close()


def members(leader: int) -> dict[str, int]:
    """Title → pid of the living members of its session."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found[(entry / "cmdline").read_bytes().split(b"\0")[0].decode()] = int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


def ask(endpoint: dict[str, Any]) -> socket.socket:
    """A completion that would take hours."""
    body = b'{"prompt": "x", "max_tokens": 1000000000}'
    sock = socket.create_connection(("127.0.0.1", endpoint["port"]))
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    return sock


class Stutter:
    """Lets a process run for a moment in every second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.over = pid, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.over.wait(0.1):
            os.kill(self.pid, signal.SIGSTOP)
            self.over.wait(0.9)
            os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        self.over.set()
        self.thread.join(5)
        os.kill(self.pid, signal.SIGCONT)


def test_a_hang_is_told_and_ended_and_what_is_idle_or_slow_is_left_alone(box: Box) -> None:
    box.start()
    before = box.wait_healthy(*NAMES)
    trees = {name: members(before[name]["pid"]) for name in NAMES}
    # `stuck` stands still before anything is asked of it: its own figures will show nothing at work
    os.kill(trees["stuck"]["VLLM::EngineCore"], signal.SIGSTOP)
    clients = [ask(before[name]) for name in ("stuck", "hung", "hung", "slow")]
    stutter = Stutter(trees["slow"]["VLLM::EngineCore"])
    os.kill(trees["idle"]["VLLM::EngineCore"], signal.SIGSTOP)
    os.kill(before["deaf"]["pid"], signal.SIGSTOP)
    began = time.monotonic()

    seen: dict[str, set[tuple[str, str]]] = {name: set() for name in NAMES}

    def restarted() -> bool:
        now = box.endpoints()
        for name in NAMES:
            seen[name].add((now[name]["state"], now[name]["reason"] or ""))
        return all(now[n]["pid"] != before[n]["pid"] and now[n]["state"] == "healthy" for n in RESTARTED)

    wait_for(restarted, f"the three are back\n{seen}", 90)
    took_s = time.monotonic() - began
    stutter.end()
    os.kill(trees["idle"]["VLLM::EngineCore"], signal.SIGCONT)
    for client in clients:
        client.close()

    for name in ("stuck", "hung"):
        assert any(state == "unhealthy" and reason.startswith("Hung: ") for state, reason in seen[name]), seen
    assert took_s > HUNG_S
    assert any(state == "unhealthy" and "did not answer within" in reason for state, reason in seen["deaf"]), seen
    assert not [reason for _, reason in seen["deaf"] if "Hung" in reason], "it says nothing of its counter: unknown"
    for name in RESTARTED:
        assert all(is_gone(pid) for pid in trees[name].values()), "the stopped core is ended with its group"
    after = box.endpoints()
    for name in ("idle", "slow"):
        assert {state for state, _ in seen[name]} == {"healthy"}, seen
        assert after[name]["pid"] == before[name]["pid"]
    said = [(i["kind"], i["subject"]) for i in box.json("incidents", "--all")["data"]["incidents"]]
    assert {("Hung", "stuck"), ("Hung", "hung")} <= set(said)
    assert not [name for _, name in said if name in ("idle", "slow")]
    events = box.json("events")["data"]["events"]
    assert not [e for e in events if "by itself" in f"{e['message']} {e['cause']}"], "they were ended"
    for name in ("stuck", "hung"):
        (last,) = [line for line in box.run("explain", name).stdout.splitlines() if line.startswith("It last ended")]
        assert "unplanned, with" in last
        assert "ended because it was unhealthy for 3 s: Hung: requests run and no token was made for" in last
