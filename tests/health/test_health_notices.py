"""What a notifier is told: each incident's opening, worsening and end, once each, whatever happened meanwhile."""

from __future__ import annotations

from health_box import T0
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.health.incident import Incident
from reconciler.health.notices import Notice, after, due


def incident(name: str = "chat", severity: str = "warning", state: str = "open", opened: float = T0.wall) -> Incident:
    return Incident(
        f"Unplanned/{name}@{int(opened)}", "Unplanned", name, severity, "is away", state, T0, opened, opened
    )


def told(*incidents: Incident) -> dict[str, Incident]:
    return {each.id: each for each in incidents}


def changes(incidents: list[Incident], known: dict[str, Incident], least: str = "warning") -> list[tuple[str, str]]:
    return [(notice.change, notice.incident.subject) for notice in due(incidents, known, least)]


def test_an_incident_is_told_once_and_its_ups_and_downs_are_not() -> None:
    assert changes([incident()], {}) == [("opened", "chat")]
    assert changes([incident()], told(incident())) == []
    assert changes([incident(state="recovering")], told(incident())) == []
    assert changes([replace(incident(), count=7)], told(incident())) == []


def test_one_that_gets_worse_is_told_again_and_one_that_gets_better_is_not() -> None:
    assert changes([incident(severity="critical")], told(incident())) == [("escalated", "chat")]
    assert changes([incident()], told(incident(severity="critical"))) == []


def test_less_than_the_least_severity_is_not_told_until_it_is_worse() -> None:
    assert changes([incident()], {}, least="critical") == []
    assert changes([incident(severity="critical")], {}, least="critical") == [("opened", "chat")]


def test_what_is_not_told_keeps_nothing_else_from_being_told() -> None:
    ended, lesser = incident("ended", state="resolved"), incident("lesser", severity="info")
    assert changes([ended, lesser, incident("chat")], {}) == [("opened", "chat")]


def test_the_end_is_told_of_what_was_told_alone() -> None:
    assert changes([], told(incident())) == [("resolved", "chat")]
    assert changes([incident(state="resolved")], {}) == []
    ended = replace(incident(state="resolved"), resolved_at=T0.wall + 400)
    (notice,) = due([ended], told(incident()), "warning")
    assert (notice.change, notice.incident.resolved_at) == ("resolved", T0.wall + 400)


def test_the_same_trouble_opened_anew_is_another_incident() -> None:
    later = incident(opened=T0.wall + 1000)
    assert changes([later], told(incident())) == [("resolved", "chat"), ("opened", "chat")]


def test_an_end_that_is_told_twice_changes_nothing_the_second_time() -> None:
    other, ended = incident("other"), [Notice("resolved", incident())]
    once = after(told(incident(), other), ended)
    assert after(once, ended) == once == told(other)


incidents = st.lists(
    st.builds(
        incident,
        st.sampled_from("abcd"),
        st.sampled_from(["info", "warning", "critical"]),
        st.sampled_from(["open", "recovering", "resolved"]),
        st.sampled_from([T0.wall, T0.wall + 1000]),
    ),
    unique_by=lambda each: each.id,
    max_size=6,
)


@given(incidents, incidents, st.sampled_from(["info", "warning", "critical"]))
def test_whoever_was_told_what_was_due_is_up_to_date(now: list[Incident], before: list[Incident], least: str) -> None:
    known = told(*(each for each in before if each.state != "resolved"))
    known = after(known, due(now, known, least))
    assert due(now, known, least) == ()
    assert set(known) <= {each.id for each in now if each.state != "resolved"}
