"""Statuses of the C interface (`llamac_status` in `runtime/c/llamac.h`) as errors."""

from __future__ import annotations

from llamac.runtime.errors import (
    AcceleratorError,
    BundleCorrupt,
    ContextFull,
    CpuUnsupported,
    DeviceError,
    LlamacError,
    OutOfMemory,
    UsageError,
)

__all__ = ["error_of_status"]

# Class of error, its cause, what to do. The message comes from the library.
_STATUS: dict[int, tuple[type[LlamacError], str, str]] = {
    1: (UsageError, "the library refused an argument", "correct the argument"),
    2: (
        BundleCorrupt,
        "the system could not open or map the weights file",
        "check that the bundle is complete and may be read",
    ),
    3: (
        BundleCorrupt,
        "weights and library are not from the same build, or the weights are damaged",
        "copy the bundle again, or compile it again",
    ),
    4: (
        CpuUnsupported,
        "the kernels use instructions that this CPU lacks",
        "choose another level, compile for this CPU, or run with `llamac run --emulate`",
    ),
    5: (
        OutOfMemory,
        "the system refused memory for the KV cache or the working memory",
        "close other programs, or compile with a shorter context",
    ),
    6: (
        ContextFull,
        "the KV cache has a fixed length, chosen when the bundle was compiled",
        "rewind, start a new session, or compile with a longer context",
    ),
    7: (DeviceError, "a compiled kernel reported an error", "check the bundle: llamac verify"),
    8: (
        DeviceError,
        "the system refused to start a thread or to keep it on its CPU",
        "use fewer threads, or CPUs that this process may use",
    ),
    9: (
        AcceleratorError,
        "the libraries of the NPU, or the binaries for it, are missing, do not fit, or failed",
        "give the folder of libraries that fit in LLAMAC_QNN_LIBRARIES or LLAMAC_NEURON_LIBRARIES, "
        "or compile the model again with --processors cpu",
    ),
}


def error_of_status(status: int, message: str) -> LlamacError:
    """Make the error for a status other than 0, with the library's own message."""
    unknown = (DeviceError, f"the library returned status {status}", "check: llamac verify")
    kind, cause, fix = _STATUS.get(status, unknown)
    return kind(message or f"the library returned status {status}", cause=cause, fix=fix)
