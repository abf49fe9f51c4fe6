"""Errors that llamac raises on purpose.

Every error has a stable `code`, a one-sentence `message` with the values that failed, its `cause`
and a `fix`. `docs/errors.md` has one section per code, and a test compares the two lists.

    LlamacError
    ├── UsageError              usage                 the command line or an argument is wrong
    ├── CheckpointError         (abstract: what is wrong with a model on disk)
    │   ├── CheckpointMissing       checkpoint-missing     no such file, or no model in the folder
    │   ├── CheckpointUnreadable    checkpoint-unreadable  truncated or damaged file
    │   ├── CheckpointUnsafe        checkpoint-unsafe      a pickle that wants to run code
    │   ├── ParamsInvalid           checkpoint-params      params.json lacks or contradicts a field
    │   ├── TensorInvalid           checkpoint-tensor      a tensor is missing or of wrong form
    │   ├── ValuesInvalid           checkpoint-values      codes or scales outside their range
    │   └── ModelUnsupported        model-unsupported      a valid model that llamac cannot compile
    ├── TokenizerError          tokenizer             the tokenizer file is missing or damaged
    ├── TargetError             (abstract: SoCs, plug-ins, toolchains)
    │   ├── SocUnknown              soc-unknown            no SoC file of that name
    │   ├── SocInvalid              soc-invalid            a SoC file breaks the schema
    │   ├── TargetUnknown           target-unknown         no plug-in for that processor
    │   ├── RecordsInvalid          records-invalid        a file holds no tuning records
    │   ├── TuningMissing           tuning-missing         no record for a kernel that needs one
    │   ├── TuningImpossible        tuning-impossible      nothing to tune, or no way to measure it
    │   ├── FarmUnreachable         farm-unreachable       no tracker, or all devices are lost
    │   ├── FarmUnfit               farm-unfit             no device of a farm fits what is tuned
    │   ├── ToolchainMissing        toolchain-missing      a compiler, emulator or SDK was not found
    │   └── BuildFailed             build-failed           a tool ran and failed
    ├── CoverageError           coverage              an operation no target can compile
    ├── NumericsError           numerics              the built library differs from the reference
    ├── OutputError             output                the bundle cannot be written
    ├── BundleError             (abstract: what is wrong with a bundle)
    │   ├── BundleMissing           bundle-missing         no bundle at that path
    │   ├── BundleInvalid           bundle-invalid         the manifest is damaged or too new or old
    │   ├── BundleCorrupt           bundle-corrupt         a file differs from the manifest
    │   └── AbiMismatch             abi-mismatch           library and runtime disagree
    ├── CpuUnsupported          cpu-unsupported       the bundle is for another CPU
    ├── OutOfMemory             out-of-memory         the plan does not fit into free memory
    ├── ContextFull             context-full          no room left in the KV cache
    ├── SessionClosed           session-closed        use after close()
    ├── DeviceError             device                the library failed while running
    └── AcceleratorError        accelerator           an NPU's libraries or binaries do not fit
"""

from __future__ import annotations

from typing import ClassVar


class LlamacError(Exception):
    """Base of all errors that llamac raises on purpose.

    Args:
        message: what happened, in one sentence, with the values that failed.
        cause: why it happened, as far as can be told.
        fix: what the user can do now.
    """

    code: ClassVar[str] = ""

    def __init__(self, message: str, *, cause: str, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


class UsageError(LlamacError):
    """The command line or an argument of a public function is wrong."""

    code = "usage"


class CheckpointError(LlamacError):
    """Something is wrong with a model on disk."""


class CheckpointMissing(CheckpointError):
    """No such file, or no model in the folder."""

    code = "checkpoint-missing"


class CheckpointUnreadable(CheckpointError):
    """A truncated or damaged file."""

    code = "checkpoint-unreadable"


class CheckpointUnsafe(CheckpointError):
    """A pickle that wants to run code."""

    code = "checkpoint-unsafe"


class ParamsInvalid(CheckpointError):
    """`params.json` lacks a field or contradicts itself."""

    code = "checkpoint-params"


class TensorInvalid(CheckpointError):
    """A tensor is missing, unexpected, or of wrong dtype or shape."""

    code = "checkpoint-tensor"


class ValuesInvalid(CheckpointError):
    """Codes or scales are outside their range."""

    code = "checkpoint-values"


class ModelUnsupported(CheckpointError):
    """A valid model that llamac cannot compile."""

    code = "model-unsupported"


class TokenizerError(LlamacError):
    """The tokenizer file is missing or damaged."""

    code = "tokenizer"


class TargetError(LlamacError):
    """Something is wrong with a SoC file, a plug-in or a toolchain."""


class SocUnknown(TargetError):
    """No SoC file of that name."""

    code = "soc-unknown"


class SocInvalid(TargetError):
    """A SoC file breaks the schema."""

    code = "soc-invalid"


class TargetUnknown(TargetError):
    """No plug-in for that processor."""

    code = "target-unknown"


class RecordsInvalid(TargetError):
    """A file does not hold tuning records, or those of another format."""

    code = "records-invalid"


class TuningMissing(TargetError):
    """A kernel has no tuning record, and the user wants one for each."""

    code = "tuning-missing"


class TuningImpossible(TargetError):
    """There is nothing to tune, or no way to measure it here."""

    code = "tuning-impossible"


class FarmUnreachable(TargetError):
    """A farm's tracker does not answer, or its devices are lost one after the other."""

    code = "farm-unreachable"


class FarmUnfit(TargetError):
    """A farm has no device that fits what is to be tuned."""

    code = "farm-unfit"


class ToolchainMissing(TargetError):
    """A compiler, emulator or SDK was not found."""

    code = "toolchain-missing"


class BuildFailed(TargetError):
    """A tool ran and failed."""

    code = "build-failed"


class CoverageError(LlamacError):
    """An operation that no target can compile."""

    code = "coverage"


class NumericsError(LlamacError):
    """The built library differs from the reference arithmetic."""

    code = "numerics"


class OutputError(LlamacError):
    """The bundle cannot be written."""

    code = "output"


class BundleError(LlamacError):
    """Something is wrong with a bundle."""


class BundleMissing(BundleError):
    """No bundle at that path."""

    code = "bundle-missing"


class BundleInvalid(BundleError):
    """The manifest is damaged or of another format version."""

    code = "bundle-invalid"


class BundleCorrupt(BundleError):
    """A file's size or hash differs from the manifest."""

    code = "bundle-corrupt"


class AbiMismatch(BundleError):
    """The bundle's library and this runtime speak different ABI versions."""

    code = "abi-mismatch"


class CpuUnsupported(LlamacError):
    """The bundle is for another CPU than this one."""

    code = "cpu-unsupported"


class OutOfMemory(LlamacError):
    """The memory plan does not fit into the free memory."""

    code = "out-of-memory"


class ContextFull(LlamacError):
    """No room is left in the KV cache."""

    code = "context-full"


class SessionClosed(LlamacError):
    """A model or session was used after it was closed."""

    code = "session-closed"


class DeviceError(LlamacError):
    """The compiled library failed while running."""

    code = "device"


class AcceleratorError(LlamacError):
    """An NPU's libraries, or the binaries that they execute, are missing, do not fit, or failed."""

    code = "accelerator"
