"""What the front end for Meta's files gives for good files, and how much memory it takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from llamac.compiler.checkpoint import (
    Checkpoint,
    TensorInfo,
)
from llamac.compiler.config import LoraConfig, QuantConfig
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.meta import from_meta

ReadAll = Callable[[Checkpoint], dict[str, np.ndarray]]

FORMS = ("spinquant", "qlora", "ptq", "float")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tensor_comes_back_exactly(
    form: str,
    dtype: torch.dtype,
    write_meta: Callable[..., Path],
    meta_layout: ModuleType,
    read_all: ReadAll,
) -> None:
    checkpoint = from_meta(write_meta(form, dtype=dtype))
    expected = meta_layout.make_tensors(meta_layout.TINY, form, dtype=dtype)
    assert set(checkpoint.weights.names()) == set(expected)
    for name, array in read_all(checkpoint).items():
        tensor = expected[name]
        is_bits = array.dtype == np.uint16
        values = from_bfloat16(array) if is_bits else array
        info = checkpoint.weights.info(name)
        assert info == TensorInfo(array.shape, "bfloat16" if is_bits else str(array.dtype)), name
        want = tensor.float().numpy().reshape(array.shape)
        assert np.array_equal(values.astype(np.float32), want), name
        assert not array.flags.writeable


@pytest.mark.parametrize(
    ("form", "quant"),
    [
        ("spinquant", QuantConfig("spinquant", 32, hadamard_r4=True)),
        ("qlora", QuantConfig("qlora", 32, lora=LoraConfig(4, 2.0))),
        ("ptq", QuantConfig("ptq", 32)),
        ("float", QuantConfig("float")),
    ],
)
def test_form_and_sizes_are_recognised(
    form: str, quant: QuantConfig, write_meta: Callable[..., Path], meta_layout: ModuleType
) -> None:
    folder = write_meta(form)
    checkpoint = from_meta(folder)
    assert checkpoint.quant == quant
    assert checkpoint.config == meta_layout.TINY
    assert checkpoint.name == "model"
    assert checkpoint.tokenizer == folder / "tokenizer.model"
    assert not checkpoint.shared_embedding


def test_names_come_in_the_order_of_use(write_meta: Callable[..., Path]) -> None:
    names = from_meta(write_meta("spinquant")).weights.names()
    assert names[:3] == (
        "tok_embeddings.weight",
        "tok_embeddings.scales",
        "layers.0.attention_norm.weight",
    )
    assert names[-3:] == ("norm.weight", "output.weight", "output.scales")


def test_canonical_dtypes_and_shapes(write_meta: Callable[..., Path]) -> None:
    info = from_meta(write_meta("qlora")).weights.info
    assert info("norm.weight") == TensorInfo((64,), "float32")
    assert info("output.scales") == TensorInfo((96,), "float32")
    assert info("layers.1.feed_forward.w2.scales") == TensorInfo((64, 8), "float32")
    assert info("layers.0.attention.wk.weight") == TensorInfo((32, 64), "int8")
    assert info("layers.0.attention.wk.adaptor.B.weight") == TensorInfo((32, 4), "bfloat16")
    with pytest.raises(KeyError):
        info("layers.2.attention.wk.weight")


def test_the_pth_itself_can_be_named_and_renamed(
    write_meta: Callable[..., Path], read_all: ReadAll
) -> None:
    folder = write_meta("float")
    assert from_meta(folder / "consolidated.00.pth").name == "model"
    (folder / "consolidated.00.pth").rename(folder / "weights.pth")
    assert read_all(from_meta(folder))


def test_folder_named_original_takes_the_name_above(
    meta_layout: ModuleType, tmp_path: Path
) -> None:
    folder = meta_layout.write_checkpoint(tmp_path / "My Model (1)" / "original", "float")
    assert from_meta(folder).name == "My-Model-1"


def test_flat_scales_equal_column_scales(write_meta: Callable[..., Path]) -> None:
    def flatten(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> None:
        tensors["output.scales"] = tensors["output.scales"].squeeze(-1)

    checkpoint = from_meta(write_meta("spinquant", flatten))
    assert checkpoint.weights.read("output.scales").shape == (96,)


def test_tied_float_output_is_the_embedding(
    write_meta: Callable[..., Path], read_all: ReadAll
) -> None:
    checkpoint = from_meta(write_meta("float", lambda t, p: t.pop("output.weight")))
    assert checkpoint.shared_embedding
    assert any("tied" in note for note in checkpoint.notes)
    tensors = read_all(checkpoint)
    assert np.array_equal(tensors["output.weight"], tensors["tok_embeddings.weight"])


@pytest.mark.parametrize("part", ["weight", "scales", None])
def test_equal_tables_are_shared_only_when_wholly_equal(
    part: str | None, write_meta: Callable[..., Path]
) -> None:
    def copy(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> None:
        for each in ("weight", "scales"):
            tensors[f"output.{each}"] = tensors[f"tok_embeddings.{each}"].clone()
        if part is not None:
            tensors[f"output.{part}"][-1, -1] = 0

    assert from_meta(write_meta("qlora", copy)).shared_embedding == (part is None)


def test_harmless_extra_tensors_are_accepted(write_meta: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            zeros = torch.zeros_like(tensors[name], dtype=torch.int8)
            tensors[name.replace(".scales", ".zeros")] = zeros
        tensors["rope.freqs"] = torch.ones(8)

    names = from_meta(write_meta("spinquant", add)).weights.names()
    assert not any(name.endswith(".zeros") or name == "rope.freqs" for name in names)


def test_strided_tensors_and_parameters_are_read(
    write_meta: Callable[..., Path], read_all: ReadAll
) -> None:
    def stride(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> None:
        weight = tensors["layers.0.attention.wq.weight"]
        tensors["layers.0.attention.wq.weight"] = weight.t().contiguous().t()
        tensors["norm.weight"] = torch.nn.Parameter(tensors["norm.weight"])

    changed = read_all(from_meta(write_meta("spinquant", stride)))
    plain = read_all(from_meta(write_meta("spinquant")))
    for name in ("layers.0.attention.wq.weight", "norm.weight"):
        assert np.array_equal(changed[name], plain[name])


def test_big_tensors_are_views_of_the_mapped_file(write_meta: Callable[..., Path]) -> None:
    """Two reads give the same memory, and the file is in this process's list of mappings."""
    folder = write_meta("spinquant")
    weights = from_meta(folder).weights
    name = "layers.0.feed_forward.w1.weight"
    first, second = weights.read(name), weights.read(name)
    assert first.ctypes.data == second.ctypes.data
    if Path("/proc/self/maps").exists():
        address = first.ctypes.data
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line for line in lines if str(folder) in line]
        bounds = [[int(x, 16) for x in line.split()[0].split("-")] for line in ranges]
        assert any(low <= address < high for low, high in bounds)


