"""Fixtures of the tests of verification: small libraries, each compiled once."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.compiler.verify import VerifyReport, verify_library
from llamac.runtime.library import open_library
from llamac.runtime.manifest import read_manifest
from llamac.targets.cpu import packing
from llamac.targets.program import Program

VOCAB = 288
TOKENS = tuple(i * 37 % VOCAB for i in range(24))
CHUNKS = (16, 8)


@dataclass(frozen=True)
class Built:
    """A bundle and the checkpoint it was compiled from."""

    bundle: Path
    model: Path
    checkpoint: Checkpoint
    tokens: tuple[int, ...] = TOKENS

    @property
    def program(self) -> Program:
        return Program.from_json((self.bundle / "program.json").read_text())

    def verify(
        self, checkpoint: Checkpoint | None = None, weights: Path | None = None, **options: Any
    ) -> VerifyReport:
        """Verify the library, with another checkpoint or other weights if given."""
        manifest = read_manifest(self.bundle)
        arguments: dict[str, Any] = {
            "scale_dtype": manifest.quantization.scale_dtype,
            "kv_dtype": manifest.quantization.kv_cache,
            "tokens": self.tokens,
        }
        return verify_library(
            self.program,
            partial(
                open_library,
                self.bundle / manifest.file("library"),
                weights or self.bundle / manifest.file("weights"),
            ),
            checkpoint or self.checkpoint,
            **(arguments | options),
        )


@pytest.fixture(scope="session")
def soc_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host with the baseline kernels only, which are quick to compile and run everywhere."""
    text = (Path(packing.__file__).parents[1] / "soc" / "host.toml").read_text()
    head, *levels = text.split("[[levels]]")
    path = tmp_path_factory.mktemp("soc") / "plain.toml"
    path.write_text("[[levels]]".join([head, *(lv for lv in levels if '"x86-64"' in lv)]))
    return path


@pytest.fixture(scope="session")
def write_model(
    meta_layout: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Write a small random checkpoint with a tokenizer that can spell any text."""

    def write(form: str, change: Any = None) -> Path:
        config = replace(meta_layout.TINY, vocab_size=VOCAB)
        folder: Path = meta_layout.write_checkpoint(
            tmp_path_factory.mktemp("model") / form, form, config=config, change=change
        )
        lines = (f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
        (folder / "tokenizer.model").write_text("".join(lines))
        return folder

    return write


@pytest.fixture(scope="session")
def build(
    configure: Callable[..., CompileConfig],
    write_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Built]:
    """Write and compile a checkpoint, each form once."""
    built: dict[str, Built] = {}

    def make(form: str, change: Any = None, kv_dtype: str = "float16") -> Built:
        if form not in built:
            model = write_model(form.partition("-")[0], change)
            out = tmp_path_factory.mktemp("bundle") / form
            compile_bundle(configure(model, out, kv_dtype=kv_dtype), SilentProgress())
            built[form] = Built(out, model, from_meta(model))
        return built[form]

    return make


@pytest.fixture(scope="session")
def configure(soc_file: Path) -> Callable[..., CompileConfig]:
    """Say how the small libraries are compiled: configure(model, out, **options)."""

    def make(model: Path, out: Path, **options: Any) -> CompileConfig:
        options = {"context_length": 160, "chunks": CHUNKS} | options
        return CompileConfig(model, str(soc_file), out, **options)

    return make


@pytest.fixture(scope="session")
def spinquant(build: Callable[..., Built]) -> Built:
    return build("spinquant")


@pytest.fixture(scope="session")
def qlora(build: Callable[..., Built]) -> Built:
    """QLoRA with an int8 cache, and one table for embedding and output."""

    def share(tensors: dict[str, Any], params: Any) -> None:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
        tensors["output.scales"] = tensors["tok_embeddings.scales"].clone()

    return build("qlora", share, "int8")


@pytest.fixture(scope="session")
def without_r4(build: Callable[..., Built]) -> Built:
    """The library of a SpinQuant checkpoint that was taken for plain int4: without R4."""

    def forget(tensors: Any, params: dict[str, Any]) -> None:
        params["quantization_args"]["spinquant"] = False

    return build("spinquant-without-r4", forget)
