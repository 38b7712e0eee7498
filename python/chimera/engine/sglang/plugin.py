"""Our plug-in to SGLang, by its own entry point (`sglang.srt.plugins`): where a KV pool is made, and where it is short.

An installed plug-in is loaded by every SGLang on the machine, so each hook does nothing but SGLang's own unless a model is
being built inside `elastic_memory`, or was. Knows which places of SGLang are touched; what is done there is `elastic.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from chimera.engine.api import CannotServe
from chimera.engine.sglang.allocator import ElasticAllocator
from chimera.engine.sglang.elastic import ElasticKv
from chimera.kv.layout import KvKind

_POOLS = "sglang.srt.mem_cache.memory_pool"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"

_HAS_TREE_CORES = hasattr(envs, "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND")

_registered = False
_is_ours = False
"""Whether this process has built an engine of ours, so that its requests carry our order."""
_building: ElasticKv | None = None


def register() -> None:
    """The entry point; called once by SGLang, and again harmlessly by us where the package's metadata is older than it."""
    global _registered
    if _registered:
        return
    _registered = True
    HookRegistry.register(f"{_POOLS}.MHATokenToKVPool._create_buffers", _create_heads, HookType.AROUND)
    HookRegistry.register(f"{_POOLS}.MLATokenToKVPool._create_buffers", _create_latent, HookType.AROUND)
    HookRegistry.register(f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", _build_allocator, HookType.AROUND)
    HookRegistry.register(f"{_BATCH}.check_decode_mem", _check_decode_mem, HookType.AROUND)
    HookRegistry.register(f"{_BATCH}._get_decode_retraction_order", _last_come_yields_first, HookType.AROUND)


def activate() -> None:
    """For processes that build SGLang themselves: the hooks are in place when this returns."""
    register()
    HookRegistry.apply_hooks()


@contextmanager
def elastic_memory(kv: ElasticKv | None) -> Iterator[None]:
    """What is built inside has its KV pool on `kv`; `None` is SGLang's own."""
    global _building, _is_ours
    _building, _is_ours = kv, True
    try:
        if kv is None:
            yield
            return
        # Newer releases keep prefixes in a tree of Rust, whose slots nobody can exchange from outside.
        with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override("python") if _HAS_TREE_CORES else nullcontext():
            yield
    finally:
        _building = None


def _create_heads(original: Callable[..., None], pool: Any) -> None:
    """SGLang's own, with the one step replaced that allocates: scales, descriptors and pointers stay its own."""
    kv = _building
    if kv is None:
        original(pool)
        return
    _refuse_unknown_layout(pool, quantized=pool.is_quantized_kv_cache, layout=pool.kv_cache_layout)

    def on_elastic_memory() -> None:
        kind = KvKind.heads(pool.layer_num, pool.head_num, pool.head_dim, pool.store_dtype, v_head_dim=pool.v_head_dim)
        planes = kv.furnish(kind, slots=pool.size + pool.page_size, page_size=pool.page_size, device=pool.device)
        pool.k_buffer, pool.v_buffer = planes["k"], planes["v"]
        _admit_whole_stripes(pool, planes["k"])

    pool._create_buffers_normal = on_elastic_memory
    try:
        original(pool)
    finally:
        del pool._create_buffers_normal


def _create_latent(original: Callable[..., None], pool: Any) -> None:
    kv = _building
    if kv is None:
        original(pool)
        return
    _refuse_unknown_layout(pool, quantized=False, layout="nhd")
    kind = KvKind.latent(pool.layer_num, pool.kv_cache_dim, pool.store_dtype)
    planes = kv.furnish(kind, slots=pool.size + pool.page_size, page_size=pool.page_size, device=pool.device)
    pool.kv_buffer = planes["kv"]
    _admit_whole_stripes(pool, planes["kv"])


def _admit_whole_stripes(pool: Any, layers: Sequence[Any]) -> None:
    """The last stripe has slots beyond those that SGLang asked for; it checks its tensors against what it thinks they are."""
    if layers:
        pool.size = len(layers[0]) - pool.page_size


def _refuse_unknown_layout(pool: Any, *, quantized: bool, layout: str) -> None:
    """Whole elements of one type, token by token: what scales lie beside, or what is blocked otherwise, we cannot place."""
    if quantized:
        method = getattr(pool.quant_method, "name", type(pool.quant_method).__name__)
        what = f"a KV cache quantised by {method}"
    elif layout != "nhd":
        what = f"a KV cache in the layout {layout!r}"
    elif getattr(pool, "post_capture_active", False):
        what = "a KV cache that SGLang maps after graph capture"
    elif pool.store_dtype.itemsize < 1 or pool.store_dtype.is_complex:
        what = f"a KV cache of {pool.store_dtype}"
    else:
        return
    raise CannotServe(
        f"{what} cannot have elastic memory: set elastic to false, or choose another kv_cache_dtype", permanent=True
    )


def _build_allocator(original: Callable[..., Any], configurator: Any, **settings: Any) -> Any:
    kv = _building
    if kv is None:
        return original(configurator, **settings)
    if settings["token_to_kv_pool_allocator"] is not None:
        raise CannotServe("speculative decoding cannot share elastic KV memory: set elastic to false", permanent=True)
    pool = settings["token_to_kv_pool"]
    return kv.allocator(
        size=settings["sizes"].max_total_num_tokens, page_size=pool.page_size, dtype=configurator.kv_cache_dtype, kvcache=pool
    )


def _check_decode_mem(original: Callable[..., bool], batch: Any, selected_indices: Sequence[int] | None = None) -> bool:
    if not original(batch, selected_indices):
        return False
    allocator = batch.token_to_kv_pool_allocator
    if not isinstance(allocator, ElasticAllocator) or allocator.kv is None or not allocator.kv.retracts:
        return True
    left = len(batch.reqs) if selected_indices is None else len(selected_indices)
    return allocator.kv.allows(batch.new_tokens_required_next_decode(selected_indices), left)


def _last_come_yields_first(
    original: Callable[..., list[int]], requests: Sequence[Any], *more: Any, **settings: Any
) -> list[int]:
    """Whom to keep, dearest first: in the order in which the agent sent them, so that nobody is overtaken by a later one."""
    if not _is_ours:
        return original(requests, *more, **settings)
    return sorted(range(len(requests)), key=lambda index: -requests[index].priority)
