import pytest
from chimera.config.virtual_gpus import default_virtual_gpus, parse_virtual_gpus
from chimera.errors import ConfigError
from chimera.units import GIB, MIB


def test_groups_of_gpus_are_numbered_in_the_order_written() -> None:
    gpus = parse_virtual_gpus("2x4GiB, 1x8GiB,512MiB")
    assert [(gpu.gpu_id, gpu.capacity_bytes) for gpu in gpus] == [(0, 4 * GIB), (1, 4 * GIB), (2, 8 * GIB), (3, 512 * MIB)]
    assert all(gpu.virtual for gpu in gpus)


def test_capacity_is_whole_pages() -> None:
    (gpu,) = parse_virtual_gpus("80GB")
    assert gpu.capacity_bytes % gpu.page_bytes == 0
    assert 80 * 10**9 - gpu.page_bytes < gpu.capacity_bytes <= 80 * 10**9


@pytest.mark.parametrize(
    "text", ["", "8x", "x2GiB", "0x2GiB", "2000x1GiB", "-1x2GiB", "8x2parsecs", "1x1MiB", "9" * 400, "8x2GiBx3", "1x9999TiB"]
)
def test_what_is_no_set_of_gpus_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write 8x2GiB"):
        parse_virtual_gpus(text)


def test_a_machine_without_gpus_lends_a_quarter_of_its_memory() -> None:
    gpus = default_virtual_gpus(count=2, memory_bytes=16 * GIB)
    assert [gpu.capacity_bytes for gpu in gpus] == [2 * GIB, 2 * GIB]
    assert default_virtual_gpus()[0].capacity_bytes > 0
