"""`forecast`, and what `overlay submit` tells at once."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

from desk import Desk

NIGHTLY = """\
version: 1
priority: 900
allow_baseline_eviction: true
makespan: {schedule: "%d %d * * *", timezone: UTC, duration: 3h}
gpus: 4
workload: {command: [sleep, "60"]}
"""

NOW = """\
version: 1
priority: 900
allow_baseline_eviction: true
makespan: {duration: 5m}
gpus: 4
"""


def nightly_in_an_hour(desk: Desk) -> None:
    import time

    desk.write("setpoints.yaml", desk.setpoints.read_text().replace("min_available: 1", "min_available: 0"))
    at = time.gmtime(time.time() + 3600)
    desk.write("overlays/nightly.yaml", NIGHTLY % (at.tm_min, at.tm_hour))


def test_a_forecast_without_a_daemon_is_told_and_drawn(desk: Desk) -> None:
    nightly_in_an_hour(desk)
    picture = desk.root / "tonight.svg"
    told = desk.run("forecast", "--for", "6h", "--svg", str(picture))
    assert told.returncode == 0, told.stderr
    assert "nightly begins on GPU 0, 1, 2, 3" in told.stdout
    assert "big does not answer for" in told.stdout
    ET.parse(picture)
    data = json.loads(desk.run("forecast", "--for", "6h", "--format", "json").stdout)["data"]
    assert data["complete"] is True
    assert {o["endpoint"] for o in data["outages"] if o["overlay"] == "nightly"} == {"big"}


def test_a_picture_that_cannot_be_written_is_an_error_that_names_the_file(desk: Desk) -> None:
    told = desk.run("forecast", "--for", "1h", "--svg", str(desk.root / "nowhere" / "x.svg"))
    assert told.returncode == 1
    assert "x.svg: cannot be written" in told.stderr


def test_a_job_that_a_window_keeps_waiting_is_told_so_as_it_is_submitted_with_the_next_free_slot(desk: Desk) -> None:
    nightly_in_an_hour(desk)
    job = ["overlay", "submit", "--gpus", "1", "--for", "3h"]
    told = desk.run(*job, "--deadline", "+9h", "--name", "long", "--", "sleep", "1")
    assert told.returncode == 0
    assert told.stdout == "long\n"
    assert "long waits: WindowTaken" in told.stderr
    assert "nightly" in told.stderr
    assert "next free slot" in told.stderr
    told = desk.run(*job, "--name", "endless", "--", "sleep", "1")  # without a hard end it has none, night after night
    assert "endless waits: WindowTaken" in told.stderr
    assert "hint: bound it by a deadline" in told.stderr
    asked = desk.run("overlay", "submit", "--gpus", "9", "--name", "nine", "--format", "json", "--", "sleep", "1")
    data = json.loads(asked.stdout)["data"]
    assert data["waits"]["reason"] not in ("", "NotYet")


def test_a_job_that_can_begin_is_not_told_to_wait(desk: Desk) -> None:
    told = desk.run(
        "overlay", "submit", "--gpus", "1", "--for", "1m", "--name", "now", "--format", "json", "--", "true"
    )
    assert json.loads(told.stdout)["data"]["waits"] is None


def test_explain_tells_who_gives_way_to_whom_since_when_and_of_gpus_that_cannot_be_read_no_index(desk: Desk) -> None:
    nightly_in_an_hour(desk)
    assert desk.run("apply", "--yes").returncode == 0
    try:
        assert "on, big will give way to it." in desk.run("explain", "nightly").stdout
        now = desk.write("overlays/now.yaml", NOW)
        told = desk.run("explain", "big").stdout
        way = r"It gives way to now since [-\d: ]+, which is evicting and expected to end at [-\d: ]+\. It comes back"
        assert re.search(way, told), told
        now.unlink()
        desk.run("sim", "fault", "unknown", "--gpu", "0")
        assert "on GPU 1 and 1 GPU that cannot be read now, port" in desk.run("explain", "big").stdout
        assert "How much of its memory is used cannot be read now." in desk.run("explain", "0").stdout
        assert "? / ?" in desk.run("status").stdout
    finally:
        desk.run("sim", "fault", "mend")
        desk.run("down")
