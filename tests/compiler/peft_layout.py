"""Write LoRA adapters as PEFT saves them, for tests of their reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from llamac.compiler.config import LlamaConfig

PREFIX = "base_model.model.model.layers"
PARTS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
CODES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}


def matrices(
    config: LlamaConfig, parts: list[str], rank: int, size: float = 0.05, seed: int = 0
) -> dict[str, Any]:
    """Random A and B for some linears of all blocks, by PEFT's names."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(config.num_layers):
        for part in parts:
            outputs, inputs = config.linear_shapes()[PARTS[part]]
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = f"{PREFIX}.{layer}.{part}.lora_{side}.weight"
                found[name] = (size * rng.standard_normal(shape)).astype(np.float32)
    return found


def write_adapter(folder: Path, tensors: dict[str, Any], rank: int, **fields: Any) -> Path:
    """Write both files; `fields` add to the configuration, or replace some of it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"use_dora": False, "modules_to_save": None, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields), "utf-8")
    header, data = {}, b""
    for name, value in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        code = CODES[str(value.dtype)]
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder
