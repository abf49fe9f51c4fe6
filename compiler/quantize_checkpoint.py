"""Quantize a float checkpoint of any size into one in Meta's layout, layer by layer.

    rtn       every int4 code is the nearest one
    gptq      codes that make the error of a layer's outputs small (`gptq.py`); needs a text
    rotate    first R1, R2 and R4 (`walsh_rotation.py`), with fixed signs and not trained

The text goes through the model one layer at a time: through the float layer, which shows the inputs
of its linears, and then through the same layer quantized, whose outputs the next layer gets to see.
So every layer can also make good a part of what the layers before it did.

One layer's weights and sums X^T X are in memory; all that is finished lies in files, from which
torch writes the result. Equal inputs give equal bytes: products run on one thread, and random signs
have a fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.blas import single_threaded_blas
from llamac.compiler.calibration import WINDOW
from llamac.compiler.checkpoint import Checkpoint, TensorInfo, WeightSource, check_finite
from llamac.compiler.config import LlamaConfig, QuantConfig, rope_table
from llamac.compiler.floats import from_bfloat16, to_bfloat16
from llamac.compiler.gptq import HessianSum, compensate_int4
from llamac.compiler.layers import LayerWeights
from llamac.compiler.meta_writer import layout, write_checkpoint
from llamac.compiler.precision import TABLES
from llamac.compiler.progress import Stage
from llamac.compiler.quantize import GROUP_SIZE, check_groups, norm_names, quantize_int4
from llamac.compiler.quantize import quantize_int8 as quantize_table
from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import KvCache, ReferenceModel
from llamac.compiler.walsh_rotation import RotatedWeights, rotate_checkpoint
from llamac.runtime.errors import ModelUnsupported

METHODS = ("rtn", "gptq")
SEED = 0

# Rows of a table that are turned and quantized at once: 16 MiB of the 1B model's in float64.
_ROWS = 1024


@dataclass(frozen=True)
class Method:
    """How a model is quantized.

    Attributes:
        name: "rtn" or "gptq".
        rotate: by R1, R2 and R4 first.
        floats: layers that stay bfloat16, see `precision.py`.
    """

    name: str = "rtn"
    rotate: bool = False
    floats: frozenset[str] = frozenset()

    @property
    def quant(self) -> QuantConfig:
        """What the result must compute."""
        form = "spinquant" if self.rotate else "ptq"
        return QuantConfig(form, GROUP_SIZE, hadamard_r4=self.rotate)


def check_source(checkpoint: Checkpoint) -> None:
    """Refuse what cannot be quantized, or cannot be written in Meta's layout.

    Raises:
        ModelUnsupported: quantized already, or of sizes that params.json or int4 cannot have.
    """
    config, scaling = checkpoint.config, checkpoint.config.rope_scaling
    codes = [name for name in checkpoint.weights.names() if name.endswith(".scales")]
    if codes or checkpoint.quant.form != "float":
        what = codes[0].removesuffix(".scales") if codes else checkpoint.quant.form
        raise ModelUnsupported(
            f"{checkpoint.name} is quantized already ({what})",
            cause="rounding codes once more would lose more than rounding the float model",
            fix="start from the bfloat16 original of this model",
        )
    check_groups(config)
    if config.num_heads * config.head_dim != config.dim or (
        scaling is not None and scaling != type(scaling)(scaling.factor)
    ):
        raise ModelUnsupported(
            f"{checkpoint.name} has a head size of {config.head_dim} and RoPE scaling {scaling}",
            cause="params.json cannot say this: heads share dim equally there, and low and high "
            "frequency factors and the original context are those of Llama 3",
            fix="quantize it with another tool, into GGUF",
        )


def num_weights(config: LlamaConfig) -> int:
    """Weights that `quantize_checkpoint` counts: both tables and the blocks' linears."""
    return 2 * config.vocab_size * config.dim + config.num_linear_weights()


