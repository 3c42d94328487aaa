"""The overlays, rendered anew for each test: a test may change what it is given."""

import pytest
from manifests import OVERLAYS, render


@pytest.fixture(params=OVERLAYS)
def overlay(request) -> str:
    return request.param


@pytest.fixture
def docs(overlay) -> list:
    return render(overlay)
