"""The loop: what it has seen, decided and begun is followed by another look when, and only when, there is reason to."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from itertools import pairwise
from typing import NoReturn

import pytest
from loop_house import DEADLINE_S, SETPOINTS, House

from reconciler.errors import StateError
from reconciler.journal.reader import JournalReader
from reconciler.loop import daemon as daemon_module
from reconciler.loop import executor
from reconciler.loop.daemon import Daemon
from reconciler.observe.nvml import CACHED


def test_what_ends_during_a_look_is_known_to_the_decision_after_it(house: House) -> None:
    """Else a call to an engine that ended meanwhile would be made once more, by a plan that does not know of it."""
    known: list[bool] = []

    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        loop, noted, over = asyncio.get_running_loop(), threading.Event(), asyncio.Event()

        def note() -> None:
            daemon.request_clean_start(["chat"])
            noted.set()

        def during_the_first() -> None:
            house.eyes.before_look = during_the_second
            loop.call_soon_threadsafe(note)
            assert noted.wait(DEADLINE_S)

        def during_the_second() -> None:
            house.eyes.before_look = lambda: None
            with JournalReader.open_readonly(house.state.journal) as reader:
                known.append("clean-start" in [event.kind for event in reader.events()])
            loop.call_soon_threadsafe(over.set)

        house.eyes.before_look = during_the_first
        daemon.look_again()
        await over.wait()

    house.run(story)
    assert known == [True]


def test_what_went_into_a_decision_is_kept_as_soon_as_nothing_happens_for_a_moment(house: House) -> None:
    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        with JournalReader.open_readonly(house.state.journal) as reader:
            while (
                daemon._last is None or (kept := reader.decision()) is None or kept.wall != daemon._last.plan.now.wall
            ):
                await asyncio.sleep(0.01)

    house.run(story)


def test_a_start_that_failed_is_tried_again_in_its_time_though_nothing_wakes_the_loop(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "RETRY_INITIAL_S", 0.2)
    house.setpoints.write_text(SETPOINTS.replace(", state: stopped", ""))

    async def story(_daemon: Daemon) -> None:
        while len(house.actor.asked) < 3:
            await asyncio.sleep(0.01)

    house.run(story)
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(house.actor.asked))


def test_the_end_of_a_process_is_told_to_one_look(house: House) -> None:
    """Which has its GPUs looked at afresh, also if a look a moment before was too early for its end to be recorded."""

    async def look_again(daemon: Daemon) -> None:
        before = house.eyes.looks
        daemon.look_again()
        while house.eyes.looks == before:
            await asyncio.sleep(0.01)

    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        await look_again(daemon)
        daemon._wakers.ended.add("i-1")
        await look_again(daemon)
        await look_again(daemon)
        assert [options.ended for options in house.eyes.asked].count(True) == 1
        assert (house.eyes.asked[-1].ended, house.eyes.asked[-1].gpus) == (False, CACHED)

    house.run(story)


def test_after_a_start_nothing_is_done_for_its_first_steps_unless_something_else_happens(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "FIRST_STEPS_S", DEADLINE_S)

    async def story(daemon: Daemon) -> None:
        async def walk(_plan: object) -> bool:
            walks.append(house.eyes.looks)
            return len(walks) == 2

        walks: list[int] = []
        await house.ask("status")
        monkeypatch.setattr(daemon._executor, "walk", walk)
        for asked in (1, 2):
            daemon.look_again()
            while len(walks) < asked:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # nothing may happen in this time
        assert len(walks) == 2
        daemon.look_again()
        while len(walks) < 3:
            await asyncio.sleep(0.01)

    house.run(story)


def test_who_was_started_is_looked_at_after_its_first_steps(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(daemon: Daemon) -> None:
        async def walk(_plan: object) -> bool:
            walks.append(house.eyes.looks)
            return len(walks) < 4

        walks: list[int] = []
        await house.ask("status")
        monkeypatch.setattr(daemon._executor, "walk", walk)
        daemon.look_again()
        while len(walks) < 4:
            await asyncio.sleep(0.01)

    house.run(story)


def test_a_bad_edit_and_its_repair_are_told_once_each(house: House) -> None:
    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        house.setpoints.write_text("version: 1\nendpoints: {chat: 3}\n")
        daemon.look_again()
        await house.kinds("spec.rejected")
        for _ in range(2):
            looks = house.eyes.looks
            daemon.look_again()
            while house.eyes.looks == looks:
                await asyncio.sleep(0.01)
        house.setpoints.write_text(SETPOINTS)
        daemon.look_again()
        told = [kind for kind in await house.kinds("spec.accepted") if kind.startswith("spec.")]
        assert sorted(set(told)) == ["spec.accepted", "spec.rejected"]
        assert told.count("spec.accepted") == 1

    house.run(story)


def without_descriptors() -> NoReturn:
    reason = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    raise StateError("run: cannot be read: Too many open files") from reason


def test_a_daemon_that_has_no_descriptors_left_tells_of_it_and_looks_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "FIRST_BLIND_S", 0.01)

    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        house.eyes.before_look = without_descriptors
        daemon.look_again()
        await house.kinds("IncidentOpened")
        (blind,) = house.journal.incidents()
        assert (blind.kind, blind.state) == ("Blind", "open")
        assert "Too many open files" in blind.message
        looks = house.eyes.looks
        house.eyes.before_look = lambda: None
        await house.kinds("IncidentRecovering")
        assert house.eyes.looks > looks
        assert (await house.ask("status"))["daemon"]["running"]

    house.run(story)


def test_a_daemon_that_cannot_look_for_another_reason_ends_with_it(house: House) -> None:
    failed: list[bool] = []

    def failing() -> NoReturn:
        failed.append(True)
        raise StateError("the disk is gone")

    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        house.eyes.before_look = failing
        daemon.look_again()
        while not failed:
            await asyncio.sleep(0.01)

    with pytest.raises(StateError, match="the disk is gone"):
        house.run(story)
    assert len(failed) == 1
