"""The reference of every kernel family, from the actual inputs of a step and the checkpoint.

Weights come from the checkpoint and never from the packed file, so that packing is checked with
the kernel that reads it. Sizes and constants (epsilon, LoRA factor, RoPE) come from the checkpoint
too; of a kernel's own shape only what it fuses is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler import reference
from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.config import rope_table
from llamac.compiler.floats import round_to, to_bfloat16, to_float16, widen
from llamac.compiler.reference import Float64, Quantized
from llamac.compiler.verify_compare import (
    SUM_ROUNDING,
    TOLERANCE,
    Comparison,
    compare_close,
    compare_codes,
    compare_equal,
    compare_float16,
)
from llamac.compiler.verify_graphs import GraphReference
from llamac.runtime.errors import NumericsError
from llamac.targets.cpu.packing import codes_arrangement, restore_codes
from llamac.targets.program import ProgramKernel

Array = NDArray[Any]

OFFSET_FACTOR = -8  # int4 codes are stored as code + 8
# Tensors that are the codes of a family's int4 product: with offsets or without.
INT4_CODES = {"qmatmul": 3, "qmatmul_hvx": 3, "qmatmul_quads": 2}
_ROW_BLOCK = 4096
# Scores up to this magnitude are computed to TOLERANCE; the error of larger ones grows with them.
_PLAIN_SCORE = 8.0


@dataclass(frozen=True)
class StepRun:
    """What one step read and wrote.

    Attributes:
        kernel: that ran.
        inputs: arena tensors that it read, as they were before it ran.
        producers: family of the kernel that wrote each input, "" for the function's own inputs.
        sources: layers of the checkpoint whose weights it read, of each weight operand.
        cache_before: rows of the KV cache around the chunk, by part, before the step.
        cache: the same rows after it; [P, Hkv, D], of "k_params" and "v_params" [P, Hkv, 2]. Of a
            graph, which has caches of several layers, they go by their whole names.
        outputs: arena tensors that it wrote.
    """

    kernel: ProgramKernel
    inputs: tuple[Array, ...]
    producers: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    cache_before: Mapping[str, Array]
    cache: Mapping[str, Array]
    outputs: tuple[Array, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers of the checkpoint whose weights it read, () if none."""
        return self.sources[0] if self.sources else ()


