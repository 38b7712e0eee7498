"""The promises of `Driver`, held against every driver: the same answers from a device, a kernel and a fake."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable, Iterator

import pytest
from chimera.errors import DriverError
from chimera.units import KIB, MIB
from chimera.vmm.cuda import CudaDriver
from chimera.vmm.driver import Handle, TrackedDriver
from chimera.vmm.fake import FakeDriver
from chimera.vmm.host import HostDriver

from tests.vmm.libcuda import StandInLibcuda

PAGE = 2 * MIB
DRIVERS: dict[str, Callable[[], TrackedDriver]] = {
    "fake": FakeDriver,
    "host": HostDriver,
    "cuda": lambda: CudaDriver(api=StandInLibcuda()),
}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Iterator[TrackedDriver]:
    with DRIVERS[request.param]() as opened:
        yield opened


def at(*handles: Handle, start: int = 0) -> dict[int, Handle]:
    return {(start + i) * PAGE: handle for i, handle in enumerate(handles)}


def code_of(error: pytest.ExceptionInfo[DriverError]) -> int:
    return error.value.code


def test_pages_come_and_go_under_an_address_that_stays(driver: TrackedDriver) -> None:
    where = driver.reserve(16 * PAGE)
    address = where.address
    handles = driver.create(PAGE, 3)
    driver.map(where, {5 * PAGE: handles[0], 0: handles[2], PAGE: handles[1]})
    assert where.mapped == {0: handles[2], PAGE: handles[1], 5 * PAGE: handles[0]}
    assert driver.unmap(where, [5 * PAGE, 0]) == [handles[0], handles[2]]
    driver.map(where, {2 * PAGE: handles[0]})
    assert where.mapped_bytes == 2 * PAGE
    assert where.address == address
    assert driver.created_bytes == 3 * PAGE


def test_reserving_rounds_up_to_whole_granules_and_costs_nothing(driver: TrackedDriver) -> None:
    assert driver.reserve(PAGE + 1).nbytes == 2 * PAGE
    assert driver.created_bytes == 0


def test_mapping_a_mapped_page_is_refused_and_changes_nothing(driver: TrackedDriver) -> None:
    where = driver.reserve(4 * PAGE)
    first, second, third = driver.create(PAGE, 3)
    driver.map(where, {PAGE: first})
    with pytest.raises(DriverError, match="mapped already") as refusal:
        driver.map(where, {0: second, PAGE: third})
    assert code_of(refusal) == errno.EEXIST
    assert where.mapped == {PAGE: first}
    driver.map(where, {0: second, 2 * PAGE: third})


def test_handles_of_one_batch_may_not_overlap(driver: TrackedDriver) -> None:
    where = driver.reserve(4 * PAGE)
    (large,) = driver.create(2 * PAGE)
    (small,) = driver.create(PAGE)
    with pytest.raises(DriverError, match="inside the handle before it"):
        driver.map(where, {0: large, PAGE: small})
    assert where.mapped == {}


def test_a_large_handle_keeps_all_its_granules_taken(driver: TrackedDriver) -> None:
    where = driver.reserve(4 * PAGE)
    (large,) = driver.create(2 * PAGE)
    (small,) = driver.create(PAGE)
    driver.map(where, {0: large})
    with pytest.raises(DriverError, match="mapped already"):
        driver.map(where, {PAGE: small})


def test_a_handle_is_mapped_at_one_place_only(driver: TrackedDriver) -> None:
    where = driver.reserve(4 * PAGE)
    handle, other = driver.create(PAGE, 2)
    driver.map(where, {0: handle})
    with pytest.raises(DriverError) as refusal:
        driver.map(where, {PAGE: other, 2 * PAGE: handle})
    assert code_of(refusal) == errno.EBUSY
    driver.map(where, {PAGE: other})


def test_unmapping_what_is_not_mapped_is_refused_and_changes_nothing(driver: TrackedDriver) -> None:
    where = driver.reserve(4 * PAGE)
    driver.map(where, at(*driver.create(PAGE, 2)))
    for call in (driver.unmap, driver.scrub):
        with pytest.raises(DriverError, match="nothing is mapped at offset") as refusal:
            call(where, [0, 3 * PAGE])
        assert code_of(refusal) == errno.ENOENT
    assert len(where.mapped) == 2


def test_an_offset_named_twice_is_refused(driver: TrackedDriver) -> None:
    where = driver.reserve(4 * PAGE)
    driver.map(where, at(*driver.create(PAGE, 2)))
    with pytest.raises(DriverError):
        driver.unmap(where, [0, 0])
    assert len(where.mapped) == 2


@pytest.mark.parametrize("offset", [-PAGE, 1, 4 * PAGE])
def test_an_offset_outside_the_range_or_off_its_granules_is_refused(driver: TrackedDriver, offset: int) -> None:
    where = driver.reserve(4 * PAGE)
    (handle,) = driver.create(PAGE)
    with pytest.raises(DriverError):
        driver.map(where, {offset: handle})
    assert where.mapped == {}


@pytest.mark.parametrize("nbytes", [0, PAGE - 1])
def test_a_handle_is_whole_granules(driver: TrackedDriver, nbytes: int) -> None:
    with pytest.raises(DriverError):
        driver.create(nbytes)


def test_a_range_given_back_answers_every_call_with_an_error(driver: TrackedDriver) -> None:
    where = driver.reserve(PAGE)
    (handle,) = driver.create(PAGE)
    driver.free(where)
    for call in (
        lambda: driver.map(where, {0: handle}),
        lambda: driver.unmap(where, [0]),
        lambda: driver.scrub(where, [0]),
        lambda: driver.free(where),
    ):
        with pytest.raises(DriverError, match="given back") as refusal:
            call()
        assert code_of(refusal) == errno.EBADF


def test_a_range_with_pages_is_not_freed(driver: TrackedDriver) -> None:
    where = driver.reserve(PAGE)
    driver.map(where, at(*driver.create(PAGE)))
    with pytest.raises(DriverError, match="still mapped"):
        driver.free(where)
    driver.unmap(where, [0])
    driver.free(where)


def test_a_handle_is_released_once_and_never_while_mapped(driver: TrackedDriver) -> None:
    where = driver.reserve(PAGE)
    handle, spare = driver.create(PAGE, 2)
    driver.map(where, {0: handle})
    with pytest.raises(DriverError):
        driver.release([spare, handle])
    driver.release([spare])
    with pytest.raises(DriverError):
        driver.release([spare])
    assert driver.created_bytes == PAGE


def test_a_released_handle_cannot_be_mapped(driver: TrackedDriver) -> None:
    where = driver.reserve(PAGE)
    (stale,) = driver.create(PAGE)
    driver.release([stale])
    (fresh,) = driver.create(PAGE)
    assert fresh != stale
    with pytest.raises(DriverError):
        driver.map(where, {0: stale})


def test_close_gives_everything_back(driver: TrackedDriver) -> None:
    where = driver.reserve(8 * PAGE)
    driver.map(where, at(*driver.create(PAGE, 3)))
    driver.create(PAGE, 2)
    driver.close()
    assert driver.created_bytes == 0
    assert not where.open


class TestABatchIsWholeOrNothing:
    def test_a_refused_map_unmaps_the_runs_before_it(self) -> None:
        driver = FakeDriver()
        where = driver.reserve(16 * PAGE)
        handles = driver.create(PAGE, 4)
        scattered = {2 * i * PAGE: handle for i, handle in enumerate(handles)}
        driver.refuse("map", nth=3)
        with pytest.raises(DriverError, match="told to refuse"):
            driver.map(where, scattered)
        assert where.mapped == {}
        assert driver.calls["unmap"] == 2
        driver.map(where, scattered)

    def test_a_refused_unmap_maps_the_runs_before_it_again(self) -> None:
        driver = FakeDriver()
        where = driver.reserve(16 * PAGE)
        scattered = {2 * i * PAGE: handle for i, handle in enumerate(driver.create(PAGE, 4))}
        driver.map(where, scattered)
        driver.refuse("unmap", nth=4)
        with pytest.raises(DriverError):
            driver.unmap(where, list(scattered))
        assert where.mapped == scattered
        assert driver.calls["map"] == 4 + 3
        driver.unmap(where, list(scattered))

    def test_a_refused_create_makes_nothing(self) -> None:
        driver = FakeDriver(capacity_bytes=3 * PAGE)
        with pytest.raises(DriverError) as refusal:
            driver.create(PAGE, 4)
        assert (refusal.value.call, refusal.value.nbytes) == ("create", 4 * PAGE)
        assert driver.created_bytes == 0
        driver.create(PAGE, 3)

    def test_a_refused_release_keeps_that_handle_and_gives_back_the_rest(self) -> None:
        driver = FakeDriver()
        handles = driver.create(PAGE, 3)
        driver.refuse("release", nth=2)
        with pytest.raises(DriverError):
            driver.release(handles)
        assert driver.created_bytes == PAGE
        driver.release([handles[1]])


class TestHost:
    def test_what_is_written_is_read_through_another_address(self) -> None:
        with HostDriver() as driver:
            where = driver.reserve(4 * PAGE)
            handles = driver.create(PAGE, 2)
            driver.map(where, at(*handles))
            ctypes.memset(where.address + PAGE, 7, PAGE)
            driver.unmap(where, [0, PAGE])
            driver.map(where, {3 * PAGE: handles[1]})
            assert ctypes.string_at(where.address + 3 * PAGE, PAGE) == b"\7" * PAGE

    def test_scrubbed_pages_read_zero_and_weigh_nothing(self) -> None:
        with HostDriver() as driver:
            where = driver.reserve(4 * PAGE)
            driver.map(where, at(*driver.create(PAGE, 3)))
            ctypes.memset(where.address, 7, 3 * PAGE)
            assert driver.file_bytes == 3 * PAGE
            driver.scrub(where, [0, PAGE])
            assert driver.file_bytes == PAGE
            assert ctypes.string_at(where.address, 2 * PAGE) == bytes(2 * PAGE)
            assert ctypes.string_at(where.address + 2 * PAGE, PAGE) == b"\7" * PAGE

    def test_released_memory_returns_to_the_machine_and_comes_back_as_zeros(self) -> None:
        with HostDriver() as driver:
            where = driver.reserve(4 * PAGE)
            driver.map(where, at(*driver.create(PAGE, 2)))
            ctypes.memset(where.address, 7, 2 * PAGE)
            driver.release(driver.unmap(where, [0, PAGE]))
            assert driver.file_bytes == 0
            again = driver.create(PAGE, 2)
            driver.map(where, at(*again))
            assert ctypes.string_at(where.address, 2 * PAGE) == bytes(2 * PAGE)

    def test_neighbours_share_one_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with HostDriver() as driver:
            where = driver.reserve(64 * PAGE)
            handles = driver.create(PAGE, 64)
            runs: list[int] = []
            monkeypatch.setattr(driver, "_map", lambda address, run: runs.append(run.nbytes))
            driver.map(where, at(*handles))
            assert runs == [64 * PAGE]
            monkeypatch.undo()

    def test_places_freed_in_any_order_grow_together_again(self) -> None:
        with HostDriver(64 * KIB) as driver:
            handles = driver.create(64 * KIB, 9)
            for picked in (handles[0::3], handles[1::3], handles[2::3]):
                driver.release(picked)
            assert [handle.place for handle in driver.create(64 * KIB, 9)] == [i * 64 * KIB for i in range(9)]

    @pytest.mark.parametrize("granule", [0, 4 * KIB, 96 * KIB])
    def test_a_granule_is_a_multiple_of_64_kib(self, granule: int) -> None:
        with pytest.raises(DriverError):
            HostDriver(granule)

    def test_a_closed_driver_refuses_with_the_kernels_own_code(self) -> None:
        driver = HostDriver()
        driver.close()
        with pytest.raises(DriverError) as refusal:
            driver.create(PAGE)
        assert code_of(refusal) == errno.EBADF

    def test_an_impossible_reservation_is_refused_with_the_kernels_own_code(self) -> None:
        with HostDriver() as driver, pytest.raises(DriverError) as refusal:
            driver.reserve(1 << 50)
        assert (refusal.value.call, code_of(refusal)) == ("mmap", errno.ENOMEM)

    def test_two_threads_may_map_and_unmap_different_pages(self) -> None:
        with HostDriver(64 * KIB) as driver:
            where = driver.reserve(64 * 64 * KIB)
            halves = [range(32), range(32, 64)]
            handles = driver.create(64 * KIB, 64)

            def churn(half: range) -> None:
                placements = {i * 64 * KIB: handles[i] for i in half}
                for _ in range(50):
                    driver.map(where, placements)
                    driver.unmap(where, list(placements))

            threads = [threading.Thread(target=churn, args=(half,)) for half in halves]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert where.mapped == {}
            driver.release(handles)
            assert driver.created_bytes == 0


class TestCuda:
    def test_a_machine_without_a_device_says_so(self) -> None:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            with pytest.raises(DriverError) as refusal:
                CudaDriver()
            assert (refusal.value.call, code_of(refusal)) == ("cuInit", 100)
        else:
            pytest.skip("this machine has libcuda")

    def test_a_run_is_made_accessible_in_one_call(self) -> None:
        libcuda = StandInLibcuda()
        with CudaDriver(api=libcuda) as driver:
            where = driver.reserve(8 * PAGE)
            driver.map(where, at(*driver.create(PAGE, 4)))
            assert (libcuda.calls["cuMemMap"], libcuda.calls["cuMemSetAccess"]) == (4, 1)
            assert libcuda.accessible == {where.address + i * PAGE for i in range(4)}

    @pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
    def test_a_refusal_inside_a_run_takes_back_what_was_mapped(self, call: str) -> None:
        libcuda = StandInLibcuda()
        with CudaDriver(api=libcuda) as driver:
            where = driver.reserve(8 * PAGE)
            handles = driver.create(PAGE, 4)
            libcuda.refuse(call, nth=1 if call == "cuMemSetAccess" else 3)
            with pytest.raises(DriverError) as refusal:
                driver.map(where, at(*handles))
            assert (refusal.value.call, refusal.value.detail) == (call, "CUDA_ERROR_INVALID_VALUE")
            assert libcuda.mapped == {}
            driver.map(where, at(*handles))

    def test_a_device_short_of_memory_keeps_nothing_of_the_batch(self) -> None:
        libcuda = StandInLibcuda()
        with CudaDriver(api=libcuda) as driver:
            libcuda.refuse("cuMemCreate", nth=3)
            with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
                driver.create(PAGE, 4)
            assert libcuda.handles == set()

    def test_scrubbing_waits_for_its_own_stream_in_a_thread_with_the_context(self) -> None:
        libcuda = StandInLibcuda()
        with CudaDriver(api=libcuda) as driver:
            where = driver.reserve(8 * PAGE)
            driver.map(where, at(*driver.create(PAGE, 2)))
            helper = threading.Thread(target=driver.scrub, args=(where, [0, PAGE]))
            helper.start()
            helper.join()
            assert libcuda.scrubbed == [(where.address, 2 * PAGE)]
            assert (libcuda.calls["cuCtxSetCurrent"], libcuda.calls["cuStreamSynchronize"]) == (2, 1)

    def test_close_releases_every_handle_and_the_context(self) -> None:
        libcuda = StandInLibcuda()
        driver = CudaDriver(api=libcuda)
        driver.map(driver.reserve(8 * PAGE), at(*driver.create(PAGE, 2)))
        driver.close()
        assert (libcuda.handles, libcuda.reserved, libcuda.calls["retain"]) == (set(), {}, 0)
