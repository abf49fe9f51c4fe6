"""The compiler: front ends, IR of composites, pipeline, reference arithmetic, bundles, verify.

Front ends are functions of this package: `from_meta`, `from_hf`, `from_gguf`, `from_onnx` and
`from_torch` each open one form of model as a `Checkpoint`. They are loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamac.compiler.frontends.gguf import from_gguf
    from llamac.compiler.frontends.hf import from_hf
    from llamac.compiler.frontends.meta import from_meta
    from llamac.compiler.frontends.onnx_model import from_onnx
    from llamac.compiler.frontends.torch_export import from_torch

__all__ = ["from_gguf", "from_hf", "from_meta", "from_onnx", "from_torch"]

_MODULES = {
    "from_gguf": "gguf",
    "from_hf": "hf",
    "from_meta": "meta",
    "from_onnx": "onnx_model",
    "from_torch": "torch_export",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"{__name__}.frontends.{_MODULES[name]}"), name)
