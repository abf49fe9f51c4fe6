"""The manifest of a bundle: everything about it that is not weights or code.

`manifest.json` says which model was compiled, with which arithmetic, for which processor, how much
memory it takes, and the size and hash of every file beside it. The compiler writes these
dataclasses with `Manifest.to_json`, the runtime reads them with `read_manifest`; the fields are
described in docs/bundle-format.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from llamac.runtime.errors import BundleInvalid, BundleMissing
from llamac.runtime.graph_entry import GraphEntry, GraphTensorEntry, check_graphs, shorten_graph
from llamac.runtime.schema import (
    AtLeast,
    Count,
    Matches,
    Name,
    NotNegative,
    SchemaError,
    decode,
)

__all__ = [
    "ABI_VERSION",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "FileEntry",
    "FunctionEntry",
    "GraphEntry",
    "GraphTensorEntry",
    "LevelEntry",
    "LoraEntry",
    "Manifest",
    "MemoryPlan",
    "ModelEntry",
    "OperationCheck",
    "QuantizationEntry",
    "RopeScalingEntry",
    "SchemeEntry",
    "TargetEntry",
    "TokenizerEntry",
    "Verification",
    "parse_manifest",
    "read_manifest",
]

FORMAT = "llamac-bundle"
FORMAT_VERSION = 1
ABI_VERSION = 1
MANIFEST_NAME = "manifest.json"

_MAX_MANIFEST_BYTES = 16 << 20

Positive = Annotated[float, AtLeast(1e-30)]
Sha256 = Annotated[str, Matches("[0-9a-f]{64}")]
Flavour = Annotated[str, Matches("[a-z0-9]+")]


@dataclass(frozen=True)
class RopeScalingEntry:
    """Stretching of the RoPE frequencies by the llama3 rule; `original_context` in tokens."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_context: Count


@dataclass(frozen=True)
class ModelEntry:
    """The architecture: widths in elements, `context_length` in tokens."""

    name: Name
    family: Name
    dim: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    ffn_dim: Count
    vocab_size: Count
    norm_eps: Positive
    rope_theta: Positive
    rope_scaling: RopeScalingEntry | None
    context_length: Count


@dataclass(frozen=True)
class LoraEntry:
    """Low-rank branch beside every linear layer."""

    rank: Count
    scale: float


@dataclass(frozen=True)
class QuantizationEntry:
    """The arithmetic that the library uses, in words that a person can check."""

    form: Name
    weights: str
    scale_dtype: str
    activations: str
    activation_rule: str
    embedding: str
    output: str
    shared_embedding: bool
    hadamard_r4: bool
    lora: LoraEntry | None
    kv_cache: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerEntry:
    """How text becomes token ids. Ids come from here and never from code."""

    file: Name
    format: Name
    pattern: Name
    special_tokens: Mapping[str, NotNegative]
    bos_id: NotNegative | None
    stop_ids: tuple[NotNegative, ...]
    chat_template: Name | None


@dataclass(frozen=True)
class LevelEntry:
    """One set of kernels and the CPU features that it needs; best first in the manifest."""

    name: Name
    features: tuple[Name, ...]


