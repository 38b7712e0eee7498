"""The doctor: what it finds on made-up machines, how it reads NVML, and what it says about this machine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from chimera.cli.doctor import as_json, as_text
from chimera.config.fitness import Problem, can_serve, devices, problems
from chimera.config.machine import HugePages, Machine, SharedMemory
from chimera.config.nvml import GpuFacts, GpuUser, MigInstance, Nvml, read_nvml
from chimera.units import GIB, MIB

CPU_PACKAGES = {"sglang": "0.5.20", "torch": "2.13.0+cpu", "transformers": "5.12.1", "cuda-bindings": "13.5.0"}
GPU_PACKAGES = {**CPU_PACKAGES, "torch": "2.13.0", "sglang-kernel": "0.4.7"}
GOOD = Machine(
    system="Linux",
    kernel="6.8.0",
    architecture="x86_64",
    processor="A Processor",
    cores=8,
    python=(3, 12, 4),
    packages=CPU_PACKAGES,
    sglang_requires={"torch": "2.13.0", "sglang-kernel": "0.4.7"},
    memory_bytes=32 * GIB,
    memory_available_bytes=30 * GIB,
    shared_memory=SharedMemory(total_bytes=16 * GIB, free_bytes=15 * GIB),
    page_lock_bytes=None,
    huge_pages=HugePages(page_bytes=2 * MIB, transparent="madvise", transparent_shared="advise"),
    nvidia_module=False,
    nvml=Nvml(fault="NVML Shared Library Not Found"),
)
SLICES = (
    MigInstance(uuid="MIG-1", name="H200 MIG 3g.71gb", total_bytes=71 * GIB),
    MigInstance(uuid="MIG-2", name="H200 MIG 3g.71gb", total_bytes=71 * GIB),
)


def gpu(index: int = 0, **changes: Any) -> GpuFacts:
    facts = GpuFacts(index=index, uuid=f"GPU-{index}", name="H200", total_bytes=141 * GIB, used_bytes=0)
    return msgspec.structs.replace(facts, **changes)


def machine(**changes: Any) -> Machine:
    return msgspec.structs.replace(GOOD, **changes)


def gpu_machine(*gpus: GpuFacts, **changes: Any) -> Machine:
    nvml = Nvml(driver="580.65.06", cuda=(13, 0), gpus=gpus or (gpu(),))
    return machine(**{"nvidia_module": True, "nvml": nvml, "packages": GPU_PACKAGES, **changes})


def only_problem(of: Machine) -> Problem:
    found = problems(of)
    assert len(found) == 1, found
    return found[0]


def test_a_good_machine_has_no_problem_with_or_without_a_gpu() -> None:
    assert problems(machine()) == []
    assert problems(gpu_machine()) == []


STOPPING = {
    "not Linux": (machine(system="Darwin"), "needs Linux", "docker run"),
    "old Python": (machine(python=(3, 10, 1)), "Python is 3.10.1; it must be 3.11 or 3.12", "PYTHON=python3.12"),
    "new Python": (machine(python=(3, 13, 0)), "Python is 3.13.0", "make clean install"),
    "no SGLang": (machine(packages={"torch": "2.13.0+cpu"}), "sglang is not installed", "make install"),
    "no torch": (machine(packages={"sglang": "0.5.20"}), "torch is not installed", "make install"),
    "old SGLang": (
        gpu_machine(packages={**GPU_PACKAGES, "sglang": "0.5.15.post1"}),
        "SGLang is 0.5.15.post1; this release works with 0.5.16 to 0.5.23",
        "pip install --no-deps sglang==0.5.20",
    ),
    "new SGLang": (gpu_machine(packages={**GPU_PACKAGES, "sglang": "0.6.0"}), "0.5.16 to 0.5.23", "sglang==0.5.20"),
    "CPU torch on a GPU": (gpu_machine(packages={**GPU_PACKAGES, "torch": "2.13.0+cpu"}), "without CUDA", "make clean install"),
    "torch that SGLang's kernels do not fit": (
        gpu_machine(packages={**GPU_PACKAGES, "torch": "2.11.0+cu130"}),
        "torch is 2.11.0+cu130; the kernels of SGLang 0.5.20 are built for 2.13.0",
        "pip install torch==2.13.0",
    ),
    "old driver": (
        gpu_machine(
            packages={**GPU_PACKAGES, "torch": "2.13.0+cu130"},
            nvml=Nvml(driver="550.90", cuda=(12, 4), gpus=(gpu(),)),
        ),
        "the driver 550.90 serves CUDA up to 12.4; torch 2.13.0+cu130 needs 13",
        "ubuntu-drivers",
    ),
    "no kernels": (
        gpu_machine(packages={k: v for k, v in GPU_PACKAGES.items() if k != "sglang-kernel"}),
        "SGLang's kernels (sglang-kernel) are not installed",
        "pip install sglang-kernel==0.4.7",
    ),
    "no cuda-bindings": (
        gpu_machine(packages={k: v for k, v in GPU_PACKAGES.items() if k != "cuda-bindings"}),
        "memory cannot be mapped",
        "cuda-bindings",
    ),
    "driver without library": (
        machine(nvidia_module=True, nvml=Nvml(fault="Driver/library version mismatch")),
        "NVML does not answer (Driver/library version mismatch)",
        "nvidia-smi",
    ),
    "exclusive GPU": (
        gpu_machine(gpu(), gpu(1, exclusive=True)),
        "GPU 1 lets only one process in",
        "nvidia-smi -i 1 -c DEFAULT",
    ),
    "MIG without instances": (gpu_machine(gpu(mig=True)), "has no instance", "sudo nvidia-smi -i 0 -mig 0"),
    "little memory": (machine(memory_bytes=2 * GIB, memory_available_bytes=GIB), "there are 2 GiB of memory", "--memory=8g"),
    "no /dev/shm": (machine(shared_memory=None), "there is no /dev/shm", "mount -t tmpfs"),
}
MINDING = {
    "another SGLang on a CPU": (
        machine(packages={**CPU_PACKAGES, "sglang": "0.5.23"}),
        "only 0.5.20 is tested",
        "sglang==0.5.20",
    ),
    "another torch on a CPU": (machine(packages={**CPU_PACKAGES, "torch": "2.11.0"}), "only 2.13.0 is tested", "torch==2.13.0"),
    "MIG": (gpu_machine(gpu(mig=True, mig_instances=SLICES)), "GPU 0 is split by MIG", "nvidia-smi -i 0 -mig 0"),
    "one empty MIG of two GPUs": (gpu_machine(gpu(), gpu(1, mig=True)), "GPU 1 is in MIG mode", "nvidia-smi -i 1 -mig 0"),
    "a stranger": (
        gpu_machine(gpu(used_bytes=20 * GIB, users=(GpuUser(pid=17, name="python"), GpuUser(pid=18)))),
        "GPU 0: 20 GiB of 141 GiB are in use, by python (17), a process (18)",
        "-p 17,18",
    ),
    "memory in use": (machine(memory_available_bytes=GIB), "only 1 GiB of memory are free", "ps aux"),
    "tiny /dev/shm": (
        machine(shared_memory=SharedMemory(total_bytes=64 * MIB, free_bytes=64 * MIB)),
        "/dev/shm has 64 MiB",
        "--shm-size=16g",
    ),
    "full /dev/shm": (
        machine(shared_memory=SharedMemory(total_bytes=16 * GIB, free_bytes=MIB)),
        "/dev/shm has only 1 MiB free",
        "ls -lSh /dev/shm",
    ),
    "page lock": (gpu_machine(page_lock_bytes=8 * MIB), "may lock 8 MiB", "ulimit -l unlimited"),
    "no huge shared pages": (
        gpu_machine(huge_pages=HugePages(transparent="always", transparent_shared="never")),
        "shared memory has no huge pages",
        "shmem_enabled",
    ),
}


@pytest.mark.parametrize(("sick", "what", "mend"), STOPPING.values(), ids=STOPPING.keys())
def test_what_stops_a_server_is_told_with_its_cure(sick: Machine, what: str, mend: str) -> None:
    problem = only_problem(sick)
    assert what in problem.what
    assert mend in problem.mend
    assert problem.stops
    assert not can_serve([problem])


@pytest.mark.parametrize(("sick", "what", "mend"), MINDING.values(), ids=MINDING.keys())
def test_what_could_be_better_does_not_stop_a_server(sick: Machine, what: str, mend: str) -> None:
    problem = only_problem(sick)
    assert what in problem.what
    assert mend in problem.mend
    assert can_serve([problem])


def test_a_machine_without_a_gpu_minds_no_gpu_limits() -> None:
    assert problems(machine(page_lock_bytes=8 * MIB, huge_pages=HugePages(transparent_shared="never"))) == []


def test_what_stops_the_server_comes_first() -> None:
    sick = gpu_machine(gpu(mig=True, mig_instances=SLICES), memory_bytes=2 * GIB, python=(3, 9, 0))
    assert [problem.stops for problem in problems(sick)] == [True, True, False]


def test_without_a_gpu_a_quarter_of_the_memory_is_a_virtual_one() -> None:
    (device,) = devices(machine(memory_bytes=32 * GIB))
    assert device.virtual
    assert device.capacity_bytes == 8 * GIB


def test_gpus_and_mig_instances_are_numbered_through() -> None:
    found = devices(gpu_machine(gpu(0, mig=True, mig_instances=SLICES), gpu(1)))
    assert [(device.gpu_id, device.name, device.capacity_bytes // GIB) for device in found] == [
        (0, "H200 MIG 3g.71gb", 71),
        (1, "H200 MIG 3g.71gb", 71),
        (2, "H200", 141),
    ]
    assert not any(device.virtual for device in found)


SICK = [example[0] for example in (*STOPPING.values(), *MINDING.values())]


@pytest.mark.parametrize("patient", [machine(), gpu_machine(gpu(), gpu(1)), *SICK])
def test_the_report_fits_eighty_columns_save_for_commands(patient: Machine) -> None:
    lines = as_text(patient, problems(patient)).splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("  mend: ")] == []


def test_the_report_names_every_problem_with_its_cure_and_ends_in_a_verdict() -> None:
    sick = gpu_machine(gpu(mig=True, mig_instances=SLICES), memory_bytes=2 * GIB)
    report = as_text(sick, problems(sick))
    assert "stops: there are 2 GiB of memory" in report
    assert "  mend: docker run --memory=8g …" in report
    assert "minds: GPU 0 is split by MIG" in report
    assert report.endswith("This machine cannot serve yet: 1 of 2 problems must be mended first.")
    assert as_text(GOOD, []).endswith("This machine can serve.")


def test_json_says_the_same() -> None:
    sick = machine(shared_memory=None)
    told = json.loads(as_json(sick, problems(sick)))
    assert told["can_serve"] is False
    assert [problem["stops"] for problem in told["problems"]] == [True]
    assert told["devices"][0]["virtual"] is True
    assert msgspec.convert(told["machine"], Machine) == sick


def test_it_looks_at_this_machine_without_importing_the_engine() -> None:
    look = (  # the doctor must be quick, and work when they are broken
        "import sys; from chimera.cli.main import main; status = main(['doctor', '--json'])\n"
        "assert not {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    finished = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert finished.stderr == ""
    told = json.loads(finished.stdout)
    assert finished.returncode == (0 if told["can_serve"] else 1)
    assert tuple(told["machine"]["python"]) == sys.version_info[:3]
    assert told["machine"]["memory_bytes"] > told["machine"]["memory_available_bytes"] > 0


class NvmlError(Exception):
    pass


class NotSupportedError(NvmlError):
    pass


class NotFoundError(NvmlError):
    pass


@dataclasses.dataclass
class Device:
    """A GPU, or an instance of one, as NVML's functions tell it."""

    uuid: str
    total: int
    used: int = 0
    mig: bool | None = None
    """`None` cannot be split."""
    instances: tuple[Device | None, ...] = ()
    mode: int = 0
    processes: tuple[SimpleNamespace, ...] = ()


