"""`llamac run`: text to standard output, all else to standard error, options to the runtime."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamac.tools.cli import main


class FakeModel:
    """Stands for a loaded model; answers with what it was asked."""

    def __init__(self, template: str | None) -> None:
        tokenizer = SimpleNamespace(chat_template=template)
        self.manifest = SimpleNamespace(tokenizer=tokenizer)
        self.info = SimpleNamespace(level="avx2")
        self.calls: list[tuple[Any, ...]] = []

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.calls.append(("close",))

    def generate(self, prompt: str, **options: Any) -> FakeGeneration:
        self.calls.append(("generate", prompt, options))
        return FakeGeneration()

    def chat(self, system: str | None = None) -> SimpleNamespace:
        def send(text: str, **options: Any) -> FakeGeneration:
            self.calls.append(("chat", system, text, options))
            return FakeGeneration()

        return SimpleNamespace(send=send)


class FakeGeneration(Iterator[str]):
    """Three pieces of text from four tokens."""

    def __init__(self) -> None:
        self.tokens = [1, 2, 3, 4]
        self.finish_reason = "length"
        self._pieces = iter(["Rayleigh ", "scatter", "ing."])

    def __next__(self) -> str:
        return next(self._pieces)


@pytest.fixture
def load_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], FakeModel]:
    """Make `llamac run` load a FakeModel."""

    def install(template: str | None) -> FakeModel:
        model = FakeModel(template)

        def load(*arguments: Any, **options: Any) -> FakeModel:
            model.calls.append(("load", *arguments, options))
            return model

        monkeypatch.setattr("llamac.runtime.load", load)
        return model

    return install


GREEDY = {
    "max_tokens": 256,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
}


def test_run_prints_the_text_and_nothing_else(
    load_model: Callable[[str | None], FakeModel], capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output is the generated text; a base model continues the prompt."""
    model = load_model(None)
    assert main(["run", "out", "Why?"]) == 0
    assert capsys.readouterr() == ("Rayleigh scattering.\n", "")
    assert model.calls == [
        ("load", Path("out"), {"threads": None, "level": None, "machine": None}),
        ("generate", "Why?", GREEDY),
        ("close",),
    ]


def test_run_prints_statistics_to_standard_error(
    load_model: Callable[[str | None], FakeModel], capsys: pytest.CaptureFixture[str]
) -> None:
    """--stats does not touch standard output."""
    load_model(None)
    assert main(["run", "out", "Why?", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "Rayleigh scattering.\n"
    assert "kernels avx2" in err
    assert "then 3 tokens in" in err
    assert "ended by length" in err


def test_run_passes_its_options(load_model: Callable[[str | None], FakeModel]) -> None:
    """Sampling, threads and level reach the runtime."""
    model = load_model(None)
    options = (
        "--max-tokens 5 --temperature 0.7 --top-k 40 --top-p 0.9 --min-p 0.05 "
        "--repetition-penalty 1.1 --seed 7 --threads 1 --level avx2"
    )
    assert main(["run", "out", "Why?", *options.split()]) == 0
    assert model.calls[:2] == [
        ("load", Path("out"), {"threads": 1, "level": "avx2", "machine": None}),
        (
            "generate",
            "Why?",
            {
                "max_tokens": 5,
                "temperature": 0.7,
                "top_k": 40,
                "top_p": 0.9,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "seed": 7,
            },
        ),
    ]


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        ("llama3", [], ("chat", None, "Why?", GREEDY)),
        ("llama3", ["--no-chat"], ("generate", "Why?", GREEDY)),
        ("llama3", ["--system", "Be brief."], ("chat", "Be brief.", "Why?", GREEDY)),
        (None, [], ("generate", "Why?", GREEDY)),
        (None, ["--chat"], ("chat", None, "Why?", GREEDY)),
    ],
)
def test_run_uses_the_template_of_an_instruct_model(
    template: str | None,
    options: list[str],
    expected: tuple[Any, ...],
    load_model: Callable[[str | None], FakeModel],
) -> None:
    """A bundle with a template chats unless told otherwise; the runtime refuses what cannot be."""
    model = load_model(template)
    assert main(["run", "out", "Why?", *options]) == 0
    assert model.calls[1] == expected


def test_run_reads_the_prompt_from_standard_input(
    load_model: Callable[[str | None], FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROMPT "-" is standard input, as it is."""
    model = load_model(None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\nupon"))
    assert main(["run", "out", "-"]) == 0
    assert model.calls[1] == ("generate", "Once\nupon", GREEDY)


@pytest.mark.parametrize(
    "arguments",
    [["", "--seed", "1"], ["Why?", "--cpu", "max"], ["Why?", "--no-chat", "--system", "Be brief."]],
)
def test_run_refuses_what_makes_no_sense(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No prompt, a CPU without emulation, or a system message without a chat: exit code 2."""
    assert main(["run", "out", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error[usage]: ")
