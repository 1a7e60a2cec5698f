"""The loop is woken by what happened, once for each, and by nothing after it was closed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from reconciler.loop import wakers
from reconciler.loop.wakers import Wakers

LONG_S = 30.0


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(story(), 2 * LONG_S)

    asyncio.run(bounded())


async def woken(waker: Wakers) -> bool:
    began = time.monotonic()
    await waker.wait(LONG_S)
    return time.monotonic() - began < LONG_S


def test_the_end_of_a_process_wakes_once_although_its_descriptor_stays_readable() -> None:
    async def story() -> None:
        waker = Wakers()
        process = subprocess.Popen(("sleep", "600"))
        fd = os.pidfd_open(process.pid)
        waker.watch_processes({fd: "i-1"})
        process.kill()
        assert await woken(waker)
        assert waker.ended == {"i-1"}
        process.wait()
        waker.ended.clear()
        waker.watch_processes({fd: "i-1"})
        await waker.wait(0.05)
        assert not waker.ended
        await waker.close()
        os.close(fd)

    run(story)


def test_one_that_is_no_longer_watched_wakes_nobody() -> None:
    async def story() -> None:
        waker = Wakers()
        out, end = os.pipe()
        waker.watch_processes({out: "i-1"})
        waker.watch_processes({})
        os.close(end)
        await waker.wait(0.05)
        assert not waker.ended
        os.close(out)

    run(story)


def test_the_end_of_one_that_was_over_when_the_loop_looked_is_passed_over() -> None:
    async def story() -> None:
        waker = Wakers()
        shim, leader = os.pipe(), os.pipe()
        waker.watch_processes({shim[0]: "over", leader[0]: "alive"})
        os.close(shim[1])
        assert not await waker.undisturbed(LONG_S)
        assert waker.ended == {"over"}
        waker.pass_over({"alive"})
        assert not waker.ended
        assert await waker.undisturbed(0.01)
        os.close(leader[1])
        assert not await waker.undisturbed(LONG_S)
        waker.pass_over({"alive"})
        assert waker.ended == {"alive"}
        assert await woken(waker), "what ended while the loop looked is news"
        await waker.close()
        os.close(shim[0])
        os.close(leader[0])

    run(story)


def test_whoever_else_woke_it_is_not_passed_over() -> None:
    async def story() -> None:
        waker = Wakers()
        waker.ended.add("over")
        waker.wake()
        waker.pass_over(())
        assert not await waker.undisturbed(LONG_S)
        assert not await waker.undisturbed(LONG_S), "who waits for quiet takes nobody's wake"
        assert await woken(waker)
        assert not await waker.wait(0.01)
        await waker.close()

    run(story)


def test_a_thread_that_outlives_the_loop_may_still_wake_it() -> None:
    kept: list[Wakers] = []

    async def story() -> None:
        kept.append(Wakers())
        await asyncio.to_thread(kept[0].wake_threadsafe)
        assert await woken(kept[0])

    run(story)
    kept[0].wake_threadsafe()


async def _edited(waker: Wakers, edit: Callable[[], object]) -> bool:
    """Whether an edit is noticed; it is made again until it is, since a watch begins at a moment of its own."""
    waker.files_changed = False
    end = time.monotonic() + LONG_S
    while not waker.files_changed and time.monotonic() < end:
        edit()
        await waker.wait(0.3)
    return waker.files_changed


def test_files_are_watched_in_the_folders_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the overlays' folder moves, appears later, or neither is there at first."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def paused(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(min(seconds, 0.01))

    monkeypatch.setattr(wakers.asyncio, "sleep", paused)
    files, overlays, others = (tmp_path / name for name in ("files", "overlays", "others"))
    folder: list[Path | None] = [overlays]

    async def story() -> None:
        waker = Wakers()
        waker.watch_files(files / "setpoints.yaml", lambda: folder[0])
        while not pauses:
            await sleep(0.01)
        files.mkdir()
        assert await _edited(waker, (files / "setpoints.yaml").touch)
        overlays.mkdir()
        (files / "setpoints.yaml").touch()
        others.mkdir()
        folder[0] = others

        def edit_both() -> None:
            (files / "setpoints.yaml").touch()  # what names the folder changed
            (others / "render.yaml").touch()

        assert await _edited(waker, edit_both)
        assert await _edited(waker, (others / "render.yaml").touch)
        folder[0] = None
        assert await _edited(waker, (files / "setpoints.yaml").touch)
        await waker.close()
        waker.files_changed = False
        (files / "setpoints.yaml").touch()
        await waker.wait(0.2)
        assert not waker.files_changed

    run(story)


def test_what_was_edited_before_files_are_watched_is_seen_by_one_more_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakers, "WATCHED_S", 0.01)

    async def story() -> None:
        waker = Wakers()
        for _ in range(2):
            waker.watch_files(tmp_path / "setpoints.yaml", lambda: None)
        assert await waker.wait(LONG_S)
        await waker.close()

    run(story)


@pytest.mark.parametrize("problem", [OSError(28, "no watch is left"), RuntimeError("no instance is left")])
def test_a_folder_that_cannot_be_watched_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    """Users have so many watches, and so many instances; watchfiles tells either in its own way."""
    import watchfiles

    real, tries = watchfiles.awatch, []

    def awatch(*paths: Path, **options: object) -> object:
        tries.append(paths)
        if len(tries) < 3:
            raise problem
        return real(*paths, **options)

    monkeypatch.setattr(watchfiles, "awatch", awatch)
    sleep = asyncio.sleep
    monkeypatch.setattr(wakers.asyncio, "sleep", lambda seconds: sleep(0.01))

    async def story() -> None:
        waker = Wakers()
        waker.watch_files(tmp_path / "setpoints.yaml", lambda: None)
        assert await _edited(waker, (tmp_path / "setpoints.yaml").touch)
        assert tries == [(tmp_path,)] * 3
        await waker.close()

    run(story)
