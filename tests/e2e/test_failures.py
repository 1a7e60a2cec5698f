"""Why an endpoint does not come up, as its log tells: a class and a hint, where people look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from box_driver import Box, wait_for
from ports import free_port

from reconciler.loop.control import ask


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    box.node = "1x24GiB"
    yield box
    box.close()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"args": ["--no-such-option", "1"]}, "BadArgument"),
        ({"model": "/nowhere/model"}, "ModelNotFound"),
        ({"model": "meta-llama/Llama-3.1-70B"}, "OutOfMemory"),
    ],
)
def test_a_start_that_fails_is_named_with_a_hint_in_status_and_incident(
    box: Box, fields: dict[str, object], kind: str
) -> None:
    box.spec["endpoints"]["ask"] = {
        "engine": "vllm",
        "model": "Qwen/Qwen3-0.6B",
        "port": free_port(),
        "gpus": [0],
        "restart": {"max_restarts": 0},
        **fields,
    }
    box.write()
    box.start()
    seen = wait_for(lambda: (e := box.endpoints()["ask"])["state"] == "failed" and e, "it is given up")
    assert f"({kind}: " in seen["reason"]
    assert any(kind in i["message"] for i in box.status()["incidents"])


def test_what_reset_was_answered_is_not_forgotten_by_a_daemon_that_is_killed_right_after(box: Box) -> None:
    box.spec["endpoints"]["ask"] = {
        "engine": "custom",
        "command": ["false"],
        "port": free_port(),
        "gpus": [0],
        "restart": {"max_restarts": 0},
    }
    box.write()
    box.start()
    wait_for(lambda: box.endpoints()["ask"]["state"] == "failed", "it is given up")
    socket = box.state / "control.sock"
    assert ask(socket, "reset", name="ask") == {"message": "ask is reset"}
    box.kill()
    events = box.json("events", "-n", "50")["data"]["events"]
    assert [e["kind"] for e in events if e["subject"] == "ask" and e["kind"] == "reset"] == ["reset"]
