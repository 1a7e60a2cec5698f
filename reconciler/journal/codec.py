"""The program's own values ↔ JSON text: the same value is the same bytes, and what comes back is checked.

A value's text follows from its declared types alone: fields of a struct become an object, a member of a union of
structs carries its class name under `type`, keys are sorted, nothing is spaced. So an `int` standing in a
`float` field is written as the float it means, and two equal values never differ in bytes.

Rejected: pydantic's TypeAdapter. Importing and building it costs 70 ms in every command (this: 1 ms, and then 1.3 ms
to read a ledger of 50 endpoints against 0.6), it keeps the order of maps, and its unions guess: `{"fraction": 0.5}`
also is a `WholeGpu`, whose object has no fields at all.

Nor msgspec's own JSON: it writes what a field holds unchecked, tags a struct everywhere or nowhere, and refuses half a
surrogate pair, as names of files may have; to `convert` what `json` has read would save a command 1 ms, and let
infinities in.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

from msgspec import Struct
from msgspec.inspect import is_struct_type
from msgspec.structs import fields

T = TypeVar("T")

_TAG = "type"
_SCALARS = (str, int, float, bool)


class DecodeError(ValueError):
    """Text that is not such a value: `path` leads to the place inside it, `problem` says what is wrong there."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem, path)
        self.problem = problem
        self.path = path

    def __str__(self) -> str:
        return f"{self.path.removeprefix('.') or 'value'}: {self.problem}"

    def inside(self, step: str) -> DecodeError:
        """The same error, seen from one level further out."""
        return DecodeError(self.problem, step + self.path)


def encode(value: object) -> str:
    """The JSON text of a struct: ASCII, keys sorted, no spaces.

    Raises:
        TypeError: a field holds what its declared type does not allow, or that type has no text.
        ValueError: a float is not finite.
    """
    return _to_text(_codec(cast("Any", type(value))).encode(value))


