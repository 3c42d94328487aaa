"""The dashboards are current, Grafana can lay them out, and every query is one that a running cluster answers."""

import json

import pytest

import cluster
import dashboards
from files import ALERTS, GRAFANA
from promtool import check_rules, run_test

FILES = sorted(GRAFANA.glob("*.json"))
WIDTH = 24


def panels(path) -> list[dict]:
    return json.loads(path.read_text())["panels"]


def queries(path) -> dict[str, str]:
    """As Grafana asks them, for a cluster in namespace a."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$namespace", "a")
        .replace("$__rate_interval", "1m")
        for panel in panels(path)
        for target in panel.get("targets", [])
    }


def test_the_files_are_what_the_generator_writes():
    assert {path.name: path.read_text() for path in FILES} == dashboards.files()


def test_each_is_another_one():
    documents = [json.loads(path.read_text()) for path in FILES]
    assert len({document["uid"] for document in documents}) == len({d["title"] for d in documents}) == len(FILES) == 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_have_their_places(path):
    taken = set()
    assert [panel["id"] for panel in panels(path)] == list(range(1, len(panels(path)) + 1))
    for panel in panels(path):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < WIDTH, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_work_for_any_data_source_and_cluster(path):
    variables = {variable["name"]: variable for variable in json.loads(path.read_text())["templating"]["list"]}
    assert variables.keys() == {"datasource", "namespace"}
    for panel in panels(path):
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            assert 'namespace=~"$namespace"' in target["expr"], panel["title"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_prometheus_understands_the_queries(path, tmp_path):
    rules = [{"record": f"query_{i}", "expr": expr} for i, expr in enumerate(queries(path).values())]
    assert f"{len(rules)} rules found" in check_rules(tmp_path, rules)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_running_cluster_answers_them(path, tmp_path):
    cases = [
        {"expr": f"count({expr}) > bool 0", "eval_time": cluster.THE_END, "exp_samples": [{"labels": "{}", "value": 1}]}
        for expr in queries(path).values()
    ]
    test = {"interval": cluster.INTERVAL, "input_series": cluster.input_series(), "promql_expr_test": cases}
    run_test(tmp_path, [ALERTS], test)


def test_a_query_without_an_answer_is_found(tmp_path):
    case = {"expr": "count(moesaic_nothing) > bool 0", "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": 1}]}
    test = {"interval": cluster.INTERVAL, "input_series": cluster.input_series(), "promql_expr_test": [case]}
    with pytest.raises(AssertionError, match="moesaic_nothing"):
        run_test(tmp_path, [ALERTS], test)
