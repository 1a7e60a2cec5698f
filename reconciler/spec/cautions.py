"""Where a file says what it had better not: no errors, so nothing is refused for it."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from reconciler.errors import Problem, SpecError
from reconciler.spec.document import parse
from reconciler.spec.engines import FILLED_IN_COMMANDS
from reconciler.spec.findings import clip, text_of
from reconciler.spec.profiles import NAME_IN_BRACES, PLACEHOLDERS
from reconciler.spec.secrecy import names_secret, redacted
from reconciler.spec.texts import SourceText
from reconciler.spec.tree import Map, Node, Scalar, Sequence, child

_ALIKE = 0.75
"""As `{prot}` and `{port}` are: one slip in the shortest of them."""


def cautions(source: SourceText) -> tuple[Problem, ...]:
    """What is doubtful in a file of set points or of an overlay; nothing of one that does not parse.

    1. what looks like a secret in a command line: `ps` shows it to every user of the box
    2. what looks like one in `env`: everybody finds it who may read the file
    3. in the command of an endpoint a name in braces that was meant to be filled in, by its looks, and is not: other
       names in braces are the program's own affair
    """
    try:
        tree = parse(source.text, source.path)
    except SpecError:
        return ()
    return (*_secrets(tree, ""), *_unfilled(tree))


def _secrets(node: Node, key: str) -> Iterator[Problem]:
    match node:
        case Sequence():
            words = [item.text if isinstance(item, Scalar) else "" for item in node.items]
            is_command = key == "command" or key.endswith("args")
            for item, word, shown in zip(node.items, words, redacted(words), strict=True):
                if is_command and word != shown:  # 1
                    message = f"what looks like a secret stands in a command line, which every user can see: {shown}"
                    hint = "put it into an `env_file` (most programs read a variable), or name a file that holds it"
                    yield Problem(item.at.file, item.at.line, item.at.column, message, hint)
                yield from _secrets(item, "")
        case Map():
            for name, entry in node.entries.items():
                if key == "env" and names_secret(name) and isinstance(entry.node, Scalar) and entry.node.text:  # 2
                    at, hint = entry.key_at, "put it into an `env_file` of mode 0600"
                    message = f"{name} looks like a secret, and everybody finds it who may read this file"
                    yield Problem(at.file, at.line, at.column, message, hint)
                yield from _secrets(entry.node, name)
        case Scalar():
            return


def _unfilled(tree: Node) -> Iterator[Problem]:
    for section in ("endpoints", "set"):
        listed = child(tree, section)
        for name in listed.entries if isinstance(listed, Map) else ():
            command = child(tree, section, name, "command")
            for item in command.items if isinstance(command, Sequence) else ():
                for word in NAME_IN_BRACES.findall(text_of(item)):
                    if word in FILLED_IN_COMMANDS:
                        continue
                    as_long = [known for known in FILLED_IN_COMMANDS if abs(len(known) - len(word)) <= 1]
                    near = get_close_matches(word.lower(), as_long, 1, _ALIKE)
                    if near or word in PLACEHOLDERS:  # 3
                        message = f"{{{clip(word)}}} is passed as it is written: nothing is filled in for it"
                        known = " ".join(f"{{{known}}}" for known in FILLED_IN_COMMANDS)
                        hint = f"did you mean {{{near[0]}}}?" if near else f"filled in are {known}"
                        yield Problem(item.at.file, item.at.line, item.at.column, message, hint)
