"""The loop that generates: evaluate, choose a token, decode it, look for a reason to stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from llamac.runtime.errors import UsageError
from llamac.runtime.sampler import Sampling, sample

if TYPE_CHECKING:
    from llamac.runtime.session import Session

__all__ = ["FinishReason", "Generation", "GenerationOptions", "StopScanner"]

FinishReason = Literal["stop", "length", "context"]


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of everything that generates; `Session.generate` describes them."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]


class Generation(Iterator[str]):
    """A running generation: an iterator over pieces of text.

    Attributes:
        finish_reason: None while running, then why it ended: "stop" (a stop id or stop text),
            "length" (`max_tokens` reached) or "context" (the context is full).
        tokens: the ids generated so far, without the stop id.
        prompt: the ids that come before them.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        max_tokens: int | None,
        seed: int | None,
        stop: str | Sequence[str],
    ) -> None:
        _check_counts(max_tokens, seed)
        session.check_room(len(prompt))
        if not prompt and session.position == 0:
            raise UsageError(
                "there is nothing to continue",
                cause="prompt and context are empty, and the model has no id that begins a text",
                fix="give a prompt",
            )
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self._session = session
        self.prompt = tuple(prompt)
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._random = np.random.default_rng(seed)
        self._scanner = StopScanner((stop,) if isinstance(stop, str) else stop)
        self._position = session.position
        self._decoder = session.tokenizer.stream()
        self._owns_session = False
        self._is_started = False
        self._is_ended = False

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        # Not a generator: its frame would refer back to this object, and a session of a caller who
        # leaves the loop early would live until the next garbage collection.
        while not self._is_ended:
            if piece := self._step():
                return piece
        raise StopIteration

    def close(self) -> None:
        """End early. Tokens generated so far stay in the context."""
        self._is_ended = True
        if self._owns_session:
            self._session.close()

    def own_session(self) -> Generation:
        """Close the session when the generation ends; returns the generation."""
        self._owns_session = True
        return self

    def _step(self) -> str:
        """Generate one token and return the text that it completes, or the rest at the end."""
        try:
            self._check_position()
            if not self._is_started:
                self._start()
            token = self._next_token()
        except BaseException:
            self.close()
            raise
        if token is None:
            self.close()
            return self._scanner.feed(self._decoder.finish()) + self._scanner.finish()
        return self._scanner.feed(self._decoder.feed(token))

    def _start(self) -> None:
        self._session.append(self.prompt)
        self._position = self._session.position
        self._is_started = True

    def _next_token(self) -> int | None:
        """Choose a token and add it to the context; None and a reason if there is no next one."""
        if self._scanner.is_found:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        elif self._session.remaining == 0:
            self.finish_reason = "context"
        if self.finish_reason is not None:
            return None
        token = self._choose()
        if token in self._session.tokenizer.stop_ids:
            self.finish_reason = "stop"
            return None
        self._session.push(token)
        self._position += 1
        self.tokens.append(token)
        return token

    def _choose(self) -> int:
        if self._sampling.is_greedy:
            return self._session.argmax()
        has_penalty = self._sampling.repetition_penalty != 1
        context = self._session.tokens if has_penalty else ()
        return sample(self._session.logits, context, self._sampling, self._random)

    def _check_position(self) -> None:
        if self._session.position != self._position:
            raise UsageError(
                f"the session moved from position {self._position} to {self._session.position} "
                "while text was generated in it",
                cause="a session has one context; another call appended to it or rewound it",
                fix="finish or drop one generation before the next, or use two sessions",
            )


class StopScanner:
    """Finds stop texts in a stream and holds back text that may be the start of one.

    Attributes:
        is_found: whether a stop text came; everything after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(
                f"stop is {stops!r}",
                cause="a stop text is empty or not text",
                fix="give one text, or a list of texts, none of them empty",
            )
        self.is_found = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what can be shown after `text` arrived."""
        if self.is_found:
            return ""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.is_found = True
            self._held = ""
            return text[: min(found)]
        keep = self._length_of_possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _length_of_possible_start(self, text: str) -> int:
        """Return the length of the longest end of `text` that some stop text begins with."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _check_counts(max_tokens: int | None, seed: int | None) -> None:
    for name, value in (("max_tokens", max_tokens), ("seed", seed)):
        if value is not None and (not isinstance(value, int) or value < 0):
            raise UsageError(
                f"{name} is {value!r}",
                cause=f"{name} is neither None nor a whole number of 0 or more",
                fix=f"give a {name} of 0 or more, or None",
            )
