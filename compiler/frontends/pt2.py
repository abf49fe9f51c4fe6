"""Read `.pt2` files, as `torch.export.save` writes them, from anybody.

    <name>/archive_format               "pt2"
    <name>/models/<model>.json          the graph
    <name>/data/weights/<model>_weights_config.json
                                        tensors by name: file, shape, strides, dtype
    <name>/data/weights/weight_0        elements, stored as they are in memory
    <name>/data/constants/...           the same for constants

PyTorch's own reader unpickles what the file asks it to, looks functions up by any name in the file,
and evaluates expressions in it. This one reads JSON and elements, and nothing else: samples of
inputs, which are pickled, are left alone. Weights stay in the mapped file.

Source: torch/_export/serde/schema.py and torch/export/pt2_archive, schema version 8.
"""

from __future__ import annotations

import json
import math
import mmap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamac.compiler.frontends.graph import Graph, Input, Node, Ref
from llamac.compiler.frontends.torch_graph import ADVICE, kind_of, make_graph
from llamac.compiler.frontends.torch_ops import shape_only
from llamac.runtime.errors import CheckpointUnreadable, CheckpointUnsafe, ModelUnsupported

SCHEMA = 8
_LARGEST_JSON_BYTES = 400_000_000
_LARGEST_RANK = 16
# Numbers of torch/_export/serde/schema.py, class ScalarType.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: None,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
_KEYWORD = 2
# Kinds of arguments: as they are, lists of values or numbers, one of these, and what is always the
# same here.
_PLAIN = frozenset(("as_int", "as_bool", "as_string", "as_ints", "as_floats", "as_bools"))
_LISTS = frozenset(("as_tensors", "as_optional_tensors", "as_sym_ints", "as_sym_floats"))
_ELEMENTS = frozenset(("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"))
_FIXED = {
    "as_none": None,
    "as_device": torch.device("cpu"),
    "as_memory_format": torch.contiguous_format,
    "as_layout": torch.strided,
}


def open_pt2(path: Path) -> Graph:
    """Read the graph of an archive; its weights stay in the file.

    Raises:
        CheckpointUnreadable: it is damaged.
        CheckpointUnsafe: it has weights that only pickle reads.
        ModelUnsupported: another version of the form, several models, unknown operations.
    """
    archive = _Archive(path)
    try:
        return archive.graph()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise archive.damaged(f"its JSON is not as expected ({error!r:.120})") from error


@dataclass(frozen=True)
class _Member:
    """Where the bytes of a file in the archive lie."""

    start: int
    size: int


class _Archive:
    """A mapped archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._members = {i.filename: self._place(i) for i in archive.infolist()}
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise self.damaged(f"{error!s:.120}") from error
        roots = {name.partition("/")[0] for name in self._members}
        if len(roots) != 1:
            raise self.damaged(f"it holds {len(roots)} folders")
        [self._root] = roots

    def damaged(self, what: str) -> CheckpointUnreadable:
        """The error for an archive that cannot be read."""
        return CheckpointUnreadable(
            f"{self.path} is not readable: {what}.",
            cause="The file is truncated or damaged, or no archive of torch.export.",
            fix="Save it again with torch.export.save, or fetch it again.",
        )

    def _place(self, info: zipfile.ZipInfo) -> _Member:
        """Find the bytes of a member, which must be stored as they are."""
        header = self._data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"no header of {info.filename!r:.80}")
        lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + sum(lengths)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename!r:.80} is compressed")
        if start + info.file_size > len(self._data):
            raise ValueError(f"{info.filename!r:.80} ends behind the file")
        return _Member(start, info.file_size)

    def _json(self, name: str) -> Any:
        member = self._members.get(f"{self._root}/{name}")
        if member is None or member.size > _LARGEST_JSON_BYTES:
            raise self.damaged(f"it has no {name} of a sensible size")
        return json.loads(self._data[member.start : member.start + member.size])

    def graph(self) -> Graph:
        """The only model's graph."""
        prefix = f"{self._root}/models/"
        models = [n for n in self._members if n.startswith(prefix) and n.endswith(".json")]
        if len(models) != 1:
            raise self._unsupported(f"it holds {len(models)} models, expected one")
        name = models[0].removeprefix(prefix).removesuffix(".json")
        document = self._json(f"models/{name}.json")
        version = document["schema_version"]["major"]
        if version != SCHEMA:
            raise self._unsupported(f"its form has version {version}, expected {SCHEMA}")
        tensors = self._tensors(f"data/weights/{name}_weights_config.json", "data/weights")
        tensors |= self._tensors(f"data/constants/{name}_constants_config.json", "data/constants")
        return _Reader(self.path.name, document["graph_module"], tensors).graph()

    def _unsupported(self, what: str) -> ModelUnsupported:
        return ModelUnsupported(
            f"{self.path}: {what}.",
            cause="It was written by another version of PyTorch, or for another purpose.",
            fix="Export the model alone, and save it with torch.export.save of PyTorch 2.13.",
        )

    def _tensors(self, config: str, folder: str) -> dict[str, torch.Tensor]:
        """The tensors of a configuration by the model's names."""
        return {
            name: self._tensor(name, f"{self._root}/{folder}/{entry['path_name']}", entry)
            for name, entry in self._json(config)["config"].items()
        }

    def _tensor(self, name: str, file: str, entry: Mapping[str, Any]) -> torch.Tensor:
        """A view of the file, after comparing sizes."""
        if entry["use_pickle"] or entry["tensor_meta"] is None:
            raise CheckpointUnsafe(
                f"{self.path}: {name!r:.100} is pickled, and unpickling can run any program.",
                cause="It is a tensor subclass or no tensor, which PyTorch can save no other way.",
                fix="Call torchao's unwrap_tensor_subclass on the model before it is exported.",
            )
        meta, member = entry["tensor_meta"], self._members.get(file)
        dtype = _DTYPES.get(meta["dtype"])
        sizes, strides = (tuple(int(n["as_int"]) for n in meta[k]) for k in ("sizes", "strides"))
        offset = int(meta["storage_offset"]["as_int"])
        if member is None or dtype is None or len(sizes) != len(strides) > _LARGEST_RANK:
            raise self.damaged(f"{name!r:.100} has no file, or an unknown type")
        if min((*sizes, *strides, offset), default=0) < 0:
            raise self.damaged(f"{name!r:.100} has negative sizes")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if math.prod(sizes) and (last + 1) * dtype.itemsize > member.size:
            raise self.damaged(f"{name!r:.100} is larger than its file")
        if not member.size or not math.prod(sizes):
            return torch.empty(sizes, dtype=dtype)
        count = member.size // dtype.itemsize
        whole = torch.frombuffer(self._data, dtype=dtype, count=count, offset=member.start)
        return torch.as_strided(whole, sizes, strides, offset)


