"""The text of a file as a tree of nodes that know where they were written."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from reconciler.spec.spec import Source

Plain = None | bool | int | float | str


class Scalar(Struct, frozen=True):
    """One value."""

    value: Plain
    text: str
    """As written, for messages."""
    at: Source


class Sequence(Struct, frozen=True):
    """A list."""

    items: tuple[Node, ...]
    at: Source


class Entry(Struct, frozen=True):
    """One `key: value` of a mapping."""

    key_at: Source
    node: Node


class Map(Struct, frozen=True):
    """A mapping; keys are strings."""

    entries: Mapping[str, Entry]
    at: Source


Node = Scalar | Sequence | Map


def plain(node: Node) -> object:
    """The tree as dicts, lists and scalars; recursion is bounded by the depth limit."""
    match node:
        case Scalar():
            return node.value
        case Sequence():
            return [plain(item) for item in node.items]
        case Map():
            return {key: plain(entry.node) for key, entry in node.entries.items()}


def child(node: Node, *path: str | int) -> Node | None:
    """The node at `path`, or None."""
    for step in path:
        if isinstance(node, Map) and isinstance(step, str) and step in node.entries:
            node = node.entries[step].node
        elif isinstance(node, Sequence) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            return None
    return node


def locate(node: Node, path: tuple[str | int, ...], *, key: bool = False) -> Source:
    """Where the value at `path` was written (or its key); the nearest thing above it when it was not written at all."""
    at = node.at
    for step in path:
        if isinstance(node, Map) and isinstance(step, str) and step in node.entries:
            entry = node.entries[step]
            node, at = entry.node, entry.node.at
            if key or isinstance(node, Map):
                at = entry.key_at  # a mapping starts on the line below its name: the name says more
        elif isinstance(node, Sequence) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
            at = node.at
        else:
            break
    return at