@single_threaded_blas()
def quantize_checkpoint(
    checkpoint: Checkpoint,
    method: Method,
    windows: Sequence[Sequence[int]],
    folder: Path,
    scratch: Path,
    stage: Stage,
) -> None:
    """Write a quantized checkpoint.

    Args:
        checkpoint: float weights.
        method: how.
        windows: tokens of the calibration text for "gptq", at most `WINDOW` each.
        folder: for the result.
        scratch: folder for files as large as the result; the caller removes it.
        stage: counts weights.

    Raises:
        ModelUnsupported: see `check_source`; a width that R4 has no matrix for.
        ValuesInvalid: weights or their products are not finite.
    """
    check_source(checkpoint)
    source = checkpoint
    if method.rotate:
        source = rotate_checkpoint(checkpoint, seed=SEED, dtype="float64", r4=True)
    scratch.mkdir(parents=True, exist_ok=True)
    writer = _Writer(source, method, scratch, stage)
    writer.write_norms()
    # A tied model stays tied: one table under two names.
    is_shared = checkpoint.shared_embedding and not method.rotate
    is_shared = is_shared and len({name in method.floats for name in TABLES}) == 1
    for name in TABLES[: 1 if is_shared else 2]:
        writer.write_table(name)
    if is_shared:
        stage.advance(checkpoint.config.vocab_size * checkpoint.config.dim)
    calibration = _Calibration(source, method, windows, scratch)
    for layer in range(checkpoint.config.num_layers):
        weights = BlockWeights(source.weights, f"layers.{layer}.")
        sums = calibration.sums(layer, weights)
        writer.write_layer(layer, weights, sums)
        del weights, sums  # before the same layer is read once more
        calibration.advance(layer)
    tensors = _finished(checkpoint, method, scratch, is_shared)
    write_checkpoint(
        folder, checkpoint.config, method.quant, tensors, checkpoint.tokenizer, method.floats
    )


def windows_of(tokens: Sequence[int], bos: int | None) -> list[list[int]]:
    """Cut a text into windows that each begin with the token of a beginning, if there is one."""
    head = [] if bos is None else [bos]
    size = WINDOW - len(head)
    return [[*head, *tokens[i : i + size]] for i in range(0, len(tokens), size)]


class BlockWeights:
    """The weights of one block, read and turned once; a `WeightSource`.

    Rotated weights are kept as float32, others as they are stored.
    """

    def __init__(self, source: WeightSource, prefix: str) -> None:
        self._source, self._prefix = source, prefix
        self._kept: dict[str, NDArray[Any]] = {}

    def names(self) -> Sequence[str]:
        """All tensors of the model."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype in the source."""
        return self._source.info(name)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor."""
        if not name.startswith(self._prefix):
            return self._source.read(name)
        if name not in self._kept:
            values = self._source.read(name)
            is_wide = values.dtype == np.float64
            self._kept[name] = values.astype(np.float32) if is_wide else values
        return self._kept[name]


class _Calibration:
    """The text inside the model, layer by layer; does nothing for methods without one."""

    def __init__(
        self, source: Checkpoint, method: Method, windows: Sequence[Sequence[int]], scratch: Path
    ) -> None:
        self._source, self._method, self._scratch = source, method, scratch
        self._table = rope_table(source.config, WINDOW)
        model = self._quantized()
        self._streams = [model.embedding(w) for w in windows] if method.name == "gptq" else []

    def sums(self, layer: int, weights: WeightSource) -> dict[str, HessianSum]:
        """X^T X by the names of the layer's int4 linears; those of one input share one."""
        if not self._streams:
            return {}
        inputs = _inputs(f"layers.{layer}", self._method.rotate)
        inputs = {name: x for name, x in inputs.items() if name not in self._method.floats}
        found: dict[str, HessianSum] = {}

        def observe(label: str, value: Float64) -> None:
            if label in inputs.values():
                found.setdefault(label, HessianSum(value.shape[1])).add(value)

        self._run(layer, _model(replace(self._source, weights=weights), observe))
        return {name: found[label] for name, label in inputs.items()}

    def advance(self, layer: int) -> None:
        """Let the text through the layer as it was written."""
        if self._streams:
            self._streams = self._run(layer, self._quantized())

    def _quantized(self) -> ReferenceModel:
        weights = LayerWeights(self._source.weights, self._scratch)
        return _model(replace(self._source, weights=weights, quant=self._method.quant))

    def _run(self, layer: int, model: ReferenceModel) -> list[Float64]:
        return [
            model.layer(f"layers.{layer}", x, self._table[: len(x)], KvCache("float32"), 0)
            for x in self._streams
        ]


