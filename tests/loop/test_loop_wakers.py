"""The loop is woken by what happened, once for each, and by nothing after it was closed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from reconciler.inotify import Notes
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
        assert waker.process_ended
        process.wait()
        waker.process_ended = False
        waker.watch_processes({fd: "i-1"})
        await waker.wait(0.05)
        assert not waker.process_ended
        waker.close()
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
        assert not waker.process_ended
        os.close(out)

    run(story)


def test_a_thread_that_outlives_the_loop_may_still_wake_it() -> None:
    kept: list[Wakers] = []

    async def story() -> None:
        kept.append(Wakers())
        await asyncio.to_thread(kept[0].wake_threadsafe)
        assert await woken(kept[0])

    run(story)
    kept[0].wake_threadsafe()


def test_a_burst_of_edits_wakes_once_it_is_over(tmp_path: Path) -> None:
    async def story() -> None:
        waker = Wakers()
        waker.files_changed = False
        assert waker.watch_folders({tmp_path})
        for number in range(3):
            (tmp_path / f"{number}.yaml").write_text("")
        assert await woken(waker)
        assert waker.files_changed
        await waker.wait(3 * wakers.BURST_S)
        waker.files_changed = False
        assert not await waker.wait(0.05)
        waker.close()

    run(story)


def test_a_burst_that_does_not_end_is_told_all_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        waker = Wakers()
        waker.watch_folders({tmp_path})

        async def scribble() -> None:
            while True:
                (tmp_path / "setpoints.yaml").touch()
                await asyncio.sleep(wakers.QUIET_S / 10)

        scribbling = asyncio.create_task(scribble())
        assert await woken(waker)
        scribbling.cancel()
        waker.close()

    run(story)


def test_a_folder_is_news_once_and_is_tried_again_until_it_is_there(tmp_path: Path) -> None:
    files, overlays, others = (tmp_path / name for name in ("files", "overlays", "others"))

    async def story() -> None:
        waker = Wakers()
        assert not waker.watch_folders({files, overlays})
        files.mkdir()
        assert waker.watch_folders({files, overlays})
        assert not waker.watch_folders({files, overlays})
        others.mkdir()
        assert waker.watch_folders({files, others})
        (others / "render.yaml").touch()
        assert await woken(waker)
        assert not waker.watch_folders({files})
        await waker.wait(3 * wakers.BURST_S)
        (others / "render.yaml").touch()
        assert not await waker.wait(3 * wakers.BURST_S), "nobody is told of a folder that counts no more"
        (files / "setpoints.yaml").touch()
        assert await woken(waker)
        waker.close()
        waker.files_changed = False
        (files / "setpoints.yaml").touch()
        await waker.wait(0.1)
        assert not waker.files_changed

    run(story)


def test_without_an_inotify_instance_it_is_tried_again_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_up(_: int) -> Notes:
        raise OSError(24, "too many open files: the user's instances are used up")

    async def story() -> None:
        waker = Wakers()
        with monkeypatch.context() as patched:
            patched.setattr(wakers, "Notes", used_up)
            assert not waker.watch_folders({tmp_path})
        assert waker.watch_folders({tmp_path})
        (tmp_path / "setpoints.yaml").touch()
        assert await woken(waker)
        waker.close()

    run(story)


def test_closing_in_the_middle_of_a_burst_wakes_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        waker = Wakers()
        waker.watch_folders({tmp_path})
        (tmp_path / "setpoints.yaml").touch()
        while waker._burst is None:
            await asyncio.sleep(0)
        waker.files_changed = False
        waker.close()
        assert not await waker.wait(3 * wakers.BURST_S)
        assert not waker.files_changed

    run(story)
