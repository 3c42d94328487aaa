"""Components that no overlay has by itself, over one that does not need more than Kubernetes."""

import os

import pytest
import yaml
from manifests import K8S, kustomize, named, pod_labels, pod_spec, selects, workload
from rules.availability import copies_stand
from test_rules import RULES
from test_schemas import check


@pytest.fixture
def rendered(tmp_path):
    def render(component: str) -> list:
        def relative(path):
            return os.path.relpath(path, tmp_path)

        (tmp_path / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "namespace": "moesaic-demo",
                    "resources": [relative(K8S / "overlays/demo")],
                    "components": [relative(K8S / "components" / component)],
                }
            )
        )
        return list(kustomize(tmp_path))

    return render


@pytest.mark.parametrize("component", ["zone", "monitoring"])
def test_rules_hold_with_it(component, rendered):
    docs = rendered(component)
    for doc in docs:
        check(doc)
    assert {rule.__name__: found for rule in RULES if (found := list(rule(docs)))} == {}


def test_zones_are_failure_domains(rendered):
    docs = rendered("zone")
    assert copies_stand(docs).startswith("in zones")
    for role in ("attention-worker", "expert-worker"):
        spread = {t["topologyKey"]: t["whenUnsatisfiable"] for t in pod_spec(workload(docs, role))["topologySpreadConstraints"]}
        assert spread["topology.kubernetes.io/zone"] == "DoNotSchedule"


def test_every_role_is_scraped_at_its_metrics(rendered):
    docs = rendered("monitoring")
    monitor = named(docs, "PodMonitor", "moesaic")["spec"]
    for role in ("coordinator", "attention-worker", "expert-worker"):
        doc = workload(docs, role)
        assert selects(monitor["selector"], pod_labels(doc))
        ports = {p["name"] for p in pod_spec(doc)["containers"][0]["ports"]}
        assert {e["port"] for e in monitor["podMetricsEndpoints"]} <= ports
