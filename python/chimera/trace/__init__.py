"""Workloads: who asked which model for how much, when. Reads them, makes them up, cuts, scales and renames them.

    reader     any trace file by its content, row by row; faults that name the line
    tables     CSV: our own columns, Azure's, BurstGPT's
    mooncake   JSON lines with the prefix blocks of each prompt
    sharegpt   conversations, which have texts and no times
    prism      Prism's pickled trace, by an unpickler that can make plain data and nothing else
    generator  made-up arrivals, lengths and popularities, by a seed
    trace      a trace and what can be made of it: slices, scales, other names

Knows no scheduler and no server; what a request says is not in a trace, at most which prefix it shares.
"""
