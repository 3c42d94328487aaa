"""Every resource is one that Kubernetes takes: no field it does not know, no value of another type."""

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import K8S, title
from schemas import CUSTOM

# The first that has all that is used, and a current one.
VERSIONS = ("1.30", "1.37")


def check(doc):
    schema = CUSTOM.get((doc["apiVersion"], doc["kind"]))
    if schema:
        jsonschema.validate(doc, schema)
    else:
        for version in VERSIONS:
            assert kubernetes_validate.validate(doc, version, strict=True) == version, title(doc)


def test_overlays(docs):
    for doc in docs:
        check(doc)


def test_the_example_of_a_volume():
    check(yaml.safe_load((K8S / "examples/weights-volume.yaml").read_text()))


def test_names_are_not_taken_twice(docs):
    names = [(doc["apiVersion"], doc["kind"], doc["metadata"]["name"]) for doc in docs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("field", ["replica", "serviceNames"])
def test_a_field_that_does_not_exist_is_found(field, docs):
    doc = next(doc for doc in docs if doc["kind"] == "StatefulSet")
    doc["spec"][field] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match=field):
        check(doc)
