"""The forecast: it says beforehand what then happens, and draws it."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from xml.etree import ElementTree as ET
from zoneinfo import ZoneInfo

import pytest
from builders import endpoint, foreign, overlay, spec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plant import Behaviour, Plant, Run
from test_examples import baseline_of
from worlds import examples, worlds

from reconciler.plan.forecast import Forecast, forecast
from reconciler.plan.timeline import draw_forecast, forecast_data, lanes, render_forecast
from reconciler.spec.spec import Evict, MemoryBytes
from reconciler.units import GIB

DAY_S = 86400.0
SVG = "{http://www.w3.org/2000/svg}"


def foreseen(run: Run, span_s: float = DAY_S) -> Forecast:
    return forecast(run.spec, run.plant.observe(), run.ledger, run.plant.now, span_s)


def lived(run: Run, span_s: float) -> dict[str, list[tuple[float, bool]]]:
    """What then happens: when the readiness of each endpoint changes, epoch seconds."""
    changes: dict[str, list[tuple[float, bool]]] = {
        n: [] for n, e in run.spec.endpoints.items() if e.state == "running"
    }
    end = run.plant.now.mono + span_s
    while run.plant.now.mono < end:
        decided, acted = run.step()
        for name, seen in changes.items():
            ready = decided.endpoints[name].state == "healthy"
            if (seen[-1][1] if seen else True) != ready:
                seen.append((run.plant.now.wall, ready))
        if acted:
            continue
        waits = [m for m in (run.plant.next_event(), decided.next_wake.mono if decided.next_wake else None) if m]
        run.plant.advance(max(0.001, min([*waits, end]) - run.plant.now.mono))
    return changes


@pytest.mark.parametrize("name", ["nightly-training", "render-tonight", "evening-model"])
def test_what_a_forecast_of_an_example_says_then_happens_within_the_time_to_drain(name: str) -> None:
    run, run.spec = baseline_of(name)
    one = next(iter(run.spec.endpoints.values())).profile
    runs = {n: o.makespan.duration_s for n, o in run.spec.overlays.items() if o.makespan.duration_s is not None}
    run.plant.behaviour = Behaviour(load_s=one.load_s, stop_s=one.stop_s, memory_return_s=1.5, run_s=runs)
    told = foreseen(run)
    assert told.complete
    assert told.outages
    happened = lived(run, DAY_S)
    for endpoint_, changes in happened.items():
        outages = [o for o in told.outages if o.endpoint == endpoint_]
        assert [ready for _, ready in changes] == [False, True] * len(outages), endpoint_
        moments = [moment for outage in outages for moment in (outage.begin, outage.end)]
        for (actual, _), predicted in zip(changes, moments, strict=True):
            # an engine is given its drain time: the plant's engines have nothing to finish
            assert abs(actual - predicted) <= one.drain_s + 1.0, (endpoint_, actual, predicted)


def test_a_nightly_window_takes_its_gpus_at_its_start_and_the_outage_is_as_long_as_it_and_one_load() -> None:
    run, run.spec = baseline_of("nightly-training")
    run.spec = replace(run.spec, overlays={"train": run.spec.overlays["train"]})
    told = foreseen(run)
    begins = [m.at for m in told.moments if m.kind == "begin" and m.subject == "train"]
    assert [datetime.fromtimestamp(at, UTC).strftime("%H:%M") for at in begins] == ["22:00"]  # 23:00 in Berlin
    assert {b.name for b in told.bars if b.kind == "overlay" and b.phase == "running"} == {"train"}
    for outage in told.outages:
        assert outage.overlay == "train"
        load_s = run.spec.endpoints[outage.endpoint].profile.load_s
        assert 7 * 3600 + load_s <= outage.end - outage.begin <= 7 * 3600 + load_s + 60
    assert [m.subject for m in told.moments if m.kind == "back"] == ["coding", "notes"]


def test_what_cannot_be_seen_stays_unknown_and_strangers_stay_where_they_are() -> None:
    box = Plant(totals=[80 * GIB] * 3, foreign={1: [foreign(77, 60 * GIB)]}, overrides={2: {"state": "unknown"}})
    run = Run(spec(endpoint("coding", gpus=[0], port=8000), overlay("render", gpus=2, duration=600)), box)
    told = foreseen(run, 3600.0)
    assert told.complete
    assert [b.subject.name for b in told.waiting] == ["render"]
    assert {(b.gpu[-1], b.kind) for b in told.bars} == {("0", "endpoint"), ("1", "foreign")}


def test_work_that_is_under_way_ends_when_it_is_predicted_to_and_its_victim_is_back() -> None:
    files = spec(
        endpoint("coding", gpus=[0], port=8000, priority=100),
        overlay("render", gpus=[0], duration=600, priority=500, evict=True),
    )
    run = Run(replace(files, overlays={}), Plant(totals=[80 * GIB]))
    run.settle()
    run.spec = files
    run.settle(until=lambda p: p.ledger.overlays["render"].state == "active")
    run.plant.advance(200.0)
    told = foreseen(run, 3600.0)
    active = run.ledger.overlays["render"].active_since
    assert active is not None
    assert [m.kind for m in told.moments if m.subject == "render"][-1] == "end"
    ends = next(m.at for m in told.moments if m.kind == "end")
    assert abs(ends - (active.wall + 600)) < 1.0
    (outage,) = told.outages
    assert outage.overlay == "render"
    assert not outage.lasts


def test_an_endpoint_that_gives_way_by_sleeping_is_shown_asleep_and_wakes_up() -> None:
    sleeper = replace(endpoint("coding", gpus=[0], port=8000, priority=100), evict=Evict("sleep"))
    work = replace(overlay("render", gpus=[0], duration=600, priority=500, evict=True), memory=MemoryBytes(40 * GIB))
    run = Run(spec(sleeper), Plant(totals=[80 * GIB]))
    run.settle()
    run.spec = spec(sleeper, work)
    told = foreseen(run, 3600.0)
    assert [b.phase for b in told.bars if b.name == "coding"].count("asleep") == 1
    (outage,) = told.outages
    assert outage.end - outage.begin < 600 + 60


def test_what_began_or_ended_before_it_is_no_moment_of_a_forecast() -> None:
    over, live = (overlay(name, gpus=[gpu], duration=600) for gpu, name in enumerate(("over", "live")))
    run = Run(spec(over), Plant(totals=[80 * GIB] * 2))
    run.settle()
    run.spec = spec(over, live)
    run.settle(until=lambda decided: decided.ledger.overlays["live"].state == "active")
    assert run.ledger.overlays["over"].state == "done"
    assert {m.kind for m in foreseen(run, 3600.0).moments} == {"end"}
    assert {m.subject for m in foreseen(run, 3600.0).moments} == {"live"}


@examples(40)
@given(worlds(), st.sampled_from([600.0, 7200.0]))
def test_any_world_has_a_forecast_that_is_complete_the_same_twice_and_gives_no_row_two_tenants(world, span_s) -> None:
    run = Run(world.before, world.plant())
    run.settle()
    world.disturb(run.plant)
    run.spec = world.after
    told = foreseen(run, span_s)
    assert told.complete
    assert told == foreseen(run, span_s)
    for bar in told.bars:
        assert told.begin <= bar.begin < bar.end <= told.end
    for _, row in lanes(told):
        for first, second in pairwise(row):
            assert first.end <= second.begin


def test_the_text_shows_each_gpu_the_letters_the_moments_and_the_outages() -> None:
    run, run.spec = baseline_of("nightly-training")
    text = render_forecast(foreseen(run), UTC)
    rows = [line for line in text.splitlines() if line.startswith("GPU ")]
    assert [row.split()[1] for row in rows] == ["0", "1"]
    assert [set(row.split()[2]) - set(".+-") for row in rows] in (
        [{"a", "A", "B"}, {"b", "B"}],
        [{"a", "B"}, {"b", "A", "B"}],
    )
    assert "22:00:00  train begins on GPU 0, 1" in text
    assert "coding does not answer for" in text
    assert ", for train)" in text


def test_the_picture_is_sound_xml_with_a_bar_for_each_bar_and_a_mark_for_each_eviction_and_return() -> None:
    run, run.spec = baseline_of("nightly-training")
    told = foreseen(run)
    odd = replace(told, bars=(*told.bars, replace(told.bars[0], name='<&">')))
    tree = ET.fromstring(draw_forecast(odd, UTC))
    rects = [r for r in tree.iter(f"{SVG}rect") if r.get("class")]
    assert len(rects) == len(odd.bars)
    assert {t.text.split(":")[0] for r in rects for t in r.iter(f"{SVG}title")} >= {'<&">', "train", "coding"}
    marks = [p.get("class") for p in tree.iter(f"{SVG}path")]
    assert marks.count("evict") == sum(m.kind == "evict" for m in told.moments) > 0
    assert marks.count("back") == sum(m.kind == "back" for m in told.moments) > 0


def test_a_picture_says_whose_each_colour_is_and_shortens_a_name_that_its_bar_has_no_room_for() -> None:
    run, run.spec = baseline_of("nightly-training")
    told = foreseen(run)
    long = "x" * 63
    narrow = replace(told.bars[0], name=long, phase="ready", begin=told.begin, end=told.begin + DAY_S / 5)
    odd = replace(told, bars=(narrow, *told.bars[1:]))
    tree = ET.fromstring(draw_forecast(odd, UTC))
    texts = [(float(t.get("x", "0")), t.text or "") for t in tree.iter(f"{SVG}text")]
    assert {long, *{b.name for b in odd.bars if b.kind != "foreign"}} <= {text for _, text in texts}
    (short,) = [(x, text) for x, text in texts if text.endswith("…")]
    assert long.startswith(short[1][:-1])
    (bar,) = [r for r in tree.iter(f"{SVG}rect") if any((t.text or "").startswith(f"{long}:") for t in r)]
    assert short[0] + 7 * len(short[1]) <= float(bar.get("x", "")) + float(bar.get("width", ""))
    fills = {r.get("class", "").split()[0]: r.get("fill") for r in tree.iter(f"{SVG}rect") if r.get("class")}
    assert fills["endpoint"] != fills["overlay"]


def test_a_gpu_that_cannot_be_used_is_not_shown_as_free() -> None:
    run, run.spec = baseline_of("nightly-training")
    told = foreseen(run)
    (index, uuid, _), *others = told.gpus
    broken = replace(told, gpus=((index, uuid, "lost"), *others), bars=tuple(b for b in told.bars if b.gpu != uuid))
    text = render_forecast(broken, UTC)
    assert f"GPU {index}   {'x' * 72}" in text
    assert "x cannot be used" in text
    assert "x cannot be used" not in render_forecast(told, UTC)
    assert ">lost</text>" in draw_forecast(broken, UTC)


def test_ticks_skip_the_hour_that_clocks_are_set_forward_over() -> None:
    run, run.spec = baseline_of("nightly-training")
    begin = datetime(2026, 3, 28, 23, 0, tzinfo=UTC).timestamp()  # midnight; 02:00 becomes 03:00
    night = replace(foreseen(run), begin=begin, end=begin + 6 * 3600, bars=(), moments=(), outages=())
    tree = ET.fromstring(draw_forecast(night, ZoneInfo("Europe/Berlin")))
    ticks = [(t.get("x"), t.text) for t in tree.iter(f"{SVG}text") if t.get("text-anchor")]
    assert [label for _, label in ticks if label and label.endswith(":00")] == [
        "01:00",
        "03:00",
        "04:00",
        "05:00",
        "06:00",
    ]
    assert len({x for x, _ in ticks}) == len(ticks)


def test_the_json_names_gpus_by_index_and_times_in_utc() -> None:
    run, run.spec = baseline_of("nightly-training")
    data = forecast_data(foreseen(run))
    assert {b["gpu"] for b in data["bars"]} == {0, 1}
    assert all(b["from"].endswith("Z") or b["from"].endswith("+00:00") for b in data["bars"])
    assert {"from", "to", "complete", "decisions", "gpus", "bars", "moments", "outages", "waiting"} == set(data)
