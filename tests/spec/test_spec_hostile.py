"""Whatever a file holds, the answer is a spec or a SpecError, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spec_texts import BASE, FILE, problems, read

from reconciler.errors import Problem, SpecError
from reconciler.spec import document
from reconciler.spec.load import SourceText, resolve

LAUGHS = "version: 1\nx-a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"x-{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)
)
CAPABILITIES = ", ".join(f"c{i}" for i in range(3000))
HOSTILE: dict[str, Callable[[], str]] = {
    "billion laughs": lambda: LAUGHS,
    "a long text used often": lambda: "version: 1\nx-a: &a " + "y" * 500_000 + "\nx-b: [" + "*a, " * 9000 + "]",
    "merges of merges": lambda: (
        "version: 1\nx-a: &a {k: 1}\n"
        + "".join(f"x-{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]}}\n" for i in range(30))
    ),
    "brackets": lambda: "version: " + "[" * 1_000_000,
    "braces": lambda: "version: {a: " * 80_000,
    "dashes": lambda: "- " * 500_000,
    "question marks": lambda: "? " * 500_000,
    "indentation": lambda: "\n".join(" " * i + "a:" for i in range(1400)),
    "too large": lambda: "#" * (1 << 20) + "#",
    "comments": lambda: "#\n" * 500_000,
    "keys": lambda: "version: 1\n" + "".join(f"k{i}: 1\n" for i in range(90_000)),
    "duplicate keys": lambda: "a: 1\n" * 200_000,
    "one long key": lambda: "version: 1\n" + "q" * 1_000_000 + ": 1\n",
    "unknown long keys": lambda: "version: 1\n" + "".join("policy" * 60 + f"{i}: 1\n" for i in range(2000)),
    "anchors": lambda: "version: 1\nx-a:\n" + "".join(f"- &a{i} x\n" for i in range(70_000)),
    "numbers": lambda: "version: 1\nx-a: [" + "9" * 29 + "," + "9" * 900_000 + "]\n",
    "a long version directive": lambda: "%YAML 1." + "9" * 5000 + "\n---\nversion: 1\n",
    "endpoints": lambda: BASE + "".join(f"  e{i}: {{model: m, port: {i % 65535 + 1}}}\n" for i in range(12_000)),
    "broken endpoints": lambda: BASE + "".join(f"  e{i}: {{model: m, prot: {i}, gpus: x}}\n" for i in range(9_000)),
    "pins on one GPU": lambda: (
        BASE + "".join(f"  e{i}: {{model: m, port: {i + 1}, gpus: [3]}}\n" for i in range(8_000))
    ),
    "large defaults": lambda: (
        f"version: 1\ndefaults: {{model: {'m' * 500_000}}}\nendpoints:\n" + "".join(f"  e{i}:\n" for i in range(9_000))
    ),
    "floors": lambda: (
        "version: 1\ncapabilities:\n"
        + "".join(f"  c{i}: {{min_available: 9}}\n" for i in range(3000))
        + "endpoints:\n"
        + "".join(
            f"  e{i}: {{model: m, port: {i + 1}, gpus: [0], state: standby, capabilities: [{CAPABILITIES}]}}\n"
            for i in range(10)
        )
    ),
    "a tall duration": lambda: "version: 1\npolicy: {resync: " + "1s" * 400_000 + "}\n",
    "a tall schedule": lambda: "version: 1\nx: 1\nmakespan: {schedule: '" + "*," * 400_000 + "* * * * *'}\n",
}


HARD_TO_MEAN = {"endpoints", "broken endpoints", "pins on one GPU", "large defaults", "floors"}
"""Plain files for whoever reads them; the work is in what comes after that, whoever read them."""


@pytest.mark.parametrize(
    ("name", "loader"),
    [(n, loader) for n in HOSTILE for loader in ("libyaml", "python") if loader == "libyaml" or n not in HARD_TO_MEAN],
)
def test_a_hostile_file_is_answered_in_bounded_time(name: str, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loader == "python":
        monkeypatch.setattr(document, "_LOADER", yaml.SafeLoader)
    text = HOSTILE[name]()
    bound, spent = (8 if loader == "libyaml" else 30), []
    while not spent or (spent[-1] >= bound and len(spent) < 3):  # again, where others kept the machine busy
        started = time.process_time()
        found = problems(text, {"job.yaml": text})
        spent.append(time.process_time() - started)
        assert found
        assert all(len(str(problem)) < 2000 for problem in found)
    assert spent[-1] < bound, spent


@pytest.mark.parametrize(("content", "where", "message"), [
    (b"version: 1\nnode: {name: caf\xe9}\n", (2, 17), "0xe9 is not UTF-8"),
    (b"\xef\xbb\xbfnode: \xff\n", (1, 7), "0xff is not UTF-8"),
    (b"\xff\xfev\0e\0", (1, 1), "UTF-16"),
    (b"x" * ((1 << 20) + 1), (1, 1), "larger than 1 MiB"),
])  # fmt: skip
def test_bytes_that_are_no_text_are_told_by_position(content: bytes, where: tuple[int, int], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        document.decode(content, "f.yaml")
    (told,) = caught.value.problems
    assert ((told.line, told.column), message in told.message) == (where, True)


def test_a_byte_order_mark_does_not_move_positions() -> None:
    assert problems(document.decode(b"\xef\xbb\xbfversion: 2\n", FILE))[0].column == 10


@pytest.mark.parametrize(("written", "meant"), [
    ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2026-11-23", "2026-11-23"), ("0o17", 15), ("0x1F", 31), ("017", 17),
    ("1_000", "1_000"), ("1e3", 1000.0), (".5", 0.5), ("~", None), ("True", True), ("'true'", "true"), ("=", "="),
    ("!!str 1", "1"), ("! 1", "1"), ("!!float 1", 1.0), ("-.inf", float("-inf")), ("+3", 3), ("1.", 1.0),
])  # fmt: skip
def test_plain_values_follow_yaml_1_2(written: str, meant: object) -> None:
    from reconciler.spec.tree import plain

    value = plain(document.parse(f"a: {written}\n", "f"))["a"]  # type: ignore[index]
    assert (value, type(value)) == (meant, type(meant))


def test_merge_keys_merge_and_explicit_keys_win() -> None:
    text = BASE.replace("  coding:", "  coding: &c").replace("    port: 8081", "    port: 8081\n    priority: 7")
    spec = read(text + "  twin:\n    <<: *c\n    port: 9\n")
    assert (spec.endpoints["twin"].model, spec.endpoints["twin"].port) == ("org/code", 9)
    assert spec.endpoints["twin"].priority == 7


def never_but_a_spec_error(text: str) -> None:
    found: tuple[Problem, ...] | None = None
    try:
        resolve(
            SourceText(FILE, text),
            [SourceText("/etc/box/overlays/job.yaml", text)],
            hostname="h",
            read_env_file=lambda _path: b"A=1",
        )
    except SpecError as error:
        found = error.problems
    assert found is None or (found and all(p.message and p.line >= 1 and p.column >= 1 for p in found))


fuzz = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(st.text(max_size=200))
def test_no_text_brings_anything_but_a_spec_error(text: str) -> None:
    never_but_a_spec_error(text)


@fuzz
@given(st.binary(max_size=200))
def test_no_bytes_bring_anything_but_a_spec_error(content: bytes) -> None:
    try:
        text = document.decode(content, FILE)
    except SpecError:
        return
    never_but_a_spec_error(text)


KEYS = st.sampled_from(
    ["version", "endpoints", "set", "a", "model", "port", "gpus", "memory", "priority", "makespan", "duration", "start",
     "deadline", "schedule", "timezone", "env", "workload", "command", "args", "health", "stop", "node", "capabilities",
     "priorities", "defaults", "requires", "evict", "method", "state", "path"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["1", "30s", "20GiB", "vllm", "custom", "running", "0 22 * * *", "Europe/Berlin"])
    | st.sampled_from(["2026-11-23T22:00:00", "2026-11-23T22:00:00Z", "UTC", "all", "standing", "0.5", "[0]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5),
    max_leaves=25,
)  # fmt: skip


@fuzz
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.booleans())
def test_no_structure_brings_anything_but_a_spec_error(data: dict[str, object], flow: bool) -> None:
    data = {"version": 1, **data}
    never_but_a_spec_error(yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True))


@fuzz
@given(st.integers(0, len(BASE)), st.integers(0, 12), st.text(max_size=6))
def test_no_edit_of_a_good_file_brings_anything_but_a_spec_error(at: int, cut: int, put: str) -> None:
    never_but_a_spec_error(BASE[:at] + put + BASE[at + cut :])
