"""A model's own chat template: what it writes around the texts of a conversation, and how texts are encoded.

What a template does is learned by rendering known texts. `prompt_utils` builds prompts from what is learned.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qwen_vllm.protocol import Turn
from qwen_vllm.text_encoder import any_of, split, text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Trim = Callable[[str], str]
Mode = tuple[bool | None, str | None]
"""Whether the model is to think first, and its reasoning effort; None leaves each to the template."""
THINKING = (None, True, False)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""The levels of effort that a template is asked for, from the least."""
TEXTS = SYSTEM, USER, REASONING, ANSWER, QUERY = "⟦system⟧", "⟦user⟧", "⟦reasoning⟧", "⟦answer⟧", "⟦query⟧"
LEFT, RIGHT = "\v", "\f"
"""Whitespace, to see which texts a template trims."""


class UnsupportedTemplate(ValueError):
    """The prompt builder cannot follow the chat template; the message says why."""


class NoChatTemplate(UnsupportedTemplate):
    """The model has no chat template."""


class UnsupportedTokenizer(UnsupportedTemplate):
    """The tokenizer is not one of the tokenizers library."""


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
class TurnFormat:
    """What the template writes around the texts of an earlier turn, and what it does to them.

    Attributes:
        user: what comes before a user's text in later turns.
        assistant: what comes before an answer without reasoning.
        reasoning: what comes before the reasoning of a turn, and between it and the answer; None: it is left out.
        trim_user, trim_answer, trim_reasoning: what the template does to whitespace around these texts.
        after_reasoning: where the template takes reasoning out of an answer's own text, the whitespace behind it that
            goes too; None: where it does not. First for a turn without reasoning apart, then for one with it.
    """

    user: Separator
    assistant: Separator
    reasoning: tuple[Separator, Separator] | None
    trim_user: Trim
    trim_answer: Trim
    trim_reasoning: Trim
    after_reasoning: tuple[str | None, str | None]


@dataclass(frozen=True)
class ModeFormat:
    """What depends on `Mode`.

    Attributes:
        layouts: how a conversation starts without a system message (None), with an empty one (False), and with one.
        generate: what comes after the query.
        opening: the same as text.
    """

    layouts: Mapping[bool | None, Layout]
    generate: Separator
    opening: str


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template was seen to do. `efforts`: the levels of reasoning effort that it knows, from the least."""

    turn: TurnFormat
    modes: Mapping[Mode, ModeFormat]
    efforts: tuple[str, ...]


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

    def render(self, system: str | None, history: Iterable[Turn], query: str, mode: Mode = (None, None)) -> str:
        """Render a conversation; text can spell control tokens here. `system` None: without a system message.

        Raises:
            UnsupportedTemplate: the template fails.
        """
        messages = [] if self.joins_system or system is None else [{"role": "system", "content": system}]
        for user, answer, *reasoning in history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            if any(reasoning):
                messages[-1]["reasoning_content"] = reasoning[0]
        messages.append({"role": "user", "content": query})
        if self.joins_system and system and system.strip():
            messages[0]["content"] = f"{system.strip()}\n\n{messages[0]['content']}"
        return self._render(messages, mode)

    def _render(self, messages: list[dict[str, str]], mode: Mode = (None, None)) -> str:
        asked = zip(("enable_thinking", "reasoning_effort"), mode, strict=True)
        options = {**self._options, **{name: value for name, value in asked if value is not None}}
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True, **options
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
        self._tokenizer, self._encoder = tokenizer, text_encoder(tokenizer)
        around, _, _ = template.render(SYSTEM, [(USER, ANSWER, REASONING)], QUERY).partition(QUERY)
        added = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special or token.content in around}
        self.control = any_of(control)
        # An answer may hold the tokens the model wrote itself, such as <tool_call>; a user's text may hold none. The
        # whitespace around them stays: the model wrote it.
        self._own = any_of({token.content for token in added} - control)
        # One int object a token id, shared by all cached texts: 8 bytes a token instead of 36.
        self._ints = list(range(max(tokenizer.get_vocab().values()) + 1))
        if any(set(self.trusted(token)) & set(self.text(token)) for token in control):
            raise UnsupportedTemplate("the model's tokenizer takes text for control tokens")

    def trusted(self, text: str) -> list[int]:
        """Encode text of the template."""
        return self._encoder.whole(text)

    def text(self, text: str) -> tuple[int, ...]:
        """Encode text of a user or an operator."""
        return self._shared(self._encoder.text(text))

    def answer(self, text: str) -> tuple[int, ...]:
        """Encode text of the model."""
        return self._shared(self._encoder.parts(split(text, self._own)))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of a whole prompt, with its control tokens."""
        text: str = self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _shared(self, token_ids: list[int]) -> tuple[int, ...]:
        return tuple(map(self._ints.__getitem__, token_ids))


