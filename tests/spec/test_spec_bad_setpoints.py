"""What is wrong with a set-point file is told at its place, with what to do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from spec_texts import BASE, problems, read

ENDPOINT = "version: 1\nendpoints:\n  a:\n    model: m\n    port: 1\n"


@pytest.mark.parametrize(
    ("text", "where", "message", "hint"),
    [
        # the text itself
        ("", "1:1", "the file is empty", "version: 1"),
        ("# nothing yet\n", "1:1", "the file is empty", "version: 1"),
        ("- a\n", "1:1", "must be a mapping", "version: 1"),
        ("version: 1\n---\nversion: 1\n", "2:1", "second document", "---"),
        ("version: 1\nnode: {name: a\n", "2:7", "not valid YAML", "bracket"),
        ("version: 1\nnode:\n\tname: a\n", "3:1", "not valid YAML", "spaces, not tabs"),
        ("version: 1\nnode: a: b\n", "2:8", "not valid YAML", "`: `"),
        ('version: 1\nnode: {name: "a\n', "2:14", "not valid YAML", "quote"),
        ("version: 1\nnode: \x07\n", "2:7", "U+0007", "delete"),
        ("version: 1\nnode: {name: é\x00}\n", "2:15", "U+0000", "delete"),
        ('version: 1\nnode: {name: "\\0"}\n', "2:14", "NUL", "escape"),
        ("version: 1\nversion: 1\n", "2:1", 'duplicate key "version"', "line 1, column 1"),
        (ENDPOINT + "    port: 2\n", "6:5", 'duplicate key "port"', "line 5, column 5"),
        ("version: 1\n8080: a\n", "2:1", "key 8080 is not a string", '"8080"'),
        ("version: 1\n? [a]\n: b\n", "2:3", "a key must be", "quote"),
        ("version: 1\nnode: !!python/name:os.system {}\n", "2:7", "tag !!python/name:os.system", "remove"),
        ("version: 1\nnode: !mine {}\n", "2:7", "tag !mine", "remove"),
        ("version: 1\nnode: *there\n", "2:7", "alias *there has no anchor", "&there"),
        ("version: 1\nx-a: &a [*a]\n", "2:10", "contains itself", None),
        ("version: 1\nx-a: " + "9" * 40 + "\n", "2:6", "too many digits", "quote"),
        ("version: 1\nendpoints:\n  <<: 3\n", "3:7", "`<<` takes a mapping", "<<: *name"),
        # keys
        ("node: {}\n", "1:1", '"version" is missing', "version: 1"),
        ("version: 2\n", "1:10", "not a version", None),
        ("version: true\n", "1:10", "not a version", None),
        ("version: 1\nendpoint: {}\n", "2:1", 'unknown key "endpoint"', 'did you mean "endpoints"?'),
        (ENDPOINT + "    prot: 1\n", "6:5", 'unknown key "prot"', 'did you mean "port"?'),
        (ENDPOINT + "    health: {pth: /h}\n", "6:14", 'unknown key "pth"', 'did you mean "path"?'),
        (ENDPOINT + "    zzz: 1\n", "6:5", 'unknown key "zzz"', "known: args, capabilities"),
        (ENDPOINT + "    movable: true\n    gpus: [0]\n", "6:14", "pinned to its GPUs: there is nowhere", "gpus: 1"),
        (ENDPOINT + "    movable: true\n    gpus: 0\n", "6:14", "it needs no GPU: there is nowhere", "gpus: 1"),
        ("version: 1\nnode: 3\n", "2:7", "3 is not a mapping", "key: value"),
        ("version: 1\nendpoints: [a]\n", "2:12", "a list is not a mapping", "key: value"),
        ("version: 1\nendpoints:\n  a: 3\n", "3:6", "3 is not a mapping", "key: value"),
        ("version: 1\nendpoints:\n  Big: {model: m, port: 1}\n", "3:3", 'endpoint "Big"', "63"),
        ("version: 1\nendpoints:\n  " + "a" * 64 + ": {model: m, port: 1}\n", "3:3", "not allowed", "63"),
        ("version: 1\npriorities: {Top: 1}\n", "2:14", 'priority "Top"', "a-z"),
        # values
        (ENDPOINT + "    priority: true\n", "6:15", "true is not a priority", "whole number"),
        (ENDPOINT + "    priority: 1.5\n", "6:15", "1.5 is not a priority", "whole number"),
        (ENDPOINT + "    preemptible: no\n", "6:18", '"no" is not true or false', "write false"),
        (ENDPOINT + "    preemptible: 1\n", "6:18", "1 is not true or false", None),
        (ENDPOINT + "    state: runing\n", "6:12", '"runing" is not one of', 'did you mean "running"?'),
        (ENDPOINT + "    logs: {max: 64}\n", "6:17", "64 has no unit", "GiB"),
        (ENDPOINT + "    logs: {max: 512KiB}\n", "6:17", '"512KiB" is too little for a log', "write at least 1MiB"),
        (ENDPOINT + "    logs: {keep: 0}\n", "6:18", "0 is too small: at least 1", None),
        (ENDPOINT + "    logs: {kept: 1}\n", "6:12", 'unknown key "kept"', 'did you mean "keep"?'),
        (ENDPOINT + "    logs: 64MiB\n", "6:11", "is not a mapping", "key: value"),
        (ENDPOINT + "    memory: 20\n", "6:13", "20 has no unit", "GiB"),
        (ENDPOINT + "    memory: 1.5\n", "6:13", "1.5 is not a part of a GPU", "0.45"),
        (ENDPOINT + "    memory: .nan\n", "6:13", "not a part of a GPU", "0.45"),
        (ENDPOINT + "    memory: 90%\n", "6:13", '"90%"', None),
        (ENDPOINT + "    memory: 20 elephants\n", "6:13", "not a size", "GiB"),
        (ENDPOINT + "    memory: 0GiB\n", "6:13", "more than zero", "leave"),
        (ENDPOINT + "    memory: true\n", "6:13", "not a size", "GiB"),
        (ENDPOINT + "    memory: " + "9" * 500 + "GiB\n", "6:13", "not a size", "GiB"),
        (ENDPOINT + "    stop: {grace: 30}\n", "6:19", "30 has no unit", "30s"),
        (ENDPOINT + "    stop: {grace: 1:30}\n", "6:19", "'1:30' is not a duration", "30s"),
        (ENDPOINT + "    stop: {grace: -3s}\n", "6:19", "not a duration", "30s"),
        (ENDPOINT + "    stop: {grace: P200Y}\n", "6:19", "not a duration", "30s"),
        (ENDPOINT + "    stop: {signal: SIGKILL}\n", "6:20", "SIGKILL", "SIG"),
        (ENDPOINT + "    health: {interval: 0s}\n", "6:24", "longer than zero", None),
        (ENDPOINT + "    health: {failures: 0}\n", "6:24", "at least 1", None),
        (ENDPOINT + "    health: {failures: true}\n", "6:24", "not a whole number", None),
        (ENDPOINT + "    health: {path: health}\n", "6:20", "path of a URL", "/"),
        (ENDPOINT + "    evict: {level: 3}\n", "6:20", "too large", None),
        (ENDPOINT + "    gpus: []\n", "6:11", "empty", "0 for none"),
        (ENDPOINT + "    gpus: -1\n", "6:11", "count is from 0", None),
        (ENDPOINT + "    gpus: [0, 1, 0]\n", "6:18", "GPU 0 is listed twice", None),
        (ENDPOINT + "    gpus: [0, x]\n", "6:15", '"x" names no GPU', "nvidia-smi"),
        (ENDPOINT + "    gpus: all\n", "6:11", '"all"', None),
        (ENDPOINT + "    args: --max-model-len 4\n", "6:11", "must be a list", '["--max-model-len", "4"]'),
        (ENDPOINT + "    args: [--max-model-len, 4]\n", "6:29", "4 is not a text", "quotes"),
        (ENDPOINT + "    args: [--port=3]\n", "6:12", "args may not set the port", "port:"),
        (ENDPOINT + "    capabilities: chat\n", "6:19", "not a list", "[chat]"),
        (ENDPOINT + "    capabilities: [chat, chat]\n", "6:26", '"chat" is listed twice', None),
        (ENDPOINT + "    env: {A: 1}\n", "6:14", "not a text", "quotes"),
        (ENDPOINT + "    env: {1A: x}\n", "6:11", "not the name of a variable", None),
        (ENDPOINT + '    env: {CUDA_VISIBLE_DEVICES: "0"}\n', "6:11", "belongs to the reconciler", "remove"),
        (ENDPOINT + "    env: {RECONCILER_X: y}\n", "6:11", "belongs to the reconciler", "remove"),
        (ENDPOINT + "    env: {A=B: c}\n", "6:11", '"A=B" is not the name of a variable', "`NAME: value`"),
        (ENDPOINT + "    restart: {max: 1s, initial: 10s}\n", "6:33", "`restart.initial` is 10s and", "`max` longer"),
        (ENDPOINT + "    restart: {max: 500ms}\n", "6:20", "the longest wait, is 0.5s", "`initial` shorter"),
        (ENDPOINT + "    restart: {initial: 10m}\n", "6:24", "`restart.initial` is 10m and", "`max` longer"),
        (ENDPOINT + "    env_file: nowhere.env\n", "6:15", "/etc/box/nowhere.env", None),
        (ENDPOINT + "    executable:\n", "6:5", '"executable" has no value', "remove the line"),
        (ENDPOINT + "    env:\n      HF_HOME:\n", "7:7", '"HF_HOME" has no value', "write one"),
        (ENDPOINT + "    args:\n    - --foo\n    -\n", "8:6", "null is not a text", "quotes"),
        ("version: 1\nendpoints:\n  a: {model: m, port: 70000}\n", "3:23", "70000 is not a port", None),
        ("version: 1\nendpoints:\n  a: {model: m, port: 80.0}\n", "3:23", "80.0 is not a port", None),
        # engines
        ("version: 1\nendpoints:\n  a: {model: m, port: 1, engine: vlm}\n", "3:34", '"vlm"', 'did you mean "vllm"?'),
        ("version: 1\nendpoints:\n  a: {port: 1}\n", "3:3", 'endpoint "a" has no model', "model:"),
        ("version: 1\nendpoints:\n  a: {model: m}\n", "3:3", 'endpoint "a" has no port', "port:"),
        ("version: 1\nendpoints:\n  a: {engine: custom}\n", "3:3", "no command", "command"),
        ("version: 1\nendpoints:\n  a: {engine: custom, command: []}\n", "3:32", "command is empty", "program"),
        ("version: 1\nendpoints:\n  a: {engine: custom, command: [x, '{port}']}\n", "3:36", "no port", "port:"),
        ("version: 1\nendpoints:\n  a: {model: m, port: 1, command: [x]}\n", "3:35", "own command", "custom"),
        (ENDPOINT + "    engine: llamacpp\n    evict: {method: sleep}\n", "7:21", "cannot sleep", "sglang, vllm"),
        (ENDPOINT + "    engine: sglang\n    evict: {method: sleep, level: 2}\n", "7:35", "no sleep level 2", "1"),
        (ENDPOINT + '    health: {path: "/a\\x01"}\n', "6:20", "is not the path of a URL", "begins with `/`"),
        # between endpoints
        (
            BASE + "  x: {model: m, port: 8080}\n",
            "17:23",
            'port 8080 is already taken by endpoint "thinking"',
            "line 5",
        ),
        (BASE + "  x: {model: m, port: 1, gpus: [1]}\n", "17:32", 'GPU 1 is pinned by "thinking"', "standby"),
        (BASE + "  x: {model: m, port: 1, gpus: [7]}\n", "17:32", "GPU 7 is not in node.gpus", "0, 1, 2, 3"),
        (BASE + "  x: {model: m, port: 1, gpus: 5}\n", "17:32", "5 GPUs are wanted, node.gpus has 4", "0, 1"),
        (BASE + "  x: {model: m, port: 1, priority: standin}\n", "17:36", "unknown priority", '"standing"'),
        (BASE + "capabilities: {chat: {min_available: 2}}\n", "17:38", "at most 1", "thinking"),
        (BASE + "capabilities: {chta: {min_available: 1}}\n", "17:16", "no endpoint offers", '"chat"'),
        (
            BASE
            + "  x: {model: m, port: 1, gpus: [3], memory: 0.7}\n  y: {model: m, port: 2, gpus: [3], memory: 0.4}\n",
            "18:45",
            "GPU 3 is pinned for 1.10",
            "add up to 1",
        ),
    ],
)
def test_a_mistake_is_told_where_it_is(text: str, where: str, message: str, hint: str | None) -> None:
    found = problems(text)
    assert len(found) == 1, "\n".join(map(str, found))
    told = found[0]
    assert f"{told.line}:{told.column}" == where
    assert told.file == "/etc/box/setpoints.yaml"
    assert message in f"{told.message}"
    if hint is not None:
        assert hint in (told.hint or "")


def test_every_mistake_is_told_at_once_in_file_order() -> None:
    text = BASE + "  x: {port: 8080, stop: {grace: 3}, enginee: vllm}\n  y: {model: m, port: 1, priority: low}\n"
    assert [(p.line, p.message) for p in problems(text + "polcy: {}\n")] == [
        (17, 'endpoint "x" has no model'),
        (17, "3 has no unit"),
        (17, 'unknown key "enginee"'),
        (19, 'unknown key "polcy"'),
    ]  # priorities cannot be looked up while the header is broken
    assert [p.line for p in problems(text)] == [17, 17, 17, 18]


def test_the_value_of_a_variable_is_never_repeated() -> None:
    for env in ("{TOKEN: 31337}", "{TOKEN: [hunter2]}", "{TOKEN: {a: hunter2}}", "hunter2", "[hunter2]"):
        told = "\n".join(map(str, problems(ENDPOINT + f"    env: {env}\n")))
        assert told
        assert "31337" not in told
        assert "hunter2" not in told or env == "hunter2"


def test_a_mistake_in_defaults_is_told_once() -> None:
    text = BASE.replace("endpoints:", "defaults: {stop: {grace: 3}}\nendpoints:")
    assert [str(p).splitlines()[0] for p in problems(text)] == [
        "/etc/box/setpoints.yaml:4:26: 3 has no unit",
    ]


def test_no_more_than_a_hundred_problems_are_told() -> None:
    assert len(problems("version: 1\n" + "".join(f"k{i}: 1\n" for i in range(3000)))) == 100


WHOLE = """\
version: 1
node: {gpus: [0, 1], reserve: 1GiB}
priorities: {high: 900}
capabilities: {ask: {min_available: 1}}
defaults: {env: {A: b}, health: {interval: 5s}}
notify: {chat: {command: [x, y]}}
engines:
  x:
    like: vllm
    args: [--a, "{port}"]
    env: {C: d}
    busy_metrics: [m]
    failures: [{pattern: p, kind: K, hint: h}]
    sleep:
      args: [--s]
      env: {E: f}
      level_1: {sleep: [{path: /p, answer: {a: true}}], wake: [{path: /w}]}
