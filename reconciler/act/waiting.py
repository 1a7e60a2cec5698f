"""Waiting on the event loop for a descriptor: a process's end (pidfd) or a pipe."""

from __future__ import annotations

import asyncio
import select

from reconciler.clock import Clock


async def readable_within(fd: int, seconds: float, clock: Clock) -> bool:
    """Whether `fd` became readable within `seconds` (of `clock`). Cancelling it leaves nothing behind.

    A pidfd becomes readable when its process, all threads of it, has ended (pidfd_open(2)), and stays so.
    """
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def note() -> None:
        loop.remove_reader(fd)  # it stays readable, and would be reported in every turn of the loop
        readable.set_result(None)

    loop.add_reader(fd, note)
    timer = asyncio.ensure_future(clock.sleep(max(0.0, seconds)))
    try:
        await asyncio.wait({readable, timer}, return_when=asyncio.FIRST_COMPLETED)
        return readable.done() or _is_readable(fd)  # time may have been up before the loop looked at the descriptor
    finally:
        loop.remove_reader(fd)
        timer.cancel()


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
