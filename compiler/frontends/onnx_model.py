"""Front end for ONNX files, as PyTorch's exporter, Optimum or onnxruntime-genai write them.

The graph is recognized (`llama_graph.py`), and from there on it is a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llamac.compiler.checkpoint import Checkpoint
from llamac.compiler.frontends.graph_checkpoint import checkpoint_of_graph, find_tokenizer
from llamac.compiler.frontends.llama_graph import recognize_llama
from llamac.compiler.frontends.onnx_file import OnnxFile
from llamac.compiler.frontends.onnx_form import find_model
from llamac.compiler.frontends.onnx_graph import OnnxGraph

Progress = Callable[[str, int, int], None]


def from_onnx(
    path: Path,
    *,
    tokenizer: Path | None = None,
    requantize: bool = False,
    check_values: bool = True,
    progress: Progress = lambda *_: None,
) -> Checkpoint:
    """Open an ONNX model; its weights stay in their files until they are read.

    Args:
        path: of the model, or of a folder with `model.onnx` in it.
        tokenizer: a tokenizer in tiktoken form, or a `tokenizer.json`; by default
            `tokenizer.model` or `tokenizer.json` beside the model.
        requantize: make linear layers int4 and tables int8, with a loss that the notes tell.
        check_values: check scales and floats of every tensor when it is read.
        progress: called as progress("layer 3", done, total).

    Raises:
        ModelUnsupported: the graph is no Llama; the message names the value at which it is not.
        CheckpointError: another of its classes.
        TokenizerError: no tokenizer, a damaged one, or one that is not Llama 3's.
    """
    model = find_model(Path(path)) or Path(path)
    graph = OnnxGraph(OnnxFile(model)).graph()
    return checkpoint_of_graph(
        graph,
        recognize_llama(graph, progress),
        name=model.stem if Path(path).is_file() else Path(path).resolve().name,
        tokenizer=tokenizer or find_tokenizer(model.parent),
        requantize=requantize,
        check_values=check_values,
    )