@dataclass(frozen=True)
class TargetEntry:
    """What the library was compiled for; `arch` and `os` as `platform` names them."""

    soc: Name
    plugin: Name
    processors: tuple[Name, ...]
    arch: Name
    os: Name
    levels: tuple[LevelEntry, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model takes; the KV cache and the arena are per session."""

    weights_bytes: NotNegative
    kv_cache_bytes: NotNegative
    arena_bytes: NotNegative
    weight_bytes_per_token: NotNegative


@dataclass(frozen=True)
class FunctionEntry:
    """One compiled function: `num_tokens` tokens in one call, layers on `processor`."""

    name: Name
    num_tokens: Count
    processor: Name = "cpu"


@dataclass(frozen=True)
class SchemeEntry:
    """How an accelerator computes the layers.

    `weights` is their form ("checkpoint": as they were). `calibration_sha256` is that of the token
    ids that showed the ranges of values, as little-endian int32; `loss_db` the signal to noise that
    other weights left of each linear layer's outputs on them. The CPU computes `cpu_layers`.
    """

    name: Name
    summary: str
    weights: Name
    calibration_tokens: NotNegative = 0
    calibration_sha256: Sha256 | None = None
    loss_db: Mapping[str, float] = field(default_factory=dict)
    cpu_layers: tuple[NotNegative, ...] = ()


@dataclass(frozen=True)
class OperationCheck:
    """Signal to quantization noise of one operation against the reference, in dB."""

    name: str
    sqnr_db: float


@dataclass(frozen=True)
class Verification:
    """What was compared with the reference when the bundle was made, and where it ran.

    `where` is "this machine" or an emulator with its CPU model, and the level that ran, or why none
    could run.
    """

    status: Name
    probe_tokens: NotNegative = 0
    operations: tuple[OperationCheck, ...] = ()
    nll: Mapping[str, float] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle.

    `sample_sha256` is for files too large to hash at each load. `flavour` is the C library that a
    library was linked for ("glibc", "musl", "android"), where the bundle has one for each. `note`
    is what a user should know of the file.
    """

    role: Name
    bytes: NotNegative
    sha256: Sha256
    sample_sha256: Sha256 | None = None
    flavour: Flavour | None = None
    note: str = ""


@dataclass(frozen=True)
class Manifest:
    """All of `manifest.json`. File names are relative, with forward slashes."""

    build_id: Sha256
    created_with: Mapping[str, str]
    model: ModelEntry
    quantization: QuantizationEntry
    tokenizer: TokenizerEntry
    target: TargetEntry
    memory: MemoryPlan
    functions: tuple[FunctionEntry, ...]
    files: Mapping[str, FileEntry]
    verification: Verification
    graphs: tuple[GraphEntry, ...] = ()
    scheme: SchemeEntry | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    abi_version: int = ABI_VERSION

    def file(self, role: str) -> str:
        """Return the name of the one file of that role ("weights", "tokenizer")."""
        (name,) = (name for name, entry in self.files.items() if entry.role == role)
        return name

    def libraries(self) -> dict[str | None, str]:
        """Return the names of the libraries by flavour; None is the flavour of the only one."""
        libraries = (item for item in self.files.items() if item[1].role == "library")
        return {entry.flavour: name for name, entry in libraries}

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON values, the format's own fields first."""
        values = dataclasses.asdict(self)
        head = ("format", "format_version", "abi_version")
        result = {name: values.pop(name) for name in head} | values
        for entry in result["files"].values():
            for name in ("sample_sha256", "flavour", "note"):
                if not entry[name]:
                    del entry[name]
        for function in result["functions"]:
            if function["processor"] == "cpu":
                del function["processor"]
        for graph in result["graphs"]:
            shorten_graph(graph)
        for name in ("graphs", "scheme"):
            if not result[name]:
                del result[name]
        return result

    def to_json(self) -> str:
        """Return the text of `manifest.json`; `parse_manifest` reads it back unchanged."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `manifest.json` of a bundle folder; the other files are not looked at.

    Raises:
        BundleMissing: no such folder, or no manifest in it.
        BundleInvalid: the manifest is damaged or of another format version.
    """
    path = bundle / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise _invalid("manifest.json is larger than 16 MiB")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleMissing(
            f"there is no bundle at {bundle}",
            cause=f"{path} does not exist" if bundle.is_dir() else f"{bundle} is not a folder",
            fix="give the folder that `llamac compile -o` wrote",
        ) from error
    except OSError as error:
        raise _invalid(f"{path} cannot be read: {error.strerror}") from error
    return parse_manifest(data)


def parse_manifest(data: bytes) -> Manifest:
    """Make a checked Manifest from the bytes of `manifest.json`.

    Raises:
        BundleInvalid: not JSON, of another format version, or a field is wrong.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"manifest.json is not JSON: {error}") from error
    _check_version(document)
    try:
        manifest = decode(Manifest, document)
        _check_files(manifest)
        _check_ids(manifest)
        check_graphs(manifest.graphs, manifest.files)
    except SchemaError as error:
        raise _invalid(f"manifest.json: {error}") from error
    return manifest


def _check_version(document: object) -> None:
    """Refuse other formats before looking at fields, whose meaning a version may change."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _invalid(f'manifest.json does not say "format": "{FORMAT}"')
    version = document.get("format_version")
    if version == FORMAT_VERSION and not isinstance(version, bool):
        return
    is_newer = isinstance(version, int) and version > FORMAT_VERSION
    raise BundleInvalid(
        f"the bundle has format version {version!r:.40}, this runtime reads {FORMAT_VERSION}",
        cause="bundle and runtime come from different versions of llamac",
        fix="update llamac on this machine" if is_newer else "compile the model again",
    )


def _check_files(manifest: Manifest) -> None:
    for name in manifest.files:
        parts = name.split("/")
        # Colons and backslashes would make a path leave the folder on Windows.
        if (
            PurePosixPath(name).is_absolute()
            or set(parts) & {"", ".", ".."}
            or set(name) & set(":\\")
        ):
            raise SchemaError(f"files[{name!r}]", "is not a plain path inside the bundle")
    roles = [entry.role for entry in manifest.files.values()]
    _check_libraries(manifest)
    for role in ("weights", "tokenizer"):
        if roles.count(role) != 1:
            raise SchemaError("files", f"has {roles.count(role)} files of role {role!r}, not one")
    if manifest.files[manifest.file("weights")].sample_sha256 is None:
        raise SchemaError(f"files[{manifest.file('weights')!r}].sample_sha256", "is missing")
    if manifest.tokenizer.file != manifest.file("tokenizer"):
        raise SchemaError("tokenizer.file", "is not the file of role 'tokenizer'")


def _check_libraries(manifest: Manifest) -> None:
    """One library without flavour, or one of each flavour; none if there is a runner instead."""
    roles = [entry.role for entry in manifest.files.values()]
    count = roles.count("library")
    flavours = manifest.libraries()
    if count == 0 and "runner" not in roles:
        raise SchemaError("files", "has 0 files of role 'library'")
    if count > 1 and (None in flavours or len(flavours) < count):
        raise SchemaError("files", f"has {count} files of role 'library', not one of each flavour")
    for name, entry in manifest.files.items():
        if entry.flavour is not None and entry.role != "library":
            raise SchemaError(f"files[{name!r}].flavour", "is for libraries only")


def _check_ids(manifest: Manifest) -> None:
    tokenizer, vocab_size = manifest.tokenizer, manifest.model.vocab_size
    named = {f"special_tokens[{name!r}]": i for name, i in tokenizer.special_tokens.items()}
    named |= {f"stop_ids[{i}]": stop_id for i, stop_id in enumerate(tokenizer.stop_ids)}
    if tokenizer.bos_id is not None:
        named["bos_id"] = tokenizer.bos_id
    for name, token in named.items():
        if token >= vocab_size:
            raise SchemaError(
                f"tokenizer.{name}", f"is {token}, beyond the {vocab_size} tokens of the model"
            )
    if not any(function.num_tokens == 1 for function in manifest.functions):
        raise SchemaError("functions", "has none that evaluates one token")


def _invalid(message: str) -> BundleInvalid:
    return BundleInvalid(
        message,
        cause="the bundle was changed, was copied in part, or was not written by llamac",
        fix="copy the bundle again, or compile it again",
    )
