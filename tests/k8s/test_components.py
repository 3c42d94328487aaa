"""What may be put over an overlay: components that none has by itself, and images from elsewhere."""

import os
import re

import pytest
import yaml
from manifests import COMPONENT, K8S, ROLES, kustomize, named, of_kind, pod_labels, pod_spec, selects, workload
from manifests import render as render_overlay
from rules.availability import copies_stand
from rules.network import EXPECTED, allowed_edges, only_the_edges_that_exist
from rules.references import program_version
from rules.settings import keys_of
from test_rules import RULES
from test_schemas import check


@pytest.fixture
def rendered(tmp_path):
    def render(*components: str, base: str = "demo", **more) -> list:
        def relative(path):
            return os.path.relpath(path, tmp_path)

        (tmp_path / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "namespace": of_kind(render_overlay(base), "Namespace")[0]["metadata"]["name"],
                    "resources": [relative(K8S / "overlays" / base)],
                    "components": [relative(K8S / "components" / component) for component in components],
                    **more,
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
        spread = {
            t["topologyKey"]: t["whenUnsatisfiable"]
            for t in pod_spec(workload(docs, role))["topologySpreadConstraints"]
        }
        assert spread["topology.kubernetes.io/zone"] == "DoNotSchedule"


def test_every_role_is_scraped_at_its_metrics(rendered):
    docs = rendered("monitoring")
    monitor = named(docs, "PodMonitor", "moesaic")["spec"]
    for role in ROLES:
        doc = workload(docs, role)
        assert selects(monitor["selector"], pod_labels(doc))
        ports = {p["name"] for p in pod_spec(doc)["containers"][0]["ports"]}
        assert {e["port"] for e in monitor["podMetricsEndpoints"]} <= ports
        # monitoring/alerts.yaml goes by this label.
        assert pod_labels(doc)[COMPONENT] == role
    (endpoint,) = monitor["podMetricsEndpoints"]
    source = "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", COMPONENT)
    assert endpoint["relabelings"] == [{"sourceLabels": [source], "targetLabel": "component"}]


def test_traces_leave_for_the_collector_alone(rendered):
    docs = rendered("traces")
    for doc in docs:
        check(doc)
    assert allowed_edges(docs) - EXPECTED == {(role, "collector", "TCP", 4317) for role in ROLES}
    others = [rule for rule in RULES if rule is not only_the_edges_that_exist]
    assert {rule.__name__: found for rule in others if (found := list(rule(docs)))} == {}
    for role in ROLES:
        env = {e["name"]: e.get("value") for e in pod_spec(workload(docs, role))["containers"][0]["env"]}
        assert "traces" in keys_of(role) and env["MOESAIC_TRACES"].endswith(":4317")


def test_images_of_another_registry_keep_their_tags(rendered):
    name, version = "registry.example.com/moesaic", program_version()
    docs = rendered(base="v3-h100", images=[{"name": "moesaic", "newName": name}])
    images = {role: pod_spec(workload(docs, role))["containers"][0]["image"] for role in ROLES}
    assert images == {
        "coordinator": f"{name}:{version}",
        "attention-worker": f"{name}:{version}-cuda",
        "expert-worker": f"{name}:{version}-cuda",
    }
