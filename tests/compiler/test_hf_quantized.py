"""GPTQ, AWQ, compressed-tensors, torchao: kept where kernels have the form, else measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.floats import from_bfloat16
from llamac.compiler.frontends.hf import from_hf
from llamac.compiler.llama import ModelOptions, build_llama
from llamac.compiler.reference_model import ReferenceModel

SCHEMES = ("gptq", "awq", "compressed-tensors", "torchao")
PROMPT = [1008, *range(300, 312)]
LAYERS = {"attention.wq": 4, "attention.wk": 2, "attention.wo": 0, "feed_forward.w2": 0}

Write = Callable[..., Path]


@pytest.fixture
def expected(
    hf_layout: ModuleType, hf_packing: ModuleType, tiny_float: Checkpoint
) -> Callable[..., Any]:
    """expected(name, scheme, group, **how): a layer as it was quantized, rows in Meta's order."""

    def run(name: str, scheme: str, group: int, **how: Any) -> Any:
        part = name.split(".", 2)[2]
        values = hf_layout.float_values(tiny_float)[name]
        q = hf_packing.quantize(values, group, **how)
        if scheme in ("compressed-tensors", "torchao"):
            q = hf_packing.rounded_scales(q)
        heads = LAYERS[part]
        if not heads:
            return q
        # Row r of a head stands at 2r, or at 2(r - D/2) + 1: said by hand, not by a reshape.
        order, size = np.empty(len(values), int), len(values) // heads
        for row in range(len(values)):
            head, r = divmod(row, size)
            place = 2 * r if r < size // 2 else 2 * (r - size // 2) + 1
            order[head * size + place] = row
        return hf_packing.Quantized(q.codes[order], q.scales[order], q.zeros[order], q.groups)

    return run


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_symmetric_int4_is_kept(
    scheme: str, group: int, write_quantized: Write, expected: Callable[..., Any]
) -> None:
    """Codes and scales are the file's, rows of q and k in Meta's order."""
    ours = from_hf(write_quantized(scheme, group))
    assert ours.quant.form == "ptq"
    for part in LAYERS:
        name = f"layers.1.{part}"
        q = expected(name, scheme, group)
        codes, scales = (ours.weights.read(f"{name}.{p}") for p in ("weight", "scales"))
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, q.codes.astype(np.int8) - 8)
        columns = codes.shape[1]
        assert scales.shape == (len(codes), columns // 32)
        assert ours.weights.info(f"{name}.scales").shape == scales.shape
        np.testing.assert_array_equal(np.repeat(scales, 32, 1), q.scales[:, q.groups])
    notes = [note for note in ours.notes if "linear layers" in note]
    assert all("int4" in note and note.endswith("without loss") for note in notes)
    assert sum(int(note.split()[0]) for note in notes) == 28
    assert any("become int8 per token" in note for note in ours.notes)
    assert not any("float32 scales" in note for note in ours.notes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_four_are_one_model(scheme: str, write_quantized: Write) -> None:
    """The same module as any int4 checkpoint, as likely as the floats, and the same tokens."""
    first = from_hf(write_quantized("gptq", coarse=True))
    options = ModelOptions(64, (8,))
    module, tokens = build_llama(first, options), ReferenceModel(first).greedy(PROMPT, 8)
    other = from_hf(write_quantized(scheme, coarse=True))
    tvm.ir.assert_structural_equal(build_llama(other, options), module)
    assert ReferenceModel(other).greedy(PROMPT, 8) == tokens
    assert "signed_scales" not in module.script()


def test_it_predicts_nearly_as_well(write_quantized: Write, tiny_float: Checkpoint) -> None:
    """A wrong nibble or row would leave no likelihood at all."""
    from llamac.runtime.manifest import TokenizerEntry  # noqa: PLC0415
    from llamac.runtime.tokenizer import Tokenizer  # noqa: PLC0415

    entry = TokenizerEntry("t", "tiktoken", "llama3", {}, None, (), None)
    text = "Once upon a time, there was a little owl named Dot. One day, Dot wanted to play."
    ids = [1008, *Tokenizer(tiny_float.tokenizer, entry).encode(text)]
    loss = ReferenceModel(tiny_float).nll(ids)
    assert loss < 1.5
    for scheme in SCHEMES:
        assert ReferenceModel(from_hf(write_quantized(scheme))).nll(ids) < loss + 0.4


def test_version_2_of_gptq(write_quantized: Write) -> None:
    first, second = from_hf(write_quantized("gptq")), from_hf(write_quantized("gptq", version=2))
    for part in ("weight", "scales"):
        name = f"layers.2.feed_forward.w1.{part}"
        np.testing.assert_array_equal(second.weights.read(name), first.weights.read(name))


LOSSY: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPTQ, asymmetric": ("gptq", {"symmetric": False, "version": 2}, "with zero points"),
    "AWQ, asymmetric": ("awq", {"symmetric": False}, "with zero points"),
    "compressed-tensors, asymmetric": (
        "compressed-tensors",
        {"symmetric": False},
        "with zero points",
    ),
    "torchao, asymmetric": ("torchao", {"symmetric": False}, "with zero points"),
    "groups of 16": ("gptq", {"group": 16}, "group-16"),
}


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("requantize", [False, True])
def test_what_no_kernel_has_is_converted_and_measured(
    name: str, requantize: bool, write_quantized: Write, expected: Callable[..., Any]
) -> None:
    scheme, how, kind = LOSSY[name]
    how = {"group": 64} | how
    ours = from_hf(write_quantized(scheme, **how), requantize=requantize)
    how.pop("version", None)
    assert ours.quant.form == ("ptq" if requantize else "float")
    losses = []
    for part in LAYERS:
        layer = f"layers.1.{part}"
        exact = expected(layer, scheme, **how).values()
        weight = ours.weights.read(f"{layer}.weight")
        if requantize:
            found = weight * np.repeat(ours.weights.read(f"{layer}.scales"), 32, 1)
        else:
            found = from_bfloat16(weight)
        losses.append(10 * np.log10(np.sum(exact**2) / np.sum((found - exact) ** 2)))
    assert min(losses) > (17 if requantize else 50)
    notes = [note for note in ours.notes if "linear layers" in note]
    assert all(kind in note and " dB of signal to noise" in note for note in notes)
    told = float(notes[0].split(", ")[-1].split(" dB")[0])
    assert min(losses) - 4 < told < max(losses) + 4


@pytest.mark.parametrize("scheme", ["gptq", "compressed-tensors"])
def test_act_order_is_converted(
    scheme: str,
    write_quantized: Write,
    hf_packing: ModuleType,
    hf_layout: ModuleType,
    tiny_float: Checkpoint,
) -> None:
    """Columns of one group stand anywhere, so no scale covers 32 in a row."""
    order = np.random.default_rng(0).permutation(128)

    def encode(values: np.ndarray) -> Any:
        columns = order if values.shape[1] == 128 else None
        make = hf_packing.gptq if scheme == "gptq" else hf_packing.compressed
        return make(64, order=columns)(values)

    def change(layout: Any) -> None:
        for name, values in hf_layout.float_values(tiny_float).items():
            if name.startswith("layers.") and values.ndim == 2:
                for part, array in encode(values).items():
                    stored = hf_layout.stored(array)
                    layout.tensors[f"{hf_layout.module_name(name)}.{part}"] = stored

    ours = from_hf(write_quantized(scheme, 64, change))
    name = "layers.0.attention.wo"
    q = hf_packing.quantize(hf_layout.float_values(tiny_float)[name], 64, order=order)
    q = hf_packing.rounded_scales(q) if scheme != "gptq" else q
    found = from_bfloat16(ours.weights.read(f"{name}.weight"))
    np.testing.assert_allclose(found, q.values(), rtol=2**-8)
    assert any("in act-order: bfloat16" in note for note in ours.notes)
    kept = ours.weights.info("layers.0.feed_forward.w2.weight").dtype
    assert kept == "int8"  # its 256 columns were left in order


def test_an_order_that_was_never_filled_in(write_quantized: Write, hf_layout: ModuleType) -> None:
    """compressed-tensors means by -1 that groups are in order."""

    def change(layout: Any) -> None:
        for name in [n for n in layout.tensors if n.endswith(".weight_shape")]:
            columns = int(layout.tensors[name].data[1])
            index = hf_layout.stored(np.full(columns, -1, np.int32))
            layout.tensors[name.replace("weight_shape", "weight_g_idx")] = index

    ours = from_hf(write_quantized("compressed-tensors", 64, change))
    assert any("int4 group-64: int4 group-32, without loss" in note for note in ours.notes)


def test_groups_in_another_order_are_kept(
    write_quantized: Write, expected: Callable[..., Any]
) -> None:
    """Whole groups that change their places need no other order of columns."""

    def swap(layout: Any) -> None:
        for name, tensor in layout.tensors.items():
            if name.endswith("g_idx") and len(tensor.data) == 128:
                tensor.data = tensor.data[::-1].copy()
                stem = name.removesuffix("g_idx")
                for part in ("scales", "qzeros"):
                    other = layout.tensors[stem + part]
                    other.data = other.data[::-1].copy()

    ours = from_hf(write_quantized("gptq", 64, swap))
    q = expected("layers.1.attention.wo", "gptq", 64)
    scales = ours.weights.read("layers.1.attention.wo.scales")
    np.testing.assert_array_equal(np.repeat(scales, 32, 1), q.scales[:, q.groups])


def test_tiny_and_negative_scales(write_quantized: Write, tiny_float: Checkpoint) -> None:
    """float16's subnormal numbers and negative ones are kept by the kernels for them."""

    def change(layout: Any) -> None:
        scales = layout.tensors["model.layers.0.mlp.up_proj.scales"]
        scales.data = scales.data.copy()
        scales.data[0, :2] = 2.0**-20, -0.01

    ours = from_hf(write_quantized("awq", 32, change))
    assert ours.quant.signed_scales
    np.testing.assert_array_equal(
        ours.weights.read("layers.0.feed_forward.w3.scales")[:2, 0],
        np.array([2.0**-20, -0.01], np.float16),
    )


def test_layers_that_stay_floats(
    write_quantized: Write, hf_layout: ModuleType, tiny_float: Checkpoint
) -> None:
    """A v of bfloat16 takes q and k of its layer with it; an output of its own may stay float."""
    name = "model.layers.1.self_attn.v_proj"

    def change(layout: Any) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del layout.tensors[f"{name}.{part}"]
        plain = hf_layout.make_layout(tiny_float)
        layout.tensors[f"{name}.weight"] = plain.tensors[f"{name}.weight"]

    weights = from_hf(write_quantized("gptq", 32, change)).weights
    dtypes = [weights.info(f"layers.1.attention.w{x}.weight").dtype for x in "qkvo"]
    assert dtypes == ["bfloat16", "bfloat16", "bfloat16", "int8"]


def test_a_quantized_output(
    write_quantized: Write, hf_layout: ModuleType, hf_packing: ModuleType, tiny_float: Checkpoint
) -> None:
    """No kernel has int4 for it; int8 with a scale per row is nearly exact."""

    def change(layout: Any) -> None:
        table = hf_layout.float_values(tiny_float)["tok_embeddings"]
        layout.config["tie_word_embeddings"] = False
        for part, array in hf_packing.gptq(32)(table).items():
            layout.tensors[f"lm_head.{part}"] = hf_layout.stored(array)

    ours = from_hf(write_quantized("gptq", 32, change))
    assert not ours.shared_embedding
    assert ours.weights.info("output.weight").dtype == "int8"
    assert any(note.startswith("output of type GPTQ int4 group-32: int8") for note in ours.notes)


def test_torchao_decodes_its_own_tensors(
    write_hf: Callable[..., Path], tiny_float: Checkpoint, tmp_path: Path
) -> None:
    """What transformers saves of a model that torchao quantized, bit for bit as it dequantizes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    config = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=granularity.PerGroup(32)
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        write_hf(tiny_float),
        dtype=torch.float32,
        quantization_config=transformers.TorchAoConfig(config),
    )
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    ours = from_hf(saved, tokenizer=tiny_float.tokenizer)
    assert ours.quant.form == "ptq"
    assert any("float32 scales are rounded" in note for note in ours.notes)
    for layer in range(4):
        for part, module in (("wv", "v_proj"), ("wo", "o_proj")):
            tensor = getattr(model.model.layers[layer].self_attn, module).weight
            name = f"layers.{layer}.attention.{part}"
            codes, scales = (ours.weights.read(f"{name}.{p}") for p in ("weight", "scales"))
            np.testing.assert_array_equal(codes, tensor.qdata.numpy())
            values = codes.astype(np.float32) * np.repeat(scales, 32, 1)
            np.testing.assert_array_equal(values, tensor.dequantize().numpy())
