"""What the programs are told is what they understand, and what fits together."""

import re

from commands import environment, expand
from manifests import ATTENTION_WORKER, COORDINATOR, EXPERT_WORKER, REPOSITORY, ROLES
from manifests import flags, pod_spec, settings, workload

# Flags that are no settings.
COMMAND_LINE = {"log_format"}


def keys_of(role: str) -> set:
    """A role's settings, by the page that is made from its flags."""
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    rows = page.split(f"\n## {role}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE))


def programs_know_their_settings(docs):
    for role in ROLES:
        known = keys_of(role) | COMMAND_LINE
        for key in settings(docs, role).keys() - known:
            yield f"{role} has no setting {key}"


def programs_are_called_right(docs):
    for role in ROLES:
        (container,) = pod_spec(workload(docs, role))["containers"]
        args = container["args"]
        if args[0] != role or "command" in container:
            yield f"{role} is started as {args[0]}"
        wrong = [arg for arg in args[1:] if not re.fullmatch(r"--[a-z-]+=.+", arg)]
        if wrong or len(flags(container)) != len(args) - 1:
            yield f"{role}: arguments {wrong or args}"


def told(docs, role: str, ordinal: int = 0) -> dict:
    """The settings of one pod, its name and namespace put in."""
    doc = workload(docs, role)
    (container,) = pod_spec(doc)["containers"]
    env = environment(doc, container, ordinal, node="node-a")
    return {k: expand(v, env) if isinstance(v, str) else v for k, v in settings(docs, role).items()}


def pods_are_who_they_say(docs):
    for role in ROLES:
        doc = workload(docs, role)
        namespace, own = doc["metadata"]["namespace"], told(docs, role, ordinal=3)
        (container,) = pod_spec(doc)["containers"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        port = ports["api" if role == COORDINATOR else "rpc"]
        wanted = {
            "id": f"{role}-3",
            "cluster": namespace,
            "listen": f"0.0.0.0:{port}",
            "advertise": f"{role}-3.{doc['spec']['serviceName']}.{namespace}.svc:{port}",
        }
        for key, value in wanted.items():
            if own.get(key) != value:
                yield f"{role}: {key} is {own.get(key)}; expected {value}"
        if not re.fullmatch(r"[a-z0-9-]{1,63}", own.get("id", "")):
            yield f"{role}: {own.get('id')} is no id"


def all_are_of_one_cluster(docs):
    for key in ("cluster", "registry", "model"):
        values = {told(docs, role).get(key) for role in ROLES}
        if len(values) != 1:
            yield f"{key} differs: {sorted(map(str, values))}"


def sizes_fit(docs):
    coordinator, workers = settings(docs, COORDINATOR), workload(docs, EXPERT_WORKER)["spec"]["replicas"]
    if not coordinator["replicas"] <= coordinator["expert_workers"] <= workers:
        yield f"{coordinator['expert_workers']} expert workers are waited for, and {workers} are started"
    if coordinator["replicas"] < 2:
        yield "one copy of each expert: a loss is a pause"
    attention = settings(docs, ATTENTION_WORKER)
    if ("memory" in attention) == ("cache_tokens" in attention):
        yield "the latent cache has no size, or two"
