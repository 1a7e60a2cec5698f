"""One incident for each thing that nobody planned, none for what was planned: with real processes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from box_driver import Box, wait_for


def all_incidents(box: Box) -> list[dict[str, Any]]:
    return box.json("incidents", "--all")["data"]["incidents"]


def told(box: Box) -> list[tuple[str, str]]:
    return [(incident["kind"], incident["subject"]) for incident in all_incidents(box)]


def up(box: Box, count: int) -> None:
    wait_for(lambda: [e["state"] for e in box.endpoints().values()] == ["healthy"] * count, f"{count} endpoints are up")


def test_an_endpoint_killed_while_another_gives_way_is_the_one_incident(box: Box) -> None:
    box.endpoint("gives", gpus=[0])
    box.endpoint("falls", gpus=[1], priority=900)
    box.write()
    box.start()
    up(box, 2)
    victim = box.pids()["falls"]
    box.overlay("job", gpus=[0])
    wait_for(lambda: box.overlay_view("job").get("state") not in (None, "pending"), "the eviction has begun")
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: told(box), "somebody noticed")
    wait_for(lambda: box.overlay_view("job").get("state") == "active", "the job runs")
    box.finish("job")
    up(box, 2)
    wait_for(lambda: box.overlay_view("job").get("state") == "done", "everything is back")
    spans = {span["part"]: span for span in box.overlay_view("job")["makespan"]}
    assert list(spans) == ["evict", "run", "restore"]
    assert all(span["over"] and span["predicted_seconds"] is not None for span in spans.values())
    assert "This run: evict " in box.run("explain", "job").stdout
    assert [subject for _, subject in told(box)] == ["falls"]
    (incident,) = all_incidents(box)
    assert incident["count"] == 1
    told_by_id = box.json("explain", incident["id"])["data"]
    assert (told_by_id["kind"], told_by_id["incident"]["subject"]) == ("incident", "falls")
    assert {event["subject"] for event in told_by_id["events"]} == {"falls"}
    text = box.run("explain", f"{incident['kind']}/falls").stdout
    assert text.startswith(f"{incident['kind']} of falls (warning): ")
    assert "is resolved once" in text


def test_a_job_that_crashes_is_one_incident_and_its_victim_none(box: Box) -> None:
    box.endpoint("gives", gpus=[0])
    box.write()
    box.start()
    up(box, 1)
    box.overlay("job", gpus=[0], exit_code=7)
    wait_for(lambda: box.overlay_view("job").get("state") == "active", "the job runs")
    box.finish("job")
    wait_for(lambda: box.overlay_view("job").get("state") == "failed", "it has crashed, and the baseline is back")
    up(box, 1)
    assert told(box) == [("WorkloadFailed", "job")]


HURRIED = "from reconciler.plan import agenda; agenda.SLACK_S = 10.0; from reconciler.cli.main import main; main()"
"""The program, for which a way back that takes ten seconds more than foreseen takes too long; else it is a minute."""


def test_a_return_that_takes_much_too_long_is_one_overdue_incident(box: Box) -> None:
    box.program = [sys.executable, "-c", HURRIED]
    brake = box.root / "brake"
    box.endpoint("gives", gpus=[0], extra=["--not-while", str(brake)], health={"interval": "500ms", "startup": "10m"})
    box.endpoint("stays", gpus=[1])
    box.write()
    box.start()
    up(box, 2)
    box.overlay("job", gpus=[0], makespan={"duration": "2s", "grace": "1s"})
    wait_for(lambda: box.overlay_view("job").get("state") == "active", "the job runs")
    brake.touch()
    box.finish("job")
    wait_for(lambda: box.endpoints()["gives"]["state"] == "starting", "it is on its way back")
    assert told(box) == []
    wait_for(lambda: told(box), "its time is over")
    assert told(box) == [("Overdue", "gives")]
    brake.unlink()
    up(box, 2)
    wait_for(lambda: all_incidents(box)[0]["state"] == "recovering", "and it is noticed that it is back")
    assert told(box) == [("Overdue", "gives")]
