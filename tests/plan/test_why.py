"""Each plan says why these victims, who would be next, and how sure it is; each blocked item when it may begin."""

from __future__ import annotations

from random import Random

from accounting import lawful, settled
from builders import NOW, endpoint, overlay, spec
from plant import overlay_state

from reconciler.plan.board import Board, Hold, Need, Tenant
from reconciler.plan.observed import Subject
from reconciler.plan.overlays import MEMORY_RETURN_S
from reconciler.plan.render import gpu_indices, plan_data, render_plan
from reconciler.plan.search import LIMIT, Search, solve
from reconciler.plan.why import judge, tell
from reconciler.plan.wishes import Wish
from reconciler.units import GIB


def test_a_plan_names_victims_the_next_best_and_where_that_is_worse() -> None:
    low, high = endpoint("low", [0], priority=30), endpoint("high", [1], priority=40)
    run = settled(low, high, gpus=2)
    run.spec = spec(low, high, overlay("render", 1))
    decided = run.decide()
    (verdict,) = decided.verdicts
    assert verdict.victims == {"low": "render"}
    assert verdict.runner_up is not None
    assert verdict.runner_up[0] == ("high",)
    assert verdict.worse == "1 of priority 40 instead of 0"
    assert verdict.optimal
    assert verdict.bound == verdict.cost
    text = render_plan(decided, gpu_indices(run.plant.observe()))
    assert "Why these victims: low for render: 1 of priority 30" in text
    assert "The next best: high (1 of priority 40 instead of 0)." in text
    data = plan_data(decided, run.plant.observe())
    assert data["proof"] == "optimal"
    assert data["verdicts"][0]["runner_up"]["victims"] == ["high"]  # type: ignore[index]
    assert decided.ledger.overlays["render"].why.startswith("low for render")


def test_where_nobody_else_would_do_it_says_so() -> None:
    low, firm = endpoint("low", [0], priority=30), endpoint("firm", [1], priority=30, preemptible=False)
    run = settled(low, firm, gpus=2)
    run.spec = spec(low, firm, overlay("render", 1))
    (verdict,) = run.decide().verdicts
    assert verdict.runner_up is None
    assert "No other victims would do." in tell(verdict)


def test_the_next_best_is_told_apart_by_what_it_costs_to_load_again() -> None:
    a, b = endpoint("a", [0], priority=30), endpoint("b", [1], priority=30, capabilities=("ask", "code"))
    run = settled(a, b, gpus=2)
    run.spec = spec(a, b, overlay("render", 1))
    (verdict,) = run.decide().verdicts
    assert verdict.victims == {"a": "render"}
    assert verdict.worse == "lost readiness 2m40s instead of 1m20s"


def test_a_gpu_that_is_free_and_kept_for_a_window_is_told_with_what_would_let_it_be_used() -> None:
    low = endpoint("low", [0], priority=30)
    run = settled(low, gpus=2)
    night = overlay("night", [1], priority=900, evict=False, start=NOW.wall + 7200)
    run.spec = spec(low, night, overlay("render", 1, duration=60))
    (verdict,) = run.decide().verdicts
    assert verdict.victims == {"low": "render"}
    assert verdict.kept == ("night",)
    assert tell(verdict)[-1].startswith("GPUs that are free are kept for night: what is surely over before")
    run.spec = spec(low, night, overlay("render", 1, duration=60, on_overrun="stop"))
    assert run.decide().verdicts == (), "nobody gives way"
    pinned = overlay("pinned", [0], duration=60)
    run.spec = spec(low, night, pinned)
    (verdict,) = run.decide().verdicts
    assert verdict.kept == (), "the other GPU would not have done"


def crowd(count: int) -> tuple[Board, list[Wish]]:
    """Many GPUs, each shared by a few with costs of their own, and gangs that want parts of them."""
    gpus = [f"gpu{i:02}" for i in range(count)]
    board = Board(dict.fromkeys(gpus, 80 * GIB), dict.fromkeys(gpus))
    for i, gpu in enumerate(gpus):
        for j in range(5):
            hold = Hold((11 + (i * 7 + j * 5) % 9) * GIB, exclusive=False)
            both = {gpu: hold, gpus[(i + j + 1) % count]: Hold(2 * GIB, exclusive=False)}
            board.add(
                Tenant(f"endpoint/e{i:02}{j}", 10 * (1 + (i + j) % 3), both, 1000 * ((i * 31 + j * 17) % 50), 0, ())
            )
    needs = [
        Need(Subject("workload", f"o{k}"), tuple(gpus), 4, dict.fromkeys(gpus, (30 + 3 * k) * GIB), exclusive=False)
        for k in range(4)
    ]
    return board, [Wish(f"overlay/o{k}", ((n,),), 500 - k, lambda _: True) for k, n in enumerate(needs)]


def test_a_search_that_ends_early_says_so_with_a_bound_that_holds() -> None:
    board, wishes = crowd(8)
    early, late = solve(wishes, board, limit=200), solve(wishes, board, limit=20_000)
    assert early is not None
    assert late is not None
    assert not early.proof.optimal
    assert early.proof.bound < early.cost
    assert early.proof.bound <= late.cost <= early.cost
    assert early.proof.bound <= late.proof.bound
    runner_up, all_seen = Search(wishes, board, limit=200).next_best(early)
    told = tell(judge(early, runner_up, all_seen=all_seen))
    assert told[-1].startswith("Not proved: the search ended after")


