"""Every rule finds what it is for: one change that breaks it, and the words that name it."""

import pytest
from manifests import named, of_kind, pod_spec, render, workload
from rules import availability, gpus, network, pod_security, probes, references, settings, tls
from test_rules import RULES

PORT = {"port": 7000}
NOBODY = {"matchLabels": {"a": "b"}}


def container(docs, role="expert-worker"):
    return pod_spec(workload(docs, role))["containers"][0]


def policy(docs, name):
    return named(docs, "NetworkPolicy", name)["spec"]


def change(field, value, role="expert-worker"):
    """Of a role's container; None removes it."""

    def apply(docs):
        at, *path = container(docs, role), *field.split(".")
        for key in path[:-1]:
            at = at[key]
        at.pop(path[-1]) if value is None else at.update({path[-1]: value})

    return apply


def change_pod(field, value, role="expert-worker"):
    return lambda docs: pod_spec(workload(docs, role)).update({field: value})


def update(kind, name, **spec):
    return lambda docs: named(docs, kind, name)["spec"].update(spec)


def replace_arg(old, new, role="expert-worker"):
    def apply(docs):
        args = container(docs, role)["args"]
        assert any(old in arg for arg in args), old
        args[:] = [arg.replace(old, new) for arg in args]

    return apply


def remove(kind, name):
    return lambda docs: docs.remove(named(docs, kind, name))


def edit_file(old, new, role):
    def apply(docs):
        (data,) = [d["data"] for d in of_kind(docs, "ConfigMap") if d["metadata"]["name"].startswith(role)]
        (name,) = data
        assert old in data[name], old
        data[name] = data[name].replace(old, new)

    return apply


def change_certificate(key, value, role="expert-worker"):
    def apply(docs):
        (volume,) = [v for v in pod_spec(workload(docs, role))["volumes"] if v["name"] == "tls"]
        volume["csi"]["volumeAttributes"][f"csi.cert-manager.io/{key}"] = value

    return apply


def first(docs, kind):
    return of_kind(docs, kind)[0]