endpoints:
  e:
    engine: x
    model: m
    port: 8001
    gpus: [0, 1]
    priority: high
    capabilities: [ask]
    args: [--foo]
    env: {G: h}
    health: {path: /h}
    evict: {method: sleep, level: 1}
"""
JOB = """\
version: 1
makespan: {duration: 20m}
gpus: [0]
requires: [ask]
workload: {command: [x, y], env: {A: b}}
set: {e: {args: [--bar], env: {B: c}}}
"""


def places(node: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Each key and item below."""
    for step, below in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else ()):
        yield (*path, step)
        yield from places(below, (*path, step))


def emptied(document: object, path: tuple[str | int, ...]) -> str:
    """The text without a value at `path`."""
    document = copy.deepcopy(document)
    owner: Any = document
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = None
    return yaml.safe_dump(document, sort_keys=False)


def test_nothing_that_has_no_value_drops_an_endpoint_or_overlay_in_silence() -> None:
    """Dropped without a problem, an endpoint would count as removed, and be stopped."""
    assert not problems(WHOLE, {"job.yaml": JOB})
    for setpoints, job in (
        *((emptied(yaml.safe_load(WHOLE), path), JOB) for path in places(yaml.safe_load(WHOLE)) if path[1:]),
        *((WHOLE, emptied(yaml.safe_load(JOB), path)) for path in places(yaml.safe_load(JOB)) if path[1:]),
    ):
        if not problems(setpoints, {"job.yaml": job}):
            spec = read(setpoints, {"job.yaml": job})
            assert (set(spec.endpoints), set(spec.overlays)) == ({"e"}, {"job"}), f"{setpoints}\n---\n{job}"
