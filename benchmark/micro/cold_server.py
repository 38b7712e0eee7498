"""`sglang.launch_server` as anybody starts it, on a machine without a GPU too: what our own engine is measured against.

    python -m benchmark.micro.cold_server ARGUMENTS-OF-SGLANG

The packages that SGLang imports and such a machine lacks are stood in for, in its spawned processes as well: each imports
this module again. Nothing else of ours is in it.
"""

import sys

from chimera import standins

standins.install()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
