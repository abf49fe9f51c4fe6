"""Load a bundle: check it, map it, open sessions on it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llamac.runtime import checks, system
from llamac.runtime.backend import BackendModel, Machine
from llamac.runtime.chat import Chat, find_template
from llamac.runtime.errors import BundleInvalid, SessionClosed, UsageError
from llamac.runtime.generation import Generation
from llamac.runtime.library import MAX_THREADS, NativeInfo, NativeModel, open_library
from llamac.runtime.manifest import Manifest, read_manifest
from llamac.runtime.session import Session
from llamac.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llamac.runtime.generation import GenerationOptions

__all__ = ["Model", "ThisMachine", "load"]


def load(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    level: str | None = None,
    check: Literal["quick", "full", "none"] = "quick",
    check_memory: bool = True,
    machine: Machine | None = None,
) -> Model:
    """Load a bundle that `llamac compile` wrote.

    The weights are mapped, not read: loading takes milliseconds and the first token pays for
    reading them from disk, once. A bundle is a program; load only those that you trust.

    Args:
        bundle: its folder.
        threads: threads of each session; None takes one for each big core that may be used.
        cpus: pin thread t to `cpus[t]`; None lets the system move them.
        level: kernels to use, such as "avx2"; None takes the best that this CPU can run.
        check: "quick" hashes every file, but of the weights a sample; "full" hashes all of them;
            "none" compares sizes only.
        check_memory: refuse if the free memory is less than KV cache, working memory and a
            reserve. Weights do not count, as the system may drop mapped pages.
        machine: where to run it, such as `llamac.targets.emulator.Emulator`; None: here.

    Raises:
        BundleMissing: there is no bundle.
        BundleInvalid: the manifest is damaged, or of another format version.
        BundleCorrupt: a file is missing or differs from the manifest.
        AbiMismatch: bundle and runtime are of different versions.
        CpuUnsupported: the bundle is for another CPU.
        OutOfMemory: too little free memory.
        TokenizerError: the tokenizer is of an unknown kind.
        UsageError: an argument is outside its range.
    """
    folder = Path(bundle)
    team = _resolve_team(threads, cpus)
    if check not in ("quick", "full", "none"):
        raise UsageError(
            f"check is {check!r}",
            cause="there is no such kind of check",
            fix='give "quick", "full" or "none"',
        )
    manifest = read_manifest(folder)
    machine = machine or ThisMachine()
    machine.check(folder, manifest)
    checks.check_level(manifest, level)
    if check == "none":
        checks.verify_sizes(folder, manifest)
    else:
        checks.verify_files(folder, manifest, full=check == "full")
    if check_memory:
        _check_session_memory(manifest)
    return Model(folder, manifest, machine, level=level, team=team, check_memory=check_memory)


class ThisMachine:
    """The machine and the process of this program, which loads the bundle's library."""

    def check(self, bundle: Path, manifest: Manifest) -> None:
        """Compare architecture, operating system, C library and version."""
        checks.check_target(manifest)

    def open(self, bundle: Path, manifest: Manifest, level: str | None) -> NativeModel:
        """Load the library and open the weights."""
        return open_library(
            bundle / checks.library_name(manifest), bundle / manifest.file("weights"), level
        )


