"""Scrape config, alert rules, dashboard and runbook, checked against the metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.events import BatchClaimed, BatchSampled, Fused, JobFinished, LeaseExpired, StageTimed
from core.ports import PoolStats
from core.settings import Settings
from core.telemetry.metrics import Metrics, metric_infos
from tests.conftest import ROOT, need

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RUNBOOK = (ROOT / "deploy" / "runbook.md").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "fuseline.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())

SERIES = {name: labels for info in metric_infos() for name, labels in info.series.items()}
"""Every series that the code gives, with its labels."""
TARGET_LABELS = {"job", "instance"}
"""Labels that Prometheus itself adds."""


def rules(kind: str) -> Iterator[dict[str, Any]]:
    """Give the rules of a kind: ``alert`` or ``record``."""
    return (rule for group in RULES["groups"] for rule in group["rules"] if kind in rule)


def dashboard_queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


EXPRESSIONS = [*(rule["expr"] for kind in ("alert", "record") for rule in rules(kind)), *dashboard_queries()]


def expression_faults(expression: str) -> set[str]:
    """Name the series and labels of a PromQL expression that do not exist."""
    faults: set[str] = set()
    recorded = {rule["record"] for rule in rules("record")}
    selectors = re.findall(
        r"(?<![\w:$])((?:fuseline|process)[\w:]*)\s*(?:\{([^}]*)\})?", re.sub(r'"fuseline[^"]*"', '""', expression)
    )
    carried = set(TARGET_LABELS)
    for name, matchers in selectors:
        if name in recorded or name.startswith("process_"):
            continue
        labels = SERIES.get(name)
        if labels is None:
            faults.add(f"no series {name}")
            continue
        carried |= labels
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        faults |= {f"no label {label} on {name}" for label in used - labels - TARGET_LABELS}
    for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression):
        faults |= {f"no label {label}" for label in re.findall(r"\w+", group) if label not in carried}
    return faults


def test_rules_and_dashboard_ask_only_for_what_exists() -> None:
    assert len(EXPRESSIONS) > 30
    assert {
        expression: expression_faults(expression) for expression in EXPRESSIONS if expression_faults(expression)
    } == {}


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(fuseline_no_such_total[5m])", "no series fuseline_no_such_total"),
        ("fuseline_job_wait_seconds", "no series fuseline_job_wait_seconds"),
        ("fuseline_images_total_count", "no series fuseline_images_total_count"),
        ('fuseline_queue_jobs{tenant="a"}', "no label tenant on fuseline_queue_jobs"),
        ("sum by (model) (fuseline_queue_jobs)", "no label model"),
        ("sum by (le) (fuseline_queue_jobs)", "no label le"),
        ("fuseline:not_recorded:ratio", "no series fuseline:not_recorded:ratio"),
    ],
)
def test_a_wrong_expression_is_noticed(expression: str, fault: str) -> None:
    assert expression_faults(expression) == {fault}


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set(re.findall(r"fuseline_\w+", "\n".join(dashboard_queries())))
    missing = [info.name for info in metric_infos() if not shown & set(info.series)]
    assert missing == []


def test_dashboard_panels_are_distinct_and_read_the_provisioned_source() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {source["uid"]}
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_grafana_finds_its_dashboards_and_prometheus_where_compose_puts_them() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "fuseline.yml").read_text())["providers"]
    mounts = [volume.split(":") for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in [target for _, target, *_ in mounts]
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in COMPOSE["services"]  # type: ignore[index]


def test_prometheus_scrapes_the_services_and_ports_that_there_are() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"]}
    assert targets["fuseline-api"]["names"] == ["api"]
    assert targets["fuseline-api"]["port"] == Settings.model_fields["api_port"].default
    assert targets["fuseline-worker"]["port"] == Settings.model_fields["worker_metrics_port"].default
    for worker in ("worker", "worker-gpu"):
        aliases = COMPOSE["services"][worker]["networks"]["default"]["aliases"]
        assert targets["fuseline-worker"]["names"] == aliases
    mounted = {volume.split(":")[0] for volume in COMPOSE["services"]["prometheus"]["volumes"]}
    assert {f"./deploy/prometheus/{name}" for name in ("prometheus.yml", *config["rule_files"])} <= mounted


def test_each_alert_has_its_section_in_the_runbook_and_each_section_its_alert() -> None:
    alerts = {rule["alert"]: rule for rule in rules("alert")}
    sections = dict(re.findall(r"(?ms)^## (\w+)$(.*?)(?=^## |\Z)", RUNBOOK))
    assert set(sections) == set(alerts)
    for name, text in sections.items():
        assert all(part in text for part in ("**Meaning.**", "**Look at**", "**Do.**")), name
        assert alerts[name]["annotations"]["runbook"] == f"deploy/runbook.md#{name.lower()}"


def test_the_runbooks_panels_and_links_exist() -> None:
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    assert set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", RUNBOOK)) <= titles
    sections = {name.lower() for name in re.findall(r"(?m)^## (\w+)$", RUNBOOK)}
    assert set(re.findall(r"\]\(#(\w+)\)", RUNBOOK)) <= sections


# --- what Prometheus itself says --------------------------------------------------------------------------------


def promtool(*words: str | Path, text: str | None = None) -> None:
    """Run promtool and expect it to be content."""
    need(shutil.which("promtool"), "promtool (Debian: apt-get install prometheus)")
    command = ["promtool", *map(str, words)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_scrape_config() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", PROMETHEUS / "rules.yml")


def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool("test", "rules", PROMETHEUS / "rules_test.yml")


def test_every_alert_is_tried_firing_and_silent() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    tried = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules("alert")}
    assert {case["alertname"] for case in tried if "exp_alerts" in case} == alerts
    assert {case["alertname"] for case in tried if "exp_alerts" not in case} == alerts


def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    # Given the dashboard's queries as rules, with Grafana's variables filled in
    filled = [query.replace("$__rate_interval", "5m").replace("$pool", "default") for query in dashboard_queries()]
    assert "$" not in "".join(filled)
    made = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(filled)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]}))
    promtool("check", "rules", path)


def test_promtool_finds_no_fault_in_a_live_exposition() -> None:
    # Given a process in which things have happened
    metrics = Metrics(pools=["default"])
    for event in (
        BatchClaimed("default", "g", "1-a", ("j",), (0.5,)),
        Fused("g", 1, 56, 0.2),
        StageTimed("sample", 2.0),
        BatchSampled(("j",), 1, 12, 2.0),
        JobFinished("j", "default", "succeeded", "", 3.0),
        LeaseExpired("default", 1),
    ):
        metrics(event)
    metrics.http_request(method="GET", route="/v1/jobs/{id}", status=200, seconds=0.01)
    metrics.watch_queue(lambda: [PoolStats("default", 1, 0, 1, 1, 1, 2.5, 1, 1, 1)])
    # Expect promtool's linter to pass what a scrape would read
    promtool("check", "metrics", text=metrics.exposition()[0].decode())