def decode(kind: type[T], text: str | bytes) -> T:
    """The value of struct `kind` that `text` stands for. A field that is missing takes its default.

    Raises:
        DecodeError: not JSON, an unknown or missing field, or a value of the wrong type.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not JSON: {error}") from error
    return cast("T", _codec(cast("Any", kind)).decode(data))


def encode_data(data: Mapping[str, object]) -> str:
    """The same canonical text for a free-form object of JSON values (an event's data)."""
    return _to_text(data)


def _to_text(data: object) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


# ---------------------------------------------------------------- one codec per type, built when first needed


class _Codec(Struct, frozen=True):
    """From a value to what `json` writes, and back."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


@cache
def _codec(kind: Any) -> _Codec:
    origin, args = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _scalar(kind)
    if is_struct_type(kind):
        return _record(kind)
    if origin is Literal:
        return _literal(args)
    if origin is tuple:
        return _sequence(args[0]) if args[1:] == (...,) else _row(args)
    if origin in (Mapping, dict):
        return _mapping(*args)
    if origin in (Union, types.UnionType):
        return _union(args)
    raise TypeError(f"no text for values of type {kind!r}")


def _scalar(kind: type) -> _Codec:
    accepted = (int, float) if kind is float else (kind,)

    def to_json(value: Any) -> Any:
        if type(value) not in accepted:  # not isinstance: True is no number
            raise TypeError(f"{value!r} stands where {kind.__name__} is declared")
        return kind(value)

    def from_json(data: Any) -> Any:
        if type(data) not in accepted:
            raise DecodeError(f"expected {kind.__name__}, found {_shown(data)}")
        try:
            value = kind(data)
        except OverflowError as error:
            raise DecodeError(f"{_shown(data)} is too large for a float") from error
        if kind is float and not math.isfinite(value):  # 1e999 is JSON, and infinite
            raise DecodeError(f"expected a finite float, found {_shown(data)}")
        return value

    return _Codec(to_json, from_json)


def _literal(allowed: tuple[Any, ...]) -> _Codec:
    known = {(type(value), value) for value in allowed}

    def to_json(value: Any) -> Any:
        if (type(value), value) not in known:
            raise TypeError(f"{value!r} is none of {allowed}")
        return value

    def from_json(data: Any) -> Any:
        if isinstance(data, (dict, list)) or (type(data), data) not in known:
            raise DecodeError(f"expected one of {', '.join(map(repr, allowed))}, found {_shown(data)}")
        return data

    return _Codec(to_json, from_json)


def _record(kind: type[Struct]) -> _Codec:
    declared = fields(kind)
    codecs = {field.name: _codec(field.type) for field in declared}
    required = frozenset(field.name for field in declared if field.required)

    def to_json(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{value!r} stands where {kind.__name__} is declared")
        return {name: codec.encode(getattr(value, name)) for name, codec in codecs.items()}

    def from_json(data: Any) -> Any:
        if not isinstance(data, dict):
            raise DecodeError(f"expected an object ({kind.__name__}), found {_shown(data)}")
        if not required <= data.keys():
            raise DecodeError(f"{kind.__name__} without {', '.join(sorted(required - data.keys()))}")
        values: dict[str, Any] = {}
        for name, part in data.items():
            try:
                values[name] = codecs[name].decode(part)
            except KeyError:
                raise DecodeError(f"{kind.__name__} has no {name!r}") from None
            except DecodeError as error:
                raise error.inside(f".{name}") from None
        return kind(**values)

    return _Codec(to_json, from_json)


def _sequence(item: Any) -> _Codec:
    codec = _codec(item)
    return _Codec(
        lambda value: [codec.encode(part) for part in value],
        lambda data: tuple(_at(index, codec, part) for index, part in enumerate(_list(data))),
    )


def _row(items: tuple[Any, ...]) -> _Codec:
    codecs = tuple(_codec(item) for item in items)

    def from_json(data: Any) -> Any:
        if len(_list(data)) != len(codecs):
            raise DecodeError(f"expected {len(codecs)} items, found {len(data)}")
        return tuple(_at(index, codec, part) for index, (codec, part) in enumerate(zip(codecs, data, strict=True)))

    return _Codec(lambda value: [codec.encode(part) for codec, part in zip(codecs, value, strict=True)], from_json)


def _mapping(key: Any, item: Any) -> _Codec:
    if key not in (str, int):
        raise TypeError(f"no text for keys of type {key!r}")
    keys, codec = _codec(key), _codec(item)

    def from_json(data: Any) -> Any:
        if not isinstance(data, dict):
            raise DecodeError(f"expected an object, found {_shown(data)}")
        values: dict[Any, Any] = {}
        for name, part in data.items():
            try:
                values[key(name)] = codec.decode(part)
            except DecodeError as error:
                raise error.inside(f"[{name!r}]") from None
            except ValueError as error:
                raise DecodeError(f"expected {key.__name__} as key, found {name!r}") from error
        return values

    return _Codec(lambda value: {str(keys.encode(k)): codec.encode(v) for k, v in value.items()}, from_json)


def _union(args: tuple[Any, ...]) -> _Codec:
    members = tuple(arg for arg in args if arg is not types.NoneType)
    if len(members) == 1:
        inner = _codec(members[0])
    elif all(is_struct_type(member) for member in members):
        inner = _tagged(members)
    elif all(member in _SCALARS for member in members):
        inner = _either(members)
    else:
        raise TypeError(f"no text for a union of {args}: scalars and structs do not mix")
    if len(members) == len(args):
        return inner
    return _Codec(
        lambda value: None if value is None else inner.encode(value),
        lambda data: None if data is None else inner.decode(data),
    )


def _tagged(members: tuple[Any, ...]) -> _Codec:
    codecs = {member.__name__: _codec(member) for member in members}

    def to_json(value: Any) -> Any:
        tag = type(value).__name__
        if tag not in codecs:
            raise TypeError(f"{value!r} is none of {', '.join(codecs)}")
        return {_TAG: tag, **codecs[tag].encode(value)}

    def from_json(data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(tag := data.get(_TAG), str) or tag not in codecs:
            raise DecodeError(f"expected an object whose {_TAG!r} is one of {', '.join(codecs)}, found {_shown(data)}")
        return codecs[tag].decode({name: part for name, part in data.items() if name != _TAG})

    return _Codec(to_json, from_json)


def _either(members: tuple[Any, ...]) -> _Codec:
    codecs = {member: _codec(member) for member in members}

    def to_json(value: Any) -> Any:
        if type(value) not in codecs:
            raise TypeError(f"{value!r} is none of {members}")
        return value

    def from_json(data: Any) -> Any:
        if type(data) not in codecs:
            raise DecodeError(f"expected {' or '.join(member.__name__ for member in members)}, found {_shown(data)}")
        return codecs[type(data)].decode(data)

    return _Codec(to_json, from_json)


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise DecodeError(f"expected a list, found {_shown(data)}")
    return data


def _at(index: int, codec: _Codec, data: Any) -> Any:
    try:
        return codec.decode(data)
    except DecodeError as error:
        raise error.inside(f"[{index}]") from None


def _shown(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 60 else text[:57] + "..."
