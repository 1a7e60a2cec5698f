"""What people write for one value, and what it means: durations, sizes, priorities, claims, names, moments.

Each type here reads plain data of the YAML tree, raises ValueError with a message for a person, and carries its own
JSON Schema, so that models stay lists of fields.
"""

# ruff: noqa: TRY004 - pydantic collects ValueError alone; a TypeError would end the reading at the first problem

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import PlainValidator, StrictBool, StrictInt, StrictStr, WithJsonSchema

from reconciler.spec.spec import GpuClaim, GpuCount, GpuPins, MemoryBytes, MemoryClaim, MemoryFraction
from reconciler.units import (
    DURATION_HELP,
    FIRST_YEAR,
    LAST_YEAR,
    SIZE_HELP,
    format_size,
    parse_duration,
    parse_size,
)

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
NAME_HELP = "a name has at most 63 of a-z, 0-9, `.`, `_`, `-`, and begins with a letter or a digit"
OWNED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
OWNED_PREFIX = "RECONCILER_"
MAX_GPUS = 64
VARIABLE_HELP = "letters, digits and _, not a digit first, then its value: `NAME: value`"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_METRIC = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*", re.ASCII)
_URL = re.compile(r"https?://[^\s/?#]+\S*", re.ASCII)
_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z/-]{4,80}", re.ASCII)
_FRACTION = re.compile(r"[01]?\.[0-9]+|1", re.ASCII)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?\s?(?:[Zz]|[+-]\d\d(?::?\d\d)?)?", re.ASCII)
_MOST_TEXT = 64  # longer than any number with a unit
_MOST_BYTES = 1 << 50
LEAST_LOG_BYTES = 1 << 20
"""Less than the end of a stack trace is of no use, and holes are punched in blocks of 64 KiB."""

DURATION_PATTERN = r"^\s*((\d+(\.\d+)?(ms|[smhdw]))+|[Pp].+)\s*$"
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGTkmgt][Ii]?)?[Bb]\s*$"


class ItemError(ValueError):
    """One item of a list is wrong; `index` says which."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def _shown(value: object) -> str:
    """A value as YAML would write it, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------- durations and sizes


def read_duration(value: object) -> float:
    """Seconds; zero is allowed.

    Raises:
        ValueError: not a duration.
    """
    if _is_number(value):
        raise ValueError(f"{_shown(value)} has no unit; {DURATION_HELP}")
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise ValueError(f"{_shown(value)} is not a duration; {DURATION_HELP}")
    return parse_duration(value)


def _read_positive_duration(value: object) -> float:
    seconds = read_duration(value)
    if seconds <= 0:
        raise ValueError("must be longer than zero")
    return seconds


def read_size(value: object) -> int:
    """Bytes.

    Raises:
        ValueError: not a size.
    """
    if _is_number(value):
        raise ValueError(f"{_shown(value)} has no unit; {SIZE_HELP}")
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise ValueError(f"{_shown(value)} is not a size; {SIZE_HELP}")
    size = parse_size(value)
    if size > _MOST_BYTES:
        raise ValueError(f"{_shown(value)} is more than any GPU has")
    return size


def _read_log_size(value: object) -> int:
    size = read_size(value)
    if size < LEAST_LOG_BYTES:
        raise ValueError(f"{_shown(value)} is too little for a log; write at least {format_size(LEAST_LOG_BYTES)}")
    return size


_DURATION_SCHEMA = {"type": "string", "pattern": DURATION_PATTERN}
_SIZE_SCHEMA = {"type": "string", "pattern": SIZE_PATTERN}

Duration = Annotated[float, PlainValidator(read_duration), WithJsonSchema(_DURATION_SCHEMA)]
PositiveDuration = Annotated[float, PlainValidator(_read_positive_duration), WithJsonSchema(_DURATION_SCHEMA)]
Size = Annotated[int, PlainValidator(read_size), WithJsonSchema(_SIZE_SCHEMA)]
LogSize = Annotated[int, PlainValidator(_read_log_size), WithJsonSchema(_SIZE_SCHEMA)]


# ---------------------------------------------------------------- claims


def _read_memory(value: object) -> MemoryClaim:
    text = value.strip() if isinstance(value, str) and len(value) <= _MOST_TEXT else None
    if isinstance(value, float) or (text is not None and _FRACTION.fullmatch(text)):
        fraction = float(value if isinstance(value, float) else text or "")
        if not 0 < fraction <= 1:
            raise ValueError(
                f"{_shown(value)} is not a part of a GPU; a fraction is above 0 and at most 1, such as 0.45"
            )
        return MemoryFraction(fraction)
    if _is_number(value):
        raise ValueError(f"{_shown(value)} has no unit; {SIZE_HELP}; or a fraction of the GPU: 0.45")
    if text is not None and text.endswith("%"):
        raise ValueError(f"{_shown(value)}: write a part of a GPU as a fraction, such as 0.45")
    try:
        size = read_size(value)
    except ValueError as error:
        raise ValueError(f"{error}; or a fraction of the GPU: 0.45") from None
    if size <= 0:
        raise ValueError("must be more than zero; leave `memory` out for the whole GPU")
    return MemoryBytes(size)


