"""What elasticity costs an engine that does not need it: stock SGLang with a static pool against the same pool made elastic.

Four workers side by side, one at a time at work, in blocks of the same requests and in an order drawn anew each round: *stock*,
*stock again* (the control: what the machine alone makes of it), *at rest* (elastic, its level never moves), and *moving*
(elastic, its level goes up or down by half every second). Where its memory happens to lie makes one process a per cent or two
faster than its twin for life, so several crews of workers are hired, one after the other. One round gives one ratio to stock
for each; a figure is their median, which a neighbour's burst on the same machine cannot drag along, with its 95 % bootstrap
interval. If the control's interval leaves ±3 % the machine is too restless for a verdict, and the run is void.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.msg.actions import FirstLease

from benchmark.micro.workers import TOKEN_BYTES, Agency, Hand, tiny
from benchmark.report import Figures, parser

POOL_TOKENS = 8192
PAGE_TOKENS = 64
AT_ONCE = 8
RESAMPLES = 4000
KINDS = ("stock", "stock again", "at rest", "moving")


def block(chance: random.Random, requests: int) -> list[tuple[list[int], int]]:
    """Prompts that nobody has seen, of 32 to 160 tokens, and answers of 24."""
    return [([chance.randrange(3, 2000) for _ in range(chance.randrange(32, 160))], 24) for _ in range(requests)]


def interval(values: Sequence[float], chance: random.Random) -> tuple[float, float]:
    """Of the median: the middle 95 % of medians of as many values drawn anew."""
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1]


class Mover:
    """Sends the level up or down, once a second of the worker's own time at work."""

    def __init__(self, hand: Hand) -> None:
        self._hand = hand
        self._pages = POOL_TOKENS // PAGE_TOKENS
        self._low = False
        self.moves = 0

    def move(self) -> None:
        self.moves += 1
        self._low = not self._low
        if self._low:
            self._hand.limit(self._pages // 2, within_s=0.5)
        else:
            self._hand.limit(self._pages)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=60, help="of one block for each of four workers (default: 60)")
    options.add_argument("--requests", type=int, default=8, help="in a block (default: 8)")
    options.add_argument("--crews", type=int, default=20, help="of four workers, hired one after the other (default: 20)")
    arguments = options.parse_args()
    figures = Figures("free elasticity: throughput against stock SGLang", seed=arguments.seed)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        agency = Agency(Path(folder))
        try:
            measured = Measured()
            for crew in range(arguments.crews):
                hands = hire(agency, Path(folder), crew)
                compare(hands, arguments.rounds // arguments.crews, arguments.requests, chance, measured)
                for hand in hands.values():
                    hand.dismiss()
        finally:
            agency.close()
    ratios, processor = measured.ratios, measured.processor
    figures.add("blocks", sum(map(len, ratios.values())), "", at_least=120)
    figures.add("longest block", measured.longest_s, "s", at_most=2.0)
    control = interval(ratios["stock again"], chance)
    figures.add("control, stock again", statistics.median(ratios["stock again"]), "×", spread=control)
    void = control[0] < 0.97 or control[1] > 1.03
    for kind, least in (("at rest", 0.97), ("moving", 0.93)):
        low, high = interval(ratios[kind], chance)
        figures.add(f"{kind}, throughput", statistics.median(ratios[kind]), "×", spread=(low, high))
        figures.add(f"{kind}, lower end", low, "×", at_least=None if void else least, goal=f"≥ {least}" if void else None)
        figures.add(
            f"{kind}, per second of processor",
            statistics.median(processor[kind]),
            "×",
            spread=interval(processor[kind], chance),
        )
    if void:
        print("# void: the control leaves ±3 %, this machine is too restless for a verdict")
    status = figures.finish(arguments.json)
    return 1 if void else status


class Measured:
    """What all crews' rounds have come to: a ratio to stock for each round and kind."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.longest_s = 0.0

    def add(self, wall: dict[str, float], cpu: dict[str, float]) -> None:
        for kind in KINDS:
            self.ratios[kind].append(wall["stock"] / wall[kind])
            self.processor[kind].append(cpu["stock"] / cpu[kind])
        self.longest_s = max(self.longest_s, *wall.values())


def hire(agency: Agency, folder: Path, crew: int) -> dict[str, Hand]:
    spec = tiny("llama", folder)
    pages = POOL_TOKENS // PAGE_TOKENS
    lease = FirstLease(page_bytes=PAGE_TOKENS * TOKEN_BYTES, revision=1, level=pages, ceiling=pages)
    hands = {}
    for number, kind in enumerate(KINDS):
        hands[kind] = agency.hire(f"w{crew}-{number}")
        elastic = kind in ("at rest", "moving")
        hands[kind].become(spec, kv_bytes=POOL_TOKENS * TOKEN_BYTES, lease=lease if elastic else None)
        hands[kind].serve(block(random.Random(0), 16), at_once=AT_ONCE)  # warm
    return hands


def compare(hands: dict[str, Hand], rounds: int, requests: int, chance: random.Random, measured: Measured) -> None:
    mover, due_s = Mover(hands["moving"]), 0.0
    for _ in range(rounds):
        work = block(chance, requests)
        wall, cpu = {}, {}
        for kind in chance.sample(KINDS, len(KINDS)):
            if kind == "moving" and time.monotonic() >= due_s:
                mover.move()  # a block lasts about a second, and the order comes with its first requests
                due_s = time.monotonic() + 1.0
            before = hands[kind].cpu_s
            wall[kind] = hands[kind].serve(work, at_once=AT_ONCE)
            cpu[kind] = max(0.01, hands[kind].cpu_s - before)
        measured.add(wall, cpu)


if __name__ == "__main__":
    sys.exit(main())
