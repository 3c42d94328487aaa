"""K4: probes that tell the truth, and time to drain."""

from commands import pre_stop_seconds
from manifests import COORDINATOR, ROLES, WORKLOADS, containers, flags, of_kind, pod_spec, settings, title, workload

PATHS = {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}


def probes_ask_the_role(docs):
    for role in ROLES:
        (container,) = pod_spec(workload(docs, role))["containers"]
        port = flags(container)["metrics_listen"].rpartition(":")[2]
        named = {p["name"]: p["containerPort"] for p in container["ports"]}
        if named.get("metrics") != int(port):
            yield f"{role}: metrics_listen is at {port}, the port metrics is {named.get('metrics')}"
        for kind, path in PATHS.items():
            asked = container.get(f"{kind}Probe", {}).get("httpGet")
            if asked != {"path": path, "port": "metrics"}:
                yield f"{role}: the {kind} probe asks {asked}; expected {path} at metrics"


def every_container_has_probes(docs):
    for doc in of_kind(docs, *WORKLOADS):
        for container in containers(doc):
            for kind in PATHS:
                probe = container.get(f"{kind}Probe")
                if probe is None:
                    yield f"{title(doc)}: no {kind} probe"
                elif probe.get("timeoutSeconds", 1) > probe.get("periodSeconds", 10):
                    yield f"{title(doc)}: the {kind} probe may take longer than its period"


def probes_are_patient_where_they_kill(docs):
    """What restarts a pod waits longer than what only takes it out of service."""
    for role in ROLES:
        (container,) = pod_spec(workload(docs, role))["containers"]
        lasts = {
            kind: container[f"{kind}Probe"].get("periodSeconds", 10)
            * container[f"{kind}Probe"].get("failureThreshold", 3)
            for kind in PATHS
        }
        least = 300 if role == COORDINATOR else 1800
        if lasts["startup"] < least:
            yield f"{role}: {lasts['startup']} s to start; expected {least}"
        if lasts["liveness"] < 60:
            yield f"{role}: restarted after {lasts['liveness']} s; expected at least 60"
        if lasts["readiness"] > 5:
            yield f"{role}: still ready for {lasts['readiness']} s; expected at most 5"


def grace_is_longer_than_the_drain(docs):
    for role in ROLES:
        doc = workload(docs, role)
        (container,) = pod_spec(doc)["containers"]
        grace = pod_spec(doc).get("terminationGracePeriodSeconds", 30)
        drain = int(settings(docs, role)["drain_seconds"])
        needed = pre_stop_seconds(container) + drain
        if grace <= needed:
            yield f"{role}: killed after {grace} s; preStop and drain_seconds are {needed}"
    (coordinator,) = pod_spec(workload(docs, COORDINATOR))["containers"]
    if pre_stop_seconds(coordinator) < 5:
        yield "coordinator: stops to listen before its clients are sent elsewhere"
