"""The page and what stands on it, from ticks of a box."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import pytest
from metrics_box import PORT_TEXT, T0, entry, incident, scrape, tick
from msgspec.structs import replace
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from reconciler.metrics.exposition import Exposition
from reconciler.metrics.page import MetricsPage
from reconciler.plan.ledger import EndpointRecord


def values(exposition: Exposition) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value."""
    _, body = exposition.text("")
    return {
        (sample.name, *(v for _, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_states_what_is_expected_and_until_when() -> None:
    exposition = Exposition()
    exposition.take(tick({"chat": "stopped", "code": "healthy"}, agenda=[entry("chat", "stopping", "stopped")]))
    seen = values(exposition)
    assert seen["reconciler_endpoint_state", "chat", "stopped"] == 1
    assert seen["reconciler_endpoint_state", "chat", "healthy"] == 0
    assert seen["reconciler_endpoint_state", "code", "healthy"] == 1
    assert seen["reconciler_endpoint_expected_state", "chat", "stopping"] == 1
    assert seen["reconciler_endpoint_planned", "chat"] == 1
    assert seen["reconciler_endpoint_planned", "code"] == 0
    assert seen["reconciler_endpoint_planned_until_timestamp_seconds", "chat"] == T0.wall + 100
    assert ("reconciler_endpoint_planned_until_timestamp_seconds", "code") not in seen


def test_a_state_that_the_entry_does_not_expect_is_not_planned_and_nor_is_one_past_its_end() -> None:
    exposition = Exposition()
    exposition.take(tick({"chat": "failed"}, agenda=[entry("chat", "stopping", "stopped")]))
    assert values(exposition)["reconciler_endpoint_planned", "chat"] == 0
    exposition.take(tick({"chat": "stopped"}, agenda=[entry("chat", "stopped")], after=101))
    assert values(exposition)["reconciler_endpoint_planned", "chat"] == 0


def test_incidents_are_gauges_while_they_last_and_counted_once() -> None:
    exposition = Exposition()
    exposition.take(tick({}))
    for after in (1, 2):
        exposition.take(tick({}, after=after, incidents=[incident(T0.wall + 1)]))
    seen = values(exposition)
    assert seen["reconciler_incidents", "Unplanned", "critical", "chat"] == 1
    assert seen["reconciler_incidents_opened_total", "Unplanned", "critical"] == 1
    exposition.take(tick({}, after=3))
    seen = values(exposition)
    assert ("reconciler_incidents", "Unplanned", "critical", "chat") not in seen
    assert seen["reconciler_incidents_opened_total", "Unplanned", "critical"] == 1


def test_what_an_earlier_daemon_saw_is_not_counted_again() -> None:
    exposition = Exposition()
    old = EndpointRecord("chat", evictions=(T0.wall - 50,))
    exposition.take(tick({"chat": "healthy"}, records=[old], incidents=[incident(T0.wall - 60)]))
    seen = values(exposition)
    assert ("reconciler_evictions_total", "chat") not in seen
    assert ("reconciler_incidents_opened_total", "Unplanned", "critical") not in seen


def test_evictions_are_counted_and_returns_measured() -> None:
    exposition = Exposition()

    def look(after: float, state: str, desired: str, **record: Any) -> None:
        kept = EndpointRecord("chat", **record)
        exposition.take(tick({"chat": state}, after=after, desired=desired, records=[kept]))

    away = {"evictions": (T0.wall + 5,), "evicted_by": "render"}
    look(0, "healthy", "running")
    look(5, "stopping", "displaced", **away)
    look(9, "stopped", "displaced", **away)
    look(60, "pending", "running", **away)
    look(70, "starting", "running", **away)
    look(90, "healthy", "running", evictions=(T0.wall + 5,))
    look(91, "healthy", "running", evictions=(T0.wall + 5,))
    seen = values(exposition)
    assert seen["reconciler_evictions_total", "chat"] == 1
    assert seen["reconciler_restore_seconds_count", "chat"] == 1
    assert seen["reconciler_restore_seconds_sum", "chat"] == 30


def test_loop_latency_driver_errors_and_untold_notices() -> None:
    exposition = Exposition()
    exposition.take(replace(tick({}), seconds=0.03))
    blind = tick({}, after=1)
    exposition.take(replace(blind, observed=replace(blind.observed, gpus_known=False), untold={"phone": 2}))
    seen = values(exposition)
    assert seen["reconciler_tick_seconds_bucket", "0.025"] == 1
    assert seen["reconciler_tick_seconds_bucket", "0.05"] == 2
    assert seen["reconciler_nvml_errors_total",] == 1
    assert seen["reconciler_nvml_up",] == 0
    assert seen["reconciler_notification_failures_total", "phone"] == 2


@pytest.fixture
def port() -> int:
    return free_port()


def test_the_page_follows_the_set_points(port: int) -> None:
    async def story() -> None:
        page = MetricsPage()
        assert await page.show(tick({})) == ()
        on = tick({"chat": "healthy"}, text=PORT_TEXT.format(port=port))
        assert [event.kind for event in await page.show(on)] == ["MetricsServed"]
        assert await page.show(on) == ()
        status, head, body = await scrape(port)
        assert status == 200
        assert "text/plain" in head
        assert 'reconciler_endpoint_state{endpoint="chat",state="healthy"} 1.0' in body
        assert (await scrape(port, "/"))[0] == 404
        assert (await scrape(port, method="POST"))[0] == 405
        _, head, body = await scrape(port, accept="application/openmetrics-text; version=1.0.0")
        assert "openmetrics" in head
        assert body.endswith("# EOF\n")
        assert [event.kind for event in await page.show(tick({}))] == ["MetricsClosed"]
        with pytest.raises(ConnectionRefusedError):
            await scrape(port)
        await page.close()

    asyncio.run(story())


def test_a_port_that_is_taken_is_told_once_and_served_when_it_is_free(port: int) -> None:
    async def story() -> None:
        page, on = MetricsPage(), tick({}, text=PORT_TEXT.format(port=port))
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))
            other.listen()
            (event,) = await page.show(on)
            assert event.kind == "MetricsFailed"
            assert str(port) in event.message
            assert list(await page.show(on)) == []
        assert [event.kind for event in await page.show(on)] == ["MetricsServed"]
        await page.close()

    asyncio.run(story())


def test_nonsense_at_the_port_hurts_nobody(port: int) -> None:
    async def story() -> None:
        page, on = MetricsPage(), tick({}, text=PORT_TEXT.format(port=port))
        await page.show(on)
        for nonsense in (b"\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"x" * 100_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(nonsense)
            writer.write_eof()
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
        assert (await scrape(port))[0] == 200
        await page.close()

    asyncio.run(story())