class Model:
    """A loaded model: mapped weights, kernels and tokenizer. Made by `load`.

    Closing it, or leaving its `with` block, closes its sessions too.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        machine: Machine,
        *,
        level: str | None,
        team: tuple[int, tuple[int, ...]],
        check_memory: bool,
    ) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._team = team
        self._check_memory = check_memory
        self._tokenizer = Tokenizer(
            bundle / manifest.tokenizer.file,
            manifest.tokenizer,
            vocab_size=manifest.model.vocab_size,
        )
        self._native = machine.open(bundle, manifest, level)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._check_info()

    def _check_info(self) -> None:
        """Compare what the library says with the manifest; without hashes they could differ."""
        says = (self.info.vocab_size, self.info.context_length)
        model = self._manifest.model
        if says != (model.vocab_size, model.context_length):
            self.close()
            raise BundleInvalid(
                f"the library has vocabulary and context of {says} tokens, the manifest says "
                f"{(model.vocab_size, model.context_length)}",
                cause="library and manifest come from different bundles",
                fix="copy the bundle again, or compile it again",
            )

    @property
    def bundle(self) -> Path:
        """Folder of the bundle."""
        return self._bundle

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self._manifest

    @property
    def info(self) -> NativeInfo:
        """What the library says: vocabulary, context, memory, level in use."""
        return self._native.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; its file is read at first use."""
        return self._tokenizer

    @property
    def native(self) -> BackendModel:
        """The model below, for verification and measurements."""
        return self._native

    @property
    def is_closed(self) -> bool:
        """Whether the model was closed."""
        return self._native.is_closed

    def session(self, *, threads: int | None = None, cpus: Sequence[int] | None = None) -> Session:
        """Open a session: an empty context with its own KV cache and threads.

        Args:
            threads: as for `load`; without both arguments, those of `load` hold.
            cpus: as for `load`.

        Raises:
            SessionClosed: the model is closed.
            OutOfMemory: too little free memory.
            UsageError: an argument is outside its range.
        """
        if self.is_closed:
            raise SessionClosed(
                "the model is closed",
                cause="close() was called, or its with block ended",
                fix="load the bundle again, and use the model inside its with block",
            )
        has_own_team = threads is not None or cpus is not None
        team = _resolve_team(threads, cpus) if has_own_team else self._team
        if self._check_memory:
            _check_session_memory(self._manifest)
        session = Session(self._native, self._tokenizer, *team)
        self._sessions.add(session)
        return session

    def generate(
        self, prompt: str | Iterable[int], **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Stream the continuation of a prompt in a session of its own.

        Args:
            prompt: text or token ids.
            **options: as for `Session.generate`.
        """
        return self.session().generate(prompt, **options).own_session()

    def chat(self, system: str | None = None, *, template: str | None = None) -> Chat:
        """Start a conversation in a session of its own.

        Args:
            system: instructions that the model sees before the first turn.
            template: name of a chat template; None takes the model's.

        Raises:
            UsageError: the model has no chat template, or one that this runtime does not know.
        """
        found = find_template(template or self._manifest.tokenizer.chat_template)
        return Chat(self.session(), found, system)

    def adapt(self, adapter: str | Path | None) -> None:
        """Take another adapter while the model is open; sessions begin anew.

        Args:
            adapter: file that `llamac adapt` wrote for this bundle; None: the bundle's own weights.

        Raises:
            BundleCorrupt: the file is damaged, or for another bundle.
            AbiMismatch: the bundle is of a version that cannot do it.
            UsageError: the model runs elsewhere than in this process.
            OutOfMemory: no memory for its values; close the model.
        """
        if not isinstance(self._native, NativeModel):
            raise UsageError(
                "adapters can only be exchanged in a model of this process",
                cause="an emulator or another program runs the bundle",
                fix="load the bundle on its own machine, or compile it with this adapter",
            )
        for session in list(self._sessions):
            session.rewind(0)
        self._native.adapt(None if adapter is None else Path(adapter))

    def close(self) -> None:
        """Close all sessions and unmap the weights; more calls do nothing."""
        for session in list(self._sessions):
            session.close()
        self._native.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_session_memory(manifest: Manifest) -> None:
    plan = manifest.memory
    checks.check_memory(
        plan.kv_cache_bytes + plan.arena_bytes, f"a session of {manifest.model.name}"
    )


def _resolve_team(threads: int | None, cpus: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
    """Return the number of threads and the CPU of each, or no CPUs if they are not pinned."""
    usable = system.usable_cpus()
    pinned = () if cpus is None else tuple(cpus)
    if threads is None:
        threads = len(pinned) or min(system.default_threads(), MAX_THREADS)
    if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise UsageError(
            f"threads is {threads!r}",
            cause=f"a session has 1 to {MAX_THREADS} threads",
            fix=f"give a number up to the {len(usable)} CPUs that this process may use",
        )
    if pinned and (len(pinned) != threads or not set(pinned) <= set(usable)):
        raise UsageError(
            f"cpus is {pinned} for {threads} threads",
            cause=f"this process may use the CPUs {usable}, and each thread needs one",
            fix="give one usable CPU for each thread, or leave cpus out",
        )
    return threads, pinned
