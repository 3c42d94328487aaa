"""The few things of Grafana's dashboard format that the dashboards need: rows of panels over queries to Prometheus.

A dashboard has a variable for the data source and one for the namespace, which is the cluster's name.
"""

from dataclasses import dataclass, field

WIDTH = 24
HEIGHT = 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Red where a number is wrong at all: experts that are lost, alerts that fire.
WRONG_ABOVE_ZERO = [("green", None), ("red", 1)]
WRONG_AT_ZERO = [("red", None), ("green", 1)]


@dataclass
class Panel:
    title: str
    # PromQL, and what its lines are called.
    queries: list[tuple[str, str]]
    unit: str = "short"
    # What it shows, and what it means when it is not as it should be.
    about: str = ""
    kind: str = "timeseries"
    is_stacked: bool = False
    width: int = 8
    thresholds: list[tuple[str, float | None]] = field(default_factory=lambda: [("green", None)])


@dataclass
class Dashboard:
    uid: str
    title: str
    about: str
    rows: list[tuple[str, list[Panel]]]


def stat(title: str, query: str, thresholds=None, **more) -> Panel:
    """A number, for the moment."""
    more = {"width": 4, "kind": "stat"} | more
    return Panel(title, [(query, "")], thresholds=thresholds or [("green", None)], **more)


def heatmap(title: str, query: str, about: str) -> Panel:
    """How many came into each bucket, over time."""
    return Panel(title, [(query, "{{le}}")], "s", about, kind="heatmap")


def document(dashboard: Dashboard) -> dict:
    """What Grafana imports."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["moesaic"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": VARIABLES},
        "links": [
            {"type": "dashboards", "title": "Moesaic", "tags": ["moesaic"], "keepTime": True, "includeVars": True}
        ],
        "panels": list(_placed(dashboard.rows)),
    }


VARIABLES = [
    {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
    {
        "type": "query",
        "name": "namespace",
        "label": "Cluster (namespace)",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(moesaic_build_info, namespace)", "refId": "namespace"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    },
]


def _placed(rows):
    """Panels from left to right, row after row."""
    number, y = 0, 0
    for title, panels in rows:
        number += 1
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        x, y = 0, y + 1
        height = 4 if all(panel.kind == "stat" for panel in panels) else HEIGHT
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            number += 1
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            x += panel.width
        y += height


def _panel(panel: Panel) -> dict:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expr, **_format(panel, legend)}
        for i, (expr, legend) in enumerate(panel.queries)
    ]
    steps = [{"color": color, "value": value} for color, value in panel.thresholds]
    custom = {}
    if panel.kind == "timeseries":
        custom = {"lineWidth": 1, "fillOpacity": 30 if panel.is_stacked else 5, "showPoints": "never"}
        custom["stacking"] = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "options": _options(panel),
    }


def _format(panel: Panel, legend: str) -> dict:
    """How a query is asked: over time, or for the moment."""
    match panel.kind:
        case "heatmap":
            return {"format": "heatmap", "legendFormat": legend}
        case "table":
            return {"format": "table", "instant": True, "legendFormat": legend}
        case "stat":
            return {"instant": True, "legendFormat": legend}
        case _:
            return {"legendFormat": legend}


def _options(panel: Panel) -> dict:
    match panel.kind:
        case "stat":
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"}
        case "heatmap":
            return {"calculate": False, "yAxis": {"unit": panel.unit}, "cellGap": 0, "tooltip": {"mode": "single"}}
        case "table":
            return {"showHeader": True}
        case _:
            return {
                "legend": {"displayMode": "list", "placement": "bottom"},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
