"""The operator's verbs, through a front-end and the real control, with an agent that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
from chimera.cli import main
from chimera.control.exchange import Exchange
from chimera.core.gpu import Gpu
from chimera.core.placement import Placement, Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import stream
from chimera.msg.actions import Activate, Deactivate, Resize
from chimera.msg.events import ActivationFailed, AgentJoined, ReplicaReady, ReplicaStopped
from chimera.server.front import FrontEnd, listen
from chimera.wire.channel import Channel, connect
from chimera.wire.codec import Message

from tests.server.conftest import until
from tests.server.rehearsal import model, model_folder


class PlayedAgent:
    """Brings up what it is told to, unless it is told why it cannot."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.told: list[Activate | Deactivate] = []
        self.resized: list[tuple[str, int | None]] = []
        self.fault = ""
        self._lives = 0
        channel.deliver_to(self._hear)
        channel.send(stream.Hello(role="agent", name="local", pid=1))
        gpus = tuple(Gpu(gpu_id=number, capacity_bytes=2 << 30) for number in range(2))
        channel.send(AgentJoined(agent="local", agent_start=1, gpus=gpus))

    def _hear(self, message: Message) -> None:
        match message:
            case Activate(seat=seat):
                self.told.append(message)
                self._lives += 1
                epoch = Epoch(1, self._lives)
                if self.fault:
                    failed = ActivationFailed(replica=seat.replica, epoch=epoch, reason=self.fault, permanent=True)
                    self.channel.send(failed)
                    return
                self.channel.send(
                    ReplicaReady(replica=seat.replica, epoch=epoch, credits=4, kv_tokens=4096, context_length=512, load_s=0.25)
                )
            case Resize():
                self.resized.append((str(message.replica), message.kv_limit_bytes))
            case stream.Flush(replicas=replicas):
                for replica in replicas:
                    self.channel.send(stream.Flushed(order=message.order, front=message.front, replica=replica))
            case Deactivate(replica=replica, epoch=epoch):
                self.told.append(message)
                self.channel.send(ReplicaStopped(replica=replica, epoch=epoch, reason="it has drained"))


class Bench:
    def __init__(self, front: FrontEnd, exchange: Exchange, agent: PlayedAgent, client: aiohttp.ClientSession) -> None:
        self.front = front
        self.exchange = exchange
        self.agent = agent
        self.client = client

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        async with self.client.request(method, self.front.url + path, json=body) as response:
            return response.status, await response.json()

    async def state(self) -> dict[str, str]:
        _, snapshot = await self.ask("GET", "/snapshot")
        return {f"{view['replica'][0]}/{view['replica'][1]}": view["state"] for view in snapshot["replicas"]}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with TemporaryDirectory(prefix="chimera-") as folder:
        run_dir = Path(folder)
        models = [model(name, model_folder(run_dir / name)) for name in ("a", "b")]
        wanted = Placement((Seat(replica=ReplicaId("a"), gpu_ids=(0,)),))
        exchange = Exchange(models=models, wanted=wanted, socket=run_dir / "control.sock")
        await exchange.start()
        agent = PlayedAgent(await connect(run_dir / "control.sock"))
        front = FrontEnd(run_dir=run_dir, name="front-0", listener=listen("127.0.0.1", 0))
        await front.start()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
            await until(lambda: front.ready)
            yield Bench(front, exchange, agent, client)
        await front.close()
        agent.channel.close()
        await exchange.stop()


async def test_a_model_is_loaded_and_unloaded_on_order(bench: Bench) -> None:
    status, body = await bench.ask("POST", "/models/load", {"model": "b"})
    assert (status, body["model"], body["state"], body["reason"]) == (200, "b", "serving", "ready in 0.2 s")
    assert await bench.state() == {"a/0": "serving", "b/0": "serving"}
    status, body = await bench.ask("POST", "/models/unload", {"model": "b"})
    assert (status, body) == (200, {"model": "b", "state": "stopped", "stopped": [0]})
    assert await bench.state() == {"a/0": "serving"}
    last = bench.agent.told[-1]
    assert isinstance(last, Deactivate) and last.reason == "the operator wants it unloaded"


