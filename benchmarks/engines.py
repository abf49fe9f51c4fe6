"""The engines that are compared. Each runs in a process of its own, see `child.py`.

An engine gets the model that `models.py` built for it, and does one thing: evaluate a prompt, and
go on greedily for a number of tokens, whatever they are. What it does for that is what its makers
offer from Python, with the defaults that they chose; only the number of threads is given.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Engine(Protocol):
    """A loaded model.

    Args:
        model: what `models.py` built.
        threads: that it may use.
        context: positions that it must have room for.
    """

    def __init__(self, model: Path, threads: int, context: int) -> None: ...

    def run(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """Evaluate a prompt from scratch and choose `count` tokens.

        Returns:
            Seconds to the first token, and seconds for the others together.
        """


class Llamac:
    """This project: a bundle and the Python runtime."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        from llamac.runtime import load  # noqa: PLC0415

        self._model = load(model, threads=threads)
        self._session = self._model.session()

    def run(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """Append the prompt, then token by token."""
        session = self._session
        session.rewind(0)
        start = time.perf_counter()
        session.append(prompt)
        token = session.argmax()
        first = time.perf_counter()
        for _ in range(count - 1):
            session.append([token])
            token = session.argmax()
        return first - start, time.perf_counter() - first


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python exposes."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import llama_cpp as c  # noqa: PLC0415

        self._c = c
        self._log = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._log, None)
        options = c.llama_model_default_params()
        self._model = c.llama_model_load_from_file(str(model).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        wanted = c.llama_context_default_params()
        wanted.n_ctx, wanted.n_threads, wanted.n_threads_batch = context, threads, threads
        self._context = c.llama_init_from_model(self._model, wanted)
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._batch = int(wanted.n_batch)

    def run(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """llama_decode of the prompt in batches, then of one token at a time."""
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        start = time.perf_counter()
        for begin in range(0, len(prompt), self._batch):
            token = self._decode(prompt[begin : begin + self._batch])
        first = time.perf_counter()
        for _ in range(count - 1):
            token = self._decode([token])
        return first - start, time.perf_counter() - first

    def _decode(self, tokens: Sequence[int]) -> int:
        c = self._c
        array = (c.llama_token * len(tokens))(*tokens)
        if c.llama_decode(self._context, c.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = c.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab,))))


class OpenVino:
    """OpenVINO GenAI's LLMPipeline."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import openvino_genai as genai  # noqa: PLC0415

        self._genai = genai
        self._pipeline = genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """Generate, with the times at which a streamer gets the tokens."""
        import openvino as ov  # noqa: PLC0415

        ids = np.array([prompt], np.int64)
        inputs = self._genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        result = self._pipeline.generate(
            inputs, max_new_tokens=count, min_new_tokens=count, ignore_eos=True, do_sample=False
        )
        total = time.perf_counter() - start
        if len(result.tokens[0]) != count:
            raise RuntimeError(f"{len(result.tokens[0])} tokens instead of {count}")
        first = float(result.perf_metrics.get_ttft().mean) / 1000
        return first, total - first


class OnnxRuntimeGenAi:
    """onnxruntime-genai's Generator."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import onnxruntime_genai as genai  # noqa: PLC0415

        self._genai, self._context = genai, context
        config = genai.Config(str(model))
        options = f'{{"intra_op_num_threads": {threads}}}'
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
        self._model = genai.Model(config)

    def run(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """A new generator with room for the context."""
        parameters = self._genai.GeneratorParams(self._model)
        size = len(prompt) + count + 1
        parameters.set_search_options(max_length=size, min_length=size, do_sample=False)
        start = time.perf_counter()
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first


class ExecuTorch:
    """ExecuTorch's Python runtime with XNNPACK and its own operators for Llama."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import torch  # noqa: PLC0415
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401, PLC0415
        from executorch.extension.pybindings import portable_lib  # noqa: PLC0415
        from executorch.kernels import quantized  # noqa: F401, PLC0415

        self._torch = torch
        self._module = portable_lib._load_for_executorch(str(model))

    def run(self, prompt: Sequence[int], count: int) -> tuple[float, float]:
        """The method `forward` with the prompt, then with one token at a time."""
        start = time.perf_counter()
        token = self._forward(prompt, 0)
        first = time.perf_counter()
        for i in range(count - 1):
            token = self._forward([token], len(prompt) + i)
        return first - start, time.perf_counter() - first

    def _forward(self, tokens: Sequence[int], position: int) -> int:
        torch = self._torch
        inputs = torch.tensor([list(tokens)]), torch.tensor([position])
        (logits,) = self._module.forward(inputs)
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())


ENGINES: dict[str, type[Engine]] = {
    "llamac": Llamac,
    "llama.cpp": LlamaCpp,
    "OpenVINO GenAI": OpenVino,
    "ONNX Runtime GenAI": OnnxRuntimeGenAi,
    "ExecuTorch": ExecuTorch,
}
