"""Separates reasoning (`<think>…</think>`) from the text of an answer, and finds the parser that suits a model.

`/chat` and the offline chat use `ReasoningSplitter`. vLLM's parsers treat an answer without tags as reasoning. Some of
them split streamed and whole answers differently, and some read the whole answer again for each token.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<think>", "</think>"
PARSER, ALWAYS_PARSER = "qwen_thinking", "qwen_always_thinking"
"""The names of our parsers for vLLM's own routes: for models that may think, and for those that always do."""


@dataclass(frozen=True)
class ThinkTags:
    """What begins and what ends the reasoning. Each is one token; `decode` turns token ids into text."""

    start: str
    end: str
    start_id: int
    end_id: int
    decode: Callable[[Sequence[int]], str]


class ReasoningSplitter:
    """Splits one answer, while it comes, into reasoning and text.

    There is reasoning where the prompt has begun it, or where the answer begins with the start tag. The tags are
    tokens: one that is spelled in plain letters is text like any other. Line breaks around the reasoning belong neither
    to it nor to the text.

    Args:
        tags: the model's; None: it does not think.
        opening: the end of the prompt, behind the user's text. Where it ends the reasoning, all that comes is text.

    Attributes:
        ended: no reasoning is to come any more; text may be taken as it is.
    """

    def __init__(self, tags: ThinkTags | None, opening: str) -> None:
        self._tags, self._pending = tags or ThinkTags("", "", -1, -1, str), ""
        self._begun = opening.rfind(self._tags.start) > opening.rfind(self._tags.end)
        self.ended = tags is None or (tags.end in opening and not self._begun)
        self._token_ids: list[int] = []
        self._end: int | None = None  # where the token of the end tag is
        self._tags_before = 0  # 1 where the answer itself began with the start tag
        self._spelled = 0  # end tags in plain letters among the reasoning so far
        self._closed = self._shown = False
        self._breaks = 0  # line breaks that are of the reasoning only if more of it comes

    @property
    def tokens(self) -> int:
        """How many tokens the reasoning has taken, without the tags."""
        end = len(self._token_ids) if self._end is None else self._end
        return end - self._tags_before if self._begun else 0

    def split(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """Return (new reasoning, new text) for the next piece of the answer and its tokens.

        A text may come later than its tokens, never before. What may be the start of a tag is held back until more has
        come; nothing is with the `last` piece.
        """
        if self.ended:
            return "", text
        if self._end is None and self._tags.end_id in token_ids:
            self._end = len(self._token_ids) + token_ids.index(self._tags.end_id)
        self._token_ids += token_ids
        self._pending += text
        if self._closed:
            return "", self._take_text()
        return self._think(last) if self._begun else self._begin(last)

    def _begin(self, last: bool) -> tuple[str, str]:
        """Decide whether the answer begins with the start tag, as soon as that is clear."""
        _, tag, written = self._pending.partition(self._tags.start)
        if self._starts_with_tag():
            if tag:
                self._begun, self._tags_before, self._pending = True, 1, written
                return self._think(last)
        elif self._pending.strip():
            return "", self._take_text()
        return ("", self._take_text()) if last else ("", "")

    def _starts_with_tag(self) -> bool:
        if self._tags.start_id not in self._token_ids:
            return False
        before = self._token_ids[: self._token_ids.index(self._tags.start_id)]
        return not self._tags.decode(before).strip()

    def _think(self, last: bool) -> tuple[str, str]:
        pieces = self._pending.split(self._tags.end)
        spelled = len(pieces) - 1
        if self._end is not None:
            before = self._tags.decode(self._token_ids[: self._end])
            spelled = max(0, before.count(self._tags.end) - self._spelled)
        thought, text = (self._tags.end.join(part) for part in (pieces[: spelled + 1], pieces[spelled + 1 :]))
        self._closed = len(pieces) > spelled + 1
        if not (self._closed or last):
            thought = thought[: len(thought) - overlap(thought, self._tags.end)]
        self._spelled += thought.count(self._tags.end)
        self._pending = text if self._closed else self._pending[len(thought) :]
        shown = self._without_breaks(thought)
        return shown, self._take_text() if self._closed else ""

    def _without_breaks(self, thought: str) -> str:
        """Leave out line breaks at the start of the reasoning, and hold back those that may be its end."""
        shown = thought.rstrip("\n")
        breaks, self._breaks = self._breaks, len(thought) - len(shown)
        if not shown:
            self._breaks += breaks
        elif self._shown:
            shown = "\n" * breaks + shown
        else:
            self._shown, shown = True, shown.lstrip("\n")
        return shown

    def _take_text(self) -> str:
        text = self._pending.lstrip("\n") if self._begun else self._pending
        self._pending = ""
        self.ended = text != ""
        return text


def overlap(text: str, word: str) -> int:
    """Count the characters at the end of `text` that may be the start of `word`."""
    if word[0] not in text:
        return 0
    return next((n for n in range(len(word) - 1, 0, -1) if text.endswith(word[:n])), 0)


def parser_for(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, options: Mapping[str, Any]) -> str:
    """Choose the reasoning parser for a model by its chat template; empty: the model does not think.

    Args:
        chat_template: Jinja text that replaces the tokenizer's own.
        options: what the template is given beside the messages.
    """
    if not (chat_template or tokenizer.chat_template):
        return ""
    template = tokenizer.get_chat_template(chat_template)  # of several, the one without tools
    if END not in template or not {START, END} <= tokenizer.get_vocab().keys():
        return ""

    def begins_reasoning(enable_thinking: bool) -> bool:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **{**options, "enable_thinking": enable_thinking},
        )
        return prompt.rfind(START) > prompt.rfind(END)

    with suppress(Exception):  # what is wrong with a template is told by who needs it
        # Where the prompt begins the reasoning, an answer without tags is one that was cut in it.
        if begins_reasoning(False):
            return ALWAYS_PARSER
        return "qwen3" if begins_reasoning(True) else PARSER
    return ""


def think_tags(parser: str, tokenizer: "PreTrainedTokenizerBase") -> ThinkTags | None:
    """Return the tags of a reasoning parser of vLLM's; None where there is no parser, or its tags are no tokens."""
    if not parser:
        return None
    from vllm.reasoning import ReasoningParserManager

    register()
    found = ReasoningParserManager.get_reasoning_parser(parser)(tokenizer)
    start, end, vocabulary = found.reasoning_start_str, found.reasoning_end_str, tokenizer.get_vocab()
    if not {start, end} <= vocabulary.keys():
        return None
    decode = partial(tokenizer.decode, skip_special_tokens=True)  # as the engine does for an answer
    return ThinkTags(start, end, vocabulary[start], vocabulary[end], decode)


def register() -> None:
    """Make our parsers of reasoning known to vLLM in this process."""
    from vllm.reasoning import ReasoningParserManager

    for name, adapter in ((PARSER, "QwenReasoningParser"), (ALWAYS_PARSER, "AlwaysReasoningParser")):
        ReasoningParserManager.register_lazy_module(name, "qwen_vllm.vllm_plugin.reasoning_parsers", adapter)
