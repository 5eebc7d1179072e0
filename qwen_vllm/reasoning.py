"""Separates reasoning (`<think>…</think>`) from the text of an answer, and finds the parser that suits a model.

`/chat` and the offline chat use `ReasoningSplitter`. vLLM's parsers treat an answer without tags as reasoning. Some of
them split streamed and whole answers differently, and some read the whole answer again for each token.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<think>", "</think>"
PARSER, ALWAYS_PARSER = "qwen_thinking", "qwen_always_thinking"
"""The names of our parsers for vLLM's own routes: for models that may think, and for those that always do."""


@dataclass(frozen=True)
class ThinkTags:
    """What begins and what ends the reasoning. Each is one token; `end_id` is the end's."""

    start: str
    end: str
    end_id: int


class ReasoningSplitter:
    """Splits one answer, while it comes, into reasoning and text.

    There is reasoning where the prompt has begun it, or where the answer begins with the start tag. Line breaks around
    the reasoning belong neither to it nor to the text.

    Args:
        tags: the model's; None: it does not think.
        opening: the end of the prompt, behind the user's text.

    Attributes:
        ended: no reasoning is to come any more; text may be taken as it is.
        tokens: how many tokens the reasoning has taken, without the tags.
    """

    def __init__(self, tags: ThinkTags | None, opening: str) -> None:
        self.ended, self.tokens = tags is None, 0
        self._tags, self._pending = tags or ThinkTags("", "", -1), ""
        self._begun = opening.rfind(self._tags.start) > opening.rfind(self._tags.end)
        self._closed = False
        self._counted = self._shown = False
        self._breaks = 0  # line breaks that are of the reasoning only if more of it comes

    def split(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """Return (new reasoning, new text) for the next piece of the answer and its tokens.

        What may be the start of a tag is held back until more has come; nothing is with the `last` piece.
        """
        if self.ended:
            return "", text
        if not self._counted:
            self._counted = self._tags.end_id in token_ids
            self.tokens += token_ids.index(self._tags.end_id) if self._counted else len(token_ids)
        self._pending += text
        if self._closed:
            return "", self._take_text()
        return self._think(last) if self._begun else self._begin(last)

    def _begin(self, last: bool) -> tuple[str, str]:
        """Decide whether the answer begins with the start tag, as soon as that is clear."""
        written = self._pending.lstrip()
        if written.startswith(self._tags.start):
            self._begun = True
            self._pending = written.removeprefix(self._tags.start)
            self.tokens -= 1
            return self._think(last)
        if last or not self._tags.start.startswith(written):
            self.tokens = 0
            return "", self._take_text()
        return "", ""

    def _think(self, last: bool) -> tuple[str, str]:
        thought, tag, text = self._pending.partition(self._tags.end)
        if not (tag or last):
            thought = thought[: len(thought) - _overlap(thought, self._tags.end)]
        self._pending = text if tag else self._pending[len(thought) :]
        shown = thought.rstrip("\n")
        breaks, self._breaks = self._breaks, len(thought) - len(shown)
        if not shown:
            self._breaks += breaks
        elif self._shown:
            shown = "\n" * breaks + shown
        else:
            self._shown, shown = True, shown.lstrip("\n")
        if not tag:
            return shown, ""
        self._closed = True
        return shown, self._take_text()

    def _take_text(self) -> str:
        text = self._pending.lstrip("\n") if self._begun else self._pending
        self._pending = ""
        self.ended = text != ""
        return text


def _overlap(text: str, tag: str) -> int:
    """Count the characters at the end of `text` that may be the start of `tag`."""
    if tag[0] not in text:
        return 0
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


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

    # Where the prompt begins the reasoning, an answer without tags is one that was cut in it.
    if begins_reasoning(False):
        return ALWAYS_PARSER
    return "qwen3" if begins_reasoning(True) else PARSER


def parser_for_folder(
    folder: Path, chat_template: str | None, options: Mapping[str, Any], trust_remote_code: bool
) -> str:
    """Choose it for a checkpoint that is not loaded. Its tokenizer is loaded only where the model may think."""
    files = [folder / "tokenizer_config.json", folder / "chat_template.jinja"]
    described = [chat_template or "", *(file.read_text(encoding="utf-8") for file in files if file.is_file())]
    if not any(END in text for text in described):
        return ""
    from transformers import AutoTokenizer

    with suppress(Exception):  # what is wrong with a tokenizer or its template is told by who needs them
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return parser_for(tokenizer, chat_template, options)
    return ""


def think_tags(parser: str, tokenizer: "PreTrainedTokenizerBase") -> ThinkTags | None:
    """Return the tags of a reasoning parser of vLLM's; None where there is no parser, or its tags are no tokens."""
    if not parser:
        return None
    from vllm.reasoning import ReasoningParserManager

    register()
    found = ReasoningParserManager.get_reasoning_parser(parser)(tokenizer)
    start, end, vocabulary = found.reasoning_start_str, found.reasoning_end_str, tokenizer.get_vocab()
    return ThinkTags(start, end, vocabulary[end]) if start in vocabulary and end in vocabulary else None


def register() -> None:
    """Make our parsers known to vLLM in this process."""
    from vllm.reasoning import ReasoningParserManager

    for name, adapter in ((PARSER, "QwenReasoningParser"), (ALWAYS_PARSER, "AlwaysReasoningParser")):
        ReasoningParserManager.register_lazy_module(name, "qwen_vllm.vllm_plugin.reasoning_parsers", adapter)
