"""What each container is started with, as the kubelet would: for tests that start the real programs with just that."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from manifests import containers, mounted_files, of_kind, pod_labels, pod_spec, render
from manifests import COMPONENT, WORKLOADS

# The kubelet's syntax: $(NAME) is expanded, $$(NAME) is not, and a name that is not known stays.
VARIABLE = re.compile(r"\$(\$\([^)]*\))|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class ContainerCommand(NamedTuple):
    name: str
    role: str
    command: list[str]
    args: list[str]
    env: dict[str, str]
    probes: dict[str, dict]
    ports: dict[str, int]
    pre_stop_seconds: int
    grace_seconds: int
    # Of ConfigMaps: {path in the container: text}
    files: dict[str, str]


def container_commands(overlay: str, ordinal: int = 0, node: str = "node-a") -> Iterator[ContainerCommand]:
    """Of every container of the overlay, in the pod with this ordinal on this node. An empty command is the image's."""
    docs = render(overlay)
    for doc in of_kind(docs, *WORKLOADS):
        for container in containers(doc):
            env = environment(doc, container, ordinal, node)
            yield ContainerCommand(
                name=container["name"],
                role=pod_labels(doc)[COMPONENT],
                command=[expand(word, env) for word in container.get("command", [])],
                args=[expand(word, env) for word in container.get("args", [])],
                env=env,
                probes={kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")},
                ports={port["name"]: port["containerPort"] for port in container.get("ports", [])},
                pre_stop_seconds=pre_stop_seconds(container),
                grace_seconds=pod_spec(doc).get("terminationGracePeriodSeconds", 30),
                files=mounted_files(docs, doc, container),
            )


def pre_stop_seconds(container) -> int:
    hook = container.get("lifecycle", {}).get("preStop")
    return hook["sleep"]["seconds"] if hook else 0


def environment(doc, container, ordinal: int, node: str) -> dict:
    fields = {
        "metadata.name": f"{doc['metadata']['name']}-{ordinal}",
        "metadata.namespace": doc["metadata"]["namespace"],
        "spec.nodeName": node,
        "metadata.labels['topology.kubernetes.io/zone']": "zone-a",
    }
    env = {}
    for variable in container.get("env", []):
        source = variable.get("valueFrom")
        value = fields[source["fieldRef"]["fieldPath"]] if source else expand(variable.get("value", ""), env)
        env[variable["name"]] = value
    return env


def expand(text: str, env: dict) -> str:
    return VARIABLE.sub(lambda m: m[1] if m[1] else env.get(m[2], m[0]), text)
