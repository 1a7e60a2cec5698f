"""JSON Schemas of both file formats, generated from the models; editors complete and check files with them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

from reconciler.spec.models import Model, SetpointsModel
from reconciler.spec.overlay_models import OverlayModel
from reconciler.spec.profiles import PROFILES
from reconciler.spec.values import DURATION_PATTERN, NAME, SIZE_PATTERN
from reconciler.units import format_duration, format_size

Format = Literal["setpoints", "overlay"]

_TITLES: dict[Format, str] = {"setpoints": "reconciler set points", "overlay": "reconciler overlay"}
_NAMED = ("endpoints", "capabilities", "priorities", "set")
_AS_WRITTEN: dict[str, Callable[[Any], str]] = {
    DURATION_PATTERN: format_duration,
    SIZE_PATTERN: lambda size: format_size(int(size)),
}


def schema(which: Format) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one file format."""
    model = SetpointsModel if which == "setpoints" else OverlayModel
    generated = model.model_json_schema(mode="validation")
    models = {kind.__name__: kind for kind in _models(Model)}
    for title, part in ((model.__name__, generated), *generated.get("$defs", {}).items()):
        part.pop("title", None)
        described = _descriptions(models[title]) if title in models else {}
        for name, field in part.get("properties", {}).items():
            if name in described:
                field["description"] = described[name]
                in_order = dict(sorted(field.items()))  # as the generator leaves them
                field.clear()
                field.update(in_order)
            if "$ref" in field:  # left out by the generator where it equals the part's own
                part_of = generated["$defs"][field["$ref"].rpartition("/")[2]]
                field.setdefault("description", part_of.get("description", ""))
            _tidy(name, field)
    generated["patternProperties"] = {"^x-": {"description": "Yours: a place for anchors and notes."}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": _TITLES[which],
        **{key: value for key, value in generated.items() if key != "$defs"},
        "$defs": generated["$defs"],
    }


def _models(kind: type[Model]) -> Iterator[type[Model]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _models(derived)


def _descriptions(kind: type[Model]) -> dict[str, str]:
    """Field → the string that stands under it in the source, those of bases included."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[: kind.__mro__.index(Model)]):
        (definition,) = ast.parse(inspect.getsource(owner)).body
        assert isinstance(definition, ast.ClassDef)  # noqa: S101 - it is the source of a class
        for field, under in pairwise(definition.body):
            match field, under:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
                case _:
                    continue
    return found


def _tidy(name: str, field: dict[str, Any]) -> None:
    """Defaults as people write them, no `null`, no generated titles; mappings may be empty."""
    field.pop("title", None)
    nullable = {"type": "null"} in field.get("anyOf", ())
    options = [option for option in field.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        del field["anyOf"]
        field |= {key: value for key, value in options[0].items() if key not in field}
    elif options:
        field["anyOf"] = options
    if field.get("default") is None:
        field.pop("default", None)
    if as_written := _AS_WRITTEN.get(field.get("pattern", "")):
        if "default" in field:
            field["default"] = as_written(field["default"])
    elif "$ref" in field and not nullable and name != "makespan":
        field["anyOf"] = [{"$ref": field.pop("$ref")}, {"type": "null"}]
    elif field.get("type") == "object":
        field["type"] = ["object", "null"]
        if name in _NAMED:
            field["propertyNames"] = {"pattern": f"^{NAME.pattern}$"}
    if name == "engine":
        field["examples"] = list(PROFILES)  # the set points may define more
