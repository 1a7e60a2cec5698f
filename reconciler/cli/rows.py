"""A table that stays readable on a narrow terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

LEAST_WORDS = 30
"""Cells that sentences need beside the other columns: with fewer they go below their row."""
INDENT = 2


class Rows:
    """Rows of short cells, each with a sentence about it.

    1. All fits side by side, the sentence on several lines if need be: one table.
    2. Otherwise each sentence stands below its row.
    3. Where the short cells alone are too wide, columns of `spare` are left out, the first of them first.
    """

    def __init__(self, *columns: str, words: str, title: str, spare: Sequence[str] = ()) -> None:
        self._columns, self._words, self._title, self._spare = columns, words, title, spare
        self._rows: list[tuple[tuple[RenderableType, ...], Text]] = []

    def add(self, *cells: RenderableType, words: Text) -> None:
        """One more row: a cell for each column, and its sentence."""
        self._rows.append((cells, words))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self._columns)
        spare = [column for column in self._spare if column in columns]
        longest = max((words.cell_len for _, words in self._rows), default=0)
        if self._width(console, options, columns) + min(longest, LEAST_WORDS) <= options.max_width:  # 1
            yield self._table(columns, sentences=True)
            return
        while spare and self._width(console, options, columns) > options.max_width:  # 3
            columns.remove(spare.pop(0))
        table = self._table(columns, sentences=False)
        lines = console.render_lines(table, options, pad=False, new_lines=True)
        head = len(lines) - len(self._rows)
        for line in lines[:head]:
            yield from line
        for line, (_, words) in zip(lines[head:], self._rows, strict=True):  # 2
            yield from line
            if words:
                yield Padding(words, (0, 0, 0, INDENT))

    def _width(self, console: Console, options: ConsoleOptions, columns: Sequence[str]) -> int:
        """Cells that these columns take, with the space after them."""
        roomy = options.update(width=10_000)
        return Measurement.get(console, roomy, self._table(columns, sentences=False)).maximum

    def _table(self, columns: Sequence[str], *, sentences: bool) -> Table:
        table = Table(
            title=self._title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0),
            header_style="dim",
        )  # fmt: skip
        for column in columns:
            table.add_column(column, no_wrap=True)
        if sentences:
            table.add_column(self._words, overflow="fold")
        shown = [self._columns.index(column) for column in columns]
        for cells, words in self._rows:
            table.add_row(*(cells[index] for index in shown), *([words] if sentences else []))
        return table
