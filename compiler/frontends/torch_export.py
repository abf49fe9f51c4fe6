"""Front end for exported programs of PyTorch: `torch.export.ExportedProgram`, or a `.pt2` file.

The graph is recognized (`llama_graph.py`), and from there on it is a checkpoint like any other:
matrices of floats or of codes, by Meta's names (`graph_checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.graph_checkpoint import checkpoint_of_graph, find_tokenizer
from llamac.compiler.frontends.llama_graph import recognize_llama

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]


def from_torch(
    program: Path | torch.export.ExportedProgram,
    *,
    tokenizer: Path | None = None,
    requantize: bool = False,
    check_values: bool = True,
    name: str = "model",
    progress: Progress = lambda *_: None,
) -> Checkpoint:
    """Open an exported program; its weights stay where they are until they are read.

    Args:
        program: the program, or a `.pt2` file.
        tokenizer: a tokenizer in tiktoken form, or a `tokenizer.json`; by default
            `tokenizer.model` or `tokenizer.json` beside the file.
        requantize: make linear layers int4 and tables int8, with a loss that the notes tell.
        check_values: check scales and floats of every tensor when it is read.
        name: of the model, if `program` is no file.
        progress: called as progress("layer 3", done, total).

    Raises:
        ModelUnsupported: the graph is no Llama; the message names the value at which it is not.
        CheckpointError: another of its classes.
        TokenizerError: no tokenizer, a damaged one, or one that is not Llama 3's.
    """
    if isinstance(program, Path):
        from llamac.compiler.frontends.pt2 import open_pt2  # noqa: PLC0415

        graph, folder, name = open_pt2(program), program.parent, program.stem
    else:
        from llamac.compiler.frontends.torch_graph import graph_of_program  # noqa: PLC0415

        graph, folder = graph_of_program(program, name), None
    return checkpoint_of_graph(
        graph,
        recognize_llama(graph, progress),
        name=name,
        tokenizer=tokenizer or find_tokenizer(folder),
        requantize=requantize,
        check_values=check_values,
    )
