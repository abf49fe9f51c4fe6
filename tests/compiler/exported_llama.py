"""Models to export: a Llama as somebody writes it, with complex numbers, and changes of it.

Loaded by path, because folders of tests are no packages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """Of a small model, and what is changed in it."""

    dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    layers: int = 3
    vocab: int = 320
    theta: float = 10000.0
    eps: float = 1e-6
    change: str = ""


class Norm(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(sizes.dim))
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True) if self.sizes.change == "layer norm" else x
        square = (centred * centred).mean(-1, keepdim=True)
        return centred * torch.rsqrt(square + self.sizes.eps) * self.weight


class Block(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        q, kv, bias = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.change == "bias"
        self.sizes = s
        self.qkv = nn.Linear(s.dim, q + 2 * kv, bias=False) if s.change == "fused" else None
        self.gate_up = nn.Linear(s.dim, 2 * s.ffn, bias=False) if s.change == "fused" else None
        self.wq = nn.Linear(s.dim, q, bias=bias)
        self.wk, self.wv = (nn.Linear(s.dim, kv, bias=False) for _ in range(2))
        self.wo = nn.Linear(q, s.dim, bias=False)
        self.w1, self.w3 = (nn.Linear(s.dim, s.ffn, bias=False) for _ in range(2))
        self.w2 = nn.Linear(s.ffn, s.dim, bias=False)
        self.norm1, self.norm2 = Norm(s), Norm(s)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        s, (batch, count, _) = self.sizes, x.shape
        normed = self.norm1(x)
        if self.qkv is not None:
            kv = s.kv_heads * s.head_dim
            parts = self.qkv(normed).split([s.heads * s.head_dim, kv, kv], -1)
        else:
            parts = (self.wq(normed), self.wk(normed), self.wv(normed))
        q, k, v = (part.unflatten(-1, (-1, s.head_dim)) for part in parts)
        q, k = turn(q, turns), turn(k, turns)
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, 2).transpose(1, 2) for t in (k, v))
        scale = 1.0 if s.change == "scale" else math.sqrt(s.head_dim)
        scores = q.transpose(1, 2) @ k.transpose(2, 3) / scale + mask
        weights = torch.softmax(scores.float(), -1).type_as(x)
        x = x + self.wo((weights @ v).transpose(1, 2).reshape(batch, count, -1))
        normed = self.norm2(x)
        if self.gate_up is not None:
            gate, up = self.gate_up(normed).chunk(2, -1)
        else:
            gate, up = self.w1(normed), self.w3(normed)
        activation = {"gelu": nn.functional.gelu, "tanh": torch.tanh}.get(s.change)
        inner = activation(gate) if activation else nn.functional.silu(gate)
        return x + self.w2(inner * up) * (0.5 if s.change == "residual" else 1.0)


class OwnLlama(nn.Module):
    """Logits of the last token, of tokens [1, T]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocab, sizes.dim)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm, self.output = Norm(sizes), nn.Linear(sizes.dim, sizes.vocab, bias=False)
        pairs = torch.arange(0, sizes.head_dim, 2).double() / sizes.head_dim
        angles = torch.outer(torch.arange(64).double(), sizes.theta**-pairs).float()
        if sizes.change == "linear rope":
            angles = angles / 2
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, count = self.embedding(tokens), tokens.shape[1]
        if self.sizes.change == "scaled embedding":
            x = x * 8.0
        hidden = torch.full((count, count), float("-inf"))
        mask = torch.triu(hidden, 2 if self.sizes.change == "not causal" else 1)
        for block in self.blocks:
            x = block(x, self.turns, mask)
        logits = self.output(self.norm(x))[:, -1]
        return torch.tanh(logits) if self.sizes.change == "softcap" else logits


def turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RoPE of neighbours, by complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * turns[None, : x.shape[1], None]
    return torch.view_as_real(turned).flatten(3).type_as(x)


class Logits(nn.Module):
    """A model of transformers as a function of tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits
