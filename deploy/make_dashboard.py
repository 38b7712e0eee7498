"""Writes `grafana.json`, a dashboard for Grafana, from the list of panels below: `python deploy/make_dashboard.py`.

The file is kept, so that nobody needs this to import it; a test holds the two together, and every metric to `/metrics`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("grafana.json")
BY = 'model_name=~"$model"'
OVER = "[$__rate_interval]"

Panel = tuple[str, str, list[tuple[str, str]]]
ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Promises",
        [
            (
                "Attained, of requests that ended",
                "percentunit",
                [
                    (
                        f'sum by (model_name) (rate(chimera_slo_kept_total{{promise="both",{BY}}}{OVER}))'
                        f" / sum by (model_name) (rate(chimera_requests_total{{{BY}}}{OVER}))",
                        "{{model_name}}",
                    )
                ],
            ),
            (
                "Time to first token, 95 of 100",
                "s",
                [
                    (
                        "histogram_quantile(0.95, sum by (le, model_name) "
                        f"(rate(vllm:time_to_first_token_seconds_bucket{{{BY}}}{OVER})))",
                        "{{model_name}}",
                    )
                ],
            ),
            (
                "Time per output token, 95 of 100",
                "s",
                [
                    (
                        "histogram_quantile(0.95, sum by (le, model_name) "
                        f"(rate(vllm:request_time_per_output_token_seconds_bucket{{{BY}}}{OVER})))",
                        "{{model_name}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Load",
        [
            (
                "Requests per second",
                "reqps",
                [(f"sum by (model_name) (rate(chimera_requests_total{{{BY}}}{OVER}))", "{{model_name}}")],
            ),
            (
                "Tokens per second",
                "none",
                [(f"sum by (model_name) (rate(vllm:generation_tokens_total{{{BY}}}{OVER}))", "{{model_name}}")],
            ),
            (
                "Waiting",
                "short",
                [
                    (f"sum by (model_name) (vllm:num_requests_waiting{{{BY}}})", "{{model_name}}"),
                    (f"sum by (model_name) (chimera_requests_held{{{BY}}})", "{{model_name}} without a replica"),
                ],
            ),
            (
                "Refused, by reason",
                "reqps",
                [(f"sum by (reason) (rate(chimera_requests_refused_total{{{BY}}}{OVER}))", "{{reason}}")],
            ),
        ],
    ),
    (
        "Memory",
        [
            (
                "By class",
                "bytes",
                [("sum by (class) (chimera_ledger_bytes)", "{{class}}"), ("sum(chimera_ledger_free_bytes)", "free")],
            ),
            ("KV leased", "bytes", [(f'sum by (model_name) (chimera_lease_bytes{{class="kv",{BY}}})', "{{model_name}}")]),
            (
                "KV in use, of what is leased",
                "percentunit",
                [(f"max by (model_name) (vllm:kv_cache_usage_perc{{{BY}}})", "{{model_name}}")],
            ),
            (
                "Leases granted and recalled",
                "ops",
                [(f"sum by (direction) (rate(chimera_lease_changes_total{OVER}))", "{{direction}}")],
            ),
            (
                "Cached tokens lost to recalls",
                "none",
                [(f"sum by (model_name) (rate(chimera_cached_tokens_lost_total{{{BY}}}{OVER}))", "{{model_name}}")],
            ),
        ],
    ),
    (
        "Decisions",
        [
            ("Actions", "ops", [(f"sum by (action) (rate(chimera_actions_total{OVER}))", "{{action}}")]),
            (
                "Activations, 95 of 100",
                "s",
                [(f"histogram_quantile(0.95, sum by (le, kind) (rate(chimera_activation_seconds_bucket{OVER})))", "{{kind}}")],
            ),
            (
                "Moves and failures",
                "ops",
                [
                    (f"sum(rate(chimera_moves_total{OVER}))", "moves"),
                    (f"sum(rate(chimera_activation_failures_total{OVER}))", "failures"),
                ],
            ),
            (
                "One decision, 99 of 100",
                "s",
                [(f"histogram_quantile(0.99, sum by (le) (rate(chimera_decision_seconds_bucket{OVER})))", "control")],
            ),
            ("Replicas, by state", "short", [(f"sum by (state) (chimera_replica_state{{{BY}}})", "{{state}}")]),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        width = 24 // min(len(row), 4)
        for place, (what, unit, queries) in enumerate(row):
            across = place % (24 // width)
            panels.append(
                {
                    "type": "timeseries",
                    "title": what,
                    "datasource": source,
                    "gridPos": {"x": across * width, "y": y + 1 + place // (24 // width) * 8, "w": width, "h": 8},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
                    "targets": [
                        {"refId": chr(65 + n), "expr": expression, "legendFormat": legend}
                        for n, (expression, legend) in enumerate(queries)
                    ],
                }
            )
        y += 1 + -(-len(row) // (24 // width)) * 8
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return {
        "title": "chimera",
        "uid": "chimera",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": source,
                    "query": "label_values(chimera_replica_state, model_name)",
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                    "multi": True,
                },
            ]
        },
        "panels": panels,
    }


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
