"""The codec: same value, same bytes; and nothing comes back that was not such a value."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.inspect import is_struct_type
from msgspec.structs import fields, replace

from reconciler.clock import Instant
from reconciler.health.incident import Incident
from reconciler.journal.codec import DecodeError, decode, encode, encode_data
from reconciler.plan import actions, ledger, observed
from reconciler.plan.ledger import AgendaEntry, Exit, Ledger, OverlayRecord
from reconciler.spec import spec
from reconciler.spec.spec import GpuCount, GpuPins, MemoryFraction, Source, WholeGpu

KINDS = [
    kind
    for module in (spec, observed, ledger, actions)
    for kind in vars(module).values()
    if is_struct_type(kind) and kind.__module__ == module.__name__
] + [Incident]

SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8),
    int: st.integers(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    types.NoneType: st.none(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type, from its declaration alone."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in SCALARS:
        return SCALARS[kind]
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[1:] == (...,):
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if origin in (Mapping, dict):
        return st.dictionaries(values(args[0]), values(args[1]), max_size=2)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values, args))
    return st.builds(kind, **{field.name: values(field.type) for field in fields(kind)})


class Claims(Struct, frozen=True):
    """What the real types use in unions, in one place."""

    gpus: GpuPins | GpuCount | None
    memory: WholeGpu | MemoryFraction
    ports: Mapping[int, str]
    span: tuple[float, float]
    level: Literal[1, 2] = 1


CLAIMS = Claims(GpuPins((0, "GPU-1")), MemoryFraction(0.5), {8080: "a"}, (0.0, 1.5))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_shared_value_survives_its_text_unchanged(kind: type) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(values(kind))
    def survives(value: object) -> None:
        text = encode(value)
        back = decode(kind, text)
        assert back == value
        assert type(back) is kind
        assert encode(back) == text

    survives()


def test_the_order_of_maps_and_the_kind_of_number_do_not_show_in_the_bytes() -> None:
    one = Ledger(endpoints={n: ledger.EndpointRecord(n, ready_since=Instant(1, 2)) for n in "ab"})
    other = Ledger(endpoints={n: ledger.EndpointRecord(n, ready_since=Instant(1.0, 2.0)) for n in "ba"})
    assert one == other
    assert encode(one) == encode(other)


def test_the_text_is_compact_sorted_ascii_and_tags_unions_only() -> None:
    assert encode(CLAIMS) == (
        '{"gpus":{"refs":[0,"GPU-1"],"type":"GpuPins"},"level":1,"memory":{"fraction":0.5,"type":"MemoryFraction"},'
        '"ports":{"8080":"a"},"span":[0.0,1.5]}'
    )
    assert encode(Source("ä.yaml", 1, 2)) == '{"column":2,"file":"\\u00e4.yaml","line":1}'
    assert encode_data({"b": 1, "a": [None]}) == '{"a":[null],"b":1}'


def test_a_field_written_before_it_existed_takes_its_default() -> None:
    old = json.loads(encode(AgendaEntry("a", ("stopped",), 1.0, 2.0, "r", None)))
    exit_ = json.loads(encode(Exit("i", Instant(1, 1), 0, planned=True)))
    record = {"name": "a", "exits": [exit_]}
    assert decode(ledger.EndpointRecord, json.dumps(record)).streak == 0
    assert decode(AgendaEntry, json.dumps(old)).overlay is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 3}, "level: expected one of 1, 2, found 3"),
        ({"level": True}, "level: expected one of 1, 2, found true"),
        ({"gpus": {"type": "Gpus"}}, "gpus: expected an object whose 'type' is one of GpuPins, GpuCount"),
        ({"gpus": {"count": 1}}, "gpus: expected an object whose 'type'"),
        ({"gpus": {"type": "GpuCount", "count": "1"}}, 'gpus.count: expected int, found "1"'),
        ({"gpus": {"type": "GpuPins", "refs": [0, None]}}, "gpus.refs[1]: expected int or str, found null"),
        ({"memory": None}, "memory: expected an object"),
        ({"memory": {"type": "WholeGpu", "fraction": 1}}, "memory: WholeGpu has no 'fraction'"),
        ({"ports": {"http": "a"}}, "ports: expected int as key, found 'http'"),
        ({"ports": {"80": 1}}, "ports['80']: expected str, found 1"),
        ({"ports": []}, "ports: expected an object"),
        ({"span": [1.0]}, "span: expected 2 items, found 1"),
        ({"span": [1.0, True]}, "span[1]: expected float, found true"),
        ({"span": [1.0, 10**400]}, "span[1]: "),
        ({"extra": 1}, "Claims has no 'extra'"),
    ],
)
def test_a_wrong_part_is_refused_with_the_way_to_it(change: dict[str, Any], message: str) -> None:
    text = json.dumps(json.loads(encode(CLAIMS)) | change)
    with pytest.raises(DecodeError) as caught:
        decode(Claims, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected an object (Claims), found []"),
        ("{}", "Claims without gpus, memory, ports, span"),
        ('{"span":[0,NaN]}', "NaN is no number"),
        (encode(CLAIMS).replace("1.5", "1e999"), "span[1]: expected a finite float"),
        ("[" * 200_000, "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
    ],
)
def test_text_that_is_no_such_value_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(Claims, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(CLAIMS, level=3),  # type: ignore[arg-type]
        replace(CLAIMS, memory=GpuCount(1)),  # type: ignore[arg-type]
        replace(CLAIMS, ports={"80": "a"}),  # type: ignore[dict-item]
        replace(CLAIMS, gpus=GpuCount(True)),
        replace(CLAIMS, gpus=GpuPins((1.0,))),  # type: ignore[arg-type]
        replace(CLAIMS, span=(0.0, "1")),  # type: ignore[arg-type]
    ],
)
def test_a_value_that_breaks_its_own_declaration_is_not_written(wrong: Claims) -> None:
    with pytest.raises(TypeError):
        encode(wrong)


def test_an_infinite_time_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(Instant(float("inf"), 0.0))


def test_a_type_without_a_text_is_named() -> None:
    class Odd(Struct):
        path: bytes

    with pytest.raises(TypeError, match="bytes"):
        encode(Odd(b""))


def test_a_declaration_whose_text_could_not_be_read_back_is_refused_before_anything_is_written() -> None:
    class Keyed(Struct):
        by_time: dict[float, str]

    class Mixed(Struct):
        either: GpuCount | int

    for value, message in ((Keyed({}), "keys of type"), (Mixed(1), "scalars and structs do not mix")):
        with pytest.raises(TypeError, match=message):
            encode(value)


def test_a_part_of_another_type_than_declared_is_not_written() -> None:
    record = OverlayRecord("o", "active", Instant(1, 1), 1.0, "h", 5, Source("f", 1, 2))
    untimed: Any = replace(record, since=1.0)  # type: ignore[arg-type]
    unplaced: Any = replace(record, source="f:1")  # type: ignore[arg-type]
    for wrong, declared in ((untimed, "Instant"), (unplaced, "Source")):
        with pytest.raises(TypeError, match=f"stands where {declared} is declared"):
            encode(wrong)


def test_an_overlay_state_that_nobody_knows_is_refused() -> None:
    record = OverlayRecord("o", "active", Instant(1, 1), 1.0, "h", 5, Source("f", 1, 2))
    with pytest.raises(DecodeError, match="state: expected one of 'pending'"):
        decode(OverlayRecord, encode(record).replace('"active"', '"dancing"'))
