"""How much memory is taken: on the device as NVML counts it, and of the host by this process. Never makes a context."""

from __future__ import annotations

from pathlib import Path


def device_used_bytes() -> int:
    """All that is taken on the first device, whoever holds it."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


def resident_bytes() -> int:
    """Of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise ValueError("the kernel does not tell VmRSS")
