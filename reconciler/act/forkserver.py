"""The process that forks shims: warm, so that a start costs a fork and not the start of an interpreter."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_CLOSE_S = 1.0
"""How long one may take for what it was handed, milliseconds each; longer takes one that is stopped."""
_SHIM = Path(__file__).resolve().with_name("shim.py")


class ForkServer:
    """One process of `shim.py` that forks a shim whenever it is asked to; its shims share its pages.

    It lives as long as its daemon: it ends by itself once nobody holds the other end of its socket, also after
    `kill -9`. Shims do not need it: killed or replaced at any moment, it takes none of them along.
    """

    def __init__(self, open_files: int | None = None) -> None:
        """With `open_files`, the soft limit of descriptors for what is started; None: this process's own."""
        self._limits = () if open_files is None else (str(open_files),)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        return self._process.pid if self._process is not None else None

    def open(self) -> None:
        """Start it, unless it runs. Returns at once; it is warm some 20 ms later.

        Raises:
            OSError: it cannot be started.
        """
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self._process is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    (sys.executable, "-I", "-S", str(_SHIM), str(theirs.fileno()), *self._limits),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # an interpreter may need its library path; all else would stand in the shims' environ for years
                    env={name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.settimeout(0.0)  # one that is stopped must not stop its daemon
        self._control = ours

    def announce(self, group: str | None) -> None:
        """Say that an order follows in a moment, so that what needs no order is done meanwhile, beside the caller.

        `group` is the control group that its leader will be born in; it is made by the shim.
        """
        with suppress(OSError):  # it comes as a surprise then
            if self._control is not None:
                self._control.send(b"?" + os.fsencode(group or ""))

    def fork_shim(self, order: int, lock: int, ready: int, go: int) -> bool:
        """Have a shim forked that gets these descriptors; the caller closes its own. Nobody waits here.

        A server that has died meanwhile is replaced: what could not be handed over was not begun. False: there is no
        room for one more at the moment, on its socket or, without privileges, for descriptors under way (unix(7)).

        Raises:
            OSError: nobody took them.
        """
        try:
            try:
                self._send(order, lock, ready, go)
            except (BrokenPipeError, ConnectionResetError):
                self.kill()
                self._send(order, lock, ready, go)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ETOOMANYREFS) and self._process is not None:
                return False
            raise
        return True

    def _send(self, *fds: int) -> None:
        self.open()
        assert self._control is not None  # noqa: S101 - for the type checker: that is what `open` is for
        socket.send_fds(self._control, [b"+"], fds)

    def close(self) -> None:
        """End it once it has begun all that it was handed."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """End it, whatever it does: what it was handed and did not begin is dropped, and the locks with it."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None
