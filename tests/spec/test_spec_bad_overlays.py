"""What is wrong with an overlay file rejects that file alone, and is told at its place."""

from __future__ import annotations

import pytest
from spec_texts import BASE, problems, read

TOP = "version: 1\nmakespan: {duration: 5m}\n"
SPAN = "version: 1\ngpus: 1\nmakespan: "


@pytest.mark.parametrize(
    ("text", "where", "message", "hint"),
    [
        ("", "1:1", "the file is empty", "version: 1"),
        ("version: 1\ngpus: 1\n", "1:1", '"makespan" is missing', "duration"),
        (TOP, "1:1", "asks for nothing", "requires"),
        (TOP + "gpus: 0\n", "3:7", "no GPUs asks for nothing", None),
        (TOP + "workload:\n", "3:1", '"workload" has no value', "remove"),
        (TOP + "gpu: 1\nrequires: [chat]\n", "3:1", 'unknown key "gpu"', '"gpus"'),
        (TOP + "gpus: 5\n", "3:7", "5 GPUs are wanted", "0, 1, 2, 3"),
        (TOP + "gpus: [9]\n", "3:7", "GPU 9 is not in node.gpus", None),
        (TOP + "memory: 16GiB\nworkload: {command: [x]}\n", "3:9", "memory is claimed, and no GPUs", "gpus: 1"),
        (TOP + "memory: 16GiB\ngpus: 0\nworkload: {command: [x]}\n", "3:9", "no GPUs", "gpus: 1"),
        (TOP + "gpus: 1\npriority: standin\n", "4:11", 'unknown priority "standin"', '"standing"'),
        (TOP + "requires: [chat, resoning]\n", "3:18", '"resoning"', '"reasoning"'),
        (TOP + "workload: {command: make all}\n", "3:21", "must be a list", '["make", "all"]'),
        (TOP + "workload: {env: {}}\n", "3:1", '"command" is missing', "program"),
        (TOP + "workload: {command: [x], env: {CUDA_DEVICE_ORDER: a}}\n", "3:32", "belongs to", None),
        (TOP + "workload: {command: [x], env_file: no.env}\n", "3:36", "/etc/box/overlays/no.env", None),
        (TOP + "workload: {command: [x], user: no-such-user}\n", "3:32", 'no user "no-such-user"', "/etc/passwd"),
        (TOP + "workload: {command: [x], logs: {max: 1KiB}}\n", "3:38", "too little for a log", "1MiB"),
        (TOP + "workload: {command: [x], retries: -1}\n", "3:35", "at least 0", None),
        (TOP + "on_edit: restart\ngpus: 1\n", "3:10", "not one of wait, replace", None),
        # when
        (SPAN + "{}\n", "3:11", "neither duration nor deadline", "duration: 20m"),
        (SPAN + "\n", "3:10", "neither duration nor deadline", "duration: 20m"),
        (SPAN + "{duration: 0s}\n", "3:22", "longer than zero", None),
        (SPAN + "{duration: 20}\n", "3:22", "20 has no unit", "30s"),
        (SPAN + "{duration: 1h, start: tomorrow}\n", "3:33", "not a time", "2026-11-23T22:00:00+01:00"),
        (SPAN + "{duration: 1h, start: 2026-02-30T00:00:00Z}\n", "3:33", "day is out of range", None),
        (SPAN + "{duration: 1h, start: 2026-11-23T22:00:00}\n", "3:33", "has no time zone", "+01:00"),
        (
            SPAN + "{duration: 1h, start: 2026-03-29T02:30:00, timezone: Europe/Berlin}\n",
            "3:33",
            "does not exist in Europe/Berlin",
            "gap",
        ),
        (
            SPAN + "{start: 2026-11-23T22:00:00Z, deadline: 2026-11-23T22:00:00+01:00}\n",
            "3:51",
            "not after the start",
            None,
        ),
        (SPAN + "{duration: 1h, schedule: 0 22 * * *}\n", "3:36", "needs a time zone", "Europe/Berlin"),
        (
            SPAN + "{duration: 1h, timezone: Europe/Berlin, schedule: 0 25 * * *}\n",
            "3:61",
            "bad hour",
            "minute hour day",
        ),
        (SPAN + "{duration: 1h, timezone: UTC, schedule: 0 22 * *}\n", "3:51", "4 fields", "five fields"),
        (SPAN + "{duration: 1h, timezone: UTC, schedule: 0 0 30 2 *}\n", "3:51", "bad day", "five fields"),
        (SPAN + "{timezone: UTC, schedule: 0 0 1 * *}\n", "3:12", "neither duration nor deadline", "20m"),
        (
            SPAN + "{duration: 1h, timezone: UTC, schedule: 0 0 1 * *, start: 2026-11-23T22:00:00Z}\n",
            "3:51",
            "exclude each other",
            None,
        ),
        (
            SPAN + "{duration: 1h, timezone: UTC, schedule: 0 0 1 * *, deadline: 2026-11-23T22:00:00Z}\n",
            "3:72",
            "one moment",
            "on_overrun",
        ),
        (SPAN + "{duration: 1h, timezone: Berlin}\n", "3:36", 'unknown time zone "Berlin"', '"Europe/Berlin"'),
        (SPAN + "{duration: 1h, timezone: Europe}\n", "3:36", 'unknown time zone "Europe"', None),
        (SPAN + "{duration: 1h, timezone: ../../etc/passwd}\n", "3:36", "unknown time zone", "IANA"),
        # set
        (TOP + "set: {codin: {state: stopped}}\n", "3:7", 'unknown endpoint "codin"', '"coding"'),
        (TOP + "set: {coding: {stat: stopped}}\n", "3:16", 'unknown key "stat"', '"state"'),
        (TOP + "set: {coding: {priority: high}}\n", "3:26", 'unknown priority "high"', None),
        (TOP + "set: {extra: {port: 1}}\n", "3:7", 'endpoint "extra" has no model', "model:"),
        (
            TOP + "set: {extra: {model: m, port: 8081}}\n",
            "3:31",
            'port 8081 is already taken by endpoint "coding"',
            None,
        ),
        (TOP + "set: {coding: {port: 8080}}\n", "3:22", 'taken by endpoint "thinking"', "setpoints.yaml:5"),
        (TOP + "set: {coding: {engine: sglan}}\n", "3:24", '"sglan"', '"sglang"'),
        (
            TOP + "set:\n  a: {model: m, port: 1, gpus: [2]}\n  b: {model: m, port: 2, gpus: [2]}\n",
            "5:32",
            'GPU 2 is pinned by "a" too',
            None,
        ),
        (
            TOP + "set: {thinking: {state: stopped}}\nrequires: [reasoning]\n",
            "4:12",
            "is stopped (thinking)",
            "standby",
        ),
    ],
)
def test_a_mistake_is_told_where_it_is(text: str, where: str, message: str, hint: str | None) -> None:
    found = problems(BASE, {"job.yaml": text})
    assert len(found) == 1, "\n".join(map(str, found))
    told = found[0]
    assert told.file == "/etc/box/overlays/job.yaml"
    assert (f"{told.line}:{told.column}", message in told.message) == (where, True), str(told)
    if hint is not None:
        assert hint in (told.hint or "")


