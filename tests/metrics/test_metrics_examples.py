"""The shipped alert rules and dashboard: valid PromQL about metrics that there are, silent about what is planned."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from metrics_box import entry, tick
from prometheus_client.parser import text_string_to_metric_families

from reconciler.metrics.exposition import Exposition
from reconciler.plan.ledger import EndpointRecord

EXAMPLES = Path(__file__).parents[2] / "examples"
ALERTS = EXAMPLES / "prometheus" / "alerts.yaml"
DASHBOARD = EXAMPLES / "grafana" / "reconciler.json"
PROMTOOL = shutil.which("promtool")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def dashboard_queries() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$instance", "box")


def names_there_are() -> set[str]:
    """Every name that the page has or declares: a family without samples yet is still declared."""
    exposition = Exposition()
    exposition.take(tick({"chat": "stopped"}, agenda=[entry("chat", "stopped")], records=[EndpointRecord("chat")]))
    names = set()
    for family in text_string_to_metric_families(exposition.text("")[1].decode()):
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + end for end in ends}
    return names


@pytest.mark.parametrize("query", [*(r["expr"] for r in rules()), *dashboard_queries()])
def test_each_query_is_promql_about_metrics_that_there_are(query: str) -> None:
    promql_parser.parse(query)
    used = set(re.findall(r"\breconciler_[a-z_]+", query))
    assert used <= names_there_are()


def test_each_alert_says_what_and_how_bad() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def test_the_alert_on_an_endpoint_is_silenced_by_its_own_plan_alone() -> None:
    (rule,) = (r for r in rules() if r["alert"] == "ReconcilerEndpointDown")
    query = promql_parser.parse(rule["expr"])
    assert str(query.op) == "unless"
    assert "reconciler_endpoint_planned" in str(query.rhs)
    assert "reconciler_endpoint_desired" in str(query.lhs)
    assert "on (instance, endpoint)" in rule["expr"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_rules_and_their_own_tests() -> None:
    for words in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([str(PROMTOOL), *words], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say_of_the_page() -> None:
    exposition = Exposition()
    exposition.take(tick({"chat": "healthy"}))
    _, page = exposition.text("")
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
