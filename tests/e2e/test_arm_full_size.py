"""A synthetic Llama 3.2 1B for a phone: compiled here, run under QEMU, beside the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamac.compiler.compile_config import CompileConfig
from llamac.compiler.config import LLAMA_3_2_1B
from llamac.compiler.pipeline import compile_bundle, read_checkpoint
from llamac.compiler.progress import SilentProgress
from llamac.compiler.reference_model import ReferenceModel
from llamac.runtime import load
from llamac.targets.emulator import find_emulator
from llamac.tools.make_synthetic import FORMS, make_synthetic

pytestmark = [pytest.mark.slow, pytest.mark.needs("qemu-aarch64")]

CHUNK = 32
# Of logits, root mean square relative to their spread: sixteen layers carry on what codes near ties
# change.
TOLERANCE = 0.05


def test_a_chunk_and_a_token_give_the_reference_s_next_tokens(tmp_path: Path) -> None:
    model, bundle = tmp_path / "synthetic-1b", tmp_path / "bundle"
    make_synthetic(model, LLAMA_3_2_1B, FORMS["spinquant"])
    config = CompileConfig(model=model, target="sm8650", out=bundle, verify=False)
    compile_bundle(config, SilentProgress())
    prompt = [(7919 * i + 1) % LLAMA_3_2_1B.vocab_size for i in range(CHUNK)]
    with (
        load(bundle, threads=2, machine=find_emulator("max,sve=off,sme=off")) as compiled,
        compiled.session() as session,
    ):
        assert compiled.info.level == "i8mm"
        session.append(prompt)
        chosen, logits = [session.argmax()], [session.logits]
        session.append(chosen)
        chosen.append(session.argmax())
        logits.append(session.logits)
    reference = ReferenceModel(read_checkpoint(config), scale_dtype="float16", kv_dtype="float16")
    expected = reference.logits([*prompt, chosen[0]])[-2:]
    assert chosen == list(np.argmax(expected, axis=1))
    for got, wanted in zip(logits, expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2)) < TOLERANCE * wanted.std()
