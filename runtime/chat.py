"""Conversations with an instruct model: turns become tokens by the model's chat template.

Templates work on tokens and not on text, so that nothing a user types can end a turn or start
another one. Source of "llama3": the prompt format of Meta's Llama 3 model cards; no date is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamac.runtime.errors import BundleInvalid, UsageError
from llamac.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llamac.runtime.generation import Generation, GenerationOptions
    from llamac.runtime.session import Session

__all__ = ["TEMPLATES", "Chat", "ChatTemplate"]


@dataclass(frozen=True)
class ChatTemplate:
    """How a turn is written: header, role, header end, separator, text, end of turn.

    Args:
        header_start: special token before the role.
        header_end: special token after it.
        separator: text between header and content.
        turn_end: special token after the content.
    """

    header_start: str
    header_end: str
    separator: str
    turn_end: str

    def header(self, tokenizer: Tokenizer, role: str) -> list[int]:
        """Return the tokens that open a turn."""
        return [
            self._special(tokenizer, self.header_start),
            *tokenizer.encode(role),
            self._special(tokenizer, self.header_end),
            *tokenizer.encode(self.separator),
        ]

    def turn(self, tokenizer: Tokenizer, role: str, text: str) -> list[int]:
        """Return the tokens of a whole turn; space around the text is dropped."""
        content = tokenizer.encode(text.strip())
        return [*self.header(tokenizer, role), *content, self.end(tokenizer)]

    def end(self, tokenizer: Tokenizer) -> int:
        """Return the token that ends a turn."""
        return self._special(tokenizer, self.turn_end)

    @staticmethod
    def _special(tokenizer: Tokenizer, name: str) -> int:
        try:
            return tokenizer.special_tokens[name]
        except KeyError:
            raise BundleInvalid(
                f"the chat template needs the special token {name}, which the manifest lacks",
                cause="tokenizer.chat_template and tokenizer.special_tokens do not fit together",
                fix="compile the model again",
            ) from None


TEMPLATES: Mapping[str, ChatTemplate] = {
    "llama3": ChatTemplate("<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>"),
}


def find_template(name: str | None) -> ChatTemplate:
    """Return the template of that name.

    Raises:
        UsageError: the model has none: it is a base model, or this runtime does not know it.
    """
    if name is None:
        raise UsageError(
            "this model has no chat template",
            cause="it is a base model: it continues text and was not trained on turns",
            fix="use generate() with text to be continued, or compile the instruct model",
        )
    if name in TEMPLATES:
        return TEMPLATES[name]
    raise UsageError(
        f"this runtime does not know the chat template {name!r}",
        cause="the bundle comes from a newer version of llamac",
        fix="update llamac on this machine, or render the turns to tokens yourself",
    )


class Chat:
    """A conversation. Each turn evaluates only its own tokens; earlier ones stay in the KV cache.

    Args:
        session: an empty session, which the conversation takes over.
        template: how turns are written.
        system: instructions that the model sees before the first turn.
    """

    def __init__(self, session: Session, template: ChatTemplate, system: str | None = None) -> None:
        self._session = session
        self._template = template
        self._system = system

    @property
    def session(self) -> Session:
        """The session with the tokens of the conversation."""
        return self._session

    def send(self, text: str, **options: Unpack[GenerationOptions]) -> Generation:
        """Send a user's turn and stream the answer.

        An answer that was cut off, by `max_tokens` or because the caller stopped reading, stays in
        the conversation as far as it got.

        Args:
            text: what the user says; names of special tokens in it are plain text.
            **options: as for `Session.generate`.

        Raises:
            ContextFull: the turn does not fit into the rest of the context; nothing changed.
        """
        return self._session.generate(self._opening(text), **options)

    def _opening(self, text: str) -> list[int]:
        """Return all tokens up to the place where the answer starts."""
        template, tokenizer = self._template, self._session.tokenizer
        if self._session.position == 0:
            tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            if self._system is not None:
                tokens += template.turn(tokenizer, "system", self._system)
        else:
            tokens = [template.end(tokenizer)]  # of the answer before
        tokens += template.turn(tokenizer, "user", text)
        return tokens + template.header(tokenizer, "assistant")

    def close(self) -> None:
        """Close the session of the conversation."""
        self._session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
