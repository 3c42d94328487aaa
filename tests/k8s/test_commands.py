"""What the programs are started with, written out once for a pod of each role."""

import tomllib

from commands import container_commands, expand
from manifests import ROLES


def test_an_expert_worker_of_v3():
    (worker,) = [c for c in container_commands("v3-h100", ordinal=12, node="gpu-7") if c.role == "expert-worker"]
    assert (worker.name, worker.command) == ("moesaic", [])
    assert worker.args == [
        "expert-worker",
        "--config=/etc/moesaic/config/expert-worker.toml",
        "--log-format=json",
        "--cluster=moesaic-v3",
        "--id=expert-worker-12",
        "--node=gpu-7",
        "--listen=0.0.0.0:7000",
        "--advertise=expert-worker-12.expert-worker.moesaic-v3.svc:7000",
        "--metrics-listen=0.0.0.0:9090",
        "--registry-ca=/etc/moesaic/etcd/ca.crt",
        "--tls=/etc/moesaic/tls",
    ]
    assert tomllib.loads(worker.files["/etc/moesaic/config/expert-worker.toml"])["expert_slots"] == 1280
    assert worker.env == {
        "POD_NAME": "expert-worker-12",
        "POD_NAMESPACE": "moesaic-v3",
        "FAILURE_DOMAIN": "gpu-7",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }
    assert worker.ports == {"metrics": 9090, "rpc": 7000}
    assert (worker.pre_stop_seconds, worker.grace_seconds) == (0, 150)


def test_every_container_is_there_with_nothing_left_to_expand(overlay):
    commands = list(container_commands(overlay))
    assert sorted(c.role for c in commands if c.name == "moesaic") == sorted(ROLES)
    for command in commands:
        assert not [word for word in command.command + command.args if "$(" in word]
        assert command.probes.keys() == {"startup", "readiness", "liveness"}
        assert command.pre_stop_seconds < command.grace_seconds


def test_variables_expand_as_the_kubelet_does_it():
    env = {"A": "x"}
    for text, expected in [("-$(A)-", "-x-"), ("$$(A)", "$(A)"), ("$(B)", "$(B)"), ("$A", "$A"), ("$(A)$(A)", "xx")]:
        assert expand(text, env) == expected
