"""The part of entry.c that calls graphs (`runtime/c/qnn`, `neuron`, `hosted`); nothing without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamac.schedules.graph import GraphShape, NeuronGraph, QnnGraph
from llamac.targets.cpu.entry_text import c_table, c_text

_FUNCTIONS = """\
static llamac_status open_graphs(const char *folder, void **out, llamac_error *error) {{
  {opened} *opened = NULL;
  llamac_status status = {open}(graphs, {count}, folder, &opened, error);
  *out = opened;
  return status;
}}

static void close_graphs(void *opened) {{ {close}(opened); }}

static const llamac_accelerator accelerator = {{open_graphs, close_graphs}};
"""

_CALL = """\
static int32_t {symbol}(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {{
  (void)result;
  return {call}(self, {index}, args, num_args);
}}
"""


@dataclass(frozen=True)
class Runner:
    """The C code that executes graphs, and its names.

    Attributes:
        folder: of its sources in `runtime/c`, and name of the header in it.
        graph, tensor, opened: types of the tables' rows, and of what is opened.
        open, close, call: its functions.
    """

    folder: str
    graph: str
    tensor: str
    opened: str
    open: str
    close: str
    call: str


QNN = Runner(
    folder="qnn",
    graph="llamac_graph",
    tensor="llamac_graph_tensor",
    opened="llamac_graphs",
    open="llamac_graphs_open",
    close="llamac_graphs_close",
    call="llamac_graph_call",
)
NEURON = Runner(
    folder="neuron",
    graph="llamac_neuron_graph",
    tensor="llamac_neuron_tensor",
    opened="llamac_neuron_graphs",
    open="llamac_neuron_open_beside",
    close="llamac_neuron_close",
    call="llamac_neuron_call",
)
HOSTED = Runner(
    folder="hosted",
    graph="llamac_hosted_graph",
    tensor="llamac_hosted_tensor",
    opened="llamac_hosted_graphs",
    open="llamac_hosted_open",
    close="llamac_hosted_close",
    call="llamac_hosted_call",
)


def runner_of(graphs: Sequence[GraphShape], *, is_emulation: bool = False) -> Runner | None:
    """What executes the graphs; None without graphs.

    An accelerator makes all graphs of a program, so that they are of one vendor.

    Args:
        graphs: of the program.
        is_emulation: not on their device, but on a computer that stands in for it. Qualcomm's
            library is the same C code there; for MediaTek's adapter there is an interpreter.
    """
    if not graphs:
        return None
    [kind] = {type(graph.vendor) for graph in graphs}
    if kind is QnnGraph:
        return QNN
    return HOSTED if is_emulation else NEURON


def graph_index(graphs: Sequence[GraphShape]) -> Mapping[str, str]:
    """Names of graphs, and of the functions that call them."""
    return {graph.name: f"graph_{i}" for i, graph in enumerate(graphs)}


def graph_source(graphs: Sequence[GraphShape], *, is_emulation: bool = False) -> list[str]:
    """Return C source: the table of all graphs, a function for each, and what opens them."""
    runner = runner_of(graphs, is_emulation=is_emulation)
    if runner is None:
        return []
    parts = [f'#include "{runner.folder}/{runner.folder}.h"\n']
    for i, graph in enumerate(graphs):
        tensors = (*graph.inputs, *graph.outputs)
        rows = (f"{{{c_text(tensor.name)}, {tensor.nbytes}}}" for tensor in tensors)
        parts.append(c_table(f"const {runner.tensor}", f"graph_{i}_tensors", rows))
    rows = (_graph(runner, graph, i) for i, graph in enumerate(graphs))
    parts.append(c_table(f"const {runner.graph}", "graphs", rows))
    names = vars(runner) | {"count": len(graphs)}
    parts.append(_FUNCTIONS.format(**names))
    for i, symbol in enumerate(graph_index(graphs).values()):
        parts.append(_CALL.format(symbol=symbol, index=i, call=runner.call))
    return parts


def _graph(runner: Runner, graph: GraphShape, i: int) -> str:
    """A row of the table of graphs: what is opened, what it is compared with, its tensors."""
    tensors = f"graph_{i}_tensors, {len(graph.inputs)}, {len(graph.outputs)}"
    file, vendor = f"{c_text(graph.file)}, UINT64_C({graph.file_bytes})", graph.vendor
    if isinstance(vendor, QnnGraph):
        file += f", {vendor.soc_model}, {c_text(vendor.build_id)}"
    elif runner is HOSTED:
        file = c_text(vendor.tflite)
    else:
        file += f", {c_text(vendor.network_sha256)}, {c_text(vendor.soc)}, {_dla(vendor)}"
    return f"{{{c_text(graph.graph)}, {file}, {tensors}}}"


def _dla(graph: NeuronGraph) -> str:
    """The address of what MediaTek's SDK compiled, or that there is none."""
    if not graph.dla:
        return "NULL"
    return f"&(const llamac_neuron_dla){{{c_text(graph.dla)}, UINT64_C({graph.dla_bytes})}}"
