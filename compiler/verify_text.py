"""End to end: what a library predicts for a text, beside the reference model.

Logits are not compared by value: two correct implementations differ by tenths, because one code
that was rounded the other way moves everything behind it. What they predict is compared, and how
much of the logits is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamac.compiler.reference import Float64
from llamac.compiler.reference_model import ReferenceModel
from llamac.compiler.verify_compare import sqnr
from llamac.runtime.backend import BackendSession

# The thresholds; docs/numerics.md says how far correct and broken libraries are from them.
NLL_ABSOLUTE, NLL_RELATIVE = 0.02, 0.01
# Of the logits. Without int8 activations there are no codes that could be rounded the other way.
LEAST_SQNR_DB, LEAST_SQNR_DB_FLOAT = 15.0, 40.0
LEAST_AGREEMENT = 0.9
# A disagreement where the reference itself hardly prefers its own choice: the difference of both
# logits, in standard deviations of all logits of that position.
NEAR_TIE = 0.5

# Positions whose logits are held at once. Every window of a text starts from an empty context.
WINDOW = 64


@dataclass(frozen=True)
class TextResult:
    """A library and the reference on the same text.

    Attributes:
        num_tokens: of the text.
        nll_reference: mean negative log likelihood of each next token in nats, by the reference.
        nll_library: the same by the library.
        agreement: share of positions at which both predict the same token.
        widest_disagreement: largest difference of the reference's logits between its own choice and
            the library's, in standard deviations of the position's logits.
        sqnr_db: of all logits, each position's mean taken off.
        largest_difference: of any logit.
        least_sqnr_db: what `sqnr_db` must reach.
    """

    num_tokens: int
    nll_reference: float
    nll_library: float
    agreement: float
    widest_disagreement: float
    sqnr_db: float
    largest_difference: float
    least_sqnr_db: float

    @property
    def failure(self) -> str:
        """What is wrong, "" if nothing is."""
        allowed = NLL_ABSOLUTE + NLL_RELATIVE * self.nll_reference
        if not abs(self.nll_library - self.nll_reference) <= allowed:
            return (
                f"the negative log likelihood of {self.num_tokens} tokens is "
                f"{self.nll_library:.4f}, the reference has {self.nll_reference:.4f} "
                f"(allowed difference {allowed:.4f})"
            )
        if self.agreement < LEAST_AGREEMENT and self.widest_disagreement > NEAR_TIE:
            return (
                f"{100 * self.agreement:.0f} % of the next tokens agree with the reference "
                f"(at least {100 * LEAST_AGREEMENT:.0f} % must), and not only near ties"
            )
        if self.sqnr_db < self.least_sqnr_db:
            return (
                f"the logits have {self.sqnr_db:.1f} dB of signal to noise against the reference, "
                f"at least {self.least_sqnr_db:.0f} dB are needed"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


@dataclass
class _Tally:
    """Sums over positions."""

    likelihoods: list[tuple[float, float]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    signal: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    largest_difference: float = 0.0

    def add(self, expected: Float64, got: NDArray[np.float32], following: int | None) -> None:
        """Take in the logits after one token; `following` is the token that comes next."""
        logits = got.astype(np.float64)
        if following is not None:
            both = (expected, logits)
            self.likelihoods.append((_nll(both[0], following), _nll(both[1], following)))
        choice = int(np.argmax(logits))
        self.margins.append(float((expected.max() - expected[choice]) / expected.std()))
        self.largest_difference = max(
            self.largest_difference, float(np.abs(logits - expected).max())
        )
        centred, difference = expected - expected.mean(), logits - logits.mean()
        difference -= centred
        self.signal.append(float(centred @ centred))
        self.noise.append(float(difference @ difference))

    def result(self, num_tokens: int, is_float: bool) -> TextResult:
        """Return the means."""
        reference, library = np.mean(self.likelihoods, axis=0)
        noise = np.sqrt(np.sum(self.noise))
        signal = np.sqrt(np.sum(self.signal))
        return TextResult(
            num_tokens=num_tokens,
            nll_reference=float(reference),
            nll_library=float(library),
            agreement=float(np.mean([margin <= 0 for margin in self.margins])),
            widest_disagreement=max(self.margins),
            sqnr_db=sqnr(np.array([signal, 0.0]), np.array([signal, noise])),
            largest_difference=self.largest_difference,
            least_sqnr_db=LEAST_SQNR_DB_FLOAT if is_float else LEAST_SQNR_DB,
        )


def _nll(logits: Float64, token: int) -> float:
    top = logits.max()
    return float(np.log(np.exp(logits - top).sum()) + top - logits[token])


def compare_text(
    session: BackendSession,
    decode: ReferenceModel,
    prefill: ReferenceModel,
    tokens: Sequence[int],
    advance: Callable[[int, str], None],
) -> TextResult:
    """Let a library and the reference predict the same text.

    The library evaluates one token at a time, and then all of a window at once, so that its
    prefill functions are seen too (with padding, where the length asks for it).

    Args:
        session: of the library; its context is emptied.
        decode: the reference of one token at a time.
        prefill: the reference of many at once, which another processor may compute; the same
            object as `decode` where both are the same, which saves half of the reference's time.
        tokens: at least two.
        advance: called with (number of tokens done, what).
    """
    tally = _Tally()
    for start in range(0, len(tokens), WINDOW):
        window = list(tokens[start : start + WINDOW])
        advance(0, "reference model")
        with np.errstate(all="ignore"):  # a broken library may say anything
            expected = decode.logits(window)
            last = expected[-1]
            if prefill is not decode:
                last = prefill.logits(window, all_positions=False)[-1]
            session.rewind(0)
            for i, token in enumerate(window):
                advance(1, "text")
                session.eval(np.array([token], np.int32))
                following = window[i + 1] if i + 1 < len(window) else None
                tally.add(expected[i], session.logits(), following)
            session.rewind(0)
            session.eval(np.array(window, np.int32))
            tally.add(last, session.logits(), None)
    return tally.result(len(tokens), is_float=decode.checkpoint.quant.form == "float")
