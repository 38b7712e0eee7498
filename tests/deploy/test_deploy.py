"""Grafana's dashboard and Prometheus' alerts speak of what `/metrics` has, by its names and its labels."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chimera.core.measures import LOAD_S, Histogram
from chimera.server import metrics
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_metrics import measures, record, snapshot

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
PROMETHEUS_OWN = {"up"}
NAMES = re.compile(r"\b(?:chimera_|vllm:|sglang:)[a-z_]+\b|\bup\b")


def expressions() -> list[str]:
    of_panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    of_choices = [choice["query"] for choice in DASHBOARD["templating"]["list"]]
    of_alerts = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    return [*of_panels, *of_choices, *of_alerts]


def served() -> dict[str, set[str]]:
    """Every name that the page can have, with its labels."""
    counted = measures(record(), record(outcome="queue_full", first_token_s=None))
    counted.count("activate")
    counted.activations["first"] = Histogram.over(LOAD_S)
    counted.activations["first"].see(0.5, LOAD_S)
    counted.decisions.see(0.001, metrics.DECISION_S)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.page(counted, snapshot("m")).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_is_served() -> None:
    spoken = {name for expression in expressions() for name in NAMES.findall(expression)}
    assert len(spoken) > 20
    assert spoken - PROMETHEUS_OWN <= served().keys()


def test_every_label_is_one_of_its_metric() -> None:
    known = served()
    for expression in expressions():
        of_names = set().union(*(known.get(name, set()) for name in NAMES.findall(expression)))
        asked = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        asked |= set(re.findall(r'[{,](\w+)=~?"', expression)) - {"job"}
        assert asked <= of_names, expression


def test_the_dashboard_is_what_its_script_makes() -> None:
    assert runpy.run_path(str(DEPLOY / "make_dashboard.py"))["dashboard"]() == DASHBOARD


def test_no_panel_lies_over_another() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_promtool_takes_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("not shown: promtool is not installed (Debian: prometheus)")
    ended = subprocess.run([promtool, "check", "rules", str(DEPLOY / "alerts.yml")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