def learn_format(template: ChatTemplate, encoder: Encoder) -> ChatFormat:
    """Learn from known texts what the template does.

    Raises:
        UnsupportedTemplate: it is not texts between fixed separators.
    """
    efforts = _efforts(template)
    turns, modes = set(), {}
    for mode in product(THINKING, (None, *efforts)):
        learned = [_learn(template, encoder, system, mode) for system in (None, "", SYSTEM)]
        layouts, of_turns, openings = zip(*learned, strict=True)
        turns |= {*of_turns}
        if len(turns) > 1 or len({*openings}) > 1:
            raise UnsupportedTemplate("the chat template writes turns in more than one way")
        by_system = dict(zip((None, False, True), layouts, strict=True))
        modes[mode] = ModeFormat(by_system, _separator(encoder, openings[0]), openings[0])
    (turn,) = turns
    return ChatFormat(turn, modes, efforts)


def _efforts(template: ChatTemplate) -> tuple[str, ...]:
    """Ask the template for each level of effort: it refuses those that it does not know, or takes no notice of any."""
    prompts = {}
    for effort in EFFORTS:
        with suppress(UnsupportedTemplate):
            prompts[effort] = template.render(SYSTEM, [], QUERY, (True, effort))
    if len(prompts) == len(EFFORTS) and {*prompts.values()} == {template.render(SYSTEM, [], QUERY, (True, None))}:
        return ()
    return tuple(prompts)


def _learn(template: ChatTemplate, encoder: Encoder, system: str | None, mode: Mode) -> tuple[Layout, TurnFormat, str]:
    """Learn how a conversation starts, what stands around its turns, and what the answer comes after."""
    prompt = template.render(system, [(USER, ANSWER)], QUERY, mode)
    padded = template.render(system and _padded(system), [(_padded(USER), _padded(ANSWER))], _padded(QUERY), mode)
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
    reasoning, trim_reasoning = _learn_reasoning(template, encoder, mode)
    turn = TurnFormat(
        user=Separator(user.before, user.token_ids, common),
        assistant=_separator(encoder, answering),
        reasoning=reasoning,
        trim_user=layout.trim_last if layout.first else layout.trim_first,
        trim_answer=trims[ANSWER],
        trim_reasoning=trim_reasoning,
        after_reasoning=(_after_reasoning(template, "", mode), _after_reasoning(template, REASONING, mode)),
    )
    return layout, turn, generating


def _learn_reasoning(
    template: ChatTemplate, encoder: Encoder, mode: Mode
) -> tuple[tuple[Separator, Separator] | None, Trim]:
    """Learn what stands around the reasoning of an earlier turn, if the template writes it at all."""
    turn = USER, ANSWER, REASONING
    prompt = template.render("", [turn], QUERY, mode)
    if REASONING not in prompt:
        return None, str
    padded = template.render("", [(_padded(USER), _padded(ANSWER), _padded(REASONING))], _padded(QUERY), mode)
    trims = _trims(prompt, padded)
    if [*trims] != [USER, REASONING, ANSWER, QUERY]:
        raise UnsupportedTemplate("the chat template does not keep the reasoning of a turn as it is")
    _, opening, closing, _, _ = re.split("|".join(trims), prompt)
    return (_separator(encoder, opening), _separator(encoder, closing)), trims[REASONING]


def _after_reasoning(template: ChatTemplate, reasoning: str, mode: Mode) -> str | None:
    """Learn whether `<think>…</think>` in an answer's own text is taken out, and which whitespace goes with it.

    Args:
        reasoning: what the turn has apart from its answer.
    """

    def written(answer: str, reasoning: str) -> str:
        return template.render("", [("", answer, reasoning)], "", mode)

    taken_out = written(f"<think>{USER}</think>\n\n{ANSWER}", reasoning)
    # Qwen3's template drops the empty lines after the reasoning too.
    ways = {"\n": ANSWER, "": f"\n\n{ANSWER}"}
    return next((gap for gap, answer in ways.items() if written(answer, reasoning or USER) == taken_out), None)


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
