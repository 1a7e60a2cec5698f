"""What people ask of a running daemon: answered from its last look, and durable before it is said to be done."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from reconciler.clock import Instant, SystemClock
from reconciler.errors import ActError, ReconcilerError, StateError
from reconciler.journal.codec import decode
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir
from reconciler.journal.reader import JournalReader
from reconciler.loop import daemon as daemon_module
from reconciler.loop import executor
from reconciler.loop.control import ask
from reconciler.loop.daemon import Daemon, Parts
from reconciler.loop.specs import SpecKeeper
from reconciler.observe.nvml import CACHED
from reconciler.observe.snapshot import ObserveOptions
from reconciler.plan.actions import Action, Cause, Event
from reconciler.plan.ledger import EndpointRecord, Ledger, Nap, Quarantine
from reconciler.plan.observed import Gpu, Incarnation, Observed, Subject

DEADLINE_S = 20.0
SETPOINTS = """\
version: 1
policy: {resync: 1h}
endpoints:
  chat: {engine: custom, command: [serve], gpus: [0], port: 8080, state: stopped}
"""


class Eyes:
    """Sees two idle GPUs, and counts its looks; it can be made to hold one."""

    def __init__(self) -> None:
        self.looks = 0
        self.asked: list[ObserveOptions] = []
        self.before_look: Callable[[], None] = lambda: None
        self.incarnations: tuple[Incarnation, ...] = ()

    def observe(self, _: object, options: ObserveOptions) -> Observed:
        self.before_look()
        self.looks += 1
        self.asked.append(options)
        now = SystemClock().now()
        gpus = tuple(Gpu(i, f"GPU-{i}", "A", "ok", 80 << 30, 0, (), "", healthy=True, at=now) for i in (0, 1))
        return Observed(now, "boot", gpus, self.incarnations)

    def watches(self) -> Mapping[int, str]:
        return {}

    def probe_now(self, incarnations: Collection[str]) -> None:
        pytest.fail(f"nobody is there to ask: {incarnations}")

    def owns_listener(self, *_: object) -> bool | None:
        return None

    def close(self) -> None:
        pass


class Actor:
    """Starts nothing, and notes when it was asked to start something, in monotonic seconds."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def warm(self) -> None:
        pass

    async def ensure_started(self, _: object) -> None:
        self.asked.append(SystemClock().now().mono)
        raise ActError("there is no disk space left")


class Leftovers:
    """Counts when shared memory was looked at."""

    def __init__(self) -> None:
        self.followed = 0
        self.cleared: list[frozenset[str]] = []

    async def follow(self, _observed: Observed) -> None:
        self.followed += 1

    async def clear(self, ended: frozenset[str]) -> tuple[Event, ...]:
        self.cleared.append(ended)
        return ()


class House:
    """One state directory, its files, and a daemon that is never asked to start anything."""

    def __init__(self, root: Path) -> None:
        self.setpoints = root / "setpoints.yaml"
        self.setpoints.write_text(SETPOINTS)
        self.state = StateDir(root / "state")
        self.state.ensure()
        self.clock = SystemClock()
        self.journal = Journal.open(self.state.journal, self.clock)
        self.eyes, self.actor = Eyes(), Actor()
        self.leftovers = Leftovers()

    def run(self, story: Callable[[Daemon], Awaitable[None]]) -> None:
        async def live() -> None:
            unused: Any = None
            actor: Any = self.actor
            leftovers: Any = self.leftovers
            daemon = Daemon(
                Parts(
                    state=self.state, clock=self.clock, journal=self.journal,
                    specs=SpecKeeper(self.setpoints, {}, transform=None), actor=actor, engines=unused,
                    eyes=lambda _wake: self.eyes, inherited={}, simulated={}, pid=os.getpid(),
                    leftovers=leftovers,
                )
            )  # fmt: skip
            running = asyncio.create_task(daemon.run())
            try:
                await asyncio.wait_for(story(daemon), DEADLINE_S)
            finally:
                daemon.stop()
                await asyncio.wait_for(running, DEADLINE_S)

        asyncio.run(live())

    async def ask(self, op: str, **arguments: object) -> Any:
        for _ in range(400):
            answer = await asyncio.to_thread(ask, self.state.control_socket, op, **arguments)
            if answer is not None:
                return answer
            await asyncio.sleep(0.01)
        pytest.fail("nobody listens")

    async def kinds(self, *awaited: str) -> list[str]:
        """Kinds of all events, once those awaited are among them."""
        for _ in range(1000):
            found = [event.kind for event in self.journal.events()]
            if set(awaited) <= set(found):
                return found
            await asyncio.sleep(0.01)
        pytest.fail(f"not told: {awaited}; {found}")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_request_before_the_first_look_waits_for_it_and_is_answered_from_it(house: House) -> None:
    async def story(_daemon: Daemon) -> None:
        status = await house.ask("status")
        assert [e["name"] for e in status["endpoints"]] == ["chat"]
        assert house.eyes.looks >= 1
        values = await house.ask("values")
        assert [gpu.uuid for gpu in decode(Observed, values["observed"]).gpus] == ["GPU-0", "GPU-1"]
        assert json.loads(values["daemon"])["pid"] == os.getpid()

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


def test_an_engine_that_is_gone_by_now_is_not_called(house: House) -> None:
    asleep = Action(
        1, (), "sleep", Subject("endpoint", "chat"), ("GPU-0",), "gives way", Cause("overlay"), 30.0, (0.0, 1.0),
        ready=True, incarnation="i-1",
    )  # fmt: skip

    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        with pytest.raises(StateError, match="chat is no longer there to sleep"):
            await daemon._call_engine(asleep)

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

    monkeypatch.setattr(daemon_module, "archive", put_away)
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


def test_shared_memory_is_looked_at_once_nothing_happened_for_a_moment(house: House) -> None:
    async def story(daemon: Daemon) -> None:
        await house.ask("status")
        while not house.leftovers.followed:
            await asyncio.sleep(0.01)
        daemon._gone.add("i-1")
        daemon.look_again()
        while frozenset({"i-1"}) not in house.leftovers.cleared:
            await asyncio.sleep(0.01)
        assert not daemon._gone

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
        daemon._gone.add("i-1")
        daemon.stop()

    house.run(story)
    assert frozenset({"i-1"}) in house.leftovers.cleared


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


@pytest.mark.parametrize(
    ("ended", "slept", "pace_s"),
    [
        ((), None, 0.1),
        ((None,), None, 0.1),
        ((0.3,), None, 0.1),
        ((4.0,), None, 0.2),
        ((60.0,), None, 1.0),
        ((60.0, 5.0), None, 0.25),
        ((60.0,), 1.0, 0.1),
        ((), 10.0, 0.5),
    ],
)
def test_memory_is_looked_at_the_less_often_the_longer_it_has_not_come_back(
    ended: tuple[float | None, ...], slept: float | None, pace_s: float
) -> None:
    """By how long ago the last one ended, or fell asleep."""
    now = Instant(1000.0, 1000.0)

    def ago(seconds: float | None) -> Instant | None:
        return None if seconds is None else now.plus(-seconds)

    endpoint = EndpointRecord("chat", nap=None if slept is None else Nap("i", 1, now, slept=ago(slept)))
    tick: Any = SimpleNamespace(
        observed=SimpleNamespace(incarnations=[SimpleNamespace(exited=ago(seconds)) for seconds in ended]),
        plan=SimpleNamespace(ledger=Ledger(endpoints={"chat": endpoint})),
    )
    assert daemon_module._memory_pace(tick, now) == pytest.approx(pace_s)


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
