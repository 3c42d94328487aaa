"""A cluster of one node of each role, as Prometheus' tests take it: the written pages, scraped again and again."""

import pages

STEPS = 40
INTERVAL = "15s"
# When STEPS are over.
THE_END = "10m"


def input_series() -> list[dict]:
    """Counters grow by their value at each scrape, gauges stay."""
    found = []
    for role, page in pages.written().items():
        target = {"namespace": "a", "pod": f"{role}-0", "component": role}
        found.append({"series": series("up", target), "values": f"1x{STEPS}"})
        for sample in page.samples:
            grows = page.types[page.family(sample.name)] != "gauge"
            values = f"0+{sample.value:g}x{STEPS}" if grows else f"{sample.value:g}x{STEPS}"
            found.append({"series": series(sample.name, sample.labels | target), "values": values})
    return found


def series(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in labels.items()) + "}"