class Library:
    """Stands in for the NVML of a machine with these devices."""

    NVMLError, NVMLError_NotSupported, NVMLError_NotFound = NvmlError, NotSupportedError, NotFoundError
    NVML_DEVICE_MIG_ENABLE, NVML_COMPUTEMODE_DEFAULT = 1, 0

    def __init__(self, *found: Device, broken: str = "") -> None:
        self.found = found
        self.broken = broken
        self.open = 0

    def _works(self, call: str) -> None:
        if call == self.broken:
            raise NvmlError(f"{call} is broken")

    def nvmlInit(self) -> None:
        self._works("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.found)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        self._works("nvmlDeviceGetHandleByIndex")
        return self.found[index]

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> SimpleNamespace:
        return SimpleNamespace(total=device.total, used=device.used)

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        return device.uuid

    def nvmlDeviceGetName(self, device: Device) -> str:
        return f"name of {device.uuid}"

    def nvmlDeviceGetComputeMode(self, device: Device) -> int:
        return device.mode

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:
        if device.mig is None:
            raise NotSupportedError
        return [int(device.mig), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        return len(device.instances)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, index: int) -> Device:
        instance = device.instances[index]
        if instance is None:
            raise NotFoundError
        return instance

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> tuple[SimpleNamespace, ...]:
        self._works("nvmlDeviceGetComputeRunningProcesses")
        return device.processes

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid == 2:
            raise NotFoundError
        return f"process{pid}"


def test_nvml_is_read_and_closed() -> None:
    split = Device("b", 80, 5, mig=True, instances=(None, Device("b1", 40), None), mode=3)
    library = Library(Device("a", 100, 10, processes=tuple(SimpleNamespace(pid=p, usedGpuMemory=p) for p in (1, 2))), split)
    assert read_nvml(library) == Nvml(
        driver="570.1",
        cuda=(12, 8),
        gpus=(
            GpuFacts(
                index=0,
                uuid="a",
                name="name of a",
                total_bytes=100,
                used_bytes=10,
                users=(GpuUser(pid=1, name="process1", used_bytes=1), GpuUser(pid=2, used_bytes=2)),
            ),
            GpuFacts(
                index=1,
                uuid="b",
                name="name of b",
                total_bytes=80,
                used_bytes=5,
                mig=True,
                mig_instances=(MigInstance(uuid="b1", name="name of b1", total_bytes=40),),
                exclusive=True,
            ),
        ),
    )
    assert library.open == 0


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_a_broken_nvml_is_a_fact_with_its_reason(broken: str) -> None:
    library = Library(Device("a", 100), broken=broken)
    assert read_nvml(library) == Nvml(fault=f"{broken} is broken")
    assert library.open == 0


def test_processes_that_nvml_keeps_to_itself_do_not_hide_the_gpu() -> None:
    (found,) = read_nvml(Library(Device("a", 100), broken="nvmlDeviceGetComputeRunningProcesses")).gpus
    assert found.users == ()
