"""Secrets, from the files into the children's environments and nowhere else: a whole life, then a search."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from box_driver import HERE, Box, wait_for
from files import put
from ports import free_port, free_ports

from reconciler.identity import children

sys.path.insert(0, str(Path(__file__).parents[1] / "act"))

from letter_box import LetterBox, letter_box

# in files of their own, or of others: nowhere at all
IN_FILES = ("canary-env-file", "canary-job-file", "canary-hook-file", "canary-stranger", "canary-listener",
            "canary-parent")  # fmt: skip
# in the set points and overlays themselves, which the journal keeps a private copy of
IN_SET_POINTS = ("canary-env", "canary-arg", "canary-word", "canary-profile", "canary-job-env", "canary-job-arg",
                 "canary-url", "canary-header", "canary-notify-arg")  # fmt: skip
STRANGER = """
import pathlib, sys, time
ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
import os
pathlib.Path(sys.argv[1], f"{os.getpid()}-{ticks}").write_text(str(70 << 30))
time.sleep(600)
"""
LISTENER = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"


@pytest.fixture
def strangers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def secret_file(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def write_files(box: Box, letters: LetterBox, taken: int, port: int) -> None:
    """A box in which everything that may hold a secret holds one."""
    env_file = secret_file(box.root / "secrets.env", "STUB_TOKEN=canary-env-file\n")
    show = ["sh", "-c", 'echo "$HF_TOKEN $STUB_TOKEN" > seen; exec "$@"', "sh"]
    box.spec["engines"] = {
        "mine": {
            "executable": sys.executable,
            "args": [str(HERE / "stub_server.py"), "{port}", "--gib", "60", "--api-key", "canary-profile"],
            "env": {"MINE_SECRET": "canary-profile"},
            "health_path": "/health",
        }
    }
    box.endpoint("holds", gpus=[0], priority=900, env_file=env_file, env={"HF_TOKEN": "canary-env"}, cwd=str(box.root),
                 extra=["--api-key", "canary-arg", "--header=X-Api-Key: canary-word"])  # fmt: skip
    box.spec["endpoints"]["holds"]["command"] = [*show, *box.spec["endpoints"]["holds"]["command"]]
    box.spec["endpoints"]["gives"] = {
        "engine": "mine", "model": "m", "port": free_port(), "gpus": [1], "priority": 100,
        "stop": {"drain": "0s", "grace": "3s"}, "health": {"interval": "500ms"},
    }  # fmt: skip
    box.spec["endpoints"]["falls"] = {
        "engine": "custom", "gpus": 0, "command": ["sh", "-c", "exit 3", "sh", "--password=canary-arg"],
        "restart": {"max_restarts": 1, "initial": "100ms"},
    }  # fmt: skip
    box.endpoint("unseated", gpus=[2], port=taken, env={"PASSWORD": "canary-env"})
    box.endpoint("crowded", gpus=[3], gib=20)
    hook_file = secret_file(box.root / "hook", letters.url.replace("/hook/canary-5f2c", "/canary-hook-file"))
    box.spec["notify"] = {
        "one": {"webhook": letters.url.replace("canary-5f2c", "canary-url"), "severity": "info",
                "headers": {"Authorization": "Bearer canary-header"}},
        "two": {"webhook_file": hook_file, "severity": "info"},
        "three": {"command": [sys.executable, "-c", "raise SystemExit(1)", "--token", "canary-notify-arg"]},
        "four": {"webhook": f"http://127.0.0.1:{taken}0/canary-url"},
    }  # fmt: skip
    box.spec["metrics"] = {"port": port}
    box.write()


def said(box: Box, *words: str) -> str:
    """All that a command says."""
    return "".join(box.said(*words))


def all_outputs(box: Box) -> Iterator[tuple[str, str]]:
    """What every command that reads says, as text and as JSON; and what those that act say beside a daemon."""
    svg, saved = box.root / "forecast.svg", box.root / "saved.plan"
    for words in (
        ("status",), ("plan", "--out", str(saved)), ("agenda",), ("forecast", "--for", "1h", "--svg", str(svg)),
        ("events", "-n", "9999"), ("incidents", "--all"), ("overlay", "list"), ("validate",), ("doctor",),
        ("clean-start", "--dry-run"), ("apply", "--yes"), ("down",),
        *(("explain", n) for n in ("holds", "gives", "falls", "unseated", "crowded", "job", "0", "nothing")),
        ("explain", "--replay", "last"), ("explain", "--replay", "1"),
    ):  # fmt: skip
        for form in ("text", "json"):
            yield f"{form} {' '.join(words)}", said(box, "--format", form, *words)
    yield "svg", svg.read_text()
    yield "saved plan", saved.read_text()


def state_files(box: Box) -> Iterator[tuple[str, bytes]]:
    """Every file below the state directory but the journal, and names of them."""
    for path in sorted(box.state.rglob("*")):
        yield f"name of {path}", os.fsencode(path)
        if path.is_file() and not path.name.startswith("journal.sqlite") and path.parent != box.state / "logs":
            with suppress(FileNotFoundError):  # replaced, or put away, meanwhile; once more after the daemon's end
                yield str(path), path.read_bytes()


def journal_rows(box: Box, *, texts: bool) -> Iterator[tuple[str, bytes]]:
    """Every value of every table, unpacked; with or without the copy of the files."""
    with closing(sqlite3.connect(f"file:{box.state / 'journal.sqlite'}?mode=ro", uri=True)) as raw:
        tables = [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert {"events", "texts", "decisions", "specs", "incidents"} <= set(tables)
        for table in tables:
            if texts or table != "texts":
                for row in raw.execute(f"SELECT * FROM {table}"):
                    for value in row:
                        yield f"journal, {table}", unpacked(value)


def unpacked(value: object) -> bytes:
    if isinstance(value, bytes):
        try:
            return zlib.decompress(value)
        except zlib.error:
            return value
    return str(value).encode()


def own_command_lines(box: Box) -> Iterator[tuple[str, bytes]]:
    """The daemon's, its fork server's and the shims'."""
    assert box.daemon is not None
    ours = {box.daemon.pid, *children(box.daemon.pid)}
    for server in children(box.daemon.pid):
        ours |= set(children(server))
    assert len(ours) >= 3, "daemon, fork server and a shim"
    for pid in ours:
        yield f"command line of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes()
        if pid != box.daemon.pid:  # its own is its caller's
            yield f"environment of {pid}", Path(f"/proc/{pid}/environ").read_bytes()
        for name in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                yield f"descriptor of {pid}", os.fsencode(name.readlink())