def test_a_rejected_file_leaves_the_others_in_force() -> None:
    spec = read(BASE, {"bad.yaml": "version: [", "good.yaml": TOP + "gpus: 1\n"})
    assert list(spec.overlays) == ["good"]
    assert {p.file for p in spec.problems} == {"/etc/box/overlays/bad.yaml"}


def test_one_name_in_two_files_rejects_both() -> None:
    spec = read(BASE, {"job.yaml": TOP + "gpus: 1\n", "job.yml": TOP + "gpus: 1\n"})
    assert not spec.overlays
    assert [p.message for p in spec.problems] == [
        'overlay "job" is also in /etc/box/overlays/job.yml',
        'overlay "job" is also in /etc/box/overlays/job.yaml',
    ]


def test_a_file_whose_stem_is_no_name_is_rejected() -> None:
    assert "My Job" in problems(BASE, {"My Job.yaml": TOP + "gpus: 1\n"})[0].message


def test_a_clash_with_the_set_points_is_told_in_the_overlay_file() -> None:
    base = BASE.replace("    port: 8081\n", "    port: 8081\n    evict: {method: sleep}\n")
    found = problems(base, {"job.yaml": TOP + "set: {coding: {engine: tei}}\n"})
    assert [(p.file, p.line) for p in found] == [("/etc/box/overlays/job.yaml", 3)]
    assert "engine tei cannot sleep (from /etc/box/setpoints.yaml:17" in found[0].message


def test_broken_set_points_do_not_make_good_overlays_look_wrong() -> None:
    good = TOP + "priority: standing\nrequires: [reasoning]\nset: {coding: {state: stopped}}\n"
    broken = BASE.replace("port: 8081", "port: x")
    assert {p.file for p in problems(broken, {"job.yaml": good})} == {"/etc/box/setpoints.yaml"}
    both = problems("version: [", {"job.yaml": good + "on_edt: wait\n"})
    assert [p.file for p in both] == ["/etc/box/setpoints.yaml", "/etc/box/overlays/job.yaml"]
