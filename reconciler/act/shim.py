# ruff: noqa: PTH102, PTH106, PTH116, PTH118, PTH123, PTH208, SIM105
"""The parent of one leader: starts it, records how it ends, and stays while any descendant lives.

Run as `python -I -S shim.py CONTROL_FD [OPEN_FILES]`, by absolute path: it imports nothing of this package, and nothing
after its start, so an upgrade underneath it does no harm. That process only forks: one shim, in a session of its own,
for each order on the socket CONTROL_FD, until the other end is closed. With nothing to do it forks the next one in
advance, which takes the next order from the socket itself. OPEN_FILES: the soft limit of descriptors for all of them.
One shim is alive per incarnation, and shares what it does not change with all others; hence no json, enum, pathlib or
subprocess, which would be paid for by each.

A message with four descriptors is an order. One without, a byte and the name of a control group, announces it: who
waits in advance forks the leader meanwhile.

order       fields separated by NUL: records' folder, boot id, log file, bytes of it to keep, whether its end is to
            outlive a power cut (empty: no), control group to join (empty: none), working directory, whom to run as
            (uid, gid and groups; empty: as this process), number of arguments, the arguments, then the environment as
            NAME=VALUE. Memory without a name: secrets touch no disk.
lock        an flock of the subject, held by being open here until the last descendant ended.
ready       closed once the leader's program runs, or it is recorded that it cannot; text in it says why neither is so.
go          at its end once the program may begin: of many starts at once none does before all of them are handed over.

Sequence, so that a kill at any point leaves the truth behind: the child is forked and waits at a gate; `run.json` is
written; once `go` is at its end, also because the daemon died, the gate opens; the child executes the program. A shim
killed before that closes the gate, and the child ends without having run anything, after it took `run.json` back.

The log is bounded here, since this process lives exactly as long as anything that writes to it, with or without a
daemon: the oldest part is given back to the disk (a hole is punched into the file), nothing is moved. What is kept is
the end of the file in one piece, so no line of it is lost or doubled, whenever anybody is killed. The kernel tells when
something was written (inotify, by SIGIO), so nothing is looked at in silence, and little is missed after it.
"""

from __future__ import annotations

# the signal module without its enums, which cost a third of the start time
import _signal  # type: ignore[import-not-found] # CPython's own; typeshed knows only `signal`
import _socket  # the same for sockets
import ctypes
import errno
import fcntl
import gc
import os
import select
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_CLONE3, _CLONE_INTO_CGROUP = 435, 1 << 33  # the number is the same on every architecture
_IGNORED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)
_GIVEN, _FORWARDED = 4, 5  # descriptors with an order: order, lock, ready, go; and at the gate: see become_leader
_NAME = b"reconciler-shim"  # as ps shows it, at most 15 bytes
_FIELDS = 8  # of an order, before the number of arguments
_LONGEST_PATH, _LONGEST_REASON = 1 << 12, 1 << 14  # bytes
_ANNOUNCED_S = 1.0  # an order follows within milliseconds, or does not: its port was taken, say
_CALM_S = 0.05  # nobody asks for so long: time to fork the next one in advance, the last is through with its start
_FIRST_STEPS_S = 0.03  # nobody is in the way of a program that begins, on a small box not even who watches its log
_PAUSE_S = 0.2  # before that is tried again where it failed, or was killed
_UMASK = 0o022  # systemd's default
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as shells have it
_LOG = 2  # stderr is the log
_PUNCH_HOLE = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_BLOCK = 64 << 10  # no file system has larger blocks; only whole ones are given back
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM)  # and will not at another time
_IN_MODIFY = 2
_WAKERS = (_signal.SIGCHLD, _signal.SIGIO)
# The log is looked at so long after it was written to, 0.13 ms of CPU each time: bytes to keep at the speed of a flood
# (bytes/s), within these limits. So a program that writes as fast as that exceeds the bound by what is kept at most.
_FLOOD, _LEAST_PAUSE_S, _MOST_PAUSE_S = 1 << 30, 0.01, 0.05
_SILENT_LOOK_S = 4.0  # where nothing tells of writes, and nothing is written
_libc, _libc_with_gil = ctypes.CDLL(None, use_errno=True), ctypes.PyDLL(None, use_errno=True)
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_offset_ns: int | None = None
Leader = tuple[int, _socket.socket, bytes]
"""A process that waits to become the program: its pid, the gate that it waits at, its control group."""
# Between two tries to record an end on a disk that is full, say: first and longest, they double.
_RETRY_S, _MOST_RETRY_S = 1.0, 10.0
_NOBODY_READS = (errno.ENOENT, errno.ESTALE)  # the folder of the records was removed


def main() -> int:
    """Fork a shim for each message, until nobody can send one any more."""
    control = _socket.socket(fileno=os.dup(int(sys.argv[1])))  # the least number: select(2) knows no large ones
    os.close(int(sys.argv[1]))
    if len(sys.argv) > 2:  # the daemon itself has a higher one
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # nobody waits for shims: the kernel collects them
    ignore_polite_signals()
    set_process(_PR_SET_PDEATHSIG, _signal.SIGCONT)  # stopped, it would keep what it was handed for ever, locks as well
    set_process(_PR_SET_NAME, ctypes.c_char_p(b"reconciler-fork"))
    boottime_offset()
    gc.disable()
    gc.freeze()  # a collection would write to every object, and end the sharing of its page
    spare, calm_s = None, _CALM_S
    while True:
        if spare is not None:
            either = select.poll()
            either.register(spare, select.POLLIN)
            either.register(control, 0)  # its end alone: what is sent meanwhile is not for this process
            either.poll()
            if not select.select([spare], [], [], _ANNOUNCED_S)[0]:
                return 0  # nobody sends any more, and it hangs: it ends with this
            calm_s, spare = _CALM_S if spare.recv(1) else _PAUSE_S, None  # it has an order; or it was killed
        elif select.select([control], [], [], calm_s)[0]:
            message, descriptors = receive(control)
            if not message:
                return 0
            if len(descriptors) == _GIVEN:
                fork_shim(control, descriptors)
            for fd in descriptors:
                os.close(fd)
            calm_s = _CALM_S
        else:
            spare, calm_s = fork_shim(control, []), _PAUSE_S


def receive(source: _socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; empty once the other end is closed."""
    message, beside, _, _ = source.recvmsg(_LONGEST_PATH, _socket.CMSG_SPACE(_FORWARDED * 4), _socket.MSG_CMSG_CLOEXEC)
    found: list[int] = []
    for level, kind, data in beside:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            found += [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data) // 4 * 4, 4)]
    return message, found


def fork_shim(control: _socket.socket, descriptors: list[int]) -> _socket.socket | None:
    """One shim, in a session of its own, with these descriptors; without any it takes the next ones from `control`.

    Then it says so at the answer. None: it cannot be forked, of which the starter was told.
    """
    server = os.getpid()
    try:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        shim = os.fork()
    except OSError as error:
        if descriptors:
            os.write(descriptors[2], f"it cannot be forked: {error}".encode())
        return None
    if shim != 0:
        return ours
    code = 1
    try:
        if not descriptors:
            set_process(_PR_SET_PDEATHSIG, _signal.SIGKILL)
        ours.close()
        os.setsid()
        become_reaper()
        own, leader = own_identity(), None
        if not descriptors:
            descriptors, leader = wait_in_advance(control, server)
            if descriptors:
                theirs.send(b"+")
        control.close()
        theirs.close()
        if descriptors:
            set_process(_PR_SET_NAME, ctypes.c_char_p(_NAME))
            code = supervise(own, leader, *descriptors)
    finally:
        os._exit(code)


def wait_in_advance(control: _socket.socket, server: int) -> tuple[list[int], Leader | None]:
    """The next order, and its leader if it was announced; no order once nobody can send one any more.

    Until it has one a shim ends with the server, however it may hang: what was sent and not taken is dropped with it.
    """
    leader: Leader | None = None
    if os.getppid() != server:  # it died before this asked to be told
        return [], None
    while True:
        if leader is not None and not select.select([control], [], [], _ANNOUNCED_S)[0]:
            dismiss(leader)  # forked so long before its order, a program would look older than it is
            leader = None
        message, descriptors = receive(control)
        if len(descriptors) == _GIVEN:
            set_process(_PR_SET_PDEATHSIG, 0)
            return descriptors, leader
        for fd in descriptors:
            os.close(fd)
        if leader is not None:
            dismiss(leader)
        if not message:
            return [], None
        set_process(_PR_SET_NAME, ctypes.c_char_p(_NAME))
        leader = fork_leader(message[1:], [])


def own_identity() -> str:
    """Who this shim is, as its part of the run record."""
    own, namespace = os.getpid(), os.stat("/proc/self/ns/pid").st_ino
    return f'"pid_namespace":{namespace},"shim_pid":{own},"shim_start_ticks":{start_ticks(own)}'


def supervise(own: str, forked: Leader | None, order: int, lock: int, ready: int, go: int) -> int:
    """Start the leader, say so, stay; let go of the lock at the end, since the kernel takes its time over the rest."""
    try:
        leader, folder_fd, log_bytes, durable, unrecorded = start(own, forked, order, lock, ready, go)
    except Exception as error:  # noqa: BLE001 - the starter is told, whatever it is
        os.write(ready, f"{type(error).__name__}: {error}".encode())
        return 1
    os.close(ready)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _WAKERS)  # blocked, they stay pending until waited for
    _signal.sigtimedwait((_signal.SIGCHLD,), _FIRST_STEPS_S)
    watch(leader, folder_fd, log_bytes, ask_for_notes(folder_fd), unrecorded, durable=durable)
    os.close(lock)
    return 0


def start(
    own: str, forked: Leader | None, order: int, lock: int, ready: int, go: int
) -> tuple[int, int, int, bool, str]:
    """Carry out the order, the program's begin as soon as `go` is at its end; `own` is who this is.

    The answer: the leader's pid, the folder its end is recorded in, bytes of its log to keep, whether its end is to
    outlive a power cut, and its end itself if there is one that could not be recorded yet.
    """
    (folder, boot_id, log, log_bytes, durable, group, *_), _, _ = read_order(order)
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(log_fd, 0o600)
    os.dup2(log_fd, _LOG)  # from here on own tracebacks reach it

    forwarded = [order, lock, ready, folder_fd, log_fd]
    if forked is not None and forked[2] != group:
        dismiss(forked)  # it was announced for another start, which was then refused
        forked = None
    if forked is not None:
        try:
            words = b"".join(fd.to_bytes(4, sys.byteorder) for fd in forwarded)
            forked[1].sendmsg([b"+"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, words)])
        except OSError:  # it was killed
            forked = None
    leader, gate, _ = forked or fork_leader(group, forwarded)
    os.close(order)
    write_record(
        folder_fd,
        "run.json",
        f'{{"at":{now()},"boot_id":{quoted(boot_id.decode())},"pid":{leader},{own},'
        f'"session_id":{leader},"start_ticks":{start_ticks(leader)}}}',
        durable=False,
    )
    os.read(go, 1)
    os.close(go)
    try:
        gate.send(b"1")
        failure = gate.recv(_LONGEST_REASON)  # empty once the program is executed: the other end is closed by that
    except ConnectionError:
        failure = b""  # it was killed at the gate: an end like any other, collected and recorded below
    gate.close()
    unrecorded = ""
    if failure:
        code, _, error = failure.decode(errors="replace").partition(" ")
        os.waitpid(leader, 0)
        text = f'{{"at":{now()},"error":{quoted(error)},"exit_code":{int(code)}}}'
        unrecorded = record_exit(folder_fd, text, durable=bool(durable))
    return leader, folder_fd, int(log_bytes), bool(durable), unrecorded


def read_order(order: int) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Its fields up to the number of arguments, the arguments, the environment."""
    fields = os.pread(order, os.fstat(order).st_size, 0).split(b"\0")
    end = _FIELDS + 1 + int(fields[_FIELDS])
    return fields[:_FIELDS], fields[_FIELDS + 1 : end], fields[end:]


def fork_leader(group: bytes, descriptors: list[int]) -> Leader:
    """The leader, which has these descriptors (see `become_leader`) or, without any, waits for them at its gate."""
    try:
        os.mkdir(group, 0o755)
    except OSError:  # without a name, there is to be none; else the leader tells of it
        pass
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    leader, born_in_group = fork_into(group)
    if leader == 0:
        ours.close()
        become_leader(theirs, descriptors, born_in_group=born_in_group)
    theirs.close()
    return leader, ours, group


def dismiss(forked: Leader) -> None:
    """Let go of a leader that has nothing to do, and of its group."""
    leader, _, group = forked
    os.kill(leader, _signal.SIGKILL)  # it has nothing to put away, and may be stopped
    os.waitpid(leader, 0)
    try:
        os.rmdir(group)
    except OSError:  # there is none, or it had been there before
        pass


def fork_into(group: bytes) -> tuple[int, bool]:
    """As os.fork, into the control group if the kernel can (CLONE_INTO_CGROUP, Linux 5.7); whether it did.

    To move there afterwards is to wait for the whole kernel, 5 to 20 ms (a grace period of RCU). What os.fork does
    besides is for threads, of which a shim has none; the GIL stays held over the call, by the child as well (PyDLL).
    """
    if group:
        try:
            folder = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return os.fork(), False
        # clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, its size, tls, set_tid, its size, cgroup
        clone_args = (ctypes.c_uint64 * 11)(_CLONE_INTO_CGROUP, 0, 0, 0, _signal.SIGCHLD, 0, 0, 0, 0, 0, folder)
        leader = int(_libc_with_gil.syscall(_CLONE3, clone_args, ctypes.sizeof(clone_args)))
        os.close(folder)
        if leader >= 0:
            return leader, True
    return os.fork(), False


def become_reaper() -> None:
    """Outlive what ends others, and adopt every orphan below."""
    os.chdir("/")
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)  # ignored, it would swallow exit statuses
    ignore_polite_signals()
    set_process(_PR_SET_CHILD_SUBREAPER, 1)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def ignore_polite_signals() -> None:
    """Only SIGKILL ends what keeps records of others."""
    for number in _IGNORED:
        _signal.signal(number, _signal.SIG_IGN)


