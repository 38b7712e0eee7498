"""Cost tables by name, for the verbs that need one."""

from __future__ import annotations

import msgspec

from chimera.config.cost_tables import read_cost_table, shipped_tables
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable


def table_named(name: str) -> CostTable:
    """The table of that name, or of the one kind whose name begins so; or a JSON file."""
    chosen = next((table for table in shipped_tables() if name and table.startswith(name)), name)
    try:
        return msgspec.json.decode(read_cost_table(chosen), type=CostTable)
    except msgspec.DecodeError as fault:
        raise ConfigError.single(chosen, str(fault)) from None
