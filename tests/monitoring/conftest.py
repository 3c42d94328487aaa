"""Pages of real nodes, if there are some:

pytest tests/monitoring --page coordinator=http://127.0.0.1:9090/metrics?experts=all --page expert-worker=page.txt
"""

import sys

import pages
from files import GRAFANA, ROLES

# The dashboards' generator.
sys.path.insert(0, str(GRAFANA))


def pytest_addoption(parser):
    parser.addoption("--page", action="append", default=[], metavar="ROLE=URL_OR_FILE", help="a real node's metrics")


def pytest_generate_tests(metafunc):
    """`role` and `page`: the written pages, then the real ones."""
    if "page" not in metafunc.fixturenames:
        return
    found = [(role, pages.written()[role]) for role in ROLES]
    names = [f"{role} as written" for role in ROLES]
    for option in metafunc.config.getoption("page"):
        role, _, source = option.partition("=")
        assert role in ROLES and source, f"--page {option}: expected one of {ROLES}, =, and a URL or a file"
        found.append((role, pages.read(source)))
        names.append(f"{role} of {source}")
    metafunc.parametrize(("role", "page"), found, ids=names)
