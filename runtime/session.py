"""A session: the tokens of one context and their KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from llamac.runtime.backend import BackendModel, BackendSession
from llamac.runtime.errors import ContextFull, SessionClosed, UsageError
from llamac.runtime.generation import Generation
from llamac.runtime.sampler import Sampling
from llamac.runtime.tokenizer import Tokenizer

__all__ = ["Session"]


class Session:
    """One context of a model, with its own KV cache, working memory and threads.

    The token level is `append`, `logits`, `rewind`; `generate` is built on it. Tokens are evaluated
    when somebody needs the logits after them: a token that `generate` emitted last costs nothing
    until the session goes on. Use a session from one thread at a time.

    Sessions come from `Model.session`. Leaving a `with` block closes the session.
    """

    def __init__(
        self, model: BackendModel, tokenizer: Tokenizer, threads: int, cpus: Sequence[int]
    ) -> None:
        self._native = model.open_session(threads, cpus)
        self._info = model.info
        self._tokenizer = tokenizer
        # The whole context. The library has evaluated the first `self._native.position()` of it.
        self._tokens: list[int] = []
        # False while the library's logits are of a token that rewind has dropped.
        self._has_logits = False

    @property
    def native(self) -> BackendSession:
        """The library's session, for verification and profiling."""
        return self._native

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self._tokenizer

    @property
    def is_closed(self) -> bool:
        """Whether the session, or its model, was closed."""
        return self._native.is_closed

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens of the context, generated ones included."""
        return tuple(self._tokens)

    @property
    def position(self) -> int:
        """Number of tokens in the context."""
        self._check_open()
        return len(self._tokens)

    @property
    def remaining(self) -> int:
        """Number of tokens that still fit."""
        return self._info.context_length - self.position

    @property
    def logits(self) -> NDArray[np.float32]:
        """Logits (vocab) float32 for the token after the context; a copy.

        Raises:
            UsageError: the context is empty.
        """
        self._evaluate_for_logits()
        return self._native.logits()

    def argmax(self) -> int:
        """Return the token with the highest logit, faster than through `logits`."""
        self._evaluate_for_logits()
        return self._native.argmax()

    def append(self, tokens: Iterable[int]) -> None:
        """Add tokens to the context and evaluate them, in chunks, so that Ctrl-C is served.

        Either all tokens are added or, after an error or Ctrl-C, none.

        Args:
            tokens: ids below the vocabulary's size; a sequence or an array.

        Raises:
            ContextFull: they do not fit; raised before anything is evaluated.
            UsageError: an id is outside the vocabulary.
        """
        added = self._checked(tokens)
        start = len(self._tokens)
        self._tokens += added
        try:
            self._evaluate()
        except BaseException:
            self._drop(start)
            raise

    def push(self, token: int) -> None:
        """Add one token to the context without evaluating it yet.

        Raises:
            ContextFull, UsageError: as `append`.
        """
        self._tokens += self._checked([token])

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on; `logits` are then those after the ones left.

        Raises:
            UsageError: `position` is not between 0 and the present one.
        """
        if not 0 <= position <= self.position:
            raise UsageError(
                f"rewind to position {position} of {self.position}",
                cause="a session can only go back",
                fix=f"give a position from 0 to {self.position}",
            )
        self._drop(position)

    def check_room(self, num_tokens: int) -> None:
        """Check that so many tokens fit.

        Raises:
            ContextFull: they do not.
        """
        if num_tokens > self.remaining:
            raise ContextFull(
                f"{num_tokens} tokens do not fit: the context holds {self._info.context_length} "
                f"tokens and has {self.position}",
                cause="the KV cache has a fixed length, chosen when the bundle was compiled",
                fix="shorten the prompt, rewind, start a new session, or compile with a longer "
                "context",
            )

    def generate(
        self,
        prompt: str | Iterable[int] = (),
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Add a prompt to the context and stream the continuation as text.

        Arguments are checked now; evaluation begins when the first piece is asked for.

        Args:
            prompt: text or token ids. Text at the start of a context gets the id that begins a
                text in front. Empty: go on where the context ends.
            max_tokens: how many tokens to generate at most; None goes on to the context's end.
            temperature: see `Sampling`, also for the next four.
            top_k: highest logits to keep.
            top_p: probability mass to keep.
            min_p: least probability to keep, relative to the best token.
            repetition_penalty: factor against repetition.
            seed: makes sampling repeatable; None takes another one each time.
            stop: texts at which to stop; they are not part of the output.

        Returns:
            An iterator over pieces of text, never empty and never part of a character. When it is
            exhausted, its `finish_reason` tells why.

        Raises:
            ContextFull: the prompt does not fit.
            UsageError: an argument is outside its range, or there is nothing to continue.
        """
        if isinstance(prompt, str):
            is_start = self.position == 0 and self._tokenizer.bos_id is not None
            tokens = self._tokenizer.encode(prompt, bos=is_start)
        else:
            tokens = self._checked(prompt)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return Generation(
            self, tokens, sampling=sampling, max_tokens=max_tokens, seed=seed, stop=stop
        )

    def close(self) -> None:
        """Stop the threads and free the memory; more calls do nothing."""
        self._native.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.is_closed:
            raise SessionClosed(
                "the session is closed",
                cause="close() was called for it or for its model, or its with block ended",
                fix="open a new session, and use it inside the with block of its model",
            )

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        """Return the tokens as a list after checking ids and room."""
        array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if array.size == 0:
            return []
        vocab_size = self._info.vocab_size
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise _bad_tokens(f"tokens are {array.dtype} of {array.ndim} dimensions", vocab_size)
        outside = (array < 0) | (array >= vocab_size)
        if outside.any():
            raise _bad_tokens(f"token {array[outside][0]} is outside the vocabulary", vocab_size)
        self.check_room(len(array))
        ids: list[int] = array.tolist()
        return ids

    def _evaluate(self) -> None:
        """Evaluate all tokens that the library has not seen."""
        start = self._native.position()
        for first in range(start, len(self._tokens), self._info.max_chunk):
            chunk = self._tokens[first : first + self._info.max_chunk]
            self._native.eval(np.array(chunk, np.int32))
            self._has_logits = True

    def _evaluate_for_logits(self) -> None:
        if self.position == 0:
            raise UsageError(
                "an empty context has no logits",
                cause="no token was appended yet",
                fix="append at least one token, such as the id that begins a text",
            )
        if self._native.position() == len(self._tokens) and not self._has_logits:
            self._native.rewind(len(self._tokens) - 1)
        self._evaluate()

    def _drop(self, position: int) -> None:
        """Forget tokens from `position` on, here and in the library."""
        if len(self._tokens) == position:
            return
        del self._tokens[position:]
        self._has_logits = False
        if not self.is_closed and self._native.position() > position:
            self._native.rewind(position)


def _bad_tokens(message: str, vocab_size: int) -> UsageError:
    return UsageError(
        message,
        cause=f"token ids are whole numbers from 0 to {vocab_size - 1}",
        fix="encode the text with this model's own tokenizer",
    )
