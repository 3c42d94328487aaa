"""Workers on GPUs have one each and the image for it; coordinators have none."""

from manifests import COORDINATOR, ROLES, pod_spec, workload


def each_worker_has_one(docs):
    asks = {
        role: [c["resources"]["limits"].get("nvidia.com/gpu") for c in pod_spec(workload(docs, role))["containers"]]
        for role in ROLES
    }
    on_gpus = any(count for counts in asks.values() for count in counts)
    for role, counts in asks.items():
        wanted = ["1"] if on_gpus and role != COORDINATOR else [None]
        if counts != wanted:
            yield f"{role} has {counts} GPUs; expected {wanted}"
        (container,) = pod_spec(workload(docs, role))["containers"]
        if container["image"].endswith("-cuda") != (wanted == ["1"]):
            yield f"{role} runs {container['image']}"
