"""Every file under k8s/ begins with what it is for, and is short."""

from manifests import K8S

# One entry for each alert.
LONG = {"alerts.yaml": 360, "alerts-test.yaml": 660}


def test_files_say_what_they_are_for():
    files = [path for path in K8S.rglob("*") if path.suffix in (".yaml", ".toml")]
    assert len(files) > 30
    for path in files:
        text = path.read_text()
        assert text.startswith("# "), path
        assert len(text.splitlines()) <= LONG.get(path.name, 160), path
