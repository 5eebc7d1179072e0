"""Conversation → token ids, within a token budget, for a tokenizer it is handed. Knows nothing of vLLM, HTTP or files.

A chat prompt is texts between separators: `system ‹S› user ‹U› assistant ‹A› user ‹Q› assistant`. The separators are
learned from the model's own chat template. Only they may hold control tokens: texts are encoded so that nothing they
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]
"""One finished exchange: what the user said, what the assistant answered."""
Trim = Callable[[str], str]
Thinking = bool | None
"""Whether the model is to think first; None leaves it to the template."""
THINKING: tuple[Thinking, ...] = (None, True, False)
TEXTS = SYSTEM, USER, ANSWER, QUERY = "⟦system⟧", "⟦user⟧", "⟦answer⟧", "⟦query⟧"
LEFT, RIGHT = "\v", "\f"
"""Whitespace, to see which texts a template trims."""


class UnsupportedTemplate(ValueError):
    """The prompt builder cannot follow the chat template; the message says why."""


class NoChatTemplate(UnsupportedTemplate):
    """The model has no chat template."""


class UnsupportedTokenizer(UnsupportedTemplate):
    """The tokenizer is not one of the tokenizers library."""


class PromptTooLong(ValueError):
    """System and query alone do not fit the budget; the message has the numbers of tokens."""


@dataclass(frozen=True)
class Prompt:
    """A prompt for the engine.

    Attributes:
        token_ids: what the engine takes.
        dropped_turns: how many of the oldest turns were left out to fit.
        opening: the text between the query and the answer.
    """

    token_ids: list[int]
    dropped_turns: int
    opening: str = ""


@dataclass(frozen=True)
class Separator:
    """What the template puts between two texts: the end of the one, control tokens, the start of the other."""

    before: str
    token_ids: tuple[int, ...]
    after: str


@dataclass(frozen=True)
class Layout:
    """How the template starts a conversation, and where it puts the system prompt.

    The system prompt is in its own turn, which `end` closes (ChatML: `<|im_start|>system\\n⟦system⟧<|im_end|>`). Or
    `end` is None, and `first` or `last` is the plain text, with SYSTEM in it, before the first user text (Gemma) or
    before the last one (Mistral: `[INST] ⟦system⟧\\n\\n⟦query⟧ [/INST]`).
    """

    start: Separator
    end: Separator | None
    first: str
    last: str
    trim_system: Trim
    trim_first: Trim
    trim_last: Trim


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template was seen to do.

    Attributes:
        layouts: how a conversation starts without a system prompt, and with one.
        user: what comes before a user's text in later turns.
        assistant: what comes before an answer.
        trim_user, trim_answer: what the template does to whitespace around these texts.
        generate: what comes after the query, by `Thinking`.
        after_reasoning: where the template drops the reasoning of earlier answers, the whitespace that it drops too.
    """

    layouts: tuple[Layout, Layout]
    user: Separator
    assistant: Separator
    trim_user: Trim
    trim_answer: Trim
    generate: Mapping[Thinking, Separator]
    after_reasoning: str | None