def _model(checkpoint: Checkpoint, observe: Any = None) -> ReferenceModel:
    return ReferenceModel(
        checkpoint, kv_dtype="float32", quantize_activations=observe is None, observe=observe
    )


def _inputs(prefix: str, rotate: bool) -> dict[str, str]:
    """Labels of what linears read, as `ReferenceModel` names them."""
    inner = f"{prefix}.feed_forward.w3.swiglu" + (".hadamard" if rotate else "")
    return {
        **dict.fromkeys(
            (f"{prefix}.attention.{w}" for w in ("wq", "wk", "wv")), f"{prefix}.attention_norm"
        ),
        f"{prefix}.attention.wo": f"{prefix}.attention.wv.attention",
        f"{prefix}.feed_forward.w1": f"{prefix}.ffn_norm",
        f"{prefix}.feed_forward.w3": f"{prefix}.ffn_norm",
        f"{prefix}.feed_forward.w2": inner,
    }


class _Writer:
    """Writes finished tensors as files `<name>.npy`; scales of tables are [V] there."""

    def __init__(self, source: Checkpoint, method: Method, scratch: Path, stage: Stage) -> None:
        self._source, self._method = source, method
        self._scratch, self._stage = scratch, stage

    def write_norms(self) -> None:
        """All norms, as bfloat16."""
        for name in norm_names(self._source.config):
            self._save(name, to_bfloat16(self._source.weights.read(name)))

    def write_table(self, name: str) -> None:
        """The embedding or the output layer, some rows at a time."""
        shape = self._source.config.vocab_size, self._source.config.dim
        is_float = name in self._method.floats
        weight = self._create(f"{name}.weight", "uint16" if is_float else "int8", shape)
        scales = None if is_float else self._create(f"{name}.scales", "float32", shape[:1])
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            values = _float32(self._table_rows(f"{name}.weight", rows))
            check_finite(f"{name}.weight", values)
            if scales is None:
                weight[rows] = to_bfloat16(values)
            else:
                weight[rows], found = quantize_table(values)
                scales[rows] = found[:, 0]
            self._stage.advance(values.size, name)

    def _table_rows(self, name: str, rows: slice) -> NDArray[Any]:
        weights = self._source.weights
        if isinstance(weights, RotatedWeights):
            return weights.read_rows(name, rows)
        return weights.read(name)[rows]

    def write_layer(
        self, layer: int, weights: WeightSource, sums: Mapping[str, HessianSum]
    ) -> None:
        """The linears of a block."""
        for part in self._source.config.linear_shapes():
            name = f"layers.{layer}.{part}"
            values = _float32(weights.read(f"{name}.weight"))
            check_finite(f"{name}.weight", values)
            if name in self._method.floats:
                self._save(f"{name}.weight", to_bfloat16(values))
            else:
                made = (
                    compensate_int4(values, sums[name].matrix())
                    if name in sums
                    else quantize_int4(values)
                )
                self._save(f"{name}.weight", made.codes)
                self._save(f"{name}.scales", made.scales)
            self._stage.advance(values.size, name)

    def _save(self, name: str, values: NDArray[Any]) -> None:
        np.save(self._scratch / f"{name}.npy", values)

    def _create(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self._scratch / f"{name}.npy"
        made: NDArray[Any] = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
        return made


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    return from_bfloat16(values) if values.dtype == np.uint16 else values.astype(np.float32)


def _finished(
    checkpoint: Checkpoint, method: Method, scratch: Path, is_shared: bool
) -> dict[str, NDArray[Any]]:
    """All tensors, mapped from their files, in the shapes of Meta's layout."""
    found: dict[str, NDArray[Any]] = {}
    for name, info in layout(checkpoint.config, method.quant, method.floats).items():
        if is_shared and name.startswith("output."):
            found[name] = found[name.replace("output", "tok_embeddings")]
        else:
            # Copy on write: torch takes no array that is read-only.
            found[name] = np.load(scratch / f"{name}.npy", mmap_mode="c").reshape(info.shape)
    return found
