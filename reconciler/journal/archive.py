"""Putting records away: what ended moves to `ended/`, where the last few of each subject stay with their logs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from reconciler import cgroup
from reconciler.journal.incarnations import Intent, list_ended, read_intent
from reconciler.journal.layout import StateDir, refuse_link
from reconciler.plan.observed import Subject


def archive(state: StateDir, incarnation: str, *, keep: int) -> None:
    """Move an ended incarnation's records to `ended/`; of its subject's past ones, only the last `keep` stay.

    The logs of those that go, go with them. Doing it twice does no harm. One whose control group still has a member
    stays where it is: somebody lives there that nobody has seen yet.

    Raises:
        OSError: it could not be moved.
    """
    for folder in (state.run, state.ended):
        refuse_link(folder)
    ending = read_intent(state.run / incarnation)
    if isinstance(ending, Intent) and ending.group is not None and not cgroup.remove(ending.group, incarnation):
        return
    if (state.run / incarnation).exists():
        (state.run / incarnation).rename(state.ended / incarnation)
    past = sorted(_past(state, incarnation), key=lambda entry: entry[:2])
    for _, name, log in past[: max(0, len(past) - keep)]:
        if log is not None and Path(log).parent == state.logs:
            Path(log).unlink(missing_ok=True)  # first: once its records are gone nobody knows of it any more
        with suppress(OSError):
            (state.ended / name).rename(state.ended / f".{name}")
    for forgotten in state.ended.glob(".*"):  # and what a daemon that died here left of others
        shutil.rmtree(forgotten, ignore_errors=True)


def _past(state: StateDir, incarnation: str) -> Iterator[tuple[float, str, str | None]]:
    """When it began, id and log of every incarnation in `ended/` of the subject of this one.

    Those whose intent cannot be read are one subject: nobody's.
    """
    of_whom = _ending(str(state.ended / incarnation))
    for name in list_ended(state):
        ending = _ending(str(state.ended / name))
        if of_whom is not None and ending is not None and ending[0] == of_whom[0]:
            yield ending[1], name, ending[2]
        elif of_whom is None and ending is None:
            with suppress(OSError):
                log = next((str(p) for p in state.logs.iterdir() if p.name.endswith(f".{name}.log")), None)
                yield (state.ended / name).stat().st_mtime, name, log


@lru_cache(maxsize=1 << 12)
def _ending(folder: str) -> tuple[Subject, float, str] | None:
    """Of whom it was, when it began, and its log; None: its intent cannot be read.

    Remembered: nothing is written there any more, and with each end all of them would be read again.
    """
    intent = read_intent(Path(folder))
    return (intent.subject, intent.started.wall, intent.log) if isinstance(intent, Intent) else None
