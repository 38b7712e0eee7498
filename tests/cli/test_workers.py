"""Each flag about workers does something, or says once that it cannot here."""

import argparse

import pytest
from chimera.cli import workers
from chimera.errors import ConfigError
from chimera.units import GIB


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    workers.configure(parser)
    parser.add_argument("--static", action="store_true")
    return parser.parse_args(words)


def of(*words: str, shares: bool = True, virtual: bool = True) -> workers.Workers:
    return workers.Workers(asked(*words), shares=shares, virtual=virtual, gpus=2)


def idle(made: workers.Workers) -> list[str]:
    said: list[str] = []
    made.tell_what_is_idle(said.append)
    return said


def test_without_flags_nothing_is_said_whatever_the_machine() -> None:
    for shares in (True, False):
        for virtual in (True, False):
            assert idle(of(shares=shares, virtual=virtual)) == []


def test_what_there_is_without_flags() -> None:
    made = of()
    assert (made.spare, made.beforehand, made.at_once, made.parked_models, made.parked_bytes) == (0, True, 1, 2, None)


def test_the_pool_has_so_many_workers_for_each_gpu() -> None:
    assert of("--enable-worker-pool").spare == 2
    assert of("--enable-worker-pool", "--workers-per-gpu", "3").spare == 6
    (said,) = idle(of("--workers-per-gpu", "3"))
    assert "--enable-worker-pool" in said


def test_images_are_built_beforehand_so_many_at_a_time() -> None:
    made = of("--num-model-service-workers", "4")
    assert made.beforehand and made.at_once == 4 and not idle(made)
    assert not of("--no-enable-model-service").beforehand


@pytest.mark.parametrize(
    ("words", "shares", "virtual", "reason"),
    [
        (("--enable-model-service",), False, True, "not shared"),
        (("--enable-model-service",), True, False, "GPU's own memory"),
        (("--num-model-service-workers", "2"), False, True, "not shared"),
        (("--num-model-service-workers", "2", "--no-enable-model-service"), True, True, "switched off"),
        (("--parked-models", "1"), False, True, "not shared"),
        (("--parked-bytes", "1GiB", "--static"), True, True, "fixed pools"),
        (("--host-kv", "1GiB", "--parked-models", "0"), True, True, "no model stays parked"),
    ],
)
def test_a_flag_that_can_do_nothing_says_so_once(words: tuple[str, ...], shares: bool, virtual: bool, reason: str) -> None:
    (said,) = idle(of(*words, shares=shares, virtual=virtual))
    assert words[0] in said and "no effect" in said and reason in said


def test_so_many_models_stay_parked_with_so_much_memory() -> None:
    made = of("--parked-models", "5", "--parked-bytes", "2GiB")
    assert (made.parked_models, made.parked_bytes) == (5, 2 * GIB)
    assert of("--parked-models", "0").parked_models == 0
    assert of().host_kv_bytes == 0 and of("--host-kv", "1GiB").host_kv_bytes == GIB
    assert of("--static").parked_models == of(shares=False).parked_models == 0


def test_a_worker_may_be_silent_for_so_long() -> None:
    assert (of().silent_s, of("--watchdog-timeout", "90s").silent_s) == (300.0, 90.0)


@pytest.mark.parametrize(
    "words",
    [
        ("--workers-per-gpu", "0"),
        ("--num-model-service-workers", "65"),
        ("--parked-models", "-1"),
        ("--parked-bytes", "x"),
        ("--host-kv", "x"),
        ("--watchdog-timeout", "soon"),
        ("--watchdog-timeout", "0"),
    ],
)
def test_a_number_that_makes_no_sense_is_a_fault_of_its_flag(words: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        workers.require_sensible(asked(*words))
