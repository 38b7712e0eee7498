"""Workloads: who asked which model for how much, when. Reads them, cuts them, scales them, and names models anew.

    reader   CSV files, plain or gzipped, with faults that name the line
    trace    a trace and what can be made of it: slices, scales, other names

Knows no scheduler and no server; what a request says is not in a trace.
"""
