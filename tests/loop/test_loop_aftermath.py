"""What is done once somebody has ended: records are put away, shared memory is cleared, and nobody waits for it."""

from __future__ import annotations

import asyncio
import errno

import pytest
from loop_house import DEADLINE_S, House

from reconciler.journal.layout import StateDir
from reconciler.loop import aftermath
from reconciler.loop import daemon as daemon_module
from reconciler.loop.daemon import Daemon
from reconciler.plan.observed import Incarnation, Subject


def test_records_that_cannot_be_put_away_are_told_once_and_end_no_daemon(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder that is read-only by now; once it can be, they are."""
    tries: list[str] = []
    writable = asyncio.Event()

    def put_away(_state: StateDir, incarnation: str, *, keep: int) -> None:
        assert keep > 0
        tries.append(incarnation)
        if not writable.is_set():
            raise OSError(errno.EROFS, "Read-only file system")
        house.eyes.incarnations = ()

    monkeypatch.setattr(aftermath, "archive", put_away)
    now = house.clock.now()
    subject = Subject("endpoint", "gone")
    house.eyes.incarnations = (
        Incarnation("i-1", subject, "h", (), (), False, None, now, "exited", None, (), exit_code=0, exited=now),
    )

    async def story(daemon: Daemon) -> None:
        for number in range(1, 4):
            daemon.look_again()
            for _ in range(1000):
                if len(tries) >= number:
                    break
                await asyncio.sleep(0.01)
        assert (await house.ask("status"))["daemon"]["running"]
        writable.set()
        while house.eyes.incarnations:
            daemon.look_again()
            await asyncio.sleep(0.01)
        kinds = [event.kind for event in house.journal.events()]
        assert kinds.count("records.kept") == 1

    house.run(story)


def test_shared_memory_is_looked_at_once_nothing_happened_for_a_moment(house: House) -> None:
    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        while not house.leftovers.followed:
            await asyncio.sleep(0.01)
        daemon._aftermath._gone.add("i-1")
        daemon.look_again()
        while frozenset({"i-1"}) not in house.leftovers.cleared:
            await asyncio.sleep(0.01)
        assert not daemon._aftermath._gone

    house.run(story)


def test_where_something_happens_all_the_time_shared_memory_is_looked_at_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "CALM_S", DEADLINE_S)
    monkeypatch.setattr(daemon_module, "NEVER_CALM_S", 0.05)

    async def story(daemon: Daemon) -> None:
        while house.leftovers.followed < 3:
            daemon.look_again()
            await asyncio.sleep(0.01)
        looks = house.eyes.looks
        daemon.look_again()
        while house.eyes.looks == looks:
            await asyncio.sleep(0.01)

    house.run(story)


def test_the_last_look_of_all_clears_up_as_well(house: House) -> None:
    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        daemon._aftermath._gone.add("i-1")
        daemon.stop()

    house.run(story)
    assert frozenset({"i-1"}) in house.leftovers.cleared
