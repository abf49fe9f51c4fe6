"""Quantized layers of a Hugging Face directory: which scheme wrote them, and how to open one.

A module with a tensor `weight` is not quantized, whatever the configuration says; this covers lists
of exceptions, which name modules by patterns of several kinds. Sizes of groups are told by the
tensors as well.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from llamac.compiler.frontends.hf_packed import (
    AwqWeights,
    CompressedWeights,
    GptqWeights,
    PackedWeights,
    TorchaoWeights,
)
from llamac.compiler.frontends.hf_tensors import FLOATS, RowOrder, TensorTable
from llamac.compiler.frontends.meta_params import Fields, shown
from llamac.compiler.frontends.safetensors_file import SafeTensor
from llamac.runtime.errors import ModelUnsupported, TensorInvalid

_HALVES = ("F16", "BF16", "F32")


def unsupported(fields: Fields, what: str) -> ModelUnsupported:
    """A scheme, or a variant of one, that cannot be read."""
    return ModelUnsupported(
        f"{fields.path}: {what}.",
        cause="llamac reads 4-bit weights of GPTQ, AWQ (gemm), compressed-tensors (pack-quantized) "
        "and torchao (IntxUnpackedToInt8Tensor).",
        fix="Use one of these forms, or the model in bfloat16.",
    )


class Scheme(ABC):
    """A way to store quantized layers.

    Args:
        fields: of `quantization_config`.

    Raises:
        ModelUnsupported: a variant that cannot be read.
    """

    name: ClassVar[str]

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def expect(self, field: str, *known: Any) -> None:
        """Refuse a field with another value."""
        value = self.fields.values.get(field)
        if value not in known:
            raise unsupported(
                self.fields, f"{self.fields.prefix}{field} is {shown(value)} ({self.name})"
            )

    @abstractmethod
    def open(
        self, table: TensorTable, module: str, shape: tuple[int, int], order: RowOrder
    ) -> PackedWeights:
        """One layer, [N, K].

        Raises:
            TensorInvalid: a tensor is missing or of another form.
        """

    def num_groups(self, table: TensorTable, name: str, axis: int, columns: int) -> int:
        """Groups of columns by the shape of the scales, which must be two-dimensional.

        Raises:
            TensorInvalid: the columns are not divided into as many groups.
        """
        tensor = table.files.tensors.get(name)
        shape = tensor.shape if tensor is not None else ()
        if len(shape) != 2 or not shape[axis] or columns % shape[axis]:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(shape)}"
            raise TensorInvalid(
                f"{table.files.path}: {name} is {found}, expected scales of groups of {columns} "
                "columns.",
                cause="The weights are incomplete or damaged, or config.json belongs to another "
                "model or names another scheme.",
                fix="Fetch config.json and all weights again, from the same place.",
            )
        return shape[axis]


class Gptq(Scheme):
    """AutoGPTQ and GPTQModel."""

    name = "GPTQ"

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.expect("bits", 4)
        self.expect("checkpoint_format", None, "gptq", "gptq_v2")
        self.expect("is_marlin_format", None, False)
        self._version = 2 if fields.values.get("checkpoint_format") == "gptq_v2" else 1

    def open(
        self, table: TensorTable, module: str, shape: tuple[int, int], order: RowOrder
    ) -> PackedWeights:
        """One layer; without `g_idx`, groups are in order."""
        rows, columns = shape
        groups = self.num_groups(table, f"{module}.scales", 0, columns)
        tensors = (
            table.take(f"{module}.qweight", ("I32",), (columns // 8, rows)),
            table.take(f"{module}.qzeros", ("I32",), (groups, rows // 8)),
            table.take(f"{module}.scales", _HALVES, (groups, rows)),
        )
        index = _optional(table, f"{module}.g_idx", ("I32",), (columns,))
        return GptqWeights(tensors, self._version, module, self.name, shape, groups, order, index)


class Awq(Scheme):
    """AutoAWQ."""

    name = "AWQ"

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        bits = "bits" if fields.has("bits") else "w_bit"
        self.expect(bits, 4)
        self.expect("version", None, "gemm", "GEMM")

    def open(
        self, table: TensorTable, module: str, shape: tuple[int, int], order: RowOrder
    ) -> PackedWeights:
        """One layer."""
        rows, columns = shape
        groups = self.num_groups(table, f"{module}.scales", 0, columns)
        tensors = (
            table.take(f"{module}.qweight", ("I32",), (columns, rows // 8)),
            table.take(f"{module}.qzeros", ("I32",), (groups, rows // 8)),
            table.take(f"{module}.scales", _HALVES, (groups, rows)),
        )
        return AwqWeights(tensors, module, self.name, shape, groups, order)


class CompressedTensors(Scheme):
    """compressed-tensors of llm-compressor, in the form pack-quantized."""

    name = "compressed-tensors"

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.expect("format", "pack-quantized")
        self.expect("kv_cache_scheme", None)
        # Rotations that the model would have to be computed with.
        self.expect("transform_config", None, {})
        groups = fields.section("config_groups")
        for name in groups.values:
            self._check_group(groups.section(name))

    def _check_group(self, group: Fields) -> None:
        """Int4 weights, and activations as they are or as int8 made on the spot."""
        weights = group.section("weights")
        for inner, field, known in (
            (weights, "num_bits", (4,)),
            (weights, "type", ("int", None)),
            (weights, "strategy", ("group", "channel")),
            (group, "output_activations", (None,)),
        ):
            if inner.values.get(field) not in known:
                value = shown(inner.values.get(field))
                raise unsupported(self.fields, f"{inner.prefix}{field} is {value} ({self.name})")
        if group.has("input_activations"):
            inputs = group.section("input_activations").values
            if (inputs.get("num_bits"), inputs.get("type"), inputs.get("dynamic")) != (
                8,
                "int",
                True,
            ):
                raise unsupported(
                    self.fields, f"{group.prefix}input_activations are no dynamic int8"
                )

    def open(
        self, table: TensorTable, module: str, shape: tuple[int, int], order: RowOrder
    ) -> PackedWeights:
        """One layer; zero points and groups of columns are there if they are needed."""
        rows, columns = shape
        groups = self.num_groups(table, f"{module}.weight_scale", 1, columns)
        tensors = (
            table.take(f"{module}.weight_packed", ("I32",), (rows, columns // 8)),
            table.take(f"{module}.weight_scale", _HALVES, (rows, groups)),
        )
        stored = table.take(f"{module}.weight_shape", ("I64", "I32"), (2,))
        if tuple(stored.data.tolist()) != shape:
            raise TensorInvalid(
                f"{table.files.path}: {module}.weight_shape is {stored.data.tolist()}, expected "
                f"{list(shape)}.",
                cause="The file is damaged, or config.json belongs to another model.",
                fix="Fetch config.json and all weights again, from the same place.",
            )
        zeros = _optional(table, f"{module}.weight_zero_point", ("I32",), (rows // 8, groups))
        index = _optional(table, f"{module}.weight_g_idx", ("I32",), (columns,))
        if index is not None and (index.data == -1).any():
            index = None  # it was never filled in: groups are in order
        return CompressedWeights(tensors, zeros, module, self.name, shape, groups, order, index)


class Torchao(Scheme):
    """torchao, as transformers writes it since safetensors hold its tensors."""

    name = "torchao"
    _KIND = "IntxUnpackedToInt8Tensor"
    _INPUTS = (None, "int8_asym_per_token")

    def open(
        self, table: TensorTable, module: str, shape: tuple[int, int], order: RowOrder
    ) -> PackedWeights:
        """One layer; what kind of tensor it is stands in the metadata of its file."""
        bits = self._bits(table, module)
        rows, columns = shape
        prefix = f"{module}._weight_"
        groups = self.num_groups(table, f"{prefix}scale", 1, columns)
        tensors = (
            table.take(f"{prefix}qdata", ("I8",), shape),
            table.take(f"{prefix}scale", _HALVES, (rows, groups)),
            table.take(f"{prefix}zero_point", ("I8", *FLOATS), (rows, groups)),
        )
        return TorchaoWeights(tensors, bits, module, self.name, shape, groups, order)

    def _bits(self, table: TensorTable, module: str) -> int:
        """Bits of the codes, by the metadata.

        Raises:
            ModelUnsupported: a tensor of another kind.
        """
        try:
            content = json.loads(table.files.metadata.get(f"{module}.weight", "{}"))
            kind, data = content.get("_type"), content.get("_data", {})
            bits = data.get("target_dtype", {}).get("_data")
            inputs = data.get("activation_quantization")
        except (ValueError, RecursionError, AttributeError):
            kind = bits = inputs = None
        if kind != self._KIND or bits not in ("int4", "int8") or inputs not in self._INPUTS:
            what = " of ".join(shown(part) for part in (kind, bits, inputs) if part)
            raise unsupported(self.fields, f"{module}.weight is {what or 'of no kind'} (torchao)")
        return int(bits.removeprefix("int"))


SCHEMES: dict[str, type[Scheme]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "torchao": Torchao,
}
"""By `quant_method`."""


def read_scheme(fields: Fields) -> Scheme | None:
    """How layers are quantized, by `config.json`; None for a model of floats.

    Raises:
        ModelUnsupported: a scheme, or a variant of one, that cannot be read.
        ParamsInvalid: `quantization_config` is no object, or lacks parts.
    """
    for name in ("quantization_config", "compression_config"):
        if fields.has(name):
            inner = fields.section(name)
            method = inner.values.get("quant_method")
            if not isinstance(method, str) or method not in SCHEMES:
                raise unsupported(fields, f"quant_method is {shown(method)}")
            return SCHEMES[method](inner)
    return None


def _optional(
    table: TensorTable, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> SafeTensor | None:
    """A tensor of this form, if it is there; one without elements is not."""
    if name not in table or not table.files.tensors[name].data.size:
        return None
    return table.take(name, dtypes, shape)
