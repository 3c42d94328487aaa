"""K2: nobody reaches anybody, but for the edges that exist. The network policies are computed, not read: for every pair of
those who are there, inside the namespace and outside, and every port, whether both ends let it pass."""

from typing import NamedTuple

from manifests import ATTENTION_WORKER, COMPONENT, COORDINATOR, EXPERT_WORKER, NAME, ROLES, WORKLOADS
from manifests import of_kind, pod_labels, selects


class Party(NamedTuple):
    name: str
    labels: dict
    # None: not a pod of this cluster.
    namespace_labels: dict | None
    # Whether this namespace's policies are for it.
    is_inside: bool = False


def outside(name, namespace_labels, labels=None) -> Party:
    return Party(name, labels or {}, namespace_labels)


OUTSIDE = (
    outside("client", {"kubernetes.io/metadata.name": "apps", "moesaic-client": "true"}),
    outside("monitoring", {"kubernetes.io/metadata.name": "monitoring", "moesaic-scrape": "true"}),
    outside("dns", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}),
    outside("kube-system", {"kubernetes.io/metadata.name": "kube-system"}),
    outside("collector", {"kubernetes.io/metadata.name": "observability"}, {NAME: "opentelemetry-collector"}),
    outside("impostor", {"kubernetes.io/metadata.name": "apps"}, {NAME: "moesaic", COMPONENT: COORDINATOR}),
    outside("internet", None),
)
EXTERNAL_ETCD = outside("etcd", {"kubernetes.io/metadata.name": "etcd"}, {NAME: "etcd"})
# Ports that nothing here listens on, to see whether a policy is wider than it says.
OTHER_PORTS = {("TCP", 22), ("TCP", 443), ("TCP", 4317), ("UDP", 7000)}

EXPECTED = {
    ("client", COORDINATOR, "TCP", 8080),
    (COORDINATOR, COORDINATOR, "TCP", 8080),
    (COORDINATOR, ATTENTION_WORKER, "TCP", 7000),
    (ATTENTION_WORKER, EXPERT_WORKER, "TCP", 7000),
    *((role, "etcd", "TCP", 2379) for role in ROLES),
    *((role, "dns", protocol, 53) for role in ROLES for protocol in ("TCP", "UDP")),
    *(("monitoring", role, "TCP", 9090) for role in ROLES),
}


def only_the_edges_that_exist(docs):
    edges = allowed_edges(docs)
    for source, target, protocol, port in sorted(edges - EXPECTED):
        yield f"{source} may reach {target} at {port}/{protocol}"
    for source, target, protocol, port in sorted(EXPECTED - edges):
        yield f"{source} cannot reach {target} at {port}/{protocol}"


def allowed_edges(docs) -> set:
    parties, ports = those_who_are_there(docs), ports_in_use(docs) | OTHER_PORTS
    policies = of_kind(docs, "NetworkPolicy")
    return {
        (source.name, target.name, protocol, port)
        for source in parties
        for target in parties
        if source.is_inside or target.is_inside
        for protocol, port in ports
        if passes(policies, "Egress", source, target, protocol, port)
        and passes(policies, "Ingress", target, source, protocol, port)
    }


def those_who_are_there(docs) -> list[Party]:
    (namespace,) = of_kind(docs, "Namespace")
    name = namespace["metadata"]["name"]
    labels = {"kubernetes.io/metadata.name": name, **namespace["metadata"].get("labels", {})}
    inside = [
        Party(pod_labels(doc)[COMPONENT], pod_labels(doc), labels, is_inside=True) for doc in of_kind(docs, *WORKLOADS)
    ]
    inside.append(Party("neighbour", {NAME: "something-else"}, labels, is_inside=True))
    has_etcd = any(party.name == "etcd" for party in inside)
    return inside + list(OUTSIDE) + ([] if has_etcd else [EXTERNAL_ETCD])


def ports_in_use(docs) -> set:
    specs = [doc["spec"]["template"]["spec"] for doc in of_kind(docs, *WORKLOADS)]
    return {("TCP", 53), ("UDP", 53), ("TCP", 2379), ("TCP", 2380)} | {
        (port.get("protocol", "TCP"), port["containerPort"])
        for spec in specs
        for container in spec["containers"]
        for port in container.get("ports", [])
    }


def passes(policies, direction, own: Party, other: Party, protocol, port) -> bool:
    """Whether `own`'s policies of a direction let it talk with `other`."""
    if not own.is_inside:
        return True
    applying = [
        p["spec"] for p in policies if direction in types(p["spec"]) and selects(p["spec"]["podSelector"], own.labels)
    ]
    rules = [rule for spec in applying for rule in spec.get(direction.lower()) or []]
    peers = {"Ingress": "from", "Egress": "to"}[direction]
    return not applying or any(
        admits_peer(rule.get(peers), other, own) and admits_port(rule.get("ports"), protocol, port) for rule in rules
    )


def types(spec) -> list:
    return spec.get("policyTypes") or (["Ingress", "Egress"] if "egress" in spec else ["Ingress"])


def admits_peer(peers, other: Party, own: Party) -> bool:
    return not peers or any(is_peer(peer, other, own) for peer in peers)


def is_peer(peer, other: Party, own: Party) -> bool:
    if "ipBlock" in peer:
        # Of what is not a pod nothing more is known here.
        return other.namespace_labels is None
    if other.namespace_labels is None:
        return False
    namespaces = peer.get("namespaceSelector")
    same = other.namespace_labels == own.namespace_labels
    in_namespace = same if namespaces is None else selects(namespaces, other.namespace_labels)
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)


def admits_port(ports, protocol, port) -> bool:
    if not ports:
        return True
    assert all(isinstance(p.get("port", 0), int) for p in ports), "a port's name means another port for each pod"
    return any(
        p.get("protocol", "TCP") == protocol and p.get("port", port) <= port <= p.get("endPort", p.get("port", port))
        for p in ports
    )
