"""Which processor computes what: one for all, or an accelerator for layers beside a CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from llamac.runtime.errors import TargetUnknown, UsageError
from llamac.targets.base import Scheme, Target
from llamac.targets.registry import make_target
from llamac.targets.soc import load_soc

PHASES = ("prefill", "decode")
CPU = "cpu"
DEFAULT_KV = "float16"


@dataclass(frozen=True)
class Placement:
    """The plug-ins of a compilation.

    Attributes:
        target: owns the model; its library is what a process loads.
        accelerator: computes the layers of some phases, None if there is none.
        phases: that the accelerator has, of PHASES.
        scheme: how it computes them.
        kv_dtype: of the KV cache that all share, but for `cpu_layers`.
        cpu_layers: layers that the accelerator leaves to the CPU.
    """

    target: Target
    accelerator: Target | None = None
    phases: frozenset[str] = frozenset()
    scheme: Scheme | None = None
    kv_dtype: str = DEFAULT_KV
    cpu_layers: frozenset[int] = frozenset()

    @property
    def cpu_kv_dtype(self) -> str:
        """Of the KV cache of `cpu_layers`: kernels of the CPU do not read what a scheme has."""
        has_own = self.scheme is not None and self.scheme.kv_dtype is not None
        return DEFAULT_KV if has_own else self.kv_dtype

    def with_cpu_layers(self, layers: Collection[int], num_layers: int) -> Placement:
        """Leave layers to the CPU.

        Args:
            layers: their numbers, from 0.
            num_layers: of the model.

        Raises:
            UsageError: there is no accelerator, no such layer, or nothing would be left for it.
        """
        if not layers:
            return self
        text = ",".join(map(str, sorted(layers)))
        if self.accelerator is None:
            raise UsageError(
                f"--cpu-layers {text} has no effect here",
                cause="the CPU computes all layers",
                fix="leave it out, or name an accelerator with --processors",
            )
        if not all(0 <= layer < num_layers for layer in layers):
            raise UsageError(
                f"--cpu-layers {text} names layers that the model does not have",
                cause=f"it has {num_layers} layers, 0 to {num_layers - 1}",
                fix="correct the numbers",
            )
        if len(set(layers)) == num_layers:
            raise UsageError(
                f"--cpu-layers leaves nothing for {self.accelerator.processor}",
                cause=f"it names all {num_layers} layers",
                fix="compile with --processors cpu",
            )
        return replace(self, cpu_layers=frozenset(layers))

    def offloaded(self, chunks: Sequence[int]) -> list[str]:
        """Names of the functions whose layers the accelerator computes, given prefill lengths."""
        names = [f"prefill_{chunk}" for chunk in chunks if chunk > 1]
        return [name for name in (*names, "decode") if _phase(name) in self.phases]

    def processor_of(self, function: str) -> str:
        """Kind of the processor that computes the layers of a function."""
        if self.accelerator is not None and _phase(function) in self.phases:
            return self.accelerator.processor
        return self.target.processor


def _phase(function: str) -> str:
    return "decode" if function == "decode" else "prefill"


def place_processors(
    soc_name: str,
    processors: Sequence[str],
    wanted: Mapping[str, str],
    dtypes: Mapping[str, str | None],
    scheme: str | None = None,
) -> Placement:
    """Find the plug-ins for the processors that were asked for.

    Args:
        soc_name: name or path of a SoC file.
        processors: kinds, "cpu".
        wanted: processor of a phase, where the user said so.
        dtypes: what was chosen, by the options "--scales" and "--kv-cache"; None: the default.
        scheme: name of the accelerator's; None: its first.

    Raises:
        TargetUnknown: the SoC lacks a processor, or they do not go together.
        UsageError: a phase, a scheme or a dtype that is not known, or that do not go together.
        SocInvalid, ToolchainMissing: see `make_target`.
    """
    soc = load_soc(soc_name)
    plugins = {processor.kind: processor.plugin for processor in soc.processors}
    for kind in (*processors, *wanted.values()):
        if kind not in plugins:
            raise TargetUnknown(
                f"{soc.name} has no processor {kind!r}",
                cause=f"its SoC file lists {', '.join(plugins)}",
                fix=f"choose from {', '.join(plugins)} with --processors",
            )
    targets = [make_target(plugins[kind], soc) for kind in dict.fromkeys(processors)]
    for target in targets:
        _check_dtype(target, "--scales", dtypes["--scales"], target.scale_dtypes)
    placement = _with_scheme(_combine(soc.name, targets), scheme, dtypes["--kv-cache"])
    return _with_phases(placement, wanted)


def _combine(soc: str, targets: Sequence[Target]) -> Placement:
    """One target that owns the model, and at most one accelerator beside it."""
    owners = [target for target in targets if not target.is_accelerator]
    accelerators = [target for target in targets if target.is_accelerator]
    kinds = ", ".join(target.processor for target in targets) or "none"
    if not owners and len(accelerators) == 1:
        kind = accelerators[0].processor
        raise TargetUnknown(
            f"{kind} computes layers only, and a model has more than layers",
            cause="embedding, output layer and the choice of a token are computed by a CPU",
            fix=f"compile with --processors cpu,{kind}",
        )
    if len(owners) != 1 or len(accelerators) > 1 or (accelerators and owners[0].processor != CPU):
        raise TargetUnknown(
            f"this version compiles no model for {kinds} of {soc} together",
            cause="one processor computes a whole model, or the CPU one together with an "
            "accelerator that takes its layers",
            fix="choose one of them with --processors, or cpu,htp",
        )
    if not accelerators:
        return Placement(owners[0])
    return Placement(owners[0], accelerators[0], frozenset(PHASES))


def _with_phases(placement: Placement, wanted: Mapping[str, str]) -> Placement:
    """Give phases to the CPU where the user wants it."""
    here = [t.processor for t in (placement.target, placement.accelerator) if t is not None]
    for phase, kind in wanted.items():
        if phase not in PHASES or kind not in here:
            raise UsageError(
                f"--place {phase}={kind} cannot be done",
                cause=f"phases are {' and '.join(PHASES)}, processors of this compilation "
                f"{' and '.join(here)}",
                fix="write it like --processors cpu,htp --place prefill=htp,decode=cpu",
            )
    if placement.accelerator is None:
        return placement
    default = placement.accelerator.processor
    phases = {phase for phase in PHASES if wanted.get(phase, default) == default}
    if not phases:
        raise UsageError(
            f"--place leaves nothing for {default}",
            cause="prefill and decode were both given to the CPU",
            fix="compile with --processors cpu",
        )
    scheme = placement.scheme
    if len(phases) < len(PHASES) and scheme is not None and scheme.kv_dtype is not None:
        raise UsageError(
            f"--place cannot divide a model in the scheme {scheme.name}",
            cause=f"its graphs have one scale for all {scheme.kv_dtype} keys of a layer, and "
            "kernels of the CPU write a scale for each row",
            fix="leave out --place, or choose another --scheme",
        )
    return replace(placement, phases=frozenset(phases))


def _with_scheme(placement: Placement, name: str | None, kv_dtype: str | None) -> Placement:
    """Choose the accelerator's scheme, and the KV cache that goes with it."""
    owner, accelerator = placement.target, placement.accelerator
    schemes = accelerator.schemes() if accelerator else ()
    names = [scheme.name for scheme in schemes]
    if name is not None and name not in names:
        raise UsageError(
            f"--scheme {name} cannot be used",
            cause=f"{accelerator.name} has {', '.join(names)} on this SoC"
            if accelerator
            else "a scheme tells how an accelerator computes layers, and there is none",
            fix="choose one of them"
            if accelerator
            else "leave it out, or name an accelerator with --processors",
        )
    if accelerator is None:
        _check_dtype(owner, "--kv-cache", kv_dtype, owner.kv_dtypes)
        return replace(placement, kv_dtype=kv_dtype or DEFAULT_KV)
    scheme = schemes[names.index(name) if name else 0]
    if scheme.kv_dtype is None:
        for target in (owner, accelerator):
            _check_dtype(target, "--kv-cache", kv_dtype, target.kv_dtypes)
    elif kv_dtype not in (None, scheme.kv_dtype):
        raise UsageError(
            f"--kv-cache {kv_dtype} does not go with the scheme {scheme.name}",
            cause=f"its graphs read and write keys and values as {scheme.kv_dtype}",
            fix="leave out --kv-cache, or choose another --scheme",
        )
    return replace(placement, scheme=scheme, kv_dtype=scheme.kv_dtype or kv_dtype or DEFAULT_KV)


def _check_dtype(target: Target, option: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise UsageError(
            f"{option} {value} is not known to {target.name}",
            cause=f"it reads {', '.join(known)}",
            fix=f"choose {option} from {', '.join(known)}",
        )
