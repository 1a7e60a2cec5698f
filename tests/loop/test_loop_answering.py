"""What people ask of a running daemon: answered from its last tick, and durable before it is said to be done."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from loop_house import SETPOINTS, House

from reconciler.errors import ReconcilerError
from reconciler.journal.codec import decode
from reconciler.loop.daemon import Daemon
from reconciler.plan.ledger import Ledger, Quarantine
from reconciler.plan.observed import Observed


def test_a_request_before_the_first_look_waits_for_it_and_is_answered_from_it(house: House) -> None:
    async def story(_daemon: Daemon) -> None:
        status = await house.ask("status")
        assert [e["name"] for e in status["endpoints"]] == ["chat"]
        assert house.eyes.looks >= 1
        values = await house.ask("values")
        assert [gpu.uuid for gpu in decode(Observed, values["observed"]).gpus] == ["GPU-0", "GPU-1"]
        assert json.loads(values["daemon"])["pid"] == os.getpid()

    house.run(story)


def test_a_start_that_fails_is_told_with_its_reason(house: House) -> None:
    house.setpoints.write_text(SETPOINTS.replace("state: stopped", "state: running"))

    async def story(_daemon: Daemon) -> None:
        while True:
            (chat,) = (await house.ask("status"))["endpoints"]
            if chat["reason"].startswith("its start failed"):
                break
            await asyncio.sleep(0.02)
        assert chat["reason"].startswith("its start failed: there is no disk space left; tried again in")
        assert "ActionFailed" in [condition["type"] for condition in chat["conditions"]]

    house.run(story)


def test_what_lasts_has_lasted_until_it_is_asked_for_not_until_the_last_look(house: House) -> None:
    folder = house.setpoints.parent / "overlays"
    folder.mkdir()
    job = "version: 1\nmakespan: {start: 2099-01-01T00:00:00Z, duration: 5m}\ngpus: 1\nworkload: {command: [x]}\n"
    (folder / "job.yaml").write_text(job)

    async def waited_s() -> float:
        (overlay,) = (await house.ask("status"))["overlays"]
        return float(overlay["makespan"][0]["actual_seconds"])

    async def story(_daemon: Daemon) -> None:
        while True:
            first, looks = await waited_s(), house.eyes.looks
            await asyncio.sleep(0.2)
            second = await waited_s()
            if house.eyes.looks == looks:  # else whoever looks in between knows better in any case
                break
        assert second > first

    house.run(story)


def test_a_reset_is_durable_when_it_is_answered_and_of_nobody_known_an_error_that_changes_nothing(house: House) -> None:
    now = house.clock.now()
    shut = Quarantine("GPU-1", now, "it does not answer")
    house.journal.commit(Ledger(boot_id="boot", quarantines={"GPU-1": shut}), [], now)

    async def story(_daemon: Daemon) -> None:
        await house.ask("status")
        assert set(house.journal.ledger().quarantines) == {"GPU-1"}
        assert (await house.ask("reset", name="1"))["message"] == "1 is reset"
        assert not house.journal.ledger().quarantines
        assert (await house.ask("reset", name="1"))["message"] == "1 had nothing to reset"
        before = house.journal.ledger()
        with pytest.raises(ReconcilerError, match="nobody"):
            await house.ask("reset", name="nobody")
        assert house.journal.ledger() == before

    house.run(story)


def test_a_request_that_no_version_knows_is_refused_by_name(house: House) -> None:
    async def story(_daemon: Daemon) -> None:
        with pytest.raises(ReconcilerError, match="does not know the request 'dance'"):
            await house.ask("dance")

    house.run(story)


def test_a_clean_start_by_socket_or_by_the_program_itself_is_begun_with_the_next_tick(house: House) -> None:
    async def story(daemon: Daemon) -> None:
        assert (await house.ask("clean_start", endpoints=["chat"]))["message"] == "begun"
        assert (await house.kinds()).count("clean-start") == 1
        daemon.request_clean_start(["chat"])
        while (await house.kinds()).count("clean-start") == 1:
            await asyncio.sleep(0.01)

    house.run(story)


def test_what_was_asked_of_a_daemon_whose_tick_fails_is_answered_and_not_said_to_be_done(house: House) -> None:
    """The request was taken into that tick already, which ends before it is committed."""

    async def story(_daemon: Daemon) -> None:
        await house.ask("status")

        def fail() -> None:
            raise ReconcilerError("the box went away")

        house.eyes.before_look = fail
        with pytest.raises(ReconcilerError, match="the daemon ended before it did that"):
            await house.ask("reset", name="0")

    with pytest.raises(ReconcilerError, match="the box went away"):
        house.run(story)
