"""What the operator has filed, and how it is read again while the server runs: the placement file, and entries over HTTP.

Owns what is in force. What differs from it is found here and carried out by control; a file with a fault changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chimera.config.change import Change, change
from chimera.config.deployment import ENTRY, Deployment, deployment_of_entry, load_placement
from chimera.config.roots import Roots
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class Filing:
    in_force: Deployment
    """As the file was read last, whatever has been registered beside it."""
    file: Path | None
    """Empty when the server was started on models."""
    elastic: bool
    roots: Roots
    flags: frozenset[str] = frozenset()
    """Of `policy`, `local` and `filed_gpus`: what a flag, or the machine, has settled, whatever the file says."""
    beforehand: bool = False
    """Models that are off get their images while the others serve."""

    def read_again(self) -> tuple[Deployment, Change]:
        """The file as it is now, and its difference from what is in force. ConfigError lists every fault."""
        if self.file is None:
            raise ConfigError.single("reload", "the server was started on models, without a placement file")
        fresh = load_placement(self.file, self.in_force.gpus, self.elastic)
        settled = {name: getattr(self.in_force, name) for name in self.flags}
        fresh = msgspec.structs.replace(fresh, **settled)
        return fresh, change(self.in_force, fresh)

    def admit(self, entry: bytes) -> Change:
        """One more model, beside those of the file. ConfigError lists every fault."""
        try:
            written = msgspec.json.decode(entry)
        except msgspec.DecodeError as fault:
            raise ConfigError.single(ENTRY, f"is not JSON: {fault}") from None
        gpus = self.in_force.gpus
        one = deployment_of_entry(written, gpus, roots=self.roots, elastic=self.elastic)
        return change(Deployment(models=(), placement=Placement(), gpus=gpus), one)

    def to_prepare(self, change: Change) -> tuple[ModelSpec, ...]:
        """Those of the change that nobody is to become now, and that are not in force as they are."""
        if not self.beforehand:
            return ()
        seated = {seat.replica.model for seat in change.seats}
        known = {model.name: model for model in self.in_force.models}
        off = (model for model in change.models if model.name not in seated)
        return tuple(model for model in off if model.name not in known or not model.runs_as(known[model.name]))


def roots_of(named: Iterable[Path], file: Path | None, deployment: Deployment) -> Roots:
    """As named; else the placement file's folder, and those that the models lie in."""
    if folders := list(named):
        return Roots(folders)
    beside = [] if file is None else [file.absolute().parent]
    return Roots([*beside, *(Path(os.path.dirname(model.path)) for model in deployment.models)])
