"""A text through all layers: prefill, then decode, caches appended to by the caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler import reference
from llamac.compiler.config import rope_table
from llamac.targets.qnn_htp import emitter
from llamac.targets.qnn_htp.context import compile_chunks, htp_of
from llamac.targets.qnn_htp.simulator import run_binary
from llamac.targets.soc import load_soc

CAPACITY = 32


class Caches:
    """The caches of all layers as the CPU lays them out, from zeros."""

    def __init__(self, config: Any) -> None:
        heads, size = config.num_kv_heads, config.head_dim
        self.tensors: dict[str, Any] = {}
        for layer in range(config.num_layers):
            shapes = ((heads, CAPACITY // 16, size, 16), (heads, CAPACITY, size))
            for side, shape in zip("kv", shapes, strict=True):
                self.tensors[f"layers.{layer}.{side}_cache"] = np.zeros(shape, np.float16)

    def append(self, results: dict[str, Any], position: int) -> None:
        """Write what a graph gave: a key is a column of its block, a value a row."""
        for name, rows in results.items():
            cache = self.tensors[name.replace("_new", "_cache")]
            for i in range(rows.shape[1]):
                block, slot = divmod(position + i, 16)
                if name.endswith("k_new"):
                    cache[:, block, :, slot] = rows[:, i]
                else:
                    cache[:, position + i] = rows[:, i]


def test_prefill_and_decode_continue_each_other(
    qnn: None, tiny: Any, chunks_of: Any, float_model: Any, decibels: Any, tmp_path: Path
) -> None:
    """Two chunks of 8 tokens and three single ones: every hidden row, and the likeliest tokens."""
    checkpoint = tiny("spinquant")
    config, model = checkpoint.config, float_model(checkpoint)
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 19).tolist()
    target, caches = htp_of(load_soc("sm8650")), Caches(config)
    binaries = {
        tokens: compile_chunks(
            chunks_of(checkpoint, tokens, CAPACITY, 2),
            *(emitter.float16_writer(checkpoint.weights), target, tmp_path, lambda *_: None),
        )
        for tokens in (8, 1)
    }
    table = rope_table(config, len(ids))
    position, rows = 0, []
    for tokens in (8, 8, 1, 1, 1):
        part = slice(position, position + tokens)
        shared = {
            emitter.ROPE_COS: table[part, None, :, :1].astype(np.float16),
            emitter.ROPE_SIN: table[part, None, :, 1:].astype(np.float16),
            emitter.MASK: emitter.mask_rows(position, tokens, CAPACITY),
        }
        hidden = model.embedding(ids[part]).astype(np.float16)[None]
        for binary in binaries[tokens]:
            mine = {f"layers.{layer}.{side}_cache" for layer in binary.layers for side in "kv"}
            own = {name: caches.tensors[name] for name in mine}
            feeds = {emitter.HIDDEN: hidden, **shared, **own}
            results = run_binary(binary.path, binary.metadata, feeds)
            hidden = results.pop(emitter.HIDDEN_OUT)
            caches.append(results, position)
        rows.append(hidden[0])
        position += tokens
    found = np.concatenate(rows).astype(np.float64)
    expected = model._hidden(ids, model._empty_cache(), 0)
    assert decibels(found, expected) >= 54
    likeliest = [reference.argmax(model._output(hidden)) for hidden in (found, expected)]
    np.testing.assert_array_equal(*likeliest)
