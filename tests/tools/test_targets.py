"""`llamac targets`: what it says of SoCs, plug-ins and rooflines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamac.targets.base import Missing
from llamac.targets.soc import load_soc, soc_files
from llamac.tools import soc_report
from llamac.tools.cli import main
from llamac.tools.soc_report import MODELS, PluginState, roofline_tokens_per_s


@pytest.mark.parametrize(("model", "megabytes"), [("1B", 810.5), ("3B", 1980.0)])
def test_bytes_per_token(model: str, megabytes: float) -> None:
    """The sum over the shapes of Llama 3.2 is the published one, to 0.1 MB."""
    found = soc_report.weight_bytes_per_token(MODELS[model]) / 1e6
    assert found == pytest.approx(megabytes, abs=0.05)


@pytest.mark.parametrize(
    ("gb_s", "tokens_1b", "tokens_3b"),
    [(84.8, 104.6, 42.8), (76.8, 94.8, 38.8), (67.2, 82.9, 33.9), (17.1, 21.1, 8.6)],
)
def test_rooflines(gb_s: float, tokens_1b: float, tokens_3b: float) -> None:
    found = [round(roofline_tokens_per_s(gb_s, config), 1) for config in MODELS.values()]
    assert found == [tokens_1b, tokens_3b]


def test_the_list_has_every_soc(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per SoC; what is missing or not known is said."""
    assert main(["targets"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(soc_files()) <= set(lines)
    assert "htp hvx cpu " in lines["sm8650"]
    assert "94.8 / 38.8" in lines["sm8650"]
    assert "85.3? " in lines["mt6991"]
    assert lines["qcs6490"].split()[-2:] == ["unknown", "unknown"]
    assert "cpu  " in lines["host"]


def test_one_soc_says_where_figures_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "mt6991"]) == 0
    text = capsys.readouterr().out
    for words in (
        "neuropilot from llamac",
        "cortex-x925",
        "(knowledge, not verified",
        "NeuroPilot",
        "105.2 tokens/s (810.5 MB",
    ):
        assert words in text


def test_the_host_is_ready_or_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    """The plug-in of this package loads."""
    assert main(["targets", "host", "--json"]) == 0
    [plugin] = json.loads(capsys.readouterr().out)["plugins"]
    assert plugin["plugin"] == "x86-cpu"
    assert plugin["state"] in {"ready", "lacks tools"}
    assert plugin["cause"] is None


def test_json_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    socs = {soc["name"]: soc for soc in json.loads(capsys.readouterr().out)}
    assert set(socs) == set(soc_files())
    assert socs["sm8550"]["roofline_tokens_per_s"] == {"1B": 82.9, "3B": 33.9}
    assert socs["host"]["roofline_tokens_per_s"] == {}
    assert socs["host"]["processors"] == [{"kind": "cpu", "plugin": "x86-cpu", "installed": True}]
    assert socs["rpi5"]["features"] == ["fp16", "dotprod"]


def test_unknown_soc_is_an_error_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "sm8560"]) == 1
    assert "error[soc-unknown]: no SoC is called 'sm8560'; near: " in capsys.readouterr().err


def test_a_broken_file_is_named_and_the_rest_is_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.toml").write_text("part = 1\n")
    monkeypatch.setenv("LLAMAC_SOC_PATH", str(tmp_path))
    assert main(["targets"]) == 1
    out, err = capsys.readouterr()
    assert "sm8650" in out
    assert "error[soc-invalid]" in err
    assert "broken.toml" in err


def test_what_a_plugin_lacks_is_shown() -> None:
    missing = Missing(what="zig", why="links", fix="pip install ziglang")
    state = PluginState("cpu", "x86-cpu", "lacks tools", "llamac 0.1.0", None, (missing,))
    processors = dict(soc_report.sections(load_soc("host"), [state]))["processors"]
    assert processors == [
        ("cpu", "x86-cpu from llamac 0.1.0, lacks tools"),
        ("", "lacks zig: links; pip install ziglang"),
    ]
