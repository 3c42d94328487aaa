"""With TLS: each pod's certificate names the pod, as the programs expect it, and its files are where they look."""

import re
from string import Template

from manifests import COORDINATOR, ROLES, of_kind, pod_spec, title, workload
from rules.settings import told

DRIVER = "csi.cert-manager.io"
# What the programs look for in the folder. The driver calls its files so if it is not told otherwise.
FILES = {"certificate-file": "tls.crt", "privatekey-file": "tls.key", "ca-file": "ca.crt"}


def certificate(docs, role: str, ordinal: int) -> dict | None:
    """The attributes of the volume with a pod's certificate, as the driver takes them. None: without TLS."""
    doc = workload(docs, role)
    volumes = [v["csi"] for v in pod_spec(doc)["volumes"] if v.get("csi", {}).get("driver") == DRIVER]
    if not volumes:
        return None
    variables = {
        "POD_NAME": f"{doc['metadata']['name']}-{ordinal}",
        "POD_NAMESPACE": doc["metadata"]["namespace"],
        "POD_UID": "00000000-0000-0000-0000-000000000000",
        "SERVICE_ACCOUNT_NAME": pod_spec(doc)["serviceAccountName"],
    }
    (volume,) = volumes
    return {
        key.removeprefix(f"{DRIVER}/"): Template(text).substitute(variables)
        for key, text in volume["volumeAttributes"].items()
    }


def certificates_name_the_pod(docs):
    for role in ROLES:
        own, shown = told(docs, role, ordinal=3), certificate(docs, role, ordinal=3)
        if shown is None:
            continue
        uris = {f"spiffe://{own['cluster']}/{role}/{own['id']}"}
        if set(shown["uri-sans"].split(",")) != uris:
            yield f"{role}: the certificate is for {shown['uri-sans']}; expected {uris}"
        hosts = {own["advertise"].rpartition(":")[0]}
        if role == COORDINATOR:
            hosts.add(f"moesaic.{own['cluster']}.svc")
        missing = hosts - set(shown["dns-names"].split(","))
        if missing:
            yield f"{role}: the certificate is not for {sorted(missing)}"
        usages = set(shown["key-usages"].split(","))
        if usages != {"digital signature", "server auth", "client auth"}:
            yield f"{role}: the certificate is good for {sorted(usages)}"
        if shown.get("key-encoding") != "PKCS8":
            yield f"{role}: the driver refuses an ECDSA key in {shown.get('key-encoding')}"
        hours = {key: int(re.fullmatch(r"(\d+)h", shown[key])[1]) for key in ("duration", "renew-before")}
        if not 0 < hours["renew-before"] < hours["duration"] <= 24:
            yield f"{role}: the certificate lasts {hours}"


def programs_find_the_files(docs):
    for role in ROLES:
        doc, shown = workload(docs, role), certificate(docs, role, ordinal=0)
        names = [v["name"] for v in pod_spec(doc)["volumes"] if v.get("csi", {}).get("driver") == DRIVER]
        (container,) = pod_spec(doc)["containers"]
        folders = [m["mountPath"] for m in container["volumeMounts"] if m["name"] in names]
        given = [value for key, value in told(docs, role).items() if key == "tls"]
        if given != folders:
            yield f"{role}: told {given}; the certificate is in {folders}"
        for attribute, name in FILES.items():
            if shown and shown.get(attribute, name) != name:
                yield f"{role}: {attribute} is {shown[attribute]}; expected {name}"
        group = str(pod_spec(doc)["securityContext"]["fsGroup"])
        if shown and shown.get("fs-group") != group:
            yield f"{role}: the files are the group {shown.get('fs-group')}'s, the pod's is {group}"


def all_or_none_have_tls(docs):
    having = [role for role in ROLES if certificate(docs, role, ordinal=0)]
    if having not in ([], list(ROLES)):
        yield f"only {having} have TLS"
    scheme = told(docs, COORDINATOR)["registry"].partition("://")[0]
    if scheme != ("etcds" if having else "etcd"):
        yield f"the registry is reached by {scheme}"
    (port,) = [d["spec"]["ports"][0]["port"] for d in of_kind(docs, "Service") if d["metadata"]["name"] == "moesaic"]
    if port != (443 if having else 80):
        yield f"clients come in at {port}"


def the_authority_outlives_its_certificates(docs):
    for doc in of_kind(docs, "Certificate"):
        spec = doc["spec"]
        if spec.get("isCA") and spec["privateKey"]["rotationPolicy"] != "Never":
            yield f"{title(doc)}: with a new key, old and new certificates do not know each other"
        cluster = doc["metadata"]["namespace"]
        if not spec.get("isCA") and spec.get("uris") != [f"spiffe://{cluster}/operator/admin"]:
            yield f"{title(doc)} is for {spec.get('uris')}"
