"""Following a folder: woken by what counts, and by patience where nothing tells."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
from watchfiles._rust_notify import WatchfilesRustInternalError

from reconciler.cli import waiting
from reconciler.cli.waiting import changes, while_read

LONG_S = 60.0


def test_a_file_that_counts_ends_the_wait_and_another_does_not(tmp_path: Path) -> None:
    follow = changes(tmp_path, ".log", patience_s=LONG_S)
    next(follow)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool, (tmp_path / "chat.log").open("w") as log:
        told = pool.submit(next, follow)
        while not told.done():  # again and again: when it begins to follow is its own affair
            log.write("line\n")
            log.flush()
            time.sleep(0.01)
        assert told.result() is None
    assert time.monotonic() - began < LONG_S
    follow.close()


def test_a_file_that_does_not_count_is_waited_over(tmp_path: Path) -> None:
    follow = changes(tmp_path, ".log", patience_s=0.2)
    next(follow)
    next(follow)
    (tmp_path / "journal.sqlite").touch()
    began = time.monotonic()
    next(follow)
    assert time.monotonic() - began >= 0.2
    follow.close()


def test_a_folder_that_comes_later_is_followed(tmp_path: Path) -> None:
    follow = changes(tmp_path / "logs", ".log", patience_s=0.05)
    next(follow)
    next(follow)
    (tmp_path / "logs").mkdir()
    next(follow)
    follow.close()


def test_where_nothing_can_be_watched_patience_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the user's inotify instances are used up, which watchfiles tells as an error of its own."""

    def watch(*_: object, **__: object) -> NoReturn:
        raise WatchfilesRustInternalError("Too many open files (os error 24)")

    monkeypatch.setattr(waiting, "watch", watch)
    follow = changes(tmp_path, ".log", patience_s=0.05)
    next(follow)
    for _ in range(2):
        began = time.monotonic()
        next(follow)
        assert time.monotonic() - began >= 0.05
    follow.close()


def test_who_follows_ends_once_nobody_reads_it_though_it_has_nothing_to_write(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    follow = while_read(changes(tmp_path, ".log", patience_s=0.05), writes)
    next(follow)
    next(follow)
    os.close(reads)
    with pytest.raises(BrokenPipeError):
        next(follow)
    os.close(writes)


def test_a_file_is_always_read(tmp_path: Path) -> None:
    with (tmp_path / "kept").open("w") as file:
        follow = while_read(changes(tmp_path, ".log", patience_s=0.05), file.fileno())
        for _ in range(3):
            next(follow)
        follow.close()
