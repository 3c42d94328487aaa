"""K1: the Pod Security Standard *restricted*, and beyond it a root file system that cannot be written."""

from manifests import WORKLOADS, containers, of_kind, pod_spec, title

VOLUME_TYPES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
HOST_NAMESPACES = ("hostNetwork", "hostPID", "hostIPC")


def namespace_is_restricted(docs):
    namespaces = of_kind(docs, "Namespace")
    if len(namespaces) != 1:
        yield f"{len(namespaces)} namespaces; expected 1"
    for namespace in namespaces:
        for mode in ("enforce", "audit", "warn"):
            level = namespace["metadata"].get("labels", {}).get(f"pod-security.kubernetes.io/{mode}")
            if level != "restricted":
                yield f"{title(namespace)}: {mode} is {level}"
    expected = {namespace["metadata"]["name"] for namespace in namespaces}
    for doc in docs:
        if doc["kind"] != "Namespace" and doc["metadata"].get("namespace") not in expected:
            yield f"{title(doc)} is in the namespace {doc['metadata'].get('namespace')}"


def pods_are_restricted(docs):
    for doc in of_kind(docs, *WORKLOADS):
        spec, where = pod_spec(doc), title(doc)
        for name in HOST_NAMESPACES:
            if spec.get(name):
                yield f"{where}: {name}"
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True:
            yield f"{where}: runAsNonRoot is not true"
        if not context.get("runAsUser"):
            yield f"{where}: runAsUser is {context.get('runAsUser')}"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: seccompProfile is not RuntimeDefault"
        if context.get("sysctls"):
            yield f"{where}: sysctls"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{where}: automountServiceAccountToken is not false"
        for volume in spec.get("volumes", []):
            kinds = volume.keys() - {"name"}
            if len(kinds) != 1 or not kinds <= VOLUME_TYPES:
                yield f"{where}: volume {volume['name']} is of type {sorted(kinds)}"
        for container in containers(doc):
            yield from container_is_restricted(f"{where}, container {container['name']}", container)


def container_is_restricted(where, container):
    context = container.get("securityContext", {})
    for field, wanted in (("allowPrivilegeEscalation", False), ("readOnlyRootFilesystem", True)):
        if context.get(field) is not wanted:
            yield f"{where}: {field} is not {wanted}"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{where}: capabilities are {context.get('capabilities')}"
    for field in ("privileged", "procMount"):
        if context.get(field):
            yield f"{where}: {field}"
    for field, pods in (("runAsNonRoot", True), ("runAsUser", None), ("seccompProfile", None)):
        if context.get(field, pods) != pods:
            yield f"{where}: {field} is not the pod's"
    for port in container.get("ports", []):
        if "hostPort" in port:
            yield f"{where}: hostPort {port['hostPort']}"


def accounts_have_no_token(docs):
    for account in of_kind(docs, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{title(account)}: automountServiceAccountToken is not false"
