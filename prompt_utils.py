"""Conversation → token ids, within a token budget, for a tokenizer it is handed. Knows nothing of vLLM, HTTP or files.

A chat prompt is texts between separators: `system ‹S› user ‹U› assistant ‹A› user ‹Q› assistant`. Some templates keep
the reasoning of a turn, before its answer. `chat_template` learns the separators from the model's own template. Only
they may hold control tokens: texts are encoded so that nothing they spell becomes one. Each text is encoded once and
cached, so a turn costs what is new in it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwen_vllm.chat_template import (
    SYSTEM,
    ChatTemplate,
    Encoder,
    Layout,
    Separator,
    UnsupportedTemplate,
    UnsupportedTokenizer,
    learn_format,
)
from qwen_vllm.protocol import Turn, turns_to_drop
from qwen_vllm.text_encoder import is_known

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptTooLong(ValueError):
    """System and query alone do not fit the budget; the message has the numbers of tokens."""


@dataclass(frozen=True)
class Prompt:
    """A prompt for the engine.

    Attributes:
        token_ids: what the engine takes.
        dropped_turns: how many of the oldest turns were left out.
        opening: the text between the query and the answer.
        dropped_reasoning: how many of the turns that were kept lost their reasoning to fit.
    """

    token_ids: list[int]
    dropped_turns: int
    opening: str = ""
    dropped_reasoning: int = 0


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
        if not is_known(tokenizer):
            raise UnsupportedTokenizer("the model's tokenizer is not of the tokenizers library")
        self._template = ChatTemplate(tokenizer, chat_template, options)
        self._encoder = Encoder(tokenizer, self._template)
        self._format = learn_format(self._template, self._encoder)
        self._system_ids, self._turn_ids = _cached(self._encoder.text), _cached(self._encode_turn)
        self._oldest_ids = _cached(self._encode_trimmed)
        self._ends = {
            mode: (*form.generate.token_ids, *self._encoder.answer(form.generate.after))
            for mode, form in self._format.modes.items()
        }
        self._check_against_template()

    @property
    def stop_token_id(self) -> int:
        """The control token that ends an assistant's turn."""
        return self._format.turn.user.token_ids[0]

    @property
    def keeps_reasoning(self) -> bool:
        """Whether the template writes the reasoning of earlier turns into the prompt."""
        return self._format.turn.reasoning is not None

    @property
    def efforts(self) -> tuple[str, ...]:
        """The levels of reasoning effort that the template knows, from the least; () where it knows none."""
        return self._format.efforts

    def opening(self, enable_thinking: bool | None = None, reasoning_effort: str | None = None) -> str:
        """Return the text between the query and the answer."""
        return self._format.modes[enable_thinking, reasoning_effort].opening

    def build(
        self,
        system: str | None,
        history: Sequence[Turn],
        query: str,
        budget: int,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
    ) -> Prompt:
        """Build the prompt for `query`, of at most `budget` tokens, with the newest whole turns that fit, in order.

        Where not all fits, reasoning is left out before turns are, from the oldest turn on. A few more than must go, so
        that the prompts of the next turns begin alike: at most a quarter of the history's room is given up for this.

        Args:
            system: None: without a system message, which the template may replace by one of its own.
            reasoning_effort: one of `efforts`.

        Raises:
            PromptTooLong: system and query alone do not fit; they are never cut.
        """
        mode = enable_thinking, reasoning_effort
        form, end = self._format.modes[mode], self._ends[mode]
        trim = str.strip if self._template.joins_system else form.layouts[True].trim_system
        layout = form.layouts[None if system is None else bool(trim(system))]
        system = trim(system or "")
        first, last = layout.first.replace(SYSTEM, system), layout.last.replace(SYSTEM, system)
        start = [*layout.start.token_ids]
        if layout.end:
            start += (*self._system_ids((layout.start.after + system + layout.end.before,)), *layout.end.token_ids)
        later = query_ids = self._user_ids(last + layout.trim_last(query), form.generate)
        if first:
            query_ids = self._user_ids(self._with_lead(first, layout, last + query), form.generate)
        room = budget - len(start) - len(query_ids) - len(end)
        if room < 0:
            raise PromptTooLong(f"system and query take {budget - room} tokens, but only {max(budget, 0)} fit")
        kept, dropped_reasoning = self._fit(history, room + len(query_ids) - len(later), layout, first)
        token_ids = [*start, *chain.from_iterable(reversed(kept)), *(later if kept else query_ids), *end]
        return Prompt(token_ids, len(history) - len(kept), form.opening, dropped_reasoning)

    def render(
        self,
        system: str | None,
        history: Iterable[Turn],
        query: str,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
    ) -> str:
        """Render the same conversation by the model's own template, where text can spell control tokens.

        Where the template takes no system prompt, that goes before the user's first text, with an empty line between.
        """
        return self._template.render(system, history, query, (enable_thinking, reasoning_effort))

    def _fit(self, history: Sequence[Turn], room: int, layout: Layout, lead: str) -> tuple[list[tuple[int, ...]], int]:
        """Encode the newest turns that fit into `room` tokens; where not all do, a few fewer (see `_steady_number`).

        Returns (their token ids, the newest first; how many of them lost their reasoning).
        """
        kept = self._newest(history, room, layout, lead)
        if len(kept) == len(history) or not self.keeps_reasoning:
            return kept, 0
        kept = self._newest([(user, answer) for user, answer, *_ in history], room, layout, lead)
        spare = room // 4
        room -= sum(map(len, kept))
        newest = history[: -len(kept) - 1 : -1]
        whole: list[tuple[int, ...]] = []
        left = room
        for n, turn in enumerate(newest):
            is_oldest = n == len(newest) - 1
            token_ids = self._with_system(turn, layout, lead) if lead and is_oldest else self._turn_ids(turn)
            left -= len(token_ids) - len(kept[n])
            if left < 0:
                costs = [len(token_ids) - len(bare) for token_ids, bare in zip(whole, kept, strict=False)]
                del whole[_steady_number(costs, len(history), room, spare) :]
                break
            whole.append(token_ids)
        without = newest[len(whole) :]
        return [*whole, *kept[len(whole) :]], sum(any(reasoning) for _, _, *reasoning in without)

    def _newest(self, turns: Sequence[Turn], room: int, layout: Layout, lead: str) -> list[tuple[int, ...]]:
        """Encode the newest whole turns that fit into `room` tokens, or a few fewer, the newest first."""
        kept: list[tuple[int, ...]] = []
        left = room
        for turn in reversed(turns):
            token_ids = self._turn_ids(turn)
            if len(self._with_system(turn, layout, lead) if lead else token_ids) > left:
                break
            left -= len(token_ids)
            kept.append(token_ids)
        del kept[_steady_number([*map(len, kept)], len(turns), room, room // 4) :]
        if lead and kept:
            kept[-1] = self._with_system(turns[-len(kept)], layout, lead)
        return kept

    def _with_system(self, turn: Turn, layout: Layout, lead: str) -> tuple[int, ...]:
        """Encode a turn as the oldest one, which holds the system prompt, `lead`."""
        user, *said = turn
        return self._oldest_ids((self._with_lead(lead, layout, user), *said))

    def _with_lead(self, lead: str, layout: Layout, text: str) -> str:
        """Put the system prompt before the user's first text; trim both as one where the template sees them as one."""
        return layout.trim_first(lead + text) if self._template.joins_system else lead + layout.trim_first(text)

    def _user_ids(self, text: str, closing: Separator) -> tuple[int, ...]:
        """Encode a user's text with the plain ends of the separators around it, which the tokenizer merges with it."""
        return self._encoder.text(self._format.turn.user.after + text + closing.before)

    def _encode_turn(self, user: str, answer: str, reasoning: str = "") -> tuple[int, ...]:
        """Encode from the start of a user's text up to the start of the next one."""
        return self._encode_trimmed(self._format.turn.trim_user(user), answer, reasoning)

    def _encode_trimmed(self, user: str, answer: str, reasoning: str = "") -> tuple[int, ...]:
        form = self._format.turn
        answer = form.trim_answer(answer)
        gap = form.after_reasoning[bool(reasoning)]
        if gap is not None and "</think>" in answer:
            before, *_, after = answer.split("</think>")
            reasoning = reasoning or before.rstrip("\n").split("<think>")[-1].lstrip("\n")
            answer = after.lstrip(gap)
        reasoning = form.trim_reasoning(reasoning)
        if reasoning and form.reasoning:
            asked, answered = form.reasoning
            reasoned = self._encoder.text(asked.after + reasoning + answered.before)
            separator = *asked.token_ids, *reasoned, *answered.token_ids
        else:
            asked = answered = form.assistant
            separator = asked.token_ids
        return (
            *self._user_ids(user, asked),
            *separator,
            *self._encoder.answer(answered.after + answer + form.user.before),
            *form.user.token_ids,
        )

    def _check_against_template(self) -> None:
        turns: list[Turn] = [("1 + 1 = ?", "2", " Hm.\n1, 2.\n"), ("你好\n", " 你好！"), ("?", "\n")]
        tagged: list[Turn] = [("?", "<think>\nHm.\n</think>\n\nYes."), ("?", "<think>A</think>\n\nB", "\n\n好。")]
        systems, query = (None, "", " \n", "Be brief.\n"), "  def f():\n\treturn 42\n"
        for mode, system, history in product(self._format.modes, systems, (turns, turns + tagged, turns[:1], [])):
            probe = system, history, query
            built, rendered = self.build(*probe, 2**20, *mode).token_ids, self.render(*probe, *mode)
            same = built == self._encoder.trusted(rendered)
            # Where a tag is a control token, one in a text is no token of ours, but of the template's.
            if not (same or (tagged[0] in history and self._encoder.decode(built) == rendered)):
                raise UnsupportedTemplate("the prompt builder and the model's chat template disagree")


def _steady_number(costs: Sequence[int], turns: int, room: int, spare: int) -> int:
    """Choose how many of the newest turns to keep: all, or a number that seldom changes what is dropped.

    Args:
        costs: tokens of each that fits into `room`, the newest first.
        turns: how many there are.
        spare: how many tokens of the room may stay free for this.
    """
    least = most = turns - len(costs)
    free = room - sum(costs)
    for cost in reversed(costs):
        free += cost
        if free > spare:
            break
        most += 1
    return turns - turns_to_drop(least, most)


def _cached(encode: Callable[..., tuple[int, ...]]) -> Callable[[tuple[str, ...]], tuple[int, ...]]:
    """Cache the ids of many short texts or a few long ones, so that memory is bounded."""

    def encoded(texts: tuple[str, ...]) -> tuple[int, ...]:
        return encode(*texts)

    short, long = lru_cache(4096)(encoded), lru_cache(32)(encoded)
    return lambda texts: (short if sum(map(len, texts)) < 16_384 else long)(texts)
