"""Pages are what Prometheus reads, by its own rules, and have what the others count on."""

import pytest

import names
import pages
from promtool import promtool


def test_promtool_likes_it(role, page):
    assert promtool("check", "metrics", text=page.text) == ""


def test_it_has_the_metrics_that_it_should(role, page):
    assert pages.differences(role, page) == []


def test_the_written_pages_are_of_the_programs_that_are_there():
    types = {name: kind for page in pages.written().values() for name, kind in page.types.items()}
    assert types == names.made()


def test_labels_are_not_those_that_prometheus_sets():
    """A metric's label of such a name would be renamed to exported_..."""
    of_targets = {"namespace", "pod", "container", "endpoint", "instance", "job", "component"}
    assert {
        name: found for name, labels in pages.labels_of_all().items() if (found := of_targets & labels.keys())
    } == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda text: text.replace("moesaic_experts ", "moesaic_expert "),
            ["moesaic_expert is not", "moesaic_experts is"],
        ),
        (
            lambda text: text.replace("inbox_frames gauge", "inbox_frames counter"),
            ["moesaic_inbox_frames is a counter"],
        ),
        (lambda text: text.replace("{reason=", "{why="), ["moesaic_frames_refused_total has the labels ['why']"]),
    ],
)
def test_a_page_that_differs_is_found(change, expected):
    changed = pages.parse(change(pages.written()["expert-worker"].text))
    found = pages.differences("expert-worker", changed)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_promtool_finds_a_counter_that_is_not_called_so():
    with pytest.raises(AssertionError, match="_total"):
        promtool("check", "metrics", text="# HELP moesaic_a A.\n# TYPE moesaic_a counter\nmoesaic_a 1\n")
