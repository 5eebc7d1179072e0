"""Conversation → token ids, within a token budget, for a tokenizer it is handed. Knows nothing of vLLM, HTTP or files.

A chat prompt is texts between marks: `system ‹S› user ‹U› assistant ‹A› user ‹Q› assistant`. The marks are learned
from the model's own chat template. Only marks may hold control tokens: texts are encoded so that nothing they
spell becomes one. Each text is encoded once and cached, so a turn costs what is new in it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from protocol import ChatError, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """Token ids ready for the engine, how many of the oldest turns were left out to fit, and the text between the query
    and the answer.
    """

    token_ids: list[int]
    dropped_turns: int
    opening: str = ""


@dataclass(frozen=True)
class Mark:
    """What the template puts between two texts: the end of the one, control tokens, the start of the other."""

    before: str
    token_ids: tuple[int, ...]
    after: str


class PromptBuilder:
    """Builds prompts for one tokenizer; safe to call from several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: a Jinja template that replaces the tokenizer's own.
        options: what the template is given beside the messages, such as `enable_thinking`.

    Raises:
        ChatError: the tokenizer has no chat template, or one that is not texts between fixed marks.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ChatError("the model's tokenizer is not one of the tokenizers library")
        self._tokenizer = tokenizer
        self._template, self._options = chat_template, options
        # An answer may hold the tokens the model wrote itself, such as <tool_call>; a user's text may hold none.
        self._answers = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._answers.encode_special_tokens = True
        self._texts = _without_added_tokens(tokenizer.backend_tokenizer)
        # One int object a token id, shared by all cached texts: 8 bytes a token instead of 36.
        self._ints = list(range(max(tokenizer.get_vocab().values()) + 1))
        self._system_ids, self._turn_ids = _cached(self._encode_system), _cached(self._encode_turn)
        self._learn_marks()
        self._openings = {
            thinking: self.render("s", [], "⟦query⟧", thinking).rpartition("⟦query⟧")[2] for thinking in self._generate
        }
        self._check_against_template()

    @property
    def stop_token_id(self) -> int:
        """The control token that ends an assistant's turn."""
        return self._user.token_ids[0]

    def build(
        self, system: str, history: Sequence[Turn], query: str, budget: int, enable_thinking: bool | None = None
    ) -> Prompt:
        """The prompt for `query`, of at most `budget` tokens. Keeps the newest whole turns that fit, in order.

        Raises:
            ChatError: system and query alone do not fit; they are never cut.
        """
        generate = self._generate[enable_thinking]
        start = [*self._system.token_ids, *self._system_ids(system), *self._user.token_ids]
        end = [*self._encode_text(self._user, query, generate), *generate.token_ids, *self._encode(generate.after)]
        room = budget - len(start) - len(end)
        if room < 0:
            raise ChatError(
                f"system and query take {len(start) + len(end)} tokens, but only {max(budget, 0)} fit: "
                "shorten them or ask for fewer max_tokens",
                param="query",
            )
        kept = []
        for turn in reversed(history):
            turn_ids = self._turn_ids(*turn)
            room -= len(turn_ids)
            if room < 0:
                break
            kept.append(turn_ids)
        token_ids = [*start, *chain.from_iterable(reversed(kept)), *end]
        return Prompt(token_ids, len(history) - len(kept), self._openings[enable_thinking])

    def render(self, system: str, history: Iterable[Turn], query: str, enable_thinking: bool | None = None) -> str:
        """The same conversation as the model's own template writes it, where text can spell control tokens."""
        messages = [{"role": "system", "content": system}]
        for user, answer in history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": query})
        flags = self._options if enable_thinking is None else {**self._options, "enable_thinking": enable_thinking}
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True, **flags
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatError(f"the model's chat template fails: {error}") from error

    def _encode_system(self, system: str) -> tuple[int, ...]:
        return self._encode_text(self._system, system, self._user)

    def _encode_turn(self, user: str, answer: str) -> tuple[int, ...]:
        """Token ids from the start of a user's text up to the start of the next one."""
        if self._drops_thoughts and "</think>" in answer:
            answer = answer.split("</think>")[-1].lstrip("\n")
        return (
            *self._encode_text(self._user, user, self._assistant),
            *self._assistant.token_ids,
            *self._encode_text(self._assistant, answer, self._user),
            *self._user.token_ids,
        )

    def _encode_text(self, opening: Mark, text: str, closing: Mark) -> tuple[int, ...]:
        """Token ids of a text with the plain ends of the marks around it, which the tokenizer merges with it."""
        encoder = self._answers if opening is self._assistant else self._texts
        text = text.strip() if self._trims else text
        ids = encoder.encode(opening.after + text + closing.before, add_special_tokens=False).ids
        return tuple(map(self._ints.__getitem__, ids))

    def _encode(self, text: str) -> list[int]:
        """Token ids of trusted text, where control tokens count."""
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _learn_marks(self) -> None:
        if not (self._template or self._tokenizer.chat_template):
            raise ChatError("the model has no chat template: use /v1/completions, or name one with --chat-template")
        texts = ["⟦system⟧", "⟦user⟧", "⟦answer⟧", "⟦query⟧"]
        marks = {}
        for thinking in (None, True, False):
            prompt = self.render(texts[0], [(texts[1], texts[2])], texts[3], thinking)
            literals = re.split("|".join(texts), prompt)
            if len(literals) != len(texts) + 1:
                raise ChatError("the chat template does not keep system, user and assistant texts as they are")
            marks[thinking] = [self._mark(literal) for literal in literals]
        self._system, self._user, self._assistant, next_user, _ = marks[None]
        if next_user != self._user:
            raise ChatError("the chat template opens the first user turn and later ones differently")
        self._generate = {thinking: found[-1] for thinking, found in marks.items()}
        # Llama's template trims texts; Qwen3's leaves the thoughts of earlier answers out.
        self._trims = " ⟦text⟧ " not in self.render("", [], " ⟦text⟧ ")
        self._drops_thoughts = "⟦thought⟧" not in self.render("", [("", "<think>⟦thought⟧</think>\n\nYes.")], "")

    def _mark(self, literal: str) -> Mark:
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        found = list(re.finditer("|".join(map(re.escape, special)), literal))
        if not found:
            raise ChatError("the chat template separates texts without control tokens")
        first, last = found[0].start(), found[-1].end()
        return Mark(literal[:first], tuple(self._encode(literal[first:last])), literal[last:])

    def _check_against_template(self) -> None:
        probe = (
            "Be brief.",
            [("1 + 1 = ?", "2"), ("你好\n", " 你好！"), ("?", "<think>\nHm.\n</think>\n\nYes.")],
            "  def f():\n\treturn 42\n",
        )
        for thinking in self._generate:
            if self.build(*probe, 2**20, thinking).token_ids != self._encode(self.render(*probe, thinking)):
                raise ChatError("the prompt builder and the model's chat template disagree")


def _cached(encode: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """Remembers the ids of many short texts or a few long ones, so that its memory is bounded."""
    short, long = lru_cache(4096)(encode), lru_cache(32)(encode)
    return lambda *texts: (short if sum(map(len, texts)) < 16_384 else long)(*texts)


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that knows no added token, so that text which spells one is encoded piece by piece."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(state))
