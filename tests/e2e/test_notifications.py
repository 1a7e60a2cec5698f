"""A box that tells of its incidents and shows its metrics: of what nobody planned, and of nothing else."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from pathlib import Path

from box_driver import Box, wait_for
from ports import free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "act"))

from letter_box import letter_box


def test_an_eviction_is_told_to_nobody_and_a_crash_beside_it_at_once(box: Box) -> None:
    port = free_port()
    box.endpoint("gives", gpus=[0])
    box.endpoint("falls", gpus=[1], priority=900)
    with letter_box() as letters:
        box.spec["notify"] = {"phone": {"webhook": letters.url}}
        box.spec["metrics"] = {"port": port}
        box.write()
        box.start()
        wait_for(lambda: {e["state"] for e in box.endpoints().values()} == {"healthy"}, "both are up")
        box.overlay("job", gpus=[0])
        wait_for(lambda: box.overlay_view("job").get("state") == "active", "the job runs")
        letters.silent.set()  # a receiver that never answers must not hold up the loop
        os.kill(box.pids()["falls"], signal.SIGKILL)
        wait_for(lambda: letters.requests, "somebody is told")
        wait_for(lambda: box.endpoints()["falls"]["state"] == "healthy", "and it is back meanwhile")
        letters.silent.clear()
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        assert 'reconciler_endpoint_state{endpoint="gives",state="healthy"} 0.0' in page
        assert 'reconciler_endpoint_planned{endpoint="gives"} 1.0' in page
        assert 'reconciler_evictions_total{endpoint="gives"} 1.0' in page
        assert 'subject="falls"' in page
        assert 'subject="gives"' not in page
        box.finish("job")
        wait_for(lambda: box.endpoints()["gives"]["state"] == "healthy", "the baseline is back")
        assert {subject for _, _, subject in letters.told()} == {"falls"}
        assert box.terminate() == 0
    shown = [
        box.run(*words).stdout for words in (("status",), ("events", "-n", "999"), ("plan",), ("explain", "falls"))
    ]
    assert "canary-5f2c" not in "".join([*shown, box.log()])
