"""How soon a model of real size is on a GPU: random weights, from the host's memory, against the link's own speed.

    python -m benchmark.gpu.activation --json FILE         on a machine with a GPU
    python -m benchmark.gpu.activation --rehearse          the same steps on a CPU, with small shapes

What one copy out of page-locked memory reaches is measured first; `floor` is a model's bytes at that speed. A first visit is
an EMPTY process becoming the model, eager, until its first token. Then it comes with CUDA graphs, which are captured once,
and leaves: it is parked, its weights and its cache give their memory back, and a return is the same process binding it again,
graphs and all. What a parked model keeps is told beside it. Images are built from SGLang's `dummy` weights, so nothing is
downloaded and no file of weights is written.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from chimera.core.model import ModelSpec
from chimera.core.shape import shape_of
from chimera.engine.api import Parking
from chimera.engine.preload import preload
from chimera.units import GIB, MIB
from chimera.weights.store import WeightStore

from benchmark.report import Figures, parser, percentile

if TYPE_CHECKING:
    from chimera.engine.sglang.warm import WarmEngine

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_COMMON = {"torch_dtype": "bfloat16", "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 5e5}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 128256) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return _LLAMA | _COMMON | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


SHAPES: dict[str, tuple[dict[str, Any], str | None]] = {
    "1B": (_shape(2048, 8192, 16, 32, 8), None),
    "3B": (_shape(3072, 8192, 28, 24, 8), None),
    "8B": (_shape(4096, 14336, 32, 32, 8), None),
    "14B": (_shape(5120, 13824, 48, 40, 8, 152064), None),
    "32B": (_shape(5120, 27648, 64, 40, 8, 152064), None),
    "70B in fp8": (_shape(8192, 28672, 80, 64, 8), "fp8"),
}
REHEARSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "small": (_shape(256, 512, 2, 4, 2, 1024), None),
    "less small": (_shape(512, 1024, 4, 8, 2, 1024), None),
}
PROMPT = (5, 6, 7, 8, 9)
EAGER = {"load_format": "dummy", "disable_cuda_graph": True, "sampling_backend": "pytorch"}
WITH_GRAPHS = {"load_format": "dummy", "sampling_backend": "pytorch", "cuda_graph_max_bs_decode": 32}
KV_BYTES = 64 * MIB
VISITS = 5


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rehearse", action="store_true", help="on a CPU, with small shapes: no figure means anything")
    options.add_argument("--only", nargs="+", metavar="SIZE", help=f"some of {', '.join(SHAPES)}")
    options.add_argument("--image-dir", type=Path, default=Path("/dev/shm"), help="where images go (default: %(default)s)")
    arguments = options.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("skipped: no NVIDIA GPU here; --rehearse goes through the same steps on a CPU")
        return 0
    device = "cpu" if arguments.rehearse else torch.cuda.get_device_name()
    figures = Figures("activation on a GPU", seed=arguments.seed, facts={"device": device, "torch": torch.__version__})
    with tempfile.TemporaryDirectory(prefix="chimera-bench-", dir=arguments.image_dir) as folder:
        store = WeightStore(Path(folder))
        # Imported before the device is touched, as a preloaded parent would be.
        engine = imaging_dummies(store)
        link = 0.0 if arguments.rehearse else link_bytes_per_s(figures)
        for name, (config, quantization) in (REHEARSED if arguments.rehearse else SHAPES).items():
            if arguments.only is None or name in arguments.only:
                visit(figures, engine, spec_of(Path(folder), name, config, quantization), link)
                for path in Path(folder).glob("*.image"):
                    path.unlink()
    return figures.finish(arguments.json)


def imaging_dummies(store: WeightStore) -> WarmEngine:
    make = preload("sglang")
    from chimera.engine.sglang.warm import WarmEngine

    class ImagingDummies(WarmEngine):
        """SGLang makes up other weights each time; here they are made up once."""

        def takes_image(self, model: ModelSpec) -> bool:
            return True

    bare: Any = make()
    return ImagingDummies(bare, store, Parking(models=1))


def link_bytes_per_s(figures: Figures) -> float:
    """One copy of a GiB, out of page-locked memory."""
    source = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    speeds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        speeds.append(GIB / (time.perf_counter() - began_s))
    figures.samples("the link, from page-locked memory", [speed / 1e9 for speed in speeds[1:]], "GB/s")
    return percentile(speeds[1:], 50)


def spec_of(folder: Path, name: str, config: dict[str, Any], quantization: str | None) -> ModelSpec:
    path = folder / name.replace(" ", "-")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shape = shape_of(config)
    return ModelSpec(
        name=name,
        path=os.fspath(path),
        tokenizer_path=os.fspath(path),
        architecture=shape.architecture,
        weight_bytes=shape.weight_bytes(quantization=quantization),
        kv_bytes_per_token=shape.kv_bytes_per_token(),
        context_length=shape.context_length,
        quantization=quantization,
        engine_args=EAGER,
    )


def visit(figures: Figures, engine: WarmEngine, model: ModelSpec, link: float) -> None:
    name = model.name
    began_s = time.monotonic()
    nbytes = engine.prepare(model, gpu_ids=(0,))
    figures.add(f"{name}: its image", nbytes / GIB, "GiB")
    figures.add(f"{name}: building it", time.monotonic() - began_s, "s")
    first = first_token_s(engine, model)
    with_graphs = msgspec.structs.replace(model, engine_args=WITH_GRAPHS)
    figures.add(f"{name}: with graphs, until they are captured", first_token_s(engine, with_graphs), "s")
    remains = engine.remains(0)
    assert remains.models == (name,), f"{name} is not parked"
    figures.add(f"{name}: parked, it keeps", remains.nbytes / MIB, "MiB")
    returns = [first_token_s(engine, with_graphs) for _ in range(VISITS)]
    floor_s = nbytes / link if link else None
    if floor_s is not None:
        figures.add(f"{name}: floor", floor_s, "s")
    figures.add(f"{name}: first visit, eager", first, "s", at_most=None if floor_s is None else 1.3 * floor_s + 0.3)
    engine.let_go(0, 0, "the next size needs the room")
    figures.samples(f"{name}: return, graphs kept", returns, "s", at_most=None if floor_s is None else 1.15 * floor_s + 0.1)


def first_token_s(engine: WarmEngine, model: ModelSpec) -> float:
    """From EMPTY to the first token, the check included."""
    began_s = time.monotonic()
    engine.activate(model, gpu_ids=(0,), kv_bytes=KV_BYTES, ceiling_bytes=4 * KV_BYTES)
    engine.ask(PROMPT, tokens=1)
    took_s = time.monotonic() - began_s
    engine.deactivate()
    return took_s


if __name__ == "__main__":
    sys.exit(main())
