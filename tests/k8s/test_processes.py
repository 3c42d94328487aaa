"""The real programs, started with just what the demo overlay says: its arguments, settings, probes, signals and graces.
Each pod has a loopback address of its own; names become addresses, paths of the container folders here."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from commands import ContainerCommand, container_commands
from manifests import ATTENTION_WORKER, COORDINATOR, EXPERT_WORKER, REPOSITORY

# What tests/monitoring knows of the metrics.
sys.path.insert(0, str(REPOSITORY / "tests/monitoring"))
import pages  # noqa: E402

OVERLAY = "demo"
PROGRAM = pathlib.Path(os.environ.get("MOESAIC_BIN", REPOSITORY / "target" / "release" / "moesaic"))
MODEL = REPOSITORY / "crates" / "moesaic" / "models" / "tiny-r1"
PODS = [(COORDINATOR, 2), (EXPERT_WORKER, 3), (ATTENTION_WORKER, 2)]
ETCD = "127.0.3.1:2379"
# A machine that builds other things meanwhile.
PATIENCE = 60


class Pod:
    """One container of a pod, as the kubelet would run it."""

    def __init__(self, command: ContainerCommand, name: str, address: str, folder: pathlib.Path, keys: pathlib.Path):
        self.command, self.name, self.address = command, name, address
        self.folder = folder / name
        self.folder.mkdir()
        for path, text in command.files.items():
            target = self.folder / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self.here(text, keys))
        args = [self.here(word, keys) for word in command.args]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MOESAIC_")} | command.env
        self.log = open(self.folder / "log", "w")
        self.process = subprocess.Popen([PROGRAM, *args], env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def here(self, text: str, keys: pathlib.Path) -> str:
        """Names and paths as they are on this machine."""
        text = text.replace("0.0.0.0:", f"{self.address}:").replace("etcd://etcd:2379", f"etcd://{ETCD}")
        text = text.replace("/usr/local/share/moesaic/tiny-r1", str(MODEL))
        text = text.replace("/etc/moesaic/keys/keys.toml", str(keys))
        text = text.replace("/etc/moesaic/config", str(self.folder / "etc/moesaic/config"))
        return re.sub(r"[a-z-]+-\d+\.[a-z-]+\.[a-z-]+\.svc:", f"{self.address}:", text)

    def probe(self, kind: str) -> int:
        """The status of one probe; 0 if nobody answers."""
        get = self.command.probes[kind]["httpGet"]
        port = self.command.ports.get(get["port"], get["port"])
        try:
            with urllib.request.urlopen(f"http://{self.address}:{port}{get['path']}", timeout=1) as answer:
                return answer.status
        except urllib.error.HTTPError as refused:
            return refused.code
        except OSError:
            return 0

    def until(self, kind: str, status: int, seconds: float = PATIENCE):
        deadline = time.monotonic() + seconds
        while (seen := self.probe(kind)) != status:
            assert self.process.poll() is None, f"{self.name} ended: {(self.folder / 'log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{self.name}: {kind} is {seen} after {seconds} s, not {status}"
            time.sleep(0.05)

    def terminate(self) -> float:
        """As the kubelet does it: preStop, SIGTERM, the grace. How long it took from the signal."""
        time.sleep(self.command.pre_stop_seconds)
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=self.command.grace_seconds - self.command.pre_stop_seconds)
        assert code == 0, f"{self.name}: exit code {code}: {(self.folder / 'log').read_text()[-2000:]}"
        return time.monotonic() - start

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


@contextlib.contextmanager
def etcd(folder: pathlib.Path):
    urls = [f"--listen-client-urls=http://{ETCD}", f"--advertise-client-urls=http://{ETCD}"]
    peer = "http://127.0.3.1:2380"
    urls += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"]
    log = open(folder / "etcd.log", "w")
    program = os.environ.get("MOESAIC_ETCD", "etcd")
    process = subprocess.Popen([program, f"--data-dir={folder / 'etcd'}", *urls], stdout=log, stderr=log)
    try:
        # The kubelet would start pods again until it is there.
        deadline = time.monotonic() + PATIENCE
        while not listens(ETCD):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "etcd.log").read_text()[-2000:]
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
        log.close()


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def make_key(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """As k8s/README.md says it."""
    made = subprocess.run([PROGRAM, "key", "me", "--scopes", "infer,operate"], capture_output=True, text=True, check=True)
    path = folder / "keys.toml"
    path.write_text(made.stdout)
    return path, re.search(r"moe-[0-9a-f]+", made.stderr)[0]


def ask(pod: Pod, key: str | None, max_tokens: int = 200, timeout: float = PATIENCE):
    """The answer's status and text."""
    body = {"messages": [{"role": "user", "content": "What is 347 + 586?"}], "temperature": 0, "max_tokens": max_tokens}
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    url = f"http://{pod.address}:{pod.command.ports['api']}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Pods by their names, started in the order in which they would be hardest to bring up: the front door first."""
    assert PROGRAM.is_file(), f"{PROGRAM} is not built: cargo build --release"
    folder = tmp_path_factory.mktemp("pods")
    keys, key = make_key(folder)
    pods: dict[str, Pod] = {}
    with etcd(folder), contextlib.ExitStack() as stack:
        for role, count in PODS:
            for ordinal in range(count):
                (command,) = [c for c in container_commands(OVERLAY, ordinal) if c.role == role and c.name == "moesaic"]
                name = f"{role}-{ordinal}"
                pod = pods[name] = Pod(command, name, f"127.0.3.{10 + len(pods)}", folder, keys)
                stack.callback(pod.kill)
                if (role, ordinal) == (COORDINATOR, 1):
                    alone(pods)
        for pod in pods.values():
            for kind in ("startup", "readiness", "liveness"):
                pod.until(kind, 200)
        yield pods, key


