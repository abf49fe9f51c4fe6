"""`llamac compile` with what cannot be compiled: a clear error, an exit code, and nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.pipeline import compile_bundle
from llamac.compiler.progress import SilentProgress
from llamac.runtime import load
from llamac.runtime.errors import OutputError, UsageError

Copy = Callable[[Path], Path]
Refused = Callable[..., str]
PTH = "consolidated.00.pth"
W1 = "layers.0.feed_forward.w1.weight"


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = torch.load(folder / PTH, weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / PTH)


def edit_params(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    params = json.loads((folder / "params.json").read_text("utf-8"))
    edit(params)
    (folder / "params.json").write_text(json.dumps(params), "utf-8")


class RunsCode:
    """Pickles as a call that would make a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("code-was-run",)


SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": (
        "checkpoint-unreadable",
        lambda f: os.truncate(f / PTH, (f / PTH).stat().st_size // 2),
        "truncated",
    ),
    "runs code": (
        "checkpoint-unsafe",
        lambda f: torch.save({"a": RunsCode()}, f / PTH),
        "posix.mkdir",
    ),
    "missing tensor": ("checkpoint-tensor", lambda f: edit_tensors(f, lambda t: t.pop(W1)), W1),
    "wrong name": (
        "checkpoint-tensor",
        lambda f: edit_tensors(f, lambda t: t.update({"layers.0.extra": t[W1]})),
        "layers.0.extra",
    ),
    "wrong dtype": (
        "checkpoint-tensor",
        lambda f: edit_tensors(f, lambda t: t.update({W1: t[W1].to(torch.int16)})),
        "expected int8",
    ),
    "wrong shape": (
        "checkpoint-tensor",
        lambda f: edit_tensors(f, lambda t: t.update({W1: t[W1][:-1]})),
        "[255, 128]",
    ),
    "codes out of range": (
        "checkpoint-values",
        lambda f: edit_tensors(f, lambda t: t[W1].fill_(8)),
        W1,
    ),
    "scale beyond float16": (
        "checkpoint-values",
        lambda f: edit_tensors(f, lambda t: t["layers.1.feed_forward.w2.scales"].fill_(1e6)),
        "layers.1.feed_forward.w2.scales",
    ),
    "no dim": ("checkpoint-params", lambda f: edit_params(f, lambda p: p.pop("dim")), "dim is"),
    "no group size": (
        "checkpoint-params",
        lambda f: edit_params(f, lambda p: p["quantization_args"].pop("group_size")),
        "quantization_args.group_size is missing",
    ),
    "no params.json": ("checkpoint-missing", lambda f: (f / "params.json").unlink(), "params.json"),
    "no tokenizer": ("tokenizer", lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "no weights": ("checkpoint-missing", lambda f: (f / PTH).unlink(), "consolidated.00.pth"),
    "R4 that cannot be": (
        "model-unsupported",
        lambda f: edit_params(f, lambda p: p.update(multiple_of=96)),
        "288",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_checkpoint_has_its_own_error(
    case: str, tiny: Path, copied: Copy, refused: Refused, one_level: str, tmp_path: Path
) -> None:
    error, spoil, words = SPOILED[case]
    model, out = copied(tiny / "spinquant"), tmp_path / "bundles" / "out"
    spoil(model)
    printed = refused("compile", model, "--target", one_level, "-o", out, error=error)
    assert words in printed
    assert not list(out.parent.iterdir())
    assert not Path("code-was-run").exists()


OPTIONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "unknown target": (("--target", "sm8560"), "soc-unknown", "sm8650"),
    "no such processor": (("--processors", "npu"), "target-unknown", "'npu'"),
    "no context": (("--context", "0"), "usage", "0"),
    "no room for an answer": (("--context", "1"), "usage", "2 to 131072"),
    "enormous context": (("--context", "1000000000000"), "usage", "131072"),
    "chunks in no order": (("--chunks", "8,32"), "usage", "largest first"),
    "chunk of one": (("--chunks", "8,1"), "usage", "2 to 1024"),
    "enormous chunk": (("--chunks", "1000000"), "usage", "2 to 1024"),
    "chunks that are no numbers": (("--chunks", "8,x"), "usage", "8,x"),
    "no threads": (("--threads", "0"), "usage", "0"),
    "a cache of nothing": (("--kv-cache", "int4"), "usage", "int4"),
    "a name of two lines": (("--name", "a\nb"), "usage", "one line"),
    "an empty name": (("--name", ""), "usage", "one line"),
    "a RoPE factor that shrinks": (("--rope-factor", "0.5"), "usage", "0.5"),
    "another tokenizer": (("--tokenizer", "/nowhere"), "tokenizer", "/nowhere"),
    "no text to verify with": (("--verify-text", "/nowhere"), "usage", "/nowhere"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_has_its_own_error(
    case: str, tiny: Path, refused: Refused, one_level: str, tmp_path: Path
) -> None:
    arguments, error, words = OPTIONS[case]
    out = tmp_path / "bundles" / "out"
    command = ("compile", tiny / "spinquant", "--target", one_level, "-o", out)
    assert words in refused(*command, *arguments, error=error)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_from_python_zero_is_no_default(tiny: Path, one_level: str, tmp_path: Path) -> None:
    """A context of 0 tokens is an error and not another way to say 8192."""
    config = CompileConfig(tiny / "spinquant", one_level, tmp_path / "out", context_length=0)
    with pytest.raises(UsageError, match="0 tokens"):
        compile_bundle(config, SilentProgress())


def test_an_output_that_is_there_is_kept(
    tiny: Path, refused: Refused, one_level: str, tmp_path: Path
) -> None:
    """A file or a folder of that name is not touched; a file is no place for a folder either."""
    (tmp_path / "file").write_text("precious")
    model = tiny / "spinquant"
    refused("compile", model, "--target", one_level, "-o", tmp_path / "file", error="output")
    below = tmp_path / "file" / "out"
    refused("compile", model, "--target", one_level, "-o", below, error="output")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "precious")]


def test_a_name_may_hold_any_printable_character(tiny: Path, compiled: Callable[..., Path]) -> None:
    """The name goes into C source, into the manifest and back out of the library."""
    name = 'Käse "??/ %s \\ {x} Lama'
    with load(compiled(tiny / "bf16", chunks=(8,), name=name)) as model:
        assert model.info.model_name == model.manifest.model.name == name


LIMITED = """
import resource, sys
from llamac.compiler import pipeline
from llamac.tools.cli import main

pipeline.check_space = lambda folder, needed: None  # the disk fills while we write
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def is_mounted(folder: Path, size: str) -> bool:
    """Mount a small file system of its own, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("size", "stage"),
    [
        pytest.param("400k", "pack weights", marks=pytest.mark.slow),
        ("900k", "build the library"),
    ],
)
def test_a_full_disk_leaves_nothing(
    size: str, stage: str, tiny: Path, one_level: str, tmp_path: Path
) -> None:
    """Weights or kernels meet the end of the disk; without the right to mount, a limit on files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = is_mounted(folder, size)
    limit, reason = (1 << 40, "the disk is full") if mounted else (300_000, "refused to write")
    options = (
        "--target",
        one_level,
        "-o",
        str(folder / "out"),
        "--chunks",
        "8",
        "--context",
        "512",
    )
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                LIMITED,
                str(limit),
                "compile",
                str(tiny / "spinquant"),
                *options,
            ],
            env=os.environ | {"LLAMAC_KERNEL_CACHE": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "error[output]: " in done.stderr and reason in done.stderr, done.stderr
        assert f"{stage}: stopped" in done.stderr or not mounted
        assert not list(folder.iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_too_little_space_is_refused_at_once(
    tiny: Path, one_level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything large is written, the free space is compared with the plan."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000_000}))
    config = CompileConfig(tiny / "spinquant", one_level, tmp_path / "out", chunks=(8,))
    with pytest.raises(OutputError, match="the disk has 10 MB"):
        compile_bundle(config, SilentProgress())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        pytest.param("read the checkpoint ...", 0.0, marks=pytest.mark.slow),
        pytest.param("pack weights ...", 0.0, marks=pytest.mark.slow),
        ("build the library ...", 0.0),
        pytest.param("build the library ...", 0.5, marks=pytest.mark.slow),
        pytest.param("build the library ...", 1.0, marks=pytest.mark.slow),
        pytest.param("build the library ...", 1.5, marks=pytest.mark.slow),
        pytest.param("build the library ...", 1.9, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_nothing(
    line: str, seconds: float, tiny: Path, one_level: str, tmp_path: Path
) -> None:
    """Whenever it comes: a word, the exit code of an interrupt, and an empty folder."""
    options = ("--target", one_level, "-o", str(tmp_path / "out"))
    command = [sys.executable, "-P", "-m", "llamac.tools.cli", "compile", str(tiny / "spinquant")]
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLAMAC_KERNEL_CACHE": "0"},
    )
    assert process.stderr is not None
    for printed in process.stderr:
        if printed.startswith(line):
            break
    try:
        process.wait(timeout=seconds or 0.001)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    # Python itself ends by the signal if it came while it executed a string, as dataclasses do.
    assert process.wait(timeout=60) in (130, -signal.SIGINT), rest
    assert rest.endswith("interrupted\n"), rest
    assert not list(tmp_path.iterdir())