async def test_what_is_as_it_is_wanted_is_said_at_once(bench: Bench) -> None:
    orders = len(bench.agent.told)
    assert (await bench.ask("POST", "/models/load", {"model": "a"}))[1]["reason"] == "it was up already"
    assert (await bench.ask("POST", "/models/unload", {"model": "b"}))[1]["stopped"] == []
    assert len(bench.agent.told) == orders


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/models/load", {"model": "absent"}, 404, "absent"),
        ("/models/unload", {"model": "absent"}, 404, "absent"),
        ("/models/load", {"model": "b", "gpu_ids": [7]}, 503, "[7]"),
        ("/models/load", {"model": "b", "gpu_ids": "all"}, 400, "gpu_ids"),
        ("/activate", {"model": "b"}, 400, "model_name"),
        ("/models/unload", {"model": "a", "drain_s": -1}, 400, "drain_s"),
    ],
)
async def test_an_order_that_cannot_be_is_refused_with_the_reason(
    bench: Bench, path: str, body: dict[str, Any], status: int, named: str
) -> None:
    got, answer = await bench.ask("POST", path, body)
    assert got == status and named in answer["error"]["message"]


async def test_a_load_that_fails_says_why(bench: Bench) -> None:
    bench.agent.fault = "no such file: model.safetensors"
    status, body = await bench.ask("POST", "/models/load", {"model": "b"})
    assert (status, body["error"]["code"]) == (503, "model_unavailable") and "model.safetensors" in body["error"]["message"]


async def test_prisms_scripts_find_their_verbs(bench: Bench) -> None:
    assert await bench.ask("GET", "/get_model_names") == (200, {"model_names": ["a", "b"]})
    ask = {"model_name": "b", "gpu_id": 1, "instance_idx": 0, "memory_pool_size": 0.5}
    assert (await bench.ask("POST", "/activate", ask))[0] == 200
    seat = bench.agent.told[-1]
    assert isinstance(seat, Activate) and (seat.seat.gpu_ids, seat.seat.kv_limit_bytes) == ((1,), 500_000_000)
    status, sizes = await bench.ask("GET", "/get_memory_pool_size")
    assert status == 200 and [(size["model_name"], size["memory_pool_size"]) for size in sizes] == [
        ("a", 4096 * 1024 / 10**9),
        ("b", 4096 * 1024 / 10**9),
    ]
    off = {"model_name": "b", "instance_idx": 0, "evict_waiting_requests": True, "preempt": True, "preempt_mode": "swap"}
    assert (await bench.ask("POST", "/deactivate", off))[0] == 200
    last = bench.agent.told[-1]
    assert isinstance(last, Deactivate) and last.drain_s == 0.0


async def test_whoever_watches_hears_how_things_are_and_what_becomes_of_them(bench: Bench) -> None:
    heard: list[tuple[str, str]] = []
    async with bench.client.get(bench.front.url + "/models/events") as response:
        async with asyncio.timeout(5):
            while len(heard) < 5:
                line = (await response.content.readline()).decode()
                if line.startswith("data: "):
                    told = json.loads(line[6:])
                    heard.append((told["model"], told["state"]))
                    if len(heard) == 1:
                        assert (await bench.ask("POST", "/models/load", {"model": "b"}))[0] == 200
                        assert (await bench.ask("POST", "/models/unload", {"model": "b"}))[0] == 200
    assert heard == [("a", "serving"), ("b", "loading"), ("b", "serving"), ("b", "draining"), ("b", "stopped")]


async def test_a_pin_reaches_control_and_every_front_end(bench: Bench) -> None:
    assert await bench.ask("POST", "/models/pin", {"model": "a"}) == (200, {"model": "a", "pin": True})
    _, snapshot = await bench.ask("GET", "/snapshot")
    assert {spec["name"]: spec["pin"] for spec in snapshot["models"]} == {"a": True, "b": False}
    assert bench.front.catalogue.resolve("a").pin
    await bench.ask("POST", "/models/pin", {"model": "a", "pin": False})
    _, snapshot = await bench.ask("GET", "/snapshot")
    assert not any(spec["pin"] for spec in snapshot["models"])


