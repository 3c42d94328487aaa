"""Where everything is that is tested here."""

from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
MONITORING = REPOSITORY / "k8s/monitoring"
ALERTS = MONITORING / "alerts.yaml"
ALERTS_TEST = MONITORING / "alerts-test.yaml"
GRAFANA = MONITORING / "grafana"
ADAPTER = REPOSITORY / "k8s/examples/prometheus-adapter.yaml"
GUIDE = REPOSITORY / "docs/operate.md"
PAGES = Path(__file__).parent / "pages"
ROLES = ("coordinator", "attention-worker", "expert-worker")


def rules() -> list[dict]:
    """Of all groups."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def records() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
