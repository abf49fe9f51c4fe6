"""Folders of Hugging Face with random damage: read, or refused by an error with advice."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.hf import from_hf
from llamac.runtime.errors import LlamacError

SCHEMES = ("gptq", "awq", "compressed-tensors", "torchao", None)
JUNK: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    0.5,
    float("inf"),
    float("nan"),
    1 << 70,
    "x",
    "\ud800",
    "int4",
    [],
    [1],
    [None],
    [[[]]],
    {},
    {"_type": 1},
)


@pytest.fixture(scope="module")
def layouts(
    hf_layout: ModuleType, hf_packing: ModuleType, tiny_float: Checkpoint
) -> dict[str | None, Any]:
    """The tiny model in every form."""
    made = {}
    for scheme in SCHEMES:
        encode = getattr(hf_packing, scheme.partition("-")[0])(32) if scheme else None
        layout = made[scheme] = hf_layout.make_layout(tiny_float, encode)
        if scheme:
            layout.config["quantization_config"] = hf_packing.CONFIGS[scheme]
        if scheme == "torchao":
            modules = (n for n in layout.tensors if n.endswith("._weight_qdata"))
            names = (n.replace("._weight_qdata", ".weight") for n in modules)
            layout.metadata = dict.fromkeys(names, hf_packing.METADATA)
    return made


def mutate(content: Any, rng: random.Random) -> None:
    """Remove, rename or replace a part of JSON, at any depth."""
    node, parent, key = content, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parent, node = node, node[key]
    if parent is None:
        return
    kind = rng.random()
    if kind < 0.2:
        del parent[key]
    elif kind < 0.3 and isinstance(parent, dict):
        parent[rng.choice(("x", "\ud800", f"{key}x"))] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(rng.choice(JUNK))


def damage_header(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    mutate(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def damage_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_damage(
    count: int,
    layouts: dict[str | None, Any],
    tmp_path: Path,
    check_advice: Callable[[LlamacError], None],
) -> None:
    rng, seen = random.Random(count), Counter[str]()
    for number in range(count):
        layout = copy.copy(layouts[rng.choice(SCHEMES)])
        place = rng.choice(("config", "generation", "tokenizer", "header", "bytes"))
        if place not in ("header", "bytes"):
            content = copy.deepcopy(getattr(layout, place))
            for _ in range(rng.randint(1, 2)):
                mutate(content, rng)
            setattr(layout, place, content)
        folder = layout.write(tmp_path / str(number), rng.choice((1, 2)))
        files = sorted(folder.iterdir())
        if place == "header":
            damage_header(rng.choice([f for f in files if f.suffix == ".safetensors"]), rng)
        if place == "bytes":
            damage_bytes(rng.choice(files), rng)
        try:
            checkpoint = from_hf(folder)
            for name in checkpoint.weights.names()[:20]:
                checkpoint.weights.read(name)
            seen["read"] += 1
        except LlamacError as error:
            check_advice(error)
            seen[type(error).__name__] += 1
        for file in files:
            file.unlink()
    assert seen["read"] > count / 10
    assert len(seen) > 4
