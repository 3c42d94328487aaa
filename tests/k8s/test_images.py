"""The Dockerfiles, as far as they can be read: no image is built here. Hadolint has nothing to say about them."""

import re
import tomllib
from fnmatch import fnmatch

import pytest
from manifests import REPOSITORY, named, pod_spec, render

FILES = ("Dockerfile", "Dockerfile.cuda")


def instructions(file: str) -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (REPOSITORY / file).read_text()).replace("\\\n", " ")
    return [
        (word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def stages(file: str) -> list[list[tuple[str, str]]]:
    found = []
    for instruction in instructions(file):
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def is_in_the_context(path: str) -> bool:
    """By .dockerignore: the last line that matches a path, or a folder above it, decides."""
    above = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
    taken = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern and not pattern.startswith("#"):
            names = [pattern, pattern.removeprefix("**/")]
            if any(fnmatch(part, name) and part.count("/") == name.count("/") for part in above for name in names):
                taken = line.startswith("!")
    return taken


@pytest.mark.parametrize("file", FILES)
def test_the_build_is_locked_and_of_the_right_rust(file):
    (build, _) = stages(file)
    wanted = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["workspace"]["package"]["rust-version"]
    assert re.fullmatch(rf"rust:{re.escape(wanted)}\.\d+-slim-bookworm AS build", build[0][1])
    (run,) = [text for word, text in build if word == "RUN"]
    assert "cargo build --release --locked " in run
    assert stages("Dockerfile")[0] == stages("Dockerfile.cuda")[0]


@pytest.mark.parametrize("file", FILES)
def test_it_runs_as_nobody_and_starts_the_program(file):
    final = stages(file)[-1]
    image = final[0][1]
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", image) and not image.endswith(":latest")
    told = dict(final)
    context = pod_spec(named(render("demo"), "StatefulSet", "coordinator"))["securityContext"]
    assert told["USER"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert told["ENTRYPOINT"] == '["/usr/local/bin/moesaic"]'
    assert not {"RUN", "ADD", "VOLUME", "HEALTHCHECK"} & told.keys()
    ports = {
        p["containerPort"]
        for role in ("coordinator", "expert-worker")
        for p in pod_spec(named(render("demo"), "StatefulSet", role))["containers"][0]["ports"]
    }
    assert told["EXPOSE"] == " ".join(map(str, sorted(ports)))


@pytest.mark.parametrize("file", FILES)
def test_what_is_built_from_is_there_and_is_sent(file):
    run = dict(stages(file)[0])["RUN"]
    sources = [word for word in re.findall(r"\S+", run) if word.startswith("crates/") or word == "LICENSE"]
    assert len(sources) == 6
    for path in sources:
        assert (REPOSITORY / path).is_file() and is_in_the_context(path), path


def test_the_whole_workspace_is_sent_and_little_else():
    members = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["workspace"]["members"]
    for path in [
        "Cargo.toml",
        "Cargo.lock",
        ".cargo/config.toml",
        "proto/protoc/protoc",
        *(f"{m}/Cargo.toml" for m in members),
    ]:
        assert (REPOSITORY / path).is_file() and is_in_the_context(path), path
    for path in [
        "target/release/moesaic",
        "proto/target/x",
        ".git/config",
        "k8s/README.md",
        "tests/fixtures/v3/config.json",
        ".env",
    ]:
        assert not is_in_the_context(path), path


def test_the_demo_serves_the_model_that_is_in_the_image():
    run = dict(stages("Dockerfile")[0])["RUN"]
    folder = re.search(r"--target-directory=/out(\S+)", run)[1]
    config = next(
        d for d in render("demo") if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith("expert-worker")
    )
    assert tomllib.loads(config["data"]["expert-worker.toml"])["model"] == f"/usr/local{folder}"