class ChatTemplate:
    """The model's own chat template, as it renders conversations.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: Jinja text that replaces the tokenizer's own.
        options: what the template is given beside the messages, such as `enable_thinking`.

    Attributes:
        joins_system: whether the template takes no system prompt: then the prompt goes before the first user text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None, options: Mapping[str, Any]) -> None:
        if not (template or tokenizer.chat_template):
            raise NoChatTemplate("the model has no chat template")
        self._tokenizer, self._template, self._options = tokenizer, template, options
        self.joins_system = not self._takes_system()

    def render(self, system: str, history: Iterable[Turn], query: str, thinking: Thinking = None) -> str:
        """Render a conversation; text can spell control tokens here.

        Raises:
            UnsupportedTemplate: the template fails.
        """
        messages = [] if self.joins_system else [{"role": "system", "content": system}]
        for user, answer in history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": query})
        if self.joins_system and system.strip():
            messages[0]["content"] = f"{system.strip()}\n\n{messages[0]['content']}"
        return self._render(messages, thinking)

    def _render(self, messages: list[dict[str, str]], thinking: Thinking = None) -> str:
        flags = self._options if thinking is None else {**self._options, "enable_thinking": thinking}
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True, **flags
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UnsupportedTemplate(f"the model's chat template fails: {error}") from error
        return rendered

    def _takes_system(self) -> bool:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUERY}]
        try:
            return SYSTEM in self._render(messages)
        except UnsupportedTemplate:
            return False


class Encoder:
    """Encodes trusted text, in which control tokens count, and texts of others, in which none does.

    Control tokens are the special ones and those that the template puts between the texts of a conversation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> None:
        self._trusted: Tokenizer = tokenizer.backend_tokenizer
        around, _, _ = template.render(SYSTEM, [(USER, ANSWER)], QUERY).partition(QUERY)
        added = tokenizer.added_tokens_decoder.values()
        control = [token.content for token in added if token.special or token.content in around]
        self.control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # A text follows a control token, so the space that some tokenizers put before a whole prompt is not its.
        state = json.loads(self._trusted.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        # An answer may hold the tokens the model wrote itself, such as <tool_call>; a user's text may hold none.
        added = [{**token, "special": token["content"] in control} for token in state["added_tokens"]]
        self._answers = Tokenizer.from_str(json.dumps({**state, "added_tokens": added}))
        self._answers.encode_special_tokens = True
        self._texts = Tokenizer.from_str(json.dumps({**state, "added_tokens": []}))
        # One int object a token id, shared by all cached texts: 8 bytes a token instead of 36.
        self._ints = list(range(max(tokenizer.get_vocab().values()) + 1))
        if any(set(self.trusted(token)) & set(self.text(token)) for token in control):
            raise UnsupportedTemplate("the model's tokenizer takes text for control tokens")

    def trusted(self, text: str) -> list[int]:
        """Encode text of the template."""
        ids: list[int] = self._trusted.encode(text, add_special_tokens=False).ids
        return ids

    def text(self, text: str) -> tuple[int, ...]:
        """Encode text of a user or an operator."""
        return self._plain(self._texts, text)

    def answer(self, text: str) -> tuple[int, ...]:
        """Encode text of the model."""
        return self._plain(self._answers, text)

    def _plain(self, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return tuple(map(self._ints.__getitem__, encoding.ids))


class PromptBuilder:
    """Builds prompts for one tokenizer; safe to call from several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: a Jinja template that replaces the tokenizer's own.
        options: what the template is given beside the messages, such as `enable_thinking`.

    Raises:
        UnsupportedTemplate: the tokenizer has no chat template, or one that is not texts between fixed separators.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedTokenizer("the model's tokenizer is not of the tokenizers library")
        self._template = ChatTemplate(tokenizer, chat_template, options)
        self._encoder = Encoder(tokenizer, self._template)
        self._format = learn_format(self._template, self._encoder)
        self._system_ids, self._turn_ids = _cached(self._encode_system), _cached(self._encode_turn)
        self._ends = {
            thinking: (*separator.token_ids, *self._encoder.answer(separator.after))
            for thinking, separator in self._format.generate.items()
        }
        self._openings = {
            thinking: self.render(SYSTEM, [], QUERY, thinking).rpartition(QUERY)[2] for thinking in THINKING
        }
        self._check_against_template()

    @property
    def stop_token_id(self) -> int:
        """The control token that ends an assistant's turn."""
        return self._format.user.token_ids[0]

    def build(
        self, system: str, history: Sequence[Turn], query: str, budget: int, enable_thinking: Thinking = None
    ) -> Prompt:
        """Build the prompt for `query`, of at most `budget` tokens. Keep the newest whole turns that fit, in order.

        Raises:
            PromptTooLong: system and query alone do not fit; they are never cut.
        """
        system = system.strip() if self._template.joins_system else system
        layout, generate = self._format.layouts[bool(system)], self._format.generate[enable_thinking]
        end = self._ends[enable_thinking]
        system = layout.trim_system(system)
        first, last = layout.first.replace(SYSTEM, system), layout.last.replace(SYSTEM, system)
        start = [*layout.start.token_ids, *(self._system_ids(system) if layout.end else ())]
        later = query_ids = self._user_ids(last + layout.trim_last(query), generate)
        if first:
            query_ids = self._user_ids(self._with_lead(first, layout, last + query), generate)
        room = budget - len(start) - len(query_ids) - len(end)
        if room < 0:
            raise PromptTooLong(f"system and query take {budget - room} tokens, but only {max(budget, 0)} fit")
        kept = []
        room += len(query_ids) - len(later)
        for user, answer in reversed(history):
            # As the first turn, which may hold the system prompt; as a later one it does not.
            opening = self._turn_ids(self._with_lead(first, layout, user), answer)
            if len(opening) > room:
                break
            turn = self._turn_ids(self._format.trim_user(user), answer) if first else opening
            room -= len(turn)
            kept.append(turn)
            oldest = opening
        if kept:
            kept[-1], query_ids = oldest, later
        token_ids = [*start, *chain.from_iterable(reversed(kept)), *query_ids, *end]
        return Prompt(token_ids, len(history) - len(kept), self._openings[enable_thinking])

    def render(self, system: str, history: Iterable[Turn], query: str, enable_thinking: Thinking = None) -> str:
        """Render the same conversation by the model's own template, where text can spell control tokens.

        Where the template takes no system prompt, that goes before the user's first text, with an empty line between.
        """
        return self._template.render(system, history, query, enable_thinking)

    def _with_lead(self, lead: str, layout: Layout, text: str) -> str:
        """Put the system prompt before the user's first text; trim both as one where the template sees them as one."""
        return layout.trim_first(lead + text) if self._template.joins_system else lead + layout.trim_first(text)

    def _user_ids(self, text: str, closing: Separator) -> tuple[int, ...]:
        """Encode a user's text with the plain ends of the separators around it, which the tokenizer merges with it."""
        return self._encoder.text(self._format.user.after + text + closing.before)

    def _encode_system(self, system: str) -> tuple[int, ...]:
        start, end = self._format.layouts[True].start, self._format.layouts[True].end
        return (*self._encoder.text(start.after + system + end.before), *end.token_ids) if end else ()

    def _encode_turn(self, user: str, answer: str) -> tuple[int, ...]:
        """Encode from the start of a user's text up to the start of the next one."""
        form = self._format
        answer = form.trim_answer(answer)
        if form.after_reasoning is not None and "</think>" in answer:
            answer = answer.split("</think>")[-1].lstrip(form.after_reasoning)
        return (
            *self._user_ids(user, form.assistant),
            *form.assistant.token_ids,
            *self._encoder.answer(form.assistant.after + answer + form.user.before),
            *form.user.token_ids,
        )

    def _check_against_template(self) -> None:
        history = [("1 + 1 = ?", "2"), ("你好\n", " 你好！"), ("?", "<think>\nHm.\n</think>\n\nYes.")]
        query = "  def f():\n\treturn 42\n"
        for thinking, system, turns in product(THINKING, ("", "Be brief.\n"), (history, history[:1], [])):
            probe = system, turns, query
            if self.build(*probe, 2**20, thinking).token_ids != self._encoder.trusted(self.render(*probe, thinking)):
                raise UnsupportedTemplate("the prompt builder and the model's chat template disagree")


def learn_format(template: ChatTemplate, encoder: Encoder) -> ChatFormat:
    """Learn from known texts what the template does.

    Raises:
        UnsupportedTemplate: it is not texts between fixed separators.
    """
    learned = [_learn(template, encoder, system, thinking) for thinking in THINKING for system in ("", SYSTEM)]
    layouts, turns, generate = ([*column] for column in zip(*learned, strict=True))
    same_layouts = all(layouts[i : i + 2] == layouts[:2] for i in (2, 4))
    if {*turns} != {turns[0]} or not same_layouts or generate[::2] != generate[1::2]:
        raise UnsupportedTemplate("the chat template writes turns in more than one way")
    # Qwen3's template drops the reasoning of earlier answers, and the empty lines after it.
    texts = ANSWER, f"\n\n{ANSWER}", f"<think>{USER}</think>\n\n{ANSWER}"
    answer, gap, reasoned = (template.render("", [("", text)], "") for text in texts)
    after_reasoning = "\n" if reasoned == answer else "" if reasoned == gap else None
    user, assistant, trim_user, trim_answer = turns[0]
    return ChatFormat(
        layouts=(layouts[0], layouts[1]),
        user=user,
        assistant=assistant,
        trim_user=trim_user,
        trim_answer=trim_answer,
        generate=dict(zip(THINKING, generate[::2], strict=True)),
        after_reasoning=after_reasoning,
    )


def _learn(
    template: ChatTemplate, encoder: Encoder, system: str, thinking: Thinking
) -> tuple[Layout, tuple[Separator, Separator, Trim, Trim], Separator]:
    """Learn how a conversation starts, what stands around its turns, and what the answer comes after."""
    prompt = template.render(system, [(USER, ANSWER)], QUERY, thinking)
    padded = template.render(_padded(system), [(_padded(USER), _padded(ANSWER))], _padded(QUERY), thinking)
    trims = _trims(prompt, padded)
    if [text for text in trims if text != SYSTEM] != [USER, ANSWER, QUERY] or (SYSTEM in trims) != bool(system):
        raise UnsupportedTemplate("the chat template does not keep system, user and assistant texts as they are")
    head, answering, asking, generating = re.split(f"{USER}|{ANSWER}|{QUERY}", prompt)
    user, first = _separator(encoder, asking), head[_last_control(encoder, head) :]
    if system and SYSTEM not in head + user.after:
        raise UnsupportedTemplate("the chat template puts the system prompt into the middle of the conversation")
    head, last = head.removesuffix(first), user.after
    common = min(first, last, key=len)
    if not (first.startswith(common) and last.startswith(common)):
        raise UnsupportedTemplate("the chat template opens the first user turn and later ones differently")
    opening, is_turn, closing = head.partition(SYSTEM)
    cut = _last_control(encoder, opening)
    layout = Layout(
        start=Separator("", tuple(encoder.trusted(opening[:cut])), opening[cut:]),
        end=_separator(encoder, closing) if is_turn else None,
        first=first.removeprefix(common),
        last=last.removeprefix(common),
        trim_system=trims.get(SYSTEM, str),
        trim_first=trims[USER],
        trim_last=trims[QUERY],
    )
    user = Separator(user.before, user.token_ids, common)
    trim_user = layout.trim_last if layout.first else layout.trim_first
    turn = user, _separator(encoder, answering), trim_user, trims[ANSWER]
    return layout, turn, _separator(encoder, generating)


def _separator(encoder: Encoder, literal: str) -> Separator:
    first = encoder.control.search(literal)
    if not first:
        raise UnsupportedTemplate(
            "the chat template separates texts without control tokens, so that text can pass for a turn"
        )
    start, end = first.start(), _last_control(encoder, literal)
    return Separator(literal[:start], tuple(encoder.trusted(literal[start:end])), literal[end:])


def _last_control(encoder: Encoder, literal: str) -> int:
    """Find where the last control token ends; 0: there is none."""
    return max((found.end() for found in encoder.control.finditer(literal)), default=0)


def _padded(text: str) -> str:
    return text and f"{LEFT}{text}{RIGHT}"


def _trims(prompt: str, padded: str) -> dict[str, Trim]:
    """Find what the template does to whitespace around each of the known texts, in their order.

    Args:
        prompt: rendered from the texts.
        padded: rendered from the texts with whitespace around them.

    Returns {} where the template does more than trim, or where one of the texts comes twice.
    """
    kinds: dict[tuple[bool, bool], Trim] = {
        (True, True): str,
        (False, True): str.lstrip,
        (True, False): str.rstrip,
        (False, False): str.strip,
    }
    parts, around = (re.split(f"({'|'.join(TEXTS)})", text) for text in (prompt, padded))
    if [part.removeprefix(RIGHT).removesuffix(LEFT) for part in around] != parts:
        return {}
    places = range(1, len(parts), 2)
    trims = {parts[i]: kinds[around[i - 1].endswith(LEFT), around[i + 1].startswith(RIGHT)] for i in places}
    return trims if len(trims) == len(places) else {}


def _cached(encode: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """Cache the ids of many short texts or a few long ones, so that memory is bounded."""
    short, long = lru_cache(4096)(encode), lru_cache(32)(encode)
    return lambda *texts: (short if sum(map(len, texts)) < 16_384 else long)(*texts)