MEMORY_SCRIPT = """
    import sys, threading, time
    from pathlib import Path
    import numpy, torch
    from llamac.compiler.frontends.meta import from_meta

    def anonymous_bytes():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    done, peak, start = threading.Event(), [0], anonymous_bytes()
    sampler = threading.Thread(target=sample)
    sampler.start()
    checkpoint = from_meta(Path(sys.argv[1]))
    total = sum(checkpoint.weights.read(name).nbytes for name in checkpoint.weights.names())
    done.set()
    sampler.join()
    print(total, peak[0] - start, checkpoint.shared_embedding)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this CPU: no /proc")
def test_reading_a_big_checkpoint_takes_little_memory(
    write_meta: Callable[..., Path], meta_layout: ModuleType
) -> None:
    """200 MB pass through less than 60 MB of anonymous memory, with equal tables compared whole."""
    config = replace(
        meta_layout.TINY, dim=2048, num_layers=3, num_heads=32, num_kv_heads=8, head_dim=64,
        ffn_dim=8192, vocab_size=4096,
    )  # fmt: skip

    def share(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> None:
        for part in ("weight", "scales"):
            tensors[f"output.{part}"] = tensors[f"tok_embeddings.{part}"].clone()

    folder = write_meta("spinquant", share, config=config)
    code = textwrap.dedent(MEMORY_SCRIPT)
    command = [sys.executable, "-c", code, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    shutil.rmtree(folder)  # pytest would keep it
    total, peak, shared = int(output[0]), int(output[1]), output[2]
    assert shared == "True"
    assert total > 200e6
    assert peak < 60e6
