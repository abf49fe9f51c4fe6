"""Operation by operation: run a library step by step and compare each step with the reference.

Before a step its actual inputs are copied from the session's memory; after it, what it wrote is
compared with the reference of those inputs (`verify_families.py`), so errors do not add up and the
first operation that fails is the guilty one. What a step reads must be what another step wrote:
a memory plan that reuses a place too early is found as well.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.layers import LayerModel
from llamac.compiler.verify_compare import EXACT_DB, LARGEST
from llamac.compiler.verify_families import StepReference, StepRun
from llamac.compiler.verify_graphs import GraphReference
from llamac.runtime.backend import BackendSession
from llamac.schedules.graph import FAMILY
from llamac.targets.program import SPACES, Function, Pack, Program, ProgramTensor, Step

Array = NDArray[Any]

_NUMPY_DTYPES = {"bfloat16": "uint16"}
# Rows of a cache are looked at in whole blocks of this many positions, and one block more.
_CACHE_BLOCK = 16


@dataclass(frozen=True)
class OperationResult:
    """One step of a function beside its reference.

    Attributes:
        name: kernel and what it works on, "qmatmul_... (layers.0.attention.wo)".
        function: of the program.
        step: index in the function.
        kernel: name of the kernel.
        family: of the kernel.
        sqnr_db: lowest of all that the step wrote; 300 if all is equal.
        max_error: largest error, relative to the largest magnitude of its row.
        mismatched_codes: integers that differ from the reference, near ties included.
        failure: what is wrong, "" if nothing is.
    """

    name: str
    function: str
    step: int
    kernel: str
    family: str
    sqnr_db: float
    max_error: float
    mismatched_codes: int
    failure: str

    @property
    def passed(self) -> bool:
        """Whether the step computes what the reference computes."""
        return not self.failure

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


class SessionMemory:
    """Tensors of a program in the memory of a session."""

    def __init__(self, session: BackendSession) -> None:
        self._session = session

    def read(self, tensor: ProgramTensor) -> Array:
        """A copy of a tensor."""
        return self._read(tensor, 0, tensor.shape)

    def write(self, tensor: ProgramTensor, values: ArrayLike) -> None:
        """Replace a tensor."""
        array = np.broadcast_to(np.asarray(values, _numpy_dtype(tensor)), tensor.shape)
        self._session.write_memory(SPACES.index(tensor.space), tensor.offset, array.tobytes())

    def cache_rows(self, tensor: ProgramTensor, count: int) -> Array:
        """A copy of the first `count` positions of a cache tensor, [P, Hkv, D]."""
        heads, positions, *inner = tensor.shape
        # Plain [Hkv, P, D], or in blocks of positions, [Hkv, P / B, D, B].
        wanted = min(positions, count if len(inner) == 1 else -(-count // inner[-1]))
        size = tensor.num_bytes // heads
        cache = np.stack(
            [self._read(tensor, head * size, (wanted, *inner)) for head in range(heads)]
        )
        if cache.ndim == 3:
            return cache.transpose(1, 0, 2)
        blocks = cache.transpose(1, 3, 0, 2)
        return blocks.reshape(-1, *blocks.shape[2:])[:count]

    def _read(self, tensor: ProgramTensor, start: int, shape: Sequence[int]) -> Array:
        """A copy of a part of a tensor that begins `start` bytes behind its first."""
        dtype = _numpy_dtype(tensor)
        num_bytes = dtype.itemsize * math.prod(shape)
        space = SPACES.index(tensor.space)
        data = self._session.read_memory(space, tensor.offset + start, num_bytes)
        return np.frombuffer(data, dtype).reshape(shape)


def _numpy_dtype(tensor: ProgramTensor) -> np.dtype[Any]:
    return np.dtype(_NUMPY_DTYPES.get(tensor.dtype, tensor.dtype))


class StepVerifier:
    """Runs functions of a library step by step and compares each step.

    Args:
        program: what the library was built from.
        session: of the library, with memory of its own.
        checkpoint: the model.
        scale_dtype: what the bundle stores int4 group scales as.
        level: whose kernels the session runs.
        layers: what graphs were made from, if there are any.
    """

    def __init__(
        self,
        program: Program,
        session: BackendSession,
        checkpoint: Checkpoint,
        scale_dtype: str,
        level: str,
        layers: LayerModel | None = None,
    ) -> None:
        self._program, self._session, self._checkpoint = program, session, checkpoint
        self._memory = SessionMemory(session)
        graphs = GraphReference(checkpoint if layers is None else layers.checkpoint)
        self._reference = StepReference(checkpoint, scale_dtype, level, graphs)

    def verify(
        self,
        function: Function,
        tokens: ArrayLike,
        position: int,
        advance: Callable[[str], None],
    ) -> Iterator[OperationResult]:
        """Run a function and yield the result of each step.

        Args:
            function: of the program.
            tokens: as many as the function takes.
            position: of the first token; keys and values before it are in the cache.
            advance: called with the name of each step before it runs.
        """
        self._set(function.tokens, tokens)
        self._set(function.meta, [position, function.num_tokens - 1])
        trace = _Trace(self._program, function, self._memory)
        for index, step in enumerate(function.steps):
            name = trace.name(index)
            advance(name)
            yield self._verify_step(function, index, step, position, trace, name)

    def missing_weights(self, function: Function) -> list[str]:
        """Names of layers of the checkpoint that no step of a function reads."""
        tensors = (self._program.tensors[i] for step in function.steps for i in step.operands)
        used = {source for t in tensors if t.pack is not None for source in t.pack.sources}
        names = {self._program.kernels[step.kernel].name for step in function.steps}
        used |= {n for g in self._program.graphs() if g.name in names for n in g.layers}
        needed = {_layer_of(name) for name in self._checkpoint.weights.names()}
        if self._checkpoint.shared_embedding:
            needed.discard("output")
        return sorted(needed - used)

    def _set(self, tensor: int, values: ArrayLike) -> None:
        self._memory.write(self._program.tensors[tensor], values)

    def _verify_step(
        self, function: Function, index: int, step: Step, position: int, trace: _Trace, name: str
    ) -> OperationResult:
        """Run one step and compare what it wrote."""
        operands = [self._program.tensors[i] for i in step.operands]
        is_graph = self._program.kernels[step.kernel].family == FAMILY
        caches = {
            t.name if is_graph else t.name.rpartition(".")[2]: t
            for t in operands
            if t.space == "kv"
        }
        end = position + function.num_tokens
        count = (end // _CACHE_BLOCK + 2) * _CACHE_BLOCK
        before = {part: self._memory.cache_rows(t, count) for part, t in caches.items()}
        inputs, clobbered = trace.read(step)
        self._session.run_steps(function.name, index, 1)
        run = StepRun(
            kernel=self._program.kernels[step.kernel],
            inputs=inputs,
            producers=trace.producers(step),
            sources=tuple(t.pack.sources for t in operands if t.pack is not None),
            cache_before=before,
            cache={part: self._memory.cache_rows(t, count) for part, t in caches.items()},
            outputs=trace.wrote(step, index),
        )
        comparisons = self._reference.compare(run)
        failures = [clobbered, self._reference.misplaced(run)]
        failures += [str(c) for c in comparisons if not c.passed]
        return OperationResult(
            name=name,
            function=function.name,
            step=index,
            kernel=run.kernel.name,
            family=run.kernel.family,
            sqnr_db=min((c.sqnr_db for c in comparisons), default=EXACT_DB),
            max_error=min(LARGEST, max((c.max_error for c in comparisons), default=0.0)),
            mismatched_codes=sum(c.mismatched for c in comparisons),
            failure=next((failure for failure in failures if failure), ""),
        )


class _Trace:
    """Which step wrote which tensor of a function, and what."""

    def __init__(self, program: Program, function: Function, memory: SessionMemory) -> None:
        self._program, self._function, self._memory = program, function, memory
        # Producers are -1 for the function's own inputs.
        self._writers = {function.tokens: -1, function.meta: -1}
        self._checksums = {i: self._checksum(i) for i in self._writers}

    def read(self, step: Step) -> tuple[tuple[Array, ...], str]:
        """Copies of the arena tensors that a step reads, and what is wrong with them, or ""."""
        read = [i for i in step.operands if i in self._writers]
        changed = [i for i in read if self._checksum(i) != self._checksums[i]]
        problem = ""
        if changed:
            writer = self._writers[changed[0]]
            origin = "the caller" if writer < 0 else self.name(writer)
            problem = f"its input was overwritten since {origin} wrote it: the memory plan is wrong"
        return tuple(self._memory.read(self._program.tensors[i]) for i in read), problem

    def wrote(self, step: Step, index: int) -> tuple[Array, ...]:
        """Copies of the arena tensors that a step is the first to touch: its outputs."""
        written = [i for i in step.operands if self._is_arena(i) and i not in self._writers]
        for i in written:
            self._writers[i] = index
            self._checksums[i] = self._checksum(i)
        return tuple(self._memory.read(self._program.tensors[i]) for i in written)

    def producers(self, step: Step) -> tuple[str, ...]:
        """Families of the kernels that wrote the tensors that a step reads."""
        return tuple(self._family(self._writers[i]) for i in step.operands if i in self._writers)

    def name(self, index: int) -> str:
        """Kernel of a step and the layers that it works on, or prepares the input of."""
        kernel = self._program.kernels[self._function.steps[index].kernel]
        layers = self._layers(index)
        for later in range(index + 1, len(self._function.steps)):
            if layers:
                break
            layers = self._layers(later)
            layers = [f"before {layers[0]}"] if layers else []
        return f"{kernel.name} ({', '.join(layers)})" if layers else kernel.name

    def _layers(self, index: int) -> list[str]:
        """Layers whose weights or caches a step touches."""
        tensors = [self._program.tensors[i] for i in self._function.steps[index].operands]
        caches = [t.name.rpartition(".")[0] for t in tensors if t.space == "kv"]
        packs: list[Pack] = [t.pack for t in tensors if t.pack is not None]
        return caches[:1] if caches else list(packs[0].sources) if packs else []

    def _family(self, writer: int) -> str:
        if writer < 0:
            return ""
        return self._program.kernels[self._function.steps[writer].kernel].family

    def _is_arena(self, index: int) -> bool:
        return self._program.tensors[index].space == "arena"

    def _checksum(self, index: int) -> int:
        return zlib.crc32(self._memory.read(self._program.tensors[index]).tobytes())


def _layer_of(name: str) -> str:
    """The layer that a tensor of a checkpoint belongs to: "layers.0.attention.wq"."""
    return name.partition(".adaptor.")[0].removesuffix(".weight").removesuffix(".scales")


def worst_by_kernel(operations: Sequence[OperationResult]) -> Mapping[str, float]:
    """The lowest SQNR in dB of each kernel, by "function: kernel"."""
    worst: dict[str, float] = {}
    for operation in operations:
        key = f"{operation.function}: {operation.kernel}"
        worst[key] = min(worst.get(key, EXACT_DB), operation.sqnr_db)
    return worst