async def test_a_model_is_removed_and_no_longer_known(bench: Bench) -> None:
    assert await bench.ask("DELETE", "/models/a") == (200, {"model": "a", "deleted": True})
    assert await bench.ask("GET", "/get_model_names") == (200, {"model_names": ["b"]})
    assert (await bench.ask("POST", "/v1/completions", {"model": "a", "prompt": "x"}))[0] == 404
    assert isinstance(bench.agent.told[-1], Deactivate)


async def test_an_order_whose_control_goes_away_says_so(bench: Bench) -> None:
    bench.agent.channel.deliver_to(lambda message: None)  # it hears, and does nothing
    asking = asyncio.create_task(bench.ask("POST", "/models/load", {"model": "b"}))
    await until(lambda: bool(bench.front._relay._watches))
    await until(lambda: ReplicaId("b") in bench.exchange.scheduler.fleet.places)
    await bench.exchange.stop()
    status, body = await asking
    assert status == 503 and "went away" in body["error"]["message"]


async def test_the_verbs_of_the_command_line(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    async def chimera(*words: str) -> tuple[int, str]:
        status = await asyncio.to_thread(main.main, [*words, "--url", bench.front.url])
        said = capsys.readouterr()
        return status, said.out + said.err

    assert await chimera("load", "b", "--gpus", "1") == (0, "b is serving: ready in 0.2 s\n")
    assert await chimera("pin", "b") == (0, "b stays\n")
    status, table = await chimera("ps")
    assert status == 0 and [line.split()[0] for line in table.splitlines()] == ["MODEL", "a", "b"]
    assert table.splitlines()[2].split()[-1] == "yes"
    assert len(json.loads((await chimera("ps", "--json"))[1])) == 2
    assert await chimera("unload", "b", "--now") == (0, "b is down\n")
    assert await chimera("unload", "b") == (0, "b was down already\n")
    assert json.loads((await chimera("pin", "b", "--off", "--json"))[1]) == {"model": "b", "pin": False}
    status, told = await chimera("policy")
    assert status == 0 and told.startswith("static (requests go by fcfs)\n") and "[static]" in told and "goodput" in told
    assert json.loads((await chimera("policy", "--local", "slack", "--json"))[1]) == {"policy": "static", "local": "slack"}
    status, told = await chimera("load", "bb")
    assert status == 1 and "did you mean 'b'" in told


async def test_a_model_is_down_when_all_its_copies_are(bench: Bench) -> None:
    assert (await bench.ask("POST", "/models/load", {"model": "a", "index": 1, "gpu_ids": [1]}))[0] == 200
    assert (await bench.ask("POST", "/models/unload", {"model": "a"}))[1]["stopped"] == [0, 1]
    assert await bench.state() == {}


async def test_a_pool_has_another_limit_in_prisms_words(bench: Bench) -> None:
    order = {"model_name": "a", "memory_pool_size": 0.5}
    told = {"model": "a", "memory_pool_size": 0.5, "replicas": [0]}
    assert await bench.ask("POST", "/resize_mem_pool", order) == (200, told)
    await until(lambda: bench.agent.resized == [("a/0", 500_000_000)])
    [size] = (await bench.ask("GET", "/get_memory_pool_size"))[1]
    assert size["max_memory_pool_size"] == 0.5
    status, body = await bench.ask("POST", "/resize_mem_pool", {**order, "model_name": "b"})
    assert (status, body["error"]["code"]) == (503, "model_not_loaded")
    assert (await bench.ask("POST", "/resize_mem_pool", {**order, "memory_pool_size": 0}))[0] == 400


async def test_caches_are_flushed_once_every_replica_has_said_so(bench: Bench) -> None:
    await bench.ask("POST", "/models/load", {"model": "b"})
    assert await bench.ask("POST", "/flush_cache") == (200, {"flushed": ["a/0", "b/0"]})
    assert await bench.ask("GET", "/flush_cache") == (200, {"flushed": ["a/0", "b/0"]})


async def test_a_stream_may_say_how_far_the_loading_of_its_model_is(bench: Bench) -> None:
    orders: list[Message] = []
    bench.agent.channel.deliver_to(orders.append)  # it obeys, and takes its time
    loading = asyncio.create_task(bench.ask("POST", "/models/load", {"model": "b"}))
    await until(lambda: any(isinstance(order, Activate) for order in orders))
    body = {"model": "b", "prompt": "x", "stream": True, "send_loading_state": True}

    async with contextlib.AsyncExitStack() as streams:
        waiting = []
        for place in ("1", "2"):
            response = await streams.enter_async_context(bench.client.post(bench.front.url + "/v1/completions", json=body))
            assert response.status == 200 and response.headers["x-queue-position"] == place
            assert float(response.headers["x-estimated-wait"]) >= 0
            waiting.append(response)
        first = [(await response.content.readline()).decode() for response in waiting]
        assert first[0].startswith(": b has been loading for") and "; next; about" in first[0]
        assert "; 1 before this request; about" in first[1]
        failed = ActivationFailed(replica=ReplicaId("b"), epoch=Epoch(1, 9), reason="no such file", permanent=True)
        bench.agent.channel.send(failed)
        for response in waiting:
            events = (await response.read()).decode().split("\n\n")
            news = [event.strip() for event in events if event.strip() and not event.lstrip().startswith(":")]
            assert len(news) == 1 and "no such file" in json.loads(news[0].removeprefix("data: "))["error"]["message"]
    await loading


async def test_without_that_wish_a_request_that_fails_before_its_first_token_has_its_status(bench: Bench) -> None:
    bench.agent.fault = "no such file"
    await bench.ask("POST", "/models/load", {"model": "b"})
    body = {"model": "b", "prompt": "x", "stream": True}
    assert (await bench.ask("POST", "/v1/completions", body))[0] == 503


async def test_the_verbs_of_other_servers_do_what_ours_do(bench: Bench) -> None:
    assert await bench.ask("GET", "/running") == (200, {"running": [{"model": "a", "state": "ready"}]})
    assert (await bench.ask("GET", "/ready"))[0] == (await bench.ask("GET", "/liveness"))[0] == 200
    assert await bench.ask("GET", "/is_sleeping?model=b") == (200, {"is_sleeping": True})
    assert (await bench.ask("POST", "/wake_up?model=b"))[0] == 200
    assert await bench.ask("GET", "/is_sleeping?model=b") == (200, {"is_sleeping": False})
    [process, _] = (await bench.ask("GET", "/api/ps"))[1]["models"]
    assert (process["name"], process["context_length"], process["details"]["family"]) == ("a", 512, "LlamaForCausalLM")
    assert process["size"] == (1 << 20) + 4096 * (1 << 10), "weights and KV memory"
    assert (await bench.ask("POST", "/sleep?model=a"))[0] == 200
    index = [{"name": "a", "state": "UNAVAILABLE"}, {"name": "b", "state": "READY"}]
    assert await bench.ask("POST", "/v2/repository/index") == (200, index)
    assert (await bench.ask("POST", "/v2/repository/models/a/load"))[0] == 200
    assert (await bench.ask("POST", "/v2/repository/models/b/unload"))[0] == 200
    assert await bench.state() == {"a/0": "serving"}
    assert (await bench.ask("GET", "/unload"))[0] == 200
    assert await bench.state() == {}
    assert (await bench.ask("GET", "/readiness"))[0] == 503
    assert (await bench.ask("POST", "/sleep"))[0] == 404, "which of the two?"
    assert (await bench.ask("GET", "/model_info?model=a"))[1]["is_generation"] is True
    assert (await bench.ask("GET", "/server_info"))[1]["models"] == ["a", "b"]


async def test_a_picture_in_another_sites_page_gives_no_order(bench: Bench) -> None:
    async with bench.client.get(bench.front.url + "/unload", headers={"Sec-Fetch-Site": "cross-site"}) as response:
        assert response.status == 403
    assert await bench.state() == {"a/0": "serving"}
