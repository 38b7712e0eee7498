"""The chart under `deploy/helm`, rendered by Helm's own library and held to the schemas of Kubernetes. No cluster is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import chimera
import pytest
import yaml
from chimera.cli.main import make_parser
from chimera.config.conform import conform
from chimera.config.faults import Faults
from chimera.config.placement_file import PlacementFile
from chimera.units import parse_seconds

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "chimera"
NEEDS = "not shown: {} is not installed (requirements/dev.txt)"
KUBERNETES = ("1.29", "1.37")
"""The oldest and the newest that the objects are held to."""

INSTALLED: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "with keys": {"keysSecret": "chimera-keys"},
    "with a claim for downloads": {"cacheClaim": "downloads"},
    "without a GPU": {"gpus": 0, "image": {"tag": "cpu"}},
    "with everything": {"keysSecret": "k", "cacheClaim": "c", "gpus": 8, "port": 30000, "drainSeconds": 600},
}
EVERY = pytest.mark.parametrize("values", INSTALLED.values(), ids=INSTALLED)


def rendered(values: dict[str, Any]) -> dict[str, Any]:
    """What `helm install models` would give to the cluster, by its kind."""
    helm = pytest.importorskip("helm_python", reason=NEEDS.format("helm-python-sdk"))
    with helm.Chart.load(CHART) as chart:
        told = [yaml.safe_load(text) for text in chart.render(values, name="models").values()]
    return {made["kind"]: made for made in told}


def pod(values: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = rendered(values)["Deployment"]["spec"]["template"]["spec"]
    return made


@EVERY
@pytest.mark.parametrize("version", KUBERNETES)
def test_what_is_rendered_keeps_to_kubernetes_schemas(values: dict[str, Any], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason=NEEDS.format("kubernetes-validate")).validate
    made = rendered(values)
    assert set(made) == {"Deployment", "ConfigMap", "Service"}
    for document in made.values():
        validate(document, version, strict=True)


def test_helm_finds_no_fault_in_the_chart() -> None:
    helm = pytest.importorskip("helm_python", reason=NEEDS.format("helm-python-sdk"))
    told = helm.lint(CHART)
    assert not told["errors"]
    assert [fault["error"] for fault in told["messages"]] == ["icon is recommended"]


@EVERY
def test_the_pod_starts_the_server_with_words_that_it_knows(values: dict[str, Any]) -> None:
    [container] = pod(values)["containers"]
    arguments = make_parser({"serve"}).parse_args(container["args"])
    assert (arguments.keys is not None, arguments.open) == ("keysSecret" in values, "keysSecret" not in values)
    assert arguments.port == container["ports"][0]["containerPort"] == values.get("port", 8000)
    assert parse_seconds(arguments.drain) < pod(values)["terminationGracePeriodSeconds"]


@EVERY
def test_the_server_finds_the_files_that_it_is_told_of(values: dict[str, Any]) -> None:
    [container] = pod(values)["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod(values)["volumes"]}
    for word in container["args"]:
        assert not word.startswith("/") or str(Path(word).parent) in mounts.values(), word


def test_the_placement_arrives_as_one_that_the_server_takes() -> None:
    placement = {"models": [{"model_name": "a", "model_path": "b/c", "engine_args": {"mem": 1}}], "policy": "static"}
    for values, models in (({}, ["llama-3.1-8b"]), ({"placement": placement}, ["a"])):
        faults = Faults("placement.json")
        told = json.loads(rendered(values)["ConfigMap"]["data"]["placement.json"])
        file = conform(told, PlacementFile, "", faults)
        assert not faults, str(faults.error())
        assert [model.model_name for model in file.models] == models


def test_another_placement_is_another_pod_and_the_same_one_is_not() -> None:
    def template(values: dict[str, Any]) -> Any:
        return rendered(values)["Deployment"]["spec"]["template"]

    assert template({}) == template({})
    assert template({}) != template({"placement": {"policy": "static"}})


def test_the_service_leads_to_the_pod() -> None:
    made = rendered({"port": 30000})
    service, pods = made["Service"]["spec"], made["Deployment"]["spec"]["template"]
    assert service["selector"].items() <= pods["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] in [port["name"] for port in pods["spec"]["containers"][0]["ports"]]


def test_every_value_is_used() -> None:
    templates = "\n".join(path.read_text() for path in (CHART / "templates").glob("*.yaml"))
    told = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(re.findall(r"\.Values\.(\w+)", templates)) == set(told)


def test_the_chart_has_the_packages_version() -> None:
    told = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert told["version"] == told["appVersion"] == chimera.__version__
