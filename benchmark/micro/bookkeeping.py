"""What metrics and records take of the processors, part by part, within one process: so closely interleaved with the same work
without them that what else runs on the machine is in both. `observability.py` sets it against what an event costs in all.

The parts are the server's own objects: a front-end's desk that counts the tokens of a step beside one that does not; and what
each request costs above that, from the front-end's record of it over both ends of the wire to control's counts and the row in
the store. The sockets' own part is not in it: records go over them five times a second, all that there are at once.

    python benchmark/micro/bookkeeping.py
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.control.witness import Witness
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.errors import RequestError
from chimera.msg import actions, events
from chimera.msg.stream import RequestTold, Sampling, StandingTold, TokenDelta, Tokens
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.records.keeper import Keeper
from chimera.server.account import Account, Caller
from chimera.server.answer import Answer, Finish, Terms, new_request_id
from chimera.server.desk import Desk, Patience
from chimera.wire.codec import FrameReader, Message, encode

from benchmark.report import Figures, parser, percentile
from benchmark.served import MODELS, entry

AT_ONCE = 16
"""Requests in a step."""
STEPS = 60
PAIRS = 1000
REQUESTS = 64
"""In one commit, which is what a quarter of a second brings at full load."""
COMMITS = 200
RESAMPLED = 2000
REPLICA = ReplicaId("m")
EPOCH = Epoch(1, 1)
Interval = tuple[float, float, float]
T = TypeVar("T")


class Silent:
    """Who reads the answers."""

    def text(self, text: str, answer: Answer) -> None: ...
    def end(self, text: str, answer: Answer) -> None: ...
    def fail(self, error: RequestError) -> None: ...
    def waiting(self, told: StandingTold) -> None: ...


def main() -> int:
    arguments = parser(__doc__).parse_args()
    figures = Figures("what keeping books takes", seed=arguments.seed)
    tell(figures, arguments.seed)
    return figures.finish(arguments.json)


def tell(figures: Figures, seed: int) -> tuple[Interval, Interval]:
    """µs: of an event, and of a request above that."""
    entry("m", "llama")  # makes the checkpoint, if it is not there
    event, request = asyncio.run(both(ModelTokenizer.load(MODELS / "llama"), seed))
    for name, (value, low, high) in (("counting an event", event), ("the records of a request", request)):
        figures.add(name, value, "µs", spread=(low, high))
    return event, request


async def both(tokenizer: ModelTokenizer, seed: int) -> tuple[Interval, Interval]:
    pairs = counting(tokenizer)
    event = interval(pairs, lambda some: cheapest([on for on, _ in some]) - cheapest([off for _, off in some]), seed)
    return event, interval(recording(tokenizer), cheapest, seed)


def counting(tokenizer: ModelTokenizer) -> list[tuple[float, float]]:
    """Of an event on a desk that counts, and on one that does not, in turns."""
    account = Account(lambda _: True)
    counts, plain = (step(Desk("f", Patience(), counted), tokenizer) for counted in (account.steps, None))
    pairs = []
    for number in range(PAIRS):
        first = timed(plain if number % 2 else counts)
        second = timed(counts if number % 2 else plain)
        pairs.append((second, first) if number % 2 else (first, second))
    account.close()
    return [(1e6 * on / (STEPS * AT_ONCE), 1e6 * off / (STEPS * AT_ONCE)) for on, off in pairs]


def step(desk: Desk, tokenizer: ModelTokenizer) -> Callable[[], None]:
    answers = [answered(tokenizer) for _ in range(AT_ONCE)]
    for answer in answers:
        desk.submit(answer)
    message = Tokens(replica=REPLICA, epoch=EPOCH, deltas=[TokenDelta(answer.attempt_id, [30]) for answer in answers])
    worker = object()

    def take() -> None:
        for answer in answers:
            answer.emitted.clear()  # one step is as long as the other
        desk.on_worker(worker, message)

    return take


def recording(tokenizer: ModelTokenizer) -> list[float]:
    """Of each commit, for each request in it."""
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(Path(folder) / "records")
        witness = Witness(keeper)
        wire, numbers = FrameReader(), count()

        def send(message: Message) -> bool:
            for told in wire.feed(encode(message)):
                if isinstance(told, RequestTold):
                    witness.told(told.record)
            return True

        account, caller = Account(send), Caller(key="anyone")
        for number in range(COMMITS + 20):
            asked = [(answered(tokenizer, 128), next(numbers) / 100) for _ in range(REQUESTS)]

            def keep(asked: Sequence[tuple[Answer, float]] = asked) -> None:
                for answer, at_s in asked:
                    request = Request(
                        request_id=answer.request_id, model="m", front="f", prompt_tokens=4, max_tokens=128, arrived_s=at_s
                    )
                    route = actions.Route(request=request, replica=REPLICA, agent="local", reason="the least loaded of 1")
                    witness.step(events.RequestArrived(request=request), [route], at_s, 1e-5)
                    ended = events.RequestFinished(
                        request_id=answer.request_id,
                        replica=REPLICA,
                        epoch=EPOCH,
                        outcome=events.Outcome.LENGTH,
                        output_tokens=128,
                        admitted_s=at_s,
                    )
                    witness.step(ended, (), at_s + 0.5, 1e-5)
                    account.close_book(answer, caller, tokenizer)
                account.tell()
                keeper.flush()

            ran_s = timed(keep, 1)
            if number >= 20:  # the store has some size by then
                costs.append(1e6 * ran_s / REQUESTS)
        account.close()
        keeper.close()
    return costs


def answered(tokenizer: ModelTokenizer, tokens: int = 0) -> Answer:
    """Under way; or with so many tokens, and over."""
    answer = Answer(
        request_id=new_request_id(),
        model="m",
        prompt_ids=[1, 2, 3, 4],
        terms=Terms(sampling=Sampling(max_new_tokens=1 << 30)),
        detokenizer=tokenizer.detokenizer([1, 2, 3, 4]),
        stops=(),
        reader=Silent(),
        arrived_s=time.monotonic(),
    )
    if tokens:
        answer.emitted, answer.finish = [30] * tokens, Finish(events.Outcome.LENGTH)
        answer.first_token_s = answer.ended_s = time.monotonic()
    return answer


def timed(work: Callable[[], None], times: int = STEPS) -> float:
    began_s = time.thread_time()
    for _ in range(times):
        work()
    return time.thread_time() - began_s


def cheapest(values: Sequence[float]) -> float:
    """The mean of the cheapest quarter: what else runs on the machine only adds."""
    return statistics.fmean(sorted(values)[: max(1, len(values) // 4)])


def interval(samples: Sequence[T], figure: Callable[[Sequence[T]], float], seed: int) -> Interval:
    """A figure of the samples, and between which values it lies with 95 %."""
    dice = random.Random(seed)
    drawn = [figure(dice.choices(samples, k=len(samples))) for _ in range(RESAMPLED)]
    return figure(samples), percentile(drawn, 2.5), percentile(drawn, 97.5)


if __name__ == "__main__":
    sys.exit(main())
