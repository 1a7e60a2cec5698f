from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import (
    COUNTING_SIGTERMS,
    FORKING_WITHOUT_END,
    IGNORING_SIGTERM,
    LEAVING_A_DOUBLE_FORKED_DAEMON,
    OBEDIENT,
    STOPPED,
    TREE_WITH_SETSID_GRANDCHILD,
    Nursery,
    OpenLog,
    until,
)

from reconciler.act import shim
from reconciler.cgroup import find_home
from reconciler.journal.layout import StateDir


@pytest.fixture
def groups_in(request: pytest.FixtureRequest) -> str | None:
    """Where incarnations get control groups of their own; None: they run without, as they do unless a test asks."""
    return request.getfixturevalue("control_groups") if getattr(request, "param", None) == "grouped" else None


@pytest.fixture
def control_groups() -> str:
    """The control group that this test may make others in."""
    home = find_home()
    if home.path is None:
        pytest.skip(f"no control groups can be had: {home.reason}")
    return home.path


@pytest.fixture
def nursery(tmp_path: Path, groups_in: str | None) -> Iterator[Nursery]:
    state = StateDir(tmp_path / "state")
    state.ensure()
    made = Nursery(state, groups_in)
    yield made
    made.close()


@pytest.fixture
def open_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenLog]:
    """Gives the shim, which this process is for a while, a log."""
    opened: list[int] = []

    def open_it(path: Path, flags: int = os.O_WRONLY | os.O_APPEND | os.O_CREAT) -> int:
        log = os.open(path, flags)
        opened.append(log)
        monkeypatch.setattr(shim, "_LOG", log)
        return log

    yield open_it
    for log in opened:
        os.close(log)


@pytest.fixture
def obedient_process(nursery: Nursery) -> str:
    return nursery.started(OBEDIENT)


@pytest.fixture
def process_ignoring_sigterm(nursery: Nursery) -> str:
    return nursery.started(IGNORING_SIGTERM)


@pytest.fixture
def process_counting_sigterms(nursery: Nursery) -> str:
    return nursery.started(COUNTING_SIGTERMS)


@pytest.fixture
def stopped_process(nursery: Nursery) -> str:
    incarnation = nursery.started(STOPPED)
    stat = Path(f"/proc/{nursery.run_record(incarnation).pid}/stat")
    until(lambda: ") T " in stat.read_text(), "the process to stop itself")
    return incarnation


@pytest.fixture
def tree_with_setsid_grandchild(nursery: Nursery) -> str:
    return nursery.started(TREE_WITH_SETSID_GRANDCHILD)


@pytest.fixture
def double_forked_daemon(nursery: Nursery) -> str:
    return nursery.started(LEAVING_A_DOUBLE_FORKED_DAEMON)


@pytest.fixture
def tree_forking_without_end(nursery: Nursery) -> str:
    return nursery.started(FORKING_WITHOUT_END)


@pytest.fixture
def root_killed_tree(nursery: Nursery, tree_with_setsid_grandchild: str) -> str:
    """Its leader was killed; the others live on, as vLLM's engine core does."""
    os.kill(nursery.run_record(tree_with_setsid_grandchild).pid, 9)
    assert nursery.exit_code(tree_with_setsid_grandchild) == -9
    return tree_with_setsid_grandchild
