"""Who holds how much of each GPU, by class: one ledger per GPU, the single source of truth for its memory.

Owns the safe way from what is held to what is allotted: pages are back before they are given again. Decides nothing about
who deserves them (`sched/`) and knows no address (`vmm/`, `kv/`).
"""
