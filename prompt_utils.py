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
from itertools import chain, product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from qwen_vllm.protocol import ChatError, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Trim = Callable[[str], str]
THINKING = (None, True, False)
TEXTS = SYSTEM, USER, ANSWER, QUERY = "⟦system⟧", "⟦user⟧", "⟦answer⟧", "⟦query⟧"
LEFT, RIGHT = "\v", "\f"
"""Whitespace, to see which texts a template trims."""
NO_CHAT = "no /chat; use /v1/chat/completions, or name another template with --chat-template"


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


@dataclass(frozen=True)
class Layout:
    """How the template begins a conversation, and where the system prompt is: in a turn of its own, which `end` ends,
    or in `first` or `last`, plain text with SYSTEM in it before the first or the last of the user's texts.
    """

    start: Mark
    end: Mark | None
    first: str
    last: str
    trim_system: Trim
    trim_first: Trim
    trim_last: Trim


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
            raise ChatError(
                "the model's tokenizer is not of the tokenizers library: use /v1/chat/completions, or start with "
                "--tokenizer-mode hf where the model has a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._template, self._options = chat_template, options
        # One int object a token id, shared by all cached texts: 8 bytes a token instead of 36.
        self._ints = list(range(max(tokenizer.get_vocab().values()) + 1))
        self._system_ids, self._turn_ids = _cached(self._encode_system), _cached(self._encode_turn)
        self._learn_control_tokens()
        self._learn_marks()
        self._ends = {
            thinking: (*mark.token_ids, *self._plain_ids(self._answers, mark.after))
            for thinking, mark in self._generate.items()
        }
        self._openings = {
            thinking: self.render(SYSTEM, [], QUERY, thinking).rpartition(QUERY)[2] for thinking in self._generate
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
        system = system.strip() if self._joins_system else system
        layout, generate = self._layouts[bool(system)], self._generate[enable_thinking]
        end = self._ends[enable_thinking]
        system = layout.trim_system(system)
        first, last = layout.first.replace(SYSTEM, system), layout.last.replace(SYSTEM, system)
        start = [*layout.start.token_ids, *(self._system_ids(system) if layout.end else ())]
        later = query_ids = self._text_ids(self._user, last + layout.trim_last(query), generate)
        if first:
            query_ids = self._text_ids(self._user, self._led(first, layout, last + query), generate)
        room = budget - len(start) - len(query_ids) - len(end)
        if room < 0:
            raise ChatError(
                f"system and query take {budget - room} tokens, but only {max(budget, 0)} fit: "
                "shorten them or ask for fewer max_tokens",
                param="query",
            )
        kept = []
        room += len(query_ids) - len(later)
        for user, answer in reversed(history):
            # As the first turn, which may hold the system prompt; as a later one it does not.
            opening = self._turn_ids(self._led(first, layout, user), answer)
            if len(opening) > room:
                break
            turn = self._turn_ids(self._trim_user(user), answer) if first else opening
            room -= len(turn)
            kept.append(turn)
            oldest = opening
        if kept:
            kept[-1], query_ids = oldest, later
        token_ids = [*start, *chain.from_iterable(reversed(kept)), *query_ids, *end]
        return Prompt(token_ids, len(history) - len(kept), self._openings[enable_thinking])

    def render(self, system: str, history: Iterable[Turn], query: str, enable_thinking: bool | None = None) -> str:
        """The same conversation as the model's own template writes it, where text can spell control tokens. Where it
        takes no system prompt, that stands before the user's first text, with an empty line between.
        """
        messages = [{"role": "system", "content": system}]
        for user, answer in history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": query})
        if self._joins_system:
            del messages[0]
            if system.strip():
                messages[0]["content"] = f"{system.strip()}\n\n{messages[0]['content']}"
        flags = self._options if enable_thinking is None else {**self._options, "enable_thinking": enable_thinking}
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True, **flags
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatError(f"the model's chat template fails: {error}") from error

    def _led(self, lead: str, layout: Layout, text: str) -> str:
        """The user's first text, after the system prompt; trimmed together where the template sees them as one."""
        return layout.trim_first(lead + text) if self._joins_system else lead + layout.trim_first(text)

    def _encode_system(self, system: str) -> tuple[int, ...]:
        layout = self._layouts[True]
        return (*self._text_ids(layout.start, system, layout.end), *layout.end.token_ids)

    def _encode_turn(self, user: str, answer: str) -> tuple[int, ...]:
        """Token ids from the start of a user's text up to the start of the next one."""
        answer = self._trim_answer(answer)
        if self._after_thoughts is not None and "</think>" in answer:
            answer = answer.split("</think>")[-1].lstrip(self._after_thoughts)
        return (
            *self._text_ids(self._user, user, self._assistant),
            *self._assistant.token_ids,
            *self._text_ids(self._assistant, answer, self._user),
            *self._user.token_ids,
        )

    def _text_ids(self, opening: Mark, text: str, closing: Mark) -> tuple[int, ...]:
        """Token ids of a text with the plain ends of the marks around it, which the tokenizer merges with it."""
        encoder = self._answers if opening is self._assistant else self._texts
        return self._plain_ids(encoder, opening.after + text + closing.before)

    def _plain_ids(self, encoder: Tokenizer, text: str) -> tuple[int, ...]:
        (encoding,) = encoder.encode_batch_fast([text], add_special_tokens=False)
        return tuple(map(self._ints.__getitem__, encoding.ids))

    def _encode(self, text: str) -> list[int]:
        """Token ids of trusted text, where control tokens count."""
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _learn_control_tokens(self) -> None:
        """Which of the added tokens texts may not hold: special ones, and those between the texts of a conversation."""
        if not (self._template or self._tokenizer.chat_template):
            raise ChatError(
                "the model has no chat template: use /v1/completions (in Python complete_batch), or name one with "
                "--chat-template"
            )
        self._joins_system = False
        self._joins_system = not self._takes_system()
        around, _, _ = self.render(SYSTEM, [(USER, ANSWER)], QUERY).partition(QUERY)
        added = self._tokenizer.added_tokens_decoder.values()
        control = [token.content for token in added if token.special or token.content in around]
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # A text follows a control token, so the space that some tokenizers put before a whole prompt is not its.
        state = self._tokenizer.backend_tokenizer.to_str()
        state = json.loads(state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        # An answer may hold the tokens the model wrote itself, such as <tool_call>; a user's text may hold none.
        added = [{**token, "special": token["content"] in control} for token in state["added_tokens"]]
        self._answers = Tokenizer.from_str(json.dumps({**state, "added_tokens": added}))
        self._answers.encode_special_tokens = True
        self._texts = Tokenizer.from_str(json.dumps({**state, "added_tokens": []}))
        if any(set(self._encode(token)) & set(self._plain_ids(self._texts, token)) for token in control):
            raise ChatError(f"the model's tokenizer takes text for control tokens: {NO_CHAT}")

    def _learn_marks(self) -> None:
        learned = [self._learn(system, thinking) for thinking in THINKING for system in ("", SYSTEM)]
        layouts, turns, generate = zip(*learned, strict=True)
        self._layouts, self._generate = dict(enumerate(layouts[:2])), dict(zip(THINKING, generate[::2], strict=True))
        self._user, self._assistant, self._trim_user, self._trim_answer = turns[0]
        if {*turns} != {turns[0]} or layouts != 3 * layouts[:2] or generate[::2] != generate[1::2]:
            raise ChatError(f"the chat template writes turns in more than one way: {NO_CHAT}")
        # Qwen3's template leaves the thoughts of earlier answers out, and the empty lines after them.
        texts = ANSWER, f"\n\n{ANSWER}", f"<think>{USER}</think>\n\n{ANSWER}"
        answer, gap, thought = (self.render("", [("", text)], "") for text in texts)
        self._after_thoughts = "\n" if thought == answer else "" if thought == gap else None

    def _takes_system(self) -> bool:
        try:
            return SYSTEM in self.render(SYSTEM, [], QUERY)
        except ChatError:
            return False

    def _learn(self, system: str, thinking: bool | None) -> tuple[Layout, tuple[Mark, Mark, Trim, Trim], Mark]:
        """How the template begins a conversation, what stands around its turns, and what the answer comes after."""
        prompt = self.render(system, [(USER, ANSWER)], QUERY, thinking)
        padded = self.render(_padded(system), [(_padded(USER), _padded(ANSWER))], _padded(QUERY), thinking)
        trims = _trims(prompt, padded)
        if [text for text in trims if text != SYSTEM] != [USER, ANSWER, QUERY] or (SYSTEM in trims) != bool(system):
            raise ChatError(f"the chat template does not keep system, user and assistant texts as they are: {NO_CHAT}")
        head, answering, asking, generating = re.split(f"{USER}|{ANSWER}|{QUERY}", prompt)
        user, first = self._mark(asking), head[self._last_control(head) :]
        if system and SYSTEM not in head + user.after:
            raise ChatError(f"the chat template puts the system prompt into the middle of the conversation: {NO_CHAT}")
        head, last = head.removesuffix(first), user.after
        common = min(first, last, key=len)
        if not (first.startswith(common) and last.startswith(common)):
            raise ChatError(f"the chat template opens the first user turn and later ones differently: {NO_CHAT}")
        opening, is_turn, closing = head.partition(SYSTEM)
        cut = self._last_control(opening)
        layout = Layout(
            start=Mark("", tuple(self._encode(opening[:cut])), opening[cut:]),
            end=self._mark(closing) if is_turn else None,
            first=first.removeprefix(common),
            last=last.removeprefix(common),
            trim_system=trims.get(SYSTEM, str),
            trim_first=trims[USER],
            trim_last=trims[QUERY],
        )
        user = Mark(user.before, user.token_ids, common)
        trim_user = layout.trim_last if layout.first else layout.trim_first
        return layout, (user, self._mark(answering), trim_user, trims[ANSWER]), self._mark(generating)

    def _mark(self, literal: str) -> Mark:
        first = self._control.search(literal)
        if not first:
            raise ChatError(
                f"the chat template separates texts without control tokens, so that text can pass for a turn: {NO_CHAT}"
            )
        start, end = first.start(), self._last_control(literal)
        return Mark(literal[:start], tuple(self._encode(literal[start:end])), literal[end:])

    def _last_control(self, literal: str) -> int:
        """Where the last control token ends; 0: there is none."""
        return max((found.end() for found in self._control.finditer(literal)), default=0)

    def _check_against_template(self) -> None:
        history = [("1 + 1 = ?", "2"), ("你好\n", " 你好！"), ("?", "<think>\nHm.\n</think>\n\nYes.")]
        query = "  def f():\n\treturn 42\n"
        for thinking, system, turns in product(THINKING, ("", "Be brief.\n"), (history, history[:1], [])):
            probe = system, turns, query
            if self.build(*probe, 2**20, thinking).token_ids != self._encode(self.render(*probe, thinking)):
                raise ChatError(f"the prompt builder and the model's chat template disagree: {NO_CHAT}")


def _padded(text: str) -> str:
    return text and f"{LEFT}{text}{RIGHT}"


def _trims(prompt: str, padded: str) -> dict[str, Trim]:
    """What the template does to whitespace around each of the known texts, in their order, as a second prompt shows
    in which whitespace is around them; {} where it does more, or where one of the texts comes twice.
    """
    kinds = {(True, True): str, (False, True): str.lstrip, (True, False): str.rstrip, (False, False): str.strip}
    parts, around = (re.split(f"({'|'.join(TEXTS)})", text) for text in (prompt, padded))
    if [part.removeprefix(RIGHT).removesuffix(LEFT) for part in around] != parts:
        return {}
    places = range(1, len(parts), 2)
    trims = {parts[i]: kinds[around[i - 1].endswith(LEFT), around[i + 1].startswith(RIGHT)] for i in places}
    return trims if len(trims) == len(places) else {}


def _cached(encode: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """Remembers the ids of many short texts or a few long ones, so that its memory is bounded."""
    short, long = lru_cache(4096)(encode), lru_cache(32)(encode)
    return lambda *texts: (short if sum(map(len, texts)) < 16_384 else long)(*texts)
