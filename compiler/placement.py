"""Which processor computes what: one for all, or an accelerator for layers beside a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamac.runtime.errors import TargetUnknown, UsageError
from llamac.targets.base import Target
from llamac.targets.registry import make_target
from llamac.targets.soc import load_soc

PHASES = ("prefill", "decode")
CPU = "cpu"


@dataclass(frozen=True)
class Placement:
    """The plug-ins of a compilation.

    Attributes:
        target: owns the model; its library is what a process loads.
        accelerator: computes the layers of some phases, None if there is none.
        phases: that the accelerator has, of PHASES.
    """

    target: Target
    accelerator: Target | None = None
    phases: frozenset[str] = frozenset()

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
    dtypes: Mapping[str, str],
) -> Placement:
    """Find the plug-ins for the processors that were asked for.

    Args:
        soc_name: name or path of a SoC file.
        processors: kinds, "cpu".
        wanted: processor of a phase, where the user said so.
        dtypes: what was chosen, by the options "--scales" and "--kv-cache".

    Raises:
        TargetUnknown: the SoC lacks a processor, or they do not go together.
        UsageError: a phase or a dtype that is not known.
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
        _check_dtypes(target, dtypes)
    placement = _combine(soc.name, targets)
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
    return Placement(placement.target, placement.accelerator, frozenset(phases))


def _check_dtypes(target: Target, dtypes: Mapping[str, str]) -> None:
    known = {"--scales": target.scale_dtypes, "--kv-cache": target.kv_dtypes}
    for option, value in dtypes.items():
        if value not in known[option]:
            raise UsageError(
                f"{option} {value} is not known to {target.name}",
                cause=f"it reads {', '.join(known[option])}",
                fix=f"choose {option} from {', '.join(known[option])}",
            )
