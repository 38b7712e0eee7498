"""A decoder in plain PyTorch, for training: Llama, Qwen3 or Qwen3-MoE, as its config says.

Parameters have the names that checkpoints on the hub have, so its state dict is a checkpoint that any engine loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Config = dict[str, Any]


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        hidden, width = c["hidden_size"], c["head_dim"]
        self._width, self._groups = width, c["num_attention_heads"] // c["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, c["num_attention_heads"] * width, bias=False)
        self.k_proj = nn.Linear(hidden, c["num_key_value_heads"] * width, bias=False)
        self.v_proj = nn.Linear(hidden, c["num_key_value_heads"] * width, bias=False)
        self.o_proj = nn.Linear(c["num_attention_heads"] * width, hidden, bias=False)
        if c["model_type"].startswith("qwen3"):
            self.q_norm: nn.Module = Norm(width, c["rms_norm_eps"])
            self.k_norm: nn.Module = Norm(width, c["rms_norm_eps"])
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (p(x).float().unflatten(-1, (-1, self._width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        with torch.autocast("cpu", enabled=False):  # at this size the way back through attention takes longer in bfloat16
            q, k = (_rotate(n, rope).transpose(1, 2) for n in (self.q_norm(q), self.k_norm(k)))
            k, v = (n.repeat_interleave(self._groups, dim=1) for n in (k, v.transpose(1, 2)))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Every expert is computed for every token and most weighed with zero: small as they are, that is quicker than sorting."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self._chosen = c["num_experts_per_tok"]
        self.gate = nn.Linear(c["hidden_size"], c["num_experts"], bias=False)
        self.experts = nn.ModuleList(Mlp(c["hidden_size"], c["moe_intermediate_size"]) for _ in range(c["num_experts"]))
        self.imbalance = torch.zeros(())
        """Of the last step: 1 when all experts are asked equally often. Part of the loss, so that none is forgotten."""

    def forward(self, x: Tensor) -> Tensor:
        likely = self.gate(x).float().softmax(-1)
        weights, chosen = likely.topk(self._chosen, -1)
        share = torch.zeros_like(likely).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
        self.imbalance = (share.gt(0).float().mean((0, 1)) / self._chosen * likely.mean((0, 1))).sum() * len(self.experts)
        return sum((share[..., i, None] * expert(x) for i, expert in enumerate(self.experts)), torch.zeros(()))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = Experts(c) if "num_experts" in c else Mlp(c["hidden_size"], c["intermediate_size"])
        self.input_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self._frequencies = c["rope_theta"] ** -(torch.arange(0, c["head_dim"], 2) / c["head_dim"])

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(ids.shape[1]), self._frequencies).repeat(1, 2)[:, None]
        x, rope = self.embed_tokens(ids), (angles.cos(), angles.sin())
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.model = Trunk(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=c["initializer_range"])

    def loss(self, ids: Tensor, answered: Tensor) -> Tensor:
        """Of the tokens of `ids` that `answered` marks, each from those before it."""
        marked = answered[:, 1:]
        logits = self.lm_head(self.model(ids[:, :-1])[marked])
        return F.cross_entropy(logits.float(), ids[:, 1:][marked])

    def imbalance(self) -> Tensor:
        return sum((m.imbalance for m in self.modules() if isinstance(m, Experts)), torch.zeros(()))


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin
