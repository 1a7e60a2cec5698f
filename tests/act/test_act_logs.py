"""Bounded logs, with real programs that write them while no daemon runs."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from nursery import Argv, Nursery, OpenLog, is_running, program, until

from reconciler.act import shim
from reconciler.cli.output_files import Tail, last_lines, outputs_of
from reconciler.journal.incarnations import write_intent

KEPT = 512 << 10
LINE = 100
"""Bytes of each numbered line."""


def counting(first: int, count: int, *, pause_s: float = 0.0) -> Argv:
    """Writes numbered lines in pieces of 1,000, some of them split over two writes, and ends with 0."""
    return program(f"""
for start in range({first}, {first + count}, 1000):
    text = b''.join(b'%0{LINE - 1}d\\n' % n for n in range(start, start + 1000))
    for piece in (text[:777], text[777:]):
        while piece:
            piece = piece[os.write(1, piece):]
    time.sleep({pause_s})
""")


def start(nursery: Nursery, argv: Argv, keep: int = KEPT) -> tuple[str, Path]:
    """A started incarnation whose log is bounded to `keep`, and that log; nothing of its starter is left on return."""
    launch = nursery.launch(argv, log_bytes=keep)
    actor = nursery.actor()
    nursery.run(actor.ensure_started(launch))
    actor.close()
    return launch.incarnation, outputs_of(nursery.state, "thinking")[-1].path


def numbers(text: bytes) -> list[int]:
    """The numbered lines in it; anything else is an error."""
    lines = text.splitlines()
    assert all(re.fullmatch(rb"\d{%d}" % (LINE - 1), line) for line in lines), [
        line for line in lines if len(line) != 99
    ]
    return [int(line) for line in lines]


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_flood_is_not_held_up_and_leaves_its_end_in_one_piece_within_the_bound(nursery: Nursery) -> None:
    incarnation, path = start(nursery, counting(0, 200_000))
    assert nursery.exit_code(incarnation) == 0
    until(lambda: not is_running(nursery.run_record(incarnation).shim_pid), "the shim's last look")
    assert on_disk(path) <= KEPT + KEPT // 4 + (128 << 10)
    assert path.stat().st_size == 200_000 * LINE
    kept = numbers(last_lines(path, 1_000_000))
    assert kept == list(range(200_000 - len(kept), 200_000))
    assert len(kept) * LINE >= KEPT - LINE
    assert numbers(last_lines(path, 3)) == [199_997, 199_998, 199_999]
    assert numbers(b"".join(Tail(nursery.state, "thinking").new())) == kept


def test_a_follower_finds_every_line_exactly_once_over_trims_and_a_restart(nursery: Nursery) -> None:
    tail, seen = Tail(nursery.state, "thinking"), bytearray()

    def follow(incarnation: str) -> bool:
        ended = nursery.records(incarnation).exit is not None  # looked at first: what was written before is then read
        for block in tail.new():
            seen.extend(block)
        return ended

    for first in (0, 20_000):
        incarnation, path = start(nursery, counting(first, 20_000, pause_s=0.1))
        until(lambda i=incarnation: follow(i), "the writer to end")
        assert nursery.exit_code(incarnation) == 0
        until(lambda p=path: on_disk(p) <= KEPT + KEPT // 4 + (128 << 10), "the log to be within its bound")
    assert numbers(bytes(seen)) == list(range(40_000))


PACED = program("""
time.sleep(0.3)
text, begin = b'x' * 99_999 + b'\\n', time.monotonic()
for done in range(1500):
    os.write(1, text)
    time.sleep(max(0.0, begin + done / 1000 - time.monotonic()))
time.sleep(0.3)
""")
"""Out of silence 100 MB/s for a second and a half."""


def test_a_burst_out_of_silence_exceeds_the_bound_by_what_a_moment_brings(nursery: Nursery) -> None:
    """What 0.3 s bring; it takes some 10 ms. If a box is so busy that the shim waits longer, another burst is seen."""
    keep, seen = 1 << 20, []
    while not seen or (seen[-1] > keep + keep // 4 + 30_000_000 and len(seen) < 6):
        incarnation, path = start(nursery, PACED, keep)
        most = 0
        while nursery.records(incarnation).exit is None:
            most = max(most, on_disk(path))
            time.sleep(0.002)
        seen.append(most)
        assert path.stat().st_size == 150_000_000
        until(lambda p=path: on_disk(p) <= keep + keep // 4 + (128 << 10), "the log to be within its bound")
    assert seen[-1] <= keep + keep // 4 + 30_000_000, seen


def descriptors(pid: int) -> list[str]:
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def test_in_silence_a_shim_waits_without_a_limit_and_wakes_up_for_a_line(nursery: Nursery, tmp_path: Path) -> None:
    said = tmp_path / "say"
    incarnation, _ = start(nursery, program(f"while not os.path.exists({str(said)!r}): time.sleep(0.005)\nsay('x')"))
    shim = nursery.run_record(incarnation).shim_pid
    until(lambda: "anon_inode:inotify" in descriptors(shim), "the shim to watch the log")

    def waits_without_limit() -> bool:
        """Third argument of rt_sigtimedwait(2), the only call of four arguments that it sleeps in."""
        try:
            words = Path(f"/proc/{shim}/syscall").read_text().split()
        except PermissionError:
            pytest.skip("system calls of others may not be looked at here")
        return words[0] != "running" and words[3:5] == ["0x0", "0x8"]

    until(waits_without_limit, "the shim to wait")
    said.touch()
    assert nursery.exit_code(incarnation) == 0


def test_no_more_than_a_quarter_of_the_users_watches_is_taken_and_the_rest_goes_by_the_clock(nursery: Nursery) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    for number in range(min(most // 4, 4096)):
        (nursery.state.run / f"another-{number}").mkdir()
    incarnation, path = start(nursery, counting(0, 30_000, pause_s=0.05))
    assert "anon_inode:inotify" not in descriptors(nursery.run_record(incarnation).shim_pid)
    assert nursery.exit_code(incarnation) == 0
    until(lambda: on_disk(path) <= KEPT + KEPT // 4 + (128 << 10), "the log to be within its bound")
    kept = numbers(last_lines(path, 1_000_000))
    assert kept == list(range(30_000 - len(kept), 30_000))
    assert len(kept) * LINE >= KEPT - LINE


FLOODING = program("""
text, begin = (b'x' * 99 + b'\\n') * 100, time.monotonic()
for _ in range(10_000):
    os.write(1, text)
