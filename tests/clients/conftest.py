"""Starts one `moesaic up` for all client tests, on a free loopback port, and ends it by its id."""

import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = ROOT / "target" / "release" / "moesaic"
MODEL = ROOT / "crates" / "moesaic" / "models" / "tiny-r1"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def address():
    """host:port of a cluster that serves the demo model with a reference's arithmetic (f32)."""
    address = f"127.0.0.1:{free_port()}"
    log = open(ROOT / "target" / "clients-cluster.log", "w")
    process = subprocess.Popen([BINARY, "up", "--listen", address, "--dtype", "f32"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not healthy(address):
            assert process.poll() is None, f"moesaic up ended with {process.returncode}: see {log.name}"
            assert time.monotonic() < deadline, f"not ready after 20 s: see {log.name}"
            time.sleep(0.05)
        yield address
        process.terminate()
        assert process.wait(timeout=20) == 0, "SIGTERM must end it with exit code 0"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()
