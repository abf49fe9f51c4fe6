"""Which layers of a model stay bfloat16 when it is quantized, from a small TOML file.

    "layers.0.*" = "bfloat16"
    "layers.*.feed_forward.w2" = "bfloat16"
    "output" = "bfloat16"

Keys are globs over names of layers: `layers.<i>.attention.wq`, `wk`, `wv`, `wo`,
`layers.<i>.feed_forward.w1`, `w2`, `w3`, `tok_embeddings` and `output`. The last key that matches
counts. What no key matches is int4 in the blocks and int8 in the two tables.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from llamac.compiler.config import LlamaConfig
from llamac.compiler.quantize import linear_names
from llamac.runtime.errors import CoverageError, UsageError

FORMS = ("int4", "int8", "bfloat16")
TABLES = ("tok_embeddings", "output")

# Layers that one kernel computes together.
_FUSED = (("attention.wq", "attention.wk", "attention.wv"), ("feed_forward.w1", "feed_forward.w3"))


def read_precision(path: Path, config: LlamaConfig, *, rotate: bool) -> frozenset[str]:
    """Read which layers stay bfloat16.

    Args:
        path: of the file.
        config: of the model.
        rotate: whether w2 gets R4.

    Raises:
        UsageError: no such file, not of this form, or a key that matches no layer.
        CoverageError: a form that no kernel reads.
    """
    rules = _read_rules(path)
    forms = dict.fromkeys(linear_names(config), "int4") | dict.fromkeys(TABLES, "int8")
    for pattern, form in rules.items():
        found = [name for name in forms if fnmatchcase(name, pattern)]
        if not found:
            raise UsageError(
                f"{path}: {pattern!r} matches no layer",
                cause="names are like layers.0.attention.wq, layers.3.feed_forward.w2 and output",
                fix=f"use names of this model, which has layers 0 to {config.num_layers - 1}",
            )
        forms |= dict.fromkeys(found, form)
    _check_kernels(forms, config, rotate)
    return frozenset(name for name, form in forms.items() if form == "bfloat16")


def _read_rules(path: Path) -> Mapping[str, str]:
    try:
        rules = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the precision file {path} cannot be read",
            cause=str(error),
            fix='write lines like "layers.0.*" = "bfloat16"',
        ) from error
    for pattern, form in rules.items():
        if form not in FORMS:
            raise UsageError(
                f"{path}: {pattern!r} is {form!r:.60}, not one of {', '.join(FORMS)}",
                cause="a key without quotes is cut at its dots"
                if isinstance(form, dict)
                else "there are three forms of weights",
                fix='write lines like "layers.0.*" = "bfloat16", with the quotes',
            )
    return rules


def _check_kernels(forms: Mapping[str, str], config: LlamaConfig, rotate: bool) -> None:
    """Refuse what the kernels of `compiler/llama.py` have no form for."""
    for name, form in forms.items():
        is_table = name in TABLES
        if form == ("int4" if is_table else "int8"):
            choice = "int8 per row" if is_table else "int4 group-32"
            raise _uncovered(
                f"{name} cannot be {form}",
                f"kernels read {'the two tables' if is_table else 'layers of a block'} as {choice} "
                "or bfloat16 only",
                f"write {choice.split(maxsplit=1)[0]} or bfloat16",
            )
        if rotate and form == "bfloat16" and name.endswith(".w2"):
            raise _uncovered(
                f"{name} cannot be bfloat16 in a rotated model",
                "the kernel of R4 gives int8 codes, which a bfloat16 layer does not read",
                "leave every w2 int4, or quantize without --rotate",
            )
    for layer in range(config.num_layers):
        for parts in _FUSED:
            names = [f"layers.{layer}.{part}" for part in parts]
            if len({forms[name] for name in names}) > 1:
                raise _uncovered(
                    f"{', '.join(names)} are of different forms",
                    "one kernel computes them together",
                    "give all of them the same form",
                )


def _uncovered(message: str, cause: str, fix: str) -> CoverageError:
    return CoverageError(message, cause=cause, fix=fix)
