"""SoC descriptions: one TOML file per SoC, read into frozen dataclasses.

The dataclasses below *are* the schema: a key of the file is a field of the class, a field without
default must be there, and a nested class is a table. What a file does not say stays `None`: figures
are never guessed, and `sources` says where those that are there come from.

    soc/sm8650.toml ──▶ load_soc("sm8650") ──▶ SoC(clusters=(Cluster, ...), memory=Memory, ...)
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llamac.runtime.errors import SocInvalid, SocUnknown

SOC_PATH_VARIABLE = "LLAMAC_SOC_PATH"
"""Folders with SoC files of the user, separated as in PATH; they come before our own."""

FEATURES = {
    "x86_64": frozenset(
        "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni avxvnni".split()
    ),
    "aarch64": frozenset("fp16 dotprod i8mm bf16 sve sve2 sme sme2".split()),
}
"""CPU features a SoC file may name, per architecture: LLVM's words, but "fp16" for "fullfp16"."""

SYSTEMS = {
    "linux": "linux-gnu",
    "android": "linux-gnu",
    "macos": "apple-macosx",
    "ios": "apple-ios",
}
"""Operating systems a SoC file may name, with the end of LLVM's triple for their code."""

_LLVM_FEATURE = {"fp16": "fullfp16"}
_SOURCES = ("sourced: ", "knowledge, not verified")
_BUILT_IN = Path(__file__).parent / "soc"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def _rule(expected: str, pattern: str = "", choices: tuple[str, ...] = ()) -> dict[str, Any]:
    """Metadata of a field whose text must match a pattern or be one of some words."""
    return {"expected": expected, "pattern": pattern or "|".join(map(re.escape, choices))}


def _choice(*choices: str) -> dict[str, Any]:
    return _rule("one of " + ", ".join(choices), choices=choices)


_IS_SOURCE = _rule(f'"{_SOURCES[0]}..." or "{_SOURCES[1]}"', rf"{_SOURCES[0]}.+|{_SOURCES[1]}.*")
_IS_NAME = _rule("a lower-case name", _NAME.pattern)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal cores of one kind, as the operating system shows them.

    Attributes:
        core: the maker's name of the core, "cortex-x4".
        mcpu: what LLVM calls it, or the nearest core that it knows.
        role: "prime", "big" or "little"; the threads of a model run on prime and big cores.
        features: what user programs may use, in the words of `FEATURES`; a feature that the
            silicon has but phones hide (SVE on several) is left out.
        count: number of cores.
        max_ghz: highest clock, GHz.
        l1d_kib: L1 data cache of one core, KiB.
        l2_kib: L2 cache of one core, or of the cluster where its cores share it, KiB.
    """

    core: str = field(metadata=_IS_NAME)
    mcpu: str = field(metadata=_IS_NAME)
    role: str = field(metadata=_choice("prime", "big", "little"))
    features: tuple[str, ...]
    count: int | None = None
    max_ghz: float | None = None
    l1d_kib: int | None = None
    l2_kib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """One set of kernels of a library that holds several; the best that fits is used at load.

    Attributes:
        name: as in the manifest, "avx512vnni".
        features: all that must be present, in the words of `FEATURES`.
    """

    name: str = field(metadata=_IS_NAME)
    features: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Caches that all cores share: L3 of the cores, system-level cache of the whole SoC (KiB)."""

    sources: tuple[str, ...] = field(metadata=_IS_SOURCE)
    l3_kib: int | None = None
    slc_kib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory: its type ("LPDDR5X-9600") and theoretical bandwidth in GB/s (10^9 bytes)."""

    type: str
    sources: tuple[str, ...] = field(metadata=_IS_SOURCE)
    bandwidth_gb_s: float | None = None

    @property
    def is_sourced(self) -> bool:
        """Whether all of it was read somewhere that `sources` names, nothing from memory."""
        return all(text.startswith(_SOURCES[0]) for text in self.sources)


@dataclass(frozen=True, kw_only=True)
class Hexagon:
    """Qualcomm's compute DSP, which carries HVX and HTP: version "v75", VTCM in MiB."""

    version: str = field(metadata=_rule('a version such as "v75"', r"v\d\d"))
    sources: tuple[str, ...] = field(metadata=_IS_SOURCE)
    vtcm_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Apu:
    """MediaTek's AI processor.

    Attributes:
        generation: MediaTek's name, "APU 790".
        sources: where the figures come from.
        neuropilot: major version of the NeuroPilot SDK that compiles for it.
        mdla: version of the deep learning accelerator in it, "5.5".
        mdla_cores: number of those.
        l1_kib: local memory of the accelerators, KiB.
        compiler_options: more for MediaTek's offline compiler, each one word: "--opt-footprint".
    """

    generation: str
    sources: tuple[str, ...] = field(metadata=_IS_SOURCE)
    neuropilot: int | None = None
    mdla: str | None = field(default=None, metadata=_rule('a version such as "5.5"', r"\d\.\d"))
    mdla_cores: int | None = None
    l1_kib: int | None = None
    compiler_options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Processor:
    """One processor of a SoC ("cpu", "hvx", "htp", "apu") and the target plug-in that serves it."""

    kind: str = field(metadata=_IS_NAME)
    plugin: str = field(metadata=_IS_NAME)


