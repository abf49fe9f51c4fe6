"""What `llamac targets` says of a SoC.

Decode reads every weight once per token, so memory bandwidth divided by the bytes of the weights is
an upper bound on tokens per second: the roofline. Where no bandwidth is known, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamac.compiler.config import LLAMA_3_2_1B, LLAMA_3_2_3B, LlamaConfig
from llamac.runtime.errors import SocInvalid, TargetUnknown
from llamac.targets.base import Missing, Scheme
from llamac.targets.registry import distribution_of, load_target, target_names
from llamac.targets.soc import Cluster, Processor, SoC, load_soc, soc_files
from llamac.tools.console import Row

MODELS = {"1B": LLAMA_3_2_1B, "3B": LLAMA_3_2_3B}
LIST_HEADER = ("name", "SoC", "processors", "CPU features", "GB/s", " / ".join(MODELS))
GROUP_SIZE = 32
UNKNOWN = "unknown"
BASE_FEATURES = "base features"


def weight_bytes_per_token(config: LlamaConfig) -> int:
    """Bytes of weights that one decoded token reads.

    Linear layers are int4 with a 16-bit scale per group of 32; the output layer is int8 with a
    float32 scale per row. Norms, activations and the KV cache are left out.
    """
    linear = config.num_linear_weights()
    output = config.vocab_size * config.dim
    return linear // 2 + linear // GROUP_SIZE * 2 + output + config.vocab_size * 4


def roofline_tokens_per_s(bandwidth_gb_s: float, config: LlamaConfig) -> float:
    """Tokens per second at which decode reads its weights with all of the bandwidth."""
    return bandwidth_gb_s * 1e9 / weight_bytes_per_token(config)


def rooflines(soc: SoC) -> dict[str, float]:
    """Roofline of each model in tokens/s; empty where the SoC's bandwidth is not known."""
    if soc.memory is None or soc.memory.bandwidth_gb_s is None:
        return {}
    return {
        model: roofline_tokens_per_s(soc.memory.bandwidth_gb_s, config)
        for model, config in MODELS.items()
    }


