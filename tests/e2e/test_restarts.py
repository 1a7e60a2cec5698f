"""The restart policy with real processes: what is remembered over daemons, what clears it, and what does not wait."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from box_driver import Box, wait_for

pytestmark = pytest.mark.e2e

FALLS = "open('starts', 'a').write('x'); raise SystemExit(3)"
ENDS_WELL = FALLS.replace("3", "0")
"""As vLLM's server does when its engine has died (vllm#48966)."""
STUBBORN = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: open('terms', 'a').write('x'))\n"
    "open('starts', 'a').write('x')\n"
    "while True: time.sleep(600)\n"
)


@pytest.fixture
def one(box: Box) -> Box:
    """A box of one endpoint that a test gives a program and a policy."""
    box.spec["endpoints"]["one"] = {
        "engine": "custom", "gpus": 0, "cwd": str(box.root), "command": [sys.executable, "-c", FALLS],
        "restart": {"max_restarts": 2, "initial": "50ms", "window": "10m"}, "stop": {"drain": "0s", "grace": "2m"},
    }  # fmt: skip
    return box


def count(box: Box, what: str) -> int:
    path = box.root / what
    return len(path.read_text()) if path.exists() else 0


def wait_state(box: Box, *states: str) -> dict[str, object]:
    return wait_for(lambda: (e := box.endpoints()["one"])["state"] in states and e, f"it is {' or '.join(states)}")


def looked_again(box: Box) -> None:
    """A daemon looked at everything afresh, and acted on it: it started one more that was asked for only now."""
    box.spec["endpoints"]["two"] = {
        "engine": "custom", "gpus": 0, "cwd": str(box.root), "command": ["sh", "-c", "touch two; exec sleep 600"],
    }  # fmt: skip
    box.write()
    wait_for((box.root / "two").exists, "another one is started")
    del box.spec["endpoints"]["two"]


def test_a_crash_loop_is_counted_over_daemons_given_up_and_cleared_by_an_edit_and_by_a_reset(one: Box) -> None:
    one.write()
    one.start()
    wait_for(lambda: count(one, "starts") >= 1, "it was started")
    one.kill()
    one.start()
    wait_state(one, "failed")
    assert count(one, "starts") == 3, "the first, and two restarts"
    one.kill()
    one.start()
    looked_again(one)
    assert one.endpoints()["one"]["state"] == "failed"
    assert count(one, "starts") == 3
    one.spec["endpoints"]["one"]["env"] = {"TRY": "again"}
    one.write()
    wait_for(lambda: count(one, "starts") == 6, "an edit gives it all its tries again")
    wait_state(one, "failed")
    assert one.run("reset", "one").returncode == 0
    wait_for(lambda: count(one, "starts") == 9, "and so does a reset")
    wait_state(one, "failed")


def test_an_end_with_code_0_is_drift_its_back_off_outlives_the_daemon_and_a_stop_does_not_wait_for_it(one: Box) -> None:
    one.spec["endpoints"]["one"]["command"] = [sys.executable, "-c", ENDS_WELL]
    one.spec["endpoints"]["one"]["restart"] = {"max_restarts": 9, "initial": "10m", "max": "10m"}
    one.write()
    one.start()
    wait_for(lambda: count(one, "starts") == 2, "the first restart is immediate")
    waiting = wait_for(lambda: (e := one.endpoints()["one"])["reason"].startswith("CoolDown") and e, "then it waits")
    one.kill()
    one.start()
    looked_again(one)
    still = one.endpoints()["one"]
    assert (still["state"], still["restarts"]) == (waiting["state"], waiting["restarts"])
    assert still["reason"].startswith("CoolDown: it ended 2 times in a row")
    assert count(one, "starts") == 2
    one.spec["endpoints"]["one"]["state"] = "stopped"
    one.write()
    wait_state(one, "stopped")
    assert one.json("plan")["data"]["converged"]
    assert count(one, "starts") == 2


def test_a_grace_that_is_shortened_while_a_stop_is_under_way_takes_effect_without_a_second_signal(one: Box) -> None:
    one.spec["endpoints"]["one"]["command"] = [sys.executable, "-c", STUBBORN]
    one.write()
    one.start()
    wait_for(lambda: count(one, "starts") == 1, "it runs")
    pid = one.pids()["one"]
    one.spec["endpoints"]["one"]["state"] = "stopped"
    one.write()
    wait_for(lambda: count(one, "terms") == 1, "it was asked to end")
    wait_state(one, "stopping")
    assert Path(f"/proc/{pid}").exists()
    one.spec["endpoints"]["one"]["stop"]["grace"] = "500ms"
    began = time.monotonic()
    one.write()
    wait_state(one, "stopped")
    assert time.monotonic() - began < 60, "the two minutes were not waited for"
    assert not Path(f"/proc/{pid}").exists()
    assert count(one, "terms") == 1
