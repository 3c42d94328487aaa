"""docs/operate.md has a runbook for every alert, and what it names is there: commands, flags, settings, metrics, files."""

import re

import pytest

import names
import pages
from files import GRAFANA, GUIDE, REPOSITORY, alerts, records

TEXT = GUIDE.read_text()
# What `code` says, in a line or as a block.
CODE = re.findall(r"```sh\n(.*?)```", TEXT, re.S) + re.findall(
    r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)
)
RUST = {
    path: path.read_text()
    for folder in (
        "crates/moesaic/src",
        "coordinator/src",
        "attention-worker/src",
        "expert-worker/src",
        "crates/node/src",
        "crates/dispatch/src",
    )
    for path in (REPOSITORY / folder).rglob("*.rs")
}


def anchor(heading: str) -> str:
    """As on GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


HEADINGS = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", TEXT, re.M)}
RUNBOOKS = dict(re.findall(r"^### (\w+)\n(.+?)(?=\n\n|\Z)", TEXT, re.M | re.S))


def test_it_is_short():
    assert len(TEXT.splitlines()) < 250


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    assert RUNBOOKS.keys() == alerts().keys()
    assert list(RUNBOOKS) == list(alerts()), "in the order of alerts.yaml"
    assert {alert["annotations"]["runbook"] for alert in alerts().values()} == {
        f"docs/operate.md#{anchor(name)}" for name in RUNBOOKS
    }
    assert {name for name, text in RUNBOOKS.items() if len(text) < 60} == set()


def test_alerts_that_it_names_exist():
    assert set(re.findall(r"`(Moesaic\w+)`", TEXT)) <= alerts().keys()


def test_every_death_of_the_architecture_is_recovered_from():
    table = (
        (REPOSITORY / "ARCHITECTURE.md").read_text().split("## What happens when something dies")[1].split("\n\n")[1]
    )
    deaths = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert len(deaths) >= 5
    recovered = TEXT.split("## Recover")[1].split("## Read")[0]
    assert [death for death in deaths if f"\n| {death}" not in recovered] == []


def test_commands_and_flags_exist():
    cli = (REPOSITORY / "crates/moesaic/src/cli.rs").read_text()
    variants = re.findall(r"^    (\w+)(?:\(.+\)),$", cli.split("enum Command {")[1].split("\n}")[0], re.M)
    known = {re.sub(r"(?<!^)(?=[A-Z])", "-", variant).lower() for variant in variants}
    assert {"up", "status", "attention-worker"} <= known
    used = [re.match(r"moesaic ([a-z-]+)((?: --[a-z-]+)*)", code) for code in CODE if code.startswith("moesaic ")]
    assert {found[1] for found in used if found} >= {"status", "drain", "uncordon", "rebalance", "inspect"}
    for found in used:
        assert found and found[1] in known, found
    operate = (REPOSITORY / "crates/moesaic/src/operate.rs").read_text()
    for flag in {flag for found in used for flag in found[2].split()}:
        assert re.search(rf"^    {flag.removeprefix('--').replace('-', '_')}: ", operate, re.M), flag


def test_settings_and_variables_exist():
    settings = [code for code in CODE if re.fullmatch(r"[a-z]+(_[a-z]+)+", code)]
    assert {"expert_slots", "expert_workers", "sequences_max"} <= set(settings)
    rust = "\n".join(RUST.values())
    known = set(re.findall(r"pub (\w+):", rust))
    config = {"hidden_size", "moe_intermediate_size", "num_hidden_layers", "first_k_dense_replace", "n_routed_experts"}
    prometheus = {"rule_files"}
    reasons = set().union(*pages.labels_of_all()["moesaic_requests_refused_total"].values())
    assert [name for name in settings if name not in known | config | prometheus | reasons] == []
    for variable in set(re.findall(r"\bMOESAIC_[A-Z_]+", TEXT)):
        assert f'"{variable}"' in rust, variable


@pytest.mark.parametrize(
    "line",
    [code for code in CODE if re.fullmatch(r"(?!moesaic |kubectl )[a-z][a-z ]+", code) and len(code.split()) > 2],
)
def test_log_lines_exist(line):
    assert any(line in text for text in RUST.values()), line


def test_metrics_and_dashboards_exist():
    assert {name for name in names.USED.findall(TEXT) if name not in names.made()} == set()
    assert set(names.RECORDED.findall(TEXT)) <= records().keys()
    shown = "\n".join(path.read_text() for path in GRAFANA.glob("*.json"))
    panels = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", TEXT))
    assert len(panels) >= 4
    assert [panel for panel in panels if panel.lower() not in shown.lower()] == []


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links and [link for link in links if not (GUIDE.parent / link.split("#")[0]).exists()] == []
    paths = set(re.findall(r"`((?:k8s|docs|tests)/[\w./-]+)`", TEXT))
    assert {path for path in paths if not (REPOSITORY / path).exists()} == set()
