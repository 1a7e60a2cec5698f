"""Where a file says what it had better not: no errors, so nothing is refused for it."""

from __future__ import annotations

from collections.abc import Iterator

from reconciler.errors import Problem, SpecError
from reconciler.spec.document import parse
from reconciler.spec.secrecy import names_secret, redacted
from reconciler.spec.texts import SourceText
from reconciler.spec.tree import Map, Node, Scalar, Sequence


def cautions(source: SourceText) -> tuple[Problem, ...]:
    """What looks like a secret in a file of set points or of an overlay; nothing of one that does not parse.

    1. in a command line: `ps` shows it to every user of the box
    2. in `env`: everybody finds it who may read the file
    """
    try:
        tree = parse(source.text, source.path)
    except SpecError:
        return ()
    return tuple(_of(tree, ""))


def _of(node: Node, key: str) -> Iterator[Problem]:
    match node:
        case Sequence():
            words = [item.text if isinstance(item, Scalar) else "" for item in node.items]
            is_command = key == "command" or key.endswith("args")
            for item, word, shown in zip(node.items, words, redacted(words), strict=True):
                if is_command and word != shown:  # 1
                    message = f"what looks like a secret stands in a command line, which every user can see: {shown}"
                    hint = "put it into an `env_file` (most programs read a variable), or name a file that holds it"
                    yield Problem(item.at.file, item.at.line, item.at.column, message, hint)
                yield from _of(item, "")
        case Map():
            for name, entry in node.entries.items():
                if key == "env" and names_secret(name) and isinstance(entry.node, Scalar) and entry.node.text:  # 2
                    at, hint = entry.key_at, "put it into an `env_file` of mode 0600"
                    message = f"{name} looks like a secret, and everybody finds it who may read this file"
                    yield Problem(at.file, at.line, at.column, message, hint)
                yield from _of(entry.node, name)
        case Scalar():
            return