@dataclass(frozen=True, kw_only=True)
class SoC:
    """One SoC, as its TOML file describes it.

    Attributes:
        name: the file's stem, part number in lower case: "sm8650".
        part: the maker's part number or numbers.
        marketing_name: what the box of a phone says.
        vendor: who makes it.
        arch: "x86_64" or "aarch64".
        os: operating systems that run on it; bundles are made for those that the plug-in builds
            for, and a SoC that has none of them is data only.
        processors: in order of preference; a model's operations go to the first that takes them.
        cpu_sources: where the figures of the clusters come from.
        clusters: CPU cores, fastest first.
        levels: sets of kernels that one library carries, best first; empty: one, for `features`.
        note: anything a user of this SoC should know.
    """

    name: str
    part: str
    marketing_name: str
    vendor: str
    arch: str = field(metadata=_choice("x86_64", "aarch64"))
    os: tuple[str, ...] = field(metadata=_choice(*SYSTEMS))
    cpu_sources: tuple[str, ...] = field(metadata=_IS_SOURCE)
    processors: tuple[Processor, ...]
    clusters: tuple[Cluster, ...]
    levels: tuple[Level, ...] = ()
    cache: Cache | None = None
    memory: Memory | None = None
    hexagon: Hexagon | None = None
    apu: Apu | None = None
    note: str | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features that every cluster has, so that a thread may run anywhere."""
        common = set.intersection(*(set(cluster.features) for cluster in self.clusters))
        return tuple(name for name in self.clusters[0].features if name in common)

    @property
    def num_cores(self) -> int | None:
        """Number of CPU cores, or None where a cluster's count is not known."""
        counts = [cluster.count for cluster in self.clusters if cluster.count is not None]
        return sum(counts) if len(counts) == len(self.clusters) else None

    def processor(self, kind: str) -> Processor | None:
        """Return the processor of that kind, or None."""
        return next((p for p in self.processors if p.kind == kind), None)


def cpu_tvm_target(soc: SoC) -> dict[str, Any]:
    """Describe to TVM what all cores of a SoC's CPU have: the dict that `tvm.target.Target` takes.

    Arm features are listed one by one, present and absent: the name of a core alone would switch on
    all that its silicon has, and phones hide some of that (the program would die of SIGILL).
    """
    mattr = [f"+{_LLVM_FEATURE.get(name, name)}" for name in soc.features]
    if soc.arch == "aarch64":
        absent = sorted(FEATURES[soc.arch] - set(soc.features))
        # Minus first: LLVM reads from left to right, and "-sve" also drops what builds on it.
        mattr = [f"-{_LLVM_FEATURE.get(name, name)}" for name in absent] + mattr
    target = {
        "kind": "llvm",
        "keys": ["arm_cpu", "cpu"] if soc.arch == "aarch64" else ["cpu"],
        "mtriple": f"{soc.arch}-{SYSTEMS[soc.os[0]]}",
        "mcpu": soc.clusters[0].mcpu,
        "mattr": mattr,
    }
    return target if soc.num_cores is None else target | {"num-cores": soc.num_cores}


def soc_files() -> dict[str, Path]:
    """Find every SoC file, by name, those of $LLAMAC_SOC_PATH before ours of the same name."""
    folders = [Path(text) for text in os.environ.get(SOC_PATH_VARIABLE, "").split(os.pathsep)]
    found: dict[str, Path] = {}
    for folder in [*(f for f in folders if f != Path()), _BUILT_IN]:
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load_soc(name_or_path: str | Path) -> SoC:
    """Read one SoC file.

    Args:
        name_or_path: "sm8650", or the path of a TOML file.

    Raises:
        SocUnknown: there is no such file; the message lists names that are near.
        SocInvalid: the file breaks the schema; file, key, what was expected and found are named.
    """
    text = str(name_or_path)
    if text.endswith(".toml") or os.sep in text:
        return _read_file(Path(name_or_path))
    files = soc_files()
    if text in files:
        return _read_file(files[text])
    near = difflib.get_close_matches(text.lower(), files, n=3, cutoff=0.5)
    raise SocUnknown(
        f"no SoC is called {text!r}" + (f"; near: {', '.join(near)}" if near else ""),
        cause=f"there is no file {text}.toml among ours nor in ${SOC_PATH_VARIABLE}",
        fix="`llamac targets` lists the names; a path to a TOML file of your own works too",
    )


