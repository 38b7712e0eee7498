"""Who decides what runs where: a snapshot in, a placement out.

    policy         what a policy is given and what it answers
    board          a placement under construction: what fits, what may leave, what stands where
    static         what the operator wrote
    space_sharing  everything resident while it fits
    time_sharing   one model per GPU at a time, in turns
    simple_global  Prism as released
    kvpr           Prism as published, with both readings of its argmin
    flexible       ours: predicted goodput, with memory, compute and the price of switching

A policy remembers nothing: all that it goes by is in the snapshot, so it can be changed on a running system at any moment.
"""

from __future__ import annotations

from chimera.errors import ConfigError
from chimera.sched.policies.flexible import Flexible
from chimera.sched.policies.kvpr import Kvpr
from chimera.sched.policies.policy import Policy
from chimera.sched.policies.simple_global import SimpleGlobal
from chimera.sched.policies.space_sharing import SpaceSharing
from chimera.sched.policies.static import Static
from chimera.sched.policies.time_sharing import TimeSharing

POLICIES: dict[str, Policy] = {
    "flexible": Flexible(),
    "static": Static(),
    "time-sharing": TimeSharing(),
    "space-sharing": SpaceSharing(),
    "simple-global": SimpleGlobal(),
    "kvpr": Kvpr(),
    "kvpr-after": Kvpr(after=True),
}


def policy_named(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigError.single("policy", f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]
