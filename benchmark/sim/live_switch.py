"""Switches the policy of a running server again and again under load: no request lost, none answered by another model.

    python -m benchmark.sim.live_switch [--every 20] [--clients 4] [--url http://127.0.0.1:8123] [--json FILE]

Without `--url` a server is started with two tiny models on real engines, on one virtual GPU and under `static`.
Every client asks each model the same greedy question over and over; an answer that differs from that model's first is counted.
Where numbers of two batches round differently a greedy answer may differ by itself, so only the first tokens are compared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from urllib.parse import urlsplit

from benchmark import report
from benchmark.served import entry, served

POLICIES = ("time-sharing", "space-sharing", "flexible", "static")
COMPARED_TOKENS = 4


def main() -> int:
    options = report.parser(__doc__)
    options.add_argument("--url", help="a server that runs already, under static")
    options.add_argument("--every", type=float, default=20.0)
    options.add_argument("--clients", type=int, default=4)
    arguments = options.parse_args()
    if arguments.url is not None:
        return _under_load(arguments.url, arguments)
    models = [entry(kind, kind, {"gpu_ids": [0], "on": True}) for kind in ("llama", "qwen3")]
    with served({"gpus": "1x1GiB", "models": models}, "--policy", "static") as url:
        return _under_load(url, arguments)


def _under_load(url: str, arguments: argparse.Namespace) -> int:
    figures = report.Figures("the policy changes under load", seed=arguments.seed)
    models = [card["id"] for card in _call(url, "GET", "/v1/models")["data"]]
    expected = {model: _answer(url, model) for model in models}
    if len(set(expected.values())) < len(models):
        raise SystemExit("two models give the same answer, so a mistake could not be told")
    stop = threading.Event()
    tally = {"answered": 0, "lost": 0, "strange": 0}
    lock = threading.Lock()

    def client(number: int) -> None:
        while not stop.is_set():
            model = models[(number + tally["answered"]) % len(models)]
            try:
                outcome = "answered" if _answer(url, model) == expected[model] else "strange"
            except (OSError, RuntimeError) as fault:
                outcome = "lost"
                print(f"# lost: {fault}")
            with lock:
                tally[outcome] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for policy in POLICIES:
        time.sleep(arguments.every)
        _call(url, "PUT", "/policy", {"policy": policy})
        figures.add(f"requests answered before {policy}", tally["answered"], "")
    time.sleep(arguments.every)
    stop.set()
    for thread in threads:
        thread.join()
    figures.add("requests answered", tally["answered"], "", at_least=1)
    figures.add("requests lost", tally["lost"], "", at_most=0)
    figures.add("answers of another model", tally["strange"], "", at_most=0)
    return figures.finish(arguments.json)


def _answer(url: str, model: str) -> str:
    sampling = {"model": model, "prompt": "a story of a dragon", "max_tokens": COMPARED_TOKENS, "temperature": 0}
    return str(_call(url, "POST", "/v1/completions", sampling)["choices"][0]["text"])


def _call(url: str, method: str, path: str, body: dict[str, object] | None = None) -> dict:  # type: ignore[type-arg]
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=120)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise RuntimeError(f"{response.status} {content.decode()[:300]}")
    answer: dict[str, object] = json.loads(content)
    return answer


if __name__ == "__main__":
    raise SystemExit(main())
