"""What rules, dashboards and examples ask for is there: metrics, their labels, and the labels' values."""

import names
import pages
from files import ROLES, records

# Set by Prometheus and by components/monitoring; and what rules and histograms make.
TARGET_LABELS = {"namespace", "pod", "component", "le"}


def test_the_sources_are_read():
    assert {path.split("/")[0] for path in names.sources()} == {
        "coordinator",
        "attention-worker",
        "expert-worker",
        "crates",
    }
    literals = {name for text in names.sources().values() for name in names.LITERAL.findall(text)}
    assert literals == names.made().keys()
    assert len(literals) > 50


def test_what_is_used_is_made():
    assert {name: where for name, where in names.used().items() if name not in names.made()} == {}


def test_what_is_made_is_used():
    # Only on a page with ?experts=all, which Prometheus does not ask for.
    assert names.made().keys() - names.used().keys() == {"moesaic_expert_holders"}


def test_what_is_recorded_is_used_and_the_other_way_round():
    used = {name for query in names.queries().values() for name in names.RECORDED.findall(query)}
    assert used == records().keys()


def test_selectors_ask_for_labels_and_values_that_there_are():
    values = pages.labels_of_all() | {"up": {}}
    seen = 0
    for where, query in names.queries().items():
        for name, matchers in names.SELECTOR.findall(query):
            known = values[names.family(name)]
            for label, operator, wanted in names.MATCHER.findall(matchers):
                assert label in known or label in TARGET_LABELS, f"{where}: {name} has no label {label}"
                there = set(ROLES) | {""} if label == "component" else known.get(label)
                asked = wanted.split("|") if operator in ("=~", "!~") else [wanted]
                assert there is None or there >= set(asked), f"{where}: {name} has no {label} of {wanted}"
                seen += there is not None
    assert seen > 20
