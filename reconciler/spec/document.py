"""YAML text to a tree of nodes that know where they were written.

The tree is composed here, from parser events and without recursion, so that no input can exhaust the stack, the memory
or the clock: size, depth and the cost of expanded aliases are bounded before anything is expanded. Plain scalars follow
the YAML 1.2 core schema: `no` is a string, `1:30` is a string, a date is a string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NoReturn

import yaml
from msgspec import Struct

from reconciler.errors import Problem, SpecError
from reconciler.spec.spec import Source
from reconciler.spec.tree import Entry, Map, Node, Plain, Scalar, Sequence
from reconciler.spec.trust import MAX_BYTES

MAX_DEPTH = 64  # the language itself nests six deep
MAX_COST = 4 << 20  # characters and nodes once aliases are expanded: linear files never reach it, bombs do at once
_NODE_COST = 40  # so at most a hundred thousand nodes: under a second with libyaml
_MAX_PROBLEMS = 100  # nobody reads more, and an error is dearer than a node
_MAX_NUMBER_DIGITS = 30

_LOADER: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STANDARD = "tag:yaml.org,2002:"
_KNOWN_TAGS = {
    "ScalarEvent": frozenset({"str", "int", "float", "bool", "null"}),
    "SequenceStartEvent": frozenset({"seq"}),
    "MappingStartEvent": frozenset({"map"}),
}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_BEGINS_NUMBER = frozenset("-+.0123456789")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII
)


def decode(content: bytes, file: str) -> str:
    """UTF-8 text without its byte order mark.

    Raises:
        SpecError: too large, or not UTF-8; the position is that of the first wrong byte.
    """
    if len(content) > MAX_BYTES:
        raise SpecError((Problem(file, 1, 1, f"the file is larger than {MAX_BYTES >> 20} MiB"),))
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SpecError((Problem(file, 1, 1, "the file is UTF-16", "save it as UTF-8"),))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        body = content.removeprefix(b"\xef\xbb\xbf")
        before = body[: error.start].decode("utf-8", "replace")
        message = f"byte 0x{body[error.start]:02x} is not UTF-8"
        raise SpecError((_problem_in(before, file, message, "save the file as UTF-8"),)) from None


def parse(text: str, file: str) -> Map:
    """The one document in `text`, whose root is a mapping.

    Raises:
        SpecError: every problem found (all duplicate keys and bad tags; syntax errors end the reading).
    """
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES:
        raise SpecError((Problem(file, 1, 1, f"the file is larger than {MAX_BYTES >> 20} MiB"),))
    if bad := _UNPRINTABLE.search(text):
        message = f"control character U+{ord(bad[0]):04X} is not allowed"
        raise SpecError((_problem_in(text[: bad.start()], file, message, "delete it, or save the file as UTF-8 text"),))
    return _Composer(file).compose(text)


def _problem_in(before: str, file: str, message: str, hint: str) -> Problem:
    lines = re.split(r"\r\n|\n|\r", before)
    return Problem(file, len(lines), len(lines[-1]) + 1, message, hint)


class _Open(Struct):
    """A collection whose end has not come yet."""

    at: Source
    anchor: str | None
    items: list[Node] | None
    """None: a mapping."""
    entries: dict[str, Entry]
    merges: list[Node]
    key: Scalar | None = None
    merge_key: bool = False
    cost: int = _NODE_COST
    height: int = 1


class _Built(Struct, frozen=True):
    """A finished node with what it costs to expand it."""

    node: Node
    cost: int
    height: int
    merge_key: bool = False


class _Composer:
    """Events in, one tree out. `spent` is the cost of everything with aliases expanded."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.open: list[_Open] = []
        self.anchors: dict[str, _Built | None] = {}
        self.root: Node | None = None
        self.spent = 0

    def compose(self, text: str) -> Map:
        try:
            for event in _events(text):
                self._take(event)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if error.context_mark and re.search("stream|',' or", error.problem or ""):
                mark = error.context_mark  # what was never closed, not the end of the file
            lines = text.split("\n", mark.line + 1) if mark else []
            line = lines[mark.line] if mark and mark.line < len(lines) else ""
            self._fail(_at(mark, self.file), *_explain(error, line))
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # the pure-Python scanner lets int() and chr() errors of directives and escapes through
            self._fail(Source(self.file, 1, 1), f"not valid YAML: {str(error).splitlines()[0][:100]}")
        if self.problems:
            raise SpecError(tuple(sorted(self.problems, key=lambda p: (p.line, p.column, p.message))))
        if self.root is None or (isinstance(self.root, Scalar) and self.root.value is None):
            raise SpecError((Problem(self.file, 1, 1, "the file is empty", "begin it with `version: 1`"),))
        if not isinstance(self.root, Map):
            self._fail(self.root.at, "the file must be a mapping of `key: value` lines", "begin it with `version: 1`")
        return self.root

    def _take(self, event: yaml.Event) -> None:
        at = _at(event.start_mark, self.file)
        match event:
            case yaml.ScalarEvent():
                built = self._scalar(event, at)
                if event.anchor:
                    self.anchors[event.anchor] = built
                self._spend(built.cost, at)
                self._place(built, at)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._begin(event, at)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._end()
            case yaml.DocumentStartEvent():
                if self.root is not None:
                    self._fail(at, "a second document begins here", "one file holds one document: remove the `---`")
            case yaml.AliasEvent():
                self._place(self._alias(event.anchor, at), at)

    def _begin(self, event: yaml.SequenceStartEvent | yaml.MappingStartEvent, at: Source) -> None:
        self._check_tag(event, at)
        if self.open and self.open[-1].items is None and self.open[-1].key is None:
            self._fail(
                at, "a key must be a plain string, not a list or a mapping", "quote a key that begins with [ or {"
            )
        if len(self.open) >= MAX_DEPTH:
            self._fail(at, f"nested deeper than {MAX_DEPTH} levels")
        if event.anchor:
            self.anchors[event.anchor] = None  # open: an alias to it from inside would be a cycle
        self._spend(_NODE_COST, at)
        is_list = isinstance(event, yaml.SequenceStartEvent)
        self.open.append(_Open(at, event.anchor, [] if is_list else None, {}, []))

    def _end(self) -> None:
        done = self.open.pop()
        node: Node
        if done.items is not None:
            node = Sequence(tuple(done.items), done.at)
        else:
            for merged in done.merges:  # explicit keys win, then earlier merges
                if isinstance(merged, Map):
                    for name, entry in merged.entries.items():
                        done.entries.setdefault(name, entry)
            node = Map(done.entries, done.at)
        built = _Built(node, done.cost, done.height)
        if done.anchor:
            self.anchors[done.anchor] = built
        self._place(built, done.at)

    def _place(self, built: _Built, at: Source) -> None:
        if not self.open:
            self.root = built.node
            return
        parent = self.open[-1]
        parent.cost += built.cost
        parent.height = max(parent.height, built.height + 1)
        if len(self.open) + built.height > MAX_DEPTH + 1:
            self._fail(at, f"nested deeper than {MAX_DEPTH} levels once aliases are expanded")
        if parent.items is not None:
            parent.items.append(built.node)
        elif parent.key is None:
            self._take_key(parent, built, at)
        else:
            if parent.merge_key:
                self._merge(parent, built.node)
            elif parent.key.text not in parent.entries:
                parent.entries[parent.key.text] = Entry(parent.key.at, built.node)
            parent.key = None

    def _take_key(self, parent: _Open, built: _Built, at: Source) -> None:
        key = built.node
        if not isinstance(key, Scalar):
            self._fail(at, "a key must be a plain string, not a list or a mapping")
        parent.merge_key = built.merge_key
        parent.key = Scalar(key.text, key.text, at)
        if not isinstance(key.value, str):
            self._note(at, f"key {_clip(key.text)} is not a string", f'quote it: "{_clip(key.text)}"')
        elif not built.merge_key and (first := parent.entries.get(key.text)):
            where = f"line {first.key_at.line}, column {first.key_at.column}"
            self._note(at, f'duplicate key "{_clip(key.text)}"', f"it was first written at {where}; keep one of them")

    def _merge(self, parent: _Open, node: Node) -> None:
        for source in node.items if isinstance(node, Sequence) else (node,):
            if isinstance(source, Map):
                parent.merges.append(source)
            else:
                self._note(source.at, "`<<` takes a mapping or a list of mappings", "write `<<: *name`")

    def _alias(self, anchor: str | None, at: Source) -> _Built:
        name = anchor or ""
        if name not in self.anchors:
            self._fail(at, f"alias *{_clip(name)} has no anchor", f"write &{_clip(name)} at the value it stands for")
        built = self.anchors[name]
        if built is None:
            self._fail(at, f"alias *{_clip(name)} contains itself")
        self._spend(built.cost, at)
        return built

    def _scalar(self, event: yaml.ScalarEvent, at: Source) -> _Built:
        self._check_tag(event, at)
        text: str = event.value
        if "\0" in text or (not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)):
            self._fail(at, "the text contains a NUL or half a surrogate pair", "remove the escape")
        tag = (event.tag or "").removeprefix(_STANDARD)
        is_plain = event.implicit[0] and not event.style
        value: Plain = text
        if tag in ("int", "float", "bool", "null") or (is_plain and not tag):
            value = self._resolve(text, at)
            if tag == "float" and type(value) is int:
                value = float(value)
            if tag and _tag_of(value) != tag:
                self._note(at, f"{_clip(text)} is not a {tag}", f"remove the tag !!{tag}")
        return _Built(Scalar(value, text, at), _NODE_COST + len(text), 1, merge_key=is_plain and text == "<<")

    def _resolve(self, text: str, at: Source) -> Plain:
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if text[0] not in _BEGINS_NUMBER or not (_INT.fullmatch(text) or _FLOAT.fullmatch(text)):
            return text
        if len(text) > _MAX_NUMBER_DIGITS:
            self._note(at, f"{_clip(text)} has too many digits for a number", "quote it if it is a text")
            return text
        if _INT.fullmatch(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _check_tag(self, event: yaml.NodeEvent, at: Source) -> None:
        tag: str | None = getattr(event, "tag", None)
        if not tag or tag == "!":
            return
        if tag.startswith(_STANDARD) and tag.removeprefix(_STANDARD) in _KNOWN_TAGS[type(event).__name__]:
            return
        shown = "!!" + tag.removeprefix(_STANDARD) if tag.startswith(_STANDARD) else tag
        self._note(at, f"tag {_clip(shown)} is not allowed", "remove it: only plain values are allowed")

    def _spend(self, cost: int, at: Source) -> None:
        self.spent += cost
        if self.spent > MAX_COST:
            self._fail(
                at,
                "the file holds too much (aliases count as often as they are used)",
                "split it, or use fewer aliases",
            )

    def _note(self, at: Source, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(self.file, at.line, at.column, message, hint))
        if len(self.problems) >= _MAX_PROBLEMS:
            raise SpecError(tuple(sorted(self.problems, key=lambda p: (p.line, p.column, p.message))))

    def _fail(self, at: Source, message: str, hint: str | None = None) -> NoReturn:
        self._note(at, message, hint)
        raise SpecError(tuple(sorted(self.problems, key=lambda p: (p.line, p.column, p.message))))


def _events(text: str) -> Iterator[yaml.Event]:
    loader = _LOADER(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


def _at(mark: object, file: str) -> Source:
    line, column = getattr(mark, "line", 0), getattr(mark, "column", 0)
    return Source(file, line + 1, column + 1)


def _tag_of(value: Plain) -> str:
    return {"NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(error: yaml.MarkedYAMLError, line: str) -> tuple[str, str | None]:
    what = _clip(error.problem or "unreadable")
    hint = None
    if "cannot start any token" in what and line[: len(line) - len(line.lstrip())].count("\t"):
        hint = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in what:
        hint = "quote a text that contains `: `, and check the indentation"
    elif "expected <block end>" in what or "did not find expected key" in what:
        hint = "check the indentation of this line against the lines above it"
    elif "',' or" in what:
        hint = "a list is [a, b]; is a bracket or a comma missing?"
    elif "quoted scalar" in (error.context or ""):
        hint = "is the closing quote missing?"
    elif "found character" in what:
        hint = "quote the text"
    return f"not valid YAML: {what}", hint
