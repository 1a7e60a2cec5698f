"""Bounded logs, with real programs that write them while no daemon runs."""

from __future__ import annotations

import re
from pathlib import Path

from nursery import Argv, Nursery, program, until

from reconciler.act.process import ProcessActor
from reconciler.cli.output_files import Tail, last_lines, outputs_of
from reconciler.clock import SystemClock
from reconciler.identity import boot_id

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


def start(nursery: Nursery, argv: Argv) -> tuple[str, Path]:
    """A started incarnation whose log is bounded to `KEPT`, and that log; its starter is gone on return."""
    launch = nursery.launch(argv)
    actor = ProcessActor(nursery.state, SystemClock(), boot_id(), log_bytes=KEPT)
    nursery.actors.append(actor)
    nursery.run(actor.ensure_started(launch))
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
    until(lambda: on_disk(path) <= KEPT + KEPT // 4 + (128 << 10), "the log to be within its bound")
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
