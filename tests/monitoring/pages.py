"""What nodes answer to a scrape: read from a file, a URL or a text, and taken apart."""

import re
import urllib.request
from pathlib import Path
from typing import NamedTuple

from files import PAGES, ROLES

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Not there before the first placement is planned, or on a page without ?experts=all.
SOMETIMES = {"moesaic_placement_imbalance", "moesaic_expert_holders"}


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


class Page(NamedTuple):
    text: str
    # {name: counter, gauge or histogram}
    types: dict[str, str]
    samples: list[Sample]

    def family(self, name: str) -> str:
        """A sample's name without what histograms append."""
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        return bare if self.types.get(bare) == "histogram" else name

    def labels(self) -> dict[str, dict[str, set[str]]]:
        """{name: {label: its values}}"""
        found = {name: {} for name in self.types}
        for sample in self.samples:
            for label, value in sample.labels.items():
                found[self.family(sample.name)].setdefault(label, set()).add(value)
        return found


def read(source: str) -> Page:
    """`source`: a URL, a path, or the page itself."""
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=10) as answer:
            source = answer.read().decode()
    elif "\n" not in source:
        source = Path(source).read_text()
    return parse(source)


def parse(text: str) -> Page:
    types, samples = {}, []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            types[name] = kind
        elif line and not line.startswith("#"):
            found = SAMPLE.match(line)
            assert found, f"not a sample: {line}"
            samples.append(Sample(found[1], dict(LABEL.findall(found[2] or "")), float(found[3])))
    return Page(text, types, samples)


def written() -> dict[str, Page]:
    """By role: the pages of this folder."""
    return {role: read(str(PAGES / f"{role}.txt")) for role in ROLES}


def labels_of_all() -> dict[str, dict[str, set[str]]]:
    """{name: {label: its values}} over the pages of this folder."""
    merged = {}
    for page in written().values():
        for name, labels in page.labels().items():
            for label, values in labels.items():
                merged.setdefault(name, {}).setdefault(label, set()).update(values)
            merged.setdefault(name, {})
    return merged


def differences(role: str, page: Page) -> list[str]:
    """How a real page differs in kind from the one in this folder."""
    expected = written()[role]
    expected_labels, labels = expected.labels(), page.labels()
    found = [f"{name} is missing" for name in expected.types.keys() - page.types.keys() - SOMETIMES]
    found += [f"{name} is not in {role}.txt" for name in page.types.keys() - expected.types.keys()]
    for name in sorted(expected.types.keys() & page.types.keys()):
        if page.types[name] != expected.types[name]:
            found.append(f"{name} is a {page.types[name]}, not a {expected.types[name]}")
        # A family may have no samples yet: an idle worker has chosen no expert.
        if labels[name] and labels[name].keys() != expected_labels[name].keys():
            found.append(f"{name} has the labels {sorted(labels[name])}, not {sorted(expected_labels[name])}")
    return sorted(found)
