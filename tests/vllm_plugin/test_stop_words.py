"""Stop words on the OpenAI routes: they count where the text has begun."""

import pytest
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from qwen_vllm.vllm_plugin.stop_words import count_in_the_text

ASKED = "<|im_start|>user\nDo not </think>.<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "<think>\nHm, stop or not?\n</think>\n\n"


def said(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, at_once: int, *stop: str, of_a_chat: bool = True
) -> tuple[str, str | None]:
    """The answer's text and the stop word that ended it; so many tokens come in a step."""
    request = EngineCoreRequest(
        *("id", tokenizer.encode(prompt), None, SamplingParams(stop=[*stop], skip_special_tokens=False)),
        *(None, 0.0, None, None, None),
        reasoning_parser_kwargs={} if of_a_chat else None,
    )
    detokenizer = count_in_the_text(IncrementalDetokenizer.from_new_request)(tokenizer, request)
    token_ids = tokenizer.encode(answer)
    for start in range(0, len(token_ids), at_once):
        if word := detokenizer.update(token_ids[start : start + at_once], False):
            return detokenizer.output_text, word
    return detokenizer.output_text, None


@pytest.mark.parametrize("at_once", [1, 3, 999])
@pytest.mark.parametrize(
    ("prompt", "thought"),
    [
        (ASKED, THOUGHT),
        (ASKED, ""),
        (f"{ASKED}<think>\n", "Hm, stop </think> \n\n"),
        (f"{ASKED}<think>\n\n</think>\n\n", ""),
    ],
)
def test_only_the_text_is_searched(
    qwen3_tokenizer: PreTrainedTokenizerBase, prompt: str, thought: str, at_once: int
) -> None:
    for text, *stop in (("Go, stop here", "stop", "never"), ("stop", "stop"), ("你好，停", "停")):
        ended = thought + text.partition(stop[0])[0], stop[0]
        assert said(qwen3_tokenizer, prompt, f"{thought}{text}", at_once, *stop) == ended
    assert said(qwen3_tokenizer, prompt, f"{thought}Go.", at_once, "stop") == (f"{thought}Go.", None)


def test_where_no_reasoning_is_split_off_all_is_searched(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    answer = said(qwen3_tokenizer, ASKED, f"{THOUGHT}Go.", 1, "stop", of_a_chat=False)
    assert answer == ("<think>\nHm, ", "stop")
