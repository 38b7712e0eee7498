"""`chimera doctor`: what this machine has, what the server would use of it, and what keeps it from serving."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence

import msgspec

import chimera
from chimera.config.fitness import Problem, can_serve, devices, problems
from chimera.config.machine import Machine, read_machine
from chimera.config.nvml import GpuFacts
from chimera.core.gpu import Gpu
from chimera.units import format_bytes

_COLUMNS = 80


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: facts, devices and problems as JSON")


def run(arguments: argparse.Namespace) -> int:
    machine = read_machine()
    found = problems(machine)
    print(as_json(machine, found) if arguments.json else as_text(machine, found))
    return 0 if can_serve(found) else 1


def as_json(machine: Machine, found: Sequence[Problem]) -> str:
    told = {
        "chimera": chimera.__version__,
        "can_serve": can_serve(found),
        "problems": found,
        "devices": devices(machine),
        "machine": machine,
    }
    return msgspec.json.format(msgspec.json.encode(told), indent=2).decode()


def as_text(machine: Machine, found: Sequence[Problem]) -> str:
    lines = [f"chimera {chimera.__version__} on {machine.system} {machine.kernel}, {machine.architecture}"]
    for name, fact in _facts(machine):
        lines += _wrapped(fact, first=f"  {name:<12}", rest=" " * 14)
    lines += ["", *_wrapped(_use(devices(machine)))]
    for problem in found:
        lines += ["", *_wrapped(problem.what, first="stops: " if problem.stops else "minds: ", rest=" " * 7)]
        lines += [f"  mend: {problem.mend}"]  # whole, however long: it is there to be copied
    return "\n".join([*lines, "", _verdict(found)])


def _facts(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "python", ".".join(map(str, machine.python))
    for package in ("sglang", "torch"):
        yield package, machine.packages.get(package, "not installed")
    yield "processor", f"{machine.processor}, {machine.cores} cores"
    yield "memory", f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.memory_available_bytes)} available"
    shared = machine.shared_memory
    yield "/dev/shm", f"{format_bytes(shared.total_bytes)}, {format_bytes(shared.free_bytes)} free" if shared else "missing"
    locked = machine.page_lock_bytes
    yield "page lock", "without limit" if locked is None else f"up to {format_bytes(locked)}"
    huge = machine.huge_pages
    reserved = f"{huge.free} of {huge.total} free" if huge.total else "none reserved"
    yield "huge pages", f"{reserved}; transparent: {huge.transparent}, for shared memory: {huge.transparent_shared}"
    if machine.nvml.driver is not None and machine.nvml.cuda is not None:
        yield "driver", f"{machine.nvml.driver}, CUDA up to {'.'.join(map(str, machine.nvml.cuda))}"
    for gpu in machine.nvml.gpus:
        yield f"GPU {gpu.index}", _gpu(gpu)
    if not machine.nvml.gpus:
        yield "GPUs", f"none ({machine.nvml.fault})" if machine.nvml.fault else "none"


def _gpu(gpu: GpuFacts) -> str:
    instances = ", ".join(f"{instance.name} of {format_bytes(instance.total_bytes)}" for instance in gpu.mig_instances)
    mig = f"; MIG: {instances or 'no instance'}" if gpu.mig else ""
    return f"{gpu.name}, {format_bytes(gpu.total_bytes)}, {format_bytes(gpu.used_bytes)} in use{mig}"


def _use(gpus: Sequence[Gpu]) -> str:
    if all(gpu.virtual for gpu in gpus):
        sizes = ", ".join(format_bytes(gpu.capacity_bytes) for gpu in gpus)
        return f"The server would run on the CPU, with {len(gpus)} virtual GPU of {sizes} (--virtual-gpus chooses others)."
    return "The server would use " + ", ".join(f"{gpu.name} ({format_bytes(gpu.capacity_bytes)})" for gpu in gpus) + "."


def _verdict(found: Sequence[Problem]) -> str:
    stopping = sum(problem.stops for problem in found)
    if stopping:
        return f"This machine cannot serve yet: {stopping} of {len(found)} problems must be mended first."
    return "This machine can serve" + (f", though {len(found)} things could be better." if found else ".")


def _wrapped(text: str, *, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent=first, subsequent_indent=rest)
