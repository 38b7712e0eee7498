"""What SGLang keeps in the process for the one model that it expects there: settings, flags, buffers, process groups.

Taken away with a model that is parked, and put back when it returns, so that each finds the world it was built in. Knows
names of SGLang's variables and what must be among them; knows no model.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch.distributed
from sglang.srt import runtime_context
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.parallel_state import GroupCoordinator, destroy_model_parallel
from sglang.srt.runtime_context import reset_context

from chimera.engine.sglang.gathering import parted

_OF_A_MODEL: Final = {
    "sglang.srt.layers.dp_attention": ("_ATTN_DP_RANK", "_ATTN_DP_SIZE"),
    "sglang.srt.layers.cp.base": ("_STRATEGY",),
    "sglang.srt.layers.quantization.fp8_utils": ("FP8_GEMM_RUNNER_BACKEND",),
    "sglang.srt.layers.quantization.fp4_utils": ("FP4_GEMM_RUNNER_BACKEND",),
    "sglang.srt.layers.quantization.unquant": (
        "_BF16_GEMM_BACKEND",
        "_cutedsl_bf16_gemm",
        "_use_cutedsl_bf16_gemm",
        "_hopper_bf16_gemv",
        "_use_hopper_bf16_gemv",
        "_enable_bf16_splitk_gemm",
        "_run_splitk_dense",
        "_splitk_tactic",
        "_prefer_direct",
        "_run_direct_dense",
        "_direct_default_tactic",
    ),
    "sglang.srt.layers.attention.linear.utils": ("LINEAR_ATTN_DECODE_BACKEND", "LINEAR_ATTN_PREFILL_BACKEND"),
    "sglang.srt.layers.moe.moe_runner.triton_utils": ("_config",),
}
"""Variables that are set while a scheduler is built, and read while it runs. Not every release has all of them."""


class Surroundings:
    """Of one model, while it is not up."""

    def __init__(self) -> None:
        """Takes what there is; the process is afterwards as one that has no model, but for its default process group."""
        context = runtime_context._CONTEXT
        self._context = {name: _copy(getattr(context, name)) for name in type(context).__slots__ if name != "parallel"}
        self._parallel = {name: _copy(getattr(context.parallel, name)) for name in type(context.parallel).__slots__}
        self._variables = [
            (module, name, getattr(module, name))
            for where, names in _OF_A_MODEL.items()
            if (module := sys.modules.get(where)) is not None
            for name in names
            if hasattr(module, name)
        ]
        self._groups = _groups()
        for name in self._groups:
            setattr(parallel_state, name, None)
        destroy_model_parallel()  # of none of them any more: it is how SGLang learns that groups may be made again
        reset_context()

    def put_back(self) -> None:
        """Only where no other model is."""
        context = runtime_context._CONTEXT
        for name, value in self._context.items():
            setattr(context, name, _copy(value))
        for name, value in self._parallel.items():
            setattr(context.parallel, name, _copy(value))
        for module, name, value in self._variables:
            setattr(module, name, value)
        for name, group in self._groups.items():
            setattr(parallel_state, name, group)


def forget() -> None:
    """The model's surroundings are no longer needed. The default process group goes with the last model that has groups."""
    with parted():
        destroy_model_parallel()
        for name, group in _groups().items():  # the world, and what SGLang leaves to the end of the process
            setattr(parallel_state, name, None)
            group.destroy()
    if torch.distributed.is_initialized() and len(torch.distributed.distributed_c10d._world.pg_map) == 1:
        torch.distributed.destroy_process_group()
    reset_context()


def _groups() -> dict[str, GroupCoordinator]:
    return {name: group for name, group in vars(parallel_state).items() if isinstance(group, GroupCoordinator)}


def _copy(value: Any) -> Any:
    """SGLang empties these in place; everything else it replaces."""
    return value.copy() if type(value) in (dict, list) else value
