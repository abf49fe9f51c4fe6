"""Attention of int16 codes over a long cache that is almost empty, and RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="optional extra: pip install 'llamac[apu]'")

from llamac.compiler import reference
from llamac.targets.neuropilot.attention import Attention, Positions
from llamac.targets.neuropilot.interpreter import run_model
from llamac.targets.neuropilot.operations import Operations
from llamac.targets.neuropilot.tflite_file import TfliteFile

SIZE, SCALE = 32, 2.0**-12


def write(path: Path, capacity: int, largest: float) -> None:
    """Attention of one token with one head, and its turned query."""
    with TfliteFile(path, "attention") as file:
        ops = Operations(file)
        cos, sin = (file.input(name, (1, 1, SIZE // 2, 1), 1 / 32767) for name in ("cos", "sin"))
        masked = -Positions.masked(largest) / 32767
        positions = Positions(ops, cos, sin, file.input("mask", (1, capacity + 1), masked))
        q = positions.turn(file.input("q", (1, SIZE), SCALE), SIZE, SIZE**-0.5, SCALE)
        shapes = ((1, capacity // 16, SIZE, 16), (1, capacity, SIZE))
        caches = [file.input(f"{n}_cache", s, SCALE) for n, s in zip("kv", shapes, strict=True)]
        new = [file.input(name, (1, 1, SIZE), SCALE) for name in "kv"]
        attention = Attention(ops, positions, largest, SCALE)
        file.output(attention.attend(q, caches, new), "out")
        file.output(ops.reshape(q, 1, 1, SIZE), "turned")


@pytest.mark.parametrize("capacity", [64, 2048])
@pytest.mark.parametrize("num_past", [0, 1, 40])
def test_empty_places_take_no_attention(
    capacity: int, num_past: int, tmp_path: Path, kit: Any
) -> None:
    """SOFTMAX alone would give 2048 of them 11 % and more: 19 dB. They hold the largest codes."""
    rng = np.random.default_rng(0)
    write(tmp_path / "x.tflite", capacity, 8.0)
    q, keys, values = (
        rng.integers(-4000, 4000, (count, SIZE)).astype(np.int16)
        for count in (1, num_past + 1, num_past + 1)
    )
    angle = rng.uniform(0, 2 * np.pi, SIZE // 2)
    table = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
    cos, sin = (np.rint(table[:, None, :, i : i + 1] * 32767).astype(np.int16) for i in (0, 1))
    turned = reference.rope((q * SCALE)[:, None], table)
    own = np.rint(turned[:, 0] / SCALE).astype(np.int16)
    keys[-1] = own[0]  # a token looks at its own key most of all
    full = np.full((2, capacity, SIZE), 32767, np.int16)
    full[0, :num_past], full[1, :num_past] = keys[:-1], values[:-1]
    mask = np.where(np.arange(capacity + 1) < num_past, 0, -32767).astype(np.int16)
    mask[-1] = 0
    feeds = {
        "q": q,
        "cos": cos,
        "sin": sin,
        "mask": mask[None],
        "k_cache": np.ascontiguousarray(full[:1].reshape(1, -1, 16, SIZE).swapaxes(2, 3)),
        "v_cache": full[1:],
        "k": keys[None, -1:],
        "v": values[None, -1:],
    }
    found = run_model(tmp_path / "x.tflite", feeds)
    assert kit.sqnr_db(found["turned"] * SCALE, turned * SIZE**-0.5) >= 62
    seen = [(part * SCALE)[:, None] for part in (keys, values)]
    expected = reference.attention(turned, *seen, num_past)[0, 0]
    assert kit.sqnr_db(found["out"][0] * SCALE, expected) >= 52
