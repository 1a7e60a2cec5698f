"""Predictions from what was measured."""

from __future__ import annotations

from reconciler.loop.history import predicted, usual_runs
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import Spec

SETPOINTS = """\
version: 1
endpoints:
  ask: {model: m, gpus: 1, port: 8001, stop: {drain: 5s, grace: 2s}, health: {startup: 40s}}
  other: {model: m, gpus: 1, port: 8002}
"""


def read() -> Spec:
    return resolve(SourceText("setpoints.yaml", SETPOINTS), [], hostname="box", read_env_file=lambda _: b"")


def test_a_prediction_is_the_95th_percentile_of_what_was_measured() -> None:
    found = predicted({("ask", "load"): [float(n) for n in range(1, 41)]}, read())
    assert found["ask"].load_s == 38.0


def test_what_was_not_measured_is_the_engines_default_within_the_endpoints_bounds() -> None:
    found = predicted({("ask", "stop"): [1.0]}, read())
    assert found["ask"].load_s == 40.0
    assert found["ask"].drain_s == 5.0
    assert found["ask"].stop_s == 1.0
    assert "other" not in found


def test_an_edit_that_shortens_the_drain_bounds_what_was_measured_before_it() -> None:
    assert predicted({("ask", "drain"): [30.0]}, read())["ask"].drain_s == 5.0


def test_how_long_work_usually_runs_is_the_95th_percentile_of_its_runs() -> None:
    runs = [float(n) for n in range(1, 41)]
    assert usual_runs({("render", "run"): runs, ("ask", "load"): [3.0]}) == {"render": 38.0}


def test_endpoints_and_work_that_the_files_no_longer_know_are_left_out() -> None:
    assert predicted({("gone", "load"): [3.0], ("render", "run"): [300.0]}, read()) == {}
