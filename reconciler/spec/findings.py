"""Problems of one reading, collected: pydantic's errors put into words, at the place where the text was written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from reconciler.errors import Problem, suggest
from reconciler.spec.spec import Source
from reconciler.spec.tree import Entry, Map, Node, Scalar, Sequence, child, locate, plain
from reconciler.spec.values import NAME, NAME_HELP, VARIABLE_HELP, ItemError, variable_problem

MAX_PROBLEMS = 100
"""Of one file: nobody reads more, and suggestions are dear."""

Path = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)

_MISSING = {
    "version": "begin the file with `version: 1`",
    "makespan": "say how long it lasts: `makespan: {duration: 20m}`",
    "command": 'a workload has a command: `command: ["program", "argument"]`',
}
_PLAIN: Mapping[str, tuple[str, str | None]] = {
    "int_type": ("is not a whole number", None),
    "model_type": ("is not a mapping", "write `key: value` lines below it"),
    "dict_type": ("is not a mapping", "write `key: value` lines below it"),
    "tuple_type": ("is not a list", "write `[...]`, or lines that begin with `- `"),
    "too_short": ("with nothing in it", "write at least one item"),
}
"""What pydantic calls an error → what is wrong with what stands there, and what to do."""
_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


class Findings:
    """Problems, each once, in file order."""

    def __init__(self) -> None:
        self._found: dict[Problem, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[Problem]:
        return iter(sorted(self._found, key=_order)[:MAX_PROBLEMS])

    def add(self, at: Source, message: str, hint: str | None = None) -> None:
        """Note one problem."""
        self._found[Problem(at.file, at.line, at.column, message, hint)] = None

    def extend(self, problems: Iterable[Problem]) -> None:
        """Note several."""
        self._found.update(dict.fromkeys(problems))

    def check_name(self, at: Source, what: str, name: str) -> bool:
        """Whether `name` may be the name of a `what`; notes why not."""
        if NAME.fullmatch(name):
            return True
        self.add(at, f'{what} "{clip(name)}" has a name that is not allowed', NAME_HELP)
        return False

    def check_variables(self, env: Node | None) -> None:
        """Note the variables of `env` that nobody may set."""
        for name, entry in env.entries.items() if isinstance(env, Map) else ():
            if problem := variable_problem(name):
                owned = "belongs" in problem
                self.add(entry.key_at, problem, "remove it: it is set for each process" if owned else VARIABLE_HELP)

    def validate(self, kind: type[M], tree: Node, prefix: Path = ()) -> M | None:
        """The node at `prefix` of `tree` as a model; None after noting every reason why it is none."""
        node = child(tree, *prefix)
        if node is None or (isinstance(node, Scalar) and node.value is None):
            node = Map({}, locate(tree, prefix))
        before = len(self._found)
        self._note_nulls(kind, node, tree, prefix)
        try:
            model = kind.model_validate(plain(node))
        except ValidationError as error:
            # sorted by place before words are found for them: the first hundred are the ones a person sees
            for item in error.errors(include_url=False, include_input=False)[: MAX_PROBLEMS * 3]:
                self._note_error(kind, item, tree, prefix)
            return None
        return model if len(self._found) == before else None

    def salvage(self, kind: type[M], node: Node, needed: Mapping[str, Entry]) -> M | None:
        """The model of a broken mapping's sound keys, so that one error does not hide another.

        Args:
            kind: the model.
            node: its text.
            needed: stand-ins for the keys that the model cannot do without.
        """
        if not isinstance(node, Map) or len(self._found) >= MAX_PROBLEMS:
            return None
        sound = {
            name: entry
            for name, entry in node.entries.items()
            if Findings().validate(kind, Map({**needed, name: entry}, node.at)) is not None
        }
        return Findings().validate(kind, Map({**needed, **sound}, node.at))

    def _note_nulls(self, kind: type[BaseModel], node: Node, tree: Node, prefix: Path) -> None:
        """A key without a value is an empty mapping where a mapping belongs, and a slip elsewhere."""
        if not isinstance(node, Map):
            return
        for name, entry in node.entries.items():
            field = kind.model_fields.get(name)
            if field is None:
                continue
            if isinstance(entry.node, Scalar) and entry.node.value is None:
                is_mapping = get_origin(field.annotation) is dict or _is_model(field.annotation)
                if not is_mapping:
                    self._note_null(entry.key_at, name)
            elif (inner := inner_model(kind, (name,))) is not None:
                items = entry.node.items if isinstance(entry.node, Sequence) else (entry.node,)
                for item in items:
                    self._note_nulls(inner, item, tree, (*prefix, name))
            elif isinstance(entry.node, Map) and (values := inner_model(kind, (name, ""))) is not None:
                for key, value in entry.node.entries.items():
                    self._note_nulls(values, value.node, tree, (*prefix, name, key))

    def _note_null(self, at: Source, name: str) -> None:
        self.add(at, f'"{clip(name)}" has no value', "write one, or remove the line")

    def _note_error(self, kind: type[BaseModel], error: Any, tree: Node, prefix: Path) -> None:
        loc: Path = error["loc"]
        context: Mapping[str, Any] = error.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, ItemError):
            loc = (*loc, cause.index)
        path = (*prefix, *loc)
        node = child(tree, *path)
        at = locate(tree, path)
        is_null = isinstance(node, Scalar) and node.value is None and error["type"] != "extra_forbidden"
        if is_null and isinstance(path[-1], str):  # that of a field is noted already; here the same counts once
            self._note_null(locate(tree, path, key=True), path[-1])
            return
        if isinstance(node, Sequence) and node.items and error["type"] == "too_short":
            return  # what is wrong is an item of it, and noted there
        match error["type"]:
            case "extra_forbidden":
                owner = inner_model(kind, loc[:-1])
                known = list(owner.model_fields) if owner else []
                key_at = locate(tree, path, key=True)
                self.add(key_at, f'unknown key "{clip(str(loc[-1]))}"', suggest(str(loc[-1]), known))
            case "missing":
                self.add(locate(tree, path[:-1], key=True), f'"{loc[-1]}" is missing', _MISSING.get(str(loc[-1])))
            case "literal_error":
                known = [part.strip("' ") for part in str(context["expected"]).replace(" or ", ",").split(",")]
                self.add(at, f"{shown(node)} is not one of {', '.join(known)}", suggest(text_of(node), known))
            case "bool_type":
                better = _YES_NO.get(text_of(node).lower())
                self.add(at, f"{shown(node)} is not true or false", f"write {better}" if better else None)
            case "greater_than_equal":
                self.add(at, f"{shown(node)} is too small: at least {context['ge']}")
            case "less_than_equal":
                self.add(at, f"{shown(node)} is too large: at most {context['le']}")
            case plain_kind if plain_kind in _PLAIN:
                message, hint = _PLAIN[plain_kind]
                self.add(at, f"{shown(node)} {message}", hint)
            case "value_error" if cause is not None:
                message, _, after = str(cause).partition("; ")
                self.add(at, message, after or None)
            case _:
                self.add(at, str(error["msg"]))


@lru_cache(512)
def inner_model(kind: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model that describes what stands at `path` below `kind`; None when no model does."""
    annotation: Any = kind
    for step in path:
        if isinstance(step, int) and _is_model(annotation):  # an item of a list of such
            continue
        if _is_model(annotation):
            field = annotation.model_fields.get(str(step))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            return None
        if get_origin(annotation) is not dict:  # `Model | None` is a model
            annotation = next((part for part in get_args(annotation) if _is_model(part)), annotation)
    return annotation if _is_model(annotation) else None


def text_of(node: Node | None) -> str:
    """A scalar as written; empty for anything else."""
    return node.text if isinstance(node, Scalar) else ""


def shown(node: Node | None) -> str:
    """A node, for a message."""
    match node:
        case Scalar(value=str()):
            return f'"{clip(node.text)}"'
        case Scalar():
            return clip(node.text) or "null"
        case Sequence():
            return "a list"
        case Map():
            return "a mapping"
        case None:
            return "nothing"


def clip(text: str) -> str:
    """At most 60 characters, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def _order(problem: Problem) -> tuple[str, int, int, str]:
    return problem.file, problem.line, problem.column, problem.message


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
