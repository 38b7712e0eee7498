from __future__ import annotations

import json
from pathlib import Path

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    """A placement file with a model that generates, `m`, and one that makes embeddings, `e`."""
    entries = []
    for name, kind in (("m", "llama"), ("e", "embedder")):
        make(MODELS[kind], tmp_path / kind, seed=0)
        placements = [{"gpu_ids": [0], "max_memory_pool_size": 0.05}]
        entries.append(
            {"model_name": name, "model_path": str(tmp_path / kind), "context_length": 256, "init_placements": placements}
        )
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(entries))
    return path