def _read_file(path: Path) -> SoC:
    if not path.is_file():
        raise SocUnknown(
            f"no SoC file {path}",
            cause="the path does not name a file",
            fix="give a name from `llamac targets`, or the path of a SoC file",
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _invalid(path, "", "a readable TOML file in UTF-8", str(error)) from error
    if not _NAME.fullmatch(path.stem):
        raise _invalid(path, "", "a file name of lower-case letters, digits and -", path.stem)
    if "name" in table:
        raise _invalid(path, "name", "no such key (the file's name is the name)", table["name"])
    soc: SoC = _read_table(SoC, table | {"name": path.stem}, path, "")
    _check_whole(soc, path)
    return soc


def _check_whole(soc: SoC, path: Path) -> None:
    """Check what one field alone cannot tell."""
    groups: dict[str, tuple[Cluster | Level, ...]] = {
        "clusters": soc.clusters,
        "levels": soc.levels,
    }
    for key, tables in groups.items():
        for index, table in enumerate(tables):
            unknown = set(table.features) - FEATURES[soc.arch]
            if unknown:
                expected = "only " + ", ".join(sorted(FEATURES[soc.arch]))
                raise _invalid(path, f"{key}[{index}].features", expected, sorted(unknown))
    names = [level.name for level in soc.levels]
    if len(set(names)) != len(names):
        raise _invalid(path, "levels", "each name once", names)
    kinds = [processor.kind for processor in soc.processors]
    if len(set(kinds)) != len(kinds):
        raise _invalid(path, "processors", "each kind once", kinds)
    for kind, name in (("hvx", "hexagon"), ("htp", "hexagon"), ("apu", "apu")):
        if kind in kinds and getattr(soc, name) is None:
            raise _invalid(path, name, f"a table, because there is a processor {kind!r}", "none")


_TYPES = {
    cls: get_type_hints(cls)
    for cls in (SoC, Processor, Cluster, Level, Cache, Memory, Hexagon, Apu)
}
"""The types of each table's keys."""


def _read_table(cls: type[Any], table: object, path: Path, key: str) -> Any:
    """Make a `cls` from a table of the file, checking every key of it."""
    if not isinstance(table, dict):
        raise _invalid(path, key, "a table", table)
    schema, types = {f.name: f for f in fields(cls)}, _TYPES[cls]
    prefix = f"{key}." if key else ""
    for name in table:
        if name not in schema:
            near = difflib.get_close_matches(name, schema, n=1)
            hint = f"{near[0]}?" if near else "one of " + ", ".join(schema)
            raise _invalid(path, prefix + name, f"a known key ({hint})", "an unknown one")
    values = {}
    for name, spec in schema.items():
        if name in table:
            values[name] = _read_value(types[name], table[name], spec.metadata, path, prefix + name)
        elif spec.default is MISSING:
            raise _invalid(path, prefix + name, "a value", "nothing")
    return cls(**values)


def _read_value(hint: Any, value: object, rule: Any, path: Path, key: str) -> Any:
    """Check one value against its type hint and its rule, and convert it."""
    if isinstance(hint, UnionType):  # "int | None": None is said by leaving the key out
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _invalid(path, key, "a list", value)
        item = get_args(hint)[0]
        read = [_read_value(item, v, rule, path, f"{key}[{i}]") for i, v in enumerate(value)]
        if not read and (rule or item in _TYPES):
            raise _invalid(path, key, "at least one entry", "none")
        return tuple(read)
    if hint in _TYPES:
        return _read_table(hint, value, path, key)
    if hint is str:
        expected = rule.get("expected", "a text that is not empty")
        if not isinstance(value, str) or not re.fullmatch(rule.get("pattern") or ".+", value):
            raise _invalid(path, key, expected, value)
        return value
    accepted = (int, float) if hint is float else (int,)
    if isinstance(value, bool) or not isinstance(value, accepted) or value <= 0:
        expected = "a number above 0" if hint is float else "a whole number above 0"
        raise _invalid(path, key, expected, value)
    return hint(value)


def _invalid(path: Path, key: str, expected: str, found: object) -> SocInvalid:
    where = f"{path}: {key}" if key else str(path)
    return SocInvalid(
        f"{where}: expected {expected}, found {found!r}",
        cause="the SoC file breaks the schema of targets/soc.py",
        fix="correct the file; docs/adding-a-target.md shows one with every key",
    )