class StepReference:
    """Compares steps with the reference arithmetic.

    Args:
        checkpoint: the model.
        scale_dtype: what the bundle stores int4 group scales as.
        level: whose kernels run; it decides how activation codes lie in memory.
        graphs: compares graphs, and the kernels around them.
    """

    def __init__(
        self, checkpoint: Checkpoint, scale_dtype: str, level: str, graphs: GraphReference
    ) -> None:
        self._arrangement = codes_arrangement(level)
        self._config, self._quant = checkpoint.config, checkpoint.quant
        self._weights, self._scale_dtype = checkpoint.weights, scale_dtype
        self._names = frozenset(checkpoint.weights.names())
        self._families: dict[str, Callable[[StepRun], list[Comparison]]] = {
            "embedding": self._embedding,
            "norm": self._norm,
            "quantize": self._quantize,
            "hadamard": self._hadamard,
            **dict.fromkeys(INT4_CODES, self._qmatmul),
            "qmatmul_int8": self._qmatmul_int8,
            "qmatmul_int8_hvx": self._qmatmul_int8,
            "matmul": self._matmul,
            "lora": self._lora,
            "rope": self._rope,
            "attention": self._attention,
            "select": self._select,
            "sampling": self._sampling,
        }
        self._families |= {
            "append": graphs.append,
            "convert": graphs.convert,
            "graph": graphs.graph,
            "positions": graphs.positions,
        }

    def compare(self, run: StepRun) -> list[Comparison]:
        """Compare everything that a step wrote.

        Raises:
            NumericsError: a kernel of an unknown family.
        """
        family = self._families.get(run.kernel.family)
        if family is None:
            raise NumericsError(
                f"{run.kernel.name} cannot be verified: its family {run.kernel.family!r} is new",
                cause="every kernel family needs its reference in compiler/verify_families.py",
                fix="add one there, or compile with --no-verify",
            )
        with np.errstate(all="ignore"):  # a broken kernel may write anything
            return family(run)

    def misplaced(self, run: StepRun) -> str:
        """Say what is wrong with the place of an operation among the others; "" if nothing is."""
        if len(set(run.sources)) > 1:
            return f"its operands belong to different layers: {sorted(set(run.sources))}"
        if run.kernel.family not in INT4_CODES:
            return ""
        needs_r4 = self._quant.hadamard_r4 and run.layers[0].endswith(".feed_forward.w2")
        if needs_r4 != (run.producers[0] == "hadamard"):
            verb = "lacks" if needs_r4 else "must not have"
            return f"its input {verb} the Hadamard transform R4"
        if (self._quant.lora is not None) != ("lora" in run.producers):
            return f"it {'lacks' if self._quant.lora else 'must not have'} a LoRA branch"
        return ""

    # -- activations -----------------------------------------------------------------------------

    def _embedding(self, run: StepRun) -> list[Comparison]:
        [tokens], [x] = run.inputs, run.outputs
        [name] = run.layers
        table = self._weights.read(f"{name}.weight")
        if f"{name}.scales" in self._names:
            rows = reference.embedding(tokens, table, self._weights.read(f"{name}.scales"))
        else:
            rows = widen(_as_bfloat16(table[tokens]))
        return [compare_equal("x", x, rows.astype(np.float32))]

    def _norm(self, run: StepRun) -> list[Comparison]:
        [name] = run.layers
        gamma = widen(self._weights.read(f"{name}.weight"))
        expected = reference.rms_norm(run.inputs[0], gamma, self._config.norm_eps)
        if len(run.outputs) == 1:
            return [compare_close("y", run.outputs[0], expected)]
        y = run.outputs[-1]
        if y.dtype != np.float32 or len(run.outputs) == 2:
            return self._codes(run.outputs, expected, exact=False)
        return [compare_close("y", y, expected), *self._codes(run.outputs, y, exact=True)]

    def _quantize(self, run: StepRun) -> list[Comparison]:
        return self._codes(run.outputs, run.inputs[0], exact=True)

    def _hadamard(self, run: StepRun) -> list[Comparison]:
        y = run.outputs[-1]
        transformed = compare_close("y", y, reference.hadamard(run.inputs[0]))
        return [transformed, *self._codes(run.outputs, y, exact=True)]

    def _codes(self, outputs: tuple[Array, ...], values: Array, *, exact: bool) -> list[Comparison]:
        """Compare codes, scale, zero point, and offsets if there are any."""
        qparams = outputs[1]
        codes = restore_codes(outputs[0], len(qparams), self._arrangement)
        parts = compare_codes(codes, qparams, values, self._quant.activation_rule, exact=exact)
        if len(outputs) > 2 and outputs[2].dtype == np.int32:
            sums = reference.group_sums(codes, codes.shape[-1] // outputs[2].shape[-1])
            parts.append(compare_equal("offsets", outputs[2], OFFSET_FACTOR * sums))
        return parts

    def _codes_of(self, run: StepRun) -> Quantized:
        """The codes that a matrix kernel read."""
        codes, qparams = run.inputs[:2]
        rows = restore_codes(codes, len(qparams), self._arrangement)
        return Quantized(rows, qparams[:, 0], qparams[:, 1].astype(np.int32))

    def _select(self, run: StepRun) -> list[Comparison]:
        x, meta = run.inputs
        return [compare_equal("row", run.outputs[0], x[meta[1]][None])]

    def _sampling(self, run: StepRun) -> list[Comparison]:
        return [compare_equal("token", run.outputs[0], reference.argmax(run.inputs[0]))]

    # -- matrix products -------------------------------------------------------------------------

    def _qmatmul(self, run: StepRun) -> list[Comparison]:
        codes, has_lora = self._codes_of(run), "lora" in run.producers
        num_codes = INT4_CODES[run.kernel.family]
        parts = []
        for i, name in enumerate(run.layers):
            scales = round_to(self._weights.read(f"{name}.scales"), self._scale_dtype)
            part = reference.qlinear_int4(codes, self._weights.read(f"{name}.weight"), scales)
            if has_lora and self._quant.lora is not None:
                rank, factor = self._quant.lora.rank, self._quant.lora.scale
                t = run.inputs[num_codes][:, i * rank : (i + 1) * rank]
                b = _as_bfloat16(self._weights.read(f"{name}.adaptor.B.weight"))
                part += factor * reference.linear(t, b)
            parts.append(part)
        return [_with_epilogue(run, parts, num_inputs=num_codes + has_lora)]

    def _qmatmul_int8(self, run: StepRun) -> list[Comparison]:
        [name] = run.layers
        weight, scales = (self._weights.read(f"{name}.{part}") for part in ("weight", "scales"))
        logits = reference.qlinear_int8(self._codes_of(run), weight, scales)
        return [compare_close("logits", run.outputs[0], logits)]

    def _matmul(self, run: StepRun) -> list[Comparison]:
        weights = (self._weights.read(f"{n}.weight") for n in run.layers)
        parts = [_linear(run.inputs[0], weight) for weight in weights]
        return [_with_epilogue(run, parts, num_inputs=1)]

    def _lora(self, run: StepRun) -> list[Comparison]:
        weights = (self._weights.read(f"{name}.adaptor.A.weight") for name in run.layers)
        parts = [_linear(run.inputs[0], weight) for weight in weights]
        return [compare_close("t", run.outputs[0], np.concatenate(parts, axis=1))]

    # -- attention -------------------------------------------------------------------------------

    def _rope(self, run: StepRun) -> list[Comparison]:
        qkv, meta = run.inputs
        position, count = int(meta[0]), len(qkv)
        table = rope_table(self._config, position + count)[position:]
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        split = qkv.reshape(count, -1, self._config.head_dim)
        q, k, v = np.split(split, [heads, heads + kv_heads], axis=1)
        new = slice(position, position + count)
        stored = {part: rows[new] for part, rows in run.cache.items()}
        return [
            compare_close("q", run.outputs[0].reshape(q.shape), reference.rope(q, table)),
            *_compare_stored("k", stored, reference.rope(k, table), exact=False),
            *_compare_stored("v", stored, v, exact=True),
            *_compare_kept(run, new),
        ]

    def _attention(self, run: StepRun) -> list[Comparison]:
        q, meta = run.inputs
        queries = q.reshape(len(q), -1, self._config.head_dim)
        keys, values = (_dequantized(run.cache, side) for side in "kv")
        position = int(meta[0])
        expected = reference.attention(queries, keys, values, position)
        end = position + len(q)
        largest = np.linalg.norm(queries, axis=-1).max() * np.linalg.norm(keys[:end], axis=-1).max()
        score = float(largest) / np.sqrt(self._config.head_dim)
        limit = TOLERANCE * max(1.0, score / _PLAIN_SCORE)
        return [
            compare_close("out", run.outputs[0].reshape(expected.shape), expected, limit=limit),
            *_compare_kept(run, slice(0, 0)),
        ]


def _as_bfloat16(weight: Array) -> Array:
    """Bits of bfloat16, as the bundle stores float weights."""
    return weight if weight.dtype == np.uint16 else to_bfloat16(weight)


def _linear(x: Array, weight: Array) -> Float64:
    """`reference.linear` of the weight as the bundle stores it, in blocks of rows."""
    starts = range(0, len(weight), _ROW_BLOCK)
    blocks = (_as_bfloat16(weight[start : start + _ROW_BLOCK]) for start in starts)
    return np.concatenate([reference.linear(x, block) for block in blocks], axis=1)


def _with_epilogue(run: StepRun, parts: list[Float64], num_inputs: int) -> Comparison:
    """Compare the result of a matrix kernel, after what it fuses; `parts` are its projections."""
    [result], epilogue = run.outputs, run.kernel.shape["epilogue"]
    if epilogue == "swiglu":
        return compare_close("result", result, reference.swiglu(*parts))
    product = np.concatenate(parts, axis=1)
    if epilogue == "none":
        return compare_close("result", result, product)
    # Relative to the product alone: beside a large residual its errors would not show.
    expected = product + run.inputs[num_inputs]
    scale = np.abs(product).max(-1, keepdims=True)
    slack = SUM_ROUNDING * np.abs(expected)
    return compare_close("result", result, expected, scale=scale, slack=slack)


def _dequantized(cache: Mapping[str, Array], side: str) -> Float64:
    """Keys ("k") or values ("v") of the cache, [P, Hkv, D]."""
    rows, params = cache[f"{side}_cache"], cache.get(f"{side}_params")
    if params is None:
        return rows.astype(np.float64)
    return reference.dequantize_kv(Quantized(rows, params[..., 0], params[..., 1].astype(np.int32)))


def _compare_stored(
    side: str, stored: Mapping[str, Array], values: Array, *, exact: bool
) -> list[Comparison]:
    """Compare new keys or values in the cache with what they were made from, [T, Hkv, D]."""
    rows, params = stored[f"{side}_cache"], stored.get(f"{side}_params")
    if params is not None:
        parts = compare_codes(rows, params, values, "torchao", exact=exact)
    elif exact:
        parts = [compare_equal("rows", rows, to_float16(values))]
    else:
        parts = [compare_float16("rows", rows, values)]
    return [c.renamed(f"{side} cache, {c.what}") for c in parts]


def _compare_kept(run: StepRun, written: slice) -> list[Comparison]:
    """Compare the rows of the cache that the step must not touch."""
    results = []
    for part, before in run.cache_before.items():
        kept = np.delete(before, written, axis=0)
        if kept.size:
            now = np.delete(run.cache[part], written, axis=0)
            results.append(compare_equal(f"{part}, other rows", now, kept))
    return results
