"""What each overlay is for: its size, what its workers stand on, and that DeepSeek-V3 fits where it says so."""

import pytest
import yaml
from manifests import ATTENTION_WORKER, COORDINATOR, EXPERT_WORKER, K8S, ROLES
from manifests import named, of_kind, pod_spec, render, settings, workload
from rules.availability import copies_stand, least_replicas, one_a_node

# DeepSeek-V3 in FP8: an expert is 3 x 7168 x 2048 values of a byte, and a scale of 4 bytes for each 128 x 128 of them.
EXPERTS = 58 * 256
EXPERT_BYTES = 3 * 7168 * 2048 * (1 + 4 / 128**2)
# What an attention worker holds, and a token in its latent cache: 576 values of 2 bytes for each of 61 layers.
ATTENTION_BYTES, TOKEN_BYTES = 20.1e9, 576 * 2 * 61
# For what is computed and sent.
ROOM_BYTES = 8e9
GPUS = {"NVIDIA-H100-80GB-HBM3": 80e9, "NVIDIA-H200": 141e9, "NVIDIA-L40S": 48e9}


@pytest.mark.parametrize(
    "overlay, replicas, apart",
    [
        # Each pod is a domain of its own: the demo runs on one node.
        ("demo", (2, 2, 3), "on pods, several a node"),
        # Nodes of 8 GPUs: the placement keeps copies on different nodes.
        ("v3-h100", (2, 8, 33), "on nodes, several a node"),
        # Nodes of one GPU: the scheduler does too.
        ("mixed", (2, 4, 49), "on nodes, one a node"),
    ],
)
def test_size_and_failure_domains(overlay, replicas, apart):
    docs = render(overlay)
    assert tuple(least_replicas(docs, role) for role in ROLES) == replicas
    assert copies_stand(docs) == apart
    assert one_a_node(docs, COORDINATOR) == (overlay != "demo")


def gpu_bytes(docs, role) -> float:
    return GPUS[pod_spec(workload(docs, role))["nodeSelector"]["nvidia.com/gpu.product"]]


@pytest.mark.parametrize("overlay, lost_at_once", [("v3-h100", 8), ("mixed", 1)])
def test_two_copies_of_v3_fit_even_after_a_node_is_lost(overlay, lost_at_once):
    docs = render(overlay)
    workers = workload(docs, EXPERT_WORKER)["spec"]["replicas"]
    slots = settings(docs, EXPERT_WORKER)["expert_slots"]
    copies = settings(docs, COORDINATOR)["replicas"] * EXPERTS
    assert copies <= slots * (workers - lost_at_once)
    assert copies <= slots * settings(docs, COORDINATOR)["expert_workers"]
    assert slots * EXPERT_BYTES + ROOM_BYTES <= gpu_bytes(docs, EXPERT_WORKER)


@pytest.mark.parametrize("overlay", ["v3-h100", "mixed"])
def test_the_latent_cache_fits_and_is_not_small(overlay):
    docs = render(overlay)
    memory = settings(docs, ATTENTION_WORKER)["memory"]
    cache = int(memory.removesuffix("GiB")) << 30
    assert ATTENTION_BYTES + cache + ROOM_BYTES <= gpu_bytes(docs, ATTENTION_WORKER)
    assert cache / TOKEN_BYTES > 500_000


def test_the_halves_of_mixed_stand_on_unlike_nodes():
    docs = render("mixed")
    products = {role: pod_spec(workload(docs, role))["nodeSelector"] for role in (ATTENTION_WORKER, EXPERT_WORKER)}
    assert products[ATTENTION_WORKER] != products[EXPERT_WORKER]


def test_weights_are_one_claim_read_by_many(docs, overlay):
    claims = of_kind(docs, "PersistentVolumeClaim")
    mounted = {
        role: [
            v["persistentVolumeClaim"]
            for v in pod_spec(workload(docs, role))["volumes"]
            if "persistentVolumeClaim" in v
        ]
        for role in ROLES
    }
    if overlay == "demo":
        assert not claims and not any(mounted.values())
        return
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadOnlyMany"]]
    assert all(volumes == [{"claimName": "weights", "readOnly": True}] for volumes in mounted.values())
    volume = yaml.safe_load((K8S / "examples/weights-volume.yaml").read_text())
    wanted = claims[0]["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= volume["metadata"]["labels"].items()


def test_the_demo_needs_nothing_but_kubernetes():
    docs = render("demo")
    assert {doc["apiVersion"].partition("/")[0] for doc in docs} == {"v1", "apps", "policy", "networking.k8s.io"}
    assert not any("nodeSelector" in pod_spec(doc) for doc in of_kind(docs, "StatefulSet"))
    assert named(docs, "StatefulSet", "etcd")["spec"]["replicas"] == 1


def test_what_is_scaled_by_is_made_by_the_adapter(docs, overlay):
    adapter = yaml.safe_load((K8S / "examples/prometheus-adapter.yaml").read_text())
    made = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    scaled = {
        m["pods"]["metric"]["name"] for d in of_kind(docs, "HorizontalPodAutoscaler") for m in d["spec"]["metrics"]
    }
    assert scaled <= made
    assert bool(scaled) == (overlay == "v3-h100")
