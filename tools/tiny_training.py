"""A Llama 3.2 in plain torch, small, and its training."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from llamac.compiler.config import LlamaConfig, rope_table

Sample = tuple[list[int], list[bool]]


class Attention(nn.Module):
    """Causal attention with grouped queries and interleaved RoPE."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.q_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_dim, bias=False)
        self.wo = nn.Linear(config.q_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Mix positions: x [B, T, dim], table [T, D/2, 2] -> [B, T, dim]."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(
            _rope(q, table), _rope(k, table), v, is_causal=True, enable_gqa=True
        )
        out: torch.Tensor = self.wo(mixed.transpose(1, 2).flatten(-2))
        return out


def _rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = table[..., 0], table[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position: [B, T, dim] -> [B, T, dim]."""
        out: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer; submodule names are Meta's tensor names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Add attention and feed-forward to the residual stream."""
        x = x + self.attention(self.attention_norm(x), table)
        out: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class TinyLlama(nn.Module):
    """The whole model, output tied to the embedding."""

    table: torch.Tensor

    def __init__(self, config: LlamaConfig, context: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.register_buffer("table", torch.from_numpy(rope_table(config, context)), False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # What writes to the residual stream starts smaller, by the number of writers.
                writes = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(
                    weight, std=0.05 / (math.sqrt(2 * config.num_layers) if writes else 1)
                )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after every token: [B, T] -> [B, T, V]."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.table[: tokens.shape[1]])
        return F.linear(self.norm(x), self.tok_embeddings.weight)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Float tensors under Meta's names."""
        return {name: value.detach().numpy() for name, value in self.named_parameters()}


def batches(
    samples: Sequence[Sample], tokens_per_batch: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut samples into batches of one length each, forever, in random order.

    Every row begins at position 0 with begin_of_text, as in use; rows are padded to the longest.

    Yields:
        tokens [B, T] and the tokens that follow them [B, T], -100 where nothing is to be learnt.
    """
    while True:
        # A little noise on the length mixes who shares a batch.
        order = sorted(samples, key=lambda sample: len(sample[0]) + rng.random() * 16)
        groups: list[list[Sample]] = [[]]
        for sample in order:
            if (len(groups[-1]) + 1) * len(sample[0]) > tokens_per_batch:
                groups.append([])
            groups[-1].append(sample)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            tokens = torch.zeros(len(group), width, dtype=torch.long)
            wanted = torch.full((len(group), width), -100)
            for row, (ids, learnt) in enumerate(group):
                line = torch.tensor(ids)
                tokens[row, : len(ids)] = line
                wanted[row, : len(ids)] = torch.where(torch.tensor(learnt), line, -100)
            yield tokens[:, :-1], wanted[:, 1:]


def loss_of(model: TinyLlama, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood in nats of the tokens to be learnt."""
    return F.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())


def train(
    model: TinyLlama,
    samples: Sequence[Sample],
    *,
    num_steps: int,
    learning_rate: float,
    tokens_per_batch: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Train in place with AdamW, a short warm-up and a cosine to zero."""
    decay = [weight for weight in model.parameters() if weight.ndim == 2]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    source = batches(samples, tokens_per_batch, random.Random(seed))
    started = time.monotonic()
    average = None
    for step in range(num_steps):
        warm_up = min(1.0, (step + 1) / 50)
        rate = learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, *next(source))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 99:
            report(f"step {step + 1}: loss {average:.4f}, {time.monotonic() - started:.0f} s")


@torch.no_grad()
def evaluate(model: TinyLlama, samples: Sequence[Sample]) -> float:
    """Mean negative log likelihood in nats over all tokens to be learnt."""
    total, count = 0.0, 0
    for sample in samples:
        tokens, wanted = next(batches([sample], len(sample[0]), random.Random(0)))
        num = int((wanted >= 0).sum())
        total += loss_of(model, tokens, wanted).item() * num
        count += num
    return total / count


@torch.no_grad()
def greedy(model: TinyLlama, prompt: Sequence[int], stop: set[int], limit: int) -> list[int]:
    """The likeliest continuation of a prompt, up to a stop token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        following = int(model(torch.tensor([ids]))[0, -1].argmax())
        if following in stop:
            break
        ids.append(following)
    return ids[len(prompt) :]
