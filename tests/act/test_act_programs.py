"""What is told of a program that cannot be started, held against what becomes of it when it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace
from nursery import Nursery, until

from reconciler.act import programs
from reconciler.act.account import find_account
from reconciler.act.environment import child_environment
from reconciler.act.process import _identity
from reconciler.act.programs import Program, obstacles

SHELL = "#!/bin/sh\necho ready\n"


@dataclass
class Bench:
    """A folder with things that may be programs."""

    root: Path

    def file(self, name: str, content: str = SHELL, mode: int = 0o755) -> Path:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
        return path

    def program(self, name: str, **changes: str | None) -> Program:
        return replace(Program(name, str(self.root), None, None, None), **changes)

    def secrets(self, content: str) -> str:
        return str(self.file("secrets.env", content, 0o600))

    def gone(self) -> str:
        """A file that was there when the set points were read."""
        return str(self.root / "gone.env")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    root = tmp_path / "bench"
    root.mkdir()
    return Bench(root)


STARTS: dict[str, Callable[[Bench], Program]] = {
    "an absolute path": lambda b: b.program(str(b.file("tool"))),
    "a path relative to its folder": lambda b: b.program(f"./{b.file('tool').name}"),
    "the inherited PATH": lambda b: b.program("true"),
    "a PATH of its own": lambda b: b.program(b.file("bin/own").name, path=f"/nowhere:{b.root}/bin"),
    "a relative folder on it": lambda b: b.program(b.file("bin/own").name, path="bin"),
    "the empty folder on it": lambda b: b.program(b.file("own").name, path="/nowhere:"),
    "the PATH of its env_file": lambda b: b.program(
        b.file("bin/own").name, env_file=b.secrets(f"PATH={b.root}/bin\nTOKEN=1\n")
    ),
    "its own PATH over that": lambda b: b.program(
        b.file("bin/own").name, path=f"{b.root}/bin", env_file=b.secrets("PATH=/nowhere\n")
    ),
    "behind one that may not be executed": lambda b: b.program(
        b.file("bin/own").name, path=f"{b.file('off/own', mode=0o644).parent}:{b.root}/bin"
    ),
    "behind a script without its interpreter": lambda b: b.program(
        b.file("bin/own").name, path=f"{b.file('off/own', '#!/nowhere/python').parent}:{b.root}/bin"
    ),
}

NEVER: dict[str, tuple[Callable[[Bench], Program], str]] = {
    "no such file": (lambda b: b.program("/nowhere/at/all"), "/nowhere/at/all is not there"),
    "below a file": (lambda b: b.program(f"{b.file('tool')}/more"), "{root}/tool/more is not there"),
    "a dangling link": (lambda b: ((b.root / "link").symlink_to("/nowhere"), b.program("./link"))[1], "./link is not"),
    "not on its PATH": (lambda b: b.program("true", path="/nowhere"), "true is not on PATH"),
    "an empty PATH": (lambda b: b.program("true", path=""), "true is not on PATH"),
    "no right to execute": (lambda b: b.program(str(b.file("tool", mode=0o644))), "{root}/tool may not be executed"),
    "a folder": (lambda b: b.program(str(b.root)), "{root} is a folder"),
    "no interpreter": (
        lambda b: b.program(str(b.file("tool", "#!/nowhere/python3\n"))),
        "{root}/tool: its interpreter /nowhere/python3 is not there",
    ),
    "no working folder": (lambda b: b.program("true", cwd="/nowhere"), "the folder /nowhere is not there"),
    "a file for a folder": (lambda b: b.program("true", cwd=str(b.file("tool"))), "the folder {root}/tool is not"),
}  # fmt: skip


def environment_of(one: Program) -> dict[str, str]:
    secrets = programs.read_env_file(one.env_file) if one.env_file else {}
    own = {} if one.path is None else {"PATH": one.path}
    return child_environment({"PATH": "/usr/bin:/bin"}, env_file=secrets, env=own)


def said(one: Program) -> list[str]:
    return [o.message for o in obstacles(one, {"PATH": "/usr/bin:/bin"})]


@pytest.mark.parametrize("kind", STARTS)
def test_nothing_is_told_of_what_can_be_started(kind: str, bench: Bench, nursery: Nursery) -> None:
    one = STARTS[kind](bench)
    assert said(one) == []
    launch = nursery.launch((one.name,), cwd=one.cwd, env=environment_of(one))
    nursery.run(nursery.actor().ensure_started(launch))
    until(lambda: nursery.records(launch.incarnation).exit is not None, "its end to be recorded")
    assert nursery.exit_code(launch.incarnation) == 0


@pytest.mark.parametrize("kind", NEVER)
def test_what_is_told_of_is_what_cannot_be_started(kind: str, bench: Bench, nursery: Nursery) -> None:
    make, message = NEVER[kind]
    one = make(bench)
    (told,) = said(one)
    assert told.startswith(message.format(root=bench.root))
    launch = nursery.launch((one.name,), cwd=one.cwd, env=environment_of(one))
    nursery.run(nursery.actor().ensure_started(launch))
    assert nursery.exit_code(launch.incarnation) in (126, 127)


def test_a_user_or_an_env_file_that_is_gone_is_told(bench: Bench) -> None:
    assert said(bench.program("true", user="no-such-user")) == ["there is no user 'no-such-user' on this box any more"]
    assert said(bench.program("true", env_file=bench.gone())) == [
        f"{bench.gone()}: env_file cannot be read: No such file or directory"
    ]


def test_who_may_not_change_the_user_is_told_and_the_daemons_own_needs_no_right(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_may_change_user", lambda: False)
    nobody = find_account("nobody")
    other = bench.program("true", user="nobody")
    assert said(other) == ["only root may run it as nobody"]
    monkeypatch.setattr(os, "geteuid", lambda: nobody.uid)
    assert said(other) == []
    assert _identity(nobody) == "", "it stays who it is: to give up groups is a right of its own"


def test_what_cannot_be_looked_at_says_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of files that does not answer, or a folder that only the program's user may enter."""
    real = os.stat
    for number in (5, 13, 116):  # EIO, EACCES, ESTALE

        def failing(path: str, number: int = number, **options: bool) -> os.stat_result:
            if str(path).startswith("/far"):
                raise OSError(number, os.strerror(number), path)
            return real(path, **options)

        monkeypatch.setattr(programs.os, "stat", failing)
        assert said(bench.program("/far/tool")) == []
        assert said(bench.program("tool", path="/nowhere:/far")) == []
        assert said(bench.program("true", cwd="/far")) == []
