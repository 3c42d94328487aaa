"""The rules are ones that Prometheus takes, do what their tests say, and no alert is without tests."""

import re
import subprocess

import pytest
import yaml

import cluster
from files import ALERTS, ALERTS_TEST, GUIDE, REPOSITORY, alerts, records, rules
from promtool import promtool, run_test


def cases() -> list[dict]:
    """Of alerts-test.yaml: each moment at which an alert is looked at."""
    tests = yaml.safe_load(ALERTS_TEST.read_text())["tests"]
    return [case for test in tests for case in test.get("alert_rule_test", [])]


def test_prometheus_takes_them():
    assert f"{len(rules())} rules found" in promtool("check", "rules", str(ALERTS))


def test_they_do_what_their_tests_say():
    assert "SUCCESS" in promtool("test", "rules", str(ALERTS_TEST))


def test_every_alert_has_a_test_that_it_fires_and_one_that_it_does_not():
    fires = {case["alertname"] for case in cases() if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases() if not case.get("exp_alerts")}
    assert fires == silent == alerts().keys()


def test_where_an_alert_fires_another_namespace_stays_silent():
    """Each test has at least two clusters, and the alert is expected in one of them alone."""
    for test in yaml.safe_load(ALERTS_TEST.read_text())["tests"]:
        for case in test.get("alert_rule_test", []):
            there = {part.split('namespace="')[1].split('"')[0] for part in (s["series"] for s in test["input_series"])}
            expected = {alert["exp_labels"]["namespace"] for alert in case.get("exp_alerts", [])}
            assert expected <= {"a"} < there, case["alertname"]


@pytest.mark.parametrize("name", alerts())
def test_it_says_what_a_reader_needs(name):
    alert = alerts()[name]
    assert name.startswith("Moesaic")
    assert alert["labels"].keys() == {"severity"} and alert["labels"]["severity"] in ("warning", "critical")
    assert alert["annotations"].keys() == {"summary", "description", "runbook"}
    assert alert["annotations"]["runbook"] == f"docs/operate.md#{name.lower()}"
    assert "$labels.namespace" in alert["annotations"]["description"]
    assert alert["annotations"]["summary"].endswith(".") and len(alert["annotations"]["summary"]) < 80


@pytest.mark.parametrize("name", records())
def test_a_record_is_called_after_its_labels_its_metric_and_what_is_done(name):
    labels, metric, _ = name.split(":")
    assert metric.startswith("moesaic_")
    assert all(f"by ({label}" in records()[name] or f", {label}" in records()[name] for label in labels.split("_"))


def test_the_written_pages_are_of_a_cluster_in_which_one_edge_is_slow_and_nothing_else_is_wrong(tmp_path):
    series = cluster.input_series()
    assert len(series) > 100
    expected = {"labels": '{alertname="MoesaicEdgeSlow"}', "value": 1}
    expr = 'count by (alertname) (max_over_time(ALERTS{alertstate="firing"}[1h]))'
    case = {"expr": expr, "eval_time": cluster.THE_END, "exp_samples": [expected]}
    run_test(tmp_path, [ALERTS], {"interval": cluster.INTERVAL, "input_series": series, "promql_expr_test": [case]})


def test_the_guide_makes_the_operators_resource_of_the_file():
    command, _, _ = re.search(r"```sh\n(\(printf .*)\n```", GUIDE.read_text())[1].partition(" | kubectl")
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    made = yaml.safe_load(done.stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load(ALERTS.read_text())


def test_they_go_by_the_interval_at_which_nodes_are_scraped():
    monitor = yaml.safe_load((REPOSITORY / "k8s/components/monitoring/pod-monitor.yaml").read_text())
    assert {endpoint["interval"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == {cluster.INTERVAL}
    assert {group["interval"] for group in yaml.safe_load(ALERTS.read_text())["groups"]} == {cluster.INTERVAL}