def _read_ref(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is not the index of a GPU; they count from 0")
        return value
    if isinstance(value, str) and _UUID.fullmatch(value):
        return value
    raise ValueError(f"{_shown(value)} names no GPU; write an index such as 0, or a UUID as `nvidia-smi -L` prints it")


def _read_refs(value: list[object]) -> tuple[int | str, ...]:
    refs: list[int | str] = []
    if len(value) > MAX_GPUS:
        raise ValueError(f"more than {MAX_GPUS} GPUs")
    for index, item in enumerate(value):
        try:
            ref = _read_ref(item)
        except ValueError as error:
            raise ItemError(index, str(error)) from None
        if ref in refs:
            raise ItemError(index, f"GPU {ref} is listed twice")
        refs.append(ref)
    return tuple(refs)


def _read_gpus(value: object) -> GpuClaim:
    if isinstance(value, list):
        if not value:
            raise ValueError("the list is empty; write 0 for none")
        return GpuPins(_read_refs(value))
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= MAX_GPUS:
            raise ValueError(f"{value} GPUs: a count is from 0 to {MAX_GPUS}")
        return GpuCount(value)
    raise ValueError(f"{_shown(value)}: write a count such as 2, or a list of GPUs such as [0, 1]")


def _read_node_gpus(value: object) -> tuple[int | str, ...] | None:
    if value == "all":
        return None
    if isinstance(value, list):
        return _read_refs(value)
    raise ValueError(f"{_shown(value)}: write `all`, or a list of indices or UUIDs such as [0, 1]")


_REF_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{_UUID.pattern}$"}]
}
_REFS_SCHEMA = {"type": "array", "items": _REF_SCHEMA, "uniqueItems": True, "maxItems": MAX_GPUS}

Memory = Annotated[
    MemoryClaim,
    PlainValidator(_read_memory),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, _SIZE_SCHEMA]}),
]
Gpus = Annotated[
    GpuClaim,
    PlainValidator(_read_gpus),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_GPUS}, {**_REFS_SCHEMA, "minItems": 1}]}
    ),
]
NodeGpus = Annotated[
    tuple[int | str, ...] | None,
    PlainValidator(_read_node_gpus),
    WithJsonSchema({"anyOf": [{"const": "all"}, _REFS_SCHEMA]}),
]


# ---------------------------------------------------------------- numbers, names, texts


def _read_priority(value: object) -> int | str:
    """A number, or a name that the set points must know; which, is resolved later."""
    if isinstance(value, str) and NAME.fullmatch(value):
        return value
    return read_priority_number(value)


