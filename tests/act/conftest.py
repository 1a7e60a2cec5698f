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
    until,
)

from reconciler.journal.layout import StateDir


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    state = StateDir(tmp_path / "state")
    state.ensure()
    made = Nursery(state)
    yield made
    made.close()


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
