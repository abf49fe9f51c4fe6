"""SoC files: ours are right, wrong ones are named with file, key, what was expected and found."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamac.runtime.errors import SocInvalid, SocUnknown, ToolchainMissing
from llamac.schedules.intrin.arm_levels import ARM_LEVELS
from llamac.schedules.intrin.x86 import X86_LEVELS
from llamac.targets.arm_cpu import ArmCpu
from llamac.targets.registry import load_target, make_target, target_names
from llamac.targets.soc import FEATURES, SoC, cpu_tvm_target, load_soc, soc_files
from llamac.targets.x86_cpu import X86Cpu

PHONES = "sm8350 sm8450 sm8550 sm8650 sm8750 sm8850 mt6983 mt6985 mt6989 mt6991 mt6993 mt6897"
BOARDS = "host rpi5 qcs6490 genio1200 graviton3 armv8 armv8-dotprod"
APPLE = "apple-m1 apple-m4 apple-a17-pro"
ALL = [*BOARDS.split(), *PHONES.split(), *APPLE.split()]

VALID: dict[str, Any] = {
    "part": "P1",
    "marketing_name": "Phone One",
    "vendor": "V",
    "arch": "aarch64",
    "os": ["android"],
    "cpu_sources": ["knowledge, not verified"],
    "processors": [{"kind": "htp", "plugin": "qnn-htp"}, {"kind": "cpu", "plugin": "arm-cpu"}],
    "clusters": [
        {"core": "c1", "mcpu": "cortex-x4", "role": "prime", "features": ["dotprod", "i8mm"]},
        {"core": "c2", "mcpu": "cortex-a520", "role": "little", "features": ["fp16", "dotprod"]},
    ],
    "hexagon": {"version": "v75", "sources": ["sourced: a page"]},
}


def toml(value: Any) -> str:
    """Write one value as TOML (tables inline)."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def write(folder: Path, table: dict[str, Any], name: str = "p1") -> Path:
    """Write a SoC file."""
    path = folder / f"{name}.toml"
    lines = [f'"{key}" = {toml(value)}' for key, value in table.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def changed(key: str, value: Any) -> dict[str, Any]:
    """Return VALID with one value set; key as in messages: `clusters[0].core`."""
    table = copy.deepcopy(VALID)
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    place: Any = table
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    return table


def test_the_socs_of_the_issue_are_there() -> None:
    """Every SoC that llamac promises has a file, and every file is of one of them."""
    assert sorted(soc_files()) == sorted(ALL)


@pytest.mark.parametrize("name", ALL)
def test_our_files_are_valid(name: str) -> None:
    """Each file loads; its plug-ins exist; the CPU comes last and serves all."""
    soc = load_soc(name)
    assert soc.name == name
    assert {p.plugin for p in soc.processors} <= {*target_names(), "x86-cpu"}
    assert soc.processors[-1].kind == "cpu"
    clocks = [cluster.max_ghz for cluster in soc.clusters if cluster.max_ghz]
    assert clocks == sorted(clocks, reverse=True)


def test_host_levels_are_those_of_the_kernels() -> None:
    """The SoC file promises exactly the levels, in their order, that kernels are generated for."""
    said = [(level.name, sorted(level.features)) for level in load_soc("host").levels]
    assert said == [(isa.name, sorted(isa.features)) for isa in X86_LEVELS]


def test_arm_levels_of_files_are_those_of_the_kernels() -> None:
    """A level that a file lists has the features that its kernels are generated for.

    Kernels may ask for a length of vectors behind the feature ("sve256"), which files do not say.
    """
    features = {
        isa.name: sorted(re.sub(r"^(sve|sme)\d{3}$", r"\1", word) for word in isa.features)
        for isa in ARM_LEVELS
    }
    levels = [level for name in ALL if name != "host" for level in load_soc(name).levels]
    assert levels
    for level in levels:
        assert sorted(level.features) == features.get(level.name, sorted(level.features))


def test_plugins_know_the_levels_that_they_have_kernels_for() -> None:
    """The names are in the plug-ins, where they are compared without importing TVM."""
    assert {isa.name for isa in X86_LEVELS} == X86Cpu.known_levels
    assert {isa.name for isa in ARM_LEVELS} <= ArmCpu.known_levels


@pytest.mark.parametrize(("name", "plugin"), [("host", "x86-cpu"), ("graviton3", "arm-cpu")])
def test_a_misspelt_level_is_named_with_those_that_there_are(
    name: str, plugin: str, tmp_path: Path
) -> None:
    """It is not dropped silently, for the library would lack its best kernels."""
    text = Path(soc_files()[name]).read_text("utf-8")
    first = load_soc(name).levels[0].name
    path = tmp_path / "board.toml"
    path.write_text(text.replace(f'"{first}"\n', f'"{first}x"\n', 1), "utf-8")
    known = {"x86-cpu": X86Cpu, "arm-cpu": ArmCpu}[plugin].known_levels
    with pytest.raises(SocInvalid) as caught:
        load_target(plugin)(load_soc(path))
    expected = f"board: levels[0].name: expected one of {', '.join(sorted(known))}"
    assert expected in caught.value.message
    assert f"found '{first}x'" in caught.value.message
    assert plugin in caught.value.cause


@pytest.mark.parametrize("name", APPLE.split())
def test_apples_chips_are_data(name: str) -> None:
    """No library can be made for them, which is said before any work; the roofline is known."""
    soc = load_soc(name)
    assert soc.memory is not None
    assert soc.memory.bandwidth_gb_s is not None
    [missing] = ArmCpu(soc).check()
    assert missing.what == f"a library flavour for {soc.os[0]}"
    with pytest.raises(ToolchainMissing, match="arm-cpu lacks a library flavour for") as caught:
        make_target("arm-cpu", soc)
    assert f"the SoC file of {name} is data" in caught.value.cause
    assert "linux or android" in caught.value.fix


@pytest.mark.parametrize("name", sorted({*ALL} - {*APPLE.split(), "host"}))
def test_the_arm_plugin_serves_every_other_arm_soc(name: str) -> None:
    assert make_target("arm-cpu", load_soc(name)).soc.name == name


@pytest.mark.parametrize(
    ("name", "gb_s", "is_sourced"),
    [
        ("sm8750", 84.8, True),
        ("sm8650", 76.8, True),
        ("sm8550", 67.2, True),
        ("sm8350", 51.2, False),
        ("mt6991", 85.3, False),
        ("mt6989", 76.8, False),
        ("rpi5", 17.1, True),
        ("graviton3", 307.2, True),
        ("apple-m4", 120.0, True),
        ("apple-m1", 68.3, False),
    ],
)
def test_bandwidths_and_whether_they_are_sourced(name: str, gb_s: float, is_sourced: bool) -> None:
    """Figures that were only remembered are marked as such."""
    memory = load_soc(name).memory
    assert memory is not None
    assert (memory.bandwidth_gb_s, memory.is_sourced) == (gb_s, is_sourced)


def test_unknown_figures_stay_unknown() -> None:
    """No bandwidth is invented for a board whose memory differs, nor for any computer."""
    memory = load_soc("qcs6490").memory
    assert memory is not None
    assert memory.bandwidth_gb_s is None
    assert load_soc("host").memory is None
    assert load_soc("host").num_cores is None


def test_features_are_those_of_all_clusters(tmp_path: Path) -> None:
    """A thread may run on any core, so only common features count."""
    soc = load_soc(write(tmp_path, VALID))
    assert soc.features == ("dotprod",)
    assert soc.processor("cpu") == soc.processors[1]
    assert soc.processor("apu") is None


def test_hidden_features_are_switched_off_for_llvm() -> None:
    """A Cortex-X4 has SVE2 in silicon and the phone hides it: LLVM must be told."""
    target = cpu_tvm_target(load_soc("sm8650"))
    assert target["mcpu"] == "cortex-x4"
    assert {"-sve", "-sve2", "-sme", "+i8mm", "+dotprod", "+fullfp16"} <= set(target["mattr"])
    assert target["num-cores"] == 8


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(SocUnknown, match="sm8650") as caught:
        load_soc("SM865O")
    assert "llamac targets" in caught.value.fix


def test_missing_path_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(SocUnknown, match=r"nothing\.toml"):
        load_soc(tmp_path / "nothing.toml")


def test_users_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in $LLAMAC_SOC_PATH adds a SoC, and replaces ours of the same name."""
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write(folder, VALID | {"vendor": folder.name}, "sm8650")
    write(second, VALID, "p1")
    monkeypatch.setenv("LLAMAC_SOC_PATH", os.pathsep.join([str(first), "", str(second)]))
    assert load_soc("sm8650").vendor == "a"
    assert load_soc("p1").part == "P1"
    assert load_soc("sm8550").vendor == "Qualcomm"
    assert "p1" in soc_files()


BAD = {
    "a misspelt key": (changed("vender", "V"), ["vender", "vendor?"]),
    "a misspelt key inside": (
        changed("clusters[0].l2_kb", 512),
        ["clusters[0].l2_kb", "l2_kib?"],
    ),
    "a wrong type": (changed("clusters[1].count", "four"), ["clusters[1].count", "'four'"]),
    "true is no number": (changed("clusters[0].count", True), ["whole number", "True"]),
    "a negative figure": (changed("clusters[0].max_ghz", -1.5), ["above 0", "-1.5"]),
    "a fraction of a core": (changed("clusters[0].count", 1.5), ["whole number", "1.5"]),
    "an unknown word": (changed("arch", "mips"), ["arch", "x86_64, aarch64", "'mips'"]),
    "an unknown word in a list": (changed("os", ["linux", "beos"]), ["os[1]", "'beos'"]),
    "no system": (changed("os", []), ["os", "at least one"]),
    "no sources": (changed("cpu_sources", []), ["cpu_sources", "at least one"]),
    "a level twice": (
        VALID | {"levels": [{"name": "neon", "features": []}] * 2},
        ["levels", "each name once"],
    ),
    "an unknown role": (changed("clusters[0].role", "huge"), ["prime, big, little", "'huge'"]),
    "a feature of another arch": (
        changed("clusters[1].features", ["avx2"]),
        ["clusters[1].features", "dotprod", "avx2"],
    ),
    "no source": (changed("cpu_sources", ["the web"]), ["cpu_sources[0]", "sourced: "]),
    "a text for a list": (changed("os", "linux"), ["os", "a list"]),
    "a text for a table": (changed("hexagon", "v75"), ["hexagon", "a table"]),
    "an empty text": (changed("part", ""), ["part", "not empty"]),
    "no cluster": (changed("clusters", []), ["clusters", "at least one"]),
    "a wrong version": (changed("hexagon.version", "75"), ["hexagon.version", "v75"]),
    "a processor twice": (
        changed("processors[0].kind", "cpu"),
        ["processors", "each kind once"],
    ),
    "an NPU without a table": (
        {key: value for key, value in VALID.items() if key != "hexagon"},
        ["hexagon", "'htp'", "none"],
    ),
    "a name": (changed("name", "other"), ["name", "file's name"]),
    **{
        f"no {key}": ({k: v for k, v in VALID.items() if k != key}, [key, "a value", "nothing"])
        for key in VALID
        if key != "hexagon"
    },
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_named_with_key_expected_and_found(case: str, tmp_path: Path) -> None:
    table, words = BAD[case]
    path = write(tmp_path, table)
    with pytest.raises(SocInvalid) as caught:
        load_soc(path)
    for word in (str(path), "expected", "found", *words):
        assert word in caught.value.message


@pytest.mark.parametrize("content", [b"part = ", b"\xff\xfe", b"part = 1\npart = 2"])
def test_a_file_that_is_no_toml_is_invalid(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p1.toml"
    path.write_bytes(content)
    with pytest.raises(SocInvalid, match="TOML"):
        load_soc(path)


def test_the_file_name_is_checked(tmp_path: Path) -> None:
    """The name becomes a TVM tag and a folder, so it is kept simple."""
    with pytest.raises(SocInvalid, match="lower-case"):
        load_soc(write(tmp_path, VALID, "My SoC"))


LEAF = st.one_of(
    st.integers(-2, 2), st.floats(allow_nan=False), st.booleans(), st.sampled_from(["", "x", "v75"])
)
ANY = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["a", "kind"]), inner)
    ),
)
KEYS = sorted({*VALID, "levels", "cache", "memory", "apu", "note"})


@given(key=st.sampled_from(KEYS), value=ANY)
def test_any_value_gives_a_soc_or_soc_invalid(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    """No content of a file raises anything but our own error."""
    path = write(tmp_path_factory.getbasetemp(), VALID | {key: value})
    try:
        tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError:
        pytest.fail("the test must write TOML")
    try:
        assert isinstance(load_soc(path), SoC)
    except SocInvalid as error:
        assert str(path) in error.message


def test_every_feature_word_is_llvms() -> None:
    """LLVM knows every core and every feature that a SoC file may name."""
    program = """
import sys
from llamac.targets.soc import FEATURES, cpu_tvm_target, load_soc, soc_files
import tvm
from tvm.target import codegen
for name in soc_files():
    soc = load_soc(name)
    target = tvm.target.Target(cpu_tvm_target(soc))
    cores = set(map(str, codegen.llvm_get_cpu_archlist(target)))
    print([c.mcpu for c in soc.clusters if c.mcpu not in cores])
for arch, words in FEATURES.items():
    target = {"kind": "llvm", "mtriple": f"{arch}-linux-gnu"}
    features = set(map(str, codegen.llvm_get_cpu_features(tvm.target.Target(
        target | {"mattr": [f"+{'fullfp16' if w == 'fp16' else w}" for w in words]}))))
    print([w for w in words if ("fullfp16" if w == "fp16" else w) not in features])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert set(result.stdout.splitlines()) == {"[]"}
    assert "not valid" not in result.stderr
    assert "not recognized" not in result.stderr


def test_features_are_lower_case_words() -> None:
    """Each word can stand in a list of a manifest."""
    assert all(word.isalnum() and word.islower() for words in FEATURES.values() for word in words)


@pytest.mark.parametrize("module", ["llamac.targets", "llamac.tools.soc_report"])
def test_listing_targets_needs_no_tvm(module: str) -> None:
    """SoCs and plug-ins are listed without the second that TVM takes to import."""
    program = f"import sys, {module}; print([m for m in ('tvm', 'torch') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
