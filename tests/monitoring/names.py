"""Names of metrics: those that the programs make, and those that rules, dashboards and examples use."""

import json
import re

from files import ADAPTER, GRAFANA, REPOSITORY, alerts, records

# Where a page is written: page.gauge("moesaic_...", ...).
WRITTEN = re.compile(r'\.(counter|counters|gauge|gauges|histogram)\(\s*"((?:moesaic|process)_\w+)"')
LITERAL = re.compile(r'"((?:moesaic|process)_\w+)"')
USED = re.compile(r"(?<![\w:])(?:moesaic|process)_\w+(?![\w:])")
RECORDED = re.compile(r"\b\w+:moesaic_\w+:\w+")
# A selector, and its matchers.
SELECTOR = re.compile(r"(?<![\w:])(moesaic_\w+|up)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


def sources() -> dict[str, str]:
    """{path: text} of the files that write metrics."""
    folders = ("coordinator/src", "attention-worker/src", "expert-worker/src", "crates/node/src")
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.rs"))]
    # metrics.rs is how pages are written; the names in its tests are no metrics.
    texts = {path: path.read_text() for path in paths if path != REPOSITORY / "crates/node/src/metrics.rs"}
    return {str(path.relative_to(REPOSITORY)): text for path, text in texts.items() if LITERAL.search(text)}


def made() -> dict[str, str]:
    """{name: counter, gauge or histogram}, from the programs' sources."""
    return {name: kind.rstrip("s") for text in sources().values() for kind, name in WRITTEN.findall(text)}


def family(name: str) -> str:
    """Without what a histogram appends."""
    bare = re.sub(r"_(bucket|sum|count)$", "", name)
    return bare if made().get(bare) == "histogram" else name


def queries() -> dict[str, str]:
    """{where: PromQL} of all rules and panels."""
    found = {f"alert {name}": rule["expr"] for name, rule in alerts().items()}
    found |= {f"record {name}": expr for name, expr in records().items()}
    for path in sorted(GRAFANA.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                found[f"{path.name}: {panel['title']} {target['refId']}"] = target["expr"]
    return found


def used() -> dict[str, set[str]]:
    """{name: where it is used}"""
    texts = queries() | {ADAPTER.name: ADAPTER.read_text().replace("moesaic_cache_used_ratio", "")}
    found = {}
    for where, text in texts.items():
        for name in USED.findall(text):
            found.setdefault(family(name), set()).add(where)
    return found
