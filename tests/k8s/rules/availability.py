"""K3: what may be taken away at a time, and what stands where."""

from commands import environment, expand
from manifests import ATTENTION_WORKER, COMPONENT, COORDINATOR, EXPERT_WORKER, ROLES, WORKLOADS
from manifests import flags, of_kind, pod_labels, pod_spec, selects, title, workload

BUDGETS = {
    COORDINATOR: {"minAvailable": 1},
    ATTENTION_WORKER: {"maxUnavailable": 1},
    EXPERT_WORKER: {"maxUnavailable": 1},
}
HOSTNAME = "kubernetes.io/hostname"


def disruption_budgets(docs):
    pods = [pod_labels(doc) for doc in of_kind(docs, *WORKLOADS)]
    budgets = {}
    for doc in of_kind(docs, "PodDisruptionBudget"):
        spec = doc["spec"]
        for labels in pods:
            if selects(spec["selector"], labels):
                role = labels[COMPONENT]
                if role in budgets:
                    yield f"{role} has two budgets: evictions fail"
                budgets[role] = {k: spec[k] for k in ("minAvailable", "maxUnavailable") if k in spec}
    if budgets != BUDGETS:
        yield f"budgets are {budgets}; expected {BUDGETS}"


def one_pod_may_go(docs):
    for role in ROLES:
        least = least_replicas(docs, role)
        if least < 2:
            yield f"{role}: {least} replicas; with its budget no node could be drained, or a loss is an outage"


def least_replicas(docs, role) -> int:
    scalers = [d for d in of_kind(docs, "HorizontalPodAutoscaler") if d["spec"]["scaleTargetRef"]["name"] == role]
    return scalers[0]["spec"].get("minReplicas", 1) if scalers else workload(docs, role)["spec"].get("replicas", 1)


def one_a_node(docs, role) -> bool:
    """Whether the scheduler never puts two of a role's pods on one node."""
    doc = workload(docs, role)
    anti = (pod_spec(doc).get("affinity") or {}).get("podAntiAffinity", {})
    return any(
        term["topologyKey"] == HOSTNAME and selects(term["labelSelector"], pod_labels(doc))
        for term in anti.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    )


def copies_stand(docs) -> str:
    """What keeps the copies of an expert apart: the placement puts them on workers with different `--node`."""
    doc = workload(docs, EXPERT_WORKER)
    (container,) = pod_spec(doc)["containers"]
    domain = expand(flags(container)["node"], environment(doc, container, ordinal=7, node="node-x"))
    by_domain = {"node-x": "on nodes", "zone-a": "in zones", f"{EXPERT_WORKER}-7": "on pods"}[domain]
    return f"{by_domain}, {'one a node' if one_a_node(docs, EXPERT_WORKER) else 'several a node'}"


def scaled_by_what_is_there(docs):
    for doc in of_kind(docs, "HorizontalPodAutoscaler"):
        spec = doc["spec"]
        target = spec["scaleTargetRef"]
        found = [d for d in of_kind(docs, target["kind"]) if d["metadata"]["name"] == target["name"]]
        if not found:
            yield f"{title(doc)}: no {target['kind']} {target['name']}"
        for scaled in found:
            if "replicas" in scaled["spec"]:
                yield f"{title(scaled)}: replicas is set, and its autoscaler would be overruled"
        if not spec["minReplicas"] < spec["maxReplicas"]:
            yield f"{title(doc)}: nothing to scale between {spec['minReplicas']} and {spec['maxReplicas']}"
        if target["name"] == EXPERT_WORKER:
            yield "expert workers are scaled by load; their number is the model's"