@dataclass(frozen=True)
class PluginState:
    """Whether the plug-in of one processor can be used here.

    Attributes:
        kind: of the processor.
        plugin: its name.
        state: "ready", "lacks tools", "broken" or "not installed".
        origin: the distribution that brings it, if it is installed.
        cause: why it is broken.
        missing: what it lacks to compile.
        schemes: ways in which an accelerator computes layers, the default first.
    """

    kind: str
    plugin: str
    state: str
    origin: str | None = None
    cause: str | None = None
    missing: tuple[Missing, ...] = ()
    schemes: tuple[Scheme, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        origin = f" from {self.origin}" if self.origin else ""
        cause = f": {self.cause}" if self.cause else ""
        return f"{self.plugin}{origin}, {self.state}{cause}"


def plugin_state(soc: SoC, processor: Processor) -> PluginState:
    """Load the plug-in of one processor and ask it what it lacks."""
    kind, plugin = processor.kind, processor.plugin
    if plugin not in target_names():
        return PluginState(kind, plugin, "not installed")
    origin = distribution_of(plugin)
    try:
        target = load_target(plugin)(soc)
        missing, schemes = tuple(target.check()), tuple(target.schemes())
    except TargetUnknown as error:
        return PluginState(kind, plugin, "broken", origin, error.cause)
    state = "lacks tools" if missing else "ready"
    return PluginState(kind, plugin, state, origin, None, missing, schemes)


def load_all() -> tuple[list[SoC], list[SocInvalid]]:
    """Read every SoC file; also return the errors of those that are broken."""
    socs, broken = [], []
    for path in soc_files().values():
        try:
            socs.append(load_soc(path))
        except SocInvalid as error:
            broken.append(error)
    return socs, broken


def as_json(soc: SoC) -> dict[str, Any]:
    """Return what the file says, which plug-ins are installed, and the rooflines."""
    installed = target_names()
    return asdict(soc) | {
        "features": soc.features,
        "processors": [asdict(p) | {"installed": p.plugin in installed} for p in soc.processors],
        "roofline_tokens_per_s": {
            model: round(tokens, 1) for model, tokens in rooflines(soc).items()
        },
    }


def list_row(soc: SoC) -> Row:
    """Return one line of the list, in the order of `LIST_HEADER`."""
    installed = target_names()
    bandwidth = UNKNOWN
    if soc.memory and soc.memory.bandwidth_gb_s is not None:
        bandwidth = f"{soc.memory.bandwidth_gb_s:.1f}{'' if soc.memory.is_sourced else '?'}"
    return (
        soc.name,
        soc.marketing_name,
        " ".join(p.kind + ("" if p.plugin in installed else "*") for p in soc.processors),
        " ".join(level.name for level in soc.levels) or " ".join(soc.features) or BASE_FEATURES,
        bandwidth,
        " / ".join(f"{tokens:.1f}" for tokens in rooflines(soc).values()) or UNKNOWN,
    )


def sections(soc: SoC, plugins: Iterable[PluginState]) -> list[tuple[str, list[Row]]]:
    """Return all that is known of one SoC as titled rows of text."""
    head: list[Row] = [("part", f"{soc.vendor} {soc.part}")]
    head.append(("systems", f"{', '.join(soc.os)} on {soc.arch}"))
    if soc.note:
        head.append(("note", soc.note))
    return [
        (f"{soc.name}: {soc.marketing_name}", head),
        ("processors", [row for state in plugins for row in _plugin_rows(state)]),
        ("cores", _core_rows(soc)),
        ("memory", _memory_rows(soc)),
        *([("NPU", npu)] if (npu := _npu_rows(soc)) else []),
        ("decode of Llama 3.2, at most", _roofline_rows(soc)),
    ]


def _plugin_rows(state: PluginState) -> list[Row]:
    lacks = (f"lacks {thing.what}: {thing.why}; {thing.fix}" for thing in state.missing)
    schemes = (f"scheme {scheme.name}: {scheme.summary}" for scheme in state.schemes)
    return [(state.kind, str(state)), *(("", text) for text in (*lacks, *schemes))]


def _source_rows(sources: Sequence[str]) -> list[Row]:
    return [("", f"({text})") for text in sources]


def _core_rows(soc: SoC) -> list[Row]:
    rows: list[Row] = [(cluster.core, _cluster_text(cluster)) for cluster in soc.clusters]
    for level in soc.levels:
        rows.append(("level", f"{level.name}: {' '.join(level.features) or 'runs everywhere'}"))
    return rows + _source_rows(soc.cpu_sources)


def _cluster_text(cluster: Cluster) -> str:
    figures = (
        ("{} of them", cluster.count),
        ("{:.2f} GHz", cluster.max_ghz),
        ("L1d {} KiB", cluster.l1d_kib),
        ("L2 {} KiB", cluster.l2_kib),
    )
    known = [text.format(figure) for text, figure in figures if figure is not None]
    return ", ".join([cluster.role, *known, " ".join(cluster.features) or BASE_FEATURES])


def _memory_rows(soc: SoC) -> list[Row]:
    rows: list[Row] = []
    if soc.memory:
        figure = soc.memory.bandwidth_gb_s
        bandwidth = f"{figure:.1f} GB/s" if figure else UNKNOWN
        rows += [("type", soc.memory.type), ("bandwidth", bandwidth)]
        rows += _source_rows(soc.memory.sources)
    else:
        rows.append(("bandwidth", UNKNOWN))
    if soc.cache:
        sizes = {"L3": soc.cache.l3_kib, "system-level cache": soc.cache.slc_kib}
        rows += [(name, f"{kib} KiB") for name, kib in sizes.items() if kib]
        rows += _source_rows(soc.cache.sources)
    return rows


def _npu_rows(soc: SoC) -> list[Row]:
    rows: list[Row] = []
    if soc.hexagon:
        vtcm = f"{soc.hexagon.vtcm_mib} MiB" if soc.hexagon.vtcm_mib else UNKNOWN
        rows += [("Hexagon", soc.hexagon.version), ("VTCM", vtcm)]
        rows += _source_rows(soc.hexagon.sources)
    if soc.apu:
        figures = (
            ("APU", soc.apu.generation),
            ("MDLA", soc.apu.mdla),
            ("MDLA cores", soc.apu.mdla_cores),
            ("local memory", soc.apu.l1_kib and f"{soc.apu.l1_kib} KiB"),
            ("NeuroPilot", soc.apu.neuropilot),
        )
        rows += [(name, str(figure)) for name, figure in figures if figure is not None]
        rows += _source_rows(soc.apu.sources)
    return rows


def _roofline_rows(soc: SoC) -> list[Row]:
    rows: list[Row] = []
    bounds = rooflines(soc)
    for model, config in MODELS.items():
        bound = f"{bounds[model]:.1f} tokens/s" if bounds else UNKNOWN
        megabytes = weight_bytes_per_token(config) / 1e6
        rows.append((model, f"{bound} ({megabytes:.1f} MB of weights per token)"))
    return rows