def found(places: Iterator[tuple[str, bytes]], canaries: tuple[str, ...]) -> set[tuple[str, str]]:
    return {(place, canary) for place, content in places for canary in canaries if canary.encode() in content}


@pytest.mark.timeout(300)  # a whole life of a box, and some sixty commands
def test_a_secret_reaches_the_child_that_needs_it_and_nobody_else(
    box: Box, strangers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-parent")
    monkeypatch.setenv("VLLM_API_KEY", "canary-parent")
    taken, port = free_ports(2)
    with letter_box() as letters:
        write_files(box, letters, taken, port)
        said(box, "status")  # makes the simulated node
        hidden = ("--api-key", "canary-stranger")
        strangers.append(subprocess.Popen([sys.executable, "-c", STRANGER, str(box.state / "sim/gpus/3"), *hidden]))
        strangers.append(subprocess.Popen([sys.executable, "-c", LISTENER, str(taken), "--token=canary-listener"]))
        wait_for(lambda: any((box.state / "sim/gpus/3").iterdir()), "a stranger holds memory")
        box.start()
        box.wait_healthy("holds", "gives")
        wait_for(lambda: box.endpoints()["falls"]["state"] == "failed", "one that fails is given up")
        job_file = secret_file(box.root / "job.env", "JOB_SECRET=canary-job-file\n")
        path = box.overlay("job", gpus=[1])
        text = path.read_text().replace(
            "  command:", f"  env: {{JOB_TOKEN: canary-job-env}}\n  env_file: {job_file}\n  command:"
        )
        put(path, text.replace("--gib", "--api-key\n  - canary-job-arg\n  - --gib"))
        box.wait_overlay("job", "active")
        shown = {f"{words} while it is away": said(box, words) for words in ("status", "plan", "agenda")}
        first = box.pids()["holds"]
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: box.pids()["holds"] not in (None, first), "it is started again")
        box.wait_healthy("holds")
        box.finish("job")
        box.wait_overlay("job", "done")
        box.wait_healthy("gives")
        # an edit that is wrong in the very lines that hold secrets
        good = box.setpoints.read_text()
        for wrong in (good.replace("HF_TOKEN: canary-env", "HF_TOKEN: [canary-env]"), good + '\nx: "canary-env\n',
                      good.replace("Authorization: Bearer canary-header", 'Authorization: "canary-header\\n"'),
                      good.replace("webhook: http", "webhook: ftp"), good + "\nHF_TOKEN=canary-env\n"):  # fmt: skip
            assert wrong != good
            put(box.setpoints, wrong)
            shown[f"validate {len(wrong)}"] = said(box, "validate")
            assert "problem" in shown[f"validate {len(wrong)}"]
        put(box.overlays / "bad.yaml", "version: 1\nworkload: {command: [x], env: {A_TOKEN: [canary-job-env]}}\n")
        shown["status of wrong files"] = said(box, "status")
        put(box.setpoints, good)
        wait_for(lambda: letters.requests, "somebody was told")
        shown |= dict(all_outputs(box))
        assert "job" in shown["text events -n 9999"]
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        shown["metrics"] = page
        everything = [(place, text.encode()) for place, text in shown.items()]
        everything += [*own_command_lines(box), *state_files(box)]
        everything += [("notice", body) for _, _, body in letters.requests]
        assert box.terminate() == 0
    assert (box.root / "seen").read_text() == "canary-env canary-env-file\n"
    assert any("canary-url" in p for p, _, _ in letters.requests)
    assert any("canary-hook-file" in p for p, _, _ in letters.requests)
    everything += [("daemon's log", box.log().encode()), *state_files(box)]
    assert found(iter([*everything, *journal_rows(box, texts=False)]), (*IN_SET_POINTS, *IN_FILES)) == set()
    assert found(journal_rows(box, texts=True), IN_FILES) == set()
    raw = b"".join(path.read_bytes() for path in box.state.glob("journal.sqlite*"))
    assert not [canary for canary in IN_FILES if canary.encode() in raw]
