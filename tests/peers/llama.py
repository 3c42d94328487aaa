"""Measures llama.cpp (or ik_llama.cpp) beside `moesaic bench`: the same random model, in turns, and prints the ratios.

    cargo build --release
    python3 tests/peers/llama.py --config CONFIG.json [--tests pp512,pp2048,tg1,tg4,tg16,tg64,serve8,serve32]
        [--runs 3] [--threads 2] [--dtype bf16|q8_0] [--our-dtype bf16|int8] [--checkpoint DIR]
        [--peer llama|ik --peer-source DIR] [--cache DIR] [--json]

CONFIG.json is the config of a DeepSeek-V3 model without weights; `moesaic synth` makes them. The tests, for any number:
    ppN      prefill of N tokens
    tg1      decoding 128 tokens of one sequence from an empty context
    tgN      decoding 64 tokens of N sequences together, after 512 tokens of context each
    serveN   N clients over HTTP, each asking four times: 128 random tokens in, 128 out
The peer's weights are BF16 or Q8_0, as --dtype says; ours are made of the same BF16. llama.cpp comes from the Python package
index (the source in llama-cpp-python), ik_llama.cpp from the folder in --peer-source; ik_llama.cpp only takes models
with DeepSeek-V3's own head sizes. Everything that is downloaded, built or made lies in --cache and is used again.

The machine must do nothing else meanwhile: the peer's threads wait for each other by spinning, so that other work on
their cores slows it many times. It needs Python 3.11 with venv, a C++ compiler and the disk for two copies of the
weights.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import venv
from typing import NamedTuple

from serve import serve

LLAMA_CPP_PYTHON = "0.3.36"
TOOLS = ["cmake==4.4.5", "ninja==1.13.2", "gguf==0.19.0"]

HERE = pathlib.Path(__file__).resolve().parent
MOESAIC = HERE.parents[1] / "target" / "release" / "moesaic"
PROGRAMS = ["llama-bench", "llama-batched-bench", "llama-server"]

SPEED, FIRST_TOKEN = "tokens/s", "first token p50 (ms)"
TG_TOKENS, TG_CONTEXT = 64, 512
TG_TOKENS_ALONE = 128
SERVE_INPUT, SERVE_OUTPUT = 128, 128


class Test(NamedTuple):
    kind: str
    n: int


class Source(NamedTuple):
    name: str
    version: str
    folder: pathlib.Path


class Peer(NamedTuple):
    programs: pathlib.Path
    model: pathlib.Path
    vocabulary: int
    threads: int
    logs: pathlib.Path

    def command(self, program: str, *arguments: object) -> list[object]:
        return [self.programs / program, "-m", self.model, "-t", self.threads, *arguments]

    def measure(self, test: Test) -> dict[str, float]:
        if test.kind == "serve":
            context = test.n * (SERVE_INPUT + SERVE_OUTPUT + 64)
            command = self.command("llama-server", "-np", test.n, "-c", context, "--cache-ram", 0)
            rate, first = serve(command, self.logs / "server.log", test.n, SERVE_INPUT, SERVE_OUTPUT, self.vocabulary)
            return {SPEED: rate, FIRST_TOKEN: 1000 * first}
        if test == Test("tg", 1):
            return {SPEED: self.bench("-p", 0, "-n", TG_TOKENS_ALONE)}
        if test.kind == "pp":
            return {SPEED: self.bench("-p", test.n, "-n", 0)}
        return {SPEED: self.batched_bench(test.n)}

    def bench(self, *arguments: object) -> float:
        return self.figure(r'"avg_ts": ([\d.]+)', self.command("llama-bench", "-r", 1, "-o", "json", *arguments))

    def batched_bench(self, batch: int) -> float:
        context = batch * (TG_CONTEXT + TG_TOKENS)
        shape = ["-npp", TG_CONTEXT, "-ntg", TG_TOKENS, "-npl", batch]
        # PP, TG, B, N_KV, T_PP s, S_PP t/s, T_TG s, S_TG t/s, T s, S t/s
        row = rf"^\| +{TG_CONTEXT} \| +{TG_TOKENS} \| +{batch} \|(?:[ \d.]+\|){{4}} +([\d.]+) \|"
        return self.figure(row, self.command("llama-batched-bench", "-c", context, *shape))

    def figure(self, pattern: str, command: list[object]) -> float:
        """A number in what a command prints; ik_llama.cpp prints some on stderr, and leaves a log where it runs."""
        found = re.search(pattern, run(command, stderr=subprocess.STDOUT, cwd=self.logs), re.MULTILINE)
        if found is None:
            fail(f"`{' '.join(map(str, command))}` printed no result")
        return float(found[1])


class Ours(NamedTuple):
    model: pathlib.Path
    dtype: str
    threads: int

    def measure(self, test: Test) -> dict[str, float]:
        # The first row is not counted: the peer's programs also run something before they measure.
        arguments = {
            "pp": ["--pp", f"{test.n},{test.n}"],
            "tg": ["--pp", 512, "--tg", TG_TOKENS, "--ctx", TG_CONTEXT, "--batch", test.n],
            "serve": ["--pp", 512, "--streams", test.n, "--input", SERVE_INPUT, "--output", SERVE_OUTPUT],
        }[test.kind]
        if test == Test("tg", 1):
            arguments = ["--pp", 512, "--tg", TG_TOKENS_ALONE, "--ctx", 1, "--batch", 1]
        command = [MOESAIC, "bench", "--json", "--runs", 1, "--model", self.model]
        command += ["--dtype", self.dtype, "--threads", self.threads]
        _, row = json.loads(run([*command, *arguments]))["rows"]
        measured = {SPEED: row["tokens_per_s"]}
        if test.kind == "serve":
            measured[FIRST_TOKEN] = 1000 * row["first_token_s"]["p50"]
        return measured


def main() -> None:
    args = arguments()
    if not MOESAIC.exists():
        fail(f"{MOESAIC} is missing: run `cargo build --release`")
    args.cache.mkdir(parents=True, exist_ok=True)
    tools = install_tools(args.cache)
    source = ik_source(args.peer_source, args.cache) if args.peer == "ik" else llama_source(args.cache, tools)
    say(f"building {source.version} (the first build takes long)")
    programs = build(source, args.cache, tools)
    say("making the model")
    checkpoint, gguf = models(args, tools)

    vocabulary = json.loads(args.config.read_text())["vocab_size"]
    peer = Peer(programs, gguf, vocabulary, args.threads, args.cache)
    ours = Ours(checkpoint, args.our_dtype, args.threads)
    rows = []
    for test in args.tests:
        runs = []
        for number in range(1, args.runs + 1):
            runs.append((peer.measure(test), ours.measure(test)))
            say(f"{test.kind}{test.n}, run {number}: peer {shown(runs[-1][0])}, ours {shown(runs[-1][1])}")
        rows += [row(test, unit, [(theirs[unit], our[unit]) for theirs, our in runs]) for unit in runs[0][0]]
    report = {"peer": source.version, "peer_dtype": args.dtype, "our_dtype": args.our_dtype, "model": args.config.stem}
    report |= {"threads": args.threads, "runs": args.runs, "rows": rows}
    print(json.dumps(report, indent=2) if args.json else table(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, required=True, help="a config.json of the V3 architecture")
    parser.add_argument("--tests", type=tests, default="pp512,pp2048,tg1,tg4,tg16,tg64,serve8,serve32")
    parser.add_argument("--runs", type=int, default=3, help="of each test on each side; medians are shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "q8_0"], default="bf16", help="the peer's weights")
    parser.add_argument("--our-dtype", choices=["bf16", "int8"], default="bf16", help="what moesaic computes in")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a folder that `moesaic synth` made of the config")
    parser.add_argument("--peer", choices=["llama", "ik"], default="llama")
    parser.add_argument("--peer-source", type=pathlib.Path, help="a folder with ik_llama.cpp's source")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path.home() / ".cache" / "moesaic-peers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if (args.peer == "ik") != (args.peer_source is not None):
        parser.error("--peer ik and --peer-source DIR go together")
    if not args.config.is_file():
        parser.error(f"--config: there is no file {args.config}")
    config = json.loads(args.config.read_text())
    if args.peer == "ik" and (config["kv_lora_rank"], config["qk_rope_head_dim"]) != (512, 64):
        parser.error("ik_llama.cpp only takes models with a kv_lora_rank of 512 and a qk_rope_head_dim of 64")
    args.cache = args.cache.resolve()
    return args


def tests(text: str) -> list[Test]:
    found = [re.fullmatch(r"(pp|tg|serve)([1-9]\d*)", name) for name in text.split(",")]
    if None in found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a list as pp512,tg1,tg16,serve8")
    return [Test(match[1], int(match[2])) for match in found]


def install_tools(cache: pathlib.Path) -> pathlib.Path:
    """A virtual environment with cmake, ninja and gguf; its folder of programs."""
    home = cache / "tools"
    installed = home / "installed.txt"
    if not installed.exists() or installed.read_text().split() != TOOLS:
        try:
            venv.create(home, clear=True, with_pip=True)
        except (subprocess.CalledProcessError, ImportError):
            fail("Python's venv is missing: install python3-venv (apt-get install python3-venv)")
        run([home / "bin" / "pip", "install", "--quiet", *TOOLS])
        installed.write_text("\n".join(TOOLS))
    return home / "bin"


def llama_source(cache: pathlib.Path, tools: pathlib.Path) -> Source:
    name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    package = cache / name
    if not package.exists():
        wanted = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        unpacked = cache / "unpacked"
        run([tools / "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", cache, wanted])
        shutil.rmtree(unpacked, ignore_errors=True)
        shutil.unpack_archive(cache / f"{name}.tar.gz", unpacked)
        (unpacked / name).rename(package)
        unpacked.rmdir()
    commit = re.search(r"llama\.cpp@(\w+)", (package / "CHANGELOG.md").read_text())
    version = f"llama.cpp {commit[1]} (llama-cpp-python {LLAMA_CPP_PYTHON})"
    return Source(name, version, package / "vendor" / "llama.cpp")


def ik_source(checkout: pathlib.Path, cache: pathlib.Path) -> Source:
    """A copy whose batched bench decodes random tokens, as llama.cpp's does.

    As published it gives every sequence the same token, so that all of them read one sequence's experts.
    """
    bench = pathlib.Path("examples", "batched-bench", "batched-bench.cpp")
    if not (checkout / bench).is_file():
        fail(f"{checkout} holds no {bench}: --peer-source must be a checkout of ik_llama.cpp")
    source = cache / "ik_llama.cpp"
    shutil.copytree(checkout, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
    text = (source / bench).read_text()
    text = text.replace("common_batch_add(batch, 0,", "common_batch_add(batch, std::rand() % llama_n_vocab(model),")
    (source / bench).write_text(text)
    commit = "of an unknown commit"
    if (checkout / ".git").exists():
        commit = run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"]).strip()
    return Source("ik_llama.cpp", f"ik_llama.cpp {commit}", source)


def build(source: Source, cache: pathlib.Path, tools: pathlib.Path) -> pathlib.Path:
    if not (shutil.which("c++") and shutil.which("cc")):
        fail("a C and C++ compiler is missing: install g++ (apt-get install g++)")
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF"]
    options += ["LLAMA_BUILD_TESTS=OFF", "LLAMA_USE_PREBUILT_UI=OFF", f"CMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    cmake = ["nice", "-n", "19", tools / "cmake"]
    folder = cache / f"build-{source.name}"
    run([*cmake, "-G", "Ninja", "-S", source.folder, "-B", folder, *(f"-D{option}" for option in options)])
    run([*cmake, "--build", folder, "-j", str(os.cpu_count()), "--target", *PROGRAMS])
    return folder / "bin"


def models(args: argparse.Namespace, tools: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The checkpoint and its GGUF file, made if they are not there."""
    config = json.loads(args.config.read_text())
    name = f"{args.config.stem}-{hashlib.sha256(args.config.read_bytes()).hexdigest()[:8]}"
    checkpoint = args.checkpoint or args.cache / name
    if not checkpoint.exists():
        unfinished = checkpoint.with_name(f"{checkpoint.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        run([MOESAIC, "synth", "--config", args.config, "--out", unfinished])
        unfinished.rename(checkpoint)
    if json.loads((checkpoint / "config.json").read_text()) != config:
        fail(f"{checkpoint} was not made of {args.config}")
    gguf = args.cache / f"{name}-{args.dtype}.gguf"
    if not gguf.exists():
        run([tools / "python", HERE / "gguf_model.py", checkpoint, gguf, args.dtype])
    return checkpoint, gguf


def row(test: Test, unit: str, pairs: list[tuple[float, float]]) -> dict:
    peer, ours = (spread(values) for values in zip(*pairs, strict=True))
    ratio = ours["median"] / peer["median"]
    return {"test": f"{test.kind}{test.n}", "unit": unit, "peer": peer, "ours": ours, "ratio": ratio}


def spread(values: tuple[float, ...]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(report: dict) -> str:
    lines = [
        f"{report['peer']} in {report['peer_dtype']} beside moesaic in {report['our_dtype']}",
        f"model {report['model']}, {report['threads']} threads, median (min-max) of {report['runs']}",
        "",
        "| test | unit | peer | ours | ours / peer |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        peer, ours = ("{median:.1f} ({min:.1f}-{max:.1f})".format(**row[side]) for side in ("peer", "ours"))
        lines.append(f"| {row['test']} | {row['unit']} | {peer} | {ours} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shown(measured: dict[str, float]) -> str:
    return ", ".join(f"{unit} {value:.1f}" for unit, value in measured.items())


def run(command: list[object], stderr: int = subprocess.PIPE, cwd: pathlib.Path | None = None) -> str:
    """What a command printed; ends the script if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, check=False, stdout=subprocess.PIPE, stderr=stderr, cwd=cwd, text=True, errors="replace"
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + (done.stderr or "")).splitlines()[-25:])
        fail(f"{last}\n\n`{' '.join(words)}` ended with {done.returncode}; its last lines are above")
    return done.stdout


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
