"""Lets stop words count in the text of an answer on the OpenAI routes, and not in its reasoning."""

from collections.abc import Callable
from typing import Any

from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer, check_stop_strings

from qwen_vllm.reasoning import END, START, ReasoningSplitter, ThinkTags

OPENING = 8
"""So many tokens of the prompt, at most, are behind the user's text."""

Make = Callable[[Any, Any], IncrementalDetokenizer]


def count_in_the_text(make: Make) -> Make:
    """Wrap `IncrementalDetokenizer.from_new_request`, which makes what looks for stop words."""

    def from_new_request(tokenizer: Any, request: Any) -> IncrementalDetokenizer:
        made = make(tokenizer, request)
        # The routes that split reasoning off set these arguments.
        if request.reasoning_parser_kwargs is None or not (isinstance(made, BaseIncrementalDetokenizer) and made.stop):
            return made
        vocabulary = tokenizer.get_vocab()
        if START in vocabulary and END in vocabulary:
            tags = ThinkTags(START, END, vocabulary[START], vocabulary[END], tokenizer.decode)
            splitter = ReasoningSplitter(tags, tokenizer.decode((request.prompt_token_ids or [])[-OPENING:]))
            if not splitter.ended:
                _hold_back(made, splitter)
        return made

    return staticmethod(from_new_request)


def _hold_back(detokenizer: BaseIncrementalDetokenizer, splitter: ReasoningSplitter) -> None:
    """Let the detokenizer look for stop words only from where the text begins."""
    update, stop = detokenizer.update, detokenizer.stop
    detokenizer.stop = []

    def update_reasoning(token_ids: list[int], stop_terminated: bool) -> str | None:
        known = len(detokenizer.output_text)
        update(token_ids, stop_terminated)
        _, text = splitter.split(detokenizer.output_text[known:], token_ids, False)
        if not splitter.ended:
            return None
        detokenizer.stop, detokenizer.update = stop, update
        if detokenizer.num_output_tokens() <= detokenizer.min_tokens:
            return None
        word, end = check_stop_strings(text, len(text), stop, detokenizer.include_stop_str_in_output) or (None, -1)
        if end >= 0:
            detokenizer.output_text = detokenizer.output_text[: len(detokenizer.output_text) - len(text) + end]
        return word

    detokenizer.update = update_reasoning
