"""k8s/README.md says what there is, and what the operator brings."""

import re

from manifests import K8S, OVERLAYS
from rules.references import BROUGHT

TEXT = (K8S / "README.md").read_text()


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120


def test_it_names_all_that_is_brought():
    for kind, name in BROUGHT:
        assert f"{kind} `{name}`" in TEXT, name


def test_it_knows_the_overlays_and_its_links_lead_somewhere():
    assert set(OVERLAYS) == {path.name for path in (K8S / "overlays").iterdir()}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert {f"overlays/{overlay}" for overlay in OVERLAYS} <= set(links)
    assert [link for link in links if not (K8S / link).exists()] == []


def test_every_component_is_told_of_or_used():
    used = "".join(path.read_text() for path in (K8S / "overlays").glob("*/kustomization.yaml"))
    for path in (K8S / "components").iterdir():
        assert f"components/{path.name}" in used + TEXT, path.name