class _Reader:
    """From JSON to a graph."""

    def __init__(self, source: str, module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self._source, self._tensors = source, tensors
        self._graph, self._signature = module["graph"], module["signature"]

    def graph(self) -> Graph:
        """All of it."""
        shapes = {
            name: tuple(_size(n) for n in meta["sizes"])
            for name, meta in self._graph["tensor_values"].items()
        }
        weights, inputs = dict[str, torch.Tensor](), dict[str, Input]()
        for spec in self._signature["input_specs"]:
            [(kind, entry)] = spec.items()
            name = _name(entry["arg"])
            if kind == "user_input":
                if name in shapes:
                    meta = self._graph["tensor_values"][name]
                    dtype = _DTYPES.get(meta["dtype"]) or torch.complex64
                    inputs[name] = Input(shapes[name], kind_of(dtype))
                continue
            key = next((k for k in entry if k.endswith("_name")), None)
            if key is None:
                raise self._refuse(f"its input {name!r} is of the kind {kind}")
            weights[name] = self._tensors[entry[key]]
        outputs = [
            _name(spec["user_output"]["arg"])
            for spec in self._signature["output_specs"]
            if "user_output" in spec
        ]
        nodes = [node for entry in self._graph["nodes"] for node in self._nodes(entry)]
        return make_graph(self._source, nodes, inputs, shapes, weights, outputs)

    def _nodes(self, entry: Mapping[str, Any]) -> list[Node]:
        """A node, and those that divide a list that it returns."""
        args, kwargs = [], {}
        for given in entry["inputs"]:
            value = self._argument(given["arg"])
            if given.get("kind") == _KEYWORD:
                kwargs[given["name"]] = value
            else:
                args.append(value)
        outputs = [_output_names(output) for output in entry["outputs"]]
        op = _operation(entry["target"])
        if any(isinstance(names, list) for names in outputs):
            [parts] = outputs
            whole = f"{parts[0]}.list"
            picked = [
                Node("operator.getitem", (Ref(whole), i), {}, (part,))
                for i, part in enumerate(parts)
            ]
            return [Node(op, tuple(args), kwargs, (whole,), shape_only(op, args)), *picked]
        names = tuple(name for name in outputs if isinstance(name, str))
        return [Node(op, tuple(args), kwargs, names, shape_only(op, args))]

    def _argument(self, arg: Mapping[str, Any]) -> Any:
        """The value of an argument, with `Ref`s for values of the graph."""
        [(kind, value)] = arg.items()
        if kind == "as_float":
            return float(value)  # "Infinity" is a text
        if kind in _PLAIN:
            return value
        if kind in _LISTS:
            return [self._element(part) for part in value]
        if kind in _ELEMENTS:
            return self._element(value)
        if kind == "as_scalar_type":
            return _DTYPES[value]
        if kind in _FIXED:
            return _FIXED[kind]
        raise self._refuse(f"an operation has an argument of the kind {kind}")

    def _element(self, part: Mapping[str, Any]) -> Any:
        """A tensor or number in a list, or a number alone."""
        if "as_name" in part:
            return Ref(part["as_name"])
        if "as_tensor" in part:
            return Ref(part["as_tensor"]["name"])
        if "as_none" in part:
            return None
        if "name" in part:
            return Ref(part["name"])
        [value] = part.values()
        return value

    def _refuse(self, what: str) -> ModelUnsupported:
        return ModelUnsupported(
            f"{self._source}: {what}.",
            cause="llamac reads graphs of operators over tensors and numbers.",
            fix=ADVICE,
        )


def _size(size: Mapping[str, Any]) -> int | None:
    """A size; None if it is an expression."""
    return int(size["as_int"]) if "as_int" in size else None


def _name(arg: Mapping[str, Any]) -> str:
    """The name of a value, wrapped or not."""
    if "name" in arg:
        return str(arg["name"])
    [value] = arg.values()
    return _name(value) if isinstance(value, dict) else str(value)


def _output_names(output: Mapping[str, Any]) -> str | list[str]:
    """Names of what a node returns: one, or those of a list."""
    [(kind, value)] = output.items()
    if kind == "as_tensors":
        return [str(part["name"]) for part in value]
    return str(value.get("name") or value["as_name"])


def _operation(target: str) -> str:
    """Names as `torch_ops.py` has them: aten.add.Tensor for torch.ops.aten.add.Tensor."""
    return target.removeprefix("torch.ops.").removeprefix("_")
