"""The errors this package raises, and nothing else.

    ChimeraError
    ├── ConfigError     the operator must change something; names the field and every fault at once
    ├── DriverError     the device refused; carries call, code, bytes
    ├── WeightsError    weights cannot be used as they are: a file that lies, or no room for an image
    ├── WorkerLost      the process is gone; carries replica and epoch
    ├── ProtocolError   a peer broke the contract
    └── RequestError    one client's request ends here; carries a code, and the parameter at fault

Running short of pages is a value, not an exception. HTTP codes live in `server/errors.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ChimeraError(Exception):
    """The root: whatever the package raises on purpose."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing the operator must change."""

    where: str
    """The place inside the document, as a path: `[1].init_placements[0].gpu_ids`."""
    what: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.where}: {self.what}{hint}" if self.where else f"{self.what}{hint}"


class ConfigError(ChimeraError):
    """What the operator wrote cannot be served. Lists every fault, so that one round of mending is enough."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(faults)
        super().__init__("\n".join(f"{source}: {fault}" for fault in self.faults))

    @classmethod
    def single(cls, source: str, what: str, *, where: str = "", hint: str = "") -> ConfigError:
        return cls(source, [Fault(where, what, hint)])


class DriverError(ChimeraError):
    """The device (or the kernel that stands in for it) refused a memory call."""

    def __init__(self, call: str, code: int, nbytes: int, detail: str = "") -> None:
        self.call = call
        self.code = code
        self.nbytes = nbytes
        self.detail = detail
        super().__init__(f"{call} of {nbytes} bytes failed with code {code}" + (f": {detail}" if detail else ""))


class WeightsError(ChimeraError):
    """Weights cannot be used as they are. `passing`: another time they may be."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        self.passing = passing
        super().__init__(reason)


class WorkerLost(ChimeraError):
    """A worker process is gone, and with it what it was doing."""

    def __init__(self, replica: str, epoch: str, detail: str = "") -> None:
        self.replica = replica
        self.epoch = epoch
        super().__init__(f"worker of {replica} (epoch {epoch}) is gone" + (f": {detail}" if detail else ""))


class ProtocolError(ChimeraError):
    """A peer sent what the contract does not allow; its connection is closed."""


class RequestError(ChimeraError):
    """One client's request cannot be served. The code says what kind of end it is; only the server knows HTTP's word for it."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        queue_position: int | None = None,
    ) -> None:
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.queue_position = queue_position
        super().__init__(message)
