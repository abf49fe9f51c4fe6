"""Load a bundle and generate text; imports neither TVM nor torch nor the compiler.

from llamac.runtime import load

with load("llama-3.2-1b.bundle") as model:
    for piece in model.generate("Why is the sky blue?", max_tokens=64):
        print(piece, end="")
"""

from __future__ import annotations

from llamac.runtime.chat import Chat
from llamac.runtime.errors import (
    AbiMismatch,
    BundleCorrupt,
    BundleError,
    BundleInvalid,
    BundleMissing,
    ContextFull,
    CpuUnsupported,
    DeviceError,
    LlamacError,
    OutOfMemory,
    SessionClosed,
    TokenizerError,
    UsageError,
)
from llamac.runtime.generation import Generation
from llamac.runtime.manifest import Manifest
from llamac.runtime.model import Model, load
from llamac.runtime.sampler import Sampling
from llamac.runtime.session import Session
from llamac.runtime.tokenizer import Tokenizer

__all__ = [
    "AbiMismatch",
    "BundleCorrupt",
    "BundleError",
    "BundleInvalid",
    "BundleMissing",
    "Chat",
    "ContextFull",
    "CpuUnsupported",
    "DeviceError",
    "Generation",
    "LlamacError",
    "Manifest",
    "Model",
    "OutOfMemory",
    "Sampling",
    "Session",
    "SessionClosed",
    "Tokenizer",
    "TokenizerError",
    "UsageError",
    "load",
]