def test_the_work_of_a_search_is_bounded() -> None:
    board, wishes = crowd(16)
    found = solve(wishes, board, limit=300)
    assert found is not None
    assert 300 <= found.proof.steps <= 600


def test_the_earliest_start_is_the_first_end_that_really_helps() -> None:
    run = settled(endpoint("ask", [2]), gpus=3)
    short, long = overlay("short", [0], duration=600), overlay("long", [1], duration=1800)
    run.spec = spec(endpoint("ask", [2]), short, long)
    run.plant.behaviour.default_run_s = 1e6
    run.settle(until=lambda p: all(overlay_state(n, "active")(p) for n in ("short", "long")))
    began = run.ledger.overlays["long"].active_since
    assert began is not None
    run.spec = spec(endpoint("ask", [2]), short, long, overlay("pair", 2, evict=False), overlay("one", 1, evict=False))
    blocked = {b.subject.name: b for b in run.decide().blocked}
    assert blocked["one"].earliest_start == began.wall + 600 + MEMORY_RETURN_S
    assert blocked["pair"].earliest_start == began.wall + 1800 + MEMORY_RETURN_S


def test_where_no_end_helps_there_is_no_earliest_start() -> None:
    run = settled(endpoint("ask", [0], priority=900), gpus=2)
    run.spec = spec(endpoint("ask", [0], priority=900), overlay("first", [1]))
    run.settle(until=overlay_state("first", "active"))
    run.spec = spec(endpoint("ask", [0], priority=900), overlay("first", [1]), overlay("wide", [0, 1]))
    (blocked,) = [b for b in run.decide().blocked if b.subject.name == "wide"]
    assert blocked.reason == "PriorityTooLow"
    assert blocked.earliest_start is None


def test_an_end_inside_a_window_to_come_does_not_help_and_the_end_of_the_window_does() -> None:
    run = settled(gpus=1)
    first = overlay("first", [0], duration=600)
    run.spec = spec(first)
    run.plant.behaviour.default_run_s = 1e6
    run.settle(until=overlay_state("first", "active"))
    begin = NOW.wall + 900
    window = overlay("window", [0], duration=1200, start=begin, priority=700)
    run.spec = spec(first, window, overlay("later", [0], duration=3600, priority=600))
    (blocked,) = [b for b in run.decide().blocked if b.subject.name == "later"]
    assert blocked.earliest_start == begin + 1200 + MEMORY_RETURN_S


def test_a_displaced_endpoint_is_told_the_first_end_with_which_it_has_a_place() -> None:
    run = settled(endpoint("ask", 1, priority=10), gpus=2)
    both = [overlay("short", [0], duration=600), overlay("long", [1], duration=1800)]
    run.spec = spec(endpoint("ask", 1, priority=10), *both)
    run.plant.behaviour.default_run_s = 1e6
    run.settle(until=lambda p: all(overlay_state(n, "active")(p) for n in ("short", "long")))
    began = run.ledger.overlays["short"].active_since
    (blocked,) = [b for b in run.decide().blocked if b.subject.name == "ask"]
    assert blocked.reason == "EvictedBy"
    assert began is not None
    assert blocked.earliest_start == began.wall + 600


def test_forty_overlays_that_wait_at_once_are_decided_on_in_bounded_work_and_lawfully() -> None:
    draw = Random(5)
    baseline = [endpoint(f"e{i}", [i % 16], memory=30, priority=10 * (1 + i % 4), port=8000 + i) for i in range(32)]
    run = settled(*baseline, gpus=16)
    waiting = [
        overlay(
            f"o{i:02}",
            draw.choice([1, 1, 2, 4, [draw.randrange(16)]]),
            memory=draw.choice([None, 20, 40, 0.3]),
            priority=draw.choice([15, 35, 100, 600, 601]),
            evict=draw.random() < 0.8,
        )
        for i in range(40)
    ]
    run.spec = spec(*baseline, *waiting)
    decided = run.decide()
    lawful(run, decided)
    assert sum(r.state != "pending" for r in decided.ledger.overlays.values()) >= 8
    assert decided.verdicts
    assert sum(v.steps for v in decided.verdicts) <= 2.2 * LIMIT, "the choice, and the one for the next best"


def test_it_is_advised_to_wait_for_the_end_of_a_reservation_and_not_to_make_it_preemptible() -> None:
    run = settled(gpus=2)
    hold = overlay("hold", [0], workload=False, priority=100)
    work = overlay("work", [1], priority=100)
    run.spec = spec(hold, work)
    run.settle(until=lambda p: {r.state for r in p.ledger.overlays.values()} == {"active"})
    for gpu, hint in ((0, "wait for hold to end"), (1, "wait for work to end, or make the work of work preemptible")):
        run.spec = spec(hold, work, overlay("more", [gpu], priority=600))
        (said,) = run.decide().blocked
        assert said.reason == "NotPreemptible"
        assert said.alternatives == (hint,)


def test_work_that_would_have_to_displace_the_only_provider_of_what_it_requires_is_told_so() -> None:
    ask = endpoint("ask", [0], priority=30, capabilities=("ask",))
    run = settled(ask, gpus=1)
    run.spec = spec(ask, overlay("more", [0], priority=600, requires=("ask",)))
    (said,) = run.decide().blocked
    assert (said.reason, said.message) == ("FloorWouldBreak", "without ask nothing would offer ask")
    assert said.alternatives == ("add a provider",)
