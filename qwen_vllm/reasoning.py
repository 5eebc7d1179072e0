"""What a model thinks, told from what it says: a thought stands before the answer, between two marks.

`/chat` and the offline chat use `ReasoningSplitter`. vLLM's parsers take an answer without marks for a thought, some
split a streamed answer otherwise than a whole one, and some read the answer from its start for every token.
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
"""The names of our parsers for vLLM's own routes: of models that may think, and of those that always do."""


@dataclass(frozen=True)
class ThinkTags:
    """What begins and what ends a thought. Each is one token; `end_id` is the end's."""

    start: str
    end: str
    end_id: int


class ReasoningSplitter:
    """Splits one answer, while it comes, into what the model thinks and what it says.

    There is a thought where the prompt has begun one, or where the answer begins with the start mark. Line breaks
    around the thought belong neither to it nor to the text.

    Args:
        marks: the model's; None: it does not think.
        opening: the end of the prompt, behind the user's text.

    Attributes:
        ended: no thought is to come any more; text may be taken as it is.
        tokens: how many tokens the thought has taken, without the marks.
    """

    def __init__(self, tags: ThinkTags | None, opening: str) -> None:
        self.ended, self.tokens = tags is None, 0
        self._tags, self._pending = tags, ""
        self._begun = tags is not None and opening.rfind(tags.start) > opening.rfind(tags.end)
        self._phase = ReasoningSplitter._think if self._begun else ReasoningSplitter._begin
        self._counted = self._shown = False
        self._breaks = 0  # line breaks that are of the thought only if more of it comes

    def split(self, text: str, token_ids: Sequence[int], last: bool) -> tuple[str, str]:
        """(what is new of the thought, what is new of the text), for the next piece of the answer and its tokens.

        What may be the start of a mark is held back until more has come; nothing is with the `last` piece.
        """
        if self.ended:
            return "", text
        if not self._counted:
            self._counted = self._tags.end_id in token_ids
            self.tokens += token_ids.index(self._tags.end_id) if self._counted else len(token_ids)
        self._pending += text
        return self._phase(self, last)

    def _begin(self, last: bool) -> tuple[str, str]:
        """While it is open whether there is a thought at all."""
        written = self._pending.lstrip()
        if written.startswith(self._tags.start):
            self._begun, self._phase = True, ReasoningSplitter._think
            self._pending = written.removeprefix(self._tags.start)
            self.tokens -= 1
            return self._think(last)
        if last or not self._tags.start.startswith(written):
            self.tokens = 0
            return self._say(last)
        return "", ""

    def _think(self, last: bool) -> tuple[str, str]:
        thought, mark, text = self._pending.partition(self._tags.end)
        if not (mark or last):
            thought = thought[: len(thought) - _overlap(thought, self._tags.end)]
        self._pending = text if mark else self._pending[len(thought) :]
        shown = thought.rstrip("\n")
        breaks, self._breaks = self._breaks, len(thought) - len(shown)
        if not shown:
            self._breaks += breaks
        elif self._shown:
            shown = "\n" * breaks + shown
        else:
            self._shown, shown = True, shown.lstrip("\n")
        if not mark:
            return shown, ""
        self._phase = ReasoningSplitter._say
        return shown, self._say(last)[1]

    def _say(self, last: bool) -> tuple[str, str]:
        text = self._pending.lstrip("\n") if self._begun else self._pending
        self._pending = ""
        self.ended = text != ""
        return "", text


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the start of `mark`."""
    if mark[0] not in text:
        return 0
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def parser_for(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, options: Mapping[str, Any]) -> str:
    """The reasoning parser of vLLM's that suits a model, by its chat template; empty: it does not think.

    Args:
        chat_template: Jinja text that replaces the tokenizer's own.
        options: what the template is given beside the messages.
    """
    template = chat_template or tokenizer.chat_template
    if not isinstance(template, str) or END not in template or not {START, END} <= tokenizer.get_vocab().keys():
        return ""

    def begins_thought(enable_thinking: bool) -> bool:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **{**options, "enable_thinking": enable_thinking},
        )
        return prompt.rfind(START) > prompt.rfind(END)

    # Where the prompt begins the thought, an answer without marks is one that was cut in it.
    if begins_thought(False):
        return ALWAYS_PARSER
    return "qwen3" if begins_thought(True) else PARSER


def parser_for_folder(
    folder: Path, chat_template: str | None, options: Mapping[str, Any], trust_remote_code: bool
) -> str:
    """The same for a checkpoint that is not loaded; its tokenizer is, but only where it may be a thinking model's."""
    described = [chat_template or ""]
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            described.append((folder / name).read_text(encoding="utf-8"))
    if not any(END in text for text in described):
        return ""
    from transformers import AutoTokenizer

    with suppress(Exception):  # what is wrong with a tokenizer or its template is told by who needs them
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return parser_for(tokenizer, chat_template, options)
    return ""


def think_tags(parser: str, tokenizer: "PreTrainedTokenizerBase") -> ThinkTags | None:
    """The marks of a reasoning parser of vLLM's; None where there is no parser, or its marks are no tokens."""
    if not parser:
        return None
    from vllm.reasoning import ReasoningParserManager

    register()
    found = ReasoningParserManager.get_reasoning_parser(parser)(tokenizer)
    start, end, vocabulary = found.reasoning_start_str, found.reasoning_end_str, tokenizer.get_vocab()
    return ThinkTags(start, end, vocabulary[end]) if start in vocabulary and end in vocabulary else None


def register() -> None:
    """Makes our parsers known to vLLM in this process."""
    from vllm.reasoning import ReasoningParserManager

    for name, adapter in ((PARSER, "QwenReasoningParser"), (ALWAYS_PARSER, "AlwaysReasoningParser")):
        ReasoningParserManager.register_lazy_module(name, "qwen_vllm.vllm_plugin.reasoning_parsers", adapter)