VIOLATIONS = [
    # K1
    (
        pod_security.namespace_is_restricted,
        lambda d: first(d, "Namespace")["metadata"].pop("labels"),
        "enforce is None",
    ),
    (
        pod_security.namespace_is_restricted,
        lambda d: first(d, "Service")["metadata"].update(namespace="x"),
        "in the namespace x",
    ),
    (pod_security.pods_are_restricted, change_pod("hostNetwork", True), "hostNetwork"),
    (pod_security.pods_are_restricted, change_pod("securityContext", {}), "runAsNonRoot"),
    (
        pod_security.pods_are_restricted,
        change_pod("automountServiceAccountToken", True),
        "automountServiceAccountToken",
    ),
    (pod_security.pods_are_restricted, change_pod("volumes", [{"name": "v", "hostPath": {"path": "/"}}]), "hostPath"),
    (
        pod_security.pods_are_restricted,
        change_pod("initContainers", [{"name": "i"}]),
        "container i: capabilities are None",
    ),
    (
        pod_security.pods_are_restricted,
        change("securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        "SYS_ADMIN",
    ),
    (
        pod_security.pods_are_restricted,
        change("securityContext.readOnlyRootFilesystem", None),
        "readOnlyRootFilesystem",
    ),
    (
        pod_security.pods_are_restricted,
        change("securityContext.allowPrivilegeEscalation", True),
        "allowPrivilegeEscalation",
    ),
    (pod_security.pods_are_restricted, change("securityContext.privileged", True), "privileged"),
    (pod_security.pods_are_restricted, change("securityContext.runAsUser", 0), "runAsUser is not the pod's"),
    (pod_security.pods_are_restricted, change("ports", [{"containerPort": 1, "hostPort": 1}]), "hostPort"),
    (
        pod_security.accounts_have_no_token,
        lambda d: first(d, "ServiceAccount").pop("automountServiceAccountToken"),
        "not false",
    ),
    # K2
    (network.only_the_edges_that_exist, remove("NetworkPolicy", "default-deny"), "neighbour may reach"),
    (network.only_the_edges_that_exist, remove("NetworkPolicy", "coordinator"), "client cannot reach coordinator"),
    (network.only_the_edges_that_exist, remove("NetworkPolicy", "dns"), "expert-worker cannot reach dns at 53/UDP"),
    (
        network.only_the_edges_that_exist,
        remove("NetworkPolicy", "metrics"),
        "monitoring cannot reach coordinator at 9090",
    ),
    (
        network.only_the_edges_that_exist,
        lambda d: policy(d, "expert-worker")["ingress"].append({"ports": [PORT]}),
        "client may reach expert-worker",
    ),
    (
        network.only_the_edges_that_exist,
        lambda d: policy(d, "attention-worker")["egress"].append({"ports": [PORT]}),
        "attention-worker may reach internet",
    ),
    (
        network.only_the_edges_that_exist,
        lambda d: policy(d, "expert-worker")["ingress"][0].update(ports=[{"port": 7001}]),
        "attention-worker cannot reach expert-worker at 7000",
    ),
    (
        network.only_the_edges_that_exist,
        lambda d: policy(d, "coordinator")["ingress"][0]["from"][0].update(namespaceSelector={}),
        "impostor may reach coordinator",
    ),
    (
        network.only_the_edges_that_exist,
        lambda d: policy(d, "dns")["egress"][0]["to"][0].pop("podSelector"),
        "may reach kube-system",
    ),
    # K3
    (availability.disruption_budgets, remove("PodDisruptionBudget", "expert-worker"), "expected"),
    (
        availability.disruption_budgets,
        update("PodDisruptionBudget", "coordinator", selector={}),
        "two budgets",
    ),
    (
        availability.disruption_budgets,
        update("PodDisruptionBudget", "expert-worker", maxUnavailable=2),
        "expected",
    ),
    (availability.one_pod_may_go, update("StatefulSet", "expert-worker", replicas=1), "1 replicas"),
    (
        availability.scaled_by_what_is_there,
        update("StatefulSet", "coordinator", replicas=2),
        "overruled",
    ),
    (
        availability.scaled_by_what_is_there,
        lambda d: first(d, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="x"),
        "no StatefulSet x",
    ),
    # K4
    (
        probes.probes_ask_the_role,
        change("livenessProbe.httpGet", {"path": "/readyz", "port": "metrics"}),
        "expected /livez",
    ),
    (probes.probes_ask_the_role, replace_arg(":9090", ":9091"), "the port metrics is 9090"),
    (probes.every_container_has_probes, change("startupProbe", None), "no startup probe"),
    (probes.every_container_has_probes, change("readinessProbe.timeoutSeconds", 3), "longer than its period"),
    (probes.probes_are_patient_where_they_kill, change("startupProbe.failureThreshold", 3), "15 s to start"),
    (probes.probes_are_patient_where_they_kill, change("livenessProbe.failureThreshold", 1), "restarted after 10 s"),
    (probes.probes_are_patient_where_they_kill, change("readinessProbe.failureThreshold", 9), "still ready for 18 s"),
    (probes.grace_is_longer_than_the_drain, change_pod("terminationGracePeriodSeconds", 120), "drain_seconds are 120"),
    (
        probes.grace_is_longer_than_the_drain,
        edit_file("drain_seconds = 60", "drain_seconds = 70", "coordinator"),
        "drain_seconds are 75",
    ),
    (probes.grace_is_longer_than_the_drain, change("lifecycle", None, "coordinator"), "stops to listen"),
    # What refers to what
    (
        references.services_find_pods,
        lambda d: named(d, "Service", "moesaic")["spec"]["selector"].pop("app.kubernetes.io/component"),
        "expected one",
    ),
    (
        references.services_find_pods,
        lambda d: named(d, "Service", "moesaic")["spec"]["ports"][0].update(targetPort="http"),
        "http is none of",
    ),
    (
        references.pods_have_names_before_they_are_ready,
        lambda d: named(d, "Service", "expert-worker")["spec"].pop("publishNotReadyAddresses"),
        "does not name",
    ),
    (
        references.clients_meet_who_is_ready,
        update("Service", "moesaic", publishNotReadyAddresses=True),
        "not ready",
    ),
    (
        references.workloads_select_their_own_pods,
        update("StatefulSet", "expert-worker", selector={}),
        "selects the pods of",
    ),
    (
        references.selectors_match_something,
        lambda d: policy(d, "metrics").update(podSelector=NOBODY),
        "selects no pods",
    ),
    (
        references.scheduling_counts_its_own_pods,
        lambda d: pod_spec(workload(d, "coordinator"))["affinity"]["podAntiAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ][0].update(labelSelector=NOBODY),
        "others than its own",
    ),
    (
        references.what_is_referred_to_exists,
        remove("PersistentVolumeClaim", "weights"),
        "no PersistentVolumeClaim weights",
    ),
    (references.what_is_referred_to_exists, remove("Issuer", "moesaic-ca"), "no Issuer moesaic-ca"),
    (references.what_is_referred_to_exists, change_pod("serviceAccountName", "x"), "no ServiceAccount x"),
    (references.mounts_are_volumes, lambda d: container(d)["volumeMounts"].pop(), "mounted are"),
    (references.mounts_are_volumes, lambda d: container(d)["volumeMounts"][0].update(subPath="x"), "never changes"),
    (references.mounts_are_volumes, lambda d: container(d)["volumeMounts"][0].pop("readOnly"), "not mounted read-only"),
    (references.resources_are_bounded, change("resources.limits", {"cpu": 1}), "no limit of memory"),
    (
        references.resources_are_bounded,
        lambda d: container(d)["resources"]["requests"].update(memory="1Gi"),
        "memory is 1Gi to 48Gi",
    ),
    (references.images_are_pinned, change("image", "moesaic:latest"), "no fixed tag"),
    (references.images_are_pinned, change("image", "host:5000/moesaic"), "no fixed tag"),
    (references.images_are_pinned, change("image", "moesaic:0.0.9"), "but the program is"),
    (references.no_variables_of_services, change_pod("enableServiceLinks", True), "MOESAIC_"),
    # What the programs are told
    (
        settings.programs_know_their_settings,
        edit_file("expert_slots", "expert_slot", "expert-worker"),
        "no setting expert_slot",
    ),
    (
        settings.programs_know_their_settings,
        lambda d: container(d, "coordinator")["args"].append("--node=x"),
        "coordinator has no setting node",
    ),
    (settings.programs_are_called_right, lambda d: container(d)["args"].append("--pin"), "['--pin']"),
    (settings.programs_are_called_right, replace_arg("expert-worker", "worker"), "started as worker"),
    (settings.pods_are_who_they_say, replace_arg("$(POD_NAME).expert-worker", "expert-worker"), "advertise is"),
    (settings.pods_are_who_they_say, replace_arg("--id=", "--id=e_"), "is no id"),
    (settings.pods_are_who_they_say, replace_arg("--listen=0.0.0.0:7000", "--listen=0.0.0.0:7001"), "listen is"),
    (settings.all_are_of_one_cluster, edit_file("etcd-0", "etcd-9", "attention-worker"), "registry differs"),
    (settings.sizes_fit, update("StatefulSet", "expert-worker", replicas=31), "31 are started"),
    (settings.sizes_fit, edit_file("replicas = 2", "replicas = 1", "coordinator"), "one copy"),
    (settings.sizes_fit, edit_file("memory", "cache_tokens = 1\nmemory", "attention-worker"), "or two"),
    # TLS
    (
        tls.certificates_name_the_pod,
        change_certificate("uri-sans", "spiffe://${POD_NAMESPACE}/expert-worker/x"),
        "is for spiffe://moesaic-v3/expert-worker/x",
    ),
    (tls.certificates_name_the_pod, change_certificate("dns-names", "${POD_NAME}"), "certificate is not for"),
    (tls.certificates_name_the_pod, change_certificate("key-usages", "server auth"), "good for"),
    (tls.certificates_name_the_pod, change_certificate("renew-before", "24h"), "lasts"),
    (tls.programs_find_the_files, replace_arg("/etc/moesaic/tls", "/tls"), "told ['/tls']"),
    (tls.programs_find_the_files, change_certificate("privatekey-file", "key.pem"), "key.pem"),
    (tls.programs_find_the_files, change_certificate("fs-group", "1000"), "1000's"),
    (tls.all_or_none_have_tls, lambda d: pod_spec(workload(d, "expert-worker"))["volumes"].pop(0), "have TLS"),
    (tls.all_or_none_have_tls, edit_file("etcds://", "etcd://", "coordinator"), "reached by etcd"),
    (
        tls.the_authority_outlives_its_certificates,
        lambda d: named(d, "Certificate", "moesaic-ca")["spec"]["privateKey"].update(rotationPolicy="Always"),
        "new key",
    ),
    (
        tls.the_authority_outlives_its_certificates,
        update("Certificate", "operator", uris=["spiffe://x/operator/admin"]),
        "is for",
    ),
    (gpus.each_worker_has_one, change("resources.limits", {}), "expert-worker has [None]"),
    (gpus.each_worker_has_one, change("image", "moesaic:0.1.0"), "runs moesaic:0.1.0"),
]


@pytest.mark.parametrize(
    "rule, violate, words", VIOLATIONS, ids=[f"{v[0].__name__}-{i}" for i, v in enumerate(VIOLATIONS)]
)
def test_is_found(rule, violate, words):
    docs = render("v3-h100")
    violate(docs)
    found = list(rule(docs))
    assert any(words in finding for finding in found), found


def test_every_rule_is_seen_to_find_something():
    assert set(RULES) == {rule for rule, _, _ in VIOLATIONS}
