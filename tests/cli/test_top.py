"""`chimera top`: the house in 80 × 24, and in more; nothing wider than the screen, and no name that moves a cursor."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from chimera.cli.panorama import Panorama, painted, plain, rendered, width
from chimera.core.record import Entry
from chimera.core.replica import ReplicaState
from chimera.core.sight import Cast, Device, News, Part, Past, Pool, Pulse, Shelf, Sight, Standing

from tests.server.conftest import Stage, set_up

WILD = "\x1b[2J<b>\n模型"


def sight(cast: int = 1, **more: object) -> Sight:
    return Sight(at_s=1000.0, policy="flexible", local="goodput", cast=cast, **more)  # type: ignore[arg-type]


def view(models: int = 3, gpus: int = 2, names: tuple[str, ...] = ()) -> Panorama:
    parts = tuple(Part(name=name, kv_bytes=1 << 20, ttft_slo_s=1.0) for name in names or [f"m{n}" for n in range(models)])
    devices = tuple(Device(gpu_id=n, node="local", name="virtual", mib=1000) for n in range(gpus))
    shown = Panorama()
    news = tuple(News(n, Entry(at_s=1000.0 + n, what="ready", model=parts[0].name, reason=f"reason {n}")) for n in range(1, 9))
    shown.look_back(Past(cast=Cast(number=1, models=parts, gpus=devices), news=news))
    assert shown.see(
        sight(
            shelves=tuple(Shelf((Pool(0, 100, 400, 200),), 100) for _ in devices),
            replicas=(Standing(0, 0, ReplicaState.SERVING, (0,), running=3, queued=1, kv_tokens=400, kv_used_tokens=200),),
            pulses=(Pulse(0, waiting=2, requests_per_s=1.5, tokens_per_s=120.0, sent=10, kept=9),),
        )
    )
    return shown


def text(shown: Panorama, columns: int = 80, lines: int = 24) -> list[str]:
    return [plain(line) for line in rendered(shown, columns, lines)]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 30), (200, 60)])
@pytest.mark.parametrize(("models", "gpus"), [(1, 1), (3, 2), (18, 8), (500, 64)])
def test_it_fills_the_screen_and_no_more(columns: int, lines: int, models: int, gpus: int) -> None:
    picture = text(view(models, gpus), columns, lines)
    assert len(picture) == lines
    assert max(map(width, picture)) <= columns
    assert any("m0" in line and "serving" in line for line in picture)
    assert any("reason 8" in line for line in picture)


def test_80_by_24_says_what_matters() -> None:
    picture = text(view())
    assert picture[0].startswith("chimera flexible, goodput · 1 of 3 up · 1.5 req/s · 120 tok/s · 90.0% kept")
    assert picture[2].split() == ["GPU", "0", "▒▒▒▓▓▓███████░░░░░░·············", "400", "MiB", "free", "m0"]
    row = next(line for line in picture if line.startswith("m0")).split()
    assert row == ["m0", "serving", "0", "3", "3", "90.0%", "120", "200", "MiB", "of", "400", "MiB"]
    assert next(line for line in picture if line.startswith("m1")).split() == ["m1", "down"]


def test_what_does_not_fit_is_counted() -> None:
    picture = text(view(500, 64))
    gpus = sum(line.startswith("GPU ") for line in picture)
    assert f"and {64 - gpus} more GPUs" in "\n".join(picture)
    models = sum(line.startswith("m") for line in picture)
    assert f"and {500 - models} more models" in "\n".join(picture)


def test_more_room_shows_more() -> None:
    shown = view(500, 64)
    assert sum(line.startswith("m") for line in text(shown, 80, 60)) > sum(line.startswith("m") for line in text(shown))


def test_the_busiest_come_first_and_those_that_are_down_last() -> None:
    shown = view(4)
    assert shown.see(sight(replicas=(Standing(2, 0, ReplicaState.SERVING, (0,)),), pulses=(Pulse(3, waiting=5),)))
    assert [line.split()[0] for line in text(shown) if line.startswith("m")] == ["m3", "m2", "m0", "m1"]


def test_a_wild_name_is_spelled_out_and_wide_letters_count_twice() -> None:
    picture = text(view(names=(WILD, "模型" * 60)))
    assert all(line.isprintable() for line in picture)
    assert max(map(width, picture)) <= 80
    assert any("\\x1b[2J<b>\\n模型" in line for line in picture)
    assert width("模型") == 4


def test_paint_changes_no_width() -> None:
    for line in rendered(view(), 80, 24):
        bare = painted(line)
        while "\x1b[" in bare:
            before, _, after = bare.partition("\x1b[")
            bare = before + after.partition("m")[2]
        assert bare.rstrip() == plain(line)


def test_an_unknown_cast_is_said_to_be_so_and_a_new_one_taken() -> None:
    shown = view()
    assert not shown.see(sight(cast=7))
    changed = Cast(number=8, models=(Part(name="new"),))
    assert shown.see(sight(cast=8, changed=changed))
    assert any(line.startswith("new") for line in text(shown))


def test_a_server_that_is_away_is_said_to_be() -> None:
    shown = view()
    shown.away = "the server broke the connection"
    assert text(shown)[0].endswith("away")


async def _top(stage: Stage, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chimera", "top", "--url", stage.url, *flags]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30)


async def test_once_prints_one_picture_of_a_running_server() -> None:
    async with set_up() as stage:
        ended = await _top(stage, "--once")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "1 of 1 up" in ended.stdout and "\x1b" not in ended.stdout
        assert len(ended.stdout.splitlines()) == 24


async def test_no_server_is_one_clear_line() -> None:
    async with set_up() as stage:
        await stage.rehearsal.stop()
        ended = await _top(stage)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1