def alone(pods: dict[str, Pod]):
    """Coordinators without workers live and have started, and are not ready."""
    for pod in pods.values():
        pod.until("startup", 200)
        assert pod.probe("liveness") == 200
        assert pod.probe("readiness") == 503


def test_the_cluster_answers_those_who_have_a_key(cluster):
    pods, key = cluster
    for name in ("coordinator-0", "coordinator-1"):
        status, text = ask(pods[name], key)
        assert status == 200 and "933" in text, text
        assert ask(pods[name], None)[0] == 401
        assert ask(pods[name], "moe-other")[0] == 401


def test_metrics_are_where_the_pod_monitor_looks_and_what_alerts_count_on(cluster):
    pods, _ = cluster
    for pod in pods.values():
        url = f"http://{pod.address}:{pod.command.ports['metrics']}/metrics?experts=all"
        assert pages.differences(pod.command.role, pages.read(url)) == [], pod.name


def test_pods_that_are_told_to_stop_finish_what_they_have(cluster):
    """One of each role, under load: nothing is lost, each ends well within its grace, and the rest goes on."""
    pods, key = cluster
    stop, failures, served = threading.Event(), [], []

    def load():
        while not stop.is_set():
            status, text = ask(pods["coordinator-0"], key)
            (served if status == 200 and "933" in text else failures).append((status, text))

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        for name in ("expert-worker-2", "attention-worker-1", "coordinator-1"):
            before = len(served)
            took = pods[name].terminate()
            assert took < pods[name].command.grace_seconds - pods[name].command.pre_stop_seconds
            deadline = time.monotonic() + PATIENCE
            while len(served) < before + 8:
                assert time.monotonic() < deadline, f"nothing is served after {name} has stopped"
                time.sleep(0.05)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert not failures, failures[:3]
    pods["coordinator-0"].until("readiness", 200)
    assert pods["attention-worker-0"].probe("liveness") == 200
