"""Prometheus' own checks."""

import json
import shutil
import subprocess
from pathlib import Path

from files import REPOSITORY


def promtool(*args, text: str | None = None) -> str:
    """What it says; an error if it does not like what it was given."""
    installed = shutil.which("promtool") or REPOSITORY / "target/promtool/usr/bin/promtool"
    assert Path(installed).exists(), "promtool is missing: tests/run monitoring fetches it"
    done = subprocess.run([installed, *args], input=text, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def check_rules(directory: Path, rules: list[dict]) -> str:
    """`rules` as a file of their own."""
    path = directory / "rules.yaml"
    path.write_text(json.dumps({"groups": [{"name": "checked", "rules": rules}]}))
    return promtool("check", "rules", str(path))


def run_test(directory: Path, rule_files: list[Path], test: dict) -> str:
    """One of promtool's tests, as a file of its own."""
    path = directory / "test.yaml"
    path.write_text(
        json.dumps({"rule_files": [str(p) for p in rule_files], "evaluation_interval": "15s", "tests": [test]})
    )
    return promtool("test", "rules", str(path))
