"""Fixtures of the compiler's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.meta import from_meta
from llamac.compiler.frontends.recognize import open_checkpoint
from llamac.runtime.errors import LlamacError


@pytest.fixture(scope="session")
def meta_layout(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `meta_layout.py`."""
    return helper("compiler/meta_layout")


@pytest.fixture(scope="session")
def gguf_layout(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `gguf_layout.py`."""
    return helper("compiler/gguf_layout")


@pytest.fixture(scope="session")
def hf_layout(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `hf_layout.py`."""
    return helper("compiler/hf_layout")


@pytest.fixture(scope="session")
def hf_packing(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `hf_packing.py`."""
    return helper("compiler/hf_packing")


@pytest.fixture(scope="session")
def peft_layout(helper: Callable[[str], ModuleType]) -> ModuleType:
    """The module `peft_layout.py`."""
    return helper("compiler/peft_layout")


@pytest.fixture
def write_meta(meta_layout: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint in a folder named "model": write_meta(form, change=None, **options)."""

    def write(form: str, change: Any = None, **options: Any) -> Path:
        folder: Path = meta_layout.write_checkpoint(
            tmp_path / "model", form, change=change, **options
        )
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_float() -> Checkpoint:
    """The trained float model of the repository."""
    return from_meta(Path(__file__).resolve().parents[2] / "examples" / "tiny-llama" / "bf16")


@pytest.fixture
def write_gguf(gguf_layout: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Write a float checkpoint as GGUF: write_gguf(checkpoint, types, change=None, table=None)."""

    def write(checkpoint: Checkpoint, types: Any, change: Any = None, table: Any = None) -> Path:
        layout = gguf_layout.make_layout(checkpoint, types, table)
        if change is not None:
            change(layout)
        written: Path = layout.write(tmp_path / "model Q.gguf")
        return written

    return write


@pytest.fixture
def write_hf(hf_layout: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """Write a float checkpoint as a folder: write_hf(checkpoint, change=None, shards=1, **how)."""

    def write(checkpoint: Checkpoint, change: Any = None, shards: int = 1, **how: Any) -> Path:
        layout = hf_layout.make_layout(checkpoint, **how)
        if change is not None:
            change(layout)
        written: Path = layout.write(tmp_path / "Some-Model", shards)
        return written

    return write


@pytest.fixture
def write_quantized(
    write_hf: Callable[..., Path], hf_packing: ModuleType, tiny_float: Checkpoint
) -> Callable[..., Path]:
    """The tiny model, quantized: write_quantized(scheme, group=32, change=None, **how)."""

    def run(scheme: str, group: int = 32, change: Any = None, **how: Any) -> Path:
        encode = getattr(hf_packing, scheme.partition("-")[0])(group, **how)

        def complete(layout: Any) -> None:
            config = copy.deepcopy(hf_packing.CONFIGS[scheme])
            layout.config["quantization_config"] = config
            if scheme == "gptq" and how.get("version") == 2:
                config["checkpoint_format"] = "gptq_v2"
            if scheme == "torchao":
                modules = (n for n in layout.tensors if n.endswith("._weight_qdata"))
                layout.metadata = {
                    n.replace("._weight_qdata", ".weight"): hf_packing.METADATA for n in modules
                }
            if change is not None:
                change(layout)

        return write_hf(tiny_float, complete, encode=encode)

    return run


@pytest.fixture(scope="session")
def read_all() -> Callable[[Checkpoint], dict[str, np.ndarray]]:
    """Read every tensor of a checkpoint."""
    return lambda checkpoint: {n: checkpoint.weights.read(n) for n in checkpoint.weights.names()}


@pytest.fixture(scope="session")
def check_advice() -> Callable[[LlamacError], None]:
    """Check that an error says what, why and what to do, in printable text of sane length."""

    def check(error: LlamacError) -> None:
        for text in (error.message, error.cause, error.fix):
            assert text.strip()
            text.encode("utf-8")
            assert "Traceback" not in text
            assert len(text) < 1000

    return check


@pytest.fixture(scope="session")
def refused(
    check_advice: Callable[[LlamacError], None], read_all: Callable[[Checkpoint], object]
) -> Callable[..., LlamacError]:
    """Check that a path is refused: refused(kind, match, path, **options of the front end)."""

    def check(kind: type[LlamacError], match: str, path: Path, **options: Any) -> LlamacError:
        with pytest.raises(kind, match=match) as caught:
            read_all(open_checkpoint(path, **options))
        assert type(caught.value) is kind
        check_advice(caught.value)
        return caught.value

    return check