def set_process(what: int, value: int | ctypes.c_char_p) -> None:
    """One prctl(2) of one argument."""
    if _libc.prctl(what, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({what})")


def become_leader(gate: _socket.socket, descriptors: list[int], *, born_in_group: bool) -> None:
    """In the child: own session and group, default signals, wait for the gate, become the program. Never returns.

    `descriptors`: the order, the subject's lock and `ready`, both only held, the records' folder, the log.

    What it makes others may read and not write, unless the daemon is stricter (`UMask=`): so it is under systemd.

    A gate that closes means that the shim was killed. Its record of the run, if it came to that, is taken back while
    the lock is still held here: what is left then says *never started*, as it was.
    """
    code, error, argv = _NOT_EXECUTABLE, "", [b""]
    try:
        set_process(_PR_SET_PDEATHSIG, _signal.SIGCONT)  # stopped, it would not see that the gate is closed
        os.setsid()
        os.umask(os.umask(_UMASK) | _UMASK)
        for number in range(1, _signal.NSIG):
            if _signal.getsignal(number) == _signal.SIG_IGN:  # all that an exec leaves as it is
                _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        given = descriptors or receive(gate)[1]
        if len(given) < _FORWARDED:  # the gate was closed
            return
        order, _, _, folder_fd, log_fd = given
        (*_, group, cwd, user), argv, environment = read_order(order)
        for fd in (1, _LOG):  # stdin is /dev/null already; everything else closes on exec
            os.dup2(log_fd, fd)
        join_group(b"" if born_in_group else group)  # before the gate opens: the record is written meanwhile
        if gate.recv(1) == b"1":
            set_process(_PR_SET_PDEATHSIG, 0)
            become_user(user)
            os.chdir(cwd)  # as that user: it need not reach what root may
            execute(argv, dict(entry.partition(b"=")[::2] for entry in environment))
        elif "run.json" in os.listdir(folder_fd):
            os.unlink("run.json", dir_fd=folder_fd)
    except FileNotFoundError as problem:
        code, error = _NOT_FOUND, f"{os.fsdecode(problem.filename)}: {problem.strerror}"
    except OSError as problem:
        error = f"{os.fsdecode(problem.filename or argv[0])}: {problem.strerror}"
    except BaseException as problem:  # noqa: BLE001 - a copy of the shim must not go on as one
        error = f"{type(problem).__name__}: {problem}"
    finally:
        if error:
            gate.send(f"{code} {error}".encode(errors="replace")[:_LONGEST_REASON])
            os.write(_LOG, f"reconciler: it could not be run: {error}\n".encode(errors="replace"))
        os._exit(code)


def join_group(group: bytes) -> None:
    """Enter the control group made for this incarnation. Without one it runs as well, and is followed less surely."""
    if not group:
        return
    try:
        fd = os.open(group + b"/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.write(fd, b"0")  # the writer itself
        os.close(fd)
    except OSError as problem:
        os.write(_LOG, f"reconciler: it has no control group of its own: {problem}\n".encode(errors="replace"))


def become_user(user: bytes) -> None:
    """Give up this user's rights for good, groups first: afterwards nobody may change them any more."""
    if not user:
        return
    uid, gid, *groups = map(int, user.split())
    try:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except PermissionError:
        raise OSError(1, "only root may run it as another user", "user") from None


def execute(argv: list[bytes], environment: dict[bytes, bytes]) -> None:
    """Execute along the PATH of the new environment (os.execvpe does the same, but imports `warnings` for it)."""
    program = argv[0]
    if b"/" in program:
        os.execve(program, argv, environment)  # noqa: S606 - that is the purpose
    denied: OSError | None = None
    for folder in environment.get(b"PATH", os.defpath.encode()).split(b":"):
        try:
            os.execve(os.path.join(folder, program), argv, environment)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as problem:
            denied = denied or problem
    raise denied or FileNotFoundError(2, "no such program on PATH", program)


def watch(leader: int, folder_fd: int, log_bytes: int, notes: int, unrecorded: str, *, durable: bool) -> None:
    """Collect every descendant that ends, record the leader's end, bound the log, return when nobody is left.

    `notes`: tells by SIGIO that the log was written to; negative: its size is looked at by the clock. `unrecorded`: an
    end that is not recorded yet. Nobody else knows of it, so as long as it is not, as on a full disk, this goes on.
    """
    pause = min(_MOST_PAUSE_S, max(_LEAST_PAUSE_S, log_bytes / _FLOOD))
    patience, seen, punched, retry = pause, 0, 0, _RETRY_S
    while True:
        is_left = True
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] == leader:
                    code = os.waitstatus_to_exitcode(ended[1])
                    unrecorded = f'{{"at":{now()},"error":null,"exit_code":{code}}}'
        except ChildProcessError:
            is_left = False
        if unrecorded:
            unrecorded, retry = record_exit(folder_fd, unrecorded, durable=durable), min(_MOST_RETRY_S, 2 * retry)
        punched = trim_log(punched, log_bytes)
        if not is_left and not unrecorded:
            say_over(folder_fd)
            return
        if notes >= 0:
            woken = _signal.sigtimedwait(_WAKERS, retry) if unrecorded else _signal.sigwaitinfo(_WAKERS)
            if woken is not None and woken.si_signo == _signal.SIGIO:
                _signal.sigtimedwait((_signal.SIGCHLD,), pause)  # one look for all that is written meanwhile
                forget_notes(notes)  # before the look: what is written after this is told anew
            continue
        size = os.fstat(_LOG).st_size
        patience, seen = pause if size != seen else min(_SILENT_LOOK_S, patience * 2), size
        _signal.sigtimedwait((_signal.SIGCHLD,), min(patience, retry) if unrecorded else patience)


def ask_for_notes(folder_fd: int) -> int:
    """Have SIGIO sent when the log was written to; the inotify descriptor, or -1: it cannot be, or is left to others.

    Each user has only so many instances (inotify(7)), 128 as a rule, which engines and editors want as well: no more
    than a quarter of them is taken.
    """
    try:
        with open("/proc/sys/fs/inotify/max_user_instances", "rb") as file:
            most = int(file.read())
        living = len(os.listdir(f"/proc/self/fd/{folder_fd}/.."))
        notes = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)) if living <= most // 4 else -1
        if notes >= 0 and _libc.inotify_add_watch(notes, b"/proc/self/fd/%d" % _LOG, _IN_MODIFY) >= 0:
            fcntl.fcntl(notes, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(notes, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
            return notes
    except (OSError, ValueError):
        pass
    return -1


def forget_notes(notes: int) -> None:
    """Read what is there: equal events are one while nobody reads it, and only a new one is signalled."""
    try:
        while os.read(notes, 4096):
            pass
    except BlockingIOError:
        pass


def say_over(folder_fd: int) -> None:
    """Leave word that no descendant is left, which the end of this process alone does not say: it may be killed."""
    try:
        os.close(os.open("over", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder_fd))
    except OSError:
        return  # whoever looks has to search all processes, and finds none


def trim_log(punched: int, keep: int) -> int:
    """Once the log has grown a quarter beyond `keep` bytes, give back what is older; up to where that was done.

    Where the file system cannot give back parts of a file (then -1), all of it is given back: what is kept is the end
    in one piece still, and the disk does not fill up.
    """
    size = os.fstat(_LOG).st_size
    if size < punched:  # cut off by hand: what comes now lies in front of where the hole ended
        punched = 0
    if size - max(punched, 0) <= keep + keep // 4:
        return punched
    end = (size - keep) // _BLOCK * _BLOCK
    if punched >= 0:
        if end <= punched:
            return punched
        problem = punch_hole(punched, end - punched)
        if problem == 0:
            return end
        if problem not in _CANNOT:
            return punched  # it may go better at the next look
    try:
        os.ftruncate(_LOG, 0)
        os.write(_LOG, b"reconciler: what stood here was cut off: this file system cannot shorten a file in front\n")
    except OSError:
        pass  # read-only by now, or full: nothing else can be done
    return -1


def punch_hole(start: int, length: int) -> int:
    """Give that part of the log back to the disk; 0, or the error's number."""
    done = _libc.fallocate(_LOG, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length))
    return 0 if done == 0 else ctypes.get_errno()


def record_exit(folder_fd: int, text: str, *, durable: bool) -> str:
    """Record the leader's end; what is still to be recorded, if it could not be and somebody may read it yet."""
    try:
        write_record(folder_fd, "exit.json", text, durable=durable)
    except OSError as problem:
        return "" if problem.errno in _NOBODY_READS else text
    return ""


def write_record(folder_fd: int, name: str, text: str, *, durable: bool) -> None:
    """Replace one record whole. By descriptor, so that it follows a folder that was moved."""
    temporary = f".{name}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600, dir_fd=folder_fd)
    try:
        os.fchmod(fd, 0o600)
        line = text.encode() + b"\n"
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, "the disk is full")
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    if durable:
        os.fsync(folder_fd)