def read_priority_number(value: object) -> int:
    """A priority as a number.

    Raises:
        ValueError: not a whole number in range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{_shown(value)} is not a priority; write a whole number, bigger is more important")
    if abs(value) > 1_000_000:
        raise ValueError(f"{value} is out of range; a priority is from -1000000 to 1000000")
    return value


def _read_version(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value != 1:
        raise ValueError(f"{_shown(value)} is not a version this program knows; write `version: 1`")
    return value


def _read_port(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError(f"{_shown(value)} is not a port; write a whole number from 1 to 65535")
    return value


def _read_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{_shown(value)} is not a text" if value != "" else "the text is empty")
    return value


def _read_path(value: object) -> str:
    text = _read_text(value)
    if not text.startswith("/") or not text.isprintable() or any(char.isspace() for char in text):
        raise ValueError(f"{_shown(text)} is not the path of a URL; it begins with `/`")
    return text


def _read_word(value: object) -> bool | int | str:
    if not isinstance(value, bool | int | str):
        raise ValueError("is no text, whole number, true or false")
    return value


def _read_url(value: object) -> str:
    """An address that may be a secret: no message repeats it."""
    text = value.strip() if isinstance(value, str) else ""
    if not _URL.fullmatch(text):
        raise ValueError("is no address such as https://ntfy.sh/topic")
    return text


def _read_header(value: object) -> str:
    """The value of a header, which may be a secret: no message repeats it."""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise ValueError("is no header: write one line of plain ASCII, quoted")
    return value


def _read_env_value(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("the value is not a text; put it in quotes")  # and is not shown: it may be a secret
    return value


def _read_words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError:
            words = value.split()
        raise ValueError(f"must be a list, never a shell line; write {_shown(words)}")
    if not isinstance(value, list):
        raise ValueError(f'{_shown(value)} is not a list; write ["program", "argument"]')
    for index, word in enumerate(value):
        if not isinstance(word, str):
            raise ItemError(index, f"{_shown(word)} is not a text; put it in quotes")
    return tuple(value)


def _read_metrics(value: object) -> tuple[str, ...]:
    names = _read_words(value)
    for index, name in enumerate(names):
        if not _METRIC.fullmatch(name):
            problem = "is not the name of a metric; write it without labels, all its samples are added up"
            raise ItemError(index, f"{_shown(name)} {problem}")
    return names


def _read_command(value: object) -> tuple[str, ...]:
    words = _read_words(value)
    if not words or not words[0].strip():
        raise ValueError("the command is empty; its first item is the program")
    return words


def _read_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{_shown(value)} is not a list; write [{value if isinstance(value, str) else 'name'}]")
    seen: set[str] = set()
    for index, item in enumerate(value):
        if not isinstance(item, str) or not NAME.fullmatch(item):
            raise ItemError(index, f"{_shown(item)} is not a name; {NAME_HELP}")
        if item in seen:
            raise ItemError(index, f"{_shown(item)} is listed twice")
        seen.add(item)
    return tuple(sorted(seen))


def variable_problem(name: str) -> str | None:
    """Why `name` may not be set in an environment; None when it may."""
    if not _VARIABLE.fullmatch(name):
        return f"{_shown(name)} is not the name of a variable"
    if name in OWNED_VARIABLES or name.startswith(OWNED_PREFIX):
        return f"{name} belongs to the reconciler"
    return None


_WORDS_SCHEMA = {"type": "array", "items": {"type": "string"}}
_NAME_SCHEMA = {"type": "string", "pattern": f"^{NAME.pattern}$"}

Priority = Annotated[
    int | str,
    PlainValidator(_read_priority),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": -1_000_000, "maximum": 1_000_000}, _NAME_SCHEMA]}),
]
PriorityNumber = Annotated[
    int,
    PlainValidator(read_priority_number),
    WithJsonSchema({"type": "integer", "minimum": -1_000_000, "maximum": 1_000_000}),
]
Version = Annotated[int, PlainValidator(_read_version), WithJsonSchema({"const": 1})]
Port = Annotated[int, PlainValidator(_read_port), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 65535})]
Text = Annotated[str, PlainValidator(_read_text), WithJsonSchema({"type": "string", "minLength": 1})]
Url = Annotated[str, PlainValidator(_read_url), WithJsonSchema({"type": "string", "pattern": r"^https?://\S+$"})]
Word = Annotated[
    bool | int | str, PlainValidator(_read_word), WithJsonSchema({"type": ["boolean", "integer", "string"]})
]
Header = Annotated[str, PlainValidator(_read_header), WithJsonSchema({"type": "string"})]
UrlPath = Annotated[str, PlainValidator(_read_path), WithJsonSchema({"type": "string", "pattern": r"^/\S*$"})]
Words = Annotated[tuple[str, ...], PlainValidator(_read_words), WithJsonSchema(_WORDS_SCHEMA)]
Metrics = Annotated[
    tuple[str, ...],
    PlainValidator(_read_metrics),
    WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": f"^{_METRIC.pattern}$"}}),
]
Command = Annotated[tuple[str, ...], PlainValidator(_read_command), WithJsonSchema({**_WORDS_SCHEMA, "minItems": 1})]
Names = Annotated[
    tuple[str, ...],
    PlainValidator(_read_names),
    WithJsonSchema({"type": "array", "items": _NAME_SCHEMA, "uniqueItems": True}),
]
Flag = StrictBool
Count = StrictInt
EnvValue = Annotated[str, PlainValidator(_read_env_value), WithJsonSchema({"type": "string"})]


# ---------------------------------------------------------------- moments


def _read_moment(value: object) -> datetime:
    """A date and time; without an offset it is naive, and the file's time zone decides."""
    if not isinstance(value, str) or not _MOMENT.fullmatch(value.strip()):
        raise ValueError(f"{_shown(value)} is not a time; write 2026-11-23T22:00:00+01:00")
    try:
        moment = datetime.fromisoformat(value.strip().upper().replace(" ", "T", 1).replace(" ", ""))
    except ValueError as error:
        raise ValueError(f"{_shown(value)} is not a time: {error}") from None
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(f"{_shown(value)} is not a time to plan for")
    return moment


def epoch(moment: datetime) -> float:
    """Seconds since the epoch of an aware time."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()


Moment = Annotated[
    datetime,
    PlainValidator(_read_moment),
    WithJsonSchema({"type": "string", "pattern": r"^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d"}),
]
Str = StrictStr
