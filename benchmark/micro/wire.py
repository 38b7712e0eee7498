"""What a message costs: encoding and decoding the `Tokens` of one engine step for 256 requests, and its neighbours."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.stream import TokenDelta, Tokens
from chimera.wire.codec import FrameReader, Message, decode, encode

from benchmark.report import Figures, parser

GOAL_US = 150
REPETITIONS = 2000
READ_BYTES = 1 << 16
"""What a socket gives at a time."""


def step_of(requests: int, dice: Random) -> Tokens:
    """One token for each request: ids as front-ends mint them, token ids as large vocabularies have them."""
    deltas = [
        TokenDelta(request_id=f"{dice.getrandbits(64):016x}", token_ids=[dice.randrange(150_000)]) for _ in range(requests)
    ]
    return Tokens(replica=ReplicaId("llama-3.1-8b"), epoch=Epoch(time.time_ns(), 17), deltas=deltas)


def microseconds(work: Callable[[], object], repetitions: int = REPETITIONS) -> list[float]:
    for _ in range(repetitions // 10):
        work()
    spent = []
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        work()
        spent.append((time.perf_counter_ns() - start) / 1e3)
    return spent


def read_all(stream: bytes) -> list[Message]:
    reader = FrameReader()
    return [message for at in range(0, len(stream), READ_BYTES) for message in reader.feed(stream[at : at + READ_BYTES])]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=256, help="in the step (default: 256)")
    arguments = options.parse_args()
    step = step_of(arguments.requests, Random(arguments.seed))
    frame = encode(step)
    assert decode(frame) == step
    alone = step_of(1, Random(arguments.seed))
    burst = encode(alone) * 1000

    figures = Figures(f"wire: Tokens of {arguments.requests} requests", seed=arguments.seed)
    figures.add("frame", len(frame), "bytes")
    figures.samples("encode + decode", microseconds(lambda: decode(encode(step))), "µs", at_most=GOAL_US)
    figures.samples("encode", microseconds(lambda: encode(step)), "µs")
    figures.samples("decode", microseconds(lambda: decode(frame)), "µs")
    figures.samples("encode + decode of one request", microseconds(lambda: decode(encode(alone))), "µs")
    figures.samples("reading, per message of a burst", [us / 1000 for us in microseconds(lambda: read_all(burst), 50)], "µs")
    return figures.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
