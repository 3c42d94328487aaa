"""Nothing points into the void: selectors, ports, volumes, Secrets, accounts. And what every container must have."""

import tomllib

from manifests import COMPONENT, REPOSITORY, WORKLOADS, containers, of_kind, pod_labels, pod_spec, selects, title

# What the operator brings; k8s/README.md says so.
BROUGHT = {("Secret", "moesaic-api-keys"), ("Secret", "moesaic-etcd-ca")}
# Where clients come in.
PUBLIC = "moesaic"


def services_find_pods(docs):
    for doc in of_kind(docs, "Service"):
        found = [
            d for d in of_kind(docs, *WORKLOADS) if selects({"matchLabels": doc["spec"]["selector"]}, pod_labels(d))
        ]
        if len(found) != 1:
            yield f"{title(doc)} selects the pods of {[title(d) for d in found]}; expected one"
        for target in found:
            names = {p["name"] for c in containers(target) for p in c.get("ports", [])}
            for port in doc["spec"]["ports"]:
                if port.get("targetPort") not in names:
                    yield f"{title(doc)}: targetPort {port.get('targetPort')} is none of {sorted(names)}"


def pods_have_names_before_they_are_ready(docs):
    for doc in of_kind(docs, "StatefulSet"):
        services = [d for d in of_kind(docs, "Service") if d["metadata"]["name"] == doc["spec"]["serviceName"]]
        if not services:
            yield f"{title(doc)}: no Service {doc['spec']['serviceName']}"
        for service in services:
            spec = service["spec"]
            if pod_labels(doc)[COMPONENT] == "etcd":
                continue  # One pod, found by its Service.
            if spec.get("clusterIP") != "None" or spec.get("publishNotReadyAddresses") is not True:
                yield f"{title(service)} does not name pods that are not ready"


def clients_meet_who_is_ready(docs):
    (public,) = [d for d in of_kind(docs, "Service") if d["metadata"]["name"] == PUBLIC]
    if public["spec"].get("publishNotReadyAddresses"):
        yield f"{title(public)}: clients are sent to coordinators that are not ready"


def workloads_select_their_own_pods(docs):
    for doc in of_kind(docs, "StatefulSet", "Deployment"):
        matched = [d for d in of_kind(docs, *WORKLOADS) if selects(doc["spec"]["selector"], pod_labels(d))]
        if matched != [doc]:
            yield f"{title(doc)} selects the pods of {[title(d) for d in matched]}"


def selectors_match_something(docs):
    pods = [pod_labels(doc) for doc in of_kind(docs, *WORKLOADS)]
    for doc in of_kind(docs, "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        selector = doc["spec"].get("selector", doc["spec"].get("podSelector"))
        if not any(selects(selector, labels) for labels in pods):
            yield f"{title(doc)} selects no pods"


def scheduling_counts_its_own_pods(docs):
    for doc in of_kind(docs, *WORKLOADS):
        for selector in scheduling_selectors(pod_spec(doc)):
            if not selects(selector, pod_labels(doc)):
                yield f"{title(doc)}: is spread from others than its own pods, {selector}"


def scheduling_selectors(spec) -> list:
    anti = (spec.get("affinity") or {}).get("podAntiAffinity", {})
    terms = anti.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    terms += [t["podAffinityTerm"] for t in anti.get("preferredDuringSchedulingIgnoredDuringExecution", [])]
    return [term["labelSelector"] for term in terms + spec.get("topologySpreadConstraints", [])]


def what_is_referred_to_exists(docs):
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    for doc in docs:
        for kind, name in references(doc):
            if (kind, name) not in there | BROUGHT:
                yield f"{title(doc)}: no {kind} {name}"


def references(doc):
    """(kind, name) of all that a resource needs."""
    if doc["kind"] == "Certificate":
        yield doc["spec"]["issuerRef"]["kind"], doc["spec"]["issuerRef"]["name"]
    if doc["kind"] not in WORKLOADS:
        return
    spec = pod_spec(doc)
    yield "ServiceAccount", spec["serviceAccountName"]
    for volume in spec.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "csi" in volume:
            yield "Issuer", volume["csi"]["volumeAttributes"]["csi.cert-manager.io/issuer-name"]
        assert "projected" not in volume, "say here what it refers to"
    for container in containers(doc):
        assert "envFrom" not in container, "say here what it refers to"
        for variable in container.get("env", []):
            for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if key in variable.get("valueFrom", {}):
                    yield kind, variable["valueFrom"][key]["name"]


def mounts_are_volumes(docs):
    for doc in of_kind(docs, *WORKLOADS):
        volumes = {v["name"]: v for v in pod_spec(doc).get("volumes", [])}
        mounts = [m for c in containers(doc) for m in c.get("volumeMounts", [])]
        if volumes.keys() != {m["name"] for m in mounts}:
            yield f"{title(doc)}: volumes are {sorted(volumes)}, mounted are {sorted(m['name'] for m in mounts)}"
        for mount in mounts:
            if "subPath" in mount:
                yield f"{title(doc)}: {mount['mountPath']} is a subPath, and never changes"
            if "emptyDir" not in volumes.get(mount["name"], {}) and mount.get("readOnly") is not True:
                yield f"{title(doc)}: {mount['mountPath']} is not mounted read-only"


def resources_are_bounded(docs):
    for doc in of_kind(docs, *WORKLOADS):
        for container in containers(doc):
            where = f"{title(doc)}, container {container['name']}"
            requests, limits = (container.get("resources", {}).get(k, {}) for k in ("requests", "limits"))
            for what in ("cpu", "memory"):
                if what not in requests or what not in limits:
                    yield f"{where}: no request or no limit of {what}"
            for what in {"memory", "nvidia.com/gpu"} & (requests.keys() | limits.keys()):
                if requests.get(what) != limits.get(what):
                    yield f"{where}: {what} is {requests.get(what)} to {limits.get(what)}"


def images_are_pinned(docs):
    version = program_version()
    for doc in of_kind(docs, *WORKLOADS):
        for container in containers(doc):
            name, _, tag = container["image"].rpartition(":")
            if not name or "/" in tag or tag == "latest":
                yield f"{title(doc)}: image {container['image']} has no fixed tag"
            elif name == "moesaic" and tag not in (version, f"{version}-cuda"):
                yield f"{title(doc)}: image {container['image']}, but the program is {version}"


def program_version() -> str:
    return tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["workspace"]["package"]["version"]


def no_variables_of_services(docs):
    for doc in of_kind(docs, *WORKLOADS):
        if pod_spec(doc).get("enableServiceLinks") is not False:
            yield f"{title(doc)}: Kubernetes adds MOESAIC_ variables of its own"
