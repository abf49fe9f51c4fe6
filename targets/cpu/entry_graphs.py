"""The part of entry.c that calls graphs (see `runtime/c/qnn/qnn.h`); nothing without graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamac.schedules.graph import GraphShape
from llamac.targets.cpu.entry_text import c_table, c_text

_FUNCTIONS = """\
static llamac_status open_graphs(const char *folder, void **out, llamac_error *error) {
  llamac_graphs *opened = NULL;
  llamac_status status = llamac_graphs_open(graphs, %d, folder, &opened, error);
  *out = opened;
  return status;
}

static void close_graphs(void *opened) { llamac_graphs_close(opened); }

static const llamac_accelerator accelerator = {open_graphs, close_graphs};
"""

_CALL = """\
static int32_t %s(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)result;
  return llamac_graph_call(self, %d, args, num_args);
}
"""


def graph_index(graphs: Sequence[GraphShape]) -> Mapping[str, str]:
    """Names of graphs, and of the functions that call them."""
    return {graph.name: f"graph_{i}" for i, graph in enumerate(graphs)}


def graph_source(graphs: Sequence[GraphShape]) -> list[str]:
    """Return C source: the table of all graphs, a function for each, and what opens them."""
    if not graphs:
        return []
    parts = ['#include "qnn/qnn.h"\n']
    for i, graph in enumerate(graphs):
        tensors = (*graph.inputs, *graph.outputs)
        rows = (f"{{{c_text(tensor.name)}, {tensor.nbytes}}}" for tensor in tensors)
        parts.append(c_table("const llamac_graph_tensor", f"graph_{i}_tensors", rows))
    parts.append(c_table("const llamac_graph", "graphs", map(_graph, graphs, range(len(graphs)))))
    parts.append(_FUNCTIONS % len(graphs))
    parts += [_CALL % (symbol, i) for i, symbol in enumerate(graph_index(graphs).values())]
    return parts


def _graph(graph: GraphShape, i: int) -> str:
    texts = ", ".join(map(c_text, (graph.graph, graph.file)))
    counts = f"{len(graph.inputs)}, {len(graph.outputs)}"
    file_bytes = f"UINT64_C({graph.file_bytes}), {graph.soc_model}, {c_text(graph.build_id)}"
    return f"{{{texts}, {file_bytes}, graph_{i}_tensors, {counts}}}"
