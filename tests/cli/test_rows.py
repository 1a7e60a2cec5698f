"""Tables on terminals of every width."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.text import Text

from reconciler.cli.rows import Rows

SENTENCE = "the workload failed: exit code 127 (luxcoreconsole: no such program on PATH)"


def shown(width: int) -> list[str]:
    rows = Rows("name", "state", "number", words="why", title="Things", spare=("number", "state"))
    rows.add(Text("a-rather-long-name"), "failed", "12345678", words=Text(SENTENCE))
    rows.add(Text("short"), "done", "1", words=Text(""))
    console = Console(width=width, markup=False)
    with console.capture() as captured:
        console.print(rows)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_sentence_stands_beside_its_row_where_there_is_room() -> None:
    assert shown(140) == [
        "Things",
        "name                state   number    why",
        f"a-rather-long-name  failed  12345678  {SENTENCE}",
        "short               done    1",
    ]
    assert shown(84)[2:4] == [
        "a-rather-long-name  failed  12345678  the workload failed: exit code 127",
        "                                      (luxcoreconsole: no such program on PATH)",
    ]


def test_a_sentence_stands_below_its_row_where_there_is_none() -> None:
    assert shown(60) == [
        "Things",
        "name                state   number",
        "a-rather-long-name  failed  12345678",
        "  the workload failed: exit code 127 (luxcoreconsole: no",
        "  such program on PATH)",
        "short               done    1",
    ]


@pytest.mark.parametrize(("width", "head"), [(36, "name                state"), (20, "name")])
def test_columns_that_can_be_spared_are_left_out_before_any_is_cut(width: int, head: str) -> None:
    lines = shown(width)
    assert lines[1] == head
    assert " ".join("".join(f"{line} " for line in lines[3:-1]).split()) == SENTENCE
    assert max(map(len, lines)) <= width