took = time.monotonic() - begin
open(sys.argv[1], 'w').write(str(took))
""")
"""100 MB in writes of 10 kB, as fast as they go; how long that took is left in a file."""


def test_a_flood_is_written_about_as_fast_as_into_a_bare_file(nursery: Nursery, tmp_path: Path) -> None:
    """The best of some rounds each, in turn, as many as it takes: the box may be busy."""

    def bare() -> float:
        with (tmp_path / "bare").open("ab") as file:
            subprocess.run((*FLOODING, str(tmp_path / "took")), stdout=file, check=True)
        (tmp_path / "bare").unlink()
        return float((tmp_path / "took").read_text())

    def logged() -> float:
        incarnation, _ = start(nursery, (*FLOODING, str(tmp_path / "took")), 1 << 20)
        assert nursery.exit_code(incarnation) == 0
        return float((tmp_path / "took").read_text())

    rounds: list[tuple[float, float]] = []
    floor, ours = 0.0, 1.0
    while ours > 3 * floor + 0.05 and len(rounds) < 12:
        rounds.append((bare(), logged()))
        floor, ours = (min(times) for times in zip(*rounds, strict=True))
    assert ours <= 3 * floor + 0.05, rounds


def test_a_log_that_was_cut_off_by_hand_is_bounded_as_before(tmp_path: Path, open_log: OpenLog) -> None:
    """As by `truncate` or logrotate's copytruncate, after far more than its bound was written."""
    path = tmp_path / "log"
    log = open_log(path)
    punched = 0
    for _ in range(2):
        for _ in range(200):
            os.write(log, b"x" * (64 << 10))
            punched = shim.trim_log(punched, KEPT)
            assert on_disk(path) <= KEPT + KEPT // 4 + (128 << 10)
        os.truncate(path, 0)


def test_a_log_that_cannot_be_shortened_in_front_is_cut_off_and_keeps_its_end_in_one_piece(
    nursery: Nursery, tmp_path: Path, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on 9p, FAT or NFS before 4.2, where no holes can be punched; a follower goes on behind the cut."""
    path = tmp_path / "log"
    log = open_log(path)
    monkeypatch.setattr(shim, "punch_hole", lambda *_: errno.EOPNOTSUPP)
    intent = nursery.actor()._intent(nursery.launch(("true",)), None)
    write_intent(nursery.state, replace(intent, log=str(path)))
    tail, seen = Tail(nursery.state, "thinking"), bytearray()
    punched = 0
    for number in range(40_000):
        os.write(log, b"%099d\n" % number)
        punched = shim.trim_log(punched, KEPT)
        assert path.stat().st_size <= KEPT + KEPT // 4 + LINE
        if number % 1000 == 0:
            for block in tail.new():
                seen.extend(block)
    said, *lines = path.read_bytes().splitlines(keepends=True)
    assert said.startswith(b"reconciler: what stood here was cut off")
    kept = numbers(b"".join(lines))
    assert kept == list(range(40_000 - len(kept), 40_000))
    for block in tail.new():
        seen.extend(block)
    followed = [int(line) for line in bytes(seen).splitlines() if not line.startswith(b"reconciler")]
    assert followed == sorted(set(followed)), "no line twice"
    assert followed[-1] == 39_999


def test_a_disk_that_is_full_for_a_moment_cuts_nothing_off(
    tmp_path: Path, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "log")
    monkeypatch.setattr(shim, "punch_hole", lambda *_: errno.ENOSPC)
    os.write(log, b"x" * (2 * KEPT))
    assert shim.trim_log(0, KEPT) == 0
    assert os.fstat(log).st_size == 2 * KEPT
