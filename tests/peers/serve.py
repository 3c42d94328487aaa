"""Runs a llama-server and asks it for completions from many clients at a time."""

import http.client
import json
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

REQUESTS = 4
READY_WITHIN_S = 300


def serve(
    command: list[object], log: pathlib.Path, clients: int, tokens_in: int, tokens_out: int, vocabulary: int
) -> tuple[float, float]:
    """Tokens a second over the whole run, and the median time to a request's first token.

    `command` is llama-server with its model; each client asks four times, as in `moesaic bench`.
    """
    port = free_port()
    words = [str(word) for word in (*command, "--host", "127.0.0.1", "--port", port)]
    with log.open("w") as output:
        server = subprocess.Popen(words, stdout=output, stderr=output, cwd=log.parent)
    try:
        wait_until_ready(server, port, log)

        def client(number: int) -> list[float]:
            seeds = range(number * REQUESTS, (number + 1) * REQUESTS)
            return [complete(port, seed, tokens_in, tokens_out, vocabulary) for seed in seeds]

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as threads:
            first_tokens = [first for each in threads.map(client, range(clients)) for first in each]
        return len(first_tokens) * tokens_out / (time.perf_counter() - start), statistics.median(first_tokens)
    finally:
        server.terminate()
        server.wait()


def complete(port: int, seed: int, tokens_in: int, tokens_out: int, vocabulary: int) -> float:
    """Asks for one completion; the time to its first token."""
    numbers = random.Random(seed)
    body = {
        "prompt": [numbers.randrange(3, vocabulary) for _ in range(tokens_in)],
        "n_predict": tokens_out,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    asked, first, last = time.perf_counter(), None, None
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"error: llama-server answered {answer.status}: {answer.read().decode(errors='replace')}")
    for line in answer:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - asked
            last = line
    connection.close()
    generated = json.loads(last.removeprefix(b"data: ")).get("tokens_predicted") if last else 0
    if generated != tokens_out:
        sys.exit(f"error: llama-server generated {generated} tokens of {tokens_out}")
    return first


def wait_until_ready(server: subprocess.Popen, port: int, log: pathlib.Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"error: llama-server ended with {server.returncode}: see {log}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    sys.exit(f"error: llama-server was not ready after {READY_WITHIN_S} s: see {log}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