def now() -> str:
    """This moment on both clocks, as JSON."""
    mono = time.clock_gettime(time.CLOCK_BOOTTIME) - boottime_offset() / 1e9
    return f'{{"mono":{mono!r},"wall":{time.time()!r}}}'


def boottime_offset() -> int:
    """Nanoseconds by which this time namespace is off: what is recorded is without that, as `boottime` has it."""
    global _offset_ns  # noqa: PLW0603 - read once, by the server, for all of its shims
    if _offset_ns is None:
        _offset_ns = 0
        try:
            if os.stat("/proc/self/ns/time").st_ino == 0xEFFFFFFA:  # the first one: the clocks are as they are
                return 0
            with open("/proc/self/timens_offsets", "rb") as file:
                lines = [line.split() for line in file]
        except FileNotFoundError:  # a kernel without time namespaces
            return 0
        for fields in lines:
            if fields[0] in (b"boottime", b"7"):
                _offset_ns = int(fields[1]) * 1_000_000_000 + int(fields[2])
    return _offset_ns


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat, counted after the last parenthesis, in ticks after the boot."""
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    line = os.read(fd, 4096)
    os.close(fd)
    shown_ticks, (offset, rest) = int(line[line.rindex(b")") + 2 :].split()[19]), divmod(boottime_offset(), _TICK_NS)
    if rest:
        raise OSError(errno.ERANGE, "the offset of this time namespace is no whole number of clock ticks")
    return shown_ticks - offset


def quoted(text: str) -> str:
    """`text` as a JSON string in ASCII; what lies beyond the basic plane becomes a question mark."""
    plain = "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\u{min(ord(c), 0xFFFF):04x}" for c in text)
    return f'"{plain}"'


if __name__ == "__main__":
    sys.exit(main())
