"""`python3 k8s/monitoring/grafana/dashboards.py` writes the dashboards as JSON beside this file, for Grafana to import."""

import json
from pathlib import Path

from edges import EDGES
from experts import EXPERTS
from grafana import document
from overview import OVERVIEW
from path import PATH

DASHBOARDS = (OVERVIEW, PATH, EXPERTS, EDGES)


def files() -> dict[str, str]:
    """Each dashboard's file name and text."""
    return {
        f"{dashboard.uid.removeprefix('moesaic-')}.json": json.dumps(document(dashboard), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }


if __name__ == "__main__":
    for name, text in files().items():
        Path(__file__).with_name(name).write_text(text)
