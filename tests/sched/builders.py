"""Small words for the tests of decisions: what the story does not name has a plain value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.msg.actions import Action, Activate, Admit, Deactivate, Reject, Requeue, Route
from chimera.msg.events import AgentJoined, Outcome, ReplicaReady, RequestArrived, RequestFinished, WorkerLost
from chimera.sched.cost import CostTable
from chimera.units import GIB, MIB

A = TypeVar("A", bound=Action)


def gpu(gpu_id: int = 0, *, pages: int = 8) -> Gpu:
    return Gpu(gpu_id=gpu_id, capacity_bytes=pages * 2 * MIB)


def model(name: str, *, tp_size: int = 1, drain_s: float = 5.0) -> ModelSpec:
    return ModelSpec(
        name=name,
        path=f"/models/{name}",
        tokenizer_path=f"/models/{name}",
        architecture="TinyForCausalLM",
        weight_bytes=GIB,
        kv_bytes_per_token=1024,
        context_length=4096,
        tp_size=tp_size,
        drain_s=drain_s,
    )


def request(
    request_id: str, name: str = "a", *, at: float = 0.0, tries: int = 0, front: str = "front-0", **more: Any
) -> Request:
    plain: dict[str, Any] = {"prompt_tokens": 8, "max_tokens": 16}
    return Request(request_id=request_id, model=name, front=front, arrived_s=at, tries=tries, **(plain | more))


def arrived(request_id: str, name: str = "a", *, at: float = 0.0, tries: int = 0, front: str = "front-0") -> RequestArrived:
    return RequestArrived(request=request(request_id, name, at=at, tries=tries, front=front))


def routed(request_id: str, replica: ReplicaId, *, at: float = 0.0, tries: int = 0, **more: Any) -> Route:
    """As control's `Route` comes to an agent."""
    asked = request(request_id, replica.model, at=at, tries=tries, **more)
    return Route(request=asked, replica=replica, agent="local", reason="")


def seat(name: str, *gpu_ids: int, index: int = 0) -> Seat:
    return Seat(replica=ReplicaId(name, index), gpu_ids=gpu_ids or (0,))


def placement(*seats: Seat) -> Placement:
    return Placement(seats)


def activate(name: str, *gpu_ids: int, index: int = 0) -> Activate:
    return Activate(model=model(name), seat=seat(name, *gpu_ids, index=index), reason="wanted")


def joined(
    agent: str = "local",
    *,
    start: int = 100,
    gpus: Sequence[int] = (0,),
    pages: int = 8,
    earlier: Sequence[int] = (),
    requests: Sequence[str] = (),
    elastic: bool = True,
    standing: Sequence[Seat] = (),
) -> AgentJoined:
    return AgentJoined(
        agent=agent,
        agent_start=start,
        gpus=tuple(gpu(gpu_id, pages=pages) for gpu_id in gpus),
        earlier=tuple(earlier),
        requests=tuple(requests),
        elastic=elastic,
        standing=tuple(standing),
    )


def costs(**changed: Any) -> CostTable:
    """A machine with round figures: a step takes 10 ms, a prompt token 1 ms, an activation 1 s."""
    plain: dict[str, Any] = {
        "machine": "round figures",
        "sources": {},
        "gpu_bytes": 4 * GIB,
        "request_s": 0.0,
        "step_s": 0.01,
        "step_sequence_s": 0.0,
        "weight_bytes_per_s": 1e18,
        "kv_bytes_per_s": 1e18,
        "prefill_weight_bytes_per_s": GIB * 1000.0,
        "prefill_kv_bytes_per_s": 1e18,
        "chunk_tokens": 1000,
        "running": 4,
        "engine_bytes": 0,
        "stripe_bytes": 1 << 20,
        "activation_s": 0.0,
        "link_bytes_per_s": float(GIB),
        "node_link_bytes_per_s": 1e18,
        "neighbour_slowdown": 0.0,
    }
    return CostTable(**(plain | changed))


def ready(name: str, epoch: Epoch, *, credits: int = 2, index: int = 0, load_s: float = 0.5) -> ReplicaReady:
    return ReplicaReady(
        replica=ReplicaId(name, index), epoch=epoch, credits=credits, kv_tokens=1024, context_length=4096, load_s=load_s
    )


def finished(request_id: str, name: str, epoch: Epoch, *, outcome: Outcome = Outcome.STOP, index: int = 0) -> RequestFinished:
    return RequestFinished(request_id=request_id, replica=ReplicaId(name, index), epoch=epoch, outcome=outcome, output_tokens=4)


def worker_lost(name: str, epoch: Epoch, *, index: int = 0) -> WorkerLost:
    return WorkerLost(worker="w0", reason="killed by signal 9", replica=ReplicaId(name, index), epoch=epoch)


def only(kind: type[A], actions: Sequence[Action]) -> A:
    """The one action there is, which is of this kind."""
    assert len(actions) == 1 and isinstance(actions[0], kind), actions
    return actions[0]


def of(kind: type[A], actions: Sequence[Action]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def words(actions: Sequence[Action]) -> list[str]:
    """The actions in short: `Admit x`, `Route x a/0`, `Activate a/0`."""
    return [_word(action) for action in actions]


def _word(action: Action) -> str:
    name = type(action).__name__
    match action:
        case Route():
            return f"{name} {action.request.request_id} {action.replica}"
        case Admit() | Requeue():
            return f"{name} {action.request_id}"
        case Reject():
            return f"{name} {action.request_id} {action.code}"
        case Activate():
            return f"{name} {action.seat.replica}"
        case Deactivate():
            return f"{name} {action.replica}"
        case _:
            return f"{name} {getattr(action, 'request_id', '')}".strip()
